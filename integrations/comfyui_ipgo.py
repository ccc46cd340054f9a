"""A ComfyUI node that encodes a prompt with the embeddings that IPGO learned around it.

Copy this file into ComfyUI/custom_nodes and install ipgo (`pip install PATH/TO/ITS/REPOSITORY`) into ComfyUI's
environment. The node takes the place of both "CLIP Text Encode" nodes: it encodes the prompt and the negative prompt by
the CLIP that it is given, as they do, and puts the learned embeddings around the states, as the stock "Conditioning
(Concat)" would: [prefix; states; suffix].

Limits: models with one text encoder, whose denoiser does not care about the order of tokens (Stable Diffusion 1.x and
2.x); prompts of one window of 77 tokens; adapters learned with padding="max_length" and without insertion.pooled. One
that was fitted to prompts takes these, word for word, their brackets as brackets; a shared one takes any. Adapters of
other kinds or widths are refused; that the checkpoint is the one that the adapter was learned on, the node cannot see.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ipgo
from ipgo.adapters import InsertionAdapter
from ipgo.embeds import PromptEmbeds

Conditioning = list[list[Any]]  # of [states (B, L, D), {"pooled_output": ...}]

END = 49407  # what CLIP's tokenizer puts behind a text; what follows is padding


class IPGOTextEncode:
    """Encodes a prompt and a negative one, each with what an adapter learned around it."""

    CATEGORY = "conditioning"
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        line, lines = ({"default": "", "multiline": multiline} for multiline in (False, True))
        return {
            "required": {"clip": ("CLIP",), "text": ("STRING", lines), "adapter": ("STRING", line)},
            "optional": {"negative_text": ("STRING", lines)},
        }

    @classmethod
    def IS_CHANGED(cls, adapter: str = "", **_: Any) -> str:  # noqa: N802 - ComfyUI's name
        """What tells one adapter in a folder from the next; ComfyUI sees the folder's name alone."""
        folder = Path(adapter).expanduser()
        files = [
            file for name in ("adapter.json", "adapter.safetensors") if (file := folder / name).is_file()
        ]
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    def encode(
        self, clip: Any, text: str, adapter: str, negative_text: str = ""
    ) -> tuple[Conditioning, Conditioning]:
        """The conditioning of both; `adapter` is a folder, or the hub's owner/name.

        Raises:
            InputError: no adapter there, one of another kind or width, a prompt that it was not fitted to or that is
            too long, or a model with several text encoders.
        """
        learned = ipgo.from_pretrained(Path(adapter).expanduser() if adapter.startswith("~") else adapter)
        if not isinstance(learned, InsertionAdapter):
            raise ipgo.InputError(
                f"adapter {adapter!r} is of kind {learned.kind!r}; this node takes 'insertion'"
            )
        if learned.padding != "max_length" or learned.insertion.pooled:
            raise ipgo.InputError(
                f"adapter {adapter!r} has padding={learned.padding!r} and insertion.pooled={learned.insertion.pooled}; "
                "this node takes 'max_length' and False"
            )
        rows = learned.rows([text])
        # Bare brackets would be ComfyUI's emphasis, which the fit knew nothing of.
        read = text if learned.prompts is None else re.sub(r"[()]", r"\\\g<0>", text)
        return (
            encoded(clip, read, learned.width, lambda states: learned.insert(rows, states)),
            encoded(clip, negative_text, learned.width, lambda states: learned.insert_negative(rows, states)),
        )


def encoded(clip: Any, text: str, width: int, insert: Callable[[PromptEmbeds], PromptEmbeds]) -> Conditioning:
    """What the stock node makes of `text`, with the states changed by `insert`."""
    if clip is None:
        raise ipgo.InputError("clip is missing: the checkpoint has no text encoder")
    tokens = clip.tokenize(text)
    if len(tokens) != 1:
        raise ipgo.InputError(f"this model has {len(tokens)} text encoders; the node takes models with one")
    (windows,) = tokens.values()
    if len(windows) != 1:
        raise ipgo.InputError(f"the prompt has more than {len(windows[0])} tokens: {text[:40]!r}...")
    # A token may also be an embedding, a tensor, of textual inversion.
    ends = [place for place, entry in enumerate(windows[0]) if isinstance(entry[0], int) and entry[0] == END]
    if not ends:
        raise ipgo.InputError(
            "this model's text encoder is not a CLIP; the node takes Stable Diffusion 1.x and 2.x"
        )
    found: Conditioning = []
    for states, about in clip.encode_from_tokens_scheduled(tokens):
        if states.shape[-1] != width:
            raise ipgo.InputError(
                f"the adapter holds embeddings {width} wide; those of this CLIP are {states.shape[-1]} wide"
            )
        mask = torch.arange(states.shape[1], device=states.device) <= ends[0]
        with torch.no_grad():
            found.append([insert(PromptEmbeds(states, mask[None])).embeds, dict(about)])
    return found


NODE_CLASS_MAPPINGS = {"IPGOTextEncode": IPGOTextEncode}
NODE_DISPLAY_NAME_MAPPINGS = {"IPGOTextEncode": "IPGO text encode"}
