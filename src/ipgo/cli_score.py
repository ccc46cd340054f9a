"""`ipgo score`: score existing image files by any rewards."""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import os
import re
import sys
import time
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ipgo import files
from ipgo.errors import InputError, IpgoError
from ipgo.prompts import check_prompts
from ipgo.terminal import EVERY, check_replaced, command_parser, loading, path_of

if TYPE_CHECKING:
    import torch

    from ipgo.rewards import Reward

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Of other images, which are left out.
OTHERS = (
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".heif",
    ".jfif",
    ".jxl",
    ".jp2",
    ".tga",
    ".psd",
    ".exr",
    ".svg",
)
Identities = Mapping[str, Mapping[str, Any]]
Turn = list[tuple[bool, int, str]]  # what a name is sorted by
IDENTITIES = ".rewards.json"  # of the file beside a table
BATCH = 16  # most images of one size that are scored at once ...
PIXELS = 4_000_000  # ... and most pixels of several: rewards take some hundred bytes for each


def score(argv: list[str]) -> int:
    """`ipgo score`: a line per image, and the means."""
    args = _parser().parse_args(argv)

    from ipgo.devices import choose_device
    from ipgo.rewards import check_reward, identity_of, load_reward, needs_prompts

    _check_out(args.out)
    images = find_images(args.images)
    prompts = match_prompts(images, args.prompts, args.prompt)
    lacking = (
        []
        if prompts is None
        else [file for file, text in zip(images, prompts, strict=True) if not text.strip()]
    )
    if lacking:
        raise InputError(f"the prompt of image {str(lacking[0])!r} is empty; it needs at least one word")
    check_prompts(prompts or ["-"], distinct=False)
    blind = [spec for spec in args.reward if prompts is None and needs_prompts(spec)]
    if blind:
        raise InputError(f"reward {blind[0]!r} may look at prompts; give --prompts or --prompt")
    for spec in args.reward:
        check_reward(spec, prompts or ())
    device = choose_device(args.device)
    for file in tqdm(images, "checking", unit="image", disable=None, leave=False):
        _check_image(file)
    loading(", ".join(args.reward))
    rewards = {spec: load_reward(spec, device=args.device) for spec in args.reward}
    identities = {spec: identity_of(reward) for spec, reward in rewards.items()}
    done: list[dict[str, Any]] = []
    kept = time.monotonic()
    try:
        for row in score_images(images, prompts or [""] * len(images), rewards, device):
            done.append(row)
            if args.out is None:
                _print(row, identities, head=len(done) == 1)
            elif time.monotonic() - kept > EVERY:  # for a process that is ended without a word
                _put_out(args.out, done, identities)
                kept = time.monotonic()
    finally:  # a reward that fails, or Ctrl-C, takes nothing away
        if done:
            if args.out is not None:
                _put_out(args.out, done, identities)
            means = _means(done, identities)
            place = sys.stderr if args.out is None else sys.stdout  # the table itself is on stdout
            for spec, mean in means.items():
                print(f"{spec}: {mean:.4f}, the mean of {len(done)}", file=place)
            if args.out is not None:
                print(args.out)
    return 0


