"""sd_nb.data.emoji: the embedded pictures are what they say they are, and can be made again."""
import base64, hashlib, io, json, re, shutil, subprocess, sys, tarfile
from collections import defaultdict
import numpy as np, pyarrow.parquet as pq, pytest, webdataset
from PIL import Image
from sd_nb.data import emoji as E
from sd_nb.data.images import find_shards, read_shards, versions

SKIN = re.compile(r"[:,] (light|medium-light|medium|medium-dark|dark) skin tone")

@pytest.fixture(scope="module")
def everything():
    "All samples, each picture replaced by the digest of its pixels"
    digest = lambda image: hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).hexdigest()
    return [s._replace(image=(s.image.size, digest(s.image))) for s in read_shards(E.embedded())]

def sides(samples, name):
    "split -> the names on that side"
    out = defaultdict(set)
    for s in samples: out[s.meta["split"]].add(name(s))
    assert set(out) == {"train", "held_out"}
    return out

def test_whole(everything):
    """Every picture decodes, is 128 px square and has its own key, caption and facts; two styles, under 19 MB."""
    styles = [s.meta["style"] for s in everything]
    assert len(everything) == 7063 and (styles.count("flat"), styles.count("noto")) == (3257, 3806)
    assert all(s.image[0] == (128, 128) for s in everything)
    assert len({s.key for s in everything}) == len({s.caption for s in everything}) == len(everything)
    for s in everything: assert all(s.meta[k] for k in ("split", "style", "hexcode", "label", "concept", "group")), s.key
    assert sum(p.stat().st_size for p in E.embedded().iterdir()) <= 19_000_000

def test_captions_are_words(everything):
    """A caption is the label in plain words and the style: no colon, no control character, no typographer's quote."""
    for s in everything:
        assert s.caption.endswith(f", {s.meta['style']} style") and not set(s.caption) & set(":“”’\n\t\u200d\ufe0f"), s.caption
        assert s.caption == E.caption(s.meta["label"], s.meta["style"])

def test_held_out_is_a_twentieth(everything):
    """Between 4 and 6 % of the pictures are held out, in both styles."""
    for style in ("flat", "noto"):
        ours = [s.meta["split"] == "held_out" for s in everything if s.meta["style"] == style]
        assert 0.04 < np.mean(ours) < 0.06

@pytest.mark.parametrize("name", [
    pytest.param(lambda s: s.meta["concept"], id="concept"),
    pytest.param(lambda s: s.meta["label"], id="label in any style"),
    pytest.param(lambda s: SKIN.sub("", s.meta["label"]), id="label without skin tone"),
    pytest.param(lambda s: E.concept(SKIN.sub("", s.meta["label"])), id="whoever is shown"),
    pytest.param(lambda s: re.sub("-1F3F[B-F]", "", s.meta["hexcode"]), id="code without skin tone"),
    pytest.param(lambda s: s.image[1], id="pixels"),
])
def test_no_leak(everything, name):
    """Nothing held out is in the training part: not its concept, label, skin tones, other sex, other style or picture."""
    two = sides(everything, name)
    assert not two["train"] & two["held_out"]

def test_twins_stay_together(everything):
    """Two labels that one style draws alike are one concept in the other style too, so one side of the split."""
    concepts = {s.meta["label"]: s.meta["concept"] for s in everything}
    for one, other in (("flag: Diego Garcia", "flag: British Indian Ocean Territory"), ("cat face", "grinning cat"),
                       ("black medium square", "white square button")):
        assert concepts[one] == concepts[other] == one

def test_no_picture_twice(everything):
    """Before encoding no two pictures of a style were alike; flat ones, kept without loss, still are not."""
    flat = [s.image[1] for s in everything if s.meta["style"] == "flat"]
    assert len(set(flat)) == len(flat)

def test_any_shard_is_a_fair_sample(everything):
    """Styles and held-out pictures are spread over the shards, not stacked in some of them."""
    for shard in (everything[i:i + 1000] for i in range(0, 7000, 1000)):
        assert 0.4 < np.mean([s.meta["style"] == "flat" for s in shard]) < 0.55
        assert 0.02 < np.mean([s.meta["split"] == "held_out" for s in shard]) < 0.08

