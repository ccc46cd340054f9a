"""What FLUX.1, Chroma and Qwen-Image have in common: a transformer that takes latents as a row of patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ipgo.backends.base import Backend, latent_side
from ipgo.backends.schedulers import shifted


class PackedBackend(Backend):
    """A pipeline whose `latents` are patches of 2 x 2, and whose schedule depends on their number."""

    def _latent_shape(self, image_size: int | None) -> tuple[int, int, int]:
        side = latent_side(self.pipe, self.pipe.default_sample_size, image_size, patch=2)
        return self.pipe.transformer.config.in_channels // 4, side, side

    def _timesteps(self, steps: int, latents: Tensor) -> dict[str, Any]:
        return shifted(steps, latents.shape[-2] * latents.shape[-1] // 4, self.pipe.scheduler.config)

    def pipeline_latents(self, latents: Tensor) -> Tensor:
        return pack(latents)


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h/2 * w/2, 4 C): patches of 2 x 2."""
    return F.pixel_unshuffle(latents, 2).flatten(2).mT


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for `height` times `width` patches."""
    return F.pixel_shuffle(packed.mT.reshape(len(packed), -1, height, width), 2)


def places(height: int, width: int) -> Tensor:
    """(height * width, 3): 0, row and column of every patch."""
    return torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(height), torch.arange(width))
