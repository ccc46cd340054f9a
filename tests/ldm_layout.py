"""The weights of a diffusers pipeline under the names that Stable Diffusion and SDXL were published with."""

import re

import torch

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def start(name, names):
    """The entry that `name` begins with, or nothing."""
    return next((each for each in names if name.startswith(f"{each}.")), None)


def unet_name(name, layers):
    """One of a UNet with so many resnets in each block on the way down."""
    if whole := start(name, UNET):
        return name.replace(whole, UNET[whole], 1)
    side, rest = name.split(".", 1)
    if side == "mid_block":
        place = start(rest, MIDDLE)
        return f"middle_block.{MIDDLE[place]}.{resnet_name(rest.removeprefix(place + '.'), place)}"
    block, part, number, rest = rest.split(".", 3)
    if part == "downsamplers":
        return f"input_blocks.{(int(block) + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":
        return f"output_blocks.{int(block) * (layers + 1) + layers}.UP.{rest}"
    first, own = ("input", 1) if side == "down_blocks" else ("output", 0)
    place = int(block) * (layers + 1) + int(number) + own
    return f"{first}_blocks.{place}.{int(part == 'attentions')}.{resnet_name(rest, part)}"


def resnet_name(rest, part):
    return re.sub(r"^\w+", lambda found: RESNET[found[0]], rest) if part.startswith("resnets") else rest


def unet_weights(unet):
    named = {
        unet_name(name, unet.config.layers_per_block): value for name, value in unet.state_dict().items()
    }
    # Upsampling comes after the attention, where there is one.
    return {
        name.replace(
            ".UP.", ".2." if any(key.startswith(f"{name.split('.UP.')[0]}.1.") for key in named) else ".1."
        ): value
        for name, value in named.items()
    }


def vae_name(name, blocks):
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = re.sub(
        r"mid_block\.attentions\.0\.(group_norm|to_\w+(?:\.0)?)",
        lambda found: f"mid.attn_1.{VAE_ATTENTION[found[1]]}",
        name,
    )
    name = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", name)
    name = re.sub(r"up_blocks\.(\d+)\.", lambda found: f"up.{blocks - 1 - int(found[1])}.", name)
    return re.sub(r"resnets\.", "block.", re.sub(r"(down|up)samplers\.0", r"\1sample", name))


def vae_weights(vae):
    weights = {}
    for name, value in vae.state_dict().items():
        matrix = "attentions" in name and value.ndim == 2
        named = vae_name(name, len(vae.config.block_out_channels))
        weights[named] = value[..., None, None] if matrix else value  # as convolutions of one pixel
    return weights


def clip_weights(encoder):
    """As transformers named them until 5.6: all under `text_model`."""
    return {f"text_model.{name.removeprefix('text_model.')}": v for name, v in encoder.state_dict().items()}


def open_clip_weights(encoder):
    weights = {}
    state = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    for name, value in state.items():
        if name == "text_projection.weight":
            weights["text_projection"] = value.T.contiguous()
        elif name in OPEN_CLIP:
            weights[OPEN_CLIP[name]] = value
        elif found := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            rows = [state[name.replace("q_proj", f"{each}_proj")] for each in "qkv"]
            weights[f"transformer.resblocks.{found[1]}.attn.in_proj_{found[2]}"] = torch.cat(rows)
        elif not re.search(r"[kv]_proj", name):
            layer, rest = name.removeprefix("encoder.layers.").split(".", 1)
            part = start(rest, OPEN_CLIP_LAYER)
            weights[f"transformer.resblocks.{layer}.{rest.replace(part, OPEN_CLIP_LAYER[part], 1)}"] = value
    return weights


def published(pipe, *, open_clip=False):
    """All weights of a Stable Diffusion 1.x (`open_clip`: 2.x) or an SDXL, as one dict."""
    parts = {"model.diffusion_model.": unet_weights(pipe.unet), "first_stage_model.": vae_weights(pipe.vae)}
    if hasattr(pipe, "text_encoder_2"):
        parts["conditioner.embedders.0.transformer."] = clip_weights(pipe.text_encoder)
        parts["conditioner.embedders.1.model."] = open_clip_weights(pipe.text_encoder_2)
    elif open_clip:
        parts["cond_stage_model.model."] = open_clip_weights(pipe.text_encoder)
    else:
        parts["cond_stage_model.transformer."] = clip_weights(pipe.text_encoder)
    return {
        prefix + name: value.contiguous() for prefix, part in parts.items() for name, value in part.items()
    }


SD3 = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SD3_ATTENTION = {
    "x_block": ("to_q", "to_k", "to_v"),
    "context_block": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def stability_layout(transformer):
    """The weights of an SD3Transformer2DModel as Stability AI publishes them, in one file with others."""
    state, found = dict(transformer.state_dict()), {}
    last = len(transformer.transformer_blocks) - 1
    # Their last norms give the shift first, diffusers' the scale.
    for name in ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear"):
        for kind in ("weight", "bias"):
            state[f"{name}.{kind}"] = torch.cat(state[f"{name}.{kind}"].chunk(2)[::-1])
    for block in range(last + 1):
        for side, parts in SD3_ATTENTION.items():
            for kind in ("weight", "bias"):
                names = [f"transformer_blocks.{block}.attn.{part}.{kind}" for part in parts]
                whole = torch.cat([state.pop(name) for name in names])
                found[f"joint_blocks.{block}.{side}.attn.qkv.{kind}"] = whole
    for name, value in state.items():
        inner = re.fullmatch(r"transformer_blocks\.(\d+)\.(.*)\.(weight|bias)", name)
        if inner:
            name = f"joint_blocks.{inner[1]}.{SD3_BLOCK[inner[2]]}.{inner[3]}"
        elif name in SD3:
            name = SD3[name]
        else:
            stem, _, kind = name.rpartition(".")
            name = f"{SD3.get(stem, stem)}.{kind}"
        found[name] = value
    return {f"model.diffusion_model.{name}": value.contiguous() for name, value in found.items()}
