"""The small trained model that the package carries: small enough, safe to open, and it has learned something."""
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import sd_nb
from sd_nb import StableDiffusion
from sd_nb.diffusion.samplers import SAMPLERS

MODEL = Path(sd_nb.__file__).parent / "assets" / "model"


@pytest.fixture(scope="module")
def pipe():
    return StableDiffusion.embedded(device="cpu")


def test_at_most_25_megabytes_and_nothing_that_runs():
    """Weights in safetensors, the rest JSON and text."""
    files = [p for p in MODEL.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 25_000_000
    assert {p.suffix for p in files} == {".json", ".safetensors", ".txt"}


def test_colours_follow_the_words(pipe):
    """From the same noise, the colour that the prompt names is the strongest of the picture's ink."""
    noise = pipe.noise(1, seed=0).expand(3, -1, -1, -1)
    names = ["red heart, flat style", "green heart, flat style", "blue heart, flat style"]
    for channel, picture in enumerate(pipe(names, latents=noise, guidance=4, output="np", progress=False)):
        ink = picture[picture.min(-1) < 0.6]  # what is not white paper
        assert len(ink) > 400 and ink.mean(0).argmax() == channel


def test_words_lower_the_error(pipe):
    """On held-out noise, the network predicts better with a picture's own caption than with another's or with none."""
    from sd_nb.data.emoji import embedded
    from sd_nb.data.images import find_shards, read_shard, square
    samples = [s for s in read_shard(find_shards(embedded())[0]) if s.meta["split"] == "train"][:64]
    pixels = torch.tensor(np.stack([np.asarray(square(s.image, 64)) for s in samples])).movedim(-1, 1) / 127.5 - 1
    generator, captions = torch.Generator().manual_seed(0), [s.caption for s in samples]
    with torch.no_grad():
        x0 = pipe.autoencoder.encode(pixels).mean * pipe.autoencoder.config.scale
        noise, t = torch.randn(x0.shape, generator=generator), torch.full((64,), 700)
        abar = pipe.schedule.abar[700]
        x, v = pipe.schedule.add_noise(x0, noise, t), abar**0.5 * noise - (1 - abar) ** 0.5 * x0
        own, other, none = ((pipe.unet(x, t, pipe.encode(texts)) - v).square().mean()
                            for texts in (captions, captions[1:] + captions[:1], [""] * 64))
    assert own < 0.9 * none and own < 0.8 * other


def test_autoencoder_keeps_the_picture(pipe):
    """A held-out emoji comes back with an error of a few hundredths of the range, and latents have unit deviation."""
    from sd_nb.data.emoji import embedded
    from sd_nb.data.images import find_shards, read_shard, square
    samples = [s for s in read_shard(find_shards(embedded())[0]) if s.meta["split"] == "held_out"][:16]
    pixels = torch.tensor(np.stack([np.asarray(square(s.image, 64)) for s in samples])).movedim(-1, 1) / 127.5 - 1
    with torch.no_grad():
        z = pipe.autoencoder.encode(pixels).mean
        error = (pipe.autoencoder.decode(z) - pixels).abs().mean() / 2
    assert error < 0.05 and 0.5 < (z * pipe.autoencoder.config.scale).std() < 2


def test_diffusers_draws_the_same(pipe):
    """The directory is a diffusers pipeline: same noise, same steps, same picture."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    theirs = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32, safety_checker=None)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    noise, prompt = pipe.noise(1, seed=1), "red apple, flat style"
    a = pipe(prompt, latents=noise, steps=10, guidance=3, sampler="ddim", output="np", progress=False)
    b = theirs(prompt, latents=noise.clone(), num_inference_steps=10, guidance_scale=3, output_type="np").images
    assert_close(torch.tensor(a), torch.tensor(b), atol=2 / 255, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws(pipe, sampler):
    """A red heart on white paper, whichever way it is walked to."""
    picture = pipe("red heart, flat style", steps=20, guidance=4, sampler=sampler, output="np", progress=False)[0]
    ink = picture[picture.min(-1) < 0.6]
    assert picture[:3].mean() > 0.9 and len(ink) > 400 and ink.mean(0).argmax() == 0


def test_fifteen_calls_are_nearer_than_fifty_of_ddim(pipe):
    """To where 200 DDIM steps lead (which favours DDIM), 15 calls of the default come closer than 50 of DDIM."""
    options = dict(guidance=4, output="latent", progress=False)
    truth, default, ddim = (pipe(["red heart", "green tree"], **options, **how) for how in (
        dict(sampler="ddim", steps=200), dict(steps=15), dict(sampler="ddim", steps=50)))
    assert (default - truth).square().mean() < (ddim - truth).square().mean()
