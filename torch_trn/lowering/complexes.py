"""Complex numbers on engines that know none: as pairs of reals, or by real and imaginary parts.

What treats both parts alike (sums, differences, a real factor) walks the tensor as reals. Products
and sizes load whole elements, as integers of the same size, and read and write their two parts
through views with a step of 2. No other function of complex numbers is lowered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.errors import UnsupportedOpError
from torch_trn.lowering.call import REAL_OF, OpCall, TensorSpec
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import grid
from torch_trn.lowering.run import lower_kernel
from torch_trn.lowering.tile import Source, Tile, Value
from torch_trn.program import Program

__all__ = ["as_reals", "by_parts", "lower_complex", "refuse_complex"]

Pair = tuple[Source, Source]


def as_reals(spec: TensorSpec) -> TensorSpec:
    """A complex tensor with a last dim of two reals."""
    if not spec.dtype.is_complex:
        return spec
    steps = (*(2 * step for step in spec.strides), 1)
    return TensorSpec(REAL_OF[spec.dtype], (*spec.shape, 2), steps)


#: An integer dtype that holds one complex element.
_HOLDER = {torch.complex64: torch.int64, torch.complex32: torch.int32}


def refuse_complex(call: OpCall) -> None:
    """Raises UnsupportedOpError where a tensor of the call is complex."""
    if any(spec.dtype.is_complex for spec in (*call.outs, *call.tensors())):
        raise UnsupportedOpError(
            call.name, "no engine computes with complex numbers: use real and imaginary parts"
        )


def _multiply(t: Tile, x: Pair, y: Pair) -> Pair:
    (a, b), (c, d) = x, y
    return _sum(t, _times(t, a, c), _times(t, b, d), "subtract"), _sum(
        t, _times(t, a, d), _times(t, b, c), "add"
    )


def _times(t: Tile, x: Source, y: Source) -> Source:
    if isinstance(x, Value) or isinstance(y, Value):
        if isinstance(x, Value):
            return 0.0 if isinstance(y, float) and y == 0.0 else x * y
        return 0.0 if x == 0.0 else y * x
    return x * y


def _sum(t: Tile, x: Source, y: Source, op: str) -> Source:
    if isinstance(y, float) and y == 0.0:
        return x
    if isinstance(x, Value):
        return t.binary(op, x, y)
    if isinstance(y, Value):
        return t.binary("reverse_subtract" if op == "subtract" else op, y, x)
    return x - y if op == "subtract" else x + y


def _add(t: Tile, x: Pair, y: Pair, alpha: Any = 1) -> Pair:
    y = (_times(t, y[0], float(alpha)), _times(t, y[1], float(alpha))) if alpha != 1 else y
    return _sum(t, x[0], y[0], "add"), _sum(t, x[1], y[1], "add")


def _sub(t: Tile, x: Pair, y: Pair, alpha: Any = 1) -> Pair:
    return _add(t, x, y, -alpha)


def _abs(t: Tile, x: Pair) -> Pair:
    real, imaginary = x
    assert isinstance(real, Value) and isinstance(imaginary, Value)
    return t.act("sqrt", t.act("square", real) + t.act("square", imaginary)), 0.0


def _conjugate(t: Tile, x: Pair) -> Pair:
    assert isinstance(x[1], Value)
    return x[0], -x[1]


_PLANES: dict[str, Callable[..., Pair]] = {
    "add": _add, "sub": _sub, "rsub": lambda t, x, y, alpha=1: _sub(t, y, x, alpha),
    "mul": _multiply, "abs": _abs, "conj_physical": _conjugate, "_conj_physical": _conjugate,
}  # fmt: skip

#: Operators that treat real and imaginary parts alike, if all tensors are complex.
_ALIKE = frozenset({"add", "sub", "rsub", "neg", "positive"})


def lower_complex(call: OpCall, core: CoreSpec, shards: int, formula: Any, build: Any) -> Program:
    """An elementwise operator with complex tensors; ``build`` lowers a formula of real ones."""
    base = call.name.partition(".")[0].removeprefix("aten::")
    base = base if base in _PLANES or base in _ALIKE else base.rstrip("_")
    tensors = call.tensors()
    numbers = [a for a in call.args[1:] if isinstance(a, (int, float, complex))]
    whole = all(spec.dtype.is_complex for spec in (*call.outs, *tensors))
    alpha_only = len(tensors) == 2 or len(call.args) == 1
    real = not any(isinstance(n, complex) for n in numbers)
    if whole and real and (base in _ALIKE and alpha_only or base == "mul" and len(tensors) == 1):
        args = tuple(as_reals(a) if isinstance(a, TensorSpec) else a for a in call.args)
        outs = tuple(as_reals(out) for out in call.outs)
        return build(formula)(OpCall(call.name, args, outs, call.fresh), core, shards)
    if base not in _PLANES:
        refuse_complex(call)
    return by_parts(call, core, shards, _PLANES[base])


def by_parts(call: OpCall, core: CoreSpec, shards: int, formula: Callable[..., Pair]) -> Program:
    """``formula(tile, *pairs)`` with (real, imaginary) for each tensor and its first numbers."""
    specs = [_held(spec) for spec in (*call.outs[:1], *call.tensors())]
    kernel = Kernel(core, grid(call.outs[0].shape, specs), 1, shards)
    values = iter(kernel.ins)
    args: list[Any] = []
    for position, arg in enumerate(call.args):
        if isinstance(arg, TensorSpec):
            args.append(_parts(kernel, next(values), arg.dtype))
        elif position < 2 and isinstance(arg, (int, float, complex)):
            args.append((float(arg.real), float(arg.imag)))
        else:
            args.append(arg)
    real, imaginary = formula(kernel, *args)
    out = call.outs[0].dtype
    if out.is_complex:
        kernel.store_parts(0, (real, imaginary), REAL_OF[out], _HOLDER[out])
    else:
        assert isinstance(real, Value)
        kernel.store(0, real)
    return lower_kernel(kernel, call.name)


def _held(spec: TensorSpec) -> TensorSpec:
    """A complex tensor as one of integers of its element size."""
    return replace(spec, dtype=_HOLDER.get(spec.dtype, spec.dtype))


def _parts(t: Tile, value: Value, dtype: torch.dtype) -> Pair:
    if not dtype.is_complex:
        return value, 0.0
    real, imaginary = (t.part(value, at, REAL_OF[dtype]) for at in (0, 1))
    return real, imaginary
