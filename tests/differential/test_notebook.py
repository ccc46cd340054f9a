"""The paper-code settings against the arithmetic of the authors' notebook, written out independently."""

from dataclasses import replace

import pytest
import torch
from diffusers import LMSDiscreteScheduler
from torch import nn

from ipgo.adapters import InsertionAdapter
from ipgo.backends import load_backend
from ipgo.insertion import InsertedEmbeddings, Insertion, orthonormal
from ipgo.sampling import Sampling, sample

PAPER_CODE = Insertion(
    num_prefix=10,
    num_suffix=10,
    rank=300,
    rotations="unused",
    bias=True,
    norm=None,
    cross_attention="none",
    start=1,
)
SMALL = replace(PAPER_CODE, num_prefix=3, num_suffix=3, rank=20)
STEPS, GUIDANCE, K = 6, 7.5, 2
PROMPT = "a red cat"


def test_the_number_of_parameters_is_the_papers():
    adapter = InsertionAdapter(None, 768, PAPER_CODE, "none")
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 468_376


def notebook_side(side):
    """E z + b for each embedding: an `nn.Linear` with orthonormal weight, and z clamped on the way."""
    linear = nn.Linear(side.rank, side.raw_basis.shape[1])
    with torch.no_grad():
        linear.weight.copy_(orthonormal(side.raw_basis)[0])
        linear.bias.copy_(side.bias[0, 0])
    return torch.stack([linear(z.clamp(-1, 1)) for z in side.coefficients[0]])[None], linear


def test_the_embeddings_are_the_notebooks():
    side = InsertedEmbeddings([5], 10, 768, PAPER_CODE)
    theirs, linear = notebook_side(side)
    torch.testing.assert_close(side(torch.zeros(1, dtype=torch.long)), theirs, atol=1e-5, rtol=1e-5)
    gram = linear.weight.T @ linear.weight
    torch.testing.assert_close(gram, torch.eye(300), atol=1e-5, rtol=0)
    assert theirs.norm(dim=-1).mean().item() == pytest.approx(10, rel=0.05)
    assert side.coefficients.abs().max() <= 1
    assert side.angles.abs().max() <= torch.pi


def test_the_noise_levels_are_the_notebooks(make_pipe):
    backend = load_backend(make_pipe(), device="cpu", scheduler="lms")
    ours = backend.scheduler(50, torch.zeros(1))
    theirs = LMSDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    theirs.set_timesteps(50)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert ours.timesteps[[0, 1, -1]].tolist() == pytest.approx([999, 978.6122, 0], abs=1e-3)
    assert ours.init_noise_sigma.item() == pytest.approx(14.6146, abs=1e-3)


def notebook_loss(pipe, prefix, suffix, noise):
    """Encode without padding, insert, denoise with gradient in the last K predictions, decode, penalise."""
    tokens = pipe.tokenizer(PROMPT, padding=False, return_tensors="pt").input_ids
    states = pipe.text_encoder(tokens)[0]
    cond = torch.cat([prefix, states, suffix], dim=1)
    empty = pipe.tokenizer("", padding="max_length", max_length=cond.shape[1], return_tensors="pt").input_ids
    both = torch.cat([pipe.text_encoder(empty)[0], cond])
    scheduler = LMSDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    scheduler.set_timesteps(STEPS)
    latents = noise * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        inputs = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        prediction = pipe.unet(inputs, t, encoder_hidden_states=both).sample
        if i < STEPS - K:
            prediction = prediction.detach()
        empty_half, text_half = prediction.chunk(2)
        prediction = empty_half + GUIDANCE * (text_half - empty_half)
        latents = scheduler.step(prediction, t, latents).prev_sample
    image = (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    penalty = (cond.mean(1) - states.mean(1)).abs().mean()
    return image, penalty


def test_image_penalty_and_gradient_are_the_notebooks(make_pipe):
    pipe = make_pipe()
    backend = load_backend(pipe, device="cpu", scheduler="lms", padding="none")
    adapter = InsertionAdapter((PROMPT,), 32, SMALL, "none")
    noise = backend.noise([0])

    original = backend.encode([PROMPT])
    cond = adapter.condition(backend, [PROMPT], original)
    ours = sample(
        backend,
        cond,
        backend.unconditional("", cond),
        noise,
        Sampling(STEPS, GUIDANCE),
        backprop_steps=K,
    )
    penalty = adapter.penalty(original, cond, noise).sum()
    (ours.square().sum() - 0.001 * penalty).backward()

    (prefix, linear), (suffix, _) = notebook_side(adapter.prefix), notebook_side(adapter.suffix)
    theirs, their_penalty = notebook_loss(pipe, prefix, suffix, noise[:, 0])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(penalty, their_penalty)

    ours_grads = adapter.prefix.coefficients.grad.clone(), adapter.prefix.bias.grad[0, 0].clone()
    adapter.zero_grad()
    (theirs.square().sum() - 0.001 * their_penalty).backward()
    their_grads = adapter.prefix.coefficients.grad, linear.bias.grad
    for mine, their in zip(ours_grads, their_grads, strict=True):
        assert (mine - their).norm() < 1e-4 * their.norm()
