"""Watching: the held-out loss depends on the weights alone, every log gets every row, and a failing service ends no run."""
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from sd_nb.diffusion.noise import NoiseSchedule, spread
from sd_nb.diffusion.objective import KINDS, denoising_loss, target
from sd_nb.train.watch import Board, HeldOut, Lines, Log, Service, Speed, Watch, flops_per_picture, held_levels, hold_out, tag, watch_run
from tiny import CAPTIONS, tiny_parts

SCHEDULE = NoiseSchedule()


class Guess(nn.Module):
    "A small network with dropout that looks at picture, time and words"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4 * 16 + 1 + 3, 32), nn.Dropout(0.5), nn.Linear(32, 4 * 16))

    def forward(self, x, t, context):
        return self.layers(torch.cat([x.flatten(1), t[:, None] / 1000, context.mean(1)], 1)).view_as(x)


def held(n=6, seed=0, kind="eps"):
    g = torch.Generator().manual_seed(9)
    return HeldOut(torch.randn(n, 4, 4, 4, generator=g), torch.randn(n, 2, 3, generator=g), SCHEDULE, kind, seed)


def test_levels_are_equidistant():
    "Eight levels, one in the middle of each eighth"
    assert held_levels().tolist() == [62, 187, 312, 437, 562, 687, 812, 937]
    assert all(lo <= t < lo + 125 for t, lo in zip(held_levels().tolist(), range(0, 1000, 125)))


def test_held_out_is_a_function_of_the_weights():
    "The same weights give the same number whatever the random state and mode, and leave both as they were; other weights another"
    model, held_out = Guess(), held()
    torch.manual_seed(1); first = held_out(model); state = torch.get_rng_state()
    torch.manual_seed(2); model.train()
    assert held_out(model) == first and model.training
    torch.manual_seed(1); assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters()) and held()(model) == first
    with torch.no_grad(): model.layers[0].weight += 0.01
    assert held_out(model)["held_out"] != first["held_out"]


def test_held_out_gives_the_mode_back_after_an_error():
    "A network that fails while it is measured is still in training"
    model = Guess()
    with pytest.raises(RuntimeError): held()(model.train().requires_grad_(True).half())
    assert model.training


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_is_the_plain_error(kind):
    "A network that always says nothing errs by the mean square of what it should have said, at each level"
    held_out = held(kind=kind)
    goals = [target(kind, held_out.x0, noise, spread(SCHEDULE.abar_at(t.expand(6)), held_out.x0)) for t, noise in zip(held_out.t, held_out.noise)]
    row = held_out(Silent())
    assert [row[f"held_out_t{t}"] for t in held_levels().tolist()] == pytest.approx([g.square().mean().item() for g in goals], abs=2e-6)
    assert row["held_out"] == pytest.approx(np.mean([g.square().mean().item() for g in goals]), abs=2e-6)


class Silent(nn.Module):
    def forward(self, x, t, context): return torch.zeros_like(x)


class Ideal(nn.Module):
    "The best guess of the noise for white pictures of unit variance"
    def forward(self, x, t, context): return spread((1 - SCHEDULE.abar_at(t)).sqrt(), x) * x


def test_held_out_is_steadier_than_the_training_loss():
    "Over noise seeds it varies less than half as much as as many network evaluations at random timesteps"
    model, x0, context = Ideal(), held().x0, held().context
    steady = [held(seed=seed)(model)["held_out"] for seed in range(30)]
    loose = []
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        t, noise = torch.randint(1000, (48,), generator=g), torch.randn(48, 4, 4, 4, generator=g)
        loose.append(denoising_loss(model, SCHEDULE, x0.repeat(8, 1, 1, 1), noise, t, context.repeat(8, 1, 1), gamma=None)[1].mean().item())
    assert np.std(loose) > 2 * np.std(steady) and np.mean(loose) == pytest.approx(np.mean(steady), rel=0.1)


def test_hold_out_takes_latents_that_the_stage_would_train_on(tmp_path):
    "Held-out latents are scaled as in training and have their own captions"
    parts = tiny_parts()
    moments = np.zeros((5, 8, 8, 8), np.float16)
    moments[:, :4] = np.arange(5)[:, None, None, None]
    moments[:, 4:] = -30.0

    class Latents:
        captions = CAPTIONS
        def __len__(self): return 5
        def __getitem__(self, rows): return moments[rows]
    stage = SimpleNamespace(autoencoder=parts.autoencoder, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer, device="cpu",
                            sampling=SimpleNamespace(prediction="v"), net=SimpleNamespace(schedule=SCHEDULE))
    held_out = hold_out(stage, Latents(), count=3)
    assert held_out.x0[:, 0, 0, 0].tolist() == pytest.approx([0.0, 1.0, 2.0], abs=1e-5) and held_out.kind == "v"  # rows 0, 2, 4 at scale 0.5
    with torch.no_grad(): words = parts.text_encoder(parts.tokenizer([CAPTIONS[i] for i in (0, 2, 4)]))
    assert torch.equal(held_out.context, words)


def scalars(run, name): return [(e.step, round(e.value, 6)) for e in EventAccumulator(str(run / "tensorboard")).Reload().Scalars(name)]


