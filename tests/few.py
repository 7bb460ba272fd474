"""A hundred of the embedded emoji as a data set of their own, so that a test of the whole path takes seconds."""
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice

from sd_nb.config import PRESETS
from sd_nb.data.emoji import embedded
from sd_nb.data.images import find_shards, read_shard, write_shards

SMALL = ["--size", "16", "--unet.width", "16", "--unet.heads", "2", "--unet.groups", "8", "--autoencoder.width", "8", "--autoencoder.groups", "4",
         "--clip.text.width", "32", "--unet.d-context", "32", "--clip.text.layers", "1", "--clip.text.vocab", "700",
         "--clip.image.size", "16", "--clip.image.width", "32", "--clip.image.layers", "1", "--log-every", "1", "--warmup", "2"]


def few_shards(out, count=100):
    "Write the first `count` embedded emoji to `out`"
    write_shards(islice(read_shard(find_shards(embedded())[0]), count), out)
    return out


def small_config(**changes):
    "Networks so small that a step takes milliseconds"
    tiny = PRESETS["tiny"]
    unet = replace(tiny.unet, width=16, heads=2, groups=8, d_context=32)
    clip = replace(tiny.clip, text=replace(tiny.clip.text, width=32, layers=1, vocab=700), image=replace(tiny.clip.image, size=16, width=32, layers=1))
    autoencoder = replace(tiny.autoencoder, width=8, groups=4)
    return replace(tiny, size=16, unet=unet, clip=clip, autoencoder=autoencoder, log_every=1, warmup=2, **changes)


def torchrun(processes, *words, check=True, **kwargs):
    "Run `python -m sd_nb.train` with these words under torchrun"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "sd_nb.train", "--", *map(str, words)]
    return subprocess.run(command, check=check, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"), timeout=300, **kwargs)
