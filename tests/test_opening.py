"""One function opens every kind of model by what is in it, and one saves it by its destination's name."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from parity import randn
from sd_nb import seed
from sd_nb.foreign import read_text_config
from sd_nb.interop import load_diffusers, read_json, save_diffusers, write_json
from sd_nb.model.clip import TextEncoderConfig
from sd_nb.model.unet import UNet
from sd_nb.opening import find_tokenizer, is_seed, open_parts, save_parts
from sd_nb.single_file import describe
from tiny import UNET, tiny_parts

PARTS = tiny_parts()


def assert_same_parts(a, b):
    for x, y in zip(a[:3], b[:3], strict=True):
        assert x.config == y.config
        assert_close(x.state_dict(), y.state_dict(), atol=0, rtol=0)
    assert a.sampling == b.sampling and a.tokenizer(["a cat"]).equal(b.tokenizer(["a cat"]))


@pytest.fixture
def home(tmp_path):
    for name in ("directory", "single.safetensors", "run/model"): save_parts(tmp_path / name, PARTS)
    return tmp_path


@pytest.mark.parametrize("name", ["directory", "single.safetensors", "run"])
def test_every_kind_opens_to_the_same_parts(home, name):
    """A directory, a single file with its tokenizer beside it, and a run directory that holds a model."""
    assert_same_parts(open_parts(home / name), PARTS)
    assert_same_parts(open_parts(str(home / name)), PARTS)


@pytest.mark.parametrize("name", ["directory", "single.safetensors"])
def test_precision_is_what_was_asked_for(home, name):
    """fp16 files open as float32, or as they are."""
    save_parts(home / "half" / name, PARTS, torch.float16)
    for dtype, want in ((torch.float32, torch.float32), (None, torch.float16), (torch.float16, torch.float16)):
        parts = open_parts(home / "half" / name, dtype)
        assert {p.dtype for net in parts[:3] for p in net.parameters()} == {want}


def one_line(call, *words, kind=ValueError):
    with pytest.raises(kind) as error: call()
    assert "\n" not in str(error.value)
    for word in words: assert str(word) in str(error.value)


def test_what_is_not_there_is_never_downloaded(home, monkeypatch):
    """Whatever looks like a path is a FileNotFoundError."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    monkeypatch.chdir(home)
    for name in ("nowhere", "./a/b", "a/b/c", "/a/b", "~/nowhere", "a/b.safetensors", "a/b.ckpt", "b.pt", "directory/nowhere", "../x"):
        one_line(lambda: open_parts(name), name, "no such", kind=FileNotFoundError)


def test_words_without_a_use_are_told(home):
    """A revision of something local, a file's settings for a directory, an unknown kind of model."""
    one_line(lambda: open_parts(home / "directory", revision="main"), "directory", "no revision main")
    one_line(lambda: open_parts(home / "single.safetensors", revision="main"), "no revision main")
    one_line(lambda: open_parts(home / "directory", prediction="v"), "prediction has no use here")
    write_json(home / "directory" / "model_index.json", dict(_class_name="StableDiffusionXLPipeline"))
    one_line(lambda: open_parts(home / "directory"), "StableDiffusionXLPipeline")
    (home / "directory" / "model_index.json").unlink()
    one_line(lambda: open_parts(home / "directory"), "model_index.json: no such file", kind=FileNotFoundError)


def test_the_tokenizer_is_looked_for(home, tmp_path):
    """Where the user says, under the file's name, or in tokenizer/ beside it; else the error says how to give one."""
    file = home / "single.safetensors"
    assert len(find_tokenizer(file)) == len(PARTS.tokenizer)
    (home / "single.tokenizer").rename(home / "tokenizer")
    assert_same_parts(open_parts(file), PARTS)
    (home / "tokenizer").rename(home / "elsewhere")
    one_line(lambda: open_parts(file), file, "tokenizer=DIR (--tokenizer DIR)", kind=FileNotFoundError)
    for where in (home / "elsewhere", home / "directory", home / "directory" / "tokenizer"): assert_same_parts(open_parts(file, tokenizer=where), PARTS)
    one_line(lambda: open_parts(file, tokenizer=home / "run"), "run", kind=FileNotFoundError)


