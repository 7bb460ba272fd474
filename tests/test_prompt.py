"""Prompts of any length and with weights: what is plain stays as it was, what is malformed is text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from parity import randn, randomise
from sd_nb.model.clip import TextEncoder, TextEncoderConfig
from sd_nb.model.prompt import count_windows, encode_prompts, parse_prompt, weigh
from sd_nb.model.tokenizer import STOP, Tokenizer
from sd_nb.seed import MaskedTextEncoder

CAPTIONS = ["a red heart, flat style", "a smiling cat face, noto style", "the blue hat of a woman, flat style"] * 3
LONG = "a (smiling:1.5) cat face, the [blue] hat of a woman, a red heart, flat style, a cat and a hat and a heart"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, vocab_size=700, window=12)


def encoder(tokenizer, kind=TextEncoder):
    config = TextEncoderConfig(vocab=len(tokenizer), window=12, width=32, layers=2, heads=4)
    return randomise(kind(config)).requires_grad_(False)


@pytest.mark.parametrize("text, pieces", [
    ("", [("", 1)]), ("a hat", [("a hat", 1)]), ("(hat)", [("hat", 1.1)]), ("[hat]", [("hat", 1 / 1.1)]), ("(hat:1.3)", [("hat", 1.3)]),
    ("a (red:0.5) hat", [("a ", 1), ("red", 0.5), (" hat", 1)]), ("((hat))", [("hat", 1.1 * 1.1)]), ("([hat])", [("hat", 1.1 / 1.1)]),
    ("(a [b]:2) c", [("a ", 2), ("b", 2 / 1.1), (" c", 1)]), ("(a (b:2):3)", [("a ", 3), ("b", 6)]), (r"\(a\) \[b\] \\", [("(a) [b] \\", 1)]),
    (r"(a\):2)", [("a)", 2)]), ("(a: 1.5 )", [("a", 1.5)]), ("(a:.5)", [("a", 0.5)]), ("(a:2.)", [("a", 2)]), ("(a:0)", [("a", 0)]),
    ("(a:b:2)", [("a:b", 2)]), ("(a:1.5)(b:1.5)", [("ab", 1.5)]), ("(a:999)", [("a", 100)]), ("()", [("", 1)]), ("(:2)", [("", 1)])])
def test_notation(text, pieces):
    """Round brackets, square ones, numbers, nesting and escapes, by hand."""
    assert [p for p, _ in parse_prompt(text)] == [p for p, _ in pieces]
    assert [w for _, w in parse_prompt(text)] == pytest.approx([w for _, w in pieces])


@pytest.mark.parametrize("text", [":-)", "((", "]a[", "(a]", "[a)", "a:1.3)", "(a:1.3", "a\\", "\\a", ")(", "8-] (:", "[a:1.3)"])
def test_malformed_is_text(text):
    """A bracket without a partner, a number outside, a lonely backslash: characters like others."""
    assert parse_prompt(text) == [(text, 1.0)]


@pytest.mark.parametrize("text, plain, weight", [("(a:x)", "a:x", 1.1), ("(a:-1)", "a:-1", 1.1), ("(a:1e3)", "a:1e3", 1.1), ("(a:1.2.3)", "a:1.2.3", 1.1),
                                                 ("(a:1000)", "a:1000", 1.1), ("[a:2]", "a:2", 1 / 1.1), ("(a:nan)", "a:nan", 1.1)])
def test_what_is_no_number_is_text(text, plain, weight):
    """Signs, exponents, words and numbers in square brackets are read as text inside the bracket."""
    assert parse_prompt(text) == [(plain, pytest.approx(weight))]


SPECIAL = st.lists(st.sampled_from(["(", ")", "[", "]", "\\", ":", ":1.3)", ":2", "a", " ", "(a:0.5)", "9", ".", "猫", "\n"]), max_size=40).map("".join)


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(), SPECIAL))
def test_any_text_is_parsed(text):
    """Nothing crashes, weights are finite and neither negative nor endless, neighbours differ, and letters are kept in order."""
    pieces = parse_prompt(text)
    assert all(0 <= w <= 100 for _, w in pieces)
    assert all(a[1] != b[1] for a, b in zip(pieces, pieces[1:]))
    rest = iter(text)
    said = "".join(p for p, _ in pieces)
    assert all(c in rest for c in said)  # a subsequence of what was typed
    left = list(text)
    for c in said: left.remove(c)
    assert set(left) <= set("()[]\\:. \n0123456789") or any(c.isspace() or c.isdigit() for c in left)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_text_without_notation_is_itself(text):
    """Without brackets and backslashes a text parses to itself; so does any text once it is escaped."""
    plain = "".join(c for c in text if c not in "()[]\\")
    assert parse_prompt(plain) == [(plain, 1.0)]
    escaped = "".join("\\" + c if c in "()[]\\" else c for c in text)
    assert parse_prompt(escaped) == [(text, 1.0)]


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.text("ab :1.", max_size=5).map(lambda t: (t, [(t, 1.0)])), lambda inner: st.one_of(
    st.tuples(inner, inner).map(lambda p: (p[0][0] + p[1][0], p[0][1] + p[1][1])),
    inner.map(lambda p: (f"[{p[0]}]", [(t, w / 1.1) for t, w in p[1]])),
    st.tuples(inner, st.sampled_from([0.5, 1.5])).map(lambda p: (f"({p[0][0]}:{p[1]})", [(t, w * p[1]) for t, w in p[0][1]])))))
def test_well_formed_prompts_mean_what_they_say(pair):
    """Random nestings, each letter with the product of the brackets around it."""
    text, expected = pair
    letters = [[(c, w) for t, w in pieces for c in t] for pieces in (parse_prompt(text), expected)]
    assert [c for c, _ in letters[0]] == [c for c, _ in letters[1]]
    assert [w for _, w in letters[0]] == pytest.approx([w for _, w in letters[1]])


def test_deep_and_long_prompts_take_no_time():
    """Ten thousand brackets and 100 kB of text are read without recursion and in linear time."""
    assert parse_prompt("[" * 10_000 + "a" + "]" * 10_000) == [("a", pytest.approx(0))]
    assert parse_prompt("(" * 100_000) == [("(" * 100_000, 1.0)]
    assert parse_prompt("a" * 100_000) == [("a" * 100_000, 1.0)]


@pytest.mark.parametrize("kind", [TextEncoder, MaskedTextEncoder])
def test_short_and_plain_is_bit_for_bit_what_it_was(tokenizer, kind):
    """Without weights and in one window nothing changes, not a bit, with either encoder; nor with weights of one."""
    model, texts = encoder(tokenizer, kind), ["a red heart", "", "a smiling cat face, noto style", "a red heart " * 2 + "cat face hat of"]
    assert tokenizer.count(texts[-1]) == 12 and all(count_windows(tokenizer, t) == 1 for t in texts)
    assert torch.equal(encode_prompts(model, tokenizer, texts), model(tokenizer(texts)))
    assert torch.equal(encode_prompts(model, tokenizer, ["a (red:1.0) heart", "(hat:1)", "x", r"\(y\)"]), model(tokenizer(["a red heart", "hat", "x", "(y)"])))
    assert torch.equal(encode_prompts(model, tokenizer, "a hat"), model(tokenizer("a hat")))


def test_windows_are_transformers_windows(tokenizer, tmp_path):
    """Each window is what transformers' CLIPTextModel makes of its words alone; weights and means by hand."""
    from transformers import CLIPTextModel
    from sd_nb.interop import save_text_encoder
    ours = encoder(tokenizer)
    save_text_encoder(tmp_path, ours)
    theirs = CLIPTextModel.from_pretrained(tmp_path, subfolder="text_encoder").eval()
    rows, loud = stretches(tokenizer, LONG), dict(smiling=1.5, blue=1 / 1.1)
    assert sum(rows, []) == tokenizer.pieces("a smiling cat face, the blue hat" + LONG.split("hat", 1)[1]) and len(rows) > 2
    got = encode_prompts(ours, tokenizer, [LONG])[0].split(12)
    for row, vectors in zip(rows, got, strict=True):
        ids = torch.tensor([tokenizer.frame(row)])
        with torch.no_grad(): z = theirs(input_ids=ids).last_hidden_state[0]
        w = torch.tensor([loud.get(p, 1) for p in ["", *(p.removesuffix(STOP) for p in row)] + [""] * (11 - len(row))])[:, None]
        assert_close(vectors, z * w * (z.mean() / (z * w).mean()), atol=1e-4, rtol=1e-4)


