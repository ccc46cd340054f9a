"""PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ipgo.backends.base import Backend, upcast
from ipgo.backends.facts import Facts
from ipgo.backends.text import plain, tokenize
from ipgo.embeds import PromptEmbeds, concatenate


class PixArtAlpha(Backend):
    """A `diffusers.PixArtAlphaPipeline` whose parameters are frozen; prompts are in small letters, as it wants.

    T5's states, with the padding hidden from T5 and from the denoiser. Of the pipeline's text cleaning
    (`clean_caption`) nothing else is done.
    """

    facts: ClassVar[Facts] = Facts(
        tokens=120,
        width="caption_channels",
        ordered=False,
        masked="always",
        pooled=False,
        guidance=("classifier-free",),
        process="diffusion",
    )

    def _lengths(self, prompts: Sequence[str]) -> list[int]:
        return super()._lengths(list(map(plain, prompts)))

    def _encode(self, prompts: Sequence[str], padding: str) -> PromptEmbeds:
        small = list(map(plain, prompts))
        ids, mask = tokenize(self.pipe.tokenizer, small, self.max_tokens, "max_length")
        mask = mask.to(self.text_device)
        return PromptEmbeds(self.pipe.text_encoder(ids.to(self.text_device), attention_mask=mask)[0], mask)

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        cond: PromptEmbeds,
        uncond: PromptEmbeds | None,
        guidance_scale: float,
    ) -> Tensor:
        channels = latents.shape[1]

        def denoise(latents: Tensor, prompt: PromptEmbeds) -> Tensor:
            output: Tensor = self.pipe.transformer(
                latents.to(self.dtype),
                encoder_hidden_states=prompt.embeds,
                encoder_attention_mask=prompt.mask.to(torch.int64),
                timestep=timestep.expand(len(latents)),
                added_cond_kwargs=self._sizes(latents),
                return_dict=False,
            )[0]
            return output[:, :channels].to(latents.dtype)  # the rest is a variance that no sampler here uses

        return self.guided(denoise, latents, cond, uncond, guidance_scale)

    def _sizes(self, latents: Tensor) -> dict[str, Tensor | None]:
        """What alpha is told at 1024 pixels: the height and width, and the one over the other."""
        if not self.pipe.transformer.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        size = torch.tensor(latents.shape[-2:], device=self.device) * self.pipe.vae_scale_factor
        ratio = (size[:1] / size[1:]).to(self.dtype)
        count = len(latents)
        return {"resolution": size.to(self.dtype).expand(count, 2), "aspect_ratio": ratio.expand(count, 1)}

    def pipeline_kwargs(self, cond: PromptEmbeds, uncond: PromptEmbeds | None) -> dict[str, Any]:
        """Arguments that give a stock pipeline these prompts; the shorter half is padded, and the padding masked."""
        return masked_kwargs(cond, uncond)


class PixArtSigma(PixArtAlpha):
    """A `diffusers.PixArtSigmaPipeline`: as alpha, with longer prompts and the VAE of SDXL."""

    facts: ClassVar[Facts] = replace(PixArtAlpha.facts, tokens=300)

    def _decoder(self) -> Any:
        return upcast(self.pipe.vae)


def masked_kwargs(cond: PromptEmbeds, uncond: PromptEmbeds | None) -> dict[str, Any]:
    """Arguments for a pipeline that wants both halves equally long, and a mask for each.

    By default it draws in the nearest of its own sizes, and scales the picture to the one asked for; ipgo never does.
    """
    own_size = {"use_resolution_binning": False}
    if uncond is None:
        return {"prompt_embeds": cond.embeds, "prompt_attention_mask": cond.mask.to(torch.int64), **own_size}
    both = concatenate([cond, uncond])
    rows = len(cond.mask)
    mask = both.mask.to(torch.int64)
    return {
        "negative_prompt": None,
        "prompt_embeds": both.embeds[:rows],
        "prompt_attention_mask": mask[:rows],
        "negative_prompt_embeds": both.embeds[rows:],
        "negative_prompt_attention_mask": mask[rows:],
        **own_size,
    }
