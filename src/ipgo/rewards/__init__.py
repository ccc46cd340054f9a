"""What is optimised: any function of images and prompts. `load_reward` makes one of what a user writes."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch

from ipgo.devices import choose_device
from ipgo.errors import InputError, unknown
from ipgo.rewards.base import (
    Ceiling,
    FunctionReward,
    Reward,
    RewardFunction,
    WeightedSum,
    as_reward,
    identity_of,
    is_unsettled,
    parts,
    score,
    score_each,
    score_with_gradient,
    uses_prompts,
)
from ipgo.rewards.checkpoints import Checkpoint, bare_name
from ipgo.rewards.known import REWARDS
from ipgo.rewards.own import read_function
from ipgo.rewards.spec import EXTERNAL, Term, read_terms

__all__ = [
    "REWARDS",
    "Ceiling",
    "FunctionReward",
    "Reward",
    "RewardFunction",
    "WeightedSum",
    "as_reward",
    "check_reward",
    "combine",
    "has_gradient",
    "identity_of",
    "is_unsettled",
    "load_reward",
    "needs_prompts",
    "optimised",
    "parts",
    "score",
    "score_each",
    "score_with_gradient",
    "terms",
    "terms_of",
    "uses_prompts",
]

VARIANT = "notebook"  # `clip@notebook`


def load_reward(spec: str, *, device: str | torch.device = "auto") -> Reward:
    """Load a reward, or a weighted sum of them.

    Args:
        spec: a name in `REWARDS`, a published one also with a path (`clip:folder`, see docs/rewards.md),
            `file.py:function`, `cmd:./score.sh {image} {prompt}` (a command that prints a number), `ask:question`
            (a person who types one), or terms such as `emoji-clip+0.5*emoji-aesthetic<=0.98`, of which a command or
            a question is the last; `<=` is a ceiling, see `Ceiling`.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        The reward; a `Ceiling` if it has one; a `WeightedSum` for several terms or a weight other than 1.

    Raises:
        InputError: an unknown name, a weight or ceiling that is not a finite number, a weight of 0, a file without that
            function, weights that are not there and cannot be fetched, a command that cannot be run, a question without
            a terminal, or a device that is not there.
    """
    if not isinstance(spec, str):
        raise InputError(f"a reward is loaded by its name, not from {spec!r}; for a function use as_reward")
    place = choose_device(device)
    return combine(spec, lambda name: _load(name, place))


def combine(spec: str, load: Callable[[str], Reward]) -> Reward:
    """What `load` makes of the name in a spec, or the weighted sum of what it makes of each."""
    found = read_terms(spec)
    rewards = tuple(_below(load(each.name), each) for each in found)
    weights = tuple(each.weight for each in found)
    if weights == (1.0,):
        return rewards[0]
    return WeightedSum(rewards, weights, spec)


def _below(reward: Reward, term: Term) -> Reward:
    return reward if term.most is None else Ceiling(reward, term.most, f"{term.name}<={term.most:g}")


def check_reward(spec: str, prompts: Sequence[str] = ()) -> None:
    """Raise `InputError` for a spec that cannot be loaded, as far as that shows without loading a model.

    Also for one that has no answer for one of the prompts.
    """
    for name in (each.name for each in read_terms(spec)):
        if name[:4] in EXTERNAL:
            _load_external(name)
        elif (known := REWARDS.get(bare_name(name))) is not None:
            checkpoint = _checkpoint(name)
            if checkpoint is not None:
                checkpoint.check()
            if known.check is not None:
                pkgutil.resolve_name(known.check)(prompts)
        else:
            _load(name, torch.device("cpu"), look=True)  # a function; or an unknown name


def needs_prompts(spec: str) -> bool:
    """`uses_prompts` of what `load_reward` makes of a spec, without loading a model."""
    return uses_prompts(_outline(spec))


def has_gradient(spec: str) -> bool:
    """Will what `load_reward` makes of a spec claim to be differentiable? Without loading a model."""
    return _outline(spec).differentiable


def terms(spec: str) -> list[tuple[float, str]]:
    """What a spec adds up: weights and names, those in `REWARDS` without a path or variant."""
    return [
        (each.weight, bare if (bare := bare_name(each.name)) in REWARDS else each.name)
        for each in read_terms(spec)
    ]


def optimised(spec: str, identities: Mapping[str, Any] | None = None) -> set[str]:
    """What a method that follows a spec optimises: the spec, and the rewards it is made of. These are not held out.

    Nor is another variant (`@notebook`) of the same weights, or what is made of one of them.

    Args:
        spec: or the name of a reward object, which may say nothing.
        identities: what all rewards are known by (`identity_of`), by name: tells a reward under another name.
    """
    known = identities or {}
    made_of = list(_within(known.get(spec)))
    alike = {
        name
        for name, each in known.items()
        if any(_same_weights(inner, part) for inner in _within(each) for part in made_of)
    }
    try:
        names = {each.name for each in read_terms(spec)}
    except InputError:
        return {spec, *alike}
    bare = {re.sub("@[^:]*", "", name) for name in names if bare_name(name) in REWARDS}
    return {spec, *alike, *names, *bare}


def _same_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Is it the same reward, or are they the same published weights that see the picture in another way?"""
    if one == other:
        return True
    known = all(each.get("id") in REWARDS for each in (one, other))
    return known and bool(one.get("weights")) and one["weights"] == other.get("weights")


