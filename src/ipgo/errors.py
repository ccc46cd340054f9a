"""Every error that ipgo raises on purpose, and the one way to say that a name is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class IpgoError(Exception):
    """The base of all errors of ipgo."""


class InputError(IpgoError, ValueError):
    """Something that the user gave is wrong: the message names it and says what is allowed."""


class RewardError(InputError):
    """A reward broke its contract: a wrong shape, NaN, or no gradient where one is needed."""


class NotFiniteError(RewardError):
    """A reward is NaN or infinite for an image that is finite."""


class ResumeError(InputError):
    """What was begun, a run's folder or a fit's state, cannot be continued with the settings or models at hand."""


class InUseError(ResumeError):
    """Another process, or another fit of this one, works on the run or the pipeline."""


class Stopped(IpgoError):  # noqa: N818  # somebody wanted it
    """A fit was asked to stop, between two steps: what it has learned is kept, and it can be continued."""


class MissingExtraError(IpgoError, ImportError):
    """An optional dependency is not installed: the message gives the pip line."""


def first_line(error: BaseException) -> str:
    """What a library's error says, as part of a sentence of ours; its type where it says nothing.

    Where it lists what is wrong under a heading, as torch does, the first of that.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def unknown(kind: str, value: object, allowed: Iterable[str]) -> InputError:
    """The error for a misspelt name: `unknown reward 'asthetic'; did you mean 'aesthetic'?`."""
    names = sorted(allowed)
    near = difflib.get_close_matches(str(value), names, n=1)
    choice = f"choose from {', '.join(names)}" if names else "there is none"
    hint = f"did you mean {near[0]!r}?" if near else choice
    return InputError(f"unknown {kind} {str(value)!r}; {hint}")


def unknown_option(name: str, allowed: Iterable[str]) -> InputError:
    """The error for a misspelt flag: `unknown option '--sedes'; did you mean '--seeds'?`.

    One that is the last part of longer ones (`--steps`) was hardly misspelt: all of these are named.
    """
    options = sorted(allowed)
    bare = name.lstrip("-").replace("-", "_")
    near = [each for each in options if each.lstrip("-").split(".")[-1] == bare]
    # The other way round: `doctor --sampling.steps`, which is `--steps` there.
    near = near or [each for each in options if each.lstrip("-").replace("-", "_") == bare.split(".")[-1]]
    near = near or difflib.get_close_matches(name, options, n=1, cutoff=0.8)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see --help"
    if not near and name.lstrip("-").startswith("method."):
        hint = "the method has none of that name: see `ipgo fit --method NAME --help`"
    return InputError(f"unknown option {name!r}; {hint}")
