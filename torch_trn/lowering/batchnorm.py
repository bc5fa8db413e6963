"""Batch normalisation: a channel in each partition, batch and pixels along the free dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import Grid, Operand, grid, product
from torch_trn.lowering.norm import masked_outs, normalised
from torch_trn.lowering.reduction import reduce_grid
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import lower_kernel
from torch_trn.lowering.tile import Value
from torch_trn.program import Program


def _others(x: TensorSpec) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def _channel_kernel(
    core: CoreSpec, shards: int, full_outs: Sequence[TensorSpec], cols: Sequence[TensorSpec],
    full_ins: Sequence[TensorSpec], col_ins: Sequence[Any],
) -> Kernel:  # fmt: skip
    """Rows are channels: full results, per-channel results, full inputs, per-channel inputs."""
    x = full_ins[0]
    walked = reduce_grid(x.shape, _others(x), (), [x, *full_outs, *full_ins[1:]])
    operands = walked.operands
    outs = operands[1 : 1 + len(full_outs)]
    ins = (operands[0], *operands[1 + len(full_outs) :])
    small = tuple(Operand(spec, "col", spec.numel) for spec in cols)
    given = tuple(Operand(s, "col", s.numel) for s in col_ins if isinstance(s, TensorSpec))
    found = Grid(walked.rows, walked.cols, (*outs, *small, *ins, *given))
    return Kernel(core, found, len(outs) + len(small), shards)


def _train(
    call: OpCall, core: CoreSpec, shards: int, x: TensorSpec, params: Sequence[Any], eps: float
) -> Program:
    """y, mean and 1/std per channel, running statistics updated."""
    weight, bias, running_mean, running_var = params
    running = [s for s in (running_mean, running_var) if isinstance(s, TensorSpec)]
    kernel = _channel_kernel(
        core, shards, call.outs[:1], [*call.outs[1:3], *running], [x], [weight, bias, *running]
    )
    given = iter(kernel.ins[1:])
    gain = next(given) if isinstance(weight, TensorSpec) else None
    offset = next(given) if isinstance(bias, TensorSpec) else None
    mean, var = kernel.stats(kernel.ins[0])
    rstd = kernel.act("rsqrt", var, bias=eps)
    _affine(kernel, kernel.ins[0], mean, rstd, gain, offset)
    for index, value in enumerate((mean, rstd)[: len(call.outs) - 1], 1):
        kernel.store(index, value)
    at = 1 + len(call.outs[1:3])
    for index, (old, new) in enumerate(zip(given, (mean, var), strict=False), at):
        kernel.store(index, kernel.stt(new - old, "multiply", 0.1, "add", old))
    return lower_kernel(kernel, call.name)


def _affine(
    kernel: Kernel, x: Value, mean: Value, rstd: Value, gain: Value | None, offset: Value | None
) -> None:
    """y = x * scale + shift in one activation."""
    scale = rstd if gain is None else rstd * gain
    shift = kernel.stt(mean, "multiply", -1.0, "multiply", scale)
    shift = shift if offset is None else shift + offset
    kernel.store(0, kernel.act("identity", x, scale=scale, bias=shift))


def _channel_view(spec: TensorSpec, ndim: int) -> TensorSpec:
    """A per-channel vector as 1 x C x 1 x 1."""
    shape = tuple(spec.numel if dim == 1 else 1 for dim in range(ndim))
    return TensorSpec(
        spec.dtype, shape, tuple(spec.strides[0] if d == 1 else 0 for d in range(ndim))
    )


def _evaluate(
    call: OpCall, core: CoreSpec, shards: int, x: TensorSpec, params: Sequence[Any], eps: float
) -> Program:
    """y from running statistics: elementwise."""
    weight, bias, running_mean, running_var = params
    given = [s for s in (running_mean, running_var, weight, bias) if isinstance(s, TensorSpec)]
    views = [_channel_view(spec, x.ndim) for spec in given]
    kernel = Kernel(core, grid(x.shape, [call.outs[0], x, *views]), 1, shards)
    mean, var, *affine = kernel.ins[1:]
    gain = affine.pop(0) if isinstance(weight, TensorSpec) and affine else None
    offset = affine.pop(0) if affine else None
    _affine(kernel, kernel.ins[0], mean, kernel.act("rsqrt", var, bias=eps), gain, offset)
    return lower_kernel(kernel, call.name)


@lowering("aten::native_batch_norm", "aten::_native_batch_norm_legit")
def batch_norm(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(x, weight, bias, running_mean, running_var, training, momentum, eps)."""
    x = call.args[0]
    given = [a for a in call.args[1:5] if isinstance(a, TensorSpec) or a is None]
    weight, bias, *running = given
    training, _momentum, eps = call.args[-3:]
    params = (weight, bias, *running, *(None,) * (2 - len(running)))
    if training or params[2] is None:
        return _train(call, core, shards, x, params, eps)
    return _evaluate(call, core, shards, x, params, eps)


