"""The prompt as it is: the baseline of every method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ipgo.adapters import Adapter
from ipgo.task import Method, Progress, Task


@dataclass(frozen=True)
class Raw(Method):
    """Change nothing: draw each prompt once for each seed, and score it."""

    def _search(self, task: Task, resume: Mapping[str, Tensor] | None) -> Iterator[Progress]:
        adapter, rewards = Adapter(), []
        with torch.no_grad():
            original = task.encoded()
        for turn in range(max(1, len(task.seeds))):
            seeds = task.noise_seeds(task.prompts, turn)
            scores, images = task.draw_and_score(adapter, seeds, original)
            rewards.append(scores)
        mean = torch.stack(rewards).mean(0)
        none = torch.zeros(len(task.prompts))
        yield Progress(
            step=1,
            total=1,
            rewards=mean,
            best=mean,
            penalty=none,
            grad_norm=none,
            failed=~mean.isfinite(),
            images=images,
            adapter=adapter,
            state=dict,
        )
