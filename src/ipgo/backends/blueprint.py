"""Pipelines without their weights: built from configurations alone, to see how large they are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ipgo import files
from ipgo.errors import InputError
from ipgo.memory import UNBOUNDED, Tokens, build

LIBRARIES = ("diffusers", "transformers")
OPTIONS = ("force_zeros_for_empty_prompt", "is_distilled")  # of a pipeline, besides its parts
INDEX = "model_index.json"
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass(frozen=True)
class Part:
    """A model or scheduler: a class of diffusers or transformers, and its configuration."""

    library: str
    kind: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Blueprint:
    """What a pipeline is built of.

    Attributes:
        kind: its class.
        parts: by the names of its constructor's arguments, without tokenizers.
        longest: the tokens that its tokenizers say they take, by their names; others take any number.
        options: further arguments of the constructor.
    """

    kind: str
    parts: Mapping[str, Part]
    longest: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def pipeline(self, sizes: FakeTensorMode | None, dtype: torch.dtype, device: str = "cpu") -> Any:
        """The pipeline of diffusers; see `ipgo.memory.build`."""
        import diffusers  # here, because it takes seconds

        kind = getattr(diffusers, self.kind)
        arguments: dict[str, Any] = {}
        for name, parameter in inspect.signature(kind).parameters.items():
            if name in self.parts:
                arguments[name] = _made(self.parts[name], sizes, dtype, device)
            elif name.startswith("tokenizer") and name.replace("tokenizer", "text_encoder") in self.parts:
                arguments[name] = Tokens(self.longest.get(name, UNBOUNDED))
            elif parameter.default is inspect.Parameter.empty:
                arguments[name] = None
        if "safety_checker" in arguments:
            arguments["requires_safety_checker"] = False
        return kind(**arguments, **self.options)


def _made(part: Part, sizes: FakeTensorMode | None, dtype: torch.dtype, device: str) -> Any:
    import diffusers
    import transformers

    kind: Any = getattr({"diffusers": diffusers, "transformers": transformers}[part.library], part.kind)
    if part.kind.endswith("Scheduler"):
        return kind.from_config(dict(part.config))  # its tables have numbers
    if part.library == "diffusers":
        return build(lambda: kind.from_config(dict(part.config)), sizes, dtype, device)
    return build(lambda: kind(kind.config_class(**part.config)), sizes, dtype, device)


def read_blueprint(folder: Path) -> Blueprint:
    """The blueprint of a diffusers folder, from its JSON files; weights need not be there.

    Raises:
        InputError: a file is missing or damaged, or a part comes from another library.
    """
    index = _read(folder, INDEX)
    parts, longest = {}, {}
    for name, (library, kind) in used_parts(index, folder).items():
        if name.startswith("tokenizer"):
            tokens = _read(folder, f"{name}/tokenizer_config.json").get("model_max_length", UNBOUNDED)
            longest[name] = int(min(tokens, UNBOUNDED))
            continue
        if library not in LIBRARIES:
            raise InputError(
                f"backend folder {str(folder)!r}: its {name} is a {library}.{kind}; only parts of "
                f"{' and '.join(LIBRARIES)} can be built from their configuration"
            )
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        parts[name] = Part(library, kind, _read(folder, f"{name}/{file}"))
    options = {key: value for key, value in index.items() if key in OPTIONS}
    return Blueprint(str(index.get("_class_name")), parts, longest, options)


def used_parts(index: Mapping[str, Any], source: str | Path) -> dict[str, tuple[str, str]]:
    """The parts that a model_index.json says are there, with library and class; those that ipgo never looks at are not.

    Raises:
        InputError: an entry is damaged.
    """
    lists = {name: value for name, value in index.items() if isinstance(value, list) and name not in UNUSED}
    for name, value in lists.items():
        if len(value) != 2:
            raise InputError(
                f"backend folder {str(source)!r} has a damaged {INDEX}: {name} is {value!r}; it must be a library and "
                "a class"
            )
    return {name: (value[0], value[1]) for name, value in lists.items() if value[0] is not None}


def _read(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).is_file():
        raise InputError(f"backend folder {str(folder)!r} has no {name}")
    try:
        return files.read_json(folder / name)
    except InputError:
        raise InputError(f"backend folder {str(folder)!r} has a damaged {name}") from None