def test_all_texts_get_the_same_number_of_windows(tokenizer):
    """A short text is filled up with windows of the empty one; more can be asked for, fewer cannot."""
    model = encoder(tokenizer)
    k = count_windows(tokenizer, LONG)
    both = encode_prompts(model, tokenizer, ["a hat", LONG])
    assert k > 1 and both.shape == (2, 12 * k, 32)
    assert_close(both[0, :12], model(tokenizer("a hat"))[0], atol=1e-5, rtol=1e-5)
    assert_close(both[0, 12:24], model(tokenizer(""))[0], atol=1e-5, rtol=1e-5)
    more = encode_prompts(model, tokenizer, ["a hat"], windows=k)
    assert_close(more[0], both[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=f"needs {k} windows of 12 tokens, not 1"):
        encode_prompts(model, tokenizer, ["a hat", LONG], windows=1)
    assert encode_prompts(model, tokenizer, []).shape == (0, 12, 32)


def stretches(tokenizer, text):
    "The pieces of each window, as the encoder is given them"
    seen = []
    encode_prompts(lambda ids: seen.append(ids) or torch.zeros(*ids.shape, 4), tokenizer, [text])
    names = {i: p for p, i in tokenizer.vocab.items()}
    return [[names[i] for i in row[1:row.index(tokenizer.end_id)]] for row in seen[0].tolist()]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["a", "cat", "unseen", ",", "hat", "extraordinarily", "猫", "face,"]), max_size=40).map(" ".join))
