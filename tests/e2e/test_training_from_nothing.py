"""`python -m tools.emoji.train all`: every stage of the bundled model, from artwork to a package that opens.

In a folder of its own, on few scenes, for two steps a stage; only the download of the artwork is left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from tools.emoji import world
from tools.emoji.sprites import PACKAGES, SPRITE_SIZE

ROOT = Path(__file__).parents[2]
DRIVER = """
from dataclasses import replace
from tools.emoji import clip, data, follow, redraw, scorers, tokenizer, train

data.BLOCK, data.TWINS, data.NUM_DECODED = 100, 100, 250
all_pairs, all_rounds, all_captions = scorers.train_preference, scorers.resist, tokenizer.captions
follow.NOISES, follow.AT = 1, (1, 2)
follow.ASCENT = replace(follow.ASCENT, steps=2)
tokenizer.captions = lambda: all_captions(400)
scorers.PAIR_BLOCK = 20
for table in (train.SCHEDULES, clip.SCHEDULES, scorers.SCHEDULES):
    for name, schedule in table.items():
        table[name] = replace(schedule, steps=2, batch=8)
small = {
    "sprites": lambda: None,
    "data": lambda: data.build_all(300),
    "redraw": lambda: redraw.build(8),
    "preference": lambda: all_pairs(blocks=1),
    "follow": lambda: follow.build(4),
    "resist": lambda: all_rounds(blocks=1),
}
for name, stage in train.STAGES.items():
    print(name, flush=True)
    small.get(name, stage)()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With artwork that is not the real one: a blot of its own for each object and style."""
    sprites = tmp_path / "build/emoji/sprites"
    sprites.mkdir(parents=True)
    for number, name in enumerate(world.NAMES):
        for style in PACKAGES:
            sprite = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE))
            colour = (number * 4, 255 - number * 4, 80 if style == "flat" else 200, 255)
            ImageDraw.Draw(sprite).ellipse((10, 10, SPRITE_SIZE - 10, 60 + number), fill=colour)
            sprite.save(sprites / f"{name}-{style}.png")
    return tmp_path


def run(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_stage_and_the_way_back(folder: Path) -> None:
    run(folder, "-c", DRIVER)
    made = {
        str(path.relative_to(folder / "src/ipgo")): path
        for path in (folder / "src/ipgo").rglob("*.safetensors")
    }
    shipped = {
        str(path.relative_to(ROOT / "src/ipgo")): path
        for path in (ROOT / "src/ipgo").rglob("*.safetensors")
        if "rewriters" not in path.parts  # of tools/emoji/train_promptist.py
    }
    assert made.keys() == shipped.keys()
    for name, path in made.items():
        ours, theirs = load_file(path), load_file(shipped[name])
        assert ours.keys() == theirs.keys()
        assert {key: value.dtype for key, value in ours.items()} == {k: v.dtype for k, v in theirs.items()}

    # A part that was made can be trained further: from the package, in a fresh build folder.
    checkpoints = folder / "build/emoji/checkpoints"
    for path in checkpoints.glob("*.safetensors"):
        path.unlink()
    run(folder, "-m", "tools.emoji.train", "restore")
    run(folder, "-m", "tools.emoji.train", "aesthetic", "--steps", "1")
    assert {"vae", "denoiser", "clip", "clip-probe", "preference", "aesthetic", "judge"} == {
        path.stem for path in checkpoints.glob("*.safetensors")
    }
