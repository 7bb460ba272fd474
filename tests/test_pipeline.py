"""The pipeline draws what diffusers draws, the same at any batch size, and says in one line what it cannot do."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.testing import assert_close

from sd_nb import StableDiffusion
from sd_nb.diffusion.samplers import SAMPLERS
from tiny import diffusers_pipeline, tiny_parts

WORDS = dict(prompt="a red apple", negative_prompt="the moon", steps=5, guidance=4.0)
PROMPTS = ["a red apple", "a blue heart", "a cat", ""]


@pytest.fixture(scope="module")
def pipe():
    return StableDiffusion(tiny_parts())


def theirs(pipe, latents, output="np", **changes):
    "The picture that a diffusers pipeline draws from the same words and the same initial noise."
    words = WORDS | changes
    height, width = (side * pipe.vae_scale_factor for side in latents.shape[2:])
    out = pipe(words["prompt"], negative_prompt=words["negative_prompt"], num_inference_steps=words["steps"],
               guidance_scale=words["guidance"], latents=latents, output_type=output, height=height, width=width)
    return out.images


def open_theirs(directory):
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same_picture(a, b):
    "Equal to far less than 2/255, and something to see: neither grey nor clipped."
    assert a.shape == b.shape and np.abs(a - b).max() < 1e-3
    assert a.std() > 0.05 and 0.05 < np.mean((a > 0) & (a < 1))


@pytest.mark.parametrize("sampling", [
    {}, dict(prediction="v"), dict(spacing="leading", set_alpha_to_one=False), dict(zero_snr=True, prediction="v"),
], ids=["default", "v", "sd1-leading", "zero-snr"])
def test_diffusers_draws_what_we_draw(sampling, tmp_path):
    """Ours saved, opened by diffusers: DDIM with guidance and a negative prompt gives the same latent and picture."""
    ours = StableDiffusion(tiny_parts(**sampling))
    ours.save_pretrained(tmp_path)
    other, noise = open_theirs(tmp_path), ours.noise(1, seed=3)
    assert (other.unet.config.sample_size, other.vae_scale_factor) == (8, 2)
    assert_close(ours(**WORDS, sampler="ddim", latents=noise, output="latent"), theirs(other, noise, "latent"),
                 atol=1e-3, rtol=1e-3)
    assert_same_picture(ours(**WORDS, sampler="ddim", latents=noise, output="np"), theirs(other, noise))


def test_dpmpp_2m_is_diffusers_multistep(pipe, tmp_path):
    """DPM-Solver++ 2M on the model's levels gives what diffusers' DPMSolverMultistepScheduler gives, at a size that is not square."""
    from diffusers import DPMSolverMultistepScheduler
    pipe.save_pretrained(tmp_path)
    other, noise = open_theirs(tmp_path), pipe.noise(1, 5, height=24, width=32)
    other.scheduler = DPMSolverMultistepScheduler.from_config(other.scheduler.config)
    options = dict(sampler="dpmpp_2m", spacing="model", output="np")
    assert_same_picture(pipe(**WORDS, latents=noise, **options), theirs(other, noise))


@pytest.mark.parametrize("scheduler", [{}, dict(prediction_type="v_prediction", timestep_spacing="trailing")],
                         ids=["leading", "v"])
def test_we_draw_what_diffusers_draws(scheduler, tmp_path):
    """Theirs saved, opened by ours: the same picture, for prompts in a batch."""
    other = diffusers_pipeline(tmp_path, **scheduler)
    ours = StableDiffusion.from_pretrained(tmp_path, device="cpu")
    noise = ours.noise(2, seed=1)
    assert (ours.sampling.size, ours.factor) == (32, 8)
    words = WORDS | dict(prompt=PROMPTS[:2], negative_prompt=["the moon", ""])
    assert_same_picture(ours(**words, sampler="ddim", latents=noise, output="np"), theirs(other, noise, **words))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_is_its_single_calls(pipe, sampler):
    """Picture i of a batch is the picture of seed + i, whoever its neighbours are."""
    options = dict(steps=4, sampler=sampler, output="np")
    batch = pipe(PROMPTS, seed=7, **options)
    for i, prompt in enumerate(PROMPTS):
        assert_close(batch[i:i + 1], pipe(prompt, seed=7 + i, **options), atol=1e-4, rtol=0)
    assert np.abs(batch[0] - pipe(PROMPTS[0], seed=8, **options)).max() > 0.1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_are_the_seeds_noise(pipe, sampler):
    """Handing in the noise of a seed gives that seed's picture, also where the sampler draws more noise on the way."""
    options = dict(steps=3, seed=9, sampler=sampler, output="np")
    assert_close(pipe(PROMPTS, latents=pipe.noise(4, seed=9), **options), pipe(PROMPTS, **options), atol=0, rtol=0)


