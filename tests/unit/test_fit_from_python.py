"""What `ipgo.fit` and its loaders take from Python, where things are objects and not words."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from PIL import Image

import ipgo
from ipgo import cli
from ipgo.adapters import TextEncoderAdapter, WeightAdapter
from ipgo.adapters.weights import LoRA
from ipgo.ascent import Ascent
from ipgo.backends import BACKENDS
from ipgo.backends.text import expanded
from ipgo.backends.world import GUIDANCE
from ipgo.errors import RewardError
from ipgo.images import from_pil
from ipgo.rewards import Ceiling, WeightedSum, identity_of, terms_of
from ipgo.rewards.checkpoints import sha256
from tests.conftest import brightness, tiny_pipeline

SHORT: dict[str, Any] = {"sampling": ipgo.Sampling(steps=2), "seeds": (0,), "unseen_seeds": 1}
SHORT_RAW: dict[str, Any] = {**SHORT, "held_out": ["contrast"], "device": "cpu"}
ONE_STEP = ipgo.IPGO(ascent=Ascent(steps=1))


def darkness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return -brightness(images, prompts)


def test_a_pipeline_object_is_fitted_where_it_is(
    pipeline_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(Path(pipeline_folder))
    fit = ipgo.fit("a fox", backend=pipe, reward=brightness, method=ONE_STEP, out=tmp_path, **SHORT)
    same = ipgo.fit(
        "a fox", backend=Path(pipeline_folder), reward=brightness, method=ONE_STEP, device="cpu", **SHORT
    )
    assert [each.value for each in fit[0].scores] == [each.value for each in same[0].scores]
    assert ipgo.Run.open(tmp_path).config.backend == pipeline_folder  # where it can be opened again
    own = tiny_pipeline()
    own.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    ipgo.fit("a fox", backend=own, reward=brightness, method="raw", out=tmp_path / "own", **SHORT)
    assert ipgo.Run.open(tmp_path / "own").config.backend == "StableDiffusionPipeline"
    for words in (["generate", "a fox"], ["evaluate"]):
        command = [words[0], str(tmp_path / "own"), *words[1:]]
        assert cli.main(command) == 2
        assert "was fitted on a pipeline object (StableDiffusionPipeline); name" in capsys.readouterr().err
    out = ["--out", str(tmp_path / "images")]
    assert cli.main(["generate", str(tmp_path / "own"), "a fox", "--backend", pipeline_folder, *out]) == 0
    own.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ipgo.ResumeError, match=r"with the scheduler EulerDiscreteScheduler-\w{8}, not DDIM"):
        ipgo.fit("a fox", backend=own, reward=brightness, method="raw", out=tmp_path / "own", **SHORT)


def test_gradient_goes_through_as_many_steps_as_a_fit_draws_in() -> None:
    """All of them where the scheduler draws noise at each, and else `fit_steps`."""
    deep = ipgo.IPGO(ipgo.Insertion(1, 1, rank=4), Ascent(steps=1, backprop_steps=3))
    settings: dict[str, Any] = {**SHORT, "sampling": ipgo.Sampling(3, 3.0, fit_steps=2), "reward": brightness}
    pipe = tiny_pipeline()
    with pytest.raises(ipgo.InputError, match=r"backprop_steps is 3; sampling\.fit_steps allows at most 2"):
        ipgo.fit("a fox", backend=pipe, method=deep, **settings)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    (line,) = ipgo.fit("a fox", backend=pipe, method=deep, **settings)[0].history
    assert line["calls"]["denoiser"] == 3


def test_a_pipeline_that_was_changed_is_noticed(
    pipeline_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(pipeline_folder).parent)
    pipe = StableDiffusionPipeline.from_pretrained(Path(pipeline_folder).name)  # as people do
    for weights in pipe.unet.parameters():
        weights.data.mul_(1.1)
    ipgo.fit("a fox", backend=pipe, reward=brightness, method="raw", out=tmp_path / "run", **SHORT)
    assert ipgo.Run.open(tmp_path / "run").config.backend == str(Path(pipeline_folder).resolve())
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", str(tmp_path / "run"), "a fox"]) == 0
    assert "learned on a backend with other weights" in caplog.text
    assert len(list((tmp_path / "images/run").glob("*-a-fox-*.png"))) == 1


def test_held_out_rewards_are_named(pipeline_folder: str) -> None:
    result = ipgo.fit(
        "a fox",
        backend=pipeline_folder,
        reward=brightness,
        held_out=["contrast", ipgo.as_reward(darkness, "dark")],
        method=ONE_STEP,
        device=torch.device("cpu"),
        **SHORT,
    )
    dark = {each.method: each.value for each in result[0].scores if each.reward == "dark" and each.seed == 0}
    bright = {
        each.method: each.value for each in result[0].scores if each.reward == "brightness" and each.seed == 0
    }
    assert dark == pytest.approx({method: -value for method, value in bright.items()})
    assert result.rewards["contrast"] == identity_of(ipgo.load_reward("contrast"))
    assert result.rewards["brightness"]["weights"][0] == sha256(Path(__file__).parents[1] / "conftest.py")
    assert {gain.reward: gain.held_out for gain in result.on_unseen_seeds} == {
        "brightness": False,
        "contrast": True,
        "dark": True,
    }


def test_what_a_sum_adds_up_is_reported_too(pipeline_folder: str) -> None:
    """A gain of the sum may be a gain of one and a loss of another. Both are optimised, not held out."""
    spec = "colorfulness+-0.5*contrast<=0.1"
    result = ipgo.fit(
        "a fox", backend=pipeline_folder, reward=spec, held_out=["contrast"], method=ONE_STEP, **SHORT
    )
    gains = result.on_unseen_seeds
    assert [(gain.reward, gain.held_out) for gain in gains] == [
        (spec, False),
        ("colorfulness", False),
        ("contrast", False),
    ]
    whole, colour, contrast = (gain.before for gain in gains)
    assert whole == pytest.approx(colour - 0.5 * min(contrast, 0.1))


def test_a_question_is_not_asked_twice() -> None:
    """Nor is a command run again, though both are terms."""
    assert set(terms_of(ipgo.load_reward("colorfulness+2*cmd:true {image}"))) == {"colorfulness"}
    assert terms_of(ipgo.load_reward("colorfulness")) == {}
    own = WeightedSum(
        (ipgo.load_reward("contrast"),), (2.0,), "mine"
    )  # whose name does not say what is in it
    assert terms_of(own) == {}


def test_how_a_backend_was_opened_is_part_of_the_run(pipeline_folder: str, tmp_path: Path) -> None:
    backend = ipgo.load_backend(
        pipeline_folder, device=torch.device("cpu"), dtype=torch.float32, scheduler="euler", padding="none"
    )
    ipgo.fit("a fox", backend=backend, reward=brightness, method="raw", out=tmp_path, **SHORT)
    config = ipgo.Run.open(tmp_path).config
    assert (config.scheduler, config.padding, config.method) == ("euler", "none", ipgo.Raw())
    with pytest.raises(ipgo.ResumeError, match="scheduler"):
        ipgo.fit("a fox", backend=pipeline_folder, reward=brightness, method="raw", out=tmp_path, **SHORT)


def test_a_method_by_its_name() -> None:
    with pytest.raises(ipgo.InputError, match="unknown method 'draf'; did you mean 'draft'"):
        ipgo.fit("a fox", method="draf")
    with pytest.raises(ipgo.InputError, match="method is 3; it must be an instance of one of Raw, IPGO"):
        ipgo.fit("a fox", method=3)  # type: ignore[arg-type]


def test_a_rewards_file_is_run_once_for_a_fit(pipeline_folder: str, tmp_path: Path) -> None:
    file, log = tmp_path / "mine.py", tmp_path / "log"
    file.write_text(
        f"with open({str(log)!r}, 'a') as log:\n    log.write('run ')\n"
        "calls = []\n"
        "def warmth(images, prompts):\n"
        "    calls.append(1)\n"
        "    return images[:, 0].mean((1, 2))\n"
    )
    for runs in (1, 2):  # the next fit has one of its own, with nothing counted yet
        ipgo.fit("a fox", backend=pipeline_folder, reward=f"{file}:warmth", method="raw", **SHORT_RAW)
        assert log.read_text() == "run " * runs


def test_functions_that_are_added_up_are_reported_each(pipeline_folder: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def warmth(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    own = f"{tmp_path}/mine.py:warmth"
    spec = f"{own}<=0.9+0.5*colorfulness"
    result = ipgo.fit("a fox", backend=pipeline_folder, reward=spec, method="best-of-n", **SHORT_RAW)
    found = {gain.reward: gain.held_out for gain in result.on_fitted_seeds}
    assert found == {spec: False, own: False, "colorfulness": False, "contrast": True}


def test_a_reward_under_another_name_is_not_held_out(pipeline_folder: str, tmp_path: Path) -> None:
    """Nor one that a sum or a ceiling is made of, given as an object."""
    inner = ipgo.load_reward("contrast")
    for reward in (
        ipgo.as_reward(inner, "mine"),
        Ceiling(inner, 0.7, "capped"),
        WeightedSum((inner, ipgo.as_reward(brightness)), (1.0, 0.5), "mix"),
    ):
        settings = {**SHORT_RAW, "held_out": ["contrast", "colorfulness"], "out": tmp_path / reward.name}
        result = ipgo.fit("a fox", backend=pipeline_folder, reward=reward, method="best-of-n", **settings)
        found = {gain.reward: gain.held_out for gain in result.on_fitted_seeds}
        assert found == {reward.name: False, "contrast": False, "colorfulness": True}
        stored = ipgo.Run.open(tmp_path / reward.name).scores()
        assert {each.reward for each in stored if each.held_out} == {"colorfulness"}


def test_a_reward_for_one_picture_alone_fails_before_the_search(pipeline_folder: str) -> None:
    calls = []

    def one(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        calls.append(len(images))
        return images.mean()[None]

    with pytest.raises(RewardError, match=r"'one' must return a tensor of shape \(2,\), not \(1,\)"):
        ipgo.fit("a fox", backend=pipeline_folder, reward=one, **{**SHORT, "held_out": []})
    assert calls == [2]


def test_a_fit_without_one_finite_step_has_failed(pipeline_folder: str) -> None:
    def steep(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return (images - images.detach()).square().mean((1, 2, 3)).sqrt()  # a gradient that is no number

    for steps in (1, 2, 4):
        method = ipgo.IPGO(ascent=Ascent(steps=steps, backprop_steps=1))
        (found,) = ipgo.fit("a fox", backend=pipeline_folder, reward=steep, method=method, **SHORT_RAW)
        assert found.failed


def test_a_fit_that_kept_nothing_has_failed(pipeline_folder: str) -> None:
    """One bad step of four, on one of four seeds: there is no mean over all of them, so the start is returned."""
    calls: list[bool] = []

    def steep(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        calls.append(images.requires_grad)
        more = (images - images.detach()).square().mean((1, 2, 3)).sqrt() if sum(calls) == 4 else 0
        return images.mean((1, 2, 3)) + more

    method = ipgo.IPGO(ascent=Ascent(steps=4, backprop_steps=1))
    settings = {**SHORT_RAW, "seeds": (0, 1, 2, 3)}
    (found,) = ipgo.fit("a fox", backend=pipeline_folder, reward=steep, method=method, **settings)
    assert found.failed


def test_an_adapter_is_the_same_in_any_default_format(pipeline_folder: str, tmp_path: Path) -> None:
    backend = ipgo.load_backend(pipeline_folder, device="cpu")
    adapter = ipgo.InsertionAdapter.start(backend, ["a fox"], ipgo.Insertion(2, 1), seed=0, shared=False)
    ipgo.save_adapter(adapter, tmp_path)
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = ipgo.load_adapter(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in again.state_dict().values()} == {torch.float32}
    own = adapter.prompt_kwargs(backend.pipe, "a fox")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = again.prompt_kwargs(backend.pipe, "a fox")
    assert torch.equal(own["prompt_embeds"], cast["prompt_embeds"])


def test_numbers_of_numpy_are_numbers(pipeline_folder: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SHORT, "backend": pipeline_folder, "reward": brightness, "device": "cpu"}
    foreign = ipgo.IPGO(ascent=Ascent(steps=np.int64(1), lr=np.float32(0.5)))  # type: ignore[arg-type]
    assert type(foreign.ascent.lr) is float
    settings |= {"method": foreign, "seeds": np.arange(1), "out": tmp_path}
    ipgo.fit(np.array(["a fox"]), seed=np.int64(3), **settings)
    config = ipgo.Run.open(tmp_path).config
    assert (config.seeds, config.seed, config.method) == ((0,), 3, ipgo.IPGO(ascent=Ascent(steps=1, lr=0.5)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ascent(lr="0.1"), r"ascent.lr is '0.1'; it must be float"),  # type: ignore[arg-type]
        (lambda: Ascent(steps=2.5), r"ascent.steps is 2.5; it must be int"),  # type: ignore[arg-type]
        (lambda: Ascent(recompute=1), r"ascent.recompute is 1; it must be bool"),  # type: ignore[arg-type]
        (lambda: ipgo.Sampling(guidance_scale="x"), r"guidance_scale is 'x'; it must be float \| None"),  # type: ignore[arg-type]
        (lambda: ipgo.fit("a", seeds=3), r"seeds is 3; it must be a sequence"),  # type: ignore[arg-type]
        (lambda: ipgo.fit("a", seeds=(0.5,)), r"seeds is \(0.5,\); it must be tuple\[int"),  # type: ignore[arg-type]
        (lambda: ipgo.fit("a", sampling={"steps": 2}), r"sampling is \{'steps': 2\}; it must be Sampling"),  # type: ignore[arg-type]
        (lambda: ipgo.fit("a", method=ipgo.IPGO(ascent=3)), r"ascent is 3; it must be Ascent"),  # type: ignore[arg-type]
        (lambda: ipgo.fit("a", method=ipgo.BestOfN(n="4")), r"n is '4'; it must be int"),  # type: ignore[arg-type]
        (lambda: ipgo.fit("a lemon", out=3), r"out is 3; it must be a path"),  # type: ignore[arg-type]
        (lambda: ipgo.Run.open(3), r"run is 3; it must be a path"),  # type: ignore[arg-type]
        (lambda: ipgo.load_adapter(3), r"folder is 3; it must be a path"),  # type: ignore[arg-type]
        (
            lambda: ipgo.InsertionAdapter("a cat", 32, ipgo.Insertion()),
            r"prompts is 'a cat'; it must be a list",
        ),
        (lambda: ipgo.IPGO(ascent={"steps": 3}), r"ascent is \{'steps': 3\}; it must be Ascent"),  # type: ignore[arg-type]
        (lambda: ipgo.fit(None), r"prompts is None; it must be a sequence"),  # type: ignore[arg-type]
        (
            lambda: ipgo.fit("a", held_out=[3]),
            r"reward .int. is 3; it must be a function of \(images, prompts\)",
        ),  # type: ignore[list-item]
        (
            lambda: ipgo.fit("a", reward=brightness, held_out=[ipgo.as_reward(darkness, "brightness")]),
            r"two rewards are called 'brightness'",
        ),
        (lambda: ipgo.Adapter().prompt_kwargs(None, ["a"]), r"prompt is \['a'\]; it must be one text"),  # type: ignore[arg-type]
        (lambda: ipgo.save_pretrained("tests", "x"), r"'tests' is not a run folder"),
        (lambda: ipgo.fit([3]), r"prompt 1 is 3; a prompt must be text"),  # type: ignore[list-item]
        (
            lambda: ipgo.fit("a", reward=lambda images: images),
            r"reward .<lambda>. takes \(images\); it must take \(images, prompts\)",
        ),
        (
            lambda: ipgo.fit("a", reward=torch.nn.Identity),
            r"reward .Identity. is a class; give an object of it",
        ),
        (lambda: ipgo.fit("a", reward=torch.nn.Flatten()), r"reward .Flatten. takes "),  # type: ignore[arg-type]
        (lambda: ipgo.load_reward(brightness), r"loaded by its name"),  # type: ignore[arg-type]
        (lambda: ipgo.load_backend(""), r"backend is empty"),
        (lambda: ipgo.load_backend("emoji", padding=None), r"padding is None; it must be str"),  # type: ignore[arg-type]
        (lambda: ipgo.load_backend("emoji", image_size="64"), r"image_size is '64'; it must be int"),  # type: ignore[arg-type]
        (lambda: ipgo.load_backend("emoji", scheduler=""), r"unknown scheduler ''"),
        (lambda: ipgo.load_backend("emoji", device="mps"), r"device 'mps' is not supported"),
        (lambda: ipgo.fit("a", seeds=(2**64,)), r"whole numbers from 0 to 2\*\*64 - 1"),
        (lambda: ipgo.fit("a", reward="contrats"), r"did you mean 'contrast'"),
        (
            lambda: ipgo.fit("a", reward="cmd:wc -c {image}", method="ipgo"),
            r"has no gradient, which method 'ipgo' needs",
        ),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(make: Any, message: str) -> None:
    with pytest.raises(ipgo.InputError, match=message):
        make()


def test_a_fit_in_inference_mode_learns(pipeline_folder: str) -> None:
    settings: dict[str, Any] = {**SHORT, "backend": pipeline_folder, "reward": brightness, "device": "cpu"}
    with torch.inference_mode():
        inside = ipgo.fit("a fox", method=ONE_STEP, **settings)
    outside = ipgo.fit("a fox", method=ONE_STEP, **settings)
    assert [each.value for each in inside[0].scores] == [each.value for each in outside[0].scores]


def test_a_pipeline_from_inference_mode_is_refused(pipeline_folder: str) -> None:
    with torch.inference_mode():
        pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder)
        backend = ipgo.load_backend(pipeline_folder, device="cpu")
    with pytest.raises(ipgo.InputError, match=r"was made in torch\.inference_mode"):
        ipgo.load_backend(pipe)
    assert ipgo.fit("a fox", backend=backend, reward=brightness, method=ONE_STEP, **SHORT)


def test_more_steps_than_a_scheduler_has(backend: ipgo.Backend) -> None:
    with pytest.raises(ipgo.InputError, match=r"^sampling.steps is 1001; this model has 1000 steps"):
        ipgo.generate(backend, ["a fox"], [0], sampling=ipgo.Sampling(steps=1001))


@pytest.mark.parametrize(
    ("prompts", "seeds", "others", "message"),
    [
        ([None], [0], {}, "prompt 1 is None; a prompt must be text"),
        (["a", "b", " "], [0, 1, 2], {}, "prompt 3 is empty"),
        (["a", "a"], [0, -1], {}, r"seeds is \[0, -1\]; they must be whole numbers"),
        (["a"], [0.5], {}, r"seeds is \[0.5\]"),
        (["a"], 3, {}, "a list of prompts and one of seeds"),
        (["a"], [0], {"sampling": {"steps": 1}}, "it must be of the type Sampling"),
        (["a"], [0], {"adapter": "runs/lemon"}, "it must be of the type Adapter"),
    ],
)
def test_what_cannot_be_drawn(
    prompts: Any, seeds: Any, others: Any, message: str, backend: ipgo.Backend
) -> None:
    with pytest.raises(ipgo.InputError, match=message):
        ipgo.generate(backend, prompts, seeds, **others)


def test_plain_functions_and_numbers_of_numpy_judge(backend: ipgo.Backend) -> None:
    sampling, seeds = ipgo.Sampling(steps=1), np.array([3, 5])
    scores = ipgo.evaluate(
        backend, {"raw": ipgo.Adapter()}, {"mine": brightness}, ["a"], seeds, sampling, "mine"
    )
    images = ipgo.generate(backend, ["a", "a"], seeds, sampling=sampling)
    assert [each.value for each in scores] == pytest.approx(brightness(images, []).tolist(), abs=1e-6)
    assert [type(each.seed) for each in scores] == [int, int]


def test_a_judges_name_is_not_free(backend: ipgo.Backend) -> None:
    with pytest.raises(ipgo.InputError, match="reserved for the judge's verdicts"):
        ipgo.fit("a", reward=ipgo.as_reward(brightness, "judge-object"), **SHORT)
    # Where no judge is, nothing is taken; and a reward may be held out by the name that it is optimised by.
    reward = ipgo.as_reward(brightness, "judge-object")
    assert ipgo.fit("a", backend=backend, reward=reward, held_out=["judge-object"], method=ONE_STEP, **SHORT)


def test_images_are_drawn_of_lists(backend: ipgo.Backend) -> None:
    with pytest.raises(ipgo.InputError, match="a list of prompts and one of seeds, not 'a fox' and 0"):
        ipgo.generate(backend, "a fox", 0, ipgo.Adapter(), ipgo.Sampling())  # type: ignore[arg-type]


def test_a_finished_run_is_that_of_its_models(pipeline_folder: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SHORT, "backend": pipeline_folder, "method": "raw", "device": "cpu"}
    mine = tmp_path / "mine.py"
    mine.write_text("def red(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    ipgo.fit("a fox", reward=f"{mine}:red", out=tmp_path / "run", **settings)
    ipgo.fit("a fox", reward=f"{mine}:red", out=tmp_path / "run", **settings)
    mine.write_text("def red(images, prompts):\n    return -images[:, 0].mean((1, 2))\n")
    with pytest.raises(ipgo.ResumeError, match="was scored by another"):
        ipgo.fit("a fox", reward=f"{mine}:red", out=tmp_path / "run", **settings)


def test_an_adapter_alone_is_drawn_with_any_backend(pipeline_folder: str, tmp_path: Path) -> None:
    (fitted,) = ipgo.fit("a fox", backend=pipeline_folder, reward=brightness, method=ONE_STEP, **SHORT)
    ipgo.save_adapter(fitted.adapter, tmp_path / "adapter")
    out = ["--out", str(tmp_path / "images")]
    assert cli.main(["generate", str(tmp_path / "adapter"), *out]) == 2
    assert cli.main(["generate", str(tmp_path / "adapter"), "--backend", pipeline_folder, *out]) == 0
    ours = ipgo.generate(pipeline_folder, ["a fox"], [0], fitted.adapter)
    (picture,) = (tmp_path / "images").iterdir()
    assert (
        cli.main(["generate", str(tmp_path / "adapter"), "--backend", pipeline_folder, "--steps", "2", *out])
        == 0
    )
    fewer = ipgo.generate(pipeline_folder, ["a fox"], [0], fitted.adapter, ipgo.Sampling(steps=2))
    assert (from_pil(Image.open(picture)) - fewer[0].cpu()).abs().max() <= 0.5 / 255 + 1e-6
    out = ["--out", str(tmp_path / "again")]
    assert cli.main(["generate", str(tmp_path / "adapter"), "--backend", pipeline_folder, *out]) == 0
    (picture,) = (tmp_path / "again").iterdir()
    assert (from_pil(Image.open(picture)) - ours[0].cpu()).abs().max() <= 0.5 / 255 + 1e-6
    ipgo.fit("a fox", backend=pipeline_folder, reward=brightness, method="raw", out=tmp_path / "run", **SHORT)
    with pytest.raises(ipgo.InputError, match="it is a run's folder"):
        ipgo.load_adapter(tmp_path / "run")


def test_what_is_given_up_is_no_gain(
    pipeline_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.py"
    file.write_text(
        "def bad(images, prompts):\n    return (images - images.detach()).square().mean((1, 2, 3)).sqrt()\n"
    )
    words = ["fit", "a fox", "--backend", pipeline_folder, "--reward", f"{file}:bad", "--sampling.steps", "2"]
    words += ["--seeds", "0", "--unseen-seeds", "1", "--out", str(tmp_path / "run")]
    assert cli.main([*words, "--method.ascent.backprop-steps", "1"]) == 1
    assert "see `ipgo doctor`, and try again with a new --out" in capsys.readouterr().err
    page = (tmp_path / "run/report.html").read_text()
    assert "Nothing was learned" in page
    assert " raised " not in page.split("Nothing was learned")[1][:300]


def test_a_reward_may_change_what_it_is_given(pipeline_folder: str) -> None:
    def careless(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        prompts.append("more")
        return images.mul_(0).mean((1, 2, 3))

    settings: dict[str, Any] = {**SHORT, "backend": pipeline_folder, "method": "raw", "device": "cpu"}
    results = [
        ipgo.fit("a fox", reward=each, held_out=["contrast"], **settings) for each in (careless, brightness)
    ]
    ours, theirs = ([each.value for each in one[0].scores if each.reward == "contrast"] for one in results)
    assert ours == theirs


def test_a_fit_leaves_no_gradient_in_a_reward(pipeline_folder: str) -> None:
    class Brightness(torch.nn.Linear):
        def forward(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:  # type: ignore[override]
            return super().forward(images.mean((2, 3)))[:, 0]

    reward = Brightness(3, 1)
    ipgo.fit("a fox", backend=pipeline_folder, reward=reward, method=ONE_STEP, device="cpu", **SHORT)
    assert all(each.requires_grad and each.grad is None for each in reward.parameters())


def test_paths_may_be_texts(pipeline_folder: str, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    settings: dict[str, Any] = {**SHORT, "backend": pipeline_folder, "device": "cpu"}
    ipgo.fit("a fox", reward=brightness, method=ONE_STEP, out=out, **settings)
    folder = ipgo.save_pretrained(ipgo.Run.open(out), str(tmp_path / "shared"))
    ipgo.save_adapter(ipgo.load_adapter(str(folder)), str(tmp_path / "again"))
    assert ipgo.load_adapter(tmp_path / "again").prompts == ("a fox",)


def test_a_text_encoder_in_another_format_is_read(pipeline_folder: str) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    plain = ipgo.load_backend(pipe).encode(["a fox"])
    pipe.text_encoder.double()
    other = ipgo.load_backend(pipe).encode(["a fox"])
    torch.testing.assert_close(plain.embeds, other.embeds)


def test_the_bundled_model_keeps_its_guidance_by_whatever_way_it_is_opened(tmp_path: Path) -> None:
    """And so does a folder that says that it draws the same."""
    place, copied = Path(BACKENDS["emoji"][1]), tmp_path / "copied"
    pipe = StableDiffusionPipeline.from_pretrained(place, dtype=torch.float32)
    pipe.save_pretrained(copied)
    assert ipgo.load_backend(copied, device="cpu").guidance_scale == 7.5
    shutil.copy(place / "vocabulary.json", copied)
    ways = ("emoji", place, str(place), pipe, copied)
    scales = {ipgo.load_backend(each, device="cpu").guidance_scale for each in ways}
    assert scales == {GUIDANCE}


def test_what_all_prompts_share_is_stored_and_read_once(
    pipeline_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, plain = [], ipgo.Run.save_adapter
    monkeypatch.setattr(
        ipgo.Run, "save_adapter", lambda self, *given: (stored.append(1), plain(self, *given))
    )
    method = ipgo.IPGO(ascent=Ascent(steps=1))
    settings = {"method": method, "sampling": ipgo.Sampling(steps=2), "unseen_seeds": 0, "held_out": []}
    prompts = ["a fox", "a lemon", "a cake"]
    result = ipgo.fit(
        prompts, backend=pipeline_folder, reward="contrast", shared=True, out=tmp_path / "run", **settings
    )
    assert stored == [1]
    assert [each.prompt for each in result] == prompts
    assert len({id(each.adapter) for each in result}) == 1


def test_a_text_is_no_list_of_prompts(backend: ipgo.Backend) -> None:
    reward = ipgo.as_reward(brightness)
    with pytest.raises(ipgo.InputError, match=r"task\.prompts is 'cat'; it must be tuple"):
        ipgo.Task(backend, reward, "cat")  # type: ignore[arg-type]
    with pytest.raises(ipgo.InputError, match="evaluate needs a list of prompts, not 'cat'"):
        ipgo.evaluate(backend, {"raw": ipgo.Adapter()}, {"b": reward}, "cat", [0], ipgo.Sampling(), "b")
    with pytest.raises(ipgo.InputError, match=r"unknown ascent\.optimizer 'None'"):
        Ascent(optimizer=None)  # type: ignore[arg-type]


def short_fit(**changes: Any) -> ipgo.Result:
    """One step on a pipeline of its own, unless something else is asked for."""
    settings = {"backend": tiny_pipeline(), "reward": brightness, "method": ONE_STEP, "held_out": []}
    return ipgo.fit("a fox", **{**SHORT, **settings, **changes})


def test_a_reward_that_is_cut_off_from_the_picture_is_refused() -> None:
    """A scorer with weights of its own has a gradient, and none of the picture."""
    head = torch.nn.Linear(3, 1)

    def cut_off(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return head(images.detach().mean((2, 3)))[:, 0]

    def whole(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return head(images.mean((2, 3)))[:, 0]

    with pytest.raises(ipgo.RewardError, match="'cut_off' gives no gradient with respect to the picture"):
        short_fit(reward=cut_off)
    assert short_fit(reward=whole)[0].history


def test_a_compiled_pipeline_is_the_same_model() -> None:
    """Whose weights have the same names. Nothing is drawn: compiling would take long."""
    plain, compiled = tiny_pipeline(), tiny_pipeline()
    for part in ("unet", "text_encoder"):
        setattr(compiled, part, torch.compile(getattr(compiled, part), backend="eager"))
    backends = [ipgo.load_backend(pipe) for pipe in (plain, compiled)]
    assert backends[0].identity == backends[1].identity
    for start in (
        lambda backend: WeightAdapter.start(backend, ["a fox"], LoRA(), seed=0, shared=False),
        lambda backend: TextEncoderAdapter.start(backend, ["a fox"], 0.5, shared=False),
    ):
        names = [list(start(backend).state_dict()) for backend in backends]
        assert names[0]
        assert names[0] == names[1]


def test_a_function_is_not_taken_for_a_reward_of_that_name() -> None:
    def contrast(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return -brightness(images, prompts)

    for settings in (
        {"reward": "contrast", "held_out": [contrast]},
        {"reward": contrast, "held_out": ["contrast"]},
    ):
        with pytest.raises(
            ipgo.InputError, match="two rewards are called 'contrast', one of them ipgo's own"
        ):
            short_fit(**settings)
    own = short_fit(reward="contrast", held_out=[ipgo.as_reward(contrast, "mine")])
    assert {each.reward for each in own[0].scores} == {"contrast", "mine"}
    assert {each.reward for each in short_fit(reward=contrast)[0].scores} == {"contrast"}  # alone it may


def test_a_reward_may_get_another_name() -> None:
    same = ipgo.load_reward("contrast<=0.1")
    other = ipgo.as_reward(same, "mine")
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert other.name == "mine"
    assert torch.equal(other(images, ["", ""]), same(images, ["", ""]))
    assert identity_of(other) == identity_of(same)
    assert ipgo.as_reward(same) is ipgo.as_reward(same, same.name) is same


def test_vectors_of_a_textual_inversion_are_all_read() -> None:
    pipe = tiny_pipeline()
    source = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, pipe.text_encoder.config.hidden_size, generator=source)
    pipe.load_textual_inversion(vectors, token="<cat-toy>")
    backend = ipgo.load_backend(pipe)
    ours = ipgo.generate(backend, ["a <cat-toy> on"], [3], sampling=ipgo.Sampling(2, 4.0))
    noise = backend.pipeline_latents(backend.noise([3])[:, 0])
    theirs = pipe(
        "a <cat-toy> on", num_inference_steps=2, guidance_scale=4.0, latents=noise, output_type="pt"
    )
    torch.testing.assert_close(ours, theirs.images, atol=1e-4, rtol=0)


def test_vectors_are_put_in_as_diffusers_puts_them_in() -> None:
    pipe = tiny_pipeline()
    for token, count in (("<x>", 3), ("<y>", 1), ("cat", 2)):
        pipe.load_textual_inversion(torch.randn(count, pipe.text_encoder.config.hidden_size), token=token)
    texts = ["a <x> and <y>", "<x> <x>_1", "a cat_1 cat", "a category", "none"]
    assert expanded(pipe.tokenizer, texts) == pipe.maybe_convert_prompt(texts, pipe.tokenizer)


def test_what_the_caller_has_set_changes_nothing() -> None:
    pipe = tiny_pipeline()
    expected = short_fit(backend=pipe)[0].scores
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert short_fit(backend=pipe)[0].scores == expected
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(before)
    with torch.autocast("cpu", torch.bfloat16):
        assert short_fit(backend=pipe)[0].scores == expected
    backend = ipgo.load_backend(pipe)
    with torch.device("meta"):
        assert backend.noise([0]).device.type == "cpu"


def test_one_fit_at_a_time_on_a_pipeline() -> None:
    pipe = tiny_pipeline()

    def inner(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        short_fit(backend=pipe)
        return images.mean((1, 2, 3))

    with pytest.raises(ipgo.InputError, match="in use by another fit"):
        short_fit(backend=pipe, reward=inner)
    assert short_fit(backend=pipe)[0].history  # it is free again


def test_a_folder_of_a_backends_name_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "emoji").mkdir()
    monkeypatch.chdir(tmp_path)
    backend = ipgo.load_backend("emoji")
    ipgo.fit("a fox", backend=backend, method="raw", out="run", **SHORT)
    run = ipgo.Run.open(tmp_path / "run")
    assert run.config.backend == "emoji"
    assert "judge-object" in {each.reward for each in run.scores()}


def test_a_relative_folder_is_remembered_as_it_was(
    pipeline_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(pipeline_folder).parent)
    backend = ipgo.load_backend(Path(pipeline_folder).name + "/.", device="cpu")
    monkeypatch.chdir(tmp_path)
    ipgo.fit("a fox", backend=backend, reward=brightness, method="raw", out="run", held_out=[], **SHORT)
    assert ipgo.Run.open(tmp_path / "run").config.backend == str(Path(pipeline_folder).resolve())


class Hidden(StableDiffusionPipeline):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def test_a_pipeline_class_of_the_users_has_the_scale_of_its_parent() -> None:
    pipe = Hidden(**tiny_pipeline().components, requires_safety_checker=False)
    assert ipgo.load_backend(pipe).guidance_scale == 7.5


@pytest.mark.parametrize("part", ["vae", "unet", "tokenizer", "scheduler"])
def test_a_pipeline_that_lacks_a_part_is_refused(part: str) -> None:
    pipe = tiny_pipeline()
    setattr(pipe, part, None)
    with pytest.raises(ipgo.InputError, match=f"has no {part}"):
        ipgo.load_backend(pipe)


def test_weights_that_are_cast_by_layer_are_refused() -> None:
    pipe = tiny_pipeline()
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    with pytest.raises(ipgo.InputError, match="unet keeps its weights in another format"):
        ipgo.load_backend(pipe)


def test_a_cast_in_inference_mode_can_be_learned_through() -> None:
    pipe = tiny_pipeline()
    with torch.inference_mode():
        backend = ipgo.load_backend(pipe, dtype="bfloat16")
    assert short_fit(backend=backend)[0].history


@pytest.mark.parametrize("seeds", [np.array(3), torch.tensor(3), 3])
def test_a_single_number_is_no_sequence_of_seeds(seeds: Any, backend: ipgo.Backend) -> None:
    with pytest.raises(ipgo.InputError, match="seeds"):
        ipgo.fit("a fox", seeds=seeds)
    with pytest.raises(ipgo.InputError, match="seeds"):
        ipgo.generate(backend, ["a fox"], seeds)


def test_a_folder_that_is_gone_is_no_place(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.register_to_config(_name_or_path=str(tmp_path / "gone"))
    assert pipe.name_or_path
    short_fit(backend=pipe, method="raw", out=tmp_path / "run")
    assert ipgo.Run.open(tmp_path / "run").config.backend == "StableDiffusionPipeline"


def test_a_fit_draws_in_its_own_steps_and_is_judged_in_all(pipeline_folder: str, tmp_path: Path) -> None:
    sampling, method = ipgo.Sampling(4, 3.0, fit_steps=2), ipgo.IPGO(ascent=Ascent(steps=1))
    settings: dict[str, Any] = {"backend": pipeline_folder, "reward": "colorfulness", "held_out": ()}
    settings |= {"method": method, "sampling": sampling, "seeds": (0,), "unseen_seeds": 0, "device": "cpu"}
    ipgo.fit("sun", **settings, out=tmp_path / "run")
    run, reward = ipgo.Run.open(tmp_path / "run"), ipgo.load_reward("colorfulness", device="cpu")
    assert run.results()[0]["cost"]["calls"]["denoiser"] == 2
    backend = ipgo.load_backend(pipeline_folder, device="cpu")
    for name, adapter in (("raw", None), ("ipgo", run.load_adapter(run.prompts[0]))):
        images = ipgo.generate(backend, ["sun"], [0], adapter, ipgo.Sampling(4, 3.0))
        (own,) = [each.value for each in run.scores() if each.method == name]
        assert own == pytest.approx(reward(images, ["sun"]).item(), abs=1e-5)
