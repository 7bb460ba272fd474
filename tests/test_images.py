"""sd_nb.data.images: shards are read, written and refused as promised."""
import gzip, io, json, tarfile
import numpy as np, pyarrow.parquet as pq, pytest, webdataset
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from sd_nb.data.images import (Sample, as_png, as_webp, find_shards, read_shard, read_shards, square, versions, write_shards)


def picture(seed, size=(20, 12)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))

def samples(n): return [Sample(f"{i:04d}", picture(i), f"picture {i}, é", dict(split="train", tags=["a", "b"])) for i in range(n)]

def same(a, b): return np.array_equal(np.asarray(a.convert("RGB")), np.asarray(b.convert("RGB")))

def pack(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name); info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path

PNG = as_png(samples(1)[0])[1]

@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("encode", [as_png, as_webp])
def test_round_trip(tmp_path, encode, compress):
    """What is written is read back: keys, captions, facts and every pixel, in order."""
    paths = write_shards(samples(25), tmp_path / "out", per_shard=10, encode=encode, compress=compress)
    assert [p.name for p in paths] == [f"0000{i}.tar{'.gz' if compress else ''}" for i in range(3)]
    back = list(read_shards(tmp_path / "out"))
    for a, b in zip(samples(25), back, strict=True):
        assert (a.key, a.caption) == (b.key, b.caption) and same(a.image, b.image)
        assert b.meta["tags"] == ["a", "b"] and b.meta["url"] is None and (b.meta["width"], b.meta["height"]) == (20, 12)

@pytest.mark.parametrize("compress", [False, True])
def test_same_bytes(tmp_path, compress):
    """The same samples give the same bytes, in every file of the shard, wherever they are written."""
    for name in ("a", "other_name"): write_shards(samples(12), tmp_path / name, per_shard=5, compress=compress)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert len(files) == 9
    for name in files: assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "other_name" / name).read_bytes(), name

def test_table_and_statistics(tmp_path):
    """Beside each archive stand a table with one row a sample and statistics with count, checksum and versions."""
    write_shards(samples(7), tmp_path / "out", per_shard=4, notes=dict(sources=["x"]))
    rows = pq.read_table(tmp_path / "out/00001.parquet").to_pylist()
    assert [row["key"] for row in rows] == ["0004", "0005", "0006"] and rows[0]["caption"] == "picture 4, é"
    stats = json.loads((tmp_path / "out/00001_stats.json").read_text())
    assert stats["count"] == stats["successes"] == 3 and stats["sources"] == ["x"] and stats["encoders"] == versions()

def test_webdataset_reads_it(tmp_path):
    """The webdataset library sees the same samples, gzipped or not."""
    for compress in (False, True):
        paths = write_shards(samples(6), tmp_path / str(compress), per_shard=4, compress=compress)
        theirs = list(webdataset.WebDataset([str(p) for p in paths], shardshuffle=False).decode("pil"))
        for ours, their in zip(samples(6), theirs, strict=True):
            assert (their["__key__"], their["txt"], their["json"]["split"]) == (ours.key, ours.caption, "train")
            assert same(their["webp"], ours.image)

def test_reads_what_webdataset_writes(tmp_path):
    """A shard made by the webdataset library is read: other suffixes are passed over, a caption may be in the JSON only."""
    with webdataset.TarWriter(str(tmp_path / "00000.tar")) as sink:
        sink.write({"__key__": "a/000000001", "jpg": picture(1), "txt": "one", "json": {"url": "u"}, "cls": 3})
        sink.write({"__key__": "a/000000002", "png": picture(2), "json": {"caption": "two"}})
    one, two = read_shard(tmp_path / "00000.tar")
    assert (one.key, one.caption, one.meta["url"]) == ("a/000000001", "one", "u")
    assert two.caption == "two" and same(two.image, picture(2))

def test_captions_only(tmp_path):
    """Without pictures nothing is decoded: even a garbage picture does no harm, and images are None."""
    path = pack(tmp_path / "a.tar", [("1.png", b"garbage"), ("1.txt", b"one")])
    assert [(s.caption, s.image) for s in read_shard(path, images=False)] == [("one", None)]

def test_suffix_is_not_believed(tmp_path):
    """A PNG named .jpg (img2dataset without re-encoding) is read; a GIF or BMP named .jpg never reaches its decoder."""
    path = pack(tmp_path / "a.tar", [("1.jpg", PNG), ("1.txt", b"one")])
    assert same(next(read_shard(path)).image, picture(0))
    for kind in ("GIF", "BMP", "TIFF", "PPM"):
        picture(0).save(data := io.BytesIO(), kind)
        with pytest.raises(ValueError, match="1.jpg cannot be read .not a JPEG"):
            list(read_shard(pack(tmp_path / "b.tar", [("1.jpg", data.getvalue()), ("1.txt", b"one")])))

