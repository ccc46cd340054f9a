"""What a run is: everything that decides its results, read from YAML, flags or Python."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from argparse import SUPPRESS, Action, ArgumentError
from argparse import _HelpAction as ActionHelp
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter, Namespace

from ipgo.adapters.noise import check_one_seed
from ipgo.backends.facts import Opening
from ipgo.errors import InputError, unknown, unknown_option
from ipgo.files import is_hub_id
from ipgo.methods import METHODS
from ipgo.methods.ipgo import IPGO
from ipgo.prompts import check_prompts
from ipgo.sampling import Sampling
from ipgo.seeding import NOISES, check_seeds
from ipgo.settings import flatten, method_of
from ipgo.task import Method, Request
from ipgo.typed import check_types

# Settings of the machine and of patience, which may change when a run is continued.
NOT_RESULTS = (
    "chunk",
    "device",
    "text_device",
    "prompts_from",
    *(f"method.chat.{name}" for name in ("timeout", "retries", "cache")),
)
# What a message calls the types of settings.
IN_WORDS = {
    "int": "a whole number",
    "float": "a finite number",
    "bool": "true or false",
    "str": "a text",
    "NoneType": "null",
}
DEFAULT_REWARD = "emoji-likeness+emoji-preference"  # of the bundled model; see `defaults.reward_for`
FIRST_UNSEEN = 1000
# Seeds of a fit where none are asked for: with one, what is learned suits its noise and few others.
SEVERAL = 4


@dataclass(frozen=True)
class RunConfig:
    """The settings of a run.

    Attributes:
        prompts: the texts to fit.
        prompts_from: the file, set or collection that they were read from; only recorded.
        method: what learns, and its hyperparameters.
        backend: a backend's name, a diffusers folder, a .safetensors file, or a hub id.
        reward: what is optimised: a name, a sum such as "emoji-clip+0.5*emoji-aesthetic", or mine.py:function;
            without one, `ipgo fit` and `compare` follow hpsv2.1 on other backends than the bundled model.
        held_out: rewards that only judge the result; None: those that come with the backend.
        sampling: how images are sampled.
        seeds: noise seeds, which gradient steps use in turn; empty: fresh noise at every step. Default: 0 to 3 (no more
            than there are steps), or only 0 for a method that learns the noise or prefers a single seed.
        unseen_seeds: number of held-out seeds (1000, 1001, ...) that the result is also evaluated on.
        seed: random seed of the initial values, the prompt order and other random choices.
        shared: one set of embeddings for all prompts (prompt-batch) instead of one per prompt (prompt-wise).
        judged_prompts: with `shared`, number of prompts, evenly spaced, that are drawn and scored before and after;
            None: all.
        padding: max_length, as in stock pipelines, or none (the denoiser sees no padding tokens).
        scheduler: ddim, pndm, lms, euler or dpm++; None: the model's own.
        image_size: side of the images in pixels; None: the model's own.
        long_prompts: refuse prompts that are too long for the encoder, truncate them, or chunk them into windows.
        dtype: auto, float32, bfloat16 or float16.
        chunk: number of prompts fitted at once, or with shared encoded and drawn where the method has no batches;
            affects memory, and results by no more than rounding.
        device: auto, cpu, cuda or cuda:N.
        text_device: device of the text encoders: auto (with the rest), or cpu, which saves GPU memory.
    """

    prompts: tuple[str, ...]
    method: Method = IPGO()
    backend: str = "emoji"
    reward: str = DEFAULT_REWARD
    held_out: tuple[str, ...] | None = None
    sampling: Sampling = Sampling()
    seeds: tuple[int, ...] = None  # type: ignore[assignment]  # then it is `default_seeds(method)`, never None
    unseen_seeds: int = 4
    seed: int = 0
    shared: bool = False
    judged_prompts: int | None = None
    padding: str = "max_length"
    scheduler: str | None = None
    image_size: int | None = None
    long_prompts: str = "refuse"
    dtype: str = "auto"
    chunk: int = 4
    device: str = "auto"
    text_device: str = "auto"
    prompts_from: str | None = None

    def __post_init__(self) -> None:
        check_prompts(self.prompts)
        if type(self.method) not in METHODS.values():
            kinds = ", ".join(kind.__name__ for kind in METHODS.values())
            raise InputError(f"method is {self.method!r}; it must be an instance of one of {kinds}")
        if self.seeds is None:
            object.__setattr__(self, "seeds", default_seeds(self.method))
        check_types(self)
        for name, least in (("chunk", 1), ("unseen_seeds", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.judged_prompts is not None and not (self.shared and self.judged_prompts >= 1):
            raise InputError(
                f"judged_prompts is {self.judged_prompts}; it must be at least 1, and needs shared: "
                "prompt-wise results are judged on every prompt"
            )
        if self.backend.startswith("~"):
            object.__setattr__(self, "backend", str(Path(self.backend).expanduser()))
        # A folder, which is looked up on the hub wherever there is none of that name.
        if is_hub_id(self.backend) and Path(self.backend).is_dir():
            object.__setattr__(self, "backend", f"./{self.backend}")
        check_seeds(self.seeds)
        clash = sorted(seed for seed in self.seeds if seed % NOISES in self.new_seeds)
        if clash:
            raise InputError(
                f"seeds {clash} are reserved for judging the result; choose seeds below {FIRST_UNSEEN}"
            )
        if not self.seeds and not self.unseen_seeds:
            raise InputError(
                "unseen_seeds is 0 and seeds is empty; the result needs at least one seed to be judged on"
            )
        if self.method.one_seed:
            check_one_seed(self.seeds, self.shared)
        if self.method.ascent is not None:
            with _of_the_method():
                self.method.ascent.check_depth(self.sampling.steps)

    def check_fit(self) -> None:
        """Raise `InputError` for settings of the method that do not go with the others, before a fit begins.

        Stored settings are read without: a comparison keeps those of entries that have failed.
        """
        if self.shared and self.method.prompt_wise:
            raise InputError(f"shared is true; method {self.method_name!r} fits each prompt by itself")
        ascent = self.method.ascent
        # The model's own scheduler may draw noise, and then a fit takes all steps; of those with a name none does.
        least = self.sampling.fitting.steps
        if self.scheduler is not None:
            self.check_steps(least)
        elif ascent is not None:
            with _of_the_method():
                ascent.check_task(least, len(self.seeds), self.shared, self.method.one_seed)
        insertion, scale = self.method.insertion, self.sampling.guidance_scale
        if scale is not None and scale <= 1 and self.sampling.negative_prompt:
            raise InputError(
                f"sampling.negative_prompt is {self.sampling.negative_prompt!r}; without guidance "
                f"(sampling.guidance_scale {scale:g}) it has no effect"
            )
        if insertion is not None and scale is not None:
            insertion.check_guidance(scale)
        ddim = {
            "sampling.eta": self.sampling.eta,
            "method.ascent.renoised": 0 if ascent is None else ascent.renoised,
            "method.ppo.eta": getattr(getattr(self.method, "ppo", None), "eta", 0),
        }
        for field, value in ddim.items():
            if value > 0 and self.scheduler not in (None, "ddim"):
                raise InputError(f"{field} above 0 needs the ddim scheduler, not {self.scheduler!r}")

    def check_steps(self, steps: int) -> None:
        """Raise `InputError` if the method's gradient does not go with the denoising steps that a fit draws in."""
        ascent = self.method.ascent
        if ascent is not None:
            with _of_the_method():
                ascent.check_depth(steps, "steps" if steps == self.sampling.steps else "fit_steps")
                ascent.check_task(steps, len(self.seeds), self.shared, self.method.one_seed)

    def check_width(self, width: int | None) -> None:
        """Raise `InputError` if the method does not fit prompt embeddings of `width`; None is not known."""
        if self.method.insertion is not None and width is not None:
            with _of_the_method():
                self.method.insertion.check(width)

    @property
    def new_seeds(self) -> tuple[int, ...]:
        """The seeds that are never fitted."""
        return tuple(range(FIRST_UNSEEN, FIRST_UNSEEN + self.unseen_seeds))

    @property
    def judged_seeds(self) -> tuple[int, ...]:
        """The seeds that images are drawn from before and after: the fitted ones, then the others."""
        return (*self.seeds, *self.new_seeds)

    @property
    def opening(self) -> Opening:
        """How the backend is opened."""
        return Opening(self.image_size, self.padding, self.scheduler, self.long_prompts, self.text_device)

    def request(self, prompts: Sequence[str]) -> Request:
        """What is asked of the method for some of the prompts."""
        return Request(prompts, self.reward, self.backend, self.sampling, self.shared, self.padding)

    @property
    def method_name(self) -> str:
        """The method's name in `METHODS`."""
        return next(name for name, kind in METHODS.items() if kind is type(self.method))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; the method carries its name."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values["method"] = {"name": self.method_name, **asdict(cast(Any, self.method))}
        values["sampling"] = asdict(self.sampling)
        plain: dict[str, Any] = json.loads(json.dumps(values))  # tuples become the lists that a reader gets
        return plain

    @classmethod
    def from_json(cls, settings: dict[str, Any]) -> RunConfig:
        """The inverse of `to_json`; `InputError` for an unknown key or a value of the wrong type."""
        if not isinstance(settings, dict) or not isinstance(settings.get("prompts"), list):
            raise InputError("stored settings are damaged: they have no prompts")
        return _read_json(json.dumps(settings))

    def identity(self) -> dict[str, Any]:
        """The settings that decide results, flat: {"method.ascent.lr": 0.001, ...}."""
        return {key: value for key, value in flatten(self.to_json()).items() if key not in NOT_RESULTS}

    def digest(self) -> str:
        """Sixteen hexadecimal digits of `identity`."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=256)  # a comparison asks for the same ones again and again
def _read_json(text: str) -> RunConfig:
    settings = json.loads(text)
    prompts = tuple(settings["prompts"])
    rest = {key: value for key, value in settings.items() if key not in ("prompts", "prompts_from")}
    parser = run_parser(method_of(rest))
    return replace(build(parse(parser, rest, []), prompts), prompts_from=settings.get("prompts_from"))


@contextlib.contextmanager
def _of_the_method() -> Iterator[None]:
    """Errors of a method's settings name them as its own; here they are those of the run."""
    try:
        yield
    except InputError as error:
        raise InputError(f"method.{error}") from None


# Flags that are not `--name value`.
FLAGS: dict[str, dict[str, Any]] = {
    "seeds": {
        "nargs": "*",
        "type": int,
        "default": None,
        "help": "noise seeds, which gradient steps use in turn; empty: fresh noise at every step. Default: 0 1 2 3, or "
        "only 0 for a method that learns the noise or prefers a single seed; in `ipgo compare` 0",
    },
    "held_out": {
        "nargs": "*",
        "type": str,
        "default": None,
        "help": "rewards that only judge the result (default: those that come with the backend)",
    },
    "shared": {
        "action": ActionYesNo(no_prefix="no_"),
        "help": "prompt-batch: one set of embeddings for all prompts instead of one per prompt",
    },
}


def default_seeds(method: Method) -> tuple[int, ...]:
    """The default seeds of a fit: several, but no more than it has steps; or one (see `Method`)."""
    if method.one_seed or method.prefers_one_seed:
        return (0,)
    return tuple(range(SEVERAL if method.ascent is None else min(SEVERAL, method.ascent.steps)))


# ------------------------------------------------------------------------------------------------------
# Flags and files: jsonargparse reads the dataclasses' fields, types and docstrings.


def run_parser(method: str, prog: str = "ipgo fit") -> ArgumentParser:
    """A parser with one flag for every field of `RunConfig` and of the method, but for the prompts."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    parser = ArgumentParser(
        prog=prog, exit_on_error=False, print_config=None, allow_abbrev=False, formatter_class=_Help
    )
    parser.add_class_arguments(RunConfig, skip={"prompts", "prompts_from", "method", *FLAGS})
    for name, options in FLAGS.items():
        parser.add_argument(f"--{name}", **options)
    parser.add_class_arguments(METHODS[method], "method")
    for action in parser._actions:
        if action.help == "Path to a configuration file.":
            action.help = SUPPRESS  # jsonargparse's files for parts of the settings: one --config is enough
    return parser


class _Help(DefaultHelpFormatter):  # type: ignore[misc]
    """Options as they are written in flags and files: `--seed INT`, and null for None."""

    def format_help(self) -> str:
        """With hyphens in flags, as those of the other commands; `_` works as well."""
        return re.sub(r"--[a-z][\w.]*", lambda flag: flag[0].replace("_", "-"), super().format_help())

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        written = self._get_type_str(action) or ""
        kind = next((kind for kind in ("int", "float") if kind in written), None)
        return (kind or super()._get_default_metavar_for_optional(action)).upper()

    def _get_help_string(self, action: Action) -> str:
        if isinstance(action, ActionHelp):
            return "show this help and exit"
        text = re.sub(r"(?<!\.)\.$", "", re.sub(r"\bNone\b", "null", action.help or ""))
        value = action.default
        if "default" in text.lower() or action.nargs == 0 or value in (None, "", [], SUPPRESS):
            return text
        return f"{text} (default: {value if isinstance(value, str) else json.dumps(value)})"


def parse(parser: ArgumentParser, settings: dict[str, Any], argv: list[str]) -> Namespace:
    """Nested settings, overridden by flags; `InputError` in one sentence if either is wrong."""
    names = [action.dest for action in parser._actions]
    groups = {name[:place] for name in names for place, letter in enumerate(name) if letter == "."}
    _check_shape(settings, groups)
    plain = {key: value for key, value in settings.items() if key != "method"}
    for action in parser._actions:
        value = plain.get(action.dest)
        if action.nargs == 0 and not isinstance(value, bool | None):
            raise InputError(f"{action.dest} is {value!r}; it must be true or false")
        if action.nargs not in (None, 0, "?") and not isinstance(value, list | None):
            plain[action.dest] = [value]  # `seeds: 3` is `seeds: [3]`
    method = {key: value for key, value in settings.get("method", {}).items() if key != "name"}
    try:
        base = parser.parse_object({**plain, "method": method} if method else plain, defaults=False)
        if "--no_shared" in argv:  # nor what goes with `shared`, unless a flag says so
            base.judged_prompts = None
        return cast(Namespace, parser.instantiate(parser.parse_args(argv, namespace=base)))
    except ArgumentError as error:
        raise _explain(error, parser) from None
    except InputError as error:  # a method's settings know their names within the method, not its flags
        name = str(error).partition(" ")[0]
        raise InputError(f"method.{error}" if f"method.{name}" in names else str(error)) from None


def build(parsed: Namespace, prompts: tuple[str, ...]) -> RunConfig:
    """The settings that `parse` found, for these prompts."""
    names = [each.name for each in fields(RunConfig) if not each.name.startswith("prompts")]
    values = {name: parsed[name] for name in names}
    for name in ("seeds", "held_out"):
        values[name] = None if values[name] is None else tuple(values[name])
    return RunConfig(prompts, **values, prompts_from=parsed.get("prompts"))


def _explain(error: ArgumentError, parser: ArgumentParser) -> InputError:
    """argparse's message as one sentence, with the nearest option where one is misspelt."""
    text = " ".join(str(error).split())
    options = [option for action in parser._actions for option in action.option_strings]
    if found := re.search(r"unrecognized arguments: (\S+)", text):
        if not found[1].startswith("-"):
            return InputError(f"unexpected {found[1]!r}; give prompts first, in quotes, and then the options")
        return unknown_option(found[1].split("=")[0], options)
    if found := re.search(r"Group '(.+)' does not accept option '(.+)'", text):
        return unknown_option(f"{found[1]}.{found[2]}", [option.lstrip("-") for option in options])
    if found := re.search(r"Option '(.+)' is not accepted", text):
        return unknown_option(found[1], [option.lstrip("-") for option in options])
    if found := re.search(r'Parser key "(.+?)": Unable to load config \'?(.*?)\'? - ', text):
        return InputError(f"{found[1]} is {found[2]!r}; it must be a mapping of settings")
    if found := re.search(r'Parser key "(.+?)".*?: .* [Vv]alue:\s*(.*)', text):
        types = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", text)
        allowed = " or ".join(IN_WORDS.get(kind, kind) or choices for kind, choices in types)
        said = {"None": "null", "True": "true", "False": "false"}.get(found[2], found[2])
        number = re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?|-?inf|nan", said)
        shown = said if number or said != found[2] else repr(said)
        return InputError(f"{found[1]} is {shown}; it must be {allowed or 'of another type'}")
    dash = "; a value that begins with a dash is given as --option=VALUE"
    return InputError(text + dash * ("expected one argument" in text))


def _check_shape(settings: dict[Any, Any], groups: set[str], prefix: str = "") -> None:
    """Raise `InputError` for a group that is not a mapping of settings, or a key that is not a name."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if not isinstance(key, str):
            raise InputError(f"{name} is not a setting; see --help")
        if name in groups and not isinstance(value, dict):
            raise InputError(f"{name} is {value!r}; it must be a mapping of settings")
        if name in groups:
            _check_shape(value, groups, f"{name}.")
        elif value == {}:  # of which the parser would see nothing
            raise InputError(f"{name} is {{}}, which is no setting; leave it out, or see --help")
