"""Downloading: every row ends as a picture or a counted reason, and a kill at any moment changes no byte."""

import asyncio
import json
import os
import random
import signal
import tarfile
import time
from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_nb.config import parse
from sd_nb.data.download_images import DownloadImages, in_order, shards_of
from sd_nb.data.funnel import read_funnel, write_funnel
from sd_nb.data.images import read_shard, read_shards
from sd_nb.data.shrink import Shape
from web import ROBOTS, Web, bad_pictures, pictures

FAULTS = {  # path -> reason
    "status/404": "HTTP 404", "status/429": "HTTP 429", "status/500": "HTTP 500", "silent": "timeout", "drips": "timeout",
    "header_drips": "timeout", "endless": "too many bytes", "endless_header": "not HTTP", "says_huge": "too many bytes",
    "says_more": "cut short", "zip_bomb": "too many bytes", "not_zipped": "cut short", "loop_/": "too many redirects",
    "nowhere": "bad address", "hangs_up": "no connection", "not_http": "not HTTP",
    **{name: reason for name, (_, reason) in bad_pictures().items()},
    **{f"robots/{number}": "opted out" for number, may in enumerate(ROBOTS.values()) if not may}}
IMG2DATASET = ["url", "caption", "key", "status", "error_message", "width", "height", "original_width", "original_height", "exif", "sha256"]


@pytest.fixture(scope="module")
def web():
    with Web() as web: yield web


def write_table(folder, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "0.parquet")
    return folder


def command(source, out, **more):
    how = dict(shape=Shape(size=96), seconds=5, tries=1, max_bytes=1_000_000, allow_private=True, threads=2, min_yield=0)
    return DownloadImages(source, out, **how | more)


