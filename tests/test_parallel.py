import os
import subprocess
import sys
import time
import pytest
import torch
from torch import nn
from sd_nb.train.parallel import agree, barrier, gather_with_grad, is_main, mean_over_ranks, unwrap, world, world_size, wrap

SCRIPT = '''
import sys, torch
from torch import nn
from torch.nn import functional as F
from sd_nb.data.loader import rank_slice
from sd_nb.train.parallel import *

class Mean(nn.Module):
    "A loss that is a mean over samples"
    def __init__(self): super().__init__(); self.net = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6))
    def forward(self, x, y): return (self.net(x) - y).pow(2).mean()

class Contrast(nn.Module):
    "A loss that compares every sample with every other, with one parameter beside the gather"
    def __init__(self): super().__init__(); self.one, self.two, self.scale = nn.Linear(6, 5), nn.Linear(6, 5), nn.Parameter(torch.tensor(1.0))
    def forward(self, x, y):
        a, b = (gather_with_grad(F.normalize(net(o), dim=1)) for net, o in ((self.one, x), (self.two, y)))
        logits, labels = self.scale.exp() * a @ b.T, torch.arange(len(a))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

out = sys.argv[1]
torch.manual_seed(0)
x, y = torch.randn(8, 6), torch.randn(8, 6)
losses = [Mean(), Contrast()]
with world(minutes=1) as w:
    result = dict(size=w.size, loss=[], grad=[])
    for loss in losses:
        if w.rank: [p.data.add_(9) for p in loss.parameters()]  # DDP must make the ranks equal again
        module = wrap(loss, w)
        value = module(rank_slice(x, w.rank, w.size), rank_slice(y, w.rank, w.size)); value.backward()
        result["loss"].append(mean_over_ranks(value)); result["grad"].append([p.grad.clone() for p in unwrap(module).parameters()])
        assert unwrap(module) is loss and (module is loss) == (w.size == 1)
    result["agree"] = [agree(w.rank == w.size - 1), agree(False), agree(True)]
    result["mean"] = mean_over_ranks(torch.tensor([float(w.rank), 1.0])), mean_over_ranks(torch.tensor(w.rank))
    result["gathered"] = gather_with_grad(torch.full((2, 1), float(w.rank)))
    barrier()
    torch.save(result, f"{out}/{w.size}-{w.rank}.pt")
assert not torch.distributed.is_initialized()
'''


def torchrun(script, n, *args, **options):
    "Start n processes and wait for them"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", str(script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    "What one process without torchrun and two gloo ranks with it have computed"
    d = tmp_path_factory.mktemp("parallel")
    (d / "script.py").write_text(SCRIPT)
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    subprocess.run([sys.executable, d / "script.py", d], check=True, env=alone)
    out = torchrun(d / "script.py", 2, d)
    assert out.returncode == 0, out.stderr
    return [torch.load(d / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("kind", [0, 1], ids=["mean", "contrastive"])
def test_two_processes_take_the_step_of_one(results, kind):
    "Loss and gradient of the global batch, on both ranks, equal those of a single process to 1e-6"
    one, *two = results
    for rank in two:
        torch.testing.assert_close(rank["loss"][kind], one["loss"][kind], rtol=0, atol=1e-6)
        for a, b in zip(rank["grad"][kind], one["grad"][kind], strict=True): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert all(g.abs().max() > 1e-3 for g in one["grad"][kind])


def test_ranks_hold_the_same_gradients(results):
    "Bitwise: otherwise the weights would drift apart"
    for a, b in zip(sum(results[1]["grad"], []), sum(results[2]["grad"], []), strict=True): assert torch.equal(a, b)


def test_what_ranks_decide_together(results):
    "True anywhere is True everywhere; a mean is the same everywhere; a gather is in order of rank"
    for rank in results[1:]:
        assert rank["size"] == 2 and rank["agree"] == [True, False, True]
        assert rank["mean"][0].tolist() == [0.5, 1.0] and rank["mean"][1] == 0.5
        assert rank["gathered"].flatten().tolist() == [0, 0, 1, 1]


def test_a_world_of_one_needs_nothing(monkeypatch):
    "Without torchrun every function is the identity, whatever stray variable is set"
    for name in ("RANK", "LOCAL_RANK"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    x, net = torch.randn(3, requires_grad=True), nn.Linear(1, 1)
    with world() as w:
        assert (w.rank, w.size, w.local_rank, world_size()) == (0, 1, 0, 1) and is_main(w)
        assert gather_with_grad(x) is x and wrap(net, w) is net is unwrap(net) and agree(True) and not agree(False)
        assert torch.equal(mean_over_ranks(x), x) and not mean_over_ranks(x).requires_grad
        barrier()


def test_unwrap_takes_off_compilation():
    "A compiled network gives back the network with its own names"
    net = nn.Sequential(nn.Linear(1, 1))
    assert unwrap(torch.compile(net)) is net and unwrap(nn.Sequential()) is not None


FAILING = '''
import time
from sd_nb.train.parallel import *
import torch
with world(minutes=0.5) as w:
    if w.rank == 1: raise ValueError("rank 1 has met a bad sample")
    mean_over_ranks(torch.ones(1))
'''


def test_fault_14_one_ranks_failure_ends_the_job(tmp_path):
    "Nobody waits for ever: the job ends with an error code, and the reason is in the output"
    (tmp_path / "fail.py").write_text(FAILING)
    start = time.monotonic()
    out = torchrun(tmp_path / "fail.py", 2, timeout=300)
    assert out.returncode != 0 and "rank 1 has met a bad sample" in out.stderr and time.monotonic() - start < 240


def test_the_group_is_left_after_an_error(monkeypatch):
    "An exception inside leaves no process group behind"
    for name, value in dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0").items(): monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="boom"):
        with world(device="cpu"):
            assert torch.distributed.is_initialized()
            raise RuntimeError("boom")
    assert not torch.distributed.is_initialized()
