"""Train the toy in children that are killed at random moments: python tests/kill.py RUN KILLS STEPS PAUSE."""
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from toy import ALONE, Toy, config

from sd_nb.train.trainer import Trainer


def child(run, steps, pause):
    "Train to the end in another process, at most one step each `pause` seconds"
    if pid := os.fork(): return pid  # this process never computes, so its children start clean
    Trainer(Toy(lambda step: time.sleep(pause)), replace(config(run), steps=steps, save_every=3), ALONE).fit()
    os._exit(0)


def changed(log):
    "When the log was last written"
    return log.stat().st_mtime_ns if log.exists() else None


if __name__ == "__main__":
    run, kills, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    log, moments, hits = run / "metrics.jsonl", random.Random(), 0
    for _ in range(kills):
        seen, pid = changed(log), child(run, steps, pause)
        while changed(log) == seen: time.sleep(0.002)  # until it trains: a start cuts the log to the checkpoint
        time.sleep(moments.uniform(0, 15 * pause))
        os.kill(pid, signal.SIGKILL)
        hits += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    ended = os.waitpid(child(run, steps, 0), 0)[1]
    print(hits, ended)
