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
    (("z", "image", "turbo"), FewSteps(8)),
    (("3", "5", "turbo"), FewSteps(4)),
    (("turbo",), FewSteps(1)),
    (("lightning",), FewSteps(4)),
    (("lcm",), FewSteps(4)),
    (("schnell",), FewSteps(4)),
    (("sprint",), FewSteps(2, 4.5)),
    (("klein", "base"), None),
    (("klein",), FewSteps(4)),
)

# Of which the name alone would say another scale: the network takes it as an input.
IDS = {"SimianLuo/LCM_Dreamshaper_v7": FewSteps(4, 8.5)}


def by_name(place: str) -> FewSteps | None:
    """What a hub id, a folder or a file is called; "8step" in it is the number of steps. None: it is no such model."""
    place, _ = files.hub_id(place)
    if place in IDS:
        return IDS[place]
    name = place.rstrip("/").split("/")[-1].lower()
    words = set(re.findall(r"[a-z]+|\d+", name))
    found = next((few for needed, few in NAMES if words >= set(needed)), None)
    stated = re.search(r"([1-9]\d*)[-_ ]?step", name)
    return replace(found, steps=int(stated[1])) if found is not None and stated else found


def either(named: FewSteps | None, made: FewSteps | None) -> FewSteps | None:
    """`by_name` and what a model is made of; of both the steps are the name's, and the scale is that of the network."""
    if named is None or made is None:
        return named or made
    return replace(made, steps=named.steps)


def by_parts(kind: str, scheduler: str, options: Mapping[str, Any]) -> FewSteps | None:
    """What a pipeline of the class `kind` with such a scheduler is, whatever it is called; None: no such model.

    Args:
        options: `is_distilled` of the pipeline, `guidance_embeds` of its transformer, and `time_cond_proj_dim` of its
            UNet, which is there if the guidance scale is an input; as far as they have them.
    """
    if kind == "LatentConsistencyModelPipeline":
        return FewSteps(4, 8.5)
    if kind == "SanaSprintPipeline":
        return FewSteps(2, 4.5)
    schnell = kind == "FluxPipeline" and options.get("guidance_embeds") is False
    klein = kind == "Flux2KleinPipeline" and options.get("is_distilled") is True
    if scheduler == "LCMScheduler" and options.get("time_cond_proj_dim") is not None:
        return FewSteps(4, 8.0)
    return FewSteps(4) if schnell or klein or scheduler == "LCMScheduler" else None


def by_folder(folder: Path) -> FewSteps | None:
    """`by_parts` of a diffusers folder; None for what is none, or cannot be read: opening it says why."""
    index = _read(folder / "model_index.json")
    options = index | _read(folder / "transformer/config.json") | _read(folder / "unet/config.json")
    return by_parts(str(index.get("_class_name")), scheduler_in(folder), options)


def scheduler_in(folder: Path) -> str:
    """The class of the scheduler of a diffusers folder; "" for what is none, or cannot be read."""
    stated = _read(folder / "model_index.json").get("scheduler")
    return str(stated[-1]) if isinstance(stated, list) and stated else ""


def _read(file: Path) -> dict[str, Any]:
    try:
        return files.read_json(file)
    except InputError:
        return {}


def by_pipeline(pipe: Any, denoiser: Any) -> FewSteps | None:
    """`by_parts` of a pipeline object and the network that denoises in it."""
    options = {**pipe.config, **denoiser.config}
    own = type(pipe.scheduler).__name__
    scheduler = "LCMScheduler" if is_one_of(pipe.scheduler, ["LCMScheduler"]) else own
    return by_parts(type(pipe).__name__, scheduler, options)


def spaced_as_turbo(pipe: Any) -> bool:
    """Does it come with the noise levels of SD-Turbo and SDXL-Turbo, which nothing else in a pipeline tells apart?

    They may be another model's choice, such as that of an SDXL-Lightning, so that nothing but a hint follows from it.
    """
    kinds = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    return is_one_of(pipe.scheduler, kinds) and pipe.scheduler.config.get("timestep_spacing") == "trailing"
