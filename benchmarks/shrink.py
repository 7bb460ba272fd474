"""Decode, resize and encode pictures as the download step does, beside Pillow used plainly: images/s on one core.

    python benchmarks/shrink.py                 photographs of 0.3 to 12 megapixels to 512 pixels
    python benchmarks/shrink.py --size 256

Plainly is: open, convert to RGB, one Lanczos resize of all pixels, save. Both results are compared first, and may differ
by little more than a JPEG does from its picture. Then calls are interleaved, the first round is thrown away, medians are
compared; a ratio below 1 means that ours is faster. `pack` is our time with the archive that the pictures go into.
"""

import io
import sys
import tarfile
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from common import in_turn, refuse_when_busy, save, seconds
from PIL import Image

from sd_nb.data.images import _add
from sd_nb.data.shrink import Shape, to_picture

SIZES = [(640, 480), (1024, 768), (1600, 1200), (2400, 1800), (4000, 3000)]


@dataclass
class Benchmark:
    "Compare the time of one picture with that of Pillow used plainly"
    size: int = 512  # pixels on the short side of the result
    rounds: int = 20  # timed pictures of each
    out: str | None = None  # JSON file for the rows
    anyway: bool = False  # run although the machine has other work


def photograph(width, height):
    "A JPEG with large and small shapes and some grain, as cameras make them."
    dice = np.random.default_rng(0)
    layers = [Image.fromarray(dice.integers(0, 256, (3 * 2**i, 4 * 2**i, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
              for i in range(8)]
    mixed = sum(np.asarray(layer, np.float32) / 2**i for i, layer in enumerate(layers)) / 2 + dice.normal(0, 2, (height, width, 1))
    Image.fromarray(mixed.clip(0, 255).astype(np.uint8)).save(buffer := io.BytesIO(), "JPEG", quality=92)
    return buffer.getvalue()


def plainly(data, size):
    "What one writes without thinking about it."
    image = Image.open(io.BytesIO(data)).convert("RGB")
    side = min(size, *image.size)
    aim = tuple(round(length * side / min(image.size)) for length in image.size)
    image.resize(aim, Image.LANCZOS).save(buffer := io.BytesIO(), "JPEG", quality=95)
    return buffer.getvalue()


def packed(data, shape):
    "Ours, into an archive."
    with tarfile.open(fileobj=io.BytesIO(), mode="w|") as tar: _add(tar, "0.jpg", to_picture(data, shape).jpeg)


def difference(a, b):
    "Mean distance of two JPEGs in steps of 255."
    a, b = (np.asarray(Image.open(io.BytesIO(data)), np.float32) for data in (a, b))
    return float(abs(a - b).mean())


def measure(width, height, args):
    "One row: the results compared, then the times."
    data, shape = photograph(width, height), Shape(size=args.size)
    apart = difference(to_picture(data, shape).jpeg, plainly(data, args.size))
    if not apart < 1.5: sys.exit(f"{width} x {height}: results differ by {apart:.1f} of 255; times would mean nothing")
    times = in_turn(lambda: to_picture(data, shape), lambda: plainly(data, args.size), args.rounds)
    pack = sorted(seconds(packed, data, shape) for _ in range(args.rounds))[args.rounds // 2]
    return dict(width=width, height=height, kilobytes=len(data) // 1000, difference=apart, pack=pack, **times)


def main(args):
    torch.set_num_threads(1)
    refuse_when_busy(args.anyway)
    rows = [measure(*size, args) for size in SIZES]
    print(f"{'picture':>12} {'ours/s':>8} {'packed/s':>8} {'Pillow/s':>8} {'ratio':>6} {'lowest':>7} {'highest':>7} {'apart':>6}")
    for r in rows:
        print(f"{r['width']:>5} x {r['height']:<4} {1 / r['ours']:>8.1f} {1 / r['pack']:>8.1f} {1 / r['theirs']:>8.1f} {r['ratio']:>6.2f}"
              f" {r['lowest']:>7.2f} {r['highest']:>7.2f} {r['difference']:>6.2f}")
    if args.out: save(args.out, rows, size=args.size)


if __name__ == "__main__": main(tyro.cli(Benchmark, description=__doc__))
