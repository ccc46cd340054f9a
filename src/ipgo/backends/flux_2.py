"""FLUX.2 klein, distilled and base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ipgo.backends.base import Backend, latent_side
from ipgo.backends.facts import Facts, Guidance, Opening
from ipgo.backends.schedulers import shifted_or_own
from ipgo.backends.text import chat, tokenize
from ipgo.embeds import PromptEmbeds


class Flux2Klein(Backend):
    """A `diffusers.Flux2KleinPipeline` whose parameters are frozen; it is given no pictures.

    States of three layers of Qwen3 side by side, which reads the prompt as a user's message. The denoiser sees the
    padding too, and knows the places of all: a prefix moves the prompt, a suffix stands behind its padding.
    """

    facts: ClassVar[Facts] = Facts(
        tokens=512,
        width="joint_attention_dim",
        ordered=True,
        masked="never",
        pooled=False,
        guidance=("classifier-free", "none"),
        process="flow",
        time="t / 1000",
        scaling="mean and deviation",
        prediction="flow",
    )

    def __init__(self, pipe: Any, name: str, opening: Opening) -> None:
        super().__init__(pipe, name, opening)
        self.layers: tuple[int, ...] = self._own_default("text_encoder_out_layers")

    @classmethod
    def guidance_of(cls, options: Mapping[str, Any]) -> Guidance:
        return "none" if options.get("is_distilled") else "classifier-free"

    @property
    def image_size(self) -> int:
        return 2 * super().image_size  # the latents are patches of 2 x 2 of the VAE's

    def _latent_shape(self, image_size: int | None) -> tuple[int, int, int]:
        side = latent_side(self.pipe, self.pipe.default_sample_size, image_size, patch=2) // 2
        return self.pipe.transformer.config.in_channels, side, side

    def _lengths(self, prompts: Sequence[str]) -> list[int]:
        return super()._lengths(chat(self.tokenizer, prompts, thinking=False))

    def _encode(self, prompts: Sequence[str], padding: str) -> PromptEmbeds:
        texts = chat(self.tokenizer, prompts, thinking=False)
        ids, mask = tokenize(self.tokenizer, texts, self.max_tokens, "max_length")
        mask = mask.to(self.text_device)
        answer = self.pipe.text_encoder(
            input_ids=ids.to(self.text_device),
            attention_mask=mask,
            output_hidden_states=True,
            use_cache=False,
        )
        return PromptEmbeds(torch.cat([answer.hidden_states[layer] for layer in self.layers], dim=-1), mask)

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        cond: PromptEmbeds,
        uncond: PromptEmbeds | None,
        guidance_scale: float,
    ) -> Tensor:
        def denoise(latents: Tensor, prompt: PromptEmbeds) -> Tensor:
            count, _, height, width = latents.shape
            output: Tensor = self.pipe.transformer(
                hidden_states=latents.flatten(2).mT.to(self.dtype),
                timestep=timestep.expand(count) / 1000,
                encoder_hidden_states=prompt.embeds.to(self.dtype),
                txt_ids=self._places(1, 1, prompt.length),
                img_ids=self._places(height, width, 1),
                return_dict=False,
            )[0]
            return output.mT.reshape(latents.shape).to(latents.dtype)

        return self.guided(denoise, latents, cond, uncond, guidance_scale)

    def _places(self, rows: int, columns: int, texts: int) -> Tensor:
        """(N, 4): time, which is 0, row, column, and number in the text."""
        ranges = [torch.arange(count) for count in (1, rows, columns, texts)]
        return torch.cartesian_prod(*ranges).to(self.device)

    def _timesteps(self, steps: int, latents: Tensor) -> dict[str, Any]:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        tokens = latents.shape[-2] * latents.shape[-1]
        own = {"mu": compute_empirical_mu(tokens, steps)}  # fitted to the number of steps, too
        return {**shifted_or_own(steps, tokens, self.pipe.scheduler.config), **own}

    def _to_vae(self, latents: Tensor) -> Tensor:
        """The latents are patches of 2 x 2 of the VAE's, each channel brought to mean 0 and deviation 1."""
        norm = self.pipe.vae.bn
        deviation = (norm.running_var + self.pipe.vae.config.batch_norm_eps).sqrt()
        return F.pixel_shuffle(
            latents * deviation.view(1, -1, 1, 1) + norm.running_mean.view(1, -1, 1, 1), upscale_factor=2
        )

    def pipeline_kwargs(self, cond: PromptEmbeds, uncond: PromptEmbeds | None) -> dict[str, Any]:
        """Arguments that give a stock pipeline these prompts; it draws the halves one by one, each at its length."""
        negative = {} if uncond is None else {"negative_prompt_embeds": uncond.embeds}
        return {"prompt_embeds": cond.embeds, **negative}
