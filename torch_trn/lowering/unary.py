"""Elementwise operators of one tensor: each is a short sequence of engine instructions.

ScalarE evaluates from tables (exp, tanh, gelu, erf, sin, arctan, ...); the rest is VectorE
arithmetic. Functions without a table are polynomials, one scalar_tensor_tensor per coefficient; the
number of terms is assumed (enough for fp32 in the usual double-interval fits).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from torch_trn.lowering.pointwise import Formula, pointwise
from torch_trn.lowering.tile import INT32, Tile, Value

#: Polynomial terms of special functions without an activation table (assumed).
SPECIAL_TERMS = 12


def polynomial(t: Tile, x: Value, terms: int = SPECIAL_TERMS) -> Value:
    """Horner's rule over x: a scalar_tensor_tensor `(sum + c) * x` per coefficient."""
    result = x
    for _ in range(terms):
        result = t.stt(result, "add", 1.0, "multiply", x)
    return result


def _act(op: str, **given: float) -> Formula:
    return lambda t, x, *_: t.act(op, x, **given)


def _compare(op: str, value: float) -> Formula:
    return lambda t, x, *_: t.binary(op, x, value, torch.bool)


def tan(t: Tile, x: Value, *_: Any) -> Value:
    """sin / cos, cos being sin a quarter period on."""
    return t.act("sin", x) / t.act("sin", x, bias=math.pi / 2)


def _sinh(t: Tile, x: Value, *_: Any) -> Value:
    return (t.act("exp", x) - t.act("exp", x, scale=-1.0)) * 0.5


def _cosh(t: Tile, x: Value, *_: Any) -> Value:
    return (t.act("exp", x) + t.act("exp", x, scale=-1.0)) * 0.5


def _asin(t: Tile, x: Value, *_: Any) -> Value:
    root = t.act("rsqrt", t.act("square", x), scale=-1.0, bias=1.0)
    return t.act("arctan", x * root)


def _acos(t: Tile, x: Value, *_: Any) -> Value:
    return t.scalar2(_asin(t, x), "multiply", -1.0, "add", math.pi / 2)


def _asinh(t: Tile, x: Value, *_: Any) -> Value:
    return t.act("log", t.act("sqrt", t.act("square", x), bias=1.0) + x)


def _acosh(t: Tile, x: Value, *_: Any) -> Value:
    return t.act("log", t.act("sqrt", t.act("square", x), bias=-1.0) + x)


def _atanh(t: Tile, x: Value, *_: Any) -> Value:
    ratio = t.act("copy", x, bias=1.0) / t.act("copy", x, scale=-1.0, bias=1.0)
    return t.act("log", ratio) * 0.5


def truncate(t: Tile, x: Value, *_: Any) -> Value:
    """Towards zero: through int32 and back."""
    return t.cast(t.cast(x, INT32), x.dtype)


def floor(t: Tile, x: Value, *_: Any) -> Value:
    """Truncate, then subtract one where that went up."""
    whole = truncate(t, x)
    return whole - t.binary("is_gt", whole, x, x.dtype)


def _ceil(t: Tile, x: Value, *_: Any) -> Value:
    whole = truncate(t, x)
    return whole + t.binary("is_lt", whole, x, x.dtype)


def _round(t: Tile, x: Value, decimals: int = 0, *_: Any) -> Value:
    # Adding and subtracting 1.5 * 2^23 rounds an fp32 to nearest even.
    magic = 1.5 * 2**23
    if not isinstance(decimals, int) or decimals == 0:
        return t.scalar2(x, "add", magic, "subtract", magic)
    scale = 10.0**decimals
    return t.scalar2(x * scale, "add", magic, "subtract", magic) * (1 / scale)


def _frac(t: Tile, x: Value, *_: Any) -> Value:
    return x - truncate(t, x)


def _expm1(t: Tile, x: Value, *_: Any) -> Value:
    return t.act("exp", x) - 1.0


def _sign_bit(t: Tile, x: Value, *_: Any) -> Value:
    return t.scalar2(x, "logical_shift_right", 31, "is_equal", 1)


def _isinf(t: Tile, x: Value, *_: Any) -> Value:
    return t.binary("is_equal", t.act("abs", x), math.inf, torch.bool)


def _isnan(t: Tile, x: Value, *_: Any) -> Value:
    return t.binary("not_equal", x, x, torch.bool)


def _nan_to_num(t: Tile, x: Value, *_: Any) -> Value:
    clean = t.select(_isnan(t, x), 0.0, x)
    return t.scalar2(clean, "min", 3.4e38, "max", -3.4e38)


def _logit(t: Tile, x: Value, eps: float | None = None, *_: Any) -> Value:
    if eps is not None:
        x = t.scalar2(x, "max", eps, "min", 1 - eps)
    return t.act("log", x) - t.act("log", x, scale=-1.0, bias=1.0)


