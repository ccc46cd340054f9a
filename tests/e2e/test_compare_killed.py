"""A comparison that is killed again and again ends with the table of an undisturbed one."""

from __future__ import annotations

import csv
import dataclasses
import time
from pathlib import Path

import pytest
import torch

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


@pytest.mark.slow
def test_kill_minus_nine_at_random_moments(pipeline_folder: str, tmp_path: Path) -> None:
    """Each session is killed a random while after it first wrote something, until one ends by itself."""
    entries, unseen = tmp_path / "entries.yaml", tmp_path / "unseen.txt"
    entries.write_text(ENTRIES)
    unseen.write_text("a bus\n")
    words = ["compare", "a fox", "a lemon", "--config", str(entries), "--unseen-prompts", str(unseen)]
    words += ["--backend", pipeline_folder, "--reward", "colorfulness", "--held-out", "contrast"]
    words += ["--budget", "200", "--price", "2", "3", "--chunk", "1", "--unseen-seeds", "2"]
    words += ["--sampling.steps", "2", "--out"]
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

    one, other = (Comparison.open(place) for place in (undisturbed, killed))
    assert one.failures() == other.failures() == {}
    pairs = zip(rows(one), rows(other), strict=True)
    for ours, theirs in ([dataclasses.replace(row, seconds=0, memory=0) for row in pair] for pair in pairs):
        assert ours == theirs
        assert ours.finished == ours.prompts == 2
    texts = [(place / "comparison.csv").read_text().splitlines() for place in (undisturbed, killed)]
    tables = [list(csv.DictReader(text)) for text in texts]
    for table in tables:
        for line in table:
            del line["seconds"]
    assert tables[0] == tables[1]
    assert any(line["on"] == "unseen prompts" for line in tables[0])
    runs = [run for label in other.plan.entries if (run := other.run(label)) is not None]
    counts = [result["cost"]["measured"]["sessions"] for run in runs for result in run.results()]
    assert sum(each > 1 for each in counts) > 1  # checkpoints were really used
