"""Human Preference Score v2 and v2.1: open_clip's ViT-H-14, tuned on rankings by people, as a CLIPModel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from ipgo.errors import InputError
from ipgo.rewards.checkpoints import Checkpoint, identity, open_model, read_state, reading
from ipgo.rewards.clip import ClipReward, TextTower, attention, clip_tokenizer
from ipgo.rewards.preprocessing import VERSION, Preprocessing

HEAD_WIDTH = {"vision": 80, "text": 64}  # of ViT-H-14; no tensor shows it
ACTIVATION = "gelu"  # open_clip's ViT-H-14; OpenAI's own towers have quick_gelu

# What open_clip calls a part, and transformers.
PARTS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
}
LAYER_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def load_hps(device: torch.device, checkpoint: Checkpoint) -> ClipReward:
    """HPS: cosine in a CLIP tuned on rankings by people, near 0.27; v2 and v2.1 are not comparable."""
    file = checkpoint.find()
    state = read_state(file, checkpoint.spec)
    try:
        config = config_of(state, ACTIVATION)
    except (KeyError, RuntimeError) as error:
        raise InputError(
            f"reward {checkpoint.spec!r}: {str(file)!r} is not a CLIP of open_clip: it has no {error}"
        ) from None
    tokenizer = clip_tokenizer(checkpoint, file, config.text_config.vocab_size)
    model = open_model(
        CLIPModel,
        None,
        checkpoint.spec,
        str(file),
        config=config,
        state_dict=convert(state),
        attn_implementation=attention(device),
    )
    size = config.vision_config.image_size
    preprocessing = Preprocessing(size, "notebook" if checkpoint.notebook else "pad")
    text = TextTower(model, tokenizer)
    about = identity(
        checkpoint.name, [file], preprocessing, VERSION, tokenizer=reading(tokenizer, text.longest)
    )
    return ClipReward(checkpoint.spec, model, text, preprocessing, about).to(device)


def config_of(state: Mapping[str, Tensor], activation: str) -> CLIPConfig:
    """The sizes of a CLIP, read off the tensors of an open_clip state dict."""
    layers = [match for match in map(LAYER.fullmatch, state) if match is not None]
    towers: dict[str, dict[str, Any]] = {}
    for tower, prefix in (("vision", "visual."), ("text", "")):
        inner, width = state[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"].shape
        depth = 1 + max(int(match[2]) for match in layers if (match[1] or "") == prefix)
        towers[tower] = {
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": depth,
            "num_attention_heads": width // HEAD_WIDTH[tower],
            "projection_dim": state["text_projection"].shape[1],
            "hidden_act": activation,
        }
    patch = state["visual.conv1.weight"].shape[-1]
    side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    vocabulary = len(state["token_embedding.weight"])
    # The text is read off at the highest id: the end of text.
    special = {"eos_token_id": vocabulary - 1, "bos_token_id": vocabulary - 2, "pad_token_id": 0}
    length = len(state["positional_embedding"])
    return CLIPConfig(
        vision_config={**towers["vision"], "patch_size": patch, "image_size": patch * side},
        text_config={
            **towers["text"],
            **special,
            "vocab_size": vocabulary,
            "max_position_embeddings": length,
        },
        projection_dim=state["text_projection"].shape[1],
    )


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip state dict in the names and shapes of a CLIPModel; what a CLIPModel has no place for is left out."""
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer = LAYER.fullmatch(name)
        part, _, kind = name.rpartition(".")
        if layer is not None:
            tower = "vision_model" if layer[1] else "text_model"
            converted |= _convert_layer(f"{tower}.encoder.layers.{layer[2]}", layer[3], tensor)
        elif name in PROJECTIONS:
            converted[PROJECTIONS[name]] = tensor.T.contiguous()
        elif name in PARTS:
            converted[PARTS[name]] = tensor
        elif part in PARTS:
            converted[f"{PARTS[part]}.{kind}"] = tensor
    return converted


def _convert_layer(prefix: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of a layer; queries, keys and values are stacked in open_clip's."""
    if name.startswith("attn.in_proj_"):
        kind = name.removeprefix("attn.in_proj_")
        stacked = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{which}_proj.{kind}": each.contiguous() for which, each in stacked}
    part, _, kind = name.rpartition(".")
    return {f"{prefix}.{LAYER_PARTS[part]}.{kind}": tensor} if part in LAYER_PARTS else {}
