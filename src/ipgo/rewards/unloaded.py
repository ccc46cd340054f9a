"""The published rewards without their weights: built from configurations alone, to see how large they are.

tests/unit/test_published.py compares the numbers of parameters with the published ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
)

from ipgo import hub
from ipgo.errors import InputError, first_line
from ipgo.files import hub_id
from ipgo.memory import UNBOUNDED, Tokens, build
from ipgo.rewards import REWARDS, Reward, check_reward, combine, load_reward
from ipgo.rewards.aesthetic import Aesthetic
from ipgo.rewards.checkpoints import bare_name
from ipgo.rewards.clip import ClipReward, TextTower
from ipgo.rewards.imagereward import ImageReward
from ipgo.rewards.preprocessing import Preprocessing

VIT_L: dict[str, Any] = {
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "projection_dim": 768,
}
VIT_H: dict[str, Any] = {
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
    "projection_dim": 1024,
}
BLIP_VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
}
BLIP_TEXT: dict[str, Any] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "encoder_hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
}
TOWERS = {"clip": VIT_L, "aesthetic": VIT_L, "pickscore": VIT_H, "hpsv2": VIT_H, "hpsv2.1": VIT_H}


def unloaded_reward(spec: str, sizes: FakeTensorMode | None, device: str = "cpu") -> Reward:
    """As `load_reward`, but published models have sizes and no numbers, or random ones (`ipgo.memory.build`).

    A path to their weights is not followed, but for the folder or the hub id of a CLIPModel, whose configuration is
    read. Bundled rewards and those of one's own are loaded.

    Raises:
        InputError: as `load_reward`, and for a CLIP whose configuration cannot be read.
    """
    return combine(spec, lambda name: _unloaded(name, sizes, device))


def _unloaded(name: str, sizes: FakeTensorMode | None, device: str) -> Reward:
    bare = bare_name(name)
    known = REWARDS.get(bare)
    if known is not None and known.check is not None:
        raise InputError(f"reward {name!r} cannot be planned: it depends on pixel values")
    if known is None or known.source is None:
        return load_reward(name, device=device)
    check_reward(name)
    if bare == "imagereward":
        return _imagereward(name, sizes, device)
    config = _clip_config(name, bare)
    model = build(lambda: CLIPModel(config), sizes, torch.float32, device)
    preprocessing = Preprocessing(
        config.vision_config.image_size, "pad" if bare.startswith("hps") else "crop"
    )
    text = TextTower(model, Tokens(UNBOUNDED))
    if bare == "aesthetic":
        head = _head(config.projection_dim, device)
        return Aesthetic(name, model, preprocessing, head, {})
    return ClipReward(name, model, text, preprocessing, {}, scaled=bare == "pickscore")


def _clip_config(name: str, bare: str) -> Any:
    place = name.partition(":")[2] if bare in ("clip", "pickscore") else ""
    if not place:
        return CLIPConfig(**TOWERS[bare])
    try:
        with hub.within_reach(place):
            repo, revision = hub_id(place)
            return CLIPConfig.from_pretrained(repo, revision=revision or "main")
    except Exception as error:  # no network, or no such file, which libraries say in many ways
        raise InputError(
            f"reward {name!r}: the config.json of {place!r} is not here and cannot be fetched "
            f"({first_line(error)}); without it only {bare!r} itself can be planned"
        ) from error


def _imagereward(name: str, sizes: FakeTensorMode | None, device: str) -> ImageReward:
    vision_config, text_config = BlipVisionConfig(**BLIP_VISION), BlipTextConfig(**BLIP_TEXT)
    towers = (
        build(lambda: BlipVisionModel(vision_config), sizes, torch.float32, device),
        build(lambda: BlipTextModel(text_config, add_pooling_layer=False), sizes, torch.float32, device),
    )
    head = _head(text_config.hidden_size, device)
    preprocessing = Preprocessing(vision_config.image_size, "crop")
    return ImageReward(name, towers, Tokens(UNBOUNDED), head, preprocessing, {})


def _head(width: int, device: str) -> tuple[Tensor, Tensor]:
    return torch.ones(width, device=device), torch.zeros((), device=device)
