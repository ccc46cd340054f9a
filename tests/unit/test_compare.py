"""Comparisons: budgets by hand, what is kept and resumed, and the table that is made of it."""

from __future__ import annotations

import csv
import dataclasses
import errno
import itertools
import json
import shlex
import shutil
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ipgo import (
    IPGO,
    Adapter,
    Ascent,
    DRaFT,
    InputError,
    InsertionAdapter,
    Progress,
    Run,
    Score,
    Task,
    budget,
    cli,
    files,
    generate,
    load_backend,
    load_reward,
    runner,
)
from ipgo import compare as work
from ipgo.backends import Backend
from ipgo.budget import BudgetSpent, Ledger, Price, ended, fit_to, length_of, measure, paid, step_cost, watch
from ipgo.chunks import Chunk, Cost
from ipgo.cli_compare import _other_half, comparisons, entries_of, read_comparison
from ipgo.comparison import Comparison, Plan, common_settings
from ipgo.config import RunConfig
from ipgo.insertion import Insertion
from ipgo.methods import METHODS, BestOfN, BlackBoxIPGO, Raw, TextCraftor
from ipgo.prompts import Prompt
from ipgo.report import comparison as page
from ipgo.report.identity import fingerprint, fingerprints, strangers
from ipgo.report.rows import _costs, matrices, own_scores, rows
from ipgo.rewards import identity_of, score
from ipgo.sampling import Sampling
from ipgo.task import Method
from tests.conftest import one_sentence, progress

PRICE = Price(2.0, 3.0)
PROMPTS = ("a fox", "a <b>lemon</b> | more")
BUDGET = 19
REWARD = load_reward("colorfulness", device="cpu")


@dataclasses.dataclass(frozen=True)
class Picky(Method):
    """Raw, but for foxes."""

    def _search(self, task: Task, resume: Mapping[str, Tensor] | None) -> Iterator[Progress]:
        if any("fox" in prompt for prompt in task.prompts):
            raise RuntimeError("no <i>foxes</i>")
        yield from Raw().fit(task)


@dataclasses.dataclass(frozen=True)
class Spender(Method):
    """Draws one image in its first step, two in its second, and so on."""

    def _search(self, task: Task, resume: Mapping[str, Tensor] | None) -> Iterator[Progress]:
        start = int(resume["step"]) if resume is not None else 0
        for step in range(start, 50):
            for _ in range(step + 1):
                images = generate(
                    task.backend, task.prompts, [0] * len(task.prompts), Adapter(), task.sampling
                )
            rewards = score(task.reward, images, list(task.prompts)).detach()
            yield progress(step + 1, rewards, 50)


