"""The pooled vector and the negative prompt, learned beside IPGO's embeddings around the prompt."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from ipgo.adapters import Adapter, InsertionAdapter, JointAdapter, NoiseAdapter, generate, stack
from ipgo.artefacts import load_adapter, save_adapter
from ipgo.ascent import Ascent
from ipgo.backends import load_backend
from ipgo.budget import Price, step_cost
from ipgo.config import RunConfig
from ipgo.errors import InputError
from ipgo.explain import Vocabulary, explain
from ipgo.insertion import Insertion
from ipgo.methods import IPGO
from ipgo.methods.black_box import BlackBoxIPGO
from ipgo.methods.joint import Joint
from ipgo.rewards import as_reward
from ipgo.sampling import Sampling
from ipgo.task import Task
from tests import tiny_families as tiny
from tests.conftest import difference_quotient, redness, tiny_pipeline

PROMPTS = ("a red cat", "sun")
OFF = Insertion(2, 1, rank=4, negative=False)
T5 = {"max_sequence_length": tiny.T5_TOKENS}


def with_(**options):
    return dataclasses.replace(OFF, **options)


NEGATIVE, POOLED, BOTH = with_(negative=True), with_(pooled=True), with_(pooled=True, negative=True)


@dataclasses.dataclass(frozen=True)
class Case:
    build: Callable
    insertion: Insertion
    call: dict = dataclasses.field(default_factory=dict)
    options: dict = dataclasses.field(default_factory=dict)


CASES = {
    "sd": Case(tiny_pipeline, NEGATIVE),
    "sd-unpadded": Case(tiny_pipeline, NEGATIVE, options={"padding": "none"}),
    "sdxl": Case(tiny.sdxl, BOTH),
    "sdxl-pooled": Case(tiny.sdxl, POOLED),
    "sd3": Case(tiny.sd3, BOTH, T5),
    "flux": Case(tiny.flux, POOLED, {**T5, "height": 16, "width": 16}, {"image_size": 16}),
    "pixart": Case(tiny.pixart, NEGATIVE, {**T5, "clean_caption": False, "use_resolution_binning": False}),
}


def loud(adapter, seed=0):
    """Every parameter moved, as by a fit."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=source)
    return adapter


def own(names):
    """Of what only these options learn."""
    return {name.partition(".")[0] for name in names} - {"prefix", "suffix"}


@pytest.mark.parametrize("name", CASES)
def test_a_plain_pipeline_draws_what_was_learned(name):
    case = CASES[name]
    pipe = case.build()
    backend = load_backend(pipe, device="cpu", **case.options)
    adapter = loud(InsertionAdapter.start(backend, PROMPTS, case.insertion, seed=0, shared=False))
    sampling = Sampling(2, 3.0, negative_prompt="" if name == "flux" else "blurry")
    ours = generate(backend, PROMPTS[:1], [3], adapter, sampling)
    kwargs = adapter.prompt_kwargs(pipe, PROMPTS[0], sampling.negative_prompt)
    latents = backend.pipeline_latents(backend.noise([3])[:, 0])
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt", **case.call}
    theirs = pipe(**{**kwargs, **options}, latents=latents).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    for parameter in own(dict(adapter.named_parameters())):
        other = InsertionAdapter(PROMPTS, **adapter.options)
        state = {
            key: torch.zeros_like(value) if key.partition(".")[0] == parameter else value
            for key, value in adapter.state_dict().items()
        }
        other.load_state_dict(state)
        with_out = generate(backend, PROMPTS[:1], [3], other, sampling)
        assert (ours - with_out).abs().max() > 3e-4, parameter


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_gradients_equal_finite_differences(name):
    case = CASES[name]
    backend = load_backend(case.build(), device="cpu", dtype="float64")
    adapter = InsertionAdapter.start(backend, PROMPTS, case.insertion, seed=0, shared=False).double()
    loud(adapter)

    def reward(backprop_steps):
        sampling = Sampling(2, 3.0)
        return redness(
            generate(backend, PROMPTS, [0, 1], adapter, sampling, backprop_steps=backprop_steps), ()
        ).sum()

    reward(2).backward()
    checked = set()
    for key, parameter in adapter.named_parameters():
        if own([key]):
            direction = torch.randn(
                parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
            )
            slope = (parameter.grad * direction).sum()
            measured = difference_quotient(lambda: reward(0), [parameter], [direction])
            assert slope.abs() > 1e-6, key
            torch.testing.assert_close(slope, measured, rtol=1e-4, atol=1e-9, msg=key)
            checked |= own([key])
    expected = {"negative_prefix", "negative_suffix"}
    assert checked == expected | ({"pooled", "negative_pooled"} if name == "sdxl" else set())


