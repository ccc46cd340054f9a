"""A comparison that is killed again and again, or shared by processes, ends with the table of an undisturbed one."""

from __future__ import annotations

import csv
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ipgo import cli
from ipgo.comparison import Comparison
from ipgo.report.rows import rows
from tests import sessions

ENTRIES = """
entries:
  raw:
  ipgo: {method: {insertion: {num_prefix: 2, num_suffix: 1}, ascent: {backprop_steps: 2}}}
  best-of-n:
  shared: {shared: true, method: {name: ipgo, ascent: {backprop_steps: 1, accumulate: 1}}}
"""
SHARE = 1 / 3  # of the work, which is the most that a session gets before it is killed


def command(pipeline_folder: str, folder: Path, budget: int) -> list[str]:
    """A comparison on two prompts, but for its folder."""
    entries, unseen = folder / "entries.yaml", folder / "unseen.txt"
    entries.write_text(ENTRIES)
    unseen.write_text("a bus\n")
    words = ["compare", "a fox", "a lemon", "--config", str(entries), "--unseen-prompts", str(unseen)]
    words += ["--backend", pipeline_folder, "--reward", "colorfulness", "--held-out", "contrast"]
    words += ["--budget", str(budget), "--price", "2", "3", "--chunk", "1", "--unseen-seeds", "2"]
    return [*words, "--sampling.steps", "2", "--out"]


def assert_same_tables(undisturbed: Path, other: Path) -> None:
    """Equal, but for what tells the time."""
    ours, theirs = (Comparison.open(place) for place in (undisturbed, other))
    assert ours.failures() == theirs.failures() == {}
    pairs = zip(rows(ours), rows(theirs), strict=True)
    for one, two in ([dataclasses.replace(row, seconds=0, memory=0) for row in pair] for pair in pairs):
        assert one == two
        assert one.finished == one.prompts == 2
    texts = [(place / "comparison.csv").read_text().splitlines() for place in (undisturbed, other)]
    tables = [list(csv.DictReader(text)) for text in texts]
    for table in tables:
        for line in table:
            del line["seconds"]
    assert tables[0] == tables[1]
    assert any(line["on"] == "unseen prompts" for line in tables[0])


def test_processes_share_a_comparison(pipeline_folder: str, tmp_path: Path) -> None:
    """Begun at once; what each leaves to the other is no failure, and the last one has the whole table."""
    words = command(pipeline_folder, tmp_path, budget=60)
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert cli.main([*words, str(alone)]) == 0
    line = [sys.executable, "-m", "ipgo", *words, str(together)]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads as in the tests, for the same bits
    processes = [subprocess.Popen(line, env=one, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert cli.main(["report", str(together)]) == 0  # the first to end may have written its table last
    assert_same_tables(alone, together)


@pytest.mark.slow
def test_kill_minus_nine_at_random_moments(pipeline_folder: str, tmp_path: Path) -> None:
    """Each session is killed a random while after it first wrote something, until one ends by itself."""
    words = command(pipeline_folder, tmp_path, budget=200)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    process = sessions.begin([*words, str(undisturbed)], undisturbed)
    started = time.monotonic()
    assert process.wait() == 0
    work = time.monotonic() - started
    kills, reached = 0, set()
    for moment in torch.rand(20, generator=torch.Generator().manual_seed(0)).tolist():
        process = sessions.begin([*words, str(killed)], killed)
        if not sessions.kill(process, moment * work * SHARE):
            break
        kills += 1
        reached.add(len(list((killed / "entries").glob("*"))))
    else:
        assert sessions.begin([*words, str(killed)], killed).wait() == 0
    assert kills >= 3
    assert len(reached) > 1  # not all of them in the same entry

    assert_same_tables(undisturbed, killed)
    other = Comparison.open(killed)
    runs = [run for label in other.plan.entries if (run := other.run(label)) is not None]
    counts = [result["cost"]["measured"]["sessions"] for run in runs for result in run.results()]
    assert sum(each > 1 for each in counts) > 1  # checkpoints were really used
