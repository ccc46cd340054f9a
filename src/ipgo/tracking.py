"""What a tracker is told of a fit at each step: TensorBoard, Weights & Biases or Trackio."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ipgo.chunks import Chunk
from ipgo.errors import InputError, MissingExtraError, first_line, unknown
from ipgo.images import to_pil
from ipgo.runner import Limit
from ipgo.settings import flatten
from ipgo.store import Run
from ipgo.task import Progress

EVERY = 10  # steps from one set of pictures to the next
PROJECT = "ipgo"  # on a dashboard
logger = logging.getLogger("ipgo")


class Tracker(Protocol):
    """One fit, as it is told to a tracker."""

    def tell(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    """Event files in the run's folder, which `tensorboard --logdir` reads."""

    def __init__(self, name: str, title: str, folder: Run, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was told of later steps before a fit was killed is taken back.
        self.writer: Any = SummaryWriter(folder.path / name / title, purge_step=step)
        self.writer.add_text("settings", f"```json\n{json.dumps(folder.config.to_json(), indent=1)}\n```")

    def tell(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None:
        import numpy as np

        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        for name, picture in pictures.items():
            self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Dashboard:
    """Weights & Biases, and Trackio, which is called in the same way. Each start of a fit is a run there."""

    def __init__(self, name: str, title: str, folder: Run, step: int) -> None:
        self.module: Any = importlib.import_module(name)
        place = {"dir": str(folder.path)} if name == "wandb" else {"embed": False}
        self.run: Any = self.module.init(
            project=PROJECT,
            group=folder.path.name,
            name=f"{folder.path.name}/{title}",
            config=flatten(folder.config.to_json()),
            **place,
        )

    def tell(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None:
        shown = {name: self.module.Image(picture) for name, picture in pictures.items()}
        self.run.log({**numbers, **shown}, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[str, str, Run, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Dashboard,
    "trackio": _Dashboard,
}


def check_tracker(name: str | None, out: Path | None) -> None:
    """Raise `InputError` for a tracker that there is not, `MissingExtraError` for one that is not installed."""
    if name is None:
        return
    if name not in TRACKERS:
        raise unknown("tracker", name, TRACKERS)
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:  # nothing, or a folder of that name, which wandb leaves behind
        extra = '"ipgo[track]"' if name == "tensorboard" else name
        raise MissingExtraError(f"track is {name!r}, which needs that package: pip install {extra}")
    if out is None and name != "trackio":
        raise InputError(f"track is {name!r}, which writes into the run's folder; out must say where that is")


def tracked(name: str | None, folder: Run) -> Limit | None:
    """What ends nothing, and tells a tracker of each step; None is for none.

    A tracker that fails, for want of a login or a network, is said to have failed, and costs no fit.
    """

    if name is None:
        return None

    def watch(search: Iterator[Progress], chunk: Chunk, calls: object) -> Iterator[Progress]:
        fit = _Fit(name, folder, chunk)
        try:
            for progress in search:
                try:
                    yield progress
                finally:  # when the run has kept it, also if it is the last one before a stop
                    fit.attempt(functools.partial(fit.tell, progress))
        finally:
            fit.attempt(fit.close)

    return watch


class _Fit:
    """The fit of a chunk, as it is told: from its first step on, and until the tracker fails."""

    def __init__(self, name: str, folder: Run, chunk: Chunk) -> None:
        self.name, self.folder, self.chunk = name, folder, chunk
        self.tracker: Tracker | None = None
        self.failed = False

    def attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            if not self.failed:
                logger.warning("%s failed: %s; this fit goes on without it", self.name, first_line(error))
            self.failed = True

    def tell(self, progress: Progress) -> None:
        if self.failed:
            return
        if self.tracker is None:
            self.tracker = TRACKERS[self.name](self.name, self.title, self.folder, progress.step)
        self.tracker.tell(progress.step, self.numbers(progress), self.pictures(progress))

    def close(self) -> None:
        if self.tracker is not None:
            self.tracker.close()

    @property
    def title(self) -> str:
        if self.folder.config.shared:
            return "shared"
        first, *others = self.chunk.prompts
        return f"prompts-{self.chunk.key}" if others else first.id

    @property
    def ends(self) -> list[str]:
        """What follows a name where there are several prompts."""
        several = len(self.chunk.prompts) > 1 and not self.folder.config.shared
        return [f"/{prompt.id}" if several else "" for prompt in self.chunk.prompts]

    def numbers(self, progress: Progress) -> dict[str, float]:
        shared = self.folder.config.shared
        return {
            f"{name}{end}": value
            for end, values in zip(self.ends, progress.numbers(shared), strict=not shared)
            for name, value in values.items()
            if value is not None
        }

    def pictures(self, progress: Progress) -> dict[str, Image.Image]:
        due = progress.step % EVERY == 0 or progress.step in (1, progress.total)
        if progress.images is None or not due:
            return {}
        pictures = to_pil(progress.images)
        return {f"picture{end}": picture for end, picture in zip(self.ends, pictures, strict=True)}
