"""Writes a Kernel's loops into a Program: pools, loads, steps, stores (see kernel.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.emit import Emitter, constant_dtype, constant_name
from torch_trn.lowering.extent import Extent
from torch_trn.lowering.fold import BN_STATS_RESULTS
from torch_trn.lowering.kernel import SMALL_BYTES, Geometry, Kernel
from torch_trn.lowering.layout import (
    DMA_ROW_BYTES,
    PARTITIONS,
    Grid,
    ceil_div,
)  # fmt: skip
from torch_trn.lowering.pools import (
    Slot,
    assign,
    by_stage,
    column_bytes,
    needs_wide,
    slack,
    small_values,
    spread_over,
    turned_bytes,
)  # fmt: skip
from torch_trn.lowering.sums import Sums, make_shares
from torch_trn.lowering.tile import FP32, REDUCING, Scalar, Step, Value
from torch_trn.lowering.transfer import Transfers
from torch_trn.lowering.turn import Turner
from torch_trn.memory import Index, Pool, TileRef, affine
from torch_trn.program import Builder, Program

__all__ = ["Runner", "loop", "lower_grids", "lower_kernel", "spread_over"]

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


def lower_kernel(kernel: Kernel, name: str) -> Program:
    """The Program that runs `kernel` over its grid."""
    return lower_grids(kernel, name, [kernel.grid])


def lower_grids(kernel: Kernel, name: str, grids: Sequence[Grid]) -> Program:
    """One Program that runs `kernel` over each of `grids`, with the same pools for all."""
    kernel.settle()
    runner = Runner(kernel, name, [kernel.whole(grid) for grid in grids])
    for grid, geometry in zip(runner.grids, runner.geometries, strict=True):
        runner.run(grid, geometry)
    parts = max((g.parts for g in runner.geometries), default=1)
    runner.sums.finish_totals(parts)
    return runner.b.build()


def joined(name: str, core: CoreSpec, programs: Sequence[Program]) -> Program:
    """Programs one after the other; pools that several of them use are the same."""
    if len(programs) == 1:
        return programs[0]
    name = name.removeprefix("aten::")
    pools = tuple(dict.fromkeys(pool for program in programs for pool in program.pools))
    body = tuple(node for program in programs for node in program.body)
    return Program(name, pools, body)


def _hands_over(kernel: Kernel) -> bool:
    """Whether a tile goes from VectorE to ScalarE and back (or the reverse).

    Queues are in order, so one tile's chain would leave each engine waiting for the other.
    """
    engines = [step.kind in ("act", "act_reduce") for step in kernel.steps if step.kind != "memset"]
    return sum(a != b for a, b in zip(engines, engines[1:], strict=False)) >= 2


class Runner(Transfers):
    """Emission state of one Kernel: the Builder, and which pool each value lives in."""

    def __init__(self, kernel: Kernel, name: str, grids: Sequence[Grid]) -> None:
        self.kernel = kernel
        self.grids = grids
        self.b = Builder(kernel.core, name.removeprefix("aten::"))
        self.pools: dict[Value, Pool] = {}
        self.scratches: dict[str, Pool] = {}
        self.emitter = Emitter(self.b, lambda name: self.scratches[name][0])
        self.index: dict[str, Index] = {"full": 0, "row": 0, "col": 0, "one": 0}
        self.steps = by_stage(kernel)
        slots = self._plan(grids)
        self.geometries = [kernel.geometry(grid, column_bytes(kernel, slots)) for grid in grids]
        first = len(kernel.out_operands)
        inputs = range(first, len(kernel.names))
        self.sources = [self._tensor(grids, number) for number in inputs]
        self.results = [self._tensor(grids, number) for number in range(first)]
        self._allocate(slots)
        self.sums = Sums(self)
        self.turner = Turner(self)

    # -- pools ---------------------------------------------------------------------------------
    def _tensor(self, grids: Sequence[Grid], number: int) -> Pool:
        """The HBM tensor of one operand, or the tensors that it is one after the other."""
        names = self.kernel.names[number]
        sizes = [grid.operands[number].spec.nbytes for grid in grids]
        if isinstance(names, Pool):
            return self.b.adopt(names)
        if isinstance(names, str):
            return self.b.hbm(names, nbytes=sizes[0])
        return self.b.hbm(f"{names[0]}...", nbytes=sum(sizes), of=names)

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
            nbytes = (full + slack(self.kernel, full, self.geometries)) * slot.column_bytes
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
        grouped = any(g.group > 1 for g in self.geometries)
        if any(step.kind == "stats" for step in kernel.steps):
            self._stats_scratch(full, wide)
        if grouped and needs_wide(kernel):
            self.scratches["wide"] = b.sbuf("wide", free_bytes=4 * full)
        if any(g.last for g in self.geometries):
            self.scratches["rest"] = b.sbuf("rest", free_bytes=8)
        for step in kernel.steps:
            if step.kind == "fold_groups":
                self._blocks(step.operands[0])
            for value in step.operands if step.kind == "select" else ():
                if value is not None:
                    self._constant(value, step)
        if size := turned_bytes(kernel):
            # Blocks of 128 columns, each with all rows of a tile.
            rows = max(
                (ceil_div(g.width, PARTITIONS) * g.group for g in self.geometries), default=0
            )
            nbytes = size * PARTITIONS * rows
            self.scratches["natural"] = b.sbuf("natural", free_bytes=nbytes, slots=2)
            self.scratches["turned"] = b.psum("turned", free_bytes=2048, slots=2)
        self._across_scratch()

    def _stats_scratch(self, full: int, wide: int) -> None:
        """What mean and variance need."""
        b, grouped = self.b, any(g.group > 1 for g in self.geometries)
        uneven = any(g.last for g in self.geometries)
        count = BN_STATS_RESULTS * (ceil_div(max(wide, 1), 512) + uneven)
        self.scratches["stats"] = b.sbuf("stats", free_bytes=4 * count, slots=1)
        if grouped:
            self.scratches["square"] = b.sbuf("square", free_bytes=4 * full)
        for geometry in self.geometries:
            if geometry.spread:
                self.scratches["apart"] = b.sbuf("apart", free_bytes=4)
                make_shares(self, geometry)

    def _across_scratch(self) -> None:
        """What folds over partitions need."""
        kernel, b = self.kernel, self.b
        folds = any(step.kind == "fold_groups" for step in kernel.steps)
        spread = any(g.spread for g in self.geometries)
        if folds or spread or any(o.mode != "store" for o in kernel.outputs):
            self.ones(FP32)
            self.scratches["across"] = b.psum("across", free_bytes=4 * PARTITIONS)

    def ones(self, dtype: torch.dtype) -> Pool:
        """[128, 128] ones: stationary operand of sums over partitions."""
        name = "ones" if dtype == FP32 else f"ones {str(dtype).removeprefix('torch.')}"
        if name not in self.scratches:
            pool = self.b.sbuf(name, free_bytes=dtype.itemsize * PARTITIONS)
            self.b.memset(pool, n=PARTITIONS, value=1.0, dtype=dtype)
            self.scratches[name] = pool
        return self.scratches[name]

    def _constant(self, value: Scalar, step: Step) -> None:
        name, dtype = constant_name(value, step), constant_dtype(value, step)
        if name not in self.scratches:
            pool = self.b.sbuf(name, free_bytes=dtype.itemsize)
            self.b.memset(pool, n=1, value=value, dtype=dtype)
            self.scratches[name] = pool

    def _blocks(self, rows: Scalar | None) -> None:
        """[128, 128] with 1 / rows where row and column belong to the same group of `rows`."""
        name = f"blocks {rows}"
        assert isinstance(rows, int)
        if name in self.scratches:
            return
        pool = self.b.sbuf(name, free_bytes=4 * PARTITIONS)
        self.scratches[name] = pool
        count = ceil_div(PARTITIONS, rows)
        steps = ((rows, count), (0, rows))
        width = count * rows
        if width > PARTITIONS:
            # The last group is cut off by the array's edge.
            count, width = PARTITIONS // rows, PARTITIONS // rows * rows
            steps = ((rows, count), (0, rows))
        self.b.memset(pool, n=PARTITIONS, value=1.0 / rows)
        # Kept where 0 <= partition - first of the column's group < rows.
        block = pool[0].view(FP32, (1, width))
        self.b.affine_select(block, block, n=width, op="is_ge", channel=1, base=0,
                             steps=tuple((-step, size) for step, size in steps))  # fmt: skip
        self.b.affine_select(block, block, n=width, op="is_lt", channel=1, base=-rows,
                             steps=tuple((-step, size) for step, size in steps))  # fmt: skip

    def ref(self, value: Value) -> TileRef:
        """The tile `value` lives in at the current loop indices."""
        return self.pools[value.root][self.index[value.kind]]

    # -- schedules -----------------------------------------------------------------------------
    def run(self, grid: Grid, geometry: Geometry) -> None:
        """Emit the loops of one grid."""
        if not geometry.rows or not geometry.cols:
            return
        self.index = dict.fromkeys(self.index, 0)
        self.grid = grid
        extent = geometry.extent(geometry.parts, geometry.group, geometry.width, self.kernel.reals)
        self.stage("once", extent, grid, geometry)
        if geometry.chunked:
            from torch_trn.lowering.chunk import Chunked

            Chunked(self, grid, geometry).run()
            return
        self.sums.start(geometry)
        done, col = 0, 0
        for trips, width, short in geometry.col_segments():
            with loop(self.b, trips, "c") as c:
                at = affine(c) * width + col
                self._columns(grid, geometry, width, c + done, at, short)
            done += trips
            col += trips * width

    def _columns(
        self, grid: Grid, geometry: Geometry, width: int, chunk: Index, col: Index,
        short: int | None,
    ) -> None:  # fmt: skip
        """One column chunk: its row values, then all row tiles."""
        self.index["row"] = chunk
        reals = self.kernel.reals
        extent = geometry.extent(geometry.parts, 1, width, reals, 0, col, short)
        self.stage("row", extent, grid, geometry)
        done, row = 0, 0
        for trips, parts, rows in geometry.row_segments():
            groups, rest = divmod(trips, self.together)
            for first, count, size in ((0, groups, self.together), (trips - rest, rest, 1)):
                if not count:
                    continue
                with loop(self.b, count, "r") as r:
                    tiles = []
                    for i in range(size):
                        number = affine(r) * size + (first + i)
                        at = geometry.extent(
                            parts, rows, width, reals, number * (parts * rows) + row
                            if not geometry.spread else number, col, short,
                        )  # fmt: skip
                        tiles.append(
                            (chunk * geometry.row_tiles + number + done, number + done, at)
                        )
                    self.stage("tile", extent, grid, geometry, tiles)
            done += trips
            row += trips * parts * rows
        self.sums.finish_rows(width, col, geometry)

    def stage(
        self, stage: str, extent: Extent, grid: Grid, geometry: Geometry,
        tiles: Sequence[tuple[Index, Index, Extent]] = (),
    ) -> None:  # fmt: skip
        """Loads, steps and stores of one stage; tiles done together take turns step by step.

        tiles: (number, number among its column chunk's tiles, place) of each.
        """
        kinds = {"once": ("one",), "row": ("row",), "tile": ("full", "col")}[stage]
        ins = grid.operands[len(self.kernel.out_operands) :]
        places = tiles or [(0, 0, extent)]
        for tile, _, at in places:
            self._at(stage, tile)
            for value, operand, source in zip(self.kernel.ins, ins, self.sources, strict=True):
                if value.kind in kinds:
                    self.load(value, operand, source, at, geometry)
        for step in self.steps[stage]:
            for tile, _, at in places:
                self._at(stage, tile)
                self.step(step, at, geometry)
        for tile, number, at in places:
            self._at(stage, tile)
            for output in self.kernel.outputs:
                operand = grid.operands[output.index]
                if output.mode == "store" and operand.kind in kinds:
                    self.store(output, operand, at, geometry)
            if stage == "tile":
                self.sums.add(at, number, geometry)

    def _at(self, stage: str, tile: Index) -> None:
        """Make `tile` the one that references mean."""
        if stage == "tile":
            self.index["full"] = self.index["col"] = tile

    def step(self, step: Step, extent: Extent, geometry: Geometry) -> None:
        """One step; a spread reduction is then finished across the partitions."""
        self.emitter.step(step, self.ref, extent)
        if geometry.spread and step.kind in REDUCING:
            self.finish_spread(step, extent.parts, geometry)

    def finish_spread(self, step: Step, parts: int, geometry: Geometry) -> None:
        """Join the partitions' parts of one row's fold, leaving the result in all of them."""
        if step.kind == "stats":
            self.sums.across_stats(step, geometry)
            return
        op = step.op if step.kind == "reduce" else "add"
        for value in step.outs:
            if value.kind == "col":
                self.sums.across(self.ref(value), value.dtype, op, parts, everywhere=True)
