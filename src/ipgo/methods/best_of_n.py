"""Best-of-N: draw, score, keep the best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ipgo.adapters import Adapter, NoiseAdapter, generate
from ipgo.errors import InputError, ResumeError
from ipgo.rewards import score
from ipgo.seeding import derive
from ipgo.task import Progress, Task


@dataclass(frozen=True)
class BestOfN:
    """Draw each prompt from N noises and keep the best one. Needs no gradient.

    Attributes:
        n: candidates for each prompt; the first is the seed's own noise.
        budget: denoiser calls for each prompt, which set N in place of `n`.
    """

    stackable: ClassVar[bool] = True

    n: int = 16
    budget: int | None = None

    def __post_init__(self) -> None:
        for field, value in (("n", self.n), ("budget", self.budget)):
            if value is not None and value < 1:
                raise InputError(f"{field} is {value}; it must be at least 1")

    def candidates(self, task: Task) -> int:
        """N; `InputError` if the budget does not pay for one image."""
        if self.budget is None:
            return self.n
        # Some schedulers make more calls than steps.
        calls = len(task.backend.scheduler(task.sampling.steps, task.backend.noise([0])[:, 0]).timesteps)
        if self.budget < calls:
            raise InputError(f"budget is {self.budget}; one image takes {calls} denoiser calls")
        return self.budget // calls

    def fit(self, task: Task, resume: Mapping[str, Tensor] | None = None) -> Iterator[Progress]:
        steps = task.sampling.noise_steps
        adapter = NoiseAdapter.start(task.backend, task.prompts, task.seeds, shared=task.shared, steps=steps)
        search = _Search(task, adapter.requires_grad_(False), self.candidates(task))
        if resume is not None:
            search.load(resume)
        return search.run()


class _Search:
    """The state of one search: the best noise so far, its rewards (P,), and the candidates that were seen."""

    def __init__(self, task: Task, adapter: NoiseAdapter, total: int) -> None:
        self.task, self.total = task, total
        self.adapter = adapter.to(task.backend.device)
        self.step = 0
        self.best = torch.full((len(task.prompts),), torch.nan)

    def run(self) -> Iterator[Progress]:
        task, none = self.task, torch.zeros(len(self.task.prompts))
        while self.step < self.total:
            seeds = [
                derive(task.seed, "candidate", prompt, self.step) if self.step else task.seeds[0]
                for prompt in task.prompts
            ]
            with torch.no_grad():
                images = generate(task.backend, task.prompts, seeds, Adapter(), task.sampling)
                rewards = score(task.reward, images, task.prompts).cpu().float()
                better = rewards.isfinite() & ~(rewards <= self.best)
                self.best = torch.where(better, rewards, self.best)
                noise = task.backend.noise(seeds, task.sampling.noise_steps)
                self.adapter.latents[better] = noise[better]
            self.step += 1
            yield Progress(
                step=self.step,
                total=self.total,
                rewards=rewards,
                best=self.best.clone(),
                penalty=none,
                grad_norm=none,
                failed=self.best.isnan() if self.step == self.total else none.bool(),
                images=images,
                adapter=self.adapter,
                state=self.state,
            )

    def state(self) -> dict[str, Tensor]:
        latents = self.adapter.latents.detach().cpu().clone()
        return {"step": torch.tensor(self.step), "best": self.best.clone(), "latents": latents}

    def load(self, state: Mapping[str, Tensor]) -> None:
        shapes = {name: value.shape for name, value in self.state().items()}
        if {name: value.shape for name, value in state.items()} != shapes:
            raise ResumeError("this checkpoint belongs to a search with other settings or prompts")
        self.step, self.best = int(state["step"]), state["best"].clone()
        self.adapter.latents.copy_(state["latents"])
