from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save

from ipgo import (
    IPGO,
    Adapter,
    Ascent,
    InputError,
    Insertion,
    InsertionAdapter,
    ResumeError,
    Run,
    Score,
    files,
    load_adapter,
    save_adapter,
)
from ipgo.artefacts import load_identities, load_scores, save_scores
from ipgo.chunks import Chunk, Cost, read_checkpoint
from ipgo.config import RunConfig
from ipgo.methods import DRaFT
from ipgo.prompts import number
from ipgo.runner import forget_peak_memory, peak_memory
from tests.conftest import progress

CONFIG = RunConfig(("a fox", "a lemon", "an owl"), IPGO(ascent=Ascent(steps=4)), chunk=2)


def adapter(prompts: tuple[str, ...] | None = ("a fox", "a lemon")) -> InsertionAdapter:
    return InsertionAdapter(prompts, 8, Insertion(1, 2, rank=2, norm=1.0))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.open(tmp_path / "run", CONFIG)
    run.start({"device": "test"})
    return run


def test_a_killed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.json"
    files.write_json(file, {"a": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(file, {"a": 2})
    assert files.read_json(file) == {"a": 1}
    monkeypatch.undo()
    files.write_json(file, {"a": 3})
    assert files.read_json(file) == {"a": 3}
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]


def test_two_processes_may_write_one_file(tmp_path: Path) -> None:
    """Whoever reads sees what one of them wrote, whole."""
    file = tmp_path / "x.json"
    code = (
        "import pathlib, sys; from ipgo import files\n"
        "for _ in range(60): files.write_json(pathlib.Path(sys.argv[1]), {'who': sys.argv[2] * 9999}, alone=False)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(file), who]) for who in "ab"]
    seen = set()
    while any(each.poll() is None for each in writers):
        if file.is_file():
            seen |= set(files.read_json(file)["who"])
    assert [each.returncode for each in writers] == [0, 0]
    assert seen <= {"a", "b"}
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]


def test_lines_up_to_a_broken_one(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    assert files.read_lines(file) == []
    files.append_line(file, {"step": 1})
    files.append_line(file, {"step": 2})
    with file.open("a") as stream:
        stream.write('{"step": 3, "rew')
    assert files.read_lines(file) == [{"step": 1}, {"step": 2}]


def test_chunks_and_what_is_pending(run: Run) -> None:
    assert [chunk.texts for chunk in run.chunks()] == [("a fox", "a lemon"), ("an owl",)]
    alone = Run(run.path, replace(CONFIG, method=DRaFT()))
    assert [len(chunk.prompts) for chunk in alone.chunks()] == [1, 1, 1]
    shared = Run(run.path, replace(CONFIG, shared=True))
    assert [chunk.texts for chunk in shared.chunks()] == [CONFIG.prompts]
    run.finish(run.prompts[0], [], {}, failed=False)
    assert len(run.pending()) == 2
    run.finish(run.prompts[1], [], {}, failed=True)
    assert [chunk.texts for chunk in run.pending()] == [("an owl",)]
    assert [result["status"] for result in run.results()] == ["finished", "failed"]


def test_checkpoint_round_trip_cuts_the_history_back(run: Run) -> None:
    chunk = run.chunks()[0]
    for step in (1, 2):
        run.record(chunk, progress(step), Cost(Counter(denoiser=8 * step), float(step)))
    run.save_checkpoint(chunk, progress(2), Cost(Counter(denoiser=8), 2.0, 100.0))
    run.record(chunk, progress(3, (float("nan"), 2.0)), Cost(seconds=3.0))
    assert run.history(chunk.prompts[0])[-1]["reward"] is None

    found = run.checkpoint(chunk)
    assert found is not None
    assert (found.step, found.cost.calls, found.cost.seconds, found.cost.sessions) == (
        2,
        {"denoiser": 8},
        2.0,
        2,
    )
    assert found.state["values"].tolist() == [1.0, 2.0]
    assert [line["step"] for line in run.history(chunk.prompts[1])] == [1, 2]
    first = run.history(chunk.prompts[1])[0]
    assert (first["reward"], first["seconds"], first["calls"]) == (2.0, 1.0, {"denoiser": 4.0})


def test_without_a_checkpoint_the_history_starts_again(run: Run) -> None:
    chunk = run.chunks()[0]
    run.record(chunk, progress(1), Cost(seconds=1.0))
    assert run.checkpoint(chunk) is None
    assert run.history(chunk.prompts[0]) == []


def test_a_shared_history_is_the_mean_of_the_prompts_that_were_drawn(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", replace(CONFIG, shared=True))
    run.start({"device": "test"})
    run.record(run.chunks()[0], progress(1, (1.0, float("nan"), 2.0)), Cost())
    assert run.history(run.prompts[0])[0]["reward"] == 1.5


def test_a_history_is_json_where_a_gradient_overflows(run: Run) -> None:
    chunk, step = run.chunks()[0], progress(1)
    run.record(chunk, replace(step, grad_norm=torch.full_like(step.grad_norm, torch.inf)), Cost())
    assert run.history(run.prompts[0])[0]["grad_norm"] is None


def test_the_best_is_only_noted_where_it_is_kept(run: Run) -> None:
    chunk = run.chunks()[0]
    run.record(chunk, progress(1), Cost())
    run.record(chunk, replace(progress(2), keeps_best=False), Cost())
    assert [line["best"] for line in run.history(run.prompts[0])] == [1.0, None]


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-5], lambda content: b"", lambda content: b"x" * 100]
)
def test_a_damaged_checkpoint_is_set_aside(run: Run, caplog: pytest.LogCaptureFixture, damage: Any) -> None:
    chunk = run.chunks()[0]
    run.record(chunk, progress(1), Cost(seconds=1.0))
    run.save_checkpoint(chunk, progress(1), Cost())
    (file,) = (run.path / "chunks").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING, logger="ipgo"):
        assert run.checkpoint(chunk) is None
    assert "is damaged; set aside" in caplog.text
    assert [each.suffix for each in (run.path / "chunks").iterdir()] == [".damaged"]
    assert run.history(chunk.prompts[0]) == []


