"""Records the operators that a function calls, as OpCalls: what the eager device would lower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_trn.lowering import OpCall, TensorSpec


def spec_of(value: Any) -> Any:
    """A tensor as its TensorSpec, lists as tuples, everything else as it is."""
    if isinstance(value, torch.Tensor):
        return TensorSpec(value.dtype, tuple(value.shape), tuple(value.stride()))
    if isinstance(value, (list, tuple)):
        return tuple(spec_of(item) for item in value)
    return value


def schema_name(function: Any) -> str:
    """ "aten::add.Tensor", without ".default"."""
    overload = function._schema.overload_name
    return function._schema.name + (f".{overload}" if overload else "")


def tensors_in(value: Any) -> list[TensorSpec]:
    """All specs in a (nested) tuple."""
    if isinstance(value, TensorSpec):
        return [value]
    if isinstance(value, tuple):
        return [spec for item in value for spec in tensors_in(item)]
    return []


class Recorder(TorchDispatchMode):
    """Keeps an OpCall for every operator that reaches the dispatcher's end."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OpCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = list(args)
        for argument in func._schema.arguments[len(args) :]:
            given.append(kwargs.get(argument.name, argument.default_value))
        outs = tuple(tensors_in(spec_of(result)))
        self.calls.append(OpCall(schema_name(func), spec_of(given), outs))
        return result


def record(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[OpCall]:
    """The OpCalls of `function(*args)` (on meta tensors nothing is computed)."""
    recorder = Recorder()
    with recorder:
        function(*args, **kwargs)
    return recorder.calls
