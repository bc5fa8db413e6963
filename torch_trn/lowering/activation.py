"""Activation functions of neural networks and their gradients, with dropout's masks."""

from __future__ import annotations

import math
from typing import Any

import torch

from torch_trn.lowering.pointwise import Formula, pointwise
from torch_trn.lowering.tile import FP32, Scalar, Tile, Value


def _act(op: str) -> Formula:
    return lambda t, x, *_: t.act(op, x)


def _gelu(t: Tile, x: Value, approximate: str = "none") -> Value:
    return t.act("gelu" if approximate == "none" else "gelu_apprx_tanh", x)


def _gelu_backward(t: Tile, grad: Value, x: Value, approximate: str = "none") -> Value:
    return t.act("gelu_dx" if approximate == "none" else "gelu_apprx_tanh_dx", x) * grad


def _sigmoid_backward(t: Tile, grad: Value, y: Value) -> Value:
    # (1 - y) y grad: a scalar_tensor_tensor (y - 1) y and one more with -grad.
    return t.stt(t.stt(y, "subtract", 1.0, "multiply", y), "multiply", -1.0, "multiply", grad)


def _tanh_backward(t: Tile, grad: Value, y: Value) -> Value:
    return t.stt(t.act("square", y), "subtract", 1.0, "multiply", grad) * -1.0


def _threshold(t: Tile, x: Value, at: Scalar, value: Scalar) -> Value:
    return t.select(t.binary("is_le", x, at, torch.bool), value, x, x.dtype)


def _threshold_backward(t: Tile, grad: Value, x: Value, at: Scalar = 0, *_: Any) -> Value:
    return t.select(t.binary("is_le", x, at, torch.bool), 0.0, grad)


def hardtanh(t: Tile, x: Value, low: Scalar = -1, high: Scalar = 1) -> Value:
    """x held between low and high."""
    return t.scalar2(x, "max", low, "min", high)


def _outside(t: Tile, x: Value, low: Scalar, high: Scalar, *, edges: bool = True) -> Value:
    """Whether x is beyond low or high (or at one of them)."""
    under, over = ("is_le", "is_ge") if edges else ("is_lt", "is_gt")
    return t.stt(x, over, high, "max", t.binary(under, x, low, FP32), torch.bool)


def _hardtanh_backward(t: Tile, grad: Value, x: Value, low: Scalar, high: Scalar) -> Value:
    return t.select(_outside(t, x, low, high), 0.0, grad)


def _leaky_relu(t: Tile, x: Value, slope: Scalar = 0.01) -> Value:
    if 0 < slope <= 1:
        return t.stt(x, "multiply", slope, "max", x)
    return t.select(t.binary("is_gt", x, 0.0, torch.bool), x, x * slope)


def _leaky_relu_backward(t: Tile, grad: Value, x: Value, slope: Scalar, *_: Any) -> Value:
    positive = t.binary("is_gt", x, 0.0, torch.bool)
    return t.select(positive, grad, grad * slope)


def _elu(t: Tile, x: Value, alpha: Scalar = 1, scale: Scalar = 1, rate: Scalar = 1) -> Value:
    below = t.scalar2(t.act("exp", x, scale=rate), "subtract", 1.0, "multiply", alpha * scale)
    positive = t.binary("is_gt", x, 0.0, torch.bool)
    return t.select(positive, x * scale if scale != 1 else x, below)


def _elu_backward(
    t: Tile, grad: Value, alpha: Scalar, scale: Scalar, rate: Scalar, is_result: bool, x: Value
) -> Value:
    steep = alpha * scale * rate
    if is_result:
        slope = t.scalar2(x, "add", alpha * scale, "multiply", rate)
    else:
        slope = t.act("exp", x, scale=rate) * steep
    positive = t.binary("is_gt", x, 0.0, torch.bool)
    return t.select(positive, float(scale), slope) * grad


def _softplus(t: Tile, x: Value, beta: Scalar = 1, threshold: Scalar = 20) -> Value:
    smooth = t.act("softplus", x, scale=beta)
    if beta != 1:
        smooth = smooth * (1 / beta)
    above = t.scalar2(x, "multiply", float(beta), "is_gt", float(threshold), torch.bool)
    return t.select(above, x, smooth)


def _softplus_backward(
    t: Tile, grad: Value, x: Value, beta: Scalar = 1, threshold: Scalar = 20
) -> Value:
    slope = t.act("sigmoid", x, scale=beta) * grad
    above = t.scalar2(x, "multiply", float(beta), "is_gt", float(threshold), torch.bool)
    return t.select(above, grad, slope)


def _silu_backward(t: Tile, grad: Value, x: Value) -> Value:
    return t.act("silu_dx", x) * grad


def _mish_backward(t: Tile, grad: Value, x: Value) -> Value:
    gate = t.act("tanh", t.act("softplus", x))
    slope = t.stt(t.act("square", gate), "subtract", 1.0, "multiply", t.act("sigmoid", x))
    return (gate - slope * x) * grad


def _hardsigmoid(t: Tile, x: Value) -> Value:
    return hardtanh(t, t.scalar2(x, "multiply", 1 / 6, "add", 0.5), 0.0, 1.0)


def _hardsigmoid_backward(t: Tile, grad: Value, x: Value) -> Value:
    return _hardtanh_backward(t, grad * (1 / 6), x, -3.0, 3.0)


