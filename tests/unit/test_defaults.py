"""Models of a few steps, by their names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline

import ipgo
from ipgo import backends, cli
from ipgo.backends import BACKENDS, FewSteps, few_steps
from ipgo.backends.world import GUIDANCE
from ipgo.cli_compare import entries_of
from ipgo.config import RunConfig
from ipgo.defaults import for_backend, method_and_sampling
from ipgo.methods import METHODS
from ipgo.models import load_models
from tests import tiny_families as tiny

LEAST = ("--reward", "colorfulness", "--unseen-seeds", "1", "--method.ascent.steps", "1", "--held-out")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("sd-turbo", (1, 1.0)),
        ("sdxl-turbo", (1, 1.0)),
        ("lcm", (4, 8.5)),
        ("SimianLuo/LCM_Dreamshaper_v7", (4, 8.5)),
        ("Lykon/dreamshaper-8-lcm", (4, 1.0)),
        ("latent-consistency/lcm-sdxl", (4, 1.0)),
        ("flux-schnell", (4, 1.0)),
        ("sana-sprint", (2, 4.5)),
        ("z-image-turbo", (8, 1.0)),
        ("flux2-klein", (4, 1.0)),
        ("stabilityai/stable-diffusion-3.5-large-turbo", (4, 1.0)),
        ("sd3.5-turbo.safetensors", (4, 1.0)),
        ("sd35-turbo.safetensors", (4, 1.0)),
        ("SDXLTurbo", (1, 1.0)),
        ("owner/mine-turbo", (4, 1.0)),
        ("zimage-turbo", (8, 1.0)),
        ("zimageTurbo.safetensors", (8, 1.0)),
        ("ZImage_Turbo", (8, 1.0)),
        ("owner/FLUX.1-Turbo-Alpha", (8, 3.5)),
        ("FLUX.1-dev-turbo-4step", (4, 3.5)),
        ("flux1-dev-lightning", (4, 3.5)),
        ("flux1-schnell-turbo", (4, 1.0)),
        ("FLUX.2-klein-4B-turbo", (4, 1.0)),
        ("models/sdxl_lightning_8step.safetensors", (8, 1.0)),
        ("models/SDXL-Lightning/", (4, 1.0)),
    ],
)
def test_few_steps_by_name(source: str, expected: tuple[int, float]) -> None:
    few = few_steps(source)
    assert few is not None
    assert (few.steps, few.guidance_scale) == expected


@pytest.mark.parametrize(
    "source", ["emoji", "sd15", "flux2-klein-base", "turbo/sd15", "turbocharged", "8step"]
)
def test_others_have_many_steps(source: str) -> None:
    assert few_steps(source) is None
    assert for_backend(source, "ipgo") == {}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (tiny.lcm, (4, 8.5)),
        (tiny.lcm_lora, (4, 1.0)),
        (tiny.lcm_sdxl, (4, 8.0)),
        (tiny.sana_sprint, (2, 4.5)),
        (lambda: tiny.flux(distilled=False), (4, 1.0)),
        (tiny.flux_2, (4, 1.0)),
        (tiny.flux, None),
        (lambda: tiny.flux_2(distilled=False), None),
        (tiny.sdxl, None),
    ],
)
def test_few_steps_by_what_a_pipeline_is_made_of(
    make: Callable[[], Any], expected: tuple[int, float] | None, tmp_path: Path
) -> None:
    """Whatever its folder is called, and with none at all."""
    pipe = make()
    pipe.save_pretrained(tmp_path / "mine")
    backend = ipgo.load_backend(pipe)
    for few in (few_steps(str(tmp_path / "mine")), backend.few_steps):
        assert (None if few is None else (few.steps, few.guidance_scale)) == expected
    if expected is not None:
        assert backend.guidance_scale == expected[1]
        assert for_backend(str(tmp_path / "mine"), "ipgo")["sampling"]["steps"] == expected[0]
        method, sampling = method_and_sampling(backend.few_steps)
        assert (sampling.steps, sampling.guidance_scale) == expected
        assert method.ascent.backprop_steps is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (tiny.lcm_lora, "dreamshaper-8-lcm", (4, 1.0)),
        (tiny.lcm, "my-lcm-8step", (8, 8.5)),
        (tiny.lcm_sdxl, "lcm-sdxl", (4, 8.0)),
        (tiny.flux, "FLUX.1-dev-turbo-8step", (8, 3.5)),
        (tiny.flux, "mine-turbo", (8, 3.5)),
        (tiny.flux, "mine-lightning", (4, 3.5)),
        (lambda: tiny.flux(distilled=False), "flux-turbo", (8, 1.0)),
        (tiny.z_image, "mine-turbo", (8, 1.0)),
        (tiny.sdxl, "flux-style-lightning", (4, 1.0)),
        (tiny.sdxl, "mine-turbo", (4, 1.0)),
    ],
)
def test_the_name_says_the_steps_and_the_network_the_scale(
    make: Callable[[], Any], name: str, expected: tuple[int, float], tmp_path: Path
) -> None:
    """Of a folder, of what was opened from it, and of a file of weights with the folder beside it."""
    make().save_pretrained(tmp_path / name)
    source = str(tmp_path / name)
    backend = ipgo.load_backend(source, device="cpu")
    for few in (few_steps(source), few_steps(f"{source}.safetensors"), backend.few_steps):
        assert few is not None
        assert (few.steps, few.guidance_scale) == expected
    assert ipgo.Sampling().scale(backend) == expected[1]


def test_a_class_of_the_users_is_known_by_the_one_that_it_is_made_from() -> None:
    class Mine(LatentConsistencyModelPipeline):
        pass

    backend = ipgo.load_backend(Mine(**tiny.lcm().components, requires_safety_checker=False))
    assert backend.few_steps == FewSteps(4, 8.5)


def test_a_hub_id_is_known_by_what_it_is_made_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "_place", lambda source: ("LatentConsistencyModelPipeline", source))
    monkeypatch.setattr(backends, "_open", lambda *_: tiny.lcm())
    backend = ipgo.load_backend("owner/name")
    assert backend.few_steps is not None
    assert backend.guidance_scale == backend.few_steps.guidance_scale == 8.5
    # Its name did not say so: the settings are those of other models.
    load_models(RunConfig(("a fox",), backend="owner/name", reward="contrast"), backend)
    assert "owner/name is a few-step model, and sampling.steps is 20" in caplog.text
    assert "--sampling.steps 4 --sampling.guidance_scale 8.5" in caplog.text
    caplog.clear()
    four = ipgo.Sampling(steps=4, fit_steps=None)
    load_models(RunConfig(("a fox",), backend="owner/name", reward="contrast", sampling=four), backend)
    assert not caplog.text


def test_a_damaged_folder_is_left_to_the_opening_of_it(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("[1")
    assert few_steps(str(tmp_path)) is None
    for content in ("[]", '{"scheduler": []}', '{"scheduler": {"a": 1}}', '{"scheduler": [1, 2, 3]}'):
        (tmp_path / "model_index.json").write_text(content)
        assert few_steps(str(tmp_path)) is None


def test_every_name_of_few_steps_is_known() -> None:
    assert {name for name in BACKENDS if few_steps(name)} == {
        *("sd-turbo", "sdxl-turbo", "lcm", "flux-schnell", "sana-sprint", "z-image-turbo", "flux2-klein")
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sd-turbo", "drawn in 1 step with guidance off, and"),
        ("flux-schnell", "drawn in 4 steps with no guidance, and"),
        ("lcm", "drawn in 4 steps with a guidance scale of 8.5, and"),
        ("sd15", None),
    ],
)
def test_the_list_says_how_a_model_of_few_steps_is_drawn(
    name: str, said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["list", "backends", name]) == 0
    out = capsys.readouterr().out
    assert ("drawn in" in out) == (said is not None)
    assert said is None or said in out


@pytest.mark.parametrize("method", METHODS)
def test_gradient_goes_through_every_step_where_a_method_has_the_choice(method: str) -> None:
    chosen = for_backend("sd-turbo", method)
    assert chosen["sampling"] == {"steps": 1, "guidance_scale": 1.0}
    has_it = METHODS[method]().ascent is not None
    assert chosen.get("method") == ({"ascent": {"backprop_steps": None}} if has_it else None)


@pytest.fixture
def turbo(pipeline_folder: str, tmp_path: Path) -> str:
    """The tiny pipeline in a folder whose name says that it draws in one step."""
    shutil.copytree(pipeline_folder, tmp_path / "tiny-sd-turbo")
    return str(tmp_path / "tiny-sd-turbo")


def settings_of(folder: Path) -> tuple[int, float, int | None]:
    config = json.loads((folder / "run.json").read_text())["config"]
    return (
        config["sampling"]["steps"],
        config["sampling"]["guidance_scale"],
        config["method"]["ascent"]["backprop_steps"],
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), (1, 1.0, None)),
        (("--sampling.steps", "3"), (3, 1.0, None)),
        (("--sampling.guidance_scale", "2", "--method.ascent.backprop_steps", "1"), (1, 2.0, 1)),
        (("--preset", "fast"), (10, 1.0, 1)),
    ],
)
def test_the_run_records_what_was_chosen(
    turbo: str,
    tmp_path: Path,
    flags: tuple[str, ...],
    expected: tuple[int, float, int | None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "run"
    assert cli.main(["fit", "a fox", f"--backend={turbo}", *LEAST, "--out", str(out), *flags]) == 0
    assert settings_of(out) == expected
    assert "sampling.steps 1, sampling.guidance_scale 1.0, method.ascent.backprop_steps null" in caplog.text


def test_a_model_known_by_its_name_has_a_guidance_of_its_own(turbo: str, pipeline_folder: str) -> None:
    """That of its few steps, or the one that the bundled model draws best with; others have their pipeline's."""
    assert ipgo.Sampling().scale(ipgo.load_backend(turbo, device="cpu")) == 1
    assert ipgo.Sampling().scale(ipgo.load_backend(pipeline_folder, device="cpu")) == 7.5
    assert ipgo.Sampling().scale(ipgo.load_backend("emoji", device="cpu")) == GUIDANCE
    assert ipgo.Sampling(guidance_scale=3.0).scale(ipgo.load_backend("emoji", device="cpu")) == 3


