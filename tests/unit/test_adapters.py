"""Adapters: rows, copies, and what they do to a pipeline."""

import itertools
from dataclasses import replace

import pytest
import torch

from ipgo.adapters import (
    ADAPTERS,
    Adapter,
    EmbeddingAdapter,
    InsertionAdapter,
    LoRA,
    NoiseAdapter,
    TextEncoderAdapter,
    WeightAdapter,
    generate,
    stack,
)
from ipgo.artefacts import load_adapter, save_adapter
from ipgo.backends import load_backend
from ipgo.errors import InputError
from ipgo.insertion import Insertion
from ipgo.sampling import Sampling

PROMPTS = ("a red cat", "a dog on the moon", "sun")
INSERTION = Insertion(num_prefix=4, num_suffix=7, rank=8)  # 77 + 11: the two halves repeat 7 and 8 times
SAMPLING = Sampling(steps=3, guidance_scale=3.0)


@pytest.fixture
def adapter():
    return InsertionAdapter(PROMPTS, 32, INSERTION)


def same(left, right):
    return all(torch.equal(value, right.state_dict()[name]) for name, value in left.state_dict().items())


def test_the_identity_changes_nothing(backend):
    images = generate(backend, PROMPTS[:2], [1, 1], Adapter(), SAMPLING)
    assert images.shape == (2, 3, 16, 16)
    assert torch.equal(images, generate(backend, PROMPTS[:2], [1, 1], Adapter(), SAMPLING))
    assert not images.requires_grad


def test_rows_of_a_prompt_do_not_depend_on_its_neighbours(adapter):
    alone = InsertionAdapter(PROMPTS[1:2], 32, INSERTION)
    assert same(adapter.row(1), alone)
    assert adapter.rows(["sun", "a red cat", "sun"]).tolist() == [2, 0, 2]


def test_another_random_seed_begins_elsewhere(backend):
    for kind, settings, learned in (
        (InsertionAdapter, INSERTION, "prefix.coefficients"),
        (WeightAdapter, LoRA(), "down."),
    ):
        first, other = (
            kind.start(backend, PROMPTS, settings, seed=seed, shared=False).state_dict() for seed in (0, 1)
        )
        name = next(name for name in first if name.startswith(learned))
        assert not torch.allclose(first[name], other[name])


def test_each_prompt_is_drawn_with_its_own_lora(backend):
    adapter = WeightAdapter.start(backend, ("sun", "moon"), LoRA(rank=2), seed=0, shared=False)
    with torch.no_grad():
        for value in adapter.up.values():
            value[1].normal_(generator=torch.Generator().manual_seed(0))
    raw, drawn, alone = (
        generate(backend, ["moon"], [0], each, SAMPLING) for each in (Adapter(), adapter, adapter.row(1))
    )
    assert not torch.allclose(drawn, raw, atol=1e-3)
    torch.testing.assert_close(drawn, alone)


def test_a_prompt_never_fitted_is_refused(adapter):
    with pytest.raises(InputError, match="not fitted to prompt 'a red hat'; nearest: 'a red cat'"):
        adapter.rows(["a red hat"])
    assert InsertionAdapter(None, 32, INSERTION).rows(["anything", "at all"]).tolist() == [0, 0]


def test_an_adapter_is_its_options_and_tensors(adapter):
    with torch.no_grad():
        adapter.prefix.coefficients.add_(0.1)
    again = ADAPTERS[adapter.kind](adapter.prompts, **adapter.options)
    again.load_state_dict(adapter.state_dict())
    assert same(adapter, again)
    assert again.options == adapter.options


def test_stacking_undoes_row(adapter):
    assert same(stack([adapter.row(number) for number in range(3)]), adapter)
    with pytest.raises(InputError, match="one kind"):
        stack([adapter, Adapter()])


@pytest.mark.parametrize("shared", [False, True])
def test_the_norm_is_in_units_of_the_prompts(backend, shared):
    insertion = Insertion(num_prefix=60, norm=0.5, cross_attention="none")
    adapter = InsertionAdapter.start(backend, PROMPTS, insertion, seed=0, shared=shared)
    original = backend.encode(PROMPTS)
    original = replace(original, embeds=original.embeds * torch.tensor([1.0, 10, 100])[:, None, None])
    inserted = adapter.condition(backend, PROMPTS, original).embeds[:, :60].norm(dim=-1).mean(1)
    torch.testing.assert_close(inserted, 0.5 * original.norm(), rtol=0.05, atol=0)


