"""What a family refuses, each in one sentence."""

import io
import json
from contextlib import ExitStack

import accelerate
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    IPNDMScheduler,
    LCMScheduler,
    LTXEulerAncestralRFScheduler,
    PyramidAttentionBroadcastConfig,
    UniPCMultistepScheduler,
)
from diffusers.hooks import apply_group_offloading, apply_pyramid_attention_broadcast
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from peft import LoraConfig

import ipgo
from ipgo.adapters import Adapter, InsertionAdapter, LoRA, NoiseAdapter, WeightAdapter, generate
from ipgo.backends import load_backend, open_to_draw, put
from ipgo.backends.packed import pack, unpack
from ipgo.backends.qwen_image import compact
from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError
from ipgo.explain import Vocabulary
from ipgo.insertion import Insertion
from ipgo.relaxation import Relaxation
from ipgo.sampling import Sampling
from tests import tiny_families as tiny
from tests.conftest import brightness, tiny_pipeline

MARKS_AFTER = "<|im_end|>\n<|im_start|>assistant\n"
MARKS = "<|im_start|>user\n" + MARKS_AFTER


def test_a_scheduler_that_hides_its_noise_is_refused():
    pipe = tiny.sdxl(DDPMScheduler())
    backend = load_backend(pipe, device="cpu")
    with pytest.raises(InputError, match="DDPMScheduler, draws noise itself"):
        backend.scheduler(2, backend.noise([0])[:, 0])
    other = load_backend(pipe, device="cpu", scheduler="euler")
    assert not other.stochastic
    assert len(other.scheduler(2, other.noise([0])[:, 0]).timesteps) == 2


def test_a_pipeline_without_its_text_encoder_is_refused():
    pipe = tiny.sdxl()
    pipe.register_modules(text_encoder=None)
    with pytest.raises(InputError, match="has no text_encoder, without which it cannot draw"):
        load_backend(pipe, device="cpu")


@pytest.mark.parametrize(
    "build",
    [
        tiny_pipeline, tiny.lcm, tiny.sdxl, tiny.sd3, tiny.flux, tiny.pixart, tiny.sana, tiny.sana_sprint,
        tiny.z_image, tiny.flux_2, tiny.qwen_image, tiny.chroma,
    ],
)  # fmt: skip
def test_prompts_are_encoded_where_the_text_encoders_are(build):
    """The others stand on another device: "meta" stands for a GPU, with sizes and no numbers."""
    backend = load_backend(put(build(), torch.device("meta"), "cpu"))
    assert (backend.device.type, backend.text_device.type) == ("meta", "cpu")
    cond = backend.encode(["a fox", "two"])
    halves = [cond]
    if backend.guidance == "classifier-free":
        halves.append(backend.unconditional("dull", cond))
    for half in halves:
        found = [half.embeds, half.mask, *(each for each in (half.pooled, half.present) if each is not None)]
        assert {(each.device.type, len(each)) for each in found} == {("meta", 2)}


@pytest.mark.parametrize("build", [tiny.sdxl, tiny.pixart, tiny.sana, tiny.z_image])
def test_the_gradient_of_words_needs_one_clip(build):
    with pytest.raises(InputError, match="needs one CLIP text encoder"):
        Relaxation(load_backend(build(), device="cpu"))


def test_folders_are_opened_and_checked_part_by_part(tmp_path):
    tiny.sdxl().save_pretrained(tmp_path, safe_serialization=True)
    opened = load_backend(str(tmp_path), device="cpu")
    assert opened.embed_dim == 40
    (tmp_path / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"weights are missing: .*text_encoder_2"):
        load_backend(str(tmp_path), device="cpu")


@pytest.mark.parametrize("build", [tiny.sana, tiny.sana_sprint, tiny.z_image, tiny.flux_2])
def test_a_folder_draws_what_its_pipeline_draws(build, tmp_path):
    """With an encoder that is a language model, and its tokenizer."""
    pipe = build()
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    original, opened = (load_backend(source, device="cpu", image_size=32) for source in (pipe, str(tmp_path)))
    assert type(opened) is type(original)
    images = [generate(each, ["a red cat"], [3], Adapter(), Sampling(2, 4.0)) for each in (original, opened)]
    torch.testing.assert_close(*images, atol=1e-6, rtol=0)


