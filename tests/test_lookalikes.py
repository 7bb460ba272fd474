"""What looks alike is found, all of it and without comparing all pairs; pictures of nothing are told from faint ones."""
import io
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from sd_nb.data.emoji import embedded
from sd_nb.data.images import decode, find_shards, read_shard, square
from sd_nb.data.lookalikes import Index, bands, contrast, distance, is_blank, keepers, pairs, phash

SMALL_K = [0, 1, 2, 3, 5, 8, 63]


@pytest.fixture(scope="module")
def pictures():
    return [sample.image for sample in read_shard(find_shards(embedded())[0])][:300]


@st.composite
def clustered(draw):
    "Random hashes, and near each of them some that differ in a few bits: else hardly two are ever near."
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5))
    flips = st.lists(st.integers(0, 63), max_size=6)
    near = draw(st.lists(st.tuples(st.sampled_from(centres), flips), max_size=25))
    return centres + [centre ^ sum(1 << bit for bit in set(bits)) for centre, bits in near]


def all_pairs(hashes, k):
    return [(i, j) for i, j in combinations(range(len(hashes)), 2) if bin(hashes[i] ^ hashes[j]).count("1") <= k]


@settings(max_examples=300, deadline=None)
@given(hashes=clustered(), k=st.sampled_from(SMALL_K))
def test_pairs_are_all_pairs(hashes, k):
    """The buckets find what comparing all pairs finds, each pair once."""
    assert sorted(pairs(hashes, k)) == all_pairs(hashes, k)


@settings(max_examples=300, deadline=None)
@given(hashes=clustered(), k=st.sampled_from(SMALL_K))
def test_keepers_are_the_first(hashes, k):
    """Each stays unless one before it stayed and is near; then the first such one takes its place."""
    want = []
    for j, value in enumerate(hashes):
        want.append(next((i for i in range(j) if want[i] == i and bin(hashes[i] ^ value).count("1") <= k), j))
    assert keepers(hashes, k) == want


@settings(max_examples=200, deadline=None)
@given(value=st.integers(0, 2**64 - 1), bits=st.sets(st.integers(0, 63), max_size=63))
def test_a_band_survives(value, bits):
    """Whatever k bits are flipped, one of k + 1 bands is the same; together the bands are the hash."""
    k, other = len(bits), value ^ sum(1 << bit for bit in bits)
    ours = list(bands(value, k))
    assert len(ours) == k + 1 and set(ours) & set(bands(other, k))
    assert sum(part << start for start, part in ours) == value


def test_buckets_spare_the_comparisons(monkeypatch):
    """For 3,000 random hashes and k = 3 fewer than a thousandth of the pairs are compared."""
    compared = []
    monkeypatch.setattr("sd_nb.data.lookalikes.distance", lambda a, b: compared.append(1) or distance(a, b))
    hashes = [int(value) for value in np.random.default_rng(0).integers(0, 2**64, 3000, dtype=np.uint64)]
    assert list(pairs(hashes, 3)) == []
    assert 0 < len(compared) < 3000 * 2999 / 2 / 1000


@pytest.mark.parametrize("k", [-1, 64])
def test_impossible_k(k):
    """A number of bits that makes no sense is named."""
    with pytest.raises(ValueError, match=f"k={k}: name how many of the 64 bits"):
        Index(k)


def dct(rows):
    "Cosine transform (DCT-II) of each row by the Fourier transform of the row and its mirror image."
    n = rows.shape[1]
    wave = np.fft.fft(np.concatenate([rows, rows[:, ::-1]], 1))[:, :n]
    return (wave * np.exp(-1j * np.pi * np.arange(n) / (2 * n))).real


def test_bits_are_those_of_a_cosine_transform(pictures):
    """The hash is the 8 x 8 slowest waves above their median, row by row, the first the highest bit."""
    for picture in pictures[:50]:
        slow = dct(dct(np.asarray(square(picture, 32).convert("L"), float)).T).T[:8, :8]
        above = (slow - np.median(slow)).ravel()
        ours = np.array([bit == "1" for bit in f"{phash(picture):064b}"])
        clear = abs(above) > 1e-6  # a tie is decided by rounding
        assert clear.sum() >= 30 and (ours == (above > 0))[clear].all()


