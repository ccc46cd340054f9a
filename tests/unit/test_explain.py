"""What is said of inserted embeddings: words, attention and what is lost without them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ipgo import (
    Adapter,
    InputError,
    Insertion,
    InsertionAdapter,
    cli,
    generate,
    load_backend,
    load_reward,
    save_adapter,
)
from ipgo.adapters import NoiseAdapter
from ipgo.backends import Backend
from ipgo.cli_explain import show
from ipgo.explain import Vocabulary, attention_weights, explain
from ipgo.rewards import identity_of
from ipgo.sampling import Sampling, sample
from tests import tiny_families as tiny
from tests.conftest import one_sentence

PROMPT = "a fox"
SAMPLING = Sampling(steps=3, guidance_scale=3.0)
REWARD = load_reward("colorfulness", device="cpu")
FREE = Insertion(2, 1, rank=8, basis="free", rotations="none", norm=0.5, cross_attention="none")


def adapter(backend: Backend, insertion: Insertion = FREE) -> InsertionAdapter:
    return InsertionAdapter((PROMPT,), backend.embed_dim, insertion, backend.padding)


@pytest.fixture(scope="module")
def own(make_pipe: Callable[..., Any]) -> Backend:
    return load_backend(make_pipe(), device="cpu")


@pytest.mark.parametrize("masked", [False, True])
def test_attention_weights_are_those_that_the_layer_uses(own: Backend, masked: bool) -> None:
    layer: Any = next(m for m in own.modules["denoiser"].modules() if getattr(m, "is_cross_attention", False))
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, layer.to_q.in_features)
    states = torch.randn(2, 5, own.embed_dim)
    bias = torch.zeros(2, 1, 5)
    bias[1, 0, 3:] = -10000.0 if masked else 0.0
    with torch.no_grad():
        weights = attention_weights(layer, hidden, states, bias if masked else None)
        expected = layer(hidden, encoder_hidden_states=states, attention_mask=bias if masked else None)
        values = layer.to_v(states).view(2, 5, layer.heads, -1).transpose(1, 2)
        output = layer.to_out[0]((weights @ values).transpose(1, 2).flatten(2))
        queries, keys = (
            x.view(2, -1, layer.heads, values.shape[-1]).transpose(1, 2)
            for x in (layer.to_q(hidden), layer.to_k(states))
        )
        alone = (
            torch.einsum("bhqd,bhkd->bhqk", queries, keys) / values.shape[-1] ** 0.5 + bias[:, None]
        ).softmax(-1)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, alone)


def test_normalised_queries_and_keys_are_those_of_the_layer() -> None:
    backend = load_backend(tiny.sana_sprint(), device="cpu")
    layer: Any = next(
        m for m in backend.modules["denoiser"].modules() if getattr(m, "is_cross_attention", False)
    )
    assert layer.norm_q is not None
    torch.manual_seed(0)
    hidden, states = (
        3 * torch.randn(2, n, each.in_features) for n, each in ((9, layer.to_q), (5, layer.to_k))
    )
    with torch.no_grad():
        weights = attention_weights(layer, hidden, states)
        values = layer.to_v(states).view(2, 5, layer.heads, -1).transpose(1, 2)
        output = layer.to_out[0]((weights @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(output, layer(hidden, encoder_hidden_states=states), atol=1e-5, rtol=1e-4)


def test_shares_add_up_and_the_backend_stays_as_it_is(own: Backend) -> None:
    learned = adapter(own)
    before = generate(own, [PROMPT], [0], learned, SAMPLING)
    found = explain(own, learned, PROMPT, (0, 1), SAMPLING, REWARD, Vocabulary.of(own))
    for step in range(3):
        inserted = sum(each.attention[step] for each in found.inserted)
        assert inserted + found.text_attention[step] + found.padding_attention[step] == pytest.approx(
            1, abs=1e-5
        )
        assert min(each.attention[step] for each in found.inserted) > 0
    assert torch.equal(generate(own, [PROMPT], [0], learned, SAMPLING), before)
    assert all(not module._forward_pre_hooks for module in own.modules["denoiser"].modules())
    assert [(each.side, each.position) for each in found.inserted] == [
        ("prefix", 0),
        ("prefix", 1),
        ("suffix", 0),
    ]


def test_without_padding_nothing_is_given_to_it(make_pipe: Callable[..., Any]) -> None:
    backend = load_backend(make_pipe(), device="cpu", padding="none")
    found = explain(backend, adapter(backend), PROMPT, (0,), SAMPLING, REWARD, Vocabulary(backend, ["a"]))
    assert found.padding_attention == (0.0, 0.0, 0.0)


def looked_apart(layer: Any, hidden: Any, encoder_hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
    """The negative prompt's half looks at the first state, the prompt's at the second."""
    rows, length = encoder_hidden_states.shape[:2]
    weights = torch.zeros(rows, 1, 1, length)
    weights[: rows // 2, ..., 0] = 1
    weights[rows // 2 :, ..., 1] = 1
    return weights


def test_attention_is_that_of_the_prompts_own_half_of_guidance(
    own: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipgo.explain.attention_weights", looked_apart)
    found = explain(own, adapter(own), PROMPT, (0, 1), SAMPLING, REWARD, Vocabulary(own, ["a"]))
    assert [each.attention for each in found.inserted] == [(0,) * 3, (1,) * 3, (0,) * 3]


def test_the_padding_has_a_share_of_its_own(own: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    def looked(layer: Any, hidden: Any, encoder_hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
        rows, length = encoder_hidden_states.shape[:2]
        weights = torch.zeros(rows, 1, 1, length)
        weights[..., 2] = 0.5  # the mark of the start, after two of the prefix
        weights[..., length - 2] = 0.375  # the last state of padding
        weights[..., length - 1] = 0.125  # of the suffix
        return weights

    monkeypatch.setattr("ipgo.explain.attention_weights", looked)
    found = explain(own, adapter(own), PROMPT, (0,), SAMPLING, REWARD, Vocabulary(own, ["a"]))
    assert (found.text_attention, found.padding_attention) == ((0.5,) * 3, (0.375,) * 3)


def test_where_text_and_image_attend_in_one_all_but_attention_is_told() -> None:
    backend = load_backend(tiny.sd3(), device="cpu")
    found = explain(
        backend, adapter(backend), PROMPT, (0,), SAMPLING, REWARD, Vocabulary(backend, ["a", "b"])
    )
    assert found.text_attention == found.padding_attention == ()
    assert all(each.attention == () and each.words and each.norm > 0 for each in found.inserted)
    assert "attention: inserted –, prompt –, padding –" in show(found)


def test_leaving_one_out_is_an_adapter_without_it(own: Backend) -> None:
    learned = adapter(own)
    found = explain(own, learned, PROMPT, (0, 1), SAMPLING, REWARD, Vocabulary(own, ["a"]))

    def value(which: Any) -> float:
        return float(REWARD(generate(own, [PROMPT] * 2, [0, 1], which, SAMPLING), [PROMPT] * 2).mean())

    assert found.value == pytest.approx(value(learned), abs=1e-6)
    assert found.raw == pytest.approx(value(Adapter()), abs=1e-6)
    kept = adapter(
        own, Insertion(1, 1, rank=8, basis="free", rotations="none", norm=0.5, cross_attention="none")
    )
    with torch.no_grad():
        for side, other in zip(kept.sides(), learned.sides(), strict=True):
            assert side.vectors is not None
            assert other.vectors is not None
            side.vectors.copy_(other.vectors[:, -1:])  # without the first of the prefix
    assert found.inserted[0].without == pytest.approx(value(kept) - value(learned), abs=1e-6)
    assert abs(found.inserted[0].without) > 1e-6


BOTH = replace(FREE, negative=True)


def test_what_is_inserted_around_the_negative_prompt_is_told_too(own: Backend) -> None:
    learned = adapter(own, BOTH)
    found = explain(own, learned, PROMPT, (0, 1), SAMPLING, REWARD, Vocabulary(own, ["a"]))
    sides = [(each.side, each.position) for each in found.inserted]
    expected = [("prefix", 0), ("prefix", 1), ("suffix", 0)]
    assert sides == expected + [(f"negative {side}", position) for side, position in expected]
    prompts, noise = [PROMPT] * 2, own.noise([0, 1])
    with torch.no_grad():
        original = own.encode(prompts)
        cond = learned.condition(own, prompts, original)
        uncond = learned.unconditional(own, prompts, cond, SAMPLING)
        raw = Adapter().unconditional(own, prompts, original, SAMPLING)
        assert uncond is not None
        assert raw is not None

        def value(without: int | None = None) -> float:
            kept = [place for place in range(uncond.length) if place != without]
            images = sample(own, cond, uncond.keep(kept), noise, SAMPLING)
            return float(REWARD(images, prompts).mean())

        whole = value()
        for each, place in zip(found.inserted[3:], (0, 1, uncond.length - 1), strict=True):
            vector, mean = uncond.embeds[0, place], raw.mean()[0]
            cosine = torch.cosine_similarity(vector, mean, dim=0)
            assert each.norm == pytest.approx(float(vector.norm()), rel=1e-5)
            assert each.to_prompt == pytest.approx(float(cosine), abs=1e-5)
            assert each.without == pytest.approx(value(place) - whole, abs=1e-6)
            assert abs(each.without) > 1e-6
            assert each.words
    shown = show(found)
    assert "negative suffix 1" in shown
    around = sum(sum(each.attention) for each in found.inserted[:3]) / 3
    assert f"attention: inserted {around:.1%}," in shown


def test_each_half_of_guidance_has_shares_of_its_own(own: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative prompt's half looks at the first state here, the prompt's at the second."""
    monkeypatch.setattr("ipgo.explain.attention_weights", looked_apart)
    found = explain(own, adapter(own, BOTH), PROMPT, (0,), SAMPLING, REWARD, Vocabulary(own, ["a"]))
    firsts = [each.attention[0] for each in found.inserted]
    assert firsts == [0, 1, 0, 1, 0, 0]


