"""Editing is diffusers' editing on shared weights, keeps what a mask keeps, and refuses in one line."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import UNET, tiny_parts
from torch.testing import assert_close

from sd_nb import StableDiffusion
from sd_nb.diffusion.samplers import SAMPLERS
from sd_nb.edit import _fill, free_memory, memory_needed, opaque

WORDS = dict(prompt="a red apple", negative_prompt="the moon", guidance=4.0, progress=False)


def picture(width=16, height=16, seed=0):
    "A picture of soft colours"
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def half_mask(width=16, height=16):
    "The right half shall be filled"
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def certain(parts):
    "An encoder without doubt: a sample of what it says is its mean"
    with torch.no_grad():
        parts.autoencoder.quant.weight[4:] = 0
        parts.autoencoder.quant.bias[4:] = -40
    return parts


def opened(kind, ours, directory, monkeypatch, noise):
    "The pipeline of diffusers on our weights, which begins with our noise"
    import diffusers
    ours.save_pretrained(directory)
    pipe = getattr(diffusers, kind).from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    for name in ("stable_diffusion_img2img", "stable_diffusion_inpaint"):
        monkeypatch.setattr(f"diffusers.pipelines.stable_diffusion.pipeline_{name}.randn_tensor", lambda *args, **kwargs: noise.clone())
    return pipe


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return StableDiffusion(certain(tiny_parts()))


@pytest.fixture(scope="module")
def filler():
    "A model whose UNet has nine channels"
    torch.manual_seed(0)
    return StableDiffusion(certain(tiny_parts(replace(UNET, c_in=9))))


def close(a, b):
    "Equal to 1/255, and no plain surface"
    assert a.shape == b.shape and np.abs(a - b).max() < 1 / 255 and b.std() > 0.05


@pytest.mark.parametrize("strength", [0.15, 0.5, 0.8, 1.0])
def test_image_to_image_is_diffusers(pipe, tmp_path, monkeypatch, strength):
    """Same weights, same noise, DDIM: the picture of StableDiffusionImg2ImgPipeline, at a size that is not square."""
    image, noise = picture(24, 16), pipe.noise(1, 5, height=16, width=24)
    other = opened("StableDiffusionImg2ImgPipeline", pipe, tmp_path, monkeypatch, noise)
    theirs = other("a red apple", image, strength, num_inference_steps=10, guidance_scale=4.0, negative_prompt="the moon", output_type="np").images
    close(theirs, pipe.edit(image=image, strength=strength, steps=10, seed=5, sampler="ddim", output="np", **WORDS))


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_nine_channels_are_diffusers(filler, tmp_path, monkeypatch, strength):
    """StableDiffusionInpaintPipeline with a UNet of nine channels: latent, mask, masked picture; before the pasting."""
    image, noise = picture(), filler.noise(1, 5)
    other = opened("StableDiffusionInpaintPipeline", filler, tmp_path, monkeypatch, noise)
    if strength == 1: monkeypatch.setattr(other.scheduler, "init_noise_sigma", 1.0)
    theirs = other("a red apple", image, half_mask(), height=16, width=16, strength=strength, num_inference_steps=10, guidance_scale=4.0,
                   negative_prompt="the moon", output_type="np").images
    z = filler.edit(image=image, mask=half_mask(), strength=strength, steps=10, seed=5, sampler="ddim", output="latent", **WORDS)
    if strength == 1:  # diffusers then begins with pure noise, we with the picture's last trace below it
        x, mask = (torch.tensor(np.asarray(o)).float() for o in (image, half_mask()))
        fill = _fill(filler, x.movedim(-1, 0)[None] / 127.5 - 1, z, mask[None, None] / 255)
        *_, last = filler.denoise("a red apple", "the moon", 10, 4.0, "ddim", 5, **fill)
        z = last.x
    close(theirs, filler.decode(z, "np"))


def test_four_channels_are_diffusers(pipe, tmp_path, monkeypatch):
    """With a usual UNet diffusers overwrites the latent after each step; answering with the truth gives the same numbers."""
    image, noise = picture(), pipe.noise(1, 5)
    other = opened("StableDiffusionInpaintPipeline", pipe, tmp_path, monkeypatch, noise)
    theirs = other("a red apple", image, half_mask(), height=16, width=16, strength=0.7, num_inference_steps=10, guidance_scale=4.0,
                   negative_prompt="the moon", output_type="np").images
    z = pipe.edit(image=image, mask=half_mask(), strength=0.7, steps=10, seed=5, sampler="ddim", output="latent", **WORDS)
    close(theirs, pipe.decode(z, "np"))


@pytest.mark.parametrize("model", ["pipe", "filler"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_outside_the_mask_every_bit_stays(model, sampler, request):
    """The original pixels outside, new ones inside, for every sampler and both kinds of UNet."""
    pipe, image = request.getfixturevalue(model), picture()
    out, = pipe.edit("a cat", image, 1.0, half_mask(), steps=4, sampler=sampler, progress=False)
    a, b = np.asarray(image), np.asarray(out)
    assert (a[:, :8] == b[:, :8]).all() and np.abs(a[:, 8:].astype(int) - b[:, 8:]).mean() > 3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_ends_at_the_known_latent(pipe, sampler):
    """Without any pasting the latent outside the mask is the picture's."""
    z = pipe.edit("a cat", picture(), 0.9, half_mask(), steps=6, sampler=sampler, output="latent", progress=False)
    whole = pipe.edit("a cat", picture(), 0.0, output="latent", progress=False)
    assert_close(z[..., :4], whole[..., :4], atol=2e-3, rtol=0)
    assert (z[..., 4:] - whole[..., 4:]).abs().max() > 0.05


