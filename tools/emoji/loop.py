"""One training loop for all parts: seeded by step, checkpointed in safetensors, resumable at any moment."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tools.emoji.sprites import BUILD, replacing

Figures = dict[str, Tensor]  # scalars; read only when they are logged, since a GPU would be waited for
Loss = Callable[
    [np.random.Generator, int], tuple[Tensor, Figures]
]  # of one step, given the size of its batch
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHECKPOINT_SECONDS = 120
# A CPU without instructions for it computes in bfloat16 many times slower than in float32.
HALF = DEVICE.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def mixed() -> torch.autocast:
    """A context for forward passes: bfloat16 where the machine is faster in it."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=HALF)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a part trains: linear warm-up, then cosine decay to zero."""

    steps: int
    batch: int
    lr: float
    warmup: int = 200
    weight_decay: float = 0.01
    ema: float = 0.0  # decay of the averaged weights that are kept; 0: none
    seconds: float | None = None  # end after that time instead, however often resumed; not reproducible

    def rate(self, step: int, elapsed: float) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.seconds is None:
            done = (step - self.warmup) / max(1, self.steps - self.warmup)
        else:
            done = min(1.0, elapsed / self.seconds)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))

    def over(self, steps: int, elapsed: float) -> bool:
        """Is training done after so many steps and seconds?"""
        return steps >= self.steps if self.seconds is None else elapsed >= self.seconds


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer.{index}.{key}": value
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def _save(path: Path, tensors: dict[str, Tensor], step: int, **told: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {key: str(value) for key, value in {"step": step, **told}.items()}
    with replacing(path) as unfinished:
        save_file(tensors, unfinished, metadata=metadata)


def _path(name: str) -> Path:
    return BUILD / "checkpoints" / f"{name}.safetensors"


def _told(name: str) -> dict[str, str]:
    """What a checkpoint says of itself: step, origin; and where it was trained schedule, seconds, and if it is done."""
    with safe_open(_path(name), "pt") as file:
        return dict(file.metadata())


def _resume(
    path: Path, module: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> int:
    step, tensors = int(_told(path.stem)["step"]), load_file(path)
    state = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    module.load_state_dict(state, strict=step > 0)  # the package's weights lack what only training needs
    for name in average:
        average[name].copy_(tensors.get(f"average.{name}", module.state_dict()[name]))
    if step == 0:
        return step
    found = optimizer.state_dict()
    found["state"] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            found["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(found)
    return step


def train(
    name: str,
    module: nn.Module,
    loss: Loss,
    schedule: Schedule,
    seed: int = 0,
    origin: nn.Module | None = None,
    learns_from: str = "",
) -> bool:
    """Train `module` in place; `loss(rng, batch)` gives the loss of one step and figures for the log. Was there a step?

    The random numbers of a step depend on `seed` and the step alone, so a resumed run equals a straight one. `origin`
    is what was trained before and is trained further here: if it has changed since, this begins again. `learns_from` is
    the digest of what a part only learns from: if it has changed, the schedule begins again, from the part's weights.
    It also does when training was stopped under another schedule; one that is done stays so whatever its schedule was.
    `SystemExit` if the loss is not finite: nothing is saved then.
    """
    path, begins = _path(name), learns_from if origin is None else digest(origin.state_dict())
    if done(name, begins):
        trained(name, module)
        return False
    module.to(DEVICE).train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, schedule.lr, betas=(0.9, 0.98), weight_decay=schedule.weight_decay, fused=True
    )
    average = {k: v.detach().clone() for k, v in module.state_dict().items()} if schedule.ema else {}
    told = _told(name) if path.exists() else {}
    if told and (told.get("origin") or begins) != begins:
        if origin is not None:
            print(f"{name}: what it continues from has changed, so it begins again", flush=True)
            told = {}
        else:
            print(f"{name}: what it learns from has changed, so it is trained further", flush=True)
            told = _renewed(name, begins)
    elif told and told["step"] != "0" and told.get("schedule") != str(schedule):
        stopped = f"stopped at step {told['step']} of another schedule"
        print(f"{name}: {stopped}, so a new one continues from its weights", flush=True)
        told = _renewed(name, begins)
    start = _resume(path, module, average, optimizer) if told else 0
    log = _log(name, start)
    saved = shown = time.monotonic()
    logged = start
    began = saved - float(told.get("seconds", 0))
    step, last = start, schedule.over(start, saved - began)
    while not last:
        rng = np.random.default_rng((seed, step))
        torch.manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step, time.monotonic() - began)
        value, figures = loss(rng, schedule.batch)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if schedule.ema:
            with torch.no_grad():
                share = 1 - min(schedule.ema, (step + 1) / (step + 10))
                torch._foreach_lerp_(list(average.values()), list(module.state_dict().values()), share)
        step += 1
        now = time.monotonic()
        last = schedule.over(step, now - began)
        show, keeping = step % 50 == 0 or last, now - saved > CHECKPOINT_SECONDS or last
        if (show or keeping) and not (value.isfinite() and norm.isfinite()):
            raise SystemExit(
                f"{name}: at step {step} the loss is {value.item():g} and its gradient's norm {norm.item():g}, which "
                "must be finite; this is not saved, and a smaller learning rate may help"
            )
        if show:
            row = {"step": step}
            for key, figure in {"loss": value, "norm": norm, **figures}.items():
                row[key] = round(figure.detach().item(), 5)
            row["per_second"] = round((step - logged) * schedule.batch / (now - shown), 1)
            shown, logged = now, step
            with log.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
        if keeping:
            tensors = {f"model.{k}": v for k, v in module.state_dict().items()}
            tensors |= {f"average.{k}": v for k, v in average.items()}
            tensors |= _optimizer_tensors(optimizer)
            _save(path, tensors, step, origin=begins, schedule=schedule, seconds=now - began, done=last)
            saved = now
    if schedule.ema:
        module.load_state_dict(average)
    module.eval().requires_grad_(False)
    return step > start


def _log(name: str, start: int) -> Path:
    """The log of a stage, without the rows after the step that it goes on from: those steps are done again."""
    log = BUILD / "logs" / f"{name}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = log.read_text().splitlines(keepends=True) if start and log.exists() else []
    log.write_text("".join(line for line in lines if json.loads(line)["step"] <= start))
    return log


def save(name: str, module: nn.Module) -> None:
    """Keep a part of a larger network under a name of its own, for `trained`."""
    keep(name, module.state_dict())


def keep(name: str, state: Mapping[str, Tensor], origin: str = "") -> None:
    """The same for bare tensors. A stage of this name starts its schedule from them, if `origin` is still its own."""
    _save(_path(name), {f"model.{k}": v.float().clone() for k, v in state.items()}, 0, origin=origin)


def _renewed(name: str, origin: str) -> dict[str, str]:
    """Keep a part's weights alone, so that a schedule begins from them; and what the checkpoint says then."""
    keep(name, weights(name), origin)
    return _told(name)


def renew(name: str) -> None:
    """Let a new schedule continue from a stage's weights, if it is done."""
    if done(name):
        print(f"{name} is done; a new schedule continues from its weights", flush=True)
        _renewed(name, _told(name)["origin"])


def exists(name: str) -> bool:
    """Is there a checkpoint?"""
    return _path(name).exists()


def done(name: str, origin: str | None = None) -> bool:
    """Has a stage come to the end of a schedule, from this origin (or from any)?"""
    told = _told(name) if exists(name) else {}
    return told.get("done") == "True" and (origin is None or (told["origin"] or origin) == origin)


def newest(name: str) -> str:
    """The last of a part's rounds of further training that is done ("NAME-2"), or the part itself.

    A round that went on from other weights than the one before it has now does not count.
    """
    found = name
    rounds = [path.stem.rpartition("-") for path in (BUILD / "checkpoints").glob(f"{name}-*.safetensors")]
    for number in sorted(int(number) for of, _, number in rounds if of == name and number.isdigit()):
        each = f"{name}-{number}"
        if done(each) and _told(each)["origin"] == digest(weights(found)):
            found = each
    return found


def weights(name: str) -> dict[str, Tensor]:
    """The latest checkpoint of a part, averaged where it has an average."""
    path = _path(name)
    if not path.exists():
        raise FileNotFoundError(f"no {path}: train the stage {name!r} first")
    tensors = load_file(path)
    prefix = "average." if any(k.startswith("average.") for k in tensors) else "model."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def digest(state: Mapping[str, Tensor]) -> str:
    """The same for the same weights."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def trained(name: str, module: nn.Module) -> nn.Module:
    """Load the latest checkpoint of a part, frozen."""
    module.load_state_dict(weights(name))
    return module.to(DEVICE).eval().requires_grad_(False)
