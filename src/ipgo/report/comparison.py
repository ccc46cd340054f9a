"""Write what a comparison found: a page, and its tables as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from ipgo.comparison import Comparison
from ipgo.config import flatten
from ipgo.evaluation import Gain, Interval, average
from ipgo.report import charts
from ipgo.report.build import environment, mood, picture_uri
from ipgo.report.identity import MARK, strangers, told
from ipgo.report.rows import Matrix, Row, matrices, own_scores, rows, strange_to
from ipgo.store import Run

SHEET_PROMPTS = 24  # of the contact sheet: a page must open
SHEET_PIXELS = 160
COST = {
    "denoiser": "calls",
    "denoiser_grad": "with gradient",
    "denoiser_grad_both": "in both halves",
}


@dataclass(frozen=True)
class Cell:
    """A text, and good or bad where it has a sign that is no accident of the last digit."""

    text: str
    mood: str = ""


@dataclass(frozen=True)
class Table:
    """`note` says how to read it."""

    title: str
    note: str
    head: list[str]
    lines: list[list[Cell]]


@dataclass(frozen=True)
class Sheet:
    """The same prompts down, the entries across, all from one seed: data URIs, None where there is no image."""

    title: str
    labels: list[str]
    lines: list[tuple[str, list[str | None]]]


def write_comparison(folder: Comparison) -> dict[str, Path]:
    """Write comparison.html, .md and .csv from what is stored; what is unfinished is left out."""
    entries = rows(folder)
    return {
        "report": folder.write("comparison.html", render(folder, entries)),
        "table": folder.write("comparison.md", markdown(folder, entries)),
        "numbers": folder.write("comparison.csv", numbers(entries)),
    }


def render(folder: Comparison, entries: Sequence[Row]) -> str:
    """The page as text."""
    plan, reward = folder.plan, raised(folder)
    raw = next((row.means[0] for row in entries if row.method == "raw" and row.means[0] is not None), None)
    shown = [row for row in entries if len(row.curve) > 1]
    own = {label: flatten(dict(settings)) for label, settings in plan.entries.items()}
    template = environment().get_template("comparison.html.j2")
    return template.render(
        plan=plan,
        reward=reward,
        lead=lead(entries, reward),
        failures={row.label: row.errors for row in entries if row.errors},
        strange=incomparable(entries),
        tables=tables(folder, entries),
        curve=charts.lines([row.curve for row in shown], "calls", raw.value if raw else None),
        curve_legend=[(row.label, charts.hue(number)) for number, row in enumerate(shown)],
        scatters=_scatters(entries, reward),
        scatter_legend=[(row.label, charts.hue(number)) for number, row in enumerate(entries) if row.fitted],
        sheets=_sheets(folder),
        common=flatten(dict(plan.common)),
        own=own,
        facts=folder.facts,
    )


def raised(folder: Comparison) -> str:
    """The reward that all entries raise."""
    return str(folder.plan.common["reward"])


def lead(entries: Sequence[Row], reward: str) -> str:
    """The result in words: who gained most where it was fitted, and where it was not."""
    text, strange = "", strange_to(entries, reward)
    some = [row for row in entries if row.label not in strange]
    for place, noise in (("fitted", "the noise that was fitted"), ("unseen", "unseen noise")):
        gains = [(row.label, getattr(row, place)[reward]) for row in some if reward in getattr(row, place)]
        if gains:
            label, gain = max(gains, key=lambda found: found[1].gain.value)
            text += (
                f"On {noise}, {label} changed {reward} most, by {gain.gain.value:+.3f}{_span(gain.gain)}. "
            )
    return text or "Nothing is finished yet that could be compared."


def incomparable(entries: Sequence[Row]) -> list[str]:
    """In words, whose scores do not compare with those of the others."""
    return told(strangers([(row.label, row.rewards) for row in entries]))


def tables(folder: Comparison, entries: Sequence[Row]) -> list[Table]:
    """All tables, in the order of their weight."""
    reward = raised(folder)
    return [
        raised_table(entries, reward),
        held_out_table(entries, reward),
        cost_table(folder, entries),
        *(matrix_table(each, reward) for each in matrices(entries, reward)),
    ]


def raised_table(entries: Sequence[Row], reward: str) -> Table:
    """What the methods did to the reward that they raise."""
    prompts = any(row.unseen_prompts for row in entries)
    head = ["entry", "fitted noise", "gain", "wins over raw", "last step", "best of run"]
    head += ["unseen noise", "gain", "wins over raw", *(["gain on unseen prompts"] if prompts else [])]
    lines, strange = [], strange_to(entries, reward)
    for row in entries:
        label = f"{row.label} {MARK}" if row.label in strange else row.label
        line = [Cell(label), _value(row.means[0]), _gain(row.fitted, reward), _wins(row.fitted, reward)]
        line += [_number(row.final), _number(row.best)]
        line += [_value(row.means[1]), _gain(row.unseen, reward), _wins(row.unseen, reward)]
        lines.append([*line, *([_gain(row.unseen_prompts, reward)] if prompts else [])])
    note = (
        "Gains and wins are over the entry's own raw images, with 95% bootstrap intervals. Images and gains are "
        "those of the adapter that a method returns: the best of its run by the raised reward where it keeps that, "
        "else the last. To compare selection alike, “last step” and “best of run” are the raised reward in the fit "
        "itself. Entries that are tied to their noise have no unseen noise."
    )
    note += (
        f" {MARK}: scored by another {reward}; the line does not compare with the others." if strange else ""
    )
    return Table(f"{reward}, which was raised", note, head, lines)


def held_out_table(entries: Sequence[Row], reward: str) -> Table:
    """What they did to rewards that only judge."""
    names = dict.fromkeys(name for row in entries for name in (*row.unseen, *row.fitted) if name != reward)
    strange = {name: strange_to(entries, name) for name in names}
    lines = [
        [
            Cell(row.label),
            Cell("unseen" if row.means[1] else "fitted" if row.means[0] else "–"),
            *(_judged(row, name, row.label in strange[name]) for name in names),
        ]
        for row in entries
    ]
    note = (
        "Before → after, gain and its interval; on unseen noise, or on fitted noise where there is no other."
    )
    if any(strange.values()):
        note += f" {MARK}: scored by another reward of that name; the cell does not compare with the others."
    return Table("Rewards that were not raised", note, ["entry", "noise", *names], lines)


def cost_table(folder: Comparison, entries: Sequence[Row]) -> Table:
    """What a prompt took, and what came of all of them."""
    price = folder.plan.price
    head = ["entry", *COST.values(), "weighted", "seconds", "peak MiB", "numbers learned", "serves also"]
    lines = []
    for row in entries:
        calls = [Cell(f"{row.calls.get(name, 0):,.0f}") for name in COST]
        line = [Cell(row.label), *calls, Cell(f"{row.weighted:,.0f}"), Cell(f"{row.seconds:,.1f}")]
        line += [Cell(f"{row.memory:,}"), Cell(f"{row.parameters:,}"), Cell(row.transfers or "–")]
        done = f"{row.finished} of {row.prompts}" + (f", {row.failed} failed" if row.failed else "")
        lines.append([*line, Cell(done, "bad" if row.failed else "")])
    weights = f"{price.gradient} (in both halves of guidance {price.both})" if price else "1"
    limit = f", and the budget is {folder.plan.budget:,} of them" if folder.plan.budget else ""
    note = (
        "For each prompt, the fit alone. A denoiser call with gradient, backward pass included, weighs "
        f"{weights} calls, as measured when the comparison began{limit}."
    )
    return Table("Cost", note, [*head, "prompts done"], lines)


def matrix_table(matrix: Matrix, reward: str) -> Table:
    """Who beats whom."""
    lines = [
        [Cell(ours), *(_rate(matrix.wins.get((ours, theirs))) for theirs in matrix.labels)]
        for ours in matrix.labels
    ]
    note = (
        f"How often the row's image has more {reward} than the column's, same prompt and seed; ties are half."
    )
    return Table(f"Win rates on {matrix.noise}", note, ["", *matrix.labels], lines)


def markdown(folder: Comparison, entries: Sequence[Row]) -> str:
    """The tables for a document."""
    plan = folder.plan
    budget = f", {plan.budget:,} weighted denoiser calls a prompt" if plan.budget else ""
    parts = [f"# {len(entries)} entries on {len(plan.prompts)} prompts: {_plain(raised(folder))}{budget}"]
    for table in tables(folder, entries):
        lines = [
            table.head,
            ["---"] * len(table.head),
            *([each.text for each in line] for line in table.lines),
        ]
        parts.append(f"## {_plain(table.title)}\n\n{_plain(table.note)}")
        parts.append("\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines))
    strange = [f"- {_plain(each)}" for each in incomparable(entries)]
    if strange:
        parts.append("\n".join(["## Scores that do not compare\n", *strange]))
    errors = [f"- {row.label}: {_plain(error)}" for row in entries for error in row.errors]
    if errors:
        parts.append("\n".join(["## Failures\n", *errors]))
    return "\n\n".join(parts) + "\n"


def numbers(entries: Sequence[Row]) -> str:
    """One line for each entry, kind of noise and reward, without rounding."""
    head = [
        "entry",
        "method",
        "on",
        "reward",
        "held_out",
        "n",
        "raw",
        "value",
        "gain",
        "gain_low",
        "gain_high",
    ]
    head += ["wins", "wins_low", "wins_high", "last_step", "best_of_run", "weighted_calls", "seconds"]
    head += ["reward_fingerprint"]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(head)
    for row in entries:
        places = {
            "fitted noise": row.fitted,
            "unseen noise": row.unseen,
            "unseen prompts": row.unseen_prompts,
        }
        for place, gains in places.items():
            for name, gain in gains.items():
                line = [
                    row.label,
                    row.method,
                    place,
                    name,
                    gain.held_out,
                    gain.gain.n,
                    gain.before,
                    gain.after,
                ]
                line += [gain.gain.value, gain.gain.low, gain.gain.high]
                line += [gain.wins.value, gain.wins.low, gain.wins.high]
                line += [row.final, row.best, row.weighted, row.seconds]
                writer.writerow([*line, " ".join(row.rewards.get(name, ()))])
    return stream.getvalue()


def _scatters(entries: Sequence[Row], reward: str) -> list[tuple[str, Markup]]:
    """For each held-out reward: every entry's gain in it against its gain in the raised one."""
    gains = [row.unseen or row.fitted for row in entries]
    names = dict.fromkeys(name for each in gains for name in each if name != reward)
    charted = []
    for name in names:
        found = [(number, each) for number, each in enumerate(gains) if {name, reward} <= each.keys()]
        points = [(each[reward].gain.value, each[name].gain.value) for _, each in found]
        charted.append((name, charts.scatter(points, [charts.hue(number) for number, _ in found])))
    return charted


