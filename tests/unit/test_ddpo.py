"""DDPO: its arithmetic against independent ones, and that a fit climbs, resumes and leaves no trace."""

import dataclasses
import math

import pytest
import torch

import ipgo.policy
from ipgo.adapters import Adapter, LoRA, WeightAdapter, generate
from ipgo.artefacts import load_adapter, save_adapter
from ipgo.backends import load_backend
from ipgo.errors import InputError, ResumeError
from ipgo.methods import DDPO
from ipgo.ppo import PPO, advantages, log_probability, surrogate
from ipgo.rewards import as_reward, score
from ipgo.sampling import Sampling
from ipgo.task import Task
from tests.conftest import assert_same_state

PROMPTS = ("a red cat", "sun")
SAMPLING = Sampling(steps=2, guidance_scale=3.0)
BRIGHT = as_reward(
    lambda images, prompts: images.mean((1, 2, 3)).detach(), "brightness", differentiable=False
)
LORA = LoRA(rank=2)
QUICK = PPO(epochs=3, samples=4, batch_size=2, accumulate=1, lr=1e-2, history=4, min_history=4)


def quick(**options):
    return DDPO(LORA, dataclasses.replace(QUICK, **options))


@pytest.fixture
def calls(monkeypatch):
    """What the surrogate was called with, in order: (now, before, advantage)."""
    seen = []

    def spy(now, before, advantage, clip_range):
        seen.append((now.detach().clone(), before, advantage))
        return surrogate(now, before, advantage, clip_range)

    monkeypatch.setattr(ipgo.policy, "surrogate", spy)
    return seen


def test_a_fit_without_one_update_has_failed(make_pipe, monkeypatch):
    """In float16 every gradient may overflow; each lowers the scale, and none counts as a miss yet."""
    half = Task(load_backend(make_pipe(), device="cpu", dtype="float16"), BRIGHT, PROMPTS[:1], SAMPLING)
    monkeypatch.setattr(ipgo.policy, "surrogate", lambda now, *_: now * math.inf)
    *_, last = quick(epochs=2).fit(half)
    assert last.failed.tolist() == [True]
    assert last.best.isnan().all()


def test_a_shared_fit_among_processes_is_refused(backend, monkeypatch):
    """Each would learn an adapter of its own, as if it were that of all."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(InputError, match=r"in one process; torch\.distributed is up"):
        quick().fit(Task(backend, BRIGHT, PROMPTS, SAMPLING, shared=True))
    quick().fit(Task(backend, BRIGHT, PROMPTS[:1], SAMPLING))


# -- arithmetic --------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_a_normal_distribution():
    source = torch.Generator().manual_seed(0)
    latents, mean = torch.randn(2, 3, 4, 8, 8, generator=source, dtype=torch.float64)
    for std in (0.02, 0.4, 1.7):
        scale = torch.tensor(std, dtype=torch.float64)
        expected = torch.distributions.Normal(mean, scale).log_prob(latents).flatten(1).mean(1)
        torch.testing.assert_close(log_probability(latents, mean, scale), expected)


def test_advantages_of_a_table():
    """Prompt 0 has four recent rewards, of which 2 falls out; prompt 1 has none, and gets the epoch's scale."""
    recent = torch.tensor([[2.0, 4.0, 4.0, 6.0], [math.nan] * 4])
    rewards, numbers = torch.tensor([10.0, 1.0, 4.0]), torch.tensor([0, 1, 1])
    values, now = advantages(rewards, numbers, recent, 3)
    # Prompt 0: 4, 4, 6, 10 have mean 6 and variance (4 + 4 + 0 + 16) / 4 = 6; all three: 5 and 42 / 3 = 14.
    expected = torch.tensor([4 / 6**0.5, -4 / 14**0.5, -1 / 14**0.5])
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=0)
    assert now.nan_to_num(-1).tolist() == [[4, 4, 6, 10], [-1, -1, 1, 4]]
    assert recent[0, 0] == 2
    values, now = advantages(torch.tensor([4.0, 1.0]), torch.tensor([1, 1]), now, 3)
    # Prompt 1 has 1, 4, 4, 1 by now: mean 2.5, standard deviation 1.5.
    torch.testing.assert_close(values, torch.tensor([1.0, -1.0]), rtol=1e-5, atol=0)
    assert now[1].tolist() == [1, 4, 4, 1]


