"""The bundled model as a Stable Diffusion XL, to measure what the bundled one has no part for.

    python -m tools.emoji.train sprites
    python -m tools.emoji.data --count 40000
    python -m tools.emoji.train restore
    python -m tools.emoji.train captions
    python -m tools.emoji.train latents
    python -m tools.emoji.xl

writes the diffusers folder build/emoji/xl: two text encoders, both the bundled one, whose states stand side by side,
and the second's vector for the whole prompt. The denoiser begins as the bundled one, and learns to read them.
"""

import argparse
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import ipgo
from ipgo.prompts import read_prompts
from ipgo.sampling import sample
from tools.emoji import arguments, parts
from tools.emoji.export import BACKEND
from tools.emoji.loop import DEVICE, Schedule, train, weights
from tools.emoji.networks import load_clip, pipeline
from tools.emoji.sprites import BUILD
from tools.emoji.train import denoising

FOLDER = BUILD / "xl"
SEED = 0
SCHEDULE = Schedule(steps=1_400, batch=64, lr=4e-4, warmup=100, ema=0.998)
# What a denoiser of SDXL is told besides: the sizes of the original and of the picture, and where it was cropped.
SIZES = (64, 64, 0, 0, 64, 64)
SIZE_WIDTH = 32
SPREAD = 3.1  # standard deviation of a token's state before the last norm
# One that always has the states need not look at the vector: each is empty in so many samples, apart from the other
# (Stable Diffusion 3 was trained so, arXiv 2403.03206).
NO_STATES, NO_VECTOR = 0.3, 0.1


def text_encoder() -> CLIPTextModelWithProjection:
    """The bundled one with its projection, and one layer more, which passes its input on.

    SDXL reads the states before the last layer: so these are the bundled one's, before its last norm.
    """
    clip, _ = load_clip()
    config = clip.config.text_config.__class__(**clip.config.text_config.to_dict())
    config.update({"num_hidden_layers": config.num_hidden_layers + 1, "projection_dim": parts.TEXT_WIDTH})
    model = CLIPTextModelWithProjection(config)
    state = {f"text_model.{name}": tensor for name, tensor in clip.text_model.state_dict().items()}
    state["text_projection.weight"] = clip.text_projection.weight
    model.load_state_dict(state, strict=False)
    last = model.text_model.encoder.layers[-1]
    for branch in (last.self_attn.out_proj, last.mlp.fc2):
        nn.init.zeros_(branch.weight)
        nn.init.zeros_(branch.bias)
    return model.to(DEVICE).eval().requires_grad_(False)


def denoiser() -> UNet2DConditionModel:
    """The bundled one, which attends to the mean of both states, and to the vector not at all yet."""
    plain, norm = parts.denoiser(), load_clip()[0].text_model.final_layer_norm
    config = {key: value for key, value in plain.config.items() if not key.startswith("_")}
    unet = UNet2DConditionModel(
        **config
        | {
            "cross_attention_dim": 2 * parts.TEXT_WIDTH,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_WIDTH,
            "projection_class_embeddings_input_dim": len(SIZES) * SIZE_WIDTH + parts.TEXT_WIDTH,
        }
    )
    state = weights("denoiser")
    for name, tensor in state.items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            plain_states = tensor * norm.weight / SPREAD  # nearly what the last norm did
            state[name] = torch.cat([plain_states, plain_states], dim=1) / 2
    unet.load_state_dict(state, strict=False)
    nn.init.zeros_(unet.add_embedding.linear_2.weight)
    nn.init.zeros_(unet.add_embedding.linear_2.bias)
    return unet


def fitted(encoder: CLIPTextModelWithProjection, schedule: Schedule) -> UNet2DConditionModel:
    """The denoiser, trained further as the bundled one was trained, from its checkpoint if there is one."""
    unet, tokens = denoiser(), load_clip()[1]
    empty = tokens("", padding="max_length", return_tensors="pt").input_ids.to(DEVICE)
    sizes = torch.tensor(SIZES, dtype=torch.float32, device=DEVICE)

    def read(rng: np.random.Generator, ids: Tensor) -> dict[str, Any]:
        answer = encoder(torch.cat([ids, empty]), output_hidden_states=True)
        states, vectors = answer.hidden_states[-2], answer.text_embeds
        without = torch.from_numpy(rng.random((2, len(ids))) < [[NO_STATES], [NO_VECTOR]]).to(DEVICE)
        states = torch.where(without[0][:, None, None], states[-1:], states[:-1])
        vectors = torch.where(without[1][:, None], vectors[-1:], vectors[:-1])
        told = {"text_embeds": vectors, "time_ids": sizes.expand(len(ids), -1)}
        return {"encoder_hidden_states": torch.cat([states, states], dim=-1), "added_cond_kwargs": told}

    train("xl", unet, denoising(unet, tokens, read), schedule, origin=nn.ModuleList([encoder, unet]))
    unet.load_state_dict(weights("xl"))
    return unet


def build(schedule: Schedule = SCHEDULE) -> None:
    """Train it, and write the folder."""
    torch.manual_seed(SEED)  # new parts begin at random; others each time would not go on from a checkpoint
    encoder = text_encoder()
    unet, plain = fitted(encoder, schedule), pipeline()
    first = CLIPTextModel(encoder.config)
    first.load_state_dict(encoder.text_model.state_dict())
    xl = StableDiffusionXLPipeline(
        vae=plain.vae,
        text_encoder=first,
        text_encoder_2=encoder,
        tokenizer=plain.tokenizer,
        tokenizer_2=plain.tokenizer,
        unet=unet,
        scheduler=plain.scheduler,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    shutil.rmtree(FOLDER, ignore_errors=True)
    xl.to("cpu").save_pretrained(FOLDER, safe_serialization=True)
    shutil.copy(BACKEND / "vocabulary.json", FOLDER)  # so that its rewards and its judge come with it


@torch.no_grad()
def reading(count: int = 8) -> dict[str, float]:
    """How much pictures change (root mean square of pixels in [0, 1]) with a part of another prompt's condition."""
    backend, sampling = ipgo.load_backend(FOLDER), ipgo.Sampling(20)
    prompts = read_prompts("one:train")[:count]
    noise, told, empty = backend.noise([0] * count), backend.encode(prompts), backend.encode([""] * count)
    others = told.select(torch.arange(count).roll(1))
    changed = {
        "vector": replace(told, pooled=others.pooled),
        "states": replace(told, embeds=others.embeds),
    }
    plain = sample(backend, told, empty, noise, sampling)
    return {
        name: (sample(backend, each, empty, noise, sampling) - plain).square().mean().sqrt().item()
        for name, each in changed.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=arguments.count, default=SCHEDULE.steps)
    parser.add_argument("--seconds", type=arguments.amount, help="or a length in time")
    build(replace(SCHEDULE, **vars(parser.parse_args())))
    for part, change in reading().items():
        print(f"with the {part} of another prompt pictures change by {change:.3f}")
