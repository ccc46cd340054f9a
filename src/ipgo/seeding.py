"""Randomness without state: every draw comes from a seed that is derived from names and numbers.

So nothing has to be saved to continue a run, and no result depends on how work was split up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ipgo.errors import InputError

SEEDS = 2**64  # so many there are: what torch takes
NOISES = 2**32  # so many make different noise: its CPU generator reads the lower 32 bits


def check_seeds(seeds: Sequence[int], *, distinct: bool = True) -> None:
    """Raise `InputError` for a seed that cannot be, or (`distinct`) one that is given twice."""
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
    twice = distinct and whole and len({seed % NOISES for seed in seeds}) < len(seeds)
    if twice or not whole or not all(0 <= seed < SEEDS for seed in seeds):
        kind = "different whole numbers" if distinct else "whole numbers"
        same = twice and len(set(seeds)) == len(seeds)
        hint = "; noise depends on the lower 32 bits alone, and two of these agree in them" if same else ""
        raise InputError(f"seeds is {list(seeds)}; they must be {kind} from 0 to 2**64 - 1{hint}")


def plain(seeds: Iterable[Any]) -> list[Any]:
    """numpy's and torch's numbers as Python's, which are JSON; anything else as it is."""
    if not isinstance(seeds, Iterable) or getattr(seeds, "ndim", 1) == 0:
        raise InputError(f"seeds is {seeds!r}; it must be a sequence of whole numbers")
    return [seed.item() if hasattr(seed, "item") else seed for seed in seeds]


def derive(seed: int, *keys: str | int) -> int:
    """A seed in [0, 2**63) for `keys`, the same on every machine and in every run."""
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def row_seeds(seed: int | None, prompts: Sequence[str] | None) -> list[int | None]:
    """A seed for each prompt's row, or for the one that all share; of None they are None."""
    if prompts is None or seed is None:
        return [seed] * (1 if prompts is None else len(prompts))
    return [derive(seed, prompt) for prompt in prompts]


def repeated(seed: int, times: int) -> int:
    """The seed of a draw that was made `times` times before: its own at first."""
    return derive(seed, "again", times) if times else seed


def shuffled(count: int, start: int, size: int, seed: int) -> torch.Tensor:
    """(size,): numbers below `count`, from place `start` on of an endless sequence of shuffled passes."""
    places = range(start, start + size)
    passes = {
        number: torch.randperm(count, generator=generator(derive(seed, "pass", number)))
        for number in {place // count for place in places}
    }
    return torch.stack([passes[place // count][place % count] for place in places])


def generator(seed: int) -> torch.Generator:
    """A CPU generator, on whatever device the numbers are used later."""
    return torch.Generator("cpu").manual_seed(seed)
