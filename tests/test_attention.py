"""Attention agrees with its formula, with PyTorch and with diffusers."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward as TheirFeedForward
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.testing import assert_close

from parity import assert_same, copy_in_order, randn, randomise
from sd_nb.model.attention import Attention, FeedForward, SpatialTransformer, TransformerBlock, attend


@pytest.mark.parametrize("causal", [False, True])
def test_attend_is_softmax_of_scaled_scores(causal):
    """attend = softmax(q k^T / sqrt(d)) v, over the past only when causal."""
    q, k, v = randn(2, 3, 5, 8), randn(2, 3, 5, 8) * 2, randn(2, 3, 5, 8) + 1
    scores = q @ k.mT / 8**0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), float("-inf"))
    assert_close(attend(q, k, v, causal), scores.softmax(-1) @ v)
    assert_close(attend(q, k, v, causal), F.scaled_dot_product_attention(q, k, v, is_causal=causal), rtol=0, atol=0)


@pytest.mark.parametrize(("context_width", "heads", "bias"), [(None, 8, False), (20, 4, False), (None, 1, True)])
def test_attention_is_multihead_attention(context_width, heads, bias):
    """Attention equals nn.MultiheadAttention on copied weights, with gradients."""
    c, kd = 32, context_width or 32
    ours = randomise(Attention(c, context_width, heads, bias))
    theirs = nn.MultiheadAttention(c, heads, kdim=kd, vdim=kd, batch_first=True)
    x = randn(2, 6, c).requires_grad_()
    context = randn(2, 9, kd).requires_grad_() if context_width else x
    with torch.no_grad():
        weights = [ours.query.weight, ours.key.weight, ours.value.weight]
        if theirs.in_proj_weight is not None:
            theirs.in_proj_weight.copy_(torch.cat(weights))
        else:
            for name, w in zip("qkv", weights, strict=True):
                getattr(theirs, f"{name}_proj_weight").copy_(w)
        if bias:
            theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    outputs = ours(x, context if context_width else None), theirs(x, context, context, need_weights=False)[0]
    pairs = [(ours.out.weight, theirs.out_proj.weight), (ours.out.bias, theirs.out_proj.bias)]
    assert_same(outputs, pairs, {x, context})


def test_causal_attention_does_not_see_the_future():
    """Changing position 4 changes nothing before position 4."""
    module, x = randomise(Attention(16, heads=2)), randn(1, 6, 16)
    y = module(x, causal=True)
    x2 = x.clone()
    x2[:, 4] += 1
    y2 = module(x2, causal=True)
    assert_close(y[:, :4], y2[:, :4])
    assert (y[:, 4:] - y2[:, 4:]).abs().amin(dim=2).max() > 1e-3


def test_the_order_of_the_words_does_not_matter():
    """Cross-attention does not know in which order its context stands; self-attention moves with its input."""
    cross, self_ = randomise(Attention(16, 12, 2)), randomise(Attention(16, heads=2))
    x, context = randn(2, 6, 16), randn(2, 7, 12)
    order, words = torch.randperm(6), torch.randperm(7)
    assert_close(cross(x, context), cross(x, context[:, words]))
    assert_close(self_(x)[:, order], self_(x[:, order]))


def test_feed_forward_is_geglu():
    """FeedForward equals diffusers' GEGLU feed-forward, with gradients."""
    ours, theirs = randomise(FeedForward(24)), TheirFeedForward(24, activation_fn="geglu")
    pairs = copy_in_order(ours, theirs)
    x = randn(2, 5, 24).requires_grad_()
    assert_same((ours(x), theirs(x)), pairs, [x])


@pytest.mark.parametrize(("linear", "depth"), [(False, 1), (True, 2)])
def test_spatial_transformer_is_transformer2d(linear, depth):
    """SpatialTransformer equals diffusers' Transformer2DModel on copied weights, with gradients."""
    ours = randomise(SpatialTransformer(32, 20, heads=4, depth=depth, linear=linear, groups=8))
    theirs = Transformer2DModel(4, 8, 32, num_layers=depth, norm_num_groups=8, cross_attention_dim=20, use_linear_projection=linear)
    pairs = copy_in_order(ours, theirs)
    x, context = randn(2, 32, 4, 6).requires_grad_(), randn(2, 7, 20).requires_grad_()
    assert_same((ours(x, context), theirs(x, context).sample), pairs, [x, context])
    faint = 1e-3 * x  # its variance is that of eps, so another eps would show
    assert_close(ours(faint, context), theirs(faint, context).sample, atol=1e-5, rtol=1e-5)


def test_spatial_transformer_starts_as_the_identity():
    """A new SpatialTransformer changes nothing, yet its last layer has a gradient to start with."""
    module, x = SpatialTransformer(32, 12, 4, groups=8), randn(1, 32, 4, 4)
    y = module(x, randn(1, 3, 12))
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert module.proj_out.weight.grad.abs().max() > 0


def test_blocks_keep_shape():
    """A TransformerBlock gives back as many positions and channels as it gets."""
    assert TransformerBlock(16, 12, 4)(randn(2, 5, 16), randn(2, 3, 12)).shape == (2, 5, 16)


def test_heads_must_divide_width():
    """A width that heads do not divide is refused in one line that names both."""
    with pytest.raises(ValueError, match="width 30 does not divide into 8 heads"):
        Attention(30)


@pytest.mark.parametrize("causal", [False, True])
def test_masked_positions_are_as_if_they_were_not_there(causal):
    """Hiding the last positions equals leaving them out, whatever they hold; other rows of the batch are not touched."""
    attention = randomise(Attention(16, heads=4))
    x, mask = randn(2, 6, 16), torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    y = attention(x, causal=causal, mask=mask)
    assert_close(y[:1, :4], attention(x[:1, :4], causal=causal))
    assert_close(y[1:], attention(x[1:], causal=causal))
    x[0, 4:] = 1e3
    assert_close(attention(x, causal=causal, mask=mask)[0, :4], y[0, :4])
