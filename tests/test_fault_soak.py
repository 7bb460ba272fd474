"""A run that goes on for long, and one that is starved: nothing piles up, nothing is torn."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_fault_training import receipts
from toy import losses

from sd_nb.train.checkpoint import broken

HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")]


def child(code, *words):
    "Run this code in a process of its own, with the toy at hand"
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=f"{HERE}{os.pathsep}{HERE.parent}")
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, env=env, timeout=300)


SOAK = """
import json, os, sys, threading, time
from dataclasses import replace
from pathlib import Path
import torch
from toy import ALONE, Toy, config
from sd_nb import viz
from sd_nb.train.trainer import Trainer

run, leak, kept, seen = Path(sys.argv[1]), sys.argv[2], [], []
LEAKS = dict(none=lambda: None, memory=lambda: kept.append(torch.ones(20_000)), files=lambda: kept.append(open(os.devnull)),
             threads=lambda: threading.Thread(target=time.sleep, args=(600,), daemon=True).start())

def look(step):
    "What the process holds while nothing is being written"
    if step % 10 == 0: LEAKS[leak]()
    if step % 50: return
    trainer.saver.wait()
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    seen.append(dict(step=step, rss=int(status["VmRSS"].split()[0]) * 1024, threads=int(status["Threads"]), files=len(os.listdir("/proc/self/fd"))))

class Sampled(Toy):
    held = staticmethod(lambda model: dict(held_out=model(torch.ones(1, 4)).mean().item()))
    def preview(self, path): viz.grid(viz.to_pil(self.model(self.x).detach().clamp(-1, 1).reshape(5, 1, 4, 4).expand(5, 3, 4, 4)), cols=5).save(path)

trainer = Trainer(Sampled(look), replace(config(run), steps=1000, save_every=20, sample_every=20, logs=("tensorboard",)), ALONE)
assert trainer.fit()
print(json.dumps(seen))
"""


def soaked(run, leak="none"):
    "What a run of a thousand steps held, every fifty of them, after a warm-up of 300"
    done = child(SOAK, run, leak)
    assert done.returncode == 0, done.stderr[-2000:]
    return [row for row in json.loads(done.stdout) if row["step"] >= 300]


def growth(seen, what):
    "How much more it was in the last third than in the first"
    third = len(seen) // 3
    return min(row[what] for row in seen[-third:]) - max(row[what] for row in seen[:third])


@pytest.mark.parametrize("leak, odd", [("none", []), ("memory", ["rss"]), ("files", ["files"]), ("threads", ["threads"])])
def test_fault_31_a_thousand_steps_leave_nothing_behind(tmp_path, leak, odd):
    "With checkpoints, logs, held-out loss and samples, memory, open files and threads stay flat; 8 kB a step would be seen, or a file or thread each ten"
    seen = soaked(tmp_path, leak)
    assert len(seen) == 14 and seen[-1]["step"] == 950
    grown = {what: growth(seen, what) for what in ("rss", "files", "threads")}
    assert [what for what, limit in (("rss", 2**20), ("files", 0), ("threads", 0)) if grown[what] > limit] == odd, grown
    assert len(list((tmp_path / "samples").iterdir())) == 50 and len(list((tmp_path / "checkpoints").glob("step-*"))) == 2


STARVED = """
import os, resource, sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from torch import nn
from toy import ALONE, Net, Toy, config
from sd_nb.train import background, checkpoint
from sd_nb.train.trainer import Trainer

class Wide(Toy):
    "A toy whose gradients and copies need megabytes"
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 200_000), nn.SiLU(), nn.Linear(200_000, 2))
        self.net = Net(self.model)

def eat():
    "Limit the address space and fill what is left"
    held = next(int(o.split()[1]) for o in open("/proc/self/status") if o.startswith("VmSize")) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**26,) * 2)
    for size in (2**20, 2**14, 2**10):
        try:
            while True: eaten.append(bytearray(size))
        except MemoryError: pass

def starved(owner, name, number):
    "Let this call, and all that comes after, have no memory"
    call, calls = getattr(owner, name), count(1)
    def hungry(*args):
        if next(calls) == number:
            print(name, "without memory", flush=True)
            eat()
        return call(*args)
    setattr(owner, name, hungry)

run, when, eaten = Path(sys.argv[1]), sys.argv[2], []
stage = Wide()
MOMENTS = dict(step=(stage, "at_step", 4), copy=(background, "snapshot", 2), write=(checkpoint, "write_json", 3), verify=(checkpoint, "publish", 2))
if when in MOMENTS: starved(*MOMENTS[when])
try: Trainer(stage, replace(config(run), steps=8, save_every=2), ALONE).fit()
except BaseException: os._exit(3)
"""


@pytest.fixture(scope="module")
def fed(tmp_path_factory):
    "A run that always had memory"
    run = tmp_path_factory.mktemp("fed") / "run"
    assert child(STARVED, run, "never").returncode == 0
    return run


@pytest.mark.parametrize("when", ["step", "copy", "write", "verify"])
def test_fault_34_out_of_memory_tears_nothing(tmp_path, fed, when):
    "The address space is full in a step, in the copy for a checkpoint, while that is written or checked: what is there is whole, and the run ends as one that was fed"
    run = tmp_path / "run"
    starved = child(STARVED, run, when)
    assert starved.returncode and "without memory" in starved.stdout, starved.stderr[-2000:]
    whole = [path for path in (run / "checkpoints").iterdir() if "partial" not in path.name]
    assert run / "checkpoints" / "step-0000002" in whole and not any(map(broken, whole))
    assert not (run / "model").exists()
    resumed = child(STARVED, run, "never")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-0000006", "step-0000008"]
    assert receipts(run, 8) == receipts(fed, 8) and losses(run) == losses(fed) and len(losses(run)) == 8
