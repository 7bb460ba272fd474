"""The loader and the shard reader when something is wrong: uneven sizes, damaged files, lying archives, dying workers."""
import io
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from million import MEMORY, make_million
from torch.utils.data import DataLoader

from sd_nb.data.images import LIMIT, read_shard
from sd_nb.data.latents import read_manifest, write_json, write_packed
from sd_nb.data.loader import Packed, batch_indices, map_array, rank_slice

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (4, 8, 8)


def row(i): return dict(key=f"k{i}", caption=f"caption {i}", split="train" if i % 5 else "held_out", width=64, height=64, extra="{}")


def pack(out, counts, shape=SHAPE, dtype=np.float16):
    "A packed directory whose sample i holds nothing but i, with so many samples in each shard"
    out.mkdir(parents=True)
    shards, start = [], 0
    for name, count in enumerate(counts):
        array = np.broadcast_to(np.arange(start, start + count, dtype=dtype).reshape(-1, *[1] * len(shape)), (count, *shape))
        receipt = write_packed(out, f"{name:05d}", np.ascontiguousarray(array), [row(start + i) for i in range(count)], {})
        shards.append({k: receipt[k] for k in ("name", "count", "files")}); start += count
    write_json(out / "manifest.json", dict(kind="latents", shape=list(shape), dtype=np.dtype(dtype).name, count=start,
                                           fingerprint={}, shards=shards))
    return out


@pytest.fixture
def packed(tmp_path): return pack(tmp_path / "packed", [10, 10, 5])


def numbers(samples): return samples.reshape(len(samples), -1)[:, 0].astype(int).tolist()


