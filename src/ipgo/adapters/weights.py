"""Weights of the denoiser that were learned: LoRA, through peft."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipgo.adapters.base import Adapter, key
from ipgo.backends import Backend, as_they_were, open_to_draw
from ipgo.backends.base import denoiser_of
from ipgo.backends.weights import uncompiled
from ipgo.errors import InputError
from ipgo.seeding import derive, generator, row_seeds
from ipgo.typed import check_types


@dataclass(frozen=True)
class LoRA:
    """Low-rank changes of the denoiser's linear layers: W + alpha / rank * B A (arXiv 2106.09685).

    Attributes:
        rank: of each change.
        alpha: scale of the changes; None is the rank, so that it is 1.
        targets: last parts of the names of the layers that are changed, by default those of attention.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    def __post_init__(self) -> None:
        check_types(self, "lora.")
        if self.rank < 1:
            raise InputError(f"lora.rank is {self.rank}; it must be at least 1")
        if self.alpha is not None and not self.alpha > 0:
            raise InputError(f"lora.alpha is {self.alpha}; it must be above 0")
        if not self.targets:
            raise InputError("lora.targets is empty; name at least one kind of layer, as 'to_q'")


class WeightAdapter(Adapter):
    """A LoRA of the denoiser for each prompt, or one for all.

    `layers` are the names of the layers that are changed, with their input and output widths. A batch is drawn
    with one set of weights, so it cannot mix prompts with rows of their own.
    """

    kind: ClassVar[str] = "weights"

    def __init__(
        self,
        prompts: Sequence[str] | None,
        layers: Mapping[str, Sequence[int]],
        lora: LoRA | Mapping[str, Any],
        seed: int | None = 0,
    ) -> None:
        super().__init__(prompts)
        self.layers = {name: (inputs, outputs) for name, (inputs, outputs) in layers.items()}
        self.lora = lora if isinstance(lora, LoRA) else LoRA(**lora)
        self.options = {
            "layers": {name: list(widths) for name, widths in self.layers.items()},
            "lora": {**asdict(self.lora), "targets": list(self.lora.targets)},
        }
        seeds = row_seeds(seed, prompts)
        rank = self.lora.rank
        down = {name: _uniform(seeds, name, (rank, inputs)) for name, (inputs, _) in self.layers.items()}
        up = {name: torch.zeros(len(seeds), outputs, rank) for name, (_, outputs) in self.layers.items()}
        self.down = nn.ParameterDict({key(name): nn.Parameter(value) for name, value in down.items()})
        self.up = nn.ParameterDict({key(name): nn.Parameter(value) for name, value in up.items()})

    @classmethod
    def start(cls, backend: Backend, prompts: Sequence[str], lora: LoRA, *, seed: int, shared: bool) -> Self:
        """The point where a fit begins: B is 0, so nothing is changed yet.

        Raises:
            InputError: no linear layer of the denoiser has such a name, or it carries a LoRA already.
        """
        denoiser = uncompiled(backend.modules["denoiser"])
        _check_bare(denoiser)
        layers = {
            name: (layer.in_features, layer.out_features)
            for name, layer in denoiser.named_modules()
            if isinstance(layer, nn.Linear) and any(f".{name}".endswith(f".{end}") for end in lora.targets)
        }
        if not layers:
            raise InputError(f"lora.targets is {list(lora.targets)}; no linear layer of the denoiser ends so")
        return cls(None if shared else prompts, layers, lora, seed)

    @classmethod
    def empty(cls, prompts: Sequence[str] | None, options: Mapping[str, Any]) -> Self:
        return cls(prompts, **options, seed=None)

    @contextmanager
    def attached(self, backend: Backend | object, prompts: Sequence[str]) -> Iterator[None]:
        rows = torch.unique(self.rows(prompts)).tolist()
        if len(rows) > 1:
            raise InputError(
                f"a batch is drawn with one set of weights; these {len(rows)} prompts have their own, "
                "so draw them one by one"
            )
        from peft import LoraConfig, LoraModel  # here, because it takes a second

        pipe = (backend if isinstance(backend, Backend) else open_to_draw(backend)).pipe
        denoiser = uncompiled(denoiser_of(pipe))
        self._check(denoiser)
        alpha = self.lora.rank if self.lora.alpha is None else self.lora.alpha
        config = LoraConfig(r=self.lora.rank, lora_alpha=alpha, target_modules=list(self.layers))
        with as_they_were(pipe):  # peft freezes the denoiser
            tuner = None
            try:
                # On the meta device: peft's own initial values would be drawn for nothing.
                tuner = LoraModel(denoiser, config, "ipgo", low_cpu_mem_usage=True)
                for name in self.layers:
                    layer: Any = denoiser.get_submodule(name)
                    layer.lora_A["ipgo"] = _Factor(self.down[key(name)], rows[0])
                    layer.lora_B["ipgo"] = _Factor(self.up[key(name)], rows[0])
                yield
            finally:
                if tuner is not None:
                    tuner.unload()
                else:  # stopped while its layers were put in, of which peft then knows nothing
                    _put_back(denoiser, self.layers)
                vars(denoiser).pop("peft_config", None)  # which some versions of peft leave behind

    def _check(self, denoiser: nn.Module) -> None:
        _check_bare(denoiser)
        found = dict(denoiser.named_modules())
        for name, widths in self.layers.items():
            layer = found.get(name)
            if not isinstance(layer, nn.Linear) or (layer.in_features, layer.out_features) != widths:
                raise InputError(f"this adapter changes layer {name!r} {widths}, which the backend lacks")

    def prompt_kwargs(
        self, pipe: Any, prompt: str, negative_prompt: str = "", guidance_scale: float | None = None
    ) -> dict[str, Any]:
        """Refused: this adapter is not in the prompt. Call the pipeline while `attached`."""
        raise InputError("an adapter of weights has no prompt_kwargs; call the pipeline inside `attached`")


