"""Text that several commands print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ipgo.evaluation import Gain, Score


# Under tables of gains.
NOTE = (
    "* the reward that was optimised, or a part of it; all others are held out. A tie counts as half a win."
)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def table(gains: Sequence[Gain]) -> str:
    """One line per reward; a star marks the optimised one and its parts, as `NOTE` says."""
    from ipgo.evaluation import unlike

    first = gains[0].gain
    over = f"95% over {first.n} {first.over}" if first.n > 1 else "95%"
    rows = [("reward", "raw", gains[0].method, "gain", over, "wins over raw")]
    for each in gains:
        some = each.gain.n > 1
        rows.append(
            (
                each.reward + ("" if each.held_out else " *"),
                f"{each.before:.3f}",
                f"{each.after:.3f}",
                f"{each.gain.value:+.3f}",
                f"{each.gain.bounds('+.3f')}{unlike(each, gains[0])}" if some else "one image",
                f"{each.wins.value:.0%}" + (f" ({each.wins.bounds('.0%')})" if some else ""),
            )
        )
    return "\n".join(aligned(rows))


def levels(scores: Sequence[Score]) -> str:
    """A line per reward, of raw images."""
    from ipgo.evaluation import levels as means

    return "\n".join(aligned([(name, f"{value:.3f}") for name, value in means(scores).items()]))


def span(seeds: Sequence[int]) -> str:
    """Seeds in words: all of them if they are few."""
    return ", ".join(map(str, seeds)) if len(seeds) <= 8 else f"{seeds[0]} ... {seeds[-1]}"
