"""Joint: with one half frozen it is IPGO or ReNO; together they climb, and are stored and judged apart."""

import dataclasses

import pytest
import torch

from ipgo.adapters import Adapter, InsertionAdapter, JointAdapter, NoiseAdapter, generate, stack
from ipgo.adapters.noise import norm_penalty
from ipgo.artefacts import load_adapter, save_adapter
from ipgo.ascent import Ascent
from ipgo.backends import load_backend
from ipgo.errors import InputError
from ipgo.insertion import Insertion
from ipgo.methods import Joint
from ipgo.rewards import load_reward, score
from ipgo.sampling import Sampling, sample
from ipgo.task import Task
from ipgo.training import maximize
from tests.conftest import assert_same_state

PROMPTS = ("a red cat", "sun")
INSERTION = Insertion(num_prefix=4, num_suffix=7, rank=8, negative=False)
SAMPLING = Sampling(steps=2, guidance_scale=3.0)
REWARD = load_reward("colorfulness", device="cpu")
ASCENT = Ascent(steps=3, lr=2e-2, backprop_steps=None, penalty_weight=0.1)


def parts(backend, seed=0):
    """IPGO's adapter and ReNO's, where they start."""
    inserted = InsertionAdapter.start(backend, PROMPTS, INSERTION, seed=3, shared=False)
    return inserted, NoiseAdapter.start(backend, PROMPTS, (seed,), shared=False, penalty="norm")


def test_with_frozen_noise_it_is_ipgo(backend):
    task = Task(backend, REWARD, PROMPTS, SAMPLING)
    inserted, initial = parts(backend)
    joint = JointAdapter.join(inserted, initial, noise_weight=10.0)
    joint.initial.requires_grad_(False)
    steps = zip(maximize(task, joint, ASCENT), maximize(task, inserted, ASCENT), strict=True)
    for ours, ipgo in steps:
        assert torch.equal(ours.rewards, ipgo.rewards)
        torch.testing.assert_close(ours.grad_norm, ipgo.grad_norm)
        noise = norm_penalty(initial.latents.detach().flatten(1))
        torch.testing.assert_close(ours.penalty, ipgo.penalty + 10 * noise)
        state = ours.state()
        assert torch.equal(state["adapter.initial.latents"], initial.latents)
        for name, value in ipgo.state().items():
            if name.startswith("adapter."):
                torch.testing.assert_close(state[name.replace("adapter.", "adapter.inserted.")], value)


def test_with_frozen_embeddings_its_gradient_is_renos(backend):
    """By hand, for prompts that are the inserted ones: reward - weight x the penalty of the norm."""
    inserted, initial = parts(backend)
    joint = JointAdapter.join(inserted, initial, noise_weight=0.5)
    joint.inserted.requires_grad_(False)
    with torch.no_grad():
        cond = inserted.condition(backend, PROMPTS, backend.encode(PROMPTS))
        uncond = backend.unconditional("", cond)
    latents = initial.latents.detach().clone().requires_grad_()
    images = sample(backend, cond, uncond, latents, SAMPLING, backprop_steps=2)
    objective = score(REWARD, images, PROMPTS) - 0.1 * 0.5 * norm_penalty(latents.flatten(1))
    (slope,) = torch.autograd.grad(objective.sum(), latents)
    norms = slope.flatten(1).norm(dim=1)
    ascent = dataclasses.replace(ASCENT, optimizer="sgd", lr=2.0, max_grad_norm=0.03)
    step = next(maximize(Task(backend, REWARD, PROMPTS, SAMPLING), joint, ascent))
    torch.testing.assert_close(step.grad_norm, norms, rtol=1e-4, atol=0)
    factor = (0.03 / norms).clamp(max=1).view(2, 1, 1, 1, 1)
    moved = latents + 2.0 * 1.9 * factor * slope  # the first step with Nesterov's momentum of 0.9
    state = step.state()
    torch.testing.assert_close(state["adapter.initial.latents"], moved, rtol=1e-4, atol=1e-5)
    for name, value in inserted.state_dict().items():
        torch.testing.assert_close(state[f"adapter.inserted.{name}"], value)


def test_both_halves_move_within_their_constraints(backend):
    method = Joint(INSERTION, ascent=dataclasses.replace(Joint().ascent, steps=2, lr=0.7))
    before, after = [step.state() for step in method.fit(Task(backend, REWARD, PROMPTS, SAMPLING))]
    for name in ("adapter.initial.latents", "adapter.inserted.prefix.coefficients"):
        assert not torch.equal(before[name], after[name])
    for side in ("prefix", "suffix"):
        assert after[f"adapter.inserted.{side}.coefficients"].abs().max() == 1


def test_a_fit_climbs_resumes_and_draws_what_it_promised(backend, tmp_path):
    method = Joint(INSERTION, ascent=dataclasses.replace(Joint().ascent, steps=5, lr=0.03))
    task = Task(backend, REWARD, PROMPTS, SAMPLING, seeds=(7,))
    steps = list(method.fit(task))
    last, first = steps[-1], next(method.fit(task))
    assert (last.best > first.rewards + 1e-4).all()
    for row, prompt in enumerate(PROMPTS):
        save_adapter(last.adapter.row(row), tmp_path / str(row))
        stored = load_adapter(tmp_path / str(row))
        images = generate(backend, [prompt], [7], stored, SAMPLING)
        torch.testing.assert_close(score(REWARD, images, [prompt]), last.best[row : row + 1])
        # On another seed it is the inserted embeddings, with plain noise.
        other = generate(backend, [prompt], [8], stored, SAMPLING)
        assert torch.equal(other, generate(backend, [prompt], [8], stored.inserted, SAMPLING))
        assert not torch.allclose(other, generate(backend, [prompt], [8], Adapter(), SAMPLING), atol=1e-4)
    rows = [last.adapter.row(row) for row in range(2)]
    for name, value in stack(rows).state_dict().items():
        assert torch.equal(value, last.adapter.state_dict()[name])
    resumed = list(method.fit(task, resume=first.state()))[-1].state()
    assert_same_state(last.state(), resumed)


@pytest.mark.parametrize("padding", ["max_length", "none"])
def test_a_plain_pipeline_draws_the_same_picture(pipe, padding):
    backend = load_backend(pipe, device="cpu", padding=padding)
    adapter = JointAdapter.join(*parts(backend, seed=7), noise_weight=10.0)
    with torch.no_grad():
        adapter.initial.latents.mul_(0.8)
    ours = generate(backend, ["sun"], [7], adapter, SAMPLING)
    kwargs = adapter.prompt_kwargs(pipe, "sun")
    theirs = pipe(**kwargs, num_inference_steps=2, guidance_scale=3.0, output_type="pt").images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_it_refuses_what_it_cannot_do(backend):
    for options, message in (
        ({"shared": True}, "shared is true; noise belongs to one prompt"),
        ({"seeds": (1, 2)}, r"seeds is \[1, 2\]; this method replaces the noise of exactly one seed"),
    ):
        with pytest.raises(InputError, match=message):
            Joint().fit(Task(backend, REWARD, PROMPTS, SAMPLING, **options))
    with pytest.raises(InputError, match="gets its gradient through all 2 steps"):
        Joint(ascent=Ascent(backprop_steps=1)).fit(Task(backend, REWARD, PROMPTS, SAMPLING))
    with pytest.raises(InputError, match=r"noise_weight is -1\.0; it must be at least 0"):
        Joint(noise_weight=-1)
