"""The bundled CLIP: contrastive on drawn scenes, then hardened against pictures made to fool it."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from tools.emoji import data, parts, tokenizer, world
from tools.emoji.loop import DEVICE, Figures, Schedule, digest, exists, save, train, trained, weights
from tools.emoji.networks import attacked, embed_images, pixels, read_texts, shifted

SCHEDULES = {
    "clip": Schedule(steps=1_600, batch=128, lr=1e-3, warmup=60, weight_decay=0.05),
    "harden": Schedule(steps=500, batch=96, lr=4e-4, warmup=30, weight_decay=0.05),
}
QUALITY = 15  # weight of the squared error of a picture's quality, which is small: it lies in [0, 1]
RADIUS = 2.0  # of the largest disturbance, L2 over a picture in [-1, 1]: 0.018 a value


class Probe(nn.Module):
    """CLIP while it trains: linear heads read the scene's content and quality off the image embedding, and the content
    off the text's last states, and are thrown away.

    Without the second, nothing makes the states that the denoiser attends to say which object stands where.
    """

    SIZES = (3, len(world.NAMES), len(world.NAMES) + 1, len(world.COLOURS), len(world.STYLES), 6)

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.clip = model
        self.heads = nn.Linear(parts.TEXT_WIDTH, sum(self.SIZES))
        self.quality = nn.Linear(parts.TEXT_WIDTH, 1)
        self.said = nn.Linear(parts.TEXT_WIDTH, sum(self.SIZES))

    def loss(self, embeds: Tensor, facts: Tensor, quality: Tensor) -> tuple[Tensor, Figures]:
        """Cross-entropy of every fact, squared error of the quality; and how well both are read."""
        logits = self.heads(embeds).split(self.SIZES, dim=-1)
        targets = facts.clone()
        targets[:, 2] += 1  # no second object is a class of its own
        value = sum(F.cross_entropy(a, b) for a, b in zip(logits, targets.T, strict=True))
        error = F.mse_loss(self.quality(embeds)[:, 0], quality)
        right = (logits[1].argmax(-1) == targets[:, 1]).float().mean()
        return value + QUALITY * error, {"object": right, "quality": error}

    def text_loss(self, states: Tensor, claims: Tensor) -> tuple[Tensor, Figures]:
        """Cross-entropy of every fact that a text claims; `states` (T, 2, W), `claims` (T, 6)."""
        logits = self.said(states).split(self.SIZES, dim=-1)
        targets = claims.clone()
        targets[:, 2] += 1
        targets[targets[:, 5] == world.ANY_DAMAGE, 5] = world.UNSAID
        value = sum(
            F.cross_entropy(
                a.flatten(0, 1), b.repeat_interleave(2), ignore_index=world.UNSAID, reduction="sum"
            )
            for a, b in zip(logits, targets.T, strict=True)
        )
        both = torch.stack([logits[i][:, 0].argmax(-1) == targets[:, i] for i in (1, 2)]).all(0)
        return value / (2 * len(claims)), {"read": both.float().mean()}


def contrast(image: Tensor, text: Tensor, scale: Tensor, other: Tensor) -> Tensor:
    """CLIP's symmetric loss for T texts and the first T of the images, which are theirs; further images have no text.

    `other` (T, images): which pairs may be told apart. A caption that happens to be true of another picture may not.
    """
    count = len(text)
    logits = (scale.exp() * text @ image.T).masked_fill(~other, -1e4)
    target = torch.arange(count, device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :count].T, target)) / 2


class Batch(NamedTuple):
    """T captions with their pictures, and P spoilt twins of the first P pictures."""

    pictures: Tensor  # (T + P, 3, 64, 64) in [-1, 1]
    texts: tuple[str, ...]
    other: Tensor  # (T, T + P) bool, for `contrast`
    facts: Tensor  # (T + P, 6)
    claims: Tensor  # (T, 6)
    quality: Tensor  # (T + P,)


def batches() -> Callable[[np.random.Generator, int], Batch]:
    """Draws batches: captions made anew each time, a quarter of the pictures are spoilt twins, many show two objects.

    The twins are negatives of their captions: of two pictures that show what a text says, the clear one matches it
    better.
    """
    (images, scenes), (spoilt, twins) = data.load("train"), data.load("twins")
    decoded = np.load(data.DECODED, mmap_mode="r")
    facts, twin_facts = (np.array([world.facts(scene) for scene in each]) for each in (scenes, twins))
    quality, twin_quality = (np.array([s.quality for s in each], np.float32) for each in (scenes, twins))
    clean, double = data.clean_rows(scenes), np.flatnonzero(facts[:, 2] >= 0)

    def draw(rng: np.random.Generator, batch: int) -> Batch:
        pairs = batch // 4
        chosen = rng.integers(len(twins), size=pairs)
        fresh = rng.integers(len(images), size=batch // 4), rng.choice(double, batch - 2 * pairs - batch // 4)
        rows = np.concatenate([clean[chosen], *fresh])
        texts, said = zip(*(world.caption(rng, scenes[i]) for i in rows), strict=True)
        known = np.concatenate([facts[rows], twin_facts[chosen]])
        claims = np.array(said)
        other = world.contradicts(claims, known)
        other[np.arange(pairs), len(rows) + np.arange(pairs)] = True
        other[np.arange(len(rows)), np.arange(len(rows))] = True
        x = pixels(np.concatenate([data.pictures(rng, images, decoded, rows), spoilt[chosen]]))
        clear = np.concatenate([quality[rows], twin_quality[chosen]])
        told = [torch.from_numpy(each).to(DEVICE) for each in (other, known, claims, clear)]
        return Batch(shifted(rng, x), texts, *told)

    return draw


def _loss(probe: Probe, batch: Batch, image: Tensor, text: Tensor) -> tuple[Tensor, Figures]:
    match = contrast(image, text, probe.clip.logit_scale, batch.other)
    told, figures = probe.loss(image * 14, batch.facts, batch.quality)
    pairs = len(image) - len(text)
    better = ((image[:pairs] - image[len(text) :]) * text[:pairs]).sum(-1) > 0
    figures |= {"match": match, "clean_above_twin": better.float().mean()}
    return match + 0.3 * told, figures


def _probe() -> Probe:
    tokens = tokenizer.load()
    return Probe(parts.clip(len(tokens), tokens.bos_token_id, tokens.eos_token_id))


def _restored(draw: Callable[[np.random.Generator, int], Batch], steps: int = 200) -> Probe:
    """The package's CLIP, whose heads were thrown away: they learn anew first, from its frozen embeddings.

    It is kept as "clip-probe", which stays as it is when "clip" is hardened.
    """
    probe = _probe().to(DEVICE)
    probe.load_state_dict(weights("clip-probe"), strict=False)
    heads = [*probe.heads.parameters(), *probe.quality.parameters()]
    optimizer = torch.optim.Adam(heads, lr=1e-2)
    for step in range(steps):
        batch = draw(np.random.default_rng((77, step)), 192)
        with torch.no_grad():
            image = embed_images(probe.clip, batch.pictures)
        optimizer.zero_grad()
        probe.loss(image * 14, batch.facts, batch.quality)[0].backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        optimizer.step()
    return probe


def train_clip() -> None:
    """Contrastive, helped by what is known of each scene."""
    tokens, draw, probe = tokenizer.load(), batches(), _probe()

    def loss(rng: np.random.Generator, batch: int) -> tuple[Tensor, Figures]:
        drawn = draw(rng, batch)
        text, states = read_texts(probe.clip, tokens, drawn.texts)
        value, figures = _loss(probe, drawn, embed_images(probe.clip, drawn.pictures), text)
        said, read = probe.text_loss(states, drawn.claims)
        return value + 0.3 * said, figures | read

    vae = digest(weights("vae"))  # whose pictures it sees
    if train("clip-probe", probe, loss, SCHEDULES["clip"], learns_from=vae) or not exists("clip"):
        save("clip", probe.clip)  # or what `harden` made of it stays


def harden() -> None:
    """Adversarial training of the image tower (Madry et al., arXiv 1706.06083).

    Before each step the pictures are disturbed so as to raise the loss. A reward that can be raised without changing
    what a picture shows is of no use to follow; and the gradient of one that cannot points to what people see. The text
    tower stays as the denoiser knows it.
    """
    tokens, draw = tokenizer.load(), batches()
    whole = "heads.weight" in weights("clip-probe")
    probe = trained("clip-probe", _probe()) if whole else _restored(draw)
    probe.requires_grad_(True)
    probe.clip.text_model.requires_grad_(False)
    probe.clip.text_projection.requires_grad_(False)

    def loss(rng: np.random.Generator, batch: int) -> tuple[Tensor, Figures]:
        drawn = draw(rng, batch)
        text, _ = read_texts(probe.clip, tokens, drawn.texts)

        def harm(pictures: Tensor) -> Tensor:
            return _loss(probe, drawn, embed_images(probe.clip, pictures), text)[0]

        fooling = attacked(rng, drawn.pictures, harm, RADIUS)
        return _loss(probe, drawn, embed_images(probe.clip, fooling), text)

    train("clip-hard", probe, loss, SCHEDULES["harden"], origin=probe.clip)
    save("clip", probe.clip)
