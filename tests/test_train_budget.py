"""What a run will cost, counted without running it, and held against real runs and published figures."""
import json
from dataclasses import replace

import pytest
import torch
from few import small_config

from sd_nb.config import PRESETS, SEED
from sd_nb.model.unet import recompute_blocks
from sd_nb.train.__main__ import main
from sd_nb.train.budget import budget, memory, rehearsal, walk

CONFIG = small_config(recipes=PRESETS["tiny"].recipes, precision="float32")


def kept_in_earnest(net, inputs):
    "Bytes that autograd keeps in a real forward pass, without the weights, each storage once"
    own, seen = {p.untyped_storage().data_ptr() for p in net.parameters()}, {}
    def pack(t):
        if t.untyped_storage().data_ptr() not in own: seen[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): net(*[torch.zeros_like(x) for x in inputs])
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("stage", ["autoencoder", "clip", "unet"])
def test_fake_tensors_keep_what_real_ones_keep(stage):
    "The bytes of a walk are those of a real forward pass, and recomputing keeps less"
    plain, less = (walk(replace(CONFIG, checkpointing=c), stage, 3)["activations"] for c in (False, True))
    assert plain == kept_in_earnest(*rehearsal(CONFIG, stage, 3)) > 0
    assert less < 0.7 * plain if stage == "unet" else less <= plain


def test_recomputing_really_forgets_that_much():
    "With `recompute_blocks` switched on autograd keeps no more than the estimate says"
    net, inputs = rehearsal(CONFIG, "unet", 3)
    between_blocks = kept_in_earnest(recompute_blocks(net), inputs)
    estimate = walk(replace(CONFIG, checkpointing=True), "unet", 3)["activations"]
    assert between_blocks < estimate < 3 * between_blocks


def test_activations_grow_with_the_pictures_and_work_does_not():
    "Twice the pictures keep nearly twice as much; operations are per picture"
    one, two = (walk(CONFIG, "unet", b) for b in (4, 8))
    assert two["activations"] / one["activations"] == pytest.approx(2, rel=0.02) and one["forward"] == two["forward"]


def test_memory_adds_up():
    "Five copies of the weights in float32, and the activations"
    parts = memory(dict(parameters=10**9, activations=3 * 10**9))
    assert parts == dict(weights=4, gradients=4, moments=8, average=4, activations=3, total=23)


def test_processes_and_pieces_divide_the_activations(monkeypatch):
    "Two processes with two pieces each keep a quarter of the pictures; torchrun's number of processes is the default"
    config = replace(CONFIG, stage="autoencoder", batch=16)
    whole, cut = budget(config, "autoencoder", 1), budget(replace(config, accumulate=2), "autoencoder", 2)
    assert cut["gpu_hours"] == whole["gpu_hours"] and cut["processes"] == 2
    assert [c["memory_gb"] for c in (whole, cut)] == [memory(walk(config, "autoencoder", n)) for n in (16, 4)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert budget(config, "autoencoder")["processes"] == 2


def test_the_seeds_run_costs_what_its_author_reports():
    "Two cards, 24 pictures each: 15.6 GB of copies, below the 25.3 GB that were reserved; its phases add up to about 116 GPU-hours"
    cost = budget(replace(SEED, checkpointing=True, accumulate=2), "unet", processes=2)
    parts = cost["memory_gb"]
    assert parts["total"] - parts["activations"] == pytest.approx(15.61, abs=0.03)
    assert 1.2 * (parts["total"] + 0.5 + 0.34) == pytest.approx(25.3, rel=0.15)  # allocator; text encoder and autoencoder
    assert cost["gpu_hours"]["RTX 5090"] == pytest.approx(116, rel=0.25)


def test_stable_diffusion_costs_what_is_known():
    "859,520,964 parameters, 17.2 GB of copies, 0.68 TFLOP forward at 512 pixels"
    walked = walk(replace(PRESETS["sd1"], checkpointing=True), "unet", 1)
    assert walked["parameters"] == 859_520_964 and walked["forward"] == pytest.approx(0.677e12, rel=0.01)
    parts = memory(walked)
    assert parts["total"] - parts["activations"] == pytest.approx(17.19, abs=0.03)


def test_dry_run_prints_the_budget_once(tmp_path, capsys, monkeypatch):
    "`--dry-run` says memory and time of each stage, on the first process only"
    words = ["tiny", "--dry-run", "--run", str(tmp_path / "run"), "--stage", "autoencoder"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(words) == 0 and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert 0 < plan["autoencoder"]["memory_gb"]["total"] < 1 and plan["autoencoder"]["processes"] == 2