def test_pixarts_tokenizer_is_read_as_it_is_published(tmp_path):
    """As a model of sentencepiece alone, which transformers turns into its own form."""
    spm = pytest.importorskip("sentencepiece")
    tiny.pixart().save_pretrained(tmp_path, safe_serialization=True)
    folder, model = tmp_path / "tokenizer", io.BytesIO()
    for file in folder.iterdir():
        file.unlink()
    texts = iter(["a red cat", "a blue lemon", "two green owls under the moon"] * 9)
    spm.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, vocab_size=30, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": 120, "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    opened = load_backend(tmp_path, device="cpu")
    pieces = spm.SentencePieceProcessor(model_proto=model.getvalue())
    assert opened.tokenizer("a red cat").input_ids == [*pieces.encode("a red cat"), 1]
    assert opened.encode(["a red cat"]).mask.sum() == len(pieces.encode("a red cat")) + 1


def stock(pipe, side, **own):
    """The pipeline's own picture of "a red cat" from seed 3, in two steps."""
    options = {
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "height": side,
        "width": side,
        "output_type": "pt",
    }
    return pipe("a red cat", generator=torch.Generator().manual_seed(3), **options, **own).images


def test_a_tiny_vae_decodes_sdxl():
    pipe = tiny.sdxl()
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    pipe.vae = AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    ours = generate(load_backend(pipe, device="cpu"), ["a red cat"], [3], Adapter(), Sampling(2, 3.0))
    torch.testing.assert_close(ours, stock(pipe, ours.shape[-1]), atol=1e-4, rtol=0)


def test_sd3_with_another_flow_scheduler_draws_what_its_pipeline_draws():
    pipe = tiny.sd3()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    ours = generate(load_backend(pipe, device="cpu"), ["a red cat"], [3], Adapter(), Sampling(2, 3.0))
    torch.testing.assert_close(
        ours, stock(pipe, ours.shape[-1], max_sequence_length=tiny.T5_TOKENS), atol=1e-4, rtol=0
    )


def by_accelerate(pipe):
    for part in ("text_encoder", "unet", "vae"):
        accelerate.cpu_offload(getattr(pipe, part), torch.device("cpu"), offload_buffers=True)


def by_groups(pipe):
    for part in ("text_encoder", "unet"):
        apply_group_offloading(
            getattr(pipe, part), torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level"
        )


