"""Folds of two tensors to one number, of a diagonal, and random draws by weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.errors import UnsupportedOpError
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import (
    Operand,
    broadcast_strides,
    grid,
    memory_order,
    merge,
    product,
    split,
)  # fmt: skip
from torch_trn.lowering.reduction import positioned, reduce_grid, reduction, total_of, vector_norm
from torch_trn.lowering.registry import add, lowering
from torch_trn.lowering.run import lower_kernel
from torch_trn.lowering.tile import FP32, Tile, Value
from torch_trn.lowering.unary import is_nan
from torch_trn.program import Program

Fold = Callable[..., None]


@lowering("aten::trace")
def trace(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """The sum of the diagonal, whose elements are a row and a column apart."""
    x, out = call.args[0], call.outs[0]
    size = min(x.shape)
    line = TensorSpec(x.dtype, (size,), (sum(x.strides),))
    return reduction(total_of, None)(OpCall(call.name, (line,), (out,)), core, shards)


def _pairwise(fold: Fold) -> Callable[[OpCall, CoreSpec, int], Program]:
    """The lowering of a comparison of two tensors that gives one number.

    Where the operator returns no tensor, it is left in scratch for the host to read.
    """

    def lower(call: OpCall, core: CoreSpec, shards: int) -> Program:
        x, y = call.args[:2]
        out = call.outs[0] if call.outs else TensorSpec.contiguous(torch.bool)
        shape = tuple(torch.broadcast_shapes(x.shape, y.shape))
        walked = grid(shape, [x if x.shape == shape else y, x, y])
        operands = (Operand(out, "one"), *walked.operands[1:])
        kernel = Kernel(core, replace(walked, operands=operands), 1, shards)
        fold(kernel, *kernel.ins, *call.args[2:])
        return lower_kernel(kernel, call.name)

    return lower


def _equal(t: Tile, x: Value, y: Value, *_: Any) -> None:
    t.total(0, t.binary("is_equal", x, y, FP32), op="min")


def _all_close(
    t: Tile, x: Value, y: Value, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> None:
    """|x - y| <= atol + rtol |y|, or the same infinity (or nan)."""
    room = t.scalar2(t.act("abs", y), "multiply", float(rtol), "add", float(atol))
    near = t.binary("is_le", t.act("abs", x - y), room, FP32)
    finite = t.scalar2(y, "abs_max", 0.0, "is_lt", math.inf, FP32)
    near = t.binary("max", near * finite, t.binary("is_equal", x, y, FP32))
    if equal_nan:
        near = t.binary("max", near, t.binary("min", is_nan(t, x), is_nan(t, y), FP32))
    t.total(0, near, op="min")


add(("aten::equal",), _pairwise(_equal))
add(("aten::allclose",), _pairwise(_all_close))


@lowering("aten::dist")
def dist(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """The p-norm of x - y: a total of powers, then its root."""
    x, y = call.args[:2]
    p, out = call.arg(2, 2), call.outs[0]
    shape = tuple(torch.broadcast_shapes(x.shape, y.shape))
    strides = [broadcast_strides(spec, shape) for spec in (x, y)]
    order = memory_order(shape, strides[0])
    inner = merge([shape[a] for a in order], [[s[a] for a in order] for s in strides])
    inner = [(size, (0, *steps)) for size, steps in inner] or [(product(shape), (0, 1, 1))]
    walked = split(inner, 0, [out, x, y], widen=False)
    operands = (replace(walked.operands[0], kind="col"), *walked.operands[1:])
    kernel = Kernel(core, replace(walked, operands=operands), 1, shards)
    left, right = kernel.ins
    kernel.store(0, vector_norm(kernel, left - right, 1, p))
    return lower_kernel(kernel, call.name)


def _multinomial(t: Tile, x: Value, *_: Any) -> Value:
    """The position of the largest p / q with q exponential: one draw per row."""
    # 1 - u is never 0, whose logarithm would be infinite.
    noise = t.act("log", t.random(), scale=-1.0, bias=1.0) * -1.0
    return positioned(t, "max", x * t.reciprocal(t.binary("max", noise, 1e-30)))[1]


@lowering("aten::multinomial")
def multinomial(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(probabilities, num_samples, replacement): a pass over each row for each draw.

    Raises:
        UnsupportedOpError: several draws without replacement, which depend on each other.
    """
    x, out = call.args[0], call.outs[0]
    draws = max(call.args[1], 1)
    if draws > 1 and not call.arg(2, False):
        raise UnsupportedOpError(
            call.name, "draws without replacement depend on each other: draw one at a time"
        )
    shape = (*x.shape[:-1], draws, x.shape[-1])
    again = TensorSpec(x.dtype, shape, (*x.strides[:-1], 0, x.strides[-1]))
    walked = reduce_grid(shape, [len(shape) - 1], [out], [again])
    kernel = Kernel(core, walked, 1, shards)
    kernel.store(0, _multinomial(kernel, kernel.ins[0]))
    return lower_kernel(kernel, call.name)
