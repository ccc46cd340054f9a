"""What was learned, to be shared: a folder with the adapter, a model card and pictures, also on the hub."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ipgo import files, hub
from ipgo.adapters import Adapter
from ipgo.artefacts import load_adapter, save_adapter
from ipgo.errors import InputError, first_line
from ipgo.model_card import BEGINNING, MOST, model_card, picture_name, shown_seed
from ipgo.places import bare_backend
from ipgo.store import Run, left_over

FILES = ("adapter.json", "adapter.safetensors")
CARD = "README.md"


def save_pretrained(run: Run | str | Path, folder: str | Path, *, repository: str | None = None) -> Path:
    """Write a run's adapter (one row per finished prompt, or the shared one) and its model card, README.md.

    Args:
        run: the run, or its folder.
        repository: what the folder will be on the hub, where the paths of this machine's backends and rewards are left
            out; None: it stays here.

    Raises:
        InputError: no prompt of the run is finished, its method learns nothing, or `folder` holds something else.
    """
    run, folder = run if isinstance(run, Run) else Run.open(run), files.place("folder", folder)
    if run.config.method_name == "raw":
        raise InputError(f"run {str(run.path)!r} is of the method 'raw', which learns nothing to publish")
    whole, settings = run.whole_adapter()
    files.check_out(folder, folder=True)
    if not _is_ours(folder):
        raise InputError(f"folder {str(folder)!r} holds something else; give a new or empty one")
    card = model_card(run, whole, repository or str(folder), paths=repository is None)
    if repository is not None:
        settings["backend"] = bare_backend(settings["backend"])
    files.write(folder / CARD, card.encode())  # first: by it the folder is known when it is written again
    save_adapter(whole, folder, settings, run.drawn_by)
    for picture in (folder / "images").glob("*.png"):  # those of an earlier publication, and no others
        if re.fullmatch(r"\d{4}-.*-(before|after)\.png", picture.name):
            picture.unlink()
    for prompt in run.finished[:MOST]:
        for when in ("before", "after"):
            source = run.image_file(prompt, when, shown_seed(run))
            if source.is_file():
                files.write(folder / picture_name(prompt, when), source.read_bytes())
    return folder


def _is_ours(folder: Path) -> bool:
    """Is there nothing yet, or a card of ours? A run's own folders have none."""
    if not folder.is_dir() or all(map(left_over, files.inside(folder))):
        return True
    card = folder / CARD
    return card.is_file() and card.read_text(encoding="utf-8", errors="replace").startswith(BEGINNING)


def push_to_hub(run: Run | str | Path, folder: str | Path, repository: str, *, private: bool = False) -> str:
    """`save_pretrained` without the paths of this machine, and upload the folder: the model's address on the hub.

    Args:
        run: the run, or its folder.
        folder: where the files are written first; they stay.
        repository: `owner/name`; it is made if there is none. What an earlier upload has there is replaced.
        private: is a new repository shown to its owner alone?

    Raises:
        InputError: as `save_pretrained`; `repository` is not owner/name, holds something else, or is public though
            `private` is asked for; or the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    if not files.is_hub_id(repository) or files.hub_id(repository)[1] is not None:
        raise InputError(f"{repository!r} is not a model name of the hub; write owner/name")
    folder = save_pretrained(run, folder, repository=repository)
    api = HfApi(library_name="ipgo", library_version=version("ipgo"))
    try:
        with hub.within_reach(repository):
            if api.repo_exists(repository):
                _check_repository(api.model_info(repository), repository, private)
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message="Adapter learned by ipgo",
                delete_patterns=["images/*.png"],
                ignore_patterns=[f"*{each}" for each in files.CLUTTER],
            )
    except InputError:
        raise
    except Exception as error:  # also whatever its HTTP library raises where there is no network
        raise InputError(f"cannot write {repository!r} on the hub: {first_line(error)}") from error
    return str(address)


def _check_repository(there: Any, repository: str, private: bool) -> None:
    """Raise `InputError` for a repository of the hub that is not to be written."""
    if private and not there.private:  # which the hub would leave as it is
        raise InputError(f"repository {repository!r} is public; make it private on the hub, or give another")
    names = {each.rfilename for each in there.siblings} - {".gitattributes", CARD, "LICENSE"}
    if names and not names.issuperset(FILES):
        raise InputError(f"repository {repository!r} holds something else; give a new one")


def from_pretrained(source: str | Path) -> Adapter:
    """Read an adapter from a folder, or from the hub's model `owner/name`.

    Raises:
        InputError: it is neither, or cannot be downloaded; or the adapter there is damaged or of an unknown kind.
    """
    return load_adapter(fetch(source))


def fetch(source: str | Path) -> Path:
    """The folder itself, or where the hub's model `owner/name` (`@revision`) was downloaded to."""
    if Path(source).exists() or not files.is_hub_id(source):
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        with hub.within_reach(source):
            repo, revision = files.hub_id(source)
            return Path(snapshot_download(repo, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # as above
        raise InputError(
            f"adapter {str(source)!r} is not a folder, and cannot be read from the hub: {first_line(error)}"
        ) from error
