"""What a prompt of the bundled world says of a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LABELS = Path(__file__).parent / "judge.json"


@dataclass(frozen=True)
class Claims:
    """What a prompt says; None or empty where it is silent."""

    objects: tuple[str, ...]
    relation: str | None
    colour: str | None
    style: str | None

    @property
    def placed(self) -> bool:
        """Is it known what should be seen where: one object, or two and how they stand?"""
        return len(self.objects) == (1 if self.relation is None else 2)


class Reader:
    """Finds the words of the bundled world in prompts. `labels` are those of judge.json."""

    def __init__(self, labels: Mapping[str, Any]) -> None:
        self.objects: list[str] = list(labels["objects"])
        self.colours: list[str] = list(labels["colours"])
        self.styles: list[str] = list(labels["styles"])
        self._nouns = {word: name for name, words in labels["objects"].items() for word in (name, *words)}
        self._styles = {word: name for name, words in labels["styles"].items() for word in (name, *words)}
        noun, style = _any_of(self._nouns), _any_of(self._styles)
        self._coloured = re.compile(rf"\borange\s+(?=({style}\s+)?{noun}\b)")
        self._relations = {word: name for name, words in labels["relations"].items() for word in words}

    def read(self, prompt: str) -> Claims:
        """Find the objects, their relation, the background colour and the style that a prompt names.

        What is named again counts once, but for two of a kind in a relation. Of more than two objects, which no picture
        shows, it takes the first two, and no relation.
        """
        text = prompt.lower()
        things = re.sub(r"\b[\w-]+\s+background\b", "background", text)  # an orange background is no orange,
        things = self._coloured.sub("", things)  # nor is an orange cat
        named = [self._nouns[word] for word in _mentions(things, self._nouns)]
        relations = [self._relations[word] for word in _mentions(text, self._relations)]
        objects = tuple(dict.fromkeys(named))
        if len(objects) == 1 and relations:
            objects = tuple(named)
        colours = re.findall(rf"\b({'|'.join(self.colours)})\s+background\b", text)
        styles = [self._styles[word] for word in _mentions(text, self._styles)]
        return Claims(
            objects=objects[:2],
            relation=relations[0] if relations and len(objects) == 2 else None,
            colour=colours[0] if colours else None,
            style=styles[0] if styles else None,
        )


def _mentions(text: str, words: Mapping[str, str]) -> list[str]:
    """The known words in the order of the text, the longest first where several fit."""
    return re.findall(rf"\b{_any_of(words)}\b", text)


def _any_of(words: Iterable[str]) -> str:
    """A group of a pattern: one of the words, the longest first where several fit."""
    return f"({'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})"


def load_labels() -> dict[str, Any]:
    """The words of the bundled world, and the sizes of the judge's heads."""
    labels: dict[str, Any] = json.loads(LABELS.read_text())
    return labels
