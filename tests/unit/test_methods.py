"""The methods beside IPGO: their arithmetic, and that each one climbs, resumes and can be stored."""

import dataclasses
import math
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from scipy import stats

import ipgo
from ipgo.adapters import Adapter, EmbeddingAdapter, LoRA, NoiseAdapter, WeightAdapter, generate, stack
from ipgo.adapters.noise import PATCH, _moments, norm_penalty, tail_bound, whiteness_penalty
from ipgo.artefacts import load_adapter, save_adapter
from ipgo.ascent import Ascent
from ipgo.backends import load_backend
from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError, ResumeError
from ipgo.methods import DDPO, DNO, IPGO, BestOfN, BlackBoxIPGO, DRaFT, Embedding, Joint, ReNO
from ipgo.ppo import PPO
from ipgo.rewards import as_reward, load_reward, score
from ipgo.sampling import Sampling
from ipgo.seeding import derive
from ipgo.task import Task
from ipgo.training import maximize
from tests import tiny_families as tiny
from tests.conftest import assert_same_state, difference_quotient

PROMPTS = ("a red cat", "sun")
SAMPLING = Sampling(steps=2, guidance_scale=3.0)
STOCHASTIC = dataclasses.replace(SAMPLING, eta=1.0)
REWARD = load_reward("colorfulness", device="cpu")
LORA = LoRA(rank=2, alpha=4.0)


def quick(method, **ascent):
    """The method with few and long steps."""
    return dataclasses.replace(method, ascent=dataclasses.replace(method.ascent, steps=6, **ascent))


CASES = {
    "embedding": (quick(Embedding(), lr=0.05), SAMPLING),
    "draft": (quick(DRaFT(lora=LORA), lr=0.02), SAMPLING),
    "draft-lv": (quick(DRaFT(lora=LORA), lr=0.02, renoised=2), SAMPLING),
    "alignprop": (quick(DRaFT(lora=LORA), lr=0.02, backprop_steps=None, random_backprop=True), SAMPLING),
    "reno": (quick(ReNO()), SAMPLING),
    "dno": (quick(DNO(), lr=0.05), STOCHASTIC),
    "best-of-n": (BestOfN(n=6), STOCHASTIC),
}


@pytest.fixture(params=CASES)
def case(request, backend):
    """A method, and the prompts that it takes at once."""
    method, sampling = CASES[request.param]
    return method, Task(backend, REWARD, PROMPTS if method.stackable else PROMPTS[:1], sampling)


# -- every method ------------------------------------------------------------------------------------------


def test_each_method_climbs_and_its_adapter_draws_what_it_promised(case, tmp_path):
    method, task = case
    last = list(method.fit(task))[-1]
    seeds = [0] * len(task.prompts)
    raw = score(REWARD, generate(task.backend, task.prompts, seeds, Adapter(), task.sampling), task.prompts)
    assert (last.best > raw + 1e-4).all()
    for row, prompt in enumerate(task.prompts):  # one by one, and from the disk
        save_adapter(last.adapter.row(row), tmp_path / str(row))
        stored = load_adapter(tmp_path / str(row))
        images = generate(task.backend, [prompt], [0], stored, task.sampling)
        torch.testing.assert_close(score(REWARD, images, [prompt]), last.best[row : row + 1])
        # On another seed there is nothing of what belongs to the noise.
        other, plain = (
            generate(task.backend, [prompt], [8], each, task.sampling) for each in (stored, Adapter())
        )
        assert torch.equal(other, plain) == (stored.transfers == "nothing")
    assert stack([last.adapter.row(row) for row in range(len(task.prompts))]).prompts == task.prompts


def test_each_method_resumes_with_the_same_bits(case):
    method, task = case
    states = [step.state() for step in method.fit(task)]
    resumed = list(method.fit(task, resume=states[3]))
    assert [step.step for step in resumed] == [5, 6]
    end = resumed[-1].state()
    assert_same_state(states[-1], end)