# ---- the order

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 12), st.sampled_from([1, 2, 4]), st.integers(0, 2**40), st.integers(0, 60))
def test_order_is_the_same_on_1_2_and_4_ranks(n, share, world, seed, start):
    "Whatever the number of processes, and wherever it is resumed with another number, the stream goes on as it would have"
    batch = 4 * share
    alone = np.concatenate([batch_indices(s, n, batch, seed) for s in range(start, start + 3)])
    ranks = [rank_slice(batch_indices(s, n, batch, seed), r, world) for s in range(start, start + 3) for r in range(world)]
    np.testing.assert_array_equal(np.concatenate(ranks), alone)
    assert {len(o) for o in ranks} == {batch // world}


def test_resume_at_any_step_gives_the_rest_of_the_epoch(packed):
    "What was read before the interruption and what is read after it, on another number of ranks, is each sample once"
    data = Packed(packed)
    for stop in range(6):
        before = [numbers(data[batch_indices(s, 25, 5, seed=3)]) for s in range(stop)]
        after = [numbers(data[rank_slice(batch_indices(s, 25, 5, seed=3), r, 5)]) for s in range(stop, 5) for r in range(5)]
        seen = sum(before + after, [])
        assert sorted(seen) == list(range(25)) and seen == batch_indices(0, 25, 25, seed=3).tolist()


@pytest.mark.parametrize("n", [1, 3, 15, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("world", [2, 4])
def test_fault_16_uneven_data_gives_every_rank_as_many_samples(n, world):
    "N mod (world x batch) of 0, 1 and the most, and fewer samples than ranks: equal slices, exact epochs, no step left out"
    steps = [[rank_slice(batch_indices(s, n, 16, 0), r, world) for r in range(world)] for s in range(n)]
    assert {len(o) for ranks in steps for o in ranks} == {16 // world}
    epochs = np.concatenate([np.concatenate(ranks) for ranks in steps]).reshape(16, n)
    for epoch in epochs: assert sorted(epoch) == list(range(n))


def test_the_last_short_batch_is_filled_from_the_next_epoch():
    "Ten samples in batches of four: the third batch ends epoch 0 and begins epoch 1"
    third = batch_indices(2, 10, 4, 0)
    np.testing.assert_array_equal(third[:2], batch_indices(0, 10, 10, 0)[8:])
    np.testing.assert_array_equal(third[2:], batch_indices(1, 10, 10, 0)[:2])
    assert batch_indices(1, 10, 10, 0).tolist() != batch_indices(0, 10, 10, 0).tolist()


def test_fault_16_empty_shards_hold_nothing_and_hurt_nothing(tmp_path):
    "At the beginning, in the middle and at the end"
    data = Packed(pack(tmp_path / "p", [0, 3, 0, 0, 2, 0]), verify=True)
    assert len(data) == 5 and numbers(data[:]) == [0, 1, 2, 3, 4] and numbers(data[[4, 2, -5]]) == [4, 2, 0]
    assert data.captions == [f"caption {i}" for i in range(5)] and numbers(data.select("held_out")[:]) == [0]


def test_fault_16_an_empty_data_set_is_one_clear_line(tmp_path):
    "It can be opened and has no batch and no split"
    data = Packed(pack(tmp_path / "p", [0, 0]))
    assert len(data) == 0 and data[[]].shape == (0, *SHAPE)
    with pytest.raises(ValueError, match="cannot draw batches of 4 from 0 samples"): batch_indices(0, len(data), 4, 0)
    with pytest.raises(ValueError, match="no split 'train'"): data.select("train")
    with pytest.raises(IndexError, match="no sample 0: there are 0"): data[[0]]


@pytest.mark.parametrize("index", [[0.5], [True, False], 1.0, "a", [None], [slice(2)]])
def test_an_index_that_is_no_whole_number_is_refused(packed, index):
    "Rather than rounded"
    with pytest.raises(IndexError, match="whole numbers"): Packed(packed)[index]


# ---- damaged files

def flip(path, at):
    data = bytearray(path.read_bytes()); data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "deleted", "longer", "swapped"])
def test_fault_17_a_damaged_shard_is_named(packed, suffix, damage):
    "By its checksum where its size is right, by its size otherwise; the message is one line with the file's name"
    path = packed / f"00001.{suffix}"
    data = path.read_bytes()
    if damage == "deleted": path.unlink()
    elif damage == "flipped": flip(path, len(data) // 2)
    else: path.write_bytes(dict(truncated=data[:-1], empty=b"", longer=data + b"\0",
                                swapped=(packed / f"00000.{suffix}").read_bytes())[damage])
    with pytest.raises(ValueError, match=rf"00001\.{suffix}: missing or damaged") as error: Packed(packed, verify=True)
    assert "\n" not in str(error.value)
    if damage not in ("flipped", "swapped"):
        with pytest.raises(ValueError, match=rf"00001\.{suffix}: missing or damaged"): Packed(packed)


def test_fault_17_a_shard_deleted_under_a_running_process(packed):
    "The process keeps what it has mapped; whoever opens the directory next is told the name"
    data = Packed(packed)
    before = data[:]
    (packed / "00001.npy").unlink()
    np.testing.assert_array_equal(data[:], before)
    with pytest.raises(ValueError, match="00001.npy: missing"): Packed(packed)


def test_fault_17_every_flipped_bit_of_a_header_is_refused_or_harmless(packed):
    "Without verification the array is still the one that the manifest means, or one line names the file"
    path, want = packed / "00001.npy", np.load(packed / "00001.npy")
    data = path.read_bytes()
    refused = 0
    for at in range(128):
        for bit in range(8):
            broken = bytearray(data); broken[at] ^= 1 << bit
            path.write_bytes(broken)
            try: np.testing.assert_array_equal(map_array(path, (10, *SHAPE), np.float16), want)
            except ValueError as error:
                refused += 1
                assert "00001.npy" in str(error) and "\n" not in str(error)
    assert refused > 400


@pytest.mark.parametrize("array", [np.zeros((10, *SHAPE), np.float32), np.zeros((10, 4, 8, 9), np.float16),
                                   np.zeros((9, *SHAPE), np.float16), np.zeros((10, *SHAPE), ">f2")])
def test_fault_17_another_array_than_the_manifest_means(packed, array):
    "Another type, shape, length or byte order, with a manifest that agrees in size: refused before a sample is read"
    np.save(packed / "00001.npy", array)
    manifest = read_manifest(packed)
    manifest["shards"][1]["files"]["00001.npy"]["bytes"] = (packed / "00001.npy").stat().st_size
    write_json(packed / "manifest.json", manifest)
    with pytest.raises(ValueError, match="00001.npy: holds .*, the manifest says float16"): Packed(packed)


class Canary:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), "w")


@pytest.mark.parametrize("bare", [False, True])
def test_fault_09_a_pickled_array_is_not_run(packed, tmp_path, bare):
    "An object array, or nothing but a pickle, in place of a shard is refused, and its code never runs"
    evil = Canary(tmp_path / "canary")
    if bare: (packed / "00001.npy").write_bytes(pickle.dumps(evil))
    else: np.save(packed / "00001.npy", np.array([evil], object), allow_pickle=True)
    manifest = read_manifest(packed)
    manifest["shards"][1]["files"]["00001.npy"]["bytes"] = (packed / "00001.npy").stat().st_size
    write_json(packed / "manifest.json", manifest)
    with pytest.raises(ValueError, match="00001.npy: not a NumPy array"): Packed(packed)
    assert not (tmp_path / "canary").exists()


# ---- lying archives

def tar_of(path, *members):
    "An archive of (name, contents, changes to the header)"
    with tarfile.open(path, "w") as tar:
        for name, data, changes in members:
            info = tarfile.TarInfo(name); info.size = len(data)
            for key, value in changes.items(): setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def header(name, size, kind=tarfile.REGTYPE):
    "512 bytes that claim any size, also a negative one"
    info = tarfile.TarInfo(name); info.type = kind
    buf = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    buf[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    buf[148:156] = b" " * 8
    buf[148:156] = b"%06o\0 " % sum(buf)
    return bytes(buf)


def png():
    from PIL import Image
    Image.new("RGB", (2, 2)).save(out := io.BytesIO(), "PNG")
    return out.getvalue()


@pytest.mark.parametrize("name", ["../evil", "../../../tmp/evil", "/tmp/evil", "a/../../evil", "C:\\evil", "/proc/self/evil"])
def test_fault_18_names_that_climb_are_only_keys(tmp_path, name):
    "Nothing is written anywhere"
    (tmp_path / "in").mkdir()
    path = tar_of(tmp_path / "in" / "a.tar", (f"{name}.png", png(), {}), (f"{name}.txt", b"x", {}))
    before = {o for o in Path("/tmp").glob("evil*")}
    assert [o.key for o in read_shard(path)] == [name]
    assert sorted(o.name for o in tmp_path.rglob("*")) == ["a.tar", "in"] and {o for o in Path("/tmp").glob("evil*")} == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_fault_18_links_and_devices_are_passed_over(tmp_path, kind):
    "A caption that is a link to a secret, or a device that never ends, is not read; files beside it are"
    secret = tmp_path / "secret.txt"; secret.write_text("password")
    path = tar_of(tmp_path / "a.tar", ("1.png", png(), {}), ("1.txt", b"", dict(type=kind, linkname=str(secret))), ("1.json", b'{"caption": "fine"}', {}))
    assert [o.caption for o in read_shard(path)] == ["fine"]
    path = tar_of(tmp_path / "b.tar", ("1.png", b"", dict(type=kind, linkname="1.txt")), ("1.txt", b"x", {}))
    with pytest.raises(ValueError, match="b.tar: 1 has no picture"): list(read_shard(path))


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_SPARSE])
@pytest.mark.parametrize("size", [LIMIT + 1, 10**12, 2**60])
def test_fault_18_a_claimed_terabyte_is_refused(tmp_path, kind, size):
    "Whatever the header describes, one line and no memory"
    (tmp_path / "a.tar").write_bytes(header("1.png", size, kind) + bytes(20480))
    with pytest.raises(ValueError, match="a.tar: not a whole tar archive") as error: list(read_shard(tmp_path / "a.tar"))
    assert "\n" not in str(error.value)