class Counted:
    """As much of a backend as a ledger needs."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter(denoiser=100)


def steps_of(
    costs: list[list[int]], limit: float, earlier: int = 0
) -> tuple[list[tuple[int, int]], Counter[str]]:
    """(step, total) of each step that is passed on, of a search whose steps make so many calls each."""
    backend: Any = Counted()

    def search() -> Iterator[Progress]:
        for step, calls in enumerate(costs, 1):
            for count in calls:
                backend.calls.update({"denoiser": count})
            yield progress(step, [1.0], len(costs))

    found = watch(search(), backend, PRICE, limit, Counter(denoiser=earlier))
    return [(each.step, each.total) for each in found], backend.calls


# -- budgets by hand -----------------------------------------------------------------------------------------


def test_weighted_calls_by_hand() -> None:
    calls = {"denoiser": 10, "denoiser_grad": 4, "denoiser_grad_both": 3, "decoder": 99}
    assert PRICE.of(calls) == 6 * 1 + 1 * 2 + 3 * 3
    assert PRICE.of({}) == 0
    with pytest.raises(InputError, match=r"price.both is 0.5; it must be at least 1"):
        Price(1, 0.5)


def test_the_ledger_refuses_the_call_beyond_the_limit() -> None:
    ledger = Ledger(Counter(denoiser=7), PRICE, 4)
    ledger.update({"denoiser": 2, "denoiser_grad": 2})  # 4 spent
    ledger["decoder"] += 50
    with pytest.raises(BudgetSpent):
        ledger.update({"denoiser": 1})
    assert dict(ledger) == {"denoiser": 9, "denoiser_grad": 2, "decoder": 50}


def test_a_differentiated_call_is_refused_as_a_whole(pipeline_folder: str) -> None:
    """It would be paid for without its gradient."""
    backend = load_backend(pipeline_folder, device="cpu")
    task = Task(backend, load_reward("colorfulness"), ("a red cat",), Sampling(3, 3.0))
    search = IPGO(Insertion(1, 1, rank=4), Ascent(steps=2, backprop_steps=1)).fit(task)
    drawn = []
    hook = backend.modules["denoiser"].register_forward_hook(lambda *given: drawn.append(given))
    with pytest.raises(BudgetSpent):
        list(watch(search, backend, Price(3, 4), 3.5, {}))
    hook.remove()
    assert len(drawn) == 2
    assert dict(backend.calls) == {"denoiser": 2}


def test_a_search_ends_before_the_step_that_is_not_paid_for() -> None:
    assert steps_of([[3]] * 9, 10)[0] == [(1, 9), (2, 9), (3, 3)]
    assert steps_of([[3]] * 3, 9)[0] == [(1, 3), (2, 3), (3, 3)]
    found, calls = steps_of([[1], [2], [2, 2, 2], [1]], 6)  # 1 + 2 + 2 may be, but the third step is dearer
    assert found == [(1, 4), (2, 4)]
    assert calls["denoiser"] == 100 + 5  # its third call was refused
    assert type(calls) is Counter
    assert steps_of([[3]] * 9, 10, earlier=3)[0] == [(1, 9), (2, 2)]
    with pytest.raises(BudgetSpent):
        steps_of([[11]], 10)


def test_a_search_that_goes_on_need_not_begin_again() -> None:
    """Steps are counted from its beginning, not from where it goes on."""
    backend: Any = Counted()

    def search() -> Iterator[Progress]:
        for step, calls in ((7, 4), (8, 4), (9, 40)):
            for _ in range(calls):  # the last step is dearer, and broken off
                backend.calls.update({"denoiser": 1})
            yield dataclasses.replace(progress(step, [1.0], 20), over=4)

    assert [each.step for each in watch(search(), backend, PRICE, 40, Counter(denoiser=28))] == [7, 8]


def test_a_shared_search_that_a_budget_ends_has_not_failed() -> None:
    step = dataclasses.replace(progress(2), best=torch.tensor([1.0, float("nan")]))
    assert ended(step).failed.tolist() == [False, False]  # one row for all: the second was not visited yet
    own = ended(dataclasses.replace(step, adapter=Adapter(("a", "b"))))
    assert own.failed.tolist() == [False, True]
    assert own.total == 2


@pytest.mark.parametrize(
    ("ascent", "shared", "cost"),
    [
        (Ascent(backprop_steps=1), False, 20 + 1),
        (Ascent(backprop_steps=4), False, 20 + 1 + 3 * 2),
        (Ascent(backprop_steps=None), False, 20 + 1 + 19 * 2),
        (Ascent(backprop_steps=5, random_backprop=True), False, 20 + 1 + 2 * 2),
        (Ascent(backprop_steps=1, renoised=2), False, 20 + 1 + 2 * 2),
        (Ascent(backprop_steps=1, batch_size=2, accumulate=3), True, (20 + 1) * 6 / 2),
        (Ascent(backprop_steps=4, recompute=True), False, 20 + 1 + 3 * 2 + 4),
    ],
)
def test_what_a_step_costs_by_hand(ascent: Ascent, shared: bool, cost: float) -> None:
    config = RunConfig(("a", "b"), IPGO(Insertion(negative=False), ascent), shared=shared)
    assert step_cost(config, 20, PRICE) == cost


def test_one_prompts_share_of_the_cost_by_hand() -> None:
    chunk = Chunk((Prompt("0", "a"), Prompt("1", "b")))
    for prompts in (("a", "b"), None):
        adapter = InsertionAdapter(prompts, 32, Insertion(1, 1, basis="free", rotations="none"))
        found = runner.cost_of(Cost(Counter(denoiser=6), 3.0, 50.0, 2), chunk, adapter)
        assert (found["calls"], found["parameters"]) == ({"denoiser": 3}, 2 * 32)
        assert found["measured"] == {
            "seconds": 1.5, "peak_memory_mib": 50, "fitted_together": 2, "sessions": 2
        }  # fmt: skip


def test_costs_are_means_over_prompts() -> None:
    results = [
        {
            "cost": {
                "calls": {"denoiser": calls},
                "parameters": 7,
                "measured": {"seconds": seconds, "peak_memory_mib": memory, "fitted_together": together},
            }
        }
        for calls, seconds, memory, together in ((4, 1.0, 100, 4), (8, 3.0, 300, 2))
    ]
    found = _costs(results, PRICE)
    assert (found["calls"], found["weighted"]) == ({"denoiser": 6}, 6)
    assert (found["seconds"], found["memory"], found["together"]) == (2.0, 300, 4)


def test_the_length_that_a_budget_pays_for() -> None:
    assert step_cost(RunConfig(("a",), BlackBoxIPGO(), seeds=(0, 1)), 20, PRICE) == 40
    config = RunConfig(("a",), BestOfN(n=3))
    assert step_cost(config, 40, PRICE) == 40
    assert paid(config, 119, 40.0) == 2
    assert paid(config, 3000, 0.1 * 3) == 10000
    assert fit_to(config, "n", 2).method == BestOfN(n=2)
    ipgo = RunConfig(("a",), IPGO())
    assert fit_to(ipgo, "ascent.steps", 7).method == IPGO(ascent=dataclasses.replace(IPGO().ascent, steps=7))
    with pytest.raises(InputError, match=r"budget is 39; one step of 'best-of-n' needs 40.0 denoiser calls"):
        paid(config, 39, 40.0)
    with pytest.raises(InputError, match=r"budget is 29; a step on each of 3 seeds of 'ipgo' needs 30.0"):
        paid(RunConfig(("a",), IPGO(), seeds=(0, 1, 2)), 29, 10.0)
    # The weights' gradient goes through both halves of guidance from the first call on.
    assert step_cost(RunConfig(("a",), DRaFT(ascent=Ascent(backprop_steps=1))), 20, PRICE) == 20 + 2
    late = RunConfig(
        ("a",), TextCraftor(0.5, Ascent(backprop_steps=None))
    )  # the early calls get no tuned states
    assert step_cost(late, 8, PRICE) == 8 + 4 * 2
    drawn = RunConfig(("a",), TextCraftor(0.5, Ascent(backprop_steps=None, random_backprop=True)))
    assert step_cost(drawn, 8, PRICE) == 8 + 2 * (1 + 2 + 3 + 4 * 5) / 8
    assert step_cost(late, 8, PRICE, guided=False) == 8 + 1 + 3 * 2
    lv = RunConfig(("a",), DRaFT(ascent=Ascent(backprop_steps=1, renoised=2, recompute=True)))
    assert step_cost(lv, 20, PRICE) == 20 + 2 + 1 + 2 * 3 + 2


def test_a_measured_price_leaves_the_ledger(pipeline_folder: str) -> None:
    backend = load_backend(pipeline_folder, device="cpu")
    backend.calls["denoiser"] = 5
    price = measure(backend, PROMPTS, Sampling(steps=2))
    assert dict(backend.calls) == {"denoiser": 5}
    assert 1 <= price.gradient < 30
    assert all(parameter.grad is None for parameter in backend.modules["denoiser"].parameters())


# -- entries and plans ---------------------------------------------------------------------------------------


def test_entries_take_what_their_methods_need_and_what_the_file_says() -> None:
    file = {"small": {"method": {"insertion": {"rank": 5}}}, "dno": None, "bare": {"method": "raw"}}
    method = {"name": "ipgo", "ascent": {"lr": 0.5}}
    assert entries_of("small,dno,bare,best-of-n", file, method) == {
        "small": {"method": {"name": "ipgo", "ascent": {"lr": 0.5}, "insertion": {"rank": 5}}},
        "dno": {"sampling": {"eta": 1.0}, "method": {"name": "dno"}},
        "bare": {"method": {"name": "raw"}},
        "best-of-n": {"length": "n", "method": {"name": "best-of-n"}},
    }
    assert list(entries_of(None, file, method)) == ["small", "dno", "bare"]
    for names, found, message in (
        ("igpo", file, "unknown method or entry 'igpo'; did you mean 'ipgo'"),
        ("raw,raw", file, "'raw' is compared twice"),
        (None, {}, "methods is empty"),
        (None, {"x": {"method": "y"}}, "entry 'x' has method 'y'"),
    ):
        with pytest.raises(InputError, match=message):
            entries_of(names, found, method)


def test_an_entry_with_a_backend_of_its_own_has_its_defaults() -> None:
    own = {
        "turbo": {"backend": "sdxl-turbo", "method": "ipgo"},
        "sdxl": {"backend": "sdxl", "method": "ipgo"},
    }
    few = {"steps": 1, "guidance_scale": 1.0}
    whole = {"name": "ipgo", "ascent": {"backprop_steps": None}}
    common_is_usual = entries_of("ipgo,turbo", own, {})
    assert common_is_usual["turbo"] == {"backend": "sdxl-turbo", "sampling": few, "method": whole}
    assert common_is_usual["ipgo"] == {"method": {"name": "ipgo"}}
    common_is_few = entries_of("ipgo,turbo,sdxl", own, {}, "sd-turbo")
    assert common_is_few["ipgo"] == {"method": whole}
    assert common_is_few["turbo"] == common_is_usual["turbo"]
    usual = {"steps": 20, "guidance_scale": None}
    assert common_is_few["sdxl"] == {"backend": "sdxl", "sampling": usual, "method": {"name": "ipgo"}}
    own["turbo"]["sampling"] = {"steps": 4}
    assert entries_of("turbo", own, {})["turbo"]["sampling"] == {**few, "steps": 4}


def test_the_other_half_of_a_set_is_for_what_transfers(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("teal\npurple\n")
    assert _other_half("one:train?n=3&seed=1") == "one:test?n=3&seed=1"
    assert _other_half("one:train") == "one:test"
    assert _other_half(f"one:train?exclude={words}&n=25") == f"one:test?exclude={words}"  # which has fewer
    assert _other_half("one") is None
    assert _other_half("mixed:train") is None
    words.write_text("a\n")
    assert _other_half(f"one:train?exclude={words}") is None


def configs_of(name: str) -> dict[str, RunConfig]:
    """The settings of all entries of a bundled comparison."""
    settings = read_comparison(name)
    entries = entries_of(None, settings["entries"], settings.get("method") or {})
    common = common_settings(RunConfig(("a",), seeds=(0,)))
    plan = Plan(("a",), common, entries, 3000)
    plan.check()
    return {label: plan.config(label) for label in entries}


@pytest.mark.parametrize("name", comparisons())
def test_bundled_comparisons_are_plans_that_work(name: str) -> None:
    configs = configs_of(name)
    distinct = {str(config.identity()) for config in configs.values()}
    assert len(distinct) == len(configs)


@pytest.mark.parametrize(
    ("label", "changed"),
    [
        ("rotations-none", {"insertion.rotations": "none"}),
        ("basis-free", {"insertion.basis": "free"}),
        ("basis-free-no-rotations", {"insertion.basis": "free", "insertion.rotations": "none"}),
        ("unbounded", {"insertion.bounded": False}),
        ("rank-5", {"insertion.rank": 5}),
        ("rank-20", {"insertion.rank": 20}),
        ("rank-60", {"insertion.rank": 60}),
        ("prefix-20", {"insertion.num_prefix": 20, "insertion.num_suffix": 0}),
        ("suffix-20", {"insertion.num_prefix": 0, "insertion.num_suffix": 20}),
        ("length-1+1", {"insertion.num_prefix": 1, "insertion.num_suffix": 1}),
        ("length-4+4", {"insertion.num_prefix": 4, "insertion.num_suffix": 4}),
        ("length-20+20", {"insertion.num_prefix": 20, "insertion.num_suffix": 20}),
        ("conformity-0", {"ascent.penalty_weight": 0.0}),
        ("conformity-published", {"ascent.penalty_weight": 0.001}),
        ("conformity-1", {"ascent.penalty_weight": 1.0}),
        ("one-sided", {"insertion.negative": False}),
        ("k-1", {"ascent.backprop_steps": 1}),
        ("k-4", {"ascent.backprop_steps": 4}),
        ("k-6", {"ascent.backprop_steps": 6}),
        ("k-all", {"ascent.backprop_steps": None}),
        ("start-1", {"insertion.start": 1.0}),
        ("lr-basis-as-coefficients", {"ascent.lr_basis": None}),
        ("lr-basis-0.1x", {"ascent.lr_basis": 0.0001}),
        ("lr-coefficients-0.1x", {"ascent.lr": 0.0005}),
        ("lr-coefficients-2x", {"ascent.lr": 0.01}),
        ("lr-coefficients-5x", {"ascent.lr": 0.025}),
        ("unpadded", {"padding": "none"}),
        ("last-step", {"ascent.keep_best": False}),
        ("seeds-4", {"seeds": [0, 1, 2, 3]}),
    ],
)
def test_an_ablation_changes_what_it_is_called_and_nothing_else(
    label: str, changed: dict[str, Any], ablations: dict[str, RunConfig]
) -> None:
    base, own = ablations["ipgo"].identity(), ablations[label].identity()
    wanted = {name if name in base else f"method.{name}": value for name, value in changed.items()}
    assert {name: value for name, value in own.items() if base[name] != value} == wanted


@pytest.fixture(scope="module")
def ablations() -> dict[str, RunConfig]:
    return configs_of("ablations")


def test_what_the_ablations_are_measured_from_is_the_papers_middle(ablations: dict[str, RunConfig]) -> None:
    """(10, 10), an orthonormal basis of rank 300 where the encoder is as wide, and one seed."""
    method = ablations["ipgo"].method
    assert isinstance(method, IPGO)
    assert (method.insertion.num_prefix, method.insertion.num_suffix) == (10, 10)
    assert method.insertion.rank_of(10, 768) == 300
    assert (method.insertion.basis, method.insertion.rotations) == ("orthonormal", "applied")
    assert method.insertion.bounded
    assert ablations["ipgo"].seeds == (0,)
    assert (method.ascent.optimizer, method.ascent.lr, method.ascent.lr_basis) == ("adam", 0.005, 0.001)
    raw = ablations["raw-unpadded"]
    assert (raw.method_name, raw.padding) == ("raw", "none")


def test_systems_has_every_method_and_its_variants() -> None:
    configs = configs_of("systems")
    assert {config.method_name for config in configs.values()} == set(METHODS)
    assert configs["raw-unpadded"].padding == "none"
    own = {label: config.method for label, config in configs.items()}
    draft, dpo = METHODS["draft"], METHODS["dpo-diffusion"]
    assert own["draft"].ascent.backprop_steps == 1  # type: ignore[attr-defined]
    assert own["draft-lv"].ascent.renoised == 2  # type: ignore[attr-defined]
    assert own["alignprop"].ascent.random_backprop  # type: ignore[attr-defined]
    for label, method in own.items():
        shared = configs[label].shared
        assert shared == (label.endswith("-shared") or label == "ipgo-plus")
        if isinstance(method, draft) and shared:
            assert method == own[label.removesuffix("-shared")]
    solvers = {method.solver for method in own.values() if isinstance(method, dpo)}
    targets = {method.target for method in own.values() if isinstance(method, dpo)}
    assert solvers == {"gradient", "evolutionary", "hybrid"}
    assert targets == {"positive", "negative", "both"}


def test_variants_may_be_named_without_a_file() -> None:
    assert entries_of("raw-unpadded,draft-lv", {}, {}) == {
        "raw-unpadded": {"padding": "none", "method": {"name": "raw"}},
        "draft-lv": {"method": {"name": "draft", "ascent": {"renoised": 2}}},
    }
    own = {"draft-lv": {"method": {"name": "draft", "ascent": {"renoised": 7}}}}
    assert entries_of("draft-lv", own, {}) == own  # a file's labels go before
    with pytest.raises(InputError, match="unknown method or entry 'draft-lw'; did you mean 'draft-lv'"):
        entries_of("draft-lw", {}, {})


def test_every_method_has_the_length_that_is_said_of_it() -> None:
    common = common_settings(RunConfig(("a",), seeds=(0,)))
    plan = Plan(("a",), common, entries_of(",".join(METHODS), {}, {}))
    plan.check()
    without = {name for name in METHODS if length_of(plan.config(name).method, plan.length(name)) is None}
    assert without == {"raw", "chatgpt", "promptist"}  # they do not search


# -- a comparison on a tiny pipeline -------------------------------------------------------------------------


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "picky", Picky)
    monkeypatch.setitem(METHODS, "spender", Spender)


CONFIG = """
entries:
  raw:
  ipgo:
    method: {insertion: {num_prefix: 2, num_suffix: 1}, ascent: {lr: 0.01, backprop_steps: 2}}
  ipgo-once:
    method: {name: ipgo, insertion: {num_prefix: 2, num_suffix: 1}, ascent: {steps: 1, backprop_steps: 2}}
  best-of-n:
  picky:
  spender:
