"""Prompts that were rewritten as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from ipgo.adapters.base import Adapter
from ipgo.backends import Backend
from ipgo.embeds import PromptEmbeds, concatenate
from ipgo.errors import InputError
from ipgo.sampling import Sampling

BYTES = 1024  # of UTF-8 that a text may have


class TextAdapter(Adapter):
    """For each prompt a text that is drawn in its place, and a negative prompt; or one negative prompt for all.

    Texts are buffers of zero-padded UTF-8, so that rows, files and checkpoints are those of every adapter. An
    empty text stands for the user's own prompt, an empty negative prompt for the sampling's.
    """

    kind: ClassVar[str] = "text"

    text_bytes: Tensor  # (N, BYTES) uint8
    negative_bytes: Tensor  # (N, BYTES) uint8

    def __init__(
        self, prompts: Sequence[str] | None, padding: str = "max_length", long_prompts: str = "refuse"
    ) -> None:
        super().__init__(prompts)
        self.padding, self.long_prompts = padding, long_prompts
        self.options = {"padding": padding, "long_prompts": long_prompts}
        count = 1 if prompts is None else len(prompts)
        for name in ("text_bytes", "negative_bytes"):
            self.register_buffer(name, torch.zeros(count, BYTES, dtype=torch.uint8))

    @classmethod
    def start(cls, backend: Backend, prompts: Sequence[str], *, shared: bool) -> Self:
        """The prompts as they are, read as the backend reads them.

        Raises:
            InputError: `shared`: another prompt's text would draw another thing.
        """
        if shared:
            raise InputError(
                "shared is true; a rewritten prompt replaces one prompt, so this method is prompt-wise only"
            )
        return cls(prompts, backend.padding, backend.long_prompts)

    @property
    def texts(self) -> tuple[str, ...]:
        """The N rewritten prompts."""
        return from_bytes(self.text_bytes)

    @property
    def negatives(self) -> tuple[str, ...]:
        """The N negative prompts."""
        return from_bytes(self.negative_bytes)

    def set_texts(self, texts: Sequence[str]) -> None:
        """Put N rewritten prompts in; `InputError` for one that is longer than `BYTES`, or another number."""
        _put(texts, self.text_bytes)

    def set_negatives(self, negatives: Sequence[str]) -> None:
        """Put N negative prompts in; `InputError` for one that is longer than `BYTES`, or another number."""
        _put(negatives, self.negative_bytes)

    def condition(self, backend: Backend, prompts: Sequence[str], original: PromptEmbeds) -> PromptEmbeds:
        texts, rows = self.texts, self.rows(prompts).tolist()
        return backend.encode([texts[row] or prompt for row, prompt in zip(rows, prompts, strict=True)])

    def unconditional(
        self,
        backend: Backend,
        prompts: Sequence[str],
        cond: PromptEmbeds,
        sampling: Sampling,
        raw: PromptEmbeds | None = None,
    ) -> PromptEmbeds | None:
        whole = super().unconditional(backend, prompts, cond, sampling, raw)
        negatives, rows = self.negatives, self.rows(prompts).tolist()
        if whole is None or not any(negatives[row] for row in rows):
            return whole
        halves = []
        for place, row in enumerate(rows):
            own = torch.tensor([place], device=whole.mask.device)
            with torch.no_grad():
                half = backend.unconditional(negatives[row], cond.select(own)) if negatives[row] else None
            halves.append(half or whole.select(own))
        return concatenate(halves)


def _put(texts: Sequence[str], rows: Tensor) -> None:
    if len(texts) != len(rows):
        raise InputError(f"this adapter holds {len(rows)} texts, not {len(texts)}")
    rows.copy_(to_bytes(texts))


def to_bytes(texts: Sequence[str]) -> Tensor:
    """N texts to (N, BYTES) zero-padded UTF-8; `InputError` for one that is longer."""
    rows = torch.zeros(len(texts), BYTES, dtype=torch.uint8)
    for row, text in enumerate(texts):
        code = text.encode()
        if len(code) > BYTES:
            raise InputError(f"text {text[:60]!r} has {len(code)} bytes; at most {BYTES} are allowed")
        rows[row, : len(code)] = torch.tensor(list(code), dtype=torch.uint8)
    return rows


def from_bytes(rows: Tensor) -> tuple[str, ...]:
    """The inverse of `to_bytes`."""
    return tuple(bytes(row).rstrip(b"\0").decode() for row in rows.tolist())


def shorten(backend: Backend, text: str) -> str:
    """As many words of `text`, from the first on, as the encoder and `BYTES` take; "" if not even one does."""
    if fits(backend, text):
        return text
    words = text.split()
    least, most = 0, len(words)  # so many words fit, so many do not
    while most - least > 1:
        middle = (least + most) // 2
        if fits(backend, " ".join(words[:middle])):
            least = middle
        else:
            most = middle
    return " ".join(words[:least]).rstrip(",;: ")


def fits(backend: Backend, text: str) -> bool:
    """Do the encoder and `BYTES` take it?"""
    try:
        backend.check_prompts([text])
    except InputError:
        return False
    return len(text.encode()) <= BYTES
