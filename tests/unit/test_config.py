from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ipgo import DNO, IPGO, Ascent, BestOfN, DRaFT, Embedding, Insertion, Raw, ReNO, Sampling
from ipgo.config import RunConfig, build, parse, run_parser
from ipgo.errors import InputError
from ipgo.methods import DDPO, BlackBoxIPGO, DPODiffusion, Joint, TextCraftor
from ipgo.ppo import PPO
from ipgo.settings import flatten, merge, method_of, presets, read_settings

PROMPTS = ("a fox", "a lemon")


def read(settings: dict[str, Any], *flags: str) -> RunConfig:
    return build(parse(run_parser(method_of(settings)), settings, list(flags)), PROMPTS)


def test_defaults_are_those_of_the_dataclass() -> None:
    assert read({}) == RunConfig(PROMPTS)


def test_a_relative_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert read({}, "--backend", "models/mine").backend == "./models/mine"
    assert read({}, "--backend", "models/other").backend == "models/other"


def test_a_presets_shared_is_undone_by_a_flag() -> None:
    settings = {"shared": True, "judged_prompts": 5}
    assert (read(settings).shared, read(settings).judged_prompts) == (True, 5)
    undone = read(settings, "--no_shared")
    assert (undone.shared, undone.judged_prompts) == (False, None)
    with pytest.raises(InputError, match=r"judged_prompts is 3; .* needs shared"):
        read(settings, "--no_shared", "--judged_prompts=3")
    assert read({}, "--shared").shared


def test_flags_override_settings_and_settings_defaults() -> None:
    settings = {
        "sampling": {"steps": 9, "eta": 0.5},
        "method": {"name": "ipgo", "ascent": {"lr": 0.5}},
        "seeds": [3],
    }
    config = read(settings, "--sampling.steps", "7", "--method.insertion.num_prefix", "4", "--shared")
    assert config == RunConfig(
        PROMPTS,
        IPGO(Insertion(num_prefix=4), replace(IPGO().ascent, lr=0.5)),
        sampling=Sampling(steps=7, eta=0.5),
        seeds=(3,),
        shared=True,
    )
    assert read(settings, "--seeds", "1", "2").seeds == (1, 2)
    assert read(settings, "--seeds").seeds == ()


def short(method: Any, **ascent: Any) -> Any:
    """The method with an ascent of two steps."""
    return replace(method, ascent=replace(method.ascent, steps=2, **ascent))


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("embedding", "--method.ascent.steps 2", short(Embedding())),
        ("draft", "--method.ascent.steps 2", short(DRaFT())),
        ("reno", "--method.ascent.steps 2", short(ReNO())),
        ("dno", "--method.ascent.steps 2", short(DNO())),
        ("best-of-n", "--method.n 2", BestOfN(n=2)),
        (
            "joint",
            "--method.ascent.steps 2 --method.insertion.rank 8",
            short(Joint(replace(Joint().insertion, rank=8))),
        ),
        (
            "textcraftor",
            "--method.ascent.steps 2 --method.ascent.backprop_steps 1",
            short(TextCraftor(), backprop_steps=1),
        ),
        ("ddpo", "--method.ppo.epochs 2 --method.ppo.samples 2", DDPO(ppo=PPO(epochs=2, samples=2))),
        (
            "ipgo-black-box",
            "--method.candidates 3 --method.insertion.rank 4",
            BlackBoxIPGO(replace(BlackBoxIPGO().insertion, rank=4), candidates=3),
        ),
        (
            "dpo-diffusion",
            "--method.target both --method.solver hybrid --method.candidates 2 --method.gradient_steps 1 "
            "--method.window [0.2,0.8]",
            DPODiffusion("both", "hybrid", candidates=2, gradient_steps=1, window=(0.2, 0.8)),
        ),
    ],
)
def test_flags_are_the_settings_of_a_method(name: str, flags: str, expected: Any) -> None:
    assert read({"method": {"name": name}}, *flags.split()).method == expected


