"""What can happen to a run's checkpoints, made to happen: kills, full disks, damage, strangers' files, a second run."""
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import sd_nb.train.checkpoint as checkpoint
from sd_nb.data.latents import HashedFile, broken_files, write_json
from sd_nb.data.loader import Packed
from sd_nb.train.checkpoint import broken, bytes_of, checkpoints, latest, load, optimizer_tensors, restore_model, restore_optimizer, save
from sd_nb.train.place import check_place, run_lock
from test_checkpoint import parts, quiet_latest, same, training
from test_malformed import LIES, PAYLOADS

TESTS = os.path.dirname(os.path.abspath(__file__))


def python(code, *words, **env):
    "Run a program that can import the tests; its output, or its error"
    code = f"import sys; sys.path.insert(0, {TESTS!r})\n{code}"
    out = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, env=os.environ | env)
    return out.stdout.strip() or out.stderr


KILL = """
import os, signal
from pathlib import Path
from test_checkpoint import parts, same, quiet_latest
from sd_nb.train.checkpoint import load, save

def mortal(k):
    "Die before the k-th system call that changes the disk"
    count = [0]
    def wrap(original):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == k: os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        return call
    for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"): setattr(os, name, wrap(getattr(os, name)))

def child(directory, step, seed, keep, k=0, environment=True):
    "Save in a process that dies at its k-th change of the disk; return how it ended"
    pid = os.fork()
    if pid: return os.waitpid(pid, 0)[1]
    os.environ.pop("SD_NB_FAIL_AT", None)
    if k and environment: os.environ["SD_NB_FAIL_AT"] = str(k)
    if k and not environment: mortal(k)
    save(directory, step, parts(seed), {}, keep=keep)
    os._exit(0)

environment = sys.argv[2] == "environment"
for step in (1, 2):
    directory = Path(sys.argv[1]) / str(step)
    child(directory, 1, 1, 1)
    for k in range(1, 60):
        status = child(directory, step, 2, 1, k, environment)
        found = load(quiet_latest(directory))[0]
        assert same(found, parts(1)) or same(found, parts(2)), k
        if status == 0: break
        assert status == signal.SIGKILL, status
    assert k > 12 and same(found, parts(2)) and len(list(directory.iterdir())) == 1, (k, list(directory.iterdir()))
print("survived")
"""


@pytest.mark.parametrize("way", ["environment", "system call"])
def test_fault_01_kill_minus_nine_at_every_write_loses_nothing(tmp_path, way):
    "SIGKILL at each fail-point (`SD_NB_FAIL_AT=k`), and before each fsync, rename, mkdir and delete: a whole checkpoint is always there, and rubbish goes in the end"
    assert python(KILL, tmp_path, way) == "survived"


def test_fault_01_nobody_dies_unasked(tmp_path, monkeypatch):
    "Fail-points do nothing where the variable is absent, empty or beyond the last of them"
    for value in (None, "", "999999999"):
        monkeypatch.setenv("SD_NB_FAIL_AT", value) if value is not None else monkeypatch.delenv("SD_NB_FAIL_AT", raising=False)
        save(tmp_path, 1, parts(1), {})


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
@pytest.mark.parametrize("place", [(os, "fsync", 6), (os, "replace", 5), (HashedFile, "write", 8)], ids=lambda p: p[1])
@pytest.mark.parametrize("again", [False, True])
def test_fault_04_an_error_at_any_point_loses_nothing(tmp_path, monkeypatch, place, error, again):
    "The k-th write, fsync or rename fails, for every k: the newest whole checkpoint is the old or the new one, and no temporary file stays"
    save(tmp_path, 1, parts(1), {}); step = 1 if again else 2
    owner, call, least = place
    for k in range(1, 40):
        calls, original = [], getattr(owner, call)
        def failing(*args):
            calls.append(args)
            if len(calls) == k: raise error
            return original(*args)
        with monkeypatch.context() as m:
            m.setattr(owner, call, failing)
            try: save(tmp_path, step, parts(2), {}); break
            except (ValueError, KeyboardInterrupt) as e: assert "\n" not in str(e) and (type(e) is not ValueError or f"{bytes_of(parts(2)):,} bytes" in str(e))
        assert not list(tmp_path.glob("*partial*"))
        found = load(quiet_latest(tmp_path))[0]
        assert same(found, parts(1)) or same(found, parts(2))
    assert k > least and same(load(latest(tmp_path))[0], parts(2))


