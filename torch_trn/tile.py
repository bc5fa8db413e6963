"""`numerics="tile"`: an operator's values are those of the Program that is timed.

The CPU kernel has run already: it gave the results their sizes and aliases. Here what it wrote is
taken back, and the Program runs on the same memory. Operators that draw random numbers keep the CPU
kernel's values, since the sequence of the hardware's generator is not published, and so do float64
operations on single numbers, whose software on GpSimdE gives the same; Host operators never come
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_trn import runtime
from torch_trn.errors import TrnError

if TYPE_CHECKING:
    from torch_trn.lowering import OpCall

__all__ = ["compute"]


def compute(
    name: str, args: list[Any], outs: list[Tensor], before: list[tuple[Tensor, Tensor]]
) -> None:
    """Gives ``outs``, and what the call writes among ``args``, the Program's values.

    args: in schema order; device tensors as CPU tensors over the same bytes.
    before: bytes of the storages that the call writes, with what they held before.
    """
    from torch_trn.lowering import OpCall, TensorSpec
    from torch_trn.lowering.scalar import is_double_scalar

    # The aliases have no version counters, as tensors of inference mode.
    with torch._C._ExcludeDispatchKeyGuard(_ABOVE), torch.inference_mode():
        given = [_resolved(tensor) for tensor in _tensors(args)]
        fresh = tuple(_is_fresh(out, given) for out in outs)
        specs = tuple(TensorSpec.of(out) for out in outs)
        call = OpCall(name, _specs(args), specs, fresh)
        if is_double_scalar(call):
            return
        program = runtime.program_of(call, runtime.current())
        if program is None or program.draws:
            return
        _check_steps(call, given)
        for held, copy in before:
            held.copy_(copy)
        for out, new in zip(outs, fresh, strict=True):
            if new and out.numel():
                _unwritten(out)
        tensors = {f"in{i}": tensor for i, tensor in enumerate(given)}
        tensors |= {f"out{i}": tensor for i, tensor in enumerate(outs)}
        runtime.execute(program, runtime.current(), tensors)


_ABOVE = torch._C.DispatchKeySet(torch._C.DispatchKey.Python).add(
    torch._C.DispatchKey.PythonTLSSnapshot
)
"""Modes of the user's program see its operators, not the simulator's."""


def _check_steps(call: OpCall, given: Sequence[Tensor]) -> None:
    """A fused optimizer's Program computes its corrections once for the whole list.

    Raises:
        TrnError: parameters of one call have taken different numbers of steps.
    """
    if not call.name.startswith(_STEPPED):
        return
    lists = [arg for arg in call.args if isinstance(arg, tuple) and arg]
    count = len(lists[-1])
    first = sum(len(arg) for arg in lists[:-1])
    steps = {float(step) for step in given[first : first + count]}
    if len(steps) > 1:
        raise TrnError(
            f"{call.name} with numerics='tile': its parameters have taken {sorted(steps)} steps, "
            "and the Program computes one bias correction for all of them. Put parameters of "
            "different ages into groups of their own, or use fused=False"
        )


_STEPPED = ("aten::_fused_adam", "aten::_fused_adagrad")


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, list | tuple):
            found.extend(item for item in arg if isinstance(item, Tensor))
    return found


def _specs(args: Sequence[Any]) -> tuple[Any, ...]:
    from torch_trn.lowering import TensorSpec

    return tuple(
        TensorSpec.of(arg)
        if isinstance(arg, Tensor)
        else _specs(arg)
        if isinstance(arg, list | tuple)
        else arg
        for arg in args
    )


def _resolved(tensor: Tensor) -> Tensor:
    """Without conjugate and negative bits, which no access pattern knows."""
    return tensor.resolve_conj().resolve_neg()


def _is_fresh(out: Tensor, given: Sequence[Tensor]) -> bool:
    start = out.untyped_storage().data_ptr()
    return all(tensor.untyped_storage().data_ptr() != start for tensor in given)


def _unwritten(tensor: Tensor) -> None:
    """All bits set, as memory is that nobody has written: NaN in every float."""
    storage = tensor.untyped_storage()
    torch.empty(0, dtype=torch.uint8).set_(storage).fill_(255)
