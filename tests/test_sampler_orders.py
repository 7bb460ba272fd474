"""Samplers with a perfect denoiser: each converges at its order, and each with chance to the right distribution."""
import math
import pytest
import torch
from diffusers import HeunDiscreteScheduler
from sd_nb.diffusion import samplers, walk
from sd_nb.diffusion.noise import NoiseSchedule, cosine_betas, flow_betas, linear_betas, sigmoid_betas, timesteps
from sd_nb.diffusion.samplers import SAMPLERS
from sd_nb.diffusion.walk import perfect_eps

SCHEDULE = NoiseSchedule()
MEANS, STD = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]], dtype=torch.float64), 0.5
HIGH, LOW = SCHEDULE.log_snr64[[-1, 0]].tolist()  # log-SNR of the last and of the first level
X = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).double()
CHANCE = [("ddpm", {}), ("ddim", dict(eta=0.5)), ("ddim", dict(eta=1.0)), ("euler_ancestral", {}), ("dpmpp_2m_sde", {})]


def slope(y, lam):
    "dy/dlambda of the mixture's flow, written down without the package: -sigma times the expected noise"
    s2 = math.exp(-2 * lam)
    away = y[:, None] - MEANS
    weights = (-away.square().sum(-1) / (2 * (STD**2 + s2))).softmax(-1)
    return -s2 * (weights[..., None] * away).sum(1) / (STD**2 + s2)


@pytest.fixture(scope="module")
def right():
    "Where the flow leads from X at the last level to level 0: classical Runge-Kutta, good to 1e-10"
    def solve(n):
        y, h = X * math.sqrt(1 + math.exp(-HIGH)), (LOW - HIGH) / 2 / n
        for lam in (HIGH / 2 + h * i for i in range(n)):
            a = slope(y, lam)
            b = slope(y + h / 2 * a, lam + h / 2)
            c = slope(y + h / 2 * b, lam + h / 2)
            y = y + h / 6 * (a + 2 * b + 2 * c + slope(y + h * c, lam + h))
        return y / math.sqrt(1 + math.exp(-LOW))
    fine = solve(2000)
    assert (fine - solve(1000)).abs().max() < 1e-10
    return fine


@pytest.mark.parametrize("name, order", [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3)])
def test_fault_30_order_of_convergence(name, order, right):
    "Twice the steps, 2**order times less error at level 0, in steps even in log-SNR; UniPC-2 is of third order"
    errors = []
    for n in (40, 80, 160):
        ts = SCHEDULE.t_of_log_snr(torch.linspace(HIGH, LOW, n + 1, dtype=torch.float64))
        *_, at_0, _ = SAMPLERS[name](perfect_eps(SCHEDULE, MEANS, STD), X, SCHEDULE, ts)  # the last jumps to sigma 0
        errors.append((at_0.x - right).norm(dim=1).mean().item())
    slopes = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert all(abs(s - order) < 0.05 * order for s in slopes), (errors, slopes)


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m", "unipc"])
def test_order_holds_with_an_end(name, right):
    "The same place is reached when level 0 is not visited but set as the end"
    ts = SCHEDULE.t_of_log_snr(torch.linspace(HIGH, LOW, 321, dtype=torch.float64))[:-1]
    *_, last = SAMPLERS[name](perfect_eps(SCHEDULE, MEANS, STD), X, SCHEDULE, ts, abar_end=SCHEDULE.abar64[0])
    bound = dict(heun=1e-4, dpmpp_2m=1e-4, unipc=2e-6).get(name, 1e-2)
    assert (last.x - right).norm(dim=1).mean() < bound


ANGLE, SPREADS = 0.6, torch.tensor([0.3, 1.2], dtype=torch.float64)  # a tilted ellipse
TURN = torch.tensor([[math.cos(ANGLE), -math.sin(ANGLE)], [math.sin(ANGLE), math.cos(ANGLE)]], dtype=torch.float64)
MEAN, COV = torch.tensor([0.7, -0.4], dtype=torch.float64), TURN @ torch.diag(SPREADS**2) @ TURN.T


def gaussian(jump=False):
    "The perfect eps_model for N(MEAN, COV); with jump that of a network that knows where its path ends"
    def eps_model(x, t):
        signal, sigma = SCHEDULE.sqrt_abar(t, x), SCHEDULE.sqrt_one_minus_abar(t, x)
        away = (x - signal * MEAN) @ TURN                                    # along the axes of the ellipse
        total = (signal * SPREADS)**2 + sigma**2
        if not jump: return (sigma * away / total) @ TURN.T
        return (x - signal * (MEAN + (SPREADS / total.sqrt() * away) @ TURN.T)) / sigma
    return eps_model


@pytest.mark.parametrize("name, kwargs, n", [
    *((name, kwargs, 250) for name, kwargs in CHANCE[:-1]), ("ddim", {}, 250), ("euler", {}, 250), ("lcm", {}, 4),
    *((name, {}, 60) for name in ("heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"))])
def test_mean_and_covariance(name, kwargs, n):
    "20,000 samples have the right mean and covariance: within 4 standard errors, and 1.5 % for the step size"
    g, count = torch.Generator().manual_seed(0), 20_000
    x0, noise = torch.randn(2, count, 2, generator=g, dtype=torch.float64)
    x = SCHEDULE.add_noise(MEAN + x0 * SPREADS @ TURN.T, noise, torch.full((count,), 999))  # not pure noise in SD
    *_, last = SAMPLERS[name](gaussian(name == "lcm"), x, SCHEDULE, timesteps(n), generator=g, **kwargs)
    variances = COV.diag()
    assert ((last.x.mean(0) - MEAN).abs() < 4 * (variances / count).sqrt() + 0.015).all()
    errors = ((variances.outer(variances) + COV**2) / count).sqrt()  # of the entries of a measured covariance
    assert ((last.x.T.cov() - COV).abs() < 4 * errors + 0.015 * variances.max()).all()


