"""Promptist: a language model that was trained for it rewrites the prompt."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ipgo import files, hub
from ipgo.adapters import TextAdapter
from ipgo.bars import only_of_downloads
from ipgo.errors import InputError, first_line
from ipgo.rewriting import Rewrites, fitted
from ipgo.search import search
from ipgo.task import Method, Progress, Task
from ipgo.vocabulary import draws_bundled_world

BUNDLED = Path(__file__).parents[1] / "rewriters/emoji"  # trained for the bundled model's world
PUBLISHED = "microsoft/Promptist"
PUBLISHED_TOKENIZER = "gpt2"  # that of the published examples
ASK = " Rephrase:"  # what follows a prompt, and comes before its rewritten form
logger = logging.getLogger("ipgo")


@dataclass(frozen=True)
class Promptist(Method):
    """Let a language model trained on a reward rewrite each prompt (Promptist, arXiv 2212.09611).

    The first of `beams` beams of "PROMPT Rephrase:" is taken as it is, as its authors' code does, and cut to what
    the encoder takes. The model was trained on its own reward, not on the one at hand.

    Attributes:
        model: folder or hub id of a causal language model of transformers with safetensors weights; None is the
            one that belongs to the backend: a bundled one for emoji, microsoft/Promptist for the others.
        tokenizer: folder or hub id; None is the model's own (gpt2 for microsoft/Promptist).
        beams: width of the beam search.
        max_new_tokens: length of a rewritten prompt at most.
        length_penalty: exponent of the length in a beam's score; below 0 favours short ones.
    """

    prompt_wise: ClassVar[bool] = True

    model: str | None = None
    tokenizer: str | None = None
    beams: int = 8
    max_new_tokens: int = 75
    length_penalty: float = -1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("beams", "max_new_tokens"):
            if getattr(self, field) < 1:
                raise InputError(f"{field} is {getattr(self, field)}; it must be at least 1")

    def _search(self, task: Task, resume: Mapping[str, Tensor] | None) -> Iterator[Progress]:
        adapter = TextAdapter.start(task.backend, task.prompts, shared=task.shared)
        places = self._places(task.backend.origin)

        def write(table: Rewrites, step: int) -> list[list[str]]:
            model, tokenizer = _load(*places, task.backend.device)
            texts = [fitted(task.backend, self.rewrite(model, tokenizer, each)) for each in task.prompts]
            for prompt, text in zip(task.prompts, texts, strict=True):
                if not text:
                    logger.warning("promptist writes nothing for %r, which is drawn as it is", prompt)
            return [texts]

        return search(task, adapter, Rewrites(task.prompts, 1, write), 1, resume)

    def rewrite(self, model: Any, tokenizer: Any, prompt: str) -> str:
        """The best beam for one prompt, on one line."""
        ids = tokenizer(prompt.strip() + ASK, add_special_tokens=False, return_tensors="pt").input_ids
        room = getattr(model.config, "n_positions", None)
        if room is not None and ids.shape[1] + self.max_new_tokens > room:
            raise InputError(
                f"prompt {prompt[:60]!r} has {ids.shape[1]} tokens for the rewriter, which reads and writes {room} in "
                f"all; shorten it, or lower max_new_tokens, which is {self.max_new_tokens}"
            )
        ids = ids.to(model.device)
        with torch.no_grad():
            best = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=self.beams,
                max_new_tokens=self.max_new_tokens,
                length_penalty=self.length_penalty,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )[0]
        # Decoded without the prompt, rather than cut off as text, which fails where decoding changes blanks.
        text: str = tokenizer.decode(best[ids.shape[1] :], skip_special_tokens=True)
        return " ".join(text.replace("\0", "").split())

    def _places(self, backend: str) -> tuple[str, str]:
        """Where the model and the tokenizer are."""
        model = self.model or (str(BUNDLED) if draws_bundled_world(backend) else PUBLISHED)
        published = files.hub_id(model)[0] == PUBLISHED
        return model, self.tokenizer or (PUBLISHED_TOKENIZER if published else model)


def _load(model: str, tokenizer: str, device: torch.device) -> tuple[Any, Any]:
    """The language model, frozen, and its tokenizer; `InputError` if they cannot be opened."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # here, because they take a second
    from transformers.utils import logging as transformers_logging

    # The published one is a torch checkpoint, of which transformers reads nothing but tensors.
    safe = None if files.hub_id(model)[0] == PUBLISHED else True
    try:
        with hub.within_reach(model, tokenizer), only_of_downloads(model, transformers_logging):
            place, revision = files.hub_id(tokenizer)
            tokens = AutoTokenizer.from_pretrained(place, revision=revision)
            place, revision = files.hub_id(model)
            network = AutoModelForCausalLM.from_pretrained(
                place, revision=revision, dtype=torch.float32, use_safetensors=safe
            )
    except Exception as error:  # the hub's client has many
        raise InputError(f"method.model {model!r} cannot be opened: {first_line(error)}") from error
    return network.to(device).eval().requires_grad_(False), tokens
