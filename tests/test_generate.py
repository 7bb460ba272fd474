"""`sd-nb generate`: every picture can be drawn again, nothing is overwritten, and what strangers wrote is not trusted."""
import json
import os
import stat

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from tiny import tiny_parts

from sd_nb import cli
from sd_nb import generate as command
from sd_nb.generate import KINDS, check_settings, file_name, parse_parameters, read_prompts, read_settings
from sd_nb.lora import split_scale
from sd_nb.pipeline import StableDiffusion


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    home = tmp_path_factory.mktemp("home") / "model"
    torch.manual_seed(0)
    StableDiffusion(tiny_parts()).save_pretrained(home)
    return home


@pytest.fixture
def say(model, tmp_path, capsys):
    "Run `sd-nb generate` with the tiny model into out/, and return exit code and stderr"
    def say(*words, out="out", with_model=True):
        more = ["--model", model] if with_model else []
        try: code = cli.main(["generate", "--device", "cpu", *map(str, [*more, "--out", tmp_path / out, *words])])
        except SystemExit as stop: code = stop.code
        return code, capsys.readouterr().err
    return say


def names(folder): return sorted(p.name for p in folder.iterdir())
def pixels(path): return np.asarray(Image.open(path)).tolist()


def refused(answer, *words):
    "Exit code 2 and one line with these words, after whatever progress was shown"
    code, err = answer
    assert code == 2 and err.count("\n") == 1 and all(str(w).lower() in err.lower() for w in words), err


def test_the_same_picture_bit_for_bit(say, tmp_path, model):
    """--like draws what the file shows, whatever made it; a flag changes that setting alone."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)).save(tmp_path / "begin.png")
    Image.new("L", (24, 16), 255).save(tmp_path / "mask.png")
    save_file({f"unet.mid_block.attentions.0.proj_in.lora_{k}.weight": torch.randn(s) for k, s in (("A", (2, 32, 1, 1)), ("B", (32, 2, 1, 1)))}, tmp_path / "l.safetensors")
    edit = ["--image", tmp_path / "begin.png", "--strength", 0.7]
    for i, words in enumerate([
            ["--negative", "the moon, a cat", "--seed", 2**63 - 1, "--guidance", 0.1 + 0.2], ["--sampler", "ddpm", "--size", "24x8", "--rescale", 0.3],
            ["--sampler", "euler_ancestral", "--spacing", "karras", "--interval", 0.4, 3.5], edit, [*edit, "--mask", tmp_path / "mask.png"],
            ["--lora", f"{tmp_path / 'l.safetensors'}:0.8"]]):
        code, err = say('a (red:1.2) apple, "quoted" äpfel', "--steps", 3, *words, out=f"a{i}")
        assert code == 0, err
        first, = (tmp_path / f"a{i}").iterdir()
        assert say("--like", first, out=f"b{i}", with_model=False)[0] == 0
        again, = (tmp_path / f"b{i}").iterdir()
        assert pixels(first) == pixels(again) and first.name == again.name and read_settings(first) == read_settings(again)
        assert say("--like", first, "--steps", 2, out=f"c{i}", with_model=False)[0] == 0
        other, = (tmp_path / f"c{i}").iterdir()
        assert pixels(other) != pixels(first) and read_settings(other) == read_settings(first) | dict(steps=2)


def test_the_command_adds_nothing(say, tmp_path, model):
    """The pictures are the pipeline's, one for each seed, and the sheet shows all of them."""
    assert say("a red apple", "--n", 3, "--grid", "--steps", 2, "--negative", "blue", "--seed", 5)[0] == 0
    assert names(tmp_path / "out") == ["a-red-apple-5.png", "a-red-apple-6.png", "a-red-apple-7.png", "grid-a-red-apple-5-3.png"]
    pipe = StableDiffusion.from_pretrained(model, "cpu")
    for seed in (5, 6, 7):
        assert pixels(tmp_path / "out" / f"a-red-apple-{seed}.png") == np.asarray(pipe("a red apple", "blue", 2, 4.0, seed=seed)[0]).tolist()
    text = Image.open(tmp_path / "out" / "a-red-apple-6.png").text["parameters"]
    assert text.splitlines()[:2] == ["a red apple", "Negative prompt: blue"]
    assert text.splitlines()[2].startswith("Steps: 2, Sampler: unipc, CFG scale: 4.0, Seed: 6, ") and text.endswith("Size: 16x16")


