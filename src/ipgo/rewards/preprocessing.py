"""How a CLIP sees a picture of any size: a square, and each channel with CLIP's mean and spread."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ipgo.errors import InputError
from ipgo.images import center_crop, normalise, pad_to_square, resize

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """Pictures (B, 3, H, W) in [0, 1] to what a vision tower takes, (B, 3, size, size), differentiably.

    Attributes:
        size: the square's side.
        resize: `crop` brings the shorter side to `size` and cuts out the middle; `pad` brings the longer side there
            and puts the picture on black; `notebook` is `crop` with a bilinear filter, as in the released notebook.
    """

    size: int
    resize: str = "crop"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, images: Tensor) -> Tensor:
        if self.resize == "pad":
            square = pad_to_square(images, self.size)
        else:
            mode = "bilinear" if self.resize == "notebook" else "bicubic"
            square = center_crop(resize(images, self.size, mode), self.size)
        return normalise(square, self.mean, self.std)

    def __str__(self) -> str:
        how = {
            "crop": "shorter side bicubic to {0}, centre crop",
            "pad": "longer side bicubic to {0}, padded with black",
            "notebook": "shorter side bilinear to {0}, centre crop",
        }
        own = "" if (self.mean, self.std) == (CLIP_MEAN, CLIP_STD) else f", mean {self.mean}, std {self.std}"
        return how[self.resize].format(self.size) + own


def read_preprocessing(folder: Path, size: int, notebook: bool) -> Preprocessing:
    """What the folder of a CLIPModel says, or else CLIP's own numbers."""
    file = folder / "preprocessor_config.json"
    try:
        stated = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        mean, std = tuple(stated.get("image_mean", CLIP_MEAN)), tuple(stated.get("image_std", CLIP_STD))
    except (ValueError, AttributeError, TypeError):
        raise InputError(f"{str(file)!r} is damaged") from None
    return Preprocessing(size, "notebook" if notebook else "crop", mean, std)
