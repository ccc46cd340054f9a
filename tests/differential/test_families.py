"""Ours against the pipelines of diffusers, on the same tiny random weights and noise."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import LCMScheduler
from transformers import CLIPTextConfig

from ipgo.adapters import Adapter, InsertionAdapter, generate
from ipgo.ascent import Ascent
from ipgo.backends import FAMILIES, FewSteps, load_backend
from ipgo.backends.facts import PADDINGS
from ipgo.embeds import PromptEmbeds
from ipgo.insertion import Insertion
from ipgo.methods import IPGO
from ipgo.rewards import as_reward
from ipgo.sampling import Sampling, sample, unconditional
from ipgo.task import Task
from tests import tiny_families as tiny
from tests.conftest import redness, tiny_pipeline

PROMPTS = ("a red cat", "a dog", "sun")
SEEDS = [11, 12, 13]
INSERTION = Insertion(num_prefix=11, num_suffix=11, rank=8, norm=3.0)

T5 = {"max_sequence_length": tiny.T5_TOKENS}
SMALL = {"height": 16, "width": 16}
PIXART = {**T5, "clean_caption": False, "use_resolution_binning": False}
QWEN = {"max_sequence_length": tiny.QWEN_TOKENS}
SANA = {"clean_caption": False, "use_resolution_binning": False, "height": 32, "width": 32}


def sprint_steps(steps):
    """The pipeline's default is for two steps alone."""
    return {} if steps == 2 else {"intermediate_timesteps": None}


@dataclass(frozen=True)
class Case:
    """A pipeline, and what its call needs beside the prompts.

    Attributes:
        call: the pipeline's own arguments.
        options: of `load_backend`.
        guidance: scales, off and on; of a model without guidance the second is as the first.
        steps: arguments that the pipeline needs for a number of steps.
        negative: must the pipeline be given an empty negative prompt to guide at all?
    """

    build: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    guidance: tuple[float, ...] = (1.0, 5.0)
    steps: Callable[[int], dict[str, Any]] = lambda steps: {}
    negative: bool = False


CASES = {
    "sd15": Case(tiny_pipeline),
    "sd21": Case(tiny.sd21),
    "sd-turbo": Case(tiny.sd_turbo),
    "lcm": Case(tiny.lcm, guidance=(1.0, 8.5)),
    "lcm-lora": Case(tiny.lcm_lora, guidance=(1.0, 1.5)),
    "sdxl": Case(tiny.sdxl),
    "sdxl-without-zeros": Case(lambda: tiny.sdxl(zeros=False)),
    "sdxl-latents-mean": Case(lambda: tiny.sdxl(latents_mean=[0.1, 0, -0.1, 0], latents_std=[1, 2, 0.5, 1])),
    "sdxl-turbo": Case(tiny.sdxl_turbo),
    "lcm-sdxl": Case(tiny.lcm_sdxl, guidance=(1.0, 8.5)),
    "sd3": Case(tiny.sd3, T5),
    "sd3-without-t5": Case(lambda: tiny.sd3(with_t5=False)),
    "sd3-dynamic-shift": Case(lambda: tiny.sd3(use_dynamic_shifting=True), T5),
    "sd35": Case(tiny.sd35, T5),
    "flux-dev": Case(tiny.flux, {**T5, **SMALL}, {"image_size": 16}),
    "flux-schnell": Case(lambda: tiny.flux(distilled=False), {**T5, **SMALL}, {"image_size": 16}, (0.0, 5.0)),
    "chroma": Case(tiny.chroma, {**T5, **SMALL}, {"image_size": 16}, (1.0, 4.0)),
    "pixart-alpha": Case(tiny.pixart, PIXART, guidance=(1.0, 4.5)),
    "pixart-alpha-size": Case(tiny.pixart_told_its_size, {**PIXART, **SMALL}, {"image_size": 16}),
    "pixart-sigma": Case(tiny.pixart_sigma, PIXART),
    "sana": Case(tiny.sana, SANA, guidance=(1.0, 4.5)),
    "sana-dpm": Case(tiny.sana_with_dpm, SANA, guidance=(1.0, 4.5)),
    "sana-sprint": Case(tiny.sana_sprint, SANA, guidance=(1.0, 4.5), steps=sprint_steps),
    "z-image": Case(tiny.z_image, {**QWEN, **SMALL}, {"image_size": 16}),
    "qwen-image": Case(tiny.qwen_image, SMALL, {"image_size": 16}, negative=True),
    "flux2-klein": Case(tiny.flux_2, {**QWEN, **SMALL}, {"image_size": 16}),
    "flux2-klein-base": Case(lambda: tiny.flux_2(distilled=False), {**QWEN, **SMALL}, {"image_size": 16}),
}
# One case for each model that is named: the slower tests.
ONE_EACH = [
    "sd15",
    "sd21",
    "sd-turbo",
    "lcm",
    "lcm-lora",
    "sdxl",
    "sdxl-turbo",
    "lcm-sdxl",
    "sd3",
    "sd35",
    "flux-dev",
    "flux-schnell",
    "chroma",
    "pixart-alpha",
    "pixart-sigma",
    "sana",
    "sana-sprint",
    "z-image",
    "qwen-image",
    "flux2-klein",
    "flux2-klein-base",
]