def _put_back(denoiser: nn.Module, names: Iterable[str]) -> None:
    """Take LoRA layers out again, as far as there are any."""
    for name in names:
        layer = denoiser.get_submodule(name)
        if hasattr(layer, "base_layer"):
            parent, _, child = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), child, layer.base_layer)


def _check_bare(denoiser: nn.Module) -> None:
    if hasattr(denoiser, "peft_config"):
        raise InputError(
            "the denoiser carries a LoRA already; call pipe.fuse_lora() if it shall stay, then "
            "pipe.unload_lora_weights()"
        )
    if any(hasattr(module, "base_layer") for module in denoiser.modules()):
        raise InputError(
            "the denoiser still has the layers of a LoRA that was deleted; call pipe.unload_lora_weights()"
        )
    if any(getattr(module, "fused_projections", False) for module in denoiser.modules()):
        raise InputError(
            "the denoiser's attention is fused, past the layers that a LoRA changes; call "
            "pipe.unfuse_qkv_projections()"
        )


class _Factor(nn.Module):
    """Half of a LoRA: peft's linear layer, with its weight in a row of an adapter's parameter."""

    def __init__(self, rows: nn.Parameter, number: int) -> None:
        super().__init__()
        self.rows = rows
        self.number = number

    @property
    def weight(self) -> Tensor:
        return self.rows[self.number]

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight.to(inputs.device))


def _uniform(seeds: Sequence[int | None], name: str, shape: tuple[int, int]) -> Tensor:
    """(N, *shape): A of peft's initial LoRA, uniform within 1 / sqrt(inputs), from each seed; zeros for None."""
    rows = [
        torch.zeros(shape)
        if seed is None
        else (torch.rand(shape, generator=generator(derive(seed, name))) * 2 - 1) / math.sqrt(shape[1])
        for seed in seeds
    ]
    return torch.stack(rows)
