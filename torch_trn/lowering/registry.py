"""Which function lowers which operator, and the one entry point `lower`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache

import torch

from torch_trn.chip import CoreSpec
from torch_trn.errors import UnsupportedOpError
from torch_trn.lowering.call import HOST_ONLY_DTYPES, OpCall
from torch_trn.lowering.scalar import double_scalar, is_double_scalar
from torch_trn.program import Program

Lowering = Callable[[OpCall, CoreSpec, int], Program]

_TABLE: dict[str, Lowering] = {}
_HOST: dict[str, str] = {}
_ANY_DTYPE: set[Lowering] = set()


def lowering(*names: str) -> Callable[[Lowering], Lowering]:
    """Register a function for operators.

    A name without an overload ("aten::add") stands for all overloads of that operator; its
    in-place and `out=` forms need no names of their own.
    """

    def register(function: Lowering) -> Lowering:
        add(names, function)
        return function

    return register


def add(names: Iterable[str], function: Lowering) -> None:
    """Register `function` for every one of `names`; ValueError where a name is taken."""
    for name in names:
        if name in _TABLE:
            raise ValueError(f"{name} has a lowering already")
        _TABLE[name] = function
    _resolve.cache_clear()


def any_dtype(function: Lowering) -> Lowering:
    """Mark a lowering that touches no data, so that even dtypes without an engine pass."""
    _ANY_DTYPE.add(function)
    return function


def host_only(reason: str, *names: str) -> None:
    """Declare operators that real Trainium cannot run, with the reason `lower` gives."""
    for name in names:
        _HOST[name] = reason


def registered() -> tuple[str, ...]:
    """All registered names, sorted."""
    return tuple(sorted(_TABLE))


def has_lowering(name: str) -> bool:
    """Whether `lower` knows the operator (it may still refuse a dtype)."""
    return _resolve(name) is not None


def lower(call: OpCall, core: CoreSpec, shards: int = 1) -> Program:
    """The Program of `call` on one physical core that has the largest of `shards` equal shares.

    Raises UnsupportedOpError with the reason where the operator, or this dtype, has no lowering.
    """
    function = _resolve(call.name)
    if function is None:
        raise UnsupportedOpError(call.name, _reason(call.name))
    inputs = _input_count(call.name)
    if inputs is not None and inputs < len(call.args):
        call = replace(call, args=call.args[:inputs])
    dtype = None if function in _ANY_DTYPE else _host_only_dtype(call)
    if dtype is None:
        return function(call, core, shards)
    if is_double_scalar(call):
        return double_scalar(call, core)
    raise UnsupportedOpError(
        call.name, f"no engine computes in {dtype} (the widest is fp32): convert to float32"
    )


def _host_only_dtype(call: OpCall) -> str | None:
    """The first dtype of a call that no engine computes in, without "torch."."""
    for spec in (*call.outs, *call.tensors()):
        if spec.dtype in HOST_ONLY_DTYPES:
            return str(spec.dtype).removeprefix("torch.")
    return None


def _reason(name: str) -> str:
    for candidate in _candidates(name):
        if candidate in _HOST:
            return _HOST[candidate]
    return "no lowering is registered"


@cache
def _resolve(name: str) -> Lowering | None:
    for candidate in _candidates(name):
        if candidate in _TABLE:
            return _TABLE[candidate]
    return None


def _candidates(name: str) -> Iterable[str]:
    """Names under which a lowering of `name` may be registered, the most exact first."""
    yield name
    base, _, overload = name.partition(".")
    if base.endswith("_") and not base.endswith("__"):
        base = base[:-1]
    elif "::__i" in base and base.endswith("__"):
        base = base.replace("::__i", "::__")
    overload = overload.removesuffix("out").removesuffix("_")
    if overload:
        yield f"{base}.{overload}"
    yield base


@cache
def _input_count(name: str) -> int | None:
    """How many arguments come before the destinations of an `out=` variant; None: not known."""
    base, _, overload = name.partition(".")
    try:
        schema = torch._C._get_schema(base, overload)
    except RuntimeError:
        return None
    return sum(1 for argument in schema.arguments if not argument.is_out)