@pytest.mark.parametrize("members, culprit", [
    ([("7.png", b"garbage"), ("7.txt", b"x")], "7.png cannot be read"),
    ([("7.png", b""), ("7.txt", b"x")], "7.png cannot be read"),
    ([("7.png", PNG[:len(PNG) // 2]), ("7.txt", b"x")], "7.png cannot be read"),
    ([("7.png", PNG)], "7 has no caption .7.txt is missing"),
    ([("7.png", PNG), ("7.json", b'{"caption": null}')], "7 has no caption"),
    ([("7.txt", b"x")], "7 has no picture"),
    ([("7.png", PNG), ("7.txt", b"\xff\xfe")], "7.txt cannot be read"),
    ([("7.png", PNG), ("7.txt", b"x"), ("7.json", b"{")], "7.json cannot be read"),
    ([("7.png", PNG), ("7.txt", b"x"), ("7.json", b"3")], "7.json cannot be read"),
])
def test_broken_sample(tmp_path, members, culprit):
    """A broken sample is one line that names file and member; the samples before it are still read."""
    path = pack(tmp_path / "bad.tar", [("6.png", PNG), ("6.txt", b"fine"), *members])
    shard = read_shard(path)
    assert next(shard).caption == "fine"
    with pytest.raises(ValueError, match=f"bad.tar: {culprit}") as caught: list(shard)
    assert "\n" not in str(caught.value)

def test_cut_archive(tmp_path):
    """A tar cut at any block, or anywhere inside one, is refused, never read as a shorter one."""
    (whole,) = write_shards(samples(3), tmp_path / "out", encode=as_png)
    data, path = whole.read_bytes(), tmp_path / "cut.tar"
    end = len(data.rstrip(b"\0"))
    for length in [*range(0, end, 512), *range(100, end, 777), end]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="cut.tar: ") as caught: list(read_shard(path))
        assert "\n" not in str(caught.value)

def test_cut_or_broken_gzip(tmp_path):
    """A gzipped tar that is cut, flipped or not gzip at all is refused in one line."""
    (whole,) = write_shards(samples(3), tmp_path / "out", compress=True)
    data, path = whole.read_bytes(), tmp_path / "cut.tar.gz"
    flipped = data[:200] + bytes([data[200] ^ 255]) + data[201:]
    for broken in (b"", b"no gzip", gzip.compress(b""), flipped, *(data[:n] for n in [*range(1, len(data), 97), len(data) - 1])):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="cut.tar.gz: ") as caught: list(read_shard(path))
        assert "\n" not in str(caught.value)

def test_garbage_between_members(tmp_path):
    """Rubbish after a good member does not pass for the end of the archive."""
    good = pack(tmp_path / "good.tar", [("1.png", PNG), ("1.txt", b"x")]).read_bytes().rstrip(b"\0")
    path = tmp_path / "bad.tar"
    path.write_bytes(good + bytes(-len(good) % 512) + b"rubbish " * 200)
    with pytest.raises(ValueError, match="bad.tar: not a whole tar archive"): list(read_shard(path))

def test_nothing_there(tmp_path):
    """A missing directory, one without shards, and a missing shard are named."""
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"): find_shards(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no shards"): find_shards(tmp_path)
    with pytest.raises(FileNotFoundError, match="00000.tar: no such shard"): list(read_shard(tmp_path / "00000.tar"))

def test_nothing_is_extracted(tmp_path):
    """A member whose name climbs out of the archive is only a key."""
    path = pack(tmp_path / "evil.tar", [("../../evil.png", PNG), ("../../evil.txt", b"x")])
    assert [s.key for s in read_shard(path)] == ["../../evil"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["evil.tar"]

@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a\\b"])
def test_bad_key(tmp_path, key):
    """A key that cannot name a member is refused, and nothing is left behind."""
    with pytest.raises(ValueError, match="without dots"): write_shards([samples(1)[0]._replace(key=key)], tmp_path / "out")
    assert not list(tmp_path.iterdir())

def test_all_or_nothing(tmp_path):
    """When samples stop with an error there is no output at all, and a second attempt is not in its way."""
    def failing(): yield from samples(12); raise RuntimeError("the source broke")
    with pytest.raises(RuntimeError): write_shards(failing(), tmp_path / "out", per_shard=5)
    assert not list(tmp_path.iterdir())
    assert len(write_shards(samples(12), tmp_path / "out", per_shard=5)) == 3

def test_output_is_never_mixed(tmp_path):
    """Twice the same key, and an output directory that already holds something, are refused; an empty one is filled."""
    with pytest.raises(ValueError, match="0000: two samples have this key"): write_shards(samples(1) * 2, tmp_path / "out")
    (tmp_path / "full").mkdir(); (tmp_path / "full/x").touch(); (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="full: already there"): write_shards(samples(1), tmp_path / "full")
    with pytest.raises(ValueError, match="x: already there"): write_shards(samples(1), tmp_path / "full/x")
    assert write_shards(samples(1), tmp_path / "empty")

def test_square_shows_the_centre():
    """The short side is kept whole, the long side loses the same on both ends, white comes under transparency."""
    image = Image.new("RGBA", (30, 10)); image.paste("red", (10, 0, 20, 10))
    assert same(square(image, 10), Image.new("RGB", (10, 10), "red"))
    assert same(square(Image.new("LA", (5, 9)), 4), Image.new("RGB", (4, 4), "white"))

def test_square_obeys_the_camera():
    """A picture stored turned is turned back before it is cropped."""
    image = Image.new("RGB", (8, 8), "white"); image.paste("red", (0, 0, 8, 4)); image.getexif()[0x0112] = 3
    assert square(image, 8).getpixel((4, 7)) == (255, 0, 0) and square(image, 8).getpixel((4, 0)) == (255, 255, 255)

@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 70), st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I"]))
def test_square_is_square(width, height, size, mode):
    """Any size and mode becomes RGB of exactly the size asked for, and a plain colour stays plain."""
    out = square(Image.new("RGB", (width, height), "white").convert(mode), size)
    assert out.mode == "RGB" and out.size == (size, size) and out.getextrema() == ((255, 255),) * 3
