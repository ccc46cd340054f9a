"""What trackers are told of a fit, and that none of them can cost one."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ipgo
from ipgo import cli, runner, tracking
from ipgo.ascent import Ascent
from ipgo.chunks import Chunk, Cost
from ipgo.comparison import Comparison
from ipgo.store import Run
from ipgo.task import Progress

THREE: dict[str, Any] = {
    "reward": "colorfulness",
    "method": ipgo.IPGO(ascent=Ascent(steps=3)),
    "sampling": ipgo.Sampling(steps=2),
    "held_out": ["contrast"],
    "seeds": (0,),
    "unseen_seeds": 1,
    "device": "cpu",
}
NAMES = ("reward", "penalty", "grad_norm", "best")


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def scalars(found: EventAccumulator, name: str) -> dict[int, float]:
    return {event.step: event.value for event in found.Scalars(name)}


def history(run: Run, number: int, name: str) -> dict[int, Any]:
    kept = {line["step"]: line[name] for line in run.history(run.prompts[number])}
    return {step: pytest.approx(value, rel=1e-6) for step, value in kept.items()}


def test_tensorboard_has_what_the_histories_have(pipeline_folder: str, tmp_path: Path) -> None:
    prompts = ["a fox", "a lemon", "a cake"]
    result = ipgo.fit(
        prompts, backend=pipeline_folder, out=tmp_path / "run", track="tensorboard", chunk=2, **THREE
    )
    plain = ipgo.fit(prompts, backend=pipeline_folder, chunk=2, **THREE)
    assert [each.scores for each in result] == [each.scores for each in plain]
    run = Run.open(tmp_path / "run")
    pair, alone = sorted((tmp_path / "run" / "tensorboard").iterdir(), reverse=True)
    assert (pair.name, alone.name) == ("prompts-0000-0001", run.prompts[2].id)
    two, one = events(pair), events(alone)
    for name in NAMES:
        assert scalars(one, name) == history(run, 2, name)
        for number in (0, 1):
            assert scalars(two, f"{name}/{run.prompts[number].id}") == history(run, number, name)
    assert [event.step for event in one.Images("picture")] == [1, 3]
    assert set(two.Tags()["images"]) == {f"picture/{prompt.id}" for prompt in run.prompts[:2]}
    (told,) = (value.string_val[0] for value in [one.Tensors("settings/text_summary")[0].tensor_proto])
    assert json.loads(told.decode().removeprefix("```json").removesuffix("```")) == run.config.to_json()


def test_a_shared_fit_is_told_as_one(pipeline_folder: str, tmp_path: Path) -> None:
    words = ["fit", "a fox", "a lemon", "--backend", pipeline_folder, "--reward", "colorfulness", "--shared"]
    few = ["--method.ascent.steps", "2", "--sampling.steps", "2", "--unseen-seeds", "1", "--device", "cpu"]
    assert cli.main([*words, *few, "--out", str(tmp_path / "run"), "--track", "tensorboard"]) == 0
    run, found = Run.open(tmp_path / "run"), events(tmp_path / "run" / "tensorboard" / "shared")
    kept = [json.loads(line) for line in (run.path / "shared" / "history.jsonl").read_text().splitlines()]
    assert scalars(found, "reward") == {line["step"]: pytest.approx(line["reward"]) for line in kept}
    assert found.Tags()["images"] == []


def test_a_comparison_tells_of_each_entry_within_its_budget(pipeline_folder: str, tmp_path: Path) -> None:
    words = [
        "compare",
        "a fox",
        "--methods",
        "ipgo,best-of-n",
        "--backend",
        pipeline_folder,
        "--device",
        "cpu",
    ]
    words += [
        "--reward",
        "colorfulness",
        "--held-out",
        "contrast",
        "--sampling.steps",
        "2",
        "--unseen-seeds",
        "1",
    ]
    budget = ["--budget", "12", "--price", "2", "3", "--out", str(tmp_path / "table")]
    assert cli.main([*words, *budget, "--track", "tensorboard"]) == 0
    for label in ("ipgo", "best-of-n"):
        run = Run.open(Comparison.open(tmp_path / "table").folder(label))
        (told,) = (run.path / "tensorboard").iterdir()
        assert scalars(events(told), "reward") == history(run, 0, "reward")
        assert len(run.history(run.prompts[0])) > 1


def test_steps_that_were_lost_are_taken_back(
    pipeline_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", -1.0)
    record = Run.record

    def killed(self: Run, chunk: Chunk, progress: Progress, cost: Cost) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt
        record(self, chunk, progress, cost)

    given = {"backend": pipeline_folder, "out": tmp_path / "run", "track": "tensorboard", **THREE}
    monkeypatch.setattr(Run, "record", killed)
    with pytest.raises(KeyboardInterrupt):
        ipgo.fit("a fox", **given)
    monkeypatch.setattr(Run, "record", record)
    run = Run.open(tmp_path / "run")
    folder = tmp_path / "run" / "tensorboard" / run.prompts[0].id
    assert set(scalars(events(folder), "reward")) == {1, 2}
    ipgo.fit("a fox", **given)
    for name in NAMES:
        assert scalars(events(folder), name) == history(run, 0, name)
        assert [event.step for event in events(folder).Scalars(name)] == [1, 2, 3]


@pytest.mark.parametrize("broken", ["start", "tell", "close"])
def test_a_tracker_that_fails_costs_no_fit(
    pipeline_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: str,
) -> None:
    called: list[str] = []

    class Broken:
        def __init__(self, *given: object) -> None:
            self.at("start")

        def tell(self, *given: object) -> None:
            self.at("tell")

        def close(self) -> None:
            self.at("close")

        def at(self, place: str) -> None:
            called.append(place)
            if place == broken:
                raise RuntimeError("no api key\nlog in first")

    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", Broken)
    result = ipgo.fit("a fox", backend=pipeline_folder, out=tmp_path, track="tensorboard", **THREE)
    assert len(result[0].history) == 3
    assert caplog.messages.count("tensorboard failed: no api key; this fit goes on without it") == 1
    assert (
        called
        == {
            "start": ["start"],
            "tell": ["start", "tell", "close"],
            "close": ["start", "tell", "tell", "tell", "close"],
        }[broken]
    )


def test_what_cannot_be_tracked_is_refused_before_a_model_loads(
    tmp_path: Path, no_models: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ipgo.InputError, match=r"unknown tracker 'tensorbord'; did you mean 'tensorboard'\?"):
        ipgo.fit("a fox", out=tmp_path / "run", track="tensorbord")
    with pytest.raises(ipgo.InputError, match="which writes into the run's folder; out must say where"):
        ipgo.fit("a fox", track="tensorboard")
    installed = importlib.machinery.ModuleSpec("wandb", None, origin="wandb/__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", {"wandb": installed}.get)
    with pytest.raises(ipgo.InputError, match="track is 'wandb', which writes into the run's folder"):
        ipgo.fit("a fox", track="wandb")
    folder = importlib.machinery.ModuleSpec(
        "wandb", None
    )  # one of that name, which Python takes for a package
    monkeypatch.setattr(importlib.util, "find_spec", {"wandb": folder, "tensorboard": None}.get)
    with pytest.raises(ipgo.MissingExtraError, match=r"track is 'wandb', which needs .*: pip install wandb"):
        ipgo.fit("a fox", out=tmp_path / "run", track="wandb")
    assert cli.main(["fit", "a fox", "--out", str(tmp_path / "run"), "--track", "tensorboard"]) == 2
    assert 'pip install "ipgo[track]"' in capsys.readouterr().err
    assert (
        cli.main(["compare", "a fox", "--methods", "raw", "--out", str(tmp_path / "run"), "--track", "x"])
        == 2
    )
    assert "unknown tracker 'x'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_trackio_has_a_run_for_the_fit(
    pipeline_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is installed: it is no part of the test extra."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    result = ipgo.fit("a fox", backend=pipeline_folder, out=tmp_path / "run", track="trackio", **THREE)
    with sqlite3.connect(next((tmp_path / "trackio").glob("ipgo.db"))) as base:
        rows = base.execute("select step, metrics from metrics order by step").fetchall()
    told = [(step, json.loads(metrics)) for step, metrics in rows]
    steps = [(step, each["reward"]) for step, each in told if "reward" in each]
    assert steps == [(line["step"], pytest.approx(line["reward"])) for line in result[0].history]
    assert list((tmp_path / "trackio").rglob("*.png"))


def test_weights_and_biases_has_a_run_for_the_fit(
    pipeline_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, where it is installed: it is no part of the test extra."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ipgo.fit("a fox", backend=pipeline_folder, out=tmp_path / "run", track="wandb", **THREE)
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert kept.stat().st_size > 1_000
    assert b"grad_norm" in kept.read_bytes()
    assert len(list(kept.parent.rglob("*.png"))) == 2
