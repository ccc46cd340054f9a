"""The command line on a tiny random pipeline: what a user types, sees and finds in the folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import ipgo
from ipgo import cli, files, models, runner
from ipgo.artefacts import load_identities, load_scores
from ipgo.cli_fit import show_run
from ipgo.fitting import result_of
from ipgo.model_card import model_card
from ipgo.prompts import read_prompts
from ipgo.rewards.checkpoints import fingerprint
from ipgo.store import Run
from tests import sessions
from tests.conftest import one_sentence

PROMPTS = ("a fox", "a <b>lemon</b> & more")
SETTINGS = (
    *("--reward", "colorfulness", "--held-out", "contrast", "--sampling.steps", "2", "--unseen-seeds", "2"),
    *("--method.ascent.steps", "4", "--method.ascent.lr", "0.01", "--method.ascent.backprop_steps", "2"),
    *("--method.insertion.num_prefix", "2"),
)
SEEDS = (0, 1, 2, 3, 1000, 1001)  # four that are fitted where none are asked for, and two that are not
TIMINGS = ("history.jsonl", "report.html", "run.json", "curve.png")  # files that tell the time


def fit(pipeline_folder: str, out: Path, prompts: Sequence[str], *flags: str) -> int:
    return cli.main(["fit", *prompts, "--backend", pipeline_folder, *SETTINGS, "--out", str(out), *flags])


@pytest.fixture(scope="module")
def fitted(pipeline_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "two"
    assert fit(pipeline_folder, out, PROMPTS) == 0
    return out


@pytest.fixture(scope="module")
def shared(pipeline_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "shared"
    assert fit(pipeline_folder, out, ["a fox", "a lemon"], "--shared", "--seeds") == 0
    return out


def test_the_folder_holds_what_was_promised(fitted: Path) -> None:
    run = Run.open(fitted)
    for prompt in run.prompts:
        folder = run.folder(prompt)
        assert {file.name for file in folder.iterdir()} == {
            *(f"{when}-{seed}.png" for when in ("before", "after") for seed in SEEDS),
            *("adapter.safetensors", "adapter.json", "history.jsonl", "result.json"),
        }
        assert [line["step"] for line in run.history(prompt)] == [1, 2, 3, 4]
    result = run.results()[0]
    assert result["status"] == "finished"
    # 4 steps of 2 calls for each row, of which the last 2 have gradient, through what is around the negative prompt too
    calls = {"decoder": 4, "denoiser": 8, "denoiser_grad": 8, "denoiser_grad_both": 8}
    assert result["cost"]["calls"] == calls
    scores = [(each["method"], each["seed"], each["reward"], each["held_out"]) for each in result["scores"]]
    assert ("ipgo", 1001, "contrast", True) in scores
    assert ("raw", 0, "colorfulness", False) in scores
    assert len(scores) == 2 * len(SEEDS) * 2
    head, *lines = map(json.loads, (fitted / "scores.jsonl").read_text().splitlines())
    assert len(lines) == 2 * len(scores)
    stored = {name: result["rewards"][name] for name in head["rewards"]}
    assert head == {"rewards": stored} == {"rewards": run.identities}
    assert stored.keys() == {"colorfulness", "contrast"}
    page = (fitted / "report.html").read_text()
    for name, about in stored.items():
        assert f"<dt>identity of {name}</dt><dd>{fingerprint(about)}</dd>" in page
    assert not (fitted / "chunks").exists()


def test_a_draw_of_prompts_is_recorded(pipeline_folder: str, tmp_path: Path) -> None:
    """Where they came from, how they were drawn, and which they are."""
    (tmp_path / "all.txt").write_text("\n".join(f"a fox number {number}" for number in range(9)))
    drawn = f"{tmp_path}/all.txt?n=2&seed=7"
    flags = ("--prompts", drawn, "--method.ascent.steps", "1", "--unseen-seeds", "0")
    assert fit(pipeline_folder, tmp_path / "run", [], *flags) == 0
    config = files.read_json(tmp_path / "run/run.json")["config"]
    assert config["prompts_from"] == drawn
    assert config["prompts"] == read_prompts(drawn)
    assert read_prompts(drawn) != read_prompts(f"{tmp_path}/all.txt?n=2&seed=8")


def test_images_and_scores_are_those_of_the_stored_adapter(fitted: Path, pipeline_folder: str) -> None:
    run = Run.open(fitted)
    prompt, backend = run.prompts[0], ipgo.load_backend(pipeline_folder, device="cpu")
    for when, adapter in (("before", ipgo.Adapter()), ("after", run.load_adapter(prompt))):
        seeds = [0, 1000, 1001]
        images = ipgo.generate(backend, [prompt.text] * 3, seeds, adapter, run.config.sampling)
        stored = [Image.open(run.image_file(prompt, when, seed)) for seed in seeds]
        pixels = torch.stack(
            [torch.frombuffer(bytearray(each.tobytes()), dtype=torch.uint8) for each in stored]
        )
        drawn = (images.permute(0, 2, 3, 1).flatten(1) * 255).round()
        assert (pixels - drawn).abs().max() == 0
        value = ipgo.load_reward("colorfulness")(images, [prompt.text] * 3)[1].item()
        method = "raw" if when == "before" else "ipgo"
        found = [
            each.value
            for each in run.scores()
            if (each.method, each.prompt, each.seed) == (method, prompt.text, 1000)
        ]
        assert found[0] == pytest.approx(value, abs=1e-6)


def test_what_is_called_unseen_is_unseen(
    fitted: Path, pipeline_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line, on the page, on the card and in Python: the means by hand, of the seeds it should be."""
    run = Run.open(fitted)

    def mean(method: str, unseen: bool) -> float:
        of = [each for each in run.scores() if (each.method, each.reward) == (method, "colorfulness")]
        return sum(each.value for each in of if (each.seed >= 1000) == unseen) / sum(
            (each.seed >= 1000) == unseen for each in of
        )

    seen, new = ((mean("raw", unseen), mean("ipgo", unseen)) for unseen in (False, True))
    assert abs((new[1] - new[0]) - (seen[1] - seen[0])) > 1e-3  # else this would tell nothing
    result = result_of(run)
    for gains, expected in ((result.on_fitted_seeds, seen), (result.on_unseen_seeds, new)):
        own = next(gain for gain in gains if gain.reward == "colorfulness")
        assert (own.before, own.after) == pytest.approx(expected)
    assert show_run(run) == 0
    said = capsys.readouterr().out.split("unseen seeds")
    for part, (before, after) in zip(said, (seen, new), strict=True):
        line = next(line for line in part.splitlines() if line.startswith("colorfulness *"))
        assert line.split()[2:5] == [f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]
    card = model_card(run, run.whole_adapter()[0], "this/repository").split("On unseen noise")
    for part, (before, after) in zip(card, (seen, new), strict=True):
        line = next(line for line in part.splitlines() if "colorfulness (optimised)" in line)
        assert f"| {before:.3f} | {after:.3f} | {after - before:+.3f} " in line
    page = (fitted / "report.html").read_text()
    row = page[page.index("unseen noise<br>") :].split("<tr")[1]
    assert row.index("{:.3f} → {:.3f}".format(*seen)) < row.index("{:.3f} → {:.3f}".format(*new))