def test_a_checkpoint_that_lacks_a_tensor_is_set_aside(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    chunk = run.chunks()[0]
    run.record(chunk, progress(1), Cost(seconds=1.0))
    run.save_checkpoint(chunk, progress(1), Cost())
    (file,) = (run.path / "chunks").iterdir()
    with safe_open(file, framework="pt") as tensors:
        about = tensors.metadata()
    file.write_bytes(save({"another": torch.zeros(1)}, metadata=about))
    assert run.checkpoint(chunk) is None
    assert "is damaged; set aside" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="what a process has mapped is in /proc")
def test_what_a_checkpoint_holds_is_copied_from_its_file(run: Run) -> None:
    """Windows does not let the next one take the place of a file that is mapped."""
    chunk = run.chunks()[0]
    run.record(chunk, progress(1), Cost(seconds=1.0))
    run.save_checkpoint(chunk, progress(1), Cost())
    found = run.checkpoint(chunk)
    assert found is not None
    assert run.path.name + "/chunks" not in Path("/proc/self/maps").read_text()


def test_a_checkpoint_of_another_version_is_said_to_be(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """It may have settings that were not there, or others for what the settings left open."""
    chunk = run.chunks()[0]
    run.record(chunk, progress(1), Cost(seconds=1.0))
    run.save_checkpoint(chunk, progress(1), Cost())
    (file,) = (run.path / "chunks").iterdir()
    assert read_checkpoint(file, chunk, run.config.digest()) is not None
    assert not caplog.text
    assert read_checkpoint(file, chunk, "another") is None
    assert "is of another version of ipgo: the chunk starts again" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="the figure is that of /proc")
