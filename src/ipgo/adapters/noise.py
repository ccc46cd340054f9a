"""Noise that was learned: the initial latents, and with a stochastic sampler the noise of every step."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from ipgo.adapters.base import Adapter
from ipgo.backends import Backend, open_to_draw
from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError, unknown
from ipgo.seeding import derive, generator

Penalty = Literal["none", "norm", "whiteness"]

PATCH = 4  # DNO looks at the noise in vectors of this length ...
PERMUTATIONS = 100  # ... as it is, and shuffled so often


class NoiseAdapter(Adapter):
    """For each prompt the noise instead of one seed's: (N, 1 or 1 + steps, C, h, w), of which the first is the
    initial one.

    It is tied to that seed: any other gets its plain noise, so on other seeds this adapter is the raw prompt.
    """

    kind: ClassVar[str] = "noise"
    transfers: ClassVar[str] = "nothing"
    needs_all_steps: ClassVar[bool] = True

    latents: nn.Parameter  # (N, 1 or 1 + steps, C, h, w)

    def __init__(
        self,
        prompts: Sequence[str],
        shape: Sequence[int],
        seed: int,
        penalty: Penalty = "none",
        long_prompts: str = "refuse",
        padding: str = "max_length",
    ) -> None:
        super().__init__(prompts)
        if penalty not in get_args(Penalty):
            raise unknown("noise penalty", penalty, get_args(Penalty))
        self.seed, self.penalised_by = seed, penalty
        self.padding, self.long_prompts = padding, long_prompts
        self.options = {
            "shape": list(shape),
            "seed": seed,
            "penalty": penalty,
            "long_prompts": long_prompts,
            "padding": padding,
        }
        self.latents = nn.Parameter(torch.zeros(len(prompts), *shape))

    @classmethod
    def start(
        cls,
        backend: Backend,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        shared: bool,
        steps: int = 0,
        penalty: Penalty = "none",
    ) -> Self:
        """The seed's own noise for every prompt; `steps` draws of it besides the initial one.

        Raises:
            InputError: `shared`, or seeds that are not a single one.
        """
        check_one_seed(seeds, shared)
        plain = backend.noise(seeds, steps)  # (1, 1 + steps, C, h, w)
        adapter = cls(prompts, plain.shape[1:], seeds[0], penalty, backend.long_prompts, backend.padding)
        with torch.no_grad():
            adapter.latents.copy_(plain)
        return adapter

    def noise(self, backend: Backend, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Tensor:
        plain = backend.noise(seeds, steps)
        learned = self.latents[self.rows(prompts)].to(plain.device)
        held = learned.shape[1]
        if learned.shape[2:] != plain.shape[2:] or held not in (1, 1 + steps):
            raise InputError(
                f"this adapter holds noise of shape {tuple(self.latents.shape[1:])}; "
                f"the backend and sampling need {tuple(plain.shape[1:])}"
            )
        own = torch.tensor([seed == self.seed for seed in seeds], device=plain.device)
        first = torch.where(own[:, None, None, None, None], learned, plain[:, :held])
        return torch.cat([first, plain[:, held:]], dim=1)

    def penalty(self, original: PromptEmbeds, conditioned: PromptEmbeds, noise: Tensor) -> Tensor:
        if self.penalised_by == "none":
            return super().penalty(original, conditioned, noise)
        learned = noise[:, : self.latents.shape[1]].flatten(1)
        if self.penalised_by == "norm":
            return norm_penalty(learned)
        return whiteness_penalty(learned)

    def prompt_kwargs(
        self, pipe: Any, prompt: str, negative_prompt: str = "", guidance_scale: float | None = None
    ) -> dict[str, Any]:
        """As `Adapter.prompt_kwargs`, with the initial noise; a pipeline takes no noise for later steps."""
        if self.latents.shape[1] > 1:
            raise InputError("a pipeline takes the initial noise only; this adapter holds that of every step")
        kwargs = super().prompt_kwargs(pipe, prompt, negative_prompt, guidance_scale)
        return {**kwargs, **self.pipeline_noise(pipe, prompt)}

    def pipeline_noise(self, pipe: Any, prompt: str) -> dict[str, Any]:
        """`latents`, the initial noise of `prompt` in the layout and format of the pipeline.

        Where its scheduler adds noise at every step, also the seed's `generator`, past the draw that this replaces.
        """
        backend = open_to_draw(pipe)
        latents = self.latents[self.rows([prompt])][:, 0].detach()
        found: dict[str, Any] = {
            "latents": backend.pipeline_latents(latents).to(backend.device, backend.dtype)
        }
        if backend.stochastic:
            found["generator"] = source = generator(self.seed)
            torch.randn(latents.shape, generator=source)
        return found


def check_one_seed(seeds: Sequence[int], shared: bool) -> None:
    """Raise `InputError` unless noise could be learned: of one seed, and for single prompts."""
    if shared:
        raise InputError("shared is true; noise belongs to one prompt, so this method is prompt-wise only")
    if len(seeds) != 1:
        raise InputError(f"seeds is {list(seeds)}; this method replaces the noise of exactly one seed")


def norm_penalty(noise: Tensor) -> Tensor:
    """(B, d) to (B,): |z|^2 / 2 - (d - 1) log |z|, least where |z|^2 = d - 1 (ReNO, arXiv 2406.04312).

    Up to a constant it is minus the log-density of the norm of d standard normal numbers.
    """
    norm: Tensor = torch.linalg.vector_norm(noise, dim=1)
    return norm.square() / 2 - (noise.shape[1] - 1) * norm.log()


def whiteness_penalty(noise: Tensor) -> Tensor:
    """(B, M) to (B,): how surprising noise is as M standard normal numbers (DNO, arXiv 2405.18881).

    Minus the log-probability bounds of `tail_bound`, of the noise as it is and on average over permutations
    of it. These are the same at every step, so that the objective does not change while it is climbed.
    """
    orders = (order.to(noise.device) for order in _permutations(noise.shape[-1]))
    found = [_moments(noise), *(_moments(noise[:, order]) for order in orders)]
    means, covariances = (torch.stack(each) for each in zip(*found, strict=True))
    bounds = tail_bound(means, covariances, noise.shape[-1] // PATCH)  # (1 + permutations, B)
    return -(bounds[0] + bounds[1:].mean(0))


@functools.lru_cache(maxsize=1)  # 400 bytes a number: a third of a gigabyte for 50 steps of SD1.5
def _permutations(length: int) -> list[Tensor]:
    """The orders of `length` numbers: drawing them takes longer than all that is done with them."""
    sources = [generator(derive(0, "permutation", number)) for number in range(PERMUTATIONS)]
    return [torch.randperm(length, generator=source).int() for source in sources]


def _moments(noise: Tensor) -> tuple[Tensor, Tensor]:
    """Of (B, M) numbers, taken as n vectors of k each: the mean (B, k), and the products' mean (B, k, k)."""
    n = noise.shape[-1] // PATCH
    vectors = noise[:, : n * PATCH].reshape(-1, n, PATCH)
    return vectors.mean(1), vectors.mT @ vectors / n


def tail_bound(mean: Tensor, covariance: Tensor, n: int) -> Tensor:
    """(...) log of the bounds on how likely the mean (..., k) and the covariance (..., k, k) stray as far as they do.

    They are those of n vectors of k standard normal numbers. With m the mean and c = |covariance - 1| (spectral) the
    bounds are exp(-n |m|^2 / 2k) and exp(-n max(sqrt(1 + c) - 1 - sqrt(k / n), 0)^2 / 2), each at most 1/2.
    """
    k = mean.shape[-1]
    unit = torch.eye(k, dtype=mean.dtype, device=mean.device)
    spread = torch.linalg.matrix_norm(covariance - unit, ord=2)
    stray = ((1 + spread).sqrt() - 1 - math.sqrt(k / n)).clamp(min=0)
    bounds = torch.stack([-n * mean.square().sum(-1) / (2 * k), -n * stray.square() / 2])
    return bounds.clamp(max=-math.log(2)).sum(0)
