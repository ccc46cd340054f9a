"""What is asked of a method, and what it reports while it works."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ipgo.adapters import Adapter, draw_batch
from ipgo.ascent import Ascent
from ipgo.backends import Backend
from ipgo.devices import own_numbers
from ipgo.embeds import PromptEmbeds, concatenate
from ipgo.errors import InputError
from ipgo.insertion import Insertion
from ipgo.prompts import check_prompts
from ipgo.rewards import Reward, score
from ipgo.sampling import Sampling
from ipgo.seeding import check_seeds, derive, repeated
from ipgo.typed import check_types


@dataclass(frozen=True)
class Task:
    """What a method is to do: maximise a reward over the images of some prompts.

    Attributes:
        backend, reward: what draws, and what scores. The reward gets the user's prompts.
        prompts: P distinct prompts.
        sampling: how images are sampled during the fit; `fit_steps` is ignored: give what `Sampling.for_fit` returns.
        seeds: noise seeds, which gradient steps use in turn; empty: fresh noise at every step.
        seed: where initial values and every other choice derive from.
        shared: False is prompt-wise, one row for each prompt; True is prompt-batch, one row for all.
        chunk: at most so many prompts are encoded or drawn at once, where the method has no batches of its own; None:
            all of them. Affects memory, and results by no more than rounding.
    """

    backend: Backend
    reward: Reward
    prompts: tuple[str, ...]
    sampling: Sampling = Sampling()
    seeds: tuple[int, ...] = (0,)
    seed: int = 0
    shared: bool = False
    chunk: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.reward, Reward):
            raise InputError("task.reward is not a reward; make one of a function with as_reward(function)")
        check_types(self, "task.")
        check_prompts(self.prompts)
        check_seeds(self.seeds)
        if self.chunk is not None and self.chunk < 1:
            raise InputError(f"task.chunk is {self.chunk}; it must be at least 1")

    @property
    def most(self) -> float:
        """The reward's ceiling, where nothing is left to gain; without one, infinity."""
        return float(getattr(self.reward, "most", math.inf))

    def noise_seeds(self, prompts: Sequence[str], step: int, before: Sequence[int] = ()) -> list[int]:
        """The seed of each prompt's noise at a step of the fit.

        Args:
            before: how often each was drawn before in the same step, where there are few to draw from; () is never.
        """
        counts = before or [0] * len(prompts)
        if self.seeds:
            return [self.seeds[(step + count) % len(self.seeds)] for count in counts]
        own = [derive(self.seed, "noise", prompt, step) for prompt in prompts]
        return list(map(repeated, own, counts))

    def encoded(self) -> PromptEmbeds:
        """All prompts as they are."""
        parts = [self.backend.encode(self.prompts[part]) for part in self._parts()]
        return parts[0] if len(parts) == 1 else concatenate(parts)

    @torch.no_grad()
    def draw_and_score(
        self, adapter: Adapter, seeds: Sequence[int], original: PromptEmbeds
    ) -> tuple[Tensor, Tensor]:
        """Draw each prompt from its seed: the rewards (P,), on the CPU, and the images.

        Args:
            original: what `encoded` returned.
        """
        rewards, images = [], []
        for part in self._parts():
            prompts = list(self.prompts[part])
            rows = torch.arange(part.start, part.start + len(prompts), device=self.backend.device)
            drawn = draw_batch(
                self.backend, prompts, seeds[part], adapter, self.sampling, original.select(rows)
            )
            rewards.append(score(self.reward, drawn, prompts).detach().cpu().float())
            images.append(drawn)
        return torch.cat(rewards), torch.cat(images)

    def _parts(self) -> list[slice]:
        size = self.chunk or len(self.prompts)
        return [slice(start, start + size) for start in range(0, len(self.prompts), size)]


@dataclass(frozen=True)
class Request:
    """What a task will be, as far as that is known before a model is loaded.

    Attributes:
        prompts: all of them, or those that are fitted together.
        reward, backend: their names.
        sampling, shared: as in `Task`.
        padding: as in `load_backend`.
    """

    prompts: Sequence[str]
    reward: str
    backend: str
    sampling: Sampling = Sampling()
    shared: bool = False
    padding: str = "max_length"


FRESH = 10  # steps, of which the mean reward says something although noise or prompts change


