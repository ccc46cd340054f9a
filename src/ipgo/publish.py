"""What was learned, to be shared: a folder with the adapter, a model card and pictures, also on the hub."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml

from ipgo import files
from ipgo.adapters import Adapter, NoiseAdapter, TextEncoderAdapter, WeightAdapter
from ipgo.artefacts import load_adapter, save_adapter
from ipgo.errors import InputError, first_line
from ipgo.evaluation import Gain, summarise, unlike
from ipgo.prompts import Prompt
from ipgo.rewards.checkpoints import HUB_ID, fingerprint
from ipgo.store import Run

FILES = ("adapter.json", "adapter.safetensors")
MOST = 8  # prompts with pictures on a card
# What a picture depends on, in the code on a card.
OPENING = ("padding", "scheduler", "image_size", "long_prompts", "dtype")
SAMPLED = ("steps", "guidance_scale", "eta", "negative_prompt")


def save_pretrained(run: Run | str | Path, folder: str | Path) -> Path:
    """Write a run's adapter (one row per finished prompt, or the shared one) and its model card, README.md.

    Args:
        run: the run, or its folder.

    Raises:
        InputError: no prompt of the run is finished, its method learns nothing, or `folder` holds something else.
    """
    run, folder = run if isinstance(run, Run) else Run.open(run), Path(folder)
    if run.config.method_name == "raw":
        raise InputError(f"run {str(run.path)!r} is of the method 'raw', which learns nothing to publish")
    whole, settings = run.whole_adapter()
    files.check_out(folder, folder=True)
    if folder.exists() and not (
        folder.is_dir() and (not any(folder.iterdir()) or (folder / FILES[0]).is_file())
    ):
        raise InputError(f"folder {str(folder)!r} holds something else; give a new or empty one")
    save_adapter(whole, folder, settings, run.drawn_by)
    shutil.rmtree(folder / "images", ignore_errors=True)
    for prompt in run.finished[:MOST]:
        for when in ("before", "after"):
            source = run.image(prompt, when, _seed(run))
            if source.is_file():
                files.write(folder / _picture(prompt, when), source.read_bytes())
    files.write(folder / "README.md", model_card(run, whole).encode())
    return folder


def push_to_hub(run: Run, folder: str | Path, repository: str, *, private: bool = False) -> str:
    """`save_pretrained`, and upload the folder as the hub's model `owner/name`; returns its address.

    Raises:
        InputError: as `save_pretrained`; `repository` is not owner/name; or the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not HUB_ID.fullmatch(repository):
        raise InputError(f"{repository!r} is not a model name of the hub; write owner/name")
    save_pretrained(run, folder)
    hub = HfApi(library_name="ipgo", library_version=version("ipgo"))
    try:
        address = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Adapter learned by ipgo")
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(f"cannot write {repository!r} on the hub: {first_line(error)}") from error
    return str(address)


def from_pretrained(source: str | Path) -> Adapter:
    """Read an adapter from a folder, or from the hub's model `owner/name`.

    Raises:
        InputError: it is neither, or cannot be downloaded; or the adapter there is damaged or of an unknown kind.
    """
    return load_adapter(fetch(source))


def fetch(source: str | Path) -> Path:
    """The folder itself, or where the hub's model `owner/name` was downloaded to."""
    name = str(source)
    if Path(source).exists() or name.count("/") != 1 or name[0] in "/.~":
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:
        raise InputError(
            f"adapter {str(source)!r} is not a folder, and cannot be read from the hub: {first_line(error)}"
        ) from error


# -- the card ----------------------------------------------------------------------------------------------


