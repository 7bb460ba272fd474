"""Our UNet beside diffusers', on the same weights, in one process: outputs and gradients first, then times.

    python benchmarks/unet.py                  Stable Diffusion 1.x at 16x16, eager, both memory formats
    python benchmarks/unet.py --side 32 --compile
    python benchmarks/unet.py --tiny           a small one, to see that the script works

Calls are interleaved (ours, theirs, ours, theirs, ...), the first round is thrown away, medians are compared.
A ratio below 1 means that ours is faster. `peak` is the share of the machine's own matrix multiplication.
"""

from dataclasses import dataclass
from functools import partial

import torch
import tyro
from common import in_turn, refuse_when_busy, same, save, seconds
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sd_nb.foreign import UNET_NAMES, rename, write_unet_config
from sd_nb.model.unet import UNet, UNetConfig, recompute_blocks

TINY = UNetConfig(width=32, mults=(1, 2), attn=(True, True), heads=4, d_context=64, groups=8)


@dataclass
class Benchmark:
    "Compare our UNet's speed with diffusers'"
    side: int = 16  # of the latent; 64 is a picture of 512 pixels
    rounds: int = 5  # timed calls of each
    threads: int = 2
    compile: bool = False  # compile both
    tiny: bool = False  # a small network instead of Stable Diffusion 1.x
    out: str | None = None  # JSON file for the rows
    anyway: bool = False  # run although the machine has other work


@torch.no_grad()
def pair(config):
    "Both networks on the same memory, no weight zero."
    with torch.device("meta"):
        ours, theirs = UNet(config), UNet2DConditionModel.from_config(write_unet_config(config))
    ours.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for p in ours.parameters():
        nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.3 if p.ndim == 1 else p[0].numel() ** -0.5, generator)
    theirs.load_state_dict(rename(ours.state_dict(), UNET_NAMES), strict=True, assign=True)
    return ours, theirs.requires_grad_()


def forward(net, inputs):
    with torch.no_grad():
        return result(net(*inputs))


def result(y):
    return y if torch.is_tensor(y) else y.sample


def backward(net, inputs):
    "The norms of all gradients, sorted: the two list their parameters in another order (tests compare by name)."
    y = result(net(*inputs))
    gradients = torch.autograd.grad(y.square().mean(), list(net.parameters()))
    return torch.tensor(sorted(g.norm().item() for g in gradients))


def peak(n=2048):
    "FLOP/s of a large matrix multiplication, the best of ten."
    a, b = torch.randn(n, n), torch.randn(n, n)
    return 2 * n**3 / min(seconds(torch.mm, a, b) for _ in range(10))


def compare(name, call, nets, inputs, rounds, top):
    "Equal results, then interleaved times, as one row."
    with FlopCounterMode(display=False) as counter:
        a = call(nets[0], inputs)
    difference = same(name, a, call(nets[1], inputs))
    times = in_turn(*(partial(call, net, inputs) for net in nets), rounds)
    flops = counter.get_total_flops()
    return dict(row=name, **times, difference=difference, gflop=flops / 1e9, peak=flops / times["ours"] / top)


def rows(args):
    "All rows: forward and forward with backward, in both memory formats, with and without recomputing."
    config = TINY if args.tiny else UNetConfig()
    nets, top = pair(config), peak()
    inputs = torch.randn(1, 4, args.side, args.side), torch.tensor([500]), torch.randn(1, 77, config.d_context)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        nets = [net.to(memory_format=memory_format) for net in nets]
        x = inputs[0].contiguous(memory_format=memory_format)
        called = [torch.compile(net) for net in nets] if args.compile else nets
        label = str(memory_format).removeprefix("torch.").removesuffix("_format")
        yield compare(f"forward, {label}", forward, called, (x, *inputs[1:]), args.rounds, top)
        yield compare(f"forward + backward, {label}", backward, called, (x, *inputs[1:]), args.rounds, top)
    recompute_blocks(nets[0])
    nets[1].enable_gradient_checkpointing()
    nets[1].train()
    yield compare(f"the same, recomputing, {label}", backward, nets, (x, *inputs[1:]), args.rounds, top)


def main(args):
    refuse_when_busy(args.anyway)
    torch.set_num_threads(args.threads)
    table = []
    for row in rows(args):
        table.append(row)
        print("{row:40} ours {ours:7.3f} s  theirs {theirs:7.3f} s  ratio {ratio:.3f} ({lowest:.3f} to {highest:.3f})  "
              "peak {peak:.0%}  difference {difference:.0e}".format(**row), flush=True)
    if args.out:
        save(args.out, table, side=args.side)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