@lowering("aten::_native_batch_norm_legit_functional")
def batch_norm_functional(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """As _native_batch_norm_legit with the new running statistics as results."""
    return batch_norm(OpCall(call.name, call.args, call.outs[:3]), core, shards)


@lowering(
    "aten::_batch_norm_with_update", "aten::_batch_norm_with_update_functional",
    "aten::batch_norm_update_stats",
)  # fmt: skip
def batch_norm_with_update(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(x, weight, bias, running_mean, running_var, momentum, eps), always in training."""
    x, *params = (
        call.args[:5] if len(call.args) >= 7 else (call.args[0], None, None, *call.args[1:3])
    )
    return _train(
        OpCall(call.name, call.args, call.outs[:3]), core, shards, x, params, call.args[-1]
    )


@lowering("aten::_batch_norm_no_update", "aten::_native_batch_norm_legit_no_training")
def batch_norm_no_update(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(x, weight, bias, running_mean, running_var, momentum, eps), never in training."""
    x, *params = call.args[:5]
    if params[2] is None:
        return _train(
            OpCall(call.name, call.args, call.outs[:3]), core, shards, x, params, call.args[-1]
        )
    return _evaluate(call, core, shards, x, params, call.args[-1])


@lowering("aten::native_batch_norm_backward", "aten::batch_norm_backward")
def batch_norm_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """dx = gain * rstd * (grad - mean(grad) - xhat * mean(grad * xhat)), dweight, dbias."""
    grad, x, weight, running_mean, running_var, mean, rstd, train = call.args[:8]
    mask = call.args[9]
    if not train or not isinstance(mean, TensorSpec) or not mean.numel:
        mean, rstd = running_mean, running_var
    dx, *sums = masked_outs(call, mask)
    kernel = _channel_kernel(
        core, shards, [dx] if dx else [], [s for s in sums if s], [x, grad],
        [mean, rstd, weight],
    )  # fmt: skip
    value, slope, centre, scale, *rest = kernel.ins
    xhat = normalised(kernel, value, centre, scale)
    inner = kernel.reduce("add", slope * xhat)
    total = kernel.act_sum("copy", slope)[1]
    count = max(product([x.shape[d] for d in _others(x)]), 1)
    if dx:
        gain = scale * rest[0] if rest else scale
        part = slope
        if train:
            part = kernel.stt(xhat, "multiply", inner * (-1 / count), "add", slope)
        shift = kernel.stt(total, "multiply", -1 / count, "multiply", gain) if train else 0.0
        kernel.store(0, kernel.act("identity", part, scale=gain, bias=shift))
    wanted = [v for v, s in zip((inner, total), sums, strict=False) if s]
    for index, result in enumerate(wanted, 1 if dx else 0):
        kernel.store(index, result)
    return lower_kernel(kernel, call.name)
