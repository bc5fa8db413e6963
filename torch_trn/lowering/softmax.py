"""Softmax and its kin: one pass over rows held in SBUF, online over chunks of longer rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.complexes import refuse_complex
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import Grid, broadcast_strides, memory_order, merge, split
from torch_trn.lowering.registry import add
from torch_trn.lowering.run import lower_kernel
from torch_trn.lowering.tile import FP32, MAX_FLOAT, Tile, Value
from torch_trn.program import Program


def row_grid(shape: tuple[int, ...], dims: list[int], specs: list[TensorSpec]) -> Grid:
    """Rows are all dims but `dims`, columns are `dims`: for operators that work along `dims`."""
    strides = [broadcast_strides(spec, shape) for spec in specs]
    order = memory_order(shape, strides[0])
    kept = [a for a in order if a not in dims]
    along = [a for a in order if a in dims]
    outer = merge([shape[a] for a in kept], [[s[a] for a in kept] for s in strides])
    inner = merge([shape[a] for a in along], [[s[a] for a in along] for s in strides])
    if not inner:
        inner = [(1 if all(shape) else 0, tuple(1 for _ in specs))]
    if not all(shape):
        return Grid(0, 0, split([*outer, *inner], len(outer), specs, widen=False).operands)
    return split([*outer, *inner], len(outer), specs, widen=False)


Formula = Callable[..., Any]


def along(formula: Formula, dim_at: int) -> Callable[[OpCall, CoreSpec, int], Program]:
    """The lowering of an operator whose rows run along the dim given as argument `dim_at`."""

    def lower(call: OpCall, core: CoreSpec, shards: int) -> Program:
        refuse_complex(call)
        tensors = [arg for arg in call.args if isinstance(arg, TensorSpec)]
        shape = call.outs[0].shape
        dim = call.args[dim_at] % len(shape) if shape else 0
        grid = row_grid(shape, [dim] if shape else [], [*call.outs, *tensors])
        kernel = Kernel(core, grid, len(call.outs), shards)
        results = formula(kernel, *kernel.ins)
        for index, value in enumerate(results if isinstance(results, tuple) else (results,)):
            kernel.store(index, value)
        return lower_kernel(kernel, call.name)

    return lower


def softmax(t: Tile, x: Value) -> Value:
    """exp(x - max) / sum."""
    exponentials, _, total = t.max_sum(x)
    return exponentials * t.reciprocal(total)


def safe_softmax(t: Tile, x: Value) -> Value:
    """softmax, but 0 in rows of -infinity, whose sum is 0."""
    exponentials, _, total = t.max_sum(x)
    return exponentials * t.reciprocal(t.binary("max", total, 1e-30))


def log_softmax(t: Tile, x: Value) -> Value:
    """(x - max) - log(sum), the two subtractions in one instruction."""
    _, low, total = t.max_sum(x)
    return t.scalar2(x, "add", low, "subtract", t.act("log", total))


def _softmax_backward(t: Tile, grad: Value, y: Value) -> Value:
    inner = t.reduce("add", grad * y)
    return t.stt(grad, "subtract", inner, "multiply", y)


def _log_softmax_backward(t: Tile, grad: Value, y: Value) -> Value:
    total = t.reduce("add", grad, FP32)
    return t.stt(t.act("exp", y), "multiply", -total, "add", grad)


def _masked_softmax(t: Tile, x: Value, mask: Value) -> Value:
    return softmax(t, t.select(mask, -math.inf, x))


def _running(op: str) -> Formula:
    return lambda t, x: t.scan(op, x)


def _running_extreme(op: str) -> Formula:
    """The extreme so far and its last position; a nan is the extreme from where it comes."""

    def formula(t: Tile, x: Value) -> tuple[Value, Value]:
        best = t.scan(op, x)
        apart = t.binary("not_equal", x, best, FP32)
        if x.dtype.is_floating_point:
            apart = t.stt(x, "is_le", math.inf, "multiply", apart)
        here = t.stt(apart, "is_equal", 0.0, "multiply", t.iota(FP32))
        return best, t.scan("max", here)

    return formula


def _logcumsumexp(t: Tile, x: Value) -> Value:
    """Sums relative to the maximum so far: each step scales by how much that has grown."""
    top = t.scalar2(t.scan("max", x), "max", -MAX_FLOAT, "min", MAX_FLOAT)
    fall = t.act("exp", t.shift(top, -MAX_FLOAT) - top)
    total = t.scan("multiply,add", fall, t.act("exp", x - top))
    return t.act("log", total) + top


_FORMULAS: dict[str, tuple[Formula, int]] = {
    "_softmax": (softmax, 1), "softmax": (softmax, 1), "_safe_softmax": (safe_softmax, 1),
    "_log_softmax": (log_softmax, 1), "log_softmax": (log_softmax, 1),
    "_softmax_backward_data": (_softmax_backward, 2),
    "_log_softmax_backward_data": (_log_softmax_backward, 2),
    "cumsum": (_running("add"), 1), "cumprod": (_running("multiply"), 1),
    "logcumsumexp": (_logcumsumexp, 1), "_logcumsumexp": (_logcumsumexp, 1),
    "cummax": (_running_extreme("max"), 1), "cummin": (_running_extreme("min"), 1),
}  # fmt: skip

for _name, (_formula, _at) in _FORMULAS.items():
    add((f"aten::{_name}",), along(_formula, _at))


def _spread_mask(call: OpCall) -> TensorSpec:
    """A mask of keys alone, [batch, length], as one that broadcasts to [batch, ..., length]."""
    x, mask = call.args[0], call.args[1]
    if call.arg(3) != 1 or mask.ndim == x.ndim:
        return mask
    middle = x.ndim - 2
    shape = (mask.shape[0], *(1 for _ in range(middle)), mask.shape[-1])
    return TensorSpec(mask.dtype, shape, (mask.strides[0], *(0,) * middle, mask.strides[-1]))


def _masked(call: OpCall, core: CoreSpec, shards: int) -> Program:
    dim = call.arg(2)
    dim = len(call.outs[0].shape) - 1 if dim is None else dim
    return along(_masked_softmax, 2)(
        OpCall(call.name, (call.args[0], _spread_mask(call), dim), call.outs), core, shards
    )


def _masked_backward(t: Tile, grad: Value, y: Value, mask: Value) -> Value:
    return t.select(mask, 0.0, _softmax_backward(t, grad, y))


def _masked_back(call: OpCall, core: CoreSpec, shards: int) -> Program:
    dim = call.arg(3)
    dim = len(call.outs[0].shape) - 1 if dim is None else dim
    return along(_masked_backward, 3)(
        OpCall(call.name, (*call.args[:3], dim), call.outs), core, shards
    )


add(("aten::_masked_softmax",), _masked)
add(("aten::_masked_softmax_backward",), _masked_back)
