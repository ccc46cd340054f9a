"""Optimisers that need values alone, and IPGO with them."""

import io
import math
import os
import sys
from dataclasses import replace

import pytest
import torch

from ipgo import optimizers
from ipgo.adapters import InsertionAdapter, generate
from ipgo.artefacts import load_adapter, save_adapter
from ipgo.errors import InputError, MissingExtraError, ResumeError
from ipgo.images import to_pil
from ipgo.insertion import Insertion
from ipgo.methods import BlackBoxIPGO
from ipgo.methods.black_box import _Points, searched
from ipgo.optimizers import CMA, TuRBO
from ipgo.rewards import as_reward, load_reward, score
from ipgo.sampling import Sampling
from ipgo.task import Task
from tests.conftest import assert_same_state

PROMPTS = ("a red cat", "sun")
SAMPLING = Sampling(steps=2, guidance_scale=3.0)
SMALL = Insertion(num_prefix=1, num_suffix=1, rank=3, cross_attention="none", norm=1.0, negative=False)


@pytest.fixture(params=["cma", "bayes"])
def method(request):
    """A small search with each optimiser."""
    pytest.importorskip({"cma": "cma", "bayes": "botorch"}[request.param])
    return BlackBoxIPGO(SMALL, request.param, candidates=7, population=4, initial=4)


def jpeg_size(images, prompts):
    """Thousands of bytes: a whole number of bytes has no gradient."""
    sizes = []
    for picture in to_pil(images):
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=90)
        sizes.append(len(stream.getvalue()) / 1000)
    return torch.tensor(sizes)


JPEG = as_reward(jpeg_size, differentiable=False)


def climb(optimizer, value, count):
    """Ask and tell; all points and values."""
    points, values = [], []
    for _ in range(count):
        points.append(optimizer.ask())
        values.append(value(points[-1]))
        optimizer.tell(points[-1], values[-1])
    return points, values


# -- optimisers --------------------------------------------------------------------------------------------


def test_cma_finds_the_top_of_a_quadratic_in_the_box():
    """Two coordinates of its top lie outside: the best point of the box has them at the wall."""
    pytest.importorskip("cma")
    top = torch.tensor([0.3, -0.7, 0.0, 0.9, 1.5, -2.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 4.0, 1.0, 1.0, 3.0], dtype=torch.float64)
    points, values = climb(CMA(6, 0), lambda x: float(-(weights * (x - top) ** 2).sum()), 700)
    assert torch.stack(points).abs().max() <= 1
    best = points[max(range(700), key=values.__getitem__)]
    torch.testing.assert_close(best, top.clamp(-1, 1), atol=0.01, rtol=0)


def test_an_unknown_value_counts_as_the_worst(monkeypatch):
    pytest.importorskip("cma")
    told, cma = [], CMA(4, 0, population=4)
    cma.ask()
    tell = cma.strategy.tell
    monkeypatch.setattr(cma.strategy, "tell", lambda points, costs: told.extend(costs) or tell(points, costs))
    for value in (1.0, math.nan, 3.0, 2.0):
        cma.tell(cma.ask(), value)
    assert told == [-1.0, -1.0, -3.0, -2.0]


def test_turbo_takes_an_unknown_value_for_the_worst():
    pytest.importorskip("botorch")
    turbo = TuRBO(2, 0, initial=9)
    for value in (1.0, math.nan, 3.0):
        turbo.tell(turbo.ask(), value)
    assert turbo._known() == [1.0, 1.0, 3.0]


def test_turbo_finds_the_top_of_a_quadratic_in_the_box():
    """Far better than as many points of its Sobol sequence."""
    pytest.importorskip("botorch")
    top = torch.tensor([0.3, -0.7, 1.5], dtype=torch.float64)

    def value(x):
        return float(-((x - top) ** 2).sum())

    points, values = climb(TuRBO(3, 0, initial=6), value, 20)
    assert torch.stack(points).abs().max() <= 1
    _, blind = climb(TuRBO(3, 0, initial=20), value, 20)
    most = value(top.clamp(-1, 1))
    assert most - max(values) < 0.02
    assert most - max(blind) > 5 * (most - max(values))


def test_the_trust_region_by_hand():
    pytest.importorskip("botorch")
    turbo, point = TuRBO(2, 0, initial=2), torch.zeros(2, dtype=torch.float64)
    lengths = []
    for value in (1.0, 2.0, *(3.0, 4.0, 5.0), *[5.0] * 4, 5.001, *[math.nan] * 4):
        turbo.tell(point, value)
        lengths.append(turbo.length)
    # Two to begin with; three successes; four failures; a gain too small to count is a fifth one.
    assert lengths == [0.8] * 4 + [1.6] + [1.6] * 3 + [0.8] + [0.8] * 3 + [0.4] * 2
    for _ in range(6 * 4):
        turbo.tell(point, 0.0)
    assert turbo.length == turbo.LENGTH  # a new region
    assert turbo.region == 1
    assert len(turbo.points) == 1


