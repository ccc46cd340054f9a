"""Stable Diffusion XL, SDXL-Turbo, its latent consistency models and every diffusers folder of the same class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ipgo.backends.base import Backend, upcast
from ipgo.backends.facts import Facts, Guidance, Opening
from ipgo.backends.stable_diffusion import attended, embedded_scale, hidden
from ipgo.backends.text import clip_tokens, read
from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError


class StableDiffusionXL(Backend):
    """A `diffusers.StableDiffusionXLPipeline` whose parameters are frozen; no watermark is applied.

    The states of two text encoders side by side, and the vector of the second. An empty negative prompt counts
    as none: where the pipeline's configuration says so, its states are zeros. The UNet of a latent consistency
    model takes the guidance scale as an input (arXiv 2310.04378).
    """

    facts: ClassVar[Facts] = Facts(
        tokens=77,
        width="cross_attention_dim",
        ordered=False,
        masked="optional",
        pooled=True,
        guidance=("classifier-free", "distilled"),
        process="diffusion",
        chunked=True,
    )

    def __init__(self, pipe: Any, name: str, opening: Opening) -> None:
        super().__init__(pipe, name, opening)
        self.max_tokens = min(clip_tokens(tokenizer, encoder) for tokenizer, encoder in self._encoders())

    @classmethod
    def guidance_of(cls, options: Mapping[str, Any]) -> Guidance:
        return "distilled" if options.get("time_cond_proj_dim") is not None else "classifier-free"

    def _decoder(self) -> Any:
        return upcast(self.pipe.vae)

    def _encoders(self) -> list[tuple[Any, Any]]:
        pipe = self.pipe
        return [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]

    def _encode(self, prompts: Sequence[str], padding: str) -> PromptEmbeds:
        states, masks = [], []
        for tokenizer, encoder in self._encoders():
            windows = read(tokenizer, prompts, self.max_tokens, padding, self.long_prompts)
            masks.append(windows.mask)
            if not torch.equal(masks[0], windows.mask):
                raise InputError(
                    "the two tokenizers read a prompt in unequal lengths; load textual inversions into both"
                )
            answer = encoder(windows.ids.to(self.text_device), output_hidden_states=True)
            states.append(answer.hidden_states[-2])
        return windows.embeds(torch.cat(states, dim=-1), answer.text_embeds)

    def _negative(self, prompt: str, length: int) -> PromptEmbeds:
        full = super()._negative(prompt, length)
        if prompt or not self.pipe.config.force_zeros_for_empty_prompt or full.pooled is None:
            return full
        return replace(full, embeds=torch.zeros_like(full.embeds), pooled=torch.zeros_like(full.pooled))

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        cond: PromptEmbeds,
        uncond: PromptEmbeds | None,
        guidance_scale: float,
    ) -> Tensor:
        height, width = (side * self.pipe.vae_scale_factor for side in latents.shape[-2:])
        # The size of the original, the corner it was cropped at, the size that is wanted.
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=self.dtype, device=self.device)
        scale = embedded_scale(self, guidance_scale)

        def denoise(latents: Tensor, prompt: PromptEmbeds) -> Tensor:
            output: Tensor = self.pipe.unet(
                latents.to(self.dtype),
                timestep,
                timestep_cond=None if scale is None else scale.expand(len(latents), -1),
                encoder_hidden_states=prompt.embeds,
                encoder_attention_mask=hidden(prompt.mask),
                added_cond_kwargs={"text_embeds": prompt.pooled, "time_ids": sizes.expand(len(latents), -1)},
                return_dict=False,
            )[0]
            return output.to(latents.dtype)

        halves = attended(self, cond), None if uncond is None else attended(self, uncond)
        return self.guided(denoise, latents, *halves, guidance_scale)

    def _to_vae(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        own = config.get("latents_mean"), config.get("latents_std")  # a tiny VAE has none
        if None in own:
            return super()._to_vae(latents)
        mean, std = (latents.new_tensor(each).view(1, -1, 1, 1) for each in own)
        scaled: Tensor = latents * std / config.scaling_factor + mean
        return scaled
