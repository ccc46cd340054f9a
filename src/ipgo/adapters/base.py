"""What a method learns, and how it takes part in drawing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ipgo.backends import Backend, as_they_were, load_backend, open_to_draw
from ipgo.devices import own_numbers
from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError
from ipgo.prompts import check_prompts
from ipgo.sampling import Sampling, sample, unconditional
from ipgo.seeding import check_seeds, plain


class Adapter(nn.Module):
    """The identity, unless overridden. Parameters and buffers have one row per prompt, or one row in all.

    Attributes:
        kind: its name in `ADAPTERS`.
        transfers: "seeds" if it also works on noise that it was not fitted to, "nothing" if it is tied to one seed.
        needs_all_steps: does a gradient reach it only through every denoising step?
        learns_unconditional: does what `unconditional` returns depend on the parameters?
        options: JSON values: `ADAPTERS[kind](prompts, **options)` builds an adapter that the tensors fit
            into.
        prompts: one for each row; None if one row is shared by every prompt.
        padding, long_prompts: the backend's, that it was learned with, as far as that is kept.
    """

    kind: ClassVar[str] = "identity"
    transfers: ClassVar[str] = "seeds"
    needs_all_steps: ClassVar[bool] = False
    learns_unconditional: bool = False
    options: dict[str, Any]
    prompts: tuple[str, ...] | None
    padding: str = "max_length"
    long_prompts: str = "refuse"

    def __init__(self, prompts: Sequence[str] | None = None) -> None:
        super().__init__()
        if isinstance(prompts, str):
            raise InputError(f"prompts is {prompts!r}; it must be a list of prompts, or None for any")
        self.prompts = None if prompts is None else tuple(prompts)
        self.options = {}

    @classmethod
    def empty(cls, prompts: Sequence[str] | None, options: Mapping[str, Any]) -> Self:
        """One whose tensors are yet to be filled in: no initial values are drawn."""
        return cls(prompts, **options)

    def rows(self, prompts: Sequence[str]) -> Tensor:
        """(B,) row numbers; `InputError` for a prompt that was never fitted."""
        if isinstance(prompts, str) or not prompts:
            raise InputError(f"prompts is {prompts!r}; it must be a list of at least one prompt")
        if self.prompts is None:
            return torch.zeros(len(prompts), dtype=torch.long)
        numbers = {prompt: row for row, prompt in enumerate(self.prompts)}
        for prompt in prompts:
            if prompt not in numbers:
                near = difflib.get_close_matches(prompt, self.prompts, n=1, cutoff=0)
                raise InputError(f"this adapter was not fitted to prompt {prompt!r}; nearest: {near[0]!r}")
        return torch.tensor([numbers[prompt] for prompt in prompts])

    def condition(self, backend: Backend, prompts: Sequence[str], original: PromptEmbeds) -> PromptEmbeds:
        """What the denoiser gets instead of `original`, the states of `prompts`."""
        return original

    def unconditional(
        self,
        backend: Backend,
        prompts: Sequence[str],
        cond: PromptEmbeds,
        sampling: Sampling,
        raw: PromptEmbeds | None = None,
    ) -> PromptEmbeds | None:
        """What guidance moves away from when `prompts` are drawn as `cond`: as `sampling.unconditional`.

        Args:
            raw: the same for the prompts as they are, if it is known; it spares a call of the text encoder.
        """
        return unconditional(backend, cond, sampling) if raw is None else raw

    def noise(self, backend: Backend, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Tensor:
        """(B, 1 + steps, C, h, w), as `Backend.noise`."""
        return backend.noise(seeds, steps)

    def attached(self, backend: Backend | object, prompts: Sequence[str]) -> AbstractContextManager[None]:
        """While open, the backend's weights, or a pipeline object's, are those that `prompts` are drawn with.

        Raises:
            InputError: a pipeline object, of an adapter that is not in the weights: its call would draw as ever.
        """
        if not isinstance(backend, Backend):
            raise InputError(
                f"an adapter of kind {self.kind!r} is not in the weights; give the pipeline its `prompt_kwargs`, "
                "or draw with ipgo.generate"
            )
        return nullcontext()

    def penalty(self, original: PromptEmbeds, conditioned: PromptEmbeds, noise: Tensor) -> Tensor:
        """(B,): what a method may hold against what `condition` and `noise` returned.

        Args:
            original, conditioned: the states (B, L, D) of the prompts as they are, and those of `condition`.
            noise: (B, 1 + steps, C, h, w).
        """
        return original.embeds.new_zeros(len(original.embeds))

    @torch.no_grad()
    def take_rows_(self, other: Adapter, rows: Tensor) -> None:
        """Copy the rows (N,) bool of an adapter of the same kind, options and device."""
        theirs = other.state_dict()
        for name, own in self.state_dict().items():
            chosen = rows.to(own.device)
            own[chosen] = theirs[name][chosen]

    def project_(self) -> None:
        """Bring the parameters back into their constraints, after an optimiser step."""

    @staticmethod
    def with_equal_options(adapters: Sequence[Adapter]) -> Sequence[Adapter]:
        """Adapters of this kind, with equal options where these differ with the length of prompts alone."""
        return adapters

    def row(self, number: int) -> Adapter:
        """A copy that holds the row of one prompt."""
        prompts = None if self.prompts is None else self.prompts[number : number + 1]
        alone = self.empty(prompts, self.options)
        alone.load_state_dict({name: rows[number : number + 1] for name, rows in self.state_dict().items()})
        return alone

    def prompt_kwargs(
        self, pipe: Any, prompt: str, negative_prompt: str = "", guidance_scale: float | None = None
    ) -> dict[str, Any]:
        """Arguments that make a plain diffusers pipeline draw the adapted prompt: `pipe(**kwargs)`.

        See `Backend.pipeline_kwargs`. The networks of `pipe` are left as they are. It may be one that offloads.

        Args:
            guidance_scale: that it will draw with, in our count; None is the model's own, as of `load_backend`.

        Raises:
            InputError: the adapter was not fitted to `prompt`, or does not fit the pipeline.
        """
        if not isinstance(prompt, str):
            raise InputError(f"prompt is {prompt!r}; it must be one text: call this for each prompt")
        backend = open_to_draw(pipe, padding=self.padding, long_prompts=self.long_prompts)
        with own_numbers(), torch.no_grad(), as_they_were(pipe):
            backend.freeze()
            cond = self.condition(backend, [prompt], backend.encode([prompt]))
            # Any scale above 1: only the prompts are wanted.
            guided = Sampling(guidance_scale=2, negative_prompt=negative_prompt)
            uncond = self.unconditional(backend, [prompt], cond, guided)
        scale = backend.guidance_scale if guidance_scale is None else guidance_scale
        if scale <= 1 and not negative_prompt and uncond is not None and uncond.length != cond.length:
            uncond = None  # it would not be looked at, and to bring both to one length can take a hundred times as many
        return backend.pipeline_kwargs(cond, uncond)


def stack(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter with the rows of all; they must be of one kind with equal options."""
    if len({adapter.kind for adapter in adapters}) == 1:
        adapters = adapters[0].with_equal_options(adapters)
    first = adapters[0]
    prompts: list[str] = []
    for adapter in adapters:
        if (adapter.kind, adapter.options) != (first.kind, first.options) or adapter.prompts is None:
            raise InputError(
                "only adapters of one kind, with equal options and prompts of their own, can be stacked"
            )
        prompts += adapter.prompts
    whole = first.empty(prompts, first.options)
    states = [adapter.state_dict() for adapter in adapters]
    whole.load_state_dict({name: torch.cat([state[name] for state in states]) for name in states[0]})
    return whole