"""


def command(pipeline_folder: str, folder: Path, *flags: str) -> int:
    file = folder.parent / "entries.yaml"
    file.write_text(CONFIG)
    words = ["compare", *PROMPTS, "--config", str(file), "--budget", str(BUDGET), "--price", "2", "3"]
    words += ["--backend", pipeline_folder, "--reward", "colorfulness", "--held-out", "contrast"]
    words += ["--sampling.steps", "2", "--unseen-seeds", "2", "--out", str(folder)]
    return cli.main([*words, *flags])


@pytest.fixture(scope="module")
def compared(pipeline_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "picky", Picky)
        patch.setitem(METHODS, "spender", Spender)
        folder = tmp_path_factory.mktemp("compared") / "table"
        assert command(pipeline_folder, folder) == 1  # a prompt of picky failed
    return folder


@pytest.mark.usefixtures("fakes")
def test_nobody_spends_more_than_the_budget(compared: Path) -> None:
    folder = Comparison.open(compared)
    assert folder.plan.price == PRICE
    found = {row.label: row for row in rows(folder)}
    # ipgo: 2 calls an image, both with gradient through both halves, which weigh 3: 6 a step, 3 steps.
    # best-of-n: 2 a candidate. spender: 2 + 4 + 6, and 7 of the next 8.
    assert {label: row.weighted for label, row in found.items()} == {
        "raw": 2, "ipgo": 18, "ipgo-once": 6, "best-of-n": 18, "picky": 2, "spender": 19
    }  # fmt: skip
    assert found["ipgo"].calls == {"denoiser": 6, "denoiser_grad": 6, "denoiser_grad_both": 6, "decoder": 3}
    run = folder.run("ipgo")
    assert run is not None
    assert run.config.method.ascent.steps == 3  # type: ignore[attr-defined]
    assert [line["calls"]["denoiser"] for line in run.history(run.prompts[0])] == [2, 4, 6]
    assert found["ipgo"].curve[0][0] == 6
    assert found["ipgo"].curve[-1][0] == 18


@pytest.mark.usefixtures("fakes")
def test_a_failure_is_remembered_and_the_rest_goes_on(compared: Path) -> None:
    folder = Comparison.open(compared)
    failures = folder.failures()
    assert list(failures) == ["picky"]
    assert list(failures["picky"]) == ["a fox"]
    assert failures["picky"]["a fox"]["error"] == "RuntimeError: no <i>foxes</i>"
    assert "Traceback" in failures["picky"]["a fox"]["traceback"]
    picky = next(row for row in rows(folder) if row.label == "picky")
    assert (picky.finished, picky.failed, picky.prompts) == (1, 1, 2)


@pytest.mark.usefixtures("fakes")
def test_what_had_failed_is_fitted_alone_when_it_is_tried_again(
    compared: Path, pipeline_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its neighbour in the chunk is done, and paid for."""
    table, fitted = Path(shutil.copytree(compared, tmp_path / "table")), []

    def patient(self: Picky, task: Task, resume: Mapping[str, Tensor] | None) -> Iterator[Progress]:
        fitted.append(task.prompts)
        yield from Raw().fit(task)

    monkeypatch.setattr(Picky, "_search", patient)
    assert command(pipeline_folder, table) == 0
    assert fitted == [("a fox",)]
    assert Comparison.open(table).failures() == {}


