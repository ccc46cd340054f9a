"""Default settings that differ from backend to backend."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from typing import Any, cast

from ipgo.backends import FewSteps, few_steps
from ipgo.config import DEFAULT_REWARD
from ipgo.errors import unknown
from ipgo.methods import METHODS
from ipgo.sampling import Sampling
from ipgo.task import Method
from ipgo.vocabulary import draws_bundled_world

OTHERS_REWARD = "hpsv2.1"  # the IPGO paper follows HPSv2; this is its second version


def reward_for(backend: str) -> str:
    """The reward where none is named: that of the bundled model's world, or else a score of human preference."""
    return DEFAULT_REWARD if draws_bundled_world(backend) else OTHERS_REWARD


def usual(backend: str, method: str) -> dict[str, Any]:
    """Nested settings where nothing else is asked for: the reward, and what a few-step model needs."""
    return {"reward": reward_for(backend), **for_backend(backend, method)}


def for_backend(backend: str, method: str) -> dict[str, Any]:
    """Nested settings, as a preset has them, by the backend's name or folder; empty for models of many steps.

    Its steps and guidance scale, and gradient through all of its steps for a method that has the choice.

    Raises:
        InputError: an unknown method.
    """
    few = few_steps(backend)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if few is None:
        return {}
    chosen: dict[str, Any] = {"sampling": asdict(few)}
    if METHODS[method]().ascent is not None:
        chosen["method"] = {"ascent": {"backprop_steps": None}}
    return chosen


def method_and_sampling(
    few: FewSteps | None, method: str | Method = "ipgo", sampling: Sampling | None = None
) -> tuple[Method, Sampling]:
    """What `ipgo.fit` does with a backend of few steps or of many: a method of this name, and sampling if not given.

    A method object stays as it is. But the number of last steps with gradient that it has if nobody chose one may be
    more than there are steps, and then stands for all of them; where there are more, a log line says that a method's
    name would take them all.
    """
    sampling = sampling or (Sampling() if few is None else Sampling(**asdict(few)))
    if isinstance(method, str):
        if method not in METHODS:
            raise unknown("method", method, METHODS)
        chosen = METHODS[method]()
        return (chosen if few is None else _through_all(chosen)), sampling
    if few is None or not isinstance(method, Method):  # what is no method is refused by the settings
        return method, sampling
    usual, depth = (getattr(each.ascent, "backprop_steps", None) for each in (type(method)(), method))
    steps = sampling.fitting.steps
    if depth is not None and depth == usual:
        if depth > steps:
            return _through_all(method), sampling
        if depth < steps:
            logging.getLogger("ipgo").info(
                "the method has gradient in the last %d of %d steps; few-step models usually have it in all of them "
                "(ascent.backprop_steps=None)",
                *(depth, steps),
            )
    return method, sampling


def _through_all(method: Method) -> Method:
    """With gradient through all steps, where it has the choice."""
    if method.ascent is None:
        return method
    return cast(Method, replace(cast(Any, method), ascent=replace(method.ascent, backprop_steps=None)))