FULL = """
import resource
from test_checkpoint import parts
from sd_nb.train.checkpoint import save
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try: save(sys.argv[1], 2, parts(2), {})
except ValueError as error: print(error)
"""


def test_fault_04_a_disk_that_fills_up_is_one_line(tmp_path):
    "The kernel refuses bytes in the middle of a file: path and bytes needed are named, the old one is whole, nothing else is left"
    save(tmp_path, 1, parts(1), {})
    assert python(FULL, tmp_path) == f"{tmp_path}/step-0000002: cannot write its {bytes_of(parts(2)):,} bytes: [Errno 27] File too large"
    assert [o.name for o in tmp_path.iterdir()] == ["step-0000001"] and broken(tmp_path / "step-0000001") is None


def test_fault_04_a_full_disk_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    "One line names the place, the bytes needed and the bytes free; one byte more would do"
    save(tmp_path, 1, parts(1), {})
    need = bytes_of(parts(2))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, need - 1))
    monkeypatch.setattr(HashedFile, "write", lambda *_: pytest.fail("a byte was written"))
    words = rf"step-0000002: cannot write its {need:,} bytes: .*only {need - 1:,} bytes are free; make room"
    with pytest.raises(ValueError, match=words) as error: save(tmp_path, 2, parts(2), {})
    assert "\n" not in str(error.value) and [o.name for o in tmp_path.iterdir()] == ["step-0000001"]
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, need))
    save(tmp_path, 2, parts(2), {})


def test_fault_04_the_bytes_needed_are_those_written(tmp_path):
    "What the pre-flight asks for is the size of the files, headers included"
    path = save(tmp_path, 1, parts(1), {})
    assert bytes_of(parts(1)) == sum(o.stat().st_size for o in path.glob("*.safetensors"))


def unwritable(tmp_path):
    "Directories that cannot be written, also by root"
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "vanished" / "disk")
    return tmp_path / "file" / "c", tmp_path / "link", *([] if os.name != "posix" or not os.path.isdir("/proc/self") else ["/proc/self/c"])


def test_fault_05_a_place_that_cannot_be_written_is_refused_at_once(tmp_path):
    "Not a directory, vanished, of another's making: before training starts, and by `save` and `run_lock` too, in one line"
    for place in unwritable(tmp_path):
        for words, call in (("cannot write checkpoints of 1 bytes here", lambda: check_place(place, 1)), ("cannot write its", lambda: save(place, 1, parts(1), {})),
                            ("cannot write here", lambda: run_lock(place))):
            with pytest.raises(ValueError, match=f"{place}.*: {words}") as error: call()
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_fault_05_read_only_is_told_before_training(tmp_path, monkeypatch, number):
    "A directory that exists and takes no file"
    def refuse(**_): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=rf"cannot write checkpoints of 5,000 bytes here: .*{os.strerror(number)}"): check_place(tmp_path, 5000)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_fault_05_a_directory_without_permission(tmp_path):
    "The same by chmod"
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ValueError, match="Permission denied"): check_place(tmp_path, 1)
    finally: tmp_path.chmod(0o700)


def test_fault_05_a_good_place_is_made_and_left_empty(tmp_path):
    "The trial leaves nothing behind, and too little room is told before training"
    check_place(tmp_path / "a" / "b", 1)
    assert list((tmp_path / "a" / "b").iterdir()) == []
    with pytest.raises(ValueError, match="bytes are free; make room"): check_place(tmp_path, 10**18)


def forge(path, name, data):
    "Replace a file and vouch for it in the manifest, as an attacker would"
    (path / name).write_bytes(data)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"][name] = dict(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


def damage_missing(path): (path / "model.safetensors").unlink()
def damage_no_manifest(path): (path / "MANIFEST.json").unlink()
def damage_torn_manifest(path): (path / "MANIFEST.json").write_bytes((path / "MANIFEST.json").read_bytes()[:30])
def damage_truncated(path): os.truncate(path / "model.safetensors", 60)
def damage_empty(path): os.truncate(path / "state.json", 0)
def damage_empty_weights(path): os.truncate(path / "model.safetensors", 0)
def damage_flip(path):
    data = bytearray((path / "model.safetensors").read_bytes()); data[-1] ^= 4; (path / "model.safetensors").write_bytes(data)
