"""What the methods that rewrite prompts as text have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ipgo.adapters import Adapter, TextAdapter, shorten
from ipgo.adapters.text import BYTES, from_bytes, to_bytes
from ipgo.backends import Backend
from ipgo.chat import Chat, parse_text, parse_texts
from ipgo.errors import InputError

ATTEMPTS = 3  # questions for a text that can be used
logger = logging.getLogger("ipgo")


class Rewrites:
    """A proposer of texts (see `ipgo.search`): a table with one for each of `total` steps and P prompts.

    Args:
        write: called with this table and a step that has no texts yet; the P texts of that step, and as many
            further ones as it likes. An empty text is the user's own prompt.
    """

    def __init__(
        self, prompts: Sequence[str], total: int, write: Callable[[Rewrites, int], Sequence[Sequence[str]]]
    ) -> None:
        self.prompts = tuple(prompts)
        self.write = write
        self.written = torch.zeros((), dtype=torch.long)
        self.texts = torch.zeros(total, len(prompts), BYTES, dtype=torch.uint8)
        self.rewards = torch.full((total, len(prompts)), torch.nan)
        self.memory = {"written": self.written, "texts": self.texts, "rewards": self.rewards}

    def propose(self, adapter: Adapter, step: int) -> None:
        assert isinstance(adapter, TextAdapter)
        if step >= self.written:
            for texts in self.write(self, step):
                self.texts[self.written] = to_bytes(texts)
                self.written += 1
        adapter.text_bytes.copy_(self.texts[step])

    def tell(self, step: int, rewards: Tensor) -> None:
        self.rewards[step] = rewards

    def history(self, row: int, steps: int) -> list[tuple[str, float]]:
        """A prompt's texts of the first `steps` steps, with their rewards; those that were not finite are left out."""
        texts = from_bytes(self.texts[:steps, row])
        rewards = self.rewards[:steps, row]
        own = self.prompts[row]
        return [
            (text or own, float(reward))
            for text, reward in zip(texts, rewards, strict=True)
            if reward.isfinite()
        ]

    def resumed(self) -> None:
        """The table is all there is."""


def ask_texts(
    chat: Chat, backend: Backend, instruction: str, text: str, n: int, occasion: int = 0
) -> list[str]:
    """n texts that the encoder takes, out of a chat model's answer; too few of them are repeated in turn.

    Texts that are too long are cut, and said to be; an answer without any text is asked for anew. If none of these has
    one either, they are forgotten, so that another run may ask again.

    Args:
        occasion: numbers the times that the same question may be asked, each of which wants an answer of its own.

    Raises:
        InputError: no answer that can be used, or what `Chat.ask` raises.
    """
    for attempt in range(ATTEMPTS):
        answer = chat.ask(instruction, text, ATTEMPTS * occasion + attempt)
        found = [parse_text(answer)] if n == 1 else parse_texts(answer)[:n]
        texts = [fitted(backend, each) for each in found]
        texts = [each for each in dict.fromkeys(texts) if each]
        if texts:
            if len(texts) < n:
                logger.warning("chat.model %r gave %d texts instead of %d", chat.model, len(texts), n)
            return [texts[place % len(texts)] for place in range(n)]
    for attempt in range(ATTEMPTS):
        chat.forget(instruction, text, ATTEMPTS * occasion + attempt)
    raise InputError(f"chat.model {chat.model!r} gave no text for {text[:60]!r} in {ATTEMPTS} answers")


def fitted(backend: Backend, text: str) -> str:
    """`text`, cut to what the encoder takes, with a warning if that changes it."""
    short = shorten(backend, text)
    if short != text:
        logger.warning("rewritten prompt %r is too long for the encoder; it is cut to %r", text, short)
    return short
