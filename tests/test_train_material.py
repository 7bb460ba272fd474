"""What a run learns from: latents that were encoded before give the run that encodes for itself."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from few import few_shards
from safetensors.torch import load_file, save_file

import sd_nb
from sd_nb.data.encode import Encode
from sd_nb.train.__main__ import main
from sd_nb.train.material import encoded


MODEL = Path(sd_nb.__file__).parent / "assets" / "model"


@pytest.fixture(scope="module")
def data(tmp_path_factory): return few_shards(tmp_path_factory.mktemp("material") / "few", 40)


def begin(run, model=MODEL):
    "A run that has its autoencoder and text encoder already"
    shutil.copytree(model, run / "model")
    return run


def train(run, data, *more):
    return main([str(o) for o in ["tiny", "--run", run, "--data", data, "--steps", 3, "--batch", 8, "--log-every", 1, *more]])


def losses(run): return [json.loads(line)["loss"] for line in open(run / "metrics.jsonl")]


def test_encoded_latents_train_as_the_pictures_do(tmp_path, data):
    "The same losses, from a run that has never seen a pixel"
    Encode(data, tmp_path / "latents", size=64).run()
    runs = begin(tmp_path / "pictures"), begin(tmp_path / "encoded")
    assert train(runs[0], data) == train(runs[1], tmp_path / "latents") == 0
    assert (runs[0] / "cache").exists() and not (runs[1] / "cache").exists()
    np.testing.assert_allclose(losses(runs[0]), losses(runs[1]), rtol=1e-3)


def test_latents_of_another_autoencoder_are_refused(tmp_path, data, capsys):
    "One line that says what to do, and no checkpoint"
    Encode(data, tmp_path / "latents", size=64).run()
    run = begin(tmp_path / "run")
    weights = run / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: t * 1.01 for name, t in tensors.items()}, weights)
    with pytest.raises(SystemExit): train(run, tmp_path / "latents")
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "encoded by another autoencoder" in line and "sd-nb convert MODEL" in line
    assert not (run / "checkpoints").exists()


def test_several_shapes_are_refused(tmp_path):
    "Latents in buckets: one of them is to be named"
    for shape in ("16x32", "32x16"):
        (tmp_path / shape).mkdir()
        (tmp_path / shape / "manifest.json").touch()
    with pytest.raises(ValueError, match="latents of 2 shapes; give one of them as --data, such as .*16x32"): encoded(tmp_path)
    assert encoded(tmp_path / "16x32") == tmp_path / "16x32" and encoded(tmp_path / "none") is None
