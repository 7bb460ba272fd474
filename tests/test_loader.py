import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sd_nb.data.images import Sample, write_shards
from sd_nb.data.latents import pack_pixels
from sd_nb.data.loader import Packed, batch_indices, feistel, rank_slice, round_keys
from PIL import Image


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    "Twenty-five pictures in three shards, every fifth held out"
    d = tmp_path_factory.mktemp("loader")
    samples = [Sample(f"k{i}", Image.new("RGB", (20, 30), (i, 2 * i, 3 * i)), f"caption {i}",
                      dict(split="train" if i % 5 else "held_out", style="flat")) for i in range(25)]
    write_shards(samples, d / "shards", per_shard=10)
    pack_pixels(d / "shards", d / "packed", 8, progress=False)
    return d / "packed"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 100), st.integers(1, 70), st.integers(0, 2**63))
def test_every_epoch_is_a_permutation(n, batch, seed):
    "Whatever the batch size, the stream's epochs hold each sample once, also across the wraps"
    steps = -(-3 * n // batch)
    stream = np.concatenate([batch_indices(step, n, batch, seed) for step in range(steps)])[:3 * n]
    for epoch in stream.reshape(3, n): assert sorted(epoch) == list(range(n))


def test_order_is_a_pure_function_of_seed_and_step():
    "Asking for steps in another order, or twice, or in batches of another size changes nothing"
    forward = [batch_indices(s, 103, 16, seed=7) for s in range(40)]
    backward = [batch_indices(s, 103, 16, seed=7) for s in reversed(range(40))][::-1]
    np.testing.assert_array_equal(forward, backward)
    np.testing.assert_array_equal(np.concatenate(forward), np.concatenate([batch_indices(s, 103, 64, 7) for s in range(10)]))
    assert forward[0].dtype == np.int64 and forward[0].shape == (16,)


def test_order_is_the_same_on_every_machine_and_version():
    "The first batch of seed 0 is written down here: a run must not depend on a library's generator"
    assert batch_indices(0, 1000, 8, 0).tolist() == FIRST
    assert batch_indices(10**9, 10**9 + 7, 4, 1).tolist() == FAR


FIRST = [509, 741, 782, 551, 316, 186, 103, 230]
FAR = [483158718, 58458308, 442205471, 547957199]


def test_seeds_and_epochs_differ():
    "Another seed or another epoch is another order"
    orders = {tuple(batch_indices(epoch, 50, 50, seed)) for epoch in range(10) for seed in range(10)}
    assert len(orders) == 100


def test_small_permutations_are_fair():
    "All 24 orders of four samples are about equally frequent (chi-square, 23 degrees of freedom)"
    orders = [tuple(batch_indices(epoch, 4, 4, seed)) for seed in range(20) for epoch in range(240)]
    counts = np.array([orders.count(o) for o in set(orders)])
    assert len(counts) == 24 and ((counts - 200) ** 2 / 200).sum() < 50


def test_neighbours_are_independent():
    "Where a sample lands says nothing about where its neighbour lands, nor about the next epoch"
    place = np.argsort([batch_indices(e, 400, 400, 3) for e in range(30)], axis=1)
    assert abs(np.corrcoef(place[:, :-1].ravel(), place[:, 1:].ravel())[0, 1]) < 0.04
    assert abs(np.corrcoef(place[:-1].ravel(), place[1:].ravel())[0, 1]) < 0.04


@pytest.mark.parametrize("half", [1, 2, 5])
def test_feistel_is_a_bijection(half):
    "Under any key no two numbers land on one place"
    x = np.arange(4**half, dtype=np.uint64)
    for key in range(20): assert sorted(feistel(x, half, round_keys(np.full(len(x), key, np.uint64)))) == list(range(4**half))


def test_a_billion_samples_cost_nothing():
    "No array of the data set's length is made"
    assert len(set(batch_indices(5, 10**12, 4096, 0).tolist())) == 4096


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_rank_slices_make_the_global_batch(world):
    "The ranks' slices, one after the other, are the global batch: arrays and tensors alike"
    batch = batch_indices(3, 100, 16, 0)
    np.testing.assert_array_equal(np.concatenate([rank_slice(batch, r, world) for r in range(world)]), batch)
    assert torch.equal(torch.cat([rank_slice(torch.tensor(batch), r, world) for r in range(world)]), torch.tensor(batch))


def test_what_cannot_be_divided_is_refused():
    "One line says which numbers do not fit"
    with pytest.raises(ValueError, match="batch of 10 does not divide among 4"): rank_slice(np.arange(10), 0, 4)
    with pytest.raises(ValueError, match="from 0 samples"): batch_indices(0, 0, 4, 0)


def test_gather_equals_the_shards(packed):
    "Any index, in any order, repeated or from several shards, gives that sample"
    o = Packed(packed, verify=True)
    everything = np.concatenate([np.load(packed / f"{i:05d}.npy") for i in range(3)])
    assert len(o) == 25 and o.shape == (3, 8, 8) and o.dtype == np.uint8 and o.kind == "pixels"
    for indices in ([24, 0, 9, 10, 0], np.arange(25)[::-1], [], slice(5, 15), torch.tensor([3, 20])):
        np.testing.assert_array_equal(o[indices], everything[np.asarray(indices, int) if not isinstance(indices, slice) else indices])
    np.testing.assert_array_equal(o[-1], everything[-1])
    with pytest.raises(IndexError): o[[25]]


def test_captions_and_splits_stay_with_their_pictures(packed):
    "Selecting a split takes pictures, captions and table along together"
    o = Packed(packed)
    held = o.select("held_out")
    assert held.captions == [f"caption {i}" for i in range(0, 25, 5)] == [o.captions[i] for i in range(0, 25, 5)]
    np.testing.assert_array_equal(held[:], o[np.arange(0, 25, 5)])
    assert set(held.meta["split"].to_pylist()) == {"held_out"} and '"style": "flat"' in held.meta["extra"][0].as_py()
    assert len(o.select("train")) == 20 and o.select(None) is o
    with pytest.raises(ValueError, match="no split 'test'; it has held_out, train"): o.select("test")


def test_damage_is_found(packed, tmp_path):
    "A short file is found at once, a flipped byte when asked to verify, and a missing manifest has its own line"
    import shutil
    shutil.copytree(packed, bad := tmp_path / "bad")
    data = bytearray((bad / "00001.npy").read_bytes()); data[-3] ^= 1
    (bad / "00001.npy").write_bytes(data); Packed(bad)
    with pytest.raises(ValueError, match="00001.npy: missing or damaged"): Packed(bad, verify=True)
    (bad / "00001.npy").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="00001.npy: missing or damaged"): Packed(bad)
    (bad / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="no manifest.json"): Packed(bad)
