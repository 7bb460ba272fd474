"""A directory of one `.npy` file per latent, as a data set: what it holds, what is missing, and what is refused."""
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings, strategies as st
from test_loader_faults import Canary, flip, pack

from sd_nb.data.blend import Blend
from sd_nb.data.latents import sample_latents
from sd_nb.data.loader import Packed
from sd_nb.data.tree import Tree, as_moments, file_name, read_captions

LATENT = (4, 8, 8)


def save(directory, rows, **columns):
    "Write a split as the `datasets` library does, with the columns that such a project has"
    keys, captions = zip(*rows)
    ids = dict(input_ids=[[0] * 77] * len(rows), attention_mask=[[1] * 77] * len(rows))
    Dataset.from_dict(dict(image_key=keys, caption=captions, **ids) | columns).save_to_disk(str(directory), num_shards=min(3, len(rows)))
    return directory


@pytest.fixture
def home(tmp_path):
    "Ten latents in a directory, and the data set that names them; latent i holds i / 8"
    (tmp_path / "latents").mkdir()
    rows = [(f"0000{i % 2}.tar::dir/{i:09d}", f"caption {i}, é") for i in range(10)]
    for i, (key, _) in enumerate(rows): np.save(tmp_path / "latents" / file_name(key), np.full(LATENT, i / 8, np.float16))
    save(tmp_path / "train", rows)
    return tmp_path


def test_names_are_the_other_projects():
    "Slashes and double colons as it replaced them"
    assert file_name("00017.tar::000170042") == "00017.tar__000170042.npy"
    assert file_name("journeydb_003.tar::a/b/c") == "journeydb_003.tar__a_b_c.npy"


def test_a_tree_gives_what_was_written(home):
    "Sampled and scaled as the trainer does it, the latents are the files' to six digits; captions are their own"
    tree = Tree(home / "latents", home / "train", latent=LATENT)
    assert (len(tree), tree.missing, tree.spare, tree.kind, tree.shape) == (10, 0, 0, "latents", (8, 8, 8))
    assert tree[:].dtype == tree.dtype == np.float32 and tree[3].shape == (8, 8, 8) and tree[[]].shape == (0, 8, 8, 8)
    z = sample_latents(tree[[7, 0, -1]], torch.randn(3, *LATENT), 0.18215)
    want = torch.tensor([7, 0, 9]).view(-1, 1, 1, 1).expand(3, *LATENT) / 8
    torch.testing.assert_close(z, want, rtol=1e-6, atol=1e-6)
    assert [tree.captions[i] for i in (7, 0, -1)] == ["caption 7, é", "caption 0, é", "caption 9, é"]
    assert tree.meta["key"][7].as_py() == "00001.tar::dir/000000007"
    with pytest.raises(IndexError, match="no sample 10: there are 10"): tree[[10]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-30, 30, width=16), min_size=16, max_size=16), st.floats(0.01, 10))
def test_no_bit_of_a_latent_is_lost(values, scale):
    "Whatever the scale, the half-precision number comes back"
    x = np.array(values, np.float16).reshape(1, 4, 2, 2)
    z = sample_latents(as_moments(x, scale), torch.zeros(1, 4, 2, 2), scale)
    np.testing.assert_array_equal(z.numpy().astype(np.float16), x)


def test_order_is_the_packed_one(home, tmp_path):
    "The same batches as a packed directory of that length; and the two can be mixed"
    tree, packed = Tree(home / "latents", home / "train", latent=LATENT), Packed(pack(tmp_path / "p", [10], (8, 8, 8)))
    for step in range(5): np.testing.assert_array_equal(tree.draw(step, 4, 9), packed.draw(step, 4, 9))
    blend = Blend([tree, packed], [1, 1]).select("train")
    assert len(blend) == 18 and blend[blend.draw(0, 4, 0)].dtype == np.float32 and len(blend.captions) == 18


def test_what_is_missing_is_counted(home):
    "Rows without a file and files without a row are left out; the others keep their captions"
    for i in (2, 5, 9): (home / "latents" / file_name(f"0000{i % 2}.tar::dir/{i:09d}")).unlink()
    np.save(home / "latents" / "stray.npy", np.zeros(LATENT, np.float16))
    (home / "latents" / "notes.txt").write_text("not a latent")
    tree = Tree(home / "latents", home / "train", latent=LATENT)
    assert (len(tree), tree.missing, tree.spare) == (7, 3, 1)
    assert [int(o * 8 + 0.5) for o in tree[:][:, 0, 0, 0] * 0.18215] == [0, 1, 3, 4, 6, 7, 8]
    assert tree.captions == [f"caption {i}, é" for i in (0, 1, 3, 4, 6, 7, 8)]


