"""Adapters are trained alone, change nothing before the first step, and end in a file that diffusers reads as we do."""
import json
import logging

import pytest
import torch
from few import SMALL, few_shards, small_config, torchrun
from parity import randomise
from safetensors.torch import load_file
from tiny import CAPTIONS, tiny_parts
from torch.testing import assert_close

from sd_nb.interop import Parts, Sampling, load_diffusers, save_diffusers
from sd_nb.lora import Loras, read_lora
from sd_nb.model.autoencoder import Autoencoder
from sd_nb.model.clip import TextEncoder
from sd_nb.model.tokenizer import Tokenizer
from sd_nb.model.unet import UNet
from sd_nb.seed import SeedConfig, SeedUNet
from sd_nb.train.__main__ import main
from sd_nb.train.adapters import Adapters, save_lora

FILE = "pytorch_lora_weights.safetensors"


def parts_of_a_model():
    "Always the same random weights"
    torch.manual_seed(0)
    return tiny_parts()


def answers(unet, width):
    "What a UNet, ours or diffusers', says about fixed noise and words"
    g = torch.Generator().manual_seed(5)
    x, t, context = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([3, 900]), torch.randn(2, 16, width, generator=g)
    with torch.no_grad(): out = unet(x, t, context)
    return getattr(out, "sample", out)


def trained(unet, rank=4, steps=3, width=24):
    "Adapters after a few steps on noise"
    torch.manual_seed(0)
    adapters, g = Adapters(unet, rank), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(adapters.parameters(), 0.05)
    for _ in range(steps):
        x, context, target = (torch.randn(s, generator=g) for s in ((2, 4, 8, 8), (2, 16, width), (2, 4, 8, 8)))
        optimizer.zero_grad()
        (adapters(x, torch.tensor([100, 500]), context) - target).square().mean().backward()
        optimizer.step()
    return adapters


def test_step_zero_changes_nothing_and_only_adapters_learn():
    "The same bits come out before training; afterwards every adapter has moved and no weight of the network"
    unet = parts_of_a_model().unet
    before, weights = answers(unet, 24), {k: v.clone() for k, v in unet.state_dict().items()}
    fresh = Adapters(parts_of_a_model().unet, 4)
    assert torch.equal(answers(fresh, 24), before)
    start = {k: v.clone() for k, v in trained(parts_of_a_model().unet, steps=0).state_dict().items()}
    adapters = trained(unet)
    assert all((start[k] != v).any() for k, v in adapters.state_dict().items())
    after = {k.replace(".layer.", "."): v for k, v in unet.state_dict().items() if ".change." not in k}
    assert after.keys() == weights.keys() and all(torch.equal(after[k], v) for k, v in weights.items())
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in adapters.parameters()}
    assert (answers(adapters, 24) - before).abs().max() > 0.1


def diffusers_with(model, lora):
    "The UNet of a model directory as diffusers builds it and changes it"
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(model)
    logging.disable()
    pipe.load_lora_weights(lora)
    logging.disable(logging.NOTSET)
    return pipe.unet


def ours_with(model, lora):
    "The UNet of a model directory as we build it and change it"
    parts = load_diffusers(model)
    Loras(parts).load(lora / FILE)
    return parts.unet


def test_diffusers_and_our_loader_compute_what_was_trained(tmp_path):
    "A file of trained adapters gives diffusers' UNet, and ours, the answers of the adapted network to 1e-5"
    parts = parts_of_a_model()
    save_diffusers(tmp_path / "model", parts)
    adapters = trained(parts.unet)
    assert save_lora(tmp_path / "lora", adapters) == tmp_path / "lora" / FILE
    want = answers(adapters, 24)
    for load in (diffusers_with, ours_with): assert_close(answers(load(tmp_path / "model", tmp_path / "lora"), 24), want, atol=1e-5, rtol=1e-5)


def test_every_attention_projection_has_its_place(tmp_path):
    "Four projections of self- and cross-attention in every transformer, under diffusers' names"
    adapters = Adapters(parts_of_a_model().unet, 2)
    names = load_file(save_lora(tmp_path, adapters))
    ends = {name.split("transformer_blocks.0.")[1] for name in names}
    assert ends == {f"attn{i}.{p}.lora_{f}.weight" for i in (1, 2) for p in ("to_q", "to_k", "to_v", "to_out.0") for f in "AB"}
    assert all(name.startswith("unet.") for name in names) and len(names) == len(adapters.state_dict())


