"""The demo and the command line around it."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from few import SMALL, few_shards
from PIL import Image
from tiny import tiny_parts

from sd_nb import cli, demo
from sd_nb.pipeline import StableDiffusion


def say(capsys, *words):
    "Run `sd-nb` and return exit code, stdout and stderr"
    try: code = cli.main([str(w) for w in words])
    except SystemExit as stop: code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def short_training(tmp_path, monkeypatch):
    "Let the demo train on 100 emoji with networks of a few thousand parameters"
    data, original = few_shards(tmp_path / "few"), demo.training_command
    monkeypatch.setattr(demo, "training_command", lambda *args: [*original(*args), "--data", str(data), *SMALL])


def test_demo_trains_draws_and_resumes(tmp_path, short_training, capsys):
    "The demo leaves every file it promises; the same command draws another prompt without training again"
    run = tmp_path / "demo"
    code, out, _ = say(capsys, "demo", "--minutes", 0.1, "--run", run, "--prompt", "blue heart, flat style")
    assert code == 0
    for name in ("samples", "checkpoints"): assert any((run / name).iterdir())
    for name in ("loss.png", "metrics.jsonl", "prompt.png", "model/model_index.json", "config.json"): assert (run / name).is_file() and str(run) in out
    about = Image.open(run / "prompt.png").text["parameters"]
    assert about == "blue heart, flat style\nSteps: 20, Sampler: unipc, CFG scale: 4.0, Seed: 0, Size: 16x16"
    log = (run / "metrics.jsonl").read_text()
    assert say(capsys, "demo", "--minutes", 0.1, "--run", run, "--prompt", "red apple")[0] == 0
    assert (run / "metrics.jsonl").read_text() == log
    assert Image.open(run / "prompt.png").text["parameters"].startswith("red apple\n")


@pytest.mark.parametrize("words, culprit", [
    (["--prompt", ""], "prompt is empty"), (["--prompt", "🍎🍎"], "🍎🍎"), (["--minutes", "-1"], "--minutes"), (["--minutes", "soon"], "--minutes"), (["--colour", "red"], "--colour")])
def test_demo_mistakes(tmp_path, words, culprit, capsys):
    "A mistake is told before anything is trained or written"
    code, _, err = say(capsys, "demo", "--run", tmp_path / "run", *words)
    assert code == 2 and culprit in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_demo_names_a_place_it_cannot_write(tmp_path, capsys):
    "A run directory below a file is refused at once"
    (tmp_path / "file").touch()
    code, _, err = say(capsys, "demo", "--run", tmp_path / "file" / "run")
    assert code == 2 and str(tmp_path / "file") in err and err.count("\n") == 1


def test_the_exit_code_of_a_stopped_training_is_passed_on(tmp_path, monkeypatch, capsys):
    "When training stops, the demo says how to resume and draws nothing"
    monkeypatch.setattr(demo, "training_command", lambda *args: [sys.executable, "-c", "raise SystemExit(130)"])
    code, _, err = say(capsys, "demo", "--run", tmp_path / "run")
    assert code == 130 and "resumes" in err and not (tmp_path / "run" / "prompt.png").exists()


@pytest.fixture
def model(tmp_path):
    StableDiffusion(tiny_parts()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_generate_writes_pictures_with_their_settings(tmp_path, model, capsys):
    "n pictures and a grid, each with prompt, negative prompt and seed in its text"
    code, out, _ = say(capsys, "generate", "a red apple", "--model", model, "--out", tmp_path / "out", "--n", 3, "--grid", "--steps", 2, "--negative", "blue", "--seed", 5)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert code == 0 and names == ["a-red-apple-5.png", "a-red-apple-6.png", "a-red-apple-7.png", "grid-a-red-apple-5-3.png"]
    text = Image.open(tmp_path / "out" / "a-red-apple-6.png").text["parameters"]
    assert text.splitlines()[:2] == ["a red apple", "Negative prompt: blue"] and "Seed: 6, " in text and "Steps: 2, " in text and "CFG scale: 4.0, " in text


def test_generate_draws_what_the_pipeline_draws(tmp_path, model, capsys):
    "The command adds nothing to the picture, and does not overwrite it unasked"
    words = ["generate", "a red apple", "--model", model, "--out", tmp_path / "out", "--steps", 2, "--sampler", "ddim"]
    assert say(capsys, *words)[0] == 0
    ours = StableDiffusion.from_pretrained(model)("a red apple", steps=2, guidance=4.0, sampler="ddim", progress=False)[0]
    path = tmp_path / "out" / "a-red-apple-0.png"
    assert Image.open(path).tobytes() == ours.tobytes()
    code, _, err = say(capsys, *words, "--negative", "blue")
    assert code == 2 and str(path) in err
    assert say(capsys, *words, "--negative", "blue", "--force")[0] == 0


@pytest.mark.parametrize("words, culprit", [
    (["generate", " "], "prompt is empty"), (["generate", "🍎🍎🍎"], "🍎🍎🍎"), (["generate"], "nothing to draw"),
    (["generate", "apple", "--height", "17"], "height 17"), (["generate", "apple", "--steps", "0"], "steps"), (["generate", "apple", "--guidance", "nan"], "guidance"),
    (["generate", "apple", "--sampler", "magic"], "magic"), (["generate", "apple", "--seed", "-1"], "seed"), (["generate", "apple", "--n", "0"], "--n 0"),
    (["generate", "apple", "--colour", "red"], "--colour"), (["paint"], "paint"), (["train", "huge"], "huge")])
def test_mistakes(tmp_path, model, words, culprit, capsys):
    "Every mistake is one line that names the culprit, exit code 2, and nothing is written"
    more = ["--model", model, "--out", tmp_path / "out"] if words[0] == "generate" else []
    code, out, err = say(capsys, *words, *more)
    assert code == 2 and culprit.lower() in err.lower() and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_missing_model_is_named(tmp_path, capsys):
    "A model directory that is not there, or is not one, is named"
    for place in (tmp_path / "none", tmp_path):
        code, _, err = say(capsys, "generate", "apple", "--model", place, "--out", tmp_path / "out")
        assert code == 2 and str(place) in err and err.count("\n") == 1


def test_an_unwritable_output_is_named(tmp_path, model, capsys):
    "An output folder below a file is refused"
    (tmp_path / "file").touch()
    code, _, err = say(capsys, "generate", "apple", "--model", model, "--out", tmp_path / "file" / "out", "--steps", 1)
    assert code == 2 and str(tmp_path / "file") in err


def test_help_teaches(capsys):
    "Help names every command, and each command's help its options"
    code, out, _ = say(capsys, "--help")
    assert code == 0 and all(name in out for name in cli.COMMANDS)
    for command, option in [("demo", "--minutes"), ("generate", "--negative"), ("train", "--stage")]:
        code, out, _ = say(capsys, command, "--help")
        assert code == 0 and option in out


def test_the_command_is_installed():
    "`sd-nb` is a program beside this Python"
    said = subprocess.run([Path(sys.executable).with_name("sd-nb"), "--help"], capture_output=True, text=True, check=True)
    assert "generate" in said.stdout


def test_ctrl_c_waits_for_the_trainer(tmp_path):
    "On Ctrl-C the demo waits until training has ended by itself, and answers 130"
    child = "import signal, sys, time; signal.signal(signal.SIGINT, lambda *a: (time.sleep(0.5), print('saved'), sys.exit(1))); print('ready', flush=True); time.sleep(60)"
    parent = f"import sys; from sd_nb.demo import run_and_wait; sys.exit(run_and_wait([sys.executable, '-c', {child!r}]))"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "saved" in out and "saving a checkpoint" in err
