"""Samplers: diffusers' numbers step for step, and the right distribution when the denoiser is perfect."""
import inspect
import math
import pytest
import torch
from torch.testing import assert_close
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from sd_nb.diffusion import samplers
from sd_nb.diffusion.noise import NoiseSchedule, rescale_zero_terminal_snr, scaled_linear_betas, timesteps
from sd_nb.diffusion.objective import target, to_eps
from sd_nb.diffusion.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m, fresh_noise, perfect_eps

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
SPACINGS, STEPS = ["trailing", "leading", "linspace"], [5, 20, 50]


def outputs(n, shape=(2, 4, 8, 8), seed=1):
    "Draw one made-up model output for each step"
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for _ in range(n)]


def replay(outs):
    "Turn a list of outputs into a model that hands them out in order"
    left = iter(outs)
    return lambda x, t: next(left).to(x)


def close(ours, theirs, tol):
    "Compare a whole state: the largest difference against the largest number in it"
    worst, scale = (ours - theirs).abs().max().item(), max(1.0, theirs.abs().max().item())
    assert worst <= tol * scale, f"differs by {worst:.2g} where numbers go up to {scale:.2g}"


def assert_same_steps(states, theirs, ts, outs, x, tol=1e-5, noise=None, **kwargs):
    "Drive their scheduler with the same outputs and compare every state"
    for i, (t, out) in enumerate(zip(ts, outs, strict=True)):
        state = next(states)
        if noise is not None: kwargs["variance_noise"] = fresh_noise(x, noise)
        step = theirs.step(out.to(x), int(t), x, **kwargs)
        x = step.prev_sample
        assert (state.i, state.t) == (i, int(t))
        close(state.x, x, tol)
        if "pred_original_sample" in step: close(state.x0, step.pred_original_sample, tol)
    assert next(states, None) is None


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_equals_diffusers(n, spacing):
    "ddpm is DDPMScheduler (fixed_small), step for step, drawing the same noise from the same generator"
    ts, outs, (x,) = timesteps(n, spacing=spacing), outputs(n), outputs(1, seed=2)
    theirs = DDPMScheduler(**SD, clip_sample=False, timestep_spacing=spacing, steps_offset=1)
    theirs.set_timesteps(n)
    ours = ddpm(replay(outs), x, NoiseSchedule(), ts, generator=torch.Generator().manual_seed(3))
    assert_same_steps(ours, theirs, theirs.timesteps, outs, x, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS[:2])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_ddim_equals_diffusers(n, spacing, eta, to_one, dtype, tol):
    "ddim is DDIMScheduler at every eta and both ends, step for step; in float64 to nine digits"
    schedule, ts, outs, x = NoiseSchedule(), timesteps(n, spacing=spacing), outputs(n), outputs(1, seed=2)[0].to(dtype)
    theirs = DDIMScheduler(**SD, clip_sample=False, timestep_spacing=spacing, steps_offset=1, set_alpha_to_one=to_one)
    theirs.set_timesteps(n)
    if dtype == torch.float64:  # their table is float32: give them ours, and only the algorithm is compared
        theirs.alphas_cumprod = schedule.abar64
        if not to_one: theirs.final_alpha_cumprod = schedule.abar64[0]
    ours = ddim(replay(outs), x, schedule, ts, eta=eta, abar_end=None if to_one else schedule.abar64[0],
                generator=torch.Generator().manual_seed(3))
    noise = torch.Generator().manual_seed(3) if eta else None
    assert_same_steps(ours, theirs, theirs.timesteps, outs, x, tol, noise, eta=eta)


def test_ddim_follows_the_list_where_diffusers_does_not():
    "With uneven spacing ours steps to the next level of the list (DDIM section 4.2), diffusers to t - T // n"
    schedule, ts, outs, (x,) = NoiseSchedule(), timesteps(5, spacing="linspace"), outputs(2), outputs(1, seed=2)
    theirs = DDIMScheduler(**SD, clip_sample=False, timestep_spacing="linspace")
    theirs.set_timesteps(5)
    ours = next(ddim(replay(outs), x, schedule, ts))
    listed = next(ddim(replay(outs), x, schedule, [999, int(ts[1])]))
    elsewhere = next(ddim(replay(outs), x, schedule, [999, 999 - 200]))
    assert ts[1] == 749
    assert_close(ours.x, listed.x)
    assert_close(theirs.step(outs[0], 999, x).prev_sample, elsewhere.x, rtol=1e-5, atol=1e-5)
    assert (ours.x - elsewhere.x).abs().max() > 0.01


