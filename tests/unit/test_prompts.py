from __future__ import annotations

from pathlib import Path

import pytest

from ipgo.errors import InputError
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
    ("name", "content", "message"),
    [
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
    assert prompt_sets() == ["one", "styled", "two"]
    for name in prompt_sets():
        train, test = read_prompts(f"{name}:train"), read_prompts(f"{name}:test")
        check_prompts(train + test)
        assert len(train) == len(test) == 30
        assert read_prompts(name) == train + test


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("onne", "did you mean 'one'.*a file must end in .txt"),
        ("one:tset", "unknown half of prompt set 'one' 'tset'; did you mean 'test'"),
        ("prompts.doc", "unknown prompt set"),
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
    ],
)
def test_refused_prompts(prompts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_prompts(prompts)


def test_unseen_words_come_with_the_nearest_known_one() -> None:
    known = ["a", "fox", "lemon", "on", "blue", "background"]
    assert unseen_words(["a lemmon on a blue background"], known) == {"lemmon": "lemon"}
    assert unseen_words(["A Fox, xylophone!"], known) == {"xylophone": None}
