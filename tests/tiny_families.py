"""Tiny random pipelines of every family, from the real classes, in memory."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.conftest import byte_tokenizer, tiny_pipeline

LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def clip(kind, tokenizer, width):
    """A CLIP text encoder for `byte_tokenizer`."""
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            projection_dim=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=len(tokenizer) - 2,
            eos_token_id=len(tokenizer) - 1,
            pad_token_id=len(tokenizer) - 1,
        )
    ).eval()


def vae(channels=4, **config):
    """A VAE that makes two pixels a side of one latent."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **{"scaling_factor": 0.5, **config},
    ).eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def louder(module, *names, factor=4):
    """Make the text matter, as it does in a trained model."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(each in name for each in names):
                parameter.mul_(factor)
    return module.eval()


def sd_turbo():
    pipe = tiny_pipeline()
    pipe.scheduler = EulerDiscreteScheduler(**LEVELS, timestep_spacing="trailing")
    return pipe


def sdxl(scheduler=None, *, zeros=True, **vae_config):
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
        cross_attention_dim=16 + 24,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae(**vae_config),
        text_encoder=clip(CLIPTextModel, tokenizer, 16),
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer, 24),
        tokenizer=tokenizer,
        tokenizer_2=byte_tokenizer(),
        unet=louder(unet, "attn2.to_out", "attn2.to_v"),
        scheduler=scheduler or DDIMScheduler(**LEVELS, clip_sample=False, steps_offset=1),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    return quiet(pipe)


def sdxl_turbo():
    return sdxl(EulerAncestralDiscreteScheduler(**LEVELS, timestep_spacing="trailing"))