@pytest.mark.parametrize(
    "method",
    [
        IPGO(ascent=Ascent(steps=1)),
        Joint(ascent=Ascent(steps=1, backprop_steps=None)),
        DRaFT(lora=LORA, ascent=Ascent(steps=1, backprop_steps=1)),
        DDPO(LORA, PPO(epochs=1, samples=2, batch_size=2, accumulate=1)),
        BlackBoxIPGO(candidates=1),
    ],
    ids=lambda method: type(method).__name__,
)
def test_another_random_seed_begins_elsewhere(backend, method):
    if isinstance(method, BlackBoxIPGO):
        pytest.importorskip("cma")
    task = Task(backend, REWARD, PROMPTS[1:], SAMPLING)
    first, other = (next(method.fit(replace(task, seed=seed))).state() for seed in (0, 1))
    name = next(name for name in first if name.startswith("kept.") and ("basis" in name or "down" in name))
    assert not torch.allclose(first[name], other[name])


# -- noise -------------------------------------------------------------------------------------------------


def test_noise_belongs_to_its_seed(backend):
    adapter = NoiseAdapter.start(backend, PROMPTS, (7,), shared=False, steps=2)
    assert torch.equal(adapter.noise(backend, PROMPTS, [7, 7], 2), backend.noise([7, 7], 2))
    with torch.no_grad():
        adapter.latents.add_(1)
    noise = adapter.noise(backend, ["sun", "a red cat"], [7, 8], 2)
    assert torch.equal(noise, backend.noise([7, 8], 2) + torch.tensor([1, 0]).view(2, 1, 1, 1, 1))
    with pytest.raises(InputError, match=r"holds noise of shape \(3, 4, 8, 8\); .* need \(4, 4, 8, 8\)"):
        adapter.noise(backend, PROMPTS, [7, 7], 3)
    first = NoiseAdapter.start(backend, PROMPTS, (7,), shared=False)
    assert first.noise(backend, PROMPTS, [7, 7], 2).shape == (2, 3, 4, 8, 8)


@pytest.mark.parametrize("padding", ["max_length", "none"])
def test_a_plain_pipeline_starts_from_learned_noise(pipe, padding):
    backend = load_backend(pipe, device="cpu", padding=padding)
    adapter = NoiseAdapter.start(backend, PROMPTS, (7,), shared=False)
    with torch.no_grad():
        adapter.latents.mul_(0.8)
    ours = generate(backend, ["sun"], [7], adapter, SAMPLING)
    kwargs = adapter.prompt_kwargs(pipe, "sun")
    theirs = pipe(**kwargs, num_inference_steps=2, guidance_scale=3.0, output_type="pt").images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    every = NoiseAdapter.start(backend, PROMPTS, (7,), shared=False, steps=2)
    with pytest.raises(InputError, match="takes the initial noise only"):
        every.prompt_kwargs(pipe, "sun")


def test_the_norm_penalty_is_minus_the_log_density_of_the_norm():
    noise = torch.randn(5, 64, dtype=torch.float64) * torch.tensor([[0.5], [0.9], [1.0], [1.1], [2.0]])
    density = stats.chi(df=64).logpdf(noise.norm(dim=1).numpy())
    difference = norm_penalty(noise) + torch.from_numpy(density)
    torch.testing.assert_close(difference, difference[:1].expand(5))
    least = (noise * (63**0.5 / noise.norm(dim=1, keepdim=True))).requires_grad_()
    (slope,) = torch.autograd.grad(norm_penalty(least).sum(), least)
    assert slope.abs().max() < 1e-12
    assert (norm_penalty(least * 1.01) > norm_penalty(least)).all()
    assert (norm_penalty(least * 0.99) > norm_penalty(least)).all()


