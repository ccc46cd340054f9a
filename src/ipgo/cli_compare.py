"""`ipgo compare`: many methods on one task, and the table of their results."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipgo.errors import InputError, unknown
from ipgo.printed import aligned
from ipgo.prompts import halves, read_prompts, slug
from ipgo.terminal import folder_for, given, loading, peek, read_texts

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from ipgo.comparison import Plan
    from ipgo.report.tables import Table

COMPARISONS = Path(__file__).parent / "comparisons"  # {name}.yaml; methods.yaml has what methods need
SYSTEMS = "systems"  # the comparison whose labels --methods knows without --config
Settings = dict[str, Any]


def compare(argv: list[str]) -> int:
    """`ipgo compare`: settings from a file, then flags; every entry is checked before a model is loaded."""
    from ipgo.comparison import Comparison
    from ipgo.config import parse
    from ipgo.defaults import usual
    from ipgo.settings import merge
    from ipgo.tracking import check_tracker

    for word in argv:
        if word.startswith("--method."):
            raise InputError(
                f"{word.partition('=')[0]!r} is an option of one method; set it under its entry in a --config file "
                "(docs/compare.md)"
            )
    chosen, rest = peek(argv, ("--config", "--out", "--backend"), flags=("--redraw",))
    if chosen.redraw:
        if chosen.out is None:
            raise InputError("--redraw needs the comparison's folder: --out FOLDER")
        parse(_parser(), {}, rest)  # the command may be the one that it was made with, but not misspelt
        return show_comparison(Path(chosen.out).expanduser())
    settings = read_comparison(chosen.config) if chosen.config else {}
    entries = settings.pop("entries", None) or {}
    method = settings.pop("method", None) or {}
    if chosen.backend is not None:
        settings["backend"] = chosen.backend
    settings = merge(usual(str(settings.get("backend", "emoji")), "raw"), settings)
    parsed = parse(_parser(), settings, rest)
    plan = plan_of(parsed, entries, method)
    usual_place = Path("runs") / f"compare-{slug(parsed.prompts or plan.prompts[0])}"
    place = folder_for(given(chosen.out, parsed.out), usual_place)
    check_tracker(parsed.track, place)
    folder = Comparison.open(place, plan)
    whole = folder.plan  # with the entries of earlier commands
    if parsed.unseen_prompts and not any(whole.config(label).shared for label in whole.entries):
        raise InputError(
            "unseen_prompts is given, and no entry is shared: the others serve their own prompts alone"
        )

    from ipgo.compare import check
    from ipgo.compare import compare as run_all
    from ipgo.vocabulary import warn_of_unseen_words

    some = plan.config(next(iter(plan.entries)))
    check(folder, plan.entries)  # what is there from other commands may fail by itself
    warn_of_unseen_words(some.backend, some.prompts)
    loading(some.backend)
    run_all(folder, parsed.track)
    return show_comparison(place)


def _parser() -> ArgumentParser:
    from ipgo.config import run_parser
    from ipgo.methods import METHODS

    parser = run_parser("raw", "ipgo compare")
    parser.set_defaults(seeds=[0])  # the same for all, also for methods that learn the noise of one seed
    parser.usage = "ipgo compare PROMPT... --methods NAME,NAME,... [options]"
    parser.description = (
        "Run many methods on the same prompts, seeds, rewards and budget, and tabulate the results."
    )
    variants = [label for label in read_comparison(SYSTEMS)["entries"] if label not in METHODS]
    parser.epilog = f"Methods: {', '.join(METHODS)}. Variants: {', '.join(variants)}. Docs: docs/compare.md."
    parser.add_argument("text", nargs="*", default=[], metavar="PROMPT", help="prompts, each in quotes")
    parser.add_argument(
        "--prompts", type=str, help="prompts from a .txt, .csv or .jsonl file, or a set such as styled"
    )
    parser.add_argument(
        "--methods", type=str, help="methods, or labels of the file's entries, comma-separated"
    )
    parser.add_argument(
        "--budget",
        type=int,
        help="denoiser calls per prompt, those with gradient weighted by their time (default: each method's own "
        "length)",
    )
    parser.add_argument(
        "--price",
        nargs=2,
        type=float,
        help="weight of a call with gradient, through one half of guidance and through both (default: measured)",
    )
    parser.add_argument(
        "--unseen_prompts",
        type=str,
        help="a file or set to evaluate shared entries on (default for --prompts NAME:train: NAME:test, if it exists)",
    )
    parser.add_argument("--config", help=f"a YAML file with entries, or one of {', '.join(comparisons())}")
    parser.add_argument(
        "--out", type=str, help="the comparison's folder (default: runs/compare- and the prompts)"
    )
    parser.add_argument(
        "--track", type=str, help="tell a tracker of each step too: tensorboard, wandb or trackio"
    )
    parser.add_argument(
        "--redraw", action="store_true", help="only rewrite the table of --out; loads no model"
    )
    return parser


def comparisons() -> list[str]:
    """The names of the bundled comparisons."""
    return sorted(path.stem for path in COMPARISONS.glob("*.yaml") if path.stem != "methods")


def read_comparison(spec: str) -> Settings:
    """The settings of a bundled comparison or a YAML file."""
    from ipgo.settings import read_settings

    if Path(spec).suffix in (".yaml", ".yml"):
        return read_settings(None, spec)
    if spec not in comparisons():
        raise InputError(f"{unknown('comparison', spec, comparisons())}; a file must end in .yaml or .yml")
    return read_settings(None, str(COMPARISONS / f"{spec}.yaml"))


def plan_of(parsed: Namespace, entries: Mapping[str, Any], method: Mapping[str, Any]) -> Plan:
    """The plan that flags and a file's entries make."""
    from ipgo.budget import Price
    from ipgo.comparison import Plan, common_settings
    from ipgo.config import build

    prompts = tuple(read_texts(parsed.text, parsed.prompts))
    if parsed.price is not None and len(parsed.price) != 2:
        raise InputError(f"price is {parsed.price}; it must be two numbers")
    unseen = parsed.unseen_prompts or _other_half(parsed.prompts or "")
    return Plan(
        prompts=prompts,
        common=common_settings(build(parsed, prompts)),
        entries=entries_of(parsed.methods, entries, method, parsed.backend),
        budget=parsed.budget,
        price=Price(*parsed.price) if parsed.price else None,
        unseen_prompts=tuple(read_prompts(unseen)) if unseen else (),
    )


