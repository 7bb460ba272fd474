"""What we write, diffusers and transformers open; what they write, we open; what is damaged, nobody opens."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from parity import randn
from sd_nb import interop
from sd_nb.foreign import (AUTOENCODER_NAMES, OLD_TEXT_NAMES, TEXT_NAMES, UNET_NAMES, read_unet_config, rename,
                           write_autoencoder_config, write_text_config, write_unet_config)
from sd_nb.interop import (Sampling, load_autoencoder, load_diffusers, load_sampling, load_text_encoder, load_unet,
                           save_autoencoder, save_diffusers, save_text_encoder, save_unet)
from sd_nb.model.autoencoder import Autoencoder, AutoencoderConfig
from sd_nb.model.clip import TextEncoder, TextEncoderConfig
from sd_nb.model.unet import UNet, UNetConfig
from tiny import diffusers_pipeline, tiny_parts

SD2 = UNetConfig(head_width=64, linear_proj=True, d_context=1024)
SD2_TEXT = TextEncoderConfig(width=1024, layers=23, heads=16, act="gelu")


@pytest.fixture(scope="module")
def parts():
    return tiny_parts()


@pytest.fixture
def saved(parts, tmp_path):
    save_diffusers(tmp_path / "model", parts)
    return tmp_path / "model"


def theirs(kind, config):
    "The network that diffusers or transformers build from a config that we wrote, on the meta device."
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    with torch.device("meta"):
        if kind == "text": return CLIPTextModel(CLIPTextConfig(**config))
        return {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[kind].from_config(config)


def shapes(state):
    return {k: tuple(v.shape) for k, v in state.items()}


CASES = {
    "sd1-unet": ("unet", UNet, UNetConfig(), UNET_NAMES, write_unet_config, 686),
    "sd2-unet": ("unet", UNet, SD2, UNET_NAMES, write_unet_config, 686),
    "vae": ("vae", Autoencoder, AutoencoderConfig(), AUTOENCODER_NAMES, write_autoencoder_config, 248),
    "sd1-text": ("text", TextEncoder, TextEncoderConfig(), TEXT_NAMES, write_text_config, 196),
    "sd2-text": ("text", TextEncoder, SD2_TEXT, TEXT_NAMES, write_text_config, 372),
}


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_theirs(case):
    """At full size, every tensor has the name and shape that diffusers and transformers give it, and back."""
    kind, network, config, names, write, count = CASES[case]
    with torch.device("meta"): ours = network(config).state_dict()
    other = rename(theirs(kind, write(config)).state_dict(), OLD_TEXT_NAMES if kind == "text" else {})
    assert len(ours) == count
    assert shapes(rename(ours, names)) == shapes(other)
    assert shapes(rename(other, names, reverse=True)) == shapes(ours)


def test_published_configs_are_understood():
    """The settings of Stable Diffusion 1.5's and 2.1's published files give our two UNet configs."""
    common = dict(
        _class_name="UNet2DConditionModel", _diffusers_version="0.6.0", act_fn="silu", center_input_sample=False,
        block_out_channels=[320, 640, 1280, 1280], down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, downsample_padding=1, flip_sin_to_cos=True,
        freq_shift=0, in_channels=4, layers_per_block=2, mid_block_scale_factor=1, norm_eps=1e-05,
        norm_num_groups=32, out_channels=4, sample_size=64)
    new = dict(dual_cross_attention=False, num_class_embeds=None, only_cross_attention=False, upcast_attention=True)
    assert read_unet_config(common | dict(cross_attention_dim=768, attention_head_dim=8)) == UNetConfig()
    assert read_unet_config(common | new | dict(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20],
                                                use_linear_projection=True)) == SD2


def test_rename_is_a_table_of_phrases():
    """The longest phrase wins, `{}` keeps its number, unknown words stay, and the table works both ways."""
    table = {"a.{}.b": "x.b.{}", "a": "alpha", "b.{}.c.{}": "{}.{}"}
    state = {"a.3.b.w": 1, "a.w": 2, "other.a": 3, "ab.a3": 4}
    assert rename(state, table) == {"x.b.3.w": 1, "alpha.w": 2, "other.alpha": 3, "ab.a3": 4}
    assert rename(rename(state, table), table, reverse=True) == state


def test_transformers_opens_our_text_encoder(parts, saved):
    """The hidden states are equal, and no weight was missing or left over."""
    from transformers import CLIPTextModel
    model, info = CLIPTextModel.from_pretrained(saved / "text_encoder", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = parts.tokenizer(["a red apple", ""])
    with torch.no_grad():
        assert_close(parts.text_encoder(tokens), model(tokens).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_diffusers_opens_our_unet_and_autoencoder(parts, saved):
    """Prediction, moments and decoded picture are equal to 1e-5, and no weight was missing or left over."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    unet, info = UNet2DConditionModel.from_pretrained(saved / "unet", output_loading_info=True)
    vae, more = AutoencoderKL.from_pretrained(saved / "vae", output_loading_info=True)
    assert not any((info | more)[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    z, x, t, words = randn(2, 4, 8, 8), randn(2, 3, 16, 16), torch.tensor([3, 900]), randn(2, 16, 24)
    with torch.no_grad():
        assert_close(parts.unet(z, t, words), unet(z, t, words).sample, atol=1e-5, rtol=1e-5)
        moments, gaussian = vae.encode(x).latent_dist, parts.autoencoder.encode(x)
        assert_close((gaussian.mean, gaussian.logvar), (moments.mean, moments.logvar), atol=1e-5, rtol=1e-5)
        assert_close(parts.autoencoder.decode(z), vae.decode(z).sample, atol=1e-5, rtol=1e-5)


def test_we_open_what_diffusers_saved(tmp_path):
    """Networks and sampling of a pipeline that diffusers saved are the same in ours."""
    pipe = diffusers_pipeline(tmp_path, prediction_type="v_prediction", timestep_spacing="trailing",
                              set_alpha_to_one=False)
    parts = load_diffusers(tmp_path)
    assert parts.sampling == Sampling(prediction="v", set_alpha_to_one=False, size=32)
    z, t, tokens = randn(2, 4, 8, 8), torch.tensor([3, 900]), parts.tokenizer(["a red apple", "cat"])
    with torch.no_grad():
        words = parts.text_encoder(tokens)
        assert_close(words, pipe.text_encoder(tokens).last_hidden_state, atol=1e-5, rtol=1e-5)
        assert_close(parts.unet(z, t, words), pipe.unet(z, t, words).sample, atol=1e-5, rtol=1e-5)
        assert_close(parts.autoencoder.decode(z), pipe.vae.decode(z).sample, atol=1e-5, rtol=1e-5)


def test_round_trip_is_bitwise(parts, saved):
    """Saved and loaded: the same tensors, configs, tokens and sampling."""
    back = load_diffusers(saved)
    for a, b in zip(parts[:3], back[:3], strict=True):
        assert a.config == b.config
        assert_close(a.state_dict(), b.state_dict(), atol=0, rtol=0)
    assert back.sampling == parts.sampling and back.tokenizer(["a cat"]).equal(parts.tokenizer(["a cat"]))
    assert all(p.requires_grad and p.dtype == torch.float32 for net in back[:3] for p in net.parameters())


def test_parts_may_be_saved_one_after_the_other(parts, tmp_path):
    """Autoencoder first, text encoder later: each opens alone, nothing pretends to be a pipeline before it is one."""
    save_autoencoder(tmp_path / "deep" / "model", parts.autoencoder)
    assert_close(load_autoencoder(tmp_path / "deep" / "model").state_dict(), parts.autoencoder.state_dict())
    save_text_encoder(tmp_path / "deep" / "model", parts.text_encoder)
    save_unet(tmp_path / "deep" / "model", parts.unet)
    load_text_encoder(tmp_path / "deep" / "model"), load_unet(tmp_path / "deep" / "model")
    with pytest.raises(FileNotFoundError, match="model_index.json: no such file"):
        load_diffusers(tmp_path / "deep" / "model")


def test_half_precision_files_load_as_float32(parts, tmp_path):
    """fp16 weights, under the plain name or as a variant, become float32 unless asked otherwise."""
    save_unet(tmp_path, parts.unet, dtype=torch.float16)
    assert_close(load_unet(tmp_path).conv_in.weight, parts.unet.conv_in.weight, atol=1e-3, rtol=1e-3)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".fp16.safetensors"))
    assert load_unet(tmp_path).conv_in.weight.dtype == torch.float32
    assert load_unet(tmp_path, dtype=None).conv_in.weight.dtype == torch.float16


