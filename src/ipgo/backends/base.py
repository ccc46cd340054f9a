"""A text-to-image pipeline, opened up for differentiation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ipgo.embeds import PromptEmbeds
from ipgo.seeding import generator


class Backend(ABC):
    """A frozen pipeline that encodes prompts, predicts noise and decodes latents.

    It never decides about gradients: the caller's grad mode does.

    Attributes:
        name: what it was loaded from.
        device, dtype: where and in which format its weights are. Latents and images are at least float32.
        embed_dim: D, the width of the prompt embeddings.
        padding: "max_length" (prompts are padded and the denoiser attends to the padding, as stock
            pipelines do) or "none" (the denoiser sees text only).
        modules: "denoiser", "text_encoder", "decoder": frozen, in eval mode.
        calls: the cost ledger, in rows: "denoiser" counts one for each image row of each `predict` call,
            whether guidance makes that one network evaluation or two; "denoiser_grad" counts those under
            grad among them, "denoiser_grad_both" those of them that carry gradient into both halves of
            guidance, "decoder" the rows decoded. A recomputed call counts twice, first as one without gradient
            and then as one under it: that is the work it is.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    embed_dim: int
    padding: str
    latent_shape: tuple[int, int, int]
    modules: dict[str, nn.Module]
    calls: Counter[str]

    @classmethod
    @abstractmethod
    def load(
        cls,
        source: str | Path | object,
        *,
        device: str = "auto",
        dtype: str = "auto",
        image_size: int | None = None,
        padding: str = "max_length",
        scheduler: str | None = None,
        long_prompts: str = "refuse",
    ) -> Self:
        """Open a local folder, a hub id or a pipeline object; see `ipgo.load_backend`."""

    @abstractmethod
    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise `InputError` for a prompt that the encoder cannot take. Needs the tokenizer only."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """The text encoder's states; `InputError` for a prompt that is too long."""

    @abstractmethod
    def unconditional(self, negative_prompt: str, cond: PromptEmbeds) -> PromptEmbeds:
        """What guidance moves away from, one row for each of `cond`."""

    @abstractmethod
    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        cond: PromptEmbeds,
        uncond: PromptEmbeds | None,
        guidance_scale: float,
    ) -> Tensor:
        """The guided model output for (B, C, h, w) latents, in their shape and format."""

    @abstractmethod
    def scheduler(self, steps: int, latents: Tensor) -> Any:
        """A fresh diffusers scheduler with timesteps set: schedulers carry the state of a trajectory."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) latents to (B, 3, H, W) images in [0, 1]."""

    def noise(self, seeds: Sequence[int], steps: int = 0) -> Tensor:
        """(B, 1 + steps, C, h, w) draws of N(0, 1) in float32: the initial noise, then one for each step.

        Row i depends on seeds[i] alone. Its first draw is `torch.randn((1, C, h, w), generator=g)` with a CPU
        generator of that seed, so a stock pipeline given `g` starts from the same noise.
        """
        rows = []
        for seed in seeds:
            source = generator(seed)
            first = torch.randn((1, *self.latent_shape), generator=source)
            rows.append(torch.cat([first, torch.randn((steps, *self.latent_shape), generator=source)]))
        return torch.stack(rows).to(self.device)


def classifier_free(
    denoise: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    latents: Tensor,
    cond: tuple[Tensor, Tensor],
    uncond: tuple[Tensor, Tensor] | None,
    guidance_scale: float,
    uncond_grad: bool,
) -> Tensor:
    """u + g (c - u): classifier-free guidance (Ho and Salimans, arXiv 2207.12598, eq. 6 with g = 1 + w).

    Without `uncond`, or with g <= 1, it is c. One network call computes both halves, the shorter one padded with
    states that are not attended to, unless a gradient is wanted and cannot flow through the unconditional half:
    that half is then called alone, and builds no graph.

    Args:
        denoise: (latents, states (B, L, D), attended (B, L) bool, or None for all) to the model output.
        cond, uncond: states (B, L, D) and which of them are attended to (B, L); L may differ.
        uncond_grad: can a gradient flow through the unconditional half?
    """
    if uncond is None or guidance_scale <= 1:
        return denoise(latents, cond[0], _hidden(cond[1]))
    if torch.is_grad_enabled() and not uncond_grad:
        c = denoise(latents, cond[0], _hidden(cond[1]))
        with torch.no_grad():
            u = denoise(latents, uncond[0], _hidden(uncond[1]))
    else:
        length = max(cond[0].shape[1], uncond[0].shape[1])
        states = torch.cat([_padded(uncond[0], length), _padded(cond[0], length)])
        attended = torch.cat([_padded(uncond[1], length), _padded(cond[1], length)])
        u, c = denoise(torch.cat([latents, latents]), states, _hidden(attended)).chunk(2)
    return u + guidance_scale * (c - u)


def _hidden(attended: Tensor) -> Tensor | None:
    """None where nothing is hidden: attention without a mask is faster."""
    return None if bool(attended.all()) else attended


def _padded(values: Tensor, length: int) -> Tensor:
    """(B, L, ...) with zeros up to `length` in the second dimension."""
    missing = values.new_zeros(len(values), length - values.shape[1], *values.shape[2:])
    return torch.cat([values, missing], dim=1)