def test_a_change_of_the_vector_is_in_its_own_units():
    """So a step goes as far with an encoder whose vectors are ten times as long; of zeros, in those of the prompt."""
    backend = load_backend(tiny.sdxl(), device="cpu")
    adapter = loud(InsertionAdapter.start(backend, PROMPTS, BOTH, seed=0, shared=False))
    plain = backend.encode(PROMPTS)
    with torch.no_grad():
        for times in (1, 10):
            prompt = dataclasses.replace(plain, pooled=times * plain.pooled)
            unit = prompt.pooled.square().mean(1, keepdim=True).sqrt()
            changed = adapter.condition(backend, PROMPTS, prompt)
            torch.testing.assert_close(changed.pooled - prompt.pooled, unit * adapter.pooled)
        negative = adapter.unconditional(
            backend, PROMPTS, changed, Sampling(2, 3.0)
        )  # whose own vector is zeros
        unit = changed.pooled.square().mean(1, keepdim=True).sqrt()
        torch.testing.assert_close(negative.pooled, unit * adapter.negative_pooled)


@pytest.mark.parametrize("name", CASES)
def test_a_fit_learns_them_too(name):
    case = CASES[name]
    backend = load_backend(case.build(), device="cpu", **case.options)
    task = Task(backend, as_reward(redness), PROMPTS, Sampling(2, 3.0))
    method = IPGO(case.insertion, Ascent(steps=6, lr=0.05, backprop_steps=None, penalty_weight=0.0))
    start = InsertionAdapter.start(backend, PROMPTS, case.insertion, seed=0, shared=False).state_dict()
    steps = list(method.fit(task))
    assert (steps[-1].best > steps[0].rewards + 1e-4).all()
    learned = steps[-1].adapter.state_dict()
    for parameter in own(start):
        keys = [key for key in start if key.partition(".")[0] == parameter]
        assert not all(torch.equal(start[key], learned[key]) for key in keys), parameter


def test_off_is_as_ever():
    """No parameter more, and those that there are start alike, whatever else is learned."""
    backend = load_backend(tiny.sdxl(), device="cpu")
    off, on = (InsertionAdapter.start(backend, PROMPTS, each, seed=0, shared=False) for each in (OFF, BOTH))
    assert own(off.state_dict()) == set()
    for key, value in off.state_dict().items():
        assert torch.equal(on.state_dict()[key], value)
    plain = InsertionAdapter.start(backend, PROMPTS, POOLED, seed=0, shared=False)  # its change is 0
    options = {"sampling": Sampling(2, 3.0), "seeds": [0, 1], "prompts": PROMPTS}
    images = [generate(backend, adapter=each, **options) for each in (off, plain, on)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])  # embeddings around the negative prompt
    assert not off.learns_unconditional


@pytest.mark.parametrize(("scale", "learned"), [(3.0, True), (1.0, False)])
def test_left_open_it_is_learned_where_guidance_looks_at_it(scale, learned):
    backend = load_backend(tiny_pipeline(), device="cpu")
    task = Task(backend, as_reward(redness), ("a",), Sampling(2, scale))
    *_, last = IPGO(Insertion(2, 1, rank=4), Ascent(steps=1)).fit(task)
    assert last.adapter.learns_unconditional is learned
    assert last.adapter.options["insertion"]["negative"] is learned
    flux = load_backend(tiny.flux(), device="cpu")  # its scale is an input of the denoiser
    assert not InsertionAdapter.start(
        flux, PROMPTS, Insertion(2, 1, rank=4), seed=0, shared=False
    ).insertion.negative


