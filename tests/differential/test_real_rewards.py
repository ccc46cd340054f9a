"""The rewards of the papers against transformers' own processors and models, on tiny random weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from ipgo import InputError
from ipgo.images import from_pil, normalise
from ipgo.rewards import load_reward, score
from ipgo.rewards.hps import ACTIVATION, config_of, convert
from ipgo.rewards.linear import collapse
from ipgo.rewards.preprocessing import Preprocessing, read_preprocessing
from ipgo.rewards.unloaded import VIT_H
from tests.conftest import byte_tokenizer
from tests.reward_models import (
    PROMPTS,
    OpenClip,
    TinyImageReward,
    bert_tokenizer,
    drawings,
    linear_head,
    pictures,
    prefixed,
    tiny_clip,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIPModel with tokenizer and processor, as on the hub."""
    place = tmp_path_factory.mktemp("models") / "clip-vit-large-patch14"
    tiny_clip().save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    processor().save_pretrained(place)
    return place


def processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


# -- pictures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pictures, drawings])
@pytest.mark.parametrize("shape", [(96, 96), (64, 96), (131, 75), (20, 28), (32, 45)])
def test_pictures_are_prepared_as_by_transformers(
    shape: tuple[int, int], kind: Callable[..., list[Image.Image]]
) -> None:
    # The processor resizes with PIL, which rounds to 8 bits and clips after each of its two passes; a tensor that
    # keeps its gradient clips only. Found here: at most 1 level of 255, 1.5 for an enlarged picture, 0.3 on average.
    levels = 255 * torch.tensor(Preprocessing(32).std).view(3, 1, 1)
    images = torch.stack([from_pil(each) for each in kind(*shape)])
    ours = Preprocessing(32)(images)
    theirs = processor()(kind(*shape), return_tensors="pt").pixel_values
    difference = ((ours - theirs) * levels).abs()
    assert ours.shape == theirs.shape
    assert difference.max() < 2
    assert difference.mean() < 0.4


@pytest.mark.parametrize("kind", [pictures, drawings])
@pytest.mark.parametrize("shape", [(96, 96), (64, 96), (131, 75)])
def test_the_notebooks_pictures_are_bilinear(
    shape: tuple[int, int], kind: Callable[..., list[Image.Image]]
) -> None:
    bilinear = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=Image.Resampling.BILINEAR
    )
    theirs = bilinear(kind(*shape), return_tensors="pt").pixel_values
    ours = Preprocessing(32, "notebook")(torch.stack([from_pil(each) for each in kind(*shape)]))
    difference = ((ours - theirs) * 255 * torch.tensor(Preprocessing(32).std).view(3, 1, 1)).abs()
    assert difference.max() < 1.5
    assert difference.mean() < 0.4


