"""A whole picture beside diffusers' pipeline, on the same weights, steps and noise: pictures first, then times.

    python benchmarks/pipeline.py                    the embedded model at its own size, DPM-Solver++ 2M in 20 steps
    python benchmarks/pipeline.py --model DIR --steps 50 --sampler ddim
    python benchmarks/pipeline.py --random           a small model with random weights, to see that the script works

Calls are interleaved (ours, theirs, ours, theirs, ...), the first round is thrown away, medians are compared.
A ratio below 1 means that ours is faster.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from common import in_turn, refuse_when_busy, same, save
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

from sd_nb import StableDiffusion

SCHEDULERS = dict(ddim=DDIMScheduler, dpmpp_2m=DPMSolverMultistepScheduler)


@dataclass
class Benchmark:
    "Compare a whole picture's time with diffusers'"
    model: str | None = None  # what `StableDiffusion.from_pretrained` opens; default: the embedded model
    random: bool = False  # a small model with random weights instead
    prompt: str = "red apple, flat style"
    sampler: str = "dpmpp_2m"  # or ddim
    steps: int = 20
    guidance: float = 4.0
    batch: int = 1  # pictures at once
    rounds: int = 5  # timed calls of each
    threads: int = 2
    out: str | None = None  # JSON file for the rows
    anyway: bool = False  # run although the machine has other work


def open_ours(args):
    if args.random:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
        from tiny import tiny_parts
        return StableDiffusion(tiny_parts(), "cpu")
    return StableDiffusion.from_pretrained(args.model, "cpu") if args.model else StableDiffusion.embedded("cpu")


def open_theirs(ours, sampler):
    "diffusers' pipeline on the same weights, through the disk."
    with tempfile.TemporaryDirectory() as home:
        ours.save_pretrained(home)
        pipe = StableDiffusionPipeline.from_pretrained(home)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SCHEDULERS[sampler].from_config(pipe.scheduler.config)
    return pipe


def main(args):
    refuse_when_busy(args.anyway)
    torch.set_num_threads(args.threads)
    ours = open_ours(args)
    theirs, noise, prompts, size = open_theirs(ours, args.sampler), ours.noise(args.batch), [args.prompt] * args.batch, ours.sampling.size

    def draw_ours():
        return ours(prompts, "", args.steps, args.guidance, args.sampler, latents=noise, output="np", spacing="model", progress=False)

    def draw_theirs():
        return theirs(prompts, negative_prompt=[""] * args.batch, num_inference_steps=args.steps, guidance_scale=args.guidance,
                      latents=noise, height=size, width=size, output_type="np").images

    difference = same("picture", torch.tensor(draw_ours()), torch.tensor(draw_theirs()), 4e-3)  # 1/255
    row = dict(name=f"{args.sampler}, {args.steps} steps, {args.batch} of {size} px") | in_turn(draw_ours, draw_theirs, args.rounds) | dict(difference=difference)
    print(f"{row['name']}: ours {row['ours']:.3f} s, theirs {row['theirs']:.3f} s, ratio {row['ratio']:.3f} "
          f"({row['lowest']:.3f} to {row['highest']:.3f}), pictures differ by {difference:.1e}")
    if args.out: save(args.out, [row], guidance=args.guidance, rounds=args.rounds)


if __name__ == "__main__": main(tyro.cli(Benchmark))