def test_a_pipeline_object_goes_by_the_name_it_was_loaded_from(turbo: str, tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(turbo)
    backend = ipgo.load_backend(pipe)
    assert (backend.name, backend.origin, backend.guidance_scale) == ("StableDiffusionPipeline", turbo, 1)
    ipgo.fit("a fox", reward="colorfulness", backend=backend, out=tmp_path / "run", unseen_seeds=0)
    assert settings_of(tmp_path / "run") == (1, 1.0, None)
    made = ipgo.load_backend(StableDiffusionPipeline(**pipe.components, requires_safety_checker=False))
    assert (made.origin, made.guidance_scale) == ("StableDiffusionPipeline", 7.5)


def test_in_python_too(turbo: str, tmp_path: Path) -> None:
    backend = ipgo.load_backend(turbo, device="cpu")
    ipgo.fit("a fox", reward="colorfulness", backend=backend, out=tmp_path / "run", unseen_seeds=0)
    assert settings_of(tmp_path / "run") == (1, 1.0, None)
    given = ipgo.Sampling(2, 3.0)
    ipgo.fit(
        "a fox", reward="colorfulness", backend=turbo, sampling=given, out=tmp_path / "own", unseen_seeds=0
    )
    assert settings_of(tmp_path / "own") == (2, 3.0, None)


def test_a_comparison_does_the_same_with_every_method() -> None:
    entries = entries_of("ipgo,draft,raw", {"draft": {"method": {"ascent": {"lr": 0.1}}}}, {}, "sd-turbo")
    assert entries["ipgo"]["method"] == {"name": "ipgo", "ascent": {"backprop_steps": None}}
    assert entries["draft"]["method"] == {"name": "draft", "ascent": {"backprop_steps": None, "lr": 0.1}}
    assert entries["raw"]["method"] == {"name": "raw"}
    assert entries_of("ipgo", {}, {})["ipgo"]["method"] == {"name": "ipgo"}


def test_a_method_object_on_a_model_of_few_steps(caplog: pytest.LogCaptureFixture) -> None:
    """K = 2, which nobody chose, is all of one step; where it is some of four, that is said and stays."""
    caplog.set_level("INFO")
    object_ = ipgo.IPGO(insertion=ipgo.Insertion(4, 4))
    method, sampling = method_and_sampling(FewSteps(1), object_)
    assert (sampling.steps, sampling.guidance_scale) == (1, 1.0)
    assert method == replace(object_, ascent=replace(object_.ascent, backprop_steps=None))
    assert not caplog.text
    assert method_and_sampling(FewSteps(4), object_)[0] == object_
    assert "gradient in the last 2 of 4 steps" in caplog.text
    caplog.clear()
    two = ipgo.Sampling(steps=2, fit_steps=None)
    assert method_and_sampling(FewSteps(1), object_, two) == (object_, two)  # the steps that there are count
    assert method_and_sampling(None, object_) == (object_, ipgo.Sampling())
    three = replace(object_, ascent=replace(object_.ascent, backprop_steps=3))
    assert method_and_sampling(FewSteps(4), three)[0] == three
    assert not caplog.text


def test_a_fit_of_one_step_takes_a_method_object(turbo: str) -> None:
    short = ipgo.IPGO(insertion=ipgo.Insertion(1, 1), ascent=ipgo.Ascent(steps=1))
    ipgo.fit("a fox", backend=turbo, reward="contrast", held_out=(), method=short, seeds=(0,), unseen_seeds=0)


@pytest.mark.parametrize("make", [tiny.sd_turbo, tiny.sdxl_turbo])
def test_a_turbo_of_another_name_is_suspected(
    make: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = RunConfig(("a fox",), backend="mine", reward="contrast", held_out=())
    load_models(config, ipgo.load_backend(make()))
    assert "has the scheduler of SD-Turbo and SDXL-Turbo" in caplog.text
    caplog.clear()
    load_models(replace(config, sampling=ipgo.Sampling(steps=4)), ipgo.load_backend(make()))
    assert not caplog.text


def test_a_place_may_begin_at_home(turbo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its defaults are looked up."""
    monkeypatch.setenv("HOME", str(Path(turbo).parent))
    place = f"~/{Path(turbo).name}"
    assert few_steps(place) == few_steps(turbo) is not None
    assert ipgo.load_backend(place, device="cpu").origin == str(Path(turbo).resolve())
