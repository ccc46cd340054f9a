"""What a run is: everything that decides its results, read from YAML, flags or Python."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ipgo.errors import InputError, unknown
from ipgo.methods import METHODS
from ipgo.methods.ipgo import IPGO
from ipgo.prompts import check_prompts
from ipgo.sampling import Sampling
from ipgo.task import Method

PRESETS = Path(__file__).parent / "presets"  # {name}.yaml
NOT_RESULTS = ("chunk", "device")  # settings of the machine, which may change when a run is continued


@dataclass(frozen=True)
class RunConfig:
    """The settings of a run.

    Attributes:
        prompts: the texts to fit.
        method: what learns, and its hyperparameters.
        backend: a backend's name, a diffusers folder, or a hub id.
        reward: what to raise: a name, a weighted sum such as "emoji-clip+0.5*emoji-aesthetic", or mine.py:function.
        held_out: rewards that only judge the result; None is all those that come with the backend.
        sampling: how images are sampled.
        seeds: noise seeds, cycled over the steps; none at all is fresh noise at every step.
        unseen_seeds: how many seeds that were not fitted the result is judged on (1000, 1001, ...).
        seed: where initial values and the order of prompts come from.
        shared: one set of embeddings for all prompts (prompt-batch) in place of one for each (prompt-wise).
        padding: max_length as stock pipelines do, or none: the denoiser sees the text alone.
        scheduler: ddim, pndm, lms, euler or dpm++; None is the model's own.
        image_size: side of the images in pixels; None is the model's own.
        long_prompts: refuse prompts that are too long for the encoder, or truncate them.
        dtype: auto, float32, bfloat16 or float16.
        chunk: how many prompts are fitted at once: a matter of memory, not of results.
        device: auto, cpu, cuda or cuda:N.
    """

    prompts: tuple[str, ...]
    method: Method = IPGO()
    backend: str = "emoji"
    reward: str = "emoji-preference"
    held_out: tuple[str, ...] | None = None
    sampling: Sampling = Sampling()
    seeds: tuple[int, ...] = (0,)
    unseen_seeds: int = 4
    seed: int = 0
    shared: bool = False
    padding: str = "max_length"
    scheduler: str | None = None
    image_size: int | None = None
    long_prompts: str = "refuse"
    dtype: str = "auto"
    chunk: int = 4
    device: str = "auto"

    def __post_init__(self) -> None:
        check_prompts(self.prompts)
        for name, least in (("chunk", 1), ("unseen_seeds", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        check_seeds(self.seeds)
        clash = sorted(set(self.seeds) & set(self.new_seeds))
        if clash:
            raise InputError(f"seeds {clash} are kept for judging the result; choose seeds below {FIRST_UNSEEN}")
        if not self.seeds and not self.unseen_seeds:
            raise InputError("unseen_seeds is 0 and seeds is empty; the result needs at least one seed to be judged on")
        ascent = getattr(self.method, "ascent", None)
        if ascent is not None and ascent.backprop_steps > self.sampling.steps:
            raise InputError(
                f"method.ascent.backprop_steps is {ascent.backprop_steps}; "
                f"sampling.steps allows at most {self.sampling.steps}"
            )

    @property
    def new_seeds(self) -> tuple[int, ...]:
        """The seeds that are never fitted."""
        return tuple(range(FIRST_UNSEEN, FIRST_UNSEEN + self.unseen_seeds))

    @property
    def method_name(self) -> str:
        """The method's name in `METHODS`."""
        return next(name for name, kind in METHODS.items() if kind is type(self.method))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; the method carries its name."""
        # Through JSON, so that tuples become the lists that a reader gets.
        plain: dict[str, Any] = json.loads(json.dumps({each.name: _plain(getattr(self, each.name)) for each in fields(self)}))
        plain["method"] = {"name": self.method_name, **plain["method"]}
        return plain

    def identity(self) -> dict[str, Any]:
        """The settings that decide results, flat: {"method.ascent.lr": 0.001, ...}."""
        return {key: value for key, value in flatten(self.to_json()).items() if key not in NOT_RESULTS}

    def digest(self) -> str:
        """Sixteen hexadecimal digits of `identity`."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


FIRST_UNSEEN = 1000


def check_seeds(seeds: tuple[int, ...]) -> None:
    """Raise `InputError` for a negative or repeated seed."""
    if any(seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds is {list(seeds)}; they must be different and at least 0")


def presets() -> list[str]:
    """The names of the bundled settings."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_settings(preset: str | None, file: str | None) -> dict[str, Any]:
    """Nested settings of a bundled preset, overridden by those of a YAML file.

    Raises:
        InputError: an unknown preset, or a file that is missing or is no YAML mapping.
    """
    settings: dict[str, Any] = {}
    if preset is not None:
        if preset not in presets():
            raise unknown("preset", preset, presets())
        settings = _read_yaml(PRESETS / f"{preset}.yaml")
    return merge(settings, _read_yaml(Path(file))) if file is not None else settings


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested `base` with the values of nested `over` put in."""
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"config file {str(path)!r} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"config file {str(path)!r} cannot be read: {reason}") from None
    if not isinstance(settings or {}, dict):
        raise InputError(f"config file {str(path)!r} holds no 'key: value' settings")
    settings = settings or {}
    if isinstance(settings.get("method"), str):
        settings["method"] = {"name": settings["method"]}
    return settings
