"""One door to all steps of the data pipeline; behind it, rows become latents, nothing is lost unseen, and training takes what comes out."""
import dataclasses
import json
import subprocess
import sys
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from few import SMALL

from sd_nb.data.emoji import embedded
from sd_nb.data.funnel import read_funnel
from sd_nb.data.images import read_shards
from sd_nb.data.loader import Packed
from sd_nb.data.steps import STEPS, command_of, data, usage
from web import ROBOTS, Web, answer, save


class Emoji(Web):
    "Seventy emoji under their keys, and whatever else the small web has."
    def __init__(self):
        self.samples = {s.key: s for s in islice(read_shards(embedded()), 0, 350, 5)}
        self.files = {key: save(s.image, "PNG") for key, s in self.samples.items()}
        super().__init__()

    async def _answer(self, path, writer):
        if path not in self.files: return await super()._answer(path, writer)
        writer.write(answer(self.files[path]))
        await writer.drain()


def write_table(web, folder):
    "A row for each emoji and some for what shall be dropped; what each step shall drop."
    rows = [dict(url=web.url(key), caption=s.caption, aesthetic=7.0) for key, s in web.samples.items()]
    rows[0]["caption"], rows[1]["aesthetic"], rows[2]["aesthetic"] = "a <b>bold</b> one &amp;amp; more", 4.0, None
    rows[3]["caption"] = "<br><br>&nbsp;&nbsp;"
    faults = ["status/404", "page.jpg", "truncated.jpg", f"robots/{list(ROBOTS).index('noai')}"]
    rows += [dict(url=web.url(path), caption=f"the fault {path}", aesthetic=7.0) for path in faults]
    rows.append(dict(url=rows[5]["url"], caption="the same address again", aesthetic=7.0))
    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet")
    return len(rows), dict(
        filter={"aesthetic": 1, "no aesthetic": 1, "same url": 1}, clean={"empty": 1}, encode={},
        download={"HTTP 404": 1, "not a picture": 1, "broken picture": 1, "opted out": 1})


def test_from_rows_to_latents_to_training(tmp_path):
    """Four commands and a fifth: each is asked about what the one before kept, drops what it should, and training reads the clean captions."""
    place = lambda name: str(tmp_path / name)
    with Emoji() as web:
        count, want = write_table(web, tmp_path)
        assert data(["filter", place("table.parquet"), place("rows"), "--min-side", "None", "--min-caption", "5", "--allow-missing"]) == 0
        assert data(["download", place("rows"), place("shards"), "--allow-private", "--size", "64", "--per-shard", "30", "--tries", "1"]) == 0
        assert data(["clean", place("shards"), place("clean"), "--alike", "None", "--size", "64", "--step", "16"]) == 0
        assert data(["encode", place("clean"), place("latents")]) == 0
    entries = read_funnel(place("latents"))
    assert [entry["step"] for entry in entries] == list(STEPS)
    assert [entry["asked"] for entry in entries] == [count, *(entry["kept"] for entry in entries[:-1])]
    assert {entry["step"]: entry["dropped"] for entry in entries} == want
    latents = Packed(tmp_path / "latents" / "64x64")
    assert len(latents) == entries[-1]["kept"] == 67 and latents.captions[0] == "a bold one & more"
    from sd_nb.train.__main__ import main
    words = ["tiny", *SMALL, "--run", place("run"), "--data", place("clean"), "--steps", "2", "--batch", "8"]
    for stage in ("autoencoder", "clip", "unet"): assert main([*words, "--stage", stage]) == 0
    assert Packed(tmp_path / "run" / "cache" / "latents").captions == latents.captions
    assert [json.loads(line)["step"] for line in open(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("step", STEPS)
def test_the_table_says_what_the_commands_say(step, capsys):
    """Each line of help is the command's own first line, every flag has help, and asking for it writes nothing."""
    command = command_of(step)
    assert dataclasses.is_dataclass(command) and command.__doc__ == STEPS[step][2] and STEPS[step][2] in usage("sd-nb data")
    with pytest.raises(SystemExit) as stop: data([step, "--help"])
    assert stop.value.code in (0, None) and f"usage: sd-nb data {step}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help(words, capsys):
    """Without a step, the steps are listed."""
    assert data(words) == 0 and capsys.readouterr().out.strip() == usage("sd-nb data")


@pytest.mark.parametrize("words, error", [
    (["cook"], "unknown step 'cook': choose one of filter, download, clean, encode"), (["clean"], "OUT"),
    (["clean", "nowhere", "out"], "nowhere: no such directory"), (["encode", "nowhere", "out", "--size", "64"], "nowhere: no such directory"),
    (["clean", "in", "out", "--least", "many"], "least"), (["download", "nowhere", "out"], "nowhere"), (["filter", "nowhere", "out"], "nowhere")])
def test_mistakes_are_one_line(words, error, tmp_path, monkeypatch):
    """A wrong step, a missing word, a bad number and a missing directory are named, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=error) as caught: data(words)
    assert len(str(caught.value).splitlines()) == 1 and not any(path.is_file() for path in tmp_path.rglob("*"))


def test_help_loads_no_step():
    """Listing the steps imports none of them, nor the libraries that they stand on."""
    code = ("import sys; from sd_nb.data.steps import data; data(['--help'])\n"
            "print(sorted({'duckdb', 'aiohttp', 'pyarrow', 'sd_nb.data.clean', 'sd_nb.data.encode'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
