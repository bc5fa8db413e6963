"""Which elements are among others, and how many fall into each bin: compared all with all."""

from __future__ import annotations

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import Grid, Operand, grid
from torch_trn.lowering.move import fill, mover, outputs_of
from torch_trn.lowering.part import Part
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import joined, lower_kernel
from torch_trn.lowering.softmax import row_grid
from torch_trn.lowering.tile import FP32, INT32, Source, Value
from torch_trn.memory import Pool, Space
from torch_trn.program import Program

__all__: list[str] = []

_BF16, _INT64 = torch.bfloat16, torch.int64


# -- membership ------------------------------------------------------------------------------------
@lowering("aten::isin")
def isin(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(elements, test_elements, assume_unique, invert): each element against all tests at once."""
    elements, tests = call.args[:2]
    out, invert = call.outs[0], bool(call.arg(3, False))
    if isinstance(tests, TensorSpec) and not tests.numel:
        b = mover(core, call.name)
        fill(b, outputs_of(b, call)[0], Part.of(out), int(invert), shards)
        return b.build()
    op, fold = ("not_equal", "min") if invert else ("is_equal", "max")
    many = isinstance(tests, TensorSpec) and tests.numel > 1
    kernel = Kernel(core, _pairs(out, elements, tests, many), 1, shards)
    x, against = _sides(kernel, elements, tests)
    hit = kernel.binary(op, against, x, _BF16 if many else torch.bool)
    kernel.store(0, kernel.reduce(fold, hit) if many else hit)
    return lower_kernel(kernel, call.name)


def _pairs(
    out: TensorSpec, elements: TensorSpec | object, tests: TensorSpec | object, many: bool
) -> Grid:
    """Rows are elements, columns the tests of each; elements alone where there is one test."""
    given = [spec for spec in (elements, tests) if isinstance(spec, TensorSpec)]
    if not many:
        return grid(out.shape, [out, *(_first(s) if s is tests else s for s in given)])
    assert isinstance(tests, TensorSpec)
    shape, behind = (*out.shape, *tests.shape), len(tests.shape)
    rows = [spec for spec in given if spec is not tests]
    specs = [_behind(spec, behind) for spec in (out, *rows)]
    dims = list(range(len(out.shape), len(shape)))
    return row_grid(shape, dims, [*specs, tests])


def _first(spec: TensorSpec) -> TensorSpec:
    """A tensor of one element without dims."""
    return TensorSpec(spec.dtype, (), ())


def _behind(spec: TensorSpec, count: int) -> TensorSpec:
    """``spec`` with ``count`` more dims of one element behind its own."""
    return TensorSpec(spec.dtype, (*spec.shape, *(1,) * count), (*spec.strides, *(0,) * count))


def _sides(kernel: Kernel, elements: object, tests: object) -> tuple[Source, Value]:
    """What is compared; the second is a tile."""
    values = iter(kernel.ins)
    x, y = (next(values) if isinstance(side, TensorSpec) else side for side in (elements, tests))
    if isinstance(y, Value):
        return x, y  # type: ignore[return-value]
    assert isinstance(x, Value)
    return y, x  # type: ignore[return-value]


# -- histograms ------------------------------------------------------------------------------------
@lowering("aten::histc")
def histc(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(self, bins, min, max): one-hot rows of the elements' bins, summed on TensorE.

    Without a range it is that of the data, which a pass before finds.
    """
    x, bins = call.args[:2]
    low, high = call.arg(2, 0), call.arg(3, 0)
    if not x.numel:
        b = mover(core, call.name)
        fill(b, outputs_of(b, call)[0], Part.of(call.outs[0]), 0, shards)
        return b.build()
    whole = not x.dtype.is_floating_point
    if whole:
        low, high = int(low), int(high)
    ends = () if low != high else tuple(
        Pool(name, Space.HBM, 8) for name in ("least", "most")
    )  # fmt: skip
    before = [_range(call, core, x, ends)] if ends else []
    shape = (*x.shape, bins)
    walked = row_grid(shape, [len(shape) - 1], [_behind(x, 1)])
    kinds = _INT64 if whole else FP32
    scratch = [Operand(TensorSpec(kinds, (), ()), "one") for _ in ends]
    operands = (Operand(call.outs[0], "row", bins), *walked.operands, *scratch)
    kernel = Kernel(
        core, Grid(walked.rows, bins, operands), 1, shards, ["out0", "in0", *ends]
    )  # fmt: skip
    value, *found = kernel.ins
    if found:
        # An empty range is widened by 1 on each side.
        same = kernel.binary("is_equal", found[0], found[1], kinds)
        low, high = found[0] - same, found[1] + same
    hot = (_hot_integers if whole else _hot_floats)(kernel, value, bins, low, high)
    kernel.rowsum(0, hot)
    return joined(call.name, core, [*before, lower_kernel(kernel, call.name)])


def _range(call: OpCall, core: CoreSpec, x: TensorSpec, ends: tuple[Pool, ...]) -> Program:
    """The least and the largest element into scratch; every core finds them for itself."""
    dtype = FP32 if x.dtype.is_floating_point else _INT64
    walked = grid(x.shape, [x, x])
    scratch = tuple(Operand(TensorSpec(dtype, (), ()), "one") for _ in ends)
    kernel = Kernel(
        core, Grid(walked.rows, walked.cols, (*scratch, walked.operands[0]), walked.is_flat,
                   walked.pieces, walked.size), 2, 1, [*ends, "in0"],
    )  # fmt: skip
    for index, op in enumerate(("min", "max")):
        kernel.total(index, kernel.ins[0], op=op)
    return lower_kernel(kernel, call.name)


def _hot_floats(kernel: Kernel, x: Value, bins: int, low: Source, high: Source) -> Value:
    """1 where a column is the element's bin: (x - low) * bins / (high - low), the last closed."""
    if isinstance(low, Value) or isinstance(high, Value):
        assert isinstance(high, Value)
        width: Source = high - low
    else:
        ends = torch.tensor([low, high], dtype=FP32)
        width = float(ends[1] - ends[0])
    place = kernel.scalar2(x, "subtract", low, "multiply", float(bins), FP32)
    place = kernel.binary("divide", place, width, FP32)
    place = kernel.binary("min", kernel.cast(place, INT32), bins - 1, FP32)
    inside = kernel.binary("is_ge", x, low, FP32)
    inside = kernel.stt(x, "is_le", high, "multiply", inside, FP32)
    place = kernel.select(inside, place, -1.0, FP32)
    return kernel.binary("is_equal", kernel.iota(FP32, "row"), place, _BF16)


def _hot_integers(kernel: Kernel, x: Value, bins: int, low: Source, high: Source) -> Value:
    """The same without division: k * width <= (x - low) * bins < (k + 1) * width, exactly."""
    place = kernel.scalar2(x, "subtract", low, "multiply", bins, _INT64)
    if isinstance(low, Value):
        assert isinstance(high, Value)
        span = high - low
        width: Source = span
        edges = kernel.iota(_INT64, "row") * span
        last: Source = kernel.scalar2(span, "multiply", bins, "subtract", 1, _INT64)
    else:
        assert not isinstance(high, Value)
        distance = int(high) - int(low)
        width, last = distance, bins * distance - 1
        edges = kernel.iota(_INT64, "row", col=distance)
    place = kernel.binary("min", place, last, _INT64)
    inside = kernel.binary("is_ge", x, low, FP32)
    inside = inside * kernel.binary("is_le", x, high, FP32)
    # Before the first edge nothing counts.
    place = kernel.select(inside, place, -1, _INT64)
    reached = kernel.binary("is_le", edges, place, _BF16)
    before = kernel.binary("is_gt", edges, kernel.binary("subtract", place, width, _INT64), _BF16)
    return kernel.binary("multiply", reached, before, _BF16)
