"""DNO: the noise of every step, found by gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ipgo.adapters import NoiseAdapter
from ipgo.ascent import Ascent
from ipgo.backends import BACKENDS, few_steps
from ipgo.errors import InputError
from ipgo.task import Method, Progress, Request, Task
from ipgo.training import maximize


@dataclass(frozen=True)
class DNO(Method):
    """Learn the initial noise of each prompt and that of all steps, kept like noise (arXiv 2405.18881).

    Needs a stochastic sampler: the ddim scheduler with `sampling.eta` above 0, as published 1. Where a schedule ends a
    little above no noise, as Stable Diffusion's, diffusers draws some in the last step too: it is learned as well.
    The published weight decay (AdamW's 0.01), which pulls noise to zero, is left out.

    Attributes:
        ascent: how it is found; the penalty is how surprising the noise is as a standard normal draw.
    """

    one_seed: ClassVar[bool] = True

    ascent: Ascent = Ascent(
        steps=100, lr=0.01, lr_decay=1.0, backprop_steps=None, penalty_weight=1.0, recompute=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ascent.check_noise()

    def check(self, request: Request) -> None:
        """Before a model is loaded: `InputError` where steps have no noise. Few-step models may add some."""
        known = request.backend in BACKENDS and few_steps(request.backend) is None
        if request.sampling.eta == 0 and known:
            raise _no_noise()

    def both_halves(self, guided: bool) -> bool:
        return True

    def _search(self, task: Task, resume: Mapping[str, Tensor] | None) -> Iterator[Progress]:
        steps = task.sampling.noise_steps(task.backend)
        if steps == 0:
            raise _no_noise()
        adapter = NoiseAdapter.start(
            task.backend, task.prompts, task.seeds, shared=task.shared, steps=steps, penalty="whiteness"
        )
        return maximize(task, adapter, self.ascent, resume)


def _no_noise() -> InputError:
    return InputError("sampling.eta is 0; dno learns the noise of every step, so it must be above 0")
