"""Laws that hold for any numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipgo.adapters import Adapter, InsertionAdapter, generate
from ipgo.ascent import Ascent
from ipgo.backends import load_backend
from ipgo.embeds import PromptEmbeds
from ipgo.insertion import InsertedEmbeddings, Insertion, cross_attend, orthonormal, rotate
from ipgo.rewards import load_reward
from ipgo.sampling import Sampling
from ipgo.task import Task
from ipgo.training import maximize

seeds = st.integers(0, 2**32)
few = settings(max_examples=25, deadline=None)


def random(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@few
@given(seeds, st.integers(1, 4), st.integers(1, 6), st.integers(0, 6))
def test_the_basis_is_orthonormal(seed, rows, rank, more):
    basis = orthonormal(random(rows, rank + more, rank, seed=seed))
    torch.testing.assert_close(basis.mT @ basis, torch.eye(rank).double().expand(rows, -1, -1))
    torch.testing.assert_close(orthonormal(basis), basis)  # an orthonormal start stays as it is


@few
@given(seeds, st.integers(1, 5), st.integers(1, 6), st.integers(0, 3))
def test_rotation_keeps_norms_and_can_be_undone(seed, count, half, angles):
    vectors, turns = random(2, count, 2 * half, seed=seed), random(2, count, angles, seed=seed + 1)
    turned = rotate(vectors, turns)
    torch.testing.assert_close(turned.norm(dim=-1), vectors.norm(dim=-1))
    torch.testing.assert_close(rotate(vectors, torch.zeros_like(turns)), vectors)
    torch.testing.assert_close(rotate(vectors, turns + 2 * math.pi), turned)


@few
@given(seeds, st.integers(1, 5))
def test_the_penalty_is_zero_where_the_means_agree(seed, count):
    adapter = InsertionAdapter(None, 6, Insertion(1, 1, rank=4))
    mask = torch.arange(5) < count
    original = PromptEmbeds(random(1, 5, 6, seed=seed), mask[None])
    mean = original.mean()[:, None]
    assert adapter.penalty(original, original.insert(mean, mean), mean).item() == pytest.approx(0, abs=1e-12)
    moved = original.insert(mean + 1, mean)
    expected = 1 / (count + 2) * math.sqrt(6) / original.norm().item()
    assert adapter.penalty(original, moved, mean).item() == pytest.approx(expected)


@few
@given(seeds, st.integers(1, 4))
def test_attention_ignores_padding_and_order(seed, text):
    queries, states = random(1, 3, 4, seed=seed), random(1, 6, 4, seed=seed + 1)
    mask = (torch.arange(6) < text)[None]
    unit = states.new_ones(1)
    answer = cross_attend(queries, PromptEmbeds(states, mask), unit)
    only = PromptEmbeds(states[:, :text].flip(1), mask[:, :text])
    torch.testing.assert_close(cross_attend(queries, only, unit), answer)


@few
@given(seeds, st.lists(seeds, min_size=1, max_size=4, unique=True))
def test_a_row_depends_on_its_seed_alone(seed, others):
    insertion = Insertion(rank=5)
    alone = InsertedEmbeddings([seed], 3, 8, insertion)(torch.zeros(1, dtype=torch.long))
    among = InsertedEmbeddings([*others, seed], 3, 8, insertion)(torch.tensor([len(others)] * 2))
    torch.testing.assert_close(among, alone.expand(2, -1, -1))


@settings(max_examples=5, deadline=None)
@given(seeds, st.floats(0.1, 100))
def test_coefficients_stay_in_their_box_after_any_step(tiny, seed, lr):
    prompts = ("a red cat", "sun")
    task = Task(tiny, load_reward("contrast", device="cpu"), prompts, Sampling(steps=1), seeds=(), seed=seed)
    adapter = InsertionAdapter(prompts, 32, Insertion(1, 1, rank=4), seed=seed)
    for progress in maximize(task, adapter, Ascent(steps=2, lr=lr, backprop_steps=1)):
        state = {name: value for name, value in progress.state().items() if name.startswith("adapter")}
        for end, bound in (("coefficients", 1), ("angles", math.pi + 1e-6)):
            values = [value for name, value in state.items() if name.endswith(end)]
            assert values
            assert all(value.abs().max() <= bound for value in values)


@pytest.fixture(scope="module")
def tiny(make_pipe):
    return load_backend(make_pipe(), device="cpu")


@pytest.mark.parametrize("padding", ["max_length", "none"])
@pytest.mark.parametrize("noise", [(0, 1), ()])
def test_stacked_rows_equal_rows_alone(make_pipe, padding, noise):
    """So results do not depend on how prompts are cut into chunks; in float64, where rounding stays small."""
    backend = load_backend(make_pipe(), device="cpu", dtype="float64", padding=padding)
    prompts = ("a red cat", "a dog on the moon", "sun")
    reward = load_reward("colorfulness", device="cpu")
    ascent = Ascent(steps=4, lr=0.03, max_grad_norm=1e-4, penalty_weight=1e-2)

    def fit(*chunk):
        task = Task(backend, reward, chunk, Sampling(steps=2), seeds=noise, seed=5)
        adapter = InsertionAdapter.start(
            backend, chunk, Insertion(2, 2, rank=6), seed=5, shared=False
        ).double()
        return list(maximize(task, adapter, ascent))[-1]

    together = fit(*prompts)
    assert (together.grad_norm > 1e-4).any()  # clipping is at work
    for number, prompt in enumerate(prompts):
        alone = fit(prompt)
        row = together.adapter.row(number).state_dict()
        for name, value in alone.adapter.state_dict().items():
            torch.testing.assert_close(row[name], value.to(row[name]), atol=1e-6, rtol=0)
        torch.testing.assert_close(together.best[number : number + 1], alone.best, atol=1e-6, rtol=0)


def test_padding_with_a_mask_equals_no_padding(make_pipe):
    backend = load_backend(make_pipe(), device="cpu", padding="none")
    prompts = ("a red cat", "a dog on the moon", "sun")
    adapter = InsertionAdapter(None, 32, Insertion(2, 3), "none")
    together = generate(backend, prompts, [1, 2, 3], adapter, Sampling(3))
    for number, prompt in enumerate(prompts):
        alone = generate(backend, [prompt], [number + 1], adapter, Sampling(3))
        torch.testing.assert_close(together[number : number + 1], alone, atol=1e-5, rtol=0)
    padded = generate(load_backend(make_pipe(), device="cpu"), prompts, [1, 2, 3], Adapter(), Sampling(3))
    unpadded = generate(backend, prompts, [1, 2, 3], Adapter(), Sampling(3))
    assert (padded - unpadded).abs().max() > 1e-3  # it is another setting, not a detail


def test_the_order_of_embeddings_does_not_matter(tiny):
    """Prefix and suffix are one set for this denoiser."""
    original = tiny.encode(["a red cat"])
    inserted = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    orders = [
        original.insert(inserted[:, :2], inserted[:, 2:]),
        original.insert(inserted[:, 2:], inserted[:, :2]),
        original.insert(inserted.flip(1), inserted[:, :0]),
    ]
    latents = tiny.noise([0])[:, 0]
    first, *others = [tiny.predict(latents, torch.tensor(500), cond, None, 1.0) for cond in orders]
    for other in others:
        torch.testing.assert_close(first, other, atol=1e-5, rtol=0)
