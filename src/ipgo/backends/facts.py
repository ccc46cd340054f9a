"""What a family of pipelines is like, and how one of them may be opened."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ipgo import files
from ipgo.backends.schedulers import SCHEDULERS
from ipgo.errors import InputError, unknown
from ipgo.typed import check_types

PADDINGS = ("max_length", "none")
LONG_PROMPTS = ("refuse", "truncate", "chunk")
TEXT_DEVICES = ("auto", "cpu")
LARGEST = 8192  # pixels of a side: no model draws so much, and the mask of its attention alone would fill the memory

Guidance = Literal["classifier-free", "distilled", "none"]
Time = Literal["t", "t / 1000", "1 - t / 1000", "share of noise"]
Scaling = Literal["factor", "factor and shift", "mean and deviation"]


@dataclass(frozen=True)
class Facts:
    """What holds for every model of a family.

    Attributes:
        tokens: the longest prompt, with its marks; a model's own tokenizer may allow less.
        width: what the denoiser's configuration calls the width of the prompt embeddings.
        ordered: does the denoiser see the order of the text states? If not, before and after are the same.
        masked: is padding hidden from the denoiser: "always", "never", or "optional" (padding="none").
        pooled: does the denoiser get a vector for the whole prompt besides the states?
        guidance: "classifier-free", "distilled" (the scale is an input of the network), "none"; of several,
            a model has one.
        process: "diffusion", whose schedulers can be exchanged, or "flow", which keeps its own.
        chunked: can longer prompts be read in windows of so many tokens (long_prompts="chunk")?
        latents: how stock pipelines take them: a "grid" (B, C, h, w), or "packed" into a row of patches. Here they
            are always a grid.
        time: what the network gets of a scheduler's timestep t.
        scaling: how latents are brought to the VAE's: divided by a factor, also shifted, or each channel given
            its mean and deviation.
        prediction: what the network says: what its "scheduler" is configured for (noise, velocity or the clean
            latents), a "flow" from the latents to noise, or that flow turned to an "angle" of noise.
    """

    tokens: int
    width: str
    ordered: bool
    masked: Literal["always", "never", "optional"]
    pooled: bool
    guidance: tuple[Guidance, ...]
    process: Literal["diffusion", "flow"]
    chunked: bool = False
    latents: Literal["grid", "packed"] = "grid"
    time: Time = "t"
    scaling: Scaling = "factor"
    prediction: Literal["scheduler", "flow", "angle"] = "scheduler"

    def lines(self) -> tuple[str, str]:
        """All of it in words: what its text is like, and its latents, time and prediction."""
        padding = {"always": "padding hidden", "never": "padding seen", "optional": "padding seen or hidden"}
        scheduler = "noise, velocity or clean latents (its scheduler says which)"
        text = [
            f"{self.tokens} tokens",
            "in windows of so many if longer" if self.chunked else "",
            "order matters" if self.ordered else "order does not matter",
            padding[self.masked],
            "pooled vector" if self.pooled else "no pooled vector",
            f"guidance {' or '.join(self.guidance)}",
        ]
        numbers = [
            self.process,
            f"latents as a {self.latents}" if self.latents == "grid" else f"latents {self.latents}",
            f"time as {self.time}",
            f"VAE by {self.scaling}",
            f"predicts {scheduler if self.prediction == 'scheduler' else 'a ' + self.prediction}",
        ]
        return ", ".join(filter(None, text)), ", ".join(numbers).replace("a angle", "an angle")


@dataclass(frozen=True)
class Opening:
    """How a backend is opened; see `ipgo.load_backend`."""

    image_size: int | None = None
    padding: str = "max_length"
    scheduler: str | None = None
    long_prompts: str = "refuse"
    text_device: str = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        for option, value, allowed in (
            ("scheduler", "ddim" if self.scheduler is None else self.scheduler, SCHEDULERS),
            ("padding", self.padding, PADDINGS),
            ("long_prompts", self.long_prompts, LONG_PROMPTS),
            ("text_device", self.text_device, TEXT_DEVICES),
        ):
            if value not in allowed:
                raise unknown(option, value, allowed)
        if self.image_size is not None and not 1 <= self.image_size <= LARGEST:
            raise InputError(f"image_size is {self.image_size}; it must be between 1 and {LARGEST}")

    def check(self, facts: Facts, name: str) -> None:
        """Raise `InputError` for an option that no model of the family `name` has."""
        if self.padding == "none" and facts.masked != "optional":
            raise InputError(f"padding is 'none'; with {name} only 'max_length' is possible")
        if self.long_prompts == "chunk" and not facts.chunked:
            raise InputError(
                f"long_prompts is 'chunk'; with {name} only 'refuse' and 'truncate' are possible"
            )
        if self.scheduler is not None and facts.process == "flow":
            raise InputError(f"scheduler is {self.scheduler!r}; {name} is a flow model and keeps its own")


def width_of(folder: Path, facts: Facts) -> int | None:
    """The width of the prompt embeddings of the model in a diffusers folder; None if it does not say."""
    for part in ("unet", "transformer"):
        with contextlib.suppress(InputError):  # whoever opens it says what is wrong
            width = files.read_json(folder / part / "config.json").get(facts.width)
            return width if isinstance(width, int) else None
    return None