def test_equal_rewards_teach_nothing():
    values, _ = advantages(torch.ones(3), torch.zeros(3, dtype=torch.long), torch.full((1, 2), math.nan), 2)
    assert values.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("advantage", "ratio", "slope"),
    [
        (2.0, 1.0, 2.0),
        (-2.0, 1.0, -2.0),
        (2.0, 1.2, 0.0),  # likelier already, by more than the clip range
        (2.0, 0.8, 1.6),
        (-2.0, 0.8, 0.0),  # less likely already
        (-2.0, 1.2, -2.4),
    ],
)
def test_the_surrogate_stops_pulling_outside_its_range(advantage, ratio, slope):
    before = torch.tensor([-0.7], dtype=torch.float64)
    now = (before + math.log(ratio)).requires_grad_()
    value = surrogate(now, before, torch.tensor([advantage], dtype=torch.float64), 0.1)
    (found,) = torch.autograd.grad(value.sum(), now)
    assert found.item() == pytest.approx(slope)
    allowed = min(max(ratio, 0.9), 1.1)
    assert value.item() == pytest.approx(min(advantage * ratio, advantage * allowed))


# -- a fit -------------------------------------------------------------------------------------------------


def test_the_ratio_is_exactly_one_before_the_first_update(backend, calls):
    """Of every batch and step, and the log-probabilities are those of the noise that was drawn."""
    task = Task(backend, BRIGHT, PROMPTS[:1], SAMPLING)
    next(quick(accumulate=2).fit(task))
    assert len(calls) == 2 * 2  # batches, steps
    for now, before, _ in calls:
        assert torch.equal(now, before)
    stds = []
    scheduler = backend.scheduler(2, torch.zeros(1))
    for time, previous in ((501, 1), (1, -499)):
        alphas = scheduler.alphas_cumprod
        alpha, after = alphas[time], alphas[previous] if previous >= 0 else scheduler.final_alpha_cumprod
        stds.append(((1 - after) / (1 - alpha) * (1 - alpha / after)).sqrt())
    for place, std in enumerate(stds * 2):
        # A standard normal draw of 256 numbers: its mean square is 1 give or take a tenth.
        square = -2 * (calls[place][1] + std.log() + math.log(2 * math.pi) / 2)
        assert (square - 1).abs().max() < 0.4


def test_an_update_makes_the_better_trajectories_likelier(backend, calls):
    """All of them in one update, and then again: sum of advantage x change of log-probability is positive."""
    task = Task(backend, BRIGHT, PROMPTS[:1], SAMPLING)
    next(quick(batch_size=4, inner_epochs=2, lr=1e-3).fit(task))
    assert len(calls) == 2 * 2  # passes, steps
    assert all(torch.equal(now, before) for now, before, _ in calls[:2])
    gain = sum((advantage * (now - before)).sum() for now, before, advantage in calls[2:])
    assert gain > 1e-5
    values = calls[0][2]
    assert values.sum().abs() < 1e-3
    assert values.square().mean().item() == pytest.approx(1, rel=1e-3)


def test_an_update_is_the_mean_gradient_however_it_is_cut(backend, monkeypatch):
    """The same four trajectories once, in two batches, and twice over."""
    derive = ipgo.policy.derive

    def four(seed, *keys):
        return keys[-1] % 4 if keys[0] == "trajectory" else derive(seed, *keys)

    monkeypatch.setattr(ipgo.policy, "derive", four)
    task = Task(backend, BRIGHT, PROMPTS[:1], SAMPLING)
    norms = []
    for samples, batch_size in ((4, 4), (4, 2), (8, 4)):
        method = quick(samples=samples, batch_size=batch_size, accumulate=2, history=8, min_history=8)
        norms.append(next(method.fit(task)).grad_norm[0])
    torch.testing.assert_close(norms[1:], [norms[0]] * 2, rtol=1e-3, atol=0)


def test_a_gradient_of_the_policy_is_clipped_to_what_is_asked_for(backend):
    """Adam divides by its size: the second moments tell it."""
    task = Task(backend, BRIGHT, PROMPTS[:1], SAMPLING)
    sizes = []
    for longest in (None, 1e-3):
        state = next(quick(batch_size=4, max_grad_norm=longest).fit(task)).state()
        sizes.append(float(sum(value.sum() for name, value in state.items() if "exp_avg_sq" in name)))
    assert sizes[1] == pytest.approx(1e-3**2 * (1 - 0.999), rel=1e-2)
    assert sizes[0] > 2 * sizes[1]


def test_the_settings_of_policy_gradients_are_used(backend, monkeypatch):
    seen = []
    monkeypatch.setattr(ipgo.policy, "surrogate", lambda *given: seen.append(given) or surrogate(*given))
    task = Task(backend, BRIGHT, PROMPTS[:1], SAMPLING)

    def first(**options):
        seen.clear()
        return next(quick(**options).fit(task)).state()

    first()
    assert max(advantage.abs().max() for _, _, advantage, _ in seen) > 0.25
    first(max_advantage=0.25)
    assert max(advantage.abs().max() for _, _, advantage, _ in seen) == 0.25
    first(clip_range=0.5)
    assert {clip_range for *_, clip_range in seen} == {0.5}
    decayed, whole = (first(weight_decay=decay, lr=0.1) for decay in (0.5, 0.0))
    down = next(name for name in whole if name.startswith("adapter.down"))
    assert decayed[down].norm() < 0.95 * whole[down].norm()