def test_conformity_is_in_units_of_the_prompts_and_blind_to_sinks(backend):
    """The same for states of any size, also where the first is a language model's sink."""
    adapter = InsertionAdapter(PROMPTS, 32, Insertion(3, 2, cross_attention="none"))
    original = backend.encode(PROMPTS)
    start = adapter.penalty(original, adapter.condition(backend, PROMPTS, original), None)
    assert start.min() > 1e-3
    large = replace(original, embeds=original.embeds * torch.tensor([0.1, 1, 100])[:, None, None])
    torch.testing.assert_close(
        adapter.penalty(large, adapter.condition(backend, PROMPTS, large), None), start
    )

    sinks = replace(original, embeds=original.embeds.clone())
    sinks.embeds[:, 0] *= 100
    cond = adapter.condition(backend, PROMPTS, sinks)
    seen, blind = (cond.mean() - sinks.mean()).abs().mean(-1), adapter.penalty(sinks, cond, None)
    assert (seen > 3 * start).all()
    assert (blind < 1.5 * start).all()

    paper = InsertionAdapter(PROMPTS, 32, Insertion(3, 2, cross_attention="none", norm=None))
    cond = paper.condition(backend, PROMPTS, large)
    torch.testing.assert_close(paper.penalty(large, cond, None), (cond.mean() - large.mean()).abs().mean(-1))


def test_conformity_leaves_out_the_sinks_wherever_they_stand(backend):
    original = backend.encode(PROMPTS)
    sinks = replace(original, embeds=original.embeds.clone())
    sinks.embeds[:, 0] *= 100
    for prefix, suffix in ((3, 1), (1, 3), (4, 0)):
        adapter = InsertionAdapter(PROMPTS, 32, Insertion(prefix, suffix, cross_attention="none"))
        start, blind = (
            adapter.penalty(each, adapter.condition(backend, PROMPTS, each), None)
            for each in (original, sinks)
        )
        assert (blind < 1.5 * start).all()


def test_a_free_prompt_learns_in_units_of_its_states(backend):
    """The same change of the parameters is the same change of states, for their size, in any of them."""
    adapter = EmbeddingAdapter.start(backend, PROMPTS, shared=False)
    with torch.no_grad():
        adapter.change.normal_(generator=torch.Generator().manual_seed(0))
    original = backend.encode(PROMPTS)
    large = replace(original, embeds=original.embeds * 100)
    learned = adapter.condition(backend, PROMPTS, original)
    torch.testing.assert_close(
        adapter.condition(backend, PROMPTS, large).embeds, learned.embeds * 100, atol=1e-4, rtol=1e-5
    )
    size = (learned.embeds - original.embeds).square().mean((1, 2)).sqrt() * 32**0.5
    torch.testing.assert_close(size, original.norm(), rtol=0.05, atol=0)


def test_a_learned_initial_noise_goes_with_the_plain_noise_of_later_steps(backend):
    adapter = NoiseAdapter.start(backend, PROMPTS, (7,), shared=False)
    with torch.no_grad():
        adapter.latents.add_(1)
    noise, plain = adapter.noise(backend, PROMPTS, [7] * 3, 2), backend.noise([7] * 3, 2)
    torch.testing.assert_close(noise[:, :1], plain[:, :1] + 1)
    assert torch.equal(noise[:, 1:], plain[:, 1:])


def test_only_learned_noise_is_penalised(backend):
    adapter = NoiseAdapter.start(backend, PROMPTS[:1], (7,), shared=False, penalty="norm")
    found = [adapter.penalty(None, None, adapter.noise(backend, PROMPTS[:1], [7], steps)) for steps in (0, 2)]
    assert torch.equal(*found)


def test_zeros_as_a_negative_prompt_get_embeddings_of_the_prompts_norm(backend):
    adapter = InsertionAdapter(PROMPTS, 32, Insertion(60, 0, norm=0.5, negative=True))
    original = backend.encode(PROMPTS)
    zeros = replace(original, embeds=torch.zeros_like(original.embeds))
    cond = adapter.condition(backend, PROMPTS, original)
    uncond = adapter.unconditional(backend, PROMPTS, cond, Sampling(guidance_scale=3), zeros)
    inserted = uncond.embeds[:, :60].norm(dim=-1).mean(1)
    torch.testing.assert_close(inserted, 0.5 * original.norm(), rtol=0.05, atol=0)


def test_what_is_inserted_around_the_negative_prompt_is_not_what_is_around_the_prompt():
    adapter = InsertionAdapter(PROMPTS, 32, Insertion(2, 2, rank=8, negative=True))
    learned = [side.coefficients for side in adapter.sides()]
    assert len(learned) == 4
    assert not any(torch.equal(*pair) for pair in itertools.combinations(learned, 2))


def test_one_side_may_be_empty(backend):
    adapter = InsertionAdapter(PROMPTS, 32, Insertion(num_prefix=0, num_suffix=2))
    cond = adapter.condition(backend, PROMPTS, backend.encode(PROMPTS))
    assert cond.embeds.shape == (3, 79, 32)


def test_attention_modes(backend):
    original = backend.encode(PROMPTS[:1])
    conds = {
        mode: InsertionAdapter(PROMPTS[:1], 32, Insertion(2, 0, cross_attention=mode, norm=0.9)).condition(
            backend, PROMPTS[:1], original
        )
        for mode in ("none", "replace", "residual")
    }
    inserted = {mode: cond.embeds[:, :2] for mode, cond in conds.items()}
    torch.testing.assert_close(inserted["residual"], inserted["none"] + inserted["replace"])
    text = original.embeds[original.mask]  # what attention returns lies within the states' range
    assert (inserted["replace"] <= text.max(0).values + 1e-6).all()
    assert (inserted["replace"] >= text.min(0).values - 1e-6).all()


