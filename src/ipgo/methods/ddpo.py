"""DDPO: the denoiser's weights, found by policy gradient over the steps of sampling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ipgo.adapters import LoRA, WeightAdapter
from ipgo.policy import reinforce
from ipgo.ppo import PPO
from ipgo.task import Method, Progress, Task


@dataclass(frozen=True)
class DDPO(Method):
    """Learn a LoRA of the denoiser by PPO, from rewards without gradients (arXiv 2305.13301).

    Needs the ddim scheduler. The fit draws its own noise, not that of the task's seeds.

    Attributes:
        lora: what is learned.
        ppo: how it is found.
    """

    stackable: ClassVar[bool] = False

    lora: LoRA = LoRA(rank=4)
    ppo: PPO = PPO()

    def _search(self, task: Task, resume: Mapping[str, Tensor] | None) -> Iterator[Progress]:
        adapter = WeightAdapter.start(
            task.backend, task.prompts, self.lora, seed=task.seed, shared=task.shared
        )
        return reinforce(task, adapter, self.ppo, resume)
