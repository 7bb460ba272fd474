"""Targets, conversions and weights: inverse of each other, right at both ends, equal to diffusers where it has them."""
import math
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from sd_nb.diffusion.noise import NoiseSchedule, rescale_zero_terminal_snr, scaled_linear_betas
from sd_nb.diffusion.objective import (denoising_loss, loss_by_bin, min_snr_weight, target, to_eps, to_x0, velocity)

KINDS = ["eps", "v", "x0"]
SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def batch(n=5, seed=0, dtype=torch.float32):
    "Draw pictures and noise"
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 4, 4, generator=g).to(dtype), torch.randn(n, 3, 4, 4, generator=g).to(dtype)


@settings(max_examples=60, deadline=None)
@given(abar=st.floats(1e-3, 1 - 1e-3), seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS))
def test_conversions_are_inverse(abar, seed, kind):
    "The right answer of any kind converts to the true noise and the true picture, and back to every kind"
    x0, noise = batch(seed=seed, dtype=torch.float64)
    x = abar**0.5 * x0 + (1 - abar) ** 0.5 * noise
    answer = target(kind, x0, noise, abar)
    assert_close(to_x0(kind, answer, x, abar), x0)
    assert_close(to_eps(kind, answer, x, abar), noise)
    for other in KINDS:
        again = target(other, to_x0(kind, answer, x, abar), to_eps(kind, answer, x, abar), abar)
        assert_close(to_x0(other, again, x, abar), x0)


@settings(max_examples=60, deadline=None)
@given(abar=st.floats(1e-3, 1 - 1e-3), seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS))
def test_any_answer_means_one_pair(abar, seed, kind):
    "Whatever the network says, the picture and the noise it means add up to x_t"
    x, answer = batch(seed=seed, dtype=torch.float64)
    x0, eps = to_x0(kind, answer, x, abar), to_eps(kind, answer, x, abar)
    assert_close(abar**0.5 * x0 + (1 - abar) ** 0.5 * eps, x)
    assert_close(target(kind, x0, eps, abar), answer)


def test_velocity_equals_diffusers():
    "velocity is DDPMScheduler.get_velocity"
    x0, noise = batch()
    t = torch.tensor([0, 10, 500, 900, 999])
    abar = NoiseSchedule().abar[t].reshape(-1, 1, 1, 1)
    assert_close(velocity(x0, noise, abar), DDPMScheduler(**SD).get_velocity(x0, noise, t), rtol=1e-5, atol=1e-5)


def their_weights(snr, gamma, kind):
    "The formula of diffusers' training script (Hang et al. 2023): divide by SNR for eps, SNR + 1 for v"
    return torch.minimum(snr, torch.tensor(gamma)) / {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_equals_the_published_formula(kind):
    "Between the ends the weights are those of diffusers' training script"
    t = torch.arange(1000)
    snr = compute_snr(DDPMScheduler(**SD), t)
    assert_close(NoiseSchedule().snr(t), snr, rtol=1e-4, atol=0)
    assert_close(min_snr_weight(snr, 5.0, kind), their_weights(snr, 5.0, kind))


@pytest.mark.parametrize("kind, at_zero, at_infinity", [("eps", 1, 0), ("v", 0, 0), ("x0", 0, 5)])
def test_min_snr_at_both_ends(kind, at_zero, at_infinity):
    "At SNR 0 and at infinity each weight is its limit, not 0/0"
    weight = min_snr_weight(torch.tensor([0.0, math.inf, 1e-30, 1e30]), 5.0, kind)
    assert_close(weight, torch.tensor([at_zero, at_infinity] * 2).float())


@settings(max_examples=50, deadline=None)
@given(snr=st.floats(1e-6, 1e6), gamma=st.floats(0.1, 50))
def test_one_loss_in_three_currencies(snr, gamma):
    "The three weights price the same error of the picture equally (errors scale as 1 : SNR : SNR + 1)"
    w = {k: min_snr_weight(torch.tensor(snr, dtype=torch.float64), gamma, k) for k in KINDS}
    assert_close(w["eps"] * snr, w["x0"])
    assert_close(w["v"] * (snr + 1), w["x0"])


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_loss_is_one_loss(kind):
    "The weighted loss of one and the same wrong picture does not depend on the kind the network speaks"
    x0, noise = batch(dtype=torch.float64)
    wrong, _ = batch(seed=1, dtype=torch.float64)
    t, schedule = torch.tensor([5, 100, 400, 700, 950]), NoiseSchedule()
    abar = schedule.abar[t].double().reshape(-1, 1, 1, 1)

    def model(x, t, context):
        return target(kind, wrong, (x - abar.sqrt() * wrong) / (1 - abar).sqrt(), abar)
    weighted, _ = denoising_loss(model, schedule, x0, noise, t, None, kind)
    expected = schedule.snr(t).clamp(max=5) * (wrong - x0).square().flatten(1).mean(1).float()
    assert_close(weighted.float(), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_perfect_network_costs_nothing(kind):
    "The loss of the target itself is 0; the loss of silence is the target's power; gamma None weighs nothing"
    x0, noise = batch()
    t, schedule = torch.tensor([0, 10, 500, 900, 999]), NoiseSchedule()
    goal = target(kind, x0, noise, schedule.abar[t].reshape(-1, 1, 1, 1))
    weighted, plain = denoising_loss(lambda x, t, c: goal, schedule, x0, noise, t, None, kind)
    assert weighted.shape == plain.shape == (5,) and weighted.max() < 1e-10
    weighted, plain = denoising_loss(lambda x, t, c: 0 * x, schedule, x0, noise, t, None, kind, gamma=None)
    assert_close(plain, goal.square().mean((1, 2, 3)))
    assert_close(weighted, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_finite_under_zero_terminal_snr(kind):
    "At no signal at all the loss and its gradient are finite"
    schedule = NoiseSchedule(rescale_zero_terminal_snr(scaled_linear_betas()))
    (x0, noise), scale = batch(2), torch.ones((), requires_grad=True)
    weighted, plain = denoising_loss(lambda x, t, c: scale * x, schedule, x0, noise, torch.tensor([999, 0]), None, kind)
    weighted.sum().backward()
    assert weighted.isfinite().all() and plain.isfinite().all() and scale.grad.isfinite()


def test_loss_by_bin():
    "Each loss is averaged in its own range of levels, ranges without a picture are left out"
    plain, t = torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([0, 249, 250, 999])
    assert loss_by_bin(plain, t) == {"0-249": 2.0, "250-499": 5.0, "750-999": 7.0}
    assert loss_by_bin(torch.arange(10.0), torch.arange(10), T=10, bins=3) == {"0-3": 1.5, "4-6": 5.0, "7-9": 8.0}


@pytest.mark.parametrize("call", [lambda x: target("noise", x, x, 0.5), lambda x: to_x0("noise", x, x, 0.5),
                                  lambda x: to_eps("noise", x, x, 0.5), lambda x: min_snr_weight(x, 5.0, "noise")])
def test_unknown_kind(call):
    "An unknown prediction kind is one clear line that names it"
    with pytest.raises(ValueError, match="unknown prediction kind 'noise': use eps, v or x0"): call(torch.ones(1))


@pytest.mark.parametrize("gamma", [0, -1.0, math.nan])
def test_bad_gamma(gamma):
    "A gamma that is not positive is refused"
    with pytest.raises(ValueError, match="gamma must be positive"): min_snr_weight(torch.ones(1), gamma)
