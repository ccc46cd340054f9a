"""How a CLIP sees a picture of any size: a square, and each channel with CLIP's mean and spread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ipgo.errors import InputError
from ipgo.files import read_json
from ipgo.images import center_crop, normalise, pad_to_square, resize, stretch

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Of how pictures are resized; 1 cut off less of what the filter overshoots. The bundled rewards keep 1: pictures of the
# bundled model have their size, and are not resized.
VERSION = 2

# Keys of a processor's configuration with what it is without them, and Pillow's numbers for its filters.
STATED, USUAL = ("image_mean", "image_std"), (CLIP_MEAN, CLIP_STD)
BILINEAR, BICUBIC = 2, 3


@dataclass(frozen=True)
class Preprocessing:
    """Pictures (B, 3, H, W) in [0, 1] to what a vision tower takes, (B, 3, size, size), differentiably.

    Attributes:
        size: the square's side.
        resize: `crop` brings the shorter side to `edge` and cuts out the middle; `pad` brings the longer side to `size`
            and puts the picture on black; `square` brings both sides there, whatever becomes of the proportions;
            `notebook` is `crop` with a bilinear filter, as in the released notebook.
        mean, std: of each channel.
        edge: of `crop`; None: `size`.
        bilinear: the filter of `crop` and `square`, which otherwise is bicubic.
    """

    size: int
    resize: str = "crop"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    edge: int | None = None
    bilinear: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        mode = "bilinear" if self.bilinear or self.resize == "notebook" else "bicubic"
        if self.resize == "pad":
            square = pad_to_square(images, self.size)
        elif self.resize == "square":
            square = stretch(images, self.size, self.size, mode)
        else:
            square = center_crop(resize(images, self.edge or self.size, mode), self.size)
        return normalise(square, self.mean, self.std)

    def __str__(self) -> str:
        mode = "bilinear" if self.bilinear or self.resize == "notebook" else "bicubic"
        how = {
            "pad": f"longer side {mode} to {self.size}, padded with black",
            "square": f"both sides {mode} to {self.size}",
        }
        cut = f"shorter side {mode} to {self.edge or self.size}, centre crop"
        cut += f" of {self.size}" if self.edge not in (None, self.size) else ""
        own = "" if (self.mean, self.std) == (CLIP_MEAN, CLIP_STD) else f", mean {self.mean}, std {self.std}"
        return how.get(self.resize, cut) + own


def read_preprocessing(folder: Path, size: int, notebook: bool) -> Preprocessing:
    """What the folder of a CLIPModel says, or else CLIP's own numbers.

    Raises:
        InputError: it says what is not done here, or is damaged.
    """
    file = folder / "preprocessor_config.json"
    stated = read_json(file) if file.is_file() else {}
    try:
        mean, std = (tuple(map(float, stated.get(key, own))) for key, own in zip(STATED, USUAL, strict=True))
    except (TypeError, ValueError):
        raise InputError(f"{str(file)!r} is damaged") from None
    if notebook:
        return Preprocessing(size, "notebook", mean, std)
    bilinear = stated.get("resample", BICUBIC) == BILINEAR
    how, edge = _resizing(stated, size)
    known = stated.get("resample", BICUBIC) in (BICUBIC, BILINEAR) and stated.get("do_normalize", True)
    if how is None or not known or len(mean) != 3 or len(std) != 3:
        raise InputError(
            f"{str(file)!r} prepares pictures in a way that is not done here; known are a centre crop of {size} "
            "pixels or a square of as many, bicubic or bilinear, normalised"
        )
    return Preprocessing(size, how, mean, std, edge, bilinear)


def _resizing(stated: Mapping[str, Any], size: int) -> tuple[str | None, int | None]:
    """`crop` with the shorter side before it, or `square`; (None, None) for another way, or to another size."""
    target, cut = stated.get("size", size), stated.get("crop_size", size)
    short = target.get("shortest_edge") if isinstance(target, dict) else target
    square = {"height": size, "width": size}
    cropped = stated.get("do_center_crop", True)
    if not stated.get("do_resize", True):
        return None, None
    if target == square and (not cropped or cut in (size, square)):
        return "square", None
    if cropped and cut in (size, square) and isinstance(short, int) and short >= size:
        return "crop", short
    return None, None
