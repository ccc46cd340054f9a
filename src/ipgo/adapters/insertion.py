"""Embeddings inserted around the prompt's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from ipgo.adapters.base import Adapter
from ipgo.backends import Backend
from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError
from ipgo.insertion import InsertedEmbeddings, Insertion, cross_attend
from ipgo.seeding import derive


class InsertionAdapter(Adapter):
    """A prefix and a suffix of embeddings for each prompt, or one pair shared by all (arXiv 2503.21812)."""

    kind: ClassVar[str] = "insertion"

    def __init__(
        self,
        prompts: Sequence[str] | None,
        width: int,
        insertion: Insertion | Mapping[str, Any],
        padding: str = "max_length",
        seed: int = 0,
        long_prompts: str = "refuse",
    ) -> None:
        super().__init__(prompts)
        self.width = width
        self.insertion = insertion if isinstance(insertion, Insertion) else Insertion(**insertion)
        self.padding, self.long_prompts = padding, long_prompts
        self.options = {
            "width": width,
            "insertion": asdict(self.insertion),
            "padding": padding,
            "long_prompts": long_prompts,
        }
        seeds = [seed] if prompts is None else [derive(seed, prompt) for prompt in prompts]
        self.prefix = _side(seeds, "prefix", self.insertion.num_prefix, width, self.insertion)
        self.suffix = _side(seeds, "suffix", self.insertion.num_suffix, width, self.insertion)

    @classmethod
    def start(
        cls, backend: Backend, prompts: Sequence[str], insertion: Insertion, *, seed: int, shared: bool
    ) -> InsertionAdapter:
        """The point where a fit to `prompts` begins, with `insertion.norm` resolved for each row."""
        own = None if shared else prompts
        adapter = cls(own, backend.embed_dim, insertion, backend.padding, seed, backend.long_prompts)
        if insertion.norm is None:
            with torch.no_grad():
                norms = backend.encode(prompts).norm().cpu()  # (P,)
            for side in adapter.sides():
                side.scale_to_(norms.mean() if shared else norms)
        return adapter

    def sides(self) -> list[InsertedEmbeddings]:
        """The prefix and the suffix, as far as there are any."""
        return [side for side in (self.prefix, self.suffix) if side is not None]

    def condition(self, backend: Backend, prompts: Sequence[str], original: PromptEmbeds) -> PromptEmbeds:
        self._check(backend)
        return self.insert(self.rows(prompts), original)

    def insert(self, rows: Tensor, original: PromptEmbeds) -> PromptEmbeds:
        """[prefix; original; suffix], by the adapter's rows (B,) for the B rows of `original`."""
        return original.insert(
            self._embeds(self.prefix, rows, original), self._embeds(self.suffix, rows, original)
        )

    def _embeds(self, side: InsertedEmbeddings | None, rows: Tensor, original: PromptEmbeds) -> Tensor:
        if side is None:
            return original.embeds.new_empty(len(rows), 0, self.width)
        inserted: Tensor = side(rows.to(side.scale.device)).to(original.embeds.device)  # (B, n, D)
        if self.insertion.cross_attention == "none":
            return inserted
        attended = cross_attend(inserted, original)
        return attended if self.insertion.cross_attention == "replace" else inserted + attended

    def _check(self, backend: Backend) -> None:
        if backend.embed_dim != self.width:
            raise InputError(
                f"this adapter holds embeddings {self.width} wide; "
                f"backend {backend.name!r} takes {backend.embed_dim}"
            )
        if backend.padding != self.padding:
            raise InputError(
                f"this adapter was learned with padding={self.padding!r}; the backend has {backend.padding!r}"
            )

    def penalty(self, original: PromptEmbeds, conditioned: PromptEmbeds, noise: Tensor) -> Tensor:
        """Conformity: the mean over D of |mean(conditioned) - mean(original)|, means over text positions."""
        return (conditioned.mean() - original.mean()).abs().mean(-1)

    def project_(self) -> None:
        for side in self.sides():
            side.project_()


def _side(
    seeds: Sequence[int], name: str, count: int, width: int, insertion: Insertion
) -> InsertedEmbeddings | None:
    if count == 0:
        return None
    return InsertedEmbeddings([derive(seed, name) for seed in seeds], count, width, insertion)