def model_card(run: Run, adapter: Adapter) -> str:
    """Markdown with the hub's metadata: what it is, what it does on unseen noise, and how to use it."""
    config, scores = run.config, run.scores()
    done = run.finished
    about = {
        "library_name": "ipgo",
        "base_model": _base(config.backend),
        "tags": ["text-to-image", "diffusion", "reward", f"ipgo-{adapter.kind}", config.method_name],
    }
    count = sum(parameter.numel() for parameter in adapter.parameters())
    whose = "any prompt" if adapter.prompts is None else f"{len(done)} prompt{'s' * (len(done) > 1)}"
    sections = [
        f"---\n{yaml.safe_dump({k: v for k, v in about.items() if v}, sort_keys=False)}---",
        f"# {config.method_name} for {whose}, raising {escape(config.reward)}",
        f"Learned with ipgo {version('ipgo')} on {escape(config.backend)}: "
        f"{count:,} numbers besides the frozen model, by the reward {escape(config.reward)}." + _behind(run),
        _limits(run, adapter),
        "## Results",
        _results("On the noise that it was fitted to", summarise(scores, seeds=config.seeds)),
        ""
        if run.transfers == "nothing"
        else _results("On unseen noise", summarise(scores, seeds=config.new_seeds)),
        "## Pictures" if any(run.image(prompt, "after", _seed(run)).is_file() for prompt in done) else "",
        _pictures(run, done),
        "## Use",
        _use(run, adapter, done),
        "## Rewards" if run.identities else "",
        _identities(run),
        "## Settings",
        indent(yaml.safe_dump(_settings(run), sort_keys=True, allow_unicode=True), "    "),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def escape(text: str) -> str:
    """A user's text as plain words in Markdown and HTML: whatever could be markup becomes an entity."""
    return re.sub(r"[^\w\s.,]", lambda found: f"&#{ord(found[0])};", " ".join(text.split())).replace(
        "_", "&#95;"
    )


def _base(backend: str) -> str | None:
    from ipgo.backends import BACKENDS

    place = BACKENDS[backend][1] if backend in BACKENDS else backend
    local = place.startswith((".", "~", "/")) or place.endswith(".safetensors") or Path(place).exists()
    return place if place.count("/") == 1 and not local else None


def _limits(run: Run, adapter: Adapter) -> str:
    words = f"It was fitted to {len(run.prompts)} prompts together and can be tried on others."
    if adapter.prompts is not None:
        words = "It works for the prompts that it was fitted to, word for word."
    if adapter.transfers == "nothing":
        words += " It is tied to its noise: other seeds give the raw prompt's pictures."
    failed = [result for result in run.results() if result["status"] == "failed"]
    return words + (f" {len(failed)} prompts failed." if failed else "")


def _results(title: str, gains: Sequence[Gain]) -> str:
    if not gains:
        return ""
    lines = ["| reward | raw | adapted | gain, 95% | wins over raw |", "|---|---|---|---|---|"]
    for each in gains:
        name = escape(each.reward) + (" (held out)" if each.held_out else " (raised)")
        bounds = f"{each.gain.low:+.3f} to {each.gain.high:+.3f}{unlike(each, gains[0])}"
        interval = f" ({bounds})" if each.gain.n > 1 else ""
        lines.append(
            f"| {name} | {each.before:.3f} | {each.after:.3f} | {each.gain.value:+.3f}{interval} "
            f"| {each.wins.value:.0%} |"
        )
    several = gains[0].gain.n > 1
    over = f"intervals over {gains[0].gain.n} {gains[0].gain.over}" if several else "one image"
    return f"{title}, {over}; a tie counts as half a win:\n\n" + "\n".join(lines)


def _seed(run: Run) -> int:
    """The seed whose pictures are shown: unseen, where there is one and it shows anything."""
    fitted, unseen = run.config.seeds, run.config.new_seeds
    return (*fitted, *unseen)[0] if run.transfers == "nothing" else (*unseen, *fitted)[0]


def _picture(prompt: Prompt, when: str) -> str:
    return f"images/{prompt.id}-{when}.png"


def _pictures(run: Run, done: Sequence[Prompt]) -> str:
    seed = _seed(run)
    shown = [prompt for prompt in done[:MOST] if run.image(prompt, "after", seed).is_file()]
    if not shown:
        return ""
    kind = "unseen" if seed in run.config.new_seeds else "fitted"
    rows = [
        f"| {escape(each.text)} | ![before]({_picture(each, 'before')}) | ![after]({_picture(each, 'after')}) |"
        for each in shown
    ]
    return "\n".join([f"| prompt | raw, seed {seed} ({kind}) | adapted |", "|---|---|---|", *rows])


def _use(run: Run, adapter: Adapter, done: Sequence[Prompt]) -> str:
    config = run.config
    prompt = _literal(done[0].text if adapter.prompts is not None else "a prompt")
    opened = ", ".join([_literal(config.backend), *_given(config, OPENING)])
    drawn = ", ".join(_given(config.sampling, SAMPLED))
    code = f"""```python
import ipgo

adapter = ipgo.from_pretrained("this/repository")     # or its folder
backend = ipgo.load_backend({opened})
images = ipgo.generate(backend, [{prompt}], [{_seed(run)}], adapter, ipgo.Sampling({drawn}))
```"""
    base = _base(config.backend)
    if base is None or not _fits_a_pipeline(adapter):
        return code
    return f"{code}\n\n{_in_diffusers(run, adapter, base, prompt)}"


def _fits_a_pipeline(adapter: Adapter) -> bool:
    """Can a stock pipeline's call draw with it? None takes other states at late steps, or the noise of every step."""
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
    if sampling.guidance_scale is not None:
        prepared.append(f"scale = ipgo.load_backend(pipe).pipeline_guidance({sampling.guidance_scale})")
        asked.append("**scale")
    if sampling.eta:
        asked.append(f"eta={sampling.eta}")
    if config.image_size is not None:
        asked.append(f"height={config.image_size}, width={config.image_size}")
    negative = [_literal(sampling.negative_prompt)] if sampling.negative_prompt else []
    if isinstance(adapter, WeightAdapter):
        words = ", ".join([prompt, *(f"negative_prompt={each}" for each in negative), *asked])
        called = [
            f"with adapter.attached(ipgo.load_backend(pipe), [{prompt}]):",
            f"    image = pipe({words}).images[0]",
        ]
    else:
        called = [
            f"kwargs = adapter.prompt_kwargs(pipe, {', '.join([prompt, *negative])})",
            f"image = pipe(**kwargs, {', '.join(asked)}).images[0]",
        ]
    opened, imports = [repr(base)], ["import diffusers"]
    if config.dtype != "auto":
        opened.append(f"dtype=torch.{config.dtype}")
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


def _identities(run: Run) -> str:
    """What decides the scores above, reward by reward."""
    if not run.identities:
        return ""
    known = {name: {"fingerprint": fingerprint(each), **each} for name, each in run.identities.items()}
    words = "Scores compare with those of a reward of the same fingerprint: its version, weights and preprocessing."
    return f"{words}\n\n" + indent(yaml.safe_dump(known, sort_keys=False, allow_unicode=True), "    ")


def _settings(run: Run) -> dict[str, Any]:
    settings = run.config.to_json()
    return {key: settings[key] for key in settings if key not in ("prompts", "device", "chunk")}
