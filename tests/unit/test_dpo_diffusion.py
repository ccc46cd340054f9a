"""Discrete prompts: the space of words, its relaxation, and the three solvers."""

import copy
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ipgo.adapters import Adapter, TextAdapter, generate
from ipgo.artefacts import load_adapter, save_adapter
from ipgo.backends import BACKENDS, load_backend
from ipgo.errors import InputError, ResumeError, RewardError
from ipgo.methods import DPODiffusion
from ipgo.methods.dpo_diffusion import _Words
from ipgo.relaxation import Mixture, Relaxation, shortcut
from ipgo.rewards import as_reward, load_reward, score
from ipgo.sampling import Sampling, denoise, unconditional
from ipgo.substitution import Space, Template, load_word_list, negative_slots, synonym_slots
from ipgo.task import Task
from tests.conftest import assert_same_state
from tools.emoji import word_list

PROMPTS = ("a red cat", "sun")
SAMPLING = Sampling(steps=2, guidance_scale=3.0)
REWARD = load_reward("colorfulness", device="cpu")
WORDS = {
    "synonyms": {"cat": ["dog", "kitty"], "red": ["sky", "teal"], "sun": ["moon", "son"]},
    "antonyms": {"red": ["blue", "gray"]},
    "negative": [["blurry", "dark"], ["low quality"]],
}


@pytest.fixture
def words(tmp_path):
    """A word list's file."""
    file = tmp_path / "words.json"
    file.write_text(json.dumps(WORDS))
    return str(file)


def proposer(method, task):
    return _Words(method, task, method.spaces(task))


def play(search, adapter, total, value):
    """Propose and tell `total` candidates, scored by `value` of a text and a negative text; all of them, by row."""
    seen = []
    for step in range(total):
        search.propose(adapter, step)
        seen.append(list(zip(adapter.texts, adapter.negatives, strict=True)))
        search.tell(step, torch.tensor([value(*pair) for pair in seen[-1]]))
    return [list(row) for row in zip(*seen, strict=True)]


def length(text, negative):
    return float(len(text) - len(negative))


# -- words -------------------------------------------------------------------------------------------------


def test_a_prompt_has_a_slot_at_every_word_that_has_others():
    words = load_word_list("emoji")
    template = synonym_slots("An orange to the left of grapes, FLAT", words)
    assert [slot[0] for slot in template.slots] == ["An orange", "to the left of", "grapes", "FLAT"]
    assert template.slots[0] == ("An orange", "a tangerine", "a mandarin")
    assert template.text([0, 0, 0, 0]) == "An orange to the left of grapes, FLAT"
    assert template.text([2, 1, 1, 1]) == "a mandarin left of a bunch of grapes, flat style"
    assert template.pieces([2, 1, 1, 1])[2:5] == [" ", "left of", " "]
    assert synonym_slots("a catalogue", words).slots == ()  # whole words only
    dotless = synonym_slots("a lıon and a fish", words)  # for `re`, not for `lower`, this is a lion
    assert [slot[0] for slot in dotless.slots] == ["a fish"]
    assert dotless.text([0]) == "a lıon and a fish"


def test_a_negative_prompt_lists_what_is_chosen():
    words = load_word_list("emoji")
    template = negative_slots("a cat on a teal background, flat style", words, "text")
    first = [slot[:3] for slot in template.slots]
    assert first[:3] == [
        ("", "fox", "dog"),
        ("", "red background", "yellow background"),
        ("", "3d", "3d style"),
    ]
    assert first[3:] == [("", *options)[:3] for options in words.negative]
    nothing = [0] * len(template.slots)
    assert template.text(nothing) == "text"
    assert template.text([0, 2, 1, *nothing[4:], 1]) == "text, yellow background, 3d, low quality"
    assert replace(template, fixed=("", *template.fixed[1:])).text([1, *nothing[2:], 1]) == "fox, low quality"


