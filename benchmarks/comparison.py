"""Every system on every learned bundled reward and prompt set, at one budget: docs/comparison.md.

    python benchmarks/comparison.py --entries raw ipgo draft reno best-of-n --kept build/kept --out build/comparison.md

Each cell, a reward on the test half of a set, is an ordinary comparison (`ipgo compare`) in
build/benchmarks/comparison, to which entry after entry is added: an interrupted benchmark goes on. The figures are
kept in docs/comparison/ENTRY.json (or in the folder --kept), so that the whole may be made piece by piece, several
cells beside each other, and `--table` makes the document from what is there. Entries are labels of
`ipgo compare --config systems`; those that learn the noise of one seed, or want a single one, are fitted on the first
of --seeds.
"""

import argparse
import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from ipgo import cli, files
from ipgo.cli_compare import SYSTEMS, entries_of, read_comparison
from ipgo.comparison import Comparison
from ipgo.config import default_seeds
from ipgo.evaluation import Gain, Interval
from ipgo.methods import METHODS
from ipgo.models import BUNDLED_REWARDS
from ipgo.report.identity import comparable
from ipgo.report.rows import Row, rows
from ipgo.report.tables import span
from ipgo.rewards import optimised, terms

REWARDS = BUNDLED_REWARDS
SETS = ("one", "two", "styled")
FOLDER = Path("build/benchmarks/comparison")
KEPT = Path("docs/comparison")
SETTINGS = ("seeds", "count", "budget", "price", "flags")  # what all figures of a document have in common
OURS = "ipgo"
CHAT = ("chatgpt", "llm-search")  # want an endpoint
# Methods that change the prompt, as text or as embeddings, and leave noise and weights alone.
PROMPT_LEVEL = ("ipgo", "ipgo-black-box", "embedding", "dpo-diffusion", "promptist", "chatgpt", "llm-search")
ENOUGH = 8 / 9  # of the cells in which ours should be the best of these

ABOUT = (
    "Gains over raw prompts and the share of images that win, means over the sets, on noise that was not fitted; "
    "held out: the\nmean change of the rewards that were not optimised; objects: points more of the images have "
    "what the judge looks for;\nlikeness, where it was measured: how much more they look like the artwork (1 is that). "
    "Numbers are those stored for a prompt.\nSeconds and MiB (the peak of memory, "
    "of all prompts that were\nfitted at once, where that was kept; methods that change the model's weights fit one) "
    "compare on one machine alone."
)

MARKS = {"object": (100, 1), "likeness": (1, 3)}  # of the judge: what they are shown in units of, and digits

Cell = tuple[str, str]  # reward, set


def plan(label: str, seeds: Sequence[int]) -> str:
    """The file that `ipgo compare --config` reads."""
    own = entries_of(label, read_comparison(SYSTEMS)["entries"], {})
    if len(default_seeds(METHODS[own[label]["method"]["name"]]())) == 1:
        own[label]["seeds"] = [seeds[0]]
    return yaml.safe_dump({"seeds": list(seeds), "entries": own}, sort_keys=False)


def run(label: str, cell: Cell, options: argparse.Namespace) -> Row:
    """Go on with one entry on one cell until it is done; what fails is in its row."""
    reward, kind = cell
    folder = options.work / f"{reward}-{kind}"
    file = options.work / f"{reward}-{kind}-{label}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(plan(label, options.seeds))
    words = ["compare", "--config", str(file), "--out", str(folder), "--budget", str(options.budget)]
    words += ["--prompts", f"{kind}:test?n={options.count}", "--reward", reward]
    words += ["--chunk", str(options.chunk)]
    if options.price:
        words += ["--price", *map(str, options.price)]
    code = cli.main([*words, *(f"--{flag}" for flag in options.flags)])
    if code not in (0, 1):
        raise SystemExit(code)
    return next(row for row in rows(Comparison.open(folder)) if row.label == label)


# -- what is kept ------------------------------------------------------------------------------------------


