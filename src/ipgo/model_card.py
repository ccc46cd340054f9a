"""The card of what was learned: Markdown with the hub's metadata."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml

from ipgo.adapters import Adapter, JointAdapter, NoiseAdapter, TextEncoderAdapter, WeightAdapter
from ipgo.evaluation import Gain, summarise, unlike
from ipgo.files import hub_id, is_hub_id
from ipgo.places import bare_identity, bare_reward, bare_settings
from ipgo.prompts import Prompt
from ipgo.rewards.checkpoints import fingerprint
from ipgo.store import Run

BEGINNING = "---\nlibrary_name: ipgo\n"  # of every card
MOST = 8  # prompts with pictures on a card
# What a picture depends on, in the code on a card.
OPENING = ("padding", "scheduler", "image_size", "long_prompts", "dtype")
SAMPLED = ("steps", "guidance_scale", "eta", "negative_prompt")


def model_card(run: Run, adapter: Adapter, place: str, *, paths: bool = True) -> str:
    """Markdown with the hub's metadata: what it is, what it does on unseen noise, and how to use it.

    Args:
        place: where the adapter is, for `from_pretrained`.
        paths: name folders and files of this machine with their paths.
    """
    config, scores = run.config, run.scores()
    settings = config.to_json() if paths else bare_settings(config.to_json())
    backend, reward = settings["backend"], settings["reward"]
    done = run.finished
    about = {
        "library_name": "ipgo",
        "base_model": _base(backend),
        "tags": ["text-to-image", "diffusion", "reward", f"ipgo-{adapter.kind}", config.method_name],
    }
    count = sum(parameter.numel() for parameter in adapter.parameters())
    whose = "any prompt" if adapter.prompts is None else f"{len(done)} prompt{'s' * (len(done) > 1)}"
    sections = [
        f"---\n{_yaml({key: value for key, value in about.items() if value})}---",
        f"# {config.method_name} for {whose}, optimising {escape(reward)}",
        f"Learned with ipgo {version('ipgo')} on {escape(backend)}: "
        f"{count:,} numbers besides the frozen model, by the reward {escape(reward)}." + _behind(run),
        _limits(run, adapter),
        "## Results",
        _results("On the noise that it was fitted to", summarise(scores, seeds=config.seeds), paths),
        ""
        if run.transfers == "nothing"
        else _results("On unseen noise", summarise(scores, seeds=config.new_seeds), paths),
        _section("Pictures", _pictures(run, done)),
        _section("Use", _use(run, adapter, done, place, backend)),
        _section("Rewards", _identities(run, paths)),
        "## Settings",
        indent(_yaml(_settings(settings), sort=True), "    "),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def escape(text: str) -> str:
    """A user's text as plain words in Markdown and HTML: whatever could be markup becomes an entity."""
    return re.sub(r"[^\w\s.,]", lambda found: f"&#{ord(found[0])};", " ".join(text.split())).replace(
        "_", "&#95;"
    )


def _base(backend: str) -> str | None:
    from ipgo.backends import place_of

    place = place_of(backend)
    return hub_id(place)[0] if is_hub_id(place) and not Path(place).exists() else None


def _limits(run: Run, adapter: Adapter) -> str:
    words = f"It was fitted to {len(run.prompts)} prompts together and can be tried on others."
    if adapter.prompts is not None:
        words = "It works for the prompts that it was fitted to, word for word."
    if adapter.transfers == "nothing":
        words += " It is tied to its noise: other seeds give the raw prompt's pictures."
    failed = [result for result in run.results() if result["status"] == "failed"]
    return words + (f" {len(failed)} {'prompt' if len(failed) == 1 else 'prompts'} failed." if failed else "")


