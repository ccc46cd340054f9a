"""`ipgo.fit`: a run from Python, and what came of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ipgo import files
from ipgo.adapters import Adapter
from ipgo.backends import BACKENDS, Backend, as_they_were, few_steps, load_backend
from ipgo.config import RunConfig
from ipgo.defaults import method_and_sampling, reward_for
from ipgo.devices import own_numbers
from ipgo.errors import InputError
from ipgo.evaluation import Gain, Score, summarise
from ipgo.files import is_hub_id
from ipgo.models import judging_rewards, load_models
from ipgo.preflight import check, check_method
from ipgo.rewards import REWARDS, FunctionReward, Reward, RewardFunction, as_reward
from ipgo.runner import run
from ipgo.sampling import Sampling
from ipgo.seeding import plain
from ipgo.store import Run
from ipgo.task import Method
from ipgo.tracking import check_tracker, tracked


@dataclass(frozen=True)
class Fitted:
    """The result for one prompt.

    Attributes:
        prompt: its text.
        adapter: what was learned for it; shared: for all prompts.
        before, after: its images by seed, fitted and unseen, each read when it is asked for; with the method raw,
            `after` is empty.
        history: one dict per step: step, reward, penalty, grad_norm, best, over, seconds and calls (see `Run.record`).
        scores: those of its images.
        failed: whether it was given up because its reward or gradient was not finite.
    """

    prompt: str
    adapter: Adapter = field(repr=False)
    before: Mapping[int, Image.Image] = field(repr=False)
    after: Mapping[int, Image.Image] = field(repr=False)
    history: list[dict[str, Any]] = field(repr=False)
    scores: list[Score] = field(repr=False)
    failed: bool


@dataclass(frozen=True)
class Result(Sequence[Fitted]):
    """What `fit` made: a sequence with one `Fitted` for each prompt, and the means over all of them.

    Attributes:
        fitted: one for each prompt, in their order.
        on_fitted_seeds, on_unseen_seeds: gains by reward; the second are the honest ones. Of a method whose result is
            tied to its noise (reno, dno, best-of-n) these are 0, since other noise is drawn as it is; on fresh noise
            (no seeds) the first are empty.
        rewards: what decides the scores, by reward: scores of another reward are not comparable with these.
        path: the run's folder, or None if it was not kept.
    """

    fitted: tuple[Fitted, ...]
    on_fitted_seeds: list[Gain]
    on_unseen_seeds: list[Gain]
    rewards: dict[str, Any] = field(repr=False)
    path: Path | None

    def __len__(self) -> int:
        return len(self.fitted)

    def __getitem__(self, index: Any) -> Any:
        return self.fitted[index]


def fit(
    prompts: str | Sequence[str],
    *,
    reward: str | Reward | None = None,
    backend: str | Path | Backend | object = "emoji",
    method: str | Method = "ipgo",
    held_out: Sequence[str | RewardFunction] | None = None,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    unseen_seeds: int = 4,
    seed: int = 0,
    shared: bool = False,
    judged_prompts: int | None = None,
    chunk: int = 4,
    out: str | Path | None = None,
    track: str | None = None,
    device: str | torch.device = "auto",
) -> Result:
    """Maximise a reward for some prompts, and evaluate the result on unseen noise.

    Args:
        prompts: one prompt or several.
        reward: a spec as in `load_reward`, or any function (images (B, 3, H, W) in [0, 1], prompts) -> (B,); None: what
            the bundled model's images are meant to be, or hpsv2.1 for others (see `defaults.reward_for`).
        backend: a name, folder, file or hub id, a pipeline object of diffusers (which is frozen until this
            returns), or what `load_backend` made of one, for its other options.
        method: a name of `ipgo list methods`, with its defaults, or an object such as IPGO(ascent=Ascent(steps=20)).
        held_out: rewards that only judge the result, specs or functions; None: those that come with the backend.
        sampling: None: 20 steps, or what a few-step model needs (see `defaults.method_and_sampling`).
        seeds: noise seeds, which gradient steps use in turn; empty: fresh noise at every step. None: 0 to 3, or only 0
            for a method that learns the noise or prefers a single seed.
        unseen_seeds, seed, shared, judged_prompts, chunk: see `RunConfig`.
        out: folder to keep the run in; an unfinished run there is continued. None keeps nothing.
        track: a tracker that is told of each step too: tensorboard, wandb or trackio.
        device: auto, cpu, cuda or cuda:N, or a torch.device.

    Returns:
        One `Fitted` per prompt (with `judged_prompts`: per judged one), and the gains over all of them.

    Raises:
        InputError: settings or prompts that cannot work. RewardError: a reward that breaks its contract.
        ResumeError: `out` holds a run with other settings or models; `InUseError` if other processes are at it.
        MissingExtraError: a package is missing.
    """
    given_backend = backend if isinstance(backend, Backend) else None
    if not isinstance(backend, str | Path | Backend):
        with as_they_were(backend):
            given_backend = load_backend(backend, device=device)
    name = str(backend) if given_backend is None else _origin_of(given_backend)
    reward = reward_for(name) if reward is None else reward
    judges = None if held_out is None else _several("held_out", held_out)
    given = _own_rewards((reward, *(judges or ())))
    own_method, own_sampling = method_and_sampling(
        few_steps(name) if given_backend is None else given_backend.few_steps, method, sampling
    )
    config = RunConfig(
        prompts=_several("prompts", prompts),
        method=own_method,
        backend=name,
        reward=_name(reward),
        held_out=None if judges is None else tuple(map(_name, judges)),
        sampling=own_sampling,
        seeds=None if seeds is None else tuple(plain(_several("seeds", seeds))),  # type: ignore[arg-type]
        unseen_seeds=unseen_seeds,
        seed=seed,
        shared=shared,
        judged_prompts=judged_prompts,
        chunk=chunk,
        device=str(device),
        **({} if given_backend is None else asdict(given_backend.opening)),
    )
    _check_names(given, (reward, *(judging_rewards(config) if judges is None else judges)))
    check(config, given, loaded=given_backend is not None)
    given_pipe = None if given_backend is None else given_backend.pipe
    with (
        tempfile.TemporaryDirectory() as temporary,
        torch.inference_mode(False),
        own_numbers(),
        as_they_were(given_pipe),
    ):
        kept = None if out is None else files.place("out", out)
        check_tracker(track, kept)
        folder = Run.open(kept or Path(temporary) / "run", config)
        check_method(folder)
        models = load_models(config, given_backend, given, folder.dtype)
        if run(folder, models, tracked(track, folder)):
            raise folder.in_use()
        return result_of(folder, kept)


def _name(reward: str | RewardFunction | Reward) -> str:
    return reward if isinstance(reward, str) else as_reward(reward).name


def _own_rewards(rewards: Iterable[str | RewardFunction | Reward]) -> dict[str, Reward]:
    """Those that are not specs, by name, which a spec may repeat; `InputError` for two of one name."""
    own: dict[str, Reward] = {}
    for each in rewards:
        if isinstance(each, str):
            continue
        found = as_reward(each)
        if own.setdefault(found.name, found) != found:
            raise InputError(
                f"two rewards are called {found.name!r}; rename one with as_reward(function, name)"
            )
    return own


def _check_names(own: Mapping[str, Reward], asked: Iterable[str | RewardFunction | Reward]) -> None:
    """Raise `InputError` for a function that has the name of a reward of ipgo's, where that is asked for, too."""
    for name in (each for each in asked if isinstance(each, str)):
        if name in REWARDS and isinstance(own.get(name), FunctionReward):
            raise InputError(
                f"two rewards are called {name!r}, one of them ipgo's own; rename yours with as_reward(function, name)"
            )


