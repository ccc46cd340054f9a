"""Ours against `StableDiffusionPipeline` itself, on the same weights and noise."""

import pytest
import torch

from ipgo.adapters import Adapter, generate
from ipgo.backends import load_backend
from ipgo.embeds import PromptEmbeds
from ipgo.sampling import Sampling, ddim_step, sample
from tests.conftest import relative_error

PROMPTS = ["a red cat", "a dog on the moon", "sun"]
STEPS = 5
SAMPLING = Sampling(STEPS, 7.5)


def undecorated(pipe, **kwargs):
    """`pipe(...)` with gradients."""
    return (
        type(pipe)
        .__call__.__wrapped__(
            pipe,
            num_inference_steps=STEPS,
            guidance_scale=SAMPLING.guidance_scale,
            output_type="pt",
            **kwargs,
        )
        .images
    )


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("name", ["ddim", "lms", "pndm", "euler", "dpm++"])
def test_sampling_equals_the_pipeline(make_pipe, name, guidance_scale, count):
    pipe = make_pipe()
    backend = load_backend(pipe, device="cpu", scheduler=name)
    seeds = [11, 12, 13][:count]
    ours = generate(backend, PROMPTS[:count], seeds, Adapter(), Sampling(STEPS, guidance_scale))
    pipe.scheduler = backend.scheduler(STEPS, torch.zeros(1))
    theirs = pipe(
        PROMPTS[:count],
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_the_models_own_scheduler_and_a_negative_prompt(pipe):
    backend = load_backend(pipe, device="cpu")
    sampling = Sampling(STEPS, 7.5, negative_prompt="blurry")
    ours = generate(backend, PROMPTS[:1], [3], Adapter(), sampling)
    theirs = pipe(
        PROMPTS[:1],
        num_inference_steps=STEPS,
        negative_prompt=["blurry"],
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_velocity_prediction_of_stable_diffusion_2(make_pipe, name):
    pipe = make_pipe(prediction_type="v_prediction")
    backend = load_backend(pipe, device="cpu", scheduler=name)
    ours = generate(backend, PROMPTS[:1], [3], Adapter(), SAMPLING)
    pipe.scheduler = backend.scheduler(STEPS, torch.zeros(1))
    theirs = pipe(
        PROMPTS[:1],
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def gradient_of(backend, images_of):
    """d mean(images * weights) / d cond.embeds."""
    cond = backend.encode(PROMPTS[:2])
    leaf = cond.embeds.clone().requires_grad_()
    uncond = backend.unconditional("", cond)
    images = images_of(PromptEmbeds(leaf, cond.mask), uncond)
    weights = torch.linspace(-1, 1, images.numel(), dtype=images.dtype).view_as(images)
    (images * weights).sum().backward()
    return leaf.grad


@pytest.mark.parametrize("backprop_steps", [1, 2, STEPS])
def test_our_gradient_is_that_of_the_undecorated_pipeline(make_pipe, backprop_steps):
    """The pipeline's is truncated by a callback that detaches the latents."""
    pipe = make_pipe()
    backend = load_backend(pipe, device="cpu")
    noise = backend.noise([0, 1])

    def ours(cond, uncond):
        return sample(backend, cond, uncond, noise, SAMPLING, backprop_steps=backprop_steps)

    def detach(pipe, index, timestep, tensors):
        latents = tensors["latents"]
        return {"latents": latents.detach() if index < STEPS - backprop_steps else latents}

    def theirs(cond, uncond):
        return undecorated(
            pipe,
            prompt_embeds=cond.embeds,
            negative_prompt_embeds=uncond.embeds,
            latents=noise[:, 0],
            callback_on_step_end=detach,
        )

    assert relative_error(gradient_of(backend, ours), gradient_of(backend, theirs)) < 1e-4


@pytest.mark.parametrize("name", ["lms", "pndm", "euler", "dpm++"])
def test_the_full_gradient_through_every_scheduler(make_pipe, name):
    pipe = make_pipe()
    backend = load_backend(pipe, device="cpu", scheduler=name)
    pipe.scheduler = backend.scheduler(STEPS, torch.zeros(1))
    noise = backend.noise([0, 1])

    def ours(cond, uncond):
        return sample(backend, cond, uncond, noise, SAMPLING, backprop_steps=STEPS)

    def theirs(cond, uncond):
        return undecorated(
            pipe,
            prompt_embeds=cond.embeds,
            negative_prompt_embeds=uncond.embeds,
            latents=noise[:, 0],
        )

    assert relative_error(gradient_of(backend, ours), gradient_of(backend, theirs)) < 1e-4


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_a_stochastic_step_equals_diffusers(backend, eta):
    latents, prediction, draw = backend.noise([0, 1], steps=2).unbind(1)
    scheduler = backend.scheduler(STEPS, latents)
    for timestep in scheduler.timesteps:
        mean, std = ddim_step(scheduler, prediction, timestep, latents, eta)
        theirs = scheduler.step(prediction, timestep, latents, eta=eta, variance_noise=draw).prev_sample
        torch.testing.assert_close(mean + std * draw, theirs)


def test_stochastic_sampling_uses_the_noise_of_its_row(backend):
    sampling = Sampling(STEPS, 1.0, eta=1.0)
    pair = generate(backend, PROMPTS[:2], [3, 4], Adapter(), sampling)
    alone = generate(backend, PROMPTS[1:2], [4], Adapter(), sampling)
    torch.testing.assert_close(pair[1:], alone, atol=1e-5, rtol=0)
    calm = generate(backend, PROMPTS[1:2], [4], Adapter(), Sampling(STEPS, 1.0))
    assert not torch.allclose(alone, calm, atol=1e-2)


@pytest.mark.parametrize("padding", ["max_length", "none"])
def test_recomputation_changes_no_gradient(make_pipe, padding):
    backend = load_backend(make_pipe(), device="cpu", padding=padding)
    noise = backend.noise([0, 1])
    grads = [
        gradient_of(
            backend,
            lambda cond, uncond, again=again: sample(
                backend, cond, uncond, noise, SAMPLING, backprop_steps=2, recompute=again
            ),
        )
        for again in (False, True)
    ]
    assert relative_error(*grads) < 1e-4