def keep(folder: Path, label: str, cell: Cell, row: Row, settings: Mapping[str, Any]) -> None:
    """Add one row to FOLDER/ENTRY.json, where all have the same settings (see `check_kept`)."""
    path = folder / f"{label}.json"
    plain = {key: value for key, value in asdict(row).items() if key not in ("scores", "curve")}
    folder.mkdir(parents=True, exist_ok=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    # Another process may be done with another cell at the same moment.
    with FileLock(FOLDER / f"{folder.name}-{label}.lock"):
        there = files.read_json(path) if path.is_file() else {}
        cells = {**there.get("cells", {}), " ".join(cell): plain}
        files.write_json(path, {"settings": settings, "cells": cells})


def check_kept(folder: Path, labels: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Refuse, before anything is made, to mix figures of several settings."""
    for path in (folder / f"{label}.json" for label in labels):
        if path.is_file() and files.read_json(path, "settings")["settings"] != settings:
            raise SystemExit(f"{path} holds figures of other settings; give another folder with --kept")


def read(plain: Mapping[str, Any]) -> Row:
    """The reverse, without single scores and the curve."""

    def interval(each: Mapping[str, Any] | None) -> Interval | None:
        return None if each is None else Interval(**each)

    def gains(each: Mapping[str, Any]) -> dict[str, Gain]:
        return {
            reward: Gain(**{**gain, "gain": interval(gain["gain"]), "wins": interval(gain["wins"])})
            for reward, gain in each.items()
        }

    own = {name: gains(plain[name]) for name in ("fitted", "unseen", "unseen_prompts")}
    fingerprints = {reward: tuple(each) for reward, each in plain["rewards"].items()}
    means = tuple(interval(each) for each in plain["means"])
    seeds = tuple(plain.get("seeds", ()))
    known = {"weights": None, **plain, **own, "seeds": seeds, "rewards": fingerprints, "means": means}
    return Row(**{**known, "errors": tuple(plain["errors"]), "scores": [], "curve": []})


def stored(
    folder: Path, labels: Sequence[str], cells: Sequence[Cell], settings: Mapping[str, Any]
) -> dict[Cell, list[Row]]:
    """The rows of every cell that has some, made with these settings, drawn and scored by the same models."""
    found: dict[Cell, list[Row]] = {}
    for label in labels:
        path = folder / f"{label}.json"
        there = files.read_json(path) if path.is_file() else {}
        kept = there["cells"] if there.get("settings") == settings else {}
        for cell in cells:
            if " ".join(cell) in kept:
                found.setdefault(cell, []).append(read(kept[" ".join(cell)]))
    # What failed drew nothing.
    everything = [row for entries in found.values() for row in entries if row.finished]
    for row in everything:
        if row.weights != everything[0].weights:
            raise SystemExit(f"{row.label}: drawn by other weights than {everything[0].label}; run it again")
    for reward in dict.fromkeys(name for row in everything for name in row.rewards):
        first, *others = (row for row in everything if reward in row.rewards)
        for row in others:
            if not comparable(first.rewards[reward], row.rewards[reward]):
                raise SystemExit(f"{row.label}: scored by another {reward} than {first.label}; run it again")
    return {cell: found[cell] for cell in cells if cell in found}


# -- the document ------------------------------------------------------------------------------------------


def summary(found: Mapping[Cell, Sequence[Row]]) -> str:
    """One line an entry: means over the sets on unseen noise, or on its own where noise is what was learned.

    "held out" is the mean change of the rewards that were not optimised, over all cells; "objects" how many points
    more of the images have the objects that the judge looks for; "likeness" how much more they look like the artwork.
    """
    rewards = list(dict.fromkeys(reward for reward, _ in found))
    columns = (f"{reward.removeprefix('emoji-')} | wins" for reward in rewards)
    everything = [row for entries in found.values() for row in entries]
    marks = {
        name: scale
        for name, scale in MARKS.items()
        if any(f"judge-{name}" in {**row.fitted, **row.unseen} for row in everything)
    }
    added = list(dict.fromkeys(name for reward in rewards for name in added_up(reward)))
    head = [
        "entry",
        *columns,
        *(f"of which {name.removeprefix('emoji-')}" for name in added),
        "held out",
        *(f"{name}s" if name == "object" else name for name in marks),
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * (len(head) + len(rewards)) + "|"]
    for label in dict.fromkeys(row.label for entries in found.values() for row in entries):
        of = {cell: row for cell, entries in found.items() for row in entries if row.label == label}
        if any(not row.finished for row in of.values()):
            continue
        if of[next(iter(of))].method == "raw":
            levels = [
                mean([row.means[1].value for (name, _), row in of.items() if name == r]) for r in rewards
            ]
            lines.append(
                f"| {label} | {''.join(f'{level:.3f} | | ' for level in levels)}|{' |' * (len(added) + len(marks))}"
            )
            continue
        own_noise = not any(row.unseen for row in of.values())
        gains = {cell: row.fitted if own_noise else row.unseen for cell, row in of.items()}
        words = [f"{label}, on its noise" if own_noise else label]
        for reward in rewards:
            cells = [cell for cell in found if cell[0] == reward]
            some = [gains[cell][reward] for cell in cells if cell in gains]
            if len(some) < len(cells):
                words.append("– | –")
                continue
            wins = mean([each.wins.value for each in some])
            words.append(f"{mean([each.gain.value for each in some]):+.3f} | {wins:.0%}")
        for name in added:
            some = [each[name] for (reward, _), each in gains.items() if name in added_up(reward)]
            words.append(f"{mean([each.gain.value for each in some]):+.3f}")
        others = [
            gain.gain.value
            for (reward, _), each in gains.items()
            for name, gain in each.items()
            if name in (*REWARDS, *rewards) and name not in optimised(reward)
        ]
        complete = len(gains) == len(found)
        words.append(f"{mean(others):+.3f}" if others and complete else "–")
        for name, (scale, digits) in marks.items():
            own = [each[f"judge-{name}"].gain.value for each in gains.values() if f"judge-{name}" in each]
            words.append(f"{scale * mean(own):+.{digits}f}" if own and complete else "–")
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def tables(found: Mapping[Cell, Sequence[Row]]) -> str:
    """For each reward: an entry's gain on fitted and on unseen noise, set by set, with what it learned and cost."""
    parts = []
    for reward in dict.fromkeys(reward for reward, _ in found):
        kinds = [kind for name, kind in found if name == reward]
        head = [
            "entry",
            *(f"{kind}, {noise}" for kind in kinds for noise in ("fitted", "unseen")),
            "numbers",
            "calls",
            "seconds",
            "MiB (of so many prompts at once)",
        ]
        lines = [head, ["---"] * len(head)]
        for label in dict.fromkeys(row.label for kind in kinds for row in found[reward, kind]):
            own = [{row.label: row for row in found[reward, kind]}.get(label) for kind in kinds]
            cells = [cell(row, reward, noise) for row in own for noise in ("fitted", "unseen")]
            some = [row for row in own if row is not None and row.finished]
            cost = [
                f"{mean([getattr(row, each) for row in some]):,.0f}" if some else "–"
                for each in ("parameters", "weighted", "seconds", "memory")
            ]
            together = max((row.together for row in some), default=0)
            cost[-1] += f" ({together})" if together else ""
            lines.append([label, *cells, *cost])
        parts.append(f"## {reward}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def selection(found: Mapping[Cell, Sequence[Row]]) -> str:
    """The optimised reward in the fits themselves, means over the sets: of their last step and of their best one.

    Entries whose result is the best by that reward, and those whose result is the last, compare in either column.
    """
    rewards = list(dict.fromkeys(reward for reward, _ in found))
    head = ["entry", *(f"{reward}, {which}" for reward in rewards for which in ("last", "best"))]
    lines = [head, ["---"] * len(head)]
    for label in dict.fromkeys(row.label for entries in found.values() for row in entries):
        line = [label]
        for reward in rewards:
            kinds = [kind for name, kind in found if name == reward]
            own = [row for kind in kinds for row in found[reward, kind] if row.label == label]
            for which in ("final", "best"):
                some = [value for row in own if (value := getattr(row, which)) is not None]
                line.append(f"{mean(some):.3f}" if some and len(some) == len(kinds) else "–")
        lines.append(line)
    return "## Last step and best of run\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def against_raw(found: Mapping[Cell, Sequence[Row]]) -> str:
    """Ours and its variants, cell by cell: win rates, and every reward and the judge on unseen noise."""
    own = (name for reward, _ in found for name in (reward, *added_up(reward)))
    names = tuple(dict.fromkeys((*REWARDS, *own)))
    head = ["entry", "optimised", "prompts", "wins, fitted", "wins, unseen", *names, "judge: object"]
    lines = [head, ["---"] * len(head)]
    for (reward, kind), entries in found.items():
        for row in (each for each in entries if each.method == OURS and reward in each.unseen):
            judge = row.unseen.get("judge-object")
            wins = (f"{getattr(row, noise)[reward].wins.value:.1%}" for noise in ("fitted", "unseen"))
            gains = (said(row.unseen[each]) if each in row.unseen else "–" for each in names)
            seen = f"{judge.before:.1%} to {judge.after:.1%}" if judge else "–"
            lines.append([row.label, reward, kind, *wins, *gains, seen])
    return f"## {OURS} against raw\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def added_up(reward: str) -> list[str]:
    """What a sum adds up; nothing of a reward that is none."""
    found = [name for _, name in terms(reward)]
    return found if len(found) > 1 else []


def cell(row: Row | None, reward: str, noise: str) -> str:
    """A gain with its interval; of raw, which has none, its value."""
    if row is None or not row.finished:
        return "failed" if row is not None and row.failed else "–"
    level = row.means[noise == "unseen"]
    if row.method == "raw":
        return f"{level.value:.3f}" if level is not None else "–"
    gain = getattr(row, noise).get(reward)
    return "–" if gain is None else said(gain)


def said(gain: Gain) -> str:
    return f"{gain.gain.value:+.3f} {span(gain.gain)}".strip()


def bar(found: Mapping[Cell, Sequence[Row]]) -> str:
    """Is ours the best of its level on unseen noise, and does nothing that was not optimised fall below raw?"""
    best, rivalled, lines, low, lowered = 0, 0, [], [], {}
    for (reward, kind), entries in found.items():
        # Variants of our own compete with nobody.
        rivals = [row for row in entries if row.label == OURS or row.method != OURS]
        level = [row for row in rivals if row.method in PROMPT_LEVEL and reward in row.unseen]
        ours = next((row for row in level if row.label == OURS), None)
        if ours is None:
            lines.append(f"- {reward} on {kind}: {OURS} has no result.")
            continue
        winner = max(level, key=lambda row: row.unseen[reward].gain.value)
        if len(level) == 1:
            lines.append(f"- {reward} on {kind}: no other method that changes the prompt has a result yet.")
        else:
            rivalled += 1
            best += winner is ours
        if winner is not ours:
            lines.append(f"- {reward} on {kind}: {winner.label} {said(winner.unseen[reward])} is above "
                         f"{OURS} {said(ours.unseen[reward])}.")  # fmt: skip
        below = [
            (name, gain)
            for name, gain in ours.unseen.items()
            if name not in optimised(reward) and gain.gain.value < 0
        ]
        if below:
            lowered[reward, kind] = any(gain.gain.decided(0) for _, gain in below)
        low += [
            f"- {reward} on {kind}: {name} {said(gain)}, {'surely' if gain.gain.decided(0) else 'perhaps'} below raw."
            for name, gain in below
        ]
    verdict = "is" if best >= ENOUGH * len(found) - 1e-9 else "is not"
    return "\n".join(
        [
            f"On unseen noise {OURS} has the largest gain among methods that change the prompt (its own variants and "
            f"`joint` do not count) in {best} of {len(found)} cells; "
            f"the bar, {math.ceil(ENOUGH * len(found) - 1e-9)} of {len(found)}, {verdict} reached."
            if rivalled
            else f"{OURS} has no rival yet among methods that change the prompt.",
            *([""] if lines else []),
            *lines,
            "",
            f"Rewards that were not optimised, and the judge's verdicts, where {OURS} is below raw"
            + (
                f", in {len(lowered)} of {len(found)} cells, surely in {sum(lowered.values())}:"
                if low
                else ": none."
            ),
            *([""] if low else []),
            *low,
        ]
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    everything = [label for label in read_comparison(SYSTEMS)["entries"] if label not in CHAT]
    parser.add_argument(
        "--entries", nargs="+", default=everything, help=f"default: all but {' and '.join(CHAT)}"
    )
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS))
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--count", type=int, default=20, help="prompts of a cell")
    parser.add_argument("--budget", type=int, default=3000)
    parser.add_argument(
        "--price", nargs=2, type=float, help="as in ipgo compare, so that all cells have the same"
    )
    parser.add_argument(
        "--flags", nargs="*", default=[], help="further flags of ipgo compare, without --: dtype=bfloat16"
    )
    parser.add_argument("--chunk", type=int, default=4, help="prompts fitted at once; no matter of results")
    parser.add_argument("--work", type=Path, default=FOLDER, help="processes beside each other need one each")
    parser.add_argument("--kept", type=Path, default=KEPT, help="where the figures of these settings are")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument(
        "--out", type=Path, help="write the document there, under its command; what is above that there stays"
    )
    options = parser.parse_args(argv)
    cells = list(itertools.product(options.rewards, options.sets))
    settings = {name: getattr(options, name) for name in SETTINGS}
    if not options.table:
        check_kept(options.kept, options.entries, settings)
        for cell, label in itertools.product(cells, options.entries):
            keep(options.kept, label, cell, run(label, cell, options), settings)
    found = stored(options.kept, options.entries, cells, settings)
    parts = (summary, bar, tables, selection, against_raw)
    if OURS not in options.entries:
        parts = (summary, tables, selection)
    document = "\n\n".join([ABOUT, *(part(found) for part in parts)]) + "\n"
    print(document)
    if options.out:
        words = " ".join(
            f"--{key} {shlex.join(map(str, value if isinstance(value, list) else [value]))}"
            for key, value in vars(options).items()
            if key not in ("chunk", "work", "out", "table") and value not in (None, [], KEPT)
        )
        command = "`python benchmarks/comparison.py"
        said_before = options.out.read_text().partition(command)[0] if options.out.is_file() else ""
        options.out.write_text(f"{said_before}{command} {words}`\n\n{document}")


if __name__ == "__main__":
    main()