def test_statistics_and_tables_agree(everything):
    """Each shard's checksum is right, and its table has the same keys and captions."""
    rows = []
    for shard in find_shards(E.embedded()):
        stem = shard.name.partition(".")[0]
        stats = json.loads(shard.with_name(f"{stem}_stats.json").read_text())
        assert stats["sha256"] == hashlib.sha256(shard.read_bytes()).hexdigest()
        rows += pq.read_table(shard.with_name(f"{stem}.parquet")).to_pylist()
    assert [(r["key"], r["caption"], r["split"]) for r in rows] == [(s.key, s.caption, s.meta["split"]) for s in everything]

def test_webdataset_reads_the_embedded_shards():
    """The webdataset library opens the shards we ship."""
    shards = find_shards(E.embedded())
    (record,) = webdataset.WebDataset([str(shards[-1])], shardshuffle=False).decode("pil").slice(1)
    assert record["webp"].size == (128, 128) and record["txt"] == record["json"]["caption"]

@pytest.mark.parametrize("label, words", [
    ("red apple", "red apple, flat style"),
    ("waving hand: medium skin tone", "waving hand, medium skin tone, flat style"),
    ("flag: Côte d’Ivoire", "flag of Côte d'Ivoire, flat style"),
    ("keycap: #", "keycap #, flat style"),
    ("Japanese “here” button", 'Japanese "here" button, flat style'),
])
def test_caption(label, words):
    """A label becomes what a person would write."""
    assert E.caption(label, "flat") == words

@pytest.mark.parametrize("labels, name", [
    (("firefighter", "man firefighter", "woman firefighter"), "firefighter"),
    (("person running", "woman running: facing right"), "running"),
    (("people holding hands", "woman and man holding hands", "men holding hands"), "holding hands"),
    (("man: red hair", "woman: red hair"), "red hair"),
    (("kiss", "kiss: woman, man"), "kiss"),
    (("man", "woman", "person"), "adult"),
    (("men’s room", "women’s room"), "room"),
    (("snowman",), "snowman"), (("flag: Oman",), "flag: Oman"), (("keycap: 1",), "keycap: 1"),
])
def test_concept(labels, name):
    """Labels that differ only in who is shown, or the way they face, are one concept; all others stay themselves."""
    assert {E.concept(label) for label in labels} == {name}

def test_split_depends_on_the_name_only():
    """The hash has not changed, and holds about a twentieth out."""
    assert E.is_held_out("firefighter") and not E.is_held_out("red apple")
    assert 400 < sum(E.is_held_out(f"thing {i}") for i in range(10_000)) < 600

def test_distinct_keeps_the_plainest():
    """Of pictures that look alike the shortest label stays; the others' concepts are remembered, and never forgotten again."""
    make = lambda label, base, color: (E.Emoji("1", label, base, "flags", []), Image.new("RGB", (4, 4), color))
    norway, bouvet = [make(label, label, "red") for label in ("flag: Norway", "flag: Bouvet Island")]
    tones = [make(f"snowboarder{tone}", "snowboarder", "blue") for tone in (": dark skin tone", "", ": light skin tone")]
    twins = {}
    assert [e.label for e, _ in E.distinct([bouvet, norway, *tones], twins)] == ["flag: Norway", "snowboarder"]
    assert twins == {"flag: Bouvet Island": "flag: Norway"}
    assert len(E.distinct([bouvet, make("flag: Norway", "flag: Norway", "green")], twins)) == 2
    assert twins == {"flag: Bouvet Island": "flag: Norway"}

# --- making them again ---

def tarball(path, files):
    "A package like npm's, and the constant that pins it"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"package/{name}"); info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return E.Package(path.stem, "1.0.0", base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode())

def svg(color): return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 8"><circle cx="4" cy="4" r="3" fill="{color}"/></svg>'

