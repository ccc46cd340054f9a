"""A tiny random Stable Diffusion in memory: the real classes, 8x8 latents, milliseconds a step."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub.constants import ENDPOINT
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, GPT2Config, GPT2LMHeadModel

from ipgo import Adapter, Progress, hub
from ipgo.backends import Backend, load_backend
from tests.chat_endpoint import Endpoint, serving

WIDTH = 32
TOKENS = 77

torch.set_num_threads(1)  # these models are too small to share
os.environ.setdefault("OMP_NUM_THREADS", "1")  # nor are those of the processes that tests start
hub._answered.add(ENDPOINT)  # no test asks a real hub; those of `ipgo.hub` begin anew


def byte_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with one token for each character, inside a word or at its end."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    names = [
        *characters,
        *(f"{character}</w>" for character in characters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {name: index for index, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def tiny_pipeline(seed: int = 0, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """A `StableDiffusionPipeline` with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=len(tokenizer) - 2,
            eos_token_id=len(tokenizer) - 1,
            pad_token_id=len(tokenizer) - 1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    with torch.no_grad():  # make the text matter, as it does in a trained model
        for name, parameter in unet.named_parameters():
            if "attn2.to_out" in name or "attn2.to_v" in name:
                parameter.mul_(4)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Int8(torch.Tensor):
    """A weight in eight bits, made as torchao makes its own: nothing but `F.linear` and copies are known of it."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor) -> Int8:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, device=data.device)

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self.data8, self.scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data8", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, torch.Tensor], *_: object) -> Int8:
        return cls(parts["data8"], parts["scale"])

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.linear:
            inputs, weight, *bias = args
            return function(inputs, weight.data8 * weight.scale, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].data8, args[0].scale)
        raise NotImplementedError(f"{function} of quantised weights")


def quantised(pipe: Any, part: str = "unet") -> Any:
    """The pipeline, with the linear layers of a part in eight bits."""
    for layer in getattr(pipe, part).modules():
        if isinstance(layer, torch.nn.Linear):
            weight = layer.weight.detach()
            scale = weight.abs().amax(1, keepdim=True) / 127
            layer.weight = torch.nn.Parameter(
                Int8((weight / scale).round().to(torch.int8), scale), requires_grad=False
            )
    return pipe


@pytest.fixture(scope="session")
def pipe() -> StableDiffusionPipeline:
    """Shared by all tests: leave it as it is."""
    return tiny_pipeline()


@pytest.fixture(scope="session")
def make_pipe() -> Callable[..., StableDiffusionPipeline]:
    """`tiny_pipeline`, for a test that needs one of its own."""
    return tiny_pipeline


@pytest.fixture
def backend(pipe: Any) -> Backend:
    return load_backend(pipe, device="cpu")


@pytest.fixture
def backend64() -> Backend:
    """The same weights in float64, for finite differences and exact comparisons."""
    return load_backend(tiny_pipeline(), device="cpu", dtype="float64")


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny pipeline as a diffusers folder."""
    folder = tmp_path_factory.mktemp("tiny-pipeline")
    tiny_pipeline().save_pretrained(folder, safe_serialization=True)
    return str(folder)


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever loads a model fails, so that what is refused or written was so without one."""

    def unloadable(*arguments: object, **named: object) -> None:
        raise AssertionError("a model was loaded")

    # The backends last: what is first imported now would keep the stand-in.
    for name in ("load_backend", "load_reward", "load_models", "_load_judge"):
        monkeypatch.setattr(f"ipgo.models.{name}", unloadable)
    monkeypatch.setattr("ipgo.backends.load_backend", unloadable)


class Terminal(io.StringIO):
    """A standard stream with a person at it."""

    def isatty(self) -> bool:
        return True


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line has said on stderr, which is one line of its own."""
    error = capsys.readouterr().err
    assert error.startswith("ipgo: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    return error


def assert_same_state(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """The same names with the same bits; what is no number is alike."""
    torch.testing.assert_close(dict(ours), dict(theirs), rtol=0, atol=0, equal_nan=True)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def difference_quotient(
    value: Callable[[], torch.Tensor],
    parameters: Sequence[torch.Tensor],
    directions: Sequence[torch.Tensor],
    step: float = 1e-6,
) -> torch.Tensor:
    """The slope of `value()` along the directions, in which the parameters are moved a step each way and put back."""
    starts, found = [parameter.detach().clone() for parameter in parameters], []
    with torch.no_grad():
        for length in (step, -step, 0.0):
            for parameter, start, direction in zip(parameters, starts, directions, strict=True):
                parameter.copy_(start + length * direction)
            if length:
                found.append(value())
    return (found[0] - found[1]) / (2 * step)


def redness(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def brightness(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """A reward whose slope is not the same everywhere."""
    return images.square().mean((1, 2, 3))


def progress(step: int, rewards: Sequence[float] | torch.Tensor = (1.0, 2.0), total: int = 4) -> Progress:
    """What a fit says after a step, with one reward for each prompt."""
    values = torch.as_tensor(rewards)
    return Progress(
        step=step,
        total=total,
        rewards=values,
        best=values,
        penalty=values / 10,
        grad_norm=values * 10,
        failed=torch.zeros(len(values), dtype=torch.bool),
        images=None,
        adapter=Adapter(),
        state=lambda: {"step": torch.tensor(step), "values": values},
    )


def put_into_cache(cache: Path, repo: str, source: Path, *names: str, revision: str = "main") -> None:
    """What the hub's client leaves of a repository, for it to find offline: a whole folder, or a file under a name."""
    place = cache / f"models--{repo.replace('/', '--')}"
    commit = f"{len(revision):040}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(commit)
    snapshot = place / "snapshots" / commit
    if source.is_dir():
        shutil.copytree(source, snapshot, dirs_exist_ok=True)
    for name in names:
        snapshot.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, snapshot / name)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Endpoint]:
    """A chat server on loopback that the environment points at, with an empty store of answers."""
    with serving() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("IPGO_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.fixture(scope="session")
def rewriter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GPT2LMHeadModel]:
    """A folder with a tiny random GPT-2, over the characters of the tiny pipeline's tokenizer, and that model."""
    folder, tokenizer = tmp_path_factory.mktemp("rewriter"), byte_tokenizer()
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    config = GPT2Config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **size)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform, so that beams differ
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model
