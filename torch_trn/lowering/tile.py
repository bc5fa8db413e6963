"""What happens to one tile: a recorded sequence of engine steps over values in SBUF.

A lowering calls methods of `Tile`; each call is one engine instruction. A value is "full" (an
element per tile element), "row" (one row, the same in all partitions), "col" (one element per row)
or "one" (one element, the same everywhere). Where the operands of a step differ in kind, the
smaller one is read through a stride-0 access pattern or as a per-partition scalar.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from torch_trn.lowering.call import REAL_OF

Scalar: TypeAlias = int | float | bool
Source: TypeAlias = "Value | int | float | bool"

FP32 = torch.float32
INT32 = torch.int32

#: Step kinds that fold a full value into a col value.
REDUCING = frozenset({"reduce", "act_reduce", "stats"})


@dataclass(eq=False)
class Value:
    """One named tile value; arithmetic on it records steps."""

    tile: Tile
    kind: str
    dtype: torch.dtype
    operand: int | None = None
    step: Step | None = None

    def __add__(self, other: Source) -> Value:
        return self.tile.binary("add", self, other)

    def __radd__(self, other: Source) -> Value:
        return self.tile.binary("add", self, other)

    def __sub__(self, other: Source) -> Value:
        return self.tile.binary("subtract", self, other)

    def __rsub__(self, other: Source) -> Value:
        return self.tile.binary("reverse_subtract", self, other)

    def __mul__(self, other: Source) -> Value:
        return self.tile.binary("multiply", self, other)

    def __rmul__(self, other: Source) -> Value:
        return self.tile.binary("multiply", self, other)

    def __truediv__(self, other: Source) -> Value:
        return self.tile.divide(self, other)

    def __rtruediv__(self, other: Source) -> Value:
        inverse = self.tile.reciprocal(self)
        return inverse if other == 1 else inverse * other

    def __neg__(self) -> Value:
        return self.tile.binary("multiply", self, -1.0)


@dataclass(eq=False)
class Step:
    """One engine instruction on a tile: `kind` picks the instruction, `op` its function."""

    kind: str
    op: str
    ins: tuple[Value, ...]
    outs: tuple[Value, ...] = ()
    consts: tuple[Scalar, ...] = ()
    sides: tuple[bool, ...] = ()
    """Of a select: whether each side is a tile (else the next of `consts`)."""


@dataclass
class Output:
    """Where a value goes: result `index` of the operator, as `mode` says.

    "store": element by element; "rowsum": summed over all rows; "total": folded with `op` over
    everything, then multiplied by `scale`; "extra": written to HBM but not a returned tensor.
    """

    index: int
    value: Value
    mode: str = "store"
    op: str = "add"
    scale: float = 1.0


@dataclass
class Tile:
    """Records the steps of one tile."""

    inputs: list[Value] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    online: list[list[Step]] = field(default_factory=list)
    """Steps of a max_sum: where rows come in chunks, one pass finds maximum and sum together."""

    def operand(self, kind: str, dtype: torch.dtype) -> Value:
        """Add an operand loaded from HBM; complex elements count as two reals."""
        value = Value(self, kind, REAL_OF.get(dtype, dtype), operand=len(self.inputs))
        self.inputs.append(value)
        return value

    # -- steps ---------------------------------------------------------------------------------
    def step(
        self,
        kind: str,
        op: str,
        ins: tuple[Value, ...],
        consts: tuple[Scalar, ...] = (),
        dtype: torch.dtype | None = None,
        out_kind: str | None = None,
    ) -> Value:
        """Record one instruction and return what it writes."""
        result = Value(self, out_kind or _join(ins), dtype or _dtype(ins))
        self._record(Step(kind, op, ins, (result,), consts))
        return result

    def _record(self, step: Step) -> None:
        for value in step.outs:
            value.step = step
        self.steps.append(step)

    def act(
        self,
        op: str,
        x: Value,
        scale: Source = 1.0,
        bias: Source = 0.0,
        dtype: torch.dtype | None = None,
    ) -> Value:
        """ScalarE `op(x * scale + bias)`; scale and bias are numbers or col values."""
        ins = (x, *(v for v in (scale, bias) if isinstance(v, Value)))
        consts = tuple(v for v in (scale, bias) if not isinstance(v, Value))
        return self.step("act", op, ins, consts, dtype or _float(x), x.kind)

    def act_sum(
        self, op: str, x: Value, scale: Source = 1.0, bias: Source = 0.0
    ) -> tuple[Value, Value]:
        """As `act`, and the sum of its results over the columns (activation_reduce)."""
        ins = (x, *(v for v in (scale, bias) if isinstance(v, Value)))
        consts = tuple(v for v in (scale, bias) if not isinstance(v, Value))
        full, total = Value(self, x.kind, FP32), Value(self, "col", FP32)
        self._record(Step("act_reduce", op, ins, (full, total), consts))
        return full, total

    def binary(self, op: str, x: Value, y: Source, dtype: torch.dtype | None = None) -> Value:
        """VectorE `x op y`: tensor_scalar for a number or a smaller kind, else tensor_tensor."""
        if not isinstance(y, Value):
            return self.step("scalar", op, (x,), (y,), dtype)
        return self.step("tensor", op, (x, y), (), dtype)

    def scalar2(self, x: Value, op0: str, a: Source, op1: str, b: Source) -> Value:
        """VectorE `(x op0 a) op1 b` in one tensor_scalar; a and b are numbers or col values."""
        ins = (x, *(v for v in (a, b) if isinstance(v, Value)))
        consts = tuple(v for v in (a, b) if not isinstance(v, Value))
        return self.step("scalar", f"{op0},{op1}", ins, consts, None, x.kind)

    def stt(self, x: Value, op0: str, a: Source, op1: str, y: Value) -> Value:
        """VectorE `(x op0 a) op1 y` in one scalar_tensor_tensor; a is a number or a col value."""
        ins = (x, y, a) if isinstance(a, Value) else (x, y)
        consts = () if isinstance(a, Value) else (a,)
        return self.step("stt", f"{op0},{op1}", ins, consts, None, _join((x, y)))

    def divide(self, x: Value, y: Source) -> Value:
        """x / y; by a tensor as a reciprocal and a product, as there is no divide of two tiles."""
        if not isinstance(y, Value):
            return self.binary("multiply", x, 1.0 / y if y else float("inf"))
        return self.binary("multiply", x, self.reciprocal(y))

    def reciprocal(self, x: Value) -> Value:
        """VectorE 1 / x."""
        return self.step("reciprocal", "", (x,), (), _float(x))

    def select(self, mask: Value, x: Source, y: Source, dtype: torch.dtype | None = None) -> Value:
        """x where mask, else y: y copied, then a predicated copy of x over it."""
        ins = (mask, *(v for v in (x, y) if isinstance(v, Value)))
        consts = tuple(v for v in (x, y) if not isinstance(v, Value))
        data = tuple(v for v in (x, y) if isinstance(v, Value))
        if dtype is None:
            dtype = _dtype(data) if data else FP32
        result = self.step("select", "", ins, consts, dtype)
        self.steps[-1].sides = (isinstance(x, Value), isinstance(y, Value))
        return result

    def cast(self, x: Value, dtype: torch.dtype) -> Value:
        """Copy, converting on the way out."""
        return self.step("copy", "", (x,), (), dtype)

    def reduce(self, op: str, x: Value, dtype: torch.dtype | None = None) -> Value:
        """VectorE fold over the columns: "add", "max", "min", "multiply"... gives a col value."""
        return self.step("reduce", op, (x,), (), dtype or _dtype((x,)), "col")

    def stats(self, x: Value) -> tuple[Value, Value]:
        """Mean and variance over the columns (bn_stats per 512 elements, then bn_aggr)."""
        mean, var = Value(self, "col", FP32), Value(self, "col", FP32)
        self._record(Step("stats", "", (x,), (mean, var)))
        return mean, var

    def max_sum(self, x: Value) -> tuple[Value, Value, Value]:
        """Softmax's exp(x - max) (full), -max and the sum of the exponentials (both col)."""
        low = self.step("scalar", "multiply", (self.reduce("max", x, FP32),), (-1.0,), FP32)
        full, total = self.act_sum("exp", x, bias=low)
        self.online.append(self.steps[-3:])
        return full, low, total

    def fold_groups(self, x: Value, rows: int) -> Value:
        """TensorE: a col value averaged over each group of `rows` neighbouring rows."""
        return x if rows == 1 else self.step("fold_groups", "", (x,), (rows,))

    def scan(self, op: str, x: Value) -> Value:
        """VectorE running fold along the columns (tensor_tensor_scan)."""
        if x.kind != "full":
            x = self.step("copy", "", (x,), (), x.dtype, "full")
        return self.step("scan", op, (x,), (), _dtype((x,)))

    def constant(self, value: Scalar, dtype: torch.dtype, kind: str = "full") -> Value:
        """A tile filled with a number."""
        return self.step("memset", "", (), (value,), dtype, kind)

    def iota(self, dtype: torch.dtype = INT32, kind: str = "full") -> Value:
        """GpSimdE: the index of each element."""
        return self.step("iota", "", (), (), dtype, kind)

    def affine_select(self, x: Value, op: str) -> Value:
        """GpSimdE: x where an affine function of row and column passes `op`, else 0."""
        return self.step("affine", op, (x,))

    def random(self, dtype: torch.dtype = FP32, kind: str = "full") -> Value:
        """VectorE: 32 random bits per element."""
        return self.step("random", "uniform", (), (), dtype, kind)

    # -- results -------------------------------------------------------------------------------
    def store(self, index: int, value: Value) -> None:
        """Result `index` is `value`."""
        self.outputs.append(Output(index, value))

    def rowsum(self, index: int, value: Value) -> None:
        """Result `index` is `value` summed over all rows (a matmul by ones)."""
        self.outputs.append(Output(index, value, "rowsum"))

    def total(self, index: int, value: Value, op: str = "add", scale: float = 1.0) -> None:
        """Result `index` is `value` folded over all elements, times `scale`."""
        self.outputs.append(Output(index, value, "total", op, scale))


def _join(ins: tuple[Value, ...]) -> str:
    kinds = {value.kind for value in ins}
    if "full" in kinds or {"row", "col"} <= kinds:
        return "full"
    return "row" if "row" in kinds else "col" if "col" in kinds else "one"


def _float(x: Value) -> torch.dtype:
    return FP32 if not x.dtype.is_floating_point or x.dtype.itemsize < 4 else x.dtype


def _dtype(ins: tuple[Value, ...]) -> torch.dtype:
    """fp32 wherever a float takes part (engines compute in fp32), else the widest integer."""
    if any(value.dtype.is_floating_point for value in ins):
        return FP32
    return max((value.dtype for value in ins), key=lambda d: d.itemsize, default=FP32)
