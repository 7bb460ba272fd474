"""Helpers for tests that compare a network of ours with the library people trust."""

import torch
from torch.testing import assert_close


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@torch.no_grad()
def randomise(module, seed=0):
    "Fill every parameter with noise, so that no term of a sum can hide behind a zero."
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        noise = torch.randn(p.shape, generator=g)
        p.copy_(noise / p[0].numel() ** 0.5 if p.ndim > 1 else p + 0.3 * noise)
    return module


@torch.no_grad()
def copy_in_order(ours, theirs):
    "Copy parameters in the order of registration, which must be the same for both."
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    for a, b in pairs:
        assert a.shape == b.shape
        b.copy_(a)
    return pairs


def assert_same(outputs, pairs, inputs):
    "Outputs, gradients of inputs and gradients of parameters are equal."
    assert_close(*outputs, atol=1e-5, rtol=1e-5)
    weight = randn(*outputs[0].shape)
    grads = [torch.autograd.grad((y * weight).sum(), [*inputs, *ps])
             for y, ps in zip(outputs, zip(*pairs, strict=True), strict=True)]
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, atol=1e-4, rtol=1e-4)