def test_the_region_grows_no_larger_than_its_limit():
    pytest.importorskip("botorch")
    turbo, point = TuRBO(2, 0, initial=1), torch.zeros(2, dtype=torch.float64)
    for value in range(1, 9):
        turbo.tell(point, float(value))
    assert turbo.length == turbo.LARGEST


@pytest.mark.parametrize("count", [0, 3, 9, 13])
@pytest.mark.parametrize(("name", "make"), [("cma", CMA), ("botorch", lambda *at: TuRBO(*at, initial=10))])
def test_an_optimiser_is_replayed_to_the_same_bits(name, make, count):
    pytest.importorskip(name)

    def value(x):
        return math.nan if x[0] > 0.7 else float(-(x**2).sum())

    straight, again = make(4, 5), make(4, 5)
    points, values = climb(straight, value, count)
    again.replay(points, values)
    pairs = zip(climb(straight, value, 3)[0], climb(again, value, 3)[0], strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    middle, second = climb(make(4, 5), value, 2)[0]
    assert not middle.any()
    assert not torch.equal(climb(make(4, 6), value, 2)[0][1], second)


def test_cma_does_not_go_on_from_another_ones_points():
    pytest.importorskip("cma")
    points, values = climb(CMA(4, 0), lambda x: 0.0, 3)
    with pytest.raises(ResumeError, match="cma asks for points other than"):
        CMA(4, 1).replay(points, values)


@pytest.mark.parametrize(("make", "extra"), [(CMA, "blackbox"), (TuRBO, "bayes")])
def test_what_is_missing_is_named(monkeypatch, make, extra):
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=rf'pip install "ipgo\[{extra}\]"'):
        make(4, 0)


def test_the_settings_reach_the_optimiser():
    pytest.importorskip("cma")
    small = BlackBoxIPGO(population=5, spread=0.25).make(6, 0)
    small.ask()
    assert len(small.generation) == 5
    assert small.strategy.sigma0 == 0.25
    pytest.importorskip("botorch")
    assert BlackBoxIPGO(optimizer="bayes", initial=7).make(6, 0).initial == 7
    assert BlackBoxIPGO(optimizer="bayes", candidates=8).make(6, 0).initial == 4


# -- the method --------------------------------------------------------------------------------------------


def test_a_point_is_coefficients_and_angles(backend):
    """A quadratic of them, told by hand: rows have tops of their own."""
    pytest.importorskip("cma")
    adapter = InsertionAdapter.start(backend, PROMPTS, SMALL, seed=0, shared=False).requires_grad_(False)
    basis = adapter.prefix.raw_basis.clone()
    method, size = BlackBoxIPGO(SMALL), 2 * (3 + 2)
    points = _Points([method.make(size, seed) for seed in (1, 2)], size, 600)
    tops = torch.tensor([[0.5], [-0.25]])
    for step in range(600):
        points.propose(adapter, step)
        parts = [parameter.flatten(1) / most for parameter, most in searched(adapter)]
        assert [part.shape[1] for part in parts] == [3, 2, 3, 2]
        points.tell(step, -(torch.cat(parts, dim=1) - tops).square().sum(1))
    best = points.rewards.argmax(1)
    found = points.points[torch.arange(2), best]
    torch.testing.assert_close(found, tops.double().expand(2, size), atol=0.1, rtol=0)
    assert torch.equal(adapter.prefix.raw_basis, basis)
    angles = math.pi * points.points[:, -1, 3:5].float()
    torch.testing.assert_close(adapter.prefix.angles.flatten(1), angles)


def test_a_reward_without_gradient_rises(backend, method, tmp_path):
    task = Task(backend, JPEG, PROMPTS, SAMPLING, seeds=(0, 1))
    steps = list(method.fit(task))
    rewards = torch.stack([step.rewards for step in steps])
    torch.testing.assert_close(steps[-1].best, rewards.max(0).values)
    assert steps[-1].best.mean() > rewards[0].mean()
    save_adapter(steps[-1].adapter.row(1), tmp_path)
    stored = load_adapter(tmp_path)
    drawn = [score(JPEG, generate(backend, ["sun"], [seed], stored, SAMPLING), ["sun"]) for seed in (0, 1)]
    torch.testing.assert_close(torch.stack(drawn).mean(0), steps[-1].best[1:])


def proposed(step, number):
    """The parameters that were drawn as candidate `number`, (D,)."""
    return step.state()["proposer.points"][0, number]


