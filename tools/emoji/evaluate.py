"""Print what the shipped weights can do: `python -m tools.emoji.evaluate --count 500`.

Reads the package's own files through stock diffusers and transformers classes, on scenes that no training ever saw.
"""

import argparse
import itertools
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import spearmanr
from torch import Tensor

from ipgo import Reward
from ipgo.backends.world import GUIDANCE
from ipgo.images import to_pil
from ipgo.prompts import read_prompts
from ipgo.rewards import uses_prompts
from ipgo.rewards.clip import ClipReward, embed
from ipgo.rewards.emoji import Judge, load_aesthetic, load_clip, load_judge, load_preference
from tools.emoji import arguments, scorers, sprites, world
from tools.emoji.export import BACKEND, PACKAGE

STEPS = 20
BATCH = 50
FEWEST = 10  # captions: with fewer some figures have nothing to compare


def unit(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


def generate(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Tensor:
    """One image per prompt, each from a seed of its own."""
    images = []
    for start in range(0, len(prompts), BATCH):
        part = list(prompts[start : start + BATCH])
        noise = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        images.append(
            pipe(
                part, num_inference_steps=steps, guidance_scale=guidance, generator=noise, output_type="pt"
            ).images
        )
    return torch.cat(images)


def judged(judge: Judge, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Share of right objects, colours, styles, relations, where the prompts name them."""
    return {key: value.nanmean().item() for key, value in judge.marks(images, prompts).items()}


def test_scenes(count: int, objects: int, seed: int) -> list[world.Scene]:
    """Clean held-out scenes with captions of their own. There are 255 of one object: more than that begin again."""
    rng = np.random.default_rng(seed)
    found: dict[str, world.Scene] = {}
    for _ in range(20 * count):
        scene = world.sample_scene(rng, split="test", count=objects, clean=True)
        found.setdefault(world.plain_caption(scene), scene)
        if len(found) == count:
            break
    return list(itertools.islice(itertools.cycle(found.values()), count))


def drawn(scenes: Sequence[world.Scene], seed: int = 7) -> Tensor:
    """The scenes as pictures, (B, 3, 64, 64) in [0, 1]."""
    rng, art = np.random.default_rng(seed), sprites.load()
    return unit(np.stack([world.draw(rng, scene, art) for scene in scenes]))


def decoded(pipe: StableDiffusionPipeline, images: Tensor) -> Tensor:
    """Pictures in [0, 1] through the VAE and back."""
    again = pipe.vae.decode(pipe.vae.encode(images * 2 - 1).latent_dist.mode()).sample
    return (again / 2 + 0.5).clamp(0, 1)


def generator_figures(pipe: StableDiffusionPipeline, judge: Judge, count: int) -> dict[str, object]:
    """What the judge sees in generated images, how rewards follow its verdicts, and whether quality words work."""
    figures: dict[str, object] = {}
    everything: list[tuple[Tensor, list[str]]] = []
    for objects, name in ((1, "one object"), (2, "two objects")):
        prompts = [world.plain_caption(scene) for scene in test_scenes(count, objects, seed=objects)]
        images = generate(pipe, prompts)
        everything.append((images, prompts))
        figures[name] = {"captions": len(set(prompts)), **judged(judge, images, prompts)}
    right = torch.cat([judge.accuracy(*each)["object"] == 1 for each in everything])
    figures["judged wrong, images"] = (~right).sum().item()
    for reward in (load_clip(), load_preference(), load_aesthetic()):
        scores = torch.cat([reward(*each) for each in everything])
        figures[f"{reward.name}, judged right above judged wrong"] = above(scores[right], scores[~right])
    prompts = list(synonyms())
    figures["synonyms"] = judged(judge, generate(pipe, prompts), prompts)["object"]
    prompts = [world.plain_caption(scene) for scene in test_scenes(min(count, 100), 1, seed=3)]
    quality = load_aesthetic()
    plain = quality(generate(pipe, prompts), prompts)
    for words in ("high quality, sharp", "blurry"):
        gain = quality(generate(pipe, [f"{p}, {words}" for p in prompts]), prompts) - plain
        figures[f'"{words}" adds'] = [gain.mean().item(), 1.96 * gain.std().item() / len(gain) ** 0.5]
    return figures


def synonyms() -> Iterator[str]:
    """Each object by each other word for it, on a background and in a style that it was never trained on."""
    scenes = test_scenes(500, 1, seed=4)
    for name, (_, words) in world.OBJECTS.items():
        scene = next((scene for scene in scenes if scene.objects == (name,)), None)
        for word in words if scene else ():
            yield world.plain_caption(scene).replace(world.article(name), world.article(word), 1)


def generated_figures(pipe: StableDiffusionPipeline, count: int) -> dict[str, object]:
    """The rewards on the generator's own pictures.

    Shares of pictures that score higher with their own prompt than with another object's (where the reward reads it),
    higher than when they are spoilt, and lower than artwork of the same scene through the VAE, which tells the rewards
    what is still to be had; how well scores of spoilt pictures are in the order of how much they are spoilt; and
    retrieval among the prompts.
    """
    scenes = test_scenes(count, 1, seed=5)
    prompts = [world.plain_caption(scene) for scene in scenes]
    images = generate(pipe, prompts)
    others = []  # to each prompt the next one that names another object
    for i, own in enumerate(scenes):
        turned = zip(scenes[i:] + scenes[:i], prompts[i:] + prompts[:i], strict=True)
        others.append(next(prompt for scene, prompt in turned if scene.objects != own.objects))
    rng = np.random.default_rng(6)
    strengths = rng.uniform(0.3, 1, count).tolist()
    spoilt = np.stack(
        [
            np.asarray(world.degrade(rng, picture, str(rng.choice(list(world.DEGRADATIONS))), strength))
            for picture, strength in zip(to_pil(images), strengths, strict=True)
        ]
    )
    pairs = test_scenes(count, 2, seed=6)
    pair_prompts = [world.plain_caption(scene) for scene in pairs]
    pair_images = generate(pipe, pair_prompts)
    artwork, pair_artwork = (decoded(pipe, drawn(each)) for each in (scenes, pairs))
    clip, preference, aesthetic = load_clip(), load_preference(), load_aesthetic()
    figures: dict[str, object] = {}
    for reward in (clip, preference, aesthetic):
        scores = reward(images, prompts)
        own = {}
        if uses_prompts(reward):
            own["own prompt above another's"] = (scores > reward(images, others)).float().mean().item()
        higher = reward(pair_artwork, pair_prompts) > reward(pair_images, pair_prompts)
        below = reward(unit(spoilt), prompts)
        figures[reward.name] = {
            **own,
            "above its spoilt copy": (scores > below).float().mean().item(),
            "Spearman with the quality of spoilt copies": -float(spearmanr(below, strengths).statistic),
            "below the artwork, one object": (reward(artwork, prompts) > scores).float().mean().item(),
            "below the artwork, two objects": higher.float().mean().item(),
        }
    for each in (clip, preference):
        figures[f"{each.name}, retrieval among {count}"] = retrieved(each, images, prompts)
    return figures


def above(high: Tensor, low: Tensor) -> float:
    """The share of pairs in which the first is greater; NaN without pairs."""
    return (high[:, None] > low[None]).float().mean().item()


def judged_sheet(judge: Judge, images: Tensor, prompts: Sequence[str], columns: int = 10) -> Image.Image:
    """The pictures at twice their size, each with its prompt and with what the judge sees in it."""
    cell, line, lines = 2 * world.SIZE + 16, 12, 3
    height = 2 * world.SIZE + 2 * lines * line + 12
    sheet = Image.new("RGB", (columns * cell, -(-len(prompts) // columns) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    marks = judge.accuracy(images, prompts)["object"]
    rows = zip(to_pil(images), prompts, judge.verdict(images), marks, strict=True)
    for number, (picture, prompt, seen, right) in enumerate(rows):
        x, y = number % columns * cell + 8, number // columns * height + 4
        sheet.paste(picture.resize((2 * world.SIZE, 2 * world.SIZE), Image.Resampling.NEAREST), (x, y))
        verdict = f"sees {' and '.join(seen.objects)}, {seen.colour}, {seen.style}"
        below = [(text, "black") for text in textwrap.wrap(prompt, 26)[:lines]]
        below += [(text, "green" if right == 1 else "red") for text in textwrap.wrap(verdict, 26)[:lines]]
        for place, (text, colour) in enumerate(below):
            pen.text((x, y + 2 * world.SIZE + 1 + place * line), text, colour, font)
    return sheet


def text_figures(pipe: StableDiffusionPipeline, count: int = 4_000) -> dict[str, float]:
    """Can both objects of a held-out pair, in reading order, be read off the text's last state by a linear map?

    Least squares on training captions. What is not linear there, the denoiser finds hard to learn.
    """
    found = []
    for split, number in (("train", count), ("test", count // 4)):
        rng = np.random.default_rng(41)
        scenes = [world.sample_scene(rng, split=split, count=2, clean=True) for _ in range(number)]
        states = []
        for start in range(0, number, 250):
            texts = [world.plain_caption(scene) for scene in scenes[start : start + 250]]
            ids = pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
            states.append(pipe.text_encoder(ids).last_hidden_state[:, -1].float())
        facts = torch.tensor([world.facts(scene)[1:3] for scene in scenes])
        found.append((torch.cat([torch.cat(states), torch.ones(number, 1)], dim=1), facts))
    (x, known), (y, wanted) = found
    right = []
    for place in range(2):
        targets = torch.nn.functional.one_hot(known[:, place], len(world.NAMES)).float()
        right.append((y @ torch.linalg.lstsq(x, targets).solution).argmax(1) == wanted[:, place])
    return {"both objects of a pair, linearly": torch.stack(right).all(0).float().mean().item()}


def vae_figures(pipe: StableDiffusionPipeline, count: int) -> dict[str, float]:
    """Reconstruction of held-out clean scenes, in dB: small objects are harder. And how smooth their latents are.

    That is the correlation of horizontal neighbours, mean over channels: rough latents are hard for a denoiser.
    """
    figures, latents = {}, []
    for objects, name in ((1, "one object"), (2, "two objects")):
        images = drawn(test_scenes(count, objects, 10 + objects))
        error = (decoded(pipe, images) - images).square().mean(dim=(1, 2, 3))
        figures[f"psnr, {name}"] = (-10 * error.log10()).mean().item()
        latents.append(pipe.vae.encode(images * 2 - 1).latent_dist.mode())
    z = torch.cat(latents)
    z = z - z.mean(dim=(0, 2, 3), keepdim=True)
    alike = (z[..., 1:] * z[..., :-1]).mean(dim=(0, 2, 3)) / z.square().mean(dim=(0, 2, 3))
    return {**figures, "correlation of neighbouring latents": alike.mean().item()}


def reward_figures(judge: Judge, count: int) -> dict[str, object]:
    """The rewards and the judge on held-out drawn scenes."""
    clip, preference, aesthetic = load_clip(), load_preference(), load_aesthetic()
    clean = test_scenes(count, 1, 21) + test_scenes(count // 2, 2, 22)
    rng = np.random.default_rng(23)
    spoilt = [world.spoilt(rng, scene) for scene in clean]
    prompts = [world.plain_caption(scene) for scene in clean]
    pictures, spoilt_pictures = drawn(clean), drawn(spoilt)
    both = torch.cat([pictures, spoilt_pictures])
    quality = [s.quality for s in clean + spoilt]
    order = {
        reward.name: (reward(pictures, prompts) > reward(spoilt_pictures, prompts)).float().mean().item()
        for reward in (clip, aesthetic, preference)
    }
    graded = aesthetic(both, prompts * 2).numpy()
    ranks = {"of all": float(spearmanr(graded, quality).statistic)}
    bad, clear = graded[len(clean) :], np.array([scene.quality for scene in spoilt])
    for kind in (None, *world.DEGRADATIONS):
        these = np.array([kind in (None, scene.degradation) for scene in spoilt])
        ranks[f"of {kind or 'the spoilt'}"] = float(spearmanr(bad[these], clear[these]).statistic)
    return {
        "judge on clean scenes": judged(judge, pictures, prompts),
        "clean above degraded": order,
        "preference above altered": altered_figures(preference, clean, pictures, prompts),
        "aesthetic, Spearman with quality": ranks,
        "aesthetic of clean scenes, quartiles": np.quantile(graded[: len(clean)], (0.25, 0.5, 0.75)).tolist(),
        "retrieval among 500": {r.name: retrieval(r) for r in (clip, preference)},
    }


def altered_figures(
    reward: Reward, scenes: Sequence[world.Scene], pictures: Tensor, prompts: Sequence[str]
) -> dict[str, float]:
    """The shares of scenes that score above one with a claimed fact made false, by the fact."""
    rng = np.random.default_rng(24)
    figures = {}
    for objects, name in ((1, "one object"), (2, "two objects")):
        rows = [row for row, scene in enumerate(scenes) if len(scene.objects) == objects]
        own = reward(pictures[rows], [prompts[row] for row in rows])
        for change in ("object", "colour", "style", *(["swap"] if objects == 2 else [])):
            others = drawn([scorers.altered(rng, scenes[row], change) for row in rows])
            wrong = reward(others, [prompts[row] for row in rows])
            figures[f"{change}, {name}"] = (own > wrong).float().mean().item()
    return figures


def retrieval(reward: ClipReward, count: int = 500) -> list[float]:
    """Top-1 image to text and text to image among scenes with distinct captions."""
    scenes = {
        world.plain_caption(scene): scene for scene in test_scenes(count, 1, 31) + test_scenes(count, 2, 32)
    }
    texts = list(scenes)[:: max(1, len(scenes) // count)][:count]
    return retrieved(reward, drawn([scenes[text] for text in texts]), texts)


def retrieved(reward: ClipReward, images: Tensor, texts: Sequence[str]) -> list[float]:
    """Top-1 image to text and text to image."""
    scores = embed(reward.model, reward.preprocessing, images) @ reward.text(texts).T
    right = torch.arange(len(texts))
    return [(scores.argmax(d) == right).float().mean().item() for d in (1, 0)]


def speed_figures(pipe: StableDiffusionPipeline) -> dict[str, float]:
    """Seconds on two cores of this machine, megabytes of weights, and what half precision changes.

    Loading is that of all weights, by a process that has imported what it needs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    start = time.perf_counter()
    StableDiffusionPipeline.from_pretrained(BACKEND, dtype=torch.float32)
    for load in (load_clip, load_preference, load_aesthetic, load_judge):
        load()
    seconds = {"seconds to load": time.perf_counter() - start}
    for batch in (1, 8):
        generate(pipe, ["a fox"] * batch, steps=2)
        start = time.perf_counter()
        generate(pipe, ["a fox"] * batch)
        seconds[f"seconds for {batch}"] = time.perf_counter() - start
    torch.set_num_threads(threads)
    size = sum(path.stat().st_size for path in Path(PACKAGE).rglob("*.safetensors"))
    half = StableDiffusionPipeline.from_pretrained(BACKEND, dtype=torch.float16)
    half.set_progress_bar_config(disable=True)
    prompts = [world.plain_caption(scene) for scene in test_scenes(8, 1, seed=1)]
    away = (generate(half, prompts).float() - generate(pipe, prompts)).abs().max().item()
    return {**seconds, "megabytes": size / 1e6, "fp16 and fp32 differ by, of 1": away}


def guidance_table(pipe: StableDiffusionPipeline, judge: Judge, scales: Sequence[float]) -> str:
    """Which guidance scale is the model's own? On the train halves of the prompt sets, one seed each."""
    prompts = [prompt for kind in ("one", "two", "styled") for prompt in read_prompts(f"{kind}:train")]
    rewards = (load_clip(), load_preference(), load_aesthetic())
    names = " | ".join(reward.name for reward in rewards)
    lines = [f"| guidance scale | object | colour | style | relation | {names} |", "|---" * 8 + "|"]
    for scale in scales:
        images = generate(pipe, prompts, guidance=scale)
        right = judged(judge, images, prompts)
        cells = [f"{right[key]:.1%}" for key in ("object", "colour", "style", "relation")]
        cells += [f"{reward(images, prompts).mean():.3f}" for reward in rewards]
        lines.append(f"| {scale:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rows(figures: object, name: str = "") -> list[str]:
    """Nested figures as the lines of a table."""
    if isinstance(figures, dict):
        return [
            line for key, value in figures.items() for line in rows(value, f"{name}, {key}" if name else key)
        ]
    values = figures if isinstance(figures, list) else [figures]
    return [f"| {name} | {', '.join(f'{value:.3g}' for value in values)} |"]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--count",
        type=arguments.count,
        default=500,
        help=f"held-out captions of each kind, at least {FEWEST}",
    )
    parser.add_argument("--out", type=Path, help="write the table there, under the command that made it")
    parser.add_argument(
        "--sheet", type=Path, help="also write 50 prompts of each kind, with what the judge sees"
    )
    parser.add_argument(
        "--guidance", type=float, nargs="+", help="compare these guidance scales, and nothing else"
    )
    options = parser.parse_args()
    if options.count < FEWEST:
        parser.error(f"--count {options.count}: must be at least {FEWEST}")
    for path in (options.out, options.sheet):
        if path and not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    if not options.guidance:
        try:
            sprites.load()  # held-out scenes are drawn
        except FileNotFoundError as error:
            parser.error(str(error))
    pipe = StableDiffusionPipeline.from_pretrained(BACKEND, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    judge = load_judge()
    if options.guidance:
        print(guidance_table(pipe, judge, options.guidance))
        return
    parts: dict[str, Callable[[], object]] = {
        "speed": lambda: speed_figures(pipe),
        "text encoder": lambda: text_figures(pipe),
        "vae": lambda: vae_figures(pipe, options.count),
        "rewards": lambda: reward_figures(judge, options.count),
        "generator": lambda: generator_figures(pipe, judge, options.count),
        "rewards on generated images": lambda: generated_figures(pipe, min(options.count, 100)),
    }
    lines = ["| figure | value |", "|---|---|"]
    print("\n".join(lines))
    for name, measured in parts.items():
        lines += (new := rows(measured(), name))
        print("\n".join(new), flush=True)
    table = "\n".join(lines)
    if options.out:
        options.out.write_text(f"`python -m tools.emoji.evaluate --count {options.count}`\n\n{table}\n")
    if options.sheet:
        scenes = test_scenes(50, 1, seed=1) + test_scenes(50, 2, seed=2)
        prompts = [world.plain_caption(scene) for scene in scenes]
        judged_sheet(judge, generate(pipe, prompts), prompts).save(options.sheet)


if __name__ == "__main__":
    main()
