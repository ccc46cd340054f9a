"""The recipe of the bundled rewriter: its captions, its arithmetic, and that it runs and resumes."""

import re

import numpy as np
import pytest
import torch

import ipgo
from ipgo.methods import Promptist
from ipgo.task import Task
from tools.emoji import loop, train_promptist, world
from tools.emoji.loop import Schedule


@pytest.fixture(scope="module")
def tokens():
    return train_promptist.tokenizer()


def test_rich_captions_keep_the_plain_ones_and_add_quality():
    rng = np.random.default_rng(0)
    pairs = [train_promptist.pair(rng) for _ in range(300)]
    usual = 0
    for plain, rich in pairs:
        assert rich.removeprefix(f"{plain}, ") in world.CLEAN_WORDS
        usual += rich == f"{plain}, {train_promptist.QUALITY}"
        assert not re.search(r"\ba [aeio]|\ban [^aeiou]", plain)  # "an award winning icon", and "a unicorn"
    assert len({plain for plain, _ in pairs}) > 280
    assert usual == pytest.approx(265, abs=20)
    assert sum("background" in plain for plain, _ in pairs) == pytest.approx(240, abs=25)
    assert sum(plain.startswith("an award winning") for plain, _ in pairs) > 2


def test_only_the_rich_caption_is_learned(tokens):
    pairs = [
        ("a fox", "a fox, 3d, sharp"),
        ("a bee on a red background", "a bee on a red background, flat, clean"),
    ]
    ids, labels = train_promptist.encode(tokens, pairs)
    for row, (plain, rich) in enumerate(pairs):
        learned = labels[row] >= 0
        assert torch.equal(ids[row][learned], labels[row][learned])
        assert labels[row][learned][-1] == tokens.eos_token_id
        asked = ids[row][: int(learned.long().argmax())]
        given = tokens(f"{plain} Rephrase:", add_special_tokens=False).input_ids
        assert asked.tolist() == given
        written = tokens(rich, add_special_tokens=False).input_ids
        assert labels[row][learned][:-1].tolist() == written


def test_log_probabilities_end_with_the_text(tokens):
    torch.manual_seed(0)
    model = train_promptist.language_model(tokens).eval()
    end = tokens.eos_token_id
    ids = torch.tensor([[5, 6, 7, 8, end, end], [5, 6, 9, 10, 11, 12]])
    with torch.no_grad():
        found = train_promptist.log_probability(model, ids, 2)
        for row, count in ((0, 3), (1, 4)):
            alone = [
                model(input_ids=ids[row : row + 1, :place]).logits[0, -1].log_softmax(0)[ids[row, place]]
                for place in range(2, 2 + count)
            ]
            assert float(found[row]) == pytest.approx(float(sum(alone)), abs=1e-4)


def test_advantages_leave_the_own_reward_out_of_the_baseline():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[1 - 4.0, 2 - 3.5, 6 - 1.5], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(train_promptist.advantages(rewards), expected)


def test_the_recipe_runs_resumes_and_its_model_rewrites(tmp_path, monkeypatch, tokens):
    schedule = Schedule(steps=4, batch=4, lr=1e-3, warmup=1)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    encode, weights = train_promptist.encode, []
    batches = iter([encode] * 2)  # of the run that is stopped: the third is one too many
    for number, stopped in enumerate((False, True)):
        monkeypatch.setattr(loop, "BUILD", tmp_path / str(number))
        if stopped:
            monkeypatch.setattr(train_promptist, "encode", lambda *given: next(batches)(*given))
            with pytest.raises(StopIteration):
                train_promptist.train_supervised(schedule)
            monkeypatch.setattr(train_promptist, "encode", encode)
        train_promptist.train_supervised(schedule)
        model = loop.trained(train_promptist.SUPERVISED, train_promptist.language_model(tokens))
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    monkeypatch.setattr(train_promptist, "SAMPLING", ipgo.Sampling(steps=1))
    monkeypatch.setattr(train_promptist, "LONGEST", 6)
    short = Schedule(steps=2, batch=4, lr=1e-4, warmup=1)
    train_promptist.train_policy(short)
    climbed = loop.trained(train_promptist.FINAL, train_promptist.language_model(tokens)).state_dict()
    change = [(value - weights[1][name]).abs().max() for name, value in climbed.items()]
    assert 0 < max(change) < 0.01  # it began at the supervised weights

    other = {name: value + 1 for name, value in weights[1].items()}
    loop.keep(train_promptist.SUPERVISED, other)
    train_promptist.train_policy(short)
    again = loop.trained(train_promptist.FINAL, train_promptist.language_model(tokens)).state_dict()
    assert (
        max((again[name] - other[name]).abs().max() for name in other) < 0.01
    )  # as it did when these changed

    train_promptist.export(tmp_path / "rewriter")
    method = Promptist(model=str(tmp_path / "rewriter"), max_new_tokens=8)
    backend = ipgo.load_backend("emoji", device="cpu")
    task = Task(backend, ipgo.load_reward("colorfulness", device="cpu"), ("a fox",), ipgo.Sampling(steps=1))
    (step,) = method.fit(task)
    assert step.adapter.texts[0]
    assert step.rewards.isfinite().all()


