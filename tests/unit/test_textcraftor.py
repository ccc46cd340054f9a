"""TextCraftor: a tuned text encoder whose states reach the late steps alone."""

import dataclasses

import pytest
import torch

from ipgo.adapters import Adapter, TextEncoderAdapter, generate, stack
from ipgo.artefacts import load_adapter, save_adapter
from ipgo.backends import load_backend
from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError
from ipgo.methods import TextCraftor
from ipgo.rewards import load_reward, score
from ipgo.sampling import Sampling, decode
from ipgo.task import Task
from tests import tiny_families as tiny
from tests.conftest import assert_same_state, difference_quotient, quantised

PROMPTS = ("a red cat", "sun")
SAMPLING = Sampling(steps=3, guidance_scale=3.0)
REWARD = load_reward("colorfulness", device="cpu")


def tuned(backend, late_share=1.0, prompts=PROMPTS, scale=0.05):
    """One that changes something, for each prompt something else."""
    adapter = TextEncoderAdapter.start(backend, prompts, late_share, shared=False)
    with torch.no_grad():
        for number, value in enumerate(adapter.changes.values()):
            value.copy_(scale * torch.randn(value.shape, generator=torch.Generator().manual_seed(number)))
    return adapter


def write(adapter, row, backend):
    """The same change, in the weights of a backend."""
    with torch.no_grad():
        for name, weight in backend.modules["text_encoder"].named_parameters():
            weight += adapter.changes[name.replace(".", "/")][row]


@pytest.mark.parametrize("padding", ["max_length", "none"])
def test_no_change_is_the_raw_prompt(pipe, padding):
    backend = load_backend(pipe, device="cpu", padding=padding)
    raw = generate(backend, PROMPTS, [1, 2], Adapter(), SAMPLING)
    for shared in (False, True):
        adapter = TextEncoderAdapter.start(backend, PROMPTS, 0.5, shared=shared)
        assert torch.equal(generate(backend, PROMPTS, [1, 2], adapter, SAMPLING), raw)


