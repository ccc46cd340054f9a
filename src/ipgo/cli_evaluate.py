"""`ipgo evaluate`: more seeds, other rewards, other prompts."""

from __future__ import annotations

import contextlib
import logging
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ipgo import files
from ipgo.errors import InputError
from ipgo.printed import NOTE, levels, span, table
from ipgo.terminal import EVERY, add_device_flags, backend_of, command_parser, loading, open_stored, path_of

if TYPE_CHECKING:
    from ipgo.evaluation import Score
    from ipgo.store import Run

EVALUATION_SEEDS = tuple(range(2000, 2008))  # not those that `fit` judges on


def evaluate(argv: list[str]) -> int:
    """`ipgo evaluate`: more seeds, other rewards, other prompts."""
    args = _parser().parse_args(argv)

    from ipgo.adapters import Adapter
    from ipgo.evaluation import bar_of_images, counted, draw, score_drawings
    from ipgo.models import load_models
    from ipgo.rewards import optimised
    from ipgo.seeding import check_seeds
    from ipgo.store import Run
    from ipgo.vocabulary import warn_of_unseen_words

    check_seeds(tuple(args.seeds))
    folder = Run.open(args.run)
    files.check_out(folder.path, folder=True)
    stored = open_stored(args.run)
    prompts = stored.prompts([], args.prompts)
    stored.seeds(args.seeds)  # for its warning
    source = backend_of(stored.settings, args.backend)
    first, *others = _judges(folder, args.rewards, prompts)
    config = replace(
        folder.config,
        backend=source,
        reward=first,
        held_out=tuple(others),
        device=args.device,
        text_device=args.text_device,
    )
    if args.prompts:
        warn_of_unseen_words(config.backend, prompts)
    loading(config.backend)
    models = load_models(config, begun_in=folder.dtype)
    models.backend.check_prompts(prompts)
    stored.check_backend(models.backend)
    for name in folder.strange(models.identities):
        logging.getLogger("ipgo").warning(
            "%r is not the reward that scored the run under this name (its weights, text or version differ): the new "
            "scores cannot be compared with the old ones",
            name,
        )
    own = optimised(folder.config.reward, models.identities)
    scores: list[Score] = []
    waiting: list[Score] = []

    def keep() -> None:
        if not waiting:  # where the first prompt has failed, nothing is to be set aside or written
            return
        folder.judge_again(waiting, models.identities, models.backend.identity)
        waiting.clear()

    images = bar_of_images(2 * len(prompts) * len(args.seeds))
    with images as bar, contextlib.ExitStack() as ending:
        ending.callback(keep)  # also if a prompt fails
        kept = time.monotonic()
        for prompt in prompts:
            own_adapter = stored.adapter(prompt).to(models.backend.device)
            adapters = {"raw": Adapter(), config.method_name: own_adapter}
            drawings = counted(draw(models.backend, adapters, prompt, args.seeds, config.sampling), bar)
            found = score_drawings(drawings, models.rewards, own, models.judge)
            scores += found
            waiting += found
            if time.monotonic() - kept > EVERY:
                keep()
                kept = time.monotonic()
    _show_evaluation(folder, prompts, args.seeds, scores)
    return 0


def _parser() -> ArgumentParser:
    parser = command_parser(
        "evaluate", "Evaluate a finished run on more seeds, with other rewards, or on prompts it never saw."
    )
    parser.add_argument("run", type=path_of, help="a run's folder")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=EVALUATION_SEEDS, help="default: 2000 to 2007"
    )
    parser.add_argument(
        "--rewards",
        nargs="+",
        help="default: those that the run was scored with; the one that was optimised is always among them",
    )
    parser.add_argument("--prompts", help="other prompts from a file or a set, for a run with --shared")
    parser.add_argument("--backend", help="where the backend is, if it has moved or the run does not say")
    add_device_flags(parser)
    return parser


def _show_evaluation(
    folder: Run, prompts: Sequence[str], seeds: Sequence[int], scores: Sequence[Score]
) -> None:
    """Write the report, and print what came out and where it is."""
    from ipgo.evaluation import summarise
    from ipgo.report import write_report
    from ipgo.store import EVALUATION

    new = len(set(prompts) - set(folder.config.prompts))
    unseen = f", {f'{new} of them ' if new < len(prompts) else ''}never fitted" if new else ""
    count = f"{len(prompts)} prompt" + "s" * (len(prompts) > 1)
    known = sorted(set(seeds) & set(folder.config.seeds))
    fitted = f" (fitted to: {span(known)})" if known else ""
    gains = summarise(scores)
    # Prompts as they are have learned nothing that could be compared.
    found = f"{table(gains)}\n{NOTE}\n" if gains else levels(scores)
    print(f"{count}{unseen}, seeds {span(seeds)}{fitted}\n{found}")
    print(f"scores: {folder.path / EVALUATION}\nreport: {write_report(folder)[0]}")


def _judges(folder: Run, asked: Sequence[str] | None, prompts: Sequence[str]) -> tuple[str, ...]:
    """The optimised reward, if it can still be loaded, and the others, which must be.

    A run made in Python may have optimised a function that no name stands for.
    """
    from ipgo.evaluation import VERDICT
    from ipgo.rewards import check_reward

    own = folder.config.reward
    names = asked or [name for name in folder.identities if not name.startswith(VERDICT)]
    others = tuple(dict.fromkeys(name for name in names if name != own))
    try:
        for name in others:
            check_reward(name, prompts)
        try:
            check_reward(own, prompts)
        except InputError as error:
            if own in names:
                raise
            logging.getLogger("ipgo").warning("scored without the reward that was optimised: %s", error)
            return others
    except InputError as error:
        raise InputError(f"{error}" + ("" if asked else "; name rewards with --rewards")) from None
    return (own, *others)
