"""Rows longer than SBUF: a pass over the row's chunks for each reduction that later steps need.

A pass reloads its operands from HBM and repeats the elementwise steps it needs; folds of the chunks
are combined in col accumulators. A softmax's maximum and sum of exponentials share one pass: the
running sum is rescaled whenever the running maximum grows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch_trn.lowering.emit import Extent
from torch_trn.lowering.kernel import Geometry
from torch_trn.lowering.layout import Grid, ceil_div
from torch_trn.lowering.pools import passes, stage_of
from torch_trn.lowering.tile import REDUCING, Step, Value
from torch_trn.memory import Index, Pool, TileRef

if TYPE_CHECKING:
    from torch_trn.lowering.run import Runner


#: Tiles that one instruction may read (the scheduler takes 12 operands).
GATHERED = 10


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
        self.chunks = ceil_div(geometry.cols, geometry.width)
        self.at: Index = 0
        self.partials: dict[int, Pool] = {}
        for step in self.kernel.steps:
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

    def _scratch(self, name: str, free_bytes: int, slots: int) -> Pool:
        """A small pool, shared with earlier grids of the same Program where it is large enough."""
        kept = self.runner.scratches.get(name)
        if kept is None or kept.nbytes < free_bytes or kept.slots < slots:
            kept = self.runner.b.sbuf(name, free_bytes=free_bytes, slots=slots)
            self.runner.scratches[name] = kept
        return kept

    def run(self) -> None:
        """Emit all row tiles."""
        runner, geometry = self.runner, self.geometry
        if runner.sums.rows:
            runner.sums.start_chunks(geometry, self.chunks)
        done = 0
        for trips, parts in geometry.row_segments():
            from torch_trn.lowering.run import loop

            with loop(runner.b, trips, "r") as r:
                self._row(r + done, parts)
            done += trips
        runner.sums.finish_chunks(geometry)

    def _row(self, tile: Index, parts: int) -> None:
        runner, kernel = self.runner, self.kernel
        runner.index["col"] = tile
        small = Extent(parts, 1, 1, kernel.reals)
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
            elif output.mode == "total":
                runner.sums._add_total(output, small)

    def _in_operands(self) -> Iterable:
        return self.grid.operands[len(self.kernel.out_operands) :]

    def _full_outputs(self, number: int) -> list:
        return [
            output
            for output in self.kernel.outputs
            if output.value.kind == "full" and self.phase.get(id(output.value), 0) == number
        ]

    def _needed(self, number: int) -> set[int]:
        """ids of the values that pass `number` computes or loads, chunk by chunk."""
        wanted: list[Value] = [output.value for output in self._full_outputs(number)]
        for step in self.kernel.steps:
            if self._folds(step, number):
                wanted.extend(step.ins)
        found: set[int] = set()
        while wanted:
            value = wanted.pop()
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

        runner, done = self.runner, 0
        for trips, width in self.geometry.col_segments():
            with loop(runner.b, trips, "c") as c:
                self.at = c + done
                index = tile * (self.chunks * self.passes) + (c + done + number * self.chunks)
                runner.index["full"] = runner.index["row"] = index
                extent = Extent(parts, 1, width, self.kernel.reals)
                self._chunk(number, needed, extent)
            done += trips

    def _chunk(self, number: int, needed: set[int], extent: Extent) -> None:
        runner, kernel = self.runner, self.kernel
        for value, operand, source in zip(
            kernel.ins, self._in_operands(), runner.sources, strict=True
        ):
            if id(value) in needed:
                runner.load(value, operand, source, extent, self.geometry)
        for step in kernel.steps:
            if self._folds(step, number):
                self._fold(step, extent)
            elif stage_of(step) != "once" and any(id(v) in needed for v in step.outs):
                if step.kind in REDUCING:
                    # Its fold is known already; only the elementwise part is repeated.
                    step = Step("act", step.op, step.ins, step.outs[:1], step.consts)
                runner.emitter.step(step, runner.ref, extent)
        for output in self._full_outputs(number):
            if output.mode == "store":
                operand = self.grid.operands[output.index]
                runner.store(output, operand, extent, self.geometry)
            elif output.mode == "rowsum":
                runner.sums.add_chunk(output, extent, self.at)

    def _fold(self, step: Step, extent: Extent) -> None:
        """Fold one chunk and combine it with the chunks before."""
        runner, b = self.runner, self.runner.b
        together = self.online.get(id(step))
        if together is not None:
            self._fold_online(together, extent)
            return
        runner.emitter.step(step, self._partial, extent)
        op = step.op if step.kind == "reduce" else "add"
        for value in step.outs:
            if value.kind == "col":
                ref = runner.ref(value)
                b.tensor_tensor(ref, ref, self._partial(value), op=op, n=1, partitions=extent.parts)

    def _fold_online(self, steps: list[Step], extent: Extent) -> None:
        """Each chunk by its own maximum, so that no chunk waits for the one before."""
        runner, b = self.runner, self.runner.b
        top, low, total = steps[0].outs[0], steps[1].outs[0], steps[2].outs[1]
        runner.emitter.step(steps[0], self._partial, extent)
        lows = self.lows[self.at]
        b.tensor_scalar(lows, self._partial(top), op="multiply", n=1, partitions=extent.parts)

        def refs(value: Value) -> TileRef:
            return lows if value is low else self._partial(value)

        runner.emitter.step(steps[2], refs, extent)
        assert id(total) in self.partials

    def _combine_online(self, steps: list[Step], parts: int) -> None:
        """low = min over chunks, sum = sum of chunk sums x exp(low - chunk's low)."""
        runner, b, n = self.runner, self.runner.b, self.chunks
        low, total = runner.ref(steps[1].outs[0]), runner.ref(steps[2].outs[1])
        for together, single in (
            (self.all_lows, self.lows),
            (self.all_sums, self.partials[id(steps[2].outs[1])]),
        ):
            for at in range(0, n, GATHERED):
                refs = [single[i] for i in range(at, min(n, at + GATHERED))]
                b.tensor_copy(together, refs, n=len(refs), partitions=parts)
        b.tensor_reduce(low, self.all_lows, op="min", n=n, partitions=parts)
        b.activation(self.scales, [self.all_lows, low], op="exp", n=n, partitions=parts)
        b.tensor_tensor(
            self.scales, self.scales, self.all_sums, op="multiply", n=n, partitions=parts
        )
        b.tensor_reduce(total, self.scales, op="add", n=n, partitions=parts)

    def _partial(self, value: Value) -> TileRef:
        pool = self.partials.get(id(value))
        return pool[self.at] if pool is not None else self.runner.ref(value)

    def _finish(self, number: int, small: Extent) -> None:
        """After a pass: chunks by their own maxima are combined, spread rows folded across."""
        for step in self.kernel.steps:
            if self._folds(step, number):
                together = self.online.get(id(step))
                if together is not None:
                    self._combine_online(together, small.parts)
                if not self.geometry.spread:
                    continue
                values = (
                    [(together[1].outs[0], "min"), (together[2].outs[1], "add")]
                    if together
                    else [(v, step.op if step.kind == "reduce" else "add") for v in step.outs]
                )
                for value, op in values:
                    if value.kind == "col":
                        self.runner.across(self.runner.ref(value), op, small.parts, everywhere=True)

    def _columns_only(self, number: int, small: Extent) -> None:
        """Steps on col values that become known before pass `number`, and accumulators to clear."""
        runner = self.runner
        for step in self.kernel.steps:
            if self._folds(step, number):
                if id(step) in self.online:
                    continue
                start = "zero" if step.kind != "reduce" or step.op == "add" else "value"
                for value in step.outs:
                    if value.kind == "col":
                        runner.b.memset(runner.ref(value), op=start, n=1, partitions=small.parts)
            elif (
                all(v.kind == "col" for v in step.outs)
                and step.kind not in REDUCING
                and id(step) not in self.online
                and stage_of(step) == "tile"
                and self.phase[id(step.outs[0])] == number
            ):
                runner.emitter.step(step, runner.ref, small)
