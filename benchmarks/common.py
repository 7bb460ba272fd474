"""What the benchmarks share: equal results first, then calls timed in turn, on a machine with nothing else to do."""

import json
import os
import platform
import statistics
import sys
import time

import torch


def refuse_when_busy(anyway):
    "End the program when other work would spoil the times."
    load = os.getloadavg()[0]
    if load > 0.3 and not anyway:
        sys.exit(f"load average {load:.2f}: other work would spoil the times (--anyway runs all the same)")


def seconds(call, *args):
    began = time.perf_counter()
    call(*args)
    return time.perf_counter() - began


def same(name, ours, theirs, bound=1e-4):
    "The largest difference of two results, relative to the largest value; too much of it ends the program."
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not difference < bound:
        sys.exit(f"{name}: results differ by {difference:.1e} of the largest value; times would mean nothing")
    return difference


def in_turn(ours, theirs, rounds):
    "Median seconds of two calls, interleaved (ours, theirs, ours, theirs, ...); the first round is thrown away."
    times = [(seconds(ours), seconds(theirs)) for _ in range(rounds + 1)][1:]
    a, b = (statistics.median(t) for t in zip(*times))
    ratios = [one / two for one, two in times]
    return dict(ours=a, theirs=b, ratio=a / b, lowest=min(ratios), highest=max(ratios))


def save(out, rows, **about):
    "Write the rows, and on which machine they were measured, as JSON."
    about = dict(torch=torch.__version__, machine=platform.processor(), threads=torch.get_num_threads(), **about)
    with open(out, "w") as f:
        json.dump(dict(about=about, rows=rows), f, indent=2)
