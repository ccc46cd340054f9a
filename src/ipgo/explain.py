"""What inserted embeddings mean and do: nearest words, drift, attention, and what is lost without each one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ipgo.adapters import Adapter, InsertionAdapter, JointAdapter
from ipgo.backends import Backend
from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError
from ipgo.rewards import Reward, score
from ipgo.sampling import Sampling, denoise, sample, unconditional
from ipgo.vocabulary import vocabulary

WORDS = 64  # words encoded at once
NEGATIVE = "negative "  # begins the name of a side of the negative prompt


@dataclass(frozen=True)
class Inserted:
    """One inserted embedding.

    Attributes:
        side, position: "prefix" or "suffix", also of the negative prompt ("negative prefix"), and where in it, from 0.
        words: the nearest words of the vocabulary with their cosines, the nearest first.
        norm: its Euclidean norm.
        to_prompt: its cosine with the mean of the prompt's own states, or the negative prompt's.
        attention: its share of the denoiser's cross-attention in each step, in its half of guidance, mean over layers,
            heads, places and images; () where text and image attend to each other in one (SD3, FLUX), which is not
            looked into.
        without: what the reward changes by if it is left out, mean over images: below 0 if it helped.
    """

    side: str
    position: int
    words: tuple[tuple[str, float], ...]
    norm: float
    to_prompt: float
    attention: tuple[float, ...]
    without: float


@dataclass(frozen=True)
class Explanation:
    """What was inserted around a prompt.

    Attributes:
        reward, value, raw: its name, its mean over the seeds with all embeddings, and for the prompt as it is.
        prompt_norm: median norm of the prompt's own states.
        drift: |mean of all text states - mean of the prompt's own| / |mean of the prompt's own|.
        text_attention, padding_attention: shares in each step of the prompt's own states and of the padding's;
            with those inserted around the prompt they add up to 1. Or () as there.
        inserted: prefix first, then the suffix, and those of the negative prompt.
    """

    prompt: str
    seeds: tuple[int, ...]
    reward: str
    value: float
    raw: float
    prompt_norm: float
    drift: float
    text_attention: tuple[float, ...]
    padding_attention: tuple[float, ...]
    inserted: tuple[Inserted, ...]


BEGINS = ("▁", "Ġ")  # of a token that begins a word: in T5's and Gemma's vocabulary, and in Qwen's


class Vocabulary:
    """Words in the text encoder's output space: each is the state of its last token, alone in a prompt.

    With several text encoders, whose states stand one after another (SD3), a word has a state of each.
    """

    def __init__(self, backend: Backend, words: Sequence[str]) -> None:
        self.words = tuple(words)
        states = []
        for start in tqdm(range(0, len(words), WORDS), "words", disable=None, leave=False):
            with torch.no_grad():
                encoded = backend.encode(words[start : start + WORDS])
            rows = zip(encoded.embeds.float(), encoded.ends(), strict=True)
            states += [own[ends - 1] for own, ends in rows]  # before the end marks
        self.states = F.normalize(torch.stack(states), dim=-1) if states else None  # (V, R, D)

    @classmethod
    def of(cls, backend: Backend) -> Vocabulary:
        """The words that the backend's folder names, or else all words of its tokenizer; none if it has neither."""
        known = vocabulary(backend.name)
        if known is not None:
            return cls(backend, known["words"])
        tokenizer: Any = getattr(getattr(backend, "pipe", None), "tokenizer", None)
        tokens = tokenizer.get_vocab() if tokenizer is not None else {}
        words = {token.removesuffix("</w>") for token in tokens if token.endswith("</w>")}
        words |= {token[1:] for token in tokens if token[:1] in BEGINS}
        # CLIP writes everything in small letters before it looks it up.
        plain = sorted(word for word in words if word.isascii() and word.isalnum() and word == word.lower())
        return cls(backend, plain)

    def nearest(self, vectors: Tensor, count: int) -> list[tuple[tuple[str, float], ...]]:
        """The words with the highest cosines to each of (n, D), and these."""
        if self.states is None:
            return [() for _ in vectors]
        # Of a word's states the nearest counts.
        cosines = torch.einsum("nd,vrd->nvr", F.normalize(vectors.float(), dim=-1), self.states).amax(-1)
        values, numbers = cosines.topk(min(count, len(self.words)))
        return [
            tuple((self.words[number], value) for number, value in zip(*pair, strict=True))
            for pair in zip(numbers.tolist(), values.tolist(), strict=True)
        ]