def test_without_guidance_nothing_is_told_of_the_negative_prompt(own: Backend) -> None:
    plain = replace(SAMPLING, guidance_scale=1.0)
    found = explain(own, adapter(own, BOTH), PROMPT, (0,), plain, REWARD, Vocabulary(own, ["a"]))
    assert [each.side for each in found.inserted] == ["prefix", "prefix", "suffix"]


def test_the_nearest_word_of_a_words_state_is_that_word(own: Backend) -> None:
    words = Vocabulary.of(own)
    assert {"a", "q", "7"} <= set(words.words)
    assert "Q" not in words.words
    with torch.no_grad():
        encoded = own.encode(["q"])
    (nearest,) = words.nearest(5 * encoded.embeds[:, 1], 2)
    assert nearest[0][0] == "q"
    assert nearest[0][1] == pytest.approx(1, abs=1e-5)
    assert nearest[1][1] < nearest[0][1]


def test_a_word_has_a_state_of_each_text_encoder() -> None:
    """SD3's text is CLIP's and then T5's, with padding between."""
    pipe = tiny.sd3()
    backend = load_backend(pipe, device="cpu")
    words = Vocabulary(backend, ["sun", "q", "cat"])
    assert words.states.shape == (3, 2, backend.embed_dim)
    with torch.no_grad():
        ids = pipe.tokenizer(["sun"], padding="max_length", return_tensors="pt").input_ids
        encoders = (pipe.text_encoder, pipe.text_encoder_2)
        clip = torch.cat([each(ids, output_hidden_states=True).hidden_states[-2][0, 3] for each in encoders])
        ids = pipe.tokenizer_3(["sun"], padding="max_length", return_tensors="pt").input_ids
        t5 = pipe.text_encoder_3(ids)[0][0, ids[0].tolist().index(pipe.tokenizer_3.eos_token_id) - 1]
    clip = torch.cat([clip, clip.new_zeros(backend.embed_dim - len(clip))])
    for state in (clip, t5):
        ((nearest, _),) = words.nearest(3 * state[None], 2)
        assert nearest[0] == "sun"
        assert nearest[1] == pytest.approx(1, abs=1e-5)


