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
from sd_nb.diffusion.objective import KINDS, target, to_eps
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
CASES = [(name, spacing, kind) for name, (_, _, spacings) in THEIRS.items() for spacing in spacings for kind in KINDS
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
    if spacing in OPTIONS: return timesteps(n, spacing="karras" if spacing == "karras" else "log_snr", schedule=NoiseSchedule())
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


def assert_same_walk(name, theirs, ts, kind="eps", tol=1e-5, only=None, **kwargs):
    "Run ours, replay the outputs in theirs: it must ask about the same inputs and go through the same states"
    schedule, x = NoiseSchedule(), start()
    eps_model, calls = recorder(kind, schedule)
    states = list(SAMPLERS[name](eps_model, x, schedule, ts, generator=seeds(3, 4), **kwargs))
    s, still, last = sigmas(ts, kwargs.get("abar_end")), name in STILL, len(ts) - 1
    assert [state.i for state in states] == list(range(len(ts)))
    if still: x = x * math.sqrt(1 + s[0]**2)
    options = dict(eta=kwargs["eta"]) if "eta" in kwargs else {}
    for j, ((seen, t, out), their_t) in enumerate(zip(calls, theirs.timesteps, strict=True)):
        close(seen, theirs.scale_model_input(x, their_t), tol, f"input of call {j}")
        step = theirs.step(out, their_t if still else int(their_t), x, **options)
        x, i = step.prev_sample, j // 2 if name == "heun" else j
        if name == "heun" and j % 2 == 0 and i < last or only is not None and i not in only: continue  # within a step
        ours = states[i].x * math.sqrt(1 + s[i + 1]**2) if still else states[i].x
        close(ours, x, tol, f"state {i}")
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
