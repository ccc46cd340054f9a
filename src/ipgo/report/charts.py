"""Small charts: inline SVG that takes its colours from the page, and a PNG for other places."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 12, 30  # margins around the plot, room for the labels
ROOM = 8  # characters of a label on the left

Values = Sequence[float | None]
BEST = "best so far"
History = Sequence[Mapping[str, Any]]  # the lines of a history.jsonl


def so_far(history: History) -> tuple[str, list[float | None]]:
    """What a reader should look at besides the reward of each step, and its name.

    The best so far; where a fit does not keep it, since rewards of different steps are not comparable, their `means`.
    """
    if any(line.get("best") is not None for line in history):
        return BEST, [line.get("best") for line in history]
    window = history[-1].get("over", 1) if history else 1
    return f"mean of {window} steps" if window > 1 else "last step", means(history)


def means(history: History) -> list[float | None]:
    """At each step the mean reward of the latest ones, of as many as compare (all, if there are fewer)."""
    found: list[float | None] = []
    for step, line in enumerate(history, 1):
        window = min(line.get("over", 1), len(history))
        last = [
            each["reward"] for each in history[max(0, step - window) : step] if each["reward"] is not None
        ]
        found.append(sum(last) / len(last) if last and step >= window else None)
    return found


def curve(rewards: Values, bold: Values, before: float | None) -> Markup:
    """Reward against step: thin for each step, bold for what counts, dashed for the raw prompt."""
    known = [value for value in (*rewards, before) if value is not None]
    if len(known) < 2:
        return Markup("")
    low, high = _padded(min(known), max(known))
    x = _scale(1, max(2, len(rewards)), LEFT, WIDTH - RIGHT)
    y = _scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [_axes(low, high, y, [(1, "1"), (len(rewards), f"{len(rewards)} steps")], x)]
    if before is not None:
        parts.append(
            f'<line class="before" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(before)}" y2="{y(before)}"/>'
        )
    for name, values in (("thin", rewards), ("bold", bold)):
        points = [(x(step), y(value)) for step, value in enumerate(values, 1) if value is not None]
        if len(points) == 1:  # a line of one point would not be seen
            points.insert(0, (points[0][0] - 4, points[0][1]))
        line = " ".join(f"{across},{up}" for across, up in points)
        parts.append(f'<polyline class="{name}" points="{line}"/>')
    return _svg(parts, "reward against step")


def scatter(points: Sequence[tuple[float, float]], hues: Mapping[str, int] | None = None) -> Markup:
    """Gain in the optimised reward (across) against gain in a held-out one (up); the lower right is hacking.

    With `hues`, one for each point by its label, points have these; without, they are good or bad.
    """
    if not points:
        return Markup("")
    (left, right), (low, high) = (_padded(min(0, *axis), max(0, *axis)) for axis in zip(*points, strict=True))
    x, y = _scale(left, right, LEFT, WIDTH - RIGHT), _scale(low, high, HEIGHT - BOTTOM, TOP)
    looks = [(f'class="series" style="--hue: {each}"', label) for label, each in (hues or {}).items()] or [
        (f'class="{"good" if b >= 0 else "bad"}"', "") for _, b in points
    ]
    hacking = f'x="{x(0)}" y="{y(0)}" width="{x(right) - x(0):.1f}" height="{y(low) - y(0):.1f}"'
    parts = [
        f'<rect class="hacking" {hacking}/>',
        _axes(low, high, y, [(left, _number(left, right - left)), (right, _number(right, right - left))], x),
        f'<line class="zero" x1="{x(0)}" x2="{x(0)}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>',
        f'<line class="zero" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(0)}" y2="{y(0)}"/>',
        *(
            f'<circle {look} cx="{x(a)}" cy="{y(b)}" r="4">{_name(label)}</circle>'
            for (look, label), (a, b) in zip(looks, points, strict=True)
        ),
    ]
    return _svg(parts, "gain in the optimised reward against gain in a held-out reward")


def hue(number: int) -> int:
    """A colour for each of any number of series, in degrees: far from those before it."""
    return round(number * 137.5) % 360


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    hues: Mapping[str, int],
    unit: str,
    before: float | None,
) -> Markup:
    """Several curves over one axis, by label; one of a single point is a dot. Dashed: `before`."""
    points = [point for each in series.values() for point in each]
    if not points:
        return Markup("")
    values = [value for _, value in points] + ([] if before is None else [before])
    low, high = _padded(min(values), max(values))
    end = max(place for place, _ in points) or 1.0
    x, y = _scale(0, end, LEFT, WIDTH - RIGHT), _scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [_axes(low, high, y, [(0, "0"), (end, f"{end:,.0f} {unit}")], x)]
    if before is not None:
        parts.append(
            f'<line class="before" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(before)}" y2="{y(before)}"/>'
        )
    for label, each in series.items():
        look = f'class="series" style="--hue: {hues[label]}"'
        if len(each) == 1:
            ((place, value),) = each
            parts.append(f'<circle {look} cx="{x(place)}" cy="{y(value)}" r="4">{_name(label)}</circle>')
            continue
        path = " ".join(f"{x(place)},{y(value)}" for place, value in each)
        parts.append(f'<polyline {look} points="{path}">{_name(label)}</polyline>')
    return _svg(parts, f"reward against {unit}")


def _name(label: str) -> Markup:
    """What a pointer that rests on a point or curve is told."""
    return Markup("<title>{}</title>").format(label) if label else Markup("")


def curve_png(rewards: Values, bold: Values, name: str, reward: str, before: float | None) -> bytes:
    """The same curve as a picture of its own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    steps = range(1, len(rewards) + 1)
    nan = [math.nan if value is None else value for value in rewards]
    axes.plot(steps, nan, color="#a5a8f0", linewidth=1, label="each step")
    axes.plot(steps, [math.nan if value is None else value for value in bold], color="#4f46e5", label=name)
    if before is not None:
        axes.axhline(before, color="#8a8d93", linestyle="--", linewidth=1, label="raw prompt")
    axes.set(xlabel="step")
    axes.set_ylabel(reward, parse_math=False)  # which may be a command with a $ in it
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


Scale = Callable[[float], float]


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    """A linear map from values to SVG coordinates."""
    factor = (end - start) / (high - low)
    return lambda value: round(start + (value - low) * factor, 1)


def _number(value: float, span: float) -> str:
    """As many digits as tell the labels of an axis apart, as far as there is room for them."""
    text = f"{value:.{max(0, 2 - math.floor(math.log10(span)))}f}" if span < 100 else f"{value:.0f}"
    return text if len(text) <= ROOM else f"{value:.2g}"


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.08 * (high - low) or max(0.5, 1e-3 * abs(high))  # enough to tell huge numbers apart
    return low - margin, high + margin


def _axes(low: float, high: float, y: Scale, ticks: Sequence[tuple[float, str]], x: Scale) -> str:
    """Three horizontal lines with their values, and labels at both ends below."""
    parts = []
    for value in (low, (low + high) / 2, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value)}" y2="{y(value)}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{_number(value, high - low)}</text>'
        )
    for (value, label), anchor in zip(ticks, ("start", "end"), strict=True):
        parts.append(f'<text x="{x(value)}" y="{HEIGHT - 8}" text-anchor="{anchor}">{label}</text>')
    return "".join(parts)


def _svg(parts: Sequence[str], label: str) -> Markup:
    """Only numbers and labels of our own come in here, so the text needs no escaping."""
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )
