"""IPGO: inserted prefix and suffix embeddings, found by gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ipgo.adapters import InsertionAdapter
from ipgo.ascent import Ascent
from ipgo.insertion import Insertion
from ipgo.task import Method, Progress, Task
from ipgo.training import maximize


@dataclass(frozen=True)
class IPGO(Method):
    """Learn a few embeddings around each prompt's (arXiv 2503.21812).

    Its defaults were chosen by benchmarks/settings.py on the bundled model (docs/settings.md); the preset `paper-code`
    has the notebook's.

    Attributes:
        insertion: what is inserted.
        ascent: how it is found.
    """

    insertion: Insertion = Insertion()
    ascent: Ascent = Ascent()

    def _search(self, task: Task, resume: Mapping[str, Tensor] | None) -> Iterator[Progress]:
        adapter = InsertionAdapter.start(
            task.backend,
            task.prompts,
            self.insertion,
            seed=task.seed,
            shared=task.shared,
            sampling=task.sampling,
        )
        return maximize(task, adapter, self.ascent, resume)
