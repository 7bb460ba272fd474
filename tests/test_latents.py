import os
import numpy as np
import pytest
import torch
from PIL import Image
import sd_nb.data.latents as latents
from sd_nb.data.images import Sample, write_shards
from sd_nb.data.latents import HashedFile, pack_latents, pack_pixels, sample_latents, sha256_of, to_float, unit_scale, weights_digest
from sd_nb.data.loader import Packed
from sd_nb.model.autoencoder import Autoencoder, AutoencoderConfig


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    "Twelve noisy pictures in three shards, the last shard nothing but held out"
    rng = np.random.default_rng(0)
    image = lambda: Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    samples = [Sample(f"k{i}", image(), f"caption {i}", dict(split="train" if i < 8 else "held_out")) for i in range(12)]
    write_shards(samples, out := tmp_path_factory.mktemp("latents") / "shards", per_shard=4)
    return out


def network(seed=0):
    "A tiny autoencoder with its own weights"
    torch.manual_seed(seed)
    return Autoencoder(AutoencoderConfig(width=8, mults=(1, 2), blocks=1, groups=4))


def contents(directory):
    "Every file's bytes"
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_packing_twice_gives_the_same_bytes(shards, tmp_path):
    "Same pictures, same bytes: in another directory, and in the same one, where nothing is made again"
    pack_pixels(shards, tmp_path / "a", 16, progress=False)
    pack_pixels(shards, tmp_path / "b", 16, progress=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    before = {o: o.stat().st_mtime_ns for o in (tmp_path / "a").glob("*.npy")}
    pack_pixels(shards, tmp_path / "a", 16, progress=False)
    assert before == {o: o.stat().st_mtime_ns for o in before}
    net = network()
    for name in "cd": pack_latents(tmp_path / "a", tmp_path / name, net, progress=False)
    assert contents(tmp_path / "c") == contents(tmp_path / "d")


def test_pixels_are_the_squares(shards, tmp_path):
    "Packed bytes are the pictures cut square, channels first"
    from sd_nb.data.images import read_shards, square
    pack_pixels(shards, tmp_path / "p", 16, progress=False)
    want = np.stack([np.asarray(square(o.image, 16)).transpose(2, 0, 1) for o in read_shards(shards)])
    np.testing.assert_array_equal(Packed(tmp_path / "p", verify=True)[:], want)
    row = Packed(tmp_path / "p").meta.to_pylist()[5]
    assert (row["key"], row["caption"], row["width"], row["height"]) == ("k5", "caption 5", 24, 20)


@pytest.mark.parametrize("packed", [True, False])
def test_latents_are_the_moments(shards, tmp_path, packed):
    "What is stored is the autoencoder's mean and log-variance in fp16, from packed pixels or straight from the shards"
    pack_pixels(shards, tmp_path / "p", 16, progress=False)
    net = network().train()
    pack_latents(tmp_path / "p" if packed else shards, tmp_path / "z", net, size=16, batch=3, progress=False)
    o, pixels = Packed(tmp_path / "z", verify=True), Packed(tmp_path / "p")
    assert o.shape == (8, 8, 8) and o.dtype == np.float16 and o.captions == pixels.captions and net.training
    with torch.no_grad(): want = net.encode(to_float(pixels[:]))
    torch.testing.assert_close(torch.tensor(o[:]).float(), torch.cat([want.mean, want.logvar], 1), rtol=1e-3, atol=1e-4)


def test_a_split_can_be_packed_alone(shards, tmp_path):
    "Only its pictures are there, also where a shard has none of it; an unknown one is refused"
    pack_pixels(shards, tmp_path / "t", 8, split="train", progress=False)
    o = Packed(tmp_path / "t")
    assert len(o) == 8 and o[[7, 0]].shape == (2, 3, 8, 8) and set(o.meta["split"].to_pylist()) == {"train"}
    pack_latents(tmp_path / "t", tmp_path / "z", network(), progress=False)
    assert len(Packed(tmp_path / "z")) == 8
    with pytest.raises(ValueError, match="no picture has split 'test'"): pack_pixels(shards, tmp_path / "u", 8, split="test", progress=False)


@pytest.mark.parametrize("when", range(1, 11))
def test_packing_goes_on_after_a_kill(shards, tmp_path, monkeypatch, when):
    "Killed before any of its ten renames, it is no packed directory; the same command then gives the same bytes"
    pack_pixels(shards, tmp_path / "whole", 8, progress=False)
    replace, calls = os.replace, []

    def killed(a, b):
        calls.append(b)
        if len(calls) == when: raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt): pack_pixels(shards, tmp_path / "p", 8, progress=False)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="no manifest.json"): Packed(tmp_path / "p")
    (tmp_path / "p" / ".00000.npy.partial").write_bytes(b"torn")
    made = []
    monkeypatch.setattr(latents, "_read_pixels", lambda *o: made.append(o) or real(*o))
    pack_pixels(shards, tmp_path / "p", 8, progress=False)
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")
    assert len(made) == 3 - (when - 1) // 3


real = latents._read_pixels


