"""IPGO's settings side by side at one budget, on prompts of the train halves: docs/settings.md says what came out.

    python benchmarks/settings.py --prompts styled:train --reward emoji-preference --entries ipgo embedding
    python benchmarks/settings.py --prompts styled:train --reward emoji-preference --shared --device cuda

Entries are those of benchmarks/settings.yaml, as `ipgo compare --config` reads them. Prompt-wise an entry is fitted to
all prompts over seeds 0 to 3, and judged on four others. With --shared it is fitted to two of three prompts, with noise
that is always new, and judged on the third that it never saw. All prompts are rows of one batch, also when they are
judged, which a GPU likes: `ipgo compare` does the same prompt by prompt, and keeps images and embeddings.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ipgo.adapters import Adapter, generate
from ipgo.budget import Price
from ipgo.cli_compare import entries_of, read_comparison
from ipgo.compare import within_budget
from ipgo.comparison import Plan
from ipgo.config import RunConfig
from ipgo.evaluation import Drawing, Gain, Score, score, summarise
from ipgo.prompts import read_prompts
from ipgo.runner import BUNDLED_REWARDS, Models, load_models
from ipgo.task import Task

ENTRIES = Path(__file__).with_suffix(".yaml")
SEEDS = (0, 1, 2, 3)
PRICE = Price(1.6, 2.0)  # of calls with gradient; measured on two CPU cores
RAW = "raw"


def fitted(config: RunConfig, models: Models) -> Adapter:
    """What the entry learns from its prompts."""
    task = Task(
        models.backend,
        models.reward,
        config.prompts,
        config.sampling.fitting,
        config.seeds,
        config.seed,
        config.shared,
    )
    *_, last = tqdm(config.method.fit(task), disable=None, leave=False)
    return last.adapter.to(models.backend.device)


def judged(
    label: str, adapter: Adapter, prompts: Sequence[str], config: RunConfig, models: Models
) -> list[Score]:
    """Every reward and the judge on seeds that were not fitted, one batch a seed."""
    drawings = []
    for seed in config.new_seeds:
        with torch.no_grad():
            images = generate(models.backend, prompts, [seed] * len(prompts), adapter, config.sampling)
        drawings += [
            Drawing(label, prompt, seed, image.float()) for prompt, image in zip(prompts, images, strict=True)
        ]
    return score(drawings, models.rewards, config.reward, models.judge)


def line(label: str, reward: str, gains: Sequence[Gain]) -> str:
    """A row of the table."""
    unseen = {gain.reward: gain for gain in gains}
    others = [f"{unseen[name].gain.value:+.3f}" for name in BUNDLED_REWARDS["emoji"] if name != reward]
    own, judge = unseen[reward], unseen["judge-object"]
    cells = [
        label,
        f"{own.gain.value:+.3f} ({own.gain.low:+.3f} to {own.gain.high:+.3f})",
        f"{own.wins.value:.0%}",
        *others,
        f"{judge.before:.0%} to {judge.after:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--entries", nargs="+", help="default: all of the file that are for the mode")
    parser.add_argument("--prompts", default="styled:train")
    parser.add_argument("--reward", default="emoji-preference", choices=BUNDLED_REWARDS["emoji"])
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--budget", type=int, default=400, help="weighted calls for a prompt, prompt-wise")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    prompts = tuple(read_prompts(options.prompts))
    fit = tuple(each for number, each in enumerate(prompts) if number % 3 < 2) if options.shared else prompts
    judge = tuple(each for each in prompts if each not in fit) if options.shared else prompts
    common = RunConfig(
        fit,
        reward=options.reward,
        seeds=() if options.shared else SEEDS,
        shared=options.shared,
        device=options.device,
        dtype=options.dtype,
    ).to_json()
    common = {key: value for key, value in common.items() if key not in ("prompts", "method")}
    every = read_comparison(str(ENTRIES))["entries"]
    chosen = options.entries or [label for label in every if label.startswith("shared") == options.shared]
    budget = None if options.shared else options.budget
    plan = Plan(fit, common, entries_of(",".join(chosen), every, {}), budget, PRICE)
    plan.check()
    models = load_models(plan.config(chosen[0]))
    raw = judged(RAW, Adapter(), judge, plan.config(chosen[0]), models)
    others = [name.removeprefix("emoji-") for name in BUNDLED_REWARDS["emoji"] if name != options.reward]
    head = ["variant", options.reward.removeprefix("emoji-"), "wins", *others, "judge: object"]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for label in chosen:
        config = within_budget(plan, label, plan.config(label), models)
        scores = [*raw, *judged(label, fitted(config, models), judge, config, models)]
        print(line(label, options.reward, summarise(scores)), flush=True)


if __name__ == "__main__":
    main()