def test_tensorboard_reads_every_number_back(tmp_path):
    "Losses, loss by timestep, learning rate, gradient norm, speed and pictures are where TensorBoard's own reader finds them"
    row = dict(loss=0.5, mse=0.6, mse_t0=0.7, held_out=0.8, held_out_t62=0.9, lr=1e-3, grad_norm=2.0, images_per_second=30, tflops=0.25)
    grid = tmp_path / "grid.png"
    Image.new("RGB", (8, 4), (255, 0, 0)).save(grid)
    watch = watch_run(tmp_path)
    for step in (10, 20): watch.log(dict(step=step, keys=["a"], **row))
    watch.picture(20, grid)
    watch.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {tag(name) for name in row}
    for name, value in row.items(): assert scalars(tmp_path, tag(name)) == [(10, pytest.approx(value)), (20, pytest.approx(value))]
    (picture,) = events.Images("samples")
    assert (picture.step, picture.width, picture.height) == (20, 8, 4)
    assert [json.loads(line)["mse"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0.6, 0.6]
    assert {tag(n).split("/")[0] for n in row} == {"loss", "loss_by_timestep", "held_out", "run", "throughput"}


def test_a_resumed_run_hides_its_first_life(tmp_path):
    "What was drawn beyond the checkpoint is replaced, and nothing is drawn twice"
    for step, upto, loss in ((0, 5, 1.0), (3, 6, 2.0)):
        board = Board(tmp_path, step)
        for s in range(step + 1, upto + 1): board.log(dict(step=s, loss=loss))
        board.close()
    assert scalars(tmp_path, "loss/loss") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_service_is_named(tmp_path, monkeypatch, name):
    "Asked to log to something that is not installed, one line says what to install, before anything is written"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"pip install {name}"): watch_run(tmp_path, names=(name,))
    with pytest.raises(ValueError, match="choose from tensorboard, wandb, trackio"): watch_run(tmp_path, names=("paper",))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_is_told_everything(tmp_path, monkeypatch, name):
    "Rows arrive with their step and without what is no number, pictures as pictures, and a resumed run under its old name"
    said = []
    record = lambda word: lambda *args, **named: said.append((word, args, named))
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(Image=lambda path: f"image of {path}", **{w: record(w) for w in ("init", "log", "finish")}))
    service = Service(name, tmp_path / "run7", dict(batch=4))
    service.log(dict(step=3, loss=0.5, keys=["a"]))
    service.picture(3, tmp_path / "a.png")
    service.close()
    (first, _, about), row, picture, last = said
    assert first == "init" and about["name"] == "run7" and about["config"] == dict(batch=4) and about["resume"] == "allow"
    assert about.get("id") == ("run7" if name == "wandb" else None)
    assert row == ("log", ({"loss/loss": 0.5},), dict(step=3))
    assert picture == ("log", (dict(samples=f"image of {tmp_path / 'a.png'}"),), dict(step=3)) and last == ("finish", (), {})


class Flaky(Log):
    calls = 0
    def log(self, row): self.calls += 1; raise ConnectionError("no route to host")


def test_a_failing_service_ends_no_run(tmp_path):
    "It is dropped after one warning and the others go on; but the run's own record must work"
    flaky, last = Flaky(), Lines(tmp_path / "b")
    (tmp_path / "b").mkdir()
    watch = Watch([Lines(tmp_path), flaky, last])
    with pytest.warns(UserWarning, match="Flaky.*no route to host"): watch.log(dict(step=1))
    watch.log(dict(step=2))
    assert flaky.calls == 1
    for place in (tmp_path, tmp_path / "b"): assert (place / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    with pytest.raises(ConnectionError): Watch([Flaky(), Log()]).log(dict(step=1))


class Costs(nn.Module):
    def __init__(self, *layers): super().__init__(); self.layers = nn.Sequential(*layers)
    def forward(self, x): return self.layers(x).square().mean(), {}


def test_flops_are_those_of_the_formulas():
    "Forward, gradient of the weights, and gradient of the input for all layers but the first; for one picture, whatever the batch"
    linear = Costs(nn.Linear(10, 20), nn.Linear(20, 5))
    assert flops_per_picture(linear, (torch.randn(8, 10),)) == 2 * (2 * 10 * 20) + 3 * (2 * 20 * 5)
    conv = Costs(nn.Conv2d(3, 6, 3, padding=1))
    assert flops_per_picture(conv, (torch.randn(2, 3, 8, 8),)) == 2 * (2 * 3 * 6 * 9 * 64)
    assert all(p.grad is None for p in conv.parameters())


def test_flops_see_attention():
    "Fused attention is counted: two products of length by length by width, forward, and their gradients"
    class Attend(nn.Module):
        def forward(self, x): return nn.functional.scaled_dot_product_attention(x, x, x).square().mean(), {}
    assert flops_per_picture(Attend(), (torch.randn(1, 1, 16, 8, requires_grad=True),)) == 6 * (2 * 16 * 16 * 8)


def test_speed_is_that_since_last_asked():
    "Pictures over seconds, times arithmetic; then the count starts again"
    speed = Speed(flops=10**12)
    for _ in range(4): speed.add(8, 0.5)
    assert speed.flush() == dict(images_per_second=16.0, tflops=16.0)
    speed.add(8, 2.0)
    assert speed.flush()["images_per_second"] == 4.0
