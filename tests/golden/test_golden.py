"""What the shipped weights said when they were shipped: four pictures' rewards, and the first steps of a fit.

New weights want new values, and a look at the difference: `python tests/golden/test_golden.py`. Where a reward of the
same weights gives other values, count up the `version` of its identity.
"""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ipgo
from ipgo.config import DEFAULT_REWARD
from ipgo.images import from_pil, to_pil
from ipgo.models import BUNDLED_REWARDS
from ipgo.rewards.emoji import load_judge
from ipgo.training import maximize

HERE = Path(__file__).parent
VALUES = HERE / "values.json"
REWARDS = (*BUNDLED_REWARDS, "emoji-likeness")
PROMPTS = (
    "a lemon on a blue background",
    "a fox on a white background, flat style",
    "a star to the left of a pear on a pink background",
    "a clock, 3d style, blurry",
)


def pictures() -> torch.Tensor:
    """The stored ones, (4, 3, 64, 64)."""
    return torch.stack([from_pil(Image.open(HERE / f"{number}.png")) for number in range(len(PROMPTS))])


@functools.cache
def rewards() -> dict[str, Any]:
    """What every bundled reward and the judge say of the stored pictures."""
    found: dict[str, Any] = {
        name: ipgo.load_reward(name, device="cpu")(pictures(), PROMPTS).tolist() for name in REWARDS
    }
    seen = load_judge(torch.device("cpu")).verdict(pictures())
    return found | {"judge": [f"{' and '.join(each.objects)}, {each.colour}, {each.style}" for each in seen]}


def history() -> list[list[float]]:
    """The rewards of two prompts in the first five steps of the default fit."""
    backend = ipgo.load_backend("emoji", device="cpu")
    reward = ipgo.load_reward(DEFAULT_REWARD, device="cpu")
    task = ipgo.Task(backend, reward, PROMPTS[:2], ipgo.Sampling().fitting)
    method = ipgo.IPGO()
    adapter = ipgo.InsertionAdapter.start(backend, task.prompts, method.insertion, seed=0, shared=False)
    walk = maximize(task, adapter, method.ascent)
    return [next(walk).rewards.tolist() for _ in range(5)]


@pytest.mark.parametrize("name", [*REWARDS, "judge"])
def test_rewards_of_stored_pictures(name: str) -> None:
    expected = json.loads(VALUES.read_text())["rewards"][name]
    found = rewards()[name]
    assert found == expected if name == "judge" else found == pytest.approx(expected, rel=1e-3)


def test_the_first_steps_of_a_fit() -> None:
    expected = json.loads(VALUES.read_text())["history"]
    torch.testing.assert_close(torch.tensor(history()), torch.tensor(expected), rtol=1e-3, atol=0)


def write() -> None:
    """Draw the pictures anew, and store what is said of them."""
    backend = ipgo.load_backend("emoji", device="cpu")
    drawn = ipgo.generate(backend, PROMPTS, range(len(PROMPTS)), ipgo.Adapter(), ipgo.Sampling())
    for number, picture in enumerate(to_pil(drawn)):
        picture.save(HERE / f"{number}.png")
    VALUES.write_text(json.dumps({"rewards": rewards(), "history": history()}, indent=1) + "\n")


if __name__ == "__main__":
    write()
