"""What `ipgo.fit` and its loaders take from Python, where things are objects and not words."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import ipgo
from ipgo.ascent import Ascent

SHORT: dict[str, Any] = {"sampling": ipgo.Sampling(steps=2), "seeds": (0,), "unseen_seeds": 1}
ONE_STEP = ipgo.IPGO(ascent=Ascent(steps=1))


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean((1, 2, 3))


def test_a_pipeline_object_is_fitted_where_it_is(pipeline_folder: str, tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(Path(pipeline_folder))
    fit = ipgo.fit("a fox", backend=pipe, reward=brightness, method=ONE_STEP, out=tmp_path, **SHORT)
    same = ipgo.fit(
        "a fox", backend=Path(pipeline_folder), reward=brightness, method=ONE_STEP, device="cpu", **SHORT
    )
    assert [each.value for each in fit[0].scores] == [each.value for each in same[0].scores]
    assert ipgo.Run.open(tmp_path).config.backend == "StableDiffusionPipeline"


def test_held_out_rewards_are_named(pipeline_folder: str) -> None:
    result = ipgo.fit(
        "a fox",
        backend=pipeline_folder,
        reward=brightness,
        held_out=["contrast"],
        method=ONE_STEP,
        device=torch.device("cpu"),
        **SHORT,
    )
    assert {gain.reward: gain.held_out for gain in result.on_unseen_seeds} == {
        "brightness": False,
        "contrast": True,
    }


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
