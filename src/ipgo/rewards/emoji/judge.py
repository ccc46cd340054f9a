"""The judge: a small convolutional network that says what a picture shows, and the artwork that it should look like.

The network is held out: no reward and no generator was trained with it, so it can tell an image that got better from
one that merely fools the reward. The artwork was learned from nothing and cannot be fooled.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ipgo.images import center_crop, resize
from ipgo.rewards.checkpoints import identity
from ipgo.rewards.emoji.artwork import Artwork

FOLDER = Path(__file__).parent
SIZE = 64


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inward: int, outward: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inward), nn.GroupNorm(8, outward)
        self.conv1 = nn.Conv2d(inward, outward, 3, stride, 1)
        self.conv2 = nn.Conv2d(outward, outward, 3, 1, 1)
        self.shortcut = nn.Conv2d(inward, outward, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(torch.relu(self.norm1(x)))
        hidden = self.conv2(torch.relu(self.norm2(hidden)))
        out: Tensor = self.shortcut(x) + hidden
        return out


class Network(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] to logits of layout, first and second object, colour, style, and quality in [0, 1]."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 5, 2, 2),
            Block(32, 32, 1),
            Block(32, 64, 2),
            Block(64, 128, 2),
            Block(128, 128, 1),
        )  # (B, 128, 8, 8)
        self.places = nn.AdaptiveAvgPool2d(4)  # where things are matters: a fox left of a pear
        self.hidden = nn.Linear(128 * 16, 256)
        self.heads = nn.Linear(256, sum(sizes))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        features = self.places(torch.relu(self.body(pixels))).flatten(1)
        return self.heads(torch.relu(self.hidden(features))).split(self.sizes, dim=-1)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Claims:
    """What a prompt says; None or empty where it is silent."""

    objects: tuple[str, ...]
    relation: str | None
    colour: str | None
    style: str | None


class Judge:
    """Names what pictures show and compares it with what prompts claim."""

    name = "emoji-judge"
    differentiable = False  # on purpose: nothing may be optimised against it
    identity: dict[str, Any] | None = None  # what `load_judge` loaded

    def __init__(self, network: Network, labels: Mapping[str, Any], artwork: Artwork) -> None:
        self.network = network.eval().requires_grad_(False)
        self.artwork = artwork
        self.objects: list[str] = list(labels["objects"])
        self.colours: list[str] = list(labels["colours"])
        self.styles: list[str] = list(labels["styles"])
        self._nouns = {word: name for name, words in labels["objects"].items() for word in (name, *words)}
        self._styles = {word: name for name, words in labels["styles"].items() for word in (name, *words)}
        self._relations = {word: name for name, words in labels["relations"].items() for word in words}

    def read(self, prompt: str) -> Claims:
        """Find the objects, their relation, the background colour and the style that a prompt names."""
        text = prompt.lower()
        objects = tuple(self._nouns[word] for word in _mentions(text, self._nouns))[:2]
        relations = [self._relations[word] for word in _mentions(text, self._relations)]
        colours = re.findall(rf"\b({'|'.join(self.colours)})\s+background\b", text)
        styles = [self._styles[word] for word in _mentions(text, self._styles)]
        return Claims(
            objects=objects,
            relation=relations[0] if relations and len(objects) == 2 else None,
            colour=colours[0] if colours else None,
            style=styles[0] if styles else None,
        )

    @torch.no_grad()
    def verdict(self, images: Tensor) -> list[Claims]:
        """What each picture (B, 3, H, W in [0, 1]) shows, in the terms of a prompt's claims."""
        device = next(self.network.parameters()).device
        logits = self.network(_prepared(images.to(device)) * 2 - 1)
        layout, first, second, colour, style = (part.argmax(-1).tolist() for part in logits[:5])
        found = []
        for row in range(len(images)):
            pair = layout[row] != 0 and second[row] != 0
            names = (self.objects[first[row]], *([self.objects[second[row] - 1]] if pair else []))
            relation = {1: "left", 2: "above"}[layout[row]] if pair else None
            found.append(Claims(names, relation, self.colours[colour[row]], self.styles[style[row]]))
        return found

    def accuracy(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """For object, colour, style and relation: (B,) of 1 right, 0 wrong, NaN where the prompt does not say."""
        rows = [_compare(self.read(p), seen) for p, seen in zip(prompts, self.verdict(images), strict=True)]
        return {
            key: torch.tensor([row[key] for row in rows]) for key in ("object", "colour", "style", "relation")
        }

    def likeness(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """How much each picture looks like the artwork of what its prompt names, (B,) in [0, 1]: `Artwork.likeness`.

        NaN for a prompt that names no object, or two without their places.
        """
        claims = [self.read(prompt) for prompt in prompts]
        return torch.tensor(
            [
                self.artwork.likeness(image, each.objects, each.relation, each.style)
                if each.objects and (len(each.objects) == 1) == (each.relation is None)
                else float("nan")
                for image, each in zip(_prepared(images), claims, strict=True)
            ]
        )

    def marks(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`accuracy`, and "likeness"."""
        return {**self.accuracy(images, prompts), "likeness": self.likeness(images, prompts)}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The share of a prompt's claims that the picture bears out, in [0, 1]; 0 for a prompt that claims nothing."""
        marks = torch.stack(list(self.accuracy(images, prompts).values()))
        return marks.nanmean(dim=0).nan_to_num(0.0)


def _prepared(images: Tensor) -> Tensor:
    """In the judge's size."""
    return center_crop(resize(images.float(), SIZE), SIZE)


def _mentions(text: str, words: Mapping[str, str]) -> list[str]:
    """The known words in the order of the text, the longest first where several fit."""
    longest = sorted(words, key=len, reverse=True)
    return re.findall(rf"\b({'|'.join(map(re.escape, longest))})\b", text)


def _compare(claimed: Claims, seen: Claims) -> dict[str, float]:
    def mark(said: object, right: bool) -> float:
        return float(right) if said else float("nan")

    inverse = {"left": "right", "right": "left", "above": "below", "below": "above"}
    straight = seen.objects == claimed.objects and seen.relation == claimed.relation
    turned = seen.objects == claimed.objects[::-1] and inverse.get(seen.relation or "") == claimed.relation
    return {
        "object": mark(claimed.objects, sorted(seen.objects) == sorted(claimed.objects)),
        "colour": mark(claimed.colour, seen.colour == claimed.colour),
        "style": mark(claimed.style, seen.style == claimed.style),
        "relation": mark(claimed.relation, straight or turned),
    }


def load_judge(device: str | torch.device = "cpu") -> Judge:
    """The judge with its weights and the words it understands."""
    labels = json.loads((FOLDER / "judge.json").read_text())
    network = Network(labels["sizes"])
    network.load_state_dict(
        {key: value.float() for key, value in load_file(FOLDER / "judge.safetensors").items()}
    )
    artwork = Artwork(FOLDER / "artwork.png", list(labels["objects"]), list(labels["styles"]))
    judge = Judge(network.to(device), labels, artwork)
    judge.identity = identity(
        judge.name, [FOLDER / "judge.safetensors", FOLDER / "artwork.png"], "shorter side bicubic, [-1, 1]"
    )
    return judge
