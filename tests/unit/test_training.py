"""The loop: what it keeps, what it refuses, and how it survives a bad row."""

import math
from dataclasses import replace

import pytest
import torch
from torch import distributed

from ipgo.adapters import InsertionAdapter, generate
from ipgo.ascent import Ascent
from ipgo.backends import load_backend
from ipgo.errors import InputError, ResumeError, RewardError
from ipgo.insertion import Insertion
from ipgo.methods import IPGO, Raw
from ipgo.rewards import Ceiling, as_reward, load_reward, score
from ipgo.sampling import Sampling
from ipgo.task import Task
from ipgo.training import maximize
from tests.conftest import assert_same_state

PROMPTS = ("a red cat", "a dog on the moon", "sun")
SAMPLING = Sampling(steps=2, guidance_scale=3.0)
INSERTION = Insertion(num_prefix=2, num_suffix=2, rank=8)
REWARD = load_reward("colorfulness", device="cpu")


def task(backend, reward=REWARD, **options):
    return Task(backend, reward, PROMPTS, SAMPLING, **options)


def fit(task, **ascent):
    return IPGO(INSERTION, Ascent(**{"steps": 6, "lr": 0.03, "penalty_weight": 0.0, **ascent})).fit(task)


def test_the_reward_rises_and_the_adapter_holds_the_best(backend):
    progress = None
    rewards = []
    for progress in fit(task(backend), steps=12):
        rewards.append(progress.rewards)
        torch.testing.assert_close(progress.best, torch.stack(rewards).max(0).values)
    assert progress.step == progress.total == 12
    raw = next(Raw().fit(task(backend))).rewards
    assert (progress.best > rewards[0] + 1e-3).all()
    assert (progress.best > raw).all()
    images = generate(backend, PROMPTS, [0, 0, 0], progress.adapter, SAMPLING)
    torch.testing.assert_close(score(REWARD, images, PROMPTS), progress.best, atol=1e-5, rtol=0)


def test_what_a_step_reports(backend):
    progress = next(fit(task(backend)))
    for values in (progress.rewards, progress.best, progress.penalty, progress.grad_norm):
        assert values.shape == (3,)
        assert values.isfinite().all()
    assert progress.failed.tolist() == [False] * 3
    assert progress.images.shape == (3, 3, 16, 16)
    assert not progress.images.requires_grad
    assert torch.is_grad_enabled()


def test_what_the_caller_has_set_changes_no_step(backend):
    apart = [step.rewards for step in fit(task(backend))]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            within = []
            for step in fit(task(backend)):
                within.append(step.rewards)
                assert torch.is_inference_mode_enabled()
                assert torch.is_autocast_enabled("cpu")
                assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.stack(apart), torch.stack(within))


def test_the_rate_falls_as_it_is_told_to(backend):
    """A gradient that is always the same makes Adam's steps as long as the rate."""
    steady = Ascent(steps=6, lr=0.01, lr_decay=0.5, decay_every=2, keep_best=False, penalty_weight=0.0)
    adapter = InsertionAdapter.start(backend, PROMPTS, replace(INSERTION, basis="free"), seed=0, shared=False)
    for parameter in adapter.parameters():
        parameter.register_hook(torch.ones_like)
    before = {name: value.clone() for name, value in adapter.named_parameters()}
    lengths = []
    for progress in maximize(task(backend), adapter, steady):
        after = {name: value.clone() for name, value in progress.adapter.named_parameters()}
        name = next(
            name for name, value in after.items() if value.numel() and not torch.equal(value, before[name])
        )
        lengths.append((after[name] - before[name]).abs().median().item())
        before = after
    assert lengths == pytest.approx([0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025], rel=1e-3)


def test_with_several_seeds_a_candidate_needs_a_reward_on_each(backend):
    steps = list(fit(task(backend, seeds=(3, 4, 5))))
    rewards = torch.stack([step.rewards for step in steps])  # (6, P)
    means = rewards.unfold(0, 3, 1).mean(-1)  # (4, P): after steps 3 to 6
    assert steps[1].best.isnan().all()
    torch.testing.assert_close(steps[2].best, means[0])
    torch.testing.assert_close(steps[-1].best, means.max(0).values)


