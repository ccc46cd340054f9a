"""Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ipgo.backends.base import Backend, latent_side
from ipgo.backends.facts import Facts
from ipgo.backends.schedulers import shifted
from ipgo.backends.text import chat, tokenize
from ipgo.embeds import PromptEmbeds

SIDE = 128  # of the latents, where no size is asked for; the network itself knows none


class ZImage(Backend):
    """A `diffusers.ZImagePipeline` whose parameters are frozen.

    The last states but one of Qwen3, which reads the prompt as a user's message. The denoiser gets those of the
    text alone, and knows their places: a prefix moves all that follow, and each full 32 of them move the image.
    """

    facts: ClassVar[Facts] = Facts(
        tokens=512,
        width="cap_feat_dim",
        ordered=True,
        masked="always",
        pooled=False,
        guidance=("classifier-free",),
        process="flow",
        time="1 - t / 1000",
        scaling="factor and shift",
        prediction="flow",
    )

    def _latent_shape(self, image_size: int | None) -> tuple[int, int, int]:
        side = latent_side(self.pipe, SIDE, image_size, patch=2)
        return self.pipe.transformer.config.in_channels, side, side

    def _lengths(self, prompts: Sequence[str]) -> list[int]:
        return super()._lengths(chat(self.tokenizer, prompts, thinking=True))

    def _encode(self, prompts: Sequence[str], padding: str) -> PromptEmbeds:
        texts = chat(self.tokenizer, prompts, thinking=True)
        ids, mask = tokenize(self.tokenizer, texts, self.max_tokens, "max_length")
        mask = mask.to(self.text_device)
        answer = self.pipe.text_encoder(
            ids.to(self.text_device), attention_mask=mask, output_hidden_states=True
        )
        return PromptEmbeds(answer.hidden_states[-2], mask)

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        cond: PromptEmbeds,
        uncond: PromptEmbeds | None,
        guidance_scale: float,
    ) -> Tensor:
        def denoise(latents: Tensor, prompt: PromptEmbeds) -> Tensor:
            output: list[Tensor] = self.pipe.transformer(
                list(latents.to(self.dtype).unsqueeze(2)),  # (C, 1, h, w) each
                (1000 - timestep.expand(len(latents))) / 1000,
                [states.to(self.dtype) for states in texts(prompt)],
                return_dict=False,
            )[0]
            return -torch.stack(output).squeeze(2).to(latents.dtype)

        return self.guided(denoise, latents, cond, uncond, guidance_scale)

    def _timesteps(self, steps: int, latents: Tensor) -> dict[str, Any]:
        return shifted(steps, latents.shape[-2] * latents.shape[-1] // 4, self.pipe.scheduler.config)

    def pipeline_kwargs(self, cond: PromptEmbeds, uncond: PromptEmbeds | None) -> dict[str, Any]:
        """Arguments that give a stock pipeline these prompts: lists of (L, D), without padding."""
        if uncond is None:
            return {"prompt_embeds": texts(cond)}
        return {"prompt_embeds": texts(cond), "negative_prompt_embeds": texts(uncond)}

    def _own_scale(self) -> float:
        return super()._own_scale() + 1

    def pipeline_guidance(self, scale: float) -> dict[str, Any]:
        """Arguments that give a stock pipeline a guidance scale: it counts from 0, and c + g (c - u) is its rule."""
        return {"guidance_scale": max(scale - 1, 0.0)}


def texts(prompt: PromptEmbeds) -> list[Tensor]:
    """B times (L, D), the states at the text alone."""
    # By their places, which are known also where states have a size and no numbers.
    return [states[seen.nonzero().flatten()] for states, seen in zip(prompt.embeds, prompt.mask, strict=True)]
