"""Samplers: diffusers' numbers step for step, one seed one picture, and clear words for bad input."""
import inspect
import math
import sys
import pytest
import torch
from torch.testing import assert_close
from diffusers import (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler,
                       EulerDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler, UniPCMultistepScheduler)
from sd_nb.diffusion import samplers
from sd_nb.diffusion.noise import NoiseSchedule, rescale_zero_terminal_snr, scaled_linear_betas, timesteps
from sd_nb.diffusion.objective import target, to_eps
from sd_nb.diffusion.samplers import SAMPLERS, noise_over_signal
from sd_nb.diffusion.walk import ddim, ddpm, fresh_noise, walk

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
STEPS, NAMES = [5, 20, 50], dict(eps="epsilon", v="v_prediction", x0="sample")
WHOLE, OPTIONS = ["trailing", "leading", "linspace"], dict(
    karras=dict(use_karras_sigmas=True), log_snr=dict(use_exponential_sigmas=True), lambdas=dict(use_lu_lambdas=True))
SDE = dict(algorithm_type="sde-dpmsolver++")
THEIRS = dict(  # sampler -> their scheduler, its options, the spacings it has
    ddpm=(DDPMScheduler, dict(clip_sample=False), WHOLE),
    ddim=(DDIMScheduler, dict(clip_sample=False), WHOLE[:2]),  # its linspace: test_ddim_follows_the_list...
    euler=(EulerDiscreteScheduler, {}, [*WHOLE, "karras", "log_snr"]),
    euler_ancestral=(EulerAncestralDiscreteScheduler, {}, WHOLE),
    heun=(HeunDiscreteScheduler, {}, [*WHOLE, "karras", "log_snr"]),
    dpmpp_2m=(DPMSolverMultistepScheduler, {}, [*WHOLE, *OPTIONS]),
    dpmpp_2m_sde=(DPMSolverMultistepScheduler, SDE, [*WHOLE, *OPTIONS]),
    unipc=(UniPCMultistepScheduler, {}, [*WHOLE, "karras", "log_snr"]),
    lcm=(LCMScheduler, {}, ["its own"]))
STILL = ("euler", "euler_ancestral", "heun")  # theirs hold y = x / sqrt(abar) in these
CHANCE = ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "lcm")
CASES = [(name, spacing, kind) for name, (_, _, spacings) in THEIRS.items() for spacing in spacings for kind in NAMES
         if (name, kind) != ("euler_ancestral", "x0")]  # not implemented there


def net(x, t):
    "A cheap, smooth, nonlinear function of input and level, in place of a network"
    wave = (t.to(x.dtype) / 150).reshape(-1, *[1] * (x.ndim - 1))
    return torch.sin(2 * x + wave) + 0.3 * torch.cos(wave) * x.roll(1, -1)


def recorder(kind, schedule):
    "An eps_model around `net` as a network of this kind, and the list of what it was asked and answered"
    calls = []

    def eps_model(x, t):
        calls.append((x, t[0].item(), net(x, t)))
        return to_eps(kind, calls[-1][2], x, schedule.level(t[0].item()))
    return eps_model, calls


def build(name, spacing="trailing", kind="eps", **kwargs):
    "Their scheduler for a sampler of ours"
    cls, options, _ = THEIRS[name]
    if spacing in WHOLE and name != "lcm": kwargs |= dict(timestep_spacing=spacing, steps_offset=1)
    return cls(**SD, prediction_type=NAMES[kind], **options, **OPTIONS.get(spacing, {}), **kwargs)


def levels(name, theirs, spacing, n):
    "The levels to visit: ours if they lie between whole ones, else theirs"
    theirs.set_timesteps(n)
    if spacing in OPTIONS: return timesteps(n, spacing=spacing.replace("lambdas", "log_snr"), schedule=NoiseSchedule())
    ts = torch.cat([theirs.timesteps[:1], theirs.timesteps[1::2]]) if name == "heun" else theirs.timesteps
    return ts.long() if (ts == ts.long()).all() else ts.double()


