"""Backends without weights, by the names and folders that `load_backend` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ipgo.backends import BACKENDS, FAMILIES, Backend, few_steps, load_backend, place_of, with_own_scale
from ipgo.backends.blueprint import Blueprint, read_blueprint
from ipgo.backends.facts import Opening
from ipgo.backends.folder import configuration, is_local
from ipgo.backends.published import PUBLISHED
from ipgo.errors import InputError, unknown
from ipgo.memory import sizes_only


def blueprint_of(source: str) -> Blueprint:
    """What a name of `BACKENDS`, a hub id, or a local folder is built of.

    Of a hub id that stands behind a name nothing is fetched, of others the JSON files alone.

    Raises:
        InputError: it is none of these, a file of the folder is missing or damaged, its family is not known, or the
            hub is out of reach.
    """
    names = {place: name for name, (_, place) in BACKENDS.items()}
    name = names.get(source, source)
    if name in PUBLISHED:
        return PUBLISHED[name]
    folder = Path(place_of(source))
    if "/" not in source and source not in BACKENDS and not folder.exists():
        raise unknown("backend", source, BACKENDS)
    if not is_local(source):
        folder = configuration(source)
    elif not folder.is_dir():
        raise InputError(
            f"backend {source!r} is not a local folder of diffusers, and its sizes are unknown; known are those of "
            f"diffusers folders, of hub ids, and of emoji, {', '.join(PUBLISHED)}"
        )
    found = read_blueprint(folder)
    if found.kind not in FAMILIES:
        raise InputError(f"backend {source!r} holds a {found.kind}; ipgo opens {', '.join(FAMILIES)}")
    return found


def unloaded_backend(source: str, sizes: FakeTensorMode, dtype: torch.dtype, **opening: Any) -> Backend:
    """As `load_backend`, without weights: its models have sizes and no numbers (`ipgo.memory.sizes_only`).

    Args:
        sizes: what it shares with the reward that it is to work with.
        opening: image_size, padding, scheduler.

    Raises:
        InputError: as `load_backend` and `blueprint_of`.
    """
    opened = open_blueprint(blueprint_of(source), sizes, dtype, **opening)
    return with_own_scale(opened, source, few_steps(source))


def open_blueprint(
    blueprint: Blueprint,
    sizes: FakeTensorMode | None,
    dtype: torch.dtype,
    device: str = "cpu",
    **opening: Any,
) -> Backend:
    """A backend of that blueprint; with None for `sizes` it has random numbers, on `device`."""
    Opening(**opening).check(FAMILIES[blueprint.kind].facts, blueprint.kind)
    pipe = blueprint.pipeline(sizes, dtype, device)
    opened = load_backend(pipe, **opening)
    with sizes_only(sizes, torch.float32):  # for the copy of a VAE that overflows in float16
        _ = opened.modules
    return opened