def test_the_seed_unet_is_adapted_too(tmp_path):
    "Our loader reads a file of the other family's UNet"
    def new():
        torch.manual_seed(0)
        return randomise(SeedUNet(SeedConfig(width=16, mults=(1, 2), attn=(False, True), blocks=1, heads=2, d_context=24, groups=8)))
    adapters, plain = trained(new()), tiny_parts()._replace(unet=new())
    Loras(plain).load(save_lora(tmp_path, adapters))
    assert_close(answers(plain.unet, 24), answers(adapters, 24), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A tiny data set and a model directory with random weights"
    home, config = tmp_path_factory.mktemp("world"), small_config()
    text = config.clip.text
    networks = (UNet(config.unet), Autoencoder(config.autoencoder), TextEncoder(text))
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size=text.vocab, window=text.window)
    save_diffusers(home / "base", Parts(*(randomise(n, i) for i, n in enumerate(networks)), tokenizer, Sampling(size=16)))
    return few_shards(home / "few", 60), home / "base"


def words(world, run, steps, *more):
    data, base = world
    found = ["tiny", *SMALL, "--run", run, "--data", data, "--steps", steps, "--batch", 8, "--lr", "0.02",
             "--init-from", base, "--lora", 4, "--sample-every", 1000, *more]
    return [str(w) for w in found]


def test_a_run_ends_in_a_file_that_diffusers_loads(world, tmp_path):
    "`--init-from MODEL --lora 4` leaves `model/` as it was, writes `lora/`, and checkpoints hold the adapters alone"
    run = tmp_path / "run"
    assert main(words(world, run, 4)) == 0
    base, kept = (load_file(m / "unet" / "diffusion_pytorch_model.safetensors") for m in (world[1], run / "model"))
    assert base.keys() == kept.keys() and all(torch.equal(base[k], kept[k]) for k in base)
    checkpoint = run / "checkpoints" / "step-0000004"
    file, model, ema = load_file(run / "lora" / FILE), *(load_file(checkpoint / f"{n}.safetensors") for n in ("model", "ema"))
    sizes = [sum(v.numel() for v in state.values()) for state in (file, model, ema)]
    assert sizes[0] == sizes[1] == sizes[2] < sum(v.numel() for v in base.values()) / 3
    assert all(len(d.down) == 4 for d in read_lora(run / "lora" / FILE, load_diffusers(run / "model")).values())
    theirs, ours, plain = (answers(u, 32) for u in (diffusers_with(world[1], run / "lora"), ours_with(world[1], run / "lora"), load_diffusers(world[1]).unet))
    assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert (ours - plain).abs().max() > 1e-3


def same_files(a, b):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in (
        f"lora/{FILE}", *(f"checkpoints/step-0000004/{n}.safetensors" for n in ("model", "ema", "optimizer"))))


def test_resume_is_bitwise(world, tmp_path):
    "Two steps and two more are four: adapters, average, moments, losses and the exported file"
    for run, steps in (("whole", 4), ("parts", 2), ("parts", 4)): assert main(words(world, tmp_path / run, steps)) == 0
    assert same_files(tmp_path / "whole", tmp_path / "parts")
    whole, parts = ([json.loads(line)["loss"] for line in open(tmp_path / run / "metrics.jsonl")] for run in ("whole", "parts"))
    assert whole == parts and len(whole) == 4


@pytest.mark.slow
def test_two_processes_train_the_same_adapters(world, tmp_path):
    "Two gloo ranks end with the adapters of one to 1e-4"
    for n, run in ((1, "one"), (2, "two")): torchrun(n, *words(world, tmp_path / run, 4))
    one, two = (load_file(tmp_path / run / "lora" / FILE) for run in ("one", "two"))
    for name, value in one.items(): assert_close(value, two[name], atol=1e-4, rtol=1e-3)


def refused(capsys, args):
    with pytest.raises(SystemExit) as stop: main([str(a) for a in args])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_mistakes_are_one_line(world, tmp_path, capsys):
    "No model to change, another network than the UNet, a negative rank: refused before anything is written"
    run, start = tmp_path / "run", ["tiny", "--run", tmp_path / "run"]
    assert "--lora 4 needs --init-from" in refused(capsys, [*start, "--lora", 4])
    assert "and --stage unet" in refused(capsys, [*start, "--lora", 4, "--init-from", world[1], "--stage", "clip"])
    assert "--lora -1 must be 0 or more" in refused(capsys, [*start, "--lora", -1])
    assert not run.exists()


def test_a_run_keeps_its_rank_and_its_base(world, tmp_path, capsys):
    "Stored adapters are nothing without the model that they change: another base or rank is refused"
    assert main(words(world, tmp_path / "run", 1)) == 0
    other = tmp_path / "other"
    other.symlink_to(world[1])
    assert "init_from" in refused(capsys, words((world[0], other), tmp_path / "run", 2))
    line = refused(capsys, words(world, tmp_path / "run", 2, "--lora", 8, "--allow-changes"))
    assert "another shape (lora 4 -> 8)" in line
