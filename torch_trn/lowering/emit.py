"""Turns the steps of a Tile into instructions of a Builder, one method per step kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from torch_trn.isa import Engine
from torch_trn.lowering.layout import ceil_div
from torch_trn.lowering.tile import COMPARISONS, FP32, MIRROR, Scalar, Step, Value
from torch_trn.memory import Index, TileRef, affine
from torch_trn.program import Builder

#: bn_stats takes at most this many elements and leaves this many results (hardware.md 2.2; isa).
BN_STATS_MAX = 512
BN_STATS_RESULTS = 6

#: Width from which rows that share a partition are squared one by one (cheaper on ScalarE).
BY_ROW = 64

#: Operators that GpSimdE computes exactly with integers (isa/alu.py).
_WHOLE = COMPARISONS | {
    "add",
    "subtract",
    "reverse_subtract",
    "multiply",
    "max",
    "min",
    "mod",
    "abs_max",
    "pow",
}

#: What an accumulator starts from.
NEUTRAL = {"add": 0.0, "multiply": 1.0, "max": -math.inf, "min": math.inf}


@dataclass(frozen=True)
class Extent:
    """The tile being emitted: partitions, rows in each, columns, reals per element, and where.

    ``row`` and ``col`` are those of its first element in windows of its operands. ``short``:
    columns of the last partition, where those are fewer. ``start``: first column within the tile
    (of one row). ``place``: row and column in the grid of the first element, and how far they move
    from one partition to the next.
    """

    parts: int
    group: int
    width: int
    reals: int = 1
    row: Index = 0
    col: Index = 0
    short: int | None = None
    start: int = 0
    place: tuple[Index, Index, int, int] = (0, 0, 1, 0)

    def free(self, kind: str) -> int:
        """Free size of a value of `kind`, in elements."""
        if kind == "full":
            return self.group * self.width * self.reals
        if kind == "row":
            return self.width * self.reals
        return self.group if kind == "col" else 1

    @property
    def folded(self) -> int:
        """Partitions that have any columns of the tile."""
        return self.parts - (self.short == 0)

    def parts_of(self) -> list[Extent]:
        """This extent, or the two parts of it that all of their partitions fill."""
        if self.short is None or self.short == self.width:
            return [self]
        rest = replace(
            self, parts=self.parts - 1, width=self.width - self.short, short=None,
            start=self.start + self.short,
        )  # fmt: skip
        first = replace(self, width=self.short, short=None)
        return [part for part in (first, rest) if part.parts and part.width]


Refs = Callable[[Value], TileRef]


def dims_of(value: Value, kind: str, extent: Extent) -> tuple[tuple[int, int], ...]:
    """(step, count) of `value` in its tile when it is read as a value of `kind`."""
    group, width = extent.group, extent.width * extent.reals
    step = value.stride
    if kind == "one":
        return ((1, 1),)
    if kind == "col":
        return ((step if value.kind == "col" else 0, group),)
    if kind == "row":
        return ((step if value.kind == "row" else 0, width),)
    if value.kind == "full":
        return ((step, group * width),)
    rows, cols = {"row": (0, step), "col": (step, 0), "one": (0, 0)}[value.kind]
    if group == 1 or rows == cols == 0:
        return ((cols, group * width),)
    return ((rows, group), (cols, width))


class Emitter:
    """Writes steps into `b`; `refs` gives the tile a value lives in at the current loop indices.

    `scratch(name)` gives tiles for what a step needs beside its values.
    """

    def __init__(self, b: Builder, scratch: Callable[[str], TileRef]) -> None:
        self.b = b
        self.scratch = scratch

    def step(self, step: Step, refs: Refs, extent: Extent) -> None:
        """Emit the instructions of one step."""
        getattr(self, f"_{step.kind}")(step, refs, extent)

    # -- operands ------------------------------------------------------------------------------
    def at(
        self, value: Value, refs: Refs, kind: str, extent: Extent, dtype: torch.dtype
    ) -> TileRef:
        """`value` read (or written) as a `kind` by an instruction whose default is `dtype`."""
        dims = dims_of(value, kind, extent)
        start = extent.start * extent.reals * value.stride
        offset = value.place + (start if value.kind in ("full", "row") else 0)
        count = math.prod(size for _, size in dims)
        plain = len(dims) == 1 and (dims[0][0] == 1 or count == 1) and not offset
        if plain and value.dtype == dtype:
            return refs(value)
        if count == 1:
            dims = ((1, 1),)
        return refs(value).view(value.dtype, *dims, offset=offset)

    def small(self, value: Value, refs: Refs, extent: Extent) -> TileRef:
        """`value` as a per-partition scalar."""
        return self.at(value, refs, "one", extent, FP32)

    def _common(self, step: Step, extent: Extent, ins: Sequence[Value]) -> dict[str, Any]:
        out = step.outs[0]
        source = _widest([v.dtype for v in ins]) if ins else out.dtype
        given: dict[str, Any] = {
            "n": extent.free(out.kind), "dtype": source, "partitions": extent.parts
        }  # fmt: skip
        if out.dtype != source:
            given["out_dtype"] = out.dtype
        return given

    def _out(self, step: Step, refs: Refs, extent: Extent, given: dict[str, Any]) -> TileRef:
        out = step.outs[0]
        return self.at(out, refs, out.kind, extent, given.get("out_dtype") or given["dtype"])

    def _streams(
        self, values: Sequence[Value], step: Step, refs: Refs, extent: Extent, given: dict[str, Any]
    ) -> list[TileRef]:
        kind = step.outs[0].kind
        return [self.at(v, refs, kind, extent, given["dtype"]) for v in values]

    def _scalar_like(self, value: Value, kind: str, extent: Extent) -> bool:
        """Whether `value` is one number for each partition beside streams of `kind`."""
        if value.kind == "one":
            return kind != "one"
        return value.kind == "col" and kind == "full" and extent.group == 1

    # -- arithmetic ----------------------------------------------------------------------------
    def _act(self, step: Step, refs: Refs, extent: Extent) -> None:
        x, *tiles = step.ins
        out = step.outs[0]
        if not all(self._free(v, out.kind, extent) for v in tiles):
            # Scale and bias belong to a partition; several rows in one take passes of their own.
            self._in_passes(step, refs, extent, ("multiply", "add"), 1.0, 0.0)
            return
        given = self._common(step, extent, [x])
        srcs = [*self._streams([x], step, refs, extent, given),
                *(self.small(v, refs, extent) for v in tiles)]  # fmt: skip
        scale, bias = step.operands or (1.0, 0.0)
        self.b.activation(
            self._out(step, refs, extent, given), srcs, op=step.op, scale=scale, bias=bias, **given
        )

    def _free(self, value: Value, kind: str, extent: Extent) -> bool:
        """Whether an instruction takes `value` as its scalar operand."""
        return (
            self._scalar_like(value, kind, extent)
            or value.kind == kind == "one"
            or (value.kind == kind == "col" and extent.group == 1)
        )

    def _in_passes(
        self, step: Step, refs: Refs, extent: Extent, ops: Sequence[str], *neutral: float
    ) -> None:
        """`function(x op0 a op1 b)` with a tensor_tensor for each operand that is a tile."""
        x, out, tiles = step.ins[0], step.outs[0], iter(step.ins[1:])
        function = step.op if step.kind == "act" else "copy"
        stages: list[tuple[str, Value | Scalar]] = []
        for number, value in enumerate(step.operands):
            source = next(tiles) if value is None else value
            if value is None or not neutral or value != neutral[number]:
                stages.append((ops[number], source))
        last = len(stages) - (function in ("copy", "identity"))
        wide = replace_value(out, FP32)
        for number, (op, source) in enumerate(stages):
            target, place = (out, refs) if number == last else (wide, self._wide(out, refs))
            stage: Step
            if isinstance(source, Value):
                stage = Step("tensor", op, (x, source), (target,))
                self._tensor(stage, _joined(refs, self._wide(out, refs), wide), extent)
            else:
                stage = Step("scalar", op, (x,), (target,), (source,))
                self._scalar(stage, _joined(refs, self._wide(out, refs), wide), extent)
            x = target
        if last == len(stages):
            final = Step("act", function, (x,), (out,), (1.0, 0.0))
            self._act(final, _joined(refs, self._wide(out, refs), wide), extent)

    def _wide(self, out: Value, refs: Refs) -> Refs:
        """Where fp32 results wait: in the result's own tile, if that is wide enough."""
        wide = out.dtype.itemsize >= 4
        return (lambda _: refs(out)) if wide else (lambda _: self.scratch("wide"))

    def _act_reduce(self, step: Step, refs: Refs, extent: Extent) -> None:
        full, total = step.outs
        for number, part in enumerate(extent.parts_of()):
            place = refs if number == 0 else _elsewhere(refs, total, self.scratch("rest"))
            if part.group > 1:
                plain = replace_step(step, "act", (full,))
                self._act(plain, place, part)
                self._reduce(Step("reduce", "add", (full,), (total,)), place, part)
                continue
            x, *tiles = step.ins
            given = self._common(step, part, [x])
            srcs = [*self._streams([x], step, place, part, given),
                    *(self.small(v, place, part) for v in tiles)]  # fmt: skip
            scale, bias = step.operands or (1.0, 0.0)
            self.b.activation(
                self._out(step, place, part, given), srcs, op=step.op, scale=scale, bias=bias,
                reduce=self.at(total, place, "col", part, FP32), **given,
            )  # fmt: skip
            if number:
                self._join(total, "add", refs, part)

    def _join(self, total: Value, op: str, refs: Refs, part: Extent) -> None:
        """Combine what the rest of an uneven tile gave with what its even part gave."""
        place = self.at(total, refs, "col", part, FP32)
        other = self.at(total, lambda _: self.scratch("rest"), "col", part, FP32)
        self.b.tensor_tensor(place, place, other, op=op, n=1, partitions=part.parts)

    def _scalar(self, step: Step, refs: Refs, extent: Extent) -> None:
        x, *tiles = step.ins
        out = step.outs[0]
        ops = step.op.split(",")
        if not all(self._free(v, out.kind, extent) for v in tiles):
            self._in_passes(step, refs, extent, ops)
            return
        given = self._common(step, extent, [x])
        given |= self._engine(ops, [x, *tiles], step.operands, out)
        srcs = [*self._streams([x], step, refs, extent, given),
                *(self.small(v, refs, extent) for v in tiles)]  # fmt: skip
        self.b.tensor_scalar(
            self._out(step, refs, extent, given), srcs, op=step.op, operands=step.operands, **given
        )

    def _engine(
        self, ops: Sequence[str], ins: Sequence[Value], numbers: Sequence[Scalar | None], out: Value
    ) -> dict[str, Any]:
        """GpSimdE where whole numbers must stay exact."""
        whole = all(v.is_integer or v.dtype == torch.bool for v in ins)
        whole = whole and any(v.is_integer for v in ins) and set(ops) <= _WHOLE
        if whole and not any(isinstance(n, float) for n in numbers):
            return {"engine": Engine.GPSIMD}
        return {}

    def _tensor(self, step: Step, refs: Refs, extent: Extent) -> None:
        x, y = step.ins
        out = step.outs[0]
        if self._scalar_like(y, out.kind, extent) and not self._scalar_like(x, out.kind, extent):
            self._scalar(Step("scalar", step.op, (x, y), (out,), (None,)), refs, extent)
            return
        mirrored = MIRROR.get(step.op)
        if mirrored and self._scalar_like(x, out.kind, extent) and x.kind != y.kind:
            self._scalar(Step("scalar", mirrored, (y, x), (out,), (None,)), refs, extent)
            return
        given = self._common(step, extent, [x, y])
        given |= self._engine([step.op], [x, y], (), out)
        srcs = self._streams([x, y], step, refs, extent, given)
        self.b.tensor_tensor(self._out(step, refs, extent, given), *srcs, op=step.op, **given)

    def _stt(self, step: Step, refs: Refs, extent: Extent) -> None:
        x, y, *tiles = step.ins
        out = step.outs[0]
        first, second = step.op.split(",")
        if not all(self._free(v, out.kind, extent) for v in tiles):
            wide = Value(out.tile, out.kind, FP32)
            kept = refs(out) == refs(y) and y.kind == "full"
            where = (lambda _: self.scratch("wide")) if kept else self._wide(out, refs)
            places = _joined(refs, where, wide)
            self._tensor(Step("tensor", first, (x, tiles[0]), (wide,)), places, extent)
            self._tensor(Step("tensor", second, (wide, y), (out,)), places, extent)
            return
        if self._scalar_like(y, out.kind, extent) and x.kind == out.kind:
            scalar = Step("scalar", step.op, (x, *tiles, y), (out,), (*step.operands, None))
            self._scalar(scalar, refs, extent)
            return
        given = self._common(step, extent, [x, y])
        left, right = self._streams([x, y], step, refs, extent, given)
        self.b.scalar_tensor_tensor(
            self._out(step, refs, extent, given),
            [left, *(self.small(v, refs, extent) for v in tiles)],
            right, op=step.op, scalar=step.operands[0], **given,
        )  # fmt: skip

    def _reciprocal(self, step: Step, refs: Refs, extent: Extent) -> None:
        given = self._common(step, extent, step.ins)
        (source,) = self._streams(step.ins, step, refs, extent, given)
        self.b.reciprocal(self._out(step, refs, extent, given), source, **given)

    def _copy(self, step: Step, refs: Refs, extent: Extent) -> None:
        given = self._common(step, extent, step.ins)
        (source,) = self._streams(step.ins, step, refs, extent, given)
        self.b.tensor_copy(self._out(step, refs, extent, given), source, **given)

    def _custom(self, step: Step, refs: Refs, extent: Extent) -> None:
        given = self._common(step, extent, step.ins)
        sources = self._streams(step.ins, step, refs, extent, given)
        self.b.custom_op(
            self._out(step, refs, extent, given), sources, op=step.op,
            cycles_each=step.cycles_each, operands=step.operands, **given,
        )  # fmt: skip

    def _select(self, step: Step, refs: Refs, extent: Extent) -> None:
        mask, *data = step.ins
        given = self._common(step, extent, data)
        tiles = iter(self._streams(data, step, refs, extent, given))
        n = given["n"]
        sides = []
        for value in step.operands:
            if value is None:
                sides.append(next(tiles))
            else:
                held = self.scratch(constant_name(value, step))
                sides.append(held.view(constant_dtype(value, step), (0 if n > 1 else 1, n)))
        predicate = self.at(mask, refs, step.outs[0].kind, extent, given["dtype"])
        self.b.select(self._out(step, refs, extent, given), predicate, *sides, **given)

    # -- folds ---------------------------------------------------------------------------------
    def _reduce(self, step: Step, refs: Refs, extent: Extent) -> None:
        x, out = step.ins[0], step.outs[0]
        for number, part in enumerate(extent.parts_of()):
            place = refs if number == 0 else _elsewhere(refs, out, self.scratch("rest"))
            given = self._common(step, part, [x])
            given["n"] = part.free("full")
            if x.is_integer and step.op != "divide":
                given["engine"] = Engine.GPSIMD
            source = self.at(x, place, "full", part, given["dtype"])
            target = self.at(out, place, "col", part, given.get("out_dtype") or given["dtype"])
            self.b.tensor_reduce(target, source, op=step.op, out_n=part.group, **given)
            if number:
                self._join(out, step.op, refs, part)

    def _stats(self, step: Step, refs: Refs, extent: Extent) -> None:
        x, (mean, var) = step.ins[0], step.outs
        if extent.group > 1:
            self._grouped_stats(x, mean, var, refs, extent)
            return
        partial = self.scratch("stats")
        if len(extent.parts_of()) > 1:
            # Counts of 0 leave no trace in the aggregate.
            count = BN_STATS_RESULTS * sum(
                ceil_div(part.width, BN_STATS_MAX) for part in extent.parts_of()
            )
            self.b.memset(partial, n=count, partitions=extent.parts)
        done = self.partial_stats(x, refs, extent, partial)
        self.b.bn_aggr(refs(mean), partial, n=BN_STATS_RESULTS * done, partitions=extent.parts)

    def partial_stats(
        self, x: Value, refs: Refs, extent: Extent, target: TileRef, first: Index = 0
    ) -> int:
        """bn_stats of a tile, 512 columns at a time, from the `first` result of `target` on."""
        done = 0
        for part in extent.parts_of():
            for start in range(0, part.width, BN_STATS_MAX):
                size = min(BN_STATS_MAX, part.width - start)
                piece = replace(part, width=size, start=part.start + start)
                offset = affine(first) + BN_STATS_RESULTS * done
                place = target.view(FP32, (1, BN_STATS_RESULTS), offset=offset)
                given: dict[str, Any] = {"partitions": part.parts, "dtype": x.dtype}
                if x.dtype != FP32:
                    given["out_dtype"] = FP32
                source = self.at(x, refs, "full", piece, x.dtype)
                self.b.bn_stats(place, source, n=size, **given)
                done += 1
        return done

    def _grouped_stats(self, x: Value, mean: Value, var: Value, refs: Refs, extent: Extent) -> None:
        """Several short rows in a partition: deviations from their means, squared and summed."""
        rows, count = extent.group, 1.0 / extent.width
        given: dict[str, Any] = {"partitions": extent.parts, "n": rows}
        self._reduce(Step("reduce", "add", (x,), (mean,)), refs, extent)
        small, spread = (self.at(value, refs, "col", extent, FP32) for value in (mean, var))
        if extent.width >= BY_ROW:
            # ScalarE takes a row at a time: its bias belongs to a partition.
            self.b.tensor_scalar(small, small, op="multiply", operands=(-count,), **given)
            self._squares_by_row(x, mean, var, refs, extent)
            self.b.tensor_scalar(small, small, op="multiply", operands=(-1.0,), **given)
        else:
            self.b.tensor_scalar(small, small, op="multiply", operands=(count,), **given)
            wide = Value(x.tile, "full", FP32)
            places = _joined(refs, lambda _: self.scratch("square"), wide)
            self._tensor(Step("tensor", "subtract", (x, mean), (wide,)), places, extent)
            self._act(Step("act", "square", (wide,), (wide,), (1.0, 0.0)), places, extent)
            self._reduce(Step("reduce", "add", (wide,), (var,)), places, extent)
        self.b.tensor_scalar(spread, spread, op="multiply", operands=(count,), **given)

    def _squares_by_row(self, x: Value, low: Value, var: Value, refs: Refs, extent: Extent) -> None:
        """Sums of (x + low)^2, an activation for each of the rows that share a partition."""
        given: dict[str, Any] = {"n": extent.width, "dtype": x.dtype, "partitions": extent.parts}
        if x.dtype != FP32:
            given["out_dtype"] = FP32
        for row in range(extent.group):
            line = replace(extent, group=1, start=row * extent.width)
            source = self.at(x, refs, "full", line, x.dtype)
            bias, total = (
                refs(v).view(FP32, (1, 1), offset=v.place + row * v.stride) for v in (low, var)
            )
            self.b.activation(self.scratch("square"), [source, bias], op="square", scale=1.0,
                              bias=None, reduce=total, **given)  # fmt: skip

    def _fold_groups(self, step: Step, refs: Refs, extent: Extent) -> None:
        """Average a col value over groups of partitions: a matmul by a block-diagonal matrix."""
        across = self.scratch("across")
        x = step.ins[0]
        rows = step.operands[0]
        self.b.nc_matmul(
            across, stationary=self.scratch(f"blocks {rows}"),
            moving=self.at(x, refs, "col", extent, FP32), k=extent.parts, m=extent.parts,
            n=extent.group, dtype=FP32,
        )  # fmt: skip
        target = self.at(step.outs[0], refs, "col", extent, FP32)
        self.b.tensor_copy(target, across, n=extent.group, partitions=extent.parts)

    def _scan(self, step: Step, refs: Refs, extent: Extent) -> None:
        self.scan(step, refs, extent)

    def scan(self, step: Step, refs: Refs, extent: Extent, carry: TileRef | None = None) -> None:
        """A running fold along each row, from the neutral element or the one in `carry`."""
        given = self._common(step, extent, step.ins)
        given["n"] = extent.width
        for row in range(extent.group):
            line = replace(extent, group=1, start=row * extent.width)
            (x,) = self._streams(step.ins, step, refs, line, given)
            first = [x] if carry is None else [x, carry]
            initial = NEUTRAL[step.op] if carry is None else None
            target = self._out(step, refs, line, given)
            self.b.tensor_tensor_scan(target, first, x, op=step.op, initial=initial, **given)

    # -- made from nothing ---------------------------------------------------------------------
    def _memset(self, step: Step, refs: Refs, extent: Extent) -> None:
        given = self._common(step, extent, ())
        (value,) = step.operands
        assert value is not None
        self.b.memset(self._out(step, refs, extent, given), value=value, **given)

    def _index(self, step: Step, kind: str, extent: Extent) -> dict[str, Any]:
        """The index of an iota or affine_select: affine in partition, row and column."""
        base, row, col = step.index
        steps = {
            "full": ((row, extent.group), (col, extent.width)), "row": ((col, extent.width),),
            "col": ((row, extent.group),), "one": ((0, 1),),
        }[kind]  # fmt: skip
        at_row, at_col, row_step, col_step = extent.place
        first = affine(at_row) * row + (affine(at_col) + extent.start) * col + base
        moves = kind in ("full", "col")
        return {"base": first, "channel": row * row_step * moves + col * col_step, "steps": steps}

    def _iota(self, step: Step, refs: Refs, extent: Extent) -> None:
        given = self._common(step, extent, ())
        target = self._out(step, refs, extent, given)
        self.b.iota(target, **given, **self._index(step, step.outs[0].kind, extent))

    def _affine(self, step: Step, refs: Refs, extent: Extent) -> None:
        given = self._common(step, extent, step.ins)
        (source,) = self._streams(step.ins, step, refs, extent, given)
        (fill,) = step.operands
        assert fill is not None
        self.b.affine_select(self._out(step, refs, extent, given), source, op=step.op, fill=fill,
                             **given, **self._index(step, "full", extent))  # fmt: skip

    def _random(self, step: Step, refs: Refs, extent: Extent) -> None:
        out = step.outs[0]
        n = extent.free(out.kind)
        given: dict[str, Any] = {"n": n, "partitions": extent.parts}
        bits = refs(out).view(torch.uint32, (1, n))
        self.b.rng(bits, dtype=torch.uint32, **given)
        if out.dtype.is_floating_point:
            # Scaled to [0, 1): the largest words would round up to 1.
            self.b.tensor_scalar(
                refs(out), bits, op="multiply,min", operands=(2.0**-32, 1.0 - 2.0**-24),
                dtype=torch.uint32, out_dtype=out.dtype, **given,
            )  # fmt: skip