def test_words_and_guidance_matter(pipe):
    """Another prompt, negative prompt or guidance is another picture; at guidance 1 the negative prompt is not read."""
    def draw(prompt="a cat", negative="", guidance=3.0):
        return pipe(prompt, negative, steps=3, guidance=guidance, output="np")
    for other in (draw("a blue heart"), draw(negative="the moon"), draw(guidance=5.0)):
        assert np.abs(draw() - other).max() > 1e-3
    assert_close(draw(guidance=1.0), draw(negative="the moon", guidance=1.0), atol=0, rtol=0)


def test_guidance_1_asks_half_as_much(pipe, monkeypatch):
    """With guidance the UNet sees the batch twice; at guidance 1 it does not."""
    seen, forward = [], pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda x, *o: seen.append(len(x)) or forward(x, *o))
    pipe(["a cat"] * 3, steps=2, guidance=1), pipe(["a cat"] * 3, steps=2, guidance=2)
    assert seen == [3, 3, 6, 6]


def test_denoise_yields_every_state(pipe):
    """Iterating gives one state per step and ends at the latent that the call returns."""
    states = list(pipe.denoise("a cat", steps=6, sampler="ddim"))
    assert [s.i for s in states] == [0, 1, 2, 3, 4, 5]
    assert [s.t for s in states] == sorted({s.t for s in states}, reverse=True)
    assert_close(states[-1].x, pipe("a cat", steps=6, sampler="ddim", output="latent"))
    assert states[0].x.shape == states[0].x0.shape == (1, 4, 8, 8) and not states[0].x.requires_grad


