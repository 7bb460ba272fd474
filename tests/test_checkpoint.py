import json
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


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, keep):
    "`keep` checkpoints stay, and nothing else"
    for step in range(1, 6): save(tmp_path, step, parts(step), {}, keep)
    assert [o.name for o in checkpoints(tmp_path)] == [f"step-{s:07d}" for s in range(5, 5 - keep, -1)] and len(list(tmp_path.iterdir())) == keep
    with pytest.raises(ValueError, match="at least 1"): save(tmp_path, 9, {}, {}, keep=0)


@pytest.mark.parametrize("keep, every, stay", [(1, 0, [12]), (1, 5, [5, 10, 12]), (2, 4, [4, 8, 11, 12]), (3, 6, [6, 10, 11, 12]), (1, 1, list(range(1, 13))), (2, 100, [11, 12])])
def test_milestones_stay_for_good(tmp_path, keep, every, stay):
    "The last k and every m-th step, nothing else"
    for step in range(1, 13): save(tmp_path, step, parts(step), {}, keep, every)
    assert sorted(int(o.name[5:]) for o in tmp_path.iterdir()) == stay
    with pytest.raises(ValueError, match="every 0 or more, not 2 and -1"): save(tmp_path, 13, {}, {}, keep_every=-1)


def test_a_milestone_that_was_moved_aside_counts_until_it_is_replaced(tmp_path):
    "A crash while a step was saved again can leave only its `.old`, which is then the milestone; beside its successor it is rubbish"
    for step in (2, 3): save(tmp_path, step, parts(step), {}, 5)
    (tmp_path / "step-0000002").rename(tmp_path / "step-0000002.old")
    save(tmp_path, 4, parts(4), {}, 1, 2)
    assert sorted(o.name for o in tmp_path.iterdir()) == ["step-0000002.old", "step-0000004"] and broken(tmp_path / "step-0000002.old") is None
    (tmp_path / "step-0000004").rename(tmp_path / "step-0000004.old")
    save(tmp_path, 4, parts(4), {}, 1, 2)
    (tmp_path / "step-0000002.old").rename(tmp_path / "step-0000002")
    (tmp_path / "step-0000002.old").mkdir()
    save(tmp_path, 6, parts(6), {}, 1, 2)
    assert sorted(o.name for o in tmp_path.iterdir()) == ["step-0000002", "step-0000004", "step-0000006"]


def test_a_damaged_spare_does_not_count(tmp_path):
    "`keep` whole ones stay: a damaged one in between is no spare"
    for step in (1, 2, 3): save(tmp_path, step, parts(step), {}, 3)
    (tmp_path / "step-0000003" / "state.json").unlink()
    save(tmp_path, 4, parts(4), {}, 2)
    assert [o.name for o in checkpoints(tmp_path)] == ["step-0000004", "step-0000002"]


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