@pytest.mark.parametrize(
    ("method", "seeds"),
    [
        (IPGO(), (0, 1, 2, 3)),
        (IPGO(ascent=replace(IPGO().ascent, steps=3)), (0, 1, 2)),
        (Raw(), (0, 1, 2, 3)),
        (ReNO(), (0,)),
    ],
)
def test_seeds_that_are_not_asked_for_are_several_where_a_method_can_use_them(
    method: Any, seeds: tuple[int, ...]
) -> None:
    assert RunConfig(PROMPTS, method).seeds == seeds
    assert RunConfig(PROMPTS, method, seeds=(7,)).seeds == (7,)


def test_json_round_trip_and_identity() -> None:
    for config in (
        RunConfig(PROMPTS, held_out=("contrast",), scheduler="lms", seeds=()),
        RunConfig(PROMPTS, Raw(), image_size=64),
        RunConfig(PROMPTS, IPGO(Insertion(rank=3, norm=None)), shared=True),
    ):
        assert RunConfig.from_json(config.to_json()) == config
    config = RunConfig(PROMPTS)
    assert replace(config, chunk=9, device="cpu").digest() == config.digest()
    assert replace(config, seed=1).digest() != config.digest()
    assert config.identity()["method.ascent.lr"] == IPGO().ascent.lr


def test_a_whole_number_where_a_float_is_meant_is_one() -> None:
    """Else a search that was begun in Python would not be gone on with by the command that says the same."""
    python = RunConfig(PROMPTS, sampling=Sampling(guidance_scale=3, eta=1))
    flags = RunConfig(PROMPTS, sampling=Sampling(guidance_scale=3.0, eta=1.0))
    assert python.digest() == flags.digest()
    assert str(DPODiffusion(window=(0, 1)).window) == "(0.0, 1.0)"
    assert str(Insertion(norm=2).norm) == "2.0"
    assert str(Ascent(steps=3).steps) == "3"


@pytest.mark.parametrize("name", presets())
def test_presets_are_valid(name: str) -> None:
    config = read(read_settings(name, None))
    assert RunConfig.from_json(config.to_json()) == config


def test_paper_code_is_the_notebook() -> None:
    config = read(read_settings("paper-code", None))
    assert config.method.ascent == Ascent(
        steps=50,
        lr=1e-3,
        lr_basis=None,
        lr_decay=0.9,
        decay_every=10,
        max_grad_norm=1.0,
        backprop_steps=2,
        penalty_weight=1e-3,
    )
    insertion = config.method.insertion  # type: ignore[attr-defined]
    assert insertion == Insertion(
        10,
        10,
        insertion.rank,
        "unused",
        bias=True,
        cross_attention="none",
        norm=None,
        start=1.0,
        negative=False,
    )
    assert insertion.rank_of(10, 768) == 300
    assert (config.scheduler, config.padding, config.seeds) == ("lms", "none", (0,))
    assert config.sampling == Sampling(steps=50, guidance_scale=7.5, fit_steps=None)


def test_a_file_overrides_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: ipgo\nsampling: {steps: 3}\n")
    settings = read_settings("fast", str(file))
    assert settings["sampling"]["steps"] == 3
    assert settings["method"]["name"] == "ipgo"
    assert settings["unseen_seeds"] == 2
    file.write_text("method: {ascent: {steps: 4}}\n")
    assert read(read_settings("fast", str(file))).method.ascent.backprop_steps == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chunk": 0}, "chunk is 0; it must be at least 1"),
        ({"unseen_seeds": -1}, "unseen_seeds is -1"),
        ({"seeds": (1, 1)}, r"seeds is \[1, 1\]; they must be different"),
        ({"seeds": (-1,)}, "whole numbers from 0"),
        ({"seeds": (1001,)}, "reserved for judging"),
        ({"seeds": (), "unseen_seeds": 0}, "at least one seed"),
        ({"sampling": Sampling(steps=1)}, "backprop_steps is .*; sampling.steps allows at most 1"),
        ({"prompts": ()}, "prompts is empty"),
    ],
)
def test_settings_that_cannot_work(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RunConfig(**{"prompts": PROMPTS, **values})


def test_seeds_of_the_same_noise_are_one() -> None:
    """torch's CPU generator reads the lower 32 bits."""
    noise = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7 + 2**32)]
    assert torch.equal(*noise)
    with pytest.raises(InputError, match=r"must be different .* lower 32 bits alone"):
        RunConfig(PROMPTS, seeds=(7, 7 + 2**32))
    with pytest.raises(InputError, match="reserved for judging"):
        RunConfig(PROMPTS, seeds=(1000 + 2**32,))


