"""The loop: stopping is polite, resuming is exact, and what is logged is true."""
import os
import signal
from dataclasses import replace

import pytest
import torch
from toy import ALONE, Toy, config, losses, same

from sd_nb.config import Recipe
from sd_nb.train.posthoc import PowerEMA, reconstruct, stored
from sd_nb.train.record import Window, rewind_metrics
from sd_nb.train.trainer import Trainer


@pytest.fixture
def whole(tmp_path):
    trainer = Trainer(Toy(), config(tmp_path / "whole"), ALONE)
    assert trainer.fit()
    return trainer


def test_a_crash_changes_nothing(whole, tmp_path):
    "A run that dies at step 13 and is started again ends bit for bit where an unbroken one does"
    def die(step):
        if step == 13: raise RuntimeError("power failure")
    with pytest.raises(RuntimeError): Trainer(Toy(die), config(tmp_path / "run"), ALONE).fit()
    again = Trainer(Toy(), config(tmp_path / "run"), ALONE)
    assert again.fit() and same(again, whole)
    assert losses(tmp_path / "run") == losses(whole.directory) and len(losses(tmp_path / "run")) == 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resumes(whole, tmp_path, number):
    "Ctrl-C and SIGTERM finish the step, leave a checkpoint, and the same call goes on"
    def ask(step):
        if step == 7: os.kill(os.getpid(), number)
    stopped = Trainer(Toy(ask), config(tmp_path / "run"), ALONE)
    assert not stopped.fit() and stopped.step == 8
    assert (tmp_path / "run" / "checkpoints" / "step-0000008" / "MANIFEST.json").exists()
    again = Trainer(Toy(), config(tmp_path / "run"), ALONE)
    assert again.fit() and same(again, whole)


def test_a_crash_before_the_first_checkpoint_leaves_no_rows(whole, tmp_path):
    "A run that dies at step 3 starts from nothing, and its log holds every step once"
    def die(step):
        if step == 3: raise RuntimeError("power failure")
    with pytest.raises(RuntimeError): Trainer(Toy(die), config(tmp_path / "run"), ALONE).fit()
    assert Trainer(Toy(), config(tmp_path / "run"), ALONE).fit()
    assert losses(tmp_path / "run") == losses(whole.directory)


def test_a_damaged_checkpoint_costs_only_itself(whole, tmp_path):
    "With its newest checkpoint damaged, a run goes back one checkpoint and still ends in the same place"
    first = Trainer(Toy(), replace(config(tmp_path / "run"), steps=10), ALONE)
    first.fit()
    newest = tmp_path / "run" / "checkpoints" / "step-0000010" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    again = Trainer(Toy(), config(tmp_path / "run"), ALONE)
    with pytest.warns(UserWarning): assert again.fit()
    assert same(again, whole)


def test_changed_settings_are_refused(whole):
    "Another seed on an old run is refused by name; more steps are not"
    changed = replace(config(whole.directory), seed=1)
    stored = (whole.directory / "config.json").read_bytes()
    with pytest.raises(ValueError, match="seed 0 -> 1"): Trainer(Toy(), changed, ALONE).fit()
    assert (whole.directory / "config.json").read_bytes() == stored
    longer = Trainer(Toy(), replace(config(whole.directory), steps=25), ALONE)
    assert longer.fit() and longer.step == 25


def test_minutes_end_a_run(tmp_path):
    "A budget of time ends the run, is remembered over a resume, and leaves a complete run"
    c = replace(config(tmp_path), steps=10**6)
    trainer = Trainer(Toy(), c, ALONE, minutes=0.005)
    assert trainer.fit() and 0.3 <= trainer.seconds < 5
    again = Trainer(Toy(), c, ALONE, minutes=0.005)
    assert again.fit() and again.step == trainer.step


def test_batch_must_divide(tmp_path):
    "A batch that the processes can't share is refused before anything is written"
    with pytest.raises(ValueError, match="--batch 8"): Trainer(Toy(), config(tmp_path / "x"), ALONE._replace(size=3))
    assert not (tmp_path / "x").exists()


def test_window_leaves_out_nan():
    "A metric that does not apply is not averaged in, and one that never applied is not reported"
    window, nan = Window(), float("nan")
    window.add(dict(a=torch.tensor([1.0, nan, 3.0]), b=torch.tensor([nan])))
    assert window.flush() == dict(a=2.0)


def test_rewind_drops_the_future_and_a_torn_line(tmp_path):
    "After a crash the log holds nothing from after the checkpoint"
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"st')
    rewind_metrics(log, 1)
    assert log.read_text() == '{"step": 1}\n'


def test_averages_of_any_length_after_the_run(tmp_path):
    "Snapshots survive a crash, and give the average that was not tracked; without --posthoc there are none"
    c, recipes = config(tmp_path / "run", posthoc=10), dict(unet=Recipe(steps=120, batch=8, lr=0.01, share=1.0))
    c = replace(c, recipes=recipes)

    def die(step):
        if step == 63: raise RuntimeError("power failure")
    with pytest.raises(RuntimeError): Trainer(Toy(die), c, ALONE).fit()
    trainer, tracked = Trainer(Toy(), c, ALONE), Trainer(Toy(), replace(c, run=tmp_path / "other", posthoc=0), ALONE)
    tracked.averages = dict(power=PowerEMA(tracked.stage.model, 0.07))
    assert trainer.fit() and tracked.fit() and not (tmp_path / "other" / "averages").exists()
    assert len(stored(tmp_path / "run" / "averages")) == 24
    found, want = reconstruct(tmp_path / "run" / "averages", 0.07), tracked.averages["power"].state_dict()
    for name, live in trainer.stage.model.state_dict().items():
        assert (found[name] - want[name]).norm() < 0.02 * (live - want[name]).norm()
