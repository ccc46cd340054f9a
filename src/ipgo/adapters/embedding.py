"""Whole prompts, as free embeddings."""

from __future__ import annotations

import math
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
    """States of the text encoder's whole length instead of each prompt's, padding included (PEO).

    What is learned is how they change, in units of the prompt's states, of a mean square of 1 as CLIP's are: one
    learning rate serves every text encoder.
    """

    kind: ClassVar[str] = "embedding"

    change: nn.Parameter  # (N, L, D), L of the longest prompt; starts at 0

    def __init__(self, prompts: Sequence[str], length: int, width: int, long_prompts: str = "refuse") -> None:
        super().__init__(prompts)
        self.long_prompts = long_prompts
        self.options = {"length": length, "width": width, "long_prompts": long_prompts}
        self.change = nn.Parameter(torch.zeros(len(prompts), length, width))

    @classmethod
    def start(cls, backend: Backend, prompts: Sequence[str], *, shared: bool) -> Self:
        """The prompts' own states.

        Raises:
            InputError: `shared`, or a backend without padding.
        """
        if shared:
            raise InputError(
                "shared is true; whole prompts cannot be shared, so this method is prompt-wise only"
            )
        check_padding(backend.padding)
        with torch.no_grad():
            length = backend.encode(prompts).length
        return cls(prompts, length, backend.embed_dim, backend.long_prompts)

    def condition(self, backend: Backend, prompts: Sequence[str], original: PromptEmbeds) -> PromptEmbeds:
        check_padding(backend.padding)
        (most, width), (length, taken) = self.change.shape[1:], original.embeds.shape[1:]
        # Of prompts read in windows, those of fewer windows than the longest have rows that end with filling.
        fits = length <= most if self.long_prompts == "chunk" else length == most
        if width != taken or not fits:
            raise InputError(
                f"this adapter holds states of shape {(most, width)}; backend {backend.name!r} takes "
                f"{(length, taken)}"
            )
        unit = original.norm() / math.sqrt(width)
        change = self.change[self.rows(prompts), :length].to(unit.device) * unit[:, None, None]
        learned = original.embeds + change  # in float32 or wider: bfloat16 would lose small changes
        return replace(original, embeds=learned.to(original.embeds))

    @staticmethod
    def with_equal_options(adapters: Sequence[Adapter]) -> Sequence[Adapter]:
        """Those of prompts that were read in windows, filled up with zeros to the length of the longest."""
        found = [each for each in adapters if isinstance(each, EmbeddingAdapter)]
        if any(each.long_prompts != "chunk" for each in found):
            return adapters
        longest = max(each.change.shape[1] for each in found)
        return [each._filled(longest) for each in found]

    def _filled(self, length: int) -> EmbeddingAdapter:
        assert self.prompts is not None
        filled = EmbeddingAdapter(self.prompts, **{**self.options, "length": length})
        with torch.no_grad():
            filled.change[:, : self.change.shape[1]] = self.change
        return filled

    def penalty(self, original: PromptEmbeds, conditioned: PromptEmbeds, noise: Tensor) -> Tensor:
        """1 - the cosine of the states at the end of the text, before and after (PEO's preservation).

        With several text encoders it is the mean over the ends of what each of them made.
        """
        wide = torch.promote_types(original.embeds.dtype, torch.float32)  # 1 - cos is lost in bfloat16
        pairs = zip(original.embeds.to(wide), conditioned.embeds.to(wide), original.ends(), strict=True)
        cosines = [torch.cosine_similarity(before[end], after[end], dim=-1) for before, after, end in pairs]
        return torch.stack([1 - each.mean() for each in cosines])


def check_padding(padding: str) -> None:
    """Raise `InputError` where whole prompts cannot be learned."""
    if padding != "max_length":
        raise InputError(f"padding is {padding!r}; whole prompts are learned with 'max_length' only")
