"""The studio without its page: fields that become flags, and fits in a thread: looked at, stopped, continued."""

from __future__ import annotations

import shlex
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ipgo import IPGO, Ascent, InputError, Run, Sampling, cli, files, fit, load_backend
from ipgo.config import RunConfig
from ipgo.errors import InUseError
from ipgo.methods import METHODS
from ipgo.ppo import PPO
from ipgo.studio import form
from ipgo.studio.live import Live, View, _Watch, places, seed_of
from ipgo.task import Progress

PROMPT = "a red fox"
REWARD = "colorfulness"
ALL = form.common_fields("emoji") + form.fields("emoji", "ipgo")
SECONDS = 120.0  # that a tiny fit may take at the most


# -- the form -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_untouched_fields_are_the_defaults_of_the_method(method: str) -> None:
    common = form.common_fields("emoji")
    assert {field.flag for field in common} > {
        "sampling.steps",
        "sampling.guidance_scale",
        "seed",
        "unseen_seeds",
    }
    fields = common + form.fields("emoji", method)
    assert all(field.help and "\n" not in field.help for field in fields)
    words = form.flags(method, "", None, {field: field.default for field in fields})
    assert words == ["--method", method]
    config = form.settle({"backend": "emoji"}, f"  {PROMPT} ", REWARD, words, ())
    assert config == RunConfig((PROMPT,), METHODS[method](), reward=REWARD)


def test_every_default_can_be_typed_into_its_field() -> None:
    for method in METHODS:
        fields = form.common_fields("emoji") + form.fields("emoji", method)
        flags = [
            f"--{field.flag}={form.written(field.default) if isinstance(field.default, bool) else field.default}"
            for field in fields
        ]
        config = form.settle({"backend": "emoji"}, PROMPT, REWARD, ["--method", method, *flags], ())
        assert config == RunConfig((PROMPT,), METHODS[method](), reward=REWARD)


def test_what_is_typed_is_fitted_and_is_the_command_that_is_shown(tmp_path: Path) -> None:
    fields = {field.flag: field for field in ALL}
    typed = {
        fields["method.ascent.steps"]: " 7 ",
        fields["method.ascent.recompute"]: True,
        fields["method.insertion.rank"]: "5",
        fields["sampling.negative_prompt"]: "blurry; $HOME",
        fields["sampling.steps"]: fields["sampling.steps"].default,
    }
    words = form.flags("ipgo", "4, 5 6", ["contrast"], typed)
    opened = {"backend": "emoji", "dtype": "bfloat16", "device": "auto"}
    config = form.settle(opened, PROMPT, REWARD, words, ())
    assert (config.seeds, config.held_out, config.dtype) == ((4, 5, 6), ("contrast",), "bfloat16")
    assert isinstance(config.method, IPGO)
    assert (config.method.ascent.steps, config.method.ascent.recompute) == (7, True)
    assert config.method.insertion.rank == 5
    assert config.sampling == replace(Sampling(), negative_prompt="blurry; $HOME")

    line = form.command(opened, PROMPT, REWARD, words, str(tmp_path / "a run"))
    program, command, *rest = shlex.split(line)
    assert (program, command) == ("ipgo", "fit")
    assert "--device" not in rest
    assert "--sampling.steps=20" not in rest
    assert rest[rest.index("--out") + 1] == str(tmp_path / "a run")


def test_a_few_step_model_has_its_own_defaults() -> None:
    found = form.common_fields("sd-turbo") + form.fields("sd-turbo", "ipgo")
    fields = {field.flag: field.default for field in found}
    assert (fields["sampling.steps"], fields["method.ascent.backprop_steps"]) == ("1", "null")
    config = form.settle({"backend": "sd-turbo"}, PROMPT, "clip", ["--method", "ipgo"], ())
    assert config.sampling.steps == 1


@pytest.mark.parametrize(
    "reward", ["cmd:rm -r {image}", "mine.py:warmth", "clip+0.5*mine.py:warmth", "ask:why?"]
)
def test_a_page_runs_nothing_that_was_not_named_where_it_was_started(reward: str) -> None:
    with pytest.raises(InputError, match="where the studio is started"):
        form.refuse_unknown(reward, ["other.py:warmth"])
    form.refuse_unknown("mine.py:warmth+clip", ["mine.py:warmth"])
    form.refuse_unknown("mine.py:warmth", ["clip+mine.py:warmth<=0.9"])
    form.refuse_unknown("emoji-aesthetic<=0.9", [])
    for words in ([f"--reward={reward}"], ["--held_out", reward]):  # however it gets among the flags
        with pytest.raises(InputError):
            form.settle({"backend": "emoji"}, PROMPT, REWARD, ["--method", "ipgo", *words], ())


