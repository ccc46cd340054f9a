"""DRaFT: the denoiser's weights, found by gradient through the last steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ipgo.adapters import LoRA, WeightAdapter
from ipgo.ascent import Ascent
from ipgo.task import Method, Progress, Task
from ipgo.training import maximize


@dataclass(frozen=True)
class DRaFT(Method):
    """Learn a LoRA of the denoiser, for each prompt or for all (arXiv 2309.17400).

    `ascent.backprop_steps` is the K of DRaFT-K. `ascent.renoised` makes DRaFT-LV of it, which needs the ddim
    scheduler, and `ascent.random_backprop`, with `backprop_steps` None, AlignProp (arXiv 2310.03739). Published with
    the weight decay of AdamW; there is none here.

    Attributes:
        lora: what is learned.
        ascent: how it is found.
    """

    stackable: ClassVar[bool] = False

    lora: LoRA = LoRA()
    ascent: Ascent = Ascent(steps=50, lr=4e-4, lr_decay=1.0, backprop_steps=1, penalty_weight=0.0)

    def both_halves(self, guided: bool) -> bool:
        return True

    def _search(self, task: Task, resume: Mapping[str, Tensor] | None) -> Iterator[Progress]:
        adapter = WeightAdapter.start(
            task.backend, task.prompts, self.lora, seed=task.seed, shared=task.shared
        )
        return maximize(task, adapter, self.ascent, resume)
