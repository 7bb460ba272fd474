"""Our loader beside webdataset, `datasets` and one file per sample, on the same bytes: bytes first, then samples/s.

    python benchmarks/loader.py                        2,000 latents of 512 px pictures (131 MB, five times)
    python benchmarks/loader.py --samples 500 --side 16

Every reader gives whole batches of float16 arrays in shuffled order, in one process, from files that were just written, so
that all read from the memory of the operating system and none waits for a disk. webdataset reads its shards in order and
shuffles in a buffer. The order of the others is a permutation made beforehand for the epoch; ours is computed step by step. `datasets` is measured twice, with an array column and with bytes that are given a shape
afterwards, which is faster. Every sample of every reader is compared with the original before a call is timed. Calls
of an epoch each are interleaved, the first round is thrown away, medians are compared; a ratio below 1 means that ours is faster.

At the end: the private memory that our loader adds to a process in which it opens a million samples (of sparse files).
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from common import in_turn, refuse_when_busy, save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from million import MEMORY, make_million  # noqa: E402

from sd_nb.data.latents import write_json, write_packed  # noqa: E402
from sd_nb.data.loader import Packed  # noqa: E402


@dataclass
class Benchmark:
    "Compare how fast batches of latents come"
    samples: int = 2000
    side: int = 64  # of the latent; 64 is a picture of 512 pixels
    batch: int = 250  # divides the samples
    per_shard: int = 500
    buffer: int = 1000  # of webdataset's shuffling
    rounds: int = 9  # timed epochs of each
    million: int = 1_000_000  # samples for the measurement of memory; 0: none
    threads: int = 1
    out: str | None = None  # JSON file for the rows
    anyway: bool = False  # run although the machine has other work


class Ours:
    name = "sd_nb"

    def __init__(self, home, x, args):
        shards = []
        for i, part in enumerate(np.split(x, range(args.per_shard, len(x), args.per_shard))):
            rows = [dict(key=f"{i}-{j}", caption="", split="train", width=512, height=512, extra="{}") for j in range(len(part))]
            receipt = write_packed(home, f"{i:05d}", part, rows, {})
            shards.append({k: receipt[k] for k in ("name", "count", "files")})
        write_json(home / "manifest.json", dict(kind="latents", shape=x.shape[1:], dtype=str(x.dtype), count=len(x), shards=shards))
        self.data, self.batch = Packed(home), args.batch

    def epoch(self, number):
        steps = len(self.data) // self.batch
        for step in range(number * steps, (number + 1) * steps): yield self.data[self.data.draw(step, self.batch, seed=0)]


class WebDataset:
    name = "webdataset"

    def __init__(self, home, x, args):
        import webdataset
        with webdataset.ShardWriter(str(home / "%05d.tar"), maxcount=args.per_shard, verbose=0) as sink:
            for i, o in enumerate(x): sink.write({"__key__": f"{i:09d}", "npy": o})
        paths = sorted(str(o) for o in home.glob("*.tar"))
        data = webdataset.WebDataset(paths, shardshuffle=len(paths), seed=0, empty_check=False)
        self.pipeline = data.shuffle(args.buffer).decode().to_tuple("npy").batched(args.batch, collation_fn=lambda o: np.stack([x for x, in o]))

    def epoch(self, number): yield from self.pipeline


class Indexed:
    "Readers that fetch any rows: the order is a permutation"
    def epoch(self, number):
        for rows in np.random.default_rng(number).permutation(self.count).reshape(-1, self.batch): yield self.read(rows)


class Arrays(Indexed):
    name = "datasets, array column"

    def __init__(self, home, x, args):
        from datasets import Array3D, Dataset, Features, disable_progress_bars, load_from_disk
        disable_progress_bars()
        features = Features(latent=Array3D(x.shape[1:], "float16"))
        Dataset.from_generator(lambda: (dict(latent=o) for o in x), features=features, cache_dir=str(home / "cache")).save_to_disk(home / "data")
        self.data, self.count, self.batch = load_from_disk(home / "data").with_format("numpy", dtype=np.float16), len(x), args.batch

    def read(self, rows): return self.data[rows]["latent"]


class Bytes(Indexed):
    name = "datasets, bytes column"

    def __init__(self, home, x, args):
        from datasets import Dataset, load_from_disk
        Dataset.from_dict(dict(latent=[o.tobytes() for o in x])).save_to_disk(home)
        self.data, self.count, self.batch, self.shape = load_from_disk(home), len(x), args.batch, x.shape[1:]

    def read(self, rows): return np.frombuffer(bytearray().join(self.data[rows]["latent"]), np.float16).reshape(-1, *self.shape)


class Files(Indexed):
    name = "one file per sample"

    def __init__(self, home, x, args):
        for i, o in enumerate(x): np.save(home / f"{i:09d}.npy", o)
        self.paths, self.count, self.batch = sorted(home.glob("*.npy")), len(x), args.batch

    def read(self, rows): return np.stack([np.load(self.paths[i], allow_pickle=False) for i in rows])


def must_be_the_same(reader, x):
    "End the program unless an epoch of this reader holds every sample once, bit for bit; sample i begins with the number i."
    got = np.concatenate([np.asarray(o) for o in reader.epoch(0)])
    order = np.argsort(got.view(np.uint16)[:, 0, 0, 0], kind="stable")
    if not (got.dtype == x.dtype and np.array_equal(got[order].view(np.uint16), x.view(np.uint16))):
        sys.exit(f"{reader.name}: other samples than were written; times would mean nothing")
    if (order == np.arange(len(x))).all(): sys.exit(f"{reader.name}: not shuffled")


def originals(args):
    "Noise, in which the first number of sample i is i as bits."
    x = np.random.default_rng(0).standard_normal((args.samples, 8, args.side, args.side), np.float32).astype(np.float16)
    x.view(np.uint16)[:, 0, 0, 0] = np.arange(args.samples)
    return x


def drain(reader, numbers):
    def _epoch():
        for o in reader.epoch(next(numbers)): torch.from_numpy(np.ascontiguousarray(o))
    return _epoch


def private_memory(count):
    "Megabytes that a million samples take, all of them and one split, beyond the imports."
    with tempfile.TemporaryDirectory() as home:
        make_million(Path(home), count)
        env = os.environ | dict(PYTHONPATH=str(Path(__file__).resolve().parent.parent))
        done = subprocess.run([sys.executable, "-c", MEMORY, home], env=env, capture_output=True, text=True, check=True)
    return [int(line.split()[1]) / 1000 for line in done.stdout.splitlines()]


def main(args):
    refuse_when_busy(args.anyway)
    if args.samples % args.batch or args.samples > 30_000: sys.exit("--samples must divide by --batch and be 30,000 at most")
    torch.set_num_threads(args.threads)
    x, table = originals(args), []
    with tempfile.TemporaryDirectory() as home:
        readers = []
        for kind in (Ours, WebDataset, Arrays, Bytes, Files):
            (Path(home) / kind.__name__).mkdir()
            readers.append(kind(Path(home) / kind.__name__, x, args))
            must_be_the_same(readers[-1], x)
        ours, *others = readers
        for other in others:
            row = dict(row=other.name) | in_turn(*[drain(o, iter(range(10**6))) for o in (ours, other)], args.rounds)
            table.append(row | {who: args.samples / row[who] for who in ("ours", "theirs")})
            print("{row:24} ours {ours:9.0f} samples/s  theirs {theirs:9.0f} samples/s  ratio {ratio:.3f} ({lowest:.3f} to {highest:.3f})"
                  .format(**table[-1]), flush=True)
    memory = private_memory(args.million) if args.million else None
    if memory: print(f"private memory for {args.million} samples: {memory[0]:.1f} MB for all, {memory[1]:.1f} MB with one split chosen")
    if args.out: save(args.out, table, samples=args.samples, side=args.side, batch=args.batch, memory_mb=memory)


if __name__ == "__main__": main(tyro.cli(Benchmark))
