"""Write what was trained into the package, in fp16 safetensors: the pipeline folder, the rewards, the judge."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ipgo.rewards.emoji.judge import Network
from tools.emoji import parts, sprites, tokenizer, world
from tools.emoji.loop import digest, keep, newest, save, trained, weights
from tools.emoji.networks import SCALING, load_clip, pipeline
from tools.emoji.scorers import JUDGE_SIZES
from tools.emoji.sprites import BUILD

PACKAGE = Path("src/ipgo")
BACKEND = PACKAGE / "backends/emoji"
REWARDS = PACKAGE / "rewards/emoji"


def vocabulary() -> dict[str, object]:
    """What the model can draw and which words it has seen."""
    relations = {name: list(words) for name, words in world.RELATION_WORDS.items()}
    quality = [
        *world.CLEAN_WORDS,
        world.POOR_WORD,
        *(word for words in world.DEGRADATIONS.values() for word in words),
    ]
    return {
        "objects": {name: list(synonyms) for name, (_, synonyms) in world.OBJECTS.items()},
        "colours": list(world.COLOURS),
        "styles": {name: list(words) for name, words in world.STYLES.items()},
        "relations": relations,
        "quality": quality,
        "words": json.loads(tokenizer.WORDS.read_text()),
    }


def restore() -> None:
    """The reverse of `export`: checkpoints from the package's weights, so that a part can be trained further.

    Of all but the rewriter, whose policy is nothing without what it was trained from. The scenes and the latents are
    made again by their stages.
    """
    words = json.loads((BACKEND / "vocabulary.json").read_text())["words"]
    BUILD.mkdir(parents=True, exist_ok=True)
    tokenizer.WORDS.write_text(json.dumps(words))
    tokenizer.save(CLIPTokenizer.from_pretrained(BACKEND / "tokenizer"))
    vae = AutoencoderKL.from_pretrained(BACKEND / "vae")
    save("vae", vae)
    SCALING.write_text(json.dumps({"scaling_factor": vae.config.scaling_factor}))
    save("denoiser", UNet2DConditionModel.from_pretrained(BACKEND / "unet"))
    save("clip", CLIPModel.from_pretrained(REWARDS / "clip"))
    # What the two rewards go on from: they begin again if this CLIP is trained further.
    clip = weights("clip")
    tower = {k.removeprefix("vision_model."): v for k, v in clip.items() if k.startswith("vision_model.")}
    preference = CLIPModel.from_pretrained(REWARDS / "preference")
    keep("preference", preference.state_dict(), digest(clip))
    aesthetic = CLIPVisionModelWithProjection.from_pretrained(REWARDS / "aesthetic")
    keep("aesthetic", aesthetic.state_dict(), digest(tower))
    probe = nn.Module()
    probe.clip = CLIPModel.from_pretrained(REWARDS / "clip")
    save("clip-probe", probe)
    keep("judge", load_file(REWARDS / "judge.safetensors"))


def _half(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.half().cpu().contiguous() for name, tensor in module.state_dict().items()}


def export_rewards(folder: Path) -> None:
    """The two CLIPs, the aesthetic tower, and the judge with the artwork that it compares with."""
    for name in ("clip", "preference"):
        model, tokens = load_clip(newest(name))
        model.half().save_pretrained(folder / name)
        if name == "clip":
            tokens.save_pretrained(folder / name)
    trained(newest("aesthetic"), parts.aesthetic()).half().save_pretrained(folder / "aesthetic")
    judge = trained("judge", Network(JUDGE_SIZES))
    save_file(_half(judge), folder / "judge.safetensors")
    shutil.copy(sprites.sheet(), folder / "artwork.png")
    labels = {
        "sizes": JUDGE_SIZES,
        **{k: vocabulary()[k] for k in ("objects", "colours", "styles", "relations")},
    }
    (folder / "judge.json").write_text(json.dumps(labels, indent=1) + "\n")


def export() -> None:
    """Everything, into the package: what is there is replaced once all of it is written."""
    made = BUILD / "package"
    shutil.rmtree(made, ignore_errors=True)
    backend, rewards = made / "backend", made / "rewards"
    pipeline().to(dtype=torch.float16).save_pretrained(backend, safe_serialization=True)
    # The files are half as large so; who opens them without a format gets float32 of all parts, as the others are by
    # default.
    config = backend / "text_encoder/config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    (backend / "vocabulary.json").write_text(json.dumps(vocabulary(), indent=1) + "\n")
    export_rewards(rewards)
    places = {backend: BACKEND, **{each: REWARDS / each.name for each in rewards.iterdir()}}
    for new, place in places.items():
        if place.is_dir():
            shutil.rmtree(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(new, place)
