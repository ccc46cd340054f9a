"""Opening pipelines: folders of diffusers, and ids on the hub."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from ipgo import files, hub
from ipgo.backends.blueprint import INDEX, used_parts
from ipgo.bars import only_of_downloads
from ipgo.errors import InputError, first_line

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
# What a library calls the file of a model's weights.
WEIGHTS = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "vocab.txt")  # one of them
PLAINLY_NAMED = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
PREFIX = "text_model."


def is_local(source: str | Path) -> bool:
    """Is it a path? Else it is a hub id, `owner/name`."""
    path = Path(source)
    return path.exists() or path.suffix in PICKLES or not files.is_hub_id(source)


def pipeline_class(source: str | Path) -> str:
    """The name of the pipeline class that a folder or a hub id holds, from its model_index.json.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    if not is_local(source):
        try:
            with hub.within_reach(source):
                repo, revision = files.hub_id(source)
                file = hf_hub_download(repo, INDEX, revision=revision)
        except Exception as error:  # also what its HTTP library raises where a connection breaks off
            raise _cannot_open(source, error) from error
        return class_name(Path(file), source)
    path = Path(source)
    if path.suffix in PICKLES:
        raise InputError(f"backend {str(path)!r} is a pickle, which can run code; give a safetensors folder")
    if path.is_file():
        raise InputError(f"backend {str(path)!r} is a file; give a diffusers folder or a .safetensors file")
    if not path.is_dir():
        raise InputError(f"backend folder {str(path)!r} does not exist")
    if not (path / INDEX).is_file():
        raise InputError(f"backend folder {str(path)!r} has no {INDEX}: it is not a diffusers folder")
    return class_name(path / INDEX, source)


def configuration(source: str) -> Path:
    """The folder of the JSON files that say what a hub id's parts are, without weights; `InputError` if that fails."""
    try:
        with hub.within_reach(source):
            repo, revision = files.hub_id(source)
            return Path(snapshot_download(repo, revision=revision, allow_patterns=[INDEX, "*config.json"]))
    except Exception as error:  # as above
        raise _cannot_open(source, error) from error


def open_pipeline(
    source: str | Path, kind: str, dtype: torch.dtype, given: Mapping[str, Any] | None = None
) -> Any:
    """Open a folder or a hub id that holds a pipeline of class `kind`; `InputError` if that fails.

    Args:
        given: parts that are open already, of which the folder needs no weights.
    """
    local = is_local(source)
    variant = check_folder(Path(source), given or ()) if local else None
    cls = getattr(diffusers, kind)
    options: dict[str, Any] = dict(given or {})
    if "safety_checker" in cls._optional_components:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    place, revision = files.hub_id(source)
    if local:
        # Saved without a part, SD3's T5 say: diffusers writes that down, and asks for the part again.
        optional = (*cls._optional_components, *options)
        options |= {name: None for name in _left_out(Path(source)) if name not in optional}
    try:
        with hub.within_reach(source), only_of_downloads(source, diffusers_logging, transformers_logging):
            if not local:
                variant = _hub_variant(place, revision)
            pipe = cls.from_pretrained(
                place, revision=revision, dtype=dtype, use_safetensors=True, variant=variant, **options
            )
    except Exception as error:  # libraries answer damaged files with errors of many kinds
        raise _cannot_open(source, error) from error
    if local:
        _check_text_encoders(pipe, Path(source), variant)
    return pipe


def _left_out(path: Path) -> list[str]:
    """The parts that a pipeline was saved without."""
    return [name for name, value in files.read_json(path / INDEX).items() if value == [None, None]]


def _check_text_encoders(pipe: Any, path: Path, variant: str | None) -> None:
    """Raise `InputError` for one that lacks weights: transformers makes some up, where diffusers refuses.

    Only of kinds whose tensors are called in files as they are in the module, up to a prefix.
    """
    for part, module in pipe.components.items():
        if type(module).__name__ not in PLAINLY_NAMED:
            continue
        stored: set[str] = set()
        for file in _weight_files(path / part, _weights_name("transformers"), variant):
            with safe_open(file, framework="pt") as tensors:
                stored |= {name.removeprefix(PREFIX) for name in tensors.keys()}  # noqa: SIM118
        known = module.state_dict()
        tied = {known[name].data_ptr() for name in known if name.removeprefix(PREFIX) in stored}
        for name, tensor in known.items():
            if name.removeprefix(PREFIX) not in stored and tensor.data_ptr() not in tied:
                raise InputError(f"backend {str(path)!r} is incomplete: the weights of {part} lack {name!r}")


