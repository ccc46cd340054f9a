"""Does a gradient of this reward reach embeddings inserted into this backend? One small step, and what is wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ipgo.adapters import InsertionAdapter
from ipgo.backends import Backend
from ipgo.devices import name_of
from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError, NotFiniteError, RewardError
from ipgo.insertion import Insertion
from ipgo.memory import LiveMemory
from ipgo.methods import WITHOUT_GRADIENT
from ipgo.plan import Workload
from ipgo.rewards import Ceiling, Reward, WeightedSum, is_unsettled, parts, score
from ipgo.sampling import Sampling, sample
from ipgo.training import FLOAT16_SCALE

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, in plain words; `advice` says what to do where it is not good."""

    text: str
    advice: str = ""

    @property
    def good(self) -> bool:
        return not self.advice


def examine(
    backend: Backend, reward: Reward, prompt: str, sampling: Sampling, backprop_steps: int
) -> Iterator[Finding]:
    """Draw one picture of `prompt` with embeddings inserted, score it, and follow the gradient back.

    Ends after the first finding from which nothing more can be learned.

    Raises:
        InputError: a prompt that is too long, or more `backprop_steps` than steps.
    """
    check_steps(sampling, backprop_steps)
    memory, started = LiveMemory(), time.monotonic()
    weights = sum(Workload(backend, reward, sampling).weights(memory).values())
    width = f"embeddings {backend.embed_dim} wide"
    yield Finding(f"backend {backend.name}: {name_of(backend.dtype)} on {backend.device}, {width}")
    found: list[Finding] = []
    try:
        with memory, torch.enable_grad():  # closed before the yield: modes would leak into the consumer
            found.extend(_follow(backend, reward, prompt, sampling, backprop_steps))
    except torch.OutOfMemoryError:
        advice = "`ipgo plan` says what fits; --backprop-steps 1 and a smaller --image-size need less"
        found.append(Finding(f"out of memory on {backend.device}", advice))
    yield from found
    seconds = time.monotonic() - started
    yield Finding(
        f"memory: {memory.peak / GIB:.2f} GiB at most, of which weights {weights / GIB:.2f}; {seconds:.1f} s"
    )


def check_steps(sampling: Sampling, backprop_steps: int) -> None:
    """Raise `InputError` unless there are so many steps to differentiate."""
    if not 1 <= backprop_steps <= sampling.steps:
        raise InputError(f"backprop_steps is {backprop_steps}; it must be between 1 and {sampling.steps}")


def _follow(
    backend: Backend, reward: Reward, prompt: str, sampling: Sampling, backprop_steps: int
) -> Iterator[Finding]:
    leaves, images = _draw(backend, prompt, sampling, backprop_steps)
    drawn = _picture(images, backend)
    yield drawn
    if not drawn.good:
        return
    wanted = torch.zeros_like(images)
    for weight, term in _terms(reward):
        gradient, finding = _judge(term, images, prompt)
        yield finding
        if gradient is None:
            return
        mixed = _mixed(term, images.detach(), prompt)
        if mixed is not None:
            yield mixed
            if not mixed.good:
                return
        wanted += weight * gradient
    if isinstance(reward, Ceiling) and (value := score(reward, images, [prompt]).item()) >= reward.most:
        yield Finding(
            f"the ceiling {value:g} is met by this picture: for its prompt there is nothing to gain"
        )
    scale = FLOAT16_SCALE if backend.dtype == torch.float16 else 1.0  # as in a fit
    found = torch.autograd.grad(
        images, [each.embeds for each in leaves], wanted * scale, materialize_grads=True
    )
    for leaf, gradient in zip(leaves, found, strict=True):
        arrived = _arrival(gradient.float()[:, leaf.inserted] / scale, leaf.name, backend, backprop_steps)
        yield arrived
        if not arrived.good:
            return


@dataclass(frozen=True)
class Leaf:
    """What a gradient should reach: a prompt's embeddings (1, L, D), and which of the L are inserted."""

    name: str
    embeds: Tensor
    inserted: Tensor

    @classmethod
    def of(cls, name: str, prompt: PromptEmbeds, insertion: Insertion) -> Leaf:
        places = torch.arange(prompt.length, device=prompt.embeds.device)
        inserted = (places < insertion.num_prefix) | (places >= prompt.length - insertion.num_suffix)
        return cls(name, prompt.embeds.detach().requires_grad_(), inserted)


