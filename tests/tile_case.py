"""Runs one ATen call as its Program: the executor's values beside those of CPU ATen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lowering_calls import schema_name, spec_of, tensors_in
from torch import Tensor

from torch_trn.chip import CoreSpec, system
from torch_trn.executor import execute
from torch_trn.lowering import OpCall, lower

TRN1 = system("trn1.32xlarge").chip.core
TRN2 = system("trn2.48xlarge").chip.core

#: Relative error that one rounding to a dtype may make.
EPSILON = {
    torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11,
    torch.float8_e4m3fn: 2.0**-4, torch.float8_e5m2: 2.0**-3,
}  # fmt: skip


def tile_values(
    function: Any, *args: Any, core: CoreSpec = TRN2, cores: int = 1, **kwargs: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """(the Program's results, CPU ATen's results) of ``function``, an overload of ``torch.ops``.

    Arguments are not changed: an operator that works in place does so on copies. Fresh results are
    filled with NaN bytes before the Program runs.
    """
    for name in (argument.name for argument in function._schema.arguments[len(args) :]):
        args = (*args, kwargs.pop(name, _default(function, name)))
    ours, theirs = _copies(args), _copies(args)
    expected = _listed(_called(function, theirs))
    specs = tuple(spec for tensor in expected for spec in tensors_in(spec_of(tensor)))
    call = OpCall(schema_name(function), spec_of(ours), specs)
    given, same = _tensors(ours), _tensors(theirs)
    results = []
    for tensor in expected:
        place = next((i for i, other in enumerate(same) if other is tensor), None)
        results.append(_unwritten(tensor) if place is None else given[place])
    program = lower(call, core, cores)
    bound = {f"in{i}": tensor for i, tensor in enumerate(given)}
    bound |= {f"out{i}": tensor for i, tensor in enumerate(results)}
    execute(program, core, bound, cores=cores)
    if not results:
        return list(given), list(same)
    return results, expected


def assert_values(
    got: Sequence[Tensor], expected: Sequence[Tensor], rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Equal to ``rtol`` x |expected| + ``atol``; NaN where NaN, same shapes and dtypes."""
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        wide = torch.float64 if theirs.is_floating_point() else theirs.dtype
        torch.testing.assert_close(
            ours.to(wide), theirs.to(wide), rtol=rtol, atol=atol, equal_nan=True
        )


def _default(function: Any, name: str) -> Any:
    found = next(a for a in function._schema.arguments if a.name == name)
    return found.default_value


def _copies(value: Any) -> Any:
    """A deep copy with the same strides."""
    if isinstance(value, Tensor):
        result = _like(value)
        _line(result).copy_(_line(value))
        return result
    if isinstance(value, list | tuple):
        return [_copies(item) for item in value]
    return value


def _line(tensor: Tensor) -> Tensor:
    """The memory from the first element to the last: expanded tensors have one element twice."""
    extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((extent if tensor.numel() else 0,), (1,))


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _unwritten(tensor: Tensor) -> Tensor:
    result = _like(tensor)
    if result.numel():
        storage = torch.tensor([], dtype=torch.uint8).set_(result.untyped_storage())
        storage.fill_(255)
    return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _listed(result: Any) -> list[Tensor]:
    return _tensors(list(result) if isinstance(result, list | tuple) else [result])


def _called(function: Any, args: Sequence[Any]) -> Any:
    """``function`` of all its arguments in schema order, some of which go by name only."""
    arguments = function._schema.arguments
    named = {a.name: x for a, x in zip(arguments, args, strict=True) if a.kwarg_only}
    return function(*args[: len(args) - len(named)], **named)
