"""Our samplers beside diffusers' schedulers, with a network that costs nothing: what the loop itself takes.

    python benchmarks/samplers.py               50 steps on latents of a 512 px picture
    python benchmarks/samplers.py --steps 20 --side 16

Both do all that one picture needs: choose the levels, scale the input, call the network, step, draw noise. The ends
are compared first (same starting noise, same answers, same dice). Then calls are interleaved, the first round is thrown
away, medians are compared: microseconds for each call of the network; a ratio below 1 means that ours is faster.
`share` is our time beside that of one call of the tiny preset's UNet, at the same size, on the same threads.
"""

import math
import statistics
from dataclasses import dataclass

import torch
import tyro
from common import in_turn, refuse_when_busy, same, save, seconds
from diffusers import (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler,
                       EulerDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler, UniPCMultistepScheduler)

from sd_nb.config import PRESETS
from sd_nb.diffusion.noise import NoiseSchedule, timesteps
from sd_nb.diffusion.samplers import SAMPLERS, noise_over_signal
from sd_nb.model.unet import UNet

THEIRS = dict(
    ddpm=(DDPMScheduler, dict(clip_sample=False)), ddim=(DDIMScheduler, dict(clip_sample=False)),
    euler=(EulerDiscreteScheduler, {}), euler_ancestral=(EulerAncestralDiscreteScheduler, {}),
    heun=(HeunDiscreteScheduler, {}), dpmpp_2m=(DPMSolverMultistepScheduler, {}),
    dpmpp_2m_sde=(DPMSolverMultistepScheduler, dict(algorithm_type="sde-dpmsolver++")),
    unipc=(UniPCMultistepScheduler, {}), lcm=(LCMScheduler, dict(original_inference_steps=100)))
STILL = ("euler", "euler_ancestral", "heun")  # theirs walk in y = x / sqrt(abar) here


@dataclass
class Benchmark:
    "Compare the time of our sampling loops with that of diffusers'"
    steps: int = 50
    side: int = 64  # of the latent; 64 is a picture of 512 pixels
    rounds: int = 20  # timed pictures of each
    threads: int = 2
    out: str | None = None  # JSON file for the rows
    anyway: bool = False  # run although the machine has other work


def their_scheduler(name):
    "The scheduler of this name, on the levels that ours visits."
    cls, options = THEIRS[name]
    spacing = {} if name == "lcm" else dict(timestep_spacing="trailing")
    return cls(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **spacing, **options)


def their_loop(theirs, name, model, x, steps):
    "One picture as their pipelines draw it."
    generator = torch.Generator().manual_seed(0)
    draws = dict(generator=generator) if name in ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "lcm") else {}
    theirs.set_timesteps(steps)
    for t in theirs.timesteps:
        out = model(theirs.scale_model_input(x, t), t)
        x = theirs.step(out, t, x, **draws).prev_sample
    return x


def our_loop(name, model, x, schedule, steps):
    "The same picture with ours."
    for state in SAMPLERS[name](model, x, schedule, levels(name, steps), generator=torch.Generator().manual_seed(0)):
        pass
    return state.x


def levels(name, steps):
    "Evenly spaced from the top; LCM counts in its own hundredths of the way"
    if name != "lcm": return timesteps(steps)
    return torch.tensor([999 - 10 * math.floor(100 * i / steps) for i in range(steps)])


def row(name, args, call):
    "Equal ends, then interleaved times, for each call of the network."
    schedule, theirs, generator = NoiseSchedule(), their_scheduler(name), torch.Generator().manual_seed(1)
    x, eps = torch.randn(2, 1, 4, args.side, args.side, generator=generator)
    s = noise_over_signal(schedule.level(999))
    y, model = x * math.sqrt(1 + s**2) if name in STILL else x, lambda x, t: eps
    pair = (lambda: our_loop(name, model, x, schedule, args.steps),
            lambda: their_loop(theirs, name, model, y, args.steps))
    difference = same(name, *(draw() for draw in pair))
    times, calls = in_turn(*pair, args.rounds), args.steps * 2 - 1 if name == "heun" else args.steps
    times |= {who: times[who] / calls * 1e6 for who in ("ours", "theirs")}
    return dict(row=name, **times, share=times["ours"] / call / 1e6, difference=difference)


@torch.no_grad()
def unet_call(side):
    "Seconds of one call of the tiny preset's UNet."
    config = PRESETS["tiny"].unet
    unet = UNet(config).eval()
    inputs = torch.randn(1, config.c_in, side, side), torch.tensor([500]), torch.randn(1, 77, config.d_context)
    return statistics.median([seconds(unet, *inputs) for _ in range(6)][1:])


def main(args):
    if not 1 <= args.steps <= 100: raise SystemExit(f"--steps {args.steps}: LCM's scheduler takes 1 to 100")
    refuse_when_busy(args.anyway)
    torch.set_num_threads(args.threads)
    call, table = unet_call(args.side), []
    for name in SAMPLERS:
        table.append(row(name, args, call))
        print("{row:16} ours {ours:7.1f} us  theirs {theirs:7.1f} us  ratio {ratio:.3f} ({lowest:.3f} to {highest:.3f})"
              "  share {share:.2%}  difference {difference:.0e}".format(**table[-1]), flush=True)
    if args.out:
        save(args.out, table, steps=args.steps, side=args.side, unet=call)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