def test_fault_18_a_sparse_terabyte_on_the_disk_is_refused(tmp_path):
    "The bytes are really there, as far as the file system says"
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(header("1.png", 2**40)); file.truncate(512 + 2**40 + 1024)
    with pytest.raises(ValueError, match="1.png claims 1099511627776 bytes"): list(read_shard(tmp_path / "a.tar"))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("size", [-512, -1024, -10**6])
def test_fault_18_a_negative_size_does_not_send_the_reader_back(tmp_path, size):
    "In the header itself, and in an extended one that overrules it"
    whole = ("0.png", png(), {}), ("0.txt", b"x", {})
    data = tar_of(tmp_path / "a.tar", *whole).read_bytes()
    (tmp_path / "a.tar").write_bytes(data.rstrip(b"\0").ljust(2048, b"\0") + header("1.txt", size) + bytes(2048))
    tar_of(tmp_path / "b.tar", *whole, ("1.txt", b"x", dict(pax_headers=dict(size=str(size)))))
    for name in "ab":
        with pytest.raises(ValueError, match=f"{name}.tar: .*1.txt claims {size} bytes"): list(read_shard(tmp_path / f"{name}.tar"))


def test_fault_18_extended_headers_without_end(tmp_path):
    "Ten thousand headers that each describe the next"
    extended = header("x", 512, tarfile.XHDTYPE) + b"13 comment=x\n".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(extended * 10_000 + bytes(1024))
    with pytest.raises(ValueError, match="a.tar: not a whole tar archive"): list(read_shard(tmp_path / "a.tar"))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=4))