def test_an_external_command_is_climbed(backend, tmp_path):
    """The size of the PNG that a real program is given."""
    pytest.importorskip("cma")
    script = tmp_path / "score.sh"
    script.write_text('#!/bin/sh\nhead -c 4 "$1" | grep -q PNG && echo "$2" >> "$0.log" && wc -c < "$1"\n')
    script.chmod(0o755)
    reward = load_reward(f"cmd:{script} {{image}} {{prompt}}", device="cpu")
    steps = list(
        BlackBoxIPGO(SMALL, candidates=12, population=4).fit(Task(backend, reward, PROMPTS, SAMPLING))
    )
    rewards = torch.stack([step.rewards for step in steps])
    assert (tmp_path / "score.sh.log").read_text().splitlines() == [*PROMPTS] * 12
    assert ((rewards > 100) & (rewards == rewards.round())).all()  # bytes
    torch.testing.assert_close(steps[-1].best, rewards.max(0).values)
    assert (steps[-1].best > rewards[0]).all()
    images = generate(backend, PROMPTS, [0, 0], steps[-1].adapter, SAMPLING)
    assert torch.equal(score(reward, images, PROMPTS), steps[-1].best)


def test_ratings_that_a_person_types_are_climbed(backend, monkeypatch, capsys):
    """At a real terminal; what is no number is asked for again. The candidate that got the 5 is kept."""
    pytest.importorskip("cma")
    typed = ["3", "1", "four?", "4", "2", "5", "1", "", "2"]
    ratings = [float(line) for line in typed if line.isdigit()]
    master, slave = os.openpty()
    os.write(master, "".join(f"{line}\n" for line in typed).encode())
    with os.fdopen(slave, closefd=True) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        reward = load_reward("ask:how warm is it, 1 to 5?", device="cpu")
        task = Task(backend, reward, PROMPTS[:1], SAMPLING)
        steps = list(BlackBoxIPGO(SMALL, candidates=len(ratings), population=4).fit(task))
    os.close(master)
    assert [float(step.rewards) for step in steps] == ratings
    assert float(steps[-1].best) == 5
    best = torch.cat([parameter.flatten() / most for parameter, most in searched(steps[-1].adapter)])
    torch.testing.assert_close(best.double(), proposed(steps[-1], ratings.index(5)), atol=1e-6, rtol=0)
    asked = capsys.readouterr().err
    assert asked.count("how warm is it, 1 to 5?") == len(typed)
    assert asked.count("please type a number") == 2


def test_it_resumes_with_the_same_bits(backend, method):
    task = Task(backend, JPEG, PROMPTS, SAMPLING)
    states = [step.state() for step in method.fit(task)]
    end = list(method.fit(task, resume=states[4]))[-1].state()
    assert_same_state(states[-1], end)
    with pytest.raises(ResumeError, match="other settings"):
        replace(method, candidates=9).fit(task, resume=states[4])


def test_rows_are_searched_on_their_own(backend):
    pytest.importorskip("cma")
    method = BlackBoxIPGO(SMALL, candidates=7, population=4)
    task = Task(backend, JPEG, PROMPTS, SAMPLING)
    both, alone = list(method.fit(task)), list(method.fit(replace(task, prompts=PROMPTS[1:])))
    points = [steps[-1].state()["proposer.points"] for steps in (both, alone)]
    assert torch.equal(points[0][1:], points[1])


def test_each_prompt_and_each_random_seed_is_searched_elsewhere(backend):
    pytest.importorskip("cma")
    first, other = (
        list(BlackBoxIPGO(SMALL, candidates=2).fit(Task(backend, JPEG, PROMPTS, SAMPLING, seed=seed)))[-1]
        for seed in (0, 1)
    )
    assert not torch.equal(proposed(first, 1), proposed(other, 1))
    assert not torch.equal(*first.state()["proposer.points"][:, 1])


def test_one_set_of_embeddings_for_all(backend):
    pytest.importorskip("cma")
    last = list(BlackBoxIPGO(SMALL, candidates=5).fit(Task(backend, JPEG, PROMPTS, SAMPLING, shared=True)))[
        -1
    ]
    assert last.adapter.prompts is None
    assert last.state()["proposer.points"].shape == (1, 5, 10)
    assert generate(backend, ["a dog"], [1], last.adapter, SAMPLING).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"insertion": Insertion(basis="free")}, r"insertion\.basis is 'free'"),
        ({"optimizer": "cmaes"}, "unknown optimizer 'cmaes'"),
        ({"candidates": 0}, "candidates is 0; it must be at least 1"),
        ({"population": 1}, "population is 1; it must be at least 4"),
        ({"spread": 1.0}, "spread is 1.0"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        BlackBoxIPGO(**options)


def test_a_single_number_is_too_few_for_cma(backend):
    pytest.importorskip("cma")
    one = Insertion(num_prefix=1, num_suffix=0, rank=1, rotations="none", negative=False)
    with pytest.raises(InputError, match="at least 2 numbers to search for, not 1"):
        BlackBoxIPGO(one).fit(Task(backend, JPEG, PROMPTS, SAMPLING))