@pytest.fixture(scope="module")
def pipes():
    """The pipelines that were built, which no test changes."""
    return {}


def open_case(pipes, name):
    case = CASES[name]
    if name not in pipes:
        pipes[name] = case.build()
    return case, pipes[name], load_backend(pipes[name], device="cpu", **case.options)


def noise_of(backend, count):
    """The pipeline's argument for the initial noise of `SEEDS`, and of every step if the scheduler adds it."""
    if backend.stochastic:
        return {"generator": [torch.Generator().manual_seed(seed) for seed in SEEDS[:count]]}
    return {"latents": backend.pipeline_latents(backend.noise(SEEDS[:count])[:, 0])}


def padded(values, length):
    """(B, L, ...) with zeros up to `length`; what is padded is masked."""
    return torch.cat(
        [values, values.new_zeros(len(values), length - values.shape[1], *values.shape[2:])], dim=1
    )


def joined(kwargs):
    """The arguments of several prompts as those of one batch: tensors, or lists with one of them for each."""
    whole = {}
    for name, value in kwargs[0].items():
        all_of_it = [each[name] for each in kwargs]
        if isinstance(value, torch.Tensor):
            longest = max(each.shape[1] for each in all_of_it)
            whole[name] = torch.cat([padded(each, longest) for each in all_of_it])
        else:
            whole[name] = [row for part in all_of_it for row in part] if isinstance(value, list) else value
    return whole


def close(ours, theirs):
    assert ours.std() > 0.02
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("count", "steps"), [(1, 2), (3, 2), (1, 5)])
def test_sampling_equals_the_pipeline(pipes, name, count, steps):
    case, pipe, backend = open_case(pipes, name)
    prompts = list(PROMPTS[:count])
    images = []
    negative = {"negative_prompt": [""] * count} if case.negative else {}
    for scale in case.guidance:
        ours = generate(backend, prompts, SEEDS[:count], Adapter(), Sampling(steps, scale))
        theirs = pipe(
            prompt=prompts,
            num_inference_steps=steps,
            output_type="pt",
            **backend.pipeline_guidance(scale),
            **noise_of(backend, count),
            **case.steps(steps),
            **case.call,
            **negative,
        ).images
        close(ours, theirs)
        images.append(ours)
    does_something = (images[0] - images[1]).abs().max() > 1e-3
    assert does_something == (backend.guidance != "none")


