"""Runs a Tile's steps over a Grid: pools, loops, loads, engine instructions, stores.

Three schedules of one recorded tile:
* stream: columns in chunks (outer), rows in tiles (inner); row operands stay for a chunk;
* resident: rows that reductions run along are held whole in SBUF, so HBM is read once;
* chunked: rows longer than SBUF are read once for each reduction that later steps wait for.
A grid with few, long rows is "spread": one row lies across all partitions, and every reduction is
finished across them with a transpose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import REAL_OF
from torch_trn.lowering.extent import Extent
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
from torch_trn.lowering.tile import FP32, REDUCING, Output, Source, Step, Tile, Value
from torch_trn.memory import CORE, Index, Pool, affine

#: What TensorE reads.
MATMUL_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})

#: Steps whose results keep their dtype: folds are combined in it, random bits need its room.
_KEPT = REDUCING | {"random", "fold_groups"}

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
    row_base: Index = 0
    col_base: Index = 0
    """First row and column of this core's share."""
    pieces: int = 1
    piece: int = 0
    """How rows that operands walk are cut (see Grid); one row over all partitions is cut too."""
    last: int = 0
    """Columns of the last partition of all, if those are fewer and must not be folded."""
    exact: bool = False
    """Whether no tile may have rows beyond the last."""
    is_flat: bool = False

    @property
    def row_tiles(self) -> int:
        """Tiles along the rows, the last one possibly short."""
        return sum(trips for trips, _, _ in self.row_segments())

    def row_segments(self) -> list[tuple[int, int, int]]:
        """(tiles, partitions, rows in each) of the full row tiles, then of the rest."""
        if self.spread:
            return [(self.rows, self.parts, 1)] if self.rows else []
        full, rest = divmod(self.rows, self.parts * self.group)
        segments = [(full, self.parts, self.group)] if full else []
        if not rest:
            return segments
        if not self.exact or rest % self.group == 0:
            return [*segments, (1, ceil_div(rest, self.group), self.group)]
        for group in range(ceil_div(rest, PARTITIONS), self.group):
            if rest % group == 0:
                return [*segments, (1, rest // group, group)]
        even, odd = divmod(rest, self.group)
        return [*segments, (1, even, self.group), (1, odd, 1)] if even else [*segments, (1, odd, 1)]

    def col_segments(self) -> list[tuple[int, int, int | None]]:
        """(chunks, width, columns of a short last partition) of column chunks that are alike."""
        if not self.width:
            return []
        full, rest = divmod(self.cols, self.width)
        if self.padded and rest and (self.width - rest) * PADDING <= self.cols:
            full, rest = full + 1, 0
        if not self.last:
            return [(n, w, None) for n, w in ((full, self.width), (1, rest)) if n and w]
        whole, cut = divmod(self.last, self.width)
        runs: list[tuple[int, int, int | None]] = [(min(whole, full), self.width, None)]
        if whole < full:
            runs += [(1, self.width, cut), (full - whole - 1, self.width, 0)]
        left = max(0, self.last - full * self.width)
        runs += [(1, rest, left if left < rest else None)]
        return [run for run in runs if run[0] and run[1]]

    def extent(
        self, parts: int, group: int, width: int, reals: int, row: Index = 0, col: Index = 0,
        short: int | None = None,
    ) -> Extent:  # fmt: skip
        """The tile of `parts` x `group` rows and `width` columns from (row, col) of the share."""
        row, col = affine(row) + self.row_base, affine(col) + self.col_base
        place: tuple[Index, Index, int, int] = (row, col, group, 0)
        if self.is_flat:
            place = (0, row * self.piece + col, 0, self.piece)
        elif self.spread:
            place = (row, col, 0, self.piece)
            row = row * self.parts
        return Extent(parts, group, width, reals, row, col, short, 0, place)


class Kernel(Tile):
    """A Tile whose operands are tensors of a Grid: the first `outs` are results, the rest inputs.

    `ins` are the inputs' values, in the order of the specs. `names` are those of the tensors (see
    `memory.Pool`); an operand that is several tensors one after the other has a tuple of them, and
    one that lies in scratch memory has its pool.
    """

    def __init__(
        self, core: CoreSpec, grid: Grid, outs: int, shards: int = 1,
        names: Sequence[str | tuple[str, ...] | Pool] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.core = core
        self.shards = shards
        self.alone = False
        """Whether one core does it all: what follows reads everything that this writes."""
        if any(o.spec.dtype.is_complex for o in grid.operands):
            grid = replace(grid, operands=tuple(replace(o, kind="full") for o in grid.operands))
        self.grid = grid
        self.out_operands = grid.operands[:outs]
        self.in_operands = grid.operands[outs:]
        self.names: tuple[str | tuple[str, ...] | Pool, ...] = tuple(names) or (
            *(f"out{i}" for i in range(outs)), *(f"in{i}" for i in range(len(self.in_operands)))
        )  # fmt: skip
        complexes = any(o.spec.dtype.is_complex for o in grid.operands)
        self.reals = 2 if complexes else 1
        self.ins = [self.operand(o.kind, o.spec.dtype) for o in self.in_operands]
        for value, operand in zip(self.ins, self.in_operands, strict=True):
            value.stride = 1 if complexes else operand.spread
        self._wanted: dict[int, torch.dtype] = {}

    def store(self, index: int, value: Value) -> None:
        """Result `index` is `value`, converted and broadcast as the result needs."""
        operand = self.out_operands[index]
        single = value.kind == "full" and operand.kind == "col" and self.grid.cols == 1
        if single or value.kind in ("full", "col") and operand.kind in ("one", "row"):
            # One row or one column only: there is nothing to share.
            operand = replace(operand, kind=value.kind)
            operands = list(self.grid.operands)
            operands[index] = operand
            self.grid = replace(self.grid, operands=tuple(operands))
            self.out_operands = self.grid.operands[: len(self.out_operands)]
        dtype = REAL_OF.get(operand.spec.dtype, operand.spec.dtype)
        if value.kind != operand.kind or value.operand is not None and value.stride > 1:
            value = self.step("copy", "", (value,), (), dtype, operand.kind)
        elif value.dtype != dtype:
            taken = value.step is None or any(o.value is value for o in self.outputs)
            kept = value.held is not None or value.step is not None and value.step.kind in _KEPT
            floats = value.dtype.is_floating_point and dtype.is_floating_point
            read = any(value is other.root for step in self.steps for other in step.ins)
            if taken or kept or read and not floats:
                value = self.cast(value, dtype)
            else:
                self._wanted[id(value)] = dtype
        super().store(index, value)

    def store_parts(
        self, index: int, parts: Sequence[Source], dtype: torch.dtype, holder: torch.dtype
    ) -> None:
        """Result `index` has elements of two halves, written by the steps that made them."""
        kind = self.out_operands[index].kind
        whole = Value(self, kind, holder)
        for at, part in enumerate(parts):
            if not isinstance(part, Value):
                part = self.step("memset", "", (), (part,), dtype, kind)
            made = part.step is not None and part.held is None and part.step.kind not in _KEPT
            if not made or part.kind != kind or part.operand is not None:
                part = self.step("copy", "", (part,), (), dtype, kind)
            part.dtype, part.stride, part.place, part.held = dtype, 2, at, whole
            whole.step = part.step
        super().store(index, whole)

    def rowsum(self, index: int, value: Value, scale: float = 1.0) -> None:
        """See Tile; what TensorE cannot read is converted first."""
        if value.dtype not in MATMUL_DTYPES or value.stride > 1 or value.kind != "full":
            dtype = value.dtype if value.dtype in MATMUL_DTYPES else FP32
            value = self.step("copy", "", (value,), (), dtype, "full")
        super().rowsum(index, value, scale)

    def whole(self, grid: Grid) -> Grid:
        """`grid` with uncut rows, where pieces of unequal length would be folded."""
        totals = any(o.mode == "total" for o in self.outputs)
        if not totals or grid.is_flat or grid.pieces == 1 or grid.size % grid.cols == 0:
            return grid
        return replace(grid, rows=grid.rows // grid.pieces, cols=grid.size, pieces=1, size=0)

    def settle(self) -> None:
        """Let steps write the dtype of the result, where no other step reads what they write.

        Else the DMA converts on the way out, or a copy does if the tile is turned first.
        """
        read = {id(value.root) for step in self.steps for value in step.ins}
        once = Counter(id(output.value) for output in self.outputs)
        for output in self.outputs:
            wanted = self._wanted.pop(id(output.value), None)
            if wanted is None:
                continue
            if id(output.value) not in read and once[id(output.value)] == 1:
                output.value.dtype = wanted
            elif self.out_operands[output.index].transposed:
                output.value = self.cast(output.value, wanted)

    # -- tiling --------------------------------------------------------------------------------
    def geometry(self, grid: Grid, bytes_per_column: int) -> Geometry:
        """How `grid` is tiled when one column of a tile takes `bytes_per_column` of SBUF."""
        reduces = any(
            step.kind in REDUCING or step.kind in ("scan", "shift") for step in self.steps
        )
        totals = any(o.mode == "total" for o in self.outputs)
        rowsums = sum(o.mode == "rowsum" for o in self.outputs)
        rows, cols, bases, pieces = self._share(grid, reduces, totals, rowsums > 0)
        spread = False
        # Rows that are folded together lie in one tile.
        parts = min(rows, PARTITIONS // self._together() * self._together())
        few = rows < SPREAD_ROWS and cols >= SPREAD_COLS
        few = few or rows < PARTITIONS and cols >= SPREAD_COLS * SPREAD_ROWS
        piece = cols if grid.is_flat else grid.cols
        turned = [o for o in grid.operands if o.transposed]
        last = grid.size - (grid.pieces - 1) * grid.cols if grid.is_flat and totals else 0
        alone = self._scans() or self._together() > 1
        if reduces and few and not alone and not grid.is_flat and grid.pieces == 1:
            itemsize = max(o.spec.itemsize for o in grid.operands)
            parts, spread = flat_rows(cols, itemsize), True
            whole, cols = cols, ceil_div(cols, parts)
            parts = ceil_div(whole, cols)
            pieces, piece, last = parts, cols, whole - (parts - 1) * cols
            if turned and (last < cols or any(len(o.cols or ()) != 1 for o in turned)):
                # What is turned needs the same columns in every partition.
                cols, parts, spread = whole, min(rows, PARTITIONS), False
                pieces, piece, last = grid.pieces, cols, 0
        width, group, chunked = self._cut(
            grid, rows, cols, bytes_per_column, spread=spread, reduces=reduces, rowsums=rowsums
        )
        if group > 1 and rows < grid.rows:
            # No core may touch rows of the next one.
            rows = ceil_div(rows, group) * group
            bases = (CORE * rows, 0)
        # Rows that are not there would be folded, or spoil a column that is turned by a product.
        turns = any(o.transposed for o in self.out_operands) and not self.core.pe_transpose_exact
        exact = totals or rowsums > 0 or turns
        return Geometry(
            rows, cols, max(parts, 1), group, width, spread, chunked,
            grid.is_flat and not (reduces or totals), *bases, pieces, piece,
            last if last < cols else 0, exact, grid.is_flat,
        )  # fmt: skip

    def _cut(
        self, grid: Grid, rows: int, cols: int, bytes_per_column: int, *, spread: bool,
        reduces: bool, rowsums: int,
    ) -> tuple[int, int, bool]:  # fmt: skip
        """Columns of a tile, rows in each of its partitions, whether rows come in chunks."""
        room = (self.core.sbuf_partition_bytes - SMALL_BYTES) // max(bytes_per_column, 1)
        full = [o for o in grid.operands if o.kind == "full"] or grid.operands
        itemsize = max(o.spec.itemsize for o in full)
        wide = max(1, min(room, DMA_ROW_BYTES // itemsize))
        if rowsums:
            wide = min(wide, self.core.psum_banks // max(rowsums, 2) * 512)
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
        elif rows > PARTITIONS and cols and not spread and self._together() == 1:
            group = self._group(rows, cols, wide, itemsize)
        return width, group, chunked

    def _group(self, rows: int, cols: int, wide: int, itemsize: int) -> int:
        """Rows per partition of one tile: more than one where rows are short."""
        if cols >= MIN_FREE // 2 and any(_prefers_single_rows(step) for step in self.steps):
            return 1
        per_partition = ceil_div(rows, PARTITIONS)
        enough = ceil_div(PIPELINE_ROW_BYTES, cols * itemsize)
        share = max(ceil_div(per_partition, PIPELINE_TILES), enough)
        turned = any(o.transposed for o in self.grid.operands)
        # Turning takes whole blocks of 128 columns.
        taken = ceil_div(cols, PARTITIONS) * PARTITIONS if turned else cols
        return max(1, min(wide // taken, per_partition, share))

    def _together(self) -> int:
        """Neighbouring rows that a step folds together."""
        folds = [step.operands[0] for step in self.steps if step.kind == "fold_groups"]
        return int(folds[0] or 1) if folds else 1

    def _scans(self) -> bool:
        return any(step.kind in ("scan", "shift", "affine") for step in self.steps)

    def _share(
        self, grid: Grid, reduces: bool, totals: bool, rowsums: bool
    ) -> tuple[int, int, tuple[Index, Index], int]:
        """Rows, columns, first row and column, and pieces of one core's share.

        Only what each core owns is divided: rows that are folded along, columns that are summed
        down. The first core does what cannot be.
        """
        rows, cols, pieces = grid.rows, grid.cols, grid.pieces
        if self.shards == 1 or not rows:
            return rows, cols, (0, 0), pieces
        alone = self.alone or totals or rowsums and (reduces or grid.is_flat)
        # Rows that are not there would spoil those that they are folded with.
        alone = alone or self._together() > 1 and rows % (self.shards * self._together()) > 0
        if grid.is_flat and not alone and not reduces:
            share = flat(ceil_div(grid.length, self.shards), [o.spec for o in grid.operands])
            pieces = self.shards * share.rows
            return share.rows, share.cols, (CORE * share.rows, 0), pieces
        if rows >= self.shards and not alone and not rowsums:
            share_rows = ceil_div(rows, self.shards)
            return share_rows, cols, (CORE * share_rows, 0), pieces
        if reduces or alone or grid.pieces > 1:
            return rows, cols, (CORE * rows, 0), pieces
        share_cols = ceil_div(cols, self.shards)
        return rows, share_cols, (0, CORE * share_cols), pieces


def _prefers_single_rows(step: Step) -> bool:
    """Whether one row per partition is cheaper: bn_stats, per-partition scalars and biases."""
    kinds = {value.kind for value in step.ins}
    return step.kind == "stats" or {"full", "col"} <= kinds


def _even(cols: int, wide: int, at_least: int = 1) -> int:
    """A chunk of at most `wide` columns such that all chunks are about equal."""
    return ceil_div(cols, max(ceil_div(cols, wide), min(at_least, ceil_div(cols, MIN_FREE))))


__all__ = ["Geometry", "Kernel", "Output"]
