"""Gradient ascent on a reward: the settings of the loop, and its optimisers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ipgo.errors import InputError, unknown
from ipgo.typed import check_types

Optimizer = Literal["adam", "sgd"]

MOMENTUM = 0.9  # Nesterov's, of optimizer="sgd"
LARGEST = 1_000_000  # of a rate: far beyond any use, and far from what overflows in float32


@dataclass(frozen=True)
class Ascent:
    """Gradient ascent on the reward, each row independently. The defaults are IPGO's; other methods have their own.

    Attributes:
        steps: optimiser steps.
        optimizer: adam, or sgd with Nesterov's momentum of 0.9.
        lr: learning rate.
        lr_basis: learning rate of the orthonormal basis, where there is one; None: `lr`.
        lr_decay: factor, at most 1, applied to the learning rates every `decay_every` steps.
        decay_every: steps between decays.
        max_grad_norm: each row's gradient is clipped to this norm; None: no clipping.
        backprop_steps: number of last denoising steps to backpropagate through (DRaFT's K); None: all.
        random_backprop: draw that number from 1 to backprop_steps, anew for each batch (AlignProp).
        renoised: further gradients of the last step alone, each from fresh noise (DRaFT-LV); 0: none. They are added to
            the reward's, so that the penalty weighs less beside them.
        keep_best: return the step with the highest reward (with S seeds, the highest mean over S consecutive steps),
            not the last one. Fresh noise and prompt-batch always return the last: their steps are not comparable.
        penalty_weight: weight of the adapter's penalty; for IPGO, the conformity penalty.
        batch_size: prompt-batch: prompts per forward pass.
        accumulate: prompt-batch: forward passes per optimiser step.
        recompute: gradient checkpointing: recompute activations of the differentiated denoiser calls, and of the
            decoder block by block, in the backward pass.
    """

    steps: int = 40
    optimizer: Optimizer = "adam"
    lr: float = 5e-3
    lr_basis: float | None = 1e-3
    lr_decay: float = 0.9
    decay_every: int = 10
    max_grad_norm: float | None = 1.0
    backprop_steps: int | None = 2
    random_backprop: bool = False
    renoised: int = 0
    keep_best: bool = True
    penalty_weight: float = 0.1
    batch_size: int = 1
    accumulate: int = 4
    recompute: bool = False

    def __post_init__(self) -> None:
        check_types(self, "ascent.")
        for field in ("steps", "decay_every", "backprop_steps", "batch_size", "accumulate"):
            count = getattr(self, field)
            if count is not None and count < 1:
                raise InputError(f"ascent.{field} is {count}; it must be at least 1")
        if self.optimizer not in get_args(Optimizer):
            raise unknown("ascent.optimizer", self.optimizer, get_args(Optimizer))
        for field, most in (
            ("lr", LARGEST),
            ("lr_basis", LARGEST),
            ("lr_decay", 1),
            ("max_grad_norm", LARGEST),
        ):
            value = getattr(self, field)
            if value is not None and not 0 < value <= most:
                raise InputError(f"ascent.{field} is {value}; it must be above 0 and at most {most:,}")
        for field in ("penalty_weight", "renoised"):
            if not getattr(self, field) >= 0:
                raise InputError(f"ascent.{field} is {getattr(self, field)}; it must be at least 0")

    def check_depth(self, steps: int, field: str = "steps") -> None:
        """Raise `InputError` if gradient is asked for in more denoising steps than there are."""
        if self.backprop_steps is not None and self.backprop_steps > steps:
            raise InputError(
                f"ascent.backprop_steps is {self.backprop_steps}; sampling.{field} allows at most {steps}"
            )

    def images(self, prompts: int, seeds: int) -> int:
        """How many images a step of a shared fit draws, of so many prompts and seeds (0 is always new noise).

        No prompt is drawn twice on one seed: the images would be the same.
        """
        most = self.batch_size * self.accumulate
        return min(most, prompts * seeds) if seeds else most

    def check_noise(self) -> None:
        """Raise `InputError` for what has no effect where nothing but noise is learned."""
        if self.renoised:
            raise InputError(
                f"ascent.renoised is {self.renoised}; where noise is learned it must be 0: "
                "no gradient of the last step alone reaches it"
            )

    def check_task(self, steps: int, seeds: int, shared: bool, whole: bool) -> None:
        """Raise `InputError` for settings that do not go with the fit.

        Args:
            steps: denoising steps.
            seeds: number of seeds, used in turn.
            shared: prompt-batch.
            whole: something is learned that needs gradient through all denoising steps, as the initial noise does.
        """
        if not shared and self.steps < seeds:
            raise InputError(
                f"ascent.steps is {self.steps}; {seeds} seeds, used in turn, need at least as many"
            )
        depth = self.backprop_steps or steps
        if whole and (depth < steps or self.random_backprop):
            raise InputError(
                f"ascent.backprop_steps is {depth}; noise gets its gradient through all {steps} steps (null), "
                "without ascent.random_backprop"
            )


def make_optimizer(parameters: Mapping[str, nn.Parameter], kind: Optimizer) -> torch.optim.Optimizer:
    """One group for each parameter, with all the state that it will ever have, for `load` to fill."""
    groups = [{"params": [parameter], "name": name} for name, parameter in parameters.items()]
    if kind == "sgd":
        sgd = torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True)
        for parameter in parameters.values():
            sgd.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
        return sgd
    adam = torch.optim.Adam(groups)
    for parameter in parameters.values():
        adam.state[parameter] = adam_state(parameter)
    return adam


def adam_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """All the state that Adam or AdamW will ever have for a parameter."""
    return {
        "step": torch.zeros(()),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
