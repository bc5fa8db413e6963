"""The tiled matrix product that matmuls and convolutions share.

out [m, n] = sum over k of stationary [k, m] x moving [k, n]: k lies on partitions (128 rows of the
array), m is the stationary free size (128), n the moving one (512 columns, one PSUM bank).

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

import torch

from torch_trn.lowering.gemm_plan import BANK, Plan, Side, len_of, segments
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.run import loop, spread_over
from torch_trn.lowering.tile import FP32
from torch_trn.memory import Index, TileRef


@dataclass
class Gemm(Plan):
    """One matrix product as loops of a Builder."""

    evictions: int = 0

    def run(self) -> None:
        """Emit everything: batch, column blocks, row groups, k."""
        if not (self.m and self.n and self.batch):
            return
        with loop(self.b, self.batch, "batch") as batch:
            if self.stationary_fits:
                self._load_all([(self.stationary, batch, 0, self.m_group)])
            for first, trips, columns in segments(self.n, self.n_block, self.first_columns):
                with loop(self.b, trips, "n") as n:
                    again = self.first_columns > 0 and first > 0
                    self._columns(columns, n + first, batch, again)

    def _columns(self, columns: int, n: Index, batch: Index, again: bool) -> None:
        """A column block; `again`: not the first, so that the stationary operand is turned."""
        groups = len_of(segments(self.m, self.m_group, self.first_rows))
        number = batch * len_of(segments(self.n, self.n_block, self.first_columns)) + n
        for first, trips, rows in segments(self.m, self.m_group, self.first_rows):
            with loop(self.b, trips, "m") as m:
                row = m + first
                group = number * groups + row
                if not self.resident:
                    moved = self.first_rows > 0 and first > 0
                    self._streaming_group(rows, columns, group, batch, (row, n), (again, moved))
                    continue
                still = row if self.kept else group
                loads: list[tuple[Side, Index, Index, int]] = []
                if not (self.kept and again):
                    loads.append((self.stationary, still, row, rows))
                if not first:
                    # The first row group comes block by block with the columns, so that TensorE
                    # can start on the first k block while the others are on their way.
                    loads.append((self.moving, number, n, columns))
                self._load_all(loads, again)
                self._resident_group(rows, columns, number, group, still)

    def _load_all(
        self, loads: Sequence[tuple[Side, Index, Index, int]], again: bool = False
    ) -> None:
        """All k blocks of panels, given as (operand, place in SBUF, panel, free size)."""
        blocks = self._k_blocks() if loads else []
        count = sum(trips for _, trips, _ in blocks)
        for first, trips, k in blocks:
            with loop(self.b, trips, "k") as block:
                for side, place, panel, free in loads:
                    at = block + first
                    self._load(side, place * count + at, free, k, panel * count + at, again)

    def _k_blocks(self) -> list[tuple[int, int, int]]:
        """(first, count, rows of k) of the k blocks."""
        return segments(self.k, self.k_block * PARTITIONS)

    def _resident_group(
        self, rows: int, columns: int, number: Index, group: Index, still: Index
    ) -> None:
        blocks = self._k_blocks()
        count = sum(trips for _, trips, _ in blocks)
        tiles = ceil_div(self.m_group, PARTITIONS)
        wide = ceil_div(columns, BANK)
        for first, trips, parts in segments(rows, PARTITIONS):
            with loop(self.b, trips, "t") as t:
                tile = group * tiles + (t + first)
                for start, repeats, k in blocks:
                    with loop(self.b, repeats, "k") as block:
                        self._multiply(
                            still * count + (block + start), number * count + (block + start),
                            tile * wide, parts, columns, k,
                        )  # fmt: skip
                self._evict(tile * wide, tile, parts, columns)

    def _streaming_group(
        self, rows: int, columns: int, group: Index, batch: Index, panels: tuple[Index, Index],
        again: tuple[bool, bool],
    ) -> None:  # fmt: skip
        """Output tiles that fill PSUM; both operands (given by panel number) stream along k."""
        blocks = self._k_blocks()
        count = sum(trips for _, trips, _ in blocks)
        wide, tiles = ceil_div(columns, BANK), ceil_div(rows, PARTITIONS)
        sizes = [min(PARTITIONS, rows - at * PARTITIONS) for at in range(tiles)]
        base = 0 if self.shared else group * (wide * tiles)
        for start, repeats, k in blocks:
            with loop(self.b, repeats, "k") as block:
                at = block + start
                index = group * count + at
                still = index
                if self.stationary_fits:
                    still = batch * count + at
                else:
                    self._load(self.stationary, index, rows, k, panels[0] * count + at, again[0])
                self._load(self.moving, index, columns, k, panels[1] * count + at, again[1])
                for tile, parts in enumerate(sizes):
                    self._multiply(still, index, base + tile * wide, parts, columns, k)
        for tile, parts in enumerate(sizes):
            self._evict(base + tile * wide, group * tiles + tile, parts, columns)

    def _bank(self, number: Index) -> TileRef:
        """A PSUM bank of results; shared ones follow those that are never shared."""
        assert self.acc
        if isinstance(number, int) and self.shared and self.turned and number >= self.acc.slots:
            return self.turned[number - self.acc.slots]
        return self.acc[number]

    def _multiply(
        self, still: Index, moved: Index, bank: Index, parts: int, columns: int, k: int
    ) -> None:
        """One k block into the PSUM banks of one output tile."""
        assert self.stationary.pool and self.moving.pool and self.acc
        for _, trips, rows in segments(k, self.k_rows):
            with loop(self.b, trips, "i"):
                for chunk, width in enumerate(_widths(columns)):
                    self.b.nc_matmul(
                        self._bank(bank + chunk), stationary=self.stationary.pool[still],
                        moving=self.moving.pool[moved], k=rows, m=parts, n=width,
                        dtype=self.dtype, accumulate=True, double_row=rows > PARTITIONS,
                    )  # fmt: skip

    # -- data movement -------------------------------------------------------------------------
    def _load(self, side: Side, index: Index, free: int, k: int, part: Index, again: bool) -> None:
        """One block [k, free] of an operand into its pool; `part`: of its turned copy."""
        assert side.pool
        size, b = side.dtype.itemsize, self.b
        rows, row_bytes = min(k, PARTITIONS), ceil_div(k, PARTITIONS) * free * size
        if side.copy is not None and again:
            b.load(side.pool[index], side.copy[part], rows=rows, row_bytes=row_bytes)
        elif side.copy is not None:
            self._load_and_turn(side, index, free, k)
            b.store(side.copy[part], side.pool[index], rows=rows, row_bytes=row_bytes,
                    queue="turned")  # fmt: skip
        elif side.layout == "vector":
            b.load(side.pool[index], side.source, rows=min(k, PARTITIONS),
                   row_bytes=ceil_div(k, PARTITIONS) * size)  # fmt: skip
        elif side.layout == "k_major":
            pieces = ceil_div(free, min(free, side.run))
            b.load(side.pool[index], side.source, rows=k * pieces,
                   row_bytes=ceil_div(free, pieces) * size,
                   partitions=spread_over(min(k, PARTITIONS), k * pieces))  # fmt: skip
        elif side.layout == "scattered":
            b.load(side.pool[index], side.source, rows=k * free, row_bytes=size,
                   partitions=spread_over(min(k, PARTITIONS), k * free))  # fmt: skip
        elif not self._on_tensor_engine(side):
            pieces = ceil_div(k, min(k, side.run))
            rows = free * pieces
            b.load(side.pool[index], side.source, rows=rows, row_bytes=ceil_div(k, pieces) * size,
                   partitions=spread_over(min(k, PARTITIONS, rows), rows),
                   transpose=True)  # fmt: skip
        else:
            self._load_and_turn(side, index, free, k)

    def _load_and_turn(self, side: Side, index: Index, free: int, k: int) -> None:
        """Rows of `free` on partitions, then 128x128 transposes, four to a PSUM bank."""
        assert side.pool and side.natural and self.turned
        b, size = self.b, side.dtype.itemsize
        pieces = ceil_div(k, min(k, side.run))
        b.load(side.natural[index], side.source, rows=free * pieces,
               row_bytes=ceil_div(k, pieces) * size,
               partitions=spread_over(min(free, PARTITIONS), free * pieces))  # fmt: skip
        for _, trips, rows in segments(k, PARTITIONS):
            with loop(b, trips, "i") as i:
                for chunk, width in enumerate(_widths(free)):
                    bank = self.turned[i + chunk]
                    for at in range(0, width, PARTITIONS):
                        b.nc_transpose(
                            bank, side.natural[index], partitions=min(PARTITIONS, width - at),
                            n=rows, dtype=side.dtype,
                        )  # fmt: skip
                    self._copy(side.pool[index], bank, width, rows, side.dtype)

    def _copy(self, dst: TileRef, src: TileRef, n: int, parts: int, dtype: torch.dtype) -> None:
        """PSUM to SBUF, on VectorE and ScalarE in turn."""
        self.evictions += 1
        given = {"n": n, "partitions": parts, "dtype": FP32}
        if self.evictions % 2:
            self.b.tensor_copy(dst, src, out_dtype=_other(dtype), **given)  # type: ignore[arg-type]
        else:
            self.b.activation(dst, src, op="copy", out_dtype=_other(dtype), **given)  # type: ignore[arg-type]

    def _evict(self, bank: Index, tile: Index, parts: int, columns: int) -> None:
        """An output tile from its PSUM banks to HBM."""
        assert self.acc and self.results
        if self.before is not None:
            self.before(parts, columns)
        result = self.results[tile]
        for chunk, width in enumerate(_widths(columns)):
            if self.finish is not None:
                self.finish(self._bank(bank + chunk), result, parts, width)
            else:
                dtype = FP32 if self.turn_output else self.out_dtype
                self._copy(result, self._bank(bank + chunk), width, parts, dtype)
        if self.turn_output:
            self._store_turned(result, tile, parts, columns)
            return
        pieces = ceil_div(columns, min(columns, self.out_run))
        rows = parts * pieces
        self.b.store(
            self.out, result, rows=rows,
            row_bytes=ceil_div(columns, pieces) * self.out_dtype.itemsize,
            partitions=spread_over(parts, rows),
        )  # fmt: skip

    def _store_turned(self, result: TileRef, tile: Index, parts: int, columns: int) -> None:
        """The result is [n, m] in HBM: turn each 128 columns, then store rows of m."""
        assert self.turned
        b = self.b
        for chunk, width in enumerate(_widths(columns)):
            blocks = ceil_div(width, PARTITIONS)
            for at in range(0, width, PARTITIONS):
                b.nc_transpose(self.turned[tile + chunk], result, partitions=parts,
                               n=min(PARTITIONS, width - at), dtype=FP32)  # fmt: skip
            self._copy(result, self.turned[tile + chunk], blocks * parts,
                       min(PARTITIONS, width), self.out_dtype)  # fmt: skip
        b.store(self.out, result, rows=columns, row_bytes=parts * self.out_dtype.itemsize)


def _other(dtype: torch.dtype) -> torch.dtype | None:
    return None if dtype == FP32 else dtype


def _widths(columns: int) -> list[int]:
    return [min(BANK, columns - at) for at in range(0, columns, BANK)]


__all__ = ["BANK", "Gemm", "Side"]