@pytest.mark.parametrize("build", [tiny.flux, tiny.flux_2])
@pytest.mark.parametrize("scheduler", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_flux_lets_a_scheduler_space_its_steps(build, scheduler):
    """Three of them: the first ones of a multistep scheduler are all alike."""
    pipe = build()
    own = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True}
    pipe.scheduler = scheduler(**own, time_shift_type="exponential")
    backend = load_backend(pipe, device="cpu", image_size=16)
    ours = generate(backend, ["sun"], [3], Adapter(), Sampling(3, 1.0))
    theirs = pipe(
        **Adapter().prompt_kwargs(pipe, "sun"),
        latents=backend.pipeline_latents(backend.noise([3])[:, 0]),
        **{"num_inference_steps": 3, "guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "pt"},
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_scheduler_that_a_family_cannot_set_is_refused():
    pipe = tiny.chroma()
    pipe.scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(
        InputError, match=r"scheduler is DPMSolverMultistepScheduler, which does not take .*sigmas"
    ):
        generate(load_backend(pipe, device="cpu", image_size=16), ["sun"], [3], Adapter(), Sampling(3, 1.0))


@pytest.mark.parametrize("build", [tiny.pixart_told_its_size, tiny.sana])
def test_a_size_that_is_none_of_the_pipelines_own_is_drawn_by_it(build):
    pipe = build()
    backend = load_backend(pipe, device="cpu", image_size=64)
    ours = generate(backend, ["sun"], [3], Adapter(), Sampling(2, 4.0))
    theirs = pipe(
        **Adapter().prompt_kwargs(pipe, "sun"),
        **{"num_inference_steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64, "output_type": "pt"},
        latents=backend.noise([3])[:, 0],
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler, IPNDMScheduler])
def test_noise_levels_that_no_other_scheduler_has_are_not_exchanged(scheduler):
    pipe = tiny_pipeline()
    pipe.scheduler = scheduler()
    with pytest.raises(
        InputError, match=f"scheduler is 'ddim'; the model's own, {scheduler.__name__}, has noise le"
    ):
        generate(load_backend(pipe, device="cpu", scheduler="ddim"), ["sun"], [3], Adapter(), Sampling(1))


@pytest.mark.parametrize("padding", ["max_length", "none"])
def test_an_encoder_that_reads_without_padding_is_heard(padding):
    pipe = tiny_pipeline()
    pipe.text_encoder.config.use_attention_mask = True
    states = load_backend(pipe, device="cpu", padding=padding).encode(["sun"]).embeds
    theirs, _ = pipe.encode_prompt("sun", "cpu", 1, False)
    torch.testing.assert_close(states, theirs[:, : states.shape[1]])


@pytest.mark.parametrize("build", [tiny.sana, tiny.flux_2])
def test_a_class_of_the_users_own_is_opened(build):
    """It hides the arguments of the call that it passes on."""
    pipe = build()

    class Mine(type(pipe)):
        def __call__(self, **options):
            return super().__call__(**options)

    pipe.__class__ = Mine
    assert load_backend(pipe, device="cpu").encode(["sun"]).embeds.isfinite().all()


@pytest.mark.parametrize("offload", [by_accelerate, by_groups])
def test_what_moves_about_is_refused_but_draws_what_was_learned(offload):
    usual, moved = tiny_pipeline(), tiny_pipeline()
    offload(moved)
    with pytest.raises(InputError, match=r"the pipeline's \w+ is moved about .* text_device='cpu'"):
        load_backend(moved)
    backend = load_backend(usual, device="cpu")
    inserted = InsertionAdapter(("sun",), backend.embed_dim, Insertion(2, 2, rank=8))
    weights = WeightAdapter.start(backend, ["sun"], LoRA(), seed=0, shared=False)
    for change in weights.up.values():
        torch.nn.init.normal_(change)
    options = {"num_inference_steps": 1, "output_type": "pt"}
    for learned in (inserted, weights):
        with ExitStack() as stack:
            if learned is weights:
                stack.enter_context(weights.attached(moved, ["sun"]))
                kwargs = {"prompt": "sun"}
            else:
                kwargs = inserted.prompt_kwargs(moved, "sun")
            theirs = moved(latents=backend.noise([3])[:, 0], **kwargs, **options).images
        ours = generate(backend, ["sun"], [3], learned, Sampling(1))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("apart", ["vae", None])
def test_a_device_map_of_one_device_moves_nothing(apart, monkeypatch):
    pipe = tiny_pipeline()
    for part in ("unet", "vae", "text_encoder"):
        accelerate.dispatch_model(getattr(pipe, part), device_map={"": "cpu"}, force_hooks=True)
        accelerate.hooks.add_hook_to_module(
            getattr(pipe, part), accelerate.hooks.AlignDevicesHook(io_same_device=True), append=True
        )
    monkeypatch.setattr(
        pipe, "hf_device_map", {"unet": "cpu", "vae": "cpu", "text_encoder": "cpu"}, raising=False
    )
    if apart is not None:
        pipe.vae.decoder.to("meta")
        with pytest.raises(InputError, match=r"vae is moved about .*`pipe\.reset_device_map\(\)`"):
            load_backend(pipe)
        return
    with pytest.raises(
        InputError, match=r"dtype is 'float16'; the pipeline has a device map .*reset_device_map"
    ):
        load_backend(pipe, dtype="float16")
    method = ipgo.IPGO(ascent=ipgo.Ascent(steps=1, backprop_steps=1, recompute=True))
    options = {"reward": brightness, "method": method, "seeds": [0], "held_out": [], "sampling": Sampling(1)}
    fitted, usual = (ipgo.fit("sun", backend=each, **options)[0] for each in (pipe, tiny_pipeline()))
    assert fitted.history[-1]["grad_norm"] == usual.history[-1]["grad_norm"] > 0


def test_a_cache_of_features_is_refused():
    pipe = tiny.flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with pytest.raises(
        InputError, match=r"the pipeline's transformer keeps features .*`pipe\.transformer\.dis"
    ):
        load_backend(pipe)
    pipe.transformer.disable_cache()
    load_backend(pipe)


def test_schedules_of_few_steps_begin_at_pure_noise():
    """What a model was made for stays when its scheduler is exchanged, or the exchange is refused."""
    pipe = tiny_pipeline()
    own = pipe.scheduler.config
    pipe.scheduler = EulerDiscreteScheduler.from_config(own, timestep_spacing="trailing")
    latents = torch.zeros(1, 4, 8, 8)
    for name in ("ddim", "pndm", "lms", "euler", "dpm++"):
        assert int(load_backend(pipe, device="cpu", scheduler=name).scheduler(1, latents).timesteps[0]) == 999
    pipe.scheduler = DDIMScheduler.from_config(own, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    exact = load_backend(pipe, device="cpu", scheduler="ddim").scheduler(2, latents)
    assert exact.alphas_cumprod[-1] == pipe.scheduler.alphas_cumprod[-1]
    with pytest.raises(
        InputError, match="scheduler is 'lms'; the model was made for rescale_betas_zero_snr = True"
    ):
        load_backend(pipe, device="cpu", scheduler="lms").scheduler(2, latents)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchLCMScheduler,
        DDPMParallelScheduler,
        CMStochasticIterativeScheduler,
        LTXEulerAncestralRFScheduler,
        type("Mine", (DDPMScheduler,), {}),
    ],
)
def test_schedulers_with_noise_of_their_own_are_refused(scheduler):
    flow = scheduler in (FlowMatchLCMScheduler, LTXEulerAncestralRFScheduler)
    pipe = tiny.sd3() if flow else tiny_pipeline()
    pipe.scheduler = scheduler()
    with pytest.raises(InputError, match=f"the model's own, {scheduler.__name__}, draws noise itself"):
        generate(load_backend(pipe, device="cpu"), ["a red cat"], [3], Adapter(), Sampling(2, 1.0))


def test_a_scheduler_of_the_users_own_is_known_by_what_it_is_made_of():
    drawn = []
    for kind, options in ((EulerAncestralDiscreteScheduler, {}), (DDIMScheduler, {"eta": 0.5})):
        for own in (kind, type("Mine", (kind,), {})):
            pipe = tiny_pipeline()
            pipe.scheduler = own.from_config(pipe.scheduler.config)
            backend = load_backend(pipe, device="cpu")
            drawn.append([generate(backend, ["sun"], [3], None, Sampling(2, **options)) for _ in range(2)])
            assert torch.equal(*drawn[-1])
            assert backend.stochastic == (kind is not DDIMScheduler)
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[2][0], drawn[3][0])
    pipe = tiny_pipeline()
    pipe.scheduler = type("Mine", (LCMScheduler,), {}).from_config(pipe.scheduler.config)
    assert load_backend(pipe, device="cpu").few_steps is not None


