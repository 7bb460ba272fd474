"""What makes a step cheaper changes no loss by more than 1e-5."""
from dataclasses import replace

import pytest
import torch
from few import small_config
from torch import nn
from toy import ALONE, Denoiser

from sd_nb.config import Recipe
from sd_nb.model.resblock import ResBlock
from sd_nb.train.trainer import Trainer


def trained(run, steps=8, **changes):
    "The losses of a few steps with these switches, and the trainer"
    config = replace(small_config(run=run, recipes=dict(unet=Recipe(steps, 4, 1e-3, 1.0))), **changes)
    trainer = Trainer(Denoiser(config), config, ALONE)
    run.mkdir(parents=True, exist_ok=True)
    losses = []
    for _ in range(steps):
        trainer.step_once()
        losses.append(trainer.window.flush()["loss"])
    return losses, trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory): return trained(tmp_path_factory.mktemp("plain"))[0]


@pytest.mark.parametrize("switch", ["channels_last", "checkpointing"])
def test_a_switch_changes_no_loss(tmp_path, plain, switch):
    "Eight steps of the UNet: every loss within 1e-5 of the plain loop's, while they fall by far more"
    losses, _ = trained(tmp_path, **{switch: True})
    assert losses == pytest.approx(plain, abs=1e-5) and len(set(plain)) == 8


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiling_changes_no_loss(tmp_path):
    "A UNet of one level, compiled for three steps"
    small = replace(small_config().unet, mults=(1,), attn=(True,))
    runs = {c: trained(tmp_path / str(c), steps=3, unet=small, compile=c) for c in (False, True)}
    assert runs[True][0] == pytest.approx(runs[False][0], abs=1e-5) and len(set(runs[False][0])) == 3
    assert runs[True][1].stage.net._compiled_call_impl is not None


def test_all_switches_at_once(tmp_path, plain):
    "Recomputed, channels last and in two pieces"
    assert trained(tmp_path, channels_last=True, checkpointing=True, accumulate=2)[0] == pytest.approx(plain, abs=1e-5)


def test_the_switches_do_what_they_say(tmp_path):
    "Convolutions lie channels last; blocks run twice, once in each direction"
    _, trainer = trained(tmp_path, steps=1, channels_last=True)
    convs = [m.weight for m in trainer.stage.model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert convs and all(w.is_contiguous(memory_format=torch.channels_last) for w in convs)
    _, trainer = trained(tmp_path / "b", steps=1, checkpointing=True)
    block, calls = next(m for m in trainer.stage.model.modules() if isinstance(m, ResBlock)), []
    block.norm1.register_forward_hook(lambda *_: calls.append(1))
    trainer.step_once()
    assert len(calls) == 2


def test_a_switch_may_change_in_the_middle(tmp_path, plain):
    "Four steps plain, saved, four steps channels last and recomputed: the same curve to 1e-5"
    first, trainer = trained(tmp_path, steps=4)
    with trainer.saver: trainer.save()
    config = replace(trainer.config, channels_last=True, checkpointing=True, accumulate=2)
    again, losses = Trainer(Denoiser(config), config, ALONE), []
    assert again.restore() and again.step == 4
    for _ in range(4):
        again.step_once()
        losses.append(again.window.flush()["loss"])
    assert first + losses == pytest.approx(plain, abs=1e-5)
