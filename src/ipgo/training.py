"""The one gradient loop: climb a reward through the last steps of sampling."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, distributed

from ipgo.adapters import Adapter
from ipgo.ascent import Ascent, make_optimizer
from ipgo.errors import InputError, RewardError
from ipgo.resume import all_tensors, copied, fill
from ipgo.rewards import score_with_gradient
from ipgo.sampling import decode, denoise, last_latents, redo_last_step, unconditional
from ipgo.seeding import derive, generator, repeated, shuffled
from ipgo.task import FRESH, Progress, Task

PATIENCE = 3  # steps in a row without a finite gradient before a row is given up
MOMENTA = ("exp_avg", "momentum_buffer")  # of Adam and SGD
FLOAT16_SCALE = 2.0**10  # a float16 backend loses small gradients; a row that overflows halves its own
logger = logging.getLogger("ipgo")


def maximize(
    task: Task, adapter: Adapter, ascent: Ascent, resume: Mapping[str, Tensor] | None = None
) -> Iterator[Progress]:
    """Maximise reward - penalty_weight * penalty over the parameters of `adapter`; yield each step.

    Prompt-wise, each step draws all P prompts, one row each. Rows do not touch each other: losses are summed,
    gradients clipped by row, optimisers work by element, the best rewards are kept by row. With S > 1 seeds a
    row's candidate is scored by its last S rewards, one for each seed. The raw prompt is a candidate only if
    the adapter starts as it.

    Prompt-batch (`task.shared`), each step draws batch_size x accumulate prompts (see `Ascent.images`), in an order
    that is derived for each pass over the prompts, and averages their gradients (over all processes, if
    torch.distributed is up).

    A row whose reward or gradient is not finite goes back to its kept values and, after three such steps in
    a row, is given up; the fit ends early when none is left, or when each of them is at the reward's ceiling
    (`Task.most`) on all seeds. With a backend in float16 each row's loss is
    multiplied by a power of two, and its gradient divided by it; a gradient that overflows halves it, and counts
    only once there is nothing left to halve.

    Args:
        resume: what `Progress.state()` returned; the fit goes on with the same bits.

    Raises:
        InputError: settings that do not fit together. RewardError: a reward that breaks its contract.
        ResumeError: a state of another fit.
    """
    climb = _start(task, adapter, ascent)
    if resume is not None:
        climb.load(resume)
    return climb.run()


def first_gradient(task: Task, adapter: Adapter, ascent: Ascent) -> None:
    """The part of the first step of `maximize` that takes time and memory: draw, score and differentiate.

    Parameters of `adapter` get their gradient, times the loss scale, and no update. Needs no numbers: see
    `ipgo.memory.sizes_only`.
    """
    _start(task, adapter, ascent).ascend(0)


def _start(task: Task, adapter: Adapter, ascent: Ascent) -> _Climb:
    """Check that settings fit together; see `maximize`."""
    ascent.check_depth(task.sampling.steps)
    ascent.check_task(task.sampling.steps, len(task.seeds), task.shared, whole=adapter.needs_all_steps)
    if not task.reward.differentiable:
        raise RewardError(f"reward {task.reward.name!r} has no gradient, which this method needs")
    return _Climb(task, adapter, ascent)


class _Climb:
    """The state of one fit. N rows of parameters serve P prompts: N = P, or N = 1 when shared."""

    def __init__(self, task: Task, adapter: Adapter, ascent: Ascent) -> None:
        self.task, self.ascent = task, ascent
        device = task.backend.device
        self.adapter = adapter.to(device)
        self.kept = copy.deepcopy(self.adapter).requires_grad_(False)
        # What a step yields: where the latest counts and not the best, that is with the step's own update.
        self.result = self.kept if self._keeps_best else copy.deepcopy(self.kept)
        with torch.no_grad():
            self.original = task.encoded()
            if self.adapter.learns_unconditional:
                # That of the prompts as they are: what is learned starts from it, at each step.
                self.uncond = unconditional(task.backend, self.original, task.sampling)
            else:
                cond = self.adapter.condition(task.backend, task.prompts, self.original)
                self.uncond = self.adapter.unconditional(task.backend, task.prompts, cond, task.sampling)
        count = 1 if task.shared else len(task.prompts)
        nan = torch.full((len(task.prompts),), math.nan)
        scale = FLOAT16_SCALE if task.backend.dtype == torch.float16 else 1.0
        # Everything that lives from step to step besides the parameters and the optimiser's moments.
        self.memory = {
            "step": torch.zeros((), dtype=torch.long),
            "rewards": nan.clone(),
            "best": nan.clone(),
            "penalty": nan.clone(),
            "recent": torch.full((count, len(task.seeds)), math.nan),
            "misses": torch.zeros(count, dtype=torch.long),
            "loss_scale": torch.full((count,), scale),
        }
        self.parameters = dict(self.adapter.named_parameters())
        basis = ascent.lr if ascent.lr_basis is None else ascent.lr_basis
        self.lr = {name: basis if name.endswith("raw_basis") else ascent.lr for name in self.parameters}
        self.optimizer = make_optimizer(self.parameters, ascent.optimizer)
        self.patience = min(PATIENCE, ascent.steps)

    def run(self) -> Iterator[Progress]:
        for step in range(int(self.memory["step"]), self.ascent.steps):
            drawn, images = self.ascend(step)
            norms, finite = self._clip()
            good = self._remember(drawn, finite)
            self._update(step, good)
            if not self._keeps_best:
                self.result.load_state_dict(self.adapter.state_dict())
            self.memory["step"] += 1
            over = self._at_the_ceiling()
            yield self._progress(norms, images, int(self.memory["step"]) if over else self.ascent.steps)
            if over or self._failed().all():
                return

    def _at_the_ceiling(self) -> bool:
        """Has every row that is not given up all that its reward can give, on each seed in turn?"""
        if not self._keeps_best:
            return False
        whole = (self.memory["recent"] >= self.task.most).all(1)
        return bool(whole.any()) and bool((whole | self._failed()).all())

    def ascend(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Draw, score and differentiate the prompts of this step: their numbers, and the images if all were drawn."""
        with torch.enable_grad(), self.adapter.attached(self.task.backend, self.task.prompts):
            return self._ascend(step)

    def _ascend(self, step: int) -> tuple[Tensor, Tensor | None]:
        self.optimizer.zero_grad()
        batches = self._batches(step)
        averaged = sum(len(batch) for batch in batches) if self.task.shared else 1
        visits: Counter[int] = Counter()
        for number, batch in enumerate(batches):
            before = []
            for each in batch.tolist():
                before.append(visits[each])
                visits[each] += 1
            depth = self._backprop_steps(step, number)
            objective, rewards, penalty, images = self._score(batch, step, before, depth)
            scale = self.memory["loss_scale"].to(objective)
            # To these alone: a reward of the user's may have parameters that want a gradient too.
            own = [each for each in self.parameters.values() if each.requires_grad]
            torch.autograd.backward(-(objective * scale).sum() / averaged, inputs=own)
            self.memory["rewards"][batch] = rewards.detach().cpu().float()
            self.memory["penalty"][batch] = penalty.detach().cpu().float()
        return torch.unique(torch.cat(batches)), None if self.task.shared else images.detach()

    def _backprop_steps(self, step: int, number: int) -> int:
        """K of the trajectories of a step's batch."""
        most = self.ascent.backprop_steps or self.task.sampling.steps
        if not self.ascent.random_backprop:
            return most
        source = generator(derive(self.task.seed, "backprop", step, number))
        return int(torch.randint(1, most + 1, (), generator=source))

    def _score(
        self, batch: Tensor, step: int, before: Sequence[int], backprop_steps: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What to differentiate, the rewards and penalties of a batch (B,), and its images.

        Args:
            before: how often each prompt was drawn before in this step.
        """
        task, backend, ascent = self.task, self.task.backend, self.ascent
        prompts = [task.prompts[number] for number in batch]
        numbers = batch.to(backend.device)
        original = self.original.select(numbers)
        cond = self.adapter.condition(backend, prompts, original)
        uncond = None if self.uncond is None else self.uncond.select(numbers)
        if self.adapter.learns_unconditional:
            uncond = self.adapter.unconditional(backend, prompts, cond, task.sampling, uncond)
        seeds = task.noise_seeds(prompts, step, before)
        noise = self.adapter.noise(backend, prompts, seeds, task.sampling.noise_steps(backend))
        walk = denoise(
            backend,
            cond,
            uncond,
            noise,
            task.sampling,
            backprop_steps=backprop_steps,
            recompute=ascent.recompute,
        )
        latents = last_latents(walk)
        images = decode(backend, latents, recompute=ascent.recompute)
        if not images.requires_grad:
            raise InputError(
                f"no gradient reaches the images of backend {backend.name!r}; if its attention kernel has no backward "
                "pass, as SageAttention, choose another (`set_attention_backend('native')`)"
            )
        rewards = score_with_gradient(task.reward, images, prompts)
        penalty = self.adapter.penalty(original, cond, noise)
        objective = rewards - ascent.penalty_weight * penalty
        for number in range(ascent.renoised):
            seeds = [
                repeated(derive(task.seed, "renoised", prompt, step, number), count)
                for prompt, count in zip(prompts, before, strict=True)
            ]
            fresh = backend.noise(seeds)[:, 0]
            redone = redo_last_step(
                backend, cond, uncond, latents, fresh, task.sampling, recompute=ascent.recompute
            )
            redrawn = decode(backend, redone, recompute=ascent.recompute)
            objective = objective + score_with_gradient(task.reward, redrawn, prompts)
        return objective, rewards, penalty, images

    def _batches(self, step: int) -> list[Tensor]:
        """Prompt numbers: all at once, or the next ones of an endless sequence of shuffled passes."""
        count = len(self.task.prompts)
        if not self.task.shared:
            return [torch.arange(count)]
        size = self.ascent.images(count, len(self.task.seeds))
        prompts = shuffled(count, step * size, size, self.task.seed)
        return list(torch.split(prompts, self.ascent.batch_size))

    def _clip(self) -> tuple[Tensor, Tensor]:
        """Undo the loss scale and clip row by row: the norms before (N,), and which of them are finite."""
        scale = self.memory["loss_scale"].to(self.task.backend.device)
        grads = []
        for parameter in self.parameters.values():
            # Unused angles have none.
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if self._among_others:
                distributed.all_reduce(grad)
                grad /= distributed.get_world_size()
            grads.append(grad / _rows(scale, grad))
        norms = torch.cat([grad.flatten(1) for grad in grads], dim=1).norm(dim=1)  # (N,)
        longest = math.inf if self.ascent.max_grad_norm is None else self.ascent.max_grad_norm
        factor = (longest / (norms + 1e-6)).clamp(max=1)
        for parameter, grad in zip(self.parameters.values(), grads, strict=True):
            parameter.grad = grad * _rows(factor, grad)
        return norms.cpu(), norms.isfinite().cpu()

    @property
    def _among_others(self) -> bool:
        """Do other processes draw other prompts for the same row?"""
        return self.task.shared and distributed.is_available() and distributed.is_initialized()

    def _everywhere(self, true: Tensor) -> Tensor:
        """(1,) bool: is it true in all processes? So that they all do the same."""
        if not self._among_others:
            return true
        least = true.to(self.task.backend.device, torch.uint8)
        distributed.all_reduce(least, distributed.ReduceOp.MIN)
        return least.cpu().bool()

    def _remember(self, drawn: Tensor, finite: Tensor) -> Tensor:
        """Count failures and keep what is best; which rows (N,) may go on from where they are.

        Args:
            drawn: the numbers of the prompts of this step.
            finite: (N,) whether a row's gradient is.
        """
        memory = self.memory
        scored = memory["rewards"].isfinite()  # (P,)
        if self.task.shared:
            scored = self._everywhere(scored[drawn].all()[None])  # (1,)
        good = finite & scored & ~self._failed()
        overflow = ~finite & scored & (memory["loss_scale"] > 1)
        memory["misses"] = torch.where(good, 0, memory["misses"] + ~overflow)
        memory["loss_scale"] = torch.where(overflow, memory["loss_scale"] / 2, memory["loss_scale"])
        self._report()
        if not self._keeps_best:
            memory["best"] = torch.where(good, memory["rewards"], memory["best"])
            self.kept.take_rows_(self.adapter, good)
            return good
        recent = torch.cat([memory["recent"], memory["rewards"][:, None]], dim=1)[:, 1:]
        memory["recent"] = torch.where(good[:, None], recent, math.nan)
        scores = memory["recent"].mean(1)  # NaN until there is a reward for each seed
        improved = scores.isfinite() & ~(scores <= memory["best"])
        memory["best"] = torch.where(improved, scores, memory["best"])
        self.kept.take_rows_(self.adapter, improved)
        return good

    def _report(self) -> None:
        """Say which rows were given up just now, and what may help."""
        half = self.task.backend.dtype == torch.float16
        hint = "; float16 may be too coarse, so try bfloat16 or float32" if half else ""
        for row in (self.memory["misses"] == self.patience).nonzero()[:, 0].tolist():
            whose = "the fit" if self.task.shared else f"prompt {self.task.prompts[row]!r}"
            logger.warning(
                "%s is given up: reward or gradient was not finite %d times%s", whose, self.patience, hint
            )

    @torch.no_grad()
    def _update(self, step: int, good: Tensor) -> None:
        """An optimiser step for the good rows; the others go back to what was kept, without momentum.

        Adam's second moments stay: from zeros, which its correction by the number of steps takes for a mean over all of
        them, the next steps would be several times as long.
        """
        self.adapter.take_rows_(self.kept, ~good)
        bad = ~good.to(self.task.backend.device)
        for group in self.optimizer.param_groups:
            (parameter,) = group["params"]
            group["lr"] = self.lr[group["name"]] * self.ascent.lr_decay ** (step // self.ascent.decay_every)
            state = self.optimizer.state[parameter]
            for rows in (parameter.grad, *(state[name] for name in MOMENTA if name in state)):
                rows[bad] = 0
        self.optimizer.step()
        self.adapter.project_()

    def _failed(self) -> Tensor:
        """Rows whose last steps, or all of a fit that has fewer, were not finite."""
        failed: Tensor = self.memory["misses"] >= self.patience
        return failed

    @property
    def _keeps_best(self) -> bool:
        """Rewards that come from different prompts or noise are not comparable: the latest is kept."""
        return self.ascent.keep_best and bool(self.task.seeds) and not self.task.shared

    def _progress(self, norms: Tensor, images: Tensor | None, total: int) -> Progress:
        memory, count = self.memory, len(self.task.prompts)
        failed = self._failed()
        if memory["step"] >= total:  # also where nothing was ever kept: what is returned is the start
            none = memory["best"].isnan()
            failed = failed | (none.all() if self.task.shared else none)
        return Progress(
            step=int(memory["step"]),
            total=total,
            rewards=memory["rewards"].clone(),
            best=memory["best"].clone(),
            penalty=memory["penalty"].clone(),
            grad_norm=norms.expand(count),
            failed=failed.expand(count),
            images=images,
            adapter=self.result,
            state=self.state,
            over=FRESH if self.task.shared else len(self.task.seeds) or FRESH,
            keeps_best=self._keeps_best,
        )

    def _tensors(self) -> dict[str, Tensor]:
        return all_tensors(self.memory, self.adapter, self.kept, self.optimizer)

    def state(self) -> dict[str, Tensor]:
        return copied(self._tensors())

    def load(self, state: Mapping[str, Tensor]) -> None:
        fill(self._tensors(), state)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """(N,) reshaped to multiply the rows of `like` (N, ...)."""
    return values.to(like).view(-1, *[1] * (like.dim() - 1))
