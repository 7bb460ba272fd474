"""Timestep embedding, ResBlock and resampling agree with diffusers."""

import pytest
import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch.testing import assert_close

from parity import assert_same, copy_in_order, randn, randomise
from sd_nb.model.resblock import Downsample, ResBlock, TimeEmbedding, Upsample, timestep_embedding


@pytest.mark.parametrize("width", [2, 64, 320])
def test_timestep_embedding_is_diffusers(width):
    """Cosines first, then sines, divisor half: what SD's checkpoints were trained with."""
    t = torch.tensor([0, 1, 20, 500, 981, 999])
    theirs = get_timestep_embedding(t, width, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert_close(timestep_embedding(t, width), theirs, atol=1e-6, rtol=0)
    assert_close(timestep_embedding(t + 0.5, width)[0, 0], torch.tensor(0.5).cos())


@pytest.mark.parametrize("width", [0, -2, 5])
def test_timestep_embedding_width_must_be_even(width):
    """Each wave needs a cosine and a sine: other widths are refused by number."""
    with pytest.raises(ValueError, match=f"width {width} "):
        timestep_embedding(torch.tensor([1]), width)


def test_time_embedding_is_diffusers():
    """TimeEmbedding equals diffusers' projection and two-layer embedding, with gradients."""
    ours, theirs = randomise(TimeEmbedding(16, 48)), TimestepEmbedding(16, 48)
    pairs = copy_in_order(ours, theirs)
    t = torch.tensor([3.0, 700.0])
    assert_same((ours(t), theirs(timestep_embedding(t, 16))), pairs, [])


@pytest.mark.parametrize("d_time", [None, 24])
@pytest.mark.parametrize("c_out", [16, 32])
def test_resblock_is_diffusers(c_out, d_time):
    """ResBlock equals diffusers' ResnetBlock2D on copied weights, with gradients."""
    ours = randomise(ResBlock(16, c_out, d_time, groups=8))
    theirs = ResnetBlock2D(in_channels=16, out_channels=c_out, temb_channels=d_time, groups=8, eps=1e-5)
    pairs = copy_in_order(ours, theirs)
    x, t = randn(2, 16, 6, 4).requires_grad_(), None if d_time is None else randn(2, d_time).requires_grad_()
    assert_same((ours(x, t), theirs(x, t)), pairs, [x] if t is None else [x, t])
    faint = 3e-3 * x  # its variance is that of eps, so another eps would show
    assert_close(ours(faint, t), theirs(faint, t), atol=1e-5, rtol=1e-5)


def test_resblock_wants_time_exactly_when_it_was_made_for_it():
    """A forgotten or superfluous time vector is an error, never silently ignored."""
    x, t = randn(1, 8, 4, 4), randn(1, 12)
    with pytest.raises(ValueError, match="time"):
        ResBlock(8, 8, 12, groups=4)(x)
    with pytest.raises(ValueError, match="time"):
        ResBlock(8, 8, groups=4)(x, t)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_downsample_is_diffusers(asymmetric):
    """Downsample equals diffusers' in both paddings, with gradients."""
    ours = randomise(Downsample(8, asymmetric))
    theirs = Downsample2D(8, use_conv=True, padding=0 if asymmetric else 1)
    pairs = copy_in_order(ours, theirs)
    x = randn(2, 8, 6, 10).requires_grad_()
    assert_same((ours(x), theirs(x)), pairs, [x])
    assert ours(x).shape == (2, 8, 3, 5)


def test_upsample_is_diffusers():
    """Upsample equals diffusers', with gradients."""
    ours, theirs = randomise(Upsample(8)), Upsample2D(8, use_conv=True)
    pairs = copy_in_order(ours, theirs)
    x = randn(2, 8, 3, 5).requires_grad_()
    assert_same((ours(x), theirs(x)), pairs, [x])
    assert ours(x).shape == (2, 8, 6, 10)


def test_a_new_block_adds_nothing():
    """With its last convolution at zero, an untrained block is its skip."""
    x, t = randn(2, 32, 4, 4), randn(2, 8)
    assert torch.equal(ResBlock(32, 32, 8)(x, t), x)
    block = ResBlock(32, 64, 8)
    assert torch.equal(block(x, t), block.skip(x))
