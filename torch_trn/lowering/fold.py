"""Emits the steps that look along a row: reductions, statistics, scans, shifts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from torch_trn.isa import Engine
from torch_trn.lowering.extent import Extent, Refs, as_kind, elsewhere
from torch_trn.lowering.layout import ceil_div
from torch_trn.lowering.tile import FP32, Step, Value
from torch_trn.memory import Index, TileRef, affine
from torch_trn.program import Builder

#: bn_stats takes at most this many elements and leaves this many results (hardware.md 2.2; isa).
BN_STATS_MAX = 512
BN_STATS_RESULTS = 6

#: Width from which rows that share a partition are squared one by one (cheaper on ScalarE).
BY_ROW = 64

#: What an accumulator starts from.
NEUTRAL = {"add": 0.0, "multiply": 1.0, "max": -math.inf, "min": math.inf}


class FoldSteps:
    """Methods of the Emitter, one for each step kind that looks along a row."""

    b: Builder

    def scratch(self, name: str) -> TileRef:
        """A tile for what a step needs beside its values."""
        raise NotImplementedError

    def at(
        self, value: Value, refs: Refs, kind: str, extent: Extent, dtype: torch.dtype
    ) -> TileRef:
        """See Emitter."""
        raise NotImplementedError

    def small(self, value: Value, refs: Refs, extent: Extent) -> TileRef:
        """See Emitter."""
        raise NotImplementedError

    def _common(self, step: Step, extent: Extent, ins: Sequence[Value]) -> dict[str, Any]:
        raise NotImplementedError

    def _out(self, step: Step, refs: Refs, extent: Extent, given: dict[str, Any]) -> TileRef:
        raise NotImplementedError

    def _streams(
        self, values: Sequence[Value], step: Step, refs: Refs, extent: Extent, given: dict[str, Any]
    ) -> list[TileRef]:
        raise NotImplementedError

    def _act(self, step: Step, refs: Refs, extent: Extent) -> None:
        raise NotImplementedError

    def _tensor(self, step: Step, refs: Refs, extent: Extent) -> None:
        raise NotImplementedError

    def _act_reduce(self, step: Step, refs: Refs, extent: Extent) -> None:
        full, total = step.outs
        for number, part in enumerate(extent.parts_of()):
            place = refs if number == 0 else elsewhere(refs, lambda _: self.scratch("rest"), total)
            if part.group > 1:
                plain = as_kind(step, "act", (full,))
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

    def _reduce(self, step: Step, refs: Refs, extent: Extent) -> None:
        x, out = step.ins[0], step.outs[0]
        for number, part in enumerate(extent.parts_of()):
            place = refs if number == 0 else elsewhere(refs, lambda _: self.scratch("rest"), out)
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
            places = elsewhere(refs, lambda _: self.scratch("square"), wide)
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
        start = NEUTRAL[step.op] if step.op in NEUTRAL else 0.0
        for row in range(extent.group):
            line = replace(extent, group=1, start=row * extent.width)
            sources = self._streams(step.ins, step, refs, line, given)
            first = [sources[0]] if carry is None else [sources[0], carry]
            self.b.tensor_tensor_scan(
                self._out(step, refs, line, given), first, sources[-1], op=step.op,
                initial=start if carry is None else None, **given,
            )  # fmt: skip

    def _shift(self, step: Step, refs: Refs, extent: Extent) -> None:
        self.shift(step, refs, extent)

    def shift(self, step: Step, refs: Refs, extent: Extent, carry: TileRef | None = None) -> None:
        """Each row one column on, behind a number or what is in `carry`."""
        x, out = step.ins[0], step.outs[0]
        (first,) = step.operands
        given: dict[str, Any] = {"partitions": extent.parts, "dtype": x.dtype}
        for row in range(extent.group):
            start = row * extent.width
            line = replace(extent, group=1, start=start, width=extent.width - 1)
            one = self.at(out, refs, "full", replace(line, width=1), out.dtype)
            if extent.width > 1:
                target = self.at(out, refs, "full", replace(line, start=start + 1), out.dtype)
                source = self.at(x, refs, "full", line, x.dtype)
                self.b.tensor_copy(target, source, n=line.width, engine=Engine.SCALAR, **given)
            if carry is None:
                assert first is not None
                self.b.memset(one, n=1, value=first, **given)
            else:
                self.b.tensor_copy(one, carry, n=1, **given)
