"""A data set is cleaned with every loss counted and every caption kept with its own picture; runs that broke off go on."""
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings, strategies as st
from PIL import Image

from sd_nb.config import parse
from sd_nb.data.clean import TABLE, Clean, add_to_report, new_report, notes_of
from sd_nb.data.images import read_files
from sd_nb.data.publish import examples
from sd_nb.model.tokenizer import Tokenizer


def picture(i, size=(16, 16)):
    "A picture that tells its number: no two are alike, and none is blank."
    pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(data := io.BytesIO(), "PNG")
    return data.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def members_of(key, i, caption=None, meta=None):
    files = [(f"{key}.png", picture(i))]
    if caption is not None: files.append((f"{key}.txt", caption if isinstance(caption, bytes) else caption.encode()))
    if meta is not None: files.append((f"{key}.json", meta if isinstance(meta, bytes) else json.dumps(meta).encode()))
    return files


def clean(folder, **how):
    Clean(folder / "shards", folder / "clean", **{"alike": None} | how).run()
    return folder / "clean"


def table(out, name="*"):
    return [row for path in sorted(out.glob(f"{name}.parquet")) for row in pq.read_table(path).to_pylist()]


def seen(out):
    return {row["key"]: row for row in table(out / "seen")}


def last(out):
    return json.loads((out / "funnel.json").read_text())[-1]


# --- the command

def test_every_reason_is_counted(tmp_path):
    """Each rule drops its picture under its name, the counts add up, and the list of the step before is carried on."""
    Image.new("RGB", (16, 16), "white").save(white := io.BytesIO(), "PNG")
    write_tar(tmp_path / "shards/00000.tar", [
        *members_of("good", 1, "a &amp; b, both good"), *members_of("empty", 2, " \n"), *members_of("short", 3, "ox"),
        *members_of("blocked", 4, "a stock photo"), ("blank.png", white.getvalue()), ("blank.txt", b"a white wall"),
        ("broken.png", picture(5)[:99]), ("broken.txt", b"a broken one"), ("none.txt", b"no picture at all")])
    write_tar(tmp_path / "shards/00001.tar", [
        *members_of("twin", 1, "the good one again"), *members_of("listed", 7, "no", dict(captions=["one", "two"], weights=[1, 3])),
        *members_of("unweighed", 8, "no", dict(captions=["one", "two"], weights=[1])), *members_of("other", 9, "held", dict(split="test")),
        *members_of("inside", 10, None, dict(caption="from the JSON"))])
    (tmp_path / "shards/funnel.json").write_text(json.dumps([dict(step="download", asked=20, kept=12, dropped={"404": 8})]))
    out = clean(tmp_path, alike=0, block_file=words(tmp_path), columns=())
    assert {row["key"]: row["caption"] for row in table(out)} == {
        "good": "a & b, both good", "listed": "one", "other": "held", "inside": "from the JSON"}
    assert last(out) == dict(step="clean", asked=12, kept=4, dropped={
        "empty": 1, "too short": 1, "blocked word": 1, "blank picture": 1, "undecodable": 2, "bad weights": 1, "look-alike": 1})
    assert len(json.loads((out / "funnel.json").read_text())) == 2
    row = next(row for row in table(out) if row["key"] == "listed")
    assert (row["captions"], row["weights"], row["split"]) == (["one", "two"], [0.25, 0.75], "train")
    assert {row["split"] for row in table(out)} == {"train", "test"}
    assert "broken.png cannot be read" in seen(out)["broken"]["note"] and "no picture" in seen(out)["none"]["note"]
    report = json.loads((out / "report.json").read_text())
    assert report["changed"] == {"entities": 1, "spaces": 1, "controls": 1} and report["examples"] == [["a &amp; b, both good", "a & b, both good"]]
    assert "2 captions have the weights [1]" in seen(out)["unweighed"]["note"] and seen(out)["twin"]["reason"] is None


def words(folder):
    (folder / "words.txt").write_text("stock photo\n\n")
    return folder / "words.txt"


