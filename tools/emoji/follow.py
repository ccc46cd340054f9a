"""What IPGO makes of training captions when it follows `emoji-preference`, for that reward to learn from.

    python -m tools.emoji.train follow && python -m tools.emoji.train resist

is a round: prompts are fitted against the reward as it is, and `resist` trains it further on what came of them; the
next round fits against that. What was followed is drawn upon the noised latents of the artwork, so that the picture
keeps its place, and pixels tell what the embeddings did to it.
"""

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ipgo import IPGO, Adapter, Backend, Reward, Sampling, Task, as_reward, load_backend
from tools.emoji import data, world
from tools.emoji.loop import DEVICE
from tools.emoji.networks import as_bytes, embed_images, embed_texts, load_clip, pipeline, pixels
from tools.emoji.redraw import GUIDANCE, redrawn

COUNT = 96 if DEVICE.type == "cpu" else 1_024  # prompts of a round
BATCH = 16 if DEVICE.type == "cpu" else 128
NOISES = 4  # for each prompt
STRENGTHS = (0.5, 0.7, 0.9)  # share of the noise that the artwork's latents get
# Steps that pictures are drawn from: half as far as the default preset goes, and up to a third further.
AT = (8, 16, 24)
SAMPLING = Sampling(8, GUIDANCE)
ASCENT = replace(IPGO().ascent, steps=AT[-1], lr=1e-2, lr_basis=2e-3)


def rounds() -> list[Path]:
    """The pictures of all rounds, uint8 (N, 5, 64, 64, 3): the artwork, the raw prompt's, those of the steps `AT`."""
    return sorted(data.FOLDER.glob("followed-*.npy"))


def texts(pictures: Path) -> list[str]:
    """The N captions beside them."""
    captions: list[str] = json.loads(pictures.with_suffix(".json").read_text())
    return captions


def preference() -> Reward:
    """The reward as it is trained so far."""
    model, tokens = load_clip("preference")

    def of(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return (embed_images(model, 2 * images - 1) * embed_texts(model, tokens, prompts)).sum(-1)

    return as_reward(of)


def fits(backend: Backend, reward: Reward, prompts: Sequence[str], seed: int) -> list[Adapter]:
    """What was learned after each of the steps `AT`, on noise that is always new, one row for each prompt."""
    task = Task(backend, reward, tuple(prompts), SAMPLING, (), seed)
    return [
        copy.deepcopy(progress.adapter) for progress in IPGO(ascent=ASCENT).fit(task) if progress.step in AT
    ]


@torch.no_grad()
def drawn(
    backend: Backend, adapter: Adapter, prompts: list[str], latents: torch.Tensor, strength: float, seed: int
) -> np.ndarray:
    """The artwork's latents (B, 4, 16, 16), which are scaled, noised and drawn again: uint8 (B, 64, 64, 3)."""
    cond = adapter.condition(backend, prompts, backend.encode(prompts))
    uncond = adapter.unconditional(backend, prompts, cond, SAMPLING)
    assert uncond is not None
    torch.manual_seed(seed)
    x = redrawn(backend.pipe, latents, cond.embeds, uncond.embeds, strength)
    return as_bytes(backend.pipe.vae.decode(x / backend.pipe.vae.config.scaling_factor).sample)


def followed(count: int, number: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """A round, batch by batch: pictures as in `rounds`, and their captions. Half of the prompts are of two objects."""
    images, scenes = data.load("train")
    rng = np.random.default_rng((9, number))
    chosen = [rng.choice(kind, count, replace=False) for kind in data.clean_kinds(scenes)]
    rows = rng.permutation(np.concatenate(chosen))
    wording = {world.caption(rng, scenes[row])[0]: row for row in rows}  # each once
    prompts = list(wording)[:count]
    backend, reward = load_backend(pipeline().to(DEVICE)), preference()
    vae = backend.pipe.vae
    for start in range(0, count, BATCH):
        batch = prompts[start : start + BATCH]
        art = pixels(images[[wording[prompt] for prompt in batch]])
        with torch.no_grad():
            latents = vae.encode(art).latent_dist.mode() * vae.config.scaling_factor
            copied = as_bytes(vae.decode(latents / vae.config.scaling_factor).sample)
        adapters = [Adapter(), *fits(backend, reward, batch, number)]
        for noise in range(NOISES):
            strength = float(rng.choice(STRENGTHS))
            made = [drawn(backend, adapter, batch, latents, strength, noise) for adapter in adapters]
            yield np.stack([copied, *made], axis=1), batch


def build(count: int = COUNT) -> None:
    """One more round, kept."""
    number = len(rounds())
    blocks, told = zip(*followed(count, number), strict=True)
    path = data.FOLDER / f"followed-{number}.npy"
    np.save(path, np.concatenate(blocks))
    path.with_suffix(".json").write_text(json.dumps([caption for batch in told for caption in batch]))


def distance(pictures: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Mean absolute difference of bytes (B,) and of their edges."""
    gap = pictures.astype(np.float32) - others
    edges = (abs(np.diff(gap, axis=axis)).mean((1, 2, 3)) for axis in (1, 2))
    found: np.ndarray = abs(gap).mean((1, 2, 3)) + sum(edges)
    return found


def main() -> None:
    """How far from the artwork a fit leads, on prompts that no round had."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--number", type=int, default=1_000, help="of the round, which is its seed")
    options = parser.parse_args()
    pictures = np.concatenate([block for block, _ in followed(options.count, options.number)])
    for place, name in enumerate(("raw", *(f"{steps} steps" for steps in AT)), 1):
        print(f"{name}: {distance(pictures[:, place], pictures[:, 0]).mean():.1f}")


if __name__ == "__main__":
    main()
