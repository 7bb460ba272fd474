"""A checkpoint's time on the disk, and how much of it training has to wait for.

    python benchmarks/checkpoint.py                    2 GB of tensors in the current directory
    python benchmarks/checkpoint.py --directory /data  on the disk that matters
    python benchmarks/checkpoint.py --megabytes 8      to see that the script works

What is read back is compared first, bit for bit. `save` writes, hashes, syncs, reads back and verifies; beside it stand the
same bytes written by the safetensors library, which does nothing of the rest, and the roof: the bytes alone, synced.
`stall` is what a training step waits for: all of it, or with `Saver` the copy in memory. Medians of the rounds; the
first is thrown away.
"""

import os
import shutil
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from common import refuse_when_busy, save, seconds
from safetensors.torch import save_file

from sd_nb.train import checkpoint
from sd_nb.train.background import Saver, snapshot


@dataclass
class Benchmark:
    "Measure how long a checkpoint takes, and how long training waits for it"
    megabytes: int = 2048  # of tensors
    directory: str = "."  # on the disk to be measured
    rounds: int = 5  # timed calls of each
    threads: int = 2
    out: str | None = None  # JSON file for the rows
    anyway: bool = False  # run although the machine has other work


def tensors(megabytes):
    "Weights, average and AdamW's two moments, in matrices of four megabytes or less."
    size, generator = min(1024, 256 * max(1, megabytes // 4)), torch.Generator().manual_seed(0)
    count = max(1, megabytes * 2**20 // (4 * 4 * size * size))
    return {part: {f"{i}.weight": torch.randn(size, size, generator=generator) for i in range(count)}
            for part in ("model", "ema", "exp_avg", "exp_avg_sq")}


def raw(path, data):
    "The roof: bytes to the disk and nothing else."
    with open(path, "wb") as file:
        for part in data.values():
            for t in part.values():
                file.write(t.view(-1).view(torch.uint8).numpy())
        os.fsync(file.fileno())


def library(path, data):
    "The same bytes, by the library that defines the format."
    path.mkdir(exist_ok=True)
    for part, named in data.items():
        save_file(named, path / f"{part}.safetensors")


def rounds_of(args, **calls):
    "Median seconds of each call; all are called in turn."
    times = [{name: seconds(call) for name, call in calls.items()} for _ in range(args.rounds + 1)][1:]
    return {name: statistics.median(t[name] for t in times) for name in calls}


def rows(args, folder):
    "All rows: parts of a save, and the stall with and without `Saver`."
    data = tensors(args.megabytes)
    path = checkpoint.save(folder / "run", 1, data, {})
    loaded, _ = checkpoint.load(path)
    if any(not torch.equal(t, loaded[part][name]) for part in data for name, t in data[part].items()):
        raise SystemExit("what was read back is not what was saved; times would mean nothing")
    del loaded
    with Saver(folder / "back") as saver:
        times = rounds_of(
            args, **{"bytes alone": lambda: raw(folder / "raw", data), "safetensors library": lambda: library(folder / "library", data),
                     "save": lambda: checkpoint.save(folder / "run", 1, data, {}), "verify": lambda: checkpoint.broken(path),
                     "load": lambda: checkpoint.load(path, verify=False), "copy": lambda: snapshot(data),
                     "stall with Saver": lambda: saver.save(1, data, {}), "rest in the background": saver.wait})
    return [dict(row=name, seconds=t, gigabytes_per_second=checkpoint.bytes_of(data) / t / 1e9) for name, t in times.items()]


def main(args):
    refuse_when_busy(args.anyway)
    torch.set_num_threads(args.threads)
    folder = Path(tempfile.mkdtemp(dir=args.directory, prefix="checkpoint-"))
    try: table = rows(args, folder)
    finally: shutil.rmtree(folder)
    for row in table:
        print("{row:24} {seconds:9.4f} s  {gigabytes_per_second:8.3f} GB/s".format(**row), flush=True)
    if args.out:
        save(args.out, table, megabytes=args.megabytes)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
