"""The doctor: seeded faults are named, a healthy run has none, and the instruments agree with closed forms."""
import json
from dataclasses import replace

import pytest
import torch
from few import few_shards, small_config
from PIL import Image
from torch import nn

from sd_nb.config import PRESETS
from sd_nb.diffusion.noise import NoiseSchedule, rescale_zero_terminal_snr, scaled_linear_betas
from sd_nb.diffusion.objective import KINDS, denoising_loss, target
from sd_nb.train import checkpoint
from sd_nb.train.doctor import Doctor, Patient, diagnose, open_patient, preset_of, read_config
from sd_nb.train.parallel import World
from sd_nb.train.run import train
from sd_nb.train.symptoms import (
    EARLY, band, birth_of_nan, check_band, check_latents, check_levels, check_moved, check_noise_scale, check_skipped,
    gaussian_floor,
    measure_noise_scale, noise_scale)
from sd_nb.train.watch import HeldOut

ALONE = World(0, 1, 0, torch.device("cpu"))
SCHEDULE = NoiseSchedule(rescale_zero_terminal_snr(scaled_linear_betas()))
KEYS = [f"key{i}" for i in range(16)]


class Small(nn.Module):
    "A denoiser of 4 x 4 x 4 latents that looks at picture, time and words"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Sequential(nn.Linear(64 + 16 + 4, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.out = nn.Linear(128, 64)

    def forward(self, x, t, context):
        waves = torch.cos(t[:, None] / 1000 * torch.arange(1, 17) * torch.pi)
        return self.out(self.inside(torch.cat([x.flatten(1), waves, context.mean(1)], 1))).view_as(x)


def pictures(n, seed):
    "Latents of four patterns with a word for each"
    patterns = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(4, (n,), generator=g)
    x0 = 0.95 * patterns[kind] + 0.3 * torch.randn(n, 4, 4, 4, generator=g)
    return x0 / x0.std(), torch.eye(4)[kind][:, None]


def patient(steps=600, relabel=lambda t: t, shuffle=False, lr=2e-3, scale=1.0):
    "A network trained for a second, well or with a fault, and looked at as if it were far along"
    model, (x, words), g = Small(), pictures(2000, 1), torch.Generator().manual_seed(2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    if shuffle: words = words.roll(1, 0)
    for _ in range(steps):
        i, t = torch.randint(2000, (64,), generator=g), torch.randint(1000, (64,), generator=g)
        noise = torch.randn(64, 4, 4, 4, generator=g)
        loss = denoising_loss(lambda x, t, c: model(x, relabel(t), c), SCHEDULE, scale * x[i], noise, t, words[i], kind="v", gamma=None)[0].mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    x0, words = pictures(16, 9)
    return Patient(model, HeldOut(scale * x0, words, SCHEDULE, "v"), KEYS, 5000, before=before, after=model.state_dict())


def bad(verdicts): return [v.about for v in verdicts if v.mark == "bad"]


@pytest.fixture(scope="module")
def healthy(): return patient()


def test_a_healthy_run_is_called_healthy(healthy):
    "All questions are answered, and every answer is ok"
    found = diagnose(healthy)
    assert [v.mark for v in found] == ["ok"] * 6 and len({v.about for v in found}) == 6


@pytest.mark.parametrize("fault, named", [
    (dict(shuffle=True), ["text"]),
    (dict(relabel=lambda t: (t + 100).clamp(max=999)), ["timesteps"]),
    (dict(relabel=lambda t: (t - 100).clamp(min=0)), ["timesteps"]),
    (dict(relabel=lambda t: 999 - t), ["timesteps"]),
    (dict(scale=5.49), ["latents"]),
    (dict(scale=0.1), ["latents"])], ids=["captions shuffled", "t+100", "t-100", "reversed", "scale too large", "scale too small"])
def test_a_fault_of_training_is_named(fault, named):
    "Shuffled captions, wrong timesteps and a wrong scale of the latents are each named, and nothing else is"
    assert bad(diagnose(patient(**fault))) == named


def test_a_frozen_network_is_named():
    "With a learning rate of zero no weight moves; one frozen tensor is only noted, by name"
    found = diagnose(patient(steps=3, lr=0.0))
    assert "weights" in bad(found) and "learning" in bad(found)
    before = dict(a=torch.zeros(2), b=torch.ones(2))
    verdict = check_moved(before, dict(a=torch.zeros(2), b=torch.zeros(2)))
    assert verdict.mark == "note" and "not a" in verdict.reason and "1 of 2" in verdict.reason


@pytest.mark.parametrize("layer", ["inside.0", "inside.2", "out"])
def test_a_nan_weight_is_found_in_its_layer(healthy, layer):
    "The layer whose weight is NaN is named, not those that it spoils, and nothing is asked after that"
    model = Small()
    with torch.no_grad(): model.get_submodule(layer).weight[1, 2] = torch.nan
    found = diagnose(replace(healthy, model=model, after=model.state_dict()))
    assert bad(found) == ["finite"] and f"born in {layer}: 1 of" in found[1].reason and len(found) == 3
    assert not any(m._forward_hooks for m in model.modules())


def test_a_nan_sample_is_named_by_its_key(healthy):
    "A latent that is not finite is named, by the statistics and where it enters the network; so is an infinite weight"
    x0 = healthy.held.x0.clone()
    x0[7, 1, 2, 3] = torch.nan
    found = diagnose(replace(healthy, held=HeldOut(x0, healthy.held.context, SCHEDULE, "v")))
    assert bad(found) == ["latents", "finite"] and "'key7'" in found[0].reason and "inside.0, for 'key7'" in found[1].reason
    assert birth_of_nan(healthy.model, x0, torch.zeros(16).long(), healthy.held.context) == ("inside.0", [7])
    x0[7] = torch.inf
    assert check_latents(x0, KEYS).mark == "bad"


def test_nan_that_is_born_from_sound_numbers():
    "A layer that turns finite input into NaN for some rows is named with these rows"
    class Root(nn.Module):
        def forward(self, x): return x.sqrt()
    net = nn.Sequential(nn.Identity(), Root(), nn.Identity())
    assert birth_of_nan(net, torch.tensor([[1.0], [-1.0], [4.0]])) == ("1", [1])
    assert birth_of_nan(net, torch.ones(3, 1)) is None
    twice = nn.Sequential(Root(), nn.Identity(), nn.Linear(1, 1))
    twice[2].weight.data[:] = torch.nan
    assert birth_of_nan(twice, torch.tensor([[-1.0], [1.0]])) == ("0", [0])


def test_a_picture_that_spoils_steps_is_named(healthy):
    "Skipped steps are counted; a picture that was in all of them is named, one that was in some is not"
    rows = [dict(step=s, loss=0.5) for s in range(20)] + [dict(step=s, skipped="not finite", keys=["a", f"b{s}", "c" if s else "d"]) for s in range(3)]
    verdict = next(v for v in diagnose(replace(healthy, rows=rows)) if v.about == "steps")
    assert verdict.mark == "bad" and "3 had" in verdict.reason and verdict.reason.endswith("each held 'a'")
    assert [check_skipped(rows[:n]).mark for n in (20, 21)] == ["ok", "note"] and check_skipped(rows[21:]).reason.endswith("'a', 'c'")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("s", [0.5, 1.0, 2.0])
def test_the_floor_is_what_the_best_line_leaves(kind, s):
    "For white Gaussian pictures the least squares fit of the target on x_t errs by the closed form, at every level"
    g = torch.Generator().manual_seed(0)
    abar = SCHEDULE.abar_at(torch.tensor([5, 300, 700, 999]), torch.float64)[:, None]
    x0, noise = s * torch.randn(50_000, generator=g).double(), torch.randn(50_000, generator=g).double()
    xt = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    y = target(kind, x0, noise, abar).expand_as(xt)
    left = (y - (xt * y).mean(1, keepdim=True) / (xt * xt).mean(1, keepdim=True) * xt).square().mean(1)
    torch.testing.assert_close(left, gaussian_floor(kind, abar[:, 0], s**2), rtol=0.03, atol=2e-3)


def test_levels_are_judged_against_the_floor(healthy):
    "On the floor nothing is learned: an illness late, a note early; below it all is well; one level above it is noted"
    held = healthy.held
    floor = gaussian_floor("v", held.schedule.abar_at(held.t), held.x0.var().item())
    assert [check_levels(held, share * floor, step).mark for share, step in ((1.0, EARLY), (1.0, EARLY - 1), (0.5, EARLY))] == ["bad", "note", "ok"]
    lagging = 0.5 * floor
    lagging[3] = 1.3 * floor[3]
    verdict = check_levels(held, lagging, EARLY)
    assert verdict.mark == "note" and "1.30 at t=437" in verdict.reason


class Bowl(nn.Module):
    def __init__(self, w): super().__init__(); self.w = nn.Parameter(torch.full((100,), w))
    def forward(self, x): return (self.w - x).square().sum(1).mean() / 2, {}


@pytest.mark.parametrize("w", [0.1, 0.3, 1.0])
def test_the_noise_scale_is_the_true_one(w):
    "For a loss whose gradient is w - x with unit variance in 100 dimensions it is 100 / |w|^2, from any two batch sizes"
    bowl = Bowl(w)
    for b in (4, 32):
        g = torch.Generator().manual_seed(0)
        scale = measure_noise_scale(bowl, [bowl.w], [(torch.randn(b, 100, generator=g),) for _ in range(100)])
        assert scale == pytest.approx(1 / w**2, rel=0.2)
    assert bowl.w.grad is None
    for k in (2, 10): assert noise_scale(3.0 + 60 / 8, 3.0 + 60 / (8 * k), 8, k) == pytest.approx(20)
    assert noise_scale(1.0, 0.1, 8, 10) == float("inf")
    assert [check_noise_scale(s, 16).mark for s in (1.0, 16.0, 1000.0, float("inf"))] == ["note", "ok", "note", "note"]
    drowned = check_noise_scale(float("inf"), 16).reason
    assert "noise hides the signal" in drowned and "about inf" not in drowned


def test_the_band_is_that_of_the_preset():
    "Inside it is ok, outside a note; where nobody looked, nothing is claimed"
    low, high = band("seed", 1000)
    assert low < 0.254 < high and band("sd1", 1000) is None and band("seed", 10**6) is None and band(None, 10) is None
    assert [check_band("seed", 1000, loss).mark for loss in (low - 0.01, 0.254, high + 0.01)] == ["note", "ok", "note"]
    assert check_band("sd1", 1000, 9.0).mark == "ok" and band("tiny", 10)


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_comes_back_from_its_run(tmp_path, name):
    "What a run writes is read back equal, with its directory where it is now, and its preset is recognised"
    config = replace(PRESETS[name], run=tmp_path, lr=3e-4, init_from=tmp_path / "model")
    (tmp_path / "config.json").write_text(json.dumps(replace(config, run=tmp_path / "elsewhere").to_dict()))
    assert read_config(tmp_path) == config and preset_of(config) == name
    assert preset_of(replace(config, gamma=1.0)) is None
    assert preset_of(replace(config, data=tmp_path)) == (None if name == "tiny" else name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of thirty steps on real pictures"
    folder = tmp_path_factory.mktemp("doctor")
    config = small_config(run=folder / "run", data=few_shards(folder / "few"), sample_every=10**6)
    recipes = {name: replace(r, steps=30 if name == "unet" else 2, batch=8) for name, r in config.recipes.items()}
    assert train(replace(config, recipes=recipes), ALONE)
    return folder / "run"


def examine(run, capsys):
    "Exit code, and marks by question, of the command"
    code = Doctor(run).run()
    lines = capsys.readouterr().out.strip().splitlines()
    return code, {line[5:].split(":")[0]: line[:5].strip() for line in lines}, lines


def test_the_command_examines_a_run_and_changes_nothing(run, capsys):
    "A young run has no illness, all nine questions are asked, and every file stays as it was"
    files = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    code, marks, _ = examine(run, capsys)
    assert code == 0 and "bad" not in marks.values() and marks["text"] == "note"
    assert set(marks) == {"latents", "finite", "weights", "learning", "text", "timesteps", "batch", "loss", "steps"}
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == files


def test_the_command_names_a_wrong_scale(run, capsys):
    "A scaling factor three times too large is named, with what to multiply it by"
    path = run / "model" / "vae" / "config.json"
    stored = path.read_text()
    path.write_text(json.dumps(json.loads(stored) | dict(scaling_factor=json.loads(stored)["scaling_factor"] * 3)))
    try: code, marks, lines = examine(run, capsys)
    finally: path.write_text(stored)
    factor = float(lines[0].split(" by ")[1].split()[0])
    assert code == 1 and marks["latents"] == "bad" and factor == pytest.approx(1 / 3, rel=0.3)


def test_the_command_names_a_rotten_weight(run, capsys):
    "A NaN in the averaged weights of the newest checkpoint is found in its layer"
    newest = checkpoint.latest(run / "checkpoints")
    parts, state = checkpoint.load(newest)
    sound = {name: {k: v.clone() for k, v in part.items()} for name, part in parts.items()}
    parts["ema"]["conv_in.weight"][0, 0, 0, 0] = torch.nan
    checkpoint.save(newest.parent, state["step"], parts, state)
    try: code, marks, lines = examine(run, capsys)
    finally: checkpoint.save(newest.parent, state["step"], sound, state)
    assert code == 1 and marks["finite"] == "bad" and "born in conv_in: 1 of" in lines[1]


def test_the_command_names_a_learning_rate_of_zero(run, tmp_path, capsys):
    "A run that trained with rate zero has not moved since its first step"
    config = replace(read_config(run), run=tmp_path)
    (tmp_path / "model").symlink_to(run / "model")
    (tmp_path / "cache").symlink_to(run / "cache")
    still = replace(config, recipes=config.recipes | dict(unet=replace(config.recipes["unet"], steps=2, lr=0.0)))
    from sd_nb.train.stages import UNetStage
    from sd_nb.train.trainer import Trainer
    stage = UNetStage(still, ALONE)
    stage.preview, stage.export = lambda path: Image.new("RGB", (2, 2)).save(path), lambda path: None
    assert Trainer(stage, still, ALONE).fit()
    code, marks, lines = examine(tmp_path, capsys)
    assert code == 1 and marks["weights"] == "bad" and "0 of" in lines[2] and "learning rate" in lines[2]


def test_what_is_no_run_is_refused(tmp_path, run):
    "A directory without a config, and a run without a checkpoint, each get one line"
    with pytest.raises(ValueError, match="no run directory"): Doctor(tmp_path).run()
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(ValueError, match="no whole checkpoint"): open_patient(tmp_path)
