"""Rewards that need no network: plain statistics of the pixels, differentiable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ipgo.rewards.base import FunctionReward

TINY = 1e-12  # keeps the square root differentiable on a flat image


def colorfulness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Hasler and Suesstrunk, Measuring colourfulness in natural images (2003), eq. 1-3, for pixels in [0, 1].

    Zero for grey images; vivid photographs lie near 0.3 (80 on the paper's scale of 0 to 255).
    """
    red, green, blue = images.unbind(1)  # (B, H, W)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], dim=1).flatten(2)  # (B, 2, H W)
    spread = (opponents.var(-1, correction=0).sum(1) + TINY).sqrt()
    shift = (opponents.mean(-1).square().sum(1) + TINY).sqrt()
    return spread + 0.3 * shift


def contrast(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Root-mean-square contrast: the standard deviation of the luma (Rec. 709), at most 0.5."""
    weights = images.new_tensor([0.2126, 0.7152, 0.0722])
    luma = torch.einsum("bchw,c->bhw", images, weights).flatten(1)
    return (luma.var(-1, correction=0) + TINY).sqrt()


def load_colorfulness(device: torch.device) -> FunctionReward:
    """The reward `colorfulness`."""
    return FunctionReward(colorfulness, "colorfulness", uses_prompts=False)


def load_contrast(device: torch.device) -> FunctionReward:
    """The reward `contrast`."""
    return FunctionReward(contrast, "contrast", uses_prompts=False)
