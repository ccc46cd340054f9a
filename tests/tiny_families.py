"""Tiny random pipelines of every family, from the real classes, in memory."""

import inspect

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

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


def sd21():
    """It predicts velocity, and its UNet projects linearly and has other heads on each level."""
    parts = tiny_pipeline(prediction_type="v_prediction").components
    torch.manual_seed(1)
    own = {"use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True}
    unet = UNet2DConditionModel.from_config(parts["unet"].config, **own)
    parts["unet"] = louder(unet, "attn2.to_out", "attn2.to_v")
    return quiet(StableDiffusionPipeline(**parts, requires_safety_checker=False))


def lcm_lora():
    """A usual UNet, which a LoRA has made consistent: only the scheduler is another."""
    pipe = tiny_pipeline()
    pipe.scheduler = LCMScheduler(**LEVELS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return pipe


def lcm():
    """The tiny Stable Diffusion with a UNet that takes the guidance scale."""
    parts = tiny_pipeline().components
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_config(parts["unet"].config, time_cond_proj_dim=16)
    parts["unet"] = louder(unet, "attn2.to_out", "attn2.to_v", "cond_proj")
    parts["scheduler"] = LCMScheduler(**LEVELS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return quiet(LatentConsistencyModelPipeline(**parts, requires_safety_checker=False))


def sdxl(scheduler=None, *, zeros=True, scale_width=None, **vae_config):
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
        time_cond_proj_dim=scale_width,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae(**vae_config),
        text_encoder=clip(CLIPTextModel, tokenizer, 16),
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer, 24),
        tokenizer=tokenizer,
        tokenizer_2=byte_tokenizer(),
        unet=louder(unet, "attn2.to_out", "attn2.to_v", "cond_proj"),
        scheduler=scheduler or DDIMScheduler(**LEVELS, clip_sample=False, steps_offset=1),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    return quiet(pipe)


def sdxl_turbo():
    return sdxl(EulerAncestralDiscreteScheduler(**LEVELS, timestep_spacing="trailing"))


def lcm_sdxl():
    """With a UNet that takes the guidance scale."""
    scheduler = LCMScheduler(**LEVELS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return sdxl(scheduler, scale_width=16)


T5_TOKENS = 16


def letters():
    """T5's tokenizer with one token for each letter."""
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    alphabet = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=marks + alphabet, extra_ids=0, model_max_length=T5_TOKENS)


def t5(tokenizer, width=32):
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_ff=32, d_kv=8, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return T5EncoderModel(config).eval()


def sd35():
    """With a second attention of the image to itself in a first layer, and normalised queries and keys."""
    return sd3(dual_attention_layers=(0,), qk_norm="rms_norm")


def sd3(*, with_t5=True, dual_attention_layers=(), qk_norm=None, **shifting):
    torch.manual_seed(0)
    tokenizer, tokenizer_3 = byte_tokenizer(), letters()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=8 + 16,
        pos_embed_max_size=8,
        dual_attention_layers=dual_attention_layers,
        qk_norm=qk_norm,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=louder(transformer, "context_embedder.weight"),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **shifting}),
        vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModelWithProjection, tokenizer, 8),
        tokenizer=tokenizer,
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer, 16),
        tokenizer_2=byte_tokenizer(),
        text_encoder_3=t5(tokenizer_3) if with_t5 else None,
        tokenizer_3=tokenizer_3 if with_t5 else None,
    )
    return quiet(pipe)


def flux(*, distilled=True):
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = byte_tokenizer(), letters()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=distilled,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=distilled),
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModel, tokenizer, 16),
        tokenizer=tokenizer,
        text_encoder_2=t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=louder(transformer, "context_embedder.weight"),
    )
    return quiet(pipe)


def chroma():
    torch.manual_seed(0)
    tokenizer = letters()
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=2,
    )
    pipe = ChromaPipeline(
        # The network rounds times to its own format: at two steps of this schedule bfloat16 holds them.
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=t5(tokenizer),
        tokenizer=tokenizer,
        transformer=louder(transformer, "context_embedder.weight"),
    )
    return quiet(pipe)