def test_the_same_command_goes_on(say, tmp_path):
    """What is there with the same settings is skipped; other settings, a strange file or a taken sheet stop the command before it draws."""
    words = ["a red apple", "--n", 3, "--steps", 1, "--grid"]
    assert say(*words)[0] == 0
    out = tmp_path / "out"
    whole, times = names(out), {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert say(*words)[0] == 0 and {p: p.stat().st_mtime_ns for p in out.iterdir()} == times
    (out / "a-red-apple-1.png").unlink(), (out / "grid-a-red-apple-0-3.png").unlink()
    assert say(*words)[0] == 0 and names(out) == whole
    assert (out / "a-red-apple-0.png").stat().st_mtime_ns == times[out / "a-red-apple-0.png"]
    refused(say("a red apple", "--steps", 2), "a-red-apple-0.png is already there", "--force")
    before = pixels(out / "a-red-apple-0.png")
    assert say("a red apple", "--steps", 2, "--force")[0] == 0 and pixels(out / "a-red-apple-0.png") != before
    (out / "a-cat-0.png").write_text("mine")
    refused(say("a cat", "--steps", 1), "a-cat-0.png is already there")
    assert (out / "a-cat-0.png").read_text() == "mine"
    refused(say("the moon", "--model", "runs/none", "--steps", 1, with_model=False), "runs/none")


def test_a_file_of_prompts(say, tmp_path, model):
    """One picture a line, in order, with the settings of each line; an interrupted call goes on."""
    lines = [dict(prompt="a cat", seed=7), dict(prompt="a cat", seed=7, steps=2), dict(prompt="../../the moon", guidance=1.5, width=24)]
    (tmp_path / "p.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    words = ["--prompts", tmp_path / "p.jsonl", "--steps", 1]
    assert say(*words)[0] == 0
    found = ["00000-a-cat-7.png", "00001-a-cat-7.png", "00002-the-moon-0.png"]
    assert names(tmp_path / "out") == found and names(tmp_path) == ["out", "p.jsonl"]
    assert [read_settings(tmp_path / "out" / n)["steps"] for n in found] == [1, 2, 1]
    assert Image.open(tmp_path / "out" / found[2]).size == (24, 16)
    (tmp_path / "out" / found[1]).unlink()
    assert say(*words)[0] == 0 and names(tmp_path / "out") == found
    (tmp_path / "p.txt").write_bytes("\ufeffa cat\r\n\r\n  the moon \n".encode())
    assert say("--prompts", tmp_path / "p.txt", "--steps", 1, "--n", 2, out="lines")[0] == 0
    assert names(tmp_path / "lines") == ["00000-a-cat-0.png", "00000-a-cat-1.png", "00001-the-moon-0.png", "00001-the-moon-1.png"]


def test_ctrl_c_leaves_what_is_drawn(say, tmp_path, monkeypatch):
    """An interrupt ends with 130; the finished pictures stay, no half one does, and the same command goes on."""
    drawn, original = [], command.draw
    def draw(*args, check=False, **kwargs):
        if not check and len(drawn) == 1: raise KeyboardInterrupt
        if not check: drawn.append(1)
        return original(*args, check=check, **kwargs)
    monkeypatch.setattr(command, "draw", draw)
    assert say("a cat", "--n", 3, "--steps", 1)[0] == 130 and names(tmp_path / "out") == ["a-cat-0.png"]
    monkeypatch.setattr(command, "draw", original)
    assert say("a cat", "--n", 3, "--steps", 1)[0] == 0 and len(names(tmp_path / "out")) == 3


BAD_FILES = dict(
    empty=(b"", "holds no prompts"), blank=(b"\n \n\t\n", "holds no prompts"), binary=(bytes(range(256)) * 9, "not UTF-8"), nul=(b"a\0b", "line 1: control characters"),
    png=(b"\x89PNG\r\n\x1a\n" + bytes(99), "not UTF-8"), novel=(b"word " * 200_000, "line 1: 999999 characters"), emoji=("🍎🍎".encode(), "holds no words"),
    latin1=("äpfel".encode("latin-1"), "not UTF-8"), huge=(b"a cat\n" * 3_000_000, "larger than 16 MiB"))
BAD_LINES = ['{"prompt": 3}', "[1]", "a cat", "{", '{"seed": 3}', '{"prompt": "a", "seed": 1.5}', '{"prompt": "a", "steps": true}', '{"prompt": "a", "colour": "red"}', '{"prompt": "a", "guidance": NaN}',
             '{"prompt": "a", "steps": 0}', '{"prompt": "a", "lora": 3}', '{"prompt": "a", "seed": 36893488147419103232}', "[" * 5000, '{"prompt": ""}', '{"prompt": "a cat", "model": "other"}']


@pytest.mark.parametrize("content, words", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_of_prompts(say, tmp_path, content, words):
    """Empty, binary and endless files are one line and exit code 2, and nothing is written."""
    (tmp_path / "p.txt").write_bytes(content)
    refused(say("--prompts", tmp_path / "p.txt"), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda o: o[:24])
def test_a_bad_line(say, tmp_path, line):
    """A line that cannot be drawn stops the command before the lines above it are drawn."""
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "a cat"}}\n{line}\n')
    refused(say("--prompts", tmp_path / "p.jsonl", "--steps", 1))
    assert not (tmp_path / "out").exists()


def test_a_megabyte_of_prompts_is_read(tmp_path):
    """A file of 1 MB in lines is fine; a directory or nothing is not a file."""
    (tmp_path / "p.txt").write_text("a red apple on the moon\n" * 43_000)
    assert len(read_prompts(tmp_path / "p.txt")) == 43_000
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="no such file"): read_prompts(path)