def test_how_many_steps_compare(backend):
    for options, over in (({}, 1), ({"seeds": (3, 4, 5)}, 3), ({"seeds": ()}, 10), ({"shared": True}, 10)):
        assert next(fit(task(backend, **options))).over == over


def test_a_fit_ends_where_nothing_is_left_to_gain(backend):
    """At the ceiling on each seed in turn; what is kept is what each row keeps alone."""
    free = list(fit(task(backend, seeds=(3, 4)), steps=12))
    capped = Ceiling(REWARD, float(torch.stack([step.rewards for step in free[6:8]]).min()), "capped")
    steps = list(fit(task(backend, capped, seeds=(3, 4)), steps=12))
    last = steps[-1]
    assert 2 <= last.step == last.total < 12
    assert last.best.tolist() == pytest.approx([capped.most] * 3)
    assert all(step.total == 12 for step in steps[:-1])
    for row, prompt in enumerate(PROMPTS):
        alone = list(fit(Task(backend, capped, (prompt,), SAMPLING, (3, 4)), steps=12))[-1]
        assert alone.step <= last.step
        for name, value in alone.adapter.state_dict().items():
            torch.testing.assert_close(value, last.adapter.row(row).state_dict()[name], atol=1e-4, rtol=0)
    assert list(fit(task(backend, capped, seeds=()), steps=3))[-1].step == 3  # fresh noise at each step


def test_fresh_noise_keeps_the_latest(backend):
    steps = list(fit(task(backend, seeds=()), lr=1e-9))
    rewards = torch.stack([step.rewards for step in steps])
    assert (rewards.std(0) > 1e-4).all()  # nothing was learned, so it is the noise that differs
    torch.testing.assert_close(steps[-1].best, rewards[-1])


def test_another_random_seed_draws_other_noise(backend):
    first, other = (next(Raw().fit(task(backend, seeds=(), seed=seed))).rewards for seed in (0, 1))
    assert ((first - other).abs() > 1e-6).all()


def test_the_last_step_is_kept_if_asked_for(backend):
    """Too large steps fall again: the best one is not the last."""
    kept, last = (list(fit(task(backend), lr=3.0, lr_basis=3.0, keep_best=best)) for best in (True, False))
    rewards = torch.stack([step.rewards for step in last])
    assert (rewards.max(0).values > rewards[-1]).any()
    torch.testing.assert_close(kept[-1].best, rewards.max(0).values)
    torch.testing.assert_close(last[-1].best, rewards[-1])
    # With the update that its own gradient gave: what the next step would draw.
    earlier = list(fit(task(backend), steps=len(last) - 1, lr=3.0, lr_basis=3.0, keep_best=False))
    images = generate(backend, PROMPTS, [0, 0, 0], earlier[-1].adapter, SAMPLING)
    torch.testing.assert_close(score(REWARD, images, PROMPTS), rewards[-1], atol=1e-5, rtol=0)
    assert (kept[-1].keeps_best, last[-1].keeps_best, last[-1].over) == (True, False, 1)


def test_the_penalty_pulls_the_mean_back(backend):
    free, bound = (list(fit(task(backend), penalty_weight=weight, steps=10))[-1] for weight in (0.0, 1e3))
    assert (bound.penalty < free.penalty - 0.005).all()


def test_prompt_batch_visits_every_prompt_and_shares_one_row(backend):
    steps = list(fit(task(backend, shared=True), batch_size=1, accumulate=1))
    assert len(steps[0].adapter.prefix.coefficients) == 1
    assert [int(step.rewards.isnan().sum()) for step in steps[:3]] == [2, 1, 0]
    assert steps[0].images is None
    assert steps[-1].grad_norm.shape == steps[-1].failed.shape == (3,)
    images = generate(backend, ["never seen"], [0], steps[-1].adapter, SAMPLING)
    assert images.shape == (1, 3, 16, 16)


def test_a_prompt_that_was_never_drawn_has_not_failed(backend):
    (step,) = fit(task(backend, shared=True), steps=1, batch_size=1, accumulate=1)
    assert step.failed.tolist() == [False] * 3


