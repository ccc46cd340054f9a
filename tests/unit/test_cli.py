from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ipgo
from ipgo import cli, printed
from ipgo.adapters import Adapter, InsertionAdapter, JointAdapter, NoiseAdapter
from ipgo.artefacts import save_adapter
from ipgo.backends import BACKENDS, FAMILIES
from ipgo.continuing import differences
from ipgo.errors import InputError
from ipgo.evaluation import Gain, Interval
from ipgo.insertion import Insertion
from ipgo.settings import settings_for
from ipgo.terminal import Stored, backend_of, open_stored, peek, read_texts, spelt
from tests import tiny_families as tiny
from tests.conftest import one_sentence

NAN = float("nan")


def test_help_and_version_need_no_torch() -> None:
    commands = "['--help'], ['fit', '--help'], ['compare', '-h'], ['--version']"
    code = f"import sys, ipgo.cli as c\nfor words in ({commands}): c.main(words)\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for usage in ("ipgo fit", "usage: ipgo fit PROMPT", "usage: ipgo compare PROMPT"):
        assert usage in done.stdout
    assert done.stdout.endswith(f"ipgo {ipgo.__version__}\n")


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "ipgo", "fitt"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "ipgo: unknown command 'fitt'; did you mean 'fit'?\n")


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_stored_help_is_that_of_the_parser(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """If not: COLUMNS=100 ipgo COMMAND --backend emoji --help > src/ipgo/help/COMMAND.txt"""
    assert cli.main([command, "--help"]) == 0
    stored = capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([command, "--backend", "emoji", "--help"])
    assert "".join(stored.split()) == "".join(capsys.readouterr().out.split())  # lines break elsewhere
    for option in ("--config", "--seeds", "--shared", "--sampling.steps INT", "(default: emoji)"):
        assert option in stored
    for jargon in ("None", "NoneType", "Literal", "Path to a configuration file"):
        assert jargon not in stored


@pytest.mark.parametrize("command", sorted(cli.COMMANDS.keys() - {"fit", "compare"}))
def test_other_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        cli.main([command, "--help"])
    assert exit_code.value.code == 0
    assert f"usage: ipgo {command}" in capsys.readouterr().out


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "commands:" in capsys.readouterr().out


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("one:train", "emoji-clip", "sd15", "ipgo", "paper-code"):
        assert name in out
    assert "fast          A first look in a few seconds: " in out
    assert cli.main(["list", "prompts", "two:test"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 31


# What is not classifier-free, from the table in docs/backends.md.
GUIDANCE = {
    **dict.fromkeys(("lcm", "flux-dev", "sana-sprint"), "distilled"),
    **dict.fromkeys(("flux-schnell", "flux2-klein"), "none"),
}


def test_the_list_of_backends_says_all_that_is_declared(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "backends"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == list(BACKENDS)
    for name, (family, place) in BACKENDS.items():
        assert cli.main(["list", "backends", name]) == 0
        facts, said = FAMILIES[family].facts, capsys.readouterr().out
        assert ("bundled" if name == "emoji" else place) in said
        assert f"{facts.tokens} tokens" in said
        assert ("order matters" in said) == facts.ordered
        assert {"always": "hidden", "never": "seen", "optional": "seen or hidden"}[facts.masked] in said
        assert ("no pooled vector" in said) != facts.pooled
        assert f"guidance {GUIDANCE.get(name, 'classifier-free')}\n" in said
        assert ("windows" in said) == facts.chunked
        assert f"time as {facts.time}," in said
        assert f"VAE by {facts.scaling}," in said
        for word in (facts.process, facts.latents, facts.prediction):
            assert word in said.split(place)[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ftt"], "unknown command 'ftt'; did you mean 'fit'"),
        (["list", "reward"], "unknown kind 'reward'; did you mean 'rewards'"),
        (["evaluate"], "the following arguments are required: run; see `ipgo evaluate --help`"),
        (["generate"], "the following arguments are required: adapter; see `ipgo generate --help`"),
        (["explain"], "the following arguments are required: adapter; see `ipgo explain --help`"),
        (["report", "/nowhere"], "'/nowhere' does not exist; give the folder of a run"),
        (["generate", "/nowhere"], "'/nowhere' does not exist; give the folder of an adapter or a run"),
        (["generate", "x", "--seedz", "3"], "unknown option '--seedz'; did you mean '--seeds'"),
        (["doctor", "--sampling.steps", "4"], "unknown option '--sampling.steps'; did you mean '--steps'?"),
        (["score", "pics", "--prompt", "a fox"], "the following arguments are required: --reward; see `ipgo"),
        (["fit", "--prompts", str(Path(__file__).parent)], "unit', a folder; give a file that ends in .txt"),
        (["list", "--objects=3"], "unknown option '--objects'; see --help"),
        (["generate", "x", "--seeds", "one"], "invalid int value: 'one'"),
        (["list", "rewards", "clipp"], "unknown reward 'clipp'; did you mean 'clip'"),
        (["fit", "a", "cat", "and", "a", "dog"], "put a single prompt in quotes: 'a cat and a dog'"),
        (  # of the preset's settings `judged_prompts` would go with `shared` alone
            ["fit", "a fox", "--preset", "ipgo-plus", "--no-shared", "--method.insertion.rank", "999"],
            "method.insertion.rank is 999",
        ),
        (
            ["score", "docs", "--reward", "contrast", "--prompt", " "],
            "is empty; it needs at least one word",
        ),
        (["doctor", "--reward", "emoji-likeness", "--prompt", "a"], "emoji-likeness"),
        (["generate", "/nowhere", "--out", __file__], "which is a file; give a folder"),
        (["fit", "a fox", "--out", f"{__file__}/run"], "which cannot be written"),
        (["fit", "a fox", "a  fox "], "prompt 2 repeats prompt 1"),
        (["fit", "a \udcff fox"], "which is not valid Unicode"),
        (["score", "docs", "--reward", "contrast", "--prompt", "a \udcff"], "which is not valid Unicode"),
        (["doctor", "--prompt", "a \udcff"], "which is not valid Unicode"),
        (["fit", "--held_out", "contrast", "a fox"], "held_out has taken 'a fox' as a reward"),
    ],
)
def test_bad_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert message in one_sentence(capsys)


def test_one_of_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "backends", "sd15"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("backends:\n  sd15 ")
    assert "sdxl" not in out
    assert "guidance" in out
    assert cli.main(["list", "presets", "fast"]) == 0
    assert "backprop_steps: 1" in capsys.readouterr().out
    assert cli.main(["list", "comparisons", "systems"]) == 0
    assert "alignprop:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "make",
    [
        tiny.lcm_sdxl,
        tiny.sdxl,
        tiny.flux,
        lambda: tiny.flux(distilled=False),
        tiny.flux_2,
        tiny.sana_sprint,
        lambda: tiny.sd3(with_t5=False),
    ],
)
def test_the_list_says_of_a_folder_what_opening_it_does(
    make: Callable[[], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = make()
    pipe.save_pretrained(tmp_path / "mine")
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    assert cli.main(["list", "backends", str(tmp_path / "mine")]) == 0
    backend, said = ipgo.load_backend(pipe, device="cpu"), capsys.readouterr().out
    assert f"\n    {backend.max_tokens} tokens, " in said
    assert f"guidance {backend.guidance}\n" in said
    assert ("drawn in" in said) == (backend.few_steps is not None)
    (tmp_path / "mine" / "model_index.json").unlink()
    assert cli.main(["list", "backends", str(tmp_path / "mine")]) == 2
    assert "has no model_index.json" in one_sentence(capsys)


def test_letters_that_a_terminal_does_not_have_are_spelt() -> None:
    words = [sys.executable, "-m", "ipgo", "fit", "caf\u00e9 \u2013", "--reward", "\u2013"]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    warning, error = done.stderr.splitlines()
    assert done.returncode == 2
    assert r"has never seen 'caf\xe9'" in warning
    assert r"unknown reward '\u2013'" in error


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["generate", "x", "--seeds", "5", "a lemon"], "prompts, runs and images come before the options"),
        (["score", "--reward", "contrast", "a.png"], "prompts, runs and images come before the options"),
        (
            ["fit", "a", "--reward", "-1*contrast"],
            "a value that begins with a dash is given as --option=VALUE",
        ),
        (["score", "a.png", "--reward", "-1*contrast"], "is given as --option=VALUE"),
    ],
)
def test_what_an_option_has_swallowed_is_told(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    assert hint in one_sentence(capsys)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--method", "best-of-n", "--method.ascent.steps", "2"], "the method has none of that name"),
        (["--method", "best-of-n", "--method.nn", "2"], "did you mean '--method.n'?"),
        (["--sedes", "2"], "did you mean '--seeds'?"),
        (["--xyzzy", "2"], "see --help"),
    ],
)
def test_only_what_is_near_is_proposed(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fit", "a lemon", *words]) == 2
    assert hint in one_sentence(capsys)


def test_a_reader_that_has_had_enough_is_no_error() -> None:
    for words in ("list objects", "--help"):
        command = f"{sys.executable} -m ipgo.cli {words} | true; exit ${{PIPESTATUS[0]}}"
        found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert found.stderr == ""


def test_a_file_in_place_of_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a fox")
    with pytest.raises(ipgo.InputError, match=r"is a file; read its prompts with --prompts"):
        read_texts([str(file)], None)
    assert read_texts(["a fox.txt"], str(file)) == ["a fox.txt", "a fox"]


def test_a_prompt_without_quotes_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    assert read_texts(["a", "lemon"], None) == ["a", "lemon"]
    assert caplog.messages == ["these are 2 prompts; put a single prompt in quotes: 'a lemon'"]
    caplog.clear()
    read_texts(["a lemon", "fox"], None)
    read_texts(["lemon"], None)
    assert caplog.messages == []


def test_a_full_disk_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(argv: list[str]) -> int:
        raise OSError(28, "No space left on device", "runs/a/run.json")

    monkeypatch.setitem(cli.COMMANDS, "fit", full)
    assert cli.main(["fit"]) == 1
    expected = (
        "ipgo: cannot read or write 'runs/a/run.json': No space left on device; finished prompts, if any, "
        "are kept\n"
    )
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory_is_one_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(words: list[str]) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "fit", full)
    assert cli.main(["fit"]) == 1
    told = one_sentence(capsys)
    assert told.startswith("ipgo: out of memory (")
    assert "--chunk 1" in told
    monkeypatch.setitem(cli.COMMANDS, "fit", lambda words: (_ for _ in ()).throw(RuntimeError("else")))
    with pytest.raises(RuntimeError, match="else"):
        cli.main(["fit"])


