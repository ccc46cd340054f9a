"""What several stages do with the networks: pictures in, embeddings out."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from tools.emoji import parts, tokenizer
from tools.emoji.loop import DEVICE, trained


def pixels(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1]."""
    tensor = torch.from_numpy(images).to(DEVICE).permute(0, 3, 1, 2)
    return tensor.float().div(127.5).sub(1).contiguous()


def load_clip(name: str = "clip") -> tuple[CLIPModel, CLIPTokenizer]:
    """A trained CLIP and the tokenizer."""
    tokens = tokenizer.load()
    model = parts.clip(len(tokens), tokens.bos_token_id, tokens.eos_token_id)
    return trained(name, model), tokens


def embed(
    model: CLIPModel, tokens: CLIPTokenizer, images: Tensor, texts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Normalised image and text embeddings, (B, D) each; images in [-1, 1] as all our networks take them."""
    inputs = tokens(list(texts), padding=True, return_tensors="pt").to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        image = model.get_image_features(pixel_values=images).pooler_output
        text = model.get_text_features(**inputs).pooler_output
    return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
