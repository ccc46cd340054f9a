"""Randomness without state: every draw comes from a seed that is derived from names and numbers.

So nothing has to be saved to continue a run, and no result depends on how work was split up.
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *keys: str | int) -> int:
    """A seed in [0, 2**63) for `keys`, the same on every machine and in every run."""
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int) -> torch.Generator:
    """A CPU generator, on whatever device the numbers are used later."""
    return torch.Generator("cpu").manual_seed(seed)
