from __future__ import annotations

from typing import Any

import pytest

from ipgo import Gain, Interval
from ipgo.report import charts
from ipgo.report.build import fallen, mood


def gain(reward: str, value: float, low: float, high: float, *, held_out: bool = True) -> Gain:
    interval = Interval(value, low, high, 9, "prompts")
    return Gain("ipgo", reward, held_out, 0.5, 0.5 + value, interval, interval)


def test_what_fell_while_the_reward_rose_is_said_and_how_surely() -> None:
    raised = gain("raised", 0.2, 0.1, 0.3, held_out=False)
    others = [gain("surely", -0.2, -0.3, -0.1), gain("perhaps", -0.1, -0.3, 0.1), gain("rose", 0.1, 0.0, 0.2)]
    found = {
        each.text: each.sure
        for each in fallen("raised", [raised, *others, gain("tiny", -1e-5, -1e-4, -1e-6)])
    }
    assert found == {"surely: 0.500 to 0.300": True, "perhaps: 0.500 to 0.400": False}
    assert fallen("raised", [gain("raised", -0.2, -0.3, -0.1, held_out=False), *others]) == []
    assert [mood(value) for value in (0.1, 1e-5, -0.1)] == ["good", "", "bad"]


def test_smooth_is_the_best_so_far_or_a_mean_over_the_seeds() -> None:
    assert charts.smooth([1.0, 3.0, None, 2.0], 1) == ("best so far", [1.0, 3.0, 3.0, 3.0])
    name, means = charts.smooth([1.0, 3.0, 5.0, None], 2)
    assert (name, means) == ("mean of 2 steps", [None, 2.0, 4.0, 5.0])


@pytest.mark.parametrize("rewards", [[], [1.0], [None, None, 2.0], [2.0, 2.0, 2.0], [1e-9, 2e-9], [1e6, 3e6]])
def test_curves_of_any_range(rewards: list[Any]) -> None:
    chart = charts.curve(rewards, rewards, None)
    assert "nan" not in chart
    assert "inf" not in chart
    assert chart.count("<svg") == (len([each for each in rewards if each is not None]) >= 2)


def test_points_in_the_corner_are_bad() -> None:
    chart = charts.scatter([(0.1, 0.2), (0.3, -0.2)])
    assert chart.count('class="good"') == chart.count('class="bad"') == 1
    assert charts.scatter([]) == ""
    assert "<svg" in charts.scatter([(0.0, 0.0)])
