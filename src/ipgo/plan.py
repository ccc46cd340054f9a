"""The GPU memory of a step of a fit, estimated without a GPU and without weights, and the fastest choice that fits.

The step is ipgo's own (`training.first_gradient`), run on models that have sizes and no numbers.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ipgo.adapters import InsertionAdapter
from ipgo.ascent import Ascent
from ipgo.backends import Backend
from ipgo.backends.unloaded import unloaded_backend
from ipgo.errors import InputError, RewardError
from ipgo.insertion import Insertion
from ipgo.memory import NEEDS_NUMBERS, LiveMemory, new_sizes, tensors_of
from ipgo.rewards import Reward, parts
from ipgo.rewards.unloaded import unloaded_reward
from ipgo.sampling import Sampling
from ipgo.task import Task
from ipgo.training import first_gradient

# Kept for what is not counted: CUDA's context, its libraries' workspaces, and what the allocator wastes. An allowance.
RESERVE = 10**9
UNITS = {"gb": 10**9, "gib": 2**30, "mb": 10**6, "mib": 2**20}


@dataclass(frozen=True)
class Choice:
    """What can be chosen to save memory.

    Attributes:
        backprop_steps: K, the last denoising steps with gradient. It decides what is learned.
        recompute: compute the differentiated calls twice instead of keeping their activations.
        rows: prompts that are fitted at once.
        text_on_cpu: encode prompts on the CPU, which is done once for a fit.
    """

    backprop_steps: int
    recompute: bool
    rows: int = 1
    text_on_cpu: bool = False

    @property
    def passes(self) -> int:
        """What the gradient of a step costs, in forward passes of the denoiser: a backward pass takes two of them."""
        return self.backprop_steps * (3 if self.recompute else 2)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one step.

    Attributes:
        weights: of all models, loaded as a fit loads them.
        saved: what is alive besides the weights when the reward is known and the backward pass begins.
        peak: the most that is ever alive, weights included.
    """

    weights: int
    saved: int
    peak: int


@dataclass(frozen=True)
class Workload:
    """A backend and a reward, with or without numbers, and how the images of a fit are sampled."""

    backend: Backend
    reward: Reward
    sampling: Sampling

    def weights(self, memory: LiveMemory | None = None) -> dict[str, int]:
        """Bytes by model: those of the backend, then "reward"; counted in `memory` from now on, if it is given."""
        memory = memory or LiveMemory()
        sizes = {name: memory.add(tensors_of([module])) for name, module in self.backend.modules.items()}
        # What the pipeline holds besides them, such as the original of a VAE that was copied to float32.
        modules = [each for each in self.backend.pipe.components.values() if isinstance(each, nn.Module)]
        sizes["others"] = memory.add(tensors_of(modules))
        sizes["reward"] = memory.add(tensors_of(_modules_of(self.reward)))
        return {name: size for name, size in sizes.items() if size}

    def footprint(self, choice: Choice) -> Footprint:
        """Run the first step of an IPGO fit and count.

        Of the steps without gradient only one is run: the others take the same memory, one after the other.

        Raises:
            InputError: choices that do not fit together, or a reward that depends on pixel values.
        """
        if choice.text_on_cpu:
            return self.without_text(self.footprint(replace(choice, text_on_cpu=False)))
        steps = min(self.sampling.steps, max(choice.backprop_steps + 1, 2))
        sampling = replace(self.sampling, steps=steps, fit_steps=None)
        prompts = tuple(f"prompt {number}" for number in range(choice.rows))
        memory = LiveMemory()
        weights = sum(self.weights(memory).values())
        watched = _Watched(self.reward, memory)
        task = Task(self.backend, watched, prompts, sampling)
        ascent = Ascent(backprop_steps=choice.backprop_steps, recompute=choice.recompute)
        try:
            with memory, warnings.catch_warnings():
                # Torch hides this one itself, but not where warnings are errors.
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")
                adapter = InsertionAdapter.start(
                    self.backend, prompts, Insertion(), seed=0, shared=False, sampling=sampling
                )
                first_gradient(task, adapter, ascent)
        except RewardError as error:
            if ".numpy() is not supported" in str(error.__cause__):
                raise InputError(
                    f"reward {self.reward.name!r} cannot be planned: it leaves torch for numpy, so it has no gradient "
                    "either; see ipgo doctor"
                ) from None
            if not isinstance(error.__cause__, NEEDS_NUMBERS):
                raise
            raise InputError(
                f"reward {self.reward.name!r} cannot be planned: it depends on pixel values "
                f"({error.__cause__})"
            ) from None
        return Footprint(weights, watched.live - weights, memory.peak)

    def without_text(self, footprint: Footprint) -> Footprint:
        """What is left of it on a GPU when the text encoders are on the CPU."""
        text = sum(size for name, size in self.weights().items() if name.startswith("text_encoder"))
        return Footprint(footprint.weights - text, footprint.saved, footprint.peak - text)