def test_outputs_agree(pipe):
    """PIL, array and latent are three views of one picture, and the networks stay trainable."""
    image, array, latent = (pipe("a cat", steps=2, output=o) for o in ("pil", "np", "latent"))
    assert (image[0].size, array.shape, latent.shape) == ((16, 16), (1, 16, 16, 3), (1, 4, 8, 8))
    assert array.dtype == np.float32
    assert np.abs(np.asarray(image[0]) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    assert_close(pipe.decode(latent, "np"), array)
    assert all(p.requires_grad for p in pipe.unet.parameters())


def test_save_and_open_again(pipe, tmp_path):
    """A saved model draws the same picture, bit for bit."""
    pipe.save_pretrained(tmp_path / "new" / "model")
    again = StableDiffusion.from_pretrained(tmp_path / "new" / "model", device="cpu")
    assert_close(again(**WORDS, output="np"), pipe(**WORDS, output="np"), atol=0, rtol=0)


@pytest.mark.parametrize("options, words", [
    (dict(prompt=[]), "prompt must be a text or a list of texts, not []"),
    (dict(prompt=None), "prompt must be a text"),
    (dict(prompt=["a cat", 3]), "prompt must be a text or a list of texts, not ['a cat', 3]"),
    (dict(prompt="a", negative_prompt=["x", "y"]), "2 negative prompts do not fit 1 prompts"),
    (dict(prompt="a", steps=0), "steps must lie between 1 and 1000, not 0"),
    (dict(prompt="a", steps=1001), "steps must lie between 1 and 1000"),
    (dict(prompt="a", steps=2.5), "steps must be a whole number, not 2.5"),
    (dict(prompt="a", guidance=math.nan), "guidance must be a number from 0 upwards, not nan"),
    (dict(prompt="a", guidance=math.inf), "not inf"),
    (dict(prompt="a", guidance=-1), "not -1"),
    (dict(prompt="a", guidance="strong"), "not 'strong'"),
    (dict(prompt="a", sampler="magic"), "unknown sampler 'magic': choose one of ddpm, ddim, euler"),
    (dict(prompt="a", output="gif"), "unknown output 'gif': choose one of pil, np, latent"),
    (dict(prompt="a", seed=-1), "seed must lie between 0 and"),
    (dict(prompt="a", seed=2**63), "seed must lie between 0 and"),
    (dict(prompt="a", seed="x"), "seed must be a whole number"),
    (dict(prompt="a", seed=2**64), "seed must lie between 0 and"),
    (dict(prompt="a", height=2), "height must lie between 4 and"),
    (dict(prompt="a", rescale=2), "rescale must lie between 0 and 1, not 2"),
    (dict(prompt="a", interval=(3, 1)), "the interval must be two sigmas"),
    (dict(prompt="a", spacing="golden"), "unknown spacing 'golden'"),
    (dict(prompt="a", height=18), "height 18 is not divisible by 4: try 16 or 20"),
    (dict(prompt="a", width=0), "width must lie between 4 and"),
    (dict(prompt="a", width=16.0), "width must be a whole number"),
    (dict(prompt="a", latents=torch.zeros(2, 4, 8, 8)), "latents (2, 4, 8, 8) should be (1, 4, 8, 8)"),
    (dict(prompt="a", latents=torch.zeros(1, 3, 8, 8)), "should be (1, 4, 8, 8)"),
    (dict(prompt="a", latents=torch.zeros(1, 4, 7, 8)), "height 14 is not divisible by 4"),
    (dict(prompt="a", latents=torch.zeros(1, 4, 8, 8), width=32), "should be (1, 4, 8, 16)"),
    (dict(prompt="a", latents=torch.full((1, 4, 8, 8), math.nan)), "latents hold NaN or infinity"),
    (dict(prompt="a", latents=[0]), "latents must be a tensor"),
], ids=lambda o: None if isinstance(o, dict) else o[:30])
def test_bad_input_is_one_clear_line(pipe, options, words):
    """What cannot be drawn is refused before any work, in one line that names the culprit."""
    with pytest.raises(ValueError) as error: pipe(**options)
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 200


def test_the_right_picture_at_the_edges(pipe):
    """8 px, 1 step, 1000 steps, guidance 0 and 1 and the largest seed give pictures of the right size."""
    for options in (dict(height=8, width=8), dict(steps=1), dict(guidance=0), dict(guidance=1), dict(seed=2**63 - 1), dict(height=4, width=64)):
        image, = pipe("a cat", **dict(steps=2) | options, progress=False)
        assert image.size == (options.get("width", 16), options.get("height", 16)) and np.asarray(image).std() > 3
    assert sum(1 for _ in pipe.denoise("a cat", steps=1000, height=4, width=4, guidance=1)) == 1000


def test_options_do_what_guidance_does(pipe):
    """rescale, interval and spacing change the picture; an interval that holds no level is guidance 1."""
    def draw(**options): return pipe("a cat", "the moon", steps=5, guidance=6.0, output="np", progress=False, **options)
    for options in (dict(rescale=0.7), dict(interval=(0.5, 3.0)), dict(spacing="karras"), dict(spacing="log_snr")):
        assert np.abs(draw(**options) - draw()).max() > 1e-3
    assert_close(draw(interval=(1e5, 2e5)), pipe("a cat", steps=5, guidance=1, output="np", progress=False), atol=1e-5, rtol=0)


def test_prompts_have_weights_and_any_length(pipe):
    """A weight changes the picture, weight 1 does not; the end of a long prompt matters; a long one and a short one share a batch."""
    def draw(prompt, negative=""): return pipe(prompt, negative, steps=2, output="np", progress=False)
    assert np.abs(draw("a (red:1.5) apple") - draw("a red apple")).max() > 1e-3
    assert_close(draw("a (red:1.0) apple"), draw("a red apple"), atol=1e-5, rtol=0)
    long = "a red apple and " * 12
    assert np.abs(draw(long + "the moon") - draw(long + "a cat")).max() > 1e-3
    assert draw(["a cat", long], "the moon " * 20).shape == (2, 16, 16, 3)


def test_large_pictures_are_decoded_in_tiles(pipe):
    """Tiles of 16 give nearly the picture of one piece."""
    z = torch.randn(1, 4, 40, 24, generator=torch.Generator().manual_seed(0))
    whole, tiled = pipe.decode(z, "np"), pipe.decode(z, "np", tile=20)
    assert whole.shape == tiled.shape == (1, 80, 48, 3) and 0 < np.abs(whole - tiled).max() < 0.2


def test_the_seed_projects_calls(pipe, tmp_path):
    """`load_model` and `generate` as SD-From-Scratch's README writes them: DDIM, seeds counted up, one sheet."""
    from sd_nb.pipeline import generate, load_model
    pipe.save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model", torch.device("cpu"))
    images = generate(model=model, tokenizer=None, prompts=PROMPTS[:3], num_steps=3, guidance_scale=7.5, seed=42, output_path=str(tmp_path / "new" / "output.png"))
    assert [np.asarray(o).tolist() for o in images] == [np.asarray(o).tolist() for o in pipe(PROMPTS[:3], steps=3, sampler="ddim", seed=42)]
    assert Image.open(tmp_path / "new" / "output.png").size == (60, 20)


def test_load_lora(pipe, tmp_path):
    """`load_lora` changes the picture with its scale, `unload_lora` brings the old one back bit for bit."""
    before = pipe("a cat", steps=2, output="np")
    state = {f"unet.mid_block.attentions.0.proj_in.lora_{k}.weight": torch.randn(s) for k, s in (("A", (2, 32, 1, 1)), ("B", (32, 2, 1, 1)))}
    save_file(state, tmp_path / "l.safetensors")
    pipe.load_lora(tmp_path / "l.safetensors", scale=0.5)
    assert np.abs(pipe("a cat", steps=2, output="np") - before).max() > 1e-3
    pipe.unload_lora()
    assert_close(pipe("a cat", steps=2, output="np"), before, atol=0, rtol=0)


def test_denoise_checks_before_it_is_iterated(pipe):
    """A mistake surfaces at the call, not when the first state is asked for."""
    with pytest.raises(ValueError, match="unknown sampler"): pipe.denoise("a cat", sampler="magic")


def test_nan_weights_are_reported(tmp_path):
    """A network with a NaN weight gives an error, not a black picture."""
    parts = tiny_parts()
    with torch.no_grad(): parts.unet.conv_out.bias[0] = math.nan
    with pytest.raises(ValueError, match="NaN instead of a picture"): StableDiffusion(parts)("a cat", steps=2)


def test_missing_model_is_one_line(tmp_path):
    """A directory that is not there, or holds no pipeline, is named in one line."""
    for path, words in ((tmp_path / "nowhere", "no such directory"), (tmp_path, "model_index.json: no such file")):
        with pytest.raises(FileNotFoundError, match=words) as error: StableDiffusion.from_pretrained(path)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_embedded_model_opens_or_says_why_not():
    """The package's own model opens; while there is none, the error says what to do."""
    try: pipe = StableDiffusion.embedded("cpu")
    except FileNotFoundError as e: assert "sd-nb demo" in str(e) and "\n" not in str(e)
    else: assert pipe.sampling.size > 0


def test_device_and_precision(tmp_path):
    """Half precision on a CPU is answered with a warning and float32; an unknown device is one line."""
    with pytest.warns(UserWarning, match="float32 instead"): pipe = StableDiffusion(tiny_parts(), "cpu", torch.bfloat16)
    assert pipe.unet.conv_in.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="unknown device 'toaster'"): StableDiffusion(tiny_parts(), "toaster")


def test_nothing_foreign_is_imported(tmp_path):
    """Drawing needs neither diffusers nor transformers."""
    tiny = StableDiffusion(tiny_parts())
    tiny.save_pretrained(tmp_path)
    code = ("import sys; from sd_nb import StableDiffusion; pipe = StableDiffusion.from_pretrained(sys.argv[1], 'cpu');"
            "pipe('a cat', steps=1); sys.exit(bool({'diffusers', 'transformers'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, check=False).returncode == 0
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