def close(ours, theirs, tol, what=""):
    "Compare a whole state: the largest difference against the largest number in it"
    worst, scale = (ours - theirs).abs().max().item(), max(1.0, theirs.abs().max().item())
    assert worst <= tol * scale, f"{what} differs by {worst:.2g} where numbers go up to {scale:.2g}"


def start(shape=(2, 4, 8, 8), dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def seeds(*numbers):
    return [torch.Generator().manual_seed(s) for s in numbers]


def sigmas(ts, abar_end=None):
    "Noise over signal before each step, and after the last"
    steps = walk(NoiseSchedule(), ts, abar_end)
    return [noise_over_signal(a) for _, _, a, _ in steps] + [noise_over_signal(steps[-1][3])]


def share_noise(monkeypatch, theirs):
    "Let their scheduler draw what ours draws"
    gs = seeds(3, 4)
    fake = lambda shape, generator=None, device=None, dtype=None: fresh_noise(torch.empty(shape, dtype=dtype), gs)
    monkeypatch.setattr(sys.modules[type(theirs).__module__], "randn_tensor", fake, raising=False)


def use_our_sigmas(name, theirs, ts):
    "Replace their table"
    s = torch.tensor(sigmas(ts)).float()
    theirs.sigmas = torch.cat([s[:1], s[1:-1].repeat_interleave(2), s[-1:]]) if name == "heun" else s


def assert_same_walk(name, theirs, ts, kind="eps", tol=1e-5, **kwargs):
    "Run ours, replay the outputs in theirs: it must ask about the same inputs and go through the same states"
    schedule, x = NoiseSchedule(), start()
    eps_model, calls = recorder(kind, schedule)
    states = list(SAMPLERS[name](eps_model, x, schedule, ts, generator=seeds(3, 4), **kwargs))
    s, still, last = sigmas(ts, kwargs.get("abar_end")), name in STILL, len(ts) - 1
    assert [state.i for state in states] == list(range(len(ts)))
    if still: x = x * math.sqrt(1 + s[0]**2)
    options = dict(eta=kwargs["eta"]) if "eta" in kwargs else {}
    for j, ((seen, t, out), their_t) in enumerate(zip(calls, theirs.timesteps, strict=True)):
        assert abs(their_t - t) < (2e-3 if still or isinstance(t, int) else 1.002)  # test_fractional_levels...
        close(seen, theirs.scale_model_input(x, their_t), tol, f"input of call {j}")
        step = theirs.step(out, their_t if still else int(their_t), x, **options)
        x, i = step.prev_sample, j // 2 if name == "heun" else j
        if name == "heun" and j % 2 == 0 and i < last: continue  # within a step
        close(states[i].x * (math.sqrt(1 + s[i + 1]**2) if still else 1), x, tol, f"state {i}")
        clean = step.get("denoised", step.get("pred_original_sample"))
        if clean is not None and name != "heun": close(states[i].x0, clean, tol, f"clean estimate {i}")


@pytest.mark.parametrize("name, spacing, kind", CASES)
def test_same_steps_as_diffusers(name, spacing, kind, monkeypatch):
    "At 5, 20 and 50 steps: the same levels, the same inputs to the network, and the same states to 1e-5"
    for n in STEPS:
        theirs = build(name, spacing, kind)
        share_noise(monkeypatch, theirs)
        ts = levels(name, theirs, spacing, n)
        if name in STILL and spacing == "linspace": use_our_sigmas(name, theirs, ts)  # test_sigma_between_levels
        assert_same_walk(name, theirs, ts, kind)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_at_every_eta(eta, to_one, monkeypatch):
    "With one table for both, ddim is theirs to nine digits, at every eta and both ends"
    for n in STEPS:
        theirs, abar = build("ddim", set_alpha_to_one=to_one), NoiseSchedule().abar64
        theirs.alphas_cumprod, theirs.final_alpha_cumprod = abar, torch.ones(()).double() if to_one else abar[0]
        share_noise(monkeypatch, theirs)
        ts, end = levels("ddim", theirs, "trailing", n), None if to_one else abar[0]
        assert_same_walk("ddim", theirs, ts, tol=1e-9, eta=eta, abar_end=end)


@pytest.mark.parametrize("name", ["ddpm", "lcm"])
def test_to_nine_digits_with_one_table(name, monkeypatch):
    "So are ddpm and lcm, whose code keeps float64"
    theirs = build(name)
    theirs.alphas_cumprod, theirs.one = NoiseSchedule().abar64, torch.ones(()).double()
    share_noise(monkeypatch, theirs)
    assert_same_walk(name, theirs, levels(name, theirs, "trailing", 20), tol=1e-9)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
@pytest.mark.parametrize("n", STEPS)
def test_ends_at_level_0(name, n, monkeypatch):
    "With abar_end the last step leaves level 0's noise, as final_sigmas_type='sigma_min' does, at full order"
    full = dict(lower_order_final=False) if name != "euler" else {}
    theirs = build(name, final_sigmas_type="sigma_min", **full)
    share_noise(monkeypatch, theirs)
    assert_same_walk(name, theirs, levels(name, theirs, "trailing", n), abar_end=NoiseSchedule().abar64[0])


# Where diffusers and the papers part: ours follows the paper, and the difference is shown


def walks(name, theirs, ts, **kwargs):
    "States of ours and of theirs (as x) for the same outputs"
    s, x, shown = sigmas(ts, kwargs.get("abar_end")), start(), []
    eps_model, calls = recorder("eps", NoiseSchedule())
    ours = [state.x for state in SAMPLERS[name](eps_model, x, NoiseSchedule(), ts, generator=seeds(3, 4), **kwargs)]
    if name in STILL: x = x * math.sqrt(1 + s[0]**2)
    for i, ((_, _, out), t) in enumerate(zip(calls, theirs.timesteps, strict=True)):
        theirs.scale_model_input(x, t)
        x = theirs.step(out, t, x).prev_sample
        shown.append(x / math.sqrt(1 + s[i + 1]**2) if name in STILL else x)
    return ours, shown


def test_ddim_follows_the_list_where_diffusers_does_not():
    "With uneven spacing ours steps to the next level of the list (DDIM section 4.2), theirs to t - T // n"
    theirs = build("ddim", "linspace")
    theirs.set_timesteps(5)
    ts, x, out = timesteps(5, spacing="linspace"), start(), net(start(), torch.tensor([999.0]))
    ours, listed, elsewhere = (next(ddim(lambda x, t: out, x, NoiseSchedule(), to)).x
                               for to in (ts, [999, 749], [999, 999 - 200]))
    assert ts[:2].tolist() == [999, 749]
    assert_close(ours, listed)
    assert_close(theirs.step(out, 999, x).prev_sample, elsewhere, rtol=1e-5, atol=1e-5)
    assert (ours - elsewhere).abs().max() > 0.01


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_lower_order_final_is_not_the_papers(name):
    "Before a last step to level 0 theirs falls back to first order (2M: below 15 steps); the algorithms do not"
    end = NoiseSchedule().abar64[0]
    theirs = build(name, final_sigmas_type="sigma_min")
    ours, shown = walks(name, theirs, levels(name, theirs, "trailing", 5), abar_end=end)
    for a, b in zip(ours[:-1], shown): close(a, b, 1e-5)
    assert (ours[-1] - shown[-1]).abs().max() > 1e-3


def test_a_last_step_to_a_clean_picture_is_of_first_order():
    "No line is drawn to infinity: the last state of every deterministic sampler is its last clean estimate"
    for name in ("ddim", "euler", "heun", "dpmpp_2m", "unipc"):
        *_, last = SAMPLERS[name](net, start(), NoiseSchedule(), timesteps(20))
        close(last.x, last.x0, 1e-12)


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
@pytest.mark.parametrize("spacing, whole", [("karras", torch.round), ("log_snr", torch.floor)])
def test_fractional_levels_are_not_rounded(name, spacing, whole):
    "Between whole levels theirs asks about rounded or cut ones; ours about the true ones (DPM-Solver, discrete time)"
    theirs = build(name, spacing)
    ts, (asked, eps_model) = levels(name, theirs, spacing, 20), recorder("eps", NoiseSchedule())[::-1]
    list(SAMPLERS[name](eps_model, start(), NoiseSchedule(), ts))
    assert theirs.timesteps.dtype == torch.int64
    assert torch.equal(theirs.timesteps[1:-1], whole(ts[1:-1]).long())  # the ends are whole but for rounding
    assert [t for _, t, _ in asked] == ts.tolist() and max(abs(t - round(t)) for t in ts.tolist()) > 0.3


def test_sigma_between_levels():
    "Theirs interpolates sigma to find a level's noise and log sigma to find a noise's level; ours log-SNR both ways"
    theirs, ours = build("euler"), sigmas([998.5, 500.0, 0.5])
    theirs.set_timesteps(timesteps=[998.5, 500.0, 0.5])
    table = ((1 - theirs.alphas_cumprod) / theirs.alphas_cumprod).sqrt()
    back = lambda s: theirs._sigma_to_t(torch.tensor([s]).numpy(), table.log().numpy()).item()
    assert_close(theirs.sigmas[:2].tolist(), ours[:2], rtol=3e-5, atol=0)
    assert_close(theirs.sigmas[2], table[:2].mean(), rtol=1e-6, atol=0)
    assert_close(ours[2], table[:2].log().mean().exp().item(), rtol=1e-4, atol=0)
    assert 0.01 < theirs.sigmas[2] / ours[2] - 1 < 0.02
    assert abs(back(ours[2]) - 0.5) < 1e-3 and abs(back(theirs.sigmas[2].item()) - 0.5) > 0.03
    assert_close(NoiseSchedule().t_of_log_snr(-2 * math.log(ours[2])).item(), 0.5)


def test_first_noise():
    "Theirs starts Euler from noise of sigma_max (Karras algorithm 1), ours from x of variance 1 (DDPM algorithm 2)"
    theirs = build("euler")
    ts = levels("euler", theirs, "trailing", 20)
    y = next(samplers.euler(lambda x, t: 0 * x, torch.ones(1, 1), NoiseSchedule(), ts)).x0  # no noise found: y itself
    s = sigmas(ts)[0]
    assert_close(theirs.init_noise_sigma.item(), s, rtol=1e-5, atol=0)
    assert_close(y.item(), math.sqrt(1 + s**2), rtol=1e-6, atol=0)
    assert 0.002 < y.item() / s - 1 < 0.003


def test_ddpm_variance_is_the_posterior():
    "fixed_large adds the variance beta, fixed_small and ours the posterior's beta_tilde (DDPM section 3.2)"
    x, small, large = torch.zeros(1, 1000), build("ddpm"), build("ddpm", variance_type="fixed_large")
    for theirs in (small, large): theirs.set_timesteps(5)
    stds = [theirs.step(x, 999, x, generator=torch.Generator().manual_seed(0)).prev_sample for theirs in (small, large)]
    ours = next(ddpm(lambda x, t: x, x, NoiseSchedule(), timesteps(5), generator=torch.Generator().manual_seed(0))).x
    a, b = NoiseSchedule().abar64[[999, 799]].tolist()
    assert_close(ours, stds[0], rtol=1e-4, atol=1e-5)
    assert_close((stds[1] / stds[0]).median().item(), math.sqrt((1 - a) / (1 - b)), rtol=1e-4, atol=0)


# eta


@pytest.mark.parametrize("t, t_next", [(999, 799), (500, 499), (21, 1), (1, 0)])
def test_ddim_at_eta_1_has_the_ddpm_variance(t, t_next):
    "One DDIM step at eta 1 is DDPM's posterior: same mean, and variance beta_tilde (DDPM eq. 7)"
    schedule, x, eps = NoiseSchedule(), start((1, 1000)), start((1000, 1)).T
    a, b = schedule.abar64[t], schedule.abar64[t_next]
    beta_tilde = (1 - b) / (1 - a) * (1 - a / b)

    def step(sampler, seed, **kwargs):
        return next(sampler(lambda x, t: eps, x, schedule, [t, t_next], generator=seeds(seed), **kwargs)).x
    for seed in (0, 1): assert_close(step(ddim, seed, eta=1.0), step(ddpm, seed), rtol=1e-9, atol=1e-9)
    drawn = fresh_noise(x, seeds(0)) - fresh_noise(x, seeds(1))
    std = (step(ddim, 0, eta=1.0) - step(ddim, 1, eta=1.0)) / drawn  # what the drawn noise was multiplied with
    assert_close(std.square(), beta_tilde.expand_as(std), rtol=1e-8, atol=0)


@pytest.mark.parametrize("name, kwargs", [("ddim", dict(eta=1.0)), ("ddim", dict(eta=0.5)), ("ddpm", {}),
                                          ("euler_ancestral", {}), ("dpmpp_2m_sde", {})])
def test_noise_added_was_taken_away_before(name, kwargs):
    "From noise alone (x0 = 0) one step leaves power 1 - abar, and not that plus the fresh noise's"
    schedule, eps = NoiseSchedule(), start((1, 100_000))
    a, b = schedule.abar64[[500, 400]]
    x = (1 - a).sqrt() * eps
    power = next(SAMPLERS[name](lambda x, t: eps, x, schedule, [500, 400], generator=seeds(0), **kwargs)).x.var()
    wrong = 1 - b + (kwargs.get("eta", 1.0)**2) * (1 - b) / (1 - a) * (1 - a / b)
    bound = 4 * math.sqrt(2 / 100_000) * (1 - b)  # four standard errors of a measured variance
    assert abs(power - (1 - b)) < bound < abs(wrong - (1 - b)) / 4


# The contract


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", ["trailing", "karras"])
def test_contract(name, spacing):
    "A lazy generator over levels, at most 40 lines long, that asks once a step (heun: twice) and says where it is"
    asked, schedule = [], NoiseSchedule()

    def model(x, t):
        asked.append((t.dtype, tuple(t.shape), t[0].item()))
        return torch.zeros_like(x)
    ts = timesteps(7, spacing=spacing, schedule=schedule)
    states = SAMPLERS[name](model, torch.ones(2, 3), schedule, ts, generator=seeds(0, 1))
    assert not asked and next(states).i == 0 and len(asked) == 1 + (name == "heun")
    rest = list(states)
    assert [(s.i, s.t) for s in rest] == list(enumerate(ts.tolist()))[1:]
    visits = ts.tolist() if name != "heun" else [ts[0].item(), *ts[1:].repeat_interleave(2).tolist()]
    kind = torch.int64 if spacing == "trailing" else torch.float32
    assert [(d, shape) for d, shape, _ in asked] == [(kind, (2,))] * len(visits)
    assert [t for *_, t in asked] == pytest.approx(visits, abs=1e-4)
    assert len(inspect.getsource(SAMPLERS[name]).splitlines()) <= 40
    assert all(type(s.t) is (int if spacing == "trailing" else float) for s in rest)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_seed_one_picture(name):
    "Eight pictures in one batch are bit for bit the eight drawn one by one"
    def draw(*numbers):
        gs = seeds(*numbers)
        x = fresh_noise(torch.empty(len(numbers), 4, 4, 4), gs)
        return list(SAMPLERS[name](net, x, NoiseSchedule(), timesteps(10), generator=gs))[-1].x
    assert torch.equal(draw(*range(8)), torch.cat([draw(i) for i in range(8)]))
    assert torch.equal(draw(*range(8)), draw(*range(7, -1, -1)).flip(0))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("n", [1, 1000])
def test_one_step_and_a_thousand(name, n):
    "One step gives the clean estimate, a thousand arrive where the perfect answer leads"
    schedule, x = NoiseSchedule(), start((2, 3))
    model = lambda x, t: schedule.sqrt_one_minus_abar(t, x) * x  # perfect for data from N(0, 1)
    states = list(SAMPLERS[name](model, x, schedule, timesteps(n), generator=seeds(0, 1)))
    assert len(states) == n and all(s.x.isfinite().all() for s in states)
    assert_close(states[-1].x, states[-1].x0)
    if n == 1000 and name not in CHANCE: assert_close(states[-1].x, x, rtol=0.01, atol=0)  # its flow stands still


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype, level", [(torch.float16, torch.float32), (torch.bfloat16, torch.float32),
                                          (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_keeps_dtype_and_builds_no_graph(name, dtype, level):
    "Half precision stays half, levels keep their digits, and nothing is kept for a backward pass"
    layer, asked, schedule = torch.nn.Linear(4, 4), [], NoiseSchedule()

    def model(x, t):
        asked.append(t.dtype)
        return layer(x.float()).to(x.dtype)
    ts = timesteps(3, spacing="karras", schedule=schedule)
    *_, last = SAMPLERS[name](model, torch.ones(2, 4, dtype=dtype), schedule, ts)
    assert last.x.dtype == dtype and set(asked) == {level}
    assert not last.x.requires_grad and torch.is_grad_enabled()


def test_noise_is_the_same_in_every_dtype_and_fits_the_batch():
    "Noise is drawn in float32 on the CPU and then converted; one generator for all, or as many as pictures"
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        drawn = fresh_noise(torch.empty(2, 3, dtype=dtype), seeds(5, 6))
        assert torch.equal(drawn, fresh_noise(torch.empty(2, 3), seeds(5, 6)).to(dtype))
    one = torch.Generator().manual_seed(5)
    assert torch.equal(fresh_noise(torch.empty(2, 3), one)[:1], fresh_noise(torch.empty(1, 3), seeds(5)))
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"{count} generators do not fit 2 pictures"):
            fresh_noise(torch.empty(2, 3), seeds(*range(count)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_bad_walks(name):
    "Levels that do not lead down, none at all, or an end that cannot be: one line that names it"
    for ts, kwargs, words in (([500, 600], {}, "levels must descend, but 600 follows 500"),
                              ([500, 500], {}, "levels must descend, but 500 follows 500"),
                              ([], {}, "no levels to visit"),
                              ([500], dict(abar_end=1.5), "abar_end must lie above 0 and not above 1, but is 1.5"),
                              ([500], dict(abar_end=math.nan), "but is nan")):
        with pytest.raises(ValueError, match=words):
            next(SAMPLERS[name](net, torch.ones(1, 2), NoiseSchedule(), ts, **kwargs))
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="eta must lie between 0 and 1"):
            next(ddim(net, torch.ones(1, 2), NoiseSchedule(), [500], eta=eta))


@pytest.mark.parametrize("name", SAMPLERS)
def test_last_level_may_be_the_end(name):
    "A walk to level 0 that visits level 0 stands still in its last step, also when the end was rounded to float32"
    schedule, x = NoiseSchedule(), start((2, 3))
    states = list(SAMPLERS[name](net, x, schedule, [500, 0], generator=seeds(0, 1), abar_end=float(schedule.abar[0])))
    if name == "lcm": return  # draws its noise anew
    if name == "unipc": assert not torch.equal(states[1].x, states[0].x)  # corrects the step before
    else: assert_close(states[1].x, states[0].x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-6), (torch.float32, 2**-8)])