def multistep(**kwargs):
    "Build diffusers' DPM-Solver++ (2M) as Stable Diffusion uses it"
    kwargs |= dict(algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", use_karras_sigmas=False)
    return DPMSolverMultistepScheduler(**SD, lower_order_final=True, final_sigmas_type="zero", **kwargs)


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_dpmpp_2m_equals_diffusers(n, spacing, whose):
    "dpmpp_2m is DPMSolverMultistepScheduler on DDIM's levels and on that scheduler's own, step for step"
    theirs, outs, (x,) = multistep(timestep_spacing=spacing, steps_offset=1), outputs(n), outputs(1, seed=2)
    if whose == "theirs": theirs.set_timesteps(n)
    else: theirs.set_timesteps(timesteps=timesteps(n, spacing=spacing).tolist())
    ts = theirs.timesteps
    assert_same_steps(dpmpp_2m(replay(outs), x, NoiseSchedule(), ts), theirs, ts, outs, x)


@pytest.mark.parametrize("t, t_next", [(999, 799), (500, 499), (21, 1), (1, 0)])
def test_ddim_at_eta_1_has_the_ddpm_variance(t, t_next):
    "One DDIM step at eta 1 is DDPM's posterior: same mean, and variance beta_tilde (DDPM eq. 7)"
    schedule, (eps, x) = NoiseSchedule(), outputs(2, (1, 1000))
    a, b = schedule.abar64[t], schedule.abar64[t_next]
    beta_tilde = (1 - b) / (1 - a) * (1 - a / b)

    def step(sampler, seed, **kwargs):
        kwargs["generator"] = torch.Generator().manual_seed(seed)
        return next(sampler(lambda x, t: eps, x, schedule, [t, t_next], **kwargs)).x
    for seed in (0, 1): assert_close(step(ddim, seed, eta=1.0), step(ddpm, seed), rtol=1e-5, atol=1e-5)
    drawn = fresh_noise(x, torch.Generator().manual_seed(0)) - fresh_noise(x, torch.Generator().manual_seed(1))
    spread = (step(ddim, 0, eta=1.0) - step(ddim, 1, eta=1.0)).double()
    std = (spread * drawn).sum() / drawn.double().square().sum()  # what the drawn noise was multiplied with
    assert_close(std**2, beta_tilde, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name, kwargs, n, tol", [("ddim", {}, 200, 0.01), ("dpmpp_2m", {}, 100, 0.01),
                                                  ("ddim", dict(eta=1.0), 400, 0.02), ("ddpm", {}, 400, 0.02)])
def test_perfect_gaussian(name, kwargs, n, tol):
    "With the perfect denoiser of a Gaussian every sampler ends in its mean and covariance"
    schedule, mean, std = NoiseSchedule(), torch.tensor([[0.7, -0.4]], dtype=torch.float64), 0.5
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 10_000, 2, generator=g, dtype=torch.float64)
    x = schedule.add_noise(mean + std * x0, noise, torch.full((10_000,), 999))  # SD's last level is not pure noise
    *_, last = SAMPLERS[name](perfect_eps(schedule, mean, std), x, schedule, timesteps(n), generator=g, **kwargs)
    assert_close(last.x.mean(0), mean[0], atol=tol, rtol=0)
    assert_close(last.x.T.cov(), std**2 * torch.eye(2, dtype=torch.float64), atol=tol, rtol=0)


