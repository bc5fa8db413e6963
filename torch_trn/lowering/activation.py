"""Activation functions of neural networks and their gradients, with dropout's masks."""

from __future__ import annotations

from typing import Any

import torch

from torch_trn.lowering.pointwise import Formula, pointwise
from torch_trn.lowering.tile import Scalar, Tile, Value


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


def _above(op: str = "is_gt") -> Formula:
    def formula(t: Tile, grad: Value, x: Value, at: Scalar = 0, *_: Any) -> Value:
        return t.stt(x, op, at, "multiply", grad)

    return formula


def _threshold(t: Tile, x: Value, at: Scalar, value: Scalar) -> Value:
    return t.select(t.binary("is_gt", x, at, torch.bool), x, value)


def hardtanh(t: Tile, x: Value, low: Scalar = -1, high: Scalar = 1) -> Value:
    """x held between low and high."""
    return t.scalar2(x, "max", low, "min", high)


def _hardtanh_backward(t: Tile, grad: Value, x: Value, low: Scalar, high: Scalar) -> Value:
    inside = t.stt(x, "is_gt", low, "multiply", grad)
    return t.stt(x, "is_lt", high, "multiply", inside)


def _leaky_relu(t: Tile, x: Value, slope: Scalar = 0.01) -> Value:
    return t.stt(x, "multiply", slope, "max", x)


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
    slope = x + alpha * scale if is_result else t.act("exp", x, scale=rate) * (alpha * scale)
    positive = t.binary("is_gt", x, 0.0, torch.bool)
    return t.select(positive, scale, slope) * grad


def _softplus(t: Tile, x: Value, beta: Scalar = 1, threshold: Scalar = 20) -> Value:
    smooth = t.act("softplus", x, scale=beta)
    if beta != 1:
        smooth = smooth * (1 / beta)
    return t.select(t.binary("is_gt", x, threshold / beta, torch.bool), x, smooth)


def _softplus_backward(
    t: Tile, grad: Value, x: Value, beta: Scalar = 1, threshold: Scalar = 20
) -> Value:
    slope = t.act("sigmoid", x, scale=beta) * grad
    return t.select(t.binary("is_gt", x, threshold / beta, torch.bool), grad, slope)


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
    inner = t.select(t.binary("is_lt", x, -3.0, torch.bool), 0.0, slope)
    return t.select(t.binary("is_gt", x, 3.0, torch.bool), 1.0, inner) * grad


def _shrink(t: Tile, x: Value, at: Scalar = 0.5) -> Value:
    return t.stt(t.act("abs", x), "is_gt", at, "multiply", x)


def _softshrink(t: Tile, x: Value, at: Scalar = 0.5) -> Value:
    return x - hardtanh(t, x, -at, at)


def _shrink_backward(t: Tile, grad: Value, x: Value, at: Scalar = 0.5) -> Value:
    return t.stt(t.act("abs", x), "is_gt", at, "multiply", grad)


def _log_sigmoid(t: Tile, x: Value) -> tuple[Value, Value]:
    return t.act("log", t.act("sigmoid", x)), t.act("exp", t.act("abs", x), scale=-1.0)


def _log_sigmoid_backward(t: Tile, grad: Value, x: Value, *_: Any) -> Value:
    return t.act("sigmoid", x, scale=-1.0) * grad


def _logit_backward(t: Tile, grad: Value, x: Value, *_: Any) -> Value:
    return t.reciprocal(t.stt(x, "subtract", 1.0, "multiply", x)) * -1.0 * grad


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


def _rrelu_backward(t: Tile, grad: Value, x: Value, noise: Value, *_: Any) -> Value:
    return grad * noise


FORMULAS: dict[str, Formula] = {
    "relu": _act("relu"), "relu6": lambda t, x, *_: hardtanh(t, x, 0, 6),
    "gelu": _gelu, "gelu_backward": _gelu_backward,
    "silu": _act("silu"), "silu_backward": _silu_backward,
    "mish": _act("mish"), "mish_backward": _mish_backward,
    "sigmoid_backward": _sigmoid_backward, "tanh_backward": _tanh_backward,
    "threshold": _threshold, "threshold_backward": _above(),
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
