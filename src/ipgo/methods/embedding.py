"""The whole prompt as free embeddings: IPGO without its parameterisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ipgo.adapters import EmbeddingAdapter
from ipgo.adapters.embedding import check_padding
from ipgo.ascent import Ascent
from ipgo.task import Method, Progress, Request, Task
from ipgo.training import maximize


@dataclass(frozen=True)
class Embedding(Method):
    """Learn all states of each prompt, freely (after PEO, arXiv 2510.02599).

    Unlike there, the reward alone is climbed, without the cosine of picture and text; through the last two steps,
    not through all; and gradients are clipped.

    Attributes:
        ascent: how they are found; the penalty is how far the state at the end of the text turns.
    """

    prompt_wise: ClassVar[bool] = True

    ascent: Ascent = Ascent(steps=50, lr=8e-3, lr_decay=1.0, penalty_weight=0.5)

    def check(self, request: Request) -> None:
        """Before a model is loaded: `InputError` for prompts without padding."""
        check_padding(request.padding)

    def _search(self, task: Task, resume: Mapping[str, Tensor] | None) -> Iterator[Progress]:
        adapter = EmbeddingAdapter.start(task.backend, task.prompts, shared=task.shared)
        return maximize(task, adapter, self.ascent, resume)