@pytest.mark.parametrize("words, culprit", [
    ([], "nothing to draw"), ([" "], "prompt is empty"), (["🍎🍎🍎"], "🍎🍎🍎"), (["a", "--steps", "0"], "steps"), (["a", "--steps", "1001"], "steps"), (["a", "--steps", "many"], "steps"),
    (["a", "--guidance", "nan"], "guidance"), (["a", "--guidance", "-1"], "guidance"), (["a", "--seed", "-1"], "seed"), (["a", "--seed", 2**64], "seed"), (["a", "--sampler", "magic"], "magic"),
    (["a", "--size", "17x16"], "width 17"), (["a", "--size", "0x0"], "height"), (["a", "--size", "big"], "--size"), (["a", "--size", "16x16", "--width", "8"], "--size"), (["a", "--height", "2"], "height"),
    (["a", "--size", "65536x65536"], "memory"), (["a", "--n", "0"], "--n 0"), (["a", "--spacing", "golden"], "golden"), (["a", "--rescale", "2"], "rescale"), (["a", "--interval", "3", "1"], "interval"),
    (["a", "--mask", "m.png"], "--image"), (["a", "--strength", "0.5"], "--image"), (["a", "--image", "none.png"], "none.png"), (["a", "--lora", "none.safetensors:0.5"], "none.safetensors"),
    (["a", "--like", "none.png"], "none.png"), (["a", "--prompts", "none.txt"], "exclude"), (["--prompts", "none.txt"], "none.txt"), (["a", "--device", "toaster"], "toaster"), (["a", "--colour", "red"], "--colour")])
def test_fault_26_mistakes(say, tmp_path, words, culprit):
    """Exit code 2, one line that names the culprit, nothing written."""
    refused(say(*words), culprit)
    assert not (tmp_path / "out").exists()


