"""Decoding with the decoder's blocks computed again: the same gradient, less memory, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ipgo import sampling as sampling_module
from ipgo.backends import Backend, load_backend
from ipgo.backends.recomputing import TRANSFORMER, blocks, recomputed
from ipgo.memory import LiveMemory
from ipgo.sampling import Sampling, decode, denoise, last_latents
from tests import tiny_families
from tests.conftest import tiny_pipeline

FAMILIES = (
    tiny_pipeline, tiny_families.sdxl, tiny_families.sd3, tiny_families.sana, tiny_families.flux_2,
    tiny_families.qwen_image,
)  # fmt: skip


def decoder_of(backend: Backend) -> nn.Module:
    vae: Any = backend.modules["decoder"]
    decoder: nn.Module = vae.decoder
    return decoder


def attributes(network: nn.Module) -> list[set[str]]:
    return [set(vars(part)) for part in network.modules()]


def latents_of(backend: Backend, rows: int = 2) -> Tensor:
    return backend.noise(range(rows))[:, 0].requires_grad_()


def gradient(latents: Tensor, images: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, images.numel()).view_as(images)
    return torch.autograd.grad((images * weights).sum(), latents)[0]


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_the_gradient_is_the_same_and_the_decoder_as_before(make: Callable[[], Any]) -> None:
    backend = load_backend(make(), device="cpu", image_size=None if make is tiny_pipeline else 32)
    decoder = decoder_of(backend)
    assert bool(blocks(decoder)) == (make is not tiny_families.qwen_image)
    before, latents = attributes(decoder), latents_of(backend)
    whole = gradient(latents, backend.decode(latents))
    assert whole.abs().max() > 0
    backend.calls.clear()
    images = decode(backend, latents, recompute=True)
    assert attributes(decoder) == before  # already, though the backward pass is still to come
    torch.testing.assert_close(gradient(latents, images), whole)
    assert backend.calls["decoder"] == 2 * len(latents)


TRANSFORMERS = (
    tiny_families.sd3, tiny_families.flux, tiny_families.sana, tiny_families.qwen_image, tiny_families.z_image,
    tiny_families.flux_2, tiny_families.chroma,
)  # fmt: skip


def gradient_of_embeddings(backend: Backend, recompute: bool) -> tuple[Tensor, int]:
    """Through two steps, and the most memory that was alive."""
    cond = backend.encode(["a fox"])
    embeds = cond.embeds.detach().requires_grad_()
    cond, noise = replace(cond, embeds=embeds), backend.noise([0])
    sampling = Sampling(steps=2, fit_steps=None, guidance_scale=1.0)
    with LiveMemory() as memory:
        walk = denoise(backend, cond, None, noise, sampling, backprop_steps=2, recompute=recompute)
        return gradient(embeds, last_latents(walk)), memory.peak


@pytest.mark.parametrize("make", TRANSFORMERS, ids=lambda make: make.__name__)
def test_a_transformer_is_computed_again_block_by_block(make: Callable[[], Any]) -> None:
    backend = load_backend(make(), device="cpu", image_size=32)
    denoiser = backend.modules["denoiser"]
    before, found = attributes(denoiser), blocks(denoiser, TRANSFORMER)
    assert found
    whole, _ = gradient_of_embeddings(backend, recompute=False)
    times = dict.fromkeys(found, 0)
    for block in found:
        block.register_forward_pre_hook(lambda block, _: times.update({block: times[block] + 1}))
    again, _ = gradient_of_embeddings(backend, recompute=True)
    assert whole.abs().max() > 0
    torch.testing.assert_close(again, whole)
    assert attributes(denoiser) == before
    # A block's own second and third time go by its forward, not by its hooks.
    assert set(times.values()) == {2 * 2}


@pytest.mark.parametrize("make", dict.fromkeys((*FAMILIES, *TRANSFORMERS)), ids=lambda make: make.__name__)
def test_the_pipelines_own_checkpointing_rests(make: Callable[[], Any]) -> None:
    backend = load_backend(make(), device="cpu", image_size=None if make is tiny_pipeline else 32)
    networks: list[Any] = [backend.modules["denoiser"], backend.modules["decoder"]]
    latents = latents_of(backend)
    whole = gradient_of_embeddings(backend, recompute=False)[0], gradient(latents, backend.decode(latents))
    for network in networks:
        if network._supports_gradient_checkpointing:
            network.enable_gradient_checkpointing()
    switched = [network.is_gradient_checkpointing for network in networks]
    assert any(switched)
    again, _ = gradient_of_embeddings(backend, recompute=True)
    torch.testing.assert_close(again, whole[0])
    torch.testing.assert_close(gradient(latents, decode(backend, latents, recompute=True)), whole[1])
    assert [network.is_gradient_checkpointing for network in networks] == switched


def test_of_a_deep_transformer_only_one_block_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_families.flux()
    for kind in ("transformer_blocks", "single_transformer_blocks"):
        (*_, last) = getattr(pipe.transformer, kind)
        setattr(pipe.transformer, kind, nn.ModuleList(deepcopy(last) for _ in range(8)))
    backend = load_backend(pipe, device="cpu", image_size=32)
    _, kept = gradient_of_embeddings(backend, recompute=False)
    _, parts = gradient_of_embeddings(backend, recompute=True)
    monkeypatch.setattr(sampling_module, "TRANSFORMER", frozenset())
    _, whole = gradient_of_embeddings(backend, recompute=True)
    assert parts < 0.5 * whole
    assert whole < 0.7 * kept


def test_after_an_error_the_decoder_is_as_before(backend: Backend) -> None:
    decoder = decoder_of(backend)
    before = attributes(decoder)
    with pytest.raises(RuntimeError):
        decode(backend, torch.zeros(1, 7, 8, 8), recompute=True)
    assert attributes(decoder) == before


def test_a_forward_that_was_replaced_is_used_and_stays() -> None:
    """As a hook does that moves weights to the device and away."""
    backend = load_backend(tiny_pipeline(), device="cpu")
    block, calls = blocks(decoder_of(backend))[0], list[int]()
    own = block.forward

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    block.forward = hooked
    latents = latents_of(backend)
    gradient(latents, decode(backend, latents, recompute=True))
    assert block.forward is hooked
    assert len(calls) == 2 * len(latents)  # row by row, each once for the picture and once for its gradient


def test_without_gradient_nothing_is_computed_again(backend: Backend) -> None:
    with torch.no_grad():
        decode(backend, backend.noise([0])[:, 0], recompute=True)
    assert backend.calls["decoder"] == 1


def test_it_takes_less_memory_than_the_decoder_as_a_whole(backend: Backend) -> None:
    """Most of all of the kept activations, and much of those of a decoder that is computed again in one."""
    ways: tuple[Callable[[Tensor], Tensor], ...] = (
        backend.decode,
        lambda latents: checkpoint(backend.decode, latents, use_reentrant=False),
        lambda latents: decode(backend, latents, recompute=True),
    )
    peaks = []
    for way in ways:
        latents = latents_of(backend, 4)
        with LiveMemory() as memory:
            gradient(latents, way(latents))
        peaks.append(memory.peak)
    kept, whole, parts = peaks
    assert parts < 0.6 * whole
    assert whole <= 1.05 * kept


def test_more_rows_take_little_more(backend: Backend) -> None:
    """They are decoded one by one: of another row there is what goes into its blocks, not what is inside of them."""
    peaks = []
    for rows in (1, 2, 4):
        latents = latents_of(backend, rows)
        with LiveMemory() as memory:
            gradient(latents, decode(backend, latents, recompute=True))
        peaks.append(memory.peak)
    one, two, four = peaks
    assert two < 1.7 * one
    assert four < 3 * one


def test_no_block_contains_another(backend: Backend) -> None:
    decoder = decoder_of(backend)
    found = blocks(decoder)
    inside = [part for block in found for part in block.modules()]
    assert len(inside) == len({id(part) for part in inside})
    with recomputed(decoder):
        assert all("forward" in vars(block) for block in found)
    assert not any("forward" in vars(block) for block in found)
