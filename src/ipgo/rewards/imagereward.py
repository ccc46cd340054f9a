"""ImageReward v1.0: BLIP's text encoder looks at the picture, and a linear head reads its [CLS] state."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from ipgo.errors import InputError
from ipgo.rewards.checkpoints import Checkpoint, identity, open_model, open_tokenizer, read_state, reading
from ipgo.rewards.linear import collapse
from ipgo.rewards.preprocessing import VERSION, Preprocessing

BERT = "google-bert/bert-base-uncased"  # its tokenizer
LONGEST = 35  # tokens that are read of a prompt, as in training
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's answers in training
HEAD_WIDTH = 64  # of ViT-L and of BERT; no tensor shows it

# What BLIP calls a part of its picture tower, and transformers; the text encoder's names are the same.
PARTS = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
LAYER_PARTS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
LAYER = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


class ImageReward(nn.Module):
    """Roughly standard normal over generated pictures; higher is better."""

    differentiable = True
    weight: Tensor  # (D,)
    bias: Tensor  # ()

    def __init__(
        self,
        name: str,
        towers: tuple[Any, Any],
        tokenizer: Any,
        head: tuple[Tensor, Tensor],
        preprocessing: Preprocessing,
        identity: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.name = name
        self.vision, self.text = (tower.eval().requires_grad_(False) for tower in towers)
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing
        self.identity = dict(identity)
        self.register_buffer("weight", head[0])
        self.register_buffer("bias", head[1])

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = self.preprocessing(images.to(self.vision.device, self.vision.dtype))
        seen = self.vision(pixel_values=pixels).last_hidden_state  # (B, N, D)
        # One length for all batches, so that a row does not depend on its neighbours.
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LONGEST, return_tensors="pt"
        ).to(self.text.device)
        states = self.text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen
        ).last_hidden_state
        value: Tensor = (states[:, 0] @ self.weight + self.bias - MEAN) / STD
        return value


def load_imagereward(device: torch.device, checkpoint: Checkpoint) -> ImageReward:
    """ImageReward v1.0: BLIP tuned on rankings by people, about -2 to 2."""
    file = checkpoint.find()
    state = read_state(file, checkpoint.spec)
    head = collapse(state, "mlp.layers.", checkpoint.spec)
    picture, prompt = (_part(state, f"blip.{name}_encoder.") for name in ("visual", "text"))
    try:
        vision_config, text_config = vision_config_of(picture), text_config_of(prompt)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"reward {checkpoint.spec!r}: {str(file)!r} is not a BLIP: it has no {error}"
        ) from None
    what, spec = str(file), checkpoint.spec
    tokenizer = open_tokenizer(
        BertTokenizer, checkpoint.tokenizer(BERT, file, "vocab.txt"), spec, text_config.vocab_size
    )
    vision = open_model(
        BlipVisionModel, None, spec, what, config=vision_config, state_dict=convert_vision(picture)
    )
    text = open_model(
        BlipTextModel, None, spec, what, config=text_config, state_dict=prompt, add_pooling_layer=False
    )
    resize = "notebook" if checkpoint.notebook else "crop"
    preprocessing = Preprocessing(vision_config.image_size, resize)
    about = identity(checkpoint.name, [file], preprocessing, VERSION, tokenizer=reading(tokenizer, LONGEST))
    return ImageReward(spec, (vision, text), tokenizer, head, preprocessing, about).to(device)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}


def vision_config_of(state: Mapping[str, Tensor]) -> BlipVisionConfig:
    """The sizes of BLIP's picture tower, read off its tensors."""
    inner, width = state["blocks.0.mlp.fc1.weight"].shape
    patch = state["patch_embed.proj.weight"].shape[-1]
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=1 + max(int(match[1]) for match in map(LAYER.fullmatch, state) if match),
        num_attention_heads=width // HEAD_WIDTH,
        patch_size=patch,
        image_size=patch * side,
        layer_norm_eps=1e-6,  # timm's, which BLIP was trained with
    )


def text_config_of(state: Mapping[str, Tensor]) -> BlipTextConfig:
    """The sizes of BLIP's text encoder, read off its tensors."""
    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    layers = [re.match(r"encoder\.layer\.(\d+)\.", name) for name in state]
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=1 + max(int(match[1]) for match in layers if match),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
    )


def convert_vision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BLIP's picture tower in transformers' names; the shapes are the same."""
    converted = {}
    for name, tensor in state.items():
        layer = LAYER.fullmatch(name)
        part, _, kind = name.rpartition(".")
        if layer is not None and layer[2] in LAYER_PARTS:
            converted[f"encoder.layers.{layer[1]}.{LAYER_PARTS[layer[2]]}.{layer[3]}"] = tensor
        elif name in PARTS:
            converted[PARTS[name]] = tensor
        elif part in PARTS:
            converted[f"{PARTS[part]}.{kind}"] = tensor
    return converted
