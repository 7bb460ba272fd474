"""A million samples in ten sparse files, 16 GB that take no room on the disk, and what opening them costs."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MEMORY = """
import sys, numpy as np
from sd_nb.data.loader import Packed, batch_indices
def private():
    "Kilobytes that only this process holds and that the system cannot take back"
    lines = (line.split() for line in open("/proc/self/smaps_rollup"))
    return sum(int(o[1]) for o in lines if o[0] in ("Private_Dirty:", "Private_Hugetlb:"))
before = private()
for split in (None, "train"):
    data = Packed(sys.argv[1]).select(split)
    for step in range(2): assert data[batch_indices(step, len(data), 64, 0)].shape == (64, 8, 32, 32)
    print(len(data), private() - before)
"""


def make_million(out, n=1_000_000, shape=(8, 32, 32)):
    "Write the packed directory: two samples in a hundred are held out, captions are of the usual length"
    each = n // 10
    splits = pa.array(["train" if i % 50 else "held_out" for i in range(each)])
    columns = dict(key=[f"{i:09d}" for i in range(each)], caption=[f"a long caption of picture number {i}, " * 2 for i in range(each)])
    pq.write_table(pa.table(columns | dict(split=splits)), out / "first.parquet", compression="zstd")
    shards = []
    for name in (f"{i:05d}" for i in range(10)):
        shutil.copy(out / "first.parquet", out / f"{name}.parquet")
        with open(out / f"{name}.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, dict(descr="<f2", fortran_order=False, shape=(each, *shape)))
            file.truncate(file.tell() + each * 2 * int(np.prod(shape)))
        files = {o: dict(bytes=(out / o).stat().st_size, sha256="") for o in (f"{name}.npy", f"{name}.parquet")}
        shards.append(dict(name=name, count=each, files=files))
    (out / "manifest.json").write_text(json.dumps(dict(kind="latents", shape=shape, dtype="float16", count=10 * each, shards=shards)))
    return out
