"""Rewards that are the cosine of a picture and its prompt in a CLIP: `clip` and `pickscore`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from ipgo.rewards.checkpoints import (
    CLIP_L,
    Checkpoint,
    architecture,
    identity,
    open_model,
    open_tokenizer,
    reading,
    weight_files,
)
from ipgo.rewards.preprocessing import VERSION, Preprocessing, read_preprocessing


class TextTower:
    """Prompts to embeddings by the text half of a CLIP, which it takes out of the model.

    It stays on the CPU: each prompt is embedded once, and need not take a GPU's memory for it (the text half is more
    than a third of ViT-H/14).
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.encoder, self.projection = model.text_model, model.text_projection
        del model.text_model, model.text_projection
        for part in (self.encoder, self.projection):
            part.eval().requires_grad_(False)
            if next(part.parameters()).device.type != "cpu":  # tensors without numbers cannot be moved
                part.cpu()
        self.tokenizer = tokenizer
        self.longest = model.config.text_config.max_position_embeddings
        self._embed = lru_cache(maxsize=16_384)(self._embed_one)

    def _embed_one(self, prompt: str) -> Tensor:
        """(D,) normalised; a prompt longer than the tower is cut, since a reward must not refuse to judge."""
        inputs = self.tokenizer([prompt], truncation=True, max_length=self.longest, return_tensors="pt")
        with torch.no_grad():
            return F.normalize(self.projection(self.encoder(**inputs).pooler_output)[0], dim=-1)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """(B, D) on the CPU."""
        return torch.stack([self._embed(prompt) for prompt in prompts])


class ClipReward(nn.Module):
    """Cosine of the embeddings in [-1, 1], or that times the model's own scale if `scaled` (PickScore, eq. 2).

    The model is frozen and computes in the precision of its weights; gradients reach the pictures. Scores of a row do
    not depend on its neighbours.
    """

    differentiable = True

    def __init__(
        self,
        name: str,
        model: Any,
        text: TextTower,
        preprocessing: Preprocessing,
        identity: Mapping[str, Any],
        scaled: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.text = text
        self.preprocessing = preprocessing
        self.identity = dict(identity)
        self.scaled = scaled

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pictures = embed(self.model, self.preprocessing, images)
        cosine = (pictures * self.text(prompts).to(pictures)).sum(dim=-1)
        return cosine * self.model.logit_scale.exp() if self.scaled else cosine


def embed(model: Any, preprocessing: Preprocessing, images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] to embeddings (B, D), normalised."""
    pixels = preprocessing(images.to(model.device, model.dtype))
    return F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)


def load_clip(device: torch.device, checkpoint: Checkpoint) -> ClipReward:
    """CLIP score: cosine of picture and prompt (ViT-L/14 unless another CLIP is given)."""
    return _load(device, checkpoint, scaled=False)


def load_pickscore(device: torch.device, checkpoint: Checkpoint) -> ClipReward:
    """PickScore: scaled cosine in a CLIP tuned on the choices of people, about 18 to 24."""
    return _load(device, checkpoint, scaled=True)


def _load(device: torch.device, checkpoint: Checkpoint, scaled: bool) -> ClipReward:
    folder = checkpoint.find()
    model = read_clip(folder, checkpoint.spec, device)
    tokenizer = clip_tokenizer(checkpoint, folder, model.config.text_config.vocab_size)
    size = model.config.vision_config.image_size
    preprocessing = read_preprocessing(folder, size, checkpoint.notebook)
    text = TextTower(model, tokenizer)
    about = identity(
        checkpoint.name,
        weight_files(folder),
        preprocessing,
        VERSION,
        tokenizer=reading(tokenizer, text.longest),
        architecture=architecture(model.config),
    )
    return ClipReward(checkpoint.spec, model, text, preprocessing, about, scaled).to(device)


def clip_tokenizer(checkpoint: Checkpoint, found: Path, size: int) -> Any:
    """CLIP's tokenizer, beside the weights that were found or from the hub; see `open_tokenizer`."""
    place = checkpoint.tokenizer(CLIP_L, found, "vocab.json", "merges.txt")
    return open_tokenizer(CLIPTokenizer, place, checkpoint.spec, size)


def read_clip(folder: Path, reward: str, device: torch.device) -> Any:
    """A CLIPModel in float32; `InputError` if the folder holds anything else."""
    return open_model(
        CLIPModel, folder, reward, str(folder), use_safetensors=True, attn_implementation=attention(device)
    )


def attention(device: torch.device) -> str:
    """On a CPU the fused kernel's backward pass takes longer than all the rest together."""
    return "eager" if device.type == "cpu" else "sdpa"
