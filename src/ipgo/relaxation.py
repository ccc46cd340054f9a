"""Texts between texts: mixtures of words at the text encoder's input, and a short way for their gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ipgo.backends import Backend
from ipgo.backends.text import unpadded
from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError
from ipgo.sampling import Sampling, denoise
from ipgo.substitution import Choice, Template


@dataclass(frozen=True)
class Mixture:
    """A text whose slots hold sum over k of weights[s, k] E[k], E[k] (n, W) the token embeddings of option k.

    A slot holds as many tokens as the option that `choice` names. Only options of just so many tokens are
    mixed; the weight of the others falls on zero embeddings, as if nothing stood there, so that their logits
    get a gradient too. With all weight on `choice`, this is the text itself.

    Attributes:
        weights: (S, K), with K at least the number of options of every slot.
    """

    template: Template
    choice: Choice
    weights: Tensor

    @property
    def text(self) -> str:
        return self.template.text(self.choice)


class Relaxation:
    """Lets a backend's text encoder read mixtures.

    Raises:
        InputError: it has several encoders, whose tokens need not be the same, one that reads a text otherwise than
            between two marks, or one that reads prompts in windows.
    """

    def __init__(self, backend: Backend) -> None:
        if "text_encoder_2" in backend.modules or len(backend.tokenizer("").input_ids) != 2:
            raise InputError(
                f"the gradient of words needs one CLIP text encoder; backend {backend.name!r} has others: "
                "use solver='evolutionary'"
            )
        if backend.long_prompts == "chunk":
            raise InputError(
                "long_prompts is 'chunk'; the gradient of words reads one window: use 'truncate', "
                "or solver='evolutionary'"
            )
        self.backend = backend
        self._known: dict[str, Tensor] = {}

    def tokens(self, texts: Sequence[str]) -> list[Tensor]:
        """(n, W) for each text: its token embeddings, without the marks of start and end."""
        backend = self.backend
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            table: Any = backend.modules["text_encoder"].get_input_embeddings()  # type: ignore[operator]
            for text, ids in zip(new, unpadded(backend.tokenizer, new), strict=True):
                end = min(len(ids), backend.max_tokens) - 1  # a text may be cut
                own = torch.tensor(ids[1:end], dtype=torch.long, device=backend.text_device)
                self._known[text] = table(own).detach()
        return [self._known[text] for text in texts]

    @contextmanager
    def mixed(self, mixtures: Sequence[Mixture]) -> Iterator[None]:
        """While open, the text encoder reads mixtures[i] in row i, where it must be given their texts.

        Raises:
            InputError: the tokens of a text are not those of its pieces.
        """
        places = [self._places(mixture) for mixture in mixtures]

        def mix(output: Tensor) -> Tensor:
            mixed = output.clone()  # (B, L, W)
            for row, own in enumerate(places):
                for start, states in own:
                    mixed[row, start : start + len(states)] = states.to(mixed)
            return mixed

        with _reading(self.backend, mix):
            yield

    def mixes(self, template: Template, choice: Choice) -> bool:
        """Are the tokens of a text those of its pieces, so that they can be mixed?"""
        pieces = self.tokens(template.pieces(choice))
        return sum(map(len, pieces)) == len(self.tokens([template.text(choice)])[0])

    def _places(self, mixture: Mixture) -> list[tuple[int, Tensor]]:
        """Where each slot that is not empty starts, and the mixture (n, W) that it holds."""
        if not self.mixes(mixture.template, mixture.choice):
            raise InputError(
                f"the tokens of {mixture.text!r} are cut off, or not those of its words one by one; "
                "use solver='evolutionary'"
            )
        counts = [len(states) for states in self.tokens(mixture.template.pieces(mixture.choice))]
        starts = itertools.accumulate(counts, initial=1)  # after the mark of the start
        found = []
        for number, (start, count) in enumerate(zip(starts, counts, strict=False)):
            if number % 2 and count:
                options = self.tokens(mixture.template.slots[number // 2])
                alike = [k for k, states in enumerate(options) if len(states) == count]
                weights = mixture.weights[number // 2, alike]
                states = torch.stack([options[k] for k in alike]).to(weights.dtype)  # (K', n, W)
                found.append((start, torch.einsum("k,knw->nw", weights.to(states.device), states)))
        return found


@contextmanager
def _reading(backend: Backend, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, the text encoder reads what `change` makes of the token embeddings (B, L, W) that it looks up."""
    encoder: Any = backend.modules["text_encoder"]
    handle = encoder.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: change(output)
    )
    try:
        yield
    finally:
        handle.remove()


def shortcut(
    backend: Backend,
    cond: PromptEmbeds,
    uncond: PromptEmbeds | None,
    noise: Tensor,
    sampling: Sampling,
    index: int,
) -> Tensor:
    """The clean latents (B, C, h, w) that step `index` (0 is the first) foresees.

    The steps before it carry no gradient, those after it are not taken: one denoiser call is differentiated
    (DPO-Diff's shortcut text gradient, arXiv 2407.01606). The estimate is that of DDIM (arXiv 2010.02502,
    eq. 12).

    Raises:
        InputError: the scheduler has no noise levels, as those of flow matching.
    """
    scheduler = backend.scheduler(sampling.steps, noise[:, 0])
    if not hasattr(scheduler, "alphas_cumprod"):
        raise InputError(f"the gradient of words needs a diffusion scheduler, not {type(scheduler).__name__}")
    walk = denoise(backend, cond, uncond, noise, sampling, backprop_from=index)
    step = next(itertools.islice(walk, index, None))
    # x = sqrt(a) x0 + sqrt(1 - a) e. Some schedulers walk with x / sqrt(a), and scale it for the denoiser.
    noisy = scheduler.scale_model_input(step.latents, step.timestep)
    scale = scheduler.scale_model_input(torch.ones_like(step.latents[:1, :1, :1, :1]), step.timestep)
    alpha = scale.square()
    if float(scheduler.init_noise_sigma) == 1:
        alpha = scheduler.alphas_cumprod[int(step.timestep)].to(step.latents)
    kind, output = scheduler.config.prediction_type, step.prediction
    if kind == "sample":
        return output
    clean: Tensor
    if kind == "v_prediction":
        clean = alpha.sqrt() * noisy - (1 - alpha).sqrt() * output
    else:
        clean = (noisy - (1 - alpha).sqrt() * output) / alpha.sqrt()
    return clean
