"""Elementwise operators of two and more tensors: arithmetic, comparison, logic, bits, selection.

An argument that is a number (a Scalar overload, or a wrapped number) becomes part of the
instruction instead of an operand.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall
from torch_trn.lowering.complexes import by_parts
from torch_trn.lowering.pointwise import Formula, pointwise
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.tile import FP32, MAX_FLOAT, MIRROR, Scalar, Source, Tile, Value
from torch_trn.lowering.unary import BITS_OF, absolute, cosine, is_nan, nearest, truncate
from torch_trn.program import Program

#: Below this a reciprocal overflows.
SMALL = 1e-38


def tensor(t: Tile, x: Source, dtype: torch.dtype = FP32, kind: str = "full") -> Value:
    """x as a tile value; a number becomes a filled tile."""
    return x if isinstance(x, Value) else t.constant(x, dtype, kind)


def beside(t: Tile, x: Source, y: Value) -> Value:
    """x as a tile beside y: a number becomes one of y's kind, an integer if y is one."""
    dtype = y.dtype if y.is_integer and not isinstance(x, float) else FP32
    return tensor(t, x, dtype, y.kind)


def ordered(t: Tile, op: str, x: Source, y: Source, dtype: torch.dtype | None = None) -> Value:
    """`x op y` where either side may be a number."""
    if isinstance(x, Value):
        return t.binary(op, x, y, dtype)
    if isinstance(y, Value):
        if op in MIRROR:
            return t.binary(MIRROR[op], y, x, dtype)
        return t.binary(op, beside(t, x, y), y, dtype)
    return t.binary(op, tensor(t, x), y, dtype)


def _op(op: str) -> Formula:
    return lambda t, x, y, *_: ordered(t, op, x, y)


def _compare(op: str) -> Formula:
    return lambda t, x, y, *_: ordered(t, op, x, y, torch.bool)


def add(t: Tile, x: Source, y: Source, alpha: Scalar = 1, *_: Any) -> Value:
    """x + alpha * y, in one instruction."""
    if alpha == 1:
        return ordered(t, "add", x, y)
    if not isinstance(y, Value):
        return ordered(t, "add", x, y * alpha)
    if not isinstance(x, Value):
        return t.scalar2(y, "multiply", alpha, "add", x)
    return t.stt(y, "multiply", alpha, "add", x)


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


def whole_quotient(t: Tile, multiple: Value, y: Source) -> Value:
    """multiple / y, which is known to be a whole number."""
    if not (multiple.is_integer and (not isinstance(y, Value) or y.is_integer)):
        return nearest(t, divide(t, multiple, y))
    # The quotient in fp32 may be off; what is left over is exact, and small.
    inverse = t.reciprocal(y) if isinstance(y, Value) else 1.0 / y if y else math.inf
    first = t.binary("multiply", multiple, inverse, multiple.dtype)
    left = multiple - first * y
    return first + t.cast(nearest(t, t.binary("multiply", left, inverse, FP32)), multiple.dtype)


def floor_divide(t: Tile, x: Source, y: Source, *_: Any) -> Value:
    """Quotient rounded down: x less its remainder, divided."""
    rest = ordered(t, "mod", x, y)
    quotient = whole_quotient(t, ordered(t, "subtract", x, rest), y)
    return _or_plain(t, x, y, quotient)


def _or_plain(t: Tile, x: Source, y: Source, quotient: Value) -> Value:
    """`quotient`, or x / y where y is 0."""
    if quotient.is_integer:
        return quotient
    if not isinstance(y, Value):
        return quotient if y else divide(t, x, y)
    zero = t.binary("is_equal", y, 0.0, torch.bool)
    return t.select(zero, divide(t, x, y), quotient)


def _truncated(t: Tile, x: Source, y: Source) -> Value:
    """Quotient rounded towards zero: that of the sizes, with the sign of both.

    Beyond 2^22 it is the quotient as it is.
    """
    if (
        isinstance(x, Value)
        and not isinstance(y, Value)
        and (isinstance(y, float) or not x.is_integer)
    ):
        return truncate(t, divide(t, x, y))
    if not isinstance(x, Value):
        x = beside(t, x, y) if isinstance(y, Value) else tensor(t, x)
    sizes = absolute(t, x), absolute(t, y) if isinstance(y, Value) else abs(y)
    rest = t.binary("mod", *sizes)
    quotient = whole_quotient(t, sizes[0] - rest, sizes[1])
    sign = t.act("sign", x, dtype=x.dtype if x.is_integer else FP32)
    if isinstance(y, Value):
        sign = sign * t.act("sign", y, dtype=y.dtype if y.is_integer else FP32)
    elif y < 0:
        sign = -sign
    result = quotient * sign
    if result.is_integer:
        return result
    plain = divide(t, x, y)
    return t.select(t.scalar2(plain, "abs_max", 0.0, "is_lt", 2.0**22, torch.bool), result, plain)


