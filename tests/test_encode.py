"""Encoding by any number of processes, killed at any moment: the same bytes, or one clear line."""
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa, pyarrow.parquet as pq
import pytest
import torch

import sd_nb
import sd_nb.data.latents as latents
from sd_nb.data.emoji import embedded
from sd_nb.data.encode import Encode, Encoding, encode_share, find_jobs, gather, main, wait_for_others
from sd_nb.data.images import crop, read_shards, square, write_shards
from sd_nb.data.loader import Packed
from sd_nb.interop import load_autoencoder

MODEL = Path(sd_nb.__file__).parent / "assets" / "model"


@pytest.fixture(scope="module")
def autoencoder(): return load_autoencoder(MODEL).eval()


@pytest.fixture(scope="module")
def samples(): return [o for i, o in zip(range(96), read_shards(embedded())) if i % 4 == 0]


@pytest.fixture(scope="module")
def shards(samples, tmp_path_factory):
    "Twenty-four embedded pictures in five shards, the last one short"
    write_shards(samples, out := tmp_path_factory.mktemp("encode") / "shards", per_shard=5)
    return out


@pytest.fixture(scope="module")
def whole(shards, autoencoder, tmp_path_factory):
    "What one process makes of them, undisturbed"
    return run(Encoding(shards, tmp_path_factory.mktemp("whole") / "latents", autoencoder, 32, batch=3))


def run(encoding, world=1):
    "Do what `world` processes would do, one after the other, the last one first"
    for rank in reversed(range(world)): encode_share(encoding, rank, world, quiet=True)
    gather(encoding)
    return encoding.out


def contents(directory):
    "Every file's bytes, hidden ones too"
    return {str(o.relative_to(directory)): o.read_bytes() for o in directory.rglob("*") if o.is_file()}


def command(*args, **env):
    "Start the command in a session of its own"
    env = {**os.environ, "PYTHONPATH": str(Path(sd_nb.__file__).parent.parent), "OMP_NUM_THREADS": "1", **env}
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    return subprocess.Popen([sys.executable, *map(str, args)], env=env, **options)


ENCODE = ("-m", "sd_nb.data.encode")


def test_what_is_packed_are_the_moments_of_the_pictures(shards, samples, autoencoder, whole):
    "Mean and log-variance, not scaled, with the scale and the statistics beside them; the loader opens it"
    packed = Packed(whole, verify=True)
    x = latents.to_float(np.stack([np.asarray(square(o.image, 32)).transpose(2, 0, 1) for o in samples]))
    with torch.no_grad(): want = autoencoder.encode(x)
    torch.testing.assert_close(torch.tensor(packed[:]).float(), torch.cat([want.mean, want.logvar], 1), rtol=1e-3, atol=1e-2)
    assert packed.captions == [o.caption for o in samples] and packed.meta["key"].to_pylist() == [o.key for o in samples]
    manifest = packed.manifest
    assert manifest["scale"] == autoencoder.config.scale and manifest["count"] == 24
    z = latents.sample_latents(packed[:], torch.randn(24, 4, 8, 8, generator=torch.Generator().manual_seed(0)), manifest["scale"])
    assert abs(manifest["statistics"]["mean"] - z.mean()) < 0.01 and abs(manifest["statistics"]["deviation"] - z.std()) < 0.01
    assert manifest["statistics"]["slope"] > 0.9
    assert json.loads((whole / "funnel.json").read_text()) == [dict(step="encode", asked=24, kept=24, dropped={})]


@pytest.mark.parametrize("world", [2, 3, 7])
def test_any_number_of_processes_gives_the_same_bytes(shards, autoencoder, whole, tmp_path, world):
    "Also when there are more of them than shards"
    assert contents(run(Encoding(shards, tmp_path / "z", autoencoder, 32, batch=3), world)) == contents(whole)