def test_a_schedulers_name_says_in_how_many_steps_a_fit_draws() -> None:
    short = RunConfig(PROMPTS, sampling=Sampling(fit_steps=1))
    short.check_fit()  # the model's own may draw noise, and then it takes all steps
    message = "method.ascent.backprop_steps is .*; sampling.fit_steps allows at most 1"
    with pytest.raises(InputError, match=message):
        short.check_steps(1)
    with pytest.raises(InputError, match=message):
        replace(short, scheduler="euler").check_fit()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("method.ascent.lr: 0.5", {"method": {"ascent": {"lr": 0.5}}}),
        ("method: ipgo\nmethod.ascent.lr: 0.5", {"method": {"name": "ipgo", "ascent": {"lr": 0.5}}}),
        ("sampling.steps: 33\nsampling: {eta: 1.0}", {"sampling": {"steps": 33, "eta": 1.0}}),
        (
            "entries:\n  lr-0.5: {method.ascent.lr: 0.5}",
            {"entries": {"lr-0.5": {"method": {"ascent": {"lr": 0.5}}}}},
        ),
        ("sampling.steps: 33\nsampling: {steps: 9}", r"sampling\.steps is given twice"),
        ("seed: 1\nseed.x: 2", "seed is given twice"),
        ("seed: 1\nseed: 2", "cannot be read: 'seed' a second time in line 2"),
        ("entries: {ipgo: {seed: 1}, ipgo: {seed: 2}}", "cannot be read: 'ipgo' a second time in line 1"),
        ("[seed]: 1", "cannot be read: found unhashable key in line 1"),
        (
            "sampling: &one {steps: 9, eta: 1.0}\nentries: {ipgo: {sampling: {<<: *one, steps: 3}}}",
            {
                "sampling": {"steps": 9, "eta": 1.0},
                "entries": {"ipgo": {"sampling": {"steps": 3, "eta": 1.0}}},
            },
        ),
    ],
)
def test_dotted_names_in_a_file_are_nested_ones(tmp_path: Path, text: str, found: Any) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    if isinstance(found, dict):
        assert read_settings(None, str(file)) == found
        return
    with pytest.raises(InputError, match=found):
        read_settings(None, str(file))


