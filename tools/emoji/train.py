"""Train the bundled model from nothing, stage by stage: `python -m tools.emoji.train all`.

A stage that trains resumes from its checkpoint in `build/emoji/checkpoints`; figures are logged to `build/emoji/logs`.
The others begin again if they were stopped, and `all` does none again that is done, by name or by `all`, unless what it
builds on has changed. One that trains and is done, or was restored from the package, is trained further by name with a
schedule: `... denoiser --steps 3000 --lr 4e-4`.
"""

import argparse
import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTokenizer

from tools.emoji import arguments, clip, data, export, follow, parts, redraw, scorers, sprites, tokenizer
from tools.emoji.loop import DEVICE, Figures, Loss, Schedule, digest, mixed, renew, train, trained, weights
from tools.emoji.networks import SCALING, as_bytes, load_clip, pixels
from tools.emoji.sprites import BUILD, replacing

SCHEDULES = {
    "vae": Schedule(steps=14_000, batch=16, lr=1.2e-3, ema=0.998),
    "denoiser": Schedule(steps=24_000, batch=64, lr=6e-4, warmup=150, ema=0.998),
}
if DEVICE.type == "cuda":  # three and a half times the samples, in eight minutes on an H100
    SCHEDULES["denoiser"] = Schedule(steps=7_000, batch=768, lr=1.2e-3, warmup=150, ema=0.998)
PAIRS = 0.6  # share of scenes with two objects: they take the longest to learn
# Given token ids (B, 77): what the UNet is told of the texts, by argument.
Reading = Callable[[np.random.Generator, Tensor], dict[str, Any]]

LATENTS = BUILD / "latents.npy"


def _edges(images: Tensor) -> tuple[Tensor, Tensor]:
    return images.diff(dim=-1), images.diff(dim=-2)


def _difference(y: Tensor, x: Tensor) -> tuple[Tensor, Figures]:
    """What the VAE minimises, and what the log shows.

    L1 of pixels; that of their differences keeps edges crisp, and squares keep small parts, which L1 soon gives up.
    """
    l1, square = (y - x).abs().mean(), (y - x).square().mean()
    edge = sum((a - b).abs().mean() for a, b in zip(_edges(y), _edges(x), strict=True))
    psnr = -10 * torch.log10(square.detach() / 4)
    return l1 + 0.5 * edge + 5 * square, {"l1": l1, "psnr": psnr}


def train_vae() -> None:
    """To draw pictures again from latents, with a very small KL weight, as usual for latents.

    Mostly clean pictures, half of them of two objects, which are small and want every detail. Half of the latents are a
    little wrong, as a denoiser's are: what it gets slightly wrong should not show. Latents of half the size must give
    the picture of half the size (EQ-VAE, arXiv 2502.09509), or they become rough, and hard to learn for a denoiser.
    """
    images, scenes = data.load("train")
    single, double = data.clean_kinds(scenes)
    vae = parts.vae().to(memory_format=torch.channels_last)  # on a CPU a tenth faster

    def loss(rng: np.random.Generator, batch: int) -> tuple[Tensor, Figures]:
        quarter = batch // 4
        kinds = np.arange(len(images)), single, double, double
        rows = np.sort(np.concatenate([rng.choice(each, quarter) for each in kinds]))
        wrong = torch.from_numpy(rng.uniform(-0.2, 0.2, (len(rows), 1, 1, 1)).astype(np.float32)).clamp_min(0)
        x = pixels(images[rows])
        with mixed():
            posterior = vae.encode(x).latent_dist
            z = posterior.sample()
            z = z + wrong.to(DEVICE) * posterior.mean.detach().float().std() * torch.randn_like(z)
            y = vae.decode(z).sample
            small = vae.decode(F.avg_pool2d(z[::2], 2)).sample
        kl = posterior.kl().float().mean() / parts.LATENT_CHANNELS / parts.LATENT_SIZE**2
        value, figures = _difference(y.float(), x)
        coarse = (small.float() - F.avg_pool2d(x[::2], 2)).abs().mean()
        return value + 0.5 * coarse + 1e-5 * kl, figures | {"kl": kl, "coarse": coarse}

    train("vae", vae, loss, SCHEDULES["vae"])


