"""Stable Diffusion 1.x and 2.x, and every diffusers folder of the same class."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ipgo.backends.base import Backend, classifier_free
from ipgo.devices import choose_device, choose_dtype
from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError, unknown

# The noise levels that a model was trained on stay when the scheduler changes; the rest is the new one's
# own, with the options that Stable Diffusion is shipped with. Latents are never clipped.
NOISE_LEVELS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"
)  # fmt: skip
_SHIPPED = {"set_alpha_to_one": False, "steps_offset": 1}
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {**_SHIPPED, "clip_sample": False}),
    "pndm": (PNDMScheduler, {**_SHIPPED, "skip_prk_steps": True}),
    "lms": (LMSDiscreteScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "dpm++": (DPMSolverMultistepScheduler, {}),
}
PADDINGS = ("max_length", "none")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
LONG_PROMPTS = ("refuse", "truncate")
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


class StableDiffusion(Backend):
    """A `diffusers.StableDiffusionPipeline` whose parameters are frozen; the safety checker is not used."""

    def __init__(
        self,
        pipe: Any,
        *,
        name: str,
        image_size: int | None = None,
        padding: str = "max_length",
        scheduler: str | None = None,
        long_prompts: str = "refuse",
    ) -> None:
        self.pipe = pipe
        self.name = name
        self.device, self.dtype = pipe.unet.device, pipe.unet.dtype
        self.embed_dim = pipe.unet.config.cross_attention_dim
        self.padding = padding
        self.scheduler_name = scheduler
        self.long_prompts = long_prompts
        self.max_tokens = min(
            pipe.tokenizer.model_max_length, pipe.text_encoder.config.max_position_embeddings
        )
        self.latent_shape = _latent_shape(pipe, image_size)
        self.modules = {"denoiser": pipe.unet, "text_encoder": pipe.text_encoder, "decoder": pipe.vae}
        self.calls = Counter()
        for module in self.modules.values():
            module.requires_grad_(False).eval()

    @classmethod
    def load(
        cls,
        source: str | Path | object,
        *,
        device: str = "auto",
        dtype: str = "auto",
        image_size: int | None = None,
        padding: str = "max_length",
        scheduler: str | None = None,
        long_prompts: str = "refuse",
    ) -> Self:
        """Open a local folder, a hub id or a `StableDiffusionPipeline`.

        A pipeline object stays where it is if `device` and `dtype` are "auto", and its parameters are frozen.
        """
        for option, value, allowed in (
            ("scheduler", scheduler or "ddim", SCHEDULERS),
            ("padding", padding, PADDINGS),
            ("long_prompts", long_prompts, LONG_PROMPTS),
        ):
            if value not in allowed:
                raise unknown(option, value, allowed)
        pipe: Any = source
        if isinstance(source, str | Path):
            place = choose_device(device)
            pipe = _open(source, choose_dtype(dtype, place)).to(place)
        elif not isinstance(source, StableDiffusionPipeline):
            raise InputError(
                f"a backend opens a name, a folder or a StableDiffusionPipeline, not {type(source).__name__}"
            )
        else:
            if device != "auto":
                pipe.to(choose_device(device))
            if dtype != "auto":
                pipe.to(choose_dtype(dtype, pipe.device))
        name = str(source) if isinstance(source, str | Path) else type(source).__name__
        return cls(
            pipe,
            name=name,
            image_size=image_size,
            padding=padding,
            scheduler=scheduler,
            long_prompts=long_prompts,
        )

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """The length of each prompt in tokens, with the start and end marks."""
        return [len(ids) for ids in self.pipe.tokenizer(list(prompts), padding=False).input_ids]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        if self.long_prompts == "truncate":
            return
        for prompt, count in zip(prompts, self.count_tokens(prompts), strict=True):
            if count > self.max_tokens:
                raise InputError(
                    f"prompt {prompt[:60]!r} has {count} tokens and the encoder takes {self.max_tokens}; "
                    'shorten it, or allow long_prompts="truncate"'
                )

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        self.check_prompts(prompts)
        return self._encode(prompts, "longest" if self.padding == "none" else "max_length")

    def _encode(self, prompts: Sequence[str], padding: str) -> PromptEmbeds:
        tokens = self.pipe.tokenizer(
            list(prompts), padding=padding, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        # CLIP is causal, so the padding that follows a text does not change its states.
        states = self.pipe.text_encoder(tokens.input_ids.to(self.device))[0]  # (B, L, D)
        return PromptEmbeds(states, tokens.attention_mask.to(self.device, torch.bool))

    def unconditional(self, negative_prompt: str, cond: PromptEmbeds) -> PromptEmbeds:
        """The padded negative prompt; with padding="none" cut to each row's own length.

        That is the IPGO notebook's rule. It has no states beyond the encoder's length (77), so a longer row
        gets just those.
        """
        self.check_prompts([negative_prompt])
        full = self._encode([negative_prompt], "max_length")
        full = full.select(torch.zeros(len(cond.mask), dtype=torch.long, device=self.device))
        if self.padding == "max_length":
            return full
        positions = torch.arange(full.length, device=self.device)
        mask = positions < cond.mask.sum(1, keepdim=True)  # (B, 77)
        return PromptEmbeds(full.embeds[:, : cond.length], mask[:, : cond.length])

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        cond: PromptEmbeds,
        uncond: PromptEmbeds | None,
        guidance_scale: float,
    ) -> Tensor:
        learned = any(parameter.requires_grad for parameter in self.pipe.unet.parameters())
        negative = uncond is not None and uncond.embeds.requires_grad
        both = latents.requires_grad or learned or negative
        self.calls["denoiser"] += len(latents)
        if torch.is_grad_enabled():
            self.calls["denoiser_grad"] += len(latents)
            self.calls["denoiser_grad_both"] += len(latents) * both

        def denoise(latents: Tensor, states: Tensor, attended: Tensor | None) -> Tensor:
            output: Tensor = self.pipe.unet(
                latents.to(self.dtype),
                timestep,
                encoder_hidden_states=states,
                encoder_attention_mask=attended,
                return_dict=False,
            )[0]
            return output.to(latents.dtype)

        return classifier_free(
            denoise,
            latents,
            self._attended(cond),
            None if uncond is None else self._attended(uncond),
            guidance_scale,
            uncond_grad=both,
        )

    def _attended(self, prompt: PromptEmbeds) -> tuple[Tensor, Tensor]:
        """The states, and which of them the denoiser looks at: padding too, unless padding="none"."""
        return prompt.embeds, prompt.mask if self.padding == "none" else torch.ones_like(prompt.mask)

    def scheduler(self, steps: int, latents: Tensor) -> Any:
        config = self.pipe.scheduler.config
        if self.scheduler_name is None:
            scheduler = type(self.pipe.scheduler).from_config(config)
        else:
            kind, options = SCHEDULERS[self.scheduler_name]
            scheduler = kind(**{key: config[key] for key in NOISE_LEVELS if key in config}, **options)
        scheduler.set_timesteps(steps, device=latents.device)
        return scheduler

    def decode(self, latents: Tensor) -> Tensor:
        self.calls["decoder"] += len(latents)
        vae = self.pipe.vae
        pixels = vae.decode(latents.to(self.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        images: Tensor = (pixels.to(latents.dtype) / 2 + 0.5).clamp(0, 1)
        return images


def _latent_shape(pipe: Any, image_size: int | None) -> tuple[int, int, int]:
    factor = pipe.vae_scale_factor
    side = pipe.unet.config.sample_size
    if image_size is not None:
        if image_size < factor or image_size % factor:
            raise InputError(f"image_size {image_size} must be a positive multiple of {factor}")
        side = image_size // factor
    return pipe.unet.config.in_channels, side, side


def _open(source: str | Path, dtype: torch.dtype) -> Any:
    path = Path(source)
    local = path.exists() or path.suffix in PICKLES or str(source).count("/") != 1  # else it is a hub id
    if local:
        check_folder(path)
    try:
        with _no_bars() if local else nullcontext():
            return StableDiffusionPipeline.from_pretrained(
                str(source),
                dtype=dtype,
                use_safetensors=True,
                safety_checker=None,
                requires_safety_checker=False,
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot open backend {str(source)!r}: {reason}") from error


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of diffusers and transformers, which run while a folder is read."""
    loggings = [each for each in (diffusers_logging, transformers_logging) if each.is_progress_bar_enabled()]
    for each in loggings:
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each in loggings:
            each.enable_progress_bar()


