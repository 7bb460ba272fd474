"""The config: presets, checks, flags and one-line errors."""
import json
from dataclasses import replace

import pytest

from sd_nb.config import PRESETS, PROMPTS, Config, check, config_from_args, count_parameters, one_line_errors


def test_presets_pass_their_own_check():
    "Every preset is consistent, and sd1 is Stable Diffusion 1.x"
    for config in PRESETS.values(): assert check(config) is config
    assert count_parameters(PRESETS["sd1"])["unet"] == 859_520_964


def test_flags_reach_every_level():
    "A flag of the run, of its recipe and of a nested network all arrive"
    config = config_from_args("tiny --steps 7 --batch 8 --unet.width 32 --stage clip".split(), "train")
    assert config.recipe("clip").steps == 7 and config.recipe("clip").batch == 8
    assert config.recipe("unet") == PRESETS["tiny"].recipe("unet")
    assert config.unet.width == 32


def test_to_dict_is_json():
    "A config survives JSON unchanged, so that a stored one can be compared"
    data = PRESETS["tiny"].to_dict()
    assert json.loads(json.dumps(data)) == data and data["run"] == "runs/tiny"


@pytest.mark.parametrize("words, culprit", [
    ("", "unknown preset ''"), ("huge", "unknown preset 'huge'"), ("tiny --colour 3", "--colour"), ("tiny --batch many", "--batch"),
    ("tiny --stage decoder", "--stage"), ("tiny --size 100", "--size 100"), ("tiny --steps 0", "--steps 0"), ("tiny --minutes -1", "--minutes -1"), ("tiny --minutes nan", "--minutes nan"),
    ("tiny --unet.d-context 5", "--unet.d-context 5"), ("tiny --size 32", "--clip.image.size 64 must equal --size 32")])
def test_mistakes_are_one_line_and_exit_code_2(words, culprit, capsys):
    "A mistake on the command line ends with exit code 2 and one line that names it"
    with pytest.raises(SystemExit) as stop, one_line_errors("train"): config_from_args(words.split(), "train")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and culprit in error and error.count("\n") == 1 and len(error) < 400


def test_other_errors_keep_their_traceback():
    "A bug of ours is not dressed up as a user's mistake"
    with pytest.raises(KeyError), one_line_errors("train"): {}["x"]


def test_prompts():
    "There are sixteen different fixed prompts"
    assert len(set(PROMPTS)) == 16


def test_check_compares_networks():
    "Latent depths that differ between UNet and autoencoder are refused"
    tiny = PRESETS["tiny"]
    with pytest.raises(ValueError, match="c-in 8"): check(replace(tiny, unet=replace(tiny.unet, c_in=8)))
    assert check(Config()) == Config()


@pytest.mark.parametrize("words, message", [
    (["--zero-snr", "--prediction", "eps"], "--zero-snr needs --prediction v"), (["--decay", "1.5"], "--decay 1.5 must lie between"),
    (["--decay", "nan"], "--decay nan must lie between")])
def test_recipes_that_cannot_work_are_refused(words, message):
    "One line that names the flag"
    with pytest.raises(ValueError, match=message): config_from_args(["tiny", *words], "train")


@pytest.mark.parametrize("preset", list(PRESETS))
def test_clip_sees_the_pictures_of_the_run(preset):
    "The three networks of every preset fit one size of pictures; an autoencoder alone may have another"
    config = PRESETS[preset]
    assert config.clip.image.size == config.size
    check(replace(config, size=2 * config.size, stage="autoencoder"))


def test_gamma_may_be_none():
    "No Min-SNR is a choice that the command line can make"
    assert config_from_args(["sd1", "--gamma", "None"], "train").gamma is None
