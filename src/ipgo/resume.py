"""The state that a fit resumes from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ipgo.adapters import Adapter
from ipgo.errors import ResumeError


def all_tensors(
    memory: Mapping[str, Tensor],
    adapter: Adapter,
    kept: Adapter,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Tensor]:
    """Everything that a fit resumes from, by name; not copied."""
    tensors = {f"memory.{name}": value for name, value in memory.items()}
    for prefix, each in (("adapter", adapter), ("kept", kept)):
        tensors |= {f"{prefix}.{name}": value for name, value in each.state_dict().items()}
    if optimizer is None:
        return tensors
    for name, parameter in adapter.named_parameters():
        tensors |= {f"optimizer.{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same on the CPU, to be kept."""
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Put a kept state into `tensors`; `ResumeError` for one of another fit."""
    shapes, stored = ({name: each.shape for name, each in part.items()} for part in (tensors, state))
    if shapes != stored:
        raise ResumeError("this checkpoint belongs to a fit with other settings or prompts")
    for name, value in state.items():
        tensors[name].copy_(value)
