"""IPGO: inserted prefix and suffix embeddings, found by gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ipgo.adapters import InsertionAdapter
from ipgo.ascent import Ascent
from ipgo.insertion import Insertion
from ipgo.task import Progress, Task
from ipgo.training import maximize

# Chosen by benchmarks/settings.py on the bundled model (docs/settings.md); `paper-code` has the notebook's.
DEFAULT = Ascent(steps=40, lr=5e-3, lr_basis=1e-3, backprop_steps=2, penalty_weight=0.1)


@dataclass(frozen=True)
class IPGO:
    """Learn a few embeddings around each prompt's (arXiv 2503.21812).

    Attributes:
        insertion: what is inserted.
        ascent: how it is found.
    """

    stackable: ClassVar[bool] = True

    insertion: Insertion = Insertion()
    ascent: Ascent = DEFAULT

    def fit(self, task: Task, resume: Mapping[str, Tensor] | None = None) -> Iterator[Progress]:
        adapter = InsertionAdapter.start(
            task.backend,
            task.prompts,
            self.insertion,
            seed=task.seed,
            shared=task.shared,
            sampling=task.sampling,
        )
        return maximize(task, adapter, self.ascent, resume)
