"""Saving in the background: the bytes of the foreground, a stall that is only the copy, and no failure in silence."""
import threading
import time
import warnings
from contextlib import contextmanager

import pytest
import torch

import sd_nb.train.checkpoint as checkpoint
from sd_nb.train.background import Saver, snapshot
from test_checkpoint import parts, same, snapshot as contents, steps, training
from test_fault_checkpoint import python


@contextmanager
def closed_disk(monkeypatch):
    "Let every save wait at a gate before its first byte; yields the gate, and what has come to it and what went through"
    gate, came, went, real = threading.Event(), [], [], checkpoint.save

    def save(directory, step, *rest):
        came.append(step)
        assert gate.wait(30)
        out = real(directory, step, *rest)
        went.append(step)
        return out

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "save", save)
        try: yield gate, came, went
        finally: gate.set()


def until(condition):
    "Wait until it is so"
    for _ in range(3000):
        if condition(): return
        time.sleep(0.01)
    pytest.fail("waited in vain")


def test_background_equals_foreground_byte_for_byte(tmp_path):
    "Every file of every checkpoint of a run, manifests included, while training goes on changing the tensors"
    model, optimizer = training()
    with Saver(tmp_path / "back", 2, 4) as saver:
        for step in range(1, 12):
            steps(model, optimizer, step - 1, step); saver.check()
            tensors, rest = checkpoint.optimizer_tensors(optimizer, model)
            what = dict(model=model.state_dict(), optimizer=tensors), dict(step=step, optimizer=rest, pair=(1, 2))
            checkpoint.save(tmp_path / "front", step, *what, 2, 4); saver.save(step, *what)
    assert contents(tmp_path / "front") == contents(tmp_path / "back")
    assert sorted(int(o.name[5:]) for o in (tmp_path / "back").iterdir()) == [4, 8, 10, 11]


def test_training_goes_on_while_the_disk_is_closed(tmp_path, monkeypatch):
    "`save` returns and steps are taken before one byte is written; what is written is what was there when it was called"
    live, state = parts(1), dict(losses=[1.0])
    with closed_disk(monkeypatch) as (gate, came, went), Saver(tmp_path / "c") as saver:
        saver.save(1, live, state)
        for tensors in live.values():
            for t in tensors.values(): t.zero_()
        state["losses"].append(2.0)
        for _ in range(3): saver.check()
        until(lambda: came == [1])
        assert went == [] and not saver.pending.done() and not (tmp_path / "c").exists()
        gate.set()
    loaded, told = checkpoint.load(tmp_path / "c" / "step-0000001")
    assert same(loaded, parts(1)) and told == dict(losses=[1.0])


def test_one_write_is_in_flight(tmp_path, monkeypatch):
    "The second save waits for the first, and copies only after it: what it writes is what is there then"
    live = parts(1)
    with closed_disk(monkeypatch) as (gate, came, went), Saver(tmp_path) as saver:
        saver.save(1, live, {})
        second = threading.Thread(target=saver.save, args=(2, live, {})); second.start()
        until(lambda: came == [1]); second.join(0.2)
        assert second.is_alive() and came == [1]
        live["model"]["a.weight"].fill_(7)
        gate.set(); second.join()
        assert went[0] == 1
    assert came == went == [1, 2]
    assert same(checkpoint.load(tmp_path / "step-0000001")[0], parts(1)) and same(checkpoint.load(tmp_path / "step-0000002")[0], live)


@pytest.mark.parametrize("notice", ["check", "save", "wait", "exit"])
def test_a_failure_surfaces(tmp_path, notice):
    "At the next step, at the next save, at a wait or at the end, whichever is first; and once"
    (tmp_path / "note").write_text("")
    saver = Saver(tmp_path / "note" / "c")
    saver.save(1, parts(1), {})
    until(saver.pending.done)
    calls = dict(check=saver.check, wait=saver.wait, save=lambda: saver.save(2, parts(2), {}), exit=lambda: saver.__exit__(None, None, None))
    with pytest.raises(ValueError, match="step-0000001: cannot write its"): calls[notice]()
    assert saver.pending is None
    saver.check(); saver.wait(); saver.__exit__(None, None, None)