def test_a_picture_of_the_right_size_is_only_normalised() -> None:
    images = torch.stack([from_pil(each) for each in pictures(32, 32)])
    theirs = processor()(pictures(32, 32), return_tensors="pt").pixel_values
    torch.testing.assert_close(Preprocessing(32)(images), theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", [pictures, drawings])
@pytest.mark.parametrize("shape", [(96, 64), (50, 99), (64, 64), (20, 28)])
def test_a_padded_picture_is_pils_on_black(
    shape: tuple[int, int], kind: Callable[..., list[Image.Image]]
) -> None:
    height, width = shape
    picture = kind(height, width, 1)[0]
    factor = 32 / max(height, width)
    small = picture.resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (32, 32))
    square.paste(small, ((32 - small.width) // 2, (32 - small.height) // 2))
    found = Preprocessing(32, "pad", mean=(0.0,) * 3, std=(1.0,) * 3)(from_pil(picture)[None])[0]
    difference = (found - from_pil(square)).abs() * 255
    assert 0 <= found.min() <= found.max() <= 1
    assert difference.max() < 2
    assert difference.mean() < 0.4


# -- clip and pickscore ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (96, 64)])
def test_scores_are_those_of_transformers(folder: Path, shape: tuple[int, int]) -> None:
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        given = processor()(pictures(*shape), return_tensors="pt")
        logits = model(**inputs, **given).logits_per_image.diagonal()
    images = torch.stack([from_pil(each) for each in pictures(*shape)])
    clip, pick = (load_reward(f"{name}:{folder}", device="cpu") for name in ("clip", "pickscore"))
    # Exact where nothing is resized; else as far as PIL's rounding shows in a random tower.
    tolerance = 1e-5 if shape == (32, 32) else 5e-3
    scale = model.logit_scale.exp().item()
    torch.testing.assert_close(score(pick, images, PROMPTS), logits, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(score(clip, images, PROMPTS), logits / scale, rtol=0, atol=tolerance)


def test_the_processors_own_mean_and_spread_are_used(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    stated = json.loads((folder / "preprocessor_config.json").read_text())
    stated |= {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    images = torch.stack([from_pil(each) for each in pictures(32, 32)])
    own = CLIPImageProcessor.from_pretrained(tmp_path)(pictures(32, 32), return_tensors="pt").pixel_values
    reward = load_reward(f"clip:{tmp_path}", device="cpu")
    torch.testing.assert_close(reward.preprocessing(images), own, rtol=0, atol=2e-6)
    assert reward.identity["preprocessing"].endswith("mean (0.5, 0.5, 0.5), std (0.25, 0.25, 0.25)")


@pytest.mark.parametrize("shape", [(96, 64), (50, 99), (32, 32)])
@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"size": {"shortest_edge": 40}}, "shorter side bicubic to 40, centre crop of 32"),
        (
            {"size": 40, "crop_size": 32},
            "shorter side bicubic to 40, centre crop of 32",
        ),  # as older files have it
        ({"resample": 2}, "shorter side bilinear to 32, centre crop"),
        ({"size": {"height": 32, "width": 32}, "do_center_crop": False}, "both sides bicubic to 32"),
        ({"size": {"height": 32, "width": 32}, "resample": 2}, "both sides bilinear to 32"),
    ],
)
def test_the_processors_own_way_of_resizing_is_taken(
    own: dict[str, Any], told: str, shape: tuple[int, int], folder: Path, tmp_path: Path
) -> None:
    preprocessing, theirs = _prepared(folder, tmp_path, own, shape)
    images = torch.stack([from_pil(each) for each in pictures(*shape)])
    difference = (
        (preprocessing(images) - theirs) * 255 * torch.tensor(preprocessing.std).view(3, 1, 1)
    ).abs()
    assert difference.max() < 2.5
    assert difference.mean() < 0.4
    assert str(preprocessing) == told


@pytest.mark.parametrize(
    "own",
    [
        {"do_center_crop": False},  # of a wide picture the tower would get a wide one
        {"resample": 1},
        {"do_resize": False},
        {"size": {"shortest_edge": 20}},
        {"crop_size": {"height": 28, "width": 28}},
        {"do_normalize": False},
        {"image_mean": [0.5]},
    ],
)
def test_another_way_of_preparing_is_refused(own: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="prepares pictures in a way that is not done here"):
        _prepared(folder, tmp_path, own, (32, 32))


def _prepared(
    folder: Path, place: Path, own: dict[str, Any], shape: tuple[int, int]
) -> tuple[Preprocessing, torch.Tensor]:
    """What we make of a processor's configuration, and what transformers makes of it."""
    stated = json.loads((folder / "preprocessor_config.json").read_text()) | own
    (place / "preprocessor_config.json").write_text(json.dumps(stated))
    ours = read_preprocessing(place, 32, notebook=False)
    theirs = CLIPImageProcessor.from_pretrained(place)(pictures(*shape), return_tensors="pt").pixel_values
    return ours, theirs


# -- aesthetic ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["sac+logos+ava1-l14-linearMSE.pth", "head.safetensors"])
def test_aesthetic_is_the_five_layers_on_the_normalised_embedding(folder: Path, file: str) -> None:
    head, model = linear_head(8).eval(), CLIPModel.from_pretrained(folder)
    save = torch.save if file.endswith(".pth") else save_file
    save(prefixed(head, "layers."), folder.parent / file)
    reward = load_reward(f"0.5*aesthetic:{folder.parent / file}", device="cpu")
    images = torch.stack([from_pil(each) for each in pictures(32, 32)])
    with torch.no_grad():
        given = processor()(pictures(32, 32), return_tensors="pt")
        features = model.get_image_features(**given).pooler_output
        expected = head(features / features.norm(dim=-1, keepdim=True))[:, 0]
    torch.testing.assert_close(2 * score(reward, images, PROMPTS), expected, rtol=1e-6, atol=1e-6)


def test_the_collapsed_head_is_the_published_size_one() -> None:
    head = linear_head(768).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(3)
    weight, bias = collapse(prefixed(head, "layers."), "layers.", "aesthetic")
    embeddings = F.normalize(torch.randn(16, 768, generator=torch.Generator().manual_seed(0)), dim=-1)
    with torch.no_grad():
        torch.testing.assert_close(embeddings @ weight + bias, head(embeddings)[:, 0], rtol=1e-6, atol=1e-6)


# -- hps ---------------------------------------------------------------------------------------------------


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize(("activation", "name"), [(nn.GELU(), "gelu"), (QuickGelu(), "quick_gelu")])
def test_an_open_clip_state_dict_becomes_the_same_clip(activation: nn.Module, name: str) -> None:
    original = OpenClip(activation).eval()
    state = original.state_dict()
    model = CLIPModel(config_of(state, name)).eval()
    model.load_state_dict(convert(state))  # every tensor, and no other
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    tokens = byte_tokenizer()(PROMPTS, padding="max_length", return_tensors="pt")
    filled = tokens.input_ids * tokens.attention_mask
    with torch.no_grad():
        torch.testing.assert_close(model.get_image_features(pixels).pooler_output, original.visual(pixels))
        text = model.get_text_features(tokens.input_ids).pooler_output
        torch.testing.assert_close(text, original.encode_text(filled))


def vit_h_14() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state dict of open_clip's ViT-H-14, as HPS_v2_compressed.pt has them."""
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (1280,),
        "visual.positional_embedding": (257, 1280),
        "visual.proj": (1280, 1024),
        "visual.conv1.weight": (1280, 3, 14, 14),
        "positional_embedding": (77, 1024),
        "text_projection": (1024, 1024),
        "token_embedding.weight": (49408, 1024),
        "logit_scale": (),
    }
    for name, width in (("visual.ln_pre", 1280), ("visual.ln_post", 1280), ("ln_final", 1024)):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for prefix, width, depth in (("visual.", 1280, 32), ("", 1024, 24)):
        for layer in range(depth):
            block = f"{prefix}transformer.resblocks.{layer}"
            maps = {
                "attn.out_proj": (width, width),
                "mlp.c_fc": (4 * width, width),
                "mlp.c_proj": (width, 4 * width),
            }
            shapes |= {
                f"{block}.{norm}.{kind}": (width,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")
            }
            shapes |= {
                f"{block}.attn.in_proj_weight": (3 * width, width),
                f"{block}.attn.in_proj_bias": (3 * width,),
            }
            for name, shape in maps.items():
                shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    return shapes


def test_the_published_sizes_are_read_off_the_published_names() -> None:
    shapes = vit_h_14()
    small = {re.sub(r"\d+", "0", name) for name in OpenClip().state_dict()}
    assert {re.sub(r"\d+", "0", name) for name in shapes} == small  # what the tests above are made of
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = config_of(state, ACTIVATION)
    known = CLIPConfig(**VIT_H)
    for tower in ("vision_config", "text_config"):
        ours, theirs = (getattr(each, tower).to_dict() for each in (config, known))
        for key in VIT_H[tower]:
            assert ours[key] == theirs[key], (tower, key)
    assert config.vision_config.image_size == 224
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in CLIPModel(config).state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in convert(state).items()} == wanted