def _hardswish(t: Tile, x: Value) -> Value:
    return _hardsigmoid(t, x) * x


def _hardswish_backward(t: Tile, grad: Value, x: Value) -> Value:
    slope = t.scalar2(x, "multiply", 1 / 3, "add", 0.5)
    inner = t.select(t.binary("is_le", x, -3.0, torch.bool), 0.0, slope)
    return t.select(t.binary("is_ge", x, 3.0, torch.bool), 1.0, inner) * grad


def _shrink(t: Tile, x: Value, at: Scalar = 0.5) -> Value:
    return t.stt(t.act("abs", x), "is_gt", at, "multiply", x)


def _softshrink(t: Tile, x: Value, at: Scalar = 0.5) -> Value:
    return x - hardtanh(t, x, -at, at)


def _shrink_backward(t: Tile, grad: Value, x: Value, at: Scalar = 0.5) -> Value:
    inside = t.scalar2(x, "abs_max", 0.0, "is_le", at, torch.bool)
    return t.select(inside, 0.0, grad)


def _log_sigmoid(t: Tile, x: Value) -> tuple[Value, Value]:
    return -t.act("softplus", x, scale=-1.0), t.act("exp", t.act("abs", x), scale=-1.0)


def _log_sigmoid_backward(t: Tile, grad: Value, x: Value, *_: Any) -> Value:
    return t.act("sigmoid", x, scale=-1.0) * grad


def _logit_backward(t: Tile, grad: Value, x: Value, eps: Scalar | None = None) -> Value:
    slope = t.reciprocal(t.act("copy", x, scale=-1.0, bias=1.0) * x) * grad
    low, high, fill = (0.0, 1.0, math.nan) if eps is None else (eps, 1.0 - eps, 0.0)
    return t.select(_outside(t, x, low, high, edges=False), fill, slope)


def _prelu(t: Tile, x: Value, weight: Value) -> Value:
    return t.select(t.binary("is_gt", x, 0.0, torch.bool), x, x * weight)


def _prelu_backward(t: Tile, grad: Value, x: Value, weight: Value) -> tuple[Value, Value]:
    positive = t.binary("is_gt", x, 0.0, torch.bool)
    return t.select(positive, grad, grad * weight), t.select(positive, 0.0, x * grad)


def _dropout(t: Tile, x: Value, p: Scalar, train: bool | None = True) -> tuple[Value, Value]:
    if not train or p == 0:
        return x, t.constant(1, torch.bool)
    keep = t.binary("is_ge", t.random(), p, torch.bool)
    return t.stt(x, "multiply", 1 / (1 - p) if p < 1 else 0.0, "multiply", keep), keep


def _dropout_backward(t: Tile, grad: Value, mask: Value, scale: Scalar) -> Value:
    return t.stt(grad, "multiply", scale, "multiply", mask)


def _rrelu_backward(
    t: Tile, grad: Value, x: Value, noise: Value, low: Scalar = 1 / 8, high: Scalar = 1 / 3,
    training: bool = False, *_: Any,
) -> Value:  # fmt: skip
    """Each element's own slope in training, else the middle one."""
    if training and high - low > 1e-6:
        return grad * noise
    return _leaky_relu_backward(t, grad, x, (low + high) / 2)


def _relu(t: Tile, x: Value, *_: Any) -> Value:
    return t.act("relu", x) if x.dtype.is_floating_point else t.binary("max", x, 0)


FORMULAS: dict[str, Formula] = {
    "relu": _relu, "relu6": lambda t, x, *_: hardtanh(t, x, 0, 6),
    "gelu": _gelu, "gelu_backward": _gelu_backward,
    "silu": _act("silu"), "silu_backward": _silu_backward,
    "mish": _act("mish"), "mish_backward": _mish_backward,
    "sigmoid_backward": _sigmoid_backward, "tanh_backward": _tanh_backward,
    "threshold": _threshold, "threshold_backward": _threshold_backward,
    "hardtanh": hardtanh, "hardtanh_backward": _hardtanh_backward,
    "leaky_relu": _leaky_relu, "leaky_relu_backward": _leaky_relu_backward,
    "elu": _elu, "elu_backward": _elu_backward, "celu": lambda t, x, alpha=1, *_: _elu(
        t, x, alpha, 1, 1 / alpha),
    "selu": lambda t, x, *_: _elu(t, x, 1.6732632423543772, 1.0507009873554805),
    "softplus": _softplus, "softplus_backward": _softplus_backward,
    "hardsigmoid": _hardsigmoid, "hardsigmoid_backward": _hardsigmoid_backward,
    "hardswish": _hardswish, "hardswish_backward": _hardswish_backward,
    "hardshrink": _shrink, "hardshrink_backward": _shrink_backward,
    "softshrink": _softshrink, "softshrink_backward": _shrink_backward,
    "log_sigmoid_forward": _log_sigmoid, "log_sigmoid_backward": _log_sigmoid_backward,
    "logit_backward": _logit_backward,
    "_prelu_kernel": _prelu, "_prelu_kernel_backward": _prelu_backward,
    "native_dropout": _dropout, "native_dropout_backward": _dropout_backward,
    "_masked_scale": lambda t, x, mask, scale: t.stt(x, "multiply", scale, "multiply", mask),
    "rrelu_with_noise_backward": _rrelu_backward,
}  # fmt: skip

pointwise(FORMULAS)
