"""The rewards of the papers: what they are called, where their weights come from, rows and gradients."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import CLIPTokenizer

import ipgo.rewards
from ipgo.errors import InputError
from ipgo.rewards import (
    REWARDS,
    as_reward,
    check_reward,
    checkpoints,
    identity_of,
    load_reward,
    optimised,
    score,
)
from tests.conftest import byte_tokenizer, put_into_cache
from tests.reward_models import (
    PROMPTS,
    OpenClip,
    TinyImageReward,
    bert_tokenizer,
    linear_head,
    prefixed,
    tiny_clip,
)

REWARDS_FOLDER = Path(ipgo.rewards.__file__).parent
PUBLISHED = {name: known.source for name, known in REWARDS.items() if known.source is not None}
FILES = {
    "aesthetic": "head.pth",
    "hpsv2": "hps.pt",
    "hpsv2.1": "hps.pt",
    "imagereward": "blip/ImageReward.pt",
}
IMAGES = torch.rand((3, 3, 40, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "clip-vit-large-patch14"
    tiny_clip().save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    torch.save(prefixed(linear_head(8), "layers."), place.parent / "head.pth")
    torch.save(OpenClip().state_dict(), place.parent / "hps.pt")
    bert_tokenizer().save_pretrained(place.parent / "blip")
    torch.save(TinyImageReward().state_dict(), place.parent / "blip/ImageReward.pt")
    return place


def weights(folder: Path, name: str) -> Path:
    """What the spec of a reward gives."""
    return folder.parent / FILES[name] if PUBLISHED[name].file else folder


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_the_hub_has_given_before_is_found_again(folder: Path, tmp_path: Path, name: str) -> None:
    """Whole repositories and single files, with the second models and tokenizers that they need."""
    cache, source = tmp_path / "cache", PUBLISHED[name]
    if source.file is None:
        put_into_cache(cache, source.repo, folder)
    else:
        put_into_cache(cache, source.repo, weights(folder, name), source.file)
        put_into_cache(cache, "openai/clip-vit-large-patch14", folder)
        bert_tokenizer().save_pretrained(tmp_path / "bert")
        put_into_cache(cache, "google-bert/bert-base-uncased", tmp_path / "bert")
    found = load_reward(name, device="cpu")
    given = load_reward(f"{name}:{weights(folder, name)}", device="cpu")
    assert torch.equal(score(found, IMAGES, PROMPTS), score(given, IMAGES, PROMPTS))
    assert identity_of(found) == identity_of(given)


# -- specs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "clip:/nowhere/at/all",
            r"there is no folder '/nowhere/at/all'; it needs openai/clip-vit-large-patch14",
        ),
        ("clip@bilinear", "there is no variant 'bilinear'; the only one is notebook"),
        ("clip:", "has no path after its colon"),
        ("contrast:here", "'contrast' takes no path and no variant"),
        ("emoji-clip@notebook", "'emoji-clip' takes no path and no variant"),
        ("clpi:owner/name", "unknown reward 'clpi'; did you mean 'clip'"),
        ("contrast+0.5*pickscore:/nowhere", "there is no folder '/nowhere'"),
        (
            "aesthetic:/a/head.pth",
            "there is no file '/a/head.pth'; it needs aesthetic-model.pth of trl-lib/ddpo",
        ),
        (
            "hpsv2:/m/HPS_v2.1_compressed.pt",
            r"is published as 'hpsv2\.1'; write hpsv2\.1:/m/HPS_v2\.1_compressed",
        ),
    ],
)
def test_wrong_specs_are_refused_before_a_model_is_loaded(spec: str, message: str) -> None:
    for load in (check_reward, load_reward):
        with pytest.raises(InputError, match=message):
            load(spec)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not the folder of a CLIPModel: it needs config.json"):
        check_reward(f"clip:{tmp_path}")


def test_names_and_hub_ids_are_not_looked_up_while_they_are_checked() -> None:
    for name in PUBLISHED:
        check_reward(name)
        check_reward(f"{name}@notebook")
    check_reward("clip:laion/CLIP-ViT-H-14-laion2B-s32B-b79K+0.1*pickscore")


@pytest.mark.parametrize("variant", ["", "@notebook"])
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_offline_the_error_says_what_from_where_and_how(name: str, variant: str) -> None:
    source = PUBLISHED[name]
    name += variant
    with pytest.raises(InputError) as caught:
        load_reward(name, device="cpu")
    message = str(caught.value)
    assert f"reward {name!r} needs {source.file or 'config.json'}" in message
    assert f"huggingface.co/{source.repo}" in message
    assert f"give a copy as {name}:/path/" in message
    assert "\n" not in message


def test_offline_a_second_model_is_asked_for_by_the_name_of_its_folder(tmp_path: Path) -> None:
    torch.save(prefixed(linear_head(8), "layers."), tmp_path / "head.pth")
    needed = r"needs model\*.safetensors of huggingface.co/openai/clip-vit-large-patch14"
    with pytest.raises(
        InputError, match=rf"{needed}.* into a folder 'clip-vit-large-patch14' beside the weights"
    ):
        load_reward(f"aesthetic:{tmp_path / 'head.pth'}", device="cpu")


def test_a_repository_without_safetensors_is_said_to_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    monkeypatch.setattr(
        checkpoints, "snapshot_download", lambda repo, revision, allow_patterns: str(tmp_path)
    )
    with pytest.raises(
        InputError,
        match=r"cannot be fetched \(there is no model\*.safetensors\); give a copy as clip:/path/folder \(save_pre",
    ):
        load_reward("clip:owner/name", device="cpu")


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "none"}}'])
def test_a_damaged_tokenizer_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"reward 'clip': the tokenizer in '.*' cannot be opened"):
        checkpoints.open_tokenizer(CLIPTokenizer, tmp_path, "clip", 9)


@pytest.mark.parametrize("name", ["clip", "hpsv2", "imagereward"])
def test_another_models_tokenizer_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    """Of files that are not its own transformers makes one without words, to which all prompts are alike."""
    place = tmp_path / "mine" if PUBLISHED[name].file is None else tmp_path
    if place == tmp_path:
        shutil.copy(weights(folder, name), place)
        spec = f"{name}:{place / weights(folder, name).name}"
    else:
        shutil.copytree(folder, place)
        spec = f"{name}:{place}"
    for file in (*place.glob("tokenizer*"), *place.glob("vocab*"), *place.glob("merges*")):
        file.unlink()
    model = "bert-base-uncased" if name == "imagereward" else "clip-vit-large-patch14"
    (place / model).mkdir(exist_ok=True)
    shutil.copy(folder / "config.json", place / model)  # a folder without a tokenizer is none
    with pytest.raises(InputError, match=r"tokenizer.json"):
        load_reward(spec, device="cpu")
    other = byte_tokenizer() if name == "imagereward" else bert_tokenizer()
    other.save_pretrained(place)
    with pytest.raises(InputError, match=r"tokens and the model \d+; it is another model's|cannot be opened"):
        load_reward(spec, device="cpu")


def test_each_image_has_a_prompt(folder: Path) -> None:
    with pytest.raises(InputError, match="3 images have 1 prompts; each needs one"):
        score(load_reward(f"clip:{folder}", device="cpu"), IMAGES, ["a"])


def test_only_the_weights_that_are_read_are_known(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "clip")
    (tmp_path / "clip/model.fp16.safetensors").write_bytes(b"stray")
    assert checkpoints.weight_files(tmp_path / "clip") == [tmp_path / "clip/model.safetensors"]
    (tmp_path / "clip/model.safetensors").unlink()
    tiny_clip().save_pretrained(tmp_path / "clip", max_shard_size="20KB")
    shards = checkpoints.weight_files(tmp_path / "clip")
    assert len(shards) > 1
    assert shards == sorted((tmp_path / "clip").glob("model-*.safetensors"))
    damaged = (tmp_path / "clip/model.safetensors.index.json").read_text()
    (tmp_path / "clip/model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="is not an index of shards"):
        checkpoints.weight_files(tmp_path / "clip")
    (tmp_path / "clip/model.safetensors.index.json").write_text(damaged)
    found = load_reward(f"clip:{tmp_path / 'clip'}", device="cpu")
    # Not the same bits: some processors add in another order where weights lie elsewhere in memory.
    torch.testing.assert_close(
        score(found, IMAGES, PROMPTS), score(load_reward(f"clip:{folder}", device="cpu"), IMAGES, PROMPTS)
    )


def test_a_picture_of_any_shape_can_be_padded(folder: Path) -> None:
    long = torch.rand(1, 3, 2, 900)
    assert score(load_reward(f"hpsv2:{folder.parent / 'hps.pt'}", device="cpu"), long, ["a"]).isfinite().all()


class Harmful:
    """Would leave a file behind where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.file,)


