"""The bundled world's rewards (`emoji-likeness`, `emoji-clip`, `emoji-aesthetic`, `emoji-preference`) and its judge.

All but the first are trained by tools/emoji on drawn scenes; docs/emoji-model.md says how well they do.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModelWithProjection
from transformers.utils import logging

from ipgo.bars import only_of_downloads
from ipgo.rewards.checkpoints import identity
from ipgo.rewards.clip import ClipReward, TextTower
from ipgo.rewards.emoji.artwork import load_likeness
from ipgo.rewards.emoji.judge import Judge, load_judge
from ipgo.rewards.preprocessing import Preprocessing

__all__ = ["Judge", "load_aesthetic", "load_clip", "load_judge", "load_likeness", "load_preference"]

FOLDER = Path(__file__).parent
PREPROCESSING = Preprocessing(64, mean=(0.5,) * 3, std=(0.5,) * 3)


class EmojiAesthetic(nn.Module):
    """Predicted picture quality, 0 (spoilt) to 1 (clean), by an image tower of its own that ends in one logit.

    Bounded, since quality is: beyond the best there is nothing to gain by leaving what pictures look like.
    """

    name = "emoji-aesthetic"
    differentiable = True
    uses_prompts = False

    def __init__(self, folder: Path) -> None:
        super().__init__()
        with only_of_downloads(folder, logging):
            model = CLIPVisionModelWithProjection.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            )
        self.model = model.eval().requires_grad_(False)
        self.identity = identity(self.name, [folder / "model.safetensors"], PREPROCESSING)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        logit: Tensor = self.model(
            pixel_values=PREPROCESSING(images.to(self.model.device).float())
        ).image_embeds[:, 0]
        return logit.sigmoid()


def load_clip(device: str | torch.device = "cpu") -> ClipReward:
    """The alignment reward: does the picture show what the prompt says? A cosine, as the CLIP score of photographs."""
    return _cosine("clip", device)


def load_preference(device: str | torch.device = "cpu") -> ClipReward:
    """The preference reward: a CLIP tuned on pairs, where the better aligned and cleaner picture wins (as HPSv2)."""
    return _cosine("preference", device)


def _cosine(part: str, device: str | torch.device) -> ClipReward:
    """`part` is the folder of a CLIPModel beside this file; both read texts alike."""
    # Plain attention: on a CPU the fused kernel's backward pass takes longer than all the rest together.
    with only_of_downloads(FOLDER, logging):
        model = CLIPModel.from_pretrained(FOLDER / part, dtype=torch.float32, attn_implementation="eager")
    name, text = f"emoji-{part}", TextTower(model, AutoTokenizer.from_pretrained(FOLDER / "clip"))
    about = identity(name, [FOLDER / part / "model.safetensors"], PREPROCESSING)
    return ClipReward(name, model, text, PREPROCESSING, about).to(device)


def load_aesthetic(device: str | torch.device = "cpu") -> EmojiAesthetic:
    """The quality reward; it never looks at the prompt."""
    return EmojiAesthetic(FOLDER / "aesthetic").to(device)
