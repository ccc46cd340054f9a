"""Opening a backend, and what is refused."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from huggingface_hub.errors import GatedRepoError
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

import ipgo
from ipgo.adapters import Adapter, InsertionAdapter, LoRA, WeightAdapter, generate
from ipgo.artefacts import save_adapter
from ipgo.backends import FAMILIES, check_backend, load_backend
from ipgo.backends import folder as folders
from ipgo.backends.facts import Opening
from ipgo.backends.weights import check_numbers, fingerprint
from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError, RewardError
from ipgo.files import hub_id
from ipgo.images import from_pil
from ipgo.insertion import Insertion
from ipgo.rewards.emoji import load_judge
from ipgo.sampling import Sampling, sample
from tests.conftest import brightness, put_into_cache, quantised


@pytest.fixture
def folder(pipeline_folder, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(pipeline_folder, tmp_path / "model"))


@pytest.mark.parametrize("revision", ["", "@v1.0"])
def test_a_hub_id_is_opened_from_what_the_hub_has_given_before(
    pipeline_folder: str, tmp_path: Path, revision: str
) -> None:
    """By the command, in a process that cannot reach it."""
    put_into_cache(tmp_path / "cache", "owner/tiny", Path(pipeline_folder), revision=revision[1:] or "main")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    words = ["generate", str(tmp_path / "one"), "a fox", "--backend", "owner/tiny"]
    words[-1] += revision
    words += ["--out", str(tmp_path / "drawn")]
    backend = load_backend(pipeline_folder, device="cpu")
    adapter = InsertionAdapter.start(
        backend, ("a fox",), Insertion(), seed=0, shared=False, sampling=Sampling(2)
    )
    save_adapter(adapter, tmp_path / "one", {"backend": pipeline_folder, "sampling": {"steps": 2}})
    command = [sys.executable, "-m", "ipgo.cli", *words]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    (file,) = (tmp_path / "drawn").iterdir()
    drawn = generate(backend, ["a fox"], [0], adapter, Sampling(2))
    assert (from_pil(Image.open(file)) - drawn[0]).abs().max() <= 0.5 / 255 + 1e-6


def test_a_folder_that_is_called_as_a_revision_is_that_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("mine/lcm@4step") == ("mine/lcm", "4step")
    Path("mine/lcm@4step").mkdir(parents=True)
    assert hub_id("mine/lcm@4step") == ("mine/lcm@4step", None)


def test_a_folder_and_its_pipeline_are_one_backend(pipeline_folder, backend):
    opened = load_backend(pipeline_folder, device="cpu")
    assert opened.name == pipeline_folder
    assert (opened.embed_dim, opened.latent_shape, opened.dtype) == (32, (4, 8, 8), torch.float32)
    prompts = ["a red cat", "sun"]
    torch.testing.assert_close(opened.encode(prompts).embeds, backend.encode(prompts).embeds)


def test_everything_is_frozen(backend):
    for module in backend.modules.values():
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_the_identity_is_that_of_the_weights_wherever_they_came_from(pipeline_folder, make_pipe, backend):
    assert load_backend(pipeline_folder).identity == backend.identity
    assert backend.identity["dtype"] == "float32"
    found = {backend.identity["weights"]}
    for part, parameter in (("denoiser", "conv_in.weight"), ("decoder", "decoder.conv_out.bias")):
        other = load_backend(make_pipe())
        with torch.no_grad():
            other.modules[part].get_parameter(parameter).add_(1e-3)
        found.add(other.identity["weights"])
    half = load_backend(make_pipe(), dtype="float16").identity
    assert half["dtype"] == "float16"
    assert len({*found, half["weights"]}) == 4
    assert fingerprint({"denoiser": torch.nn.Linear(2, 2, device="meta")}) is None


def test_what_changes_pictures_without_being_a_weight_is_known(make_pipe):
    pipe = make_pipe()
    found = [load_backend(pipe, device="cpu").identity["weights"]]
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    found.append(load_backend(pipe, device="cpu").identity["weights"])
    pipe.disable_freeu()
    assert load_backend(pipe, device="cpu").identity["weights"] == found[0]
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    for change in (lambda: None, lambda: pipe.unet.set_adapters(["default"], [0.1]), pipe.unet.disable_lora):
        change()
        found.append(load_backend(pipe, device="cpu").identity["weights"])
    assert len(set(found)) == 5


def test_quantised_weights_are_read_by_what_they_are_made_of(make_pipe):
    pipe, other = quantised(make_pipe()), quantised(make_pipe())
    with torch.no_grad():
        weight = next(w for w in other.unet.parameters() if hasattr(w, "scale"))
        weight.scale[-1] *= 2
    found = [load_backend(each).identity["weights"] for each in (pipe, quantised(make_pipe()), other)]
    assert found[0] == found[1] != found[2]
    check_numbers([("unet", pipe.unet)], "mine")
    weight.scale[0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        check_numbers([("unet", other.unet)], "mine")
    method = ipgo.IPGO(insertion=Insertion(2, 2), ascent=ipgo.Ascent(steps=1))
    short = Sampling(2, fit_steps=2)
    (fitted,) = ipgo.fit(
        "a fox", backend=pipe, reward=brightness, method=method, sampling=short, seeds=[0], held_out=[]
    )
    assert fitted.history[-1]["grad_norm"] > 0


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16])
def test_a_quantised_part_keeps_its_format(make_pipe, dtype):
    for part in ("unet", "text_encoder"):
        with pytest.raises(
            InputError, match=rf"float16'; the pipeline's {part} is quantised .*leave dtype out"
        ):
            load_backend(quantised(make_pipe(), part), dtype=dtype)
    pipe = make_pipe()
    pipe.vae.is_quantized = True  # as diffusers says it of what it loaded so
    with pytest.raises(InputError, match="the pipeline's vae is quantised"):
        load_backend(pipe, dtype=dtype)


def test_a_pipeline_that_was_changed_since_is_opened_again(make_pipe):
    pipe = make_pipe()
    backend = load_backend(pipe, device="cpu")
    pipe.unet = make_pipe().unet
    with pytest.raises(InputError, match="has got other networks, or another number format"):
        generate(backend, ["sun"], [0])
    backend = load_backend(pipe, device="cpu")
    pipe.to(torch.float64)
    with pytest.raises(InputError, match="has got other networks, or another number format"):
        ipgo.fit("sun", backend=backend, reward=lambda images, prompts: images.mean((1, 2, 3)))
    generate(load_backend(pipe, device="cpu"), ["sun"], [0], None, Sampling(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pipe: setattr(pipe, "text_encoder", copy.deepcopy(pipe.text_encoder)), "other networks"),
        (lambda pipe: pipe.unet.to("meta"), "number format or device"),
        (lambda pipe: pipe.text_encoder.to("meta"), "number format or device"),
        (
            lambda pipe: accelerate.cpu_offload(pipe.text_encoder, torch.device("cpu")),
            "text_encoder is moved",
        ),
        (lambda pipe: pipe.unet.enable_layerwise_casting(torch.float16, torch.float32), "layerwise casting"),
    ],
)
def test_what_was_changed_since_is_noticed_in_any_part(make_pipe, change, message):
    pipe = make_pipe()
    opened = load_backend(pipe, device="cpu")
    change(pipe)
    with pytest.raises(InputError, match=message):
        generate(opened, ["sun"], [0], sampling=Sampling(1))


def test_a_pipeline_that_is_refused_has_lost_no_digits(make_pipe):
    pipe = make_pipe()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with pytest.raises(InputError, match="image_size"):
        load_backend(pipe, device="cpu", dtype="bfloat16", image_size=13)
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    assert load_backend(pipe, device="cpu", dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_a_part_without_numbers_is_refused_before_anything_is_drawn(make_pipe, part):
    pipe = make_pipe()
    getattr(pipe, part).to("meta")
    with pytest.raises(InputError, match=f"the pipeline's {part} is on the device meta"):
        ipgo.fit("sun", backend=pipe, reward=brightness)


def test_networks_on_two_devices_are_refused_before_anything_is_drawn(make_pipe, monkeypatch):
    pipe = make_pipe()
    monkeypatch.setattr(type(pipe.vae), "device", torch.device("cuda:1"))
    with pytest.raises(
        InputError, match="the pipeline's vae is on cuda:1, and what denoises on cpu; put both"
    ):
        generate(pipe, ["sun"], [0], sampling=Sampling(1))


def test_what_was_set_to_train_since_is_frozen_again(make_pipe):
    pipe = make_pipe()
    opened = load_backend(pipe, device="cpu")
    before = generate(opened, ["sun"], [0], sampling=Sampling(1))
    pipe.unet.requires_grad_(True).train()
    for module in pipe.unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert torch.equal(generate(opened, ["sun"], [0], sampling=Sampling(1)), before)
    assert not any(each.requires_grad for each in pipe.unet.parameters())


def test_a_pipeline_is_left_with_its_modes_and_what_it_trains(make_pipe):
    pipe = make_pipe()
    pipe.unet.train()
    pipe.text_encoder.train()
    pipe.vae.requires_grad_(False)
    pipe.unet.conv_in.eval().requires_grad_(False)
    for module in pipe.text_encoder.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5

    def flags():
        parts = [
            (part, module) for part, module in pipe.components.items() if isinstance(module, torch.nn.Module)
        ]
        modes = {
            (part, name): each.training for part, module in parts for name, each in module.named_modules()
        }
        wanted = [each.requires_grad for _, module in parts for each in module.parameters()]
        return modes, wanted

    before, adapter = flags(), Adapter()
    found = [adapter.prompt_kwargs(pipe, "sun")["prompt_embeds"] for _ in range(2)]
    assert torch.equal(*found)  # nothing is dropped out
    assert flags() == before
    generate(pipe, ["sun"], [0], sampling=Sampling(1))
    assert flags() == before
    lora = WeightAdapter(
        ["sun"], {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (32, 32)}, LoRA()
    )
    with lora.attached(pipe, ["sun"]):
        pass
    assert flags() == before
    options = {"backend": pipe, "seeds": [0], "sampling": Sampling(1), "held_out": [], "unseen_seeds": 1}
    ipgo.fit("sun", reward=brightness, method=ipgo.IPGO(ascent=ipgo.Ascent(1, backprop_steps=1)), **options)
    assert flags() == before
    with pytest.raises(RewardError):
        ipgo.fit("sun", reward=lambda images, prompts: None, method="raw", **options)
    with pytest.raises(InputError):
        ipgo.fit("sun", reward="nothing", **options)
    assert flags() == before
    load_backend(pipe)
    modes, wanted = flags()
    assert not any(modes.values())
    assert not any(wanted)


def test_opening_and_drawing_leave_the_callers_random_numbers(make_pipe):
    state = torch.random.get_rng_state()
    pipe = make_pipe()
    torch.random.set_rng_state(state)
    pipe.vae.register_to_config(force_upcast=True)
    backend = load_backend(pipe, device="cpu", dtype="float16")
    generate(backend, ["sun"], [0], None, Sampling(1))
    load_judge()
    assert torch.equal(torch.random.get_rng_state(), state)


def change(part, edit):
    """Edit the tensors of a part of a folder."""
    (file,) = part.glob("*.safetensors")
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
        (lambda f: (f / "model_index.json").write_text("{"), "damaged model_index.json"),
        (
            lambda f: (f / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}'),
            "holds a KandinskyPipeline",
        ),
        (lambda f: shutil.rmtree(f / "vae"), "vae/config.json is missing"),
        (lambda f: shutil.rmtree(f / "tokenizer"), r"tokenizer/tokenizer\.json is missing"),
        (
            lambda f: [file.unlink() for file in (f / "tokenizer").iterdir()],
            r"tokenizer/tokenizer\.json is missing",
        ),
        (lambda f: change(f / "unet", lambda weights: weights.popitem()), "weights of unet lack 'up_blocks"),
        (
            lambda f: change(f / "text_encoder", lambda weights: weights.popitem()),
            "weights of text_encoder lack '",
        ),
        (
            lambda f: change(
                f / "vae", lambda weights: next(iter(weights.values())).view(-1)[3:4].fill_(math.nan)
            ),
            r"is damaged: 'decoder.* of vae is not finite",
        ),
        (
            lambda f: (f / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(
                '{"weight_map": {'
            ),
            "is not an index of shards",
        ),
        (
            lambda f: (f / "unet/diffusion_pytorch_model.safetensors.index.json").write_text("{}"),
            "is not an index of shards",
        ),
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "weights are missing"),
        (
            lambda f: (f / "text_encoder/model.safetensors").rename(f / "text_encoder/pytorch_model.bin"),
            "are a pickle",
        ),
        (
            lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_bytes(
                (f / "vae/diffusion_pytorch_model.safetensors").read_bytes()[:-100]
            ),
            "damaged or half-written",
        ),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_backend(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shard", ["10GB", "10KB"])
def test_weights_of_one_variant_are_found(make_pipe, tmp_path, shard):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path, safe_serialization=True, variant="fp16", max_shard_size=shard)
    assert (shard == "10KB") == any((tmp_path / "unet").glob("*.index.fp16.json"))
    opened = load_backend(tmp_path, device="cpu")
    assert opened.identity == load_backend(pipe, device="cpu").identity
    weights = sorted((tmp_path / "unet").glob("*.fp16*.safetensors"))
    weights[0].unlink()
    with pytest.raises(InputError, match="weights are missing"):
        load_backend(tmp_path, device="cpu")


def test_full_weights_are_preferred(make_pipe, folder):
    make_pipe(seed=1).save_pretrained(folder, safe_serialization=True, variant="fp16")
    assert load_backend(folder, device="cpu").identity == load_backend(make_pipe(), device="cpu").identity


def test_a_missing_shard_is_named(folder):
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    file.rename(folder / "unet/part-1.safetensors")
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    Path(f"{file}.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"part-2\.safetensors"):
        load_backend(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "emojy"}, "unknown backend 'emojy'; did you mean 'emoji'"),
        ({"source": "weights/model.ckpt"}, "is a pickle"),
        ({"source": "/no/such/folder"}, "does not exist"),
        ({"source": 3}, "not int"),
        ({"scheduler": "eular"}, "unknown scheduler 'eular'; did you mean 'euler'"),
        ({"padding": "max"}, "unknown padding 'max'"),
        ({"long_prompts": "cut"}, "unknown long_prompts 'cut'"),
        ({"text_device": "gpu"}, "unknown text_device 'gpu'; did you mean 'cpu'"),
        ({"image_size": 15}, "image_size 15 must be a positive multiple of 2"),
    ],
)
def test_wrong_options_are_refused(pipe, options, message):
    with pytest.raises(InputError, match=message):
        load_backend(**{"source": pipe, "device": "cpu", **options})


def test_a_hub_id_tells_its_family_before_its_weights_are_fetched(monkeypatch, tmp_path):
    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "KandinskyPipeline"}')
    asked = []
    monkeypatch.setattr(
        folders, "hf_hub_download", lambda *names, revision: asked.append((*names, revision)) or str(index)
    )
    for name in ("owner/name", "owner/name@refs/pr/3"):
        with pytest.raises(InputError, match=f"'{name}' holds a KandinskyPipeline; ipgo opens StableDiff"):
            load_backend(name)
    assert asked == [
        ("owner/name", "model_index.json", None),
        ("owner/name", "model_index.json", "refs/pr/3"),
    ]


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    def fail(*names, revision):
        raise OSError("no such repository\nmore")

    monkeypatch.setattr(folders, "hf_hub_download", fail)
    with pytest.raises(InputError, match=r"'owner/name' is not here.*\(no such repository\); give a copy as"):
        load_backend("owner/name")


def test_a_hub_id_of_one_variant_is_asked_for_it(monkeypatch, pipeline_folder):
    names = ["unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors"]
    index = str(Path(pipeline_folder) / "model_index.json")
    monkeypatch.setattr(folders, "hf_hub_download", lambda *names, revision: index)
    asked = []
    monkeypatch.setattr(
        StableDiffusionPipeline, "from_pretrained", lambda *_, **options: asked.append(options["variant"])
    )
    for there in (
        names,
        [*names, "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"],
    ):
        monkeypatch.setattr(folders, "list_repo_files", lambda source, revision, there=there: there)
        folders.open_pipeline("owner/name", "StableDiffusionPipeline", torch.float32)
    assert asked == ["fp16", None]


def test_a_gated_hub_id_says_what_to_do(monkeypatch):
    class LockedError(GatedRepoError):
        def __init__(self):
            """Its own wants the server's answer."""

    def fail(*names, revision):
        raise LockedError

    monkeypatch.setattr(folders, "hf_hub_download", fail)
    with pytest.raises(
        InputError,
        match=r"accept its licence: do so at https://huggingface.co/owner/name, and run `hf auth l",
    ):
        load_backend("owner/name")


