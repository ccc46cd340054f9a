"""Embeddings inserted around the prompt's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ipgo.adapters.base import Adapter
from ipgo.backends import Backend
from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError
from ipgo.insertion import InsertedEmbeddings, Insertion
from ipgo.sampling import Sampling
from ipgo.seeding import derive, row_seeds


class InsertionAdapter(Adapter):
    """A prefix and a suffix of embeddings for each prompt, or one pair shared by all (arXiv 2503.21812).

    And, if `insertion` says so, as much for the negative prompt, and what is added to the vectors of both.
    """

    kind: ClassVar[str] = "insertion"

    pooled: nn.Parameter | None  # (N, P), starts at 0; see `_changed`
    negative_pooled: nn.Parameter | None  # (N, P), starts at 0

    def __init__(
        self,
        prompts: Sequence[str] | None,
        width: int,
        insertion: Insertion | Mapping[str, Any],
        padding: str = "max_length",
        seed: int | None = 0,
        long_prompts: str = "refuse",
        pooled_width: int = 0,
    ) -> None:
        """Draw the initial values.

        Args:
            prompts: one for each row; None: one row shared by all prompts.
            width: D, the width of the backend's prompt embeddings.
            insertion: what is inserted; `negative` left open (None) is false here.
            padding, long_prompts: the backend's; images are drawn with the same padding only.
            seed: random seed of the initial values; each prompt's row derives its own. None: zeros instead.
            pooled_width: P, the width of the backend's vector for the whole prompt; 0 where none is learned.
        """
        super().__init__(prompts)
        self.width = width
        chosen = insertion if isinstance(insertion, Insertion) else Insertion(**insertion)
        self.insertion = chosen.decided(guided=False)
        self.padding, self.long_prompts = padding, long_prompts
        self.options = {
            "width": width,
            "insertion": asdict(self.insertion),
            "padding": padding,
            "long_prompts": long_prompts,
            "pooled_width": pooled_width,
        }
        self.learns_unconditional = bool(self.insertion.negative)
        seeds = row_seeds(seed, prompts)
        self.prefix = _side(seeds, "prefix", self.insertion.num_prefix, width, self.insertion)
        self.suffix = _side(seeds, "suffix", self.insertion.num_suffix, width, self.insertion)
        before, after = self.insertion.num_prefix, self.insertion.num_suffix
        negative = self.learns_unconditional
        self.negative_prefix = _side(seeds, "negative prefix", before * negative, width, self.insertion)
        self.negative_suffix = _side(seeds, "negative suffix", after * negative, width, self.insertion)
        vectors = pooled_width if self.insertion.pooled else 0
        self.pooled = _vectors(len(seeds), vectors)
        self.negative_pooled = _vectors(len(seeds), vectors * negative)

    @classmethod
    def start(
        cls,
        backend: Backend,
        prompts: Sequence[str],
        insertion: Insertion,
        *,
        seed: int,
        shared: bool,
        sampling: Sampling | None = None,
    ) -> InsertionAdapter:
        """The point where a fit to `prompts` begins, with what `insertion` leaves open decided.

        This is `negative`, by the guidance of `sampling`; None is the backend's own.

        Raises:
            InputError: what is to be learned is not there in this backend.
        """
        insertion = insertion.decided((sampling or Sampling()).guided(backend))
        if sampling is not None:
            insertion.check_guidance(sampling.scale(backend))
        if insertion.negative and backend.guidance != "classifier-free":
            raise InputError(
                f"insertion.negative is true; it needs classifier-free guidance, and that of backend "
                f"{backend.name!r} is {backend.guidance!r}"
            )
        if insertion.pooled and not backend.facts.pooled:
            raise InputError(
                f"insertion.pooled is true; backend {backend.name!r} has no vector for the whole prompt"
            )
        own = None if shared else prompts
        width = _pooled_width(backend, prompts[0]) if insertion.pooled else 0
        return cls(own, backend.embed_dim, insertion, backend.padding, seed, backend.long_prompts, width)

    @classmethod
    def empty(cls, prompts: Sequence[str] | None, options: Mapping[str, Any]) -> Self:
        return cls(prompts, **options, seed=None)

    def sides(self) -> list[InsertedEmbeddings]:
        """The prefix and the suffix, and those of the negative prompt, as far as there are any."""
        every = (self.prefix, self.suffix, self.negative_prefix, self.negative_suffix)
        return [side for side in every if side is not None]

    def condition(self, backend: Backend, prompts: Sequence[str], original: PromptEmbeds) -> PromptEmbeds:
        self._check(backend)
        rows = self.rows(prompts)
        return self._changed(self.insert(rows, original), rows, self.pooled)

    def unconditional(
        self,
        backend: Backend,
        prompts: Sequence[str],
        cond: PromptEmbeds,
        sampling: Sampling,
        raw: PromptEmbeds | None = None,
    ) -> PromptEmbeds | None:
        if not self.insertion.negative:
            return super().unconditional(backend, prompts, cond, sampling)
        # Its own length is that of the prompt without what is inserted; both then grow by as much.
        own = cond.keep(range(self.insertion.num_prefix, cond.length - self.insertion.num_suffix))
        original = super().unconditional(backend, prompts, own, sampling, raw)
        if original is None:
            return None
        rows = self.rows(prompts)
        unit = original.norm()
        unit = torch.where(unit > 0, unit, own.norm())  # SDXL's empty negative prompt is nothing but zeros
        inserted = self.insert_negative(rows, original, unit)
        return self._changed(inserted, rows, self.negative_pooled, own.pooled)

    def _changed(
        self, prompt: PromptEmbeds, rows: Tensor, change: nn.Parameter | None, instead: Tensor | None = None
    ) -> PromptEmbeds:
        """With `change` (N, P) added to the vectors (B, P), in units of their root mean square.

        So a step goes as far with any text encoder. `instead` (B, P) gives the unit of vectors that are zeros: the
        prompt's, as it has become.
        """
        if change is None or prompt.pooled is None:
            return prompt
        unit = _spread(prompt.pooled)
        if instead is not None:
            unit = torch.where(unit > 0, unit, _spread(instead))
        return replace(prompt, pooled=prompt.pooled + unit * change[rows.to(change.device)].to(prompt.pooled))

    def insert(self, rows: Tensor, original: PromptEmbeds) -> PromptEmbeds:
        """[prefix; original; suffix], by the adapter's rows (B,) for the B rows of `original`."""
        return self._between(self.prefix, self.suffix, rows, original, original.norm())

    def insert_negative(
        self, rows: Tensor, original: PromptEmbeds, unit: Tensor | None = None
    ) -> PromptEmbeds:
        """`insert` for the B rows of the negative prompt; without `insertion.negative` it stays as it is.

        Args:
            unit: (B,) the norm of a state; None is that of the negative prompt's own.
        """
        unit = original.norm() if unit is None else unit
        return self._between(self.negative_prefix, self.negative_suffix, rows, original, unit)

    def _between(
        self,
        prefix: InsertedEmbeddings | None,
        suffix: InsertedEmbeddings | None,
        rows: Tensor,
        original: PromptEmbeds,
        unit: Tensor,
    ) -> PromptEmbeds:
        """`original` with what the two sides, if there are any, put before and after it."""
        nothing = original.embeds.new_empty(len(rows), 0, self.width)
        before, after = (
            nothing if side is None else side.attend(rows, original, unit) for side in (prefix, suffix)
        )
        return original.insert(before, after)

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
        if self.pooled is not None and not backend.facts.pooled:
            raise InputError(
                f"this adapter changes a vector for the whole prompt; backend {backend.name!r} has none"
            )

    def penalty(self, original: PromptEmbeds, conditioned: PromptEmbeds, noise: Tensor) -> Tensor:
        """Conformity: the mean over D of |mean(conditioned) - mean(original)|, means over text positions.

        With `insertion.norm` it is in units of the prompt's states, of a mean square of 1 as CLIP's are, and does not
        look at their sinks. So one weight serves every text encoder.
        """
        own, whole = self.means(original, conditioned)
        change = (whole - own).abs().mean(-1)
        return change if self.insertion.norm is None else change * (math.sqrt(self.width) / original.norm())

    def means(self, original: PromptEmbeds, conditioned: PromptEmbeds) -> tuple[Tensor, Tensor]:
        """(B, D) each: the mean text state of the prompt as it is, and with what is inserted.

        With `insertion.norm` the prompt's sinks do not count; without, as in the paper's code, they do.
        """
        if self.insertion.norm is None:
            return original.mean(), conditioned.mean()
        words = original.words(original.norm())
        around = conditioned.mask.clone()
        around[:, self.insertion.num_prefix :][:, : original.length] = words
        return replace(original, mask=words).mean(), replace(conditioned, mask=around).mean()

    def project_(self) -> None:
        for side in self.sides():
            side.project_()


def _spread(vectors: Tensor) -> Tensor:
    """The root mean square (B, 1) of (B, P) numbers."""
    spread: Tensor = vectors.square().mean(-1, keepdim=True).sqrt()
    return spread


def _vectors(count: int, width: int) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(count, width)) if width else None


def _pooled_width(backend: Backend, prompt: str) -> int:
    with torch.no_grad():
        pooled = backend.encode([prompt]).pooled
    assert pooled is not None
    return pooled.shape[-1]


def _side(
    seeds: Sequence[int | None], name: str, count: int, width: int, insertion: Insertion
) -> InsertedEmbeddings | None:
    if count == 0:
        return None
    own = [None if seed is None else derive(seed, name) for seed in seeds]
    return InsertedEmbeddings(own, count, width, insertion)