@pytest.mark.parametrize("name", CASES)
def test_a_guidance_that_is_left_to_the_backend_is_that_of_its_pipeline(pipes, name):
    """Or, for a model that is known for its few steps, the one that belongs to these."""
    case, pipe, backend = open_case(pipes, name)
    few = {"guidance_scale": backend.guidance_scale} if name in ("lcm-lora", "lcm-sdxl") else {}
    ours = generate(backend, PROMPTS[:1], SEEDS[:1], Adapter(), Sampling(2))
    theirs = pipe(
        prompt=list(PROMPTS[:1]),
        num_inference_steps=2,
        output_type="pt",
        **noise_of(backend, 1),
        **case.steps(2),
        **{**case.call, **few},
        **({"negative_prompt": [""]} if case.negative else {}),
    ).images
    close(ours, theirs)


@pytest.mark.parametrize("name", ["sd-turbo", "sdxl-turbo"])
def test_a_single_step(pipes, name):
    _, pipe, backend = open_case(pipes, name)
    ours = generate(backend, PROMPTS[:2], SEEDS[:2], Adapter(), Sampling(1, 1.0))
    options = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "pt"}
    close(ours, pipe(list(PROMPTS[:2]), **options, **noise_of(backend, 2)).images)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_consistent_pixart(steps):
    """Not known as such to its pipeline, which takes any scheduler."""
    pipe = tiny.pixart()
    pipe.scheduler = LCMScheduler(**tiny.LEVELS, clip_sample=False)
    backend = load_backend(pipe, device="cpu")
    assert backend.few_steps == FewSteps(4)
    ours = generate(backend, PROMPTS[:2], SEEDS[:2], Adapter(), Sampling(steps))
    options = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "pt"}
    close(ours, pipe(list(PROMPTS[:2]), **options, **noise_of(backend, 2), **PIXART).images)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("count", "steps"), [(1, 2), (3, 5)])
