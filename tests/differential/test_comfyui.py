"""The ComfyUI node against the contract of the stock nodes: what CLIP gives, and conditioning as [states, facts]."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import ipgo
from ipgo.backends import Backend

FILE = Path(__file__).parents[2] / "integrations/comfyui_ipgo.py"
PROMPTS = ("a fox", "a lemon", "a (ripe) lemon")
START, END = 49406, 49407  # of the published CLIP
FACTS = {"pooled_output": torch.ones(1, 4), "start_percent": 0.5}


class Clip:
    """What ComfyUI's CLIP gives: rows of (token, weight), with CLIP's own marks, and conditioning made of them."""

    def __init__(
        self, pipe: StableDiffusionPipeline, keys: tuple[str, ...] = ("l",), windows: int = 1, end: int = END
    ) -> None:
        self.pipe, self.keys, self.windows, self.end = pipe, keys, windows, end

    def tokenize(self, text: str) -> dict[str, list[list[tuple[int, float]]]]:
        tokenizer = self.pipe.tokenizer
        plain = re.sub(r"\\([()])|[()]", lambda found: found[1] or "", text)  # others are emphasis
        own = tokenizer(plain).input_ids[1:-1]
        window = [START, *own, self.end]
        window += [self.end] * (tokenizer.model_max_length - len(window))
        return {key: [[(token, 1.0) for token in window]] * self.windows for key in self.keys}

    def encode_from_tokens_scheduled(self, tokens: dict[str, list[list[tuple[int, float]]]]) -> list[Any]:
        tokenizer = self.pipe.tokenizer
        (window,) = tokens["l"]
        marks = {START: tokenizer.bos_token_id, END: tokenizer.eos_token_id}
        ids = torch.tensor([[marks.get(token, token) for token, _ in window]])
        ids[0, [token for token, _ in window].index(END) + 1 :] = tokenizer.pad_token_id
        with torch.no_grad():
            return [[self.pipe.text_encoder(ids)[0], dict(FACTS)]]


@pytest.fixture(scope="module")
def module() -> Any:
    source = importlib.util.spec_from_file_location("comfyui_ipgo", FILE)
    assert source is not None
    assert source.loader is not None
    found = importlib.util.module_from_spec(source)
    source.loader.exec_module(found)
    return found


@pytest.fixture
def node(module: Any) -> Any:
    return module.NODE_CLASS_MAPPINGS["IPGOTextEncode"]()


def saved(backend: Backend, folder: Path, **insertion: Any) -> ipgo.InsertionAdapter:
    adapter = ipgo.InsertionAdapter.start(
        backend, PROMPTS, ipgo.Insertion(2, 1, **insertion), seed=0, shared=False
    )
    ipgo.save_adapter(adapter, folder)
    return adapter


def test_bare_embeddings_are_put_in_as_the_stock_concat_does(
    node: Any, pipe: StableDiffusionPipeline, backend: Backend, tmp_path: Path
) -> None:
    adapter = saved(backend, tmp_path, cross_attention="none", negative=False)
    clip = Clip(pipe)
    ((states, about),), ((negative, _),) = node.encode(clip, "a lemon", str(tmp_path), "a dog")
    with torch.no_grad():
        prefix, suffix = (side(torch.tensor([1])) for side in (adapter.prefix, adapter.suffix))
    (text, _), (other, _) = (
        clip.encode_from_tokens_scheduled(clip.tokenize(words))[0] for words in ("a lemon", "a dog")
    )
    unit = text[:, : len("a lemon") + 2].norm(dim=-1).median()
    prefix, suffix = prefix * unit, suffix * unit
    assert torch.equal(states, torch.cat((torch.cat((prefix, text), 1), suffix), 1))
    assert torch.equal(negative, other)
    assert about == FACTS


@pytest.mark.parametrize(
    "insertion",
    [{}, {"cross_attention": "none"}, {"negative": False}, {"cross_attention": "fixed"}],
    ids=["the default", "bare", "around the prompt", "fixed"],
)
@pytest.mark.parametrize(("text", "negative"), [("a fox", ""), ("a fox", "a dog"), ("a (ripe) lemon", "")])
def test_the_picture_is_that_of_our_own_sampler(
    node: Any,
    pipe: StableDiffusionPipeline,
    backend: Backend,
    tmp_path: Path,
    insertion: dict[str, Any],
    text: str,
    negative: str,
) -> None:
    """Drawn by the stock pipeline, which wants prompts of one length; the states equal ours in any case."""
    adapter = saved(backend, tmp_path, **insertion)
    ((cond, _),), ((uncond, _),) = node.encode(Clip(pipe), text, str(tmp_path), negative)
    sampling = ipgo.Sampling(steps=3, guidance_scale=3.0, negative_prompt=negative)
    original = backend.encode([text])
    with torch.no_grad():
        ours = adapter.condition(backend, [text], original)
        against = adapter.unconditional(backend, [text], ours, sampling)
    assert against is not None
    torch.testing.assert_close(cond, ours.embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(uncond, against.embeds, atol=1e-6, rtol=0)
    if not adapter.learns_unconditional:
        return
    image = pipe(
        prompt_embeds=cond,
        negative_prompt_embeds=uncond,
        guidance_scale=3.0,
        num_inference_steps=3,
        latents=backend.noise([0])[:, 0],
        output_type="pt",
    ).images
    torch.testing.assert_close(
        image, ipgo.generate(backend, [text], [0], adapter, sampling), atol=1e-4, rtol=0
    )


def test_what_the_node_cannot_take_is_named(
    node: Any, pipe: StableDiffusionPipeline, backend: Backend, tmp_path: Path
) -> None:
    clip, own = Clip(pipe), str(tmp_path / "own")
    saved(backend, tmp_path / "own")
    for given, text, place, message in (
        (clip, "a foxx", own, "was not fitted to prompt 'a foxx'; nearest: 'a fox'"),
        (Clip(pipe, keys=("l", "g")), "a fox", own, "this model has 2 text encoders"),
        (Clip(pipe, windows=2), "a fox", own, "the prompt has more than 77 tokens"),
        (clip, "a fox", str(tmp_path / "none"), "none"),
        (Clip(pipe, end=1), "a fox", own, "is not a CLIP"),
        (None, "a fox", own, "clip is missing: the checkpoint has no text encoder"),
    ):
        with pytest.raises(ipgo.InputError, match=message):
            node.encode(given, text, place)
    ipgo.save_adapter(
        ipgo.InsertionAdapter(PROMPTS, 2 * backend.embed_dim, ipgo.Insertion(2, 1)), tmp_path / "wide"
    )
    with pytest.raises(ipgo.InputError, match=f"those of this CLIP are {backend.embed_dim} wide"):
        node.encode(clip, "a fox", str(tmp_path / "wide"))
    assert set(node.INPUT_TYPES()["required"]) == {"clip", "text", "adapter"}


def test_another_adapter_in_the_same_folder_is_noticed(node: Any, backend: Backend, tmp_path: Path) -> None:
    known = [node.IS_CHANGED(adapter=str(tmp_path))]
    for count in (1, 2):
        saved(backend, tmp_path, rank=count)
        known.append(node.IS_CHANGED(clip=None, text="a fox", adapter=str(tmp_path)))
    assert len(set(known)) == 3
    assert node.IS_CHANGED(clip=None, text="a dog", adapter=str(tmp_path)) == known[-1]
