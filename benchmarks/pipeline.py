"""A whole picture beside diffusers' pipeline, on the same weights, steps and noise: pictures first, then times.

    python benchmarks/pipeline.py                    the embedded model at its own size, DPM-Solver++ 2M in 20 steps
    python benchmarks/pipeline.py --model DIR --steps 50 --sampler ddim
    python benchmarks/pipeline.py --random           a small model with random weights, to see that the script works
    python benchmarks/pipeline.py --fidelity         at equal fidelity: our default sampler, with as few steps as it needs to
                                                     come as near to the end of the path as theirs with 50 steps of DDIM

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
    fidelity: bool = False  # equal distance to a reference of 1000 steps, not equal steps
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


def fewest(args, ours, theirs, prompts, noise, size):
    "The least steps of our default sampler that end as near to 1000 steps of DDIM as theirs does with 50, and both distances"
    options = dict(guidance=args.guidance, latents=noise, progress=False)
    truth = ours(prompts, "", 1000, sampler="ddim", output="latent", **options)
    latents = theirs(prompts, negative_prompt=[""] * len(prompts), num_inference_steps=50, guidance_scale=args.guidance,
                     latents=noise, height=size, width=size, output_type="latent").images

    def miss(z): return ((z - truth).square().mean() / truth.square().mean()).sqrt().item()
    for steps in range(8, 51):
        if (near := miss(ours(prompts, "", steps, output="latent", **options))) <= miss(latents): return steps, near, miss(latents)
    raise SystemExit("our default sampler comes nowhere as near within 50 steps")


def equal_fidelity(args, ours, prompts, noise, size):
    "Times of a picture of the same quality."
    theirs = open_theirs(ours, "ddim")
    steps, near, theirs_near = fewest(args, ours, theirs, prompts, noise, size)

    def draw_ours(): return ours(prompts, "", steps, args.guidance, latents=noise, output="np", progress=False)

    def draw_theirs():
        return theirs(prompts, negative_prompt=[""] * len(prompts), num_inference_steps=50, guidance_scale=args.guidance,
                      latents=noise, height=size, width=size, output_type="np").images
    name = f"ours {steps} steps (distance {near:.4f}), theirs 50 of DDIM ({theirs_near:.4f})"
    return dict(name=name) | in_turn(draw_ours, draw_theirs, args.rounds)


def main(args):
    refuse_when_busy(args.anyway)
    torch.set_num_threads(args.threads)
    ours = open_ours(args)
    noise, prompts, size = ours.noise(args.batch), [args.prompt] * args.batch, ours.sampling.size
    if args.fidelity:
        row = equal_fidelity(args, ours, prompts, noise, size)
        print("{name}: ours {ours:.3f} s, theirs {theirs:.3f} s, ratio {ratio:.3f} ({lowest:.3f} to {highest:.3f})".format(**row))
        if args.out: save(args.out, [row], guidance=args.guidance, rounds=args.rounds)
        return
    theirs = open_theirs(ours, args.sampler)

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
