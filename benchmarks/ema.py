"""Our average of the weights beside diffusers' EMAModel, and both beside the speed of memory.

    python benchmarks/ema.py               the UNet of Stable Diffusion 1.x
    python benchmarks/ema.py --tiny        a small one, to see that the script works

Averages are compared first, after the same updates of the same weights. Then calls are interleaved, the first round is thrown away,
medians are compared; a ratio below 1 means that ours is faster. `roof` is the time that memory needs: an update reads
two numbers and writes one, at the bandwidth at which this machine copies the same weights (one read, one write);
`share` is the roof beside our time. Lending is bringing the average into the network and the live weights back.
"""

from dataclasses import dataclass

import torch
import tyro
from common import in_turn, refuse_when_busy, same, save, seconds
from diffusers.training_utils import EMAModel

from sd_nb.model.unet import UNet, UNetConfig
from sd_nb.train.ema import EMA
from sd_nb.train.posthoc import PowerEMA

TINY = UNetConfig(width=32, mults=(1, 2), attn=(True, True), heads=4, d_context=64, groups=8)
STEP = 1000  # an update in the middle of a run; theirs does nothing useful at its first


@dataclass
class Benchmark:
    "Compare the time of an update of the average with that of diffusers', and with the speed of memory"
    rounds: int = 10  # timed calls of each
    threads: int = 2
    tiny: bool = False  # a small network instead of Stable Diffusion 1.x
    out: str | None = None  # JSON file for the rows
    anyway: bool = False  # run although the machine has other work


@torch.no_grad()
def move(network):
    "Put every weight somewhere else."
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)


@torch.no_grad()
def bandwidth(parameters):
    "Bytes read and written in a second when all weights are copied, the best of ten."
    copies = [torch.empty_like(p) for p in parameters]
    moved = 2 * sum(p.numel() * p.element_size() for p in parameters)
    return moved / min(seconds(torch._foreach_copy_, copies, parameters) for _ in range(10))


def their_update(ema, parameters):
    ema.optimization_step = STEP
    ema.step(parameters)


def their_loan(ema, parameters):
    ema.store(parameters)
    ema.copy_to(parameters)
    ema.restore(parameters)


def our_loan(ema):
    with ema.swapped():
        pass


def rows(args):
    "All rows: an update, the same of a power function, and a loan."
    network = UNet(TINY if args.tiny else UNetConfig())
    parameters = list(network.parameters())
    ours, power, theirs = EMA(network, 0.9999), PowerEMA(network, 0.05), EMAModel(parameters, decay=0.9999)
    move(network)
    ours.update(STEP)
    their_update(theirs, parameters)
    pairs = zip((ours.shadow[name] for name, _ in network.named_parameters()), theirs.shadow_params)
    difference = max(same("average", a, b, 1e-5) for a, b in pairs)
    roof = 1.5 * 2 * sum(p.numel() * p.element_size() for p in parameters) / bandwidth(parameters)
    calls = {"update": lambda: ours.update(STEP), "update, power function": lambda: power.update(STEP)}
    for name, call in calls.items():
        times = in_turn(call, lambda: their_update(theirs, parameters), args.rounds)
        yield dict(row=name, **times, roof=roof, share=roof / times["ours"], difference=difference)
    times = in_turn(lambda: our_loan(ours), lambda: their_loan(theirs, parameters), args.rounds)
    yield dict(row="loan", **times, roof=0.0, share=0.0, difference=difference)


def main(args):
    refuse_when_busy(args.anyway)
    torch.set_num_threads(args.threads)
    table = []
    for row in rows(args):
        table.append(row)
        print("{row:24} ours {ours:9.6f} s  theirs {theirs:9.6f} s  ratio {ratio:.3f} ({lowest:.3f} to {highest:.3f})  "
              "roof {roof:9.6f} s  share {share:.0%}  difference {difference:.0e}".format(**row), flush=True)
    if args.out:
        save(args.out, table)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
