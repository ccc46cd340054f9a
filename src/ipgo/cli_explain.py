"""`ipgo explain`: the words nearest to learned embeddings, and what each one contributes."""

from __future__ import annotations

import dataclasses
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ipgo.errors import InputError
from ipgo.printed import aligned
from ipgo.terminal import (
    EVERY,
    add_adapter_flags,
    add_device_flags,
    backend_of,
    check_replaced,
    command_parser,
    loading,
    open_stored,
    path_of,
)

if TYPE_CHECKING:
    from ipgo.explain import Explanation


def explain(argv: list[str]) -> int:
    """`ipgo explain`: a table per prompt, and all numbers as JSON."""
    args = _parser().parse_args(argv)

    from ipgo import files
    from ipgo.backends import load_backend
    from ipgo.explain import Vocabulary, check_adapter
    from ipgo.explain import explain as explained
    from ipgo.rewards import check_reward, identity_of, load_reward
    from ipgo.sampling import Sampling
    from ipgo.seeding import check_seeds

    if args.top < 1:
        raise InputError(f"top is {args.top}; it must be at least 1")
    if args.out is not None:
        files.check_out(args.out, folder=False)
        if args.out.suffix != ".json":
            raise InputError(f"out is {str(args.out)!r}; it must end in .json")
        check_replaced(args.out, "adapter")
    stored = open_stored(args.adapter)
    settings = stored.settings
    check_adapter(stored.first)
    config = None if stored.run is None else stored.run.config
    spec = args.reward or (config.reward if config is not None else None)
    if spec is None:
        raise InputError(f"{args.adapter!r} is not in a run's folder; name a reward with --reward")
    texts = stored.prompts(args.text, args.prompts)
    check_reward(spec, texts)
    seeds = tuple(args.seeds or (config.seeds if config is not None else ()) or (0,))
    check_seeds(seeds)
    sampling = Sampling(**settings.pop("sampling", {}))
    source = backend_of(settings, args.backend)
    loading(source)
    place = {"device": args.device, "text_device": args.text_device}
    backend = load_backend(source, **place, **settings)
    stored.check_backend(backend)
    reward = load_reward(spec, device=args.device)
    words = Vocabulary.of(backend)
    bar = tqdm(texts, "prompts", disable=None, leave=False)
    about = {"schema": 1, "adapter": args.adapter, "rewards": {spec: identity_of(reward)}}
    found: list[dict[str, Any]] = []

    def keep() -> None:
        files.write_json(args.out, {**about, "prompts": found})

    kept = time.monotonic()
    try:
        for text in bar:
            adapter = stored.adapter(text).to(backend.device)
            told = explained(backend, adapter, text, seeds, sampling, reward, words, args.top)
            found.append(dataclasses.asdict(told))
            bar.write(show(told), file=sys.stdout)
            if args.out is not None and time.monotonic() - kept > EVERY:
                keep()
                kept = time.monotonic()
    finally:  # also if a prompt fails
        if args.out is not None and found:
            keep()
            print(f"numbers: {args.out}")
    return 0


def _parser() -> ArgumentParser:
    parser = command_parser(
        "explain", "Show the words nearest to learned embeddings, and what each one contributes."
    )
    add_adapter_flags(parser)
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="noise seeds (default: the run's fitted ones, or 0)"
    )
    parser.add_argument("--reward", help="reward that measures each one's effect (default: the run's)")
    parser.add_argument("--top", type=int, default=3, help="number of nearest words (default: 3)")
    parser.add_argument("--out", type=path_of, help="a JSON file for all numbers, including each step's")
    add_device_flags(parser)
    return parser


def show(found: Explanation) -> str:
    """A line for each embedding; attention as the mean over steps, and in the first and last one."""
    from ipgo.explain import NEGATIVE

    around = [each.attention for each in found.inserted if not each.side.startswith(NEGATIVE)]
    inserted = [sum(step) for step in zip(*around, strict=True)]
    rows = [
        ("", "nearest words (cosine)", "norm", "to prompt", "attention", "first to last", "reward without")
    ]
    for each in found.inserted:
        words = ", ".join(f"{word} {cosine:.2f}" for word, cosine in each.words)
        steps = f"{each.attention[0]:.1%} to {each.attention[-1]:.1%}" if each.attention else "–"
        name = f"{each.side} {each.position + 1}"
        numbers = (f"{each.norm:.2f}", f"{each.to_prompt:+.2f}", _mean(each.attention), steps)
        rows.append((name, words, *numbers, f"{each.without:+.4f}"))
    shares = (("inserted", inserted), ("prompt", found.text_attention), ("padding", found.padding_attention))
    looks = ", ".join(f"{name} {_mean(steps)}" for name, steps in shares)
    return "\n".join(
        [
            f"\n{found.prompt}",
            f"{found.reward} {found.value:.4f}, raw {found.raw:.4f}; median norm of the prompt's states "
            f"{found.prompt_norm:.2f}; drift of their mean {found.drift:.1%}",
            f"attention: {looks}",
            *aligned(rows),
        ]
    )


def _mean(steps: Sequence[float]) -> str:
    return f"{sum(steps) / len(steps):.1%}" if steps else "–"
