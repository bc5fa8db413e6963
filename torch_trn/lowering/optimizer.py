"""Fused optimizer steps and gradient scaling: one pass over parameters, gradients and states.

VectorE does the products that need two tensors, ScalarE everything with a constant factor (its
scale and bias are free), so that both stay below the DMA's time. What depends on the step count is
one number for the whole list, computed once: the steps of a list are equal (`tile.py` refuses
others).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import Named, OpCall, named_args
from torch_trn.lowering.foreach import Key, lower_lists
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import grid
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import lower_kernel
from torch_trn.lowering.tile import FP32, MAX_FLOAT, Source, Value
from torch_trn.program import Program


class _Singles:
    """Arguments that may be a number or a tensor of one element: lr, grad_scale, found_inf."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.named = [arg for arg in args if isinstance(arg, Named)]

    def values(self, ones: list[Value]) -> list[Any]:
        """The arguments in order, tensors as tile values."""
        tiles = iter(ones)
        return [next(tiles) if isinstance(arg, Named) else arg for arg in self.args]


def _gradient(
    kernel: Kernel, grad: Value, scale: Value | None, maximize: bool
) -> tuple[Value, Value]:
    """(what the step uses, what is written back): unscaled, and for the step also negated to
    maximize."""
    plain = grad if scale is None else grad * kernel.reciprocal(scale)
    return (-plain if maximize else plain), plain


def _kept(kernel: Kernel, found: Value | None, old: Value, new: Value) -> Value:
    """`old` where a gradient was not finite: the step is skipped."""
    if found is None:
        return new
    return kernel.select(kernel.binary("is_equal", found, 1.0, torch.bool), old, new)


def _correction(kernel: Kernel, beta: float, step: Value) -> Value:
    """1 - beta^step, exact where it is small: 2 t / (t - 1) with t = tanh(step ln(beta) / 2)."""
    rate = math.log(beta) / 2 if beta > 0 else -MAX_FLOAT
    t = kernel.act("tanh", step, scale=rate)
    return (t * 2.0) * kernel.reciprocal(t - 1.0)


def _scaled_by(kernel: Kernel, value: Value, lr: Source, factor: Value) -> Value:
    """-lr x factor of one element each."""
    return kernel.binary("multiply", factor * lr, -1.0)


@lowering("aten::_fused_adamw", "aten::_fused_adam")
def adam(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, lr, betas, decay, eps...)."""
    args = named_args(call)
    params, grads, means, squares, maxima, steps = args[:6]
    beta1, beta2, weight_decay, eps, amsgrad, maximize = call.args[7:13]
    decoupled = "adamw" in call.name
    singles = _Singles(*steps[:1], args[6], *args[13:15])
    unscales = isinstance(args[13] if len(args) > 13 else None, Named)
    states = [means, squares, *([maxima] if amsgrad and maxima else [])]
    outs = [params, *states, *([grads] if unscales else [])]

    def build(kernel: Kernel, values: list[Value], ones: list[Value], _own: Key) -> None:
        param, grad, mean, square = values[:4]
        step, lr, scale, found = (*singles.values(ones), None, None)[:4]
        use, plain = _gradient(kernel, grad, scale, maximize)
        new = param
        if weight_decay and decoupled:
            rate = _decay(kernel, lr, weight_decay)
            new = kernel.act("copy", param, scale=rate)
        elif weight_decay:
            use = kernel.stt(param, "multiply", weight_decay, "add", use)
        new_mean = kernel.stt(mean, "multiply", beta1, "add",
                              kernel.act("copy", use, scale=1 - beta1))  # fmt: skip
        part = kernel.act("square", use, scale=math.sqrt(1 - beta2))
        new_square = kernel.stt(square, "multiply", beta2, "add", part)
        largest = kernel.binary("max", values[4], new_square) if len(states) > 2 else new_square
        second = kernel.reciprocal(_correction(kernel, beta2, step))
        root = kernel.act("sqrt", largest, scale=second)
        # 1 / (root + eps) in one tensor_scalar: add, then the power -1.
        update = new_mean * kernel.scalar2(root, "add", eps, "pow", -1.0)
        first = kernel.reciprocal(_correction(kernel, beta1, step))
        rate = _scaled_by(kernel, param, lr, first)
        new = kernel.stt(update, "multiply", rate, "add", new)
        results = [(param, new), (mean, new_mean), (square, new_square)]
        if len(states) > 2:
            results.append((values[4], largest))
        for number, (old, changed) in enumerate(results):
            kernel.store(number, _kept(kernel, found, old, changed))
        if unscales:
            kernel.store(len(results), _kept(kernel, found, grad, plain))

    ins = [params, grads, *states]
    return lower_lists(call, core, shards, outs, ins, singles.named, build)


def _decay(kernel: Kernel, lr: Source, weight_decay: float) -> Source:
    """1 - lr x weight_decay."""
    if isinstance(lr, Value):
        return kernel.scalar2(lr, "multiply", -weight_decay, "add", 1.0)
    return 1 - lr * weight_decay


@lowering("aten::_fused_sgd")
def sgd(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(params, grads, momentum buffers, weight_decay, momentum, lr, dampening, nesterov, ...)."""
    args = named_args(call)
    params, grads, buffers = args[:3]
    weight_decay, momentum, _lr, dampening, nesterov, maximize, first = call.args[3:10]
    singles = _Singles(args[5], *args[10:12])
    unscales = isinstance(args[10] if len(args) > 10 else None, Named)
    kept = [buffers] if buffers and momentum else []
    outs = [params, *kept, *([grads] if unscales else [])]

    def build(kernel: Kernel, values: list[Value], ones: list[Value], _own: Key) -> None:
        param, grad = values[:2]
        lr, scale, found = (*singles.values(ones), None, None)[:3]
        use, plain = _gradient(kernel, grad, scale, maximize)
        if weight_decay:
            use = kernel.stt(param, "multiply", weight_decay, "add", use)
        if kept:
            part = use if not dampening else kernel.act("copy", use, scale=1 - dampening)
            buffer = use if first else kernel.stt(values[2], "multiply", momentum, "add", part)
            use = kernel.stt(buffer, "multiply", momentum, "add", use) if nesterov else buffer
            kernel.store(1, _kept(kernel, found, values[2], buffer))
        rate = kernel.binary("multiply", lr, -1.0) if isinstance(lr, Value) else -lr
        new = kernel.stt(use, "multiply", rate, "add", param)
        kernel.store(0, _kept(kernel, found, param, new))
        if unscales:
            kernel.store(len(outs) - 1, _kept(kernel, found, grad, plain))

    ins = [params, grads, *kept]
    return lower_lists(call, core, shards, outs, ins, singles.named, build)


