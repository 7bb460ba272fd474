"""Downloads go on where they stopped, and nothing gets its name before every byte is right."""
import hashlib
import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request

import pytest
import torch
from hub import COMMIT, git_hash, serve
from parity import randomise
from test_seed import SMALL, released
from tiny import diffusers_pipeline, tiny_parts

from sd_nb import download
from sd_nb.config import one_line_errors, parse
from sd_nb.download import CLIP, MODELS, VAE, Download, File, Redirects, make_opener, reach
from sd_nb.pipeline import StableDiffusion
from sd_nb.seed import SeedUNet, load_masked_text_encoder, load_seed

DATA = dict(small=b"a few words", large=random.Random(0).randbytes(300_000))


@pytest.fixture()
def hub(monkeypatch):
    "A model of two files, one of which comes from a store"
    monkeypatch.setattr(download, "PAUSE", 0.001)
    monkeypatch.setattr(download, "CHUNK", 10_000)
    monkeypatch.setitem(MODELS, "toy", [File("me/toy", "config.json", "sub/config.json"), File("me/toy", "large.pt", "large.pt")])
    with serve({"me/toy:config.json": DATA["small"], "me/toy:large.pt": DATA["large"]}) as hub: yield hub


def say(capsys, hub, out, *more, name="toy", private=True):
    "Run the command as `sd-nb` would: exit code, stdout, last line of stderr"
    words = [name, "--out", str(out), "--endpoint", hub if isinstance(hub, str) else hub.address, *(["--allow-private"] if private else []), *more]
    try:
        with one_line_errors("sd-nb download"): code = parse(Download, words, "sd-nb download").run()
    except SystemExit as stop: code = stop.code
    text = capsys.readouterr()
    return code, text.out, text.err.strip().splitlines()[-1] if text.err.strip() else ""


def here(out): return sorted(p.name for p in out.rglob("*") if p.is_file())


def test_everything_arrives_and_is_checked(hub, tmp_path, capsys):
    """All bytes, a note of where they came from, a word about what was checked; a second run fetches nothing."""
    code, out, _ = say(capsys, hub, tmp_path / "toy")
    assert code == 0 and here(tmp_path / "toy") == ["config.json", "download.json", "large.pt"]
    assert (tmp_path / "toy" / "large.pt").read_bytes() == DATA["large"] and (tmp_path / "toy" / "sub" / "config.json").read_bytes() == DATA["small"]
    assert "300,000 bytes and the sha256 of the Hub: right" in out and "11 bytes and the git hash of the Hub: right" in out
    note = json.loads((tmp_path / "toy" / "download.json").read_text())
    assert note["large.pt"] == dict(repo="me/toy", commit=COMMIT, size=300_000, hash=hashlib.sha256(DATA["large"]).hexdigest())
    assert all(COMMIT in path for method, path, _ in hub.log if method == "GET" and "/store/" not in path)  # not the branch
    hub.log.clear()
    assert say(capsys, hub, tmp_path / "toy")[0] == 0 and hub.gets() == []


def test_a_broken_line_is_taken_up_again(hub, tmp_path, capsys):
    """Twelve breaks in a row, each after some progress: only what is missing is asked for."""
    hub.breaks = [len(DATA["small"])] + [20_000] * 12
    assert say(capsys, hub, tmp_path)[0] == 0
    starts = [start for path, start in hub.gets() if "large" in path]
    assert starts == [None] + [f"bytes={20_000 * i}-" for i in range(1, 13)]
    assert (tmp_path / "large.pt").read_bytes() == DATA["large"]


def test_a_line_that_stays_broken(hub, tmp_path, capsys):
    """No progress five times: one line, the piece stays, the name does not appear; later the same command goes on."""
    hub.breaks = [len(DATA["small"]), 50_000] + [0] * 9
    code, _, line = say(capsys, hub, tmp_path)
    assert code == 2 and "stopped after 50,000 of 300,000 bytes (5 attempts)" in line and hub.address in line
    parts = [name for name in here(tmp_path) if name.endswith(".part")]
    assert len(parts) == 1 and "large.pt" not in here(tmp_path)
    hub.breaks, hub.log = [], []
    assert say(capsys, hub, tmp_path)[0] == 0 and hub.gets() == [("/store/me/toy:large.pt", "bytes=50000-")]
    assert here(tmp_path) == ["config.json", "download.json", "large.pt"]


