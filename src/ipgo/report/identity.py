"""Whose scores compare: those of one name that one and the same reward has given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ipgo.rewards.checkpoints import fingerprint

Fingerprints = dict[str, tuple[str, ...]]

MARK = "†"


def fingerprints(stored: Iterable[Mapping[str, Any]]) -> Fingerprints:
    """By reward: those of all identities (by reward) that stand in several files, each once."""
    found: dict[str, set[str]] = {}
    for identities in stored:
        for reward, identity in identities.items():
            found.setdefault(reward, set()).add(fingerprint(identity))
    return {reward: tuple(sorted(each)) for reward, each in found.items()}


def comparable(ours: tuple[str, ...] | None, theirs: tuple[str, ...] | None) -> bool:
    """Were both scored by one reward? Nothing speaks against what was not stored (None)."""
    return ours is None or theirs is None or (ours == theirs and len(ours) == 1)


def strangers(entries: Sequence[tuple[str, Fingerprints]]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """By reward: the first entry that it scored, and those that another of its name has scored.

    A reward that scored all alike is left out, and so is an entry whose identities were not stored.
    """
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for reward in dict.fromkeys(name for _, each in entries for name in each):
        scored = [(label, each[reward]) for label, each in entries if reward in each]
        first, known = scored[0]
        others = tuple(label for label, own in scored if not comparable(known, own))
        if others:
            found[reward] = first, others
    return found


def sentences(found: Mapping[str, tuple[str, tuple[str, ...]]]) -> list[str]:
    """`strangers` in words, one sentence for each reward."""
    return [
        f"{', '.join(others)}: not scored by the {reward} that scored {first} (weights, preprocessing or version "
        "differ), so these scores are not comparable"
        for reward, (first, others) in found.items()
    ]
