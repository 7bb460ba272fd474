"""The smallest stages that the loop can train, their config, and what two runs are compared by."""
import json
from dataclasses import replace

import torch
from torch import nn

from sd_nb.config import PRESETS, Recipe
from sd_nb.diffusion.noise import NoiseSchedule
from sd_nb.train.denoising import DenoisingLoss
from sd_nb.train.parallel import World

ALONE = World(0, 1, 0, torch.device("cpu"))


class Net(nn.Module):
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, x, y):
        error = (self.model(x) - y).square().mean(1)
        return error.mean(), dict(mse=error)


class Toy:
    "A small network on random numbers; `at_step` is called before each batch"
    name, count = "unet", 40

    def __init__(self, at_step=lambda step: None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2))
        self.net, self.at_step, self.steps = Net(self.model), at_step, 0
        self.x = torch.randn(self.count, 4)

    def keys(self, rows): return [f"row {row}" for row in rows]

    def batch(self, rows, draws):
        self.at_step(self.steps); self.steps += 1
        return self.x[rows], self.x[rows][:, :2].sin() + 0.1 * draws.normal(2)

    def preview(self, path): path.touch()
    def export(self, directory): directory.mkdir(parents=True, exist_ok=True)


class Denoiser:
    "The UNet on random latents and words, without the rest of the model"
    name, count = "unet", 40

    def __init__(self, config):
        torch.manual_seed(0)
        self.model = config.family.network(config.unet)
        self.net = DenoisingLoss(self.model, config, NoiseSchedule())
        self.latents, self.words = torch.randn(40, 4, 8, 8), torch.randn(40, 5, config.unet.d_context)

    def keys(self, rows): return [f"latent {row}" for row in rows]

    def batch(self, rows, draws):
        return self.latents[rows], draws.normal(4, 8, 8), draws.integers(1000), self.words[rows]

    def preview(self, path): path.touch()
    def export(self, directory): directory.mkdir(parents=True, exist_ok=True)


def config(run, **changes):
    recipes = dict(unet=Recipe(steps=20, batch=8, lr=0.01, share=1.0))
    return replace(PRESETS["tiny"], run=run, recipes=recipes, warmup=4, log_every=1, save_every=5, sample_every=1000, **changes)


def losses(run): return [json.loads(line)["loss"] for line in open(run / "metrics.jsonl")]


def same(a, b):
    weights = all(torch.equal(x, y) for x, y in zip(a.stage.model.parameters(), b.stage.model.parameters()))
    average = all(torch.equal(a.ema.shadow[k], b.ema.shadow[k]) for k in a.ema.shadow)
    moments = all(torch.equal(a.optimizer.state[p]["exp_avg_sq"], b.optimizer.state[q]["exp_avg_sq"]) for p, q in zip(a.parameters, b.parameters))
    return weights and average and moments
