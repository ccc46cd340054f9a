"""From settings to a finished folder: fit, draw before and after, score, and resume after a stop."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import logging
import platform
import re
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ipgo import __version__, files
from ipgo.adapters import Adapter
from ipgo.backends import BACKENDS, Backend, load_backend
from ipgo.chunks import Chunk, Cost
from ipgo.config import RunConfig
from ipgo.devices import choose_device
from ipgo.errors import InputError, InUseError
from ipgo.evaluation import Judge, Score, draw, score
from ipgo.images import to_pil
from ipgo.methods import WITHOUT_GRADIENT
from ipgo.prompts import Prompt, unseen_words
from ipgo.rewards import Reward, asks, has_gradient, identity_of, is_unsettled, load_reward
from ipgo.store import Run
from ipgo.task import Progress, Task

BUNDLED_REWARDS = {"emoji": ("emoji-preference", "emoji-clip", "emoji-aesthetic")}
CHECKPOINT_SECONDS = 10.0
Limit = Callable[[Iterator[Progress], Counter[str]], Iterator[Progress]]
logger = logging.getLogger("ipgo")


@dataclass(frozen=True)
class Models:
    """What a run computes with: `rewards` holds the maximised reward and those held out, by name."""

    backend: Backend
    reward: Reward
    rewards: Mapping[str, Reward]
    judge: Judge | None

    @functools.cached_property
    def identities(self) -> dict[str, Any]:
        """What decides the scores, by reward; JSON's own types, as they are read back."""
        found: dict[str, Any] = json.loads(
            json.dumps({name: identity_of(reward) for name, reward in self.rewards.items()})
        )
        return found


def load_models(
    config: RunConfig,
    backend: Backend | None = None,
    given: Mapping[str, Reward] | None = None,
    begun_in: str | None = None,
) -> Models:
    """Load what the settings name, or take what is given; refuse prompts that the backend cannot take.

    Args:
        given: rewards that no name can load, by the names that the settings have for them.
        begun_in: the format of a run that is continued: its own, where the settings leave it to the device.
    """
    taken = [name for name in (config.reward, *held_out(config)) if re.fullmatch("judge-[a-z]+", name)]
    judge = load_judge(config)
    if taken and judge is not None:
        raise InputError(f"reward {taken[0]!r} has a name reserved for the judge's verdicts; give it another")
    dtype = begun_in if config.dtype == "auto" and begun_in else config.dtype
    backend = backend or load_backend(
        config.backend, device=config.device, dtype=dtype, **asdict(config.opening)
    )
    config.sampling.check(backend)  # all steps: a fit that draws in fewer would notice after it
    backend.check_prompts(config.prompts)
    for text in backend.truncated(config.prompts):
        logger.warning(
            "prompt %r is cut to the %d tokens that the encoder takes", text[:60], backend.max_tokens
        )
    if config.method.insertion is not None:
        config.method.insertion.check(backend.embed_dim)
    given = given or {}
    # Where a backend was given that stays where it is, its pictures are there.
    device = backend.device if config.device == "auto" else config.device
    rewards = {
        name: given[name] if name in given else load_reward(name, device=device)
        for name in dict.fromkeys((config.reward, *held_out(config)))
    }
    models = Models(backend, rewards[config.reward], rewards, judge)
    _ = models.identities  # before a call can change anything
    for name in (name for name, each in rewards.items() if is_unsettled(each)):
        logger.warning(
            "reward %r has batch norm or dropout in training mode, so its numbers do not depend on the picture alone; "
            "call .eval() on the module",
            name,
        )
    return models


def check_method(folder: Run) -> None:
    """`check_settings` of what is not done yet."""
    for chunk in folder.pending():
        check_settings(folder.config, chunk.texts)


def check_settings(config: RunConfig, prompts: Sequence[str]) -> None:
    """Refuse, before a model is loaded, what a fit of these prompts cannot do ."""
    config.check_fit()
    config.method.check(config.request(prompts))


def check_gradient(config: RunConfig) -> None:
    """Refuse, before a model is loaded, a method that climbs and a reward that has no gradient."""
    if config.method.climbing and not has_gradient(config.reward):
        raise InputError(
            f"reward {config.reward!r} has no gradient, which method {config.method_name!r} needs; "
            f"use one that needs none: {WITHOUT_GRADIENT}"
        )


def held_out(config: RunConfig) -> tuple[str, ...]:
    """The rewards that only judge: those asked for, or those that come with the backend."""
    return BUNDLED_REWARDS.get(config.backend, ()) if config.held_out is None else config.held_out


def load_judge(config: RunConfig) -> Judge | None:
    """The judge that comes with the bundled model; other backends have none."""
    if config.backend != "emoji":
        return None
    from ipgo.rewards import emoji

    judge: Judge = emoji.load_judge(choose_device(config.device))
    return judge


def run(folder: Run, models: Models) -> None:
    """Fit every prompt that has no result yet. Safe to stop at any moment, and to call again.

    Raises:
        InUseError: another thread fits something through the same pipeline.
    """
    try:
        with exclusively(models.backend):
            _run(folder, models)
        folder.close()
    finally:
        folder.release()


def _run(folder: Run, models: Models) -> None:
    pending = folder.pending()
    if not pending:
        folder.start(facts(models))  # refuses other models than those that its results are of
    else:
        try_rewards(folder.config, models)
    for chunk in pending:
        progress, cost = fit_chunk(folder, models, chunk)
        finish_chunk(folder, models, chunk, progress, cost)


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
    """Score one picture of the first prompt by the held-out rewards, so that a broken one fails before the search.

    Rewards that ask a person are left out.
    """
    judges = {
        name: reward for name, reward in models.rewards.items() if name != config.reward and not asks(name)
    }
    if judges:
        text, seeds = config.prompts[0], config.judged_seeds[:1]
        sampling = config.sampling.for_fit(models.backend)
        drawings = list(draw(models.backend, {"raw": Adapter()}, text, seeds, sampling))
        score(drawings, judges, config.reward)


