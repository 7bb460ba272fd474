"""Several data sets as one: the order is a pure function of (seed, step), the shares are exact, a batch has one shape."""
from collections import Counter
from fractions import Fraction
from math import gcd

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from test_encode import MODEL, clean, run
from test_loader_faults import numbers, pack

from sd_nb.data.blend import Blend, Buckets, bucket_turn, open_packed, seed_of, turns, whole
from sd_nb.data.emoji import embedded
from sd_nb.data.encode import Encoding
from sd_nb.data.images import read_shards
from sd_nb.data.loader import Packed, rank_slice
from sd_nb.interop import load_autoencoder

SEEDS = st.integers(0, 2**63)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    "Three data sets of one shape, of 7, 12 and 30 samples; sample i holds the number i"
    d = tmp_path_factory.mktemp("blend")
    return [Packed(pack(d / str(n), [n - 3, 3])) for n in (7, 12, 30)]


@pytest.fixture(scope="module")
def buckets(tmp_path_factory):
    "Four shapes of 11, 3, 26 and 8 samples, in directories named after their size in pixels"
    d = tmp_path_factory.mktemp("buckets")
    for name, n in (("96x32", 11), ("32x96", 3), ("64x64", 26), ("128x32", 8)):
        w, h = (int(o) // 8 for o in name.split("x"))
        pack(d / name, [n], (4, h, w))
    (d / "funnel.json").write_text("[]"); (d / "0x0y").mkdir()
    return open_packed(d, verify=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), SEEDS, st.integers(1, 6))
