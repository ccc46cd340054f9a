"""Gradients against finite differences, in float64."""

import pytest
import torch

from ipgo.adapters import InsertionAdapter, generate
from ipgo.backends import load_backend
from ipgo.embeds import PromptEmbeds
from ipgo.insertion import Insertion, combine, cross_attend, orthonormal, rotate
from ipgo.rewards.pixels import colorfulness, contrast
from ipgo.sampling import Sampling, denoise, sample
from tests.conftest import difference_quotient

PROMPTS = ("a red cat", "sun")


def random(*shape, seed=0):
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_()


def test_the_parts():
    check = torch.autograd.gradcheck
    mask = torch.tensor([[True, True, False, True]])
    assert check(rotate, (random(2, 3, 6), random(2, 3, 2)))
    assert check(orthonormal, random(2, 5, 3))
    assert check(combine, (random(2, 4, 3), random(2, 5, 3, seed=1)))
    unit = torch.full((1,), 2.0, dtype=torch.float64)
    assert check(
        lambda q, k: cross_attend(q, PromptEmbeds(k, mask), unit), (random(1, 2, 6), random(1, 4, 6))
    )
    for reward in (colorfulness, contrast):
        assert check(lambda images, reward=reward: reward(images, []), random(2, 3, 4, 4))


@pytest.mark.parametrize("rank", [3, 8])
def test_the_thin_gradient_of_the_basis_is_that_of_autograd(rank):
    """Where a fit begins, and where diag R has other signs than LAPACK's."""
    for raw in (orthonormal(random(2, 8, rank)).detach().requires_grad_(), random(2, 8, rank, seed=1)):
        coefficients, weight = random(2, 4, rank, seed=2), random(2, 4, 8, seed=3).detach()
        ours, theirs = combine(coefficients, raw), coefficients @ orthonormal(raw).mT
        assert torch.equal(ours, theirs)
        inputs = coefficients, raw
        for mine, other in zip(
            torch.autograd.grad((ours * weight).sum(), inputs),
            torch.autograd.grad((theirs * weight).sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("cross_attention", ["none", "residual", "fixed"])
@pytest.mark.parametrize("padding", ["max_length", "none"])
def test_every_parameter_through_the_whole_way(make_pipe, padding, cross_attention):
    """d reward / d parameters along a random direction, through 2 of 2 steps, guidance and the decoder."""
    backend = load_backend(make_pipe(), device="cpu", dtype="float64", padding=padding)
    insertion = Insertion(2, 2, rank=6, bias=True, cross_attention=cross_attention)
    adapter = InsertionAdapter(PROMPTS, 32, insertion, padding).double()
    sampling = Sampling(steps=2, guidance_scale=3.0)

    def reward(backprop_steps):
        images = generate(backend, PROMPTS, [0, 1], adapter, sampling, backprop_steps=backprop_steps)
        return colorfulness(images, PROMPTS).sum()

    reward(2).backward()
    for number, (name, parameter) in enumerate(adapter.named_parameters()):
        direction = random(*parameter.shape, seed=100 + number).detach()
        slope = (parameter.grad * direction).sum()
        measured = difference_quotient(lambda: reward(0), [parameter], [direction])
        assert slope.abs() > 1e-6, name
        torch.testing.assert_close(slope, measured, rtol=1e-4, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", ["ddim", "lms", "pndm", "dpm++"])
def test_truncation_keeps_early_steps_out_of_the_graph(make_pipe, name):
    """The last K steps from where the early ones led, written out, give the same gradient."""
    backend = load_backend(make_pipe(), device="cpu", scheduler=name)
    original = backend.encode(PROMPTS)
    cond = PromptEmbeds(original.embeds.clone().requires_grad_(), original.mask)
    uncond = backend.unconditional("", cond)
    noise = backend.noise([0, 1])
    steps = list(denoise(backend, cond, uncond, noise, Sampling(5), backprop_steps=2))
    assert torch.is_grad_enabled()
    tracked = [step.next_latents.requires_grad for step in steps]
    assert tracked == [False] * (len(steps) - 2) + [True, True]
    for step in steps[:-2]:
        assert step.prediction.grad_fn is None

    images = sample(backend, cond, uncond, noise, Sampling(5), backprop_steps=1)
    images.sum().backward()
    truncated = cond.embeds.grad.clone()

    # The same by hand: the last call alone, with the scheduler's history as constants.
    cond.embeds.grad = None
    walk = denoise(backend, PromptEmbeds(original.embeds, original.mask), uncond, noise, Sampling(5))
    constants = list(walk)
    scheduler = backend.scheduler(5, noise[:, 0])
    for step in constants[:-1]:
        scheduler.scale_model_input(step.latents, step.timestep)
        scheduler.step(step.prediction, step.timestep, step.latents)
    last = constants[-1]
    inputs = scheduler.scale_model_input(last.latents, last.timestep)
    prediction = backend.predict(inputs, last.timestep, cond, uncond, Sampling().scale(backend))
    backend.decode(scheduler.step(prediction, last.timestep, last.latents).prev_sample).sum().backward()
    assert (cond.embeds.grad - truncated).norm() < 1e-4 * truncated.norm()
