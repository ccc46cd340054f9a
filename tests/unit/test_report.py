from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import ipgo
from ipgo import Gain, Interval, cli
from ipgo.report import charts
from ipgo.report.build import _mean_of, environment, fallen, mood, render
from ipgo.report.tables import _gain, _rate


def gain(reward: str, value: float, low: float, high: float, *, held_out: bool = True) -> Gain:
    interval = Interval(value, low, high, 9, "prompts")
    return Gain("ipgo", reward, held_out, 0.5, 0.5 + value, interval, interval)


def test_what_fell_while_the_reward_rose_is_said_and_how_surely() -> None:
    own = gain("optimised", 0.2, 0.1, 0.3, held_out=False)
    others = [gain("surely", -0.2, -0.3, -0.1), gain("perhaps", -0.1, -0.3, 0.1), gain("rose", 0.1, 0.0, 0.2)]
    found = {
        each.text: each.sure
        for each in fallen("optimised", [own, *others, gain("tiny", -1e-5, -1e-4, -1e-6)])
    }
    assert found == {"surely: 0.500 to 0.300": True, "perhaps: 0.500 to 0.400": False}
    assert fallen("optimised", [gain("optimised", -0.2, -0.3, -0.1, held_out=False), *others]) == []
    assert [mood(value) for value in (0.1, 1e-5, -0.1)] == ["good", "", "bad"]


