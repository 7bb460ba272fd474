"""The tokenizer is CLIP's: what it saves, transformers reads, and both cut every text the same way."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st

from sd_nb.model.tokenizer import BYTES, END, START, STOP, Tokenizer, clip_vocab

CAPTIONS = ["a red heart, flat style", "café crème 猫 😀", "a woman's hat, noto style", "it's 100 % smiling",
            "smiling face with heart-eyes", "the red hat of a smiling woman"] * 3
HARD = ["", " ", "\n\t", "\x00", "\x85", "\u2028a", "A\u00a0b", "x\u0301", "é", "İ", "ß ﬁ", "¼½²", "\U0010ffff", "👩‍🚀 🏳️‍🌈", "مرحبا",
        "漢字かな", "नमस्ते", "_a_", "!!!'s", "'LL we'Ve", "<|startoftext|", START + "x", f" {END} ", f"a{END}b", END.upper(),
        "heart " * 200, END * 100, "smiling" * 50]
text = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(
    [START, END, " ", "a", "😀", "猫", "é", "e\u0301", "'s", "'LL", "1", "_", "!", "\t", "\x00", "heart", "İ", "<|"]), max_size=15).map("".join))


@pytest.fixture(scope="module")
def ours():
    return Tokenizer.train(CAPTIONS, vocab_size=700, window=20)


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    from transformers import CLIPTokenizer
    directory = tmp_path_factory.mktemp("tokenizer")
    ours.save_pretrained(directory)
    return CLIPTokenizer.from_pretrained(directory)


def ids(theirs, text):
    return theirs(text, padding="max_length", truncation=True, max_length=theirs.model_max_length).input_ids


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_are_cut_as_transformers_cuts_them(ours, theirs, text):
    """Control characters, emoji, scripts, ligatures, markers and long texts get transformers' ids."""
    assert ours(text)[0].tolist() == ids(theirs, text)


@settings(max_examples=200, deadline=None)
@given(text=text)
def test_any_text_is_cut_as_transformers_cuts_it(ours, theirs, text):
    """So does any text at all."""
    assert ours(text)[0].tolist() == ids(theirs, text)
    assert ours.count(text) == len(theirs(text).input_ids)


def of(*ranges, most=12):
    "Strings of the characters in these ranges of code points."
    return st.text(st.one_of(*(st.characters(min_codepoint=a, max_codepoint=b) for a, b in ranges)), max_size=most)


SCRIPTS = [
    of((0x1F300, 0x1FAFF), (0x200D, 0x200D), (0xFE0F, 0xFE0F)), of((0x1F1E6, 0x1F1FF)),  # emoji, joined; flags
    of((0x4E00, 0x9FFF), (0x3040, 0x30FF), (0xAC00, 0xD7A3)), of((0x590, 0x6FF), (0x20, 0x20)),  # CJK; right to left
    of((0x61, 0x7A), (0x300, 0x36F)), of((0x900, 0x97F)), of((0, 0x1F), (0x7F, 0x9F), (0x61, 0x63)),  # marks; controls
    of((0x2000, 0x206F), (0x41, 0x5A)), of((0xC0, 0x24F)), of((0x20, 0x7E), most=40), text]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(texts=st.lists(st.one_of(*SCRIPTS), min_size=25, max_size=25))
def test_ten_thousand_texts(long_window, theirs, texts):
    """10,000 random strings of all kinds of scripts get transformers' ids, all of them, not only the first window."""
    want = theirs(texts, padding="max_length", truncation=True, max_length=300).input_ids
    assert long_window(texts).tolist() == want


@pytest.fixture(scope="module")
def long_window():
    return Tokenizer.train(CAPTIONS, vocab_size=700, window=300)


def test_a_text_of_100_kilobytes(ours, theirs):
    """A very long text is counted whole and cut at the window."""
    long = "red 猫 e\u0301😀 " * 6500
    assert len(long.encode()) > 100_000
    assert ours.count(long) == len(theirs(long, truncation=False).input_ids)
    assert ours(long)[0].tolist() == ids(theirs, long)


def test_batch(ours, theirs):
    """A list of texts is a batch, in order; no text is an empty batch."""
    texts = ["a red hat", "", "smiling face"]
    assert ours(texts).tolist() == ids(theirs, texts)
    assert ours(texts).dtype == torch.int64 and ours(texts).shape == (3, 20)
    assert ours([]).shape == (0, 20)


def test_what_transformers_saves_we_read(ours, theirs, tmp_path):
    """A directory that transformers wrote, in whichever layout it prefers, gives the same tokenizer."""
    theirs.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert (again.vocab, again.merges, again.window) == (ours.vocab, ours.merges, ours.window)