def test_a_prompt_that_a_step_draws_again_has_other_noise(backend, monkeypatch):
    """Fewer prompts than a step draws: the same image twice would teach nothing."""
    seeds, noise = [], backend.noise
    monkeypatch.setattr(backend, "noise", lambda given, *more: seeds.extend(given) or noise(given, *more))
    next(fit(task(backend, shared=True, seeds=()), batch_size=4, accumulate=2))
    assert len(seeds) == len(set(seeds)) == 8
    seeds.clear()
    next(fit(task(backend, shared=True, seeds=(5, 6)), batch_size=2, accumulate=3))
    assert [Ascent(batch_size=4, accumulate=2).images(3, seeds) for seeds in (0, 1, 2, 3)] == [8, 3, 6, 8]
    assert sorted(seeds) == [5, 5, 5, 6, 6, 6]


def test_a_prompt_that_a_step_draws_again_is_renoised_anew(backend, monkeypatch):
    seeds, noise = [], backend.noise
    monkeypatch.setattr(backend, "noise", lambda given, *more: seeds.extend(given) or noise(given, *more))
    next(fit(task(backend, shared=True, seeds=()), batch_size=4, accumulate=2, renoised=1))
    assert len(seeds) == len(set(seeds)) == 16


@pytest.mark.parametrize("options", [{"shared": True}, {"seeds": ()}, {}])
def test_where_the_latest_counts_the_last_update_does_too(backend, options):
    steps = list(fit(task(backend, **options), steps=1, keep_best=False))
    start = InsertionAdapter.start(backend, PROMPTS, INSERTION, seed=0, shared="shared" in options)
    moved = (steps[-1].adapter.prefix.coefficients - start.prefix.coefficients).abs()
    assert moved.max().item() == pytest.approx(0.03, rel=1e-3)


def test_prompts_drawn_in_parts_give_the_same(backend):
    """And are never more at once."""
    sizes = []

    def reward(images, prompts):
        sizes.append(len(prompts))
        return score(REWARD, images, prompts)

    whole, parts = (
        list(Raw().fit(task(backend, as_reward(reward), seeds=(3, 4), chunk=chunk)))[-1]
        for chunk in (None, 2)
    )
    assert sizes == [3, 3, 2, 1, 2, 1]
    torch.testing.assert_close(parts.best, whole.best)
    torch.testing.assert_close(parts.images, whole.images, atol=1e-5, rtol=0)
    encoded = [task(backend, chunk=chunk).encoded().embeds for chunk in (None, 2)]
    torch.testing.assert_close(*encoded)
    with pytest.raises(InputError, match=r"task.chunk is 0; it must be at least 1"):
        task(backend, chunk=0)


def test_accumulation_is_a_larger_batch(backend64):
    """Three prompts in one batch, or one by one, give the same gradient."""
    rows = []
    for batch_size, accumulate in ((3, 1), (1, 3)):
        shared = task(backend64, shared=True)
        adapter = InsertionAdapter(None, 32, INSERTION).double()
        ascent = Ascent(steps=4, lr=0.03, batch_size=batch_size, accumulate=accumulate)
        rows.append(list(maximize(shared, adapter, ascent))[-1].adapter.state_dict())
    for name, value in rows[0].items():
        torch.testing.assert_close(value, rows[1][name], atol=1e-9, rtol=0)


def test_each_further_gradient_of_the_last_step_is_added(backend, monkeypatch):
    """All from one noise here, so that each adds the same."""
    monkeypatch.setattr("ipgo.training.derive", lambda *keys: 1)
    steep = as_reward(lambda images, prompts: 1000 * REWARD(images, prompts), "steep")
    found = []
    for count in range(3):
        climb = fit(task(backend, steep), steps=1, optimizer="sgd", max_grad_norm=None, renoised=count)
        found.append(next(climb).state()["optimizer.momentum_buffer.prefix.coefficients"])
    torch.testing.assert_close(found[2] - found[1], found[1] - found[0], rtol=1e-2, atol=1e-5)
    assert (found[1] - found[0]).norm() > 1e-3