def test_a_plain_pipeline_draws_what_was_inserted(pipes, name, count, steps):
    case, pipe, backend = open_case(pipes, name)
    adapter = InsertionAdapter(PROMPTS, backend.embed_dim, INSERTION)
    prompts = PROMPTS[:count]
    for scale in case.guidance:
        kwargs = joined([adapter.prompt_kwargs(pipe, prompt, guidance_scale=scale) for prompt in prompts])
        ours = generate(backend, prompts, SEEDS[:count], adapter, Sampling(steps, scale))
        theirs = pipe(
            **{**kwargs, **case.call},
            num_inference_steps=steps,
            output_type="pt",
            **backend.pipeline_guidance(scale),
            **noise_of(backend, count),
            **case.steps(steps),
        ).images
        close(ours, theirs)
    raw = generate(backend, prompts, SEEDS[:count], Adapter(), Sampling(steps, scale))
    assert (ours - raw).abs().max() > 1e-3


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_row_does_not_depend_on_its_neighbours(pipes, name):
    """Prompts of several lengths, with embeddings inserted around them."""
    case, _, backend = open_case(pipes, name)
    adapter = InsertionAdapter(PROMPTS, backend.embed_dim, INSERTION)
    sampling = Sampling(2, case.guidance[-1])
    together = generate(backend, PROMPTS, SEEDS, adapter, sampling)
    alone = generate(backend, PROMPTS[2:], SEEDS[2:], adapter, sampling)
    torch.testing.assert_close(together[2:], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name",
    ["sd15", "sdxl", "sd3", "chroma", "pixart-sigma", "sana", "qwen-image", "z-image", "flux2-klein-base"],
)
def test_the_default_draws_the_same_in_the_pipeline(pipes, name):
    """Embeddings around both prompts, where guidance has two, as `IPGO()` learns them."""
    case, pipe, backend = open_case(pipes, name)
    insertion = replace(IPGO().insertion, num_prefix=3, num_suffix=2, norm=3.0)
    adapter = InsertionAdapter.start(backend, PROMPTS, insertion, seed=0, shared=False)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=source)
    assert adapter.insertion.negative
    for negative_prompt in ("", "dull"):
        sampling = Sampling(2, case.guidance[-1], negative_prompt=negative_prompt)
        ours = generate(backend, PROMPTS[:2], SEEDS[:2], adapter, sampling)
        kwargs = joined([adapter.prompt_kwargs(pipe, prompt, negative_prompt) for prompt in PROMPTS[:2]])
        theirs = pipe(
            **{**kwargs, **case.call},
            num_inference_steps=2,
            output_type="pt",
            **backend.pipeline_guidance(sampling.guidance_scale),
            **noise_of(backend, 2),
            **case.steps(2),
        ).images
        close(ours, theirs)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_our_gradient_is_that_of_the_undecorated_pipeline(pipes, name, guided):
    case, pipe, backend = open_case(pipes, name)
    sampling = Sampling(3, case.guidance[guided])
    noise = backend.noise(SEEDS[:2], sampling.noise_steps(backend))
    torch.manual_seed(1)
    start = torch.randn(2, 22, backend.embed_dim)

    def gradient(images_of):
        inserted = start.clone().requires_grad_()
        cond = backend.encode(PROMPTS[:2]).insert(inserted[:, :11], inserted[:, 11:])
        images = images_of(cond, unconditional(backend, cond, sampling))
        weights = torch.linspace(-1, 1, images.numel()).view_as(images)
        (images * weights).sum().backward()
        return inserted.grad

    def theirs(cond, uncond):
        return (
            type(pipe)
            .__call__.__wrapped__(
                pipe,
                **{**backend.pipeline_kwargs(cond, uncond), **case.call},
                num_inference_steps=3,
                output_type="pt",
                **backend.pipeline_guidance(sampling.guidance_scale),
                **noise_of(backend, 2),
                **case.steps(3),
            )
            .images
        )

    ours = gradient(lambda cond, uncond: sample(backend, cond, uncond, noise, sampling, backprop_steps=3))
    expected = gradient(theirs)
    assert expected.norm() > 1e-6
    assert (ours - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("name", CASES)
def test_ipgo_raises_a_reward(pipes, name):
    case, _, backend = open_case(pipes, name)

    sampling = Sampling(2, case.guidance[-1])
    task = Task(backend, as_reward(redness), PROMPTS[:2], sampling)
    method = IPGO(Insertion(2, 2), Ascent(steps=8, lr=0.05, backprop_steps=None, penalty_weight=0.0))
    last = list(method.fit(task))[-1]
    before, after = (
        redness(generate(backend, PROMPTS[:2], [0, 0], adapter, sampling), PROMPTS[:2])
        for adapter in (Adapter(), last.adapter)
    )
    torch.testing.assert_close(after, last.best, atol=1e-5, rtol=0)
    assert (after > before + 1e-4).all()


@pytest.mark.parametrize("name", ONE_EACH)
def test_the_declared_facts_are_so(pipes, name):
    """What the denoiser sees of order, padding, the pooled vector and the guidance scale."""
    _, pipe, backend = open_case(pipes, name)
    assert FAMILIES[type(pipe).__name__].facts is backend.facts
    assert backend.max_tokens <= backend.facts.tokens
    prompt = backend.encode(PROMPTS[:1])
    latents = backend.noise([0])[:, 0]
    timestep = backend.scheduler(2, latents).timesteps[0]

    def moved(other, scale=3.0, backend=backend):
        with torch.no_grad():
            pair = [
                backend.predict(latents, timestep, *each)
                for each in ((prompt, None, 3.0), (other, None, scale))
            ]
        return bool((pair[0] - pair[1]).abs().max() > 1e-5)

    back = torch.arange(prompt.length).flip(0)
    assert moved(replace(prompt, embeds=prompt.embeds[:, back], mask=prompt.mask[:, back])) == (
        backend.facts.ordered
    )
    loud = torch.where(prompt.mask[..., None], prompt.embeds, prompt.embeds + 1)
    padding_seen = [
        moved(
            replace(prompt, embeds=loud),
            backend=type(backend)(pipe, name, replace(backend.opening, padding=each)),
        )
        for each in PADDINGS
    ]
    seen = {"always": [False, False], "never": [True, True], "optional": [True, False]}
    assert padding_seen == seen[backend.facts.masked]
    assert (prompt.pooled is not None) == backend.facts.pooled
    if prompt.pooled is not None:
        assert moved(replace(prompt, pooled=prompt.pooled + 1))
    assert moved(prompt, scale=5.0) == (backend.guidance == "distilled")


def test_a_family_declares_the_guidance_of_its_models_and_no_other(pipes):
    kinds = {}
    for name in ONE_EACH:
        _, _, backend = open_case(pipes, name)
        kinds.setdefault(type(backend), set()).add(backend.guidance)
    assert kinds == {family: set(family.facts.guidance) for family in FAMILIES.values()}


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_longest_prompt_is_the_longest_that_the_pipeline_reads_by_default(kind):
    """Where its call says no length, it is all that CLIP has places for."""
    call = inspect.signature(getattr(diffusers, kind).__call__).parameters
    said = call["max_sequence_length"].default if "max_sequence_length" in call else None
    own = said or CLIPTextConfig().max_position_embeddings
    # Sana counts the mark before its instruction too.
    assert FAMILIES[kind].facts.tokens == (own - 1 if kind.startswith("Sana") else own)


@pytest.mark.parametrize("name", ONE_EACH)
def test_the_declared_layout_and_scales_are_so(pipes, name, monkeypatch):
    """How pipelines take latents, what the network gets of the time, and what the VAE gets of the latents."""
    _, pipe, backend = open_case(pipes, name)
    latents = backend.noise([0])[:, 0]
    assert (backend.pipeline_latents(latents).ndim == 3) == (backend.facts.latents == "packed")
    own = {"SCMScheduler": "angle", "FlowMatchEulerDiscreteScheduler": "flow"}
    assert backend.facts.prediction == own.get(type(pipe.scheduler).__name__, "scheduler")

    seen = []
    hook = backend.modules["denoiser"].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["timestep"] if "timestep" in kwargs else args[1]),
        with_kwargs=True,
    )
    t = backend.scheduler(2, latents).timesteps[0]
    with torch.no_grad():
        backend.predict(latents, t, backend.encode(PROMPTS[:1]), None, 1.0)
    hook.remove()
    times = {
        "t": lambda: t,
        "t / 1000": lambda: t / 1000,
        "1 - t / 1000": lambda: 1 - t / 1000,
        "share of noise": lambda: t.sin() / (t.sin() + t.cos()),
    }
    torch.testing.assert_close(seen[0].flatten()[0].double(), times[backend.facts.time]().double())

    decode = pipe.vae.decode
    given = []
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **kwargs: given.append(z) or decode(z, **kwargs))
    for constant in (0.0, 1.0):
        backend.decode(torch.full_like(latents, constant))
    zero, one = given
    assert (zero.abs().max() == 0) == (backend.facts.scaling == "factor")
    assert ((one - zero).std() > 1e-3) == (backend.facts.scaling == "mean and deviation")


