"""Arithmetic of the engines: what each operator name computes, and how results are rounded.

Engines compute in fp32: operands are converted on the way in, results on the way out (arch2;
hardware.md section 4). Bitwise operators and shifts act on integers as they are, and GpSimdE adds
and multiplies integers natively; on the other engines integers beyond 2^24 lose their last bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "ALU", "FOLDS", "alu", "operand", "rounded"]

_FP8_MAX_BEFORE_V4 = 240.0
"""Largest E4M3 value of trn1 and trn2 (nki-library rmsnorm_quant constants); trn3 has 448."""


def _bits(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of integers; a number that came as a float is one."""

    def on_integers(a: Tensor, b: Tensor) -> Tensor:
        whole = [x.to(torch.int64) if x.is_floating_point() else x for x in (a, b)]
        wide = [x.to(torch.int64) if x.dtype == torch.bool else x for x in whole]
        both_bool = all(x.dtype == torch.bool for x in whole)
        result = function(*wide)
        return result.to(torch.bool) if both_bool else result

    return on_integers


def _shift_right_logical(a: Tensor, b: Tensor) -> Tensor:
    bits = 8 * a.dtype.itemsize
    shifted = a.to(torch.int64)
    if bits < 64:
        shifted = shifted & ((1 << bits) - 1)
    return shifted >> b.to(torch.int64)


def _truth(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: function(a, b).to(torch.float32)


ALU: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "add": torch.add,
        "subtract": torch.sub,
        "reverse_subtract": lambda a, b: b - a,
        "multiply": torch.mul,
        "divide": torch.div,
        "max": torch.maximum,
        "min": torch.minimum,
        "pow": torch.pow,
        "mod": torch.remainder,
        "abs_max": lambda a, b: torch.maximum(a.abs(), b.abs()),
        "is_equal": _truth(torch.eq),
        "not_equal": _truth(torch.ne),
        "is_gt": _truth(torch.gt),
        "is_ge": _truth(torch.ge),
        "is_lt": _truth(torch.lt),
        "is_le": _truth(torch.le),
        "logical_and": _truth(torch.logical_and),
        "logical_or": _truth(torch.logical_or),
        "logical_xor": _truth(torch.logical_xor),
        "bitwise_and": _bits(torch.bitwise_and),
        "bitwise_or": _bits(torch.bitwise_or),
        "bitwise_xor": _bits(torch.bitwise_xor),
        "logical_shift_left": _bits(torch.bitwise_left_shift),
        "logical_shift_right": _bits(_shift_right_logical),
        "arith_shift_right": _bits(torch.bitwise_right_shift),
    }
)
"""Operators of tensor_scalar, tensor_tensor, scalar_tensor_tensor, scans and reductions."""

_BITWISE = frozenset(
    {"bitwise_and", "bitwise_or", "bitwise_xor", "logical_shift_left", "logical_shift_right",
     "arith_shift_right"}
)  # fmt: skip

FOLDS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "add": lambda x: x.sum(-1),
        "max": lambda x: x.amax(-1),
        "min": lambda x: x.amin(-1),
        "multiply": lambda x: x.prod(-1),
        "bitwise_or": lambda x: (x != 0).any(-1),
        "bitwise_and": lambda x: (x != 0).all(-1),
    }
)
"""Reductions along the last dimension. NaN wins in max and min (assumed)."""


def _gelu_dx(x: Tensor) -> Tensor:
    density = torch.exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * density


def _silu_dx(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def _gelu_tanh_dx(x: Tensor) -> Tensor:
    k, c = math.sqrt(2 / math.pi), 0.044715
    gate = torch.tanh(k * (x + c * x * x * x))
    return 0.5 * (1 + gate) + 0.5 * x * (1 - gate * gate) * k * (1 + 3 * c * x * x)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "copy": lambda x: x,
        "identity": lambda x: x,
        "abs": torch.abs,
        "arctan": torch.atan,
        "erf": torch.erf,
        "exp": torch.exp,
        "gelu": torch.nn.functional.gelu,
        "gelu_apprx_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "gelu_dx": _gelu_dx,
        "gelu_apprx_tanh_dx": _gelu_tanh_dx,
        "log": torch.log,
        "mish": torch.nn.functional.mish,
        "reciprocal": torch.reciprocal,
        "relu": torch.relu,
        "rsqrt": torch.rsqrt,
        "sigmoid": torch.sigmoid,
        "sign": torch.sgn,
        "silu": torch.nn.functional.silu,
        "silu_dx": _silu_dx,
        "sin": torch.sin,
        "softplus": torch.nn.functional.softplus,
        "sqrt": torch.sqrt,
        "square": torch.square,
        "tanh": torch.tanh,
    }
)
"""Functions of activation (names of nki.language). ScalarE's tables are taken as exact in fp32
(assumed: their error is not published)."""


def operand(x: Tensor) -> Tensor:
    """A source as an engine computes with it: in fp32."""
    return x if x.dtype == torch.float32 else x.to(torch.float32)


def alu(op: str, a: Tensor, b: Tensor, native_integers: bool = False) -> Tensor:
    """``a op b``; in fp32, except for bits and (on GpSimdE) integers.

    Raises:
        ValueError: no engine has such an operator.
    """
    if op not in ALU:
        raise ValueError(f"engines have no operator {op!r}; they have: {', '.join(ALU)}")
    integers = not (a.is_floating_point() or b.is_floating_point())
    if op in _BITWISE:
        return ALU[op](a, b)
    if integers and native_integers and op != "divide":
        return ALU[op](a.to(torch.int64), b.to(torch.int64))
    return ALU[op](operand(a), operand(b))


def rounded(x: Tensor, dtype: torch.dtype, *, fp8_max: float = 448.0) -> Tensor:
    """``x`` as an engine writes it to ``dtype``.

    Floats round to nearest even. Above its largest value E4M3 becomes NaN (torch's E4M3 has no
    infinity). A float becomes an integer towards zero, held within the integer's range, NaN as 0
    (assumed: the documents give no rule).
    """
    if x.dtype == dtype:
        return x
    if dtype == torch.bool:
        return x != 0
    if dtype.is_floating_point or dtype.is_complex:
        result = x.to(dtype)
        if dtype == torch.float8_e4m3fn and fp8_max < 448.0:
            # The next value after 240 would be 256: what rounds there has left the range.
            too_large = x.abs().to(torch.float32) >= fp8_max + 8.0
            result = torch.where(too_large, float("nan"), result.to(torch.float32)).to(dtype)
        return result
    if x.is_floating_point():
        info = torch.iinfo(dtype)
        held = torch.nan_to_num(x.to(torch.float64), nan=0.0, posinf=math.inf, neginf=-math.inf)
        low, high = float(info.min), float(info.max)
        if dtype == torch.int64:
            high = float(2**63 - 1024)
        return held.clamp(low, high).to(dtype)
    return x.to(dtype)


def fp8_max_of(core_name: str) -> float:
    """The largest E4M3 value of a core."""
    return 448.0 if core_name == "NeuronCore-v4" else _FP8_MAX_BEFORE_V4
