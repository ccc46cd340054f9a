"""The command line: `ipgo fit`, `generate`, `evaluate` and `report`, and what has a file of its own.

Whatever needs torch is imported inside the commands, so that `ipgo --help` answers at once.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ipgo import __version__, files
from ipgo.cli_compare import compare, show_comparison
from ipgo.cli_doctor import doctor
from ipgo.cli_explain import explain
from ipgo.cli_list import list_
from ipgo.cli_plan import plan
from ipgo.cli_publish import publish
from ipgo.cli_score import score
from ipgo.errors import InputError, IpgoError, RewardError, first_line, unknown
from ipgo.prompts import slug
from ipgo.terminal import (
    add_adapter_flags,
    add_device_flags,
    aligned,
    backend_of,
    command_parser,
    given,
    loading,
    open_stored,
    path_of,
    peek,
    read_texts,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from ipgo.evaluation import Gain, Score
    from ipgo.store import Run

HELP = """usage: ipgo COMMAND [options]

Make the images of a text-to-image model score higher, by learning a few embeddings around its prompts.

  ipgo fit "a lemon on a blue background" --out runs/lemon

commands:
  fit        learn embeddings for one or more prompts, and evaluate them on unseen noise
  generate   draw prompts with what was learned
  evaluate   evaluate a finished run on more seeds, with other rewards, or on prompts it never saw
  compare    run many methods on the same prompts, seeds and budget, and tabulate the results
  score      score existing image files
  plan       estimate the GPU memory that a fit needs, without a GPU
  explain    show the words nearest to learned embeddings, and what each one contributes
  doctor     check that a reward's gradient reaches the embeddings, and say what to do if not
  report     write the HTML report of a run or a comparison
  publish    write a run's adapter with a model card, as a folder or on the hub
  list       list known objects, prompts, rewards, backends, methods, presets, comparisons

`ipgo COMMAND --help` lists the options.
Exit codes: 0 success, 1 a prompt or a check failed, 2 bad input, 130 interrupted."""

# {command}.txt: the --help of those whose options are the methods', which need torch: seconds on a laptop.
HELP_FILES = Path(__file__).parent / "help"
RESUMABLE = ("fit", "compare")
# What needs less memory, by command.
LESS = {
    "fit": "; --chunk 1 and --method.ascent.recompute true need less (see `ipgo plan`)",
    "compare": "; --chunk 1 needs less (see `ipgo plan`)",
}
EVALUATION_SEEDS = tuple(range(2000, 2008))  # not those that `fit` judges on


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # such as of missing weights, which ipgo refuses itself
    _log_to_stderr()
    kept = "; finished prompts are kept" if name in RESUMABLE else ""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal, or a pipe, may not have all letters
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(name, rest)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output has had enough, as in `ipgo list objects | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RewardError as error:
        return _fail(f"{error}{kept}", 2)
    except IpgoError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        again = "; the same command continues it" if name in RESUMABLE else ""
        again = "; what was evaluated is kept" if name == "evaluate" else again
        return _fail(f"stopped{again}", 130)
    except OSError as error:
        place = f" {str(error.filename)!r}" if error.filename else ""
        return _fail(f"cannot read or write{place}: {error.strerror or error}{kept}", 1)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return _fail(f"out of memory ({first_line(error)}){LESS.get(name, '')}{kept}", 1)


def _run(name: str, rest: list[str]) -> int:
    if name in ("-h", "--help", "--version"):
        print(f"ipgo {__version__}" if name == "--version" else HELP)
        return 0
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    stored = HELP_FILES / f"{name}.txt"
    if rest in (["-h"], ["--help"]) and stored.is_file():
        print(stored.read_text(encoding="utf-8"), end="")
        return 0
    return COMMANDS[name](rest)


def _out_of_memory(error: Exception) -> bool:
    """Is it a GPU's, or the machine's? Torch has a type of its own for the one and none for the other."""
    kinds = (MemoryError.__name__, "OutOfMemoryError")
    return type(error).__name__ in kinds or "can't allocate memory" in str(error)


def _log_to_stderr() -> None:
    """Let ipgo's own loggers speak, and no others: libraries that have something to say have their handlers."""
    logger = logging.getLogger("ipgo")
    logger.setLevel(logging.INFO)
    handler = logging.StreamHandler()  # made anew: stderr may be another one than last time
    handler.setFormatter(logging.Formatter("ipgo: %(message)s"))
    handler.set_name("ipgo-cli")
    logger.handlers = [each for each in logger.handlers if each.get_name() != handler.get_name()] + [handler]


def _fail(message: str, code: int) -> int:
    print(f"ipgo: {message}", file=sys.stderr)
    return code


# -- fit ---------------------------------------------------------------------------------------------------


