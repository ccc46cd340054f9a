"""TextCraftor: the text encoder's weights, found by gradient through the last steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ipgo.adapters import TextEncoderAdapter
from ipgo.ascent import Ascent
from ipgo.embeds import late_steps
from ipgo.errors import InputError
from ipgo.task import Method, Progress, Task
from ipgo.training import maximize

# As published, without clipping and with gradient in 5 steps (there of 25, here of 8, all that are tuned), but for
# the rate: 1e-6 is meant for 10,000 steps of 32 prompts. The published weight decay of 0.01 would take 1e-7 of each
# weight a step, and is left out.
DEFAULT = Ascent(
    steps=50,
    lr=1e-5,
    lr_decay=1.0,
    max_grad_norm=None,
    backprop_steps=5,
    penalty_weight=0.0,
    recompute=True,
)


@dataclass(frozen=True)
class TextCraftor(Method):
    """Learn all weights of the text encoder, for each prompt or for all (arXiv 2403.18978).

    Images are drawn in the fit as they are afterwards: all late steps get the tuned encoder's states, of which
    the last `ascent.backprop_steps` carry gradient. The published training tunes only the states of the latter.

    Attributes:
        late_share: share of the denoising steps, the last ones, that get the tuned encoder's states.
        ascent: how the weights are found.
    """

    stackable: ClassVar[bool] = False

    late_share: float = 0.6  # 15 of 25 steps
    ascent: Ascent = DEFAULT

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.late_share <= 1:
            raise InputError(f"late_share is {self.late_share}; it must be above 0 and at most 1")

    def both_halves(self, guided: bool) -> bool:
        return guided

    def differentiable_calls(self, image_calls: int) -> int:
        return late_steps(image_calls, self.late_share)

    def _search(self, task: Task, resume: Mapping[str, Tensor] | None) -> Iterator[Progress]:
        adapter = TextEncoderAdapter.start(task.backend, task.prompts, self.late_share, shared=task.shared)
        return maximize(task, adapter, self.ascent, resume)
