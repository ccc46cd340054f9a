"""ChatGPT: a chat model rewrites the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ipgo.adapters import TextAdapter
from ipgo.chat import Chat
from ipgo.errors import InputError
from ipgo.rewards import terms
from ipgo.rewriting import Rewrites, ask_texts
from ipgo.search import search
from ipgo.task import Method, Progress, Request, Task

# What each reward values, by its name without "emoji-"; the others get GENERAL.
ALIGNMENT = "how faithfully the picture shows what the prompt says: every object, colour, number and relation"
BEAUTY = "how beautiful people find the picture: its composition, light, colours and finish"
PREFERENCE = (
    "how much people prefer the picture among those for the same prompt: faithful to it and well made"
)
VALUES = {
    "clip": ALIGNMENT,
    "likeness": ALIGNMENT,
    "judge": ALIGNMENT,
    "aesthetic": BEAUTY,
    "preference": PREFERENCE,
    "hpsv2": PREFERENCE,
    "hpsv2.1": PREFERENCE,
    "pickscore": PREFERENCE,
    "imagereward": PREFERENCE,
    "colorfulness": "how vivid and how varied the colours of the picture are",
    "contrast": "how strongly light and dark parts of the picture differ",
}
GENERAL = "how good the picture is, and how well it shows what the prompt says"

INSTRUCTION = (
    "You rewrite prompts for a text-to-image model so that its pictures score higher. The score measures {value}. "
    "Keep all that the prompt asks for, contradict none of it, and add what helps the score. "
    "Write plain descriptive English, at most {max_words} words. {form}"
)
ONE = "Answer with the rewritten prompt and nothing else."
SEVERAL = "Answer with {n} different rewritten prompts, numbered, one on each line, and nothing else."


@dataclass(frozen=True)
class ChatGPT(Method):
    """Let a chat model rewrite each prompt, told what the reward values. Needs no gradient.

    The instructions are ours: the comparison with ChatGPT-4o in arXiv 2503.21812 does not publish its own.

    Attributes:
        n: rewritten prompts for each prompt; 1 is taken as it is, of more the one with the highest reward.
        max_words: how long they may be, as it is told; the encoder's limit (with `chunk`, 1,024 bytes) cuts them.
        chat: the model, and how it is asked.
    """

    prompt_wise: ClassVar[bool] = True

    n: int = 1
    max_words: int = 60
    chat: Chat = Chat()

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, value in (("n", self.n), ("max_words", self.max_words)):
            if value < 1:
                raise InputError(f"{field} is {value}; it must be at least 1")

    def instruction(self, reward: str) -> str:
        """What the model is told about a reward of this name."""
        form = ONE if self.n == 1 else SEVERAL.format(n=self.n)
        return INSTRUCTION.format(value=_value(reward), max_words=self.max_words, form=form)

    def check(self, request: Request) -> None:
        """Before a model is loaded: `InputError` without a key, unless the answers are stored."""
        for prompt in request.prompts:
            self.chat.check(self.instruction(request.reward), prompt)

    def _search(self, task: Task, resume: Mapping[str, Tensor] | None) -> Iterator[Progress]:
        adapter = TextAdapter.start(task.backend, task.prompts, shared=task.shared)
        instruction = self.instruction(task.reward.name)

        def write(table: Rewrites, step: int) -> list[tuple[str, ...]]:
            found = [ask_texts(self.chat, task.backend, instruction, each, self.n) for each in task.prompts]
            return list(zip(*found, strict=True))

        return search(task, adapter, Rewrites(task.prompts, self.n, write), self.n, resume)


def _value(reward: str) -> str:
    """The values of a reward, or of the terms of a sum; a function in a file goes by its own name."""
    try:
        added = terms(reward)
    except InputError:  # the name of a function of the user's, which is no sum
        added = [(1.0, reward)]
    found = []
    for weight, name in added:
        value = VALUES.get(name.rpartition(":")[2].strip().removeprefix("emoji-"), GENERAL)
        found.append(value if weight > 0 else f"as a fault, {value}")
    return "; and ".join(dict.fromkeys(found))
