"""What a denoiser is conditioned on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SINK = 30  # times as long as the median: far more than states of words differ by


@dataclass(frozen=True)
class PromptEmbeds:
    """The text encoder's states for B prompts.

    Attributes:
        embeds: (B, L, D), one state per position.
        mask: (B, L) bool, True at text and False at padding. It always says which is which; whether a
            denoiser looks at it is the backend's business. Text may come in several runs: one of each text
            encoder, with padding between.
        pooled: (B, P) or None, the vector that some families add to the states.
        early: what the denoiser gets instead of all this at the first steps; None is the same at every step.
        late_share: with `early`, the share of the steps, the last ones, that get this; at least one does.
        present: (B, L) bool, False at what only fills up a batch of prompts of unequal length, which no
            denoiser may look at; None: there is no such thing.
    """

    embeds: Tensor
    mask: Tensor
    pooled: Tensor | None = None
    early: PromptEmbeds | None = None
    late_share: float = 1.0
    present: Tensor | None = None

    @property
    def length(self) -> int:
        return self.embeds.shape[1]

    @property
    def requires_grad(self) -> bool:
        return self.embeds.requires_grad or (self.pooled is not None and self.pooled.requires_grad)

    def at(self, step: int, steps: int) -> PromptEmbeds:
        """What the denoiser gets at a step, counted from 0, of `steps`."""
        late = step >= steps - late_steps(steps, self.late_share)
        return self if self.early is None or late else self.early

    def insert(self, prefix: Tensor, suffix: Tensor) -> PromptEmbeds:
        """Put (B, n, D) embeddings before and after the states, in their dtype; they count as text."""
        before, after = (inserted.to(self.embeds) for inserted in (prefix, suffix))
        embeds = torch.cat([before, self.embeds, after], dim=1)  # (B, n + L + m, D)
        mask = _widened(self.mask, before.shape[1], after.shape[1])
        present = None if self.present is None else _widened(self.present, before.shape[1], after.shape[1])
        early = None if self.early is None else self.early.insert(prefix, suffix)
        return PromptEmbeds(embeds, mask, self.pooled, early, self.late_share, present)

    def mean(self) -> Tensor:
        """(B, D): the mean state over the text positions, at least in float32."""
        states = self.embeds.to(torch.promote_types(self.embeds.dtype, torch.float32))
        weights = self.mask.to(states.dtype).unsqueeze(-1)  # (B, L, 1)
        return (states * weights).sum(1) / weights.sum(1)

    def norm(self) -> Tensor:
        """(B,): the median Euclidean norm of the states at the text positions, which no sink moves (see `words`).

        Of an even number of them it is the smaller one of the two in the middle.
        """
        rising = self._norms().masked_fill(~self.mask, math.inf).sort(1).values  # (B, L)
        middle = (self.mask.sum(1, keepdim=True) - 1).clamp(min=0) // 2
        return rising.gather(1, middle)[:, 0]

    def words(self, unit: Tensor) -> Tensor:
        """(B, L) bool: the text positions without sinks, where (B,) states have the norm `unit`.

        Language models give the first token, and few others, a state of no meaning that is hundreds of times as long
        as the rest (arXiv 2402.17762): whatever looks at the prompt's states would see nothing else.
        """
        return self.mask & (self._norms() <= SINK * unit[:, None])

    def _norms(self) -> Tensor:
        """(B, L): what is only measured by, so without gradient."""
        states = self.embeds.detach().to(torch.promote_types(self.embeds.dtype, torch.float32))
        norms: Tensor = torch.linalg.vector_norm(states, dim=-1)  # (B, L)
        return norms

    def ends(self) -> list[Tensor]:
        """For each row the positions (R,) where its R runs of text end, rising; runs that touch are one."""
        after = torch.cat([self.mask[:, 1:], self.mask.new_zeros(len(self.mask), 1)], dim=1)  # (B, L)
        return [row.nonzero()[:, 0] for row in self.mask & ~after]

    def keep(self, places: Sequence[int]) -> PromptEmbeds:
        """Only the states at these positions (of `early` nothing is kept)."""
        kept = list(places)
        present = None if self.present is None else self.present[:, kept]
        return PromptEmbeds(self.embeds[:, kept], self.mask[:, kept], self.pooled, present=present)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> PromptEmbeds:
        """The same on `device`, and in another format where one is asked for."""
        return self._each(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def select(self, rows: Tensor) -> PromptEmbeds:
        """The prompts at `rows` (B',), which may repeat."""
        return self._each(lambda tensor: tensor[rows])

    def repeated(self, count: int) -> PromptEmbeds:
        """A single prompt as so many rows, which share its memory."""
        return self._each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def _each(self, change: Callable[[Tensor], Tensor]) -> PromptEmbeds:
        """With every tensor changed, those of `early` too."""
        early = None if self.early is None else self.early._each(change)
        pooled, present = (None if each is None else change(each) for each in (self.pooled, self.present))
        return replace(
            self,
            embeds=change(self.embeds),
            mask=change(self.mask),
            pooled=pooled,
            early=early,
            present=present,
        )


def concatenate(prompts: Sequence[PromptEmbeds]) -> PromptEmbeds:
    """The rows of all as one batch; shorter prompts are filled up with zeros. All have a pooled vector, or none.

    They are what is given at one step: of `early` nothing is kept.
    """
    length = max(prompt.length for prompt in prompts)
    pooled = [prompt.pooled for prompt in prompts if prompt.pooled is not None]
    whole = all(prompt.length == length and prompt.present is None for prompt in prompts)
    present = [
        torch.ones_like(prompt.mask) if prompt.present is None else prompt.present for prompt in prompts
    ]
    return PromptEmbeds(
        torch.cat([padded(prompt.embeds, length) for prompt in prompts]),
        torch.cat([padded(prompt.mask, length) for prompt in prompts]),
        torch.cat(pooled) if pooled else None,
        present=None if whole else torch.cat([padded(each, length) for each in present]),
    )


def _widened(mask: Tensor, before: int, after: int) -> Tensor:
    """(B, L) bool with True at `before` positions more in front and `after` behind."""
    first, last = (mask.new_ones(len(mask), count) for count in (before, after))
    return torch.cat([first, mask, last], dim=1)


def padded(values: Tensor, length: int) -> Tensor:
    """(B, L, ...) with zeros up to `length` in the second dimension."""
    missing = values.new_zeros(len(values), length - values.shape[1], *values.shape[2:])
    return torch.cat([values, missing], dim=1)


def late_steps(steps: int, share: float) -> int:
    """The number of last steps that `share` in (0, 1] of `steps` makes; at least 1."""
    return max(1, round(share * steps))
