"""`_foreach_*`: one Program over a whole list of tensors.

Tensors are taken as one stream of elements: those of about the same size share a loop, small ones
share tiles (their rows are descriptors of one DMA), so the Program's length does not grow with the
list. Tensors whose elements do not lie together, and those with numbers of their own in a list of
numbers, get steps of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from torch_trn.chip import CoreSpec
from torch_trn.lowering import binary, unary
from torch_trn.lowering.call import Named, OpCall, TensorSpec, named_args, named_outs
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import Grid, Operand, flat, grid
from torch_trn.lowering.move import mover
from torch_trn.lowering.reduction import FOLDS
from torch_trn.lowering.registry import add
from torch_trn.lowering.run import joined, lower_grids
from torch_trn.lowering.tile import Tile, Value
from torch_trn.program import Program

#: Tensors up to this size share tiles with others.
SMALL_BYTES = 65536


Row = tuple[Named, ...]
Key = tuple[Any, ...]


def is_list(arg: Any) -> bool:
    """Whether an argument is a non-empty list of tensors."""
    return isinstance(arg, tuple) and bool(arg) and isinstance(arg[0], TensorSpec)


def _is_stream(row: Row) -> bool:
    """Whether the tensors of one place in the lists hold their elements in the same order, without
    gaps."""
    first = row[0].spec
    dense = sorted(zip(first.strides, first.shape, strict=True))
    step = 1
    for stride, size in dense:
        if size != 1 and stride != step:
            return False
        step *= size
    return all(
        (one.spec.shape, one.spec.strides) == (first.shape, first.strides) or
        one.spec.is_contiguous and first.is_contiguous and one.spec.shape == first.shape
        for one in row
    )  # fmt: skip


def groups(rows: Sequence[Row], numbers: Sequence[Key]) -> list[tuple[Key, list[Row]]]:
    """Rows whose tensors have the same dtypes and numbers, those of one Kernel together."""
    found: dict[Key, list[Row]] = {}
    for place, (row, own) in enumerate(zip(rows, numbers, strict=True)):
        if not row[0].spec.numel:
            continue
        alone = None if _is_stream(row) else place
        dtypes = tuple(one.spec.dtype for one in row)
        found.setdefault((alone, dtypes, own), []).append(row)
    return [(key[2], members) for key, members in found.items()]


def _by_size(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by the order of magnitude of their size: each a loop of its own."""
    itemsize = max(one.spec.itemsize for one in rows[0])
    found: dict[int, list[Row]] = {}
    for row in rows:
        numel = row[0].spec.numel
        key = 0 if numel * itemsize <= SMALL_BYTES else numel.bit_length() // 2
        found.setdefault(key, []).append(row)
    return list(found.values())


