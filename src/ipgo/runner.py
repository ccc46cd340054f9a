"""From settings to a finished folder: fit, draw before and after, score, and resume after a stop."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from ipgo.adapters import Adapter
from ipgo.backends import Backend
from ipgo.chunks import Chunk, Cost
from ipgo.config import RunConfig
from ipgo.continuing import differing_in
from ipgo.errors import InputError, InUseError, ResumeError, Stopped
from ipgo.evaluation import Score, draw, score_drawings
from ipgo.images import to_pil
from ipgo.models import Models, facts
from ipgo.prompts import Prompt
from ipgo.rewards import optimised
from ipgo.rewards.external import asks, keeping_answers
from ipgo.store import ANSWERS, Run
from ipgo.task import Progress, Task

CHECKPOINT_SECONDS = 10.0
# Seconds of writing one beyond which they are written less often: those of a text encoder's weights are gigabytes.
LONG = 0.5

# What ends a process, and how it does so unless somebody has decided otherwise: Ctrl-C, and what Slurm, systemd and
# Docker send before they kill.
ENDING = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
logger = logging.getLogger("ipgo")
Limit = Callable[[Iterator[Progress], Chunk, Counter[str]], Iterator[Progress]]


def run(folder: Run, models: Models, limit: Limit | None = None) -> int:
    """Fit every prompt that has no result yet. Safe to stop at any moment, and to call again.

    Several processes may do so at once, on one machine or on many that share the folder: each takes the prompts that
    no other is at.

    Args:
        limit: as in `fit_chunk`.

    Returns:
        How many prompts are left to the other processes at it.

    Raises:
        InUseError: another thread fits something through the same pipeline.
    """
    try:
        with exclusively(models.backend):
            _run(folder, models, limit)
        left = folder.left
        if not left:
            with folder.alone():
                folder.close()
        else:
            text = (
                "%d of %d prompts are left to the other processes at this run; the last one writes the report"
            )
            logger.info(text, left, len(folder.judged))
        return left
    finally:
        folder.release()


def _run(folder: Run, models: Models, limit: Limit | None) -> None:
    pending = folder.pending()
    if not pending or folder.begun:
        folder.start(facts(models))  # refuses other models than it was begun with, before it cuts histories
    if pending:
        try_rewards(folder.config, models)
    for chunk in folder.claimed():
        if strange := folder.strange(models.identities):
            raise ResumeError(
                f"{str(folder.path)!r} has meanwhile been begun by a process whose reward {strange[0]!r} is another"
            )
        with keeping_answers(models.rewards.values(), folder.path / ANSWERS):
            fitted = fit_chunk(folder, models, chunk, limit)
            finish_chunk(folder, models, chunk, fitted)
        if fitted.stopped:
            raise KeyboardInterrupt


_BUSY: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_GUARD = threading.Lock()


@contextlib.contextmanager
def exclusively(backend: Backend) -> Iterator[None]:
    """One fit at a time: it counts calls, and may change the networks, while it runs."""
    denoiser = backend.modules["denoiser"]
    with _GUARD:
        if denoiser in _BUSY:
            raise InUseError(
                f"backend {backend.name!r} is in use by another fit of this process; wait for it, or load it again"
            )
        _BUSY.add(denoiser)
    try:
        yield
    finally:
        _BUSY.discard(denoiser)


def try_rewards(config: RunConfig, models: Models) -> None:
    """Score two copies of one picture of the first prompt, so that a broken reward fails before the search.

    Two, since a search may score one image at a time, and only what is drawn after it comes in batches. Rewards that
    ask a person are left out.
    """
    tried = {name: reward for name, reward in models.rewards.items() if not asks(reward)}
    if tried:
        text, seeds = config.prompts[0], config.judged_seeds[:1]
        sampling = config.sampling.for_fit(models.backend)
        drawings = list(draw(models.backend, {"raw": Adapter()}, text, seeds, sampling))
        score_drawings(2 * drawings, tried, ())


class Fitted(NamedTuple):
    """Where a search ended, and what it took.

    Attributes:
        stopped: a stop was asked for in its last step. Its result is to be stored first, since no checkpoint has it.
    """

    progress: Progress
    cost: Cost
    stopped: bool = False


def fit_chunk(folder: Run, models: Models, chunk: Chunk, limit: Limit | None = None) -> Fitted:
    """Search until the last step, from the newest checkpoint if there is one.

    The last step has no checkpoint: a run that dies while it draws repeats the few steps before.

    Args:
        limit: looks at the search, and may end it early; it gets the search, its prompts, and the calls that were made
            before a stop. It raises `Stopped` between two steps to keep the first of them.
    """
    config, backend = folder.config, models.backend
    forget_peak_memory(backend.device)  # that of loading, or of drawing and scoring the chunk before
    sampling = config.sampling.for_fit(backend)
    task = Task(
        backend, models.reward, chunk.texts, sampling, config.seeds, config.seed, config.shared, config.chunk
    )
    found = folder.checkpoint(chunk)
    earlier = found.cost if found is not None else Cost()
    started = saved = time.monotonic()
    pause = CHECKPOINT_SECONDS
    counted, about = Counter(backend.calls), facts(models)
    progress = None
    search = config.method.fit(task, found.state if found is not None else None)
    del found  # its tensors may be as large as the adapter's
    if limit is not None:
        search = limit(search, chunk, earlier.calls)
    # What a limit has changed is put back before anything else is done.
    closing = contextlib.closing(search)  # type: ignore[type-var]  # they are generators

    def so_far() -> Cost:
        calls = earlier.calls + (backend.calls - counted)
        memory = max(earlier.peak_memory, peak_memory(backend.device))
        return Cost(calls, earlier.seconds + time.monotonic() - started, memory, earlier.sessions)

    with closing, progress_bar(chunk, folder) as bar, whole_steps() as stopping:
        try:
            for progress in search:
                folder.start(about)  # not sooner: settings that the method refuses leave no run behind
                cost = so_far()
                folder.record(chunk, progress, cost)
                last = progress.step == progress.total or bool(progress.failed.all())
                now = time.monotonic()
                if (now - saved > pause or stopping()) and not last:
                    folder.save_checkpoint(chunk, progress, cost)
                    saved = time.monotonic()
                    pause = CHECKPOINT_SECONDS * max(1.0, (saved - now) / LONG)
                show(bar, progress)
                if stopping() and not last:
                    raise KeyboardInterrupt
        except Stopped:
            if progress is not None and not last:
                folder.save_checkpoint(chunk, progress, cost)
            raise
    if progress is None:
        raise InputError(f"method {config.method_name!r} made no step; give it at least one")
    if stopping():
        logger.warning("this was the last step: what it found is drawn and scored first")
    return Fitted(progress, so_far(), stopping())  # a step that `limit` broke off has cost something too


@contextlib.contextmanager
def whole_steps() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C or SIGTERM wait for the end of a step, where nothing is lost; gives whether there was one.

    Only where it would end this: another thread gets none, and a handler of somebody else's stays.
    """
    asked: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    ours = {number: usual for number, usual in ENDING.items() if main and signal.getsignal(number) == usual}

    def note(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        logger.warning("stopping after this step; Ctrl-C again stops at once")

    for number in ours:
        signal.signal(number, note)
    try:
        yield lambda: bool(asked)
    except Exception as error:  # such as of a program that the same signal has ended
        if asked:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, usual in ours.items():
            signal.signal(number, usual)


def finish_chunk(
    folder: Run, models: Models, chunk: Chunk, fitted: Fitted, twins: Sequence[Run] = ()
) -> None:
    """Draw, score and store every prompt of the chunk; its result.json comes last.

    Args:
        twins: runs that draw bare prompts as this one does: what they have drawn and scored is taken over.
    """
    config, seeds, (progress, cost, _) = folder.config, folder.config.judged_seeds, fitted
    judged = set(folder.judged)
    total = len(judged & set(chunk.prompts)) * len(seeds) * (1 if config.method_name == "raw" else 2)
    with tqdm(total=total, desc="before and after", unit="image", disable=None, leave=False) as bar:
        left = [each for each in enumerate(chunk.prompts) if each[1] in judged and not folder.done(each[1])]
        if config.shared and left:
            folder.save_adapter(left[0][1], progress.adapter)
        for row, prompt in left:
            if not config.shared:
                folder.save_adapter(prompt, progress.adapter.row(row))
            scores = taken_over(folder, models, prompt, twins)
            if scores:
                bar.update(len(seeds))
            else:
                scores = draw_and_score(folder, models, prompt, "raw", Adapter(), bar)
            if config.method_name != "raw":
                scores += draw_and_score(folder, models, prompt, config.method_name, progress.adapter, bar)
            paid = cost_of(cost, chunk, progress.adapter)
            cut = bool(models.backend.truncated([prompt.text]) or models.backend.half_read([prompt.text]))
            folder.finish(prompt, scores, paid, bool(progress.failed[row]), models.identities, truncated=cut)
    folder.drop_checkpoint(chunk)


def draw_and_score(
    folder: Run, models: Models, prompt: Prompt, method: str, adapter: Adapter, bar: tqdm[Any]
) -> list[Score]:
    """A prompt's images from all seeds, stored as those before (`method` is raw) or after the fit."""
    config, drawings = folder.config, []
    for drawing in draw(models.backend, {method: adapter}, prompt.text, config.judged_seeds, config.sampling):
        when = "before" if method == "raw" else "after"
        folder.save_image(prompt, when, drawing.seed, to_pil(drawing.image[None])[0])
        drawings.append(drawing)
        bar.update()
    return score_drawings(drawings, models.rewards, optimised(config.reward, models.identities), models.judge)


def taken_over(folder: Run, models: Models, prompt: Prompt, twins: Sequence[Run]) -> list[Score]:
    """The images of the bare prompt and their scores, copied from the first twin that has them; [] if none has."""
    config = folder.config
    for twin in twins:
        result = twin.result(prompt)
        if result is None or result["rewards"] != models.identities:
            continue
        missing = not all(twin.image_file(prompt, "before", seed).is_file() for seed in config.judged_seeds)
        if missing or differing_in(twin.drawn_by, models.backend.identity) is not None:
            continue
        for seed in config.judged_seeds:
            folder.copy_image(twin, prompt, "before", seed)
        return [each for each in folder.scores_of(result) if each.method == "raw"]
    return []


def progress_bar(chunk: Chunk, folder: Run) -> tqdm[Any]:
    """A bar on a terminal, nothing elsewhere."""
    first, last = (folder.prompts.index(prompt) + 1 for prompt in (chunk.prompts[0], chunk.prompts[-1]))
    several = f"prompts {first}-{last}" if last > first else f"prompt {first}"
    title = f"{several} of {len(folder.prompts)}" if len(folder.prompts) > 1 else chunk.texts[0][:40]
    return tqdm(desc=title, unit="step", disable=None)


def show(bar: tqdm[Any], progress: Progress) -> None:
    """Move the bar, and say how the mean reward stands."""
    bar.total = progress.total
    now, best = (float(values.nanmean()) for values in (progress.rewards, progress.best))
    bar.set_postfix_str(f"reward {now:.3f}, best {best:.3f}", refresh=False)
    bar.update(progress.step - bar.n)


def cost_of(cost: Cost, chunk: Chunk, adapter: Adapter) -> dict[str, Any]:
    """One prompt's share of what its chunk took. Calls are exact; the rest differs from run to run."""
    share = len(chunk.prompts)
    digits = 1 + len(str(share))  # so that their sum is right
    rows = 1 if adapter.prompts is None else share
    return {
        "calls": {name: round(count / share, digits) for name, count in sorted(cost.calls.items())},
        "parameters": sum(parameter.numel() for parameter in adapter.parameters()) // rows,
        "measured": {
            "seconds": round(cost.seconds / share, digits),
            "peak_memory_mib": round(cost.peak_memory),
            "fitted_together": share,
            "sessions": cost.sessions,
        },
    }


def peak_memory(device: torch.device) -> float:
    """The most memory in use so far, in MiB: the GPU's, or else the process's (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return 0.0
    if sys.platform == "linux":
        # This is what `forget_peak_memory` sets back; `ru_maxrss` also has what was before exec.
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` begin anew from what is in use now, where the system can do that (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak resident set size
