"""What stays is read with the right picture and the right caption, packs for training, and is refused when the shards have changed."""
import json
from itertools import islice

import numpy as np
import pyarrow.parquet as pq
import pytest
from few import SMALL

from sd_nb.data.clean import Clean
from sd_nb.data.emoji import embedded
from sd_nb.data.images import read_shards, square, write_shards
from sd_nb.data.kept import is_clean, pack_clean, read_clean, read_kept
from sd_nb.data.loader import Packed


@pytest.fixture
def made(tmp_path):
    "Ninety emoji in three shards, cleaned: one has no caption, one has HTML in it, one has two captions."
    samples = list(islice(read_shards(embedded()), 90))
    samples[3] = samples[3]._replace(caption="")
    samples[40] = samples[40]._replace(caption="a <b>bold</b> one")
    samples[41] = samples[41]._replace(meta=samples[41].meta | dict(captions=["one", "two"], weights=[1, 3]))
    write_shards(samples, tmp_path / "shards", per_shard=40)
    Clean(tmp_path / "shards", tmp_path / "clean", alike=None).run()
    return tmp_path / "clean"


def table(made): return [row for _, path in read_clean(made) for row in pq.read_table(path).to_pylist()]


def test_packed_is_what_stayed(made):
    """Every packed picture is its shard's, every caption, weight and split its table's, in one order."""
    pack_clean(made, made.parent / "packed", 16, progress=False)
    packed, rows, truth = Packed(made.parent / "packed"), table(made), {s.key: s for s in read_shards(made.parent / "shards")}
    assert len(rows) == len(packed) == 89 and packed.meta["key"].to_pylist() == [row["key"] for row in rows]
    for i, row in enumerate(rows):
        assert (packed[i] == np.asarray(square(truth[row["key"]].image, 16)).transpose(2, 0, 1)).all()
        extra = json.loads(packed.meta["extra"][i].as_py())
        assert (packed.captions[i], packed.meta["split"][i].as_py()) == (row["caption"], row["split"])
        assert (extra["captions"], extra["weights"]) == (row["captions"], row["weights"])
    assert "a bold one" in packed.captions and "" not in packed.captions


def test_other_rules_are_another_data_set(made):
    """The same shards cleaned otherwise do not pass for what was packed before; cleaned the same way elsewhere they do."""
    pack_clean(made, made.parent / "packed", 8, progress=False)
    before = {path.name: path.read_bytes() for path in (made.parent / "packed").iterdir()}
    Clean(made.parent / "shards", made.parent / "same", alike=None).run()
    pack_clean(made.parent / "same", made.parent / "packed", 8, progress=False)
    assert {path.name: path.read_bytes() for path in (made.parent / "packed").iterdir()} == before
    Clean(made.parent / "shards", made.parent / "other", alike=None, block=("bold",)).run()
    with pytest.raises(ValueError, match="packed from something else"):
        pack_clean(made.parent / "other", made.parent / "packed", 8, progress=False)


def test_what_does_not_fit_is_refused(made):
    """A strange directory, a cleaning that broke off, a shard that changed and one that lost a picture are each one clear line."""
    assert is_clean(made) and not is_clean(made.parent / "shards")
    with pytest.raises(FileNotFoundError, match="shards: no cleaned data set"): read_clean(made.parent / "shards")
    (made / "funnel.json").rename(made.parent / "aside")
    with pytest.raises(FileNotFoundError, match="or cleaning was interrupted"): read_clean(made)
    (made.parent / "aside").rename(made / "funnel.json")
    (shard, rows), (other, _), _ = read_clean(made)
    with pytest.raises(ValueError, match="is missing, which .*00000.parquet names"): list(read_kept(other, rows))
    shard.write_bytes(shard.read_bytes() + bytes(512))
    with pytest.raises(ValueError, match="shard 00000 is not the one that was cleaned; clean anew"): read_clean(made)


def test_training_takes_a_cleaned_directory(made):
    """`sd-nb train tiny --data CLEAN` trains on what stayed, under the clean captions."""
    from sd_nb.train.__main__ import main
    run = made.parent / "run"
    words = ["tiny", *SMALL, "--run", run, "--data", made, "--steps", 2, "--batch", 8]
    for stage in ("autoencoder", "clip", "unet"): assert main([str(word) for word in [*words, "--stage", stage]]) == 0
    packed = Packed(run / "cache" / "pixels")
    assert packed.captions == [row["caption"] for row in table(made)]
    assert [json.loads(line)["step"] for line in open(run / "metrics.jsonl")] == [1, 2]
