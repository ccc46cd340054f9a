"""A text-to-image pipeline, opened up for differentiation."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ipgo.backends.facts import Facts, Guidance, Opening
from ipgo.backends.few_steps import FewSteps
from ipgo.backends.parts import check_parts
from ipgo.backends.schedulers import STOCHASTIC, described, is_one_of, new_scheduler
from ipgo.backends.text import check_lengths, unpadded
from ipgo.backends.weights import fingerprint, uncompiled
from ipgo.devices import name_of
from ipgo.embeds import PromptEmbeds, concatenate
from ipgo.errors import InputError
from ipgo.seeding import generator

Denoise = Callable[[Tensor, PromptEmbeds], Tensor]


NEEDED = ("unet", "transformer", "vae", "scheduler", "tokenizer")  # of these what its class has


class Backend(ABC):
    """A frozen pipeline that encodes prompts, predicts noise and decodes latents.

    It never decides about gradients: the caller's grad mode does.

    Attributes:
        pipe: the diffusers pipeline.
        facts: what holds for every model of this family.
        name: what it was loaded from; of a pipeline object, its class.
        origin: the same, or what such an object was loaded from, if it says.
        opening: how it was opened.
        device, dtype: where and in which format its weights are. Latents and images are at least float32.
        text_device: where the text encoders are: the same, or the CPU where they need not take a GPU's memory.
        embed_dim: D, the width of the prompt embeddings.
        max_tokens: the longest prompt, or with long_prompts="chunk" the longest window, with its marks.
        guidance: what this model has of `facts.guidance`.
        guidance_scale: the scale that it is sampled with by default.
        few_steps: how a few-step model is sampled; None for others.
        padding: "max_length" (prompts are padded as stock pipelines do) or "none" (the denoiser sees text only).
        long_prompts: "refuse", "truncate" or "chunk": what is done with prompts longer than the encoder takes.
        latent_shape: (C, h, w) of one image's latents.
        image_size: side of the images in pixels.
        modules: "denoiser", "text_encoder" (and "text_encoder_2" ...), "decoder": after `freeze`, in eval mode.
        calls: the cost ledger, in rows: "denoiser" counts one for each image row of each `predict` call,
            whether guidance makes that one network evaluation or two; "denoiser_grad" counts those under
            grad among them, "denoiser_grad_both" those of them that carry gradient into both halves of
            guidance, "decoder" the rows decoded. A recomputed call counts twice, first as one without gradient
            and then as one under it: that is the work it is.
    """

    facts: ClassVar[Facts]
    optional: ClassVar[tuple[str, ...]] = ()  # text encoders that a pipeline may lack
    cudnn_attention: ClassVar[bool] = True  # whether its backward pass bears cuDNN's kernel

    max_tokens: int

    def __init__(self, pipe: Any, name: str, opening: Opening) -> None:
        self.pipe = pipe
        self.name = self.origin = name
        self.opening = opening
        self.padding = opening.padding
        self.long_prompts = opening.long_prompts
        parts = pipe.components
        encoders = _encoders_of(pipe)
        needed = [*encoders, *(part for part in NEEDED if part in parts)]
        for part in (part for part in needed if parts[part] is None and part not in self.optional):
            raise InputError(f"backend {name!r} has no {part}, without which it cannot draw")
        denoiser = denoiser_of(pipe)
        channels = denoiser.config.in_channels
        if "unet" in parts and channels != denoiser.config.out_channels:
            raise InputError(
                f"the denoiser of backend {name!r} takes {channels} channels, more than the latents of a picture have: "
                "models for inpainting and other edits are not opened"
            )
        if not hasattr(pipe.vae, "decoder"):
            raise InputError(
                f"the decoder of backend {name!r} is a {type(pipe.vae).__name__}, which draws noise itself; give it "
                "one whose images depend on the latents alone"
            )
        self.device, self.dtype = denoiser.device, denoiser.dtype
        self.embed_dim: int = denoiser.config[self.facts.width]
        self.guidance = self.guidance_of({**pipe.config, **denoiser.config})
        self.text_device: torch.device = next(iter(encoders.values())).device
        self._parts = _networks_of(pipe)
        self.guidance_scale = self._own_scale()
        self.few_steps: FewSteps | None = None
        self.calls: Counter[str] = Counter()
        self.max_tokens = min(self.facts.tokens, self.tokenizer.model_max_length)
        self.latent_shape = self._latent_shape(opening.image_size)

    def freeze(self) -> None:
        """No weight wants a gradient, and nothing is dropped out."""
        for module in self._parts.values():
            module.requires_grad_(False).eval()

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """See above; only here may a decoder be copied, so that what draws no pictures needs none."""
        return {**self._parts, "decoder": self._decoder()}

    def check_current(self) -> None:
        """Raise `InputError` if the pipeline's networks are no longer those that this was made around, or where it was,
        or if nothing can be drawn or learned through them; freeze them again.
        """
        check_parts(self.pipe)
        now, denoiser = _networks_of(self.pipe), denoiser_of(self.pipe)
        same = now.keys() == self._parts.keys() and all(
            uncompiled(module) is uncompiled(self._parts[part]) for part, module in now.items()
        )
        encoder = next(iter(_encoders_of(self.pipe).values()))
        places = (denoiser.device, encoder.device) if same else ()
        if (denoiser.dtype, *places) != (self.dtype, self.device, self.text_device):
            raise InputError(
                f"the pipeline of backend {self.name!r} has got other networks, or another number format or device, "
                "since it was opened; open it again with load_backend"
            )
        for part, module in self.pipe.components.items():
            if module in now.values() and any(each.is_meta for each in module.parameters()):
                raise InputError(
                    f"the pipeline's {part} is on the device meta, without numbers; load its weights"
                )
        if self.pipe.vae.device != denoiser.device:
            raise InputError(
                f"the pipeline's vae is on {self.pipe.vae.device}, and what denoises on {denoiser.device}; put both on "
                "one device"
            )
        self.freeze()

    # -- what a family says -----------------------------------------------------------------------------

    @classmethod
    def guidance_of(cls, options: Mapping[str, Any]) -> Guidance:
        """What a model has of `facts.guidance`; the options are those of its pipeline and its denoiser."""
        return cls.facts.guidance[0]

    @property
    def tokenizer(self) -> Any:
        """The one that decides how long a prompt may be."""
        return self.pipe.tokenizer

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return int(self.latent_shape[-1] * self.pipe.vae_scale_factor)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides an image besides the settings.

        "dtype", "weights" as `weights.fingerprint` has it, and "schedule": the model's own scheduler with a digest of
        its settings; None if the run's settings name another one.
        """
        schedule = described(self.pipe.scheduler) if self.opening.scheduler is None else None
        return {"dtype": name_of(self.dtype), "weights": fingerprint(self.modules), "schedule": schedule}

    @abstractmethod
    def _encode(self, prompts: Sequence[str], padding: str) -> PromptEmbeds:
        """The text encoders' states, where these are; `padding` is "max_length" or "longest"; longer ones are cut."""

    @abstractmethod
    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        cond: PromptEmbeds,
        uncond: PromptEmbeds | None,
        guidance_scale: float,
    ) -> Tensor:
        """The guided model output for (B, C, h, w) latents, in their shape and format."""

    def _decoder(self) -> Any:
        """What makes pictures of latents."""
        return self.pipe.vae

    def _latent_shape(self, image_size: int | None) -> tuple[int, int, int]:
        """C, h and w of the latents of square images, by default of the model's own size."""
        config = denoiser_of(self.pipe).config
        side = latent_side(self.pipe, config.sample_size, image_size, config.get("patch_size") or 1)
        return config.in_channels, side, side

    def _to_vae(self, latents: Tensor) -> Tensor:
        """The latents in the scale of the VAE."""
        config = self.pipe.vae.config
        scaled: Tensor = latents / config.scaling_factor + (config.get("shift_factor") or 0)
        return scaled

    def _timesteps(self, steps: int, latents: Tensor) -> dict[str, Any]:
        """Arguments of a scheduler's `set_timesteps`."""
        return {"num_inference_steps": steps}

    def _lengths(self, prompts: Sequence[str]) -> list[int]:
        """How long each prompt is, with its marks. Needs the tokenizer only."""
        return [len(ids) for ids in unpadded(self.tokenizer, prompts)]

    def _combine(self, uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
        """What the two halves of classifier-free guidance make together."""
        return uncond + guidance_scale * (cond - uncond)

    def _own_scale(self) -> float:
        """The guidance scale that the stock pipeline takes unless told otherwise, in our count."""
        return float(self._own_default("guidance_scale"))

    def _own_default(self, name: str) -> Any:
        """Of an argument of the stock pipeline's call; a class of the user's may hide it behind **kwargs."""
        calls = (inspect.signature(kind.__call__).parameters for kind in type(self.pipe).__mro__)
        return next(own[name].default for own in calls if name in own)

    def _pixels(self, latents: Tensor) -> Tensor:
        """What the VAE makes of latents, (B, 3, H, W) in [-1, 1]."""
        vae: Any = self.modules["decoder"]
        pixels: Tensor = vae.decode(self._to_vae(latents), return_dict=False)[0]
        return pixels

    # -- prompts ----------------------------------------------------------------------------------------

    def check_prompts(self, prompts: Sequence[str], what: str = "prompt") -> None:
        """Raise `InputError` for a prompt that the encoder cannot take. Needs the tokenizer only."""
        if self.long_prompts == "refuse":
            check_lengths(prompts, self._lengths(prompts), self.max_tokens, self.facts.chunked, what)

    def truncated(self, prompts: Sequence[str]) -> list[str]:
        """Those that lose their end, with long_prompts="truncate"."""
        lengths = self._lengths(prompts) if self.long_prompts == "truncate" else []
        return [prompt for prompt, length in zip(prompts, lengths, strict=False) if length > self.max_tokens]

    def half_read(self, prompts: Sequence[str]) -> list[str]:
        """Those of which a CLIP beside the longer encoder takes the beginning alone, as in the stock pipelines."""
        cut = set[str]()
        for tokenizer, most in self._beside():
            lengths = zip(prompts, unpadded(tokenizer, prompts), strict=True)
            cut |= {prompt for prompt, ids in lengths if len(ids) > most}
        return [prompt for prompt in prompts if prompt in cut]

    def _beside(self) -> list[tuple[Any, int]]:
        """The tokenizers of CLIPs that read what a longer encoder reads too, with what they take at most."""
        return []

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """The text encoder's states; `InputError` for a prompt that is too long."""
        self.check_prompts(prompts)
        states = self._encode(prompts, "longest" if self.padding == "none" else "max_length")
        return states.to(self.device, self.dtype)  # a text encoder may have been opened in another format

    def unconditional(self, negative_prompt: str, cond: PromptEmbeds) -> PromptEmbeds:
        """What guidance moves away from, one row for each of `cond`.

        The padded negative prompt; with padding="none" cut to each row's own length, as the IPGO notebook cuts the
        empty one, but never shorter than its own text. It has no states beyond the encoder's length (77), so a longer
        row gets just those.

        Raises:
            InputError: the model's guidance has no such half, or the negative prompt is too long.
        """
        if self.guidance != "classifier-free":
            raise InputError(
                f"backend {self.name!r} has no unconditional half; its guidance is {self.guidance!r}"
            )
        self.check_prompts([negative_prompt], "negative_prompt")
        full = self._negative(negative_prompt, cond.length).to(self.device, self.dtype)
        full = full.repeated(len(cond.mask))
        if self.padding == "max_length":
            return full
        own = self._encode([negative_prompt], "longest").length if negative_prompt else 0
        length = max(cond.length, own)
        positions = torch.arange(full.length, device=self.device)
        mask = positions < cond.mask.sum(1, keepdim=True).clamp(min=own)  # (B, 77)
        return replace(full, embeds=full.embeds[:, :length], mask=mask[:, :length])

    def _negative(self, prompt: str, length: int) -> PromptEmbeds:
        """One row, where `_encode` has it; `length` is that of the prompts which it is the other half of."""
        return self._encode([prompt], "max_length")

    def pipeline_kwargs(self, cond: PromptEmbeds, uncond: PromptEmbeds | None) -> dict[str, Any]:
        """Arguments that give a stock pipeline these prompts.

        The pipeline wants both halves of guidance equally long. Repeating all states of a prompt k times
        leaves cross-attention as it is (every softmax weight splits into k equal ones), so both are repeated
        to their least common multiple: exact at any length, and cheap when it is small. With 77 states,
        11 + 11 inserted ones give 693, but 10 + 10 give 7,469.

        Raises:
            InputError: the prompts have unequal lengths, for which a pipeline has no mask.
        """
        if any(half is not None and half.present is not None for half in (cond, uncond)):
            raise InputError("a pipeline takes prompts of equal length; give it these one by one")
        if uncond is None:
            return _named("", cond)
        length = math.lcm(cond.length, uncond.length)
        return {
            **_named("", replace(cond, embeds=cond.embeds.repeat(1, length // cond.length, 1))),
            **_named(
                "negative_", replace(uncond, embeds=uncond.embeds.repeat(1, length // uncond.length, 1))
            ),
        }

    def pipeline_guidance(self, scale: float) -> dict[str, Any]:
        """Arguments that give a stock pipeline a guidance scale, which is ours: 1 or less is none."""
        return {"guidance_scale": scale}

    def pipeline_latents(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) initial noise in the layout of a stock pipeline's `latents`."""
        return latents

    # -- noise, steps and images ------------------------------------------------------------------------

    def noise(self, seeds: Sequence[int], steps: int = 0) -> Tensor:
        """(B, 1 + steps, C, h, w) draws of N(0, 1) in float32: the initial noise, then one for each step.

        Row i depends on seeds[i] alone. Its first draw is `torch.randn((1, C, h, w), generator=g)` with a CPU
        generator of that seed, so a stock pipeline given `g` starts from the same noise.
        """
        rows = []
        for seed in seeds:
            source = generator(seed)
            # One by one, as pipelines draw them: torch draws many at once otherwise, unless they are 16 or a multiple.
            draws = [
                torch.randn((1, *self.latent_shape), generator=source, dtype=torch.float32, device="cpu")
                for _ in range(1 + steps)
            ]
            rows.append(torch.cat(draws))
        return torch.stack(rows).to(self.device)

    @property
    def stochastic(self) -> bool:
        """Does the scheduler add noise at every step?"""
        return self.opening.scheduler is None and is_one_of(self.pipe.scheduler, STOCHASTIC)

    def scheduler(self, steps: int, latents: Tensor) -> Any:
        """A fresh diffusers scheduler with timesteps set: schedulers carry the state of a trajectory.

        Raises:
            InputError: a number of steps that it has no schedule for, or a scheduler of another kind of pipeline.
        """
        scheduler = new_scheduler(self.pipe.scheduler, self.opening.scheduler)
        try:
            with np.errstate(invalid="ignore"):  # said below
                scheduler.set_timesteps(**self._timesteps(steps, latents), device=latents.device)
        except ValueError as error:
            most = self.pipe.scheduler.config.get("num_train_timesteps", steps)
            reason = (
                f"the model's scheduler refuses it: {error}"
                if steps <= most
                else f"this model has {most} steps"
            )
            raise InputError(f"sampling.steps is {steps}; {reason}") from None
        except TypeError as error:
            raise InputError(
                f"the pipeline's scheduler is {type(scheduler).__name__}, which does not take what a pipeline of this "
                f"family gives its scheduler ({error}); give it one that does"
            ) from None
        levels = (scheduler.timesteps, getattr(scheduler, "sigmas", None))
        if not all(torch.as_tensor(each).isfinite().all() for each in levels if each is not None):
            raise InputError(
                f"sampling.steps is {steps}; {type(scheduler).__name__} has no schedule of so few here"
            )
        return scheduler

    def guided(
        self,
        denoise: Denoise,
        latents: Tensor,
        cond: PromptEmbeds,
        uncond: PromptEmbeds | None,
        guidance_scale: float,
    ) -> Tensor:
        """u + g (c - u): classifier-free guidance (Ho and Salimans, arXiv 2207.12598, eq. 6 with g = 1 + w).

        Or what the family makes of both halves in `_combine`. Without `uncond`, or with g <= 1, it is c.

        Args:
            denoise: (latents, prompt) to the model output; here the prompt's mask says what is attended to.
        """
        both, graph, kinds = False, False, ["denoiser"]
        if torch.is_grad_enabled():
            negative = uncond is not None and uncond.requires_grad
            # The weights come last: asking all of them takes as long as a layer of a small model.
            both = latents.requires_grad or negative or _learned(self.modules["denoiser"])
            graph = both or cond.requires_grad  # else there is nothing to differentiate yet
            kinds += [*["denoiser_grad"] * graph, *["denoiser_grad_both"] * both]
        self.calls.update(dict.fromkeys(kinds, len(latents)))  # at once: a budget refuses a call as a whole
        if uncond is None or guidance_scale <= 1:
            return denoise(latents, cond)
        padded = self.facts.masked == "never" and cond.length != uncond.length  # and nothing would hide it
        if padded or (graph and not both):
            halves = in_two_calls(denoise, latents, uncond, cond, both)
        else:
            halves = in_one_call(denoise, latents, uncond, cond)
        return self._combine(*halves, guidance_scale)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) latents to (B, 3, H, W) images in [0, 1]."""
        self.calls["decoder"] += len(latents)
        vae: Any = self.modules["decoder"]
        pixels = self._pixels(latents.to(vae.dtype)).to(latents.dtype)
        return (pixels / 2 + 0.5).clamp(0, 1)


def denoiser_of(pipe: Any) -> Any:
    """The network of a pipeline that predicts noise, or what its family predicts."""
    return pipe.unet if "unet" in pipe.components else pipe.transformer


def _encoders_of(pipe: Any) -> dict[str, Any]:
    """Its text encoders, those that it lacks among them."""
    return {part: module for part, module in pipe.components.items() if part.startswith("text_encoder")}


def _networks_of(pipe: Any) -> dict[str, nn.Module]:
    """What a backend has as `modules`, before a decoder is copied."""
    encoders = {part: module for part, module in _encoders_of(pipe).items() if module is not None}
    return {"denoiser": denoiser_of(pipe), **encoders, "decoder": pipe.vae}


def _learned(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def in_one_call(
    denoise: Denoise, latents: Tensor, uncond: PromptEmbeds, cond: PromptEmbeds
) -> tuple[Tensor, Tensor]:
    """Both halves of guidance, the shorter one padded with states that are not attended to."""
    u, c = denoise(torch.cat([latents, latents]), concatenate([uncond, cond])).chunk(2)
    return u, c


def in_two_calls(
    denoise: Denoise, latents: Tensor, uncond: PromptEmbeds, cond: PromptEmbeds, uncond_grad: bool
) -> tuple[Tensor, Tensor]:
    """Both halves of guidance; the unconditional one builds no graph unless `uncond_grad`."""
    c = denoise(latents, cond)
    with torch.set_grad_enabled(torch.is_grad_enabled() and uncond_grad):
        u = denoise(latents, uncond)
    return u, c


def latent_side(pipe: Any, own: int | Sequence[int], image_size: int | None, patch: int = 1) -> int:
    """Side of the latents of images of `image_size`; `own` is the model's. Patches must not be cut."""
    factor = pipe.vae_scale_factor * patch
    if image_size is None:
        height, width = (own, own) if isinstance(own, int) else own
        if height != width:
            raise InputError(
                f"image_size is None, and the model's own latents are {height} x {width}; images are square, so give it"
            )
        return height
    if image_size < factor or image_size % factor:
        raise InputError(f"image_size {image_size} must be a positive multiple of {factor}")
    side: int = image_size // pipe.vae_scale_factor
    return side


def _named(prefix: str, prompt: PromptEmbeds) -> dict[str, Any]:
    named = {f"{prefix}prompt_embeds": prompt.embeds}
    if prompt.pooled is not None:
        named[f"{prefix}pooled_prompt_embeds"] = prompt.pooled
    return named


def upcast(vae: Any) -> Any:
    """A VAE that overflows in float16, as its configuration says, in float32: a copy, tiled and sliced as the
    pipeline's own, which stays.
    """
    if vae.dtype != torch.float16 or not vae.config.get("force_upcast"):
        return vae
    own: Any = uncompiled(vae)
    devices = [own.device] if own.device.type == "cuda" else []
    # It is made with the first picture, wherever that is drawn; its initial weights are drawn for nothing.
    with torch.inference_mode(False), torch.random.fork_rng(devices), own.device:
        copied = type(own).from_config(own.config)
    copied.load_state_dict(own.state_dict())
    for name, value in vars(own).items():
        if name.startswith(("use_tiling", "use_slicing", "tile_")):
            setattr(copied, name, value)
    return copied.requires_grad_(False).eval()
