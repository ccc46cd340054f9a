"""Reward-guided prompt embeddings for text-to-image diffusion.

import ipgo

result = ipgo.fit("a lemon on a blue background", reward="emoji-likeness+emoji-preference")
result[0].after[0].save("lemon.png")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ipgo.errors import InputError, IpgoError, MissingExtraError, ResumeError, RewardError

if TYPE_CHECKING:
    from ipgo.adapters import Adapter, InsertionAdapter, LoRA, generate
    from ipgo.artefacts import load_adapter, save_adapter
    from ipgo.ascent import Ascent
    from ipgo.backends import Backend, load_backend
    from ipgo.embeds import PromptEmbeds
    from ipgo.evaluation import Gain, Interval, Score, evaluate, summarise, win_rate
    from ipgo.fitting import Fitted, Result, fit
    from ipgo.insertion import Insertion
    from ipgo.methods import (
        DDPO,
        DNO,
        IPGO,
        BestOfN,
        BlackBoxIPGO,
        ChatGPT,
        DPODiffusion,
        DRaFT,
        Embedding,
        Joint,
        LLMSearch,
        Promptist,
        Raw,
        ReNO,
        TextCraftor,
    )
    from ipgo.publish import from_pretrained, push_to_hub, save_pretrained
    from ipgo.rewards import Reward, as_reward, load_reward
    from ipgo.sampling import Sampling
    from ipgo.store import Run
    from ipgo.task import Progress, Task

__version__ = "0.1.0"

# Names that need torch are imported when first used, so that `import ipgo` and `ipgo --help` are quick.
_HOME = {
    "adapters": ("Adapter", "InsertionAdapter", "LoRA", "generate"),
    "artefacts": ("load_adapter", "save_adapter"),
    "ascent": ("Ascent",),
    "backends": ("Backend", "load_backend"),
    "embeds": ("PromptEmbeds",),
    "evaluation": ("Gain", "Interval", "Score", "evaluate", "summarise", "win_rate"),
    "fitting": ("Fitted", "Result", "fit"),
    "insertion": ("Insertion",),
    "methods": (
        "DDPO",
        "DNO",
        "IPGO",
        "BestOfN",
        "BlackBoxIPGO",
        "ChatGPT",
        "DPODiffusion",
        "DRaFT",
        "Embedding",
        "Joint",
        "LLMSearch",
        "Promptist",
        "Raw",
        "ReNO",
        "TextCraftor",
    ),
    "publish": ("from_pretrained", "push_to_hub", "save_pretrained"),
    "rewards": ("Reward", "as_reward", "load_reward"),
    "sampling": ("Sampling",),
    "store": ("Run",),
    "task": ("Progress", "Task"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "DDPO",
    "DNO",
    "IPGO",
    "Adapter",
    "Ascent",
    "Backend",
    "BestOfN",
    "BlackBoxIPGO",
    "ChatGPT",
    "DPODiffusion",
    "DRaFT",
    "Embedding",
    "Fitted",
    "Gain",
    "InputError",
    "Insertion",
    "InsertionAdapter",
    "Interval",
    "IpgoError",
    "Joint",
    "LLMSearch",
    "LoRA",
    "MissingExtraError",
    "Progress",
    "PromptEmbeds",
    "Promptist",
    "Raw",
    "ReNO",
    "Result",
    "ResumeError",
    "Reward",
    "RewardError",
    "Run",
    "Sampling",
    "Score",
    "Task",
    "TextCraftor",
    "__version__",
    "as_reward",
    "evaluate",
    "fit",
    "from_pretrained",
    "generate",
    "load_adapter",
    "load_backend",
    "load_reward",
    "push_to_hub",
    "save_adapter",
    "save_pretrained",
    "summarise",
    "win_rate",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'ipgo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ipgo.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
