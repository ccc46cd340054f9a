"""What a family refuses, each in one sentence."""

import pytest
from diffusers import DDPMScheduler

from ipgo.backends import load_backend
from ipgo.errors import InputError
from ipgo.relaxation import Relaxation
from tests import tiny_families as tiny


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
    with pytest.raises(InputError, match="has no text_encoder, which prompts are encoded with"):
        load_backend(pipe, device="cpu")


def test_the_gradient_of_words_needs_one_text_encoder():
    with pytest.raises(InputError, match="needs one text encoder"):
        Relaxation(load_backend(tiny.sdxl(), device="cpu"))


def test_an_image_size_that_cuts_latents_is_refused():
    with pytest.raises(InputError, match="image_size 15 must be a positive multiple of 2"):
        load_backend(tiny.sdxl(), device="cpu", image_size=15)


def test_folders_are_opened_and_checked_part_by_part(tmp_path):
    tiny.sdxl().save_pretrained(tmp_path, safe_serialization=True)
    opened = load_backend(str(tmp_path), device="cpu")
    assert opened.embed_dim == 40
    (tmp_path / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"weights are missing: .*text_encoder_2"):
        load_backend(str(tmp_path), device="cpu")