def begun(folder: Path, entries: dict[str, Any]) -> Comparison:
    """A comparison of two prompts on one seed, of which nothing is drawn yet."""
    plan = Plan(("a", "b"), common_settings(RunConfig(("a", "b"), seeds=(0,))), entries)
    found = Comparison(folder, plan)
    with found.alone():
        found.start(plan, {})
    return found


def test_one_prompts_failure_is_forgiven_alone(tmp_path: Path) -> None:
    folder = begun(tmp_path / "table", {"ipgo": {}})
    folder.fail("ipgo", ["a", "b"], ValueError("x"))
    folder.forgive("ipgo", ["a"])
    assert list(folder.failures()["ipgo"]) == ["b"]
    folder.forgive("ipgo", ["b"])
    assert folder.failures() == {}


def test_a_prompt_that_was_given_up_counts_as_failed(tmp_path: Path) -> None:
    folder = begun(tmp_path / "table", {"ipgo": {}})
    run = Run.open(folder.folder("ipgo"), folder.plan.config("ipgo"))
    run.start({})
    prompt, adapter = run.prompts[0], InsertionAdapter(("a",), 8, Insertion(1, 1, rank=2))
    cost = runner.cost_of(Cost(Counter(denoiser=2), 1.0, 1.0), Chunk((prompt,)), adapter)
    scores = [Score(method, "a", 0, folder.plan.reward, 1.0, False) for method in ("raw", "ipgo")]
    run.save_adapter(prompt, adapter)
    run.finish(prompt, scores, cost, failed=True)
    run.release()
    (row,) = rows(folder)
    assert (row.finished, row.failed, row.title) == (1, 1, "ipgo (1 of 2 prompts)")


def test_a_full_disk_is_told_from_other_errors_of_files() -> None:
    assert work._full_disk(OSError(errno.ENOSPC, "full"))
    assert not work._full_disk(FileNotFoundError(errno.ENOENT, "gone"))
    assert not work._full_disk(ValueError())


@pytest.mark.usefixtures("fakes")
def test_an_entry_without_a_finite_image_has_no_mean(compared: Path, tmp_path: Path) -> None:
    shutil.copytree(compared, tmp_path / "table")
    for file in (tmp_path / "table/entries/ipgo/prompts").glob("*/result.json"):
        stored = files.read_json(file)
        files.write_json(
            file, {**stored, "scores": [each for each in stored["scores"] if each["method"] == "raw"]}
        )
    row = next(row for row in rows(Comparison.open(tmp_path / "table")) if row.label == "ipgo")
    assert row.means == (None, None)
    assert own_scores(row, "colorfulness", unseen=False) == []


def test_what_cannot_be_fitted_any_more_can_still_be_read(pipeline_folder: str, tmp_path: Path) -> None:
    """Entries of earlier versions, which were refused at their turn only, and stand in the plan."""
    flags = "--methods raw --reward contrast --held-out --sampling.steps 2 --price 2 3"
    words = ["compare", "a fox", "--backend", pipeline_folder, *flags.split()]
    assert cli.main([*words, "--out", str(tmp_path / "table")]) == 0
    stored = files.read_json(tmp_path / "table/plan.json")
    stored["plan"]["common"]["seeds"] = [0, 1]
    stored["plan"]["entries"]["hill"] = {
        "method": {"name": "ipgo", "ascent": {"steps": 1, "backprop_steps": 1}}
    }
    files.write_json(tmp_path / "table/plan.json", stored)
    assert [row.label for row in rows(Comparison.open(tmp_path / "table"))] == ["raw", "hill"]
    with pytest.raises(InputError, match=r"entry 'hill': .* 2 seeds, used in turn"):
        work.check(Comparison.open(tmp_path / "table"), ["raw", "hill"])
    # What another command left does not stop this one.
    work.check(Comparison.open(tmp_path / "table"), ["raw"])


def test_entries_that_share_models_run_one_after_another() -> None:
    entries: dict[str, Any] = {
        "raw": {"method": {"name": "raw"}},
        "bare": {"padding": "none"},
        "ipgo": {},
        "x": {"padding": "none"},
    }
    common = common_settings(RunConfig(PROMPTS))
    assert work._in_turn(Plan(PROMPTS, common, entries)) == ["raw", "ipgo", "bare", "x"]


@pytest.mark.usefixtures("fakes")
def test_two_processes_that_begin_at_once_have_one_price(compared: Path, tmp_path: Path) -> None:
    plan = dataclasses.replace(Comparison.open(compared).plan, price=None)
    entries = dict(plan.entries)
    first, second = (
        Comparison(tmp_path / "table", dataclasses.replace(plan, entries={name: entries[name]}))
        for name in ("raw", "ipgo")
    )
    with first.alone():
        first.start(dataclasses.replace(first.plan, price=PRICE), {})
    with second.alone():
        assert second.plan.price == PRICE
        assert list(second.plan.entries) == ["raw", "ipgo"]
        second.start(second.plan, {})
    first.fail("raw", ["a fox"], ValueError("one"))
    second.fail("ipgo", ["a fox"], ValueError("two"))
    assert list(first.failures()) == ["raw", "ipgo"]
    assert list(Comparison.open(tmp_path / "table").plan.entries) == ["raw", "ipgo"]


