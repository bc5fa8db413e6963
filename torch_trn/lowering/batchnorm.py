"""Batch normalisation: a channel in each partition, batch and pixels along the free dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import Named, OpCall, TensorSpec, named_args, named_outs
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import Operand, grid, product
from torch_trn.lowering.norm import masked_named, normalised
from torch_trn.lowering.reduction import reduce_grid
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import lower_kernel
from torch_trn.lowering.tile import Value
from torch_trn.program import Program


def _others(x: TensorSpec) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def _count(x: TensorSpec) -> int:
    """Elements of one channel."""
    return max(product([x.shape[d] for d in _others(x)]), 1)


def _of_channel(one: Named) -> Operand:
    """One element for each channel."""
    size = one.spec.numel
    return Operand(one.spec, "col", size, rows=((size, one.spec.strides[0]),))


def _channel_kernel(
    core: CoreSpec, shards: int, full_outs: Sequence[Named], cols: Sequence[Named],
    full_ins: Sequence[Named], col_ins: Sequence[Named],
) -> Kernel:  # fmt: skip
    """Rows are channels: full results, per-channel results, full inputs, per-channel inputs."""
    x = full_ins[0].spec
    specs = [one.spec for one in (full_ins[0], *full_outs, *full_ins[1:])]
    walked = reduce_grid(x.shape, _others(x), (), specs)
    first, *others = walked.operands
    outs, ins = others[: len(full_outs)], [first, *others[len(full_outs) :]]
    small, given = [_of_channel(one) for one in cols], [_of_channel(one) for one in col_ins]
    found = replace(walked, operands=(*outs, *small, *ins, *given))
    names = [one.name for one in (*full_outs, *cols, *full_ins, *col_ins)]
    return Kernel(core, found, len(outs) + len(small), shards, names)


def _train(
    call: OpCall, core: CoreSpec, shards: int, x: Named, params: Sequence[Any], momentum: float,
    eps: float,
) -> Program:  # fmt: skip
    """y, mean and 1/std per channel; running statistics in place, or as two more results."""
    weight, bias, *running = params
    affine = [one for one in (weight, bias) if one]
    running = [one for one in running if one]
    y, *saved = (one for one in named_outs(call) if one.spec.numel or not x.spec.numel)
    stats, updated = saved[:2], saved[2:] or running
    kernel = _channel_kernel(core, shards, [y], [*stats, *updated], [x], [*affine, *running])
    given = list(kernel.ins[1:])
    gain = given.pop(0) if weight else None
    offset = given.pop(0) if bias else None
    mean, var = kernel.stats(kernel.ins[0])
    rstd = kernel.act("rsqrt", var, bias=eps)
    _affine(kernel, kernel.ins[0], mean, rstd, gain, offset)
    for index, value in enumerate((mean, rstd)[: len(stats)], 1):
        kernel.store(index, value)
    count = _count(x.spec)
    news = (mean, var * (count / max(count - 1, 1)))
    for index, (old, new) in enumerate(zip(given, news, strict=False), 1 + len(stats)):
        kernel.store(index, kernel.stt(new - old, "multiply", momentum, "add", old))
    return lower_kernel(kernel, call.name)


def _affine(
    kernel: Kernel, x: Value, mean: Value, rstd: Value, gain: Value | None, offset: Value | None
) -> None:
    """y = x * scale + shift in one activation, or two passes where channels are not rows."""
    scale = rstd if gain is None else rstd * gain
    shift = kernel.stt(mean, "multiply", -1.0, "multiply", scale)
    shift = shift if offset is None else shift + offset
    if {scale.kind, shift.kind} <= {"col", "one"}:
        kernel.store(0, kernel.act("identity", x, scale=scale, bias=shift))
    else:
        kernel.store(0, x * scale + shift)


def _channel_view(spec: TensorSpec, ndim: int) -> TensorSpec:
    """A per-channel vector as 1 x C x 1 x 1."""
    shape = tuple(spec.numel if dim == 1 else 1 for dim in range(ndim))
    return TensorSpec(
        spec.dtype, shape, tuple(spec.strides[0] if d == 1 else 0 for d in range(ndim))
    )


def _evaluate(
    call: OpCall, core: CoreSpec, shards: int, x: Named, params: Sequence[Any], eps: float
) -> Program:
    """y from running statistics: elementwise."""
    weight, bias, running_mean, running_var = params
    given = [one for one in (running_mean, running_var, weight, bias) if one]
    views = [_channel_view(one.spec, x.spec.ndim) for one in given]
    walked = grid(x.spec.shape, [call.outs[0], x.spec, *views])
    kernel = Kernel(core, walked, 1, shards, ["out0", x.name, *(one.name for one in given)])
    mean, var, *affine = kernel.ins[1:]
    gain = affine.pop(0) if weight else None
    offset = affine.pop(0) if bias else None
    _affine(kernel, kernel.ins[0], mean, kernel.act("rsqrt", var, bias=eps), gain, offset)
    return lower_kernel(kernel, call.name)


@lowering(
    "aten::native_batch_norm", "aten::_native_batch_norm_legit",
    "aten::_native_batch_norm_legit_functional",
)  # fmt: skip
def batch_norm(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(x, weight, bias, running_mean, running_var, training, momentum, eps)."""
    x, weight, bias, *running, training, momentum, eps = named_args(call)
    params = (weight, bias, *running, *(None,) * (2 - len(running)))
    if training or params[2] is None:
        return _train(call, core, shards, x, params, momentum, eps)
    return _evaluate(call, core, shards, x, params, eps)