def stream_grids(rows: Sequence[Row]) -> tuple[list[Grid], list[Row]]:
    """A flat Grid for each size of tensors, and the rows in the order in which grids take them."""
    found, order, done = [], [], 0
    for members in _by_size(rows):
        numel = sum(row[0].spec.numel for row in members)
        specs = [TensorSpec.contiguous(one.spec.dtype, numel) for one in members[0]]
        walked = flat(numel, specs)
        run = max(1, numel // len(members))
        operands = [replace(o, run=min(run, numel), offset=done) for o in walked.operands]
        found.append(replace(walked, operands=tuple(operands)))
        order += members
        done += numel
    return found, order


Build = Callable[[Kernel, list[Value], list[Value], Key], None]


def lower_lists(
    call: OpCall, core: CoreSpec, shards: int, outs: Sequence[Sequence[Named]],
    ins: Sequence[Sequence[Named]], singles: Sequence[Named], build: Build,
    numbers: Sequence[Key] | None = None, totals: Sequence[Named] = (),
) -> Program:  # fmt: skip
    """`build(kernel, values of ins, values of singles, numbers)` for every place in the lists.

    The lists of `outs` and `ins` are walked together; each result is stored by `build`. `numbers`
    are those that belong to a place, `totals` results (after `outs`) of one element each.
    """
    rows = list(zip(*outs, *ins, strict=True))
    programs = []
    for own, members in groups(rows, numbers if numbers is not None else [()] * len(rows)):
        grids: list[Grid] = []
        order = members
        if _is_stream(members[0]):
            grids, order = stream_grids(members)
        else:
            grids = [grid(row[0].spec.shape, [one.spec for one in row]) for row in members]
        lists: list[Any] = [tuple(row[i].name for row in order) for i in range(len(order[0]))]
        names = _between(lists, len(outs), [[one.name for one in few] for few in (totals, singles)])
        few = [[Operand(one.spec, "one") for one in group] for group in (totals, singles)]
        grids = [
            replace(one, operands=tuple(_between(list(one.operands), len(outs), few)))
            for one in grids
        ]
        kernel = Kernel(core, grids[0], len(outs) + len(totals), shards, names)
        values = kernel.ins
        build(kernel, values[: len(ins)], values[len(ins) :], own)
        programs.append(lower_grids(kernel, call.name, grids))
    return joined(call.name, core, programs)


def _between(lists: list[Any], outs: int, few: Sequence[list[Any]]) -> list[Any]:
    """Results (lists, then totals) before arguments (lists, then single tensors)."""
    totals, singles = few
    return [*lists[:outs], *totals, *lists[outs:], *singles]


def elementwise(formula: Callable[..., Any]) -> Callable[[OpCall, CoreSpec, int], Program]:
    """The lowering of `_foreach_<op>` for the formula of `<op>`."""

    def lower(call: OpCall, core: CoreSpec, shards: int) -> Program:
        args = named_args(call)
        ins = [arg for arg in args if _is_named_list(arg)]
        singles = [arg for arg in args if isinstance(arg, Named)]
        if not ins:
            return mover(core, call.name).build()
        lists = [arg for arg in args if _is_number_list(arg)]

        def build(kernel: Kernel, values: list[Value], ones: list[Value], own: Key) -> None:
            tensors, scalars, numbers = iter(values), iter(ones), iter(own)
            given = [
                next(tensors) if _is_named_list(a) else next(scalars) if isinstance(a, Named)
                else next(numbers) if _is_number_list(a) else a
                for a in args
            ]  # fmt: skip
            kernel.store(0, formula(kernel, *given))

        numbers: list[Key] = [()] * len(ins[0])
        if lists:
            numbers = list(zip(*lists, strict=True))
        return lower_lists(
            call, core, shards, [_results(call, ins[0])], ins, singles, build, numbers
        )

    return lower


def _is_named_list(arg: Any) -> bool:
    return isinstance(arg, tuple) and bool(arg) and isinstance(arg[0], Named)


def _is_number_list(arg: Any) -> bool:
    return isinstance(arg, tuple) and bool(arg) and isinstance(arg[0], int | float)


def _results(call: OpCall, first: Sequence[Named]) -> Sequence[Named]:
    """What is written: the results, or the first list in place."""
    return named_outs(call) if len(call.outs) == len(first) else first


_NAMES = (
    "abs acos add addcdiv addcmul asin atan ceil clamp_max clamp_min cos cosh div erf erfc exp "
    "expm1 floor frac lerp lgamma log log10 log1p log2 maximum minimum mul neg pow reciprocal "
    "round rsqrt sigmoid sign sin sinh sqrt sub tan tanh trunc"
).split()

_FORMULAS = {**unary.FORMULAS, **binary.FORMULAS}
for _name in _NAMES:
    add((f"aten::_foreach_{_name}",), elementwise(_FORMULAS[_name]))


def _copied(t: Tile, x: Value, source: Value, *_: Any) -> Value:
    return source


def _same(t: Tile, x: Value, *_: Any) -> Value:
    return x


add(("aten::_foreach_copy",), elementwise(_copied))
add(("aten::_foreach_clone",), elementwise(_same))


def zero(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Every tensor filled with zeros."""
    args = named_args(call)

    def build(kernel: Kernel, _values: list[Value], _ones: list[Value], _own: Key) -> None:
        kernel.store(0, kernel.constant(0, kernel.out_operands[0].spec.dtype))

    return lower_lists(call, core, shards, [args[0]], [], [], build)


add(("aten::_foreach_zero",), zero)


def reduced(fold: Callable[..., Any]) -> Callable[[OpCall, CoreSpec, int], Program]:
    """The lowering of a `_foreach_` reduction: tensors of one size are the rows of a grid."""

    def lower(call: OpCall, core: CoreSpec, shards: int) -> Program:
        kinds: dict[Key, list[Row]] = {}
        for row in zip(named_outs(call), named_args(call)[0], strict=True):
            spec = row[1].spec
            alone = None if _is_stream(row[1:]) else row[1].name
            kinds.setdefault((spec.dtype, alone, spec.numel > 0), []).append(row)
        programs = []
        for (_, alone, filled), rows in kinds.items():
            rows = sorted(rows, key=lambda row: row[1].spec.numel)
            grids = [_strided_rows(rows[0])] if alone is not None else _size_grids(rows)
            names: list[Any] = [tuple(row[i].name for row in rows) for i in range(1 + filled)]
            kernel = Kernel(core, grids[0], 1, shards, names)
            if filled:
                kernel.store(0, fold(kernel, kernel.ins[0], 1, *call.args[1:]))
            else:
                kernel.store(0, kernel.constant(0.0, rows[0][0].spec.dtype, "col"))
            programs.append(lower_grids(kernel, call.name, grids))
        return joined(call.name, core, programs)

    return lower


def _size_grids(rows: Sequence[Row]) -> list[Grid]:
    """A Grid for each size, whose rows are the tensors of that size; empty ones have no columns."""
    grids, first, done = [], 0, 0
    for numel, members in groupby(rows, key=lambda row: row[1].spec.numel):
        alike = list(members)
        count, (out, source) = len(alike), (one.spec for one in alike[0])
        result = TensorSpec.contiguous(out.dtype, count)
        operands = [Operand(result, "col", 1, rows=((count, 1),), offset=first)]
        if numel:
            spec = TensorSpec.contiguous(source.dtype, count, numel)
            operands.append(Operand(spec, "full", numel, offset=done))
        grids.append(Grid(count, max(numel, 1), tuple(operands)))
        first, done = first + count, done + count * numel
    return grids


def _strided_rows(row: Row) -> Grid:
    """One tensor whose elements do not lie together, as a row."""
    out, source = (one.spec for one in row)
    lines = tuple(zip(source.shape, source.strides, strict=True))
    result = Operand(TensorSpec.contiguous(out.dtype, 1), "col", 1)
    return Grid(1, source.numel, (result, Operand(source, "full", 1, rows=((1, 0),), cols=lines)))


add(("aten::_foreach_norm",), reduced(FOLDS["linalg_vector_norm"][0]))
add(("aten::_foreach_powsum",), reduced(FOLDS["linalg__powsum"][0]))
add(("aten::_foreach_max",), reduced(FOLDS["amax"][0]))
