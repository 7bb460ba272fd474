"""Our filter beside pandas, on the same table: rows a second, and the largest memory that each took.

    python benchmarks/filter.py                                 a million rows
    python benchmarks/filter.py --rows 10_000_000 --no-pandas    what must work within 4 GB on two cores

The table is made up in the manner of LAION's, with scores that are missing, blocked words, and addresses and captions that
come more than once. Both read Parquet, apply the same rules, drop doubles, and write Parquet; what they keep is compared
first. Each run is a process of its own, runs are interleaved, the first round is thrown away, medians are compared; imports
are not timed. Ours also counts every reason, keeps examples, and draws the funnel.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import tyro
from common import refuse_when_busy, save

WORDS = ["nsfw", "stock", "c++ (code)"]
PER_FILE = 1_000_000


@dataclass
class Benchmark:
    "Compare the time and memory of our filter with those of pandas"
    rows: int = 1_000_000
    rounds: int = 3  # timed runs of each
    threads: int = 2
    memory: str = "2GB"  # that DuckDB may take; the rest of the process comes on top
    limit: float = 4.0  # gigabytes that the whole process may take
    pandas: bool = True  # needs memory for the whole table
    out: str | None = None  # JSON file for the rows
    anyway: bool = False  # run although the machine has other work


def make_table(folder, rows):
    "Files of a million rows, from nothing but their numbers."
    uniform = lambda k: f"(hash(i, {k}) % 1000003) / 1000003.0"
    bell = lambda k: f"({' + '.join(uniform(10 * k + j) for j in range(6))} - 3) * 1.414"
    score = lambda k, sql: f"CASE WHEN hash(i, {k + 50}) % 100 > 0 THEN {sql} END"
    words = "a red old cat dog house sea blue night art photo of with on vintage free poster stock nsfw the".split()
    word = lambda k: f"{words}[1 + (hash(i % {rows * 4 // 5}, {k}) % {len(words)})::INT]"
    caption = " || ' ' || ".join(word(k) for k in range(200, 208))
    for start in range(0, rows, PER_FILE):
        duckdb.execute(f"""COPY (SELECT
            'https://host' || hash(i, 1) % 9973 || '.example/' || hash(i, 2) % {rows * 9 // 10} || '.jpg' AS URL,
            {caption} || ' ' || i % {rows * 4 // 5} AS TEXT,
            (256 + 2000 * {uniform(3)})::INT AS WIDTH, (256 + 2000 * {uniform(4)})::INT AS HEIGHT,
            {score(5, f"5.4 + 0.9 * {bell(5)}")} AS aesthetic, {score(6, f"0.31 + 0.03 * {bell(6)}")} AS similarity,
            {score(7, uniform(7))} AS pwatermark, {score(8, f"pow({uniform(8)}, 4)")} AS punsafe, hash(i)::VARCHAR AS hash
            FROM range({start}, {min(start + PER_FILE, rows)}) t(i)) TO '{folder}/{start // PER_FILE:05d}.parquet' (COMPRESSION zstd)""")


def ours(source, out, threads, memory):
    "Filter with the package."
    from sd_nb.data.metadata import Filter
    began = time.perf_counter()
    Filter(source, Path(out), "laion-2b-aesthetic", block=Path(source) / "words.txt", threads=int(threads), memory=memory).run()
    return time.perf_counter() - began


def theirs(source, out, *_):
    "Filter with pandas, cheap rules first."
    import re

    import pandas as pd
    began = time.perf_counter()
    frame = pd.concat([pd.read_parquet(path) for path in sorted(Path(source).glob("*.parquet"))], ignore_index=True)
    sides = frame[["WIDTH", "HEIGHT"]]
    frame = frame[(frame.aesthetic >= 6.5) & (frame.similarity >= 0.28) & (sides.min(axis=1) >= 512)
                  & (sides.max(axis=1) <= 2 * sides.min(axis=1)) & (frame.pwatermark <= 0.5) & (frame.punsafe <= 0.2)]
    frame = frame[frame.TEXT.str.len().between(20, 300) & frame.TEXT.str.strip().ne("") & frame.URL.str.strip().ne("")]
    either = "|".join(map(re.escape, WORDS))
    frame = frame[~frame.TEXT.str.contains(rf"(?:^|\W)(?:{either})(?:$|\W)", case=False)]
    plain = frame.URL.str.strip().str.replace("#.*", "", regex=True).str.replace("^https?://", "", regex=True, case=False)
    frame = frame[~plain.duplicated()]
    frame = frame[~frame.TEXT.str.replace(r"\s+", " ", regex=True).str.strip().str.lower().duplicated()]
    Path(out).mkdir()
    frame.to_parquet(Path(out) / "00000.parquet", compression="zstd")
    return time.perf_counter() - began


def measured(who, *args):
    "Run one side in a process of its own: seconds and gigabytes."
    done = subprocess.run([sys.executable, __file__, who, *map(str, args)], capture_output=True, text=True)
    if done.returncode: sys.exit(f"{who} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def kept(folder):
    "Addresses and captions that stayed, in order."
    tables = [pq.read_table(path) for path in sorted(Path(folder).glob("*.parquet"))]
    pick = lambda table, *names: next(table[name].to_pylist() for name in names if name in table.column_names)
    return [row for table in tables for row in zip(pick(table, "url", "URL"), pick(table, "caption", "TEXT"))]


def compare(args, tmp):
    "Seconds and gigabytes of every run, after a look at what was kept."
    runs = dict(ours=[], pandas=[])
    for i in range(args.rounds + 1):
        for who in ("ours", "pandas") if args.pandas else ("ours",):
            runs[who].append(measured(who, tmp / "in", tmp / f"{who}-{i}", args.threads, args.memory))
        if i == 0 and args.pandas and kept(tmp / "ours-0") != kept(tmp / "pandas-0"):
            sys.exit("the rows that were kept differ; times would mean nothing")
    return {who: [statistics.median(o) for o in zip(*found[1:] or found)] for who, found in runs.items() if found}


def main(args):
    refuse_when_busy(args.anyway)
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        (tmp / "in").mkdir()
        make_table(tmp / "in", args.rows)
        (tmp / "in" / "words.txt").write_text("\n".join(WORDS))
        found = compare(args, tmp)
        stayed = len(kept(tmp / "ours-0"))
    rows = [dict(who=who, rows=args.rows, kept=stayed, seconds=took, per_second=args.rows / took, gigabytes=peak)
            for who, (took, peak) in found.items()]
    line = "{who:8} {rows:>12,} rows, {kept:,} kept  {seconds:8.2f} s  {per_second:>12,.0f} rows/s  {gigabytes:.2f} GB"
    for row in rows: print(line.format(**row))
    if len(rows) == 2:
        time_share, memory_share = (rows[0][name] / rows[1][name] for name in ("seconds", "gigabytes"))
        print(f"ours takes {time_share:.2f} of the time of pandas, {memory_share:.2f} of its memory")
    if args.out: save(args.out, rows)
    if rows[0]["gigabytes"] > args.limit: sys.exit(f"ours took {rows[0]['gigabytes']:.2f} GB, more than {args.limit}")


if __name__ == "__main__":
    if sys.argv[1:2] in (["ours"], ["pandas"]):
        took = dict(ours=ours, pandas=theirs)[sys.argv[1]](*sys.argv[2:])
        print(json.dumps([took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9]))
        sys.stdout.flush(); os._exit(0)
    main(tyro.cli(Benchmark))
