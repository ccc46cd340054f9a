"""Evaluate adapters side by side: the same prompts and seeds, any rewards, win rates with intervals."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor
from tqdm import tqdm

from ipgo.adapters import Adapter, draw_batch, with_defaults
from ipgo.backends import Backend, as_they_were, load_backend
from ipgo.devices import own_numbers
from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError
from ipgo.prompts import check_prompts
from ipgo.rewards import Reward, RewardFunction, as_reward, identity_of, optimised, score_each
from ipgo.sampling import Sampling
from ipgo.seeding import check_seeds, plain

BATCH = 8  # images made at once
RESAMPLES = 2000  # of the bootstrap
NORMAL = 1.96  # the 97.5th percentile of the normal distribution
ALIKE = 6  # outcomes on one side, which chance would hardly give: twice 0.5**6 is below 0.05 (sign test)
VERDICT = "judge-"  # begins the names of scores that are verdicts, each in [0, 1]
ROUNDING = 1e-6  # of a reward's values, relative to their median size
logger = logging.getLogger("ipgo")


@dataclass(frozen=True)
class Score:
    """The value of one reward for one image. `held_out`: the method was not fitted to this reward."""

    method: str
    prompt: str
    seed: int
    reward: str
    value: float
    held_out: bool

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Score:
        """The inverse of `dataclasses.asdict`; `InputError` for something else."""
        try:
            return cls(**stored)
        except TypeError:
            raise InputError(f"stored scores are damaged: {str(stored)[:80]!r} is not a score") from None


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval over `n` prompts, or over the seeds of a single prompt.

    The bounds are percentiles of a bootstrap (Efron 1979), and as much farther from the estimate as `widening` says.

    Attributes:
        value: the estimate.
        low, high: the interval's bounds; NaN where n is 1.
        n: number of prompts or seeds that were resampled.
        over: "prompts" or "seeds": what was resampled.
    """

    value: float
    low: float
    high: float
    n: int
    over: str

    def bounds(self, form: str) -> str:
        """Its bounds in words, each in this format; '' where n is 1.

        Resampling says nothing about outcomes that are all the same: four wins of four are no certainty.
        """
        if math.isnan(self.low):
            return ""
        if self.low == self.high:
            return f"each of {self.n}"
        return f"{self.low:{form}} to {self.high:{form}}"

    def decided(self, even: float) -> bool:
        """Does it lie on one side of `even`? Where all outcomes are the same, there must be enough of them."""
        if self.low == self.high:
            return self.value != even and self.n >= ALIKE
        return self.low > even or self.high < even  # neither, if they are NaN


def widening(n: int) -> float:
    """By how much the distance of percentiles of a bootstrap from an estimate of n outcomes is too small.

    They are too near by sqrt((n - 1) / n), and by the normal distribution in place of Student's t (Hesterberg, The
    American Statistician 2015, section 5): of 4 outcomes without an effect 21% would be decided, of 20 8%.
    """
    return math.sqrt(n / (n - 1)) * float(stdtrit(n - 1, 0.975)) / NORMAL


@dataclass(frozen=True)
class Gain:
    """What a method did to a reward.

    Attributes:
        method, reward: their names.
        held_out: whether the reward is not part of the optimised one.
        before, after: means of the baseline's and the method's images, over prompts of the means over seeds.
        gain: after - before.
        wins: win rate over the baseline in [0, 1]; a tie counts as half a win.
    """

    method: str
    reward: str
    held_out: bool
    before: float
    after: float
    gain: Interval
    wins: Interval

    @property
    def flat(self) -> bool:
        """Does no image score better or worse than the baseline's?"""
        return self.gain.value == 0 and self.wins.value == 0.5 and not self.wins.low < 0.5


@dataclass(frozen=True)
class Drawing:
    """An image (3, H, W) in [0, 1] that a method made for a prompt from a seed."""

    method: str
    prompt: str
    seed: int
    image: Tensor


class Judge(Protocol):
    """Checks whether an image shows what its prompt states. It takes no part in a fit.

    Attributes:
        made: by the name of a reward, the marks that it is made of.
        identities: what decides each mark (`identity_of` of a reward), by its name.
    """

    made: ClassVar[Mapping[str, Sequence[str]]]

    @property
    def identities(self) -> Mapping[str, Any]: ...

    def marks(
        self, images: Tensor, prompts: Sequence[str], without: Collection[str] = ()
    ) -> Mapping[str, Tensor]:
        """(B,) in [0, 1] for "object", "colour", "likeness" and so on; NaN where the prompt states none.

        Args:
            without: marks that nobody looks at, and that may be left out.
        """
        ...


