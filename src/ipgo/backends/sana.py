"""Sana 1.0 and 1.5, and Sana-Sprint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ipgo.backends.base import Backend
from ipgo.backends.facts import Facts, Opening
from ipgo.backends.pixart import masked_kwargs
from ipgo.backends.schedulers import TrigFlow
from ipgo.backends.text import plain, tokenize
from ipgo.embeds import PromptEmbeds

POSITIONS = 300  # that the denoiser sees


class Sana(Backend):
    """A `diffusers.SanaPipeline` whose parameters are frozen; prompts are in small letters, as it wants.

    Gemma's states, with the padding hidden from Gemma and from the denoiser. Gemma reads the prompt after the
    pipeline's instruction, of which the denoiser sees the first state and the last one; a negative prompt stands
    alone. Of the pipeline's text cleaning (`clean_caption`) nothing else is done.
    """

    facts: ClassVar[Facts] = Facts(
        tokens=POSITIONS - 1,
        width="caption_channels",
        ordered=False,
        masked="always",
        pooled=False,
        guidance=("classifier-free",),
        process="flow",
        prediction="flow",
    )

    def __init__(self, pipe: Any, name: str, opening: Opening) -> None:
        super().__init__(pipe, name, opening)
        self.max_tokens = self.facts.tokens
        self.instruction = "\n".join(self._own_default("complex_human_instruction"))

    def _lengths(self, prompts: Sequence[str]) -> list[int]:
        return super()._lengths(list(map(plain, prompts)))

    def _encode(self, prompts: Sequence[str], padding: str) -> PromptEmbeds:
        # All but one: its last token and its mark take a place each that is the prompt's.
        length = len(self.tokenizer.encode(self.instruction)) + POSITIONS - 2
        whole = self._states([self.instruction + plain(prompt) for prompt in prompts], length)
        seen = [0, *range(length - POSITIONS + 1, length)]
        return PromptEmbeds(whole.embeds[:, seen], whole.mask[:, seen])

    def _negative(self, prompt: str, length: int) -> PromptEmbeds:
        return self._states([plain(prompt)], POSITIONS)

    def _states(self, texts: Sequence[str], length: int) -> PromptEmbeds:
        self.tokenizer.padding_side = "right"  # Gemma's own is left; the pipeline changes it too
        ids, mask = tokenize(self.tokenizer, texts, length, "max_length")
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
        config, channels = self.pipe.transformer.config, latents.shape[1]

        def denoise(latents: Tensor, prompt: PromptEmbeds) -> Tensor:
            output: Tensor = self.pipe.transformer(
                latents.to(self.dtype),
                encoder_hidden_states=prompt.embeds.to(self.dtype),
                encoder_attention_mask=prompt.mask.to(torch.int64),
                timestep=timestep.expand(len(latents)) * config.timestep_scale,
                return_dict=False,
            )[0]
            return output[:, :channels].to(latents.dtype)  # the rest, if any, is a variance

        return self.guided(denoise, latents, cond, uncond, guidance_scale)

    def pipeline_kwargs(self, cond: PromptEmbeds, uncond: PromptEmbeds | None) -> dict[str, Any]:
        """Arguments that give a stock pipeline these prompts; the shorter half is padded, and the padding masked."""
        return masked_kwargs(cond, uncond)


class SanaSprint(Sana):
    """A `diffusers.SanaSprintPipeline`: consistency steps on angles of noise (arXiv 2503.09641).

    The guidance scale is an input of the network, so there is no unconditional half.
    """

    facts: ClassVar[Facts] = replace(
        Sana.facts, guidance=("distilled",), time="share of noise", prediction="angle"
    )

    def __init__(self, pipe: Any, name: str, opening: Opening) -> None:
        super().__init__(pipe, name, opening)
        self.sigma = float(pipe.scheduler.config.sigma_data)  # of the latents, which the network does not see

    def scheduler(self, steps: int, latents: Tensor) -> Any:
        return TrigFlow(super().scheduler(steps, latents))

    def _timesteps(self, steps: int, latents: Tensor) -> dict[str, Any]:
        own = {} if steps == 2 else {"intermediate_timesteps": None}  # it has a place for one of two steps
        return {"num_inference_steps": steps, **own}

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        cond: PromptEmbeds,
        uncond: PromptEmbeds | None,
        guidance_scale: float,
    ) -> Tensor:
        config = self.pipe.transformer.config
        noise = timestep.sin() / (timestep.cos() + timestep.sin())  # its share, which is a flow's time
        length = (noise**2 + (1 - noise) ** 2).sqrt()

        def denoise(latents: Tensor, prompt: PromptEmbeds) -> Tensor:
            mixed = latents / self.sigma * length
            guidance = torch.full([len(latents)], guidance_scale, device=self.device)
            flow: Tensor = self.pipe.transformer(
                mixed.to(self.dtype),
                encoder_hidden_states=prompt.embeds.to(self.dtype),
                encoder_attention_mask=prompt.mask.to(torch.int64),
                guidance=guidance.to(self.dtype) * config.guidance_embeds_scale,
                timestep=noise.expand(len(latents)),
                return_dict=False,
            )[0]
            turn = (1 - 2 * noise) * mixed + (1 - 2 * noise + 2 * noise**2) * flow.to(latents.dtype)
            return turn / length * self.sigma

        return self.guided(denoise, latents, cond, None, guidance_scale)

    def _to_vae(self, latents: Tensor) -> Tensor:
        return super()._to_vae(latents / self.sigma)
