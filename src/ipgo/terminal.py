"""What several commands share: how they read their words, and find prompts and adapters."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipgo.errors import InputError, unknown_option
from ipgo.files import is_hub_id
from ipgo.prompts import READERS, check_prompts, read_prompts

if TYPE_CHECKING:
    from ipgo.adapters import Adapter
    from ipgo.backends import Backend
    from ipgo.store import Run

# Seconds from one time that results are stored to the next, each of which writes all that is there.
EVERY = 10.0


def command_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The parser of one command."""
    return _Parser(prog=f"ipgo {command}", description=description, allow_abbrev=False)


def path_of(words: str) -> Path:
    """The value of a flag that names a file or folder: `--out=~/x` reaches us with its ~."""
    return Path(words).expanduser()


def add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    """The adapter to draw with, and what to draw."""
    # Not a Path, which forgets the ./ that tells a folder from a model of the hub.
    parser.add_argument("adapter", type=os.path.expanduser, help="an adapter's folder, or a run's")
    parser.add_argument(
        "text", nargs="*", default=[], help="prompts, each in quotes (default: the fitted ones)"
    )
    parser.add_argument("--prompts", help="prompts from a file or a set, as in fit")
    parser.add_argument("--backend", help="a backend other than the one it was fitted on")


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Where a backend and the rewards are put."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--text-device", default="auto", help="auto, or cpu to save GPU memory")


class _Parser(argparse.ArgumentParser):
    """argparse, with one sentence instead of its usage lines, and prompts after options as well as before."""

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        self.words = spelt(args, "-")
        return self.parse_intermixed_args(self.words, namespace)

    def error(self, message: str) -> None:  # type: ignore[override]
        if found := re.search(r"unrecognized arguments: (-[^\s=]+)", message):
            raise unknown_option(
                found[1], [each for action in self._actions for each in action.option_strings]
            )
        raise InputError(f"{message}{self._hint(message)}; see `{self.prog} --help`")

    def _hint(self, message: str) -> str:
        """What argparse leaves out: an option of several values takes all words that follow it."""
        lacking = re.search("arguments are required: (?!-)", message)  # one that has no flag
        swallowed = lacking and any(word.startswith("-") for word in self.words)
        if swallowed or "invalid int value" in message:
            return "; prompts, runs and images come before the options"
        if re.search("expected (at least )?one argument", message):
            return "; a value that begins with a dash is given as --option=VALUE"
        return ""


def given(value: Any, otherwise: Any) -> Any:
    """A flag's value, or what stands for it where it was left out."""
    return otherwise if value is None else value


def folder_for(out: str | None, otherwise: Path) -> Path:
    """The folder that --out names, or else the usual one; `InputError` for an empty name."""
    if out == "":
        raise InputError("out is empty; give a folder")
    return (otherwise if out is None else Path(out)).expanduser()


def fill_steps(args: Any, steps: int) -> int:
    """Fill in `steps` where they were left out: a few-step model's own, or these.

    Returns:
        The few-step model's steps, or 0 for any other.
    """
    from ipgo.backends import few_steps  # here, because it takes seconds

    few = few_steps(args.backend)
    args.steps = given(args.steps, steps if few is None else few.steps)
    return 0 if few is None else few.steps


def check_image(guidance_scale: float | None, image_size: int | None) -> None:
    """Raise `InputError` for what no backend can draw with; flags that were left out are None."""
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise InputError(f"guidance_scale is {guidance_scale}; it must be a finite number")
    if image_size is not None:
        from ipgo.backends.facts import Opening

        Opening(image_size)


def read_texts(texts: Sequence[str], spec: str | None) -> list[str]:
    """The prompts in the command, then those of a file or set."""
    for text in texts:
        if Path(text).suffix.lower() in READERS and Path(text).is_file():
            raise InputError(f"{text!r} is a file; read its prompts with --prompts {shlex.quote(text)}")
    for text in {"true", "false"} & set(texts):
        raise InputError(
            f"prompt {text!r} looks like the value of an option; --shared takes none; its opposite is --no-shared"
        )
    if len(texts) > 1 and not any(" " in text.strip() for text in texts):
        words = " ".join(texts)
        if len(set(texts)) < len(texts):
            raise InputError(
                f"these are {len(texts)} prompts, two of them the same; put a single prompt in quotes: {words!r}"
            )
        logging.getLogger("ipgo").warning(
            "these are %d prompts; put a single prompt in quotes: %r", len(texts), words
        )
    return [*texts, *(read_prompts(spec) if spec else [])]