def test_the_fits_own_eta_is_that_of_its_settings(backend, monkeypatch):
    seen, step, denoise = [], ipgo.policy.ddim_step, ipgo.policy.denoise
    monkeypatch.setattr(ipgo.policy, "ddim_step", lambda *given: seen.append(given[-1]) or step(*given))
    monkeypatch.setattr(
        ipgo.policy,
        "denoise",
        lambda *given, **more: seen.append(given[-1].eta) or denoise(*given, **more),
    )
    next(quick(eta=0.5).fit(Task(backend, BRIGHT, PROMPTS[:1], SAMPLING)))
    assert len(seen) > 2
    assert set(seen) == {0.5}


def test_epochs_and_random_seeds_have_trajectories_of_their_own(backend, monkeypatch):
    drawn, noise = [], backend.noise
    monkeypatch.setattr(backend, "noise", lambda given, *more: drawn.extend(given) or noise(given, *more))
    for seed in (0, 1):
        list(quick(epochs=2).fit(Task(backend, BRIGHT, PROMPTS[:1], SAMPLING, seed=seed)))
    seeds = [seed for seed in drawn if seed != 0]  # which is the task's own
    assert len(set(seeds)) == len(seeds) == 2 * 2 * 4


def test_a_reward_without_gradient_rises_and_the_adapter_draws_it(make_pipe, tmp_path):
    """On noise that was not drawn in the fit, with the sampler of the task, and from the disk."""
    backend = load_backend(make_pipe(), device="cpu")
    weights = {
        part: {name: value.clone() for name, value in module.state_dict().items()}
        for part, module in backend.modules.items()
    }
    seeds, prompts = list(range(16)), ["sun"] * 16
    sampling = Sampling(steps=4, guidance_scale=1.0)  # of two steps neither draws much noise to learn from
    raw = generate(backend, prompts, seeds, Adapter(), sampling)
    # 256 latents in place of 16,384: a clip range of 1e-2 in place of 1e-4.
    ppo = PPO(epochs=12, batch_size=8, accumulate=1, lr=1e-2, clip_range=1e-2, history=16)
    steps = list(DDPO(ppo=ppo).fit(Task(backend, BRIGHT, ("sun",), sampling)))
    assert [step.step for step in steps] == list(range(1, 13))
    assert steps[-1].images.shape == (1, 3, 16, 16)
    assert torch.equal(steps[-1].best, steps[-1].rewards)
    save_adapter(steps[-1].adapter, tmp_path)
    stored = load_adapter(tmp_path)
    assert stored.kind == "weights"
    tuned = generate(backend, prompts, seeds, stored, sampling)
    gains = score(BRIGHT, tuned, prompts) - score(BRIGHT, raw, prompts)
    assert gains.mean() > 2e-3
    assert (gains > 0).float().mean() > 0.9
    for part, module in backend.modules.items():  # and nothing of it stays in the backend
        assert module.state_dict().keys() == weights[part].keys()
        assert all(torch.equal(value, weights[part][name]) for name, value in module.state_dict().items())
    assert torch.equal(generate(backend, prompts, seeds, Adapter(), sampling), raw)


@pytest.mark.parametrize("shared", [False, True])
def test_resuming_gives_the_same_bits(backend, shared):
    task = Task(backend, BRIGHT, PROMPTS if shared else PROMPTS[:1], SAMPLING, shared=shared)
    straight = list(quick(samples=3).fit(task))
    states = [next(quick(samples=3).fit(task)).state()]
    resumed = list(quick(samples=3).fit(task, resume=states[0]))
    assert [step.step for step in resumed] == [2, 3]
    assert torch.equal(resumed[-1].rewards, straight[-1].rewards)
    end = resumed[-1].state()
    assert_same_state(straight[-1].state(), end)
    assert resumed[0].grad_norm[0] > 0
    with pytest.raises(ResumeError, match="other settings"):
        quick(samples=3, history=5).fit(task, resume=states[0])