def damage_swapped_steps(path): shutil.rmtree(path); shutil.copytree(path.with_name("step-0000001"), path)
def damage_swapped_file(path): shutil.copy2(path.with_name("step-0000001") / "model.safetensors", path)
def damage_swapped_state(path): shutil.copy2(path.with_name("step-0000001") / "state.json", path)
def damage_alien_manifest(path): (path / "MANIFEST.json").write_text("[]")
def damage_list_in_manifest(path): (path / "MANIFEST.json").write_text('{"step": 2, "files": []}')
def damage_deep_manifest(path): (path / "MANIFEST.json").write_text("[" * 100_000)
def damage_elsewhere(path): forge(path, "../step-0000001/state.json", b"{}")
def damage_directory(path): (path / "state.json").unlink(); (path / "state.json").mkdir()


@pytest.mark.parametrize("damage", [v for k, v in sorted(globals().items()) if k.startswith("damage_")], ids=lambda f: f.__name__[7:])
def test_fault_06_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, damage):
    "Whatever happened to the newest one, the one before it is used, and loading the broken one by name is refused"
    for step in (0, 1, 2): save(tmp_path, step, parts(step), dict(step=step), keep=3)
    bad = tmp_path / "step-0000002"
    damage(bad)
    with pytest.warns(UserWarning, match="step-0000002: skipped"): found = latest(tmp_path)
    want = 0 if damage is damage_elsewhere else 1  # which has damaged the one that it points to
    assert found.name == f"step-000000{want}" and same(load(found)[0], parts(want))
    with pytest.raises(ValueError, match="step-0000002: not a whole checkpoint") as error: load(bad)
    assert "\n" not in str(error.value)


def test_fault_06_every_flipped_bit_is_noticed(tmp_path):
    "One bit in each byte of every file, the manifest included"
    path, g = save(tmp_path, 7, parts(7), dict(step=7)), torch.Generator().manual_seed(0)
    files = [o for o in path.iterdir()]
    for file in files:
        raw = file.read_bytes()
        for at in range(0, len(raw), max(1, len(raw) // 150)):
            file.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << int(torch.randint(8, (), generator=g))]) + raw[at + 1:])
            assert broken(path), (file.name, at)
        file.write_bytes(raw)
    assert len(files) == 5 and broken(path) is None


def test_fault_06_what_cannot_be_read_is_damaged(tmp_path, monkeypatch):
    "A disk that answers with an error is one more kind of damage, not the end of the run"
    for step in (1, 2): save(tmp_path, step, parts(step), {})
    def failing(directory, files):
        if directory.name == "step-0000002": raise OSError(errno.EIO, "Input/output error")
        return broken_files(directory, files)
    monkeypatch.setattr(checkpoint, "broken_files", failing)
    with pytest.warns(UserWarning, match="step-0000002: skipped, it cannot be read: .*Input/output error"): assert latest(tmp_path).name == "step-0000001"


def test_fault_06_a_saved_step_repairs_a_damaged_one(tmp_path):
    "Going on from an older checkpoint and reaching the damaged step again replaces it"
    for step in (1, 2): save(tmp_path, step, parts(step), {})
    damage_flip(tmp_path / "step-0000002")
    save(tmp_path, 2, parts(3), {})
    assert same(load(latest(tmp_path))[0], parts(3)) and len(checkpoints(tmp_path)) == 2


def test_fault_06_the_only_good_one_is_never_pruned(tmp_path, monkeypatch):
    "If what was just written does not verify, everything older stays"
    save(tmp_path, 1, parts(1), {}, keep=1)
    def lying(path, value):
        receipt = write_json(path, value)
        if path.name == "MANIFEST.json": damage_flip(path.parent)
        return receipt
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "write_json", lying)
        with pytest.raises(ValueError, match="step-0000002: just written, but model.safetensors"): save(tmp_path, 2, parts(2), {}, keep=1)
    assert quiet_latest(tmp_path).name == "step-0000001"
    save(tmp_path, 3, parts(3), {}, keep=2)  # one good one older than this, one broken one in between
    assert [o.name for o in checkpoints(tmp_path)] == ["step-0000003", "step-0000001"]