def test_ctrl_c_leaves_a_piece_that_resumes(hub, tmp_path, capsys):
    """SIGINT in the middle: exit code 130, a piece and no file; the same command fetches the rest."""
    hub.piece, hub.seconds = 10_000, 0.5
    code = ("import sys; from sd_nb import download; from sd_nb.config import one_line_errors, parse\n"
            "download.MODELS['toy'] = [download.File('me/toy', 'large.pt', 'large.pt')]; download.CHUNK = 10_000\n"
            "with one_line_errors('sd-nb download'): parse(download.Download, sys.argv[1:], 'sd-nb download').run()")
    words = ["toy", "--out", str(tmp_path / "toy"), "--endpoint", hub.address, "--allow-private"]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are born deaf to it
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    until = time.monotonic() + 60
    while not any(p.stat().st_size >= 20_000 for p in tmp_path.rglob("*.part")) and time.monotonic() < until: time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in err
    [part] = tmp_path.rglob("*.part")
    size = part.stat().st_size
    assert 20_000 <= size < 300_000 and not (tmp_path / "toy" / "large.pt").exists()
    hub.seconds, hub.log = 0, []
    assert say(capsys, hub, tmp_path / "toy")[0] == 0
    assert [start for path, start in hub.gets() if "large" in path] == [f"bytes={size}-"]
    assert (tmp_path / "toy" / "large.pt").read_bytes() == DATA["large"]


def test_wrong_bytes_are_thrown_away(hub, tmp_path, capsys):
    """Contents that do not have the announced hash never get their name, and do not spoil the next attempt."""
    hub.tags["me/toy:large.pt"] = "ab" * 32
    code, _, line = say(capsys, hub, tmp_path)
    assert code == 2 and "instead of abababababab" in line and here(tmp_path) == ["config.json", "download.json"]
    hub.tags["me/toy:config.json"], hub.tags["me/toy:large.pt"] = git_hash(b"other"), ""
    assert say(capsys, hub, tmp_path / "again")[0] == 2 and here(tmp_path / "again") == []
    hub.tags.clear()
    assert say(capsys, hub, tmp_path)[0] == 0


def test_a_damaged_file_is_fetched_again(hub, tmp_path, capsys):
    """A file of the right size with one wrong bit is replaced."""
    assert say(capsys, hub, tmp_path)[0] == 0
    (tmp_path / "large.pt").write_bytes(bytes([DATA["large"][0] ^ 1]) + DATA["large"][1:])
    assert say(capsys, hub, tmp_path)[0] == 0 and (tmp_path / "large.pt").read_bytes() == DATA["large"]


def test_a_known_hash_is_not_the_server_s_to_choose(hub, tmp_path, capsys, monkeypatch):
    """A file whose hash is in the table is refused before a byte of it is fetched when the server offers another."""
    monkeypatch.setitem(MODELS, "toy", [File("me/toy", "large.pt", "large.pt", sha256="00" * 32)])
    code, _, line = say(capsys, hub, tmp_path / "toy")
    assert code == 2 and "not the known 000000000000" in line and hub.gets() == [] and not (tmp_path / "toy").exists()


def test_a_changed_file_starts_over(hub, tmp_path, capsys):
    """Half of one version is never completed with half of another, and no old piece stays behind."""
    hub.breaks = [len(DATA["small"]), 50_000] + [0] * 9
    assert say(capsys, hub, tmp_path)[0] == 2
    hub.files["me/toy:large.pt"] = changed = bytes(reversed(DATA["large"]))
    hub.breaks = []
    assert say(capsys, hub, tmp_path)[0] == 0
    assert (tmp_path / "large.pt").read_bytes() == changed and here(tmp_path) == ["config.json", "download.json", "large.pt"]


def test_a_file_that_changes_under_our_hands(hub, tmp_path, capsys, monkeypatch):
    """Between two pieces the server has another version: If-Range makes it send all of it, and the hash tells."""
    hub.large = 10**9  # all files come from the Hub itself, so that its ETag is the one that counts
    pieces, receive = [], download.receive

    def change(*args):
        pieces.append(args)
        if len(pieces) == 3: hub.files["me/toy:large.pt"] = bytes(300_000)
        return receive(*args)

    monkeypatch.setattr(download, "receive", change)
    hub.breaks = [len(DATA["small"]), 50_000]
    code, _, line = say(capsys, hub, tmp_path)
    assert code == 2 and f"arrived with the hash {git_hash(bytes(300_000))[:12]}" in line and "large.pt" not in here(tmp_path)


