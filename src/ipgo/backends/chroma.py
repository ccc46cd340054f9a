"""Chroma."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ipgo.backends.facts import Facts
from ipgo.backends.packed import PackedBackend, pack, places, unpack
from ipgo.backends.text import tokenize
from ipgo.embeds import PromptEmbeds


class Chroma(PackedBackend):
    """A `diffusers.ChromaPipeline` whose parameters are frozen.

    T5's states, without CLIP's vector, and guidance by two predictions. The first padding after a text counts as text.
    """

    facts: ClassVar[Facts] = Facts(
        tokens=512,
        width="joint_attention_dim",
        ordered=False,
        masked="never",
        pooled=False,
        guidance=("classifier-free",),
        process="flow",
        latents="packed",
        time="t / 1000",
        scaling="factor and shift",
        prediction="flow",
    )

    def _encode(self, prompts: Sequence[str], padding: str) -> PromptEmbeds:
        ids, mask = tokenize(self.tokenizer, prompts, self.max_tokens, "max_length")
        mask = mask.to(self.text_device)
        states = self.pipe.text_encoder(ids.to(self.text_device), attention_mask=mask)[0]
        positions = torch.arange(self.max_tokens, device=self.text_device)
        return PromptEmbeds(states, positions <= mask.sum(1, keepdim=True))

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        cond: PromptEmbeds,
        uncond: PromptEmbeds | None,
        guidance_scale: float,
    ) -> Tensor:
        def denoise(latents: Tensor, prompt: PromptEmbeds) -> Tensor:
            count, height, width = len(latents), latents.shape[-2] // 2, latents.shape[-1] // 2
            output: Tensor = self.pipe.transformer(
                hidden_states=pack(latents).to(self.dtype),
                timestep=timestep.expand(count) / 1000,
                encoder_hidden_states=prompt.embeds,
                txt_ids=torch.zeros(prompt.length, 3, dtype=self.dtype, device=self.device),
                img_ids=places(height, width).to(self.device, self.dtype),
                attention_mask=self.pipe._prepare_attention_mask(
                    batch_size=count,
                    sequence_length=height * width,
                    dtype=self.dtype,
                    attention_mask=prompt.mask.to(self.dtype),
                ),
                return_dict=False,
            )[0]
            return unpack(output, height, width).to(latents.dtype)

        return self.guided(denoise, latents, cond, uncond, guidance_scale)

    def pipeline_kwargs(self, cond: PromptEmbeds, uncond: PromptEmbeds | None) -> dict[str, Any]:
        """Arguments that give a stock pipeline these prompts; it draws the halves one by one, each at its length."""
        kwargs: dict[str, Any] = {}
        for prefix, prompt in (("", cond), ("negative_", uncond)):
            if prompt is not None:
                kwargs[f"{prefix}prompt_embeds"] = prompt.embeds
                # Its own has the format of the states, too: as bool it would hide what it only weighs less.
                kwargs[f"{prefix}prompt_attention_mask"] = prompt.mask.to(prompt.embeds.dtype)
        return kwargs
