"""ReNO: the initial noise, found by gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ipgo.adapters import NoiseAdapter
from ipgo.ascent import Ascent
from ipgo.task import Method, Progress, Task
from ipgo.training import maximize

# As published, for a one-step model with 16,384 latents. backprop_steps=None: through every step there is.
PUBLISHED = Ascent(
    steps=50,
    optimizer="sgd",
    lr=5.0,
    lr_decay=1.0,
    max_grad_norm=0.1,
    backprop_steps=None,
    penalty_weight=0.01,
)


@dataclass(frozen=True)
class ReNO(Method):
    """Learn each prompt's initial noise, kept at the norm that noise has (arXiv 2406.04312).

    Attributes:
        ascent: how it is found; the penalty is minus the log-density of the noise's norm.
    """

    one_seed: ClassVar[bool] = True

    ascent: Ascent = PUBLISHED

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ascent.check_noise()

    def both_halves(self, guided: bool) -> bool:
        return True

    def _search(self, task: Task, resume: Mapping[str, Tensor] | None) -> Iterator[Progress]:
        adapter = NoiseAdapter.start(
            task.backend, task.prompts, task.seeds, shared=task.shared, penalty="norm"
        )
        return maximize(task, adapter, self.ascent, resume)