def test_fault_17_damage_that_the_headers_vouch_for(damage):
    "Any bytes changed, and the headers' sums made right again: samples, or one line that can be printed"
    with tempfile.TemporaryDirectory() as home:
        path = tar_of(Path(home) / "a.tar", ("é" * 80 + "1.png", png(), {}), ("é" * 80 + "1.txt", b"x", dict(pax_headers=dict(comment="x"))),
                      ("2.png", png(), {}), ("2.txt", b"y", {}), ("2.json", b"{}", {}))
        data = bytearray(path.read_bytes())
        for at, byte in damage: data[at % len(data)] = byte
        for at in range(0, len(data), 512):
            if data[at + 257:at + 262] == b"ustar":
                data[at + 148:at + 156] = b" " * 8
                data[at + 148:at + 156] = b"%06o\0 " % sum(data[at:at + 512])
        path.write_bytes(data)
        try: assert len(list(read_shard(path))) <= 2
        except ValueError as error: assert "a.tar: " in str(error) and "\n" not in str(error) and str(error).encode()


def test_a_name_that_cannot_be_printed_is_no_second_error(tmp_path):
    "A line break and bytes that are no text, in the name of a sample that has no caption"
    path = tar_of(tmp_path / "a.tar", ("a\nb\udcff.png", png(), {}))
    with pytest.raises(ValueError, match="a.tar: a b. has no caption") as error: list(read_shard(path))
    assert str(error.value).encode()


def test_fault_18_the_same_member_twice(tmp_path):
    "Which caption is the right one? Nobody knows, so it is refused"
    path = tar_of(tmp_path / "a.tar", ("1.png", png(), {}), ("1.txt", b"x", {}), ("1.txt", b"y", {}))
    with pytest.raises(ValueError, match="a.tar: 1.txt is there twice"): list(read_shard(path))


MANY = """
import sys
from sd_nb.data.images import read_shard
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
try: list(read_shard(sys.argv[1], images=False))
except ValueError as error: print(error)
print(peak() - before)
"""


