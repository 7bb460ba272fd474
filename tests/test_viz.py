"""Laws of the pictures: bytes there and back, sheets of the right size, files that are whole, a map that tells the truth."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

from sd_nb import viz

NBS = Path(__file__).resolve().parent.parent / "nbs"


@pytest.fixture(autouse=True)
def close_figures():
    """No test leaves a figure behind."""
    yield
    plt.close("all")


def pictures(n=3, side=8, channels=3):
    """A batch of random pictures, some values outside [-1, 1]."""
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(0))


def test_bytes_there_and_back():
    """Every byte survives the way to [-1, 1] and back."""
    whole = torch.arange(256).repeat(3, 1).reshape(1, 3, 16, 16)
    back = viz.to_uint8(whole / 255 * 2 - 1)
    assert back.dtype == np.uint8 and back.shape == (1, 16, 16, 3)
    assert (back[0].transpose(2, 0, 1) == whole[0].numpy()).all()


def test_out_of_range_is_clipped():
    """Values beyond [-1, 1] become black and white and never wrap round."""
    x = torch.tensor([-7.0, -1.01, 1.01, 7.0]).reshape(1, 1, 2, 2)
    assert viz.to_uint8(x)[0, :, :, 0].ravel().tolist() == [0, 0, 255, 255]


def test_grey_becomes_rgb_and_gradients_do_not_matter():
    """One channel is repeated; half precision and tensors that need a gradient are read as well."""
    x = pictures(channels=1).half().requires_grad_()
    out = viz.to_uint8(x)
    assert out.shape == (3, 8, 8, 3) and (out[..., 0] == out[..., 2]).all()


@pytest.mark.parametrize("bad, word", [(torch.full((1, 3, 2, 2), float("nan")), "diverged"), (torch.zeros(1, 4, 2, 2), "(1, 4, 2, 2)"), (torch.zeros(3, 2, 2), "(3, 2, 2)")])
def test_what_is_no_picture_is_refused(bad, word):
    """NaN, four channels and a missing batch axis are refused with a line that says what came."""
    with pytest.raises(ValueError, match=re.escape(word)): viz.to_uint8(bad)


def test_grid_size_and_content():
    """A sheet has room for every picture, in reading order; unlabelled sheets have no foot."""
    x = pictures(5)
    sheet = viz.grid(x, cols=2, pad=1)
    assert sheet.size == (20, 30)
    assert (np.array(sheet)[11:19, 11:19] == viz.to_uint8(x)[3]).all()
    assert viz.grid(x, cols=2, pad=1, labels=["a"] * 5).height > 30


@pytest.mark.parametrize("kind", [lambda x: x, viz.to_uint8, viz.to_pil, list, lambda x: viz.to_uint8(x) / 255])
def test_grid_reads_every_kind_of_picture(kind):
    """Tensors, bytes, PIL pictures, lists and floats in [0, 1] give the same sheet."""
    x = pictures(4)
    assert np.abs(np.array(viz.grid(kind(x))).astype(int) - np.array(viz.grid(x))).max() <= 1


def test_grid_takes_long_and_foreign_labels():
    """A label of any length, in any script, draws without an error and without growing the sheet."""
    x = pictures(2, side=40)
    plain = viz.grid(x, labels=["a", "b"])
    assert viz.grid(x, labels=["word " * 50, "苹果 🍎 " * 9]).size == plain.size
    assert viz.grid(x, labels=["only the first"]).size == plain.size


def test_empty_sheets_are_refused():
    """No pictures is an error, not an empty file."""
    for make in (viz.grid, viz.show, viz.strip):
        with pytest.raises(ValueError, match="to draw"): make([])


def test_strip_runs_to_the_right():
    """A trajectory of b pictures is b rows, one column for each state."""
    a, b = pictures(2), -pictures(2)
    sheet = np.array(viz.strip([a, b], pad=0))
    assert sheet.shape == (16, 16, 3)
    assert (sheet[:8, 8:] == viz.to_uint8(b)[0]).all() and (sheet[8:, :8] == viz.to_uint8(a)[1]).all()


def test_show_draws_one_axis_for_each_picture():
    """Every picture gets an axis and its title; what is left of the last row stays empty."""
    viz.show(pictures(3), cols=2, titles=["one", "two", "three"])
    axes = plt.gcf().axes
    assert [len(ax.images) for ax in axes] == [1, 1, 1, 0]
    assert [ax.get_title() for ax in axes] == ["one", "two", "three", ""]


def test_running_mean_keeps_a_line():
    """The running mean neither shifts nor bends a straight line, and keeps its length at any length."""
    line = np.arange(300.0)
    np.testing.assert_allclose(viz._smooth(line)[20:-20], line[20:-20])
    for n in (1, 2, 3, 41): assert len(viz._smooth(np.ones(n))) == n and np.allclose(viz._smooth(np.ones(n)), 1)


def test_curve_reads_a_torn_file(tmp_path):
    """metrics.jsonl with a torn last line and rows without the key gives a whole PNG and nothing beside it."""
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(dict(step=i, loss=1 / i)) + "\n" for i in range(1, 50)) + '{"step": 50}\n{"step": 51, "lo')
    out = viz.curve(log, out=tmp_path / "new" / "loss.png")
    assert Image.open(out).format == "PNG" and [p.name for p in out.parent.iterdir()] == ["loss.png"]


def test_curve_refuses_what_is_not_there():
    """A key that no row has is named."""
    with pytest.raises(ValueError, match="accuracy"): viz.curve([dict(step=1, loss=1.0)], keys=["accuracy"])


def test_files_need_no_screen(tmp_path):
    """Drawing to a file opens no figure window and leaves no figure behind."""
    viz.curve([dict(step=1, loss=1.0)], out=tmp_path / "loss.png")
    viz.sd_map(out=tmp_path / "map.png")
    assert not plt.get_fignums()


def test_map_is_reproducible(tmp_path):
    """The same call gives the same bytes, and another highlight gives others."""
    a, b, c = (viz.sd_map(here, out=tmp_path / f"{i}.svg").read_bytes() for i, here in enumerate([None, None, "model.unet"]))
    assert a == b != c


def test_map_refuses_unknown_boxes():
    """A module that is not on the map is named, together with those that are."""
    with pytest.raises(ValueError, match="model.unit.*model.unet"): viz.sd_map("model.unit")


def test_map_and_notebooks_agree():
    """Every box names a notebook that exists, and every notebook that exports a module has its box."""
    boxes = {name.replace(" ", "_") for name, *_ in viz._boxes()}
    parts = {p.stem for p in NBS.glob("[0-5]*.ipynb")}
    assert boxes == parts


def test_readme_shows_the_map_of_today():
    """The picture in README has every box (`python tools/docs.py readme` redraws it)."""
    written = set(re.findall(r"<!-- (.*?) -->", (NBS / "images" / "map.svg").read_text(encoding="utf-8")))
    names = {name.split()[0]: name.split()[1] for name, *_ in viz._boxes()}
    assert [n for n, module in names.items() if not {f"{n} {module}", f"{n} {module.split('.', 1)[-1]}"} & written] == []


def test_boxes_do_not_overlap():
    """Boxes overlap only where one contains the other, and all lie on the sheet."""
    boxes = [box[2:] for box in viz._boxes()]
    for i, (x, y, w, h) in enumerate(boxes):
        assert 0 <= x and 0 <= y and x + w <= 750 and y + h <= 360 + 36 * len(viz._lines())
        for X, Y, W, H in boxes[i + 1:]:
            apart = x + w <= X or X + W <= x or y + h <= Y or Y + H <= y
            inside = x <= X and y <= Y and X + W <= x + w and Y + H <= y + h
            assert apart or inside


def test_one_palette():
    """Colours are different from each other, and every part of the map has one."""
    assert len(set(viz.PALETTE.values())) == len(viz.PALETTE)
    assert set(viz.ROWS) <= set(viz.PALETTE)
