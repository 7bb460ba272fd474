"""SD-From-Scratch's UNet has its published names and shapes, computes what a plain re-computation does, and is read safely."""

import csv
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from few import few_shards
from parity import randn, randomise
from sd_nb.config import PRESETS, count_parameters
from sd_nb.foreign import rename
from sd_nb.interop import Parts, save_text_encoder
from sd_nb.model.autoencoder import Autoencoder
from sd_nb.model.clip import TextEncoder
from sd_nb.model.tokenizer import Tokenizer
from sd_nb.model.unet import recompute_blocks
from sd_nb.pipeline import StableDiffusion
from sd_nb.seed import (
    SEED_SAMPLING, MaskedTextEncoder, SeedConfig, SeedUNet, load_seed, load_seed_directory, load_seed_unet, read_average,
    save_seed_directory, seed_names)
from sd_nb.train.__main__ import main
from tiny import AUTOENCODER, CAPTIONS, TEXT, diffusers_pipeline

SMALL = SeedConfig(width=16, mults=(1, 2, 2), attn=(False, True, True), heads=2, d_context=24, groups=4)


def test_names_and_shapes_are_the_published_ones():
    """780,718,404 parameters in exactly the 560 tensors of the list."""
    with torch.device("meta"):
        unet = SeedUNet()
    assert sum(p.numel() for p in unet.parameters()) == 780_718_404
    ours = {k: "x".join(map(str, v.shape)) for k, v in rename(unet.state_dict(), seed_names(unet.config)).items()}
    with open(Path(__file__).parent / "seed_unet_keys.tsv") as f:
        assert ours == {row["key"]: row["shape"] for row in csv.DictReader(f, delimiter="\t")}
    assert rename(ours, seed_names(unet.config), reverse=True).keys() == unet.state_dict().keys()


