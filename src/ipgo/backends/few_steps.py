"""Models that draw in a few steps, known by their names."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


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
    (("lcm", "dreamshaper"), FewSteps(4, 8.5)),
    (("lcm",), FewSteps(4)),
    (("schnell",), FewSteps(4)),
    (("sprint",), FewSteps(2, 4.5)),
    (("klein", "base"), None),
    (("klein",), FewSteps(4)),
)


def by_name(place: str) -> FewSteps | None:
    """What a hub id, a folder or a file is called; "8step" in it is the number of steps. None: it is no such model."""
    name = place.rstrip("/").split("/")[-1].lower()
    words = set(re.findall(r"[a-z]+|\d+", name))
    found = next((few for needed, few in NAMES if words >= set(needed)), None)
    stated = re.search(r"([1-9]\d*)[-_ ]?step", name)
    return replace(found, steps=int(stated[1])) if found is not None and stated else found
