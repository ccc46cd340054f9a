"""The networks of the bundled model at the sizes we ship: classes of diffusers and transformers."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

LATENT_CHANNELS = 4
LATENT_SIZE = 16
TEXT_WIDTH = 192
TEXT_LENGTH = 77


def vae() -> AutoencoderKL:
    """f4 with 4 channels: 64 x 64 pixels become 16 x 16 x 4. No attention: pictures this small need none.

    Residual branches start at zero, which lets so deep a network learn colours and edges from the first steps.
    """
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
    )
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
    with torch.no_grad():
        model.quant_conv.bias[LATENT_CHANNELS:] -= 6  # start with little noise on the latents
    return model


TOWER = {"hidden_size": TEXT_WIDTH, "intermediate_size": 576, "num_attention_heads": 6}
VISION = {**TOWER, "num_hidden_layers": 5, "image_size": 64, "patch_size": 8}


def clip(vocab_size: int, bos: int, eos: int) -> CLIPModel:
    """Both towers 192 wide: three text layers, five image layers on 8-pixel patches."""
    tokens = {"vocab_size": vocab_size, "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}
    text = {**TOWER, **tokens, "num_hidden_layers": 3, "max_position_embeddings": TEXT_LENGTH}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=TEXT_WIDTH))
    # On a CPU twice as fast as the fused kernel, whose backward pass is slow.
    model.set_attn_implementation("eager")
    return model


def aesthetic() -> CLIPVisionModelWithProjection:
    """An image tower as CLIP's, projected to one number: the logit of a picture's quality."""
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=1))
    model.set_attn_implementation("eager")
    return model


def denoiser() -> UNet2DConditionModel:
    """A UNet on 16 x 16 latents that attends to the text at 8 x 8 and in the middle; predicts v."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 160, 320),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(1, 4, 4),
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Scaled-linear noise up to almost no signal (so that backgrounds are free to be any colour), v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )
