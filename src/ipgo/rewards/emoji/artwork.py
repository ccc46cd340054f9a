"""How much the objects in a picture look like their artwork: the truth of the bundled world, learned from nothing.

An optimiser finds no weak spots of a network here. But only objects and what is next to them are looked at: not the
background's colour, nor what else stands about. The judge sees those.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ipgo.errors import InputError
from ipgo.images import center_crop, resize
from ipgo.rewards.checkpoints import identity
from ipgo.rewards.emoji.claims import Claims, Reader, load_labels

SHEET = Path(__file__).parent / "artwork.png"
SIZE = 64  # of the pictures
SPRITE = 96  # pixels of a sprite's side in the sheet: one row of sprites for each style
FINE = 3  # renderings are made so much larger and box-reduced, as scenes are drawn
# Styles whose likeness, searched roughly, is so much below the best one's are not looked at further.
CLOSE = 0.15
BORDER = 4  # pixels along the edge of a picture that show its background, mostly

# Where the first and the second object stand (x, y) in a scene of one, and of two; and sides in pixels. Scenes are
# drawn with sides of 44 to 50 and of 27 to 30, and 1.5 pixels beside these places at most.
ALONE = ((32.0, 32.0),)
PLACES = {
    "left": ((16.5, 32.0), (47.5, 32.0)),
    "right": ((47.5, 32.0), (16.5, 32.0)),
    "above": ((32.0, 16.5), (32.0, 47.5)),
    "below": ((32.0, 47.5), (32.0, 16.5)),
}
SIDES = {1: (43.0, 47.0, 51.0), 2: (26.0, 28.5, 31.0)}
SHIFTS = (-3.0, -1.5, 0.0, 1.5, 3.0)


class Artwork:
    """The sprites of all objects in all styles, which are laid upon pictures.

    Args:
        sheet: an RGBA picture, a column for each of `objects`, a row for each of `styles`.
    """

    def __init__(self, sheet: Path, objects: Sequence[str], styles: Sequence[str]) -> None:
        with Image.open(sheet) as picture:
            pixels = torch.from_numpy(np.asarray(picture.convert("RGBA"), np.float32) / 255)
        pixels = torch.cat([pixels[..., :3] * pixels[..., 3:], pixels[..., 3:]], dim=-1).permute(2, 0, 1)
        self.styles = tuple(styles)
        self._sprites = {
            (name, style): pixels[
                :, row * SPRITE : (row + 1) * SPRITE, column * SPRITE : (column + 1) * SPRITE
            ]
            for (column, name), (row, style) in itertools.product(enumerate(objects), enumerate(styles))
        }

    def likeness(self, image: Tensor, claims: Claims) -> Tensor:
        """How well a picture (3, H, W) in [0, 1] agrees with the artwork, where it fits best; of two objects, the mean.

        A number () with a gradient, on the CPU. 1 is the artwork itself, 0 what has nothing in common with it. The mean
        of pixels and of their differences to their neighbours, where lines and details are. Without a style, the better
        one. NaN for a picture that is not finite. The claims must be `placed`.
        """
        if not image.isfinite().all():
            return image.cpu().sum() * math.nan
        picture = in_size(image.cpu()[None])[0]
        places = PLACES[claims.relation] if claims.relation else ALONE
        sides = SIDES[len(places)]
        with torch.no_grad():
            ground = background(picture)
            rough = []  # for each style: its mark, and the sprites with their boxes
            for style in [claims.style] if claims.style else self.styles:
                sprites = [self._sprites[name, style] for name in claims.objects]
                found = [
                    _roughly(picture, ground, *each, sides) for each in zip(sprites, places, strict=True)
                ]
                boxes, marks = zip(*found, strict=True)
                rough.append((sum(marks) / len(marks), list(zip(sprites, boxes, strict=True))))
            least = max(mark for mark, _ in rough) - CLOSE
        likely = [laid for mark, laid in rough if mark >= least]
        values = [[_of_one(picture, ground, *each, sides) for each in laid] for laid in likely]
        return torch.stack([torch.stack(each).mean() for each in values]).max()


class Likeness:
    """How much the objects in pictures look like the artwork they should show, 0 to 1; nothing in it is learned."""

    name = "emoji-likeness"
    differentiable = True

    def __init__(self, artwork: Artwork, reader: Reader) -> None:
        self.artwork, self.reader = artwork, reader
        self.identity = identity(self.name, [SHEET], "shorter side bicubic")

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,); `InputError` for a prompt of which it is not known what should be seen where."""
        pairs = zip(images, placed(self.reader, prompts), strict=True)
        return torch.stack([self.artwork.likeness(*pair) for pair in pairs]).to(images.device)


def placed(reader: Reader, prompts: Sequence[str]) -> list[Claims]:
    """What each prompt says; `InputError` for one that does not say what should be seen where."""
    found = [reader.read(prompt) for prompt in prompts]
    for prompt, claims in zip(prompts, found, strict=True):
        if not claims.placed:
            what = (
                "names no object that there is (see `ipgo list objects`)"
                if not claims.objects
                else "does not say how its objects stand: of two, 'above' or 'left of', say, and no more are shown"
            )
            raise InputError(
                f"reward {Likeness.name!r} compares with artwork, and prompt {prompt[:60]!r} {what}; change it, or "
                "follow another reward: --reward emoji-preference"
            )
    return found


def check_prompts(prompts: Sequence[str]) -> None:
    """`placed`, without the artwork."""
    placed(Reader(load_labels()), prompts)


def load_likeness(device: str | torch.device = "cpu") -> Likeness:
    """The reward `emoji-likeness`."""
    labels = load_labels()
    return Likeness(load_artwork(labels), Reader(labels))


