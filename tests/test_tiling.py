"""Large pictures in tiles: weights sum to one, local functions are exact, shared statistics make an autoencoder exact."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from parity import randn, randomise
from sd_nb.interop import save_autoencoder
from sd_nb.model import tiling
from sd_nb.model.autoencoder import Autoencoder, AutoencoderConfig
from sd_nb.model.tiling import Cuts, SharedNorm, decode_tiled, encode_tiled, run_tiled, share_norms, way_up

CONFIG = AutoencoderConfig(width=8, mults=(1, 2), blocks=1, groups=4)
NORMS = 2 * 2 * 2 + 1  # on the way up: two levels of two blocks with two each, and the last one


def model(config=CONFIG):
    return randomise(Autoencoder(config)).requires_grad_(False)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 90), st.integers(1, 40), st.integers(0, 39), st.integers(1, 8))
def test_weights_sum_to_one(n, tile, overlap, zoom):
    """Whatever the sizes: tiles lie inside and cover the side, weights sum to one and vanish outside, own parts cover it once."""
    if overlap >= tile: overlap = tile - 1
    cuts = Cuts(n, tile, overlap)
    starts, weights = cuts.starts, cuts.weights(zoom)
    assert starts[0] == 0 and starts[-1] + cuts.tile == n and starts == sorted(set(starts))
    assert all(a + cuts.tile - b >= min(overlap, cuts.tile) for a, b in zip(starts, starts[1:]))
    assert_close(weights.sum(0), torch.ones(n * zoom))
    assert weights.min() >= 0
    for start, row in zip(starts, weights, strict=True):
        assert row[:start * zoom].sum() == row[(start + cuts.tile) * zoom:].sum() == 0
    owned = [start + i for start, own in zip(starts, cuts.own, strict=True) for i in range(own.start, own.stop)]
    assert owned == list(range(n))


def test_weights_are_silent_at_cuts_and_smooth():
    """The outer quarter of an overlap weighs nothing, borders weigh one, and no step exceeds that of the ramp."""
    weights = Cuts(40, 16, 8).weights(4)
    assert weights[0, 0] == weights[-1, -1] == 1
    for start, row in zip(Cuts(40, 16, 8).starts, weights, strict=True):
        part = row[4 * start:4 * start + 64]
        assert start == 0 or part[:8].abs().max() == 0
        assert start == 24 or part[-8:].abs().max() == 0
    assert weights.diff(dim=1).abs().max() <= 1 / 16 + 1e-6


@pytest.mark.parametrize("h, w", [(24, 24), (25, 61), (7, 40), (40, 7), (5, 5)])
def test_local_functions_are_exact(h, w):
    """A network that looks no further than the silent zone gives the same in tiles, as it is, enlarging and shrinking."""
    conv = nn.Conv2d(3, 5, 3, padding=1).requires_grad_(False)
    rows, cols = Cuts(h, 16, 8), Cuts(w, 16, 8)
    twice = nn.Sequential(conv, nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(5, 2, 3, padding=1)).requires_grad_(False)
    half = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.ReLU()).requires_grad_(False)
    x, large = randn(2, 3, h, w), randn(2, 3, 2 * h, 2 * w)
    assert_close(run_tiled(conv, x, rows, cols), conv(x))
    assert_close(run_tiled(twice, x, rows, cols, zoom_out=2), twice(x))
    assert_close(run_tiled(half, large, rows, cols, zoom_in=2), half(large))
    if h > 16 < w: assert (run_tiled(conv, x, Cuts(h, 16, 0), Cuts(w, 16, 0)) - conv(x)).abs().max() > 1e-2


@pytest.mark.parametrize("h, w", [(40, 48), (33, 71), (10, 50), (50, 10)])
def test_all_rounds_are_one_piece(h, w):
    """With as many rounds as normalisations, tiles draw what one decode draws, although they never see it whole."""
    ours, z = model(), randn(2, 4, h, w)
    whole = ours.decode(z)
    assert_close(decode_tiled(ours, z, 32, 24, NORMS), whole, atol=1e-3, rtol=1e-3)
    errors = [(decode_tiled(ours, z, 32, 24, rounds) - whole).abs().mean() for rounds in (0, 1, NORMS - 1)]
    assert errors[0] > 1e-3 and errors[2] < errors[0] / 10


def test_encoding_all_rounds_is_one_piece():
    """The latent of a picture in tiles is the latent of the picture, mean and deviation."""
    ours, x = model(), randn(2, 3, 96, 130)
    whole, tiled = ours.encode(x), encode_tiled(ours, x, 32, 24, rounds=8)
    assert_close(tiled.mean, whole.mean, atol=1e-3, rtol=1e-3)
    assert_close(tiled.std, whole.std, atol=1e-3, rtol=1e-3)
    assert (encode_tiled(ours, x, 32, 24, rounds=0).mean - whole.mean).abs().max() > 1e-2


@pytest.mark.parametrize("h, w", [(8, 8), (3, 16), (16, 1)])
def test_what_fits_is_not_cut(h, w):
    """A latent or picture that fits one tile gets the very bits of `decode` and `encode`."""
    ours, z, x = model(), randn(1, 4, h, w), randn(1, 3, 2 * h, 2 * w)
    assert torch.equal(decode_tiled(ours, z, 16, 4), ours.decode(z))
    assert torch.equal(encode_tiled(ours, x, 16, 4).mean, ours.encode(x).mean)


def test_no_call_sees_more_than_a_tile():
    """What runs at full resolution never gets more than one tile: that is what bounds the memory."""
    ours, seen = model(), []
    ours.decoder.conv_out.register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape[2:])))
    decode_tiled(ours, randn(1, 4, 40, 70), 16, 4)
    assert set(seen) == {(32, 32)} and len(seen) == 2 * 3 * 6 and (40 - 4) / 12 == 3 and -(-(70 - 4) // 12) == 6


def test_shared_statistics_are_the_whole_maps():
    """Gathered over tiles of different means, in each picture of a batch by itself, they are GroupNorm's."""
    norm = randomise(nn.GroupNorm(2, 6))
    x = randn(2, 6, 20, 30) + torch.linspace(-5, 5, 30)
    twin, rows, cols = share_norms(nn.Sequential(norm)), Cuts(20, 8, 4), Cuts(30, 12, 2)
    tiling.gather(twin, x, rows, cols)
    assert_close(run_tiled(twin, x, rows, cols), norm(x), atol=1e-5, rtol=1e-5)
    assert (run_tiled(norm, x, rows, cols) - norm(x)).abs().max() > 0.5


