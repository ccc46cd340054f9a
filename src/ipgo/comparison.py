"""What is compared, and the folder that it is kept in."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from ipgo import files
from ipgo.artefacts import load_identities, load_scores
from ipgo.budget import LENGTH, Price, length_of
from ipgo.config import NOT_RESULTS, RunConfig
from ipgo.continuing import check_models, differences, with_judges_of
from ipgo.errors import InputError, IpgoError, ResumeError, unknown
from ipgo.evaluation import Score
from ipgo.prompts import check_prompts
from ipgo.settings import flatten, merge
from ipgo.store import LOCK, LOCKING, Run, left_over, unlockable

SCHEMA = 1
PLAN = "plan.json"
UNSEEN_PROMPTS = "unseen-prompts.jsonl"  # in the folder of an entry
LABEL = re.compile(r"[a-z0-9][a-z0-9._+-]{0,59}")
logger = logging.getLogger("ipgo")


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        prompts: what every entry is fitted to.
        common: the settings of every entry, as in `RunConfig.to_json`, but for prompts and method.
        entries: by label, what is an entry's own: {"method": {"name": ..., **settings}, **other settings}, and
            "length": the method's field that the budget sets, if that is not "ascent.steps".
        budget: weighted denoiser calls for each prompt (see docs/compare.md); None: each method's own
            length.
        price: what a differentiated call costs; None until it is measured.
        unseen_prompts: what shared entries are judged on besides `prompts`.
    """

    prompts: tuple[str, ...]
    common: Mapping[str, Any]
    entries: Mapping[str, Mapping[str, Any]]
    budget: int | None = None
    price: Price | None = None
    unseen_prompts: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise `InputError` for what cannot work, as far as that shows without a model."""
        if not self.entries:
            raise InputError("entries is empty; give at least one method")
        for label in self.entries:
            if not LABEL.fullmatch(label):
                raise InputError(
                    f"label {label!r} is not a name of up to 60 lower-case letters, digits and . _ + -, "
                    "the first a letter or digit"
                )
            config = self.config(label)
            if config.judged_prompts is not None:
                raise InputError(
                    f"entry {label!r}: judged_prompts is for `ipgo fit`; entries are judged on all prompts"
                )
            if config.reward != self.reward:
                raise InputError(
                    f"entry {label!r}: reward is {config.reward!r}; all entries optimise the comparison's, "
                    f"{self.reward!r} (name others in held_out)"
                )
            if config.method_name != "raw" and label == "raw":
                raise InputError("label 'raw' is reserved for the method raw")
            length = self.entries[label].get("length")
            if length is not None and length_of(config.method, str(length)) is None:
                raise InputError(
                    f"entry {label!r}: length is {length!r}; it must name a whole number of {config.method_name!r}"
                )
        if self.budget is not None and self.budget < 1:
            raise InputError(f"budget is {self.budget}; it must be at least 1")
        if self.unseen_prompts:
            check_prompts(self.unseen_prompts)
        both = [prompt for prompt in self.unseen_prompts if prompt in self.prompts]
        if both:
            raise InputError(f"prompt {both[0]!r} is fitted; unseen prompts must differ from the fitted ones")

    @property
    def reward(self) -> str:
        """The reward that all entries optimise."""
        return str(self.common["reward"])

    def config(self, label: str) -> RunConfig:
        """An entry's settings, before the budget sets how long it searches."""
        own = {key: value for key, value in self.entries[label].items() if key != "length"}
        try:
            return RunConfig.from_json({**merge(dict(self.common), own), "prompts": list(self.prompts)})
        except InputError as error:
            raise InputError(f"entry {label!r}: {error}") from None

    def length(self, label: str) -> str:
        """The field that says how long an entry's method searches."""
        return str(self.entries[label].get("length", LENGTH))

    def states_length(self, label: str) -> bool:
        """Was that length asked for?"""
        return self.length(label) in flatten(dict(self.entries[label].get("method", {})))

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples become the lists of a reader
        return plain

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Plan:
        """`InputError` if something is missing, or of another kind."""
        try:
            return cls(
                tuple(stored["prompts"]),
                dict(stored["common"]),
                {label: dict(own) for label, own in stored["entries"].items()},
                stored["budget"],
                Price(**stored["price"]) if stored["price"] is not None else None,
                tuple(stored["unseen_prompts"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"the plan of the comparison is damaged: {error!r}") from None

    def identity(self) -> dict[str, Any]:
        """What decides the results, flat."""
        settings = self.to_json()
        settings["common"] = _results(settings["common"])
        settings["entries"] = {label: _results(flatten(own)) for label, own in settings["entries"].items()}
        return flatten(settings)


def common_settings(config: RunConfig) -> dict[str, Any]:
    """What a plan's entries may have in common: all but prompts and method."""
    return {key: value for key, value in config.to_json().items() if key not in ("prompts", "method")}


def _results(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in NOT_RESULTS}


class Comparison:
    """The folder of a comparison.

    plan.json holds the plan; entries/LABEL/ is an ordinary run each (`Run`); failures.json says what went wrong,
    by label and prompt ("" is the entry as a whole).
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan = path, plan
        self._lock = FileLock(path / LOCK)

    @classmethod
    def open(cls, path: Path, plan: Plan | None = None) -> Comparison:
        """Look at a folder, and write nothing. Without `plan` it must hold a comparison; with it, it may.

        The entries of `plan` are added to those that are there.

        Raises:
            InputError: no comparison there, a folder full of other things, or a plan that cannot work.
            ResumeError: a comparison with another plan; the message lists the differences.
        """
        if plan is not None:
            plan.check()
        found = path / PLAN
        if not found.is_file():
            if plan is None:
                raise InputError(f"{str(path)!r} is not a comparison's folder: it has no {PLAN}")
            files.check_new(path, left_over)
            return cls(path, plan)
        stored = files.read_json(found, "plan")
        if stored.get("schema") != SCHEMA:
            raise ResumeError(
                f"{str(found)!r} has schema {stored.get('schema')}; this version reads {SCHEMA}"
            )
        there = Plan.from_json(stored["plan"])
        if plan is not None:
            _check_same(path, there, plan)
            # The machine's settings may change; what was measured stays.
            there = replace(plan, price=there.price, entries={**there.entries, **plan.entries})
        return cls(path, there)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While open, no other process changes plan and failures; what another has changed before is taken over."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except LOCKING as error:
            raise unlockable(self.path, error) from None
        try:
            self.plan = Comparison.open(self.path, self.plan).plan
            yield
        finally:
            self._lock.release()

    def start(self, plan: Plan, about: Mapping[str, Any]) -> None:
        """Make the folder; `about`: versions, device and models that it begins with."""
        try:
            files.write_json(self.path / PLAN, {"schema": SCHEMA, **about, "plan": plan.to_json()})
        except OSError as error:
            raise files.unwritable(self.path, error.strerror) from None
        self.plan = plan

    @property
    def started(self) -> bool:
        return (self.path / PLAN).is_file()

    @property
    def facts(self) -> dict[str, Any]:
        """What plan.json says besides the plan."""
        return {key: value for key, value in files.read_json(self.path / PLAN).items() if key != "plan"}

    def folder(self, label: str) -> Path:
        """Where an entry's run is; `InputError` for a label that is not compared."""
        if label not in self.plan.entries:
            raise unknown("entry", label, self.plan.entries)
        return self.path / "entries" / label

    def run(self, label: str) -> Run | None:
        """An entry's run, as far as it has got; None before its first step."""
        folder = self.folder(label)
        return Run.open(folder) if (folder / "run.json").is_file() else None

    def unseen_prompts(self, label: str) -> list[Score]:
        """An entry's scores on prompts that it was not fitted to; none if it was not judged on any."""
        return load_scores(self.folder(label) / UNSEEN_PROMPTS)

    def identities(self, label: str) -> list[dict[str, Any]]:
        """What decides an entry's scores, by reward: on what it was fitted to, and on unseen prompts."""
        run = self.run(label)
        return [
            run.identities if run is not None else {},
            load_identities(self.folder(label) / UNSEEN_PROMPTS),
        ]

    @property
    def scored(self) -> bool:
        """Has any entry a result?"""
        runs = (self.run(label) for label in self.plan.entries)
        return any(run is not None and any(map(run.done, run.prompts)) for run in runs)

    def going_on(self, now: Mapping[str, Any]) -> dict[str, Any]:
        """The facts to go on with: those there are; but until there is a score, a reward that only judges may change.

        Raises:
            ResumeError: the rest would be drawn or scored by other models; `now` as in `start`.
        """
        there = self.facts if self.scored else with_judges_of(self.facts, now, self.plan.reward)
        check_models(self.path, there, now)
        return there

    def failures(self) -> dict[str, dict[str, dict[str, str]]]:
        """By label and prompt ("" is the entry as a whole): the error in words, and its traceback."""
        file = self.path / "failures.json"
        return files.read_json(file) if file.is_file() else {}

    def fail(self, label: str, prompts: Sequence[str], error: Exception) -> None:
        """Remember what went wrong."""
        told = str(error) if isinstance(error, IpgoError) else f"{type(error).__name__}: {error}"
        logger.warning("%s failed%s: %s", label, f" on {prompts[0]!r}" if any(prompts) else "", told)
        trace = "".join(traceback.format_exception(error))
        with self.alone():
            failures = self.failures()
            failures.setdefault(label, {}).update(
                {each: {"error": told, "traceback": trace} for each in prompts}
            )
            files.write_json(self.path / "failures.json", failures)

    def forgive(self, label: str, prompts: Sequence[str]) -> None:
        """What failed before has worked now."""
        if label not in self.failures():
            return
        with self.alone():
            failures = self.failures()
            left = {each: error for each, error in failures.pop(label, {}).items() if each not in prompts}
            files.write_json(self.path / "failures.json", {**failures, **({label: left} if left else {})})

    def write(self, name: str, content: str) -> Path:
        """Put another file, such as comparison.html, into the folder."""
        files.write(self.path / name, content.encode(), alone=False)
        return self.path / name


def _check_same(path: Path, there: Plan, now: Plan) -> None:
    """Raise `ResumeError` if the plans differ in what decides the results of the entries that both have."""
    if now.price is None:  # measured when the comparison began
        there = replace(there, price=None)
    both = [label for label in now.entries if label in there.entries]
    there, now = (
        replace(plan, entries={label: plan.entries[label] for label in both}) for plan in (there, now)
    )
    before, after = there.identity(), now.identity()
    differing = differences(before, {**dict.fromkeys(before), **after})
    if differing:
        raise ResumeError(
            f"{str(path)!r} was made with another plan ({differing}); "
            "give the same one to continue it, or another folder"
        )
