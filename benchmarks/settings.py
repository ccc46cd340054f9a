"""Which settings of IPGO are worth their time? The default preset is chosen from this table.

    python benchmarks/settings.py --count 6 --out docs/settings.md

Each variant differs in what it names from the base, the method's default; images to judge are drawn in 20 steps.
Prompts are of the train halves; gains are over raw prompts; `unseen` are noise seeds that took no part in the fit.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipgo
from ipgo.prompts import read_prompts
from ipgo.runner import BUNDLED_REWARDS

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "lr 1e-3": {"ascent.lr": 1e-3},
    "lr 3e-3": {"ascent.lr": 3e-3},
    "lr 1e-2": {"ascent.lr": 1e-2},
    "lr 3e-2": {"ascent.lr": 3e-2},
    "K = 1": {"ascent.backprop_steps": 1},
    "K = 2": {"ascent.backprop_steps": 2},
    "K = 4": {"ascent.backprop_steps": 4},
    "K = 8": {"ascent.backprop_steps": 8},
    "fits in 5 steps": {"sampling.fit_steps": 5},
    "fits in 8 steps": {"sampling.fit_steps": 8},
    "fits in 12 steps": {"sampling.fit_steps": 12},
    "fits in 20 steps": {"sampling.fit_steps": 20},
    "norm of the prompt": {"insertion.norm": None},
    "norm 1": {"insertion.norm": 1.0},
    "norm 2": {"insertion.norm": 2.0},
    "norm 3": {"insertion.norm": 3.0},
    "norm 4": {"insertion.norm": 4.0},
    "norm 8": {"insertion.norm": 8.0},
    "no attention": {"insertion.cross_attention": "none"},
    "no attention, norm 1": {"insertion.cross_attention": "none", "insertion.norm": 1.0},
    "norm as in the paper": {"insertion.norm": 0.0},
    "no rotations": {"insertion.rotations": "none"},
    "free basis": {"insertion.basis": "free"},
    "not bounded": {"insertion.bounded": False},
    "2 + 2": {"insertion.num_prefix": 2, "insertion.num_suffix": 2},
    "5 + 5": {"insertion.num_prefix": 5, "insertion.num_suffix": 5},
    "10 + 10": {"insertion.num_prefix": 10, "insertion.num_suffix": 10},
    "1 + 1": {"insertion.num_prefix": 1, "insertion.num_suffix": 1},
    "no conformity": {"ascent.penalty_weight": 0.0},
    "negative prompt too": {"insertion.negative": True},
    "conformity 1": {"ascent.penalty_weight": 1.0},
    "lr 1e-1": {"ascent.lr": 1e-1},
    "60 steps": {"ascent.steps": 60},
    "four seeds": {"seeds": (0, 1, 2, 3)},
    "fresh noise": {"seeds": ()},
}


def measure(base: dict[str, Any], overrides: dict[str, Any], reward: str, prompts: list[str]) -> str:
    """One line of the table."""
    parts: dict[str, Any] = {
        "insertion": ipgo.IPGO().insertion,
        "ascent": ipgo.IPGO().ascent,
        "sampling": ipgo.Sampling(),
    }
    for key, value in (base | overrides).items():
        part, _, field = key.partition(".")
        if field:
            parts[part] = replace(parts[part], **{field: value})
    start = time.perf_counter()
    result = ipgo.fit(
        prompts,
        reward=reward,
        method=ipgo.IPGO(parts["insertion"], parts["ascent"]),
        sampling=parts["sampling"],
        seeds=(base | overrides).get("seeds", (0,)),
        chunk=len(prompts),
    )
    seconds = (time.perf_counter() - start) / len(prompts)
    unseen = {gain.reward: gain for gain in result.on_unseen_seeds}
    fitted = [gain for gain in result.on_fitted_seeds if gain.reward == reward]
    judge = unseen["judge-object"]
    others = " | ".join(
        f"{unseen[name].gain.value:+.3f}" for name in BUNDLED_REWARDS["emoji"] if name != reward
    )
    own = f"{fitted[0].gain.value:+.3f}" if fitted else ""
    return (
        f"{own} | {unseen[reward].gain.value:+.3f} | {unseen[reward].wins.value:.0%} | {others} "
        f"| {judge.before:.0%} to {judge.after:.0%} | {seconds:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--reward", default="emoji-preference", choices=BUNDLED_REWARDS["emoji"])
    parser.add_argument("--prompts", default="one:train")
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument(
        "--steps", type=int, default=ipgo.IPGO().ascent.steps, help="optimiser steps of the base"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="VARIANT", choices=VARIANTS, help="change the base"
    )
    parser.add_argument("--out", type=Path, help="write the table there, under the command that made it")
    options = parser.parse_args()
    base: dict[str, Any] = {"ascent.steps": options.steps}
    for name in options.set:
        base |= VARIANTS[name]
    prompts = read_prompts(options.prompts)[: options.count]
    others = [name for name in BUNDLED_REWARDS["emoji"] if name != options.reward]
    lines = [
        f"| variant | gain, fitted seed | gain, unseen | wins, unseen | {' | '.join(others)} "
        "| judge: object | seconds a prompt, in all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for name in options.variants:
        lines.append(f"| {name} | {measure(base, VARIANTS[name], options.reward, prompts)} |")
        print(lines[-1], flush=True)
    if options.out:
        command = (
            f"python benchmarks/settings.py --reward {options.reward} --prompts {options.prompts} "
            f"--count {options.count} --steps {options.steps}"
        )
        if options.set:
            command += " --set " + " ".join(f"'{name}'" for name in options.set)
        options.out.write_text(f"`{command}`\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
