"""Rewards of one's own: functions read from a file, and what their failures say."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ipgo.errors import InputError, unknown
from ipgo.rewards.written import digest, is_own

Function = Callable[..., Any]

# Files that were run, by name: the digest of their content, and their functions that are in use. What a file does as it
# is read, it does once for a fit, and anew for the next one or when it has changed.
_RUN: dict[str, tuple[str, Any, set[str]]] = {}

# Modules beside such files, which these have imported, by name: the folder, their file, and the digest of its content.
_BESIDE: dict[str, tuple[Path, Path, str]] = {}


def read_function(spec: str, *, look: bool = False) -> Function:
    """The function that `path/mine.py:warmth` names.

    Args:
        look: it is not going to be called, so that who wants to call it gets the same one.

    Raises:
        InputError: no such file, one that does not run, or one without that function.
    """
    place, _, name = spec.rpartition(":")
    path = Path(place).expanduser()
    if not path.is_file():
        raise InputError(f"reward file {place!r} {'is a folder' if path.is_dir() else 'does not exist'}")
    own_name = f"ipgo_user_reward_{path.stem}_{digest(str(path.resolve()).encode())[:8]}"
    content = _content(path)
    known, module, in_use = _RUN.get(own_name, ("", None, set()))
    if known != content or _changed() or (name in in_use and not look):
        _, module, in_use = _RUN[own_name] = content, _run(path, place, own_name), set()
    if not look:
        in_use.add(name)
    if not hasattr(module, name):
        public = [
            each for each, value in vars(module).items() if callable(value) and not each.startswith("_")
        ]
        raise unknown(f"reward in {place!r}:", name, public)
    found: Function = getattr(module, name)
    return found


def _run(path: Path, place: str, own_name: str) -> Any:
    """A file as a module; `InputError` in the name of `place` if it does not run."""
    source = importlib.util.spec_from_file_location(own_name, path)
    assert source is not None
    assert source.loader is not None
    module: Any = importlib.util.module_from_spec(source)
    sys.modules[own_name] = module  # where dataclasses, and `inspect`, look for what a class is written in
    try:
        with same_folder(), _helpers(path.resolve().parent):
            source.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[own_name]
        raise InputError(f"reward file {place!r} does not run: {said(error)}") from error
    return module


def _changed() -> bool:
    """Is a module beside a file another one by now?"""
    return any(known != _content(file) for _, file, known in _BESIDE.values())


@contextlib.contextmanager
def _helpers(folder: Path) -> Iterator[None]:
    """Imports find the modules beside a file first, as for a script: not those of another folder, nor of before."""
    if _changed() or any(place != folder for place, _, _ in _BESIDE.values()):
        for name in _BESIDE:
            sys.modules.pop(name, None)
        _BESIDE.clear()
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # it may have been taken out by the file itself
            sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # for what a function imports when it is called
        for name in set(sys.modules) - before:
            file = Path(getattr(sys.modules[name], "__file__", None) or "")
            if file.is_relative_to(folder) and is_own(str(file)):
                _BESIDE[name] = folder, file, _content(file)


@contextlib.contextmanager
def same_folder() -> Iterator[None]:
    """The user's code may change the folder that this process works in; paths of ours are relative to it."""
    before = Path.cwd()
    try:
        yield
    finally:
        if Path.cwd() != before:
            os.chdir(before)


def said(error: BaseException) -> str:
    """An error in one line, with the user's line that it comes from, as far as there is one."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    others = ("<", sysconfig.get_paths()["stdlib"], str(Path(__file__).parents[1]))
    frames = [
        each
        for each in traceback.extract_tb(error.__traceback__)
        if not each.filename.startswith(others) and "site-packages" not in each.filename
    ]
    told = isinstance(error, SyntaxError) or not frames  # a syntax error says its own
    place = "" if told else f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    return f"{kind}{': ' if text else ''}{text}{place}"


def _content(file: Path) -> str:
    return digest(file.read_bytes()) if file.is_file() else ""