def test_save_and_load(ours, tmp_path):
    """Saving and loading changes nothing, and saving again writes the same bytes."""
    for name in ("a", "b"):
        ours.save_pretrained(tmp_path / name)
        ours = Tokenizer.from_pretrained(tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_learning_is_deterministic():
    """Another process, and the same captions in another order, learn the same merges, though many pairs are equally frequent."""
    code = """import json, random
from sd_nb.model.tokenizer import learn_merges
random.seed(0)
words = ["".join(random.choices("abcdefghijklmnopqrst", k=random.randint(2, 7))) for _ in range(2000)]
out = [learn_merges(words, 900), learn_merges(words[::-1], 900)]
print(json.dumps(out))"""
    runs = [json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(2)]
    first = runs[0][0]
    assert len(first) == 386 and all(merges == first for run in runs for merges in run)


def test_merges_are_the_most_frequent_pairs(ours):
    """Counting pairs by hand, again and again, learns the same merges as the library."""
    words = {}
    for caption in CAPTIONS:
        for word, _ in ours.engine.pre_tokenizer.pre_tokenize_str(ours.engine.normalizer.normalize_str(caption)):
            pieces = (*word[:-1], word[-1] + STOP)
            words[pieces] = words.get(pieces, 0) + 1
    for expected in ours.merges:
        counts = {}
        for pieces, n in words.items():
            for pair in zip(pieces, pieces[1:]):
                counts[pair] = counts.get(pair, 0) + n
        best = min(counts, key=lambda pair: (-counts[pair], *map(ours.vocab.get, pair)))
        assert best == expected and counts[best] > 1
        words = {join(pieces, best): n for pieces, n in words.items()}


def join(pieces, pair):
    out, i = [], 0
    while i < len(pieces):
        n = 2 if tuple(pieces[i:i + 2]) == pair else 1
        out.append("".join(pieces[i:i + n]))
        i += n
    return tuple(out)


def test_layout(ours):
    """Bytes, bytes that end a word, merges in order, start, end: so CLIP's vocab.json follows from its merges.txt."""
    assert len(BYTES) == 256 and BYTES[0] == "!" and BYTES[255] == "Ń"
    order = sorted(ours.vocab, key=ours.vocab.get)
    assert order[:256] == BYTES and order[256:512] == [b + STOP for b in BYTES]
    assert order[512:-2] == ["".join(pair) for pair in ours.merges]
    assert (order[-2], order[-1]) == (START, END)
    assert ours.end_id == len(ours) - 1 and ours.start_id == len(ours) - 2
    assert clip_vocab(ours.merges) == ours.vocab


def test_window(ours):
    """Long texts are cut but keep their end; `count` sees what was cut; short ones are filled with the end."""
    assert ours.count("") == 2
    long = "red " * 30
    assert ours.count(long) == 32
    row = ours(long)[0]
    assert len(row) == 20 and row[0] == ours.start_id and row[-1] == ours.end_id and (row == ours.end_id).sum() == 1
    assert (ours("red")[0][2:] == ours.end_id).all()


def test_pieces_spell_the_text(ours):
    """Pieces put together are the text's words, each with its mark."""
    assert ours.pieces("A RED heart") == ["a</w>", "red</w>", "heart</w>"]
    assert "".join(ours.pieces("unseen")) == "unseen</w>"


@pytest.mark.parametrize("text, known", [("red", True), ("x", True), ("7", True), ("🙈🙉", False), ("漢字", False), ("!?", False),
                                         ("a 🙈", True), ("", True), ("\u0ad0", False), ("café", True), ("猫", True), ("😀😀", True)])
def test_knows(ours, text, known):
    """A text of nothing but bytes and parts of characters is not known; what the captions had is."""
    assert ours.knows(text) is known


def test_lone_surrogates(ours):
    """What no encoding can write, such as a broken command-line argument, becomes a question mark."""
    assert torch.equal(ours("a \udcff hat"), ours("a ? hat"))


def test_other_padding(ours, tmp_path):
    """Stable Diffusion 2 pads with "!": the directory says so, and we listen."""
    from transformers import CLIPTokenizer
    Tokenizer(ours.vocab, ours.merges, 20, pad="!").save_pretrained(tmp_path)
    again, theirs = Tokenizer.from_pretrained(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    assert again("red")[0].tolist()[-1] == ours.vocab["!"]
    assert all(again(text)[0].tolist() == ids(theirs, text) for text in ["red", "a hat! !", "it's!!"])


def test_unlimited_window_means_clips(ours, tmp_path):
    """transformers writes 1e30 for "no limit": that is no window, so CLIP's is taken."""
    ours.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": int(1e30)}))
    assert Tokenizer.from_pretrained(tmp_path).window == 77


@pytest.mark.parametrize("name, content, error", [
    ("vocab.json", None, "holds no tokenizer"), ("vocab.json", "{", "vocab.json is not valid JSON"),
    ("vocab.json", "{}", "vocab.json .*startoftext"), ("merges.txt", "a b c\n", "merges.txt line 1"),
    ("merges.txt", "zq zq\n", "merges.txt line 1"), ("tokenizer_config.json", "[]", "tokenizer_config.json"),
    ("vocab.json", b"\xff\xfe", "vocab.json")])
def test_broken_directory(ours, tmp_path, name, content, error):
    """A missing or broken file is named in one line."""
    ours.save_pretrained(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=error) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_bad_arguments():
    """Too small a vocabulary or window and texts that are none are named."""
    with pytest.raises(ValueError, match="vocab_size 100"):
        Tokenizer.train(CAPTIONS, vocab_size=100)
    with pytest.raises(ValueError, match="window 1 "):
        Tokenizer.train(CAPTIONS, vocab_size=600, window=1)
    with pytest.raises(ValueError, match="must be str, not NoneType"):
        Tokenizer.train(CAPTIONS, vocab_size=600)([None])