def explain(
    backend: Backend,
    adapter: Adapter,
    prompt: str,
    seeds: Sequence[int],
    sampling: Sampling,
    reward: Reward,
    words: Vocabulary,
    top: int = 3,
) -> Explanation:
    """Explain what an adapter inserts around a prompt, on images from some seeds. The backend stays as it is.

    Raises:
        InputError: the adapter holds no inserted embeddings, or none for this prompt; or there are no seeds.
    """
    adapter = check_adapter(adapter)
    if not seeds:
        raise InputError("seeds is empty; give at least one")
    look = _Look(backend, adapter, prompt, tuple(seeds), sampling)
    shares, negative_shares = look.attention()  # (T, n + L + m) each, or (0, n + L + m)
    value = look.value(reward)

    def inserted_of(half: str, whole: PromptEmbeds, own: PromptEmbeds, shares: Tensor) -> list[Inserted]:
        """What is inserted around these states, for which `half` stands in the names of its sides."""
        before, length = adapter.insertion.num_prefix, own.length
        places = [*range(before), *range(before + length, whole.length)]
        vectors, center = whole.embeds[0, places].float(), adapter.means(own, whole)[0][0].float()
        return [
            Inserted(
                side=half + ("prefix" if place < before else "suffix"),
                position=place if place < before else place - before - length,
                words=nearest,
                norm=float(vector.norm()),
                to_prompt=float(torch.cosine_similarity(vector, center, dim=0)),
                attention=tuple(shares[:, place].tolist()),
                without=look.value(reward, without={half: place}) - value,
            )
            for place, vector, nearest in zip(places, vectors, words.nearest(vectors, top), strict=True)
        ]

    inserted = inserted_of("", look.cond, look.original, shares)
    if adapter.insertion.negative and look.uncond is not None and look.negative is not None:
        inserted += inserted_of(NEGATIVE, look.uncond, look.negative, negative_shares)
    prefix, length = adapter.insertion.num_prefix, look.original.length
    own, text = shares[:, prefix : prefix + length], look.original.mask[0].cpu()
    center, moved = (mean[0] for mean in adapter.means(look.original, look.cond))
    return Explanation(
        prompt=prompt,
        seeds=tuple(seeds),
        reward=reward.name,
        value=value,
        raw=look.raw(reward),
        prompt_norm=float(look.original.norm()[0]),
        drift=float((moved - center).norm() / center.norm()),
        text_attention=tuple(own[:, text].sum(1).tolist()),
        padding_attention=tuple(own[:, ~text].sum(1).tolist()),
        inserted=tuple(inserted),
    )


def check_adapter(adapter: Adapter) -> InsertionAdapter:
    """The inserted embeddings of an adapter, which may hold noise besides them; `InputError` if it has none."""
    if isinstance(adapter, JointAdapter):
        adapter = adapter.inserted
    if not isinstance(adapter, InsertionAdapter):
        raise InputError(
            f"this adapter is of kind {adapter.kind!r}; only inserted embeddings are explained "
            "(kinds 'insertion' and 'joint')"
        )
    return adapter


def _without(states: PromptEmbeds, place: int) -> PromptEmbeds:
    """The states (B, L - 1, D) that are left if the one at `place` is taken out."""
    return states.keep([number for number in range(states.length) if number != place])