def _results(title: str, gains: Sequence[Gain], paths: bool) -> str:
    if not gains:
        return ""
    lines = ["| reward | raw | adapted | gain, 95% | wins over raw |", "|---|---|---|---|---|"]
    for each in gains:
        name = escape(_named(each.reward, paths)) + (" (held out)" if each.held_out else " (optimised)")
        bounds = f"{each.gain.bounds('+.3f')}{unlike(each, gains[0])}"
        interval = f" ({bounds})" if each.gain.n > 1 else ""
        lines.append(
            f"| {name} | {each.before:.3f} | {each.after:.3f} | {each.gain.value:+.3f}{interval} "
            f"| {each.wins.value:.0%} |"
        )
    several = gains[0].gain.n > 1
    over = f"intervals over {gains[0].gain.n} {gains[0].gain.over}" if several else "one image"
    return f"{title}, {over}; a tie counts as half a win:\n\n" + "\n".join(lines)


def shown_seed(run: Run) -> int:
    """The seed whose pictures are shown: unseen, where there is one and it shows anything."""
    fitted, unseen = run.config.seeds, run.config.new_seeds
    return (*fitted, *unseen)[0] if run.transfers == "nothing" else (*unseen, *fitted)[0]


def picture_name(prompt: Prompt, when: str) -> str:
    """Of a picture, in the folder of the card."""
    return f"images/{prompt.id}-{when}.png"


def _pictures(run: Run, done: Sequence[Prompt]) -> str:
    seed = shown_seed(run)
    shown = [prompt for prompt in done[:MOST] if run.image_file(prompt, "after", seed).is_file()]
    if not shown:
        return ""
    kind = "unseen" if seed in run.config.new_seeds else "fitted"
    rows = [
        f"| {escape(each.text)} | ![before]({picture_name(each, 'before')}) | ![after]({picture_name(each, 'after')}) |"
        for each in shown
    ]
    return "\n".join([f"| prompt | raw, seed {seed} ({kind}) | adapted |", "|---|---|---|", *rows])


def _use(run: Run, adapter: Adapter, done: Sequence[Prompt], place: str, backend: str) -> str:
    config = run.config
    prompt = _literal(done[0].text if adapter.prompts is not None else "a prompt")
    given = _is_object(config.backend)
    opened = ", ".join(["pipe" if given else _literal(backend), *_given(config, OPENING)])
    drawn = ", ".join(_given(config.sampling, SAMPLED))
    code = f"""```python
import ipgo

adapter = ipgo.from_pretrained({_literal(place)})
backend = ipgo.load_backend({opened})
images = ipgo.generate(backend, [{prompt}], [{shown_seed(run)}], adapter, ipgo.Sampling({drawn}))
```"""
    if given:
        return f"`pipe` is the {config.backend} that it was fitted on, which is to be given:\n\n{code}"
    base = _base(backend)
    if base is None or not _fits_a_pipeline(run, adapter):
        return code
    return f"{code}\n\n{_in_diffusers(run, adapter, base, prompt)}"


def _is_object(backend: str) -> bool:
    """Was it a pipeline object that did not say where it came from? A run then has its class."""
    return backend.isidentifier() and backend.endswith("Pipeline") and not Path(backend).exists()


def _fits_a_pipeline(run: Run, adapter: Adapter) -> bool:
    """Can a stock pipeline's call draw with it? None takes other states at late steps, or the noise of every step.

    With changed weights it reads the prompt itself, and pads and cuts it in its own way.
    """
    if isinstance(adapter, WeightAdapter):
        return (run.config.padding, run.config.long_prompts) == ("max_length", "refuse")
    every_step = isinstance(adapter, NoiseAdapter) and adapter.latents.shape[1] > 1
    return not (every_step or isinstance(adapter, TextEncoderAdapter))


