import json
import math
import os
import subprocess
import sys
import unicodedata
from fcntl import LOCK_EX, flock
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from sd_nb.config import parse
from sd_nb.data import metadata
from sd_nb.data.funnel import read_funnel
from sd_nb.data.metadata import Filter
from sd_nb.data.rules import block_pattern
from sd_nb.data.sources import SCHEMAS

OFF = dict(aesthetic=None, similarity=None, min_side=None, max_aspect=None, min_caption=None, max_caption=None, watermark=None,
           unsafe=None)
TYPES = dict(url=pa.string(), caption=pa.string(), width=pa.int64(), height=pa.int64(), aesthetic=pa.float64(),
             similarity=pa.float64(), watermark=pa.float64(), safety=pa.float64(), language=pa.string(), row=pa.int64())


def write(directory, rows, files=1):
    "Rows as Parquet files that are told apart by their column `row`"
    directory.mkdir(parents=True, exist_ok=True)
    rows = [dict(dict.fromkeys(TYPES), row=i, **row) for i, row in enumerate(rows)]
    for i in range(files):
        part = rows[len(rows) * i // files: len(rows) * (i + 1) // files]
        pq.write_table(pa.table({name: pa.array([row[name] for row in part], kind) for name, kind in TYPES.items()}), directory / f"{i}.parquet")
    return directory


def kept(directory):
    "What stayed, in order"
    return [row for path in sorted(directory.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def run(source, out, **given):
    "Filter without any rule but those that are given; the places of the rows that stayed, and the counts"
    assert Filter(str(source), out, **{**OFF, **given}).run() == 0
    return [row["row"] for row in kept(out)], read_funnel(out)[-1]


def contents(directory):
    "Every file's bytes"
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- an oracle in plain Python

def visible(text):
    "Is there anything to be seen?"
    return any(not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf", "Zs", "Zl", "Zp") for c in text)


def has_word(text, words):
    "Does a word stand in a text, between two characters that belong to no word?"
    text, letter = unicodedata.normalize("NFC", text).lower(), lambda c: unicodedata.category(c)[0] in "LMN" or c == "_"
    places = [(i, i + len(word)) for word in words for i in range(len(text)) if text.startswith(word, i)]
    return any((i == 0 or not letter(text[i - 1])) and (j == len(text) or not letter(text[j])) for i, j in places)


def address(url):
    "A URL without what makes no difference"
    parts = urlsplit(url.strip())
    host = parts.netloc.lower().removesuffix(":80").removesuffix(":443")
    return host + (parts.path or "/") + ("?" + parts.query if parts.query else "")


def reason(row, words):
    "The first reason for which a row must go"
    score = lambda name: None if row[name] is None or not math.isfinite(row[name]) else row[name]
    for name, limit, sign in (("aesthetic", 6.5, 1), ("similarity", 0.28, 1)):
        if score(name) is None: return f"no {name}"
        if score(name) < limit: return name
    if row["width"] is None or row["height"] is None: return "no size"
    if min(row["width"], row["height"]) < 512: return "small"
    if max(row["width"], row["height"]) > 2 * min(row["width"], row["height"]): return "aspect"
    if score("watermark") is None: return "no watermark"
    if score("watermark") > 0.5: return "watermark"
    if score("safety") is None: return "no safety"
    if score("safety") > 0.2: return "unsafe"
    if row["language"] is None: return "no language"
    if row["language"].lower() not in ("en", "de"): return "language"
    if row["url"] is None or not visible(row["url"]): return "no url"
    if row["caption"] is None or not visible(row["caption"]): return "no caption"
    if len(row["caption"]) < 3: return "short caption"
    if len(row["caption"]) > 8: return "long caption"
    if has_word(row["caption"], words): return "blocked word"


def oracle(rows, words):
    "Places of the rows that stay, and the reasons of the others"
    urls, captions, stay, counts = set(), set(), [], {}
    for i, row in enumerate(rows):
        why = reason(row, words)
        if not why:
            if address(row["url"]) in urls: why = "same url"
            urls.add(address(row["url"]))
        if not why:
            same = " ".join(unicodedata.normalize("NFC", row["caption"]).lower().split())
            if same in captions: why = "same caption"
            captions.add(same)
        if why: counts[why] = counts.get(why, 0) + 1
        else: stay.append(i)
    return stay, counts


mostly = lambda good, *bad: st.one_of(st.just(good), st.just(good), st.just(good), st.sampled_from(bad))
ROWS = st.lists(st.fixed_dictionaries(dict(
    url=st.one_of(st.sampled_from(["http://a.b/c", "HTTPS://A.b:443/c#d", " http://a.b/C\n", "http://a.b", "https://a.b/?q", None, "", " \u3000"]),
                  st.integers(0, 9).map(lambda i: f"http://a.b/{i}")),
    caption=st.one_of(st.text(alphabet="aA bé\u0301ï.\u3000\u200b\n\0'\"$%ж木😀", max_size=9), st.sampled_from([None, "a b", " A\u3000b", "bad", "naïve"])),
    width=mostly(512, 511, 1024, 1025, 0, None), height=mostly(512, 511, 1024, None),
    aesthetic=mostly(6.5, 6.4999, float("nan"), None, float("inf"), -1.0),
    similarity=mostly(0.3, 0.28, 0.1, float("nan"), None), watermark=mostly(0.5, 0.51, None), safety=mostly(0.0, 0.2, 0.3, None),
    language=mostly("en", "DE", "fr", None))), max_size=25)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rows=ROWS, files=st.integers(1, 3))
def test_every_row_has_the_verdict_of_a_plain_oracle(tmp_path_factory, rows, files):
    "Rows, order and counts are those of a few lines of Python, whatever the values and however they lie in files"
    tmp = tmp_path_factory.mktemp("oracle")
    (tmp / "words.txt").write_text("BAD\nna\né\n'\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "write_card", lambda *_: None)  # a picture for every example takes its time
        where, entry = run(write(tmp / "in", rows, files), tmp / "out", aesthetic=6.5, similarity=0.28, min_side=512, max_aspect=2,
                           min_caption=3, max_caption=8, watermark=0.5, unsafe=0.2, language=("EN", "de"), block=tmp / "words.txt")
    stay, counts = oracle(rows, ["bad", "na", "é", "'"])
    assert where == stay
    assert entry == dict(step="filter", asked=len(rows), kept=len(stay), dropped=entry["dropped"]) and entry["dropped"] == counts


def test_each_rule_can_be_switched_off(tmp_path):
    "Without a rule its rows stay, and only its rows"
    good = dict(caption="a good caption of enough letters", width=600, height=600, aesthetic=7.0, similarity=0.3, watermark=0.1,
                safety=0.1, language="en")
    bad = dict(aesthetic=1.0, similarity=0.1, min_side=("width", 500), max_aspect=("width", 6000), min_caption=("caption", "short"),
               max_caption=("caption", "long " * 99), watermark=0.9, unsafe=("safety", 0.9), language="xx")
    rows = [dict(good, url="http://a/good")]
    for name, value in bad.items():
        column, value = value if isinstance(value, tuple) else (name, value)
        rows.append(dict(good, url=f"http://a/{name}", caption=good["caption"] + name) | {column: value})
    source, on = write(tmp_path / "in", rows), dict(aesthetic=6.5, similarity=0.28, min_side=512, max_aspect=2.0, min_caption=20,
                                                    max_caption=300, watermark=0.5, unsafe=0.2, language=("en",))
    assert run(source, tmp_path / "all", **on)[0] == [0]
    for i, name in enumerate(bad): assert run(source, tmp_path / name, **{**on, name: None})[0] == [0, i + 1]


def test_the_first_of_two_stays_over_all_files(tmp_path):
    "Doubles are found across files, the first by file and row stays, and a dropped row shadows nobody"
    rows = [dict(url="http://a/1", caption="x"), dict(url="http://a/2", caption="same"), dict(url="HTTP://A/1#top", caption="y"),
            dict(url="http://a/3", caption=" Same\n"), dict(url="http://a/2", caption="z"), dict(url="http://a/4", caption="y")]
    source = write(tmp_path / "in", rows, files=3)
    assert run(source, tmp_path / "out") == ([0, 1, 5], dict(step="filter", asked=6, kept=3, dropped={"same url": 2, "same caption": 1}))
    assert run(source, tmp_path / "urls", unique_captions=False)[0] == [0, 1, 3, 5]
    assert run(source, tmp_path / "captions", unique_urls=False)[0] == [0, 1, 2, 4]
    assert run(source, tmp_path / "neither", unique_urls=False, unique_captions=False)[0] == list(range(6))


WORDS = ["ass", "na", "c++ (code)", "a.b", "red light", "[x]", "straße", "木", "$p", "'); DROP TABLE judged; --"]


@pytest.mark.parametrize("text, found", [
    ("an ass", True), ("ASS!", True), ("glass", False), ("ass_", False), ("ass2", False), ("naïve", False), ("nai\u0308ve", False), ("na", True),
    ("(na)", True), ("use C++ (code) here", True), ("cxx (code)", False), ("a.b", True), ("axb", False), ("red\u3000\n light", True),
    ("infrared light", False), ("[x]", True), ("x", False), ("STRASSE", False), ("Straße", True), ("木", True), ("木材", False), ("$p", True),
    ("'); drop table judged; --", True), ("nothing here", False)])
def test_blocked_words_stand_between_boundaries(tmp_path, text, found):
    "Words are literal, boundaries are those of Unicode, and nothing in a list is taken for SQL or a pattern"
    (tmp_path / "words.txt").write_text("# a comment\n\n" + "\n".join(WORDS), encoding="utf-8")
    where, entry = run(write(tmp_path / "in", [dict(url="http://a/1", caption=text)]), tmp_path / "out", block=tmp_path / "words.txt")
    assert entry["dropped"] == ({"blocked word": 1} if found else {})


def test_a_long_list_of_words(tmp_path):
    "Three thousand words are one pattern, and the last of them is found"
    (tmp_path / "words.txt").write_text("\n".join(f"word{i} (x)" for i in range(3000)))
    rows = [dict(url=f"http://a/{i}", caption=f"has word{i} (x)") for i in (2999, 3000)]
    assert run(write(tmp_path / "in", rows), tmp_path / "out", block=tmp_path / "words.txt")[0] == [1]


@pytest.mark.parametrize("content, words", [(b"", "no words"), (b"# only this\n \n", "no words"), (b"\xff\xfe\0", "not a text in UTF-8")])
def test_a_list_of_words_that_is_none(tmp_path, content, words):
    "An empty or binary list is an error, not a rule that does nothing"
    (tmp_path / "words.txt").write_bytes(content)
    with pytest.raises(ValueError, match=words): block_pattern(tmp_path / "words.txt")


def test_a_missing_column_is_an_error_or_is_written_down(tmp_path):
    "The error names column and flag; with --allow-missing the rule is left out, and the card says so"
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(dict(url=["http://a/1"], caption=["a cat"], punsafe=[0.9], key=["k"])), tmp_path / "in" / "a.parquet")
    relaion = lambda out, **given: Filter(str(tmp_path / "in"), tmp_path / out, "re-laion", **{**OFF, **given})
    with pytest.raises(ValueError, match="'pwatermark' .*--watermark None .*--allow-missing"): relaion("out", watermark=0.5).run()
    with pytest.raises(ValueError, match="'aesthetic' .*--aesthetic None"): relaion("out", aesthetic=6.5).run()
    with pytest.raises(ValueError, match="'original_width' .*--min-side None"): relaion("out", min_side=1).run()
    assert not (tmp_path / "out").exists()
    assert relaion("out", aesthetic=6.5, watermark=0.5, unsafe=0.95, allow_missing=True).run() == 0
    assert len(kept(tmp_path / "out")) == 1
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "for want of a column: aesthetic, watermark." in card and "Rules: unsafe 0.95." in card
    with pytest.raises(ValueError, match="no column 'URL' .*it has url, caption, punsafe, key"):
        Filter(str(tmp_path / "in"), tmp_path / "no", "laion-2b-aesthetic", **OFF, allow_missing=True).run()


TABLES = {  # a row as its owner writes it, and what it becomes
    "plain": (dict(url="u", caption="c", key="k", width=5, height=6, aesthetic=7.0, extra="e"), dict(width=5, aesthetic=7.0, extra="e")),
    "re-laion": (dict(url="u", caption="c", key="k", width=256, height=256, original_width=800, original_height=600, similarity=0.3,
                      pwatermark=0.1, punsafe=0.2, md5="m"),
                 dict(key="k", width=800, height=600, source_width=256, similarity=0.3, watermark=0.1, safety=0.2, md5="m")),
    "laion-2b-aesthetic": (dict(URL="u", TEXT="c", WIDTH=800, HEIGHT=600, similarity=0.3, punsafe=0.2, pwatermark=0.1, aesthetic=6.6, hash=1),
                           dict(width=800, aesthetic=6.6, watermark=0.1, safety=0.2, hash=1)),
    "pd12m": (dict(id="i", url="u", caption="c", width=1, height=2, mime_type="image/jpeg", license="l"), dict(key="i", width=1, license="l")),
    "cc12m-wds": (dict(__key__="k", txt="c", json=dict(url="u", original_width=8, original_height=9, status="success")),
                  dict(key="k", width=8, height=9, json=dict(url="u", original_width=8, original_height=9, status="success"))),
    "diffusiondb": (dict(image_name="i.png", prompt="c", part_id=1, width=512, height=512, image_nsfw=2.0), dict(key="i.png", url=None, safety=2.0, part_id=1)),
    "journeydb": (dict(img_path="./0/a.jpg", prompt="p", Task2=dict(Caption="c")), dict(key="./0/a.jpg", url=None, prompt="p")),
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_known_table_comes_out_under_our_names(tmp_path, schema):
    "Url, caption, key, sizes and scores have our names, everything else keeps its own"
    given, want = TABLES[schema]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist([given]), tmp_path / "in" / "a.parquet")
    assert Filter(str(tmp_path / "in"), tmp_path / "out", schema, **OFF).run() == 0
    [row] = kept(tmp_path / "out")
    assert row["caption"] == "c" and row["url"] == want.get("url", "u") and {name: row[name] for name in want} == want
    assert list(row)[:2] == ["url", "caption"] and len({name.lower() for name in row}) == len(row)


def test_a_safety_score_may_be_a_word(tmp_path):
    "LAION-400M's labels are a scale from 0 to 1, in any capitals; numbers in text are numbers; anything else is no score"
    labels = ["UNLIKELY", "unsure", "NSFW", "0.1", "0.9", "?", None, "nan"]
    (tmp_path / "in").mkdir()
    table = dict(url=[f"http://a/{i}" for i in range(8)], caption=[f"c{i}" for i in range(8)], safety=labels)
    pq.write_table(pa.table(table), tmp_path / "in" / "a.parquet")
    Filter(str(tmp_path / "in"), tmp_path / "out", **{**OFF, "unsafe": 0.4}).run()
    assert [row["safety"] for row in kept(tmp_path / "out")] == [0.0, 0.1]
    assert read_funnel(tmp_path / "out")[-1]["dropped"] == {"no safety": 3, "unsafe": 3}


def test_the_command_line():
    "Flags become settings; None switches a rule off; a schema must be a known one"
    words = "in out --schema pd12m --aesthetic None --language en de --allow-missing --no-unique-captions --block b.txt"
    got = parse(Filter, words.split(), "sd-nb data filter")
    assert got == Filter("in", Path("out"), "pd12m", aesthetic=None, language=("en", "de"), allow_missing=True, unique_captions=False,
                         block=Path("b.txt"))
    with pytest.raises((ValueError, SystemExit)): parse(Filter, ["in", "out", "--schema", "laion"], "sd-nb data filter")


def test_rows_without_an_address_are_not_doubles_of_each_other(tmp_path):
    "Where a set has no addresses, there is no rule about them"
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist([dict(image_name=f"{i}.png", prompt=f"p{i}") for i in range(3)]), tmp_path / "in" / "a.parquet")
    Filter(str(tmp_path / "in"), tmp_path / "out", "diffusiondb", **OFF).run()
    assert [row["key"] for row in kept(tmp_path / "out")] == ["0.png", "1.png", "2.png"]


def test_the_same_rows_give_the_same_bytes(tmp_path):
    "In another place, with other threads and less memory; a second run of the same command changes nothing"
    rows = [dict(url=f"http://a/{i % 700}", caption=f"caption {i % 800}", aesthetic=float(i % 13)) for i in range(3000)]
    source = write(tmp_path / "in", rows, files=3)
    for name, limits in dict(a=dict(threads=1), b=dict(threads=3, memory="100MB"), c={}).items():
        run(source, tmp_path / name / "out", aesthetic=6.5, **limits)
        assert contents(tmp_path / name / "out") == contents(tmp_path / "a" / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "out").iterdir()}
    run(source, tmp_path / "c" / "out", aesthetic=6.5, threads=1)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"out"}