def fit(argv: list[str]) -> int:
    """`ipgo fit`: settings from a preset, then a file, then flags, checked as early as possible."""
    from ipgo.backends import check_backend
    from ipgo.config import build, flatten, merge, method_of, parse, read_settings, settings_for
    from ipgo.defaults import for_backend
    from ipgo.models import judging_rewards, load_models
    from ipgo.rewards import check_reward
    from ipgo.runner import check_gradient, check_method, check_world, run
    from ipgo.store import Run
    from ipgo.vocabulary import warn_of_unseen_words

    chosen, rest = peek(argv, ("--preset", "--config", "--method", "--backend"))
    settings = read_settings(chosen.preset, chosen.config)
    if "entries" in settings:
        raise InputError("entries are those of a comparison: `ipgo compare --config`")
    if chosen.method is not None:
        settings["method"] = settings_for(chosen.method, settings.get("method", {}))
    if chosen.backend is not None:
        settings["backend"] = chosen.backend

    few = for_backend(str(settings.get("backend")), method_of(settings))
    if few:
        said = ", ".join(f"{name} {json.dumps(value)}" for name, value in flatten(few).items())
        logging.getLogger("ipgo").info(
            "%s is a few-step model; defaults for it: %s", settings["backend"], said
        )
    parsed = parse(_fit_parser(method_of(settings)), merge(few, settings), rest)

    texts = read_texts(parsed.text, parsed.prompts)
    if not texts and parsed.held_out:
        raise InputError(
            f"prompts is empty; held_out has taken {parsed.held_out[-1]!r} as a reward: give prompts before options"
        )
    config = build(parsed, tuple(texts))
    asked = "reward" in settings or any(word.split("=")[0] == "--reward" for word in rest)
    check_world(config, asked=asked)
    for name in (config.reward, *judging_rewards(config)):
        check_reward(name, config.prompts)
    check_gradient(config)
    place = Path(parsed.out or Path("runs") / (slug(parsed.prompts or texts[0]) or "run")).expanduser()
    folder = Run.open(place, config)
    negative = config.sampling.negative_prompt
    config.check_width(check_backend(config.backend, config.opening, config.prompts, negative))
    check_method(folder)
    warn_of_unseen_words(config.backend, config.prompts)
    loading(config.backend)
    run(folder, load_models(config, begun_in=folder.dtype))
    return show_run(folder)


def _fit_parser(method: str) -> ArgumentParser:
    from ipgo.config import presets, run_parser
    from ipgo.methods import METHODS

    parser = run_parser(method)
    parser.usage = "ipgo fit PROMPT... [options]"
    parser.description = "Learn embeddings for one or more prompts, and evaluate them on unseen noise."
    parser.epilog = f"--method NAME is one of {', '.join(METHODS)}; --method.* are its options."
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
    return parser


def show_run(folder: Run) -> int:
    """Write the report, and print what came out and where it is."""
    from ipgo.evaluation import summarise
    from ipgo.report import run_cost, write_report

    page, curve = write_report(folder)
    config, scores = folder.config, folder.scores()
    fitted = f"fitted seeds: {_span(config.seeds)}"
    tied = folder.transfers == "nothing"
    for title, seeds in ((fitted, config.seeds), ("unseen seeds", () if tied else config.new_seeds)):
        gains = summarise(scores, seeds=seeds)
        if gains:
            print(f"\n{title}\n{table(gains)}")
        elif config.method_name == "raw" and seeds:
            print(f"\n{title}\n{_levels([each for each in scores if each.seed in seeds])}\n")
    if tied:
        print("\nunseen seeds: as raw, since what was learned belongs to the noise of its seed\n")
    alone = len(folder.prompts) == 1
    if alone:
        seed = config.judged_seeds[0]
        for when in ("before", "after"):
            file = folder.image(folder.prompts[0], when, seed)
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
    if own is not None and config.method.climbing and own.gain.value == 0 and own.wins.low == 0.5:
        logging.getLogger("ipgo").warning(
            "no image of the fitted seeds scores better or worse than the raw one: the reward is flat there, or its "
            "ceiling is met already; see `ipgo doctor`"
        )
    failed = [result["prompt"] for result in folder.results() if result["status"] == "failed"]
    if failed:
        return _fail(
            f"{len(failed)} of {len(folder.judged)} prompts failed because their reward or gradient was not finite: "
            f"{', '.join(map(repr, failed[:5]))}; see `ipgo doctor`, and try again with a new --out",
            1,
        )
    return 0


def table(gains: Sequence[Gain]) -> str:
    """One line per reward; a star marks the optimised one and its parts."""
    from ipgo.evaluation import unlike

    first = gains[0].gain
    over = f"95% over {first.n} {first.over}" if first.n > 1 else "95%"
    rows = [("reward", "raw", gains[0].method, "gain", over, "wins over raw")]
    for each in gains:
        some = each.gain.n > 1
        rows.append(
            (
                each.reward + ("" if each.held_out else " *"),
                f"{each.before:.3f}",
                f"{each.after:.3f}",
                f"{each.gain.value:+.3f}",
                f"{each.gain.low:+.3f} to {each.gain.high:+.3f}{unlike(each, gains[0])}"
                if some
                else "one image",
                f"{each.wins.value:.0%}"
                + (f" ({each.wins.low:.0%} to {each.wins.high:.0%})" if some else ""),
            )
        )
    note = "* the reward that was optimised, or a part of it; all others are held out. A tie counts as half a win."
    return "\n".join([*aligned(rows), note, ""])


