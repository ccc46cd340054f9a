"""What IPGO makes of training captions when it follows a bundled reward, for the rewards to learn from.

    python -m tools.emoji.train follow && python -m tools.emoji.train resist

is a round: prompts are fitted against each reward as it is, and `resist` trains them further on what came of it; the
next round fits against that. The artwork, laid upon a picture, says how good it is (`Artwork.likeness`).
"""

import argparse
import copy
import functools
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ipgo import IPGO, Adapter, Backend, Reward, Sampling, Task, as_reward, load_backend
from ipgo.backends.world import GUIDANCE
from ipgo.rewards.emoji.artwork import Artwork
from ipgo.rewards.emoji.claims import Claims
from tools.emoji import arguments, data, parts, sprites, world
from tools.emoji.loop import DEVICE, HALF, mixed, newest, trained
from tools.emoji.networks import as_bytes, embed_images, embed_texts, graded, load_clip, pipeline, pixels
from tools.emoji.redraw import redrawn
from tools.emoji.sprites import replacing

REWARDS = ("preference", "aesthetic")  # that can be followed too far
COUNT = 96 if DEVICE.type == "cpu" else 512  # prompts of a round, for each of them
BATCH = 16 if DEVICE.type == "cpu" else 128
NOISES = 4  # for each prompt
STRENGTHS = (0.5, 0.7, 0.9)  # share of the noise that the artwork's latents get
# Steps that pictures are drawn from: half as far as the default preset goes, as far, and half further.
AT = (8, 16, 24)
SAMPLING = Sampling(8, GUIDANCE)
ASCENT = replace(IPGO().ascent, steps=AT[-1], lr=1e-2, lr_basis=2e-3)


@dataclass(frozen=True)
class Round:
    """What came of some captions: pictures, uint8 (N, 5, 64, 64, 3), and their likeness, (N, 5).

    Of the artwork through the VAE, of the raw prompt, and of the steps `AT`.
    """

    captions: list[str]
    pictures: np.ndarray
    likeness: np.ndarray


def paths(name: str = "*") -> list[Path]:
    """The files of all rounds against a reward, or against any."""
    return sorted(data.FOLDER.glob(f"followed-{name}-*.npz"))


def path(name: str, number: int) -> Path:
    """The file of one round against a reward."""
    return data.FOLDER / f"followed-{name}-{number}.npz"


def load(name: str = "*") -> Round:
    """All rounds against a reward, or against any, as one."""
    found = [np.load(path) for path in paths(name)]
    captions, pictures, likeness = (
        np.concatenate([each[key] for each in found]) for key in ("captions", "pictures", "likeness")
    )
    return Round(captions.tolist(), pictures, likeness)


def reward_of(name: str) -> Reward:
    """One of `REWARDS` as it is trained so far."""
    if name == "aesthetic":
        tower = trained(newest(name), parts.aesthetic())
        return as_reward(lambda images, prompts: graded(tower, 2 * images - 1).sigmoid())
    model, tokens = load_clip(newest(name))

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
    with mixed():
        return as_bytes(backend.pipe.vae.decode(x / backend.pipe.vae.config.scaling_factor).sample.float())


def followed(name: str, count: int, number: int, without: Collection[str] = ()) -> Round:
    """A round against a reward as it is, on other captions than those. Half of the prompts are of two objects."""
    images, scenes = data.load("train")
    rng = np.random.default_rng((9, number, REWARDS.index(name)))
    chosen = [rng.choice(kind, count, replace=False) for kind in data.clean_kinds(scenes)]
    rows = rng.permutation(np.concatenate(chosen))
    wording: dict[str, tuple[int, Claims]] = {}  # each once
    for row in rows:
        caption, said = world.caption(rng, scenes[row])
        wording[caption] = int(row), claimed(scenes[row], said)
    prompts = [caption for caption in wording if caption not in without][:count]
    # The sampler's arithmetic in bfloat16 where that is fast.
    backend = load_backend(pipeline().to(DEVICE), dtype=torch.bfloat16 if HALF else "auto")
    reward = reward_of(name)
    vae = backend.pipe.vae
    captions, blocks = [], []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        art = pixels(images[[wording[prompt][0] for prompt in batch]])
        with torch.no_grad(), mixed():
            latents = vae.encode(art).latent_dist.mode().float() * vae.config.scaling_factor
            copied = as_bytes(vae.decode(latents / vae.config.scaling_factor).sample.float())
        adapters = [Adapter(), *fits(backend, reward, batch, number)]
        for noise in range(NOISES):
            strength = float(rng.choice(STRENGTHS))
            made = [drawn(backend, adapter, batch, latents, strength, noise) for adapter in adapters]
            captions += batch
            blocks.append(np.stack([copied, *made], axis=1))
    pictures = np.concatenate(blocks)
    shown = [wording[caption][1] for caption in captions]
    return Round(
        captions, pictures, np.stack([likeness(*each) for each in zip(pictures, shown, strict=True)])
    )


def claimed(scene: world.Scene, said: tuple[int, ...]) -> Claims:
    """What a caption says of its scene, given its `world.caption` claims: a style left open may be either."""
    colour, style = (
        None if fact == world.UNSAID else shown
        for fact, shown in zip(said[3:5], (scene.colour, scene.style), strict=True)
    )
    return Claims(scene.objects, scene.relation, colour, style)


def likeness(pictures: np.ndarray, claims: Claims) -> np.ndarray:
    """Of bytes (N, 64, 64, 3) that should show what is claimed: (N,)."""
    with torch.no_grad():
        found = [artwork().likeness(each, claims).item() for each in pixels(pictures).add(1).div(2)]
    return np.array(found, np.float32)


@functools.cache
def artwork() -> Artwork:
    """The sprites, to be laid upon pictures."""
    return Artwork(sprites.sheet(), tuple(world.OBJECTS), tuple(world.STYLES))


def build(count: int = COUNT, names: Sequence[str] = REWARDS) -> None:
    """One more round against each of these rewards, kept."""
    for name in names:
        number = len(paths(name))
        found = followed(name, count, number)
        with replacing(path(name, number)) as unfinished:
            np.savez(unfinished, **asdict(found))


def main() -> None:
    """How like the artwork pictures are after a fit, on prompts that no round had."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--reward", choices=REWARDS, default=REWARDS[0])
    parser.add_argument("--count", type=arguments.count, default=16)
    parser.add_argument("--number", type=int, default=1_000, help="of the round, which is its seed")
    options = parser.parse_args()
    if options.number < len(paths(options.reward)):
        parser.error(
            f"--number {options.number}: must be at least {len(paths(options.reward))}, the rounds kept"
        )
    seen = set(load().captions) if paths() else set()
    found = followed(options.reward, options.count, options.number, seen).likeness
    for place, name in enumerate(("artwork", "raw", *(f"{steps} steps" for steps in AT))):
        print(f"{name}: {found[:, place].mean():.3f}")


if __name__ == "__main__":
    main()
