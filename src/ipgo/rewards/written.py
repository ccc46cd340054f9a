"""What a reward of one's own is known by: what it is written in, and what it computes by."""

from __future__ import annotations

import contextlib
import dis
import functools
import hashlib
import inspect
import json
import os
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DEVICE = re.compile(r"(cpu|cuda|mps)(:\d+)?")

# They change from call to call while training.
RUNNING = ("running_mean", "running_var", "num_batches_tracked")

# Functions of an object that give it its first attributes, and attributes that every part of a network has.
FIRST = ("__init__", "__post_init__", "__new__", "__setstate__")
PART = vars(nn.Module()).keys()

DAY = 86_400  # seconds
START = time.time()
WEIGHTS = (nn.Module, Tensor, np.ndarray)
LIBRARIES = (sysconfig.get_paths()["stdlib"] + os.sep, str(Path(__file__).parents[1]) + os.sep)

Leaf = str | int | float | Tensor | np.ndarray | np.generic | None


def parts_of(written: object) -> list[str] | None:
    """Digests of what a function or an object computes by, as far as it shows; None if nothing does.

    The text that it is written in, where in it a function stands, what a function has closed over or takes from its
    module (numbers, texts, tensors and arrays, functions, classes and modules that are no library's), and weights, also
    those that an object keeps. What a call may change is left out: lists, dictionaries, variables that functions
    write, numbers of an object unless it is a frozen dataclass. So is a time: it says when this was read.
    """
    text = _text(written)
    state = list(_lines(written)) if text is not None or isinstance(written, nn.Module) else []
    parts = [text, digest("\n".join(state).encode()) if state else None]
    return [each for each in parts if each is not None] or None


def unsettled(written: object) -> bool:
    """Does a function or an object compute with batch norm or dropout in training mode?

    Its answers then change, or depend on the other rows. A module is in this mode until its `eval()` is called.
    """
    moody = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    return any(
        part.training and isinstance(part, moody) and getattr(part, "p", 1) > 0
        for module in _leaves(written)
        if isinstance(module, nn.Module)
        for part in module.modules()
    )


def _lines(written: object) -> Iterator[str]:
    """What something computes by, as lines that are the same in every process."""
    for leaf in _leaves(written):
        if isinstance(leaf, nn.Module):
            yield from _lines_of_module(leaf)
        elif isinstance(leaf, Tensor):
            yield _digest_of(leaf)
        elif isinstance(leaf, np.ndarray | np.generic):
            # It may hold objects, or its bytes in another order.
            with contextlib.suppress(TypeError, ValueError):
                yield _digest_of(torch.as_tensor(np.ascontiguousarray(leaf)))
        else:
            yield hex(leaf) if isinstance(leaf, int) else json.dumps(leaf)


def _leaves(written: object) -> Iterator[Leaf | nn.Module]:
    """All that something reaches, in an order that is the same in every process."""
    seen: dict[int, object] = {}
    open_ = [written]
    while open_:
        value = open_.pop()
        if isinstance(value, Leaf):
            if not _is_time(value):
                yield value
            continue
        if id(value) in seen:  # a function may close over itself
            yield "again"
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            yield value
        open_ += reversed(list(_inside(value)))


def _inside(value: object) -> Iterator[object]:
    """What a value is made of or takes, one level of it; nothing of what is a library's."""
    if isinstance(value, tuple):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.items())
    elif inspect.ismethod(value):
        yield from (value.__func__, value.__self__)
    elif inspect.isroutine(value):
        inner = inspect.unwrap(value)
        # What a decorator has wrapped may be a module.
        yield from _inside_function(inner) if inspect.isroutine(inner) else (inner,)
    elif inspect.ismodule(value):
        if is_own(getattr(value, "__file__", None)):
            yield _file_of(value)
    elif isinstance(value, type):
        yield from _inside_class(value)
    elif isinstance(value, nn.Module):
        for part in value.modules():
            yield from _inside_object(part)
    else:
        yield from _inside_object(value)