def test_rows_files_and_the_noise_beside_it(tmp_path):
    backend = load_backend(tiny.sdxl(), device="cpu")
    adapter = loud(InsertionAdapter.start(backend, PROMPTS, BOTH, seed=0, shared=False))
    save_adapter(adapter, tmp_path)
    sampling = Sampling(2, 3.0)
    images = generate(backend, PROMPTS, [0, 0], adapter, sampling)
    for other in (load_adapter(tmp_path), stack([adapter.row(0), adapter.row(1)])):
        assert torch.equal(generate(backend, PROMPTS, [0, 0], other, sampling), images)
    noise = NoiseAdapter.start(backend, PROMPTS, (0,), shared=False)
    joint = JointAdapter.join(adapter, noise, 1.0)
    assert joint.learns_unconditional
    assert torch.equal(generate(backend, PROMPTS, [0, 0], joint, sampling), images)
    task = Task(backend, as_reward(redness), PROMPTS, sampling)
    fitted = list(Joint(BOTH, ascent=Ascent(steps=2, backprop_steps=None)).fit(task))[-1]
    assert (fitted.grad_norm > 0).all()
    black = BlackBoxIPGO(NEGATIVE, candidates=3)
    assert list(black.fit(task))[-1].best.isfinite().all()


def test_explaining_draws_with_the_negative_prompt_too():
    backend = load_backend(tiny_pipeline(), device="cpu")
    adapter = loud(InsertionAdapter.start(backend, PROMPTS, NEGATIVE, seed=0, shared=False))
    sampling, reward = Sampling(2, 3.0), as_reward(redness)
    found = explain(backend, adapter, "sun", (0,), sampling, reward, Vocabulary(backend, ["a"]))
    for value, which in ((found.raw, Adapter()), (found.value, adapter)):
        assert value == pytest.approx(
            redness(generate(backend, ["sun"], [0], which, sampling), ()).item(), abs=1e-6
        )
    assert len(found.inserted) == 6


def test_a_step_costs_both_halves():
    options = {"sampling": Sampling(4, 3.0, fit_steps=None)}
    off, on = (RunConfig(("a",), IPGO(each, Ascent(backprop_steps=2)), **options) for each in (OFF, NEGATIVE))
    assert step_cost(off, 4, Price(2, 3)) == 4 + 1 + 2
    assert step_cost(on, 4, Price(2, 3)) == 4 + 2 + 2
    backend = load_backend(tiny_pipeline(), device="cpu")
    task = Task(backend, as_reward(redness), ("a",), Sampling(4, 3.0))
    next(on.method.fit(task))
    assert dict(backend.calls)["denoiser_grad_both"] == dict(backend.calls)["denoiser_grad"] == 2


@pytest.mark.parametrize(
    ("build", "insertion", "scale", "message"),
    [
        (tiny_pipeline, POOLED, 3.0, "insertion.pooled is true; .* has no vector for the whole prompt"),
        (
            tiny.flux,
            NEGATIVE,
            3.0,
            "insertion.negative is true; it needs classifier-free guidance, .* 'distilled'",
        ),
        (tiny_pipeline, NEGATIVE, 1.0, "guidance_scale is 1.0; insertion.negative needs one above 1"),
    ],
)
def test_what_is_not_there_cannot_be_learned(build, insertion, scale, message):
    backend = load_backend(build(), device="cpu", image_size=16)
    task = Task(backend, as_reward(redness), PROMPTS, Sampling(1, scale))
    with pytest.raises(InputError, match=message):
        IPGO(insertion).fit(task)
    with pytest.raises(InputError, match="which a vector has not"):
        BlackBoxIPGO(POOLED)
    adapter = InsertionAdapter(PROMPTS, 32, POOLED, pooled_width=3)
    with pytest.raises(InputError, match=r"changes a vector for the whole prompt; backend .* has none"):
        generate(load_backend(tiny_pipeline(), device="cpu"), PROMPTS[:1], [0], adapter, Sampling(1, 1.0))