def test_every_pack_holds_exactly_its_cards(cards, seed, packs):
    "In every pack, and so in any long run, each source has its share to the sample, and each of its places comes once"
    pack = sum(cards)
    source, place = turns(np.arange(packs * pack), cards, seed)
    for s, card in enumerate(cards):
        np.testing.assert_array_equal((source.reshape(packs, pack) == s).sum(axis=1), card)
        np.testing.assert_array_equal(np.sort(place[source == s]), np.arange(packs * card))
        assert (place[source == s] // card == np.flatnonzero(source == s) // pack).all()  # its places come pack by pack


@settings(max_examples=60, deadline=None)
@given(st.lists(st.decimals("0.001", 1000, places=3), min_size=1, max_size=4))
def test_whole_numbers_are_in_proportion(weights):
    "Exactly, not nearly, and the smallest there are"
    cards = whole(weights)
    assert len({c / Fraction(w) for c, w in zip(cards, weights)}) == 1 and gcd(*cards) == 1


@pytest.mark.parametrize("weights", [[], [0], [1, -1], [float("nan")], [float("inf")], ["x"], ["1/0"]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="weights must be positive numbers"): whole(weights)


def test_weights_that_are_too_fine_are_refused():
    with pytest.raises(ValueError, match="too fine"): whole([1e-9, 12345.678901])


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 5), st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_a_blend_has_exact_shares_and_exact_epochs(sets, seed, share, weights):
    "After whole packs each set has its weight of the samples, and none of its samples was seen twice more than another"
    blend = Blend(sets, weights)
    batch, cards = 4 * share, blend.cards
    rows = np.concatenate([blend.draw(step, batch, seed) for step in range(2 * sum(cards))])
    which = np.searchsorted(blend.ends, rows, side="right")
    assert np.bincount(which, minlength=3).tolist() == [2 * batch * c for c in cards]
    for s, n in enumerate(blend.sizes):
        times = np.bincount(rows[which == s] - blend.ends[s] + n, minlength=n)
        assert times.max() - times.min() <= 1 + -(-cards[s] // n)


def test_a_blend_by_size_is_one_shuffled_set(sets):
    "With weights equal to the sizes every epoch of the whole holds each sample once"
    blend = Blend(sets, [7, 12, 30])
    rows = np.concatenate([blend.draw(step, 7, 5) for step in range(21)]).reshape(3, 49)
    for epoch in rows: assert sorted(epoch) == list(range(49))
    assert rows[0].tolist() != rows[1].tolist()


@pytest.mark.parametrize("kind", ["blend", "buckets"])
def test_order_is_a_pure_function_of_seed_and_step(kind, sets, buckets):
    "Backwards, repeated, in another object: the same rows; on 1, 2 and 4 ranks the same stream; another seed, another order"
    make = (lambda: Blend(sets, [1, 2, 3])) if kind == "blend" else (lambda: Buckets(buckets.sets))
    data = make()
    forward = [data.draw(step, 8, 3) for step in range(40)]
    np.testing.assert_array_equal([make().draw(step, 8, 3) for step in reversed(range(40))][::-1], forward)
    for world in (1, 2, 4):
        ranks = [np.concatenate([rank_slice(data.draw(step, 8, 3), r, world) for r in range(world)]) for step in range(40)]
        np.testing.assert_array_equal(ranks, forward)
    assert not np.array_equal([data.draw(step, 8, 4) for step in range(40)], forward)


def test_order_is_the_same_on_every_machine_and_version(sets, buckets):
    "A run must not depend on a library's generator, so a step of each is written down"
    assert Blend(sets, [1, 2, 3]).draw(1000, 8, 0).tolist() == MIXED
    assert buckets.draw(1000, 8, 0).tolist() == SHAPED


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 50), SEEDS, st.integers(1, 9))
def test_buckets_drop_nothing_and_repeat_nothing(sizes, batch, seed, epochs):
    "After e epochs a bucket of n has had its first floor(e n / batch) batches, each once; the rest waits"
    before = sum(epochs * n // batch for n in sizes)
    taken = Counter(bucket_turn(step, sizes, batch, seed) for step in range(before))
    assert taken == Counter((b, turn) for b, n in enumerate(sizes) for turn in range(epochs * n // batch))
    later = bucket_turn(before, sizes, batch, seed)  # the first step of the next epoch goes on where they stopped
    assert later[1] >= epochs * sizes[later[0]] // batch


def test_a_far_step_is_as_near_as_the_first():
    "Nothing is counted on the way there"
    bucket, turn = bucket_turn(10**12, [1000, 1, 333_333], 256, 0)
    share = [1000, 1, 333_333][bucket] / 334_334
    assert abs(turn / 10**12 - share) < 1e-6


def test_a_batch_of_buckets_has_one_shape(buckets):
    "On every rank, at every step; and every bucket has its turn"
    shapes = Counter()
    for step in range(200):
        rows = buckets.draw(step, 8, 0)
        seen = {buckets[rank_slice(rows, rank, 4)].shape[1:] for rank in range(4)}
        assert len(seen) == 1
        shapes[seen.pop()] += 1
    assert set(shapes) == {(4, 12, 4), (4, 8, 8), (4, 4, 12), (4, 4, 16)}
    assert [len(o) for o in buckets.sets] == [3, 26, 11, 8] and abs(shapes[4, 8, 8] - 200 * 26 / 48) < 4


def test_what_encoding_leaves_behind_is_opened(tmp_path):
    "From a cleaned table of wide and tall pictures to batches of latents with their captions"
    (samples, autoencoder) = [o for _, o in zip(range(24), read_shards(embedded()))], load_autoencoder(MODEL).eval()
    kept, _ = clean(samples, tmp_path)
    data = open_packed(run(Encoding(tmp_path / "clean", tmp_path / "z", autoencoder, batch=4)), verify=True)
    assert isinstance(data, Buckets) and [o.shape for o in data.sets] == [(8, 12, 8), (8, 8, 12)] and len(data) == len(kept) == 22
    rows = [data.draw(step, 4, 0) for step in range(sum(n // 4 for n in data.sizes))]  # the first epoch
    assert {data[o].shape for o in rows} == {(4, 8, 12, 8), (4, 8, 8, 12)} and len(np.unique(rows)) == 4 * len(rows)
    assert sorted(data.captions) == sorted(f"clean {o.caption}" for o in kept)


def test_joined_rows_are_the_sets_rows(sets, buckets):
    "Any index, in any order; captions and splits go along"
    blend = Blend(sets, [1, 1, 1])
    assert len(blend) == 49 and numbers(blend[:]) == [*range(7), *range(12), *range(30)]
    assert numbers(blend[[48, 0, 7, -1, 18]]) == [29, 0, 0, 29, 11] and blend[20].shape == (4, 8, 8) and blend[[]].shape == (0, 4, 8, 8)
    assert [blend.captions[i] for i in (0, 6, 7, 48)] == ["caption 0", "caption 6", "caption 0", "caption 29"]
    assert blend.meta["caption"].to_pylist() == blend.captions and len(buckets.captions) == 48
    with pytest.raises(IndexError, match="no sample 49"): blend[[49]]
    with pytest.raises(ValueError, match="do not make a batch"): buckets[[0, 47]]


def test_a_split_is_chosen_in_every_set_that_has_it(sets, buckets, tmp_path):
    "Weights stay with their sets; a split that is nowhere is one line"
    held = Blend(sets, [1, 2, 3]).select("held_out")
    assert numbers(held[:]) == [0, 5, 0, 5, 10, 0, 5, 10, 15, 20, 25] and held.cards == [1, 2, 3]
    assert len(buckets.select("train")) == 48 - 3 - 1 - 6 - 2 and buckets.select(None) is buckets
    alone = sets[0].select("train")
    assert Blend([alone, sets[1], sets[2]], [1, 5, 2]).select("held_out").cards == [5, 2]
    with pytest.raises(ValueError, match="none of the 3 data sets has a split 'test'"): Blend(sets, [1, 2, 3]).select("test")


def test_sets_that_do_not_go_together_are_refused(sets, buckets, tmp_path):
    "Each in one line, before a sample is drawn"
    with pytest.raises(ValueError, match="3 data sets and 2 weights"): Blend(sets, [1, 2])
    with pytest.raises(ValueError, match="cannot be mixed"): Blend(buckets.sets, [1, 1, 1, 1])
    with pytest.raises(ValueError, match="none of them empty"): Blend([sets[0], Packed(pack(tmp_path / "none", [0]))], [1, 1])
    with pytest.raises(ValueError, match="data sets to draw from"): Buckets([])
    with pytest.raises(FileNotFoundError, match="no manifest.json"): open_packed(tmp_path)


def test_seeds_of_one_seed_differ():
    "Also those of neighbouring runs"
    assert len({seed_of(seed, i) for seed in range(50) for i in range(50)}) == 2500


MIXED = [22, 8, 19, 4, 23, 5, 13, 24]
SHAPED = [7, 16, 25, 27, 8, 18, 25, 9]
