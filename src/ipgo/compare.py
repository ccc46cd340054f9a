"""Many methods side by side: the same prompts, seeds, rewards and budget, each in a run folder of its own."""

from __future__ import annotations

import errno
import gc
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from filelock import FileLock, Timeout

from ipgo.adapters import Adapter
from ipgo.artefacts import save_scores
from ipgo.backends import check_backend
from ipgo.backends.facts import Opening
from ipgo.budget import (
    BudgetSpent,
    calls_of_an_image,
    ended,
    fit_to,
    length_of,
    measure,
    paid,
    step_cost,
    watch,
)
from ipgo.chunks import Chunk
from ipgo.comparison import UNSEEN_PROMPTS, Comparison, Plan
from ipgo.config import RunConfig
from ipgo.errors import InputError, MissingExtraError
from ipgo.evaluation import evaluate
from ipgo.models import Models, facts, judging_rewards, load_models
from ipgo.preflight import check_gradient, check_method, check_own_steps, check_settings, check_world
from ipgo.prompts import Prompt
from ipgo.rewards import check_reward
from ipgo.rewards.external import keeping_answers
from ipgo.runner import Fitted, Limit, finish_chunk, fit_chunk, try_rewards
from ipgo.store import ANSWERS, LOCK, Run
from ipgo.task import Progress
from ipgo.tracking import tracked

# Settings that decide which models are in memory, and those that decide what a bare prompt looks like.
BACKEND = ("backend", "device", "dtype", "image_size", "padding", "scheduler", "long_prompts", "text_device")
LOADED = (*BACKEND, "reward", "held_out")
DRAWN = (*(name for name in BACKEND if name != "device"), "judged_seeds")
logger = logging.getLogger("ipgo")


def check(folder: Comparison, labels: Iterable[str]) -> None:
    """Raise `InputError` for one of these entries that cannot work, as far as that shows without loading a model."""
    seen = set[str]()
    widths: dict[tuple[str, Opening], int | None] = {}
    for label in labels:
        config, run = folder.plan.config(label), folder.run(label)
        if run is not None and not run.pending():
            continue
        try:
            for name in dict.fromkeys((config.reward, *judging_rewards(config))):
                if name not in seen:
                    check_reward(name, (*folder.plan.prompts, *folder.plan.unseen_prompts))
                seen.add(name)
            pipeline = config.backend, config.opening
            if pipeline not in widths:
                widths[pipeline] = check_backend(*pipeline, config.prompts, config.sampling.negative_prompt)
            config.check_width(widths[pipeline])
            check_own_steps(config)
            check_gradient(config)
            if run is not None:
                check_method(run)
            else:
                check_settings(config, config.prompts)
        except (InputError, MissingExtraError) as error:
            raise InputError(f"entry {label!r}: {error}") from None
    for config in {config.backend: config for config in map(folder.plan.config, labels)}.values():
        check_world(config)


def compare(folder: Comparison, track: str | None = None) -> None:
    """Run every entry that is not finished. Safe to stop at any moment, and to call again.

    What fails, be it an entry or a prompt, is remembered and tried again the next time; the rest goes on.

    Args:
        track: a tracker that is told of each step of every entry (`ipgo.tracking.TRACKERS`).

    Raises:
        InputError: the models of the first entry cannot be loaded.
        ResumeError: its models are not those of the entries before.
    """
    plan, shelf = folder.plan, dict[tuple[Any, ...], Models]()
    labels = _in_turn(plan)
    first = plan.config(labels[0])
    models = _models(first, shelf, folder)
    if not folder.scored:
        try_rewards(first, models)
    with folder.alone():  # another process may begin it, or add entries, at the same time
        plan = folder.plan
        if folder.started:
            folder.start(plan, folder.going_on(facts(models)))  # with the entries that were added
        else:
            price = plan.price or measure(models.backend, first.prompts[: first.chunk], first.sampling)
            folder.start(replace(plan, price=price), facts(models))
    del models  # the shelf has them, as long as they are needed
    left, moved = labels, True
    tried: dict[str, set[Chunk]] = {label: set() for label in labels}
    while left and moved:  # what another process was at, once more: it may have died
        again, moved = [], False
        for label in left:
            logger.info("%s (%d of %d)", label, labels.index(label) + 1, len(labels))
            try:
                done, whole = _run_entry(folder, label, shelf, tried[label], track)
            except Exception as error:
                if _full_disk(error):
                    raise
                folder.fail(label, [""], error)
                continue
            moved |= done > 0
            if whole:
                folder.forgive(label, [""])
            else:
                again.append(label)
        left = again
    for label in left:
        logger.warning("%s is left to the other processes at it", label)