def test_facts_in_words():
    """In two lines, written out by hand here."""
    assert FAMILIES["StableDiffusionXLPipeline"].facts.lines() == (
        "77 tokens, in windows of so many if longer, order does not matter, padding seen or hidden, pooled vector, "
        "guidance classifier-free or distilled",
        "diffusion, latents as a grid, time as t, VAE by factor, predicts noise, velocity or clean latents "
        "(its scheduler says which)",
    )
    assert FAMILIES["QwenImagePipeline"].facts.lines() == (
        "512 tokens, order matters, padding hidden, no pooled vector, guidance classifier-free",
        "flow, latents packed, time as t / 1000, VAE by mean and deviation, predicts a flow",
    )
    assert FAMILIES["SanaSprintPipeline"].facts.lines()[1].endswith("predicts an angle")


def test_a_long_prompt_is_refused_with_its_length_or_truncated(pipe, backend):
    prompt = "very " * 30 + "long"  # 124 letters, one token each, and the two marks
    with pytest.raises(InputError, match="has 126 tokens and the encoder takes 77"):
        backend.encode([prompt])
    with pytest.raises(InputError, match=r"^negative_prompt 'very .* has 126 tokens"):
        backend.unconditional(prompt, backend.encode(["short"]))
    cut = load_backend(pipe, device="cpu", long_prompts="truncate").encode([prompt])
    assert cut.embeds.shape == (1, 77, 32)
    assert cut.mask.all()


