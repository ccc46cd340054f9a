"""Fits in a thread of their own, and what there is to see of them at any moment. Knows nothing of the page."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from ipgo.adapters import Adapter
from ipgo.backends import Backend
from ipgo.config import RunConfig
from ipgo.errors import InputError, InUseError, IpgoError, Stopped, first_line
from ipgo.evaluation import Drawing, draw, score_drawings
from ipgo.images import to_pil
from ipgo.models import Models, check_loaded, with_rewards
from ipgo.preflight import check, check_method
from ipgo.prompts import slug
from ipgo.report import write_report
from ipgo.rewards import optimised
from ipgo.runner import exclusively, run
from ipgo.seeding import check_seeds
from ipgo.store import Run
from ipgo.task import Progress

BUSY = ("loading", "fitting", "drawing")  # stages in which the thread is at work
logger = logging.getLogger("ipgo")


@dataclass(frozen=True)
class View:
    """What there is to see of a fit.

    Attributes:
        stage: idle, one of `BUSY`, done, stopped or failed.
        said: why it failed.
        run: its folder; None before the first one.
        step, total: steps done, and to do in all; 0 before the first.
        left: seconds that the other steps will take, if all take as long; None before the first one of this start.
        over: as in `Progress`.
        rewards, best: of each step so far; None where unknown, or where a method keeps no best.
        raw: each reward's mean over the raw pictures, the judge's verdicts among them.
        gains: by reward, (step, mean change over `raw`) of the latest pictures.
        before, now: pictures by noise seed, when all is done those that are kept; None is noise that changes at every
            step, and has no picture before.
    """

    stage: str = "idle"
    said: str = ""
    run: Run | None = None
    step: int = 0
    total: int = 0
    left: float | None = None
    over: int = 1
    rewards: tuple[float | None, ...] = ()
    best: tuple[float | None, ...] = ()
    raw: Mapping[str, float] = field(default_factory=dict)
    gains: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    before: Mapping[int | None, Image.Image] = field(default_factory=dict)
    now: Mapping[int | None, Image.Image] = field(default_factory=dict)

    @property
    def busy(self) -> bool:
        """Is the thread at work?"""
        return self.stage in BUSY


class Live:
    """One fit at a time through one backend."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.view = View()
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._models: tuple[object, Models] | None = None

    def start(self, config: RunConfig, out: Path) -> None:
        """Begin to fit the one prompt of the settings, or go on with it, in the folder that `place` gives.

        Raises:
            InputError: settings that cannot work, or a fit is going on.
        """
        if len(config.prompts) != 1:
            raise InputError(f"prompts has {len(config.prompts)} entries; the studio fits one at a time")
        if self.view.busy:
            raise InUseError("a fit is going on; wait for it, or stop it")
        check(config, loaded=True)
        check_loaded(config, self.backend)
        folder = place(out, config)
        check_method(folder)
        self._stop.clear()
        self._show(View("loading", run=folder))
        self._thread = threading.Thread(target=self._work, args=(folder,), name="ipgo-fit", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask the fit to end after the step that it is at; the same settings go on from there."""
        self._stop.set()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the fit to end."""
        if self._thread is not None:
            self._thread.join(timeout)

    def after(self, seen: View, timeout: float) -> View:
        """The view, as soon as it is another one than `seen` or the time (in seconds) is over."""
        with self._changed:
            self._changed.wait_for(lambda: self.view is not seen, timeout)
            return self.view

    def draw(self, folder: Run, seeds: Sequence[int]) -> list[tuple[int, Image.Image, Image.Image]]:
        """A finished prompt's pictures before and after, from each seed.

        Raises:
            InputError: nothing is learned yet, or it belongs to its own noise. InUseError: a fit is going on.
        """
        check_seeds(tuple(seeds))
        if not seeds:
            raise InputError("seeds is empty; give at least one")
        if folder.transfers == "nothing":
            raise InputError(
                "what was learned belongs to the noise of its seed; on other noise it changes nothing"
            )
        config, prompt = folder.config, folder.prompts[0]
        adapter = folder.load_adapter(prompt)
        with exclusively(self.backend):
            adapters = {"before": Adapter(), "after": adapter.to(self.backend.device)}
            drawings = draw(self.backend, adapters, prompt.text, seeds, config.sampling)
            pictures = {(each.method, each.seed): to_pil(each.image[None])[0] for each in drawings}
        return [(seed, pictures["before", seed], pictures["after", seed]) for seed in seeds]

    def _show(self, view: View) -> None:
        with self._changed:
            self.view = view
            self._changed.notify_all()

    def _work(self, folder: Run) -> None:
        try:
            models = self._load(folder)
            if folder.pending():
                self._draw_raw(folder, models)
                run(folder, models, lambda search, _: self._watched(search, folder, models))
            write_report(folder)
            self._show(ended(self.view, folder))
        except Stopped:
            self._show(replace(self.view, stage="stopped"))
        except IpgoError as error:
            self._show(replace(self.view, stage="failed", said=str(error)))
        except Exception as error:  # the page must not wait for a thread that is gone
            logger.exception("the fit failed")
            self._show(replace(self.view, stage="failed", said=first_line(error)))

    def _load(self, folder: Run) -> Models:
        """Those of the fit before, if it had the same rewards."""
        config = folder.config
        key = config.reward, config.held_out
        if self._models is None or self._models[0] != key:
            self._models = None  # first: two sets of rewards may be more than the memory holds
            self._models = key, with_rewards(config, self.backend)
        return self._models[1]

    def _draw_raw(self, folder: Run, models: Models) -> None:
        """The raw prompt's pictures as the fit draws them, which may be in fewer steps than the results."""
        config = folder.config
        sampling = config.sampling.for_fit(models.backend)
        drawings = list(draw(models.backend, {"raw": Adapter()}, config.prompts[0], config.seeds, sampling))
        pictures: dict[int | None, Image.Image] = {
            each.seed: to_pil(each.image[None])[0] for each in drawings
        }
        raw = means(folder, models, drawings) if drawings else {}
        self._show(replace(self.view, stage="fitting", before=pictures, raw=raw))

    def _watched(self, search: Iterator[Progress], folder: Run, models: Models) -> Iterator[Progress]:
        """The search, shown step by step, until somebody stops it."""
        config, latest, began = folder.config, dict[int | None, Drawing](), time.monotonic()
        with contextlib.closing(search):  # type: ignore[type-var]  # the generator of `Method.fit`
            for here, progress in enumerate(search, 1):
                seed = seed_of(progress, config.seeds)
                if progress.images is not None:
                    latest[seed] = Drawing("now", config.prompts[0], seed or 0, progress.images[0].float())
                left = (time.monotonic() - began) / here * (progress.total - progress.step)
                self._show(replace(self._stepped(progress, folder, models, latest), left=left))
                yield progress
                if self._stop.is_set() and progress.step < progress.total:
                    raise Stopped("the fit was stopped")

    def _stepped(
        self, progress: Progress, folder: Run, models: Models, latest: Mapping[int | None, Drawing]
    ) -> View:
        """The view after one more step; held-out rewards are taken once in a round of the seeds."""
        view, config = self.view, folder.config
        rewards, best = view.rewards, view.best
        if not rewards:  # a run that is continued: the steps before
            lines = folder.history(folder.prompts[0])[: progress.step - 1]
            rewards = tuple(line["reward"] for line in lines)
            best = tuple(line["best"] for line in lines)
        gains = dict(view.gains)
        complete = progress.step % len(latest) == 0 if latest else False
        if complete and len(latest) >= min(progress.over, len(config.seeds)):
            for name, value in means(folder, models, list(latest.values())).items():
                if name in view.raw:
                    gains[name] = (*gains.get(name, ()), (progress.step, value - view.raw[name]))
        last = progress.step == progress.total or bool(progress.failed.all())
        return replace(
            view,
            stage="drawing" if last else "fitting",
            step=progress.step,
            total=progress.total,
            over=progress.over,
            rewards=(*rewards, known(float(progress.rewards[0]))),
            best=(*best, known(float(progress.best[0])) if progress.keeps_best else None),
            gains=gains,
            now={seed: to_pil(each.image[None])[0] for seed, each in latest.items()},
        )


def ended(view: View, folder: Run) -> View:
    """A finished run, with the pictures that it keeps: those of the best step, drawn in all steps."""
    prompt, seeds = folder.prompts[0], folder.config.seeds or folder.config.new_seeds
    lines = folder.history(prompt)
    failed = any(result["status"] == "failed" for result in folder.results())
    before, after = (folder.pictures(prompt, when) for when in ("before", "after"))
    return replace(
        view,
        stage="failed" if failed else "done",
        said="the reward or its gradient was not finite" if failed else "",
        step=len(lines),
        total=len(lines),
        over=lines[-1]["over"] if lines else 1,
        rewards=tuple(line["reward"] for line in lines),
        best=tuple(line["best"] for line in lines),
        before={seed: before[seed] for seed in seeds if seed in before},
        now={seed: after[seed] for seed in seeds if seed in after},
    )


def known(value: float) -> float | None:
    """A number, or None for one that is not finite."""
    return value if abs(value) < float("inf") else None


def means(folder: Run, models: Models, drawings: Sequence[Drawing]) -> dict[str, float]:
    """Each reward's mean over some pictures of a prompt, with the judge's verdicts."""
    own = optimised(folder.config.reward, models.identities)
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for each in score_drawings(drawings, models.rewards, own, models.judge):
        sums[each.reward] += each.value  # type: ignore[assignment]
        counts[each.reward] += 1
    return {name: sums[name] / counts[name] for name in sums}


def seed_of(progress: Progress, seeds: Sequence[int]) -> int | None:
    """The noise that a step's picture was drawn from; None where noise changes at every step."""
    if progress.over == 1 and seeds:  # every step draws all of them, the last one last
        return seeds[-1]
    if progress.over == len(seeds):
        return seeds[(progress.step - 1) % len(seeds)]
    return None


def place(out: Path, config: RunConfig) -> Run:
    """The first of NAME, NAME-2, ... that is free, or holds a run of these settings.

    Args:
        out: the folder of the runs; NAME comes from the prompt.
    """
    name = slug(config.prompts[0]) or "run"
    for number in range(1, 10_000):
        path = out / (name if number == 1 else f"{name}-{number}")
        try:
            return Run.open(path, config)
        except InputError:
            if not path.exists():  # so it is not because of what is there
                raise
    raise InputError(f"{str(out)!r} is full: there is a {name}-{number}")