@functools.cache  # what is exact is compared with both formats
def drawn(name, dtype):
    """Images, and the gradient of what is inserted, of a pipeline of its own in this format."""
    case = CASES[name]
    backend = load_backend(case.build(), device="cpu", dtype=dtype, **case.options)
    adapter = InsertionAdapter(PROMPTS, backend.embed_dim, INSERTION)
    sampling = Sampling(2, case.guidance[-1])
    images = generate(backend, PROMPTS[:2], SEEDS[:2], adapter, sampling, backprop_steps=2)
    images.sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])
    return images.detach(), gradient


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(name, dtype):
    """Images and the direction of the gradient, of pipelines with few digits and with all."""
    (exact, own), (coarse, other) = drawn(name, "float32"), drawn(name, dtype)
    assert coarse.dtype == torch.float32
    assert (exact - coarse).abs().mean() < 0.02
    assert torch.cosine_similarity(own, other, dim=0) > 0.8


def test_sdxl_in_float16_decodes_in_float32():
    pipe = tiny.sdxl()
    backend = load_backend(pipe, device="cpu", dtype="float16")
    assert next(backend.modules["decoder"].parameters()).dtype == torch.float32
    assert pipe.vae.dtype == torch.float16  # as the pipeline wants it
    latents = 20 * backend.noise([0])[:, 0]
    exact = load_backend(tiny.sdxl(), device="cpu").decode(latents)
    assert (backend.decode(latents) - exact).abs().max() < 1e-2


