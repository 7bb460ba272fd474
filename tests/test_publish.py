"""A cleaned data set opens with `datasets` as it is, never as it was, and goes to the Hub with its card first."""
import shutil
import subprocess
import sys
from itertools import islice

import pytest

from sd_nb.data.clean import Clean
from sd_nb.data.emoji import embedded
from sd_nb.data.images import read_shards, write_shards
from sd_nb.data.publish import as_dataset, push

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture
def made(tmp_path):
    "Forty emoji in three shards, cleaned; two have no caption."
    samples = list(islice(read_shards(embedded()), 40))
    for i in (3, 20): samples[i] = samples[i]._replace(caption="")
    samples[5] = samples[5]._replace(caption="a &amp; b")
    write_shards(samples, tmp_path / "shards", per_shard=15)
    Clean(tmp_path / "shards", tmp_path / "clean", alike=None, license="mit").run()
    return tmp_path / "clean"


def test_the_data_set_is_what_was_cleaned(made):
    """Every row has its own picture and caption, by split, in the order of the shards; what was dropped is not there."""
    data = as_dataset(made, made.parent / "cache")
    truth = {s.key: s for s in read_shards(made.parent / "shards")}
    assert sorted(data) == sorted({s.meta["split"] for s in truth.values()})
    assert sum(map(len, data.values())) == 38
    for split, rows in data.items():
        assert rows["key"] == [key for key, s in truth.items() if s.meta["split"] == split and s.caption]
        for row in rows:
            sample = truth[row["key"]]
            assert row["image"].convert("RGB").tobytes() == sample.image.convert("RGB").tobytes()
            assert row["caption"] == sample.caption.replace("&amp;", "&") and row["weights"] == [1.0] and row["split"] == split


def test_cleaned_anew_is_opened_anew(made):
    """The same directory with other tables is not answered from what `datasets` kept of the first."""
    cache = made.parent / "cache"
    first = sum(map(len, as_dataset(made, cache).values()))
    shutil.rmtree(made)
    Clean(made.parent / "shards", made, alike=None, block=("skin",)).run()
    second = as_dataset(made, cache)
    assert sum(map(len, second.values())) < first
    assert not any("skin" in caption for rows in second.values() for caption in rows["caption"])


def test_it_goes_to_the_hub_with_its_card_first(made, monkeypatch):
    """A private repository, then the card, then the rows: so `datasets` finds the card and adds to it."""
    calls = []
    for name in ("create_repo", "upload_file"):
        monkeypatch.setattr(f"huggingface_hub.HfApi.{name}", lambda self, *args, _name=name, **how: calls.append((_name, args, how)))
    monkeypatch.setattr("datasets.DatasetDict.push_to_hub", lambda self, repo, **how: calls.append(("rows", self, repo, how)))
    push(made, "me/emoji", cache=made.parent / "cache")
    (create, create_args, create_how), (upload, _, upload_how), (rows, data, repo, how) = calls
    assert (create, upload, rows) == ("create_repo", "upload_file", "rows")
    assert create_args == (repo,) == ("me/emoji",) and create_how == dict(repo_type="dataset", private=True, exist_ok=True)
    assert upload_how == dict(path_or_fileobj=made / "README.md", path_in_repo="README.md", repo_id="me/emoji", repo_type="dataset")
    assert how == dict(private=True) and sum(map(len, data.values())) == 38
    calls.clear()
    push(made, "me/emoji", private=False, cache=made.parent / "cache")
    assert calls[0][2]["private"] is calls[2][3]["private"] is False


def test_the_pushed_file_holds_the_pictures(made):
    """What is sent, Parquet with the bytes of the pictures, opens without the shards."""
    data = as_dataset(made, made.parent / "cache")["train"]
    pictures = [row["image"].tobytes() for row in data]
    data.to_parquet(made.parent / "train.parquet")
    shutil.rmtree(made.parent / "shards")
    again = datasets.load_dataset("parquet", data_files=str(made.parent / "train.parquet"), cache_dir=str(made.parent / "other"), split="train")
    assert [row["image"].tobytes() for row in again] == pictures


def test_what_is_not_whole_is_refused(made, tmp_path):
    """A directory of anything else, a run that broke off, shards that changed and a set with nothing in it are named in one line."""
    with pytest.raises(FileNotFoundError, match="nothing: no cleaned data set"): as_dataset(tmp_path / "nothing")
    (made / "funnel.json").rename(tmp_path / "aside")
    with pytest.raises(FileNotFoundError, match="or cleaning was interrupted"): as_dataset(made)
    (tmp_path / "aside").rename(made / "funnel.json")
    Clean(tmp_path / "shards", tmp_path / "none", least=1000).run()
    with pytest.raises(ValueError, match="no picture stayed"): as_dataset(tmp_path / "none", tmp_path / "cache")
    path = tmp_path / "shards/00001.tar"
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(ValueError, match="shard 00001 is not the one"): as_dataset(made, tmp_path / "cache")


def test_without_datasets_there_is_one_line(made):
    """The library is asked for only where it is needed, and its absence is said plainly."""
    code = ("import sys; sys.modules['datasets'] = None\nfrom sd_nb.data.publish import as_dataset\n"
            f"try: as_dataset({str(made)!r})\nexcept ValueError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "datasets is not installed; pip install datasets\n", done.stderr
