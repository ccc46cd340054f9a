"""The world of the bundled model: captions say what is true, and the judge reads them as they are meant."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ipgo import InputError, cli, load_reward
from ipgo.images import from_pil
from ipgo.prompts import read_prompts
from ipgo.rewards import emoji
from ipgo.rewards.emoji.artwork import SPRITE
from ipgo.rewards.emoji.judge import Judge, Network, _compare, load_judge
from tools.emoji import follow, prompt_sets, world


@pytest.fixture(scope="module")
def judge() -> Judge:
    labels = {
        "objects": {name: list(words) for name, (_, words) in world.OBJECTS.items()},
        "colours": list(world.COLOURS),
        "styles": {name: list(words) for name, words in world.STYLES.items()},
        "relations": {name: list(words) for name, words in world.RELATION_WORDS.items()},
    }
    return Judge(Network([3, 64, 65, 10, 2, 1]), labels, load_judge().artwork)


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
        assert follow.claimed(scene, claims) == read, text


def test_a_relation_may_be_said_from_either_side(judge: Judge) -> None:
    said, turned = (judge.read(f"a {a} to the {side} of a {b}") for a, side, b in
                    (("fox", "left", "pear"), ("pear", "right", "fox")))  # fmt: skip
    mirrored = judge.read("a pear to the left of a fox")
    assert _compare(turned, said)["relation"] == 1
    assert _compare(mirrored, said) == pytest.approx(
        {"object": 1, "relation": 0, "colour": float("nan"), "style": float("nan")}, nan_ok=True
    )


def scene_of(judge: Judge, boxes: dict[tuple[str, str], tuple[int, int, int]]) -> torch.Tensor:
    """Sprites of the package's sheet on a teal background that grows lighter, put there by PIL: (1, 3, 64, 64)."""
    with Image.open(emoji.FOLDER / "artwork.png") as picture:
        sheet = picture.copy()
    ramp = np.linspace(-8, 8, 64)[:, None, None] + np.array([38.0, 152.0, 156.0])
    canvas = Image.fromarray(np.tile(ramp, (1, 64, 1)).round().astype(np.uint8)).convert("RGBA")
    for (name, style), (left, top, side) in boxes.items():
        x, y = judge.reader.objects.index(name) * SPRITE, judge.reader.styles.index(style) * SPRITE
        sprite = sheet.crop((x, y, x + SPRITE, y + SPRITE)).resize((side, side), Image.Resampling.LANCZOS)
        canvas.alpha_composite(sprite, (left, top))
    return from_pil(canvas)[None]


def test_what_is_named_twice_or_is_no_object_does_not_count(judge: Judge) -> None:
    assert judge.read("a fox on an orange background").objects == ("fox",)
    assert judge.read("an orange fox on a red background").objects == ("fox",)
    assert judge.read("an orange flat fox").objects == ("fox",)
    assert judge.read("an orange left of a fox").objects == ("orange", "fox")
    assert judge.read("orange, 3d").objects == ("orange",)
    assert judge.read("rose background, a fox").objects == ("fox",)
    assert judge.read("a red fox on a blue background, cute fox").objects == ("fox",)
    assert judge.read("a fox to the left of a fox").objects == ("fox", "fox")
    assert judge.read("a fox to the left of a pear, cute fox").placed
    assert not judge.read("a fox to the left of a pear and a lemon").placed


def test_likeness_is_one_for_the_artwork_wherever_it_stands(judge: Judge) -> None:
    for left, top, side in ((8, 8, 48), (10, 9, 44), (7, 7, 50)):
        picture = scene_of(judge, {("owl", "flat"): (left, top, side)})
        for prompt in ("an owl on a teal background, flat style", "an owl"):
            assert judge.likeness(picture, [prompt]).item() > 0.95
    pair = scene_of(judge, {("fox", "3d"): (2, 18, 28), ("pear", "3d"): (33, 19, 28)})
    assert judge.likeness(pair, ["a fox to the left of a pear, 3d"]).item() > 0.93
    assert judge.likeness(pair, ["a pear to the left of a fox, 3d"]).item() < 0.5
    large = torch.nn.functional.interpolate(pair, scale_factor=4)
    assert judge.likeness(large, ["a fox to the left of a pear, 3d"]).item() > 0.9


def test_a_picture_that_is_not_finite_is_not_judged(judge: Judge) -> None:
    images = torch.stack([torch.full((3, 64, 64), torch.nan), torch.zeros(3, 64, 64)])
    prompts = ["a fox on a red background, 3d style"] * 2
    for marks in (judge(images, prompts), *judge.marks(images, prompts).values()):
        if not marks[1].isnan():  # the prompt says nothing of a relation
            assert marks[0].isnan()


