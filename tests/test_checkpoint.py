import json
import os
import shutil
import subprocess
import sys
import warnings
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
import sd_nb.train.checkpoint as checkpoint
from sd_nb.train.checkpoint import broken, checkpoints, latest, load, optimizer_tensors, restore_optimizer, save, write_safetensors


def parts(step):
    "A little of everything, different for each step"
    g = torch.Generator().manual_seed(step)
    return dict(model={"a.weight": torch.randn(5, 7, generator=g), "odd": torch.randint(0, 255, (3,), generator=g, dtype=torch.uint8)},
                optimizer={"a.weight.step": torch.tensor(float(step)), "empty": torch.empty(0, 4)}, rng={"torch": g.get_state()})


def same(a, b):
    "Bitwise equality of parts, dtypes and shapes included"
    return a.keys() == b.keys() and all(a[p].keys() == b[p].keys() and all(
        a[p][n].dtype == b[p][n].dtype and torch.equal(a[p][n], b[p][n]) for n in a[p]) for p in a)


def snapshot(directory):
    "Every file under a directory and its bytes"
    return {o.relative_to(directory): o.read_bytes() for o in directory.rglob("*") if o.is_file()}


def quiet_latest(directory):
    "The newest whole checkpoint, without the warnings"
    with warnings.catch_warnings(): warnings.simplefilter("ignore"); return latest(directory)


def test_round_trip_is_bitwise(tmp_path):
    "What is loaded is what was saved: tensors bit for bit, state as JSON holds it"
    state = dict(step=1000, losses=[0.1, 1e-17], name="ä", none=None)
    path = save(tmp_path / "c", 1000, parts(0), state)
    assert path == tmp_path / "c" / "step-0001000" == latest(tmp_path / "c")
    loaded, back = load(path)
    assert same(loaded, parts(0)) and back == state


def test_safetensors_is_the_librarys_format(tmp_path):
    "The library reads our file, for every dtype, and reads back NaN, -0 and infinity as they are"
    tensors = {str(d): torch.tensor([0, 1, 1]).to(d) for d in checkpoint.DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "view": torch.arange(12.0).view(3, 4).T, "odd": torch.tensor([float("nan"), -0.0, float("inf")])}
    receipt = write_safetensors(tmp_path / "ours", tensors)
    ours = load_file(tmp_path / "ours")
    assert ours.keys() == tensors.keys()
    for name, t in tensors.items(): assert ours[name].dtype == t.dtype and ours[name].shape == t.shape and \
        ours[name].reshape(-1).view(torch.uint8).tolist() == t.contiguous().reshape(-1).view(torch.uint8).tolist()
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "theirs").stat().st_size == receipt["bytes"]
    with pytest.raises(ValueError, match="x: safetensors cannot hold"): write_safetensors(tmp_path / "no", {"x": torch.zeros(1, dtype=torch.complex64)})
    assert not (tmp_path / "no").exists()


def test_nothing_is_a_pickle(tmp_path):
    "Only safetensors and JSON are written; no code of ours unpickles"
    path = save(tmp_path, 1, parts(0), {})
    assert {o.suffix for o in path.iterdir()} == {".safetensors", ".json"}
    assert not any(b.startswith((b"\x80", b"PK")) for b in snapshot(path).values())
    source = open(checkpoint.__file__).read()
    assert "pickle" not in source.replace("no pickle", "") and "torch.load" not in source


def damage_missing(path): (path / "model.safetensors").unlink()
def damage_no_manifest(path): (path / "MANIFEST.json").unlink()
def damage_torn_manifest(path): (path / "MANIFEST.json").write_bytes((path / "MANIFEST.json").read_bytes()[:30])
def damage_truncated(path): os.truncate(path / "model.safetensors", 60)
def damage_empty(path): os.truncate(path / "state.json", 0)
def damage_flip(path):
    data = bytearray((path / "model.safetensors").read_bytes()); data[-1] ^= 4; (path / "model.safetensors").write_bytes(data)
def damage_swap(path): shutil.rmtree(path); shutil.copytree(path.with_name("step-0000001"), path)
def damage_alien_manifest(path): (path / "MANIFEST.json").write_text("[]")


