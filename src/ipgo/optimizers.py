"""Optimisers that need values alone: they ask for a point of the box [-1, 1]^D, and are told what it is worth.

The first point that they ask for is the middle of the box.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from ipgo.errors import InputError, MissingExtraError, ResumeError
from ipgo.seeding import derive

REPRODUCED = 1e-6  # how far an optimiser that is run again may stray from the points that it asked for


class AskTell(Protocol):
    """Higher is better. Points are float64 (D,) on the CPU."""

    def ask(self) -> Tensor:
        """The next point; the same one until `tell`."""
        ...

    def tell(self, point: Tensor, value: float) -> None:
        """What the point of the last `ask` is worth; NaN if that is not known."""
        ...

    def replay(self, points: Sequence[Tensor], values: Sequence[float]) -> None:
        """Bring a fresh optimiser to where another one was after these; `ResumeError` if it cannot get there."""
        ...


class CMA:
    """CMA-ES (Hansen, arXiv 1604.00772), as the package cma has it, from the middle of the box.

    Args:
        spread: the standard deviation of the first generation.
        population: points in a generation; None is 4 + 3 ln D.
    """

    def __init__(self, size: int, seed: int, *, spread: float = 0.5, population: int | None = None) -> None:
        need("cma")
        import cma

        if size < 2:
            raise InputError(f"optimizer is 'cma', which needs at least 2 numbers to search for, not {size}")
        source = np.random.default_rng(seed)
        options: dict[str, Any] = {
            "bounds": [-1, 1],
            # A source of its own: by default all instances share numpy's global one.
            "randn": lambda count, length: source.standard_normal((count, length)),
            "seed": math.nan,
            "verbose": -9,
        }
        if population is not None:
            options["popsize"] = population
        self.middle = np.zeros(size)
        self.strategy = cma.CMAEvolutionStrategy(self.middle, spread, options)
        self.generation: list[Any] = []
        self.values: list[float] = []

    def ask(self) -> Tensor:
        if len(self.values) == len(self.generation):
            first = not self.generation
            self.generation, self.values = self.strategy.ask(), []
            if first:
                self.generation[0] = self.middle
        return torch.from_numpy(np.array(self.generation[len(self.values)], np.float64))

    def tell(self, point: Tensor, value: float) -> None:
        self.values.append(value)
        if len(self.values) < len(self.generation):
            return
        worst = min((each for each in self.values if math.isfinite(each)), default=0.0)
        costs = [-(each if math.isfinite(each) else worst) for each in self.values]
        self.strategy.tell(self.generation, costs)

    def replay(self, points: Sequence[Tensor], values: Sequence[float]) -> None:
        for point, value in zip(points, values, strict=True):
            if not torch.allclose(self.ask(), point, rtol=0, atol=REPRODUCED):
                raise ResumeError(
                    "cma asks for points other than those in this checkpoint; "
                    "continue with the version of cma that began it"
                )
            self.tell(point, value)


class TuRBO:
    """Bayesian optimisation in a trust region, one point at a time (TuRBO-1, arXiv 1910.01739).

    A Gaussian process with a Matern 5/2 kernel is fitted to what was told; Thompson sampling picks a point in a
    box around the best one. The box doubles after successes in a row, halves after failures, and where it gets
    too small, all begins again elsewhere. Every `ask` depends on what was told alone.

    Args:
        initial: points of a Sobol sequence that a region begins with; None is 2 D, as in the paper.
    """

    LENGTH, SMALLEST, LARGEST = 0.8, 2.0**-7, 1.6  # of the region, where the side of the whole box is 1
    SUCCESSES = 3  # in a row, before it doubles
    GAIN = 1e-3  # relative to the best value: more is a success
    CANDIDATES = 1000
    CHANGED = 20  # coordinates in which a candidate differs from the best point, on average

    def __init__(self, size: int, seed: int, *, initial: int | None = None) -> None:
        need("botorch")
        self.size, self.seed, self.initial = size, seed, initial or 2 * size
        self.failures_allowed = max(4, size)
        self.told = self.region = 0
        self._begin()

    def _begin(self) -> None:
        self.points: list[Tensor] = []
        self.values: list[float] = []
        self.length, self.successes, self.failures = self.LENGTH, 0, 0

    def ask(self) -> Tensor:
        if len(self.points) < self.initial or not any(map(math.isfinite, self.values)):
            if not self.told:
                return torch.zeros(self.size, dtype=torch.float64)
            own = derive(self.seed, "region", self.region) % 2**31
            return self._sobol(len(self.points) + 1, own)[-1] * 2 - 1
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numerical trouble, which botorch answers by fitting again
            torch.default_generator.manual_seed(derive(self.seed, "point", self.told))  # the CPU's alone
            return self._sample() * 2 - 1

    def _sample(self) -> Tensor:
        """A point (D,) of the unit cube, by Thompson sampling."""
        from botorch.fit import fit_gpytorch_mll
        from botorch.generation import MaxPosteriorSampling
        from botorch.models import SingleTaskGP
        from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
        from gpytorch.mlls import ExactMarginalLogLikelihood

        points = (torch.stack(self.points) + 1) / 2
        values = torch.tensor(self._known(), dtype=torch.float64)[:, None]
        kernel = get_covar_module_with_dim_scaled_prior(self.size, use_rbf_kernel=False)
        model = SingleTaskGP(points, values, covar_module=kernel)
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        with torch.no_grad():
            scales = kernel.lengthscale.squeeze(0)
            # Of the same volume, whatever the scales.
            sides = self.length * scales / scales.log().mean().exp()
            center = points[int(values.argmax())]
            low, high = (center - sides / 2).clamp(0, 1), (center + sides / 2).clamp(0, 1)
            spread = self._sobol(self.CANDIDATES, derive(self.seed, "candidates", self.told) % 2**31)
            candidates = low + (high - low) * spread
            changed = torch.rand(candidates.shape) < min(1.0, self.CHANGED / self.size)
            rows = torch.arange(self.CANDIDATES)
            changed[rows, torch.randint(self.size, (self.CANDIDATES,))] = True  # one at least
            candidates = torch.where(changed, candidates, center)
            chosen: Tensor = MaxPosteriorSampling(model, replacement=False)(candidates, num_samples=1)[0]
            return chosen

    def _sobol(self, count: int, seed: int) -> Tensor:
        """(count, D): a scrambled Sobol sequence in the unit cube."""
        engine: Any = SobolEngine
        points: Tensor = engine(self.size, scramble=True, seed=seed).draw(count, dtype=torch.float64)
        return points

    def _known(self) -> list[float]:
        """The values, with the worst one in place of those that are not known."""
        worst = min(each for each in self.values if math.isfinite(each))
        return [each if math.isfinite(each) else worst for each in self.values]

    def tell(self, point: Tensor, value: float) -> None:
        best = max((each for each in self.values if math.isfinite(each)), default=-math.inf)
        searching = len(self.points) >= self.initial
        self.told += 1
        self.points.append(point.clone())
        self.values.append(value)
        if not searching:
            return
        success = value > best + self.GAIN * abs(best) or (math.isinf(best) and math.isfinite(value))
        self.successes = self.successes + 1 if success else 0
        self.failures = 0 if success else self.failures + 1
        if self.successes == self.SUCCESSES:
            self.length, self.successes = min(2 * self.length, self.LARGEST), 0
        elif self.failures == self.failures_allowed:
            self.length, self.failures = self.length / 2, 0
        if self.length < self.SMALLEST:
            self.region += 1
            self._begin()

    def replay(self, points: Sequence[Tensor], values: Sequence[float]) -> None:
        for point, value in zip(points, values, strict=True):
            self.tell(point, value)


def need(package: str) -> None:
    """Raise `MissingExtraError` if an optional package is not installed."""
    if importlib.util.find_spec(package) is None:
        extra = {"cma": "blackbox", "botorch": "bayes"}[package]
        raise MissingExtraError(f'this optimizer needs the {package} package: pip install "ipgo[{extra}]"')