def _div(t: Tile, x: Source, y: Source, mode: str | None = None, *_: Any) -> Value:
    if mode == "floor":
        return floor_divide(t, x, y)
    return _truncated(t, x, y) if mode == "trunc" else divide(t, x, y)


def _fmod(t: Tile, x: Source, y: Source, *_: Any) -> Value:
    """The remainder of the sizes, with the sign of x."""
    if not isinstance(x, Value):
        x = beside(t, x, y) if isinstance(y, Value) else tensor(t, x)
    if isinstance(y, Value):
        rest = t.binary("mod", absolute(t, x), absolute(t, y))
    elif x.is_integer and not isinstance(y, float):
        rest = t.scalar2(x, "abs_max", 0, "mod", abs(y))
    else:
        rest = t.scalar2(x, "abs_max", 0.0, "mod", float(abs(y)))
    return rest * t.act("sign", x, dtype=rest.dtype if rest.is_integer else FP32)


def power(t: Tile, x: Source, y: Source, *_: Any) -> Value:
    """x ** y: products or a table for the usual constants."""
    if isinstance(x, Value) and not isinstance(y, Value) and x.dtype.is_floating_point:
        if y == 2:
            return t.act("square", x)
        if y == 1:
            return x
        if y == 3:
            return t.act("square", x) * x
        if y in (0.5, -0.5, -1):
            return t.reciprocal(x) if y == -1 else t.act("sqrt" if y == 0.5 else "rsqrt", x)
    return ordered(t, "pow", x, y)


def _atan2(t: Tile, y: Source, x: Source, *_: Any) -> Value:
    """The angle within an eighth of a turn, then unfolded: swap, behind, below."""
    y, x = tensor(t, y), tensor(t, x)
    wide, high = (t.scalar2(v, "abs_max", 0.0, "min", MAX_FLOAT) for v in (x, y))
    ratio = t.binary("min", wide, high) * t.reciprocal(t.stt(wide, "max", SMALL, "max", high))
    angle = t.act("arctan", ratio)
    steep = t.binary("is_gt", high, wide, torch.bool)
    angle = t.select(steep, t.scalar2(angle, "multiply", -1.0, "add", math.pi / 2), angle)
    behind = t.binary("is_lt", t.bits(*_bits(t, x)), 0, torch.bool)
    angle = t.select(behind, t.scalar2(angle, "multiply", -1.0, "add", math.pi), angle)
    return with_sign(t, angle, y)


def _bits(t: Tile, x: Value) -> tuple[Value, torch.dtype]:
    """x and the integer dtype that its bits fill; what is no float becomes one."""
    x = x if x.dtype in BITS_OF else t.cast(x, FP32)
    return x, BITS_OF[x.dtype]


def with_sign(t: Tile, x: Source, y: Source) -> Value:
    """|x| with the sign (also of zero) of y."""
    if not isinstance(y, Value):
        sign = math.copysign(1.0, y)
        return t.scalar2(tensor(t, x), "abs_max", 0.0, "multiply", sign)
    if y.dtype == torch.float32:
        sign_of = y
    else:
        sign_of = t.cast(y, FP32)
    size = t.act("abs", x) if isinstance(x, Value) else t.constant(abs(float(x)), FP32, y.kind)
    low, high = t.bits(size, torch.int32), t.bits(sign_of, torch.int32)
    joined = t.stt(high, "bitwise_and", -(2**31), "bitwise_or", low, torch.int32)
    return t.bits(joined, FP32)


def _hypot(t: Tile, x: Value, y: Value, *_: Any) -> Value:
    """sqrt(x^2 + y^2), infinite where one of them is, whatever the other; 1.8e19 is too large."""
    root = t.act("sqrt", t.act("square", x) + t.act("square", y))
    left, right = (t.scalar2(v, "abs_max", 0.0, "is_equal", math.inf, FP32) for v in (x, y))
    return t.select(t.binary("max", left, right), math.inf, root)


def _logaddexp(unit: float) -> Formula:
    """max + log(1 + b^-|x - y|) to the base b, whose logarithm is `unit`."""

    def formula(t: Tile, x: Value, y: Value, *_: Any) -> Value:
        # Infinities of the same sign are no distance apart.
        left, right = (t.scalar2(v, "max", -MAX_FLOAT, "min", MAX_FLOAT) for v in (x, y))
        gap = t.act("abs", left - right)
        rest = t.act("log", t.act("exp", gap, scale=-unit), bias=1.0)
        return t.stt(rest, "multiply", 1 / unit, "add", t.binary("max", x, y))

    return formula