@pytest.mark.parametrize("name, kwargs, order", [(*case, 1) for case in CHANCE[:-1]] + [(*CHANCE[-1], 2)])
def test_exact_variance(name, kwargs, order, monkeypatch):
    "Steps are linear for a Gaussian, so unit pulses of noise give the variance without dice: it is right at its order"
    def variance(n):
        pulses = iter(torch.eye(n + 2, dtype=torch.float64)[2:, :, None])  # row 0: nothing, row 1: x, row 2 + i: dice i
        for module in (walk, samplers): monkeypatch.setattr(module, "fresh_noise", lambda x, g: next(pulses))
        x, schedule = torch.zeros(n + 2, 1, dtype=torch.float64), SCHEDULE
        x[1] = 1
        ts = schedule.t_of_log_snr(torch.linspace(HIGH, LOW, n + 1, dtype=torch.float64))
        model = perfect_eps(schedule, torch.zeros(1, 1), STD)
        *_, at_0, _ = SAMPLERS[name](model, x, schedule, ts, **kwargs)
        there, before = (SCHEDULE.abar64[i] * STD**2 + 1 - SCHEDULE.abar64[i] for i in (0, -1))
        assert at_0.x[0] == 0
        return (at_0.x[1]**2 * before + at_0.x[2:].square().sum() - there).abs().item()
    errors = [variance(n) for n in (80, 160, 320)]
    slopes = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert all(abs(s - order) < 0.05 * order for s in slopes), (errors, slopes)


def ends(name, betas, spacing):
    "Mean and standard deviation of 5000 samples of N([0.7, -0.4], 0.25) after 50 steps"
    schedule, g = NoiseSchedule(betas()), torch.Generator().manual_seed(0)
    x, model = torch.randn(5000, 2, generator=g), perfect_eps(schedule, torch.tensor([[0.7, -0.4]]), 0.5)
    *_, last = SAMPLERS[name](model, x, schedule, timesteps(50, spacing=spacing, schedule=schedule), generator=g)
    return last.x.mean(0), last.x.std(0)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "lcm"])
@pytest.mark.parametrize("betas", [linear_betas, cosine_betas, sigmoid_betas, flow_betas])
def test_every_schedule(name, betas):
    "In float32, 50 steps even in log-SNR end right on every schedule, also from levels without any signal"
    mean, std = ends(name, betas, "log_snr")
    assert (mean - torch.tensor([0.7, -0.4])).abs().max() < 0.02
    assert -0.08 < (std - 0.5).min() and (std - 0.5).max() < 0.02  # the first-order ones end too narrow


@pytest.mark.parametrize("spacing", ["trailing", "karras", "log_snr"])
@pytest.mark.parametrize("betas", [cosine_betas, flow_betas])
def test_heun_from_pure_noise(betas, spacing):
    "Heun leaves pure noise by Euler's step, which asks once"
    mean, schedule = torch.tensor([0.7, -0.4]), NoiseSchedule(betas())
    assert (ends("heun", betas, spacing)[0] - mean).abs().max() < 0.02
    asked, ts = [], timesteps(50, spacing=spacing, schedule=schedule)
    list(samplers.heun(lambda x, t: asked.append(t[0].item()) or x, torch.ones(1, 2), schedule, ts))
    assert asked == pytest.approx([ts[0].item(), ts[1].item(), *ts[2:].repeat_interleave(2).tolist()])


@pytest.mark.parametrize("betas", [cosine_betas, flow_betas])
def test_heun_of_diffusers_loses_the_mean(betas):
    "Theirs averages the slopes at sigma 4096 and at the next level, as the paper writes it for finite sigma"
    mean, schedule = torch.tensor([0.7, -0.4]), NoiseSchedule(betas())
    theirs, ts = HeunDiscreteScheduler(trained_betas=[0.5]), timesteps(50)
    s = torch.tensor([(1 / schedule.level(t) - 1)**0.5 for t in ts.tolist()] + [0.0])
    theirs.sigmas = torch.cat([s[:1], s[1:-1].repeat_interleave(2), s[-1:]])
    theirs.timesteps, theirs._step_index = torch.cat([ts[:1], ts[1:].repeat_interleave(2)]), 0
    eps, y = perfect_eps(schedule, mean[None], 0.5), torch.randn(5000, 2, generator=torch.Generator().manual_seed(0)) * s[0]
    for t in theirs.timesteps:
        scaled = y / (1 + theirs.sigmas[theirs._step_index]**2)**0.5
        y = theirs.step(eps(scaled, t.expand(len(y))), t, y).prev_sample
    assert (y.mean(0) - mean).abs().max() > 0.2


def test_perfect_eps_is_the_best_answer():
    "The closed form is the conditional mean of the noise: its error is orthogonal to whatever is made of x"
    g, n = torch.Generator().manual_seed(0), 40_000
    x0 = MEANS[torch.randint(3, (n,), generator=g)] + STD * torch.randn(n, 2, generator=g, dtype=torch.float64)
    noise = torch.randn(n, 2, generator=g, dtype=torch.float64)
    for t in (torch.full((n,), 400), torch.full((n,), 400.5).double()):
        x = SCHEDULE.add_noise(x0, noise, t)
        error = noise - perfect_eps(SCHEDULE, MEANS, STD)(x, t)
        for probe in (torch.ones_like(x), x, x.sin(), x.flip(-1)):
            assert (error * probe).mean(0).abs().max() < 0.015