def test_noise_is_that_of_a_stock_generator(backend):
    noise = backend.noise([5, 6], steps=2)
    assert noise.shape == (2, 3, 4, 8, 8)
    stock = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    assert torch.equal(noise[:1, 0], stock)
    assert torch.equal(backend.noise([6])[:, 0], noise[1:, 0])


def test_a_scheduler_is_fresh_each_time(backend):
    latents = torch.zeros(1, 4, 8, 8)
    assert backend.scheduler(4, latents) is not backend.scheduler(4, latents)


def test_image_size(pipe):
    wide = load_backend(pipe, device="cpu", image_size=24)
    assert wide.latent_shape == (4, 12, 12)
    assert wide.decode(wide.noise([0])[:, 0]).shape == (1, 3, 24, 24)


def test_the_ledger_counts_rows(backend):
    cond = backend.encode(["a", "b"])
    cond = PromptEmbeds(cond.embeds.requires_grad_(), cond.mask)
    uncond = backend.unconditional("", cond)
    sample(backend, cond, uncond, backend.noise([0, 1]), Sampling(steps=3), backprop_steps=2)
    assert dict(backend.calls) == {"denoiser": 6, "denoiser_grad": 4, "denoiser_grad_both": 2, "decoder": 2}


def test_the_unconditional_half_of_many_prompts_is_kept_once(backend):
    one, three = (backend.unconditional("blurry", backend.encode(["sun"] * count)) for count in (1, 3))
    assert torch.equal(three.embeds, one.embeds.repeat(3, 1, 1))
    assert torch.equal(three.mask, one.mask.repeat(3, 1))
    assert three.embeds.untyped_storage().nbytes() == one.embeds.untyped_storage().nbytes()


