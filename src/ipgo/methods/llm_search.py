"""LLM search: a chat model proposes prompts, sees their rewards, and proposes better ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ipgo.adapters import TextAdapter
from ipgo.chat import Chat, without_thoughts
from ipgo.errors import InputError
from ipgo.rewriting import Rewrites, ask_texts
from ipgo.search import search
from ipgo.task import Method, Progress, Request, Task

INSTRUCTION = (
    "You improve prompts for a text-to-image model. The pictures of each prompt are scored against the user's "
    "prompt; nobody knows what the score values, but higher is better, and past trials show what raises it. "
    "Keep all that the user's prompt asks for. Write plain descriptive English, at most {max_words} words. "
    "Answer with {n} new prompts that differ from one another and from all trials, numbered, one on each line, "
    "and nothing else."
)
HINT = (
    "You study trials of prompts for a text-to-image model and their scores, of which higher is better. Say in "
    "at most three sentences which wordings seem to raise the score and which seem to lower it."
)


@dataclass(frozen=True)
class LLMSearch(Method):
    """Search rewritten prompts with a chat model that sees past rewards. Needs no gradient.

    After RATTPO (arXiv 2506.16853): the model is not told what the reward is; it gets the prompts tried so far
    with their rewards and a hint, which it drew up itself from these. The prompts in which it is asked are ours.
    The first candidate is the user's own prompt, so that what is kept is never worse on the seeds of the search, in the
    `sampling.fit_steps` steps that candidates are drawn in.

    Attributes:
        rounds: how often the model proposes.
        n: prompts that it proposes in a round.
        shown: how many of the best trials it sees.
        hints: does it also see a hint, for one question more in each round but the first?
        max_words: how long prompts may be, as it is told; the encoder's limit (with `chunk`, 1,024 bytes) cuts them.
        chat: the model, and how it is asked.
    """

    prompt_wise: ClassVar[bool] = True

    rounds: int = 5
    n: int = 4
    shown: int = 20
    hints: bool = True
    max_words: int = 60
    chat: Chat = Chat(temperature=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("rounds", "n", "shown", "max_words"):
            if getattr(self, field) < 1:
                raise InputError(f"{field} is {getattr(self, field)}; it must be at least 1")

    def check(self, request: Request) -> None:
        """Before a model is loaded: `InputError` without a key, unless the first answers are stored."""
        for prompt in request.prompts:
            self.chat.check(self._instruction(), _question(prompt, [], ""))

    def _search(self, task: Task, resume: Mapping[str, Tensor] | None) -> Iterator[Progress]:
        adapter = TextAdapter.start(task.backend, task.prompts, shared=task.shared)
        total = 1 + self.rounds * self.n

        def write(table: Rewrites, step: int) -> list[tuple[str, ...]]:
            if step == 0:
                return [("",) * len(task.prompts)]
            turn = (step - 1) // self.n  # two rounds may have the same best trials: each wants its own answer
            found = [
                ask_texts(
                    self.chat,
                    task.backend,
                    self._instruction(),
                    self._trials(table, row, step, turn),
                    self.n,
                    turn,
                )
                for row in range(len(task.prompts))
            ]
            return list(zip(*found, strict=True))

        return search(task, adapter, Rewrites(task.prompts, total, write), total, resume)

    def _instruction(self) -> str:
        return INSTRUCTION.format(max_words=self.max_words, n=self.n)

    def _trials(self, table: Rewrites, row: int, step: int, turn: int) -> str:
        """The question of a round: the first shows no trials, so that it is known before anything is drawn."""
        prompt = table.prompts[row]
        if step == 1:
            return _question(prompt, [], "")
        different = dict(table.history(row, step))
        trials = sorted(different.items(), key=lambda trial: trial[1])[-self.shown :]
        hint = self.chat.ask(HINT, _question(prompt, trials, ""), turn) if self.hints else ""
        return _question(prompt, trials, without_thoughts(hint))


def _question(prompt: str, trials: Sequence[tuple[str, float]], hint: str) -> str:
    lines = [f"The user's prompt: {prompt}"]
    if trials:
        lines += ["", "Trials, the best one last:", *(f"{reward:.4g}: {text}" for text, reward in trials)]
    if hint:
        lines += ["", f"Hint: {' '.join(hint.split())}"]
    return "\n".join(lines)