def test_the_policy_writes_more_of_what_is_rewarded(tmp_path, monkeypatch, tokens):
    """The number of tokens is the reward: texts grow longer, and shorter where its sign is turned."""
    monkeypatch.setattr(loop, "BUILD", tmp_path)
    monkeypatch.setattr(train_promptist, "LONGEST", 8)
    monkeypatch.setattr(train_promptist, "KL", 0.0)
    monkeypatch.setattr(ipgo, "load_backend", lambda *given, **options: None)
    torch.manual_seed(0)
    model = train_promptist.language_model(tokens)
    with torch.no_grad():  # ends half of the texts after a token or two
        model.transformer.ln_f.bias.copy_(5 * model.lm_head.weight[tokens.eos_token_id])
    loop.keep(train_promptist.SUPERVISED, model.state_dict())
    lengths = {}
    for sign in (1, -1):
        told: list[float] = []

        class Counted:
            def __init__(self, backend, sign=sign, told=told):
                self.sign, self.told = sign, told

            def __call__(self, plain, texts, seeds):
                counts = torch.tensor([float(len(tokens(text).input_ids)) for text in texts])
                self.told.append(counts.mean().item())
                return self.sign * counts

        monkeypatch.setattr(train_promptist, "Judged", Counted)
        loop.renew(train_promptist.FINAL)
        train_promptist.train_policy(Schedule(steps=30, batch=32, lr=1e-3, warmup=1))
        lengths[sign] = told[0], sum(told[-8:]) / 8
    assert lengths[1][1] > lengths[1][0] + 1 > lengths[-1][1] + 1, lengths


def test_the_reward_of_a_rewriting_is_that_of_promptist(monkeypatch):
    judged = train_promptist.Judged.__new__(train_promptist.Judged)
    drawn = {"a fox": 0.0, "a fox, sharp": 1.0, "a bus": 2.0}
    quality = {0.0: 0.5, 1.0: 0.75, 2.0: 1.0}
    relevance = {0.0: 0.5, 1.0: 0.75, 2.0: 0.25}

    def generate(backend, texts, seeds, adapter, sampling):
        assert seeds == [1, 2] * 3
        return torch.tensor([drawn[text] for text in texts])

    judged.backend = None
    judged.quality = lambda images, prompts: torch.tensor([quality[float(image)] for image in images])
    judged.relevance = lambda images, prompts: torch.tensor([relevance[float(image)] for image in images])
    monkeypatch.setattr(train_promptist.ipgo, "generate", generate, raising=False)
    monkeypatch.setattr(train_promptist, "shorten", lambda backend, text: text)
    rewards = judged("a fox", ["a fox, sharp", "a bus"], [1, 2])
    assert rewards.tolist() == [0.25, 0.5 - 2.0 * 0.25]


def test_a_schedule_ends_after_its_steps_or_its_seconds():
    by_steps, by_time = Schedule(100, 8, 1e-3, warmup=10), Schedule(100, 8, 1e-3, warmup=10, seconds=60)
    assert [by_steps.over(steps, 1e6) for steps in (99, 100)] == [False, True]
    assert [by_time.over(10**6, elapsed) for elapsed in (59.0, 60.0)] == [False, True]
    assert by_steps.rate(4, 59.0) == by_time.rate(4, 59.0) == pytest.approx(5e-4)
    assert by_steps.rate(55, 0.0) == by_time.rate(55, 30.0) == pytest.approx(5e-4)
    assert by_steps.rate(100, 0.0) == by_time.rate(11, 60.0) == pytest.approx(0)
