"""Classifier-free guidance: one call, the right mix, and nothing extra at guidance 1."""
import math
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from diffusers import DDPMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from sd_nb.diffusion.guidance import dynamic_threshold, guided, rescale_deviation, within_interval
from sd_nb.diffusion.noise import NoiseSchedule, rescale_zero_terminal_snr, scaled_linear_betas, spread, timesteps
from sd_nb.diffusion.objective import KINDS, model_input, target, to_eps, to_x0
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


def meaning(kind, network, x, t, context, schedule):
    "The noise that one answer of the network means"
    a = spread(schedule.abar_at(t, x.dtype), x).clamp(min=2**-24)
    return to_eps(kind, network(model_input(kind, x, a), t, context), x, a)


@pytest.mark.parametrize("kind", KINDS)
def test_fault_30_guidance_1_is_the_conditional_model(kind):
    "At guidance 1 the network is called once, with the batch as it is, and the empty prompt is not even read"
    x, t, context, _ = inputs()
    network, schedule = Network(), NoiseSchedule()
    out = guided(network, context, None, 1, kind, schedule)(x, t)
    assert network.batches == [(3, 3, 3)]
    assert_close(out, meaning(kind, Network(), x, t, context, schedule))


@settings(max_examples=30, deadline=None)
@given(guidance=st.floats(-5, 20), kind=st.sampled_from(KINDS), seed=st.integers(0, 1000))
def test_guidance_is_the_line_through_two_answers(guidance, kind, seed):
    "One batched call gives what two calls give: uncond + guidance * (cond - uncond), in any parametrisation"
    x, t, context, uncond = inputs(seed=seed)
    network, schedule = Network(), NoiseSchedule()
    out = guided(network, context, uncond, guidance, kind, schedule)(x, t)
    assert len(network.batches) == 1
    yes, no = (meaning(kind, Network(), x, t, c, schedule) for c in (context, uncond.expand_as(context)))
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


