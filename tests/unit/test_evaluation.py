from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ipgo import InputError, Score, as_reward, load_reward, summarise, win_rate
from ipgo.adapters import Adapter, generate
from ipgo.backends import Backend
from ipgo.embeds import PromptEmbeds
from ipgo.evaluation import (
    Drawing,
    Interval,
    _bootstrap,
    average,
    draw,
    evaluate,
    levels,
    score_drawings,
    widening,
)
from ipgo.printed import table
from ipgo.rewards import optimised
from ipgo.rewards.spec import read_terms
from ipgo.sampling import Sampling


def scores(values: dict[str, list[tuple[float, float]]], reward: str = "r") -> list[Score]:
    """{"prompt": [(ours, raw), ...]} with one pair a seed."""
    found = []
    for prompt, pairs in values.items():
        for seed, (ours, raw) in enumerate(pairs):
            found.append(Score("ipgo", prompt, seed, reward, ours, False))
            found.append(Score("raw", prompt, seed, reward, raw, False))
    return found


def test_win_rate_is_a_mean_over_prompts_of_means_over_seeds() -> None:
    table = scores({"a": [(2, 1), (2, 1), (1, 2), (1, 1)], "b": [(5, 0)]})
    rate = win_rate(table, "ipgo", "raw", "r")
    assert rate.value == pytest.approx((2.5 / 4 + 1) / 2)
    assert rate.n == 2
    assert (rate.low, rate.high) == (0, 1)  # two prompts say little
    assert rate == win_rate(table, "ipgo", "raw", "r")


def test_interval_of_a_sure_thing_and_of_one_prompt() -> None:
    sure = win_rate(scores({str(n): [(1, 0)] for n in range(20)}), "ipgo", "raw", "r")
    assert (sure.low, sure.value, sure.high, sure.n, sure.over) == (1, 1, 1, 20, "prompts")
    alone = win_rate(scores({"a": [(1, 0), (0, 1), (1, 1)]}), "ipgo", "raw", "r")
    assert (alone.value, alone.n, alone.over) == (0.5, 3, "seeds")
    assert alone.low == 0
    image = win_rate(scores({"a": [(1, 0)]}), "ipgo", "raw", "r")
    assert image.value == 1
    assert math.isnan(image.low)


def test_interval_has_its_coverage() -> None:
    half = win_rate(scores({str(n): [(n % 2, 0.5)] for n in range(100)}), "ipgo", "raw", "r")
    assert half.value == 0.5
    assert half.high - half.low == pytest.approx(2 * 1.96 * 0.05, rel=0.1)  # of a mean of 100 coin throws


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=4),
        min_size=1,
        max_size=4,
    )
)
def test_wins_of_both_sides_add_to_one(pairs: list[list[tuple[float, float]]]) -> None:
    table = scores({str(number): pair for number, pair in enumerate(pairs)})
    ours, theirs = win_rate(table, "ipgo", "raw", "r"), win_rate(table, "raw", "ipgo", "r")
    assert ours.value + theirs.value == pytest.approx(1)


def test_summarise_by_reward_and_seed() -> None:
    table = scores({"a": [(2, 1), (0, 4)], "b": [(3, 1), (1, 1)]}) + scores({"a": [(1, 3)]}, "held")
    gains = {gain.reward: gain for gain in summarise(table, seeds=[0])}
    assert (gains["r"].before, gains["r"].after, gains["r"].gain.value) == (1, 2.5, 1.5)
    assert gains["held"].gain.value == -2
    assert gains["held"].wins.value == 0
    everything = summarise(table)[0]
    assert everything.gain.value == pytest.approx(((1 - 4) / 2 + (2 + 0) / 2) / 2)
    assert summarise([each for each in table if each.method == "raw"]) == []


def test_an_average_is_a_mean_over_prompts_of_means_over_seeds_of_one_reward() -> None:
    table = scores({"a": [(100, 1), (100, 2), (100, 3)], "b": [(100, 6)]})
    table.append(Score("raw", "a", 0, "other", 50.0, True))
    found = average(table, "raw", "r")
    assert (found.value, found.n, found.over) == (4.0, 2, "prompts")
    assert levels(table) == {"r": 4.0, "other": 50.0}


class Sharp:
    """A judge of two marks, of which the reward "sharpness" is made of one."""

    made: ClassVar = {"sharpness": ("edges",)}
    identities: ClassVar = {}

    def marks(
        self, images: torch.Tensor, prompts: Sequence[str], without: Collection[str] = ()
    ) -> dict[str, torch.Tensor]:
        return {"edges": images.mean((1, 2, 3)), "object": torch.ones(len(images))}


