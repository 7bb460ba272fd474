"""Classifier-free guidance: one call, the right mix, and nothing extra at guidance 1."""
import math
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from sd_nb.diffusion.guidance import guided
from sd_nb.diffusion.noise import NoiseSchedule, spread, timesteps
from sd_nb.diffusion.objective import to_eps
from sd_nb.diffusion.samplers import ddim, perfect_eps


class Network:
    "A small nonlinear network that remembers how it was called"
    def __init__(self): self.batches = []

    def __call__(self, x, t, context):
        self.batches.append((len(x), len(t), len(context)))
        return x.sin() + spread(t / 1000, x) * spread(context.mean((1, 2)), x)


def inputs(b=3, seed=0):
    "Draw x, t, prompts and the empty prompt"
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(b, 4, 2, 2, generator=g), torch.randint(1000, (b,), generator=g),
            torch.randn(b, 5, 6, generator=g), torch.randn(1, 5, 6, generator=g))


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_guidance_1_is_the_conditional_model(kind):
    "At guidance 1 the network is called once, with the batch as it is, and the empty prompt is not even read"
    x, t, context, _ = inputs()
    network, schedule = Network(), NoiseSchedule()
    out = guided(network, context, None, 1, kind, schedule)(x, t)
    assert network.batches == [(3, 3, 3)]
    assert_close(out, to_eps(kind, Network()(x, t, context), x, spread(schedule.abar[t], x)))


@settings(max_examples=30, deadline=None)
@given(guidance=st.floats(-5, 20), kind=st.sampled_from(["eps", "v", "x0"]), seed=st.integers(0, 1000))
def test_guidance_is_the_line_through_two_answers(guidance, kind, seed):
    "One batched call gives what two calls give: uncond + guidance * (cond - uncond), in any parametrisation"
    x, t, context, uncond = inputs(seed=seed)
    network, schedule = Network(), NoiseSchedule()
    out = guided(network, context, uncond, guidance, kind, schedule)(x, t)
    assert len(network.batches) == 1
    a = spread(schedule.abar[t], x)
    yes, no = (to_eps(kind, Network()(x, t, c), x, a) for c in (context, uncond.expand_as(context)))
    assert_close(out, no + guidance * (yes - no), rtol=1e-3, atol=1e-3 * max(1, abs(guidance)))


def test_guidance_0_is_the_unconditional_model():
    "At guidance 0 the prompt has no say; the same words on both sides cancel at any guidance"
    x, t, context, uncond = inputs()
    assert_close(guided(Network(), context, uncond, 0)(x, t), Network()(x, t, uncond.expand_as(context)))
    assert_close(guided(Network(), context, context, 9)(x, t), Network()(x, t, context))


@pytest.mark.parametrize("guidance", [math.nan, math.inf])
def test_refuses_guidance_that_is_no_number(guidance):
    "NaN and infinity are refused with the value in the message"
    _, _, context, uncond = inputs()
    with pytest.raises(ValueError, match="guidance must be a finite number, not (nan|inf)"):
        guided(Network(), context, uncond, guidance)


def test_refuses_missing_parts():
    "Guidance without an empty prompt, or a v network without its schedule, is refused at once"
    _, _, context, uncond = inputs()
    with pytest.raises(ValueError, match="3 needs an encoded empty prompt"): guided(Network(), context, None, 3)
    with pytest.raises(ValueError, match="'v' needs its schedule"): guided(Network(), context, uncond, 3, "v")
    with pytest.raises(ValueError, match="unknown prediction kind"): guided(Network(), context, uncond, 3, "velocity")


def test_guidance_draws_to_the_named_mode():
    "On a mixture the weights are the prompt: guidance 1 lands in the named mode, more of it further from the others"
    schedule = NoiseSchedule()
    means, x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    model, prompt = perfect_eps(schedule, means, 0.3), torch.tensor([[1.0, 0.0]]).expand(500, 2)
    networks = [guided(model, prompt, torch.tensor([[0.5, 0.5]]), w) for w in (0, 1, 4)]
    ends = [list(ddim(network, x, schedule, timesteps(50)))[-1].x[:, 0].mean() for network in networks]
    assert abs(ends[0]) < 0.1 and abs(ends[1] - 1) < 0.1 and ends[2] > ends[1] + 0.05
