"""The text-to-image pipelines that ipgo can steer. A new one is a file here and a line in `BACKENDS`."""

from __future__ import annotations

import pkgutil
from pathlib import Path

from ipgo.backends.base import Backend
from ipgo.errors import InputError, unknown

__all__ = ["BACKENDS", "Backend", "load_backend"]

STABLE_DIFFUSION = "ipgo.backends.stable_diffusion:StableDiffusion"

# name -> "module:class" and what it opens; imported when asked for, because diffusers takes seconds.
BACKENDS: dict[str, tuple[str, str]] = {
    "emoji": (STABLE_DIFFUSION, str(Path(__file__).parent / "emoji")),
    "sd15": (STABLE_DIFFUSION, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
}


def load_backend(
    source: str | Path | object,
    *,
    device: str = "auto",
    dtype: str = "auto",
    image_size: int | None = None,
    padding: str = "max_length",
    scheduler: str | None = None,
    long_prompts: str = "refuse",
) -> Backend:
    """Open a frozen text-to-image backend.

    Args:
        source: a name in `BACKENDS`, a local diffusers folder, a hub id `owner/name`, or a pipeline object
            (which is used as it is: its parameters are frozen).
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16, float16 or float64.
        image_size: side of the square images in pixels; None is the model's own.
        padding: max_length, or none (the denoiser sees text only, as in the IPGO notebook).
        scheduler: ddim, pndm, lms, euler or dpm++; None is the model's own.
        long_prompts: refuse, or truncate to the encoder's length.

    Raises:
        InputError: an unknown name or option, or a folder that is incomplete, damaged or holds a pickle.
    """
    kind = STABLE_DIFFUSION
    place = source
    if isinstance(source, str):
        if source in BACKENDS:
            kind, place = BACKENDS[source]
        elif "/" not in source and not Path(source).exists():
            raise unknown("backend", source, BACKENDS)
        elif (source[0] in "/.~" or source.count("/") > 1) and not Path(source).exists():
            raise InputError(f"backend folder {source!r} does not exist")
    backend: Backend = pkgutil.resolve_name(kind).load(
        place,
        device=device,
        dtype=dtype,
        image_size=image_size,
        padding=padding,
        scheduler=scheduler,
        long_prompts=long_prompts,
    )
    if isinstance(source, str):
        backend.name = source
    return backend
