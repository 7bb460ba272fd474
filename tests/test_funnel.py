import os

import numpy as np
import pytest
import yaml
from hypothesis import given, settings, strategies as st
from PIL import Image

from sd_nb.data.funnel import Tally, check_entry, data_card, draw_funnel, read_funnel, write_card, write_funnel

REASONS = ["aesthetic", "size", "same url", "404"]
ENTRIES = [dict(step="filter", asked=100, kept=40, dropped={"aesthetic": 50, "size": 10}),
           dict(step="download", asked=40, kept=39, dropped={"404": 1})]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([None, *REASONS])), st.integers(-2, 2))
def test_what_is_counted_adds_up(outcomes, off):
    "Kept and dropped are what was told, in any order of telling, and a wrong number of records is an error"
    entries = []
    for order in (outcomes, outcomes[::-1]):
        tally = Tally("step", asked=len(outcomes) + off)
        for outcome in order: tally.drop(outcome) if outcome else tally.keep()
        if off:
            with pytest.raises(ValueError, match=r"records (lost|too many)|below zero"): tally.entry()
            tally.asked = len(outcomes)
        entries.append(tally.entry())
    assert entries[0] == entries[1] and list(entries[0]["dropped"]) == list(entries[1]["dropped"])
    assert entries[0]["asked"] == len(outcomes) and entries[0]["kept"] == outcomes.count(None)
    assert entries[0]["dropped"] == {o: outcomes.count(o) for o in set(outcomes) - {None}}
    assert [*entries[0]["dropped"].values()] == sorted(entries[0]["dropped"].values(), reverse=True)


def test_a_tally_that_was_not_asked_sums_up():
    "Without a number asked for, it is the sum; a reason for nothing is not written"
    tally = Tally("step")
    tally.keep(3); tally.drop("size", 2); tally.drop("never", 0)
    assert tally.entry() == dict(step="step", asked=5, kept=3, dropped=dict(size=2))


def test_the_list_travels(tmp_path):
    "Written and read it is the same, the same entries give the same bytes, and no directory is an empty list"
    (tmp_path / "a").mkdir()
    assert read_funnel(tmp_path / "a") == read_funnel(tmp_path / "nowhere") == []
    for _ in range(2):
        write_funnel(tmp_path / "a", ENTRIES)
        assert read_funnel(tmp_path / "a") == ENTRIES
    assert [o.name for o in (tmp_path / "a").iterdir()] == ["funnel.json"]


def test_a_list_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    "A process that dies before the rename leaves the old list, and one that does not add up is never written"
    write_funnel(tmp_path, ENTRIES[:1])
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError): write_funnel(tmp_path, ENTRIES)
    with pytest.raises(ValueError, match="5 records lost"): write_funnel(tmp_path, [dict(ENTRIES[0], kept=35)])
    assert read_funnel(tmp_path) == ENTRIES[:1]
    assert [o.name for o in tmp_path.iterdir()] == ["funnel.json"]


@pytest.mark.parametrize("text, words", [
    ("[{", "not JSON"), ('{"step": 1}', "not a list"), ("[1]", "not a list"), ('[{"step": "a"}]', "not a list"),
    ('[{"step": "a", "asked": "x", "kept": 1, "dropped": {}}]', "not a list"), ("3", "not a list"),
    ('[{"step": "a", "asked": 3, "kept": 1, "dropped": []}]', "not a list"),
    ('[{"step": "a", "asked": 3, "kept": 1, "dropped": {"x": 1}}]', "1 records lost"),
    ('[{"step": "a", "asked": 0, "kept": 1, "dropped": {"x": -1}}]', "below zero")])
def test_a_broken_list_is_one_clear_line(tmp_path, text, words):
    "Whatever is in funnel.json, the error is one line"
    (tmp_path / "funnel.json").write_text(text)
    with pytest.raises(ValueError, match=words) as error: read_funnel(tmp_path)
    assert "\n" not in str(error.value)