def test_qwen_image_is_known_by_its_folder(tmp_path):
    """Its template is no part of the folder, and the tiny tokenizer's is shorter."""
    pipe = tiny.qwen_image()
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    opened = load_backend(tmp_path, device="cpu", image_size=16)
    assert type(opened) is type(load_backend(pipe, device="cpu"))
    assert (opened.max_tokens, opened.instruction_tokens) == (512, 34)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "none"}, "padding is 'none'; with FluxPipeline only 'max_length' is possible"),
        ({"scheduler": "euler"}, "scheduler is 'euler'; FluxPipeline is a flow model and keeps its own"),
        ({"image_size": 18}, "image_size 18 must be a positive multiple of 4"),
    ],
)
def test_options_that_a_family_lacks_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        load_backend(tiny.flux(), device="cpu", **options)


@pytest.mark.parametrize("build", [tiny.flux, tiny.lcm, tiny.sana_sprint, tiny.flux_2])
def test_distilled_guidance_has_no_negative_prompt(build):
    backend = load_backend(build(), device="cpu", image_size=16)
    sampling = Sampling(1, 3.5, negative_prompt="blurry")
    with pytest.raises(InputError, match="negative_prompt is 'blurry'; it needs classifier-free guidance"):
        generate(backend, ["sun"], [0], Adapter(), sampling)
    with pytest.raises(InputError, match=r"has no unconditional half; its guidance is '(distilled|none)'"):
        backend.unconditional("", backend.encode(["sun"]))