def test_a_decoder_in_float32_is_tiled_as_the_pipelines_own(monkeypatch):
    pipe = tiny.sdxl().to(torch.float16)
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 8, 4
    with torch.inference_mode():
        backend = load_backend(pipe, device="cpu")
        latents = backend.noise([0, 1])[:, 0]
        ours = backend.decode(latents)
    vae = backend.modules["decoder"]
    assert not any(weights.is_inference() for weights in vae.parameters())
    own = pipe.vae.float()
    assert (vae is not own, vae.use_slicing) == (True, True)
    close(ours, (own.decode(latents / own.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1))
    monkeypatch.setattr("ipgo.backends.stable_diffusion_xl.upcast", None)
    Adapter().prompt_kwargs(tiny.sdxl().to(torch.float16), "sun")  # draws nothing, so copies nothing


def test_sdxl_with_unpadded_text(pipes):
    """Padding that is hidden from the UNet, against no padding at all; the pooled vectors are equal."""
    _, pipe, _ = open_case(pipes, "sdxl")
    backend = load_backend(pipe, device="cpu", padding="none")
    together, alone = backend.encode(PROMPTS[:2]), backend.encode(PROMPTS[1:2])
    assert together.length > alone.length
    torch.testing.assert_close(together.pooled[1:], alone.pooled, atol=1e-5, rtol=0)
    pair = generate(backend, PROMPTS[:2], SEEDS[:2], Adapter(), Sampling(2, 3.0))
    single = generate(backend, PROMPTS[1:2], SEEDS[1:2], Adapter(), Sampling(2, 3.0))
    torch.testing.assert_close(pair[1:], single, atol=1e-5, rtol=0)


def test_a_scheduler_that_draws_its_own_noise_leaves_the_global_generator_alone(pipes):
    _, _, backend = open_case(pipes, "sdxl-turbo")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    pair = generate(backend, PROMPTS[:2], SEEDS[:2], Adapter(), Sampling(3, 1.0))
    assert torch.equal(torch.get_rng_state(), before)
    alone = generate(backend, PROMPTS[1:2], SEEDS[1:2], Adapter(), Sampling(3, 1.0))
    torch.testing.assert_close(pair[1:], alone, atol=1e-5, rtol=0)
    other = generate(backend, PROMPTS[1:2], SEEDS[:1], Adapter(), Sampling(3, 1.0))
    assert not torch.allclose(alone, other, atol=1e-2)


def test_gradient_reaches_the_pooled_vector(pipes):
    _, _, backend = open_case(pipes, "sdxl")
    cond = backend.encode(PROMPTS[:1])
    pooled = cond.pooled.clone().requires_grad_()
    cond = PromptEmbeds(cond.embeds, cond.mask, pooled)
    sampling = Sampling(2, 3.0)
    uncond = unconditional(backend, cond, sampling)
    sample(backend, cond, uncond, backend.noise([0]), sampling, backprop_steps=1).sum().backward()
    assert pooled.grad.norm() > 0
