"""The written-down configurations build models of the published sizes."""

from __future__ import annotations

import pytest
import torch

from ipgo.backends import BACKENDS
from ipgo.backends.published import PUBLISHED
from ipgo.backends.unloaded import unloaded_backend
from ipgo.errors import InputError
from ipgo.memory import new_sizes
from ipgo.rewards.unloaded import unloaded_reward

CLIP_L, CLIP_G, T5_XXL = 123_060_480, 694_659_840, 4_762_310_656
VAE_4, VAE_16 = 83_653_863, 83_819_683
GEMMA_2_2B, QWEN_3_4B, QWEN_25_VL_7B = 2_614_341_888, 4_022_468_096, 8_292_166_656
DC_AE = 312_250_275
# Numbers of parameters of the published checkpoints, denoiser first.
COUNTS = {
    "sd15": (859_520_964, CLIP_L, VAE_4),
    "sd21": (865_910_724, 340_387_840, VAE_4),
    "sd-turbo": (865_910_724, 340_387_840, VAE_4),
    "lcm": (859_520_964 + 256 * 320, CLIP_L, VAE_4),
    "sdxl": (2_567_463_684, CLIP_L, CLIP_G, VAE_4),
    "sdxl-turbo": (2_567_463_684, CLIP_L, CLIP_G, VAE_4),
    "sd3": (2_028_328_000, CLIP_L + 768 * 768, CLIP_G, T5_XXL, VAE_16),
    "sd35": (2_243_171_520, CLIP_L + 768 * 768, CLIP_G, T5_XXL, VAE_16),
    "flux-dev": (11_901_408_320, CLIP_L, T5_XXL, VAE_16),
    "flux-schnell": (11_891_178_560, CLIP_L, T5_XXL, VAE_16),
    "chroma": (8_899_983_424, T5_XXL, VAE_16),
    "pixart-alpha": (610_856_096, T5_XXL, VAE_4),
    "pixart-sigma": (610_856_096, T5_XXL, VAE_4),
    "sana": (1_604_462_752, GEMMA_2_2B, DC_AE),
    "z-image": (6_154_908_736, QWEN_3_4B, VAE_16),
    "z-image-turbo": (6_154_908_736, QWEN_3_4B, VAE_16),
    "qwen-image": (20_430_401_088, QWEN_25_VL_7B, 126_892_531),
}
# Of these the size of the denoiser's file in bfloat16 is known, in 10^9 bytes; that of Sana-Sprint is computed.
FILES = {"sana-sprint": 3.22, "flux2-klein": 7.75, "flux2-klein-base": 7.75}
PIXELS = {
    "sd15": 512,
    "sd21": 768,
    "sd-turbo": 512,
    "lcm": 768,
    "sdxl-turbo": 512,
    "pixart-alpha": 512,
    "pixart-sigma": 512,
}
TEXT_L = CLIP_L + 768 * 768  # with its projection; the aesthetic has no use for it
REWARDS = {
    "clip": 427_616_513,
    "aesthetic": 427_616_513 - TEXT_L,
    "hpsv2.1": 986_109_441,
    "pickscore": 986_109_441,
}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_what_is_written_down_is_of_the_family_that_opens_it() -> None:
    assert set(PUBLISHED) == {*COUNTS, *FILES} == set(BACKENDS) - {"emoji"}
    for name, blueprint in PUBLISHED.items():
        assert blueprint.kind == BACKENDS[name][0]


@pytest.mark.parametrize("name", COUNTS)
def test_backends_have_the_published_sizes(name: str) -> None:
    backend = unloaded_backend(name, new_sizes(), torch.float16)
    assert tuple(count(module) for module in backend.modules.values()) == COUNTS[name]
    assert backend.image_size == PIXELS.get(name, 1024)
    assert backend.dtype == torch.float16


@pytest.mark.parametrize("name", FILES)
def test_denoisers_have_the_size_of_their_files(name: str) -> None:
    backend = unloaded_backend(name, new_sizes(), torch.bfloat16)
    assert backend.image_size == 1024
    assert 2 * count(backend.modules["denoiser"]) == pytest.approx(FILES[name] * 1e9, rel=0.002)


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_have_the_published_sizes(name: str) -> None:
    reward = unloaded_reward(name, new_sizes())
    assert reward.differentiable
    assert isinstance(reward, torch.nn.Module)
    text = getattr(reward, "text", None)  # on the CPU, and so not part of the module
    assert count(reward) + (count(text.encoder) + count(text.projection) if text else 0) == REWARDS[name]


def test_imagereward_has_the_size_of_its_file() -> None:
    """ImageReward.pt has 1.79 GB in float32; its head of five layers is one here."""
    reward = unloaded_reward("imagereward", new_sizes())
    assert isinstance(reward, torch.nn.Module)
    head = 768 * 1024 + 1024 * 128 + 128 * 64 + 64 * 16
    assert 4 * (count(reward) + head) == pytest.approx(1.79e9, rel=0.005)


def test_sdxl_decodes_in_float32_and_t5_keeps_a_layer_in_it() -> None:
    """As `from_pretrained` and the backend load them in float16."""
    decoder = unloaded_backend("sdxl", new_sizes(), torch.float16).modules["decoder"]
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}
    t5 = unloaded_backend("pixart-alpha", new_sizes(), torch.float16).modules["text_encoder"]
    kept = {name.split(".")[-2] for name, each in t5.named_parameters() if each.dtype == torch.float32}
    assert kept == {"wo"}


def test_another_clip_has_no_known_size() -> None:
    with pytest.raises(
        InputError, match=r"the config\.json of 'laion/big' is not here and cannot be fetched"
    ):
        unloaded_reward("clip:laion/big", new_sizes())
