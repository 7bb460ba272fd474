"""LoRA files change our networks as they change diffusers' and transformers', and leave no trace when they are taken out."""
import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_parts
from torch.testing import assert_close

from sd_nb.interop import save_diffusers
from sd_nb.lora import Loras, places, read_lora

UNET = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def model():
    "Always the same random weights"
    torch.manual_seed(0)
    return tiny_parts()


def randomly(shapes, seed=0):
    "Tensors of these shapes, of a size that matters"
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=g) / 8 for k, s in shapes.items()}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    "Our random weights opened by diffusers and given LoRA layers by PEFT: the pipeline, and their factors under PEFT's names"
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
    home, found = tmp_path_factory.mktemp("model"), {}
    save_diffusers(home, model())
    pipe = StableDiffusionPipeline.from_pretrained(home)
    for name, targets, alpha, seed in (("unet", UNET, 8, 1), ("text_encoder", TEXT, 2, 2)):
        net = getattr(pipe, name)
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, alpha_pattern={"conv1": 3} if name == "unet" else {}), net)
        state = randomly({k: v.shape for k, v in get_peft_model_state_dict(net).items()}, seed)
        set_peft_model_state_dict(net, state)
        found |= {f"{name}.{k}": v for k, v in state.items()}
    return home, pipe, found


def asked(pipe, parts):
    "What their and our networks answer"
    g = torch.Generator().manual_seed(5)
    x, t, context = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([3, 900]), torch.randn(2, 16, 24, generator=g)
    tokens = parts.tokenizer(["a red apple", "a cat on the moon"])
    with torch.no_grad():
        return ((pipe.unet(x, t, context).sample, parts.unet(x, t, context)),
                (pipe.text_encoder(tokens).last_hidden_state, parts.text_encoder(tokens)))


def about(pipe, *names):
    "The head that diffusers writes: PEFT's settings of each network"
    settings = {f"{name}.{k}": v for name in names for k, v in getattr(pipe, name).peft_config["default"].to_dict().items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(settings, default=sorted)}


def kohya(state, parts):
    "The same factors in kohya's layout, alpha as a tensor"
    out = {}
    for key, value in state.items():
        path, role = key.removesuffix(".weight").rsplit(".", 1)
        part, layer = path.split(".", 1)
        name = ("lora_unet_" if part == "unet" else "lora_te_text_model_") + layer.removeprefix("text_model.").replace(".", "_")
        out[f"{name}.{dict(lora_A='lora_down', lora_B='lora_up')[role]}.weight"] = value
        out[f"{name}.alpha"] = torch.tensor(3.0 if layer.endswith("conv1") else 8.0 if part == "unet" else 2.0)
    return out


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_peft_computes_what_we_merge(theirs, tmp_path, layout):
    """UNet and text encoder answer as with PEFT's layers beside them, alpha from the file's head or its own tensor."""
    _, pipe, state = theirs
    parts = model()
    before = asked(pipe, parts)
    if layout == "peft": save_file(state, tmp_path / "l.safetensors", about(pipe, "unet", "text_encoder"))
    else: save_file(kohya(state, parts), tmp_path / "l.safetensors")
    Loras(parts).load(tmp_path / "l.safetensors")
    for (a, b), (_, plain) in zip(asked(pipe, parts), before):
        assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert (b - plain).abs().max() > 0.1


@pytest.mark.parametrize("layout, scale", [("diffusers", 1.0), ("diffusers", 0.6), ("no alpha", 1.0), ("kohya", 1.0), ("kohya", -0.4)])
def test_diffusers_loads_the_same_file(theirs, tmp_path, layout, scale):
    """`load_lora_weights` of the same file gives the UNet the same answers, at any scale."""
    from diffusers import StableDiffusionPipeline
    home, trained, state = theirs
    parts, unet = model(), {k: v for k, v in state.items() if k.startswith("unet.")}
    if layout == "kohya":  # diffusers knows kohya's names of attention and feed-forward layers, and of few others
        unet = {k: v for k, v in unet.items() if "transformer_blocks" in k}
        save_file(kohya(unet, parts), tmp_path / "l.safetensors")
    elif layout == "diffusers": save_file(unet, tmp_path / "l.safetensors", about(trained, "unet"))
    else: save_file(unet, tmp_path / "l.safetensors")
    pipe = StableDiffusionPipeline.from_pretrained(home)
    logging.disable()
    pipe.load_lora_weights(tmp_path, weight_name="l.safetensors")
    logging.disable(logging.NOTSET)
    pipe.set_adapters(pipe.get_active_adapters(), scale)
    Loras(parts).load(tmp_path / "l.safetensors", scale)
    assert_close(*asked(pipe, parts)[0], atol=1e-5, rtol=1e-5)
    assert (asked(pipe, parts)[0][1] - asked(pipe, model())[0][1]).abs().max() > 0.1


@pytest.fixture
def files(tmp_path):
    "Two LoRA files for the whole tiny model"
    def write(name, seed, end=(".lora_A.weight", ".lora_B.weight"), r=2):
        parts, shapes = model(), {}
        for path, (part, weight) in places(parts).items():
            if "lora_" in path or path.startswith("text_encoder.text_model"): continue
            shape = getattr(parts, part).get_parameter(weight).shape
            shapes |= {path + end[0]: (r, *shape[1:]), path + end[1]: (shape[0], r, *[1] * (len(shape) - 2))}
        save_file(randomly(shapes, seed), tmp_path / name)
        return tmp_path / name
    return write


