"""What is maximised: any function of images and prompts. A new one is a file and a line in `REWARDS`."""

from __future__ import annotations

import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ipgo.devices import choose_device
from ipgo.errors import InputError, IpgoError, RewardError, unknown
from ipgo.rewards.checkpoints import Checkpoint, Source, bare_name
from ipgo.rewards.own import parts_of, read_function, said, unsettled

RewardFunction = Callable[[Tensor, Sequence[str]], Tensor]

# name -> "module:function" that takes a device and returns a reward; imported when it is asked for. What is in
# `SOURCES` takes a `Checkpoint` too.
REWARDS: dict[str, str] = {
    "emoji-clip": "ipgo.rewards.emoji:load_clip",
    "emoji-aesthetic": "ipgo.rewards.emoji:load_aesthetic",
    "emoji-preference": "ipgo.rewards.emoji:load_preference",
    "emoji-likeness": "ipgo.rewards.emoji:load_likeness",
    "emoji-judge": "ipgo.rewards.emoji:load_judge",
    "colorfulness": "ipgo.rewards.pixels:load_colorfulness",
    "contrast": "ipgo.rewards.pixels:load_contrast",
    "clip": "ipgo.rewards.clip:load_clip",
    "pickscore": "ipgo.rewards.clip:load_pickscore",
    "aesthetic": "ipgo.rewards.aesthetic:load_aesthetic",
    "hpsv2": "ipgo.rewards.hps:load_hps",
    "hpsv2.1": "ipgo.rewards.hps:load_hps",
    "imagereward": "ipgo.rewards.imagereward:load_imagereward",
}
SOURCES: dict[str, Source] = {
    "clip": Source("openai/clip-vit-large-patch14"),
    "pickscore": Source("yuvalkirstain/PickScore_v1"),
    "aesthetic": Source("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"),
    "hpsv2": Source("xswu/HPSv2", "HPS_v2_compressed.pt"),
    "hpsv2.1": Source("xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    "imagereward": Source("THUDM/ImageReward", "ImageReward.pt"),
}
BLIND = ("emoji-aesthetic", "colorfulness", "contrast", "aesthetic")  # they do not look at the prompt
# They have no answer for some prompts, and a function that raises `InputError` for those.
PARTICULAR = {"emoji-likeness": "ipgo.rewards.emoji.artwork:check_prompts"}
JUDGES = ("emoji-judge",)  # they have no gradient
CEILING = "<="
VARIANT = "notebook"  # `clip@notebook`
# What begins so goes on to the end of a spec, whatever + and * are in it.
EXTERNAL = {"cmd:": "ipgo.rewards.external:Command", "ask:": "ipgo.rewards.external:Question"}
_PLUS = re.compile(r"(?<![\d.][eE])\+")  # not that of 1e+3
_WEIGHT = re.compile(r"^\s*[-\d.eE]+\s*\*")
_EXTERNAL = re.compile(r"(?:^|(?<=[+*]))\s*(?=cmd:|ask:)")


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
        values = [score(reward, images, prompts) for reward in self.rewards]
        return torch.stack([weight * value for weight, value in zip(self.weights, values, strict=True)]).sum(
            0
        )


@dataclass(frozen=True)
class Ceiling:
    """min(reward, most): above it nothing is gained, and there is no gradient.

    For a reward that is good enough at some level, and only fooled beyond it.
    """

    reward: Reward
    most: float
    name: str

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    @property
    def uses_prompts(self) -> bool:
        return uses_prompts(self.reward)

    @property
    def identity(self) -> dict[str, Any]:
        return {"id": "ceiling", "most": self.most, "reward": identity_of(self.reward)}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return score(self.reward, images, prompts).float().clamp(max=self.most)


@dataclass(frozen=True)
class Renamed:
    """A reward under another name."""

    reward: Reward
    name: str

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    @property
    def uses_prompts(self) -> bool:
        return uses_prompts(self.reward)

    @property
    def most(self) -> float:
        return float(getattr(self.reward, "most", math.inf))

    @property
    def identity(self) -> dict[str, Any]:
        return dict(identity_of(self.reward))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.reward(images, prompts)


def parts(reward: Reward) -> tuple[Reward, ...]:
    """The rewards that a sum or a ceiling is made of; of any other, itself."""
    if isinstance(reward, WeightedSum):
        return tuple(part for each in reward.rewards for part in parts(each))
    return parts(reward.reward) if isinstance(reward, Ceiling | Renamed) else (reward,)


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
    if not callable(function) or isinstance(function, type) or not _takes_two(function):
        given = getattr(function, "__name__", type(function).__name__)
        raise InputError(f"a reward must be a function of (images, prompts), not {given}")
    own_name = getattr(function, "__name__", type(function).__name__)
    return FunctionReward(function, name or str(own_name), differentiable)


def _takes_two(function: RewardFunction) -> bool:
    """Can it be called so? A builtin may not say, and is believed."""
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        inspect.signature(called).bind(None, None)
    except TypeError:
        return False
    except ValueError:
        pass
    return True


def identity_of(reward: Reward) -> dict[str, Any]:
    """What decides a reward's scores besides picture and prompt: scores of two that differ in it are not comparable.

    A reward of one's own that states no `identity` has that of what it is written in and computes by
    (`own.parts_of`); "weights" is None if nothing of that shows.
    """
    stated = getattr(reward, "identity", None)
    if stated is not None:
        return dict(stated)
    written = reward.function if isinstance(reward, FunctionReward) else reward
    return {"id": reward.name, "version": 1, "weights": parts_of(written), "preprocessing": "its own"}


def is_unsettled(reward: Reward) -> bool:
    """Does it compute with batch norm or dropout in training mode, so that its numbers are not only the picture's?"""
    functions = (each.function if isinstance(each, FunctionReward) else each for each in parts(reward))
    return any(map(unsettled, functions))


def describe(name: str) -> str:
    """One line on a reward in `REWARDS`: what it is, and the weights that it needs."""
    what = (pkgutil.resolve_name(REWARDS[name]).__doc__ or "").splitlines()[0]
    return f"{what} Weights: {SOURCES[name]}." if name in SOURCES else what


def uses_prompts(reward: Reward) -> bool:
    """Does the score depend on the prompt? True unless the reward says otherwise."""
    return bool(getattr(reward, "uses_prompts", True))


def needs_prompts(spec: str) -> bool:
    """`uses_prompts` of what `load_reward` makes of a spec, without loading a model."""
    return uses_prompts(_outline(spec))


def has_gradient(spec: str) -> bool:
    """Will what `load_reward` makes of a spec claim to be differentiable? Without loading a model."""
    return _outline(spec).differentiable


def asks(spec: str) -> bool:
    """Does a person give it?"""
    return any(each.name.startswith("ask:") for each in _terms(spec))


def terms(spec: str) -> list[tuple[float, str]]:
    """What a spec adds up: weights and names, those in `REWARDS` without a path or variant."""
    return [
        (each.weight, bare if (bare := bare_name(each.name)) in REWARDS else each.name)
        for each in _terms(spec)
    ]


def raised(spec: str) -> set[str]:
    """What a method that follows a spec maximises: the spec, and the rewards it is made of. These are not held out.

    Nor is another variant (`@notebook`) of the same weights.
    """
    try:
        names = {each.name for each in _terms(spec)}
    except InputError:  # the name of a function of the user's, which says nothing
        return {spec}
    return {spec, *names, *(re.sub("@[^:]*", "", name) for name in names if bare_name(name) in REWARDS)}


def _outline(spec: str) -> Reward:
    """A reward that says of itself what the real one says, and has no model."""

    def stand_in(name: str) -> Reward:
        bare = bare_name(name)
        if bare not in REWARDS:
            return _load(name, torch.device("cpu"))  # a function, a command, a person: no model
        return FunctionReward(lambda images, _: images, name, bare not in JUDGES, bare not in BLIND)

    return combine(spec, stand_in)


def load_reward(spec: str, *, device: str | torch.device = "auto") -> Reward:
    """Load a reward, or a weighted sum of them.

    Args:
        spec: a name in `REWARDS`, for those in `SOURCES` with a path (`clip:folder`, see docs/rewards.md),
            `file.py:function`, `cmd:./score.sh {image} {prompt}` (a command that prints a number), `ask:question`
            (a person who types one), or terms such as `emoji-clip+0.5*emoji-aesthetic<=0.98`, of which a command or
            a question is the last; `<=` is a ceiling, see `Ceiling`.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        The reward; a `WeightedSum` for several terms or a weight other than 1.

    Raises:
        InputError: an unknown name, a weight that is not a number, a file without that function, weights that are
            not there and cannot be fetched, a command that cannot be run, or a question without a terminal.
    """
    if not isinstance(spec, str):
        raise InputError(f"a reward is loaded by its name, not from {spec!r}; for a function use as_reward")
    place = choose_device(device)
    return combine(spec, lambda name: _load(name, place))


def combine(spec: str, load: Callable[[str], Reward]) -> Reward:
    """What `load` makes of the name in a spec, or the weighted sum of what it makes of each."""
    found = _terms(spec)
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
    for name in (each.name for each in _terms(spec)):
        if name[:4] in EXTERNAL:
            _load_external(name)
        elif bare_name(name) in REWARDS:
            checkpoint = _checkpoint(name)
            if checkpoint is not None:
                checkpoint.check()
            if name in PARTICULAR:
                pkgutil.resolve_name(PARTICULAR[name])(prompts)
        else:
            _load(name, torch.device("cpu"))  # a function; or an unknown name


def score_with_gradient(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """`score`, for a method that follows the gradient of the reward with respect to the images.

    Raises:
        RewardError: as in `score`, or there is no such gradient.
    """
    values = score(reward, images, prompts)
    if images.requires_grad and not values.requires_grad:
        raise RewardError(f"reward {reward.name!r} gives no gradient, which this method needs")
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


def score(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The reward's answer (B,), checked, on the device of the images.

    Raises:
        RewardError: it fails, or the answer is not a tensor of shape (B,), or not finite though its image is.
    """
    if len(prompts) != len(images):
        raise InputError(f"{len(images)} images have {len(prompts)} prompts; each needs one")
    try:
        values = reward(images.clone(), list(prompts))  # one that works in place shall not change the picture
    except (IpgoError, torch.OutOfMemoryError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward {reward.name!r} fails: {said(error)}") from error
    if not isinstance(values, Tensor) or values.shape != (len(images),):
        given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise RewardError(
            f"reward {reward.name!r} must return a tensor of shape ({len(images)},), not {given}"
        )
    if values.is_complex():
        raise RewardError(f"reward {reward.name!r} must return real numbers, not {values.dtype}")
    finite_images = images.detach().flatten(1).isfinite().all(1)
    broken = ~values.detach().isfinite() & finite_images.to(values.device)
    if broken.any():
        raise RewardError(
            f"reward {reward.name!r} is not a finite number for {broken.sum()} of {len(images)} images"
        )
    return values.to(images.device)


def _terms(spec: str) -> list[Term]:
    """The parts between the +."""
    head, tail = _cut(spec)
    *parts, last = _PLUS.split(head)
    return [_term(part) for part in _whole_paths([*parts, last + tail])]


def _whole_paths(parts: Sequence[str]) -> list[str]:
    """The parts as terms; a path that holds a + and is there has come apart, and is joined again."""
    terms, start = [], 0
    while start < len(parts):
        name, _, place = parts[start].partition(":")
        known = bare_name(name.rpartition("*")[2].strip()) in SOURCES and bool(place)
        ends = range(start + 1, len(parts) + 1)
        end = next((end for end in ends if _is_there("+".join(parts[start:end]), known)), start + 1)
        terms.append("+".join(parts[start:end]))
        start = end
    return terms


def _is_there(term: str, known: bool) -> bool:
    """Does a term name a file that exists: of a published reward's weights (`known`), or one of functions?"""
    return (known and _own_weights(term)) or _own_file(term)


def _own_file(term: str) -> bool:
    """Is it `file.py:function`, with or without a weight, of a file that is there?"""
    place = _WEIGHT.sub("", term).partition(CEILING)[0].rpartition(":")[0].strip()
    return place.endswith(".py") and Path(place).is_file()


def _own_weights(term: str) -> bool:
    """Is it a published name with a path that is there?"""
    return Path(term.partition(CEILING)[0].partition(":")[2].strip()).exists()


def _cut(spec: str) -> tuple[str, str]:
    """A spec up to its command or question, and that."""
    found = _EXTERNAL.search(spec)
    return (spec, "") if found is None else (spec[: found.end()], spec[found.end() :])


class Term(NamedTuple):
    """`weight*name<=most`."""

    weight: float
    name: str
    most: float | None


def _term(term: str) -> Term:
    """`0.5*name<=2` to (0.5, "name", 2)."""
    head, tail = _cut(term)
    weight, star, name = head.rpartition("*")
    name, ceiling, most = (name, "", "") if tail else name.partition(CEILING)
    name += tail
    if not name.strip():
        raise InputError(
            f"reward term {term!r} is empty; write a name, weight*name or name{CEILING}most, joined by +"
        )
    factor = _finite(weight, "weight", term) if star else 1.0
    if factor == 0:
        raise InputError(f"reward weight {weight!r} in {term!r} must be a finite number other than 0")
    return Term(factor, name.strip(), _finite(most, "ceiling", term) if ceiling else None)


def _finite(number: str, what: str, term: str) -> float:
    try:
        value = float(number)
    except ValueError:
        raise InputError(f"reward {what} {number!r} in {term!r} is not a number") from None
    if not math.isfinite(value):
        raise InputError(f"reward {what} {number!r} in {term!r} must be a finite number")
    return value


def _load(name: str, device: torch.device) -> Reward:
    if name[:4] in EXTERNAL:
        return _load_external(name)
    if (bare := bare_name(name)) in REWARDS:
        load, checkpoint = pkgutil.resolve_name(REWARDS[bare]), _checkpoint(name)
        return as_reward(load(device) if checkpoint is None else load(device, checkpoint), name)
    if ".py:" in name:
        return as_reward(*read_function(name))
    raise _unknown(name)


def _unknown(name: str) -> InputError:
    if name.endswith(".py"):
        return InputError(f"reward {name!r} names no function; write {name}:FUNCTION")
    return unknown("reward", bare_name(name), REWARDS)


def _checkpoint(name: str) -> Checkpoint | None:
    """Which weights a name with its variant and path asks for; None for a reward that takes neither."""
    head, colon, place = name.partition(":")
    bare, at, variant = head.partition("@")
    if bare not in SOURCES:
        if colon or at:
            raise InputError(f"reward {bare!r} takes no path and no variant, but is given as {name!r}")
        return None
    if at and variant != VARIANT:
        raise InputError(f"reward {name!r}: there is no variant {variant!r}; the only one is {VARIANT}")
    if colon and not place:
        raise InputError(f"reward {name!r} has no path after its colon")
    return Checkpoint(name, bool(at), place, SOURCES[bare])


def _load_external(spec: str) -> Reward:
    """`cmd:line` or `ask:question`."""
    reward: Reward = pkgutil.resolve_name(EXTERNAL[spec[:4]])(spec[4:])
    return reward