def test_likeness_falls_with_all_that_the_artwork_is_not(judge: Judge) -> None:
    picture = scene_of(judge, {("rabbit", "3d"): (8, 8, 48)})
    prompt = "a rabbit on a teal background, 3d style"

    def like(image: torch.Tensor, text: str = prompt) -> float:
        return judge.likeness(image.clamp(0, 1), [text]).item()

    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    spoilt = [like(picture + amount * noise) for amount in (0.0, 0.02, 0.05, 0.2)]
    assert spoilt == sorted(spoilt, reverse=True)
    assert spoilt[0] - spoilt[-1] > 0.3
    soft = torch.nn.functional.avg_pool2d(picture, 5, 1, 2, count_include_pad=False)
    assert like(soft) < 0.8
    no_ears = picture.clone()
    no_ears[..., 8:24, :] = picture[..., 2:3, :]
    assert like(no_ears) < like(picture) - 0.15
    assert like(picture, prompt.replace("rabbit", "cactus")) < 0.5
    assert like(scene_of(judge, {})) < 0.05
    assert judge.likeness(picture, ["something else"]).isnan().all()
    broken = picture.clone()
    broken[0, 0, 5, 5] = float("nan")
    assert judge.marks(broken, [prompt])["likeness"].isnan().all()
    assert judge.likeness(picture, ["a fox and a pear"]).isnan().all()  # who stands where?
    assert list(judge.marks(picture, [prompt])) == ["object", "colour", "style", "relation", "likeness"]
    assert "likeness" not in judge.marks(picture, [prompt], without={"likeness"})


def test_likeness_can_be_followed(judge: Judge) -> None:
    """Its gradient is that of finite differences, where the artwork stays in its place, and points to the artwork."""
    reward = load_reward("emoji-likeness", device="cpu")
    prompts = ["a rabbit on a teal background, 3d style", "a fox left of a pear"]
    whole = scene_of(judge, {("rabbit", "3d"): (8, 8, 48)})
    pair = scene_of(judge, {("fox", "3d"): (2, 18, 28), ("pear", "3d"): (33, 19, 28)})
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = (torch.cat([whole, pair]) * 0.8 + 0.1 + 0.05 * noise).requires_grad_()
    values = reward(images, prompts)
    torch.testing.assert_close(values.detach(), judge.likeness(images.detach(), prompts))
    (slope,) = torch.autograd.grad(values.sum(), images)
    step = 1e-2 * slope / slope.norm()
    up, down = (reward(images.detach() + sign * step, prompts).sum() for sign in (1, -1))
    assert (up - down).item() == pytest.approx(2e-2 * slope.norm().item(), rel=0.1)
    target = torch.cat([whole, pair])
    assert (
        torch.nn.functional.cosine_similarity(
            slope[0].flatten(), (target - images.detach())[0].flatten(), dim=0
        )
        > 0.1
    )
    alone = torch.stack([reward(images[row : row + 1], prompts[row : row + 1])[0] for row in (0, 1)])
    torch.testing.assert_close(alone, values)


def test_likeness_without_a_style_is_the_better_ones_and_broken_pictures_cost_the_others_nothing(
    judge: Judge,
) -> None:
    reward = load_reward("emoji-likeness", device="cpu")
    flat = scene_of(judge, {("rabbit", "flat"): (8, 8, 48)})
    unsaid, said, other = reward(
        flat.repeat(3, 1, 1, 1), ["a rabbit", "a rabbit, flat style", "a rabbit, 3d style"]
    )
    assert unsaid == said > other + 0.1
    both = torch.cat([flat, torch.full_like(flat, torch.inf)]).requires_grad_()
    values = reward(both, ["a rabbit"] * 2)
    assert values[0] == said
    assert values[1].isnan()
    assert torch.autograd.grad(values[0], both)[0][0].isfinite().all()


def test_likeness_says_which_prompts_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for prompt, why in (
        ("a dragon on a hill", "names no object that there is"),
        ("a fox and a pear", "does not say how its objects stand: of two"),
    ):
        with pytest.raises(InputError, match=f"prompt '{prompt}' {why}"):
            load_reward("emoji-likeness")(torch.rand(1, 3, 64, 64), [prompt])
        words = ["fit", prompt, "--reward", "emoji-clip+0.5*emoji-likeness", "--out", str(tmp_path / "run")]
        assert cli.main(words) == 2
        assert "compares with artwork" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


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


def test_the_shipped_prompts_are_those_of_the_tool_and_test_halves_show_nothing_that_was_trained(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = Path(world.__file__).parents[2] / "src/ipgo/prompt_sets"
    monkeypatch.setattr(prompt_sets, "FOLDER", tmp_path)
    prompt_sets.build()
    for file in tmp_path.iterdir():
        assert file.read_text() == (shipped / file.name).read_text()
    for half in ("train", "test"):
        said = [
            judge.read(text) for kind in ("one", "two", "styled") for text in read_prompts(f"{kind}:{half}")
        ]
        whole = [each for each in said if len(each.objects) == 2 or each.style is not None]
        scenes = [world.Scene(each.objects, str(each.colour), str(each.style)) for each in whole]
        assert len(whole) > 60
        assert [world.held_out(scene) for scene in scenes] == [half == "test"] * len(scenes)


def test_the_shipped_vocabulary_is_that_of_the_world() -> None:
    package = Path(world.__file__).parents[2] / "src/ipgo/backends/emoji/vocabulary.json"
    shipped = json.loads(package.read_text())
    assert list(shipped["objects"]) == list(world.NAMES)
    assert shipped["colours"] == list(world.COLOURS)
