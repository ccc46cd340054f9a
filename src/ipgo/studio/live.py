"""Fits in a thread of their own, and what there is to see of them at any moment. Knows nothing of the page."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ipgo.adapters import Adapter
from ipgo.backends import Backend
from ipgo.backends.facts import Opening
from ipgo.config import RunConfig
from ipgo.continuing import differences, differing_in
from ipgo.errors import InputError, InUseError, IpgoError, ResumeError, Stopped, first_line
from ipgo.evaluation import Drawing, draw, score_drawings
from ipgo.images import to_pil
from ipgo.models import Models, check_loaded, judging_rewards, with_rewards
from ipgo.preflight import check, check_method
from ipgo.prompts import slug
from ipgo.report import write_report
from ipgo.report.build import as_uri
from ipgo.rewards import REWARDS, optimised, terms
from ipgo.runner import run
from ipgo.seeding import check_seeds
from ipgo.store import Run
from ipgo.task import Progress

BUSY = ("loading", "fitting", "drawing")  # stages in which the thread is at work
logger = logging.getLogger("ipgo")


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture, of which a page needs the text many times."""

    image: Image.Image

    @functools.cached_property
    def uri(self) -> str:
        """As a data URI."""
        return as_uri(self.image)


Pictures = Mapping[int | None, Picture]


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
        raw: the optimised reward's mean over the raw pictures; None if there are none.
        gains: by what is not optimised, (step, mean change of the latest pictures over the raw ones of their seeds).
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
    raw: float | None = None
    gains: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    before: Pictures = field(default_factory=dict)
    now: Pictures = field(default_factory=dict)

    @property
    def busy(self) -> bool:
        """Is the thread at work?"""
        return self.stage in BUSY


class Live:
    """One fit at a time through one backend."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.view = View()
        self._using = threading.Lock()  # the backend, to fit or to draw
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._models: tuple[object, Models] | None = None

    def start(self, config: RunConfig, out: Path) -> None:
        """Begin to fit the one prompt of the settings, or go on with it, in one of `places`.

        Raises:
            InputError: settings that cannot work. InUseError: something else is going on.
        """
        if len(config.prompts) != 1:
            raise InputError(f"prompts has {len(config.prompts)} entries; the studio fits one at a time")
        self._use()
        try:
            check(config, loaded=True)
            check_loaded(config, self.backend)
            found = places(out, config)
            folder = next(found)
            check_method(folder)
            self._stop.clear()
            self.show(View("loading", run=folder))
            self._thread = threading.Thread(
                target=self._work, args=(folder, found), name="ipgo-fit", daemon=True
            )
            self._thread.start()
        except BaseException:
            self._using.release()
            raise

    def stop(self) -> None:
        """Ask the fit to end after the step that it is at; the same settings go on from there."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """Was it asked to?"""
        return self._stop.is_set()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the fit to end."""
        if self._thread is not None:
            self._thread.join(timeout)

    def after(self, seen: View, timeout: float) -> View:
        """The view, as soon as it is another one than `seen` or the time (in seconds) is over."""
        with self._changed:
            self._changed.wait_for(lambda: self.view is not seen, timeout)
            return self.view

    def show(self, view: View) -> None:
        """Let it be seen."""
        with self._changed:
            self.view = view
            self._changed.notify_all()

    def draw(self, folder: Run, seeds: Sequence[int]) -> list[tuple[int, Picture, Picture]]:
        """A finished prompt's pictures before and after, from each seed.

        Raises:
            InputError: nothing is learned yet, it belongs to its own noise, or another backend drew it, or one that was
                opened with other settings.
            InUseError: something else is going on.
        """
        check_seeds(tuple(seeds))
        if not seeds:
            raise InputError("seeds is empty; give at least one")
        if folder.transfers == "nothing":
            raise InputError(
                "what was learned belongs to the noise of its seed; on other noise it changes nothing"
            )
        differing = differing_in(folder.drawn_by, self.backend.identity)
        if differing is not None:
            raise InputError(
                f"{folder.path.name!r} was fitted on a backend of another {differing}; start the studio with that one"
            )
        otherwise = differences(_drawing(folder.config.opening), _drawing(self.backend.opening))
        if otherwise:
            raise InputError(
                f"{folder.path.name!r} was fitted on a backend that is opened otherwise ({otherwise}); start the "
                "studio with the same settings, or use ipgo generate"
            )
        prompt, sampling = folder.prompts[0], folder.config.sampling
        adapter = folder.load_adapter(prompt)
        self._use()
        try:
            adapters = {"before": Adapter(), "after": adapter.to(self.backend.device)}
            drawings = draw(self.backend, adapters, prompt.text, seeds, sampling)
            pictures = {(each.method, each.seed): picture(each) for each in drawings}
        finally:
            self._using.release()
        return [(seed, pictures["before", seed], pictures["after", seed]) for seed in seeds]

    def _use(self) -> None:
        if not self._using.acquire(blocking=False):
            raise InUseError("a fit or a drawing is going on; wait for it, or stop it")

    def _work(self, folder: Run, others: Iterator[Run]) -> None:
        try:
            models = self._load(folder.config)
            while True:
                try:
                    self._fit(folder, models)
                    break
                except InUseError:
                    raise
                except ResumeError:  # the same settings with other models, such as a reward that was edited
                    folder = next(others)
                    self.show(View("loading", run=folder))
            write_report(folder)
            self.show(ended(self.view, folder))
        except Stopped:
            self.show(replace(self.view, stage="stopped"))
        except IpgoError as error:
            self.show(replace(self.view, stage="failed", said=str(error)))
        except (Exception, SystemExit) as error:  # the page must not wait for a thread that is gone
            logger.exception("the fit failed")
            self.show(replace(self.view, stage="failed", said=first_line(error)))
        finally:
            self._using.release()

    def _load(self, config: RunConfig) -> Models:
        """Those of the fit before if it had the same rewards, and these cannot change meanwhile."""
        names = (config.reward, *judging_rewards(config))
        fixed = all(name in REWARDS for each in names for _, name in terms(each))
        if self._models is None or self._models[0] != names or not fixed:
            self._models = None  # first: two sets of rewards may be more than the memory holds
            self._models = names, with_rewards(config, self.backend)
        return self._models[1]

    def _fit(self, folder: Run, models: Models) -> None:
        watch = _Watch(self, folder, models)
        if folder.pending():
            watch.draw_raw()
        if run(folder, models, lambda search, *_: watch.steps(search)):
            raise folder.in_use()


