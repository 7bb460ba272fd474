"""The parts of a step: functions of (seed, step), the same in one piece or in many."""
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from toy import ALONE, Toy, config, losses

from sd_nb.train.step import Draws, learning_rate, make_optimizer
from sd_nb.train.trainer import Trainer


def test_draws_do_not_depend_on_processes():
    "Parts drawn by four processes are the batch drawn by one, and differ from step to step"
    one = Draws(3, 5, 8)
    expected = one.normal(2), one.integers(1000), one.uniform()
    parts = [Draws(3, 5, 8, rank, 4) for rank in range(4)]
    got = [torch.cat(p) for p in zip(*[(d.normal(2), d.integers(1000), d.uniform()) for d in parts])]
    assert all(torch.equal(a, b) for a, b in zip(expected, got))
    assert not torch.equal(Draws(3, 6, 8).normal(2), expected[0]) and not torch.equal(Draws(4, 5, 8).normal(2), expected[0])


def test_learning_rate():
    "The rate rises linearly over the warm-up and stays"
    assert [learning_rate(k, 1.0, 4) for k in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [round(learning_rate(k, 1.0, 4, 10, 0.5), 6) for k in (0, 4, 5, 7, 9, 10, 99)] == [0.25, 1.0, 1.0, 0.6, 0.2, 0.01, 0.01]


def test_decay_on_matrices_only():
    "Biases and norms are in the group without decay"
    groups = make_optimizer(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), 0.1).param_groups
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in groups] == [(0.1, [2]), (0.0, [1, 1, 1])]


@pytest.mark.parametrize("fall", ["linear", "cosine"])
@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_the_rate_never_rises_again(decay, fall):
    "After the warm-up no step has a higher rate than the one before, also far beyond the end, where a cosine would climb"
    rates = [learning_rate(k, 1.0, 10, 100, decay, fall) for k in range(400)]
    assert all(a >= b for a, b in zip(rates[9:], rates[10:])) and rates[:10] == sorted(rates[:10])
    assert rates[-1] == (0.01 if decay else 1.0)


def test_the_cosine_is_the_one_people_use():
    "Over the whole run it equals transformers' schedule, down to our floor of a hundredth"
    from transformers import get_cosine_schedule_with_warmup
    theirs = get_cosine_schedule_with_warmup(torch.optim.SGD(nn.Linear(1, 1).parameters(), 1.0), 10, 100).lr_lambdas[0]
    for k in range(10, 150): assert learning_rate(k, 1.0, 10, 100, 1.0, "cosine") == pytest.approx(max(theirs(min(k, 100)), 0.01), abs=1e-12)


@pytest.mark.parametrize("pieces", [2, 4])
def test_accumulation_gives_the_same_curve(tmp_path, pieces):
    "The same global batch in pieces: loss and gradient norm of twenty steps to 1e-6"
    whole, cut = (Trainer(Toy(), replace(config(tmp_path / str(n)), accumulate=n), ALONE) for n in (1, pieces))
    assert whole.fit() and cut.fit()
    assert losses(cut.directory) == pytest.approx(losses(whole.directory), abs=1e-6)
    norms = [[json.loads(row)["grad_norm"] for row in open(t.directory / "metrics.jsonl")] for t in (whole, cut)]
    assert norms[1] == pytest.approx(norms[0], abs=1e-5)


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    "Pieces must be equal, and the message names both flags"
    with pytest.raises(ValueError, match="--batch 8 must be a multiple of the 1 processes times --accumulate 3"):
        Trainer(Toy(), replace(config(tmp_path / "x"), accumulate=3), ALONE)


SILENT = """
import sys, torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from sd_nb.train.parallel import world, wrap
from sd_nb.train.step import add_up

class Net(nn.Module):
    def __init__(self): super().__init__(); torch.manual_seed(0); self.model = nn.Linear(3, 1)
    def forward(self, x, y): return (self.model(x) - y).square().mean(), {}

calls = []
def counted(state, bucket): calls.append(1); return allreduce_hook(state, bucket)

torch.manual_seed(1)
x, y = torch.randn(8, 3), torch.randn(8, 1)
with world(minutes=1) as w:
    net = wrap(Net(), w)
    if w.size > 1: net.register_comm_hook(None, counted)
    share = [t.chunk(w.size)[w.rank] for t in (x, y)]
    add_up(net, share, int(sys.argv[2]))
    torch.save(dict(grad=[p.grad for p in net.parameters()], calls=len(calls)), f"{sys.argv[1]}/{w.size}-{w.rank}.pt")
"""


def test_processes_talk_once_a_batch(tmp_path):
    "Two ranks with two pieces each: one all-reduce instead of two, and the gradient of one process to 1e-6"
    (tmp_path / "script.py").write_text(SILENT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for command in ([sys.executable], launch):
        subprocess.run([*command, str(tmp_path / "script.py"), str(tmp_path), "2"], check=True, capture_output=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    one, *two = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")]
    for rank in two:
        assert rank["calls"] == 1
        for a, b in zip(rank["grad"], one["grad"], strict=True): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
