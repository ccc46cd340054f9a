"""A ComfyUI node that puts IPGO's learned embeddings around a prompt's conditioning.

Copy this file into ComfyUI/custom_nodes and `pip install ipgo` into ComfyUI's environment. Put the node between
"CLIP Text Encode" and the sampler's positive input. It does to a conditioning what the stock "Conditioning (Concat)"
does, on both sides: [prefix; conditioning; suffix] along the tokens.

Limits: models with one text encoder, padded to 77 tokens, whose denoiser does not care about their order (Stable
Diffusion 1.x and 2.x); adapters without cross-attention, learned with padding="max_length" and without
insertion.pooled and insertion.negative. Adapters of other kinds or widths are refused; that the checkpoint is the one
that the adapter was learned on, the node cannot see.
"""

from pathlib import Path
from typing import Any

import torch

import ipgo
from ipgo.adapters import InsertionAdapter
from ipgo.embeds import PromptEmbeds

Conditioning = list[list[Any]]  # of [states (B, L, D), {"pooled_output": ...}]


class IPGOEmbeddings:
    """Inserts an adapter's embeddings; `prompt` chooses the row of an adapter that was fitted to several."""

    CATEGORY = "conditioning"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "insert"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        text = {"default": "", "multiline": False}
        return {
            "required": {"conditioning": ("CONDITIONING",), "adapter": ("STRING", text)},
            "optional": {"prompt": ("STRING", {**text, "multiline": True})},
        }

    def insert(self, conditioning: Conditioning, adapter: str, prompt: str = "") -> tuple[Conditioning]:
        """[prefix; conditioning; suffix] for each entry; what else an entry holds stays.

        Raises:
            InputError: no adapter there, one of another kind or width, or a prompt that it was not fitted to.
        """
        learned = ipgo.from_pretrained(Path(adapter).expanduser())
        if not isinstance(learned, InsertionAdapter):
            raise ipgo.InputError(f"adapter {adapter!r} holds no embeddings but {learned.kind}")
        if learned.insertion.cross_attention != "none" or learned.padding != "max_length":
            raise ipgo.InputError(
                f"adapter {adapter!r} has cross_attention={learned.insertion.cross_attention!r} and "
                f"padding={learned.padding!r}; this node takes 'none' and 'max_length'"
            )
        if learned.insertion.pooled or learned.insertion.negative:
            raise ipgo.InputError(
                f"adapter {adapter!r} learned more than embeddings around the prompt (insertion.pooled or "
                "insertion.negative), which this node does not put in"
            )
        only = learned.prompts[0] if learned.prompts is not None and len(learned.prompts) == 1 else prompt
        row = learned.rows([prompt or only])
        found: Conditioning = []
        for states, about in conditioning:
            if states.shape[-1] != learned.width:
                raise ipgo.InputError(
                    f"adapter {adapter!r} holds embeddings {learned.width} wide; "
                    f"this conditioning is {states.shape[-1]} wide"
                )
            text = PromptEmbeds(states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device))
            with torch.no_grad():
                found.append([learned.insert(row.expand(len(states)), text).embeds, dict(about)])
        return (found,)


NODE_CLASS_MAPPINGS = {"IPGOEmbeddings": IPGOEmbeddings}
NODE_DISPLAY_NAME_MAPPINGS = {"IPGOEmbeddings": "IPGO embeddings"}
