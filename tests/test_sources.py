import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sd_nb.data.funnel import read_funnel
from sd_nb.data.images import read_shards, write_shards
from sd_nb.data.metadata import Filter
from sd_nb.data.sources import folder_table, from_folder, from_hub, from_parquet, has_column, local_samples

OFF = dict(aesthetic=None, similarity=None, min_side=None, max_aspect=None, min_caption=None, max_caption=None, watermark=None,
           unsafe=None)
COMMIT = "0123456789abcdef" * 2 + "01234567"


def picture(path, size=(8, 6), **options):
    "A picture in a folder that is made if need be"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path, **options)
    return path


def rows(folder, **names):
    "What the table of a folder says, by path"
    return {row.pop("path"): row for row in folder_table(folder).to_pylist()}


def test_captions_lie_beside_the_pictures(tmp_path):
    "In any folder below; suffixes may have capitals; other files are no pictures; keys are the places in the order of paths"
    for name in ("b.PNG", "a/x.jpg", "a/y.webp"): picture(tmp_path / name)
    (tmp_path / "b.txt").write_text("ein Bär", encoding="utf-8")
    (tmp_path / "a" / "x.txt").write_bytes(b"\xff\xfe not a text")
    (tmp_path / "a" / "notes.md").write_text("no picture")
    assert rows(tmp_path) == {
        "a/x.jpg": dict(key="000000000", caption=None, width=8, height=6),
        "a/y.webp": dict(key="000000001", caption=None, width=8, height=6),
        "b.PNG": dict(key="000000002", caption="ein Bär", width=8, height=6)}


def test_captions_stand_in_a_listing(tmp_path):
    "metadata.jsonl and metadata.csv give captions and scores; what the listing does not name has the text beside it"
    lines = [dict(file_name="a.png", text="from json", aesthetic=7.5, tags=["x"]), dict(file_name="b.png", caption=None)]
    for kind in ("jsonl", "csv"):
        for name in "abc": picture(tmp_path / kind / f"{name}.png")
        (tmp_path / kind / "c.txt").write_text("beside")
    (tmp_path / "jsonl" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "csv" / "metadata.csv").write_text('file_name,caption,aesthetic\na.png,"from, csv",7.5\nb.png,,\n')
    found = rows(tmp_path / "jsonl")
    assert [row["caption"] for row in found.values()] == ["from json", None, "beside"]
    assert (found["a.png"]["aesthetic"], found["a.png"]["tags"], found["c.png"]["aesthetic"]) == ("7.5", '["x"]', None)
    assert [row["caption"] for row in rows(tmp_path / "csv").values()] == ["from, csv", None, "beside"]
    assert Filter(str(tmp_path / "csv"), tmp_path / "out", **{**OFF, "aesthetic": 6.5}).run() == 0
    assert read_funnel(tmp_path / "out")[-1]["dropped"] == {"no aesthetic": 1, "no caption": 1}


@pytest.mark.parametrize("name, text, words", [
    ("metadata.jsonl", "{", "metadata.jsonl: cannot be read"), ("metadata.jsonl", "[1]", "must have a file_name"),
    ("metadata.jsonl", '{"file_name": 3}', "must have a file_name"), ("metadata.csv", "name,caption\na.png,x\n", "must have a file_name"),
    ("metadata.jsonl", '{"file_name": "lost.png"}', "'lost.png', which is no picture in it"),
    ("metadata.jsonl", '{"file_name": "../secret.png"}', "'../secret.png', which is no picture in it")])