def test_a_short_gradient_is_not_lengthened(backend):
    """Where one that is longer than `max_grad_norm` would be cut to it."""

    def moved(longest):
        climb = fit(task(backend), steps=1, optimizer="sgd", max_grad_norm=longest)
        return next(climb).state()["adapter.prefix.coefficients"]

    torch.testing.assert_close(moved(1e3), moved(None), rtol=0, atol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_prompts_are_encoded_once(make_pipe, shared):
    """And the negative prompt, although embeddings are learned around it."""
    backend = load_backend(make_pipe(), device="cpu")
    calls = []
    backend.pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    assert INSERTION.decided(guided=True).negative
    before = [len(calls) for _ in fit(task(backend, seeds=(), shared=shared))]
    assert before == [2] * 6


@pytest.mark.parametrize(("seeds", "images"), [((0,), 3), ((0, 1), 6), ((0, 1, 2), 8), ((), 8)])
def test_a_shared_step_draws_no_image_twice(backend, seeds, images):
    """On one seed a prompt has one image; more seeds, and new noise, make others of it."""
    climb = fit(task(backend, seeds=seeds, shared=True), batch_size=4, accumulate=2)
    next(climb)
    assert backend.calls["denoiser"] == images * SAMPLING.steps


def test_a_call_without_a_graph_is_no_differentiated_one(backend):
    states, latents = backend.encode(["sun"]), backend.noise([0])[:, 0]
    with torch.enable_grad():
        backend.predict(latents, torch.tensor(500), states, None, 1.0)
        assert backend.calls == {"denoiser": 1}
        latents.requires_grad_()
        backend.predict(latents, torch.tensor(500), states, None, 1.0)
    assert backend.calls == {"denoiser": 2, "denoiser_grad": 1, "denoiser_grad_both": 1}


@pytest.mark.parametrize(("shared", "factor"), [(True, 1.5), (False, 1.0)])
def test_gradients_are_averaged_over_processes(backend, monkeypatch, shared, factor):
    """Beside one of two processes whose gradient is twice its own; what each prompt has for itself is not shared."""
    alone = next(fit(task(backend, shared=shared)))
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda values, op=None: values.mul_(3))
    averaged = next(fit(task(backend, shared=shared)))
    torch.testing.assert_close(averaged.grad_norm, factor * alone.grad_norm)


def test_the_basis_can_have_its_own_learning_rate(backend):
    start = InsertionAdapter.start(backend, PROMPTS, INSERTION, seed=0, shared=False)
    end = list(fit(task(backend, seeds=()), lr_basis=1e-12))[-1].adapter
    torch.testing.assert_close(end.prefix.raw_basis, start.prefix.raw_basis)
    assert not torch.allclose(end.prefix.coefficients, start.prefix.coefficients)


def nan_gradient_for(bad):
    """Finite values, but no finite gradient where `bad(prompt)`: the root of zero."""

    def reward(images, prompts):
        values = images.mean((1, 2, 3))
        trouble = torch.tensor([float(bad(prompt)) for prompt in prompts])
        return values + (trouble * (values - values.detach()).abs() + 1 - trouble).sqrt()

    return as_reward(reward, "troubled")


def test_a_bad_row_fails_alone(backend):
    troubled = list(fit(task(backend, nan_gradient_for(lambda prompt: prompt == "sun"))))
    healthy = list(fit(task(backend, nan_gradient_for(lambda prompt: False))))
    assert [step.failed.tolist() for step in troubled[:3]] == [[False] * 3, [False] * 3, [False, False, True]]
    torch.testing.assert_close(troubled[-1].rewards[:2], healthy[-1].rewards[:2])
    start = InsertionAdapter.start(backend, PROMPTS, INSERTION, seed=0, shared=False)
    kept = troubled[-1].adapter
    torch.testing.assert_close(kept.prefix.coefficients[2], start.prefix.coefficients[2])


def test_a_row_that_was_given_up_stays_so(backend):
    calls = iter(range(100))
    bad = nan_gradient_for(lambda prompt: prompt == "sun" and next(calls) < 3)
    steps = list(fit(task(backend, bad)))
    assert [bool(step.failed[2]) for step in steps] == [False, False, True, True, True, True]


