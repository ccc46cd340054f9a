"""Prompts: where they are read from, what is wrong with them, and the ids that name their folders."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ipgo.errors import InputError, unknown

PROMPT_SETS = Path(__file__).parent / "prompt_sets"  # {name}.{half}.txt, one prompt a line
HALVES = ("train", "test")


@dataclass(frozen=True)
class Prompt:
    """A prompt of a run: its text, and the name of its folder such as `0007-a-red-cat-3f2a91c0`."""

    id: str
    text: str


def number(texts: Sequence[str]) -> tuple[Prompt, ...]:
    """Give every prompt its id: position, readable words, and eight digits of the text's hash."""
    prompts = []
    for index, text in enumerate(texts):
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        words = slug(text)
        prompts.append(Prompt(f"{index:04d}-{words}-{digest}" if words else f"{index:04d}-{digest}", text))
    return tuple(prompts)


def slug(text: str, limit: int = 40) -> str:
    """Lower-case ASCII words joined by hyphens, at most `limit` characters; empty if there are none."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return "-".join(re.findall(r"[a-z0-9]+", ascii_text.lower()))[:limit].strip("-")


def check_prompts(texts: Sequence[str]) -> None:
    """Raise `InputError` if there is no prompt, an empty one, or the same one twice."""
    if not texts:
        raise InputError("prompts is empty; give at least one prompt")
    seen: dict[str, int] = {}
    for position, text in enumerate(texts, 1):
        if not text.strip():
            raise InputError(f"prompt {position} is empty; every prompt needs at least one word")
        if text in seen:
            raise InputError(
                f"prompt {position} repeats prompt {seen[text]}: {text!r}; each may be given once"
            )
        seen[text] = position


def read_prompts(spec: str) -> list[str]:
    """Read a bundled set (`one`, `one:train`, `one:test`) or a .txt, .csv or .jsonl file.

    A .txt file has one prompt a line, a .csv file a column `prompt`, a .jsonl file strings or objects with a
    key `prompt`. White space around prompts and empty lines are dropped.

    Raises:
        InputError: no such set or file, another kind of file, no prompts in it, or a damaged line.
    """
    path = Path(spec)
    if path.suffix.lower() not in READERS:
        return _read_set(spec)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"prompt file {spec!r} does not exist") from None
    except UnicodeDecodeError:
        raise InputError(f"prompt file {spec!r} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"prompt file {spec!r} cannot be read: {error.strerror}") from None
    prompts = [prompt.strip() for prompt in READERS[path.suffix.lower()](spec, text) if prompt.strip()]
    if not prompts:
        raise InputError(f"prompt file {spec!r} is empty; it needs at least one prompt")
    return prompts


def prompt_sets() -> list[str]:
    """The names of the bundled prompt sets."""
    return sorted({path.name.split(".")[0] for path in PROMPT_SETS.glob("*.txt")})


def _read_set(spec: str) -> list[str]:
    name, _, half = spec.partition(":")
    if name not in prompt_sets():
        kinds = ", ".join(READERS)
        raise InputError(f"{unknown('prompt set', name, prompt_sets())}; a file must end in {kinds}")
    if half and half not in HALVES:
        raise unknown(f"half of prompt set {name!r}", half, HALVES)
    files = [PROMPT_SETS / f"{name}.{each}.txt" for each in ([half] if half else HALVES)]
    return [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _read_lines(spec: str, text: str) -> list[str]:
    return text.splitlines()


def _read_csv(spec: str, text: str) -> list[str]:
    rows = csv.DictReader(text.splitlines())
    if "prompt" not in (rows.fieldnames or ()):
        raise InputError(f"prompt file {spec!r} has columns {rows.fieldnames}; one must be called 'prompt'")
    return [row["prompt"] or "" for row in rows]


def _read_jsonl(spec: str, text: str) -> list[str]:
    prompts = []
    for position, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            prompts.append(value if isinstance(value, str) else value["prompt"])
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"prompt file {spec!r} line {position} is neither a JSON string nor an object with 'prompt'"
            ) from None
    return prompts


READERS = {".txt": _read_lines, ".csv": _read_csv, ".jsonl": _read_jsonl}


def unseen_words(texts: Iterable[str], known: Iterable[str]) -> dict[str, str | None]:
    """The words in `texts` that a model's vocabulary lacks, each with the nearest word that it has."""
    vocabulary = {word.lower() for word in known}
    words = dict.fromkeys(word for text in texts for word in re.findall(r"[a-z0-9]+", text.lower()))
    unseen = [word for word in words if word not in vocabulary]
    nearest = {word: difflib.get_close_matches(word, sorted(vocabulary), n=1) for word in unseen}
    return {word: near[0] if near else None for word, near in nearest.items()}