def test_the_unconditional_half_builds_no_graph_where_it_carries_none(backend):
    """With K = 1 the latents are constants, so only the conditional half may keep activations.

    Elsewhere one call computes both halves.
    """
    cond = backend.encode(["a"])
    cond = PromptEmbeds(cond.embeds.requires_grad_(), cond.mask)
    uncond = backend.unconditional("", cond)
    modes = []
    hook = backend.modules["denoiser"].register_forward_pre_hook(
        lambda *_: modes.append(torch.is_grad_enabled())
    )
    sample(backend, cond, uncond, backend.noise([0]), Sampling(steps=3), backprop_steps=2)
    hook.remove()
    assert modes == [False, True, False, True]


def test_a_long_negative_prompt_is_refused_before_weights_are_read(pipeline_folder):
    with pytest.raises(InputError, match=r"^sampling.negative_prompt 'very .* has 126 tokens"):
        check_backend(pipeline_folder, Opening(), ["short"], "very " * 30 + "long")


def test_a_folder_says_how_wide_its_embeddings_are(pipeline_folder, tmp_path):
    assert check_backend(pipeline_folder, Opening()) == load_backend(pipeline_folder, device="cpu").embed_dim
    shutil.copytree(pipeline_folder, tmp_path / "damaged")
    (tmp_path / "damaged/unet/config.json").write_text("{")
    assert check_backend(tmp_path / "damaged", Opening()) is None  # whoever opens it says what is wrong