def test_flux_is_differentiated_without_the_kernel_that_crashes():
    torch.backends.cuda.enable_cudnn_sdp(True)
    open_to_draw(tiny.flux())  # which takes no backward pass, and so changes nothing for other models
    assert torch.backends.cuda.cudnn_sdp_enabled()
    load_backend(tiny.flux(), device="cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_noise_is_packed_for_the_pipeline_of_flux():
    latents = torch.arange(2 * 4 * 6 * 8.0).view(2, 4, 6, 8)
    theirs = tiny.FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(pack(latents), theirs)
    assert torch.equal(unpack(theirs, 3, 4), latents)
    pipe = tiny.flux()
    backend = load_backend(pipe, device="cpu", image_size=16)
    adapter = NoiseAdapter.start(backend, ["sun"], [3], shared=False)
    kwargs = adapter.prompt_kwargs(pipe, "sun")
    assert torch.equal(kwargs["latents"], pack(backend.noise([3])[:, 0]))


@pytest.mark.parametrize("build", [tiny.sd3, tiny.flux, tiny.pixart])
def test_a_long_prompt_is_counted_by_t5(build):
    backend = load_backend(build(), device="cpu", image_size=16)
    with pytest.raises(InputError, match="has 22 tokens and the encoder takes 16"):
        backend.encode(["a" * 20])
    cut = load_backend(build(), device="cpu", image_size=16, long_prompts="truncate").encode(["a" * 20])
    assert cut.length == backend.encode(["a"]).length


def test_without_t5_clip_counts():
    backend = load_backend(tiny.sd3(with_t5=False), device="cpu")
    assert backend.max_tokens == 77
    prompt = backend.encode(["sun"])
    assert prompt.length == 77 + 256
    assert not prompt.mask[:, 77:].any()


def test_sana_sees_the_longest_prompt_whole():
    backend = load_backend(tiny.sana(), device="cpu")
    longest = backend.encode(["a" * 298, "sun"])
    assert longest.mask.sum(1).tolist() == [300, 2 + 3]  # with its mark, and the instruction's last state
    with pytest.raises(InputError, match="has 300 tokens and the encoder takes 299"):
        backend.encode(["a" * 299])
    assert backend.unconditional("blurry", longest).mask.sum(1).tolist() == [7, 7]  # without the instruction


@pytest.mark.parametrize(
    ("build", "marks"),
    [(tiny.z_image, MARKS), (tiny.qwen_image, MARKS_AFTER), (tiny.flux_2, MARKS + "<think></think>")],
)
def test_the_marks_of_a_chat_count(build, marks):
    backend = load_backend(build(), device="cpu", image_size=16)
    spent = len(backend.tokenizer(marks).input_ids)
    assert backend.encode(["a" * (tiny.QWEN_TOKENS - spent)]).mask.all()
    with pytest.raises(InputError, match=f"has {tiny.QWEN_TOKENS + 1} tokens and the encoder takes"):
        backend.encode(["a" * (tiny.QWEN_TOKENS - spent + 1)])


def test_padding_goes_behind_the_text():
    embeds = torch.arange(2 * 5 * 1.0).view(2, 5, 1)
    mask = torch.tensor([[True, False, True, False, True], [False, True, False, False, False]])
    found = compact(PromptEmbeds(embeds, mask))
    assert found.embeds[..., 0].tolist() == [[0, 2, 4], [6, 5, 7]]
    assert found.mask.tolist() == [[True] * 3, [True, False, False]]


def test_learned_noise_for_a_pipeline_whose_prompts_are_lists():
    pipe = tiny.z_image()
    backend = load_backend(pipe, device="cpu", image_size=16)
    adapter = NoiseAdapter.start(backend, ["sun"], [3], shared=False)
    kwargs = adapter.prompt_kwargs(pipe, "sun")
    assert [states.shape[1] for states in kwargs["prompt_embeds"]] == [backend.embed_dim]
    assert torch.equal(kwargs["latents"], backend.noise([3])[:, 0])


def test_every_consistency_step_uses_the_noise_of_its_row():
    backend = load_backend(tiny.sana_sprint(), device="cpu")
    pair = generate(backend, ["sun", "a dog"], [3, 4], Adapter(), Sampling(3, 4.5))
    alone = generate(backend, ["a dog"], [4], Adapter(), Sampling(3, 4.5))
    torch.testing.assert_close(pair[1:], alone, atol=1e-5, rtol=0)
    assert backend.noise([4], Sampling(3).noise_steps(backend)).shape[1] == 1 + 3


def test_what_is_set_on_a_flow_scheduler_counts():
    """Its `set_shift` leaves no trace in the configuration."""
    pipe = tiny.sd3()
    before = load_backend(pipe, device="cpu").identity["schedule"]
    pipe.scheduler.set_shift(9.0)
    backend = load_backend(pipe, device="cpu")
    assert backend.identity["schedule"] != before
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}
    kwargs = {**Adapter().prompt_kwargs(pipe, "sun"), **options}
    theirs = pipe(latents=backend.noise([3])[:, 0], **kwargs).images
    ours = generate(backend, ["sun"], [3], None, Sampling(3, 3.0))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_diffusion_scheduler_that_predicts_a_flow_is_not_exchanged():
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipe = tiny.sdxl(UniPCMultistepScheduler(**flow))
    for name in ("dpm++", "euler"):
        backend = load_backend(pipe, device="cpu", scheduler=name)
        with pytest.raises(
            InputError, match=r"UniPCMultistepScheduler, has noise levels that no other can have"
        ):
            backend.scheduler(3, backend.noise([0])[:, 0])
    pipe.scheduler = EulerDiscreteScheduler(prediction_type="sample")
    backend = load_backend(pipe, device="cpu", scheduler="pndm")
    with pytest.raises(InputError, match="'pndm', which knows no model that predicts the picture"):
        backend.scheduler(3, backend.noise([0])[:, 0])


