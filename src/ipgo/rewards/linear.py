"""Stacks of linear layers without anything between them, which are one linear map."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ipgo.errors import InputError


def collapse(state: Mapping[str, Tensor], prefix: str, reward: str) -> tuple[Tensor, Tensor]:
    """Layers `prefix`N.weight and `prefix`N.bias, ending in one number, to weight (D,) and bias () in float32.

    Multiplied in float64, so that the one map is nearer to the exact product than the layers run one by one.

    Raises:
        InputError: the layers do not follow each other down to one number.
    """
    found = [re.fullmatch(rf"{re.escape(prefix)}(\d+)\.weight", name) for name in state]
    numbers = sorted(int(match[1]) for match in found if match is not None)
    try:
        weight, bias = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for number in reversed(numbers):
            bias = weight @ state[f"{prefix}{number}.bias"].double() + bias
            weight = weight @ state[f"{prefix}{number}.weight"].double()
    except (KeyError, RuntimeError):
        numbers = []
    if not numbers:
        raise InputError(
            f"reward {reward!r}: its weights are not the linear layers {prefix}N.weight and {prefix}N.bias "
            "that end in one number"
        )
    return weight[0].float(), bias[0].float()