def test_the_whiteness_bounds_are_those_of_numpy():
    noise = np.random.default_rng(0).normal(0.5, 1.5, size=801)  # one number more than whole vectors
    vectors = noise[:800].reshape(200, PATCH)
    mean = sum(vectors.mean(0) ** 2)
    spread = np.abs(np.linalg.eigvalsh(sum(np.outer(each, each) for each in vectors) / 200 - np.eye(4))).max()
    stray = max(math.sqrt(1 + spread) - 1 - math.sqrt(4 / 200), 0)
    bounds = min(-200 * mean / 8, -math.log(2)) + min(-200 * stray**2 / 2, -math.log(2))
    assert bounds < -10
    mean, covariance = _moments(torch.from_numpy(noise)[None])
    assert tail_bound(mean, covariance, 200).tolist() == pytest.approx([bounds])


def test_whiteness_knows_noise_from_what_is_none():
    noise = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    assert whiteness_penalty(noise[None]).item() == pytest.approx(4 * math.log(2), abs=0.1)
    others = (noise + 0.3, noise * 1.5, noise.sort().values, noise[:2048].repeat_interleave(2))
    strange = torch.stack(others).requires_grad_()
    penalty = whiteness_penalty(strange)
    assert (penalty > 10).all()
    for row, other in enumerate(others):  # each row by itself
        torch.testing.assert_close(whiteness_penalty(other[None])[0], penalty[row])
    (slope,) = torch.autograd.grad(penalty.sum(), strange)
    down = slope / slope.norm(dim=1, keepdim=True) * strange.norm(dim=1, keepdim=True)
    assert (whiteness_penalty(strange - 0.01 * down) < penalty).all()


def test_whiteness_looks_at_permutations_too():
    """By numpy, with other permutations: a wave of period 8 has white vectors of four only until they are mixed."""
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(600, PATCH)).repeat(2, axis=0).reshape(-1)  # each vector twice

    def bounds(numbers: np.ndarray) -> float:
        vectors = numbers.reshape(-1, PATCH)
        n = len(vectors)
        spread = np.linalg.norm(vectors.T @ vectors / n - np.eye(PATCH), 2)
        stray = max(math.sqrt(1 + spread) - 1 - math.sqrt(PATCH / n), 0)
        mean = sum(vectors.mean(0) ** 2)
        return min(-n * mean / (2 * PATCH), -math.log(2)) + min(-n * stray**2 / 2, -math.log(2))

    def expected(numbers: np.ndarray) -> float:
        return -bounds(numbers) - np.mean([bounds(rng.permutation(numbers)) for _ in range(400)])

    sine = 1.4 * np.sin(np.arange(4800) * math.pi / 4)  # its vectors are two that take turns
    for numbers in (noise, sine, rng.normal(1, 1, size=4800)):
        found = whiteness_penalty(torch.from_numpy(numbers)[None]).item()
        assert found == pytest.approx(expected(numbers), rel=0.05)
    # What is wrong with the order alone costs only what it costs unmixed.
    assert whiteness_penalty(torch.from_numpy(sine)[None]).item() < -1.5 * bounds(sine)


def test_dno_is_held_to_white_noise(backend):
    step = next(quick(DNO()).fit(Task(backend, REWARD, PROMPTS[1:], STOCHASTIC)))
    penalty = whiteness_penalty(backend.noise([0], 2).flatten()[None])[0]
    assert step.penalty.item() == pytest.approx(penalty.item(), rel=1e-4)


@pytest.mark.parametrize("method", [ReNO(), DNO(), BestOfN()])
def test_noise_methods_refuse_what_noise_cannot_do(backend, method):
    for options, message in (
        ({"shared": True}, "shared is true; noise belongs to one prompt"),
        ({"seeds": (1, 2)}, r"seeds is \[1, 2\]; this method replaces the noise of exactly one seed"),
        ({"seeds": ()}, r"seeds is \[\]"),
    ):
        with pytest.raises(InputError, match=message):
            method.fit(Task(backend, REWARD, PROMPTS, STOCHASTIC, **options))
    if not isinstance(method, BestOfN):
        for ascent in ({"backprop_steps": 1}, {"random_backprop": True}):
            with pytest.raises(InputError, match="gets its gradient through all 2 steps"):
                quick(method, **ascent).fit(Task(backend, REWARD, PROMPTS, STOCHASTIC))
    with pytest.raises(InputError, match=r"sampling\.eta is 0; dno"):
        DNO().fit(Task(backend, REWARD, PROMPTS, SAMPLING))
    assert backend.calls["denoiser"] == 0


