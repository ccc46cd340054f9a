"""Rewards of one's own: functions read from a file, what their failures say, and what they are known by."""

from __future__ import annotations

import contextlib
import dis
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ipgo.errors import InputError, unknown

Function = Callable[..., Any]
DEVICE = re.compile(r"(cpu|cuda|mps)(:\d+)?")

# They change from call to call while training.
RUNNING = ("running_mean", "running_var", "num_batches_tracked")


# Files that were run, by name: the digest of their content, and their functions that are in use. What a file does as it
# is read, it does once for a fit, and anew for the next one or when it has changed.
_RUN: dict[str, tuple[str, Any, set[str]]] = {}


def read_function(spec: str, *, look: bool = False) -> Function:
    """The function that `path/mine.py:warmth` names.

    Args:
        look: it is not going to be called, so that who wants to call it gets the same one.

    Raises:
        InputError: no such file, one that does not run, or one without that function.
    """
    place, _, name = spec.rpartition(":")
    path = Path(place)
    if not path.is_file():
        raise InputError(f"reward file {place!r} does not exist")
    own_name = f"ipgo_user_reward_{path.stem}_{_digest(str(path.resolve()).encode())[:8]}"
    content = _digest(path.read_bytes())
    known, module, in_use = _RUN.get(own_name, ("", None, set()))
    if known != content or (name in in_use and not look):
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
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # for modules beside it, as for a script
    sys.modules[own_name] = module  # where dataclasses, and `inspect`, look for what a class is written in
    try:
        with same_folder():
            source.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[own_name]
        raise InputError(f"reward file {place!r} does not run: {said(error)}") from error
    return module


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


def parts_of(written: object) -> list[str] | None:
    """Digests of what a function or an object computes by, as far as it shows; None if nothing does.

    The text that it is written in, where in it a function stands, what a function has closed over or takes from its
    module (numbers, texts, tensors and arrays, other functions), and the weights of modules. What a call may change is
    left out: lists, dictionaries, a variable that the function itself counts up, other attributes of an object.
    """
    text, seen = _text(written), set[int]()
    state = list(_lines(written, seen)) if text is not None or isinstance(written, nn.Module) else []
    parts = [text, _digest("\n".join(state).encode()) if state else None]
    return [each for each in parts if each is not None] or None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def unsettled(written: object) -> bool:
    """Does a function or an object compute with batch norm or dropout in training mode?

    Its answers then change, or depend on the other rows. A module is in this mode until its `eval()` is called.
    """
    moody = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    return any(
        part.training and isinstance(part, moody) and getattr(part, "p", 1) > 0
        for module in _modules(written, set())
        for part in module.modules()
    )


def _modules(value: object, seen: set[int]) -> Iterator[nn.Module]:
    """Those that a function or an object reaches, as far as `_lines` looks."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, functools.partial):
        for each in (value.func, *value.args, *value.keywords.values()):
            yield from _modules(each, seen)
    elif inspect.ismethod(value):
        yield from _modules(value.__self__, seen)
    elif inspect.isfunction(value) and id(value) not in seen:
        seen.add(id(value))
        inner = inspect.unwrap(value)
        if not inspect.isfunction(inner):  # what a decorator has wrapped may be a module
            yield from _modules(inner, seen)
            return
        for _, each in _reached(inner):
            yield from _modules(each, seen)


def _text(written: object) -> str | None:
    """The digest of the file that something is written in; of what was typed into a notebook, of its own lines.

    Of a class in a notebook these are the lines of its functions, and those of its bases there, and its numbers.
    """
    if isinstance(written, functools.partial):
        return _text(written.func)
    if inspect.isroutine(written):
        return _text_of(inspect.unwrap(written))
    kind = type(written)
    if (text := _file_of(kind)) is not None:
        return text
    typed = [each for each in kind.__mro__ if each.__module__ == "__main__" and _file_of(each) is None]
    lines = []
    for each in typed:
        for name, value in sorted(vars(each).items()):
            inner = getattr(value, "__func__", getattr(value, "fget", value))
            if inspect.isfunction(inner):
                lines.append(f"{each.__qualname__}.{name} {_text_of(inner)}")
            elif not name.startswith("__"):
                lines += (name, *_lines(value, set()))
    return _digest("\n".join(lines).encode()) if typed else None


def _text_of(function: Any) -> str | None:
    """The digest of a function's file, or of its lines, or, where nothing has kept these, of what they compile to."""
    if (text := _file_of(function)) is not None:
        return text
    with contextlib.suppress(TypeError, OSError):
        return _digest(inspect.getsource(function).encode())
    code = getattr(function, "__code__", None)
    return None if code is None else _digest(_compiled(code).encode())


