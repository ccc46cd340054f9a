"""What a method learns. A new kind is a file here and a name in `ADAPTERS`."""

from __future__ import annotations

from ipgo.adapters.base import Adapter, draw_batch, generate, stack, with_defaults
from ipgo.adapters.embedding import EmbeddingAdapter
from ipgo.adapters.insertion import InsertionAdapter
from ipgo.adapters.joint import JointAdapter
from ipgo.adapters.noise import NoiseAdapter
from ipgo.adapters.text import TextAdapter, shorten
from ipgo.adapters.text_encoder import TextEncoderAdapter
from ipgo.adapters.weights import LoRA, WeightAdapter

__all__ = [
    "ADAPTERS",
    "Adapter",
    "EmbeddingAdapter",
    "InsertionAdapter",
    "JointAdapter",
    "LoRA",
    "NoiseAdapter",
    "TextAdapter",
    "TextEncoderAdapter",
    "WeightAdapter",
    "draw_batch",
    "generate",
    "shorten",
    "stack",
    "with_defaults",
]

KINDS: tuple[type[Adapter], ...] = (
    Adapter,
    InsertionAdapter,
    EmbeddingAdapter,
    NoiseAdapter,
    TextAdapter,
    WeightAdapter,
    TextEncoderAdapter,
    JointAdapter,
)
ADAPTERS: dict[str, type[Adapter]] = {kind.kind: kind for kind in KINDS}
