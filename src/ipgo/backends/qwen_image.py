"""Qwen-Image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ipgo.backends.facts import Facts, Opening
from ipgo.backends.packed import PackedBackend, pack, unpack
from ipgo.backends.stable_diffusion import hidden
from ipgo.backends.text import tokenize
from ipgo.embeds import PromptEmbeds

MOST = 1024  # text states that the pipeline takes


class QwenImage(PackedBackend):
    """A `diffusers.QwenImagePipeline` whose parameters are frozen.

    The last states of Qwen2.5-VL, which reads the prompt in the pipeline's template, from the prompt on. The
    denoiser knows the places of the states: what is inserted and the text stand without gaps, before the padding.
    A guided prediction is as long, for each patch, as that of the prompt alone.
    """

    facts: ClassVar[Facts] = Facts(
        tokens=512,
        width="joint_attention_dim",
        ordered=True,
        masked="always",
        pooled=False,
        guidance=("classifier-free",),
        process="flow",
        latents="packed",
        time="t / 1000",
        scaling="mean and deviation",
        prediction="flow",
    )

    def __init__(self, pipe: Any, name: str, opening: Opening) -> None:
        super().__init__(pipe, name, opening)
        self.max_tokens = min(self.facts.tokens, pipe.tokenizer_max_length)
        self.instruction_tokens = int(pipe.prompt_template_encode_start_idx)

    def _texts(self, prompts: Sequence[str]) -> list[str]:
        return [self.pipe.prompt_template_encode.format(prompt) for prompt in prompts]

    def _lengths(self, prompts: Sequence[str]) -> list[int]:
        return [length - self.instruction_tokens for length in super()._lengths(self._texts(prompts))]

    def _encode(self, prompts: Sequence[str], padding: str) -> PromptEmbeds:
        longest = self.max_tokens + self.instruction_tokens
        ids, mask = tokenize(self.tokenizer, self._texts(prompts), longest, "longest")
        mask = mask.to(self.text_device)
        answer = self.pipe.text_encoder(
            input_ids=ids.to(self.text_device), attention_mask=mask, output_hidden_states=True
        )
        rows = [  # by their places, which are known also where states have a size and no numbers
            states[seen.nonzero().flatten()][self.instruction_tokens :]
            for states, seen in zip(answer.hidden_states[-1], mask, strict=True)
        ]
        embeds = pad_sequence(rows, batch_first=True)
        embeds = F.pad(embeds, (0, 0, 0, self.max_tokens - embeds.shape[1]))  # equally long for all prompts
        lengths = torch.tensor([len(row) for row in rows], device=self.text_device)
        return PromptEmbeds(embeds, torch.arange(self.max_tokens, device=self.text_device) < lengths[:, None])

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        cond: PromptEmbeds,
        uncond: PromptEmbeds | None,
        guidance_scale: float,
    ) -> Tensor:
        height, width = latents.shape[-2] // 2, latents.shape[-1] // 2

        def denoise(latents: Tensor, prompt: PromptEmbeds) -> Tensor:
            count = len(latents)
            output: Tensor = self.pipe.transformer(
                hidden_states=pack(latents).to(self.dtype),
                timestep=timestep.expand(count) / 1000,
                encoder_hidden_states=prompt.embeds.to(self.dtype),
                encoder_hidden_states_mask=hidden(prompt.mask),
                img_shapes=[[(1, height, width)]] * count,
                return_dict=False,
            )[0]
            return unpack(output, height, width).to(latents.dtype)

        halves = compact(cond), None if uncond is None else compact(uncond)
        return self.guided(denoise, latents, *halves, guidance_scale)

    def _combine(self, uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
        mixed = pack(super()._combine(uncond, cond, guidance_scale))
        length = torch.linalg.vector_norm(pack(cond), dim=-1, keepdim=True)
        mixed = mixed * (length / torch.linalg.vector_norm(mixed, dim=-1, keepdim=True))
        return unpack(mixed, cond.shape[-2] // 2, cond.shape[-1] // 2)

    def _pixels(self, latents: Tensor) -> Tensor:
        return super()._pixels(latents.unsqueeze(2)).squeeze(2)  # a film of one picture

    def _to_vae(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        mean, std = (
            latents.new_tensor(each).view(1, -1, 1, 1, 1)
            for each in (config.latents_mean, config.latents_std)
        )
        return latents * std + mean

    def pipeline_kwargs(self, cond: PromptEmbeds, uncond: PromptEmbeds | None) -> dict[str, Any]:
        """Arguments that give a stock pipeline these prompts, without what is padding in all rows."""
        kwargs: dict[str, Any] = {"max_sequence_length": MOST}  # it would cut at 512
        for prefix, prompt in (("", cond), ("negative_", uncond)):
            if prompt is not None:
                text = compact(prompt)
                kwargs[f"{prefix}prompt_embeds"] = text.embeds
                kwargs[f"{prefix}prompt_embeds_mask"] = text.mask.to(torch.int64)
        return kwargs

    def _own_scale(self) -> float:
        return float(self._own_default("true_cfg_scale"))

    def pipeline_guidance(self, scale: float) -> dict[str, Any]:
        """The pipeline's `guidance_scale` is another thing. Without a negative prompt it does not guide at all."""
        return {"true_cfg_scale": scale}


def compact(prompt: PromptEmbeds) -> PromptEmbeds:
    """The text's states first, in their order, and the padding last, as far as some row has so much text."""
    order = torch.argsort((~prompt.mask).to(torch.int8), dim=1, stable=True)
    order = order[:, : int(prompt.mask.sum(1).max())]  # (B, L')
    every = order.unsqueeze(-1).expand(-1, -1, prompt.embeds.shape[-1])
    return PromptEmbeds(prompt.embeds.gather(1, every), prompt.mask.gather(1, order))
