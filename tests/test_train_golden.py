"""The loop against its own past and against the libraries people trust; `python tests/test_train_golden.py` stores a new curve."""
import json
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from few import small_config
from parity import randomise
from toy import ALONE, Denoiser

from sd_nb.config import Recipe
from sd_nb.data.loader import batch_indices
from sd_nb.diffusion.noise import scaled_linear_betas
from sd_nb.foreign import UNET_NAMES, rename, write_unet_config
from sd_nb.train.step import Draws, learning_rate
from sd_nb.train.trainer import Trainer

GOLDEN = Path(__file__).with_name("golden_losses.json")


def processor():
    "Its name: kernels are chosen by it"
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return (names or [platform.processor()])[0]


def curve(run):
    "The losses of fifty steps of a small UNet on one thread, and what they were computed with"
    config = replace(small_config(run=run, recipes=dict(unet=Recipe(50, 4, 1e-3, 1.0))), precision="float32")
    threads, trainer = torch.get_num_threads(), Trainer(Denoiser(config), config, ALONE)
    torch.set_num_threads(1)
    try: assert trainer.fit()
    finally: torch.set_num_threads(threads)
    losses = [json.loads(row)["loss"] for row in open(run / "metrics.jsonl")]
    return dict(torch=torch.__version__, processor=processor(), losses=losses)


def test_fault_35_golden_loss_curve(tmp_path):
    "Fifty losses are those that were stored: bit for bit with the same build of torch and processor, to 1e-5 otherwise"
    stored, now = json.loads(GOLDEN.read_text()), curve(tmp_path)
    same = all(stored[key] == now[key] for key in ("torch", "processor"))
    assert len(stored["losses"]) == 50 and len(set(stored["losses"])) == 50
    assert now["losses"] == (stored["losses"] if same else pytest.approx(stored["losses"], abs=1e-5))


class Diffusers:
    "The same step, written with diffusers' UNet, noise and EMA and torch's AdamW"
    def __init__(self, model, config):
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from diffusers.training_utils import EMAModel
        self.config, self.unet = config, UNet2DConditionModel.from_config(write_unet_config(config.unet, 8)).train()
        self.unet.load_state_dict(rename(model.state_dict(), UNET_NAMES))
        self.scheduler = DDPMScheduler(trained_betas=scaled_linear_betas().numpy())
        parameters = list(self.unet.parameters())
        groups = [dict(params=[p for p in parameters if p.ndim > 1], weight_decay=config.weight_decay),
                  dict(params=[p for p in parameters if p.ndim <= 1], weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.99))
        self.ema = EMAModel(self.unet.parameters(), decay=config.ema)

    def step(self, k, x0, noise, t, context):
        "Step number k, from 1: diffusers' EMA takes over the weights in step 0"
        recipe = self.config.recipe("unet")
        for group in self.optimizer.param_groups: group["lr"] = learning_rate(k, recipe.lr, self.config.warmup)
        self.optimizer.zero_grad()
        answer = self.unet(self.scheduler.add_noise(x0, noise, t), t, encoder_hidden_states=context).sample
        abar = self.scheduler.alphas_cumprod[t]
        weight = (self.config.gamma * (1 - abar) / abar).clamp(max=1)  # min(snr, gamma) / snr
        loss = (weight * (answer - noise).square().mean((1, 2, 3))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.ema.optimization_step = k
        self.ema.step(self.unet.parameters())
        return loss.item()


def give_a_past(optimizer, named):
    "Moments as after a hundred steps: in the very first one AdamW looks at the sign of a gradient only, also where that is rounding"
    for i, (_, p) in enumerate(sorted(named)):
        g = torch.Generator().manual_seed(i)
        moments = dict(exp_avg=0.01 * torch.randn(p.shape, generator=g), exp_avg_sq=1e-4 * (0.5 + torch.rand(p.shape, generator=g)))
        optimizer.state[p] = dict(step=torch.tensor(100.0), **moments)


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_step_equals_that_of_diffusers_and_torch(tmp_path, pieces):
    "Loss, weights, average: after one step, and after three, to 1e-5, on the same batch, noise and timesteps"
    config = small_config(run=tmp_path, recipes=dict(unet=Recipe(9, 4, 1e-3, 1.0)), accumulate=pieces)
    config = replace(config, prediction="eps", gamma=5.0, zero_snr=False, precision="float32")
    stage = Denoiser(config)
    randomise(stage.model)
    ours, theirs = Trainer(stage, config, ALONE), Diffusers(stage.model, config)
    give_a_past(ours.optimizer, rename(dict(stage.model.named_parameters()), UNET_NAMES).items())
    give_a_past(theirs.optimizer, theirs.unet.named_parameters())
    ours.step = 1
    for k in (1, 2, 3):
        batch = stage.batch(batch_indices(k, stage.count, 4, config.seed), Draws(config.seed, k, 4))
        before = {name: p.clone() for name, p in rename(stage.model.state_dict(), UNET_NAMES).items()}
        loss = theirs.step(k, *batch)
        ours.step_once()
        assert ours.window.flush()["loss"] == pytest.approx(loss, abs=1e-5)
        weights, average = (rename(state, UNET_NAMES) for state in (stage.model.state_dict(), ours.ema.state_dict()))
        for (name, p), shadow in zip(theirs.unet.named_parameters(), theirs.ema.shadow_params, strict=True):
            torch.testing.assert_close(weights[name], p.detach(), rtol=0, atol=1e-5, msg=name)
            torch.testing.assert_close(average[name], shadow, rtol=0, atol=1e-5, msg=name)
        moved = max((weights[name] - p).abs().max().item() for name, p in before.items())
        assert moved > 5e-4  # what is compared is fifty times larger than the tolerance


if __name__ == "__main__":
    import tempfile
    GOLDEN.write_text(json.dumps(curve(Path(tempfile.mkdtemp()) / "run"), indent=1) + "\n")