class Plain:
    "The network once more, straight from its description, on the checkpoint's names."

    def __init__(self, state, config, t, context):
        self.s, self.c, self.context, half = state, config, context, config.width // 2
        angle = t[:, None] * torch.tensor([math.exp(-i * math.log(10_000) / (half - 1)) for i in range(half)])
        self.time = self.linear("t_emb.2", F.silu(self.linear("t_emb.0", torch.cat([angle.sin(), angle.cos()], -1))))

    def linear(self, n, x): return F.linear(x, self.s[n + ".weight"], self.s.get(n + ".bias"))
    def conv(self, n, x, **how): return F.conv2d(x, self.s[n + ".weight"], self.s[n + ".bias"], **how)
    def groups(self, n, x): return F.group_norm(x, self.c.groups, self.s[n + ".weight"], self.s[n + ".bias"], 1e-5)
    def layer(self, n, x): return F.layer_norm(x, x.shape[-1:], self.s[n + ".weight"], self.s[n + ".bias"], 1e-5)

    def attend(self, n, x, y):
        q, k, v = (self.linear(f"{n}.to_{o}", z).unflatten(-1, (self.c.heads, -1)).transpose(1, 2)
                   for o, z in (("q", x), ("k", y), ("v", y)))
        return self.linear(n + ".to_out", ((q @ k.mT / q.shape[-1]**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))

    def transformer(self, n, x):
        h, m = self.conv(n + ".proj_in", self.groups(n + ".norm", x)).flatten(2).mT, n + ".tfm"
        y = self.layer(m + ".ln1", h)
        h = h + self.attend(m + ".self_attn", y, y)
        h = h + self.attend(m + ".cross_attn", self.layer(m + ".ln2", h), self.context)
        h = h + self.linear(m + ".mlp.2", F.gelu(self.linear(m + ".mlp.0", self.layer(m + ".ln3", h))))
        return x + self.conv(n + ".proj_out", h.mT.unflatten(2, x.shape[2:]))

    def block(self, n, x):
        h = self.conv(n + ".conv1", F.silu(self.groups(n + ".norm1", x)), padding=1)
        h = h + self.linear(n + ".time_mlp.1", F.silu(self.time))[..., None, None]
        h = self.conv(n + ".conv2", F.silu(self.groups(n + ".norm2", h)), padding=1)
        if n + ".tfm.norm.weight" in self.s:
            h = self.transformer(n + ".tfm", h)
        return h + (self.conv(n + ".skip", x) if n + ".skip.weight" in self.s else x)

    def __call__(self, x):
        h, skips, places = self.conv("conv_in", x, padding=1), [], range(3 * len(self.c.mults) - 1)
        for i in places:
            h = self.conv(f"downs.{i}", h, stride=2, padding=1) if i % 3 == 2 else self.block(f"downs.{i}", h)
            skips += [h] if i % 3 < 2 else []
        h = self.block("mid.1", self.block("mid.0", h))
        for i in places:
            w, b = self.s.get(f"ups.{i}.weight"), self.s.get(f"ups.{i}.bias")
            h = (F.conv_transpose2d(h, w, b, stride=2, padding=1) if i % 3 == 2
                 else self.block(f"ups.{i}", torch.cat([h, skips.pop()], 1)))
        return self.conv("conv_out", F.silu(self.groups("norm_out", h)), padding=1)


def test_it_computes_what_its_description_says():
    """Outputs to 1e-5, gradients of every parameter to 1e-4, relative."""
    unet, x, t, context = randomise(SeedUNet(SMALL)), randn(2, 4, 16, 8), torch.tensor([3, 950]), randn(2, 7, 24)
    y = unet(x, t, context)
    z = Plain(rename(dict(unet.named_parameters()), seed_names(SMALL)), SMALL, t, context)(x)
    assert y.std() > 0.1
    assert_close(y, z, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad((o * randn(*o.shape)).mean(), list(unet.parameters())) for o in (y, z)]
    for (name, _), a, b in zip(unet.named_parameters(), *grads, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm(), name


def test_masked_text_encoder_is_transformers_with_a_mask(tmp_path):
    """Given the attention mask that its tokenizer makes, transformers' text encoder gives the same vectors."""
    from transformers import CLIPTextModel
    encoder = randomise(MaskedTextEncoder(TEXT))
    save_text_encoder(tmp_path, encoder)
    theirs = CLIPTextModel.from_pretrained(tmp_path, subfolder="text_encoder")
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size=TEXT.vocab, window=TEXT.window)
    texts = ["a red apple", "", "a cat on the moon " * 9]
    tokens, lengths = tokenizer(texts), [tokenizer.count(text) for text in texts]
    assert lengths[0] < TEXT.window < lengths[2]
    mask = torch.tensor([[i < n for i in range(TEXT.window)] for n in lengths])
    assert_close(encoder(tokens), theirs(input_ids=tokens, attention_mask=mask.long()).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert (encoder(tokens) - TextEncoder.forward(encoder, tokens)).abs().max() > 1e-2


@pytest.fixture()
def unet():
    return randomise(SeedUNet(SMALL))


def checkpoint(unet, path, prefix="", change=lambda weights: weights, **more):
    weights = {prefix + k: v for k, v in rename(unet.state_dict(), seed_names(SMALL)).items()}
    torch.save(dict(epoch=42, global_step=7, ema_state_dict=dict(shadow=change(weights), step_count=9, decay=0.9999)) | more, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "unet._fsdp_wrapped_module.", "unet._orig_mod.module."])
def test_the_average_is_read_under_any_prefix(unet, tmp_path, prefix):
    """Wrappers leave prefixes in names; the weights come back bit by bit, in rows as PyTorch lays them out."""
    def last(w): return {k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in w.items()}
    live = dict(unet_state_dict={k: torch.zeros(1) for k in unet.state_dict()})
    again = load_seed_unet(checkpoint(unet, tmp_path / "sd_epoch_042.pt", prefix, last, **live), SMALL)
    for a, b in zip(unet.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b) and b.is_contiguous()


@pytest.mark.parametrize("change, words", [
    (lambda w: {k: v for k, v in w.items() if k != "conv_in.bias"}, "1 missing .conv_in.bias"),
    (lambda w: w | {"extra": torch.zeros(1)}, "1 unexpected .extra"),
    (lambda w: w | {"conv_in.bias": torch.zeros(3)}, "wrong shape.*conv_in.bias"),
])
def test_wrong_weights_are_listed(unet, tmp_path, change, words):
    """What is missing, too much or of another shape is named, with the file."""
    with pytest.raises(ValueError, match=f"sd.pt.*{words}"):
        load_seed_unet(checkpoint(unet, tmp_path / "sd.pt", change=change), SMALL)


class Canary:
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


def test_a_checkpoint_that_runs_code_is_refused(unet, tmp_path):
    """A pickle that calls a function is refused by name of the file, and the function is not called."""
    evil = checkpoint(unet, tmp_path / "evil.pt", more=Canary(tmp_path / "canary"))
    with pytest.raises(ValueError, match="evil.pt is no checkpoint of plain tensors"):
        read_average(evil)
    assert not (tmp_path / "canary").exists()
    torch.load(evil, weights_only=False)
    assert (tmp_path / "canary").exists()  # it would have been


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"hello" * 99])
def test_damaged_files_are_refused(unet, tmp_path, damage):
    """A truncated, an empty and a text file are refused in one line."""
    path = checkpoint(unet, tmp_path / "sd.pt")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="sd.pt is no checkpoint") as caught:
        read_average(path)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path):
    """No file, and a file without an average."""
    with pytest.raises(FileNotFoundError, match="none.pt: no such file"):
        read_average(tmp_path / "none.pt")
    torch.save(dict(unet_state_dict={}), tmp_path / "live.pt")
    with pytest.raises(ValueError, match="holds no averaged weights"):
        read_average(tmp_path / "live.pt")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of its memory from Linux's /proc")
