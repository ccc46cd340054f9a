"""Files that are whole or absent, whenever the process dies; and what is the name of no file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ipgo.errors import InputError

HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*(?<!\.safetensors))(?:@(\w[\w./-]*))?")

# What Finder and Explorer put into folders that they show; on disks of other systems, macOS has a ._ file beside each.
CLUTTER = (".DS_Store", "._*", "Thumbs.db", "desktop.ini")


def is_hub_id(place: str | Path) -> bool:
    """Does it look like a model of the hub, `owner/name` or `owner/name@revision`?

    A folder may be called so too; `./owner/name` is no model.
    """
    return HUB_ID.fullmatch(str(place)) is not None


def hub_id(place: str | Path) -> tuple[str, str | None]:
    """`owner/name` and the revision (a branch, tag or commit) of what `is_hub_id`.

    Of anything else, and of what is here under such a name: itself, and None.
    """
    found = HUB_ID.fullmatch(str(place))
    return (str(place), None) if found is None or Path(place).exists() else (found[1], found[2])


def place(field: str, value: object) -> Path:
    """A path that a Python user gave, "~" included; `InputError` in the name of the field for anything else."""
    if not isinstance(value, str | Path):
        raise InputError(f"{field} is {value!r}; it must be a path")
    return Path(value).expanduser()


def check_folder(place: Path, what: str) -> None:
    """Raise `InputError` for a place that should be the folder of something, and is not there or is a file."""
    if not place.is_dir():
        state = "is a file" if place.exists() else "does not exist"
        raise InputError(f"{str(place)!r} {state}; give the folder of {what}")


def check_out(out: Path, *, folder: bool, name: str = "out") -> None:
    """Raise `InputError` for a place, of this name, that a file, or a folder, cannot be put at. Makes nothing."""
    if folder and out.is_file():
        raise InputError(f"{name} is {str(out)!r}, which is a file; give a folder")
    if not folder and out.is_dir():
        raise InputError(f"{name} is {str(out)!r}, which is a folder; give a file")
    # A file is replaced, so that its folder must be one that can be written.
    places = (out, *out.absolute().parents) if folder else out.absolute().parents
    there = next(each for each in places if each.exists())
    code = errno.EACCES if there.is_dir() else errno.ENOTDIR
    if code == errno.ENOTDIR or not os.access(there, os.W_OK):
        raise unwritable(out, os.strerror(code), name)


def unwritable(out: Path, reason: str | None, name: str = "out") -> InputError:
    """For a place that the system does not let us write to."""
    return InputError(f"{name} is {str(out)!r}, which cannot be written: {reason}")


def check_new(out: Path, left_over: Callable[[Path], bool]) -> None:
    """`check_out` of a folder that must hold nothing but what a start that was cut short leaves behind."""
    check_out(out, folder=True)
    if out.is_dir() and not all(map(left_over, inside(out))):
        raise InputError(f"out is {str(out)!r}, which holds something else; give a new or empty folder")


def inside(folder: Path) -> Iterator[Path]:
    """What a folder holds, but for `CLUTTER`."""
    return (file for file in folder.iterdir() if not any(fnmatch(file.name, each) for each in CLUTTER))


def write(file: Path, content: bytes, *, alone: bool = True) -> None:
    """Replace a file in one step: whoever looks, now or after a crash, sees the old one or the new one.

    Args:
        alone: no other process writes this file meanwhile; a draft that a crash left is then used up.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}{'' if alone else f'.{secrets.token_hex(4)}'}.draft")
    try:
        with draft.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(file)
    except OSError as error:  # a full disk: make room, and name the file, which the system does not
        with contextlib.suppress(OSError):  # of a disk that cannot be written there is none
            draft.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(file)) from error


def write_json(file: Path, content: Mapping[str, Any], *, alone: bool = True) -> None:
    """As `write`."""
    write(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(), alone=alone)


def read_json(file: Path, *needed: str) -> dict[str, Any]:
    """A JSON object; `InputError` if the file is missing or damaged, or lacks one of the keys `needed`."""
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(file)!r} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{str(file)!r} is damaged: it is not a JSON object")
    for key in needed:
        if key not in content:
            raise InputError(f"{str(file)!r} is damaged: it has no {key!r}")
    return content


def shards(index: Path) -> list[Path]:
    """The files that an index of weights, `*.safetensors.index.json`, names; `InputError` for a damaged one."""
    try:
        named = set(read_json(index)["weight_map"].values())
        return [index.parent / name for name in sorted(named)]
    except (InputError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"weights are damaged or half-written: {str(index)!r} is not an index of shards"
        ) from None


def write_lines(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    write(file, "".join(json.dumps(line) + "\n" for line in lines).encode())


def append_line(file: Path, line: Mapping[str, Any]) -> None:
    """One more JSON object; a kill may leave it half-written, which `read_lines` forgives."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file up to the first damaged line; no file is no lines."""
    lines: list[dict[str, Any]] = []
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            content = json.loads(line)
        except ValueError:
            break
        if not isinstance(content, dict):
            break
        lines.append(content)
    return lines


def sync(file: Path) -> None:
    """Bring what was appended to the disk."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