@pytest.mark.slow
def test_real_processes_give_the_same_bytes(shards, whole, tmp_path):
    "Two that nobody coordinates: the first is ready before the second begins, and waits"
    args = (*ENCODE, shards, tmp_path / "z", "--size", 32, "--batch", 3)
    two = [command(*args, RANK="0", WORLD_SIZE="2")]
    while two[0].poll() is None and not (tmp_path / "z" / "00004.json").is_file(): time.sleep(0.01)
    two.append(command(*args, RANK="1", WORLD_SIZE="2"))
    said = [o.communicate(timeout=200)[0] for o in two]
    assert [o.returncode for o in two] == [0, 0], said
    assert "24 latents (8, 8, 8)" in said[0] and said[1] == "" and contents(tmp_path / "z") == contents(whole)


def test_the_command_names_a_model_and_shows_its_progress(shards, whole, tmp_path, capsys):
    "Any model directory will do; the bar tells images per second and, after an interruption, counts only its own as fast"
    assert Encode(shards, tmp_path / "z", model=MODEL, size=32, batch=3).run() == 0 and contents(tmp_path / "z") == contents(whole)
    assert re.fullmatch(r"24 latents \(8, 8, 8\): mean -0.\d\d, deviation 1.\d\d, slope 0.9\d\n", capsys.readouterr().out)
    for name in ("00003", "00004"): (tmp_path / "z" / f"{name}.json").unlink()
    encode_share(Encoding(shards, tmp_path / "z", load_autoencoder(MODEL).eval(), 32, batch=3))
    lines = capsys.readouterr().err.split("\r")
    assert "process 0 of 1:  62%" in lines[1] and "15/24 [00:00<?" in lines[1] and "24/24" in lines[-1] and "images/s" in lines[-1]
    with pytest.raises(FileNotFoundError, match="vae/config.json"): Encode(shards, tmp_path / "y", model=tmp_path, size=32).run()


@pytest.mark.slow
def test_torchrun_gives_the_same_bytes(shards, whole, tmp_path):
    "Two processes that torchrun starts, with two threads each"
    args = (*ENCODE, shards, tmp_path / "z", "--size", 32, "--batch", 3)
    started = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *args, OMP_NUM_THREADS="2")
    assert "24 latents (8, 8, 8)" in started.communicate(timeout=200)[0] and started.returncode == 0
    assert contents(tmp_path / "z") == contents(whole)


def test_a_dead_process_is_missed(shards, autoencoder, tmp_path):
    "Process 0 gives up after a while, names what is missing, and no manifest is there; the other share done, it goes on"
    encoding = Encoding(shards, tmp_path / "z", autoencoder, 32)
    encode_share(encoding, 0, 2, quiet=True)
    with pytest.raises(ValueError, match="2 shards are missing .00001 first"): wait_for_others(encoding, minutes=0.0005, pause=0.01)
    with pytest.raises(FileNotFoundError): Packed(tmp_path / "z")
    encode_share(encoding, 1, 2, quiet=True)
    wait_for_others(encoding, minutes=0)
    gather(encoding)
    assert len(Packed(tmp_path / "z")) == 24


def test_mirrored_pictures_are_samples_of_their_own(shards, samples, autoencoder, tmp_path):
    "Each follows its picture, with the same key, and says so"
    packed = Packed(run(Encoding(shards, tmp_path / "z", autoencoder, 32, flip=True, batch=3)), verify=True)
    assert len(packed) == 48 and packed.meta["key"].to_pylist() == [o.key for o in samples for _ in range(2)]
    assert [json.loads(o).get("flipped", False) for o in packed.meta["extra"].to_pylist()] == [False, True] * 24
    x = latents.to_float(np.stack([np.asarray(square(o.image, 32)).transpose(2, 0, 1) for o in samples])).flip(-1)
    with torch.no_grad(): want = autoencoder.encode(x).mean
    torch.testing.assert_close(torch.tensor(packed[1::2][:, :4]).float(), want, rtol=1e-3, atol=1e-2)
    assert json.loads((tmp_path / "z" / "funnel.json").read_text())[0]["kept"] == 24


