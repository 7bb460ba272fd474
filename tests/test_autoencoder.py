"""The autoencoder has Stable Diffusion's size, computes what diffusers' computes, and learns."""

import json
from dataclasses import asdict

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from parity import randn, randomise
from sd_nb.model.autoencoder import Autoencoder, AutoencoderConfig, Gaussian, autoencoder_loss, edge_loss

SMALL = AutoencoderConfig(width=16, mults=(1, 2, 4), blocks=1, groups=8)
OTHER = AutoencoderConfig(width=8, mults=(1, 1, 2, 3), blocks=2, groups=4, c_latent=8)


def test_sd1_has_83653863_parameters():
    """The default config is Stable Diffusion's autoencoder, to the parameter."""
    with torch.device("meta"):
        model = Autoencoder(AutoencoderConfig())
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    assert model.factor == 8


@pytest.mark.parametrize("config", [SMALL, OTHER], ids=["three levels", "four levels"])
def test_autoencoder_is_diffusers(config, tmp_path):
    """Saved for diffusers and opened there, it encodes and decodes the same, forwards and backwards."""
    from diffusers import AutoencoderKL
    from sd_nb.interop import save_autoencoder

    ours = randomise(Autoencoder(config))
    save_autoencoder(tmp_path, ours)
    theirs = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae")
    x, z = randn(2, 3, 32, 40).requires_grad_(), randn(2, config.c_latent, 4, 5).requires_grad_()
    a, b = ours.encode(x), theirs.encode(x).latent_dist
    pairs = [(a.mean, b.mean, x), (a.logvar, b.logvar, x), (a.std, b.std, x), (ours.decode(z), theirs.decode(z).sample, z)]
    for p, q, leaf in pairs:
        assert p.abs().max() > 1e-3
        assert_close(p, q, atol=1e-5, rtol=1e-5)
        grads = [torch.autograd.grad((y * randn(*y.shape)).mean(), leaf, retain_graph=True)[0] for y in (p, q)]
        assert_close(*grads, atol=1e-5, rtol=1e-5)
    assert_close(a.kl(), b.kl(), atol=1e-3, rtol=1e-5)
    assert theirs.config.scaling_factor == config.scale


@pytest.mark.parametrize("h, w", [(8, 8), (16, 24), (4, 12)])
def test_latent_is_factor_times_smaller(h, w):
    """Any size that divides by the factor comes back as it was, through a latent `factor` times smaller."""
    model = Autoencoder(SMALL)
    q = model.encode(randn(1, 3, h, w))
    assert q.mean.shape == (1, 4, h // 4, w // 4)
    assert model.decode(q.mean).shape == (1, 3, h, w)


@pytest.mark.parametrize("h, w", [(6, 8), (8, 7), (1, 1)])
def test_size_that_does_not_divide(h, w):
    """A picture that does not divide by the factor is refused by its size."""
    with pytest.raises(ValueError, match=f"{h}x{w}: both sides must divide by 4"):
        Autoencoder(SMALL).encode(randn(1, 3, h, w))


def test_gaussian():
    """The belief has the density, the divergence and the samples of torch's normal distribution."""
    q = Gaussian(torch.cat([randn(2, 3, 4, 4), randn(2, 3, 4, 4) / 2], dim=1))
    reference = Normal(q.mean, q.std)
    assert_close(q.kl(), kl_divergence(reference, Normal(0.0, 1.0)).sum(dim=(1, 2, 3)), rtol=1e-5, atol=1e-4)
    z = [q.sample(torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(z[0], z[1]) and not torch.equal(z[0], z[2])
    many = torch.stack([q.sample(torch.Generator().manual_seed(i)) for i in range(2000)])
    assert_close(many.mean(0), q.mean, atol=0.2, rtol=0)
    assert_close(many.std(0), q.std, atol=0, rtol=0.1)


def test_gaussian_of_wild_moments_is_finite():
    """Log variances that would overflow are clamped."""
    q = Gaussian(torch.tensor([0.0, 1e6, 0.0, -1e6]).reshape(2, 2, 1, 1))
    assert q.std.isfinite().all() and q.kl().isfinite().all()


def test_edge_loss():
    """A wrong colour has no edges, a wrong line has two."""
    assert edge_loss(torch.full((1, 3, 16, 16), 0.3)) == 0
    line = torch.zeros(1, 1, 16, 16)
    line[..., 8] = 1
    half = torch.zeros(1, 1, 16, 16)
    half[..., 8:] = 1
    assert_close(edge_loss(line, scales=1), 2 * edge_loss(half, scales=1))
    assert edge_loss(half, scales=1) > 0
    assert_close(edge_loss(line), edge_loss(line.mT))
    assert edge_loss(torch.ones(1, 3, 2, 2)).isfinite() and edge_loss(torch.ones(1, 3, 1, 1)).isfinite()


def test_loss_is_a_function_of_its_noise():
    """The same noise gives the same loss, other noise another; the parts add up; every parameter learns."""
    model = randomise(Autoencoder(SMALL))
    x, noise = randn(2, 3, 16, 16), randn(2, 4, 4, 4)
    loss, parts = autoencoder_loss(model, x, noise, kl_weight=1e-3, edge_weight=0.5)
    assert_close(loss, parts["recon"] + 0.5 * parts["edge"] + 1e-3 * parts["kl"])
    assert torch.equal(loss, autoencoder_loss(model, x, noise, 1e-3, 0.5)[0])
    assert loss != autoencoder_loss(model, x, 2 * noise, 1e-3, 0.5)[0]
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with pytest.raises(ValueError, match=r"noise \(2, 4, 1, 1\) .* latent \(2, 4, 4, 4\)"):
        autoencoder_loss(model, x, randn(2, 4, 1, 1))


def test_untrained_autoencoder_is_linear_and_keeps_colours():
    """Before training, the encoder's path averages and rotates: it is no more than shrinking, and loses no colour."""
    torch.manual_seed(0)
    encoder = Autoencoder(SMALL).encoder
    h = encoder.conv_in(randn(1, 3, 16, 16))
    for level in encoder.down:
        h = level(h)
    h, flat = encoder.middle(h), torch.nn.functional.avg_pool2d(randn(1, 3, 16, 16), 4)
    assert_close(h.norm(dim=1), flat.norm(dim=1))


def test_autoencoder_learns():
    """A few steps on one batch halve the error."""
    torch.manual_seed(0)
    model = Autoencoder(SMALL)
    x = torch.nn.functional.interpolate(randn(4, 3, 4, 4), scale_factor=4.0, mode="bilinear").clamp(-1, 1)
    optimizer, errors = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(40):
        loss, parts = autoencoder_loss(model, x, torch.randn(4, 4, 4, 4))
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        errors.append(parts["recon"].item())
    assert errors[-1] < errors[0] / 2


def test_config():
    """A config survives JSON; widths that GroupNorm cannot divide are refused."""
    assert AutoencoderConfig(**json.loads(json.dumps(asdict(SMALL)))) == SMALL
    assert {SMALL: 1}[AutoencoderConfig(**asdict(SMALL))] == 1
    with pytest.raises(ValueError, match="20 channels.*32 groups"):
        AutoencoderConfig(width=20)
    for mults in ((2, 4), ()):
        with pytest.raises(ValueError, match="must begin with 1"):
            AutoencoderConfig(mults=mults)