def check_folder(path: Path) -> None:
    """Raise `InputError` unless `path` is a complete diffusers folder with safetensors weights."""
    if path.suffix in PICKLES:
        raise InputError(f"backend {str(path)!r} is a pickle, which can run code; give a safetensors folder")
    if not path.is_dir():
        raise InputError(f"backend folder {str(path)!r} does not exist")
    index = path / "model_index.json"
    if not index.is_file():
        raise InputError(
            f"backend folder {str(path)!r} has no model_index.json: it is not a diffusers folder"
        )
    try:
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"backend folder {str(path)!r} has a damaged model_index.json") from None
    if kind != "StableDiffusionPipeline":
        raise InputError(f"backend folder {str(path)!r} holds a {kind}; ipgo opens StableDiffusionPipeline")
    for needed in (
        "scheduler/scheduler_config.json",
        "tokenizer",
        *(f"{part}/config.json" for part in WEIGHTS),
    ):
        if not (path / needed).exists():
            raise InputError(f"backend folder {str(path)!r} is incomplete: {needed} is missing")
    for part, file_name in WEIGHTS.items():
        for file in _weight_files(path / part, file_name):
            _check_weights(file)


def _weight_files(folder: Path, file_name: str) -> list[Path]:
    """The file, or the shards that its index names."""
    index = folder / f"{file_name}.index.json"
    if not index.is_file():
        return [folder / file_name]
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def _check_weights(file: Path) -> None:
    if not file.is_file():
        if any(file.parent.glob("*.bin")):
            raise InputError(
                f"weights in {str(file.parent)!r} are a pickle, which can run code; use safetensors"
            )
        raise InputError(f"weights are missing: {str(file)!r}")
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise InputError(f"weights are damaged or half-written: {str(file)!r} ({error})") from None