def test_a_tree_without_captions_is_every_file(home):
    "In order of name, with empty captions"
    tree = Tree(home / "latents", latent=LATENT)
    assert (len(tree), tree.missing, tree.spare, set(tree.captions)) == (10, 0, 0, {""})


@pytest.mark.parametrize("keys", [("a.tar::x/y", "a.tar::x_y"), ("a::b", "a__b"), ("same", "same")])
def test_fault_22_two_keys_with_one_file_are_refused(home, keys):
    "Both are named"
    save(home / "clash", [(key, "caption") for key in keys])
    with pytest.raises(ValueError, match="have one file") as error: Tree(home / "latents", home / "clash", latent=LATENT)
    assert all(repr(key) in str(error.value) for key in keys)


def test_fault_22_prefixes_do_not_meet(tmp_path):
    "1, 10 and 100 are three pictures"
    for i, key in enumerate(("1", "10", "100")): np.save(tmp_path / f"{key}.npy", np.full(LATENT, i, np.float16))
    tree = Tree(tmp_path, save(tmp_path / "t", [("100", "c"), ("1", "a"), ("10", "b")]), latent=LATENT)
    assert [round(float(o) * 0.18215) for o in tree[:][:, 0, 0, 0]] == [2, 0, 1] and tree.captions == ["c", "a", "b"]


def break_as(kind, path, tmp_path):
    "Spoil one latent"
    good = np.load(path)
    if kind == "truncated": path.write_bytes(path.read_bytes()[:-1])
    elif kind == "empty": path.write_bytes(b"")
    elif kind == "header": flip(path, 3)
    elif kind == "pickle": np.save(path, np.array([Canary(tmp_path / "canary")], object), allow_pickle=True)
    else: np.save(path, dict(single=good.astype(np.float32), shape=good[:, :4], nan=good * np.nan, inf=good + np.inf)[kind])


@pytest.mark.parametrize("kind", ["truncated", "empty", "header", "pickle", "single", "shape", "nan", "inf"])
def test_fault_24_a_spoilt_latent_is_named(home, kind, tmp_path):
    "In one line when it is read; the others are unharmed, and nothing is executed"
    name = file_name("00001.tar::dir/000000003")
    break_as(kind, home / "latents" / name, tmp_path)
    tree = Tree(home / "latents", home / "train", latent=LATENT)
    with pytest.raises(ValueError, match=name) as error: tree[[2, 3]]
    assert "\n" not in str(error.value) and tree[[2, 4]].shape == (2, 8, 8, 8) and not (tmp_path / "canary").exists()


def test_a_tree_that_is_none_is_refused(home, tmp_path):
    "No directory, no latents, no captions, a foreign data set, nothing that matches: one line each"
    with pytest.raises(FileNotFoundError, match="no latents"): Tree(home / "train")
    with pytest.raises(FileNotFoundError, match="no latents"): Tree(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no state.json"): Tree(home / "latents", home)
    with pytest.raises(ValueError, match="none of its 10 latents belongs to a row"): Tree(home / "latents", save(home / "o", [("x", "y")]))
    Dataset.from_dict(dict(text=["a"])).save_to_disk(str(home / "foreign"))
    with pytest.raises(ValueError, match="foreign: .*image_key"): Tree(home / "latents", home / "foreign")
    with pytest.raises(ValueError, match="no split 'val'"): Tree(home / "latents").select("val")


def test_a_torn_or_selected_table_is_refused(home):
    "A cut Arrow file, and a data set whose rows are chosen by another file"
    (arrow, *_) = sorted((home / "train").glob("*.arrow"))
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[:100])
    with pytest.raises(ValueError, match="train: "): read_captions(home / "train")
    arrow.write_bytes(whole)
    state = json.loads((home / "train/state.json").read_text()) | dict(_indices_data_files=[dict(filename="indices.arrow")])
    (home / "train/state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="a selection of rows"): read_captions(home / "train")
