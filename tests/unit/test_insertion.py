"""The parameterisation, part by part."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError
from ipgo.insertion import InsertedEmbeddings, Insertion, cross_attend, orthonormal, rotate

ROWS = torch.arange(2)


def test_rotation_of_the_first_embedding_by_hand():
    """Angle 0 turns coordinates (0, 1) and (2, 3); angle 1 then turns (1, 2) and (3, 0)."""
    quarter = torch.tensor([[math.pi / 2, 0.0]])
    torch.testing.assert_close(
        rotate(torch.tensor([[1.0, 2, 3, 4]]), quarter), torch.tensor([[-2.0, 1, -4, 3]])
    )
    second = torch.tensor([[0.0, math.pi / 2]])
    torch.testing.assert_close(
        rotate(torch.tensor([[1.0, 2, 3, 4]]), second), torch.tensor([[4.0, -3, 2, -1]])
    )


def test_rotation_is_offset_by_the_place_of_the_embedding():
    """As the loop of the authors' notebook, with its slice of the angles put right."""
    vectors = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    expected = vectors.clone()
    for s in range(3):
        for k in range(2):
            cos, sin = angles[s, k].cos(), angles[s, k].sin()
            for j in range(4):
                a, b = (s + 2 * j + k) % 8, (s + 2 * j + 1 + k) % 8
                x, y = expected[s, a].clone(), expected[s, b].clone()
                expected[s, a], expected[s, b] = x * cos - y * sin, x * sin + y * cos
    torch.testing.assert_close(rotate(vectors, angles), expected)


def test_the_basis_moves_smoothly_where_a_raw_entry_crosses_zero():
    raw = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bases = []
    for value in (-1e-9, 1e-9):
        raw[0, 0] = value
        bases.append(orthonormal(raw))
    assert (bases[0] - bases[1]).abs().max() < 1e-8


def test_attention_by_hand():
    # Brought to a mean square of 1, query and first state have the score 2 * 2 / sqrt(4), the second state has 0.
    first = math.exp(2) / (math.exp(2) + 1)
    for query, size in itertools.product((0.01, 1.0, 30.0), (0.1, 2.0, 300.0)):  # directions alone count
        states = size * torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 900, 0], [9, 9, 9, 9]]])
        # Neither padding is looked at, nor a state that is much longer than all others.
        prompt = PromptEmbeds(states, torch.tensor([[True, True, True, False]]))
        answer = cross_attend(torch.tensor([[[query, 0.0, 0, 0]]]), prompt, prompt.norm())
        torch.testing.assert_close(answer, size * torch.tensor([[[first, 1 - first, 0, 0]]]))


@pytest.mark.parametrize("basis", ["orthonormal", "free"])
def test_the_norm_is_the_one_asked_for(basis):
    insertion = Insertion(num_prefix=40, norm=0.5, basis=basis, rank=60, cross_attention="none")
    states = torch.full((2, 3, 96), 2.0) * torch.tensor([1.0, 50])[:, None, None]
    prompt = PromptEmbeds(states, torch.ones(2, 3, dtype=torch.bool))

    def norms(insertion):
        side = InsertedEmbeddings([0, 1], 40, 96, insertion)
        return side.attend(torch.arange(2), prompt, prompt.norm()).norm(dim=-1).mean(1)

    torch.testing.assert_close(norms(insertion), 0.5 * prompt.norm(), rtol=0.05, atol=0)
    torch.testing.assert_close(
        norms(replace(insertion, norm=None, start=1.0)),
        torch.full((2,), math.sqrt(60 / 3)),
        rtol=0.05,
        atol=0,
    )


def test_a_small_start_has_the_norm_and_room_to_grow() -> None:
    whole, small = (
        InsertedEmbeddings([0, 1], 40, 96, Insertion(num_prefix=40, norm=11.0, start=start, rank=60))
        for start in (1.0, 0.25)
    )
    torch.testing.assert_close(small(ROWS), whole(ROWS))
    assert small.coefficients.abs().max() <= 0.25
    with torch.no_grad():
        small.coefficients *= 8
    small.project_()
    assert small.coefficients.abs().max() == 1
    assert small(ROWS).norm(dim=-1).mean() > 2 * whole(ROWS).norm(dim=-1).mean()


def test_free_embeddings_begin_where_the_others_do():
    made = [
        InsertedEmbeddings([3, 4], 5, 32, Insertion(basis=basis))(ROWS) for basis in ("orthonormal", "free")
    ]
    torch.testing.assert_close(*made)


@pytest.mark.parametrize(
    ("insertion", "parameters"),
    [
        (Insertion(rank=6), {"raw_basis", "coefficients", "angles"}),
        (Insertion(rank=6, rotations="none"), {"raw_basis", "coefficients"}),
        (Insertion(rank=6, rotations="unused", bias=True), {"raw_basis", "coefficients", "angles", "bias"}),
        (Insertion(rank=6, rotations="none", basis="free"), {"vectors"}),
    ],
)
def test_each_switch_brings_its_parameters(insertion, parameters):
    side = InsertedEmbeddings([0, 1], 4, 8, insertion)
    assert {name for name, _ in side.named_parameters()} == parameters
    assert all(parameter.shape[0] == 2 for parameter in side.parameters())
    assert side(ROWS).shape == (2, 4, 8)


def test_unused_angles_have_no_effect():
    made = [
        InsertedEmbeddings([0, 1], 4, 8, Insertion(rank=6, rotations=rotations))(ROWS)
        for rotations in ("unused", "none", "applied")
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.allclose(made[0], made[2])


def test_projection_bounds_coefficients_and_wraps_angles():
    side = InsertedEmbeddings([0, 1], 4, 8, Insertion(rank=6))
    with torch.no_grad():
        side.coefficients.mul_(50)
        side.angles.fill_(math.pi + 0.5)
    before = side.angles.clone()
    side.project_()
    assert side.coefficients.abs().max() <= 1
    torch.testing.assert_close(side.angles, before - 2 * math.pi)
    unbounded = InsertedEmbeddings([0, 1], 4, 8, Insertion(rank=6, bounded=False))
    with torch.no_grad():
        unbounded.coefficients.mul_(50)
    unbounded.project_()
    assert unbounded.coefficients.abs().max() > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prefix": 0, "num_suffix": 0}, "one of them at least 1"),
        ({"num_prefix": -1}, "insertion.num_prefix -1"),
        ({"rank": 0}, "insertion.rank is 0"),
        ({"norm": 0.0}, "insertion.norm is 0.0; it must be above 0, or null"),
        ({"start": 0.0}, "insertion.start is 0.0; it must be above 0 and at most 1"),
        ({"rotations": "aplied"}, "unknown insertion.rotations 'aplied'; did you mean 'applied'"),
        ({"cross_attention": "both"}, "unknown insertion.cross_attention 'both'"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Insertion(**options)


def test_settings_that_do_not_fit_the_width_are_refused():
    with pytest.raises(InputError, match=r"insertion\.rank is 300; .* 32 wide"):
        Insertion(rank=300).check(32)
    with pytest.raises(InputError, match="even width, not 33"):
        Insertion().check(33)
    Insertion(rotations="none").check(33)
    assert Insertion().rank_of(10, 768) == 300
    assert Insertion().rank_of(10, 128) == 128