def test_damaged_weights_are_refused_and_none_are_run(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / folder.name)
    file, harm = tmp_path / "head.pth", tmp_path / "harm"
    for content, message in (
        ({"layers.0.weight": Harmful(harm)}, "hold more than tensors, and are not read"),
        ({"layers.0.weight": 3}, "are not a state dict"),
        ({"other": torch.ones(2)}, "are not the linear layers"),
        (prefixed(linear_head(9), "layers."), "reads 9 numbers of a picture, but the CLIP in .* gives 8"),
    ):
        torch.save(content, file)
        with pytest.raises(InputError, match=message):
            load_reward(f"aesthetic:{file}", device="cpu")
    file.write_bytes(b"half")
    with pytest.raises(InputError, match="cannot be read: KeyError"):
        load_reward(f"aesthetic:{file}", device="cpu")
    assert not harm.exists()


def test_an_open_clip_that_is_none_or_not_whole_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / folder.name)
    state = OpenClip().state_dict()
    for gone, message in (
        ("visual.conv1.weight", "is not a CLIP of open_clip: it has no 'visual.conv1.weight'"),
        ("visual.ln_pre.bias", r"is not a complete CLIPModel: vision_model\.pre_layrnorm\.bias is missing"),
    ):
        torch.save({key: value for key, value in state.items() if key != gone}, tmp_path / "hps.pt")
        with pytest.raises(InputError, match=message):
            load_reward(f"hpsv2.1:{tmp_path / 'hps.pt'}", device="cpu")