def test_the_shipped_list_is_the_worlds_and_says_only_what_the_model_knows():
    assert json.loads(word_list.FILE.read_text()) == word_list.build()
    known = set(json.loads((Path(BACKENDS["emoji"][1]) / "vocabulary.json").read_text())["words"])
    list_ = load_word_list("emoji")
    texts = [*list_.synonyms, *list_.antonyms, *sum(list_.negative, ())]
    texts += sum((*list_.synonyms.values(), *list_.antonyms.values()), ())
    assert set(re.findall(r"[^\s,]+", " ".join(texts))) <= known


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "must hold an object with synonyms, antonyms, negative"),
        ('{"synonym": {}}', "unknown part of word_list .* 'synonym'; did you mean 'synonyms'"),
        ('{"synonyms": ["cat"]}', "synonyms must be an object"),
        ('{"synonyms": {"cat": "dog"}}', "synonyms of 'cat' must be a list of words, none of them empty"),
        ('{"negative": [["dark", ""]]}', "negative must be a list of words, none of them empty"),
        ('{"negative": {"a": []}}', "negative must be a list of lists"),
    ],
)
def test_wrong_word_lists_are_refused(tmp_path, content, message):
    file = tmp_path / "words.json"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        load_word_list(str(file))


def test_a_word_list_that_is_not_there():
    with pytest.raises(InputError, match=r"'none\.json' does not exist"):
        load_word_list("none.json")
    with pytest.raises(InputError, match="unknown word_list 'emojy'; did you mean 'emoji'"):
        load_word_list("emojy")


# -- mixtures ----------------------------------------------------------------------------------------------


def test_with_one_hot_weights_a_mixture_is_the_text_itself(backend64, words):
    relaxation, list_ = Relaxation(backend64), load_word_list(words)
    templates = [synonym_slots("a red cat", list_), negative_slots("a red cat", list_, "")]
    for choices in zip(
        *(itertools.product(*(range(len(s)) for s in t.slots)) for t in templates), strict=False
    ):
        mixtures = [
            Mixture(template, choice, torch.eye(3, dtype=torch.float64)[list(choice)])
            for template, choice in zip(templates, choices, strict=True)
        ]
        texts = [mixture.text for mixture in mixtures]
        plain = backend64.encode(texts)
        with relaxation.mixed(mixtures):
            mixed = backend64.encode(texts)
        torch.testing.assert_close(mixed.embeds, plain.embeds, atol=1e-12, rtol=0)
        assert torch.equal(backend64.encode(texts).embeds, plain.embeds)  # the encoder is as it was


def test_a_mixture_stands_where_its_words_stand(backend64, pipe, monkeypatch):
    """Options of three tokens are mixed, the one of five counts as nothing."""
    template = Template(("a ", " on top"), (("cat", "dog", "kitty"),))
    weights = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    with Relaxation(backend64).mixed([Mixture(template, [1], weights)]):
        mixed = backend64.encode(["a dog on top"]).embeds
    table = backend64.modules["text_encoder"].get_input_embeddings()
    cat, dog = (table(pipe.tokenizer([f"a {name} on top"], padding="max_length", return_tensors="pt").input_ids)
                for name in ("cat", "dog"))  # fmt: skip
    by_hand = dog.clone()
    by_hand[:, 2:5] = 0.2 * cat[:, 2:5] + 0.5 * dog[:, 2:5]  # after the start's mark and "a"
    monkeypatch.setattr(table, "forward", lambda ids: by_hand)
    torch.testing.assert_close(mixed, backend64.encode(["a dog on top"]).embeds, atol=1e-12, rtol=0)


def test_a_text_that_is_cut_off_has_no_mixture(pipe):
    relaxation = Relaxation(load_backend(pipe, device="cpu", long_prompts="truncate"))
    template = Template(("x" * 80, ""), (("cat", "dog"),))
    with (
        pytest.raises(InputError, match="are cut off"),
        relaxation.mixed([Mixture(template, [0], torch.ones(1, 2))]),
    ):
        pass


def test_a_prompt_whose_words_cannot_be_mixed_is_refused_before_anything_is_drawn(pipe, words):
    backend = load_backend(pipe, device="cpu", long_prompts="truncate")
    task = Task(backend, REWARD, ("a red cat", "a red cat " + "x" * 80), SAMPLING)
    with pytest.raises(InputError, match=r"the tokens of prompt 'a red cat xxx.*' are cut off"):
        next(DPODiffusion("positive", solver="hybrid", word_list=words, candidates=2).fit(task))
    assert not backend.calls["denoiser"]