def test_a_server_that_cannot_resume(hub, tmp_path, capsys):
    """A server that ignores Range sends everything again, and nothing is doubled."""
    hub.ranges, hub.breaks = False, [len(DATA["small"]), 50_000]
    assert say(capsys, hub, tmp_path)[0] == 0 and (tmp_path / "large.pt").read_bytes() == DATA["large"]


@pytest.mark.parametrize("code, fetched", [(404, 1), (403, 1), (500, 5), (503, 5), (429, 5)])
def test_what_will_not_pass_is_not_tried_again(hub, tmp_path, capsys, code, fetched):
    """A missing file ends at once, a server in trouble after five attempts; one line with the address, no folder."""
    hub.failures = [code] * 99
    status, _, line = say(capsys, hub, tmp_path / "toy")
    assert status == 2 and f"me/toy/resolve/main/config.json: HTTP {code}" in line and len(hub.log) == fetched
    assert not (tmp_path / "toy").exists()


def test_a_server_in_trouble_that_recovers(hub, tmp_path, capsys):
    """Errors of the server that pass are waited for."""
    hub.failures = [500, 503, 429]
    assert say(capsys, hub, tmp_path)[0] == 0 and (tmp_path / "large.pt").read_bytes() == DATA["large"]


def test_a_full_disk_is_noticed_before(hub, tmp_path, capsys, monkeypatch):
    """Nothing is fetched when it would not fit; what is here already is not counted."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=299_999))
    code, _, line = say(capsys, hub, tmp_path / "toy")
    assert code == 2 and "needs 0.0 GB and 0.0 GB are free" in line and str(tmp_path / "toy") in line and hub.gets() == []
    assert not (tmp_path / "toy").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert say(capsys, hub, tmp_path / "toy")[0] == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert say(capsys, hub, tmp_path / "toy")[0] == 0


def test_no_connection(hub, tmp_path, capsys):
    """Nobody answers: one line, exit code 2, no folder."""
    code, _, line = say(capsys, "http://127.0.0.1:1", tmp_path / "toy")
    assert code == 2 and "http://127.0.0.1:1/me/toy" in line and "refused" in line and not (tmp_path / "toy").exists()


@pytest.mark.parametrize("endpoint, words", [("http://127.0.0.1:1", "only https"), ("ftp://example.org", "only https"), ("file:///etc", "only https"), ("huggingface.co", "only https")])
def test_only_https(hub, tmp_path, capsys, endpoint, words):
    """Anything but https is refused unless the user asks for it."""
    code, _, line = say(capsys, endpoint, tmp_path / "toy", private=False)
    assert code == 2 and words in line and not (tmp_path / "toy").exists()


def test_private_addresses_hear_nothing(hub, monkeypatch):
    """A connection to this machine is closed before anything is said, whatever name led there."""
    monkeypatch.setattr(http.client.HTTPSConnection, "connect", http.client.HTTPConnection.connect)  # no certificate here
    address = hub.address.replace("http://127.0.0.1", "https://localhost")
    with pytest.raises(ValueError, match="localhost is the private address .*--allow-private"):
        reach(make_opener(False), address + "/me/toy/resolve/main/config.json")
    assert hub.log == []


def test_redirections_are_bounded_and_looked_at(hub, monkeypatch):
    """A circle ends, and a redirection to plain http, to a file or to a private address is not followed."""
    with pytest.raises(ValueError, match="/loop: HTTP 302"): reach(make_opener(True), hub.address + "/loop")
    assert len(hub.log) <= 6
    for there in ("http://example.org/x", "file:///etc/passwd", "ftp://example.org/x"):
        with pytest.raises(ValueError, match="only https"):
            Redirects(False).redirect_request(Request("https://example.org"), None, 302, "Found", {}, there)


@pytest.mark.parametrize("words, culprit", [(["--colour", "red"], "--colour"), (["--revision", "nowhere"], "nowhere")])
def test_mistakes(hub, tmp_path, capsys, words, culprit):
    """A flag or a revision that does not exist is named."""
    code, _, line = say(capsys, hub, tmp_path / "toy", *words)
    assert code == 2 and culprit in line and not (tmp_path / "toy").exists()


def test_an_unknown_model(hub, tmp_path, capsys):
    """The known ones are listed; a file in the way of the folder is named."""
    code, _, line = say(capsys, hub, tmp_path / "toy", name="sd9")
    assert code == 2 and "'sd9'" in line and "sd-from-scratch-v1" in line
    (tmp_path / "file").touch()
    code, _, line = say(capsys, hub, tmp_path / "file" / "toy")
    assert code == 2 and str(tmp_path / "file") in line


def test_a_server_that_tells_no_hash(hub, tmp_path, capsys):
    """What cannot be checked is not fetched."""
    hub.tags["me/toy:config.json"] = "v1"
    code, _, line = say(capsys, hub, tmp_path / "toy")
    assert code == 2 and "nothing could be checked" in line and hub.gets() == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX limit")
def test_a_disk_that_fills_up_on_the_way(hub, tmp_path, capsys, monkeypatch):
    """An error of the disk is told as such and not taken for one of the network."""
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(download, "receive", full)
    code, _, line = say(capsys, hub, tmp_path)
    assert code == 2 and "No space left" in line and len([1 for method, *_ in hub.log if method == "GET"]) == 0


def test_the_whole_model_arrives_and_draws(tmp_path, capsys, monkeypatch):
    """A small SD-From-Scratch and two foreign repositories, CLIP with both halves: one command, then a picture."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel
    monkeypatch.setattr(download, "PAUSE", 0.001)
    pipe, source = diffusers_pipeline(tmp_path / "source"), tmp_path / "source"
    whole = randomise(CLIPModel(CLIPConfig(text_config=pipe.text_encoder.config.to_dict(), projection_dim=24, vision_config=dict(
        hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8))))
    whole.save_pretrained(source / "clip")
    released(randomise(SeedUNet(SMALL)), source / "sd_epoch_042.pt")
    tiny_parts().tokenizer.save_pretrained(source / "words")  # vocab.json and merges.txt, as that repository has them
    repos = {CLIP["repo"]: [source / "clip", source / "words"], VAE["repo"]: [source / "vae"], "atandra2000/sd-from-scratch-v1": [source]}
    files = {f"{repo}:{p.name}": p.read_bytes() for repo, folders in repos.items() for folder in folders for p in folder.iterdir() if p.is_file()}
    known = [f._replace(sha256=f.sha256 and hashlib.sha256(files[f"{f.repo}:{f.name}"]).hexdigest()) for f in MODELS["sd-from-scratch-v1"]]
    monkeypatch.setitem(MODELS, "sd-from-scratch-v1", known)
    with serve(files, [CLIP["revision"], VAE["revision"]]) as hub:
        code, out, line = say(capsys, hub, tmp_path / "model", name="sd-from-scratch-v1")
        assert code == 0, line
        hub.log.clear()
        assert say(capsys, hub, tmp_path / "model", name="sd-from-scratch-v1")[0] == 0 and hub.gets() == []
    path = tmp_path / "model" / "sd_epoch_042.pt"
    assert str(path) in out and sorted(p.name for p in path.parent.iterdir()) == ["download.json", "sd_epoch_042.pt", "text_encoder", "tokenizer", "vae"]
    tokens = torch.tensor([[598, 5, 6, 599, 599, 599]])
    theirs = CLIPTextModel.from_pretrained(path.parent / "text_encoder")(tokens, attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]))
    torch.testing.assert_close(load_masked_text_encoder(path.parent)(tokens), theirs.last_hidden_state, atol=1e-5, rtol=1e-5)
    picture = StableDiffusion(load_seed(path, config=SMALL))("a red apple", steps=2, height=64, width=64, output="np", progress=False)
    assert picture.shape == (1, 64, 64, 3) and picture.std() > 0.01


def test_the_table_is_pinned():
    """Foreign repositories by commit, their large files by hash, every file in a place of its own below the folder."""
    for files in MODELS.values():
        assert all(f.revision or f.repo == files[-1].repo for f in files)
        assert all(f.sha256 for f in files if f.name.endswith(".safetensors"))
        places = [Path(f.to) for f in files]
        assert len(set(places)) == len(places) and not any(p.is_absolute() or ".." in p.parts for p in places)
