"""`sd-nb convert`: any kind of model in, a directory or a single file out, whole or not at all."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from sd_nb import cli, convert, opening
from sd_nb.config import parse
from sd_nb.convert import Convert
from sd_nb.model.autoencoder import AutoencoderConfig
from sd_nb.model.clip import TextEncoderConfig
from sd_nb.model.unet import UNetConfig
from sd_nb.opening import open_parts, save_parts
from sd_nb.single_file import SECTIONS, describe, pack
from tiny import tiny_parts

PARTS = tiny_parts()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_parts(tmp_path / "model", PARTS)
    return tmp_path


def run(line):
    return parse(Convert, line.split(), "sd-nb convert").run()


def tree(home):
    return {p.relative_to(home).as_posix(): p.read_bytes() for p in sorted(home.rglob("*")) if p.is_file()}


def assert_same_parts(a, b, half=False):
    for x, y in zip(a[:3], b[:3], strict=True):
        assert x.config == y.config
        assert_close({k: v.half().float() if half else v for k, v in x.state_dict().items()}, y.state_dict(), atol=0, rtol=0)
    assert a.sampling == b.sampling and a.tokenizer(["a cat"]).equal(b.tokenizer(["a cat"]))


def test_there_and_back(home, capsys):
    """Directory to single file to directory: the same bits; and it says what it wrote."""
    assert run("model single.safetensors") == 0 and run("single.safetensors back") == 0
    assert_same_parts(open_parts("back"), PARTS)
    assert tree(home / "model") == tree(home / "back")
    out = capsys.readouterr()
    assert "single.safetensors  1.8 MB" in out.out and "unet" in out.out and "3/3" in out.err


def test_precision(home):
    """fp16 halves the file and is rounding only; without --dtype weights stay as they are; fp32 does not bring digits back."""
    assert run("model half.safetensors --dtype fp16") == run("half.safetensors half") == run("half full.safetensors --dtype fp32") == 0
    assert {v.dtype for v in load_file("half.safetensors").values()} == {torch.float16}
    assert {p.dtype for net in open_parts("half", None)[:3] for p in net.parameters()} == {torch.float16}
    assert {v.dtype for v in load_file("full.safetensors").values()} == {torch.float32}
    assert_same_parts(PARTS, open_parts("full.safetensors"), half=True)
    assert os.path.getsize("half.safetensors") < 0.7 * os.path.getsize("full.safetensors")


def test_numbers_too_large_for_fp16_are_refused(home):
    """A weight of 70,000 would become infinity."""
    parts = tiny_parts()
    with torch.no_grad(): parts.unet.conv_out.bias[0] = 70_000
    save_parts("large", parts)
    before = tree(home)
    with pytest.raises(ValueError, match=r"too large for torch.float16 \(unet.conv_out.bias\)"): run("large half --dtype fp16")
    assert tree(home) == before
    assert run("large same") == 0


def test_a_pickle_becomes_safe(home):
    """A checkpoint of plain tensors, with permission and a tokenizer, becomes a single file; without permission it is refused."""
    parts = tiny_parts(UNetConfig(width=32, mults=(1, 2), attn=(False, True), blocks=1, d_context=64), AutoencoderConfig(width=32, mults=(1, 2), blocks=1),
                       TextEncoderConfig(vocab=600, window=16, width=64, layers=2, heads=1))  # shapes that need no words
    state = {k: v.detach() for name, net in zip(("unet", "autoencoder", "clip"), parts[:3], strict=True) for k, v in pack(SECTIONS[name], net).items()}
    torch.save(dict(state_dict=state, epoch=1), "old.ckpt")
    before = tree(home)
    with pytest.raises(ValueError, match="--allow-pickle"): run("old.ckpt new.safetensors")
    with pytest.raises(FileNotFoundError, match="--tokenizer DIR"): run("old.ckpt new.safetensors --allow-pickle")
    assert tree(home) == before
    assert run("old.ckpt new.safetensors --allow-pickle --tokenizer model/tokenizer") == 0
    for a, b in zip(parts[:3], open_parts("new.safetensors")[:3], strict=True): assert_close(a.state_dict(), b.state_dict(), atol=0, rtol=0)


def test_foreign_files_take_what_they_lack(home, monkeypatch):
    """--tokenizer, --parts-from and --prediction reach the reader; unsaid ones do not."""
    asked = []
    monkeypatch.setattr(convert, "open_parts", lambda *args, **extra: asked.append((args, extra)) or PARTS)
    assert run("a b") == run("a c --allow-pickle --revision v1 --tokenizer t --parts-from p --prediction v") == 0
    from pathlib import Path
    assert asked == [(("a", None, None, False), {}), (("a", None, "v1", True), dict(tokenizer=Path("t"), parts_from=Path("p"), prediction="v"))]


def test_nothing_is_overwritten_unasked(home):
    """An existing file, directory or tokenizer is named and stays as it is; --force replaces models of either kind."""
    assert run("model single.safetensors") == 0
    before = tree(home)
    for out in ("single.safetensors", "model"):
        with pytest.raises(ValueError, match=f"{out} is already there: --force overwrites it"): run(f"model {out} --dtype fp16")
    os.remove("single.safetensors")
    with pytest.raises(ValueError, match="single.tokenizer is already there"): run("model single.safetensors")
    assert run("model single.safetensors --force") == 0
    assert tree(home) == before
    assert run("single.safetensors model --force --dtype fp16") == 0
    assert_same_parts(PARTS, open_parts("model"), half=True)


def test_a_model_may_be_converted_in_place(home):
    """IN and OUT may be the same, for a directory and for a file, and nothing else is left."""
    assert run("model model --force --dtype fp16") == run("model x.safetensors") == run("x.safetensors x.safetensors --force --dtype fp32") == 0
    assert_same_parts(PARTS, open_parts("model"), half=True)
    assert_same_parts(PARTS, open_parts("x.safetensors"), half=True)
    assert sorted(os.listdir()) == ["model", "x.safetensors", "x.tokenizer"]


def test_force_spares_what_is_no_model(home):
    """A directory with other things in it is never replaced, an empty one may be."""
    (home / "photos").mkdir()
    (home / "photos" / "a.png").write_bytes(b"x")
    (home / "empty").mkdir()
    before = tree(home)
    for out in ("photos", "."):
        with pytest.raises(ValueError, match="holds no model: it is not overwritten"): run(f"model {out} --force")
    assert tree(home) == before
    assert run("model empty --force") == 0 and (home / "empty" / "model_index.json").is_file()


@pytest.mark.parametrize("line, kind, words", [
    ("nowhere out", FileNotFoundError, "nowhere: no such"), ("nowhere.safetensors out", FileNotFoundError, "nowhere.safetensors: no such file"),
    ("model out.ckpt", ValueError, "out.ckpt: no pickles are written"), ("model", ValueError, "OUT"), ("", ValueError, "IN"), ("model out --dtype bf16", ValueError, "bf16"),
    ("model out --speed 3", ValueError, "--speed"), ("model model/config.json/out", OSError, "config.json"), ("model out --revision main", ValueError, "no revision main"),
    ("model out --prediction v", ValueError, "prediction has no use here"),
])
def test_mistakes_are_one_line(home, line, kind, words):
    """Each names the culprit, and nothing is written."""
    (home / "model" / "config.json").write_text("{}")
    before = tree(home)
    with pytest.raises(kind) as error: run(line)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert tree(home) == before


@pytest.mark.parametrize("out", ["new", "new.safetensors", "model", "old.safetensors"])
@pytest.mark.parametrize("where", ["weights", "index", "rename"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
def test_a_fault_leaves_everything_as_it_was(home, monkeypatch, out, where, error):
    """A full disk or Ctrl-C while weights, the index or the final rename are under way: the old files are whole and no rest lies about."""
    save_parts(home / "old.safetensors", PARTS)
    before, calls = tree(home), []

    def fail(*args, real=None, at=0, **kwargs):
        calls.append(args)
        if len(calls) > at: raise error
        return real(*args, **kwargs)
    from pathlib import Path
    from sd_nb import interop, single_file
    if where == "weights":
        for module in (interop, single_file):
            monkeypatch.setattr(module, "save_file", lambda *a, real=module.save_file, **k: (a[1].write_bytes(b"half"), fail(*a, real=real, at=0 if ".saf" in out else 1, **k)))
    elif where == "index": monkeypatch.setattr(opening, "save_diffusers" if ".saf" not in out else "save_single_file", lambda *a: fail(*a))
    else:
        moves = Path.rename
        monkeypatch.setattr(Path, "rename", lambda self, target: fail() if self.parent.name.endswith(".part") and not self.name.endswith(".old") else moves(self, target))
    with pytest.raises(type(error)): run(f"model {out} --dtype fp16 --force")
    assert calls
    monkeypatch.undo()
    assert tree(home) == before and not list(home.rglob("*.part"))


def test_the_command_line_prints_one_line_and_exits_with_2(home, monkeypatch, capsys):
    """Through `sd-nb`, once it is registered there."""
    monkeypatch.setitem(cli.COMMANDS, "convert", Convert)
    assert cli.main(["convert", "model", "out.safetensors"]) == 0
    capsys.readouterr()
    for words in (["convert", "model", "out.safetensors"], ["convert", "no/such/thing", "x"], ["convert", "model"]):
        with pytest.raises(SystemExit) as stop: cli.main(words)
        err = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("sd-nb convert: error: ")]
        assert stop.value.code == 2 and len(err) == 1
    with pytest.raises(SystemExit) as stop: cli.main(["convert", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(flag in text for flag in ("IN", "OUT", "--dtype", "--allow-pickle", "--revision", "--tokenizer", "--parts-from", "--prediction", "--force"))
    assert Convert.__doc__ in cli.usage()


KILL = """
import os, sys
from sd_nb import interop
from sd_nb.config import parse
from sd_nb.convert import Convert
real, n = interop.save_file, [0]
def save(state, path, *args, **kwargs):
    real(state, path, *args, **kwargs)
    n[0] += 1
    if n[0] == 2: os._exit(9)
interop.save_file = save
parse(Convert, ["model", "old", "--force"], "sd-nb convert").run()
"""


def test_a_killed_conversion_leaves_the_old_model(home):
    """Killed in the middle of writing, without a chance to clean up: OUT is still the old model, and the same command works again."""
    save_parts(home / "old", PARTS)
    before = tree(home / "old")
    done = subprocess.run([sys.executable, "-c", KILL], cwd=home, capture_output=True, timeout=120)
    assert done.returncode == 9
    assert tree(home / "old") == before
    assert run("model old --force --dtype fp16") == 0
    assert_same_parts(PARTS, open_parts("old"), half=True)


def test_metadata_survives(home):
    """What no weight tells is in the file's metadata, where other programs pass over it."""
    from safetensors import safe_open
    assert run("model single.safetensors") == 0
    with safe_open("single.safetensors", "pt") as f: words = f.metadata()
    assert words["format"] == "pt" and json.loads(words["sd_nb"]) == json.loads(json.dumps(describe(PARTS)))
    save_file(load_file("single.safetensors"), "bare.safetensors")
    os.rename("single.tokenizer", "tokenizer")
    with pytest.raises(ValueError, match="groups"): open_parts("bare.safetensors")  # 32 groups do not divide 16 channels
