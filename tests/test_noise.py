"""Noise schedules: equal to diffusers' tables, and true to the algebra."""
import math
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr as their_rescale
from sd_nb.diffusion.noise import (NoiseSchedule, linear_betas, rescale_zero_terminal_snr, scaled_linear_betas, spread,
                                   timesteps)

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
KINDS = dict(linear=(linear_betas, 1e-4, 0.02), scaled_linear=(scaled_linear_betas, 0.00085, 0.012))


@pytest.mark.parametrize("name", KINDS)
def test_betas_and_abar_equal_diffusers(name):
    "Betas and abar are diffusers' to float32 precision, for its two linear schedules"
    make, start, end = KINDS[name]
    theirs = DDPMScheduler(beta_schedule=name, beta_start=start, beta_end=end)
    assert_close(make().float(), theirs.betas, rtol=1e-6, atol=1e-8)
    assert_close(NoiseSchedule(make()).abar, theirs.alphas_cumprod, rtol=1e-5, atol=1e-7)


def test_default_is_stable_diffusion():
    "Without arguments the schedule is SD's, and its published ends hold"
    schedule = NoiseSchedule()
    assert schedule.T == 1000 and schedule.abar.dtype == torch.float32 and schedule.abar.shape == (1000,)
    assert_close(schedule.abar[[0, 999]], torch.tensor([0.99915, 0.004660]), rtol=1e-4, atol=0)


def test_zero_terminal_snr_equals_diffusers():
    "The rescaled betas are diffusers', end in exactly no signal and keep the first level"
    betas = rescale_zero_terminal_snr(scaled_linear_betas())
    assert_close(betas.float(), their_rescale(scaled_linear_betas().float()), rtol=1e-3, atol=1e-6)
    assert_close(betas, their_rescale(scaled_linear_betas()), rtol=1e-9, atol=1e-12)
    schedule = NoiseSchedule(betas)
    assert schedule.abar[-1] == 0 and schedule.snr(999) == 0
    assert_close(schedule.abar[0], NoiseSchedule().abar[0])


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_equal_diffusers(spacing, offset):
    "For every number of steps the levels are DDIMScheduler's, except where its own are impossible"
    theirs = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    impossible = []
    for n in range(1, 1001):
        theirs.set_timesteps(n)
        ours = timesteps(n, spacing=spacing, offset=offset)
        assert ours.dtype == torch.int64 and len(ours) == n and 0 <= ours.min() and ours.max() <= 999
        assert (ours.diff() < 0).all()
        if len(theirs.timesteps) > n or theirs.timesteps.max() > 999: impossible.append(n)
        if len(theirs.timesteps) > n: assert theirs.timesteps[-1] == -1 and ours.equal(theirs.timesteps[:n])
        elif theirs.timesteps.max() < 1000: assert ours.equal(theirs.timesteps), n
    if spacing == "trailing": assert 61 in impossible and 50 not in impossible  # theirs takes a 62nd step, at t = -1
    else: assert impossible == ([1000] if (spacing, offset) == ("leading", 1) else [])  # theirs asks for level 1000


@pytest.mark.parametrize("bad", [dict(n=0), dict(n=-3), dict(n=1001), dict(n=11, T=10), dict(n=5, spacing="cosine"),
                                 dict(n=5, spacing="karras"), dict(n=11, schedule=NoiseSchedule(linear_betas(10)))])
def test_timesteps_refuses(bad):
    "An impossible number of steps, an unknown spacing or a missing schedule is one clear line"
    expected = "steps must lie between 1 and|unknown spacing 'cosine'|'karras' needs the noise schedule"
    with pytest.raises(ValueError, match=expected): timesteps(**bad)


def test_schedule_refuses_impossible_betas():
    "A variance outside [0, 1] is refused"
    with pytest.raises(ValueError, match=r"betas must lie in \[0, 1\]"): NoiseSchedule([0.1, 1.2])


def test_add_noise_equals_diffusers():
    "add_noise is DDPMScheduler.add_noise"
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(6, 3, 4, 4, generator=g), torch.randn(6, 3, 4, 4, generator=g)
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    assert_close(NoiseSchedule().add_noise(x, noise, t), theirs.add_noise(x, noise, t), rtol=1e-5, atol=1e-5)