def test_a_change_is_one_of_weights_and_leaves_no_trace(make_pipe):
    """At all steps and in both halves of guidance it is what a pipeline with such an encoder draws."""
    backend = load_backend(make_pipe(), device="cpu")
    encoder = backend.modules["text_encoder"]
    weights = dict(encoder.named_parameters())
    values = {name: value.clone() for name, value in encoder.state_dict().items()}
    raw = generate(backend, PROMPTS, [1, 2], Adapter(), SAMPLING)
    adapter = tuned(backend)
    changed = generate(backend, PROMPTS, [1, 2], adapter, SAMPLING)
    assert all(weight is weights[name] for name, weight in encoder.named_parameters())
    assert all(torch.equal(value, values[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(generate(backend, PROMPTS, [1, 2], Adapter(), SAMPLING), raw)
    for row, prompt in enumerate(PROMPTS):
        other = load_backend(make_pipe(), device="cpu")
        write(adapter, row, other)
        expected = generate(other, [prompt], [1 + row], Adapter(), SAMPLING)
        torch.testing.assert_close(changed[row : row + 1], expected, atol=1e-5, rtol=0)
        assert not torch.allclose(expected, raw[row : row + 1], atol=1e-3)


def test_an_error_in_the_encoder_leaves_no_trace(backend, monkeypatch):
    adapter = tuned(backend)
    weights = dict(backend.modules["text_encoder"].named_parameters())
    monkeypatch.setattr(backend, "encode", lambda prompts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapter.condition(backend, PROMPTS, None)
    now = backend.modules["text_encoder"].named_parameters()
    assert all(weight is weights[name] for name, weight in now)


def test_tuned_states_act_at_the_late_steps_alone(make_pipe):
    """By hand: two steps with the frozen encoder, and the third with the tuned one."""
    backend, other = (load_backend(make_pipe(), device="cpu") for _ in range(2))
    adapter = tuned(backend, late_share=1 / 3, prompts=PROMPTS[:1])
    write(adapter, 0, other)
    latents = backend.noise([5])[:, 0]
    scheduler = backend.scheduler(3, latents)
    with torch.no_grad():
        for number, timestep in enumerate(scheduler.timesteps):
            encoder = other if number == 2 else backend
            cond = encoder.encode(PROMPTS[:1])
            uncond = encoder.unconditional("", cond)
            prediction = backend.predict(latents, timestep, cond, uncond, 3.0)
            latents = scheduler.step(prediction, timestep, latents).prev_sample
        expected = decode(backend, latents)
    drawn = generate(backend, PROMPTS[:1], [5], adapter, SAMPLING)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)
    raw = generate(backend, PROMPTS[:1], [5], Adapter(), SAMPLING)
    early = generate(backend, PROMPTS[:1], [5], tuned(backend, prompts=PROMPTS[:1]), SAMPLING)
    assert not torch.allclose(drawn, raw, atol=1e-4)
    assert not torch.allclose(drawn, early, atol=1e-4)


@pytest.mark.parametrize(
    ("share", "steps", "late"), [(0.6, 25, 15), (0.6, 20, 12), (0.2, 25, 5), (1.0, 7, 7), (0.01, 7, 1)]
)
def test_late_steps_are_a_share_of_all(share, steps, late):
    early = PromptEmbeds(torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool))
    both = dataclasses.replace(early, embeds=torch.ones(2, 1, 1), early=early, late_share=share)
    assert sum(both.at(step, steps) is both for step in range(steps)) == late
    assert both.at(steps - 1, steps) is both
    assert all(early.at(step, steps) is early for step in range(steps))
    picked = both.select(torch.tensor([1])).insert(torch.ones(1, 2, 1), torch.ones(1, 0, 1))
    assert (picked.early.embeds.flatten().tolist(), picked.late_share) == ([1, 1, 0], share)


def test_the_gradient_flows_through_both_prompts(backend64):
    """Against a finite difference, along itself, with the negative prompt's states tuned as well."""
    adapter = tuned(backend64, prompts=PROMPTS[:1], scale=0.02)

    def reward(backprop_steps=0):
        images = generate(backend64, PROMPTS[:1], [1], adapter, SAMPLING, backprop_steps=backprop_steps)
        return images.square().mean()

    adapter.double()
    parameters = list(adapter.parameters())
    slopes = torch.autograd.grad(reward(backprop_steps=3), parameters)
    length = torch.cat([slope.flatten() for slope in slopes]).norm()
    measured = difference_quotient(reward, parameters, [slope / length for slope in slopes], step=1e-5)
    assert measured.item() == pytest.approx(length.item(), rel=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_a_fit_climbs_resumes_and_draws_what_it_promised(backend, tmp_path, shared):
    defaults = TextCraftor()
    assert (defaults.late_share, defaults.ascent.backprop_steps) == (0.6, 5)
    quick = dataclasses.replace(
        defaults.ascent, steps=5, lr=3e-3, backprop_steps=2, batch_size=2, accumulate=1
    )
    method = dataclasses.replace(defaults, ascent=quick)
    task = Task(backend, REWARD, PROMPTS, SAMPLING, shared=shared)
    steps = list(method.fit(task))
    last, state = steps[-1], next(method.fit(task)).state()
    assert last.adapter.transfers == "seeds"
    raw = score(REWARD, generate(backend, PROMPTS, [0, 0], Adapter(), SAMPLING), PROMPTS)
    torch.testing.assert_close(steps[0].rewards, raw)
    assert (last.best > raw + 1e-4).all()
    promised = last.best
    if shared:  # the last update counts too: what one more step draws
        longer = dataclasses.replace(method, ascent=dataclasses.replace(quick, steps=6))
        promised = list(longer.fit(task))[-1].rewards
    adapters = [last.adapter] if shared else [last.adapter.row(row) for row in range(2)]
    for row, prompt in enumerate(PROMPTS):
        save_adapter(adapters[0 if shared else row], tmp_path / str(row))
        stored = load_adapter(tmp_path / str(row))
        assert stored.late_share == defaults.late_share
        images = generate(backend, [prompt], [0], stored, SAMPLING)
        torch.testing.assert_close(score(REWARD, images, [prompt]), promised[row : row + 1])
    if not shared:
        assert stack(adapters).prompts == PROMPTS
    resumed = list(method.fit(task, resume=state))[-1].state()
    assert_same_state(last.state(), resumed)


@pytest.mark.parametrize("options", [{"padding": "none"}, {"long_prompts": "chunk"}, {}])
def test_prompts_of_unequal_length_share_one_encoder(pipe, options):
    """A batch of the shorter ones is encoded to another length than all prompts together."""
    backend = load_backend(pipe, device="cpu", **options)
    longer = "a dog" + (" on the moon" * 12 if "long_prompts" in options else " on the moon")
    prompts = ("sun", longer)
    quick = dataclasses.replace(
        TextCraftor().ascent, steps=2, backprop_steps=2, batch_size=1, accumulate=1, lr=1e-8
    )
    task = Task(backend, REWARD, prompts, SAMPLING, shared=True)
    last = list(TextCraftor(ascent=quick).fit(task))[-1]
    raw = [score(REWARD, generate(backend, [each], [0], Adapter(), SAMPLING), [each]) for each in prompts]
    torch.testing.assert_close(last.rewards, torch.cat(raw), atol=1e-5, rtol=0)


def test_a_quantised_encoder_is_not_changed(backend, make_pipe):
    small = load_backend(quantised(make_pipe(), "text_encoder"))
    assert small.encode(["sun"]).embeds.isfinite().all()
    with pytest.raises(InputError, match="the text encoder is quantised"):
        TextEncoderAdapter.start(small, PROMPTS, 1.0, shared=False)
    with pytest.raises(InputError, match="the text encoder is quantised"):
        generate(small, PROMPTS[:1], [0], tuned(backend), Sampling(1))


def test_it_refuses_what_it_cannot_do(backend, pipe):
    for share in (0.0, 1.1):
        with pytest.raises(InputError, match=f"late_share is {share}; it must be above 0 and at most 1"):
            TextCraftor(late_share=share)
    adapter = tuned(backend)
    with pytest.raises(InputError, match="the same states at every step"):
        adapter.prompt_kwargs(pipe, "sun")
    other = TextEncoderAdapter(PROMPTS, {"layer.weight": (3, 4)}, 0.6)
    with pytest.raises(InputError, match=r"this adapter changes weight .* the backend's text encoder has"):
        generate(backend, PROMPTS, [0, 0], other, SAMPLING)
    with pytest.raises(InputError, match="not fitted to prompt 'moon'"):
        generate(backend, ["moon"], [0], adapter, SAMPLING)


def test_a_tuned_clip_reaches_flux_through_its_vector():
    backend, other = (load_backend(tiny.flux(), device="cpu", image_size=16) for _ in range(2))
    adapter = TextEncoderAdapter.start(backend, ["sun"], 1.0, shared=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for change in adapter.changes.values():
            change.normal_().mul_(0.05)
        for name, weight in other.modules["text_encoder"].named_parameters():
            weight.add_(adapter.changes[name.replace(".", "/")][0])
        raw = backend.encode(["sun"])
        tuned, expected = adapter.condition(backend, ["sun"], raw), other.encode(["sun"])
    torch.testing.assert_close(tuned.pooled, expected.pooled)
    assert not torch.allclose(tuned.pooled, raw.pooled, atol=1e-3)