def draw(
    backend: Backend, adapters: Mapping[str, Adapter], prompt: str, seeds: Sequence[int], sampling: Sampling
) -> Iterator[Drawing]:
    """The images of one prompt: all seeds of the first adapter, then of the next.

    Batches never mix prompts, so an image does not depend on which other prompts are in a run. Where a GPU's memory is
    not enough for a batch, smaller ones are drawn: a fit that fits has room for one image.
    """
    size = BATCH
    check_prompts([prompt])
    check_seeds(seeds, distinct=False)
    backend.check_current()
    with own_numbers(), torch.no_grad():
        original = backend.encode([prompt])
    for method, adapter in adapters.items():
        left = list(seeds)
        while left:
            part = left[:size]
            images = _drawn(backend, prompt, part, adapter, sampling, original)
            if images is None:
                size = len(part) // 2
                continue
            left = left[size:]
            yield from (
                Drawing(method, prompt, seed, image) for seed, image in zip(part, images, strict=True)
            )


def _drawn(
    backend: Backend,
    prompt: str,
    seeds: Sequence[int],
    adapter: Adapter,
    sampling: Sampling,
    original: PromptEmbeds,
) -> Tensor | None:
    """Images (B, 3, H, W), one for each seed; None if they are too many for the memory."""
    prompts, states = [prompt] * len(seeds), original.repeated(len(seeds))
    try:
        with own_numbers(), torch.no_grad():
            return draw_batch(backend, prompts, seeds, adapter, sampling, states).float()
    except torch.OutOfMemoryError:
        if len(seeds) == 1:
            raise
        return None


def score_drawings(
    drawings: Sequence[Drawing],
    rewards: Mapping[str, Reward],
    own: Collection[str],
    judge: Judge | None = None,
) -> list[Score]:
    """Every reward's value, and the judge's verdicts as scores named judge-object, judge-colour, ...

    Args:
        own: the names of what was optimised, which is not held out.
    """
    scores = []
    made = judge.made if judge is not None else {}
    followed = {mark for name in own for mark in made.get(name, ())}  # what was optimised judges nothing
    for start in range(0, len(drawings), BATCH):
        part = drawings[start : start + BATCH]
        images, prompts = torch.stack([each.image for each in part]), [each.prompt for each in part]
        with own_numbers(), torch.no_grad():
            columns = score_each(rewards, images, prompts)
            verdicts = judge.marks(images, prompts, followed) if judge is not None else {}
        columns.update(
            {f"{VERDICT}{name}": marks for name, marks in verdicts.items() if name not in followed}
        )
        for name, column in columns.items():
            for each, value in zip(part, column.tolist(), strict=True):
                if not math.isnan(value):
                    scores.append(Score(each.method, each.prompt, each.seed, name, value, name not in own))
    return scores


def evaluate(
    backend: Backend,
    adapters: Mapping[str, Adapter],
    rewards: Mapping[str, Reward | RewardFunction],
    prompts: Sequence[str],
    seeds: Iterable[int],
    sampling: Sampling,
    trained_on: str,
    judge: Judge | None = None,
) -> list[Score]:
    """Score every adapter on every prompt and seed.

    Args:
        backend: what `load_backend` made, or takes.
        adapters: by method name; "raw" with `Adapter()` is the baseline that `summarise` expects.
        rewards: by name; functions as in `as_reward`.
        prompts: what is drawn, one after the other.
        seeds: noise seeds; every prompt is drawn from each.
        sampling: how images are sampled.
        trained_on: spec of the optimised reward; it and the rewards it is made of do not count as held out.
        judge: adds scores named judge-object, judge-colour, ...; None: none.

    Returns:
        One score per adapter, prompt, seed and reward, and the judge's verdicts.

    Raises:
        InputError: no prompts or seeds, or an adapter that was not fitted to one of the prompts.
        RewardError: a reward breaks its contract.
    """
    if isinstance(prompts, str):
        raise InputError(f"evaluate needs a list of prompts, not {prompts!r}")
    prompts, seeds = list(prompts), plain(seeds)
    if not len(prompts) or not seeds:
        raise InputError("evaluate needs at least one prompt and one seed")
    if not isinstance(backend, Backend):
        with as_they_were(backend):
            opened = load_backend(backend)
            return evaluate(opened, adapters, rewards, prompts, seeds, sampling, trained_on, judge)
    _, sampling = with_defaults(None, sampling)
    adapters = {name: with_defaults(adapter, sampling)[0] for name, adapter in adapters.items()}
    judges = {name: as_reward(reward, name) for name, reward in rewards.items()}
    own = optimised(trained_on, {name: identity_of(reward) for name, reward in judges.items()})
    scores = []
    count = len(prompts) * len(seeds) * len(adapters)
    with bar_of_images(count) as bar:
        for prompt in prompts:
            drawings = counted(draw(backend, adapters, prompt, seeds, sampling), bar)
            scores += score_drawings(drawings, judges, own, judge)
    return scores


def bar_of_images(count: int) -> tqdm[Any]:
    """A bar on a terminal, for `evaluate`; nothing elsewhere."""
    return tqdm(total=count, desc="evaluating", unit="image", disable=None, leave=False)


def counted(drawings: Iterable[Drawing], bar: tqdm[Any]) -> list[Drawing]:
    """All of them, each of which moves the bar."""
    found = []
    for drawing in drawings:
        found.append(drawing)
        bar.update()
    return found


