"""The picture at the top of the README: prompts before a fit and after it, on noise that was not fitted.

    python benchmarks/before_after.py --out docs/before-after.png

The prompts are a seeded draw from a set's test half, not chosen by hand; so is the seed, the first unseen one. Each
reward has a row: the default, and the same with a term of one line, `warmth`, that the reader could have written.
"""

import argparse
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import ipgo
from ipgo.prompts import read_prompts

SIDE, GAP, LEFT = 160, 8, 90
USUAL = "emoji-likeness+emoji-preference"
WRAP, NAME, LINES, LINE = 27, 14, 6, 15  # letters of a line, of a name's; lines at most, and their height


def warmth(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """More red and less blue: the README's example of a reward."""
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def sheet(prompts: Sequence[str], rows: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """A row of images for each name, and each prompt under its column."""
    texts = [textwrap.wrap(prompt, WRAP)[:LINES] for prompt in prompts]
    bottom = len(rows) * (SIDE + GAP)
    size = LEFT + len(prompts) * (SIDE + GAP), bottom + LINE * max(map(len, texts)) + GAP
    picture = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for row, (name, images) in enumerate(rows.items()):
        lines = textwrap.wrap(name, NAME)
        y = row * (SIDE + GAP)
        pen.multiline_text((4, y + (SIDE - LINE * len(lines)) // 2), "\n".join(lines), "black", font)
        for number, image in enumerate(images):
            picture.paste(
                image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (LEFT + number * (SIDE + GAP), y)
            )
    for number, lines in enumerate(texts):
        pen.multiline_text((LEFT + number * (SIDE + GAP), bottom - 4), "\n".join(lines), "black", font)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", default="two:test?n=6")
    parser.add_argument("--rewards", nargs="+", default=[USUAL, f"{USUAL}+{__file__}:warmth<=0.2"])
    parser.add_argument("--backend", default="emoji")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3], help="those that are fitted")
    parser.add_argument("--out", type=Path, default=Path("docs/before-after.png"))
    options = parser.parse_args()
    prompts, rows = read_prompts(options.prompts), dict[str, list[Image.Image]]()
    for reward in options.rewards:
        name = re.sub(r"[^+]*:", "", reward).replace("+", " + ")  # without the places of files
        result = ipgo.fit(
            prompts, reward=reward, backend=options.backend, seeds=options.seeds, unseen_seeds=1
        )
        unseen = max(result[0].after)
        rows.setdefault("before", [each.before[unseen] for each in result])
        rows[f"after: {name}"] = [each.after[unseen] for each in result]
        for gain in result.on_unseen_seeds:
            print(f"{name}: {gain.reward} {gain.before:.3f} to {gain.after:.3f}")
    sheet(prompts, rows).save(options.out)


if __name__ == "__main__":
    main()
