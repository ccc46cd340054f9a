"""`ipgo plan`: what it says of memory, against steps that were run with numbers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import ipgo
from ipgo import cli, plan
from ipgo.adapters import InsertionAdapter
from ipgo.ascent import Ascent
from ipgo.backends import Backend, load_backend
from ipgo.config import build, parse, run_parser
from ipgo.insertion import Insertion
from ipgo.memory import LiveMemory, new_sizes
from ipgo.plan import Choice, Workload, deepest, fastest, memory_of, unloaded
from ipgo.training import first_gradient, maximize
from tests import tiny_families
from tests.conftest import brightness, byte_tokenizer, one_sentence, put_into_cache, tiny_pipeline
from tests.reward_models import tiny_clip

SAMPLING = ipgo.Sampling(steps=3, fit_steps=None)
FAMILIES = (
    tiny_pipeline, tiny_families.lcm, tiny_families.sdxl, tiny_families.sd3, tiny_families.flux,
    tiny_families.pixart, tiny_families.chroma,
)  # fmt: skip


REWARD = ipgo.as_reward(brightness)


def configurations(pipe: Any, folder: Path) -> str:
    """The pipeline's folder without its weights."""
    pipe.save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return configurations(tiny_pipeline(), tmp_path_factory.mktemp("sizes"))


@pytest.fixture(scope="module")
def sizes(folder: str) -> Workload:
    return replace(unloaded(folder, "contrast", SAMPLING, torch.float32), reward=REWARD)


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("choice", [Choice(2, False), Choice(2, True, 2)], ids=str)
def test_the_plan_is_what_the_step_takes(make: Callable[[], Any], choice: Choice, tmp_path: Path) -> None:
    pipe = make()
    side = 16 if make in (tiny_families.flux, tiny_families.chroma) else None  # their own is large
    planned = unloaded(configurations(pipe, tmp_path), "contrast", SAMPLING, torch.float32, side)
    run = Workload(load_backend(pipe, device="cpu", image_size=side), planned.reward, SAMPLING)
    found, real = planned.footprint(choice), run.footprint(choice)
    assert found.weights == real.weights
    assert found.saved == real.saved
    assert found.peak == pytest.approx(real.peak, rel=0.01)


