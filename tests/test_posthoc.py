"""The post-hoc average: profiles, tracked averages and reconstructed ones agree, and what cannot be is refused."""
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sd_nb.train.posthoc import PowerEMA, combination, exponent_of, overlap, power_decay, reconstruct, store, stored

LENGTHS = [0.03, 0.05, 0.06, 0.075, 0.1, 0.15, 0.2]


def profile(step, gamma, tau):
    "What the weights of each time count in an average"
    return np.where(tau <= step, (gamma + 1) / step * (tau / step) ** gamma, 0)


@pytest.mark.parametrize("length", [0.001, 0.01, 0.05, 0.1, 0.2, 0.28])
def test_the_length_is_the_profiles_width(length):
    "The standard deviation of the profile over a run of length one, integrated numerically"
    tau = (np.arange(400_000) + 0.5) / 400_000
    p = profile(1, exponent_of(length), tau)
    mean = (p * tau).mean()
    assert abs(p.mean() - 1) < 1e-4 and abs(np.sqrt((p * (tau - mean) ** 2).mean()) / length - 1) < 1e-4


@pytest.mark.parametrize("length", [0, -0.1, 0.3, 1, float("nan")])
def test_impossible_lengths_are_refused(length):
    "There is no power function of this width"
    with pytest.raises(ValueError, match="must lie in 0.001 to 0.28"): exponent_of(length)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_update_integrates_the_profile(length):
    "After each of many steps, every step counts as much as the profile has area there, to rounding"
    gamma, shares = exponent_of(length), np.zeros(0)
    for step in range(300):
        keep = power_decay(step, gamma)
        shares = np.append(shares * keep, 1 - keep)
    assert np.abs(shares - np.diff((np.arange(301) / 300) ** (gamma + 1))).max() < 1e-12


@pytest.mark.parametrize("a, b", [((100, 5.0), (100, 2.0)), ((40, 3.0), (100, 6.9)), ((100, 6.9), (40, 3.0)), ((7, 16.97), (100, 6.94))])
def test_overlaps_are_integrals(a, b):
    "The formula against numbers; the order does not matter"
    tau = (np.arange(400_000) + 0.5) / 4_000
    assert np.isclose(overlap(a, b), (profile(*a, tau) * profile(*b, tau)).mean() * 100, rtol=1e-5) and overlap(a, b) == overlap(b, a)


def snapshots(n, steps=512, lengths=(0.05, 0.1)): return [(steps * (i + 1) // n, exponent_of(o)) for i in range(n) for o in lengths]


@pytest.mark.parametrize("length", LENGTHS)
def test_coefficients_are_the_best_with_the_sum_one(length):
    "No direction that keeps the sum makes the error smaller, the error told is the real one, and more snapshots make it smaller"
    target, errors = (512, exponent_of(length)), []
    tau = (np.arange(200_000) + 0.5) / 200_000 * 512
    for n in (4, 16):
        snaps = snapshots(n)
        x, error = combination(snaps, target)
        miss = sum(c * profile(*s, tau) for c, s in zip(x, snaps)) - profile(*target, tau)
        real = np.sqrt((miss**2).sum() / (profile(*target, tau) ** 2).sum())
        assert abs(x.sum() - 1) < 1e-9 and abs(real - error) < 1e-4 * max(error, 1e-2)
        slopes = np.array([(miss * profile(*s, tau)).sum() for s in snaps])
        assert np.ptp(slopes) < 1e-3 * np.abs([(profile(*target, tau) * profile(*s, tau)).sum() for s in snaps]).max()
        errors.append(error)
    assert errors[1] <= errors[0] + 1e-6 and errors[1] < 0.04


@pytest.mark.parametrize("which", [0, 3, 30, 31])
def test_a_stored_length_is_its_own_snapshot(which):
    "Asked for what is stored, nothing else is used"
    snaps = snapshots(16)
    x, error = combination(snaps[:which + 1], snaps[which])
    assert np.abs(x - (np.arange(which + 1) == which)).max() < 1e-5 and error < 1e-6


def network():
    "Weights, running statistics and an integer counter"
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 4))


def run(directory, steps=512, every=32, dtype=None, resume_at=None):
    "Walk about; return the network and the averages that were tracked, by length"
    model, g = network(), torch.Generator().manual_seed(1)
    tracked = {o: PowerEMA(model, o) for o in LENGTHS}
    for step in range(steps):
        with torch.no_grad():
            for p in model.parameters(): p.add_(torch.randn(p.shape, generator=g), alpha=0.05)
            model[1].num_batches_tracked.fill_(step + 1)
        for ema in tracked.values(): ema.update(step)
        if step == resume_at:
            old = {o: {k: v.clone() for k, v in ema.state_dict().items()} for o, ema in tracked.items()}
            tracked = {o: PowerEMA(model, o) for o in LENGTHS}
            for o, ema in tracked.items(): ema.load_state_dict(old[o])
        if (step + 1) % every == 0:
            for o in (0.05, 0.1): store(directory, step + 1, tracked[o], dtype)
    return model, tracked


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    directory = tmp_path_factory.mktemp("walk")
    return directory, *run(directory)