def members(path, count):
    "An archive of so many empty members that nobody asked for"
    with open(path, "wb") as file:
        for _ in range(0, count, 5000): file.write(header("a.bin", 0) * 5000)
        file.write(bytes(1024))
    return path


@pytest.mark.parametrize("count", [50_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_fault_18_a_million_members_are_not_remembered(tmp_path, count):
    "Reading past them takes less than 15 MB, whatever their number"
    done = run(MANY, members(tmp_path / "a.tar", count))
    assert int(done.split()[-1]) < 15_000, done


# ---- processes

def start(script, *args):
    "Run a script in a fresh Python"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script, *map(str, args)], env=env, capture_output=True, text=True, timeout=300)


def run(script, *args):
    "Run a script in a fresh Python and return what it printed"
    done = start(script, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def batches(n, steps): return [batch_indices(s, n, 4, 0) for s in range(steps)]


def test_batches_through_worker_processes(packed):
    "Through PyTorch's workers come the same batches; to a process that is started anew only the directory's name travels"
    data = Packed(packed).select("train")
    assert len(pickle.dumps(Packed(packed))) < 500 and numbers(pickle.loads(pickle.dumps(data))[:]) == numbers(data[:])
    want = [numbers(data[rows]) for rows in batches(20, 6)]
    loader = DataLoader(data, batch_size=None, sampler=batches(20, 6), num_workers=2, multiprocessing_context="fork")
    assert [numbers(o.numpy()) for o in loader] == want


KILLED = """
import os, signal, sys, numpy as np
from torch.utils.data import DataLoader
from sd_nb.data.loader import Packed
loader = iter(DataLoader(Packed(sys.argv[1]), batch_size=None, sampler=[np.arange(5)] * 500, num_workers=1, multiprocessing_context="fork"))
next(loader)
os.kill(loader._workers[0].pid, signal.SIGKILL)
for _ in loader: pass
"""


def test_fault_28_a_killed_worker_is_an_error_and_not_a_hang(packed):
    "PyTorch says which process died, and of what; or, where it was just listening to it, that the connection broke"
    done = start(KILLED, packed)
    assert done.returncode and re.search("worker .* is killed by signal: Killed|Connection reset", done.stderr)


@pytest.mark.timeout(60)
def test_fault_28_an_exception_in_a_worker_comes_with_its_cause(packed):
    "The number of the sample that does not exist reaches the main process"
    loader = DataLoader(Packed(packed), batch_size=None, sampler=[np.array([3, 99])], num_workers=1, multiprocessing_context="fork")
    with pytest.raises(IndexError, match="no sample 99: there are 25"): list(loader)


def _read_in_child(data, queue): queue.put(numbers(data[::-1]))


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fault_28_fork_after_threads(packed):
    "Threads that read all the time hold no lock that a forked child would wait for"
    data, stop, context = Packed(packed), threading.Event(), multiprocessing.get_context("fork")

    def _read():
        while not stop.is_set(): data[::-1]
    readers = [threading.Thread(target=_read) for _ in range(3)]
    for o in readers: o.start()
    try:
        for _ in range(5):
            queue = context.SimpleQueue()
            child = context.Process(target=_read_in_child, args=(data, queue)); child.start()
            child.join(20)
            assert child.exitcode == 0 and queue.get() == list(range(25))[::-1]
    finally:
        stop.set()
        for o in readers: o.join()


# ---- memory

@pytest.fixture
def million(tmp_path):
    yield make_million(tmp_path)
    shutil.rmtree(tmp_path)


def test_a_million_samples_take_less_than_50_MB(million):
    "Private memory of a process that opens all of them, then one split, and reads two batches, beyond what the imports took"
    (n, whole), (train, chosen) = (map(int, line.split()) for line in run(MEMORY, million).splitlines())
    assert (n, train) == (1_000_000, 980_000) and whole < 10_000 and chosen < 50_000
