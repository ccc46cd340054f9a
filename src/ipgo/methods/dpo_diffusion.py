"""DPO-Diffusion: the words of the prompt, or of its negative prompt, found by gradient or by evolution."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ipgo.adapters import Adapter, TextAdapter
from ipgo.adapters.text import BYTES, fits
from ipgo.backends import Backend
from ipgo.chat import Chat
from ipgo.errors import InputError, RewardError, unknown
from ipgo.relaxation import Relaxation
from ipgo.sampling import Sampling
from ipgo.search import search
from ipgo.seeding import derive, generator
from ipgo.substitution import PLAIN, Choice, Space, negative_slots, synonym_slots
from ipgo.task import Method, Progress, Request, Task
from ipgo.thesaurus import WORDNET, check_word_list, word_list_of
from ipgo.training import FLOAT16_SCALE
from ipgo.vocabulary import draws_bundled_world
from ipgo.word_gradient import MixedWords

Target = Literal["positive", "negative", "both"]
Solver = Literal["gradient", "evolutionary", "hybrid"]

BUNDLED = "emoji"  # the word list of the bundled model's world
ATTEMPTS = 100  # draws of a candidate that was not seen before, and that the encoder takes
# As published: RMSprop with these settings on logits that are kept within a range, gradients clipped.
DECAY, MOMENTUM, TINY = 0.99, 0.5, 1e-8
MAX_GRADIENT, MAX_LOGIT = 0.025, 3.0
logger = logging.getLogger("ipgo")


@dataclass(frozen=True)
class DPODiffusion(Method):
    """Choose words for the prompt or its negative prompt out of a list (DPO-Diff, arXiv 2407.01606).

    The prompt as it is is the first candidate. "gradient" learns how likely each word is, from the gradient of
    the reward in mixtures of words, and draws its candidates from that; "evolutionary" mutates and crosses the
    best ones, and needs no gradient; "hybrid" begins that with draws from what the gradient learned.

    Attributes:
        target: what is reworded: the prompt by its synonyms (positive), the negative prompt by antonyms of the
            prompt's words and by general ones (negative), or both.
        solver: gradient, evolutionary or hybrid.
        word_list: a bundled word list (emoji, for the bundled model; general); a JSON file with "synonyms", "antonyms"
            and "negative"; for prompts of any words wordnet, or wordnet:FOLDER with its database, or llm, which asks
            `chat`. None is emoji for the bundled model, and wordnet for any other.
        candidates: prompts to draw and score, those of the gradient steps not counted.
        gradient_steps: steps of the gradient, each of which draws and scores a candidate as well; no more than half of
            `candidates` are made.
        lr: learning rate of the words' logits.
        temperature: of the Gumbel-softmax that mixes words: the lower, the closer to single words.
        window: the part of denoising, from 0 to 1, through which the gradient's one denoiser call moves.
        population: candidates of a generation.
        parents: the best candidates so far that a generation comes from.
        mutation: how probably a mutation changes a word.
        chat: the model that names words, with word_list llm.
    """

    target: Target = "negative"
    solver: Solver = "evolutionary"
    word_list: str | None = None
    candidates: int = 40
    gradient_steps: int = 20
    lr: float = 0.1
    temperature: float = 1.0
    window: tuple[float, float] = (0.3, 0.5)
    population: int = 20
    parents: int = 10
    mutation: float = 0.1
    chat: Chat = Chat()

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, allowed in (("target", Target), ("solver", Solver)):
            if getattr(self, field) not in get_args(allowed):
                raise unknown(field, getattr(self, field), get_args(allowed))
        for field in ("candidates", "gradient_steps", "population", "parents"):
            if getattr(self, field) < 1:
                raise InputError(f"{field} is {getattr(self, field)}; it must be at least 1")
        for field in ("lr", "temperature"):
            if not getattr(self, field) > 0:
                raise InputError(f"{field} is {getattr(self, field)}; it must be above 0")
        if not 0 <= self.window[0] <= self.window[1] <= 1:
            raise InputError(f"window is {list(self.window)}; it must be two rising numbers from 0 to 1")
        if not 0 < self.mutation <= 1:
            raise InputError(f"mutation is {self.mutation}; it must be above 0 and at most 1")

    @property
    def climbing(self) -> bool:
        return self.solver != "evolutionary"

    @property
    def climbs(self) -> int:
        """Steps with a gradient: a budget, which sets `candidates`, must leave some for what was learned."""
        return min(self.gradient_steps, max(1, self.candidates // 2)) if self.climbing else 0

    def words_for(self, backend: str) -> str:
        """The word list, where it is left to the backend."""
        return self.word_list or (BUNDLED if draws_bundled_world(backend) else WORDNET)

    def looked_up(self, shared: bool) -> dict[str, bool]:
        """What is needed of a prompt's words: nothing where one negative prompt is for all."""
        return {
            "synonyms": self.target != "negative" and not shared,
            "antonyms": self.target != "positive" and not shared,
        }

    def check(self, request: Request) -> None:
        """Before a model is loaded: `InputError` without the word list, or a key for one that is asked for."""
        self._check_shared(request.shared)
        scale = request.sampling.guidance_scale
        if self.target != "positive" and scale is not None and scale <= 1:
            raise self._unguided(scale)
        needed = self.looked_up(request.shared)
        check_word_list(self.words_for(request.backend), request.prompts, self.chat, **needed)

    def _search(self, task: Task, resume: Mapping[str, Tensor] | None) -> Iterator[Progress]:
        if self.climbing and not task.reward.differentiable:
            raise RewardError(
                f"reward {task.reward.name!r} has no gradient, which solver={self.solver!r} needs; "
                "use solver='evolutionary'"
            )
        if self.target != "positive":
            self._check_guidance(task.backend, task.sampling)
        spaces = self.spaces(task)
        backend = task.backend
        adapter = TextAdapter(None if task.shared else task.prompts, backend.padding, backend.long_prompts)
        return search(task, adapter, _Words(self, task, spaces), self.climbs + self.candidates, resume)

    def _check_guidance(self, backend: Backend, sampling: Sampling) -> None:
        """`InputError` where no negative prompt takes part, so that its words would change nothing."""
        if backend.guidance != "classifier-free":
            raise InputError(
                f"target is {self.target!r}; backend {backend.name!r} has {backend.guidance} guidance, which knows no "
                "negative prompt, so target must be 'positive'"
            )
        if not sampling.guided(backend):
            raise self._unguided(sampling.scale(backend))

    def _unguided(self, scale: float) -> InputError:
        return InputError(
            f"sampling.guidance_scale is {scale}; "
            f"target={self.target!r} needs one above 1, since there is no negative prompt without guidance"
        )

    def _check_shared(self, shared: bool) -> None:
        if shared and self.target != "negative":
            raise InputError(
                f"shared is true; prompts can share a negative prompt alone, so target must be 'negative', "
                f"not {self.target!r}"
            )

    def spaces(self, task: Task) -> list[Space]:
        """What each row may choose between.

        Raises:
            InputError: nothing at all, or `shared` with a target that belongs to single prompts.
        """
        start, spec = task.sampling.negative_prompt, self.words_for(task.backend.origin)
        self._check_shared(task.shared)
        if task.shared:
            words = word_list_of(spec, "", self.chat, **self.looked_up(True))
            spaces = [Space(negative=negative_slots("", words, start))]
        else:
            spaces = [self._space(spec, prompt, start) for prompt in task.prompts]
        for prompt, space in zip(task.prompts, spaces, strict=False):
            if not space.slots:
                whose = "a shared negative prompt" if task.shared else f"prompt {prompt!r}"
                raise InputError(
                    f"word_list {spec!r} has no words for {whose} with target={self.target!r}; "
                    "use wordnet, llm or a JSON file"
                )
        return spaces

    def _space(self, spec: str, prompt: str, start: str) -> Space:
        words = word_list_of(spec, prompt, self.chat, **self.looked_up(False))
        return Space(
            PLAIN if self.target == "negative" else synonym_slots(prompt, words),
            PLAIN if self.target == "positive" else negative_slots(prompt, words, start),
        )


