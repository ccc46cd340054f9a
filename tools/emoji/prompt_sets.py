"""Write the three prompt sets of the bundled world, 60 prompts each: `python -m tools.emoji.prompt_sets`.

The test halves show combinations that no training scene has; the train halves only ones that training may have.
"""

from pathlib import Path

import numpy as np

from tools.emoji import world

FOLDER = Path("src/ipgo/prompt_sets")
HALF = 30
OPENINGS = (
    "a beautiful {}",
    "a masterpiece digital art {}",
    "a cute little {}",
    "an award winning {}",
    "a lovely {}",
)
CLOSINGS = (
    "highly detailed, vibrant, studio lighting",
    "professional illustration, trending, colorful",
    "adorable sticker, simple, centered",
    "elegant, minimal, detailed",
)


def _styled(rng: np.random.Generator, scene: world.Scene) -> str:
    """A wordy prompt as people write them, with style words and words that mean nothing here."""
    style = str(rng.choice(world.STYLES[scene.style]))
    kind = f"{style} {rng.choice(('icon', 'emoji', 'picture'))} of {world.article(scene.objects[0])}"
    opening = str(rng.choice(OPENINGS)).format(kind)
    return f"{opening} on a {scene.colour} background, {rng.choice(CLOSINGS)}"


def _plain(rng: np.random.Generator, scene: world.Scene) -> str:
    text = world.plain_caption(scene)
    return text if rng.random() < 0.5 else text.rsplit(",", 1)[0]  # half of them leave the style open


def build() -> None:
    """Each object opens at most one prompt in a half, so that a set covers the world."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number, (name, objects, write) in enumerate(
        (("one", 1, _plain), ("two", 2, _plain), ("styled", 1, _styled))
    ):
        for half, split in enumerate(("train", "test")):
            rng = np.random.default_rng(40 + 2 * number + half)
            prompts: dict[str, str] = {}
            while len(prompts) < HALF:
                scene = world.sample_scene(rng, split=split, count=objects, clean=True)
                if scene.objects[0] not in prompts:
                    prompts[scene.objects[0]] = write(rng, scene)
            (FOLDER / f"{name}.{split}.txt").write_text("\n".join(prompts.values()) + "\n")


if __name__ == "__main__":
    build()
