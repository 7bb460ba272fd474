"""Weights that are damaged, that lie or that bite: one line that names the file, nothing partly loaded, nothing executed."""

import json
import pickle
import re
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from sd_nb import seed
from sd_nb.interop import fill, load_diffusers, load_unet, read_weights, save_diffusers, save_unet
from sd_nb.opening import open_parts
from sd_nb.single_file import pack, read_checkpoint, read_single_file, save_single_file, SECTIONS
from tiny import tiny_parts

PARTS = tiny_parts()


def one_line(error, name):
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000 and str(name) in str(error.value)
    return str(error.value)


@pytest.fixture(params=["directory", "single file"])
def model(request, tmp_path):
    """A model to be opened, and the file in it that holds the UNet."""
    if request.param == "directory":
        save_diffusers(tmp_path / "model", PARTS)
        return tmp_path / "model", tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    save_single_file(tmp_path / "model.safetensors", PARTS)
    PARTS.tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "model.safetensors", tmp_path / "model.safetensors"


def rewrite(file, change):
    """Change the tensors of a file, keep what stands beside them."""
    state, words = read_checkpoint(file)
    state = {k: v.clone() for k, v in state.items()}
    change(state, next(k for k in state if k in ("conv_norm_out.bias", "model.diffusion_model.out.0.bias")))
    save_file(state, file, words)


def reheader(file, change):
    """Change the header of a safetensors file, not the numbers; `change` gets and returns a dict or bytes."""
    raw = file.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    header = change(json.loads(raw[8:8 + n]))
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + n:])


def test_the_model_opens_undamaged(model):
    """What the other tests damage is whole before."""
    assert open_parts(model[0]).unet.conv_out.bias.equal(PARTS.unet.conv_out.bias)


@pytest.mark.parametrize("change, words", [
    (lambda s, k: s.pop(k), "1 missing (KEY)"),
    (lambda s, k: s.update(surprise=torch.zeros(1)), "1 unexpected (surprise)"),
    (lambda s, k: s.update({k: torch.zeros(3)}), "1 wrong shape (KEY (3,) instead of (16,))"),
    (lambda s, k: s.update({k: torch.zeros(16, dtype=torch.int32)}), "1 of a strange type (KEY)"),
    (lambda s, k: s[k].fill_(torch.nan), "1 with NaN or infinity (KEY)"),
    (lambda s, k: s[k].fill_(-torch.inf), "1 with NaN or infinity (KEY)"),
], ids=["missing key", "extra key", "wrong shape", "wrong type", "NaN", "infinity"])
def test_wrong_tensors_are_listed(model, change, words):
    """A tensor too few, too many, of another shape or type, or with numbers that are none, is named as the file names it."""
    source, file = model
    name = "model.diffusion_model.out.0.bias" if source == file else "conv_norm_out.bias"
    rewrite(file, change)
    with pytest.raises(ValueError, match=re.escape(words.replace("KEY", name))) as error: open_parts(source)
    one_line(error, source)


def test_all_faults_are_told_at_once(model):
    """One report lists everything that is wrong with the weights."""
    source, file = model
    rewrite(file, lambda s, k: s.update(surprise=s.pop(k)))
    with pytest.raises(ValueError, match="1 missing .*; 1 unexpected"): open_parts(source)


def first(header): return next(k for k in header if k != "__metadata__")


def change_first(header, **new):
    return header | {first(header): header[first(header)] | new}


def overlap(header):
    spans = sorted((v["data_offsets"], k) for k, v in header.items() if k != "__metadata__")
    (a, b), k = spans[1]
    return header | {k: header[k] | dict(data_offsets=[a - 4, b - 4])}


def hole(header):
    last = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
    k = next(k for k, v in header.items() if k != "__metadata__" and v["data_offsets"][1] == last)
    return header | {k: header[k] | dict(data_offsets=[o + 8 for o in header[k]["data_offsets"]])}


def twice(header):
    k = first(header)
    return json.dumps(header)[:-1].encode() + b"," + json.dumps(k).encode() + b":" + json.dumps(header[k]).encode() + b"}"


