"""`ipgo generate`: draw prompts with a stored adapter."""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from ipgo import files
from ipgo.terminal import (
    add_adapter_flags,
    add_device_flags,
    backend_of,
    command_parser,
    given,
    loading,
    open_stored,
    path_of,
)


def generate(argv: list[str]) -> int:
    """`ipgo generate`: draw prompts with a stored adapter."""
    args = _parser().parse_args(argv)

    from ipgo.backends import load_backend
    from ipgo.evaluation import draw
    from ipgo.images import as_png, to_pil
    from ipgo.prompts import number
    from ipgo.sampling import Sampling
    from ipgo.seeding import check_seeds
    from ipgo.vocabulary import warn_of_unseen_words

    check_seeds(tuple(args.seeds or ()))
    if args.out is not None:
        files.check_out(args.out, folder=True)
    stored = open_stored(args.adapter)
    # Two adapters draw the same prompt from the same seed: their images have the same names.
    place = Path(args.adapter).resolve()
    name = place.name or "adapter"
    if stored.run is not None and stored.run.path.resolve() != place:
        name = f"{stored.run.path.resolve().name}-{name}"
    out = given(args.out, Path("images") / name)
    files.check_out(out, folder=True)
    seeds = stored.seeds(args.seeds)
    texts, settings = stored.prompts(args.text, args.prompts), stored.settings
    own = {"steps": args.steps, "guidance_scale": args.guidance_scale}
    sampling = replace(
        Sampling(**settings.pop("sampling", {})),
        **{key: value for key, value in own.items() if value is not None},
    )
    if args.guidance_scale is not None and args.guidance_scale <= 1 and sampling.negative_prompt:
        logging.getLogger("ipgo").warning(
            "without guidance the run's negative prompt has no effect; it is left out"
        )
        sampling = replace(sampling, negative_prompt="")
    source = backend_of(settings, args.backend)
    warn_of_unseen_words(source, texts)
    loading(source)
    backend = load_backend(source, device=args.device, text_device=args.text_device, **settings)
    backend.check_prompts(texts)
    stored.check_backend(backend)
    out.mkdir(parents=True, exist_ok=True)
    replaced = 0
    with tqdm(total=len(texts) * len(seeds), desc="images", disable=None, leave=False) as bar:
        for prompt in number(texts):
            adapters = {"adapter": stored.adapter(prompt.text).to(backend.device)}
            for drawing in draw(backend, adapters, prompt.text, seeds, sampling):
                file = out / f"{prompt.id}-{drawing.seed}.png"
                image = as_png(to_pil(drawing.image[None])[0])
                replaced += file.is_file() and file.read_bytes() != image
                files.write(file, image)
                bar.write(str(file), file=sys.stdout)
                bar.update()
    if replaced:
        logging.getLogger("ipgo").warning(
            "%d of these replaced another image of that name, drawn otherwise; --out FOLDER keeps them apart",
            replaced,
        )
    return 0


def _parser() -> ArgumentParser:
    parser = command_parser("generate", "Draw prompts with what was learned.")
    add_adapter_flags(parser)
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="noise seeds (default: 0, or the seed of what is tied to its noise)",
    )
    parser.add_argument(
        "--out",
        type=path_of,
        help="folder for the images (default: images/NAME, of the run and the adapter's folder)",
    )
    parser.add_argument("--steps", type=int, help="denoising steps (default: those of the run)")
    parser.add_argument(
        "--guidance-scale", type=float, help="as sampling.guidance_scale in fit (default: that of the run)"
    )
    add_device_flags(parser)
    return parser
