"""Gather a run's numbers and pictures, and put them into the page."""

from __future__ import annotations

import base64
import functools
import io
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from ipgo.artefacts import load_drawn_by, load_identities, load_scores
from ipgo.continuing import differing_in
from ipgo.errors import InputError
from ipgo.evaluation import VERDICT, Gain, Interval, Score, levels, summarise, unlike
from ipgo.images import as_png, reading
from ipgo.prompts import Prompt
from ipgo.report import charts
from ipgo.rewards.checkpoints import fingerprint
from ipgo.settings import flatten
from ipgo.store import EVALUATION, Run

logger = logging.getLogger("ipgo")
Curve = tuple[str, list[float | None], list[float | None], float | None]
VISIBLE = 0.0005  # the page shows three digits
MOST = 100  # prompts whose pictures are shown: the page is one file
LARGEST = 512  # pixels; larger images are shown smaller, so that the page stays light


@dataclass(frozen=True)
class Pair:
    """Before and after from one seed: data URIs, and the optimised reward's values."""

    seed: int
    fitted: bool
    before: str
    after: str | None
    values: tuple[float | None, float | None]


@dataclass(frozen=True)
class Card:
    """What the page shows of one prompt."""

    prompt: str
    failed: bool
    pairs: list[Pair]
    curve: Markup
    gains: list[Gain]


def write_report(run: Run) -> tuple[Path, Path]:
    """Write report.html and curve.png into the run's folder; what is unfinished is left out."""
    curve = _mean_curve(run)
    page = run.write("report.html", render(run, curve))
    name, rewards, bold, before = curve
    return page, run.write("curve.png", charts.curve_png(rewards, bold, name, run.config.reward, before))


def render(run: Run, curve: Curve | None = None) -> str:
    """The page as text.

    Args:
        curve: what `_mean_curve` returns of this run, if that is known.
    """
    config, results, scores = run.config, run.results(), run.scores()
    seeds = _judging(run, config.new_seeds)  # of what it is worth
    fitted, unseen = _gains(run, scores)
    later = run.with_held_out(load_scores(run.path / EVALUATION))
    scored_by = load_identities(run.path / EVALUATION)
    name, rewards, bold, before = curve or _mean_curve(run)
    prompts = {
        prompt.text: prompt for prompt in run.prompts
    }  # another process may go on with the run meanwhile
    template = environment().get_template("page.html.j2")
    return template.render(
        title=config.prompts[0] if len(config.prompts) == 1 else f"{len(config.prompts)} prompts",
        config=config,
        summary=summary(run, fitted, unseen),
        fallen=fallen(config.reward, unseen or fitted),
        noise="unseen" if unseen else "fitted",
        rows=_rows(fitted, unseen),
        later=_later(run, later),
        later_strange=run.strange(scored_by),
        later_differs=differing_in(run.drawn_by, load_drawn_by(run.path / EVALUATION) or {}),
        curve=charts.curve(rewards, bold, before),
        curve_name=name,
        before=before is not None,
        scatters=_scatters(scores, config.reward, seeds),
        cards=[_card(run, prompts[result["prompt"]], result) for result in results[:MOST]],
        done=len(results),
        cost=run_cost(run),
        settings=_settings(run),
        facts=run.facts,
        scorers={name: fingerprint(identity) for name, identity in run.identities.items()},
        missing=len(run.judged) - len(results),
    )


def verdict(run: Run) -> str:
    """The result in words, and what surely fell meanwhile, for a terminal."""
    fitted, unseen = _gains(run, run.scores())
    fell = [each.text for each in fallen(run.config.reward, unseen or fitted) if each.sure]
    hint = (
        f" Look twice: held-out measures fell, by more than chance explains in 19 of 20 cases ({'; '.join(fell)})."
        if fell
        else ""
    )
    return summary(run, fitted, unseen) + hint


def _gains(run: Run, scores: Sequence[Score]) -> tuple[list[Gain], list[Gain]]:
    """On the fitted noise, and on unseen noise unless that is the same."""
    seeds = _judging(run, run.config.new_seeds)
    return (
        summarise(scores, seeds=run.config.seeds),
        summarise(scores, seeds=seeds) if seeds != run.config.seeds else [],
    )