OPTIONS = [dict(), dict(rescale=0.7), dict(interval=(0.5, 3)), dict(threshold=0.9),
           dict(rescale=0.5, interval=(0.5, 3), threshold=0.9)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("kind", KINDS)
def test_batch_1_x_8_is_batch_8_x_1(kind, options):
    "Eight pictures at once, at levels of their own, get what each gets alone"
    (x, t, context, uncond), schedule = inputs(8), NoiseSchedule()
    at_once = guided(Network(), context, uncond, 5, kind, schedule, **options)(x, t)
    alone = [guided(Network(), context[i:i + 1], uncond, 5, kind, schedule, **options)(x[i:i + 1], t[i:i + 1])
             for i in range(8)]
    assert_close(at_once, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_levels_between_levels(kind):
    "Whole levels as floats give what they give as integers; a level between two reads the schedule there"
    (x, t, context, uncond), schedule = inputs(), NoiseSchedule()
    eps_model = guided(Network(), context, uncond, 5, kind, schedule, rescale=0.7, interval=(0.1, 9), threshold=0.9)
    assert_close(eps_model(x, t.float()), eps_model(x, t), rtol=1e-3, atol=1e-4)
    x, context, between = x.double(), context.double(), torch.tensor([0.3, 500.5, 998.7], dtype=torch.float64)
    assert_close(guided(Network(), context, None, 1, kind, schedule)(x, between),
                 meaning(kind, Network(), x, between, context, schedule))


@settings(max_examples=40, deadline=None)
@given(phi=st.floats(0, 1), seed=st.integers(0, 1000))
def test_rescale_equals_diffusers(phi, seed):
    "rescale_noise_cfg of diffusers' Stable Diffusion pipeline, and guided applies it to what the network said"
    x, t, context, uncond = inputs(seed=seed)
    yes, no = (Network()(x, t, c) for c in (context, uncond.expand_as(context)))
    expected = rescale_noise_cfg(no + 7.5 * (yes - no), yes, phi)
    assert_close(rescale_deviation(no + 7.5 * (yes - no), yes, phi), expected, rtol=1e-4, atol=1e-5)
    assert_close(guided(Network(), context, uncond, 7.5, rescale=phi)(x, t), expected, rtol=1e-4, atol=1e-5)
    v = guided(Network(), context, uncond, 7.5, "v", NoiseSchedule(), rescale=phi)(x, t)
    assert_close(v, to_eps("v", expected, x, spread(NoiseSchedule().abar[t], x)), rtol=1e-4, atol=1e-4)


def test_rescale_without_deviation():
    "A constant answer has nothing to scale and gives no NaN; a constant answer with words flattens the other"
    flat, waves = torch.full((1, 2, 2), 3.0), torch.tensor([[[1.0, -1.0], [1.0, -1.0]]])
    assert not rescale_noise_cfg(flat, waves, 0.7).isfinite().any() and rescale_noise_cfg(flat, flat, 0.7).isnan().all()
    assert rescale_deviation(flat, waves, 0.7).equal(flat) and rescale_deviation(flat, flat, 1.0).equal(flat)
    assert_close(rescale_deviation(waves, flat, 0.7), 0.3 * waves)
    assert rescale_deviation(torch.ones(2, 1), torch.ones(2, 1), 1.0).isfinite().all()  # one value: no deviation


def test_fault_30_interval_asks_once_and_only_inside():
    "Outside (low, high] one row a picture and the prompt as it is; inside two rows; at guidance 1 always one"
    (x, _, context, uncond), schedule, network = inputs(), NoiseSchedule(), Network()
    sigma = ((1 - schedule.abar64) / schedule.abar64).sqrt()
    low, high = sigma[200].item() + 1e-9, sigma[600].item() + 1e-6
    eps_model = guided(network, context, uncond, 5, schedule=schedule, interval=(low, high))
    always = guided(Network(), context, uncond, 5)
    for level, inside in [(0, 0), (200, 0), (201, 1), (600, 1), (601, 0), (999, 0)]:
        t = torch.full((3,), level)
        out = eps_model(x, t)
        assert network.batches.pop() == ((6, 6, 6) if inside else (3, 3, 3)) and not network.batches
        assert_close(out, always(x, t) if inside else Network()(x, t, context))
    t = torch.tensor([100, 400, 800])                                            # one batch, both sides
    assert_close(eps_model(x, t)[[1]], always(x, t)[[1]])
    assert_close(eps_model(x, t)[[0, 2]], Network()(x, t, context)[[0, 2]])
    assert network.batches == [(4, 4, 4)] * 2
    guided(network, context, None, 1, schedule=schedule, interval=(low, high))(x, t)
    assert network.batches[-1] == (3, 3, 3)


def test_interval_is_open_below_and_closed_above():
    "low < sigma <= high, as in Kynkäänniemi's eq. 6"
    t, schedule = torch.tensor([200.0, 200.5, 600.0, 600.5], dtype=torch.float64), NoiseSchedule()
    sigma = (-schedule.log_snr(t) / 2).exp().tolist()
    assert within_interval(schedule, t, sigma[0], sigma[2]).tolist() == [False, True, True, False]


def test_interval_halves_the_rows():
    "Over a whole sampling run the rows that the network sees are counted"
    (x, _, context, uncond), schedule, network = inputs(2), NoiseSchedule(), Network()
    ts = timesteps(20)
    inside = within_interval(schedule, ts, 0.28, 5.42)
    list(ddim(guided(network, context, uncond, 5, schedule=schedule, interval=(0.28, 5.42)), x, schedule, ts))
    assert [rows for rows, _, _ in network.batches] == [4 if i else 2 for i in inside] and 0 < inside.sum() < 20
    sigma = ((1 - schedule.abar64[ts]) / schedule.abar64[ts]).sqrt()
    assert inside.equal((sigma > 0.28) & (sigma <= 5.42))


@pytest.mark.parametrize("p", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_threshold_equals_diffusers(p):
    "diffusers' _threshold_sample, with its limit on s out of the way; pictures inside [-1, 1] stay as they are"
    theirs = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=p, sample_max_value=1e9)
    x0 = 2 * torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert_close(dynamic_threshold(x0, p), theirs._threshold_sample(x0))
    assert (x0 / 10).abs().max() < 1 and dynamic_threshold(x0 / 10, p).equal(x0 / 10)
    assert dynamic_threshold(x0.half(), p).dtype == torch.float16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero", [False, True])
def test_threshold_bounds_what_samplers_see(kind, zero):
    "The clean picture that a sampler works out is the thresholded one, whatever the network speaks; never by default"
    schedule = NoiseSchedule(rescale_zero_terminal_snr(scaled_linear_betas()) if zero else None)
    x, _, context, uncond = inputs()
    x, context, uncond, t = x.double(), context.double(), uncond.double(), torch.tensor([0, 500, 999])
    a = spread(schedule.abar64[t], x).clamp(2**-24, 1 - 2**-24)
    plain = to_x0("eps", guided(Network(), context, uncond, 9, kind, schedule)(x, t), x, a)
    bounded = to_x0("eps", guided(Network(), context, uncond, 9, kind, schedule, threshold=0.9)(x, t), x, a)
    assert plain[1:].abs().max() > 1.5
    assert_close(bounded, dynamic_threshold(plain, 0.9), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays_half(kind):
    "What comes out has the dtype of what went in, and is finite at both ends"
    x, _, context, uncond = (o.half() if o.is_floating_point() else o for o in inputs())
    out = guided(Network(), context, uncond, 5, kind, NoiseSchedule(), rescale=0.7)(x, torch.tensor([0, 500, 999]))
    assert out.isfinite().all() and (kind == "eps" or out.dtype == torch.float16)


def test_kinds_draw_the_same():
    "The perfect network of a mixture, speaking each kind, guides to the same points"
    schedule, means = NoiseSchedule(), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    perfect = perfect_eps(schedule, means, 0.3)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    prompt, uncond = torch.tensor([[1.0, 0.0]]).expand(50, 2), torch.tensor([[0.5, 0.5]])

    def speaking(kind):
        def network(x, t, context):
            a = spread(schedule.abar[t], x)
            x = x * (a.sqrt() + (1 - a).sqrt()) if kind == "flow" else x
            eps = perfect(x, t, context)
            return target(kind, to_x0("eps", eps, x, a), eps, a)
        return guided(network, prompt, uncond, 3, kind, schedule)
    ends = [list(ddim(speaking(kind), x, schedule, timesteps(20)))[-1].x for kind in KINDS]
    for end in ends[1:]: assert_close(end, ends[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options, message", [
    (dict(rescale=1.5), "rescale must lie between 0 and 1, not 1.5"), (dict(rescale=math.nan), "rescale must lie"),
    (dict(interval=(5, 1)), "the lower one first, not \\(5, 1\\)"), (dict(interval=(-1, 1)), "from 0 upwards"),
    (dict(interval=(math.nan, 1)), "two sigmas"), (dict(threshold=0), "threshold must be a quantile"),
    (dict(threshold=2), "threshold must be a quantile between 0 and 1, not 2"),
    (dict(interval=(0, 1), schedule=None), "needs the network's schedule"),
    (dict(threshold=0.9, schedule=None), "needs the network's schedule")])
def test_refuses_impossible_options(options, message):
    "An option out of its range, or without the schedule it needs, is one clear line"
    _, _, context, uncond = inputs()
    with pytest.raises(ValueError, match=message):
        guided(Network(), context, uncond, 3, **dict(schedule=NoiseSchedule()) | options)