@pytest.mark.parametrize("name, order", [("ddim", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence(name, order):
    "Twice the steps, half the error for DDIM and a quarter for DPM-Solver++ 2M (steps uniform in log-SNR)"
    lam, mean, std, n_levels = (-5.0, 5.0), torch.tensor([[0.7, -0.4]], dtype=torch.float64), 0.5, 1281
    half_log_snr = torch.linspace(lam[1], lam[0], n_levels, dtype=torch.float64)  # level 0 is the cleanest
    abar = torch.sigmoid(2 * half_log_snr)
    schedule = NoiseSchedule(1 - torch.cat([abar[:1], abar[1:] / abar[:-1]]))
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a0, a1 = schedule.abar64[0], schedule.abar64[-1]
    fixed = (x - a1.sqrt() * mean) / (a1 * std**2 + 1 - a1).sqrt()
    right = a0.sqrt() * mean + (a0 * std**2 + 1 - a0).sqrt() * fixed  # where the flow is at level 0
    errors = []
    for n in (40, 80, 160):
        ts = torch.arange(n, -1, -1) * ((n_levels - 1) // n)
        states = list(SAMPLERS[name](perfect_eps(schedule, mean, std), x, schedule, ts))
        errors.append((states[-2].x - right).abs().mean().item())     # before the last jump to a clean picture
    slopes = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert all(abs(s - order) < 0.15 * order for s in slopes), (errors, slopes)


def test_finite_under_zero_terminal_snr():
    "Starting from a level without any signal, a v network's samples are right"
    schedule = NoiseSchedule(rescale_zero_terminal_snr(scaled_linear_betas()))
    mean, std = torch.tensor([[0.7, -0.4]]), 0.5

    def v_network(x, t):  # the perfect answer in terms of v, exact also at abar = 0
        a = schedule.abar64[t].float()[:, None]
        x0 = mean + a.sqrt() * std**2 * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)
        return target("v", x0, (x - a.sqrt() * x0) / (1 - a).sqrt(), a)

    def eps_model(x, t): return to_eps("v", v_network(x, t), x, schedule.abar[t][:, None].clamp(min=2**-24))
    for sampler in SAMPLERS.values():
        g = torch.Generator().manual_seed(0)
        states = list(sampler(eps_model, torch.randn(5000, 2, generator=g), schedule, timesteps(50), generator=g))
        assert_close(states[0].x0, mean.expand(5000, 2), atol=3e-3, rtol=0)
        assert_close(states[-1].x.mean(0), mean[0], atol=0.03, rtol=0)
        assert_close(states[-1].x.std(0), torch.tensor([std, std]), atol=0.05, rtol=0)


def test_perfect_eps_is_the_best_answer():
    "The closed form is the conditional mean of the noise: no linear change of it, mode by mode, does better"
    schedule, means, std = NoiseSchedule(), torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=torch.float64), 0.3
    g = torch.Generator().manual_seed(0)
    n = 40_000
    x0 = means[torch.randint(2, (n,), generator=g)] + std * torch.randn(n, 2, generator=g, dtype=torch.float64)
    noise, t = torch.randn(n, 2, generator=g, dtype=torch.float64), torch.full((n,), 400)
    x = schedule.add_noise(x0, noise, t)
    error = noise - perfect_eps(schedule, means, std)(x, t)
    for probe in (torch.ones_like(x), x, x.sin(), x.flip(-1)):  # the error of a conditional mean is orthogonal to all
        assert (error * probe).mean(0).abs().max() < 0.015


@pytest.mark.parametrize("name", SAMPLERS)
def test_contract(name):
    "Each sampler is a generator over levels, asks once a step with int64 levels, and is at most 40 lines long"
    asked, (x,) = [], outputs(1)

    def model(x, t):
        asked.append((t.dtype, tuple(t.shape), int(t[0])))
        return torch.zeros_like(x)
    walk = SAMPLERS[name](model, x, NoiseSchedule(), timesteps(7), generator=torch.Generator().manual_seed(0))
    assert not asked and next(walk).i == 0 and len(asked) == 1
    assert len(list(walk)) == 6
    assert asked == [(torch.int64, (2,), int(t)) for t in timesteps(7)]
    assert len(inspect.getsource(getattr(samplers, name)).splitlines()) <= 40


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_seed_one_picture(name):
    "A picture with its own generator does not depend on its batch, and one step is enough to get one"
    model, schedule = (lambda x, t: 0.1 * x), NoiseSchedule()

    def draw(seeds):
        gs = [torch.Generator().manual_seed(s) for s in seeds]
        x = fresh_noise(torch.empty(len(seeds), 4, 2, 2), gs)
        return list(SAMPLERS[name](model, x, schedule, timesteps(10), generator=gs))[-1].x
    assert_close(draw([5, 6, 7])[1:2], draw([6]), rtol=0, atol=0)
    (state,) = SAMPLERS[name](model, torch.ones(1, 2), schedule, timesteps(1))
    assert_close(state.x, state.x0)
    assert state.x.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_keeps_dtype_and_builds_no_graph(name):
    "Half precision stays half, and nothing is kept for a backward pass"
    net = torch.nn.Linear(4, 4)
    x = torch.ones(2, 4).half()
    *_, last = SAMPLERS[name](lambda x, t: net(x.float()).to(x.dtype), x, NoiseSchedule(), timesteps(3))
    assert last.x.dtype == torch.float16 and not last.x.requires_grad and torch.is_grad_enabled()