def _inside_function(function: Any) -> Iterator[object]:
    """Which one of its file it is, its defaults, what it has closed over, and what it takes from its module."""
    yield str(_text(function))
    if not inspect.isfunction(function):
        return
    code = function.__code__
    yield from (code.co_qualname, code.co_firstlineno if Path(code.co_filename).is_file() else None)
    yield from (function.__defaults__, tuple(sorted((function.__kwdefaults__ or {}).items())))
    for pair in _reached(function):
        yield from pair


def _inside_class(kind: type) -> Iterator[object]:
    """The functions and weights of a class and of its bases, but for a library's.

    Its numbers are in its file; those of a class that has none are told here.
    """
    for each in _own_classes(kind):
        file = _file_of_class(each)
        yield from (each.__qualname__, _file_of(each))
        for name, value in sorted(vars(each).items()):
            inner = _bare(value)
            if inspect.isfunction(inner):  # without a file it is generated, as a dataclass's are
                wanted = file is None or not inner.__code__.co_filename.startswith("<")
            else:
                wanted = not name.startswith("__") and (file is None or isinstance(inner, WEIGHTS))
            if wanted:
                yield from (name, inner)


def _inside_object(value: object) -> Iterator[object]:
    """The class of an object that is no library's, and what it keeps and none of its functions writes again.

    That is weights and other objects; numbers only where they cannot change, in a frozen dataclass.
    """
    kind = type(value)
    if not _own_classes(kind):
        return
    yield kind
    parameters = getattr(kind, "__dataclass_params__", None)
    frozen = parameters is not None and parameters.frozen
    written = _written_by(kind)
    for name, each in sorted(_attributes(value).items()):
        kept = not isinstance(each, Leaf | type) or isinstance(each, WEIGHTS) or frozen
        if kept and name not in written and name not in PART:
            yield from (name, each)


def _attributes(value: object) -> dict[str, object]:
    """Also those in slots; none that is computed."""
    slots = [
        name
        for kind in type(value).__mro__
        for name in getattr(kind, "__slots__", ())
        if isinstance(name, str)
    ]
    found = dict(getattr(value, "__dict__", {}))
    for name in slots:
        with contextlib.suppress(AttributeError):
            found[name] = object.__getattribute__(value, name)
    later = {
        name for name in found if isinstance(getattr(type(value), name, None), functools.cached_property)
    }
    return {name: each for name, each in found.items() if name not in later}


def _own_classes(kind: type) -> list[type]:
    """A class and its bases, but for a library's."""
    return [each for each in kind.__mro__ if is_own(_file_of_class(each)) or _is_typed(each)]


def _written_by(kind: type) -> set[str]:
    """The attributes that the functions of a class write, other than those that give it its first ones."""
    named = [pair for each in _own_classes(kind) for pair in vars(each).items()]
    codes = [
        _bare(each).__code__ for name, each in named if inspect.isfunction(_bare(each)) and name not in FIRST
    ]
    return set[str]().union(*(_names(each, "STORE_ATTR", "DELETE_ATTR") for each in codes))


def _bare(value: Any) -> Any:
    """The function in a class or static method, or in a property."""
    if isinstance(value, classmethod | staticmethod):
        return value.__func__
    return value.fget if isinstance(value, property) else value


def _is_time(value: object) -> bool:
    """Is it a time that a clock had while this process runs, or a little before, in seconds or nanoseconds?"""
    if not isinstance(value, int | float):
        return False
    with contextlib.suppress(OverflowError):
        return any(START - DAY < value / unit < time.time() + DAY for unit in (1, 1e9))
    return False


def _text(written: object) -> str | None:
    """The digest of the file that something is written in; of what was typed into a notebook, of its own lines."""
    if isinstance(written, functools.partial):
        return _text(written.func)
    if inspect.isroutine(written):
        return _text_of(inspect.unwrap(written))
    kind = type(written)
    if (text := _file_of(kind)) is not None:
        return text
    return digest("\n".join(_lines(kind)).encode()) if any(map(_is_typed, kind.__mro__)) else None