def loading(name: str) -> None:
    """Say on a terminal why nothing moves for some seconds."""
    if sys.stderr.isatty():
        print(f"loading {name} ...", file=sys.stderr)


def peek(
    argv: Sequence[str], options: Sequence[str], flags: Sequence[str] = ()
) -> tuple[argparse.Namespace, list[str]]:
    """The options that decide which others there are, and the words that are left."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in options:
        parser.add_argument(name)
    for name in flags:
        parser.add_argument(name, action="store_true")
    try:
        return parser.parse_known_args(spelt(argv, "_"))
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None


def spelt(argv: Sequence[str], joint: str) -> list[str]:
    """Options with their words joined by "-" or by "_", however they were written; prompts that begin with -- stay."""
    end = list(argv).index("--") if "--" in argv else len(argv)  # prompts alone follow
    return [*(_spelt(word, joint) for word in argv[:end]), *argv[end:]]


def _spelt(word: str, joint: str) -> str:
    name, equals, value = word.partition("=")
    option = re.fullmatch(r"--[A-Za-z][\w.-]*", name)
    return f"--{re.sub('[-_]', joint, name[2:])}{equals}{value}" if option else word


def backend_of(settings: dict[str, Any], given: str | None) -> str:
    """The backend that is asked for, or that an adapter was made under; it is taken out of those settings.

    Raises:
        InputError: none of them, or a pipeline object of another process.
    """
    from ipgo.backends import BACKENDS, FAMILIES

    made = settings.pop("backend", None)
    if given is None and made in (None, *FAMILIES):
        what = (
            "does not say what it was fitted on"
            if made is None
            else f"was fitted on a pipeline object ({made})"
        )
        raise InputError(f"this adapter {what}; name a backend, folder or hub id with --backend")
    if given is None and made not in BACKENDS and not is_hub_id(made) and not Path(made).exists():
        raise InputError(
            f"this adapter was fitted on {made!r}, which is not here; name its place with --backend"
        )
    return str(given or made)


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a command draws with.

    Attributes:
        first: the adapter of a folder; of a run the one of its first finished prompt.
        settings: those of the backend and the sampling that it was made under.
        drawn_by: what was behind the backend's name then, as `Run.drawn_by`; {} where that is not known.
        run: the run that the folder is or belongs to.
        folders: where the adapter of each finished prompt is, of a run that has one for each.
    """

    first: Adapter
    settings: dict[str, Any]
    drawn_by: dict[str, Any]
    run: Run | None
    folders: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @property
    def fitted(self) -> tuple[str, ...] | None:
        """The prompts that it serves; None: any."""
        return tuple(self.folders) or self.first.prompts

    def adapter(self, prompt: str) -> Adapter:
        """The one that serves this prompt. It is read when it is asked for: all of a run may be too many to hold."""
        from ipgo.artefacts import load_adapter

        own = self.first.prompts is None or prompt in self.first.prompts
        return self.first if own else load_adapter(self.folders[prompt])

    def prompts(self, texts: Sequence[str], spec: str | None) -> list[str]:
        """Those that are asked for; else those that it was fitted to, or of one for any prompt, its run is judged on.

        Raises:
            InputError: none at all, or one that it was not fitted to.
        """
        from ipgo.adapters import Adapter

        judged = () if self.run is None else [prompt.text for prompt in self.run.judged]
        chosen = read_texts(texts, spec) or list(self.fitted or judged)
        check_prompts(chosen)
        Adapter(self.fitted).rows(chosen)
        return chosen

    def seeds(self, asked: Sequence[int] | None) -> list[int]:
        """Those that are asked for; else 0, or the one whose noise it has learned. Warns where it does nothing."""
        from ipgo.adapters import JointAdapter, NoiseAdapter

        joint = isinstance(self.first, JointAdapter)
        noise = self.first.initial if isinstance(self.first, JointAdapter) else self.first
        tied = noise.seed if isinstance(noise, NoiseAdapter) else None
        if tied is not None and not joint and (others := [seed for seed in asked or () if seed != tied]):
            text = "this adapter is tied to the noise of seed %d; on others (%s) it draws the raw prompt"
            logging.getLogger("ipgo").warning(text, tied, ", ".join(map(str, others)))
        return list(asked) if asked else [0 if tied is None else tied]

    def check_backend(self, backend: Backend) -> None:
        """Warn if it was learned with other weights, or drawn with another scheduler.

        The same weights under another name, such as a copy of the bundled model, get the guidance scale they had.
        """
        from ipgo.continuing import differing_in

        now = backend.identity
        differing = differing_in(self.drawn_by, now)
        if self.drawn_by.get("weights") == now["weights"]:
            backend.guidance_scale = self.drawn_by.get("guidance_scale", backend.guidance_scale)
        if differing == "weights":
            text = "this adapter was learned on a backend with other weights; it may have no effect here"
            logging.getLogger("ipgo").warning(text)
        elif differing == "schedule":
            schedules = self.drawn_by["schedule"], now["schedule"]
            logging.getLogger("ipgo").warning(
                "this adapter was made with the scheduler %s, not %s", *schedules
            )