def check_folder(path: Path, given: Container[str] = ()) -> str | None:
    """Raise `InputError` unless every part that the folder's index names is complete, in safetensors.

    Args:
        given: parts of which it needs no weights.

    Returns:
        The variant of weights that are there in one alone, as "fp16"; None: they have their usual names.
    """
    parts = _libraries(path / INDEX, path)
    variant = _variant(_files(path), parts)
    weights = []
    for part, library in parts.items():
        if part == "scheduler":
            needed = "scheduler/scheduler_config.json"
        elif part.startswith("tokenizer"):
            there = [name for name in TOKENIZERS if (path / part / name).is_file()]
            needed = f"{part}/{there[0] if there else TOKENIZERS[0]}"
        else:
            needed = f"{part}/config.json"
            weights += [] if part in given else _weight_files(path / part, _weights_name(library), variant)
        if not (path / needed).exists():
            raise InputError(f"backend folder {str(path)!r} is incomplete: {needed} is missing")
    for file in weights:
        check_weights(file)
    return variant


def _hub_variant(repo: str, revision: str | None) -> str | None:
    """As `check_folder` says it of a folder, of a hub id; its weights need not have been fetched."""
    index = Path(hf_hub_download(repo, INDEX, revision=revision))
    try:
        there: Collection[str] = list_repo_files(repo, revision=revision)
    except Exception:  # without a network, which libraries say in many ways: what was fetched before
        there = _files(index.parent)
    return _variant(there, _libraries(index, repo))


def _files(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in folder.glob("*/*")]


def _weights_name(library: str) -> str:
    return WEIGHTS.get(library, WEIGHTS["transformers"])


def _variant(there: Collection[str], parts: Mapping[str, str]) -> str | None:
    """The word in the names of a part's weights, `model.fp16.safetensors`, where this is the one way they are there."""
    for part, library in parts.items():
        name = _weights_name(library)
        usual = (f"{part}/{name}", f"{part}/{name}.index.json")
        start = re.escape(f"{part}/{name.removesuffix('.safetensors')}")
        pattern = re.compile(start + r"\.(?:(\w+)\.safetensors|safetensors\.index\.(\w+)\.json)")
        found = {match[1] or match[2] for match in map(pattern.fullmatch, there) if match}
        if len(found) == 1 and not any(each in there for each in usual):
            return found.pop()
    return None


def _libraries(index: Path, source: str | Path) -> dict[str, str]:
    """The library that each part of a pipeline comes from."""
    return {part: library for part, (library, _) in used_parts(files.read_json(index), source).items()}


def class_name(index: Path, source: str | Path) -> str:
    """The pipeline class that a model_index.json names."""
    try:
        return str(files.read_json(index, "_class_name")["_class_name"])
    except InputError:
        raise InputError(f"backend folder {str(source)!r} has a damaged {INDEX}") from None


def _cannot_open(source: str | Path, error: Exception) -> InputError:
    if isinstance(error, GatedRepoError):
        return InputError(
            f"backend {str(source)!r} is given to those alone who accept its licence: do so at "
            f"https://huggingface.co/{files.hub_id(source)[0]}, and run `hf auth login`"
        )
    reason = first_line(error).rstrip(".")
    if is_local(source):
        return InputError(f"cannot open backend {str(source)!r}: {reason}")
    reason = shorten(reason, 100, placeholder=" ...")  # the hub's client has much to say
    return InputError(
        f"backend {str(source)!r} is not here, and cannot be fetched from huggingface.co ({reason}); "
        "give a copy as a folder: --backend /path/folder"
    )


def _weight_files(folder: Path, file_name: str, variant: str | None) -> list[Path]:
    """The file, or the shards that its index names; those of the variant where they are there."""
    index, file = folder / f"{file_name}.index.json", folder / file_name
    if variant is not None:
        own = folder / f"{file_name}.index.{variant}.json", file.with_suffix(f".{variant}.safetensors")
        if any(each.is_file() for each in own):
            index, file = own
    if not index.is_file():
        return [file]
    return files.shards(index)


def check_weights(file: Path) -> None:
    """Raise `InputError` unless it is there, whole, and in safetensors."""
    if not file.is_file():
        if any(file.parent.glob("*.bin")):
            raise InputError(
                f"weights in {str(file.parent)!r} are a pickle, which can run code; use safetensors"
            )
        raise InputError(f"weights are missing: {str(file)!r}")
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise InputError(f"weights are damaged or half-written: {str(file)!r} ({error})") from None