def _other_half(spec: str) -> str | None:
    """`one:test` for `one:train`, with the same options; all of its prompts if n is more than there are."""
    place, _, query = spec.partition("?")
    name, _, half = place.partition(":")
    if half != "train" or "test" not in halves(name):
        return None
    options = [each for each in query.split("&") if each]
    for kept in (options, [each for each in options if not each.startswith("n=")]):
        other = "?".join(filter(None, (f"{name}:test", "&".join(kept))))
        with contextlib.suppress(InputError):
            read_prompts(other)
            return other
    return None  # `exclude` leaves none


def entries_of(
    names: str | None, entries: Mapping[str, Any], method: Mapping[str, Any], backend: str = "emoji"
) -> dict[str, Settings]:
    """The entries that are asked for by label: a file's, or methods with the settings that they need.

    Args:
        names: labels and methods, comma-separated; None is all of the file's entries.
        entries: the file's, by label; those of the bundled `systems` may be named besides.
        method: what the file's entries of one method have in common, with its name.
        backend: the common one; its name, as that of an entry's own, may say that it is a few-step model.

    Raises:
        InputError: nothing to compare, or a name that is neither.
    """
    from ipgo.backends import few_steps
    from ipgo.methods import METHODS
    from ipgo.settings import merge, method_settings, read_settings

    if not isinstance(entries, Mapping):
        raise InputError("entries must be a mapping of labels to settings")
    entries = {str(label): own for label, own in entries.items()}
    if method:
        method = {"name": "ipgo", **method}
        if method["name"] not in METHODS:
            raise unknown("method", method["name"], METHODS)
    labels = [name.strip() for name in names.split(",") if name.strip()] if names else list(entries)
    if not labels:
        raise InputError("methods is empty; name some with --methods, or give a --config with entries")
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise InputError(f"{twice[0]!r} is compared twice; give each entry a label of its own")
    needed = read_settings(None, str(COMPARISONS / "methods.yaml"))
    systems = read_comparison(SYSTEMS)["entries"]
    found: dict[str, Settings] = {}
    for label in labels:
        if label not in entries and label not in METHODS:
            if label not in systems:
                raise unknown("method or entry", label, dict.fromkeys((*METHODS, *entries, *systems)))
            entries[label] = systems[label]
        own = entries.get(label) or {}
        if not isinstance(own, Mapping):
            raise InputError(f"entry {label!r} is {own!r}; it must be a mapping of settings")
        own = dict(own)
        if "prompts" in own:
            raise InputError(f"entry {label!r} has prompts of its own; all entries have the same")
        try:
            given = method_settings(own.pop("method", None))
        except InputError as error:
            raise InputError(f"entry {label!r}: {error}") from None
        name = given.get("name") or (label if label in METHODS else method.get("name"))
        if name not in METHODS:
            raise InputError(f"entry {label!r} has method {name!r}; choose from {', '.join(METHODS)}")
        few = _few_step_settings(name, backend, str(own.get("backend", backend)))
        common = merge(few.pop("method", {}), dict(method) if method.get("name") == name else {})
        settings = {**merge(few, own), "method": merge(common, {**given, "name": name})}
        wanted = dict(needed.get(name) or {})
        if few_steps(str(own.get("backend", backend))) is not None:
            wanted.pop("sampling", None)  # eta, which is for schedulers that draw no noise by themselves
        found[label] = merge(wanted, settings)
    return found


def _few_step_settings(method: str, common: str, own: str) -> Settings:
    """What an entry needs besides the common settings, which are those of the backend `common`."""
    from ipgo.defaults import for_backend
    from ipgo.sampling import Sampling

    few = for_backend(own, method)
    if own == common:
        few.pop("sampling", None)  # it is among the common ones
    elif not few and (theirs := for_backend(common, method)):
        few["sampling"] = {key: getattr(Sampling(), key) for key in theirs["sampling"]}
    return few


def show_comparison(place: Path) -> int:
    """Write the page and the tables again, and print what came out; 1 if something failed."""
    from ipgo.comparison import Comparison
    from ipgo.report.comparison import incomparable, write_comparison
    from ipgo.report.rows import rows
    from ipgo.report.tables import cost_table, held_out_tables, optimised_table

    folder = Comparison.open(place)
    entries = rows(folder)
    written = write_comparison(folder, entries)
    reward = folder.plan.reward
    for table in (
        optimised_table(entries, reward),
        *held_out_tables(entries, reward),
        cost_table(folder, entries),
    ):
        print(f"\n{table.title}\n{plain(table)}")
    print()
    for name, file in written.items():
        print(f"{name + ':':<10}{file}")
    for each in incomparable(entries):
        print(f"ipgo: {each}", file=sys.stderr)
    failures = [
        f"{row.label} ({row.errors[0]})" if row.errors else row.label
        for row in entries
        if row.failed or row.errors
    ]
    for failure in failures:
        print(f"ipgo: failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def plain(table: Table) -> str:
    """A table in plain text."""
    return "\n".join(aligned([table.head, *([cell.text for cell in line] for line in table.lines)]))