@pytest.mark.parametrize(
    "flag", ["--help", "-h", "--backend=/etc", "--method.chat.cache=elsewhere", "--device=cuda", "--shared"]
)
def test_a_reward_that_is_held_out_is_no_flag(flag: str) -> None:
    with pytest.raises(InputError, match="which is no reward"):
        form.flags("ipgo", "", ["clip", flag], {})
    if flag in ("--help", "-h", "--backend=/etc", "--device=cuda"):
        opened = {"backend": "emoji", "device": "auto"}
        with pytest.raises(InputError):
            form.settle(opened, PROMPT, REWARD, ["--method", "ipgo", flag], ())


@pytest.mark.parametrize("value", [None, 3, ["a"], {"a": 1}])
def test_a_field_holds_a_text_or_a_tick(value: Any) -> None:
    with pytest.raises(InputError, match="it must be a text"):
        form.flags("ipgo", "", None, {ALL[0]: value})


@pytest.mark.parametrize(
    ("flag", "text", "said"),
    [
        ("method.ascent.steps", "many", "method.ascent.steps is 'many'; it must be a whole number"),
        ("method.ascent.steps", "0", "method.ascent.steps is 0; it must be at least 1"),
        ("sampling.steps", "", "sampling.steps"),
    ],
)
def test_bad_input_is_one_sentence(flag: str, text: str, said: str) -> None:
    field = next(each for each in ALL if each.flag == flag)
    with pytest.raises(InputError, match=said.replace(".", r"\.")):
        form.settle({"backend": "emoji"}, PROMPT, REWARD, form.flags("ipgo", "", None, {field: text}), ())


# -- fits -----------------------------------------------------------------------------------------------


@pytest.fixture
def live(pipeline_folder: str) -> Live:
    return Live(load_backend(pipeline_folder))


@pytest.fixture
def config(pipeline_folder: str) -> RunConfig:
    return RunConfig(
        (PROMPT,),
        IPGO(ascent=Ascent(steps=5, backprop_steps=1)),
        backend=pipeline_folder,
        reward=REWARD,
        held_out=("contrast",),
        sampling=Sampling(steps=2, fit_steps=None),
        seeds=(0, 1),
        unseen_seeds=1,
    )


def watched(live: Live) -> list[View]:
    """Every view until the fit ends, but for those that were gone too soon."""
    views = [live.view]
    while views[-1].busy:
        newer = live.after(views[-1], SECONDS)
        assert newer is not views[-1], "nothing moves any more"
        views.append(newer)
    live.join(SECONDS)
    return views


def learned(run: Run) -> dict[str, torch.Tensor]:
    return run.load_adapter(run.prompts[0]).state_dict()


def test_a_fit_shows_its_steps_and_is_the_run_of_the_same_settings(
    live: Live, config: RunConfig, tmp_path: Path
) -> None:
    live.start(config, tmp_path)
    views = watched(live)
    assert [each.stage for each in views[:1]] == ["loading"]
    last = views[-1]
    assert (last.stage, last.said, last.step, last.total) == ("done", "", 5, 5)
    run = last.run
    assert run is not None
    assert run.path == tmp_path / "a-red-fox"
    assert [line["reward"] for line in run.history(run.prompts[0])] == pytest.approx(list(last.rewards))
    assert set(last.before) == set(last.now) == {0, 1}
    assert last.now[1].image.tobytes() == run.images(run.prompts[0], "after")[1].tobytes()
    assert last.raw is not None
    assert set(last.gains) == {"contrast"}
    assert [step for step, _ in last.gains["contrast"]] == [2, 4]
    assert (run.path / "report.html").is_file()

    from ipgo import fit

    other = fit(
        PROMPT,
        reward=REWARD,
        held_out=["contrast"],
        backend=config.backend,
        method=config.method,
        sampling=config.sampling,
        seeds=(0, 1),
        unseen_seeds=1,
    )
    theirs = other[0].adapter.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in learned(run).items())


def test_a_fit_that_is_stopped_goes_on_where_it_was(live: Live, config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, method=IPGO(ascent=Ascent(steps=25, backprop_steps=1)))
    live.start(config, tmp_path / "undisturbed")
    undisturbed = watched(live)[-1].run

    live.start(config, tmp_path)
    view = live.view
    while view.step < 2 and view.busy:
        view = live.after(view, SECONDS)
    live.stop()
    stopped = watched(live)[-1]
    assert stopped.stage == "stopped"
    assert 2 <= stopped.step < 25

    live.start(config, tmp_path)
    last = watched(live)[-1]
    assert last.stage == "done"
    assert len(last.rewards) == 25
    assert last.run is not None
    assert undisturbed is not None
    assert last.run.path == tmp_path / "a-red-fox"
    theirs = learned(undisturbed)
    assert all(torch.equal(value, theirs[name]) for name, value in learned(last.run).items())
    assert len(last.run.history(last.run.prompts[0])) == 25