def _parser() -> ArgumentParser:
    parser = command_parser("score", "Score existing image files by one or more rewards.")
    parser.add_argument(
        "images", nargs="+", type=path_of, help="image files, and folders of them with all that is below"
    )
    parser.add_argument("--reward", nargs="+", required=True, help="rewards, as in fit")
    parser.add_argument(
        "--prompts",
        help="a file with one prompt per image, in the order given (a folder's by name, 2.png before 10.png), or a "
        ".csv or .jsonl file with columns file and prompt",
    )
    parser.add_argument("--prompt", help="one prompt for all images")
    parser.add_argument("--out", type=path_of, help="a .csv or .json file (default: the terminal)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def _print(row: dict[str, Any], identities: Identities, *, head: bool) -> None:
    """A line of the table, after its head if it is the first."""
    lines = as_csv(with_fingerprints([row], identities)).split("\n", 1)
    tqdm.write("\n".join(lines if head else lines[1:]).rstrip("\n"), file=sys.stdout)


def _means(rows: Sequence[dict[str, Any]], specs: Iterable[str]) -> dict[str, float]:
    return {spec: sum(row[spec] for row in rows) / len(rows) for spec in specs}


def _put_out(out: Path, rows: Sequence[dict[str, Any]], identities: Identities) -> None:
    """Write the scores so far."""
    table = as_csv(with_fingerprints(rows, identities))
    if out.suffix == ".csv":
        # First: the table has their digits alone.
        files.write_json(out.with_suffix(IDENTITIES), {"rewards": identities})
        files.write(out, table.encode())
    else:
        files.write_json(out, {"rewards": identities, "means": _means(rows, identities), "images": rows})


def _check_out(out: Path | None) -> None:
    """Raise `InputError` for a file that could not be written."""
    if out is None:
        return
    if out.suffix not in (".csv", ".json"):
        raise InputError(f"out is {str(out)!r}; it must end in .csv or .json")
    files.check_out(out, folder=False)
    check_replaced(out, "images" if out.suffix == ".json" else " fingerprint")
    if out.suffix == ".csv":
        check_replaced(out.with_suffix(IDENTITIES), "rewards")


def _check_image(file: Path) -> None:
    """Raise `InputError` for a file that is not an image or is cut off."""
    from PIL import Image

    from ipgo.images import check_range, reading

    with reading(file), Image.open(file) as image:
        check_range(image)
        image.load()  # all of it: `verify` does not notice where a JPEG breaks off


def find_images(places: Sequence[Path]) -> list[Path]:
    """The files, and the images in the folders and all below them (but for hidden ones).

    A folder's own come before those of the folders in it, each in the order of the names, 2.png before 10.png.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            below = [each for each in place.rglob("*") if not _is_hidden(each.relative_to(place))]
            for folder in dict.fromkeys((place, *(each.parent for each in below))):
                if (folder / "run.json").is_file() or (folder / "plan.json").is_file():
                    raise InputError(
                        f"{str(folder)!r} is a run's folder; give the folders of its images, or use `ipgo evaluate`"
                    )
            inside = [each for each in below if each.suffix.lower() in SUFFIXES and each.is_file()]
            if not inside:
                raise InputError(f"folder {str(place)!r} has no image file ({', '.join(SUFFIXES)})")
            _warn_of_others(place, below)
            found += sorted(inside, key=lambda file: _in_turn(file.relative_to(place)))
        elif place.suffix.lower() in SUFFIXES and place.is_file():
            found.append(place)
        else:
            raise InputError(f"{str(place)!r} is neither a folder nor an image file ({', '.join(SUFFIXES)})")
    return list({file.resolve(): file for file in reversed(found)}.values())[::-1]  # each once


def _warn_of_others(folder: Path, files: Sequence[Path]) -> None:
    kinds = [kind for file in files if (kind := file.suffix.lower()) in OTHERS and file.is_file()]
    if kinds:
        logging.getLogger("ipgo").warning(
            "images of folder %r are left out: %d of another kind (%s) than %s",
            *(str(folder), len(kinds), ", ".join(sorted(set(kinds))), ", ".join(SUFFIXES)),
        )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _in_turn(path: Path) -> tuple[list[Turn], Turn]:
    """What puts a.png before b/a.png, and 2.png before 10.png: numbers in names count as such, as in most programs
    that show folders.
    """

    def turn(name: str) -> Turn:
        parts = re.findall(r"\d+|\D+", name)
        return [(False, int(part), part) if part.isdecimal() else (True, 0, part) for part in parts]

    return [turn(name) for name in path.parent.parts], turn(path.name)


def match_prompts(images: Sequence[Path], spec: str | None, single: str | None) -> list[str] | None:
    """A prompt for each image, or None."""
    from ipgo.prompts import read_prompts

    if spec is not None and single is not None:
        raise InputError("prompts and prompt are both given; give one of them")
    if single is not None:
        return [single] * len(images)
    if spec is None:
        return None
    readers = {".csv": _table, ".jsonl": _objects}
    reader = readers.get(Path(spec).suffix.lower())
    table = reader(Path(spec)) if reader is not None and Path(spec).is_file() else None
    if table is not None:
        return _matched(images, table, spec)
    prompts = read_prompts(spec)
    if len(prompts) != len(images):
        raise InputError(f"prompts has {len(prompts)} lines for {len(images)} images; give one for each")
    return prompts


def _table(path: Path) -> list[tuple[Path, str]] | None:
    """The lines of a table with columns file and prompt; None for another table."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines, strict=True)
            if not {"file", "prompt"} <= set(rows.fieldnames or ()):
                return None
            return [(Path(row["file"] or ""), row["prompt"] or "") for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"prompt file {str(path)!r} cannot be read: {error}") from None


def _objects(path: Path) -> list[tuple[Path, str]] | None:
    """Likewise the objects of a .jsonl file, if all have a file and a prompt."""
    try:
        written = enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1)
        lines = {number: json.loads(line) for number, line in written if line.strip()}
    except (OSError, ValueError):  # said by whoever reads it as prompts alone
        return None
    if not all(isinstance(line, dict) and {"file", "prompt"} <= line.keys() for line in lines.values()):
        return None
    for number, line in lines.items():
        for key in ("file", "prompt"):
            if not isinstance(line[key], str):
                raise InputError(
                    f"prompt file {str(path)!r} line {number}: {key} is {line[key]!r}; it must be a text"
                )
    return [(Path(line["file"]), line["prompt"]) for line in lines.values()]