def jpeg(picture, quality):
    picture.convert("RGB").save(data := io.BytesIO(), "JPEG", quality=quality)
    return decode(data.getvalue())


def cut(picture, part):
    edge = round(picture.width * part)
    return picture.crop((edge, edge, picture.width - edge, picture.height - edge))


def test_what_three_bits_find_and_miss(pictures):
    """Of copies saved coarsely or scaled, 3 bits find over nine in ten, less where a drawing is symmetric; cut edges escape, strangers are far."""
    pixels = [np.asarray(square(picture, 32).convert("L"), float) for picture in pictures]
    lopsided = np.array([abs(o - o[:, ::-1]).mean() > 3 for o in pixels])
    near = lambda copy: np.array([distance(phash(picture), phash(copy(picture))) <= 3 for picture in pictures])
    for copy in (lambda o: jpeg(o, 75), lambda o: jpeg(o, 30), lambda o: o.resize((256, 256)), lambda o: o.resize((64, 64), Image.LANCZOS)):
        assert near(copy)[lopsided].mean() > 0.93
        assert 0.3 < near(copy)[~lopsided].mean() < 0.9
    assert near(lambda o: cut(o, 0.05)).mean() < 0.1
    assert np.median([distance(phash(a), phash(b)) for a, b in combinations(pictures[:40], 2)]) > 20


def test_symmetry_is_the_weakness():
    """A picture that is its own mirror image has zeros for half of its waves: a trace of noise decides their bits."""
    half = np.random.default_rng(0).integers(0, 256, (32, 16))
    both = np.concatenate([half, half[:, ::-1]], 1)
    noise = np.random.default_rng(1).normal(0, 0.5, both.shape)
    symmetric, lopsided = both, np.random.default_rng(2).integers(0, 256, both.shape)
    move = lambda pixels: distance(*(phash(Image.fromarray(o.round().clip(0, 255).astype(np.uint8))) for o in (pixels, pixels + noise)))
    assert move(symmetric) > 8 and move(lopsided) <= 2


def test_hash_of_any_mode():
    """What is seen counts: transparency on white, palettes, 16 bits and one pixel all have a hash."""
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    clear.paste("black", (10, 10, 30, 25))
    white = Image.new("RGB", (40, 40), "white")
    white.paste("black", (10, 10, 30, 25))
    assert phash(clear) == phash(white)
    for mode in ("1", "L", "LA", "P", "CMYK", "I;16", "F"):
        assert 0 <= phash(Image.new(mode, (1, 7))) < 2**64


@pytest.mark.parametrize("color", ["white", "black", "gray", (250, 128, 114)])
@pytest.mark.parametrize("size", [(1, 1), (128, 128), (1, 500), (640, 480)])
def test_uniform_is_blank(color, size):
    """One colour is blank at every size and shape."""
    assert contrast(Image.new("RGB", size, color)) == 0 and is_blank(Image.new("RGB", size, color))


def test_what_is_not_blank(pictures):
    """No emoji is blank, nor is a pattern of one brightness; noise and full transparency are."""
    assert not any(map(is_blank, pictures))
    pattern = Image.new("RGB", (64, 64), (130, 0, 0))
    pattern.paste((0, 66, 0), (0, 0, 32, 64))
    assert np.std(np.asarray(pattern.convert("L"))) < 1 and not is_blank(pattern)
    noise = np.random.default_rng(0).normal(128, 3, (256, 256, 3)).clip(0, 255).astype(np.uint8)
    assert is_blank(Image.fromarray(noise)) and is_blank(Image.new("RGBA", (64, 64), (9, 9, 9, 0)))


def test_threshold_is_the_standard_deviation():
    """Half of a picture at 100 and half at 110 deviates by 5."""
    halves = Image.new("L", (32, 32), 100)
    halves.paste(110, (0, 0, 16, 32))
    assert contrast(halves) == pytest.approx(5)
    assert is_blank(halves, 5.01) and not is_blank(halves, 4.99)
