"""Fused recurrent cells: gates, new state and workspace in one pass, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import Named, OpCall, TensorSpec, named_args, named_outs
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import grid
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import lower_kernel
from torch_trn.lowering.softmax import row_grid
from torch_trn.lowering.tile import Tile, Value
from torch_trn.program import Builder, Program


@dataclass(frozen=True)
class Part:
    """Columns of a tensor of the call: a view and its first element's offset."""

    spec: TensorSpec
    name: str
    offset: int = 0


def whole(tensor: Named) -> Part:
    """A tensor as it is."""
    return Part(tensor.spec, tensor.name)


def parts(tensor: Named | None, count: int) -> list[Part]:
    """A tensor [..., count * H] as `count` parts of H columns; none of what is not given."""
    if tensor is None:
        return []
    spec = tensor.spec
    width = spec.shape[-1] // count
    view = TensorSpec(spec.dtype, (*spec.shape[:-1], width), spec.strides)
    step = width * spec.strides[-1]
    return [Part(view, tensor.name, at * step) for at in range(count)]


def cell(
    core: CoreSpec, shards: int, outs: Sequence[Part], ins: Sequence[Part], whole_rows: bool = False
) -> Kernel:
    """The Kernel over [batch, hidden] of one cell; sums over the batch need whole rows."""
    taken, shape = [*outs, *ins], outs[0].spec.shape
    specs = [part.spec for part in taken]
    walked = row_grid(shape, [len(shape) - 1], specs) if whole_rows else grid(shape, specs)
    operands = tuple(
        replace(operand, offset=part.offset)
        for operand, part in zip(walked.operands, taken, strict=True)
    )
    names = [part.name for part in taken]
    return Kernel(core, replace(walked, operands=operands), len(outs), shards, names)


def _summed(groups: Sequence[Sequence[Value]]) -> list[Value]:
    """Input gates + hidden gates (+ their biases), gate by gate."""
    result = list(groups[0])
    for group in groups[1:]:
        if group:
            result = [a + b for a, b in zip(result, group, strict=True)]
    return result


def _take(values: Sequence[Value], *counts: int) -> list[list[Value]]:
    """`values` in runs of so many."""
    found, at = [], 0
    for count in counts:
        found.append(list(values[at : at + count]))
        at += count
    return found


@lowering("aten::_thnn_fused_lstm_cell")
def lstm(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(input_gates, hidden_gates, cx, input_bias, hidden_bias) -> hy, cy, workspace."""
    gates, hidden, cx, *biases = named_args(call)
    given, added = [parts(bias, 4) for bias in biases], named_outs(call)
    outs = [whole(out) for out in added[:2]] + [p for out in added[2:3] for p in parts(out, 4)]
    ins = [*parts(gates, 4), *parts(hidden, 4), whole(cx), *(p for bias in given for p in bias)]
    k = cell(core, shards, outs, ins)
    a, b, c, *rest = _take(k.ins, 4, 4, 1, *(len(bias) for bias in given))
    i, f, g, o = _summed([a, b, *rest])
    i, f, o = k.act("sigmoid", i), k.act("sigmoid", f), k.act("sigmoid", o)
    g = k.act("tanh", g)
    cy = f * c[0] + i * g
    for index, value in enumerate((o * k.act("tanh", cy), cy, i, f, g, o)[: len(outs)]):
        k.store(index, value)
    return lower_kernel(k, call.name)


@lowering("aten::_thnn_fused_lstm_cell_backward_impl", "aten::_thnn_fused_lstm_cell_backward")
def lstm_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(grad_hy, grad_cy, cx, cy, workspace, has_bias) -> grad_gates, grad_cx, grad_bias."""
    grad_hy, grad_cy, cx, cy, workspace, has_bias = named_args(call)[:6]
    grads = [whole(grad) for grad in (grad_hy, grad_cy) if grad is not None]
    if not grads:
        return Builder(core, call.name.removeprefix("aten::")).build()
    results = named_outs(call)
    bias = parts(results[2], 4) if has_bias and len(results) > 2 else []
    k = cell(core, shards, [whole(results[1]), *parts(results[0], 4), *bias],
             [*grads, whole(cx), whole(cy), *parts(workspace, 4)], bool(bias))  # fmt: skip
    given, (old, new), (i, f, g, o) = _take(k.ins, len(grads), 2, 4)
    curve = k.act("tanh", new)
    if grad_hy is None:
        total, slope = given[0], k.constant(0.0, old.dtype)
    else:
        # d tanh = 1 - tanh^2
        inner = k.stt(k.act("square", curve), "subtract", 1.0, "multiply", given[0] * o)
        total = -inner if grad_cy is None else given[1] - inner
        slope = _sigmoid_slope(k, o, given[0] * curve)
    k.store(0, total * f)
    gradients = [
        _sigmoid_slope(k, i, total * g), _sigmoid_slope(k, f, total * old),
        k.stt(k.act("square", g), "subtract", 1.0, "multiply", total * i) * -1.0, slope,
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
    gates, hidden, hx, *biases = named_args(call)
    given, added = [parts(bias, 3) for bias in biases], named_outs(call)
    outs = [whole(added[0]), *(p for out in added[1:2] for p in parts(out, 5))]
    ins = [*parts(gates, 3), *parts(hidden, 3), whole(hx), *(p for bias in given for p in bias)]
    k = cell(core, shards, outs, ins)
    a, b, c, *rest = _take(k.ins, 3, 3, 1, *(len(bias) for bias in given))
    a, b = _summed([a, *rest[:1]]), _summed([b, *rest[1:]])
    reset, update = k.act("sigmoid", a[0] + b[0]), k.act("sigmoid", a[1] + b[1])
    new = k.act("tanh", a[2] + reset * b[2])
    hy = new + update * (c[0] - new)
    for index, value in enumerate((hy, reset, update, new, c[0], b[2])[: len(outs)]):
        k.store(index, value)
    return lower_kernel(k, call.name)


@lowering("aten::_thnn_fused_gru_cell_backward")
def gru_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(grad_hy, workspace, has_bias) -> grads of input gates, hidden gates, hx, biases."""
    grad, workspace, has_bias = named_args(call)[:3]
    results = named_outs(call)
    outs = [whole(results[2]), *parts(results[0], 3), *parts(results[1], 3)]
    biases = [p for out in results[3:5] for p in parts(out, 3)] if has_bias else []
    k = cell(core, shards, [*outs, *biases], [whole(grad), *parts(workspace, 5)], bool(biases))
    slope, reset, update, new, old, inner = k.ins
    dnew = k.stt(k.act("square", new), "subtract", 1.0, "multiply",
                 k.stt(update, "subtract", 1.0, "multiply", slope))  # fmt: skip
    dupdate = _sigmoid_slope(k, update, (old - new) * slope)
    dreset = _sigmoid_slope(k, reset, dnew * inner)
    k.store(0, slope * update)
    gradients = [dreset, dupdate, dnew, dreset, dupdate, dnew * reset]
    for index, value in enumerate(gradients, 1):
        k.store(index, value)
    for index, value in enumerate(gradients[: len(biases)], 7):
        k.rowsum(index, value)
    return lower_kernel(k, call.name)
