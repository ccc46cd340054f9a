"""Rewards of one's own: functions read from a file, what their failures say, and what they are known by."""

from __future__ import annotations

import contextlib
import dis
import functools
import hashlib
import importlib.util
import inspect
import json
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ipgo.errors import InputError, unknown

Function = Callable[..., Any]


def read_function(spec: str) -> tuple[Function, str]:
    """The function that `path/mine.py:warmth` names, and its name.

    Raises:
        InputError: no such file, one that does not run, or one without that function.
    """
    place, _, name = spec.rpartition(":")
    path = Path(place)
    if not path.is_file():
        raise InputError(f"reward file {place!r} does not exist")
    source = importlib.util.spec_from_file_location(f"ipgo_user_reward_{path.stem}", path)
    assert source is not None
    assert source.loader is not None
    module: Any = importlib.util.module_from_spec(source)
    try:
        source.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"reward file {place!r} does not run: {said(error)}") from error
    if not hasattr(module, name):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown(f"reward in {place!r}:", name, public)
    return getattr(module, name), name


def said(error: BaseException) -> str:
    """An error in one line, with the place that it comes from."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    own = [each for each in frames if "site-packages" not in Path(each.filename).parts]  # not torch's inside
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{kind}{': ' if text else ''}{text}{place}"


def parts_of(written: object) -> list[str] | None:
    """Digests of what a function or an object computes by, as far as it shows; None if nothing does.

    The text that it is written in, where in it a function stands, what a function has closed over, and the weights of
    modules. What can change between two calls, such as other attributes of an object, is left out.
    """
    text = _text(written)
    if text is None:
        return None
    seen = {id(written)}
    state = [line for value in _held(written) for line in _lines(value, seen)]
    return [_digest(text), *([_digest("\n".join(state).encode())] if state else [])]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _text(written: object) -> bytes | None:
    """The file that something is written in; of what was typed into a notebook, its own lines."""
    if isinstance(written, functools.partial):
        return _text(written.func)
    code = written if hasattr(written, "__code__") or inspect.ismethod(written) else type(written)
    code = inspect.unwrap(code) if callable(code) else code
    try:
        return Path(inspect.getfile(code)).read_bytes()  # type: ignore[arg-type]
    except (TypeError, OSError):
        pass
    try:
        return inspect.getsource(code).encode()  # type: ignore[arg-type]
    except (TypeError, OSError):
        return None


def _held(written: object) -> Iterator[object]:
    """What something computes by beside its text."""
    if isinstance(written, functools.partial):
        yield from (written.func, *written.args, *written.keywords.items())
    elif inspect.ismethod(written):
        yield from (written.__func__, written.__self__)
    elif inspect.isfunction(written):
        code, defaults = written.__code__, written.__kwdefaults__ or {}
        places = [(line, column) for line, _, column, _ in code.co_positions() if line and column]
        yield from (code.co_qualname, *map(str, min(places, default=())))
        yield from (*(written.__defaults__ or ()), *sorted(defaults.items()))
        counters = {each.argval for each in dis.get_instructions(code) if each.opname == "STORE_DEREF"}
        for name, cell in zip(code.co_freevars, written.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # what the cell is for is not defined yet
                if name not in counters:
                    yield cell.cell_contents
    elif isinstance(written, nn.Module):
        yield written


def _lines(value: object, seen: set[int]) -> Iterator[str]:
    """A value as lines that are the same in every process; nothing of what has no such lines, or was seen before."""
    if isinstance(value, nn.Module):
        for name, tensor in value.state_dict().items():
            yield f"{name} {_digest_of(tensor)}" if isinstance(tensor, Tensor) else name
    elif isinstance(value, Tensor):
        yield _digest_of(value)
    elif inspect.isroutine(value) or isinstance(value, functools.partial):
        if id(value) not in seen:  # a function may close over itself
            seen.add(id(value))
            for each in _held(value):
                yield from _lines(each, seen)
    elif isinstance(value, tuple):
        for each in value:
            yield from _lines(each, seen)
    elif value is None or isinstance(value, str | int | float):
        yield json.dumps(value)


def _digest_of(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "no numbers"
    plain = tensor.detach().cpu().contiguous()
    head = f"{plain.dtype} {tuple(plain.shape)} ".encode()
    return _digest(head + plain.flatten().view(torch.uint8).numpy().tobytes())