def constant_dtype(value: Scalar, step: Step) -> torch.dtype:
    """What a number of a select is held in."""
    whole = isinstance(value, int) and step.outs[0].is_integer
    return torch.int64 if whole else FP32


def constant_name(value: Scalar, step: Step) -> str:
    """The scratch tile that holds a number of a select."""
    short = str(constant_dtype(value, step)).removeprefix("torch.")
    return f"constant {value} {short}"


def replace_value(value: Value, dtype: torch.dtype) -> Value:
    """A value like `value` in another dtype (itself, if it has that)."""
    return value if value.dtype == dtype else Value(value.tile, value.kind, dtype)


def replace_step(step: Step, kind: str, outs: tuple[Value, ...]) -> Step:
    """`step` as another kind, with fewer results."""
    return Step(kind, step.op, step.ins, outs, step.operands, step.index, step.cycles_each)


def _joined(refs: Refs, places: Refs, value: Value) -> Refs:
    """`refs`, but `value` lies where `places` says."""
    return lambda v: places(v) if v is value else refs(v)


def _elsewhere(refs: Refs, value: Value, place: TileRef) -> Refs:
    return lambda v: place if v is value else refs(v)


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return max(dtypes, key=lambda dtype: (dtype.itemsize, dtype.is_floating_point))