def test_a_presets_settings_are_for_its_own_method(tmp_path: Path) -> None:
    """As with --preset and --method."""
    file = tmp_path / "settings.yaml"
    file.write_text("preset: fast\nmethod: draft")
    settings = read_settings(None, str(file))
    assert settings["method"] == {"name": "draft"}
    assert settings["sampling"] == read_settings("fast", None)["sampling"]
    file.write_text("method: {name: ipgo, ascent: {lr: 0.5}}")
    assert read_settings("fast", str(file))["method"]["ascent"] == {
        "steps": 15,
        "backprop_steps": 1,
        "lr": 0.5,
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stepz", "3"], "unknown option '--stepz'"),
        (["--sampling.stepz", "3"], "unknown option '--sampling.stepz'; did you mean '--sampling.steps'"),
        (
            ["--steps", "3"],
            "unknown option '--steps'; did you mean '--method.ascent.steps' or '--sampling.steps'\\?",
        ),
        (["--sampling.steps", "four"], "sampling.steps is 'four'; it must be a whole number"),
        (["--method.insertion.rank", "x"], "method.insertion.rank is 'x'; it must be a whole number or null"),
        (["--method.insertion.rotations", "up"], "is 'up'; it must be 'applied', 'unused', 'none'"),
        (["--seeds", "x"], "seeds is 'x'"),
        (["--chunk", "2.5"], "chunk is 2.5; it must be a whole number"),
        (["--unseen_seeds", "null"], "unseen_seeds is null; it must be a whole number"),
        (["--method.ascent.lr", "nan"], "method.ascent.lr is nan; it must be a finite number"),
        (
            ["--method.ascent.lr", "1e40"],
            "method.ascent.lr is 1e\\+40; it must be above 0 and at most 1,000,000",
        ),
        (["--method.ascent.lr_decay", "2"], "lr_decay is 2.0; it must be above 0 and at most 1"),
        (["--sampling.steps", "0"], "sampling.steps is 0; it must be at least 1"),
        (["--seed"], "argument --seed: expected one argument"),
        (["a prompt"], "unexpected 'a'; give prompts first, in quotes"),
    ],
)
def test_bad_flags_are_one_sentence(flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read({}, *flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sampling: {stepz: 3}", "unknown option 'sampling.stepz'; did you mean 'sampling.steps'"),
        ("samplin: {steps: 3}", "unknown option 'samplin.*did you mean 'sampling"),
        ("method: {name: ipgo, ascent: {lrr: 3}}", "did you mean 'method.ascent.lr'"),
        ("method: ipgoo", "unknown method 'ipgoo'; did you mean 'ipgo'"),
        ("sampling: {steps: many}", "sampling.steps is 'many'"),
        ("- a\n- b", "holds no 'key: value' settings"),
        ("a: 3\nb: [", "cannot be read: .* in line 2"),
        ("sampling: 3", "sampling is 3; it must be a mapping of settings"),
        ("method: {ascent: [1]}", r"method.ascent is \[1\]; it must be a mapping of settings"),
        ("method: 3", "method is 3; it must be a name"),
        ("method: {name: [ipgo]}", "it must be a name"),
        ("3: 4", "3 is not a setting"),
        ("sampling: {3: 4}", "sampling.3 is not a setting"),
        ("shared: 2", "shared is 2; it must be true or false"),
        ("config: other.yaml", "has 'config', which only the command line takes"),
        ("text: a fox", "has 'text', which only the command line takes"),
        ("preset: paper", "unknown preset 'paper'; did you mean 'paper-code'"),
        ("method: {ascent: {lr: .inf}}", "ascent.lr is inf; it must be a finite number"),
        ("sampling: {guidance_scale: .nan}", "guidance_scale is nan; it must be a finite number"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read(read_settings(None, str(file)))
    assert "\n" not in str(error.value)


def test_a_file_may_say_less(tmp_path: Path) -> None:
    """A preset of its own, one seed without brackets, and nothing at all about the method."""
    file = tmp_path / "run.yaml"
    file.write_text("preset: fast\nseeds: 3\nheld_out: contrast\nmethod:\n")
    config = read(read_settings(None, str(file)))
    assert config == replace(read(read_settings("fast", None)), seeds=(3,), held_out=("contrast",))
    assert read(read_settings("ipgo-plus", str(file))).method == read(read_settings("ipgo-plus", None)).method


def test_unknown_preset_and_missing_file() -> None:
    with pytest.raises(InputError, match="unknown preset 'papercode'; did you mean 'paper-code'"):
        read_settings("papercode", None)
    with pytest.raises(InputError, match=r"config file 'none\.yaml' does not exist"):
        read_settings(None, "none.yaml")


def test_merge_and_flatten() -> None:
    merged = merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "d": {"e": 5}})
    assert flatten(merged) == {"a.b": 4, "a.c": 2, "d.e": 5}