def _sinc(t: Tile, x: Value, *_: Any) -> Value:
    ratio = t.act("sin", x, scale=math.pi) / (x * math.pi)
    return t.select(t.binary("is_equal", x, 0.0, torch.bool), 1.0, ratio)


def _special(t: Tile, x: Value, *_: Any) -> Value:
    """Two branches by argument size, each a polynomial, one with an exponential factor."""
    near, far = polynomial(t, x), polynomial(t, t.reciprocal(x))
    large = t.binary("is_gt", x, 8.0, torch.bool)
    return t.select(large, far * t.act("exp", x, scale=-1.0), near)


def _lgamma(t: Tile, x: Value, *_: Any) -> Value:
    return polynomial(t, t.reciprocal(x)) + t.act("log", x) * x


def _erfinv(t: Tile, x: Value, *_: Any) -> Value:
    w = t.act("log", t.act("square", x), scale=-1.0, bias=1.0)
    near, far = polynomial(t, w, 9), polynomial(t, t.act("sqrt", w, scale=-1.0), 9)
    return t.select(t.binary("is_gt", w, -5.0, torch.bool), near, far) * x


def _ndtr_log(t: Tile, x: Value, *_: Any) -> Value:
    return t.act("log", t.act("erf", x, scale=0.7071067811865476), scale=0.5, bias=0.5)


def _entr(t: Tile, x: Value, *_: Any) -> Value:
    return t.stt(t.act("log", x), "multiply", -1.0, "multiply", x)


def _logical_not(t: Tile, x: Value, *_: Any) -> Value:
    return t.binary("is_equal", x, 0, torch.bool)


def _bitwise_not(t: Tile, x: Value, *_: Any) -> Value:
    return t.binary("bitwise_xor", x, 1 if x.dtype == torch.bool else -1)


def _angle(t: Tile, x: Value, *_: Any) -> Value:
    return t.scalar2(x, "is_lt", 0.0, "multiply", math.pi)


def _identity(t: Tile, x: Value, *_: Any) -> Value:
    return x


FORMULAS: dict[str, Formula] = {
    "abs": _act("abs"), "neg": lambda t, x, *_: -x, "positive": _identity,
    "exp": _act("exp"), "exp2": _act("exp", scale=math.log(2)), "expm1": _expm1,
    "log": _act("log"), "log1p": _act("log", bias=1.0),
    "log2": lambda t, x, *_: t.act("log", x) * (1 / math.log(2)),
    "log10": lambda t, x, *_: t.act("log", x) * (1 / math.log(10)),
    "sqrt": _act("sqrt"), "rsqrt": _act("rsqrt"), "square": _act("square"),
    "reciprocal": lambda t, x, *_: t.reciprocal(x),
    "sin": _act("sin"), "cos": _act("sin", bias=math.pi / 2), "tan": tan,
    "asin": _asin, "acos": _acos, "atan": _act("arctan"),
    "sinh": _sinh, "cosh": _cosh, "tanh": _act("tanh"),
    "asinh": _asinh, "acosh": _acosh, "atanh": _atanh,
    "erf": _act("erf"), "erfc": lambda t, x, *_: t.scalar2(
        t.act("erf", x), "multiply", -1.0, "add", 1.0),
    "erfinv": _erfinv, "lgamma": _lgamma, "digamma": _lgamma, "i0": _special,
    "polygamma": lambda t, n, x, *_: _lgamma(t, x), "mvlgamma": lambda t, x, p=1, *_: _lgamma(t, x),
    "sigmoid": _act("sigmoid"), "sign": _act("sign"), "sgn": _act("sign"),
    "floor": floor, "ceil": _ceil, "trunc": truncate, "round": _round, "frac": _frac,
    "signbit": _sign_bit, "isnan": _isnan, "isinf": _isinf,
    "isposinf": _compare("is_equal", math.inf), "isneginf": _compare("is_equal", -math.inf),
    "nan_to_num": _nan_to_num, "logit": _logit, "sinc": _sinc, "angle": _angle,
    "deg2rad": lambda t, x, *_: x * (math.pi / 180),
    "rad2deg": lambda t, x, *_: x * (180 / math.pi),
    "logical_not": _logical_not, "bitwise_not": _bitwise_not,
    "conj_physical": _identity, "_conj_physical": _identity,
    "special_entr": _entr, "special_log_ndtr": _ndtr_log, "special_ndtri": _erfinv,
    "special_erfcx": _special, "special_i0e": _special, "special_i1": _special,
    "special_i1e": _special, "special_bessel_j0": _special, "special_bessel_j1": _special,
    "special_bessel_y0": _special, "special_bessel_y1": _special,
    "special_modified_bessel_i0": _special, "special_modified_bessel_i1": _special,
    "special_modified_bessel_k0": _special, "special_modified_bessel_k1": _special,
    "special_spherical_bessel_j0": _special,
}  # fmt: skip

pointwise(FORMULAS)