def test_a_listing_that_is_wrong_is_one_clear_line(tmp_path, name, text, words):
    "Torn, without names, of pictures that are not there or outside of the folder"
    picture(tmp_path / "secret.png"); picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / name).write_text(text)
    with pytest.raises(ValueError) as error: folder_table(tmp_path / "in")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_fault_19_pictures_that_are_none_have_no_size(tmp_path):
    "Empty, torn, text, a format that is not allowed: no size, counted as such; a turned picture has the size that one sees"
    for name in ("empty", "text", "gif", "torn"): picture(tmp_path / "in" / f"{name}.png", (64, 64))
    (tmp_path / "in" / "empty.png").write_bytes(b"")
    (tmp_path / "in" / "text.png").write_text("<html>")
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "gif.png", format="GIF")
    whole = (tmp_path / "in" / "torn.png").read_bytes()
    (tmp_path / "in" / "torn.png").write_bytes(whole[:len(whole) // 2])
    exif = Image.Exif()
    exif[274] = 6
    picture(tmp_path / "in" / "turned.jpg", (20, 10), exif=exif)
    for path in list((tmp_path / "in").iterdir()): path.with_suffix(".txt").write_text(f"caption of {path.name}")
    sizes = {name: (row["width"], row["height"]) for name, row in rows(tmp_path / "in").items()}
    assert sizes == {"empty.png": (None, None), "gif.png": (None, None), "text.png": (None, None), "torn.png": (None, None), "turned.jpg": (10, 20)}
    Filter(str(tmp_path / "in"), tmp_path / "out", **{**OFF, "min_side": 1}).run()
    assert read_funnel(tmp_path / "out")[-1] == dict(step="filter", asked=5, kept=1, dropped={"no size": 4})


def test_from_a_folder_to_shards(tmp_path):
    "What stays of a folder goes into shards, each picture with its own caption"
    colors = dict(a="red", b="green", c="blue")
    for name, color in colors.items():
        Image.new("RGB", (16, 16), color).save(picture(tmp_path / "in" / "x" / f"{name}.png"))
        (tmp_path / "in" / "x" / f"{name}.txt").write_text(f"{color} square" if name != "b" else "")
    Filter(str(tmp_path / "in"), tmp_path / "rows", **OFF).run()
    write_shards(local_samples(tmp_path / "rows", tmp_path / "in"), tmp_path / "shards")
    found = {sample.caption: sample.image.convert("RGB").getpixel((8, 8)) for sample in read_shards(tmp_path / "shards")}
    assert found == {"red square": (255, 0, 0), "blue square": (0, 0, 255)}
    Filter(str(tmp_path / "rows"), tmp_path / "again", **OFF).run()
    assert read_funnel(tmp_path / "again")[-1]["kept"] == 2


def test_fault_18_a_path_that_leads_out_of_the_folder(tmp_path):
    "A table that names a picture elsewhere is refused"
    picture(tmp_path / "secret.png"); (tmp_path / "in").mkdir()
    for path in ("../secret.png", str(tmp_path / "secret.png")):
        pq.write_table(pa.table(dict(path=[path], key=["k"], caption=["c"])), tmp_path / "in" / "a.parquet")
        with pytest.raises(ValueError, match="leads out of the folder"): list(local_samples(tmp_path / "in", tmp_path / "in"))


def test_who_takes_what(tmp_path):
    "A file and a directory of Parquet are taken as they are, in order of name; a folder without pictures is an error"
    for name in ("b.parquet", "a.parquet", ".hidden.parquet", "c.txt"): (tmp_path / name).write_bytes(b"")
    assert from_parquet(str(tmp_path), {}, tmp_path) == [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    assert from_parquet(str(tmp_path / "b.parquet"), {}, tmp_path) == [tmp_path / "b.parquet"]
    assert from_parquet(str(tmp_path / "no"), {}, tmp_path) is None and from_folder(str(tmp_path / "no"), {}, tmp_path) is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither Parquet files nor pictures"): from_folder(str(tmp_path / "empty"), {}, tmp_path)


def test_columns_inside_others():
    "A dot leads into a struct, and only into a struct"
    table = pa.schema([("a", pa.struct([("b", pa.struct([("c", pa.string())]))])), ("d", pa.string())])
    names = dict.fromkeys(["a", "a.b", "a.b.c", "d"], True) | dict.fromkeys(["c", "a.c", "a.b.c.e", "d.b", "a."], False)
    assert {name: has_column(table, name) for name in names} == names


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A directory that stands for a data set on the Hub, and no network"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets
    data = dict(url=[f"https://a.example/{i}" for i in range(250)], caption=[f"caption {i}" for i in range(250)], score=list(range(250)))
    (tmp_path / "hub").mkdir()
    pictures = datasets.Dataset.from_dict(dict(data, image=[dict(bytes=b"no picture at all", path=None)] * 250))
    pictures.cast_column("image", datasets.Image()).to_parquet(tmp_path / "hub" / "train.parquet")
    return tmp_path / "hub"


def test_a_data_set_on_the_hub_is_streamed_at_a_commit(hub, tmp_path, monkeypatch):
    "Rows come in batches, in order, without pictures, which are not even decoded"
    monkeypatch.setattr("sd_nb.data.sources.BATCH", 100)
    (tmp_path / "staging").mkdir()
    files = from_hub(str(hub), dict(revision=COMMIT, split="train"), tmp_path / "staging")
    tables = [pq.read_table(path) for path in files]
    assert [len(table) for table in tables] == [100, 100, 50] and tables[0].column_names == ["url", "caption", "score"]
    assert [i for table in tables for i in table["score"].to_pylist()] == list(range(250))


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:12], COMMIT.upper(), COMMIT + "0"])
def test_only_a_whole_commit_is_a_revision(tmp_path, revision):
    "A branch, a tag or a shortened commit is refused before anything is asked of the network"
    with pytest.raises(ValueError, match="needs --revision with the 40 digits of a commit"):
        Filter("somebody/something", tmp_path / "out", revision=revision).run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, split, words", [("nobody/nothing", "train", "nobody/nothing at 0123456789ab"), (None, "test", "test")])
def test_fault_33_without_network_it_is_one_clear_line(hub, tmp_path, name, split, words):
    "An unknown data set and an unknown split end with one line"
    with pytest.raises(ValueError, match=words) as error: from_hub(name or str(hub), dict(revision=COMMIT, split=split), tmp_path)
    assert "\n" not in str(error.value)


def test_the_filter_reads_the_hub(hub, tmp_path, monkeypatch):
    "From the Hub to rows, with the commit on the card"
    monkeypatch.setattr("sd_nb.data.metadata.SOURCES", [from_hub])
    Filter(str(hub), tmp_path / "out", **OFF, revision=COMMIT).run()
    assert read_funnel(tmp_path / "out")[-1]["kept"] == 250 and COMMIT in (tmp_path / "out" / "README.md").read_text()
    assert sorted(path.name for path in Path(tmp_path / "out").glob("*.parquet")) == ["00000.parquet"]