def test_nothing_is_lost_and_words_stay_whole(tokenizer, text):
    """Windows together hold all tokens in order; each ends with a whole word, unless the word is longer than a window."""
    rows = stretches(tokenizer, text)
    assert sum(rows, []) == tokenizer.pieces(text)
    assert len(rows) == count_windows(tokenizer, text) and all(len(row) <= 10 for row in rows)
    assert all(row[-1].endswith(STOP) or not any(p.endswith(STOP) for p in row) for row in rows if row)


def test_cuts_at_a_comma_when_one_is_near(tokenizer):
    """Of the last places, the one after a comma is taken; a comma far back is not worth the room."""
    assert stretches(tokenizer, "a " * 8 + ", a a a a")[0] == ["a" + STOP] * 8 + ["," + STOP]
    assert len(stretches(tokenizer, "a a , " + "a " * 12)[0]) == 10


def test_weigh_restores_the_mean():
    """Weighed vectors point as before, their ratios are the weights, their mean is the old one, window by window."""
    z, w = randn(3, 7, 16) + 0.5, torch.ones(3, 7)
    w[0, 2], w[2, 1:4] = 1.5, 0.5
    out = weigh(z, w)
    assert_close(out.mean((1, 2)), z.mean((1, 2)))
    assert torch.equal(out[1], z[1])
    ratio = out / z
    assert_close(ratio[0, 2] / ratio[0, 0], torch.full((16,), 1.5))
    assert_close(ratio[2, 2] / ratio[2, 0], torch.full((16,), 0.5))
    assert weigh(z.bfloat16(), w).dtype == torch.bfloat16


def test_a_mean_of_nothing_is_not_restored():
    """Where entries cancel, the ratio of means would be noise: the weights alone are applied, and all stays finite."""
    z = torch.nn.functional.layer_norm(randn(2, 7, 16), (16,))
    w = torch.ones(2, 7)
    w[:, 3] = 1.5
    assert_close(weigh(z, w), z * w[..., None])
    assert weigh(torch.zeros(1, 7, 16), w[:1]).isfinite().all()
    assert weigh(z, torch.zeros(2, 7)).abs().max() == 0


@pytest.mark.parametrize("text", [None, 3, b"a"])
def test_what_is_no_text_is_refused(tokenizer, text):
    """One line that names the type."""
    for call in (lambda: parse_prompt(text), lambda: encode_prompts(encoder(tokenizer), tokenizer, [text])):
        with pytest.raises(ValueError, match=f"must be str, not {type(text).__name__}"):
            call()


def test_a_window_without_room_is_refused(tokenizer):
    """Start and end alone hold no words, but do hold the empty prompt."""
    small = Tokenizer(tokenizer.vocab, tokenizer.merges, window=2)
    assert count_windows(small, "") == 1
    with pytest.raises(ValueError, match="window of 2 tokens has no room"):
        count_windows(small, "a")