def _origin_of(backend: Backend) -> str:
    """Where a backend can be opened again, if its pipeline says so; else what it is."""
    if backend.name in BACKENDS:
        return backend.name
    known = Path(backend.origin).is_absolute() or is_hub_id(backend.origin)
    return backend.origin if known else backend.name


def _several(name: str, values: Any) -> tuple[Any, ...]:
    """One text or a sequence of things."""
    if isinstance(values, str):
        return (values,)
    if not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise InputError(f"{name} is {values!r}; it must be a sequence")
    return tuple(values)


def result_of(folder: Run, path: Path | None = None) -> Result:
    """Read a finished run back."""
    config, scores = folder.config, folder.scores()
    fitted, learned = [], None
    for prompt, stored in zip(folder.judged, folder.results(), strict=True):
        before, after = (folder.images(prompt, when) for when in ("before", "after"))
        if path is None:  # the folder will be gone
            before, after = before.held(), after.held()
        own = folder.scores_of(stored)
        if learned is None or not config.shared:
            learned = folder.load_adapter(prompt), folder.history(prompt)
        adapter, history = learned
        fitted.append(Fitted(prompt.text, adapter, before, after, history, own, stored["status"] == "failed"))
    return Result(
        tuple(fitted),
        summarise(scores, seeds=config.seeds),
        summarise(scores, seeds=config.new_seeds),
        folder.identities,
        path,
    )
