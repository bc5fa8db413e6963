"""Elementwise operators of one tensor: each is a short sequence of engine instructions.

ScalarE evaluates from tables (exp, tanh, gelu, erf, sin, arctan, ...); the rest is VectorE
arithmetic. Functions that neither has are a C++ function of GpSimdE. Where a formula rounds an
intermediate result (1 + x, 1 - erf x, exp x - 1 ...) its error is absolute, about 2^-23.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from torch_trn.lowering.pointwise import Formula, pointwise
from torch_trn.lowering.tile import FP32, INT32, MAX_FLOAT, Tile, Value

#: Floats from here on have no fraction.
WHOLE_FROM = 2.0**23

#: The smallest positive float.
TINY = 2.0**-149

#: Integer dtypes with as many bits as a float dtype.
BITS_OF = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def _act(op: str, **given: float) -> Formula:
    return lambda t, x, *_: t.act(op, x, **given)


def _compare(op: str, value: float) -> Formula:
    return lambda t, x, *_: t.binary(op, x, value, torch.bool)


def _custom(name: str, cycles_each: int = 64) -> Formula:
    return lambda t, x, *_: t.custom(name, x, cycles_each=cycles_each)


def is_nan(t: Tile, x: Value) -> Value:
    """Whether x is not a number: it is not even below infinity."""
    return t.scalar2(x, "is_le", math.inf, "is_equal", 0.0, torch.bool)


def absolute(t: Tile, x: Value, *_: Any) -> Value:
    """|x|; of integers on GpSimdE."""
    if x.dtype == torch.bool:
        return x
    return t.binary("abs_max", x, 0) if x.is_integer else t.act("abs", x)


def cosine(t: Tile, x: Value, *_: Any) -> Value:
    """1 - 2 sin(x / 2)^2: adding a quarter period to x would round it."""
    half = t.act("square", t.act("sin", x, scale=0.5))
    return t.scalar2(half, "multiply", -2.0, "add", 1.0)


def tan(t: Tile, x: Value, *_: Any) -> Value:
    """sin / cos."""
    return t.act("sin", x) / cosine(t, x)


def _cosh(t: Tile, x: Value, *_: Any) -> Value:
    # Halves of the exponents are squared, so that nothing overflows before the result does.
    grow, fall = t.act("exp", x, scale=0.5), t.act("exp", x, scale=-0.5)
    return t.act("square", grow, scale=math.sqrt(0.5)) + t.act("square", fall, scale=math.sqrt(0.5))


def _sinh(t: Tile, x: Value, *_: Any) -> Value:
    return _cosh(t, x) * t.act("tanh", x)


def _asin(t: Tile, x: Value, *_: Any) -> Value:
    inner = t.stt(x, "add", 1.0, "multiply", t.act("copy", x, scale=-1.0, bias=1.0))
    return t.act("arctan", t.act("rsqrt", inner) * x)


def _acos(t: Tile, x: Value, *_: Any) -> Value:
    ratio = t.act("sqrt", x, scale=-1.0, bias=1.0) * t.act("rsqrt", x, bias=1.0)
    return t.act("arctan", ratio) * 2.0


def _asinh(t: Tile, x: Value, *_: Any) -> Value:
    # log(|x| + max(|x|, sqrt(x^2 + 1))) with x^2 held where it matters, and the sign of x.
    size = t.act("abs", x)
    root = t.act("sqrt", t.act("square", t.binary("min", size, 1e9)), bias=1.0)
    total = t.binary("max", root, size) + size
    return t.act("log", total) * t.act("sign", x)


def _acosh(t: Tile, x: Value, *_: Any) -> Value:
    return t.act("log", t.act("sqrt", x, bias=-1.0) * t.act("sqrt", x, bias=1.0) + x)


def _atanh(t: Tile, x: Value, *_: Any) -> Value:
    ratio = t.act("copy", x, bias=1.0) / t.act("copy", x, scale=-1.0, bias=1.0)
    return t.act("log", ratio) * 0.5


def truncate(t: Tile, x: Value, *_: Any) -> Value:
    """Towards zero: through int32 and back, where there is a fraction at all."""
    if not x.dtype.is_floating_point:
        return x
    whole = t.cast(t.cast(x, INT32), FP32)
    small = t.scalar2(x, "abs_max", 0.0, "is_lt", WHOLE_FROM, torch.bool)
    return t.select(small, whole, x)


def _less_fraction(t: Tile, x: Value, unit: float) -> Value:
    """x minus its remainder by 1 or -1; large numbers, which have none, are held out of it."""
    if not x.dtype.is_floating_point:
        return x
    held = t.scalar2(x, "max", -2 * WHOLE_FROM, "min", 2 * WHOLE_FROM)
    return t.stt(held, "mod", unit, "reverse_subtract", x)


def floor(t: Tile, x: Value, *_: Any) -> Value:
    """x minus its remainder by 1."""
    return _less_fraction(t, x, 1.0)


def _ceil(t: Tile, x: Value, *_: Any) -> Value:
    return _less_fraction(t, x, -1.0)


def nearest(t: Tile, x: Value) -> Value:
    """To the nearest integer, ties to even, of |x| up to 2^22: 1.5 x 2^23 leaves no fraction."""
    magic = 1.5 * 2**23
    return t.scalar2(x, "add", magic, "subtract", magic)


def _round(t: Tile, x: Value, decimals: int = 0, *_: Any) -> Value:
    if not x.dtype.is_floating_point:
        return x
    scale = 10.0 ** abs(decimals) if isinstance(decimals, int) else 1.0
    if decimals:
        x = x * scale if decimals > 0 else t.divide(x, scale)
    elif x.dtype.itemsize < 4:
        return nearest(t, x)
    # In fp32 there are fractions up to 2^23: the size is rounded, then the sign is back.
    size = t.act("abs", x)
    whole = t.scalar2(size, "add", WHOLE_FROM, "subtract", WHOLE_FROM)
    small = t.binary("is_lt", size, WHOLE_FROM, torch.bool)
    result = t.select(small, whole, size) * t.act("sign", x)
    if decimals:
        result = t.divide(result, scale) if decimals > 0 else result * scale
    return result


def _frac(t: Tile, x: Value, *_: Any) -> Value:
    return x - truncate(t, x)


def expm1(t: Tile, x: Value, *_: Any) -> Value:
    """exp(x) - 1 as tanh(x / 2) (exp(x) + 1): no cancellation near 0."""
    return t.stt(t.act("exp", x), "add", 1.0, "multiply", t.act("tanh", x, scale=0.5))


def _sign_bit(t: Tile, x: Value, *_: Any) -> Value:
    if not x.dtype.is_floating_point:
        return t.binary("is_lt", x, 0, torch.bool)
    bits = BITS_OF[x.dtype]
    return t.binary("is_lt", t.bits(x, bits), 0, torch.bool)


def _isinf(t: Tile, x: Value, *_: Any) -> Value:
    return t.scalar2(x, "abs_max", 0.0, "is_equal", math.inf, torch.bool)


def _nan_to_num(
    t: Tile, x: Value, nan: float | None = None, above: float | None = None,
    below: float | None = None, *_: Any,
) -> Value:  # fmt: skip
    if not x.dtype.is_floating_point:
        return x
    limits = torch.finfo(x.dtype)
    clean = t.select(is_nan(t, x), nan or 0.0, x)
    if above is None and below is None:
        return t.scalar2(clean, "min", limits.max, "max", limits.min)
    high, low = limits.max if above is None else above, limits.min if below is None else below
    clean = t.select(t.binary("is_equal", x, math.inf, torch.bool), float(high), clean)
    return t.select(t.binary("is_equal", x, -math.inf, torch.bool), float(low), clean)


def _logit(t: Tile, x: Value, eps: float | None = None, *_: Any) -> Value:
    if eps is not None:
        x = t.scalar2(x, "max", eps, "min", 1 - eps)
    return t.act("log", x) - t.act("log", x, scale=-1.0, bias=1.0)


def _sinc(t: Tile, x: Value, *_: Any) -> Value:
    ratio = t.act("sin", x, scale=math.pi) / (x * math.pi)
    return t.select(t.binary("is_equal", x, 0.0, torch.bool), 1.0, ratio)


def _entr(t: Tile, x: Value, *_: Any) -> Value:
    """-x log x, 0 at 0, -infinity below."""
    log = t.act("log", t.binary("max", x, TINY))
    inner = t.stt(log, "multiply", -1.0, "multiply", x)
    return t.select(t.binary("is_lt", x, 0.0, torch.bool), -math.inf, inner)


def _logical_not(t: Tile, x: Value, *_: Any) -> Value:
    return t.binary("is_equal", x, 0, torch.bool)


def _bitwise_not(t: Tile, x: Value, *_: Any) -> Value:
    return t.binary("bitwise_xor", x, True if x.dtype == torch.bool else -1)


def _angle(t: Tile, x: Value, *_: Any) -> Value:
    turned = t.scalar2(x, "is_lt", 0.0, "multiply", math.pi)
    return t.select(is_nan(t, x), x, turned) if x.dtype.is_floating_point else turned


def _square(t: Tile, x: Value, *_: Any) -> Value:
    return t.act("square", x) if x.dtype.is_floating_point else t.binary("multiply", x, x)


def _polygamma(t: Tile, n: int, x: Value, *_: Any) -> Value:
    if n == 0:
        return t.custom("digamma", x)
    series = t.custom("zeta", t.constant(float(n + 1), FP32, x.kind), x, cycles_each=256)
    return series * (
        (-1.0) ** (n + 1) * min(math.gamma(n + 1.0) if n < 170 else math.inf, MAX_FLOAT)
    )


def _mvlgamma(t: Tile, x: Value, p: int = 1, *_: Any) -> Value:
    return t.custom("multigammaln", x, numbers=(p,), cycles_each=64 * p)


def _identity(t: Tile, x: Value, *_: Any) -> Value:
    return x


_ON_GPSIMD = (
    "erfcx", "i0e", "i1", "i1e", "bessel_j0", "bessel_j1", "bessel_y0", "bessel_y1",
    "modified_bessel_i0", "modified_bessel_i1", "modified_bessel_k0", "modified_bessel_k1",
    "scaled_modified_bessel_k0", "scaled_modified_bessel_k1", "spherical_bessel_j0", "airy_ai",
    "log_ndtr", "ndtri",
)  # fmt: skip

FORMULAS: dict[str, Formula] = {
    "abs": absolute, "neg": lambda t, x, *_: -x, "positive": _identity,
    "exp": _act("exp"), "exp2": _act("exp", scale=math.log(2)), "expm1": expm1,
    "log": _act("log"), "log1p": _act("log", bias=1.0),
    "log2": lambda t, x, *_: t.act("log", x) * (1 / math.log(2)),
    "log10": lambda t, x, *_: t.act("log", x) * (1 / math.log(10)),
    "sqrt": _act("sqrt"), "rsqrt": _act("rsqrt"), "square": _square,
    "reciprocal": lambda t, x, *_: t.reciprocal(x),
    "sin": _act("sin"), "cos": cosine, "tan": tan,
    "asin": _asin, "acos": _acos, "atan": _act("arctan"),
    "sinh": _sinh, "cosh": _cosh, "tanh": _act("tanh"),
    "asinh": _asinh, "acosh": _acosh, "atanh": _atanh,
    "erf": _act("erf"), "erfc": lambda t, x, *_: t.scalar2(
        t.act("erf", x), "multiply", -1.0, "add", 1.0),
    "erfinv": _custom("erfinv"), "lgamma": _custom("lgamma"), "digamma": _custom("digamma"),
    "i0": _custom("i0"), "polygamma": _polygamma, "mvlgamma": _mvlgamma,
    "sigmoid": _act("sigmoid"), "sign": _act("sign"), "sgn": _act("sign"),
    "floor": floor, "ceil": _ceil, "trunc": truncate, "round": _round, "frac": _frac,
    "signbit": _sign_bit, "isnan": lambda t, x, *_: is_nan(t, x), "isinf": _isinf,
    "isposinf": _compare("is_equal", math.inf), "isneginf": _compare("is_equal", -math.inf),
    "nan_to_num": _nan_to_num, "logit": _logit, "sinc": _sinc, "angle": _angle,
    "deg2rad": lambda t, x, *_: x * (math.pi / 180),
    "rad2deg": lambda t, x, *_: x * (180 / math.pi),
    "logical_not": _logical_not, "bitwise_not": _bitwise_not,
    "conj_physical": _identity, "_conj_physical": _identity,
    "special_entr": _entr, **{f"special_{name}": _custom(name) for name in _ON_GPSIMD},
}  # fmt: skip

pointwise(FORMULAS)