@pytest.mark.parametrize("damage", [v for k, v in sorted(globals().items()) if k.startswith("damage_")])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, damage):
    "Whatever happened to the newest one, the one before it is used, and loading the broken one by name is refused"
    save(tmp_path, 1, parts(1), dict(step=1))
    bad = save(tmp_path, 2, parts(2), dict(step=2))
    damage(bad)
    with pytest.warns(UserWarning, match="step-0000002: skipped"): found = latest(tmp_path)
    assert found.name == "step-0000001" and same(load(found)[0], parts(1))
    with pytest.raises(ValueError, match="step-0000002: not a whole checkpoint"): load(bad)


def test_a_saved_step_repairs_a_damaged_one(tmp_path):
    "Going on from an older checkpoint and reaching the damaged step again replaces it"
    for step in (1, 2): save(tmp_path, step, parts(step), {})
    damage_flip(tmp_path / "step-0000002")
    save(tmp_path, 2, parts(3), {})
    assert same(load(latest(tmp_path))[0], parts(3)) and len(checkpoints(tmp_path)) == 2


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, keep):
    "`keep` checkpoints stay, and nothing else"
    for step in range(1, 6): save(tmp_path, step, parts(step), {}, keep)
    assert [o.name for o in checkpoints(tmp_path)] == [f"step-{s:07d}" for s in range(5, 5 - keep, -1)] and len(list(tmp_path.iterdir())) == keep
    with pytest.raises(ValueError, match="at least 1"): save(tmp_path, 9, {}, {}, keep=0)


def test_the_only_good_one_is_never_pruned(tmp_path, monkeypatch):
    "If what was just written does not verify, everything older stays"
    save(tmp_path, 1, parts(1), {}, keep=1)
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "write_json", lambda path, value: real(path, value) | (damage_flip(path.parent) or {}) if path.name == "MANIFEST.json" else real(path, value))
        with pytest.raises(ValueError, match="step-0000002: just written, but model.safetensors"): save(tmp_path, 2, parts(2), {}, keep=1)
    assert quiet_latest(tmp_path).name == "step-0000001"
    save(tmp_path, 3, parts(3), {}, keep=2)  # one good one older than this, one broken one in between
    assert [o.name for o in checkpoints(tmp_path)] == ["step-0000003", "step-0000001"]


real = checkpoint.write_json


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("again", [False, True])
def test_an_error_at_any_point_loses_nothing(tmp_path, monkeypatch, call, error, again):
    "The k-th fsync or rename fails, for every k: the newest whole checkpoint is the old or the new one, never neither"
    save(tmp_path, 1, parts(1), {}); step = 1 if again else 2
    for k in range(1, 30):
        calls, original = [], getattr(os, call)
        def failing(*args):
            calls.append(args)
            if len(calls) == k: raise error
            return original(*args)
        with monkeypatch.context() as m:
            m.setattr(os, call, failing)
            try: save(tmp_path, step, parts(2), {}); break
            except (ValueError, KeyboardInterrupt) as e: assert "\n" not in str(e)
        assert not list(tmp_path.glob("*partial*"))
        found = load(quiet_latest(tmp_path))[0]
        assert same(found, parts(1)) or same(found, parts(2))
    assert k > (5 if call == "replace" else 6) and same(load(latest(tmp_path))[0], parts(2))


KILL = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_checkpoint import parts, same, quiet_latest, checkpoints
from sd_nb.train.checkpoint import load, save
for again in (0, 1):
    directory = Path({directory!r}) / str(again)
    save(directory, 1, parts(1), {{}})
    for k in range(1, 60):
        child = os.fork()
        if child == 0:
            count = [0]
            def mortal(original):
                def call(*args, **kwargs):
                    count[0] += 1
                    if count[0] == k: os.kill(os.getpid(), signal.SIGKILL)
                    return original(*args, **kwargs)
                return call
            for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"): setattr(os, name, mortal(getattr(os, name)))
            save(directory, 1 if again else 2, parts(2), {{}}, keep=1)
            os._exit(0)
        alive = os.waitpid(child, 0)[1] == 0
        found = load(quiet_latest(directory))[0]
        assert same(found, parts(1)) or same(found, parts(2)), k
        if alive: break
    assert alive and k > 12 and same(found, parts(2)) and len(list(directory.iterdir())) == 1, (k, list(directory.iterdir()))
