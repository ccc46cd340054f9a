"""What text encoders make of prompts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ipgo import hub
from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError
from ipgo.files import hub_id


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int, padding: str) -> tuple[Tensor, Tensor]:
    """(B, L) ids and (B, L) bool, True at text; at most `length` long, padded to it or to the longest."""
    texts = expanded(tokenizer, prompts)
    tokens = tokenizer(texts, padding=padding, truncation=True, max_length=length, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask.to(torch.bool)


def unpadded(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """The ids of each prompt with its marks, however many they are."""
    # Quietly: transformers would warn of errors that a long text will make, and it is only counted here.
    ids: list[list[int]] = tokenizer(expanded(tokenizer, prompts), padding=False, verbose=False).input_ids
    return ids


def plain(prompt: str) -> str:
    """As the pipelines of PixArt and Sana write it."""
    return prompt.lower().strip()


def check_lengths(
    prompts: Sequence[str], lengths: Sequence[int], most: int, chunked: bool, what: str = "prompt"
) -> None:
    """Raise `InputError` for a prompt of more than `most` tokens.

    Args:
        chunked: may it be read in windows?
        what: the prompts are called.
    """
    for prompt, length in zip(prompts, lengths, strict=True):
        if length > most:
            allowed = '"truncate" or "chunk"' if chunked else '"truncate"'
            raise InputError(
                f"{what} {prompt[:60]!r} has {length} tokens and the encoder takes {most}; "
                f"shorten it, or set long_prompts to {allowed}"
            )


def clip_tokenizer(place: str | Path) -> Any:
    """That of a pipeline's folder or hub id, without the rest; None where it cannot be opened by itself."""
    if Path(place).suffix == ".safetensors":  # a single file has none; its name would be asked for on the hub
        return None
    from transformers import CLIPTokenizer  # here, because it takes seconds

    try:
        with hub.within_reach(place):
            repo, revision = hub_id(place)
            return CLIPTokenizer.from_pretrained(repo, subfolder="tokenizer", revision=revision or "main")
    except Exception:  # opening the pipeline says what is wrong
        return None


def expanded(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Prompts where the name of a textual inversion stands for all of its vectors.

    Those after the first are tokens of their own, `<cat>_1` and so on; diffusers' pipelines put them in, too, for every
    `<cat>` that a prompt spells, even that of `<cat>_1`.
    """
    added = getattr(tokenizer, "added_tokens_encoder", {})
    whole = {}
    for token in (token for token in added if f"{token}_1" in added):
        further = itertools.takewhile(added.__contains__, (f"{token}_{n}" for n in itertools.count(1)))
        whole[token] = " ".join([token, *further])
    return [_expanded(tokenizer, prompt, whole) for prompt in prompts] if whole else list(prompts)


def _expanded(tokenizer: Any, text: str, whole: Mapping[str, str]) -> str:
    there = set(tokenizer.tokenize(text))
    for token in whole:
        text = text.replace(token, whole[token]) if token in there else text
    return text


@dataclass(frozen=True)
class Windows:
    """Prompts as a CLIP text encoder reads them: each in one window, or in several that know nothing of each other.

    Attributes:
        ids: (N, L), the windows of the first prompt, then those of the next, and so on.
        mask: (N, L) bool, True at text and its marks.
        counts: how many windows each prompt has.
        padding: "max_length", or "longest": nothing follows the longest text.
    """

    ids: Tensor
    mask: Tensor
    counts: tuple[int, ...]
    padding: str

    def embeds(self, states: Tensor, vectors: Tensor | None = None) -> PromptEmbeds:
        """What an encoder made of the windows, for B prompts: states of all windows side by side.

        Args:
            states: (N, L, D).
            vectors: (N, P) or None; a prompt gets that of its first window, as if it had been truncated.
        """
        windows = self.mask.to(states.device)
        mask, present = self._joined(windows), self._joined(torch.ones_like(windows))
        # The windows before a prompt's last one are full, so that its text has no gaps.
        end = int(mask.sum(1).max()) if self.padding == "longest" else mask.shape[1]
        mask, present = mask[:, :end], present[:, :end]
        first = [sum(self.counts[:number]) for number in range(len(self.counts))]
        return PromptEmbeds(
            self._joined(states)[:, :end],
            mask,
            None if vectors is None else vectors[first],
            present=None if bool(present.all()) else present,
        )

    def _joined(self, values: Tensor) -> Tensor:
        """(N, L, ...) to (B, max(counts) * L, ...), filled up with zeros."""
        rows = [windows.flatten(0, 1) for windows in torch.split(values, list(self.counts))]
        return pad_sequence(rows, batch_first=True)


def read(
    tokenizer: Any, prompts: Sequence[str], length: int, padding: str, long_prompts: str = "truncate"
) -> Windows:
    """As `tokenize`; with long_prompts="chunk" longer prompts go on in windows of `length`, with marks each."""
    ids, mask = tokenize(tokenizer, prompts, length, padding)
    if long_prompts != "chunk":
        return Windows(ids, mask, (1,) * len(ids), padding)
    texts = [row[1:-1] for row in unpadded(tokenizer, prompts)]  # without the marks
    size = length - 2
    parts = [[text[at : at + size] for at in range(0, max(len(text), 1), size)] for text in texts]
    counts = tuple(map(len, parts))
    if max(counts) == 1:
        return Windows(ids, mask, counts, padding)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    windows = [torch.tensor([start, *part, end]) for each in parts for part in each]
    ids = torch.full((len(windows), length), tokenizer.pad_token_id)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = window
        mask[row, : len(window)] = True
    return Windows(ids, mask, counts, padding)


def clip_tokens(tokenizer: Any, encoder: Any) -> int:
    """The longest prompt that a CLIP text encoder takes."""
    return min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))


def chat(tokenizer: Any, prompts: Sequence[str], *, thinking: bool) -> list[str]:
    """Prompts as messages of a user, up to where a chat model would answer, or `thinking`, would begin to think."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for prompt in prompts
    ]