def _draw(
    backend: Backend, prompt: str, sampling: Sampling, backprop_steps: int
) -> tuple[list[Leaf], Tensor]:
    """What IPGO's defaults learn, on both sides of guidance where it has two; and the images (1, 3, H, W)."""
    adapter = InsertionAdapter.start(backend, [prompt], Insertion(), seed=0, shared=False, sampling=sampling)
    with torch.no_grad():
        cond = adapter.condition(backend, [prompt], backend.encode([prompt]))
        uncond = adapter.unconditional(backend, [prompt], cond, sampling)
    leaves = [Leaf.of("inserted embeddings", cond, adapter.insertion)]
    cond = replace(cond, embeds=leaves[0].embeds)
    if uncond is not None and adapter.learns_unconditional:
        leaves.append(Leaf.of("inserted embeddings of the negative prompt", uncond, adapter.insertion))
        uncond = replace(uncond, embeds=leaves[1].embeds)
    noise = backend.noise([0], sampling.noise_steps(backend))
    return leaves, sample(backend, cond, uncond, noise, sampling, backprop_steps=backprop_steps)


def _picture(images: Tensor, backend: Backend) -> Finding:
    values = images.detach()
    side = " x ".join(map(str, values.shape[-2:]))
    if not values.isfinite().all():
        return Finding(f"the picture of {side} pixels is not finite: {_overflow(backend)}", _wider(backend))
    if not images.requires_grad:
        text = "the picture has no gradient: the backend cuts it off between the embeddings and the picture"
        return Finding(text, "look for torch.no_grad() and .detach() in its denoiser and its decoder")
    clamped = ((values <= 0) | (values >= 1)).float().mean().item()
    if clamped == 1:
        text = f"all values of the picture of {side} pixels are black or white, where no gradient passes"
        return Finding(
            text, "lower --guidance-scale, or check that the backend draws at all (`ipgo generate`)"
        )
    return Finding(
        f"picture: {side} pixels, finite; {clamped:.0%} of it is black or white and has no gradient"
    )


def _judge(reward: Reward, images: Tensor, prompt: str) -> tuple[Tensor | None, Finding]:
    """The gradient with respect to the images, or None if there is none to follow."""
    name = f"reward {reward.name!r}"
    if not reward.differentiable:
        return None, Finding(f"{name} declares that it has no gradient", _other_method())
    if is_unsettled(reward):
        text = f"{name} has batch norm or dropout in training mode: its number does not depend on the picture alone"
        return None, Finding(text, "call .eval() on the module")
    try:
        values = score(reward, images, [prompt])
    except NotFiniteError as error:
        return None, Finding(str(error), "look for log, sqrt or division at 0 in it")
    except RewardError as error:
        if error.__cause__ is None:
            advice = (
                "return a torch tensor, no array of numpy's, with one number a row (.squeeze(-1) makes (B,) of "
                "(B, 1))"
            )
        elif isinstance(error.__cause__, NameError | AttributeError | ImportError | SyntaxError):
            advice = "correct it there"
        else:  # it raised something, for a picture that carries a gradient
            advice = f"compute it in torch alone, without numpy and PIL, if that is what fails; or {_other_method()}"
        return None, Finding(str(error), advice)
    if not values.requires_grad:
        if _same_for_the_negative(reward, images.detach(), prompt, values):
            text = f"{name} gives {values.item():.4f} for the picture and for its negative: it does not look at it"
            return None, Finding(text, "it must be computed from `images`, all the way in torch")
        text = f"{name} gives {values.item():.4f}, but the number has no gradient: it was cut off inside"
        advice = (
            "look for .detach(), .item(), .numpy(), torch.no_grad(), comparisons, argmax, integers and new "
            "torch.tensor(...) in it"
        )
        return None, Finding(text, f"{advice}; or {_other_method()}")
    (gradient,) = torch.autograd.grad(values.sum(), images, retain_graph=True, allow_unused=True)
    return _checked(gradient, f"{name} gives {values.item():.4f}")