def test_a_schedule_that_is_none_is_said_to_be():
    pipe = tiny.qwen_image()
    pipe.scheduler = type(pipe.scheduler)(use_dynamic_shifting=True, shift_terminal=0.02)
    backend = load_backend(pipe, device="cpu")
    with pytest.raises(InputError, match=r"sampling.steps is 1; FlowMatch\w+ has no schedule of so few here"):
        Sampling(1).check(backend)


def test_noise_of_every_step_is_a_pipelines_at_any_size():
    """torch draws many numbers at once otherwise than one after the other, unless they are sixteens."""
    backend = load_backend(tiny.sdxl_turbo(), device="cpu", image_size=18)
    source = torch.Generator().manual_seed(5)
    theirs = [torch.randn((1, 4, 9, 9), generator=source) for _ in range(3)]
    assert torch.equal(backend.noise([5], 2)[0], torch.cat(theirs))
    assert torch.equal(backend.noise([5], 1), backend.noise([5], 2)[:, :2])


@pytest.mark.parametrize("build", [tiny.lcm, tiny.sdxl_turbo, tiny.sana_sprint])
def test_learned_noise_goes_into_a_pipeline_that_adds_noise_of_its_own(build):
    """Which is then not the seed's first draw, that the learned one has replaced."""
    pipe = build()
    backend = load_backend(pipe, device="cpu")
    adapter = NoiseAdapter.start(backend, ["sun"], (5,), shared=False)
    with torch.no_grad():
        adapter.latents += 0.1 * torch.randn(
            adapter.latents.shape, generator=torch.Generator().manual_seed(0)
        )
    steps = 3 if build is not tiny.sana_sprint else 2
    scale = 1.0 if build is tiny.sdxl_turbo else backend.guidance_scale
    kwargs = {**adapter.prompt_kwargs(pipe, "sun"), **backend.pipeline_guidance(scale)}
    shape = {"height": backend.image_size, "width": backend.image_size}
    theirs = pipe(num_inference_steps=steps, output_type="pt", **shape, **kwargs).images
    torch.testing.assert_close(
        generate(backend, ["sun"], [5], adapter, Sampling(steps, scale)), theirs, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("build", [tiny.pixart, tiny.sana])
def test_prompts_count_as_they_are_read(build):
    """In small letters."""
    backend = load_backend(build(), device="cpu")
    assert backend._lengths(["  A RED Fox "]) == backend._lengths(["a red fox"])


def test_networks_that_do_not_fit_are_refused():
    pipe = tiny_pipeline()
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(InputError, match=r"takes 9 channels, .*models for inpainting"):
        load_backend(pipe, device="cpu")
    pipe = tiny_pipeline()
    pipe.unet.register_to_config(sample_size=[8, 8])
    assert load_backend(pipe, device="cpu").latent_shape == (4, 8, 8)
    pipe.unet.register_to_config(sample_size=[8, 12])
    with pytest.raises(InputError, match="image_size is None, and the model's own latents are 8 x 12"):
        load_backend(pipe, device="cpu")
    assert load_backend(pipe, device="cpu", image_size=16).latent_shape == (4, 8, 8)
    pipe = tiny_pipeline()
    del pipe.vae.decoder
    with pytest.raises(InputError, match="is a AutoencoderKL, which draws noise itself"):
        load_backend(pipe, device="cpu")
    pipe = tiny.sd3()
    most = (
        pipe.transformer.config.pos_embed_max_size
        * pipe.transformer.config.patch_size
        * pipe.vae_scale_factor
    )
    with pytest.raises(InputError, match=f"image_size is {2 * most}; it must be at most {most}"):
        load_backend(pipe, device="cpu", image_size=2 * most)


def test_a_textual_inversion_of_one_tokenizer_alone_is_refused():
    pipe = tiny.sdxl()
    backend = load_backend(pipe, device="cpu")
    pipe.tokenizer_2.add_tokens(["moon"])
    with pytest.raises(InputError, match="two tokenizers read a prompt in unequal lengths"):
        backend.encode(["a moon"])


def test_a_cache_that_a_function_put_on_is_refused():
    pipe = tiny.flux()
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    apply_pyramid_attention_broadcast(pipe.transformer, config)
    with pytest.raises(InputError, match=r"the pipeline's transformer keeps features .*or load the pipeline"):
        load_backend(pipe, device="cpu")


@pytest.mark.parametrize("alone", [True, False])
def test_a_kernel_without_a_backward_pass_is_refused(alone, monkeypatch):
    """As `set_attention_backend("sage")` sets it, where that is installed, or DIFFUSERS_ATTN_BACKEND."""
    pipe, name = tiny.flux(), AttentionBackendName("_sage_qk_int8_pv_fp16_cuda")
    if alone:
        pipe.transformer.transformer_blocks[0].attn.processor._attention_backend = name
    else:
        monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", name)
    with pytest.raises(
        InputError, match=r"the pipeline's transformer attends .*`pipe\.transformer\.set_attent"
    ):
        load_backend(pipe, device="cpu")
    open_to_draw(pipe)
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName("native"))
    pipe.transformer.set_attention_backend("native")
    load_backend(pipe, device="cpu")


