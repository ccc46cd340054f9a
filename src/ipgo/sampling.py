"""From noise to images: the one denoising loop of the project."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ipgo.backends import Backend
from ipgo.backends.recomputing import TRANSFORMER, blocks, recomputed, row_by_row
from ipgo.backends.schedulers import is_one_of
from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError
from ipgo.typed import check_types


@dataclass(frozen=True)
class Sampling:
    """How images are sampled.

    Attributes:
        steps: denoising steps.
        guidance_scale: weight of classifier-free guidance, of which 1 or less is none; or what a network is given that
            takes the scale as an input. None: the backend's own.
        eta: 0 is deterministic; above 0, up to 1, DDIM adds noise at each step.
        negative_prompt: what guidance moves away from.
        fit_steps: denoising steps of the images that a fit learns from, if fewer than `steps`; None: `steps`.
            Chosen by benchmarks/truncation.py. With eta above 0, or a scheduler that draws noise, a
            fit takes all steps, since each has noise of its own.
    """

    steps: int = 20
    guidance_scale: float | None = None
    eta: float = 0.0
    negative_prompt: str = ""
    fit_steps: int | None = 8

    def __post_init__(self) -> None:
        check_types(self, "sampling.")
        if self.steps < 1:
            raise InputError(f"sampling.steps is {self.steps}; it must be at least 1")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise InputError(f"sampling.guidance_scale is {self.guidance_scale}; it must be a finite number")
        if not 0 <= self.eta <= 1:
            raise InputError(f"sampling.eta is {self.eta}; it must be between 0 and 1")
        if self.fit_steps is not None and self.fit_steps < 1:
            raise InputError(f"sampling.fit_steps is {self.fit_steps}; it must be at least 1")

    @property
    def fitting(self) -> Sampling:
        """How the images that a fit learns from are sampled."""
        most = self.steps if self.fit_steps is None or self.eta > 0 else self.fit_steps
        return replace(self, steps=min(self.steps, most), fit_steps=None)

    def for_fit(self, backend: Backend) -> Sampling:
        """The same on this backend: all steps where its scheduler draws noise of its own for each, as with eta."""
        return replace(self, fit_steps=None) if backend.stochastic else self.fitting

    def scale(self, backend: Backend) -> float:
        """The guidance scale that this backend is sampled with."""
        return backend.guidance_scale if self.guidance_scale is None else self.guidance_scale

    def guided(self, backend: Backend) -> bool:
        """Whether a second prompt, the negative one, takes part in every step."""
        return backend.guidance == "classifier-free" and self.scale(backend) > 1

    def check(self, backend: Backend) -> None:
        """Raise `InputError` for what the backend's scheduler cannot do: so many steps, or noise at each of them."""
        scheduler = backend.scheduler(self.steps, backend.noise([0])[:, 0])
        if self.eta > 0:
            need_ddim(scheduler, "sampling.eta")

    def noise_steps(self, backend: Backend) -> int:
        """How many draws of noise a trajectory needs after the initial one."""
        return self.steps if self.eta > 0 or backend.stochastic else 0


@dataclass(frozen=True)
class Step:
    """One step of a trajectory: `prediction` at `timestep` took `latents` to `next_latents` (B, C, h, w)."""

    index: int
    timestep: Tensor
    latents: Tensor
    prediction: Tensor
    next_latents: Tensor


def unconditional(backend: Backend, cond: PromptEmbeds, sampling: Sampling) -> PromptEmbeds | None:
    """What guidance moves away from, without gradient; None if guidance is off, or has no such half.

    Raises:
        InputError: a negative prompt without guidance, or for a model whose guidance has no such half.
    """
    if backend.guidance != "classifier-free" and sampling.negative_prompt:
        raise InputError(
            f"sampling.negative_prompt is {sampling.negative_prompt!r}; it needs classifier-free guidance, "
            f"and that of backend {backend.name!r} is {backend.guidance!r}"
        )
    if not sampling.guided(backend):
        if sampling.negative_prompt:
            raise InputError(
                f"sampling.negative_prompt is {sampling.negative_prompt!r}; without guidance "
                f"(sampling.guidance_scale {sampling.scale(backend):g}) it has no effect"
            )
        return None
    with torch.no_grad():
        return backend.unconditional(sampling.negative_prompt, cond)


