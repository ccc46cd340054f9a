"""`ipgo doctor`: what it says of healthy and of broken rewards and backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ipgo
import ipgo.backends
import ipgo.doctor
from ipgo import cli
from ipgo.adapters import InsertionAdapter
from ipgo.backends import Backend, load_backend
from ipgo.doctor import Finding, examine
from ipgo.insertion import Insertion
from ipgo.rewards import load_reward
from ipgo.sampling import Sampling, sample
from tests import tiny_families as tiny
from tests.conftest import brightness, one_sentence

SAMPLING = ipgo.Sampling(steps=3, fit_steps=None)
PROMPT = "a red fox"


def findings(backend: Backend, function: Any, backprop_steps: int = 2) -> list[Finding]:
    return list(examine(backend, ipgo.as_reward(function), PROMPT, SAMPLING, backprop_steps))


def wrong(backend: Backend, function: Any) -> Finding:
    """The one that is not good; nothing comes after it but the memory."""
    found = findings(backend, function)
    (bad,) = [each for each in found if not each.good]
    assert found[-2] is bad
    return bad


def sizes_of(found: list[Finding]) -> list[float]:
    """Of the gradients at the embeddings around the prompt and around the negative one."""
    arrived = [each.text for each in found if each.text.startswith("gradient at")]
    return [float(text.split("norm ")[1].split(",")[0]) for text in arrived]


def test_a_healthy_pair(backend: Backend) -> None:
    found = findings(backend, brightness)
    assert all(each.good for each in found)
    assert "float32 on cpu" in found[0].text
    assert "reward 'brightness' gives" in found[2].text
    assert "gradient at the 20 inserted embeddings, through the last 2 steps" in found[3].text
    assert "at the 20 inserted embeddings of the negative prompt, through the last 2 st" in found[4].text
    assert "GiB at most" in found[5].text


@pytest.mark.parametrize(
    "make",
    [
        *(tiny.sdxl, tiny.sd3, tiny.flux, tiny.pixart, tiny.sana, tiny.sana_sprint),
        *(tiny.z_image, tiny.qwen_image, tiny.flux_2, tiny.chroma),
    ],
    ids=lambda make: make.__name__,
)
def test_every_family_can_be_examined(make: Callable[[], Any]) -> None:
    opened = load_backend(make(), device="cpu", image_size=32)
    sampling = ipgo.Sampling(steps=2, guidance_scale=3.0, fit_steps=None)
    found = list(examine(opened, ipgo.as_reward(brightness), PROMPT, sampling, 1))
    assert all(each.good for each in found), found
    assert "gradient at the 20 inserted embeddings, through the last step: norm" in found[3].text


def test_the_size_is_that_of_the_gradient(backend64: Backend) -> None:
    """Against a difference quotient along the gradient itself, with all steps differentiated."""
    sizes = sizes_of(findings(backend64, brightness, 3))
    start = {"seed": 0, "shared": False, "sampling": SAMPLING}
    adapter = InsertionAdapter.start(backend64, [PROMPT], Insertion(), **start)
    with torch.no_grad():
        cond = adapter.condition(backend64, [PROMPT], backend64.encode([PROMPT]))
        uncond = adapter.unconditional(backend64, [PROMPT], cond, SAMPLING)
    assert uncond is not None
    sides = [cond.embeds, uncond.embeds]

    def value(embeds: Tensor, side: int) -> Tensor:
        given = (
            [replace(cond, embeds=embeds), uncond] if side == 0 else [cond, replace(uncond, embeds=embeds)]
        )
        return brightness(sample(backend64, *given, backend64.noise([0]), SAMPLING, backprop_steps=3), [])

    for side, (embeds, size) in enumerate(zip(sides, sizes, strict=True)):
        leaf = embeds.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(leaf, side).sum(), leaf)
        gradient[:, 10:-10] = 0
        along = 1e-5 * gradient / gradient.norm()
        with torch.no_grad():
            rise = (value(embeds + along, side) - value(embeds - along, side)).item() / 2e-5
        assert size == pytest.approx(rise, rel=0.01)


def test_a_negative_prompt_that_nothing_reaches_is_named(backend: Backend, monkeypatch: Any) -> None:
    guided = Backend.guided

    def cut(self: Backend, denoise: Any, latents: Tensor, cond: Any, uncond: Any, scale: float) -> Tensor:
        uncond = None if uncond is None else replace(uncond, embeds=uncond.embeds.detach())
        return guided(self, denoise, latents, cond, uncond, scale)

    monkeypatch.setattr(Backend, "guided", cut)
    (bad,) = [each for each in findings(backend, brightness) if not each.good]
    assert bad.text.endswith("but is 0 at the inserted embeddings of the negative prompt")


def test_a_sums_weights_are_in_the_size_of_its_gradient(backend: Backend) -> None:
    one, four = (
        sizes_of(findings(backend, load_reward(spec, device="cpu"), 1)) for spec in ("contrast", "4*contrast")
    )
    assert four == pytest.approx([4 * each for each in one], rel=0.02)


def test_the_scale_of_float16_is_taken_back(make_pipe: Any) -> None:
    contrast = load_reward("contrast", device="cpu")
    whole, half = (
        sizes_of(findings(load_backend(make_pipe(), device="cpu", dtype=dtype), contrast, 1))
        for dtype in ("float32", "float16")
    )
    assert whole == pytest.approx(half, rel=0.1)


def detached(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.detach().mean((1, 2, 3))


def ones(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.ones(len(images))


def constant(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.ones(len(images), requires_grad=True) * 2


def rounded(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return (images * 255).round().mean((1, 2, 3))


def broken(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3)) * float("nan")


def steep(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return (images - images.detach()).square().mean((1, 2, 3)).sqrt()


def numeric(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.tensor(images.numpy().mean((1, 2, 3)))


NOISY = torch.nn.Dropout(0.5)


def noisy(images: Tensor, prompts: Sequence[str]) -> Tensor:
    numbers: Tensor = NOISY(images).mean((1, 2, 3))
    return numbers


def first_for_all(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images[:1].mean((1, 2, 3)).expand(len(images))


def centred(images: Tensor, prompts: Sequence[str]) -> Tensor:
    numbers = images.mean((1, 2, 3))
    return numbers - numbers.mean() / 2


def one_row(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean().reshape(1)


def misspelt(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return image.mean((1, 2, 3))  # type: ignore[name-defined]  # noqa: F821


def logarithm(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.amax((1, 2, 3)).log()


def one_number(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean()


@pytest.mark.parametrize(
    ("function", "text", "advice"),
    [
        (detached, "the number has no gradient: it was cut off inside", ".detach()"),
        (constant, "which does not depend on the picture", "computed from `images`"),
        (ones, "for the picture and for its negative: it does not look at it", "computed from `images`"),
        (rounded, "is 0 everywhere", "rounding"),
        (broken, "is not a finite number for 1 of 1 images", "division at 0"),
        (steep, "its gradient with respect to the picture is not finite", "sqrt"),
        (
            numeric,
            "reward 'numeric' fails: RuntimeError: Can't call numpy()",
            "without numpy",
        ),
        (first_for_all, "for two pictures together", "no first row for all"),
        (centred, "for each alone", "no mean, norm or softmax over the batch"),
        (
            one_row,
            "of two pictures together: reward 'one_row' must return a tensor of shape (2,)",
            "one number for",
        ),
        (misspelt, "reward 'misspelt' fails: NameError", "correct it there"),
        (noisy, "has batch norm or dropout in training mode", ".eval()"),
        (one_number, "must return a tensor of shape (1,), not ()", "one number a row"),
        (
            ipgo.as_reward(brightness, differentiable=False),
            "declares that it has no gradient",
            "best-of-n",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_broken_rewards(backend: Backend, function: Any, text: str, advice: str) -> None:
    bad = wrong(backend, function)
    assert text in bad.text
    assert advice in bad.advice


def test_a_reward_that_changes_from_call_to_call_is_told(backend: Backend) -> None:
    """It may augment the picture at random, which is no fault."""

    def random(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3)) + torch.rand(len(images))

    found = list(examine(backend, ipgo.as_reward(random), "a fox", ipgo.Sampling(steps=2), 1))
    assert all(each.good for each in found)
    assert any("reward 'random' gives" in each.text and "asked again" in each.text for each in found)


def test_the_broken_term_of_a_sum_is_named(backend: Backend, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("def cut(images, prompts):\n    return images.detach().mean((1, 2, 3))\n")
    reward = ipgo.load_reward(f"contrast+2*{mine}:cut", device="cpu")
    found = list(examine(backend, reward, PROMPT, SAMPLING, 1))
    assert "reward 'contrast' gives" in found[2].text
    assert "reward 'cut' gives" in found[3].text
    assert [each.good for each in found] == [True, True, True, False, True]


def _spoil(backend: Backend, change: Callable[[Tensor], Tensor], part: str = "denoiser") -> Backend:
    def hook(module: Any, inputs: Any, output: Any) -> Any:
        return (change(output[0]),)

    module = backend.modules[part]
    (module if part == "denoiser" else module.decoder).register_forward_hook(  # type: ignore[union-attr]
        hook if part == "denoiser" else lambda module, inputs, output: change(output)
    )
    return backend


@pytest.mark.parametrize(
    ("part", "change", "text"),
    [
        ("denoiser", lambda output: output * float("nan"), "is not finite"),
        ("denoiser", lambda output: output.detach(), "the backend cuts it off"),
        (
            "denoiser",
            lambda output: output + 0 * (output - output.detach()).sqrt(),
            "embeddings is not finite",
        ),
        ("decoder", lambda pixels: pixels.sign() * 3, "are black or white, where no gradient passes"),
    ],
)
def test_broken_backends(make_pipe: Any, part: str, change: Any, text: str) -> None:
    spoilt = _spoil(load_backend(make_pipe(), device="cpu"), change, part)
    found = findings(spoilt, brightness)
    assert [each.good for each in found].count(False) == 1
    assert text in next(each.text for each in found if not each.good)


def test_how_much_of_a_picture_is_black_or_white(make_pipe: Any) -> None:
    def one_white_column(pixels: Tensor) -> Tensor:
        return torch.cat([pixels[..., :1] * 0 + 9, pixels[..., 1:] * 0.01], dim=-1)

    spoilt = _spoil(load_backend(make_pipe(), device="cpu"), one_white_column, "decoder")
    assert "finite; 6% of it is black or white" in findings(spoilt, brightness)[1].text  # of 16 columns


def test_a_ceiling_that_is_met_is_told(make_pipe: Any) -> None:
    backend, sampling = (
        load_backend(make_pipe(), device="cpu"),
        Sampling(steps=1, guidance_scale=2.0, fit_steps=None),
    )
    for most, met in ((0.0, True), (1e6, False)):
        reward = load_reward(f"colorfulness<={most:g}", device="cpu")
        found = list(examine(backend, reward, "a fox", sampling, 1))
        assert all(each.good for each in found)
        assert any("is met by this picture" in each.text for each in found) == met


def test_embeddings_that_are_not_looked_at(make_pipe: Any) -> None:
    pipe = make_pipe()
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "attn2.to_out" in name:
                parameter.zero_()
    (bad,) = [each for each in findings(load_backend(pipe, device="cpu"), brightness) if not each.good]
    assert "is 0 at the inserted embeddings" in bad.text
    assert "the denoiser does not look at them" in bad.advice


def test_too_little_memory(backend: Backend) -> None:
    def greedy(images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise torch.OutOfMemoryError

    found = findings(backend, greedy)
    assert "out of memory on cpu" in found[-2].text
    assert "`ipgo plan`" in found[-2].advice


def test_half_precision_is_named(make_pipe: Any) -> None:
    spoilt = _spoil(load_backend(make_pipe(), device="cpu", dtype="float16"), lambda output: output * 1e5)
    (bad,) = [each for each in findings(spoilt, brightness) if not each.good]
    assert "float16 has overflowed" in bad.text
    assert "--dtype bfloat16" in bad.advice


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--reward", "contrast", "--steps", "2", "--backprop-steps", "1"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "emoji follows contrast"
    assert "WRONG" not in out
    mine = tmp_path / "mine.py"
    mine.write_text("def cut(images, prompts):\n    return images.detach().mean((1, 2, 3))\n")
    command = ["doctor", "--reward", f"{mine}:cut", "--steps", "2", "--backprop-steps", "1"]
    assert cli.main(command) == 1
    out = capsys.readouterr().out
    assert "WRONG  reward 'cut' gives" in out
    assert "to do: look for .detach()" in out


def test_the_command_reads_prompts_and_draws_as_a_fit_is_told_to(
    pipeline_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["doctor", "--backend", pipeline_folder, "--reward", "contrast", "--steps", "2"]
    command += ["--prompt", "a " * 100]
    assert cli.main(command) == 2
    assert "long_prompts" in capsys.readouterr().err
    assert cli.main([*command, "--long-prompts", "truncate", "--scheduler", "lms", "--padding", "none"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backprop-steps", "5"], "backprop_steps is 5; it must be between 1 and 4"),
        (["--reward", "contras"], "unknown reward 'contras'; did you mean 'contrast'"),
        (["--backend", "/nowhere"], "backend folder '/nowhere' does not exist"),
        (["--steps", "0"], "sampling.steps is 0"),
        (["--prompt", " "], "prompt is empty"),
        (["--dtype", "half"], "unknown dtype 'half'"),
        (["--guidance-scale", "nan"], "guidance_scale is nan; it must be a finite number"),
        (["--image-size", "-8"], "image_size is -8; it must be between 1 and 8192"),
        (["--device", "cuda:99"], "device 'cuda:99' is not there"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And comes before any model is loaded."""
    if words[0] != "--backend":
        monkeypatch.setattr(ipgo.backends, "load_backend", None)
    assert cli.main(["doctor", *words]) == 2
    assert message in one_sentence(capsys)


def test_a_few_step_model_is_looked_at_as_it_is_drawn(
    make_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its name: one step without guidance."""
    place = tmp_path / "my-sd-turbo"
    make_pipe().save_pretrained(place)
    seen: list[Any] = []

    def noted(backend: Backend, reward: Any, prompt: str, sampling: Any, backprop_steps: int) -> Any:
        seen.append((sampling.steps, sampling.scale(backend), backprop_steps))
        return examine(backend, reward, prompt, sampling, backprop_steps)

    monkeypatch.setattr(ipgo.doctor, "examine", noted)
    command = ["doctor", "--backend", str(place), "--reward", "contrast", "--device", "cpu"]
    assert cli.main(command) == 0
    assert cli.main([*command, "--steps", "3", "--guidance-scale", "2"]) == 0
    assert seen == [(1, 1.0, 1), (3, 2.0, 2)]
    assert "through the last step: norm" in capsys.readouterr().out
