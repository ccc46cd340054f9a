"""The bundled rewards and the judge: trained on drawn scenes, the rewards also on what the denoiser makes of them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ipgo.rewards.emoji.judge import Network
from tools.emoji import data, follow, parts, redraw, sprites, world
from tools.emoji.clip import RADIUS
from tools.emoji.loop import (
    DEVICE,
    Figures,
    Loss,
    Schedule,
    digest,
    done,
    mixed,
    newest,
    train,
    trained,
    weights,
)
from tools.emoji.networks import attacked, embed_images, embed_texts, graded, load_clip, pixels, shifted

CLEARLY = 0.1  # of two pictures one is clearly better that is so much more like the artwork
# Given a number: so many pairs of pictures (B, 2, 64, 64, 3), the better first, their captions, the weights (B,).
Made = Callable[[np.random.Generator, int], tuple[np.ndarray, list[str], np.ndarray]]

SCHEDULES = {
    "judge": Schedule(steps=2_500, batch=64, lr=2e-3, warmup=50),
    "aesthetic": Schedule(steps=700, batch=64, lr=5e-4, warmup=30, weight_decay=0.05),
    "preference": Schedule(steps=800, batch=64, lr=2e-4, warmup=30, weight_decay=0.05),
    "resist": Schedule(steps=400, batch=64, lr=1e-4, warmup=30, weight_decay=0.05),
}

# ------------------------------------------------------------------------------------------------------ judge

JUDGE_SIZES = (3, len(world.NAMES), len(world.NAMES) + 1, len(world.COLOURS), len(world.STYLES), 1)


def train_judge() -> None:
    """Facts and quality from pictures, half of them of two objects; a third through the VAE, as the generator's are.

    Another seed, order and architecture than CLIP's, and no network but the frozen VAE touches it. The pictures are
    disturbed against the judge itself, so that what an optimiser adds unseen does not mislead it.
    """
    images, scenes = data.load("train")
    decoded = np.load(data.DECODED, mmap_mode="r")
    known = np.array([world.facts(scene) for scene in scenes])
    quality = np.array([scene.quality for scene in scenes], np.float32)
    single, pairs = (np.flatnonzero((known[:, 2] >= 0) == both) for both in (False, True))
    judge = Network(JUDGE_SIZES)

    def loss(rng: np.random.Generator, batch: int) -> tuple[Tensor, Figures]:
        half = batch // 2
        rows = np.sort(np.concatenate([rng.choice(single, batch - half), rng.choice(pairs, half)]))
        x = shifted(rng, pixels(data.pictures(rng, images, decoded, rows)))
        facts, clear = (torch.from_numpy(each[rows]).to(DEVICE) for each in (known, quality))
        facts[:, 2] += 1

        def error(pictures: Tensor) -> tuple[Tensor, Figures]:
            with mixed():
                *logits, clean = judge(pictures)
            value = sum(F.cross_entropy(a.float(), facts[:, i]) for i, a in enumerate(logits))
            clean_error = F.mse_loss(clean.float()[:, 0], clear)
            right = torch.stack([logits[i].argmax(-1) == facts[:, i] for i in (1, 2)]).all(0).float().mean()
            return value + 4 * clean_error, {"objects": right, "quality": clean_error}

        return error(attacked(rng, x, lambda pictures: error(pictures)[0], RADIUS, steps=1))

    train("judge", judge, loss, SCHEDULES["judge"], seed=77, learns_from=digest(weights("vae")))


# -------------------------------------------------------------------------------------------------- aesthetic


def train_aesthetic() -> None:
    """How good a picture is whatever it shows, 0 to 1, by a tower of its own that starts as CLIP's.

    Of drawn scenes it learns how clean they are; of the denoiser's pictures, that the artwork is better (`redraw`): a
    grade of cleanness alone is nearly full for all of them, and did not mind what became of the object.
    """
    source, _ = load_clip()
    model = parts.aesthetic()
    model.vision_model.load_state_dict(source.vision_model.state_dict())
    train("aesthetic", model, _grading(model, _redrawn()), SCHEDULES["aesthetic"], origin=source.vision_model)


def _grading(model: CLIPVisionModelWithProjection, made: Made) -> Loss:
    """Half of the pictures are drawn, half of those spoilt, and many have gone through the VAE; half are `made` pairs.

    A quarter of the drawn ones are disturbed to fool it, less than in `clip.harden`: against all of that, noise and
    JPEG could not be told from a disturbance, and were not graded.
    """
    images, scenes = data.load("train")
    decoded = np.load(data.DECODED, mmap_mode="r")
    quality = np.array([scene.quality for scene in scenes], np.float32)
    clean, spoilt = (np.flatnonzero((quality == 1) == wanted) for wanted in (True, False))

    def loss(rng: np.random.Generator, batch: int) -> tuple[Tensor, Figures]:
        half, quarter = batch // 2, batch // 4
        rows = rng.permutation(np.concatenate([rng.choice(clean, batch - half), rng.choice(spoilt, half)]))
        pairs, _, weights = made(rng, half)
        drawn = data.pictures(rng, images, decoded, rows)
        x = shifted(rng, pixels(np.concatenate([drawn, pairs[:, 0], pairs[:, 1]])))
        wanted, weight = (torch.from_numpy(each).to(DEVICE) for each in (quality[rows], weights))

        def harm(pictures: Tensor) -> Tensor:
            found = graded(model, pictures)
            alone = F.binary_cross_entropy_with_logits(found[:quarter], wanted[:quarter])
            return alone + _beaten(found[quarter:], weight)

        fooled = torch.cat([x[:quarter], x[batch:]])
        fooling = attacked(rng, fooled, harm, RADIUS / 4, steps=1)
        found = graded(model, torch.cat([fooling[:quarter], x[quarter:batch], fooling[quarter:]]))
        error = (found[:batch].sigmoid() - wanted).square()
        figures = {
            "fooled": error[:quarter].mean().sqrt(),
            "error": error[quarter:].mean().sqrt(),
            "made": ((found[batch:-half] > found[-half:]) * weight).sum() / weight.sum(),
        }
        return F.binary_cross_entropy_with_logits(found[:batch], wanted) + _beaten(
            found[batch:], weight
        ), figures

    return loss


def _beaten(logits: Tensor, weight: Tensor) -> Tensor:
    """The loss of pairs, the better pictures (B,) first, then the others."""
    better, other = logits.chunk(2)
    return (weight * F.softplus(other - better)).mean()


# ------------------------------------------------------------------------------------------------- preference

PAIR_BLOCK = 1_000


def _draw_pairs(block: int) -> tuple[list[str], np.ndarray]:
    """Captions with a preferred and another picture, uint8 (N, 2, 64, 64, 3): cleaner, or better aligned, or both."""
    rng = np.random.default_rng(5_000_000 + block)
    art, texts, drawn = sprites.load(), [], []
    while len(texts) < PAIR_BLOCK:
        scene = world.sample_scene(rng, clean=True)
        text, claims = world.caption(rng, scene)
        other = _worse(rng, scene, claims)
        texts.append(text)
        drawn.append(np.stack([world.draw(rng, scene, art), world.draw(rng, other, art)]))
    return texts, np.stack(drawn)


def _worse(rng: np.random.Generator, scene: world.Scene, claims: tuple[int, ...]) -> world.Scene:
    """The scene spoilt: degraded in nearly half of the cases, else with one claimed fact made false."""
    if rng.random() < 0.45:
        return world.spoilt(rng, scene)
    changes = ["object"]
    changes += ["colour"] * (claims[3] != world.UNSAID) + ["style"] * (claims[4] != world.UNSAID)
    changes += ["swap"] * (len(scene.objects) == 2)
    return altered(rng, scene, str(rng.choice(changes)))


def altered(rng: np.random.Generator, scene: world.Scene, change: str) -> world.Scene:
    """The scene with another "object", "colour" or "style", or with its two objects changed about ("swap")."""
    if change == "object":
        place = int(rng.integers(len(scene.objects)))
        fresh = str(rng.choice([name for name in world.NAMES if name not in scene.objects]))
        return replace(scene, objects=tuple(fresh if i == place else o for i, o in enumerate(scene.objects)))
    if change == "colour":
        return replace(scene, colour=str(rng.choice([c for c in world.COLOURS if c != scene.colour])))
    if change == "style":
        return replace(scene, style="flat" if scene.style == "3d" else "3d")
    return replace(scene, objects=scene.objects[::-1])


def train_preference(blocks: int = 24) -> None:
    """CLIP tuned so that the preferred of two pictures with one caption has the larger cosine (as HPSv2).

    Its image tower alone. Half of the pairs are drawn; of the others one is artwork through the VAE, and preferred to
    what the denoiser made of it. All are disturbed to fool it, as `clip.harden` does, those of the denoiser less: the
    details that they lack are smaller than such a disturbance.
    """
    model, tokens = load_clip()
    if done("preference", digest(model.state_dict())):
        return  # before so many pairs are drawn
    loss = _preferring(model, tokens, blocks, _redrawn())
    train("preference", model, loss, SCHEDULES["preference"], origin=model)


def resist(names: Sequence[str] = follow.REWARDS, blocks: int = 12) -> None:
    """Train rewards further, on what IPGO makes of prompts when it follows them (see `follow`).

    "NAME-N" is a reward after N files of what fits have made of it, and continues from the newest before (`newest`).
    """
    number = len(follow.paths())
    wanted = {name: newest(name) for name in names if newest(name) != f"{name}-{number}"}
    if not wanted:
        return
    made = _either(_followed(), _redrawn())
    for name, before in wanted.items():
        if name == "aesthetic":
            model: nn.Module = trained(before, parts.aesthetic())
            loss = _grading(model.requires_grad_(True), made)
        else:
            model, tokens = load_clip(before)
            loss = _preferring(model, tokens, blocks, made)
        train(f"{name}-{number}", model, loss, SCHEDULES["resist"], origin=model)


def _redrawn() -> Made:
    """The artwork through the VAE, and what the denoiser made of it."""
    pictures, told = redraw.load()

    def made(rng: np.random.Generator, count: int) -> tuple[np.ndarray, list[str], np.ndarray]:
        rows = rng.integers(len(told), size=count)
        return pictures[rows], [told[i] for i in rows], np.ones(count, np.float32)

    return made


def _followed() -> Made:
    """Any two pictures of a caption: that one is better which looks more like the artwork, by as much as it does.

    So a fit that mends the raw prompt's picture is rewarded, and one that spoils it is not.
    """
    known = follow.load()

    def made(rng: np.random.Generator, count: int) -> tuple[np.ndarray, list[str], np.ndarray]:
        row = rng.integers(len(known.captions), size=count)[:, None]
        two = rng.permuted(np.tile(np.arange(known.likeness.shape[1]), (count, 1)), axis=1)[:, :2]
        two = np.take_along_axis(two, np.argsort(-known.likeness[row, two], axis=1), axis=1)
        better, other = known.likeness[row, two].T
        weights = np.minimum(1, (better - other) / CLEARLY).astype(np.float32)
        return known.pictures[row, two], [known.captions[i] for i in row[:, 0]], weights

    return made


def _either(one: Made, other: Made) -> Made:
    """Half of the pairs of each kind."""

    def made(rng: np.random.Generator, count: int) -> tuple[np.ndarray, list[str], np.ndarray]:
        (a, texts, weights), (b, more, others) = one(rng, count - count // 2), other(rng, count // 2)
        return np.concatenate([a, b]), texts + more, np.concatenate([weights, others])

    return made


def _preferring(model: CLIPModel, tokens: CLIPTokenizer, blocks: int, made: Made) -> Loss:
    """The loss of pairs, half of them drawn, half `made` by the denoiser."""
    with ProcessPoolExecutor() as pool:
        drawn = list(pool.map(_draw_pairs, range(blocks)))
    texts = [text for block, _ in drawn for text in block]
    images = np.concatenate([pictures for _, pictures in drawn])
    model.vision_model.requires_grad_(True)
    model.visual_projection.requires_grad_(True)

    def loss(rng: np.random.Generator, batch: int) -> tuple[Tensor, Figures]:
        half = batch // 2
        rows = rng.integers(len(texts), size=half)
        others, retold, weights = made(rng, batch - half)
        pairs = np.concatenate([images[rows], others])
        weight = torch.from_numpy(np.concatenate([np.ones(half, np.float32), weights])).to(DEVICE)
        both = shifted(rng, pixels(np.concatenate([pairs[:, 0], pairs[:, 1]])))
        text = embed_texts(model, tokens, [texts[i] for i in rows] + retold)

        def judged(pictures: Tensor) -> tuple[Tensor, Tensor]:
            image = embed_images(model, pictures)
            margin = ((image[:batch] - image[batch:]) * text).sum(-1)
            logits = image[:batch] @ text.T * 15  # keeps the captions apart while it learns the pairs
            apart = F.cross_entropy(logits, torch.arange(batch, device=DEVICE))
            return (weight * F.softplus(-15 * margin)).mean() + 0.3 * apart, margin

        radius = np.tile(np.where(np.arange(batch) < half, RADIUS, RADIUS / 4), 2)
        fooling = attacked(rng, both, lambda pictures: judged(pictures)[0], radius, steps=1)
        value, margin = judged(fooling)
        right = (margin > 0).float() * weight
        return value, {"pairs": right[:half].mean(), "made": right[half:].sum() / weight[half:].sum()}

    return loss