@pytest.mark.parametrize("version", ["hpsv2", "hpsv2.1"])
def test_hps_is_the_cosine_on_the_padded_square(version: str, folder: Path) -> None:
    original, file = OpenClip().eval(), folder.parent / f"{version}.pt"
    torch.save({"epoch": 3, "state_dict": original.half().state_dict()}, file)
    original.float()
    reward = load_reward(f"{version}:{file}", device="cpu")
    wide = torch.stack([from_pil(each) for each in pictures(14, 28)])
    black = -torch.tensor(Preprocessing(28).mean) / torch.tensor(Preprocessing(28).std)
    pixels = black.view(3, 1, 1).expand(3, 3, 28, 28).clone()
    pixels[:, :, 7:21] = normalise(wide, Preprocessing(28).mean, Preprocessing(28).std)
    tokens = byte_tokenizer()(PROMPTS, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        text = original.encode_text(tokens.input_ids * tokens.attention_mask)
        expected = F.cosine_similarity(original.visual(pixels), text)
    torch.testing.assert_close(score(reward, wide, PROMPTS), expected)


# -- imagereward -------------------------------------------------------------------------------------------


def test_imagereward_is_blips_first_state_through_the_head(tmp_path: Path) -> None:
    original, file = TinyImageReward().eval(), tmp_path / "ImageReward.pt"
    torch.save(original.state_dict(), file)
    bert_tokenizer().save_pretrained(tmp_path / "bert-base-uncased")
    reward = load_reward(f"imagereward:{file}", device="cpu")
    assert (
        reward.vision.config.layer_norm_eps == 1e-6
    )  # timm's; what another does is below the tolerance here
    images = torch.stack([from_pil(each) for each in pictures(32, 32)])
    pixels = processor()(pictures(32, 32), return_tensors="pt").pixel_values
    with torch.no_grad():
        pairs = zip(pixels, PROMPTS, strict=True)
        expected = torch.cat([original(each[None], prompt) for each, prompt in pairs])
    torch.testing.assert_close(score(reward, images, PROMPTS), expected, rtol=1e-4, atol=1e-5)
