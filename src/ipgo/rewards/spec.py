"""How a reward is written: `clip+0.5*aesthetic<=6.5`, and what else such a spec may hold."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ipgo.errors import InputError
from ipgo.rewards.checkpoints import bare_name
from ipgo.rewards.known import REWARDS

CEILING = "<="
# What begins so goes on to the end of a spec, whatever + and * are in it; with the class that reads it.
EXTERNAL = {"cmd:": "ipgo.rewards.external:Command", "ask:": "ipgo.rewards.external:Question"}
_PLUS = re.compile(r"(?<![\d.][eE])\+")  # not that of 1e+3
_WEIGHT = re.compile(r"^\s*[-\d.eE]+\s*\*")
_EXTERNAL = re.compile(r"(?:^|(?<=[+*]))\s*(?=cmd:|ask:)")


class Term(NamedTuple):
    """`weight*name<=most`."""

    weight: float
    name: str
    most: float | None


def read_terms(spec: str) -> list[Term]:
    """The parts of a spec, which a + joins.

    Raises:
        InputError: an empty term, or a weight or ceiling that is no number.
    """
    head, tail = _cut(spec)
    *parts, last = _PLUS.split(head)
    return [_term(part) for part in _whole_paths([*parts, last + tail])]


def _whole_paths(parts: Sequence[str]) -> list[str]:
    """The parts as terms; a path that holds a + and is there has come apart, and is joined again."""
    terms, start = [], 0
    while start < len(parts):
        name, _, place = parts[start].partition(":")
        known = _is_published(name.rpartition("*")[2].strip()) and bool(place)
        ends = range(start + 1, len(parts) + 1)
        end = next((end for end in ends if _is_there("+".join(parts[start:end]), known)), start + 1)
        terms.append("+".join(parts[start:end]))
        start = end
    return terms


def _is_published(name: str) -> bool:
    """Does a name, with or without a variant, take a path to its weights?"""
    known = REWARDS.get(bare_name(name))
    return known is not None and known.source is not None


def _is_there(term: str, known: bool) -> bool:
    """Does a term name a file that exists: of a published reward's weights (`known`), or one of functions?"""
    return (known and _own_weights(term)) or _own_file(term)


def _own_file(term: str) -> bool:
    """Is it `file.py:function`, with or without a weight, of a file that is there?"""
    place = _WEIGHT.sub("", term).partition(CEILING)[0].rpartition(":")[0].strip()
    return place.endswith(".py") and Path(place).is_file()


def _own_weights(term: str) -> bool:
    """Is it a published name with a path that is there?"""
    return Path(term.partition(CEILING)[0].partition(":")[2].strip()).exists()


def _cut(spec: str) -> tuple[str, str]:
    """A spec up to its command or question, and that."""
    found = _EXTERNAL.search(spec)
    return (spec, "") if found is None else (spec[: found.end()], spec[found.end() :])


def _term(term: str) -> Term:
    """`0.5*name<=2` to (0.5, "name", 2)."""
    head, tail = _cut(term)
    weight, star, name = head.rpartition("*")
    name, ceiling, most = (name, "", "") if tail else name.partition(CEILING)
    name += tail
    if not name.strip():
        raise InputError(
            f"reward term {term!r} is empty; write a name, weight*name or name{CEILING}most, joined by +"
        )
    factor = _finite(weight, "weight", term) if star else 1.0
    if factor == 0:
        raise InputError(f"reward weight {weight!r} in {term!r} must be a finite number other than 0")
    return Term(factor, name.strip(), _finite(most, "ceiling", term) if ceiling else None)


def _finite(number: str, what: str, term: str) -> float:
    try:
        value = float(number)
    except ValueError:
        raise InputError(f"reward {what} {number!r} in {term!r} is not a number") from None
    if not math.isfinite(value):
        raise InputError(f"reward {what} {number!r} in {term!r} must be a finite number")
    return value
