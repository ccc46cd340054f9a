"""Images as tensors (B, 3, H, W) in [0, 1]: differentiable preparation for rewards, and PIL for people."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from ipgo.errors import InputError


class StoredImages(Mapping[int, Image.Image]):
    """Images by seed, each of which is read when it is looked at: a run may have more than memory holds."""

    def __init__(self, files: Mapping[int, Path | bytes]) -> None:
        """`files` are their places, or what stands in them."""
        self.files = dict(files)

    def __getitem__(self, seed: int) -> Image.Image:
        file = self.files[seed]
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return image.copy()

    def __iter__(self) -> Iterator[int]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def held(self) -> StoredImages:
        """The same, as they are stored, without their files."""
        return StoredImages(
            {
                seed: file if isinstance(file, bytes) else file.read_bytes()
                for seed, file in self.files.items()
            }
        )


def resize(images: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """Bring the shorter side to `size`; the longer one is rounded down. See `stretch`."""
    height, width = images.shape[-2:]
    short = min(height, width)
    return stretch(images, size * height // short, size * width // short, mode)


def stretch(images: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Bring the sides to these (antialiased), with the images themselves if they have them.

    As Pillow does for 8 bits, whose pictures the rewards were trained on: the width, then the height, and what the
    filter overshoots at an edge is cut off to [0, 1] after each. Without that a reward may be followed to whites above
    1 that it never sees in a file. Only Pillow's rounding to whole levels is left out, which has no gradient.
    """
    for shape in ((images.shape[-2], width), (height, width)):
        if images.shape[-2:] != shape:
            images = functional.interpolate(images, shape, mode=mode, antialias=True, align_corners=False)
            images = images.clamp(0, 1)
    return images


def pad_to_square(images: Tensor, size: int) -> Tensor:
    """Bring the longer side to `size` (bicubic, see `stretch`), and put the picture in the middle of black."""
    factor = size / max(images.shape[-2:])
    height, width = (max(1, round(side * factor)) for side in images.shape[-2:])
    left, top = (size - width) // 2, (size - height) // 2
    around = (left, size - width - left, top, size - height - top)
    return functional.pad(stretch(images, height, width), around)


def center_crop(images: Tensor, size: int) -> Tensor:
    """Cut the central `size` x `size` square."""
    top, left = ((side - size) // 2 for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std, by channel."""
    center, scale = (images.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (images - center) / scale


def check_range(picture: Image.Image) -> None:
    """Raise `InputError` for a picture whose numbers have no known range."""
    if picture.mode in ("I", "F"):
        raise InputError(
            f"its pixels are numbers of mode {picture.mode!r}, of unknown range; save 8 or 16 bits"
        )


def from_pil(picture: Image.Image) -> Tensor:
    """(3, H, W) in [0, 1]; `InputError` as in `check_range`."""
    check_range(picture)
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion cuts off at 255.
        grey = torch.from_numpy(np.array(picture).astype(np.float32)) / 65535
        return grey.expand(3, -1, -1)
    upright = picture
    with contextlib.suppress(Exception):  # a damaged note is no damage to the picture
        upright = ImageOps.exif_transpose(picture)  # as a camera says that it was held
    pixels = torch.from_numpy(np.array(upright.convert("RGB")))
    return pixels.permute(2, 0, 1).float() / 255


def to_pil(images: Tensor) -> list[Image.Image]:
    """One 8-bit picture per row."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def as_png(picture: Image.Image) -> bytes:
    """A PNG file's content."""
    content = io.BytesIO()
    picture.save(content, format="png")
    return content.getvalue()


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Say in one sentence why a picture cannot be read; a damaged PNG is a SyntaxError to Pillow."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"picture {str(file)!r} cannot be read: {error}") from None