def test_a_lora_is_not_put_onto_the_rest_of_another():
    pipe = tiny_pipeline()
    backend = load_backend(pipe, device="cpu")
    whole = WeightAdapter.start(backend, ["sun"], LoRA(), seed=0, shared=False)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    pipe.delete_adapters("style")
    with pytest.raises(InputError, match=r"a LoRA that was deleted; call pipe\.unload_lora_weights"):
        WeightAdapter.start(backend, ["sun"], LoRA(), seed=0, shared=False)
    pipe.unload_lora_weights()
    assert WeightAdapter.start(backend, ["sun"], LoRA(), seed=0, shared=False).layers == whole.layers


def test_a_lora_is_not_put_onto_fused_attention():
    pipe = tiny_pipeline()
    pipe.fuse_qkv_projections()
    backend = load_backend(pipe, device="cpu")
    with pytest.raises(InputError, match=r"attention is fused.*unfuse_qkv_projections"):
        WeightAdapter.start(backend, ["sun"], LoRA(), seed=0, shared=False)


def test_a_folder_that_was_saved_without_a_part_is_opened(tmp_path):
    """diffusers writes [null, null] for SD3's missing T5, and then asks for it."""
    tiny.sd3(with_t5=False).save_pretrained(tmp_path / "sd3")
    saved = load_backend(tmp_path / "sd3", device="cpu")
    whole = load_backend(tiny.sd3(with_t5=False), device="cpu")
    sampling = Sampling(2, 3.0)
    images = [generate(each, ["sun"], [0], Adapter(), sampling) for each in (saved, whole)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)