class _Watched:
    """A reward that notes how much memory is alive when it has answered."""

    def __init__(self, reward: Reward, memory: LiveMemory) -> None:
        self.reward, self.memory = reward, memory
        self.name, self.differentiable = reward.name, reward.differentiable
        self.live = 0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        values = self.reward(images, prompts)
        self.live = self.memory.live
        return values


def _modules_of(reward: Reward) -> list[nn.Module]:
    """Those of its terms; what a plain function holds cannot be seen."""
    return [part for part in parts(reward) if isinstance(part, nn.Module)]


def unloaded(
    backend: str, reward: str, sampling: Sampling, dtype: torch.dtype, image_size: int | None = None
) -> Workload:
    """A workload from configurations alone.

    Raises:
        InputError: as `unloaded_backend` and `unloaded_reward`.
    """
    sizes = new_sizes()
    scored_by = unloaded_reward(reward, sizes)  # first: what is wrong with it is found sooner
    opened = unloaded_backend(backend, sizes, dtype, image_size=image_size)
    return Workload(opened, scored_by, sampling)


def fastest(fits: Callable[[Choice], bool], depths: Sequence[int], most_rows: int) -> Choice | None:
    """The choice of the fewest `passes` that fits, with as many rows as fit; None if none does.

    Of those with as many passes the text encoders stay on the GPU if they can. Rows are then doubled while they fit,
    up to `most_rows`.

    Args:
        fits: whether a choice fits; it is asked about few.
        depths: the values of K to choose from.
    """
    return _first(fits, sorted(_choices(depths), key=lambda each: (each.passes, each.text_on_cpu)), most_rows)


def deepest(fits: Callable[[Choice], bool], depths: Sequence[int], most_rows: int) -> Choice | None:
    """The choice of the largest K that fits, since K decides what is learned; else as `fastest`."""
    order = sorted(_choices(depths), key=lambda each: (-each.backprop_steps, each.passes, each.text_on_cpu))
    return _first(fits, order, most_rows)


def _choices(depths: Sequence[int]) -> list[Choice]:
    """All for one row."""
    return [
        Choice(depth, recompute, text_on_cpu=text_on_cpu)
        for depth, recompute, text_on_cpu in itertools.product(set(depths), (False, True), (False, True))
    ]


def _first(fits: Callable[[Choice], bool], choices: Sequence[Choice], most_rows: int) -> Choice | None:
    choice = next((each for each in choices if fits(each)), None)
    while choice is not None and choice.rows < most_rows:
        more = replace(choice, rows=min(2 * choice.rows, most_rows))
        if not fits(more):
            break
        choice = more
    return choice


def memory_of(gpu: str) -> int:
    """Bytes of `16GB` (10^9 each), `15.5GiB` (2^30 each), MB or MiB; `InputError` for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", gpu.strip().lower())
    if found is None or found[2] not in UNITS or float(found[1]) == 0:
        raise InputError(f"gpu is {gpu!r}; it must be a size such as 16GB or 15.5GiB")
    return int(float(found[1]) * UNITS[found[2]])
