"""One file in CompVis' layout: written by us and read by diffusers, made from others' weights and read by us."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import compvis
from parity import randn, randomise
from sd_nb.foreign import AUTOENCODER_NAMES, OLD_TEXT_NAMES, TEXT_NAMES, UNET_NAMES, Sampling, rename, write_text_config, write_unet_config
from sd_nb.interop import Parts, save_diffusers
from sd_nb.model.autoencoder import Autoencoder, AutoencoderConfig
from sd_nb.model.clip import TextEncoder, TextEncoderConfig
from sd_nb.model.unet import UNet, UNetConfig
from sd_nb.opening import load_single_file
from sd_nb.single_file import SECTIONS, describe, pack, read_single_file, save_single_file, unpack
from tiny import TEXT, diffusers_pipeline, tiny_parts

SD2 = UNetConfig(head_width=64, linear_proj=True, d_context=1024)
SD2_TEXT = TextEncoderConfig(width=1024, layers=23, heads=16, act="gelu")
OPEN = TextEncoderConfig(vocab=600, window=16, width=24, layers=2, heads=2, act="gelu")
FULL = {"sd1": ("unet", UNet, UNetConfig(), 686), "sd2": ("unet", UNet, SD2, 686), "inpainting": ("unet", UNet, UNetConfig(c_in=9), 686),
        "vae": ("autoencoder", Autoencoder, AutoencoderConfig(), 248)}


def meta(network, config):
    with torch.device("meta"): return network(config)


def shapes(state):
    return {k: tuple(v.shape) for k, v in state.items()}


@pytest.mark.parametrize("case", FULL)
def test_names_and_shapes_are_compvis(case):
    """At full size, every name and shape is the one that the original modules give, built here in the original order."""
    name, network, config, count = FULL[case]
    section = SECTIONS[name]
    with torch.device("meta"): original = getattr(compvis, name)(config).state_dict()
    ours = pack(section, meta(network, config))
    assert len(ours) == count
    assert shapes(ours) == shapes({section.prefix + k: v for k, v in original.items()})
    assert shapes(unpack(section, ours, config)) == shapes(meta(network, config).state_dict())
    assert section.config(**section.guess(original)) == config


@pytest.mark.parametrize("case", FULL)
def test_names_are_what_diffusers_converters_expect(case):
    """Diffusers' converter turns our names and shapes into exactly those of its own network."""
    from diffusers.loaders import single_file_utils as judge
    name, network, config, count = FULL[case]
    ours = meta(network, config)
    if name == "unet": got = judge.convert_ldm_unet_checkpoint(pack(SECTIONS[name], ours), write_unet_config(config))
    else: got = judge.convert_ldm_vae_checkpoint(pack(SECTIONS[name], ours), dict(down_block_types=[0] * 4, up_block_types=[0] * 4))
    want = rename(ours.state_dict(), UNET_NAMES if name == "unet" else AUTOENCODER_NAMES)
    assert len(got) == count and shapes(got) == shapes(want)


@pytest.mark.parametrize("name, config, count", [("clip", TextEncoderConfig(), 196), ("openclip", SD2_TEXT, 372)], ids=["sd1", "sd2"])
def test_text_names_are_what_diffusers_converters_expect(name, config, count):
    """The same for both text encoders, at full size, against transformers' own network."""
    from diffusers.loaders import single_file_utils as judge
    from transformers import CLIPTextConfig, CLIPTextModel
    with torch.device("meta"): theirs = CLIPTextModel(CLIPTextConfig(**write_text_config(config)))
    packed = pack(SECTIONS[name], meta(TextEncoder, config))
    got = judge.convert_ldm_clip_checkpoint(packed) if name == "clip" else judge.convert_open_clip_checkpoint(theirs, packed)
    want = rename(theirs.state_dict(), OLD_TEXT_NAMES)
    assert len(got) == count and shapes(got) == shapes(want) == shapes(rename(meta(TextEncoder, config).state_dict(), TEXT_NAMES))


configs = st.builds(
    lambda mults, attn, **kw: UNetConfig(width=16, mults=(1, *mults), attn=attn[:len(mults) + 1], groups=8, **kw),
    mults=st.lists(st.integers(1, 3), max_size=2), attn=st.tuples(*[st.booleans()] * 3), blocks=st.integers(1, 3), depth=st.integers(1, 2),
    d_context=st.sampled_from([8, 1024]), linear_proj=st.booleans(), c_in=st.sampled_from([4, 8, 9]), c_out=st.sampled_from([3, 4]))