def test_the_card_has_a_head_that_the_hub_reads(tmp_path):
    """License and task in YAML, then the whole funnel, what was changed and how long captions are; no place of this machine."""
    from huggingface_hub import DatasetCard
    write_tar(tmp_path / "shards/00000.tar", [*members_of("a", 1, "a &amp; b"), *members_of("b", 2, "")])
    (tmp_path / "shards/funnel.json").write_text(json.dumps([dict(step="download", asked=9, kept=2, dropped={"404": 7})]))
    strange = 'a"\n---\nb: c'
    text = (clean(tmp_path, license=strange) / "README.md").read_text()
    card = DatasetCard(text)
    assert card.data.license == strange and not hasattr(card.data, "b") and card.data.task_categories == ["text-to-image"]
    for line in ("| download | 9 | 2 | 404: 7 |", "| clean | 2 | 1 | empty: 1 |", "1 captions.", "entities in 1"): assert line in text
    assert str(tmp_path) not in text and "tokens" not in text


def test_table_is_as_agreed(tmp_path):
    """The columns, the size of the picture as it is seen, its bucket and a hash of 16 digits."""
    turned = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 60, 3)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn me a quarter
    turned.save(data := io.BytesIO(), "JPEG", exif=exif)
    write_tar(tmp_path / "shards/00000.tar", [("a.jpg", data.getvalue()), ("a.txt", b"a tall one")])
    (row,) = table(clean(tmp_path, size=256, step=32))
    assert list(row) == TABLE.names == ["key", "caption", "captions", "weights", "width", "height", "bucket_width", "bucket_height",
                                        "phash", "split"]
    assert (row["width"], row["height"]) == (20, 60) and (row["bucket_width"], row["bucket_height"]) == (192, 320)
    assert len(row["phash"]) == 16 and 0 <= int(row["phash"], 16) < 2**64


def test_look_alikes_need_the_whole_set(tmp_path):
    """The first in order stays over the borders of shards; what was dropped by another rule keeps nobody out."""
    write_tar(tmp_path / "shards/00000.tar", [*members_of("a", 1, ""), *members_of("b", 1, "kept one"), *members_of("c", 2, "other")])
    write_tar(tmp_path / "shards/00001.tar", [*members_of("d", 1, "again"), *members_of("e", 3, "third")])
    assert [row["key"] for row in table(clean(tmp_path, alike=3))] == ["b", "c", "e"]


def test_report():
    """Changes are counted for all pictures, lengths for those that stay, and examples end at twelve."""
    report = new_report()
    row = dict(captions=["a", "b"], caption="a", tokens=[77, 78], changes=["tags", "spaces"], before="<b>a", reason=None)
    add_to_report(report, [row] * 20 + [row | dict(reason="empty", tokens=[999])] + [row | dict(changes=None, before=None, tokens=[None] * 2)])
    assert report["changed"] == {"tags": 21, "spaces": 21} and len(report["examples"]) == 12
    assert (report["captions"], report["cut"], report["longest"]) == (42, 20, 78)
    assert notes_of(report) == ["42 captions. The longest has 78 tokens; 20 are cut at 77.", "Changed by cleaning: spaces in 21, tags in 21."]
    assert notes_of(new_report()) == ["0 captions.", "Changed by cleaning: nothing."]


def three_shards(folder):
    for n in range(3):
        write_tar(folder / f"shards/{n:05d}.tar", [m for i in range(4) for m in members_of(f"{n}{i}", i + 3 * n, f"picture {n} {i}")])
    return folder