def contents(folder): return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def table_of(out): return [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def whole(web, tmp_path_factory):
    """All pictures and all faults, downloaded once: the rows, the directory."""
    home = tmp_path_factory.mktemp("whole")
    paths = [*pictures(), *FAULTS, "recovers/503/whole", "zipped", "good.jpg"]  # the last one is there twice
    random.Random(0).shuffle(paths)
    urls = [web.url(path) for path in paths]
    captions = [f"caption of {path} \u2603" for path in paths]
    source = write_table(home / "filtered", url=urls, caption=captions, aesthetic=[i / 7 for i in range(len(paths))],
                         width=[640] * len(paths), key=["same"] * len(paths))
    write_funnel(source, [dict(step="filter", asked=1000, kept=len(paths), dropped={"aesthetic": 1000 - len(paths)})])
    assert command(source, home / "shards", per_shard=20, tries=3, seconds=1, per_host=64).run() == 0
    return list(zip(urls, captions)), home / "shards"


def test_fault_19_25_every_row_is_a_picture_or_a_reason(whole, web):
    """Each fault under its own reason, each good one a picture with its own caption, each row in the table once and in order."""
    rows, out = whole
    table = table_of(out)
    assert [(row["url"], row["caption"]) for row in table] == rows
    for row in table:
        path = row["url"].split("/", 3)[3]
        assert row["error_message"] == FAULTS.get(path), path
        assert (row["status"] == "success") == (path not in FAULTS)
    samples = {sample.key: sample for sample in read_shards(out)}
    good = [row for row in table if row["status"] == "success"]
    assert list(samples) == [row["key"] for row in good] and len(good) == len(rows) - len(FAULTS)
    for row in good:
        sample = samples[row["key"]]
        assert sample.caption == row["caption"] and sample.meta == row
        assert sample.image.size == (row["width"], row["height"]) and min(sample.image.size) == 96 and sample.image.mode == "RGB"


def test_the_counts_add_up(whole):
    """Each shard's statistics, the table and the funnel tell the same; the steps before are still in the funnel."""
    rows, out = whole
    table = table_of(out)
    stats = [json.loads(path.read_text()) for path in sorted(out.glob("*_stats.json"))]
    assert [s["count"] for s in stats] == [20] * (len(rows) // 20) + [len(rows) % 20] * (len(rows) % 20 > 0)
    for s in stats: assert s["count"] == s["successes"] + s["failed_to_download"] + s["failed_to_resize"] == sum(s["status_dict"].values())
    before, entry = read_funnel(out)
    assert before["step"] == "filter" and entry["step"] == "download"
    assert entry["asked"] == len(rows) == entry["kept"] + sum(entry["dropped"].values())
    assert entry["dropped"] == dict(Counter(row["error_message"] for row in table if row["error_message"]))


def test_the_layout_is_that_of_img2dataset(whole):
    """Names, members, columns and their types; the table's own columns stay, and those with a name of img2dataset's under another."""
    _, out = whole
    names = [f"{i:05d}" for i in range(len(list(out.glob("*.tar"))))]
    assert {path.name for path in out.iterdir()} == {
        "funnel.json", ".lock", *(name + end for name in names for end in (".tar", ".parquet", "_stats.json"))}
    for number, name in enumerate(names):
        schema = pq.read_schema(out / f"{name}.parquet")
        assert set(IMG2DATASET) | {"aesthetic", "source_width", "source_key"} == set(schema.names)
        assert {str(schema.field(c).type) for c in ("width", "height", "original_width", "original_height")} == {"int32"}
        keys = pq.read_table(out / f"{name}.parquet")["key"].to_pylist()
        assert keys == [f"{number:05d}{i:02d}" for i in range(len(keys))]
        with tarfile.open(out / f"{name}.tar") as tar: members = tar.getmembers()
        assert all(m.isfile() and (m.mtime, m.uid, m.uname) == (0, 0, "") for m in members)
        stems = list(dict.fromkeys(m.name.split(".")[0] for m in members))
        assert [m.name for m in members] == [f"{stem}.{end}" for stem in stems for end in ("jpg", "json", "txt")]


def test_a_shard_that_img2dataset_wrote_is_read(tmp_path):
    """Every field it writes, in its order and its types, with its indented JSON: what the reader gives is all of it."""
    row = dict(url="http://a/b.jpg", caption="a snow\u2603man", key="000120007", status="success", error_message=None, width=320, height=240,
               original_width=640, original_height=480, exif=json.dumps({"Image Orientation": "Horizontal (normal)"}), sha256="0" * 64,
               similarity=0.31, hash=-5, punsafe=1e-5, pwatermark=0.02, AESTHETIC_SCORE=6.6, NSFW="UNLIKELY", LICENSE="?")
    with tarfile.open(tmp_path / "00012.tar", "w") as tar:
        for end, data in (("jpg", pictures()["good.jpg"]), ("json", json.dumps(row, indent=4).encode()), ("txt", row["caption"].encode())):
            member = tarfile.TarInfo(f"{row['key']}.{end}")
            member.size, member.mtime, member.uname, member.mode = len(data), 1690000000.5, "bigdata", 0o444
            (tmp_path / "member").write_bytes(data)
            with open(tmp_path / "member", "rb") as file: tar.addfile(member, file)
    [sample] = read_shard(tmp_path / "00012.tar")
    assert (sample.key, sample.caption, sample.meta, sample.image.size) == (row["key"], row["caption"], row, (320, 240))


def test_again_asks_for_nothing_and_changes_nothing(web, tmp_path):
    """The same command on a finished directory; a shard whose file is gone or cut is made again, the others are not asked for."""
    source = write_table(tmp_path / "table", url=[web.url("good.jpg")] * 4 + [web.url("good.png")] * 4, caption=["a"] * 8)
    run = command(source, tmp_path / "out", per_shard=4).run
    run()
    before, hits = contents(tmp_path / "out"), Counter(web.hits)
    run()
    assert contents(tmp_path / "out") == before and web.hits == hits
    (tmp_path / "out/00001.tar").write_bytes(before["00001.tar"][:-1])
    run()
    (tmp_path / "out/00001.parquet").unlink()
    run()
    assert contents(tmp_path / "out") == before
    assert web.hits - hits == Counter({"good.png": 8})


def start(run, kill=None):
    """Run a command in a process of its own, which kills itself instead of its `kill`-th rename."""
    pid, code = os.fork(), 1
    if pid: return pid
    try:
        if kill:
            real, count = os.replace, iter(range(1, 1000))
            os.replace = lambda *places: os.kill(os.getpid(), signal.SIGKILL) if next(count) == kill else real(*places)
        asyncio.run(run.fetch_all())
        code = 0
    finally: os._exit(code)


def end_of(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def for_kills(web, home):
    """A table of 24 rows and what comes of it when nobody interferes."""
    names = ["good.jpg", "large.jpg", "turned.jpg", "truncated.jpg", "status/404", "good.png"] * 4
    source = write_table(home / "table", url=[web.url(name) for name in names], caption=[f"row {i}" for i in range(24)])
    run = command(source, home / "whole", per_shard=4, connections=3)
    run.run()
    return run, contents(home / "whole")


def test_fault_25_killed_at_a_rename(web, tmp_path):
    """Kill -9 instead of a rename, again and again in one directory: the last run ends with the same bytes."""
    run, whole = for_kills(web, tmp_path)
    run = replace(run, out=tmp_path / "out")
    for kill in (1, 2, 3, 4, 5, 6):
        assert end_of(start(run, kill)) == -signal.SIGKILL
        assert "funnel.json" not in contents(run.out)
    assert "00000_stats.json" in contents(run.out) != whole
    run.run()
    assert contents(run.out) == whole


def kill_at_random(web, home, kills, seed):
    """Kill -9 after a random time, so often, four times in each directory; then let each finish."""
    run, whole = for_kills(web, home)
    clock, done = random.Random(seed), 0
    while done < kills:
        pid = start(replace(run, out=home / f"out{done // 4}"))
        time.sleep(clock.uniform(0, 0.4))
        os.kill(pid, signal.SIGKILL)
        done += end_of(pid) == -signal.SIGKILL
    for number in range(-(-kills // 4)):
        again = replace(run, out=home / f"out{number}")
        again.run()
        assert contents(again.out) == whole


def test_fault_25_killed_at_three_random_moments(web, tmp_path): kill_at_random(web, tmp_path, 3, seed=1)


@pytest.mark.slow
def test_fault_25_killed_at_twenty_random_moments(web, tmp_path): kill_at_random(web, tmp_path, 20, seed=2)


def peak():
    """The most memory that this process had, in bytes."""
    with open("/proc/self/status") as f: return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))


def test_fault_20_memory_is_bounded(web, tmp_path):
    """A hundred endless bodies and bombs: no more memory than the connections may hold."""
    paths = ["endless", "zip_bomb", "81_megapixels.png", "196_megapixels.png", "text_bomb.png"] * 20
    source = write_table(tmp_path / "table", url=[web.url(path) for path in paths], caption=["bomb"] * 100)
    command(write_table(tmp_path / "first", url=[web.url("large.jpg")], caption=["a"]), tmp_path / "warm").run()
    with open("/proc/self/clear_refs", "w") as f: f.write("5")  # forget the peak so far
    before = peak()
    command(source, tmp_path / "out", connections=8, per_host=8, seconds=20).run()
    assert peak() - before < 100e6
    assert read_funnel(tmp_path / "out")[-1]["dropped"] == {"too many pixels": 40, "too many bytes": 40, "broken picture": 20}


def test_other_rows_or_settings_are_refused(web, tmp_path):
    """One line, and nothing in the directory is touched."""
    source = write_table(tmp_path / "table", url=[web.url("good.jpg")] * 4, caption=list("abcd"))
    run = command(source, tmp_path / "out", per_shard=2)
    run.run()
    before = contents(tmp_path / "out")
    moved = write_table(tmp_path / "moved", url=[web.url("good.jpg")] * 4, caption=list("abdc"))
    shorter = write_table(tmp_path / "shorter", url=[web.url("good.jpg")] * 2, caption=list("ab"))
    for other, text in [(replace(run, shape=Shape(size=64)), "other rows or settings"), (replace(run, source=moved), "other rows or settings"),
                        (replace(run, per_shard=3), "other rows or settings"), (replace(run, source=shorter), "longer table")]:
        with pytest.raises(ValueError, match=text) as error: other.run()
        assert "\n" not in str(error.value)
        assert contents(tmp_path / "out") == before


def test_bad_input_is_one_line(tmp_path, web):
    good = write_table(tmp_path / "good", url=[web.url("good.jpg")], caption=["a"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/0.parquet").write_text("url,caption")
    mixed = write_table(tmp_path / "mixed", url=["a"], caption=["b"])
    pq.write_table(pa.table(dict(url=["a"])), mixed / "1.parquet")
    for run, text in [(command(tmp_path / "empty", tmp_path / "o"), "no .*parquet"), (command(tmp_path / "text", tmp_path / "o"), "not parquet"),
                      (command(mixed, tmp_path / "o"), "columns"), (command(tmp_path / "nowhere", tmp_path / "o"), "nowhere"),
                      (command(write_table(tmp_path / "u", link=["a"]), tmp_path / "o"), "no column caption and url"),
                      (command(good, good), "name another directory"), (command(good, tmp_path / "o", per_shard=0), "--per-shard 0"),
                      (command(good, tmp_path / "o", seconds=float("nan")), "--seconds"),
                      (command(good, tmp_path / "o", shape=Shape(quality=101)), "--quality 101")]:
        with pytest.raises((ValueError, OSError), match=text) as error: run.run()
        assert "\n" not in str(error.value)


def test_a_dead_line_stops_the_run(web, tmp_path):
    """A full shard without pictures is not written off; when the line is back, the same command goes on."""
    source = write_table(tmp_path / "table", url=[web.url("good.jpg")] * 4 + [web.url("status/503")] * 4, caption=["a"] * 8)
    stopping = command(source, tmp_path / "out", per_shard=4, min_yield=0.05)
    with pytest.raises(OSError, match="only 0 of 4 rows became pictures .HTTP 503: 4"): stopping.run()
    assert {"00000.tar", "00000_stats.json"} < set(contents(tmp_path / "out")) and "00001.tar" not in contents(tmp_path / "out")
    assert replace(stopping, min_yield=0).run() == 0
    assert read_funnel(tmp_path / "out")[-1]["dropped"] == {"HTTP 503": 4}


def test_private_addresses_need_a_flag(web, tmp_path):
    source = write_table(tmp_path / "table", url=[web.url("good.jpg")], caption=["a"])
    hits = web.hits.total()
    command(source, tmp_path / "out", allow_private=False).run()
    assert table_of(tmp_path / "out")[0]["error_message"] == "private address" and web.hits.total() == hits


def test_nothing_and_odd_values_in_a_table(web, tmp_path):
    """Null urls and captions, columns that JSON does not know; a table without rows is no mistake."""
    day = pa.array([0, 1, 2], pa.timestamp("s"))
    source = write_table(tmp_path / "table", url=[None, web.url("good.jpg"), "no url"], caption=["a", None, "c"], day=day, raw=[b"\xff"] * 3)
    command(source, tmp_path / "out").run()
    assert [row["error_message"] for row in table_of(tmp_path / "out")] == ["bad address", None, "bad address"]
    [sample] = read_shards(tmp_path / "out")
    assert sample.caption == "" and sample.meta["day"] == "1970-01-01 00:00:01"
    nothing = write_table(tmp_path / "nothing", url=pa.array([], pa.string()), caption=pa.array([], pa.string()))
    command(nothing, tmp_path / "none").run()
    assert read_funnel(tmp_path / "none") == [dict(step="download", asked=0, kept=0, dropped={})]


def test_fault_21_captions_arrive_as_they_are(web, tmp_path):
    """Blank, endless, with control characters, in any script: none moves, none changes."""
    captions = ["", " ", "a\0b", "x" * 1_000_000, "\U0001f469\u200d\U0001f680\r\n", "\u202eright to left", "\ufeff", "same", "same"]
    source = write_table(tmp_path / "table", url=[web.url("good.jpg")] * len(captions), caption=captions)
    command(source, tmp_path / "out", per_shard=4).run()
    samples = list(read_shards(tmp_path / "out"))
    assert [sample.caption for sample in samples] == [sample.meta["caption"] for sample in samples] == captions


def test_fault_27_a_second_process_is_refused(web, tmp_path):
    source = write_table(tmp_path / "table", url=[web.url("silent")], caption=["a"])
    before, run = web.hits["silent"], command(source, tmp_path / "out", seconds=1)
    child = start(replace(run, seconds=60))
    try:
        while web.hits["silent"] == before: time.sleep(0.01)
        with pytest.raises(OSError, match="another process"): run.run()
    finally: os.kill(child, signal.SIGKILL)
    assert end_of(child) == -signal.SIGKILL
    run.run()


def test_few_at_once_for_one_host(web, tmp_path, monkeypatch):
    """No more than `per_host` requests to one host and `connections` in all are under way."""
    from sd_nb.data import download_images as module
    under_way, most = Counter(), Counter()

    async def slow(session, url, rules):
        host = url.split("/")[2]
        for name in (host, "all"):
            under_way[name] += 1
            most[name] = max(most[name], under_way[name])
        await asyncio.sleep(0.01)
        for name in (host, "all"): under_way[name] -= 1
        return pictures()["good.jpg"]

    monkeypatch.setattr(module, "fetch", slow)
    source = write_table(tmp_path / "table", url=[f"http://{host}/{i}" for host in ("a", "b", "c") for i in range(20)], caption=["x"] * 60)
    command(source, tmp_path / "out", per_host=2, connections=5).run()
    assert most == {"a": 2, "b": 2, "c": 2, "all": 5}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 8))
def test_in_order(naps, ahead):
    """Results come in the order of the items, whatever takes how long, and never more than `ahead` are started early."""
    async def run():
        started, taken = [], []

        async def work(i):
            started.append(i)
            for _ in range(naps[i]): await asyncio.sleep(0)
            return i * 10

        async for i, result in in_order(work, range(len(naps)), ahead):
            taken.append((i, result))
            assert len(started) < len(taken) + ahead
        assert taken == [(i, 10 * i) for i in range(len(naps))]
    asyncio.run(run())


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(1, 12))
def test_keys_never_collide(count, per_shard):
    shards = list(shards_of(({"key": "same"} for _ in range(count)), per_shard, {}))
    keys = [row["key"] for shard in shards for row in shard.rows]
    assert len(set(keys)) == count == len(keys) and keys == sorted(keys)
    assert all(key.startswith(shard.name) for shard in shards for key in [row["key"] for row in shard.rows])


def test_the_command_line(web, tmp_path, capsys):
    """Flags are plain, and the end says what became of the rows."""
    source = write_table(tmp_path / "table", url=[web.url("good.jpg"), web.url("status/404")], caption=["a", "b"])
    line = f"{source} {tmp_path / 'out'} --size 64 --mode center_crop --allow-private --tries 1"
    assert parse(DownloadImages, line.split(), "sd-nb data download").run() == 0
    said = capsys.readouterr()
    assert "1 of 2 rows became pictures" in said.out and "1 HTTP 404" in said.out and "2/2" in said.err
    assert next(read_shards(tmp_path / "out")).image.size == (64, 64)
    with pytest.raises(ValueError, match="size"): parse(DownloadImages, ["a", "b", "--size", "big"], "sd-nb data download")
