"""Synonyms and antonyms out of WordNet, from the files of its database (their format: wndb(5))."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ipgo.errors import InputError

FILES = {"a": "adj", "s": "adj", "n": "noun", "v": "verb", "r": "adv"}  # by part of speech
PARTS = ("adj", "noun", "verb", "adv")  # in the order in which words are looked up
PLACES = (  # where Debian's wordnet-base, WordNet itself and NLTK put it
    "/usr/share/wordnet",
    "/usr/local/WordNet-3.0/dict",
    "~/nltk_data/corpora/wordnet",
    "/usr/share/nltk_data/corpora/wordnet",
)
MOST = 5  # words in place of one


@dataclass(frozen=True)
class Synset:
    """A line of a data file: words of one meaning, and (sign, file, offset, from, to) where it points to others.

    `from` and `to` are numbers of words, from 1; 0 is the synset as a whole.
    """

    kind: str
    words: tuple[str, ...]
    pointers: tuple[tuple[str, str, int, int, int], ...]


class WordNet:
    """A folder with the files index.noun, data.noun and so on.

    Raises:
        InputError: there is none.
    """

    def __init__(self, folder: Path) -> None:
        names = [f"{kind}.{part}" for part in PARTS for kind in ("index", "data")]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise InputError(f"word_list: {str(folder)!r} is not WordNet's folder: it has no {missing[0]}")
        self.folder = folder

    @classmethod
    def found(cls) -> WordNet:
        """The one in a usual place."""
        for place in PLACES:
            folder = Path(place).expanduser()
            if (folder / "index.noun").is_file():
                return cls(folder)
        raise InputError(
            "word_list is 'wordnet', and WordNet is in none of its usual places; install it (Debian: wordnet-base), "
            "give its folder as 'wordnet:FOLDER', or choose 'general', negative words alone"
        )

    def synonyms(self, word: str) -> tuple[str, ...]:
        """Single words of the first meaning of `word`, as each part of speech."""
        first = [next(self._senses(word.lower(), part), None) for part in PARTS]
        return _plain(word, [each for synset in first if synset is not None for each in synset.words])

    def antonyms(self, word: str) -> tuple[str, ...]:
        """Single words opposite to the first meaning of `word` that has any, as each part of speech.

        An adjective without its own has those of the one that it is like ("huge" those of "large").
        """
        found: list[str] = []
        for part in PARTS:
            opposites = (self._opposites(word.lower(), synset) for synset in self._senses(word.lower(), part))
            found += next(filter(None, opposites), [])
        return _plain(word, found)

    def _opposites(self, word: str, synset: Synset) -> list[str]:
        names = [each.lower() for each in synset.words]
        number = names.index(word) + 1 if word in names else 0
        own = self._antonyms_of(synset, number)
        if own or synset.kind != "s":
            return own
        heads = [self._read(file, offset) for sign, file, offset, _, _ in synset.pointers if sign == "&"]
        return [each for head in heads for each in self._antonyms_of(head, 0)]

    def _antonyms_of(self, synset: Synset, number: int) -> list[str]:
        """Of a synset's word by its number, or of all of them."""
        return [
            self._read(file, offset).words[target - 1]
            for sign, file, offset, source, target in synset.pointers
            if sign == "!" and number in (0, source)
        ]

    def _senses(self, word: str, part: str) -> Iterator[Synset]:
        """The meanings of a word, the most frequent one first."""
        content = self._index[part]
        start = content.find(f"\n{word.replace(' ', '_')} ".encode())
        if start < 0:
            return
        line = content[start + 1 : content.find(b"\n", start + 1)].decode("utf-8").split()
        for offset in line[-int(line[2]) :]:
            yield self._read(part, int(offset))

    @cached_property
    def _index(self) -> dict[str, bytes]:
        return {part: (self.folder / f"index.{part}").read_bytes() for part in PARTS}

    def _read(self, part: str, offset: int) -> Synset:
        with (self.folder / f"data.{part}").open("rb") as stream:
            stream.seek(offset)
            fields = stream.readline().decode("utf-8").partition("|")[0].split()
        end = 4 + 2 * int(fields[3], 16)
        pointers = [fields[place : place + 4] for place in range(end + 1, end + 1 + 4 * int(fields[end]), 4)]
        return Synset(
            kind=fields[2],
            # Without the syntactic marker of an adjective, such as (p) for predicative.
            words=tuple(re.sub(r"\((?:a|p|ip)\)$", "", word) for word in fields[4:end:2]),
            pointers=tuple(
                (sign, FILES[kind], int(place), int(ends[:2], 16), int(ends[2:], 16))
                for sign, place, kind, ends in pointers
            ),
        )


def _plain(word: str, words: list[str]) -> tuple[str, ...]:
    """The different single words other than `word` itself, as many as are taken."""
    different = dict.fromkeys(each for each in words if "_" not in each and each.lower() != word.lower())
    return tuple(different)[:MOST]
