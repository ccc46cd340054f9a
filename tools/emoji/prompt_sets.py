"""Write the prompt sets of the bundled world: `python -m tools.emoji.prompt_sets`.

Three of 60 prompts each: the test halves show combinations that no training scene has, the train halves only ones that
training may have. And `mixed`, 1,200 more such of all three kinds, which prompt-batch is fitted to.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tools.emoji import world

FOLDER = Path("src/ipgo/prompt_sets")
HALF = 30
MIXED = 400  # of each kind
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


Writer = Callable[[np.random.Generator, world.Scene], str]
KINDS: tuple[tuple[str, int, Writer], ...] = (("one", 1, _plain), ("two", 2, _plain), ("styled", 1, _styled))


def _half(number: int, half: int) -> list[str]:
    """Each object opens at most one prompt in a half, so that a set covers the world."""
    _, objects, write = KINDS[number]
    rng = np.random.default_rng(40 + 2 * number + half)
    prompts: dict[str, str] = {}
    while len(prompts) < HALF:
        scene = world.sample_scene(rng, split=("train", "test")[half], count=objects, clean=True)
        if scene.objects[0] not in prompts:
            prompts[scene.objects[0]] = write(rng, scene)
    return list(prompts.values())


def _mixed(number: int, others: list[str]) -> list[str]:
    """Prompts of one kind that are not among `others`: where the style is left open, a text may be in both splits."""
    _, objects, write = KINDS[number]
    rng = np.random.default_rng(60 + number)
    prompts: list[str] = []
    while len(prompts) < MIXED:
        prompt = write(rng, world.sample_scene(rng, split="train", count=objects, clean=True))
        if prompt not in [*prompts, *others]:
            prompts.append(prompt)
    return prompts


def build() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    mixed = []
    for number, (name, _, _) in enumerate(KINDS):
        train, test = (_half(number, half) for half in range(2))
        (FOLDER / f"{name}.train.txt").write_text("\n".join(train) + "\n")
        (FOLDER / f"{name}.test.txt").write_text("\n".join(test) + "\n")
        mixed += _mixed(number, [*train, *test])
    (FOLDER / "mixed.train.txt").write_text("\n".join(mixed) + "\n")


if __name__ == "__main__":
    build()