def test_finite_under_zero_terminal_snr(name, dtype, tol):
    "From a level without any signal a v network's samples are right; float32 errs by four roundings over 2**-12"
    schedule = NoiseSchedule(rescale_zero_terminal_snr(scaled_linear_betas()))
    mean, std, abar64 = torch.tensor([[0.7, -0.4]], dtype=dtype), 0.5, schedule.abar64.to(dtype)

    def v_network(x, t):  # the perfect answer in terms of v, exact also at abar = 0
        a = abar64[t][:, None]
        v = a * std**2 + 1 - a
        along = std / v.sqrt() if name == "lcm" else a.sqrt() * std**2 / v  # the path's end, or the mean of all ends
        x0 = mean + along * (x - a.sqrt() * mean)
        return target("v", x0, (x - a.sqrt() * x0) / (1 - a).sqrt(), a)
    eps_model = lambda x, t: to_eps("v", v_network(x, t), x, abar64[t][:, None].clamp(min=2**-24))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 2, generator=g).to(dtype)
    states = list(SAMPLERS[name](eps_model, x, schedule, timesteps(50), generator=g))
    right = mean + std * x if name == "lcm" else mean.expand(5000, 2)
    assert_close(states[0].x0, right + 2**-12 * x, atol=tol, rtol=0)  # the floor of abar lets 2**-12 of x through
    assert_close(states[-1].x.mean(0), mean[0], atol=0.03, rtol=0)
    assert_close(states[-1].x.std(0), torch.tensor([std, std], dtype=dtype), atol=0.05, rtol=0)
