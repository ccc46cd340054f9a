"""The settings of a fit as fields of a page, and what is typed into them as the flags of `ipgo fit`."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any

from ipgo.config import RunConfig, build, parse, run_parser
from ipgo.defaults import usual
from ipgo.errors import InputError
from ipgo.rewards import REWARDS, terms
from ipgo.settings import flatten, merge

# Settings that are fields besides the method's; the rest belongs to the page, or to the backend.
COMMON = ("sampling.", "seed", "unseen_seeds")
HIDDEN = ("method.chat.cache",)  # a place to write to


@dataclass(frozen=True)
class Field:
    """One setting.

    Attributes:
        flag: its name, such as method.ascent.lr.
        default: what is in the field at first: a text, or a bool for a box to tick.
        help: what it does.
    """

    flag: str
    default: str | bool
    help: str

    @property
    def group(self) -> str:
        """The part of the settings that it belongs to: method.ascent."""
        return self.flag.rpartition(".")[0] or "seeds"

    @property
    def name(self) -> str:
        """Its own name within the group."""
        return self.flag.rpartition(".")[2]


def fields(backend: str, method: str) -> list[Field]:
    """The settings of a method, with the defaults that they have on this backend."""
    return [field for field in _all_fields(backend, method) if field.flag.startswith("method.")]


def common_fields(backend: str) -> list[Field]:
    """Those that are the same for all methods."""
    return [field for field in _all_fields(backend, "raw") if field.flag.startswith(COMMON)]


def _all_fields(backend: str, method: str) -> list[Field]:
    parser = run_parser(method)
    settings = flatten(build(parse(parser, usual(backend, method), []), ("-",)).to_json())
    helps = {action.dest: " ".join(str(action.help).split()).rstrip(".") for action in parser._actions}
    return [
        Field(
            flag,
            value if isinstance(value, bool) else written(value),
            re.sub(r"\bNone\b", "null", helps[flag]),
        )
        for flag, value in settings.items()
        if flag in helps and flag not in ("seeds", *HIDDEN)
    ]


def seeds(typed: str) -> list[int]:
    """Numbers with blanks or commas between; `InputError` for anything else."""
    words = typed.replace(",", " ").split()
    for word in words:
        if not re.fullmatch("[0-9]{1,18}", word):
            raise InputError(f"seeds has {word[:40]!r}; give numbers such as 0 1 2")
    return [int(word) for word in words]


def written(value: Any) -> str:
    """A setting as it is typed into a flag."""
    return value if isinstance(value, str) else json.dumps(value)


def flags(
    method: str, noise: str, held_out: Sequence[str] | None, typed: Mapping[Field, str | bool]
) -> list[str]:
    """The flags of `ipgo fit` for what differs from the defaults.

    Args:
        noise: seeds with blanks or commas between; "" is the default.
        held_out: None is the default.
        typed: what each field holds.
    """
    words = ["--method", method]
    if noise.strip():
        words += ["--seeds", *map(str, seeds(noise))]
    for name in held_out or ():
        if not isinstance(name, str) or name.startswith("-"):  # which would be a flag
            raise InputError(f"held_out has {str(name)[:40]!r}, which is no reward")
    if held_out is not None:
        words += ["--held_out", *held_out]
    for field, value in typed.items():
        if not isinstance(value, str | bool):
            raise InputError(f"{field.flag} is {str(value)[:40]!r}; it must be a text")
        if value != field.default:
            text = written(value) if isinstance(value, bool) else value.strip()
            words.append(f"--{field.flag}={text}")
    return words


def settle(
    opened: Mapping[str, Any], prompt: str, reward: str, words: Sequence[str], known: Sequence[str]
) -> RunConfig:
    """The settings of a fit on a backend that is open.

    Args:
        opened: the settings that it was opened with, its name among them.
        words: what `flags` returned.
        known: specs of rewards that may be used besides ipgo's own.

    Raises:
        InputError: something that cannot work.
    """
    method, rest = words[1], list(words[2:])
    own = merge(usual(str(opened["backend"]), method), {**opened, "reward": reward})
    try:
        config = build(parse(run_parser(method), own, rest), (prompt.strip(),))
    except SystemExit:  # of --help
        raise InputError("a flag is among the values") from None
    for each in (config.reward, *(config.held_out or ())):
        refuse_unknown(each, known)
    for name, value in opened.items():
        found = getattr(config, name)
        if found not in (value, f"./{value}"):  # the second is a folder that is called like a hub id
            raise InputError(f"{name} is {found!r}; this studio has {value!r}")
    return config


def refuse_unknown(spec: str, known: Sequence[str]) -> None:
    """A page takes no file to run and no command: those are named where the studio is started."""
    named = {name for each in known for _, name in terms(each)}
    for _, name in terms(spec):
        if name not in REWARDS and name not in named:
            raise InputError(
                f"reward {name[:80]!r} is not one of ipgo's; name it where the studio is started: "
                f"--rewards {shlex.quote(name[:80])}"
            )


def command(opened: Mapping[str, Any], prompt: str, reward: str, words: Sequence[str], out: str) -> str:
    """The same fit from the command line; arguments as in `settle`."""
    defaults = {each.name: each.default for each in dataclass_fields(RunConfig)}
    flags = [
        word
        for name, value in opened.items()
        if value != defaults[name]
        for word in (f"--{name}", written(value))
    ]
    return shlex.join(["ipgo", "fit", prompt.strip(), *flags, f"--reward={reward}", *words, "--out", out])