def _in_turn(plan: Plan) -> list[str]:
    """The entries in the plan's order, but those that share their models together."""
    keys = {label: _needs(plan.config(label)) for label in plan.entries}
    order = list(dict.fromkeys(keys.values()))
    return sorted(keys, key=lambda label: order.index(keys[label]))


def _needs(config: RunConfig) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in LOADED)


def _models(config: RunConfig, shelf: dict[tuple[Any, ...], Models], folder: Comparison) -> Models:
    """What a run computes with, in the format that the comparison began in; kept until a run needs others.

    Two pipelines at once may be more than the memory holds, and would count as the second one's.
    """
    key = _needs(config)
    if key not in shelf:
        shelf.clear()
        gc.collect()
        shelf[key] = load_models(config, begun_in=folder.facts.get("dtype") if folder.started else None)
    return shelf[key]


def _full_disk(error: Exception) -> bool:
    """Is it the one error that every other entry would meet too?"""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _run_entry(
    folder: Comparison,
    label: str,
    shelf: dict[tuple[Any, ...], Models],
    tried: set[Chunk],
    track: str | None,
) -> tuple[int, bool]:
    """Fit what no other process is at: the number of prompts that are done by it, and whether that was all.

    Args:
        tried: as in `Run.claimed`.
    """
    config = folder.plan.config(label)
    models = _models(config, shelf, folder)
    run = Run.open(folder.folder(label), within_budget(folder.plan, label, config, models))
    check_method(run)
    if config.shared and folder.plan.unseen_prompts:
        models.backend.check_prompts(folder.plan.unseen_prompts)  # not only when the fit is done
    twins, ours = _twins(folder, label), list[Prompt]()
    try:
        for chunk in run.claimed(tried):
            ours += [prompt for prompt in chunk.prompts if not run.done(prompt)]
            _run_chunk(folder, label, run, models, chunk, twins, tracked(track, run))
    finally:
        run.release()
    pending, judged = run.pending(), True
    if not pending:
        with run.alone():
            run.close()
        judged = _judge_unseen_prompts(run, models, folder.plan.unseen_prompts)
    return sum(map(run.done, ours)), judged and set(pending) <= tried


def _twins(folder: Comparison, label: str) -> list[Run]:
    """The runs of other entries that draw bare prompts from the same seeds, with the same models and sampler."""

    def drawn(config: RunConfig) -> tuple[Any, ...]:
        kind = config.device.partition(":")[0]  # whichever GPU it is
        return kind, *(getattr(config, name) for name in DRAWN), replace(config.sampling, fit_steps=None)

    ours = drawn(folder.plan.config(label))
    others = (folder.run(other) for other in folder.plan.entries if other != label)
    return [run for run in others if run is not None and drawn(run.config) == ours]


def within_budget(plan: Plan, label: str, config: RunConfig, models: Models) -> RunConfig:
    """The settings, with the length that the budget pays for; one that was asked for is not made longer."""
    path = plan.length(label)
    now = length_of(config.method, path)
    if plan.budget is None or now is None:
        return config
    assert plan.price is not None
    fitted = replace(config, sampling=config.sampling.for_fit(models.backend))
    image = calls_of_an_image(models.backend, fitted.sampling)
    cost = step_cost(fitted, image, plan.price, config.sampling.guided(models.backend))
    steps = paid(config, plan.budget, cost)
    return fit_to(config, path, min(steps, now) if plan.states_length(label) else steps)


