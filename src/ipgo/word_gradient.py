"""The rewards of prompts whose words are mixtures, to be differentiated by the words' weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ipgo.embeds import PromptEmbeds, concatenate
from ipgo.relaxation import Mixture, Relaxation, shortcut
from ipgo.rewards import score_with_gradient
from ipgo.sampling import decode, unconditional
from ipgo.substitution import Choice, Space, Template
from ipgo.task import Task


@dataclass(frozen=True)
class MixedWords:
    """How mixtures of the words of N rows are drawn (arXiv 2407.01606).

    Attributes:
        spaces: what each row may choose between: one for each prompt, or one for all.
        negative: does the negative prompt have words to choose?
        temperature: of the Gumbel-softmax.
        window: the part of denoising through which the one differentiated call moves, in `steps` steps.
    """

    task: Task
    spaces: Sequence[Space]
    negative: bool
    temperature: float
    window: tuple[float, float]
    steps: int
    relaxation: Relaxation

    def weights(self, logits: Tensor, noise: Tensor, allowed: Tensor) -> Tensor:
        """softmax((logits + Gumbel noise) / temperature) over the options (N, S, K) that are `allowed`."""
        logits = logits.masked_fill(~allowed, -torch.inf)
        # A row that lacks a slot has no option there: its softmax is NaN, and nothing reads it.
        return ((logits + noise) / self.temperature).softmax(-1).masked_fill(~allowed, 0)

    def rewards(
        self, weights: Tensor, choices: Sequence[Choice], numbers: Sequence[int], step: int
    ) -> Tensor:
        """(B,): the rewards of prompts by their numbers, drawn from mixtures of words.

        Args:
            choices: of each row; a slot holds as many tokens as the option that is chosen.
        """
        task = self.task
        prompts = [task.prompts[number] for number in numbers]
        rows = [0 if task.shared else each for each in numbers]
        cond, uncond = self._conditions(prompts, rows, choices, weights)
        start, end = self.window
        place = start + (end - start) * step / self.steps
        index = min(int(task.sampling.steps * place + 1e-9), task.sampling.steps - 1)
        own = task.backend.noise(task.noise_seeds(prompts, step), task.sampling.noise_steps(task.backend))
        images = decode(task.backend, shortcut(task.backend, cond, uncond, own, task.sampling, index))
        return score_with_gradient(task.reward, images, prompts)

    def template(self, row: int, prompt: str) -> Template:
        """The positive text of a row, whose words may all be fixed."""
        space = self.spaces[row]
        return space.positive if space.positive.slots else Template((prompt,))

    def mixes(self, row: int, choice: Choice) -> bool:
        """Can the words of a row be mixed around this choice? The texts in full are one window of tokens."""
        prompts = self.task.prompts if self.task.shared else [self.task.prompts[row]]
        chosen = self.spaces[row].split(choice)
        texts = [(self.template(row, prompt), chosen[0]) for prompt in prompts]
        negative = [(self.spaces[row].negative, chosen[1])] if self.negative else []
        return all(self.relaxation.mixes(*each) for each in (*texts, *negative))

    def _conditions(
        self, prompts: Sequence[str], rows: Sequence[int], choices: Sequence[Choice], weights: Tensor
    ) -> tuple[PromptEmbeds, PromptEmbeds | None]:
        """Both halves of guidance, each a mixture where it has slots."""
        backend, sampling = self.task.backend, self.task.sampling
        positive, negative = [], []
        for row, prompt in zip(rows, prompts, strict=True):
            space = self.spaces[row]
            count = len(space.positive.slots)
            chosen = space.split(choices[row])
            positive.append(Mixture(self.template(row, prompt), chosen[0], weights[row, :count]))
            negative.append(Mixture(space.negative, chosen[1], weights[row, count:]))
        with self.relaxation.mixed(positive):
            cond = backend.encode([mixture.text for mixture in positive])
        if not self.negative:
            return cond, unconditional(backend, cond, sampling)
        halves = []
        for number, mixture in enumerate(negative):
            own = cond.select(torch.tensor([number], device=cond.mask.device))
            with self.relaxation.mixed([mixture]):
                halves.append(backend.unconditional(mixture.text, own))
        return cond, concatenate(halves)