class _Look:
    """One prompt on S seeds, drawn as often as it takes, never with gradient."""

    def __init__(
        self, backend: Backend, adapter: Adapter, prompt: str, seeds: tuple[int, ...], sampling: Sampling
    ) -> None:
        self.backend, self.adapter, self.sampling = backend, adapter, sampling
        self.prompts = [prompt] * len(seeds)
        with torch.no_grad():
            self.original = backend.encode(self.prompts)
            self.negative = unconditional(backend, self.original, sampling)
            self.cond = adapter.condition(backend, self.prompts, self.original)
            # Also that of the prompt without one of its embeddings: the effect is that of nothing else.
            self.uncond = adapter.unconditional(backend, self.prompts, self.cond, sampling)
        self.noise = adapter.noise(backend, self.prompts, seeds, sampling.noise_steps(backend))

    def value(self, reward: Reward, without: Mapping[str, int] | None = None) -> float:
        """The reward's mean over the seeds, with all that is inserted but for a place of one half."""
        gone = without or {}
        cond = _without(self.cond, gone[""]) if "" in gone else self.cond
        uncond = self.uncond
        if uncond is not None and NEGATIVE in gone:
            uncond = _without(uncond, gone[NEGATIVE])
        return self._mean(reward, cond, uncond)

    def raw(self, reward: Reward) -> float:
        """The same of the prompt as it is."""
        return self._mean(reward, self.original, self.negative)

    @torch.no_grad()
    def _mean(self, reward: Reward, cond: PromptEmbeds, uncond: PromptEmbeds | None) -> float:
        images = sample(self.backend, cond, uncond, self.noise, self.sampling)
        return float(score(reward, images, self.prompts).mean())

    def attention(self) -> tuple[Tensor, Tensor]:
        """(T, L) for each half: where the denoiser looks in each step, as shares of the states of `cond` and `uncond`.

        (0, L) if no layer shows it. Without guidance the second is that of the first.
        """
        captured: list[tuple[Tensor, Tensor]] = []
        lengths = self.cond.length, (self.uncond or self.cond).length
        layers = [module for module in self.backend.modules["denoiser"].modules() if _attends(module)]
        if not layers:
            return torch.zeros(0, lengths[0]), torch.zeros(0, lengths[1])

        def capture(layer: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            weights = attention_weights(layer, positional[0], **named).float()  # (2 B or B, heads, places, L)
            rows = len(self.prompts)  # guidance puts the prompt's own half last
            halves = zip((weights[-rows:], weights[:rows]), lengths, strict=True)
            own, negative = (half.mean((0, 1, 2))[:length] for half, length in halves)
            captured.append((own, negative))

        handles = [layer.register_forward_pre_hook(capture, with_kwargs=True) for layer in layers]
        steps = []
        try:
            with torch.no_grad():
                for _ in denoise(self.backend, self.cond, self.uncond, self.noise, self.sampling):
                    steps.append([torch.stack(half).mean(0) for half in zip(*captured, strict=True)])
                    captured.clear()
        finally:
            for handle in handles:
                handle.remove()
        own, negative = (torch.stack(half).cpu() for half in zip(*steps, strict=True))
        return own, negative


def _attends(module: torch.nn.Module) -> bool:
    return bool(getattr(module, "is_cross_attention", False)) and hasattr(module, "get_attention_scores")


def attention_weights(
    layer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    **unused: Any,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) of a diffusers cross-attention layer from its inputs: (B, heads, places, L)."""
    with torch.no_grad():
        query = _normed(layer, layer.norm_q, layer.to_q(hidden_states))
        key = _normed(layer, layer.norm_k, layer.to_k(encoder_hidden_states))
        query, key = (layer.head_to_batch_dim(each) for each in (query, key))
        rows, length = encoder_hidden_states.shape[:2]
        mask = layer.prepare_attention_mask(attention_mask, length, rows)
        weights: Tensor = layer.get_attention_scores(query, key, mask)
    return weights.view(rows, layer.heads, -1, length)


def _normed(layer: Any, norm: torch.nn.Module | None, states: Tensor) -> Tensor:
    """Queries or keys (B, places, heads x d) as some families normalise them: over all heads at once, or each alone."""
    if norm is None:
        return states
    if next(norm.parameters()).shape[-1] == states.shape[-1]:
        whole: Tensor = norm(states)
        return whole
    heads = states.view(*states.shape[:2], layer.heads, -1)
    apart: Tensor = norm(heads).flatten(2)
    return apart