def load_artwork(labels: Mapping[str, Any]) -> Artwork:
    """The package's."""
    return Artwork(SHEET, list(labels["objects"]), list(labels["styles"]))


def in_size(images: Tensor) -> Tensor:
    """(B, 3, H, W) in the size of the bundled model's pictures."""
    return center_crop(resize(images.float(), SIZE), SIZE)


def _roughly(
    image: Tensor, ground: Tensor, sprite: Tensor, place: tuple[float, float], sides: tuple[float, ...]
) -> tuple[Tensor, float]:
    """The box (3,) where a sprite fits best, searched at half the size; and its agreement there."""
    half, low = (F.avg_pool2d(each, 2) for each in (image, ground))
    x, y = (torch.tensor([middle + shift for shift in SHIFTS]) for middle in place)
    boxes = torch.cartesian_prod(x, y, torch.tensor(sides))
    small = F.interpolate(sprite[None], size=(round(sides[1] / 2),) * 2, mode="bilinear", antialias=True)[0]
    mark, best = _agreement(half, low, rendered(small, boxes, SIZE // 2)).max(0)
    return boxes[best], mark.item()


def _of_one(image: Tensor, ground: Tensor, sprite: Tensor, box: Tensor, sides: tuple[float, ...]) -> Tensor:
    """The likeness of one object: in ever smaller steps around a box to where the sprite fits best."""
    with torch.no_grad():
        small = F.interpolate(sprite[None], size=(round(sides[1]),) * 2, mode="bilinear", antialias=True)[0]
        step = torch.tensor([0.75, 0.75, 1.0])
        moves = torch.cat([torch.zeros(1, 3), torch.eye(3), -torch.eye(3)])
        for _ in range(7):
            near = box + moves * step
            best = int(_agreement(image, ground, rendered(small, near, SIZE)).argmax())
            box, step = near[best], step if best else step / 2
        drawn = F.avg_pool2d(rendered(sprite, box[None], SIZE * FINE), FINE)
    return _agreement(image, ground, drawn)[0].clamp(min=0)


def rendered(sprite: Tensor, boxes: Tensor, size: int) -> Tensor:
    """A sprite (4, S, S) drawn at boxes (N, 3), centre x and y and side in pixels of 64: (N, 4, size, size)."""
    axis = (torch.arange(size) + 0.5) * (SIZE / size)
    x, y, side = boxes.T[..., None]
    shape = len(boxes), size, size
    across = ((axis - x) / side * 2)[:, None, :].expand(shape)
    down = ((axis - y) / side * 2)[:, :, None].expand(shape)
    grid = torch.stack([across, down], dim=-1)
    return F.grid_sample(sprite.expand(len(boxes), -1, -1, -1), grid, align_corners=False)


def background(image: Tensor) -> Tensor:
    """The plane of colour (3, 64, 64) that fits the border of a picture best; what stands out from it is left out."""
    axis = torch.linspace(-1, 1, SIZE)
    down, across = torch.meshgrid(axis, axis, indexing="ij")
    planes = torch.stack([torch.ones(SIZE, SIZE), across, down], dim=-1).flatten(0, 1)
    border = torch.ones(SIZE, SIZE, dtype=torch.bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    rows = border.flatten()
    basis, colours = planes[rows], image.flatten(1).T[rows]
    weight = torch.ones(len(basis), 1)
    for _ in range(3):
        # The default driver, gelsy, may answer the same question a little differently each time. This one needs
        # independent columns, and has them: at least half of the border keeps its weight.
        plane = torch.linalg.lstsq(basis * weight, colours * weight, driver="gels").solution
        off = (colours - basis @ plane).abs().sum(-1, keepdim=True)
        weight = (off <= 2.5 * off.median() + 0.02).float()
    fitted: Tensor = (planes @ plane).T.reshape(3, SIZE, SIZE)
    return fitted


def _agreement(image: Tensor, ground: Tensor, sprites: Tensor) -> Tensor:
    """How well drawn sprites (N, 4, S, S) and the picture agree in what they change of the background there: (N,).

    The mean of pixels and of their differences, where lines and details are.
    """
    drawn = sprites[:, :3] - ground * sprites[:, 3:]
    seen = image - ground
    near = (_spread(sprites[:, 3:]) > 0.02).float()
    return (_alike(seen, drawn, near) + _alike(_edges(seen), _edges(drawn), near[..., :-1, :-1])) / 2


def _alike(a: Tensor, b: Tensor, near: Tensor) -> Tensor:
    """2 ab / (aa + bb), as SSIM compares contrast and structure: (N,), 1 for the same, 0 for nothing in common.

    Blurring or fading what is wrong gains nothing, as it would with an error. `a` (C, S, S) counts where `near`
    (N, 1, S, S) is 1, and `b` (N, C, S, S) is nothing elsewhere.
    """
    both = b.flatten(1) @ a.flatten()
    each = near.flatten(1) @ a.square().sum(0).flatten() + b.square().sum((1, 2, 3))
    alike: Tensor = 2 * both / each.clamp_min(1e-6)
    return alike


def _spread(alpha: Tensor) -> Tensor:
    """The largest of the values within two pixels. `F.max_pool2d` takes ten times as long on a CPU."""
    for _ in range(2):
        wide = F.pad(alpha.mT, (2, 2))
        two = torch.maximum(wide[..., :-1], wide[..., 1:])
        alpha = torch.maximum(torch.maximum(two[..., :-3], two[..., 2:-1]), wide[..., 4:])
    return alpha


def _edges(images: Tensor) -> Tensor:
    """Differences to the neighbours on the right and below."""
    return torch.cat([images.diff(dim=-1)[..., :-1, :], images.diff(dim=-2)[..., :-1]], dim=-3)
