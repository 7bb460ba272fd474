"""The training command: three stages from one line, any number of processes, mistakes in one line."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from few import SMALL, few_shards, torchrun
from safetensors.torch import load_file

from sd_nb.config import config_from_args
from sd_nb.pipeline import StableDiffusion
from sd_nb.train.__main__ import main
from sd_nb.train.parallel import World
from sd_nb.train.run import is_exported, minutes_of, stages_to_train, train

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory): return few_shards(tmp_path_factory.mktemp("data") / "few")


def rows(run): return [json.loads(line) for line in open(run / "metrics.jsonl")]


def words(run, data, stage, steps, *more):
    return ["tiny", *SMALL, "--run", run, "--data", data, "--stage", stage, "--steps", steps, "--batch", 8, *more]


def prepare(run, data):
    "Train the first two stages for two steps each, so that the UNet can be trained"
    for stage in ("autoencoder", "clip"): assert main([str(w) for w in words(run, data, stage, 2)]) == 0


@pytest.mark.parametrize("stage", ["autoencoder", "clip", "unet"])
def test_two_processes_give_the_curve_of_one(tmp_path, data, stage):
    "Loss and gradient norm of each step are those of one process to 1e-4, and the final weights agree"
    runs = [tmp_path / "one", tmp_path / "two"]
    for processes, run in zip((1, 2), runs):
        if stage == "unet": prepare(run, data)
        torchrun(processes, *words(run, data, stage, 6))
    where = [run if stage == "unet" else run / stage for run in runs]
    one, two = map(rows, where)
    assert [r["step"] for r in one] == [r["step"] for r in two] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(one, two):
        for name in ("loss", "grad_norm"): assert a[name] == pytest.approx(b[name], abs=1e-4, rel=1e-4)
    assert len({r["loss"] for r in one}) == 6
    weights = [load_file(w / "checkpoints" / "step-0000006" / "ema.safetensors") for w in where]
    for name, value in weights[0].items(): torch.testing.assert_close(value, weights[1][name], atol=1e-3, rtol=1e-3)


def test_resume_on_another_number_of_processes(tmp_path, data):
    "Three steps on two processes and three on one give the curve of six on one"
    torchrun(1, *words(tmp_path / "whole", data, "autoencoder", 6))
    torchrun(2, *words(tmp_path / "parts", data, "autoencoder", 3))
    torchrun(1, *words(tmp_path / "parts", data, "autoencoder", 6))
    whole, parts = (rows(tmp_path / name / "autoencoder") for name in ("whole", "parts"))
    assert [r["loss"] for r in whole] == pytest.approx([r["loss"] for r in parts], abs=1e-4)


def assert_diffusers_agrees(model):
    "A trained model directory opens in diffusers and draws from the same noise what we draw, to 2/255"
    from diffusers import StableDiffusionPipeline
    ours, theirs = StableDiffusion.from_pretrained(model), StableDiffusionPipeline.from_pretrained(model)
    theirs.set_progress_bar_config(disable=True)
    noise = ours.noise(2, seed=7)
    a = ours(["red apple", "cat face"], "blue", steps=5, guidance=4.0, sampler="ddim", latents=noise, output="np", progress=False)
    b = theirs(["red apple", "cat face"], negative_prompt=["blue"] * 2, num_inference_steps=5, guidance_scale=4.0,
               latents=noise, output_type="np").images
    assert a.shape == b.shape and np.abs(a - b).max() <= 2 / 255 and a.std() > 0.01


def test_one_line_trains_all_three(tmp_path, data):
    "Asked for the UNet, the command trains what it needs first, writes every file of a run directory, and the model draws"
    config = config_from_args(["tiny", *SMALL, "--run", str(tmp_path / "run"), "--data", str(data), "--minutes", "0.15"], "train")
    assert train(config, ALONE)
    names = {p.name for p in config.run.iterdir()}
    assert {"config.json", "metrics.jsonl", "samples", "checkpoints", "model", "loss.png", "autoencoder", "clip"} <= names
    assert all(is_exported(stage, config.run) for stage in stages_to_train(config))
    pictures = StableDiffusion.from_pretrained(config.run / "model")(["red apple", "blue heart"], steps=3, progress=False)
    assert [p.size for p in pictures] == [(16, 16)] * 2
    assert_diffusers_agrees(config.run / "model")
    last = rows(config.run)[-1]
    assert {"loss", "mse", "mse_t0", "lr", "grad_norm", "images", "images_per_second"} <= set(last)


def test_the_loss_falls(tmp_path, data):
    "Forty steps of the autoencoder and of CLIP lower their losses on 90 pictures"
    for stage in ("autoencoder", "clip"):
        assert main([str(w) for w in words(tmp_path / "run", data, stage, 40, "--lr", "0.003")]) == 0
        losses = [r["loss"] for r in rows(tmp_path / "run" / stage)]
        assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


def test_ctrl_c_leaves_a_checkpoint_that_resumes(tmp_path, data):
    "SIGINT to torchrun and its worker, as a terminal sends it, saves; the same command goes on from there"
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "sd_nb.train", "--"]
    command += [str(w) for w in words(run, data, "autoencoder", 100_000, "--save-every", 100_000)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    log, deadline = run / "autoencoder" / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline: time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    step = max(int(p.name[5:]) for p in (run / "autoencoder" / "checkpoints").glob("step-*"))
    assert step >= 1 and not is_exported("autoencoder", run)
    torchrun(1, *words(run, data, "autoencoder", step + 2))
    assert [r["step"] for r in rows(run / "autoencoder")] == list(range(1, step + 3))
    assert is_exported("autoencoder", run)


def test_minutes_are_shared():
    "The shares of the stages add up to the budget, and a stage alone has all of it"
    config = config_from_args(["tiny", "--minutes", "5"], "train")
    assert sum(minutes_of(config, s) for s in stages_to_train(config)) == pytest.approx(5)
    alone = config_from_args(["tiny", "--minutes", "5", "--stage", "clip"], "train")
    assert stages_to_train(alone) == ["clip"] and minutes_of(alone, "clip") == 5


def fails(capsys, *words):
    "Run the command and return its exit code and what it printed to stderr"
    with pytest.raises(SystemExit) as stop: main([str(w) for w in words])
    return stop.value.code, capsys.readouterr().err.strip().splitlines()[-1]


def test_mistakes_name_the_culprit_and_leave_nothing(tmp_path, data, capsys):
    "Missing data, a broken shard or an unwritable run directory: exit code 2, one line, nothing half-written"
    run = tmp_path / "run"
    code, line = fails(capsys, *words(run, tmp_path / "none", "autoencoder", 2))
    assert code == 2 and str(tmp_path / "none") in line and not list(run.rglob("*.npy"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "00000.tar").write_bytes(next(data.glob("*.tar")).read_bytes()[:3000])
    code, line = fails(capsys, *words(run, broken, "autoencoder", 2))
    assert code == 2 and "00000.tar" in line and not list(run.rglob("*.npy"))
    (tmp_path / "file").touch()
    code, line = fails(capsys, *words(tmp_path / "file" / "run", data, "autoencoder", 2))
    assert code == 2 and str(tmp_path / "file") in line


def test_dry_run_writes_nothing(tmp_path, capsys):
    "--dry-run prints the resolved config and the parameter counts, and makes no file"
    assert main(["tiny", "--dry-run", "--run", str(tmp_path / "run")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["parameters"]["unet"] > 1e6 and said["config"]["size"] == 64 and not (tmp_path / "run").exists()


def test_init_from_takes_the_weights(tmp_path, data):
    "A run that starts from a model directory begins with its networks"
    prepare(tmp_path / "first", data)
    assert main([str(w) for w in words(tmp_path / "first", data, "unet", 2)]) == 0
    model = tmp_path / "first" / "model"
    assert main([str(w) for w in words(tmp_path / "second", data, "unet", 1, "--init-from", model, "--lr", "1e-9")]) == 0
    before, after = (load_file(m / "unet" / "diffusion_pytorch_model.safetensors") for m in (model, tmp_path / "second" / "model"))
    for name, value in before.items(): torch.testing.assert_close(value, after[name], atol=1e-6, rtol=0)