def test_sharded_weights_load(parts, tmp_path):
    """A network that diffusers cut into several files is read whole."""
    from diffusers import UNet2DConditionModel
    save_unet(tmp_path / "one", parts.unet)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "one" / "unet")
    theirs.save_pretrained(tmp_path / "many" / "unet", max_shard_size="50KB")
    assert len(list((tmp_path / "many" / "unet").glob("*.safetensors"))) > 1
    assert_close(load_unet(tmp_path / "many").state_dict(), parts.unet.state_dict(), atol=0, rtol=0)


def test_old_names_load(parts, saved):
    """Names of the first releases, in the autoencoder's attention and in the text encoder, are understood."""
    vae, text = saved / "vae" / "diffusion_pytorch_model.safetensors", saved / "text_encoder" / "model.safetensors"
    old = rename(load_file(vae), interop.OLD_AUTOENCODER_NAMES, reverse=True)
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in old
    save_file(old, vae, {"format": "pt"})
    save_file(load_file(text) | {"text_model.embeddings.position_ids": torch.arange(16)[None]}, text, {"format": "pt"})
    assert_close(load_autoencoder(saved).state_dict(), parts.autoencoder.state_dict())
    assert_close(load_text_encoder(saved).state_dict(), parts.text_encoder.state_dict())