def contents(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_a_broken_off_run_goes_on(tmp_path, monkeypatch):
    """Cut off at any of its writes, a run leaves whole files only; the next one finishes it with the same bytes, looking at no shard twice."""
    whole, step, replace = contents(clean(three_shards(tmp_path), alike=3)), 0, os.replace
    reads, again = [], tmp_path / "again/clean"
    monkeypatch.setattr("sd_nb.data.clean.read_files", lambda path: reads.append(path.name) or read_files(path))
    while True:
        left = [step]

        def breaking(source, target):
            if not left[0]: raise KeyboardInterrupt
            left[0] -= 1
            replace(source, target)

        monkeypatch.setattr(os, "replace", breaking)
        try: Clean(tmp_path / "shards", again, alike=3).run()
        except KeyboardInterrupt: pass
        else: break
        finally: monkeypatch.setattr(os, "replace", replace)
        assert {name: data for name, data in contents(again).items() if "/." not in f"/{name}" and whole[name] != data} == {}
        assert not (again / "funnel.json").exists()
        before = len(reads)
        done = {path.stem for path in (again / "seen").glob("*.parquet")}
        Clean(tmp_path / "shards", again, alike=3).run()
        assert contents(again) == whole and {name.split(".")[0] for name in reads[before:]} == {"00000", "00001", "00002"} - done
        shutil.rmtree(again)
        step += 1
    assert step == 1 + 3 + 3 + 4  # clean.json, tables seen, tables of what stays; report, picture, card, funnel


KILLER = """
import os, signal, sys
from pathlib import Path
from sd_nb.data.clean import Clean
from sd_nb.data.latents import HashedFile
left, write = int(sys.argv[3]), HashedFile.write

def half(self, data):
    global left
    if left: left -= 1; return write(self, data)
    self.file.write(bytes(data)[: len(bytes(data)) // 2])
    self.file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

HashedFile.write = half
Clean(Path(sys.argv[1]), Path(sys.argv[2]), alike=3).run()
"""


@pytest.mark.parametrize("writes", [0, 2, 8], ids=["settings", "a look", "the card"])
def test_killed_in_the_middle_of_a_file(tmp_path, writes):
    """Kill -9 while half of a file is on the disk: the next run finishes with the same bytes, and nothing is left over."""
    whole, out = contents(clean(three_shards(tmp_path), alike=3)), tmp_path / "again/clean"
    done = subprocess.run([sys.executable, "-c", KILLER, str(tmp_path / "shards"), str(out), str(writes)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    assert [name for name in contents(out) if name.endswith(".partial")] and not (out / "funnel.json").exists()
    Clean(tmp_path / "shards", out, alike=3).run()
    assert contents(out) == whole


@pytest.mark.parametrize("change", [dict(least=4), dict(block=("x",)), dict(alike=2), dict(size=256), dict(columns=("caption",)),
                                    dict(contrast=1.0), dict(max_aspect=1.5), dict(step=32)])
def test_other_settings_are_refused(tmp_path, change):
    """Each setting that the tables depend on is compared, and the difference is named; nothing is touched."""
    out = clean(three_shards(tmp_path))
    before = contents(out)
    with pytest.raises(ValueError, match=f"something else.*{next(iter(change))} was .*, is ") as caught: clean(tmp_path, **change)
    assert "\n" not in str(caught.value) and contents(out) == before


def test_other_words_and_other_shards_are_refused(tmp_path):
    """So are another list of words in the same file, a shard more, and a shard of another size."""
    out = clean(three_shards(tmp_path), block_file=words(tmp_path))
    clean(tmp_path, block_file=words(tmp_path))
    (tmp_path / "words.txt").write_text("picture\n")
    with pytest.raises(ValueError, match="words was"): clean(tmp_path, block_file=tmp_path / "words.txt")
    words(tmp_path)
    write_tar(tmp_path / "shards/00003.tar", members_of("x", 1, "one more"))
    with pytest.raises(ValueError, match="00003 was None, is"): clean(tmp_path, block_file=tmp_path / "words.txt")
    (tmp_path / "shards/00003.tar").unlink()
    write_tar(tmp_path / "shards/00002.tar", [m for i in range(40) for m in members_of(f"x{i}", i, "one more")])
    with pytest.raises(ValueError, match="00002 was"): clean(tmp_path, block_file=tmp_path / "words.txt")
    assert last(out)["asked"] == 12


@pytest.mark.parametrize("how, error", [
    (dict(size=500), "size 500"), (dict(alike=64), "k=64"), (dict(weights=(1.0,)), "needs --columns"),
    (dict(columns=("a", "b"), weights=(1.0,)), "2 captions"), (dict(tokenizer=Path("nowhere")), "tokenizer"),
    (dict(block_file=Path("nowhere.txt")), "nowhere.txt")])
def test_bad_settings_write_nothing(tmp_path, how, error):
    """Settings that cannot be are found before anything is read or written."""
    with pytest.raises((ValueError, OSError), match=error): clean(three_shards(tmp_path), **how)
    assert not (tmp_path / "clean").exists()


def test_a_strange_directory_is_not_written_to(tmp_path):
    """A directory with something else in it stays as it is, the shards' own above all."""
    before = contents(three_shards(tmp_path))
    with pytest.raises(ValueError, match="not an empty directory"): Clean(tmp_path / "shards", tmp_path / "shards").run()
    assert contents(tmp_path) == before


def test_a_cut_shard_is_named(tmp_path):
    """An archive that ends too early is no matter of one picture: the run stops and names it."""
    path = three_shards(tmp_path) / "shards/00001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="00001.tar: not a whole tar archive"): clean(tmp_path)
    assert not (tmp_path / "clean/funnel.json").exists()


def test_command_line():
    """The flags arrive, and every field has a line of help."""
    got = parse(Clean, ["in", "out", "--columns", "caption", "alt", "--weights", "1", "2", "--alike", "None"], "sd-nb clean")
    assert got == Clean(Path("in"), Path("out"), columns=("caption", "alt"), weights=(1.0, 2.0), alike=None)
    assert {f.name for f in dataclasses.fields(Clean)} >= {"shards", "out", "license", "tokenizer"}


# --- faults

HARD = {"empty": "", "space": " \t\n ", "megabyte": "a very long word " * 62_000, "one-word": "x" * 200_000, "long": "a horse " * 100,
        "emoji": "👩‍🚀 🏳️‍🌈 😀", "cjk": "漢字かな 猫が好き", "rtl": "مرحبا بالعالم שלום", "nul": "a\x00nul\x00inside", "control": "\x01a\x07b\x1bc\x9fd",
        "bidi": "a\u202eb\u202cc", "marks": "cafe\u0301 Zo\u0308e", "twin-1": "the same caption", "twin-2": "the same caption",
        "marker": "a <|endoftext|> cat", "bytes": b"\xff\xfe\x00 not utf-8", "latin-1": "caf\xe9".encode("latin-1"), "bom": b"\xef\xbb\xbfwith a mark"}
JSONS = {"none": dict(caption=None), "number": dict(caption=7), "lone": b'{"caption": "a lone \\ud800 half"}', "dict": dict(captions={"a": 1}),
         "mixed": dict(captions=[None, "one text", 3, ["x"]]), "no-json": b"{", "list": b"[1]", "deep": b"[" * 100_000,
         "split": b'{"caption": "strange split", "split": "\\ud800"}', "nested": dict(captions=[["a"]])}


def test_fault_21_captions_of_all_kinds(tmp_path):
    """Whatever a caption is, the run ends, each is counted once, and what stays has the ids that transformers gives it."""
    from transformers import CLIPTokenizer
    texts = [text for text in HARD.values() if isinstance(text, str)]
    ours = Tokenizer.train([text[:200] for text in texts], vocab_size=700)
    ours.save_pretrained(tmp_path / "tokenizer")
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    write_tar(tmp_path / "shards/00000.tar", [
        *(m for i, (key, text) in enumerate(HARD.items()) for m in members_of(key, i, text)),
        *(m for i, (key, meta) in enumerate(JSONS.items(), 100) for m in members_of(key, i, None, meta)), *members_of("alone", 200)])
    out = clean(tmp_path, tokenizer=tmp_path / "tokenizer")
    rows = {row["key"]: row for row in table(out)}
    why = {key: row["reason"] for key, row in seen(out).items()}
    assert {key for key, reason in why.items() if reason == "empty"} == {"empty", "space", "none", "number", "dict", "nested", "alone"}
    assert {key for key, reason in why.items() if reason == "undecodable"} == {"bytes", "latin-1", "no-json", "list", "deep"}
    assert set(rows) == {key for key, reason in why.items() if reason is None} and len(why) == len(HARD) + len(JSONS) + 1
    assert rows["nul"]["caption"] == "anulinside" and rows["control"]["caption"] == "abcd" and rows["marks"]["caption"] == "café Zöe"
    assert rows["lone"]["caption"] == "a lone half" and rows["mixed"]["captions"] == ["one text"] and rows["marker"]["caption"] == "a cat"
    assert rows["twin-1"]["caption"] == rows["twin-2"]["caption"] and rows["bom"]["caption"] == "with a mark"
    assert rows["split"]["split"] == "\\ud800"
    full = {key: theirs(row["caption"]).input_ids for key, row in rows.items()}
    for key, ids in full.items():
        want = ids if len(ids) <= 77 else ids[:76] + ids[-1:]
        assert ours(rows[key]["caption"])[0].tolist() == want + [theirs.pad_token_id] * (77 - len(want)), key
        assert seen(out)[key]["tokens"] == [len(ids)], key
    report = json.loads((out / "report.json").read_text())
    assert report["cut"] == sum(len(ids) > 77 for ids in full.values()) >= 3
    assert report["longest"] == max(n for key in rows for n in seen(out)[key]["tokens"])


name = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="./\x00"), min_size=1, max_size=12)
keys = st.one_of(name, st.lists(name, min_size=2, max_size=3).map("/".join), st.integers(1, 120).map(str), st.sampled_from(
    ["a/b", "a_b", "a b", "A/b", "1", "10", "100", "01", "é", "e\u0301", "猫" * 84, "x" * 251, "x" * 250, "👩‍🚀", "a\\b", "-", "txt", "png"]))


@settings(max_examples=40, deadline=None)
@given(keys=st.lists(keys, min_size=1, max_size=8, unique=True), cut=st.integers(0, 8))
@example(keys=["a/b", "a_b", "1", "10", "é", "e\u0301", "猫" * 84, "x" * 251], cut=4)
def test_fault_22_keys_that_are_nearly_the_same(tmp_path_factory, keys, cut):
    """Each picture keeps its own caption, whatever the keys are, in the tables and in the data set that is made of them."""
    folder = tmp_path_factory.mktemp("keys")
    parts = [part for part in (keys[:cut], keys[cut:]) if part]
    for n, part in enumerate(parts):
        write_tar(folder / f"shards/{n:05d}.tar", [m for key in part for m in members_of(key, keys.index(key), f"picture {keys.index(key)}")])
    out = clean(folder)
    assert {row["key"]: row["caption"] for row in table(out)} == {key: f"picture {i}" for i, key in enumerate(keys)}
    shown = {row["key"]: row for row in examples(str(out), "train", "")}
    assert {key: (row["image"]["bytes"], row["caption"]) for key, row in shown.items()} == {
        key: (picture(i), f"picture {i}") for i, key in enumerate(keys)}


@pytest.mark.parametrize("shards", [
    [[*members_of("7", 1, "one"), *members_of("7", 2, "two")]], [[*members_of("7", 1, "one"), *members_of("8", 2, "two"), *members_of("7", 3, "x")]],
    [members_of("7", 1, "one"), members_of("7", 2, "two")], [[("7.png", picture(1)), ("7.webp", picture(2)), ("7.txt", b"one")]],
    [[("7.png", picture(1)), ("7.txt", b"one"), ("7.txt", b"two")]], [[("7.png", picture(1)), ("8.png", picture(2)), ("7.txt", b"one")]]])
def test_fault_22_two_pictures_of_one_key(tmp_path, shards):
    """Whose caption it is nobody can say: next to each other, apart, in two shards, or with files out of order, it is an error."""
    for n, members in enumerate(shards): write_tar(tmp_path / f"shards/{n:05d}.tar", members)
    with pytest.raises(ValueError, match=r"0000.\.(tar|parquet): .*(key '7'|7\.(png|txt) is there twice)"): clean(tmp_path)
    assert not (tmp_path / "clean/funnel.json").exists()


def test_fault_22_a_key_that_is_not_unicode(tmp_path):
    """A name that no table can hold is an error that spells it."""
    write_tar(tmp_path / "shards/00000.tar", [("aXb.png", picture(1)), ("aXb.txt", b"one")])
    path = tmp_path / "shards/00000.tar"
    data = path.read_bytes()
    fixed = bytearray(data)
    for start in range(0, len(data), 512):
        if data[start:start + 3] == b"aXb":
            fixed[start + 1] = 0xFF
            total = sum(fixed[start:start + 148]) + 8 * 32 + sum(fixed[start + 156:start + 512])
            fixed[start + 148:start + 156] = b"%06o\0 " % total
    path.write_bytes(fixed)
    with pytest.raises(ValueError, match=r"a\\udcffb is no name in UTF-8"): clean(tmp_path)


def test_counts_add_up_whatever_comes(tmp_path):
    """Asked is kept and dropped together, and the tables hold exactly what was kept."""
    rng = np.random.default_rng(0)
    kinds = ["", "ox", "a fine one", "an ass", None]
    texts = [kinds[i] for i in rng.integers(0, 5, 60)]
    write_tar(tmp_path / "shards/00000.tar", [m for i, text in enumerate(texts) for m in members_of(f"{i}", i % 40, text)])
    out = clean(tmp_path, block=("ass",), alike=0)
    entry, count = last(out), Counter(texts)
    assert entry["asked"] == 60 == entry["kept"] + sum(entry["dropped"].values()) and len(table(out)) == entry["kept"]
    assert entry["dropped"]["empty"] == count[""] + count[None] and entry["dropped"]["blocked word"] == count["an ass"]