def _judging(run: Run, unseen: Sequence[int]) -> Sequence[int]:
    """The seeds that say what a result is worth: unseen ones, unless on these it changes nothing."""
    return unseen if unseen and run.transfers != "nothing" else run.config.seeds


def _later(run: Run, scores: Sequence[Score]) -> list[dict[str, Any]]:
    """What was judged again: the prompts of the run on further noise and on its own, and those that are new to it."""
    prompts, seeds = set(run.config.prompts), set(run.config.seeds)
    rewards: dict[tuple[str, str, str], list[Score]] = {}
    for each in scores:
        kind = "fitted" if each.prompt in prompts else "never fitted"
        noise = "fitted" if each.prompt in prompts and each.seed in seeds else "further"
        rewards.setdefault((kind, noise, each.reward), []).append(each)
    parts: dict[tuple[str, str, tuple[tuple[str, int], ...]], list[Score]] = {}
    for (kind, noise, _), own in rewards.items():  # rewards of the same images go together
        images = tuple(sorted({(each.prompt, each.seed) for each in own}))
        parts.setdefault((kind, noise, images), []).extend(own)
    return [
        {
            "title": kind,
            "noise": noise,
            "prompts": len({each.prompt for each in part}),
            "seeds": len({each.seed for each in part}),
            "gains": summarise(part),
            "levels": levels(part) if run.config.method_name == "raw" else {},
        }
        for (kind, noise, _), part in sorted(parts.items(), key=lambda part: part[0][:2], reverse=True)
    ]


def _settings(run: Run) -> dict[str, Any]:
    """By their flags; what was left to the backend with what that was."""
    found = {key: value for key, value in flatten(run.config.to_json()).items() if key != "prompts"}
    if found["sampling.guidance_scale"] is None and "guidance_scale" in run.facts:
        found["sampling.guidance_scale"] = f"{run.facts['guidance_scale']:g} (the backend's own)"
    return found


