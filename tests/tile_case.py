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
    arguments = function._schema.arguments
    for name in (argument.name for argument in arguments[len(args) :]):
        args = (*args, kwargs.pop(name, _default(function, name)))
    ours, theirs = _copies(args), _copies(args)
    positional = sum(1 for argument in arguments if not argument.kwarg_only)
    named = {a.name: value for a, value in zip(arguments, theirs, strict=True) if a.kwarg_only}
    expected = _listed(function(*theirs[:positional], **named))
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
    """A deep copy with the same strides and offset."""
    if isinstance(value, Tensor):
        held = value.untyped_storage().clone()
        place = value.storage_offset(), value.shape, value.stride()
        return torch.empty(0, dtype=value.dtype).set_(held, *place)
    if isinstance(value, list | tuple):
        return [_copies(item) for item in value]
    return value


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
