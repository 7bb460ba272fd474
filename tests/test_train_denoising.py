"""The dials of the objective: each reaches the loss, each is a function of (seed, step), each run can be drawn from."""
from dataclasses import replace

import pytest
import torch
from few import few_shards, small_config
from torch import nn
from toy import ALONE

from sd_nb.config import PRESETS, config_from_args
from sd_nb.diffusion.noise import NoiseSchedule
from sd_nb.diffusion.objective import denoising_loss
from sd_nb.foreign import read_sampling, write_sampling_config
from sd_nb.pipeline import StableDiffusion
from sd_nb.train.denoising import DenoisingLoss, draw_levels, draw_noise
from sd_nb.train.stages import AutoencoderStage, CLIPStage, UNetStage
from sd_nb.train.step import Draws


class Half(nn.Module):
    def forward(self, x, t, context): return 0.5 * x


def loss_of(**changes):
    "The loss of a fixed network on fixed latents, with these settings"
    d, schedule = Draws(0, 0, 64), NoiseSchedule()
    x0, noise, t = d.normal(4, 4, 4), d.normal(4, 4, 4), d.integers(1000)
    loss, metrics = DenoisingLoss(Half(), replace(PRESETS["sd1"], **changes), schedule)(x0, noise, t, None)
    return loss, metrics, (Half(), schedule, x0, noise, t, None)


@pytest.mark.parametrize("kind", ["eps", "v", "x0", "flow"])
@pytest.mark.parametrize("changes", [{}, dict(gamma=None), dict(soft_snr=True), dict(huber=0.3), dict(gamma=2.0, huber=0.1, soft_snr=True)])
def test_the_config_reaches_the_loss(kind, changes):
    "The wrapper's loss is the objective's with the settings of the config"
    loss, metrics, args = loss_of(prediction=kind, **changes)
    how = dict(gamma=5.0, soft_snr=False, huber=None) | changes
    weighted, plain = denoising_loss(*args, kind, how["gamma"], soft=how["soft_snr"], huber=how["huber"])
    assert torch.equal(loss, weighted.mean()) and torch.equal(metrics["mse"], plain)


def test_every_dial_changes_the_loss_and_none_the_plain_error():
    "A dial that did nothing would be found here; the plain error does not see how errors are counted"
    plain = loss_of()[1]["mse"]
    values = [loss_of(**c) for c in ({}, dict(gamma=None), dict(gamma=2.0), dict(soft_snr=True), dict(huber=0.3))]
    assert len({v[0].item() for v in values}) == 5 and all(torch.equal(v[1]["mse"], plain) for v in values)


def test_draws_are_those_of_the_whole_batch():
    "With offset and logit-normal levels, too, parts drawn by four processes are the batch drawn by one"
    for draw in (lambda d: draw_noise(d, (4, 2, 2), 0.2), lambda d: draw_levels(d, 1000, "logit-normal"), lambda d: draw_levels(d, 1000)):
        assert torch.equal(torch.cat([draw(Draws(3, 5, 8, rank, 4)) for rank in range(4)]), draw(Draws(3, 5, 8)))


def test_offset_and_levels_have_their_distribution():
    "The offset moves a channel's mean by its deviation; logit-normal levels lie in the middle: 68 % within a deviation"
    noise = draw_noise(Draws(0, 0, 4000), (2, 16, 16), 0.5)
    assert noise.mean((2, 3)).std() == pytest.approx(0.5, rel=0.05)
    t = draw_levels(Draws(0, 0, 20_000), 1000, "logit-normal")  # logit(0.269) = -1: one deviation to each side is 68 %
    assert ((t > 269) & (t < 731)).float().mean() == pytest.approx(0.683, abs=0.02)


@pytest.mark.parametrize("words, message", [
    (["--zero-snr", "--prediction", "eps"], "--zero-snr needs --prediction v, x0 or flow"), (["--huber", "0"], "--huber 0.0 must be positive"),
    (["--soft-snr", "--gamma", "None"], "--soft-snr needs a --gamma"), (["--offset-noise", "-1"], "--offset-noise -1.0 must be"),
    (["--accumulate", "2", "--stage", "clip"], "would change CLIP's loss")])
def test_dials_that_contradict_are_refused(words, message):
    "One line that names the flag"
    with pytest.raises(ValueError, match=message): config_from_args(["sd1", *words], "train")


def test_flags_reach_the_config():
    "Every dial can be set from the command line"
    words = "sd1 --prediction flow --soft-snr --huber 0.1 --offset-noise 0.1 --timesteps logit-normal --decay 1 --fall cosine".split()
    c = config_from_args(words, "train")
    assert (c.prediction, c.soft_snr, c.huber, c.offset_noise, c.timesteps, c.fall) == ("flow", True, 0.1, 0.1, "logit-normal", "cosine")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run directory with an untrained autoencoder and text encoder"
    folder = tmp_path_factory.mktemp("denoising")
    config = small_config(run=folder / "run", data=few_shards(folder / "few", 40))
    for stage in (AutoencoderStage, CLIPStage): stage(config, ALONE).export(config.run / "model")
    return config


@pytest.mark.parametrize("kind", ["x0", "flow"])
def test_a_model_of_every_kind_is_kept_and_drawn_from(run, kind, tmp_path):
    "The directory remembers the question, and the pipeline draws with it"
    stage = UNetStage(replace(run, prediction=kind, zero_snr=False, offset_noise=0.1, timesteps="logit-normal"), ALONE)
    loss, _ = stage.net(*stage.batch(torch.arange(8).numpy(), Draws(0, 0, 8)))
    assert loss.isfinite()
    stage.export(tmp_path / "model")
    pipe = StableDiffusion.from_pretrained(tmp_path / "model")
    assert pipe.sampling.prediction == kind
    assert pipe("red apple", steps=2, progress=False)[0].size == (16, 16)
    assert read_sampling(write_sampling_config(pipe.sampling), pipe.sampling.size) == pipe.sampling
