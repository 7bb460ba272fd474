"""The UNet has Stable Diffusion's size, computes what diffusers' computes, and learns."""

import json
from dataclasses import asdict

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.testing import assert_close

from parity import randn, randomise
from sd_nb.interop import UNET_NAMES, rename, save_unet
from sd_nb.model.unet import UNet, UNetConfig, recompute_blocks

SMALL = UNetConfig(width=32, mults=(1, 2, 2), attn=(False, True, True), blocks=1, heads=4, d_context=24, groups=8)
SD2_LIKE = UNetConfig(width=16, mults=(1, 2), attn=(True, False), blocks=2, head_width=8, depth=2, d_context=24,
                      linear_proj=True, groups=4)


def batch(config, b=2, h=8, w=8):
    return randn(b, config.c_in, h, w), torch.arange(1, b + 1) * 300, randn(b, 5, config.d_context)


def count(config):
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(config).parameters())


def test_sd1_has_859520964_parameters():
    """The default config is Stable Diffusion 1.x, to the parameter."""
    assert count(UNetConfig()) == 859_520_964


def test_sd2_has_865910724_parameters():
    """Three fields make Stable Diffusion 2.x of it."""
    assert count(UNetConfig(head_width=64, linear_proj=True, d_context=1024)) == 865_910_724


@pytest.mark.parametrize("config", [SMALL, SD2_LIKE], ids=["sd1-like", "sd2-like"])
def test_unet_is_diffusers(config, tmp_path):
    """Saved for diffusers and opened there, the UNet gives the same output and the same gradients."""
    ours = randomise(UNet(config))
    save_unet(tmp_path, ours)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    x, t, context = batch(config, h=8, w=12)
    results = []
    for call in (ours, lambda *a: theirs(*a).sample):
        leaves = x.clone().requires_grad_(), context.clone().requires_grad_()
        y = call(leaves[0], t, leaves[1])
        (y * randn(*y.shape)).mean().backward()
        results.append((y, *(leaf.grad for leaf in leaves)))
    for a, b in zip(*results, strict=True):
        assert a.abs().max() > 1e-3
        assert_close(a, b, atol=1e-5, rtol=1e-5)

    gradients = rename({name: p.grad for name, p in ours.named_parameters()}, UNET_NAMES)
    assert gradients.keys() == dict(theirs.named_parameters()).keys()
    for name, p in theirs.named_parameters():
        assert_close(gradients[name], p.grad, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("config", [SMALL, SD2_LIKE], ids=["sd1-like", "sd2-like"])
def test_every_parameter_matters(config):
    """No parameter of the network is without effect."""
    unet = randomise(UNet(config))
    unet(*batch(config)).square().mean().backward()
    dead = [name for name, p in unet.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert dead == []


def test_samples_of_a_batch_do_not_see_each_other():
    """The first sample's output is the same alone, in a batch, and with one timestep for all."""
    unet = randomise(UNet(SMALL)).eval()
    x, t, context = batch(SMALL)
    with torch.no_grad():
        y = unet(x, t, context)
        assert_close(unet(x[:1], t[:1], context[:1]), y[:1])
        for one in (t[0], t[:1], t[0].float()):
            assert_close(unet(x[:1], one, context[:1]), y[:1])
        assert_close(unet(x, torch.tensor(300), context)[0], y[0])


@pytest.mark.parametrize("moved", ["x", "t", "context"])
def test_each_input_is_heard(moved):
    """Another latent, another time or another prompt gives another prediction."""
    unet, args = randomise(UNet(SMALL)).eval(), dict(zip(("x", "t", "context"), batch(SMALL), strict=True))
    with torch.no_grad():
        y = unet(**args)
        assert (unet(**args | {moved: args[moved] + 1}) - y).abs().max() > 1e-3


def test_a_new_unet_predicts_zero():
    """The last layer starts at zero: whatever comes in, the first prediction is no noise at all."""
    assert UNet(SMALL)(*batch(SMALL)).abs().max() == 0


def test_sizes():
    """Sides that divide by the factor keep their size, square or not; others are refused by number."""
    unet = UNet(SMALL)
    assert unet.factor == 4
    for h, w in [(4, 4), (8, 8), (8, 20)]:
        assert unet(*batch(SMALL, h=h, w=w)).shape == (2, 4, h, w)
    with pytest.raises(ValueError, match="8x10.*divide by 4"):
        unet(*batch(SMALL, h=8, w=10))


def test_wrong_inputs_are_named():
    """A context, latent or set of timesteps of the wrong shape is one clear line."""
    unet, (x, t, context) = UNet(SMALL), batch(SMALL)
    with pytest.raises(ValueError, match="context.*23.*24"):
        unet(x, t, context[..., 1:])
    with pytest.raises(ValueError, match="3 channels.*4"):
        unet(x[:, 1:], t, context)
    with pytest.raises(ValueError, match="1 contexts for 2"):
        unet(x, t, context[:1])
    with pytest.raises(ValueError, match="3 timesteps.*2"):
        unet(x, torch.arange(3), context)


@pytest.mark.parametrize(("change", "words"), [
    (dict(attn=(True,)), "one entry per level"), (dict(groups=7), "groups 7"), (dict(heads=5), "heads 5"),
    (dict(head_width=48), "head_width 48"), (dict(width=31), "31 channels"), (dict(blocks=0), "blocks"),
    (dict(mults=(), attn=()), "level"), (dict(mults=(2, 2, 2)), "must begin with 1")])
def test_impossible_configs_are_refused(change, words):
    """A shape that cannot be built is refused when the config is made, by the name of the field."""
    with pytest.raises(ValueError, match=words):
        UNetConfig(**asdict(SMALL) | change)


def test_config_survives_json():
    """A config written as JSON and read again is the same config."""
    assert UNetConfig(**json.loads(json.dumps(asdict(SMALL)))) == SMALL


def test_it_learns():
    """A small UNet on 8x8 latents tells two prompts apart within some steps of Adam."""
    torch.manual_seed(0)
    unet = UNet(SMALL)
    x, context = randn(1, 4, 8, 8).repeat(2, 1, 1, 1), randn(2, 5, 24)  # the same latent, two prompts
    target, optimizer = randn(2, 4, 8, 8), torch.optim.Adam(unet.parameters(), 3e-3, fused=True)
    losses = []
    for _ in range(50):
        loss = (unet(x, torch.tensor(500), context) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]  # the mean of both targets alone would leave about half


@pytest.mark.parametrize("config", [SMALL, SD2_LIKE], ids=["sd1-like", "sd2-like"])
def test_recomputing_changes_no_number(config):
    """Gradient checkpointing gives the same bits, keeps a fraction of the bytes, keeps names, and can be switched off."""
    unet, inputs, sizes, results = randomise(UNet(config)), batch(config), [], []
    names = list(unet.state_dict())
    for on in (False, True, False):
        assert list(recompute_blocks(unet, on).state_dict()) == names
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            y = unet(*inputs)
        bytes_of = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
        for p in unet.parameters():
            bytes_of.pop(p.untyped_storage().data_ptr(), None)
        sizes.append(sum(bytes_of.values()))
        results.append([y, *torch.autograd.grad(y.square().mean(), list(unet.parameters()))])
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert sizes[1] < sizes[0] / 3 and sizes[2] == sizes[0]