def _levels(scores: Sequence[Score]) -> str:
    """A line per reward, of raw images."""
    from ipgo.evaluation import levels

    return "\n".join(aligned([(name, f"{value:.3f}") for name, value in levels(scores).items()]))


def _span(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds)) if len(seeds) <= 8 else f"{seeds[0]} ... {seeds[-1]}"


# -- the other commands ------------------------------------------------------------------------------------


def generate(argv: list[str]) -> int:
    """`ipgo generate`: draw prompts with a stored adapter."""
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
    args = parser.parse_args(argv)

    from ipgo.backends import load_backend
    from ipgo.evaluation import draw
    from ipgo.images import to_pil
    from ipgo.prompts import number
    from ipgo.sampling import Sampling
    from ipgo.seeding import check_seeds
    from ipgo.vocabulary import warn_of_unseen_words

    check_seeds(tuple(args.seeds or ()))
    if args.out is not None:
        files.check_out(args.out, folder=True)
    stored = open_stored(args.adapter)
    # Two adapters draw the same prompt from the same seed: their images have the same names.
    name = args.adapter.resolve().name or "adapter"
    if stored.run is not None and stored.run.path.resolve() != args.adapter.resolve():
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
    adapter = stored.adapter.to(backend.device)
    out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(texts) * len(seeds), desc="images", disable=None, leave=False) as bar:
        for prompt in number(texts):
            for drawing in draw(backend, {"adapter": adapter}, prompt.text, seeds, sampling):
                file = out / f"{prompt.id}-{drawing.seed}.png"
                to_pil(drawing.image[None])[0].save(file)
                bar.write(str(file), file=sys.stdout)
                bar.update()
    return 0


def evaluate(argv: list[str]) -> int:
    """`ipgo evaluate`: more seeds, other rewards, other prompts."""
    parser = command_parser(
        "evaluate", "Evaluate a finished run on more seeds, with other rewards, or on prompts it never saw."
    )
    parser.add_argument("run", type=path_of, help="a run's folder")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=EVALUATION_SEEDS, help="default: 2000 to 2007"
    )
    parser.add_argument("--rewards", nargs="+", help="default: those that the run was scored with")
    parser.add_argument("--prompts", help="other prompts from a file or a set, for a run with --shared")
    parser.add_argument("--backend", help="where the backend is, if it has moved or the run does not say")
    add_device_flags(parser)
    args = parser.parse_args(argv)

    from ipgo.adapters import Adapter
    from ipgo.evaluation import evaluate
    from ipgo.models import load_models
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
    adapters = {"raw": Adapter(), config.method_name: stored.adapter.to(models.backend.device)}
    for name in folder.strange(models.identities):
        logging.getLogger("ipgo").warning(
            "%r is not the reward that scored the run under this name (its weights, text or version differ): the new "
            "scores cannot be compared with the old ones",
            name,
        )
    scores: list[Score] = []
    for prompt in tqdm(prompts, "evaluating", unit="prompt", disable=None, leave=False):
        found = evaluate(
            models.backend,
            adapters,
            models.rewards,
            [prompt],
            args.seeds,
            config.sampling,
            folder.config.reward,
            models.judge,
        )
        folder.judge_again(found, models.identities, models.backend.identity)  # also if the next one fails
        scores += found
    _show_evaluation(folder, prompts, args.seeds, scores)
    return 0


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
    fitted = f" (fitted to: {_span(known)})" if known else ""
    gains = summarise(scores)
    # Prompts as they are have learned nothing that could be compared.
    print(f"{count}{unseen}, seeds {_span(seeds)}{fitted}\n{table(gains) if gains else _levels(scores)}")
    print(f"scores: {folder.path / EVALUATION}\nreport: {write_report(folder)[0]}")


def _judges(folder: Run, asked: Sequence[str] | None, prompts: Sequence[str]) -> tuple[str, ...]:
    """The optimised reward, if it can still be loaded, and the others, which must be.

    A run made in Python may have optimised a function that no name stands for.
    """
    from ipgo.rewards import check_reward

    own, names = folder.config.reward, asked or list(folder.identities)
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


def report(argv: list[str]) -> int:
    """`ipgo report`: write the HTML report again."""
    parser = command_parser("report", "Write the HTML report of a run or a comparison, finished or not.")
    parser.add_argument("run", type=path_of, help="a run's folder, or a comparison's")
    args = parser.parse_args(argv)

    from ipgo.comparison import PLAN
    from ipgo.report import write_report
    from ipgo.store import Run

    if (args.run / PLAN).is_file():
        return show_comparison(args.run)
    print(write_report(Run.open(args.run))[0])
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "fit": fit,
    "generate": generate,
    "compare": compare,
    "explain": explain,
    "evaluate": evaluate,
    "score": score,
    "plan": plan,
    "doctor": doctor,
    "report": report,
    "publish": publish,
    "list": list_,
}

if __name__ == "__main__":
    sys.exit(main())
