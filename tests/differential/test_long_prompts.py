"""Prompts in windows, against transformers' encoders on each window by itself, and against the pipelines' own call."""

from dataclasses import replace

import pytest
import torch

from ipgo import cli
from ipgo.adapters import (
    Adapter,
    EmbeddingAdapter,
    InsertionAdapter,
    NoiseAdapter,
    TextAdapter,
    generate,
    stack,
)
from ipgo.artefacts import adapter_facts
from ipgo.ascent import Ascent
from ipgo.backends import load_backend
from ipgo.embeds import concatenate
from ipgo.errors import InputError
from ipgo.fitting import fit
from ipgo.insertion import Insertion
from ipgo.methods import IPGO, Raw
from ipgo.prompts import number
from ipgo.relaxation import Relaxation
from ipgo.rewards import as_reward
from ipgo.sampling import Sampling
from ipgo.store import Run
from ipgo.task import Task
from tests import tiny_families as tiny
from tests.conftest import redness, tiny_pipeline

WORDS = ["black", "white", "brown", "green", "amber"]  # fifteen of them are the 75 tokens of a window
LONG = " ".join(WORDS * 6 + ["sun"])  # two windows of 75, and three tokens more
PIECES = [" ".join(WORDS * 3), " ".join(WORDS * 3), "sun"]
FULL = " ".join(WORDS * 3)  # 77 with its marks, so one window
TWO = " ".join(WORDS * 5)
SHORT = "a red cat"
SAMPLING = Sampling(2, 3.0)
BUILD = {"sd": tiny_pipeline, "sdxl": lambda: tiny.sdxl(zeros=False)}


@pytest.fixture(scope="module", params=BUILD)
def pipe(request):
    return BUILD[request.param]()


def chunked(pipe, **options):
    return load_backend(pipe, device="cpu", long_prompts="chunk", **options)


def encoded(pipe, texts):
    """Each text in a window of its own: (1, 77 n, D) states side by side, and the vector of the first, or None."""
    sides, vector = [], None
    for name in ("", "_2"):
        tokenizer, encoder = (getattr(pipe, f"{part}{name}", None) for part in ("tokenizer", "text_encoder"))
        if encoder is None:
            continue
        states = []
        for text in texts:
            tokens = tokenizer([text], padding="max_length", max_length=77, return_tensors="pt")
            assert tokens.input_ids.shape == (1, 77)  # nothing would be cut
            with torch.no_grad():
                answer = encoder(tokens.input_ids, output_hidden_states=True)
            states.append(answer.hidden_states[-2] if hasattr(pipe, "text_encoder_2") else answer[0])
            if vector is None:
                vector = getattr(answer, "text_embeds", None)
        sides.append(torch.cat(states, dim=1))
    return torch.cat(sides, dim=-1), vector


def test_windows_are_encoded_apart(pipe):
    backend = chunked(pipe)
    with torch.no_grad():
        ours = backend.encode([LONG])
    states, vector = encoded(pipe, PIECES)
    torch.testing.assert_close(ours.embeds, states, atol=1e-5, rtol=0)
    assert ours.mask.sum().item() == 77 + 77 + 5
    assert ours.mask[0, :159].all()
    assert (ours.pooled is None) == (vector is None)
    if vector is not None:
        torch.testing.assert_close(ours.pooled, vector, atol=1e-5, rtol=0)


