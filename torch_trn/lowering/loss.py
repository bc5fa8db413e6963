"""Losses: an elementwise formula, then a sum or a mean; and the gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import grid, product
from torch_trn.lowering.pointwise import elementwise
from torch_trn.lowering.registry import add
from torch_trn.lowering.run import lower_kernel
from torch_trn.lowering.tile import Scalar, Source, Tile, Value
from torch_trn.program import Program

#: `reduction` arguments of ATen.
NONE, MEAN, SUM = 0, 1, 2

Formula = Callable[..., Value]


def loss(formula: Formula, reduction_at: int) -> Callable[[OpCall, CoreSpec, int], Program]:
    """The lowering of a loss: `formula(tile, *args without reduction)` is its value per element."""

    def lower(call: OpCall, core: CoreSpec, shards: int) -> Program:
        how = call.arg(reduction_at, MEAN)
        tensors = [arg for arg in call.args if isinstance(arg, TensorSpec)]
        shape = call.outs[0].shape if how == NONE else _broadcast(tensors)
        walked = grid(shape, [call.outs[0] if how == NONE else _like(tensors, shape), *tensors])
        kernel = Kernel(core, walked, 1, shards)
        kernel.out_operands = (replace(walked.operands[0], spec=call.outs[0]),)
        values = iter(kernel.ins)
        args = [
            next(values) if isinstance(arg, TensorSpec) else arg
            for position, arg in enumerate(call.args)
            if position != reduction_at
        ]
        result = formula(kernel, *args)
        if how == NONE:
            kernel.store(0, result)
        else:
            count = product(shape)
            mean = 1 / count if count else math.nan
            kernel.total(0, result, scale=mean if how == MEAN else 1.0)
        return lower_kernel(kernel, call.name)

    return lower


def _broadcast(tensors: list[TensorSpec]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*(spec.shape for spec in tensors)))


def _like(tensors: list[TensorSpec], shape: tuple[int, ...]) -> TensorSpec:
    """A stand-in for the result before it is summed: the first operand's layout."""
    first = next((spec for spec in tensors if spec.shape == shape), None)
    return first or TensorSpec.contiguous(tensors[0].dtype, *shape)


def _mse(t: Tile, x: Value, y: Value) -> Value:
    return t.act("square", x - y)


def _huber_core(t: Tile, x: Value, y: Value, delta: float) -> tuple[Value, Value]:
    """|x - y| and its part up to delta."""
    gap = t.act("abs", x - y)
    return gap, t.binary("min", gap, delta)


def _huber(t: Tile, x: Value, y: Value, delta: float = 1.0) -> Value:
    gap, near = _huber_core(t, x, y, delta)
    # near * (gap - near / 2)
    return t.stt(near, "multiply", -0.5, "add", gap) * near


def _smooth_l1(t: Tile, x: Value, y: Value, beta: float = 1.0) -> Value:
    if beta == 0:
        return t.act("abs", x - y)
    return _huber(t, x, y, beta) * (1 / beta)


def _bce(t: Tile, x: Value, y: Value, weight: Value | None = None) -> Value:
    # ATen holds both logarithms at -100.
    on = t.binary("max", t.act("log", x), -100.0)
    off = t.binary("max", t.act("log", x, scale=-1.0, bias=1.0), -100.0)
    value = off + y * (on - off)
    return -(value if weight is None else value * weight)


def _bce_with_logits(
    t: Tile, x: Value, y: Value, weight: Value | None = None, pos_weight: Value | None = None
) -> Value:
    smooth = t.act("softplus", x, scale=-1.0)
    if pos_weight is not None:
        smooth = smooth * (t.stt(pos_weight, "subtract", 1.0, "multiply", y) + 1.0)
    value = smooth + t.stt(y, "subtract", 1.0, "multiply", x) * -1.0
    return value if weight is None else value * weight


def _soft_margin(t: Tile, x: Value, y: Value) -> Value:
    return t.act("softplus", x * y, scale=-1.0)


def _kl_div(t: Tile, x: Value, y: Value, log_target: bool = False) -> Value:
    if log_target:
        return t.act("exp", y) * (y - x)
    positive = t.binary("is_gt", y, 0.0, torch.bool)
    return t.select(positive, y * (t.act("log", y) - x), 0.0)


_LOSSES: dict[str, tuple[Formula, int]] = {
    "mse_loss": (_mse, 2), "huber_loss": (_huber, 2), "smooth_l1_loss": (_smooth_l1, 2),
    "l1_loss": (lambda t, x, y: t.act("abs", x - y), 2),
    "binary_cross_entropy": (_bce, 3), "binary_cross_entropy_with_logits": (_bce_with_logits, 4),
    "soft_margin_loss": (_soft_margin, 2), "kl_div": (_kl_div, 2),
}  # fmt: skip

for _name, (_formula, _at) in _LOSSES.items():
    add((f"aten::{_name}",), loss(_formula, _at))


def gradient(formula: Formula, reduction_at: int) -> Callable[[OpCall, CoreSpec, int], Program]:
    """The lowering of a loss's gradient: of a mean, every element gets its share.

    The incoming gradient is one element ("one") where the loss was reduced.
    """

    def scaled(share: float) -> Formula:
        def result(t: Tile, grad: Value, *args: Any) -> Value:
            given = [arg for at, arg in enumerate(args, 1) if at != reduction_at]
            return formula(t, grad * share if share != 1 else grad, *given)

        return result

    def lower(call: OpCall, core: CoreSpec, shards: int) -> Program:
        mean = call.arg(reduction_at, MEAN) == MEAN
        share = 1 / max(call.outs[0].numel, 1) if mean else 1.0
        return elementwise(scaled(share))(call, core, shards)

    return lower


def _mse_backward(t: Tile, grad: Value, x: Value, y: Value) -> Value:
    return t.stt(x - y, "multiply", 2.0, "multiply", grad)


def _huber_backward(t: Tile, grad: Value, x: Value, y: Value, delta: Scalar = 1.0) -> Value:
    return t.scalar2(x - y, "max", -delta, "min", delta) * grad


def _smooth_l1_backward(t: Tile, grad: Value, x: Value, y: Value, beta: Scalar = 1.0) -> Value:
    if beta == 0:
        return t.act("sign", x - y) * grad
    return _huber_backward(t, grad, x, y, beta) * (1 / beta)


def _bce_backward(t: Tile, grad: Value, x: Value, y: Value, weight: Source | None = None) -> Value:
    # x (1 - x), at least 1e-12 as in ATen, with the sign turned on both sides.
    spread = t.binary("min", t.stt(x, "subtract", 1.0, "multiply", x), -1e-12)
    slope = t.reciprocal(spread) * (y - x) * grad
    return slope * weight if isinstance(weight, Value) else slope


def _soft_margin_backward(t: Tile, grad: Value, x: Value, y: Value) -> Value:
    return t.stt(t.act("sigmoid", x * y, scale=-1.0), "multiply", -1.0, "multiply", y) * grad


_GRADIENTS: dict[str, tuple[Formula, int]] = {
    "mse_loss_backward": (_mse_backward, 3),
    "huber_loss_backward": (_huber_backward, 3),
    "smooth_l1_loss_backward": (_smooth_l1_backward, 3),
    "binary_cross_entropy_backward": (_bce_backward, 4),
    "soft_margin_loss_backward": (_soft_margin_backward, 3),
}

for _name, (_formula, _at) in _GRADIENTS.items():
    add((f"aten::{_name}",), gradient(_formula, _at))
