"""Decode, resize and pack JPEGs as squares of bytes: libraries beside Pillow alone, images/s of one core.

    python benchmarks/decode.py                          photographs of 0.3 to 12 megapixels to 512 pixels
    python benchmarks/decode.py --size 64 --pictures DIR JPEGs of your own

Pillow alone is what `pack_pixels` does: decode all pixels, then one Lanczos resize. Its rivals are
- `draft`: Pillow lets the JPEG decoder leave out what is not needed, down to twice the size that is asked for;
- `simplejpeg`: decode with libjpeg-turbo, all pixels; Pillow resizes;
- `simplejpeg, scaled`: the same, at a fraction of the size as in `draft`.

Results are compared first: whole decoders must agree to a step or two of 255 everywhere, those that leave out something to
one step on average. Then calls are interleaved, the first round is thrown away, medians are compared; a ratio below 1 means
that the rival is faster than Pillow alone.
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import tyro
from common import in_turn, refuse_when_busy, save
from PIL import Image

from sd_nb.data.images import decode, square


@dataclass
class Benchmark:
    "Compare how fast JPEGs become squares"
    size: int = 512  # side of the square in pixels
    pictures: str | None = None  # a directory of JPEGs; None: made ones
    rounds: int = 20  # timed pictures of each
    largest: int = 4000  # width in pixels of the largest made picture
    out: str | None = None  # JSON file for the rows
    anyway: bool = False  # run although the machine has other work


def photograph(width):
    "A JPEG in the shape of 4 : 3 with large shapes, small shapes and grain."
    dice, size = np.random.default_rng(0), (width, width * 3 // 4)
    layers = [Image.fromarray(dice.integers(0, 256, (3 * 2**i, 4 * 2**i, 3), dtype=np.uint8)).resize(size, Image.BICUBIC) for i in range(7)]
    mixed = sum(np.asarray(o, np.float32) / 2 ** (i + 1) for i, o in enumerate(layers)) + dice.normal(0, 2, (*size[::-1], 1))
    Image.fromarray(mixed.clip(0, 255).astype(np.uint8)).save(out := io.BytesIO(), "JPEG", quality=92)
    return out.getvalue()


def to_bytes(image, size): return np.asarray(square(image, size)).transpose(2, 0, 1)


def pillow(data, size): return to_bytes(decode(data), size)


def draft(data, size):
    image = Image.open(io.BytesIO(data), formats=("JPEG",))
    image.draft("RGB", (2 * size, 2 * size))
    return to_bytes(image, size)


def turbo(data, size): return to_bytes(Image.fromarray(simplejpeg.decode_jpeg(data, "RGB")), size)


def turbo_scaled(data, size):
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=2 * size, min_width=2 * size)
    return to_bytes(Image.fromarray(pixels), size)


RIVALS = {"draft": (draft, False), "simplejpeg": (turbo, True), "simplejpeg, scaled": (turbo_scaled, False)}


def compare(name, whole, data, size):
    "Mean and largest distance from Pillow alone, in steps of 255; too much of it ends the program."
    apart = np.abs(RIVALS[name][0](data, size).astype(int) - pillow(data, size))
    mean, largest = float(apart.mean()), int(apart.max())
    if largest > 3 if whole else mean > 1: sys.exit(f"{name}: {mean:.2f} steps apart on average, {largest} at most; times would mean nothing")
    return dict(mean=mean, largest=largest)


def store(read, data, size, place):
    "One whole job: the square goes to its place in the packed array."
    def _call(): place[:] = read(data, size)
    return _call


def rows_of(label, data, args):
    "Every rival on one picture."
    place = np.empty((3, args.size, args.size), np.uint8)
    for name, (read, whole) in RIVALS.items():
        apart = compare(name, whole, data, args.size)
        times = in_turn(store(read, data, args.size, place), store(pillow, data, args.size, place), args.rounds)
        yield dict(picture=label, row=name, kilobytes=len(data) // 1000, **times, **apart)


def main(args):
    refuse_when_busy(args.anyway)
    torch.set_num_threads(1)
    widths = [o for o in (640, 1024, 1600, 2400, 4000) if o <= args.largest]
    found = {o.name: o.read_bytes() for o in sorted(Path(args.pictures).glob("*.jp*g"))} if args.pictures else {}
    table = []
    for label, data in (found or {f"{o} x {o * 3 // 4}": photograph(o) for o in widths}).items():
        for row in rows_of(label, data, args):
            table.append(row)
            print("{picture:12} {row:20} {0:8.1f} images/s  Pillow alone {1:8.1f}  ratio {ratio:.3f} ({lowest:.3f} to {highest:.3f})"
                  "  apart {mean:.2f}, at most {largest}".format(1 / row["ours"], 1 / row["theirs"], **row), flush=True)
    if args.out: save(args.out, table, size=args.size, simplejpeg=simplejpeg.__version__)


if __name__ == "__main__": main(tyro.cli(Benchmark))
