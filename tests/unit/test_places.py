"""Folders and files of this machine are told to others by their names alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ipgo.config import RunConfig
from ipgo.methods import METHODS
from ipgo.places import bare_backend, bare_identity, bare_reward, bare_settings


@pytest.mark.parametrize(
    ("backend", "told"),
    [
        ("sd15", "sd15"),
        ("owner/model@main", "owner/model@main"),
        ("/home/me/private/model", "model"),
        ("./owner/model", "model"),  # a folder, since it is written so
        ("customer-x/private/model/", "model"),
        ("customer-x/model.safetensors", "model.safetensors"),
        ("/models/sd15", "./sd15"),
        (r"C:\private\model", "model"),
        ("StableDiffusionPipeline", "StableDiffusionPipeline"),
    ],
)
def test_a_backend_has_its_name(backend: str, told: str) -> None:
    assert bare_backend(backend) == told


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("clip+0.5*emoji-aesthetic<=0.9", "clip+0.5*emoji-aesthetic<=0.9"),
        ("customer-x/private/mine.py:warmth", "mine.py:warmth"),
        ("clip + 0.5*/a folder/x/mine.py:warmth<=0.2", "clip + 0.5*mine.py:warmth<=0.2"),
        (r"C:\private\mine.py:warmth", "mine.py:warmth"),
        (r"aesthetic+C:\private\mine.py:warmth", "aesthetic+mine.py:warmth"),
        ("/private/c++/mine.py:warmth", "mine.py:warmth"),  # of a file that is not there
        ("clip@notebook:/models/mine", "clip@notebook:mine"),
        ("clip:owner/model", "clip:owner/model"),
        (r"hpsv2:D:\models\HPS_v2_compressed.pt", "hpsv2:HPS_v2_compressed.pt"),
        ("cmd:/home/me/private/score.sh {image}", "cmd:score.sh {image}"),
        ("cmd:customer-x/score {image} {prompt}", "cmd:score {image} {prompt}"),
        (
            "clip+cmd:'/my private/score.sh' --by=/x/private/m.pt {image}",
            "clip+cmd:score.sh --by=m.pt {image}",
        ),
        ("cmd:python '/private/my file.py' {image}", "cmd:python 'my file.py' {image}"),
        (r"cmd:'C:\private\score.exe' {image}", "cmd:score.exe {image}"),
        ("cmd:it's /private/x", "cmd:x"),  # the name of an object
        ("ask:is it good and/or cosy?", "ask:is it good and/or cosy?"),
    ],
)
def test_a_reward_has_no_path(spec: str, told: str) -> None:
    assert bare_reward(spec) == told


def test_what_is_here_is_no_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "customer-x/clip").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert bare_reward("clip:customer-x/clip") == "clip:clip"


def test_what_a_reward_of_ones_own_states_has_no_path() -> None:
    stated = {"id": "x/private/mine.py:f", "weights": ["/private/w.pt", "0fa1"], "preprocessing": "mean/std"}
    nested = {"id": "sum", "terms": [{"weight": 0.5, "reward": stated}]}
    bare = {"id": "mine.py:f", "weights": ["w.pt", "0fa1"], "preprocessing": "mean/std"}
    assert bare_identity(nested) == {"id": "sum", "terms": [{"weight": 0.5, "reward": bare}]}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (None, None),
        ("one:test?n=4", "one:test?n=4"),
        ("customer-x/prompts.txt", "prompts.txt"),
        (r"C:\private\prompts.txt", "prompts.txt"),
        (
            "coco:/private/captions_val2017.json?category=dog&n=3",
            "coco:captions_val2017.json?category=dog&n=3",
        ),
        ("pickapic?exclude=/private/words.txt&n=3", "pickapic?exclude=words.txt&n=3"),
    ],
)
def test_where_prompts_are_from_has_no_path(source: str | None, told: str | None) -> None:
    config = RunConfig(("a fox",), prompts_from=source)
    assert bare_settings(config.to_json())["prompts_from"] == told


@pytest.mark.parametrize(
    ("method", "given", "told"),
    [
        (
            "promptist",
            {"model": "/private/gpt", "tokenizer": "owner/gpt"},
            {"model": "gpt", "tokenizer": "owner/gpt"},
        ),
        ("dpo-diffusion", {"word_list": "wordnet:/private/dict"}, {"word_list": "wordnet:dict"}),
        ("dpo-diffusion", {"word_list": "customer-x/words.json"}, {"word_list": "words.json"}),
    ],
)
def test_settings_of_a_method_have_no_path(method: str, given: dict[str, Any], told: dict[str, Any]) -> None:
    config = RunConfig(("a fox",), method=METHODS[method](**given), held_out=("x/y/mine.py:f",))
    settings, bare = config.to_json(), bare_settings(config.to_json())
    assert bare["method"] == {**settings["method"], **told}
    assert bare["held_out"] == ["mine.py:f"]
    same = settings.keys() - {"method", "held_out"}
    assert {key: bare[key] for key in same} == {key: settings[key] for key in same}