def test_the_same_command_again_does_nothing(
    fitted: Path,
    pipeline_folder: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And says so."""
    before = {file: file.read_bytes() for file in fitted.rglob("*.safetensors")}
    assert fit(pipeline_folder, fitted, PROMPTS) == 0
    assert {file: file.read_bytes() for file in fitted.rglob("*.safetensors")} == before
    out = capsys.readouterr().out
    assert "colorfulness *" in out
    assert "unseen seeds" in out
    assert str(fitted / "report.html") in out
    assert "all of it was fitted before" in caplog.text


def test_another_setting_is_refused_with_its_name(
    fitted: Path, pipeline_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(pipeline_folder, fitted, PROMPTS, "--seed", "5") == 2
    assert "seed 0 there, 5 now" in one_sentence(capsys)


def test_the_report_is_one_page_with_escaped_prompts(fitted: Path) -> None:
    page = (fitted / "report.html").read_text()
    assert "a &lt;b&gt;lemon&lt;/b&gt; &amp; more" in page
    assert "<b>lemon</b>" not in page
    for outside in ("http://", "https://", 'src="/', "url("):
        assert outside not in page
    assert page.count("data:image/png;base64,") == 2 * len(SEEDS) * 2
    assert "prefers-color-scheme: dark" in page
    assert "IPGO" in page


def test_generate_draws_what_fit_drew(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = Run.open(fitted)
    assert cli.main(["generate", str(fitted), "--seeds", "0", "1000", "1001", "--out", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    for prompt in run.prompts:
        ours = Image.open(tmp_path / f"{prompt.id}-1001.png").tobytes()
        assert ours == Image.open(run.image_file(prompt, "after", 1001)).tobytes()
    folder = run.folder(run.prompts[0])
    for steps, said in (([], False), ([], False), (["--steps", "3"], True)):
        assert cli.main(["generate", str(folder), "a fox", "--out", str(tmp_path / "one"), *steps]) == 0
        assert ("1 of these replaced another image of that name" in caplog.text) == said
    assert cli.main(["generate", str(folder), "a dog", "--out", str(tmp_path / "none")]) == 2
    assert "not fitted to prompt 'a dog'" in capsys.readouterr().err


def test_a_shared_adapter_is_for_any_prompt(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {file.name for file in (shared / "shared").iterdir()} == {
        "adapter.json",
        "adapter.safetensors",
        "history.jsonl",
    }
    assert cli.main(["generate", str(shared), "never seen", "--out", str(tmp_path)]) == 0
    prompts = tmp_path / "new.txt"
    prompts.write_text("a bus\na cup\n")
    capsys.readouterr()
    flags = "--seeds 5 6 --rewards contrast"
    assert cli.main(["evaluate", str(shared), "--prompts", str(prompts), *flags.split()]) == 0
    out = capsys.readouterr().out
    assert "2 prompts, never fitted, seeds 5, 6" in out
    assert "contrast" in out
    first, *lines = [json.loads(line) for line in (shared / "evaluation.jsonl").read_text().splitlines()]
    run = Run.open(shared)
    assert first == {
        "rewards": {"contrast": ipgo.rewards.identity_of(ipgo.load_reward("contrast"))}
        | {run.config.reward: run.identities[run.config.reward]},
        "drawn_by": {name: run.facts[name] for name in ("dtype", "weights", "schedule")},
    }
    assert len(lines) == 2 * 2 * 2 * 2
    assert {line["prompt"] for line in lines} == {"a bus", "a cup"}
    page = (shared / "report.html").read_text()
    assert "Judged again" in page
    assert "not comparable with those above" not in page
    raised = run.config.reward
    first["rewards"][raised]["version"] += 1
    files.write_lines(shared / "evaluation.jsonl", [first, *lines])
    assert cli.main(["report", str(shared)]) == 0
    assert f"{raised}: not the reward that scored the run" in (shared / "report.html").read_text()


def test_generate_and_evaluate_of_what_has_no_prompts_of_its_own_or_learned_nothing(
    shared: Path, pipeline_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", str(shared), "--seeds", "0", "--out", str(tmp_path / "drawn")]) == 0
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2
    (tmp_path / "some.txt").write_text("a fox\na cup\n")
    command = ["evaluate", str(shared), "--prompts", str(tmp_path / "some.txt"), "--seeds", "5"]
    assert cli.main([*command, "--rewards", "contrast"]) == 0
    assert "2 prompts, 1 of them never fitted, seeds 5" in capsys.readouterr().out

    flags = ("--reward", "colorfulness", "--held-out", "contrast", "--sampling.steps", "2", "--method", "raw")
    command = ["fit", "a fox", "--backend", pipeline_folder, *flags, "--out", str(tmp_path / "raw")]
    assert cli.main(command) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "raw"), "--seeds", "5", "6"]) == 0
    scores = load_scores(tmp_path / "raw/evaluation.jsonl")
    mean = sum(each.value for each in scores if each.reward == "contrast") / len(scores) * 2
    assert f"contrast      {mean:.3f}" in capsys.readouterr().out


def test_a_shared_fit_is_judged_on_as_many_prompts_as_are_asked_for(
    pipeline_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"a {name}" for name in ("fox", "lemon", "bus", "cup", "cat")]
    flags = ("--shared", "--seeds", "--judged-prompts", "2")
    for again in range(2):  # the second time there is nothing to do
        assert fit(pipeline_folder, tmp_path / "run", texts, *flags) == 0
        run = Run.open(tmp_path / "run")
        assert [result["prompt"] for result in run.results()] == ["a fox", "a bus"], again
        # 4 steps of 4 prompts, each in 2 calls
        assert "32 denoiser calls" in capsys.readouterr().out
    assert len(list(tmp_path.rglob("after-*.png"))) == 2 * 2
    assert [fitted.prompt for fitted in result_of(run)] == ["a fox", "a bus"]
    assert "not finished yet" not in (tmp_path / "run/report.html").read_text()
    assert cli.main(["explain", str(tmp_path / "run"), "--out", str(tmp_path / "words.json")]) == 0
    explained = json.loads((tmp_path / "words.json").read_text())["prompts"]
    assert [each["prompt"] for each in explained] == ["a fox", "a bus"]  # not all that were fitted
    capsys.readouterr()
    for wrong, message in (
        (["--shared", "--judged-prompts", "0"], "judged_prompts is 0; it must be at least 1"),
        (["--judged-prompts", "2"], "judged_prompts is 2; it must be at least 1, and needs shared"),
    ):
        assert fit(pipeline_folder, tmp_path / "wrong", texts, *wrong) == 2
        assert message in capsys.readouterr().err


def test_python_gives_the_same_numbers(fitted: Path, pipeline_folder: str) -> None:
    config = Run.open(fitted).config
    result = ipgo.fit(
        list(config.prompts),
        reward=ipgo.load_reward("colorfulness"),
        backend=ipgo.load_backend(pipeline_folder, device="cpu"),
        method=config.method,
        sampling=config.sampling,
        unseen_seeds=2,
    )
    assert result.path is None
    assert [each.prompt for each in result] == list(config.prompts)
    stored = [each for each in Run.open(fitted).scores() if each.reward == "colorfulness"]
    assert [each.value for one in result for each in one.scores] == [each.value for each in stored]
    assert result[0].after[1000].size == (16, 16)
    assert {gain.reward for gain in result.on_unseen_seeds} == {"colorfulness"}
    assert len(result[1].history) == 4


def test_a_function_is_a_reward(pipeline_folder: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def warmth(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    spec = f"{tmp_path / 'mine.py'}:warmth"
    for reward in (spec, f"{spec}+0.5*contrast"):
        out = tmp_path / reward[-4:]
        assert fit(pipeline_folder, out, ["a fox"], "--reward", reward) == 0
        assert {each.reward for each in Run.open(out).scores()} == {reward, spec, "contrast"}


@pytest.mark.parametrize(
    ("prompts", "flags", "message"),
    [
        ([], [], "prompts is empty"),
        (["a", "a"], [], "these are 2 prompts, two of them the same; put a single prompt in quotes: 'a a'"),
        (["a fox", "a fox"], [], "prompt 2 repeats prompt 1"),
        (["x " * 100], [], "tokens"),
        (["x"], ["--prompts", "nowhere.txt"], "does not exist"),
        (["x"], ["--method", "igpo"], "unknown method 'igpo'; did you mean 'ipgo'"),
        (["x"], ["--reward", "colourfulness"], "unknown reward 'colourfulness'; did you mean 'colorfulness'"),
        (["x"], ["--held-out", "contrats"], "unknown reward 'contrats'; did you mean 'contrast'"),
        (["x"], ["--backend", "sd155"], "unknown backend 'sd155'; did you mean 'sd15'"),
        (["x"], ["--backend", "no/such/folder"], "does not exist"),
        (["x"], ["--method.ascent.backprop-steps", "9"], "sampling.steps allows at most 2"),
        (["x"], ["--method.insertion.rank", "999"], "wide"),
        (["x"], ["--preset", "paper"], "unknown preset 'paper'"),
        (["x"], ["--bogus"], "unknown option '--bogus'"),
        (
            ["x"],
            ["--sampling.steps", "5000", "--sampling.fit_steps", "2"],
            "sampling.steps is 5000; this model has 1000 steps",
        ),
        (
            ["x"],
            ["--sampling.eta", "1", "--scheduler", "euler"],
            "sampling.eta above 0 needs the ddim scheduler",
        ),
        (["x"], ["--seeds", "0", "1", "2", "3", "4"], "method.ascent.steps is 4; 5 seeds, used in turn"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    prompts: list[str],
    flags: list[str],
    message: str,
    pipeline_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fit(pipeline_folder, tmp_path / "run", prompts, *flags) == 2
    assert message in one_sentence(capsys)
    assert list(tmp_path.rglob("*.png")) == []


def test_a_reward_that_only_judges_fails_before_the_search_or_can_be_repaired(
    fitted: Path, pipeline_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, out = tmp_path / "mine.py", tmp_path / "run"
    judged = ("--held-out", f"{mine}:mine")
    start = "def mine(images, prompts):\n"
    mine.write_text(f"{start}    raise ValueError('never')\n")
    assert fit(pipeline_folder, out, PROMPTS, *judged) == 2
    assert "mine.py:mine' fails: ValueError: never (mine.py, line 2)" in capsys.readouterr().err
    assert not out.exists()
    whole = f"{start}    return images.mean((1, 2, 3))\n"
    alike = "    assert images[0].equal(images[-1]), 'many'\n"  # as the two copies of what it is tried on
    mine.write_text(whole.replace("    return", f"{alike}    return"))
    assert fit(pipeline_folder, out, PROMPTS, *judged) == 2
    assert "mine.py:mine' fails: AssertionError: many (mine.py, line 2)" in capsys.readouterr().err
    prompt = Run.open(out).prompts[0]
    assert (Run.open(out).folder(prompt) / "adapter.safetensors").is_file()
    mine.write_text(whole)
    assert fit(pipeline_folder, out, PROMPTS, *judged) == 0
    run = Run.open(out)
    assert run.identities[f"{mine}:mine"] == ipgo.rewards.identity_of(ipgo.load_reward(f"{mine}:mine"))
    for each, theirs in zip(run.prompts, Run.open(fitted).prompts, strict=True):
        ours = (run.folder(each) / "adapter.safetensors").read_bytes()
        assert ours == (fitted / "prompts" / theirs.id / "adapter.safetensors").read_bytes()
    mine.write_text(whole + "\n")
    assert fit(pipeline_folder, out, PROMPTS, *judged) == 2
    assert "the scores are not comparable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", "[1]"),
        ("run.json", "{}"),
        ("run.json", '{"schema": 1, "config": [1]}'),
        ("run.json", '{"schema": 1, "config": {}}'),
        ("run.json", '{"schema": 1, "con'),
        ("result.json", "[]"),
        (
            "result.json",
            '{"status": "finished", "prompt": "a fox", "cost": {}, "scores": [{"method": "raw"}]}',
        ),
        ("adapter.json", "{}"),
        ("evaluation.jsonl", '{"no": "score"}\n'),
    ],
)
def test_a_damaged_file_is_one_sentence(
    name: str, content: str, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run"
    shutil.copytree(fitted, place)
    folder = (
        place
        if name in ("run.json", "evaluation.jsonl")
        else Run.open(place).folder(Run.open(place).prompts[0])
    )
    (folder / name).write_text(content)
    words = ["generate", str(place)] if name == "adapter.json" else ["report", str(place)]
    assert cli.main(words) == 2
    error = one_sentence(capsys)
    assert "damaged" in error or "cannot be read" in error


def test_only_the_adapters_that_are_drawn_with_are_read(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of a whole run may be gigabytes."""
    place = Path(shutil.copytree(fitted, tmp_path / "run"))
    run = Run.open(place)
    (run.folder(run.prompts[1]) / "adapter.safetensors").write_bytes(b"damaged")
    out = tmp_path / "images"
    assert cli.main(["generate", str(place), PROMPTS[0], "--out", str(out)]) == 0
    assert cli.main(["generate", str(place), "--out", str(out)]) == 2
    assert f"{run.prompts[1].id}/adapter.safetensors' cannot be read" in one_sentence(capsys)
    assert [file.name for file in out.iterdir()] == [f"{run.prompts[0].id}-0.png"]
    assert cli.main(["generate", str(place), "a dog"]) == 2
    assert "not fitted to prompt 'a dog'; nearest: 'a fox'" in one_sentence(capsys)


def test_a_run_goes_on_in_the_format_that_it_began_in(
    fitted: Path, pipeline_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever another device would choose."""
    place = tmp_path / "run"
    shutil.copytree(fitted, place)
    opened = []
    real = models.load_backend

    def load_backend(*args: Any, **options: Any) -> ipgo.Backend:
        opened.append(options["dtype"])
        return real(*args, **options)

    monkeypatch.setattr(models, "load_backend", load_backend)
    about = files.read_json(place / "run.json")
    assert about["dtype"] == "float32"
    files.write_json(place / "run.json", {**about, "dtype": "bfloat16", "weights": None})
    assert fit(pipeline_folder, place, PROMPTS) == 0
    assert cli.main(["evaluate", str(place), "--seeds", "5"]) == 0
    assert opened == ["bfloat16", "bfloat16"]
    backend = ipgo.load_backend(pipeline_folder, device="cpu")
    config = Run.open(place).config
    settings = {name: getattr(config, name) for name in ("method", "sampling", "seeds", "unseen_seeds")}
    with pytest.raises(ipgo.ResumeError, match="was drawn in bfloat16, not float32"):
        ipgo.fit(
            PROMPTS, reward=config.reward, held_out=config.held_out, backend=backend, out=place, **settings
        )


def test_a_copy_of_the_backend_draws_as_the_run_did(tmp_path: Path) -> None:
    """The bundled model has a guidance scale of its own, which a copy of its folder does not know."""
    flags = "--reward colorfulness --held-out contrast --method.ascent.steps 1 --seeds 0 --sampling.steps 2"
    words = ["fit", "a lemon", *flags.split(), "--unseen-seeds", "1", "--out", str(tmp_path / "run")]
    assert cli.main(words) == 0
    shutil.copytree(ipgo.backends.BACKENDS["emoji"][1], tmp_path / "copy")
    copy = ("--backend", str(tmp_path / "copy"))
    assert cli.main(["evaluate", str(tmp_path / "run"), "--seeds", "1000", *copy]) == 0
    before = {
        (each.method, each.reward): each.value
        for each in Run.open(tmp_path / "run").scores()
        if each.seed == 1000
    }
    for each in load_scores(tmp_path / "run/evaluation.jsonl"):
        assert each.value == pytest.approx(before[each.method, each.reward], abs=1e-5)
    command = ["generate", str(tmp_path / "run"), "--seeds", "1000", "--out", str(tmp_path / "images"), *copy]
    assert cli.main(command) == 0
    (picture,) = (tmp_path / "images").iterdir()
    assert picture.read_bytes() == next((tmp_path / "run/prompts").glob("*/after-1000.png")).read_bytes()


def test_a_run_is_judged_again_without_the_reward_that_is_gone(
    pipeline_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def dark(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return -images.mean((1, 2, 3))

    method = ipgo.IPGO(ipgo.Insertion(1, 1), ipgo.Ascent(steps=1, backprop_steps=1))
    options = {"backend": pipeline_folder, "method": method, "sampling": ipgo.Sampling(2), "unseen_seeds": 1}
    ipgo.fit("a fox", reward=dark, seeds=[0], held_out=["contrast"], out=tmp_path / "run", **options)
    command = ["evaluate", str(tmp_path / "run"), "--seeds", "5"]
    assert cli.main(command) == 2
    assert "unknown reward 'dark'" in capsys.readouterr().err
    assert cli.main([*command, "--rewards", "contrast", "contrats"]) == 2
    assert "unknown reward 'contrats'; did you mean 'contrast'?\n" in capsys.readouterr().err
    assert cli.main([*command, "--rewards", "contrast"]) == 0
    assert "scored without the reward that was optimised: unknown reward 'dark'" in caplog.text
    assert {each.reward for each in load_scores(tmp_path / "run/evaluation.jsonl")} == {"contrast"}


def test_a_reward_that_was_edited_is_said_to_be_another(
    pipeline_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("def warmth(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    assert fit(pipeline_folder, tmp_path / "run", ["a fox"], "--reward", f"{mine}:warmth") == 0
    assert cli.main(["evaluate", str(tmp_path / "run"), "--seeds", "5"]) == 0
    assert "is not the reward that scored the run" not in caplog.text
    mine.write_text("def warmth(images, prompts):\n    return images[:, 1].mean((1, 2))\n")
    assert cli.main(["evaluate", str(tmp_path / "run"), "--seeds", "5"]) == 0
    assert f"'{mine}:warmth' is not the reward that scored the run under this name" in caplog.text
    next((tmp_path / "run/prompts").glob("*/before-0.png")).write_bytes(b"no picture")
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert "before-0.png' cannot be read" in caplog.text


def test_without_unseen_seeds_nothing_is_called_unseen(pipeline_folder: str, tmp_path: Path) -> None:
    assert fit(pipeline_folder, tmp_path / "run", PROMPTS, "--unseen-seeds", "0") == 0
    page = (tmp_path / "run/report.html").read_text()
    assert "unseen noise" not in page
    assert "one image from fitted noise" in page


def test_evaluations_are_added_to_each_other(fitted: Path, tmp_path: Path) -> None:
    place = tmp_path / "run"
    shutil.copytree(fitted, place)
    for seeds, rewards in ((["7"], ["contrast"]), (["8", "9"], ["contrast"]), (["9"], ["emoji-aesthetic"])):
        assert cli.main(["evaluate", str(place), "--seeds", *seeds, "--rewards", *rewards]) == 0
    found = load_scores(place / "evaluation.jsonl")
    kinds = {(each.reward, each.seed) for each in found}
    assert kinds == {
        *((reward, seed) for reward in ("colorfulness", "contrast") for seed in (7, 8, 9)),
        ("emoji-aesthetic", 9),
    }
    assert len(found) == len(kinds) * len(PROMPTS) * 2
    head = load_identities(place / "evaluation.jsonl")
    assert head.keys() == {"colorfulness", "contrast", "emoji-aesthetic"}
    # Scores of images that other weights have drawn are kept apart.
    first = files.read_lines(place / "evaluation.jsonl")[0]
    other = first | {"drawn_by": {**first["drawn_by"], "weights": "aa"}}
    files.write_lines(place / "evaluation.jsonl", [other, *map(asdict, found)])
    assert cli.main(["evaluate", str(place), "--seeds", "11", "--rewards", "contrast"]) == 0
    assert {each.seed for each in load_scores(place / "evaluation.jsonl")} == {11}
    (aside,) = place.glob("evaluation-aa-float32-*.jsonl")
    assert load_scores(aside) == found
    files.write_lines(place / "evaluation.jsonl", [first, *map(asdict, found)])
    assert cli.main(["report", str(place)]) == 0
    assert "2 fitted prompts, 3 further seeds" in (place / "report.html").read_text()


def test_words_that_the_model_never_saw_are_named(
    pipeline_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "backend"
    shutil.copytree(pipeline_folder, folder)
    words = {
        "objects": {"fox": ["vixen"], "lemon": []},
        "colours": ["blue"],
        "words": ["a", "blue", "fox", "lemon"],
    }
    (folder / "vocabulary.json").write_text(json.dumps(words))
    assert fit(str(folder), tmp_path / "run", ["a blue lemmon", "a xylophone"]) == 0
    assert (
        caplog.text.count("the model has never seen 'lemmon' (nearest: 'lemon'), 'xylophone'; `ipgo list")
        == 1
    )
    caplog.clear()
    assert cli.main(["generate", str(tmp_path / "run"), "--out", str(tmp_path / "images")]) == 0
    assert "the model has never seen 'lemmon' (nearest: 'lemon')" in caplog.text
    capsys.readouterr()
    assert cli.main(["list", "objects", str(folder)]) == 0
    assert capsys.readouterr().out == "objects:\n  fox (vixen)\n  lemon\n  -- colours: blue\n"


def test_a_prompt_that_is_cut_is_named_and_recorded(
    pipeline_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = "a fox and " * 12
    assert fit(pipeline_folder, tmp_path / "run", ["a fox", long], "--long-prompts", "truncate") == 0
    assert caplog.text.count("is cut to the 77 tokens") == 1
    assert [result["truncated"] for result in Run.open(tmp_path / "run").results()] == [False, True]


@pytest.mark.usefixtures("no_models")
def test_what_cannot_be_written_is_refused_before_it_is_computed(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != fitted)  # the tests may run as root
    assert cli.main(["evaluate", str(fitted)]) == 2
    assert "which cannot be written: Permission denied" in capsys.readouterr().err


def test_an_insertion_that_does_not_fit_is_refused_before_weights_are_read(
    pipeline_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "load_backend", None)
    assert fit(pipeline_folder, tmp_path / "run", ["a fox"], "--method.insertion.rank", "999") == 2
    assert (
        "method.insertion.rank is 999; the embeddings of this backend are 32 wide" in capsys.readouterr().err
    )


def test_a_full_disk_loses_nothing_and_the_run_goes_on(
    fitted: Path,
    pipeline_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replace, out = Path.replace, tmp_path / "run"

    def full(self: Path, target: Path) -> Path:
        if "0001-" in str(target) and target.suffix == ".png":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    assert fit(pipeline_folder, out, PROMPTS, "--chunk", "2") == 1
    assert "before-0.png': No space left on device; finished prompts, if any" in one_sentence(capsys)
    assert not list(out.rglob(".*.draft"))
    assert len(Run.open(out).results()) == 1
    monkeypatch.setattr(Path, "replace", replace)
    assert fit(pipeline_folder, out, PROMPTS) == 0
    assert_same_bits(fitted, out)


def test_a_failed_prompt_does_not_stop_its_neighbour(
    pipeline_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context: object, values: torch.Tensor, broken: torch.Tensor) -> torch.Tensor:
            context.broken = broken  # type: ignore[attr-defined]
            return values.clone()

        @staticmethod
        def backward(context: object, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
            return grad.masked_fill(context.broken, float("nan")), None  # type: ignore[attr-defined]

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        broken = torch.tensor(["fox" in prompt for prompt in prompts])
        return Broken.apply(images.mean((1, 2, 3)), broken)  # type: ignore[no-any-return]

    monkeypatch.setattr(models, "load_reward", lambda spec, device: ipgo.as_reward(reward, spec))
    assert fit(pipeline_folder, tmp_path / "run", ["a fox", "a lemon"]) == 1
    assert (
        "1 of 2 prompts failed because their reward or gradient was not finite: 'a fox'"
        in capsys.readouterr().err
    )
    assert [result["status"] for result in Run.open(tmp_path / "run").results()] == ["failed", "finished"]


def test_ctrl_c_says_how_to_go_on(
    pipeline_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "record", interrupt)
    assert fit(pipeline_folder, tmp_path / "run", ["a fox"]) == 130
    assert capsys.readouterr().err == "ipgo: stopped; the same command continues it\n"


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """How Python ends by itself; what a shell runs in the background does not know Ctrl-C."""
    before = {number: signal.signal(number, usual) for number, usual in runner.ENDING.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize("number", runner.ENDING)
def test_ctrl_c_waits_for_the_end_of_a_step_which_is_kept(
    number: signal.Signals,
    fitted: Path,
    pipeline_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long ago the last checkpoint was."""
    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", 1e9)
    out, record = tmp_path / "run", Run.record

    def interrupted(run: Run, chunk: Any, progress: Any, cost: Any) -> None:
        record(run, chunk, progress, cost)
        if progress.step == 2 and not any((out / "chunks").glob("*")):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Run, "record", interrupted)
    assert fit(pipeline_folder, out, PROMPTS) == 130
    assert capsys.readouterr().err.splitlines() == [
        "ipgo: stopping after this step; Ctrl-C again stops at once",
        "ipgo: stopped; the same command continues it",
    ]
    assert {each: signal.getsignal(each) for each in runner.ENDING} == runner.ENDING
    (kept,) = (out / "chunks").glob("*.safetensors")
    with safe_open(kept, framework="pt") as tensors:
        assert json.loads(tensors.metadata()["about"])["step"] == 2
    assert fit(pipeline_folder, out, PROMPTS) == 0
    assert_same_bits(fitted, out)


@pytest.mark.usefixtures("usual_signals")
def test_ctrl_c_in_the_last_step_waits_for_its_result(
    fitted: Path,
    pipeline_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which no checkpoint has."""
    out, record, steps = tmp_path / "run", Run.record, []

    def interrupted(run: Run, chunk: Any, progress: Any, cost: Any) -> None:
        record(run, chunk, progress, cost)
        steps.append(progress.step)
        if progress.step == progress.total:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "record", interrupted)
    assert fit(pipeline_folder, out, PROMPTS) == 130
    assert capsys.readouterr().err.splitlines() == [
        "ipgo: stopping after this step; Ctrl-C again stops at once",
        "ipgo: this was the last step: what it found is drawn and scored first",
        "ipgo: stopped; the same command continues it",
    ]
    assert fit(pipeline_folder, out, PROMPTS) == 0
    assert steps == [1, 2, 3, 4]
    assert_same_bits(fitted, out)
    assert fit(pipeline_folder, tmp_path / "other", PROMPTS, "--chunk", "1") == 130
    assert len(Run.open(tmp_path / "other").finished) == 1  # it stops after the prompts of that step


@pytest.mark.skipif(os.name != "posix", reason="the program is a shell script")
def test_what_a_program_has_answered_is_not_asked_again(pipeline_folder: str, tmp_path: Path) -> None:
    """Neither in the search nor in the rating at its end; nor is a person."""
    script = tmp_path / "score.sh"
    script.write_text('#!/bin/sh\necho >> asked; [ $(wc -l < asked) -ne "$(cat limit)" ] && wc -c < "$1"\n')
    script.chmod(0o755)
    words = ["fit", "a fox", "--backend", pipeline_folder, "--reward", f"cmd:{script} {{image}}"]
    words += ["--held-out", "--sampling.steps", "2", "--unseen-seeds", "2"]
    words += ["--method", "best-of-n", "--method.n", "4"]
    counts = []
    # The first fails in the third of four candidates, the second when two images are left to rate.
    for limit, out in ((0, "straight"), (5, "run"), (5, "run"), (0, "run")):
        (tmp_path / "limit").write_text(str(limit))
        (tmp_path / "asked").write_text("")
        command = [sys.executable, "-m", "ipgo", *words, "--out", out]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
        assert (done.returncode == 0) == (limit == 0)
        counts.append((tmp_path / "asked").read_text().count("\n"))
    assert counts == [8, 5, 5, 4]  # each start tries the reward on two copies of a picture
    assert not (tmp_path / "run/answers").exists()
    straight, result = (Run.open(tmp_path / out).results()[0]["scores"] for out in ("straight", "run"))
    assert result == straight


@pytest.mark.usefixtures("usual_signals")
def test_a_second_ctrl_c_does_not_wait() -> None:
    with runner.whole_steps() as stopping:
        assert not stopping()
        signal.raise_signal(signal.SIGINT)
        assert stopping()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("usual_signals")
def test_what_a_signal_has_ended_is_no_other_failure() -> None:
    """A program that is a reward may get the same signal, and fail before the step has ended."""

    def step() -> None:
        with runner.whole_steps():
            signal.raise_signal(signal.SIGTERM)
            raise ipgo.RewardError("the program was killed")

    with pytest.raises(KeyboardInterrupt):
        step()
    with pytest.raises(ipgo.RewardError), runner.whole_steps():
        raise ipgo.RewardError("nobody asked")


def test_somebody_elses_handler_of_ctrl_c_stays() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with runner.whole_steps() as stopping:
            signal.raise_signal(signal.SIGINT)
            assert not stopping()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]


class Killed(BaseException):
    """Not caught by anything, like a kill."""


def test_any_write_may_be_the_last(
    fitted: Path, pipeline_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Die at a later write each time, go on, and end with the bits of an undisturbed run."""
    write, out, deaths = files.write, tmp_path / "run", 0
    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", -1.0)

    def deadly(allowed: int) -> Callable[..., None]:
        left: Iterator[int] = iter(range(allowed))

        def write_or_die(file: Path, content: bytes, **options: bool) -> None:
            if next(left, None) is None:
                raise Killed
            write(file, content, **options)

        return write_or_die

    for allowed in range(0, 99, 3):
        monkeypatch.setattr(files, "write", deadly(allowed))
        try:
            assert fit(pipeline_folder, out, PROMPTS) == 0
            break
        except Killed:
            deaths += 1
    assert deaths >= 5
    assert_same_bits(fitted, out)


def assert_same_bits(undisturbed: Path, other: Path) -> None:
    """Equal trees, but for what tells the time."""
    names = [
        sorted(str(f.relative_to(root)) for f in root.rglob("*") if f.is_file())
        for root in (undisturbed, other)
    ]
    assert names[0] == names[1]
    for name in names[0]:
        ours, theirs = ((root / name) for root in (undisturbed, other))
        if name.endswith("result.json"):
            a, b = (files.read_json(file) for file in (ours, theirs))
            del a["cost"]["measured"], b["cost"]["measured"]
            assert a == b
        elif name.endswith("history.jsonl"):
            a, b = ([line | {"seconds": 0} for line in files.read_lines(file)] for file in (ours, theirs))
            assert a == b
        elif Path(name).name not in TIMINGS:
            assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.mark.slow
def test_kill_minus_nine_at_random_moments(pipeline_folder: str, tmp_path: Path) -> None:
    """Ten kills, each a random while after the work went on; the last run is left alone."""
    words = ["fit", "a fox", "a lemon", "an owl", "--chunk", "2", "--backend", pipeline_folder, *SETTINGS]
    words += ["--method.ascent.steps", "300", "--out"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert sessions.begin([*words, str(undisturbed)], undisturbed).wait() == 0
    for moment in torch.rand(10, generator=torch.Generator().manual_seed(0)).tolist():
        process = sessions.begin([*words, str(killed)], killed, "history.jsonl")
        assert sessions.kill(process, moment), "it finished before the last kill: give it more steps"
    assert sessions.begin([*words, str(killed)], killed).wait() == 0
    assert_same_bits(undisturbed, killed)
    counts = [result["cost"]["measured"]["sessions"] for result in Run.open(killed).results()]
    assert sum(counts) > 3  # checkpoints were really used


MANY = ("a fox", "a lemon", "an owl", "a bus", "a cat", "a pear")


def test_several_processes_share_a_run(pipeline_folder: str, tmp_path: Path) -> None:
    """Begun at once on a folder that is not there yet, they end with the bits of one alone; each prompt is one's."""
    words = ["fit", *MANY, "--chunk", "1", "--backend", pipeline_folder, *SETTINGS]
    words += ["--method.ascent.steps", "40", "--out"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert cli.main([*words, str(alone)]) == 0
    command = [sys.executable, "-m", "ipgo", *words, str(together)]
    # Threads as in the tests, for the same bits.
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, env=one, **pipes) for _ in range(3)]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert_same_bits(alone, together)
    assert sum("report:" in out for out, _ in said) >= 1
    for out, err in said:
        assert ("report:" in out) != ("are left to the other processes" in err)
    assert {result["cost"]["measured"]["sessions"] for result in Run.open(together).results()} == {1}


@pytest.mark.slow
def test_what_a_killed_process_leaves_is_done_by_the_next(pipeline_folder: str, tmp_path: Path) -> None:
    """Two processes at a run, of which one is killed again and again, and cuts the prompts otherwise."""
    words = ["fit", *MANY, "--backend", pipeline_folder, *SETTINGS, "--method.ascent.steps", "150", "--out"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert sessions.begin([*words, str(alone), "--chunk", "2"], alone).wait() == 0
    steady = sessions.begin([*words, str(together), "--chunk", "2"], together, "history.jsonl")
    kills = 0
    for moment in torch.rand(6, generator=torch.Generator().manual_seed(0)).tolist():
        if steady.poll() is not None:
            break
        other = sessions.begin([*words, str(together), "--chunk", "1"], together, "history.jsonl")
        if other.poll() is None:
            other.kill()
            kills += 1
        other.wait(60)
        time.sleep(moment)
    assert kills >= 1
    assert steady.wait() == 0
    assert sessions.begin([*words, str(together), "--chunk", "2"], together).wait() == 0
    assert [result["prompt"] for result in Run.open(together).results()] == list(MANY)
    for prompt in Run.open(alone).prompts:
        ours, theirs = (Run.open(place).history(prompt) for place in (alone, together))
        assert [line["step"] for line in theirs] == list(range(1, 151))
        assert [line["reward"] for line in theirs] == pytest.approx(
            [line["reward"] for line in ours], abs=1e-4
        )


def test_a_run_of_which_another_process_has_everything_is_left_to_it(
    pipeline_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert fit(pipeline_folder, out, ["a fox"]) == 0
    config = Run.open(out).config
    (out / "prompts").rename(out / "gone")  # as if it had only begun
    code = (
        "import sys; from ipgo.store import Run; run = Run.open(sys.argv[1]); "
        "print(run.claim(run.chunks()[0]), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "True"
        assert fit(pipeline_folder, out, ["a fox"]) == 0
        assert "1 of 1 prompts are left to the other processes" in capsys.readouterr().err
        with pytest.raises(ipgo.ResumeError, match="is in use"):
            ipgo.fit(
                "a fox",
                reward="colorfulness",
                held_out=["contrast"],
                backend=pipeline_folder,
                method=config.method,
                sampling=config.sampling,
                unseen_seeds=2,
                out=out,
            )
        other.communicate()
    assert fit(pipeline_folder, out, ["a fox"]) == 0


def test_a_prompt_that_is_too_long_is_refused_before_weights_are_read(
    pipeline_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "backend"
    shutil.copytree(pipeline_folder, folder)
    for weights in folder.rglob("*.safetensors"):
        weights.write_bytes(b"")
    words = [
        "fit",
        "a fox " * 60,
        "--backend",
        str(folder),
        "--reward",
        "contrast",
        "--out",
        str(tmp_path / "run"),
    ]
    assert cli.main(words) == 2
    assert "tokens and the encoder takes 77; shorten it" in capsys.readouterr().err
    assert cli.main([*words, "--long-prompts", "truncate"]) == 2
    assert "damaged or half-written" in capsys.readouterr().err


# -- what is said, and what is kept ------------------------------------------------------------------------


def test_what_is_made_of_the_optimised_reward_is_not_held_out(pipeline_folder: str, tmp_path: Path) -> None:
    flags = (
        "--held-out",
        "2*colorfulness+contrast",
        "colorfulness<=0.9",
        "contrast",
        "--method.ascent.steps",
        "1",
    )
    assert fit(pipeline_folder, tmp_path / "run", ["a fox"], *flags, "--seeds", "0") == 0
    judged = {each.reward: each.held_out for each in Run.open(tmp_path / "run").scores()}
    assert {name for name, held_out in judged.items() if held_out} == {"contrast"}
    again = ["evaluate", str(tmp_path / "run"), "--seeds", "7", "--rewards", "3*colorfulness", "contrast"]
    assert cli.main(again) == 0
    run = Run.open(tmp_path / "run")
    later = {
        each.reward: each.held_out for each in run.with_held_out(load_scores(run.path / "evaluation.jsonl"))
    }
    assert later == {"colorfulness": False, "3*colorfulness": False, "contrast": True}


def test_where_another_model_draws_the_default_reward_is_another(
    pipeline_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of people's preferences, which must be fetched: here there is no hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    out = ["--out", str(tmp_path / "run")]
    commands = (["fit", "a fox", *out], ["compare", "a fox", "--methods", "raw", *out], ["doctor"])
    for command in commands:
        assert cli.main([*command, "--backend", pipeline_folder]) == 2
        assert "'hpsv2.1' needs HPS_v2.1_compressed.pt" in one_sentence(capsys)
    with pytest.raises(ipgo.InputError, match=r"'hpsv2.1' needs HPS_v2.1_compressed.pt"):
        ipgo.fit("a fox", backend=pipeline_folder)


@pytest.mark.parametrize("backend", ["emojy", "./no/folder", ""])
def test_a_misspelt_backend_is_what_is_said(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_models: None
) -> None:
    """Not that the reward is of another world."""
    words = ["a lemon on a blue background", "--backend", backend, "--out", str(tmp_path / "run")]
    for flags in ([], ["--reward", "emoji-clip"]):
        assert cli.main(["fit", *words, *flags]) == 2
        assert "backend" in one_sentence(capsys)


def test_an_object_that_is_misspelt_is_named_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_models: None
) -> None:
    assert cli.main(["fit", "a lemmon on a blue background", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "'lemmon' (nearest: 'lemon')" in said
    assert "names no object that there is" in said


def test_where_all_images_tie_none_is_said_to_win(
    pipeline_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ("--reward", "colorfulness<=0.001", "--method.ascent.steps", "4")
    assert fit(pipeline_folder, tmp_path / "run", ["a fox"], *flags) == 0
    page = (tmp_path / "run/report.html").read_text()
    assert "no image is better or worse than the raw prompt" in page
    assert "It beats" not in page
    assert "no image of the fitted seeds scores better or worse than the raw one" in caplog.text


def test_a_runs_folder_is_not_scored_as_pictures(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", str(fitted), "--reward", "contrast"]) == 2
    assert "is a run's folder; give the folders of its images" in one_sentence(capsys)
    assert (
        cli.main(["score", str(Run.open(fitted).folder(Run.open(fitted).prompts[0])), "--reward", "contrast"])
        == 0
    )
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "file,prompt,contrast,contrast fingerprint"
    assert len(table) == 1 + 2 * len(SEEDS)


def test_nothing_but_an_earlier_answer_is_replaced(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(next(fitted.rglob("before-0.png")))
    stored = (fitted / "run.json").read_bytes()
    for command in (["explain", str(fitted)], ["score", picture, "--reward", "contrast"]):
        assert cli.main([*command, "--out", str(fitted / "run.json")]) == 2
        assert "which holds something else; give another file" in one_sentence(capsys)
    assert (fitted / "run.json").read_bytes() == stored
    for name in ("scores.csv", "scores.json"):
        for _ in range(2):
            out = ["--out", str(tmp_path / name)]
            assert cli.main(["score", picture, "--reward", "contrast", *out]) == 0
    (tmp_path / "mine.csv").write_text("a,b\n")
    assert cli.main(["score", picture, "--reward", "contrast", "--out", str(tmp_path / "mine.csv")]) == 2


def test_raw_prompts_have_scores_to_show(
    pipeline_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "fit",
        "a fox",
        "--backend",
        pipeline_folder,
        "--reward",
        "contrast+0.1*colorfulness",
        "--method",
        "raw",
    ]
    assert cli.main([*command, "--sampling.steps", "1", "--out", str(tmp_path / "raw")]) == 0
    lines = capsys.readouterr().out.splitlines()
    stored = [
        each.value
        for each in Run.open(tmp_path / "raw").scores()
        if each.reward == "contrast" and each.seed < 9
    ]
    assert f"contrast                   {sum(stored) / len(stored):.3f}" in lines


def test_an_evaluation_that_is_stopped_keeps_what_it_has(
    fitted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ipgo import evaluation

    whole, asked = evaluation.draw, []

    def stopping(backend: Any, adapters: Any, prompt: str, *rest: Any) -> Any:
        asked.append(prompt)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(backend, adapters, prompt, *rest)

    monkeypatch.setattr(evaluation, "draw", stopping)
    asked.append("stops at the first prompt, before there is anything to keep")
    before = (
        files.read_lines(fitted / "evaluation.jsonl") if (fitted / "evaluation.jsonl").is_file() else None
    )
    assert cli.main(["evaluate", str(fitted), "--seeds", "55"]) == 130
    assert before == (files.read_lines(fitted / "evaluation.jsonl") if before else None)
    assert before or not (fitted / "evaluation.jsonl").exists()
    capsys.readouterr()
    asked.clear()
    assert cli.main(["evaluate", str(fitted), "--seeds", "55"]) == 130
    assert "stopped; what was evaluated is kept" in one_sentence(capsys)
    kept = [each for each in load_scores(fitted / "evaluation.jsonl") if each.seed == 55]
    assert {each.prompt for each in kept} == {PROMPTS[0]}


def test_images_of_two_runs_have_folders_of_their_own(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run.open(fitted)
    assert cli.main(["generate", str(run.folder(run.prompts[0])), "--seeds", "3"]) == 0
    (folder,) = (tmp_path / "images").iterdir()
    assert folder.name == f"two-{run.prompts[0].id}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("methodd: {}", "methodd is {}, which is no setting; leave it out"),
        ("method: {nothing: {}}", "method.nothing is {}, which is no setting"),
        ("entries: {ipgo: {}}", "entries are those of a comparison: `ipgo compare --config`"),
        ("help: true", "which only the command line takes"),
        (
            "sampling: {guidance_scale: 1, negative_prompt: low}",
            "without guidance (sampling.guidance_scale 1) it has no",
        ),
    ],
)
def test_settings_that_would_do_nothing_are_refused(
    content: str,
    message: str,
    pipeline_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    no_models: None,
) -> None:
    (tmp_path / "own.yaml").write_text(content)
    flags = ("--config", str(tmp_path / "own.yaml"))
    assert fit(pipeline_folder, tmp_path / "run", ["a fox"], *flags) == 2
    assert message in one_sentence(capsys)


def test_a_run_of_another_version_is_named(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(fitted, tmp_path / "newer")
    stored = files.read_json(tmp_path / "newer/run.json")
    stored["config"]["foo"] = 1
    files.write_json(tmp_path / "newer/run.json", stored)
    assert cli.main(["report", str(tmp_path / "newer")]) == 2
    assert "newer/run.json' has settings that this version cannot take: unknown option 'foo'" in one_sentence(
        capsys
    )
    own = Run.open(fitted)
    assert cli.main(["evaluate", str(own.folder(own.prompts[0]))]) == 2
    assert f"; it is part of the run {fitted}" in one_sentence(capsys)
