"""Nothing mixes tensors of two devices, and what comes of a fit is the same on each."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import ipgo.backends
import ipgo.devices
import ipgo.models
import ipgo.rewards
from ipgo import cli
from ipgo.adapters import LoRA, generate
from ipgo.artefacts import load_adapter, save_adapter
from ipgo.ascent import Ascent
from ipgo.backends import load_backend
from ipgo.insertion import Insertion
from ipgo.methods import (
    DDPO,
    DNO,
    IPGO,
    BestOfN,
    BlackBoxIPGO,
    DPODiffusion,
    DRaFT,
    Embedding,
    Joint,
    ReNO,
    TextCraftor,
)
from ipgo.ppo import PPO
from ipgo.rewards import as_reward, load_reward, score_with_gradient
from ipgo.sampling import Sampling
from ipgo.task import Task
from tests import tiny_families as tiny
from tests.conftest import assert_same_state, redness, tiny_pipeline
from tests.second_device import DEVICE, second_device

PROMPTS = ("a red fox", "an orange")
SAMPLING = Sampling(steps=2, guidance_scale=3.0)
STOCHASTIC = replace(SAMPLING, eta=1.0)
SHORT = Ascent(steps=2, lr=0.02, batch_size=2, accumulate=1)
INSERTION = Insertion(num_prefix=2, num_suffix=1, rank=8)
LORA = LoRA(rank=2, alpha=4.0)
PPO_SHORT = PPO(epochs=2, samples=2, batch_size=2, accumulate=1, lr=1e-2, history=4, min_history=4)
WORDS = DPODiffusion(word_list="emoji", candidates=4, gradient_steps=2, population=3, parents=2)
SMALL = replace(INSERTION, rank=3, cross_attention="none", negative=False)

METHODS = {
    "ipgo": (IPGO(INSERTION, SHORT), SAMPLING),
    "ipgo-recomputed": (IPGO(INSERTION, replace(SHORT, recompute=True, backprop_steps=None)), SAMPLING),
    "ipgo-fixed-free": (
        IPGO(replace(INSERTION, cross_attention="fixed", basis="free", bias=True), SHORT),
        SAMPLING,
    ),
    "embedding": (Embedding(ascent=SHORT), SAMPLING),
    "draft": (DRaFT(lora=LORA, ascent=SHORT), SAMPLING),
    "draft-lv": (DRaFT(lora=LORA, ascent=replace(SHORT, renoised=2)), SAMPLING),
    "textcraftor": (TextCraftor(ascent=replace(SHORT, lr=1e-3)), SAMPLING),
    "reno": (ReNO(replace(ReNO().ascent, steps=2)), SAMPLING),
    "dno": (DNO(replace(DNO().ascent, steps=2)), STOCHASTIC),
    "joint": (Joint(INSERTION, ascent=replace(Joint().ascent, steps=2)), SAMPLING),
    "best-of-n": (BestOfN(n=3), SAMPLING),
    "ddpo": (DDPO(LORA, PPO_SHORT), STOCHASTIC),
    "black-box": (BlackBoxIPGO(SMALL, candidates=5, population=4), SAMPLING),
    "words": (replace(WORDS, solver="evolutionary", target="positive"), SAMPLING),
    "words-by-gradient": (replace(WORDS, solver="hybrid", target="both"), SAMPLING),
    "negative-words": (replace(WORDS, solver="gradient", target="negative"), SAMPLING),
}
FAMILIES = {
    "sd21": tiny.sd21,
    "lcm": tiny.lcm,
    "sdxl": tiny.sdxl,
    "sd35": tiny.sd35,
    "sd3": tiny.sd3,
    "flux": tiny.flux,
    "chroma": tiny.chroma,
    "pixart": tiny.pixart,
    "sana": tiny.sana,
    "sana-sprint": tiny.sana_sprint,
    "qwen-image": tiny.qwen_image,
    "z-image": tiny.z_image,
    "flux-2": tiny.flux_2,
}
LARGE = ("flux", "chroma", "qwen-image", "z-image", "flux-2")  # at their own size
POOLED = ("sdxl", "sd3", "sd35", "flux")


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    """`auto` is the second device."""
    if DEVICE.type == "cuda":  # it is already
        return
    choose = ipgo.devices.choose_device
    for module in (ipgo.devices, ipgo.backends, ipgo.rewards, ipgo.models):
        monkeypatch.setattr(
            module, "choose_device", lambda wanted: DEVICE if wanted in ("auto", DEVICE) else choose(wanted)
        )
    # What torch.utils.checkpoint asks a device's module.
    monkeypatch.setattr(torch, DEVICE.type, SimpleNamespace(_initialized=False), raising=False)


@pytest.fixture
def there():
    """The whole test may make tensors on the second device."""
    with second_device():
        yield


def moved(pipe, besides=""):
    """A pipeline on the second device, but for the parts whose names begin with `besides`."""
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and not (besides and name.startswith(besides)):
            part.to(DEVICE)
    return pipe


def assert_alike(ours, theirs):
    """Rewards and images of two devices. Not to the bit: torch chooses other kernels of attention there.

    Nor the parameters: Adam's first steps are as long where the gradient is next to nothing.
    """
    for name in ("memory.rewards", "memory.best", "images"):
        if name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-3, equal_nan=True)


@pytest.mark.usefixtures("there")
def test_the_second_device_refuses_what_a_gpu_refuses():
    values = torch.arange(3.0, device=DEVICE)
    assert values.device.type == DEVICE.type
    assert (values * 2 + torch.tensor(1.0)).tolist() == [1, 3, 5]
    assert values[torch.tensor([2, 0])].tolist() == [2, 0]
    for mixed in (
        lambda: values + torch.ones(3),
        lambda: torch.ones(3)[values > 1],
        lambda: torch.cat([values, torch.ones(3)]),
        lambda: torch.randn(3, device=DEVICE, generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match=r"(?i)cpu"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        values.numpy()


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        *((name, False) for name in METHODS),
        *((name, True) for name in ("ipgo", "draft", "ddpo", "negative-words")),
    ],
)
def test_each_method_ends_alike_on_another_device(name, shared, tmp_path):
    method, sampling = METHODS[name]
    prompts = PROMPTS if method.stackable or shared else PROMPTS[:1]

    def task(backend):
        return Task(backend, as_reward(redness), prompts, sampling, shared=shared)

    here = task(load_backend(tiny_pipeline(), device="cpu"))
    *_, expected = (step.state() for step in method.fit(here))
    with second_device():
        there = task(load_backend(moved(tiny_pipeline())))
        adapter, states = None, []
        for step in method.fit(there):
            states.append(step.state())
            adapter = step.adapter
        assert_alike(states[-1], expected)
        *_, again = (step.state() for step in method.fit(there, resume=states[0]))
        assert_same_state(again, states[-1])
        save_adapter(adapter, tmp_path)
        stored = load_adapter(tmp_path)
        images = generate(there.backend, prompts, [0] * len(prompts), stored, sampling)
        assert images.device.type == DEVICE.type
        images = images.cpu()
    assert_alike(
        {"images": images}, {"images": generate(here.backend, prompts, [0] * len(prompts), stored, sampling)}
    )


@pytest.mark.parametrize(
    ("name", "text_device"),
    [
        *((name, "auto") for name in FAMILIES),
        *((name, "cpu") for name in ("sd21", "sdxl", "sd3", "flux", "pixart")),
    ],
)
def test_each_family_ends_alike_on_another_device(name, text_device):
    method = IPGO(replace(INSERTION, pooled=name in POOLED), replace(SHORT, recompute=True))
    options = {"image_size": 16} if name in LARGE else {}

    def fitted(backend, adapter=None):
        """The state, and images with this adapter or else the fitted one; and that."""
        *_, last = method.fit(Task(backend, as_reward(redness), PROMPTS, SAMPLING))
        adapter = adapter or copy.deepcopy(last.adapter)
        images = generate(backend, PROMPTS, [5, 6], adapter, SAMPLING)
        assert images.device.type == backend.device.type
        return {**last.state(), "images": images.cpu()}, adapter

    expected, adapter = fitted(load_backend(FAMILIES[name](), device="cpu", **options))
    with second_device():
        pipe = moved(FAMILIES[name](), besides="text_encoder" if text_device == "cpu" else "")
        place = {"device": DEVICE, "dtype": "float32", "text_device": "cpu"} if text_device == "cpu" else {}
        assert_alike(fitted(load_backend(pipe, **place, **options), adapter)[0], expected)


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(
    "name", ["emoji-preference", "emoji-clip", "emoji-aesthetic", "emoji-likeness", "contrast"]
)
def test_each_reward_scores_on_another_device(name):
    """And hands its gradient back."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = ["a lemon on a blue background", "a red apple to the left of a fox on a white background"]
    answers = []
    for place in (torch.device("cpu"), DEVICE):
        own = images.detach().to(place).requires_grad_()
        values = score_with_gradient(load_reward(name, device=place), own, prompts)
        values.sum().backward()
        answers.append((values.detach().cpu(), own.grad.cpu()))
    for ours, expected in zip(*answers, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("there")
def test_each_command_runs_on_another_device(pipeline_folder, tmp_path, capsys):
    """With what a GPU has by default."""
    own = tmp_path / "own.py"
    own.write_text("def red(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    reward, run = f"{own}:red", str(tmp_path / "run")
    short = [
        "--sampling.steps",
        "2",
        "--method.ascent.steps",
        "2",
        "--seeds",
        "0",
        "1",
        "--unseen-seeds",
        "1",
    ]
    judges = ["--backend", pipeline_folder, "--reward", reward]
    fit = ["fit", *PROMPTS, *judges, "--held-out", "contrast", *short, "--out", run]
    budget = ["--budget", "20", "--sampling.steps", "2", "--out", str(tmp_path / "table")]
    commands = [
        fit,
        fit,  # a finished run is looked at again
        ["evaluate", run, "--seeds", "7"],
        ["generate", run, *PROMPTS, "--out", str(tmp_path / "images")],
        ["explain", run, "--out", str(tmp_path / "explained.json")],
        ["score", str(tmp_path / "images"), "--reward", reward, "--prompt", PROMPTS[0]],
        ["doctor", *judges],
        ["publish", run, "--out", str(tmp_path / "published")],
        ["compare", *PROMPTS, "--methods", "raw,ipgo,best-of-n", *judges, *budget],
    ]
    for command in commands:
        assert cli.main(command) == 0, (command, capsys.readouterr().err)