@pytest.mark.parametrize("target", ["positive", "negative", "both"])
def test_the_gradient_of_the_words_is_that_of_finite_differences(backend64, words, target):
    """At the first step, before which there is nothing that the gradient leaves out."""
    sampling = Sampling(steps=3, guidance_scale=3.0)
    task = Task(backend64, REWARD, PROMPTS, sampling)
    search = proposer(DPODiffusion(target, "gradient", words, window=(0.0, 0.3)), task)
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(search.allowed.shape, generator=source, dtype=torch.float64)
    choices = [[1 if len(slot) > 1 else 0 for slot in space.slots] for space in search.spaces]

    def rewards(logits):
        return search.mixed_rewards(logits, choices, [0, 1], 0)

    leaf = logits.clone().requires_grad_()
    backend64.calls.clear()
    (slope,) = torch.autograd.grad(rewards(leaf).sum(), leaf)
    assert backend64.calls["denoiser_grad"] == 2  # one call for each row
    assert (slope[search.allowed] != 0).all()  # every word, whatever its number of tokens
    assert (slope[~search.allowed] == 0).all()
    direction = torch.randn(logits.shape, generator=source, dtype=torch.float64)
    with torch.no_grad():
        high, low = (rewards(logits + step * direction).sum() for step in (1e-5, -1e-5))
    assert ((high - low) / 2e-5).item() == pytest.approx((slope * direction).sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "prediction"), [(None, "epsilon"), (None, "v_prediction"), ("euler", "epsilon")]
)
def test_the_shortcut_foresees_what_the_scheduler_does(make_pipe, scheduler, prediction):
    backend = load_backend(make_pipe(prediction_type=prediction), device="cpu", scheduler=scheduler)
    sampling = replace(SAMPLING, steps=3)
    cond = backend.encode(["sun"])
    uncond = unconditional(backend, cond, sampling)
    noise = backend.noise([0])
    walk = list(denoise(backend, cond, uncond, noise, sampling))
    cond.embeds.requires_grad_()
    for index in range(3):
        step, fresh = walk[index], backend.scheduler(3, noise[:, 0])
        scaled = fresh.scale_model_input(step.latents, step.timestep)
        output = backend.predict(scaled, step.timestep, cond, uncond, sampling.scale(backend))
        expected = fresh.step(output, step.timestep, step.latents).pred_original_sample
        backend.calls.clear()
        ours = shortcut(backend, cond, uncond, noise, sampling, index)
        assert backend.calls["denoiser"] == index + 1
        assert backend.calls["denoiser_grad"] == 1
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        slopes = [torch.autograd.grad(clean.square().mean(), cond.embeds)[0] for clean in (ours, expected)]
        torch.testing.assert_close(*slopes, atol=1e-5, rtol=1e-3)


def test_the_shortcut_of_a_model_that_predicts_the_image(make_pipe):
    backend = load_backend(make_pipe(prediction_type="sample"), device="cpu")
    sampling = replace(SAMPLING, steps=3)
    cond, noise = backend.encode(["sun"]), backend.noise([0])
    uncond = unconditional(backend, cond, sampling)
    for index, step in enumerate(denoise(backend, cond, uncond, noise, sampling)):
        ours = shortcut(backend, cond, uncond, noise, sampling, index)
        torch.testing.assert_close(ours, step.prediction, atol=1e-5, rtol=1e-5)


def test_the_shortcut_differentiates_one_call_of_pndm(make_pipe):
    """Which makes one more than there are steps."""
    backend = load_backend(make_pipe(), device="cpu", scheduler="pndm")
    sampling = replace(SAMPLING, steps=3)
    cond = backend.encode(["sun"])
    cond.embeds.requires_grad_()
    for index in range(4):
        backend.calls.clear()
        shortcut(backend, cond, unconditional(backend, cond, sampling), backend.noise([0]), sampling, index)
        assert (backend.calls["denoiser"], backend.calls["denoiser_grad"]) == (index + 1, 1)