def test_the_autoencoder_stays_as_it_was():
    """Its weights are shared, not copied; its modules are not replaced, not even when a tile fails."""
    ours = model()
    twin = share_norms(way_up(ours.decoder))
    assert {p.data_ptr() for p in twin.parameters()} <= {p.data_ptr() for p in ours.decoder.parameters()}
    with patch.object(tiling, "run_tiled", side_effect=RuntimeError), pytest.raises(RuntimeError):
        decode_tiled(ours, randn(1, 4, 20, 20), 8, 4)
    assert not any(isinstance(m, SharedNorm) for m in ours.modules())


@pytest.mark.parametrize("rounds", [0, 1])
def test_seams_are_smooth(rounds):
    """Across a cut, neighbouring pixels differ as they do elsewhere; without overlap they jump."""
    ours, z = model(), randn(1, 4, 12, 48)
    whole = ours.decode(z)
    def jump(y):  # of the difference to one piece, at the cuts and elsewhere
        steps = (y - whole).diff(dim=-1).abs().mean((0, 1, 2))
        at = torch.zeros_like(steps, dtype=torch.bool)
        at[[31, 63]] = True
        return steps[at].mean() / steps[~at].mean()
    hard = run_tiled(ours.decode, z, Cuts(12, 16, 0), Cuts(48, 16, 0), zoom_out=2)
    assert jump(hard) > 2
    assert jump(decode_tiled(ours, z, 24, 12, rounds)) < 1.5


def test_diffusers_tiles_are_near_too(tmp_path):
    """Both ways of tiling are close to one piece, ours closer: theirs decodes each tile with its own statistics."""
    from diffusers import AutoencoderKL
    ours, z = model(), randn(1, 4, 40, 40)
    save_autoencoder(tmp_path, ours)
    theirs = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae").requires_grad_(False)
    whole = ours.decode(z)
    assert_close(theirs.decode(z).sample, whole, atol=1e-4, rtol=1e-4)
    theirs.tile_latent_min_size, theirs.tile_sample_min_size = 32, 64
    theirs.enable_tiling()
    apart = [(y - whole).abs().mean() / whole.std() for y in (theirs.decode(z).sample, decode_tiled(ours, z, 32, 8))]
    assert 1e-4 < apart[1] < apart[0] < 0.1


def test_half_precision():
    """Sums are gathered in double precision, so that half precision is off by its own rounding only."""
    ours, z = model(), randn(1, 4, 40, 40)
    whole = ours.decode(z)
    half = decode_tiled(ours.to(torch.bfloat16), z.to(torch.bfloat16), 32, 24, NORMS)
    assert half.dtype == torch.bfloat16
    assert (half.float() - whole).abs().mean() < 0.05 * whole.std()


@pytest.mark.parametrize("tile, overlap", [(8, 8), (8, -1), (0, 0), (4, 9)])
def test_senseless_tiles_are_refused(tile, overlap):
    """An overlap that is no part of a tile is one clear line, whichever way."""
    for call in (lambda: decode_tiled(model(), randn(1, 4, 20, 20), tile, overlap),
                 lambda: encode_tiled(model(), randn(1, 3, 40, 40), tile, overlap)):
        with pytest.raises(ValueError, match=f"overlap {overlap} must be at least 0 and less than the tile, {tile}"):
            call()


def test_bad_inputs_are_refused():
    """Sides that do not divide, and no picture at all, are named."""
    for size in ((40, 41), (1, 40)):
        with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}: both sides must divide by 2"):
            encode_tiled(model(), randn(1, 3, *size), 8, 4)
    with pytest.raises(ValueError, match="rounds is -1"):
        decode_tiled(model(), randn(1, 4, 20, 20), 8, 4, rounds=-1)
    with pytest.raises(ValueError, match=r"\(4, 20, 20\).*\(b, 4, h, w\)"):
        decode_tiled(model(), randn(4, 20, 20), 8, 4)
    with pytest.raises(ValueError, match=r"\(1, 1, 40, 40\).*\(b, 3, H, W\)"):
        encode_tiled(model(), randn(1, 1, 40, 40), 8, 4)