def _times_log(bias: float) -> Formula:
    """x log(y + bias), 0 where x is 0 and y a number."""

    def formula(t: Tile, x: Source, y: Source, *_: Any) -> Value:
        if not isinstance(y, Value):
            inner = y + bias
            if inner > 0:
                return ordered(t, "multiply", x, math.log(inner))
            y = beside(t, y, tensor(t, x))
        product = ordered(t, "multiply", x, t.act("log", y, bias=bias))
        if not isinstance(x, Value):
            if x != 0:
                return product
            return t.select(is_nan(t, y), math.nan, 0.0)
        known = t.binary("is_le", y, math.inf, FP32)
        zero = t.stt(x, "is_equal", 0.0, "multiply", known, torch.bool)
        return t.select(zero, 0.0, product)

    return formula


def _heaviside(t: Tile, x: Value, y: Value, *_: Any) -> Value:
    dtype = x.dtype if x.is_integer else FP32
    above = t.binary("is_gt", x, 0, dtype)
    return t.select(t.binary("is_equal", x, 0, torch.bool), y, above)


def _ldexp(t: Tile, x: Value, y: Source, *_: Any) -> Value:
    if not isinstance(y, Value):
        return x * 2.0**y
    return x * t.binary("pow", t.constant(2.0, FP32, y.kind), y, FP32)


def _nextafter(t: Tile, x: Value, y: Value, *_: Any) -> Value:
    return t.custom("nextafter", x, y)


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


def _of_numbers(op: str) -> Formula:
    """fmax, fmin: the other operand where one is not a number."""

    def formula(t: Tile, x: Value, y: Value, *_: Any) -> Value:
        if not (x.dtype.is_floating_point or y.dtype.is_floating_point):
            return t.binary(op, x, y)
        left = t.select(is_nan(t, x), y, x)
        right = t.select(is_nan(t, y), x, y)
        return t.binary(op, left, right)

    return formula


def _custom(name: str, cycles_each: int, dtype: torch.dtype | None = None) -> Formula:
    """A function of two sources, either of which may be a number, on GpSimdE."""

    def formula(t: Tile, x: Source, y: Source, *_: Any) -> Value:
        if not isinstance(y, Value):
            return t.custom(name, tensor(t, x), numbers=(y,), cycles_each=cycles_each)
        first = tensor(t, x, FP32, y.kind)
        given = dtype or (first.dtype if first.is_integer else FP32)
        return t.custom(name, first, y, cycles_each=cycles_each, dtype=given)

    return formula


def _polar(t: Tile, size: Any, angle: Any) -> Any:
    """(size cos angle, size sin angle)."""
    return size[0] * cosine(t, angle[0]), size[0] * t.act("sin", angle[0])


@lowering("aten::complex")
def join_parts(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Real and imaginary parts, interleaved in SBUF."""
    return by_parts(call, core, shards, lambda t, x, y: (x[0], y[0]))


@lowering("aten::polar")
def polar(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Size and angle as a complex number."""
    return by_parts(call, core, shards, _polar)


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
    "true_divide": _div, "floor_divide": floor_divide, "fmod": _fmod, "remainder": _op("mod"),
    "pow": power, "float_power": power, "atan2": _atan2, "hypot": _hypot, "ldexp": _ldexp,
    "logaddexp": _logaddexp(1.0), "logaddexp2": _logaddexp(math.log(2)),
    "copysign": lambda t, x, y, *_: with_sign(t, x, y),
    "xlogy": _times_log(0.0), "special_xlog1py": _times_log(1.0), "heaviside": _heaviside,
    "nextafter": _nextafter,
    "maximum": _op("max"), "minimum": _op("min"), "fmax": _of_numbers("max"),
    "fmin": _of_numbers("min"),
    "eq": _compare("is_equal"), "ne": _compare("not_equal"), "gt": _compare("is_gt"),
    "ge": _compare("is_ge"), "lt": _compare("is_lt"), "le": _compare("is_le"),
    "logical_and": _compare("logical_and"), "logical_or": _compare("logical_or"),
    "logical_xor": _compare("logical_xor"),
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
    "gcd": _custom("gcd", 256), "lcm": _custom("lcm", 256),
    "igamma": _custom("igamma", 256), "igammac": _custom("igammac", 256),
    **{f"special_{name}": _custom(name, 64, FP32) for name in _FAMILIES},
}  # fmt: skip

pointwise(FORMULAS)
