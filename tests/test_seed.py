"""SD-From-Scratch's UNet has its published names and shapes, computes what a plain re-computation does, and is read safely."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from parity import randn, randomise
from sd_nb.foreign import Sampling, rename
from sd_nb.interop import Parts, save_text_encoder
from sd_nb.model.autoencoder import Autoencoder
from sd_nb.model.clip import TextEncoder
from sd_nb.model.tokenizer import Tokenizer
from sd_nb.model.unet import recompute_blocks
from sd_nb.pipeline import StableDiffusion
from sd_nb.seed import MaskedTextEncoder, SeedConfig, SeedUNet, load_seed_unet, read_average, seed_names
from tiny import AUTOENCODER, CAPTIONS, TEXT

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


def test_it_draws(unet):
    """The pipeline draws with it as with any UNet."""
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size=TEXT.vocab, window=TEXT.window)
    parts = Parts(unet, randomise(Autoencoder(AUTOENCODER)), randomise(MaskedTextEncoder(TEXT)), tokenizer,
                  Sampling(size=32, spacing="leading", offset=0))
    picture = StableDiffusion(parts)("a red apple", steps=3, sampler="ddim", output="np", progress=False)
    assert picture.shape == (1, 32, 32, 3) and picture.std() > 0.01
