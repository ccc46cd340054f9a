"""Models that draw in a few steps, known by their names, or by what they are made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ipgo import files
from ipgo.backends.schedulers import is_one_of
from ipgo.errors import InputError


@dataclass(frozen=True)
class FewSteps:
    """How such a model is meant to be sampled.

    Attributes:
        steps: denoising steps.
        guidance_scale: 1, which is no guidance; or what the network was given where the scale is its input.
    """

    steps: int
    guidance_scale: float = 1.0


# Words of a name -> how; the first line whose words are all there counts. Steps are those of the models' cards,
# scales the defaults of their pipelines.
NAMES: tuple[tuple[tuple[str, ...], FewSteps | None], ...] = (
    (("klein", "base"), None),
    (("klein",), FewSteps(4)),
    (("schnell",), FewSteps(4)),
    (("flux", "turbo"), FewSteps(8, 3.5)),  # what is no schnell is tuned from dev
    (("flux", "lightning"), FewSteps(4, 3.5)),
    (("z", "image", "turbo"), FewSteps(8)),
    (("zimage", "turbo"), FewSteps(8)),
    (("sd", "3", "turbo"), FewSteps(4)),
    (("sd", "35", "turbo"), FewSteps(4)),
    (("sd", "turbo"), FewSteps(1)),
    (("sdxl", "turbo"), FewSteps(1)),
    (("turbo",), FewSteps(4)),  # SD 3.5's card, and enough for those that are tuned to draw in one
    (("lightning",), FewSteps(4)),
    (("lcm",), FewSteps(4)),
    (("sprint",), FewSteps(2, 4.5)),
)

# Of which the name alone would say another scale: the network takes it as an input.
IDS = {"SimianLuo/LCM_Dreamshaper_v7": FewSteps(4, 8.5)}

# What a name may leave out where the class is known.
WORDS = {"FluxPipeline": "flux", "ZImagePipeline": "zimage"}


def by_name(place: str, kind: str = "") -> FewSteps | None:
    """What a hub id, a folder or a file is called; "8step" in it is the number of steps. None: it is no such model.

    Args:
        kind: the class of its pipeline, where that is known.
    """
    place, _ = files.hub_id(place)
    if place in IDS:
        return IDS[place]
    name = place.rstrip("/").split("/")[-1]
    # "zimageTurbo" is two words, "SDXLTurbo" too.
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)} | {
        WORDS.get(kind)
    }
    found = next((few for needed, few in NAMES if words >= set(needed)), None)
    stated = re.search(r"([1-9]\d*)[-_ ]?step", name.lower())
    return replace(found, steps=int(stated[1])) if found is not None and stated else found


def by_parts(place: str, kind: str, scheduler: str, options: Mapping[str, Any]) -> FewSteps | None:
    """What a pipeline of the class `kind` with such a scheduler is; None: no such model.

    If its name says so too, the steps are the name's. The scale is always that of the network.

    Args:
        place: as in `by_name`; "" says nothing.
        options: `is_distilled` of the pipeline, `guidance_embeds` of its transformer, and `time_cond_proj_dim` of its
            UNet, which is there if the guidance scale is an input; as far as they have them.
    """
    named = by_name(place, kind)
    steps = _own_steps(kind, scheduler, options) if named is None else named.steps
    return None if steps is None else FewSteps(steps, _own_scale(kind, options))


def _own_steps(kind: str, scheduler: str, options: Mapping[str, Any]) -> int | None:
    if kind == "SanaSprintPipeline":
        return 2
    schnell = kind == "FluxPipeline" and options.get("guidance_embeds") is False
    klein = kind == "Flux2KleinPipeline" and options.get("is_distilled") is True
    consistent = kind == "LatentConsistencyModelPipeline" or scheduler == "LCMScheduler"
    return 4 if schnell or klein or consistent else None


def _own_scale(kind: str, options: Mapping[str, Any]) -> float:
    """The scale that the network is given where it is an input; 1, none, for others."""
    if kind == "LatentConsistencyModelPipeline":
        return 8.5
    if kind == "SanaSprintPipeline":
        return 4.5
    if kind == "FluxPipeline" and options.get("guidance_embeds"):
        return 3.5
    return 8.0 if options.get("time_cond_proj_dim") is not None else 1.0


def by_place(place: str) -> FewSteps | None:
    """`by_parts` of a diffusers folder; `by_name` of what is none, or cannot be read: opening it says why.

    A file of weights goes by the folder beside it, if there is one.
    """
    folder = Path(place.removesuffix(".safetensors"))
    index = _read(folder / "model_index.json")
    if "_class_name" not in index:
        return by_name(place)
    options = index | _read(folder / "transformer/config.json") | _read(folder / "unet/config.json")
    return by_parts(place, str(index["_class_name"]), scheduler_in(folder), options)


def scheduler_in(folder: Path) -> str:
    """The class of the scheduler of a diffusers folder; "" for what is none, or cannot be read."""
    stated = _read(folder / "model_index.json").get("scheduler")
    return str(stated[-1]) if isinstance(stated, list) and stated else ""


def _read(file: Path) -> dict[str, Any]:
    try:
        return files.read_json(file)
    except InputError:
        return {}


def by_pipeline(place: str, kind: str, pipe: Any, denoiser: Any) -> FewSteps | None:
    """`by_parts` of a pipeline object, of a class `kind` or made from it, and the network that denoises in it."""
    options = {**pipe.config, **denoiser.config}
    own = type(pipe.scheduler).__name__
    scheduler = "LCMScheduler" if is_one_of(pipe.scheduler, ["LCMScheduler"]) else own
    return by_parts(place, kind, scheduler, options)


def spaced_as_turbo(pipe: Any) -> bool:
    """Does it come with the noise levels of SD-Turbo and SDXL-Turbo, which nothing else in a pipeline tells apart?

    They may be another model's choice, such as that of an SDXL-Lightning, so that nothing but a hint follows from it.
    """
    kinds = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    return is_one_of(pipe.scheduler, kinds) and pipe.scheduler.config.get("timestep_spacing") == "trailing"
