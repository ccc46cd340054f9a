"""What can be refused before a model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Container, Sequence

from ipgo.backends import check_backend, may_draw_noise
from ipgo.config import RunConfig
from ipgo.errors import InputError
from ipgo.methods import WITHOUT_GRADIENT
from ipgo.models import judging_rewards
from ipgo.rewards import check_reward, has_gradient, optimised, terms
from ipgo.store import Run
from ipgo.vocabulary import draws_bundled_world, warn_of_unseen_words

logger = logging.getLogger("ipgo")


def check(config: RunConfig, given: Container[str] = (), *, loaded: bool = False) -> None:
    """Raise `InputError` for models that cannot work, or not together.

    Args:
        given: names of rewards that are objects already, and so need no checks.
        loaded: whether the backend is there already.
    """
    if not loaded:  # first: a misspelt backend has no world that a reward could be of
        negative = config.sampling.negative_prompt
        config.check_width(check_backend(config.backend, config.opening, config.prompts, negative))
        check_own_steps(config)
    warn_of_unseen_words(config.backend, config.prompts)
    if config.reward not in given:
        check_world(config)
    own = optimised(config.reward) if config.reward not in given else ()
    for name in (each for each in config.held_out or () if each in own):
        logger.warning("held_out names %r, which is optimised and so judges nothing", name)
    for name in dict.fromkeys((config.reward, *judging_rewards(config))):
        if name not in given:
            check_reward(name, config.prompts)
    if config.reward not in given:
        check_gradient(config)


def check_own_steps(config: RunConfig) -> None:
    """Refuse, before a model is loaded, gradient in more steps than a fit draws in, where its folder says how many.

    `models.check_loaded` does it for all others.
    """
    if config.scheduler is None and not may_draw_noise(config.backend):
        config.check_steps(config.sampling.fitting.steps)


def check_method(folder: Run) -> None:
    """`check_settings` of what is not done yet."""
    for chunk in folder.pending():
        check_settings(folder.config, chunk.texts)


def check_settings(config: RunConfig, prompts: Sequence[str]) -> None:
    """Raise `InputError`, before a model is loaded, for settings that cannot fit these prompts."""
    config.check_fit()
    config.method.check(config.request(prompts))


def check_gradient(config: RunConfig) -> None:
    """Refuse, before a model is loaded, a method that climbs and a reward that has no gradient."""
    if config.method.climbing and not has_gradient(config.reward):
        raise InputError(
            f"reward {config.reward!r} has no gradient, which method {config.method_name!r} needs; "
            f"use one that needs none: {WITHOUT_GRADIENT}"
        )


def check_world(config: RunConfig) -> None:
    """Warn of a reward of the bundled model's where another one draws."""
    own = [name for _, name in terms(config.reward) if name.startswith("emoji-")]
    if own and not draws_bundled_world(config.backend):
        logger.warning(
            "%r knows the objects of the bundled model alone, not what %r draws", own[0], config.backend
        )