def clean(samples, directory, drop=2):
    "Shards of wide and tall pictures, and a table of all but the last `drop`, as cleaning writes it"
    shaped = [o._replace(image=o.image.resize([(96, 64), (64, 96), (90, 66)][i % 3]), meta=o.meta | dict(split="train"))
              for i, o in enumerate(samples)]
    write_shards(shaped, directory / "shards", per_shard=9)
    (directory / "clean").mkdir()
    for i, start in enumerate(range(0, len(shaped), 9)):
        rows = [dict(key=o.key, caption=f"clean {o.caption}", captions=[f"clean {o.caption}", "b"], weights=[0.75, 0.25], split="held_out",
                     bucket_width=48 if o.image.width > 64 else 32, bucket_height=32 if o.image.width > 64 else 48)
                for o in shaped[start:start + 9] if o in shaped[:len(shaped) - drop]]
        pq.write_table(pa.Table.from_pylist(rows), directory / "clean" / f"{i:05d}.parquet")
    sizes = {path.stem: path.stat().st_size for path in (directory / "shards").glob("*.tar")}
    (directory / "clean" / "clean.json").write_text(json.dumps(dict(source=str(directory / "shards"), shards=sizes)))
    (directory / "clean" / "funnel.json").write_text(json.dumps(before := [dict(step="clean", asked=24, kept=24 - drop, dropped=dict(blank=drop))]))
    return shaped[:len(shaped) - drop], before