def win_rate(scores: Iterable[Score], method: str, baseline: str, reward: str) -> Interval:
    """How often `method` scores above `baseline` on the same prompt and seed; a tie counts as half a win.

    The rate is the mean over prompts of the mean over seeds. Its `Interval` is over prompts, or over seeds if there is
    one prompt.

    Raises:
        InputError: the two methods share no prompt and seed.
    """
    pairs = _pairs(scores, method, baseline, reward)
    size = float(np.median([abs(value) for values in pairs.values() for pair in values for value in pair]))
    wins = [[_win(a, b, ROUNDING * size) for a, b in values] for values in pairs.values()]
    return _bootstrap(wins, share=True)


def _win(ours: float, theirs: float, rounding: float) -> float:
    """1, or 0; or 1/2 where they differ by no more than rounding, as the same picture drawn in another batch may."""
    if abs(ours - theirs) <= rounding:
        return 0.5
    return float(ours > theirs)


def average(scores: Iterable[Score], method: str, reward: str) -> Interval:
    """The mean over prompts of the mean over seeds, with an interval as in `win_rate`.

    Raises:
        InputError: the method has no value of this reward.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for each in scores:
        if (each.method, each.reward) == (method, reward):
            values[each.prompt].append(each.value)
    if not values:
        raise InputError(f"method {method!r} has no score of reward {reward!r}")
    return _bootstrap(list(values.values()), share=reward.startswith(VERDICT))


def unlike(gain: Gain, usual: Gain | None) -> str:
    """` over N prompts`, if this interval is over another sample than `usual`, as its table says; else ''."""
    own, said = ((each.gain.n, each.gain.over) for each in (gain, usual or gain))
    return "" if own == said else f" over {own[0]} {own[1]}"


def levels(scores: Sequence[Score]) -> dict[str, float]:
    """By reward: the mean of the raw images, as `average`."""
    names = dict.fromkeys(each.reward for each in scores if each.method == "raw")
    return {name: average(scores, "raw", name).value for name in names}


def summarise(
    scores: Sequence[Score], baseline: str = "raw", seeds: Collection[int] | None = None
) -> list[Gain]:
    """One `Gain` per method and reward, over all prompts.

    A reward that has no value of both on any image (a raw one may not be finite) is left out, with a warning.

    Args:
        scores: as from `evaluate`.
        baseline: the method that the others are compared with.
        seeds: the noise seeds whose scores count; None: all.

    Raises:
        InputError: the baseline is another than raw, and has no scores.
    """
    if baseline != "raw" and all(each.method != baseline for each in scores):
        raise InputError(f"there are no scores of the baseline {baseline!r}")
    chosen = [each for each in scores if seeds is None or each.seed in seeds]
    held_out = {(each.method, each.reward): each.held_out for each in chosen if each.method != baseline}
    gains = []
    for (method, reward), unseen in held_out.items():
        try:
            pairs = _pairs(chosen, method, baseline, reward)
        except InputError as error:
            logger.warning("%s: it is left out", error)
            continue
        means = [np.mean(values, axis=0) for values in pairs.values()]
        after, before = (float(column) for column in np.mean(means, axis=0))
        difference = _bootstrap([[a - b for a, b in values] for values in pairs.values()])
        gains.append(
            Gain(
                method, reward, unseen, before, after, difference, win_rate(chosen, method, baseline, reward)
            )
        )
    return gains


def _pairs(
    scores: Iterable[Score], method: str, baseline: str, reward: str
) -> dict[str, list[tuple[float, float]]]:
    """For each prompt the (method, baseline) values of the seeds that both have."""
    values: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for each in scores:
        if each.reward == reward and each.method in (method, baseline):
            values[each.prompt, each.seed][each.method] = each.value
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (prompt, _), found in values.items():
        if method in found and baseline in found:
            pairs[prompt].append((found[method], found[baseline]))
    if not pairs:
        raise InputError(
            f"methods {method!r} and {baseline!r} have no prompt and seed in common for reward {reward!r}"
        )
    return dict(pairs)


def _bootstrap(values: Sequence[Sequence[float]], *, share: bool = False) -> Interval:
    """Mean over prompts of the mean over seeds, with percentiles of the resampled means (Efron 1979), widened.

    Args:
        share: the values lie in [0, 1], and so do the bounds.
    """
    over = "prompts" if len(values) > 1 else "seeds"
    units = np.array([np.mean(each) for each in values] if over == "prompts" else values[0], dtype=float)
    n = len(units)
    if n < 2:
        return Interval(float(units.mean()), math.nan, math.nan, n, over)
    mean, draws = units.mean(), np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    bounds = mean + widening(n) * (np.quantile(units[draws].mean(axis=1), [0.025, 0.975]) - mean)
    low, high = bounds.clip(0, 1) if share else bounds
    return Interval(float(mean), float(low), float(high), n, over)
