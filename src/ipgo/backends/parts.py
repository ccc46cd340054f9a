"""The networks of a pipeline object: whether anything can be learned through them, and how they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ipgo.errors import InputError


def check_parts(pipe: Any) -> None:
    """Raise `InputError` for a pipeline object through which nothing can be learned."""
    for part, module in pipe.components.items():
        if moves(module):
            raise InputError(
                f"the pipeline's {part} is moved about (offloading, or a device map), which gradients do not follow; "
                "load it without (or call `pipe.reset_device_map()`, then `pipe.to('cuda')`), and leave its text "
                "encoders on the CPU with text_device='cpu'"
            )
        if _hooked(module, "layerwise_casting"):
            raise InputError(
                f"the pipeline's {part} keeps its weights in another format than it computes in (layerwise casting), "
                "through which nothing can be learned; load the pipeline without it"
            )
        if getattr(module, "is_cache_enabled", False) or _caches(module):
            raise InputError(
                f"the pipeline's {part} keeps features from one step for the next (a cache), which gradients do not "
                f"follow; switch it off (`pipe.{part}.disable_cache()`), or load the pipeline without it"
            )
        if getattr(getattr(module, "config", None), "encoder_hid_dim_type", None) == "ip_image_proj":
            raise InputError(
                f"the pipeline's {part} has an IP-Adapter, which wants an image besides the prompt; unload it "
                "(`pipe.unload_ip_adapter()`)"
            )
        if _attends_forward_only(module):
            raise InputError(
                f"the pipeline's {part} attends with a kernel of SageAttention, which has no backward pass; give it "
                f"another (`pipe.{part}.set_attention_backend('native')`)"
            )
        if isinstance(module, nn.Module) and any(each.is_inference() for each in module.parameters()):
            raise InputError(
                f"the pipeline's {part} was made in torch.inference_mode, through which nothing can be learned; "
                "load the pipeline outside of it"
            )


def quantised(module: object) -> bool:
    """Does it keep weights in another form than floating numbers, by bitsandbytes, GGUF, quanto, torchao or others?"""
    weights = module.parameters() if isinstance(module, nn.Module) else ()
    return bool(getattr(module, "is_quantized", False)) or any(
        not each.is_floating_point() or hasattr(each, "__tensor_flatten__") for each in weights
    )


def moves(module: object) -> bool:
    """Is it moved from device to device, by accelerate or by diffusers' group offloading?

    Hooks of accelerate that have its inputs where all of it stays, as `device_map` puts them on, move nothing.
    """
    hooks = [hook for each in _modules(module) for hook in _of_accelerate(each)]
    places = {each.device for part in _modules(module) for each in part.parameters()}
    places |= {
        torch.device(place)
        for hook in hooks
        if (place := getattr(hook, "execution_device", None)) is not None
    }
    offloads = any(getattr(hook, "offload", True) for hook in hooks)
    apart = len({(place.type, place.index or 0) for place in places}) > 1
    return offloads or (bool(hooks) and apart) or _hooked(module, "group_offloading")


def _of_accelerate(module: nn.Module) -> list[Any]:
    """The hooks of accelerate on it itself; of a sequence each."""
    hook: Any = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _caches(module: object) -> bool:
    """Does it have another hook of diffusers than those that move or cast it? All of these keep features."""
    return bool(_hooks(module) - {"group_offloading", "layerwise_casting"})


def _hooked(module: object, name: str) -> bool:
    """Does it have a hook of diffusers of this name, as `enable_layerwise_casting` makes them?"""
    return name in _hooks(module)


def _hooks(module: object) -> set[str]:
    found = (getattr(getattr(part, "_diffusers_hook", None), "hooks", {}) for part in _modules(module))
    return set().union(*found)


def _modules(module: object) -> Iterable[nn.Module]:
    return module.modules() if isinstance(module, nn.Module) else ()


def _attends_forward_only(module: object) -> bool:
    """Does it attend with a kernel of SageAttention, which was set for it, or for all that have none of their own?"""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    processors: list[Any] = [getattr(each, "processor", None) for each in _modules(module)]
    own = {each._attention_backend for each in processors if hasattr(each, "_attention_backend")}
    default = _AttentionBackendRegistry.get_active_backend()[0]
    return any("sage" in (name or default) for name in own)


@contextmanager
def as_they_were(pipe: object) -> Iterator[None]:
    """When this closes, the pipeline's networks are in the modes that they were in, and as much of them is frozen."""
    modules = [each for part in getattr(pipe, "components", {}).values() for each in _modules(part)]
    modes = [(module, module.training) for module in modules]
    weights = [(each, each.requires_grad) for module in modules for each in module.parameters(recurse=False)]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for each, wanted in weights:
            if each.requires_grad != wanted:
                each.requires_grad_(wanted)