def test_an_error_of_the_run_is_not_hidden(tmp_path):
    "It is the one that is raised; the failed write is a warning"
    (tmp_path / "note").write_text("")
    with pytest.raises(KeyError, match="mine"), pytest.warns(UserWarning, match="last checkpoint was not written: .*cannot write its"):
        with Saver(tmp_path / "note" / "c") as saver:
            saver.save(1, parts(1), {})
            raise KeyError("mine")


def test_an_error_of_the_run_still_waits_for_the_write(tmp_path, monkeypatch):
    "The checkpoint that was begun is whole when the error arrives"
    with closed_disk(monkeypatch) as (gate, came, went), pytest.raises(KeyError):
        with Saver(tmp_path) as saver:
            saver.save(1, parts(1), {})
            threading.Timer(0.1, gate.set).start()
            raise KeyError("mine")
    assert went == [1] and checkpoint.broken(tmp_path / "step-0000001") is None


def test_ctrl_c_while_waiting_leaves_the_write_in_flight(tmp_path, monkeypatch):
    "It is neither forgotten nor taken for a failure"
    with closed_disk(monkeypatch) as (gate, came, went), Saver(tmp_path) as saver:
        saver.save(1, parts(1), {})
        def interrupted(): raise KeyboardInterrupt
        with monkeypatch.context() as m:
            m.setattr(saver.pending, "result", interrupted)
            with pytest.raises(KeyboardInterrupt): saver.wait()
        assert saver.pending is not None
        gate.set(); saver.wait()
        assert saver.pending is None and went == [1]


def test_a_snapshot_shares_nothing():
    "Equal bit for bit, whatever dtype and layout, and no memory in common"
    live = parts(3) | dict(more={"view": torch.arange(12.0).view(3, 4).T, "bf16": torch.ones(3).bfloat16(), "parameter": torch.nn.Parameter(torch.ones(2))})
    copy = snapshot(live)
    assert same(copy, live) and not any(t.requires_grad for t in copy["more"].values())
    mine = {t.untyped_storage().data_ptr() for part in live.values() for t in part.values() if t.numel()}
    assert not mine & {t.untyped_storage().data_ptr() for part in copy.values() for t in part.values()}


def test_state_that_is_no_json_is_refused_at_once(tmp_path):
    "In the training loop, not in the thread"
    with Saver(tmp_path) as saver:
        with pytest.raises(TypeError): saver.save(1, parts(1), dict(x=torch.zeros(1)))
        assert saver.pending is None


EXIT = """
from sd_nb.train.background import Saver
from test_checkpoint import parts
Saver(sys.argv[1]).save(1, parts(1), {})
"""


def test_the_end_of_the_process_waits(tmp_path):
    "A script that ends without `with` leaves a whole checkpoint"
    assert python(EXIT, tmp_path) == ""
    assert checkpoint.broken(tmp_path / "step-0000001") is None and same(checkpoint.load(tmp_path / "step-0000001")[0], parts(1))


KILL = """
import os, signal
from pathlib import Path
from sd_nb.train.background import Saver
from sd_nb.train.checkpoint import load, step_of
from test_checkpoint import parts, same, quiet_latest
directory = Path(sys.argv[1])
for k in range(1, 60):
    pid = os.fork()
    if pid == 0:
        if k > 1: os.environ["SD_NB_FAIL_AT"] = str(k - 1)
        with Saver(directory, 1) as saver:
            for step in ([1] if k == 1 else [2, 3]): saver.save(step, parts(step), {})
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    found = quiet_latest(directory)
    assert same(load(found)[0], parts(step_of(found))), k
    if status == 0 and k > 1: break
    assert status == (signal.SIGKILL if k > 1 else 0), (k, status)
assert k > 20 and [o.name for o in directory.iterdir()] == ["step-0000003"], (k, list(directory.iterdir()))
print("survived")
"""


def test_fault_01_kill_minus_nine_in_the_background(tmp_path):
    "SIGKILL at every fail-point of two saves in the background: a whole checkpoint is always there"
    assert python(KILL, tmp_path) == "survived"


def test_nothing_is_warned_when_all_is_well(tmp_path):
    "And the thread is gone at the end"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Saver(tmp_path) as saver: saver.save(1, parts(1), {})
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]
