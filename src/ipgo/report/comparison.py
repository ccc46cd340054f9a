"""Write what a comparison found: a page, and its tables as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ipgo.comparison import Comparison
from ipgo.evaluation import average
from ipgo.prompts import Prompt
from ipgo.report import charts
from ipgo.report.build import VISIBLE, environment, picture_uri
from ipgo.report.identity import sentences, strangers
from ipgo.report.rows import Row, own_scores, strange_to
from ipgo.report.tables import Table, span, tables
from ipgo.rewards import optimised
from ipgo.settings import flatten
from ipgo.store import Run

SHEET_PROMPTS = 24  # of the contact sheet: a page must open
SHEET_PIXELS = 160


@dataclass(frozen=True)
class Sheet:
    """The same prompts down, the entries across, all from one seed: data URIs, None where there is no image.

    Nor is there one of what serves no noise but its own, on other noise: that would be the raw image.
    """

    title: str
    labels: list[str]
    lines: list[tuple[str, list[str | None]]]


def write_comparison(folder: Comparison, entries: Sequence[Row]) -> dict[str, Path]:
    """Write comparison.html, .md and .csv from what is stored; what is unfinished is left out."""
    found = tables(folder, entries)  # once: every pair of entries is resampled for them
    return {
        "report": folder.write("comparison.html", render(folder, entries, found)),
        "table": folder.write("comparison.md", markdown(folder, entries, found)),
        "numbers": folder.write("comparison.csv", numbers(entries, folder.plan.reward)),
    }


def render(folder: Comparison, entries: Sequence[Row], found: Sequence[Table]) -> str:
    """The page as text, with the tables that were `found`."""
    plan, reward = folder.plan, folder.plan.reward
    raw = next((row for row in entries if row.method == "raw"), None)  # drawn as the fits draw
    hues = {row.label: charts.hue(number) for number, row in enumerate(entries)}  # the same in every chart
    shown = [row for row in entries if row.curve and row.method != "raw"]
    own = {label: flatten(dict(settings)) for label, settings in plan.entries.items()}
    template = environment().get_template("comparison.html.j2")
    return template.render(
        plan=plan,
        reward=reward,
        lead=lead(entries, reward),
        failures={row.label: row.errors for row in entries if row.errors},
        strange=incomparable(entries),
        tables=found,
        curve=charts.lines(
            {row.label: row.curve for row in shown}, hues, "calls", None if raw is None else raw.final
        ),
        raw=raw,
        curve_legend=[(row.label, hues[row.label]) for row in shown],
        scatters=_scatters(entries, reward, hues),
        scatter_legend=[(_on_its_noise(row), hues[row.label]) for row in entries if row.unseen or row.fitted],
        sheets=_sheets(folder),
        common=flatten(dict(plan.common)),
        own=own,
        facts=folder.facts,
    )


def lead(entries: Sequence[Row], reward: str) -> str:
    """The result in words: who gained most where it was fitted, and where it was not.

    Entries that are judged on fewer prompts than others are left out.
    """
    text, strange = "", strange_to(entries, reward)
    most = max(row.judged for row in entries)
    some = [row for row in entries if row.label not in strange and row.judged == most]
    for place, noise in (("fitted", "the noise that was fitted"), ("unseen", "unseen noise")):
        gains = [(row.label, getattr(row, place)[reward]) for row in some if reward in getattr(row, place)]
        if gains:
            label, gain = max(gains, key=lambda found: found[1].gain.value)
            if abs(gain.gain.value) < VISIBLE:
                text += f"On {noise}, no entry raised {reward}. "
                continue
            change = f"{gain.gain.value:+.3f} {span(gain.gain)}".strip()
            verb, degree = ("optimised", "most") if gain.gain.value > 0 else ("lowered", "least")
            text += f"On {noise}, {label} {verb} {reward} {degree}, by {change}. "
    return text or "Nothing is finished yet that could be compared."


def incomparable(entries: Sequence[Row]) -> list[str]:
    """In words, whose scores are not comparable with those of the others."""
    return sentences(strangers([(row.label, row.rewards) for row in entries]))


def markdown(folder: Comparison, entries: Sequence[Row], found: Sequence[Table]) -> str:
    """The tables that were `found`, for a document."""
    plan = folder.plan
    budget = f", {plan.budget:,} weighted denoiser calls a prompt" if plan.budget else ""
    counts = [f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}"]
    counts.append(f"{len(plan.prompts)} {'prompt' if len(plan.prompts) == 1 else 'prompts'}")
    parts = [f"# {' on '.join(counts)}: {_plain(folder.plan.reward)}{budget}"]
    for table in found:
        lines = [
            table.head,
            ["---"] * len(table.head),
            *([each.text for each in line] for line in table.lines),
        ]
        parts.append(f"## {_plain(table.title)}\n\n{_plain(table.note)}")
        parts.append("\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines))
    strange = [f"- {_plain(each)}" for each in incomparable(entries)]
    if strange:
        parts.append("\n".join(["## Scores that are not comparable\n", *strange]))
    errors = [f"- {row.label}: {_plain(error)}" for row in entries for error in row.errors]
    if errors:
        parts.append("\n".join(["## Failures\n", *errors]))
    return "\n\n".join(parts) + "\n"


COLUMNS = (
    *("entry", "method", "on", "reward", "held_out", "n", "raw", "value", "gain", "gain_low", "gain_high"),
    *("wins", "wins_low", "wins_high", "last_step", "best_of_run", "weighted_calls", "seconds"),
    "reward_fingerprint",
)


def numbers(entries: Sequence[Row], reward: str) -> str:
    """comparison.csv: a line for each entry, kind of noise and reward, without rounding.

    Bare prompts have a value and no gain; the last step and the best of the run are of the optimised reward alone.
    """
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in entries:
        for line in (*_gains(row), *_levels(row)):
            line |= {"entry": row.label, "method": row.method, "seconds": row.seconds}
            line |= {"weighted_calls": row.weighted}
            line["reward_fingerprint"] = " ".join(row.rewards.get(line["reward"], ()))
            if line["reward"] == reward:
                line |= {"last_step": row.final, "best_of_run": row.best}
            writer.writerow(line)
    return stream.getvalue()


def _gains(row: Row) -> Iterator[dict[str, Any]]:
    places = {"fitted noise": row.fitted, "unseen noise": row.unseen, "unseen prompts": row.unseen_prompts}
    for place, gains in places.items():
        for name, found in gains.items():
            yield {
                **{"on": place, "reward": name, "held_out": found.held_out, "n": found.gain.n},
                **{"raw": found.before, "value": found.after},
                **{"gain": found.gain.value, "gain_low": found.gain.low, "gain_high": found.gain.high},
                **{"wins": found.wins.value, "wins_low": found.wins.low, "wins_high": found.wins.high},
            }


def _levels(row: Row) -> Iterator[dict[str, Any]]:
    """What bare prompts have of each reward."""
    if row.method != "raw":
        return
    for unseen, place in ((False, "fitted noise"), (True, "unseen noise")):
        for name in dict.fromkeys(each.reward for each in row.scores):
            if scores := own_scores(row, name, unseen):
                found = average(scores, row.label, name)
                yield {"on": place, "reward": name, "n": found.n, "value": found.value}


def _scatters(entries: Sequence[Row], reward: str, hues: Mapping[str, int]) -> list[tuple[str, Markup]]:
    """For each held-out reward: every entry's gain in it against its gain in the optimised one."""
    gains = {row.label: row.unseen or row.fitted for row in entries}
    own = optimised(reward)
    names = dict.fromkeys(name for each in gains.values() for name in each if name not in own)
    charted = []
    for name in names:
        found = {label: each for label, each in gains.items() if {name, reward} <= each.keys()}
        points = [(each[reward].gain.value, each[name].gain.value) for each in found.values()]
        charted.append((name, charts.scatter(points, {label: hues[label] for label in found})))
    return charted