@settings(max_examples=25, deadline=None)
@given(configs)
def test_any_shape_is_named_and_guessed(config):
    """For random shapes, names are the original modules', and the shape that is read off the weights builds the same network."""
    section = SECTIONS["unet"]
    with torch.device("meta"): original = compvis.unet(config).state_dict()
    assert shapes(pack(section, meta(UNet, config))) == shapes({section.prefix + k: v for k, v in original.items()})
    silent = dict(groups=config.groups, heads=config.heads, head_width=config.head_width)
    assert UNetConfig(**section.guess(original) | silent) == config


@settings(max_examples=10, deadline=None)
@given(mults=st.lists(st.integers(1, 3), max_size=3), blocks=st.integers(1, 3), c=st.sampled_from([4, 8]))
def test_any_autoencoder_is_named_and_guessed(mults, blocks, c):
    """The same for autoencoders, whose way up is counted from its end."""
    config, section = AutoencoderConfig(width=16, mults=(1, *mults), blocks=blocks, groups=8, c_latent=c), SECTIONS["autoencoder"]
    with torch.device("meta"): original = compvis.autoencoder(config).state_dict()
    assert shapes(pack(section, meta(Autoencoder, config))) == shapes({section.prefix + k: v for k, v in original.items()})
    assert AutoencoderConfig(**section.guess(original) | dict(groups=8)) == config


def test_round_trip_is_bitwise(tmp_path):
    """Saved and loaded: the same tensors, configs, sampling and tokens, with either kind of text encoder; fp16 is rounding and nothing else."""
    for text in (TEXT, OPEN):
        parts = tiny_parts(text=text, prediction="v", zero_snr=True)
        save_single_file(tmp_path / "model.safetensors", parts)
        save_single_file(tmp_path / "half.safetensors", parts, torch.float16)
        parts.tokenizer.save_pretrained(tmp_path / "tokenizer")
        back, half = (load_single_file(tmp_path / f"{name}.safetensors") for name in ("model", "half"))
        assert back.sampling == half.sampling == parts.sampling
        for a, b, c in zip(parts[:3], back[:3], half[:3], strict=True):
            assert a.config == b.config == c.config
            assert_close(b.state_dict(), a.state_dict(), atol=0, rtol=0)
            assert_close(c.state_dict(), {k: v.half().float() for k, v in a.state_dict().items()}, atol=0, rtol=0)
        assert back.tokenizer(["a cat"]).equal(parts.tokenizer(["a cat"]))
    assert load_single_file(tmp_path / "half.safetensors", dtype=None).unet.conv_in.weight.dtype == torch.float16


@pytest.mark.parametrize("text", [TEXT, OPEN], ids=["clip", "openclip"])
def test_diffusers_opens_our_single_file(text, tmp_path):
    """`StableDiffusionPipeline.from_single_file`, offline with a local config: all three networks say what ours say."""
    from diffusers import StableDiffusionPipeline
    parts = tiny_parts(text=text)
    save_single_file(tmp_path / "model.safetensors", parts)
    save_diffusers(tmp_path / "config", parts)
    for file in (tmp_path / "config").rglob("*.safetensors"): file.unlink()  # configs only: no weights to fall back on
    pipe = StableDiffusionPipeline.from_single_file(str(tmp_path / "model.safetensors"), config=str(tmp_path / "config"), local_files_only=True)
    z, x, t, tokens = randn(2, 4, 8, 8), randn(2, 3, 16, 16), torch.tensor([3, 900]), parts.tokenizer(["a red apple", ""])
    with torch.no_grad():
        words = parts.text_encoder(tokens)
        assert_close(pipe.text_encoder(tokens).last_hidden_state, words, atol=1e-5, rtol=1e-5)
        assert_close(pipe.unet(z, t, words).sample, parts.unet(z, t, words), atol=1e-5, rtol=1e-5)
        assert_close(pipe.vae.decode(z).sample, parts.autoencoder.decode(z), atol=1e-5, rtol=1e-5)
        assert_close(pipe.vae.encode(x).latent_dist.mean, parts.autoencoder.encode(x).mean, atol=1e-5, rtol=1e-5)