def open_stored(source: str | Path) -> Stored:
    """The adapter in a folder, or those of a run; `source` may also be the hub's `owner/name`."""
    from ipgo.artefacts import adapter_facts, load_adapter
    from ipgo.publish import fetch
    from ipgo.store import Run

    path = fetch(source)
    places = [place for place in (path, *path.resolve().parents[:2]) if (place / "run.json").is_file()]
    run = Run.open(places[0]) if places else None
    if run is not None and places[0] == path:
        fitted = run.with_adapters
        folders = {prompt.text: run.adapter_folder(prompt) for prompt in fitted}
        # Of all, so that a missing one is said before anything is drawn.
        settings = [adapter_facts(folder)["settings"] for folder in folders.values()]
        each = {} if run.config.shared else folders
        return Stored(run.load_adapter(fitted[0]), dict(settings[0]), run.drawn_by, run, each)
    if (path / "plan.json").is_file():
        raise InputError(f"{str(path)!r} is a comparison's folder; its runs are in {path / 'entries'}")
    facts = adapter_facts(path)
    _check_known(path, facts["settings"])
    known = facts.get("drawn_by") or (run.drawn_by if run is not None else {})
    return Stored(load_adapter(path), dict(facts["settings"]), known, run)


def _check_known(path: Path, settings: dict[str, Any]) -> None:
    """Raise `InputError` for settings that this version does not know, as a newer one may write them."""
    from ipgo.config import RunConfig
    from ipgo.sampling import Sampling

    whole = {each.name for each in dataclasses.fields(RunConfig)}
    sampling = {each.name for each in dataclasses.fields(Sampling)}
    unknown = [*(settings.keys() - whole), *(settings.get("sampling", {}).keys() - sampling)]
    if unknown:
        raise InputError(
            f"adapter {str(path)!r} was made with a setting {unknown[0]!r}, which this version of ipgo does not know"
        )


def check_replaced(out: Path, sign: str) -> None:
    """Raise `InputError` for a file that is there and is not one that the same command wrote.

    Args:
        sign: a key of its JSON, or what is in the first line of its table.
    """
    if not out.is_file():
        return
    text = out.read_text(encoding="utf-8", errors="replace")
    own = not text or sign in text.partition("\n")[0]
    if text and out.suffix == ".json":
        own = False
        with contextlib.suppress(ValueError):
            found = json.loads(text)
            own = isinstance(found, dict) and sign in found and "rewards" in found
    if not own:
        raise InputError(f"out is {str(out)!r}, which holds something else; give another file")