def test_saving_follows_the_name(home):
    """`.safetensors` is one file and its tokenizer, a pickle's name is refused, everything else is a directory."""
    assert sorted(p.name for p in home.iterdir()) == ["directory", "run", "single.safetensors", "single.tokenizer"]
    for name in ("x.ckpt", "x.pt", "x.bin", "x.pth"):
        one_line(lambda: save_parts(home / name, PARTS), name, "no pickles")
        assert not (home / name).exists()
    save_parts(home / "v1.5", PARTS)
    assert (home / "v1.5" / "model_index.json").is_file()


def seed_file(path):
    torch.save({"ema_state_dict": {"shadow": {"w": torch.zeros(2)}}, "epoch": 42}, path)
    return path


def test_a_seed_checkpoint_is_known_by_its_content(tmp_path):
    """The name inside the archive's program counts, wherever it lies and whatever the file is called."""
    assert is_seed(seed_file(tmp_path / "any.name"))
    torch.save({"state_dict": {"ema": torch.zeros(2)}}, tmp_path / "sd_epoch_042.pt")
    assert not is_seed(tmp_path / "sd_epoch_042.pt")
    for data in (b"", b"PK", b"PK\3\4ema_state_dict", b"ema_state_dict"):
        (tmp_path / "x").write_bytes(data)
        assert not is_seed(tmp_path / "x")


def test_a_seed_checkpoint_goes_to_its_own_loader(tmp_path, monkeypatch):
    """With the directory of its other parts, in the precision asked for; a single file's settings have no use."""
    asked = []
    monkeypatch.setattr(seed, "load_seed", lambda path, parts_from=None: asked.append((path, parts_from)) or tiny_parts(), raising=False)
    file = seed_file(tmp_path / "sd_epoch_042.ckpt")
    assert next(open_parts(file, torch.float16, parts_from="there").unet.parameters()).dtype == torch.float16
    assert next(open_parts(file, None).unet.parameters()).dtype == torch.float32
    assert asked == [(file, "there"), (file, None)]
    one_line(lambda: open_parts(file, prediction="v"), file, "prediction has no use here")


def test_a_seed_directory_goes_to_its_own_functions(tmp_path, monkeypatch):
    """Recognised by its index when opened and by its network when saved; it has no place in a single file."""
    asked = []
    monkeypatch.setattr(seed, "load_seed_directory", lambda directory, dtype: asked.append((directory, dtype)) or PARTS, raising=False)
    monkeypatch.setattr(seed, "save_seed_directory", lambda directory, parts, dtype: asked.append((directory, parts, dtype)), raising=False)
    write_json(tmp_path / "model_index.json", dict(_class_name="SDFromScratchPipeline"))
    assert open_parts(tmp_path, torch.float16) is PARTS
    other = PARTS._replace(unet=seed.SeedUNet(seed.SeedConfig(width=16, mults=(1, 2), attn=(False, True), blocks=1, heads=2, d_context=24, groups=8)))
    save_parts(tmp_path / "out", other, torch.float16)
    assert asked == [(tmp_path, torch.float16), (tmp_path / "out", other, torch.float16)]
    one_line(lambda: save_parts(tmp_path / "out.safetensors", other), "SeedUNet has no place in a single file")
    assert not (tmp_path / "out.tokenizer").exists()


@pytest.mark.parametrize("c_in, name", [(9, "StableDiffusionInpaintPipeline"), (8, "StableDiffusionInstructPix2PixPipeline")])
def test_unets_that_see_more_than_noise(tmp_path, c_in, name):
    """UNets for inpainting and for instructed editing keep their channels and their pipeline's name, and diffusers agrees."""
    import diffusers
    parts = PARTS._replace(unet=tiny_parts(unet=replace(UNET, c_in=c_in)).unet)
    save_parts(tmp_path / "model", parts)
    save_parts(tmp_path / "model.safetensors", parts)
    assert read_json(tmp_path / "model" / "model_index.json")["_class_name"] == name
    x, t, words = randn(1, c_in, 8, 8), torch.tensor([500]), randn(1, 16, 24)
    pipe = getattr(diffusers, name).from_pretrained(tmp_path / "model")
    for source in ("model", "model.safetensors"):
        with torch.no_grad(): assert_close(open_parts(tmp_path / source).unet(x, t, words), pipe.unet(x, t, words).sample, atol=1e-5, rtol=1e-5)
    pipe.save_pretrained(tmp_path / "theirs")
    assert open_parts(tmp_path / "theirs").unet.config.c_in == c_in


