"""Runs a Tile's steps over a Grid: pools, loops, loads, engine instructions, stores.

Three schedules of one recorded tile:
* stream: columns in chunks (outer), rows in tiles (inner); row operands stay for a chunk;
* resident: rows that reductions run along are held whole in SBUF, so HBM is read once;
* chunked: rows longer than SBUF are read once for each reduction that later steps wait for.
A grid with few, long rows is "spread": one row lies across all partitions, and every reduction is
finished across them with a transpose.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch_trn.chip import CoreSpec
from torch_trn.lowering.layout import (
    DMA_ROW_BYTES,
    MIN_FREE,
    PARTITIONS,
    Grid,
    ceil_div,
    flat,
    flat_rows,
)
from torch_trn.lowering.pools import single_pass
from torch_trn.lowering.tile import FP32, REDUCING, Output, Step, Tile, Value

#: SBUF bytes per partition kept for col values, constants and partial results.
SMALL_BYTES = 6144

#: Rows below which reductions spread a row over all partitions.
SPREAD_ROWS = 32
SPREAD_COLS = 2048

#: A padded last chunk adds at most one column in so many.
PADDING = 256

#: Tiles per engine that let loads, compute and stores overlap; smaller tiles follow from it.
PIPELINE_TILES = 4
PIPELINE_ROW_BYTES = 2048


@dataclass(frozen=True)
class Geometry:
    """Tiling of one grid: `parts` partitions x (`group` rows x `width` columns) a tile."""

    rows: int
    cols: int
    parts: int
    group: int
    width: int
    spread: bool = False
    chunked: bool = False
    padded: bool = False
    """Whether the last chunk may be as wide as the others (rows are arbitrary cuts anyway)."""

    @property
    def row_tiles(self) -> int:
        """Tiles along the rows, the last one possibly short."""
        if self.spread:
            return self.rows
        return ceil_div(self.rows, self.parts * self.group)

    def row_segments(self) -> list[tuple[int, int]]:
        """(tiles, partitions) of the full row tiles, then of the rest."""
        if self.spread:
            return [(self.rows, self.parts)] if self.rows else []
        full, rest = divmod(self.rows, self.parts * self.group)
        segments = [(full, self.parts)] if full else []
        return segments + ([(1, ceil_div(rest, self.group))] if rest else [])

    def col_segments(self) -> list[tuple[int, int]]:
        """(chunks, width) of the full column chunks, then of the rest."""
        if not self.width:
            return []
        full, rest = divmod(self.cols, self.width)
        if self.padded and rest and (self.width - rest) * PADDING <= self.cols:
            full, rest = full + 1, 0
        segments = [(full, self.width)] if full else []
        return segments + ([(1, rest)] if rest else [])


class Kernel(Tile):
    """A Tile whose operands are tensors of a Grid: the first `outs` are results, the rest inputs.

    `ins` are the inputs' values, in the order of the specs.
    """

    def __init__(self, core: CoreSpec, grid: Grid, outs: int, shards: int = 1) -> None:
        super().__init__()
        self.core = core
        self.grid = grid
        self.shards = shards
        self.out_operands = grid.operands[:outs]
        self.in_operands = grid.operands[outs:]
        self.ins = [self.operand(o.kind, o.spec.dtype) for o in self.in_operands]
        complexes = any(o.spec.dtype.is_complex for o in grid.operands)
        self.reals = 2 if complexes else 1

    def store(self, index: int, value: Value) -> None:
        """Result `index` is `value`, converted and broadcast as the result needs."""
        operand = self.out_operands[index]
        dtype = FP32 if operand.spec.dtype.is_complex else operand.spec.dtype
        if value.kind != operand.kind:
            value = self.step("copy", "", (value,), (), dtype, operand.kind)
        elif value.dtype != dtype:
            taken = value.step is None or any(o.value is value for o in self.outputs)
            if taken or value.step is not None and value.step.kind in REDUCING:
                value = self.cast(value, dtype)
            else:
                value.dtype = dtype
        super().store(index, value)

    # -- tiling --------------------------------------------------------------------------------
    def geometry(self, grid: Grid, bytes_per_column: int) -> Geometry:
        """How `grid` is tiled when one column of a tile takes `bytes_per_column` of SBUF."""
        rows, cols, spread = self._share(grid)
        reduces = any(step.kind in REDUCING or step.kind == "scan" for step in self.steps)
        parts = min(rows, PARTITIONS)
        few = rows < SPREAD_ROWS and cols >= SPREAD_COLS
        few = few or rows < PARTITIONS and cols >= SPREAD_COLS * SPREAD_ROWS
        if reduces and few and not self._scans():
            itemsize = max(o.spec.itemsize for o in grid.operands)
            parts, spread = flat_rows(cols, itemsize), True
            cols = ceil_div(cols, parts)
        room = (self.core.sbuf_partition_bytes - SMALL_BYTES) // max(bytes_per_column, 1)
        full = [o for o in grid.operands if o.kind == "full"] or grid.operands
        itemsize = max(o.spec.itemsize for o in full)
        wide = max(1, min(room, DMA_ROW_BYTES // itemsize))
        if sums := sum(o.mode == "rowsum" for o in self.outputs):
            wide = min(wide, self.core.psum_banks // max(sums, 2) * 512)
        width, group, chunked = cols, 1, False
        tiles = cols and rows if spread else ceil_div(max(rows, 1), PARTITIONS)
        if reduces and cols > room:
            width, chunked = _even(cols, wide), True
        elif reduces and tiles < PIPELINE_TILES and cols * itemsize > PIPELINE_ROW_BYTES:
            if single_pass(self):
                chunks = ceil_div(PIPELINE_TILES, max(tiles, 1))
                chunks = max(
                    ceil_div(cols, wide), min(chunks, cols * itemsize // PIPELINE_ROW_BYTES)
                )
                width, chunked = ceil_div(cols, chunks), chunks > 1
        elif not reduces and cols > wide:
            width = _even(cols, wide, ceil_div(PIPELINE_TILES, ceil_div(max(rows, 1), PARTITIONS)))
        elif not reduces and cols * itemsize > PIPELINE_ROW_BYTES:
            chunks = ceil_div(PIPELINE_TILES, ceil_div(max(rows, 1), PARTITIONS))
            chunks = min(chunks, cols * itemsize // PIPELINE_ROW_BYTES)
            width = ceil_div(cols, chunks)
        elif rows > PARTITIONS and cols and not spread:
            group = self._group(rows, cols, wide, itemsize)
        return Geometry(
            rows, cols, max(parts, 1), group, width, spread, chunked, grid.is_flat and not reduces
        )

    def _group(self, rows: int, cols: int, wide: int, itemsize: int) -> int:
        """Rows per partition of one tile: more than one where rows are short."""
        if cols >= MIN_FREE // 2 and any(_prefers_single_rows(step) for step in self.steps):
            return 1
        per_partition = ceil_div(rows, PARTITIONS)
        enough = ceil_div(PIPELINE_ROW_BYTES, cols * itemsize)
        share = max(ceil_div(per_partition, PIPELINE_TILES), enough)
        return max(1, min(wide // cols, per_partition, share))

    def _scans(self) -> bool:
        return any(step.kind == "scan" for step in self.steps)

    def _share(self, grid: Grid) -> tuple[int, int, bool]:
        """Rows and columns of the largest of `shards` shares."""
        rows, cols = grid.rows, grid.cols
        if self.shards == 1 or not rows:
            return rows, cols, False
        if grid.is_flat:
            share = flat(ceil_div(grid.numel, self.shards), [o.spec for o in grid.operands])
            return share.rows, share.cols, False
        if rows >= self.shards:
            return ceil_div(rows, self.shards), cols, False
        return rows, ceil_div(cols, self.shards), False


def _prefers_single_rows(step: Step) -> bool:
    """Whether one row per partition is cheaper: bn_stats, per-partition scalars and biases."""
    kinds = {value.kind for value in step.ins}
    return step.kind == "stats" or {"full", "col"} <= kinds


def _even(cols: int, wide: int, at_least: int = 1) -> int:
    """A chunk of at most `wide` columns such that all chunks are about equal."""
    return ceil_div(cols, max(ceil_div(cols, wide), min(at_least, ceil_div(cols, MIN_FREE))))


__all__ = ["Geometry", "Kernel", "Output"]