def test_strength_zero_and_one(pipe):
    """At 0 the autoencoder's picture; at 1, with a schedule that ends in pure noise, exactly text to image."""
    image = picture()
    x = torch.tensor(np.asarray(image)).movedim(-1, 0)[None] / 127.5 - 1
    assert_close(pipe.edit("a cat", image, 0, output="np", progress=False), pipe.decode(pipe.look(x), "np"), atol=0, rtol=0)
    zero = StableDiffusion(tiny_parts(zero_snr=True, prediction="v"))
    options = dict(steps=5, seed=3, output="np", progress=False)
    assert_close(zero.edit("a cat", image, 1.0, **options), zero("a cat", **options), atol=1e-2, rtol=0)
    assert np.abs(zero.edit("a cat", image, 0.4, **options) - zero("a cat", **options)).max() > 0.05


def test_a_batch_is_its_single_calls(pipe):
    """Each prompt of a list edits the same picture with its own seed."""
    both = pipe.edit(["a cat", "the moon"], picture(), 0.7, half_mask(), steps=4, seed=7, output="np", progress=False)
    for i, prompt in enumerate(["a cat", "the moon"]):
        one = pipe.edit(prompt, picture(), 0.7, half_mask(), steps=4, seed=7 + i, output="np", progress=False)
        assert_close(both[i:i + 1], one, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "PA"])
def test_every_kind_of_picture(pipe, mode):
    """Eight-bit pictures of any kind are edited as their RGB form, masks of any kind as their grey."""
    try: image = picture().convert(mode)
    except ValueError: image = picture().convert("P").convert(mode)
    options = dict(strength=0.5, steps=3, output="np", progress=False)
    assert_close(pipe.edit("a cat", image, **options), pipe.edit("a cat", opaque(image), **options), atol=0, rtol=0)
    try: mask = half_mask().convert(mode)
    except ValueError: mask = half_mask().convert("P").convert(mode)
    assert_close(pipe.edit("a cat", picture(), mask=mask, **options), pipe.edit("a cat", picture(), mask=half_mask(), **options), atol=0, rtol=0)


def test_transparency_is_white():
    """What is transparent is not the colour that hides there."""
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert opaque(image).getpixel((0, 0)) == (255, 255, 255)


def test_another_size_is_asked_for(pipe):
    """A picture of any size is edited at a given one, its mask with it; a thin line in the mask is not lost."""
    out, = pipe.edit("a cat", picture(50, 31), 0.5, half_mask(50, 31), steps=2, height=16, width=24, progress=False)
    assert out.size == (24, 16)
    line = Image.new("L", (16, 16))
    line.paste(255, (0, 5, 16, 6))
    out, = pipe.edit("a cat", picture(), 1.0, line, steps=2, progress=False)
    a, b = np.asarray(picture()).astype(int), np.asarray(out)
    assert np.abs(a - b)[5].mean() > 3 and np.abs(a - b).sum(1).nonzero()[0].tolist() == [5] * 3


