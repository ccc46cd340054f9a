"""How much memory tensors take: counted while they live, and without their numbers where only sizes matter."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.initialization import no_init_weights

WORDS = 20  # tokens of a prompt that is not padded
UNBOUNDED = 10**6  # what a tokenizer that states no longest prompt takes
# What torch raises where a tensor without numbers is asked for them.
NEEDS_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While open, counts the bytes of all tensors that are made, as long as they live.

    Views share a storage and count once. What a kernel takes for itself while it runs is not seen.

    A tensor without numbers (see `sizes_only`) has no truth value either. Asked for it, it says False: whatever is
    looked for, such as a broken reward, has not happened.

    Attributes:
        live, peak: bytes now, and the most there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def add(self, tensors: Iterable[Tensor]) -> int:
        """Count these too; returns how many bytes that adds."""
        before = self.live
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known.add(key)
                self.live += size
                weakref.finalize(storage, self._forget, key, size)
        self.peak = max(self.peak, self.live)
        return self.live - before

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and _truth_without_numbers(args[0]):
            return False
        answer = func(*args, **(kwargs or {}))
        several = answer if isinstance(answer, tuple) else (answer,)
        # A return that is an alias is a view, or was written in place: nothing new.
        new = (each for said, each in zip(func._schema.returns, several, strict=False) if not said.alias_info)
        self.add(leaf for leaf in tree_leaves(tuple(new)) if isinstance(leaf, Tensor))
        return answer


def _truth_without_numbers(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.dtype == torch.bool


def new_sizes() -> FakeTensorMode:
    """What models that work together without numbers have in common; see `sizes_only`."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def sizes_only(sizes: FakeTensorMode | None, dtype: torch.dtype) -> Iterator[None]:
    """Modules built in here have parameters of `dtype` that have a size and no numbers, and take no memory.

    They can be called outside too: what depends on them has no numbers either, everything else does. With None for
    `sizes` only the dtype is set.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with sizes or nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


def tensors_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Parameters and buffers."""
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def build(
    kind: Callable[[], Any], sizes: FakeTensorMode | None, dtype: torch.dtype, device: str = "cpu"
) -> Any:
    """What `kind()` returns, frozen and in eval mode; layers that loading keeps in float32 are.

    Args:
        sizes: build it with sizes only; None gives random numbers, on `device`.
    """
    initialised = nullcontext() if sizes is None else no_init_weights()
    with sizes_only(sizes, dtype), torch.device(device), initialised:
        module = kind()
        if hasattr(module, "tie_weights"):  # transformers does this with the initial values
            module.tie_weights(recompute_mapping=False)
        kept = getattr(module, "_keep_in_fp32_modules", None) or ()
        for name, part in module.named_modules() if dtype == torch.float16 else ():
            if name.rpartition(".")[2] in kept:
                part.weight = nn.Parameter(part.weight.float())  # these cannot be converted in place
    return module.requires_grad_(False).eval()


class Tokens:
    """A stand-in for a tokenizer where only the number of tokens matters."""

    def __init__(self, longest: int) -> None:
        self.model_max_length = longest

    def encode(self, text: str) -> list[int]:
        """An id for each word."""
        return [0] * len(text.split())

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        """What the messages say."""
        return "\n".join(each["content"] for each in messages)

    def __call__(
        self,
        prompts: Sequence[str],
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> Any:
        """Ids of nothing: of the longest length if they are padded to it, or of `WORDS` tokens.

        A text of more words is taken for a prompt after an instruction, and has as many tokens more.
        """
        from transformers import BatchEncoding

        longest = max_length or self.model_max_length
        words = max(len(prompt.split()) for prompt in prompts)
        count = min(WORDS + words if words > WORDS else WORDS, longest)
        length = longest if padding == "max_length" else count
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        mask = (torch.arange(length) < count).long().expand(len(prompts), -1)
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})