def test_prompts_of_a_batch_come_in_shuffled_passes(backend):
    """Three trajectories an epoch of two prompts: each prompt three times in two epochs, with its own rewards."""
    task = Task(backend, BRIGHT, PROMPTS, SAMPLING, shared=True)
    steps = quick(samples=3, epochs=2).fit(task)
    recent = []
    for step in steps:
        recent.append(step.state()["memory.recent"])
        assert step.images is None
        assert step.rewards.isfinite().all()
    assert sorted(recent[0].isfinite().sum(1).tolist()) == [1, 2]
    assert recent[1].isfinite().sum(1).tolist() == [3, 3]


def test_each_prompt_has_the_mean_of_its_own_rewards(backend):
    own = as_reward(
        lambda images, prompts: torch.tensor([float(prompt == "sun") for prompt in prompts]),
        "own",
        differentiable=False,
    )
    step = next(quick().fit(Task(backend, own, PROMPTS, SAMPLING, shared=True)))
    assert step.rewards.tolist() == [0, 1]


def test_a_step_without_noise_is_drawn_but_not_learned_from(make_pipe, calls):
    """A schedule that ends at alpha 1: its last DDIM step has standard deviation 0."""
    pipe = make_pipe()
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    backend = load_backend(pipe, device="cpu")
    step = next(quick().fit(Task(backend, BRIGHT, PROMPTS[:1], SAMPLING)))
    assert len(calls) == 2 * 1
    assert step.grad_norm.isfinite().all()
    assert all(now.isfinite().all() for now, _, _ in calls)
    with pytest.raises(InputError, match=r"sampling\.steps is 1; none of them draws noise"):
        quick().fit(Task(backend, BRIGHT, PROMPTS[:1], Sampling(steps=1)))


def test_what_the_only_epoch_taught_is_in_the_result(backend):
    *_, last = quick(epochs=1).fit(Task(backend, BRIGHT, PROMPTS[:1], SAMPLING))
    start = WeightAdapter.start(backend, PROMPTS[:1], quick().lora, seed=0, shared=False)
    learned, begun = dict(last.adapter.named_parameters()), dict(start.named_parameters())
    assert learned.keys() == begun.keys()
    assert not all(torch.equal(learned[name], begun[name]) for name in learned)


def test_images_that_are_not_finite_end_the_fit(backend, monkeypatch):
    task = Task(backend, BRIGHT, PROMPTS[:1], SAMPLING)
    decode = backend.decode
    steps = quick(epochs=9).fit(task)
    first = next(steps)
    monkeypatch.setattr(backend, "decode", lambda latents: decode(latents) * math.nan)
    later = list(steps)
    assert [bool(step.failed[0]) for step in later] == [False, False, True]
    assert torch.equal(later[-1].best, first.best)
    state = later[-1].state()
    for name in ("down", "up"):
        pairs = [(state[key], state[f"kept{key[7:]}"]) for key in state if key.startswith(f"adapter.{name}")]
        assert all(torch.equal(*pair) for pair in pairs)


def test_an_epoch_that_goes_back_forgets_its_momentum(backend, monkeypatch):
    decode = backend.decode
    steps = quick().fit(Task(backend, BRIGHT, PROMPTS[:1], SAMPLING))
    first = next(steps).state()
    monkeypatch.setattr(backend, "decode", lambda latents: decode(latents) * math.nan)
    second = next(steps).state()
    names = [name for name in first if name.startswith("optimizer.exp_avg.")]
    assert any(first[name].any() for name in names)
    assert not any(second[name].any() for name in names)


def test_settings_that_cannot_work(backend, pipe):
    for options, message in (
        ({"samples": 1}, r"ppo\.samples is 1; it must be at least 2"),
        ({"eta": 0.0}, r"ppo\.eta is 0.0; it must be above 0"),
        ({"eta": 1.5}, r"ppo\.eta is 1.5; it must be at most 1"),
        ({"min_history": 5}, r"ppo\.min_history is 5; ppo\.history keeps only 4"),
        ({"clip_range": math.nan}, r"ppo\.clip_range is nan"),
    ):
        with pytest.raises(InputError, match=message):
            quick(**options)
    euler = load_backend(pipe, device="cpu", scheduler="euler")
    with pytest.raises(InputError, match=r"ppo\.eta above 0 needs the ddim scheduler"):
        DDPO().fit(Task(euler, BRIGHT, PROMPTS[:1], SAMPLING))
    with pytest.raises(InputError, match="these 2 prompts have their own"):
        next(quick().fit(Task(backend, BRIGHT, PROMPTS, SAMPLING)))


def test_a_prompt_is_compared_with_its_own_history_when_that_is_long_enough(backend, monkeypatch):
    seen = []
    monkeypatch.setattr("ipgo.policy.advantages", lambda *given: seen.append(given[-1]) or advantages(*given))
    next(quick(min_history=3).fit(Task(backend, BRIGHT, PROMPTS[:1], SAMPLING)))
    assert seen == [3]