def test_diffusers_networks_open_our_single_file(tmp_path):
    """`from_single_file` of the two networks alone, in half precision, too."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    parts = tiny_parts()
    save_single_file(tmp_path / "model.safetensors", parts, torch.float16)
    save_diffusers(tmp_path / "config", parts)
    where = dict(config=str(tmp_path / "config"), local_files_only=True, torch_dtype=torch.float32)
    unet = UNet2DConditionModel.from_single_file(str(tmp_path / "model.safetensors"), subfolder="unet", **where)
    vae = AutoencoderKL.from_single_file(str(tmp_path / "model.safetensors"), subfolder="vae", **where)
    parts.tokenizer.save_pretrained(tmp_path / "tokenizer")
    ours, z, t, words = load_single_file(tmp_path / "model.safetensors"), randn(2, 4, 8, 8), torch.tensor([3, 900]), randn(2, 16, 24)
    with torch.no_grad():
        assert_close(unet(z, t, words).sample, ours.unet(z, t, words), atol=1e-5, rtol=1e-5)
        assert_close(vae.decode(z).sample, ours.autoencoder.decode(z), atol=1e-5, rtol=1e-5)


def backwards(convert, original, theirs):
    """Their weights under original names: number the original tensors, let diffusers' converter say where each number goes, and go back."""
    numbers = {k: torch.full(v.shape, float(i)) for i, (k, v) in enumerate(original.items())}
    where, names = convert(numbers), list(original)
    assert where.keys() == theirs.keys()
    return {names[int(v.flatten()[0])]: theirs[k].reshape(original[names[int(v.flatten()[0])]].shape) for k, v in where.items()}


def test_we_open_a_file_made_from_diffusers_weights(tmp_path):
    """Names from the original modules, weights from diffusers and transformers, in between diffusers' own converters run backwards."""
    from diffusers.loaders import single_file_utils as judge
    pipe = diffusers_pipeline(tmp_path)
    unet = UNetConfig(width=16, mults=(1, 2), attn=(True, False), d_context=24, linear_proj=True, groups=8, head_width=8)
    vae = AutoencoderConfig(width=16, mults=(1, 1, 2), blocks=1, groups=4)
    state = {}
    for name, net, config, convert in (("unet", pipe.unet, unet, lambda s: judge.convert_ldm_unet_checkpoint(s, pipe.unet.config)),
                                       ("autoencoder", pipe.vae, vae, lambda s: judge.convert_ldm_vae_checkpoint(s, pipe.vae.config))):
        prefix = SECTIONS[name].prefix
        with torch.device("meta"): original = {prefix + k: v for k, v in getattr(compvis, name)(config).state_dict().items()}
        state |= backwards(convert, original, net.state_dict())
    state |= {"cond_stage_model.transformer." + k: v.contiguous() for k, v in pipe.text_encoder.state_dict().items()}
    save_file(state, tmp_path / "made.safetensors")
    parts = load_single_file(tmp_path / "made.safetensors", tokenizer=tmp_path / "tokenizer", about=dict(
        unet=dict(groups=8, head_width=8), autoencoder=dict(groups=4, scale=0.7), text_encoder=dict(heads=3, act="gelu")))
    assert parts.unet.config == unet and parts.autoencoder.config == AutoencoderConfig(width=16, mults=(1, 1, 2), blocks=1, groups=4, scale=0.7)
    z, t, tokens = randn(2, 4, 8, 8), torch.tensor([3, 900]), parts.tokenizer(["a red apple", "cat"])
    with torch.no_grad():
        words = parts.text_encoder(tokens)
        assert_close(words, pipe.text_encoder(tokens).last_hidden_state, atol=1e-5, rtol=1e-5)
        assert_close(parts.unet(z, t, words), pipe.unet(z, t, words).sample, atol=1e-5, rtol=1e-5)
        assert_close(parts.autoencoder.decode(z), pipe.vae.decode(z).sample, atol=1e-5, rtol=1e-5)


def foreign(parts, text, prefix):
    """What a stranger's file holds: three networks and a text encoder of his own, no word about them."""
    state = pack(SECTIONS["unet"], parts.unet) | pack(SECTIONS["autoencoder"], parts.autoencoder)
    return state | {prefix + k: v.detach().clone().contiguous() for k, v in text.state_dict().items()}