def fit_chunk(folder: Run, models: Models, chunk: Chunk, limit: Limit | None = None) -> tuple[Progress, Cost]:
    """Search until the last step, from the newest checkpoint if there is one.

    The last step has no checkpoint: a run that dies while it draws repeats the few steps before.

    Args:
        limit: may end the search early; it gets the search, and the calls that were made before a stop.
    """
    config, backend = folder.config, models.backend
    sampling = config.sampling.for_fit(backend)
    task = Task(backend, models.reward, chunk.texts, sampling, config.seeds, config.seed, config.shared)
    found = folder.checkpoint(chunk)
    earlier = found.cost if found is not None else Cost()
    started = saved = time.monotonic()
    counted, about = Counter(backend.calls), facts(models)
    progress = None
    search = config.method.fit(task, found.state if found is not None else None)
    if limit is not None:
        search = limit(search, earlier.calls)

    def so_far() -> Cost:
        calls = earlier.calls + (backend.calls - counted)
        memory = max(earlier.peak_memory, peak_memory(backend.device))
        return Cost(calls, earlier.seconds + time.monotonic() - started, memory, earlier.sessions)

    with progress_bar(chunk, folder) as bar:
        for progress in search:
            folder.start(about)  # not sooner: settings that the method refuses leave no run behind
            cost = so_far()
            folder.record(chunk, progress, cost)
            last = progress.step == progress.total or bool(progress.failed.all())
            if time.monotonic() - saved > CHECKPOINT_SECONDS and not last:
                folder.save_checkpoint(chunk, progress, cost)
                saved = time.monotonic()
            show(bar, progress)
    if progress is None:
        raise InputError(f"method {config.method_name!r} made no step; give it at least one")
    return progress, so_far()  # a step that `limit` broke off has cost something too


def finish_chunk(
    folder: Run, models: Models, chunk: Chunk, progress: Progress, cost: Cost, twins: Sequence[Run] = ()
) -> None:
    """Draw, score and store every prompt of the chunk; its result.json comes last.

    Args:
        twins: runs that draw bare prompts as this one does: what they have drawn and scored is taken over.
    """
    config, seeds = folder.config, folder.config.judged_seeds
    judged = set(folder.judged)
    total = len(judged & set(chunk.prompts)) * len(seeds) * (1 if config.method_name == "raw" else 2)
    with tqdm(total=total, desc="before and after", unit="image", disable=None, leave=False) as bar:
        for row, prompt in enumerate(chunk.prompts):
            if prompt not in judged or folder.done(prompt):
                continue
            folder.save_adapter(prompt, progress.adapter if config.shared else progress.adapter.row(row))
            scores = taken_over(folder, models, prompt, twins)
            if not scores:
                scores = draw_and_score(folder, models, prompt, "raw", Adapter())
            bar.update(len(seeds))
            if config.method_name != "raw":
                scores += draw_and_score(folder, models, prompt, config.method_name, progress.adapter)
                bar.update(len(seeds))
            paid = cost_of(cost, chunk, progress.adapter)
            cut = bool(models.backend.truncated([prompt.text]))
            folder.finish(prompt, scores, paid, bool(progress.failed[row]), models.identities, truncated=cut)
    folder.drop_checkpoint(chunk)


def draw_and_score(folder: Run, models: Models, prompt: Prompt, method: str, adapter: Adapter) -> list[Score]:
    """A prompt's images from all seeds, stored as those before (`method` is raw) or after the fit."""
    config, drawings = folder.config, []
    for drawing in draw(models.backend, {method: adapter}, prompt.text, config.judged_seeds, config.sampling):
        when = "before" if method == "raw" else "after"
        folder.save_image(prompt, when, drawing.seed, to_pil(drawing.image[None])[0])
        drawings.append(drawing)
    return score(drawings, models.rewards, config.reward, models.judge)


def taken_over(folder: Run, models: Models, prompt: Prompt, twins: Sequence[Run]) -> list[Score]:
    """The images of the bare prompt and their scores, copied from the first twin that has them; [] if none has."""
    config = folder.config
    for twin in twins:
        result = twin.result(prompt)
        if result is None or result["rewards"] != models.identities:
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
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` begin anew from what is in use now, where the system can do that (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak resident set size


def facts(models: Models) -> dict[str, Any]:
    """What a reader of the results wants to know besides the settings, and what must stay the same to continue them."""
    backend = models.backend
    packages = ("torch", "diffusers", "transformers")
    cuda = backend.device.type == "cuda"
    return {
        "versions": {"ipgo": __version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name(backend.device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        **backend.identity,
        "guidance_scale": backend.guidance_scale,  # where the settings leave it to the backend
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "rewards": models.identities,
    }


def vocabulary(backend: str) -> dict[str, Any] | None:
    """What a backend's folder says that it can draw (vocabulary.json); None if it says nothing."""
    file = Path(BACKENDS[backend][1] if backend in BACKENDS else backend) / "vocabulary.json"
    return files.read_json(file, "words") if file.is_file() else None


def warn_of_unseen_words(backend: str, prompts: Sequence[str]) -> None:
    """Name the words that the backend was never trained on, each with the nearest one that it knows."""
    known = vocabulary(backend)
    unseen = unseen_words(prompts, known["words"]) if known is not None else {}
    if unseen:
        words = ", ".join(
            f"{word!r} (nearest: {near!r})" if near else repr(word) for word, near in unseen.items()
        )
        logger.warning("the model has never seen %s; `ipgo list objects` shows what it can draw", words)