def test_a_mark_that_was_followed_judges_nothing() -> None:
    drawings = [Drawing("ipgo", "a fox", 0, torch.rand(3, 8, 8))]
    for spec, expected in (
        ("contrast", {"judge-edges", "judge-object"}),
        ("contrast+0.5*sharpness", {"judge-object"}),
        ("sharpness<=0.9", {"judge-object"}),
    ):
        own = {each.name for each in read_terms(spec)}
        assert {each.reward for each in score_drawings(drawings, {}, own, Sharp())} == expected


class Small(nn.Module):
    """Stands in for `draw_batch` on a card that has memory for two images."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.asked = most, list[int]()

    def forward(self, _: object, prompts: Sequence[str], seeds: Sequence[int], *__: object) -> torch.Tensor:
        self.asked.append(len(seeds))
        if len(seeds) > self.most:
            raise torch.OutOfMemoryError("no more")
        return torch.tensor([float(seed) for seed in seeds]).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def test_a_prompt_is_encoded_once_for_all_its_images(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, encoded = backend.encode, list[str]()

    def counting(prompts: Sequence[str]) -> PromptEmbeds:
        encoded.extend(prompts)
        return whole(prompts)

    monkeypatch.setattr(backend, "encode", counting)
    both, sampling = {"raw": Adapter(), "again": Adapter()}, Sampling(2, 3.0)
    found = list(draw(backend, both, "a fox", range(9), sampling))
    assert len(found) == 18
    assert encoded.count("a fox") == 1
    expected = generate(backend, ["a fox"] * 9, range(9), sampling=sampling)
    torch.testing.assert_close(torch.stack([each.image for each in found[:9]]), expected)


def test_an_evaluation_takes_what_generate_takes(backend: Backend) -> None:
    """A pipeline object, and None for prompts as they are and the usual sampling; nothing of another type."""
    rewards, rest = {"contrast": load_reward("contrast", device="cpu")}, (["a fox"], [0])
    ours = evaluate(backend, {"raw": Adapter()}, rewards, *rest, Sampling(2), "contrast")
    assert evaluate(backend.pipe, {"raw": None}, rewards, *rest, Sampling(2), "contrast") == ours  # type: ignore[arg-type,dict-item]
    with pytest.raises(InputError, match="adapter is 3; it must be of the type Adapter"):
        evaluate(backend, {"raw": 3}, rewards, *rest, Sampling(2), "contrast")  # type: ignore[dict-item]
    with pytest.raises(InputError, match="sampling is 3; it must be of the type Sampling"):
        evaluate(backend, {"raw": Adapter()}, rewards, *rest, 3, "contrast")  # type: ignore[arg-type]


def test_where_memory_is_short_smaller_batches_are_drawn(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, both = Small(2), {"raw": Adapter(), "ipgo": Adapter()}
    monkeypatch.setattr("ipgo.evaluation.draw_batch", small)
    found = list(draw(backend, both, "a fox", range(7), Sampling()))
    assert [(each.method, each.seed) for each in found] == [(m, s) for m in both for s in range(7)]
    assert all((each.image == each.seed).all() for each in found)
    assert small.asked[:3] == [7, 3, 1]  # then what was found to fit
    assert max(small.asked[3:]) <= 2
    monkeypatch.setattr("ipgo.evaluation.draw_batch", Small(0))
    with pytest.raises(torch.OutOfMemoryError):
        list(draw(backend, both, "a fox", range(7), Sampling()))


def test_a_tie_is_one_of_any_scale() -> None:
    for scale in (1e-9, 1.0, 1e6):
        wins = [
            (scale * 1.001, scale),
            (scale, scale * (1 + 1e-8)),
            (scale, -1e9 * scale),
        ]  # one is a penalty
        assert win_rate(scores({"a": wins}), "ipgo", "raw", "r").value == pytest.approx((1 + 0.5 + 1) / 3)


def test_a_reward_without_a_pair_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """The raw image of the only prompt may not be finite."""
    table = [*scores({"a": [(2, 1)]}), Score("ipgo", "a", 0, "lost", 1.0, True)]
    assert [gain.reward for gain in summarise(table)] == ["r"]
    assert "no prompt and seed in common for reward 'lost': it is left out" in caplog.text
    with pytest.raises(InputError, match="there are no scores of the baseline 'draft'"):
        summarise(table, baseline="draft")


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(InputError, match="have no prompt and seed in common"):
        win_rate(scores({"a": [(1, 0)]}), "draft", "raw", "r")


def test_what_a_reward_is_made_of_is_not_held_out() -> None:
    spec = "contrast+0.1*colorfulness<=3"
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    drawings = [Drawing(name, "a fox", 0, image) for name in ("raw", "ipgo")]
    names = (spec, "contrast", "colorfulness", "clip")
    rewards = {name: as_reward(lambda images, _: images.mean((1, 2, 3)), name) for name in names}
    found = {each.reward: each.held_out for each in score_drawings(drawings, rewards, optimised(spec))}
    assert found == {spec: False, "contrast": False, "colorfulness": False, "clip": True}
    assert optimised("<lambda>") == {"<lambda>"}
    assert optimised("clip:/mine") == {"clip:/mine"}  # other weights
    assert optimised("clip@notebook<=0.3") == {"clip@notebook<=0.3", "clip@notebook", "clip"}


def test_an_evaluation_knows_the_optimised_reward_under_another_name(backend: Backend) -> None:
    contrast, colour = (load_reward(name, device="cpu") for name in ("contrast", "colorfulness"))
    rewards = {"contrast": contrast, "mine": as_reward(contrast, "mine"), "colorfulness": colour}
    found = evaluate(backend, {"raw": Adapter()}, rewards, ["a"], [0], Sampling(steps=1), "contrast")
    assert {each.reward: each.held_out for each in found} == {
        "contrast": False, "mine": False, "colorfulness": True
    }  # fmt: skip


def test_an_evaluation_is_the_same_in_any_default_format(backend: Backend) -> None:
    seen = []

    def kind(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        seen.append(torch.get_default_dtype())
        return images.mean((1, 2, 3))

    torch.set_default_dtype(torch.float64)
    try:
        evaluate(backend, {"raw": Adapter()}, {"kind": kind}, ["a"], [0], Sampling(steps=1), "contrast")
    finally:
        torch.set_default_dtype(torch.float32)
    assert set(seen) == {torch.float32}


def test_an_interval_over_something_else_than_the_others_says_so() -> None:
    gains = summarise(scores({"a": [(2, 1)], "b": [(3, 1)]}) + scores({"a": [(1, 3)] * 2}, "some"))
    head, first, second, *_ = table(gains).splitlines()
    assert "95% over 2 prompts" in head
    assert " over " not in first
    assert " over 2 seeds" in second


def test_outcomes_that_are_all_the_same_have_no_interval() -> None:
    assert Interval(1.0, 1.0, 1.0, 4, "seeds").bounds(".0%") == "each of 4"
    assert Interval(0.75, 0.5, 1.0, 4, "seeds").bounds(".0%") == "50% to 100%"
    assert Interval(1.0, math.nan, math.nan, 1, "seeds").bounds(".0%") == ""


@pytest.mark.parametrize("n", [2, 3, 4, 6, 8, 20])
def test_an_interval_holds_the_truth_in_95_cases_of_100(n: int) -> None:
    """Percentiles alone miss it in one of two where n is 2."""
    source, cases = np.random.default_rng(n), 400
    found = [_bootstrap([[value] for value in source.normal(size=n)]) for _ in range(cases)]
    missed = sum(each.low > 0 or each.high < 0 for each in found) / cases
    assert missed < 0.09
    assert missed == sum(each.decided(0) for each in found) / cases
    bare = sum(_percentiles(each)[0] > 0 or _percentiles(each)[1] < 0 for each in found) / cases
    assert {4: 0.17 < bare < 0.25, 20: 0.05 < bare < 0.11}.get(n, bare > 0.05)  # as `widening` says


def _percentiles(found: Interval) -> tuple[float, float]:
    """The bounds before they were widened."""
    low, high = ((bound - found.value) / widening(found.n) for bound in (found.low, found.high))
    return found.value + low, found.value + high


def test_a_share_stays_one() -> None:
    rate = win_rate(scores({str(n): [(n > 0, 0.5)] for n in range(10)}), "ipgo", "raw", "r")
    assert 0.6 < rate.low < 0.7 < rate.value < rate.high == 1
    seen = [Score("raw", str(n), 0, "judge-object", float(n > 0), True) for n in range(10)]
    assert average(seen, "raw", "judge-object") == rate
    other = average([replace(each, reward="r") for each in seen], "raw", "r")
    assert (other.low, other.value) == (rate.low, rate.value)
    assert other.high > 1  # another reward may have such values


def test_few_outcomes_that_are_all_the_same_decide_nothing() -> None:
    assert not Interval(1.0, 1.0, 1.0, 5, "seeds").decided(0.5)
    assert Interval(1.0, 1.0, 1.0, 6, "seeds").decided(0.5)
    assert Interval(-0.1, -0.18, -0.01, 40, "prompts").decided(0)
    assert not Interval(0.2, 0.2, 0.2, 5, "prompts").decided(0)
    assert not Interval(-0.1, -0.2, 0.01, 40, "prompts").decided(0)
    assert not Interval(1.0, math.nan, math.nan, 1, "seeds").decided(0.5)


def test_a_flat_reward_is_seen_on_one_image_too() -> None:
    for pairs, flat in (
        ([(1, 1)], True),
        ([(1, 1), (1, 1)], True),
        ([(2, 1)], False),
        ([(0, 1), (2, 1)], False),
    ):
        (gain,) = summarise(scores({"a": pairs}))
        assert gain.flat == flat
