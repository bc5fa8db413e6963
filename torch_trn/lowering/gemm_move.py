"""How operands of a matrix product get onto partitions, and a turned result back to HBM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torch_trn.lowering.gemm_block import BANK, KBlock, Place, Side, segments
from torch_trn.lowering.gemm_plan import Plan
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.run import loop, spread_over
from torch_trn.lowering.tile import FP32
from torch_trn.memory import Index, TileRef


@dataclass
class Mover(Plan):
    """Loads, transposes and copies of one product.

    evictions, turns: copies out of PSUM and banks of transposes so far, which take turns.
    """

    evictions: int = 0
    turns: int = 0

    def _load(
        self, side: Side, index: Index, corner: tuple[Index, Index, Index], free: int, k: int,
        part: Index, again: bool,
    ) -> None:  # fmt: skip
        """One block [k, free] of an operand into its pool; `part`: of its turned copy.

        corner: batch, first row of k and first column of the block.
        """
        assert side.pool
        shape, size = self.k_shape(k), side.dtype.itemsize
        run = shape.tiles * free
        tile = side.pool[index].view(side.dtype, (1, run), partitions=shape.parts)
        if side.on_array and not (side.copy is not None and again):
            self._load_and_turn(side, index, corner, free, shape)
        if side.copy is not None:
            pitch = side.copy.nbytes // side.copy.slots // size
            copy = side.copy[part].matrix(side.dtype, (shape.parts, run), (run, 1),
                                          offset=part * pitch)  # fmt: skip
            if again:
                self.b.load(tile, copy, rows=shape.parts, row_bytes=run * size,
                            queue=self._queue(side))  # fmt: skip
            else:
                self.b.store(copy, tile, rows=shape.parts, row_bytes=run * size, queue="turned")
        elif not side.on_array:
            batch, row, col = corner
            window = side.matrix.window(batch, row, shape.parts * shape.tiles, col, free)
            rows, row_bytes, parts = _descriptors(side, shape, free)
            self.b.load(tile, window, rows=rows, row_bytes=row_bytes,
                        partitions=spread_over(parts, rows), transpose=side.turns,
                        queue=self._queue(side))  # fmt: skip

    def _queue(self, side: Side) -> str:
        """Operands come by queues of their own, so that neither waits for room for the other."""
        assert side.pool
        return side.pool.name

    def _load_and_turn(
        self, side: Side, index: Index, corner: tuple[Index, Index, Index], free: int, shape: KBlock
    ) -> None:
        """Columns of `free` on partitions, then 128x128 transposes, four to a PSUM bank.

        Within a bank each partition takes consecutive columns, as with k.
        """
        assert side.pool and side.natural and self.turned
        b, natural, (batch, row, col) = self.b, side.natural[index], corner
        source, k = side.matrix.turned(), shape.rows
        starts: list[tuple[KBlock, int]] = []
        for chunk, width in enumerate(widths(free)):
            at = KBlock(width, ceil_div(width, PARTITIONS), False)
            offset = chunk * BANK // PARTITIONS * k
            starts.append((at, offset))
            rows, row_bytes = width * ceil_div(k, min(k, source.col_run)), min(k, source.col_run)
            if source.is_dense and k == source.num_cols:
                rows, row_bytes = at.parts, at.tiles * k
            b.load(
                natural.view(side.dtype, (1, at.tiles * k), offset=offset, partitions=at.parts),
                source.window(batch, col + chunk * BANK, at.parts * at.tiles, row, k),
                rows=rows, row_bytes=row_bytes * source.dtype.itemsize,
                partitions=spread_over(at.parts, rows), queue=self._queue(side),
            )  # fmt: skip
        # Several tiles of k share a bank where there are few columns; engines copy in turn, so
        # that an iteration has two copies where it can.
        together = max(1, min(BANK // free, shape.tiles // 2))
        banks, number = 1 + len(starts) % 2, self.turns
        for first, count, rows in _single(shape):
            for piece in segments(count, together * banks):
                with loop(b, piece.count, "i") as i:
                    tile = i * piece.size + (piece.start + first)
                    for step in range(0, piece.size, together):
                        bank = (i * ceil_div(piece.size, together) + number) * len(starts)
                        self._turn_banks(side, index, free, starts, shape, rows, bank, tile + step,
                                         min(together, piece.size - step))  # fmt: skip
                        number += 1
                number += (piece.count - 1) * ceil_div(piece.size, together)
        self.turns = number

    def _turn_banks(
        self, side: Side, index: Index, free: int, starts: Sequence[tuple[KBlock, int]],
        shape: KBlock, rows: int, bank: Index, tile: Index, count: int,
    ) -> None:  # fmt: skip
        """`count` tiles of k from `tile` on, through a bank for each 512 columns."""
        assert side.pool and side.natural and self.turned
        natural, dtype = side.natural[index], side.dtype
        for chunk, (at, offset) in enumerate(starts):
            turned = self.turned[bank + chunk]
            for beside in range(count):
                self._turn(turned, natural, dtype, at, rows, beside * at.rows,
                           (offset, shape, tile + beside))  # fmt: skip
            n = count * at.rows
            place = side.pool[index].view(dtype, (1, n), offset=tile * free + chunk * BANK)
            self._copy(place, turned.view(dtype, (1, n)), n, rows, dtype, dtype)

    def _turn(
        self, bank: TileRef, natural: TileRef, dtype: torch.dtype, at: KBlock, rows: int,
        column: int, source: tuple[int, KBlock, Index],
    ) -> None:  # fmt: skip
        """The columns of one bank and one row of k in each partition, from `column` on.

        source: where the bank's columns begin in the natural tile, its k, which row of k.
        """
        offset, shape, tile = source
        for first, count, parts in at.products():
            for c in range(first, first + count):
                self.b.nc_transpose(
                    bank.view(dtype, (at.tiles, parts), offset=column + c),
                    natural.view(dtype, (shape.tiles, rows),
                                 offset=tile + (offset + c * shape.rows)),
                    partitions=parts, n=rows, dtype=dtype,
                )  # fmt: skip

    def _copy(
        self, dst: TileRef, src: TileRef, n: int, parts: int, dtype: torch.dtype, out: torch.dtype
    ) -> None:
        """PSUM to SBUF, on VectorE and ScalarE in turn."""
        self.evictions += 1
        out_dtype = None if out == dtype else out
        if self.evictions % 2:
            self.b.tensor_copy(dst, src, n=n, partitions=parts, dtype=dtype, out_dtype=out_dtype)
        else:
            self.b.activation(dst, src, op="copy", n=n, partitions=parts, dtype=dtype,
                              out_dtype=out_dtype)  # fmt: skip

    def _store_turned(self, result: TileRef, tile: Index, place: Place) -> None:
        """The result is [n, m] in HBM: turn each bank of columns, then store rows of m.

        A partition takes consecutive columns of the bank, so one store writes them.
        """
        assert self.turned
        b, out, size, parts = self.b, self.out.turned(), self.out_dtype.itemsize, place.rows
        for chunk, width in enumerate(widths(place.columns)):
            at = KBlock(width, ceil_div(width, PARTITIONS), False)
            bank = self.turned[tile + chunk]
            for first, count, rows in at.products():
                for c in range(first, first + count):
                    b.nc_transpose(
                        bank.view(FP32, (1, parts), offset=c * parts),
                        result.view(FP32, (at.tiles, rows), offset=chunk * BANK + c),
                        partitions=parts, n=rows, dtype=FP32,
                    )  # fmt: skip
            turned = at.tiles * parts
            for first, count, rows in at.products():
                # Columns that only some partitions have are copied by themselves.
                self._copy(
                    result.view(self.out_dtype, (1, count * parts),
                                offset=chunk * BANK * 4 // size + first * parts),
                    bank.view(FP32, (1, count * parts), offset=first * parts),
                    count * parts, rows, FP32, self.out_dtype,
                )  # fmt: skip
            run = min(parts, out.col_run)
            descriptors, row_bytes = width * ceil_div(parts, run), run * size
            if out.is_dense and parts == out.num_cols:
                descriptors, row_bytes = at.parts, turned * size
            b.store(
                out.window(place.batch, place.col + chunk * BANK, at.parts * at.tiles, place.row,
                           parts),
                result.view(self.out_dtype, (1, turned), offset=chunk * BANK * 4 // size,
                            partitions=at.parts),
                rows=descriptors, row_bytes=row_bytes,
                partitions=spread_over(at.parts, descriptors),
            )  # fmt: skip


def _single(shape: KBlock) -> list[tuple[int, int, int]]:
    """Rows of k on partitions, one at a time even where they are multiplied two at a time."""
    return KBlock(shape.rows, shape.tiles, False).products()


def _descriptors(side: Side, shape: KBlock, free: int) -> tuple[int, int, int]:
    """(rows, bytes of one, partitions) of the DMA that brings [k, free] to partitions."""
    matrix, size = side.matrix, side.matrix.dtype.itemsize
    if side.turns:
        run = min(shape.rows, matrix.turned().col_run)
        rows = free * ceil_div(shape.rows, run)
        return rows, run * size, min(shape.parts, rows)
    if matrix.is_dense and free == matrix.num_cols:
        return shape.parts, shape.tiles * free * size, shape.parts
    run = min(free, matrix.col_run)
    return shape.rows * ceil_div(free, run), run * size, shape.parts


def widths(columns: int) -> list[int]:
    """Columns in each PSUM bank."""
    return [min(BANK, columns - at) for at in range(0, columns, BANK)]