LIES = {
    "truncated": lambda f: f.write_bytes(f.read_bytes()[:-100]), "zero bytes": lambda f: f.write_bytes(b""), "stump": lambda f: f.write_bytes(f.read_bytes()[:5]),
    "garbage": lambda f: f.write_bytes(b"no weights at all" * 10), "zeros": lambda f: f.write_bytes(bytes(1000)), "tail": lambda f: f.write_bytes(f.read_bytes() + b"more"),
    "huge header": lambda f: f.write_bytes(struct.pack("<Q", 2**62) + f.read_bytes()[8:]), "large header": lambda f: f.write_bytes(struct.pack("<Q", 99_000_000) + f.read_bytes()[8:]),
    "overlap": lambda f: reheader(f, overlap), "hole": lambda f: reheader(f, hole), "duplicate key": lambda f: reheader(f, twice),
    "beyond the file": lambda f: reheader(f, lambda h: change_first(h, data_offsets=[0, 2**40])), "negative": lambda f: reheader(f, lambda h: change_first(h, data_offsets=[-8, 0])),
    "backwards": lambda f: reheader(f, lambda h: change_first(h, data_offsets=[8, 0])), "overflow": lambda f: reheader(f, lambda h: change_first(h, shape=[2**62, 2**62])),
    "unknown type": lambda f: reheader(f, lambda h: change_first(h, dtype="F99")), "other type": lambda f: reheader(f, lambda h: change_first(h, dtype="F16")),
    "deep": lambda f: reheader(f, lambda h: b"[" * 100_000), "no object": lambda f: reheader(f, lambda h: b"[]"), "no tensor": lambda f: reheader(f, lambda h: h | dict(x=3)),
}


@pytest.mark.parametrize("lie", LIES)
def test_fault_10_lying_files_are_refused(model, lie):
    """A file whose table does not fit its bytes is named, in one line."""
    source, file = model
    LIES[lie](file)
    with pytest.raises(ValueError, match="damaged or no safetensors") as error: open_parts(source)
    one_line(error, file)


def test_a_lie_about_the_type_of_equal_size_is_found(model):
    """Floats declared as whole numbers pass the format's own checks, not ours."""
    source, file = model
    reheader(file, lambda h: h | {k: v | dict(dtype="I32") for k, v in h.items() if k in ("conv_norm_out.bias", "model.diffusion_model.out.0.bias")})
    with pytest.raises(ValueError, match="1 of a strange type"): open_parts(source)


def test_eight_bit_numbers_are_converted_or_refused(model):
    """float8 weights become float32; left as they are they are refused, not computed with."""
    source, file = model
    rewrite(file, lambda s, k: s.update({k: s[k].to(torch.float8_e4m3fn)}))
    assert open_parts(source).unet.norm_out.bias.dtype == torch.float32
    with pytest.raises(ValueError, match="1 of a strange type"): open_parts(source, dtype=None)


def test_a_refused_file_leaves_the_network_untouched():
    """`fill` compares first: after an error every parameter is the very tensor that it was."""
    unet = tiny_parts().unet
    before = {k: (v.data_ptr(), v.clone()) for k, v in unet.state_dict().items()}
    good = {k: torch.zeros_like(v) for k, v in unet.state_dict().items()}
    for bad in (dict(list(good.items())[:-1]), good | dict(more=torch.zeros(1)), good | {"conv_in.bias": torch.full((16,), torch.nan)}, good | {"conv_in.bias": torch.zeros(3)}):
        with pytest.raises(ValueError, match="file: 1 "): fill(unet, bad, {}, "file")
        assert all(v.data_ptr() == before[k][0] and v.equal(before[k][1]) for k, v in unet.state_dict().items())


def shard(directory):
    """Cut a UNet into two files with an index."""
    save_unet(directory, PARTS.unet)
    folder = directory / "unet"
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    half = len(state) // 2
    where = {k: f"part-{int(i >= half)}.safetensors" for i, k in enumerate(state)}
    for name in set(where.values()): save_file({k: v for k, v in state.items() if where[k] == name}, folder / name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(dict(weight_map=where)))
    return folder, where


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "sub/x.safetensors", "..", "", 3, None])
def test_an_index_may_not_name_files_elsewhere(tmp_path, name):
    """An index of shards that points out of its directory is refused although the file is there."""
    folder, where = shard(tmp_path)
    (folder / "part-1.safetensors").rename(tmp_path / "outside.safetensors")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map={k: name if v == "part-1.safetensors" else v for k, v in where.items()})))
    with pytest.raises((ValueError, FileNotFoundError)) as error: load_unet(tmp_path)
    one_line(error, folder)
    for words in ("[]", "{}", '{"weight_map": []}', "{"):
        index.write_text(words)
        with pytest.raises(ValueError) as error: load_unet(tmp_path)
        one_line(error, index)


def test_a_missing_shard_is_named(tmp_path):
    """A shard that the index names and that is not there."""
    folder, _ = shard(tmp_path)
    assert load_unet(tmp_path).conv_out.bias.equal(PARTS.unet.conv_out.bias)
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="part-1.safetensors: no such file") as error: load_unet(tmp_path)
    one_line(error, folder)


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function, *args): self.how = function, args

    def __reduce__(self): return self.how