def test_a_finished_fit_is_shown_again_and_other_settings_get_another_place(
    live: Live, config: RunConfig, tmp_path: Path
) -> None:
    live.start(config, tmp_path)
    watched(live)
    live.start(config, tmp_path)
    again = watched(live)
    assert again[-1].stage == "done"
    assert [view.step for view in again] == [0, 5]
    assert set(again[-1].now) == {0, 1}
    other = replace(config, seeds=(3,))
    assert next(places(tmp_path, other)).path == tmp_path / "a-red-fox-2"
    (tmp_path / "a-red-fox-2").mkdir()
    (tmp_path / "a-red-fox-2/holiday.txt").write_text("not a run")
    assert next(places(tmp_path, other)).path == tmp_path / "a-red-fox-3"


def test_only_one_fit_at_a_time(
    live: Live, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    stepped = _Watch._stepped

    def slow(*args: Any) -> View:
        gate.wait(SECONDS)
        return stepped(*args)

    monkeypatch.setattr(_Watch, "_stepped", slow)
    live.start(config, tmp_path)
    view = live.view
    while view.stage == "loading":
        view = live.after(view, SECONDS)
    with pytest.raises(InUseError, match="a fit or a drawing is going on"):
        live.start(config, tmp_path)
    gate.set()
    done = watched(live)[-1].run
    assert done is not None
    pairs = live.draw(done, [7, 8])
    assert [seed for seed, _, _ in pairs] == [7, 8]
    assert all(before.image.tobytes() != after.image.tobytes() for _, before, after in pairs)


def test_what_fails_is_said_and_the_next_fit_works(live: Live, config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def broken(images, prompts):\n    return images.mean() / 0 * float('nan')\n"
    )
    live.start(replace(config, reward=f"{tmp_path}/mine.py:broken"), tmp_path)
    failed = watched(live)[-1]
    assert failed.stage == "failed"
    assert "broken" in failed.said
    live.start(config, tmp_path)
    assert watched(live)[-1].stage == "done"


def test_settings_that_cannot_work_are_refused_before_the_thread(
    live: Live, config: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="one at a time"):
        live.start(replace(config, prompts=("a", "b")), tmp_path)
    with pytest.raises(InputError, match="tokens"):
        live.start(replace(config, prompts=("fox " * 200,)), tmp_path)
    with pytest.raises(InputError, match="seeds is empty"):
        live.draw(Run.open(tmp_path / "none", config), [])
    assert live.view.stage == "idle"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "method", ["raw", "best-of-n", "reno", "ipgo-black-box", "embedding", "draft", "ddpo"]
)
def test_other_methods_are_shown_too(method: str, live: Live, config: RunConfig, tmp_path: Path) -> None:
    chosen = METHODS[method]()
    if chosen.ascent is not None:
        chosen = replace(chosen, ascent=Ascent(steps=2, backprop_steps=2))  # type: ignore[call-arg]
    elif method == "best-of-n":
        chosen = replace(chosen, n=2)  # type: ignore[call-arg]
    elif method == "ipgo-black-box":
        chosen = replace(chosen, candidates=4)  # type: ignore[call-arg]
    elif method == "ddpo":
        chosen = replace(chosen, ppo=PPO(epochs=1, samples=2, batch_size=2))  # type: ignore[call-arg]
    live.start(replace(config, method=chosen, seeds=(0,)), tmp_path)
    last = watched(live)[-1]
    assert (last.stage, last.said) == ("done", "")
    assert last.step == last.total >= 1
    assert last.rewards[-1] is not None
    if method == "best-of-n":
        assert last.run is not None
        with pytest.raises(InputError, match="belongs to the noise"):
            live.draw(last.run, [5])


def test_a_picture_is_that_of_its_noise() -> None:
    def step(number: int, over: int) -> Progress:
        none = torch.zeros(1)
        return Progress(number, 9, none, none, none, none, none.bool(), None, None, dict, over)  # type: ignore[arg-type]

    assert [seed_of(step(number, 3), (7, 8, 9), True) for number in (1, 2, 3, 4)] == [7, 8, 9, 7]
    assert seed_of(step(4, 1), (7, 8, 9), False) == 9  # drawn from all of them, the last one last
    assert seed_of(step(4, 10), (), True) is None
    assert seed_of(step(4, 10), tuple(range(10)), False) is None


