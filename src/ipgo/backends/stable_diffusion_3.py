"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ipgo.backends.base import Backend
from ipgo.backends.facts import Facts, Opening
from ipgo.backends.schedulers import shift
from ipgo.backends.text import clip_tokens, tokenize
from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError


class StableDiffusion3(Backend):
    """A `diffusers.StableDiffusion3Pipeline` whose parameters are frozen.

    The states of two CLIP encoders side by side, widened with zeros to T5's, then those of T5; the CLIP vectors
    side by side. A prompt may be as long as T5 takes it: CLIP reads its beginning. T5 may be left out, then its
    states are zeros. Text and image attend to each other jointly, without a mask, so the negative prompt is
    padded to the length of the prompt with what is inserted: the pipeline draws both halves in one call.
    """

    facts: ClassVar[Facts] = Facts(
        tokens=256,
        width="joint_attention_dim",
        ordered=False,
        masked="never",
        pooled=True,
        guidance=("classifier-free",),
        process="flow",
        scaling="factor and shift",
        prediction="flow",
    )
    optional: ClassVar[tuple[str, ...]] = ("text_encoder_3",)

    def __init__(self, pipe: Any, name: str, opening: Opening) -> None:
        super().__init__(pipe, name, opening)
        self.clip_tokens = min(clip_tokens(tokenizer, encoder) for tokenizer, encoder in self._clips())
        if pipe.text_encoder_3 is None:
            self.max_tokens = self.clip_tokens

    def _latent_shape(self, image_size: int | None) -> tuple[int, int, int]:
        shape = super()._latent_shape(image_size)
        config = self.pipe.transformer.config
        most = config.pos_embed_max_size * config.patch_size
        if shape[-1] > most:
            raise InputError(
                f"image_size is {image_size}; it must be at most {most * self.pipe.vae_scale_factor}"
            )
        return shape

    def _clips(self) -> list[tuple[Any, Any]]:
        pipe = self.pipe
        return [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]

    @property
    def tokenizer(self) -> Any:
        return self.pipe.tokenizer if self.pipe.text_encoder_3 is None else self.pipe.tokenizer_3

    def _beside(self) -> list[tuple[Any, int]]:
        """None without T5: a prompt that is too long is then refused."""
        if self.pipe.text_encoder_3 is None:
            return []
        return [(tokenizer, self.clip_tokens) for tokenizer, _ in self._clips()]

    def _encode(self, prompts: Sequence[str], padding: str) -> PromptEmbeds:
        own = self.facts.tokens if self.pipe.text_encoder_3 is None else self.max_tokens
        return self._states(prompts, own)

    def _negative(self, prompt: str, length: int) -> PromptEmbeds:
        return self._states([prompt], length - self.clip_tokens)

    def _states(self, prompts: Sequence[str], t5_tokens: int) -> PromptEmbeds:
        states, pooled = [], []
        for tokenizer, encoder in self._clips():
            ids, mask = tokenize(tokenizer, prompts, self.clip_tokens, "max_length")
            answer = encoder(ids.to(self.text_device), output_hidden_states=True)
            states.append(answer.hidden_states[-2])
            pooled.append(answer.text_embeds)
        clip = torch.cat(states, dim=-1)
        clip = F.pad(clip, (0, self.embed_dim - clip.shape[-1]))  # (B, 77, D)
        t5, t5_mask = self._t5(prompts, t5_tokens)
        return PromptEmbeds(
            torch.cat([clip, t5.to(clip)], dim=1),
            torch.cat([mask, t5_mask], dim=1).to(self.text_device),
            torch.cat(pooled, dim=-1),
        )

    def _t5(self, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Its states (B, L, D), for which it reads the padding too, and where there is text."""
        if self.pipe.text_encoder_3 is None:
            shape = len(prompts), length
            return torch.zeros(*shape, self.embed_dim, device=self.text_device), torch.zeros(
                shape, dtype=torch.bool
            )
        ids, mask = tokenize(self.pipe.tokenizer_3, prompts, length, "max_length")
        return self.pipe.text_encoder_3(ids.to(self.text_device))[0], mask

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        cond: PromptEmbeds,
        uncond: PromptEmbeds | None,
        guidance_scale: float,
    ) -> Tensor:
        def denoise(latents: Tensor, prompt: PromptEmbeds) -> Tensor:
            output: Tensor = self.pipe.transformer(
                hidden_states=latents.to(self.dtype),
                timestep=timestep.expand(len(latents)),
                encoder_hidden_states=prompt.embeds,
                pooled_projections=prompt.pooled,
                return_dict=False,
            )[0]
            return output.to(latents.dtype)

        return self.guided(denoise, latents, cond, uncond, guidance_scale)

    def _timesteps(self, steps: int, latents: Tensor) -> dict[str, Any]:
        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return {"num_inference_steps": steps}
        patch = self.pipe.transformer.config.patch_size
        tokens = (latents.shape[-2] // patch) * (latents.shape[-1] // patch)
        return {"num_inference_steps": steps, "mu": shift(tokens, config)}
