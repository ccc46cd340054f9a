"""benchmarks/gpu_scale.py at reduced size, on a CPU."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import ipgo
from benchmarks import gpu_scale
from ipgo.backends.unloaded import open_blueprint
from ipgo.plan import Workload
from ipgo.rewards import load_reward
from tests.tiny_families import louder


@pytest.mark.parametrize(
    ("backends", "rows"),
    [(("sd15",), ("1", "2")), (("sdxl", "sd3", "flux-dev"), ("2",))],
    ids=["sd15", "others"],
)
def test_the_table_at_reduced_size(
    backends: tuple[str, ...], rows: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--size", "tiny", "--repeats", "1", "--steps", "3", "--authors-steps", "3", "--device", "cpu"]
    gpu_scale.main([*words, "--backends", *backends, "--rows", *rows])
    head, _, *lines = capsys.readouterr().out.splitlines()
    columns = [cell.strip() for cell in head.split("|")[1:-1]]
    found = [
        dict(zip(columns, [cell.strip() for cell in line.split("|")[1:-1]], strict=True)) for line in lines
    ]
    each = [(row["backend"], row["recompute"], row["rows"]) for row in found if row["loop"] == "ipgo"]
    assert each == list(itertools.product(backends, ("no", "yes"), rows))
    others = [row["loop"] for row in found if row["loop"] != "ipgo"]
    assert others == (["ipgo, LMS", "the authors'"] if "sd15" in backends else [])
    for row in found:
        assert float(row["s a step"]) > 0
        assert float(row["peak, GiB"]) > 0
        if row["loop"] == "ipgo":
            assert abs(float(row["plan's error"].rstrip("%"))) <= 1


@pytest.mark.parametrize(("dtype", "backend", "count"), [("float16", "sd15", 4), ("bfloat16", "flux-dev", 2)])
def test_half_precision_at_reduced_size(
    dtype: str, backend: str, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--size", "tiny", "--rows", "1", "--repeats", "1", "--steps", "2", "--authors-steps", "3"]
    gpu_scale.main([*words, "--device", "cpu", "--dtypes", dtype, "--backends", backend])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == count
    for line in lines:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[2] == dtype
        assert float(cells[8]) > 0
        assert cells[12] == "" or abs(float(cells[12].rstrip("%"))) <= 5


def test_the_small_models_have_the_parts_of_the_published_ones() -> None:
    """And their classes."""
    for name in gpu_scale.DENOISERS:
        real, small = gpu_scale.PUBLISHED[name], gpu_scale.tiny(name)
        assert real.kind == small.kind
        assert {key: part.kind for key, part in real.parts.items()} == {
            key: part.kind for key, part in small.parts.items()
        }
        backend = open_blueprint(small, None, torch.float32, image_size=gpu_scale.SMALL_PIXELS)
        assert sum(parameter.numel() for parameter in backend.modules["denoiser"].parameters()) < 300_000


def test_the_authors_loop_learns() -> None:
    """As re-created: its reward rises on the picture that it is fitted to, and its basis stays orthonormal."""
    torch.manual_seed(0)
    backend = open_blueprint(gpu_scale.tiny("sd15"), None, torch.float32)
    louder(backend.pipe.unet, "attn2.to_out", "attn2.to_v", factor=10)  # make the text matter
    lms = ipgo.load_backend(backend.pipe, scheduler="lms")
    rewards: list[float] = []
    contrast = load_reward("contrast", device="cpu")

    def noted(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        values = contrast(images, prompts)
        rewards.append(values.item())
        return values

    sampling = ipgo.Sampling(steps=3, fit_steps=None, guidance_scale=7.5)
    workload = replace(Workload(lms, contrast, sampling), reward=ipgo.as_reward(noted))
    for _ in gpu_scale.authors_steps(workload, 20):
        pass
    assert len(rewards) == 20
    assert rewards[-1] > rewards[0]
    side = gpu_scale.AuthorsSide(32)
    side()
    torch.testing.assert_close(side.map.weight.mT @ side.map.weight, torch.eye(32), atol=1e-5, rtol=0)