@pytest.fixture
def sources(tmp_path, monkeypatch):
    "Two small packages and a font (a drawing of our own where the real font is not installed), as options of the command"
    tones = {"": "#ffcc22", **{f"-1F3F{c}": f"#{c * 2}8844" for c in "BCDEF"}}
    skins = [dict(label=f"waving hand: tone {t}", hexcode=f"1F44B{t}") for t in tones if t]
    hand = dict(label="waving hand", hexcode="1F44B", group=1, tags=["hello"], skins=skins)
    plain = [dict(label=label, hexcode=code, group=0) for label, code in (("heart", "2764-FE0F"), ("ghost", "1F47B"), ("cat", "1F431"))]
    letter = dict(label="regional indicator A", hexcode="1F1E6")
    monkeypatch.setattr(E, "EMOJIBASE", tarball(tmp_path / "base.tgz", {
        "en/data.json": json.dumps([hand, *plain, letter]), "meta/groups.json": json.dumps(dict(groups={"0": "smileys", "1": "people", "2": "component"}))}))
    colors = {"2764": "red", "1f47b": "lightgray", "1f431": "orange", "ffff": "blue", **{f"1f44b{t.lower()}": c for t, c in tones.items()}}
    monkeypatch.setattr(E, "FLUENT", tarball(tmp_path / "flat.tgz", {f"assets/{code}.svg": svg(c) for code, c in colors.items()}))
    font = E.NOTO
    if not font.is_file():
        (font := tmp_path / "font.ttf").write_bytes(b"a stand-in")
        monkeypatch.setattr(E, "read_noto", lambda path: None)
        draw = lambda font, emoji: ((e, Image.new("RGB", (128, 128), (i * 9, 0, 99))) for i, e in enumerate(emoji.values()))
        monkeypatch.setattr(E, "draw_noto", draw)
    return ["--fluent", str(tmp_path / "flat.tgz"), "--emojibase", str(tmp_path / "base.tgz"), "--noto-font", str(font)]

def test_a_dozen_twice(tmp_path, sources):
    """The command makes the same bytes twice: all emoji that have a name, in both styles, with their facts."""
    for name in ("a", "b"): E.main([str(tmp_path / name), *sources])
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["00000.parquet", "00000.tar.gz", "00000_stats.json"]
    for name in files: assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    made = {s.key: s for s in read_shards(tmp_path / "a")}
    assert sum(key.endswith("-flat") for key in made) == 9 and sum(key.endswith("-noto") for key in made) == 10
    heart = made["2764-fe0f-flat"]  # the package's file name has no FE0F
    assert heart.caption == "heart, flat style" and heart.image.size == (128, 128)
    assert heart.image.convert("RGB").getpixel((56, 64)) == (255, 0, 0) and heart.image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert made["1f1e6-noto"].meta["group"] == "component"
    stats = json.loads((tmp_path / "a/00000_stats.json").read_text())
    assert stats["encoders"] == versions() and "resvg-py" in stats["drawn_with"] and len(stats["sources"]) == 3

@pytest.mark.parametrize("change, culprit", [
    (["--emojibase", "no/such.tgz"], "no/such.tgz: no such file; it should be base 1.0.0"),
    (["--fluent", "no/such.tgz"], "no/such.tgz: no such file; it should be flat 1.0.0"),
    (["--fluent", __file__], "not flat 1.0.0 (its sha512 is"),
    (["--noto-font", "no/such.ttf"], "no/such.ttf: no such font"),
    (["--noto-font", __file__], "test_emoji.py: not a font of colour bitmaps"),
])
def test_bad_source(tmp_path, sources, capsys, change, culprit):
    """A source that is missing or not the pinned one: one line that names it, exit code 2, no output."""
    if "--noto-font" in change and not E.NOTO.is_file(): pytest.skip("the font is not installed, so it is not opened")
    with pytest.raises(SystemExit) as caught: E.main([str(tmp_path / "out"), *sources, *change])
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and culprit in lines[0] and not (tmp_path / "out").exists()

def test_output_is_never_overwritten(tmp_path, sources, capsys):
    """An output directory that holds something is refused."""
    (tmp_path / "out").mkdir(); (tmp_path / "out/x").touch()
    with pytest.raises(SystemExit): E.main([str(tmp_path / "out"), *sources])
    assert capsys.readouterr().err.strip().endswith("out: already there and not an empty directory")

def test_no_npm(tmp_path, monkeypatch):
    """Without npm and without a tarball, the error says what to pass."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="npm is not installed"): E.fetch(E.FLUENT, tmp_path)

@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not shutil.which("npm") or not E.NOTO.is_file(), reason="needs npm and the Noto font")
def test_all_of_it_twice(tmp_path):
    """The real command gives the same bytes twice, and with the tools that made them, those that we ship."""
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-m", "sd_nb.data.emoji", str(tmp_path / name)], check=True, capture_output=True)
    digests = lambda folder: {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    tools = lambda folder: [json.loads((folder / "00000_stats.json").read_text())[k] for k in ("encoders", "drawn_with", "sources")]
    if tools(tmp_path / "a") == tools(E.embedded()): assert digests(tmp_path / "a") == digests(E.embedded())
