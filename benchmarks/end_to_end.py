"""What IPGO does to every bundled reward on every bundled prompt set, on seeds and prompts it was not fitted to.

    python benchmarks/end_to_end.py --modes seeds one-seed plus shared --count 10 --out build/end-to-end.md

Modes, all with IPGO's defaults but for what is named:
- one-seed: prompt-wise, fitted on seed 0;
- seeds: prompt-wise, cycling over four seeds;
- plus, shared: prompt-batch, with embeddings that attend to the prompt (IPGO+, the preset ipgo-plus) and with bare ones
  (IPGO), fitted once to the set `mixed` with noise that is always new, and judged on each test half.
Prompts are the first of the test halves. Runs are kept in build/benchmarks, so that an interrupted benchmark goes on.
"""

import argparse
import hashlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

import ipgo
from ipgo import files
from ipgo.adapters import Adapter
from ipgo.artefacts import load_adapter, load_scores, save_adapter, save_scores
from ipgo.backends import Backend
from ipgo.config import RunConfig, build, parse, run_parser
from ipgo.evaluation import Gain, Score, evaluate, summarise
from ipgo.models import BUNDLED_REWARDS
from ipgo.prompts import read_prompts
from ipgo.rewards import identity_of, optimised
from ipgo.rewards.emoji import load_judge
from ipgo.runner import peak_memory
from ipgo.settings import read_settings
from ipgo.task import Task

REWARDS = BUNDLED_REWARDS
TRUTH = "emoji-likeness"  # which the judge says of every picture
SETS = ("one", "two", "styled")
FOLDER = Path("build/benchmarks/end-to-end")
UNSEEN = (1000, 1001, 1002, 1003)
BARE = {"cross_attention": "none", "norm": 0.06, "negative": False}  # as the paper has them
HEADER = (
    "| mode | prompts | reward | before | after, fitted | win rate, fitted | after, unseen | win rate, unseen "
    "| held-out rewards, unseen | judge: object | judge: likeness | calls, of which with gradient | seconds | MiB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def prompt_wise(
    backend: Backend, name: str, prompts: Sequence[str], reward: str, seeds: Sequence[int]
) -> str:
    """One line of the table for fits of one row a prompt."""
    result = ipgo.fit(prompts, backend=backend, reward=reward, seeds=seeds, out=FOLDER / name)
    results = [json.loads(path.read_text()) for path in sorted((FOLDER / name).glob("prompts/*/result.json"))]
    costs = [each["cost"] for each in results]
    mean = {
        part: {key: sum(cost[part][key] for cost in costs) / len(costs) for key in costs[0][part]}
        for part in ("calls", "measured")
    }
    return line(reward, result.on_fitted_seeds, result.on_unseen_seeds, mean)


def prompt_batch(
    backend: Backend, name: str, kind: str, test: Sequence[str], reward: str, method: ipgo.IPGO
) -> str:
    """One line for a single row fitted to the set `mixed` and judged on `test`; cost is that of the whole fit."""
    train, sampling, judge = (
        tuple(read_prompts("mixed:train")),
        ipgo.Sampling().fitting,
        ipgo.load_reward(reward),
    )
    name = f"{name}-{known_by(asdict(method), asdict(sampling), train, identity_of(judge), backend.identity)}"
    folder = FOLDER / name
    if not (folder / "cost.json").is_file():
        task = Task(backend, judge, train, sampling, seeds=(), shared=True)
        started = time.monotonic()
        *_, last = tqdm(method.fit(task), name, method.ascent.steps, disable=None)
        measured = {"seconds": time.monotonic() - started, "peak_memory_mib": peak_memory(backend.device)}
        save_adapter(last.adapter, folder, {})
        files.write_json(folder / "cost.json", {"calls": dict(backend.calls), "measured": measured})
    raw = judged(backend, f"raw-{kind}-{backend.dtype}", "raw", Adapter(), test, reward)
    scores = [*raw, *judged(backend, f"{name}/{kind}", "ipgo", load_adapter(folder), test, reward)]
    return line(reward, None, summarise(scores), files.read_json(folder / "cost.json"))


