"""The ComfyUI node against the contract of the stock nodes: conditioning is a list of [states, facts]."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import ipgo
from ipgo.backends import Backend

FILE = Path(__file__).parents[2] / "integrations/comfyui_ipgo.py"
PROMPTS = ("a fox", "a lemon")


@pytest.fixture(scope="module")
def node() -> Any:
    source = importlib.util.spec_from_file_location("comfyui_ipgo", FILE)
    assert source is not None
    assert source.loader is not None
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS["IPGOEmbeddings"]()


def concat(conditioning_to: Any, conditioning_from: Any) -> Any:
    """What the stock Conditioning (Concat) does to the tensors."""
    other = conditioning_from[0][0]
    return [[torch.cat((states, other), 1), about.copy()] for states, about in conditioning_to]


BARE = {"cross_attention": "none", "negative": False}


def saved(backend: Backend, folder: Path, **insertion: Any) -> ipgo.InsertionAdapter:
    adapter = ipgo.InsertionAdapter.start(
        backend, PROMPTS, ipgo.Insertion(2, 1, **BARE | insertion), seed=0, shared=False
    )
    ipgo.save_adapter(adapter, folder)
    return adapter


def test_the_node_inserts_what_ipgo_inserts(node: Any, backend: Backend, tmp_path: Path) -> None:
    adapter = saved(backend, tmp_path)
    text = backend.encode(["a lemon"])
    facts = {"pooled_output": torch.ones(1, 4), "start_percent": 0.5}
    (found,) = node.insert([[text.embeds, facts]], str(tmp_path), "a lemon")
    (states, about) = found[0]
    with torch.no_grad():
        ours = adapter.condition(backend, ["a lemon"], text).embeds
    assert torch.equal(states, ours)
    assert about == facts
    assert about is not facts
    # The same as two stock nodes that concatenate the sides.
    prefix, suffix = ours[:, :2], ours[:, -1:]
    stock = concat(concat([[prefix, facts]], [[text.embeds, {}]]), [[suffix, {}]])
    assert torch.equal(states, stock[0][0])
    (batch,) = node.insert([[text.embeds.repeat(3, 1, 1), {}]], str(tmp_path), "a lemon")
    assert torch.equal(batch[0][0], ours.repeat(3, 1, 1))


def test_the_picture_is_that_of_our_own_sampler(
    node: Any, pipe: StableDiffusionPipeline, backend: Backend, tmp_path: Path
) -> None:
    adapter = saved(backend, tmp_path)
    (found,) = node.insert([[backend.encode(["a fox"]).embeds, {}]], str(tmp_path), "a fox")
    image = pipe(
        prompt_embeds=found[0][0],
        guidance_scale=1,
        num_inference_steps=3,
        latents=backend.noise([0])[:, 0],
        output_type="pt",
    ).images
    sampling = ipgo.Sampling(steps=3, guidance_scale=1)
    torch.testing.assert_close(
        image, ipgo.generate(backend, ["a fox"], [0], adapter, sampling), atol=1e-4, rtol=0
    )


def test_what_the_node_cannot_take_is_named(node: Any, backend: Backend, tmp_path: Path) -> None:
    text = backend.encode(["a fox"]).embeds
    saved(backend, tmp_path / "own")
    with pytest.raises(ipgo.InputError, match="was not fitted to prompt 'a foxx'; nearest: 'a fox'"):
        node.insert([[text, {}]], str(tmp_path / "own"), "a foxx")
    with pytest.raises(ipgo.InputError, match="this conditioning is 8 wide"):
        node.insert([[text[..., :8], {}]], str(tmp_path / "own"), "a fox")
    saved(backend, tmp_path / "plus", cross_attention="residual")
    with pytest.raises(ipgo.InputError, match="cross_attention='residual'"):
        node.insert([[text, {}]], str(tmp_path / "plus"), "a fox")
    saved(backend, tmp_path / "both", negative=True)
    with pytest.raises(ipgo.InputError, match="negative"):
        node.insert([[text, {}]], str(tmp_path / "both"), "a fox")
    assert set(node.INPUT_TYPES()["required"]) == {"conditioning", "adapter"}
