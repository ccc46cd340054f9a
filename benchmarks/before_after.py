"""The picture at the top of the README: prompts before and after a fit, on noise that was not fitted.

    python benchmarks/before_after.py --out docs/before-after.png

The prompts are a seeded draw from a set's test half, not chosen by hand; so is the seed, the first unseen one.
"""

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import ipgo
from ipgo.prompts import read_prompts

SIDE, GAP, LEFT = 160, 8, 58
WRAP, LINES, LINE = 27, 6, 15  # letters of a line, lines at most, and their height


def strip(columns: list[tuple[str, Image.Image, Image.Image]]) -> Image.Image:
    """Before above after, and under them the prompt, for each column."""
    texts = [textwrap.wrap(prompt, WRAP)[:LINES] for prompt, *_ in columns]
    width, height = LEFT + len(columns) * (SIDE + GAP), 2 * (SIDE + GAP) + LINE * max(map(len, texts)) + GAP
    picture = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for row, name in enumerate(("before", "after")):
        pen.text((4, row * (SIDE + GAP) + SIDE // 2), name, "black", font)
    for number, (_, *pair) in enumerate(columns):
        x = LEFT + number * (SIDE + GAP)
        for row, image in enumerate(pair):
            picture.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, row * (SIDE + GAP)))
        pen.multiline_text((x, 2 * (SIDE + GAP) - 4), "\n".join(texts[number]), "black", font)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", default="styled:test?n=6")
    parser.add_argument("--reward", default="emoji-likeness+emoji-preference")
    parser.add_argument("--backend", default="emoji")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3], help="those that are fitted")
    parser.add_argument("--out", type=Path, default=Path("docs/before-after.png"))
    options = parser.parse_args()
    result = ipgo.fit(
        read_prompts(options.prompts),
        reward=options.reward,
        backend=options.backend,
        seeds=options.seeds,
        unseen_seeds=1,
    )
    unseen = max(result[0].after)
    strip([(each.prompt, each.before[unseen], each.after[unseen]) for each in result]).save(options.out)
    for gain in result.on_unseen_seeds:
        print(f"{gain.reward}: {gain.before:.3f} to {gain.after:.3f}")


if __name__ == "__main__":
    main()
