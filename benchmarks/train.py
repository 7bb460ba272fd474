"""Our training loop beside the recipe of diffusers' `train_text_to_image.py`: one step's results first, then images/s.

    python benchmarks/train.py                        the networks of the preset `small`, pictures of 128 pixels
    python benchmarks/train.py --preset sd1 --batch 1
    python benchmarks/train.py --preset tiny --size 32 --pictures 16 --rounds 2    to see that the script works

Their side is that script's loop in float32, built from diffusers' UNet, DDPM noise and EMA, torch's AdamW and the same networks,
which ours writes and theirs opens; it is spared decoding pictures and the script's launcher. Ours is `Trainer.tick`, as a run calls it.
Weights, pictures, batch, noise and timesteps are the same: loss, weights and averages after one step are compared before a step
is timed. Both optimizers start with the moments of a run under way, because the first step of all looks at signs only.

Steps are interleaved, the first round is thrown away, medians are compared; a ratio below 1 means that ours is faster.
`overhead` is the share of a step of ours that is not forward, backward, optimizer and average: drawing the batch, clipping,
the guard, the logs; clipping, which reads every gradient, is printed on its own too.
"""

import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
import tyro
from common import in_turn, refuse_when_busy, same, save, seconds
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from transformers import CLIPTextModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from few import few_shards  # noqa: E402
from parity import randomise  # noqa: E402
from test_train_golden import give_a_past  # noqa: E402
from toy import ALONE  # noqa: E402

from sd_nb.config import PRESETS, Recipe  # noqa: E402
from sd_nb.data.images import find_shards, read_shard  # noqa: E402
from sd_nb.data.latents import to_float  # noqa: E402
from sd_nb.data.loader import batch_indices  # noqa: E402
from sd_nb.foreign import UNET_NAMES, rename  # noqa: E402
from sd_nb.interop import Parts, Sampling, save_diffusers  # noqa: E402
from sd_nb.model.autoencoder import Autoencoder  # noqa: E402
from sd_nb.model.clip import TextEncoder  # noqa: E402
from sd_nb.model.tokenizer import Tokenizer  # noqa: E402
from sd_nb.model.unet import UNet  # noqa: E402
from sd_nb.train import trainer as loop  # noqa: E402
from sd_nb.train.material import packed_pixels, splits  # noqa: E402
from sd_nb.train.stages import UNetStage  # noqa: E402
from sd_nb.train.step import Draws  # noqa: E402

NEVER = 10**9  # steps


@dataclass
class Benchmark:
    "Compare how fast the UNet trains with diffusers' recipe"
    preset: Literal["tiny", "small", "sd1"] = "small"  # whose networks
    size: int = 128  # side of the pictures in pixels
    batch: int = 4
    pictures: int = 64  # in the data set
    rounds: int = 5  # timed steps of each
    threads: int = 2
    channels_last: bool = False  # our switch, which the script has not
    out: str | None = None  # JSON file for the rows
    anyway: bool = False  # run although the machine has other work


def config_of(args, run):
    "What that script does, as a config of ours: plain eps loss, no dropped captions, a constant rate"
    return replace(
        PRESETS[args.preset], run=run, data=few_shards(run / "data", args.pictures), size=args.size, precision="float32",
        prediction="eps", gamma=None, zero_snr=False, drop_text=0.0, warmup=1, sample_every=NEVER, save_every=NEVER,
        channels_last=args.channels_last, recipes=dict(unet=Recipe(NEVER, args.batch, 1e-4, 1.0)))


def write_model(config):
    "Write random networks, no weight zero, where both sides open them; return our UNet"
    captions = [sample.caption for shard in find_shards(config.data) for sample in read_shard(shard)]
    text = config.clip.text
    tokenizer = Tokenizer.train(captions, vocab_size=min(text.vocab, 1000), window=text.window)
    networks = [randomise(net) for net in (UNet(config.unet), Autoencoder(config.autoencoder), TextEncoder(text))]
    save_diffusers(config.run / "model", Parts(*networks, tokenizer, Sampling(size=config.size)))
    return networks[0]


class Theirs:
    "The script's step; latents and text vectors are computed in each, or taken from where ours has them"
    def __init__(self, stage, config):
        home = config.run / "model"
        self.unet = UNet2DConditionModel.from_pretrained(home, subfolder="unet").train()
        self.vae = AutoencoderKL.from_pretrained(home, subfolder="vae").requires_grad_(False)
        self.text_encoder = CLIPTextModel.from_pretrained(home, subfolder="text_encoder").requires_grad_(False)
        self.scheduler = DDPMScheduler.from_pretrained(home, subfolder="scheduler")
        self.parameters = list(self.unet.parameters())
        groups = [dict(params=[p for p in self.parameters if p.ndim > 1], weight_decay=config.weight_decay),
                  dict(params=[p for p in self.parameters if p.ndim <= 1], weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=config.recipe("unet").lr, betas=(0.9, 0.99))
        self.rate = get_scheduler("constant", self.optimizer)
        self.ema = EMAModel(self.parameters, decay=config.ema)
        self.config, self.step, self.encodes_pictures, self.encodes_captions = config, 0, False, False
        self.moments, self.tokens, self.pixels = stage.latents, stage.tokens, splits(packed_pixels(config, ALONE))[0]
        self.words = torch.cat([stage.text_encoder(tokens[None]) for tokens in stage.tokens])

    @torch.no_grad()
    def posterior(self, rows):
        if self.encodes_pictures: return self.vae.encode(to_float(self.pixels[rows])).latent_dist
        return DiagonalGaussianDistribution(torch.from_numpy(self.moments[rows]).float())

    @torch.no_grad()
    def context(self, rows):
        return self.text_encoder(self.tokens[rows])[0] if self.encodes_captions else self.words[rows]

    def tick(self):
        "Draw a batch and learn from it"
        rows = batch_indices(self.step, len(self.pixels), self.config.recipe("unet").batch, 0)
        latents = self.posterior(rows).sample() * self.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(rows),))
        self.learn(latents, noise, t, self.context(rows))
        self.step += 1

    def learn(self, latents, noise, t, context):
        "Loss, gradient, update and average; returns the loss"
        answer = self.unet(self.scheduler.add_noise(latents, noise, t), t, context).sample
        loss = F.mse_loss(answer.float(), noise.float())
        told = loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)
        return told