@torch.no_grad()
def build_latents() -> None:
    """Encode every training scene once: float16 (N, 4, 16, 16), and the scaling factor that normalises them beside it.

    Some are decoded again, with a little noise on their latents: the scorers see what a generator's pictures are like.
    """
    images, _ = data.load("train")
    vae = trained("vae", parts.vae()).to(memory_format=torch.channels_last)  # on a CPU a quarter faster
    count = data.num_decoded(len(images))
    size = parts.LATENT_CHANNELS, parts.LATENT_SIZE, parts.LATENT_SIZE
    noise = torch.Generator().manual_seed(99)
    with replacing(LATENTS) as encodings, replacing(data.DECODED) as pictures:
        latents = np.lib.format.open_memmap(encodings, "w+", np.float16, (len(images), *size))
        decoded = np.lib.format.open_memmap(pictures, "w+", np.uint8, (count, *images.shape[1:]))
        for start in range(0, len(images), 250):
            rows = slice(start, start + 250)
            with mixed():
                mode = vae.encode(pixels(images[rows])).latent_dist.mode().float()
                latents[rows] = mode.cpu().numpy()
                if start < count:
                    amount = 0.2 * torch.rand(len(mode), 1, 1, 1, generator=noise) * mode.std().cpu()
                    extra = (amount * torch.randn(mode.shape, generator=noise)).to(DEVICE)
                    decoded[rows] = as_bytes(vae.decode(mode + extra).sample.float())
        latents.flush()
        decoded.flush()
    scale = float(1 / np.asarray(latents[:10_000], np.float32).std())
    SCALING.write_text(json.dumps({"scaling_factor": round(scale, 5)}))


# --------------------------------------------------------------------------------------------------- denoiser


