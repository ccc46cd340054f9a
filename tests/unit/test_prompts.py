from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from ipgo.errors import InputError, MissingExtraError
from ipgo.prompt_sources import SUBSETS
from ipgo.prompts import check_prompts, number, prompt_sets, read_prompts, slug, unseen_words


def test_ids_are_readable_distinct_and_depend_on_the_text() -> None:
    first, second, third = number(["A red cat!", "Ein süßer Käfer", "猫"])
    assert first.id.startswith("0000-a-red-cat-")
    assert second.id.startswith("0001-ein-suer-kafer-")
    assert third.id.startswith("0002-")
    assert number(["A red cat!"])[0].id == first.id
    assert number(["A red cat?"])[0].id != first.id
    assert len(slug("word " * 50)) <= 40


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "a cat\n\n  a dog  \n"),
        ("p.csv", 'id,prompt\n1,a cat\n2,"a dog"\n'),
        ("p.jsonl", '"a cat"\n\n{"prompt": "a dog", "seed": 3}\n'),
        ("P.TXT", "\ufeffa cat\r\na dog\r\n"),
    ],
)
def test_readers(tmp_path: Path, name: str, content: str) -> None:
    file = tmp_path / name
    file.write_text(content, encoding="utf-8", newline="")
    assert read_prompts(str(file)) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.csv", 'prompt,n\n"a cat\non a mat",1\na dog,2\n', ["a cat\non a mat", "a dog"]),
        ("p.jsonl", '"a cat\u2028on a mat"\n"a dog"\n', ["a cat\u2028on a mat", "a dog"]),
        ("p.txt", "a cat\x0bon a mat\na dog", ["a cat\x0bon a mat", "a dog"]),
    ],
)
def test_only_the_ends_of_lines_part_prompts(
    tmp_path: Path, name: str, content: str, prompts: list[str]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_prompts(str(tmp_path / name)) == prompts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'"a"\n{"prompt": 3}\n', "line 2 is neither"),
        ("p.jsonl", b'"a"\n{"prompt": null}\n', "line 2 is neither"),
        ("p.csv", b"prompt\n" + b"a" * 200_000, "line 2 cannot be read: field larger"),
        ("p.txt", b"\n \n", "is empty"),
        ("p.txt", b"\xff\xfe\xff", "not UTF-8"),
        ("p.csv", b"text\na cat\n", "one must be called 'prompt'"),
        ("p.jsonl", b'"a cat"\n{"text": 1}\n', "line 2 is neither"),
        ("p.jsonl", b"{broken\n", "line 1 is neither"),
        ("p.txt", None, "does not exist"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(str(file))


def test_bundled_sets_have_halves_that_share_nothing() -> None:
    assert prompt_sets() == ["mixed", "one", "styled", "two"]
    for name in ("one", "styled", "two"):
        train, test = read_prompts(f"{name}:train"), read_prompts(f"{name}:test")
        check_prompts(train + test)
        assert len(train) == len(test) == 30
        assert read_prompts(name) == train + test


def test_the_mixed_set_has_only_prompts_to_fit_to() -> None:
    mixed = read_prompts("mixed")
    check_prompts(mixed)
    assert mixed == read_prompts("mixed:train")
    assert len(mixed) == 1200
    assert not set(mixed) & {prompt for name in ("one", "styled", "two") for prompt in read_prompts(name)}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("onne", "did you mean 'one'.*a file must end in .txt"),
        ("one:tset", "unknown half of prompt set 'one' 'tset'; did you mean 'test'"),
        ("mixed:test", "unknown half of prompt set 'mixed' 'test'; choose from train"),
        ("prompts.doc", "unknown prompt set"),
        ("coco/captions_val2017.json", "write coco:coco/captions_val2017.json$"),
        ("x.PARQUET?n=3", "write diffusiondb:x.PARQUET or pickapic:x.PARQUET$"),
        ("kokko:x.json", "unknown prompt set 'kokko'.*a file must end in .txt"),
    ],
)
def test_misspelt_sets(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_prompts(spec)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts is empty"),
        (["a", "  "], "prompt 2 is empty"),
        (["a", "b", "a"], "prompt 3 repeats prompt 1: 'a'"),
        (["a red fox", " a  red\tfox"], "prompt 2 repeats prompt 1"),
    ],
)
def test_refused_prompts(prompts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_prompts(prompts)


def test_a_quote_that_is_not_closed_takes_no_other_prompts(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text('prompt\n"a lemon\na fox\n')
    with pytest.raises(InputError, match=r"q.csv' line 3 cannot be read: unexpected end of data"):
        read_prompts(str(tmp_path / "q.csv"))


def test_unseen_words_come_with_the_nearest_known_one() -> None:
    assert unseen_words(["a café, 柠檬"], ["a", "calf"]) == {"café": "calf", "柠檬": None}
    known = ["a", "fox", "lemon", "on", "blue", "background"]
    assert unseen_words(["a lemmon on a blue background"], known) == {"lemmon": "lemon"}
    assert unseen_words(["A Fox, xylophone!"], known) == {"xylophone": None}
    assert unseen_words([" 🍋🍋", "a fox 🍋"], known) == {
        "🍋🍋": None
    }  # of an emoji beside words nobody is told
    assert unseen_words(["lemo bl and a fx"], known) == {"lemo": "lemon", "bl": None, "and": None, "fx": None}


# -- some of many, and published collections -----------------------------------------------------------------


def test_a_draw_is_the_same_for_a_seed_and_keeps_the_order() -> None:
    every, some = read_prompts("one:test"), read_prompts("one:test?n=8&seed=3")
    assert some == [prompt for prompt in every if prompt in some]
    assert len(some) == 8
    assert read_prompts("one:test?seed=3&n=8") == some != read_prompts("one:test?n=8")
    assert set(read_prompts("one:test?n=4&seed=3")) < set(some)
    assert read_prompts("one:test?n=30") == every
    # So a draw can be repeated elsewhere, at any time.
    assert read_prompts("one:train?n=1") == ["a bus on a black background, flat style"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("one?n=0", "n is '0' in 'one\\?n=0'; it must be a whole number from 1"),
        ("one?n=8&seed=-1", "seed is '-1'"),
        ("one?n=61", "n is 61 in 'one\\?n=61', which has 60 prompts"),
        ("one?n=1&n=2", "n is given twice in 'one\\?n=1&n=2'; give it once"),
        ("one?seeds=1", "unknown option of 'one' 'seeds'; did you mean 'seed'"),
        ("one?category=person", "unknown option of 'one' 'category'"),
        ("kokko:x", "unknown prompt set 'kokko'"),
        ("coco:nowhere", "download them from https://cocodataset.org"),
        ("pickapic:trian", "unknown split of Pick-a-Pic 'trian'; did you mean 'train'"),
        ("diffusiondb:nowhere.parquet", "cannot be read"),
    ],
)
def test_draws_and_collections_that_cannot_be(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_prompts(spec)


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    """Three images in the layout of COCO's files: 1 shows a person and a couch, 2 a bus, 3 a mountain."""
    captions = [(1, 12, "a man on a couch "), (1, 11, "A man\nsits"), (2, 13, "a bus"), (3, 14, "a peak")]
    (tmp_path / "captions_val2017.json").write_text(
        json.dumps({"annotations": [{"image_id": i, "id": n, "caption": c} for i, n, c in captions]})
    )
    kinds = {
        "instances": [
            (1, "person", "person", [1]),
            (63, "couch", "furniture", [1]),
            (6, "bus", "vehicle", [2]),
            (80, "toaster", "appliance", []),
            (84, "book", "indoor", []),
        ],
        "stuff": [
            (135, "mountain", "solid", [3]),
            (96, "house", "building", [2]),
            *((n, name, "natural", []) for n, name in enumerate(SUBSETS["natural_scenes"], 200) if n > 200),
        ],
    }
    for name, rows in kinds.items():
        categories = [{"id": n, "name": a, "supercategory": b} for n, a, b, _ in rows]
        shown = [{"image_id": i, "category_id": n} for n, _, _, images in rows for i in images]
        (tmp_path / f"{name}_val2017.json").write_text(
            json.dumps({"categories": categories, "annotations": shown})
        )
    return tmp_path


def test_coco_captions_and_their_categories(annotations: Path) -> None:
    def read(options: str = "") -> list[str]:
        assert read_prompts(f"coco:{annotations}{options}") == read_prompts(
            f"coco:{annotations}/captions_val2017.json{options}"
        )
        return read_prompts(f"coco:{annotations}{options}")

    assert read() == ["A man sits", "a bus", "a peak"]
    assert read("?category=person") == ["A man sits"]
    assert read("?category=vehicles,mountain") == ["a bus", "a peak"]
    own = {"room": "A man sits", "vehicles": "a bus", "natural_scenes": "a peak", "buildings": "a bus"}
    assert {name: read(f"?category={name}") for name in own} == {name: [only] for name, only in own.items()}
    assert read("?category=person,natural_scenes&n=1&seed=1") in (["A man sits"], ["a peak"])
    with pytest.raises(InputError, match=r"unknown COCO category 'buss'; did you mean 'bus'"):
        read("?category=buss")
    (annotations / "stuff_val2017.json").write_text('{"annotations": []}')
    with pytest.raises(InputError, match=r"stuff_val2017.json' is not a COCO file: its categories need id"):
        read("?category=person")
    (annotations / "stuff_val2017.json").unlink()
    with pytest.raises(InputError, match=r"stuff_val2017.json is not beside the captions"):
        read("?category=buildings")
    (annotations / "instances_val2017.json").unlink()
    with pytest.raises(
        InputError, match=r"'person'.* instances_val2017.json, stuff_val2017.json is not beside"
    ):
        read("?category=person")  # the name of a subset, too, which is no sign that it is there
    with pytest.raises(InputError, match="n is 5 in"):
        read("?n=5")


def test_damaged_annotations_are_one_sentence(annotations: Path) -> None:
    file = annotations / "captions_val2017.json"
    for content, message in (
        ("[]", "must hold an object"),
        ("{", "cannot be read"),
        ('{"annotations": [{}]}', "image_id"),
        ('{"annotations": ["no object"]}', "its annotations need image_id, id, caption"),
        ('{"annotations": [{"image_id": 1, "id": 2, "caption": null}]}', "caption 2 is None"),
        ('{"annotations": [{"image_id": "a", "id": 2, "caption": "a fox"}]}', "caption 2 is 'a fox'"),
    ):
        file.write_text(content)
        for place in (annotations, file):
            with pytest.raises(InputError, match=message):
                read_prompts(f"coco:{place}")
    file.write_text(json.dumps({"annotations": [{"image_id": 9, "id": 2, "caption": "a fox"}]}))
    with pytest.raises(InputError, match="there is no prompt in 'coco:"):
        read_prompts(f"coco:{annotations}?category=person")


def test_prompts_with_unwanted_words_are_dropped_before_the_draw(annotations: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("MAN\n\npe.k\n")
    assert read_prompts(f"coco:{annotations}?exclude={words}") == ["a bus", "a peak"]
    mine = tmp_path / "mine.txt"
    mine.write_text("a woman\nthe man's hat\na fox\n")
    assert read_prompts(f"{mine}?exclude={words}") == ["a woman", "a fox"]
    assert read_prompts(f"{mine}?exclude={words}&n=2&seed=1") == ["a woman", "a fox"]
    with pytest.raises(InputError, match=r"n is 3 in .*, which has 2 prompts"):
        read_prompts(f"{mine}?exclude={words}&n=3")
    words.write_text("a\nthe\n")
    with pytest.raises(InputError, match="each of the 3 prompts contains one of its words"):
        read_prompts(f"{mine}?exclude={words}")
    with pytest.raises(InputError, match=r"exclude is 'man'; it must be a \.txt file"):
        read_prompts("one?exclude=man")
    with pytest.raises(InputError, match=r"'nowhere\.txt' does not exist"):
        read_prompts("one?exclude=nowhere.txt")


class Table:
    """What `datasets.load_dataset` returns, as far as it is used."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns, self.column_names = columns, list(columns)

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Any]:
    """A package `datasets` whose hub holds tables by repository and split, or raises what is put there."""
    held: dict[tuple[str, str], Any] = {}

    def load_dataset(repository: str, *, split: str) -> Table:
        found = held[repository, split]
        if isinstance(found, Exception):
            raise found
        return Table(found)

    package = ModuleType("datasets")
    package.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    return held


def test_captions_of_the_hub(
    hub: dict[tuple[str, str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # with no folder val2017
    columns = {
        "image_id": [9, 3],
        "ids": [[5, 2], [8]],
        "captions": [["later", " a bus\nstops "], ["a fox"]],
        "width": [1, 1],
    }
    hub["phiyodr/coco2017", "validation"] = columns
    assert read_prompts("coco:val2017") == ["a fox", "a bus stops"]
    assert read_prompts("coco:val2017?n=1&seed=0") in (["a fox"], ["a bus stops"])
    (tmp_path / "val2017").mkdir()  # COCO's pictures
    assert read_prompts("coco:val2017") == ["a fox", "a bus stops"]
    with pytest.raises(InputError, match="captions alone, so category needs a local copy; download it from"):
        read_prompts("coco:val2017?category=person")
    hub["phiyodr/coco2017", "train"] = OSError("no route to host\nand more")
    with pytest.raises(
        InputError, match=r"\(no route to host\); give a local copy as coco:PATH/captions_train"
    ):
        read_prompts("coco:train2017")
    hub["phiyodr/coco2017", "train"] = {"text": ["x"]}
    with pytest.raises(InputError, match="has no column 'image_id'; give a local copy"):
        read_prompts("coco:train2017")
    hub["yuvalkirstain/pickapic_v1_no_images", "validation_unique"] = {"caption": ["x", None, "y ", "x"]}
    assert read_prompts("pickapic:validation_unique") == read_prompts("pickapic:") == ["x", "y"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "validation_unique").mkdir()  # by chance
    assert read_prompts("pickapic:validation_unique") == ["x", "y"]

    class BrokenError(Exception):  # as those of the hub's HTTP library, which are no OSError
        pass

    hub["yuvalkirstain/pickapic_v1_no_images", "test"] = BrokenError("the peer closed the connection")
    with pytest.raises(InputError, match=r"\(the peer closed the connection\); give a local copy"):
        read_prompts("pickapic:test")


def test_a_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.txt").write_text("a cat\na red dog\n")
    (tmp_path / "words.txt").write_text("red\n")
    assert read_prompts("~/prompts.txt") == ["a cat", "a red dog"]
    assert read_prompts("~/prompts.txt?exclude=~/words.txt") == ["a cat"]


def test_a_local_folder_comes_before_the_hub(annotations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(annotations)
    (annotations / "val2017").mkdir()
    (annotations / "captions_val2017.json").rename(annotations / "val2017/captions_val2017.json")
    assert read_prompts("coco:val2017") == ["A man sits", "a bus", "a peak"]


def test_without_the_extra_its_pip_line_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for spec in ("coco:val2017", "pickapic:test"):
        with pytest.raises(
            MissingExtraError, match=rf'{spec} needs the datasets package: pip install "ipgo\[data\]"'
        ):
            read_prompts(spec)


def test_diffusiondb_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, asked = tmp_path / "metadata.parquet", []
    parquet.write_table(pyarrow.table({"prompt": ["a cat", "gore"], "prompt_nsfw": [0.01, 0.9]}), file)

    def fetched(repository: str, name: str, *, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    assert read_prompts("diffusiondb") == ["a cat", "gore"]
    assert read_prompts("diffusiondb?max_nsfw=0.5") == ["a cat"]
    assert asked == [("poloclub/diffusiondb", "metadata.parquet", "dataset")] * 2


def test_parquet_tables(tmp_path: Path) -> None:
    prompts = {"prompt": ["a cat ", "a cat", "", "gore"], "prompt_nsfw": [0.01, 0.02, 0.0, 0.9]}
    file = tmp_path / "metadata.parquet"
    parquet.write_table(pyarrow.table(prompts), file)
    assert read_prompts(f"diffusiondb:{file}") == ["a cat", "gore"]
    assert read_prompts(f"diffusiondb:{file}?max_nsfw=0.5") == ["a cat"]
    assert read_prompts(f"diffusiondb:{tmp_path}?max_nsfw=0.5") == ["a cat"]
    with pytest.raises(InputError, match=r"metadata\.parquet' does not exist; give the file"):
        read_prompts(f"diffusiondb:{Path(__file__).parent}")
    for limit in ("low", "nan", "2"):
        with pytest.raises(InputError, match=f"max_nsfw is '{limit}'"):
            read_prompts(f"diffusiondb:{file}?max_nsfw={limit}")
    with pytest.raises(InputError, match="has no column 'caption'"):
        read_prompts(f"pickapic:{file}")
    gaps = {"prompt": ["a cat", None, "a dog"], "prompt_nsfw": [0.0, 0.0, None]}
    parquet.write_table(pyarrow.table(gaps), file)
    assert read_prompts(f"diffusiondb:{file}") == ["a cat", "a dog"]
    # What has no score is not known to be safe.
    assert read_prompts(f"diffusiondb:{file}?max_nsfw=0.5") == ["a cat"]
    parquet.write_table(pyarrow.table({"caption": ["x", "y", "x"]}), file)
    assert read_prompts(f"pickapic:{file}") == ["x", "y"]
    with pytest.raises(InputError, match=r"has no \.parquet file"):
        read_prompts(f"pickapic:{Path(__file__).parent}")
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard, captions in enumerate((["z", "x"], ["w"])):
        parquet.write_table(pyarrow.table({"caption": captions}), shards / f"test-{shard}.parquet")
    assert read_prompts(f"pickapic:{shards}") == ["z", "x", "w"]
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(f"pickapic:{file}")
