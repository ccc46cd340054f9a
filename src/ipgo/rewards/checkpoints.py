"""The weights of a reward: a path that was given or a file on the hub, and what they are known by."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

from ipgo import hub
from ipgo.bars import only_of_downloads
from ipgo.errors import InputError, first_line
from ipgo.files import hub_id, is_hub_id, shards

CLIP_L = "openai/clip-vit-large-patch14"  # its tokenizer is that of open_clip, too
MODEL = "model*.safetensors"
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)
INDEX = "model.safetensors.index.json"  # of weights in several files
FOLDER = ("config.json", "preprocessor_config.json", *TOKENIZER, MODEL, INDEX)

# Of a CLIP's config.json: what the shapes of its tensors do not show.
UNSEEN = ("hidden_act", "layer_norm_eps", "num_attention_heads", "eos_token_id")

# Texts that tokenizers read differently.
AWKWARD = (
    "",
    "A Red FOX, 35mm f/1.8 -- 4k UHD!!",
    "it's  two   spaces,\ttab\nnew line",
    "caf\u00e9 cafe\u0301 na\u00efve \u00c5ngstr\u00f6m \u00df",
    "\u201cquotes\u201d \u2018single\u2019 \u2013 \u2014 \u2026",
    "&lt;b&gt; &amp;amp; <|endoftext|> [SEP]",
    "\u732b\u304c\u5ea7\u308b \u0440\u044b\u0436\u0438\u0439 \u043a\u043e\u0442 \U0001f98a\U0001f34b",
    "1234567 3.14 10:30 #1 @x a_b a-b",
    "a very long prompt " * 60,
)


@dataclass(frozen=True)
class Source:
    """Where a reward's weights are published: a file of a hub repository, or a CLIPModel with its tokenizer (None)."""

    repo: str
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.file} of {self.repo}" if self.file else self.repo


def bare_name(spec: str) -> str:
    """`clip@notebook:folder` to `clip`."""
    return re.split("[@:]", spec, maxsplit=1)[0]


@dataclass(frozen=True)
class Checkpoint:
    """What `hpsv2.1@notebook:/models/HPS_v2.1_compressed.pt` asks for.

    Attributes:
        spec: all of it.
        notebook: resize pictures as the released notebook does.
        place: the path or hub id after the colon; "" is the published one.
        source: the published one.
    """

    spec: str
    notebook: bool
    place: str
    source: Source

    @property
    def name(self) -> str:
        """`hpsv2.1`."""
        return bare_name(self.spec)

    def check(self) -> None:
        """Raise `InputError` if the given path cannot be what is needed, without reading or fetching weights."""
        path = Path(self.place)
        if not self.place:
            return
        if self.source.file is not None:
            if not path.is_file():
                raise InputError(f"reward {self.spec!r}: there is no file {self.place!r}; {self._needed()}")
        elif path.is_dir():
            if not (path / "config.json").is_file() or not any(path.glob(MODEL)):
                raise InputError(
                    f"reward {self.spec!r}: {self.place!r} is not the folder of a CLIPModel: "
                    "it needs config.json and model.safetensors"
                )
        elif not is_hub_id(self.place):
            raise InputError(f"reward {self.spec!r}: there is no folder {self.place!r}; {self._needed()}")

    def find(self) -> Path:
        """The file, or the folder; fetched from the hub if no path was given and it is not there yet.

        Raises:
            InputError: it cannot be fetched; the message says how to give a copy.
        """
        self.check()
        if self.place and Path(self.place).exists():
            return Path(self.place)
        repo = self.place or self.source.repo
        try:
            if self.source.file is not None:
                with hub.within_reach(repo):
                    return Path(hf_hub_download(repo, self.source.file))
            return _snapshot(repo, FOLDER, MODEL)
        except Exception as error:  # no network, or no such file, which libraries say in many ways
            what = self.source.file or "config.json, tokenizer and model.safetensors"
            made = " (save_pretrained of a CLIPModel and of its tokenizer make one)"
            raise InputError(
                f"reward {self.spec!r} needs {what} of huggingface.co/{hub_id(repo)[0]}, which is not here and cannot "
                f"be fetched ({_reason(error)}); give a copy as {self._copy()}{made * isinstance(error, _LackingError)}"
            ) from error

    def beside(self, repo: str, found: Path, patterns: Sequence[str], needed: str) -> Path:
        """The folder of a second model: beside the weights that were found, under its own name, or from the hub."""
        name = repo.rpartition("/")[2]
        near = _folder_of(found) / name
        if near.is_dir() and any(near.glob(needed)):
            return near
        try:
            return _snapshot(repo, patterns, needed)
        except Exception as error:  # as above
            raise InputError(
                f"reward {self.spec!r} needs {needed} of huggingface.co/{repo}, which is not here and cannot be "
                f"fetched ({_reason(error)}); put a copy into a folder {name!r} beside the weights"
            ) from error

    def tokenizer(self, repo: str, found: Path, *files: str) -> Path:
        """The folder of the tokenizer: that of the weights, if it has one, or as in `beside`.

        Args:
            files: what one of its kind has instead of tokenizer.json.
        """
        folder = _folder_of(found)
        for place in (folder, folder / repo.rpartition("/")[2]):
            if (place / "tokenizer.json").is_file() or all((place / name).is_file() for name in files):
                return place
        return self.beside(repo, found, TOKENIZER, "tokenizer.json")

    def _needed(self) -> str:
        return f"it needs {self.source} (huggingface.co), given as {self._copy()}"

    def _copy(self) -> str:
        return f"{self.spec.partition(':')[0]}:/path/{self.source.file or 'folder'}"