def test_other_things_are_refused(shards, tmp_path):
    "Another resolution, split, picture or autoencoder in the same directory is one clear line, and nothing is touched"
    net = network()
    pack_pixels(shards, tmp_path / "p", 16, progress=False)
    pack_latents(tmp_path / "p", tmp_path / "z", net, progress=False)
    before = contents(tmp_path / "p"), contents(tmp_path / "z")
    with pytest.raises(ValueError, match="size was 16, is 8") as error: pack_pixels(shards, tmp_path / "p", 8, progress=False)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="split was None, is train"): pack_pixels(shards, tmp_path / "p", 16, split="train", progress=False)
    with pytest.raises(ValueError, match="autoencoder was .{12}, is"): pack_latents(tmp_path / "p", tmp_path / "z", network(1), progress=False)
    with pytest.raises(ValueError, match="packed at 16 pixels, not 8"): pack_latents(tmp_path / "p", tmp_path / "y", net, size=8, progress=False)
    with pytest.raises(ValueError, match="holds latents, not pixels"): pack_latents(tmp_path / "z", tmp_path / "y", net, progress=False)
    with pytest.raises(ValueError, match="name the size"): pack_latents(shards, tmp_path / "y", net, progress=False)
    with pytest.raises(ValueError, match="size 9 does not divide by 2"): pack_latents(shards, tmp_path / "y", net, size=9, progress=False)
    write_shards([Sample("other", Image.new("RGB", (8, 8)), "other", {})], tmp_path / "other")
    with pytest.raises(ValueError, match="source was"): pack_pixels(tmp_path / "other", tmp_path / "p", 16, progress=False)
    assert before == (contents(tmp_path / "p"), contents(tmp_path / "z"))


def test_scale_is_no_part_of_the_fingerprint(shards, tmp_path):
    "Latents are packed unscaled: measuring the scale afterwards does not make them stale"
    from dataclasses import replace
    net = network()
    pack_latents(shards, tmp_path / "z", net, size=16, progress=False)
    net.config = replace(net.config, scale=0.5)
    pack_latents(shards, tmp_path / "z", net, size=16, progress=False)


def test_a_damaged_shard_is_found_and_repaired(shards, tmp_path):
    "A flipped byte is caught by its checksum: refused as a source, packed again by the same command"
    manifest = pack_pixels(shards, tmp_path / "p", 16, progress=False)
    good = contents(tmp_path / "p")
    data = bytearray(good["00001.npy"]); data[-1] ^= 1
    (tmp_path / "p" / "00001.npy").write_bytes(data)
    with pytest.raises(ValueError, match="00001.npy: not what its manifest says"): pack_latents(tmp_path / "p", tmp_path / "z", network(), progress=False)
    with pytest.warns(UserWarning, match="00001.npy broken"): assert pack_pixels(shards, tmp_path / "p", 16, progress=False) == manifest
    assert contents(tmp_path / "p") == good


def test_latents_that_are_not_finite_are_refused(shards, tmp_path):
    "NaN, and numbers that fp16 cannot hold, name the picture and leave no shard behind"
    for poison in (float("nan"), 1e9):
        net = network(); net.quant.bias.data[0] = poison
        with pytest.raises(ValueError, match="the latents of 'k0' are not finite"): pack_latents(shards, tmp_path / "z", net, size=16, progress=False)
        assert not list((tmp_path / "z").iterdir())


def test_samples_have_the_right_moments():
    "Latents drawn from packed moments have their mean and deviation, times the scale; `unit_scale` makes that one"
    g = torch.Generator().manual_seed(0)
    moments = torch.cat([torch.randn(64, 4, 8, 8, generator=g) * 3 + 1, torch.full((64, 4, 8, 8), np.log(4.0))], 1)
    z = sample_latents(moments.half(), torch.randn(64, 4, 8, 8, generator=g), unit_scale(moments))
    assert abs(z.std() - 1) < 0.02 and z.dtype == torch.float32
    still = sample_latents(moments.half(), torch.zeros(64, 4, 8, 8), 0.5)
    torch.testing.assert_close(still, moments[:, :4] * 0.5, rtol=1e-3, atol=1e-3)


def test_a_hashed_file_is_whole_or_not_there(tmp_path):
    "Its receipt is its size and sha256; an exception leaves the old file and no rubbish"
    with HashedFile(tmp_path / "x") as file: file.write(b"ab"); file.write(np.arange(3, dtype=np.int32))
    assert file.receipt == dict(bytes=14, sha256=sha256_of(tmp_path / "x"))
    with pytest.raises(RuntimeError):
        with HashedFile(tmp_path / "x") as file: file.write(b"cd"); raise RuntimeError
    assert [o.name for o in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes()[:2] == b"ab"


def test_weights_digest_sees_every_weight():
    "One changed weight, name or shape changes the digest; a copy does not"
    a, b = network(), network()
    assert weights_digest(a) == weights_digest(b)
    with torch.no_grad(): next(b.parameters()).view(-1)[0] += 1e-3
    assert weights_digest(a) != weights_digest(b)
    assert weights_digest(torch.nn.Linear(2, 3)) != weights_digest(torch.nn.Linear(3, 2))