class _Watch:
    """One fit as it is seen."""

    def __init__(self, live: Live, folder: Run, models: Models) -> None:
        self.live, self.folder, self.models = live, folder, models
        self.raw: Mapping[str, Mapping[int, float]] = {}
        self.latest: dict[int | None, tuple[Drawing, Picture]] = {}

    def draw_raw(self) -> None:
        """The raw prompt's pictures as the fit draws them, which may be in fewer steps than the results."""
        config, backend = self.folder.config, self.models.backend
        sampling = config.sampling.for_fit(backend)
        drawings = list(draw(backend, {"raw": Adapter()}, config.prompts[0], config.seeds, sampling))
        self.raw = self._scores(drawings)
        own = self.raw.get(config.reward)
        self.live.show(
            replace(
                self.live.view,
                stage="fitting",
                before={each.seed: picture(each) for each in drawings},
                raw=sum(own.values()) / len(own) if own else None,
            )
        )

    def steps(self, search: Iterator[Progress]) -> Iterator[Progress]:
        """The search, shown step by step, until somebody stops it."""
        config, began = self.folder.config, time.monotonic()
        cycles = config.method.ascent is not None
        with contextlib.closing(search):  # type: ignore[type-var]  # the generator of `Method.fit`
            for here, progress in enumerate(search, 1):
                seed = seed_of(progress, config.seeds, cycles)
                if progress.images is not None:
                    drawing = Drawing("now", config.prompts[0], seed or 0, progress.images[0].float())
                    self.latest[seed] = drawing, picture(drawing)
                left = (time.monotonic() - began) / here * (progress.total - progress.step)
                self.live.show(self._stepped(progress, left))
                yield progress
                if self.live.stopping and progress.step < progress.total:
                    raise Stopped("the fit was stopped")

    def _stepped(self, progress: Progress, left: float) -> View:
        """The view after one more step."""
        view = self.live.view
        rewards, best = view.rewards, view.best
        if not rewards:  # a run that is continued: the steps before
            lines = self.folder.history(self.folder.prompts[0])[: progress.step - 1]
            rewards, best = (tuple(line[name] for line in lines) for name in ("reward", "best"))
        last = progress.step == progress.total or bool(progress.failed.all())
        return replace(
            view,
            stage="drawing" if last else "fitting",
            step=progress.step,
            total=progress.total,
            left=left,
            over=progress.over,
            rewards=(*rewards, known(float(progress.rewards[0]))),
            best=(*best, known(float(progress.best[0])) if progress.keeps_best else None),
            gains=self._gains(progress, view.gains),
            now={seed: shown for seed, (_, shown) in self.latest.items()},
        )

    def _gains(
        self, progress: Progress, before: Mapping[str, tuple[tuple[int, float], ...]]
    ) -> Mapping[str, tuple[tuple[int, float], ...]]:
        """With what the latest pictures add, once in a round of the seeds, over raw ones of the same seeds."""
        seeds = set(self.latest)
        whole = len(seeds) >= min(progress.over, len(self.folder.config.seeds))
        if not self.raw or not seeds or None in seeds or not whole or progress.step % len(seeds):
            return before
        try:
            now = self._scores([drawing for drawing, _ in self.latest.values()])
        except IpgoError as error:  # of a reward that only judges; the results will say so, too
            logger.warning("%s", error)
            return before
        own = optimised(self.folder.config.reward, self.models.identities)
        gains = dict(before)
        for name, values in now.items():
            raw = self.raw.get(name, {})
            changes = [value - raw[seed] for seed, value in values.items() if seed in raw]
            if name not in own and changes:
                gains[name] = (*gains.get(name, ()), (progress.step, sum(changes) / len(changes)))
        return gains

    def _scores(self, drawings: Sequence[Drawing]) -> dict[str, dict[int, float]]:
        """What each reward and the judge say of pictures of the prompt, by seed."""
        own = optimised(self.folder.config.reward, self.models.identities)
        found: defaultdict[str, dict[int, float]] = defaultdict(dict)
        for each in score_drawings(drawings, self.models.rewards, own, self.models.judge):
            if known(each.value) is not None:
                found[each.reward][each.seed] = each.value
        return dict(found)


