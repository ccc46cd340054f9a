"""Default settings that differ for few-step models."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, cast

from ipgo.backends import FewSteps, few_steps
from ipgo.errors import unknown
from ipgo.methods import METHODS
from ipgo.sampling import Sampling
from ipgo.task import Method


def for_backend(backend: str, method: str) -> dict[str, Any]:
    """Nested settings, as a preset has them, by the backend's name or folder; empty for models of many steps.

    Its steps and guidance scale, and gradient through all of its steps for a method that has the choice.
    """
    few = few_steps(backend)
    if few is None:
        return {}
    chosen: dict[str, Any] = {"sampling": asdict(few)}
    if METHODS[method]().ascent is not None:
        chosen["method"] = {"ascent": {"backprop_steps": None}}
    return chosen


def method_and_sampling(few: FewSteps | None, method: str = "ipgo") -> tuple[Method, Sampling]:
    """What `ipgo.fit` does with a backend of few steps or of many, and the method of this name."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    chosen = METHODS[method]()
    if few is None:
        return chosen, Sampling()
    if chosen.ascent is not None:
        chosen = replace(cast(Any, chosen), ascent=replace(chosen.ascent, backprop_steps=None))
    return chosen, Sampling(**asdict(few))
