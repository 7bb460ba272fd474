"""The loop: steps are functions of (seed, step), resuming is exact, stopping is polite."""
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from sd_nb.config import PRESETS, Recipe
from sd_nb.train.parallel import World
from sd_nb.train.trainer import Draws, Trainer, Window, learning_rate, make_optimizer, refuse_changes, rewind_metrics

ALONE = World(0, 1, 0, torch.device("cpu"))


class Net(nn.Module):
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, x, y):
        error = (self.model(x) - y).square().mean(1)
        return error.mean(), dict(mse=error)


class Toy:
    "A small network on random numbers; `at_step` is called before each batch"
    name, count = "unet", 40

    def __init__(self, at_step=lambda step: None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2))
        self.net, self.at_step, self.steps = Net(self.model), at_step, 0
        self.x = torch.randn(self.count, 4)

    def batch(self, rows, draws):
        self.at_step(self.steps); self.steps += 1
        return self.x[rows], self.x[rows][:, :2].sin() + 0.1 * draws.normal(2)

    def preview(self, path): path.touch()
    def export(self, directory): directory.mkdir(parents=True, exist_ok=True)


def config(run, **changes):
    recipes = dict(unet=Recipe(steps=20, batch=8, lr=0.01, share=1.0))
    return replace(PRESETS["tiny"], run=run, recipes=recipes, warmup=4, log_every=1, save_every=5, sample_every=1000, **changes)


def losses(run): return [json.loads(line)["loss"] for line in open(run / "metrics.jsonl")]


def same(a, b):
    weights = all(torch.equal(x, y) for x, y in zip(a.stage.model.parameters(), b.stage.model.parameters()))
    average = all(torch.equal(a.ema.shadow[k], b.ema.shadow[k]) for k in a.ema.shadow)
    moments = all(torch.equal(a.optimizer.state[p]["exp_avg_sq"], b.optimizer.state[q]["exp_avg_sq"]) for p, q in zip(a.parameters, b.parameters))
    return weights and average and moments


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


def test_a_damaged_checkpoint_costs_only_itself(whole, tmp_path):
    "With its newest checkpoint damaged, a run goes back one checkpoint and still ends in the same place"
    first = Trainer(Toy(), replace(config(tmp_path / "run"), steps=10), ALONE)
    first.fit()
    newest = tmp_path / "run" / "checkpoints" / "step-0000010" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    again = Trainer(Toy(), config(tmp_path / "run"), ALONE)
    with pytest.warns(UserWarning): assert again.fit()
    assert same(again, whole)


def test_not_finite_stops_before_the_weights(tmp_path):
    "A gradient that is not finite raises one line and leaves the weights as they were"
    toy = Toy()
    toy.x[:] = float("nan")
    before = [p.clone() for p in toy.model.parameters()]
    with pytest.raises(ValueError, match="not finite at step 0"): Trainer(toy, config(tmp_path), ALONE).fit()
    assert all(torch.equal(p, q) for p, q in zip(before, toy.model.parameters()))


def test_changed_settings_are_refused(whole):
    "Another seed on an old run is refused by name; more steps are not"
    changed = replace(config(whole.directory), seed=1)
    stored = (whole.directory / "config.json").read_bytes()
    with pytest.raises(ValueError, match="seed 0 -> 1"): Trainer(Toy(), changed, ALONE).fit()
    assert (whole.directory / "config.json").read_bytes() == stored
    longer = Trainer(Toy(), replace(config(whole.directory), steps=25), ALONE)
    assert longer.fit() and longer.step == 25
    refuse_changes(dict(steps=1), dict(steps=2), whole.directory)


def test_changed_recipe_is_refused(whole):
    "Another batch size on an old run is refused by name too"
    with pytest.raises(ValueError, match="batch 8 -> 4"): Trainer(Toy(), replace(config(whole.directory), batch=4), ALONE).fit()


def test_minutes_end_a_run(tmp_path):
    "A budget of time ends the run, is remembered over a resume, and leaves a complete run"
    c = replace(config(tmp_path), steps=10**6)
    trainer = Trainer(Toy(), c, ALONE, minutes=0.005)
    assert trainer.fit() and 0.3 <= trainer.seconds < 5
    again = Trainer(Toy(), c, ALONE, minutes=0.005)
    assert again.fit() and again.step == trainer.step


def test_draws_do_not_depend_on_processes():
    "Parts drawn by four processes are the batch drawn by one, and differ from step to step"
    one = Draws(3, 5, 8)
    expected = one.normal(2), one.integers(1000), one.uniform()
    parts = [Draws(3, 5, 8, rank, 4) for rank in range(4)]
    got = [torch.cat(p) for p in zip(*[(d.normal(2), d.integers(1000), d.uniform()) for d in parts])]
    assert all(torch.equal(a, b) for a, b in zip(expected, got))
    assert not torch.equal(Draws(3, 6, 8).normal(2), expected[0]) and not torch.equal(Draws(4, 5, 8).normal(2), expected[0])


def test_batch_must_divide(tmp_path):
    "A batch that the processes can't share is refused before anything is written"
    with pytest.raises(ValueError, match="--batch 8"): Trainer(Toy(), config(tmp_path / "x"), ALONE._replace(size=3))
    assert not (tmp_path / "x").exists()


def test_learning_rate():
    "The rate rises linearly over the warm-up and stays"
    assert [learning_rate(k, 1.0, 4) for k in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [round(learning_rate(k, 1.0, 4, 10, 0.5), 6) for k in (0, 4, 5, 7, 9, 10, 99)] == [0.25, 1.0, 1.0, 0.6, 0.2, 0.01, 0.01]


def test_decay_on_matrices_only():
    "Biases and norms are in the group without decay"
    groups = make_optimizer(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), 0.1).param_groups
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in groups] == [(0.1, [2]), (0.0, [1, 1, 1])]


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
