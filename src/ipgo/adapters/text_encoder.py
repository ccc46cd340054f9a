"""Weights of the text encoder that were learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import nn

from ipgo.adapters.base import Adapter, key
from ipgo.backends import Backend
from ipgo.backends.parts import quantised
from ipgo.backends.weights import uncompiled
from ipgo.embeds import PromptEmbeds, padded
from ipgo.errors import InputError
from ipgo.sampling import Sampling


class TextEncoderAdapter(Adapter):
    """A change of every weight of the text encoder, for each prompt or one set for all (arXiv 2403.18978).

    The last `late_share` of the denoising steps get the states of the tuned encoder, of the prompt and of the
    negative prompt alike; the steps before get those of the frozen one. The encoder itself is never touched:
    it is called with the changed weights, which are float32 at least. Of several encoders this is the first.
    """

    kind: ClassVar[str] = "text-encoder"
    learns_unconditional: bool = True

    changes: nn.ParameterDict  # (N, *shape) of each weight, what is added to it

    def __init__(
        self, prompts: Sequence[str] | None, shapes: Mapping[str, Sequence[int]], late_share: float
    ) -> None:
        super().__init__(prompts)
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.late_share = late_share
        self.options = {
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "late_share": late_share,
        }
        count = 1 if prompts is None else len(prompts)
        changes = {key(name): torch.zeros(count, *shape) for name, shape in self.shapes.items()}
        self.changes = nn.ParameterDict({name: nn.Parameter(value) for name, value in changes.items()})

    @classmethod
    def start(cls, backend: Backend, prompts: Sequence[str], late_share: float, *, shared: bool) -> Self:
        """The point where a fit begins: nothing is changed yet; `InputError` if the encoder is quantised."""
        encoder = uncompiled(backend.modules["text_encoder"])
        _check_plain(encoder)
        shapes = {name: weight.shape for name, weight in encoder.named_parameters()}
        return cls(None if shared else prompts, shapes, late_share)

    def condition(self, backend: Backend, prompts: Sequence[str], original: PromptEmbeds) -> PromptEmbeds:
        return self._tuned(backend, prompts, original, lambda: backend.encode(prompts))

    def unconditional(
        self,
        backend: Backend,
        prompts: Sequence[str],
        cond: PromptEmbeds,
        sampling: Sampling,
        raw: PromptEmbeds | None = None,
    ) -> PromptEmbeds | None:
        original = super().unconditional(backend, prompts, cond, sampling, raw)
        if original is None:
            return None
        return self._tuned(
            backend, prompts, original, lambda: backend.unconditional(sampling.negative_prompt, cond)
        )

    def _tuned(
        self,
        backend: Backend,
        prompts: Sequence[str],
        original: PromptEmbeds,
        encode: Callable[[], PromptEmbeds],
    ) -> PromptEmbeds:
        """What `encode` answers with each prompt's own weights at the late steps, and `original` before."""
        encoder = uncompiled(backend.modules["text_encoder"])
        self._check(encoder)
        rows: list[int] = self.rows(prompts).tolist()
        # Every set of weights encodes the whole batch, so that all answers are of one length. `original` may be part
        # of a larger batch, and longer; nothing looks at what is beyond.
        answers = {row: self._call(encoder, row, encode) for row in set(rows)}
        embeds = torch.stack([answers[row].embeds[place] for place, row in enumerate(rows)])
        embeds = padded(embeds, original.length)
        pooled = original.pooled
        if pooled is not None:
            vectors = [answers[row].pooled for row in rows]
            own = [vector[place] for place, vector in enumerate(vectors) if vector is not None]
            pooled = torch.stack(own).to(pooled)
        return replace(
            original,
            embeds=embeds.to(original.embeds),
            pooled=pooled,
            early=original,
            late_share=self.late_share,
        )

    def _call(self, encoder: nn.Module, row: int, encode: Callable[[], PromptEmbeds]) -> PromptEmbeds:
        weights = {
            f"encoder.{name}": weight + self.changes[key(name)][row].to(weight.device)
            for name, weight in encoder.named_parameters()
        }
        answer: PromptEmbeds = torch.func.functional_call(_Lender(encoder), weights, (encode,))
        return answer

    def _check(self, encoder: nn.Module) -> None:
        _check_plain(encoder)
        found = {name: tuple(weight.shape) for name, weight in encoder.named_parameters()}
        for name in self.shapes.keys() | found.keys():
            if found.get(name) != self.shapes.get(name):
                raise InputError(
                    f"this adapter changes weight {name!r} of shape {self.shapes.get(name)}; "
                    f"the backend's text encoder has {found.get(name)}"
                )

    def prompt_kwargs(
        self, pipe: Any, prompt: str, negative_prompt: str = "", guidance_scale: float | None = None
    ) -> dict[str, Any]:
        """Refused: a pipeline takes the same states at every step."""
        raise InputError(
            "an adapter of the text encoder has no prompt_kwargs: a pipeline takes the same states at every step"
        )


def _check_plain(encoder: nn.Module) -> None:
    if quantised(encoder):
        raise InputError(
            "the text encoder is quantised, so that nothing can be added to its weights; load it without"
        )


class _Lender(nn.Module):
    """A module with the encoder inside, which `functional_call` can lend other weights while it answers."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, encode: Callable[[], PromptEmbeds]) -> PromptEmbeds:
        return encode()