def test_a_cleaned_table_decides(samples, autoencoder, tmp_path):
    "Its pictures only, in its shapes, with its captions; by one process or three; and the funnel goes on"
    kept, before = clean(samples, tmp_path)
    run(Encoding(tmp_path / "clean", tmp_path / "z", autoencoder, batch=4))
    for shape in ((48, 32), (32, 48)):
        mine = [o for o in kept if (o.image.width > 64) == (shape[0] == 48)]
        packed = Packed(tmp_path / "z" / f"{shape[0]}x{shape[1]}", verify=True)
        assert packed.shape == (8, shape[1] // 4, shape[0] // 4) and packed.meta["key"].to_pylist() == [o.key for o in mine]
        assert packed.captions == [f"clean {o.caption}" for o in mine] and set(packed.meta["split"].to_pylist()) == {"held_out"}
        extra = json.loads(packed.meta["extra"][0].as_py())
        assert extra["captions"][1] == "b" and extra["weights"] == [0.75, 0.25] and extra["label"] == mine[0].meta["label"]
        x = latents.to_float(np.stack([np.asarray(crop(o.image, *shape)).transpose(2, 0, 1) for o in mine]))
        with torch.no_grad(): want = autoencoder.encode(x).mean
        torch.testing.assert_close(torch.tensor(packed[:][:, :4]).float(), want, rtol=1e-3, atol=1e-2)
    assert json.loads((tmp_path / "z" / "funnel.json").read_text()) == [*before, dict(step="encode", asked=22, kept=22, dropped={})]
    assert contents(run(Encoding(tmp_path / "clean", tmp_path / "three", autoencoder, batch=4), 3)) == contents(tmp_path / "z")
    squares = Packed(run(Encoding(tmp_path / "clean", tmp_path / "squares", autoencoder, 32)))
    assert len(squares) == 22 and squares.shape == (8, 8, 8)


def test_other_shapes_in_the_same_place_are_refused(samples, autoencoder, tmp_path):
    "Squares beside buckets, or buckets of another cleaning, would be taken for one data set"
    clean(samples, tmp_path)
    run(Encoding(tmp_path / "clean", tmp_path / "z", autoencoder))
    with pytest.raises(ValueError, match="z/32x48: holds latents of another shape"): Encoding(tmp_path / "clean", tmp_path / "z", autoencoder, 32)
    run(Encoding(tmp_path / "shards", tmp_path / "y", autoencoder, 32))
    with pytest.raises(ValueError, match="y: holds latents of another shape"): Encoding(tmp_path / "clean", tmp_path / "y", autoencoder)


def test_what_cannot_be_encoded_is_one_clear_line(samples, shards, autoencoder, tmp_path, capsys):
    "No size, a size that does not divide, no batch, a shard or a picture that is gone, a picture that is broken"
    with pytest.raises(ValueError, match="name a size"): Encoding(shards, tmp_path / "z", autoencoder)
    for size in (30, 0, -4):
        with pytest.raises(ValueError, match="do not divide by 4"): Encoding(shards, tmp_path / "z", autoencoder, size)
    with pytest.raises(ValueError, match="1 is the least"): Encoding(shards, tmp_path / "z", autoencoder, 32, batch=0)
    clean(samples, tmp_path)
    table = tmp_path / "clean" / "00002.parquet"
    rows = pq.read_table(table).to_pylist()
    pq.write_table(pa.Table.from_pylist([*rows, rows[0] | dict(key="nobody")]), table)
    with pytest.raises(ValueError, match="nobody is missing.*clean again"): run(Encoding(tmp_path / "clean", tmp_path / "z", autoencoder))
    (tmp_path / "shards" / "00001.tar").unlink()
    with pytest.raises(ValueError, match="shard 00001 is not the one that was cleaned"): find_jobs(tmp_path / "clean")
    (tmp_path / "clean" / "funnel.json").unlink()
    with pytest.raises(FileNotFoundError, match="cleaning was interrupted"): find_jobs(tmp_path / "clean")
    with pytest.raises(SystemExit) as stop: main([str(tmp_path / "nowhere"), str(tmp_path / "z"), "--size", "32"])
    assert stop.value.code == 2 and "nowhere: no such directory" in capsys.readouterr().err


@pytest.mark.parametrize("spoil", [lambda x: x / 255, lambda x: x], ids=["0 to 1", "0 to 255"])
def test_unnormalised_input_is_refused(shards, autoencoder, tmp_path, monkeypatch, spoil):
    "The line that brings pixels to [-1, 1] is missing: no manifest, and nobody can train on what is there"
    monkeypatch.setattr(latents, "to_float", lambda pixels: spoil(torch.as_tensor(pixels).float()))
    with pytest.raises(ValueError, match=r"z .delete it.: not fit to train on: .*slope 0.* are its pixels in \[-1, 1\]"):
        run(Encoding(shards, tmp_path / "z", autoencoder, 64), 2)
    with pytest.raises(FileNotFoundError): Packed(tmp_path / "z")


def test_a_wrong_scale_or_nothing_is_refused(shards, tmp_path):
    "A scale that is not this autoencoder's, and shards without a picture"
    other = load_autoencoder(MODEL)
    other.config = replace(other.config, scale=0.18215)
    with pytest.raises(ValueError, match="deviation .* is its scale 0.18215"): run(Encoding(shards, tmp_path / "z", other, 64))
    (tmp_path / "empty").mkdir()
    with tarfile.open(tmp_path / "empty" / "00000.tar", "w"): pass
    with pytest.raises(ValueError, match="empty: no pictures"): run(Encoding(tmp_path / "empty", tmp_path / "y", other, 64))


def test_a_large_set_is_refused_early(samples, autoencoder, tmp_path, monkeypatch):
    "After the shard in which the 64th picture is, and that one is not written any more"
    write_shards([o._replace(key=f"{i}-{o.key}") for i in range(5) for o in samples], tmp_path / "shards", per_shard=24)
    monkeypatch.setattr(latents, "to_float", lambda pixels: torch.as_tensor(pixels).float() / 255)
    with pytest.raises(ValueError, match="00002.tar: not fit to train on: .*slope"):
        encode_share(Encoding(tmp_path / "shards", tmp_path / "z", autoencoder, 32), quiet=True)
    assert sorted(o.name for o in (tmp_path / "z").glob("*.json")) == ["00000.json", "00001.json"]


def test_fault_24_latents_that_are_not_finite_are_refused(shards, samples, tmp_path):
    "They name the picture, and the shard is not written"
    for poison in (float("nan"), 1e9):
        net = load_autoencoder(MODEL).eval()
        net.quant.bias.data[0] = poison
        with pytest.raises(ValueError, match=f"the latents of '{samples[0].key}' are not finite"):
            run(Encoding(shards, tmp_path / "z", net, 32))
        assert not list((tmp_path / "z").glob("*0*"))


LIMITED = """
import resource, sys
from pathlib import Path
from sd_nb.data.encode import main
held = next(int(o.split()[1]) for o in Path("/proc/self/status").read_text().splitlines() if o.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv[1]) * 2**20,) * 2)
main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits address space as Linux does")
def test_fault_34_out_of_memory_leaves_nothing_corrupt(samples, autoencoder, tmp_path):
    "What is finished stays, one line says what to do, and with more memory the same command goes on to the same bytes"
    for name, part in (("a", samples[:1]), ("b", samples[1:])): write_shards(part, tmp_path / name, per_shard=24)
    (tmp_path / "shards").mkdir()
    for i, name in enumerate("ab"): (tmp_path / name / "00000.tar").rename(tmp_path / "shards" / f"0000{i}.tar")
    args = (tmp_path / "shards", tmp_path / "z", "--size", 384, "--batch", 24)
    starved = command("-c", LIMITED, 800, *args)
    said = starved.communicate(timeout=300)[0]
    assert starved.returncode == 2 and said.count("\n") == 1, said
    assert "error: out of memory with batches of 24: finished shards stay, a smaller --batch goes on" in said
    assert sorted(o.name for o in (tmp_path / "z").iterdir()) == [".lock", "00000.json", "00000.npy", "00000.parquet"]
    fed = command(*ENCODE, *args)
    assert fed.wait(timeout=300) == 0
    run(Encoding(tmp_path / "shards", tmp_path / "whole", autoencoder, 384, batch=24))
    assert contents(tmp_path / "z") == contents(tmp_path / "whole")


def test_fault_23_another_encoder_resolution_scale_or_flip_is_refused(shards, autoencoder, whole):
    "In one line that says what differs, and nothing is touched"
    before = contents(whole)
    other = load_autoencoder(MODEL)
    with torch.no_grad(): next(other.parameters()).view(-1)[0] += 1e-3
    scaled = load_autoencoder(MODEL)
    scaled.config = replace(scaled.config, scale=0.5)
    for words, net, size, flip in (("width was 32, is 64", autoencoder, 64, False), ("autoencoder was .{12}, is", other, 32, False),
                                   ("scale was 0.71317, is 0.5", scaled, 32, False), ("flip was False, is True", autoencoder, 32, True)):
        for rank in (0, 1):
            with pytest.raises(ValueError, match=f"packed from something else .*{words}.*delete it") as error:
                encode_share(Encoding(shards, whole, net, size, flip, batch=3), rank, 2, quiet=True)
            assert "\n" not in str(error.value)
    assert contents(whole) == before


def test_fault_23_torn_and_damaged_shards_are_made_again(shards, autoencoder, whole, tmp_path):
    "A flipped byte, a lost receipt, a rest of a killed process: the same command gives the same bytes"
    encoding = Encoding(shards, tmp_path / "z", autoencoder, 32, batch=3)
    run(encoding)
    data = bytearray((tmp_path / "z" / "00002.npy").read_bytes()); data[-1] ^= 1
    (tmp_path / "z" / "00002.npy").write_bytes(data)
    (tmp_path / "z" / "00003.json").unlink()
    (tmp_path / "z" / ".00003.npy.partial").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="00002.npy broken"): run(encoding, 2)
    assert contents(tmp_path / "z") == contents(whole)
    (tmp_path / "z" / "00001.npy").write_bytes(b"torn")
    with pytest.raises(ValueError, match="00001 is damaged"): gather(encoding)


HOLDER = """
import sys, time
from pathlib import Path
from sd_nb.data.encode import claim
with claim(Path(sys.argv[1]), range(4, 5)): print("held", flush=True); time.sleep(600)
"""


def test_fault_27_a_second_run_on_the_same_shards_is_refused(shards, autoencoder, whole, tmp_path):
    "Whoever has one of them to itself keeps the others' hands off, and only from that one; its death lets go"
    encoding = Encoding(shards, tmp_path, autoencoder, 32, batch=3)
    holder = command("-c", HOLDER, tmp_path)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another process is at work on the same shards"): encode_share(encoding, 0, 2, quiet=True)
    assert sorted(o.name for o in tmp_path.iterdir()) == [".lock"]
    encode_share(encoding, 1, 2, quiet=True)
    holder.kill(); holder.communicate()
    assert contents(run(encoding)) == contents(whole)


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from sd_nb.data.encode import main
kills, world, out, *args = sys.argv[1:]
dice, out = random.Random(0), Path(out)
def start(rank):
    if pid := os.fork(): return pid
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=world)
    try: main([args[0], str(out), *args[1:]])
    finally: os._exit(0)
def there(pattern="*"): return len(list(out.glob(pattern)))
for _ in range(int(kills)):
    more, delay = there() + dice.randrange(1, 8), dice.uniform(0, 0.1)
    children = {start(rank) for rank in range(int(world))}
    while children and there() < more:
        time.sleep(0.001)
        children -= {pid for pid in children if os.waitpid(pid, os.WNOHANG)[0]}
    time.sleep(delay)
    for pid in children: os.kill(pid, signal.SIGKILL)
    for pid in children: os.waitpid(pid, 0)
    print(there("0*.json"), there(".*.partial"), there("manifest.json"))
"""


def kill(kills, world, shards, out, *args):
    """Start the command in `world` processes, kill them when some more files are there and a moment has passed, and do it
    again. Say how many receipts, partial files and manifests each kill left."""
    done = command("-c", KILLER, kills, world, out, shards, *args)
    found = done.communicate(timeout=1500)[0]
    assert done.returncode == 0, found
    found = [tuple(map(int, line.split())) for line in found.splitlines() if line.replace(" ", "").isdigit()]
    assert len(found) == kills
    return found


def test_fault_23_killed_at_three_moments_the_bytes_are_the_same(shards, autoencoder, whole, tmp_path):
    "Two processes are killed three times while they write"
    found = kill(3, 2, shards, tmp_path / "z", "--size", 32, "--batch", 3)
    assert any(0 < receipts < 5 for receipts, *_ in found) and found[0][2] == 0, found
    assert contents(run(Encoding(shards, tmp_path / "z", autoencoder, 32, batch=3))) == contents(whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fault_23_killed_at_twenty_random_moments_the_bytes_are_the_same(samples, tmp_path):
    "Two processes on forty shards end where one undisturbed process ends, and the kills did hit the middle of the work"
    many = [o._replace(key=f"{i}-{o.key}") for i in range(20) for o in samples]
    write_shards(many, tmp_path / "shards", per_shard=12)
    args = ("--size", 64)
    assert command(*ENCODE, tmp_path / "shards", tmp_path / "whole", *args).wait(timeout=600) == 0
    found = kill(20, 2, tmp_path / "shards", tmp_path / "z", *args)
    assert command(*ENCODE, tmp_path / "shards", tmp_path / "z", *args).wait(timeout=600) == 0
    assert sum(0 < receipts < 40 for receipts, *_ in found) >= 10 and any(partial for _, partial, _ in found), found
    assert contents(tmp_path / "z") == contents(tmp_path / "whole")
