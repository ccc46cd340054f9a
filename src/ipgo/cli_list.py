"""`ipgo list`: the names that the other commands take."""

from __future__ import annotations

from pathlib import Path

from ipgo.cli_compare import comparisons
from ipgo.errors import InputError, unknown
from ipgo.prompt_sources import SOURCES
from ipgo.prompts import halves, prompt_sets, read_prompts
from ipgo.terminal import command_parser


def list_(argv: list[str]) -> int:
    """`ipgo list`: the names that the other commands take."""
    parser = command_parser("list", "List the names that other commands take.")
    kinds = ("objects", "prompts", "rewards", "backends", "methods", "presets", "comparisons")
    parser.add_argument("kind", nargs="?", help=f"{', '.join(kinds)} (default: all except objects)")
    parser.add_argument(
        "name",
        nargs="?",
        help="show this one in full, such as `ipgo list prompts one:test`; of backends also a local diffusers folder; "
        "of objects: those of this backend",
    )
    args = parser.parse_args(argv)
    if args.kind not in (None, *kinds):
        raise unknown("kind", args.kind, kinds)
    for kind in [args.kind] if args.kind else kinds[1:]:
        print("\n".join([f"{kind}:", *(f"  {line}" for line in _names(kind, args.name))]))
    return 0


def _names(kind: str, name: str | None) -> list[str]:
    if name is not None and kind not in ("prompts", "objects"):
        lines = _names(kind, None)
        if kind in ("presets", "comparisons") and name in (line.split()[0] for line in lines):
            return _settings_file(kind, name).read_text(encoding="utf-8").splitlines()
        named = {line.split()[0]: line for line in lines}
        if kind == "backends" and name not in named and Path(name).expanduser().is_dir():
            named[name] = name
        if name not in named:
            raise unknown(kind.removesuffix("s"), name, named)
        return [named[name], *(_declared(name) if kind == "backends" else ())]
    if kind == "prompts":
        if name:
            return read_prompts(name)
        own = ["  ".join((each, *(f"{each}:{half}" for half in halves(each)))) for each in prompt_sets()]
        return [*own, *(f"{each}:...  published prompts (docs/prompts.md)" for each in SOURCES)]
    if kind == "objects":
        return _objects(name or "emoji")
    from ipgo.backends import BACKENDS
    from ipgo.methods import METHODS
    from ipgo.rewards import REWARDS
    from ipgo.settings import presets

    if kind == "methods":
        return [f"{each:<16}{(method.__doc__ or '').splitlines()[0]}" for each, method in METHODS.items()]
    if kind == "comparisons":
        return [_described(kind, each) for each in comparisons()]
    if kind == "rewards":
        return [f"{each:<18}{known}" for each, known in REWARDS.items()]
    if kind == "backends":
        places = {each: "bundled" if Path(place).is_dir() else place for each, (_, place) in BACKENDS.items()}
        return [f"{each:<18}{place}" for each, place in places.items()]
    return [_described(kind, each) for each in presets()]


def _settings_file(kind: str, name: str) -> Path:
    return Path(__file__).parent / kind / f"{name}.yaml"


def _described(kind: str, name: str) -> str:
    """A name with the first line of its file, which says what it is for."""
    with _settings_file(kind, name).open(encoding="utf-8") as file:
        line = file.readline().strip("# .:\n")
    return f"{name:<14}{line}"


def _declared(backend: str) -> list[str]:
    """What a backend's family declares, as far as it holds for this model, and the steps of a few-step model."""
    from ipgo.backends import facts_of, few_steps

    few, facts = few_steps(backend), facts_of(backend)
    lines = list(facts.lines())
    if few is not None:
        steps = f"{few.steps} step{'s' if few.steps > 1 else ''}"
        off = "guidance off" if "classifier-free" in facts.guidance else "no guidance"
        scale = f"a guidance scale of {few.guidance_scale:g}" if few.guidance_scale > 1 else off
        lines.append(
            f"drawn in {steps} with {scale}, and fitted with gradient in all of them, unless told otherwise"
        )
    return [f"  {line}" for line in lines]


def _objects(backend: str) -> list[str]:
    """What a backend's vocabulary says that it can draw, with other words for the same in brackets."""
    from ipgo.vocabulary import vocabulary

    known = vocabulary(backend)
    if known is None:
        raise InputError(f"backend {backend!r} has no vocabulary.json: it does not say what it can draw")
    lines = [f"{each} ({', '.join(others)})" if others else each for each, others in known["objects"].items()]
    more = ("colours", "styles", "relations", "quality")
    # Some are two words with a comma.
    told = {kind: "; ".join(known[kind]) for kind in more if known.get(kind)}
    return [*lines, *(f"-- {kind}: {words}" for kind, words in told.items())]