def _sheets(folder: Comparison) -> list[Sheet]:
    """One from the first fitted seed, one from the first unseen one; raw images come from any run."""
    runs = {label: run for label in folder.plan.entries if (run := folder.run(label)) is not None}
    if not runs:
        return []
    config = next(iter(runs.values())).config
    named = (("Fitted noise", config.seeds[:1]), ("Unseen noise", config.new_seeds[:1]))
    return [_sheet(runs, f"{title}, seed {seed}", seed) for title, seeds in named for seed in seeds]


def _sheet(runs: dict[str, Run], title: str, seed: int) -> Sheet:
    drawn = {label: run for label, run in runs.items() if run.config.method_name != "raw"}
    prompts = next(iter(runs.values())).prompts[:SHEET_PROMPTS]
    lines = []
    for prompt in prompts:
        befores = (picture_uri(run.image(prompt, "before", seed), SHEET_PIXELS) for run in runs.values())
        raw = next((uri for uri in befores if uri is not None), None)
        own = [picture_uri(run.image(prompt, "after", seed), SHEET_PIXELS) for run in drawn.values()]
        lines.append((prompt.text, [raw, *own]))
    return Sheet(title, ["raw", *drawn], lines)


def _value(interval: Interval | None) -> Cell:
    return Cell("–" if interval is None else f"{interval.value:.3f}")


