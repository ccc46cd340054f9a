"""Gradients in float16: small ones that a loss scale saves, large ones that lower it, and SDXL's decoder."""

import logging
import math

import pytest
import torch

from ipgo import policy, training
from ipgo.ascent import Ascent
from ipgo.backends import load_backend
from ipgo.insertion import Insertion
from ipgo.methods import DDPO, IPGO, DPODiffusion
from ipgo.methods import dpo_diffusion as words
from ipgo.ppo import PPO
from ipgo.rewards import as_reward
from ipgo.sampling import Sampling
from ipgo.task import Task
from tests import tiny_families as tiny
from tests.conftest import relative_error

PROMPTS = ("a red cat", "sun")
SAMPLING = Sampling(steps=2, guidance_scale=3.0)
FREE = Insertion(2, 1, basis="free", rotations="none")  # the gradient reaches the embeddings themselves


def brightness(*factors):
    """Mean brightness times a factor for each row: all that the factors change is the size of the gradient."""
    return as_reward(lambda images, prompts: images.mean((1, 2, 3)) * torch.tensor(factors), "brightness")


def states(make, dtype, reward, steps=1, **ascent):
    """The state of the loop after each step; with Nesterov's momentum the first one holds the gradient."""
    backend = load_backend(make(), device="cpu", dtype=dtype)
    ascent = {"optimizer": "sgd", "lr": 1e-6, "backprop_steps": 1, "penalty_weight": 0.0, **ascent}
    climb = Ascent(steps=steps, max_grad_norm=None, **ascent)
    task = Task(backend, reward, PROMPTS, SAMPLING)
    return [progress.state() for progress in IPGO(FREE, climb).fit(task)]


def gradient(state):
    return state["optimizer.momentum_buffer.prefix.vectors"]


@pytest.mark.parametrize("make", ["sd", "sdxl"])
def test_a_gradient_that_is_too_small_for_float16_is_saved_by_the_scale(make, make_pipe, monkeypatch):
    build, reward = {"sd": make_pipe, "sdxl": tiny.sdxl}[make], brightness(0.1, 0.1)
    exact = gradient(*states(build, "float32", reward))
    scaled = states(build, "float16", reward)[0]
    assert scaled["memory.loss_scale"].tolist() == [1024, 1024]
    assert exact.norm() > 0
    # How float16 is summed up depends on the processor: 0.018 for sdxl where it has instructions for that.
    assert relative_error(gradient(scaled), exact) < {"sd": 0.01, "sdxl": 0.03}[make]
    monkeypatch.setattr(training, "FLOAT16_SCALE", 1.0)
    lost = gradient(*states(build, "float16", reward))
    assert relative_error(lost, exact) > 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_formats_have_no_scale(make_pipe, dtype):
    assert states(make_pipe, dtype, brightness(1.0, 1.0))[0]["memory.loss_scale"].tolist() == [1, 1]


def test_a_gradient_that_overflows_lowers_the_scale_of_its_row(make_pipe):
    reward = brightness(1.0, 1e6)
    exact = gradient(*states(make_pipe, "float32", reward))
    found = states(make_pipe, "float16", reward, steps=12)
    scales = torch.stack([state["memory.loss_scale"] for state in found])
    assert (scales[:, 0] == 1024).all()
    assert scales[0, 1] == 512
    assert 1 < scales[-1, 1] < 128  # more halvings than a bad row is forgiven
    assert (found[-1]["memory.misses"] == 0).all()
    first = next(state for state in found if gradient(state)[1].norm() > 0)
    assert relative_error(gradient(first)[1], exact[1]) < 0.05


def test_a_row_that_overflows_without_a_scale_is_given_up_with_a_word(make_pipe, caplog):
    def reward(images, prompts):
        values = images.mean((1, 2, 3))
        root = (values - values.detach()).abs()[1:].sqrt()  # of zero: its slope is infinite
        return values + torch.cat([torch.zeros(1), root])

    with caplog.at_level(logging.WARNING, "ipgo"):
        found = states(make_pipe, "float16", as_reward(reward, "troubled"), steps=14)
    assert found[9]["memory.loss_scale"].tolist() == [1024, 1]
    assert found[9]["memory.misses"].tolist() == [0, 0]
    assert found[-1]["memory.misses"].tolist() == [0, 4]
    assert [record.getMessage() for record in caplog.records if record.name == "ipgo"] == [
        "prompt 'sun' is given up: reward or gradient was not finite 3 times; "
        "float16 may be too coarse, so try bfloat16 or float32"
    ]


