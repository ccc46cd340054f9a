"""How many last steps should carry gradient, and how many steps should a fit sample with?

    python benchmarks/truncation.py [--backend emoji] [--out build/truncation.md]

For T denoising steps and gradient through the last K of them:
- the cosine between the truncated and the full gradient of the reward with respect to what the default preset
  learns, at the start of a fit, as the mean over prompts;
- the reward that it reaches for the same number of denoiser calls, drawn at `--evaluate-steps` on the fitted seeds
  and on unseen ones, as the gain over the raw prompt.
With few steps of the optimiser a fit may be too slow, so --rates tries multiples of the default learning rates.
Prompts are of the train halves, so the defaults that are chosen here can be judged on the test halves.
"""

import argparse
import itertools
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import ipgo
from ipgo.adapters import Adapter, InsertionAdapter
from ipgo.evaluation import Score, evaluate, summarise
from ipgo.models import BUNDLED_REWARDS
from ipgo.prompts import read_prompts
from ipgo.training import first_gradient

SEEDS = (0, 1, 2, 3)
UNSEEN = (1000, 1001, 1002, 1003)


def gradient(task: ipgo.Task, method: ipgo.IPGO, backprop_steps: int) -> Tensor:
    """(P, n): of each prompt's reward with respect to its n parameters, before the first step."""
    adapter = InsertionAdapter.start(
        task.backend, task.prompts, method.insertion, seed=task.seed, shared=False, sampling=task.sampling
    )
    first_gradient(task, adapter, replace(method.ascent, backprop_steps=backprop_steps, penalty_weight=0.0))
    found = [each.grad.flatten(1) for each in adapter.parameters() if each.grad is not None]
    return torch.cat(found, dim=1)


def cosines(task: ipgo.Task, method: ipgo.IPGO, depths: Sequence[int]) -> dict[int, float]:
    """The mean cosine with the full gradient, for each K; 0 is all steps, as is what reaches as far."""
    full = gradient(task, method, task.sampling.steps)
    return {
        k: torch.cosine_similarity(gradient(task, method, k), full).mean().item() if k else 1.0
        for k in depths
        if k < task.sampling.steps
    }


def judged(task: ipgo.Task, adapters: Mapping[str, Adapter], sampling: ipgo.Sampling) -> list[Score]:
    """Scores on all seeds of what a fit learned, or of the raw prompts."""
    rewards = {task.reward.name: task.reward}
    return evaluate(
        task.backend, adapters, rewards, task.prompts, (*SEEDS, *UNSEEN), sampling, task.reward.name
    )


def table(options: argparse.Namespace) -> str:
    """Markdown."""
    backend = ipgo.load_backend(options.backend, dtype=options.dtype)
    prompts = tuple(prompt for spec in options.prompts for prompt in read_prompts(spec))
    drawn = ipgo.Sampling(steps=options.evaluate_steps, guidance_scale=options.guidance)
    method = ipgo.IPGO()
    lines = [
        "| reward | T | K | rate | cosine with the full gradient "
        "| gain, fitted seeds | gain, unseen seeds | fit seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in options.rewards:
        reward = ipgo.load_reward(name)
        raw = judged(ipgo.Task(backend, reward, prompts, drawn, SEEDS), {"raw": Adapter()}, drawn)
        for steps in options.steps:
            sampling = ipgo.Sampling(steps=steps, fit_steps=None, guidance_scale=options.guidance)
            task = ipgo.Task(backend, reward, prompts, sampling, SEEDS)
            for (k, cosine), rate in itertools.product(
                cosines(task, method, options.backprop).items(), options.rates
            ):
                ascent = replace(
                    method.ascent,
                    steps=max(len(SEEDS), options.budget // steps),
                    backprop_steps=k or steps,
                    lr=rate * method.ascent.lr,
                    lr_basis=rate * method.ascent.lr_basis,
                )
                start = time.perf_counter()
                *_, last = replace(method, ascent=ascent).fit(task)
                seconds = time.perf_counter() - start
                scores = [*raw, *judged(task, {"ipgo": last.adapter}, drawn)]
                fitted, unseen = (summarise(scores, seeds=each)[0].gain.value for each in (SEEDS, UNSEEN))
                cells = (
                    name,
                    steps,
                    k or "all",
                    f"{rate:g}",
                    f"{cosine:.2f}",
                    f"{fitted:+.3f}",
                    f"{unseen:+.3f}",
                    f"{seconds:.0f}",
                )
                row = f"| {' | '.join(map(str, cells))} |"
                print(row, flush=True)
                lines.append(row)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backend", default="emoji")
    parser.add_argument("--rewards", nargs="+", default=list(BUNDLED_REWARDS))
    parser.add_argument(
        "--prompts",
        nargs="+",
        default=["one:train?n=2", "two:train?n=2", "styled:train?n=2"],
        help="sets or files",
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 20, 50], help="T")
    parser.add_argument("--backprop", type=int, nargs="+", default=[1, 2, 4, 8, 0], help="K; 0 is all")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1.0], help="multiples of the learning rates"
    )
    parser.add_argument("--budget", type=int, default=320, help="denoiser calls of a fit, per prompt")
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the backend's own")
    parser.add_argument("--evaluate-steps", type=int, default=20)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="write the table there, under the command that made it")
    options = parser.parse_args()
    result = table(options)
    if options.out:
        words = ["python", "benchmarks/truncation.py"]
        for key, value in vars(options).items():
            if key != "out" and value is not None:
                words += [
                    f"--{key.replace('_', '-')}",
                    *map(str, value if isinstance(value, list) else [value]),
                ]
        options.out.write_text(f"`{shlex.join(words)}`\n\n{result}\n")


if __name__ == "__main__":
    main()