@lowering("aten::_fused_adagrad")
def adagrad(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(params, grads, state sums, steps, lr, lr_decay, weight_decay, eps, maximize, ...)."""
    args = named_args(call)
    params, grads, sums, steps = args[:4]
    lr_decay, weight_decay, eps, maximize = call.args[5:9]
    singles = _Singles(*steps[:1], args[4], *args[9:11])
    unscales = isinstance(args[9] if len(args) > 9 else None, Named)
    outs = [params, sums, *([grads] if unscales else [])]

    def build(kernel: Kernel, values: list[Value], ones: list[Value], _own: Key) -> None:
        param, grad, total = values[:3]
        step, lr, scale, found = (*singles.values(ones), None, None)[:4]
        use, plain = _gradient(kernel, grad, scale, maximize)
        if weight_decay:
            use = kernel.stt(param, "multiply", weight_decay, "add", use)
        new_total = total + kernel.act("square", use)
        root = kernel.scalar2(kernel.act("sqrt", new_total), "add", eps, "pow", -1.0)
        slower = kernel.scalar2(step, "subtract", 1.0, "multiply", lr_decay)
        rate = _scaled_by(kernel, param, lr, kernel.reciprocal(slower + 1.0))
        new = kernel.stt(use * root, "multiply", rate, "add", param)
        kernel.store(0, _kept(kernel, found, param, new))
        kernel.store(1, _kept(kernel, found, total, new_total))
        if unscales:
            kernel.store(2, _kept(kernel, found, grad, plain))

    ins = [params, grads, sums]
    return lower_lists(call, core, shards, outs, ins, singles.named, build)


@lowering("aten::_amp_foreach_non_finite_check_and_unscale")
def unscale(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(grads, found_inf, inv_scale): every gradient scaled, and whether one was not finite."""
    grads, found, scale = named_args(call)[:3]

    def build(kernel: Kernel, values: list[Value], ones: list[Value], _own: Key) -> None:
        before, factor = ones
        kernel.store(0, values[0] * factor)
        # x * 0 is not 0 exactly where x is infinite or nan.
        bad = kernel.scalar2(values[0], "multiply", 0.0, "not_equal", 0.0)
        kernel.total(1, kernel.binary("max", bad, before, FP32), op="max")

    return lower_lists(call, core, shards, [grads], [grads], [found, scale], build, totals=[found])


@lowering("aten::_amp_update_scale")
def update_scale(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(scale, growth_tracker, found_inf, growth, backoff, interval): two numbers."""
    scale, tracker, found = call.args[:3]
    growth, backoff, interval = call.args[3:6]
    names = ("in0", "in1", "in0", "in1", "in2")
    kernel = Kernel(core, grid((), [scale, tracker, scale, tracker, found]), 2, shards, names)
    value, count, bad = kernel.ins
    steps = count + 1
    full = kernel.binary("is_equal", steps, interval, torch.bool)
    grown = value * growth
    finite = kernel.binary("is_le", grown, MAX_FLOAT, torch.bool)
    after = kernel.select(full, kernel.select(finite, grown, value), value)
    inf = kernel.binary("not_equal", bad, 0.0, torch.bool)
    kernel.store(0, kernel.select(inf, value * backoff, after))
    kernel.store(1, kernel.select(inf, 0, kernel.select(full, 0, steps, torch.int32), torch.int32))
    return lower_kernel(kernel, call.name)
