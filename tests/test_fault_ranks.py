"""What becomes of a job when one of its processes dies, freezes or fails: the others know who, and nothing is lost."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from few import SMALL, few_shards
from safetensors.torch import load_file

RUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENV = os.environ | dict(OMP_NUM_THREADS="1")
WORK = '''
import os, sys, time, torch
from pathlib import Path
from sd_nb.config import one_line_errors
from sd_nb.train.parallel import *
with one_line_errors("work"), world(minutes=0.1) as w:
    Path(sys.argv[1], f"{w.rank}.pid").write_text(str(os.getpid()))
    for i in range(10_000):
        mean_over_ranks(torch.ones(3))
        time.sleep(0.01)
        if i == 50: Path(sys.argv[1], f"{w.rank}.ready").touch()
'''


def start(command, folder):
    "Start a job and return it when both processes are at work"
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, start_new_session=True)
    wait_for(lambda: all((folder / f"{rank}.ready").exists() for rank in (0, 1)), job)
    return job


def wait_for(seen, job, seconds=150):
    "Wait until something is there, or fail with what the job said"
    until = time.monotonic() + seconds
    while not seen():
        if job.poll() is not None or time.monotonic() > until:
            job.kill()
            raise AssertionError(job.communicate()[1])
        time.sleep(0.05)


def workers(job):
    "The processes that torchrun has started, first rank first"
    with open(f"/proc/{job.pid}/task/{job.pid}/children") as file: return sorted(map(int, file.read().split()))


@pytest.mark.slow  # two jobs of two processes, and a restart
@pytest.mark.parametrize("rank", [0, 1])
def test_fault_12_a_killed_process_is_replaced(tmp_path, rank):
    "torchrun --max-restarts=1: one process dies by kill -9, the job goes on from its checkpoint and ends as if nothing was"
    data, runs = few_shards(tmp_path / "few"), [tmp_path / "calm", tmp_path / "killed"]
    for run in runs:
        words = ["tiny", *SMALL, "--run", run, "--data", data, "--stage", "autoencoder", "--steps", 60, "--batch", 8, "--save-every", 4]
        job = subprocess.Popen([*RUN, "--max-restarts=1", "-m", "sd_nb.train", "--", *map(str, words)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=ENV, start_new_session=True)
        if run == runs[1]:
            wait_for(lambda: any((run / "autoencoder" / "checkpoints").glob("step-*/MANIFEST.json")), job)
            os.kill(victim := workers(job)[rank], signal.SIGKILL)
            wait_for(lambda: len(workers(job)) == 2 and victim not in workers(job), job)
        err = job.communicate(timeout=300)[1]
        assert job.returncode == 0, err
    calm, killed = (run / "autoencoder" / "checkpoints" / "step-0000060" for run in runs)
    for part in ("model", "ema", "optimizer"):
        a, b = (load_file(path / f"{part}.safetensors") for path in (calm, killed))
        assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    a, b = ([json.loads(line)["loss"] for line in open(run / "autoencoder" / "metrics.jsonl")] for run in runs)
    assert a == b and len(a) == 60


@pytest.mark.slow  # torchrun gives a frozen process half a minute to obey before it kills it
def test_fault_13_a_frozen_process_is_named(tmp_path):
    "One process is stopped: within the time-out of 6 s and some for the clean-up the job is over, and says which it was"
    (tmp_path / "work.py").write_text(WORK)
    job = start([*RUN, str(tmp_path / "work.py"), str(tmp_path)], tmp_path)
    began = time.monotonic()
    os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGSTOP)
    err = job.communicate(timeout=150)[1]
    assert job.returncode != 0 and time.monotonic() - began < 90
    assert "work: error: no sign of life from process 1: killed, frozen" in err