def _within(identity: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The identity, and those of what a sum adds up and a ceiling cuts off."""
    if identity is not None:
        yield identity
        for each in (*identity.get("terms", ()), identity):
            yield from _within(each.get("reward"))


def terms_of(reward: Reward) -> dict[str, Reward]:
    """What a spec's sum adds up and its ceilings cut off, by name; nothing of any other reward.

    A gain of the sum says nothing about any one of them. Those without a fixed answer (a command, a person) are left
    out: they would be asked twice.
    """
    if not isinstance(reward, WeightedSum | Ceiling):
        return {}
    named = optimised(reward.name) - {reward.name}
    return {
        each.name: each
        for each in parts(reward, named=True)
        if each.name in named and not each.name.startswith(tuple(EXTERNAL))
    }


def _outline(spec: str) -> Reward:
    """A reward that says of itself what the real one says, and has no model."""

    def stand_in(name: str) -> Reward:
        bare = bare_name(name)
        if bare not in REWARDS:
            return _load(name, torch.device("cpu"), look=True)  # a function, a command, a person: no model
        known = REWARDS[bare]
        return FunctionReward(lambda images, _: images, name, known.differentiable, known.uses_prompts)

    return combine(spec, stand_in)


def _load(name: str, device: torch.device, *, look: bool = False) -> Reward:
    """What a name stands for; `look`: it is not going to be called."""
    if name[:4] in EXTERNAL:
        return _load_external(name)
    if (bare := bare_name(name)) in REWARDS:
        load, checkpoint = pkgutil.resolve_name(REWARDS[bare].load), _checkpoint(name)
        return as_reward(load(device) if checkpoint is None else load(device, checkpoint), name)
    if ".py:" in name:
        own = as_reward(read_function(name, look=look))  # it is known by its own name, wherever it is
        return as_reward(own, name)
    raise _unknown(name)


def _unknown(name: str) -> InputError:
    if name.endswith(".py"):
        return InputError(f"reward {name!r} names no function; write {name}:FUNCTION")
    return unknown("reward", bare_name(name), REWARDS)


def _checkpoint(name: str) -> Checkpoint | None:
    """Which weights a name with its variant and path asks for; None for a reward that takes neither."""
    head, colon, place = name.partition(":")
    bare, at, variant = head.partition("@")
    source = REWARDS[bare].source
    if source is None:
        if colon or at:
            raise InputError(f"reward {bare!r} takes no path and no variant, but is given as {name!r}")
        return None
    if at and variant != VARIANT:
        raise InputError(f"reward {name!r}: there is no variant {variant!r}; the only one is {VARIANT}")
    if colon and not place:
        raise InputError(f"reward {name!r} has no path after its colon")
    for other, known in REWARDS.items():
        if known.source not in (None, source) and known.source.file == PurePath(place).name:
            raise InputError(
                f"reward {name!r}: {PurePath(place).name} is published as {other!r}; write {other}:{place}"
            )
    return Checkpoint(name, bool(at), place, source)


def _load_external(spec: str) -> Reward:
    """`cmd:line` or `ask:question`."""
    reward: Reward = pkgutil.resolve_name(EXTERNAL[spec[:4]])(spec[4:])
    return reward
