"""PPO on a denoiser's steps: its settings and its arithmetic (arXiv 1707.06347, 2305.13301)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ipgo.errors import InputError
from ipgo.typed import check_types


@dataclass(frozen=True)
class PPO:
    """PPO's settings: how trajectories are drawn and learned from.

    Attributes:
        epochs: rounds of drawing trajectories and of learning from them.
        samples: trajectories per epoch; prompt-batch: of the prompts in shuffled passes.
        batch_size: trajectories per forward pass.
        accumulate: batches, each with all its steps, per optimiser step.
        inner_epochs: passes over an epoch's trajectories.
        eta: DDIM's eta in the fit, instead of `sampling.eta`.
        lr: learning rate of AdamW; the paper's 3e-4 is for thousands of images, and a LoRA of one prompt sees few.
        weight_decay: weight decay of AdamW.
        max_grad_norm: the gradient is clipped to this norm; None: no clipping.
        clip_range: clip range of the probability ratio around 1 (PPO's epsilon). It is small because log-probabilities
            are means over the latents' dimensions.
        max_advantage: advantages are clipped to this absolute value.
        history: number of a prompt's latest rewards that its advantages are normalised by.
        min_history: with fewer, they are normalised by the epoch's rewards.
    """

    epochs: int = 50
    samples: int = 16
    batch_size: int = 4
    accumulate: int = 2
    inner_epochs: int = 1
    eta: float = 1.0
    lr: float = 3e-3
    weight_decay: float = 1e-4
    max_grad_norm: float | None = 1.0
    clip_range: float = 1e-4
    max_advantage: float = 5.0
    history: int = 32
    min_history: int = 16

    def __post_init__(self) -> None:
        check_types(self, "ppo.")
        least = {"epochs": 1, "samples": 2, "batch_size": 1, "accumulate": 1, "inner_epochs": 1}
        for field, count in (least | {"weight_decay": 0, "history": 2, "min_history": 2}).items():
            if not getattr(self, field) >= count:
                raise InputError(f"ppo.{field} is {getattr(self, field)}; it must be at least {count}")
        for field in ("eta", "lr", "max_grad_norm", "clip_range", "max_advantage"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise InputError(f"ppo.{field} is {value}; it must be above 0")
        if self.eta > 1:
            raise InputError(f"ppo.eta is {self.eta}; it must be at most 1")
        if self.min_history > self.history:
            raise InputError(f"ppo.min_history is {self.min_history}; ppo.history keeps only {self.history}")


def log_probability(latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B,): log N(latents; mean, std^2), the mean over the dimensions of (B, C, h, w) latents; std > 0 is ().

    The mean instead of the sum goes with a clip range of 1e-4 (the paper's code).
    """
    distance = (latents - mean) / std
    return -distance.square().flatten(1).mean(1) / 2 - std.log() - math.log(2 * math.pi) / 2


def advantages(rewards: Tensor, numbers: Tensor, recent: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """The advantages (S,) of rewards (S,), and the prompts' recent rewards (P, H) with these, newest last.

    (reward - mean) / standard deviation over the recent rewards of its prompt, numbers[i], or over `rewards`
    where these are fewer than `least`. `recent` is NaN where there was none yet.
    """
    recent = recent.clone()
    for number in torch.unique(numbers).tolist():
        recent[number] = torch.cat([recent[number], rewards[numbers == number]])[-recent.shape[1] :]
    mean = recent.nanmean(1)
    std = (recent - mean[:, None]).square().nanmean(1).sqrt()
    few = recent.isfinite().sum(1) < least
    mean = torch.where(few, rewards.mean(), mean)
    std = torch.where(few, rewards.std(correction=0), std)
    return (rewards - mean[numbers]) / (std[numbers] + 1e-6), recent


def surrogate(log_probability: Tensor, before: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """(B,): PPO's clipped objective (arXiv 1707.06347, eq. 7), of log-probabilities (B,) now and when drawn."""
    ratio = (log_probability - before).exp()
    return torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
