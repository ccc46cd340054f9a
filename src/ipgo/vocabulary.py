"""What a backend says that it can draw."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipgo import files
from ipgo.backends import BACKENDS
from ipgo.prompts import unseen_words

logger = logging.getLogger("ipgo")


def vocabulary(backend: str) -> dict[str, Any] | None:
    """What a backend's folder says that it can draw (vocabulary.json); None if it says nothing."""
    file = Path(BACKENDS[backend][1] if backend in BACKENDS else backend) / "vocabulary.json"
    return files.read_json(file, "words") if file.is_file() else None


def draws_bundled_world(backend: str) -> bool:
    """Does it say that it draws what the bundled model draws, so that this one's rewards and judge know its images?"""
    known, bundled = vocabulary(backend), vocabulary("emoji")
    return known is not None and bundled is not None and known.get("objects") == bundled["objects"]


def warn_of_unseen_words(backend: str, prompts: Sequence[str]) -> None:
    """Name the words that the backend was never trained on, each with the nearest one that it knows."""
    known = vocabulary(backend)
    unseen = unseen_words(prompts, known["words"]) if known is not None else {}
    if unseen:
        words = ", ".join(
            f"{word!r} (nearest: {near!r})" if near else repr(word) for word, near in unseen.items()
        )
        logger.warning("the model has never seen %s; `ipgo list objects` shows what it can draw", words)