@pytest.mark.parametrize(
    ("make", "side", "tolerance"),
    [
        (tiny_families.sana, None, 0.0),
        (tiny_families.sana_sprint, None, 0.0),
        (tiny_families.z_image, 16, 0.01),
        (tiny_families.flux_2, 16, 0.0),
        (tiny_families.qwen_image, 16, 0.3),  # its texts are not padded, and a plan knows no tokenizer
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_folders_whose_text_a_language_model_reads(
    make: Callable[[], Any], side: int | None, tolerance: float, tmp_path: Path
) -> None:
    pipe = make()
    planned = unloaded(configurations(pipe, tmp_path), "contrast", SAMPLING, torch.float32, side)
    run = Workload(load_backend(pipe, device="cpu", image_size=side), planned.reward, SAMPLING)
    found, real = (each.footprint(Choice(2, False)) for each in (planned, run))
    assert found.weights == real.weights
    assert found.saved == pytest.approx(real.saved, rel=tolerance)
    # Of Sana, more: the tiny tokenizer reads its instruction in few tokens.
    assert found.peak > 0.99 * real.peak


def test_the_allocator_agrees(sizes: Workload) -> None:
    """Torch's profiler sees every allocation, those inside kernels too."""
    choice = Choice(2, False, 4)
    backend = load_backend(tiny_pipeline(), device="cpu")
    task = ipgo.Task(backend, REWARD, tuple(f"prompt {number}" for number in range(4)), SAMPLING)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        adapter = InsertionAdapter.start(backend, task.prompts, Insertion(), seed=0, shared=False)
        first_gradient(task, adapter, Ascent(backprop_steps=2))
    assert seen.profiler is not None
    live = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    found = sizes.footprint(choice)
    assert found.peak - found.weights == pytest.approx(most, rel=0.02)


def test_a_whole_step_takes_no_more(backend: Backend) -> None:
    """The update comes after the peak."""
    workload = Workload(backend, REWARD, SAMPLING)
    memory = LiveMemory()
    weights = sum(workload.weights(memory).values())
    task = ipgo.Task(backend, REWARD, ("prompt 0",), SAMPLING)
    with memory:
        adapter = InsertionAdapter.start(backend, task.prompts, Insertion(), seed=0, shared=False)
        next(maximize(task, adapter, Ascent(backprop_steps=2)))
    found = workload.footprint(Choice(2, False))
    assert memory.peak == found.peak
    assert found.weights == weights


def test_a_reward_with_a_model_is_counted(folder: str, tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    tiny_clip().save_pretrained(clip)
    byte_tokenizer().save_pretrained(clip)
    planned = unloaded(folder, f"clip:{clip}+0.5*contrast", SAMPLING, torch.float32)
    real: Any = ipgo.load_reward(f"clip:{clip}+0.5*contrast", device="cpu")
    real.rewards[0].model.set_attn_implementation("sdpa")  # as on a GPU
    run = Workload(load_backend(tiny_pipeline(), device="cpu"), real, SAMPLING)
    assert planned.weights() == run.weights()
    for choice in (Choice(1, False), Choice(3, True)):
        plan_, measured = planned.footprint(choice), run.footprint(choice)
        assert plan_.saved == pytest.approx(measured.saved, rel=0.01)
        assert plan_.peak == pytest.approx(measured.peak, rel=0.01)


def test_what_takes_more_and_what_less(sizes: Workload) -> None:
    kept = [sizes.footprint(Choice(depth, False)) for depth in (1, 2, 3)]
    again = [sizes.footprint(Choice(depth, True)) for depth in (1, 3)]
    for less, more in ((kept[0], kept[1]), (kept[1], kept[2])):
        assert less.peak < more.peak
        assert less.saved < more.saved
    for few, many in zip(again, (kept[0], kept[2]), strict=True):
        assert few.peak < many.peak
        assert few.saved < many.saved
    assert again[0].peak <= again[1].peak
    assert sizes.footprint(Choice(1, False, 2)).peak > kept[0].peak


def test_half_precision_and_small_images_take_less(folder: str, sizes: Workload) -> None:
    choice = Choice(2, False)
    whole = sizes.footprint(choice)
    half = replace(unloaded(folder, "contrast", SAMPLING, torch.float16), reward=REWARD).footprint(choice)
    assert half.weights == pytest.approx(whole.weights / 2, rel=0.01)
    assert whole.saved / 3 < half.saved < whole.saved
    small = replace(unloaded(folder, "contrast", SAMPLING, torch.float32, 8), reward=REWARD).footprint(choice)
    assert small.weights == whole.weights
    assert small.saved < whole.saved


def test_the_bundled_model_and_its_rewards() -> None:
    workload = unloaded("emoji", "emoji-preference+0.1*emoji-aesthetic", SAMPLING, torch.float32)
    assert workload.weights()["denoiser"] == 4 * 18_855_908
    found = workload.footprint(Choice(1, False))
    assert found.peak > found.weights + found.saved - 1


def test_a_reward_that_looks_at_values_cannot_be_planned(sizes: Workload) -> None:
    def picky(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3)) * float(images.max())

    with pytest.raises(ipgo.InputError, match="reward 'picky' cannot be planned: it depends on pixel values"):
        replace(sizes, reward=ipgo.as_reward(picky)).footprint(Choice(1, False))


def test_the_choice() -> None:
    need = {(1, False): 3, (1, True): 2, (2, False): 5, (2, True): 2.5, (4, False): 9, (4, True): 4}

    def chosen(room: float, rows: int = 4, depths: tuple[int, ...] = (1, 4, 2)) -> list[Choice | None]:
        def fits(choice: Choice) -> bool:
            return need[choice.backprop_steps, choice.recompute] * choice.rows <= room

        return [find(fits, depths, rows) for find in (fastest, deepest)]

    assert chosen(9) == [Choice(1, False, 2), Choice(4, False)]
    assert chosen(8.9) == [Choice(1, False, 2), Choice(4, True, 2)]  # K before the cost of recomputing
    assert chosen(3) == [Choice(1, False), Choice(2, True)]
    assert chosen(2) == [Choice(1, True)] * 2
    assert chosen(1) == [None] * 2
    assert chosen(1000, 6) == [Choice(1, False, 6), Choice(4, False, 6)]
    assert chosen(30, 6) == [Choice(1, False, 6), Choice(4, False, 2)]
    assert chosen(5, 2, depths=(2,)) == [Choice(2, False)] * 2
    assert chosen(8.9, 1, depths=(4,)) == [Choice(4, True)] * 2


def test_passes_of_a_choice() -> None:
    """Shallow comes before not recomputing."""
    kinds = [(1, False), (1, True), (2, False), (2, True), (4, False), (4, True)]
    assert [Choice(*kind).passes for kind in kinds] == [2, 3, 4, 6, 8, 12]


def test_text_encoders_leave_before_anything_is_recomputed() -> None:
    def chosen(room: float) -> Choice | None:
        return fastest(lambda each: (4 - each.recompute - 2 * each.text_on_cpu) <= room, (1,), 1)

    assert chosen(4) == Choice(1, False)
    assert chosen(3) == Choice(1, False, text_on_cpu=True)
    assert chosen(1) == Choice(1, True, text_on_cpu=True)


def test_text_encoders_on_the_cpu_take_nothing(sizes: Workload) -> None:
    whole, apart = (sizes.footprint(Choice(2, False, text_on_cpu=where)) for where in (False, True))
    text = sizes.weights()["text_encoder"]
    assert (whole.weights - apart.weights, whole.peak - apart.peak) == (text, text)
    assert whole.saved == apart.saved > 0


def test_sizes_of_gpus() -> None:
    assert memory_of("16GB") == 16 * 10**9
    assert memory_of(" 15.5 gib") == int(15.5 * 2**30)
    for wrong in ("16", "0GB", "GB", "-1GB", "16TB", "large"):
        with pytest.raises(ipgo.InputError, match=r"gpu is .* it must be a size such as 16GB"):
            memory_of(wrong)


def words(out: str) -> list[list[str]]:
    """The cells of a printed table, without its head."""
    return [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line[:2] == "| "
    ][1:]


def test_the_command(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "RESERVE", 10**6)
    command = ["plan", "--backend", folder, "--reward", "contrast", "--dtype", "float32", "--steps", "3"]
    assert cli.main([*command, "--gpu", "1GB", "--backprop-steps", "3", "--image-size", "16"]) == 0
    out = capsys.readouterr().out
    assert "16 x 16 pixels, guidance 7.5, 3 steps" in out
    sizes = unloaded(folder, "contrast", SAMPLING, torch.float32)
    rows = words(out)
    assert [row[:3] + row[-1:] for row in rows] == [
        [*kind, "fits"] for kind in (["3", "no", "1"], ["3", "no", "4"], ["3", "yes", "1"], ["3", "yes", "4"])
    ]
    for row, choice in zip(rows, (Choice(3, False), Choice(3, False, 4)), strict=False):
        assert float(row[4]) == pytest.approx(sizes.footprint(choice).peak / 2**30, abs=0.01)
    large = out.split("1GB, fastest: ")[1].splitlines()
    assert len(large) == 2  # of one K it is the deepest too
    assert large[0].startswith("K = 3 without recomputing, 4 prompts at once")
    flags = [word for word in large[1].split() if word.startswith("--")]
    config = build(parse(run_parser("ipgo"), {}, flags), ("a fox",))
    assert config.backend == folder
    assert config.chunk == 4
    assert config.sampling.fitting.steps == 3
    method: Any = config.method
    assert (method.ascent.backprop_steps, method.ascent.recompute) == (3, False)


def test_the_command_moves_text_encoders_away_where_that_helps(
    folder: str, sizes: Workload, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "RESERVE", 0)
    command = ["plan", "--backend", folder, "--reward", "contrast", "--dtype", "float32", "--steps", "3"]
    peak = unloaded(folder, "contrast", SAMPLING, torch.float32).footprint(Choice(1, False)).peak
    room = (peak - 1) / 10**6  # without recomputing and with the text encoder it is one byte too many
    assert cli.main([*command, "--gpu", f"{room:.6f}MB", "--backprop-steps", "1", "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert [row[-1] for row in words(out)] == ["text on the CPU", "fits"]
    flags = [word for word in out.split() if word.startswith("--")]
    config = build(parse(run_parser("ipgo"), {}, flags), ("a fox",))
    method: Any = config.method
    assert (config.text_device, method.ascent.recompute) == ("cpu", False)


def test_a_few_step_model_is_planned_as_it_is_drawn(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its name: two steps without guidance, with all of them differentiated."""
    monkeypatch.setattr(plan, "RESERVE", 10**6)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "mine-lcm-2step")
    command = ["plan", "--backend", "./mine-lcm-2step", "--reward", "contrast", "--gpu", "1GB", "--rows", "1"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "guidance 1, 2 steps" in out
    assert sorted({row[0] for row in words(out)}) == ["1", "2"]
    assert "--method.ascent.backprop_steps=2 " in out


def test_hub_ids_are_planned_from_their_configuration(folder: str, tmp_path: Path) -> None:
    """In a process that cannot reach the hub, and finds no weights in its cache."""
    bare = Path(shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")))
    tiny_clip().save_pretrained(tmp_path / "clip")
    config = tmp_path / "clip/config.json"
    put_into_cache(tmp_path / "cache", "owner/clip", config, "config.json", revision="refs")
    put_into_cache(tmp_path / "cache", "owner/tiny", bare, revision="v2")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    command = [
        sys.executable,
        "-m",
        "ipgo.cli",
        "plan",
        "--gpu",
        "2GB",
        "--rows",
        "1",
        "--backprop-steps",
        "1",
    ]
    command.append("--backend")
    tables = []
    for words in (
        ["owner/tiny@v2", "--reward", "clip:owner/clip@refs"],
        [folder, "--reward", f"clip:{tmp_path}/clip"],
    ):
        done = subprocess.run(
            [*command, *words], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        tables.append([line for line in done.stdout.splitlines() if line.startswith("|")])
    assert tables[0] == tables[1]


def test_the_fastest_is_said_and_then_the_deepest(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """K = 3 fits with recomputing alone, and K = 1 without."""
    monkeypatch.setattr(plan, "RESERVE", 0)
    sizes = unloaded(folder, "contrast", SAMPLING, torch.float32)
    room = sizes.footprint(Choice(1, False)).peak / 10**6
    command = ["plan", "--backend", folder, "--reward", "contrast", "--dtype", "float32", "--steps", "3"]
    command += ["--gpu", f"{room + 0.001:.6f}MB", "--rows", "1", "--backprop-steps"]
    assert cli.main([*command, "1", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "MB, fastest: K = 1 without recomputing" in lines[-4]
    assert "--method.ascent.backprop_steps=1 --method.ascent.recompute=false" in lines[-3]
    assert "MB, gradient through most steps: K = 3 recomputing" in lines[-2]
    assert "--method.ascent.backprop_steps=3 --method.ascent.recompute=true" in lines[-1]
    assert cli.main([*command, "3"]) == 0
    out = capsys.readouterr().out
    assert "fastest: K = 3 recomputing" in out
    assert "most steps" not in out


def test_nothing_fits(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "RESERVE", 0)
    command = ["plan", "--backend", folder, "--reward", "contrast", "--gpu", "0.2MB", "--backprop-steps", "1"]
    assert cli.main(command) == 1
    assert "0.2MB: nothing fits; the smallest needs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: --gpu"),
        (["--gpu", "big"], "gpu is 'big'; it must be a size such as 16GB"),
        (["--gpu", "500MB"], "gpu is '500MB'; 0.93 GiB of each GPU are reserved"),
        (["--gpu", "8GB", "--backend", "sd1.5"], "unknown backend 'sd1.5'; did you mean 'sd15'"),
        (
            ["--gpu", "8GB", "--reward", "clip", "--backend", __file__],
            "is not a local folder of diffusers, and its sizes",
        ),
        (
            ["--gpu", "8GB", "--reward", "clip", "--backend", "some/model"],
            "'some/model' is not here, and cannot be fetched",
        ),
        (
            ["--gpu", "8GB", "--reward", "clip:some/model"],
            "the config.json of 'some/model' is not here and cannot be fetched",
        ),
        (["--gpu", "8GB", "--reward", "hpsv3"], "unknown reward 'hpsv3'"),
        (["--gpu", "8GB", "--reward", "cmd:true {image}"], "has no gradient"),
        (["--gpu", "8GB", "--dtype", "half"], "unknown dtype 'half'; choose from bfloat16, float16, float32"),
        (["--gpu", "8GB", "--rows", "0"], "rows is 0; it must be at least 1"),
        (["--gpu", "8GB", "--backprop-steps", "0", "2"], "backprop_steps is [0, 2]; it must be at least 1"),
        (["--gpu", "8GB", "--backprop-steps", "9"], "backprop_steps is 9; steps allows at most 8"),
        (["--gpu", "8GB", "--guidance-scale", "inf"], "guidance_scale is inf; it must be a finite number"),
        (["--gpu", "8GB", "--image-size", "-8"], "image_size is -8; it must be between 1 and 8192"),
        (["--gpu", "8GB", "--image-size", "50"], "image_size 50 must be a positive multiple of"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *words]) == 2
    assert message in one_sentence(capsys)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "unet/config.json").unlink(), "has no unet/config.json"),
        (lambda folder: (folder / "vae/config.json").write_text("{"), "has a damaged vae/config.json"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "has a damaged model_index.json"),
        (lambda folder: _change(folder, unet=["mine", "Net"]), "its unet is a mine.Net"),
        (lambda folder: _change(folder, unet=["diffusers"]), "has a damaged model_index.json: unet is"),
        (lambda folder: _change(folder, _class_name="KandinskyPipeline"), "holds a KandinskyPipeline"),
    ],
)
def test_damaged_folders(damage: Callable[[Path], object], message: str, folder: str, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    shutil.copytree(folder, place)
    damage(place)
    with pytest.raises(ipgo.InputError, match=message):
        unloaded(str(place), "contrast", SAMPLING, torch.float32)


def _change(folder: Path, **values: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **values}))


def test_live_memory_counts_storages_once_and_forgets_them() -> None:
    with LiveMemory() as memory:
        one = torch.ones(1000)
        view = one[10:].view(-1, 3)
        assert memory.live == 4000
        two = view + 1
        assert memory.live == 4000 + 4 * 990
        one.add_(1)
        assert memory.live == 4000 + 4 * 990
        del one, view
        assert memory.live == 4 * 990
        assert memory.add([two]) == 0
    assert memory.peak == 4000 + 4 * 990


def test_what_has_only_a_size_takes_no_memory() -> None:
    with new_sizes():
        huge = torch.empty(10**15)
    with LiveMemory() as memory:
        total = (huge + 1).sum()
    assert memory.peak == 4 * 10**15 + 4
    assert total.shape == ()