def test_only_what_is_wanted_is_read(tmp_path):
    """Beside 200 MB of optimizer state, reading the average takes a few megabytes of memory."""
    optimizer = {"state": {i: torch.ones(12_500_000) for i in range(4)}}
    torch.save(dict(ema_state_dict=dict(shadow={"a": torch.ones(1000)}), optimizer_state_dict=optimizer), tmp_path / "sd.pt")
    code = ("import sys; from pathlib import Path; from sd_nb.seed import read_average\n"
            "def peak(): return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
            "before = peak(); assert read_average(sys.argv[1])['a'].sum() == 1000; print(peak() - before)")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "sd.pt"], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50_000  # kB


def test_each_block_is_computed_again_only_once(unet):
    """A transformer inside a block is recomputed with the block, not once more; gradients stay the same to the bit."""
    inputs, calls, results = (randn(1, 4, 8, 8), torch.tensor(5), randn(1, 3, 24)), [], []
    unet.middle[0].attention.proj_in.register_forward_hook(lambda *_: calls.append(1))
    for on in (False, True):
        recompute_blocks(unet, on)
        results.append(torch.autograd.grad(unet(*inputs).square().mean(), list(unet.parameters())))
    assert len(calls) == 3  # once as it is, twice when recomputing
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def released(unet, path):
    "A checkpoint with everything that the released one holds"
    live = {k: torch.zeros_like(v) for k, v in rename(unet.state_dict(), seed_names(SMALL)).items()}
    adam = dict(state={0: dict(step=torch.tensor(7.), exp_avg=torch.zeros(3))}, param_groups=[dict(lr=1e-6, params=[0])])
    return checkpoint(unet, path, unet_state_dict=live, optimizer_state_dict=adam, best_loss=0.09,
                      lr_scheduler_state_dict=dict(last_epoch=7))