# What stable-diffusion-v1-5's scheduler_config.json says.
PUBLISHED = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


@pytest.mark.parametrize(
    ("name", "theirs", "place"),
    [
        ("ddim", DDIMScheduler(**PUBLISHED, clip_sample=False), -1),
        ("pndm", PNDMScheduler(**PUBLISHED, skip_prk_steps=True), 0),
    ],
)
def test_a_named_scheduler_is_the_published_one(pipe, name, theirs, place):
    ours = load_backend(pipe, device="cpu", scheduler=name).scheduler(50, torch.zeros(1))
    theirs.set_timesteps(50)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    latents, noise = 4 * torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)  # more than clipping would leave
    step, expected = (each.step(noise, each.timesteps[place], latents) for each in (ours, theirs))
    torch.testing.assert_close(step.prev_sample, expected.prev_sample)


def test_the_last_step_of_ddim_by_hand(pipe):
    scheduler = load_backend(pipe, device="cpu", scheduler="ddim").scheduler(50, torch.zeros(1))
    assert scheduler.timesteps[[0, 1, -2, -1]].tolist() == [981, 961, 21, 1]
    latents, noise = 4 * torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    kept, end = scheduler.alphas_cumprod[1], scheduler.alphas_cumprod[0]
    clean = (latents - (1 - kept).sqrt() * noise) / kept.sqrt()
    expected = end.sqrt() * clean + (1 - end).sqrt() * noise
    torch.testing.assert_close(scheduler.step(noise, torch.tensor(1), latents).prev_sample, expected)
