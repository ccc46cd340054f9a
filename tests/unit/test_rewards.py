"""Rewards: their contract, their names, their sums."""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ipgo.errors import InputError, RewardError
from ipgo.rewards import (
    Ceiling,
    WeightedSum,
    as_reward,
    check_reward,
    combine,
    has_gradient,
    identity_of,
    is_unsettled,
    load_reward,
    needs_prompts,
    parts,
    score,
    score_each,
    terms,
    terms_of,
)
from ipgo.rewards.own import read_function

IMAGES = torch.rand((3, 3, 8, 8), generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["colorfulness", "contrast"])
@pytest.mark.parametrize("count", [1, 3])
def test_pixel_rewards_keep_the_contract(name, count):
    reward = load_reward(name, device="cpu")
    images = IMAGES[:count].clone().requires_grad_()
    values = score(reward, images, PROMPTS[:count])
    assert reward.name == name
    assert reward.differentiable
    values.sum().backward()
    assert images.grad.isfinite().all()
    torch.testing.assert_close(values[0], score(reward, IMAGES[:1], PROMPTS[:1])[0])  # rows on their own


def test_colorfulness_is_that_of_its_paper():
    red, green, blue = (IMAGES[0] * 255).double()
    rg, yb = red - green, (red + green) / 2 - blue
    spread = (rg.std(correction=0) ** 2 + yb.std(correction=0) ** 2) ** 0.5
    expected = spread + 0.3 * (rg.mean() ** 2 + yb.mean() ** 2) ** 0.5
    value = load_reward("colorfulness", device="cpu")(IMAGES[:1], ["a"])
    assert value.item() * 255 == pytest.approx(expected.item(), rel=1e-5)


def test_flat_images_have_no_contrast_but_a_gradient():
    flat = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    for name in ("colorfulness", "contrast"):
        value = load_reward(name, device="cpu")(flat, ["a"])
        assert value.item() < 1e-5
        value.sum().backward()
    assert flat.grad.isfinite().all()


def test_contrast_weighs_the_channels_as_luma_does():
    for channel, weight in enumerate((0.2126, 0.7152, 0.0722)):
        images = torch.zeros(1, 3, 4, 4)
        images[:, channel, :, :2] = 1
        assert load_reward("contrast")(images, ["a"]).item() == pytest.approx(weight / 2, rel=1e-5)


def test_half_black_half_white_has_contrast_one_half():
    images = torch.zeros(1, 3, 4, 4)
    images[..., :2] = 1
    assert load_reward("contrast", device="cpu")(images, ["a"]).item() == pytest.approx(0.5)


def test_a_weighted_sum():
    reward = load_reward("colorfulness+0.5*contrast", device="cpu")
    parts = [load_reward(name, device="cpu")(IMAGES, PROMPTS) for name in ("colorfulness", "contrast")]
    torch.testing.assert_close(reward(IMAGES, PROMPTS), parts[0] + 0.5 * parts[1])
    assert reward.name == "colorfulness+0.5*contrast"
    assert reward.differentiable


def test_what_a_sum_adds_up_is_asked_once_with_it():
    asked = []

    def mine(images, prompts):
        asked.append(len(images))
        return images.mean((1, 2, 3))

    def load(name):
        return as_reward(mine, "mine") if name == "mine" else load_reward(name)

    whole = combine("0.5*mine<=0.4+contrast", load)
    rewards = {whole.name: whole, **terms_of(whole)}
    images, prompts = torch.rand(3, 3, 8, 8), ["a", "b", "c"]
    found = score_each(rewards, images, prompts)
    assert asked == [3]
    assert list(found) == ["0.5*mine<=0.4+contrast", "mine", "contrast"]
    for name, reward in rewards.items():
        torch.testing.assert_close(found[name], score(reward, images, prompts), rtol=0, atol=0)


def test_a_sum_follows_prompts_and_gradients_as_its_terms_do():
    deaf = load_reward("contrast", device="cpu")
    read = as_reward(lambda images, prompts: images.mean((1, 2, 3)), "read", differentiable=False)
    both = WeightedSum((deaf, read), (1.0, 1.0), "both")
    assert both.uses_prompts
    assert not both.differentiable


