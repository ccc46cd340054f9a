"""Which weights a backend has: results of two models of one name must not be taken for those of one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

SAMPLES = 8  # values read of each tensor: training changes nearly all of them


def fingerprint(modules: Mapping[str, nn.Module]) -> str | None:
    """Twelve hexadecimal digits for the weights in memory, wherever they came from.

    A few values of each tensor are read, so that it takes milliseconds for any model. None where there are no values
    to read, on the meta device.
    """
    digest = hashlib.sha256()
    for part, module in sorted(modules.items()):
        named = sorted(module.state_dict().items())
        tensors = [tensor for _, tensor in named if isinstance(tensor, Tensor)]
        if any(tensor.is_meta for tensor in tensors):
            return None
        shapes = [(name, tuple(tensor.shape)) for name, tensor in named if isinstance(tensor, Tensor)]
        digest.update(repr((part, shapes)).encode())
        for tensor in tensors:
            digest.update(_some(tensor).numpy().tobytes())
    return digest.hexdigest()[:12]


def _some(tensor: Tensor) -> Tensor:
    """Evenly spaced values, the first and the last among them."""
    count = tensor.numel()
    if tensor.ndim == 0 or count == 0:
        return tensor.reshape(-1).float().cpu()
    places = torch.linspace(0, count - 1, min(SAMPLES, count), dtype=torch.float64).long()
    at = torch.unravel_index(places.to(tensor.device), tensor.shape)
    return tensor[at].float().cpu()