def test_memory_before_the_fit_is_not_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is that of the process that has started this one, which `getrusage` may say."""
    before = torch.ones(2**26)  # 256 MiB
    high = peak_memory(before.device)
    del before
    forget_peak_memory(torch.device("cpu"))
    assert peak_memory(torch.device("cpu")) < high - 200


@pytest.mark.parametrize("line", [b"\xff\xfe\n", b"3\n", b"{}\n", b'{"step": 7}\n'])
def test_a_damaged_history_ends_where_it_is_damaged(run: Run, line: bytes) -> None:
    chunk = run.chunks()[0]
    for step in (1, 2):
        run.record(chunk, progress(step), Cost())
    run.save_checkpoint(chunk, progress(2), Cost())
    (history,) = run.folder(chunk.prompts[0]).glob("history.jsonl")
    whole = history.read_bytes()
    history.write_bytes(whole + line)  # after the step of the checkpoint: nothing is lost
    found = run.checkpoint(chunk)
    assert found is not None
    assert history.read_bytes() == whole
    history.write_bytes(line)
    assert run.checkpoint(chunk) is None
    assert history.read_bytes() == b""


def test_a_checkpoint_of_other_prompts_or_settings_is_not_taken(run: Run) -> None:
    chunk = run.chunks()[0]
    run.record(chunk, progress(1), Cost(seconds=1.0))
    run.save_checkpoint(chunk, progress(1), Cost())
    run.release()
    assert Run(run.path, replace(CONFIG, seed=7)).checkpoint(chunk) is None
    renamed = Chunk((replace(chunk.prompts[0], text="another"), chunk.prompts[1]))
    assert run.checkpoint(renamed) is None


def test_a_checkpoint_that_another_cutting_has_overtaken_is_not_taken(run: Run) -> None:
    """Else the histories would go on from its step, with nothing before."""
    chunk = run.chunks()[0]
    for step in (1, 2, 3):
        run.record(chunk, progress(step), Cost())
    run.save_checkpoint(chunk, progress(3), Cost())
    alone = Chunk(chunk.prompts[:1])
    assert run.checkpoint(alone) is None  # with --chunk 1, killed again after a step
    run.record(alone, progress(1, (1.0,)), Cost())
    assert run.checkpoint(chunk) is None
    assert [run.history(prompt) for prompt in chunk.prompts] == [[], []]


def test_a_run_that_another_process_has_begun_since_is_compared_again(tmp_path: Path) -> None:
    late = Run.open(tmp_path / "run", replace(CONFIG, seed=7))
    first = Run.open(tmp_path / "run", CONFIG)
    first.start({"device": "test"})
    first.release()
    with pytest.raises(ResumeError, match="was made with other settings"):
        late.start({"device": "test"})


def test_opening_checks_the_settings(run: Run, tmp_path: Path) -> None:
    assert Run.open(run.path).config == CONFIG
    assert Run.open(run.path, replace(CONFIG, chunk=1, device="cpu")).prompts == run.prompts
    other = replace(CONFIG, seed=3, sampling=replace(CONFIG.sampling, steps=7))
    with pytest.raises(ResumeError, match=r"sampling\.steps \d+ there, 7 now; seed 0 there, 3 now"):
        Run.open(run.path, other)
    with pytest.raises(ResumeError, match="prompts"):
        Run.open(run.path, replace(CONFIG, prompts=("a fox",)))
    with pytest.raises(InputError, match="is not a run folder"):
        Run.open(tmp_path)
    with pytest.raises(InputError, match="holds something else"):
        Run.open(tmp_path, CONFIG)
    about = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps({**about, "schema": 99}))
    with pytest.raises(ResumeError, match="schema 99"):
        Run.open(run.path, CONFIG)
    (run.path / "run.json").write_text("{half")
    with pytest.raises(InputError, match="cannot be read"):
        Run.open(run.path, CONFIG)


def test_a_setting_that_is_newer_than_a_run_is_at_its_default_there(run: Run) -> None:
    stored = files.read_json(run.path / "run.json")
    del stored["config"]["method"]["ascent"]["keep_best"]
    files.write_json(run.path / "run.json", stored)
    assert Run.open(run.path, CONFIG).config == CONFIG
    other = replace(CONFIG, method=IPGO(ascent=Ascent(steps=4, keep_best=False)))
    with pytest.raises(ResumeError, match=r"method\.ascent\.keep_best true there, false now"):
        Run.open(run.path, other)


def test_opening_writes_nothing(tmp_path: Path) -> None:
    Run.open(tmp_path / "new", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_just_begun_can_be_opened(tmp_path: Path) -> None:
    (tmp_path / ".run.json.draft").write_text("{")
    Run.open(tmp_path, CONFIG).start({})
    assert Run.open(tmp_path).config == CONFIG


@pytest.mark.parametrize("name", [".DS_Store", "._.DS_Store", "Thumbs.db", "desktop.ini"])
def test_a_folder_that_was_looked_at_is_new(tmp_path: Path, name: str) -> None:
    """Finder and Explorer leave files where they were, which are nobody's work."""
    (tmp_path / name).write_bytes(b"\0")
    Run.open(tmp_path, CONFIG).start({})
    assert Run.open(tmp_path).config == CONFIG