def test_a_path_may_hold_a_plus(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "a+b")
    reward = load_reward(f"contrast+2*clip:{tmp_path / 'a+b'}+colorfulness", device="cpu")
    parts = [load_reward(each, device="cpu") for each in ("contrast", f"clip:{folder}", "colorfulness")]
    values = [part(IMAGES, PROMPTS) for part in parts]
    torch.testing.assert_close(reward(IMAGES, PROMPTS), values[0] + 2 * values[1] + values[2])
    with pytest.raises(InputError, match="there is no folder"):
        check_reward(f"clip:{tmp_path / 'a+c'}")


# -- rows and gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["", "@notebook"])
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_rows_stand_alone_and_gradients_reach_the_pictures_only(
    name: str, variant: str, folder: Path
) -> None:
    reward = load_reward(f"{name}{variant}:{weights(folder, name)}", device="cpu")
    images = IMAGES.clone().requires_grad_()
    values = score(reward, images, PROMPTS)
    alone = torch.cat([score(reward, IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(values, alone)
    assert values.dtype == torch.float32
    values[1].backward()
    assert images.grad is not None
    assert images.grad[1].abs().max() > 0
    assert not images.grad[[0, 2]].any()
    assert not any(parameter.requires_grad for parameter in reward.parameters())


@pytest.mark.parametrize("variant", ["", "@notebook"])
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_gradient_is_that_of_finite_differences(folder: Path, name: str, variant: str) -> None:
    reward = load_reward(f"{name}{variant}:{weights(folder, name)}", device="cpu").double()
    for part in reward.children():
        part.set_attn_implementation("sdpa")  # CLIP's plain one takes its softmax in float32
    images = (0.3 + 0.4 * IMAGES[:2, :, :34, :33]).double()  # far from where resizing clips
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).double()

    def along(step: torch.Tensor) -> torch.Tensor:
        return reward(images + step * direction, PROMPTS[:2])

    slopes = torch.autograd.functional.jacobian(along, torch.zeros((), dtype=torch.double))
    assert (slopes.abs() > 1e-6).all()
    assert torch.autograd.gradcheck(along, torch.zeros((), dtype=torch.double, requires_grad=True))


def test_the_notebook_variant_resizes_otherwise(folder: Path) -> None:
    exact, notebook = (load_reward(f"{name}:{folder}", device="cpu") for name in ("clip", "clip@notebook"))
    assert notebook.name == f"clip@notebook:{folder}"
    assert (exact(IMAGES, PROMPTS) - notebook(IMAGES, PROMPTS)).abs().max() > 1e-4
    square = IMAGES[..., :32, :32]
    torch.testing.assert_close(exact(square, PROMPTS), notebook(square, PROMPTS))


def test_a_long_prompt_is_cut_where_the_tower_ends(folder: Path) -> None:
    reward = load_reward(f"clip:{folder}", device="cpu")
    long, longer = "x " * 75, "x " * 200
    values = reward(IMAGES[:1].expand(2, -1, -1, -1), [long, longer])
    assert values[0] == values[1]


# -- identity ----------------------------------------------------------------------------------------------


def test_an_identity_says_what_decides_a_score(folder: Path) -> None:
    found = identity_of(load_reward(f"clip:{folder}", device="cpu"))
    assert found == {
        "id": "clip",
        "version": 2,
        "weights": [sha256(folder / "model.safetensors")],
        "preprocessing": "shorter side bicubic to 32, centre crop",
        "tokenizer": found["tokenizer"],
        "architecture": found["architecture"],
    }
    assert len(found["tokenizer"]) == len(found["architecture"]) == 12
    other = identity_of(load_reward(f"clip@notebook:{folder}", device="cpu"))
    assert other == {**found, "preprocessing": "shorter side bilinear to 32, centre crop"}


def test_how_prompts_are_read_and_what_no_tensor_shows_are_part_of_an_identity(
    folder: Path, tmp_path: Path
) -> None:
    found = identity_of(load_reward(f"clip:{folder}", device="cpu"))
    shutil.copytree(folder, tmp_path / "other")
    settings = tmp_path / "other/config.json"
    changed = json.loads(settings.read_text())
    changed["vision_config"]["hidden_act"] = "gelu"
    settings.write_text(json.dumps(changed))
    other = identity_of(load_reward(f"clip:{tmp_path / 'other'}", device="cpu"))
    assert {key for key in found if found[key] != other[key]} == {"architecture"}
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert found["tokenizer"] == checkpoints.reading(tokenizer, 77)
    tokenizer.save_pretrained(tmp_path / "saved")  # other files, the same tokens
    assert found["tokenizer"] == checkpoints.reading(CLIPTokenizer.from_pretrained(tmp_path / "saved"), 77)
    tokenizer.add_tokens(["fox"])
    assert found["tokenizer"] != checkpoints.reading(tokenizer, 77)


def test_weights_seen_in_another_way_are_not_held_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def warmth(images, prompts):\n    return images.mean((1, 2, 3))\n")
    warmth = load_reward(f"{tmp_path}/mine.py:warmth")
    rewards = {
        "clip": load_reward(f"clip:{folder}", device="cpu"),
        "clip@notebook": load_reward(f"clip@notebook:{folder}", device="cpu"),
        "warmth": warmth,
        "again": as_reward(warmth, "again"),
        "emoji-clip": load_reward("emoji-clip", device="cpu"),
    }
    identities = {name: identity_of(each) for name, each in rewards.items()}
    assert optimised("clip", identities) == {"clip", "clip@notebook"}
    assert optimised("warmth", identities) == {"warmth", "again"}


def test_a_sum_and_a_function_have_an_identity(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def warmth(images, prompts):\n    return images.mean((1, 2, 3))\n")
    reward = load_reward(f"emoji-clip+0.5*{file}:warmth", device="cpu")
    first, second = identity_of(reward)["terms"]
    assert (first["weight"], second["weight"]) == (1.0, 0.5)
    assert first["reward"]["weights"] == [sha256(REWARDS_FOLDER / "emoji/clip/model.safetensors")]
    text, place = second["reward"].pop("weights")
    assert second["reward"] == {"id": "warmth", "version": 1, "preprocessing": "its own"}
    assert text == sha256(file)
    assert len(place) == len(text)


@pytest.mark.parametrize("name", sorted(REWARDS.keys() - PUBLISHED.keys()))
def test_every_bundled_reward_has_an_identity(name: str) -> None:
    found = identity_of(load_reward(name, device="cpu"))
    assert found["id"] == name
    assert all(len(each) == 64 for each in found["weights"])
    assert found["weights"]


def test_a_file_of_ones_own_may_have_any_place_and_neighbours(tmp_path: Path) -> None:
    place = tmp_path / "a+b"
    place.mkdir()
    (place / "neighbour.py").write_text("FACTOR = 3.0\n")
    (place / "mine.py").write_text(
        "import neighbour\ndef three(images, prompts):\n    return neighbour.FACTOR * images.mean((1, 2, 3))\n"
    )
    expected = 3 * IMAGES.mean((1, 2, 3))
    for spec, weight in ((f"{place}/mine.py:three", 1.0), (f"0.5*{place}/mine.py:three", 0.5)):
        check_reward(spec)
        torch.testing.assert_close(score(load_reward(spec), IMAGES, PROMPTS), weight * expected)
    both = load_reward(f"contrast+2*{place}/mine.py:three")
    contrast = score(load_reward("contrast"), IMAGES, PROMPTS)
    torch.testing.assert_close(score(both, IMAGES, PROMPTS), contrast + 2 * expected)
    (tmp_path / "none.py").write_text("")
    with pytest.raises(InputError, match="'warmth'; there is none"):
        check_reward(f"{tmp_path}/none.py:warmth")
    (tmp_path / "odd.py").write_text("def odd(images, prompts):\n    return images.mean((1, 2, 3)) * 1j\n")
    with pytest.raises(InputError, match=r"odd.py:odd' must return real numbers, not torch\.complex64"):
        score(load_reward(f"{tmp_path}/odd.py:odd"), IMAGES, PROMPTS)