@pytest.mark.parametrize("shared", [False, True])
def test_an_image_that_is_not_finite_is_not_the_scales_fault(make_pipe, shared):
    pipe = make_pipe()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(math.nan)
    backend = load_backend(pipe, device="cpu", dtype="float16")
    task = Task(backend, brightness(1.0, 1.0), PROMPTS, SAMPLING, shared=shared)
    found = list(IPGO(FREE, Ascent(steps=9, backprop_steps=1, batch_size=2, accumulate=1)).fit(task))
    assert len(found) == 3
    assert found[-1].failed.all()
    assert set(found[-1].state()["memory.loss_scale"].tolist()) == {1024}


def test_policy_gradients_lower_their_scale(make_pipe, monkeypatch):
    backend = load_backend(make_pipe(), device="cpu", dtype="float16")
    method = DDPO(ppo=PPO(epochs=5, samples=2, batch_size=2, accumulate=1, lr=1e-4))
    task = Task(backend, brightness(1.0, 1.0), PROMPTS, SAMPLING, shared=True)
    exact = list(method.fit(task))
    assert exact[-1].state()["memory.loss_scale"] == 1024
    surrogate = policy.surrogate
    monkeypatch.setattr(policy, "surrogate", lambda *given: surrogate(*given) * 1e9)
    found = [progress.state() for progress in method.fit(task)]
    assert [int(state["memory.loss_scale"]) for state in found[:4]] == [512, 256, 128, 64]
    assert [int(state["memory.misses"]) for state in found[:4]] == [0, 0, 0, 0]


def test_the_gradient_of_words_is_scaled_and_lowers_its_scale(make_pipe, monkeypatch):
    def logits(dtype, factor):
        backend = load_backend(make_pipe(), device="cpu", dtype=dtype)
        reward = as_reward(lambda images, prompts: images.mean((1, 2, 3)) * factor, "brightness")
        task = Task(backend, reward, ("a red fox",), SAMPLING)
        method = DPODiffusion(solver="gradient", word_list="emoji", gradient_steps=1, candidates=1)
        return next(iter(method.fit(task))).state()

    exact, scaled = logits("float32", 1e-4), logits("float16", 1e-4)
    assert scaled["proposer.loss_scale"].tolist() == [1024]
    assert exact["proposer.squares"].norm() > 0
    assert relative_error(scaled["proposer.squares"].sqrt(), exact["proposer.squares"].sqrt()) < 0.05
    overflowing = logits("float16", 1e9)
    assert overflowing["proposer.loss_scale"].tolist() == [512]
    monkeypatch.setattr(words, "FLOAT16_SCALE", 1.0)
    lost = logits("float16", 1e-4)
    assert relative_error(lost["proposer.squares"].sqrt(), exact["proposer.squares"].sqrt()) > 0.3


def test_pixart_sigmas_vae_is_that_of_sdxl():
    sigma = load_backend(tiny.pixart_sigma(), device="cpu", dtype="float16")
    assert sigma.pipe.vae.config.force_upcast
    assert next(sigma.modules["decoder"].parameters()).dtype == torch.float32
    alpha = load_backend(tiny.pixart(), device="cpu", dtype="float16")
    assert next(alpha.modules["decoder"].parameters()).dtype == torch.float16


def test_t5_keeps_what_would_overflow_in_float32():
    pipe = tiny.pixart()
    weights = {name: each.clone() for name, each in pipe.text_encoder.named_parameters()}
    load_backend(pipe, device="cpu", dtype="float16")
    kept = {name for name, each in pipe.text_encoder.named_parameters() if each.dtype == torch.float32}
    assert kept
    assert all("wo" in name.split(".") for name in kept)
    assert all(
        torch.equal(each, weights[name])
        for name, each in pipe.text_encoder.named_parameters()
        if name in kept
    )


def test_sdxls_fixed_vae_stays_in_float16():
    """A pipeline whose VAE needs no float32 says so, as madebyollin/sdxl-vae-fp16-fix does."""
    pipe = tiny.sdxl(force_upcast=False)
    backend = load_backend(pipe, device="cpu", dtype="float16")
    assert backend.modules["decoder"] is pipe.vae
    assert pipe.vae.dtype == torch.float16
    images = backend.decode(backend.noise([0])[:, 0])
    assert images.dtype == torch.float32
    exact = load_backend(tiny.sdxl(force_upcast=False), device="cpu").decode(backend.noise([0])[:, 0])
    assert (images - exact).abs().max() < 1e-2
