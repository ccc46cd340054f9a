"""Draw the training scenes once, so that every stage learns from the same pictures.

python -m tools.emoji.data --count 60000
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict

import numpy as np

from tools.emoji import arguments, sprites, world
from tools.emoji.sprites import replacing

FOLDER = sprites.BUILD / "data"
TWINS = 20_000  # how many clean training scenes are drawn once more, spoilt
DECODED = FOLDER / "decoded.npy"  # the first training scenes, through the VAE and back
BLOCK = 2000  # scenes per seed; the picture of a scene depends on its block and place, not on the number of workers
SEEDS = {"train": 1_000, "twins": 400_000}
SCENES, SPOILT = FOLDER / "train.jsonl", FOLDER / "twins.npy"


def _draw_block(split: str, block: int) -> tuple[list[world.Scene], np.ndarray]:
    rng = np.random.default_rng(SEEDS[split] + block)
    if split == "twins":
        _, scenes = load("train")
        part = clean_rows(scenes)[block * BLOCK : (block + 1) * BLOCK]
        scenes = [world.spoilt(rng, scenes[row]) for row in part]
    else:
        scenes = [world.sample_scene(rng) for _ in range(BLOCK)]
    art = sprites.load()
    return scenes, np.stack([world.draw(rng, scene, art) for scene in scenes])


def build(split: str, count: int) -> None:
    """Write `count` scenes (rounded up to whole blocks) as one uint8 array and one line of JSON each."""
    if count < 1:
        raise SystemExit(f"count {count}: must be at least 1")
    FOLDER.mkdir(parents=True, exist_ok=True)
    blocks = -(-count // BLOCK)
    with replacing(FOLDER / f"{split}.npy") as pictures, replacing(FOLDER / f"{split}.jsonl") as told:
        images = np.lib.format.open_memmap(
            pictures, "w+", np.uint8, (blocks * BLOCK, world.SIZE, world.SIZE, 3)
        )
        with ProcessPoolExecutor() as pool, told.open("w") as lines:
            for block, (scenes, drawn) in enumerate(pool.map(_draw_block, [split] * blocks, range(blocks))):
                images[block * BLOCK : (block + 1) * BLOCK] = drawn
                lines.writelines(json.dumps(asdict(scene)) + "\n" for scene in scenes)
        images.flush()


def load(split: str) -> tuple[np.ndarray, Sequence[world.Scene]]:
    """Images (N, 64, 64, 3) uint8, mapped from disk, and their scenes."""
    path = FOLDER / f"{split}.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"no {path}: run `python -m tools.emoji.data` first")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    scenes = [world.Scene(**{**row, "objects": tuple(row["objects"])}) for row in rows]
    images = np.load(FOLDER / f"{split}.npy", mmap_mode="r")
    if len(images) != len(scenes):
        raise SystemExit(
            f"{path} has {len(scenes)} scenes and {split}.npy {len(images)} pictures, which must be as many: "
            "run `python -m tools.emoji.data` again"
        )
    return images, scenes


def clean_rows(scenes: Sequence[world.Scene]) -> np.ndarray:
    """Which of the scenes are clean; the first `TWINS` of them have a spoilt twin."""
    return np.flatnonzero([scene.degradation is None for scene in scenes])


def clean_kinds(scenes: Sequence[world.Scene]) -> tuple[np.ndarray, np.ndarray]:
    """Which of the scenes are clean and show one object; and which of them show two."""
    clean = clean_rows(scenes)
    double = np.array([len(scenes[row].objects) == 2 for row in clean])
    return clean[~double], clean[double]


def num_decoded(count: int) -> int:
    """How many of so many scenes go through the VAE, in batches of 250: a little more than a third."""
    return min(count, max(1, round(0.4 * count / 250)) * 250)


def pictures(
    rng: np.random.Generator, images: np.ndarray, decoded: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """The scenes of these rows as a scorer sees them: a third have gone through the VAE."""
    chosen = images[rows]
    again = (rows < len(decoded)) & (rng.random(len(rows)) < len(images) / len(decoded) / 3)
    chosen[again] = decoded[rows[again]]
    return chosen


def build_all(count: int = 60_000) -> None:
    """`count` training scenes, and the twins: as many as there are clean scenes, in whole blocks."""
    if count <= BLOCK:
        raise SystemExit(f"--count {count}: must be more than {BLOCK}, or too few scenes are clean")
    SPOILT.unlink(missing_ok=True)  # twins of other scenes; without them the data count as not made
    build("train", count)
    build("twins", min(TWINS, len(clean_rows(load("train")[1]))) // BLOCK * BLOCK)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=arguments.count, default=60_000, help="training scenes")
    build_all(parser.parse_args().count)