def generate(
    backend: Backend | str | Path | object,
    prompts: Sequence[str],
    seeds: Iterable[int],
    adapter: Adapter | None = None,
    sampling: Sampling | None = None,
    *,
    backprop_steps: int = 0,
) -> Tensor:
    """Draw prompts[i] from the noise of seeds[i], as one batch: (B, 3, H, W) images in [0, 1].

    Args:
        backend: what `load_backend` made, or takes; a pipeline object is frozen until this returns.
        adapter: what was learned; None draws the prompts as they are.
        sampling: None is 20 steps at the backend's own guidance.
        backprop_steps: the last denoising steps that carry gradient back to the adapter.

    Raises:
        InputError: not a seed for each prompt, a prompt that the adapter was not fitted to, or more `backprop_steps`
            than steps.
    """
    if isinstance(prompts, str) or not isinstance(seeds, Iterable):
        raise InputError(f"generate needs a list of prompts and one of seeds, not {prompts!r} and {seeds!r}")
    if not isinstance(backend, Backend):
        with as_they_were(backend):
            opened = load_backend(backend)
            return generate(opened, prompts, seeds, adapter, sampling, backprop_steps=backprop_steps)
    adapter, sampling = with_defaults(adapter, sampling)
    prompts, seeds = list(prompts), plain(seeds)
    if len(prompts) != len(seeds) or not prompts:
        raise InputError(
            f"generate needs one seed for each prompt, not {len(prompts)} prompts, {len(seeds)} seeds"
        )
    if not 0 <= backprop_steps <= sampling.steps:
        raise InputError(f"backprop_steps is {backprop_steps}; it must be between 0 and {sampling.steps}")
    check_prompts(prompts, distinct=False)
    check_seeds(seeds, distinct=False)
    backend.check_current()
    learning = torch.inference_mode(False) if backprop_steps else nullcontext()
    with own_numbers(), learning, torch.set_grad_enabled(backprop_steps > 0):
        distinct = list(dict.fromkeys(prompts))  # often one prompt with many seeds
        places = torch.tensor([distinct.index(prompt) for prompt in prompts], device=backend.device)
        original = backend.encode(distinct).select(places)
        return draw_batch(backend, prompts, seeds, adapter, sampling, original, backprop_steps=backprop_steps)


def with_defaults(adapter: Adapter | None, sampling: Sampling | None) -> tuple[Adapter, Sampling]:
    """What `generate` draws with where they are None; `InputError` for something else."""
    adapter, sampling = adapter or Adapter(), sampling or Sampling()
    for name, value, kind in (("adapter", adapter, Adapter), ("sampling", sampling, Sampling)):
        if not isinstance(value, kind):
            raise InputError(f"{name} is {value!r}; it must be of the type {kind.__name__}")
    return adapter, sampling


def draw_batch(
    backend: Backend,
    prompts: Sequence[str],
    seeds: Sequence[int],
    adapter: Adapter,
    sampling: Sampling,
    original: PromptEmbeds,
    *,
    backprop_steps: int = 0,
) -> Tensor:
    """`generate`, of prompts whose states as they are, `original`, are known."""
    with adapter.attached(backend, prompts):
        cond = adapter.condition(backend, prompts, original)
        noise = adapter.noise(backend, prompts, seeds, sampling.noise_steps(backend))
        uncond = adapter.unconditional(backend, prompts, cond, sampling)
        return sample(backend, cond, uncond, noise, sampling, backprop_steps=backprop_steps)


def key(name: str) -> str:
    """A weight's name as that of a parameter, which cannot hold dots."""
    return name.replace(".", "/")