def _in_diffusers(run: Run, adapter: Adapter, base: str, prompt: str) -> str:
    """The same picture from a stock pipeline of the model `base`, which gets what differs from its defaults."""
    config, sampling = run.config, run.config.sampling
    prepared, asked = [], [f"num_inference_steps={sampling.steps}"]
    if config.scheduler is not None:
        prepared += [
            "from ipgo.backends.schedulers import new_scheduler",
            f"pipe.scheduler = new_scheduler(pipe.scheduler, {config.scheduler!r})",
        ]
    scale = sampling.guidance_scale
    if scale is None:
        scale = run.drawn_by.get("guidance_scale")  # the pipeline's own default may be another
    if scale is not None:
        prepared.append(f"scale = ipgo.load_backend(pipe).pipeline_guidance({scale})")
        asked.append("**scale")
    if sampling.eta:
        asked.append(f"eta={sampling.eta}")
    if config.image_size is not None:
        asked.append(f"height={config.image_size}, width={config.image_size}")
    learned = isinstance(adapter, NoiseAdapter | JointAdapter)  # the noise, which `prompt_kwargs` has then
    if not learned:
        asked.append(f"generator=torch.Generator().manual_seed({shown_seed(run)})")
    negative = [_literal(sampling.negative_prompt)] if sampling.negative_prompt else []
    if isinstance(adapter, WeightAdapter):
        words = ", ".join([prompt, *(f"negative_prompt={each}" for each in negative), *asked])
        called = [
            f"with adapter.attached(pipe, [{prompt}]):",
            f"    image = pipe({words}).images[0]",
        ]
    else:
        # Without guidance, negative prompts are left out.
        given = [] if scale is None else [f"guidance_scale={scale}"]
        called = [
            f"kwargs = adapter.prompt_kwargs(pipe, {', '.join([prompt, *negative, *given])})",
            f"image = pipe(**kwargs, {', '.join(asked)}).images[0]",
        ]
    opened, imports = [repr(base)], ["import diffusers"]
    if (revision := hub_id(config.backend)[1]) is not None:
        opened.append(f"revision={revision!r}")
    if config.dtype != "auto":
        opened.append(f"dtype=torch.{config.dtype}")
    if config.dtype != "auto" or not learned:
        imports.append("import torch")
    lines = [
        *imports,
        "",
        f"pipe = diffusers.DiffusionPipeline.from_pretrained({', '.join(opened)})",
        *prepared,
        *called,
    ]
    return "Or in a pipeline of diffusers:\n\n```python\n" + "\n".join(lines) + "\n```"


def _literal(value: Any) -> str:
    """Python for a value, in a block of code that no backtick ends."""
    return repr(value).replace("`", r"\x60")


def _given(settings: Any, names: Sequence[str]) -> list[str]:
    """Arguments for the fields of a dataclass that differ from their defaults."""
    default = {each.name: each.default for each in fields(settings)}
    own = {name: getattr(settings, name) for name in names}
    return [f"{name}={_literal(value)}" for name, value in own.items() if value != default[name]]


def _behind(run: Run) -> str:
    """What the name of the model does not say: a LoRA or a scheduler may have been put into it."""
    known = run.drawn_by
    weights = f" Its weights have the fingerprint {known['weights']}" if known.get("weights") else ""
    schedule = f" and its scheduler is {escape(known['schedule'])}" if known.get("schedule") else ""
    return f"{weights}{schedule}." if weights else ""


def _named(reward: str, paths: bool) -> str:
    return reward if paths else bare_reward(reward)


def _identities(run: Run, paths: bool) -> str:
    """What decides the scores above, reward by reward."""
    if not run.identities:
        return ""
    # One by one, since two may go by one name without their paths.
    known = "".join(
        _yaml(
            {
                _named(name, paths): {
                    "fingerprint": fingerprint(each),
                    **(each if paths else bare_identity(each)),
                }
            }
        )
        for name, each in run.identities.items()
    )
    words = "Scores compare with those of a reward of the same fingerprint: its version, weights and preprocessing."
    return f"{words}\n\n" + indent(known, "    ")


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in settings if key not in ("prompts", "device", "chunk")}


def _yaml(content: dict[str, Any], *, sort: bool = False) -> str:
    """With long texts in one line, as they would be looked for."""
    text: str = yaml.safe_dump(content, sort_keys=sort, allow_unicode=True, width=math.inf)
    return text
