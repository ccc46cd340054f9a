"""Prompts of the published collections: MS-COCO, DiffusionDB and Pick-a-Pic, from the hub or from local copies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ipgo import hub
from ipgo.errors import InputError, MissingExtraError, first_line, unknown

Options = Mapping[str, str]

# Subsets by the names of COCO's categories and supercategories (things in instances_*.json, stuff in stuff_*.json).
# They are the IPGO paper's five; what belongs to each is our reading, since the paper only names them.
SUBSETS = {
    "person": ("person",),
    "room": ("furniture", "appliance", "indoor"),
    "vehicles": ("vehicle",),
    "natural_scenes": ("mountain", "hill", "sea", "river", "snow", "sand", "rock"),
    "buildings": ("building",),
}
COCO_FILES = "https://cocodataset.org (annotations_trainval2017.zip, stuff_annotations_trainval2017.zip)"
COCO_HUB = "phiyodr/coco2017"  # captions alone, by image
COCO_SPLITS = {"val2017": "validation", "train2017": "train"}  # ours -> the hub's
DIFFUSIONDB = ("poloclub/diffusiondb", "metadata.parquet")  # hub dataset and file: 2 million rows, 200 MB
PICK_A_PIC = "yuvalkirstain/pickapic_v1_no_images"
PICK_A_PIC_SPLITS = ("train", "validation", "test", "validation_unique", "test_unique")


def coco(place: str, options: Options) -> list[str]:
    """One caption for each image, that with the lowest id; `category` keeps images that show one of its names.

    Args:
        place: captions_val2017.json, or the folder that holds it; the files of categories lie beside it. Or val2017
            or train2017, where no folder of that name has captions: those on the hub, which know no categories.
    """
    split = place if place in COCO_SPLITS else "val2017"
    file = Path(place) if place.endswith(".json") else Path(place) / f"captions_{split}.json"
    if place in COCO_SPLITS and not file.is_file():  # a folder of that name has COCO's pictures, as a rule
        return _coco_of_the_hub(place, options)
    if not place or not file.is_file():
        raise InputError(
            f"COCO captions {str(file)!r} do not exist; download them from {COCO_FILES} and give their place, "
            "as in coco:annotations/captions_val2017.json, or take those of the hub with coco:val2017"
        )
    captions: dict[int, tuple[int, str]] = {}
    for each in _listed(file, "annotations", "image_id", "id", "caption"):
        numbers = all(isinstance(each[key], int) for key in ("image_id", "id"))
        if not numbers or not isinstance(each["caption"], str):
            raise InputError(
                f"{str(file)!r} is not a COCO file: caption {each['id']!r} is {each['caption']!r}"
            )
        own = (each["id"], each["caption"])
        captions[each["image_id"]] = min(own, captions.get(each["image_id"], own))
    if "category" in options:
        shown = _images_of(file, options["category"].split(","))
        captions = {image: own for image, own in captions.items() if image in shown}
    return [captions[image][1] for image in sorted(captions)]


def _coco_of_the_hub(split: str, options: Options) -> list[str]:
    """One caption for each image of a split."""
    if "category" in options:
        raise InputError(
            f"coco:{split} has captions alone, so category needs a local copy; download it from {COCO_FILES} and "
            f"give its place, as in coco:annotations/captions_{split}.json?category={options['category']}"
        )
    local = f"coco:PATH/captions_{split}.json"
    rows = _hub_columns(COCO_HUB, COCO_SPLITS[split], ("image_id", "ids", "captions"), f"coco:{split}", local)
    own = {image: min(zip(numbers, texts, strict=True))[1] for image, numbers, texts in rows}
    return [own[image] for image in sorted(own)]


def _listed(file: Path, name: str, *keys: str) -> list[dict[str, Any]]:
    """The list of objects that a COCO file has under a name."""
    found = _read(file).get(name)
    if not isinstance(found, list) or not all(
        isinstance(each, dict) and set(keys) <= each.keys() for each in found
    ):
        raise InputError(f"{str(file)!r} is not a COCO file: its {name} need {', '.join(keys)}")
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(file)!r} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{str(file)!r} is not a COCO file: it must hold an object")
    return content


def _images_of(captions: Path, names: list[str]) -> set[int]:
    """The images that show a category or supercategory of these names."""
    wanted = {part for name in names for part in SUBSETS.get(name, (name,))}
    images, known = set(), set[str]()
    files = [captions.with_name(captions.name.replace("captions", kind)) for kind in ("instances", "stuff")]
    for file in files:
        if not file.is_file():
            continue
        categories = _listed(file, "categories", "id", "name", "supercategory")
        kinds = {each["id"]: {each["name"], each["supercategory"]} for each in categories}
        known |= {name for kind in kinds.values() for name in kind}
        own = {number for number, kind in kinds.items() if kind & wanted}
        annotations = _listed(file, "annotations", "image_id", "category_id")
        images |= {each["image_id"] for each in annotations if each["category_id"] in own}
    missing = sorted(wanted - known)
    if missing:
        absent = ", ".join(file.name for file in files if not file.is_file())
        hint = f"; {absent} is not beside the captions ({COCO_FILES})" if absent else ""
        others = (known | set(SUBSETS)) - set(missing)
        raise InputError(f"{unknown('COCO category', missing[0], others)}{hint}")
    return images


def diffusiondb(place: str, options: Options) -> list[str]:
    """The prompts of its metadata table; `max_nsfw` drops those whose published `prompt_nsfw` is above it.

    Args:
        place: metadata.parquet, or the folder that holds it; or empty for the hub's.
    """
    try:
        limit = float(options.get("max_nsfw", 1))
    except ValueError:
        limit = -1
    if not 0 <= limit <= 1:
        raise InputError(f"max_nsfw is {options['max_nsfw']!r}; it must be a number from 0 to 1")
    if place and Path(place).is_dir():
        place = str(Path(place) / DIFFUSIONDB[1])
        if not Path(place).is_file():
            raise InputError(
                f"DiffusionDB's table {place!r} does not exist; give the file, as in diffusiondb:FILE.parquet"
            )
    file = place or _download(*DIFFUSIONDB, "diffusiondb:PATH/metadata.parquet")
    if "max_nsfw" not in options:
        return [row["prompt"] for row in _rows(file, "prompt")]
    rows = _rows(file, "prompt", "prompt_nsfw", numbers=("prompt_nsfw",))
    return [row["prompt"] for row in rows if row["prompt_nsfw"] <= limit]


def pick_a_pic(place: str, options: Options) -> list[str]:
    """The captions of a parquet file of Pick-a-Pic v1, of a folder of them, or of a split of it on the hub."""
    if place.endswith(".parquet"):
        return [row["caption"] for row in _rows(place, "caption")]
    if Path(place).is_dir() and place:
        shards = sorted(Path(place).glob("*.parquet"))
        if shards:
            return [row["caption"] for shard in shards for row in _rows(str(shard), "caption")]
        if place not in PICK_A_PIC_SPLITS:  # which a folder may be called by chance
            raise InputError(f"folder {place!r} has no .parquet file")
    split = place or "validation_unique"
    if split not in PICK_A_PIC_SPLITS:
        raise unknown("split of Pick-a-Pic", split, (*PICK_A_PIC_SPLITS, "FILE.parquet", "FOLDER"))
    local = "pickapic:PATH/FILE.parquet"
    return [
        caption for (caption,) in _hub_columns(PICK_A_PIC, split, ("caption",), f"pickapic:{split}", local)
    ]


def _hub_columns(
    repository: str, split: str, columns: tuple[str, ...], spec: str, local: str
) -> Iterator[tuple[Any, ...]]:
    """The rows of a hub dataset that lack none of these columns; `local` is how a copy is given."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtraError(f'{spec} needs the datasets package: pip install "ipgo[data]"') from None
    try:
        with hub.within_reach(repository):
            found = load_dataset(repository, split=split)
    except Exception as error:  # its libraries say in many ways that the network fails
        raise _offline(repository, local, error) from error
    missing = [name for name in columns if name not in found.column_names]
    if missing:
        raise InputError(
            f"{repository!r} on the hub has no column {missing[0]!r}; give a local copy as {local}"
        )
    return (row for row in zip(*(found[name] for name in columns), strict=True) if None not in row)