def test_add_noise_is_the_chain():
    "Jumping to level t has the mean and variance of t + 1 single steps (DDPM eq. 2 against eq. 4)"
    schedule, (mean, var) = NoiseSchedule(), torch.tensor([1.0, 0.0], dtype=torch.float64)
    for t, beta in enumerate(schedule.betas):
        mean, var = (1 - beta).sqrt() * mean, (1 - beta) * var + beta
        if t in (0, 17, 999):
            one, level = torch.ones(1, 1, dtype=torch.float64), torch.tensor([t])
            assert_close(schedule.sqrt_abar(level, one).squeeze(), mean)
            assert_close(schedule.sqrt_one_minus_abar(level, one).squeeze() ** 2, var)


@settings(max_examples=40, deadline=None)
@given(t=st.integers(0, 999), seed=st.integers(0, 2**31), shape=st.sampled_from([(1, 2), (2, 3, 4), (3, 4, 2, 2)]))
def test_perfect_prediction_gives_the_picture_back(t, seed, shape):
    "Take the true noise out of x_t and x_0 is left"
    schedule, g = NoiseSchedule(), torch.Generator().manual_seed(seed)
    x, noise = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    level = torch.full(shape[:1], t)
    noisy = schedule.add_noise(x, noise, level)
    back = (noisy - schedule.sqrt_one_minus_abar(level, x) * noise) / schedule.sqrt_abar(level, x)
    assert_close(back, x, rtol=1e-4, atol=1e-5)


def test_snr_keeps_its_digits():
    "SNR is signal over noise power in float64, also where 1 - abar is tiny"
    schedule = NoiseSchedule(linear_betas())
    assert_close(schedule.snr(torch.tensor([0])), torch.tensor([(1 - 1e-4) / 1e-4]), rtol=1e-6, atol=0)
    assert schedule.snr(torch.arange(1000)).diff().max() < 0


def test_spread_and_dtypes():
    "Numbers per picture broadcast over pictures; half precision stays half"
    assert spread(torch.arange(2), torch.ones(2, 3, 4, 4)).shape == (2, 1, 1, 1)
    x = torch.ones(2, 3, dtype=torch.float16)
    assert NoiseSchedule().add_noise(x, x, torch.tensor([0, 999])).dtype == torch.float16


ZERO = rescale_zero_terminal_snr(scaled_linear_betas())


