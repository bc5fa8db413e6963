"""Fused recurrent cells: gates, new state and workspace in one pass, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import grid
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import lower_kernel
from torch_trn.lowering.softmax import row_grid
from torch_trn.lowering.tile import Tile, Value
from torch_trn.program import Program


def parts(spec: TensorSpec | None, count: int) -> list[TensorSpec]:
    """A tensor [..., count * H] as `count` views of H columns; a bias is one row."""
    if not isinstance(spec, TensorSpec):
        return []
    width = spec.shape[-1] // count
    view = TensorSpec(spec.dtype, (*spec.shape[:-1], width), spec.strides)
    return [view] * count


def cell(
    call: OpCall, core: CoreSpec, shards: int, outs: Sequence[TensorSpec],
    ins: Sequence[TensorSpec], whole_rows: bool = False,
) -> Kernel:  # fmt: skip
    """The Kernel over [batch, hidden] of one cell; sums over the batch need whole rows."""
    specs, shape = [*outs, *ins], outs[0].shape
    walked = row_grid(shape, [len(shape) - 1], specs) if whole_rows else grid(shape, specs)
    return Kernel(core, walked, len(outs), shards)


def _summed(t: Tile, groups: Sequence[Sequence[Value]]) -> list[Value]:
    """Input gates + hidden gates (+ their biases), gate by gate."""
    result = list(groups[0])
    for group in groups[1:]:
        if group:
            result = [a + b for a, b in zip(result, group, strict=True)]
    return result


def _take(values: list[Value], *counts: int) -> list[list[Value]]:
    found = []
    for count in counts:
        found.append(values[:count])
        del values[:count]
    return found


@lowering("aten::_thnn_fused_lstm_cell")
def lstm(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(input_gates, hidden_gates, cx, input_bias, hidden_bias) -> hy, cy, workspace."""
    gates, hidden, cx = call.args[:3]
    biases = [parts(call.arg(3), 4), parts(call.arg(4), 4)]
    outs = [*call.outs[:2], *parts(call.outs[2] if len(call.outs) > 2 else None, 4)]
    k = cell(call, core, shards, outs, [*parts(gates, 4), *parts(hidden, 4), cx, *biases[0],
                                       *biases[1]])  # fmt: skip
    a, b, c, d, e = _take(list(k.ins), 4, 4, 1, len(biases[0]), len(biases[1]))
    i, f, g, o = _summed(k, [a, b, d, e])
    i, f, o = k.act("sigmoid", i), k.act("sigmoid", f), k.act("sigmoid", o)
    g = k.act("tanh", g)
    cy = f * c[0] + i * g
    for index, value in enumerate((o * k.act("tanh", cy), cy, i, f, g, o)[: len(outs)]):
        k.store(index, value)
    return lower_kernel(k, call.name)


@lowering("aten::_thnn_fused_lstm_cell_backward_impl", "aten::_thnn_fused_lstm_cell_backward")
def lstm_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(grad_hy, grad_cy, cx, cy, workspace, has_bias) -> grad_gates, grad_cx, grad_bias."""
    grads = [a for a in call.args[:2] if isinstance(a, TensorSpec)]
    cx, cy, workspace = call.args[2:5]
    outs = [*parts(call.outs[0], 4), call.outs[1]]
    bias = parts(call.outs[2], 4) if len(call.outs) > 2 and call.args[5] else []
    k = cell(call, core, shards, [call.outs[1], *outs[:4], *bias],
             [*grads, cx, cy, *parts(workspace, 4)], bool(bias))  # fmt: skip
    given, (old, new), gates = _take(list(k.ins), len(grads), 2, 4)
    i, f, g, o = gates
    curve = k.act("tanh", new)
    slope = given[0] * o if isinstance(call.args[0], TensorSpec) else None
    total: Any = given[-1] if isinstance(call.args[1], TensorSpec) else None
    if slope is not None:
        # d tanh = 1 - tanh^2
        inner = k.stt(k.act("square", curve), "subtract", 1.0, "multiply", slope)
        total = -inner if total is None else total - inner
    total = total if total is not None else k.constant(0.0, old.dtype)
    k.store(0, total * f)
    gradients = [
        _sigmoid_slope(k, i, total * g), _sigmoid_slope(k, f, total * old),
        k.stt(k.act("square", g), "subtract", 1.0, "multiply", total * i) * -1.0,
        _sigmoid_slope(k, o, given[0] * curve) if slope is not None else total,
    ]  # fmt: skip
    for index, value in enumerate(gradients, 1):
        k.store(index, value)
    for index, value in enumerate(gradients[: len(bias)], 5):
        k.rowsum(index, value)
    return lower_kernel(k, call.name)


def _sigmoid_slope(t: Tile, y: Value, grad: Value) -> Value:
    """grad * y * (1 - y)."""
    return t.stt(t.stt(y, "subtract", 1.0, "multiply", y), "multiply", -1.0, "multiply", grad)


@lowering("aten::_thnn_fused_gru_cell")
def gru(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(input_gates, hidden_gates, hx, input_bias, hidden_bias) -> hy, workspace."""
    gates, hidden, hx = call.args[:3]
    biases = [parts(call.arg(3), 3), parts(call.arg(4), 3)]
    outs = [call.outs[0], *parts(call.outs[1] if len(call.outs) > 1 else None, 5)]
    k = cell(call, core, shards, outs, [*parts(gates, 3), *parts(hidden, 3), hx, *biases[0],
                                       *biases[1]])  # fmt: skip
    a, b, c, d, e = _take(list(k.ins), 3, 3, 1, len(biases[0]), len(biases[1]))
    a, b = _summed(k, [a, d]), _summed(k, [b, e])
    reset, update = k.act("sigmoid", a[0] + b[0]), k.act("sigmoid", a[1] + b[1])
    new = k.act("tanh", a[2] + reset * b[2])
    hy = new + update * (c[0] - new)
    for index, value in enumerate((hy, reset, update, new, c[0], b[2])[: len(outs)]):
        k.store(index, value)
    return lower_kernel(k, call.name)


@lowering("aten::_thnn_fused_gru_cell_backward")
def gru_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(grad_hy, workspace, has_bias) -> grads of input gates, hidden gates, hx, biases."""
    grad, workspace, has_bias = call.args[:3]
    outs = [call.outs[2], *parts(call.outs[0], 3), *parts(call.outs[1], 3)]
    biases = [*parts(call.outs[3], 3), *parts(call.outs[4], 3)] if has_bias and len(
        call.outs) > 4 else []  # fmt: skip
    k = cell(call, core, shards, [*outs, *biases], [grad, *parts(workspace, 5)],
             bool(biases))  # fmt: skip
    slope, reset, update, new, old, inner = k.ins
    dnew = k.stt(k.act("square", new), "subtract", 1.0, "multiply",
                 k.stt(update, "subtract", 1.0, "multiply", slope))  # fmt: skip
    dupdate = _sigmoid_slope(k, update, (old - new) * slope)
    dreset = _sigmoid_slope(k, reset, dnew * inner)
    k.store(0, slope * update)
    first, second = [dreset, dupdate, dnew], [dreset, dupdate, dnew * reset]
    for index, value in enumerate([*first, *second], 1):
        k.store(index, value)
    for index, value in enumerate([*first, *second][: len(biases)], 7):
        k.rowsum(index, value)
    return lower_kernel(k, call.name)
