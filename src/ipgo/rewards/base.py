"""What a reward is, what rewards can be made of others, and how one is asked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ipgo.errors import InputError, IpgoError, NotFiniteError, RewardError
from ipgo.rewards.own import said, same_folder
from ipgo.rewards.written import parts_of, unsettled

RewardFunction = Callable[[Tensor, Sequence[str]], Tensor]

OWN = "its own"  # the preprocessing of a reward that states no identity


@runtime_checkable
class Reward(Protocol):
    """Anything callable with images and prompts; higher is better.

    Attributes:
        name: as in tables and stored scores.
        differentiable: whether the score has a gradient with respect to the images.

    Optional members:
        identity: a dict with id, version, weights and preprocessing; scores are comparable where it is equal.
        uses_prompts: whether the score depends on the prompts; default True.
        most: the ceiling at which a search ends; default infinity.
    """

    @property
    def name(self) -> str: ...
    @property
    def differentiable(self) -> bool: ...
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images. Any B >= 1 must be possible, and a row's score must not depend on the other rows.

        Args:
            images: (B, 3, H, W), float in [0, 1].
            prompts: B prompts.

        Returns:
            (B,) finite scores.

        Raises:
            InputError: it may refuse prompts that it cannot score.
        """
        ...


@dataclass(frozen=True)
class FunctionReward:
    """A plain function with a name."""

    function: RewardFunction
    name: str
    differentiable: bool = True
    uses_prompts: bool = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.function(images, prompts)


@dataclass(frozen=True)
class WeightedSum:
    """weights[0] * rewards[0] + ..., differentiable if all are."""

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]
    name: str

    @property
    def differentiable(self) -> bool:
        return all(reward.differentiable for reward in self.rewards)

    @property
    def uses_prompts(self) -> bool:
        return any(map(uses_prompts, self.rewards))

    @property
    def identity(self) -> dict[str, Any]:
        terms = zip(self.weights, self.rewards, strict=True)
        return {"id": "sum", "terms": [{"weight": w, "reward": identity_of(each)} for w, each in terms]}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.add([score(reward, images, prompts) for reward in self.rewards])

    def add(self, values: Sequence[Tensor]) -> Tensor:
        """The sum (B,) of what its rewards said, each (B,)."""
        terms = [weight * value for weight, value in zip(self.weights, values, strict=True)]
        return torch.stack(terms).sum(0)


@dataclass(frozen=True)
class _Around:
    """What is said of another reward holds for this one, too."""

    reward: Reward

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    @property
    def uses_prompts(self) -> bool:
        return uses_prompts(self.reward)


@dataclass(frozen=True)
class Ceiling(_Around):
    """min(reward, most): above it nothing is gained, and there is no gradient.

    For a reward that is good enough at some level, and only fooled beyond it.
    """

    most: float
    name: str

    @property
    def identity(self) -> dict[str, Any]:
        return {"id": "ceiling", "most": self.most, "reward": identity_of(self.reward)}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.cut_off(score(self.reward, images, prompts))

    def cut_off(self, values: Tensor) -> Tensor:
        """What is left (B,) of what its reward said."""
        return values.float().clamp(max=self.most)


@dataclass(frozen=True)
class Renamed(_Around):
    """A reward under another name."""

    name: str

    @property
    def most(self) -> float:
        return float(getattr(self.reward, "most", math.inf))

    @property
    def identity(self) -> dict[str, Any]:
        return dict(identity_of(self.reward))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.reward(images, prompts)


def parts(reward: Reward, *, named: bool = False) -> tuple[Reward, ...]:
    """The rewards that a sum or a ceiling is made of; of any other, itself.

    Args:
        named: under the names that they have there; else what is behind another name.
    """
    if isinstance(reward, WeightedSum):
        return tuple(part for each in reward.rewards for part in parts(each, named=named))
    if isinstance(reward, Ceiling) or (isinstance(reward, Renamed) and not named):
        return parts(reward.reward, named=named)
    return (reward,)


def as_reward(
    function: RewardFunction | Reward, name: str | None = None, *, differentiable: bool = True
) -> Reward:
    """Make a reward of a plain function, or give a reward another name.

    Args:
        function: (images, prompts) -> (B,) scores, as `Reward.__call__`; or a reward.
        name: None: the function's or the reward's own name.
        differentiable: of a plain function: whether its scores have a gradient with respect to the images.

    Raises:
        InputError: `function` is not a function of images and prompts.
    """
    if isinstance(function, Reward):
        return function if name in (None, function.name) else Renamed(function, str(name))
    label = name or getattr(function, "__name__", type(function).__name__)
    if not callable(function):
        raise InputError(f"reward {label!r} is {function!r}; it must be a function of (images, prompts)")
    if isinstance(function, type):
        raise InputError(
            f"reward {label!r} is a class; give an object of it, or a function of (images, prompts)"
        )
    _check_arguments(function, str(label))
    own_name = getattr(function, "__name__", type(function).__name__)
    return FunctionReward(function, name or str(own_name), differentiable)


