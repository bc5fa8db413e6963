"""Fused optimizer steps and gradient scaling: one pass over parameters, gradients and states.

VectorE does the products that need two tensors, ScalarE everything with a constant factor (its
scale and bias are free), so that both stay below the DMA's time.
"""

from __future__ import annotations

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.foreach import lower_lists
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import grid
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import lower_kernel
from torch_trn.lowering.tile import FP32, Value
from torch_trn.program import Program


def _unscaled(kernel: Kernel, grad: Value, scale: Value | None, maximize: bool) -> Value:
    """The gradient divided by the loss scale, negated to maximize."""
    if scale is not None:
        grad = grad * kernel.reciprocal(scale)
    return -grad if maximize else grad


def _singles(call: OpCall) -> list[TensorSpec]:
    """Tensor arguments that are one number: lr, grad_scale, found_inf."""
    return [arg for arg in call.args if isinstance(arg, TensorSpec)]


@lowering("aten::_fused_adamw", "aten::_fused_adam")
def adam(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, lr, betas, ...)."""
    params, grads, means, squares, maxima, steps = call.args[:6]
    weight_decay, amsgrad, maximize = call.args[9], call.args[11], call.args[12]
    decoupled = "adamw" in call.name
    states = [means, squares, *([maxima] if amsgrad and maxima else [])]
    if not params:
        return lower_lists(call, core, shards, [], [], [], lambda *_: None)
    scaled = any(isinstance(arg, TensorSpec) for arg in call.args[13:14])

    def build(kernel: Kernel, values: list[Value], ones: list[Value]) -> None:
        param, grad, mean, square = values[:4]
        grad = _unscaled(kernel, grad, ones[-1] if scaled and ones else None, maximize)
        if weight_decay:
            if decoupled:
                param = kernel.act("copy", param, scale=1 - 1e-3 * weight_decay)
            else:
                grad = kernel.stt(param, "multiply", weight_decay, "add", grad)
        beta1, beta2 = call.args[7], call.args[8]
        mean = kernel.stt(mean, "multiply", beta1, "add", kernel.act("copy", grad, scale=1 - beta1))
        step2 = kernel.act("square", grad, scale=(1 - beta2) ** 0.5)
        square = kernel.stt(square, "multiply", beta2, "add", step2)
        largest = kernel.binary("max", values[4], square) if len(values) > 4 else square
        root = kernel.act("sqrt", largest, scale=ones[0] if ones else 1.0)
        # 1 / (root + eps) in one tensor_scalar: add, then the power -1.
        update = mean * kernel.scalar2(root, "add", 1e-8, "pow", -1.0)
        param = kernel.stt(update, "multiply", -1e-3, "add", param)
        kernel.store(0, param)
        kernel.store(1, mean)
        kernel.store(2, square)
        if len(values) > 4:
            kernel.store(3, largest)

    singles = [steps[0], *_singles(call)] if steps else _singles(call)
    outs = [params, *states]
    return lower_lists(call, core, shards, outs, [params, grads, *states], singles, build)


@lowering("aten::_fused_sgd")
def sgd(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(params, grads, momentum buffers, weight_decay, momentum, lr, dampening, nesterov, ...)."""
    params, grads, buffers = call.args[:3]
    weight_decay, momentum, _lr, dampening, nesterov, maximize, first = call.args[3:10]
    if not params:
        return lower_lists(call, core, shards, [], [], [], lambda *_: None)
    kept = [buffers] if buffers and momentum else []
    scaled = any(isinstance(arg, TensorSpec) for arg in call.args[10:11])

    def build(kernel: Kernel, values: list[Value], ones: list[Value]) -> None:
        param, grad = values[:2]
        grad = _unscaled(kernel, grad, ones[-1] if scaled and ones else None, maximize)
        if weight_decay:
            grad = kernel.stt(param, "multiply", weight_decay, "add", grad)
        if kept:
            part = grad if not dampening else kernel.act("copy", grad, scale=1 - dampening)
            buffer = grad if first else kernel.stt(values[2], "multiply", momentum, "add", part)
            grad = kernel.stt(buffer, "multiply", momentum, "add", grad) if nesterov else buffer
            kernel.store(1, buffer)
        kernel.store(0, kernel.stt(grad, "multiply", -1e-3, "add", param))

    lists = [params, grads, *kept]
    return lower_lists(call, core, shards, [params, *kept], lists, _singles(call), build)


@lowering("aten::_fused_adagrad")
def adagrad(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(params, grads, state sums, steps, lr, lr_decay, weight_decay, eps, maximize, ...)."""
    params, grads, sums, steps = call.args[:4]
    weight_decay = next((a for a in call.args[6:7] if isinstance(a, float)), 0.0)
    maximize = any(arg is True for arg in call.args[4:])
    if not params:
        return lower_lists(call, core, shards, [], [], [], lambda *_: None)

    def build(kernel: Kernel, values: list[Value], ones: list[Value]) -> None:
        param, grad, total = values[:3]
        grad = _unscaled(kernel, grad, None, maximize)
        if weight_decay:
            grad = kernel.stt(param, "multiply", weight_decay, "add", grad)
        total = total + kernel.act("square", grad)
        root = kernel.scalar2(kernel.act("sqrt", total), "add", 1e-10, "pow", -1.0)
        kernel.store(0, kernel.stt(grad * root, "multiply", -1e-3, "add", param))
        kernel.store(1, total)

    singles = [*steps[:1], *_singles(call)]
    return lower_lists(call, core, shards, [params, sums], [params, grads, sums], singles, build)


@lowering("aten::_amp_foreach_non_finite_check_and_unscale")
def unscale(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(grads, found_inf, inv_scale): every gradient scaled, and whether one was not finite."""
    grads, _found, scale = call.args[:3]
    if not grads:
        return lower_lists(call, core, shards, [], [], [], lambda *_: None)

    def build(kernel: Kernel, values: list[Value], ones: list[Value]) -> None:
        scaled = values[0] * ones[-1]
        kernel.store(0, scaled)
        # x * 0 is not 0 exactly where x is infinite or nan.
        bad = kernel.scalar2(values[0], "multiply", 0.0, "not_equal", 0.0)
        kernel.total(1, kernel.reduce("max", bad, FP32), op="max")

    flags = tuple(TensorSpec.contiguous(torch.float32, 1) for _ in grads)
    return lower_lists(call, core, shards, [grads, flags], [grads], [scale], build)


@lowering("aten::_amp_update_scale")
def update_scale(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(scale, growth_tracker, found_inf, growth, backoff, interval): three numbers."""
    scale, tracker, found = call.args[:3]
    kernel = Kernel(core, grid((), [scale, tracker, scale, tracker, found]), 2, shards)
    value, count, bad = kernel.ins
    steps = kernel.stt(count, "add", 1, "multiply", kernel.binary("is_equal", bad, 0.0))
    grown = kernel.scalar2(steps, "is_ge", call.arg(5, 2000), "multiply", call.arg(3, 2.0))
    kernel.store(0, kernel.select(bad, value * call.arg(4, 0.5), value * grown))
    kernel.store(1, steps)
    return lower_kernel(kernel, call.name)
