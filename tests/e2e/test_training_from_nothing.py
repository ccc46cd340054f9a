"""`python -m tools.emoji.train all`: every stage of the bundled model, from artwork to a package that opens.

In a folder of its own, on few scenes, for two steps a stage; only the download of the artwork is left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPModel

import ipgo
from ipgo.models import bundled_rewards
from tools.emoji import world
from tools.emoji.sprites import PACKAGES, SPRITE_SIZE

ROOT = Path(__file__).parents[2]
DRIVER = """
from dataclasses import replace
from tools.emoji import clip, data, follow, loop, redraw, scorers, tokenizer, train

data.BLOCK, data.TWINS = 100, 200
all_pairs, all_rounds, all_captions = scorers.train_preference, scorers.resist, tokenizer.captions
follow.NOISES, follow.AT = 1, (1, 2)
follow.ASCENT = replace(follow.ASCENT, steps=2)
tokenizer.captions = lambda: all_captions(400)
scorers.PAIR_BLOCK = 20
for table in (train.SCHEDULES, clip.SCHEDULES, scorers.SCHEDULES):
    for name, schedule in table.items():
        table[name] = replace(schedule, steps=2, batch=8)
train.STAGES |= {
    "sprites": lambda: None,
    "data": lambda: data.build_all(300),
    "redraw": lambda: redraw.build(8),
    "preference": lambda: all_pairs(blocks=1),
    "follow": lambda: follow.build(4),
    "resist": lambda: all_rounds(blocks=1),
}
train.train_all()
print([loop.newest(name) for name in follow.REWARDS])
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


def contents(checkpoints: Path) -> dict[str, Any]:
    """What every file holds. Not its bytes: safetensors writes the metadata in any order."""
    found: dict[str, Any] = {}
    for path in checkpoints.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
            found[path.name] = (file.metadata(), tensors)
    return found


def test_every_stage_and_the_way_back(folder: Path) -> None:
    assert run(folder, "-c", DRIVER).endswith("['preference-2', 'aesthetic-2']\n")
    checkpoints = folder / "build/emoji/checkpoints"
    trained = contents(checkpoints)
    rounds = sorted((folder / "build/emoji/data").glob("followed-*"))
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

    # The same as an SDXL: its text encoders know what the bundled one does, and its rewards come with it.
    run(folder, "-m", "tools.emoji.xl", "--steps", "2")
    assert "begins again" not in run(folder, "-m", "tools.emoji.xl", "--steps", "2")
    xl, plain = (
        ipgo.load_backend(str(folder / place)) for place in ("build/emoji/xl", "src/ipgo/backends/emoji")
    )
    assert type(xl.pipe).__name__ == "StableDiffusionXLPipeline"
    prompts = ["a fox on a red background", "a pear"]
    told, states = xl.encode(prompts), plain.encode(prompts).embeds
    norm = plain.pipe.text_encoder.final_layer_norm
    for half in told.embeds.chunk(2, dim=-1):
        torch.testing.assert_close(norm(half), states, atol=1e-2, rtol=0)  # float16 there
    clip = CLIPModel.from_pretrained(folder / "src/ipgo/rewards/emoji/clip", dtype=torch.float32)
    ids = plain.pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    features = clip.get_text_features(input_ids=ids).pooler_output
    torch.testing.assert_close(told.pooled, features, atol=1e-2, rtol=0)
    assert ipgo.generate(xl, prompts, [0, 1], ipgo.Adapter(), ipgo.Sampling(2, 2.5)).isfinite().all()
    assert bundled_rewards(str(folder / "build/emoji/xl"))

    # Nothing is done again, and what was trained last is what the package has.
    again = run(folder, "-c", DRIVER)
    assert "begins again" not in again
    assert not {"data", "tokenizer", "latents", "redraw", "follow"} & set(again.split())
    assert trained == {name: held for name, held in contents(checkpoints).items() if name != "xl.safetensors"}
    assert rounds == sorted((folder / "build/emoji/data").glob("followed-*"))
    last = load_file(checkpoints / "aesthetic-2.safetensors")["model.visual_projection.weight"]
    shown = load_file(folder / "src/ipgo/rewards/emoji/aesthetic/model.safetensors")
    assert last.half().equal(shown["visual_projection.weight"])

    # What went on from a part that has changed begins again.
    run(folder, "-m", "tools.emoji.train", "clip", "--steps", "1", "--batch", "8")
    again = run(folder, "-c", DRIVER)
    for stage in ("clip-hard", "aesthetic", "preference"):
        assert f"{stage}: what it continues from has changed" in again
    assert "denoiser: what it learns from has changed" in again
    assert {"redraw", "follow"} < set(again.split())
    assert "latents" not in again.split()

    # A part that was made can be trained further: from the package, in a fresh build folder.
    for path in checkpoints.glob("*.safetensors"):
        path.unlink()
    shutil.rmtree(folder / "build/emoji/tokenizer")
    run(folder, "-m", "tools.emoji.train", "restore")
    for said in ("", "aesthetic is done; a new schedule continues from its weights\n"):
        before = contents(checkpoints)["aesthetic.safetensors"]
        assert run(folder, "-m", "tools.emoji.train", "aesthetic", "--steps", "1") == said
        assert contents(checkpoints)["aesthetic.safetensors"] != before
    assert {"vae", "denoiser", "clip", "clip-probe", "preference", "aesthetic", "judge"} == {
        path.stem for path in checkpoints.glob("*.safetensors")
    }
