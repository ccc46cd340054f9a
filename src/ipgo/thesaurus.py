"""The word list for a prompt: a bundled one or a file, out of WordNet, or as a chat model answers."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from ipgo.chat import Chat
from ipgo.substitution import WordList, Words, load_word_list
from ipgo.wordnet import MOST, WordNet

WORDNET, LLM = "wordnet", "llm"
GENERAL = "general"  # the bundled list whose negative words go with both
INSTRUCTION = (
    "You are given a prompt for a text-to-image model. For each of its words that has {kind}, name up to "
    f"{MOST} of these, single words alone, in a line of the form: word -> first, second, third. "
    "Answer with these lines and nothing else."
)
SYNONYMS = INSTRUCTION.format(kind="others of the same meaning")
ANTONYMS = INSTRUCTION.format(kind="others of the opposite meaning")
LINE = re.compile(r"^[\W_]*(?:\d+[.):])?[\W_]*(\w[\w' -]*?)[\W_]*(?:->|→|=>)\s*(.+)$")
# Words that say little of a picture, and that WordNet takes for others ("in": the inch).
SMALL = (
    "a an the and or of in on at to by as for from with without into onto over under near next its his her their our "
    "this that these those is are was be being has have no not it he she they you we i some any all each very"
)
logger = logging.getLogger("ipgo")


def word_list_of(spec: str, prompt: str, chat: Chat, *, synonyms: bool, antonyms: bool) -> WordList:
    """What may replace the words of one prompt.

    Args:
        spec: what `load_word_list` reads; "wordnet", or "wordnet:FOLDER" with its database; or "llm", which asks
            `chat`. These two look up single words of the prompt, and `synonyms` and `antonyms` say what for.

    Raises:
        InputError: no such list, no WordNet, or no answer.
    """
    if spec == LLM:
        general = load_word_list(GENERAL)
        found = _answers(SYNONYMS, prompt, chat) if synonyms else {}
        return WordList(found, _answers(ANTONYMS, prompt, chat) if antonyms else {}, general.negative)
    if _in_wordnet(spec):
        net, words = _wordnet(spec), words_of(prompt)
        found = {word: net.synonyms(word) for word in words} if synonyms else {}
        others = {word: net.antonyms(word) for word in words} if antonyms else {}
        return WordList(_filled(found), _filled(others), load_word_list(GENERAL).negative)
    return load_word_list(spec)


def check_word_list(spec: str, prompts: Sequence[str], chat: Chat, *, synonyms: bool, antonyms: bool) -> None:
    """Raise at once what `word_list_of` would raise for want of a list, WordNet, a key or the openai package."""
    if spec == LLM:
        for prompt in prompts:
            if synonyms:
                chat.check(SYNONYMS, prompt)
            if antonyms:
                chat.check(ANTONYMS, prompt)
    elif _in_wordnet(spec):
        _wordnet(spec)
    else:
        load_word_list(spec)


def words_of(prompt: str) -> list[str]:
    """Its different words in small letters, but for the smallest."""
    # Neither part of "don't" is a word, nor the last of "dog's".
    pattern = r"(?<!\w)(?<!\w['’])[^\W\d_]+(?:-[^\W\d_]+)*(?!\w)(?!['’]t(?!\w))"
    found = dict.fromkeys(re.findall(pattern, prompt.lower()))
    return [word for word in found if word not in SMALL.split()]


def _in_wordnet(spec: str) -> bool:
    return spec == WORDNET or spec.startswith(f"{WORDNET}:")


@lru_cache(maxsize=4)
def _wordnet(spec: str) -> WordNet:
    folder = spec.partition(":")[2]
    return WordNet(Path(folder)) if folder else WordNet.found()


def _filled(words: Words) -> Words:
    return {word: others for word, others in words.items() if others}


def _answers(instruction: str, prompt: str, chat: Chat) -> Words:
    """A chat model's answer about a prompt; what is not about its words, or not single words, is left out."""
    found = parse_lines(chat.ask(instruction, prompt), words_of(prompt))
    if not found:
        logger.warning("chat.model %r named no words for %r", chat.model, prompt)
    return found


def parse_lines(answer: str, words: Sequence[str]) -> Words:
    """{"red": ("scarlet", "crimson")} of lines such as "1. red -> scarlet, crimson", for these words alone."""
    found: dict[str, tuple[str, ...]] = {}
    for line in answer.splitlines():
        read = LINE.match(line.strip())
        if read is None or read[1].lower() not in words:
            continue
        word = read[1].lower()
        others = [each.strip(" \t.*`'\"“”‘’") for each in re.split(r"[,;/|]", read[2])]
        single = [
            each
            for each in others
            if re.fullmatch(r"[^\W\d_]+(?:-[^\W\d_]+)*", each) and each.lower() != word
        ]
        if single:
            found[word] = tuple(dict.fromkeys((*found.get(word, ()), *single)))[:MOST]
    return found
