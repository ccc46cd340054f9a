"""Images as tensors (B, 3, H, W) in [0, 1]: differentiable preparation for rewards, and PIL for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional


def resize(images: Tensor, size: int) -> Tensor:
    """Bring the shorter side to `size` (bicubic, antialiased, kept within [0, 1])."""
    height, width = images.shape[-2:]
    if min(height, width) == size:
        return images
    factor = size / min(height, width)
    shape = (round(height * factor), round(width * factor))
    resized = functional.interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 1)


def center_crop(images: Tensor, size: int) -> Tensor:
    """Cut the central `size` x `size` square."""
    top, left = ((side - size) // 2 for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std, by channel."""
    center, scale = (images.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (images - center) / scale


def to_pil(images: Tensor) -> list[Image.Image]:
    """One 8-bit picture per row."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """All rows in one picture, filled row by row; as square as it gets unless `columns` is given."""
    pictures = to_pil(images)
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet
