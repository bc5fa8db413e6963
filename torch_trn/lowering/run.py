"""Writes a Kernel's loops into a Program: pools, loads, steps, stores (see kernel.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch_trn.lowering.emit import BN_STATS_RESULTS, Emitter, Extent
from torch_trn.lowering.kernel import SMALL_BYTES, Geometry, Kernel
from torch_trn.lowering.layout import DMA_ROW_BYTES, PARTITIONS, Grid, Operand, ceil_div
from torch_trn.lowering.pools import (
    Slot,
    assign,
    by_stage,
    column_bytes,
    descriptors,
    slack,
    small_values,
    turned_bytes,
)  # fmt: skip
from torch_trn.lowering.sums import Sums
from torch_trn.lowering.tile import FP32, REDUCING, Output, Step, Value
from torch_trn.memory import Index, Pool, TileRef
from torch_trn.program import Builder, Program

#: Columns of fp32 in one PSUM bank: the widest moving operand of a matmul (isa nc_matmul).
BANK_COLUMNS = 512


#: Row tiles whose steps take turns, so that no engine waits for another within a tile.
TOGETHER = 2


@contextmanager
def loop(b: Builder, trips: int, name: str) -> Iterator[Index]:
    """A loop variable of `trips` iterations; plainly 0 where there is only one."""
    if trips == 1:
        yield 0
    else:
        with b.repeat(trips, name) as variable:
            yield variable


def banks(columns: int) -> list[tuple[int, int, int]]:
    """(first, count, columns each) of the PSUM banks that `columns` fp32 columns fill."""
    full, rest = divmod(columns, BANK_COLUMNS)
    found = [(0, full, BANK_COLUMNS)] if full else []
    return found + ([(full, 1, rest)] if rest else [])


def halves(columns: int, itemsize: int) -> list[tuple[int, int, int]]:
    """`banks` of the 32-bit words of `columns` elements: 64-bit ones are turned by halves."""
    return banks(columns) * max(1, itemsize // 4)


def spread_over(parts: int, rows: int) -> int | None:
    """Partitions that `rows` runs go to; None where that is the DMA's default."""
    return None if min(parts, rows) == min(rows, PARTITIONS) else min(parts, rows)


def lower_kernel(kernel: Kernel, name: str) -> Program:
    """The Program that runs `kernel` over its grid."""
    return lower_grids(kernel, name, [kernel.grid])


def lower_grids(kernel: Kernel, name: str, grids: Sequence[Grid]) -> Program:
    """One Program that runs `kernel` over each of `grids`, with the same pools for all."""
    runner = Runner(kernel, name, grids)
    for grid, geometry in zip(grids, runner.geometries, strict=True):
        runner.run(grid, geometry)
    parts = max((g.parts for g in runner.geometries), default=1)
    runner.sums.finish_totals(parts)
    return runner.b.build()


def _hands_over(kernel: Kernel) -> bool:
    """Whether a tile goes from VectorE to ScalarE and back (or the reverse).

    Queues are in order, so one tile's chain would leave each engine waiting for the other.
    """
    engines = [step.kind in ("act", "act_reduce") for step in kernel.steps if step.kind != "memset"]
    return sum(a != b for a, b in zip(engines, engines[1:], strict=False)) >= 2


