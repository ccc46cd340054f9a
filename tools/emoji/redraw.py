"""Pictures of training scenes drawn again by the denoiser, from texts gone astray: what fits make of a prompt.

`emoji-preference` learns that the artwork is better than these. A reward that has only seen what we spoil by hand is
led by a fit to faults that it has never seen: a cake without candles, a cat without a face.
"""

import json

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from ipgo.backends.world import GUIDANCE
from tools.emoji import data, world
from tools.emoji.loop import DEVICE, mixed
from tools.emoji.networks import as_bytes, pipeline, pixels
from tools.emoji.sprites import replacing

PAIRS = data.FOLDER / "redrawn.npy"  # uint8 (N, 2, 64, 64, 3): the artwork through the VAE, and drawn again
TEXTS = PAIRS.with_suffix(".json")
COUNT = 4_000
BATCH = 100
STEPS = 10
# Share of the noise that the artwork's latents get; 1: nothing of it is left.
STRENGTHS = (0.4, 0.6, 0.8, 1.0)
# Standard deviations of the text's states, at most: from half of one on details go, then objects.
ASTRAY = 1.2


@torch.no_grad()
def redrawn(
    pipe: StableDiffusionPipeline,
    latents: torch.Tensor,
    wanted: torch.Tensor,
    empty: torch.Tensor,
    strength: float,
) -> torch.Tensor:
    """Scaled latents (B, 4, 16, 16), noised and denoised again, guided by states (B, L, D) of texts."""
    pipe.scheduler.set_timesteps(STEPS, DEVICE)
    times = pipe.scheduler.timesteps[STEPS - round(strength * STEPS) :]
    x = pipe.scheduler.add_noise(latents, torch.randn_like(latents), times[:1])
    for t in times:
        with mixed():
            both = pipe.unet(torch.cat([x, x]), t, torch.cat([empty, wanted])).sample.float()
        without, with_text = both.chunk(2)
        x = pipe.scheduler.step(without + GUIDANCE * (with_text - without), t, x).prev_sample
    return x


def astray(
    pipe: StableDiffusionPipeline, texts: list[str], amount: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states (B, 77, D) of texts, with noise of so many standard deviations, and those of no text."""
    ids = pipe.tokenizer([*texts, ""], padding="max_length", return_tensors="pt").input_ids.to(DEVICE)
    states = pipe.text_encoder(ids).last_hidden_state
    wanted, empty = states[:-1], states[-1:].expand(len(texts), -1, -1)
    return wanted + amount * wanted.std() * torch.randn_like(wanted), empty


@torch.no_grad()
def build(count: int = COUNT) -> None:
    """Half of the scenes with two objects, each batch with a strength and a straying of its own."""
    if count < 2:
        raise SystemExit(f"count {count}: must be at least 2")
    images, scenes = data.load("train")
    rng = np.random.default_rng(8)
    torch.manual_seed(8)
    rows = rng.permutation(
        np.concatenate([rng.choice(kind, count // 2) for kind in data.clean_kinds(scenes)])
    )
    texts = [world.caption(rng, scenes[row])[0] for row in rows]
    pipe = pipeline().to(DEVICE)
    with replacing(PAIRS) as unfinished, replacing(TEXTS) as told:
        pairs = np.lib.format.open_memmap(unfinished, "w+", np.uint8, (len(rows), 2, *images.shape[1:]))
        for start in range(0, len(rows), BATCH):
            part = slice(start, start + BATCH)
            strength, amount = float(rng.choice(STRENGTHS)), float(rng.uniform(0, ASTRAY))
            with mixed():
                latents = pipe.vae.encode(pixels(images[rows[part]])).latent_dist.mode().float()
            wanted, empty = astray(pipe, texts[part], amount)
            x = redrawn(pipe, latents * pipe.vae.config.scaling_factor, wanted, empty, strength)
            for place, z in enumerate((latents, x / pipe.vae.config.scaling_factor)):
                with mixed():
                    pairs[part, place] = as_bytes(pipe.vae.decode(z).sample.float())
        pairs.flush()
        told.write_text(json.dumps(texts))


def load() -> tuple[np.ndarray, list[str]]:
    """The pairs (N, 2, 64, 64, 3) uint8, mapped from disk, and their texts."""
    pairs, texts = np.load(PAIRS, mmap_mode="r"), json.loads(TEXTS.read_text())
    if len(pairs) != len(texts):
        raise SystemExit(
            f"{PAIRS} has {len(pairs)} pairs and {TEXTS.name} {len(texts)} texts, which must be as many: "
            "run the stage 'redraw' again"
        )
    return pairs, texts
