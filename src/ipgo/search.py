"""The one loop without gradients: propose, draw, score, keep the best."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ipgo.adapters import Adapter
from ipgo.resume import all_tensors, copied, fill
from ipgo.task import Progress, Task


class Proposer(Protocol):
    """Where candidates come from. An adapter has N rows: one for each prompt, or one that all share."""

    @property
    def memory(self) -> Mapping[str, Tensor]:
        """All that a search resumes from with the same bits: always the same tensors, which are changed in place."""
        ...

    def propose(self, adapter: Adapter, step: int) -> None:
        """Write the candidate of `step` (0 is the first) into the rows of `adapter`, over the one before."""
        ...

    def tell(self, step: int, rewards: Tensor) -> None:
        """Learn the scores (N,) of the candidate of `step`: on the CPU, NaN where an image was not finite."""
        ...

    def resumed(self) -> None:
        """The memory was filled with that of an earlier search: catch up with it."""
        ...


def search(
    task: Task, adapter: Adapter, proposer: Proposer, total: int, resume: Mapping[str, Tensor] | None = None
) -> Iterator[Progress]:
    """Draw and score `total` candidates, and keep the best; yield each. The reward needs no gradient.

    A candidate is drawn for every prompt on every seed of the task (or, if it has none, on noise that is derived
    for each prompt and step: luck then takes part in what is kept). A prompt's reward is the mean over seeds.
    With one row for each prompt every row is kept or not on its own; with one row in all its score is the mean
    over prompts. A score that is not finite never wins.

    In each `Progress`, `best` holds the prompts' rewards under the candidate that is kept, `images` those of the
    last seed, and at the last step `failed` says which prompts never had a finite score. Where each prompt is at the
    reward's ceiling (`Task.most`) the search ends early.

    Args:
        adapter: where candidates are written; as it is given, it is what a row falls back on.
        resume: what `Progress.state()` returned; the search goes on with the same bits.

    Raises:
        RewardError: a reward that breaks its contract. ResumeError: a state of another search.
    """
    work = _Search(task, adapter, proposer, total)
    if resume is not None:
        work.load(resume)
    return work.run()


class _Search:
    """The state of one search: the candidate, the best so far, and the rewards (P,) of that."""

    def __init__(self, task: Task, adapter: Adapter, proposer: Proposer, total: int) -> None:
        self.task, self.proposer, self.total = task, proposer, total
        self.adapter = adapter.to(task.backend.device).requires_grad_(False)
        self.kept = copy.deepcopy(self.adapter)
        with torch.no_grad():
            self.original = task.encoded()
        self.memory = {
            "step": torch.zeros((), dtype=torch.long),
            "best": torch.full((len(task.prompts),), torch.nan),
        }

    @property
    def step(self) -> int:
        return int(self.memory["step"])

    @property
    def best(self) -> Tensor:
        return self.memory["best"]

    def run(self) -> Iterator[Progress]:
        none = torch.zeros(len(self.task.prompts))
        while self.step < self.total:
            with torch.no_grad():
                self.proposer.propose(self.adapter, self.step)
                rewards, images = self._draw()
                self._keep(rewards)
                self.proposer.tell(self.step, self._by_row(rewards))
            self.memory["step"] += 1
            total = self.step if self._at_the_ceiling() else self.total
            yield Progress(
                step=self.step,
                total=total,
                rewards=rewards,
                best=self.best.clone(),
                penalty=none,
                grad_norm=none,
                failed=self.best.isnan() if self.step == total else none.bool(),
                images=images,
                adapter=self.kept,
                state=self.state,
            )
            if self.step == total:
                return

    def _at_the_ceiling(self) -> bool:
        """Has every prompt all that its reward can give, on all seeds? On noise that is always new, nobody knows."""
        if not self.task.seeds:
            return False
        most = torch.full((max(1, len(self.task.seeds)), len(self.best)), self.task.most)
        return bool((self.best >= most.mean(0)).all())  # the mean is rounded as that of the rewards

    def _draw(self) -> tuple[Tensor, Tensor]:
        """The candidate's rewards (P,), and its images from the last seed."""
        task, rewards = self.task, []
        fixed = [[seed] * len(task.prompts) for seed in task.seeds]
        for seeds in fixed or [task.noise_seeds(task.prompts, self.step)]:
            scores, images = task.draw_and_score(self.adapter, seeds, self.original)
            rewards.append(scores)
        return torch.stack(rewards).mean(0), images

    def _keep(self, rewards: Tensor) -> None:
        """Copy the rows that are better than all before."""
        scores = self._by_row(rewards)
        better = scores.isfinite() & ~(scores <= self._by_row(self.best))
        self.best.copy_(torch.where(better, rewards, self.best))
        self.kept.take_rows_(self.adapter, better)

    def _by_row(self, rewards: Tensor) -> Tensor:
        """(P,) to the (N,) scores of the adapter's rows."""
        return rewards.mean(0, keepdim=True) if self.adapter.prompts is None else rewards

    def _tensors(self) -> dict[str, Tensor]:
        own = all_tensors(self.memory, self.adapter, self.kept)
        return own | {f"proposer.{name}": value for name, value in self.proposer.memory.items()}

    def state(self) -> dict[str, Tensor]:
        return copied(self._tensors())

    def load(self, state: Mapping[str, Tensor]) -> None:
        fill(self._tensors(), state)
        self.proposer.resumed()