def test_another_setting_does_not_overwrite(tmp_path):
    "A finished directory is kept when settings, words or source are not those it was made with"
    source = write(tmp_path / "in", [dict(url="http://a/1", caption="a cat")])
    (tmp_path / "words.txt").write_text("dog")
    run(source, tmp_path / "out", block=tmp_path / "words.txt")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="made with another aesthetic, words;"): run(source, tmp_path / "out", aesthetic=1.0)
    (tmp_path / "words.txt").write_text("cat")
    with pytest.raises(ValueError, match="made with another words;"): run(source, tmp_path / "out", block=tmp_path / "words.txt")
    (tmp_path / "words.txt").write_text("dog")
    write(tmp_path / "in", [dict(url="http://a/1", caption="a cat")] * 2)
    with pytest.raises(ValueError, match="made with another contents;"): run(source, tmp_path / "out", block=tmp_path / "words.txt")
    assert contents(tmp_path / "out") == before
    (tmp_path / "full").mkdir(); (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(ValueError, match="not an empty directory"): run(source, tmp_path / "full")


def test_the_result_lies_outside_of_the_source(tmp_path):
    "A result inside of the source would make the source another one"
    source = write(tmp_path / "in", [dict(url="http://a/1", caption="a cat")])
    for out in (source / "out", source / "x" / ".." / "out"):
        with pytest.raises(ValueError, match="outside of the source"): run(source, out)
    assert os.listdir(source) == ["0.parquet"]


KILLER = """
import os, random, signal, sys, tempfile, time
from dataclasses import replace
from pathlib import Path
from sd_nb.data.metadata import Filter
source, out, times = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
command, interrupted = Filter(source, out, threads=1, aesthetic=6.5, similarity=None, min_side=None, max_aspect=None, min_caption=None,
                              max_caption=None, watermark=None, unsafe=None), 0
began = time.monotonic()
if (pid := os.fork()) == 0: os._exit(replace(command, out=Path(tempfile.mkdtemp()) / "out").run())
os.waitpid(pid, 0)
took = time.monotonic() - began
for i in range(times):
    if (pid := os.fork()) == 0: os._exit(command.run())
    time.sleep(random.Random(i).uniform(0.0, 0.8 * took))
    os.kill(pid, signal.SIGKILL)
    interrupted += os.WIFSIGNALED(os.waitpid(pid, 0)[1]) and not out.exists()
    assert not out.exists() or (out / "filter.json").is_file()
command.run()
print("interrupted", interrupted)
"""


@pytest.mark.parametrize("times", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_run_again_the_bytes_are_the_same(tmp_path, times):
    "SIGKILL at any moment leaves no result or a whole one, and the last run ends as one that nobody disturbed"
    rows = [dict(url=f"http://a/{i % 9000}", caption=f"caption {i % 9500}", aesthetic=float(i % 13)) for i in range(20_000)]
    source = write(tmp_path / "in", rows, files=6)
    run(source, tmp_path / "quiet" / "out", aesthetic=6.5)
    args = [sys.executable, "-c", KILLER, str(source), str(tmp_path / "killed" / "out"), str(times)]
    done = subprocess.run(args, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= times // 4, done.stdout
    assert contents(tmp_path / "killed" / "out") == contents(tmp_path / "quiet" / "out")
    assert os.listdir(tmp_path / "killed") == ["out"]


def test_fault_27_a_second_process_is_refused(tmp_path):
    "While one process holds the directory another one stops; what a dead one left behind is no obstacle"
    source, left = write(tmp_path / "in", [dict(url="http://a/1", caption="a cat")]), tmp_path / ".out.partial"
    left.mkdir(); (left / "00007.parquet").write_bytes(b"half"); (left / "work").mkdir()
    lock = os.open(left, os.O_RDONLY)
    flock(lock, LOCK_EX)
    with pytest.raises(ValueError, match="another process is writing it"): run(source, tmp_path / "out")
    assert (left / "00007.parquet").exists()
    os.close(lock)
    run(source, tmp_path / "out")
    assert "00007.parquet" not in contents(tmp_path / "out") and not left.exists()


def test_fault_21_captions_of_any_kind_have_a_verdict(tmp_path):
    "Empty, blank, missing, long, in any script, with control characters: all are counted, and what stays is unchanged"
    captions = [None, "", " \n\u3000", "\u200b\u200e", "x" * 1_000_000, "猫", "قطة", "a\0b", "\x1b[31m", "😀👩‍🚀", "a cat", "A  CAT"]
    rows = [dict(url=f"http://a/{i}", caption=caption) for i, caption in enumerate(captions)]
    where, entry = run(write(tmp_path / "in", rows), tmp_path / "out", max_caption=1000)
    assert entry["dropped"] == {"no caption": 4, "long caption": 1, "same caption": 1}
    assert [row["caption"] for row in kept(tmp_path / "out")] == captions[5:11]
    long = next(row for row in json.loads((tmp_path / "out" / "dropped.json").read_text()) if row["reason"] == "long caption")
    assert len(long["caption"]) == 200


def test_what_was_dropped_can_be_looked_at(tmp_path):
    "The first rows of each reason are noted with all that is known of them, but not all rows"
    rows = [dict(url=f"http://a/{i}", caption=f"c{i}", aesthetic=9.0 if i < 5 else float("nan") if i < 8 else 1.0) for i in range(99)]
    run(write(tmp_path / "in", rows, files=4), tmp_path / "out", aesthetic=6.5)
    noted = json.loads((tmp_path / "out" / "dropped.json").read_text())
    assert [(o["reason"], o["row"]) for o in noted] == [("no aesthetic", i) for i in (5, 6, 7)] + [("aesthetic", i) for i in range(8, 20)]
    assert noted[-1]["url"] == "http://a/19" and noted[-1]["aesthetic"] == 1.0


def test_a_filter_continues_the_funnel(tmp_path):
    "What was filtered can be filtered again, and the funnel tells of both"
    rows = [dict(url=f"http://a/{i}", caption=f"c{i}", aesthetic=float(i)) for i in range(9)]
    run(write(tmp_path / "in", rows), tmp_path / "a", aesthetic=3.0)
    where, _ = run(tmp_path / "a", tmp_path / "b", aesthetic=6.5)
    assert where == [7, 8] and [(o["asked"], o["kept"]) for o in read_funnel(tmp_path / "b")] == [(9, 6), (6, 2)]


def test_hostile_names(tmp_path):
    "Quotes, brackets and stars in names of files and columns are names, and columns that differ by capitals only are refused"
    (tmp_path / "it's [1]*").mkdir()
    names = ['a"b', "c'); DROP TABLE judged; --", "select", "a b"]
    pq.write_table(pa.table({"url": ["http://a/1"], "caption": ["a cat"], **{name: [i] for i, name in enumerate(names)}}), tmp_path / "it's [1]*" / "x[0]?.parquet")
    Filter(str(tmp_path / "it's [1]*"), tmp_path / "o'ut", **OFF).run()
    assert [row[name] for row in kept(tmp_path / "o'ut") for name in names] == [0, 1, 2, 3]
    (tmp_path / "plain").mkdir()
    for i, name in enumerate(["x0y", "x[0]?"]):  # the second name is a pattern for the first
        pq.write_table(pa.table(dict(url=[f"http://a/{i}"], caption=[name])), tmp_path / "plain" / f"{name}.parquet")
    Filter(str(tmp_path / "plain"), tmp_path / "both", **OFF).run()
    assert [row["caption"] for row in kept(tmp_path / "both")] == ["x0y", "x[0]?"]
    pq.write_table(pa.table(dict(url=["u"], URL=["v"], caption=["c"])), tmp_path / "two.parquet")
    with pytest.raises(ValueError, match="two columns have one name"): Filter(str(tmp_path / "two.parquet"), tmp_path / "out", **OFF).run()


@pytest.mark.parametrize("spoil, words", [
    (lambda path: path.write_bytes(b""), "not a whole Parquet file"), (lambda path: path.write_bytes(b"PAR1" * 9), "not a whole Parquet file"),
    (lambda path: path.write_bytes(path.read_bytes()[:-9]), "not a whole Parquet file"), (lambda path: path.unlink(), "neither Parquet files nor pictures")])
def test_a_broken_table_is_one_clear_line(tmp_path, spoil, words):
    "Empty, foreign, torn or missing: one line, and nothing is left behind"
    source = write(tmp_path / "in", [dict(url="http://a/1", caption="a cat")] * 50)
    spoil(source / "0.parquet")
    with pytest.raises(ValueError, match=words) as error: run(source, tmp_path / "out")
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["in"]


def test_a_table_broken_inside_is_one_clear_line(tmp_path):
    "Bytes that are wrong in the middle are found while reading"
    source = write(tmp_path / "in", [dict(url=f"http://a/{i}", caption=f"a cat {i}") for i in range(500)])
    data = bytearray((source / "0.parquet").read_bytes())
    data[4:2000] = bytes(1996)
    (source / "0.parquet").write_bytes(data)
    with pytest.raises(ValueError) as error: run(source, tmp_path / "out")
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("given, words", [(dict(memory="plenty"), "[Mm]emory"), (dict(threads=0), "thread"), (dict(aesthetic=math.nan), "--aesthetic nan"), (dict(max_aspect=math.inf), "--max-aspect inf"), (dict(block=Path("nowhere.txt")), "nowhere.txt")])
def test_settings_that_make_no_sense(tmp_path, given, words):
    "One line about the setting, and nothing is left behind"
    source = write(tmp_path / "in", [dict(url="http://a/1", caption="a cat", aesthetic=7.0, width=1, height=1)])
    with pytest.raises((ValueError, OSError), match=words) as error: run(source, tmp_path / "out", **given)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["in"]


def test_nothing_asked_and_nothing_kept(tmp_path):
    "A table without rows, and one of which nothing stays, are results too"
    for name, rows in dict(none=[], bad=[dict(url="http://a/1", caption="")]).items():
        where, entry = run(write(tmp_path / name, rows), tmp_path / f"{name}-out")
        assert where == [] and entry["asked"] == len(rows) and kept(tmp_path / f"{name}-out") == []


@pytest.mark.slow
def test_more_rows_than_memory(tmp_path):
    "A million rows with distinct captions are judged in a sixteenth of the memory that they fill, and doubles are still found"
    (tmp_path / "in").mkdir()
    n = 1_000_000
    pq.write_table(pa.table(dict(url=[f"http://host{i}.org/a/long/path/{i}" for i in range(n - 1)] + ["http://host0.org/a/long/path/0"],
                                 caption=[f"{i} is a caption that is not short at all, {i}" for i in range(n)])), tmp_path / "in" / "a.parquet")
    Filter(str(tmp_path / "in"), tmp_path / "out", **OFF, memory="128MB").run()
    assert read_funnel(tmp_path / "out")[-1] == dict(step="filter", asked=n, kept=n - 1, dropped={"same url": 1})
