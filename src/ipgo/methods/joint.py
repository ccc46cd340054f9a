"""Joint: inserted embeddings and initial noise, found by one gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ipgo.adapters import InsertionAdapter, JointAdapter, NoiseAdapter
from ipgo.ascent import Ascent
from ipgo.errors import InputError
from ipgo.insertion import Insertion
from ipgo.task import Method, Progress, Task
from ipgo.training import maximize

# What gains most on the noise that is learned (docs/settings.md): four times IPGO's rate, which the noise shares, twice
# that of its basis, `start` twice as large, and the gradient through every step, which the noise wants: a budget of 400
# pays for 25 steps, and for 40 of IPGO. Half these rates gain as much as IPGO, and keep more of it on other noise.
DEFAULT = Ascent(steps=50, lr=2e-2, lr_basis=2e-3, backprop_steps=None)
INSERTED = Insertion(start=0.2)


@dataclass(frozen=True)
class Joint(Method):
    """Learn IPGO's embeddings and ReNO's initial noise of each prompt at once (arXiv 2503.21812, 2406.04312).

    One gradient through the whole trajectory moves both. PG-MAP (arXiv 2606.22958) also moves condition and
    latents together, but afresh at each denoising step.

    Attributes:
        insertion: what is inserted.
        noise_weight: weight of the noise's norm in the penalty, relative to 1 for the conformity of the embeddings.
        ascent: how both are found.
    """

    one_seed: ClassVar[bool] = True

    insertion: Insertion = INSERTED
    noise_weight: float = 0.1  # times Ascent.penalty_weight of 0.1 it is ReNO's 1e-2
    ascent: Ascent = DEFAULT

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.noise_weight >= 0:
            raise InputError(f"noise_weight is {self.noise_weight}; it must be at least 0")

    def both_halves(self, guided: bool) -> bool:
        return True

    def _search(self, task: Task, resume: Mapping[str, Tensor] | None) -> Iterator[Progress]:
        backend, prompts, shared = task.backend, task.prompts, task.shared
        inserted = InsertionAdapter.start(
            backend, prompts, self.insertion, seed=task.seed, shared=shared, sampling=task.sampling
        )
        initial = NoiseAdapter.start(backend, prompts, task.seeds, shared=shared, penalty="norm")
        adapter = JointAdapter.join(inserted, initial, self.noise_weight)
        return maximize(task, adapter, self.ascent, resume)
