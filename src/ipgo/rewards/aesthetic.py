"""LAION's aesthetic predictor v2 (sac+logos+ava1-l14-linearMSE): picture quality from a CLIP embedding alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ipgo.errors import InputError
from ipgo.rewards.checkpoints import (
    CLIP_L,
    FOLDER,
    MODEL,
    Checkpoint,
    architecture,
    identity,
    read_state,
    weight_files,
)
from ipgo.rewards.clip import embed, read_clip
from ipgo.rewards.linear import collapse
from ipgo.rewards.preprocessing import VERSION, Preprocessing, read_preprocessing


class Aesthetic(nn.Module):
    """About 1 to 10; photographs lie near 5.5. The five layers have nothing between them: one dot product."""

    differentiable = True
    uses_prompts = False
    weight: Tensor  # (D,)
    bias: Tensor  # ()

    def __init__(
        self,
        name: str,
        model: Any,
        preprocessing: Preprocessing,
        head: tuple[Tensor, Tensor],
        identity: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.preprocessing = preprocessing
        self.identity = dict(identity)
        self.register_buffer("weight", head[0])
        self.register_buffer("bias", head[1])

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        quality: Tensor = embed(self.model, self.preprocessing, images) @ self.weight + self.bias
        return quality


def load_aesthetic(device: torch.device, checkpoint: Checkpoint) -> Aesthetic:
    """LAION aesthetic v2: how good a picture looks, about 1 to 10, whatever its prompt."""
    file = checkpoint.find()
    folder = checkpoint.beside(CLIP_L, file, FOLDER, MODEL)
    model = read_clip(folder, checkpoint.spec, device)
    head = collapse(read_state(file, checkpoint.spec), "layers.", checkpoint.spec)
    if len(head[0]) != model.config.projection_dim:
        raise InputError(
            f"reward {checkpoint.spec!r}: {str(file)!r} reads {len(head[0])} numbers of a picture, but the CLIP in "
            f"{str(folder)!r} gives {model.config.projection_dim}; it belongs to {CLIP_L}"
        )
    del model.text_model, model.text_projection  # it does not look at the prompt
    size = model.config.vision_config.image_size
    preprocessing = read_preprocessing(folder, size, checkpoint.notebook)
    about = identity(
        checkpoint.name,
        [*weight_files(folder), file],
        preprocessing,
        VERSION,
        architecture=architecture(model.config),
    )
    return Aesthetic(checkpoint.spec, model, preprocessing, head, about).to(device)