def test_a_reward_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def warmth(images, prompts):\n    return (images[:, 0] - images[:, 2]).mean((1, 2))\n")
    reward = load_reward(f"2*{file}:warmth", device="cpu")
    torch.testing.assert_close(reward(IMAGES, PROMPTS), 2 * (IMAGES[:, 0] - IMAGES[:, 2]).mean((1, 2)))
    with pytest.raises(InputError, match=r"unknown reward in .*'warmht'; did you mean 'warmth'"):
        check_reward(f"{file}:warmht")
    file.write_text("1 / 0")
    with pytest.raises(InputError, match="does not run: ZeroDivisionError"):
        check_reward(f"{file}:warmth")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("colourfulness", "unknown reward 'colourfulness'; did you mean 'colorfulness'"),
        ("x*contrast", "reward weight 'x'"),
        ("contrast+", "is empty"),
        ("nan*contrast", "reward weight 'nan' in 'nan[*]contrast' must be a finite number"),
        ("contrast+0*colorfulness", "reward weight '0'"),
        ("mine.py", "reward 'mine.py' names no function; write mine.py:FUNCTION"),
        ("nowhere.py:warmth", "'nowhere.py' does not exist"),
    ],
)
def test_wrong_specs_are_refused(spec, message):
    for load in (check_reward, load_reward):
        with pytest.raises(InputError, match=message):
            load(spec)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images, prompts: images.mean(), r"'mine' must return a tensor of shape \(3,\), not \(\)"),
        (lambda images, prompts: [0.0] * 3, r"'mine' must return a tensor of shape \(3,\), not list"),
        (
            lambda images, prompts: images.mean((1, 2, 3)) * float("nan"),
            "'mine' is not a finite number for 3 of 3",
        ),
    ],
)
def test_a_broken_reward_is_named(function, message):
    with pytest.raises(RewardError, match=message):
        score(as_reward(function, "mine"), IMAGES, PROMPTS)


@pytest.mark.parametrize("error", [KeyError("left"), SystemExit(3), ValueError()])
def test_a_reward_that_fails_is_named_with_its_error_and_line(error):
    def mine(images, prompts):
        raise error

    line = mine.__code__.co_firstlineno + 1
    with pytest.raises(RewardError, match=rf"^reward 'mine' fails: {type(error).__name__}.*line {line}\)$"):
        score(as_reward(mine), IMAGES, PROMPTS)


def test_errors_that_are_not_the_rewards_own_pass():
    def mine(images, prompts):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        score(as_reward(mine), IMAGES, PROMPTS)


def brighter(factor):
    return lambda images, prompts: images.mean((1, 2, 3)) * factor


def weighed(images, prompts, factor):
    return images.mean((1, 2, 3)) * factor


def counting():
    calls, kept = 0, []

    def mine(images, prompts):
        nonlocal calls
        calls += 1
        kept.append(calls)
        return images.mean((1, 2, 3))

    return mine


def seen_through(network):
    return lambda images, prompts: network(images.mean((2, 3)))[:, 0]


def filled(value, kind=torch.nn.Linear):
    module = kind(3, 1)
    torch.nn.init.constant_(module.weight, value)
    torch.nn.init.zeros_(module.bias)
    return module


class Rating(torch.nn.Linear):
    def forward(self, images, prompts):
        return super().forward(images.mean((2, 3)))[:, 0]


def weights_of(function):
    return identity_of(as_reward(function, "mine"))["weights"]


def two_functions():
    one = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    other = lambda images, prompts: images.sum((1, 2, 3))  # noqa: E731
    return one, other


def different_rewards():
    """Name by name, for a second process too."""
    first, second = two_functions()
    relu, tanh = (torch.nn.Sequential(filled(0.1), kind()) for kind in (torch.nn.ReLU, torch.nn.Tanh))
    return {
        "first": first,
        "second": second,
        "number": brighter(1.0),
        "another number": brighter(2.0),
        "array": brighter(np.array([1.0])),
        "another array": brighter(np.array([2.0])),
        "numpy's number": brighter(np.float32(2)),
        "tensor": brighter(torch.tensor(3.0)),
        "function": brighter(two_functions),
        "another function": brighter(counting),
        "partial": functools.partial(weighed, factor=1.0),
        "another partial": functools.partial(weighed, factor=2.0),
        "weights": filled(0.1, Rating),
        "other weights": filled(0.2, Rating),
        "method": filled(0.1, Rating).forward,
        "network": seen_through(relu),
        "network of another make": seen_through(tanh),
        "without gradient": torch.no_grad()(brighter(1.0)),
    }


