"""FLUX.1 dev and schnell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ipgo.backends.facts import Facts, Guidance
from ipgo.backends.packed import PackedBackend, pack, places, unpack
from ipgo.backends.schedulers import shifted_or_own
from ipgo.backends.text import clip_tokens, tokenize
from ipgo.embeds import PromptEmbeds


class Flux(PackedBackend):
    """A `diffusers.FluxPipeline` whose parameters are frozen.

    T5's states and CLIP's vector. The guidance scale is an input of the network (dev), or has no meaning
    (schnell): there is no unconditional half.
    """

    facts: ClassVar[Facts] = Facts(
        tokens=512,
        width="joint_attention_dim",
        ordered=False,
        masked="never",
        pooled=True,
        guidance=("distilled", "none"),
        process="flow",
        latents="packed",
        time="t / 1000",
        scaling="factor and shift",
        prediction="flow",
    )

    # An illegal memory access on an H100 (docs/benchmarks-gpu.md); PyTorch's other kernels work.
    cudnn_attention = False

    @classmethod
    def guidance_of(cls, options: Mapping[str, Any]) -> Guidance:
        return "distilled" if options.get("guidance_embeds") else "none"

    @property
    def tokenizer(self) -> Any:
        return self.pipe.tokenizer_2

    def _timesteps(self, steps: int, latents: Tensor) -> dict[str, Any]:
        return shifted_or_own(steps, latents.shape[-2] * latents.shape[-1] // 4, self.pipe.scheduler.config)

    def _beside(self) -> list[tuple[Any, int]]:
        return [(self.pipe.tokenizer, clip_tokens(self.pipe.tokenizer, self.pipe.text_encoder))]

    def _encode(self, prompts: Sequence[str], padding: str) -> PromptEmbeds:
        pipe = self.pipe
        length = clip_tokens(pipe.tokenizer, pipe.text_encoder)
        ids, _ = tokenize(pipe.tokenizer, prompts, length, "max_length")
        pooled = pipe.text_encoder(ids.to(self.text_device)).pooler_output
        ids, mask = tokenize(pipe.tokenizer_2, prompts, self.max_tokens, "max_length")
        states = pipe.text_encoder_2(ids.to(self.text_device))[0]  # it reads the padding too
        return PromptEmbeds(states, mask.to(self.text_device), pooled)

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
                guidance=torch.full([count], guidance_scale, device=self.device)
                if self.guidance == "distilled"
                else None,
                pooled_projections=prompt.pooled,
                encoder_hidden_states=prompt.embeds,
                txt_ids=torch.zeros(prompt.length, 3, dtype=self.dtype, device=self.device),
                img_ids=places(height, width).to(self.device, self.dtype),
                return_dict=False,
            )[0]
            return unpack(output, height, width).to(latents.dtype)

        return self.guided(denoise, latents, cond, None, guidance_scale)
