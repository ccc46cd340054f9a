"""Draw the training and test scenes once, so that every stage learns from the same pictures.

python -m tools.emoji.data --count 60000
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict

import numpy as np

from tools.emoji import sprites, world

FOLDER = sprites.BUILD / "data"
BLOCK = 2000  # scenes per seed; the picture of a scene depends on its block and place, not on the number of workers
SEEDS = {"train": 1_000, "test": 900_000}


def _draw_block(split: str, block: int) -> tuple[list[world.Scene], np.ndarray]:
    rng = np.random.default_rng(SEEDS[split] + block)
    scenes = [world.sample_scene(rng, split=split) for _ in range(BLOCK)]
    art = sprites.load()
    return scenes, np.stack([world.draw(rng, scene, art) for scene in scenes])


def build(split: str, count: int) -> None:
    """Write `count` scenes (rounded up to whole blocks) as one uint8 array and one line of JSON each."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    blocks = -(-count // BLOCK)
    images = np.lib.format.open_memmap(
        FOLDER / f"{split}.npy", "w+", np.uint8, (blocks * BLOCK, world.SIZE, world.SIZE, 3)
    )
    with ProcessPoolExecutor() as pool, (FOLDER / f"{split}.jsonl").open("w") as lines:
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
    return np.load(FOLDER / f"{split}.npy", mmap_mode="r"), scenes


def build_all(count: int = 60_000) -> None:
    """Both splits; `count` training scenes."""
    build("train", count)
    build("test", 4_000)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60_000, help="training scenes")
    build_all(parser.parse_args().count)