def test_norms_and_drift_by_hand(own: Backend) -> None:
    learned = adapter(own)
    found = explain(own, learned, PROMPT, (0,), SAMPLING, REWARD, Vocabulary(own, ["a"]))
    with torch.no_grad():
        text = own.encode([PROMPT])
        states = text.embeds[0, text.mask[0]]
        inserted = torch.cat([text.norm() * side(torch.tensor([0]))[0] for side in learned.sides()])
    for each, vector in zip(found.inserted, inserted, strict=True):
        assert each.norm == pytest.approx(float(vector.norm()), rel=1e-5)
    moved = torch.cat([states, inserted]).mean(0) - states.mean(0)
    assert found.drift == pytest.approx(float(moved.norm() / states.mean(0).norm()), rel=1e-4)
    assert found.prompt_norm == pytest.approx(float(states.norm(dim=1).median()), rel=1e-5)


def test_the_cosine_with_the_prompt_by_hand(own: Backend) -> None:
    learned = adapter(own)
    found = explain(own, learned, PROMPT, (0,), SAMPLING, REWARD, Vocabulary(own, ["a"]))
    with torch.no_grad():
        text = own.encode([PROMPT])
        mean = text.embeds[0, text.mask[0]].mean(0)
        vectors = torch.cat([side(torch.tensor([0]))[0] for side in learned.sides()])
    for each, vector in zip(found.inserted, vectors, strict=True):
        assert each.to_prompt == pytest.approx(float(vector @ mean / (vector.norm() * mean.norm())), abs=1e-5)