class _Words:
    """Candidates for N rows with up to S slots of up to K options. Every draw comes from a seed of its own."""

    def __init__(self, method: DPODiffusion, task: Task, spaces: Sequence[Space]) -> None:
        self.method, self.task, self.spaces = method, task, spaces
        negative, climbs = method.target != "positive", method.climbs
        self.mixed = None
        if climbs:
            relaxation = Relaxation(task.backend)  # refuses what cannot be mixed, before anything is drawn
            self.mixed = MixedWords(
                task, spaces, negative, method.temperature, method.window, climbs, relaxation
            )
            for row, space in enumerate(spaces):
                if not self.mixed.mixes(row, [0] * len(space.slots)):
                    whose = "a prompt" if task.shared else f"prompt {task.prompts[row]!r}"
                    raise InputError(
                        f"the tokens of {whose} are cut off, or not those of its words one by one; "
                        "use solver='evolutionary'"
                    )
        self.used_up: set[int] = set()
        slots = max(len(space.slots) for space in spaces)
        options = max(len(slot) for space in spaces for slot in space.slots)
        self.allowed = torch.zeros(len(spaces), slots, options, dtype=torch.bool)
        for row, space in enumerate(spaces):
            for number, slot in enumerate(space.slots):
                self.allowed[row, number, : len(slot)] = True
        logits = torch.zeros(self.allowed.shape, dtype=torch.promote_types(task.backend.dtype, torch.float32))
        if method.climbs:
            logits[..., 0] = 1  # the gradient starts from the text as it is, evolution from anywhere
        total = method.climbs + method.candidates
        half = task.backend.dtype == torch.float16
        # Everything that lives from step to step.
        self.memory = {
            "logits": logits,
            "squares": torch.zeros_like(logits),
            "momentum": torch.zeros_like(logits),
            "loss_scale": torch.full((len(spaces),), FLOAT16_SCALE if half else 1.0),
            "choices": torch.zeros(len(spaces), total, slots, dtype=torch.long),
            "rewards": torch.full((len(spaces), total), torch.nan),
        }

    # -- candidates -------------------------------------------------------------------------------------

    def propose(self, adapter: Adapter, step: int) -> None:
        assert isinstance(adapter, TextAdapter)
        choices = [self._choose(row, step) for row in range(len(self.spaces))]
        if step < self.method.climbs:
            self._climb(choices, step)
        if step == 0:
            choices = [[0] * len(choice) for choice in choices]  # the text as it is
        for row, choice in enumerate(choices):
            self.memory["choices"][row, step, : len(choice)] = torch.tensor(choice)
        texts = [self._texts(row, choice) for row, choice in enumerate(choices)]
        adapter.set_texts([positive for positive, _ in texts])
        adapter.set_negatives([negative for _, negative in texts])

    def _choose(self, row: int, step: int) -> list[int]:
        """A choice that is new and fits the encoder; in a space that is used up, the text as it is."""
        count = len(self.spaces[row].slots)
        seen = self.memory["choices"][row, :step, :count].tolist()
        for attempt in range(ATTEMPTS):
            choice: list[int] = self._draw(row, step, attempt)[:count].tolist()
            # A gradient step takes the draw that its mixture belongs to, seen before or not.
            if step < self.method.climbs:
                new = self.mixed is not None and self._fits(row, choice) and self.mixed.mixes(row, choice)
            else:
                new = choice not in seen and self._fits(row, choice)
            if new:
                return choice
        if step >= self.method.climbs and row not in self.used_up:
            self.used_up.add(row)
            whose = repr(self._of(row)) if self._of(row) else "the negative prompt"
            logger.warning(
                "%s: no further text is new and fits the encoder; further candidates are the one as it is",
                whose,
            )
        return [0] * count

    def _draw(self, row: int, step: int, attempt: int) -> Tensor:
        """(S,): the more attempts have failed, the bolder the draw, until it is uniform."""
        method, count = self.method, len(self.spaces[row].slots)
        first = method.climbs + method.population  # of the candidates that have parents
        if method.solver == "gradient" or step < first:
            logits = self.memory["logits"][row].masked_fill(~self.allowed[row], -torch.inf)
            return (logits * (1 - attempt / ATTEMPTS) + self._gumbel(row, step, attempt)).argmax(-1)
        born = first + (step - first) // method.population * method.population
        ranks = self.memory["rewards"][row, :born].nan_to_num(nan=-torch.inf)
        best = ranks.sort(descending=True, stable=True).indices[: method.parents]
        source = self._source("evolution", row, step, attempt)
        pair = best[torch.randint(len(best), (2,), generator=source)]
        mother, father = self.memory["choices"][row, pair, :count]
        if (step + attempt) % 2:  # where crossing finds nothing new, mutation does
            return torch.where(torch.rand(count, generator=source) < 0.5, mother, father)
        options = self.allowed[row, :count].sum(-1)
        anything = (torch.rand(count, generator=source) * options).long()
        rate = method.mutation + attempt / ATTEMPTS
        return torch.where(torch.rand(count, generator=source) < rate, anything, mother)

    def _gumbel(self, row: int, step: int, attempt: int = 0) -> Tensor:
        """(S, K) standard Gumbel noise at the options that a row has."""
        source = self._source("gumbel", row, step, attempt)
        noise = torch.zeros_like(self.memory["logits"][row])
        count = int(self.allowed[row].sum())
        noise[self.allowed[row]] = -torch.empty(count, dtype=noise.dtype).exponential_(generator=source).log()
        return noise

    def _source(self, name: str, row: int, *keys: int) -> torch.Generator:
        return generator(derive(self.task.seed, name, self._of(row), *keys))

    def _of(self, row: int) -> str:
        """The prompt that a row belongs to; "" for a shared one."""
        return "" if self.task.shared else self.task.prompts[row]

    def _fits(self, row: int, choice: Choice) -> bool:
        return all(fits(self.task.backend, text) for text in self._texts(row, choice))

    def _texts(self, row: int, choice: Choice) -> tuple[str, str]:
        """The prompt and the negative prompt; "" for one that stays as it is and is too long to be written down."""
        space = self.spaces[row]
        texts = zip(space.texts(choice), space.split(choice), strict=True)
        positive, negative = (
            text if any(chosen) or len(text.encode()) <= BYTES else "" for text, chosen in texts
        )
        return positive, negative

    # -- the gradient -----------------------------------------------------------------------------------

    def _climb(self, choices: Sequence[Choice], step: int) -> None:
        """One step of RMSprop along the gradient of the mixtures' rewards."""
        count = len(self.task.prompts)
        batches = [[number] for number in range(count)] if self.task.shared else [list(range(count))]
        scale = self.memory["loss_scale"]  # (N,)
        grad = torch.zeros_like(self.memory["logits"])
        for batch in batches:
            with torch.enable_grad():
                logits = self.memory["logits"].clone().requires_grad_()
                rewards = self.mixed_rewards(logits, choices, batch, step)
                if rewards.requires_grad:
                    objective = (rewards * scale.to(rewards)).sum() / len(batches)
                    (own,) = torch.autograd.grad(objective, logits, allow_unused=True)
                    if own is not None:  # where every slot is empty in this draw
                        grad += own
        grad /= scale[:, None, None]
        finite = grad.isfinite()
        scale /= torch.where(finite.flatten(1).all(1), 1, 2)
        scale.clamp_(min=1)
        grad = grad.where(finite, 0).clamp(-MAX_GRADIENT, MAX_GRADIENT)
        squares, momentum = self.memory["squares"], self.memory["momentum"]
        squares.mul_(DECAY).addcmul_(grad, grad, value=1 - DECAY)
        momentum.mul_(MOMENTUM).add_(grad / (squares.sqrt() + TINY))
        self.memory["logits"].add_(momentum, alpha=self.method.lr).clamp_(0, MAX_LOGIT)

    def mixed_rewards(
        self, logits: Tensor, choices: Sequence[Choice], numbers: Sequence[int], step: int
    ) -> Tensor:
        """(B,): the rewards of prompts by their numbers, drawn from mixtures of words, to be differentiated."""
        assert self.mixed is not None
        noise = torch.stack([self._gumbel(row, step) for row in range(len(self.spaces))])
        weights = self.mixed.weights(logits, noise, self.allowed)
        return self.mixed.rewards(weights, choices, numbers, step)

    # -- the loop's side --------------------------------------------------------------------------------

    def tell(self, step: int, rewards: Tensor) -> None:
        self.memory["rewards"][:, step] = rewards

    def resumed(self) -> None:
        """The memory is all there is."""
