"""The schedulers that a diffusion model can be sampled with."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ipgo.errors import InputError

# The noise levels that a model was trained on stay when the scheduler changes; the rest is the new one's
# own, with the options that Stable Diffusion is shipped with. Latents are never clipped.
NOISE_LEVELS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr",
)  # fmt: skip
_SHIPPED = {"set_alpha_to_one": False, "steps_offset": 1}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {**_SHIPPED, "clip_sample": False}),
    "pndm": ("PNDMScheduler", {**_SHIPPED, "skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
}

# Models' own schedulers that add noise at every step: where it is given ...
STOCHASTIC = ("EulerAncestralDiscreteScheduler", "LCMScheduler", "SCMScheduler")
# ... and where it could not be, so that no image could be drawn twice.
REFUSED = (
    "CMStochasticIterativeScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DPMSolverSDEScheduler",
    "FlowMatchLCMScheduler", "KDPM2AncestralDiscreteScheduler", "LTXEulerAncestralRFScheduler", "SASolverScheduler",
    "TCDScheduler",
)  # fmt: skip


def is_one_of(scheduler: Any, names: Collection[str]) -> bool:
    """Is it of a class of these names, or of the user's own that is made of one?"""
    return any(kind.__name__ in names for kind in type(scheduler).__mro__)


def new_scheduler(own: Any, name: str | None) -> Any:
    """A new scheduler as the model's own, or the one of `SCHEDULERS` with its noise levels.

    Raises:
        InputError: the model's own draws noise of its own, or its noise levels are none that another can have.
    """
    if name is None:
        kind = type(own).__name__
        sde = str(own.config.get("algorithm_type")).startswith("sde")
        if is_one_of(own, REFUSED) or sde or own.config.get("stochastic_sampling"):
            raise InputError(
                f"scheduler is None; the model's own, {kind}, draws noise itself: choose another"
            )
        made = type(own).from_config(own.config)
        if getattr(own, "shift", None) != getattr(made, "shift", None):  # set since, beside the configuration
            made.set_shift(own.shift)
        return made
    import diffusers  # here, because it takes seconds

    flow = own.config.get("use_flow_sigmas") or own.config.get("prediction_type") == "flow_prediction"
    if "beta_schedule" not in own.config or "sigma_data" in own.config or flow:
        raise InputError(
            f"scheduler is {name!r}; the model's own, {type(own).__name__}, has noise levels that no other can have: "
            "leave scheduler out"
        )
    kind, options = SCHEDULERS[name]
    if name == "pndm" and own.config.get("prediction_type") == "sample":
        raise InputError("scheduler is 'pndm', which knows no model that predicts the picture; take another")
    wanted = getattr(diffusers, kind)
    known = inspect.signature(wanted).parameters
    levels = {key: own.config[key] for key in NOISE_LEVELS if key in own.config}
    # A model that is drawn in few steps begins at the very last timestep, and a schedule that does not with pictures
    # that have no noise for it.
    if own.config.get("timestep_spacing") == "trailing":
        levels["timestep_spacing"] = "trailing"
    for key, value in levels.items():
        if key not in known and value:
            raise InputError(
                f"scheduler is {name!r}; the model was made for {key} = {value!r}, which {kind} does not have"
            )
    return wanted(**{key: value for key, value in levels.items() if key in known}, **options)


def shift(tokens: int, config: Any) -> float:
    """mu, how far a flow's schedule is shifted for an image of so many tokens: linear in their number."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)  # the pipelines' own defaults
    return float(least + (most - least) / (high - low) * (tokens - low))


def shifted(steps: int, tokens: int, config: Any) -> dict[str, Any]:
    """Arguments of `set_timesteps` for an image of so many tokens: equal steps from 1 on, and their shift."""
    return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": shift(tokens, config)}


def shifted_or_own(steps: int, tokens: int, config: Any) -> dict[str, Any]:
    """As `shifted`, unless the scheduler is configured to space a flow's steps itself: FLUX's pipelines let it."""
    arguments = shifted(steps, tokens, config)
    if config.get("use_flow_sigmas"):
        del arguments["sigmas"]
        arguments["num_inference_steps"] = steps
    return arguments


def to_the_last(scheduler: Any) -> Any:
    """The scheduler, beginning at the very last timestep: where a model of few steps was trained to begin.

    The base model's, which a fine-tuned file comes with, spaces its steps so that the only one is at the end.
    """
    spacing = scheduler.config.get("timestep_spacing")
    if spacing in (None, "trailing") or is_one_of(scheduler, ["LCMScheduler"]):
        return scheduler
    return type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")


class Denoised(NamedTuple):
    """What a consistency step makes of noisy latents: clean ones (B, C, h, w)."""

    denoised: Tensor


class TrigFlow:
    """An `SCMScheduler` in the form of an `LCMScheduler` (arXiv 2410.11081, TrigFlow).

    Its own noise comes with the latents' size, its timesteps end with that of no call, and it cannot add noise to
    clean latents. Angles run from pi / 2, noise alone, to 0.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.config = scheduler.config
        self.init_noise_sigma = scheduler.config.sigma_data
        self.timesteps = scheduler.timesteps[:-1]

    @property
    def step_index(self) -> int:
        return int(self.scheduler.step_index)

    def step(
        self, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: torch.Generator
    ) -> Denoised:
        answer = self.scheduler.step(prediction, timestep, latents, generator=generator)
        return Denoised(answer.pred_original_sample)

    def add_noise(self, clean: Tensor, noise: Tensor, angle: Tensor) -> Tensor:
        """Clean latents at an angle, for `noise` of N(0, 1)."""
        noisy: Tensor = angle.cos() * clean + angle.sin() * self.init_noise_sigma * noise
        return noisy


def described(scheduler: Any) -> str:
    """Its class, and a digest of its settings: "DDIMScheduler-1a2b3c4d"."""
    settings = {key: value for key, value in sorted(scheduler.config.items()) if key[0] != "_"}
    if settings.get("shift") != (shift := getattr(scheduler, "shift", None)) and shift is not None:
        settings["shift"] = shift
    text = json.dumps(
        settings, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value)
    )
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{type(scheduler).__name__}-{digest[:8]}"
