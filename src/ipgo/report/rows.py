"""The numbers of a comparison, from what its runs stored: no model is needed."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ipgo.budget import Price
from ipgo.comparison import Comparison
from ipgo.config import RunConfig
from ipgo.evaluation import Gain, Interval, Score, average, summarise, win_rate
from ipgo.report import charts
from ipgo.report.build import total_cost
from ipgo.report.identity import Fingerprints, comparable, fingerprints, strangers
from ipgo.store import Run

POINTS = 60  # of a curve of reward against budget
Points = list[tuple[float, float]]
History = list[dict[str, Any]]  # of one prompt, by steps


@dataclass(frozen=True)
class Row:
    """What became of one entry.

    Attributes:
        label, method: its name here, and that of its method.
        transfers: what its adapter serves besides what it was fitted to: "unseen seeds", "unseen seeds and
            prompts" or "nothing"; "" before a prompt is finished, and of bare prompts.
        prompts, finished, failed: how many there are, have a result, and went wrong.
        errors: in words, each once.
        rewards: what its scores were given by, as `identity.fingerprints`.
        weights: of the backend that drew it, as `Backend.identity` has them; None before its first step.
        seeds: those that it was fitted to.
        judged: prompts with images, which its numbers are means over; 0 where that was not kept.
        scores: those of its own images, under its label; of its own raw images under "raw".
        fitted, unseen, unseen_prompts: what it did to each reward, by reward: on noise it was fitted to, on
            noise it was not (empty if it transfers to nothing), and on prompts it was not (shared entries).
        means: the reward that was optimised, on fitted and on unseen noise; None where there is none.
        final, best: that reward in the fit itself, mean over prompts: of the last step and of the best one, each over
            as many steps as compare; the same where a fit keeps its last step.
        curve: (weighted calls for each prompt, the reward so far), mean over prompts.
        together: prompts that were fitted at once, at most: the peak is that of all of these.
        calls, weighted: for each prompt, by kind, and their weighted sum.
        seconds, memory, parameters: for each prompt; the peak in MiB; numbers stored of what was learned or chosen.
    """

    label: str
    method: str
    shared: bool
    transfers: str
    prompts: int
    finished: int
    failed: int
    errors: tuple[str, ...]
    rewards: Fingerprints
    weights: str | None
    scores: list[Score]
    fitted: dict[str, Gain]
    unseen: dict[str, Gain]
    unseen_prompts: dict[str, Gain]
    means: tuple[Interval | None, Interval | None]
    final: float | None
    best: float | None
    curve: Points
    calls: dict[str, float]
    weighted: float
    seconds: float
    memory: int
    parameters: int
    seeds: tuple[int, ...] = ()
    judged: int = 0
    together: int = 0

    @property
    def title(self) -> str:
        """The label, and how many prompts its numbers are of where others are missing."""
        some = 0 < self.judged < self.prompts
        return f"{self.label} ({self.judged} of {self.prompts} prompts)" if some else self.label


@dataclass(frozen=True)
class Matrix:
    """How often the entry of a row beats that of a column: on the same prompts and seeds, ties half."""

    noise: str
    labels: tuple[str, ...]
    wins: dict[tuple[str, str], Interval]


def rows(folder: Comparison) -> list[Row]:
    """One for each entry, in the plan's order."""
    failures = folder.failures()
    price = folder.plan.price or Price(1, 1)
    return [_row(folder, label, failures.get(label, {}), price) for label in folder.plan.entries]


def _row(folder: Comparison, label: str, failures: Mapping[str, Mapping[str, str]], price: Price) -> Row:
    run = folder.run(label)
    errors = tuple(dict.fromkeys(each["error"] for each in failures.values()))
    planned = folder.plan.config(label)
    results = run.results() if run is not None else []
    wrong = len(folder.plan.prompts) if "" in failures and run is None else len(set(failures) - {""})
    wrong += sum(result["status"] == "failed" for result in results)
    scores = [_renamed(each, label) for each in run.scores()] if run is not None else []
    transfers, wide = _transfers(run, planned)
    unseen = _of_seeds(scores, planned.new_seeds) if wide else []
    fitted = _of_seeds(scores, planned.seeds)
    name = "raw" if planned.method_name == "raw" else label  # what its own images are scored under
    # An image that is not finite has no score.
    judged = {each.prompt for each in scores if (each.method, each.reward) == (name, planned.reward)}
    histories = _histories(run, judged)
    final, best = _selection(histories)
    return Row(
        label=label,
        method=planned.method_name,
        shared=planned.shared,
        transfers=transfers,
        prompts=len(folder.plan.prompts),
        finished=len(results),
        failed=wrong,
        errors=errors,
        rewards=fingerprints(folder.identities(label)),
        weights=run.facts.get("weights") if run is not None else None,
        scores=[*fitted, *unseen],
        fitted=_gains(fitted),
        unseen=_gains(unseen),
        unseen_prompts=_gains([_renamed(each, label) for each in folder.unseen_prompts(label)]),
        means=(_mean(fitted, name, planned.reward), _mean(unseen, name, planned.reward)),
        final=final,
        best=best,
        curve=_curve(histories, price),
        seeds=tuple(planned.seeds),
        judged=len(judged),
        **_costs(results, price),
    )


