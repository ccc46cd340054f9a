"""Prompts that are fitted together, what that costs, and where an interrupted fit resumes from."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ipgo import files
from ipgo.prompts import Prompt
from ipgo.task import Progress

logger = logging.getLogger("ipgo")


@dataclass(frozen=True)
class Chunk:
    """Prompts that are fitted together."""

    prompts: tuple[Prompt, ...]

    @property
    def key(self) -> str:
        """The name of its checkpoint: first and last position."""
        first, last = (prompt.id.partition("-")[0] for prompt in (self.prompts[0], self.prompts[-1]))
        return f"{first}-{last}"

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(prompt.text for prompt in self.prompts)


@dataclass
class Cost:
    """What fitting a chunk has taken so far; `calls` as in `Backend.calls`, memory in MiB."""

    calls: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    peak_memory: float = 0.0
    sessions: int = 1  # how often the work was started: 1 unless it was interrupted


@dataclass(frozen=True)
class Checkpoint:
    """A chunk's state after `step`, and what it had cost by then."""

    step: int
    state: dict[str, Tensor]
    cost: Cost


def write_checkpoint(file: Path, chunk: Chunk, digest: str, progress: Progress, cost: Cost) -> None:
    """All that `read_checkpoint` needs; `digest` is that of the settings."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in progress.state().items()}
    about = {"step": progress.step, "prompts": chunk.texts, "digest": digest, "names": sorted(state)}
    about |= vars(cost)
    files.write(file, save(state, metadata={"about": json.dumps(about)}))


def read_checkpoint(file: Path, chunk: Chunk, digest: str) -> Checkpoint | None:
    """What was written there for these prompts and settings.

    A damaged file is set aside under another name and said to be.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            about = json.loads(tensors.metadata()["about"])
            # Copies: what is mapped onto the file keeps it, and Windows from putting the next one in its place.
            state = {name: tensors.get_tensor(name).clone() for name in tensors.keys()}  # noqa: SIM118
        if about["names"] != sorted(state):
            raise ValueError("not all tensors are there")
        same = about["prompts"] == list(chunk.texts) and about["digest"] == digest
        cost = Cost(
            Counter(about["calls"]),
            float(about["seconds"]),
            float(about["peak_memory"]),
            int(about["sessions"]) + 1,
        )
        found = Checkpoint(int(about["step"]), state, cost)
    except (SafetensorError, KeyError, TypeError, ValueError):
        aside = file.with_suffix(".damaged")
        file.replace(aside)
        logger.warning("checkpoint %s is damaged; set aside as %s, the chunk starts again", file, aside.name)
        return None
    if about["digest"] != digest:
        logger.warning("checkpoint %s is of another version of ipgo: the chunk starts again", file)
    return found if same else None  # or cut with another chunk size: these prompts start again
