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


if __name__ == "__main__":
    run, kills, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    moments, hits = random.Random(), 0
    for _ in range(kills):
        pid, began = child(run, steps, pause), (run / "metrics.jsonl").exists()
        while not began and not (run / "metrics.jsonl").exists(): time.sleep(0.01)  # the first start is slow
        time.sleep(moments.uniform(0.02, 40 * pause))
        os.kill(pid, signal.SIGKILL)
        hits += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    ended = os.waitpid(child(run, steps, 0), 0)[1]
    print(hits, ended)
