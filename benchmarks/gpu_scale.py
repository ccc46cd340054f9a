"""Seconds and memory of a step at real size, on random weights; how far off the plan is; and the authors' loop.

    python benchmarks/gpu_scale.py --backends sd15 sdxl sd3 flux-dev --rewards clip hpsv2 --dtypes float16 bfloat16

Nothing is downloaded: models are built from their published configurations with random weights, which take the time
and the memory of trained ones. A line that would not fit is left out, by the plan's own word. The authors' loop is
written again from its description: one prompt, LMS in 50 steps, the orthonormal basis computed three times for each
embedding, a graph for all steps that is cut before the last two, autocast and a gradient scaler. It is timed for
Stable Diffusion alone, beside ipgo with the same scheduler, steps and K.

On a GPU peaks are those of torch's allocator; on a CPU, of the tensors that were alive. `--size tiny` runs the same
on small models.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

import ipgo
from ipgo.adapters import InsertionAdapter
from ipgo.backends import Backend
from ipgo.backends.blueprint import Blueprint, Part
from ipgo.backends.published import PUBLISHED
from ipgo.backends.unloaded import open_blueprint
from ipgo.memory import LiveMemory, new_sizes
from ipgo.plan import Choice, Footprint, Workload
from ipgo.rewards import Reward
from ipgo.rewards.unloaded import unloaded_reward
from ipgo.training import maximize

GIB = 2**30
WARM_UP = 2
COLUMNS = (
    "backend", "reward", "dtype", "loop", "T", "K", "recompute", "rows", "s a step", "s a step and prompt",
    "peak, GiB", "planned, GiB", "plan's error",
)  # fmt: skip

# -- small models of the same classes ------------------------------------------------------------------------

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "projection_dim": 32,
    "vocab_size": 100,
    "bos_token_id": 98,
    "eos_token_id": 99,
    "pad_token_id": 99,
}
SMALL = {
    "AutoencoderKL": {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "CLIPTextModel": _TEXT,
    "CLIPTextModelWithProjection": _TEXT,
    "T5EncoderModel": {
        "d_model": 64,
        "d_ff": 64,
        "d_kv": 8,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 100,
    },
}
_UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
_TRANSFORMER = {"num_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 64}
DENOISERS = {
    "sd15": {**_UNET, "cross_attention_dim": 32},
    "sdxl": {
        **_UNET,
        "cross_attention_dim": 64,
        "transformer_layers_per_block": (1, 1),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    },
    "sd3": {
        **_TRANSFORMER,
        "sample_size": 8,
        "attention_head_dim": 8,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 2 * 32,
        "pos_embed_max_size": 8,
    },
    "flux-dev": {
        **_TRANSFORMER,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
    },
}
SMALL_PIXELS = 16


def tiny(name: str) -> Blueprint:
    """The published blueprint with small numbers in it."""

    def small(key: str, part: Part) -> Part:
        numbers = DENOISERS[name] if key in ("unet", "transformer") else SMALL.get(part.kind, {})
        return replace(part, config={**part.config, **numbers})

    blueprint = PUBLISHED[name]
    return replace(blueprint, parts={key: small(key, part) for key, part in blueprint.parts.items()})


# -- the two loops -------------------------------------------------------------------------------------------


def our_steps(workload: Workload, choice: Choice, count: int, insertion: ipgo.Insertion) -> Iterator[None]:
    """A fit by ipgo, one step each time."""
    prompts = tuple(f"prompt {number}" for number in range(choice.rows))
    task = ipgo.Task(workload.backend, workload.reward, prompts, workload.sampling)
    ascent = ipgo.Ascent(steps=count, backprop_steps=choice.backprop_steps, recompute=choice.recompute)
    adapter = InsertionAdapter.start(
        workload.backend, prompts, insertion, seed=0, shared=False, sampling=workload.sampling
    )
    for _ in maximize(task, adapter, ascent):
        yield


class AuthorsSide(nn.Module):
    """Prefix or suffix of the released notebook: 10 embeddings from one orthonormal map with a bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        rank = min(300, width)
        self.map = orthogonal(nn.Linear(rank, width), orthogonal_map="householder")
        self.coefficients = nn.Parameter(torch.rand(10, rank) * 2 - 1)

    def forward(self) -> Tensor:
        rows = []
        for coefficients in self.coefficients:
            self.map.weight.data = F.normalize(self.map.weight.data, dim=-1)  # of a copy: it changes nothing
            rows.append(self.map(coefficients.clamp(-1, 1)))
        return torch.stack(rows)[None]


