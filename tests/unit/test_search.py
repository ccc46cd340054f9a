"""The search loop, and adapters that hold text."""

import pytest
import torch

from ipgo.adapters import ADAPTERS, Adapter, TextAdapter, generate, shorten, stack
from ipgo.adapters.text import BYTES
from ipgo.artefacts import load_adapter, save_adapter
from ipgo.backends import load_backend
from ipgo.errors import InputError, ResumeError
from ipgo.methods import BestOfN, Raw
from ipgo.rewards import Ceiling, load_reward
from ipgo.sampling import Sampling
from ipgo.search import search
from ipgo.task import Task
from tests.conftest import assert_same_state

PROMPTS = ("a red cat", "sun")
SAMPLING = Sampling(steps=1, guidance_scale=3.0)
COLOUR = load_reward("colorfulness", device="cpu")


# -- adapters that hold text -------------------------------------------------------------------------------


def text_adapter(texts=("", "a dog ☀"), negatives=("blurry", "")):
    adapter = TextAdapter(PROMPTS)
    adapter.set_texts(texts)
    adapter.set_negatives(negatives)
    return adapter


def test_texts_are_rows_like_any_other(backend, tmp_path):
    adapter = text_adapter()
    assert ADAPTERS["text"] is TextAdapter
    assert (adapter.texts, adapter.negatives) == (("", "a dog ☀"), ("blurry", ""))
    assert adapter.row(1).texts == ("a dog ☀",)
    assert stack([adapter.row(1), adapter.row(0)]).texts == ("a dog ☀", "")
    save_adapter(adapter, tmp_path)
    again = load_adapter(tmp_path)
    assert (again.prompts, again.texts, again.negatives) == (PROMPTS, adapter.texts, adapter.negatives)
    adapter.set_texts(["x" * BYTES, "☀" * (BYTES // 3)])
    assert [len(text) for text in adapter.texts] == [BYTES, BYTES // 3]
    with pytest.raises(InputError, match=rf"has {BYTES + 2} bytes; at most {BYTES} are allowed"):
        adapter.set_negatives(["", "☀" * (BYTES // 3) + "xyz"])
    with pytest.raises(InputError, match="holds 2 texts, not 1"):
        adapter.set_texts(["a dog"])
    with pytest.raises(InputError, match="shared is true; a rewritten prompt replaces one prompt"):
        TextAdapter.start(backend, PROMPTS, shared=True)


@pytest.mark.parametrize("padding", ["max_length", "none"])
def test_a_text_is_drawn_in_place_of_its_prompt(pipe, padding):
    backend = load_backend(pipe, device="cpu", padding=padding)
    adapter = text_adapter(("", "a small dog"), ("blurry and dark", ""))
    images = generate(backend, PROMPTS, [7, 8], adapter, SAMPLING)
    negative = Sampling(steps=1, guidance_scale=3.0, negative_prompt="blurry and dark")
    expected = [
        generate(backend, ["a red cat"], [7], Adapter(), negative),
        generate(backend, ["a small dog"], [8], Adapter(), SAMPLING),
    ]
    torch.testing.assert_close(images, torch.cat(expected), atol=1e-5, rtol=0)
    assert not torch.allclose(images[0], generate(backend, PROMPTS[:1], [7], Adapter(), SAMPLING), atol=1e-3)
    unguided = Sampling(steps=1, guidance_scale=1.0)
    plain = generate(backend, ["a small dog"], [8], Adapter(), unguided)
    torch.testing.assert_close(generate(backend, ["sun"], [8], adapter, unguided), plain, atol=1e-5, rtol=0)


def test_a_plain_pipeline_draws_the_rewritten_prompt(pipe):
    adapter = text_adapter(("", "a small dog"), ("", "blurry"))
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
    ours, theirs = (
        pipe(**kwargs, **options, generator=torch.Generator().manual_seed(7)).images
        for kwargs in (
            adapter.prompt_kwargs(pipe, "sun"),
            {"prompt": "a small dog", "negative_prompt": "blurry"},
        )
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"padding": "none"}, {"long_prompts": "chunk"}])
def test_a_plain_pipeline_reads_the_rewritten_prompt_as_the_backend_does(pipe, options):
    backend = load_backend(pipe, device="cpu", **options)
    text = "a small dog" + " on a mat" * (8 if "long_prompts" in options else 0)
    task = Task(backend, COLOUR, ("sun",), SAMPLING, (3,))
    (last,) = search(task, TextAdapter.start(backend, ["sun"], shared=False), Script([text]), 1)
    adapter = stack([last.adapter.row(0)])  # rebuilt from its options, as from a file
    ours = generate(backend, ["sun"], [3], adapter, SAMPLING)
    noise = backend.noise([3])[:, 0]
    theirs = pipe(
        **adapter.prompt_kwargs(pipe, "sun"),
        latents=noise,
        num_inference_steps=1,
        guidance_scale=3.0,
        output_type="pt",
    )
    torch.testing.assert_close(ours, theirs.images, atol=1e-4, rtol=0)


def test_long_texts_are_cut_at_a_word(backend, pipe):
    word = "abcdefg"  # seven tokens; 77 less the two marks are ten words and five tokens
    assert shorten(backend, " ".join([word] * 10)) == " ".join([word] * 10)
    assert shorten(backend, "  ".join([word] * 12)) == " ".join([word] * 10)
    assert shorten(backend, f"{word}, " * 12) == ", ".join([word] * 9)
    assert shorten(backend, "x" * 80) == ""
    lenient = load_backend(pipe, device="cpu", long_prompts="truncate")
    assert shorten(lenient, "x" * 80) == "x" * 80
    assert shorten(lenient, f"{'x' * 600} {'y' * 600}") == "x" * 600


# -- the loop ----------------------------------------------------------------------------------------------


class Script:
    """Proposes the texts of a list, and writes down what it is told."""

    def __init__(self, texts):
        self.texts, self.told = texts, []
        self.memory = {"seen": torch.tensor(0)}

    def propose(self, adapter, step):
        adapter.set_texts([self.texts[step]] * len(adapter.text_bytes))

    def tell(self, adapter, rewards):
        self.told.append(rewards.tolist())
        self.memory["seen"] += 1

    def resumed(self):
        self.told = [None] * int(self.memory["seen"])


def table_reward(values):
    """The next of `values` for the images of each call, whatever they show; NaN may be among them."""
    numbers = iter(values)
    return lambda reward, images, prompts: torch.tensor(next(numbers))


def test_each_row_keeps_its_best_candidate(backend, monkeypatch):
    values = [
        [1.0, 1.0],
        [3.0, 5.0],
        [4.0, 2.0],
        [2.0, 2.0],
        [torch.nan, 9.0],
        [9.0, 9.0],
        [4.0, 4.0],
        [1.0, 8.0],
    ]
    monkeypatch.setattr("ipgo.task.score", table_reward(values))
    proposer = Script(["one", "two", "three", "four"])
    task = Task(backend, COLOUR, PROMPTS, SAMPLING, seeds=(0, 1))
    steps = [(step.rewards.tolist(), step.best.tolist(), step.adapter.texts) for step in
             search(task, TextAdapter.start(backend, PROMPTS, shared=False), proposer, 4)]  # fmt: skip
    assert steps[0] == ([2, 3], [2, 3], ("one", "one"))
    assert steps[1] == ([3, 2], [3, 3], ("two", "one"))
    assert steps[2][0][0] != steps[2][0][0]  # NaN on one seed
    assert steps[2][1:] == ([3, 9], ("two", "three"))
    assert steps[3] == ([2.5, 6], [3, 9], ("two", "three"))
    assert proposer.told[0] == [2, 3]
    assert proposer.told[3] == [2.5, 6]
    assert backend.calls["denoiser"] == 4 * 2 * 2


def test_one_row_for_all_prompts_is_kept_by_its_mean(backend, monkeypatch):
    class Shared(Adapter):
        kind = "shared-test"

        def __init__(self):
            super().__init__(None)
            self.register_buffer("value", torch.zeros(1))

    class Count(Script):
        def propose(self, adapter, step):
            adapter.value.fill_(step + 1)

    values = [[1.0, 1.0], [9.0, -8.0], [0.0, 4.0], [torch.nan, 100.0]]
    monkeypatch.setattr("ipgo.task.score", table_reward(values))
    proposer = Count([])
    task = Task(backend, COLOUR, PROMPTS, SAMPLING, seeds=(), shared=True)
    steps = [(step.best.tolist(), step.adapter.value.item()) for step in search(task, Shared(), proposer, 4)]
    assert steps == [([1, 1], 1), ([1, 1], 1), ([0, 4], 3), ([0, 4], 3)]
    assert proposer.told[:3] == [[1.0], [0.5], [2.0]]


def test_a_prompt_that_never_had_a_finite_score_is_failed(backend, monkeypatch):
    monkeypatch.setattr("ipgo.task.score", table_reward([[torch.nan, 1.0]] * 2))
    task = Task(backend, COLOUR, PROMPTS, SAMPLING)
    steps = search(task, TextAdapter.start(backend, PROMPTS, shared=False), Script(["one", "two"]), 2)
    first, last = [(step.failed.tolist(), step.adapter.texts) for step in steps]
    assert first == ([False, False], ("", "one"))
    assert last == ([True, False], ("", "one"))


def test_a_search_resumes_with_its_proposer(backend):
    task = Task(backend, COLOUR, PROMPTS, SAMPLING)
    texts = ["one", "two", "three"]
    straight = [step.state() for step in search(task, text_adapter(), Script(texts), 3)]
    proposer = Script(texts)
    (resumed,) = search(task, text_adapter(), proposer, 3, resume=straight[1])
    assert len(proposer.told) == 3
    assert_same_state(straight[2], resumed.state())
    for broken in ({"step": torch.tensor(1)}, {**straight[1], "best": torch.zeros(3)}):
        with pytest.raises(ResumeError, match="other settings"):
            search(task, text_adapter(), Script(texts), 3, resume=broken)


@pytest.mark.parametrize("method", [BestOfN(n=3), Raw()])
def test_prompts_are_encoded_once_for_a_fit(backend, monkeypatch, method):
    """A large text encoder, on the CPU, would take longer than the images."""
    texts = []
    encode = backend.encode
    monkeypatch.setattr(backend, "encode", lambda prompts: texts.extend(prompts) or encode(prompts))
    list(method.fit(Task(backend, COLOUR, PROMPTS, SAMPLING)))
    assert sorted(filter(None, texts)) == sorted(PROMPTS)


def test_a_search_ends_where_nothing_is_left_to_gain(backend):
    every = list(BestOfN(n=6).fit(Task(backend, COLOUR, PROMPTS, SAMPLING)))
    enough = float(every[2].best.min())
    capped = Ceiling(COLOUR, enough, "capped")
    steps = list(BestOfN(n=6).fit(Task(backend, capped, PROMPTS, SAMPLING)))
    assert (steps[-1].step, steps[-1].total) == (len(steps), len(steps))
    assert len(steps) <= 3
    assert steps[-1].best.tolist() == pytest.approx([enough] * 2)
    assert steps[-1].failed.tolist() == [False, False]
    easy = Task(
        backend, Ceiling(COLOUR, 0.0, "easy"), PROMPTS, SAMPLING, seeds=()
    )  # on fresh noise nobody knows
    assert len(list(search(easy, text_adapter(), Script(["sun"] * 3), 3))) == 3
