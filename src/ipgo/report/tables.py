"""The tables of a comparison, as texts that a page, a document or a terminal shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ipgo.comparison import Comparison
from ipgo.evaluation import Gain, Interval, average
from ipgo.report.build import sure
from ipgo.report.identity import MARK
from ipgo.report.rows import Matrix, Row, matrices, own_scores, strange_to
from ipgo.rewards import optimised

COST = {
    "denoiser": "calls",
    "denoiser_grad": "with gradient",
    "denoiser_grad_both": "in both halves",
}


@dataclass(frozen=True)
class Cell:
    """A value and what is to be said of it, and good or bad if its interval says so."""

    value: str
    mood: str = ""
    more: str = ""

    @property
    def text(self) -> str:
        """Both, on one line."""
        between = " " if self.more.startswith("(") else ", "
        return f"{self.value}{between}{self.more}" if self.more else self.value


@dataclass(frozen=True)
class Table:
    """`note` says how to read it."""

    title: str
    note: str
    head: list[str]
    lines: list[list[Cell]]


def tables(folder: Comparison, entries: Sequence[Row]) -> list[Table]:
    """All tables, in the order of their weight."""
    reward = folder.plan.reward
    return [
        optimised_table(entries, reward),
        *held_out_tables(entries, reward),
        cost_table(folder, entries),
        *(matrix_table(each, reward) for each in matrices(entries, reward)),
    ]


def optimised_table(entries: Sequence[Row], reward: str) -> Table:
    """What the methods did to the reward that they raise."""
    prompts = any(row.unseen_prompts for row in entries)
    head = ["entry", "fitted noise", "gain", "wins over raw", "last step", "best of run"]
    head += ["unseen noise", "gain there", "wins there", *(["gain on unseen prompts"] if prompts else [])]
    lines, strange = [], strange_to(entries, reward)
    for row in entries:
        label = f"{row.title} {MARK}" if row.label in strange else row.title
        line = [Cell(label), _value(row.means[0]), _gain(row.fitted, reward), _wins(row.fitted, reward)]
        line += [_number(row.final), _number(row.best)]
        line += [_value(row.means[1]), _gain(row.unseen, reward), _wins(row.unseen, reward)]
        lines.append([*line, *([_gain(row.unseen_prompts, reward)] if prompts else [])])
    note = (
        "Gains and wins are over the entry's own raw images, with 95% bootstrap intervals. Images and gains are "
        "those of the adapter that a method returns: the best of its run by the optimised reward where it keeps that, "
        "else the last. To compare selection alike, “last step” and “best of run” are the optimised reward in the fit "
        "itself. Entries that are tied to their noise have no unseen noise. What its interval leaves open has no "
        "colour."
    )
    note += (
        f" {MARK}: scored by another {reward}; the line is not comparable with the others." if strange else ""
    )
    return Table(f"{reward}, which was optimised", note, head, lines)


def held_out_tables(entries: Sequence[Row], reward: str) -> list[Table]:
    """What they did to rewards that only judge; nothing where there are none."""
    names = dict.fromkeys(name for row in entries for name in (*row.unseen, *row.fitted) if name != reward)
    if not names:
        return []
    strange = {name: strange_to(entries, name) for name in names}
    lines = [
        [
            Cell(row.title),
            Cell("unseen" if row.means[1] else "fitted" if row.means[0] else "–"),
            *(_judged(row, name, row.label in strange[name]) for name in names),
        ]
        for row in entries
    ]
    note = (
        "Before → after, gain and its interval; on unseen noise, or on fitted noise where there is no other."
    )
    if any(strange.values()):
        note += f" {MARK}: scored by another reward of that name; the cell is not comparable with the others."
    own = optimised(reward)
    heads = (f"{name} (a part of it)" if name in own else name for name in names)
    return [Table("Other rewards", note, ["entry", "noise", *heads], lines)]


def cost_table(folder: Comparison, entries: Sequence[Row]) -> Table:
    """What a prompt took, and what came of all of them."""
    price = folder.plan.price
    head = ["entry", *COST.values(), "weighted", "seconds", "prompts at once", "peak MiB"]
    head += ["numbers stored", "serves also"]
    lines = []
    for row in entries:
        calls = [Cell(f"{row.calls.get(name, 0):,.0f}") for name in COST]
        line = [Cell(row.label), *calls, Cell(f"{row.weighted:,.0f}"), Cell(f"{row.seconds:,.1f}")]
        line += [Cell(str(row.together or "–")), Cell(f"{row.memory:,}")]
        line += [Cell(f"{row.parameters:,}"), Cell(row.transfers or "–")]
        done = f"{row.finished} of {row.prompts}" + (f", {row.failed} failed" if row.failed else "")
        lines.append([*line, Cell(done, "bad" if row.failed else "")])
    weights = f"{price.gradient} (in both halves of guidance {price.both})" if price else "1"
    limit = f", and the budget is {folder.plan.budget:,} of them" if folder.plan.budget else ""
    note = (
        "For each prompt, the fit alone. A denoiser call with gradient, backward pass included, weighs "
        f"{weights} calls, as given or else measured when the comparison began{limit}. The peak is that of all prompts "
        "at once. Methods that change the model's weights fit one at a time; so does every method with --chunk 1."
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


def _value(interval: Interval | None) -> Cell:
    return Cell("–" if interval is None else f"{interval.value:.3f}")


def _number(value: float | None) -> Cell:
    return Cell("–" if value is None else f"{value:.3f}")


def _gain(gains: dict[str, Gain], reward: str, before: bool = False) -> Cell:
    gain = gains.get(reward)
    if gain is None:
        return Cell("–")
    change, within = f"{gain.gain.value:+.3f}", span(gain.gain)
    mood = sure(gain.gain)
    if before:
        return Cell(f"{gain.before:.3f} → {gain.after:.3f}", mood, f"{change} {within}".strip())
    return Cell(change, mood, within)


def _judged(row: Row, reward: str, strange: bool) -> Cell:
    """What an entry did to a reward that was not optimised."""
    gains = row.unseen or row.fitted
    cell = _level(row, reward) if row.method == "raw" else _gain(gains, reward, before=True)
    if not strange:
        return cell
    return (
        replace(cell, more=f"{cell.more} {MARK}")
        if cell.more
        else replace(cell, value=f"{cell.value} {MARK}")
    )


def _level(row: Row, reward: str) -> Cell:
    """What the raw prompt has of a reward, where others have a gain."""
    scores = own_scores(row, reward, unseen=row.means[1] is not None)
    return _value(average(scores, row.label, reward) if scores else None)


def span(interval: Interval) -> str:
    """(low to high), or nothing where one image has no interval."""
    bounds = interval.bounds("+.3f")
    return bounds and f"({bounds})"


def _wins(gains: dict[str, Gain], reward: str) -> Cell:
    return _rate(gains[reward].wins if reward in gains else None)


def _rate(interval: Interval | None) -> Cell:
    if interval is None:
        return Cell("–")
    bounds = interval.bounds(".0%")
    within = bounds and f"({bounds})"
    return Cell(f"{interval.value:.0%}", sure(interval, 0.5), within)
