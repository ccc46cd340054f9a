"""Words that may replace others: the search space of a prompt and of its negative prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipgo.errors import InputError, unknown

WORD_LISTS = Path(__file__).parent / "word_lists"  # {name}.json
PARTS = ("synonyms", "antonyms", "negative")

Words = Mapping[str, tuple[str, ...]]
Choice = Sequence[int]


@dataclass(frozen=True)
class WordList:
    """Words or phrases, and what may stand in their place. Their keys are in lower case.

    Attributes:
        synonyms: what says the same, for the prompt.
        antonyms: what says the opposite, for the negative prompt of a prompt that holds the word.
        negative: places of any negative prompt, with the words that may stand in each.
    """

    synonyms: Words
    antonyms: Words
    negative: tuple[tuple[str, ...], ...]


def load_word_list(spec: str) -> WordList:
    """Read a bundled word list by its name, or a JSON file with at least one part of `WordList`.

    The file is an object such as {"synonyms": {"cat": ["kitten"]}, "antonyms": {"sharp": ["blurry", "noisy"]},
    "negative": [["blurry", "out of focus"], ["low quality"]]}.

    Raises:
        InputError: no such list or file, no JSON, an unknown part, or one of another shape.
    """
    names = sorted(path.stem for path in WORD_LISTS.glob("*.json"))
    path = WORD_LISTS / f"{spec}.json" if spec in names else Path(spec)
    if spec not in names and path.suffix != ".json":
        raise unknown("word_list", spec, [*names, "llm", "wordnet"])
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"word_list file {spec!r} does not exist") from None
    except (OSError, ValueError) as error:
        raise InputError(f"word_list file {spec!r} cannot be read: {error}") from None
    if not isinstance(content, dict) or not content:
        raise InputError(f"word_list file {spec!r} must hold an object with {', '.join(PARTS)}")
    for part in content:
        if part not in PARTS:
            raise unknown(f"part of word_list {spec!r}", part, PARTS)
    synonyms, antonyms = (_words(spec, part, content.get(part, {})) for part in PARTS[:2])
    negative = content.get("negative", [])
    if not isinstance(negative, list):
        raise InputError(f"word_list {spec!r}: negative must be a list of lists of words")
    return WordList(synonyms, antonyms, tuple(_texts(spec, "negative", each) for each in negative))


def _words(spec: str, part: str, content: Any) -> Words:
    if not isinstance(content, dict):
        raise InputError(f"word_list {spec!r}: {part} must be an object of words and lists of substitutes")
    return {key.lower(): _texts(spec, f"{part} of {key!r}", value) for key, value in content.items()}


def _texts(spec: str, what: str, content: Any) -> tuple[str, ...]:
    if not isinstance(content, list) or not all(isinstance(each, str) and each.strip() for each in content):
        raise InputError(f"word_list {spec!r}: {what} must be a list of words, none of them empty")
    return tuple(each.strip() for each in content)


@dataclass(frozen=True)
class Template:
    """A text with S slots: fixed[0] slot[0] fixed[1] slot[1] ... fixed[S].

    Attributes:
        fixed: what stands around the slots.
        slots: what may stand in each; the first option is what stands there at the start.
        listed: options are joined by commas; those that are empty leave no trace.
    """

    fixed: tuple[str, ...]
    slots: tuple[tuple[str, ...], ...] = ()
    listed: bool = False

    def pieces(self, choice: Choice) -> list[str]:
        """The 2 S + 1 pieces of the text: fixed, option, fixed, ..., fixed."""
        pieces = [self.fixed[0]]
        for slot, number, after in zip(self.slots, choice, self.fixed[1:], strict=True):
            option = slot[number]
            if self.listed and option and any(pieces):
                pieces[-1] += ", "
            pieces += [option, after]
        return pieces

    def text(self, choice: Choice) -> str:
        return "".join(self.pieces(choice))


PLAIN = Template(("",))  # stands for the user's own prompt, or the sampling's negative prompt


@dataclass(frozen=True)
class Space:
    """All that a row of a search may choose between: the slots of the prompt, then those of its negative prompt."""

    positive: Template = PLAIN
    negative: Template = PLAIN

    @property
    def slots(self) -> tuple[tuple[str, ...], ...]:
        return self.positive.slots + self.negative.slots

    def split(self, choice: Choice) -> tuple[Choice, Choice]:
        """What is chosen in the prompt, and in the negative prompt."""
        count = len(self.positive.slots)
        return choice[:count], choice[count:]

    def texts(self, choice: Choice) -> tuple[str, str]:
        """The prompt and the negative prompt."""
        positive, negative = self.split(choice)
        return self.positive.text(positive), self.negative.text(negative)


def synonym_slots(prompt: str, words: WordList) -> Template:
    """The prompt, with a slot at each word or phrase that has synonyms; the longest phrase comes first."""
    parts = _split(prompt, words.synonyms)
    found = (dict.fromkeys((word, *words.synonyms[word.lower()])) for word in parts[1::2])
    return Template(tuple(parts[::2]), tuple(tuple(slot) for slot in found))


def negative_slots(prompt: str, words: WordList, start: str) -> Template:
    """A negative prompt: `start`, a slot for each word of `prompt` with antonyms, and those of any prompt."""
    found = [words.antonyms[word.lower()] for word in _split(prompt, words.antonyms)[1::2]]
    slots = tuple(("", *options) for options in dict.fromkeys((*found, *words.negative)) if options)
    return Template((start, *[""] * len(slots)), slots, listed=True)


def _split(prompt: str, words: Words) -> list[str]:
    """Text, word, text, word, ..., text: the words are those of the list, whole and in any case."""
    if not words:
        return [prompt]
    longest_first = sorted(words, key=len, reverse=True)
    # Not the "s" of "dog's".
    pattern = rf"(?<!\w)(?<!\w['’])({'|'.join(map(re.escape, longest_first))})(?!\w)"
    parts = [""]
    for number, part in enumerate(re.split(pattern, prompt, flags=re.IGNORECASE)):
        if number % 2 and part.lower() in words:
            parts += [part, ""]
        else:  # text, or a word with such a letter as the dotless i, which `re` takes for an i and `lower` does not
            parts[-1] += part
    return parts