def ended(view: View, folder: Run) -> View:
    """A finished run, with the pictures that it keeps: those of the best step, drawn in all steps."""
    prompt, seeds = folder.prompts[0], folder.config.seeds or folder.config.new_seeds
    lines = folder.history(prompt)
    failed = any(result["status"] == "failed" for result in folder.results())
    before, after = (folder.images(prompt, when) for when in ("before", "after"))
    return replace(
        view,
        stage="failed" if failed else "done",
        said="the reward or its gradient was not finite" if failed else "",
        step=len(lines),
        total=len(lines),
        over=lines[-1]["over"] if lines else 1,
        rewards=tuple(map(known, (line["reward"] for line in lines))),
        best=tuple(map(known, (line["best"] for line in lines))),
        before={seed: Picture(before[seed]) for seed in seeds if seed in before},
        now={seed: Picture(after[seed]) for seed in seeds if seed in after},
    )


def _drawing(opening: Opening) -> dict[str, Any]:
    """How a backend is opened, but for where its parts are."""
    return {name: value for name, value in asdict(opening).items() if name != "text_device"}


def picture(drawing: Drawing) -> Picture:
    """An image as a picture."""
    return Picture(to_pil(drawing.image[None])[0])


def known(value: float | None) -> float | None:
    """A number, or None for one that is not finite."""
    return value if value is not None and abs(value) < float("inf") else None


def seed_of(progress: Progress, seeds: Sequence[int], cycles: bool) -> int | None:
    """The noise that a step's picture was drawn from; None where noise changes at every step.

    Args:
        cycles: does the method use the seeds in turn? Others draw all of them in a step, the last one last.
    """
    if not seeds or progress.over not in (1, len(seeds)) or (progress.over > 1 and not cycles):
        return None
    return seeds[(progress.step - 1) % len(seeds)] if cycles else seeds[-1]


def places(out: Path, config: RunConfig) -> Iterator[Run]:
    """Of NAME, NAME-2, ... those that hold a run of these settings, and at last the first that is free.

    Args:
        out: the folder of the runs; NAME comes from the prompt.
    """
    name = slug(config.prompts[0]) or "run"
    for number in itertools.count(1):
        path = out / (name if number == 1 else f"{name}-{number}")
        try:
            yield Run.open(path, config)
        except InputError:
            if not path.exists():  # so it is not because of what is there
                raise
