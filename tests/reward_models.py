"""Tiny random models with the structure of the published rewards, and pictures to score."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from tests.conftest import byte_tokenizer

PROMPTS = ["a red fox", "two owls, at night", "a red fox"]


def pictures(height: int, width: int, count: int = 3) -> list[Image.Image]:
    """Smooth random pictures, as photographs are, with full blacks and whites."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(count, max(height // 8, 2), max(width // 8, 2), 3)) * 70 + 128
    fine = rng.normal(size=(count, height, width, 3)) * 12
    pixels = []
    for each, noise in zip(coarse, fine, strict=True):
        small = Image.fromarray(each.clip(0, 255).astype(np.uint8))
        large = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR), dtype=float)
        pixels.append(Image.fromarray((large + noise).clip(0, 255).astype(np.uint8)))
    return pixels


def tiny_clip(seed: int = 0) -> CLIPModel:
    torch.manual_seed(seed)
    vocabulary = len(byte_tokenizer())
    towers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    config = CLIPConfig(
        text_config={**towers, **ends, "vocab_size": vocabulary, "projection_dim": 8},
        vision_config={**towers, "image_size": 32, "patch_size": 8, "projection_dim": 8},
        projection_dim=8,
    )
    return CLIPModel(config).eval()


def linear_head(width: int, seed: int = 0) -> nn.Sequential:
    """The head of LAION's predictor and of ImageReward: five layers, dropout, and no activation."""
    torch.manual_seed(seed)
    sizes = (1024, 128, 64, 16)
    return nn.Sequential(
        nn.Linear(width, sizes[0]),
        nn.Dropout(0.2),
        nn.Linear(sizes[0], sizes[1]),
        nn.Dropout(0.2),
        nn.Linear(sizes[1], sizes[2]),
        nn.Dropout(0.1),
        nn.Linear(sizes[2], sizes[3]),
        nn.Linear(sizes[3], 1),
    )


def prefixed(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """A module's weights as part of a larger one."""
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}