def write_canary(path): return f"open({str(path)!r}, 'w').close()"


def nested(path):
    """A storage that is a pickle of its own, which torch opens without any check."""
    inside = pickle.dumps(Call(exec, write_canary(path)))
    return Call(torch.storage._load_from_bytes, inside)


PAYLOADS = {
    "exec": lambda path: {"state_dict": {"w": Call(exec, write_canary(path))}},
    "eval": lambda path: {"state_dict": {"w": torch.ones(1)}, "epoch": Call(eval, write_canary(path))},
    "system": lambda path: Call(__import__("os").system, f"touch {path}"),
    "nested storage": lambda path: {"state_dict": {"w": nested(path)}},
    "tensor of code": lambda path: {"state_dict": {"w": Call(torch._utils._rebuild_tensor_v2, Call(exec, write_canary(path)), 0, (1,), (1,), False, None)}},
    "lightning": lambda path: {"callbacks": {Call(exec, write_canary(path)): 1}, "state_dict": {"w": torch.ones(1)}},
    "seed": lambda path: {"ema_state_dict": {"shadow": {"w": Call(exec, write_canary(path))}}},
}


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_fault_09_a_pickle_runs_nothing(tmp_path, payload, zipped, suffix):
    """A canary file that a checkpoint would make when opened is not made, with or without `allow_pickle`; plain `torch.load` makes it."""
    if payload == "seed" and not hasattr(seed, "load_seed"): pytest.skip("sd_nb.seed opens no checkpoints yet")
    canary, file = tmp_path / "canary", tmp_path / f"model{suffix}"
    torch.save(PAYLOADS[payload](canary), file, _use_new_zipfile_serialization=zipped)
    PARTS.tokenizer.save_pretrained(tmp_path / "tokenizer")
    for allow in (False, True):
        with pytest.raises((ValueError, FileNotFoundError)) as error: open_parts(file, allow_pickle=allow, parts_from=tmp_path)
        one_line(error, tmp_path)
        with pytest.raises(ValueError): read_checkpoint(file, allow)
        assert not canary.exists()
    try: torch.load(file.rename(tmp_path / "plain"), weights_only=False)
    except Exception: pass  # what the payload leaves behind need not be a tensor
    assert canary.exists()


def ckpt(path, state=None, **more):
    sections = dict(unet=PARTS.unet, autoencoder=PARTS.autoencoder, clip=PARTS.text_encoder)
    state = state or {k: v.detach() for name, net in sections.items() for k, v in pack(SECTIONS[name], net).items()}
    torch.save(dict(state_dict=state, epoch=3, global_step=7, **more), path)
    return path


def about():
    from sd_nb.single_file import describe
    return describe(PARTS)


def test_a_pickle_needs_permission(tmp_path):
    """A plain checkpoint is refused with a line that says how to open it, and opens so, bit for bit."""
    file = ckpt(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"allow_pickle=True \(--allow-pickle\)") as error: open_parts(file)
    one_line(error, file)
    networks, _ = read_single_file(file, allow_pickle=True, about=about())
    for name, network in networks.items():
        for k, v in getattr(PARTS, name).state_dict().items(): assert network.state_dict()[k].equal(v), k


def test_a_renamed_safetensors_file_needs_none(tmp_path):
    """What is inside counts, not the name."""
    save_single_file(tmp_path / "model.safetensors", PARTS)
    file = (tmp_path / "model.safetensors").rename(tmp_path / "model.ckpt")
    assert read_single_file(file)[0]["unet"].conv_in.bias.equal(PARTS.unet.conv_in.bias)


def test_the_trainers_class_name_is_read_as_a_name(tmp_path, monkeypatch):
    """The first published checkpoints name a class of their trainer beside the weights; it is neither imported nor made."""
    import types
    parts = "pytorch_lightning.callbacks.model_checkpoint".split(".")
    for i in range(len(parts)): monkeypatch.setitem(sys.modules, ".".join(parts[:i + 1]), types.ModuleType(parts[i]))
    ModelCheckpoint = type("ModelCheckpoint", (), dict(__module__=".".join(parts)))
    sys.modules[".".join(parts)].ModelCheckpoint = ModelCheckpoint
    file = ckpt(tmp_path / "model.ckpt", callbacks={ModelCheckpoint: dict(monitor="val")})
    monkeypatch.undo()
    with pytest.raises(pickle.UnpicklingError): torch.load(file, weights_only=True)
    assert read_single_file(file, allow_pickle=True, about=about())[0]["unet"].conv_in.bias.equal(PARTS.unet.conv_in.bias)
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)
    with pytest.raises(pickle.UnpicklingError): torch.load(file, weights_only=True)  # the permission has ended


