"""The tiled matrix product that matmuls and convolutions share.

out [m, n] = sum over k of stationary [k, m] x moving [k, n]: k lies on partitions (128 rows of the
array), m is the stationary free size (128), n the moving one (512 columns, one PSUM bank). Each
partition holds consecutive rows of k, so that a load of whole rows is one run per partition.

Two schedules:
* resident: a block of moving columns stays in SBUF for its whole k, all of m streams past it;
* streaming: PSUM holds as many output tiles as it has banks for, both operands stream along k.
The first is used where m is long and a block fits; the second for few rows (decode) and huge k.
An operand whose k is not on partitions in HBM is turned on the way: by the DMA where it can (16-bit
data, trn2 on), else on TensorE. TensorE turns each operand once: a panel that is needed again stays
in SBUF if it fits there, else it is written back turned and read from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch_trn.lowering.gemm_block import BANK, Place, Side, len_of, segments
from torch_trn.lowering.gemm_move import Mover, widths
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.run import loop, spread_over
from torch_trn.lowering.tile import FP32
from torch_trn.memory import Index, TileRef


@dataclass
class Gemm(Mover):
    """One matrix product as loops of a Builder."""

    def run(self) -> None:
        """Emit everything: batch, column blocks, row groups, k."""
        if not (self.m and self.n and self.batch):
            return
        if self.clipped and not self.core.pe_transpose_exact:
            self._fill_tiles()
        with loop(self.b, self.batch, "batch") as batch:
            if self.stationary_fits:
                self._load_all([(self.stationary, batch, 0, 0, self.m_group)], batch)
            for piece in segments(self.n, self.n_block, self.first_columns):
                with loop(self.b, piece.count, "n") as n:
                    again = self.first_columns > 0 and piece.first > 0
                    column = n * piece.size + piece.start
                    self._columns(piece.size, n + piece.first, column, batch, again)

    def _fill_tiles(self) -> None:
        """Zeros where a smaller share brings nothing.

        Where a transpose is a product, what nobody wrote (NaN) would spoil the rows beside it.
        """
        for side in (self.stationary, self.moving):
            for pool in (side.natural, side.pool):
                for slot in range(pool.slots if pool else 0):
                    assert pool
                    n = pool.nbytes // side.dtype.itemsize
                    self.b.memset(pool[slot], value=0.0, n=n, dtype=side.dtype)

    def _columns(self, columns: int, n: Index, column: Index, batch: Index, again: bool) -> None:
        """A column block; `again`: not the first, so that the stationary operand is turned."""
        groups = len_of(segments(self.m, self.m_group, self.first_rows))
        number = batch * len_of(segments(self.n, self.n_block, self.first_columns)) + n
        for piece in segments(self.m, self.m_group, self.first_rows):
            with loop(self.b, piece.count, "m") as m:
                row = m + piece.first
                group = number * groups + row
                place = Place(batch, m * piece.size + piece.start, column, piece.size, columns)
                if not self.resident:
                    moved = self.first_rows > 0 and piece.first > 0
                    self._streaming_group(place, group, (row, n), (again, moved))
                    continue
                still = row if self.kept else group
                loads: list[tuple[Side, Index, Index, Index, int]] = []
                if not (self.kept and again):
                    loads.append((self.stationary, still, row, place.row, piece.size))
                if not piece.first:
                    # The first row group comes block by block with the columns, so that TensorE
                    # can start on the first k block while the others are on their way.
                    loads.append((self.moving, number, n, column, columns))
                self._load_all(loads, batch, again)
                self._resident_group(place, number, group, still)

    def _load_all(
        self, loads: Sequence[tuple[Side, Index, Index, Index, int]], batch: Index,
        again: bool = False,
    ) -> None:  # fmt: skip
        """All k blocks of panels: (operand, place in SBUF, panel, first column, free size)."""
        blocks = self.k_blocks() if loads else []
        count = len_of(blocks)
        for piece in blocks:
            with loop(self.b, piece.count, "k") as block:
                at, k = block + piece.first, block * piece.size + piece.start
                for side, place, panel, first, free in loads:
                    self._load(side, place * count + at, (batch, k, first), free, piece.size,
                               panel * count + at, again)  # fmt: skip

    def _resident_group(self, place: Place, number: Index, group: Index, still: Index) -> None:
        blocks = self.k_blocks()
        count = len_of(blocks)
        tiles = ceil_div(self.m_group, PARTITIONS)
        wide = ceil_div(place.columns, BANK)
        for piece in segments(place.rows, PARTITIONS):
            with loop(self.b, piece.count, "t") as t:
                tile = group * tiles + (t + piece.first)
                first = t * piece.size + piece.start
                for part in blocks:
                    with loop(self.b, part.count, "k") as block:
                        at = block + part.first
                        self._multiply(
                            self._panel(self.stationary, still * count + at),
                            self._panel(self.moving, number * count + at), tile * wide, first,
                            piece.size, place, part.size, at,
                        )  # fmt: skip
                if not blocks:
                    self._clear(tile * wide, piece.size, place.columns)
                self._evict(tile * wide, tile, _part(place, first, piece.size))

    def _streaming_group(
        self, place: Place, group: Index, panels: tuple[Index, Index], again: tuple[bool, bool]
    ) -> None:
        """Output tiles that fill PSUM; both operands (given by panel number) stream along k."""
        blocks = self.k_blocks()
        count, batch = len_of(blocks), place.batch
        wide, tiles = ceil_div(place.columns, BANK), ceil_div(place.rows, PARTITIONS)
        sizes = [min(PARTITIONS, place.rows - at * PARTITIONS) for at in range(tiles)]
        base = 0 if self.shared else group * (wide * tiles)
        for piece in blocks:
            with loop(self.b, piece.count, "k") as block:
                at, k = block + piece.first, block * piece.size + piece.start
                index = group * count + at
                still = index
                if self.stationary_fits:
                    still = batch * count + at
                else:
                    self._load(self.stationary, index, (batch, k, place.row), place.rows,
                               piece.size, panels[0] * count + at, again[0])  # fmt: skip
                self._load(self.moving, index, (batch, k, place.col), place.columns, piece.size,
                           panels[1] * count + at, again[1])  # fmt: skip
                for tile, parts in enumerate(sizes):
                    self._multiply(
                        self._panel(self.stationary, still), self._panel(self.moving, index),
                        base + tile * wide, tile * PARTITIONS, parts, place, piece.size, at,
                    )  # fmt: skip
        for tile, parts in enumerate(sizes):
            if not blocks:
                self._clear(base + tile * wide, parts, place.columns)
            self._evict(base + tile * wide, group * tiles + tile,
                        _part(place, tile * PARTITIONS, parts))  # fmt: skip

    def _bank(self, number: Index) -> TileRef:
        """A PSUM bank of results; shared ones follow those that are never shared."""
        assert self.acc
        if isinstance(number, int) and self.shared and self.turned and number >= self.acc.slots:
            return self.turned[number - self.acc.slots]
        return self.acc[number]

    def _panel(self, side: Side, index: Index) -> TileRef:
        assert side.pool
        return side.pool[index]

    def _multiply(
        self, still: TileRef, moved: TileRef, bank: Index, first: Index, parts: int, place: Place,
        rows: int, block: Index,
    ) -> None:  # fmt: skip
        """A k block of `rows` into the banks of one output tile, whose first row is `first`."""
        shape = self.k_shape(rows)
        packed = 2 if shape.double else 1
        for tile, trips, k in shape.products():
            with loop(self.b, trips, "i") as i:
                at = i * packed + tile
                for chunk, width in enumerate(widths(place.columns)):
                    self.b.nc_matmul(
                        self._bank(bank + chunk),
                        stationary=_rows_of(still, self.stationary, at, place.rows, first, parts,
                                            packed),
                        moving=_rows_of(moved, self.moving, at, place.columns, chunk * BANK, width,
                                        packed),
                        k=k, m=parts, n=width, dtype=self.dtype, accumulate=block + at,
                        double_row=shape.double,
                    )  # fmt: skip

    def _clear(self, bank: Index, parts: int, columns: int) -> None:
        """Without k the product is zero."""
        for chunk, width in enumerate(widths(columns)):
            self.b.memset(self._bank(bank + chunk), value=0.0, n=width, partitions=parts)

    def _evict(self, bank: Index, tile: Index, place: Place) -> None:
        """An output tile from its PSUM banks to HBM."""
        assert self.acc and self.results
        if self.before is not None:
            self.before(place, tile)
        result = self.results[tile]
        dtype = FP32 if self.turn_output else self.out_dtype
        for chunk, width in enumerate(widths(place.columns)):
            part = result.view(dtype, (1, width), offset=chunk * BANK)
            if self.finish is not None:
                self.finish(self._bank(bank + chunk), part, place, chunk * BANK, width)
            else:
                self._copy(part, self._bank(bank + chunk), width, place.rows, FP32, dtype)
        if self.turn_output:
            self._store_turned(result, tile, place)
            return
        out = self.out
        rows = place.rows * ceil_div(place.columns, min(place.columns, out.col_run))
        row_bytes = min(place.columns, out.col_run) * self.out_dtype.itemsize
        self.b.store(
            out.window(place.batch, place.row, place.rows, place.col, place.columns),
            result.view(dtype, (1, place.columns), partitions=place.rows), rows=rows,
            row_bytes=row_bytes, partitions=spread_over(place.rows, rows),
        )  # fmt: skip


def _part(place: Place, first: Index, rows: int) -> Place:
    """`rows` rows of an output block from its row `first` on."""
    return Place(place.batch, place.row + first, place.col, rows, place.columns)


def _rows_of(
    tile: TileRef, side: Side, row: Index, pitch: int, first: Index, count: int, packed: int
) -> TileRef:
    """Columns of one row of k (or two) in each partition of a tile with `pitch` columns."""
    dims = ((1, count),) if packed == 1 else ((pitch, packed), (1, count))
    return tile.view(side.dtype, *dims, offset=row * pitch + first)


__all__ = ["BANK", "Gemm"]