def _is_typed(kind: type) -> bool:
    """Was a class typed into a notebook, or a session?"""
    return kind.__module__ == "__main__" and _file_of(kind) is None


def _text_of(function: Any) -> str | None:
    """The digest of a function's file, or of its lines, or, where nothing has kept these, of what they compile to."""
    if (text := _file_of(function)) is not None:
        return text
    with contextlib.suppress(TypeError, OSError):
        return digest(inspect.getsource(function).encode())
    code = getattr(function, "__code__", None)
    return None if code is None else digest(_compiled(code).encode())


def _file_of(code: Any) -> str | None:
    """The digest of its file's content."""
    file = _file_of_class(code) if isinstance(code, type) else None
    with contextlib.suppress(TypeError, OSError):
        return digest(Path(file or inspect.getfile(code)).read_bytes())
    return None


def _file_of_class(kind: type) -> str | None:
    """That of its functions: a module's name may stand for another one by now."""
    for each in map(inspect.unwrap, filter(inspect.isfunction, vars(kind).values())):
        file: str = each.__code__.co_filename
        if each.__module__ == kind.__module__ and Path(file).is_file():
            return file
    with contextlib.suppress(TypeError, OSError):
        return inspect.getfile(kind)
    return None


def is_own(file: str | None) -> bool:
    """Is what is written in a file no library's?"""
    if not file or file.startswith("<") or {"site-packages", "dist-packages"} & set(Path(file).parts):
        return False
    return not file.startswith(LIBRARIES)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _compiled(code: Any) -> str:
    """Instructions, names and constants, those of inner functions among them."""
    constants = [
        _compiled(each)
        if inspect.iscode(each)
        else repr(sorted(map(repr, each)) if isinstance(each, frozenset) else each)
        for each in code.co_consts
    ]
    return repr((code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants))


def _reached(function: Any) -> Iterator[tuple[str, object]]:
    """What a function has closed over and what it takes from its module, but for what functions write there."""
    code = function.__code__
    counted = {each.argval for each in dis.get_instructions(code) if each.opname == "STORE_DEREF"}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # what the cell is for is not defined yet
            if name not in counted:
                yield name, cell.cell_contents
    if is_own(code.co_filename) or code.co_filename.startswith("<"):
        there = function.__globals__
        others = [each.__code__ for each in there.values() if _of_module(each, there)]
        written = set[str]().union(*(_names(each, "STORE_GLOBAL") for each in (code, *others)))
        for name in sorted(_names(code, "LOAD_GLOBAL", "LOAD_NAME") - written):
            if name not in there or _says_where(name, there[name], Path(code.co_filename)):
                continue
            yield name, there[name]
            if inspect.ismodule(there[name]):
                yield from _used_of(there[name], _names(code, "LOAD_ATTR", "LOAD_METHOD"))


def _used_of(module: ModuleType, names: frozenset[str]) -> Iterator[tuple[str, object]]:
    """What a function takes from a module that is no library's, `helper.compute` and `package.part.compute`."""
    if not is_own(getattr(module, "__file__", None)):
        return
    for name in sorted(names & vars(module).keys()):
        value = vars(module)[name]
        yield name, value
        if inspect.ismodule(value) and value.__name__.startswith(f"{module.__name__}."):
            yield from _used_of(value, names)


def _of_module(value: object, there: dict[str, Any]) -> bool:
    return inspect.isfunction(value) and value.__globals__ is there


@functools.lru_cache(maxsize=4096)
def _names(code: Any, *kinds: str) -> frozenset[str]:
    """What instructions of these kinds name, in a function and in those inside it."""
    own = frozenset(each.argval for each in dis.get_instructions(code) if each.opname in kinds)
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
    return digest(head + plain.flatten().view(torch.uint8).numpy().tobytes())