def denoise(
    backend: Backend,
    cond: PromptEmbeds,
    uncond: PromptEmbeds | None,
    noise: Tensor,
    sampling: Sampling,
    *,
    backprop_steps: int = 0,
    backprop_from: int | None = None,
    recompute: bool = False,
) -> Iterator[Step]:
    """Walk from noise (B, 1 + n, C, h, w) to clean latents, with gradient in the last steps alone (DRaFT-K).

    Args:
        backprop_steps: K, the number of last denoiser calls that build a graph; 0 for none, `sampling.steps`
            for all. Schedulers that make more calls than steps (PNDM) count calls.
        backprop_from: in place of K, the first call that builds a graph, counted from 0.
        recompute: gradient checkpointing: recompute the activations of these calls in the backward pass; those of
            large transformers then block by block, once more.
    """
    latents = noise[:, 0].to(backend.device, torch.promote_types(backend.dtype, torch.float32))
    scheduler = backend.scheduler(sampling.steps, latents)
    # Flows start from the noise itself, and never scale.
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    scale_input = getattr(scheduler, "scale_model_input", lambda latents, timestep: latents)
    calls = len(scheduler.timesteps)
    first_grad = 0 if backprop_steps >= sampling.steps else calls - backprop_steps
    if backprop_from is not None:
        first_grad = backprop_from
    for index, timestep in enumerate(scheduler.timesteps):
        # Closed before the yield: a generator's grad mode would leak into its consumer.
        with torch.set_grad_enabled(index >= first_grad):
            call = (
                scale_input(latents, timestep),
                timestep,
                cond.at(index, calls),
                None if uncond is None else uncond.at(index, calls),
                sampling.scale(backend),
            )
            again = recompute and torch.is_grad_enabled()
            prediction = _predict_twice(backend, *call) if again else backend.predict(*call)
            if sampling.eta > 0:
                mean, std = ddim_step(scheduler, prediction, timestep, latents, sampling.eta)
                next_latents = mean + std * noise[:, 1 + index].to(mean)
            elif backend.stochastic:
                next_latents = noisy_step(scheduler, prediction, timestep, latents, noise[:, 1 + index])
            else:
                next_latents = scheduler.step(prediction, timestep, latents).prev_sample
        yield Step(index, timestep, latents, prediction, next_latents)
        latents = next_latents


def _predict_twice(backend: Backend, *call: Any) -> Tensor:
    """`Backend.predict` under gradient checkpointing."""
    counted = Counter(backend.calls)
    prediction: Tensor = checkpoint(_predict_in_blocks, backend, *call, use_reentrant=False)
    for name in ("denoiser_grad", "denoiser_grad_both"):  # the backward pass will count them
        backend.calls[name] = counted[name]
    return prediction


def _predict_in_blocks(backend: Backend, *call: Any) -> Tensor:
    """`Backend.predict`, of which a transformer keeps the inputs of its blocks alone."""
    with recomputed(backend.modules["denoiser"], TRANSFORMER):
        return backend.predict(*call)


def sample(
    backend: Backend,
    cond: PromptEmbeds,
    uncond: PromptEmbeds | None,
    noise: Tensor,
    sampling: Sampling,
    *,
    backprop_steps: int = 0,
    recompute: bool = False,
) -> Tensor:
    """Exhaust `denoise` and decode: (B, 3, H, W) images in [0, 1]."""
    walk = denoise(backend, cond, uncond, noise, sampling, backprop_steps=backprop_steps, recompute=recompute)
    latents = last_latents(walk)
    with torch.set_grad_enabled(backprop_steps > 0):
        return decode(backend, latents, recompute=recompute)


def last_latents(walk: Iterator[Step]) -> Tensor:
    """Exhaust `denoise`: the clean latents (B, C, h, w)."""
    for step in walk:
        latents = step.next_latents
    return latents