@pytest.mark.parametrize("what", [3, [1], {"w": "text"}, {1: torch.ones(1)}, {"state_dict": 3}, {"state_dict": {"w": [torch.ones(1)]}}], ids=str)
def test_a_pickle_of_something_else_is_refused(tmp_path, what):
    """Only a dictionary of names and tensors is a checkpoint."""
    torch.save(what, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of plain tensors") as error: read_checkpoint(tmp_path / "x.ckpt", True)
    one_line(error, tmp_path / "x.ckpt")


def test_a_pickle_that_contains_itself_ends(tmp_path):
    """A state dict whose state dict is itself."""
    what = {}
    what["state_dict"] = what
    torch.save(what, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of plain tensors"): read_checkpoint(tmp_path / "x.ckpt", True)


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[:200], lambda b: b[:2], lambda b: b.replace(b"torch", b"trch_")], ids=["truncated", "cut", "stump", "renamed"])
def test_a_damaged_pickle_is_refused(tmp_path, damage):
    """A torn archive is one line that names the file."""
    file = ckpt(tmp_path / "x.ckpt")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="no checkpoint of plain tensors") as error: read_checkpoint(file, True)
    one_line(error, file)


LIMIT = """
import resource, sys, torch
from sd_nb.single_file import read_checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: read_checkpoint(sys.argv[1], True)
except ValueError as error: print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("kind", ["stretched", "huge header"])
def test_memory_is_bounded(tmp_path, kind):
    """A few bytes that describe a tensor of terabytes, or a table of contents of exabytes, are refused in little memory."""
    file = tmp_path / "x.ckpt"
    if kind == "stretched": ckpt(file, {"model.diffusion_model.out.2.weight": torch.ones(1).expand(2**20, 2**20)})
    else: file.write_bytes(struct.pack("<Q", 2**61) + b"{" * 1000)
    out = subprocess.run([sys.executable, "-c", LIMIT, file], capture_output=True, text=True, timeout=120).stdout.splitlines()
    assert str(file) in out[0] and ("more numbers than it holds" in out[0] or "damaged" in out[0])
    assert int(out[1]) < 100  # MB


def test_many_names_for_one_storage_are_refused(tmp_path):
    """Ten thousand views of one tensor would become ten thousand tensors."""
    w = torch.ones(100)
    ckpt(tmp_path / "x.ckpt", {f"w{i}": w for i in range(10_000)})
    with pytest.raises(ValueError, match="more numbers than it holds"): read_checkpoint(tmp_path / "x.ckpt", True)


def test_a_zip_bomb_is_not_inflated(tmp_path):
    """A checkpoint whose program is 70 MB of zeros, packed small, is passed over when we look for its kind."""
    from sd_nb.opening import is_seed
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as f:
            for _ in range(70): f.write(bytes(2**20))
            f.write(b"ema_state_dict")
    assert (tmp_path / "x.pt").stat().st_size < 2**20 and not is_seed(tmp_path / "x.pt")


def test_random_damage_never_does_worse_than_one_line(model):
    """Forty flipped bits in the header: each time the model opens or is refused in one line, never a crash or a strange error."""
    source, file = model
    raw, g, outcomes = file.read_bytes(), torch.Generator().manual_seed(0), set()
    n = struct.unpack("<Q", raw[:8])[0]
    for _ in range(40):
        at, bit = int(torch.randint(8 + n, (), generator=g)), int(torch.randint(8, (), generator=g))
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1:])
        try: open_parts(source)
        except ValueError as error: outcomes.add(type(error).__name__); assert "\n" not in str(error) and str(source) in str(error)
        else: outcomes.add("opened")
    assert "ValueError" in outcomes


def test_bytes_of_a_truncated_save_are_never_taken_for_weights(tmp_path):
    """Every proper beginning of a file is refused."""
    raw = save(dict(a=torch.arange(4.0), b=torch.ones(3)))
    for n in range(len(raw)):
        (tmp_path / "x.safetensors").write_bytes(raw[:n])
        with pytest.raises(ValueError, match="damaged"): read_weights(tmp_path / "x.safetensors")


def test_load_diffusers_loads_nothing_partly(tmp_path):
    """A model whose last part is damaged gives no part at all."""
    save_diffusers(tmp_path / "model", PARTS)
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(ValueError, match="scheduler_config.json is not valid JSON"): load_diffusers(tmp_path / "model")