WRONG = {
    "missing": (lambda s: s.pop("0.bias"), r"0\.bias: nothing instead of float32 \(8,\)"),
    "extra": (lambda s: s.update(more=torch.zeros(1)), r"more: float32 \(1,\) instead of nothing"),
    "renamed": (lambda s: s.update(bias=s.pop("0.bias")), r"0\.bias: nothing .*, bias: float32 \(8,\) instead of nothing"),
    "wrong shape": (lambda s: s.update({"2.weight": torch.zeros(8, 4)}), r"2\.weight: float32 \(8, 4\) instead of float32 \(4, 8\)"),
    "wrong type": (lambda s: s.update({"0.bias": s["0.bias"].half()}), r"0\.bias: float16 \(8,\) instead of float32 \(8,\)"),
    "NaN": (lambda s: s["2.bias"].fill_(torch.nan), r"2\.bias: NaN or infinity"),
    "infinity": (lambda s: s["2.bias"].fill_(-torch.inf), r"2\.bias: NaN or infinity"),
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("change, words", WRONG.values(), ids=WRONG)
def test_fault_07_weights_that_do_not_fit_are_listed(change, words, prefix):
    "Names, shapes and types in one line that names the file; not one tensor is touched"
    model, state = training()[0], {k: v.clone() for k, v in training(seed=1)[0].state_dict().items()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=f"^a/file: of another network: .*{words}") as error: restore_model(model, {prefix + k: v for k, v in state.items()}, "a/file")
    assert "\n" not in str(error.value) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("wrapping", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "{0[0]}._orig_mod.{0[2]}"])
def test_fault_07_prefixes_of_wrapped_networks_are_understood(wrapping):
    "What DDP and `torch.compile`, of the whole network or of a block, write before names is taken off"
    model, other = training()[0], training(seed=1)[0]
    restore_model(model, {wrapping.format(k if "[" not in wrapping else k.partition(".")): v for k, v in other.state_dict().items()}, "file")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_fault_07_wrappers_write_these_prefixes():
    "The real `torch.compile` wrapper and a real module called module"
    model, other = training()[0], training(seed=1)[0]
    restore_model(model, torch.compile(other).state_dict(), "file")
    restore_model(model, nn.ModuleDict(dict(module=other)).state_dict(), "file")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("change", [
    lambda t: t.update({"0.weight.exp_avg": torch.zeros(8)}), lambda t: t.pop("0.weight.exp_avg_sq"),
    lambda t: t.update({"0.weight.exp_avg_sq": torch.zeros(4, 8)}), lambda t: t.update({"ghost.exp_avg": torch.zeros(1)}),
], ids=["shape", "missing", "transposed", "extra"])
def test_fault_07_an_optimizers_state_that_does_not_fit_is_refused(change):
    "Moments are checked before the optimizer is touched, and the parameter is named"
    model, optimizer = training()
    model(torch.ones(1, 4)).sum().backward(); optimizer.step()
    tensors, rest = optimizer_tensors(optimizer, model)
    tensors = {k: v.clone() for k, v in tensors.items()}
    before = optimizer.state[model[0].weight]["exp_avg"].clone()
    change(tensors)
    with pytest.raises(ValueError, match="does not fit this network: (0.weight|ghost)") as error: restore_optimizer(optimizer, model, tensors, json.loads(json.dumps(rest)))
    assert "\n" not in str(error.value) and torch.equal(optimizer.state[model[0].weight]["exp_avg"], before)


def pickled(payload, canary, path):
    "The bytes of a pickle that makes a canary file when it is opened, as `torch.save` writes them"
    torch.save(PAYLOADS[payload](canary), path)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("payload", ["exec", "eval", "nested storage"])
def test_fault_09_a_pickle_in_a_checkpoint_runs_nothing(tmp_path, payload, name):
    "In place of each of our files, with a manifest that vouches for it: one line, and no canary"
    path = save(tmp_path / "c", 1, parts(1), {})
    data = pickled(payload, tmp_path / "canary", tmp_path / "evil")
    forge(path, name, data) if name != "MANIFEST.json" else (path / name).write_bytes(data)
    with pytest.raises(ValueError) as error: load(path)
    assert "\n" not in str(error.value) and not (tmp_path / "canary").exists()
    try: torch.load(tmp_path / "evil", weights_only=False)
    except Exception: pass  # what the payload leaves behind need not be a tensor
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".pkl", ".npy", ".safetensors"])
@pytest.mark.parametrize("vouched", [False, True])
def test_fault_09_a_strangers_file_in_a_checkpoint_is_left_alone(tmp_path, suffix, vouched):
    "A pickle under another name is not opened; a file that the manifest does not name is no part"
    path = save(tmp_path / "c", 1, parts(1), {})
    data = pickled("exec", tmp_path / "canary", tmp_path / "evil")
    forge(path, "more" + suffix, data) if vouched else (path / ("more" + suffix)).write_bytes(data)
    if vouched and suffix == ".safetensors":
        with pytest.raises(ValueError, match="more.safetensors"): load(path)
    else: assert same(load(path)[0], parts(1))
    assert not (tmp_path / "canary").exists()


