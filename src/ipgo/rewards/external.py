"""Rewards from outside: what a command prints, or what a person types."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ipgo import files
from ipgo.errors import InputError, RewardError
from ipgo.images import as_png, to_pil
from ipgo.rewards.base import Reward, parts
from ipgo.rewards.checkpoints import identity

PICTURES = "written as PNG, 8 bits a channel"
PATIENCE = 600  # seconds that a command may take for one image


class External(ABC):
    """One number for each picture, which is given as a PNG file and deleted afterwards.

    Attributes:
        answers: a folder of answers, from which a picture that it has rated is not rated again; None: none are kept.
    """

    differentiable: ClassVar[bool] = False
    name: str
    identity: Any
    answers: Path | None = None

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with tempfile.TemporaryDirectory(prefix="ipgo-") as folder:
            values = [
                self._answer(as_png(picture), Path(folder) / f"{number}.png", prompt)
                for number, (picture, prompt) in enumerate(zip(to_pil(images), prompts, strict=True))
            ]
        return torch.tensor(values, device=images.device)

    def _answer(self, picture: bytes, file: Path, prompt: str) -> float:
        known = None
        if self.answers is not None:
            about = json.dumps([self.identity, prompt], sort_keys=True).encode()
            known = self.answers / f"{hashlib.sha256(about + picture).hexdigest()[:32]}.json"
            if known.is_file():
                return float(files.read_json(known, "value")["value"])
        file.write_bytes(picture)
        value = self.rate(file, prompt)
        if known is not None and math.isfinite(value):
            files.write_json(known, {"reward": self.name, "prompt": prompt, "value": value})
        return value

    @abstractmethod
    def rate(self, file: Path, prompt: str) -> float:
        """The picture's reward."""


class Command(External):
    """`cmd:./score.sh {image} {prompt}`: run once for each picture; it prints one number and exits with 0.

    The line is split into words as a shell would, and {image} and {prompt} are put into the words: no shell runs,
    so a prompt is never read as a command.
    """

    def __init__(self, line: str) -> None:
        self.name = f"cmd:{line}"
        try:
            self.words = shlex.split(line)
        except ValueError as error:
            raise InputError(f"reward {self.name!r} cannot be split into words: {error}") from None
        if "{image}" not in line:
            raise InputError(f"reward {self.name!r} must say where the picture's file goes: {{image}}")
        if shutil.which(self.words[0]) is None:
            raise InputError(f"reward {self.name!r}: there is no program {self.words[0]!r} that can be run")

    @property
    def uses_prompts(self) -> bool:
        return any("{prompt}" in word for word in self.words)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The line, and the program and every file that it names, by their contents."""
        named = [Path(word) for word in self.words[1:] if _is_file(word)]
        files = [Path(shutil.which(self.words[0]) or self.words[0]), *named]
        return identity(self.name, files, PICTURES)

    def rate(self, file: Path, prompt: str) -> float:
        # The prompt comes last, since it may hold anything.
        words = [word.replace("{image}", str(file)).replace("{prompt}", prompt) for word in self.words]
        try:
            status, printed, complaint = _run(words)
        except subprocess.TimeoutExpired:
            raise RewardError(f"reward {self.name!r} took more than {PATIENCE} seconds") from None
        except OSError as error:
            raise RewardError(f"reward {self.name!r} cannot be run: {error.strerror}") from None
        if status != 0:
            said = (complaint.strip().splitlines() or ["nothing on stderr"])[-1]
            raise RewardError(f"reward {self.name!r} failed with exit status {status}: {said}")
        try:
            return float(printed)
        except ValueError:
            raise RewardError(
                f"reward {self.name!r} printed {printed.strip()[:60]!r}; it must print one number"
            ) from None


def _run(words: Sequence[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr; where it takes too long or we are stopped, all that it has started ends too."""
    own_group = os.name == "posix"  # in which a Ctrl-C of ours does not reach it: the step ends first
    with subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0 if own_group else None,
    ) as process:
        try:
            printed, complaint = process.communicate(timeout=PATIENCE)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                if own_group:
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()
            raise
    return process.returncode, printed, complaint


class Question(External):
    """`ask:` or `ask:how cosy is it, 0 to 10?`: a person looks at each picture and types a number."""

    def __init__(self, question: str) -> None:
        self.name = f"ask:{question}"
        self.question = question.strip() or "how good is it?"
        # A person has no weights: who answered, and in which mood, is not known.
        self.identity = {**identity(f"ask:{self.question}", [], PICTURES), "weights": None}
        self._need_terminal()

    def _need_terminal(self) -> None:
        if sys.stdin is None or not sys.stdin.isatty():
            raise InputError(f"reward {self.name!r} asks a person, and there is no terminal to ask at")

    def rate(self, file: Path, prompt: str) -> float:
        self._need_terminal()
        while True:
            print(f"{file}  {prompt!r}: {self.question} ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                raise RewardError(f"reward {self.name!r} got no answer: the input has ended")
            try:
                value = float(line)
            except ValueError:
                value = math.nan
            if math.isfinite(value):
                return value
            print("please type a number", file=sys.stderr)


def _is_file(word: str) -> bool:
    """Is it the name of a file? A script that is given as a word may be longer than any name."""
    with contextlib.suppress(OSError, ValueError):
        return Path(word).is_file()
    return False


@contextlib.contextmanager
def keeping_answers(rewards: Iterable[Reward], folder: Path) -> Iterator[None]:
    """While open, answers of programs and people, which take long or cost something, are kept in a folder."""
    external = [each for reward in rewards for each in parts(reward) if isinstance(each, External)]
    for each in external:
        each.answers = folder
    try:
        yield
    finally:
        for each in external:
            each.answers = None


def asks(reward: Reward) -> bool:
    """Does a person give it, or a part of it?"""
    return any(isinstance(each, Question) for each in parts(reward))
