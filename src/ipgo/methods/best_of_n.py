"""Best-of-N: draw, score, keep the best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ipgo.adapters import Adapter, NoiseAdapter
from ipgo.errors import InputError
from ipgo.search import search
from ipgo.seeding import derive
from ipgo.task import Method, Progress, Task


@dataclass(frozen=True)
class BestOfN(Method):
    """Draw each prompt from N noises and keep the best one. Needs no gradient.

    Candidates are drawn in `sampling.fit_steps` steps, and the one that is kept again in all of them.

    Attributes:
        n: candidates for each prompt; the first is the seed's own noise.
    """

    one_seed: ClassVar[bool] = True

    n: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1:
            raise InputError(f"n is {self.n}; it must be at least 1")

    def _search(self, task: Task, resume: Mapping[str, Tensor] | None) -> Iterator[Progress]:
        steps = task.sampling.noise_steps(task.backend)
        adapter = NoiseAdapter.start(task.backend, task.prompts, task.seeds, shared=task.shared, steps=steps)
        return search(task, adapter, _Noises(task), self.n, resume)


@dataclass(frozen=True)
class _Noises:
    """The seed's own noise, and then noise that is derived for each prompt and step."""

    memory: ClassVar[Mapping[str, Tensor]] = {}

    task: Task

    def propose(self, adapter: Adapter, step: int) -> None:
        assert isinstance(adapter, NoiseAdapter)
        task = self.task
        seeds = [
            derive(task.seed, "candidate", prompt, step) if step else task.seeds[0] for prompt in task.prompts
        ]
        adapter.latents.copy_(task.backend.noise(seeds, task.sampling.noise_steps(task.backend)))

    def tell(self, step: int, rewards: Tensor) -> None:
        """Nothing is learned: candidates do not depend on one another."""

    def resumed(self) -> None:
        """Nothing is remembered."""