def _matched(images: Sequence[Path], lines: Sequence[tuple[Path, str]], spec: str) -> list[str]:
    """For each image the prompt of the line whose file shares most with its path, seen from the end.

    A line of which another image's path shares more is that image's.
    """
    paths = [image.resolve() for image in images]
    ends_of_paths = {end for path in paths for end in _ends(path)}
    by_end: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, (file, _) in enumerate(lines):
        for end in _ends(file):
            by_end[end].append(number)
    # How much of each line's file some image shares.
    most = [max((len(end) for end in _ends(file) if end in ends_of_paths), default=0) for file, _ in lines]
    found = []
    for image, path in zip(images, paths, strict=True):
        longest = max((end for end in _ends(path) if end in by_end), key=len, default=())
        if not longest:
            raise InputError(f"prompt file {spec!r} has no line for image {image.name!r}")
        if all(most[number] > len(longest) for number in by_end[longest]):
            raise InputError(f"prompt file {spec!r} has no line for image {str(image)!r}")
        best = {lines[number][1] for number in by_end[longest]}
        if len(best) > 1:
            raise InputError(
                f"prompt file {spec!r} has several prompts for image {str(image)!r}; "
                "name its files with enough of their folders"
            )
        found.append(best.pop())
    spare = [str(file) for (file, _), shared in zip(lines, most, strict=True) if not shared]
    if spare:
        text = "prompt file %r has lines of no image here: %d, such as %r"
        logging.getLogger("ipgo").warning(text, spec, len(spare), spare[0])
    return found


def _ends(path: Path) -> Iterator[tuple[str, ...]]:
    """The last part of a path, the last two, and so on."""
    parts = path.parts[::-1]
    return (parts[: count + 1] for count in range(len(parts)))


def score_images(
    images: Sequence[Path], prompts: Sequence[str], rewards: dict[str, Reward], device: torch.device
) -> Iterator[dict[str, Any]]:
    """{"file", "prompt", reward: score, ...} for each image, which is put on `device` as in a fit."""
    import torch
    from PIL import Image

    from ipgo.images import from_pil, reading
    from ipgo.rewards import parts, score_each
    from ipgo.rewards.spec import EXTERNAL

    def opened() -> Iterator[tuple[Path, str, torch.Tensor]]:
        for file, prompt in zip(images, prompts, strict=True):
            with reading(file), Image.open(file) as image:
                pixels = from_pil(image)
            yield file, prompt, pixels

    def scored(part: Sequence[tuple[Path, str, torch.Tensor]]) -> Iterator[dict[str, Any]]:
        names, texts, pixels = zip(*part, strict=True)
        try:
            with torch.no_grad():
                found = score_each(rewards, torch.stack(pixels).to(device), texts)
        except IpgoError as error:
            if len(part) == 1:
                raise type(error)(f"{error} (image {str(names[0])!r})") from error
            for each in part:  # to know which it is, and to lose none of the others
                yield from scored([each])
            return
        columns = {spec: values.tolist() for spec, values in found.items()}
        for row, (name, text) in enumerate(zip(names, texts, strict=True)):
            values = {spec: column[row] for spec, column in columns.items()}
            # A name that is not UTF-8 could not be written into a table.
            yield {"file": os.fsencode(name).decode(errors="replace"), "prompt": text, **values}
            bar.update()

    # A command or a person is asked about one at a time anyway, and not twice about any.
    names = [part.name for reward in rewards.values() for part in parts(reward)]
    most = 1 if any(name.startswith(tuple(EXTERNAL)) for name in names) else BATCH
    with tqdm(total=len(images), desc="scoring", unit="image", disable=None, leave=False) as bar:
        for shape, alike in itertools.groupby(opened(), key=lambda each: each[2].shape):
            for part in _batched(alike, max(1, min(most, PIXELS // shape[-2:].numel()))):
                yield from scored(part)


def _batched(rows: Iterator[Any], size: int) -> Iterator[tuple[Any, ...]]:
    while part := tuple(itertools.islice(rows, size)):
        yield part


def with_fingerprints(
    rows: Sequence[dict[str, Any]], identities: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The rows, with its reward's fingerprint beside each score: scores of other fingerprints are not comparable."""
    from ipgo.rewards.checkpoints import fingerprint

    digits = {f"{spec} fingerprint": fingerprint(identity) for spec, identity in identities.items()}
    return [{**row, **digits} for row in rows]


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """A table with a header."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
