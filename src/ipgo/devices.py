"""The device and the number format that models run in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from ipgo.errors import InputError, unknown

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def choose_device(wanted: str | torch.device) -> torch.device:
    """`auto` is the first GPU, or else the CPU; an explicit device that is absent is an `InputError`."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError):
        raise InputError(f"unknown device {wanted!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {str(wanted)!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {str(wanted)!r} is not there: torch sees {torch.cuda.device_count()} GPUs")
    return device


def choose_dtype(wanted: str | torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` is float32 on a CPU, bfloat16 on a GPU that computes with it, float16 on older ones.

    Args:
        wanted: auto, the name of a format, or the format itself: "float16" or torch.float16.
    """
    name = name_of(wanted) if isinstance(wanted, torch.dtype) else str(wanted)
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise unknown(
            "dtype", name, ["auto", *(each for each in DTYPES if each != "float64")]
        )  # it is for tests
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


@contextmanager
def own_numbers() -> Iterator[None]:
    """New tensors are float32 and on the CPU, and nothing is cast on its way, whatever the caller has set.

    So results depend on what is asked for alone.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as stack:
            if torch.get_default_device().type != "cpu":  # entered for nothing it would slow down every call
                stack.enter_context(torch.device("cpu"))
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.set_default_dtype(before)


def name_of(dtype: torch.dtype) -> str:
    """float32 and the like."""
    return str(dtype).removeprefix("torch.")