def test_what_changes_nothing_has_no_gains(live: Live, config: RunConfig, tmp_path: Path) -> None:
    """A step that draws all seeds shows one of them, which compares with the raw picture of that seed alone."""
    for method in (METHODS["raw"](), METHODS["dpo-diffusion"](solver="evolutionary", word_list="general")):
        live.start(replace(config, method=method, seeds=(0, 1, 2)), tmp_path)
        last = watched(live)[-1]
        assert (last.stage, last.said) == ("done", "")
        assert last.gains["contrast"][0] == (1, pytest.approx(0, abs=1e-6))


def test_a_reward_that_was_edited_is_another_and_gets_another_place(
    live: Live, config: RunConfig, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.py"
    out = tmp_path / "runs"
    config = replace(config, reward=f"{mine}:f")
    for number, factor in enumerate((1, 2)):
        mine.write_text(f"def f(images, prompts):\n    return {factor} * images.mean((1, 2, 3))\n")
        for _ in range(2):
            live.start(config, out)
            last = watched(live)[-1]
            assert (last.stage, last.said) == ("done", "")
            assert last.run is not None
            assert last.run.path.name == ("a-red-fox", "a-red-fox-2")[number]
        assert last.rewards[0] is not None
    assert len(list(out.iterdir())) == 2


def test_a_held_out_reward_that_fails_does_not_end_the_fit_before_its_end(
    live: Live, config: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "calls = []\ndef f(images, prompts):\n    calls.append(1)\n"
        "    return images.mean((1, 2, 3)) * (1 if len(calls) < 3 else float('nan'))\n"
    )
    live.start(replace(config, held_out=(f"{tmp_path}/mine.py:f",)), tmp_path)
    last = watched(live)[-1]
    assert (last.stage, last.step) == ("failed", 5)  # the results need it


def test_what_another_backend_fitted_is_not_drawn(live: Live, config: RunConfig, tmp_path: Path) -> None:
    live.start(config, tmp_path)
    run = watched(live)[-1].run
    assert run is not None
    about = run.path / "run.json"
    files.write_json(about, {**files.read_json(about), "weights": "0" * 12})
    with pytest.raises(InputError, match="another weights"):
        live.draw(Run.open(run.path), [5])


@pytest.mark.parametrize(
    ("opening", "said"),
    [
        ({"image_size": 128}, "image_size 128 there, null now"),
        ({"padding": "none"}, 'padding "none" there, "max_length" now'),
        ({"scheduler": "euler"}, 'scheduler "euler" there, null now'),
        ({"long_prompts": "chunk"}, 'long_prompts "chunk" there, "refuse" now'),
        ({"text_device": "cpu"}, None),
    ],
)
def test_a_fit_is_drawn_with_its_own_settings_or_not_at_all(
    opening: dict[str, Any], said: str | None, live: Live, config: RunConfig, tmp_path: Path
) -> None:
    """The studio shows whatever run lies in its folder, such as one of `ipgo fit`."""
    backend = load_backend(config.backend, **opening)
    own = {
        "method": config.method,
        "sampling": config.sampling,
        "unseen_seeds": 0,
        "held_out": [],
        "seeds": [0],
    }
    fit(PROMPT, backend=backend, reward=REWARD, out=tmp_path / "run", **own)
    run = Run.open(tmp_path / "run")
    if said is None:
        assert len(live.draw(run, [5])) == 1
        return
    with pytest.raises(
        InputError, match=rf"'run' was fitted on a backend that is opened otherwise \({said}\)"
    ):
        live.draw(run, [5])


# -- the command ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--backend", "emojy"], "emojy"),
        (["--rewards", "nowhere.py:warmth"], "nowhere.py"),
        (["--scheduler", "dim"], "did you mean 'ddim'"),
        (["--prot", "7860"], "did you mean '--port'"),
        (["--port", "99999"], "port is 99999; it must be from 1 to 65535"),
        (["--host", "::1"], "host is '::1'; give an IPv4 address"),
        (["--host", "no.such.host.invalid"], "host is 'no.such.host.invalid'"),
    ],
)
def test_the_command_refuses_before_it_loads(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert cli.main(["studio", *words]) == 2
    assert said in capsys.readouterr().err


def test_without_gradio_the_command_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["studio"]) == 2
    assert 'pip install "ipgo[studio]"' in capsys.readouterr().err
