"""IPGO's settings side by side at one budget, on prompts of the train halves: docs/settings.md says what came out.

    python benchmarks/settings.py --prompts one:train two:train --rewards emoji-preference --entries ipgo embedding
    python benchmarks/settings.py --prompts one:train two:train --rewards emoji-preference --shared mixed:train

Entries are those of benchmarks/settings.yaml, or of --config, as `ipgo compare --config` reads them. Prompt-wise an
entry is fitted to all prompts over seeds 0 to 3, and judged on four others. With --shared it is fitted once, to the
prompts that are named there, with noise that is always new, and judged on those of --prompts. Prompts are drawn as one
batch, which a GPU likes, in a prompt-wise fit and when they are judged: `ipgo compare` does the same prompt by prompt,
and keeps images and embeddings. "objects" is how many points more of the images have the objects that the judge looks
for, "likeness" how much more they look like the artwork.
"""

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ipgo.adapters import Adapter, generate
from ipgo.budget import Price
from ipgo.cli_compare import entries_of, read_comparison
from ipgo.compare import within_budget
from ipgo.comparison import Plan, common_settings
from ipgo.config import RunConfig
from ipgo.evaluation import Drawing, Gain, Score, score_drawings, summarise
from ipgo.models import BUNDLED_REWARDS, Models, load_models
from ipgo.prompts import read_prompts
from ipgo.rewards import optimised
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
    own = optimised(config.reward, models.identities)
    return score_drawings(drawings, models.rewards, own, models.judge)


@dataclass(frozen=True)
class Outcome:
    """What a setting did to unseen images of one set: gains over raw in the optimised and held-out rewards."""

    gain: float
    low: float
    high: float
    wins: float  # fraction of images
    others: tuple[float, ...]
    judge: float  # change of the fraction of images whose objects the judge finds
    likeness: float | None  # change of how much they look like the artwork; None where that was optimised

    @classmethod
    def of(cls, reward: str, gains: Sequence[Gain]) -> "Outcome":
        by_name = {gain.reward: gain for gain in gains}
        own, judge, like = by_name[reward], by_name["judge-object"], by_name.get("judge-likeness")
        others = tuple(by_name[name].gain.value for name in held_out(reward))
        return cls(
            own.gain.value,
            own.gain.low,
            own.gain.high,
            own.wins.value,
            others,
            judge.after - judge.before,
            None if like is None else like.gain.value,
        )


def held_out(reward: str) -> list[str]:
    return [name for name in BUNDLED_REWARDS if name not in optimised(reward)]


def told(changes: Sequence[float | None]) -> str:
    """Their mean, if there are any."""
    known = [change for change in changes if change is not None]
    return f"{sum(known) / len(known):+.3f}" if known else "–"


def line(label: str, outcome: Outcome) -> str:
    """A row of the table of one cell."""
    cells = [
        label,
        f"{outcome.gain:+.3f} ({outcome.low:+.3f} to {outcome.high:+.3f})",
        f"{outcome.wins:.0%}",
        *(f"{other:+.3f}" for other in outcome.others),
        f"{100 * outcome.judge:+.0f}",
        told([outcome.likeness]),
    ]
    return f"| {' | '.join(cells)} |"


def summary(found: Mapping[str, Mapping[tuple[str, str], Outcome]]) -> str:
    """Variants down, rewards across: the gain on each set, and what it cost on the mean of the sets."""
    cells = list(dict.fromkeys(cell for outcomes in found.values() for cell in outcomes))
    rewards = list(dict.fromkeys(reward for reward, _ in cells))
    head = ["variant"]
    for reward in rewards:
        sets = " / ".join(prompts.partition(":")[0] for name, prompts in cells if name == reward)
        head += [f"{reward.removeprefix('emoji-')}: {sets}", "least wins", "held out", "objects", "likeness"]
    lines = [head, ["---"] * len(head)]
    for label, outcomes in found.items():
        row = [label]
        for reward in rewards:
            own = [outcome for (name, _), outcome in outcomes.items() if name == reward]
            others = [other for outcome in own for other in outcome.others]
            row += [
                " / ".join(f"{outcome.gain:+.3f}" for outcome in own),
                f"{min(outcome.wins for outcome in own):.0%}",
                told(others),
                f"{100 * sum(outcome.judge for outcome in own) / len(own):+.1f}",
                told([outcome.likeness for outcome in own]),
            ]
        lines.append(row)
    return "\n".join(f"| {' | '.join(each)} |" for each in lines)


def outcomes(
    reward: str, prompts: str, options: argparse.Namespace, shared: dict[tuple[str, str], Adapter]
) -> Iterator[tuple[str, Outcome]]:
    """Each entry on one cell, printed as it comes; `shared` holds what serves all sets, by reward and entry."""
    judged_on = tuple(read_prompts(prompts))
    fit = tuple(read_prompts(options.shared)) if options.shared else judged_on
    config = RunConfig(
        fit,
        reward=reward,
        seeds=() if options.shared else SEEDS,
        shared=bool(options.shared),
        device=options.device,
        dtype=options.dtype,
    )
    common = common_settings(config)
    settings = read_comparison(options.config)
    entries, method = settings["entries"], settings.get("method", {})
    chosen = options.entries or [
        label for label in entries if label.startswith("shared") == bool(options.shared)
    ]
    budget = None if options.shared else options.budget
    plan = Plan(fit, common, entries_of(",".join(chosen), entries, method), budget, PRICE)
    plan.check()
    openings = {label: plan.config(label).opening for label in chosen}
    for label, opening in openings.items():
        if opening != openings[chosen[0]]:
            raise SystemExit(
                f"{label} wants another backend than {chosen[0]}; compare them with `ipgo compare`"
            )
    models = load_models(plan.config(chosen[0]))
    raw = judged(RAW, Adapter(), judged_on, plan.config(chosen[0]), models)
    others = [name.removeprefix("emoji-") for name in held_out(reward)]
    head = [prompts, reward.removeprefix("emoji-"), "wins", *others, "objects", "likeness"]
    print(f"\n| {' | '.join(head)} |\n{'|---' * len(head)}|", flush=True)
    for label in chosen:
        config = within_budget(plan, label, plan.config(label), models)
        adapter = shared.get((reward, label)) or fitted(config, models)
        if options.shared:
            shared[reward, label] = adapter
        scores = [*raw, *judged(label, adapter, judged_on, config, models)]
        outcome = Outcome.of(reward, summarise(scores))
        print(line(label, outcome), flush=True)
        yield label, outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default=str(ENTRIES), help="a file with entries, or ablations or systems")
    parser.add_argument("--entries", nargs="+", help="default: all of the file that are for the mode")
    parser.add_argument("--prompts", nargs="+", default=["styled:train"])
    parser.add_argument("--rewards", nargs="+", default=["emoji-preference"], help="specs, as in fit")
    parser.add_argument("--shared", metavar="PROMPTS", help="prompt-batch, fitted to these; mixed:train, ...")
    parser.add_argument("--budget", type=int, default=400, help="weighted calls for a prompt, prompt-wise")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    found: dict[str, dict[tuple[str, str], Outcome]] = {}
    shared: dict[tuple[str, str], Adapter] = {}
    for reward, prompts in itertools.product(options.rewards, options.prompts):
        for label, outcome in outcomes(reward, prompts, options, shared):
            found.setdefault(label, {})[reward, prompts] = outcome
    if len(options.rewards) * len(options.prompts) > 1:
        print(f"\n{summary(found)}")


if __name__ == "__main__":
    main()
