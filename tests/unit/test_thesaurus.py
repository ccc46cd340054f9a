"""Words in place of others, for prompts of any words: WordNet's files, and a chat model's answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from ipgo import cli, generate, wordnet
from ipgo.adapters import Adapter
from ipgo.backends import Backend
from ipgo.chat import Chat
from ipgo.errors import InputError
from ipgo.methods import DPODiffusion
from ipgo.rewards import load_reward
from ipgo.sampling import Sampling
from ipgo.substitution import WordList, load_word_list, negative_slots, synonym_slots
from ipgo.task import Request, Task
from ipgo.thesaurus import ANTONYMS, SYNONYMS, check_word_list, parse_lines, word_list_of, words_of
from ipgo.wordnet import WordNet
from tests.chat_endpoint import Endpoint
from tests.conftest import one_sentence

# By part of speech and key: kind, words, and pointers (sign, key of the other, from, to); all adjectives here.
ADJECTIVES = {
    "large": ("a", ["large", "big(p)"], [("!", "small", 1, 1), ("!", "little", 2, 1), ("&", "huge", 0, 0)]),
    "small": ("a", ["small"], [("!", "large", 1, 1)]),
    "little": ("a", ["little"], [("!", "large", 1, 2)]),
    "huge": ("s", ["huge", "immense", "very_large"], [("&", "large", 0, 0)]),
    "red": ("s", ["red", "crimson", "scarlet"], []),
}
LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by   \n"


@pytest.fixture
def net(tmp_path: Path) -> WordNet:
    """A database with five adjectives and a noun, in the layout of wndb(5)."""

    def line(offsets: dict[str, int], key: str) -> str:
        kind, words, pointers = ADJECTIVES[key]
        said = " ".join(f"{word} 0" for word in words)
        others = " ".join(f"{sign} {offsets[to]:08d} a {a:02x}{b:02x}" for sign, to, a, b in pointers)
        return f'{offsets[key]:08d} 00 {kind} {len(words):02x} {said} {len(pointers):03d} {others} | gloss; "a ! b"\n'

    offsets = dict.fromkeys(ADJECTIVES, 0)
    lengths = {key: len(line(offsets, key)) for key in ADJECTIVES}
    place = len(LICENCE)
    for key in ADJECTIVES:
        offsets[key] = place
        place += lengths[key]
    data = {"adj": LICENCE + "".join(line(offsets, key) for key in ADJECTIVES)}
    names = {word.split("(")[0].lower(): key for key, (_, words, _) in ADJECTIVES.items() for word in words}
    index = {"adj": [f"{name} a 1 1 & 1 0 {offsets[key]:08d}  \n" for name, key in names.items()]}
    data["noun"] = f"{LICENCE}{len(LICENCE):08d} 13 n 02 red 0 redness 0 000 | the colour\n"
    index["noun"] = [f"red n 1 0 1 1 {len(LICENCE):08d}  \n"]
    for part in wordnet.PARTS:
        (tmp_path / f"data.{part}").write_text(data.get(part, LICENCE))
        (tmp_path / f"index.{part}").write_text(LICENCE + "".join(sorted(index.get(part, []))))
    return WordNet(tmp_path)


def test_words_of_one_meaning_and_of_the_opposite_one(net: WordNet) -> None:
    assert net.synonyms("large") == ("big",)
    assert net.synonyms("Red") == ("crimson", "scarlet", "redness")  # the adjective's, then the noun's
    assert net.synonyms("huge") == ("immense",)  # single words alone
    assert net.antonyms("large") == ("small",)
    assert net.antonyms("big") == ("little",)  # the word's own, not its neighbour's
    assert net.antonyms("huge") == ("small", "little")  # those of what it is like
    assert net.antonyms("red") == net.synonyms("arge") == net.synonyms("software") == ()


def test_the_words_of_a_prompt_are_looked_up(net: WordNet, tmp_path: Path) -> None:
    spec = f"wordnet:{tmp_path}"
    found = word_list_of(spec, "A huge red Fox, in red", Chat(), synonyms=True, antonyms=True)
    assert found.synonyms == {"huge": ("immense",), "red": ("crimson", "scarlet", "redness")}
    assert found.antonyms == {"huge": ("small", "little")}
    assert found.negative == load_word_list("general").negative
    template = synonym_slots("A huge red Fox", found)
    assert template.text([1, 2]) == "A immense scarlet Fox"
    assert negative_slots("A huge red Fox", found, "").slots[0] == ("", "small", "little")
    assert word_list_of(spec, "huge", Chat(), synonyms=False, antonyms=True).synonyms == {}


@pytest.mark.skipif(not Path(wordnet.PLACES[0]).is_dir(), reason="WordNet is not installed")
def test_the_real_database() -> None:
    net = WordNet.found()
    assert net.synonyms("sofa") == ("couch", "lounge")
    assert set(net.antonyms("big")) >= {"little", "small"}
    assert set(net.antonyms("huge")) >= {"little", "small"}
    assert net.antonyms("young")[0] == "old"
    assert net.synonyms("xyzzy") == ()


def test_without_wordnet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(wordnet, "PLACES", (str(tmp_path / "none"),))
    with pytest.raises(InputError, match=r"in none of its usual places; install it .*, or choose 'general'"):
        check_word_list("wordnet", ["a cat"], Chat(), synonyms=True, antonyms=True)
    with pytest.raises(InputError, match=r"is not WordNet's folder: it has no index\.adj"):
        check_word_list(f"wordnet:{tmp_path}", ["a cat"], Chat(), synonyms=True, antonyms=True)
    with pytest.raises(InputError, match="unknown word_list 'wordnett'; did you mean 'wordnet'"):
        check_word_list("wordnett", ["a cat"], Chat(), synonyms=True, antonyms=True)


def test_only_words_that_say_something_are_looked_up() -> None:
    assert words_of("A red-hot pan, IN the old oven; 3d 50%!") == ["red-hot", "pan", "old", "oven"]
    assert words_of("a dog's 'ball', don’t run") == ["dog", "ball", "run"]
    words = WordList({"s": ("sec",), "dog": ("hound",)}, {}, ())
    assert synonym_slots("a dog's ball", words).slots == (("dog", "hound"),)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("red -> scarlet, crimson", {"red": ("scarlet", "crimson")}),
        (
            "1. **Red** -> Scarlet; `crimson`.\n- cat → dog / horse",
            {"red": ("Scarlet", "crimson"), "cat": ("dog", "horse")},
        ),
        ("red -> red, bright red, crimson", {"red": ("crimson",)}),  # neither itself nor several words
        ("red -> a1, b, c, d, e, f, g", {"red": ("b", "c", "d", "e", "f")}),  # five at most, of letters
        ('2) "red" => ruby.\n* _cat_ -> **kitten**', {"red": ("ruby",), "cat": ("kitten",)}),
        ("blue -> green", {}),  # no word of the prompt
        ("red: scarlet\nHope this helps!", {}),
        ("red -> scarlet\nred -> scarlet, ruby", {"red": ("scarlet", "ruby")}),
        ("", {}),
    ],
)
def test_answers_are_read_line_by_line(answer: str, found: dict[str, tuple[str, ...]]) -> None:
    assert parse_lines(answer, ["red", "cat"]) == found


def test_a_chat_model_names_the_words_once(
    endpoint: Endpoint, backend: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = {SYNONYMS: "red -> ruby\ncat -> kitten", ANTONYMS: "red -> green"}
    endpoint.answer = lambda request: answers[request["messages"][0]["content"]]
    method = DPODiffusion("both", "evolutionary", "llm", candidates=6, population=3, parents=2)
    reward = load_reward("colorfulness", device="cpu")
    task = Task(backend, reward, ("a red cat",), Sampling(steps=1, guidance_scale=3.0))
    steps = list(method.fit(task))
    assert [request["messages"][1]["content"] for request in endpoint.requests] == ["a red cat"] * 2
    (text,), (negative,) = steps[-1].adapter.texts, steps[-1].adapter.negatives  # type: ignore[attr-defined]
    assert text in ("", "a red cat", "a ruby cat", "a red kitten", "a ruby kitten")
    general = {word for slot in load_word_list("general").negative for word in slot}
    assert set(filter(None, negative.split(", "))) <= {"green", *general}
    monkeypatch.delenv("OPENAI_API_KEY")
    method.check(Request(["a red cat"], "colorfulness", "emoji"))  # stored: no key is needed
    again = list(method.fit(task))
    assert torch.equal(steps[-1].best, again[-1].best)
    assert len(endpoint.requests) == 2
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set and no answer is stored"):
        method.check(Request(["a blue dog"], "colorfulness", "emoji"))
    # One negative prompt for all prompts asks for the words of none.
    dataclasses.replace(method, target="negative").check(
        Request(["a blue dog"], "colorfulness", "emoji", shared=True)
    )
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    answers[ANTONYMS] = "I cannot help with that."
    found = word_list_of("llm", "a red dog", Chat(), synonyms=False, antonyms=True)
    assert (found.synonyms, found.antonyms) == ({}, {})
    assert "named no words for 'a red dog'" in caplog.text


def test_the_gradient_of_words_out_of_wordnet(net: WordNet, tmp_path: Path, backend: Backend) -> None:
    """The hybrid solver on both prompts; what it returns is what it drew."""
    method = DPODiffusion(
        "both", "hybrid", f"wordnet:{tmp_path}", candidates=4, gradient_steps=2, population=2, parents=2
    )
    reward = load_reward("colorfulness", device="cpu")
    sampling = Sampling(steps=2, guidance_scale=3.0)
    last = list(method.fit(Task(backend, reward, ("a huge red sun",), sampling)))[-1]
    images = generate(backend, ["a huge red sun"], [0], last.adapter, sampling)
    assert float(reward(images, ["a huge red sun"])) == pytest.approx(float(last.best), abs=1e-6)
    raw = generate(backend, ["a huge red sun"], [0], Adapter(), sampling)
    assert float(last.best) >= float(reward(raw, ["a huge red sun"])) - 1e-6


@pytest.mark.usefixtures("no_models")
def test_a_missing_list_is_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("IPGO_CACHE", str(tmp_path / "cache"))
    command = ["fit", "a cat", "--method", "dpo-diffusion", "--out", str(tmp_path / "run")]
    for spec, message in (
        ("llm", "OPENAI_API_KEY is not set"),
        (f"wordnet:{tmp_path}", "is not WordNet's folder"),
        ("none.json", "word_list file 'none.json' does not exist"),
    ):
        assert cli.main([*command, "--method.word_list", spec]) == 2
        assert message in one_sentence(capsys)
    assert not (tmp_path / "run").exists()