def test_words_of_any_tokenizer(monkeypatch):
    """A word begins with a mark in the vocabularies of T5 and Qwen, and ends with one in CLIP's."""
    backend = load_backend(tiny.pixart(), device="cpu")
    assert Vocabulary.of(backend).nearest(torch.zeros(2, backend.embed_dim), 3) == [
        (),
        (),
    ]  # it has single letters
    tokens = {"▁a": 0, "▁Fox": 1, "▁dog": 2, "cat": 3, "Ġsun": 4, "moon</w>": 5, "▁1,": 6}
    monkeypatch.setattr(backend.pipe.tokenizer, "get_vocab", lambda: tokens)
    assert Vocabulary.of(backend).words == ("a", "dog", "moon", "sun")


@pytest.mark.parametrize("make", [tiny.sd3, tiny.flux])
def test_what_clip_takes_the_beginning_of_is_said_and_recorded(make, tmp_path, caplog):
    """A longer encoder beside it reads the whole prompt, so that it is not refused."""
    pipe = make()
    getattr(pipe, "tokenizer_3", pipe.tokenizer_2).model_max_length = 100
    backend = load_backend(pipe, device="cpu")
    prompts = ["x" * 75, "x" * 76]  # one token each, and CLIP's two marks
    assert backend.half_read(prompts) == prompts[1:]
    assert backend.truncated(prompts) == []
    short = ipgo.IPGO(insertion=ipgo.Insertion(1, 1), ascent=ipgo.Ascent(steps=1, backprop_steps=1))
    ipgo.fit(
        prompts,
        backend=backend,
        reward="contrast",
        held_out=(),
        method=short,
        sampling=Sampling(steps=1),
        seeds=(0,),
        unseen_seeds=0,
        out=tmp_path / "run",
    )
    assert [result["truncated"] for result in ipgo.Run.open(tmp_path / "run").results()] == [False, True]
    assert caplog.text.count("CLIP takes the beginning alone") == 1


@pytest.mark.parametrize("make", [lambda: tiny.sd3(with_t5=False), tiny.sdxl])
def test_where_clip_is_all_there_is_nothing_is_read_by_half(make):
    assert load_backend(make(), device="cpu", long_prompts="truncate").half_read(["x" * 99]) == []
