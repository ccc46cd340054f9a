"""Tiny random models with the structure of the published rewards, and pictures to score."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, CLIPConfig, CLIPModel

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


def drawings(height: int, width: int, count: int = 3) -> list[Image.Image]:
    """Black and white shapes with sharp edges, as letters and logos are: what a bicubic filter overshoots at."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        picture = Image.new("RGB", (width, height), "white")
        pen = ImageDraw.Draw(picture)
        for _ in range(12):
            x, y = rng.integers(width), rng.integers(height)
            colour = tuple(int(each) for each in rng.choice([0, 255], 3))
            pen.rectangle((x, y, x + rng.integers(2, 12), y + rng.integers(2, 12)), fill=colour)
        found.append(picture)
    return found


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


class Block(nn.Module):
    """A layer of open_clip: its names, on torch's own attention."""

    def __init__(self, width: int, heads: int, activation: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        inner, outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=inner, gelu=activation, c_proj=outer))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    def __init__(self, width: int, heads: int, activation: nn.Module) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, activation) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Vision(nn.Module):
    """open_clip's picture tower: 28 pixels in patches of 14, two heads of 80."""

    def __init__(self, activation: nn.Module, width: int = 160) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(5, width))
        self.conv1 = nn.Conv2d(3, width, 14, 14, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Tower(width, 2, activation)
        self.proj = nn.Parameter(torch.randn(width, 8))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).mT
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """A tiny CLIP with the names and shapes of open_clip's ViT-H-14, which HPSv2 is published in."""

    def __init__(self, activation: nn.Module | None = None, width: int = 128) -> None:
        super().__init__()
        torch.manual_seed(0)
        activation = activation or nn.GELU()
        self.visual = Vision(activation)
        self.transformer = Tower(width, 2, activation)
        self.token_embedding = nn.Embedding(len(byte_tokenizer()), width)
        self.positional_embedding = nn.Parameter(torch.randn(77, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, 8))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, 77), filled up with 0; read off at the highest id, the end of text."""
        mask = torch.full((77, 77), -torch.inf).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


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


class BlipLayer(nn.Module):
    """A layer of BLIP's picture tower: timm's names, queries, keys and values in one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn["proj"](attend(*self.attn["qkv"](self.norm1(x)).chunk(3, -1)))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with heads of 64."""
    q, k, v = (each.unflatten(-1, (-1, 64)).transpose(1, 2) for each in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class BlipVision(nn.Module):
    """BLIP's picture tower: 32 pixels in patches of 16, two heads."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 16, 16)})
        self.blocks = nn.ModuleList(BlipLayer(width) for _ in range(2))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](pixels).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def bert_tokenizer() -> BertTokenizer:
    """BERT's tokenizer with one token for each letter."""
    letters = "abcdefghijklmnopqrstuvwxyz,"
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{each}" for each in letters)]
    return BertTokenizer(vocab={name: index for index, name in enumerate(names)})


class TinyImageReward(nn.Module):
    """ImageReward's parts with its names; the text encoder is transformers' own, whose names are BLIP's."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = BlipTextConfig(
            vocab_size=len(bert_tokenizer()),
            hidden_size=width,
            encoder_hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=40,
        )
        text = BlipTextModel(config, add_pooling_layer=False)
        self.blip = nn.ModuleDict({"visual_encoder": BlipVision(width), "text_encoder": text})
        self.mlp = nn.ModuleDict({"layers": linear_head(width)})

    def forward(self, pixels: Tensor, prompt: str) -> Tensor:
        """One picture and its prompt, not filled up."""
        tokens = bert_tokenizer()([prompt], return_tensors="pt")
        seen = self.blip["visual_encoder"](pixels)
        states = self.blip["text_encoder"](input_ids=tokens.input_ids, encoder_hidden_states=seen)
        value = self.mlp["layers"](states.last_hidden_state[:, 0])[:, 0]
        return (value - 0.16717362830052426) / 1.0333394966054072
