"""The bundled world's rewards (`emoji-clip`, `emoji-aesthetic`, `emoji-preference`) and its held-out judge.

All are trained by tools/emoji on drawn scenes; docs/emoji-model.md says how well they do.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection
from transformers.utils import logging

from ipgo.images import center_crop, resize
from ipgo.rewards.checkpoints import identity
from ipgo.rewards.emoji.judge import Judge, load_judge

__all__ = ["Judge", "load_aesthetic", "load_clip", "load_judge", "load_preference"]

FOLDER = Path(__file__).parent
PREPROCESSING = "shorter side bicubic to the tower's, [-1, 1]"


class EmojiClip(nn.Module):
    """Cosine between the image and its prompt, in [-1, 1]: the alignment reward, as the CLIP score is for photographs.

    `name` is the folder of a CLIPModel beside this file.
    """

    differentiable = True

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__()
        self.name = name
        # Plain attention: on a CPU the fused kernel's backward pass takes longer than all the rest together.
        with _no_bars():
            model = CLIPModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer: CLIPTokenizer = AutoTokenizer.from_pretrained(FOLDER / "clip")
        self.identity = identity(name, [folder / "model.safetensors"], PREPROCESSING)
        self._text = lru_cache(maxsize=512)(self._embed_text)

    def _embed_text(self, prompt: str) -> Tensor:
        """(D,) normalised; a prompt longer than the tower is cut, since a reward must not refuse to judge."""
        inputs = self.tokenizer([prompt], truncation=True, return_tensors="pt").to(self.model.device)
        with torch.no_grad():
            return F.normalize(self.model.get_text_features(**inputs).pooler_output[0], dim=-1)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, D), normalised."""
        size = self.model.config.vision_config.image_size
        features = self.model.get_image_features(pixel_values=_pixels(images, size)).pooler_output
        return F.normalize(features, dim=-1)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        text = torch.stack([self._text(prompt) for prompt in prompts])
        return (self.embed(images) * text).sum(dim=-1)


class EmojiAesthetic(nn.Module):
    """Predicted picture quality, 0 (spoilt) to 1 (clean), by an image tower of its own that ends in one logit.

    Bounded, since quality is: beyond the best there is nothing to gain by leaving what pictures look like.
    """

    name = "emoji-aesthetic"
    differentiable = True
    uses_prompts = False

    def __init__(self, folder: Path) -> None:
        super().__init__()
        with _no_bars():
            model = CLIPVisionModelWithProjection.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            )
        self.model = model.eval().requires_grad_(False)
        self.identity = identity(self.name, [folder / "model.safetensors"], PREPROCESSING)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = _pixels(images, self.model.config.image_size)
        logit: Tensor = self.model(pixel_values=pixels).image_embeds[:, 0]
        return logit.sigmoid()


def _pixels(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) in [0, 1] to what the towers take: (B, 3, size, size) in [-1, 1]."""
    return center_crop(resize(images.float(), size), size) * 2 - 1


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bar of transformers: these weights are read in a moment."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_clip(device: str | torch.device = "cpu") -> EmojiClip:
    """The alignment reward: does the picture show what the prompt says?"""
    return EmojiClip("emoji-clip", FOLDER / "clip").to(device)


def load_preference(device: str | torch.device = "cpu") -> EmojiClip:
    """The preference reward: a CLIP tuned on pairs, where the better aligned and cleaner picture wins (as HPSv2)."""
    return EmojiClip("emoji-preference", FOLDER / "preference").to(device)


def load_aesthetic(device: str | torch.device = "cpu") -> EmojiAesthetic:
    """The quality reward; it never looks at the prompt."""
    return EmojiAesthetic(FOLDER / "aesthetic").to(device)
