"""What several stages do with the networks: pictures in, embeddings out."""

import json
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from tools.emoji import parts, tokenizer
from tools.emoji.loop import DEVICE, mixed, trained
from tools.emoji.sprites import BUILD

SCALING = BUILD / "latents.json"  # the factor that gives latents a standard deviation of one


def pixels(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1]."""
    tensor = torch.from_numpy(np.array(images)).to(DEVICE).permute(0, 3, 1, 2)
    return tensor.float().div(127.5).sub(1).contiguous()


def as_bytes(pixels: Tensor) -> np.ndarray:
    """The reverse of `pixels`: (B, 3, H, W) in [-1, 1] to uint8 (B, H, W, 3)."""
    return pixels.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def shifted(rng: np.random.Generator, pixels: Tensor, most: int = 3) -> Tensor:
    """The pictures moved by a few pixels (all alike), their borders repeated."""
    down, right = most + rng.integers(-most, most + 1, size=2)
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (most,) * 4, mode="replicate")[..., down : down + height, right : right + width]


def load_clip(name: str = "clip") -> tuple[CLIPModel, CLIPTokenizer]:
    """A trained CLIP and the tokenizer."""
    tokens = tokenizer.load()
    model = parts.clip(len(tokens), tokens.bos_token_id, tokens.eos_token_id)
    return trained(name, model), tokens


def pipeline() -> StableDiffusionPipeline:
    """The trained parts as one ordinary Stable Diffusion pipeline."""
    model, tokens = load_clip()
    vae = trained("vae", parts.vae())
    vae.register_to_config(**json.loads(SCALING.read_text()))
    text_encoder = CLIPTextModel(model.config.text_config)
    text_encoder.load_state_dict(model.text_model.state_dict())
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokens,
        unet=trained("denoiser", parts.denoiser()),
        scheduler=parts.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def embed_images(model: CLIPModel, images: Tensor) -> Tensor:
    """Normalised embeddings (B, D) of images in [-1, 1], as all our networks take them."""
    with mixed():
        image = model.get_image_features(pixel_values=images).pooler_output
    return F.normalize(image.float(), dim=-1)


def graded(tower: CLIPVisionModelWithProjection, images: Tensor) -> Tensor:
    """The logits (B,) of `emoji-aesthetic` for images in [-1, 1]."""
    with mixed():
        logits = tower(pixel_values=images).image_embeds
    return logits.float()[:, 0]


def embed_texts(model: CLIPModel, tokens: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Normalised embeddings (B, D)."""
    inputs = tokens(list(texts), padding=True, return_tensors="pt").to(DEVICE)
    with mixed():
        text = model.get_text_features(**inputs).pooler_output
    return F.normalize(text.float(), dim=-1)


def read_texts(model: CLIPModel, tokens: CLIPTokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Normalised embeddings (B, D); and the states (B, 2, W) at the end of each text and at the last padding after it.

    The padding is not masked, as Stable Diffusion reads it.
    """
    inputs = tokens(list(texts), padding=True, return_tensors="pt").to(DEVICE)
    with mixed():
        output = model.text_model(inputs.input_ids)
        text = model.text_projection(output.pooler_output)
    states = torch.stack([output.pooler_output, output.last_hidden_state[:, -1]], dim=1)
    return F.normalize(text.float(), dim=-1), states.float()


def attacked(
    rng: np.random.Generator,
    images: Tensor,
    harm: Callable[[Tensor], Tensor],
    radius: float | np.ndarray,
    steps: int = 2,
) -> Tensor:
    """The images with a disturbance each that raises `harm`: projected gradient ascent in an L2 ball.

    The radii are uniform in [0, `radius`], so that undisturbed pictures are not forgotten; (B,): each has its own.
    """
    radii = rng.uniform(0, radius, len(images)).astype(np.float32)
    ball = torch.from_numpy(radii).to(images.device)[:, None, None, None]
    disturbance = torch.zeros_like(images)
    for _ in range(steps):
        disturbance.requires_grad_()
        slope = torch.autograd.grad(harm(images + disturbance), disturbance)[0]
        with torch.no_grad():
            disturbance = disturbance + 1.5 / steps * ball * slope / _length(slope)
            disturbance = disturbance * (ball / _length(disturbance)).clamp(max=1)
    return (images + disturbance).clamp(-1, 1)


def _length(images: Tensor) -> Tensor:
    return images.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]