def test_rewards_of_ones_own_are_told_apart_by_what_they_compute():
    found = {name: weights_of(each) for name, each in different_rewards().items()}
    assert all(found.values())
    alike = [(a, b) for a, b in itertools.combinations(found, 2) if found[a] == found[b]]
    assert alike == [("number", "without gradient")]  # what is learned from it is not its number


LEVEL, NETWORK, LOADED = 1.0, filled(0.1), None


def seen_from_here(images, prompts):
    return NETWORK(images.mean((2, 3)))[:, 0] * LEVEL


def loaded_once():
    global LOADED
    LOADED = LOADED or filled(0.3)
    return LOADED


def loads(images, prompts):
    return loaded_once()(images.mean((2, 3)))[:, 0]


def test_what_a_function_takes_from_its_module_counts(monkeypatch):
    before, loading = weights_of(seen_from_here), weights_of(loads)
    monkeypatch.setattr(sys.modules[__name__], "LEVEL", 2.0)
    level = weights_of(seen_from_here)
    monkeypatch.setattr(sys.modules[__name__], "NETWORK", filled(0.2))
    assert len({tuple(each) for each in (before, level, weights_of(seen_from_here))}) == 3
    loads(torch.rand(1, 3, 4, 4), [""])
    assert weights_of(loads) == loading  # what a call makes once and keeps is no change


MODEL, DEVICE = None, "cpu"


def fill_model():
    global MODEL
    MODEL = filled(0.4)


def loads_elsewhere(images, prompts):
    if MODEL is None:
        fill_model()
    return MODEL(images.mean((2, 3)).to(DEVICE))[:, 0] + 0 * len(__file__)


def test_where_a_function_runs_is_not_what_it_computes(monkeypatch):
    before = weights_of(loads_elsewhere)
    loads_elsewhere(torch.rand(1, 3, 4, 4), [""])
    assert weights_of(loads_elsewhere) == before  # another function has filled the global
    here = sys.modules[__name__]
    monkeypatch.setattr(here, "DEVICE", "cuda:1")
    assert weights_of(loads_elsewhere) == before
    monkeypatch.setattr(here, "DEVICE", "elsewhere")  # no device: a text as any other
    assert weights_of(loads_elsewhere) != before


def test_dropout_and_batch_norm_in_training_mode_are_noticed():
    moody = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Dropout(0.5))
    for reward in (Rating(3, 1), seen_through(filled(0.1)), seen_from_here):
        assert not is_unsettled(as_reward(reward, "mine"))
    for reward in (seen_through(moody), functools.partial(seen_through(torch.nn.BatchNorm1d(3)))):
        assert is_unsettled(as_reward(reward, "mine"))
    # What is wrapped has no code.
    wrapped = functools.wraps(divmod)(lambda images, prompts: images.mean((1, 2, 3)))
    assert not is_unsettled(as_reward(wrapped, "mine"))
    backwards = brighter(np.arange(3.0)[::-1])
    assert weights_of(backwards) != weights_of(brighter(np.arange(3.0)))
    assert weights_of(brighter(np.maximum))  # has no numbers
    sparse, turned = torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64).conj()
    assert weights_of(brighter(sparse)) == weights_of(brighter(torch.eye(2)))
    assert weights_of(brighter(turned))
    assert not is_unsettled(as_reward(seen_through(torch.nn.Dropout(0.0)), "mine"))
    one, other = as_reward(seen_through(moody), "one"), as_reward(seen_from_here, "other")
    assert is_unsettled(WeightedSum((other, one), (1.0, 0.5), "both"))
    assert is_unsettled(as_reward(seen_through(torch.no_grad()(moody)), "mine"))
    moody.eval()
    assert not is_unsettled(as_reward(seen_through(moody), "mine"))