def _download(repository: str, file: str, local: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        with hub.within_reach(repository):
            return str(hf_hub_download(repository, file, repo_type="dataset"))
    except Exception as error:  # as above
        raise _offline(f"{repository}/{file}", local, error) from error


def _offline(what: str, local: str, error: Exception) -> InputError:
    return InputError(
        f"cannot read {what!r} from the hub ({first_line(error)}); give a local copy as {local}"
    )


def _rows(file: str, *columns: str, numbers: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file that lack none of the columns, read in batches: some have millions.

    Columns hold texts, but for `numbers`.
    """
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise MissingExtraError('parquet files need the pyarrow package: pip install "ipgo[data]"') from None
    try:
        table = parquet.ParquetFile(file)
        for batch in table.iter_batches(columns=list(columns)):
            if list(batch.schema.names) != list(columns):
                missing = next(name for name in columns if name not in batch.schema.names)
                raise InputError(f"{file!r} has no column {missing!r}")
            for name in columns:
                wanted = "numbers" if name in numbers else "texts"
                if _holds(batch.schema.field(name).type) not in (wanted, None):
                    raise InputError(f"{file!r} has a column {name!r} that does not hold {wanted}")
            yield from (row for row in batch.to_pylist() if None not in row.values())
    except (OSError, ArrowInvalid) as error:
        raise InputError(f"parquet file {file!r} cannot be read: {error}") from None


def _holds(kind: Any) -> str | None:
    """What a column of this type of pyarrow holds; None if nothing."""
    from pyarrow import types

    own = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_null(own):
        return None
    if types.is_string(own) or types.is_large_string(own) or types.is_string_view(own):
        return "texts"
    return "numbers" if types.is_floating(own) or types.is_integer(own) else str(own)


# name -> how it is read, and the options that it knows besides n and seed
SOURCES: dict[str, tuple[Callable[[str, Options], list[str]], tuple[str, ...]]] = {
    "coco": (coco, ("category",)),
    "diffusiondb": (diffusiondb, ("max_nsfw",)),
    "pickapic": (pick_a_pic, ()),
}