class Bite:
    "Makes a file when it is unpickled"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, "w")


def test_fault_09_an_array_of_objects_runs_nothing(tmp_path):
    "Packed latents whose `.npy` is a pickle of objects, with a manifest that vouches for it"
    array = tmp_path / "00000.npy"
    np.save(array, np.array([Bite(tmp_path / "canary")], dtype=object), allow_pickle=True)
    pq.write_table(pa.table(dict(key=["a"], caption=["b"])), tmp_path / "00000.parquet")
    files = {o.name: dict(bytes=o.stat().st_size, sha256=hashlib.sha256(o.read_bytes()).hexdigest()) for o in (array, tmp_path / "00000.parquet")}
    write_json(tmp_path / "manifest.json", dict(kind="latents", count=1, shape=[1], dtype="float16", shards=[dict(name="00000", count=1, files=files)]))
    with pytest.raises(ValueError, match="Python objects"): Packed(tmp_path)
    assert not (tmp_path / "canary").exists()
    np.load(array, allow_pickle=True)
    assert (tmp_path / "canary").exists()


HOSTILE = """
import resource, time
from pathlib import Path
from test_fault_checkpoint import LIES, forge, load, parts, save
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for i, (name, lie) in enumerate(LIES.items()):
    path = save(sys.argv[1], i, parts(i), {}, keep=99)
    lie(path / "model.safetensors")
    forge(path, "model.safetensors", (path / "model.safetensors").read_bytes())
    began = time.monotonic()
    try: load(path)
    except ValueError as error: assert "model.safetensors" in str(error) and "\\n" not in str(error), error
    else: raise SystemExit(name + " was loaded")
    assert time.monotonic() - began < 5, name
megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
print(len(LIES), "refused in little memory" if megabytes < 150 else megabytes)
"""


def test_fault_10_hostile_safetensors_are_refused(tmp_path):
    "Huge headers, overlaps, holes, duplicates, with a manifest that vouches for them: one line each, in bounded memory and time"
    assert python(HOSTILE, tmp_path) == f"{len(LIES)} refused in little memory"


HOLD = """
import os, time
from sd_nb.train.place import run_lock
lock = run_lock(sys.argv[1])
worker = os.fork()
if worker: print(worker, flush=True)
time.sleep(60)
"""


def test_fault_27_a_second_run_is_refused_and_a_kill_frees_the_place(tmp_path):
    "The second is told the first's pid; after kill -9 it gets in at once, although a forked worker of the first lives on"
    first = subprocess.Popen([sys.executable, "-c", "import sys\n" + HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    worker = int(first.stdout.readline())
    try:
        for _ in range(2):
            with pytest.raises(ValueError, match=f"{tmp_path}: process {first.pid} is training here; stop it or choose another directory"): run_lock(tmp_path)
        first.kill(); first.wait()
        os.kill(worker, 0)
        with run_lock(tmp_path): assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    finally:
        first.kill(); os.kill(worker, signal.SIGKILL)


def test_fault_27_a_stale_lock_file_locks_nobody_out(tmp_path):
    "What a dead run left behind counts for nothing: not its pid, which another process may have now, and not its date, which may be in the future"
    (tmp_path / ".lock").write_text(f"{os.getppid()}\n")
    os.utime(tmp_path / ".lock", (2**33, 2**33))
    with run_lock(tmp_path):
        with pytest.raises(ValueError, match=f"process {os.getpid()} is"): run_lock(tmp_path)
    run_lock(tmp_path).close()


def test_fault_27_an_error_in_the_run_lets_go(tmp_path):
    "The lock ends with its block, however the block ends"
    with pytest.raises(BlockingIOError, match="the run's own"):
        with run_lock(tmp_path): raise BlockingIOError("the run's own")
    run_lock(tmp_path).close()
