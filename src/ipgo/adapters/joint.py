"""Inserted embeddings and initial noise that were learned together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor

from ipgo.adapters.base import Adapter
from ipgo.adapters.insertion import InsertionAdapter
from ipgo.adapters.noise import NoiseAdapter
from ipgo.backends import Backend
from ipgo.embeds import PromptEmbeds
from ipgo.sampling import Sampling


class JointAdapter(Adapter):
    """For each prompt a prefix and a suffix of embeddings, and the initial noise instead of one seed's.

    On other seeds the embeddings go with plain noise, so they can be judged there without the noise.
    """

    kind: ClassVar[str] = "joint"
    needs_all_steps: ClassVar[bool] = True

    def __init__(
        self,
        prompts: Sequence[str],
        inserted: Mapping[str, Any],
        initial: Mapping[str, Any],
        noise_weight: float,
    ) -> None:
        """`inserted` and `initial` are the `options` of the two parts, which are yet to be filled in."""
        super().__init__(prompts)
        self.inserted = InsertionAdapter.empty(prompts, inserted)
        self.initial = NoiseAdapter(prompts, **initial)
        self.noise_weight = noise_weight
        self.padding, self.long_prompts = self.inserted.padding, self.inserted.long_prompts
        self.learns_unconditional = self.inserted.learns_unconditional
        self.options = {
            "inserted": self.inserted.options,
            "initial": self.initial.options,
            "noise_weight": noise_weight,
        }

    @classmethod
    def join(cls, inserted: InsertionAdapter, initial: NoiseAdapter, noise_weight: float) -> Self:
        """A copy of two adapters that hold rows of the same prompts."""
        assert initial.prompts is not None
        adapter = cls(initial.prompts, inserted.options, initial.options, noise_weight)
        adapter.inserted.load_state_dict(inserted.state_dict())
        adapter.initial.load_state_dict(initial.state_dict())
        return adapter

    def condition(self, backend: Backend, prompts: Sequence[str], original: PromptEmbeds) -> PromptEmbeds:
        return self.inserted.condition(backend, prompts, original)

    def unconditional(
        self,
        backend: Backend,
        prompts: Sequence[str],
        cond: PromptEmbeds,
        sampling: Sampling,
        raw: PromptEmbeds | None = None,
    ) -> PromptEmbeds | None:
        return self.inserted.unconditional(backend, prompts, cond, sampling, raw)

    def noise(self, backend: Backend, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Tensor:
        return self.initial.noise(backend, prompts, seeds, steps)

    def penalty(self, original: PromptEmbeds, conditioned: PromptEmbeds, noise: Tensor) -> Tensor:
        """Conformity + noise_weight * the penalty of the noise's norm."""
        conformity = self.inserted.penalty(original, conditioned, noise)
        return conformity + self.noise_weight * self.initial.penalty(original, conditioned, noise)

    def project_(self) -> None:
        self.inserted.project_()

    def prompt_kwargs(
        self, pipe: Any, prompt: str, negative_prompt: str = "", guidance_scale: float | None = None
    ) -> dict[str, Any]:
        """As `Adapter.prompt_kwargs`, with the initial noise."""
        kwargs = super().prompt_kwargs(pipe, prompt, negative_prompt, guidance_scale)
        return {**kwargs, **self.initial.pipeline_noise(pipe, prompt)}