def test_a_step_of_sgd(backend):
    """With Nesterov's momentum the first one is 1.9 times a plain one, along the clipped gradient."""
    task = Task(backend, REWARD, PROMPTS, SAMPLING)
    adapter = NoiseAdapter.start(backend, PROMPTS, (0,), shared=False, penalty="norm")
    start = adapter.latents.detach().clone()
    images = generate(backend, PROMPTS, [0, 0], adapter, SAMPLING, backprop_steps=2)
    objective = score(REWARD, images, PROMPTS) - 0.01 * norm_penalty(adapter.latents.flatten(1))
    (slope,) = torch.autograd.grad(objective.sum(), adapter.latents)
    norms = slope.flatten(1).norm(dim=1)
    step = next(quick(ReNO(), lr=2.0, max_grad_norm=0.03).fit(task))
    torch.testing.assert_close(step.grad_norm, norms, rtol=1e-4, atol=0)
    factor = (0.03 / norms).clamp(max=1).view(2, 1, 1, 1, 1)
    expected = start + 2.0 * 1.9 * factor * slope
    torch.testing.assert_close(step.state()["adapter.latents"], expected, rtol=1e-4, atol=1e-5)


def test_best_of_n_is_the_best_of_n(backend):
    """By hand, with a reward that has no gradient at all."""
    bright = as_reward(
        lambda images, prompts: (images > 0.5).float().mean((1, 2, 3)), "bright", differentiable=False
    )
    task = Task(backend, bright, PROMPTS, SAMPLING, seeds=(5,), seed=3)
    steps = list(BestOfN(n=5).fit(task))
    assert len(steps) == 5
    assert backend.calls["denoiser"] == 5 * 2 * len(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        seeds = [5, *(derive(3, "candidate", prompt, number) for number in range(1, 5))]
        values = [
            bright(generate(backend, [prompt], [seed], Adapter(), SAMPLING), [prompt]) for seed in seeds
        ]
        best = int(torch.cat(values).argmax())
        assert steps[-1].best[row] == pytest.approx(values[best].item(), abs=1e-6)
        assert torch.equal(steps[-1].adapter.latents[row], backend.noise([seeds[best]])[0])
    with pytest.raises(InputError, match="n is 0; it must be at least 1"):
        BestOfN(n=0)
    with pytest.raises(ResumeError, match="other settings"):
        BestOfN().fit(task, resume={"step": torch.tensor(1)})


def test_best_of_n_draws_all_steps_where_the_scheduler_draws_noise(make_pipe, tmp_path):
    """Though a fit has fewer steps by default: what is kept is the noise of every step."""
    pipe = make_pipe()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    result = ipgo.fit(
        "sun",
        backend=pipe,
        method=BestOfN(n=2),
        reward="colorfulness",
        held_out=(),
        sampling=Sampling(steps=3, fit_steps=2),
        out=tmp_path / "run",
    )
    (fitted,) = result
    assert fitted.adapter.latents.shape[1] == 1 + 3
    assert not fitted.failed


# -- weights -----------------------------------------------------------------------------------------------


def lora(backend, prompts=PROMPTS[:1], shared=False):
    """One that changes something."""
    adapter = WeightAdapter.start(backend, prompts, LORA, seed=0, shared=shared).to(backend.dtype)
    with torch.no_grad():
        for number, value in enumerate(adapter.up.values()):
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(number)))
    return adapter


