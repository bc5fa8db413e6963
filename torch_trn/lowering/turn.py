"""Tiles whose rows lie along memory: loaded (or stored) in HBM order and turned on TensorE."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from torch_trn.lowering.extent import Extent
from torch_trn.lowering.layout import PARTITIONS, Operand, ceil_div, walk_of
from torch_trn.lowering.pools import spread_over
from torch_trn.lowering.tile import Output, Value
from torch_trn.memory import Index, Pool, TileRef, Walk, affine

if TYPE_CHECKING:
    from torch_trn.lowering.kernel import Geometry
    from torch_trn.lowering.run import Runner

#: Row within its partition, block of 128 columns, first column in the bank, columns.
Piece = tuple[int, Index, int, int]

#: Columns of 32 bits in one PSUM bank.
BANK_COLUMNS = 512


class Turner:
    """Turned loads and stores of a Runner.

    The natural tile holds, for each block of 128 columns, a column in each partition and all rows
    of the tile along the free dimension.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.b = runner.b

    def load(
        self, value: Value, operand: Operand, source: Pool, extent: Extent, geometry: Geometry
    ) -> bool:
        """Fetch columns onto partitions, then turn them; False if plain descriptors are as good."""
        b, runner = self.b, self.runner
        itemsize, columns = operand.spec.itemsize, extent.group * extent.width
        if itemsize == 2 and b.core.name != "NeuronCore-v2":
            # The DMA transposes 16-bit data on the way from trn2 on (arch3).
            place = runner.window(operand, "full", source, extent, geometry)
            # The DMA's rows are columns of the tile, which may have more partitions than those.
            tile = runner.ref(value).view(operand.spec.dtype, (1, columns), partitions=extent.parts)
            b.load(tile, place, rows=columns, row_bytes=extent.parts * itemsize,
                   partitions=spread_over(extent.parts, columns), transpose=True)  # fmt: skip
            return True
        natural = runner.scratches["natural"][runner.index["full"]]
        rows = extent.parts * extent.group
        for first, count, size in _blocks(extent.width):
            from torch_trn.lowering.run import loop

            with loop(b, count, "t") as t:
                block = affine(t) + first
                place = self._window(operand, source, extent, geometry, block, size)
                tile = natural.view(operand.spec.dtype, (1, rows), offset=block * rows)
                b.load(tile, place, rows=size, row_bytes=rows * itemsize)
        self._turn(value, operand, extent, natural, to_tile=True)
        return True

    def store(self, output: Output, operand: Operand, extent: Extent, geometry: Geometry) -> None:
        """Turn a tile so that what is contiguous in HBM lies along the free dimension."""
        from torch_trn.lowering.run import loop

        b, runner = self.b, self.runner
        natural = runner.scratches["natural"][runner.index["full"]]
        rows = extent.parts * extent.group
        self._turn(output.value, operand, extent, natural, to_tile=False)
        target = runner.results[output.index]
        for first, count, size in _blocks(extent.width):
            with loop(b, count, "t") as t:
                block = affine(t) + first
                place = self._window(operand, target, extent, geometry, block, size)
                tile = natural.view(operand.spec.dtype, (1, rows), offset=block * rows)
                b.store(place, tile, rows=size, row_bytes=rows * operand.spec.itemsize)

    def _window(
        self, operand: Operand, pool: Pool, extent: Extent, geometry: Geometry, block: Index,
        size: int,
    ) -> TileRef:  # fmt: skip
        """`size` columns from `block` on, each with all rows of the tile."""
        walk = walk_of(operand, self.runner.grid, geometry.pieces, geometry.piece)
        if walk.pieces == 1:
            walk = Walk(walk.cols, walk.rows)
        else:
            ((_, step),) = walk.cols
            cut = (walk.pieces, walk.width * step)
            walk = Walk(((walk.width, step),), (*walk.rows, cut))
        col = affine(extent.col) + affine(block) * PARTITIONS
        return pool[0].window(
            operand.spec.dtype, walk, size, extent.parts * extent.group, row=col, col=extent.row,
            offset=operand.offset,
        )  # fmt: skip

    def _turn(
        self, value: Value, operand: Operand, extent: Extent, natural: TileRef, to_tile: bool
    ) -> None:
        """Between the natural tile and the value's, one PSUM bank at a time, by words of a bank."""
        from torch_trn.lowering.run import loop

        itemsize = operand.spec.itemsize
        words = max(1, itemsize // 4)
        simple = itemsize <= 4 and not operand.spec.dtype.is_complex
        word = operand.spec.dtype if simple else torch.int32
        tile = self.runner.ref(value)
        for word_at in range(words):
            if extent.group == 1:
                full, rest = divmod(extent.width, BANK_COLUMNS)
                for first, count, size in ((0, full, BANK_COLUMNS), (full, 1, rest)):
                    if not count or not size:
                        continue
                    with loop(self.b, count, "t") as t:
                        bank = affine(t) + first
                        pieces: list[Piece] = [
                            (0, bank * 4 + at // PARTITIONS, at, min(PARTITIONS, size - at))
                            for at in range(0, size, PARTITIONS)
                        ]
                        self._bank(tile, natural, extent, pieces, bank, bank * BANK_COLUMNS, size,
                                   word, words, word_at, to_tile)  # fmt: skip
                continue
            for number, (start, size, held) in enumerate(_banks(extent)):
                self._bank(tile, natural, extent, held, number, start, size, word, words,
                           word_at, to_tile)  # fmt: skip

    def _bank(
        self, tile: TileRef, natural: TileRef, extent: Extent,
        pieces: list[Piece], number: Index, start: Index, size: int,
        word: torch.dtype, words: int, word_at: int, to_tile: bool,
    ) -> None:  # fmt: skip
        """Turn (row in partition, block, place in the bank, columns) pieces of one bank."""
        b, bank = self.b, self.runner.scratches["turned"][number]
        group, parts = extent.group, extent.parts
        rows = parts * group
        if to_tile:
            for row, block, at, count in pieces:
                source = natural.view(
                    word, (group * words, parts),
                    offset=(affine(block) * rows + row) * words + word_at,
                )  # fmt: skip
                b.nc_transpose(bank.view(word, (1, count), offset=at), source, partitions=count,
                               n=parts, dtype=word)  # fmt: skip
            place = tile.view(word, (words, size), offset=affine(start) * words + word_at)
            b.tensor_copy(place, bank, n=size, partitions=parts, dtype=word)
            return
        for at in range(0, len(pieces), BANK_COLUMNS // PARTITIONS):
            some = pieces[at : at + BANK_COLUMNS // PARTITIONS]
            for slot, (_, _, within, count) in enumerate(some):
                source = tile.view(
                    word, (words, count), offset=(affine(start) + within) * words + word_at
                )
                b.nc_transpose(bank.view(word, (1, parts), offset=slot * parts), source,
                               partitions=parts, n=count, dtype=word)  # fmt: skip
            self._to_natural(natural, bank, some, extent, word, words, word_at)

    def _to_natural(
        self, natural: TileRef, bank: TileRef, pieces: list[Piece],
        extent: Extent, word: torch.dtype, words: int, word_at: int,
    ) -> None:  # fmt: skip
        """What stands in a bank, block beside block, to its places in the natural tile."""
        group, parts = extent.group, extent.parts
        rows = parts * group
        even = group == 1 and all(count == PARTITIONS for _, _, _, count in pieces)
        if even:
            place = natural.view(
                word, (rows * words, len(pieces)), (words, parts),
                offset=affine(pieces[0][1]) * (rows * words) + word_at,
            )  # fmt: skip
            self.b.tensor_copy(place, bank, n=len(pieces) * parts, dtype=word)
            return
        for slot, (row, block, _, count) in enumerate(pieces):
            place = natural.view(
                word, (group * words, parts),
                offset=(affine(block) * rows + row) * words + word_at,
            )  # fmt: skip
            source = bank.view(word, (1, parts), offset=slot * parts)
            self.b.tensor_copy(place, source, n=parts, partitions=count, dtype=word)


def _blocks(width: int) -> list[tuple[int, int, int]]:
    """(first, count, columns) of the blocks of 128 columns that are alike."""
    full, rest = divmod(width, PARTITIONS)
    return [(at, n, size) for at, n, size in ((0, full, PARTITIONS), (full, 1, rest)) if n and size]


def _banks(extent: Extent) -> list[tuple[int, int, list[Piece]]]:
    """(first column, columns, pieces) of the banks that the rows of one partition fill together."""
    found: list[tuple[int, int, list[Piece]]] = []
    for row in range(extent.group):
        for block in range(ceil_div(extent.width, PARTITIONS)):
            size = min(PARTITIONS, extent.width - block * PARTITIONS)
            if not found or found[-1][1] + size > BANK_COLUMNS:
                found.append((row * extent.width + block * PARTITIONS, 0, []))
            start, held, pieces = found[-1]
            pieces.append((row, block, held, size))
            found[-1] = (start, held + size, pieces)
    return found
