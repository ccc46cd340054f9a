"""Networks that keep for the backward pass what goes into their blocks, and compute the rest again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Classes that diffusers builds decoders of. A network of others has no blocks: those of Qwen-Image's decoder write to a
# cache that their caller gives them, so a second call would be another one.
DECODER = frozenset(
    ("ResnetBlock2D", "Attention", "Upsample2D", "ResBlock", "EfficientViTBlock", "DCUpBlock2d")
)
# And the transformers of which one call keeps tens of gigabytes. A UNet's, or PixArt's, is computed again as a whole.
TRANSFORMER = frozenset(
    (
        "JointTransformerBlock",
        "ChromaSingleTransformerBlock",
        "ChromaTransformerBlock",
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
        "Flux2TransformerBlock",
        "Flux2SingleTransformerBlock",
        "QwenImageTransformerBlock",
        "SanaTransformerBlock",
        "ZImageTransformerBlock",
    )
)


def blocks(network: nn.Module, kinds: frozenset[str] = DECODER) -> list[nn.Module]:
    """The parts that can be computed again one by one; none contains another."""
    found: list[nn.Module] = []
    for part in network.children():
        found += [part] if type(part).__name__ in kinds else blocks(part, kinds)
    return found


@contextmanager
def recomputed(network: nn.Module, kinds: frozenset[str] = DECODER) -> Iterator[None]:
    """A graph that is built while this is open keeps the inputs of `blocks(network)` and computes the rest again.

    Numbers are the same, up to rounding, for a network in eval mode that draws nothing. When this closes, the network
    is as before; the backward pass may come later. Diffusers' own gradient checkpointing rests: a block that is
    computed again inside another such call would keep other tensors than the first time.
    """
    with ExitStack() as stack:
        parts: Iterator[Any] = network.modules()
        for part in parts:
            if getattr(part, "gradient_checkpointing", False):
                stack.callback(setattr, part, "gradient_checkpointing", True)
                part.gradient_checkpointing = False
        for block in blocks(network, kinds):
            own: Any = vars(block)
            stack.callback(_put_back, own, own.get("forward"))  # such as a hook that moves the weights
            again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            own["forward"] = again
        yield


@contextmanager
def row_by_row(network: nn.Module) -> Iterator[None]:
    """While this is open the rows of a batch go through the network one by one; it must not couple them.

    What diffusers calls VAE slicing, which saves nothing where all is kept. With `recomputed` no more than one row's
    block is computed again at a time.
    """
    own: Any = vars(network)
    before = own.get("forward")
    own["forward"] = partial(_row_by_row, network.forward)
    try:
        yield
    finally:
        _put_back(own, before)


def _row_by_row(forward: Any, batch: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.cat([forward(row, *args, **kwargs) for row in batch.chunk(len(batch))])


def _put_back(own: dict[str, Any], forward: Any) -> None:
    if forward is None:
        own.pop("forward", None)
    else:
        own["forward"] = forward