def _mixed(reward: Reward, images: Tensor, prompt: str) -> Finding | None:
    """Does it rate two pictures together otherwise than each alone? A fit, and what judges it, draw in batches."""
    pair = torch.cat([images, 1 - images])

    def alone() -> Tensor:
        return torch.cat([score(reward, each[None], [prompt]) for each in pair])

    with torch.no_grad():
        try:
            apart = alone()
        except RewardError:  # of the negative, such as a logarithm of 0
            return None
        try:
            together = score(reward, pair, [prompt] * 2)
        except RewardError as error:
            advice = "return one number for each row of `images` (B, 3, H, W)"
            return Finding(f"of two pictures together: {error}", advice)
        if torch.allclose(together, apart, rtol=1e-3, atol=1e-4):
            return None
        if not torch.allclose(again := alone(), apart, rtol=1e-3, atol=1e-4):
            text = "reward {!r} gives {:.4f} and, asked again, {:.4f}: a gain of that size means nothing"
            return Finding(text.format(reward.name, apart[0].item(), again[0].item()))
    text = "reward {!r} gives {:.4f} and {:.4f} for two pictures together, {:.4f} and {:.4f} for each alone"
    return Finding(
        text.format(reward.name, *together.tolist(), *apart.tolist()),
        "compute each number from its own row: no mean, norm or softmax over the batch, and no first row for all",
    )


def _same_for_the_negative(reward: Reward, images: Tensor, prompt: str, values: Tensor) -> bool:
    """Does it say of another picture what it said of this one?"""
    try:
        return torch.equal(values, score(reward, 1 - images, [prompt]))
    except RewardError:  # which shows that it looks
        return False


def _checked(gradient: Tensor | None, says: str) -> tuple[Tensor | None, Finding]:
    if gradient is None:
        advice = "it must be computed from `images`, all the way in torch"
        return None, Finding(f"{says}, which does not depend on the picture", advice)
    if not gradient.isfinite().all():
        advice = "look for sqrt, norm or a power at 0: add a small number inside; or compute it in float32"
        return None, Finding(f"{says}, but its gradient with respect to the picture is not finite", advice)
    if not gradient.any():
        advice = f"look for rounding, thresholds, clamp and argmax in it; or {_other_method()}"
        return None, Finding(f"{says}, but its gradient with respect to the picture is 0 everywhere", advice)
    size = gradient.norm().item()
    return gradient, Finding(f"{says}; gradient with respect to the picture: norm {size:.3g}, finite")


def _arrival(gradient: Tensor, name: str, backend: Backend, backprop_steps: int) -> Finding:
    """What arrives at the inserted embeddings (1, n, D) of this name."""
    last = f"the last {backprop_steps} steps" if backprop_steps > 1 else "the last step"
    if not gradient.isfinite().all():
        return Finding(f"the gradient at the {name} is not finite: {_overflow(backend)}", _wider(backend))
    if not gradient.any():
        text = f"the gradient gets through {last}, but is 0 at the {name}"
        advice = "the denoiser does not look at them" if backend.dtype != torch.float16 else _wider(backend)
        return Finding(text, f"{advice}; try more --backprop-steps")
    none = (gradient == 0).float().mean().item()
    size, count = gradient.norm().item(), gradient.shape[1]
    text = f"gradient at the {count} {name}, through {last}: norm {size:.3g}, finite"
    return Finding(text + (f", {none:.0%} of it 0" if none >= 0.01 else ""))


def _terms(reward: Reward) -> list[tuple[float, Reward]]:
    """With their weights; what stands under a ceiling is looked at without it."""
    if isinstance(reward, WeightedSum):
        return [
            (weight, below)
            for weight, each in zip(reward.weights, reward.rewards, strict=True)
            for below in parts(each)
        ]
    return [(1.0, below) for below in parts(reward)]


def _overflow(backend: Backend) -> str:
    if backend.dtype == torch.float16:
        return "float16 has overflowed"
    return f"in {name_of(backend.dtype)}, which hardly overflows, so weights or sizes are wrong"


def _wider(backend: Backend) -> str:
    if backend.dtype == torch.float16:
        return "use --dtype bfloat16 if the GPU supports it, else float32"
    return "check that the weights are complete (`ipgo generate` draws with them), and --image-size"


def _other_method() -> str:
    return f"use a method that needs no gradient ({WITHOUT_GRADIENT})"
