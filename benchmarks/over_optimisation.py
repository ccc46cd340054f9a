"""How far can each bundled reward be followed before the picture is lost?

    python benchmarks/over_optimisation.py --prompts 'one:test?n=4' --out build/over-optimisation

IPGO is fitted ever harder (more and larger steps). For each strength: how much the followed
reward rose, in standard deviations of that reward over raw images; what the rewards that were not followed did, in
theirs; and whether the judge still finds the object, and how much it looks like the artwork. A reward that resists
parts from the judge late, or not at all. A second table has the same where the followed reward has risen by one
standard deviation, between the two strengths that lie around it. Everything is measured on unseen noise. Writes the
tables (.md), a plot (.png), and the pictures themselves (-images.png).
"""

import argparse
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from PIL import Image

import ipgo
from ipgo.models import BUNDLED_REWARDS
from ipgo.prompts import read_prompts
from ipgo.rewards import optimised

REWARDS = BUNDLED_REWARDS
TRUTH = "emoji-likeness"
FITTED = (0, 1, 2, 3)
STRENGTHS = {  # steps, learning rate of the coefficients
    "5 steps, lr 0.006": (5, 0.006),
    "10 steps, lr 0.006": (10, 0.006),
    "20 steps, lr 0.006": (20, 0.006),
    "40 steps, lr 0.006": (40, 0.006),
    "80 steps, lr 0.02": (80, 0.02),
    "80 steps, lr 0.06": (80, 0.06),
}


@dataclass(frozen=True)
class Point:
    """What one strength did: rises in standard deviations of raw images, and the judge's marks before and after."""

    rises: dict[str, float]
    gain: float
    objects: tuple[float, float]
    likeness: tuple[float, float]


def measure(
    backend: ipgo.Backend, reward: str, strength: str, prompts: list[str]
) -> tuple[Point, Image.Image]:
    """One fit of all prompts, scored on unseen noise; and a strip of one unseen image of each."""
    steps, lr = STRENGTHS[strength]
    method = ipgo.IPGO(ascent=replace(ipgo.IPGO().ascent, steps=steps, lr=lr, lr_decay=1.0))
    result = ipgo.fit(prompts, reward=reward, method=method, seeds=FITTED, backend=backend)
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for each in (each for fitted in result for each in fitted.scores if each.seed not in FITTED):
        values[each.method, each.reward].append(each.value)
    names = dict.fromkeys((*REWARDS, reward))
    gains = {name: np.mean(values["ipgo", name]) - np.mean(values["raw", name]) for name in names}
    rises = {name: float(gains[name] / np.std(values["raw", name])) for name in names}
    marks = "judge-object", TRUTH if TRUTH in optimised(reward) else "judge-likeness"
    objects, likeness = (
        tuple(float(np.mean(values[each, mark])) for each in ("raw", "ipgo")) for mark in marks
    )
    strip = np.concatenate([np.asarray(fitted.after[max(fitted.after)]) for fitted in result], axis=1)
    return Point(rises, float(gains[reward]), objects, likeness), Image.fromarray(strip)


def at_one(reward: str, points: list[Point]) -> str:
    """The line of the second table: linear between raw, or a strength, and the next one that is beyond."""
    path = [dict.fromkeys(points[0].rises, 0.0), *(point.rises for point in points)]
    beyond = next((place for place, rises in enumerate(path) if rises[reward] >= 1), None)
    if beyond is None:
        return f"| {reward} | never: {max(rises[reward] for rises in path):+.1f} at most | | |"
    low, high = path[beyond - 1][reward], path[beyond][reward]
    share = (1 - low) / (high - low)

    def between(values: Sequence[float]) -> float:
        return values[beyond - 1] + share * (values[beyond] - values[beyond - 1])

    held = "; ".join(
        f"{name.removeprefix('emoji-')} {between([rises[name] for rises in path]):+.1f}"
        for name in points[0].rises
        if name not in optimised(reward)
    )
    marks = []
    for kind in ("objects", "likeness"):
        pairs = [getattr(point, kind) for point in points]
        marks.append((pairs[0][0], between([pairs[0][0], *(after for _, after in pairs)])))
    (raw, objects), (raw_likeness, likeness) = marks
    return f"| {reward} | {held} | {raw:.0%} to {objects:.0%} | {raw_likeness:.2f} to {likeness:.2f} |"


