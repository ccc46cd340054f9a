"""Adapters and scores as files, which other programs read too."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ipgo import files
from ipgo.adapters import ADAPTERS, Adapter
from ipgo.devices import own_numbers
from ipgo.errors import InputError, first_line, unknown
from ipgo.evaluation import Score

SCHEMA = 1


def save_adapter(
    adapter: Adapter,
    folder: str | Path,
    settings: Mapping[str, Any] | None = None,
    drawn_by: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter: its tensors to adapter.safetensors, and all that rebuilds it to adapter.json.

    Args:
        adapter: what is stored.
        folder: where; it is made if it does not exist.
        settings: the backend and sampling that the adapter belongs to, as JSON values.
        drawn_by: what was behind the backend's name when it was learned, as `Run.drawn_by` has it.
    """
    folder = files.place("folder", folder)
    files.check_out(folder, folder=True)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.state_dict().items()}
    about = {"schema": SCHEMA, "kind": adapter.kind, "options": adapter.options, "prompts": adapter.prompts}
    files.write(folder / "adapter.safetensors", save(tensors))
    about |= {"settings": dict(settings or {})} | ({"drawn_by": dict(drawn_by)} if drawn_by else {})
    files.write_json(folder / "adapter.json", about)


def load_adapter(folder: Path | str) -> Adapter:
    """Read what `save_adapter` wrote.

    Raises:
        InputError: no adapter there, one of an unknown kind, or a damaged one.
    """
    folder = files.place("folder", folder)
    about = adapter_facts(folder)
    if about.get("schema") != SCHEMA:
        raise InputError(
            f"adapter {str(folder)!r} has format {about.get('schema')!r}, and this ipgo reads {SCHEMA}"
        )
    if about.get("kind") not in ADAPTERS:
        raise unknown("adapter kind", about.get("kind"), ADAPTERS)
    file = folder / "adapter.safetensors"
    try:
        with safe_open(file, framework="pt") as tensors:
            state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        prompts = None if about["prompts"] is None else tuple(about["prompts"])
        with own_numbers():
            adapter = ADAPTERS[about["kind"]].empty(prompts, about["options"])
        adapter.load_state_dict(state)
    except RuntimeError:
        raise InputError(
            f"adapter {str(folder)!r} is damaged: its adapter.json and its weights do not belong together"
        ) from None
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise InputError(f"adapter {str(file)!r} cannot be read: {first_line(error)}") from None
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise InputError(f"adapter {str(file)!r} holds numbers that are not finite")
    return adapter


def adapter_facts(folder: Path) -> dict[str, Any]:
    """adapter.json; `InputError` if it is missing or damaged."""
    if not (folder / "adapter.json").is_file():
        files.check_folder(folder, "an adapter or a run")
        run = (folder / "run.json").is_file()
        hint = "; it is a run's folder, and adapters are in its folders prompts/ID or shared" if run else ""
        raise InputError(f"{str(folder)!r} is not an adapter folder: it has no adapter.json{hint}")
    return files.read_json(folder / "adapter.json", "kind", "options", "prompts", "settings")


def save_scores(
    file: Path,
    scores: Iterable[Score],
    rewards: Mapping[str, Any] | None = None,
    drawn_by: Mapping[str, Any] | None = None,
) -> None:
    """One JSON object a line; with `rewards`, the first line is {"rewards": their identities by name}.

    Args:
        drawn_by: the identity of the backend, for that first line too.
    """
    own = {} if drawn_by is None else {"drawn_by": dict(drawn_by)}
    head = [] if rewards is None else [{"rewards": dict(rewards), **own}]
    files.write_lines(file, [*head, *(asdict(each) for each in scores)])


def load_scores(file: Path) -> list[Score]:
    """The scores that `save_scores` wrote; without a file there are none."""
    return [Score.read(line) for line in files.read_lines(file) if "rewards" not in line]


def load_drawn_by(file: Path) -> dict[str, Any] | None:
    """The identity of the backend that drew what `save_scores` wrote; None if there is no file or it does not say."""
    found: dict[str, Any] | None = _head(file).get("drawn_by")
    return found


def load_identities(file: Path) -> dict[str, Any]:
    """The identities of rewards that `save_scores` wrote, by name; none if there is no file or it has none."""
    found: dict[str, Any] = _head(file).get("rewards", {})
    return found


def _head(file: Path) -> dict[str, Any]:
    """What stands in the first line alone: the others may be many."""
    with contextlib.suppress(FileNotFoundError, ValueError), file.open(encoding="utf-8") as lines:
        first = json.loads(lines.readline())
        return first if isinstance(first, dict) else {}
    return {}
