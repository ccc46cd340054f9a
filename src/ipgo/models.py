"""What a run computes with: a backend, rewards and the judge."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ipgo import __version__
from ipgo.backends import Backend, load_backend
from ipgo.backends.few_steps import spaced_as_turbo
from ipgo.config import RunConfig
from ipgo.devices import choose_device
from ipgo.errors import InputError
from ipgo.evaluation import VERDICT, Judge
from ipgo.rewards import Reward, identity_of, is_unsettled, load_reward, terms_of
from ipgo.vocabulary import draws_bundled_world

BUNDLED_REWARDS = ("emoji-preference", "emoji-clip", "emoji-aesthetic")
logger = logging.getLogger("ipgo")


@dataclass(frozen=True)
class Models:
    """What a run computes with: `rewards` holds the optimised reward, what it adds up, and those held out, by name."""

    backend: Backend
    reward: Reward
    rewards: Mapping[str, Reward]
    judge: Judge | None

    @functools.cached_property
    def identities(self) -> dict[str, Any]:
        """What decides the scores, by reward and verdict of the judge; JSON's own types, as they are read back."""
        verdicts = {} if self.judge is None else self.judge.identities
        own = {name: identity_of(reward) for name, reward in self.rewards.items()}
        own |= {f"{VERDICT}{name}": each for name, each in verdicts.items()}
        found: dict[str, Any] = json.loads(json.dumps(own))
        return found


def load_models(
    config: RunConfig,
    backend: Backend | None = None,
    given: Mapping[str, Reward] | None = None,
    begun_in: str | None = None,
) -> Models:
    """Load what the settings name, or take what is given; refuse prompts that the backend cannot take.

    Args:
        given: rewards that no name can load, by the names that the settings have for them.
        begun_in: the format of a run that is continued: its own, where the settings leave it to the device.
    """
    taken = [name for name in (config.reward, *judging_rewards(config)) if re.fullmatch("judge-[a-z]+", name)]
    if taken and draws_bundled_world(config.backend):
        raise InputError(f"reward {taken[0]!r} has a name reserved for the judge's verdicts; give it another")
    dtype = begun_in if config.dtype == "auto" and begun_in else config.dtype
    backend = backend or load_backend(
        config.backend, device=config.device, dtype=dtype, **asdict(config.opening)
    )
    check_loaded(config, backend)
    return with_rewards(config, backend, given)


def check_loaded(config: RunConfig, backend: Backend) -> None:
    """Refuse what an open backend cannot take of the settings, and warn of what it cuts or is not meant for."""
    backend.check_current()
    config.sampling.check(backend)  # all steps: a fit that draws in fewer would notice after it
    backend.check_prompts(config.prompts)
    if config.sampling.negative_prompt:
        backend.check_prompts([config.sampling.negative_prompt], "sampling.negative_prompt")
    for text in backend.truncated(config.prompts):
        logger.warning(
            "prompt %r is cut to the %d tokens that the encoder takes", text[:60], backend.max_tokens
        )
    for text in backend.half_read(config.prompts):
        logger.warning(
            "of prompt %r CLIP takes the beginning alone, as in the stock pipeline; the longer encoder takes it all",
            text[:60],
        )
    config.check_width(backend.embed_dim)
    config.check_steps(config.sampling.for_fit(backend).steps)
    few = backend.few_steps  # of a hub id that did not say so: its defaults were those of other models
    if few is not None and config.sampling.steps > 2 * few.steps:
        logger.warning(
            "%s is a few-step model, and sampling.steps is %d; it is meant for --preset few-step --sampling.steps %d "
            "--sampling.guidance_scale %g",
            *(backend.name, config.sampling.steps, few.steps, few.guidance_scale),
        )
    if few is None and config.sampling.steps > 4 and spaced_as_turbo(backend.pipe):
        logger.warning(
            "%s has the scheduler of SD-Turbo and SDXL-Turbo; if it is such a model, it is meant for --preset few-step "
            "--sampling.steps 1 --sampling.guidance_scale 1",
            backend.name,
        )


def with_rewards(config: RunConfig, backend: Backend, given: Mapping[str, Reward] | None = None) -> Models:
    """An open backend with the rewards that the settings name, and the judge that comes with it.

    Args:
        given: as in `load_models`.
    """
    # Where a backend was given that stays where it is, its pictures are there.
    device = backend.device if config.device == "auto" else choose_device(config.device)
    rewards = _load_rewards(config, device, given or {})
    judge = _load_judge(device) if draws_bundled_world(config.backend) else None
    models = Models(backend, rewards[config.reward], rewards, judge)
    _ = models.identities  # before a call can change anything
    return models


def _load_rewards(
    config: RunConfig, device: str | torch.device, given: Mapping[str, Reward]
) -> dict[str, Reward]:
    """The optimised reward, what it adds up, then those that only judge, by name."""
    own = given[config.reward] if config.reward in given else load_reward(config.reward, device=device)
    rewards = {config.reward: own} | terms_of(own)
    for name in judging_rewards(config):
        if name not in rewards:
            rewards[name] = given[name] if name in given else load_reward(name, device=device)
    for name in (name for name, each in rewards.items() if is_unsettled(each)):
        logger.warning(
            "reward %r has batch norm or dropout in training mode, so its numbers do not depend on the picture alone; "
            "call .eval() on the module",
            name,
        )
    return rewards


def judging_rewards(config: RunConfig) -> tuple[str, ...]:
    """The rewards that only judge: those asked for, or those that come with the backend."""
    return bundled_rewards(config.backend) if config.held_out is None else config.held_out


def bundled_rewards(backend: str) -> tuple[str, ...]:
    """Those that come with a backend: with the bundled model, and with a folder that says it draws its world."""
    return BUNDLED_REWARDS if draws_bundled_world(backend) else ()


def _load_judge(device: torch.device) -> Judge:
    """The judge of the bundled model's world; backends that draw another have none."""
    from ipgo.rewards import emoji

    judge: Judge = emoji.load_judge(device)
    return judge


def facts(models: Models) -> dict[str, Any]:
    """What a reader of the results wants to know besides the settings, and what must stay the same to continue them."""
    backend = models.backend
    packages = ("torch", "diffusers", "transformers")
    cuda = backend.device.type == "cuda"
    return {
        "versions": {"ipgo": __version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name(backend.device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        **backend.identity,
        "guidance_scale": backend.guidance_scale,  # where the settings leave it to the backend
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "rewards": models.identities,
    }