@functools.cache  # the studio fills a template at every step
def environment(package: str = "ipgo.report") -> Environment:
    """The templates of a package, which escape whatever is put into them."""
    made = Environment(
        loader=PackageLoader(package, "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    made.filters |= {"signed": "{:+.3f}".format, "percent": "{:.0%}".format}
    made.filters |= {"mood": mood, "sure": sure, "unlike": unlike}
    return made


def mood(gain: float) -> str:
    """The CSS class of a gain: good, bad, or none where three digits show no change."""
    return "" if abs(gain) < VISIBLE else "good" if gain > 0 else "bad"


def sure(change: Interval, even: float = 0) -> str:
    """The mood of a mean, none where its interval leaves open on which side of `even` it lies."""
    return mood(change.value - even) if change.decided(even) else ""


def summary(run: Run, fitted: Sequence[Gain], unseen: Sequence[Gain]) -> str:
    """The result in words: on the noise it was fitted to, on noise it was not, and to the judge's eye."""
    reward = run.config.reward
    titled = (("the fitted noise", fitted), ("unseen noise", unseen))
    found = [(title, gain) for title, gains in titled if (gain := _of(gains, reward)) is not None]
    done = run.results()
    failed = sum(result["status"] == "failed" for result in done)
    if not done:
        return "No prompt is finished yet."
    if not found:
        return _as_they_are(run)
    if failed == len(done) and not _learned(run):
        return (
            f"Nothing was learned: {reward} or its gradient was never finite. What is shown after the fit is what it "
            "began with."
        )
    text, last = run.config.method_name.upper(), ""
    for title, gain in found:
        moved = f"{gain.before:.3f}" != f"{gain.after:.3f}"
        verb = "left" if not moved else "raised" if gain.gain.value > 0 else "lowered"
        start = " and" if verb == last else f"{' but' if last else ''} {verb} {'it' if last else reward}"
        where = f"from {gain.before:.3f} to {gain.after:.3f}" if moved else f"at {gain.before:.3f}"
        text += f"{start} {where} on {title}"
        last = verb
    title, last_gain = found[-1]
    if last_gain.flat:
        text += f". On {title} no image is better or worse than the raw prompt's."
    else:
        text += f". It beats the raw prompt in {last_gain.wins.value:.0%} of the images on {title}."
    judged = _of(unseen or fitted, "judge-object")
    if judged is not None:
        text += f" An independent judge finds the object in {judged.before:.0%} of the images before and in"
        text += f" {judged.after:.0%} after."
    if failed:
        text += (
            f" {failed} of {len(done)} prompts were given up, since {reward} or its gradient was not finite, and are "
            "counted as far as they came."
        )
    if run.transfers == "nothing":
        text += " What was learned belongs to the noise of its seed: on other noise it changes nothing."
    return text


def _learned(run: Run) -> bool:
    """Was there a step with a reward and a gradient that are finite?"""
    prompts = run.prompts[:1] if run.config.shared else run.finished
    steps = [(line["reward"], line["grad_norm"]) for prompt in prompts for line in run.history(prompt)]
    return any(None not in step and math.isfinite(step[1]) for step in steps)


def _as_they_are(run: Run) -> str:
    """The mean rewards of a run whose method changes nothing."""
    words = ", ".join(f"{name} {value:.3f}" for name, value in levels(run.scores()).items())
    return f"The prompts as they are, since the method changes nothing: {words}."


@dataclass(frozen=True)
class Fallen:
    """A held-out reward that fell while the optimised one rose; `sure` if that is decided (`Interval.decided`)."""

    text: str
    sure: bool


def fallen(reward: str, gains: Sequence[Gain]) -> list[Fallen]:
    """What may be the price of the gain; a sure fall is what reward hacking looks like."""
    own = _of(gains, reward)
    if own is None or own.gain.value <= 0:
        return []
    return [
        Fallen(f"{each.reward}: {each.before:.3f} to {each.after:.3f}", each.gain.decided(0))
        for each in gains
        if each.held_out and each.gain.value <= -VISIBLE
    ]


def _of(gains: Sequence[Gain], reward: str) -> Gain | None:
    return next((gain for gain in gains if gain.reward == reward), None)


def _rows(fitted: Sequence[Gain], unseen: Sequence[Gain]) -> list[dict[str, Any]]:
    """One for each reward, the optimised one first."""
    names = dict.fromkeys(gain.reward for gain in (*unseen, *fitted))
    rows = [{"name": name, "fitted": _of(fitted, name), "unseen": _of(unseen, name)} for name in names]
    return sorted(rows, key=lambda row: (row["unseen"] or row["fitted"]).held_out)


def _card(run: Run, prompt: Prompt, result: dict[str, Any]) -> Card:
    scores = run.scores_of(result)
    values = {
        (each.method == "raw", each.seed): each.value for each in scores if each.reward == run.config.reward
    }
    seeds = [*result["seeds"], *result["unseen_seeds"]]
    pairs = [
        Pair(
            seed,
            seed in result["seeds"],
            picture_uri(run.image_file(prompt, "before", seed)) or "",
            picture_uri(run.image_file(prompt, "after", seed)),
            (values.get((True, seed)), values.get((False, seed))),
        )
        for seed in seeds
    ]
    curve = Markup("") if run.config.shared else charts.curve(*_curve(run, prompt, values))
    gains = summarise(scores, seeds=_judging(run, result["unseen_seeds"]))
    return Card(prompt.text, result["status"] == "failed", pairs, curve, gains)


def _curve(
    run: Run, prompt: Prompt, values: dict[tuple[bool, int], float]
) -> tuple[charts.Values, charts.Values, float | None]:
    history = run.history(prompt)
    raw = [values[True, seed] for seed in run.config.seeds if (True, seed) in values]
    return [line["reward"] for line in history], charts.so_far(history)[1], _before(run, raw)


def _before(run: Run, raw: Sequence[float]) -> float | None:
    """The mean of raw prompts as a mark for a fit's curve: none if the fit draws in fewer steps than they are drawn."""
    sampling = run.config.sampling
    return _mean(raw) if sampling.fitting.steps == sampling.steps else None


def _mean_curve(run: Run) -> Curve:
    """The reward of each step, averaged over the prompts; one that ended before keeps its last value."""
    prompts = run.prompts[:1] if run.config.shared else run.prompts
    histories = [run.history(prompt) for prompt in prompts]
    smoothed = [charts.so_far(history) for history in histories]
    rewards = _mean_of([[line["reward"] for line in history] for history in histories])
    bold = _mean_of([values for _, values in smoothed])
    fitted = [each for each in run.scores() if each.method == "raw" and each.seed in run.config.seeds]
    before = _before(run, [each.value for each in fitted if each.reward == run.config.reward])
    names = [name for name, _ in smoothed]
    return charts.BEST if charts.BEST in names else names[0], rewards, bold, before


def _mean_of(curves: Sequence[charts.Values]) -> list[float | None]:
    """The mean at each step of the longest, over the curves that have a value there or ended with one."""
    longest = max(map(len, curves))
    whole = []
    for curve in curves:
        last = next((value for value in reversed(curve) if value is not None), None)
        whole.append([*curve, *[last] * (longest - len(curve))])
    return [_mean(values) for values in zip(*whole, strict=True)]


def _scatters(scores: Sequence[Score], reward: str, seeds: Collection[int]) -> list[tuple[str, Markup, int]]:
    """For each held-out reward: its gains against the optimised one's, and how many fell while that rose."""
    values: dict[tuple[str, int], dict[tuple[str, bool], float]] = defaultdict(dict)
    for each in scores:
        if each.seed in seeds:
            values[each.prompt, each.seed][each.reward, each.method == "raw"] = each.value
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    own = {each.reward for each in scores if not each.held_out}
    for found in values.values():
        gains = {
            name: found[name, False] - old
            for (name, raw), old in found.items()
            if raw and (name, False) in found
        }
        for name, gain in gains.items():
            if name not in own and not name.startswith(VERDICT) and reward in gains:
                points[name].append((gains[reward], gain))
    return [(name, charts.scatter(each), sum(a > 0 > b for a, b in each)) for name, each in points.items()]


def run_cost(run: Run) -> dict[str, Any]:
    """`total_cost` of what is finished, and of a whole prompt-batch fit however many of its prompts are judged."""
    results = run.results()
    times = len(run.prompts) / len(results) if run.config.shared and results else 1
    return total_cost(results, times)


def total_cost(results: Sequence[dict[str, Any]], times: float = 1) -> dict[str, Any]:
    """Totals over prompts, each of which counts `times`; memory, how many were fitted together, and parameters are not
    additive.
    """
    calls: Counter[str] = Counter()
    for result in results:
        calls.update(result["cost"]["calls"])
    measured = [result["cost"]["measured"] for result in results]
    return {
        "calls": {name: round(times * count) for name, count in calls.items()},
        "seconds": times * sum(each["seconds"] for each in measured),
        "memory": max((each["peak_memory_mib"] for each in measured), default=0),
        "together": max((each["fitted_together"] for each in measured), default=0),
        "parameters": max((result["cost"]["parameters"] for result in results), default=0),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def picture_uri(file: Path, largest: int = LARGEST) -> str | None:
    """`as_uri` of a file, if there is one."""
    if not file.is_file():
        return None
    try:
        with reading(file), Image.open(file) as picture:
            picture.load()
            return as_uri(picture, largest)
    except InputError as error:
        logger.warning("%s; the page is without it", error)
        return None


def as_uri(picture: Image.Image, largest: int = LARGEST) -> str:
    """A picture as text: small ones as PNG, large ones as WebP of `largest` pixels."""
    if max(picture.size) <= largest // 2:
        return f"data:image/png;base64,{base64.b64encode(as_png(picture)).decode()}"
    picture = picture.copy()
    picture.thumbnail((largest, largest))
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=88)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