def test_an_identity_is_the_same_in_every_process():
    command = (
        "import json, sys; sys.path.insert(0, '.'); from tests.unit import test_rewards as t; "
        "print(json.dumps({name: t.weights_of(each) for name, each in t.different_rewards().items()}))"
    )
    environment = {**os.environ, "PYTHONNODEBUGRANGES": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "-W", "ignore", "-c", command]
    found = subprocess.run(words, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
    assert json.loads(found.stdout) == {name: weights_of(each) for name, each in different_rewards().items()}


def test_what_is_typed_into_a_session_is_told_apart_by_what_it_compiles_to():
    """No file has it, and perhaps nothing keeps its lines."""
    typed = """
import json, torch
from ipgo.rewards.base import as_reward, identity_of
class Base:
    unit = UNIT
class Net(torch.nn.Module, Base):
    def forward(self, images, prompts):
        return WEIGHT * images.mean((1, 2, 3))
class Plain(Base):
    def __call__(self, images, prompts):
        return WEIGHT * images.mean((1, 2, 3)) if "x" not in {"a", "b", "c"} else None
def function(images, prompts):
    return WEIGHT * images.mean((1, 2, 3))
print(json.dumps([identity_of(as_reward(each)) for each in (Net(), Plain(), function)]))
"""

    def known(weight: str, unit: str, seed: str) -> list[str]:
        text = typed.replace("WEIGHT", weight).replace("UNIT", unit)
        words = [sys.executable, "-c", text]
        return json.loads(subprocess.check_output(words, env={**os.environ, "PYTHONHASHSEED": seed}))

    first = known("2.0", "1", "0")
    assert known("2.0", "1", "1") == first
    assert all(a != b for a, b in zip(known("-2.0", "1", "0"), first, strict=True))
    net, plain, function = known("2.0", "2", "0")
    assert net != first[0]
    assert plain != first[1]
    assert function == first[2]


def test_where_a_file_is_does_not_count(tmp_path):
    text = "import os\nHERE = os.path.dirname(os.path.abspath(__file__))\nNAMES = HERE + '/names'\n"
    text += "def mine(images, prompts):\n    return images.mean((1, 2, 3)) + len([HERE, NAMES])\n"
    known = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "mine.py").write_text(text)
        known.append(identity_of(load_reward(f"{tmp_path}/{place}/mine.py:mine")))
    assert known[0] == known[1]


def test_a_reward_that_goes_to_another_folder_does_not_take_us_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    text = "import os\nos.chdir('other')\ndef mine(images, prompts):\n    os.chdir('/')\n"
    text += "    return images.mean((1, 2, 3))\n"
    (tmp_path / "mine.py").write_text(text)
    score(load_reward("mine.py:mine"), torch.rand(1, 3, 4, 4), ["a"])
    assert Path.cwd() == tmp_path


def test_two_functions_of_a_file_share_what_it_made(tmp_path):
    (tmp_path / "mine.py").write_text(
        "made = []\ndef one(images, prompts):\n    return images\ndef two(images, prompts):\n    return images\n"
    )
    spec = f"{tmp_path}/mine.py:"
    check_reward(f"{spec}one+{spec}two")
    first, second = (read_function(spec + name) for name in ("one", "two"))
    assert first.__globals__["made"] is second.__globals__["made"]
    assert (
        read_function(f"{spec}one").__globals__["made"] is not first.__globals__["made"]
    )  # for the next fit


def test_a_module_from_a_file_is_known_by_its_weights(tmp_path):
    file = tmp_path / "mine.py"
    text = """from __future__ import annotations
from dataclasses import dataclass
import torch

@dataclass
class Options:
    factor: float = 1.0

class Rating(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, images, prompts):
        return images.mean((1, 2, 3)) * self.factor

a, b = Rating(Options().factor), Rating(2.0)
"""
    file.write_text(text)
    first, second, again = (load_reward(f"{file}:{name}", device="cpu") for name in ("a", "b", "a"))
    parts = [identity_of(each)["weights"] for each in (first, second, again)]
    assert parts[0] == parts[2]
    assert parts[0][0] == parts[1][0] == hashlib.sha256(text.encode()).hexdigest()
    assert parts[0][1] != parts[1][1]


def test_a_function_may_close_over_itself_and_over_what_is_not_there_yet():
    def made(factor):
        def mine(images, prompts):
            return later(images) if len(images) < 2 else mine(images[:1], prompts) * factor

        found = weights_of(mine)

        def later(images):
            return images.mean((1, 2, 3))

        return found, weights_of(mine)

    one, two = made(1.0), made(2.0)
    assert len({tuple(each) for each in (*one, *two)}) == 4


def test_what_changes_from_call_to_call_is_no_part_of_an_identity():
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    for mine in (as_reward(counting()), as_reward(lambda images, prompts: network(images)[:, 0], "normed")):
        before = identity_of(mine)
        score(mine, IMAGES, PROMPTS)
        assert identity_of(mine) == before


