"""The recipes are valid shell, and the trainer understands each word that they give to it."""
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from sd_nb.config import config_from_args

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.sh"))
FAKE = '#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "$WORDS"\n'
GPUS = {"2x-rtx-5090.sh": 2, "8x-a100.sh": 8, "8x-h100.sh": 8, "64-gpus.sh": 64}


def words(recipe, tmp_path, *more):
    "What a recipe hands to torchrun"
    (tmp_path / "torchrun").write_text(FAKE)
    (tmp_path / "torchrun").chmod(0o755)
    env = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", WORDS=str(tmp_path / "words"), FIRST="host0")
    subprocess.run([recipe, *more], check=True, env=env)
    return (tmp_path / "words").read_text().splitlines()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda o: o.name)
def test_valid_shell(recipe):
    "bash reads it to the end, it stops at the first error, and it may be executed"
    subprocess.run(["bash", "-n", recipe], check=True)
    assert "set -euo pipefail" in recipe.read_text() and os.access(recipe, os.X_OK)


@pytest.mark.parametrize("name, gpus", GPUS.items())
def test_the_trainer_understands(tmp_path, name, gpus):
    "Every flag exists, the batch divides by processes and pieces, and a flag of the user's own is the last word"
    recipe = next(o for o in RECIPES if o.name == name)
    got = words(recipe, tmp_path, "my run", "my latents", "--lr", "3e-5")
    split = got.index("--")
    assert got[split - 2:split] == ["-m", "sd_nb.train"] and any(o.startswith("--max-restarts") for o in got)
    config = config_from_args(got[split + 1:], "train")
    assert (config.run, config.data, config.recipe("unet").lr) == (Path("my run"), Path("my latents"), 3e-5)
    assert config.recipe("unet").batch % (gpus * config.recipe("unet").accumulate) == 0
    assert config.precision == "bf16" and config.channels_last


@pytest.mark.parametrize("name", GPUS)
def test_usage(tmp_path, name):
    "Without words it says what it needs"
    recipe = next(o for o in RECIPES if o.name == name)
    done = subprocess.run([recipe], capture_output=True, text=True, env=os.environ | dict(FIRST="host0"))
    assert done.returncode != 0 and f"usage: recipes/{name} RUN LATENTS [FLAGS]" in done.stderr


@pytest.mark.parametrize("stopped", [False, True])
def test_slurm_requeues_what_it_has_stopped(tmp_path, stopped):
    "A run that ends by itself is over; one that was asked to stop is given time to save, and goes back into the queue"
    fakes = dict(scontrol='echo "$@" >> "$LOG"; echo host0', srun="trap 'sleep 0.5; echo saved >> \"$LOG\"; exit 1' TERM\nkill -0 $PPID\n"
                 + ("touch \"$LOG.ready\"; while true; do sleep 0.1; done" if stopped else 'echo trained >> "$LOG"; exit 3'))
    for name, text in fakes.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    env = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", LOG=str(log), SLURM_JOB_NUM_NODES="8", SLURM_JOB_NODELIST="host[0-7]", SLURM_JOB_ID="17")
    job = subprocess.Popen([next(o for o in RECIPES if o.name == "slurm.sh"), "run", "latents"], env=env)
    if stopped:
        while not Path(f"{log}.ready").exists(): time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
    assert job.wait(60) == (0 if stopped else 3)
    assert log.read_text().splitlines()[1:] == (["saved", "requeue 17"] if stopped else ["trained"])