def decode(backend: Backend, latents: Tensor, *, recompute: bool = False) -> Tensor:
    """`Backend.decode`; the caller's grad mode decides. Without gradient row by row, which takes least memory.

    Args:
        recompute: gradient checkpointing: keep only the inputs of the decoder's blocks, and recompute these one by one
            in the backward pass; a decoder without known blocks as a whole.
    """
    if not torch.is_grad_enabled():
        return torch.cat([backend.decode(row[None]) for row in latents])
    if not recompute:
        return backend.decode(latents)
    vae: Any = backend.modules["decoder"]
    if not blocks(vae.decoder):
        images: Tensor = checkpoint(backend.decode, latents, use_reentrant=False)
        return images
    with recomputed(vae.decoder), row_by_row(vae.decoder):
        images = backend.decode(latents)
    backend.calls["decoder"] += len(latents)  # the work of the backward pass
    return images


def redo_last_step(
    backend: Backend,
    cond: PromptEmbeds,
    uncond: PromptEmbeds | None,
    latents: Tensor,
    noise: Tensor,
    sampling: Sampling,
    *,
    recompute: bool = False,
) -> Tensor:
    """Noise clean latents up to the last timestep again, and take that step: (B, C, h, w) (DRaFT-LV).

    Gradient reaches `cond` and the denoiser's weights, not `latents`.

    Args:
        recompute: as in `denoise`.

    Raises:
        InputError: the scheduler is not DDIM; others need the steps before the last one.
    """
    scheduler = backend.scheduler(sampling.steps, latents)
    need_ddim(scheduler, "ascent.renoised")
    timestep = scheduler.timesteps[-1]
    noisy = scheduler.add_noise(latents.detach(), noise.to(latents), timestep)
    predict = _predict_twice if recompute else type(backend).predict
    prediction = predict(backend, noisy, timestep, cond, uncond, sampling.scale(backend))
    clean: Tensor = scheduler.step(prediction, timestep, noisy).prev_sample
    return clean


def ddim_step(
    scheduler: Any, prediction: Tensor, timestep: Tensor, latents: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """Mean (B, C, h, w) and standard deviation () of a DDIM step (arXiv 2010.02502, eq. 12 and 16).

    Raises:
        InputError: the scheduler is not DDIM, the only one here that defines a stochastic step.
    """
    need_ddim(scheduler, "sampling.eta")
    no_noise = torch.zeros_like(latents)
    mean = scheduler.step(prediction, timestep, latents, eta=eta, variance_noise=no_noise).prev_sample
    previous = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha = scheduler.alphas_cumprod[timestep]
    alpha_previous = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
    std = eta * ((1 - alpha_previous) / (1 - alpha) * (1 - alpha / alpha_previous)).sqrt()
    return mean, std.to(mean)


def noisy_step(
    scheduler: Any, prediction: Tensor, timestep: Tensor, latents: Tensor, noise: Tensor
) -> Tensor:
    """(B, C, h, w): the step of a scheduler that adds noise (see `backends.schedulers.STOCHASTIC`), with `noise`.

    Euler's ancestral step (Karras et al., arXiv 2206.00364, algorithm 2 with all noise renewed), or the
    consistency model's: back to clean latents, and noise on them again (arXiv 2310.04378, algorithm 3).
    """
    # Its own draw is not used; the generator keeps it from moving the global one on.
    answer = scheduler.step(prediction, timestep, latents, generator=torch.Generator())
    index = scheduler.step_index  # of the next step
    if hasattr(answer, "denoised"):
        clean: Tensor = answer.denoised
        if index < len(scheduler.timesteps):
            clean = scheduler.add_noise(clean, noise.to(clean), scheduler.timesteps[index : index + 1])
        return clean
    high, low = scheduler.sigmas[index - 1], scheduler.sigmas[index]
    up = (low**2 * (high**2 - low**2) / high**2).sqrt()
    down = (low**2 - up**2).sqrt()
    clean = answer.pred_original_sample
    renewed: Tensor = clean + (latents - clean) * down / high + up * noise.to(clean)
    return renewed


def need_ddim(scheduler: Any, field: str) -> None:
    """Raise `InputError` for a scheduler other than DDIM, in the name of the `field` that asks for it."""
    if not is_one_of(scheduler, ["DDIMScheduler"]):
        raise InputError(f"{field} above 0 needs the ddim scheduler, not {type(scheduler).__name__}")