def test_with_fixed_queries_the_words_stay_while_embeddings_learn(backend, tmp_path):
    original = backend.encode(PROMPTS)
    adapters = {
        mode: InsertionAdapter(PROMPTS, 32, Insertion(2, 1, cross_attention=mode, norm=0.9))
        for mode in ("fixed", "residual", "none")
    }

    def inserted(mode):
        return adapters[mode].condition(backend, PROMPTS, original).embeds[:, :2]

    words = inserted("residual") - inserted("none")
    torch.testing.assert_close(inserted("fixed") - inserted("none"), words)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.prefix.coefficients.neg_()
    torch.testing.assert_close(inserted("fixed") - inserted("none"), words)
    assert not torch.allclose(inserted("residual") - inserted("none"), words, atol=1e-3)
    learned = inserted("fixed")
    save_adapter(adapters["fixed"], tmp_path)
    adapters["fixed"] = load_adapter(tmp_path)
    torch.testing.assert_close(inserted("fixed"), learned, rtol=0, atol=0)


def test_another_width_or_padding_is_refused(backend, pipe):
    with pytest.raises(InputError, match="64 wide; backend 'StableDiffusionPipeline' takes 32"):
        generate(backend, PROMPTS[:1], [0], InsertionAdapter(PROMPTS, 64, INSERTION), SAMPLING)
    unpadded = load_backend(pipe, device="cpu", padding="none")
    with pytest.raises(InputError, match="padding='max_length'; the backend has 'none'"):
        generate(unpadded, PROMPTS[:1], [0], InsertionAdapter(PROMPTS, 32, INSERTION), SAMPLING)


def test_generate_wants_a_seed_for_each_prompt(backend):
    with pytest.raises(InputError, match="2 prompts, 1 seeds"):
        generate(backend, PROMPTS[:2], [0], Adapter(), SAMPLING)


def test_a_negative_prompt_is_read_to_its_end_without_padding_too(pipe):
    backend = load_backend(pipe, device="cpu", padding="none")
    ours, theirs = (
        generate(backend, ["sun"], [0], Adapter(), Sampling(2, 5.0, negative_prompt=text))
        for text in ("on a red background", "on a red fox")
    )
    assert not torch.allclose(ours, theirs, atol=1e-3)


def test_a_negative_prompt_is_read_by_the_tuned_encoder(backend):
    adapter = TextEncoderAdapter.start(backend, ("sun",), 1.0, shared=False)
    with torch.no_grad():
        for value in adapter.changes.values():
            value.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        generate(backend, ["sun"], [0], adapter, Sampling(2, 5.0, negative_prompt=text))
        for text in ("", "a red fox")
    )
    assert not torch.allclose(ours, theirs, atol=1e-3)


def test_a_negative_prompt_without_guidance_is_refused(backend):
    with pytest.raises(InputError, match=r"negative_prompt is 'dark'; without guidance .* it has no effect"):
        generate(backend, ["sun"], [0], sampling=Sampling(2, 1.0, negative_prompt="dark"))


@pytest.mark.parametrize("padding", ["max_length", "none"])
@pytest.mark.parametrize("negative", ["", "blurry", "a blurry and dark picture of a red fox"])
def test_a_plain_pipeline_draws_the_same_picture(pipe, padding, negative):
    backend = load_backend(pipe, device="cpu", padding=padding)
    adapter = InsertionAdapter(PROMPTS, 32, INSERTION, padding)
    sampling = Sampling(steps=3, guidance_scale=3.0, negative_prompt=negative)
    ours = generate(backend, ["sun"], [7], adapter, sampling)
    kwargs = adapter.prompt_kwargs(pipe, "sun", negative)
    theirs = pipe(
        **kwargs,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    length = kwargs["prompt_embeds"].shape[1]  # of both halves
    if negative in ("", "blurry"):
        assert length == (616 if padding == "max_length" else 16)


def test_a_model_without_guidance_gets_no_other_half(make_pipe):
    pipe = make_pipe()
    pipe.register_to_config(_name_or_path="owner/tiny-sd-turbo")
    backend = load_backend(pipe, device="cpu")
    adapter = InsertionAdapter(PROMPTS, 32, INSERTION)
    inserted = 77 + INSERTION.num_prefix + INSERTION.num_suffix
    kwargs = adapter.prompt_kwargs(pipe, "sun")
    assert {name: value.shape for name, value in kwargs.items()} == {"prompt_embeds": (1, inserted, 32)}
    ours = generate(backend, ["sun"], [7], adapter, Sampling(1))
    theirs = pipe(
        **kwargs,
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=backend.noise([7])[:, 0],
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    guided = adapter.prompt_kwargs(pipe, "sun", guidance_scale=2.0)
    assert guided["negative_prompt_embeds"].shape == guided["prompt_embeds"].shape