def test_what_an_object_keeps_counts_and_what_it_counts_does_not():
    class Seen:
        def __init__(self, factor, value):
            self.factor, self.network, self.calls, self.started = factor, filled(value), 0, time.time()

        def __call__(self, images, prompts):
            self.calls += 1
            return self.network(images.mean((2, 3)))[:, 0] * self.factor

    @dataclasses.dataclass(frozen=True, slots=True)
    class Times:
        factor: float

        @torch.no_grad()
        def __call__(self, images, prompts):
            return images.mean((1, 2, 3)) * self.factor

    mine = Seen(1.0, 0.1)
    before = weights_of(mine)
    mine(torch.rand(1, 3, 4, 4), [""])
    assert weights_of(mine) == before == weights_of(Seen(2.0, 0.1))
    assert weights_of(Times(1.0)) == weights_of(Times(1.0)) != weights_of(Times(2.0))
    assert weights_of(Times(1.0))[0] == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    assert weights_of(Seen(1.0, 0.2)) != before
    assert weights_of(lambda images, prompts: mine(images, prompts)) != weights_of(mine)
    assert not is_unsettled(as_reward(mine, "mine"))
    mine.network = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Dropout(0.5))
    assert is_unsettled(as_reward(mine, "mine"))


USES = {
    "function": "from helper import compute\ndef mine(i, p):\n    return compute(i)\n",
    "module": "import helper\ndef mine(i, p):\n    return helper.compute(i)\n",
    "class": "from helper import Net\ndef mine(i, p):\n    return Net()(i)\n",
    "object": "from helper import Net\nNET = Net()\ndef mine(i, p):\n    return NET(i)\n",
    "model": "import helper\ndef mine(i, p):\n    return helper.MODEL(i)\n",
    "network": "from helper import Part\nPART = Part().eval()\ndef mine(i, p):\n    return PART(i)\n",
}
HELPER = """import torch
SIGN = {sign}
def compute(images):
    return SIGN * images.mean((1, 2, 3))
class Net:
    def __call__(self, images):
        return compute(images)
class Part(torch.nn.Module):
    def forward(self, images):
        return compute(images)
MODEL = Part().eval()
"""


@pytest.mark.parametrize("uses", USES)
def test_helpers_beside_a_reward_file_are_its_own_and_part_of_what_it_is(uses, tmp_path):
    found = {}
    for place, sign in (("a", 1), ("b", -1)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "helper.py").write_text(HELPER.format(sign=sign))
        (tmp_path / place / "mine.py").write_text(USES[uses])
        found[place] = load_reward(f"{tmp_path / place}/mine.py:mine")
    images = torch.rand(1, 3, 4, 4)
    assert torch.equal(score(found["a"], images, ["x"]), -score(found["b"], images, ["x"]))
    own = {place: identity_of(each)["weights"] for place, each in found.items()}
    assert own["a"] != own["b"]
    (tmp_path / "b" / "helper.py").write_text(HELPER.format(sign=1))
    again = load_reward(f"{tmp_path}/b/mine.py:mine")
    assert identity_of(again)["weights"] == own["a"]
    assert torch.equal(score(found["a"], images, ["x"]), score(again, images, ["x"]))


def test_odd_globals_have_an_identity(monkeypatch):
    class Box(dict):
        __getattr__ = dict.__getitem__

    class Counts:
        calls = 0

    here, counts = sys.modules[__name__], Counts()
    monkeypatch.setattr(here, "BOX", Box(a=1), raising=False)
    monkeypatch.setattr(here, "HUGE", 10**5000, raising=False)

    def mine(images, prompts):
        counts.calls += 1
        return images.mean((1, 2, 3)) * BOX.a / HUGE  # noqa: F821

    before = weights_of(mine)
    counts.calls += 1
    assert weights_of(mine) == before
    monkeypatch.setattr(here, "HUGE", 10**5000 + 1)
    assert weights_of(mine) != before


def test_when_a_file_was_read_is_not_what_it_computes(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import time\nSTART, TICK = time.time(), time.time_ns()\n"
        "def mine(images, prompts):\n    print(time.time() - START, TICK)\n    return images.mean((1, 2, 3))\n"
    )
    one, other = (load_reward(f"{tmp_path}/mine.py:mine") for _ in range(2))
    assert one.reward.function.__globals__["START"] < other.reward.function.__globals__["START"]
    assert identity_of(one) == identity_of(other)