def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


@pytest.mark.parametrize("damage, words", [
    (lambda s: s.pop("conv_in.bias"), r"unet: 1 missing \(conv_in.bias\)"),
    (lambda s: s.update(surprise=torch.zeros(1)), r"unet: 1 unexpected \(surprise\)"),
    (lambda s: s.update({"conv_in.bias": torch.zeros(3)}),
     r"unet: 1 wrong shape \(conv_in.bias \(3,\) instead of \(16,\)\)"),
    (lambda s: s.clear(), r"unet: \d+ missing \(.*and \d+ more\)"),
], ids=["missing", "extra", "wrong shape", "empty"])
def test_wrong_keys_are_listed(saved, damage, words):
    """A weight too few, too many or of another shape is named, in one line."""
    file = saved / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    damage(state)
    save_file(state, file)
    with pytest.raises(ValueError, match=words) as error: load_diffusers(saved)
    one_line(error)


@pytest.mark.parametrize("damage", [
    lambda b: b[:-100], lambda b: b[:5], lambda b: b"", lambda b: b"\xff" * 8 + b[8:], lambda b: b"no weights" * 10,
], ids=["truncated", "stump", "empty", "lying", "garbage"])
def test_damaged_weights_are_refused(saved, damage):
    """A damaged weights file is named, in one line."""
    file = saved / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="damaged") as error: load_diffusers(saved)
    assert str(file) in one_line(error)


@pytest.mark.parametrize("name", [
    "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
    "text_encoder/model.safetensors", "tokenizer/vocab.json", "scheduler/scheduler_config.json"])
def test_missing_files_are_named(saved, name):
    """A missing file is named, in one line."""
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(name.split("/")[-1])) as error: load_diffusers(saved)
    assert str(saved) in one_line(error)


@pytest.mark.parametrize("name, change, words", [
    ("unet/config.json", dict(class_embed_type="timestep"), "class_embed_type = 'timestep' is not supported"),
    ("unet/config.json", dict(flip_sin_to_cos=False), "flip_sin_to_cos = False is not supported"),
    ("unet/config.json", dict(some_future_option=3), "some_future_option = 3 is not supported"),
    ("unet/config.json", dict(down_block_types=["AttnDownBlock2D", "DownBlock2D"]), "AttnDownBlock2D"),
    ("unet/config.json", dict(block_out_channels=[16, 24]), "not multiples"),
    ("unet/config.json", dict(block_out_channels=[12, 24]), "12 channels"),
    ("unet/config.json", dict(block_out_channels="wide"), "unet/config.json: "),
    ("unet/config.json", dict(_class_name="UNet3DConditionModel"), "UNet3DConditionModel"),
    ("vae/config.json", dict(use_quant_conv=False), "use_quant_conv = False is not supported"),
    ("vae/config.json", dict(latents_mean=[0.0]), "latents_mean"),
    ("text_encoder/config.json", dict(hidden_act="relu"), "relu"),
    ("text_encoder/config.json", dict(layer_norm_eps=1e-3), "layer_norm_eps"),
    ("scheduler/scheduler_config.json", dict(beta_schedule="squaredcos_cap_v2"), "squaredcos_cap_v2"),
    ("scheduler/scheduler_config.json", dict(thresholding=True), "thresholding"),
    ("scheduler/scheduler_config.json", dict(trained_betas=[0.1]), "trained_betas"),
    ("model_index.json", dict(_class_name="StableDiffusionXLPipeline"), "StableDiffusionXLPipeline"),
], ids=lambda o: o if isinstance(o, str) else "-".join(o) if isinstance(o, dict) else "")
def test_other_networks_are_refused(saved, name, change, words):
    """A setting that would make another network is an error that names file and setting, in one line."""
    file = saved / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=re.escape(words)) as error: load_diffusers(saved)
    assert str(saved) in one_line(error)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_broken_json_is_refused(saved, text):
    """A config that is no JSON object is named, in one line."""
    (saved / "unet" / "config.json").write_text(text)
    with pytest.raises(ValueError, match="unet/config.json") as error: load_diffusers(saved)
    one_line(error)