print("survived")
"""


def test_kill_minus_nine_at_any_point_loses_nothing(tmp_path):
    "SIGKILL before every fsync, rename, mkdir and delete of a save: a whole checkpoint is always there, and rubbish goes in the end"
    code = KILL.format(tests=os.path.dirname(os.path.abspath(__file__)), directory=str(tmp_path))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "survived", out.stderr


def test_a_full_disk_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    "One line names the place, the bytes needed and the bytes free"
    save(tmp_path, 1, parts(1), {})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ValueError, match=r"step-0000002: cannot write the checkpoint: .*needs 0.00 GB and 0.00 GB are free") as error: save(tmp_path, 2, parts(2), {})
    assert "\n" not in str(error.value) and [o.name for o in tmp_path.iterdir()] == ["step-0000001"]


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path):
    "A file where the directory should be"
    (tmp_path / "c").write_text("")
    with pytest.raises(ValueError, match="c/step-0000001: cannot write the checkpoint") as error: save(tmp_path / "c", 1, parts(1), {})
    assert "\n" not in str(error.value)


def test_no_checkpoint_is_no_error(tmp_path):
    "A run that has none starts from the beginning; one asked for by name must be there"
    assert latest(tmp_path / "nowhere") is None and latest(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="no such checkpoint"): load(tmp_path / "step-0000001")


def test_loaded_tensors_do_not_touch_the_file(tmp_path):
    "Training on with what was loaded leaves the checkpoint as it is"
    path = save(tmp_path, 1, parts(1), {})
    for part in load(path)[0].values():
        for t in part.values(): t.zero_()
    assert broken(path) is None and same(load(path)[0], parts(1))


def training(seed=0):
    "A network with two groups of parameters and its AdamW"
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    groups = [dict(params=[p for n, p in model.named_parameters() if "weight" in n], weight_decay=0.1),
              dict(params=[p for n, p in model.named_parameters() if "bias" in n], weight_decay=0.0, lr=3e-3)]
    return model, torch.optim.AdamW(groups, lr=1e-2)


def steps(model, optimizer, first, last):
    "Train on what each step's own seed draws"
    for step in range(first, last):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad(); (model(x) - x.flip(1)).pow(2).mean().backward(); optimizer.step()


def test_resume_is_bitwise(tmp_path):
    "Ten steps are five steps, a checkpoint, a new process's objects and five more: weights and AdamW's state alike"
    model, optimizer = training(); steps(model, optimizer, 0, 5)
    tensors, rest = optimizer_tensors(optimizer, model)
    save(tmp_path, 5, dict(model=model.state_dict(), optimizer=tensors), dict(optimizer=rest))
    other, fresh = training(seed=1)
    fresh.param_groups[0]["lr"] = 7.0
    loaded, state = load(latest(tmp_path))
    other.load_state_dict(loaded["model"]); restore_optimizer(fresh, other, loaded["optimizer"], state["optimizer"])
    steps(model, optimizer, 5, 10); steps(other, fresh, 5, 10)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    for a, b in zip(optimizer_tensors(optimizer, model), optimizer_tensors(fresh, other)):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


def test_an_optimizer_that_never_stepped_can_be_saved(tmp_path):
    "Before the first step there is no state, and that comes back too"
    model, optimizer = training()
    tensors, rest = optimizer_tensors(optimizer, model)
    assert tensors == {}
    restore_optimizer(optimizer, model, tensors, json.loads(json.dumps(rest)))
    assert optimizer.param_groups[1]["lr"] == 3e-3 and optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_another_networks_optimizer_is_refused():
    "Neither a state of other parameters nor an optimizer of another network"
    model, optimizer = training(); tensors, rest = optimizer_tensors(optimizer, model)
    small = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="other parameters"): restore_optimizer(torch.optim.AdamW(small.parameters()), small, tensors, rest)
    with pytest.raises(ValueError, match="does not have"): optimizer_tensors(optimizer, small)
