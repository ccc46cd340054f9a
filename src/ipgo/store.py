"""The folder of one run, in safetensors and JSON."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image

from ipgo import files
from ipgo.adapters import ADAPTERS, Adapter, stack
from ipgo.artefacts import (
    adapter_facts,
    load_adapter,
    load_drawn_by,
    load_identities,
    load_scores,
    save_adapter,
    save_scores,
)
from ipgo.chunks import Checkpoint, Chunk, Cost, read_checkpoint, write_checkpoint
from ipgo.config import RunConfig
from ipgo.continuing import check_models, differences, differing_in, with_judges_of
from ipgo.errors import InputError, InUseError, ResumeError
from ipgo.evaluation import Score
from ipgo.images import StoredImages, as_png
from ipgo.prompts import Prompt, number, slug
from ipgo.rewards import optimised
from ipgo.rewards.checkpoints import fingerprint
from ipgo.task import Progress

SCHEMA = 1
LOCK, CLAIMS = ".lock", "claims"
ANSWERS = "answers"  # of rewards that ask a program or a person, as long as the run goes on
LOCKING = (OSError, NotImplementedError)  # the second: of a file system that has no locks
DRAWN_BY = (
    "dtype",
    "schedule",
    "weights",
    "guidance_scale",
)  # `Backend.identity`, and the backend's own scale
EVALUATION = "evaluation.jsonl"  # what a finished run was judged on later


class Run:
    """The folder of one run.

    run.json holds the settings; prompts/ID/ an adapter, its history, images and result.json, which is written
    last and marks the prompt as done; shared/ the adapter and history of a prompt-batch run; chunks/ the
    checkpoints of unfinished work, answers/ those of programs and people; claims/ the locks of the prompts that
    processes are at.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config
        self.prompts = number(config.prompts)
        count = min(config.judged_prompts or len(self.prompts), len(self.prompts))
        self.judged = tuple(self.prompts[place * len(self.prompts) // count] for place in range(count))
        self._judged = set(self.judged)
        self._claims: dict[str, FileLock] = {}
        self._made: list[Path] = []  # folders, for claims
        self._begun = False
        self._read: tuple[tuple[int, int], dict[str, Any]] = (0, 0), {}

    @classmethod
    def open(cls, path: str | Path, config: RunConfig | None = None) -> Run:
        """Look at a folder, and write nothing. Without `config` it must hold a run; with it, it may.

        Raises:
            InputError: no run there, or a folder full of other things.
            ResumeError: a run with other settings; the message lists them.
        """
        path = files.place("run", path)
        found = path / "run.json"
        if not found.is_file():
            if config is None:
                files.check_folder(path, "a run")
                raise InputError(f"{str(path)!r} is not a run folder: it has no run.json{_instead(path)}")
            try:
                files.check_new(path, left_over)
            except InputError:
                if not found.is_file():  # or another process has just begun it
                    raise
            else:
                return cls(path, config)
        stored = files.read_json(found, "config")
        if not isinstance(stored["config"], dict):
            raise InputError(f"{str(found)!r} is damaged: its settings are {stored['config']!r}")
        if stored.get("schema") != SCHEMA:
            raise ResumeError(
                f"{str(found)!r} has schema {stored.get('schema')}; this version reads {SCHEMA}"
            )
        try:  # settings that it did not have yet are at their defaults
            there = RunConfig.from_json(stored["config"])
        except InputError as error:
            raise InputError(f"{str(found)!r} has settings that this version cannot take: {error}") from None
        if config is None:
            return cls(path, there)
        _check_settings(path, there, config)
        return cls(path, config)

    def start(self, facts: Mapping[str, Any]) -> None:
        """Begin the run, or go on with it beside the processes that are at it already.

        Args:
            facts: the versions, the device and the models that the run begins with.

        Raises:
            ResumeError: it was begun with other models or settings. InputError: it cannot be written.
        """
        if self._begun:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.alone():  # another process may begin it at the same time
                if self.begun:
                    self._continue(facts)
                else:
                    about = {"schema": SCHEMA, "digest": self.config.digest(), **facts}
                    files.write_json(self.path / "run.json", {**about, "config": self.config.to_json()})
        except LOCKING as error:
            raise unlockable(self.path, error) from None
        self._begun = True

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While open, no other process begins or ends the run."""
        with FileLock(self.path / LOCK):
            yield

    # -- who works on what ------------------------------------------------------------------------------

    def claimed(self, tried: set[Chunk] | None = None) -> Iterator[Chunk]:
        """The pending chunks that no other process is at, each once, and claimed until the next is asked for.

        Those that another process was at are looked at again in the end: it may have died.

        Args:
            tried: those to leave out; the others are added as they come.
        """
        tried, found = set() if tried is None else tried, True
        while found:
            found = False
            for chunk in self.pending():
                if chunk not in tried and self.claim(chunk):
                    tried.add(chunk)
                    try:
                        if self._open(chunk):  # another process may just have finished it
                            found = True
                            yield chunk
                    finally:
                        self._let_go(chunk)

    def claim(self, chunk: Chunk) -> bool:
        """Keep other processes off the chunk's prompts; False if one of them is at one already.

        A claim ends with the process, however that ends, if not before.

        Raises:
            InputError: the folder cannot be written.
        """
        new = contextlib.ExitStack()  # which lets go of what it has, whatever happens
        with new:
            try:
                self._make(self.path / CLAIMS)
                names = [name for name in self._names(chunk) if name not in self._claims]
                locks = {name: FileLock(self.path / CLAIMS / f"{name}{LOCK}") for name in names}
                for lock in locks.values():
                    new.enter_context(lock.acquire(timeout=0))
            except Timeout:
                return False
            except LOCKING as error:
                raise unlockable(self.path, error) from None
            new.pop_all()
        self._claims |= locks
        return True

    def _let_go(self, chunk: Chunk) -> None:
        for name in self._names(chunk):
            if name in self._claims:
                self._claims.pop(name).release()

    def _names(self, chunk: Chunk) -> list[str]:
        """What is claimed of a chunk: each prompt by itself, since another process may cut them otherwise."""
        return ["shared"] if self.config.shared else [prompt.id for prompt in chunk.prompts]

    def _make(self, folder: Path) -> None:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made += reversed(missing)

    def _others(self) -> bool:
        """Is another process at any prompt?"""
        theirs = (file for file in (self.path / CLAIMS).glob(f"*{LOCK}") if file.stem not in self._claims)
        for file in theirs:
            try:
                with FileLock(file, timeout=0):
                    pass
            except Timeout:
                return True
        return False

    def _continue(self, facts: Mapping[str, Any]) -> None:
        """Refuse other models; but a reward that only judges may be repaired as long as it has scored nothing."""
        there = self.facts
        # Again: another process may have begun it since it was opened.
        _check_settings(self.path, RunConfig.from_json(there["config"]), self.config)
        if not any(map(self.done, self.prompts)) and not self._others():
            there = with_judges_of(there, facts, self.config.reward)
        check_models(self.path, there, facts)
        if there != self.facts:
            files.write_json(self.path / "run.json", there)

    @property
    def begun(self) -> bool:
        """Has a step been recorded here, by this process or another?"""
        return (self.path / "run.json").is_file()

    @property
    def identities(self) -> dict[str, Any]:
        """What decides the scores, by reward: as they were when the run began; {} before."""
        file = self.path / "run.json"
        if not file.is_file():
            return {}
        about = file.stat()
        version = about.st_mtime_ns, about.st_size
        if version != self._read[0]:  # the file holds all prompts, and is asked for once for each
            self._read = version, self.facts.get("rewards", {})
        return self._read[1]

    def strange(self, identities: Mapping[str, Any]) -> list[str]:
        """The rewards among these that differ from those that scored the run under their names."""
        known = self.identities
        return [name for name, own in identities.items() if known.get(name, own) != own]

    def in_use(self) -> InUseError:
        """The error where nothing is left to do for this process."""
        return InUseError(f"{str(self.path)!r} is in use: another process is working on this run")

    def release(self) -> None:
        """End all claims of this process; a run that was never begun leaves nothing behind."""
        for lock in self._claims.values():
            lock.release()
        if self._made and not self.begun:
            for file in (self.path / CLAIMS).glob(f"*{LOCK}"):
                # OSError: Windows does not delete an open file.
                with contextlib.suppress(Timeout, OSError), FileLock(file, timeout=0):
                    file.unlink()
            for folder in reversed(self._made):
                with contextlib.suppress(OSError):  # another process is at it
                    folder.rmdir()
        self._claims, self._made, self._begun = {}, [], False

    @property
    def facts(self) -> dict[str, Any]:
        """What run.json says."""
        return files.read_json(self.path / "run.json")

    @property
    def dtype(self) -> str | None:
        """The format that it was begun in; None before that."""
        return self.facts.get("dtype") if self.begun else None

    # -- where things are -------------------------------------------------------------------------------

    def folder(self, prompt: Prompt) -> Path:
        """The folder of a prompt's images and result."""
        return self.path / "prompts" / prompt.id

    def image_file(self, prompt: Prompt, when: str, seed: int) -> Path:
        """The file of an image; `when` is before or after."""
        return self.folder(prompt) / f"{when}-{seed}.png"

    def adapter_folder(self, prompt: Prompt) -> Path:
        """The folder of a prompt's adapter and history; shared: the one of all prompts."""
        return self.path / "shared" if self.config.shared else self.folder(prompt)

    def _histories(self, chunk: Chunk) -> dict[int, Path]:
        """The history files of a chunk's unfinished prompts by their rows; shared: the one of row 0."""
        if self.config.shared:
            return {0: self.path / "shared" / "history.jsonl"}
        rows = {row: prompt for row, prompt in enumerate(chunk.prompts) if not self.done(prompt)}
        return {row: self.folder(prompt) / "history.jsonl" for row, prompt in rows.items()}

    def _checkpoint_file(self, chunk: Chunk) -> Path:
        return self.path / "chunks" / f"{chunk.key}.safetensors"

    # -- what is left to do -----------------------------------------------------------------------------

    def chunks(self) -> list[Chunk]:
        """All prompts, cut in their order: all together if shared, single if the method cannot stack them."""
        stacked = self.config.chunk if self.config.method.stackable else 1
        size = len(self.prompts) if self.config.shared else stacked
        return [Chunk(self.prompts[start : start + size]) for start in range(0, len(self.prompts), size)]

    @property
    def left(self) -> int:
        """How many prompts are to have a result, and have none."""
        return sum(not self.done(prompt) for prompt in self.judged)

    def done(self, prompt: Prompt) -> bool:
        """Has the prompt a result, finished or failed?"""
        return (self.folder(prompt) / "result.json").is_file()

    @property
    def finished(self) -> tuple[Prompt, ...]:
        """The prompts that have a result, in their order."""
        return tuple(filter(self.done, self.prompts))

    def pending(self) -> list[Chunk]:
        """The chunks with a prompt that has no result and is to have one."""
        return list(filter(self._open, self.chunks()))

    def _open(self, chunk: Chunk) -> bool:
        """Is a prompt of it to have a result, and has none?"""
        return any(not self.done(prompt) for prompt in chunk.prompts if prompt in self._judged)

    # -- while a chunk is fitted ------------------------------------------------------------------------

    def record(self, chunk: Chunk, progress: Progress, cost: Cost) -> None:
        """Append a line to the history of each prompt (shared: one line, the mean over prompts).

        `over` and `best` are as in `Progress`, `best` null if it is not kept. Its calls are one prompt's share of those
        so far, its seconds are the chunk's.
        """
        numbers = progress.numbers(self.config.shared)
        share = len(chunk.prompts)
        calls = {name: round(count / share, 2) for name, count in sorted(cost.calls.items())}
        for row, file in self._histories(chunk).items():
            line = {"step": progress.step, **numbers[row], "over": progress.over}
            files.append_line(file, {**line, "seconds": round(cost.seconds, 3), "calls": calls})

    def save_checkpoint(self, chunk: Chunk, progress: Progress, cost: Cost) -> None:
        """All that `checkpoint` needs. The histories go to the disk before it, so they never lag behind."""
        for file in self._histories(chunk).values():
            files.sync(file)
        write_checkpoint(self._checkpoint_file(chunk), chunk, self.config.digest(), progress, cost)

    def checkpoint(self, chunk: Chunk) -> Checkpoint | None:
        """The newest state of a chunk, with its histories cut back to that step; None if there is none.

        A damaged file is set aside under another name and said to be: the chunk then starts again.

        Raises:
            InUseError: another process is writing them.
        """
        if not self.claim(chunk):
            raise self.in_use()
        file = self._checkpoint_file(chunk)
        found = read_checkpoint(file, chunk, self.config.digest()) if file.is_file() else None
        histories = self._histories(chunk).values()
        # One that another cutting of the prompts has begun anew lags behind: this checkpoint is older than that.
        if found is not None and any(_steps(history) < found.step for history in histories):
            found = None
        for history in histories:
            _cut(history, found.step if found is not None else 0)
        return found

    def drop_checkpoint(self, chunk: Chunk) -> None:
        """Delete a chunk's checkpoint, if there is one."""
        self._checkpoint_file(chunk).unlink(missing_ok=True)

    # -- when a chunk is done ---------------------------------------------------------------------------

    def save_adapter(self, prompt: Prompt, adapter: Adapter) -> None:
        """Put a prompt's adapter (or the shared one) into its folder, with the settings it was made under."""
        settings = self.config.to_json()
        keys = ("backend", "sampling", "padding", "scheduler", "image_size", "long_prompts", "dtype")
        made_under = {key: settings[key] for key in keys}
        save_adapter(adapter, self.adapter_folder(prompt), made_under, self.drawn_by)

    @property
    def drawn_by(self) -> dict[str, Any]:
        """What was behind the backend's name: its identity and its own guidance scale; {} before the first step."""
        facts = self.facts if self.begun else {}
        return {key: value for key, value in facts.items() if key in DRAWN_BY}

    @property
    def transfers(self) -> str | None:
        """What is learned here serves, as `Adapter.transfers`; None before a prompt is finished."""
        done = next(filter(self.done, self.prompts), None)
        return None if done is None else ADAPTERS[adapter_facts(self.adapter_folder(done))["kind"]].transfers

    def load_adapter(self, prompt: Prompt) -> Adapter:
        """A prompt's adapter, or the shared one; `InputError` if there is none yet."""
        return load_adapter(self.adapter_folder(prompt))

    @property
    def with_adapters(self) -> tuple[Prompt, ...]:
        """The finished prompts; shared: the first, since its adapter is that of all.

        Raises:
            InputError: no prompt is finished.
        """
        found = self.finished
        if not found:
            raise InputError(f"run {str(self.path)!r} has no finished prompt yet")
        return found[:1] if self.config.shared else found

    def whole_adapter(self) -> tuple[Adapter, dict[str, Any]]:
        """What was learned so far as one adapter, and the backend settings that it was made under.

        Raises:
            InputError: no prompt is finished.
        """
        some = self.with_adapters
        adapters = [self.load_adapter(prompt) for prompt in some]
        settings = dict(adapter_facts(self.adapter_folder(some[0]))["settings"])
        return (adapters[0] if adapters[0].prompts is None else stack(adapters)), settings

    def save_image(self, prompt: Prompt, when: str, seed: int, image: Image.Image) -> None:
        """Store an image as PNG; `when` is before or after."""
        files.write(self.image_file(prompt, when, seed), as_png(image))

    def images(self, prompt: Prompt, when: str) -> StoredImages:
        """The stored images by seed; `when` is before or after."""
        found = {seed: self.image_file(prompt, when, seed) for seed in self.config.judged_seeds}
        return StoredImages({seed: file for seed, file in found.items() if file.is_file()})

    def copy_image(self, other: Run, prompt: Prompt, when: str, seed: int) -> None:
        """Take over an image that another run has drawn."""
        files.write(self.image_file(prompt, when, seed), other.image_file(prompt, when, seed).read_bytes())

    def finish(
        self,
        prompt: Prompt,
        scores: Sequence[Score],
        cost: Mapping[str, Any],
        failed: bool,
        rewards: Mapping[str, Any] | None = None,
        *,
        truncated: bool = False,
    ) -> None:
        """Write result.json: from here on the prompt is done.

        Args:
            rewards: the identities behind the scores.
            truncated: did an encoder take only the beginning of the prompt?
        """
        result = {
            "status": "failed" if failed else "finished",
            "id": prompt.id,
            "prompt": prompt.text,
            "truncated": truncated,
            "reward": self.config.reward,
            "seeds": list(self.config.seeds),
            "unseen_seeds": list(self.config.new_seeds),
            "cost": cost,
            "rewards": dict(rewards or {}),
            "scores": [asdict(each) for each in scores],
        }
        files.write_json(self.folder(prompt) / "result.json", result)

    def result(self, prompt: Prompt) -> dict[str, Any] | None:
        """A prompt's result.json; None if it is not done."""
        file = self.folder(prompt) / "result.json"
        return files.read_json(file, "prompt", "scores", "cost", "status") if self.done(prompt) else None

    def results(self) -> list[dict[str, Any]]:
        """The result.json of every prompt that has one, in the order of the prompts."""
        return [found for prompt in self.prompts if (found := self.result(prompt)) is not None]

    def scores(self) -> list[Score]:
        """The scores of all results."""
        return self.with_held_out(Score.read(each) for result in self.results() for each in result["scores"])

    def scores_of(self, result: Mapping[str, Any]) -> list[Score]:
        """The scores of a result.json."""
        return self.with_held_out([Score.read(each) for each in result["scores"]])

    def with_held_out(self, scores: Iterable[Score]) -> list[Score]:
        """Scores of this run's images, with what is held out as it is said now: it may have been written otherwise."""
        known = {**load_identities(self.path / EVALUATION), **self.identities}
        own = optimised(self.config.reward, known)
        return [replace(each, held_out=each.reward not in own) for each in scores]

    def judge_again(
        self, scores: Sequence[Score], rewards: Mapping[str, Any], drawn_by: Mapping[str, Any]
    ) -> None:
        """Add scores of a later evaluation to those of earlier ones.

        Earlier scores of another reward of the same name are set aside, in a file named for its fingerprint. So are
        those of images that another backend (`drawn_by` is the identity of this one) has drawn; they come back with it.
        """
        file = self.path / EVALUATION
        with FileLock(self.path / ".evaluation.lock"):  # two evaluations may end together
            before = load_drawn_by(file) or drawn_by
            if differing_in(before, drawn_by) is not None:
                file.replace(_set_aside(file, before))
            if (
                not file.is_file() and _set_aside(file, drawn_by).is_file()
            ):  # also after a kill between the two
                _set_aside(file, drawn_by).replace(file)
            known = load_identities(file)
            earlier = load_scores(file)
            other = {name for name in known.keys() & rewards.keys() if known[name] != rewards[name]}
            kept = [each for each in earlier if each.reward not in other]
            # In the order they came in, which intervals depend on.
            found = {(s.method, s.prompt, s.seed, s.reward): s for s in (*kept, *scores)}
            for name in other:
                aside = file.with_stem(f"{file.stem}-{slug(name)}-{fingerprint(known[name])}")
                old = [*load_scores(aside), *(each for each in earlier if each.reward == name)]
                save_scores(aside, old, {name: known[name]}, drawn_by)
            save_scores(file, found.values(), {**known, **rewards}, drawn_by)

    def close(self) -> None:
        """When all is done, and `alone`: collect the scores in scores.jsonl, and drop what was only for continuing."""
        save_scores(self.path / "scores.jsonl", self.scores(), self.identities)
        for name in ("chunks", ANSWERS, CLAIMS):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def history(self, prompt: Prompt) -> list[dict[str, Any]]:
        """The lines of a prompt's history (the shared one, if it is shared)."""
        return files.read_lines(self.adapter_folder(prompt) / "history.jsonl")

    def write(self, name: str, content: str | bytes) -> Path:
        """Put another file, such as report.html, into the folder."""
        files.write(self.path / name, content.encode() if isinstance(content, str) else content, alone=False)
        return self.path / name


def _instead(path: Path) -> str:
    """Where the run is, in a folder that is known."""
    if (path / "plan.json").is_file():
        return f"; it is a comparison's, whose runs are in {path / 'entries'}"
    run = next((each for each in path.absolute().parents[:2] if (each / "run.json").is_file()), None)
    return "" if run is None else f"; it is part of the run {run}"


def _check_settings(path: Path, there: RunConfig, now: RunConfig) -> None:
    """Raise `ResumeError` for a run with other settings."""
    differing = differences(there.identity(), now.identity())
    if differing:
        raise ResumeError(
            f"{str(path)!r} was made with other settings ({differing}); "
            "give the same ones to continue it, or another folder"
        )


def _set_aside(file: Path, drawn_by: Mapping[str, Any]) -> Path:
    """Where an evaluation stays while another backend draws."""
    parts = (str(drawn_by[key]) for key in ("weights", "dtype", "schedule") if drawn_by.get(key))
    return file.with_stem("-".join([file.stem, *parts]))


def unlockable(path: Path, error: Exception) -> InputError:
    """For one of `LOCKING`."""
    return files.unwritable(path, getattr(error, "strerror", None) or str(error))


def left_over(file: Path) -> bool:
    """Does a start that was cut short leave such a file behind?"""
    return file.suffix == ".draft" or file.name in (LOCK, CLAIMS, ANSWERS)


def _steps(history: Path) -> int:
    """How many steps it holds without a gap."""
    lines = files.read_lines(history) if history.is_file() else []
    return next((place for place, line in enumerate(lines) if line.get("step") != place + 1), len(lines))


def _cut(history: Path, step: int) -> None:
    """Drop the lines after `step`, and one that a kill left half-written."""
    if history.is_file():
        files.write_lines(history, files.read_lines(history)[: min(step, _steps(history))])