def distance(a, b): return sum((a[k].double() - b[k].double()).pow(2).sum() for k in a if a[k].is_floating_point()).sqrt().item()


@pytest.mark.parametrize("length, bound", [(0.03, 5e-2), (0.05, 1e-5), (0.06, 5e-3), (0.075, 5e-3), (0.1, 1e-5), (0.15, 1e-2), (0.2, 3e-2)])
def test_reconstructed_equals_tracked(walked, length, bound):
    "From 16 pairs of snapshots: the distance to the average that was tracked, as a share of its distance to the live weights"
    directory, model, tracked = walked
    average = tracked[length].state_dict()
    assert distance(average, reconstruct(directory, length)) < bound * distance(average, model.state_dict())


def test_lengths_differ(walked):
    "The bounds above would notice a wrong length: the nearest others are at least five times as far away"
    directory, model, tracked = walked
    for a, b in ((0.06, 0.05), (0.075, 0.06), (0.15, 0.1)):
        assert distance(tracked[a].state_dict(), tracked[b].state_dict()) > 0.05 * distance(tracked[a].state_dict(), model.state_dict())


def test_an_earlier_step_is_reconstructed(walked, tmp_path):
    "As if the run had ended there; later snapshots are left alone"
    _, tracked = run(tmp_path, steps=256, every=32)
    average = tracked[0.075].state_dict()
    early, live = reconstruct(walked[0], 0.075, 256), tracked[0.03].state_dict()
    assert distance(average, early) < 0.05 * distance(average, live)
    assert all(torch.equal(v, early[k]) for k, v in reconstruct(tmp_path, 0.075).items())


def test_weights_that_never_change_come_out_as_they_are(tmp_path):
    "Whatever the length and however few the snapshots: that is what the sum of one is for"
    model = network()
    for step in range(64):
        for ema in (PowerEMA(model, 0.05), PowerEMA(model, 0.1)):
            ema.update(step)
            if step in (31, 63): store(tmp_path, step + 1, ema)
    for length in (0.03, 0.075, 0.25):
        for k, v in reconstruct(tmp_path, length).items(): torch.testing.assert_close(v, model.state_dict()[k], rtol=1e-5, atol=1e-6)


def test_a_network_can_load_it(walked):
    "Names, shapes and types are the network's own; counters are the newest"
    out = reconstruct(walked[0], 0.08)
    other = network(); other.load_state_dict(out, strict=True)
    assert torch.equal(other[0].weight, out["0.weight"]) and out["1.num_batches_tracked"] == 512 and out["0.weight"].dtype == torch.float32


def test_resume_is_bitwise(walked, tmp_path):
    "A run that was interrupted stores the same bytes"
    run(tmp_path, resume_at=200)
    files = sorted(o.name for o in walked[0].iterdir())
    assert len(files) == 32 and all((walked[0] / o).read_bytes() == (tmp_path / o).read_bytes() for o in files)


def test_half_precision_costs_little(walked, tmp_path):
    "float16 files are half as large and add less than a thousandth"
    directory, model, tracked = walked
    run(tmp_path, dtype=torch.float16)
    assert load_file(tmp_path / "step-0000512-0.1.safetensors")["0.weight"].dtype == torch.float16
    average = tracked[0.075].state_dict()
    assert distance(reconstruct(directory, 0.075), reconstruct(tmp_path, 0.075)) < 2e-3 * distance(average, model.state_dict())


def test_lending_works_as_for_any_average():
    "Inside `swapped` the network is the average"
    model = network(); ema = PowerEMA(model, 0.1); ema.update(0)
    with torch.no_grad(): model[0].weight.add_(1)
    ema.update(1); live = model[0].weight.clone()
    with ema.swapped(): assert torch.equal(model[0].weight, ema.state_dict()["0.weight"]) and not torch.equal(model[0].weight, live)
    assert torch.equal(model[0].weight, live)


def test_missing_and_damaged_snapshots_are_one_line(walked, tmp_path):
    "Nothing there, nothing early enough, a torn file, a stranger's file"
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="holds no snapshots$"): reconstruct(tmp_path, 0.1)
    with pytest.raises(ValueError, match="holds no snapshots up to step 31"): reconstruct(walked[0], 0.1, 31)
    path = store(tmp_path, 5, PowerEMA(network(), 0.1))
    assert stored(tmp_path) == [(5, 0.1)] and path.name == "step-0000005-0.1.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="step-0000005-0.1.safetensors is damaged") as error: reconstruct(tmp_path, 0.1)
    assert "\n" not in str(error.value)