def _on_its_noise(row: Row) -> str:
    """The label, and what its gains are of where that is not unseen noise."""
    return row.label if row.unseen else f"{row.label} (on fitted noise)"


def _sheets(folder: Comparison) -> list[Sheet]:
    """One from the first fitted seed, one from the first unseen one."""
    runs = {label: run for label in folder.plan.entries if (run := folder.run(label)) is not None}
    if not runs:
        return []
    config = next(iter(runs.values())).config
    named = (("Fitted noise", config.seeds[:1]), ("Unseen noise", config.new_seeds[:1]))
    count = len(next(iter(runs.values())).prompts)
    some = f", the first {SHEET_PROMPTS} of {count} prompts" if count > SHEET_PROMPTS else ""
    return [_sheet(runs, f"{title}, seed {seed}{some}", seed) for title, seeds in named for seed in seeds]


def _sheet(runs: dict[str, Run], title: str, seed: int) -> Sheet:
    """Entries of the method raw have a column each; where there is none, raw images come from any run."""
    raw = {label: run for label, run in runs.items() if run.config.method_name == "raw"}
    drawn = {label: run for label, run in runs.items() if label not in raw}
    befores = [[run] for run in raw.values()] or [list(runs.values())]
    lines = []
    for prompt in next(iter(runs.values())).prompts[:SHEET_PROMPTS]:
        found = [
            next(filter(None, (_picture(run, prompt, "before", seed) for run in some)), None)
            for some in befores
        ]
        found += [
            _picture(run, prompt, "after", seed)
            if seed in run.config.seeds or run.transfers != "nothing"
            else None
            for run in drawn.values()
        ]
        lines.append((prompt.text, found))
    return Sheet(title, [*(raw or ["raw"]), *drawn], lines)


def _picture(run: Run, prompt: Prompt, when: str, seed: int) -> str | None:
    return picture_uri(run.image_file(prompt, when, seed), SHEET_PIXELS)


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is, in a cell too."""
    for sign in "\\`*_<>[]|#":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
