"""Models from the Hub: a pinned commit, half precision where there is nothing else, no pickles, one line when it fails."""

import json
import socket
import time

import pytest
import torch

from hub import COMMITS, hub, open_there, read
from parity import randomise
from sd_nb.interop import save_diffusers
from sd_nb.model.unet import UNet
from tiny import UNET, tiny_parts

JUNK = {"unet/diffusion_pytorch_model.bin": b"pickle", "unet/diffusion_pytorch_model.fp16.bin": b"pickle", "model.ckpt": b"pickle", "v1-5.safetensors": b"whole model",
        "unet/diffusion_pytorch_model.non_ema.safetensors": b"x", "safety_checker/model.safetensors": b"x", "run.py": b"code", "unet/run.py": b"code", "tokenizer/x.pkl": b"pickle"}


def variant(files, shards=False):
    """Files under the names of their fp16 variants, in one piece or in shards with an index of the same number of pieces."""
    out = {}
    for name, data in files.items():
        stem = name.removesuffix(".safetensors")
        if stem == name: out[name] = data
        elif not shards: out[f"{stem}.fp16.safetensors"] = data
        else:
            n = int.from_bytes(data[:8], "little")
            keys = [k for k in json.loads(data[8:8 + n]) if k != "__metadata__"]
            part = f"{stem}.fp16-00001-of-00001.safetensors"
            out[part] = data
            out[f"{stem}.safetensors.index.fp16.json"] = json.dumps(dict(metadata={}, weight_map=dict.fromkeys(keys, part.split("/")[-1]))).encode()
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two versions of a model, and the half-precision files of the first."""
    home = tmp_path_factory.mktemp("models")
    parts = tiny_parts()
    save_diffusers(home / "a", parts)
    other = randomise(UNet(UNET), 7)
    save_diffusers(home / "b", parts._replace(unet=other))
    save_diffusers(home / "half", parts, torch.float16)
    return {name: read(home / name) for name in ("a", "b", "half")}, parts.unet, other


@pytest.fixture(scope="module")
def opened(models, tmp_path_factory):
    """What one process gets from a Hub that holds everything, and what it asked for."""
    files, *_ = models
    (a, b), home = COMMITS.values(), tmp_path_factory.mktemp("home")
    repos = {"someone/full": ({a: files["a"] | JUNK, b: files["b"] | JUNK | variant(files["half"])}, dict(main=b)),
             "someone/half": ({a: variant(files["half"]) | JUNK}, dict(main=a)),
             "someone/shards": ({a: variant(files["half"], shards=True)}, dict(main=a)),
             "someone/pickles": ({a: {k: v for k, v in files["a"].items() if not k.endswith("safetensors")} | JUNK}, dict(main=a)),
             "someone/escape": ({a: files["a"] | {"../../../evil.json": b"{}"}}, dict(main=a))}
    wanted = dict(pinned=["someone/full", a], branch=["someone/full", None], half=["someone/half", None], shards=["someone/shards", "main"], wrong=["someone/full", "v9"],
                  commit=["someone/full", "c" * 40], nobody=["someone/nothing", None], pickles=["someone/pickles", None], escape=["someone/escape", None])
    with hub(repos) as (endpoint, asked): results = dict(zip(wanted, open_there(home, endpoint, *wanted.values()), strict=True))
    return results, [path for path in asked if "/resolve/" in path], home


def bias(unet): return unet.conv_in.bias.tolist()


def test_a_pinned_commit_is_what_it_was(models, opened):
    """The commit asked for is what is opened, although the branch has moved on."""
    _, first, second = models
    results, asked, _ = opened
    assert results["pinned"] == ["parts", bias(first)] != results["branch"] == ["parts", bias(second)]
    assert any(COMMITS["a"] in path for path in asked if "full" in path)


def test_half_precision_is_taken_only_where_there_is_nothing_else(models, opened):
    """A repository of fp16 variants opens, whole or in shards; where both are there, float32 is downloaded alone."""
    _, first, _ = models
    results, asked, _ = opened
    want = first.conv_in.bias.half().float().tolist()
    assert results["half"] == results["shards"] == ["parts", want]
    assert not [path for path in asked if "full" in path and "fp16" in path]
    assert [path for path in asked if "half" in path and "unet/diffusion_pytorch_model.fp16.safetensors" in path]


def test_nothing_is_asked_for_that_could_run_code(opened):
    """Only JSON, text and safetensors of the model's own parts are requested."""
    _, asked, _ = opened
    assert asked and all(path.endswith((".json", ".txt", ".safetensors")) for path in asked)
    assert not [path for path in asked if any(word in path for word in ("safety_checker", "non_ema", "v1-5", "run.py"))]


def test_failures_are_one_line(opened):
    """Wrong revision, wrong commit, no such repository, pickles only: each names the model and what is wrong."""
    results, _, _ = opened
    for name, words in dict(wrong=["someone/full at v9", "RevisionNotFound"], commit=["c" * 40, "RevisionNotFound"], nobody=["someone/nothing", "RepositoryNotFound"],
                            pickles=["diffusion_pytorch_model.safetensors: no such file"]).items():
        kind, line = results[name]
        assert kind == "FileNotFoundError" and "\n" not in line, line
        for word in words: assert word in line


def test_a_repository_writes_nothing_outside_the_cache(opened):
    """A file name that climbs out of the snapshot ends in an error or is left out, and nothing appears elsewhere."""
    results, _, home = opened
    assert results["escape"][0] == "FileNotFoundError" and "\n" not in results["escape"][1]
    assert not list(home.parent.rglob("evil.json"))


def test_offline_says_so_at_once(opened, tmp_path):
    """Offline, what is in the cache opens and everything else is one line, without waiting."""
    results, _, home = opened
    start = time.monotonic()
    cached, other = open_there(home, "http://127.0.0.1:9", ["someone/full", COMMITS["a"]], ["someone/unknown", None], HF_HUB_OFFLINE="1")
    assert time.monotonic() - start < 60
    assert cached == results["pinned"]
    assert other[0] == "FileNotFoundError" and "someone/unknown" in other[1] and "offline" in other[1].lower() and "\n" not in other[1]


def test_a_dead_hub_does_not_hang(tmp_path):
    """A port that nobody listens on: one line, soon."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    start = time.monotonic()
    [(kind, line)] = open_there(tmp_path, f"http://127.0.0.1:{port}", ["someone/model", None])
    assert time.monotonic() - start < 60
    assert kind == "FileNotFoundError" and "someone/model" in line and "Connect" in line and "\n" not in line


def test_a_path_is_never_looked_up(tmp_path):
    """What looks like a path asks the Hub for nothing."""
    (tmp_path / "runs").mkdir()
    with hub({}) as (endpoint, asked):
        results = open_there(tmp_path, endpoint, *([name, None] for name in ("./a/b", "runs/model", "/a/b", "~/a", "a/b/c", "a", "a/b.safetensors", "a/b.ckpt", "../a")))
    assert {kind for kind, _ in results} == {"FileNotFoundError"} and asked == []