def test_a_folder_with_a_hidden_file_of_ones_own_is_not_new(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    with pytest.raises(InputError, match="holds something else"):
        Run.open(tmp_path, CONFIG)


def elsewhere(run: Run, line: str) -> subprocess.CompletedProcess[str]:
    """What another process makes of a line about `run`, the same folder, and `chunk(*places)`, some of its prompts."""
    code = (
        "import sys; from pathlib import Path; from ipgo.store import Run; from ipgo.chunks import Chunk; "
        "run = Run.open(Path(sys.argv[1])); "
        f"chunk = lambda *places: Chunk(tuple(run.prompts[each] for each in places)); {line}"
    )
    command = [sys.executable, "-c", code, str(run.path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@contextlib.contextmanager
def at_the_first_chunk(run: Run) -> Iterator[subprocess.Popen[str]]:
    """Another process that has claimed it, and waits."""
    code = (
        "import sys; from pathlib import Path; from ipgo.store import Run; run = Run.open(Path(sys.argv[1])); "
        "print(run.claim(run.chunks()[0]), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "True"
        yield other


def test_a_prompt_is_one_processs_at_a_time(run: Run) -> None:
    assert run.claim(Chunk(run.prompts[1:]))
    tried = "print(run.claim(chunk(0)), run.claim(chunk(0, 1)), run.claim(chunk(2)))"
    assert elsewhere(run, tried).stdout.split() == ["True", "False", "False"]
    refused = elsewhere(run, "run.checkpoint(chunk(0, 1))")
    assert f"InUseError: {str(run.path)!r} is in use" in refused.stderr
    assert run.claim(Chunk(run.prompts[:2]))  # the other process has ended, and so has its claim
    run.release()
    assert elsewhere(run, tried).stdout.split() == ["True", "True", "True"]


def test_processes_share_out_the_chunks_that_are_open(run: Run) -> None:
    ours = run.claimed()
    assert next(ours).texts == ("a fox", "a lemon")
    theirs = "print([each.texts for each in run.claimed()])"
    assert elsewhere(run, theirs).stdout.strip() == "[('an owl',)]"
    run.finish(run.prompts[2], [], {}, False)
    assert elsewhere(run, theirs).stdout.strip() == "[]"
    assert [each.texts for each in ours] == []  # and what they have finished is not done again
    assert elsewhere(run, theirs).stdout.strip() == "[('a fox', 'a lemon')]"


def test_what_another_process_finished_in_the_meantime_is_not_begun(run: Run) -> None:
    ours = run.claimed()
    next(ours)
    run.finish(run.prompts[2], [], {}, False)  # between the look at what is pending and the claim
    assert list(ours) == []


def test_what_a_process_that_died_was_at_is_taken_in_the_end(run: Run) -> None:
    with at_the_first_chunk(run) as other:
        ours = run.claimed()
        assert next(ours).texts == ("an owl",)  # and not the first, which is the other process's
        other.kill()
        other.wait()
        assert [each.texts for each in ours] == [("a fox", "a lemon")]  # each once, though none is done


def test_checkpoints_of_ten_thousand_prompts_have_names_of_their_own() -> None:
    prompts = number([f"fox {each}" for each in range(10_009)])
    keys = {Chunk(prompts[start : start + 4]).key for start in range(9_996, 10_008, 4)}
    assert keys == {"9996-9999", "10000-10003", "10004-10007"}


def test_a_claim_that_fails_keeps_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    acquire, calls = FileLock.acquire, []

    def full(lock: Any, **options: Any) -> Any:
        calls.append(lock)
        if len(calls) == 2:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return acquire(lock, **options)

    monkeypatch.setattr("ipgo.store.FileLock.acquire", full)
    with pytest.raises(InputError, match="Too many open files"):
        run.claim(run.chunks()[0])
    assert not calls[0].is_locked
    assert run.claim(run.chunks()[0])


def test_prompts_that_share_what_is_learned_are_claimed_together(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", replace(CONFIG, shared=True))
    run.start({})
    assert run.claim(run.chunks()[0])
    assert elsewhere(run, "print(run.claim(run.chunks()[0]))").stdout.strip() == "False"


def test_several_may_begin_a_run_at_once(tmp_path: Path) -> None:
    first, second = (Run.open(tmp_path / "run", CONFIG) for _ in range(2))
    first.start({"device": "a"})
    second.start({"device": "b"})
    assert second.facts["device"] == "a"
    third = Run.open(tmp_path / "other", CONFIG)
    Run.open(tmp_path / "other", replace(CONFIG, seed=1)).start({})
    with pytest.raises(ResumeError, match="seed"):
        third.start({})


def test_a_judge_is_not_repaired_while_another_process_has_the_broken_one(run: Run) -> None:
    facts = {"rewards": {CONFIG.reward: {"v": 1}, "mine": {"v": 1}}}
    files.write_json(run.path / "run.json", {**run.facts, **facts})
    mended = {"rewards": {CONFIG.reward: {"v": 1}, "mine": {"v": 2}}}
    with at_the_first_chunk(run) as other:
        with pytest.raises(ResumeError, match="mine"):
            Run.open(run.path).start(mended)
        other.communicate()
    Run.open(run.path).start(mended)
    assert run.facts["rewards"] == mended["rewards"]


def test_a_run_that_was_never_begun_leaves_nothing(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "some/where/run", CONFIG)
    for chunk in run.chunks():
        assert run.checkpoint(chunk) is None
    assert (tmp_path / "some/where/run/claims").is_dir()
    run.release()
    assert list(tmp_path.iterdir()) == []
    run.checkpoint(run.chunks()[0])
    run.start({})
    run.release()
    assert run.begun


def test_a_folder_that_cannot_be_locked_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("ipgo.store.FileLock.acquire", denied)
    with pytest.raises(InputError, match="cannot be written: Permission denied"):
        run.checkpoint(run.chunks()[0])


def test_evaluations_by_other_schedulers_are_kept_apart(run: Run) -> None:
    score, drawn = Score("ipgo", "a fox", 1, "r", 0.5, False), {"weights": "aa", "dtype": "float32"}
    for schedule in ("A", "B", "C"):
        run.judge_again([score], {}, {**drawn, "schedule": schedule})
    names = {file.name for file in run.path.glob("evaluation*")}
    assert names == {"evaluation.jsonl", "evaluation-aa-float32-A.jsonl", "evaluation-aa-float32-B.jsonl"}
    save_scores(run.path / "evaluation.jsonl", [score], {}, drawn)  # an older one says nothing of it
    run.judge_again([replace(score, seed=2)], {}, {**drawn, "schedule": "C"})
    assert {each.seed for each in load_scores(run.path / "evaluation.jsonl")} == {1, 2}
    run.judge_again([replace(score, seed=3)], {}, {**drawn, "schedule": "A"})  # its scores come back with it
    assert {each.seed for each in load_scores(run.path / "evaluation.jsonl")} == {1, 3}
    assert {each.seed for each in load_scores(run.path / "evaluation-aa-float32-C.jsonl")} == {1, 2}


def test_an_evaluation_that_was_killed_between_two_names_comes_back(run: Run) -> None:
    score, drawn = Score("ipgo", "a fox", 1, "r", 0.5, False), {"weights": "aa", "dtype": "float32"}
    run.judge_again([score], {}, {**drawn, "schedule": "B"})
    run.judge_again([score], {}, {**drawn, "schedule": "A"})
    (run.path / "evaluation.jsonl").replace(run.path / "evaluation-aa-float32-A.jsonl")  # killed here
    run.judge_again([replace(score, seed=2)], {}, {**drawn, "schedule": "B"})
    assert {each.seed for each in load_scores(run.path / "evaluation.jsonl")} == {1, 2}
    assert (run.path / "evaluation-aa-float32-A.jsonl").is_file()


def test_evaluations_by_another_reward_of_the_same_name_are_kept_apart(run: Run) -> None:
    score, drawn = Score("ipgo", "a fox", 1, "mine.py:f", 0.5, False), {"weights": "aa"}
    other = replace(score, reward="contrast")
    for seed, version in enumerate((1, 2, 1, 2)):
        scores = [replace(each, seed=seed) for each in (score, other)]
        run.judge_again(scores, {"mine.py:f": {"version": version}, "contrast": {}}, drawn)
    latest = load_scores(run.path / "evaluation.jsonl")
    assert [each.seed for each in latest if each.reward == "mine.py:f"] == [3]
    assert {each.seed for each in latest if each.reward == "contrast"} == {0, 1, 2, 3}
    aside = [load_scores(file) for file in sorted(run.path.glob("evaluation-mine*"))]
    assert sorted(sorted(each.seed for each in scores) for scores in aside) == [[0, 2], [1]]


def test_a_later_score_of_the_same_image_takes_the_place_of_the_earlier(run: Run) -> None:
    score, drawn, file = Score("ipgo", "a fox", 1, "r", 0.5, False), {"weights": "aa"}, "evaluation.jsonl"
    for each in (score, replace(score, value=0.7), replace(score, method="raw", value=0.2)):
        run.judge_again([each], {"r": {}}, drawn)
    assert {each.method: each.value for each in load_scores(run.path / file)} == {"ipgo": 0.7, "raw": 0.2}
    run.judge_again([replace(score, reward="s")], {"s": {"id": "s"}}, drawn)
    assert load_identities(run.path / file) == {"r": {}, "s": {"id": "s"}}


def test_whoever_is_refused_leaves_the_history_alone(run: Run) -> None:
    chunk = Chunk(run.prompts[:2])
    run.checkpoint(chunk)
    run.record(chunk, progress(1), Cost())
    files_before = {file: file.read_bytes() for file in run.path.rglob("history.jsonl")}
    assert len(files_before) == 2
    assert "InUseError" in elsewhere(run, "run.checkpoint(chunk(0, 1))").stderr
    assert {file: file.read_bytes() for file in files_before} == files_before


def test_what_is_finished_is_left_alone(run: Run) -> None:
    chunk = run.chunks()[0]
    run.record(chunk, progress(1), Cost(seconds=1.0))
    run.finish(chunk.prompts[0], [], {}, failed=False)
    run.record(chunk, progress(2), Cost(seconds=2.0))
    assert run.checkpoint(chunk) is None
    assert [len(run.history(prompt)) for prompt in chunk.prompts] == [1, 0]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="which cannot be written: Not a directory"):
        Run.open(tmp_path / "file" / "run", CONFIG).start({})


def test_adapters_round_trip(tmp_path: Path) -> None:
    for each in (adapter(), adapter(None), adapter().row(1), Adapter()):
        save_adapter(each, tmp_path, {"backend": "emoji"})
        loaded = load_adapter(tmp_path)
        assert (loaded.kind, loaded.prompts, loaded.options) == (each.kind, each.prompts, each.options)
        for name, tensor in each.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)


def test_an_adapter_says_how_its_backend_was_opened(tmp_path: Path) -> None:
    opened: dict[str, Any] = {"dtype": "bfloat16", "scheduler": "euler", "padding": "none"}
    opened |= {"image_size": 64, "long_prompts": "truncate"}
    run = Run.open(tmp_path / "run", replace(CONFIG, **opened))
    run.start({"device": "test"})
    run.save_adapter(run.prompts[0], Adapter(("a fox",)))
    run.finish(run.prompts[0], [], {}, failed=False)
    _, settings = run.whole_adapter()
    assert {name: settings[name] for name in opened} == opened


def test_bad_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no adapter\.json"):
        load_adapter(tmp_path)
    save_adapter(adapter(), tmp_path)
    tensors = tmp_path / "adapter.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-3])
    with pytest.raises(InputError, match="cannot be read"):
        load_adapter(tmp_path)
    broken = adapter()
    with torch.no_grad():
        next(broken.parameters())[0, 0] = float("nan")
    save_adapter(broken, tmp_path)
    with pytest.raises(InputError, match="not finite"):
        load_adapter(tmp_path)
    about = json.loads((tmp_path / "adapter.json").read_text())
    (tmp_path / "adapter.json").write_text(json.dumps({**about, "schema": 99}))
    with pytest.raises(InputError, match="has format 99, and this ipgo reads 1"):
        load_adapter(tmp_path)
    (tmp_path / "adapter.json").write_text(json.dumps({**about, "kind": "insertoin"}))
    with pytest.raises(InputError, match="unknown adapter kind 'insertoin'; did you mean 'insertion'"):
        load_adapter(tmp_path)


def test_scores_round_trip(tmp_path: Path) -> None:
    scores = [
        Score("ipgo", "a fox", 0, "r", 0.1 + 0.2, True),
        Score("raw", "ein süßer Fuchs", 1, "r", 1e-9, False),
    ]
    save_scores(tmp_path / "s.jsonl", scores)
    assert load_scores(tmp_path / "s.jsonl") == scores
    assert load_identities(tmp_path / "s.jsonl") == {}
    rewards = {"r": {"id": "r", "version": 1}}
    save_scores(tmp_path / "s.jsonl", scores, rewards)
    assert load_scores(tmp_path / "s.jsonl") == scores
    assert load_identities(tmp_path / "s.jsonl") == rewards
    assert load_identities(tmp_path / "none.jsonl") == {}


def test_a_run_is_not_continued_with_a_reward_of_other_weights(tmp_path: Path) -> None:
    was = {"clip": {"id": "clip", "version": 1, "weights": ["aa"], "preprocessing": "crop"}}
    first = Run.open(tmp_path / "run", CONFIG)
    first.start({"device": "test", "rewards": was})
    first.finish(first.prompts[0], [], {}, False, was)
    first.release()
    assert first.results()[0]["rewards"] == was
    again = Run.open(tmp_path / "run", CONFIG)
    again.start({"device": "test", "rewards": {**was, "contrast": {"id": "contrast"}}})
    again.release()
    with pytest.raises(ResumeError, match="was scored by another 'clip'"):
        again.start({"device": "test", "rewards": {"clip": {**was["clip"], "weights": ["bb"]}}})
    again.release()


def test_the_optimised_reward_may_not_change_before_there_is_a_score_either(tmp_path: Path) -> None:
    was, now = ({CONFIG.reward: {"id": "r", "weights": [weights]}} for weights in ("aa", "bb"))
    Run.open(tmp_path / "run", CONFIG).start({"rewards": was})
    with pytest.raises(ResumeError, match="was scored by another"):
        Run.open(tmp_path / "run", CONFIG).start({"rewards": now})


def test_what_has_scored_nothing_before_is_not_strange(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", CONFIG)
    run.start({"rewards": {"r": {"id": "r"}}})
    assert run.strange({"r": {"id": "r"}, "new": {"id": "new"}}) == []
    assert run.strange({"r": {"id": "other"}}) == ["r"]


def test_a_run_is_not_continued_on_a_backend_of_other_weights(tmp_path: Path) -> None:
    facts = {"rewards": {}, "dtype": "float32", "weights": "aa"}
    Run.open(tmp_path / "run", CONFIG).start(facts)
    again = Run.open(tmp_path / "run", CONFIG)
    with pytest.raises(ResumeError, match=r"drawn by a backend with other weights \(aa there, bb now\)"):
        again.start({**facts, "weights": "bb"})
    again.release()
    with pytest.raises(ResumeError, match="was drawn in float32, not float16"):
        again.start({**facts, "dtype": "float16", "weights": "bb"})
    again.release()
    for silent in ({"rewards": {}}, {**facts, "weights": None}):  # nothing speaks against these
        again.start(silent)
        again.release()


def test_what_is_held_out_is_read_off_the_reward(tmp_path: Path) -> None:
    """A run of an earlier version called the terms of a sum held out."""
    run = Run.open(tmp_path / "run", replace(CONFIG, reward="contrast+colorfulness", held_out=("clip",)))
    stored = [
        Score("ipgo", "a fox", 0, name, 1.0, name != run.config.reward) for name in ("contrast", "clip")
    ]
    run.finish(run.prompts[0], stored, {}, failed=False)
    assert {each.reward: each.held_out for each in run.scores()} == {"contrast": False, "clip": True}
