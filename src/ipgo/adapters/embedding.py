"""Whole prompts, as free embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ipgo.adapters.base import Adapter
from ipgo.backends import Backend
from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError


class EmbeddingAdapter(Adapter):
    """States of the text encoder's whole length in place of each prompt's, padding included (PEO)."""

    kind: ClassVar[str] = "embedding"

    embeds: nn.Parameter  # (N, L, D)

    def __init__(self, prompts: Sequence[str], length: int, width: int, long_prompts: str = "refuse") -> None:
        super().__init__(prompts)
        self.long_prompts = long_prompts
        self.options = {"length": length, "width": width, "long_prompts": long_prompts}
        self.embeds = nn.Parameter(torch.zeros(len(prompts), length, width))

    @classmethod
    def start(cls, backend: Backend, prompts: Sequence[str], *, shared: bool) -> Self:
        """The prompts' own states.

        Raises:
            InputError: `shared`, a backend without padding, or prompts that differ in their number of windows.
        """
        if shared:
            raise InputError(
                "shared is true; whole prompts cannot be shared, so this method is prompt-wise only"
            )
        _check_padding(backend)
        with torch.no_grad():
            own = backend.encode(prompts)
            if own.present is not None:
                raise InputError(
                    f"long_prompts is {backend.long_prompts!r}; whole prompts that are learned together need "
                    "equally many windows, so fit them one by one"
                )
            adapter = cls(prompts, own.length, backend.embed_dim, backend.long_prompts)
            adapter.embeds.copy_(own.embeds)
        return adapter

    def condition(self, backend: Backend, prompts: Sequence[str], original: PromptEmbeds) -> PromptEmbeds:
        _check_padding(backend)
        if original.embeds.shape[1:] != self.embeds.shape[1:]:
            raise InputError(
                f"this adapter holds states of shape {tuple(self.embeds.shape[1:])}; "
                f"backend {backend.name!r} takes {tuple(original.embeds.shape[1:])}"
            )
        learned = self.embeds[self.rows(prompts)]
        return replace(original, embeds=learned.to(original.embeds))

    def penalty(self, original: PromptEmbeds, conditioned: PromptEmbeds, noise: Tensor) -> Tensor:
        """1 - the cosine of the states at the end of the text, before and after (PEO's preservation).

        With several text encoders it is the mean over the ends of what each of them made.
        """
        pairs = zip(original.embeds, conditioned.embeds, original.ends(), strict=True)
        cosines = [torch.cosine_similarity(before[end], after[end], dim=-1) for before, after, end in pairs]
        return torch.stack([1 - each.mean() for each in cosines])


def _check_padding(backend: Backend) -> None:
    if backend.padding != "max_length":
        raise InputError(f"padding is {backend.padding!r}; whole prompts are learned with 'max_length' only")