@torch.no_grad()
def plain_pictures(state, directory, prompts, negatives, noise, steps, guidance):
    "The same pictures from transformers' text encoder with its mask, diffusers' DDIM and autoencoder, and `Plain`"
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer
    vae = AutoencoderKL.from_pretrained(directory, subfolder="vae")
    text, tokenizer = (o.from_pretrained(directory, subfolder=n)
                       for o, n in ((CLIPTextModel, "text_encoder"), (CLIPTokenizer, "tokenizer")))
    words = tokenizer(negatives + prompts, padding="max_length", max_length=TEXT.window, truncation=True, return_tensors="pt")
    context, x = text(words.input_ids, attention_mask=words.attention_mask).last_hidden_state, noise
    ddim = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
                         steps_offset=0, set_alpha_to_one=True, clip_sample=False)
    ddim.set_timesteps(steps)
    for t in ddim.timesteps:
        uncond, cond = Plain(state, SMALL, t.expand(2 * len(x)), context)(torch.cat([x, x])).chunk(2)
        x = ddim.step(uncond + guidance * (cond - uncond), t, x).prev_sample
    return (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def test_a_checkpoint_draws_the_author_s_pictures(unet, tmp_path):
    """From one file beside a foreign autoencoder and text encoder: what transformers, diffusers and a plain UNet draw, to 1e-4."""
    diffusers_pipeline(tmp_path)
    parts = load_seed(released(unet, tmp_path / "sd_epoch_042.pt"), config=SMALL)
    assert type(parts.text_encoder) is MaskedTextEncoder and parts.sampling == SEED_SAMPLING
    prompts, negatives, noise = ["a red apple", "a cat"], ["blue", "green apples on the moon"], randn(2, 4, 16, 8)
    ours = StableDiffusion(parts)(prompts, negatives, steps=6, guidance=3.0, sampler="ddim", latents=noise, output="np", progress=False)
    theirs = plain_pictures(read_average(tmp_path / "sd_epoch_042.pt"), tmp_path, prompts, negatives, noise, 6, 3.0)
    assert ours.shape == (2, 64, 32, 3) and ours.std() > 0.05
    assert_close(torch.from_numpy(ours), theirs, atol=1e-4, rtol=0)


def test_parts_may_lie_elsewhere(unet, tmp_path):
    """The other networks come from any directory; without them the message says what is missing and how to get it."""
    path = released(unet, tmp_path / "sd.pt")
    (tmp_path / "vae").mkdir()
    with pytest.raises(FileNotFoundError, match="no text_encoder, no tokenizer: .*clip-vit-large-patch14.*sd-vae-ft-mse.*sd-nb download") as caught:
        load_seed(path, config=SMALL)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="none.pt: no such file"):
        load_seed(tmp_path / "none.pt")
    diffusers_pipeline(tmp_path / "other")
    parts = load_seed(path, tmp_path / "other", torch.float16, SMALL)
    assert {p.dtype for net in parts[:3] for p in net.parameters()} == {torch.float16}
    with pytest.raises(ValueError, match="sd.pt: .*missing"):
        load_seed(path, tmp_path / "other")  # not version 1's shape


@pytest.fixture()
def parts(unet):
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size=TEXT.vocab, window=TEXT.window)
    return Parts(unet, randomise(Autoencoder(AUTOENCODER)), randomise(MaskedTextEncoder(TEXT)), tokenizer,
                 replace(SEED_SAMPLING, size=32))


def test_a_directory_round_trip_changes_nothing(parts, tmp_path):
    """Saved and reopened, by either door: the same bits, shape, mask and timesteps, so the same picture."""
    save_seed_directory(tmp_path, parts)
    draw = dict(steps=3, sampler="ddim", output="np", progress=False)
    picture = StableDiffusion(parts)("a red apple", **draw)
    for again in (load_seed_directory(tmp_path), load_seed(tmp_path)):
        assert again.unet.config == SMALL and again.sampling == parts.sampling and type(again.text_encoder) is MaskedTextEncoder
        assert all(torch.equal(a, b) for a, b in zip(parts.unet.parameters(), again.unet.parameters(), strict=True))
        assert (StableDiffusion(again)("a red apple", **draw) == picture).all()
    save_seed_directory(tmp_path, parts, torch.float16)
    assert load_seed_directory(tmp_path, None).unet.conv_in.weight.dtype == torch.float16