def test_a_prompt_of_one_window_is_as_ever(pipe):
    usual, windows = load_backend(pipe, device="cpu"), chunked(pipe)
    for prompts in ([SHORT], [FULL, SHORT], [""]):
        with torch.no_grad():
            pair = [backend.encode(prompts) for backend in (usual, windows)]
        assert torch.equal(pair[0].embeds, pair[1].embeds)
        assert torch.equal(pair[0].mask, pair[1].mask)
        assert pair[1].present is None


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("negative", ["blurry", TWO])
def test_a_plain_pipeline_draws_the_same_image(pipe, scale, negative):
    backend = chunked(pipe)
    sampling = Sampling(2, scale, negative_prompt=negative if scale > 1 else "")
    states, vector = encoded(pipe, PIECES)
    other, other_vector = encoded(pipe, [negative] if negative != TWO else [FULL, " ".join(WORDS * 2)])
    # Repeated to a common length, which leaves cross-attention as it is.
    given = {
        "prompt_embeds": states.repeat(1, other.shape[1] // 77, 1),
        "negative_prompt_embeds": other.repeat(1, 3, 1),
    }
    if vector is not None:
        given |= {"pooled_prompt_embeds": vector, "negative_pooled_prompt_embeds": other_vector}
    ours = generate(backend, [LONG], [3], Adapter(), sampling)
    theirs = pipe(
        **given,
        latents=backend.noise([3])[:, 0],
        num_inference_steps=2,
        guidance_scale=scale,
        output_type="pt",
    ).images
    assert ours.std() > 0.02
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    cut = load_backend(pipe, device="cpu", long_prompts="truncate")
    assert (generate(cut, [LONG], [3], Adapter(), sampling) - ours).abs().max() > 1e-3


@pytest.mark.parametrize("padding", ["max_length", "none"])
def test_adapters_give_a_plain_pipeline_their_prompts(pipe, padding):
    backend = chunked(pipe, padding=padding)
    adapter = InsertionAdapter.start(backend, [LONG], Insertion(2, 2, rank=4), seed=0, shared=False)
    assert adapter.options["long_prompts"] == "chunk"
    copy = stack([adapter.row(0)])  # rebuilt from its options, as from a file
    ours = generate(backend, [LONG], [3], adapter, SAMPLING)
    kwargs = copy.prompt_kwargs(pipe, LONG)
    noise = backend.noise([3])[:, 0]
    theirs = pipe(**kwargs, latents=noise, num_inference_steps=2, guidance_scale=3.0, output_type="pt").images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_the_noise_of_a_long_prompt(pipe):
    adapter = NoiseAdapter.start(chunked(pipe), [LONG], [3], shared=False)
    theirs = pipe(
        **adapter.prompt_kwargs(pipe, LONG), num_inference_steps=2, guidance_scale=3.0, output_type="pt"
    ).images
    ours = generate(chunked(pipe), [LONG], [3], adapter, SAMPLING)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("padding", ["max_length", "none"])
@pytest.mark.parametrize("backprop_steps", [0, 1])
def test_a_row_does_not_depend_on_longer_neighbours(pipe, padding, backprop_steps):
    """In one call for both halves of guidance, and in one for each."""
    backend = chunked(pipe, padding=padding)
    prompts = [SHORT, LONG, TWO]
    adapter = InsertionAdapter(prompts, backend.embed_dim, Insertion(2, 2, rank=4), padding)
    options = {"adapter": adapter, "sampling": SAMPLING, "backprop_steps": backprop_steps}
    together = generate(backend, prompts, [1, 2, 3], **options)
    for row, prompt in enumerate(prompts):
        alone = generate(backend, [prompt], [1 + row], **options)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)


def test_filling_counts_as_nothing():
    """In means, norms and conformity it would be text if the mask said so, and it is hidden from the denoiser."""
    backend = chunked(tiny_pipeline())
    with torch.no_grad():
        both, alone = backend.encode([SHORT, LONG]), backend.encode([SHORT])
    torch.testing.assert_close(both.mean()[:1], alone.mean())
    torch.testing.assert_close(both.norm()[:1], alone.norm())
    assert both.present.sum(1).tolist() == [77, 231]
    longer = both.insert(torch.zeros(2, 2, 32), torch.zeros(2, 1, 32))
    assert longer.present.sum(1).tolist() == [80, 234]
    assert longer.present[0, :79].all()
    assert longer.present[0, -1]
    assert longer.select(torch.tensor([1, 0])).present.sum(1).tolist() == [234, 80]
    joined = concatenate([alone, backend.encode([LONG])])
    assert torch.equal(joined.present, both.present)
    with pytest.raises(InputError, match="takes prompts of equal length; give it these one by one"):
        backend.pipeline_kwargs(both, None)
    assert backend.pipeline_kwargs(replace(both, present=None), None)["prompt_embeds"].shape == (2, 231, 32)


def test_a_rewritten_negative_prompt_may_be_long():
    backend = chunked(tiny_pipeline())
    adapter = TextAdapter(["a dog", "sun"])
    adapter.set_negatives([TWO, ""])
    pair = generate(backend, ["a dog", "sun"], [1, 2], adapter, SAMPLING)
    for row, (prompt, negative) in enumerate([("a dog", TWO), ("sun", "")]):
        sampling = replace(SAMPLING, negative_prompt=negative)
        alone = generate(backend, [prompt], [1 + row], Adapter(), sampling)
        torch.testing.assert_close(pair[row : row + 1], alone, atol=1e-5, rtol=0)


def test_prompts_of_unequal_length_are_fitted_together():
    backend = chunked(tiny_pipeline())
    method = IPGO(
        Insertion(2, 2, rank=4, norm=0.4), Ascent(steps=4, lr=0.05, backprop_steps=None, penalty_weight=0.0)
    )

    def rewards(prompts, method):
        task = Task(backend, as_reward(redness), prompts, SAMPLING)
        return list(method.fit(task))[-1].best

    together = rewards((SHORT, LONG), method)
    torch.testing.assert_close(together[1:], rewards((LONG,), method), atol=1e-4, rtol=0)
    assert (together > rewards((SHORT, LONG), Raw())).all()


