"""What a fit costs beyond the network passes that it must do, as a ratio measured in one run.

    python benchmarks/overhead.py [--backend emoji] [--rows 1 4]

The bare passes are written here without ipgo's loop, adapters or optimiser, and batched like ipgo's: T - K guided
denoiser calls without a graph, K with one, one decoding, one reward, one backward.
Both are timed in turns. The ratio is the median over the turns, with its quartiles: what else the machine does comes
and goes.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

import ipgo
from ipgo.adapters import InsertionAdapter
from ipgo.prompts import read_prompts
from ipgo.training import maximize


def bare_step(task: ipgo.Task, halves: Tensor, backprop_steps: int) -> None:
    """The passes of one step, on the pipeline's own modules, from the states of both halves of guidance (2P, L, D)."""
    pipe = task.backend.pipe  # type: ignore[attr-defined]
    guidance = task.sampling.scale(task.backend)
    halves = halves.detach().requires_grad_(True)
    latents = task.backend.noise([0] * len(task.prompts))[:, 0]
    scheduler = task.backend.scheduler(task.sampling.steps, latents)
    first = task.sampling.steps - backprop_steps
    for index, timestep in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(index >= first):
            u, c = pipe.unet(torch.cat([latents, latents]), timestep, halves).sample.chunk(2)
            latents = scheduler.step(u + guidance * (c - u), timestep, latents).prev_sample
    images = (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    torch.autograd.grad(task.reward(images, task.prompts).sum(), halves)


def steps_of(task: ipgo.Task, ascent: ipgo.Ascent) -> Iterator[None]:
    """A fit, one step each time."""
    adapter = InsertionAdapter.start(task.backend, task.prompts, ipgo.Insertion(), seed=0, shared=False)
    for _ in maximize(task, adapter, ascent):
        yield


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(task: ipgo.Task, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of our step and of the bare passes, by turn."""
    ascent = replace(ipgo.IPGO().ascent, steps=repeats + 2)
    fit = steps_of(task, ascent)
    backend = task.backend
    with torch.no_grad():
        original = backend.encode(task.prompts)
        adapter = InsertionAdapter.start(backend, task.prompts, ipgo.Insertion(), seed=0, shared=False)
        cond = adapter.condition(backend, task.prompts, original)
        uncond = adapter.unconditional(backend, task.prompts, cond, task.sampling)
        assert uncond is not None
        halves = torch.cat([uncond.embeds, cond.embeds])
    ours, bare = [], []
    for turn in range(repeats + 2):
        mine = seconds(lambda: next(fit))
        theirs = seconds(lambda: bare_step(task, halves, ascent.backprop_steps))
        if turn >= 2:  # warm-up
            ours.append(mine)
            bare.append(theirs)
    return ours, bare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backend", default="emoji")
    parser.add_argument("--reward", default="emoji-preference")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    backend, reward = (
        ipgo.load_backend(options.backend, device="cpu"),
        ipgo.load_reward(options.reward, device="cpu"),
    )
    steps, last = ipgo.Sampling().fitting.steps, ipgo.IPGO().ascent.backprop_steps
    print(f"Images of {steps} steps, the last {last} with gradient.\n")
    print(
        "| rows | a step of the fit | its network passes alone | ratio | quartiles |\n|---|---|---|---|---|"
    )
    for rows in options.rows:
        task = ipgo.Task(backend, reward, tuple(read_prompts("one:train")[:rows]), ipgo.Sampling().fitting)
        ours, bare = measure(task, options.repeats)
        ratios = [mine / theirs for mine, theirs in zip(ours, bare, strict=True)]
        low, middle, high = statistics.quantiles(ratios)
        shown = (f"{statistics.median(each):.3f} s" for each in (ours, bare))
        print(f"| {rows} | {' | '.join(shown)} | {middle:.3f} | {low:.3f} to {high:.3f} |", flush=True)


if __name__ == "__main__":
    main()
