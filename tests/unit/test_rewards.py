"""Rewards: their contract, their names, their sums."""

import pytest
import torch

from ipgo.errors import InputError, RewardError
from ipgo.rewards import REWARDS, as_reward, check_reward, load_reward, score

IMAGES = torch.rand((3, 3, 8, 8), generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]


@pytest.mark.parametrize("name", ["colorfulness", "contrast"])
@pytest.mark.parametrize("count", [1, 3])
def test_pixel_rewards_keep_the_contract(name, count):
    reward = load_reward(name, device="cpu")
    images = IMAGES[:count].clone().requires_grad_()
    values = score(reward, images, PROMPTS[:count])
    assert reward.name == name
    assert reward.differentiable
    values.sum().backward()
    assert images.grad.isfinite().all()
    torch.testing.assert_close(values[0], score(reward, IMAGES[:1], PROMPTS[:1])[0])  # rows on their own


def test_colorfulness_is_that_of_its_paper():
    red, green, blue = (IMAGES[0] * 255).double()
    rg, yb = red - green, (red + green) / 2 - blue
    spread = (rg.std(correction=0) ** 2 + yb.std(correction=0) ** 2) ** 0.5
    expected = spread + 0.3 * (rg.mean() ** 2 + yb.mean() ** 2) ** 0.5
    value = load_reward("colorfulness", device="cpu")(IMAGES[:1], ["a"])
    assert value.item() * 255 == pytest.approx(expected.item(), rel=1e-5)


def test_flat_images_have_no_contrast_but_a_gradient():
    flat = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    for name in ("colorfulness", "contrast"):
        value = load_reward(name, device="cpu")(flat, ["a"])
        assert value.item() < 1e-5
        value.sum().backward()
    assert flat.grad.isfinite().all()


def test_half_black_half_white_has_contrast_one_half():
    images = torch.zeros(1, 3, 4, 4)
    images[..., :2] = 1
    assert load_reward("contrast", device="cpu")(images, ["a"]).item() == pytest.approx(0.5)


def test_a_weighted_sum():
    reward = load_reward("colorfulness+0.5*contrast", device="cpu")
    parts = [load_reward(name, device="cpu")(IMAGES, PROMPTS) for name in ("colorfulness", "contrast")]
    torch.testing.assert_close(reward(IMAGES, PROMPTS), parts[0] + 0.5 * parts[1])
    assert reward.name == "colorfulness+0.5*contrast"
    assert reward.differentiable


def test_a_reward_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def warmth(images, prompts):\n    return (images[:, 0] - images[:, 2]).mean((1, 2))\n")
    reward = load_reward(f"2*{file}:warmth", device="cpu")
    torch.testing.assert_close(reward(IMAGES, PROMPTS), 2 * (IMAGES[:, 0] - IMAGES[:, 2]).mean((1, 2)))
    with pytest.raises(InputError, match=r"unknown reward in .*'warmht'; did you mean 'warmth'"):
        check_reward(f"{file}:warmht")
    file.write_text("1 / 0")
    with pytest.raises(InputError, match="does not run: ZeroDivisionError"):
        check_reward(f"{file}:warmth")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("colourfulness", "unknown reward 'colourfulness'; did you mean 'colorfulness'"),
        ("x*contrast", "reward weight 'x'"),
        ("contrast+", "is empty"),
        ("nowhere.py:warmth", "'nowhere.py' does not exist"),
    ],
)
def test_wrong_specs_are_refused(spec, message):
    for load in (check_reward, load_reward):
        with pytest.raises(InputError, match=message):
            load(spec)


def test_the_bundled_names_are_there():
    assert {"emoji-clip", "emoji-aesthetic", "emoji-preference", "colorfulness", "contrast"} <= REWARDS.keys()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images, prompts: images.mean(), r"'mine' must return a tensor of shape \(3,\), not \(\)"),
        (lambda images, prompts: [0.0] * 3, r"'mine' must return a tensor of shape \(3,\), not list"),
        (
            lambda images, prompts: images.mean((1, 2, 3)) * float("nan"),
            "'mine' is not a finite number for 3 of 3",
        ),
    ],
)
def test_a_broken_reward_is_named(function, message):
    with pytest.raises(RewardError, match=message):
        score(as_reward(function, "mine"), IMAGES, PROMPTS)


def test_a_broken_image_is_not_the_rewards_fault():
    images = IMAGES.clone()
    images[1, 0, 0, 0] = float("nan")
    values = score(as_reward(lambda images, prompts: images.mean((1, 2, 3)), "mine"), images, PROMPTS)
    assert values.isnan().tolist() == [False, True, False]


def test_a_function_is_a_reward():
    def warmth(images, prompts):
        return images[:, 0].mean((1, 2))

    reward = as_reward(warmth)
    assert (reward.name, reward.differentiable) == ("warmth", True)
    assert as_reward(reward) is reward
    with pytest.raises(InputError, match="not int"):
        as_reward(3)