def _run_chunk(
    folder: Comparison,
    label: str,
    run: Run,
    models: Models,
    chunk: Chunk,
    twins: Sequence[Run],
    told: Limit | None,
) -> None:
    """Fit some prompts together; if that fails, each by itself, so that one does not take the others along.

    Where some are done and the search of the others was not kept, these are fitted by themselves as well: nothing is
    paid for twice.
    """
    left = [prompt for prompt in chunk.prompts if not run.done(prompt)]
    if len(left) < len(chunk.prompts) and not run.config.shared and run.checkpoint(chunk) is None:
        for prompt in left:
            _run_chunk(folder, label, run, models, Chunk((prompt,)), twins, told)
        return
    try:
        with keeping_answers(models.rewards.values(), run.path / ANSWERS):
            fitted = _fit(folder.plan, label, run, models, chunk, told)
            finish_chunk(run, models, chunk, fitted, twins)
    except Exception as error:
        if _full_disk(error):
            raise
        if len(chunk.prompts) == 1 or run.config.shared:
            folder.fail(label, chunk.texts, error)
            return
    else:
        folder.forgive(label, chunk.texts)
        if fitted.stopped:
            raise KeyboardInterrupt
        return
    gc.collect()  # only now: until here the error held the frames, and so the graph, of what failed
    for prompt in chunk.prompts:
        if not run.done(prompt):
            _run_chunk(folder, label, run, models, Chunk((prompt,)), twins, told)


def _fit(plan: Plan, label: str, run: Run, models: Models, chunk: Chunk, told: Limit | None) -> Fitted:
    """`fit_chunk` within the budget, which prompts that are fitted together share.

    A method without a length, which the budget could set, may in any case draw once on each seed.

    Args:
        told: sees each step that is kept.
    """
    config, price = run.config, plan.price
    if plan.budget is None or price is None:
        return fit_chunk(run, models, chunk, told)
    calls = plan.budget
    if length_of(config.method, plan.length(label)) is None:
        image = calls_of_an_image(models.backend, config.sampling.for_fit(models.backend))
        calls = max(calls, image * max(1, len(config.seeds)))

    def limit(search: Iterator[Progress], chunk: Chunk, earlier: Counter[str]) -> Iterator[Progress]:
        search = search if told is None else told(search, chunk, earlier)
        return watch(search, models.backend, price, calls * len(chunk.prompts), earlier)

    for again in (True, False):
        try:
            fitted = fit_chunk(run, models, chunk, limit)
            return fitted._replace(progress=ended(fitted.progress))  # also if its last step was broken off
        except BudgetSpent:
            if not again or run.checkpoint(chunk) is None:
                break
            # The step after the checkpoint is not paid for, and only a step gives an adapter: start again.
            run.drop_checkpoint(chunk)
    raise InputError(f"budget is {plan.budget}; {config.method_name!r} needs more for a first result")


def _judge_unseen_prompts(run: Run, models: Models, prompts: Sequence[str]) -> bool:
    """Score a shared adapter on prompts that it was not fitted to, as far as it can draw them.

    Returns:
        False if another process is at that.
    """
    config, file = run.config, run.path / UNSEEN_PROMPTS
    if not prompts or not config.shared or file.is_file():
        return True
    adapter = run.load_adapter(run.prompts[0]).to(models.backend.device)
    if adapter.prompts is not None or adapter.transfers == "nothing":
        return True
    adapters = {"raw": Adapter(), config.method_name: adapter}
    given = adapters, models.rewards, prompts, config.new_seeds or config.seeds, config.sampling
    try:
        with FileLock(file.with_suffix(LOCK), timeout=0):
            if not file.is_file():
                scores = evaluate(models.backend, *given, config.reward, models.judge)
                save_scores(file, scores, models.identities)
    except Timeout:
        return False
    return True