def test_a_failure_is_said_with_the_users_own_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import json\n\ndef mine(images, prompts):\n    return json.loads('')\n")
    with pytest.raises(RewardError, match=r"JSONDecodeError: .* \(mine.py, line 4\)$"):
        score(load_reward(f"{file}:mine", device="cpu"), IMAGES, PROMPTS)
    file.write_text("def mine(:\n")
    with pytest.raises(InputError, match=r"does not run: SyntaxError: .*\(mine.py, line 1\)$"):
        load_reward(f"{file}:mine", device="cpu")


def test_a_broken_image_is_not_the_rewards_fault():
    images = IMAGES.clone()
    images[1, 0, 0, 0] = float("nan")
    values = score(as_reward(lambda images, prompts: images.mean((1, 2, 3)), "mine"), images, PROMPTS)
    assert values.isnan().tolist() == [False, True, False]


def test_a_function_is_a_reward():
    def warmth(images, prompts):
        return images[:, 0].mean((1, 2))

    reward = as_reward(warmth)
    assert (reward.name, reward.differentiable) == ("warmth", True)
    assert as_reward(reward) is reward
    for wrong, message in (
        (3, "reward 'int' is 3; it must be a function of"),
        (dict, "reward 'dict' is a class; give an object of it"),
        (lambda images: images, r"reward '<lambda>' takes \(images\); it must take \(images, prompts\)"),
    ):
        with pytest.raises(InputError, match=message):
            as_reward(wrong)


def test_a_ceiling_ends_what_can_be_gained() -> None:
    images = torch.rand((4, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images[:2] *= 0.2
    prompts = ["a"] * 4
    plain, below = load_reward("contrast"), load_reward("contrast<=0.1")
    values = score(plain, images, prompts)
    assert ((values > 0.1).tolist(), below.name) == ([False, False, True, True], "contrast<=0.1")
    assert torch.equal(score(below, images, prompts), values.clamp(max=0.1))
    leaf = images.clone().requires_grad_()
    score(below, leaf, prompts).sum().backward()
    assert leaf.grad.flatten(1).any(1).tolist() == [True, True, False, False]
    both = load_reward("colorfulness+2*contrast <= 0.1")
    expected = score(load_reward("colorfulness"), images, prompts) + 2 * values.clamp(max=0.1)
    torch.testing.assert_close(score(both, images, prompts), expected)
    assert identity_of(below) == {"id": "ceiling", "most": 0.1, "reward": identity_of(plain)}
    assert terms("2*emoji-clip<=0.6+contrast") == [(2.0, "emoji-clip"), (1.0, "contrast")]
    assert terms("contrast<=1e+0+2*colorfulness") == [(1.0, "contrast"), (2.0, "colorfulness")]
    assert has_gradient("contrast<=0.1")
    assert not has_gradient("emoji-judge<=0.1")
    assert not needs_prompts("contrast<=0.1")
    line = load_reward("cmd:test 1 <=2 {image}")
    assert not isinstance(line, Ceiling)  # what is in a command is the command's
    for spec, message in (
        ("contrast<=", "reward ceiling '' in 'contrast<=' is not a number"),
        ("contrast<=high", "reward ceiling 'high'"),
        ("contrast<=inf", "must be a finite number"),
        ("<=0.5", "is empty; write a name"),
        ("contras<=0.5", "unknown reward 'contras'; did you mean 'contrast'"),
    ):
        with pytest.raises(InputError, match=message):
            check_reward(spec)


def test_a_ceiling_under_another_name_is_one_still() -> None:
    contrast = load_reward("contrast", device="cpu")
    assert as_reward(Ceiling(contrast, 0.5, "capped"), "mine").most == 0.5
    assert as_reward(contrast, "mine").most == math.inf


def test_weights_and_ceilings_are_part_of_an_identity() -> None:
    specs = ("contrast<=0.5", "contrast<=0.6", "2*contrast", "3*contrast", "-1*contrast")
    found = [identity_of(load_reward(spec, device="cpu")) for spec in specs]
    assert all(a != b for a, b in itertools.combinations(found, 2))


def test_a_module_under_a_ceiling_is_looked_at() -> None:
    loose = as_reward(lambda images, prompts: images.mean((1, 2, 3)))
    assert parts(Ceiling(loose, 1.0, "x")) == (loose,)
    assert parts(WeightedSum((loose, Ceiling(loose, 1.0, "x")), (1.0, 2.0), "y")) == (loose, loose)