def bars(figure):
    "For each step the widths of its parts, left to right"
    rows = {}
    for bar in figure.axes[0].patches: rows.setdefault(round(bar.get_y(), 2), []).append(bar.get_width())
    return [rows[y] for y in sorted(rows)]


def test_the_picture_shows_the_shares():
    "Every step is a whole bar; its parts are shares of what was asked, kept first; every reason stands below"
    figure = draw_funnel(ENTRIES)
    np.testing.assert_allclose(np.concatenate(bars(figure)), [0.4, 0.5, 0.1, 39 / 40, 1 / 40])
    words = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert "aesthetic 50, size 10" in words and "404 1" in words
    with pytest.raises(ValueError, match="no funnel"): draw_funnel([])


def test_a_picture_of_a_step_without_records():
    "A step that was asked about nothing draws an empty bar, and many reasons stay inside the picture"
    draw_funnel([dict(step="none", asked=0, kept=0, dropped={})])
    dropped = {f"a reason with number {i}": 30 - i for i in range(20)}
    figure = draw_funnel([check_entry(dict(step="many", asked=sum(dropped.values()), kept=0, dropped=dropped))] * 2)
    figure.canvas.draw()
    below = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text().startswith("dropped")]
    bar = min(patch.get_window_extent().y1 for patch in figure.axes[0].patches)
    assert below[0].y0 > bar and below[1].y0 > 0


def test_the_card():
    "The head is YAML for the Hub, every number is in the table, notes and picture are where a reader finds them"
    card = data_card(ENTRIES, "Größe: |\n cats", "cc0-1.0", ["Written *by hand*."], "funnel.png")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == dict(license="cc0-1.0", pretty_name="Größe: |\n cats", task_categories=["text-to-image"],
                                        size_categories=["n<1K"])
    assert "| filter | 100 | 40 | aesthetic: 50<br>size: 10 |\n| download | 40 | 39 | 404: 1 |\n" in body
    assert "39 of 100 records" in body and "Written *by hand*." in body and "](funnel.png)" in body
    assert "\n# Größe: \\| cats\n" in body and "unaccounted" not in body


def test_the_card_tells_of_records_lost_between_steps():
    "A step that was asked about fewer than the one before kept is a silent loss, and is written down"
    card = data_card([ENTRIES[0], dict(ENTRIES[1], asked=30, kept=29)], "x", "unknown")
    assert "| *between the steps* | | | 10 unaccounted for |" in card


@pytest.mark.parametrize("kept, word", [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**7, "10M<n<100M"), (10**11, "10B<n<100B")])
def test_the_hubs_words_for_a_size(kept, word):
    "Size categories as the Hub spells them"
    card = data_card([dict(step="a", asked=kept, kept=kept, dropped={})], "x", "mit")
    assert yaml.safe_load(card.split("---\n")[1])["size_categories"] == [word]


def test_card_and_picture_are_files(tmp_path):
    "Twice the same bytes, a picture that opens, and no rest of a temporary file"
    first = None
    for _ in range(2):
        write_card(tmp_path, ENTRIES, "cats", "mit")
        now = {o.name: o.read_bytes() for o in tmp_path.iterdir()}
        assert set(now) == {"README.md", "funnel.png"} and first in (None, now)
        first = now
    assert Image.open(tmp_path / "funnel.png").width == 640
    assert "](funnel.png)" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_hostile_texts_make_a_card(tmp_path):
    "Lone surrogates, dollar signs and pipes in names and reasons neither break the card nor the picture"
    odd = "ab|c\ud800 $\\frac{$\n---"
    write_card(tmp_path, [check_entry(dict(step=odd, asked=2, kept=1, dropped={odd: 1}))], odd, "mit", [odd])
    assert (tmp_path / "README.md").read_text(encoding="utf-8").count("\n| ") == 2