@pytest.mark.parametrize("changes, words", [(dict(c_in=7), "unet reads latents of 7 channels, vae makes 4"), (dict(c_out=8), "unet predicts 8 channels, vae reads 4")])
def test_other_channels_are_refused(tmp_path, changes, words):
    """A UNet whose channels fit no use of a latent of four."""
    save_diffusers(tmp_path, PARTS._replace(unet=UNet(replace(UNET, **changes))))
    one_line(lambda: load_diffusers(tmp_path), tmp_path, words)


def test_sd2_directories_hold_the_penultimate_state():
    """Diffusers leaves the last of OpenCLIP's 24 blocks out of its files, so that 23 blocks and the last norm say what SD 2.x listens to."""
    published = dict(  # of stabilityai/stable-diffusion-2-1, text_encoder/config.json
        architectures=["CLIPTextModel"], attention_dropout=0.0, bos_token_id=0, dropout=0.0, eos_token_id=2, hidden_act="gelu", hidden_size=1024, initializer_factor=1.0,
        initializer_range=0.02, intermediate_size=4096, layer_norm_eps=1e-05, max_position_embeddings=77, model_type="clip_text_model", num_attention_heads=16,
        num_hidden_layers=23, pad_token_id=1, projection_dim=512, torch_dtype="float32", vocab_size=49408)
    assert read_text_config(published) == TextEncoderConfig(width=1024, layers=23, heads=16, act="gelu")


def test_leaving_a_block_out_is_the_penultimate_state(tmp_path):
    """A directory of n - 1 blocks says what a tower of n blocks says with `skip=1`: the two ways to ask for the same state."""
    deep = tiny_parts(text=TextEncoderConfig(vocab=600, window=16, width=24, layers=3, heads=2, act="gelu")).text_encoder
    short = tiny_parts(text=replace(deep.config, layers=2)).text_encoder
    short.load_state_dict({k: v for k, v in deep.state_dict().items() if not k.startswith("blocks.2.")})
    save_parts(tmp_path / "model", PARTS._replace(text_encoder=short))
    save_parts(tmp_path / "model.safetensors", PARTS._replace(text_encoder=short))
    tokens = PARTS.tokenizer(["a red apple", "cat"])
    for name in ("model", "model.safetensors"):
        with torch.no_grad(): assert_close(open_parts(tmp_path / name).text_encoder(tokens), deep(tokens, skip=1), atol=1e-6, rtol=1e-6)


def test_sd2_is_asked_what_it_predicts(tmp_path):
    """A stranger's file whose words are 1024 wide opens only when told, and then at the size that goes with it."""
    from safetensors.torch import load_file, save_file
    parts = tiny_parts(unet=replace(UNET, d_context=1024, head_width=8, linear_proj=True), text=TextEncoderConfig(vocab=600, window=16, width=1024, layers=1, heads=16, act="gelu"))
    save_parts(tmp_path / "v2.safetensors", parts)
    save_file(load_file(tmp_path / "v2.safetensors"), tmp_path / "v2.safetensors")
    about = {k: v for k, v in describe(parts).items() if k != "sampling"}
    one_line(lambda: open_parts(tmp_path / "v2.safetensors", about=about), "v2.safetensors", "--prediction v")
    for prediction, size in (("v", 768), ("eps", 512)):
        got = open_parts(tmp_path / "v2.safetensors", prediction=prediction, about=about)
        assert (got.sampling.prediction, got.sampling.size, got.unet.config) == (prediction, size, parts.unet.config)