@lowering("aten::_batch_norm_with_update", "aten::_batch_norm_with_update_functional")
def batch_norm_with_update(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(x, weight, bias, running_mean, running_var, momentum, eps), always in training."""
    x, *params, momentum, eps = named_args(call)
    return _train(call, core, shards, x, params, momentum, eps)


@lowering("aten::_batch_norm_no_update", "aten::_native_batch_norm_legit_no_training")
def batch_norm_no_update(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(x, weight, bias, running_mean, running_var, momentum, eps), never in training."""
    x, *params, momentum, eps = named_args(call)
    if params[2] is None:
        return _train(call, core, shards, x, params, momentum, eps)
    return _evaluate(call, core, shards, x, params, eps)


@lowering("aten::batch_norm_update_stats")
def batch_norm_update_stats(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """mean and variance (the biased one) of (x, running_mean, running_var, momentum)."""
    x, *running, momentum = named_args(call)
    running = [one for one in running if one]
    kernel = _channel_kernel(core, shards, [], [*named_outs(call), *running], [x], running)
    mean, var = kernel.stats(kernel.ins[0])
    kernel.store(0, mean)
    kernel.store(1, var)
    count = _count(x.spec)
    news = (mean, var * (count / max(count - 1, 1)))
    for index, (old, new) in enumerate(zip(kernel.ins[1:], news, strict=False), 2):
        kernel.store(index, kernel.stt(new - old, "multiply", momentum, "add", old))
    return lower_kernel(kernel, call.name)


@lowering("aten::native_batch_norm_backward", "aten::batch_norm_backward")
def batch_norm_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """dx = gain * rstd * (grad - mean(grad) - xhat * mean(grad * xhat)), dweight, dbias."""
    grad, x, weight, running_mean, running_var, mean, rstd, train, eps, mask = named_args(call)[:10]
    if not train:
        mean, rstd = running_mean, running_var
    dx, *sums = masked_named(call, mask)
    given = [mean, rstd, *([weight] if weight else [])]
    wanted = [one for one in sums if one]
    kernel = _channel_kernel(core, shards, [dx] if dx else [], wanted, [x, grad], given)
    value, slope, centre, scale, *rest = kernel.ins
    if not train:
        scale = kernel.act("rsqrt", scale, bias=eps)
    xhat = normalised(kernel, value, centre, scale)
    inner = kernel.reduce("add", slope * xhat)
    total = kernel.act_sum("copy", slope)[1]
    if dx:
        gain = scale * rest[0] if rest else scale
        part, shift = slope, None
        if train:
            count = _count(x.spec)
            part = kernel.stt(xhat, "multiply", inner * (-1 / count), "add", slope)
            shift = kernel.stt(total, "multiply", -1 / count, "multiply", gain)
        bias = 0.0 if shift is None else shift
        kernel.store(0, kernel.act("identity", part, scale=gain, bias=bias))
    results = [v for v, one in zip((inner, total), sums, strict=True) if one]
    for index, result in enumerate(results, 1 if dx else 0):
        kernel.store(index, result)
    return lower_kernel(kernel, call.name)