@pytest.mark.parametrize("padding", ["max_length", "none"])
def test_the_fifteen_prompts_that_the_notebook_skips(padding):
    """Of Pick-a-Pic: with 20 embeddings more than 77, and ten of them longer than that by themselves."""
    lengths = (58, 60, 66, 71, 77, 78, 79, 90, 99, 120, 151, 152, 153, 180, 226)
    prompts = ["x" * (length - 2) for length in lengths]
    backend = chunked(tiny_pipeline(), padding=padding)
    assert tuple(len(ids) for ids in backend.tokenizer(prompts).input_ids) == lengths
    ascent = Ascent(steps=3, lr=0.05, backprop_steps=None, penalty_weight=0.0)
    given = {
        "method": IPGO(Insertion(10, 10, rank=4), ascent),
        "sampling": SAMPLING,
        "seeds": (0,),
        "unseen_seeds": 0,
    }
    result = fit(prompts, backend=backend, reward="contrast", **given)
    assert [fitted.prompt for fitted in result] == prompts
    for fitted in result:
        rewards = [line["reward"] for line in fitted.history]
        assert not fitted.failed
        assert max(rewards) > rewards[0]
        assert {each.method for each in fitted.scores} == {"raw", "ipgo"}


def test_a_run_records_it(tmp_path):
    method = IPGO(Insertion(1, 0, rank=2), Ascent(steps=1, backprop_steps=1))
    options = {"method": method, "sampling": Sampling(1, 1.0), "unseen_seeds": 0, "out": tmp_path / "run"}
    result = fit([LONG], backend=chunked(tiny_pipeline()), reward="contrast", **options)
    assert Run.open(tmp_path / "run").config.long_prompts == "chunk"
    assert adapter_facts(Run.open(tmp_path / "run").folder(number((LONG,))[0]))["settings"][
        "long_prompts"
    ] == ("chunk")
    assert result[0].adapter.long_prompts == "chunk"


def test_the_command_line(pipeline_folder, tmp_path, capsys):
    words = ["fit", LONG, "--backend", pipeline_folder, "--reward", "contrast", "--sampling.steps", "2"]
    words += ["--method.ascent.steps", "1", "--method.ascent.backprop_steps", "1", "--unseen-seeds", "0"]
    words += ["--held-out", "colorfulness", "--out", str(tmp_path / "run")]
    assert cli.main(words) == 2
    assert (
        'has 155 tokens and the encoder takes 77; shorten it, or set long_prompts to "truncate" or "chunk"'
        in (capsys.readouterr().err)
    )
    assert cli.main([*words, "--long-prompts", "chunk"]) == 0
    assert cli.main(["generate", str(tmp_path / "run"), "--out", str(tmp_path / "images")]) == 0
    assert len(list((tmp_path / "images").iterdir())) == 1


def test_whole_prompts_of_unequal_windows_are_learned_alone_and_together(pipe):
    """Fitted together or apart and stacked: the same pictures, and gradient at a prompt's own windows alone."""
    backend = chunked(pipe)
    together = EmbeddingAdapter.start(backend, [SHORT, LONG], shared=False)
    assert together.change.shape == (2, 231, backend.embed_dim)
    with torch.no_grad():
        together.change += torch.randn(together.change.shape, generator=torch.Generator().manual_seed(0))
    apart = [EmbeddingAdapter.start(backend, [text], shared=False) for text in (SHORT, LONG)]
    assert apart[0].change.shape[1] == 77
    with torch.no_grad():
        for row, alone in enumerate(apart):
            alone.change.copy_(together.change[row : row + 1, : alone.change.shape[1]])
    stacked = stack(apart)
    for prompts in ([SHORT], [LONG], [SHORT, LONG]):
        images = [
            generate(backend, prompts, [3] * len(prompts), each, SAMPLING) for each in (together, stacked)
        ]
        assert torch.equal(*images)
        if len(prompts) == 1:
            alone = apart[prompts[0] == LONG]
            assert torch.equal(generate(backend, prompts, [3], alone, SAMPLING), images[0])
    with pytest.raises(InputError, match="with equal options"):
        stack([EmbeddingAdapter([SHORT], 77, 8), EmbeddingAdapter([LONG], 64, 8)])
    generate(backend, [SHORT, LONG], [3, 3], together, SAMPLING, backprop_steps=1).sum().backward()
    reached = together.change.grad.abs().sum(-1) > 0
    assert reached[0, :77].any()
    assert not reached[0, 77:].any()
    assert reached[1, 77:].any()


def test_what_cannot_be_read_in_windows_is_refused():
    for build, name in ((tiny.sd3, "StableDiffusion3Pipeline"), (tiny.pixart, "PixArtAlphaPipeline")):
        with pytest.raises(InputError, match=f"with {name} only 'refuse' and 'truncate' are possible"):
            chunked(build())
    backend = chunked(tiny_pipeline())
    with pytest.raises(InputError, match="the gradient of words reads one window"):
        Relaxation(backend)
    with pytest.raises(InputError, match='set long_prompts to "truncate" or "chunk"'):
        load_backend(tiny_pipeline(), device="cpu").encode([LONG])