@dataclass(frozen=True)
class Progress:
    """Where a fit stands after a step. Tensors have one entry for each of P prompts and are on the CPU.

    Attributes:
        step, total: steps done, and to do in all.
        rewards: (P,) of this step; shared: of each prompt's last visit, NaN before the first.
        best: (P,) of the rows in `adapter`: the highest so far (NaN before there is a candidate), or the
            latest where rewards of different steps cannot be compared (`keeps_best`).
        penalty, grad_norm: (P,) of this step, before weighting and clipping.
        failed: (P,) bool, rows that were given up.
        images: (P, 3, H, W) of this step, detached, on the backend's device; None where a step draws some
            prompts only (shared).
        adapter: each row's best so far, ready for `generate`; or the latest, as in `best`, and with the update that
            this step's gradient gave. The same object at each step: copy it to keep it.
        state: returns all that `resume` needs; call it before the next step begins.
        over: number of consecutive steps whose mean reward is comparable with that of others: 1 where each step draws
            the same noise, S where S seeds are used in turn, `FRESH` where noise or prompts change at each step.
        keeps_best: whether `adapter` and `best` are the best so far. If not, they are the latest.
    """

    step: int
    total: int
    rewards: Tensor
    best: Tensor
    penalty: Tensor
    grad_norm: Tensor
    failed: Tensor
    images: Tensor | None
    adapter: Adapter
    state: Callable[[], dict[str, Tensor]]
    over: int = 1
    keeps_best: bool = True

    def numbers(self, shared: bool) -> list[dict[str, float | None]]:
        """For each prompt, or with `shared` their mean alone: reward, penalty, grad_norm, best; None where
        unknown, or not finite as a gradient that has overflowed, which JSON has no number for.

        `best` is None, too, where it is not kept.
        """
        best = self.best if self.keeps_best else torch.full_like(self.best, math.nan)
        columns = torch.stack([self.rewards, self.penalty, self.grad_norm, best]).double().cpu()  # (4, P)
        if shared:
            columns = columns.nanmean(1, keepdim=True)
        names = ("reward", "penalty", "grad_norm", "best")
        return [
            {name: value if math.isfinite(value) else None for name, value in zip(names, values, strict=True)}
            for values in columns.T.tolist()
        ]


@dataclass(frozen=True)
class Method:
    """What every method is: a frozen dataclass of hyperparameters that knows how to search.

    Attributes:
        stackable: can one fit hold the rows of many prompts?
        one_seed: does it learn the noise of exactly one seed?
        prefers_one_seed: does it do better on one seed, though several are allowed?
        prompt_wise: does it fit each prompt by itself, so that it cannot be shared?
    """

    stackable: ClassVar[bool] = True
    one_seed: ClassVar[bool] = False
    prefers_one_seed: ClassVar[bool] = False
    prompt_wise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def ascent(self) -> Ascent | None:
        """The settings of the gradient loop, of a method that has one."""
        return None

    @property
    def insertion(self) -> Insertion | None:
        """The settings of inserted embeddings, of a method that learns some."""
        return None

    @property
    def climbing(self) -> bool:
        """Does it follow the reward's gradient?"""
        return self.ascent is not None

    def both_halves(self, guided: bool) -> bool:
        """Does its gradient go through both halves of guidance from the first differentiated call on?

        Args:
            guided: whether there are two; what is learned of the images or the denoiser counts as both in any case.
        """
        return self.insertion is not None and bool(self.insertion.decided(guided).negative)

    def differentiable_calls(self, image_calls: int) -> int:
        """How many of an image's denoiser calls, the last ones, what it learns takes part in."""
        return image_calls

    def check(self, request: Request) -> None:
        """Raise `InputError`, before a model is loaded, for what it cannot do."""

    def fit(self, task: Task, resume: Mapping[str, Tensor] | None = None) -> Iterator[Progress]:
        """Search, and yield one `Progress` per step.

        Args:
            resume: what `Progress.state()` of an earlier fit to the same task returned; the fit continues after it.

        Raises:
            InputError: a task that the method cannot do. RewardError: a reward that breaks its contract.
            ResumeError: a state of another fit.
        """
        with torch.inference_mode(False), own_numbers():
            search = self._search(task, resume)
        return _undisturbed(search)

    def _search(self, task: Task, resume: Mapping[str, Tensor] | None) -> Iterator[Progress]:
        """What each method does in its `fit`."""
        raise NotImplementedError


def _undisturbed(steps: Iterator[Progress]) -> Iterator[Progress]:
    """The same, whatever the caller has set; between steps, that holds again."""
    while True:
        with torch.inference_mode(False), own_numbers():
            progress = next(steps, None)
        if progress is None:
            return
        yield progress