def test_parts_that_do_not_fit_are_refused(parts, tmp_path):
    """A UNet and a text encoder of different widths are refused when the model is opened."""
    other = TextEncoder(TextEncoderConfig(vocab=600, window=16, width=32, layers=1, heads=2))
    save_diffusers(tmp_path, parts._replace(text_encoder=other))
    with pytest.raises(ValueError, match="unet reads words 24 wide, text_encoder makes 32") as error:
        load_diffusers(tmp_path)
    one_line(error)


def test_a_failed_save_leaves_the_old_file(saved, parts, monkeypatch):
    """When writing stops half-way, the file that was there before is still whole, and no rest lies about."""
    before = {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()}

    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt): save_unet(saved, parts.unet)
    assert {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()} == before


def test_files_are_as_readable_as_the_umask_allows(saved):
    """Weights have the permissions of any new file; safetensors alone would hide them from everyone else."""
    assert len({p.stat().st_mode for p in saved.rglob("*") if p.is_file()}) == 1


def test_loaded_weights_do_not_write_to_the_file(saved):
    """Training a loaded network changes no byte on disk, and saving it over its own file works."""
    file = saved / "unet" / "diffusion_pytorch_model.safetensors"
    before, unet = file.read_bytes(), load_unet(saved)
    with torch.no_grad():
        for p in unet.parameters(): p.add_(1)
    assert file.read_bytes() == before
    save_unet(saved, unet)
    assert_close(load_unet(saved).state_dict(), unet.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("scheduler, want", [
    (dict(_class_name="PNDMScheduler", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
          steps_offset=1, skip_prk_steps=True),
     Sampling(spacing="leading", set_alpha_to_one=False)),
    (dict(_class_name="EulerDiscreteScheduler", prediction_type="v_prediction"),
     Sampling(beta_start=1e-4, beta_end=0.02, beta_kind="linear", prediction="v", spacing="linspace")),
    (dict(_class_name="DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing",
          beta_schedule="scaled_linear"),
     Sampling(beta_start=1e-4, beta_end=0.02, zero_snr=True)),
], ids=["pndm", "euler", "ddim"])
def test_any_scheduler_tells_the_training_noise(scheduler, want):
    """Of a foreign scheduler we take the noise of training, with that class's defaults for what it leaves out."""
    assert interop.read_sampling(scheduler) == want


def test_sampling_round_trip(tmp_path, parts):
    """Every field of Sampling that a file can hold comes back, and diffusers reads the same."""
    from diffusers import DDIMScheduler
    s = Sampling(T=500, beta_start=1e-3, beta_end=2e-2, beta_kind="linear", zero_snr=True, prediction="v",
                 spacing="linspace", set_alpha_to_one=False, size=32)
    save_diffusers(tmp_path, parts._replace(sampling=s))
    assert load_sampling(tmp_path) == s
    config = DDIMScheduler.from_pretrained(tmp_path / "scheduler").config
    assert (config.prediction_type, config.num_train_timesteps) == ("v_prediction", 500)
    assert config.rescale_betas_zero_snr


def test_fetch_prefers_a_directory_and_refuses_nonsense(tmp_path, monkeypatch):
    """A directory is itself; a path that is not there is one line; a Hub id is downloaded without pickles."""
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, **kw: asked.append(kw | dict(name=name)) or str(tmp_path))
    assert interop.fetch(tmp_path) == tmp_path
    for name in ("./nowhere/at/all", "nowhere", "/no/where", "../a"):
        with pytest.raises(FileNotFoundError, match="no such directory"): interop.fetch(name)
    assert not asked
    assert interop.fetch("someone/model", "abc123") == tmp_path
    assert [o["name"] for o in asked] == ["someone/model"] * 2  # the second for half precision: there was nothing else
    assert [o["revision"] for o in asked] == ["abc123", tmp_path.name]
    assert all(p.endswith((".json", ".txt", ".safetensors")) for o in asked for p in o["allow_patterns"])


def test_fetch_without_network_is_one_line(monkeypatch):
    """When the Hub cannot be reached, the error is one line that names the model."""
    import huggingface_hub

    def fail(*_, **__): raise OSError("offline\nand more")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match="someone/model.*offline$") as error: interop.fetch("someone/model")
    one_line(error)