def judged(
    backend: Backend, name: str, label: str, adapter: Adapter, prompts: Sequence[str], reward: str
) -> list[Score]:
    """Every reward and the judge on unseen seeds; kept, so that raw is drawn once."""
    added = [] if reward in (*REWARDS, TRUTH) else [reward]
    rewards = {each: ipgo.load_reward(each) for each in (*REWARDS, *added)}
    sampling, identities = ipgo.Sampling(), {each: identity_of(own) for each, own in rewards.items()}
    file = FOLDER / f"{name}-{known_by(list(prompts), asdict(sampling), identities, backend.identity)}.jsonl"
    if not file.is_file():
        scores = evaluate(backend, {label: adapter}, rewards, prompts, UNSEEN, sampling, "", load_judge())
        save_scores(file, scores, identities)
    return load_scores(file)


def known_by(*parts: Any) -> str:
    """Eight digits of what figures depend on: where that changes, they are made anew."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def line(reward: str, fitted: list[Gain] | None, unseen: list[Gain], cost: Mapping[str, Any]) -> str:
    """The cells from `before` on."""
    by_name = {gain.reward: gain for gain in unseen}
    own = by_name[reward] if reward in by_name else by_name["judge-likeness"]
    on_fitted = next((gain for gain in fitted or [] if gain.reward == reward), None)
    others = "; ".join(
        f"{name.removeprefix('emoji-')} {by_name[name].gain.value:+.3f}"
        for name in REWARDS
        if name not in optimised(reward)
    )
    judge, like = by_name["judge-object"], by_name.get("judge-likeness")
    calls, measured = cost["calls"], cost["measured"]
    cells = [
        f"{own.before:.3f}",
        f"{on_fitted.after:.3f}" if on_fitted else "",
        percent(on_fitted) if on_fitted else "",
        f"{own.after:.3f}",
        percent(own),
        others,
        f"{judge.before:.0%} to {judge.after:.0%}",
        f"{like.before:.3f} to {like.after:.3f}" if like else "",  # not where it was optimised
        f"{calls['denoiser']:.0f}, {calls['denoiser_grad']:.0f}",
        f"{measured['seconds']:.0f}",
        f"{measured['peak_memory_mib']:.0f}",
    ]
    return " | ".join(cells)


def percent(gain: Gain) -> str:
    """The win rate with its interval."""
    return f"{gain.wins.value:.0%} ({gain.wins.bounds('.0%')})"


def preset(name: str) -> RunConfig:
    """The settings of a bundled preset of IPGO; its prompts are none that count."""
    return build(parse(run_parser("ipgo"), read_settings(name, None), []), ("a prompt",))


def main() -> None:
    plus = preset("ipgo-plus").method
    assert isinstance(plus, ipgo.IPGO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--modes", nargs="+", default=["one-seed"], choices=["one-seed", "seeds", "shared", "plus"]
    )
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS), help="specs, as in fit")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--count", type=int, default=30, help="prompts of the test half, 30 at most")
    parser.add_argument(
        "--steps", type=int, default=plus.ascent.steps, help="optimiser steps of the prompt-batch modes"
    )
    parser.add_argument("--dtype", default="auto", help="as of `ipgo fit`")
    parser.add_argument("--out", type=Path, help="write the table there, under the command that made it")
    options = parser.parse_args()
    lines = [HEADER]
    for mode, kind, reward in itertools.product(options.modes, options.sets, options.rewards):
        backend = ipgo.load_backend("emoji", dtype=options.dtype)
        test = read_prompts(f"{kind}:test")[: options.count]
        if mode in ("one-seed", "seeds"):
            seeds = (0,) if mode == "one-seed" else (0, 1, 2, 3)
            cells = prompt_wise(
                backend, f"{mode}-{kind}-{reward}-{backend.dtype}-{options.count}", test, reward, seeds
            )
        else:
            method = replace(plus, ascent=replace(plus.ascent, steps=options.steps))
            if mode == "shared":
                method = replace(method, insertion=replace(plus.insertion, **BARE))
            cells = prompt_batch(
                backend, f"{mode}-{reward}-{backend.dtype}-{options.steps}", kind, test, reward, method
            )
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
