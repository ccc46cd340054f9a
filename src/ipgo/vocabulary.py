"""What a backend says that it can draw."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ipgo.backends import place_of, world
from ipgo.prompts import unseen_words

logger = logging.getLogger("ipgo")


def vocabulary(backend: str) -> dict[str, Any] | None:
    """What a backend's folder says that it can draw (vocabulary.json); None if it says nothing."""
    return world.vocabulary(place_of(backend))


def draws_bundled_world(backend: str) -> bool:
    """Does it say that it draws the bundled model's world, whose rewards, judge and words then suit it?"""
    return world.draws_bundled_world(place_of(backend))


def warn_of_unseen_words(backend: str, prompts: Sequence[str]) -> None:
    """Name the words that the backend was never trained on, each with the nearest one that it knows."""
    known = vocabulary(backend)
    unseen = unseen_words(prompts, known["words"]) if known is not None else {}
    if unseen:
        words = ", ".join(
            f"{word!r} (nearest: {near!r})" if near else repr(word) for word, near in unseen.items()
        )
        logger.warning("the model has never seen %s; `ipgo list objects` shows what it can draw", words)