def test_fault_26_strange_places(say, tmp_path):
    """A file, a link, a device or a place that cannot be written is refused and left alone."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for out in ("file", "file/below", "link", "/dev/null", "/proc/none"): refused(say("a cat", "--steps", 1, out=out), out.split("/")[0] or out)
    assert (tmp_path / "file").read_text() == "mine" and names(tmp_path / "real") == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a-cat-0.png").symlink_to(tmp_path / "file")
    for more in ([], ["--force"]): refused(say("a cat", "--steps", 1, *more), "a-cat-0.png is a link")
    (tmp_path / "out" / "the-moon-0.png").mkdir()
    for more in ([], ["--force"]): refused(say("the moon", "--steps", 1, *more), "the-moon-0.png")
    (tmp_path / "out" / ".cats-0.png.part").symlink_to(tmp_path / "file")
    assert say("cats", "--steps", 1)[0] == 0 and (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place(say, tmp_path):
    """A folder without the right to write is named."""
    (tmp_path / "out").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    refused(say("a cat", "--steps", 1), tmp_path / "out")


def test_without_a_model(say, tmp_path, monkeypatch):
    """Where the package carries no model, the command says so in one line."""
    def embedded(device=None): raise FileNotFoundError("this installation of sd_nb carries no trained model")
    monkeypatch.setattr(StableDiffusion, "embedded", embedded)
    refused(say("a cat", with_model=False), "carries no trained model")


def png(path, **texts):
    "A picture with these texts"
    info = PngInfo()
    for name, text in texts.items(): info.add_text(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize("text", ["[]", "{", '"x"', '{"prompt": 3}', '{"evil": "x"}', '{"prompt": "a", "steps": "9"}', "{" * 9, "[" * 30_000, '{"prompt": "' + "a" * 70_000 + '"}', '{"prompt": "a", "lora": [{}]}'])
def test_strange_settings_in_a_picture(say, tmp_path, text):
    """A picture's text comes from a stranger: whatever is not settings of the right kind is refused."""
    refused(say("--like", png(tmp_path / "x.png", sd_nb=text)), "x.png")


@pytest.mark.parametrize("settings", [dict(model="evil/model"), dict(image="https://x/y.png"), dict(mask="/none/m.png"), dict(lora=["/none/x"])])
def test_a_picture_cannot_send_us_anywhere(say, tmp_path, settings, monkeypatch):
    """A model on the Hub or a file that is not here is used only when the user names it."""
    monkeypatch.setattr(command, "open_model", lambda *args: pytest.fail("opened") if "model" in settings else StableDiffusion(tiny_parts()))
    refused(say("--like", png(tmp_path / "x.png", sd_nb=json.dumps(dict(prompt="a cat") | settings)), with_model="model" not in settings))


def test_other_files_are_no_pictures_to_repeat(say, tmp_path):
    """No PNG, a PNG without text, a broken one: one line."""
    (tmp_path / "x.gif").write_bytes(b"GIF89a" + bytes(99))
    (tmp_path / "cut.png").write_bytes(png(tmp_path / "whole.png", parameters="a").read_bytes()[:40])
    for name in ("x.gif", "cut.png"): refused(say("--like", tmp_path / name), name)
    refused(say("--like", png(tmp_path / "bare.png")), "carries no settings")


def test_texts_of_other_programs(tmp_path, say):
    """What a common program wrote is understood, as far as it goes."""
    text = "a cat, <b>\nsecond line\nNegative prompt: dog\nSteps: 3, Sampler: Euler a, Schedule type: Automatic, CFG scale: 6.5, Seed: 99, Size: 24x16, Model hash: abc, Model: evil/x"
    want = dict(prompt="a cat, <b>\nsecond line", negative="dog", steps=3, sampler="euler_ancestral", guidance=6.5, seed=99, width=24, height=16)
    assert read_settings(png(tmp_path / "x.png", parameters=text)) == want
    code, err = say("--like", tmp_path / "x.png")
    assert code == 0, err
    assert Image.open(tmp_path / "out" / "a-cat-b-second-line-99.png").size == (24, 16)


@given(st.text(max_size=300))
def test_any_text_is_parsed_or_empty(text):
    """Parsing never fails and returns settings of the right kinds."""
    assert check_settings(parse_parameters(text), "text") is not None


@given(st.text(max_size=300), st.integers(0, 2**63 - 1), st.none() | st.integers(0, 99_999))
def test_no_prompt_makes_a_path(prompt, seed, index):
    """File names hold lower-case letters, digits and dashes, and are short."""
    name = file_name(prompt, seed, index)
    assert set(name.removesuffix(".png")) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") and len(name) < 80 and not name.startswith("-")


def test_small_parts():
    """A LoRA's scale follows the last colon, if it is a number; kinds do not take truth values."""
    assert [split_scale(o) for o in ("a", "a:0.5", "a:-1", "C:/x", "b:c:2")] == [("a", 1.0), ("a", 0.5), ("a", -1.0), ("C:/x", 1.0), ("b:c", 2.0)]
    for name in KINDS:
        with pytest.raises(ValueError, match=name): check_settings({name: True}, "x")
