"""What IPGO does to every bundled reward on every bundled prompt set, on seeds and prompts it was not fitted to.

    python benchmarks/end_to_end.py --modes one-seed seeds shared plus --count 10 --out docs/end-to-end.md

Modes, all with the default preset but for what is named:
- one-seed: prompt-wise, fitted on seed 0;
- seeds: prompt-wise, cycling over four seeds;
- shared, plus: prompt-batch, with bare embeddings (IPGO) and with those that attend to the prompt (IPGO+), fitted on
  the train half, judged on the test half.
Prompts are of the test halves. Runs are kept in build/benchmarks, so that an interrupted benchmark goes on.
"""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipgo
from ipgo.adapters import Adapter
from ipgo.artefacts import load_scores, save_scores
from ipgo.evaluation import Gain, evaluate, summarise
from ipgo.prompts import read_prompts
from ipgo.rewards.emoji import load_judge
from ipgo.runner import BUNDLED_REWARDS

REWARDS = BUNDLED_REWARDS["emoji"]
SETS = ("one", "two", "styled")
FOLDER = Path("build/benchmarks/end-to-end")
UNSEEN = (1000, 1001, 1002, 1003)
BARE = {"cross_attention": "none", "norm": 1.0}  # embeddings that do not look at the prompt at hand
HEADER = (
    "| mode | prompts | reward | before | after, fitted | win rate, fitted | after, unseen | win rate, unseen "
    "| held-out rewards, unseen | judge: object | calls, of which with gradient | seconds | MiB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def prompt_wise(name: str, prompts: Sequence[str], reward: str, seeds: Sequence[int]) -> str:
    """One line of the table for fits of one row a prompt."""
    result = ipgo.fit(prompts, reward=reward, seeds=seeds, out=FOLDER / name)
    results = [json.loads(path.read_text()) for path in sorted((FOLDER / name).glob("prompts/*/result.json"))]
    return line(reward, result.on_fitted_seeds, result.on_unseen_seeds, results[0]["cost"])


def prompt_batch(name: str, train: Sequence[str], test: Sequence[str], reward: str, method: ipgo.IPGO) -> str:
    """One line for a single row fitted to `train` and judged on `test`; cost is that of the whole fit."""
    fitted = ipgo.fit(
        train, reward=reward, method=method, shared=True, seeds=(), unseen_seeds=1, out=FOLDER / name
    )
    file = FOLDER / name / "unseen-prompts.jsonl"
    if not file.is_file():
        backend = ipgo.load_backend("emoji")
        adapters = {"raw": Adapter(), "ipgo": fitted[0].adapter}
        rewards = {each: ipgo.load_reward(each) for each in REWARDS}
        scores = evaluate(backend, adapters, rewards, test, UNSEEN, ipgo.Sampling(), reward, load_judge())
        save_scores(file, scores)
    scores = load_scores(file)
    cost = json.loads(next((FOLDER / name).glob("prompts/*/result.json")).read_text())["cost"]
    return line(reward, None, summarise(scores), cost, len(train))


def line(
    reward: str, fitted: list[Gain] | None, unseen: list[Gain], cost: Mapping[str, Any], share: int = 1
) -> str:
    """The cells from `before` on. `share` turns a per-prompt cost back into that of the whole fit."""
    by_name = {gain.reward: gain for gain in unseen}
    own = by_name[reward]
    on_fitted = next((gain for gain in fitted or [] if gain.reward == reward), None)
    others = "; ".join(
        f"{name.removeprefix('emoji-')} {by_name[name].gain.value:+.3f}" for name in REWARDS if name != reward
    )
    judge = by_name["judge-object"]
    calls, measured = cost["calls"], cost["measured"]
    cells = [
        f"{own.before:.3f}",
        f"{on_fitted.after:.3f}" if on_fitted else "",
        percent(on_fitted) if on_fitted else "",
        f"{own.after:.3f}",
        percent(own),
        others,
        f"{judge.before:.0%} to {judge.after:.0%}",
        f"{calls['denoiser'] * share:.0f}, {calls['denoiser_grad'] * share:.0f}",
        f"{measured['seconds'] * share:.0f}",
        f"{measured['peak_memory_mib']:.0f}",
    ]
    return " | ".join(cells)


def percent(gain: Gain) -> str:
    """The win rate with its interval."""
    return f"{gain.wins.value:.0%} ({gain.wins.low:.0%} to {gain.wins.high:.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--modes", nargs="+", default=["one-seed"], choices=["one-seed", "seeds", "shared", "plus"]
    )
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS), choices=REWARDS)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--count", type=int, default=30, help="prompts of each half, 30 at most")
    parser.add_argument("--steps", type=int, default=150, help="optimiser steps of the prompt-batch modes")
    parser.add_argument("--out", type=Path, help="write the table there, under the command that made it")
    options = parser.parse_args()
    lines = [HEADER]
    for mode, kind, reward in itertools.product(options.modes, options.sets, options.rewards):
        train, test = (read_prompts(f"{kind}:{half}")[: options.count] for half in ("train", "test"))
        name = f"{mode}-{kind}-{reward}-{options.count}"
        if mode in ("one-seed", "seeds"):
            cells = prompt_wise(name, test, reward, (0,) if mode == "one-seed" else (0, 1, 2, 3))
        else:
            insertion = ipgo.Insertion() if mode == "plus" else replace(ipgo.Insertion(), **BARE)
            # The schedule of presets/ipgo-plus.yaml for both, with its four prompts a step in one batch: it is faster.
            ascent = replace(ipgo.IPGO().ascent, steps=options.steps, lr=0.01, lr_decay=0.95, decay_every=15)
            ascent = replace(ascent, batch_size=4, accumulate=1)
            cells = prompt_batch(name, train, test, reward, ipgo.IPGO(insertion, ascent))
        lines.append(f"| {mode} | {kind} | {reward} | {cells} |")
        print(lines[-1], flush=True)
    if options.out:
        settings = " ".join(
            f"--{key.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, list) else value}"
            for key, value in vars(options).items()
            if key != "out"
        )
        table = "\n".join(lines)
        options.out.write_text(f"`python benchmarks/end_to_end.py {settings}`\n\n{table}\n")


if __name__ == "__main__":
    main()
