"""What happens to one tile: a recorded sequence of engine steps over values in SBUF.

A lowering calls methods of `Tile`; each call is one engine instruction. A value is "full" (an
element per tile element), "row" (one row, the same in all partitions), "col" (one element per row)
or "one" (one element, the same everywhere). Where the operands of a step differ in kind, the
smaller one is read through a stride-0 access pattern or as a per-partition scalar.

Values are fp32 wherever a float takes part, unless a step names a dtype; what goes to a result is
rounded once, by the step that made it (or on its way out, if other steps read it too). Integers
stay integers: sums, products and comparisons of them run on GpSimdE, whose arithmetic is exact.

>>> x, w = kernel.ins                    # tensors of the grid
>>> mean, var = kernel.stats(x)          # over the columns: col values
>>> rstd = kernel.act("rsqrt", var, bias=1e-5)
>>> y = kernel.scalar2(x, "subtract", mean, "multiply", rstd)
>>> kernel.store(0, y * w)               # y * w: w may be full, row, col or one
>>> kernel.rowsum(1, y, scale=0.5)       # summed over all rows; total() folds everything
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

#: The largest fp32 number.
MAX_FLOAT = 3.4028234663852886e38

#: Step kinds that fold a full value into a col value.
REDUCING = frozenset({"reduce", "act_reduce", "stats"})


#: Operators whose result is a truth value.
COMPARISONS = frozenset({"is_equal", "not_equal", "is_gt", "is_ge", "is_lt", "is_le"})

#: Operators on bits; an instruction has only these, or only others.
BITWISE = frozenset(
    {"bitwise_and", "bitwise_or", "bitwise_xor", "logical_shift_left", "logical_shift_right",
     "arith_shift_right"}
)  # fmt: skip

#: `y op x` for `x op y`.
MIRROR = {
    "add": "add", "multiply": "multiply", "max": "max", "min": "min",
    "subtract": "reverse_subtract", "reverse_subtract": "subtract",
    "is_equal": "is_equal", "not_equal": "not_equal", "is_gt": "is_lt", "is_lt": "is_gt",
    "is_ge": "is_le", "is_le": "is_ge", "logical_and": "logical_and", "logical_or": "logical_or",
    "logical_xor": "logical_xor", "bitwise_and": "bitwise_and", "bitwise_or": "bitwise_or",
    "bitwise_xor": "bitwise_xor", "abs_max": "abs_max",
}  # fmt: skip


@dataclass(eq=False)
class Value:
    """One named tile value; arithmetic on it records steps.

    ``stride``: distance of neighbours in its tile (a load that fetched gaps too); ``place``: its
    first element there. ``held``: the value whose tile this is, if it names the bits of another.
    """

    tile: Tile
    kind: str
    dtype: torch.dtype
    operand: int | None = None
    step: Step | None = None
    stride: int = 1
    place: int = 0
    held: Value | None = None

    @property
    def root(self) -> Value:
        """The value that has a tile: itself, unless it names the bits of another."""
        return self if self.held is None else self.held

    @property
    def is_integer(self) -> bool:
        """Whether it holds integers (a bool is none)."""
        return not (self.dtype.is_floating_point or self.dtype == torch.bool)

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
        return self.tile.binary("multiply", self, -1 if self.is_integer else -1.0)


@dataclass(eq=False)
class Step:
    """One engine instruction on a tile: `kind` picks the instruction, `op` its function.

    `operands` are the numbers it works with, in order; None stands for the next of `ins` behind the
    streamed ones (scale and bias, the scalars of a tensor_scalar, the sides of a select).
    """

    kind: str
    op: str
    ins: tuple[Value, ...]
    outs: tuple[Value, ...] = ()
    operands: tuple[Scalar | None, ...] = ()
    index: tuple[int, int, int] = (0, 0, 0)
    """Of iota and affine_select: the index is [0] + [1] x row + [2] x column."""
    cycles_each: int = 0


@dataclass
class Output:
    """Where a value goes: result `index` of the operator, as `mode` says.

    "store": element by element; "rowsum": summed over all rows; "total": folded with `op` over
    everything. Sums are multiplied by `scale`.
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
        operands: tuple[Scalar | None, ...] = (),
        dtype: torch.dtype | None = None,
        out_kind: str | None = None,
    ) -> Value:
        """Record one instruction and return what it writes."""
        result = Value(self, out_kind or _join(ins), dtype or _dtype(ins, operands))
        self._record(Step(kind, op, ins, (result,), operands))
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
        """ScalarE `op(x * scale + bias)`; scale and bias are numbers or col (or one) values."""
        tiles, operands = _split((scale, bias))
        return self.step("act", op, (x, *tiles), operands, dtype or FP32)

    def act_sum(
        self, op: str, x: Value, scale: Source = 1.0, bias: Source = 0.0
    ) -> tuple[Value, Value]:
        """As `act`, and the sum of its results over the columns (activation_reduce)."""
        tiles, operands = _split((scale, bias))
        full, total = Value(self, "full", FP32), Value(self, "col", FP32)
        self._record(Step("act_reduce", op, (x, *tiles), (full, total), operands))
        return full, total

    def binary(self, op: str, x: Value, y: Source, dtype: torch.dtype | None = None) -> Value:
        """VectorE `x op y`: tensor_scalar for a number or a smaller kind, else tensor_tensor.

        ``dtype`` is that of the result; of a comparison it may be bool or a number's (0 or 1).
        """
        if not isinstance(y, Value):
            return self.step("scalar", op, (x,), (y,), dtype)
        return self.step("tensor", op, (x, y), (), dtype)

    def scalar2(
        self, x: Value, op0: str, a: Source, op1: str, b: Source, dtype: torch.dtype | None = None
    ) -> Value:
        """VectorE `(x op0 a) op1 b` in one tensor_scalar; a and b are numbers or col values."""
        tiles, operands = _split((a, b))
        given = dtype or _dtype((x, *tiles), operands)
        return self.step("scalar", f"{op0},{op1}", (x, *tiles), operands, given)

    def stt(
        self, x: Value, op0: str, a: Source, op1: str, y: Value, dtype: torch.dtype | None = None
    ) -> Value:
        """VectorE `(x op0 a) op1 y` in one scalar_tensor_tensor; a is a number or a col value."""
        tiles, operands = _split((a,))
        given = dtype or _dtype((x, y, *tiles), operands)
        exact = {op0, op1} <= BITWISE
        if not exact and not given.is_floating_point and (x.is_integer or y.is_integer):
            # Only GpSimdE computes exactly with integers, and it has no such instruction.
            return self.binary(op1, self.binary(op0, x, a), y, dtype)
        return self.step("stt", f"{op0},{op1}", (x, y, *tiles), operands, given)

    def divide(self, x: Value, y: Source) -> Value:
        """x / y; by a tensor as a reciprocal and a product, as there is no divide of two tiles."""
        if not isinstance(y, Value):
            return self.binary("divide", x, float(y), FP32)
        return self.binary("multiply", x, self.reciprocal(y), FP32)

    def reciprocal(self, x: Value) -> Value:
        """VectorE 1 / x."""
        return self.step("reciprocal", "", (x,), (), FP32)

    def select(self, mask: Value, x: Source, y: Source, dtype: torch.dtype | None = None) -> Value:
        """x where mask, else y: y copied, then a predicated copy of x over it."""
        tiles, operands = _split((x, y))
        if dtype is None:
            dtype = _dtype(tiles, operands) if tiles else FP32
        return self.step("select", "", (mask, *tiles), operands, dtype)

    def bits(self, x: Value, dtype: torch.dtype) -> Value:
        """The same tile with its bits taken as another dtype of the same size: no instruction."""
        assert dtype.itemsize == x.dtype.itemsize
        return Value(self, x.kind, dtype, x.operand, x.step, x.stride, x.place, x.root)

    def part(self, x: Value, at: int, dtype: torch.dtype) -> Value:
        """Half ``at`` (0 or 1) of each element of a tile, as ``dtype``: no instruction."""
        assert 2 * dtype.itemsize == x.dtype.itemsize
        place = 2 * x.place + at
        return Value(self, x.kind, dtype, x.operand, x.step, 2 * x.stride, place, x.root)

    def cast(self, x: Value, dtype: torch.dtype) -> Value:
        """Copy, converting on the way out (floats to integers towards zero)."""
        return self.step("copy", "", (x,), (), dtype)

    def custom(
        self, op: str, *sources: Value, numbers: tuple[Scalar, ...] = (), cycles_each: int = 64,
        dtype: torch.dtype = FP32,
    ) -> Value:  # fmt: skip
        """GpSimdE: a C++ function, named as in torch.special or torch, of sources and numbers.

        ``cycles_each`` is what one element takes (assumed).
        """
        result = self.step("custom", op, sources, numbers, dtype)
        self.steps[-1].cycles_each = cycles_each
        return result

    def reduce(self, op: str, x: Value, dtype: torch.dtype | None = None) -> Value:
        """VectorE fold over the columns: "add", "max", "min", "multiply"... gives a col value."""
        return self.step("reduce", op, (x,), (), dtype or _dtype((x,)), "col")

    def stats(self, x: Value) -> tuple[Value, Value]:
        """Mean and variance over the columns (bn_stats per 512 elements, then bn_aggr)."""
        # bn_aggr leaves both next to each other.
        mean, var = Value(self, "col", FP32, stride=2), Value(self, "col", FP32, stride=2, place=1)
        self._record(Step("stats", "", (x,), (mean, var)))
        return mean, var

    def max_sum(self, x: Value, finite: bool = False) -> tuple[Value, Value, Value]:
        """Softmax's exp(x - max) (full), -max and the sum of the exponentials (both col).

        -max is at most the largest float, so that rows of -inf sum up to 0; ``finite``: at least
        the smallest, so that the sum of a row with +inf is inf.
        """
        first = len(self.steps)
        low = self.scalar2(self.reduce("max", x, FP32), "multiply", -1.0, "min", MAX_FLOAT, FP32)
        if finite:
            low = self.binary("max", low, -MAX_FLOAT)
        full, total = self.act_sum("exp", x, bias=low)
        self.online.append(self.steps[first:])
        return full, low, total

    def fold_groups(self, x: Value, rows: int) -> Value:
        """TensorE: a col value averaged over each group of `rows` (up to 128) neighbouring rows."""
        return x if rows == 1 else self.step("fold_groups", "", (x,), (rows,), FP32)

    def scan(self, op: str, x: Value, y: Value | None = None) -> Value:
        """VectorE running fold along the columns (tensor_tensor_scan), in fp32.

        With "op0,op1" and ``y``: (result so far op0 x) op1 y, from 0 on. Integers give int64.
        """
        ins = tuple(
            v if v.kind == "full" else self.step("copy", "", (v,), (), v.dtype, "full")
            for v in (x, y)
            if v is not None
        )
        return self.step("scan", op, ins, (), FP32 if x.dtype.is_floating_point else torch.int64)

    def shift(self, x: Value, first: float) -> Value:
        """ScalarE: x one column further on, behind the number ``first``."""
        return self.step("shift", "", (x,), (first,), x.dtype)

    def constant(self, value: Scalar, dtype: torch.dtype, kind: str = "full") -> Value:
        """A tile filled with a number."""
        return self.step("memset", "", (), (value,), dtype, kind)

    def iota(
        self, dtype: torch.dtype = INT32, kind: str = "full", row: int = 0, col: int = 1,
        base: int = 0,
    ) -> Value:  # fmt: skip
        """GpSimdE: ``base`` + ``row`` x row + ``col`` x column of each element, in the grid."""
        result = self.step("iota", "", (), (), dtype, kind)
        self.steps[-1].index = (base, row, col)
        return result

    def affine_select(
        self, x: Value, op: str, fill: Scalar = 0.0, row: int = 1, col: int = -1, base: int = 0
    ) -> Value:
        """GpSimdE: x where the index (as in `iota`) `op` 0, else ``fill``."""
        result = self.step("affine", op, (x,), (fill,), x.dtype, "full")
        self.steps[-1].index = (base, row, col)
        return result

    def random(self, dtype: torch.dtype = FP32, kind: str = "full") -> Value:
        """VectorE: 32 random bits per element; as a float, uniform in [0, 1)."""
        return self.step("random", "uniform", (), (), dtype, kind)

    # -- results -------------------------------------------------------------------------------
    def store(self, index: int, value: Value) -> None:
        """Result `index` is `value`."""
        self.outputs.append(Output(index, value))

    def rowsum(self, index: int, value: Value, scale: float = 1.0) -> None:
        """Result `index` is `value` summed over all rows (a matmul by ones), times `scale`."""
        self.outputs.append(Output(index, value, "rowsum", scale=scale))

    def total(self, index: int, value: Value, op: str = "add", scale: float = 1.0) -> None:
        """Result `index` is `value` folded over all elements, times `scale`."""
        self.outputs.append(Output(index, value, "total", op, scale))


def _split(sources: tuple[Source, ...]) -> tuple[tuple[Value, ...], tuple[Scalar | None, ...]]:
    """The tiles among sources, and the numbers with None where a tile is."""
    tiles = tuple(v for v in sources if isinstance(v, Value))
    return tiles, tuple(None if isinstance(v, Value) else v for v in sources)


def _join(ins: tuple[Value, ...]) -> str:
    kinds = {value.kind for value in ins}
    if "full" in kinds or {"row", "col"} <= kinds:
        return "full"
    return "row" if "row" in kinds else "col" if "col" in kinds else "one"


def _dtype(ins: tuple[Value, ...], numbers: tuple[Scalar | None, ...] = ()) -> torch.dtype:
    """fp32 wherever a float takes part (engines compute in fp32), else the widest integer."""
    if any(value.dtype.is_floating_point for value in ins):
        return FP32
    if any(isinstance(number, float) for number in numbers):
        return FP32
    widest = max((value.dtype for value in ins), key=lambda d: d.itemsize, default=FP32)
    whole = any(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    return INT32 if widest == torch.bool and whole else widest
