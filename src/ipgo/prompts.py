"""Prompts: where they are read from, what is wrong with them, and the ids that name their folders."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ipgo.errors import InputError, unknown
from ipgo.prompt_sources import SOURCES

PROMPT_SETS = Path(__file__).parent / "prompt_sets"  # {name}.{half}.txt, one prompt a line
COMMON = ("n", "seed", "exclude")  # options that every source has
SLUG = 40  # characters of a folder's name
COLLECTIONS = {".json": ("coco",), ".parquet": ("diffusiondb", "pickapic")}  # of `SOURCES`, by their files
HALVES = ("train", "test")  # a set has one of them or both


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


def slug(text: str) -> str:
    """Lower-case ASCII words joined by hyphens, at most 40 characters; empty if there are none."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return "-".join(re.findall(r"[a-z0-9]+", ascii_text.lower()))[:SLUG].strip("-")


def check_prompts(texts: Sequence[str], *, distinct: bool = True) -> None:
    """Raise `InputError` if there is no prompt, an empty one, one that is not text, or (`distinct`) one twice."""
    if not texts:
        raise InputError("prompts is empty; give at least one prompt")
    seen: dict[str, int] = {}
    for position, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise InputError(f"prompt {position} is {text!r}; a prompt must be text")
        if not text.strip():
            raise InputError(f"prompt {position} is empty; every prompt needs at least one word")
        if not is_unicode(text):
            raise InputError(f"prompt {position} is {text!r}, which is not valid Unicode")
        same = " ".join(text.split())
        if distinct and same in seen:
            raise InputError(
                f"prompt {position} repeats prompt {seen[same]}: {text!r}; each may be given once"
            )
        seen[same] = position