def _check_arguments(function: RewardFunction, label: str) -> None:
    """Raise `InputError` for a function that cannot be called with images and prompts."""
    try:
        takes = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except ValueError:  # a builtin may not say, and is believed
        return
    try:
        takes.bind(None, None)
    except TypeError:
        raise InputError(f"reward {label!r} takes {takes}; it must take (images, prompts)") from None


def identity_of(reward: Reward) -> dict[str, Any]:
    """What decides a reward's scores besides picture and prompt: scores of two that differ in it are not comparable.

    A reward of one's own that states no `identity` has that of what it is written in and computes by
    (`written.parts_of`); "weights" is None if nothing of that shows.
    """
    stated = getattr(reward, "identity", None)
    if stated is not None:
        return dict(stated)
    written = reward.function if isinstance(reward, FunctionReward) else reward
    return {"id": reward.name, "version": 1, "weights": parts_of(written), "preprocessing": OWN}


def is_unsettled(reward: Reward) -> bool:
    """Does it compute with batch norm or dropout in training mode, so that its numbers are not only the picture's?"""
    functions = (each.function if isinstance(each, FunctionReward) else each for each in parts(reward))
    return any(map(unsettled, functions))


def uses_prompts(reward: Reward) -> bool:
    """Does the score depend on the prompt? True unless the reward says otherwise."""
    return bool(getattr(reward, "uses_prompts", True))


def score_with_gradient(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """`score`, for a method that follows the gradient of the reward with respect to the images.

    Raises:
        RewardError: as in `score`, or there is no such gradient.
    """
    values = score(reward, images, prompts)
    if images.requires_grad and not values.requires_grad:
        raise RewardError(
            f"reward {reward.name!r} gives no gradient, which this method needs; ipgo doctor says why"
        )
    # A scorer whose own weights want a gradient hides that the picture was cut off, by PIL or .detach().
    if images.grad_fn is not None and not _leads_to(values.grad_fn, images.grad_fn):
        raise RewardError(
            f"reward {reward.name!r} gives no gradient with respect to the picture, which this method needs; "
            ".detach(), numpy and PIL cut it off"
        )
    return values


def _leads_to(start: Any, end: Any) -> bool:
    """Is a node of the graph of gradients among those that another one passes them on to?"""
    seen, open_ = {start}, [start]
    while open_:
        node = open_.pop()
        if node is end:
            return True
        new = {each for each, _ in node.next_functions if each is not None} - seen
        seen |= new
        open_ += new
    return False


def score_each(rewards: Mapping[str, Reward], images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """`score` of several rewards; one that others add up or cut off is asked once."""
    known: dict[int, Tensor] = {}

    def ask(reward: Reward) -> Tensor:
        if id(reward) not in known:
            if isinstance(reward, WeightedSum):
                values = reward.add([ask(each) for each in reward.rewards])
            elif isinstance(reward, Ceiling):
                values = reward.cut_off(ask(reward.reward))
            else:
                values = score(reward, images, prompts)
            known[id(reward)] = values
        return known[id(reward)]

    return {name: ask(reward) for name, reward in rewards.items()}


def score(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The reward's answer (B,), checked, on the device of the images.

    Raises:
        RewardError: it fails, or the answer is not a tensor of shape (B,), or not finite though its image is.
    """
    if len(prompts) != len(images):
        raise InputError(f"{len(images)} images have {len(prompts)} prompts; each needs one")
    try:
        own = images.clone()  # one that works in place shall not change the picture
        with same_folder():
            values = reward(own, list(prompts))
    except (IpgoError, torch.OutOfMemoryError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward {reward.name!r} fails: {said(error)}") from error
    if not isinstance(values, Tensor) or values.shape != (len(images),):
        given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise RewardError(
            f"reward {reward.name!r} must return a tensor of shape ({len(images)},), not {given}: one number for each "
            "image"
        )
    if values.is_complex():
        raise RewardError(f"reward {reward.name!r} must return real numbers, not {values.dtype}")
    finite_images = images.detach().flatten(1).isfinite().all(1)
    broken = ~values.detach().isfinite() & finite_images.to(values.device)
    if broken.any():
        raise NotFiniteError(
            f"reward {reward.name!r} is not a finite number for {broken.sum()} of {len(images)} images"
        )
    return values.to(images.device)