def denoising(unet: UNet2DConditionModel, tokens: CLIPTokenizer, read: Reading) -> Loss:
    """The error of v-prediction at stratified timesteps, on mostly two objects; a tenth of the captions are empty, for
    guidance.
    """
    _, scenes = data.load("train")
    latents, captions = (torch.from_numpy(np.load(path)).to(DEVICE) for path in (LATENTS, tokenizer.CAPTIONS))
    for path, rows in ((LATENTS, latents), (tokenizer.CAPTIONS, captions)):
        if len(rows) != len(scenes):
            raise SystemExit(
                f"{path} has {len(rows)} rows and {data.SCENES} {len(scenes)} scenes, which must be as many: run the "
                f"stage {path.stem!r} again"
            )
    scale = json.loads(SCALING.read_text())["scaling_factor"]
    empty = tokens("", padding="max_length", return_tensors="pt").input_ids.to(DEVICE)
    noising = parts.scheduler()
    if DEVICE.type == "cpu":
        # The fused kernel's backward pass is slower there by a third.
        unet.set_attn_processor(AttnProcessor())
    else:
        unet.to(memory_format=torch.channels_last)
        torch.backends.cudnn.benchmark = True
    levels = noising.config.num_train_timesteps
    noising.alphas_cumprod = noising.alphas_cumprod.to(DEVICE)
    double = np.array([len(scene.objects) == 2 for scene in scenes])
    single, pairs = np.flatnonzero(~double), np.flatnonzero(double)

    def on_device(numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(DEVICE, non_blocking=True)

    def loss(rng: np.random.Generator, batch: int) -> tuple[Tensor, Figures]:
        most = round(PAIRS * batch)
        rows = np.concatenate([rng.choice(single, batch - most), rng.choice(pairs, most)])
        chosen, said = on_device(rows), on_device(rng.integers(tokenizer.PER_SCENE, size=batch))
        silent = on_device(rng.random(batch) < 0.1)[:, None]
        ids = torch.where(silent, empty, captions[chosen, said].long())
        x = latents[chosen].float() * scale
        noise = torch.randn_like(x)
        t = on_device((rng.permutation(batch) + rng.random(batch)) / batch * levels).long()
        with mixed():
            with torch.no_grad():
                conditions = read(rng, ids)
            predicted = unet(noising.add_noise(x, noise, t), t, **conditions).sample
        error = (predicted.float() - noising.get_velocity(x, noise, t)).square().mean(dim=(1, 2, 3))
        late = t < levels // 2
        figures = {"late": (error * late).sum() / late.sum(), "early": (error * ~late).sum() / (~late).sum()}
        return error.mean(), figures

    return loss


def train_denoiser() -> None:
    """The UNet, which attends to the last states of CLIP's text tower."""
    model, tokens = load_clip()
    learns_from = f"{digest(weights('vae'))} {digest(model.text_model.state_dict())}"
    unet = parts.denoiser()

    def read(rng: np.random.Generator, ids: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": model.text_model(ids).last_hidden_state}

    loss = denoising(unet, tokens, read)
    train("denoiser", unet, loss, SCHEDULES["denoiser"], learns_from=learns_from)


STAGES = {
    "sprites": sprites.build,
    "data": data.build_all,
    "tokenizer": tokenizer.build,
    "captions": tokenizer.build_captions,
    "vae": train_vae,
    "latents": build_latents,
    "clip": clip.train_clip,
    "harden": clip.harden,
    "judge": scorers.train_judge,
    "denoiser": train_denoiser,
    "redraw": redraw.build,
    "aesthetic": scorers.train_aesthetic,
    "preference": scorers.train_preference,
    "follow": follow.build,
    "resist": scorers.resist,
    "export": export.export,
}

# What stages make that have no checkpoint: the file to look for, and the parts and files that it is made from. `all`
# makes it again when one of these has changed.
TOKENS = tokenizer.FOLDER / "tokenizer.json"
MADE: dict[str, tuple[Path, tuple[str | Path, ...]]] = {
    "sprites": (sprites.LAST, ()),
    "data": (data.SPOILT, ()),
    "tokenizer": (TOKENS, ()),
    "captions": (tokenizer.CAPTIONS, (data.SCENES, TOKENS)),
    "latents": (LATENTS, (data.SCENES, "vae")),
    "redraw": (redraw.TEXTS, (data.SCENES, "vae", "clip", "denoiser")),
    "follow": (follow.path(follow.REWARDS[-1], 0), ("vae", "clip", "denoiser", "aesthetic", "preference")),
}
CHECKPOINTS = {"clip": "clip-probe", "harden": "clip-hard"}  # where they are not called as the stage


def _mark(stage: str) -> Path:
    """Says what a stage's files were made from."""
    return BUILD / "made" / stage


def _sources(stage: str) -> str:
    """The digests of what a stage's files are made from."""
    return " ".join(
        digest(weights(each)) if isinstance(each, str) else hashlib.sha256(each.read_bytes()).hexdigest()
        for each in MADE[stage][1]
    )


def is_made(stage: str) -> bool:
    """Has a stage made its files from what there is now? One that is made from nothing, wherever they come from."""
    path, sources = MADE[stage]
    mark = _mark(stage)
    return path.exists() and (not sources or (mark.exists() and mark.read_text() == _sources(stage)))


def run(stage: str) -> None:
    """One stage, from a seed of its own: new parts begin at random."""
    mark = _mark(stage)
    mark.unlink(missing_ok=True)  # so that a stage that is stopped while it writes is not taken for done
    torch.manual_seed(zlib.crc32(stage.encode()))
    STAGES[stage]()
    if stage in MADE and MADE[stage][1]:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(_sources(stage))


def train_all() -> None:
    """Every stage that is not done, in order."""
    for stage in STAGES:
        if stage not in MADE or not is_made(stage):
            print(stage, flush=True)
            run(stage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "stage", choices=[*STAGES, "all", "restore"], help="restore: start from the package's weights"
    )
    parser.add_argument("--steps", type=arguments.count, help="another length than the stage's own")
    parser.add_argument("--seconds", type=arguments.amount, help="or a length in time")
    parser.add_argument("--lr", type=arguments.amount, help="another learning rate")
    parser.add_argument("--batch", type=arguments.count, help="another number of samples a step")
    options = parser.parse_args()
    stage = options.stage
    changes = {key: getattr(options, key) for key in ("steps", "seconds", "lr", "batch")}
    changes = {key: value for key, value in changes.items() if value is not None}
    tables = [table for table in (SCHEDULES, clip.SCHEDULES, scorers.SCHEDULES) if stage in table]
    if changes and not tables:
        parser.error(
            f"{', '.join(f'--{key}' for key in changes)}: stage {stage!r} has no schedule of its own"
        )
    for table in tables:
        table[stage] = replace(table[stage], **changes)
    if changes:
        renew(CHECKPOINTS.get(stage, stage))
    if stage == "restore":
        export.restore()
    elif stage == "all":
        train_all()
    else:
        run(stage)


if __name__ == "__main__":
    main()
