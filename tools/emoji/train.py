"""Train the bundled model from nothing, stage by stage: `python -m tools.emoji.train all`.

Every stage resumes from its checkpoint in `build/emoji/checkpoints`; figures are logged to `build/emoji/logs`.
One that is done, or was restored from the package, is trained further by name: `... denoiser --steps 3000 --lr 4e-4`.
"""

import argparse
import json
from dataclasses import replace

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from tools.emoji import clip, data, export, parts, scorers, sprites, tokenizer, world
from tools.emoji.loop import DEVICE, Schedule, mixed, save, train, trained
from tools.emoji.networks import as_bytes, load_clip, pixels
from tools.emoji.sprites import BUILD

SCHEDULES = {
    "vae": Schedule(steps=4_500, batch=8, lr=1.5e-3, ema=0.995),
    "decoder": Schedule(steps=14_000, batch=16, lr=1e-3, warmup=150, ema=0.999),
    "denoiser": Schedule(steps=16_000, batch=64, lr=6e-4, warmup=150, ema=0.998),
}
PAIRS = 0.6  # share of scenes with two objects: they take the longest to learn

LATENTS = BUILD / "latents.npy"


def _edges(images: Tensor) -> tuple[Tensor, Tensor]:
    return images.diff(dim=-1), images.diff(dim=-2)


def _difference(y: Tensor, x: Tensor) -> tuple[Tensor, dict[str, float]]:
    """L1 of pixels and of their differences, which keeps edges crisp; and what the log shows."""
    l1 = (y - x).abs().mean()
    edge = sum((a - b).abs().mean() for a, b in zip(_edges(y), _edges(x), strict=True))
    psnr = -10 * torch.log10(((y.detach() - x) / 2).square().mean())
    return l1 + 0.5 * edge, {"l1": l1.item(), "psnr": psnr.item()}


def train_vae() -> None:
    """To draw pictures again from latents, with a very small KL weight, as usual for latents."""
    images, _ = data.load("train")
    vae = parts.vae()

    def loss(rng: np.random.Generator, batch: int) -> tuple[Tensor, dict[str, float]]:
        x = pixels(images[np.sort(rng.integers(len(images), size=batch))])
        with mixed():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        kl = posterior.kl().float().mean() / parts.LATENT_CHANNELS / parts.LATENT_SIZE**2
        value, figures = _difference(y.float(), x)
        return value + 1e-5 * kl, figures | {"kl": kl.item()}

    train("vae", vae, loss, SCHEDULES["vae"])


def train_decoder() -> None:
    """The VAE's decoder alone, further: latents stay as they are, so the denoiser need not learn anew.

    Mostly clean pictures, and half of the latents a little wrong, as a denoiser's are: what it gets slightly wrong
    should not show.
    """
    images, scenes = data.load("train")
    latents = np.load(LATENTS, mmap_mode="r")
    spread = float(np.asarray(latents[:10_000], np.float32).std())
    clean = data.clean_rows(scenes)
    vae = trained("vae", parts.vae())
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)

    def loss(rng: np.random.Generator, batch: int) -> tuple[Tensor, dict[str, float]]:
        quarter = batch // 4
        any_kind = rng.integers(len(images), size=quarter)
        rows = np.sort(np.concatenate([any_kind, rng.choice(clean, batch - quarter)]))
        z = torch.from_numpy(np.asarray(latents[rows], np.float32)).to(DEVICE)
        wrong = rng.uniform(0, 0.2, (batch, 1, 1, 1)) * (rng.random((batch, 1, 1, 1)) < 0.5) * spread
        z = z + torch.from_numpy(wrong.astype(np.float32)).to(DEVICE) * torch.randn_like(z)
        with mixed():
            y = vae.decode(z).sample
        return _difference(y.float(), pixels(images[rows]))

    train("decoder", vae, loss, SCHEDULES["decoder"])
    save("vae", vae)


