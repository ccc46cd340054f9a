"""The loop of policy gradients: draw trajectories, and make the better ones likelier (arXiv 2305.13301)."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from ipgo.adapters import WeightAdapter
from ipgo.ascent import adam_state
from ipgo.embeds import PromptEmbeds
from ipgo.errors import InputError
from ipgo.ppo import PPO, advantages, log_probability, surrogate
from ipgo.resume import all_tensors, copied, fill
from ipgo.rewards import score
from ipgo.sampling import ddim_step, decode, denoise, need_ddim, unconditional
from ipgo.seeding import derive, generator, shuffled
from ipgo.task import FRESH, Progress, Task
from ipgo.training import FLOAT16_SCALE, PATIENCE


def reinforce(
    task: Task, adapter: WeightAdapter, ppo: PPO, resume: Mapping[str, Tensor] | None = None
) -> Iterator[Progress]:
    """Raise the probability of what was rewarded above average, with PPO; yield each epoch.

    Each denoising step is an action of a Gaussian policy, whose mean depends on the weights in `adapter`. The
    reward needs no gradient. Trajectories start from noise of their own, derived for each of them, and not from
    the task's seeds. So rewards of different epochs cannot be compared: `Progress.rewards` are the means of an
    epoch's images (shared: of each prompt's last visit), and its adapter is what was learned from them: the last
    epoch that a budget pays for counts too.

    An epoch whose rewards or gradients are not finite sends the adapter back to the last one that drew finite
    rewards; three in a row end the fit. In float16 the loss is multiplied by a power of two, as in `maximize`.

    Args:
        resume: what `Progress.state()` returned; the fit goes on with the same bits.

    Raises:
        InputError: a scheduler other than DDIM, no step that draws noise, or a shared fit among the processes of
        torch.distributed, which are not averaged over. RewardError: a reward that breaks
        its contract. ResumeError: a state of another fit.
    """
    if task.shared and distributed.is_available() and distributed.is_initialized():
        raise InputError("ddpo fits one adapter for all prompts in one process; torch.distributed is up")
    training = _Training(task, adapter, ppo)
    if resume is not None:
        training.load(resume)
    return training.run()


@dataclass(frozen=True)
class Transition:
    """A step of B trajectories, from `latents` to `next_latents` (B, C, h, w), and its log-probability (B,)."""

    timestep: Tensor
    latents: Tensor
    next_latents: Tensor
    log_probability: Tensor


@dataclass(frozen=True)
class Batch:
    """B trajectories that were drawn in one pass: of which prompts (B,), and what came of them.

    They are learned from in one pass too. The same call gives the same numbers, so the ratio of probabilities
    is exactly 1 before the first update, also in half precision.
    """

    numbers: Tensor
    cond: PromptEmbeds
    uncond: PromptEmbeds | None
    transitions: list[Transition]
    image: Tensor  # (1, 3, H, W), of the first trajectory
    rewards: Tensor  # (B,) float32, on the CPU


class _Training:
    """The state of one fit."""

    def __init__(self, task: Task, adapter: WeightAdapter, ppo: PPO) -> None:
        self.task, self.ppo, self.backend = task, ppo, task.backend
        self.sampling = dataclasses.replace(task.sampling, eta=ppo.eta)
        still = torch.zeros(1, *self.backend.latent_shape, device=self.backend.device)
        self.scheduler = self.backend.scheduler(self.sampling.steps, still)
        need_ddim(self.scheduler, "ppo.eta")
        if not any(self._policy(still, time, still)[1] > 0 for time in self.scheduler.timesteps):
            raise InputError(
                f"sampling.steps is {self.sampling.steps}; none of them draws noise to learn from"
            )
        self.adapter = adapter.to(self.backend.device)
        self.kept = copy.deepcopy(self.adapter).requires_grad_(False)
        # After the last whole epoch: a budget may break the next one off.
        self.ready = copy.deepcopy(self.kept)
        with torch.no_grad():
            self.original = task.encoded()
            self.uncond = unconditional(self.backend, self.original, self.sampling)
        nan = torch.full((len(task.prompts),), math.nan)
        # Everything that lives from epoch to epoch besides the parameters and the optimiser's moments.
        self.memory = {
            "epoch": torch.zeros((), dtype=torch.long),
            "rewards": nan.clone(),
            "best": nan.clone(),
            "recent": nan[:, None].repeat(1, ppo.history),
            "misses": torch.zeros((), dtype=torch.long),
            "updates": torch.zeros((), dtype=torch.long),
            "loss_scale": torch.tensor(FLOAT16_SCALE if self.backend.dtype == torch.float16 else 1.0),
        }
        self.parameters = dict(self.adapter.named_parameters())
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=ppo.lr, weight_decay=ppo.weight_decay)
        for parameter in self.parameters.values():
            self.optimizer.state[parameter] = adam_state(parameter)

        self.patience = min(PATIENCE, ppo.epochs)

    def run(self) -> Iterator[Progress]:
        for epoch in range(int(self.memory["epoch"]), self.ppo.epochs):
            with self.adapter.attached(self.backend, self.task.prompts):
                batches = self._sample(epoch)
                drawn = self._remember(batches)
                norms = self._learn(epoch, batches) if drawn else [math.nan]
            if all(map(math.isfinite, norms)):
                self.memory["misses"].zero_()
            else:
                self._go_back(overflow=drawn and bool(self.memory["loss_scale"] > 1))
            self.memory["epoch"] += 1
            self.ready.load_state_dict(self.adapter.state_dict())
            yield self._progress(sum(norms) / len(norms), batches[0].image)
            if self.memory["misses"] >= self.patience:
                return

    def _policy(self, prediction: Tensor, timestep: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a step; the latter is 0 for a last step that ends at alpha 1."""
        return ddim_step(self.scheduler, prediction, timestep, latents, self.ppo.eta)

    @torch.no_grad()
    def _sample(self, epoch: int) -> list[Batch]:
        """Draw the trajectories of an epoch, the next ones of an endless sequence of shuffled passes."""
        count, samples = len(self.task.prompts), self.ppo.samples
        places = torch.arange(epoch * samples, (epoch + 1) * samples)
        numbers = shuffled(count, epoch * samples, samples, self.task.seed)
        size = self.ppo.batch_size
        parts = zip(torch.split(numbers, size), torch.split(places, size), strict=True)
        return [self._draw(*part) for part in parts]

    def _draw(self, numbers: Tensor, places: Tensor) -> Batch:
        prompts = [self.task.prompts[number] for number in numbers]
        drawn = zip(prompts, places.tolist(), strict=True)
        seeds = [derive(self.task.seed, "trajectory", prompt, place) for prompt, place in drawn]
        rows = numbers.to(self.backend.device)
        cond = self.original.select(rows)  # a LoRA of the denoiser leaves prompts as they are
        uncond = None if self.uncond is None else self.uncond.select(rows)
        noise = self.backend.noise(seeds, self.sampling.noise_steps(self.backend))
        transitions = []
        for step in denoise(self.backend, cond, uncond, noise, self.sampling):
            mean, std = self._policy(step.prediction, step.timestep, step.latents)
            # A step that draws no noise has no density, and so no log-probability to differentiate: it takes
            # part in the image, not in the learning.
            if std > 0:
                chance = log_probability(step.next_latents, mean, std)
                transitions.append(Transition(step.timestep, step.latents, step.next_latents, chance))
        images = decode(self.backend, step.next_latents)
        rewards = score(self.task.reward, images, prompts).cpu().float()
        return Batch(numbers, cond, uncond, transitions, images[:1].clone(), rewards)

    def _remember(self, batches: list[Batch]) -> bool:
        """Note the mean reward of each prompt; keep the parameters, and say so, if all rewards are finite."""
        rewards, numbers = _all(batches)
        for number in torch.unique(numbers).tolist():
            self.memory["rewards"][number] = rewards[numbers == number].mean()
        finite = bool(rewards.isfinite().all())
        if finite:
            self.memory["best"].copy_(self.memory["rewards"])
            self.kept.load_state_dict(self.adapter.state_dict())
        return finite

    def _learn(self, epoch: int, batches: list[Batch]) -> list[float]:
        """All updates of an epoch: the norm of each gradient; one that is not finite is the last."""
        values, recent = advantages(*_all(batches), self.memory["recent"], self.ppo.min_history)
        self.memory["recent"].copy_(recent)
        limit = self.ppo.max_advantage
        values = values.clamp(-limit, limit).to(self.backend.device)
        parts = torch.split(values, self.ppo.batch_size)
        norms = []
        for inner in range(self.ppo.inner_epochs):
            order = torch.randperm(
                len(batches), generator=generator(derive(self.task.seed, "order", epoch, inner))
            )
            for group in torch.split(order, self.ppo.accumulate):
                norms.append(self._update([(batches[number], parts[number]) for number in group.tolist()]))
                if not math.isfinite(norms[-1]):
                    return norms
        return norms

    def _update(self, group: list[tuple[Batch, Tensor]]) -> float:
        """An optimiser step along the mean gradient over all trajectories and steps: its norm before clipping."""
        scale, terms = float(self.memory["loss_scale"]), 0
        self.optimizer.zero_grad()
        for batch, values in group:
            for step in batch.transitions:
                with torch.enable_grad():
                    now = self._log_probability(batch, step)
                    gains = surrogate(now, step.log_probability, values, self.ppo.clip_range)
                    torch.autograd.backward(-scale * gains.sum())
                terms += len(gains)
        for parameter in self.parameters.values():
            assert parameter.grad is not None
            parameter.grad /= scale * terms
        longest = math.inf if self.ppo.max_grad_norm is None else self.ppo.max_grad_norm
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), longest)
        if norm.isfinite():
            self.optimizer.step()
            self.memory["updates"] += 1
        return norm.item()

    def _log_probability(self, batch: Batch, step: Transition) -> Tensor:
        """(B,): of a step that was taken, under the parameters as they are now; of the guided prediction."""
        prediction = self.backend.predict(
            self.scheduler.scale_model_input(step.latents, step.timestep),
            step.timestep,
            batch.cond,
            batch.uncond,
            self.sampling.scale(self.backend),
        )
        mean, std = self._policy(prediction, step.timestep, step.latents)
        return log_probability(step.next_latents, mean, std)

    def _go_back(self, overflow: bool) -> None:
        """To the parameters that last drew finite rewards, without momentum; `overflow`: a smaller scale may do.

        Adam's second moments stay, as in `maximize`.
        """
        self.adapter.load_state_dict(self.kept.state_dict())
        for parameter in self.parameters.values():
            self.optimizer.state[parameter]["exp_avg"].zero_()
        if overflow:
            self.memory["loss_scale"].div_(2)
        else:
            self.memory["misses"] += 1

    def _progress(self, norm: float, images: Tensor) -> Progress:
        memory, count = self.memory, len(self.task.prompts)
        learned = memory["updates"] > 0  # in float16 every gradient may have been too large
        given_up = memory["misses"] >= self.patience
        over = memory["epoch"] == self.ppo.epochs
        return Progress(
            step=int(memory["epoch"]),
            total=self.ppo.epochs,
            rewards=memory["rewards"].clone(),
            best=torch.where(learned, memory["best"], math.nan),
            penalty=torch.zeros(count),
            grad_norm=torch.full((count,), norm),
            failed=(given_up | (over & ~learned)).expand(count),
            images=None if self.task.shared else images,
            adapter=self.ready,
            state=self.state,
            over=FRESH,
            keeps_best=False,
        )

    def _tensors(self) -> dict[str, Tensor]:
        return all_tensors(self.memory, self.adapter, self.kept, self.optimizer)

    def state(self) -> dict[str, Tensor]:
        return copied(self._tensors())

    def load(self, state: Mapping[str, Tensor]) -> None:
        fill(self._tensors(), state)


def _all(batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Rewards and prompt numbers of all trajectories (S,)."""
    return torch.cat([batch.rewards for batch in batches]), torch.cat([batch.numbers for batch in batches])
