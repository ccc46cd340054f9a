"""How many last steps should carry gradient, and how many steps should a fit sample with?

    python benchmarks/truncation.py [--backend emoji] [--out docs/truncation.md]

For T denoising steps and gradient through the last K of them:
- the cosine between the truncated and the full gradient of the reward with respect to the inserted embeddings,
  at the start of a fit, as the mean over prompts and seeds;
- the reward that IPGO reaches for the same number of denoiser calls, drawn at `--evaluate-steps` on the fitted seed
  and on unseen seeds, as the gain over the raw prompt.
Prompts are of the train halves, so the defaults that are chosen here can be judged on the test halves.
"""

import argparse
import itertools
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import ipgo
from ipgo.adapters import Adapter, InsertionAdapter
from ipgo.evaluation import evaluate, summarise
from ipgo.prompts import read_prompts
from ipgo.sampling import sample, unconditional
from ipgo.training import maximize

STEPS = (8, 20, 50)
BACKPROP = (1, 2, 4, 8, None)  # None: all
UNSEEN = (1000, 1001, 1002)


def embedding_gradient(task: ipgo.Task, insertion: ipgo.Insertion, backprop_steps: int) -> Tensor:
    """(P, n * D): gradient of each prompt's reward with respect to its inserted embeddings."""
    backend = task.backend
    with torch.no_grad():
        original = backend.encode(task.prompts)
        adapter = InsertionAdapter.start(backend, task.prompts, insertion, seed=task.seed, shared=False)
        cond = adapter.condition(backend, task.prompts, original)
    inserted = cond.embeds.clone().requires_grad_(True)
    cond = replace(cond, embeds=inserted)
    uncond = unconditional(backend, cond, task.sampling)
    noise = backend.noise([task.seeds[0]] * len(task.prompts))
    images = sample(backend, cond, uncond, noise, task.sampling, backprop_steps=backprop_steps)
    (gradient,) = torch.autograd.grad(task.reward(images, task.prompts).sum(), inserted)
    count = insertion.num_prefix
    ours = torch.cat([gradient[:, :count], gradient[:, gradient.shape[1] - insertion.num_suffix :]], dim=1)
    return ours.flatten(1)


def cosines(task: ipgo.Task, insertion: ipgo.Insertion) -> dict[int | None, float]:
    """The mean cosine with the full gradient, for each K."""
    full = embedding_gradient(task, insertion, task.sampling.steps)
    return {
        k: torch.cosine_similarity(embedding_gradient(task, insertion, k), full).mean().item()
        for k in BACKPROP
        if k is not None and k < task.sampling.steps
    } | {None: 1.0}


def gains(task: ipgo.Task, method: ipgo.IPGO, steps: int) -> tuple[float, float, float]:
    """Gain over raw on the fitted seed and on unseen seeds, and the seconds of the fit."""
    adapter: Adapter = InsertionAdapter.start(
        task.backend, task.prompts, method.insertion, seed=task.seed, shared=False
    )
    start = time.perf_counter()
    for progress in maximize(task, adapter, method.ascent):
        adapter = progress.adapter
    seconds = time.perf_counter() - start
    found = []
    for seeds in (task.seeds, UNSEEN):
        scores = evaluate(
            task.backend,
            {"raw": Adapter(), "ipgo": adapter},
            {task.reward.name: task.reward},
            task.prompts,
            seeds,
            replace(task.sampling, steps=steps),
            task.reward.name,
        )
        found.append(summarise(scores)[0].gain.value)
    return found[0], found[1], seconds


def table(options: argparse.Namespace) -> str:
    """Markdown."""
    backend = ipgo.load_backend(options.backend)
    prompts = tuple(read_prompts(options.prompts)[: options.count])
    lines = [
        "| reward | T | K | cosine with the full gradient | gain, fitted seed | gain, unseen seeds | fit seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, steps in itertools.product(options.rewards, STEPS):
        sampling = ipgo.Sampling(steps=steps, guidance_scale=options.guidance)
        task = ipgo.Task(backend, ipgo.load_reward(name), prompts, sampling)
        method = ipgo.IPGO()
        agreement = cosines(task, method.insertion)
        for k, cosine in agreement.items():
            ascent = replace(
                method.ascent, steps=max(2, options.budget // steps), backprop_steps=k or steps, lr=options.lr
            )
            fitted, unseen, seconds = gains(task, replace(method, ascent=ascent), options.evaluate_steps)
            row = f"| {name} | {steps} | {k or 'all'} | {cosine:.2f} | {fitted:+.3f} | {unseen:+.3f} | {seconds:.0f} |"
            print(row, flush=True)
            lines.append(row)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backend", default="emoji")
    parser.add_argument("--rewards", nargs="+", default=["emoji-preference", "emoji-aesthetic"])
    parser.add_argument("--prompts", default="one:train", help="a prompt set's half, or a file")
    parser.add_argument("--count", type=int, default=8, help="prompts taken of it")
    parser.add_argument("--budget", type=int, default=400, help="denoiser calls of a fit, per prompt")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the backend's own")
    parser.add_argument("--evaluate-steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write the table there, under the command that made it")
    options = parser.parse_args()
    result = table(options)
    if options.out:
        given = {k: v for k, v in vars(options).items() if k != "out" and v is not None}
        settings = " ".join(
            f"--{key.replace('_', '-')} {' '.join(value) if isinstance(value, list) else value}"
            for key, value in given.items()
        )
        options.out.write_text(f"`python benchmarks/truncation.py {settings}`\n\n{result}\n")


if __name__ == "__main__":
    main()