def test_the_command_prints_a_table_and_writes_json(
    pipeline_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = load_backend(pipeline_folder, device="cpu")
    sampling = {"steps": 2, "guidance_scale": 3.0, "eta": 0.0, "negative_prompt": ""}
    save_adapter(adapter(backend), tmp_path / "one", {"backend": pipeline_folder, "sampling": sampling})
    words = ["explain", str(tmp_path / "one"), "--reward", "contrast", "--out", str(tmp_path / "found.json")]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "prefix 2" in out
    assert "reward without" in out
    stored = json.loads((tmp_path / "found.json").read_text())
    assert stored["rewards"] == {"contrast": identity_of(load_reward("contrast", device="cpu"))}
    found = stored["prompts"][0]
    assert (found["prompt"], found["reward"], len(found["inserted"])) == (PROMPT, "contrast", 3)
    assert cli.main(words[:2]) == 2
    assert "name a reward with --reward" in capsys.readouterr().err


@pytest.mark.parametrize("every", [-1, 1000])
def test_what_was_explained_is_kept_when_a_later_prompt_fails(
    pipeline_folder: str, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = load_backend(pipeline_folder, device="cpu")
    out, reward = tmp_path / "found.json", tmp_path / "mine.py"
    reward.write_text(
        "from pathlib import Path\n\n\ndef fussy(images, prompts):\n    if 'a lemon' in prompts:\n"
        f"        Path({str(tmp_path)!r}, 'there').write_text(str(Path({str(out)!r}).exists()))\n"
        "        raise ValueError('no')\n    return images.mean((1, 2, 3))\n"
    )
    shared = InsertionAdapter(None, backend.embed_dim, FREE, backend.padding)
    save_adapter(shared, tmp_path / "all", {"backend": pipeline_folder, "sampling": {"steps": 1}})
    monkeypatch.setattr("ipgo.cli_explain.EVERY", every)
    words = ["explain", str(tmp_path / "all"), PROMPT, "a lemon", "a moose", "--reward", f"{reward}:fussy"]
    assert cli.main([*words, "--out", str(out)]) == 2
    assert [each["prompt"] for each in json.loads(out.read_text())["prompts"]] == [PROMPT]
    assert (tmp_path / "there").read_text() == str(every < 0)  # also for a process that is killed


def test_other_adapters_are_refused_in_a_sentence(own: Backend) -> None:
    noise = NoiseAdapter((PROMPT,), (1, 4, 8, 8), 0)
    with pytest.raises(InputError, match=r"kind 'noise'; only inserted embeddings are explained"):
        explain(own, noise, PROMPT, (0,), SAMPLING, REWARD, Vocabulary(own, ["a"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward", "nosuch"], "unknown reward 'nosuch'"),
        (["--reward", "contrast", "--top", "0"], "top is 0; it must be at least 1"),
        (["a moose", "--reward", "contrast"], "not fitted to prompt 'a moose'"),
        (["", "--reward", "contrast"], "prompt 1 is empty"),
        (["--reward", "contrast", "--seeds", "-1"], "seeds is [-1]; they must be different whole numbers"),
        (["--reward", "contrast", "--out", "."], "out is '.', which is a folder"),
    ],
)
@pytest.mark.usefixtures("no_models")
def test_bad_input_is_one_sentence_before_a_model_is_loaded(
    own: Backend, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"backend": "emoji", "sampling": {"steps": 2}}
    save_adapter(adapter(own), tmp_path / "one", settings)
    save_adapter(NoiseAdapter((PROMPT,), (1, 4, 8, 8), 0), tmp_path / "noise", settings)
    assert cli.main(["explain", str(tmp_path / "one"), *flags]) == 2
    assert message in one_sentence(capsys)
    assert cli.main(["explain", str(tmp_path / "noise"), "--reward", "contrast"]) == 2
    assert "this adapter is of kind 'noise'" in capsys.readouterr().err
