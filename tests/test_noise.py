"""Noise schedules: equal to diffusers' tables, and true to the algebra."""
import math
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from diffusers import (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler,
                       FlowMatchEulerDiscreteScheduler)
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr as their_rescale
from sd_nb.diffusion.noise import (NoiseSchedule, betas_of, cosine_betas, flow_betas, linear_betas,
                                   rescale_zero_terminal_snr, scaled_linear_betas, shift_log_snr, sigmoid_betas, spread,
                                   timesteps)

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
ZERO = rescale_zero_terminal_snr(scaled_linear_betas())
KINDS = dict(linear=(linear_betas, 1e-4, 0.02), scaled_linear=(scaled_linear_betas, 0.00085, 0.012),
             squaredcos_cap_v2=(cosine_betas, 1e-4, 0.02), sigmoid=(sigmoid_betas, 1e-4, 0.02))


@pytest.mark.parametrize("name", KINDS)
def test_betas_and_abar_equal_diffusers(name):
    "Betas and abar are diffusers' to float32 precision, for its four schedules and for other lengths"
    make, start, end = KINDS[name]
    for T in (1000, 50):
        theirs = DDPMScheduler(T, beta_schedule=name, beta_start=start, beta_end=end)
        assert_close(make(T).float(), theirs.betas, rtol=1e-6, atol=1e-8)
        assert_close(NoiseSchedule(make(T)).abar, theirs.alphas_cumprod, rtol=1e-5, atol=1e-7)
    assert len(make(7)) == 7 and make().dtype == torch.float64