def test_a_lora_is_a_change_of_weights_and_leaves_no_trace(make_pipe):
    backend = load_backend(make_pipe(), device="cpu")
    denoiser = backend.modules["denoiser"]
    modules, weights = dict(denoiser.named_modules()), dict(denoiser.named_parameters())
    values = {name: value.clone() for name, value in denoiser.state_dict().items()}
    raw = generate(backend, ["sun"], [1], Adapter(), SAMPLING)
    adapter = lora(backend, shared=True)
    changed = generate(backend, ["sun"], [1], adapter, SAMPLING)
    list(quick(DRaFT(lora=LORA), lr=0.02).fit(Task(backend, REWARD, ("sun",), SAMPLING)))
    assert list(dict(denoiser.named_modules()).items()) == list(modules.items())  # the very same ones
    assert all(weight is weights[name] for name, weight in denoiser.named_parameters())
    assert denoiser.state_dict().keys() == values.keys()
    assert all(torch.equal(value, values[name]) for name, value in denoiser.state_dict().items())
    assert not hasattr(denoiser, "peft_config")
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    assert torch.equal(generate(backend, ["sun"], [1], Adapter(), SAMPLING), raw)
    with torch.no_grad():  # the same change, written into the weights
        for name in adapter.layers:
            key = name.replace(".", "/")
            denoiser.get_submodule(name).weight += 4.0 / 2 * adapter.up[key][0] @ adapter.down[key][0]
    torch.testing.assert_close(changed, generate(backend, ["sun"], [1], Adapter(), SAMPLING))
    assert not torch.allclose(changed, raw, atol=1e-3)


def test_a_lora_that_is_stopped_while_it_is_put_in_leaves_no_trace(make_pipe, monkeypatch):
    """Ctrl-C comes at any moment, also between two layers."""
    pipe = make_pipe()
    backend = load_backend(pipe, device="cpu")
    adapter, modules = lora(backend, shared=True), dict(pipe.unet.named_modules())
    raw = generate(backend, ["sun"], [1], Adapter(), SAMPLING)
    replace_module, put_in = peft.tuners.lora.LoraModel._replace_module, []

    def stopped(self, *arguments):
        if len(put_in) == 3:
            raise KeyboardInterrupt
        put_in.append(arguments)
        replace_module(self, *arguments)

    monkeypatch.setattr(peft.tuners.lora.LoraModel, "_replace_module", stopped)
    with pytest.raises(KeyboardInterrupt):
        generate(backend, ["sun"], [1], adapter, SAMPLING)
    monkeypatch.undo()
    assert len(put_in) == 3
    assert dict(pipe.unet.named_modules()) == modules
    assert not hasattr(pipe.unet, "peft_config")
    assert torch.equal(generate(backend, ["sun"], [1], Adapter(), SAMPLING), raw)
    assert not torch.equal(generate(backend, ["sun"], [1], adapter, SAMPLING), raw)


def test_a_lora_starts_at_nothing_and_comes_off_after_an_error(backend):
    adapter = WeightAdapter.start(backend, PROMPTS, LORA, seed=0, shared=True)
    raw = generate(backend, PROMPTS, [1, 1], Adapter(), SAMPLING)
    torch.testing.assert_close(generate(backend, PROMPTS, [1, 1], adapter, SAMPLING), raw)
    assert len(adapter.layers) == 4 * 2 * 4  # projections, self- and cross-attention, blocks
    with pytest.raises(ZeroDivisionError), lora(backend, shared=True).attached(backend, PROMPTS):
        _ = 1 / 0
    assert torch.equal(generate(backend, PROMPTS, [1, 1], Adapter(), SAMPLING), raw)


