"""Which weights a backend has, since results of two models of one name must not be taken for those of one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ipgo.errors import InputError

LORA = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")  # attributes of peft's layers
FREEU = ("s1", "s2", "b1", "b2")  # and of a UNet's blocks
SAMPLES = 8  # values read of each tensor: training changes nearly all of them


def fingerprint(modules: Mapping[str, nn.Module]) -> str | None:
    """Twelve hexadecimal digits for the weights in memory, wherever they came from.

    A few values of each tensor are read, so that it takes milliseconds for any model. None where there are no values
    to read, on the meta device.
    """
    digest = hashlib.sha256()
    for part, module in sorted(modules.items()):
        named = sorted(uncompiled(module).state_dict().items())
        tensors = [tensor for _, tensor in named if isinstance(tensor, Tensor)]
        if any(tensor.is_meta for tensor in tensors):
            return None
        shapes = [(name, tuple(tensor.shape)) for name, tensor in named if isinstance(tensor, Tensor)]
        digest.update(repr((part, shapes)).encode())
        for tensor in tensors:
            for plain in _plain(tensor):
                digest.update(_some(plain).numpy().tobytes())
        for name, switches in _switches(uncompiled(module)):
            digest.update(repr((name, switches)).encode())
    return digest.hexdigest()[:12]


def _switches(module: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """What changes pictures without being a weight: how strongly a LoRA of peft counts, and FreeU's factors."""
    for name, part in module.named_modules():
        wanted = LORA if hasattr(part, "lora_A") else FREEU
        found = {key: value for key in wanted if (value := getattr(part, key, None)) is not None}
        if found and all(isinstance(value, bool | int | float | list | dict) for value in found.values()):
            yield name, found


def uncompiled(module: nn.Module) -> nn.Module:
    """Without the wrapper of `torch.compile`, which gives every weight another name."""
    inner: nn.Module = getattr(module, "_orig_mod", module)
    return inner


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """Itself, or the tensors that one of a class such as torchao's quantised ones is made of."""
    made: Any = tensor
    if not hasattr(made, "__tensor_flatten__"):
        yield tensor
        return
    for name in made.__tensor_flatten__()[0]:
        yield from _plain(getattr(made, name))


def _some(tensor: Tensor) -> Tensor:
    """Evenly spaced values, the first and the last among them."""
    count = tensor.numel()
    if tensor.ndim == 0 or count == 0:
        return tensor.reshape(-1).float().cpu()
    places = torch.linspace(0, count - 1, min(SAMPLES, count), dtype=torch.float64).long()
    at = torch.unravel_index(places.to(tensor.device), tensor.shape)
    return tensor[at].float().cpu()


def check_numbers(modules: Iterable[tuple[str, nn.Module]], source: str) -> None:
    """Raise `InputError` if a tensor was in no file, so that it has no numbers, or holds one that is none."""
    for part, module in modules:
        for name, tensor in module.state_dict().items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            if tensor.is_meta:
                raise InputError(f"backend {source!r} is incomplete: the weights of {part} lack {name!r}")
            # A sum reads everything once, and one number that is not finite makes it so.
            plain = [each for each in _plain(tensor) if each.is_floating_point()]
            if not all(each.sum(dtype=torch.float32).isfinite() for each in plain):
                raise InputError(f"backend {source!r} is damaged: {name!r} of {part} is not finite")
