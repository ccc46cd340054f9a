"""`ipgo fit`: learn embeddings, and print what came of it."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ipgo.errors import InputError
from ipgo.printed import NOTE, levels, span, table
from ipgo.prompts import slug
from ipgo.terminal import folder_for, loading, peek, read_texts

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from ipgo.store import Run


def fit(argv: list[str]) -> int:
    """`ipgo fit`: settings from a preset, then a file, then flags, checked as early as possible."""
    from ipgo.config import build, parse
    from ipgo.defaults import for_backend, usual
    from ipgo.models import load_models
    from ipgo.preflight import check, check_method
    from ipgo.runner import run
    from ipgo.settings import flatten, merge, method_of, read_settings, settings_for
    from ipgo.store import Run
    from ipgo.tracking import check_tracker, tracked

    chosen, rest = peek(argv, ("--preset", "--config", "--method", "--backend"))
    settings = read_settings(chosen.preset, chosen.config)
    if "entries" in settings:
        raise InputError("entries are those of a comparison: `ipgo compare --config`")
    if chosen.method is not None:
        settings["method"] = settings_for(chosen.method, settings.get("method", {}))
    if chosen.backend is not None:
        settings["backend"] = chosen.backend

    backend, method = str(settings.get("backend", "emoji")), method_of(settings)
    few = for_backend(backend, method)
    if few:
        said = ", ".join(f"{name} {json.dumps(value)}" for name, value in flatten(few).items())
        logging.getLogger("ipgo").info("%s is a few-step model; defaults for it: %s", backend, said)
    parsed = parse(_fit_parser(method), merge(usual(backend, method), settings), rest)

    texts = read_texts(parsed.text, parsed.prompts)
    if not texts and parsed.held_out:
        raise InputError(
            f"prompts is empty; held_out has taken {parsed.held_out[-1]!r} as a reward: give prompts before options"
        )
    config = build(parsed, tuple(texts))
    check(config)
    place = folder_for(parsed.out, Path("runs") / (slug(parsed.prompts or texts[0]) or "run"))
    check_tracker(parsed.track, place)
    folder = Run.open(place, config)
    check_method(folder)
    nothing_left = folder.begun and not folder.pending()
    loading(config.backend)  # also then: a reward or a backend that has changed meanwhile is refused
    left = run(folder, load_models(config, begun_in=folder.dtype), tracked(parsed.track, folder))
    if nothing_left:
        logging.getLogger("ipgo").info("all of it was fitted before; this is what came out")
    return 0 if left else show_run(folder)  # the last process shows all of it


def _fit_parser(method: str) -> ArgumentParser:
    from ipgo.config import run_parser
    from ipgo.methods import METHODS
    from ipgo.settings import presets

    parser = run_parser(method)
    parser.usage = "ipgo fit PROMPT... [--method NAME] [options]"
    parser.description = "Learn embeddings for one or more prompts, and evaluate them on unseen noise."
    parser.epilog = (
        f"--method NAME is one of {', '.join(METHODS)}; --method.* are its options, of which `ipgo fit --method NAME "
        "--help` has those of another. Flags may be written with - or _. Docs: docs/usage.md."
    )
    parser.add_argument("text", nargs="*", default=[], metavar="PROMPT", help="prompts, each in quotes")
    parser.add_argument("--preset", type=str, help=f"bundled settings: {', '.join(presets())}")
    parser.add_argument(
        "--config", type=str, help="a YAML file of settings; it overrides the preset, and flags override both"
    )
    parser.add_argument(
        "--prompts",
        type=str,
        help="prompts from a .txt, .csv or .jsonl file, or a set: one, one:train?n=8, ...",
    )
    parser.add_argument(
        "--out", type=str, help="the run's folder (default: runs/ and --prompts, or the first prompt's words)"
    )
    parser.add_argument(
        "--track", type=str, help="tell a tracker of each step too: tensorboard, wandb or trackio"
    )
    return parser


def show_run(folder: Run) -> int:
    """Write the report, and print what came out and where it is."""
    from ipgo.evaluation import summarise
    from ipgo.report import run_cost, verdict, write_report

    page, curve = write_report(folder)
    config, scores = folder.config, folder.scores()
    fitted = f"fitted seeds: {span(config.seeds)}"
    new = () if folder.transfers == "nothing" else config.new_seeds  # the verdict says it
    for title, seeds in ((fitted, config.seeds), ("unseen seeds", new)):
        gains = summarise(scores, seeds=seeds)
        if gains:
            print(f"\n{title}\n{table(gains)}")
        elif config.method_name == "raw" and seeds:
            print(f"\n{title}\n{levels([each for each in scores if each.seed in seeds])}")
    if config.method_name != "raw":
        print(NOTE)
    print(f"\n{verdict(folder)}\n")
    alone = len(folder.prompts) == 1
    if alone:
        seed = config.judged_seeds[0]
        for when in ("before", "after"):
            file = folder.image_file(folder.prompts[0], when, seed)
            if file.is_file():
                print(f"{when + ':':<12}{file}")
    else:
        print(f"{'prompts:':<12}{folder.path / 'prompts'}")
    if (alone or config.shared) and config.method_name != "raw":
        print(f"{'learned:':<12}{folder.adapter_folder(folder.prompts[0])}")
    print(f"{'curve:':<12}{curve}\n{'report:':<12}{page}")
    cost = run_cost(folder)
    print(
        f"{'cost:':<12}{cost['seconds']:.0f} s of fitting, {cost['calls'].get('denoiser', 0):,} denoiser calls"
    )
    own = next((gain for gain in summarise(scores, seeds=config.seeds) if gain.reward == config.reward), None)
    if own is not None and config.method.climbing and own.flat:
        logging.getLogger("ipgo").warning(
            "no image of the fitted seeds scores better or worse than the raw one: the reward is flat there, or its "
            "ceiling is met already; see `ipgo doctor`"
        )
    failed = [result["prompt"] for result in folder.results() if result["status"] == "failed"]
    if failed:
        print(
            f"ipgo: {len(failed)} of {len(folder.judged)} prompts failed because their reward or gradient was not "
            f"finite: {', '.join(map(repr, failed[:5]))}; see `ipgo doctor`, and try again with a new --out",
            file=sys.stderr,
        )
    return 1 if failed else 0
