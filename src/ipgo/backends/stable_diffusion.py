"""Stable Diffusion 1.x and 2.x, latent consistency models of it, and every diffusers folder of these classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ipgo.backends.base import Backend
from ipgo.backends.facts import Facts, Guidance, Opening
from ipgo.backends.text import clip_tokens, read
from ipgo.embeds import PromptEmbeds


class StableDiffusion(Backend):
    """A `diffusers.StableDiffusionPipeline` whose parameters are frozen; the safety checker is not used.

    Or a `LatentConsistencyModelPipeline`, whose UNet takes the guidance scale as an input (arXiv 2310.04378).
    """

    facts: ClassVar[Facts] = Facts(
        tokens=77,
        width="cross_attention_dim",
        ordered=False,
        masked="optional",
        pooled=False,
        guidance=("classifier-free", "distilled"),
        process="diffusion",
        chunked=True,
    )

    def __init__(self, pipe: Any, name: str, opening: Opening) -> None:
        super().__init__(pipe, name, opening)
        self.max_tokens = clip_tokens(pipe.tokenizer, pipe.text_encoder)

    @classmethod
    def guidance_of(cls, options: Mapping[str, Any]) -> Guidance:
        return "distilled" if options.get("time_cond_proj_dim") is not None else "classifier-free"

    def _encode(self, prompts: Sequence[str], padding: str) -> PromptEmbeds:
        windows = read(self.pipe.tokenizer, prompts, self.max_tokens, padding, self.long_prompts)
        encoder = self.pipe.text_encoder
        # CLIP is causal, so the padding that follows a text does not change its states. The states of the padding
        # itself, which the UNet sees, depend on whether it sees padding: not where the configuration says so.
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = windows.mask.to(self.text_device) if masked else None
        return windows.embeds(encoder(windows.ids.to(self.text_device), attention_mask=mask)[0])

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        cond: PromptEmbeds,
        uncond: PromptEmbeds | None,
        guidance_scale: float,
    ) -> Tensor:
        scale = embedded_scale(self, guidance_scale)

        def denoise(latents: Tensor, prompt: PromptEmbeds) -> Tensor:
            output: Tensor = self.pipe.unet(
                latents.to(self.dtype),
                timestep,
                timestep_cond=None if scale is None else scale.expand(len(latents), -1),
                encoder_hidden_states=prompt.embeds,
                encoder_attention_mask=hidden(prompt.mask),
                return_dict=False,
            )[0]
            return output.to(latents.dtype)

        halves = attended(self, cond), None if uncond is None else attended(self, uncond)
        return self.guided(denoise, latents, *halves, guidance_scale)


def attended(backend: Backend, prompt: PromptEmbeds) -> PromptEmbeds:
    """With a mask of what the UNet looks at: padding too, unless padding="none"."""
    if backend.padding == "none":
        return prompt
    return replace(prompt, mask=torch.ones_like(prompt.mask) if prompt.present is None else prompt.present)


def hidden(mask: Tensor) -> Tensor | None:
    """None where nothing is hidden: attention without a mask is faster."""
    return None if bool(mask.all()) else mask


def embedded_scale(backend: Backend, guidance_scale: float) -> Tensor | None:
    """(1, E): the guidance scale as an input of a UNet that is distilled with it; None for others."""
    pipe = backend.pipe
    width = pipe.unet.config.time_cond_proj_dim
    if width is None:
        return None
    weight = torch.tensor([guidance_scale - 1.0])  # w of the paper, which is 0 without guidance
    scale: Tensor = pipe.get_guidance_scale_embedding(weight, embedding_dim=width)
    return scale.to(backend.device, backend.dtype)