def test_a_row_that_was_given_up_does_not_hold_up_the_end(backend):
    troubled = nan_gradient_for(lambda prompt: prompt == "sun")
    steps = list(fit(task(backend, Ceiling(troubled, -1.0, "capped")), steps=9))
    assert steps[-1].step == 3
    assert steps[-1].failed.tolist() == [False, False, True]


def test_a_row_recovers_from_its_best(backend):
    calls = iter(range(100))

    def twice(prompt):
        return prompt == "sun" and 6 <= next(calls) < 8  # asked at each of its steps

    steps = list(fit(task(backend, nan_gradient_for(twice)), steps=12))
    assert not steps[-1].failed.any()
    assert steps[-1].best[2] > steps[0].best[2]


def test_where_the_latest_counts_a_bad_row_goes_back_to_what_drew_finite_numbers(backend):
    calls = iter(range(100))
    bad = nan_gradient_for(lambda prompt: prompt == "sun" and next(calls) == 1)
    start = InsertionAdapter.start(backend, PROMPTS, INSERTION, seed=0, shared=False)
    steps = fit(task(backend, bad), steps=2, keep_best=False)
    places = [step.adapter.prefix.coefficients[2].clone() for step in steps]
    assert not torch.allclose(places[0], start.prefix.coefficients[2])
    torch.testing.assert_close(places[1], start.prefix.coefficients[2])


def test_a_row_that_went_back_makes_no_longer_steps_than_before(backend):
    """Adam's correction for its first steps is over by then: second moments from zero would be taken for small."""
    calls = iter(range(1000))

    def once(prompt):
        return prompt == "sun" and next(calls) == 60  # asked at each of its steps

    options = {"steps": 90, "lr": 1e-4, "lr_basis": 1e-4, "lr_decay": 1.0, "keep_best": False}
    steps = fit(task(backend, nan_gradient_for(once)), **options)
    places = [step.adapter.prefix.coefficients[2].detach().clone() for step in steps]
    lengths = torch.stack(places).diff(dim=0).flatten(1).norm(dim=1)  # of the steps after the first
    assert lengths[60:].max() < 1.1 * lengths[20:59].max()  # 59 is the way back


def test_a_fit_ends_when_no_row_is_left(backend):
    steps = list(fit(task(backend, nan_gradient_for(lambda prompt: True))))
    assert len(steps) == 3
    assert steps[-1].failed.all()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images, prompts: images.detach().mean((1, 2, 3)), "'mine' gives no gradient"),
        (lambda images, prompts: images.mean(), "'mine' must return a tensor of shape"),
        (lambda images, prompts: images.mean((1, 2, 3)) / 0 * 0, "'mine' is not a finite number"),
    ],
)
def test_a_broken_reward_is_named(backend, function, message):
    with pytest.raises(RewardError, match=message):
        next(fit(task(backend, as_reward(function, "mine"))))


def test_attention_that_is_not_differentiated_is_noticed(backend, monkeypatch):
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", torch.no_grad()(attend))
    with pytest.raises(
        InputError, match=r"no gradient reaches the images .*set_attention_backend\('native'\)"
    ):
        next(fit(task(backend), penalty_weight=0.1))


def test_a_rewards_own_weights_get_no_gradient(backend):
    network = torch.nn.Conv2d(3, 1, 3)
    reward = as_reward(lambda images, prompts: network(images).mean((1, 2, 3)), "network")
    list(fit(task(backend, reward), steps=1))
    assert all(each.grad is None for each in network.parameters())