def is_unicode(text: str) -> bool:
    """Can it be written down? What a terminal or a JSON escape gave may hold half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_prompts(spec: str) -> list[str]:
    """Read a bundled set, a published collection or a file, or some prompts of it.

    - `one`, `one:train`, `one:test`: a bundled set, or a half of it;
    - `coco:val2017`, `diffusiondb`, `pickapic:SPLIT` and their local copies: see `ipgo.prompt_sources`;
    - a .txt file has one prompt a line, a .csv file a column `prompt`, a .jsonl file strings or objects with a
      key `prompt`.

    `?n=300&seed=0` after any of them draws that many, the same on every machine, in the order of the source, and
    `?exclude=words.txt` first drops those that hold one of the words in that file. White space around prompts is
    dropped, and so are empty lines; of a collection, repetitions too.

    Raises:
        InputError: no such set or file, another kind of file, no prompts in it, a damaged line, or an option that
        is unknown, given twice or cannot be.
    """
    place, options = split_options(spec)
    name, _, rest = place.partition(":")
    source, known = SOURCES.get(name, (None, ()))
    for option in options:
        if option not in (*COMMON, *known):
            raise unknown(f"option of {place!r}", option, (*COMMON, *known))
    if source is not None:
        place = str(Path(rest).expanduser()) if rest.startswith("~") else rest
        prompts = [prompt for text in source(place, options) if (prompt := " ".join(text.split()))]
        prompts = list(dict.fromkeys(prompts))
    else:
        prompts = _read_file(place) if Path(place).suffix.lower() in READERS else _read_set(place)
    if "exclude" in options:
        prompts = _without(prompts, options["exclude"])
    return _some(spec, prompts, options)


def split_options(spec: str) -> tuple[str, dict[str, str]]:
    """`one:test?n=3&seed=1` to ("one:test", {"n": "3", "seed": "1"})."""
    place, mark, query = spec.rpartition("?")
    if not mark or "=" not in query:
        return spec, {}
    options: dict[str, str] = {}
    for part in query.split("&"):
        name, _, value = part.partition("=")
        if name in options:
            raise InputError(f"{name} is given twice in {spec!r}; give it once")
        options[name] = value
    return place, options


def _without(prompts: list[str], words: str) -> list[str]:
    """The prompts that hold none of the words or phrases in a .txt file, one a line; case does not matter."""
    if Path(words).suffix.lower() != ".txt":
        raise InputError(f"exclude is {words!r}; it must be a .txt file with one word a line")
    phrases = "|".join(re.escape(phrase) for phrase in _read_file(words))
    held = re.compile(rf"(?<!\w)({phrases})(?!\w)", re.IGNORECASE)
    kept = [prompt for prompt in prompts if not held.search(prompt)]
    if not kept:
        raise InputError(
            f"exclude is {words!r}; each of the {len(prompts)} prompts contains one of its words"
        )
    return kept


def _some(spec: str, prompts: list[str], options: Mapping[str, str]) -> list[str]:
    """The n prompts whose hash with the seed is least."""
    if not prompts:
        raise InputError(f"there is no prompt in {spec!r}")
    numbers = {"n": str(len(prompts)), "seed": "0", **options}
    for name, least in (("n", 1), ("seed", 0)):
        if not numbers[name].isdecimal() or int(numbers[name]) < least:
            raise InputError(
                f"{name} is {numbers[name]!r} in {spec!r}; it must be a whole number from {least}"
            )
    count = int(numbers["n"])
    if count > len(prompts):
        raise InputError(f"n is {count} in {spec!r}, which has {len(prompts)} prompts")
    if count == len(prompts):
        return prompts
    hashes = [
        hashlib.sha256(f"{numbers['seed']}:{prompt}".encode(errors="surrogatepass")).digest()
        for prompt in prompts
    ]
    chosen = sorted(range(len(prompts)), key=hashes.__getitem__)[:count]
    return [prompts[index] for index in sorted(chosen)]


def _read_file(spec: str) -> list[str]:
    path = Path(spec).expanduser()
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


def halves(name: str) -> dict[str, Path]:
    """The files of a bundled prompt set, by half."""
    files = {half: PROMPT_SETS / f"{name}.{half}.txt" for half in HALVES}
    return {half: file for half, file in files.items() if file.is_file()}


def _read_set(spec: str) -> list[str]:
    name, _, half = spec.partition(":")
    if name not in prompt_sets():
        kinds = ", ".join(READERS)
        if Path(spec).is_dir():
            raise InputError(f"prompts is {spec!r}, a folder; give a file that ends in {kinds}")
        collections = COLLECTIONS.get(Path(spec).suffix.lower())
        if collections is not None and (name == spec or Path(spec).is_file()):
            written = " or ".join(f"{each}:{spec}" for each in collections)
            raise InputError(
                f"prompts is {spec!r}, which does not say what collection it is of; write {written}"
            )
        sets = [*prompt_sets(), *SOURCES]
        raise InputError(f"{unknown('prompt set', name, sets)}; a file must end in {kinds}")
    files = halves(name)
    if half and half not in files:
        raise unknown(f"half of prompt set {name!r}", half, files)
    chosen = [files[half]] if half else files.values()
    return [line for file in chosen for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _read_lines(spec: str, text: str) -> list[str]:
    return text.split("\n")  # other separators, such as U+2028, may stand within a prompt


def _read_csv(spec: str, text: str) -> list[str]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)  # a quoted prompt may hold line breaks
    try:
        if "prompt" not in (rows.fieldnames or ()):
            raise InputError(
                f"prompt file {spec!r} has columns {rows.fieldnames}; one must be called 'prompt'"
            )
        return [row["prompt"] or "" for row in rows]
    except csv.Error as error:
        raise InputError(
            f"prompt file {spec!r} line {rows.reader.line_num} cannot be read: {error}"
        ) from None


def _read_jsonl(spec: str, text: str) -> list[str]:
    prompts = []
    for position, line in enumerate(_read_lines(spec, text), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            prompt = value if isinstance(value, str) else value["prompt"]
            prompts.append(prompt.strip())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(
                f"prompt file {spec!r} line {position} is neither a JSON string nor an object with 'prompt'"
            ) from None
    return prompts


NEAR = 0.75  # share of letters, as difflib counts: of "lemmon" and "lemon" it is 0.91, of "wizard" and "award" 0.73
READERS = {".txt": _read_lines, ".csv": _read_csv, ".jsonl": _read_jsonl}


def unseen_words(texts: Iterable[str], known: Iterable[str]) -> dict[str, str | None]:
    """The words in `texts` that a model's vocabulary lacks, each with the nearest word that it has, if one is near.

    Of three letters and fewer there is none: "at" is no misspelt "cat".
    """
    vocabulary = {word.lower() for word in known}
    # A text without any, such as of emoji, is a word itself.
    found = (re.findall(r"[^\W_]+", text.lower()) or [text.strip()] for text in texts)
    words = dict.fromkeys(word for each in found for word in each)
    unseen = [word for word in words if word not in vocabulary]
    near = {word: difflib.get_close_matches(word, sorted(vocabulary), n=1, cutoff=NEAR) for word in unseen}
    return {word: found[0] if found and len(word) > 3 else None for word, found in near.items()}
