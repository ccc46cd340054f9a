"""Type checks for settings that are made in Python; those of files and flags are checked by their parser."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
import typing
from typing import Any

from ipgo.errors import InputError


def check_types(settings: Any, prefix: str = "") -> None:
    """Raise `InputError` for the first field of a frozen dataclass whose value is of another type than it says.

    Numbers of other libraries become Python's, whole ones of a float field floats, and lists tuples, since settings are
    kept as JSON, compared and hashed. What a choice of words allows is for its own check to say.
    """
    for name, hint in _hints(settings.__class__).items():
        value = _plain(getattr(settings, name))
        if any(isinstance(each, float) and not math.isfinite(each) for each in _each(value)):
            none = " or null" if _fits(None, hint) else ""
            raise InputError(f"{prefix}{name} is {value!r}; it must be a finite number{none}")
        if not _fits(value, hint):
            wanted = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)
            raise InputError(f"{prefix}{name} is {value!r}; it must be {wanted}")
        value = _floating(value, hint)
        if value is not getattr(settings, name):
            object.__setattr__(settings, name, value)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _plain(value: Any) -> Any:
    """numpy's numbers and texts as Python's, also in a tuple, a list as the tuple that JSON lost; the rest as it is.

    Seeds are derived from a text's `repr`, which another library's text may have its own of.
    """
    if isinstance(value, tuple | list):
        items = tuple(map(_plain, value))
        same = isinstance(value, tuple) and all(a is b for a, b in zip(items, value, strict=True))
        return value if same else items
    if isinstance(value, str) and type(value) is not str:
        return str(value)
    foreign = isinstance(value, numbers.Real) and hasattr(value, "item")  # numpy's have it, Python's have not
    return value.item() if foreign else value


def _floating(value: Any, hint: Any) -> Any:
    """3 as 3.0 where a float is meant, also in a tuple; the rest as it is."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _floating(value, next(each for each in inner if _fits(value, each)))
    if origin is tuple:
        items = tuple(map(_floating, value, _of_each(value, inner)))
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    return float(value) if hint is float and isinstance(value, int) else value


def _of_each(value: tuple[Any, ...], inner: tuple[Any, ...]) -> tuple[Any, ...]:
    """The hint of each item of a tuple."""
    return inner[:1] * len(value) if inner[-1] is Ellipsis else inner


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        own = _of_each(value, inner)
        return len(own) == len(value) and all(map(_fits, value, own))
    if not isinstance(hint, type) or getattr(hint, "_is_protocol", False):
        return True
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint)