def authors_steps(workload: Workload, count: int) -> Iterator[None]:
    """The notebook's prompt-wise loop on the pipeline's own modules, one epoch each time."""
    backend, sampling = workload.backend, workload.sampling
    pipe, device, cuda = backend.pipe, backend.device, backend.device.type == "cuda"
    ids = pipe.tokenizer(["a prompt"], padding=False, return_tensors="pt").input_ids.to(device)
    empty = pipe.tokenizer(
        [""], padding="max_length", max_length=ids.shape[1] + 20, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        states, uncond = (pipe.text_encoder(each)[0] for each in (ids, empty.to(device)))
    sides = nn.ModuleList(AuthorsSide(backend.embed_dim) for _ in range(2)).to(device)
    optimizer = torch.optim.Adam(sides.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=cuda and backend.dtype == torch.float16)
    for _ in range(count):
        with torch.autocast(device.type, dtype=backend.dtype, enabled=cuda):
            embeds = torch.cat([sides[0]().to(states), states, sides[1]().to(states)], dim=1)
            latents = backend.noise([0])[:, 0]
            scheduler = backend.scheduler(sampling.steps, latents)
            latents = latents * scheduler.init_noise_sigma
            for index, timestep in enumerate(scheduler.timesteps):
                twice = scheduler.scale_model_input(torch.cat([latents] * 2), timestep).to(backend.dtype)
                output = pipe.unet(twice, timestep, torch.cat([uncond, embeds])).sample
                if index < sampling.steps - 2:
                    output = output.detach()
                u, c = output.chunk(2)
                guided = u + sampling.guidance_scale * (c - u)
                latents = scheduler.step(guided, timestep, latents).prev_sample
            pixels = pipe.vae.decode(latents.to(backend.dtype) / pipe.vae.config.scaling_factor).sample
            reward = workload.reward((pixels.float() / 2 + 0.5).clamp(0, 1), ["a prompt"]).mean()
            loss = -reward + 1e-3 * (embeds.mean(1) - states.mean(1)).abs().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(sides.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        yield


# -- measuring -----------------------------------------------------------------------------------------------


def measure(make: Callable[[], Iterator[None]], workload: Workload, repeats: int) -> tuple[float, int]:
    """Median seconds of a step, and the peak in bytes."""
    device = workload.backend.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    steps, taken = make(), []
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        next(steps)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    seconds = statistics.median(taken[WARM_UP:])
    if device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated(device)
    memory = LiveMemory()
    workload.weights(memory)
    with memory:  # in a run of its own, since counting takes time
        next(make())
    return seconds, memory.peak


def line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def run(
    make: Callable[[], Iterator[None]], workload: Workload, repeats: int, rows: int, planned: Footprint | None
) -> list[str]:
    """The measured cells of a line."""
    try:
        seconds, peak = measure(make, workload, repeats)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return ["out of memory", "", "", f"{planned.peak / GIB:.2f}" if planned else "", ""]
    cells = [f"{seconds:.3f}", f"{seconds / rows:.3f}", f"{peak / GIB:.3f}"]
    if planned is None:
        return [*cells, "", ""]
    return [*cells, f"{planned.peak / GIB:.3f}", f"{planned.peak / peak - 1:+.1%}"]


def table(options: argparse.Namespace) -> Iterator[str]:
    """Markdown, line by line."""
    yield line(COLUMNS)
    yield "|---" * len(COLUMNS) + "|"
    for name, reward, dtype in itertools.product(options.backends, options.rewards, options.dtypes):
        blueprint = tiny(name) if options.size == "tiny" else PUBLISHED[name]
        yield from lines_of(options, name, blueprint, reward, getattr(torch, dtype))


def lines_of(
    options: argparse.Namespace, name: str, blueprint: Blueprint, reward: str, dtype: torch.dtype
) -> Iterator[str]:
    """Of one backend, reward and dtype."""
    sampling = ipgo.Sampling(steps=options.steps, fit_steps=None, guidance_scale=options.guidance_scale)
    sizes = new_sizes()
    side = options.image_size
    known = open_blueprint(blueprint, sizes, dtype, image_size=side)
    planned = Workload(known, unloaded_reward(reward, sizes), sampling)
    backend = open_blueprint(blueprint, None, dtype, options.device, image_size=side)
    scorer: Reward = unloaded_reward(reward, None, options.device)
    workload = Workload(backend, scorer, sampling)
    head = [name, reward, str(dtype).removeprefix("torch.")]
    recomputing = [word == "yes" for word in options.recompute]
    for recompute, rows in itertools.product(recomputing, options.rows):
        choice = Choice(options.backprop_steps, recompute, rows)
        found = planned.footprint(choice)
        cells = [*head, "ipgo", options.steps, choice.backprop_steps, "yes" if recompute else "no", rows]
        if found.peak > room(options.device):
            yield line([*cells, "does not fit", "", "", f"{found.peak / GIB:.3f}", ""])
            continue
        count = options.repeats + WARM_UP
        make = lambda choice=choice, count=count: our_steps(workload, choice, count, ipgo.Insertion())  # noqa: E731
        yield line([*cells, *run(make, workload, options.repeats, rows, found)])
    if blueprint.kind == "StableDiffusionPipeline":
        yield from against_the_authors(options, head, blueprint, workload)


def against_the_authors(
    options: argparse.Namespace, head: list[str], blueprint: Blueprint, workload: Workload
) -> Iterator[str]:
    """Both loops with LMS, T = `--authors-steps`, K = 2 and one prompt, around the prompt alone."""
    backend: Backend = ipgo.load_backend(
        workload.backend.pipe, scheduler="lms", image_size=options.image_size
    )
    sampling = ipgo.Sampling(steps=options.authors_steps, fit_steps=None, guidance_scale=7.5)
    same = Workload(backend, workload.reward, sampling)
    count = options.repeats + WARM_UP
    loops: dict[str, Callable[[], Iterator[None]]] = {
        "ipgo, LMS": lambda: our_steps(same, Choice(2, False), count, ipgo.Insertion(negative=False)),
        "the authors'": lambda: authors_steps(same, count),
    }
    for loop, make in loops.items():
        cells = [*head, loop, options.authors_steps, 2, "no", 1]
        yield line([*cells, *run(make, same, options.repeats, 1, None)])


def room(device: str) -> float:
    """Bytes of the GPU; of a CPU's memory nothing is known."""
    if not device.startswith("cuda"):
        return float("inf")
    return float(torch.cuda.get_device_properties(device).total_memory)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=("real", "tiny"), default="real")
    parser.add_argument(
        "--backends", nargs="+", default=None, help=f"default, and tiny none but these: {' '.join(DENOISERS)}"
    )
    parser.add_argument("--rewards", nargs="+", default=None, help="default: clip hpsv2; tiny: contrast")
    parser.add_argument("--dtypes", nargs="+", default=None, help="default: float16 bfloat16; tiny: float32")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument(
        "--recompute",
        nargs="*",
        choices=("no", "yes"),
        default=["no", "yes"],
        help="none: the authors' loop alone",
    )
    parser.add_argument("--backprop-steps", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument(
        "--image-size", type=int, default=None, help="side; default: the model's own; tiny: 16"
    )
    parser.add_argument("--authors-steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    small = options.size == "tiny"
    options.backends = options.backends or list(DENOISERS)
    options.image_size = options.image_size or (SMALL_PIXELS if small else None)
    options.rewards = options.rewards or (["contrast"] if small else ["clip", "hpsv2"])
    options.dtypes = options.dtypes or (["float32"] if small else ["float16", "bfloat16"])
    for row in table(options):
        print(row, flush=True)


if __name__ == "__main__":
    main()
