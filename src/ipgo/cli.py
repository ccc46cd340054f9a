"""The command line: which commands there are, and what their errors look like.

Whatever needs torch is imported inside the commands, so that `ipgo --help` answers at once.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ipgo import __version__
from ipgo.cli_compare import compare
from ipgo.cli_doctor import doctor
from ipgo.cli_evaluate import evaluate
from ipgo.cli_explain import explain
from ipgo.cli_fit import fit
from ipgo.cli_generate import generate
from ipgo.cli_list import list_
from ipgo.cli_plan import plan
from ipgo.cli_publish import publish
from ipgo.cli_report import report
from ipgo.cli_score import score
from ipgo.cli_studio import studio
from ipgo.errors import IpgoError, RewardError, first_line, unknown
from ipgo.terminal import loading

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
  studio     serve a page that fits a prompt and shows every step of it
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # such as of missing weights, which ipgo refuses itself
    _log_to_stderr()
    kept = "; finished prompts, if any, are kept" if name in RESUMABLE else ""
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
    if name in RESUMABLE:  # whose options are the methods'
        loading("PyTorch")
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
    "studio": studio,
    "list": list_,
}

if __name__ == "__main__":
    sys.exit(main())