@pytest.mark.parametrize("options, words", [
    (dict(image="cat.png"), "expected a PIL picture, not str"),
    (dict(image=Image.new("I;16", (16, 16))), "kind I;16"),
    (dict(image=Image.new("F", (16, 16))), "kind F"),
    (dict(image=picture(15, 30)), "picture of 15x30: both sides must divide by 4: ask for width=16, height=32"),
    (dict(mask=half_mask(8, 16)), "the mask has 8x16 pixels, the picture 16x16"),
    (dict(mask="m.png"), "a mask is a PIL picture, not str"),
    (dict(strength=1.1), "strength must be a number from 0 to 1, not 1.1"), (dict(strength=-0.1), "not -0.1"),
    (dict(strength=math.nan), "not nan"), (dict(strength="much"), "not 'much'"),
    (dict(steps=0), "steps must lie between 1 and 1000"), (dict(steps=2.5), "steps must be a whole number"), (dict(steps=1001), "steps"),
    (dict(guidance=math.nan), "guidance"), (dict(sampler="magic"), "magic"), (dict(seed=-1), "seed"), (dict(seed=2**64), "seed"),
    (dict(output="gif"), "gif"), (dict(prompt=[]), "prompt"), (dict(prompt=None), "prompt"), (dict(height=18), "divide by 4"),
    (dict(width=-4), "ask for width=4"), (dict(strength=0, sampler="magic"), "magic"),
], ids=lambda o: None if isinstance(o, dict) else o[:30])
def test_bad_input_is_one_clear_line(pipe, options, words):
    """Refused before anything is walked, also at strength 0, in one line that names the culprit."""
    with pytest.raises(ValueError) as error: pipe.edit(**dict(prompt="a cat", image=picture(), progress=False) | options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_nine_channels_need_a_mask(filler):
    """A model that fills masks does not draw without one, and says what to do."""
    for call in (lambda: filler("a cat"), lambda: filler.edit("a cat", picture(), progress=False)):
        with pytest.raises(ValueError, match="9 channels, not 4.*`edit`"): call()


def test_previews_show_the_colours(pipe):
    """The linear map is the best one: no other matrix is nearer to the colours, and previews follow it."""
    preview = pipe.preview(torch.zeros(2, 4, 5, 7))
    assert [o.size for o in preview] == [(7, 5)] * 2
    assert len({o.tobytes() for s in pipe.denoise("a cat", steps=4) for o in pipe.preview(s.x0)}) == 4
    matrix = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    class Linear(torch.nn.Module):
        config, factor = pipe.autoencoder.config, 2
        def encode(self, x):
            mean = torch.einsum("cd,bchw->bdhw", matrix, torch.nn.functional.avg_pool2d(x, 2)) + 0.5
            return type("", (), dict(mean=mean))
    linear = StableDiffusion(pipe.parts._replace(autoencoder=Linear()))
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for seen, true in zip(linear.preview(linear.look(x)), torch.nn.functional.avg_pool2d(x, 2)):
        assert np.abs(np.asarray(seen).transpose(2, 0, 1) / 127.5 - 1 - true.numpy()).max() < 0.02


def test_memory_is_estimated_and_guarded(pipe, monkeypatch):
    """More than there is is refused before it is allocated; a small picture passes; the estimate grows with all it depends on."""
    assert free_memory(torch.device("cpu")) > 2**20
    assert memory_needed(pipe, 2, 64, 64) == 2 * memory_needed(pipe, 1, 64, 64) == memory_needed(pipe, 2, 32, 128)
    with pytest.raises(ValueError, match="1 x 65536x65536 pixels need about .* GiB of memory and .* free"): pipe("a cat", height=2**16, width=2**16)
    monkeypatch.setattr("sd_nb.edit.free_memory", lambda device: 1e5)
    with pytest.raises(ValueError, match="draw smaller"): pipe("a cat", height=64, width=64)
    with pytest.raises(ValueError, match="draw smaller"): pipe.edit("a cat", picture(64, 64), progress=False)
