"""Elementwise operators of two and more tensors: arithmetic, comparison, logic, bits, selection.

An argument that is a number (a Scalar overload, or a wrapped number) becomes part of the
instruction instead of an operand.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from torch_trn.lowering.pointwise import Formula, pointwise
from torch_trn.lowering.tile import FP32, Scalar, Source, Tile, Value
from torch_trn.lowering.unary import floor, polynomial, truncate

_MIRROR = {
    "is_gt": "is_lt", "is_ge": "is_le", "is_lt": "is_gt", "is_le": "is_ge",
    "subtract": "reverse_subtract",
}  # fmt: skip


def tensor(t: Tile, x: Source, dtype: torch.dtype = FP32) -> Value:
    """x as a tile value; a number becomes a filled tile."""
    return x if isinstance(x, Value) else t.constant(x, dtype)


def ordered(t: Tile, op: str, x: Source, y: Source, dtype: torch.dtype | None = None) -> Value:
    """`x op y` where either side may be a number."""
    if isinstance(x, Value):
        return t.binary(op, x, y, dtype)
    if isinstance(y, Value):
        return t.binary(_MIRROR.get(op, op), y, x, dtype)
    return t.binary(op, tensor(t, x), y, dtype)


def _op(op: str) -> Formula:
    return lambda t, x, y, *_: ordered(t, op, x, y)


def _compare(op: str) -> Formula:
    return lambda t, x, y, *_: ordered(t, op, x, y, torch.bool)


def add(t: Tile, x: Source, y: Source, alpha: Scalar = 1, *_: Any) -> Value:
    """x + alpha * y, in one instruction."""
    if alpha == 1:
        return ordered(t, "add", x, y)
    if isinstance(y, Value):
        return t.stt(y, "multiply", alpha, "add", tensor(t, x))
    return ordered(t, "add", x, y * alpha)


def sub(t: Tile, x: Source, y: Source, alpha: Scalar = 1, *_: Any) -> Value:
    """x - alpha * y, in one instruction."""
    if alpha == 1:
        return ordered(t, "subtract", x, y)
    return add(t, x, y, -alpha)


def divide(t: Tile, x: Source, y: Source) -> Value:
    """x / y as x times a reciprocal."""
    if isinstance(x, Value):
        return t.divide(x, y)
    return x / tensor(t, y)


def _div(t: Tile, x: Source, y: Source, mode: str | None = None, *_: Any) -> Value:
    quotient = divide(t, x, y)
    if mode == "floor":
        return floor(t, quotient)
    return truncate(t, quotient) if mode == "trunc" else quotient


def _floor_divide(t: Tile, x: Source, y: Source, *_: Any) -> Value:
    return floor(t, divide(t, x, y))


def _fmod(t: Tile, x: Source, y: Source, *_: Any) -> Value:
    return ordered(t, "subtract", x, truncate(t, divide(t, x, y)) * y)


def _remainder(t: Tile, x: Source, y: Source, *_: Any) -> Value:
    return ordered(t, "subtract", x, floor(t, divide(t, x, y)) * y)


def power(t: Tile, x: Source, y: Source, *_: Any) -> Value:
    """x ** y: products or a table for the usual constants, else exp(y log x)."""
    if isinstance(x, Value) and not isinstance(y, Value):
        if y == 2:
            return t.act("square", x)
        if y == 1:
            return x
        if y == 3:
            return t.act("square", x) * x
        if y in (0.5, -0.5, -1):
            return t.reciprocal(x) if y == -1 else t.act("sqrt" if y == 0.5 else "rsqrt", x)
        return t.binary("pow", x, y)
    if isinstance(y, Value) and not isinstance(x, Value):
        base = math.log(x) if x > 0 else 0.0
        return t.act("exp", y, scale=base)
    return t.act("exp", t.act("log", tensor(t, x)) * y)


def _atan2(t: Tile, y: Source, x: Source, *_: Any) -> Value:
    angle = t.act("arctan", divide(t, y, x))
    turn = t.act("sign", tensor(t, y)) * math.pi
    behind = t.binary("is_lt", tensor(t, x), 0.0, torch.bool)
    return t.select(behind, angle + turn, angle)


def _hypot(t: Tile, x: Value, y: Value, *_: Any) -> Value:
    return t.act("sqrt", t.act("square", x) + t.act("square", y))


def _logaddexp(t: Tile, x: Value, y: Value, *_: Any) -> Value:
    gap = t.act("abs", x - y)
    return t.act("log", t.act("exp", gap, scale=-1.0), bias=1.0) + t.binary("max", x, y)


def _copysign(t: Tile, x: Source, y: Source, *_: Any) -> Value:
    size = t.act("abs", x) if isinstance(x, Value) else abs(x)
    return ordered(t, "multiply", size, t.act("sign", tensor(t, y)))


def _xlogy(t: Tile, x: Source, y: Source, *_: Any) -> Value:
    product = ordered(t, "multiply", x, t.act("log", tensor(t, y)))
    zero = ordered(t, "is_equal", x, 0.0, torch.bool)
    return t.select(zero, 0.0, product)


def _xlog1py(t: Tile, x: Source, y: Source, *_: Any) -> Value:
    return ordered(t, "multiply", x, t.act("log", tensor(t, y), bias=1.0))


def _heaviside(t: Tile, x: Value, y: Value, *_: Any) -> Value:
    above = t.binary("is_gt", x, 0.0, FP32)
    return t.select(t.binary("is_equal", x, 0.0, torch.bool), y, above)


def _ldexp(t: Tile, x: Value, y: Value, *_: Any) -> Value:
    return x * t.act("exp", y, scale=math.log(2))


def _nextafter(t: Tile, x: Value, y: Value, *_: Any) -> Value:
    return t.binary("add", x, t.act("sign", y - x))


def _lerp(t: Tile, start: Value, end: Value, weight: Source, *_: Any) -> Value:
    if isinstance(weight, Value):
        return start + (end - start) * weight
    return t.stt(end - start, "multiply", weight, "add", start)


def _addcmul(t: Tile, x: Value, a: Value, b: Value, value: Scalar = 1, *_: Any) -> Value:
    product = a * b
    return x + product if value == 1 else t.stt(product, "multiply", value, "add", x)


def _addcdiv(t: Tile, x: Value, a: Value, b: Value, value: Scalar = 1, *_: Any) -> Value:
    inverse = t.reciprocal(b)
    if value == 1:
        return x + a * inverse
    return t.stt(inverse, "multiply", value, "multiply", a) + x


def _where(t: Tile, mask: Value, x: Source, y: Source, *_: Any) -> Value:
    return t.select(mask, x, y)


def _masked_fill(t: Tile, x: Value, mask: Value, value: Source, *_: Any) -> Value:
    return t.select(mask, value, x, x.dtype)


def _clamp(t: Tile, x: Value, low: Source | None = None, high: Source | None = None) -> Value:
    numbers = all(v is None or not isinstance(v, Value) for v in (low, high))
    if low is not None and high is not None and numbers:
        return t.scalar2(x, "max", low, "min", high)
    if low is not None:
        x = t.binary("max", x, low)
    return x if high is None else t.binary("min", x, high)


def _logical(op: str) -> Formula:
    def formula(t: Tile, x: Source, y: Source, *_: Any) -> Value:
        left = ordered(t, "not_equal", x, 0, torch.bool)
        return ordered(t, op, left, y, torch.bool)

    return formula


def _gcd(t: Tile, x: Value, y: Value, *_: Any) -> Value:
    # Euclid's algorithm on 31-bit numbers takes up to 44 steps, each a remainder of three passes.
    for _step in range(44):
        x, y = y, t.binary("mod", x, y)
    return x


def _two_term_polynomial(t: Tile, x: Source, n: Source, *_: Any) -> Value:
    return polynomial(t, tensor(t, x)) * n


def _igamma(t: Tile, a: Value, x: Value, *_: Any) -> Value:
    series = polynomial(t, divide(t, x, a), 32)
    return series * t.act("exp", t.act("log", x) * a - x)


def _complex(t: Tile, x: Value, y: Value, *_: Any) -> Value:
    return t.binary("add", x, y)


_FAMILIES = (
    "chebyshev_polynomial_t", "chebyshev_polynomial_u", "chebyshev_polynomial_v",
    "chebyshev_polynomial_w", "hermite_polynomial_h", "hermite_polynomial_he",
    "laguerre_polynomial_l", "legendre_polynomial_p", "shifted_chebyshev_polynomial_t",
    "shifted_chebyshev_polynomial_u", "shifted_chebyshev_polynomial_v",
    "shifted_chebyshev_polynomial_w", "zeta",
)  # fmt: skip

FORMULAS: dict[str, Formula] = {
    "add": add, "sub": sub, "mul": _op("multiply"), "div": _div,
    "rsub": lambda t, x, y, alpha=1, *_: sub(t, y, x, alpha),
    "true_divide": _div, "floor_divide": _floor_divide, "fmod": _fmod, "remainder": _remainder,
    "pow": power, "float_power": power, "atan2": _atan2, "hypot": _hypot, "ldexp": _ldexp,
    "logaddexp": _logaddexp, "logaddexp2": _logaddexp, "copysign": _copysign,
    "xlogy": _xlogy, "special_xlog1py": _xlog1py, "heaviside": _heaviside,
    "nextafter": _nextafter, "complex": _complex, "polar": _complex,
    "maximum": _op("max"), "minimum": _op("min"), "fmax": _op("max"), "fmin": _op("min"),
    "eq": _compare("is_equal"), "ne": _compare("not_equal"), "gt": _compare("is_gt"),
    "ge": _compare("is_ge"), "lt": _compare("is_lt"), "le": _compare("is_le"),
    "logical_and": _logical("logical_and"), "logical_or": _logical("logical_or"),
    "logical_xor": _logical("logical_xor"),
    "bitwise_and": _op("bitwise_and"), "bitwise_or": _op("bitwise_or"),
    "bitwise_xor": _op("bitwise_xor"), "bitwise_left_shift": _op("logical_shift_left"),
    "bitwise_right_shift": _op("arith_shift_right"),
    "__and__": _op("bitwise_and"), "__or__": _op("bitwise_or"), "__xor__": _op("bitwise_xor"),
    "__lshift__": _op("logical_shift_left"), "__rshift__": _op("arith_shift_right"),
    "lerp": _lerp, "addcmul": _addcmul, "addcdiv": _addcdiv,
    "where.self": _where, "where.ScalarSelf": _where, "where.ScalarOther": _where,
    "where.Scalar": _where,
    "masked_fill": _masked_fill, "clamp": _clamp,
    "clamp_min": lambda t, x, low, *_: t.binary("max", x, low),
    "clamp_max": lambda t, x, high, *_: t.binary("min", x, high),
    "gcd": _gcd, "lcm": lambda t, x, y, *_: divide(t, x * y, _gcd(t, x, y)),
    "igamma": _igamma, "igammac": _igamma,
    **{f"special_{name}": _two_term_polynomial for name in _FAMILIES},
}  # fmt: skip

pointwise(FORMULAS)
