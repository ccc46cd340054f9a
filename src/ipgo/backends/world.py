"""The bundled model, and folders of models that draw its world, such as one trained further from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ipgo import files

EMOJI = Path(__file__).parent / "emoji"
GUIDANCE = 2.5  # the scale that such a model draws best with: see docs/emoji-model.md


def vocabulary(place: str | Path) -> dict[str, Any] | None:
    """What a model's folder says that it can draw (vocabulary.json); None if it says nothing."""
    file = Path(place) / "vocabulary.json"
    return files.read_json(file, "words") if file.is_file() else None


def draws_bundled_world(place: str | Path) -> bool:
    """Does it say that it draws what the bundled model draws, so that what belongs to this one's world suits it?"""
    known, bundled = vocabulary(place), vocabulary(EMOJI)
    return known is not None and bundled is not None and known.get("objects") == bundled["objects"]
