"""The methods that ipgo knows. A new one is a file here and a line in `METHODS`."""

from __future__ import annotations

from ipgo.methods.best_of_n import BestOfN
from ipgo.methods.black_box import BlackBoxIPGO
from ipgo.methods.chatgpt import ChatGPT
from ipgo.methods.ddpo import DDPO
from ipgo.methods.dno import DNO
from ipgo.methods.dpo_diffusion import DPODiffusion
from ipgo.methods.draft import DRaFT
from ipgo.methods.embedding import Embedding
from ipgo.methods.ipgo import IPGO
from ipgo.methods.joint import Joint
from ipgo.methods.llm_search import LLMSearch
from ipgo.methods.promptist import Promptist
from ipgo.methods.raw import Raw
from ipgo.methods.reno import ReNO
from ipgo.methods.textcraftor import TextCraftor
from ipgo.task import Method

__all__ = [
    "DDPO",
    "DNO",
    "IPGO",
    "METHODS",
    "WITHOUT_GRADIENT",
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
]

METHODS: dict[str, type[Method]] = {
    "raw": Raw,
    "ipgo": IPGO,
    "embedding": Embedding,
    "draft": DRaFT,
    "reno": ReNO,
    "dno": DNO,
    "best-of-n": BestOfN,
    "dpo-diffusion": DPODiffusion,
    "ipgo-black-box": BlackBoxIPGO,
    "ddpo": DDPO,
    "textcraftor": TextCraftor,
    "joint": Joint,
    "chatgpt": ChatGPT,
    "llm-search": LLMSearch,
    "promptist": Promptist,
}

WITHOUT_GRADIENT = "best-of-n, ipgo-black-box, ddpo"  # those to recommend for a reward that has none