def test_a_report_of_a_run_that_others_go_on_with(
    pipeline_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that is finished while the page is made is on the next one."""
    words = ["fit", "a fox", "a lemon", "--backend", pipeline_folder, "--reward", "contrast", "--held-out"]
    words += ["--sampling.steps", "2", "--method.ascent.steps", "1", "--method.ascent.backprop_steps", "1"]
    assert cli.main([*words, "--seeds", "0", "--unseen-seeds", "1", "--out", str(tmp_path / "run")]) == 0
    run = ipgo.Run.open(tmp_path / "run")
    results, late = run.results(), run.folder(run.prompts[1]) / "result.json"
    late.rename(late.with_name("later.json"))
    before = ipgo.Run.results

    def finished_meanwhile(self: ipgo.Run) -> list[dict[str, Any]]:
        found = before(self)
        if not late.is_file():
            late.with_name("later.json").rename(late)
        return found

    monkeypatch.setattr(ipgo.Run, "results", finished_meanwhile)
    page = render(run)
    assert page.count('<section class="card">') == 1
    assert "1 of 2 prompts are not finished yet" in page
    assert len(results) == 2


def history(rewards: list[float | None], bests: list[float | None], over: int) -> list[dict[str, Any]]:
    pairs = zip(rewards, bests, strict=True)
    return [{"reward": reward, "best": best, "over": over} for reward, best in pairs]


def test_what_counts_is_the_best_that_was_kept_or_a_mean_of_what_compares() -> None:
    turns = history([1.0, 3.0, None, 2.0], [None, 2.0, 2.0, 2.5], 2)
    assert charts.so_far(turns) == ("best so far", [None, 2.0, 2.0, 2.5])
    assert charts.means(turns) == [None, 2.0, 3.0, 2.0]
    fresh = history([1.0, 3.0, 5.0, None], [None] * 4, 2)
    assert charts.so_far(fresh) == ("mean of 2 steps", [None, 2.0, 4.0, 5.0])
    assert charts.means(history([1.0, 2.0], [None] * 2, 10)) == [None, 1.5]  # of all, if there are fewer
    assert charts.so_far(history([1.0, 2.0], [None] * 2, 1)) == ("last step", [1.0, 2.0])


def test_what_learned_before_it_was_given_up_is_no_nothing(pipeline_folder: str, tmp_path: Path) -> None:
    def steep(images: Any, prompts: list[str]) -> Any:
        """Its gradient is not finite from its ninth call with one on."""
        calls.append(images.requires_grad)
        more = (images - images.detach()).square().mean((1, 2, 3)).sqrt() if sum(calls) > 8 else 0
        return images.mean((1, 2, 3)) + more

    calls: list[bool] = []
    method = ipgo.IPGO(ascent=ipgo.Ascent(steps=12, backprop_steps=1))
    settings: dict[str, Any] = {"seeds": (0,), "unseen_seeds": 1, "sampling": ipgo.Sampling(steps=2)}
    result = ipgo.fit(
        "a fox", backend=pipeline_folder, reward=steep, method=method, out=tmp_path / "run", **settings
    )
    assert result[0].failed
    text = render(ipgo.Run.open(tmp_path / "run"))
    assert "Nothing was learned" not in text
    assert "1 of 1 prompts were given up" in text
    assert "steep from" in text


def test_what_belongs_to_its_noise_is_judged_on_it(pipeline_folder: str, tmp_path: Path) -> None:
    """On other noise nothing changes, so that nothing could be seen to fall there."""

    def brightness(images: Any, prompts: list[str]) -> Any:
        return images.mean((1, 2, 3))

    def darkness(images: Any, prompts: list[str]) -> Any:
        return -images.mean((1, 2, 3))

    ipgo.fit(
        [f"a fox and {name}" for name in ("a", "b", "c", "d", "e", "f")],
        backend=pipeline_folder,
        reward=brightness,
        held_out=[darkness],
        method=ipgo.BestOfN(n=8),
        sampling=ipgo.Sampling(steps=2),
        seeds=(0,),
        unseen_seeds=1,
        out=tmp_path / "run",
    )
    text = render(ipgo.Run.open(tmp_path / "run"))
    assert "While brightness rose on fitted noise" in text
    assert "<li>darkness: " in text
    assert "in 100% of the images on the fitted noise" in text
    assert "unseen noise" not in text


@pytest.mark.parametrize(
    "rewards", [[], [1.0], [None, None, 2.0], [2.0, 2.0, 2.0], [1e-9, 2e-9], [1e6, 3e6], [1e20, 1e20]]
)
def test_curves_of_any_range(rewards: list[Any]) -> None:
    chart = charts.curve(rewards, rewards, None)
    assert "nan" not in chart
    assert "inf" not in chart
    assert chart.count("<svg") == (len([each for each in rewards if each is not None]) >= 2)


def test_a_reward_with_a_sign_of_mathematics_has_a_curve() -> None:
    values: list[float | None] = [0.0, 1.0]
    picture = charts.curve_png(values, values, "best", "cmd:./score.sh {image} $x^$y", None)
    assert picture.startswith(b"\x89PNG")


def test_points_in_the_corner_are_bad() -> None:
    chart = charts.scatter([(0.1, 0.2), (0.3, -0.2)])
    assert chart.count('class="good"') == chart.count('class="bad"') == 1
    assert charts.scatter([]) == ""
    small = charts.scatter([(1e-6, -1.2e-4), (2e-6, -2.6e-4)])  # labels that would begin outside the chart
    labels = re.findall(r'text-anchor="end">([^<]*)<', small)
    assert any(label.startswith("-") for label in labels)
    assert all(len(label) <= charts.ROOM for label in labels if re.fullmatch(r"[-\d.e]+", label))
    assert "<svg" in charts.scatter([(0.0, 0.0)])


def test_an_entry_has_one_colour_and_its_name_in_every_chart() -> None:
    hues = {label: charts.hue(number) for number, label in enumerate(("a", "b", "c"))}
    assert len(set(hues.values())) == 3
    curves = charts.lines({"b": [(1, 0.5), (4, 0.7)], "c": [(2, 0.6)]}, hues, "calls", 0.4)
    assert f'<polyline class="series" style="--hue: {hues["b"]}"' in curves
    assert f'<circle class="series" style="--hue: {hues["c"]}"' in curves  # a single point is a dot
    cloud = charts.scatter([(0.1, 0.2)], {"c": hues["c"]})
    assert f'style="--hue: {hues["c"]}"' in cloud
    assert "<title>c</title>" in curves
    assert "<title>c</title>" in cloud
    assert charts.lines({}, hues, "calls", 0.4) == ""


@pytest.mark.parametrize(
    ("value", "low", "high", "colour"),
    [
        (0.1, 0.05, 0.2, "good"),
        (0.1, -0.05, 0.2, ""),  # the interval leaves it open
        (-0.1, -0.2, -0.05, "bad"),
        (0.1, float("nan"), float("nan"), ""),  # one image
    ],
)
def test_only_what_is_sure_has_a_colour(value: float, low: float, high: float, colour: str) -> None:
    found = _gain({"held": gain("held", value, low, high)}, "held", before=True)
    assert found.mood == colour
    assert found.value == f"0.500 → {0.5 + value:.3f}"
    assert found.text.startswith(f"{found.value}, {value:+.3f}")
    wins = _rate(Interval(0.5 + value, 0.5 + low, 0.5 + high, 9, "prompts"))
    assert wins.mood == colour
    assert _rate(None).text == "–"
    page = environment().from_string("{{ gain.gain | sure }}")
    assert page.render(gain=gain("held", value, low, high)) == colour


def test_a_prompt_that_ended_keeps_its_last_value_in_the_mean() -> None:
    assert _mean_of([[1.0, 3.0, 2.0], [5.0], [None, 4.0, None]]) == [3.0, 4.0, 3.5]


@pytest.mark.parametrize(("fit_steps", "shown"), [(2, True), (1, False)])
def test_the_legend_names_the_raw_prompt_where_it_is_drawn(
    fit_steps: int, shown: bool, pipeline_folder: str, tmp_path: Path
) -> None:
    """Not where a fit draws in other steps than the raw prompt was drawn in."""
    ipgo.fit(
        "a fox",
        backend=pipeline_folder,
        reward="contrast",
        method=ipgo.IPGO(ascent=ipgo.Ascent(steps=2, backprop_steps=1)),
        sampling=ipgo.Sampling(steps=2, fit_steps=fit_steps),
        seeds=(0,),
        unseen_seeds=1,
        out=tmp_path,
    )
    assert ("raw prompt</span>" in render(ipgo.Run.open(tmp_path))) == shown


def test_what_was_judged_again_stands_by_the_images_that_were_judged(
    pipeline_folder: str, tmp_path: Path
) -> None:
    run = str(tmp_path / "run")
    flags = [
        "--backend",
        pipeline_folder,
        "--reward",
        "contrast",
        "--held-out",
        "colorfulness",
        "--seeds",
        "0",
    ]
    small = ["--sampling.steps", "2", "--method", "raw", "--unseen-seeds", "1"]
    assert cli.main(["fit", "a fox", "a lemon", *flags, *small, "--out", run]) == 0
    assert cli.main(["evaluate", run, "--rewards", "contrast", "--seeds", "7", "8"]) == 0
    assert cli.main(["evaluate", run, "--rewards", "colorfulness", "--seeds", "7"]) == 0
    text = " ".join(render(ipgo.Run.open(tmp_path / "run")).split())
    assert "2 fitted prompts, 2 further seeds" in text
    assert "2 fitted prompts, 1 further seed" in text