def bits(parts):
    return [v.clone() for net in (parts.unet, parts.text_encoder) for v in net.state_dict().values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unloading_returns_the_bits(files, dtype):
    """Whatever was loaded, in whatever order and at whatever scale: the original bits come back, and nothing is kept."""
    parts, one, two = model(), files("1.safetensors", 1), files("2.safetensors", 2)
    for net in (parts.unet, parts.text_encoder): net.to(dtype)
    start, loras = bits(parts), Loras(parts)
    loras.load(one, 1e3), loras.load(two, 0.7), loras.load(one, 0.3)
    both = bits(parts)
    assert len({*loras.loaded}) == 2 and any((a != b).any() for a, b in zip(start, both))
    loras.unload(one)
    only = bits(parts)
    fresh = model()
    for net in (fresh.unet, fresh.text_encoder): net.to(dtype)
    Loras(fresh).load(two, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(only, bits(fresh)))
    loras.unload(two)
    assert all(torch.equal(a, b) for a, b in zip(start, bits(parts))) and not loras.before and not loras.loaded


def test_scale_zero_changes_nothing(files):
    """At scale 0 the weights are the same bits."""
    parts = model()
    start = bits(parts)
    Loras(parts).load(files("1.safetensors", 1), 0)
    assert all(torch.equal(a, b) for a, b in zip(start, bits(parts)))


@pytest.mark.parametrize("end", [(".lora.down.weight", ".lora.up.weight"), (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")])
def test_older_words_mean_the_same(files, end):
    """diffusers' former names of the two factors."""
    parts = model()
    a, b = read_lora(files("1.safetensors", 1), parts), read_lora(files("2.safetensors", 1, end), parts)
    assert a.keys() == b.keys() and all(torch.equal(a[k].down, b[k].down) and torch.equal(a[k].up, b[k].up) for k in a)


ONE = "unet.conv_in"


@pytest.mark.parametrize("change, words", [
    (lambda s: s.update({f"other.layer{i}.lora_A.weight": torch.ones(1) for i in range(9)}), "no place for 9 of its keys: other.layer0.lora_A.weight, "),
    (lambda s: s.update({f"{ONE}.lora_magnitude_vector": torch.ones(1)}), f"{ONE}.lora_magnitude_vector"),
    (lambda s: s.update({"lora_unet_conv_in.hada_w1_a": torch.ones(1)}), "lora_unet_conv_in.hada_w1_a"),
    (lambda s: s.pop(f"{ONE}.lora_B.weight"), f"{ONE} has only down"),
    (lambda s: s.update({f"{ONE}.lora_B.weight": torch.ones(16, 3, 1, 1)}), f"{ONE}: factors (16, 3, 1, 1)"),
    (lambda s: s.update({f"{ONE}.lora_A.weight": torch.ones(2, 4, 1, 1)}), "do not fit (16, 4, 3, 3)"),
    (lambda s: s[f"{ONE}.lora_A.weight"].fill_(float("nan")), f"{ONE} holds NaN"),
    (lambda s: s.update({f"{ONE}.alpha": torch.tensor(float("inf"))}), f"alpha of {ONE} is inf"),
    (lambda s: s.update({f"{ONE}.alpha": torch.ones(3)}), "l.safetensors: "),
    (lambda s: s.update({f"{ONE}.lora_A.weight": torch.tensor(1.0)}), "l.safetensors: "),
    (lambda s: s.clear(), "holds no LoRA"),
], ids=str)
def test_a_strange_file_is_one_line_and_changes_nothing(files, tmp_path, change, words):
    """What is left over or does not fit is named; the model stays as it was."""
    state = load_file(files("l.safetensors", 1))
    change(state)
    save_file(state, tmp_path / "l.safetensors")
    parts = model()
    start, loras = bits(parts), Loras(parts)
    with pytest.raises(ValueError) as error: loras.load(tmp_path / "l.safetensors")
    assert words in str(error.value) and "l.safetensors" in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(start, bits(parts))) and not loras.loaded


@pytest.mark.parametrize("head", ["[1]", "{", '{"unet.lora_alpha": "strong"}', '{"unet.lora_alpha": null}', '{"unet.alpha_pattern": 3}', '{"unet.lora_alpha": NaN}'])
def test_a_strange_head_is_one_line(files, tmp_path, head):
    """The metadata comes from a stranger: what is not the expected kind is refused."""
    save_file(load_file(files("l.safetensors", 1)), tmp_path / "l.safetensors", {"lora_adapter_metadata": head})
    with pytest.raises(ValueError, match=r"l\.safetensors") as error: Loras(model()).load(tmp_path / "l.safetensors")
    assert "\n" not in str(error.value)


def test_a_pickle_is_not_opened(tmp_path):
    """Only safetensors: a file of torch.save is refused unread, a missing one named, and a scale must be a number."""
    torch.save({"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3)}, tmp_path / "l.pt")
    loras = Loras(model())
    with pytest.raises(ValueError, match=r"l\.pt is damaged or no safetensors"): loras.load(tmp_path / "l.pt")
    with pytest.raises(FileNotFoundError, match="none"): loras.load(tmp_path / "none.safetensors")
    for scale in (float("nan"), float("inf"), "1"):
        with pytest.raises(ValueError, match="scale"): loras.load(tmp_path / "l.pt", scale)
    with pytest.raises(ValueError, match="no LoRA .* is loaded"): loras.unload("other")
