"""IPGO's parameterisation: embeddings = rotate(coefficients x orthonormal basis) (arXiv 2503.21812)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError, unknown
from ipgo.seeding import derive, generator
from ipgo.typed import check_types

Rotations = Literal["applied", "unused", "none"]
Basis = Literal["orthonormal", "free"]
CrossAttention = Literal["none", "replace", "residual", "fixed"]

ANGLES = 2  # rotations of one embedding: the even pairs of coordinates, then the odd ones


@dataclass(frozen=True)
class Insertion:
    """What is inserted around a prompt's embeddings, and how it is constrained.

    Attributes:
        num_prefix: embeddings inserted before the prompt's.
        num_suffix: embeddings inserted after the prompt's.
        rank: size of each side's basis; None is 30 for each embedding, at most the width (the paper's 300).
        rotations: "applied", "none", or "unused": angles are kept but have no effect, as in the authors'
            notebook.
        bias: add one free vector to all embeddings of a side, as the authors' notebook does.
        basis: "orthonormal", or "free": learn the embeddings themselves, without basis and coefficients.
        bounded: keep the coefficients within [-1, 1].
        cross_attention: the inserted embeddings attend to the prompt's, and the answer is added to them ("residual")
            or takes their place ("replace"), as IPGO+ has it; "none" is the paper's prompt-wise IPGO. Bare ones take
            attention away from the text, as a lower guidance scale would. With "fixed" the answer to what they were
            at the start is added, so that each goes on repeating the same words of the prompt while it learns what
            to add to them: that gained no more, and lost more of what was held out (docs/settings.md).
        norm: mean norm of an inserted embedding at the start, before it attends; 1 is that of the prompt's own
            embeddings, which differs between text encoders. Small ones begin near the image of the raw prompt. None
            leaves it at start * sqrt(rank / 3), whatever the prompt's: with start = 1 this is the paper's.
        start: coefficients begin uniform in [-start, start], with this norm: an embedding can grow to 1 / start times
            as much before it meets the bounds. The paper's is 1.
        pooled: learn a change of the vector for the whole prompt too, where there is one (SDXL, SD3, FLUX.1), in units
            of its root mean square.
        negative: insert as many embeddings around the negative prompt's too, and with `pooled` change its vector. None:
            where guidance has a negative prompt.
    """

    num_prefix: int = 10
    num_suffix: int = 10
    rank: int | None = None
    rotations: Rotations = "applied"
    bias: bool = False
    basis: Basis = "orthonormal"
    bounded: bool = True
    cross_attention: CrossAttention = "residual"
    norm: float | None = 0.12
    start: float = 0.1
    pooled: bool = False
    negative: bool | None = None

    def __post_init__(self) -> None:
        check_types(self, "insertion.")
        if min(self.num_prefix, self.num_suffix) < 0 or self.num_prefix + self.num_suffix == 0:
            raise InputError(
                f"insertion.num_prefix {self.num_prefix} and insertion.num_suffix {self.num_suffix} "
                "must be at least 0, and one of them at least 1"
            )
        if self.rank is not None and self.rank < 1:
            raise InputError(f"insertion.rank is {self.rank}; it must be at least 1")
        if self.norm is not None and not 0 < self.norm < math.inf:
            raise InputError(f"insertion.norm is {self.norm}; it must be above 0, or null for the paper's")
        if not 0 < self.start <= 1:
            raise InputError(f"insertion.start is {self.start}; it must be above 0 and at most 1")
        for field, allowed in (
            ("rotations", Rotations),
            ("basis", Basis),
            ("cross_attention", CrossAttention),
        ):
            if getattr(self, field) not in get_args(allowed):
                raise unknown(f"insertion.{field}", getattr(self, field), get_args(allowed))

    def check(self, width: int) -> None:
        """Raise `InputError` if this does not fit embeddings of `width`."""
        if self.rank is not None and self.rank > width:
            raise InputError(
                f"insertion.rank is {self.rank}; the embeddings of this backend are {width} wide"
            )
        if self.rotations == "applied" and width % 2:
            raise InputError(f'insertion.rotations need an even width, not {width}; use rotations="none"')

    def decided(self, guided: bool) -> Insertion:
        """With `negative` true or false: `guided` if it is None."""
        return self if self.negative is not None else replace(self, negative=guided)

    def check_guidance(self, scale: float) -> None:
        """Raise `InputError` if a negative prompt is to be learned that a guidance of `scale` never looks at."""
        if self.negative and scale <= 1:
            raise InputError(
                f"sampling.guidance_scale is {scale}; insertion.negative needs one above 1, since there is no "
                "negative prompt without guidance"
            )

    def rank_of(self, count: int, width: int) -> int:
        """r for a side of `count` embeddings."""
        return self.rank or min(30 * count, width)


class InsertedEmbeddings(nn.Module):
    """N independent sets of n embeddings: scale * rotate(coefficients @ basis.T + bias).

    The basis is the Q of `raw_basis`, |coefficients| <= 1. Row i is drawn from seeds[i] (None: zeros, to be filled in)
    and does not depend on its neighbours. All parameters are float32 and have N rows. Unless `insertion.norm` is None,
    lengths are in units of the norm of a prompt's states (`attend`).
    """

    raw_basis: nn.Parameter | None  # (N, D, r), starts orthonormal
    coefficients: nn.Parameter | None  # (N, n, r)
    vectors: nn.Parameter | None  # (N, n, D), with basis="free" instead of the two
    bias: nn.Parameter | None  # (N, 1, D)
    angles: nn.Parameter | None  # (N, n, 2)
    queries: Tensor | None  # (N, n, D), the embeddings at the start, for cross_attention="fixed"

    def __init__(self, seeds: Sequence[int | None], count: int, width: int, insertion: Insertion) -> None:
        super().__init__()
        insertion.check(width)
        self.insertion = insertion
        self.rank = rank = insertion.rank_of(count, width)
        drawn = None not in seeds
        raw_basis = _draw(seeds, "basis", (width, rank), normal=True)
        if drawn:  # what is to be filled in needs no values, and the decomposition takes as long as reading a hundred
            raw_basis = orthonormal(raw_basis)
        coefficients = _draw(seeds, "coefficients", (count, rank)) * insertion.start
        free = insertion.basis == "free"
        self.raw_basis = None if free else nn.Parameter(raw_basis)
        self.coefficients = None if free else nn.Parameter(coefficients)
        self.vectors = nn.Parameter(coefficients @ raw_basis.mT) if free else None
        # torch.nn.Linear's initial bias, as in the notebook.
        self.bias = (
            nn.Parameter(_draw(seeds, "bias", (1, width)) / math.sqrt(rank)) if insertion.bias else None
        )
        angles = _draw(seeds, "angles", (count, ANGLES)) * math.pi
        self.angles = None if insertion.rotations == "none" else nn.Parameter(angles)
        # Uniform coefficients have a mean norm of start * sqrt(rank / 3).
        own = insertion.start * math.sqrt(rank / 3)
        self.scale = 1.0 if insertion.norm is None else insertion.norm / own
        start = None
        if insertion.cross_attention == "fixed":
            with torch.no_grad():
                start = self(torch.arange(len(seeds))) if drawn else torch.zeros(len(seeds), count, width)
        self.register_buffer("queries", start)

    def forward(self, rows: Tensor) -> Tensor:
        """(B,) row numbers, which may repeat, to (B, n, D)."""
        distinct, position = torch.unique(rows, return_inverse=True)

        def chosen(parameter: Tensor) -> Tensor:
            # All rows, as in every step of a fit, are not copied.
            return parameter if len(distinct) == len(parameter) else parameter[distinct]

        if self.raw_basis is not None and self.coefficients is not None:
            vectors = combine(chosen(self.coefficients), chosen(self.raw_basis))  # (U, n, D)
        else:
            assert self.vectors is not None
            vectors = chosen(self.vectors)
        if self.bias is not None:
            vectors = vectors + chosen(self.bias)
        if self.angles is not None and self.insertion.rotations == "applied":
            vectors = rotate(vectors, chosen(self.angles))
        return vectors[position] * self.scale

    def attend(self, rows: Tensor, prompt: PromptEmbeds, unit: Tensor) -> Tensor:
        """The embeddings of (B,) rows after they have looked at the B rows of `prompt`, (B, n, D).

        Args:
            unit: (B,) the norm of a state.
        """
        vectors: Tensor = self(rows).to(prompt.embeds.device)
        if self.insertion.norm is not None:
            vectors = vectors * unit[:, None, None]
        how = self.insertion.cross_attention
        if how == "none":
            return vectors
        queries = vectors if self.queries is None else self.queries[rows].to(vectors)
        answer = cross_attend(queries, prompt, unit)
        return answer if how == "replace" else vectors + answer

    @torch.no_grad()
    def project_(self) -> None:
        """Bring the coefficients back into the box and wrap the angles: for them a clamp would be a wall."""
        if self.coefficients is not None and self.insertion.bounded:
            self.coefficients.clamp_(-1, 1)
        if self.angles is not None:
            self.angles.copy_((self.angles + math.pi).remainder(2 * math.pi) - math.pi)


def _draw(seeds: Sequence[int | None], name: str, shape: tuple[int, ...], *, normal: bool = False) -> Tensor:
    """(N, *shape): each row from its own seed, N(0, 1) or uniform in [-1, 1); zeros where that is None."""
    rows = [torch.empty(0, *shape)]
    for seed in seeds:
        if seed is None:
            rows.append(torch.zeros(1, *shape))
            continue
        source = generator(derive(seed, name))
        draw = torch.randn(shape, generator=source) if normal else torch.rand(shape, generator=source) * 2 - 1
        rows.append(draw[None])
    return torch.cat(rows)


def orthonormal(raw: Tensor) -> Tensor:
    """Q of the QR decomposition of (..., D, r) with r <= D, made unique and smooth by diag R > 0."""
    return _decompose(raw)[0]


def _decompose(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Q (..., D, r) and R (..., r, r) of `orthonormal`."""
    q, r = torch.linalg.qr(raw)
    signs = torch.where(torch.diagonal(r, dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(raw)
    return q * signs.unsqueeze(-2), r * signs.unsqueeze(-1)


def combine(coefficients: Tensor, raw_basis: Tensor) -> Tensor:
    """coefficients (..., n, r) @ basis.T, (..., n, D), where the basis is the Q of `raw_basis` (..., D, r)."""
    combined: Tensor = _Combine.apply(coefficients, raw_basis)  # type: ignore[no-untyped-call]
    return combined


class _Combine(torch.autograd.Function):
    """`combine`, with a gradient that takes less time than autograd's.

    What reaches Q is a product of the gradient (n, D) and the coefficients (n, r), both thin: n is ten or so. Autograd
    multiplies it out before it goes through the decomposition; here all but two of the products stay thin.
    """

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, raw_basis: Tensor) -> Tensor:
        q, r = _decompose(raw_basis)
        ctx.save_for_backward(coefficients, q, r)
        return coefficients @ q.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        # A gradient dQ of Q makes one of (dQ + Q mirrored(-dQ^T Q)) R^-T of the raw basis, where mirrored copies the
        # lower triangle over the upper one (Walter and Lehmann, arXiv 1009.6112). Here dQ is grad^T coefficients.
        (grad,) = grads
        coefficients, q, r = ctx.saved_tensors
        projected = grad @ q  # (..., n, r), and the gradient of the coefficients
        lower = (-coefficients.mT @ projected).tril()  # (..., r, r)
        mirrored = lower + lower.tril(-1).mT
        both = torch.cat([coefficients, mirrored], dim=-2)  # (..., n + r, r)
        thin, square = torch.linalg.solve_triangular(r.mT, both, upper=False, left=False).split(
            [coefficients.shape[-2], r.shape[-1]], dim=-2
        )
        return projected, grad.mT @ thin + q @ square


def rotate(vectors: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of coordinates of (..., n, D) by (..., n, A), keeping norms.

    Angle k turns, in embedding s, the pairs (s + k + 2j, s + k + 2j + 1) mod D for all j: first the even
    pairs, then the odd ones.
    """
    count, width = vectors.shape[-2:]
    place = torch.arange(width, device=vectors.device)
    embedding = torch.arange(count, device=vectors.device).unsqueeze(-1)  # (n, 1)
    for k in range(angles.shape[-1]):
        first = (place + embedding + k) % 2 == 0  # (n, D): of its pair
        other = torch.where(first, -vectors.roll(-1, -1), vectors.roll(1, -1))
        turn = angles[..., k, None]
        vectors = vectors * turn.cos() + other * turn.sin()
    return vectors


def cross_attend(queries: Tensor, prompt: PromptEmbeds, unit: Tensor) -> Tensor:
    """IPGO+'s attention without parameters: softmax(q k^T / sqrt(D)) v over the text positions, (B, n, D).

    The answers v are the prompt's states. Queries, and the states as keys k, are first brought to the size that
    CLIP's have: a mean square of 1. Short ones would all answer with the mean of the prompt; with this size the
    direction of an inserted embedding decides which words it repeats, from the first step on (docs/settings.md),
    whatever the text encoder. The paper's abstract names this attention; its exact form is not published with the code.
    """
    values, width = prompt.embeds.to(queries.dtype), prompt.embeds.shape[-1]
    # Both sizes are given to the queries, which are fewer.
    queries = F.normalize(queries, dim=-1) * (math.sqrt(width) / unit.to(queries.dtype)[:, None, None])
    scores = queries @ values.mT  # (B, n, L)
    return scores.masked_fill(~prompt.words(unit)[:, None], -math.inf).softmax(-1) @ values