def test_cosine_is_equation_17():
    "Where no beta is capped, abar is the squared cosine itself; the first step is below a grey level, the last capped"
    t = torch.arange(1, 999, dtype=torch.float64)
    f = [torch.cos((o / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for o in (t, torch.zeros(1, dtype=torch.float64))]
    assert_close(NoiseSchedule(cosine_betas()).abar64[:998], f[0] / f[1])
    assert cosine_betas()[0].sqrt() < 1 / 127.5 and cosine_betas()[-1] == 0.999 == cosine_betas().max()
    assert NoiseSchedule(cosine_betas(cap=1)).abar[-1] < 1e-30


@settings(max_examples=30, deadline=None)
@given(keep=st.lists(st.floats(0.01, 0.999), min_size=1, max_size=20), cap=st.floats(0.1, 1))
def test_betas_of_is_the_inverse(keep, cap):
    "betas_of finds the betas of any falling curve, and caps them"
    betas = 1 - torch.tensor(keep, dtype=torch.float64)
    assert_close(betas_of(NoiseSchedule(betas).abar64), betas, rtol=1e-6, atol=1e-9)
    assert_close(betas_of(NoiseSchedule(betas).abar64, cap), betas.clamp(max=cap), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_and_shift_are_those_of_stable_diffusion_3(shift):
    "The straight path's s at each level is FlowMatchEulerDiscreteScheduler's sigma, shifted or not (Esser eq. 23)"
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas.flip(0)
    betas = flow_betas() if shift == 1 else shift_log_snr(flow_betas(), shift)
    signal, sigma = NoiseSchedule(betas).abar64.sqrt(), (1 - NoiseSchedule(betas).abar64).sqrt()
    assert_close((sigma / (signal + sigma)).float(), theirs, rtol=1e-5, atol=0)


@settings(max_examples=30, deadline=None)
@given(ratio=st.floats(0.1, 10), name=st.sampled_from([*KINDS]))
def test_shift_in_closed_form(ratio, name):
    "log-SNR falls by 2 log(ratio) at every level; shifting back undoes it; no signal stays no signal"
    betas = KINDS[name][0]()
    before, after = NoiseSchedule(betas).abar64, NoiseSchedule(shift_log_snr(betas, ratio)).abar64
    assert_close(after.logit(), before.logit() - 2 * math.log(ratio), rtol=1e-7, atol=1e-7)
    assert_close(shift_log_snr(shift_log_snr(betas, ratio), 1 / ratio), betas, rtol=1e-5, atol=1e-10)
    assert NoiseSchedule(shift_log_snr(ZERO, ratio)).abar[-1] == 0


def test_shift_makes_a_pooled_picture_as_noisy_as_the_small_one():
    "Averaged over 4 x 4 pixels, noise of the shifted schedule has the small picture's SNR"
    small, large = NoiseSchedule(), NoiseSchedule(shift_log_snr(scaled_linear_betas(), 4))
    x, t = torch.ones(4, 1, 256, 256), torch.full((4,), 300)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    pooled = torch.nn.functional.avg_pool2d(large.add_noise(x, noise, t), 4)
    assert (pooled.mean() ** 2 / pooled.var()).item() == pytest.approx(small.snr(300).item(), rel=0.03)


@pytest.mark.parametrize("ratio", [0, -1.0, math.nan])
def test_shift_refuses(ratio):
    "A ratio that is not positive is refused"
    with pytest.raises(ValueError, match="ratio of two sides must be positive"): shift_log_snr(linear_betas(), ratio)


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


EVEN = pytest.mark.parametrize("spacing, option", [("karras", "use_karras_sigmas"), ("log_snr", "use_exponential_sigmas")])


def sigmas_of(schedule, ts):
    "Noise over signal at these levels"
    return torch.tensor([(1 / schedule.level(t) - 1) ** 0.5 for t in ts.tolist()])


@EVEN
def test_spaced_by_noise_equals_diffusers(spacing, option):
    "Sigmas and fractional levels are EulerDiscreteScheduler's, for every number of steps"
    theirs, schedule = EulerDiscreteScheduler(**SD, **{option: True}), NoiseSchedule()
    assert_close(theirs.alphas_cumprod, schedule.abar, rtol=1e-4, atol=1e-8)
    theirs.alphas_cumprod = schedule.abar64  # their float32 table has lost digits at t = 0
    for n in [*range(2, 61), 150, 999, 1000]:  # one step of theirs would start at level 0, without noise
        theirs.set_timesteps(n)
        ts = timesteps(n, spacing=spacing, schedule=schedule)
        assert ts.dtype == torch.float64 and len(ts) == n and (ts.diff() < 0).all()
        assert_close(sigmas_of(schedule, ts), theirs.sigmas[:-1], rtol=1e-5, atol=0)
        assert_close(ts.float(), theirs.timesteps, rtol=0, atol=1e-4)


@EVEN
@pytest.mark.parametrize("n", [2, 3, 10, 20, 50])
def test_spaced_by_noise_from_pure_noise(spacing, option, n):
    "With zero terminal SNR ours asks once in pure noise and then as they do from 14.6; theirs from 4096, half of it in vain"
    schedule = NoiseSchedule(ZERO)
    theirs = EulerDiscreteScheduler(**SD, **{option: True}, rescale_betas_zero_snr=True, sigma_max=14.6,
                                    sigma_min=(1 / schedule.level(0) - 1) ** 0.5)
    ts = timesteps(n, spacing=spacing, schedule=schedule)
    assert ts[0] == 999 and len(ts) == n and (ts.diff() < 0).all()
    if n > 2:
        convert = theirs._convert_to_karras if spacing == "karras" else theirs._convert_to_exponential
        want = convert(in_sigmas=torch.tensor([14.6, theirs.config.sigma_min]), num_inference_steps=n - 1)
        assert_close(sigmas_of(schedule, ts[1:]), torch.as_tensor(want).float(), rtol=1e-5, atol=0)
    wasteful = EulerDiscreteScheduler(**SD, **{option: True}, rescale_betas_zero_snr=True)
    wasteful.set_timesteps(n)
    if n >= 10: assert (wasteful.sigmas > 14.61).sum() > n * 0.4 and (sigmas_of(schedule, ts) > 14.61).sum() == 1


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
    for betas in (None, linear_betas(), linear_betas(10)):
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
    assert_close(schedule.abar_at(t), schedule.abar_at(t.long()), rtol=0, atol=0)
    assert schedule.abar_at(t.long(), torch.float64).equal(schedule.abar64[t.long()])
    a = schedule.level(500.3)
    assert schedule.abar_at(torch.tensor([500.3], dtype=torch.float64), torch.float64).item() == pytest.approx(a)
    mixed = schedule.add_noise(x, noise, torch.full((3,), 500.3, dtype=torch.float64))
    assert_close(mixed, a**0.5 * x + (1 - a) ** 0.5 * noise)


def test_level_is_never_zero():
    "A sampler may divide by the root of every level, also under zero terminal SNR"
    assert NoiseSchedule(rescale_zero_terminal_snr(scaled_linear_betas())).level(999) == 2**-24
    assert NoiseSchedule().level(0) == pytest.approx(1 - 0.00085)