def test_the_gradient_of_a_lora_flows_through_both_halves_of_guidance(backend64):
    adapter = lora(backend64)

    def reward(backprop_steps=0):
        images = generate(backend64, PROMPTS[:1], [1], adapter, SAMPLING, backprop_steps=backprop_steps)
        return images.square().mean()

    parameters = list(adapter.parameters())
    with torch.no_grad():
        for parameter in adapter.up.values():
            parameter.mul_(0.1)
    slopes = torch.autograd.grad(reward(backprop_steps=2), parameters)
    length = torch.cat([slope.flatten() for slope in slopes]).norm()
    measured = difference_quotient(reward, parameters, [slope / length for slope in slopes])
    assert measured.item() == pytest.approx(length.item(), rel=1e-5)


def test_weights_refuse_what_they_cannot_do(backend, pipe):
    own = lora(backend, PROMPTS)
    with pytest.raises(InputError, match="these 2 prompts have their own"):
        generate(backend, PROMPTS, [0, 0], own, SAMPLING)
    with pytest.raises(InputError, match="call the pipeline inside `attached`"):
        own.prompt_kwargs(pipe, "sun")
    with pytest.raises(InputError, match=r"lora\.targets is \['to_w'\]"):
        WeightAdapter.start(backend, PROMPTS, LoRA(targets=("to_w",)), seed=0, shared=True)
    with pytest.raises(InputError, match=r"layer 'mid\.to_q' \(3, 3\), which the backend lacks"):
        generate(backend, ["sun"], [0], WeightAdapter(None, {"mid.to_q": (3, 3)}, LORA), SAMPLING)
    with pytest.raises(InputError, match="carries a LoRA already"), own.attached(backend, ["sun"]):
        generate(backend, ["sun"], [0], own, SAMPLING)
    with pytest.raises(InputError, match="carries a LoRA already"), own.attached(backend, ["sun"]):
        WeightAdapter.start(backend, PROMPTS, LORA, seed=0, shared=True)
    with pytest.raises(InputError, match="prompts is 'sun'; it must be a list"), own.attached(pipe, "sun"):
        pass
    with pytest.raises(InputError, match="'embedding' is not in the weights; give the pipeline its"):
        EmbeddingAdapter.start(backend, PROMPTS, shared=False).attached(pipe, PROMPTS)
    for options, message in (({"rank": 0}, "rank is 0"), ({"alpha": 0.0}, "alpha is 0")):
        with pytest.raises(InputError, match=message):
            LoRA(**options)


def test_a_shared_lora_draws_prompts_that_it_never_saw(backend):
    method = quick(DRaFT(lora=LORA), lr=0.02)
    last = list(method.fit(Task(backend, REWARD, PROMPTS, SAMPLING, shared=True)))[-1]
    before, after = (
        REWARD(generate(backend, ["a dog"], [4], adapter, SAMPLING), ["a dog"])
        for adapter in (Adapter(), last.adapter)
    )
    assert after > before


@pytest.mark.parametrize("shared", [False, True])
def test_random_truncation_is_drawn_once_for_each_trajectory(backend, monkeypatch, shared):
    """Of 4 steps the last K carry gradient, and no other: K is not drawn anew at each of them."""
    flags, predict = [], backend.predict
    monkeypatch.setattr(
        backend, "predict", lambda *call: flags.append(torch.is_grad_enabled()) or predict(*call)
    )
    sampling = dataclasses.replace(SAMPLING, steps=4)
    task = Task(backend, REWARD, PROMPTS if shared else PROMPTS[:1], sampling, shared=shared)
    method = DRaFT(lora=LORA, ascent=Ascent(steps=6, backprop_steps=3, random_backprop=True, accumulate=2))
    assert len(list(method.fit(task))) == 6
    walks = [flags[start : start + 4] for start in range(0, len(flags), 4)]
    depths = [sum(walk) for walk in walks]
    assert walks == [[False] * (4 - depth) + [True] * depth for depth in depths]
    assert set(depths) == {1, 2, 3}
    assert len(depths) == 6 * (2 if shared else 1)
    if shared:  # the two trajectories of a step have a K of their own each
        assert any(first != second for first, second in zip(depths[::2], depths[1::2], strict=True))


