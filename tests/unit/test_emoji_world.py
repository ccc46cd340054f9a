"""The world of the bundled model: captions say what is true, and the judge reads them as they are meant."""

import json
from pathlib import Path

import numpy as np
import pytest

from ipgo.rewards.emoji.judge import Judge, Network, _compare
from tools.emoji import world


@pytest.fixture(scope="module")
def judge() -> Judge:
    labels = {
        "objects": {name: list(words) for name, (_, words) in world.OBJECTS.items()},
        "colours": list(world.COLOURS),
        "styles": {name: list(words) for name, words in world.STYLES.items()},
        "relations": {name: list(words) for name, words in world.RELATION_WORDS.items()},
    }
    return Judge(Network([3, 64, 65, 10, 2, 1]), labels)


def scenes(count: int = 400, **options: object) -> list[world.Scene]:
    rng = np.random.default_rng(0)
    return [world.sample_scene(rng, **options) for _ in range(count)]  # type: ignore[arg-type]


def test_a_caption_never_contradicts_its_scene_and_mostly_contradicts_others() -> None:
    drawn = scenes()
    rng = np.random.default_rng(1)
    claims = np.array([world.caption(rng, scene)[1] for scene in drawn])
    wrong = world.contradicts(claims, np.array([world.facts(scene) for scene in drawn]))
    assert not wrong.diagonal().any()
    assert wrong.mean() > 0.95


def test_the_judge_reads_captions_as_they_are_meant(judge: Judge) -> None:
    rng = np.random.default_rng(2)
    for scene in scenes():
        text, claims = world.caption(rng, scene)
        read = judge.read(text)
        assert read.objects == scene.objects, text
        assert read.relation == scene.relation, text
        assert read.colour == (scene.colour if claims[3] != world.UNSAID else None), text
        assert read.style == (scene.style if claims[4] != world.UNSAID else None), text


def test_a_relation_may_be_said_from_either_side(judge: Judge) -> None:
    said, turned = (judge.read(f"a {a} to the {side} of a {b}") for a, side, b in
                    (("fox", "left", "pear"), ("pear", "right", "fox")))  # fmt: skip
    mirrored = judge.read("a pear to the left of a fox")
    assert _compare(turned, said)["relation"] == 1
    assert _compare(mirrored, said) == pytest.approx(
        {"object": 1, "relation": 0, "colour": float("nan"), "style": float("nan")}, nan_ok=True
    )


def test_held_out_combinations_are_a_fifth_and_never_in_training() -> None:
    assert not any(world.held_out(scene) for scene in scenes(split="train"))
    assert all(world.held_out(scene) for scene in scenes(split="test"))
    triples = [
        world.held_out(world.Scene((name,), colour, style))
        for name in world.NAMES
        for colour in world.COLOURS
        for style in world.STYLES
    ]
    assert 0.15 < np.mean(triples) < 0.25


def test_prompt_sets_have_sixty_prompts_and_halves_that_share_none() -> None:
    folder = Path(world.__file__).parents[2] / "src/ipgo/prompt_sets"
    for name in ("one", "two", "styled"):
        train, test = ((folder / f"{name}.{half}.txt").read_text().splitlines() for half in ("train", "test"))
        assert len(set(train)) == len(set(test)) == 30
        assert not set(train) & set(test)


def test_the_shipped_vocabulary_is_that_of_the_world() -> None:
    package = Path(world.__file__).parents[2] / "src/ipgo/backends/emoji/vocabulary.json"
    shipped = json.loads(package.read_text())
    assert list(shipped["objects"]) == list(world.NAMES)
    assert shipped["colours"] == list(world.COLOURS)