def test_openclip_tower_is_read_at_its_penultimate_state(tmp_path):
    """24 blocks with torch's fused attention, a projection and a temperature: ours says what the tower says before its last block."""
    config = TextEncoderConfig(vocab=600, window=16, width=24, layers=23, heads=2, act="gelu")
    tower, parts = randomise(compvis.OpenCLIP(config, 24)), tiny_parts()
    save_file(foreign(parts, tower, "cond_stage_model.model."), tmp_path / "model.safetensors")
    networks, _ = read_single_file(tmp_path / "model.safetensors", about={k: v for k, v in describe(parts).items() if k != "text_encoder"} | dict(text_encoder=dict(heads=2)))
    assert networks["text_encoder"].config == config
    tokens = parts.tokenizer(["a red apple", "the face of a smiling cat"])
    with torch.no_grad(): assert_close(networks["text_encoder"](tokens), tower.penultimate(tokens), atol=1e-5, rtol=1e-5)


@pytest.fixture
def written(tmp_path):
    parts = tiny_parts()
    save_single_file(tmp_path / "model.safetensors", parts)
    parts.tokenizer.save_pretrained(tmp_path / "tokenizer")
    return parts, tmp_path / "model.safetensors", dict(about=describe(parts))


def test_leftovers_of_training_are_skipped(written):
    """Averages, noise schedule, critic, position numbers: everything that the published files hold beside the networks."""
    parts, file, about = written
    text = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    schedule = ["betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
                "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1",
                "posterior_mean_coef2", "lvlb_weights", "logvar"]
    more = {name: torch.ones(5) for name in [*schedule, "model_ema.decay", "model_ema.diffusion_modelinput_blocks00weight", "loss.logvar", "first_stage_model.loss.discriminator.main.0.weight"]}
    save_file(load_file(file) | more | {text: torch.arange(16)[None]}, file)
    assert_close(load_single_file(file, **about).unet.state_dict(), parts.unet.state_dict(), atol=0, rtol=0)


def test_a_name_without_text_model_is_understood(written):
    """One program writes the text encoder's names without the word `text_model`."""
    parts, file, about = written
    save_file({k.replace("text_model.", ""): v for k, v in load_file(file).items()}, file)
    assert_close(load_single_file(file, **about).text_encoder.state_dict(), parts.text_encoder.state_dict(), atol=0, rtol=0)


def test_a_half_precision_text_encoder_becomes_float32(written):
    """Some files hold the text encoder in fp16 and the rest in fp32."""
    _, file, about = written
    save_file({k: v.half() if k.startswith("cond") else v for k, v in load_file(file).items()}, file)
    assert {p.dtype for net in load_single_file(file, **about)[:3] for p in net.parameters()} == {torch.float32}


def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


@pytest.mark.parametrize("damage, words", [
    (lambda s: s.pop("model.diffusion_model.out.2.weight"), r"model.safetensors: 1 missing \(model.diffusion_model.out.2.weight\)"),
    (lambda s: s.pop("model.diffusion_model.input_blocks.0.0.weight"), r"1 missing \(model.diffusion_model.input_blocks.0.0.weight\)"),
    (lambda s: s.update(surprise=torch.zeros(1)), r"1 unexpected \(surprise\)"),
    (lambda s: s.update({"model.diffusion_model.label_emb.0.0.weight": torch.zeros(1)}), r"1 unexpected \(model.diffusion_model.label_emb.0.0.weight\)"),
    (lambda s: s.update({"conditioner.embedders.0.transformer.x": torch.zeros(1)}), r"1 unexpected \(conditioner"),
    (lambda s: s.update({"first_stage_model.decoder.conv_in.bias": torch.zeros(3)}), r"1 wrong shape \(first_stage_model.decoder.conv_in.bias \(3,\) instead of \(32,\)\)"),
    (lambda s: [s.pop(k) for k in list(s) if k.startswith("model.diff")], "holds no UNet"),
    (lambda s: [s.pop(k) for k in list(s) if k.startswith("cond_")], r"holds no text_encoder: parts_from=DIR \(--parts-from DIR\)"),
    (lambda s: s.update({"cond_stage_model.model.ln_final.bias": torch.zeros(1)}), "two text encoders"),
    (lambda s: s.update({"model.diffusion_model.input_blocks.1000000000.0.op.weight": torch.zeros(1)}), "model.safetensors: "),
    (lambda s: s.clear(), "holds no UNet"),
], ids=["missing", "missing first", "extra", "class labels", "sdxl", "shape", "no unet", "no text", "two texts", "huge number", "empty"])
def test_wrong_keys_are_listed(written, damage, words):
    """What is too few, too many or of another shape is named in the file's own words, in one line."""
    _, file, about = written
    state = load_file(file)
    damage(state)
    save_file(state, file)
    with pytest.raises(ValueError, match=words) as error: load_single_file(file, **about)
    assert str(file) in one_line(error)