def cache_text(stage):
    "Let our stage, too, look text vectors up; a run of ours computes them in each step"
    vectors = torch.cat([stage.text_encoder(tokens[None]) for tokens in (*stage.tokens, *stage.empty)])
    stage.tokens, stage.empty = torch.arange(stage.count)[:, None], torch.tensor([[stage.count]])
    stage.text_encoder = lambda places: vectors[places[:, 0]]


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def compare(ours, theirs):
    "The same inputs, and after the same step the same loss, weights and average; returns the largest difference"
    stage, recipe = ours.stage, ours.recipe
    names = [name for name, _ in theirs.unet.named_parameters()]
    by_their_name = lambda state: flat(rename(state, UNET_NAMES)[name] for name in names)
    give_a_past(ours.optimizer, rename(dict(stage.model.named_parameters()), UNET_NAMES).items())
    give_a_past(theirs.optimizer, theirs.unet.named_parameters())
    ours.step = theirs.ema.optimization_step = 1  # their average is a copy in step 0
    rows = batch_indices(1, stage.count, recipe.batch, 0)
    theirs.encodes_pictures = theirs.encodes_captions = True
    same("latents", torch.from_numpy(stage.latents[rows]).float(), theirs.posterior(rows).parameters, 2e-3)  # ours in half precision
    same("text vectors", stage.text_encoder(stage.tokens[rows]), theirs.context(rows))
    before = by_their_name(stage.model.state_dict()).clone()
    loss = theirs.learn(*stage.batch(rows, Draws(0, 1, recipe.batch)))
    ours.step_once()
    weights = by_their_name(stage.model.state_dict())
    return max(same("loss", torch.tensor(ours.window.flush()["loss"]), torch.tensor(loss)),
               same("movement of the weights", weights - before, flat(theirs.parameters) - before, 1e-2),
               same("weights", weights, flat(theirs.parameters), 1e-5),
               same("average", by_their_name(ours.ema.state_dict()), flat(theirs.ema.shadow_params), 1e-5))


def overhead(ours, bar, rounds):
    "Shares of our step: what is not learning, and the part of it that clips"
    spent = Counter()
    def watched(name, call):
        def timed(*args, **kwargs):
            began = time.perf_counter()
            try: return call(*args, **kwargs)
            finally: spent[name] += time.perf_counter() - began
        return timed
    parts = [(loop, "add_up"), (ours.optimizer, "step"), (ours.ema, "update"), (nn.utils, "clip_grad_norm_")]
    with ExitStack() as stack:
        for owner, name in parts: stack.enter_context(patch.object(owner, name, watched(name, getattr(owner, name))))
        whole = sum(seconds(ours.tick, bar) for _ in range(rounds))
    clipping = spent.pop("clip_grad_norm_")
    return dict(row="overhead", seconds=whole / rounds, overhead=1 - spent.total() / whole, clipping=clipping / whole)


def rows(args, run):
    "All rows, each less favourable to ours than the one before"
    config = config_of(args, run)
    network = write_model(config)
    stage = UNetStage(config, ALONE)
    stage.model.load_state_dict(network.state_dict())
    ours, theirs = loop.Trainer(stage, config, ALONE), Theirs(stage, config)
    difference = compare(ours, theirs)
    ours.prepare()
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere): bar = ours.progress()
    def row(name): return dict(row=name, **in_turn(lambda: ours.tick(bar), theirs.tick, args.rounds), batch=args.batch, difference=difference)
    yield row("latents cached by ours only")
    theirs.encodes_pictures = False
    yield row("latents cached by both")
    yield overhead(ours, bar, max(args.rounds, config.log_every))
    cache_text(stage)
    theirs.encodes_captions = False
    yield row("latents and text cached by both")
    ours.logs.close()


def main(args):
    refuse_when_busy(args.anyway)
    torch.set_num_threads(args.threads)
    table, line = [], "{row:32} ours {a:8.3f} images/s  theirs {b:8.3f} images/s  ratio {ratio:.3f} ({lowest:.3f} to {highest:.3f})  difference {difference:.0e}"
    with tempfile.TemporaryDirectory() as run:
        for row in rows(args, Path(run)):
            table.append(row)
            if row["row"] == "overhead": print("{row:32} {overhead:.2%} of a step of {seconds:.3f} s, {clipping:.2%} of it clipping".format(**row), flush=True)
            else: print(line.format(**row, a=args.batch / row["ours"], b=args.batch / row["theirs"]), flush=True)
    if args.out:
        save(args.out, table, preset=args.preset, size=args.size, channels_last=args.channels_last)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
