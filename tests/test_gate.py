from pathlib import Path
import numpy as np
import pytest
import torch
import sd_nb
from sd_nb.data import latents
from sd_nb.data.emoji import embedded
from sd_nb.data.gate import LIMITS, check_latents, gate, latent_sums, pixel_sums, statistics
from sd_nb.data.images import read_shards, square
from sd_nb.data.latents import sample_latents, to_float, write_manifest, write_packed
from sd_nb.interop import load_autoencoder
from sd_nb.model.autoencoder import Autoencoder


@pytest.fixture(scope="module")
def autoencoder():
    return load_autoencoder(Path(sd_nb.__file__).parent / "assets" / "model").eval()


@pytest.fixture(scope="module")
def pixels():
    "Forty-eight embedded pictures: `(48, 3, 64, 64)` uint8"
    samples = [o for i, o in zip(range(384), read_shards(embedded())) if i % 8 == 0]
    return np.stack([np.asarray(square(o.image, 64)).transpose(2, 0, 1) for o in samples])


@torch.no_grad()
def encode(autoencoder, x):
    o = autoencoder.encode(x)
    return torch.cat([o.mean, o.logvar], 1).half().numpy()


@pytest.fixture(scope="module")
def moments(autoencoder, pixels): return encode(autoencoder, to_float(pixels))


def sums_of(autoencoder, moments, pixels): return latent_sums(moments) | pixel_sums(autoencoder, moments, pixels)


def test_statistics_are_those_of_the_latents(autoencoder, pixels, moments):
    "Mean and deviation are those of drawn latents, the slope is that of a least-squares line, and parts add up to the whole"
    scale = autoencoder.config.scale
    found = statistics(sums_of(autoencoder, moments, pixels), scale)
    z = sample_latents(moments, torch.randn(48, 4, 16, 16, generator=torch.Generator().manual_seed(0)), scale)
    assert abs(found["mean"] - z.mean()) < 0.005 and abs(found["deviation"] - z.std()) < 0.005
    with torch.no_grad(): decoded = autoencoder.decode(torch.tensor(moments[:, :4]).float())
    assert abs(found["slope"] - np.polyfit(to_float(pixels).flatten(), decoded.flatten(), 1)[0]) < 1e-4
    parts = [sums_of(autoencoder, moments[i::3], pixels[i::3]) for i in range(3)]
    added = statistics({k: sum(o[k] for o in parts) for k in parts[0]}, scale)
    assert all(abs(added[k] - found[k]) < 1e-6 for k in found)


def test_the_limits_let_known_models_pass(autoencoder, pixels, moments):
    "This model on its pictures, and Stable Diffusion's on ImageNet by EDM2's numbers"
    gate(sums_of(autoencoder, moments, pixels), autoencoder.config.scale, "emoji")
    mean, std = np.array([5.81, 3.25, 0.12, -2.15]), np.array([4.17, 4.62, 3.71, 3.28])
    gate(dict(latents=4, z=mean.sum(), zz=(mean**2 + std**2).sum()), 0.18215, "ImageNet")


@pytest.mark.parametrize("name, spoil", {
    "[0, 1]": lambda x: (x + 1) / 2, "[0, 255]": lambda x: (x + 1) * 127.5, "negative": lambda x: -x, "red is blue": lambda x: x.flip(1)}.items())
def test_unnormalised_pixels_are_refused(autoencoder, pixels, name, spoil):
    "The benchmark whose latents were made without bringing pixels to [-1, 1], replayed; and other colours"
    bad, scale = encode(autoencoder, spoil(to_float(pixels))), autoencoder.config.scale
    with pytest.raises(ValueError, match=r"set: not fit to train on: .*slope .* pixels in \[-1, 1\]") as error:
        gate(sums_of(autoencoder, bad, pixels), scale, "set")
    assert "\n" not in str(error.value)


def test_what_the_gate_does_not_see(autoencoder, pixels):
    "Pixels in [-0.5, 0.5]: the notebook says that these pass, and that the decoded pictures are hardly wrong"
    bad = encode(autoencoder, to_float(pixels) / 2)
    gate(sums_of(autoencoder, bad, pixels), autoencoder.config.scale, "set")
    with torch.no_grad(): decoded = autoencoder.decode(torch.tensor(bad[:, :4]).float())
    assert (decoded - to_float(pixels)).abs().mean() < 0.1


def test_an_untrained_autoencoder_is_refused(autoencoder, pixels):
    "Its latents may be of any size; its pictures are not the pictures"
    torch.manual_seed(0)
    net = Autoencoder(autoencoder.config).eval()
    with pytest.raises(ValueError, match="is the autoencoder trained"):
        gate(sums_of(net, encode(net, to_float(pixels)), pixels), 1.0, "set")


def test_blank_pictures_have_no_slope(autoencoder):
    "All pixels alike: nothing to divide by, and no warning"
    white = np.full((2, 3, 32, 32), 255, np.uint8)
    assert statistics(sums_of(autoencoder, encode(autoencoder, to_float(white)), white), 1)["slope"] == 1


@pytest.mark.parametrize("factor", [0, 1])
def test_fault_24_a_wrong_scale_is_refused(autoencoder, moments, factor):
    "Forgotten, or applied twice"
    scale = autoencoder.config.scale ** (2 * factor)
    with pytest.raises(ValueError, match="deviation .* is its scale"): gate(latent_sums(moments), scale, "set")
    assert LIMITS["deviation"][0] < statistics(latent_sums(moments), autoencoder.config.scale)["deviation"] < LIMITS["deviation"][1]


def packed(out, moments):
    "A packed directory of one shard"
    out.mkdir()
    rows = [dict.fromkeys(latents.SCHEMA.names) | dict(key=f"k{i}") for i in range(len(moments))]
    fingerprint = dict(kind="latents")
    return write_manifest(out, fingerprint, [write_packed(out, "00000", moments, rows, dict(source="", fingerprint=fingerprint))])


def test_fault_24_edited_latents_are_refused(autoencoder, moments, tmp_path):
    "NaN, infinity, another type, another shape, another scale: one line that names the file or the number"
    scale, place = autoencoder.config.scale, tmp_path / "z"
    packed(place, moments)
    assert abs(check_latents(place, scale)["deviation"] - 1) < 0.15
    with pytest.raises(ValueError, match="names no scale"): check_latents(place)
    nan, infinite = moments.copy(), moments.copy()
    nan[47, 7, 15, 15], infinite[0, 0, 0, 0] = np.nan, np.inf
    edits = {"not finite": (nan, infinite), "float32": (moments.astype(np.float32),), "no moments": (moments[..., :4], moments[:, :4], moments.view(np.int16)),
             "deviation": (moments * np.float16(5), moments * np.float16(0.2)), "mean": (moments + np.float16(1.5),)}
    for words, arrays in edits.items():
        for array in arrays:
            np.save(place / "00000.npy", array)
            with pytest.raises(ValueError, match=words): check_latents(place, scale)


def test_fault_24_shapes_that_are_no_moments_are_refused(tmp_path):
    "An odd number of channels, or no picture at all, also where manifest and array agree"
    for i, shape in enumerate([(2, 7, 4, 4), (2, 16)]):
        packed(tmp_path / str(i), np.zeros(shape, np.float16))
        with pytest.raises(ValueError, match="are no moments"): check_latents(tmp_path / str(i), 1.0)