def _folder_of(found: Path) -> Path:
    return found if found.is_dir() else found.parent


def _snapshot(repo: str, patterns: Sequence[str], needed: str) -> Path:
    """The folder of a hub repository's files; offline it may lack those that nobody has asked for yet."""
    with hub.within_reach(repo):
        name, revision = hub_id(repo)
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    if not any(folder.glob(needed)):
        raise _LackingError(f"there is no {needed}")
    return folder


class _LackingError(OSError):
    """A repository without a file that is needed."""


def _reason(error: Exception) -> str:
    if isinstance(error, LocalEntryNotFoundError):
        return "offline, or not in the hub's local cache"
    return str(error) if isinstance(error, _LackingError | hub.UnreachableError) else type(error).__name__


def read_state(file: Path, reward: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or a torch checkpoint, in float32; nothing in it is run.

    Raises:
        InputError: the file is damaged, holds other things than tensors, or is not a state dict.
    """
    try:
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's refusal of whatever would run code
        raise InputError(
            f"weights {str(file)!r} of reward {reward!r} are damaged or hold more than tensors, and are not read"
        ) from None
    except Exception as error:  # a damaged pickle can fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"weights {str(file)!r} of reward {reward!r} cannot be read: {reason}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"weights {str(file)!r} of reward {reward!r} are not a state dict")
    return {name.removeprefix("module."): tensor.float() for name, tensor in state.items()}


def open_model(kind: Any, folder: Path | None, reward: str, what: str, **options: Any) -> Any:
    """A model of transformers in float32 from a folder, or (None) from the `config` and `state_dict` in options.

    Raises:
        InputError: the weights are not those of such a model, or not all of them; the message calls them `what`.
    """
    try:
        with only_of_downloads(folder, logging):
            model, report = kind.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, **options
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = first_line(error)
        raise InputError(f"reward {reward!r}: {what!r} cannot be opened: {reason}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"reward {reward!r}: {what!r} is not a complete {kind.__name__}: {missing[0]} is missing"
        )
    return model


def open_tokenizer(kind: Any, folder: Path, reward: str, size: int) -> Any:
    """A tokenizer of transformers, for a text tower of `size` tokens.

    Of files that are another's, or lacking, transformers makes an empty one, to which all prompts are alike. BLIP adds
    two tokens to those of BERT.

    Raises:
        InputError: its files are damaged, or it is not that of the tower.
    """
    try:
        tokenizer = kind.from_pretrained(folder)
    except Exception as error:  # its parser has errors of its own
        reason = first_line(error)
        raise InputError(
            f"reward {reward!r}: the tokenizer in {str(folder)!r} cannot be opened: {reason}"
        ) from error
    if not 0.99 * size <= len(tokenizer) <= size:
        raise InputError(
            f"reward {reward!r}: the tokenizer in {str(folder)!r} has {len(tokenizer)} tokens and the model {size}; "
            "it is another model's, or its files are incomplete"
        )
    return tokenizer


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads a model from, and no others that lie beside them."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).is_file():
        return sorted(folder.glob(MODEL))
    return shards(folder / INDEX)


def identity(
    reward: str, files: Sequence[Path], preprocessing: object, version: int = 1, **further: str
) -> dict[str, Any]:
    """What decides a score besides the picture and its prompt: scores of two identities are not comparable.

    Args:
        reward: the reward's name, without paths.
        files: all weights, in a fixed order; their SHA-256 is what counts, not their names.
        version: counted up when the same weights come to give other numbers.
        further: what else does, if it comes with the weights: `tokenizer` (see `reading`), `architecture`.
    """
    digests = [sha256(file) for file in files]
    return {
        "id": reward,
        "version": version,
        "weights": digests,
        "preprocessing": str(preprocessing),
        **further,
    }


def reading(tokenizer: Any, longest: int) -> str:
    """Twelve hexadecimal digits for how prompts become tokens, whatever files a tokenizer was read from.

    Its vocabulary, and what it makes of texts in which tokenizers differ: case, digits, accents, spaces, and length.
    """
    tokens = [tokenizer(text, truncation=True, max_length=longest).input_ids for text in AWKWARD]
    return _short([sorted(tokenizer.get_vocab().items()), tokens])


def architecture(config: Any) -> str:
    """Twelve hexadecimal digits for what a CLIP's config.json decides and no tensor's shape shows."""
    towers = (config.text_config.to_dict(), config.vision_config.to_dict())
    return _short([{key: tower.get(key) for key in UNSEEN} for tower in towers])


def _short(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits for a reward's identity, whatever the order of its keys."""
    return _short(identity)


def sha256(file: Path) -> str:
    """As sha256sum prints it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