def test_metadata_may_tell_only_what_weights_cannot(written):
    """A shape is read off the weights whatever the text beside them says; unknown settings are named."""
    _, file, _ = written
    state = load_file(file)
    for words, want in (('{"unet": {"blocks": 9}}', "unet.blocks"), ("[", "bad metadata"), ('{"unet": 3}', "bad metadata"), ('{"sampling": {"speed": 3}}', "speed"),
                        ('{"unet": {"heads": "x"}}', "model.diffusion_model: ")):
        save_file(state, file, dict(sd_nb=words))
        with pytest.raises(ValueError, match=re.escape(want)) as error: load_single_file(file, about=dict(unet=dict(groups=8), autoencoder=dict(groups=8), text_encoder=dict(heads=2)))
        assert str(file) in one_line(error)


def test_only_our_networks_are_written_and_never_as_a_pickle(written):
    """A `.ckpt`, a network of another kind, and a text encoder with no room for its blocks are refused."""
    parts, file, _ = written
    before = file.read_bytes()
    other = torch.nn.Linear(1, 1)
    deep = TextEncoder(TextEncoderConfig(vocab=600, window=16, width=24, layers=24, heads=2, act="gelu"))
    for path, p, words in ((file.with_suffix(".ckpt"), parts, "no pickle"), (file, parts._replace(unet=other), "Linear has no place"), (file, parts._replace(text_encoder=deep), "room for 23")):
        with pytest.raises(ValueError, match=words): save_single_file(path, p)
    assert file.read_bytes() == before and not file.with_suffix(".ckpt").exists()


def test_a_failed_save_leaves_the_old_file(written, monkeypatch):
    """When writing stops half-way, the file that was there before is still whole, and no rest lies about."""
    import os
    parts, file, _ = written
    before = {p: p.read_bytes() for p in file.parent.rglob("*") if p.is_file()}

    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt): save_single_file(file, parts, torch.float16)
    assert {p: p.read_bytes() for p in file.parent.rglob("*") if p.is_file()} == before


def test_published_models_are_guessed(tmp_path):
    """Of a stranger's file of 1.x we assume what its published directory says; of 2.x we ask what it predicts."""
    from sd_nb.opening import guess_sampling
    sd1 = dict(_class_name="PNDMScheduler", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000,
               set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1)
    from sd_nb.interop import read_sampling
    assert guess_sampling(768) == read_sampling(sd1)
    assert guess_sampling(1024, "v") == Sampling(prediction="v", spacing="leading", set_alpha_to_one=False, size=768)
    assert guess_sampling(1024, "eps").size == 512
    with pytest.raises(ValueError, match="--prediction v"): guess_sampling(1024)


def test_what_was_said_goes_before_what_the_file_says(written):
    """`prediction` and `about` win over the file's own words."""
    _, file, about = written
    assert load_single_file(file, prediction="v", **about).sampling.prediction == "v"
    assert load_single_file(file, about=dict(autoencoder=dict(scale=0.3))).autoencoder.config.scale == 0.3


def test_parts_may_come_from_a_directory(written):
    """A file with the UNet alone takes the rest, and the tokenizer, from a model directory."""
    parts, file, about = written
    save_diffusers(file.parent / "directory", parts)
    save_file(pack(SECTIONS["unet"], parts.unet), file)
    got = load_single_file(file, parts_from=file.parent / "directory", **about)
    assert isinstance(got, Parts) and got.sampling == parts.sampling
    for a, b in zip(parts[:3], got[:3], strict=True): assert_close(a.state_dict(), b.state_dict(), atol=0, rtol=0)