def test_a_reward_with_weights_of_its_own_and_a_draw_of_no_words(backend, tmp_path):
    """What comes of the images wants a gradient then, though none of it is that of the words."""
    file = tmp_path / "words.json"
    file.write_text('{"negative": [["blurry"]]}')
    network = torch.nn.Conv2d(3, 1, 3)
    reward = as_reward(lambda images, prompts: network(images).mean((1, 2, 3)), "network")
    method = DPODiffusion("negative", "gradient", str(file), gradient_steps=4, candidates=4)
    task = Task(backend, reward, ("sun",), SAMPLING)
    search = proposer(method, task)
    empty = [(0,)]
    before = search.memory["logits"].clone()
    with torch.no_grad():
        search._climb(empty, 0)
    assert torch.equal(search.memory["logits"], before)


def test_the_first_step_of_the_gradient(backend64, words):
    """RMSprop from rest moves every logit by lr / sqrt(1 - 0.99) along the gradient's sign, and stays in range."""
    task = Task(backend64, REWARD, PROMPTS, SAMPLING)
    method = DPODiffusion("both", "gradient", words, lr=0.05)
    search, twin = proposer(method, task), proposer(method, task)
    choices = [twin._choose(row, 0) for row in range(2)]
    leaf = twin.memory["logits"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(twin.mixed_rewards(leaf, choices, [0, 1], 0).sum(), leaf)
    adapter = TextAdapter(PROMPTS)
    with torch.no_grad():
        search.propose(adapter, 0)
    clipped = slope.clamp(-0.025, 0.025)
    expected = (leaf.detach() + 0.05 * clipped / (0.1 * clipped.abs() + 1e-8)).clamp(0, 3)
    assert (slope.abs() > 1e-6).any()
    torch.testing.assert_close(search.memory["logits"], expected)
    assert adapter.texts == PROMPTS  # the first candidate is the prompt as it is
    assert adapter.negatives == ("", "")


def test_the_gradients_steps_are_those_of_rmsprop(backend64, words, monkeypatch):
    """torch's own, with the published numbers, on slopes that change and are clipped."""
    search = proposer(
        DPODiffusion("both", "gradient", words, lr=0.1), Task(backend64, REWARD, PROMPTS, SAMPLING)
    )
    start = search.memory["logits"].clone().fill_(1.5)
    search.memory["logits"].copy_(start)
    torch.manual_seed(0)
    slopes = 0.02 * torch.randn(4, *start.shape, dtype=start.dtype)
    monkeypatch.setattr(
        search, "mixed_rewards", lambda logits, choices, numbers, step: (logits * slopes[step]).sum((1, 2))
    )
    leaf = start.clone().requires_grad_()
    optimizer = torch.optim.RMSprop([leaf], lr=0.1, alpha=0.99, momentum=0.5, eps=1e-8, maximize=True)
    for step, slope in enumerate(slopes):
        search._climb([[0] * len(search.allowed[0])] * len(PROMPTS), step)
        leaf.grad = slope.clamp(-0.025, 0.025)
        optimizer.step()
        with torch.no_grad():
            leaf.clamp_(0, 3)
        torch.testing.assert_close(search.memory["logits"], leaf.detach())
    assert ((leaf > 0) & (leaf < 3) & (leaf != start)).any()


def test_the_temperature_and_the_window_are_those_that_are_asked_for(backend, words, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "ipgo.word_gradient.shortcut", lambda *given: seen.append(given[-1]) or shortcut(*given)
    )
    method = DPODiffusion(
        "positive", "gradient", words, gradient_steps=5, candidates=10, window=(0.2, 0.7), temperature=0.5
    )
    search = proposer(method, Task(backend, REWARD, PROMPTS[:1], replace(SAMPLING, steps=10)))
    logits = search.memory["logits"]
    with torch.no_grad():
        for step in range(5):
            search.mixed_rewards(logits, [[0, 0]], [0], step)
    assert seen == [2, 3, 4, 5, 6]
    weights = search.mixed.weights(logits, torch.zeros_like(logits), search.allowed)
    torch.testing.assert_close(weights, (logits / 0.5).softmax(-1))


def test_the_gradient_of_shared_words_is_the_mean_over_prompts(backend64, words):
    small = as_reward(lambda images, prompts: REWARD(images, prompts) * 1e-4, "small")  # far from the clip
    method = DPODiffusion("negative", "gradient", words, gradient_steps=1, candidates=2)
    slopes = []
    for prompt in PROMPTS:
        search = proposer(method, Task(backend64, small, (prompt,), SAMPLING, shared=True))
        leaf = search.memory["logits"].clone().requires_grad_()
        slopes.append(torch.autograd.grad(search.mixed_rewards(leaf, [[1, 1]], [0], 0).sum(), leaf)[0])
    search = proposer(method, Task(backend64, small, PROMPTS, SAMPLING, shared=True))
    with torch.no_grad():
        search._climb([[1, 1]], 0)
    expected = (sum(slopes) / 2).abs() * 0.1  # the root of a hundredth of its square
    torch.testing.assert_close(search.memory["squares"].sqrt(), expected, rtol=1e-4, atol=1e-14)


def test_no_more_than_half_of_the_candidates_are_gradient_steps():
    assert DPODiffusion(solver="gradient", gradient_steps=20, candidates=8).climbs == 4
    assert DPODiffusion(solver="hybrid", gradient_steps=3, candidates=8).climbs == 3
    assert DPODiffusion(solver="evolutionary").climbs == 0


# -- solvers -----------------------------------------------------------------------------------------------


def test_evolution_finds_the_best_of_a_thousand(backend):
    """Five words of four options each: every one has its own worth."""
    slots = tuple(tuple(f"{name}{n}" for n in "0123") for name in "abcde")
    space = Space(Template(("", *[" "] * 4, ""), slots))
    worth = {option: float(place * (3 - number % 3) % 7) for place, slot in enumerate(slots, 1)
             for number, option in enumerate(slot)}  # fmt: skip
    best = sum(max(worth[option] for option in slot) for slot in slots)
    reached = []
    for seed in range(4):
        method = DPODiffusion("positive", candidates=150)
        task = Task(backend, REWARD, PROMPTS[:1], SAMPLING, seed=seed)
        search = _Words(method, task, [space])
        (seen,) = play(
            search, TextAdapter(PROMPTS[:1]), 150, lambda text, _: sum(map(worth.get, text.split()))
        )
        assert len(set(seen)) == 150
        reached.append(max(sum(map(worth.get, text.split())) for text, _ in seen))
    assert reached == [best] * 4


def test_the_parents_are_so_many_of_the_best(backend):
    space = Space(Template(("", ""), (tuple("abcdefghij"),)))
    method = DPODiffusion("positive", candidates=40, population=10, parents=2, mutation=1e-9)
    search = _Words(method, Task(backend, REWARD, PROMPTS[:1], SAMPLING), [space])
    search.memory["choices"][0, :10, 0] = torch.arange(10)
    search.memory["rewards"][0, :10] = torch.tensor([0, 5, 1, 9, 2, 3, 4, 1, math.nan, 0])
    assert {int(search._draw(0, 10 + step, 0)) for step in range(10)} == {1, 3}


def test_a_mutation_changes_as_many_words_as_is_asked_for(backend):
    space = Space(Template(("", *[" "] * 39, ""), (tuple("abcdefghij"),) * 40))
    changed = []
    for mutation in (0.01, 0.9):
        method = DPODiffusion("positive", candidates=40, population=2, parents=1, mutation=mutation)
        search = _Words(method, Task(backend, REWARD, PROMPTS[:1], SAMPLING), [space])
        search.memory["rewards"][0, :2] = torch.tensor([1.0, 0.0])
        changed.append((search._draw(0, 2, 0) != 0).sum().item())
    assert changed[0] < 5 < 25 < changed[1]


@pytest.mark.parametrize("solver", ["gradient", "evolutionary", "hybrid"])
def test_each_solver_keeps_to_the_words_and_to_each_row(backend, words, solver):
    method = DPODiffusion("both", solver, words, candidates=12, gradient_steps=2, population=4, parents=3)
    task = Task(backend, REWARD, PROMPTS, SAMPLING)
    search = proposer(method, task)
    with torch.no_grad():
        rows = play(search, TextAdapter(PROMPTS), method.climbs + 12, length)
    for row, (prompt, seen) in enumerate(zip(PROMPTS, rows, strict=True)):
        space = search.spaces[row]
        every = [space.texts(choice) for choice in itertools.product(*(range(len(s)) for s in space.slots))]
        assert set(seen) <= set(every)
        assert seen[0] == (prompt, "")
        later = seen[method.climbs :]
        assert len(set(later)) == len(later)
        alone = proposer(method, replace(task, prompts=(prompt,)))
        with torch.no_grad():
            assert play(alone, TextAdapter((prompt,)), method.climbs + 12, length) == [seen]


@pytest.mark.parametrize("solver", ["gradient", "evolutionary", "hybrid"])
def test_a_draw_that_the_encoder_does_not_take_is_drawn_again(backend, tmp_path, solver):
    """With one token for each letter, only one of the four texts is short enough."""
    file = tmp_path / "words.json"
    file.write_text(json.dumps({"synonyms": {"cat": ["x" * 40], "dog": ["y" * 70]}}))
    prompt = "a cat and then also a dog"
    method = DPODiffusion(
        "positive", solver, str(file), candidates=4, gradient_steps=2, population=2, parents=1
    )
    *_, last = method.fit(Task(backend, REWARD, (prompt,), SAMPLING))
    assert last.adapter.texts[0] in (prompt, prompt.replace("cat", "x" * 40))


def test_the_word_list_is_that_of_the_backend():
    assert DPODiffusion().words_for("emoji") == "emoji"
    assert DPODiffusion().words_for(BACKENDS["emoji"][1]) == "emoji"
    assert DPODiffusion().words_for("sd15") == "wordnet"
    assert DPODiffusion(word_list="general").words_for("emoji") == "general"


def test_hybrid_begins_where_the_gradient_ends(backend, words):
    """Its first population is drawn from what was learned: here, that the second word is the one."""
    method = DPODiffusion("positive", "hybrid", words, candidates=9, gradient_steps=1, population=9)
    search = proposer(method, Task(backend, REWARD, ("cat",), SAMPLING))
    search.memory["logits"][0, 0] = torch.tensor([-50.0, 50.0, -50.0])
    assert {int(search._draw(0, 5, attempt)) for attempt in range(9)} == {1}
    search.memory["rewards"][0, :10] = torch.arange(10.0)
    search.memory["choices"][0, :10, 0] = 2
    assert int(search._draw(0, 11, 0)) == 2  # the parents', once there are any


def test_a_small_space_is_searched_to_the_end(backend, words):
    """Nine texts, drawn one by one by hand: the best of them is what is found."""
    task = Task(backend, as_reward(lambda x, _: (x > 0.5).float().mean((1, 2, 3)), differentiable=False), PROMPTS[:1],
                SAMPLING, seeds=(4,))  # fmt: skip
    last = list(DPODiffusion("positive", word_list=words, candidates=10).fit(task))[-1]
    texts = [f"a {red} {cat}" for red in ("red", "sky", "teal") for cat in ("cat", "dog", "kitty")]
    drawn = [task.reward(generate(backend, [text], [4], Adapter(), SAMPLING), [text]) for text in texts]
    assert last.best.item() == pytest.approx(torch.cat(drawn).max().item(), abs=1e-6)
    assert last.rewards.item() == pytest.approx(drawn[0].item(), abs=1e-6)  # used up: the prompt as it is
    (best,) = last.adapter.texts
    again = generate(backend, [best], [4], Adapter(), SAMPLING)
    assert task.reward(again, [best]).item() == pytest.approx(last.best.item(), abs=1e-6)


@pytest.mark.parametrize("solver", ["gradient", "evolutionary", "hybrid"])
def test_each_solver_resumes_with_the_same_bits(backend, words, solver):
    method = DPODiffusion("both", solver, words, candidates=4, gradient_steps=2, population=2, parents=2)
    task = Task(backend, REWARD, PROMPTS, SAMPLING)
    states = [step.state() for step in method.fit(task)]
    for begin in (1, 3):
        end = list(method.fit(task, resume=states[begin - 1]))[-1].state()
        assert_same_state(states[-1], end)
    with pytest.raises(ResumeError, match="other settings"):
        replace(method, candidates=9).fit(task, resume=states[0])


def test_a_shared_negative_prompt(backend, words, tmp_path):
    task = Task(backend, REWARD, PROMPTS, SAMPLING, shared=True)
    for solver in ("evolutionary", "gradient"):
        method = DPODiffusion("negative", solver, words, candidates=5, gradient_steps=1)
        last = list(method.fit(task))[-1]
        (negative,) = last.adapter.negatives
        choices = itertools.product(("", "blurry", "dark"), ("", "low quality"))
        assert negative in {", ".join(filter(None, pair)) for pair in choices}
        save_adapter(last.adapter, tmp_path / solver)
        ours = generate(backend, ["a dog"], [3], load_adapter(tmp_path / solver), SAMPLING)
        theirs = generate(backend, ["a dog"], [3], Adapter(), replace(SAMPLING, negative_prompt=negative))
        torch.testing.assert_close(ours, theirs)
        raw = score(REWARD, generate(backend, PROMPTS, [0, 0], Adapter(), SAMPLING), PROMPTS)
        assert last.best.mean() >= raw.mean() - 1e-6
    with pytest.raises(InputError, match="target must be 'negative', not 'both'"):
        DPODiffusion("both", word_list=words).fit(task)


def test_what_cannot_be_searched_is_refused(backend, tmp_path, words):
    task = Task(backend, REWARD, PROMPTS, SAMPLING)
    blind = replace(task, reward=as_reward(REWARD.function, "blind", differentiable=False))
    with pytest.raises(RewardError, match="'blind' has no gradient, which solver='hybrid' needs"):
        DPODiffusion(solver="hybrid").fit(blind)
    with pytest.raises(InputError, match=r"guidance_scale is 1.0; target='negative' needs one above 1"):
        DPODiffusion().fit(replace(task, sampling=replace(SAMPLING, guidance_scale=1.0)))
    distilled = copy.copy(backend)
    distilled.guidance = "distilled"
    for target in ("negative", "both"):
        with pytest.raises(InputError, match="has distilled guidance, which knows no negative prompt"):
            DPODiffusion(target).fit(replace(task, backend=distilled))
    with pytest.raises(InputError, match="has no words for prompt 'a moon' with target='positive'"):
        DPODiffusion("positive", word_list=words).fit(replace(task, prompts=("a moon",)))
    few = tmp_path / "few.json"
    few.write_text('{"synonyms": {"cat": ["dog"]}}')
    with pytest.raises(InputError, match="no words for a shared negative prompt"):
        DPODiffusion(word_list=str(few)).fit(replace(task, shared=True))
    for options, message in (
        ({"target": "neither"}, "unknown target 'neither'"),
        ({"solver": "evolution"}, "unknown solver 'evolution'; did you mean 'evolutionary'"),
        ({"population": 0}, "population is 0; it must be at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"window": (0.5, 0.3)}, r"window is \[0.5, 0.3\]"),
        ({"mutation": 2.0}, "mutation is 2.0"),
    ):
        with pytest.raises(InputError, match=message):
            DPODiffusion(**options)


def test_a_candidate_that_the_encoder_cannot_take_is_not_drawn(backend, tmp_path):
    file = tmp_path / "words.json"
    file.write_text(json.dumps({"synonyms": {"cat": ["dog", "x" * 80]}}))
    method = DPODiffusion("positive", word_list=str(file), candidates=6)
    search = proposer(method, Task(backend, REWARD, ("cat",), SAMPLING))
    (seen,) = play(search, TextAdapter(("cat",)), 6, length)
    assert {text for text, _ in seen} == {"cat", "dog"}
