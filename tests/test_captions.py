"""Captions are cleaned, judged and weighed as promised, whatever strangers wrote."""
import math
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from sd_nb.data.captions import blocker, choose_caption, clean_text, fault_of, gather, settle, uniform_of


@pytest.mark.parametrize("text, want, changes", [
    ("a red heart", "a red heart", []), ("cats &amp; dogs", "cats & dogs", ["entities"]), ("&amp;quot;x&amp;quot;", '"x"', ["entities"]),
    ("&lt;b&gt;bold&lt;/b&gt; one", "bold one", ["entities", "tags", "spaces"]), ('<a href="x">link</a>', "link", ["tags", "spaces"]),
    ("a <!-- no --> b", "a b", ["tags", "spaces"]), ("I <3 you", "I <3 you", []), ("1 < 2 > 0", "1 < 2 > 0", []),
    ("a<|endoftext|>b", "a b", ["tags"]), ("two\n\tlines", "two lines", ["controls", "spaces"]), ("a\x00b", "ab", ["controls"]),
    ("e\u0301", "é", ["unicode"]), ("e\x00\u0301", "é", ["controls", "unicode"]), ("\ufeffbom", "bom", ["controls"]),
    ("a\ud800b", "ab", ["controls"]), ("  x  ", "x", ["spaces"]), ("a\u00a0b\u3000c", "a b c", ["spaces"]),
    ("👩‍🚀 🏳️‍🌈", "👩‍🚀 🏳️‍🌈", []), ("مرحبا\u200f", "مرحبا\u200f", []), ("漢字かな", "漢字かな", []), ("", "", []), (None, "", []), (7, "", [])])
def test_clean_text(text, want, changes):
    """Each step mends what it is named after, and says so."""
    assert clean_text(text) == (want, changes)


@settings(max_examples=500, deadline=None)
@given(text=st.one_of(st.text(st.characters()), st.lists(st.sampled_from(
    ["&", "&amp;", "lt;", "<", ">", "b", "/", "<|", "\x00", "\ud800", "\n", " ", "e", "\u0301", "猫", "\u2000"]), max_size=20).map("".join)))
def test_any_text_is_clean(text):
    """What comes out is NFC, can be written, and holds no control character and no space but single ones between words."""
    out, changes = clean_text(text)
    assert out.encode().decode() == out == unicodedata.normalize("NFC", out) == " ".join(out.split())
    assert not [c for c in out if unicodedata.category(c) in ("Cc", "Cs")]
    assert (out == text) <= (not changes or "entities" in changes or len(changes) > 1)
    assert bool(changes) or out == text


@pytest.mark.parametrize("text", ["<" * 10**6, "<a" * 500_000, "<!--" * 250_000, "&amp;" * 200_000, "&" + "amp;" * 250_000, "\x00" * 10**6])
@pytest.mark.timeout(20)
def test_a_hostile_megabyte(text):
    """No text takes time that grows with its square."""
    assert len(clean_text(text)[0]) <= len(text)


# --- rules

@pytest.mark.parametrize("text, fault", [
    ("green grass", None), ("an Ass here", "blocked word"), ("ASS", "blocked word"), ("ass.", "blocked word"), ("_ass", None),
    ("stock photo", "blocked word"), ("stock  photos", None), ("c++ code", "blocked word"), ("STRASSE 5", "blocked word"),
    ("", "empty"), ("ox", "too short"), ("cat", None)])
def test_rules(text, fault):
    """A blocked word counts at its boundaries, in any case; a dot in a word is no pattern."""
    assert fault_of(text, 3, blocker(["ass", "Stock  Photo", "c++", "straße", "c.t", " "])) == fault


def test_no_words_block_nothing():
    """An empty list, or words of nothing but space, block no caption."""
    assert blocker([]) is None and blocker([" ", ""]) is None


@pytest.mark.parametrize("texts, want", [
    ([("a cat", 1), ("", 5), ("a cat", 2), ("one cat", 1)], ({"a cat": 0.75, "one cat": 0.25}, None)),
    ([("a cat", 1), ("an ass", 1)], ({}, "blocked word")), ([("a cat", 1), ("an ass", 0)], ({}, "blocked word")),
    ([("", 1), ("ox", 1)], ({}, "empty")), ([("ox", 1), ("", 1)], ({}, "too short")), ([("", 1), ("a cat", 0)], ({}, "empty")),
    ([("ox", 0), ("", 1)], ({}, "empty"))])
def test_settle(texts, want):
    """Bad captions leave the list, equal ones join, weights sum to one, and a picture without any has the first one's reason."""
    assert settle(texts, 3, blocker(["ass"])) == want


@pytest.mark.parametrize("meta, columns, weights, want", [
    ({}, (), (), [("t", 1.0)]), (dict(captions=["a", "b"]), (), (), [("a", 1.0), ("b", 1.0)]),
    (dict(captions=["a", "b"], weights=[3, 0.5]), (), (), [("a", 3), ("b", 0.5)]), (dict(captions="a"), (), (), [("a", 1.0)]),
    (dict(captions=[]), (), (), [("t", 1.0)]), (dict(weights=[1, 2]), (), (), [("t", 1.0)]), (dict(captions="a", weights=3), (), (), [("a", 3)]), (dict(alt="x"), ("caption", "alt"), (2.0, 1.0), [("t", 2.0), ("x", 1.0)]),
    (dict(captions=["a"]), ("alt",), (), [(None, 1.0)])])
def test_gather(meta, columns, weights, want):
    """The JSON's list comes before the .txt, and named columns before both."""
    assert gather("t", meta, columns, weights) == want


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [0, 0], [-1, 2], [math.nan, 1], [math.inf, 1], ["1", 1], [None, 1], [10**400, 1]])
def test_bad_weights(weights):
    """Weights that make no sense are one clear line."""
    with pytest.raises(ValueError, match="2 captions have the weights"):
        gather("t", dict(captions=["a", "b"], weights=weights))


@settings(max_examples=300, deadline=None)
@given(weights=st.lists(st.floats(0, 1e9), min_size=1, max_size=6).filter(any), uniform=st.floats(0, 1, exclude_max=True))
@example(weights=[0.1] * 3 + [0.0], uniform=math.nextafter(1, 0))
def test_choice_follows_the_weights(weights, uniform):
    """The chosen caption has a weight, and the weights before it cover no more than the draw."""
    i, total = choose_caption(weights, uniform), math.fsum(weights)
    assert weights[i] > 0
    assert math.fsum(weights[:i]) <= uniform * total * (1 + 1e-9) and uniform * total <= math.fsum(weights[:i + 1]) * (1 + 1e-9)


def test_draws_are_a_function_of_seed_step_and_row():
    """The same three numbers give the same draw, others another; draws are even, and steps do not resemble their neighbours."""
    draws = np.array([[uniform_of(s, t, r) for t in range(100)] for s in range(2) for r in range(50)])
    assert len(set(draws.ravel())) == draws.size and 0 <= draws.min() and draws.max() < 1
    assert uniform_of(1, 23, 4) != uniform_of(12, 3, 4) and uniform_of(3, 5, 7) == uniform_of(3, 5, 7) == 0.5953260858174083
    assert (abs(np.histogram(draws, 10, (0, 1))[0] - 1000) < 5 * math.sqrt(900)).all()
    assert abs(np.corrcoef(draws[:, :-1].ravel(), draws[:, 1:].ravel())[0, 1]) < 0.05