@pytest.mark.parametrize("spacing, option", [("karras", "use_karras_sigmas"), ("log_snr", "use_exponential_sigmas")])
@pytest.mark.parametrize("zero", [False, True])
def test_spaced_by_noise_equals_diffusers(spacing, option, zero):
    "Sigmas and fractional levels are EulerDiscreteScheduler's, for every number of steps"
    theirs = EulerDiscreteScheduler(**SD, **{option: True}, rescale_betas_zero_snr=zero)
    schedule = NoiseSchedule(ZERO if zero else None)
    assert_close(theirs.alphas_cumprod, schedule.abar.clamp(min=2**-24), rtol=1e-4, atol=1e-8)
    theirs.alphas_cumprod = schedule.abar64.clamp(min=2**-24)  # their float32 table has lost digits of 1 - abar at t = 0
    for n in [*range(2, 61), 150, 999, 1000]:  # one step of theirs would start at level 0, without noise
        theirs.set_timesteps(n)
        ts = timesteps(n, spacing=spacing, schedule=schedule)
        assert ts.dtype == torch.float64 and len(ts) == n and (ts.diff() < 0).all()
        sigmas = torch.tensor([(1 / schedule.level(t) - 1) ** 0.5 for t in ts.tolist()])
        assert_close(sigmas, theirs.sigmas[:-1], rtol=1e-5, atol=0)
        assert_close(ts.float(), theirs.timesteps, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spacing, option", [("karras", "use_karras_sigmas"), ("log_snr", "use_lu_lambdas")])
def test_spaced_by_noise_equals_dpm_solver(spacing, option):
    "DPMSolverMultistepScheduler has the same sigmas; it rounds the levels it tells the network"
    theirs = DPMSolverMultistepScheduler(**SD, **{option: True})
    theirs.alphas_cumprod = NoiseSchedule().abar64
    for n in (2, 5, 20, 50):
        theirs.set_timesteps(n)
        ts = timesteps(n, spacing=spacing, schedule=NoiseSchedule())
        sigmas = torch.tensor([(1 / NoiseSchedule().level(t) - 1) ** 0.5 for t in ts.tolist()])
        assert_close(sigmas, theirs.sigmas[:-1], rtol=1e-5, atol=0)
        assert_close(ts.round().long(), theirs.timesteps)


def test_spaced_by_noise_closed_form():
    "Karras eq. 5: sigma**(1/7) is evenly spaced; log_snr: log-SNR is; both from the last level to the first"
    for betas in (None, linear_betas(), linear_betas(10), ZERO):
        schedule = NoiseSchedule(betas)
        n = min(13, schedule.T)
        for spacing, even in [("karras", lambda lam: (-lam / 14).exp()), ("log_snr", lambda lam: lam)]:
            ts = timesteps(n, spacing=spacing, schedule=schedule)
            steps = even(schedule.log_snr(ts)).diff()
            assert_close(steps, steps.mean().expand(n - 1), rtol=1e-9, atol=1e-12)
            assert_close(ts[[0, -1]], torch.tensor([schedule.T - 1, 0.0], dtype=torch.float64), rtol=0, atol=1e-9)


def test_levels_between_levels():
    "log-SNR is exact on whole levels, straight between them (k-diffusion's convention) and clamped beyond the ends"
    for schedule in (NoiseSchedule(), NoiseSchedule(ZERO), NoiseSchedule([0.0, 0.5, 1.0]), NoiseSchedule([0.3])):
        whole = torch.arange(schedule.T)
        assert [schedule.level(t) for t in whole.tolist()] == schedule.abar64.clamp(min=2**-24).tolist()
        assert_close(schedule.log_snr(whole.double()), schedule.abar64.clamp(2**-24, 1 - 2**-53).logit())
        assert schedule.level(-3) == schedule.level(0) and schedule.level(1e6) == schedule.level(schedule.T - 1)
    theirs = EulerDiscreteScheduler(**SD)
    table = ((1 - theirs.alphas_cumprod.double()) / theirs.alphas_cumprod.double()).log() / 2
    for t in (0.25, 17.5, 998.9):
        low = int(t)
        log_sigma = (1 - (t - low)) * table[low] + (t - low) * table[low + 1]
        assert NoiseSchedule().level(t) == pytest.approx(1 / (1 + math.exp(2 * log_sigma)), rel=1e-5)
    assert NoiseSchedule().log_snr(torch.tensor([3])).dtype == torch.float32
    with pytest.raises(ValueError): NoiseSchedule().level(math.nan)


@settings(max_examples=60, deadline=None)
@given(t=st.floats(0, 999), zero=st.booleans())
def test_t_of_log_snr_is_the_inverse(t, zero):
    "From a level to its log-SNR and back; beyond the ends it stays at the ends"
    schedule = NoiseSchedule(ZERO if zero else None)
    assert schedule.t_of_log_snr(schedule.log_snr(t)).item() == pytest.approx(t, abs=1e-6)
    assert schedule.t_of_log_snr(torch.tensor([99.0, -99.0])).tolist() == [0, 999]


def test_add_noise_between_levels():
    "Fractional levels mix with the interpolated powers, whole ones as ever; float t costs whole levels no digit"
    schedule, g = NoiseSchedule(), torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 3, 3, 4, 4, generator=g, dtype=torch.float64)
    t = torch.tensor([0.0, 500.0, 999.0], dtype=torch.float64)
    assert_close(schedule.add_noise(x, noise, t), schedule.add_noise(x, noise, t.long()), rtol=1e-12, atol=1e-12)
    a = schedule.level(500.3)
    mixed = schedule.add_noise(x, noise, torch.full((3,), 500.3, dtype=torch.float64))
    assert_close(mixed, a**0.5 * x + (1 - a) ** 0.5 * noise)


def test_level_is_never_zero():
    "A sampler may divide by the root of every level, also under zero terminal SNR"
    assert NoiseSchedule(rescale_zero_terminal_snr(scaled_linear_betas())).level(999) == 2**-24
    assert NoiseSchedule().level(0) == pytest.approx(1 - 0.00085)