@torch.no_grad()
def build_latents() -> None:
    """Encode every training scene once: float16 (N, 4, 16, 16), and the scaling factor that normalises them beside it.

    Some are decoded again, with a little noise on their latents: the scorers see what a generator's pictures are like.
    """
    images, _ = data.load("train")
    vae = trained("vae", parts.vae()).to(memory_format=torch.channels_last)  # on a CPU a quarter faster
    latents = np.lib.format.open_memmap(
        LATENTS, "w+", np.float16, (len(images), parts.LATENT_CHANNELS, parts.LATENT_SIZE, parts.LATENT_SIZE)
    )
    decoded = np.lib.format.open_memmap(data.DECODED, "w+", np.uint8, (data.NUM_DECODED, *images.shape[1:]))
    noise = torch.Generator().manual_seed(99)
    for start in range(0, len(images), 250):
        rows = slice(start, start + 250)
        with mixed():
            mode = vae.encode(pixels(images[rows])).latent_dist.mode().float()
            latents[rows] = mode.cpu().numpy()
            if start < data.NUM_DECODED:
                amount = 0.2 * torch.rand(len(mode), 1, 1, 1, generator=noise) * mode.std().cpu()
                extra = (amount * torch.randn(mode.shape, generator=noise)).to(DEVICE)
                decoded[rows] = as_bytes(vae.decode(mode + extra).sample.float())
    decoded.flush()
    scale = float(1 / np.asarray(latents[:10_000], np.float32).std())
    LATENTS.with_suffix(".json").write_text(json.dumps({"scaling_factor": round(scale, 5)}))


# --------------------------------------------------------------------------------------------------- denoiser


def train_denoiser() -> None:
    """v-prediction at stratified timesteps, on mostly two objects; a tenth of the captions empty, for guidance.

    Captions mostly admit that a picture is spoilt, or words such as "blurry" would be too rare to be learned.
    """
    _, scenes = data.load("train")
    latents = np.load(LATENTS, mmap_mode="r")
    scale = json.loads(LATENTS.with_suffix(".json").read_text())["scaling_factor"]
    model, tokens = load_clip()
    encoder, unet, noising = model.text_model, parts.denoiser(), parts.scheduler()
    if DEVICE.type == "cpu":
        unet.set_attn_processor(
            AttnProcessor()
        )  # the fused kernel's backward pass is slower there by a third
    levels = noising.config.num_train_timesteps
    double = np.array([len(scene.objects) == 2 for scene in scenes])
    single, pairs = np.flatnonzero(~double), np.flatnonzero(double)

    def loss(rng: np.random.Generator, batch: int) -> tuple[Tensor, dict[str, float]]:
        most = round(PAIRS * batch)
        rows = np.sort(np.concatenate([rng.choice(single, batch - most), rng.choice(pairs, most)]))
        texts = ["" if rng.random() < 0.1 else world.caption(rng, scenes[i], admits=0.8)[0] for i in rows]
        ids = tokens(texts, padding="max_length", return_tensors="pt").input_ids.to(DEVICE)
        x = torch.from_numpy(np.asarray(latents[rows], np.float32)).to(DEVICE) * scale
        noise = torch.randn_like(x)
        t = torch.from_numpy((rng.permutation(batch) + rng.random(batch)) / batch * levels).long().to(DEVICE)
        with mixed():
            with torch.no_grad():
                states = encoder(ids).last_hidden_state
            predicted = unet(noising.add_noise(x, noise, t), t, states).sample
        error = (predicted.float() - noising.get_velocity(x, noise, t)).square().mean(dim=(1, 2, 3))
        late, early = error[t < levels // 2].mean().item(), error[t >= levels // 2].mean().item()
        return error.mean(), {"late": late, "early": early}

    train("denoiser", unet, loss, SCHEDULES["denoiser"])


STAGES = {
    "sprites": sprites.build,
    "data": data.build_all,
    "tokenizer": tokenizer.build,
    "vae": train_vae,
    "latents": build_latents,
    "decoder": train_decoder,
    "clip": clip.train_clip,
    "harden": clip.harden,
    "judge": scorers.train_judge,
    "aesthetic": scorers.train_aesthetic,
    "preference": scorers.train_preference,
    "denoiser": train_denoiser,
    "export": export.export,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "stage", choices=[*STAGES, "all", "restore"], help="restore: start from the package's weights"
    )
    parser.add_argument("--steps", type=int, help="another length than the stage's own")
    parser.add_argument("--lr", type=float, help="another learning rate")
    options = parser.parse_args()
    stage, changes = options.stage, {key: getattr(options, key) for key in ("steps", "lr")}
    for table in (SCHEDULES, clip.SCHEDULES, scorers.SCHEDULES):
        if stage in table:
            table[stage] = replace(table[stage], **{key: value for key, value in changes.items() if value})
    if stage == "restore":
        export.restore()
    else:
        for name in STAGES if stage == "all" else [stage]:
            STAGES[name]()
