"""benchmarks/comparison.py: its plan, its tables and its bar, on rows that are made by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import comparison
from ipgo import Gain, Interval
from ipgo.cli_compare import SYSTEMS, read_comparison
from ipgo.comparison import Plan, common_settings
from ipgo.config import RunConfig
from ipgo.report.rows import Row


def gain(reward: str, value: float) -> Gain:
    interval = Interval(value, value - 0.1, value + 0.1, 20, "prompts")
    return Gain("x", reward, reward != "r", 0.5, 0.5 + value, interval, interval)


def row(label: str, method: str, unseen: dict[str, float], **other: Any) -> Row:
    level = Interval(0.5, 0.4, 0.6, 20, "prompts")
    gains = {name: gain(name, value) for name, value in unseen.items()}
    made = Row(label, method, False, "unseen seeds", 20, 20, 0, (), {}, None, [], gains, gains, {}, (level, level),
               0.5, 0.6, [], {}, 2990.0, 12.0, 900, 100)  # fmt: skip
    return replace(made, **other)


CELL = [
    row("raw", "raw", {}),
    row("ipgo", "ipgo", {"r": 0.3, "held": 0.1, "judge-object": -0.02}),
    row("draft", "draft", {"r": 0.9, "held": 0.1}),  # weights: of another level
    row("llm-search", "llm-search", {"r": 0.2, "held": 0.1}),
    row("reno", "reno", {}, fitted={"r": gain("r", 0.4)}),
    row("chatgpt", "chatgpt", {}, finished=0, failed=20),
]


def test_the_bar_is_about_methods_that_change_the_prompt() -> None:
    text = comparison.bar({("r", "one"): CELL})
    assert "in 1 of 1 cells; the bar, 1 of 1, is reached" in text
    assert "- r on one: judge-object -0.020 (-0.120 to +0.080), perhaps below raw." in text
    assert comparison.bar({("r", "one"): [*CELL, row("ipgo-strong", "ipgo", {"r": 0.9})]}) == text
    better = [*CELL, row("promptist", "promptist", {"r": 0.35})]
    cells = {("r", str(number)): CELL for number in range(7)} | {("r", "7"): better, ("r", "8"): better}
    text = comparison.bar(cells)
    assert "in 7 of 9 cells; the bar, 8 of 9, is not reached" in text
    assert "- r on 8: promptist +0.350 (+0.250 to +0.450) is above ipgo +0.300" in text
    assert "the bar, 8 of 9, is reached" in comparison.bar({**cells, ("r", "7"): CELL})
    assert "- r on one: ipgo has no result." in comparison.bar({("r", "one"): CELL[:1]})
    alone = comparison.bar({("r", "one"): CELL[:2]})
    assert "ipgo has no rival yet" in alone
    assert "the bar" not in alone
    assert "- r on one: no other method that changes the prompt has a result yet." in alone


def test_the_summary_has_one_line_for_each_entry() -> None:
    two = [replace(each, unseen={name: gain(name, 0.5) for name in each.unseen}) for each in CELL]
    cells = {
        ("r", "one"): CELL,
        ("r", "two"): two[:2],
        ("held", "one"): [CELL[0], row("ipgo", "ipgo", {"r": 0.5, "held": 0.2})],
    }
    assert comparison.summary(cells).splitlines() == [
        "| entry | r | wins | held | wins | held out | objects |",
        "|---|---|---|---|---|---|---|",
        "| raw | 0.500 | | 0.500 | | | |",
        # 0.3 and 0.5; held out 0.1, 0.5, 0.5; judged -0.02 and 0.5
        "| ipgo | +0.400 | 40% | +0.200 | 20% | +0.367 | +24.0 |",
        "| draft | – | – | – | – | – | – |",
        "| llm-search | – | – | – | – | – | – |",
        "| reno, on its noise | – | – | – | – | – | – |",
    ]
    (_, _, _, _, noise) = comparison.summary({("r", "one"): [*CELL[1:3], CELL[4]]}).splitlines()
    assert noise == "| reno, on its noise | +0.400 | 40% | – | – |"


def test_the_tables_have_every_entry_of_every_set() -> None:
    text = comparison.tables({("r", "one"): CELL, ("r", "two"): CELL[:3], ("s", "one"): CELL[:1]})
    first, second = text.split("\n\n## s")
    lines = first.splitlines()
    head = [
        "entry",
        "one, fitted",
        "one, unseen",
        "two, fitted",
        "two, unseen",
        "numbers",
        "calls",
        "seconds",
        "MiB (of so many prompts at once)",
    ]
    assert lines[2] == f"| {' | '.join(head)} |"
    assert lines[4] == "| raw | 0.500 | 0.500 | 0.500 | 0.500 | 100 | 2,990 | 12 | 900 |"
    assert "| reno | +0.400 (+0.300 to +0.500) | – | – | – | 100 | 2,990 | 12 | 900 |" in lines
    assert "| chatgpt | failed | failed | – | – | – | – | – | – |" in lines
    assert second.count("\n| raw") == 1


def test_the_last_step_and_the_best_are_side_by_side() -> None:
    other = [replace(each, final=0.7, best=0.8) for each in CELL[1:2]]
    text = comparison.selection({("r", "one"): CELL, ("r", "two"): other})
    assert "| ipgo | 0.600 | 0.700 |" in text
    assert "| draft | – | – |" in text  # of one set alone


def test_in_how_many_cells_something_falls() -> None:
    sure = replace(CELL[1], unseen=CELL[1].unseen | {"held": gain("held", -0.2)})
    text = comparison.bar({("r", "one"): CELL, ("r", "two"): [sure], ("r", "three"): CELL[:1]})
    assert "where ipgo is below raw, in 2 of 3 cells, surely in 1:" in text


def test_what_ours_does_to_every_reward_is_said_cell_by_cell() -> None:
    gains = {name: gain(name, value) for name, value in (("emoji-clip", 0.2), ("emoji-aesthetic", -0.1))}
    judged = gains | {"judge-object": gain("judge-object", -0.02)}
    ours = replace(row("ipgo", "ipgo", {}), fitted=gains, unseen=judged)
    text = comparison.against_raw({("emoji-clip", "one"): [CELL[0], ours], ("emoji-clip", "two"): CELL[:1]})
    # After a title and its gap, a head and its rule: nothing where ours has no result.
    (line,) = text.splitlines()[4:]
    assert line == (
        "| ipgo | emoji-clip | one | 20.0% | 20.0% | – | +0.200 (+0.100 to +0.300) | -0.100 (-0.200 to +0.000) "
        "| 50.0% to 48.0% |"
    )


def test_a_single_image_has_no_interval() -> None:
    alone = gain("r", 0.25)
    alone = replace(alone, gain=replace(alone.gain, low=math.nan, high=math.nan))
    assert comparison.said(alone) == "+0.250"


def test_its_plan_fits_noise_on_one_seed() -> None:
    tied = set()
    for label in read_comparison(SYSTEMS)["entries"]:
        made = yaml.safe_load(comparison.plan(label, (0, 1, 2, 3)))
        assert made["seeds"] == [0, 1, 2, 3]
        assert list(made["entries"]) == [label]
        if made["entries"][label].get("seeds") == [0]:
            tied.add(label)
        common = {**common_settings(RunConfig(("a",))), "seeds": made["seeds"]}
        Plan(("a",), common, made["entries"], 3000).check()
    assert tied == {"reno", "dno", "joint", "best-of-n", "ipgo-black-box"}


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    one, two = ("emoji-clip", "one"), ("emoji-clip", "two")
    scored = {"emoji-clip": ("a",)}
    ours, raw = (replace(each, rewards=scored, curve=[(1.0, 0.5)]) for each in (CELL[1], CELL[0]))
    for label, cell, made in (("ipgo", one, ours), ("ipgo", two, ours), ("raw", one, raw)):
        comparison.keep(tmp_path, label, cell, made, {"budget": 500})
    found = comparison.stored(tmp_path, ["raw", "ipgo"], [two, one], {"budget": 500})
    assert list(found) == [two, one]
    assert found[one] == [replace(raw, curve=[]), replace(ours, curve=[])]
    assert comparison.stored(tmp_path, ["ipgo"], [one], {"budget": 300}) == {}

    comparison.check_kept(tmp_path, ["ipgo", "draft"], {"budget": 500})
    with pytest.raises(SystemExit, match=r"ipgo.json holds figures of other settings; give another folder"):
        comparison.check_kept(tmp_path, ["ipgo", "draft"], {"budget": 300})

    comparison.keep(tmp_path, "ipgo", one, replace(ours, rewards={"emoji-clip": ("b",)}), {"budget": 500})
    with pytest.raises(SystemExit, match="ipgo: scored by another emoji-clip than raw"):
        comparison.stored(tmp_path, ["raw", "ipgo"], [one], {"budget": 500})

    # Also one that is not among the three, and that some rows do not have.
    for label, digits in (("ipgo", "a"), ("draft", "b"), ("raw", None)):
        rewards = scored | ({} if digits is None else {"emoji-likeness": (digits,)})
        comparison.keep(tmp_path, label, one, replace(ours, label=label, rewards=rewards), {"budget": 500})
    with pytest.raises(SystemExit, match="draft: scored by another emoji-likeness than ipgo"):
        comparison.stored(tmp_path, ["raw", "ipgo", "draft"], [one], {"budget": 500})


def test_a_cell_that_cannot_begin_ends_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "FOLDER", tmp_path / "runs")
    monkeypatch.setattr(comparison, "KEPT", tmp_path / "kept")
    with pytest.raises(SystemExit) as stopped:
        comparison.main(["--entries", "raw", "--rewards", "nosuch", "--sets", "one"])
    assert stopped.value.code == 2
    assert not (tmp_path / "kept").exists()


def test_what_is_written_above_the_table_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "table.md"
    out.write_text("# By hand\n\n`python benchmarks/comparison.py --budget 1`\n\nan old table\n")
    comparison.main(["--table", "--budget", "7", "--out", str(out)])
    text = out.read_text()
    assert text.startswith("# By hand\n\n`python benchmarks/comparison.py --entries raw ")
    assert "--budget 7" in text
    assert "an old table" not in text


def test_the_kept_figures_of_the_documents_are_read() -> None:
    kept = sorted((Path(comparison.__file__).parents[1] / "docs").glob("comparison*/*.json"))
    assert kept
    for file in kept:
        rows = [comparison.read(cell) for cell in json.loads(file.read_text())["cells"].values()]
        assert {row.label for row in rows} == {file.stem}
