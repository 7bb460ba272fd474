"""The report: one file that needs nothing else, holds all that the run left, and is not torn."""
import base64
import json
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from sd_nb.config import PRESETS
from sd_nb.train import report
from sd_nb.train.report import Report, draw_curves, flat, headline, page, panels, png_of, poster, sample_grids
from sd_nb.train.symptoms import Verdict

VERDICTS = [Verdict("ok", "finite", "all is"), Verdict("bad", "latents", "<script>alert(1)</script>", "rescale & retrain")]


class Reader(HTMLParser):
    "Tags, what they refer to, text by tag, and the pictures inside"
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.texts, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag); self.open.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag: pass

    def handle_data(self, data): self.texts.append((self.open[-1] if self.open else "", data))
    def pictures(self): return [Image.open(BytesIO(base64.b64decode(s.removeprefix("data:image/png;base64,")))) for s in self.sources]


def log(steps=400):
    rows = []
    for s in range(10, steps + 1, 10):
        rows.append(dict(step=s, images=8 * s, seconds=s * 3.6, lr=1e-3, loss=1 / s, mse=2 / s, mse_t0=0.5, mse_t250=0.4, mse_t500=0.3, grad_norm=1.0, images_per_second=8.0, tflops=0.5))
        if s % 100 == 0: rows.append(dict(step=s, held_out=3 / s, held_out_t62=0.1, held_out_t187=0.2, held_out_t312=0.3))
    return rows