def test_table() -> None:
    sure = Gain(
        "ipgo",
        "emoji-clip",
        True,
        0.25,
        0.5,
        Interval(0.25, 0.125, 0.375, 9, "prompts"),
        Interval(0.75, 0.5, 1.0, 9, "prompts"),
    )
    alone = Gain(
        "ipgo",
        "mine",
        False,
        1.0,
        0.5,
        Interval(-0.5, NAN, NAN, 1, "seeds"),
        Interval(0.0, NAN, NAN, 1, "seeds"),
    )
    lines = printed.table([sure, alone]).splitlines()
    assert " ".join(lines[1].split()) == "emoji-clip 0.250 0.500 +0.250 +0.125 to +0.375 75% (50% to 100%)"
    assert " ".join(lines[2].split()) == "mine * 1.000 0.500 -0.500 one image 0%"


def test_every_public_name_is_there() -> None:
    for name in ipgo.__all__:
        assert getattr(ipgo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'ftt'"):
        _ = ipgo.ftt


def test_settings_of_a_file_hold_under_a_method_flag(caplog: pytest.LogCaptureFixture) -> None:
    steps = {"ascent": {"steps": 3}}
    assert settings_for("reno", steps) == {**steps, "name": "reno"}
    assert settings_for("reno", {"name": "reno", **steps}) == {"name": "reno", **steps}
    with caplog.at_level("INFO", "ipgo"):
        assert settings_for("reno", {"name": "ipgo", **steps}) == {"name": "reno"}
    assert "settings of the method ipgo are left out" in caplog.text


def test_what_is_tied_to_its_noise_is_drawn_from_it(caplog: pytest.LogCaptureFixture) -> None:
    tied = Stored(NoiseAdapter(("a",), (1, 4, 8, 8), seed=5), {}, {}, None)
    assert tied.seeds(None) == [5]
    assert not caplog.text
    assert tied.seeds([5, 6]) == [5, 6]
    assert "tied to the noise of seed 5; on others (6) it draws the raw prompt" in caplog.text
    assert Stored(Adapter(), {}, {}, None).seeds(None) == [0]
    caplog.clear()
    inserted = InsertionAdapter(("a",), 8, Insertion(1, 1, rank=4))
    joint = Stored(JointAdapter.join(inserted, tied.first, 0.1), {}, {}, None)
    assert joint.seeds(None) == [5]
    assert joint.seeds([6]) == [6]
    assert not caplog.text  # its embeddings go with any noise


def test_options_are_known_with_either_joint() -> None:
    words = [
        "a b",
        "--text-device",
        "cpu",
        "--judged_prompts=a-b_c",
        "--method.ascent.lr_basis",
        "-1",
        "--",
        "--x-y",
    ]
    with_bars = [words[0], "--text_device", "cpu", words[3], *words[4:]]
    assert spelt(words, "_") == with_bars
    assert spelt(with_bars, "-") == [
        *words[:3],
        "--judged-prompts=a-b_c",
        "--method.ascent.lr-basis",
        *words[5:],
    ]
    assert spelt(["-- not an option", "--"], "_") == ["-- not an option", "--"]


def test_an_adapter_of_a_folder_that_is_elsewhere_is_not_looked_up_on_the_hub() -> None:
    with pytest.raises(InputError, match=r"fitted on './models/mine', which is not here"):
        backend_of({"backend": "./models/mine"}, None)
    assert backend_of({"backend": "owner/name"}, None) == "owner/name"


def test_an_adapter_of_a_newer_version_says_so(tmp_path: Path) -> None:
    adapter = InsertionAdapter(("a",), 8, Insertion(1, 1, rank=2))
    for settings, name in (({"newer": 1}, "newer"), ({"sampling": {"steps": 2, "odd": 1}}, "odd")):
        save_adapter(adapter, tmp_path, settings)
        with pytest.raises(InputError, match=f"setting '{name}', which this version of ipgo does not know"):
            open_stored(tmp_path)


def test_long_settings_are_cut_where_they_differ() -> None:
    long = "a lemon on a blue background, flat style, clean and very sharp"
    there, now = ({"prompts": [f"{long} {end}"], "seed": number} for number, end in enumerate(("one", "two")))
    told = differences(there, now)
    assert 'very sharp one"] there' in told
    assert 'very sharp two"] now' in told
    assert told.endswith("seed 0 there, 1 now")


def test_a_value_that_a_flag_does_not_take_is_no_prompt() -> None:
    with pytest.raises(
        ipgo.InputError, match="prompt 'true' looks like the value of an option; --shared takes none"
    ):
        read_texts(["a fox", "true"], None)


def test_a_backend_that_is_not_here_is_asked_for() -> None:
    with pytest.raises(ipgo.InputError, match=r"was fitted on '\./moved', which is not here"):
        backend_of({"backend": "./moved"}, None)
    assert backend_of({"backend": "./moved"}, "emoji") == "emoji"


def test_a_prompt_with_dashes_is_not_an_option() -> None:
    words = ["--unseen-seeds=4", "--a red-and-blue lemon", "--held-out", "--", "--a-red-lemon"]
    known, rest = peek(words, ("--preset",))
    assert known.preset is None
    assert rest == ["--unseen_seeds=4", "--a red-and-blue lemon", "--held_out", "--", "--a-red-lemon"]
