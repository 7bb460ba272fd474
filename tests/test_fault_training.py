"""Faults of training: what comes from outside and at the worst time changes nothing that matters."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from few import SMALL, few_shards, torchrun
from toy import ALONE, Toy, config, losses, same

from sd_nb.config import PRESETS
from sd_nb.data.latents import write_json
from sd_nb.train import guard
from sd_nb.train.guard import Guard
from sd_nb.train.trainer import Trainer
from sd_nb.train.watch import Lines


def state_of(trainer):
    "Copies of everything that a step may change"
    moments = [v.clone() for s in trainer.optimizer.state.values() for v in s.values()]
    return [p.detach().clone() for p in trainer.parameters] + [s.clone() for s in trainer.ema.shadow.values()] + moments


class Spoiled(Toy):
    "A toy some of whose steps are spoiled: by the loss, by one gradient alone, or by a picture"
    def __init__(self, how, when):
        super().__init__()
        self.how, self.when = how, when
        if how == "gradient": self.model[0].weight.register_hook(lambda g: g * torch.inf if self.steps - 1 in when else g)

    def batch(self, rows, draws):
        x, y = super().batch(rows, draws)
        if self.steps - 1 in self.when and self.how in ("nan", "inf"): y[3] = float(self.how)
        return x, y


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_fault_11_a_bad_step_changes_nothing(tmp_path, how):
    "Weights, moments and EMA are bitwise those of before; the keys of the batch are logged; the next step trains on"
    trainer = Trainer(Spoiled(how, {6}), config(tmp_path), ALONE)
    trainer.logs = Lines(tmp_path)
    for _ in range(6): trainer.step_once()
    before = state_of(trainer)
    with pytest.warns(UserWarning, match="step 7 was skipped"): trainer.step_once()
    assert trainer.step == 7 and all(torch.equal(a, b) for a, b in zip(before, state_of(trainer), strict=True))
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 7 and len(row["keys"]) == 8 and all(k.startswith("row ") for k in row["keys"])
    trainer.step_once()
    after = state_of(trainer)
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and all(a.isfinite().all() for a in after)


def test_fault_11_a_whole_run_with_bad_steps(tmp_path):
    "Two bad steps in a row out of twenty: the run completes, with a row for each, and all numbers that it logs are finite"
    trainer = Trainer(Spoiled("inf", {6, 7}), replace(config(tmp_path), bad_steps=3), ALONE)
    with pytest.warns(UserWarning): assert trainer.fit()
    rows = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    assert [r["step"] for r in rows if "skipped" in r] == [7, 8] and len([r for r in rows if "loss" in r]) == 18
    assert all(torch.isfinite(torch.tensor(v)) for r in rows for v in r.values() if isinstance(v, float))


def test_fault_11_too_many_in_a_row_stop_the_run(tmp_path):
    "The third bad step in a row ends the run with one line; checkpoints stay; the count survives a resume"
    bad = {6, 7, 8}
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="in 3 step.s. in a row, up to step 9: try a lower --lr") as stop:
        Trainer(Spoiled("nan", bad), replace(config(tmp_path), bad_steps=3), ALONE).fit()
    assert "\n" not in str(stop.value) and (tmp_path / "checkpoints" / "step-0000005" / "MANIFEST.json").exists()
    trainer = Trainer(Spoiled("nan", bad), replace(config(tmp_path / "b"), save_every=7, steps=7), ALONE)
    with pytest.warns(UserWarning): trainer.fit()
    again = Trainer(Toy(), replace(config(tmp_path / "b"), steps=7), ALONE)
    assert again.restore() and again.guard.bad == 1


def test_fault_11_good_steps_in_between_forgive(tmp_path):
    "Only bad steps in a row count"
    trainer = Trainer(Spoiled("nan", {4, 6, 8, 10}), replace(config(tmp_path), bad_steps=2), ALONE)
    with pytest.warns(UserWarning): assert trainer.fit()
    assert trainer.guard.bad == 0


def test_fault_11_processes_decide_together(monkeypatch):
    "A loss that is bad on another process is bad here"
    monkeypatch.setattr(guard, "agree", lambda bad: True)
    assert not Guard(3).admits(torch.tensor(1.0))


def test_a_good_run_is_not_touched_by_the_guard(tmp_path):
    "Every step of a healthy run is admitted and logged"
    assert Trainer(Toy(), config(tmp_path), ALONE).fit() and len(losses(tmp_path)) == 20


NO_COMPILER = """
import sys, warnings
sys.path[:0] = sys.argv[2:]
from dataclasses import replace
from pathlib import Path
from toy import ALONE, Toy, config, losses
from sd_nb.train.trainer import Trainer
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    Trainer(Toy(), replace(config(Path(sys.argv[1])), compile=True, steps=3), ALONE).fit()
print(*[str(w.message) for w in said if "--compile" in str(w.message)], sep="\\n")
"""


def test_fault_32_no_compiler(tmp_path):
    "Without g++ `--compile` is one warning, and the losses are those of a run without it"
    (tmp_path / "script.py").write_text(NO_COMPILER)
    where = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    env = os.environ | dict(OMP_NUM_THREADS="1", PATH=str(tmp_path), CXX="", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    done = subprocess.run([sys.executable, tmp_path / "script.py", tmp_path / "run", *where], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--compile: this machine cannot") == 1 and len(done.stdout.splitlines()) == 1
    plain = Trainer(Toy(), replace(config(tmp_path / "plain"), steps=3), ALONE)
    assert plain.fit() and losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_fault_32_no_bf16(tmp_path, monkeypatch):
    "On a CPU without the instructions bf16 is one warning and float32, bitwise; `auto` on a CPU says nothing"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.warns(UserWarning, match="--precision bf16: this cpu has none"):
        asked = Trainer(Toy(), config(tmp_path / "bf16", precision="bf16"), ALONE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auto = Trainer(Toy(), config(tmp_path / "auto", precision="auto"), ALONE)
    plain = Trainer(Toy(), config(tmp_path / "float32", precision="float32"), ALONE)
    for trainer in (asked, auto, plain): assert trainer.fit()
    assert same(asked, plain) and same(auto, plain)


def test_fault_32_bf16_where_the_hardware_has_it(tmp_path, monkeypatch):
    "With the instructions, products are bfloat16 and weights stay float32"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    trainer, seen = Trainer(Toy(), config(tmp_path, precision="bf16"), ALONE), []
    trainer.stage.model[0].register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    assert trainer.fit() and set(seen) == {torch.bfloat16} and {p.dtype for p in trainer.parameters} == {torch.float32}


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory):
    "A run that was stored after ten of its steps"
    run = tmp_path_factory.mktemp("changes") / "run"
    assert Trainer(Toy(), replace(config(run), steps=10), ALONE).fit()
    return run


@pytest.fixture
def stored(ten_steps, tmp_path): return Path(shutil.copytree(ten_steps, tmp_path / "run"))


@pytest.mark.parametrize("change, diff", [
    (dict(seed=1), "seed 0 -> 1"), (dict(batch=4), "batch 8 -> 4"), (dict(prediction="eps", zero_snr=False), "prediction v -> eps; zero_snr True -> False"),
    (dict(lr=0.5), "lr 0.01 -> 0.5"), (dict(unet=replace(PRESETS["tiny"].unet, width=32)), "unet.width 64 -> 32"), (dict(huber=0.1), "huber None -> 0.1")])
def test_fault_08_changed_settings_are_refused_with_a_diff(stored, change, diff):
    "The message is one line with old and new values, and the run directory stays as it is, byte for byte"
    before = {p: p.read_bytes() for p in stored.rglob("*") if p.is_file()}
    with pytest.raises(ValueError) as stop: Trainer(Toy(), replace(config(stored), **change), ALONE).fit()
    assert diff in str(stop.value) and "\n" not in str(stop.value)
    assert {p: p.read_bytes() for p in stored.rglob("*") if p.is_file()} == before


def test_fault_08_an_allowed_learning_rate_takes_effect(stored):
    "With --allow-changes the run goes on at the new rate, and the log says what has changed and when"
    trainer = Trainer(Toy(), replace(config(stored), lr=0.002, weight_decay=0.5, allow_changes=True), ALONE)
    with pytest.warns(UserWarning, match="goes on at step 10 with other settings: .*lr 0.01 -> 0.002"): assert trainer.fit()
    rows = [json.loads(line) for line in open(stored / "metrics.jsonl")]
    assert [r["lr"] for r in rows if r["step"] == 10 and "lr" in r] == [0.01] and {r["lr"] for r in rows if r["step"] > 10} == {0.002}
    said = [(r["step"], sorted(r["changed"].split("; "))) for r in rows if "changed" in r]
    assert said == [(10, ["lr 0.01 -> 0.002", "weight_decay 0.01 -> 0.5"])]
    assert [g["weight_decay"] for g in trainer.optimizer.param_groups] == [0.5, 0.0]
    again = Trainer(Toy(), replace(config(stored), lr=0.002, weight_decay=0.5, steps=22), ALONE)
    assert again.fit()  # the new settings are the run's settings now


def test_fault_08_no_permission_fits_another_network(stored):
    "A network of another shape is refused even when changes are allowed"
    other = replace(config(stored), unet=replace(PRESETS["tiny"].unet, width=32), allow_changes=True)
    with pytest.raises(ValueError, match="another shape .unet.width 64 -> 32"): Trainer(Toy(), other, ALONE).fit()


def test_fault_08_what_is_free_may_change(stored):
    "Pieces, speed and the places of things are no other run, and a setting that the stored run does not know is at its default"
    for path in (stored / "checkpoints").iterdir():
        state = json.loads((path / "state.json").read_text())
        for name in ("huber", "allow_changes", "timesteps"): del state["settings"][name]
        manifest = json.loads((path / "MANIFEST.json").read_text())
        manifest["files"]["state.json"] = write_json(path / "state.json", state)
        write_json(path / "MANIFEST.json", manifest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Trainer(Toy(), replace(config(stored), accumulate=2, channels_last=True, checkpointing=True, log_every=2), ALONE).fit()


def receipts(run, step):
    "What a checkpoint's manifest says about the tensors, and everything in its state but the time"
    folder = run / "checkpoints" / f"step-{step:07}"
    files = json.loads((folder / "MANIFEST.json").read_text())["files"]
    state = json.loads((folder / "state.json").read_text())
    free = {name: state["settings"].pop(name) for name in ("run", "save_every")}
    assert free and state.pop("seconds") > 0
    return {name: receipt for name, receipt in files.items() if name.endswith(".safetensors")}, state


@pytest.mark.parametrize("kills, steps", [(3, 100), pytest.param(20, 500, marks=pytest.mark.slow)])
def test_fault_02_kill_9_at_random_moments(tmp_path, kills, steps):
    "Killed and started again, a run ends with the bytes of one that was left alone: weights, moments, EMA, position, losses, rates"
    whole = Trainer(Toy(), replace(config(tmp_path / "whole"), steps=steps), ALONE)
    assert whole.fit()
    here = Path(__file__).parent
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=f"{here}{os.pathsep}{here.parent}")
    words = [sys.executable, here / "kill.py", tmp_path / "run", str(kills), str(steps), "0.01"]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    hits, ended = map(int, done.stdout.split())
    assert ended == 0 and hits >= kills / 2  # a late one may find the run complete
    assert receipts(tmp_path / "run", steps) == receipts(tmp_path / "whole", steps)
    logs = [[(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in map(json.loads, open(run / "metrics.jsonl"))]
            for run in (tmp_path / "run", tmp_path / "whole")]
    assert logs[0] == logs[1] and len(logs[0]) == steps


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_fault_03_the_second_signal_ends_at_once(tmp_path, number, monkeypatch):
    "One signal finishes the step and saves; a second one while the step is running ends it there"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    def ask(step):
        if step == 7: [os.kill(os.getpid(), number) for _ in range(2)]
    trainer = Trainer(Toy(ask), config(tmp_path), ALONE)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt): trainer.fit()
    assert trainer.step == 7 and signal.getsignal(number) is before
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-0000005"]


def test_fault_03_torchruns_echo_is_no_second_signal(tmp_path, monkeypatch):
    "Under torchrun a signal comes twice within moments, and means one request; a second later it means the second"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with guard.stop_requested() as stop:
        for number in (signal.SIGINT, signal.SIGTERM): os.kill(os.getpid(), number)
        assert stop()
        now = time.monotonic()
        monkeypatch.setattr(guard.time, "monotonic", lambda: now + guard.ECHO)
        with pytest.raises(KeyboardInterrupt): os.kill(os.getpid(), signal.SIGTERM)


def test_fault_03_a_stopped_run_has_an_exit_code_of_its_own(tmp_path):
    "SIGTERM to the command: saved, exit code 75, one line that says how to go on"
    few = few_shards(tmp_path / "few", 40)
    words = ["tiny", *SMALL, "--run", tmp_path / "run", "--data", few, "--stage", "autoencoder", "--steps", 100_000, "--batch", 8, "--save-every", 100_000]
    process = subprocess.Popen([sys.executable, "-m", "sd_nb.train", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parent.parent)))
    log, deadline = tmp_path / "run" / "autoencoder" / "metrics.jsonl", time.monotonic() + 240
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline: time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75 == guard.STOPPED and "stopped; the same command resumes" in said
    assert len(list((log.parent / "checkpoints").glob("step-*/MANIFEST.json"))) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fault_15_two_one_two_processes(tmp_path):
    "Two processes, one in two pieces, two in two pieces, across resumes: the pictures and the losses of one process, to 1e-6"
    few = few_shards(tmp_path / "few", 40)
    def words(run, steps, pieces):
        return ["tiny", *SMALL, "--run", tmp_path / run, "--data", few, "--stage", "autoencoder", "--batch", 8, "--lr", "1e-4", "--steps", steps, "--accumulate", pieces]
    torchrun(1, *words("whole", 9, 1))
    for processes, steps, pieces in ((2, 3, 1), (1, 6, 2), (2, 9, 2)): torchrun(processes, *words("parts", steps, pieces))
    whole, parts = ([json.loads(row) for row in open(tmp_path / run / "autoencoder" / "metrics.jsonl")] for run in ("whole", "parts"))
    assert [r["step"] for r in parts] == list(range(1, 10)) and len({r["loss"] for r in whole}) == 9
    assert [r["loss"] for r in parts] == pytest.approx([r["loss"] for r in whole], abs=1e-6, rel=1e-6)


DYING = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from toy import Toy, config
from sd_nb.train.parallel import world
from sd_nb.train.trainer import Trainer
mark = Path(sys.argv[2])
with world(minutes=2) as w:
    def die(step):
        if w.rank == 1 and step == 7 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    Trainer(Toy(die), config(Path(sys.argv[1])), w).fit()
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fault_12_a_killed_rank_is_restarted(tmp_path):
    "torchrun with one restart: rank 1 dies at step 7, all start again from step 5, and end with the bytes of an undisturbed run"
    (tmp_path / "script.py").write_text(DYING)
    where = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1", tmp_path / "script.py"]
    (tmp_path / "calm").touch()
    for run, mark in (("whole", "calm"), ("run", "mark")):
        done = subprocess.run([*launch, tmp_path / run, tmp_path / mark, *where], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "mark").exists() and receipts(tmp_path / "run", 20) == receipts(tmp_path / "whole", 20)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
