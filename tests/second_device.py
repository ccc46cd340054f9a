"""A second device for tests: a GPU, or one that computes on the CPU and refuses what a GPU would refuse.

Tensors that live there say that they are on `DEVICE`. An operation that mixes them with tensors of the CPU fails, as it
does with CUDA: numbers (tensors without dimensions) and the positions of an indexing may come from the CPU. The values
are the CPU's own, so whatever runs on both devices must end with the same bits.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# A GPU, where there is one, needs no stand-in. Else: a type of device that torch knows, whose gradients need no driver.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "lazy")
CPU = torch.device("cpu")
aten = torch.ops.aten
POSITIONS = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
    aten._unsafe_index_put.default,
)


class There(Tensor):
    """A tensor of the second device. `here` has its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor, requires_grad: bool = False, **attributes: Any) -> "There":
        """Also as accelerate makes a parameter anew: from one, with its attributes."""
        if isinstance(here, There):
            made = here.detach()
            made._is_param = attributes.get("_is_param", False)
        else:
            made = Tensor._make_wrapper_subclass(
                cls,
                here.shape,
                strides=here.stride(),
                storage_offset=here.storage_offset(),
                dtype=here.dtype,
                layout=here.layout,
                device=DEVICE,
            )
            made.here = here
        return made.requires_grad_(requires_grad)

    def __repr__(self) -> str:
        return f"There({self.here})"

    def tolist(self) -> Any:
        return self.here.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert a tensor of the second device to numpy; use Tensor.cpu() first")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(function, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """Within it tensors can be made on `DEVICE`."""

    def __enter__(self) -> Any:
        # torch.tensor(..., device=DEVICE) then makes one of the CPU and moves it, which comes by here.
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(function, args, kwargs or {})


def second_device() -> AbstractContextManager[Any]:
    """Within it tensors can be made on `DEVICE`."""
    return nullcontext() if DEVICE.type == "cuda" else SecondDevice()


def _call(function: Any, args: Any, kwargs: Any) -> Any:
    """An operation, with its operands brought here and its results where they belong."""
    leaves: list[Any] = []
    given = _mapped(_brought, (args, kwargs), leaves)
    theirs = [each for each in leaves if isinstance(each, There)]
    asked = [each for each in leaves if isinstance(each, torch.device)]
    if function is not aten.copy_.default:
        _check(function, args, leaves, theirs, asked)
        there = asked[0].type == DEVICE.type if asked else bool(theirs)
    else:
        there = isinstance(args[0], There)
    answer = function(*given[0], **given[1])
    if not there:
        return answer
    known = {id(each.here): each for each in theirs}  # what was changed in place stays the same object

    def back(value: Any) -> Any:
        return (
            value
            if not isinstance(value, Tensor)
            else known[id(value)]
            if id(value) in known
            else There(value)
        )

    return _mapped(back, answer)


def _mapped(change: Callable[[Any], Any], value: Any, leaves: list[Any] | None = None) -> Any:
    """`value` with each leaf of its tuples, lists and dicts changed; they are added to `leaves`."""
    if isinstance(value, tuple | list):
        return type(value)([_mapped(change, each, leaves) for each in value])
    if isinstance(value, dict):
        return {name: _mapped(change, each, leaves) for name, each in value.items()}
    if leaves is not None:
        leaves.append(value)
    return change(value)


def _brought(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == DEVICE.type:
        return CPU
    return value.here if isinstance(value, There) else value


def _check(
    function: Any, args: Any, leaves: list[Any], theirs: list[There], asked: list[torch.device]
) -> None:
    """Raise `RuntimeError` if an operation needs tensors, or random numbers, of both devices."""
    drawn_there = theirs or any(each.type == DEVICE.type for each in asked)
    if drawn_there and any(isinstance(each, torch.Generator) for each in leaves):
        raise RuntimeError(f"{function}: a generator of the CPU draws nothing on the second device")
    if not theirs or function is aten._to_copy.default:
        return
    if function in POSITIONS:
        if not isinstance(args[0], There):
            raise RuntimeError(f"{function}: a tensor on the CPU has no positions on the second device")
        leaves = [args[0], *args[2:]]
    here = [
        tuple(each.shape)
        for each in leaves
        if isinstance(each, Tensor) and not isinstance(each, There) and each.dim() > 0
    ]
    if here:
        raise RuntimeError(f"{function}: tensors {here} are on the CPU, others on the second device")