def pixart(kind=PixArtAlphaPipeline, sample_size=8):
    torch.manual_seed(0)
    tokenizer = letters()
    transformer = PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        cross_attention_dim=24,
        in_channels=4,
        out_channels=8,
    )
    pipe = kind(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer),
        vae=vae(),
        transformer=louder(transformer, "attn2.to_out", "attn2.to_v"),
        scheduler=DPMSolverMultistepScheduler(**LEVELS),
    )
    return quiet(pipe)


def pixart_sigma():
    return pixart(PixArtSigmaPipeline)


def pixart_told_its_size():
    """With the micro-conditions that alpha has at 1024 pixels."""
    return pixart(sample_size=128)


def gemma_tokenizer():
    """Gemma's tokenizer with one token for each letter, and one for each line of Sana's instruction."""
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n"]
    vocabulary = {name: index for index, name in enumerate([*marks, *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[], padding_side="left", add_bos_token=True)
    tokenizer.add_tokens(
        inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    )
    return tokenizer


def gemma(tokenizer, width):
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return Gemma2Model(config).eval()


def sana(kind=SanaPipeline, scheduler=None, channels=4, **config):
    torch.manual_seed(0)
    tokenizer = gemma_tokenizer()
    transformer = SanaTransformer2DModel(
        in_channels=channels,
        out_channels=channels,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
        **config,
    )
    blocks = {
        "block_types": ("ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8),
        "layers_per_block": (1, 1),
        "qkv_multiscales": ((), (5,)),
    }
    vae = AutoencoderDC(
        latent_channels=channels,
        attention_head_dim=2,
        **{f"encoder_{name}": value for name, value in blocks.items()},
        **{f"decoder_{name}": value for name, value in blocks.items()},
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.5,
    )
    pipe = kind(
        tokenizer=tokenizer,
        text_encoder=gemma(tokenizer, 16),
        vae=vae.eval(),
        transformer=louder(transformer, "attn2.to_out", "attn2.to_v", "caption_norm"),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return quiet(pipe)


def sana_with_dpm():
    """With the scheduler that Sana was published with, and a scaled time."""
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    return sana(scheduler=scheduler, timestep_scale=1.5)


def sana_sprint():
    return sana(SanaSprintPipeline, SCMScheduler(), guidance_embeds=True, qk_norm="rms_norm_across_heads")


QWEN_TOKENS = 56
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if not enable_thinking %}<think></think>{% endif %}"
)


def qwen_tokenizer():
    """Qwen's tokenizer with one token for each byte and each mark, and a chat template of its form."""
    vocabulary = {name: index for index, name in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], model_max_length=QWEN_TOKENS, chat_template=CHAT, padding_side="right"
    )
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "user", "assistant", "<think>", "</think>"])
    return tokenizer


def qwen3(kind, tokenizer, layers):
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
    )
    return kind(config).eval()


def z_image():
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=qwen3(Qwen3Model, tokenizer, 2),
        tokenizer=tokenizer,
        transformer=louder(transformer, "cap_embedder.1", "adaLN"),
    )
    return quiet(pipe)


def qwen_vl(tokenizer):
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
        **dict.fromkeys(
            ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"],
            len(tokenizer) - 1,
        ),
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen_image():
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(
        ["system", "Describe the image by detailing the color, shape, size, texture, quantity, "]
    )
    tokenizer.add_tokens(["text, spatial relationships of the objects and background:", "<|vision_pad|>"])
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, 0.0, -0.1, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.0],
    )
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=qwen_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=louder(transformer, "txt_in.weight"),
    )
    pipe.tokenizer_max_length = QWEN_TOKENS
    before, _ = pipe.prompt_template_encode.split("{}")
    pipe.prompt_template_encode_start_idx = len(tokenizer(before).input_ids)
    return quiet(pipe)


def flux_2(*, distilled=True):
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    vae.bn.running_mean.uniform_(-1, 1)
    vae.bn.running_var.uniform_(0.5, 2)
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=qwen3(Qwen3ForCausalLM, tokenizer, 27),
        tokenizer=tokenizer,
        transformer=louder(transformer, "context_embedder.weight"),
        is_distilled=distilled,
    )
    return quiet(pipe)
