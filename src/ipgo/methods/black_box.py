"""Black-box IPGO: inserted embeddings for a reward that has no gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ipgo.adapters import Adapter, InsertionAdapter
from ipgo.errors import InputError, unknown
from ipgo.insertion import Insertion
from ipgo.optimizers import CMA, AskTell, TuRBO, need
from ipgo.search import search
from ipgo.seeding import derive
from ipgo.task import Method, Progress, Request, Task

Search = Literal["cma", "bayes"]

# 2 x 2 x (8 coefficients + 2 angles) = 40 numbers. As long as the prompt's own embeddings: without a gradient that
# would turn the basis, small ones could change little (docs/settings.md).
FEW = Insertion(num_prefix=2, num_suffix=2, rank=8, norm=1.0, start=1.0, negative=False)


@dataclass(frozen=True)
class BlackBoxIPGO(Method):
    """Search IPGO's coefficients and angles in a fixed random basis, for any reward (arXiv 2503.21812).

    Every row has an optimiser of its own. Candidates are drawn on every seed of the task, in `sampling.fit_steps`
    steps: one seed leaves the most of them, and is the default.

    Attributes:
        insertion: what is inserted; its basis, and a bias if it has one, stay as they are drawn.
        optimizer: cma (CMA-ES, with the extra `blackbox`), or bayes (Bayesian optimisation in a trust region,
            TuRBO, with the extra `bayes`).
        candidates: images to draw for each prompt and seed.
        spread: cma: the standard deviation of the first generation, where coefficients go from -1 to 1.
        population: cma: candidates of a generation; null is 4 + 3 ln D for D numbers.
        initial: bayes: candidates before the first model of the reward; null is 2 D, but no more than half of all.
    """

    # Each candidate is drawn on all seeds: with one there are more candidates.
    prefers_one_seed: ClassVar[bool] = True

    insertion: Insertion = FEW
    optimizer: Search = "cma"
    candidates: int = 200
    spread: float = 0.5
    population: int | None = None
    initial: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.insertion.basis == "free":
            raise InputError(
                "insertion.basis is 'free'; this method searches the coefficients of a fixed basis, "
                "so it must be 'orthonormal'"
            )
        if self.insertion.pooled:
            raise InputError(
                "insertion.pooled is true; this method searches coefficients and angles, which a vector has not"
            )
        if self.optimizer not in get_args(Search):
            raise unknown("optimizer", self.optimizer, get_args(Search))
        for field, least in (("candidates", 1), ("population", 4), ("initial", 2)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise InputError(f"{field} is {value}; it must be at least {least}")
        if not 0 < self.spread <= 2 / 3:
            raise InputError(f"spread is {self.spread}; it must be above 0 and at most 2/3")

    def check(self, request: Request) -> None:
        """Before a model is loaded: `MissingExtraError` without the optimiser's package."""
        need("cma" if self.optimizer == "cma" else "botorch")

    def _search(self, task: Task, resume: Mapping[str, Tensor] | None) -> Iterator[Progress]:
        adapter = InsertionAdapter.start(
            task.backend,
            task.prompts,
            self.insertion,
            seed=task.seed,
            shared=task.shared,
            sampling=task.sampling,
        )
        keys = [""] if task.shared else task.prompts
        size = sum(parameter[0].numel() for parameter, _ in searched(adapter))
        optimizers = [self.make(size, derive(task.seed, "optimizer", key)) for key in keys]
        return search(task, adapter, _Points(optimizers, size, self.candidates), self.candidates, resume)

    def make(self, size: int, seed: int) -> AskTell:
        """A fresh optimiser of `size` numbers."""
        if self.optimizer == "cma":
            return CMA(size, seed, spread=self.spread, population=self.population)
        most = max(2, self.candidates // 2)  # a budget may leave few, and a search begins with the model
        return TuRBO(size, seed, initial=self.initial or min(2 * size, most))


def searched(adapter: InsertionAdapter) -> list[tuple[nn.Parameter, float]]:
    """The parameters (N, ...) that are searched, each with its largest value."""
    found = []
    for side in adapter.sides():
        assert side.coefficients is not None
        found.append((side.coefficients, 1.0))
        if side.angles is not None and side.insertion.rotations == "applied":
            found.append((side.angles, math.pi))
    return found


class _Points:
    """One optimiser for each row, and all that it was told: a checkpoint holds that, and is replayed."""

    def __init__(self, optimizers: list[AskTell], size: int, total: int) -> None:
        self.optimizers = optimizers
        self.told = torch.zeros((), dtype=torch.long)
        self.points = torch.full((len(optimizers), total, size), math.nan, dtype=torch.float64)
        self.rewards = torch.full((len(optimizers), total), math.nan, dtype=torch.float64)
        self.memory = {"told": self.told, "points": self.points, "rewards": self.rewards}

    def propose(self, adapter: Adapter, step: int) -> None:
        assert isinstance(adapter, InsertionAdapter)
        points = torch.stack([optimizer.ask() for optimizer in self.optimizers])  # (N, D)
        self.points[:, step] = points
        start = 0
        for parameter, most in searched(adapter):
            count = parameter[0].numel()
            parameter.copy_(most * points[:, start : start + count].reshape(parameter.shape))
            start += count

    def tell(self, step: int, rewards: Tensor) -> None:
        self.rewards[:, step] = rewards.double()
        for row, optimizer in enumerate(self.optimizers):
            optimizer.tell(self.points[row, step], float(self.rewards[row, step]))
        self.told += 1

    def resumed(self) -> None:
        """Tell fresh optimisers all that the earlier ones were told."""
        for row, optimizer in enumerate(self.optimizers):
            optimizer.replay(list(self.points[row, : self.told]), self.rewards[row, : self.told].tolist())
