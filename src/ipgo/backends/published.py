"""What published pipelines are built of: class and configuration of every part, as in their own config.json.

What is not written here is the class's default. tests/unit/test_published.py compares the numbers of parameters with
the published ones.
"""

from __future__ import annotations

from typing import Any

from ipgo.backends.blueprint import Blueprint, Part

_LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SHIPPED = {**_LEVELS, "steps_offset": 1}

# -- text encoders -------------------------------------------------------------------------------------------

_CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_H: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
_CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_T5: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
_T5_XXL = Part("transformers", "T5EncoderModel", _T5)
_GEMMA_2_2B: dict[str, Any] = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
_QWEN_3_4B: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
_QWEN_25_VL_7B: dict[str, Any] = {
    "text_config": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
    },
    "tie_word_embeddings": False,
}

# -- VAEs ----------------------------------------------------------------------------------------------------


def _vae(**config: Any) -> Part:
    four: dict[str, Any] = {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    return Part("diffusers", "AutoencoderKL", {**four, **config})


_VAE_SD = _vae(latent_channels=4, sample_size=512)
_VAE_XL = _vae(latent_channels=4, sample_size=1024, scaling_factor=0.13025, force_upcast=True)


def _vae_16(scaling: float, shift: float) -> Part:
    return _vae(
        latent_channels=16,
        sample_size=1024,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )


_DC_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_DC_AE: dict[str, Any] = {
    "encoder_block_types": _DC_BLOCKS,
    "decoder_block_types": _DC_BLOCKS,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}


# -- pipelines -----------------------------------------------------------------------------------------------


def _stable_diffusion(
    kind: str, unet: dict[str, Any], text: dict[str, Any], scheduler: tuple[str, dict[str, Any]]
) -> Blueprint:
    return Blueprint(
        kind,
        {
            "unet": Part("diffusers", "UNet2DConditionModel", unet),
            "vae": _VAE_SD,
            "text_encoder": Part("transformers", "CLIPTextModel", text),
            "scheduler": Part("diffusers", *scheduler),
        },
    )


def _xl(side: int, scheduler: Part) -> Blueprint:
    unet = {
        "sample_size": side,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    return Blueprint(
        "StableDiffusionXLPipeline",
        {
            "unet": Part("diffusers", "UNet2DConditionModel", unet),
            "vae": _VAE_XL,
            "text_encoder": Part("transformers", "CLIPTextModel", _CLIP_L),
            "text_encoder_2": Part("transformers", "CLIPTextModelWithProjection", _CLIP_G),
            "scheduler": scheduler,
        },
    )


def _sd3(**config: Any) -> Blueprint:
    transformer = {
        "sample_size": 128,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        **config,
    }
    return Blueprint(
        "StableDiffusion3Pipeline",
        {
            "transformer": Part("diffusers", "SD3Transformer2DModel", transformer),
            "vae": _vae_16(1.5305, 0.0609),
            "text_encoder": Part("transformers", "CLIPTextModelWithProjection", _CLIP_L),
            "text_encoder_2": Part("transformers", "CLIPTextModelWithProjection", _CLIP_G),
            "text_encoder_3": _T5_XXL,
            "scheduler": Part("diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        },
    )


def _flux(distilled: bool) -> Blueprint:
    shifting = {"use_dynamic_shifting": True, "shift": 3.0} if distilled else {"shift": 1.0}
    return Blueprint(
        "FluxPipeline",
        {
            "transformer": Part("diffusers", "FluxTransformer2DModel", {"guidance_embeds": distilled}),
            "vae": _vae_16(0.3611, 0.1159),
            "text_encoder": Part("transformers", "CLIPTextModel", _CLIP_L),
            "text_encoder_2": _T5_XXL,
            "scheduler": Part("diffusers", "FlowMatchEulerDiscreteScheduler", shifting),
        },
    )


_CHROMA = Blueprint(
    "ChromaPipeline",
    {
        "transformer": Part("diffusers", "ChromaTransformer2DModel", {}),
        "vae": _vae_16(0.3611, 0.1159),
        "text_encoder": _T5_XXL,
        "scheduler": Part("diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    },
)


def _pixart(kind: str, vae: Part) -> Blueprint:
    transformer = {"sample_size": 64, "caption_channels": 4096}
    levels = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    return Blueprint(
        kind,
        {
            "transformer": Part("diffusers", "PixArtTransformer2DModel", transformer),
            "vae": vae,
            "text_encoder": _T5_XXL,
            "scheduler": Part("diffusers", "DPMSolverMultistepScheduler", levels),
        },
    )


def _sana(kind: str, transformer: dict[str, Any], scheduler: tuple[str, dict[str, Any]]) -> Blueprint:
    return Blueprint(
        kind,
        {
            "transformer": Part("diffusers", "SanaTransformer2DModel", transformer),
            "vae": Part("diffusers", "AutoencoderDC", _DC_AE),
            "text_encoder": Part("transformers", "Gemma2Model", _GEMMA_2_2B),
            "scheduler": Part("diffusers", *scheduler),
        },
    )


def _z_image(shift: float) -> Blueprint:
    return Blueprint(
        "ZImagePipeline",
        {
            "transformer": Part("diffusers", "ZImageTransformer2DModel", {}),
            "vae": _vae_16(0.3611, 0.1159),
            "text_encoder": Part("transformers", "Qwen3Model", _QWEN_3_4B),
            "scheduler": Part("diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": shift}),
        },
    )


def _flux_2_klein(distilled: bool) -> Blueprint:
    transformer = {
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "guidance_embeds": False,
    }
    shifting = {"use_dynamic_shifting": True, "shift": 3.0}
    return Blueprint(
        "Flux2KleinPipeline",
        {
            "transformer": Part("diffusers", "Flux2Transformer2DModel", transformer),
            "vae": Part("diffusers", "AutoencoderKLFlux2", {}),
            "text_encoder": Part("transformers", "Qwen3ForCausalLM", _QWEN_3_4B),
            "scheduler": Part("diffusers", "FlowMatchEulerDiscreteScheduler", shifting),
        },
        options={"is_distilled": distilled},
    )


_QWEN_IMAGE = Blueprint(
    "QwenImagePipeline",
    {
        "transformer": Part("diffusers", "QwenImageTransformer2DModel", {}),
        "vae": Part("diffusers", "AutoencoderKLQwenImage", {}),
        "text_encoder": Part("transformers", "Qwen2_5_VLForConditionalGeneration", _QWEN_25_VL_7B),
        "scheduler": Part(
            "diffusers",
            "FlowMatchEulerDiscreteScheduler",
            {
                "use_dynamic_shifting": True,
                "max_shift": 0.9,
                "max_image_seq_len": 8192,
                "shift_terminal": 0.02,
            },
        ),
    },
)
_UNET_15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
_UNET_21: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
_PNDM = ("PNDMScheduler", {**_SHIPPED, "skip_prk_steps": True, "set_alpha_to_one": False})
_EULER_XL = Part("diffusers", "EulerDiscreteScheduler", _SHIPPED)
_ANCESTRAL = Part(
    "diffusers", "EulerAncestralDiscreteScheduler", {**_SHIPPED, "timestep_spacing": "trailing"}
)

# The names of `ipgo.backends.BACKENDS` whose weights are not bundled.
PUBLISHED: dict[str, Blueprint] = {
    "sd15": _stable_diffusion("StableDiffusionPipeline", _UNET_15, _CLIP_L, _PNDM),
    "sd21": _stable_diffusion(
        "StableDiffusionPipeline",
        {**_UNET_21, "sample_size": 96},
        _CLIP_H,
        (
            "DDIMScheduler",
            {**_SHIPPED, "prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": False},
        ),
    ),
    "sd-turbo": _stable_diffusion(
        "StableDiffusionPipeline",
        _UNET_21,
        _CLIP_H,
        ("EulerDiscreteScheduler", {**_SHIPPED, "timestep_spacing": "trailing"}),
    ),
    "lcm": _stable_diffusion(
        "LatentConsistencyModelPipeline",
        {**_UNET_15, "sample_size": 96, "time_cond_proj_dim": 256},
        _CLIP_L,
        ("LCMScheduler", {**_SHIPPED, "clip_sample": False, "set_alpha_to_one": True}),
    ),
    "sdxl": _xl(128, _EULER_XL),
    "sdxl-turbo": _xl(64, _ANCESTRAL),
    "sd3": _sd3(pos_embed_max_size=192),
    "sd35": _sd3(pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
    "flux-dev": _flux(distilled=True),
    "flux-schnell": _flux(distilled=False),
    "chroma": _CHROMA,
    "pixart-alpha": _pixart("PixArtAlphaPipeline", _VAE_SD),
    "pixart-sigma": _pixart("PixArtSigmaPipeline", _VAE_XL),
    "sana": _sana(
        "SanaPipeline",
        {},
        (
            "DPMSolverMultistepScheduler",
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        ),
    ),
    "sana-sprint": _sana(
        "SanaSprintPipeline",
        {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
        ("SCMScheduler", {}),
    ),
    "z-image": _z_image(shift=6.0),
    "z-image-turbo": _z_image(shift=3.0),
    "qwen-image": _QWEN_IMAGE,
    "flux2-klein": _flux_2_klein(distilled=True),
    "flux2-klein-base": _flux_2_klein(distilled=False),
}