@pytest.mark.parametrize("file, changes, words", [
    ("unet/config.json", dict(colour="red"), "unet/config.json: .*colour"),
    ("unet/config.json", dict(depth=2), "unet/config.json: SD-From-Scratch has no depth"),
    ("unet/config.json", dict(heads=0), "unet/config.json"),
    ("unet/config.json", dict(width="wide"), "unet/config.json"),
    ("unet/config.json", dict(width=32), "wrong shape"),
    ("unet/config.json", dict(d_context=32), "wrong shape"),
    ("model_index.json", dict(_class_name="StableDiffusionPipeline"), "not an SDFromScratchPipeline"),
])
def test_foreign_directories_are_refused(parts, tmp_path, file, changes, words):
    """What the config does not know, or what does not fit the weights, is named with its file."""
    save_seed_directory(tmp_path, parts)
    (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | changes))
    with pytest.raises(ValueError, match=words):
        load_seed_directory(tmp_path)


def test_the_preset_is_version_1(capsys):
    """`seed` has the published UNet, and --dry-run says so."""
    assert count_parameters(PRESETS["seed"])["unet"] == 780_718_404
    assert main(["seed", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["unet"] == 780_718_404


TRAIN = """seed --size 16 --unet.width 16 --unet.mults 1 2 --unet.attn False True --unet.heads 2 --unet.groups 8 --unet.d-context 32
    --autoencoder.width 8 --autoencoder.mults 1 2 --autoencoder.blocks 1 --autoencoder.groups 4 --clip.text.width 32 --clip.text.layers 1
    --clip.text.heads 2 --clip.text.vocab 700 --clip.text.window 32 --clip.image.size 16 --clip.image.patch 8 --clip.image.width 32
    --clip.image.layers 1 --clip.image.heads 2 --batch 8 --steps 2 --log-every 1""".split()


def test_the_preset_trains_and_draws(tmp_path):
    """All three stages, two steps each, on a few emoji; the model directory opens, draws, and starts another run."""
    words = [*TRAIN, "--data", str(few_shards(tmp_path / "few", 40))]
    for stage in ("autoencoder", "clip", "unet"):
        assert main([*words, "--run", str(tmp_path / "run"), "--stage", stage]) == 0
    parts = load_seed(tmp_path / "run" / "model")
    assert type(parts.unet) is SeedUNet and parts.sampling == replace(SEED_SAMPLING, size=16)
    pictures = StableDiffusion(parts)(["red apple", "blue heart"], steps=3, progress=False)
    assert [p.size for p in pictures] == [(16, 16)] * 2
    again = [*words, "--run", str(tmp_path / "again"), "--init-from", str(tmp_path / "run" / "model"), "--lr", "1e-9"]
    assert main(again) == 0
    for a, b in zip(parts.unet.parameters(), load_seed(tmp_path / "again" / "model").unet.parameters(), strict=True):
        assert_close(a, b, atol=1e-6, rtol=0)
    with pytest.raises(SystemExit):
        main([*again, "--run", str(tmp_path / "third"), "--unet.width", "32"])


def test_it_trains_with_hidden_padding(tmp_path, monkeypatch):
    """The text vectors that the UNet is trained on are those of the masked text encoder."""
    from sd_nb.train import stages
    seen, original = [], stages.UNetStage.batch
    monkeypatch.setattr(stages.UNetStage, "batch", lambda self, *args: seen.append((self, original(self, *args))) or seen[-1][1])
    words = [*TRAIN, "--data", str(few_shards(tmp_path / "few", 40)), "--run", str(tmp_path / "run"), "--drop-text", "1"]
    for stage in ("autoencoder", "clip", "unet"): assert main([*words, "--stage", stage]) == 0
    stage, (_, _, _, context) = seen[0]
    with torch.no_grad(): masked, read = stage.text_encoder(stage.empty), TextEncoder.forward(stage.text_encoder, stage.empty)
    assert_close(context, masked.expand_as(context))
    assert (masked - read).abs().max() > 1e-3