def _renamed(each: Score, label: str) -> Score:
    return each if each.method == "raw" else replace(each, method=label)


def _of_seeds(scores: Sequence[Score], seeds: Collection[int]) -> list[Score]:
    return [each for each in scores if each.seed in seeds]


def _gains(scores: Sequence[Score]) -> dict[str, Gain]:
    return {gain.reward: gain for gain in summarise(scores)}


def _mean(scores: Sequence[Score], name: str, reward: str) -> Interval | None:
    """Of the images that are scored under a name; None without any, as where none of them was finite."""
    own = [each for each in scores if (each.method, each.reward) == (name, reward)]
    return average(own, name, reward) if own else None


def _transfers(run: Run | None, planned: RunConfig) -> tuple[str, bool]:
    """In words, and whether scores on unseen noise mean anything."""
    serves = None if run is None or planned.method_name == "raw" else run.transfers
    if serves is None:
        return "", True
    if serves == "nothing":
        return "nothing", False
    seeds = "unseen seeds, without its noise" if planned.method.one_seed else "unseen seeds"
    return f"{seeds} and prompts" if planned.shared else seeds, True


def _histories(run: Run | None, judged: Collection[str]) -> list[History]:
    """Of the judged prompts, as all other numbers; before there are any, of those that were begun."""
    if run is None:
        return []
    chosen = [prompt for prompt in run.prompts if not judged or prompt.text in judged]
    histories = [run.history(prompt) for prompt in (run.prompts[:1] if run.config.shared else chosen)]
    return [history for history in histories if history]


def _selection(histories: Sequence[History]) -> tuple[float | None, float | None]:
    """The reward of the last step and of the best one, if that was kept, each the mean over prompts."""
    ends = []
    for history in histories:
        last = [value for value in charts.means(history) if value is not None]
        kept = [value for value in charts.so_far(history)[1] if value is not None]
        if last and kept:
            ends.append((last[-1], kept[-1]))
    if not ends:
        return None, None
    final, best = (sum(column) / len(ends) for column in zip(*ends, strict=True))
    return final, best


def _curve(histories: Sequence[History], price: Price) -> Points:
    """Mean over prompts of the reward so far, at equal distances; a prompt keeps its last value to the end."""
    traces: list[tuple[list[float], list[float]]] = []
    for history in histories:
        pairs = zip(history, charts.so_far(history)[1], strict=True)
        known = [(price.of(line.get("calls", {})), value) for line, value in pairs if value is not None]
        if known:
            spent, values = (list(column) for column in zip(*known, strict=True))
            traces.append((spent, values))
    if not traces:
        return []
    first, last = max(spent[0] for spent, _ in traces), max(spent[-1] for spent, _ in traces)
    places = (
        [first + (last - first) * step / (POINTS - 1) for step in range(POINTS)] if last > first else [last]
    )
    points = []
    for place in places:
        values = [each[bisect.bisect_right(spent, place + 1e-6) - 1] for spent, each in traces]
        points.append((place, sum(values) / len(values)))
    return points


def _costs(results: Sequence[Mapping[str, Any]], price: Price) -> dict[str, Any]:
    """Means over the finished prompts; of memory, prompts fitted together and parameters the largest."""
    total = total_cost([dict(result) for result in results])
    count = max(1, len(results))
    calls = {name: value / count for name, value in total["calls"].items()}
    return {
        "calls": calls,
        "weighted": price.of(calls),
        "seconds": total["seconds"] / count,
        "memory": total["memory"],
        "together": total["together"],
        "parameters": total["parameters"],
    }


def matrices(entries: Sequence[Row], reward: str) -> list[Matrix]:
    """Win rates in the optimised reward between all entries that it scored alike: on fitted noise, and on unseen."""
    found = []
    scored = {row.label: row.rewards.get(reward) for row in entries}
    for place, noise in enumerate(("fitted noise", "unseen noise")):
        chosen = {
            row.label: own_scores(row, reward, bool(place)) for row in entries if row.means[place] is not None
        }
        drawn = {label: {(each.prompt, each.seed) for each in own} for label, own in chosen.items()}
        wins = {}
        for ours, theirs in itertools.combinations(chosen, 2):
            if drawn[ours] & drawn[theirs] and comparable(scored[ours], scored[theirs]):
                rate = win_rate([*chosen[ours], *chosen[theirs]], ours, theirs, reward)
                wins[ours, theirs] = rate
                wins[theirs, ours] = replace(rate, value=1 - rate.value, low=1 - rate.high, high=1 - rate.low)
        if wins:
            found.append(Matrix(noise, tuple(chosen), wins))
    return found


def strange_to(entries: Sequence[Row], reward: str) -> tuple[str, ...]:
    """The labels of the entries whose scores of a reward are not comparable with the others'."""
    found = strangers([(row.label, row.rewards) for row in entries])
    return found[reward][1] if reward in found else ()


def own_scores(row: Row, reward: str, unseen: bool) -> list[Score]:
    """The scores of the entry's own images, under its label; the method raw has them as "raw"."""
    name = "raw" if row.method == "raw" else row.label
    chosen = [each for each in row.scores if each.reward == reward and (each.seed not in row.seeds) == unseen]
    return [replace(each, method=row.label) for each in chosen if each.method == name]
