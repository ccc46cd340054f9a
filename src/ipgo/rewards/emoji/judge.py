"""The judge: a small convolutional network that says what a picture shows, and the artwork that it should look like.

The network is held out: no reward and no generator was trained with it, so it can tell an image that got better from
one that merely fools the reward. The artwork was learned from nothing; rewards that were trained
further on its labels (`tools.emoji.follow`; none of the package's) are not independent of it.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ipgo.rewards.checkpoints import identity
from ipgo.rewards.emoji.artwork import Artwork, in_size, load_artwork
from ipgo.rewards.emoji.claims import Claims, Reader, load_labels

FOLDER = Path(__file__).parent
SEEN = ("object", "colour", "style", "relation")  # what the network's verdicts are of


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


class Judge:
    """Names what pictures show and compares it with what prompts claim."""

    name = "emoji-judge"
    differentiable = False  # on purpose: nothing may be optimised against it
    identity: dict[str, Any] | None = None  # what `load_judge` loaded
    made: ClassVar[Mapping[str, Sequence[str]]] = {"emoji-judge": SEEN, "emoji-likeness": ("likeness",)}

    def __init__(self, network: Network, labels: Mapping[str, Any], artwork: Artwork) -> None:
        self.network = network.eval().requires_grad_(False)
        self.artwork = artwork
        self.reader = Reader(labels)

    @property
    def identities(self) -> dict[str, dict[str, Any]]:
        """What decides each of `marks`, by its name; {} if nothing was loaded."""
        if self.identity is None:
            return {}
        return {mark: {**self.identity, "id": f"{self.name}:{mark}"} for mark in (*SEEN, "likeness")}

    def read(self, prompt: str) -> Claims:
        """What a prompt says: `Reader.read`."""
        return self.reader.read(prompt)

    @torch.no_grad()
    def verdict(self, images: Tensor) -> list[Claims]:
        """What each picture (B, 3, H, W in [0, 1]) shows, in the terms of a prompt's claims; nonsense for NaN."""
        device = next(self.network.parameters()).device
        logits = self.network(in_size(images.to(device)) * 2 - 1)
        layout, first, second, colour, style = (part.argmax(-1).tolist() for part in logits[:5])
        found, words = [], self.reader
        for row in range(len(images)):
            pair = layout[row] != 0 and second[row] != 0
            names = (words.objects[first[row]], *([words.objects[second[row] - 1]] if pair else []))
            relation = {1: "left", 2: "above"}[layout[row]] if pair else None
            found.append(Claims(names, relation, words.colours[colour[row]], words.styles[style[row]]))
        return found

    def accuracy(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """For object, colour, style and relation: (B,) of 1 right and 0 wrong.

        NaN where the prompt does not say, and for a picture that is not finite.
        """
        rows = [_compare(self.read(p), seen) for p, seen in zip(prompts, self.verdict(images), strict=True)]
        broken = ~images.flatten(1).isfinite().all(1).cpu()
        return {key: torch.tensor([row[key] for row in rows]).masked_fill(broken, math.nan) for key in SEEN}

    @torch.no_grad()
    def likeness(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """How much each picture looks like the artwork of what its prompt names, (B,) in [0, 1]: `Artwork.likeness`.

        NaN for a prompt that names no object, or two without their places, and for a picture that is not finite.
        """
        nothing = torch.tensor(math.nan)
        claims = [self.read(prompt) for prompt in prompts]
        return torch.stack(
            [
                self.artwork.likeness(image, each) if each.placed else nothing
                for image, each in zip(images, claims, strict=True)
            ]
        )

    def marks(
        self, images: Tensor, prompts: Sequence[str], without: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """`accuracy`, and "likeness", which takes longer than all others and may be done `without`."""
        likeness = {} if "likeness" in without else {"likeness": self.likeness(images, prompts)}
        return {**self.accuracy(images, prompts), **likeness}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The share of a prompt's claims that the picture bears out, in [0, 1]; 0 for a prompt that claims nothing.

        NaN for a picture that is not finite.
        """
        marks = torch.stack(list(self.accuracy(images, prompts).values()))
        broken = ~images.flatten(1).isfinite().all(1).cpu()
        return marks.nanmean(dim=0).nan_to_num(0.0).masked_fill(broken, math.nan)


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
    """The share of what the prompt says that is in the picture, by a network that judges alone; no gradient."""
    labels = load_labels()
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, for nothing
        network = Network(labels["sizes"])
    network.load_state_dict(
        {key: value.float() for key, value in load_file(FOLDER / "judge.safetensors").items()}
    )
    judge = Judge(network.to(device), labels, load_artwork(labels))
    files = [FOLDER / "judge.safetensors", FOLDER / "artwork.png"]
    judge.identity = identity(judge.name, files, "shorter side bicubic, [-1, 1]")
    return judge