def test_settings_are_refused_before_anything_is_drawn(backend):
    with pytest.raises(InputError, match="backprop_steps is 3; sampling"):
        fit(task(backend), backprop_steps=3)
    with pytest.raises(InputError, match="steps is 2; 3 seeds"):
        fit(task(backend, seeds=(1, 2, 3)), steps=2)
    with pytest.raises(RewardError, match="'mine' has no gradient"):
        fit(task(backend, as_reward(lambda images, prompts: 0, "mine", differentiable=False)))
    with pytest.raises(InputError, match=r"insertion\.rank is 99"):
        IPGO(Insertion(rank=99)).fit(task(backend))
    assert backend.calls["denoiser"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ()}, "prompts is empty"),
        ({"prompts": ("a", " ")}, "prompt 2 is empty"),
        ({"prompts": ("a", "a")}, "prompt 2 repeats prompt 1"),
        ({"seeds": (1, 1)}, "they must be different"),
        ({"reward": print}, "is not a reward"),
    ],
)
def test_wrong_tasks_are_refused(backend, options, message):
    with pytest.raises(InputError, match=message):
        Task(**{"backend": backend, "reward": REWARD, "prompts": ("a",), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "ascent.steps is 0"),
        ({"lr": math.nan}, "ascent.lr is nan"),
        ({"max_grad_norm": 0.0}, "ascent.max_grad_norm is 0"),
        ({"penalty_weight": -1.0}, "ascent.penalty_weight is -1"),
        ({"renoised": -1}, r"ascent\.renoised is -1; it must be at least 0"),
        ({"backprop_steps": 0}, r"ascent\.backprop_steps is 0"),
        ({"optimizer": "adma"}, r"unknown ascent\.optimizer 'adma'; did you mean 'adam'"),
    ],
)
def test_wrong_ascents_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Ascent(**options)


@pytest.mark.parametrize("options", [{}, {"seeds": (1, 2)}, {"seeds": ()}, {"shared": True}])
def test_resuming_gives_the_same_bits(backend, options):
    straight = list(fit(task(backend, **options)))
    fitting = fit(task(backend, **options))
    next(fitting)
    next(fitting)
    state = next(fitting).state()
    method = IPGO(INSERTION, Ascent(steps=6, lr=0.03, penalty_weight=0.0))
    resumed = list(method.fit(task(backend, **options), resume=state))
    assert [step.step for step in resumed] == [4, 5, 6]
    assert_same_state(straight[-1].state(), resumed[-1].state())
    assert torch.equal(straight[-1].best, resumed[-1].best)


def test_a_state_of_another_fit_is_refused(backend):
    state = next(fit(task(backend))).state()
    for other in (Insertion(num_prefix=3, rank=8), Insertion(2, 2, rank=8, rotations="none")):
        with pytest.raises(ResumeError, match="other settings"):
            IPGO(other, Ascent()).fit(task(backend), resume=state)


def test_raw_scores_the_prompts_as_they_are(backend):
    (progress,) = Raw().fit(task(backend, seeds=(3, 4)))
    images = torch.stack(
        [generate(backend, PROMPTS, [seed] * 3, progress.adapter, SAMPLING) for seed in (3, 4)]
    )
    expected = torch.stack([REWARD(each, PROMPTS) for each in images]).mean(0)
    torch.testing.assert_close(progress.rewards, expected)
    assert progress.state() == {}


def test_an_unpadded_fit_climbs_what_is_drawn_afterwards(pipe):
    """Its unconditional half is as long as with what was inserted, in the fit as in the final image."""
    backend = load_backend(pipe, device="cpu", padding="none")
    unpadded = Task(backend, REWARD, PROMPTS[1:], Sampling(2, 7.5))
    *_, last = IPGO(Insertion(8, 8, rank=8, negative=False), Ascent(steps=2)).fit(unpadded)
    images = generate(backend, PROMPTS[1:], [0, 0], last.adapter, unpadded.sampling)
    torch.testing.assert_close(score(REWARD, images, PROMPTS[1:]), last.best, atol=1e-5, rtol=0)


def test_a_shared_gradient_is_a_mean_over_what_was_drawn(backend):
    alone = Task(backend, REWARD, ("sun",), SAMPLING, seeds=(5,), shared=True)
    one, three = (next(fit(alone, batch_size=1, accumulate=count)).grad_norm for count in (1, 3))
    torch.testing.assert_close(three, one)


def test_a_row_that_goes_back_has_no_momentum_left_with_sgd_either(backend):
    calls = iter(range(100))
    bad = nan_gradient_for(lambda prompt: prompt == "sun" and next(calls) >= 2)
    options = {"optimizer": "sgd", "lr": 0.5, "lr_basis": 0.5, "keep_best": False}
    state = list(fit(task(backend, bad), steps=4, **options))[2].state()
    assert state["optimizer.momentum_buffer.prefix.coefficients"][2].abs().max() == 0
    assert torch.equal(state["adapter.prefix.coefficients"][2], state["kept.prefix.coefficients"][2])