class Runner:
    """Emission state of one Kernel: the Builder, and which pool each value lives in."""

    def __init__(self, kernel: Kernel, name: str, grids: Sequence[Grid]) -> None:
        self.kernel = kernel
        self.b = Builder(kernel.core, name.removeprefix("aten::"))
        self.pools: dict[Value, Pool] = {}
        self.scratches: dict[str, Pool] = {}
        self.emitter = Emitter(self.b, lambda name: self.scratches[name][0])
        self.index: dict[str, Index] = {"full": 0, "row": 0, "col": 0, "one": 0}
        self.steps = by_stage(kernel)
        slots = self._plan(grids)
        self.geometries = [kernel.geometry(grid, column_bytes(kernel, slots)) for grid in grids]
        self.sources = [
            self.b.hbm(f"in{i}", nbytes=o.spec.nbytes) for i, o in enumerate(kernel.in_operands)
        ]
        self.results = [
            self.b.hbm(f"out{i}", nbytes=o.spec.nbytes) for i, o in enumerate(kernel.out_operands)
        ]
        self._allocate(slots)
        self.sums = Sums(self)

    # -- pools ---------------------------------------------------------------------------------
    def _plan(self, grids: Sequence[Grid]) -> list[Slot]:
        """Double-buffered temporaries where a whole row (or a good tile) fits beside them."""
        slots = assign(self.kernel, 2)
        self.together = 1
        reduces = any(step.kind in REDUCING for step in self.kernel.steps)
        wanted = max((grid.cols for grid in grids), default=0)
        if not reduces:
            wanted = min(wanted, DMA_ROW_BYTES // 4)
        room = self.kernel.core.sbuf_partition_bytes - SMALL_BYTES
        need = wanted * column_bytes(self.kernel, slots)
        if need > room:
            slots = assign(self.kernel, 1)
        tall = any(grid.rows >= TOGETHER * 2 * PARTITIONS for grid in grids)
        if tall and TOGETHER * need <= room and _hands_over(self.kernel):
            self.together = TOGETHER
            for slot in slots:
                slot.slots *= TOGETHER if slot.slots > 1 else 1
        return slots

    def _allocate(self, slots: Sequence[Slot]) -> None:
        reals = self.kernel.reals
        full = max((g.group * g.width for g in self.geometries), default=0)
        wide = max((g.width for g in self.geometries), default=0) * reals
        group = max((g.group for g in self.geometries), default=1)
        for number, slot in enumerate(slots):
            nbytes = (full + slack(slot, self.kernel, full)) * slot.column_bytes
            pool = self.b.sbuf(f"t{number}", free_bytes=nbytes, slots=slot.slots)
            self.pools.update((value, pool) for value in slot.values)
        for number, value in enumerate(small_values(self.kernel)):
            if value in self.pools:
                continue
            if value.kind == "row":
                nbytes = wide * value.dtype.itemsize
                if value.operand is not None:
                    nbytes *= self.kernel.in_operands[value.operand].spread
                self.pools[value] = self.b.sbuf(f"row{number}", free_bytes=nbytes, slots=2)
                continue
            gaps = 1 if value.operand is None else self.kernel.in_operands[value.operand].spread
            pool = self.b.sbuf(f"col{number}", free_bytes=8 * group * gaps, slots=2 * self.together)
            stats = value.step is not None and value.step.kind == "stats"
            outs = value.step.outs if stats and value.step else (value,)
            self.pools.update((out, pool) for out in outs)
        self._scratch(full * reals, wide)

    def _scratch(self, full: int, wide: int) -> None:
        kernel, b = self.kernel, self.b
        if any(step.kind == "stats" for step in kernel.steps):
            count = BN_STATS_RESULTS * max(1, ceil_div(wide, BANK_COLUMNS))
            self.scratches["stats"] = b.sbuf("stats", free_bytes=4 * count, slots=1)
            if any(g.group > 1 for g in self.geometries):
                self.scratches["square"] = b.sbuf("square", free_bytes=4 * full)
        if size := turned_bytes(kernel):
            nbytes = size * PARTITIONS * ceil_div(full, PARTITIONS)
            self.scratches["natural"] = b.sbuf("natural", free_bytes=nbytes, slots=2)
            self.scratches["turned"] = b.psum("turned", free_bytes=4 * BANK_COLUMNS, slots=2)
        folds = any(step.kind == "fold_groups" for step in kernel.steps)
        spread = any(g.spread for g in self.geometries)
        if folds or spread or any(o.mode != "store" for o in kernel.outputs):
            self.scratches["ones"] = b.sbuf("ones", free_bytes=4 * PARTITIONS)
            b.memset(self.scratches["ones"], op="value", n=PARTITIONS)
            self.scratches["across"] = b.psum("across", free_bytes=4 * PARTITIONS)
        for step in kernel.steps:
            for value in step.consts if step.kind == "select" else ():
                name = f"constant {value}"
                if name not in self.scratches:
                    self.scratches[name] = b.sbuf(name, free_bytes=4)
                    b.memset(self.scratches[name], op="value" if value else "zero", n=1)

    def ref(self, value: Value) -> TileRef:
        """The tile `value` lives in at the current loop indices."""
        return self.pools[value][self.index[value.kind]]

    # -- schedules -----------------------------------------------------------------------------
    def run(self, grid: Grid, geometry: Geometry) -> None:
        """Emit the loops of one grid."""
        if not geometry.rows or not geometry.cols:
            return
        reals = self.kernel.reals
        self.index = dict.fromkeys(self.index, 0)
        self.stage("once", Extent(geometry.parts, geometry.group, geometry.width, reals),
                   grid, geometry)  # fmt: skip
        if geometry.chunked:
            from torch_trn.lowering.chunk import Chunked

            Chunked(self, grid, geometry).run()
            return
        self.sums.start(geometry)
        done = 0
        for trips, width in geometry.col_segments():
            with loop(self.b, trips, "c") as c:
                self._columns(grid, geometry, width, c + done)
            done += trips

    def _columns(self, grid: Grid, geometry: Geometry, width: int, chunk: Index) -> None:
        """One column chunk: its row values, then all row tiles."""
        self.index["row"] = chunk
        reals = self.kernel.reals
        self.stage("row", Extent(geometry.parts, 1, width, reals), grid, geometry)
        done = 0
        for trips, parts in geometry.row_segments():
            extent = Extent(parts, geometry.group, width, reals)
            groups, rest = divmod(trips, self.together)
            for first, count, size in ((0, groups, self.together), (trips - rest, rest, 1)):
                if not count:
                    continue
                with loop(self.b, count, "r") as r:
                    tile = chunk * geometry.row_tiles + (r * size + (first + done))
                    tiles = [tile + i for i in range(size)]
                    self.stage("tile", extent, grid, geometry, tiles)
            done += trips
        self.sums.finish_rows(width)

    def stage(
        self, stage: str, extent: Extent, grid: Grid, geometry: Geometry,
        tiles: Sequence[Index] = (0,),
    ) -> None:  # fmt: skip
        """Loads, steps and stores of one stage; tiles done together take turns step by step."""
        kinds = {"once": ("one",), "row": ("row",), "tile": ("full", "col")}[stage]
        ins = grid.operands[len(self.kernel.out_operands) :]
        for tile in tiles:
            self._at(stage, tile)
            for value, operand, source in zip(self.kernel.ins, ins, self.sources, strict=True):
                if value.kind in kinds:
                    self.load(value, operand, source, extent, geometry)
        for step in self.steps[stage]:
            for tile in tiles:
                self._at(stage, tile)
                self.step(step, extent, geometry)
        for tile in tiles:
            self._at(stage, tile)
            for output in self.kernel.outputs:
                operand = grid.operands[output.index]
                if output.mode == "store" and operand.kind in kinds:
                    self.store(output, operand, extent, geometry)
            if stage == "tile":
                self.sums.add(extent)

    def _at(self, stage: str, tile: Index) -> None:
        """Make `tile` the one that references mean."""
        if stage == "tile":
            self.index["full"] = self.index["col"] = tile

    def step(self, step: Step, extent: Extent, geometry: Geometry) -> None:
        """One step; a spread reduction is then finished across the partitions."""
        self.emitter.step(step, self.ref, extent)
        if geometry.spread and step.kind in REDUCING:
            for value in step.outs:
                if value.kind == "col":
                    op = step.op if step.kind == "reduce" else "add"
                    self.across(self.ref(value), op, extent.parts, everywhere=True)

    # -- data movement -------------------------------------------------------------------------
    def load(
        self, value: Value, operand: Operand, source: Pool, extent: Extent, geometry: Geometry
    ) -> None:
        """HBM to SBUF, one operand of one tile."""
        if operand.transposed:
            self._load_transposed(value, operand, source, extent)
            return
        rows, row_bytes = descriptors(operand, value.kind, extent, geometry)
        index = None if operand.index is None else self.ref(self.kernel.ins[operand.index])
        self.b.load(self.ref(value), source, rows=rows, row_bytes=row_bytes,
                    partitions=spread_over(extent.parts, rows), index=index)  # fmt: skip

    def _load_transposed(
        self, value: Value, operand: Operand, source: Pool, extent: Extent
    ) -> None:
        """Columns lie contiguous in HBM: fetch them onto partitions, then turn them."""
        columns, itemsize = extent.group * extent.width, operand.spec.itemsize
        row_bytes = extent.parts * itemsize
        if itemsize == 2 and self.b.core.name != "NeuronCore-v2":
            # The DMA transposes 16-bit data on the way from trn2 on (arch3).
            parts = spread_over(extent.parts, columns)
            self.b.load(self.ref(value), source, rows=columns, row_bytes=row_bytes,
                        partitions=parts, transpose=True)  # fmt: skip
            return
        natural, turned = self.scratches["natural"][self.index["full"]], self.scratches["turned"]
        self.b.load(natural, source, rows=columns, row_bytes=row_bytes)
        dtype = operand.spec.dtype if itemsize <= 4 else FP32
        for start, trips, width in halves(columns, itemsize):
            with loop(self.b, trips, "t") as t:
                for at in range(0, width, PARTITIONS):
                    size = min(PARTITIONS, width - at)
                    self.b.nc_transpose(
                        turned[t + start], natural, partitions=size, n=extent.parts, dtype=dtype
                    )
                self.b.tensor_copy(self.ref(value), turned[t + start], n=width, dtype=dtype)

    def _store_transposed(self, output: Output, operand: Operand, extent: Extent) -> None:
        """Turn a tile so that what is contiguous in HBM lies along the free dimension."""
        columns, itemsize = extent.group * extent.width, operand.spec.itemsize
        natural, turned = self.scratches["natural"][self.index["full"]], self.scratches["turned"]
        dtype = operand.spec.dtype if itemsize <= 4 else FP32
        for start, trips, width in halves(columns, itemsize):
            with loop(self.b, trips, "t") as t:
                blocks = ceil_div(width, PARTITIONS)
                for at in range(0, width, PARTITIONS):
                    self.b.nc_transpose(
                        turned[t + start], self.ref(output.value), partitions=extent.parts,
                        n=min(PARTITIONS, width - at), dtype=dtype,
                    )  # fmt: skip
                self.b.tensor_copy(natural, turned[t + start], n=blocks * extent.parts, dtype=dtype)
        self.b.store(
            self.results[output.index], natural, rows=columns, row_bytes=extent.parts * itemsize
        )

    def store(self, output: Output, operand: Operand, extent: Extent, geometry: Geometry) -> None:
        """SBUF to HBM, one result of one tile."""
        if operand.transposed and operand.kind == "full":
            self._store_transposed(output, operand, extent)
            return
        if operand.spread > 1:
            # A load may fetch the gaps between strided elements, a store must not write them.
            operand = replace(operand, run=1, spread=1)
        rows, row_bytes = descriptors(operand, operand.kind, extent, geometry)
        if operand.kind in ("row", "one"):
            rows //= extent.parts
        elif operand.kind == "col":
            rows = 1 if geometry.spread else ceil_div(rows, operand.every)
        self.b.store(
            self.results[output.index], self.ref(output.value), rows=rows, row_bytes=row_bytes,
            partitions=spread_over(extent.parts, rows),
        )  # fmt: skip

    def across(self, ref: TileRef, op: str, parts: int, everywhere: bool = False) -> None:
        """Fold [parts, 1] over the partitions, leaving the result in one or in all of them."""
        across, ones = self.scratches["across"], self.scratches["ones"]
        to = parts if everywhere else 1
        if op == "add":
            self.b.nc_matmul(across, stationary=ones, moving=ref, k=parts, m=to, n=1, dtype=FP32)
        else:
            self.b.nc_transpose(across, ref, partitions=parts, n=1, dtype=FP32)
            self.b.tensor_reduce(ref, across, op=op, n=parts, partitions=1)
            if not everywhere:
                return
            self.b.nc_matmul(across, stationary=ones, moving=ref, k=1, m=to, n=1, dtype=FP32)
        self.b.tensor_copy(ref, across, n=1, partitions=to)