def test_the_gradient_of_draft_lv(backend64):
    """Of the reward of the image, and of the image made once more from its noised latents: in closed form."""
    backend = backend64
    scheduler = backend.scheduler(2, backend.noise([0])[:, 0])
    last = int(scheduler.timesteps[-1])
    alpha, final = scheduler.alphas_cumprod[last].double(), scheduler.final_alpha_cumprod.double()
    fresh = backend.noise([derive(0, "renoised", "sun", 0, 0)])[:, 0].double()
    adapter = lora(backend, ["sun"])
    cond = backend.encode(["sun"])
    uncond = backend.unconditional("", cond)
    latents = []
    decode = backend.decode
    backend.decode = lambda clean: latents.append(clean) or decode(clean)
    image = generate(backend, ["sun"], [0], adapter, SAMPLING, backprop_steps=1)
    backend.decode = decode
    noisy = alpha.sqrt() * latents[0].detach() + (1 - alpha).sqrt() * fresh
    with adapter.attached(backend, ["sun"]):
        epsilon = backend.predict(noisy, torch.tensor(last), cond, uncond, SAMPLING.scale(backend))
        clean = (noisy - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
        again = backend.decode(final.sqrt() * clean + (1 - final).sqrt() * epsilon)
        objective = REWARD(image, ["sun"]) + REWARD(again, ["sun"])
        slopes = torch.autograd.grad(objective.sum(), list(adapter.parameters()))
    norm = torch.cat([slope.flatten() for slope in slopes]).norm()
    ascent = Ascent(steps=1, backprop_steps=1, renoised=1, penalty_weight=0.0)
    step = next(maximize(Task(backend, REWARD, ("sun",), SAMPLING), adapter, ascent))
    torch.testing.assert_close(step.grad_norm[0].double(), norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(step.rewards.double(), REWARD(image, ["sun"]).detach(), rtol=1e-6, atol=0)


def test_draft_lv_needs_ddim(pipe):
    backend = load_backend(pipe, device="cpu", scheduler="euler")
    with pytest.raises(InputError, match=r"ascent\.renoised above 0 needs the ddim scheduler, not Euler"):
        next(quick(DRaFT(lora=LORA), renoised=1).fit(Task(backend, REWARD, PROMPTS[:1], SAMPLING)))


# -- whole prompts -----------------------------------------------------------------------------------------


def test_an_adapter_that_is_still_on_the_cpu_draws_elsewhere(backend):
    """Which "meta" stands in for: what would be mixed from two devices is refused there, too."""
    adapter = EmbeddingAdapter.start(backend, PROMPTS, shared=False)
    original = backend.encode(PROMPTS)
    away = replace(original, embeds=original.embeds.to("meta"), mask=original.mask.to("meta"))
    assert adapter.condition(backend, PROMPTS, away).embeds.device.type == "meta"


@pytest.mark.parametrize("method", [ReNO, DNO])
def test_no_further_gradient_of_the_last_step_reaches_noise(method):
    with pytest.raises(InputError, match=r"ascent\.renoised is 2; where noise is learned it must be 0"):
        method(ascent=Ascent(backprop_steps=None, renoised=2))


def test_an_embedding_starts_as_the_prompt(backend, pipe):
    adapter = EmbeddingAdapter.start(backend, PROMPTS, shared=False)
    raw = generate(backend, PROMPTS, [1, 1], Adapter(), SAMPLING)
    assert torch.equal(generate(backend, PROMPTS, [1, 1], adapter, SAMPLING), raw)
    original = backend.encode(PROMPTS)
    cond = adapter.condition(backend, PROMPTS, original)
    assert adapter.penalty(original, cond, raw).abs().max() < 1e-6
    with torch.no_grad():
        adapter.change[0, 0] += 1  # at the start of the text, which the penalty does not look at
        size = original.norm()[1] / math.sqrt(original.embeds.shape[-1])
        adapter.change[1] -= 2 * original.embeds[1] / size
    turned = adapter.penalty(original, adapter.condition(backend, PROMPTS, original), raw)
    torch.testing.assert_close(turned, torch.tensor([0.0, 2.0]), atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="prompt-wise only"):
        EmbeddingAdapter.start(backend, PROMPTS, shared=True)
    with pytest.raises(InputError, match="padding is 'none'"):
        EmbeddingAdapter.start(load_backend(pipe, device="cpu", padding="none"), PROMPTS, shared=False)
    with pytest.raises(InputError, match=r"states of shape \(5, 32\); .* takes \(77, 32\)"):
        generate(backend, PROMPTS[:1], [0], EmbeddingAdapter(PROMPTS, 5, 32), SAMPLING)


def test_preservation_looks_at_the_end_of_every_encoders_text():
    pipe = tiny.sd3()
    backend = load_backend(pipe, device="cpu")
    prompts = ("a red cat", "sun")
    adapter = EmbeddingAdapter.start(backend, prompts, shared=False)
    original = backend.encode(prompts)
    with torch.no_grad():
        adapter.change += torch.randn(adapter.change.shape, generator=torch.Generator().manual_seed(0))
    cond = adapter.condition(backend, prompts, original)
    found = adapter.penalty(original, cond, backend.noise([0, 0]))
    for row, prompt in enumerate(prompts):
        ends = [len(pipe.tokenizer(prompt).input_ids) - 1, 77 + len(pipe.tokenizer_3(prompt).input_ids) - 1]
        pairs = [(original.embeds[row, end], cond.embeds[row, end]) for end in ends]
        cosines = [(a @ b / (a.norm() * b.norm())).item() for a, b in pairs]
        assert found[row].item() == pytest.approx(1 - sum(cosines) / 2, abs=1e-5)


def test_preservation_is_measured_in_float32(make_pipe):
    """In bfloat16 1 - the cosine of a prompt with itself is up to 0.004."""
    backend = load_backend(make_pipe(), device="cpu", dtype="bfloat16")
    original = backend.encode(PROMPTS)
    adapter = EmbeddingAdapter.start(backend, PROMPTS, shared=False)
    cond = adapter.condition(backend, PROMPTS, original)
    assert cond.embeds.dtype == torch.bfloat16
    penalty = adapter.penalty(original, cond, backend.noise([0] * len(PROMPTS)))
    assert penalty.abs().max() < 1e-6


def test_the_ends_of_text_by_hand():
    rows = ["110010", "111111", "000001", "101010", "000000"]
    mask = torch.tensor([[sign == "1" for sign in row] for row in rows])
    ends = PromptEmbeds(torch.zeros(5, 6, 2), mask).ends()
    assert [each.tolist() for each in ends] == [[1, 4], [5], [5], [0, 2, 4], []]


def test_methods_begin_with_the_settings_that_were_published():
    """What their papers and repositories have (NOTICE and the docstrings say where); the tables call them so."""
    reno, dno = ReNO().ascent, DNO().ascent
    assert (reno.optimizer, reno.lr, reno.max_grad_norm, reno.steps) == ("sgd", 5.0, 0.1, 50)
    assert (reno.penalty_weight, reno.lr_decay) == (0.01, 1.0)
    assert (dno.optimizer, dno.lr, dno.max_grad_norm, dno.steps) == ("adam", 0.01, 1.0, 100)
    assert (dno.penalty_weight, dno.lr_decay) == (1.0, 1.0)


def test_a_lora_begins_as_a_linear_layer_of_its_inputs_does(backend):
    adapter = WeightAdapter.start(backend, ["sun"], LoRA(rank=4), seed=0, shared=True)
    for name, (inputs, _) in adapter.layers.items():
        down = adapter.down[name.replace(".", "/")]
        assert down.abs().max() <= inputs**-0.5
        assert down.std().item() == pytest.approx((3 * inputs) ** -0.5, rel=0.2)
