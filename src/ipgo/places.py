"""What is told to others of a run's settings: folders and files of this machine by their names, without the paths."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipgo.backends import BACKENDS
from ipgo.errors import InputError
from ipgo.files import is_hub_id
from ipgo.prompts import split_options
from ipgo.rewards import REWARDS
from ipgo.rewards.checkpoints import bare_name
from ipgo.rewards.spec import read_terms

COMMAND, QUESTION = "cmd:", "ask:"
MODELS = ("model", "tokenizer")  # settings of methods that name a folder, or a model of the hub
# A path from the root, from home or from a drive.
ABSOLUTE = re.compile(r"[/\\~]|[A-Za-z]:[/\\]")


def bare_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, as `RunConfig.to_json` has them, without paths."""
    held_out, source = settings["held_out"], settings["prompts_from"]
    return {
        **settings,
        "backend": bare_backend(settings["backend"]),
        "reward": bare_reward(settings["reward"]),
        "held_out": held_out and [bare_reward(each) for each in held_out],
        "prompts_from": source and _bare_prompts(source),
        "method": _bare_method(settings["method"]),
    }


def bare_backend(backend: str) -> str:
    """A backend without its path; a folder that is called as one of ours is `./sd15`."""
    if backend in BACKENDS:
        return backend
    name = _bare_model(backend)
    return f"./{name}" if name in BACKENDS else name


def bare_reward(spec: str) -> str:
    """A reward's spec or name without the paths in it; a question stays as it is."""
    try:
        names = [term.name for term in read_terms(spec)]
    except InputError:  # a + in the path of a file that has gone, or the name of an object
        return _bare_term(spec)
    found, rest = "", spec
    for name in names:
        before, _, rest = rest.partition(name)
        found += before + _bare_term(name)
    return found + rest


def bare_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a reward is known by, as `identity_of` has it, without paths."""
    found: dict[str, Any] = _bare_values(identity)
    return found


def _bare_path(path: str) -> str:
    r"""What a path ends in: mine.py of /x/mine.py and of C:\x\mine.py."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _bare_model(place: str) -> str:
    """A path's end; what is called `owner/name`, and is not here, is the hub's."""
    return place if is_hub_id(place) and not Path(place).exists() else _bare_path(place)


def _bare_term(name: str) -> str:
    if name.startswith(QUESTION):
        return name
    if name.startswith(COMMAND):
        return COMMAND + _bare_line(name.removeprefix(COMMAND))
    head, colon, place = name.partition(":")
    if colon and bare_name(head) in REWARDS:
        return f"{head}:{_bare_model(place)}"
    return _bare_model(name)  # with a function, as in x/mine.py:warmth, it is no model


def _bare_line(line: str) -> str:
    """A command, of whose words what stands before a slash may be a path; an option keeps its name."""
    try:
        words = shlex.split(line)
    except ValueError:  # a quote without its end, in the name of an object
        return _bare_path(line)
    bare = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        bare.append(option + equals + _bare_path(value))
    return " ".join(shlex.quote(word) if re.search(r"[\s'\"]", word) else word for word in bare)


def _bare_prompts(spec: str) -> str:
    place, options = split_options(spec)
    query = "&".join(f"{name}={_bare_path(value)}" for name, value in options.items())
    return _behind_its_kind(place) + (f"?{query}" if query else "")


def _behind_its_kind(place: str) -> str:
    """A path's end, after what says what it is, as in coco:annotations/captions.json; a drive's letter says nothing."""
    kind, colon, path = place.partition(":")
    return f"{kind}:{_bare_path(path)}" if colon and re.fullmatch(r"\w\w+", kind) else _bare_path(place)


def _bare_method(value: Any, name: str = "") -> Any:
    """The settings of a method, all of whose texts may be places."""
    if isinstance(value, dict):
        return {key: _bare_method(each, key) for key, each in value.items()}
    if isinstance(value, str):
        return _bare_model(value) if name in MODELS else _behind_its_kind(value)
    return value


def _bare_values(value: Any, name: str = "") -> Any:
    """An identity, or a part of it; a reward of one's own may state anything."""
    if isinstance(value, Mapping):
        return {key: _bare_values(each, key) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_bare_values(each) for each in value]
    if isinstance(value, str):
        return bare_reward(value) if name == "id" else _bare_path(value) if ABSOLUTE.match(value) else value
    return value
