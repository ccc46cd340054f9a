"""`ipgo plan`: the GPU memory that a fit needs, estimated without a GPU and without the weights."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ipgo.errors import InputError, unknown
from ipgo.terminal import check_image, command_parser, fill_steps

if TYPE_CHECKING:
    from ipgo.plan import Choice, Footprint, Workload

    Measure = Callable[[Choice], Footprint]

DTYPES = ("float16", "bfloat16", "float32")
GIB = 2**30


def plan(argv: list[str]) -> int:
    """`ipgo plan`: a table of the choices, and the one to use on each GPU; 1 if nothing fits one of them."""
    args = _settled(_parser().parse_args(argv))
    for name in ("backprop_steps", "steps", "rows"):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            raise InputError(f"{name} is {values}; it must be at least 1")
    if max(args.backprop_steps) > args.steps:
        raise InputError(f"backprop_steps is {max(args.backprop_steps)}; steps allows at most {args.steps}")
    if args.dtype not in DTYPES:
        raise unknown("dtype", args.dtype, DTYPES)
    check_image(args.guidance_scale, args.image_size)

    import torch

    from ipgo.plan import RESERVE, memory_of, unloaded
    from ipgo.sampling import Sampling

    room = {gpu: memory_of(gpu) - RESERVE for gpu in args.gpu}
    for gpu in (gpu for gpu, most in room.items() if most <= 0):
        raise InputError(
            f"gpu is {gpu!r}; {RESERVE / GIB:.2f} GiB of each GPU are reserved for what is not counted, so give more"
        )
    sampling = Sampling(steps=args.steps, fit_steps=None, guidance_scale=args.guidance_scale)
    workload = unloaded(args.backend, args.reward, sampling, getattr(torch, args.dtype), args.image_size)
    measured = lru_cache(maxsize=None)(lambda choice: _measured(workload, choice))

    def footprint(choice: Choice) -> Footprint:
        found = measured(replace(choice, text_on_cpu=False))
        return workload.without_text(found) if choice.text_on_cpu else found

    for line in (*_headline(args, workload), *_table(args, room, footprint)):
        print(line, flush=True)
    print(
        f"\n{RESERVE / GIB:.2f} GiB of each GPU are reserved for what is not counted (CUDA context, workspaces, "
        "fragmentation)."
    )
    lacking = 0
    for gpu, most in room.items():
        lacking += not _advise(args, gpu, most, footprint)
    return 1 if lacking else 0


def _settled(args: Any) -> Any:
    """With values for the flags that were left out: those of a fit, which differ for a model of few steps."""
    from ipgo.config import DEFAULT_REWARD
    from ipgo.defaults import reward_for

    usual = reward_for(args.backend)
    # Of the bundled model's sum only this term can be planned; the other has no network.
    args.reward = args.reward or ("emoji-preference" if usual == DEFAULT_REWARD else usual)
    few = fill_steps(args, 8)
    if args.backprop_steps is None:
        args.backprop_steps = sorted({min(depth, max(args.steps, 1)) for depth in (1, 2, few or 1)})
    return args


def _advise(args: Any, gpu: str, most: int, footprint: Measure) -> bool:
    """Print what to use on a GPU with room for `most` bytes; does anything fit?"""
    from ipgo.plan import Choice, deepest, fastest

    def fits(choice: Choice) -> bool:
        return footprint(choice).peak <= most

    room = f"{most / GIB:.2f} GiB"
    first, second = (find(fits, args.backprop_steps, args.rows) for find in (fastest, deepest))
    if first is None:
        smallest = footprint(Choice(min(args.backprop_steps), recompute=True, text_on_cpu=True)).peak
        print(
            f"\n{gpu}: nothing fits; the smallest needs {smallest / GIB:.2f} GiB, more than {room}; try a smaller "
            "--image-size"
        )
        return False
    said = {first: f"\n{gpu}, fastest"}
    if second is not None:
        said.setdefault(second, f"{gpu}, gradient through most steps")
    for choice, name in said.items():
        print(f"{name}: {_words(choice)}, {footprint(choice).peak / GIB:.2f} of {room}")
        print(f"  {shlex.join(fit_command(args, choice))}")
    return True


def _parser() -> Any:
    parser = command_parser(
        "plan", "Estimate the GPU memory of one IPGO step, without a GPU and without the weights."
    )
    parser.add_argument(
        "--backend",
        default="emoji",
        help="a backend's name, a diffusers folder (its weights may be missing), or a hub id (of which the "
        "configuration is fetched)",
    )
    parser.add_argument("--reward", help="as in fit (default: emoji-preference if bundled, else hpsv2.1)")
    parser.add_argument(
        "--gpu", nargs="+", required=True, metavar="SIZE", help="memory of one or more GPUs, such as 16GB"
    )
    parser.add_argument(
        "--backprop-steps",
        type=int,
        nargs="+",
        help="values of K (default: 1 2; also all steps of a few-step model)",
    )
    parser.add_argument(
        "--rows", type=int, default=4, help="maximum number of prompts fitted at once (default: 4)"
    )
    drawn = "or those of a few-step model"
    parser.add_argument("--steps", type=int, help=f"denoising steps of a fit's images (default: 8, {drawn})")
    parser.add_argument("--guidance-scale", type=float, help="default: the model's own")
    parser.add_argument("--dtype", default="float16", help=f"{', '.join(DTYPES)} (default: float16)")
    parser.add_argument("--image-size", type=int, help="side of the images (default: the model's own)")
    return parser


def _measured(workload: Workload, choice: Choice) -> Footprint:
    if sys.stderr.isatty():
        print(f"\r{_words(choice)} ...\033[K\r", end="", file=sys.stderr)
    return workload.footprint(choice)


def _headline(args: Any, workload: Workload) -> Iterator[str]:
    side = workload.backend.image_size
    scale = workload.sampling.scale(workload.backend)
    yield (
        f"{args.backend} with {args.reward}: {args.dtype}, {side} x {side} pixels, guidance {scale:g}, "
        f"{args.steps} steps"
    )
    parts = workload.weights()
    sizes = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    yield f"weights: {sum(parts.values()) / GIB:.2f} GiB ({sizes})\n"


def _table(args: Any, room: dict[str, int], footprint: Measure) -> Iterator[str]:
    from ipgo.plan import Choice

    heads = ("K", "recompute", "prompts at once", "alive before the backward pass, GiB", "peak, GiB", *room)
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for depth, recompute, rows in itertools.product(
        sorted(set(args.backprop_steps)), (False, True), sorted({1, args.rows})
    ):
        found, apart = (
            footprint(Choice(depth, recompute, rows, text_on_cpu=where)) for where in (False, True)
        )
        fits = (_fits(found.peak, apart.peak, most) for most in room.values())
        sizes = f"{found.saved / GIB:.2f}", f"{found.peak / GIB:.2f}"
        cells = (depth, "yes" if recompute else "no", rows, *sizes, *fits)
        yield f"| {' | '.join(map(str, cells))} |"


def _fits(peak: int, without_text: int, most: int) -> str:
    if peak <= most:
        return "fits"
    return "text on the CPU" if without_text <= most else "-"


def _words(choice: Choice) -> str:
    rows = f"{choice.rows} prompts" if choice.rows > 1 else "1 prompt"
    recompute = "recomputing" if choice.recompute else "without recomputing"
    text = ", text encoders on the CPU" if choice.text_on_cpu else ""
    return f"K = {choice.backprop_steps} {recompute}, {rows} at once{text}"


def fit_command(args: Any, choice: Choice) -> list[str]:
    """The words of the fit that was planned."""
    from ipgo.backends import few_steps
    from ipgo.sampling import Sampling

    few = few_steps(args.backend)
    options: dict[str, Any] = {"backend": args.backend, "reward": args.reward, "dtype": args.dtype}
    options["chunk"] = choice.rows
    options["method.ascent.backprop_steps"] = choice.backprop_steps
    options["method.ascent.recompute"] = str(choice.recompute).lower()
    if choice.text_on_cpu:
        options["text_device"] = "cpu"
    if args.image_size is not None:
        options["image_size"] = args.image_size
    if args.steps > (Sampling() if few is None else few).steps:  # what a fit draws in by itself
        options["sampling.steps"] = args.steps
    options["sampling.fit_steps"] = args.steps
    if args.guidance_scale is not None:
        options["sampling.guidance_scale"] = args.guidance_scale
    return ["ipgo", "fit", "PROMPT", *(f"--{name}={value}" for name, value in options.items())]
