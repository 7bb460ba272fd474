"""Targets, conversions and weights: inverse of each other, right at both ends, equal to diffusers where it has them."""
import math
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from sd_nb.diffusion.noise import NoiseSchedule, flow_betas, rescale_zero_terminal_snr, scaled_linear_betas, spread
from sd_nb.diffusion.objective import (denoising_loss, logit_normal, loss_by_bin, min_snr_weight, model_input,
                                       offset_noise, pseudo_huber, stretch, target, to_eps, to_x0, velocity)

KINDS = ["eps", "v", "x0", "flow"]
SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
ZERO = rescale_zero_terminal_snr(scaled_linear_betas())


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
@given(t=st.integers(0, 999), zero=st.booleans(), seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS))
def test_add_noise_and_exact_prediction_give_the_picture_back(t, zero, seed, kind):
    "At every level of a schedule; where nothing is left of the picture, from every kind but eps"
    (x0, noise), level = batch(seed=seed, dtype=torch.float64), torch.full((5,), t)
    schedule = NoiseSchedule(ZERO if zero else None)
    if zero and kind == "eps" and t == 999: return
    abar = spread(schedule.abar_at(level, torch.float64), x0)
    x = schedule.add_noise(x0, noise, level)
    assert_close(to_x0(kind, target(kind, x0, noise, abar), x, abar), x0, rtol=1e-7, atol=1e-7)
    assert_close(to_eps(kind, target(kind, x0, noise, abar), x, abar), noise, rtol=1e-7, atol=1e-7)


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
    rate = dict(eps=snr, v=snr + 1, x0=torch.ones_like(snr), flow=(1 + snr**0.5) ** 2)[kind]
    return torch.minimum(snr, torch.tensor(gamma)) / rate


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_equals_the_published_formula(kind):
    "Between the ends the weights are those of diffusers' training script"
    t = torch.arange(1000)
    snr = compute_snr(DDPMScheduler(**SD), t)
    assert_close(NoiseSchedule().snr(t), snr, rtol=1e-4, atol=0)
    assert_close(min_snr_weight(snr, 5.0, kind), their_weights(snr, 5.0, kind))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kind, at_zero, at_infinity", [("eps", 1, 0), ("v", 0, 0), ("x0", 0, 5), ("flow", 0, 0)])
def test_min_snr_at_both_ends(kind, at_zero, at_infinity, soft):
    "At SNR 0 and at infinity each weight is its limit, where the published formula for eps is 0/0"
    assert their_weights(torch.tensor([0.0]), 5.0, "eps").isnan()
    weight = min_snr_weight(torch.tensor([0.0, math.inf, 1e-30, 1e30]), 5.0, kind, soft)
    assert_close(weight, torch.tensor([at_zero, at_infinity] * 2).float())


@settings(max_examples=50, deadline=None)
@given(snr=st.floats(1e-6, 1e6), gamma=st.floats(0.1, 50), soft=st.booleans())
def test_one_loss_in_four_currencies(snr, gamma, soft):
    "The weights price the same error of the picture equally (errors scale as 1 : SNR : SNR + 1 : (sqrt SNR + 1)^2)"
    w = {k: min_snr_weight(torch.tensor(snr, dtype=torch.float64), gamma, k, soft) for k in KINDS}
    assert_close(w["x0"].item(), gamma * snr / (snr + gamma) if soft else min(snr, gamma))
    assert_close(w["eps"] * snr, w["x0"])
    assert_close(w["v"] * (snr + 1), w["x0"])
    assert_close(w["flow"] * (snr**0.5 + 1) ** 2, w["x0"])


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_soft_min_snr_is_crowsons(sigma_data):
    "HDiT weighs a picture's error by 1 / (sigma^2 + 1 / gamma); k-diffusion says the same of EDM's output"
    sigma = torch.logspace(-3, 3, 50, dtype=torch.float64)
    ours = min_snr_weight(sigma**-2, sigma_data**-2, "x0", soft=True)
    assert_close(ours, 1 / (sigma**2 + sigma_data**2))
    per_output = (sigma * sigma_data) ** 2 / (sigma**2 + sigma_data**2) ** 2            # its weight of EDM's output
    output_to_x0 = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2               # 1 / c_out^2
    assert_close(ours, per_output * output_to_x0)


def test_flow_is_the_straight_path():
    "The network of a flow sees FlowMatchEulerDiscreteScheduler.scale_noise, and its Euler step is a DDIM step of ours"
    theirs, schedule = FlowMatchEulerDiscreteScheduler(), NoiseSchedule(flow_betas())
    (x0, noise), (answer, _) = batch(), batch(seed=1)
    t = torch.tensor([0, 99, 499, 899, 999])
    abar = spread(schedule.abar_at(t), x0)
    z = model_input("flow", schedule.add_noise(x0, noise, t), abar)
    assert_close(z, theirs.scale_noise(x0, (t + 1).float(), noise), rtol=1e-5, atol=1e-5)
    theirs.set_timesteps(sigmas=[i / 10 for i in range(10, 0, -1)])
    x = noise  # all of it at s = 1
    for i in range(10):
        a, a_next = schedule.abar64[999 - 100 * i].item(), schedule.abar64[899 - 100 * i].item() if i < 9 else 1.0
        z = theirs.step(answer, theirs.timesteps[i], model_input("flow", x, torch.tensor(a))).prev_sample
        x = a_next**0.5 * to_x0("flow", answer, x, a) + (1 - a_next) ** 0.5 * to_eps("flow", answer, x, a)  # DDIM
        assert_close(model_input("flow", x, torch.tensor(a_next)), z, rtol=1e-5, atol=1e-5)