def test_what_failed_together_is_freed_before_it_is_tried_alone(
    pipeline_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    seen = []

    def hungry(run: Run, models: Any, chunk: Any, *rest: Any) -> Any:
        seen.append((len(chunk.prompts), sum(each() is not None for each in alive)))
        graph = torch.zeros(3, requires_grad=True) * 2
        alive.append(weakref.ref(graph))
        try:
            raise torch.OutOfMemoryError(str(graph.sum()))
        except torch.OutOfMemoryError as error:
            raise RuntimeError("wrapped") from error

    monkeypatch.setattr(work, "fit_chunk", hungry)
    flags = "--methods ipgo --reward contrast --held-out"
    words = ["compare", "a fox", "a cup", "--backend", pipeline_folder, *flags.split()]
    assert cli.main([*words, "--out", str(tmp_path / "table")]) == 1
    assert seen == [(2, 0), (1, 0), (1, 0)]


@pytest.mark.usefixtures("fakes")
def test_rows_say_what_the_runs_stored(compared: Path) -> None:
    folder = Comparison.open(compared)
    found = {row.label: row for row in rows(folder)}
    run = folder.run("ipgo")
    assert run is not None
    own = [
        each.value
        for each in run.scores()
        if (each.method, each.reward, each.seed) == ("ipgo", "colorfulness", 0)
    ]
    histories = [[line["reward"] for line in run.history(prompt)] for prompt in run.prompts]
    row = found["ipgo"]
    assert row.means[0] is not None
    assert row.means[0].value == pytest.approx(sum(own) / 2)
    assert row.final == pytest.approx((histories[0][-1] + histories[1][-1]) / 2)
    assert row.best == pytest.approx((max(histories[0]) + max(histories[1])) / 2)
    assert row.best == pytest.approx(row.means[0].value, abs=1e-5)  # the adapter is the best step's
    assert (row.transfers, found["best-of-n"].transfers) == ("unseen seeds", "nothing")
    assert set(row.unseen) == {"colorfulness", "contrast"}
    assert found["best-of-n"].unseen == {}
    assert found["best-of-n"].means[1] is None
    assert found["raw"].fitted == {}


def test_candidates_on_several_seeds_compare_with_each_other(pipeline_folder: str, tmp_path: Path) -> None:
    """And what is learned from fresh noise does not, so that its last step counts."""
    flags = "--methods raw,dpo-diffusion,ddpo --seeds 0 1 1500 --reward colorfulness --held-out contrast"
    words = ["compare", "a red cat", "--backend", pipeline_folder, *flags.split(), "--budget", "24"]
    file = tmp_path / "entries.yaml"
    small = "{samples: 2, batch_size: 2, accumulate: 1}"
    own = f"dpo-diffusion: {{method: {{word_list: emoji}}}}, ddpo: {{method: {{ppo: {small}}}}}"
    file.write_text(f"entries: {{raw: {{}}, {own}}}")
    words += ["--config", str(file), "--price", "2", "3", "--sampling.steps", "2", "--unseen-seeds", "1"]
    assert cli.main([*words, "--out", str(tmp_path / "table")]) == 0
    folder = Comparison.open(tmp_path / "table")
    found = {row.label: row for row in rows(folder)}
    run = folder.run("dpo-diffusion")
    assert run is not None
    rewards = [line["reward"] for line in run.history(run.prompts[0])]
    assert len(rewards) == 4
    row = found["dpo-diffusion"]
    assert row.best == pytest.approx(max(rewards))
    assert row.final == pytest.approx(rewards[-1])
    assert row.means[0] is not None
    assert row.best == pytest.approx(row.means[0].value, abs=1e-5)
    assert row.curve[0][1] == pytest.approx(rewards[0])
    assert found["ddpo"].best == found["ddpo"].final
    fitted, unseen = matrices(rows(folder), "colorfulness")
    assert fitted.wins["raw", "dpo-diffusion"].n == 3  # seeds of the one prompt
    assert {each.seed for each in own_scores(row, "colorfulness", unseen=False)} == {0, 1, 1500}
    assert {each.seed for each in own_scores(row, "colorfulness", unseen=True)} == {1000}
    assert unseen.labels == ("raw", "dpo-diffusion", "ddpo")


@pytest.mark.usefixtures("fakes")
def test_matrices_are_win_rates_and_leave_out_what_does_not_transfer(compared: Path) -> None:
    fitted, unseen = matrices(rows(Comparison.open(compared)), "colorfulness")
    assert fitted.labels == ("raw", "ipgo", "ipgo-once", "best-of-n", "picky", "spender")
    assert unseen.labels == ("raw", "ipgo", "ipgo-once", "picky", "spender")
    for (a, b), rate in fitted.wins.items():
        assert rate.value + fitted.wins[b, a].value == 1
    assert fitted.wins["raw", "spender"].value == 0.5  # the same images
    assert fitted.wins["best-of-n", "raw"].value >= 0.5
    assert fitted.wins["picky", "raw"].n == 1


@pytest.mark.usefixtures("fakes", "no_models")
def test_a_damaged_plan_and_a_comparison_in_place_of_a_run_are_one_sentence(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("evaluate", "generate"):
        assert cli.main([command, str(compared)]) == 2
        assert (
            f"whose runs are in {compared}" in (said := one_sentence(capsys))
            or f"its runs are in {compared}" in said
        )
    plan = json.loads((compared / "plan.json").read_text())
    for damage in (
        {"plan": {}},
        {"plan": {**plan["plan"], "entries": []}},
        {"plan": {**plan["plan"], "price": [1]}},
    ):
        (tmp_path / "plan.json").write_text(json.dumps({**plan, **damage}))
        assert cli.main(["report", str(tmp_path)]) == 2
        assert "the plan of the comparison is damaged" in one_sentence(capsys)


@pytest.mark.usefixtures("fakes", "no_models")
def test_the_table_is_redrawn_without_a_model(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("comparison.html", "comparison.md", "comparison.csv")
    before = {name: (compared / name).read_bytes() for name in names}
    for name in names:
        (compared / name).unlink()

    assert cli.main(["report", str(compared)]) == 1
    printed = capsys.readouterr()
    assert "colorfulness, which was optimised" in printed.out
    assert "ipgo: failed: picky (RuntimeError" in printed.err
    assert {name: (compared / name).read_bytes() for name in names} == before
    assert cli.main(["compare", "--redraw", "--out", str(compared)]) == 1


@pytest.mark.usefixtures("fakes")
def test_the_page_is_self_contained_and_escapes_what_users_wrote(compared: Path) -> None:
    html = (compared / "comparison.html").read_text()
    assert "a &lt;b&gt;lemon&lt;/b&gt; | more" in html
    assert "no &lt;i&gt;foxes&lt;/i&gt;" in html
    for text in ("<b>lemon", "<i>foxes", "http://", "https://", 'src="/', "url("):
        assert text not in html
    # Raw and five others, but for a fox, and for the chosen noise where another is drawn.
    assert html.count("data:image/png;base64,") == 2 * (1 + 5) * 2 - 2 - 2
    for text in ("prefers-color-scheme: dark", "<svg", "Win rates on unseen noise", "peak MiB", "last step"):
        assert text in html
    table = (compared / "comparison.md").read_text()
    assert "no \\<i\\>foxes" in table
    bars = [line.replace("\\|", "").count("|") for line in table.splitlines()]
    assert {(x, y) for x, y in itertools.pairwise(bars) if x and y and x != y} == set()
    assert bars.count(9 + 1) == 2 + 6  # the first table: nine columns, a head and six entries
    raw = next(run for run in [Comparison.open(compared).run("raw")] if run is not None)
    own = [each.value for each in raw.scores() if each.reward == "contrast" and each.seed >= 1000]
    assert f"| raw | unseen | {sum(own) / len(own):.3f} |" in table
    lines = list(csv.DictReader((compared / "comparison.csv").read_text().splitlines()))
    level = next(
        each
        for each in lines
        if (each["entry"], each["reward"]) == ("raw", "contrast") and each["on"] == "unseen noise"
    )
    assert float(level["value"]) == pytest.approx(sum(own) / len(own))
    assert level["gain"] == level["last_step"] == ""
    line = next(
        x for x in lines if (x["entry"], x["on"], x["reward"]) == ("ipgo", "unseen noise", "contrast")
    )
    assert line["held_out"] == "True"
    assert float(line["value"]) - float(line["raw"]) == pytest.approx(float(line["gain"]))


@pytest.mark.usefixtures("fakes")
def test_a_stopped_comparison_goes_on_to_the_same_results(
    compared: Path, pipeline_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, folder, stops = Run.record, tmp_path / "table", 0
    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", -1.0)
    for allowed in (2, 4, 10):
        left = iter(range(allowed))

        def interrupt(*arguments: Any, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            record(*arguments)

        monkeypatch.setattr(Run, "record", interrupt)
        stops += command(pipeline_folder, folder) == 130
    assert stops == 3
    monkeypatch.setattr(Run, "record", record)
    with monkeypatch.context() as patch:  # when spender's next step is not paid for, and nothing is drawn yet
        patch.setattr(work, "finish_chunk", interrupt)
        assert command(pipeline_folder, folder) == 130
    assert command(pipeline_folder, folder) == 1
    one, other = (rows(Comparison.open(place)) for place in (compared, folder))
    for a, b in zip(one, other, strict=True):
        assert (a.label, a.calls, a.scores, a.final, a.curve) == (
            b.label,
            b.calls,
            b.scores,
            b.final,
            b.curve,
        )


@pytest.mark.usefixtures("fakes")
def test_another_reward_of_the_same_name_is_refused(
    compared: Path, pipeline_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Comparison.open(compared).facts["rewards"].keys() == {"colorfulness", "contrast"}
    other = {"id": "contrast", "version": 2}
    monkeypatch.setattr("ipgo.models.identity_of", lambda reward: other)
    assert command(pipeline_folder, compared) == 2
    assert "was scored by another 'colorfulness'" in capsys.readouterr().err


def test_a_reward_that_only_judges_fails_before_any_search_or_can_be_repaired(
    pipeline_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, out = tmp_path / "mine.py", tmp_path / "table"
    flags = "--methods raw,best-of-n --reward colorfulness --sampling.steps 2 --unseen-seeds 1 --budget 8"
    words = ["compare", "a fox", "--backend", pipeline_folder, "--out", str(out), *flags.split()]
    words += ["--price", "2", "2", "--held-out", f"{mine}:mine"]
    mine.write_text("def mine(images, prompts):\n    raise ValueError\n")
    assert cli.main(words) == 2
    assert "mine.py:mine' fails: ValueError (mine.py, line 2)" in capsys.readouterr().err
    assert not out.exists()
    whole = "def mine(images, prompts):\n    return images.mean((1, 2, 3))\n"
    alike = "    assert images[0].equal(images[-1])\n"  # as the two copies of the picture that it is tried on
    mine.write_text(whole.replace("    return", f"{alike}    return"))
    assert cli.main(words) == 1  # every entry fails, with its picture of two seeds
    mine.write_text(whole)
    assert cli.main(words) == 0
    folder = Comparison.open(out)
    assert folder.scored
    assert folder.facts["rewards"][f"{mine}:mine"] == identity_of(load_reward(f"{mine}:mine"))
    mine.write_text(whole + "\n")
    assert cli.main(words) == 2
    assert "the scores are not comparable" in capsys.readouterr().err


@pytest.mark.usefixtures("fakes")
def test_another_backend_in_the_same_folder_is_refused(
    compared: Path, pipeline_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {row.weights for row in rows(Comparison.open(compared))} == {
        Comparison.open(compared).facts["weights"]
    }
    monkeypatch.setattr(Backend, "identity", {"dtype": "float32", "weights": "other"})
    assert command(pipeline_folder, compared) == 2
    assert "was drawn by a backend with other weights" in capsys.readouterr().err


@pytest.mark.usefixtures("fakes")
def test_entries_that_another_reward_has_scored_are_marked(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(compared, tmp_path / "table"))
    for label, name in (("ipgo-once", "colorfulness"), ("spender", "contrast")):
        about = folder / "entries" / label / "run.json"
        facts = files.read_json(about)
        facts["rewards"][name]["weights"] = ["00"]
        files.write_json(about, facts)
    about = folder / "entries" / "best-of-n" / "run.json"
    files.write_json(about, {key: value for key, value in files.read_json(about).items() if key != "rewards"})
    assert cli.main(["compare", "--redraw", "--out", str(folder)]) == 1
    error = capsys.readouterr().err
    first = "ipgo-once: not scored by the colorfulness that scored raw"
    second = "spender: not scored by the contrast that scored raw"
    table, html = ((folder / f"comparison.{kind}").read_text() for kind in ("md", "html"))
    for text in (error, table, html):
        assert first in text
        assert second in text
    assert "| ipgo-once † |" in table
    assert table.count("†: scored by another") == 2
    entries = rows(Comparison.open(folder))
    (line,) = (line for line in table.splitlines() if line.startswith("| spender | unseen |"))
    assert line.endswith(" † |")
    fitted, unseen = matrices(entries, "colorfulness")
    for matrix in (fitted, unseen):
        # Of best-of-n nothing is known, so nothing speaks against it.
        assert not any("ipgo-once" in pair and "best-of-n" not in pair for pair in matrix.wins)
        assert ("ipgo", "spender") in matrix.wins
    assert ("ipgo", "best-of-n") in fitted.wins
    others = [each for each in entries if each.label != "ipgo-once"]
    assert page.lead(entries, "colorfulness") == page.lead(others, "colorfulness")
    lines = list(csv.DictReader((folder / "comparison.csv").read_text().splitlines()))
    prints = {line["entry"]: line["reward_fingerprint"] for line in lines if line["reward"] == "colorfulness"}
    assert prints["ipgo"] == prints["spender"] != prints["ipgo-once"]
    assert prints["best-of-n"] == ""


def test_fingerprints_by_hand() -> None:
    one, other = {"id": "clip", "weights": ["a"]}, {"id": "clip", "weights": ["b"]}
    assert fingerprint(one) == fingerprint(dict(reversed(one.items()))) != fingerprint(other)
    same, mixed = (
        fingerprints([{"clip": one}, {}, {"clip": one}]),
        fingerprints([{"clip": one}, {"clip": other}]),
    )
    assert same == {"clip": (fingerprint(one),)}
    assert len(mixed["clip"]) == 2
    found = strangers([("x", {}), ("a", same), ("b", same), ("c", fingerprints([{"clip": other}]))])
    assert found == {"clip": ("a", ("c",))}
    assert strangers([("a", same), ("m", mixed)]) == {"clip": ("a", ("m",))}
    assert strangers([("a", same), ("b", same)]) == {}


@pytest.mark.usefixtures("fakes")
def test_another_plan_is_refused_with_what_differs(
    compared: Path, pipeline_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("entries: {ipgo: {method: {ascent: {backprop_steps: 1}}}}")
    for flags, message in (
        (["--budget", "20"], "budget 19 there, 20 now"),
        (["--seed", "5"], "common.seed 0 there, 5 now"),
        (["--config", str(other)], "entries.ipgo.method.ascent.backprop_steps 2 there, 1 now"),
        (["--price", "2", "4"], "price.both 3.0 there, 4.0 now"),
    ):
        assert command(pipeline_folder, compared, *flags) == 2
        assert message in one_sentence(capsys)


@pytest.mark.usefixtures("fakes")
def test_an_entry_is_added_and_bare_prompts_are_drawn_once(
    compared: Path, pipeline_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, draw = [], runner.draw

    def noted(backend: Any, adapters: Mapping[str, Any], prompt: str, *rest: Any) -> Iterator[Any]:
        drawn.append((*adapters, prompt))
        return draw(backend, adapters, prompt, *rest)

    monkeypatch.setattr(runner, "draw", noted)
    folder = tmp_path / "table"
    assert command(pipeline_folder, folder, "--methods", "ipgo") == 0
    assert drawn.pop(0) == ("raw", PROMPTS[0])  # for the reward that judges to be tried
    assert drawn == [(method, prompt) for prompt in PROMPTS for method in ("raw", "ipgo")]
    drawn.clear()
    assert command(pipeline_folder, folder, "--methods", "raw,best-of-n,ipgo") == 0
    assert drawn == [("best-of-n", prompt) for prompt in PROMPTS]
    stored = Comparison.open(folder)
    assert list(stored.plan.entries) == ["ipgo", "raw", "best-of-n"]
    whole = {row.label: row for row in rows(Comparison.open(compared))}
    for row in rows(stored):
        assert sorted(row.scores, key=repr) == sorted(whole[row.label].scores, key=repr)
    ours, others = (stored.run(label) for label in ("ipgo", "best-of-n"))
    assert ours is not None
    assert others is not None
    for prompt, seed in itertools.product(ours.prompts, (0, 1000, 1001)):
        pictures = [run.image_file(prompt, "before", seed).read_bytes() for run in (ours, others)]
        assert pictures[0] == pictures[1]


def test_whose_bare_prompts_are_the_same(tmp_path: Path) -> None:
    entries: dict[str, Any] = {
        "raw": {"method": {"name": "raw"}},
        "seeds": {"seeds": [0, 1]},
        "bare": {"padding": "none"},
        "fewer": {"sampling": {"fit_steps": 3}},
        "guided": {"sampling": {"guidance_scale": 2.0}},
        "noisy": {"sampling": {"eta": 1.0}},
        "sampler": {"scheduler": "lms"},
    }
    folder = begun(tmp_path / "table", entries)
    for label in entries:
        run = Run.open(folder.folder(label), folder.plan.config(label))
        run.start({})
        run.release()
    assert [run.path.name for run in work._twins(folder, "raw")] == ["fewer"]


def test_the_bare_prompt_is_drawn_again_where_another_reward_or_backend_did(tmp_path: Path) -> None:
    config = RunConfig(PROMPTS, seeds=(0,), unseen_seeds=0)
    own, now = Run(tmp_path / "own", config), {"r": {"id": "r"}}
    models: Any = SimpleNamespace(
        identities=now, backend=SimpleNamespace(identity={"weights": "aa", "dtype": "float32"})
    )
    prompt = own.prompts[0]
    scores = [Score(method, prompt.text, 0, "r", 1.0, False) for method in ("raw", "ipgo")]
    for number, (rewards, weights, taken) in enumerate(
        ((now, "aa", ["raw"]), ({"r": {"id": "x"}}, "aa", []), (now, "bb", []))
    ):
        twin = Run.open(tmp_path / f"twin{number}", config)
        twin.start({"rewards": rewards, "weights": weights, "dtype": "float32"})
        files.write(twin.image_file(prompt, "before", 0), b"png")
        twin.finish(prompt, scores, {}, False, rewards)
        assert [each.method for each in runner.taken_over(own, models, prompt, [twin])] == taken


def test_bare_prompts_are_drawn_whatever_the_budget(pipeline_folder: str, tmp_path: Path) -> None:
    flags = "--methods raw --seeds 0 1 2 --budget 3 --price 2 3 --reward contrast --held-out"
    words = ["compare", "a fox", "--backend", pipeline_folder, "--sampling.steps", "2", *flags.split()]
    assert cli.main([*words, "--out", str(tmp_path / "table")]) == 0


def test_shared_entries_are_judged_on_prompts_they_never_saw(pipeline_folder: str, tmp_path: Path) -> None:
    for name, text in (("train", "a fox\na lemon"), ("test", "a bus")):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "x.yaml").write_text(
        "method: {name: ipgo, ascent: {steps: 2, backprop_steps: 1, accumulate: 1}}"
    )
    flags = "--methods raw,ipgo --shared --reward colorfulness --held-out contrast --sampling.steps 2"
    words = ["compare", "--prompts", str(tmp_path / "train.txt"), *flags.split()]
    words += ["--unseen-prompts", str(tmp_path / "test.txt"), "--config", str(tmp_path / "x.yaml")]
    words += ["--backend", pipeline_folder, "--unseen-seeds", "1", "--price", "2", "3"]
    assert cli.main([*words, "--out", str(tmp_path / "table")]) == 0
    folder = Comparison.open(tmp_path / "table")
    raw, ipgo = rows(folder)
    assert ipgo.unseen_prompts["colorfulness"].gain.n == 1
    assert {each.prompt for each in folder.unseen_prompts("ipgo")} == {"a bus"}
    stored, beside = folder.identities("ipgo")
    assert stored == beside
    assert beside["contrast"]["id"] == "contrast"
    assert ipgo.transfers == "unseen seeds and prompts"
    assert raw.unseen_prompts == {}


def test_unseen_prompts_are_judged_on_unseen_noise(pipeline_folder: str, tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("a bus")
    (tmp_path / "x.yaml").write_text(
        "method: {name: ipgo, ascent: {steps: 1, backprop_steps: 1, accumulate: 1}}"
    )
    flags = "--methods ipgo --shared --reward colorfulness --held-out --sampling.steps 2 --unseen-seeds 2"
    words = ["compare", "a fox", *flags.split(), "--unseen-prompts", str(tmp_path / "test.txt")]
    words += ["--config", str(tmp_path / "x.yaml"), "--backend", pipeline_folder, "--price", "2", "3"]
    assert cli.main([*words, "--out", str(tmp_path / "table")]) == 0
    scores = Comparison.open(tmp_path / "table").unseen_prompts("ipgo")
    drawn = {(each.method, each.prompt, each.seed) for each in scores}
    assert drawn == set(itertools.product(("raw", "ipgo"), ("a bus",), (1000, 1001)))


def test_a_recomputed_call_is_a_forward_pass_and_a_differentiated_one(backend: Any) -> None:
    ledgers = []
    for recompute in (False, True):
        backend.calls.clear()
        ascent = Ascent(steps=2, backprop_steps=2, recompute=recompute)
        list(IPGO(ascent=ascent).fit(Task(backend, REWARD, ("a fox",), Sampling(steps=3))))
        ledgers.append(
            {name: backend.calls[name] for name in ("denoiser", "denoiser_grad", "denoiser_grad_both")}
        )
    kept, again = ledgers
    assert kept == {"denoiser": 6, "denoiser_grad": 4, "denoiser_grad_both": 4}
    assert again == {**kept, "denoiser": 6 + 4}


def test_a_recomputed_further_gradient_is_counted(backend: Any) -> None:
    ledgers = []
    for recompute in (False, True):
        backend.calls.clear()
        ascent = Ascent(steps=1, backprop_steps=1, renoised=2, recompute=recompute)
        list(IPGO(ascent=ascent).fit(Task(backend, REWARD, ("a fox",), Sampling(steps=3))))
        ledgers.append(tuple(backend.calls[name] for name in ("denoiser", "denoiser_grad", "decoder")))
    assert ledgers == [(3 + 2, 1 + 2, 1 + 2), (3 + 2 + 1 + 2, 1 + 2, 2 * (1 + 2))]


# -- every method, and what is refused -------------------------------------------------------------------------

EVERY = """
method: {name: ipgo, ascent: {backprop_steps: 2}}
entries:
  ddpo: {method: {ppo: {samples: 2, batch_size: 2, accumulate: 1}}}
  ddpo-shared: {shared: true, method: {name: ddpo, ppo: {samples: 2, batch_size: 2, accumulate: 1}}}
  dpo-diffusion: {method: {word_list: emoji}}
  dpo-hybrid: {method: {name: dpo-diffusion, solver: hybrid, word_list: emoji}}
  ipgo-black-box: {method: {insertion: {rank: 3}}}
  llm-search: {method: {n: 2}}
  promptist: {method: {model: "REWRITER", max_new_tokens: 8}}
  textcraftor: {method: {ascent: {backprop_steps: 1}}}
"""
VARIANTS = ("raw-unpadded", "draft-lv", "alignprop", "dpo-hybrid", "insertion-free", "ddpo-shared")


@pytest.mark.usefixtures("endpoint")
def test_every_method_on_one_harness_within_one_budget(
    pipeline_folder: str, tmp_path: Path, rewriter: tuple[Path, Any]
) -> None:
    pytest.importorskip("cma")
    file = tmp_path / "entries.yaml"
    file.write_text(EVERY.replace("REWRITER", str(rewriter[0])))
    labels = [*METHODS, *VARIANTS]
    words = ["compare", "a red cat", "--methods", ",".join(labels), "--config", str(file), "--budget", "24"]
    words += ["--price", "2", "3", "--backend", pipeline_folder, "--reward", "colorfulness"]
    words += ["--held-out", "contrast", "--sampling.steps", "2", "--unseen-seeds", "1"]
    assert cli.main([*words, "--out", str(tmp_path / "table")]) == 0
    folder = Comparison.open(tmp_path / "table")
    found = {row.label: row for row in rows(folder)}
    assert list(found) == labels
    price = {label: RunPrice(row) for label, row in found.items()}
    for label, row in found.items():
        assert (row.finished, row.failed, row.errors) == (1, 0, ()), label
        assert 0 < row.weighted <= 24, label
        assert row.weighted == pytest.approx(price[label].by_hand), label
        assert row.seconds > 0, label
        assert row.memory > 0, label
        assert row.final is not None, label
        assert row.best is not None, label
        assert row.final <= row.best, label
        assert row.curve[-1][0] == pytest.approx(row.weighted), label
        assert row.curve[-1][1] == pytest.approx(row.best), label
        assert (row.parameters > 0) == (row.method not in TEXTS), label
        tied = row.method in ("reno", "dno", "best-of-n")
        assert (row.unseen == {}) == (tied or row.method == "raw"), label
        assert (row.transfers == "nothing") == tied, label
        assert (row.transfers == "unseen seeds and prompts") == row.shared, label
        if row.method != "raw":
            assert set(row.fitted) == {"colorfulness", "contrast"}, label
    # Whoever searches uses the budget: what is left does not pay for another step as dear as the last.
    searching = set(labels) - {"raw", "raw-unpadded", "promptist", "chatgpt"}
    assert all(found[label].weighted >= 12 for label in searching)
    assert found["best-of-n"].weighted == 24  # twelve images
    assert found["raw"].means[0] != found["raw-unpadded"].means[0]
    html = (tmp_path / "table" / "comparison.html").read_text()
    for label in set(labels) - {"raw", "raw-unpadded"}:
        assert f"<title>{label}</title>" in html  # a curve or a dot
    for label in labels:
        assert f'<div class="head">{label}</div>' in html  # a column of the contact sheet


BAD_ENTRIES = {
    "short": "method: {name: ipgo, ascent: {steps: 1}}\nentries: {ipgo: }",
    "positive": "entries: {dpo-diffusion: {method: {target: positive}}}",
    "cut": "entries: {reno: {method: {ascent: {backprop_steps: 2}}}}",
    "negative": "entries: {ipgo: {method: {insertion: {negative: true}}}}",
    "nothing": "entries: {draft: {method: {lora: {targets: []}}}}",
    "still": "entries: {raw: , dno: {sampling: {eta: 0}}}",
    "reward": "entries: {raw: , x: {method: ipgo, reward: contrast}}",
    "held": "entries: {raw: , x: {method: ipgo, held_out: [contrats]}}",
    "backend": "entries: {raw: , x: {method: ipgo, backend: sd155}}",
    "scheduler": "entries: {raw: , x: {method: ipgo, scheduler: dim}}",
    "deep": "entries: {ipgo: {method: {ascent: {backprop_steps: 12}}}}",
}
TEXTS = ("raw", "dpo-diffusion", "chatgpt", "llm-search", "promptist")  # which learn no numbers


class RunPrice:
    """A row's ledger, weighted by hand: 1 a call, 2 with gradient in one half of guidance, 3 in both."""

    def __init__(self, row: Any) -> None:
        both = row.calls.get("denoiser_grad_both", 0)
        one = row.calls.get("denoiser_grad", 0) - both
        self.by_hand = row.calls["denoiser"] - one - both + 2 * one + 3 * both


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--methods raw,igpo", "unknown method or entry 'igpo'; did you mean 'ipgo'?"),
        ("--methods raw,chatgpt", "entry 'chatgpt': OPENAI_API_KEY is not set and no answer is stored"),
        ("--methods raw,llm-search", "entry 'llm-search': OPENAI_API_KEY is not set"),
        (
            "--methods raw,reno --seeds 0 1",
            "entry 'reno': seeds is [0, 1]; this method replaces the noise of",
        ),
        ("--methods raw,dno --shared", "entry 'dno': shared is true; noise belongs to one prompt"),
        ("--methods raw --budget 0", "budget is 0; it must be at least 1"),
        ("--methods raw --budget many", "budget is 'many'; it must be a whole number"),
        ("--methods raw --price 0.5 2", "price.gradient is 0.5; it must be at least 1"),
        ("--methods raw --reward nosuch", "unknown reward 'nosuch'"),
        (
            "--methods raw,draft --reward 'cmd:wc {image}'",
            "entry 'draft': reward 'cmd:wc {image}' has no gradient, which method 'draft' needs; use one",
        ),
        (
            "--methods dpo-gradient --reward '0.5*contrast+cmd:wc {image}'",
            "entry 'dpo-gradient': reward '0.5*",
        ),
        ("--methods raw --config nosuch", "unknown comparison 'nosuch'; choose from ablations, systems"),
        (
            "--methods ipgo --method.ascent.lr 3",
            "'--method.ascent.lr' is an option of one method; set it under",
        ),
        ("--methods ,", "methods is empty"),
        ("--methods raw --out ''", "out is empty; give a folder"),
        (
            "--methods ipgo --config FILE:deep",
            "entry 'ipgo': method.ascent.backprop_steps is 12; sampling.fit_steps",
        ),
        ("--redraw", "is not a comparison's folder: it has no plan.json"),
        ("--redraw --methods raw --bugdet 3", "unknown option '--bugdet'; did you mean '--budget'?"),
        (
            "--methods raw,dno --backend emoji --config FILE:still",
            "entry 'dno': sampling.eta is 0; dno learns the noise of every step",
        ),
        ("--methods embedding --shared", "entry 'embedding': shared is true; method 'embedding' fits each"),
        (
            "--methods ipgo --seeds 0 1 --budget 9 --config FILE:short",
            "ascent.steps is 1; 2 seeds, used in turn",
        ),
        (
            "--config FILE:reward",
            "entry 'x': reward is 'contrast'; all entries optimise the comparison's, 'hpsv2.1'",
        ),
        ("--methods promptist --shared", "entry 'promptist': shared is true; method 'promptist' fits each"),
        (
            "--methods dpo-diffusion --shared --config FILE:positive",
            "entry 'dpo-diffusion': shared is true; prompts",
        ),
        (
            "--methods dpo-diffusion --sampling.guidance_scale 1",
            "entry 'dpo-diffusion': sampling.guidance_scale is 1.0;",
        ),
        (
            "--methods ddpo --scheduler pndm",
            "entry 'ddpo': method.ppo.eta above 0 needs the ddim scheduler, not 'pndm'",
        ),
        (
            "--methods draft-lv --scheduler lms",
            "entry 'draft-lv': method.ascent.renoised above 0 needs the ddim",
        ),
        (
            "--methods reno --config FILE:cut",
            "entry 'reno': method.ascent.backprop_steps is 2; noise gets its gradient",
        ),
        (
            "--methods ipgo --sampling.guidance_scale 1 --config FILE:negative",
            "entry 'ipgo': sampling.guidance_scale is",
        ),
        ("--methods draft --config FILE:nothing", "entry 'draft': method.lora.targets is empty"),
        ("--config FILE:held", "entry 'x': unknown reward 'contrats'; did you mean 'contrast'"),
        ("--config FILE:backend", "entry 'x': unknown backend 'sd155'; did you mean 'sd15'"),
        ("--config FILE:scheduler", "entry 'x': unknown scheduler 'dim'; did you mean 'ddim'"),
    ],
)
@pytest.mark.usefixtures("no_models")
def test_bad_input_is_one_sentence_before_a_model_is_loaded(
    flags: str,
    message: str,
    pipeline_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("IPGO_CACHE", str(tmp_path / "cache"))
    for name, content in BAD_ENTRIES.items():
        (tmp_path / f"{name}.yaml").write_text(content)
        flags = flags.replace(f"FILE:{name}", f"{tmp_path}/{name}.yaml")
    words = ["compare", "a fox", "--backend", pipeline_folder, "--out", str(tmp_path / "table")]
    assert cli.main([*words, *shlex.split(flags)]) == 2
    assert message in one_sentence(capsys)
    assert not (tmp_path / "table").exists()


def test_a_price_has_the_backward_pass_and_what_reaches_the_latents_in_it(
    pipeline_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that counts: 1 for a forward pass, 2 more for the backward one, 4 more through the latents."""
    backend, clock = load_backend(pipeline_folder, device="cpu"), [0.0]

    class Work(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, embeds: Tensor, latents: Tensor) -> Tensor:
            ctx.shape = embeds.shape
            clock[0] += 1
            return latents.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
            clock[0] += 2 + 4 * ctx.needs_input_grad[1]
            return torch.zeros(ctx.shape), grads[0]

    monkeypatch.setattr(backend, "predict", lambda latents, time, cond, *_: Work.apply(cond.embeds, latents))
    monkeypatch.setattr(budget, "_now", lambda _: clock[0])
    assert budget.measure(backend, ("a fox", "sun"), Sampling(2)) == Price(3, 7)


def test_a_budget_pays_for_the_steps_that_a_fit_draws_in(pipeline_folder: str) -> None:
    config = RunConfig(("a",), BestOfN(), sampling=Sampling(6, 3.0, fit_steps=2), seeds=(0,))
    entry = {"method": {"name": "best-of-n"}, "length": "n"}
    plan = Plan(("a",), common_settings(config), {"best": entry}, 20, Price(2, 3))
    models: Any = SimpleNamespace(backend=load_backend(pipeline_folder, device="cpu"))
    found: Any = work.within_budget(plan, "best", config, models).method
    assert found.n == 10


@pytest.mark.parametrize(
    "own",
    [
        {"backend": "sd15"},
        {"device": "cpu"},
        {"dtype": "float64"},
        {"image_size": 64},
        {"padding": "none"},
        {"scheduler": "lms"},
        {"long_prompts": "truncate"},
        {"text_device": "cpu"},
    ],
)
def test_an_entry_with_a_backend_opened_otherwise_has_models_of_its_own(own: dict[str, Any]) -> None:
    config = RunConfig(("a",))
    assert work._needs(dataclasses.replace(config, **own)) != work._needs(config)