def _number(value: float | None) -> Cell:
    return Cell("–" if value is None else f"{value:.3f}")


def _gain(gains: dict[str, Gain], reward: str, before: bool = False) -> Cell:
    gain = gains.get(reward)
    if gain is None:
        return Cell("–")
    start = f"{gain.before:.3f} → {gain.after:.3f}, " if before else ""
    return Cell(f"{start}{gain.gain.value:+.3f}{_span(gain.gain)}", mood(gain.gain.value))


def _judged(row: Row, reward: str, strange: bool) -> Cell:
    """What an entry did to a reward that was not raised."""
    gains = row.unseen or row.fitted
    cell = _level(row, reward) if row.method == "raw" else _gain(gains, reward, before=True)
    return Cell(f"{cell.text} {MARK}", cell.mood) if strange else cell


def _level(row: Row, reward: str) -> Cell:
    """What the raw prompt has of a reward, where others have a gain."""
    scores = own_scores(row, reward, unseen=row.means[1] is not None)
    return _value(average(scores, row.label, reward) if scores else None)


def _span(interval: Interval) -> str:
    return "" if math.isnan(interval.low) else f" ({interval.low:+.3f} to {interval.high:+.3f})"


def _wins(gains: dict[str, Gain], reward: str) -> Cell:
    return _rate(gains[reward].wins if reward in gains else None)


def _rate(interval: Interval | None) -> Cell:
    if interval is None:
        return Cell("–")
    span = "" if math.isnan(interval.low) else f" ({interval.low:.0%} to {interval.high:.0%})"
    return Cell(f"{interval.value:.0%}{span}", mood(interval.value - 0.5))


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is, in a cell too."""
    for sign in "\\`*_<>[]|#":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
