"""Rows longer than SBUF: a pass over the row's chunks for each reduction that later steps need.

A pass reloads its operands from HBM and repeats the elementwise steps it needs; folds of the chunks
are combined in col accumulators. A softmax's maximum and sum of exponentials share one pass: each
chunk goes by its own maximum, and the sums are rescaled when all maxima are known. Statistics of
all chunks are aggregated at the end; a scan goes on from the last column of the chunk before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from torch_trn.lowering.extent import Extent, elsewhere
from torch_trn.lowering.fold import BN_STATS_MAX, BN_STATS_RESULTS, NEUTRAL
from torch_trn.lowering.kernel import Geometry
from torch_trn.lowering.layout import Grid, Operand, ceil_div
from torch_trn.lowering.pools import passes, stage_of
from torch_trn.lowering.tile import FP32, MAX_FLOAT, REDUCING, Output, Step, Value
from torch_trn.memory import Index, Pool, TileRef, affine

if TYPE_CHECKING:
    from torch_trn.lowering.run import Runner


class Chunked:
    """The loops of one grid whose rows come in chunks."""

    def __init__(self, runner: Runner, grid: Grid, geometry: Geometry) -> None:
        self.runner = runner
        self.kernel = runner.kernel
        self.grid = grid
        self.geometry = geometry
        self.online = {id(step): steps for steps in self.kernel.online for step in steps}
        self.phase = passes(self.kernel)
        self.passes = max([*self.phase.values(), 0]) + 1
        self.chunks = sum(trips for trips, _, _ in geometry.col_segments())
        self.at: Index = 0
        self.stats_at: Index = 0
        self.partials: dict[int, Pool] = {}
        self.carries: dict[int, Pool] = {}
        for number, step in enumerate(self.kernel.steps):
            if step.kind == "stats":
                count = BN_STATS_RESULTS * self._stats_count()
                self.partials[id(step)] = self._scratch(f"stats{number}", 4 * count, 1)
                continue
            if step.kind in ("scan", "shift"):
                self.carries[id(step)] = self._scratch(f"carry{number}", 8, 1)
            for value in step.outs if step.kind in REDUCING else ():
                if value.kind == "col":
                    slots = 4 if id(step) not in self.online else self.chunks
                    self.partials[id(value)] = self._scratch(
                        f"partial{len(self.partials)}", 8, slots
                    )
        if self.kernel.online:
            self.lows = self._scratch("lows", 4, self.chunks)
            self.all_lows, self.all_sums, self.scales = (
                self._scratch(name, 4 * self.chunks, 1)
                for name in ("all_lows", "all_sums", "scales")
            )

    def _stats_count(self) -> int:
        """bn_stats results of a whole row (two of a chunk whose last partition is short)."""
        return sum(
            trips * (ceil_div(width, BN_STATS_MAX) + (short is not None))
            for trips, width, short in self.geometry.col_segments()
        )

    def _scratch(self, name: str, free_bytes: int, slots: int) -> Pool:
        """A small pool, shared with earlier grids of the same Program where it is large enough."""
        kept = self.runner.scratches.get(name)
        if kept is None or kept.nbytes < free_bytes or kept.slots < slots:
            kept = self.runner.b.sbuf(name, free_bytes=free_bytes, slots=slots)
            self.runner.scratches[name] = kept
        return kept

    def run(self) -> None:
        """Emit all row tiles."""
        from torch_trn.lowering.run import loop

        runner, geometry = self.runner, self.geometry
        if runner.sums.rows and not runner.sums.start_chunks(geometry, self.chunks):
            runner.sums.clear_rows(geometry)
        done, row = 0, 0
        for trips, parts, _ in geometry.row_segments():
            with loop(runner.b, trips, "r") as r:
                tile = affine(r) + done
                first = tile if geometry.spread else affine(r) * parts + row
                self._row(tile, parts, first)
            done += trips
            row += trips * parts
        runner.sums.finish_chunks(geometry)

    def _row(self, tile: Index, parts: int, row: Index) -> None:
        runner, kernel = self.runner, self.kernel
        runner.index["col"] = tile
        self.row = row
        small = self.geometry.extent(parts, 1, 1, kernel.reals, row)
        for value, operand, source in zip(
            kernel.ins, self._in_operands(), runner.sources, strict=True
        ):
            if value.kind == "col":
                runner.load(value, operand, source, small, self.geometry)
        self._columns_only(0, small)
        for number in range(self.passes):
            needed = self._needed(number)
            if needed:
                self._pass(number, needed, tile, parts)
            self._finish(number, small)
            self._columns_only(number + 1, small)
        for output in kernel.outputs:
            operand = self.grid.operands[output.index]
            if output.mode == "store" and operand.kind == "col":
                runner.store(output, operand, small, self.geometry)
            elif output.mode == "total" and output.value.kind != "full":
                runner.sums.add_total(output, small)

    def _in_operands(self) -> Sequence[Operand]:
        return self.grid.operands[len(self.kernel.out_operands) :]

    def _full_outputs(self, number: int) -> list[Output]:
        return [
            output
            for output in self.kernel.outputs
            if output.value.kind == "full" and self.phase.get(id(output.value.root), 0) == number
        ]

    def _needed(self, number: int) -> set[int]:
        """ids of the values that pass `number` computes or loads, chunk by chunk."""
        wanted: list[Value] = [output.value for output in self._full_outputs(number)]
        for step in self.kernel.steps:
            if self._folds(step, number):
                wanted.extend(step.ins)
        found: set[int] = set()
        while wanted:
            value = wanted.pop().root
            if value.kind in ("col", "one") or id(value) in found:
                continue
            found.add(id(value))
            if value.step is not None:
                wanted.extend(value.step.ins)
        return found

    def _folds(self, step: Step, number: int) -> bool:
        """Whether pass `number` folds the chunks of this reducing step."""
        together = self.online.get(id(step))
        if together is not None:
            return step is together[0] and self.phase[id(step.outs[0])] == number + 1
        cols = [v for v in step.outs if v.kind == "col"]
        return step.kind in REDUCING and self.phase[id(cols[0])] == number + 1

    def _pass(self, number: int, needed: set[int], tile: Index, parts: int) -> None:
        from torch_trn.lowering.run import loop

        runner, done, col = self.runner, 0, 0
        self.stats_at = 0
        for trips, width, short in self.geometry.col_segments():
            each = ceil_div(width, BN_STATS_MAX) + (short is not None)
            with loop(runner.b, trips, "c") as c:
                self.at = affine(c) + done
                index = affine(tile) * (self.chunks * self.passes)
                index = index + self.at + number * self.chunks
                runner.index["full"] = runner.index["row"] = index
                extent = self.geometry.extent(
                    parts, 1, width, self.kernel.reals, self.row, affine(c) * width + col, short
                )
                before = self.stats_at
                self.stats_at = affine(c) * (each * BN_STATS_RESULTS) + before
                self._chunk(number, needed, extent, tile)
                self.stats_at = before
            done += trips
            col += trips * width
            self.stats_at = affine(self.stats_at) + trips * each * BN_STATS_RESULTS

    def _chunk(self, number: int, needed: set[int], extent: Extent, tile: Index) -> None:
        runner, kernel = self.runner, self.kernel
        for value, operand, source in zip(
            kernel.ins, self._in_operands(), runner.sources, strict=True
        ):
            if id(value) in needed and value.kind != "col":
                runner.load(value, operand, source, extent, self.geometry)
        for step in kernel.steps:
            if self._folds(step, number):
                self._fold(step, extent)
            elif stage_of(step) != "once" and any(id(v) in needed for v in step.outs):
                if step.kind in ("scan", "shift"):
                    self._carried(step, extent)
                    continue
                if step.kind in REDUCING:
                    # Its fold is known already; only the elementwise part is repeated.
                    step = Step("act", step.op, step.ins, step.outs[:1], step.operands)
                runner.emitter.step(step, runner.ref, extent)
        self._outputs(number, extent, tile)

    def _outputs(self, number: int, extent: Extent, tile: Index) -> None:
        """What one chunk gives to the results."""
        runner = self.runner
        for output in self._full_outputs(number):
            if output.mode == "store":
                operand = self.grid.operands[output.index]
                runner.store(output, operand, extent, self.geometry)
            elif output.mode == "rowsum":
                runner.sums.add_chunk(output, extent, self.at, tile, self.geometry)
            else:
                runner.sums.add_total(output, extent)

    def _carried(self, step: Step, extent: Extent) -> None:
        """One chunk of a scan or shift, from the last column of the chunk before."""
        runner, carry = self.runner, self.carries[id(step)]
        kept = step.outs[0] if step.kind == "scan" else step.ins[0]
        dtype = kept.dtype
        first = carry[0] if dtype == FP32 else carry[0].view(dtype, (1, 1))
        emit = runner.emitter.scan if step.kind == "scan" else runner.emitter.shift
        emit(step, runner.ref, extent, first)
        last = replace(extent, width=1, start=extent.width - 1)
        source = runner.emitter.at(kept, runner.ref, "full", last, dtype)
        runner.b.tensor_copy(first, source, n=1, partitions=extent.parts, dtype=dtype)

    def _fold(self, step: Step, extent: Extent) -> None:
        """Fold one chunk and combine it with the chunks before."""
        runner = self.runner
        together = self.online.get(id(step))
        if together is not None:
            self._fold_online(together, extent)
            return
        if step.kind == "stats":
            target = self.partials[id(step)]
            runner.emitter.partial_stats(step.ins[0], runner.ref, extent, target[0], self.stats_at)
            return
        runner.emitter.step(step, self._partial, extent)
        op = step.op if step.kind == "reduce" else "add"
        for value in step.outs:
            if value.kind == "col":
                self._join(value, op, replace(extent, parts=extent.folded, short=None))

    def _join(self, value: Value, op: str, extent: Extent) -> None:
        """Combine one chunk's fold with that of the chunks before."""
        other = _like(value)
        refs = elsewhere(self.runner.ref, lambda _: self._partial(value), other)
        self.runner.emitter.step(Step("tensor", op, (value, other), (value,)), refs, extent)

    def _fold_online(self, steps: list[Step], extent: Extent) -> None:
        """Each chunk by its own maximum, so that no chunk waits for the one before."""
        runner, b = self.runner, self.runner.b
        low, total = steps[-2].outs[0], steps[-1].outs[1]
        lows = self.lows[self.at]
        made = {id(v) for step in steps[1:-1] for v in step.outs}

        def refs(value: Value) -> TileRef:
            return lows if id(value) in made else self._partial(value)

        if extent.short == 0:
            # The last partition has no columns here: nothing to add, at any maximum.
            b.memset(lows, n=1, value=MAX_FLOAT, partitions=extent.parts)
            b.memset(self._partial(total), n=1, partitions=extent.parts)
        folded = replace(extent, parts=extent.folded, short=None)
        for step in steps:
            whole = step.kind in REDUCING
            runner.emitter.step(step, refs, extent if whole else folded)
        assert id(total) in self.partials and id(low) in made

    def _combine_online(self, steps: list[Step], parts: int) -> None:
        """low = min over chunks, sum = sum of chunk sums x exp(low - chunk's low)."""
        runner, b, n = self.runner, self.runner.b, self.chunks
        low, total = runner.ref(steps[-2].outs[0]), runner.ref(steps[-1].outs[1])
        for together, single in (
            (self.all_lows, self.lows),
            (self.all_sums, self.partials[id(steps[-1].outs[1])]),
        ):
            for at in range(n):
                b.tensor_copy(together[0].view(FP32, (1, 1), offset=at), single[at], n=1,
                              partitions=parts)  # fmt: skip
        b.tensor_reduce(low, self.all_lows, op="min", n=n, partitions=parts)
        self._rescale(low, total, parts)

    def _rescale(self, low: TileRef, total: TileRef, parts: int) -> None:
        b, n = self.runner.b, self.chunks
        b.activation(self.scales, [self.all_lows, low], op="exp", n=n, scale=-1.0, bias=None,
                     partitions=parts)  # fmt: skip
        b.tensor_tensor(
            self.scales, self.scales, self.all_sums, op="multiply", n=n, partitions=parts
        )
        b.tensor_reduce(total, self.scales, op="add", n=n, partitions=parts)

    def _partial(self, value: Value) -> TileRef:
        pool = self.partials.get(id(value))
        return pool[self.at] if pool is not None else self.runner.ref(value)

    def _finish(self, number: int, small: Extent) -> None:
        """After a pass: what its chunks gave is combined, spread rows are folded across."""
        for step in self.kernel.steps:
            if not self._folds(step, number):
                continue
            together = self.online.get(id(step))
            if together is not None:
                self._combine_online(together, small.parts)
                if self.geometry.spread:
                    self._spread_online(together, small.parts)
                continue
            if step.kind == "stats":
                mean = step.outs[0]
                self.runner.b.bn_aggr(
                    self.runner.ref(mean), self.partials[id(step)],
                    n=BN_STATS_RESULTS * self._stats_count(), partitions=small.parts,
                )  # fmt: skip
            if self.geometry.spread:
                self.runner.finish_spread(step, small.parts, self.geometry)

    def _spread_online(self, steps: list[Step], parts: int) -> None:
        """One maximum for all partitions, and each one's sum by it."""
        runner, b = self.runner, self.runner.b
        low, total = runner.ref(steps[-2].outs[0]), runner.ref(steps[-1].outs[1])
        own = self.all_lows
        b.tensor_copy(own, low, n=1, partitions=parts)
        runner.sums.across(low, FP32, "min", parts, everywhere=True)
        b.activation(self.scales, [own, low], op="exp", n=1, scale=-1.0, bias=None,
                     partitions=parts)  # fmt: skip
        b.tensor_tensor(total, total, self.scales, op="multiply", n=1, partitions=parts)
        runner.sums.across(total, FP32, "add", parts, everywhere=True)

    def _columns_only(self, number: int, small: Extent) -> None:
        """Steps on col values that become known before pass `number`, and accumulators to clear."""
        runner = self.runner
        for step in self.kernel.steps:
            if self._folds(step, number):
                if id(step) in self.online:
                    continue
                self._clear(step, small)
            elif step.kind in ("scan", "shift") and self.phase[id(step.outs[0])] == number:
                self._clear_carry(step, small)
            elif (
                all(v.kind == "col" for v in step.outs)
                and step.kind not in REDUCING
                and id(step) not in self.online
                and stage_of(step) == "tile"
                and self.phase[id(step.outs[0])] == number
            ):
                runner.emitter.step(step, runner.ref, small)

    def _clear(self, step: Step, small: Extent) -> None:
        """Accumulators of one step, as they are before the first chunk."""
        runner = self.runner
        if step.kind == "stats":
            if self.geometry.last:
                # Counts of 0 leave no trace where the last partition has no columns.
                count = BN_STATS_RESULTS * self._stats_count()
                runner.b.memset(self.partials[id(step)], n=count, partitions=small.parts)
            return
        for value in step.outs:
            if value.kind == "col":
                op = step.op if step.kind == "reduce" else "add"
                self._clear_value(value, op, runner.ref(value), small)

    def _clear_carry(self, step: Step, small: Extent) -> None:
        carry = self.carries[id(step)][0]
        if step.kind == "scan":
            op = step.op if step.op in NEUTRAL else "add"
            self._clear_value(step.outs[0], op, carry, small)
            return
        (first,) = step.operands
        assert first is not None
        dtype = step.ins[0].dtype
        place = carry if dtype == FP32 else carry.view(dtype, (1, 1))
        self.runner.b.memset(place, n=1, value=first, dtype=dtype, partitions=small.parts)

    def _clear_value(self, value: Value, op: str, ref: TileRef, small: Extent) -> None:
        dtype = value.dtype
        start: float | int = NEUTRAL[op]
        if not dtype.is_floating_point:
            low, high = (0, 1) if dtype == torch.bool else (
                torch.iinfo(dtype).min, torch.iinfo(dtype).max)  # fmt: skip
            start = {"add": 0, "multiply": 1, "max": low, "min": high}[op]
        place = ref if dtype == FP32 else ref.view(dtype, (1, 1))
        self.runner.b.memset(place, n=1, value=start, dtype=dtype, partitions=small.parts)


def _like(value: Value) -> Value:
    """Another value of the same kind and dtype."""
    return Value(value.tile, value.kind, value.dtype)
