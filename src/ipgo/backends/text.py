"""What text encoders make of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int, padding: str) -> tuple[Tensor, Tensor]:
    """(B, L) ids and (B, L) bool, True at text; at most `length` long, padded to it or to the longest."""
    tokens = tokenizer(
        list(prompts), padding=padding, truncation=True, max_length=length, return_tensors="pt"
    )
    return tokens.input_ids, tokens.attention_mask.to(torch.bool)


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