@pytest.fixture
def run(tmp_path):
    "A directory as a run of 400 steps leaves it, without a checkpoint"
    run = tmp_path / "a <b> run"
    (run / "samples").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log()))
    (run / "config.json").write_text(json.dumps(replace(PRESETS["tiny"], run=run).to_dict()))
    for step in range(50, 401, 50): Image.new("RGB", (10, step), (step // 2, 0, 0)).save(run / "samples" / f"step-{step:07}.png")
    return run


def test_the_page_needs_nothing_else(run):
    "No script, no link, no style from elsewhere: all that is shown is inside"
    text = page(run, log(), VERDICTS)
    reader = Reader(text)
    assert all(s.startswith("data:image/png;base64,") for s in reader.sources)
    assert not {"script", "link", "iframe", "object", "a"} & set(reader.tags) and "http" not in text and "url(" not in text


def test_the_page_holds_what_the_run_left(run):
    "Verdicts, curves, five sample grids with their steps, each setting, and how far the run is"
    reader = Reader(page(run, log(), VERDICTS))
    curves, *grids = reader.pictures()
    assert curves.width > 900 and [g.height for g in grids] == [50, 100, 200, 300, 400]
    texts = [t for _, t in reader.texts]
    assert [t for tag, t in reader.texts if tag == "figcaption"] == [f"step {s}" for s in (50, 100, 200, 300, 400)]
    assert {"a <b> run", "<script>alert(1)</script>", "rescale & retrain", "bad", "unet.width", "prediction"} <= set(texts)
    assert "step 400, 3,200 pictures, 0.40 hours of training, loss 0.0025, held_out 0.0075" in texts
    assert texts[texts.index("unet.width") + 1] == str(PRESETS["tiny"].unet.width)


def test_every_number_of_the_log_has_a_panel():
    "Loss, held-out loss, both by timestep, learning rate, gradient norm and speed are drawn from the rows that have them"
    rows = log()
    found = panels(rows)
    assert {n for names in found.values() for n in names} == {n for row in rows for n in row} - {"step", "images", "seconds"}
    assert found["held-out loss"] == ["held_out"] and found["held-out loss by timestep"] == ["held_out_t62", "held_out_t187", "held_out_t312"]
    drawn = {ax.get_title(): ax for ax in draw_curves(rows).axes}
    faint, strong = drawn["held-out loss"].lines
    assert list(faint.get_xdata()) == [100, 200, 300, 400] and list(faint.get_ydata()) == [3 / s for s in (100, 200, 300, 400)]
    assert list(strong.get_ydata()) == list(faint.get_ydata())  # too few for a mean
    assert [t.get_text() for t in drawn["loss by timestep"].get_legend().get_texts()] == ["t0", "t250", "t500"]
    assert len(drawn) == 8


def test_a_long_log_is_thinned_and_a_short_one_is_not():
    "A hundred thousand rows are drawn with two thousand points, the first and the last among them"
    rows = [dict(step=s, loss=1.0) for s in range(1, 100_001)]
    x = draw_curves(rows).axes[0].lines[0].get_xdata()
    assert len(x) == 2000 and (x[0], x[-1]) == (1, 100_000)
    assert list(draw_curves(rows[:3]).axes[0].lines[0].get_xdata()) == [1, 2, 3]


def test_sample_grids_are_spread_over_the_run(run):
    "At most as many as asked for, in order of time, first and last among them; none where there are none"
    assert list(sample_grids(run, 3)) == [50, 200, 400] and list(sample_grids(run, 99)) == list(range(50, 401, 50))
    assert sample_grids(run / "nowhere") == {}
    for path in (run / "samples").iterdir(): path.unlink()
    assert "None yet." in page(run, log(), []) and not [ax for ax in poster(run, log(), []).axes if ax.images]


def test_the_poster_shows_the_same(run):
    "Verdicts as text, long ones on several lines, every panel and every chosen grid"
    long = Verdict("note", "batch", 40 * "word ", "advice")
    fig = poster(run, log(), [*VERDICTS, long])
    words = " ".join(t.get_text().strip() for t in fig.texts)
    assert "<script>alert(1)</script> -> rescale & retrain" in words and words.count("word") == 40 and "step 400" in words
    assert max(len(t.get_text()) for t in fig.texts) <= 140
    grids = [ax for ax in fig.axes if ax.images]
    assert [ax.get_title() for ax in grids] == [f"step {s}" for s in (50, 100, 200, 300, 400)]
    assert [ax.images[0].get_array()[0, 0, 0] for ax in grids] == [25, 50, 100, 150, 200]
    png_of(fig)  # lays the panels out
    for a in grids:
        for b in fig.axes: assert a is b or not a.get_position().overlaps(b.get_position())


def test_the_command_writes_a_page_or_a_picture(run, capsys):
    "To its default place or another, whole or not at all; it says where"
    assert Report(run, doctor=False).run() == 0 and capsys.readouterr().out.strip() == str(run / "report.html")
    assert Reader((run / "report.html").read_text()).tags.count("img") == 6
    assert Report(run, doctor=False, png=True, out=run / "new" / "x.png").run() == 0
    with Image.open(run / "new" / "x.png") as picture: assert picture.size[0] > 900 and np.asarray(picture).std() > 10
    assert not [p for p in run.rglob("*") if ".part" in p.name]


def test_a_run_that_cannot_be_examined_is_still_drawn(run, monkeypatch):
    "Without a checkpoint the page says why the doctor was not asked; what the doctor says is on the page"
    assert Report(run).run() == 0
    assert "not asked" in (run / "report.html").read_text() and "no whole checkpoint" in (run / "report.html").read_text()
    monkeypatch.setattr(report, "open_patient", lambda run: run)
    monkeypatch.setattr(report, "diagnose", lambda patient: [Verdict("bad", "text", "words are ignored")])
    assert Report(run).run() == 0 and "words are ignored" in (run / "report.html").read_text()


def test_a_torn_log_and_a_missing_one(run, tmp_path):
    "A last line that a crash tore is left out; no log, or none with numbers, is one clear line"
    with open(run / "metrics.jsonl", "a") as f: f.write('{"step": 410, "lo')
    assert Report(run, doctor=False).run() == 0 and "step 400," in (run / "report.html").read_text()
    with pytest.raises(ValueError, match="no metrics.jsonl"): Report(tmp_path / "nowhere").run()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="nothing to draw"): Report(run, doctor=False).run()


def test_settings_have_the_names_of_flags():
    "Settings inside settings are named by their path"
    assert flat(dict(a=1, unet=dict(width=64, mults=[1, 2]))) == {"a": "1", "unet.width": "64", "unet.mults": "[1, 2]"}
    assert headline([dict(step=1200, loss=0.5), dict(step=1300, held_out=0.25)]) == "step 1,300, loss 0.5000, held_out 0.2500"