def test_other_kinds_see_x_as_it_is():
    "Only a flow's input is scaled, and it keeps its dtype"
    x, abar = batch()[0].half(), torch.full((5, 1, 1, 1), 0.3)
    assert all(model_input(kind, x, abar) is x for kind in KINDS[:3])
    assert model_input("flow", x, abar).dtype == torch.float16


@settings(max_examples=40, deadline=None)
@given(e=st.floats(-1e3, 1e3), c=st.floats(1e-3, 1e3))
def test_pseudo_huber(e, c):
    "It is 2c (sqrt(e^2 + c^2) - c): e^2 for small errors, 2c|e| for large ones, and never loses its digits"
    cost = pseudo_huber(torch.tensor(e, dtype=torch.float64), c).item()
    assert cost == pytest.approx(2 * c * (math.sqrt(e * e + c * c) - c), rel=1e-6, abs=1e-9 * c * c)
    assert cost <= min(e * e, 2 * c * abs(e)) * (1 + 1e-12)
    assert pseudo_huber(torch.tensor(1e-4), 1.0).item() == pytest.approx(1e-8, rel=1e-4)  # float32


def test_options_of_the_loss():
    "soft changes the weight, huber the cost; neither the plain error that is reported"
    (x0, noise), t, schedule = batch(), torch.tensor([5, 100, 400, 700, 950]), NoiseSchedule()
    usual, plain = denoising_loss(lambda x, t, c: 0 * x, schedule, x0, noise, t, None)
    soft, same = denoising_loss(lambda x, t, c: 0 * x, schedule, x0, noise, t, None, soft=True)
    assert_close(same, plain, rtol=0, atol=0)
    assert_close(soft, min_snr_weight(schedule.snr(t), soft=True) * plain)
    huber, same = denoising_loss(lambda x, t, c: 0 * x, schedule, x0, noise, t, None, gamma=None, huber=0.1)
    assert_close(same, plain, rtol=0, atol=0)
    assert_close(huber, 0.2 * ((noise**2 + 0.01).sqrt() - 0.1).mean((1, 2, 3)))
    huber, _ = denoising_loss(lambda x, t, c: 0 * x, schedule, x0, noise, t, None, huber=1e4)
    assert_close(huber, usual, rtol=1e-4, atol=1e-6)


def test_a_change_of_gamma_shows_in_the_weighted_loss_only():
    "The same network, batch and noise under another gamma: the plain loss and its ranges are the same to the last bit"
    (x0, noise), t, schedule = batch(), torch.tensor([5, 100, 400, 700, 950]), NoiseSchedule()
    losses = [denoising_loss(lambda x, t, c: x.sin(), schedule, x0, noise, t, None, gamma=g) for g in (5, 2.5, None)]
    assert_close(losses[0][0][:2], 2 * losses[1][0][:2])  # both levels are capped
    assert loss_by_bin(losses[0][1], t) == loss_by_bin(losses[1][1], t) == loss_by_bin(losses[2][1], t)


def test_offset_noise():
    "One number more per channel: the mean's variance grows by strength^2, the rest of the noise stays"
    noise = torch.randn(400, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    shifted = offset_noise(noise, 0.1, torch.Generator().manual_seed(1))
    recipe = noise + 0.1 * torch.randn(400, 4, 1, 1, generator=torch.Generator().manual_seed(1))
    assert_close(shifted, recipe)
    assert shifted.mean((2, 3)).var().item() == pytest.approx(1 / 256 + 0.01, rel=0.1)
    assert_close(offset_noise(noise, 0.0), noise)
    assert offset_noise(noise.half()).dtype == torch.float16 and offset_noise(noise[:, :, 0, 0]).shape == (400, 4)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 0.6)])
def test_logit_normal(mean, std):
    "The draws are diffusers', and as many lie below any point as eq. 19's integral says"
    g = torch.Generator().manual_seed(0)
    s = logit_normal(20_000, mean=mean, std=std, generator=g)
    theirs = compute_density_for_timestep_sampling("logit_normal", 20_000, mean, std, generator=g.manual_seed(0))
    assert_close(s, theirs, rtol=1e-5, atol=1e-6)
    for u in (0.1, 0.3, 0.5, 0.9):
        below = 0.5 * (1 + math.erf((math.log(u / (1 - u)) - mean) / std / 2**0.5))
        assert (s < u).float().mean().item() == pytest.approx(below, abs=0.01)
    t = logit_normal(20_000, 1000, mean, std, generator=g.manual_seed(0))
    assert t.dtype == torch.int64 and t.equal((theirs * 1000).long())
    assert logit_normal(9, 10, mean=1e3).tolist() == [9] * 9  # s rounds to 1: still a level


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_loss_is_one_loss(kind):
    "The weighted loss of one and the same wrong picture does not depend on the kind the network speaks"
    x0, noise = batch(dtype=torch.float64)
    wrong, _ = batch(seed=1, dtype=torch.float64)
    t, schedule = torch.tensor([5, 100, 400, 700, 950]), NoiseSchedule()
    abar = schedule.abar[t].double().reshape(-1, 1, 1, 1)

    def model(x, t, context):
        x = x * stretch(abar) if kind == "flow" else x
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
    schedule = NoiseSchedule(ZERO)
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
    with pytest.raises(ValueError, match="unknown prediction kind 'noise': use eps, v, x0 or flow"): call(torch.ones(1))


@pytest.mark.parametrize("gamma", [0, -1.0, math.nan])
def test_bad_gamma(gamma):
    "A gamma that is not positive is refused"
    with pytest.raises(ValueError, match="gamma must be positive"): min_snr_weight(torch.ones(1), gamma)


def test_bad_huber():
    "A c that is not positive is refused"
    with pytest.raises(ValueError, match="Huber's c must be positive, not 0"): pseudo_huber(torch.ones(1), 0)
