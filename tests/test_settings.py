"""A file of settings is read as if its settings had been typed before the flags."""
import json
from dataclasses import replace

import pytest
import yaml

from sd_nb.config import PRESETS, config_from_args


def read(tmp_path, text, *flags, name="mine.yaml", preset="tiny"):
    (tmp_path / name).write_text(text)
    return config_from_args([preset, "--config", str(tmp_path / name), *flags], "train")


@pytest.mark.parametrize("name, write", [("a.json", json.dumps), ("a.yaml", yaml.safe_dump)])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_survives_a_file(tmp_path, preset, name, write):
    "What `config.json` holds is the config again, also as YAML"
    config = read(tmp_path, write(PRESETS[preset].to_dict()), name=name, preset=preset)
    assert replace(config, config=None) == PRESETS[preset] and type(config.unet) is type(PRESETS[preset].unet)


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    "Numbers, switches both ways, lists, nothing: the flag is the last word wherever it stands"
    text = "warmup: 32\nlr: 1e-4\ngamma: 3\nzero_snr: false\nprediction: x0\nunet: {width: 32, linear_proj: true, mults: [1, 2, 2]}\nrecipes: {clip: {steps: 7}}"
    file = read(tmp_path, text)
    assert (file.warmup, file.lr, file.gamma, file.zero_snr, file.unet.width, file.unet.linear_proj, file.unet.mults) == (32, 1e-4, 3.0, False, 32, True, (1, 2, 2))
    assert file.recipe("clip").steps == 7 and file.recipe("clip").batch == PRESETS["tiny"].recipe("clip").batch
    flags = read(tmp_path, text, "--gamma", "None", "--zero-snr", "--unet.no-linear-proj", "--unet.mults", "1", "1", "1", "--warmup", "64")
    assert (flags.warmup, flags.lr, flags.gamma, flags.zero_snr, flags.unet.linear_proj, flags.unet.mults) == (64, 1e-4, None, True, False, (1, 1, 1))
    assert config_from_args(["tiny", "--warmup", "64", f"--config={tmp_path / 'mine.yaml'}"], "train").warmup == 64


@pytest.mark.parametrize("text, culprit", [
    ("unet: {widht: 3}", "mine.yaml: unknown setting unet.widht"), ("recipes: {clip: {step: 3}}", "unknown setting recipes.clip.step"),
    ("size: many", "--size"), ("size: 100", "--size 100 must be a multiple"), ("size: [1", "mine.yaml: neither YAML nor JSON"), ("", "no settings in it"),
    ("- 1", "no settings in it"), ("!!python/object/apply:os.system ['touch canary']", "neither YAML nor JSON")])
def test_what_is_wrong_in_a_file_is_named(tmp_path, monkeypatch, text, culprit):
    "A ValueError that names the file or the setting; nothing in a file is executed"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=culprit.replace(".", r"\.")): read(tmp_path, text)
    assert not (tmp_path / "canary").exists()


def test_a_missing_file_is_named(tmp_path):
    "As the system says it"
    with pytest.raises(OSError, match="none.yaml"): config_from_args(["tiny", "--config", str(tmp_path / "none.yaml")], "train")
