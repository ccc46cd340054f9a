"""What a search may spend, in denoiser calls, and how it is held to that."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ipgo.backends import Backend
from ipgo.config import RunConfig
from ipgo.errors import InputError
from ipgo.sampling import Sampling, unconditional
from ipgo.task import Method, Progress

REPEATS = 5  # timings of each kind of call, of which the median counts
SLACK = 1e-6  # of a call: weights are not whole numbers
LENGTH = "ascent.steps"  # of methods that climb; what others call theirs is in comparisons/methods.yaml


class BudgetSpent(Exception):  # noqa: N818 - no error: it ends a search
    """The next denoiser call is not paid for."""


@dataclass(frozen=True)
class Price:
    """What a differentiated denoiser call, backward pass included, costs in calls without gradient.

    Attributes:
        gradient: if the gradient flows through the conditional half of guidance alone, as to embeddings.
        both: if it flows through both halves, as to the noise or the weights.
    """

    gradient: float
    both: float

    def __post_init__(self) -> None:
        for field, value in (("gradient", self.gradient), ("both", self.both)):
            if not 1 <= value < math.inf:
                raise InputError(f"price.{field} is {value}; it must be at least 1 and finite")

    def of(self, calls: Mapping[str, float]) -> float:
        """The weighted calls of a ledger (`Backend.calls`)."""
        both = calls.get("denoiser_grad_both", 0)
        gradient = calls.get("denoiser_grad", 0) - both
        return calls.get("denoiser", 0) + (self.gradient - 1) * gradient + (self.both - 1) * both


def measure(backend: Backend, prompts: tuple[str, ...], sampling: Sampling) -> Price:
    """Time denoiser calls of a batch of `prompts` with and without gradient. The ledger stays as it is."""
    counted = Counter(backend.calls)
    with torch.no_grad():
        original = backend.encode(prompts)
        uncond = unconditional(backend, original, sampling)
    noise = backend.noise(range(len(prompts)))[:, 0].to(torch.promote_types(backend.dtype, torch.float32))
    timestep = backend.scheduler(sampling.steps, noise).timesteps[-1]

    def seconds(to_embeds: bool, to_latents: bool) -> float:
        embeds = original.embeds.detach().clone().requires_grad_(to_embeds)
        latents = noise.clone().requires_grad_(to_latents)
        cond = dataclasses.replace(original, embeds=embeds)
        started = _now(backend)
        with torch.set_grad_enabled(to_embeds):
            output = backend.predict(latents, timestep, cond, uncond, sampling.scale(backend))
        if to_embeds:
            torch.autograd.backward(output.sum())
        return _now(backend) - started

    kinds = {"plain": (False, False), "gradient": (True, False), "both": (True, True)}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(1 + REPEATS):  # by turns, so that a slow moment of the machine strikes all three
        for name, kind in kinds.items():
            taken = seconds(*kind)
            if turn:  # the first ones warm up
                times[name].append(taken)
    backend.calls = counted
    plain, gradient, both = (statistics.median(times[name]) for name in kinds)
    both = max(both, gradient)  # which differentiates more; on a small network the clock may say otherwise
    return Price(*(max(1.0, round(each / plain, 2)) for each in (gradient, both)))


def _now(backend: Backend) -> float:
    if backend.device.type == "cuda":
        torch.cuda.synchronize(backend.device)
    return time.perf_counter()


# -- how long a method searches ----------------------------------------------------------------------------


def calls_of_an_image(backend: Backend, sampling: Sampling) -> int:
    """Denoiser calls of one trajectory: some schedulers make more than steps."""
    return len(backend.scheduler(sampling.steps, backend.noise([0])[:, 0]).timesteps)


def length_of(method: Method, path: str) -> int | None:
    """How long a method searches, by its field's name such as "ascent.steps"; None if it has no such number."""
    value: Any = method
    for name in path.split("."):
        value = getattr(value, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def step_cost(config: RunConfig, image_calls: int, price: Price, guided: bool = True) -> float:
    """Weighted calls for each prompt that one step of a search takes at least, as far as its settings tell.

    A search by gradient draws one image for each prompt and differentiates its last K calls; any other draws one
    on each seed. Where a method works otherwise, `watch` alone holds it to the budget.

    Args:
        image_calls: denoiser calls of one image.
        guided: whether guidance has a negative prompt.
    """
    ascent = config.method.ascent
    if ascent is None:
        return float(image_calls * max(1, len(config.seeds)))
    every = ascent.backprop_steps is None or ascent.backprop_steps >= config.sampling.fitting.steps
    depth = float(image_calls if every else ascent.backprop_steps or 0)
    late = config.method.differentiable_calls(image_calls)
    if ascent.random_backprop:  # the mean over all depths up to this one
        depth = sum(min(each, late) for each in range(1, int(depth) + 1)) / int(depth)
    depth = min(depth, late)
    # After the first differentiated call the latents carry gradient too, into both halves of the next.
    first = price.both if config.method.both_halves(guided) else price.gradient
    differentiated = first - 1 + (price.both - 1) * (depth - 1)
    again = depth + ascent.renoised if ascent.recompute else 0
    cost = image_calls + differentiated + again + first * ascent.renoised
    if not config.shared:
        return cost
    return cost * ascent.images(len(config.prompts), len(config.seeds)) / len(config.prompts)


def fit_to(config: RunConfig, path: str, steps: int) -> RunConfig:
    """The settings with the method's length at `steps`."""
    outer, _, inner = path.rpartition(".")
    method: Any = config.method
    if outer:
        changed = dataclasses.replace(getattr(method, outer), **{inner: steps})
        return dataclasses.replace(config, method=dataclasses.replace(method, **{outer: changed}))
    return dataclasses.replace(config, method=dataclasses.replace(method, **{inner: steps}))


def paid(config: RunConfig, budget: int, cost: float) -> int:
    """How many steps `budget` pays for, at `cost` weighted calls each; `InputError` if that is too few to keep one."""
    steps = int((budget + SLACK) // cost)
    turns = config.method.ascent is not None and not config.shared
    seeds = max(1, len(config.seeds)) if turns else 1
    if steps < seeds:
        what = "one step" if seeds == 1 else f"a step on each of {seeds} seeds"
        raise InputError(
            f"budget is {budget}; {what} of {config.method_name!r} needs {cost * seeds:.1f} denoiser calls"
        )
    return steps


# -- while it searches -------------------------------------------------------------------------------------


class Ledger(Counter[str]):
    """`Backend.calls` that refuses the call beyond a limit: the denoiser is then not run."""

    def __init__(self, calls: Mapping[str, int], price: Price, limit: float) -> None:
        self.price, self.limit = price, math.inf
        super().__init__(calls)
        self.limit = price.of(self) + limit

    def update(self, more: Mapping[str, int], /) -> None:  # type: ignore[override]
        """Add a call of several kinds; one that is refused leaves nothing behind."""
        whole = Counter(self)
        whole.update(more)
        if self.price.of(whole) > self.limit + SLACK:
            raise BudgetSpent
        super().update(more)


def watch(
    search: Iterator[Progress], backend: Backend, price: Price, limit: float, earlier: Mapping[str, float]
) -> Iterator[Progress]:
    """Pass on the steps of a search as long as they are paid for; the last one is marked as the last.

    A search ends before a step that costs as much as the one before and is not paid for. A step that turns out
    dearer is broken off at the call beyond the limit, and what it did is dropped.

    Args:
        limit: weighted calls for all prompts of the search together.
        earlier: the ledger of the search before it was interrupted.

    Raises:
        BudgetSpent: what was paid for gives no adapter to keep.
    """
    begun, left = Counter(backend.calls), limit - price.of(earlier)
    backend.calls = ledger = Ledger(begun, price, left)
    spent, enough = 0.0, False
    try:
        for progress in search:
            enough = not progress.keeps_best or progress.step >= progress.over  # every seed had its turn
            before, spent = spent, price.of(ledger) - price.of(begun)
            if spent + (spent - before) > left + SLACK and progress.step < progress.total:
                if not enough:
                    raise BudgetSpent
                yield ended(progress)
                return
            yield progress
    except BudgetSpent:
        if not enough:
            raise
    finally:
        backend.calls = Counter(ledger)


def ended(progress: Progress) -> Progress:
    """The same step as the end of its search; a prompt that has no candidate by now has failed."""
    shared = progress.adapter.prompts is None  # where a prompt may just not have been visited yet
    failed = progress.failed if shared else progress.failed | progress.best.isnan()
    return dataclasses.replace(progress, total=progress.step, failed=failed)