def _file_of(code: Any) -> str | None:
    with contextlib.suppress(TypeError, OSError):
        return _digest(Path(inspect.getfile(code)).read_bytes())
    return None


def _compiled(code: Any) -> str:
    """Instructions, names and constants, those of inner functions among them."""
    constants = [
        _compiled(each)
        if inspect.iscode(each)
        else repr(sorted(map(repr, each)) if isinstance(each, frozenset) else each)
        for each in code.co_consts
    ]
    return repr((code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants))


def _lines(value: object, seen: set[int]) -> Iterator[str]:
    """What a value is as lines that are the same in every process; nothing of what has no such lines."""
    if isinstance(value, nn.Module):
        yield from _lines_of_module(value)
    elif isinstance(value, Tensor):
        yield _digest_of(value)
    elif isinstance(value, functools.partial):
        for each in (value.func, *value.args, *value.keywords.items()):
            yield from _lines(each, seen)
    elif inspect.isroutine(value):
        if id(value) in seen:  # a function may close over itself
            yield "again"
            return
        seen.add(id(value))
        yield from _lines_of_function(inspect.unwrap(value), seen)
    elif isinstance(value, tuple):
        for each in value:
            yield from _lines(each, seen)
    elif value is None or isinstance(value, str | int | float):
        yield json.dumps(value)
    elif isinstance(value, np.ndarray | np.generic):
        with contextlib.suppress(TypeError, ValueError):  # it may hold objects, or its bytes in another order
            yield _digest_of(torch.as_tensor(np.ascontiguousarray(value)))


def _lines_of_function(function: Any, seen: set[int]) -> Iterator[str]:
    """Which one of its file it is, its defaults, what it has closed over, and what it takes from its module."""
    if inspect.ismethod(function):
        yield from _lines(function.__func__, seen)
        yield from _lines(function.__self__, seen)
        return
    yield str(_text(function))
    if not inspect.isfunction(function):
        return
    code, in_file = function.__code__, Path(function.__code__.co_filename).is_file()
    yield code.co_qualname
    yield str(code.co_firstlineno) if in_file else ""
    yield from _lines(function.__defaults__, seen)
    yield from _lines(tuple(sorted((function.__kwdefaults__ or {}).items())), seen)
    for name, value in _reached(function):
        yield from (name, *_lines(value, seen))


def _reached(function: Any) -> Iterator[tuple[str, object]]:
    """What a function has closed over and what it takes from its module, but for what functions write there."""
    code = function.__code__
    counted = {each.argval for each in dis.get_instructions(code) if each.opname == "STORE_DEREF"}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # what the cell is for is not defined yet
            if name not in counted:
                yield name, cell.cell_contents
    if _own(function):
        there = function.__globals__
        others = [each.__code__ for each in there.values() if _of_module(each, there)]
        written = set().union(*(_names(each, "STORE_GLOBAL") for each in (code, *others)))
        for name in sorted(_names(code, "LOAD_GLOBAL", "LOAD_NAME") - written):
            if name in there and not _says_where(name, there[name], Path(code.co_filename)):
                yield name, there[name]


def _own(function: Any) -> bool:
    """Is a function no library's? What those take from their modules is theirs."""
    place = function.__code__.co_filename
    return "site-packages" not in place and not place.startswith(sysconfig.get_paths()["stdlib"])


def _of_module(value: object, there: dict[str, Any]) -> bool:
    return inspect.isfunction(value) and value.__globals__ is there


def _names(code: Any, *kinds: str) -> set[str]:
    """What instructions of these kinds name, in a function and in those inside it."""
    own = {each.argval for each in dis.get_instructions(code) if each.opname in kinds}
    return own.union(*(_names(each, *kinds) for each in code.co_consts if inspect.iscode(each)))


def _says_where(name: str, value: object, file: Path) -> bool:
    """Does a global say where a function is or runs (__file__, its folder, a device), not what it computes?"""
    if name.startswith("__"):
        return True
    folder = str(file.resolve().parent)
    return isinstance(value, str) and (
        DEVICE.fullmatch(value) is not None or value == folder or value.startswith(folder + os.sep)
    )


def _lines_of_module(module: nn.Module) -> Iterator[str]:
    for name, part in module.named_modules():
        yield f"{name} {type(part).__qualname__}"
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor) and not (module.training and name.endswith(RUNNING)):
            yield f"{name} {_digest_of(tensor)}"


def _digest_of(tensor: Tensor) -> str:
    if tensor.is_meta or nn.parameter.is_lazy(tensor):
        return "no numbers"
    plain = tensor.detach().cpu().to_dense().resolve_conj().resolve_neg().contiguous()
    head = f"{plain.dtype} {tuple(plain.shape)} ".encode()
    return _digest(head + plain.flatten().view(torch.uint8).numpy().tobytes())
