"""The tools that make the bundled model: what is done stays, what was stopped goes on, what changed is noticed."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import ipgo.backends
from tools.emoji import (
    clip,
    data,
    evaluate,
    follow,
    loop,
    networks,
    redraw,
    scorers,
    sprites,
    tokenizer,
    train,
    world,
)
from tools.emoji.loop import Figures, Schedule

EMOJI = Path(ipgo.backends.__file__).parent / "emoji"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    return tmp_path


def part(value: float = 0.0) -> nn.Linear:
    module = nn.Linear(2, 1)
    nn.init.constant_(module.weight, value)
    nn.init.constant_(module.bias, value)
    return module


def trained(steps: int, module: nn.Module, stop: int | None = None, **options: object) -> bool:
    """Was there a step? `stop`: the step before which it is interrupted."""
    taken = 0

    def loss(rng: np.random.Generator, batch: int) -> tuple[Tensor, Figures]:
        nonlocal taken
        if taken == stop:
            raise KeyboardInterrupt
        taken += 1
        x = torch.from_numpy(rng.normal(size=(batch, 2)).astype(np.float32)).to(loop.DEVICE)
        return (module(x) - x.sum(1, keepdim=True)).square().mean(), {}

    return loop.train("part", module, loss, Schedule(steps, 8, 1e-2, warmup=1), **options)  # type: ignore[arg-type]


def stopped(steps: int, module: nn.Module, stop: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(steps, module, stop)


def state(module: nn.Module) -> list[float]:
    return [round(value, 6) for tensor in module.state_dict().values() for value in tensor.flatten().tolist()]


def test_a_stopped_schedule_goes_on_and_its_log_with_it() -> None:
    straight, resumed = part(), part()
    trained(120, straight)
    (loop.BUILD / "checkpoints/part.safetensors").unlink()
    stopped(120, resumed, 70)
    log = loop.BUILD / "logs/part.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 100, "loss": 1.0}) + "\n")  # lost with a machine
    assert trained(120, resumed)
    assert state(straight) == state(resumed)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [50, 100, 120]


def test_what_is_done_stays_done_until_a_new_schedule_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = part(), part(1.0)
    trained(3, first)
    assert not trained(5, second)
    assert state(second) == state(first)
    loop.renew("part")
    assert trained(5, part())
    assert "part is done; a new schedule continues" in capsys.readouterr().out
    assert loop.done("part")


def test_another_schedule_than_the_stopped_one_begins_from_its_weights(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stopped(100, part(), 60)
    assert trained(20, part())
    assert "part: stopped at step 60 of another schedule" in capsys.readouterr().out
    assert loop.done("part")


def test_a_change_of_what_a_part_continues_or_learns_from_is_noticed() -> None:
    trained(300, part(), origin=part(1.0))
    again = part(1.0)
    assert not trained(300, again, origin=part(1.0))
    begun = part(2.0)
    assert trained(1, begun, origin=part(2.0))
    assert state(begun) == pytest.approx([2.0] * 3, abs=0.02)  # what was learned from the other is not kept

    trained(1, part(), learns_from="this")  # the origin is another, so it was trained further
    assert loop.done("part", "this")
    further = part()
    assert trained(1, further, learns_from="that")
    assert state(further) == pytest.approx([2.0] * 3, abs=0.05)


def test_a_loss_that_is_not_finite_is_not_saved() -> None:
    with pytest.raises(SystemExit, match="part: at step 1 the loss is nan"):
        trained(3, part(float("nan")))
    assert not loop.exists("part")


def test_data_are_not_touched_by_a_bad_count_and_must_fit() -> None:
    data.FOLDER.mkdir(parents=True)
    np.save(data.FOLDER / "train.npy", np.zeros((3, 64, 64, 3), np.uint8))
    data.SCENES.write_text('{"objects": ["fox"], "colour": "red", "style": "3d"}\n' * 2)
    before = {path: path.read_bytes() for path in data.FOLDER.iterdir()}
    with pytest.raises(SystemExit, match=r"has 2 scenes and train\.npy 3 pictures"):
        data.load("train")
    for count in (0, -5):
        with pytest.raises(SystemExit, match=f"count {count}: must be"):
            data.build("train", count)
        with pytest.raises(SystemExit, match=f"count {count}: must be"):
            data.build_all(count)
        with pytest.raises(SystemExit, match=f"count {count}: must be at least 2"):
            redraw.build(count)
    assert before == {path: path.read_bytes() for path in data.FOLDER.iterdir()}


def test_a_file_that_is_written_anew_is_the_old_one_until_it_is_whole(folder: Path) -> None:
    path = folder / "file.txt"
    path.write_text("old")

    def interrupted() -> None:
        with sprites.replacing(path) as unfinished:
            unfinished.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    with sprites.replacing(path) as unfinished:
        unfinished.write_text("new")
    assert path.read_text() == "new"


def test_what_was_made_by_name_is_not_made_again_until_its_sources_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for path in (data.SCENES, train.TOKENS):
        path.parent.mkdir(parents=True)
        path.write_text("first")
    monkeypatch.setitem(train.STAGES, "captions", lambda: tokenizer.CAPTIONS.write_text("made"))
    assert train.is_made("tokenizer")
    assert not train.is_made("captions")
    for path in (data.SCENES, train.TOKENS):
        train.run("captions")
        assert train.is_made("captions")
        path.write_text("second")
        assert not train.is_made("captions")


def refused(main: Callable[[], None], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", *words.split()])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 2


def test_command_lines_are_refused_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data.FOLDER.mkdir(parents=True)
    for number in range(2):
        follow.path("preference", number).touch()
    for main, words, reason in (
        (train.main, "vae --steps 0", "'0' is not a whole number of at least 1"),
        (train.main, "vae --lr nan", "'nan' is not a number above 0"),
        (follow.main, "--number 1", "--number 1: must be at least 2"),
        (evaluate.main, "--count -5", "'-5' is not a whole number of at least 1"),
        (evaluate.main, "--count 1", "--count 1: must be at least 10"),
        (evaluate.main, "--sheet no/sheet.png", "no/sheet.png: there is no folder no"),
        (evaluate.main, "--out table.md", "no sprites for "),
    ):
        refused(main, words, monkeypatch)
        assert reason in capsys.readouterr().err


def test_what_the_artwork_needs_is_said_before_it_is_downloaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install resvg-py"):
        sprites.build()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    npm = folder / "npm"
    npm.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(SystemExit, match=r"npm pack .* failed: no network"):
        sprites.build()


# -- what is learned ---------------------------------------------------------------------------------------


def test_what_is_kept_of_a_part_is_the_running_mean_of_its_weights() -> None:
    module = part(0.5)
    seen = [state(module)]
    hook = register_optimizer_step_post_hook(lambda *_: seen.append(state(module)))
    try:
        loop.train(
            "part", module, lambda rng, _: (module(torch.ones(1, 2)).sum(), {}), Schedule(6, 8, 1e-1, ema=0.3)
        )
    finally:
        hook.remove()
    mean = np.array(seen[0])
    for step, weights in enumerate(seen[1:]):
        mean += (1 - min(0.3, (step + 1) / (step + 10))) * (np.array(weights) - mean)
    assert len(seen) == 7
    assert state(module) == pytest.approx(mean.tolist(), abs=1e-5)
    assert state(module) != pytest.approx(seen[-1], abs=1e-3)


def flat(values: range) -> np.ndarray:
    """Pictures (N, 64, 64, 3), each of one grey."""
    return np.array(values, np.uint8)[:, None, None, None] * np.ones((1, 64, 64, 3), np.uint8)


def test_a_spoilt_twin_is_that_of_its_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    scenes = [world.sample_scene(rng, count=1 + number % 2) for number in range(40)]
    clean = data.clean_rows(scenes)
    twins = [world.spoilt(rng, scenes[row]) for row in clean]
    sets = {"train": (flat(range(40)), scenes), "twins": (flat(range(100, 100 + len(twins))), twins)}
    monkeypatch.setattr(data, "load", sets.get)
    monkeypatch.setattr(data, "pictures", lambda rng, images, decoded, rows: images[rows])
    monkeypatch.setattr(data, "DECODED", Path("decoded.npy"))
    np.save(data.DECODED, flat(range(1)))
    batch = clip.batches()(rng, 32)
    greys = ((batch.pictures[:, 0, 32, 32] + 1) * 127.5).round().long().tolist()
    pairs = len(greys) - len(batch.texts)
    assert pairs == 8
    for number in range(pairs):
        row, twin = greys[number], greys[len(batch.texts) + number]
        assert clean[twin - 100] == row
        own, spoilt = batch.facts[number].tolist(), batch.facts[len(batch.texts) + number].tolist()
        assert own == list(world.facts(scenes[row]))
        assert spoilt[:5] == own[:5]
        assert (own[5], spoilt[5] > 0) == (0, True)
        assert batch.quality[number] == 1 > batch.quality[len(batch.texts) + number]
    assert (
        not world.contradicts(batch.claims.cpu().numpy(), batch.facts.cpu().numpy())[:, : len(batch.texts)]
        .diagonal()
        .any()
    )


def test_of_a_redrawn_pair_the_artwork_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    scenes = [world.sample_scene(rng, count=1 + number % 2, clean=True) for number in range(4)]
    images = np.random.default_rng(2).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    pipe = StableDiffusionPipeline.from_pretrained(EMOJI)
    monkeypatch.setattr(data, "load", lambda split: (images, scenes))
    monkeypatch.setattr(redraw, "pipeline", lambda: pipe)
    monkeypatch.setattr(redraw, "redrawn", lambda pipe, latents, *_: torch.zeros_like(latents))
    redraw.PAIRS.parent.mkdir(parents=True)
    redraw.build(4)
    pairs, texts = redraw.load()
    with torch.no_grad():
        latents = pipe.vae.encode(networks.pixels(images)).latent_dist.mode()
        artwork = networks.as_bytes(pipe.vae.decode(latents).sample)
        nothing = networks.as_bytes(pipe.vae.decode(torch.zeros_like(latents)).sample)
    for pair in pairs:  # some processors compute in bfloat16
        assert min(abs(pair[0].astype(int) - each).max() for each in artwork.astype(int)) <= 12
        assert abs(pair[1].astype(int) - nothing[0].astype(int)).max() <= 12
    assert len(texts) == 4


def test_of_a_followed_pair_the_one_that_looks_more_like_the_artwork_is_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    likeness = np.array([[0.1, 0.9, 0.5], [0.8, 0.2, 0.79]], np.float32)
    pictures = (likeness[..., None, None, None] * 100).astype(np.uint8)
    monkeypatch.setattr(follow, "load", lambda: follow.Round(["a", "b"], pictures, likeness))
    drawn, texts, weights = scorers._followed()(np.random.default_rng(3), 64)
    better, worse = drawn[:, 0, 0, 0, 0] / 100, drawn[:, 1, 0, 0, 0] / 100
    assert (better > worse).all()
    assert weights == pytest.approx(np.minimum(1, (better - worse) / scorers.CLEARLY), abs=0.05)
    assert {(text, round(value.item(), 2)) for text, value in zip(texts, better, strict=True)} <= {
        ("a", 0.9), ("a", 0.5), ("b", 0.8), ("b", 0.79)
    }  # fmt: skip