def plot(found: dict[str, list[Point]], path: Path) -> None:
    """One panel a reward: what it and the held-out rewards did at each strength, and below it the judge."""
    figure, panels = plt.subplots(
        2,
        len(found),
        figsize=(3.4 * len(found), 5),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    colours = dict(zip((*REWARDS, TRUTH), ("C0", "C1", "C2", "C3"), strict=True))
    for (above, below), (reward, points) in zip(panels.T, found.items(), strict=True):
        x = range(len(points) + 1)
        for name in dict.fromkeys((*REWARDS, reward)):
            followed = name in optimised(reward)
            look = {"linewidth": 3} if followed else {"linestyle": "--", "marker": "o", "markersize": 4}
            above.plot(
                x, [0.0, *(point.rises[name] for point in points)], color=colours.get(name, "k"), **look
            )
        above.axhline(1, color="0.8", zorder=0)
        above.set_yscale("symlog", linthresh=2)
        above.set_yticks([-10, -5, -2, -1, 0, 1, 2, 3], ["-10", "-5", "-2", "-1", "0", "1", "2", "3"])
        above.minorticks_off()
        above.set_title(reward)
        for mark, style in (("objects", "ks-"), ("likeness", "k^:")):
            marks = [getattr(point, mark) for point in points]
            below.plot(x, [marks[0][0], *(after for _, after in marks)], style, markersize=4)
        below.set(ylim=(0.5, 1.03), xlabel="steps, x learning rate")
        below.set_xticks(
            x, ["raw", *(name.replace(" steps, lr ", "\nx ") for name in STRENGTHS)][: len(x)], fontsize=7
        )
    panels[0, 0].set_ylabel("change, in standard deviations\nof the raw images")
    panels[1, 0].set_ylabel("judge")
    lines = [
        Line2D([], [], color=colour, linestyle="--", marker="o", label=name)
        for name, colour in colours.items()
    ]
    lines += [
        Line2D([], [], color="0.4", linewidth=3, label="the optimised one"),
        Line2D([], [], color="k", marker="s", label="judge: objects found"),
        Line2D([], [], color="k", marker="^", linestyle=":", label="judge: likeness"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def show(strips: dict[tuple[str, str], Image.Image], path: Path) -> None:
    """The pictures: rewards across, strengths down."""
    rewards, strengths = (list(dict.fromkeys(names)) for names in zip(*strips, strict=True))
    figure, panels = plt.subplots(
        len(strengths), len(rewards), figsize=(3.2 * len(rewards), 1.1 * len(strengths)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, strength in zip(panels, strengths, strict=True):
        for panel, reward in zip(row, rewards, strict=True):
            panel.imshow(strips[reward, strength])
            panel.set(xticks=[], yticks=[])
            panel.set_title(reward if strength == strengths[0] else "", fontsize=10)
        row[0].set_ylabel(strength.replace(", ", "\n"), rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rewards", nargs="+", default=[*REWARDS, TRUTH], help="specs, as in fit")
    parser.add_argument("--prompts", default="one:test?n=4")
    parser.add_argument("--strengths", nargs="+", default=list(STRENGTHS), choices=STRENGTHS)
    parser.add_argument("--dtype", default="auto", help="of the backend, as in fit")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/over-optimisation"),
        help="of a page and its pictures, without suffix; what is there is replaced",
    )
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    prompts, backend = read_prompts(options.prompts), ipgo.load_backend("emoji", dtype=options.dtype)
    lines = [
        "| reward | strength | gain | in sd | held-out, in their sd | judge: object | judge: likeness |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    found: dict[str, list[Point]] = {}
    strips = {}
    for reward in options.rewards:
        for strength in options.strengths:
            point, strip = measure(backend, reward, strength, prompts)
            found.setdefault(reward, []).append(point)
            strips[reward, strength] = strip
            held = "; ".join(
                f"{name.removeprefix('emoji-')} {rise:+.1f}"
                for name, rise in point.rises.items()
                if name not in optimised(reward)
            )
            lines.append(
                f"| {reward} | {strength} | {point.gain:+.3f} | {point.rises[reward]:+.1f} | {held} "
                f"| {point.objects[0]:.0%} to {point.objects[1]:.0%} "
                f"| {point.likeness[0]:.2f} to {point.likeness[1]:.2f} |"
            )
            print(lines[-1], flush=True)
    lines += [
        "",
        "Where the followed reward has risen by one standard deviation:",
        "",
        "| reward | held-out, in their sd | judge: object | judge: likeness |",
        "|---|---|---|---|",
        *(at_one(reward, points) for reward, points in found.items()),
    ]
    print("\n".join(lines[-len(found) - 5 :]))
    plot(found, options.out.with_suffix(".png"))
    show(strips, options.out.with_name(options.out.name + "-images.png"))
    command = f"python benchmarks/over_optimisation.py --prompts '{options.prompts}'"
    if options.rewards != [*REWARDS, TRUTH]:
        command += f" --rewards {shlex.join(options.rewards)}"
    if options.dtype != "auto":
        command += f" --dtype {options.dtype}"
    if options.strengths != list(STRENGTHS):
        command += " --strengths " + " ".join(f"'{name}'" for name in options.strengths)
    options.out.with_suffix(".md").write_text(f"`{command}`\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
