"""What the parts of a tiled matrix product speak of: pieces, blocks of k, operands, strategies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torch_trn.lowering.layout import ceil_div
from torch_trn.lowering.matrix import Matrix
from torch_trn.memory import Index, Pool

#: Columns of one PSUM bank in fp32, and of a moving operand (isa nc_matmul).
BANK = 512

#: k tiles (of 128 rows) that one DMA brings: rows of 2 KiB and more where k is contiguous.
K_BLOCK = 8

#: Stationary columns that one DMA brings, so that rows in HBM are long enough.
M_GROUP = 512


@dataclass(frozen=True)
class Strategy:
    """What may be tried differently for one product; the defaults are the rules of `Plan`."""

    resident: bool | None = None
    """Whether a block of columns stays in SBUF for its whole k; None: where m is long."""
    banks: int = 4
    """PSUM banks of columns in a resident block at most."""
    rows: int = M_GROUP
    """Stationary columns that one load brings at most; fewer leave room for resident blocks."""
    k_tiles: int = K_BLOCK
    """Tiles of 128 rows of k that one load brings at most; fewer let the first product start
    earlier."""
    waiting: int = 2
    """PSUM banks for tiles that TensorE has turned."""
    array_turns: bool = False
    """Turn on TensorE even what the DMA could turn."""


@dataclass(frozen=True)
class Piece:
    """`count` pieces of `size` elements, numbered from `first` on, from element `start` on."""

    first: int
    count: int
    size: int
    start: int


@dataclass(frozen=True)
class KBlock:
    """Rows of k on partitions: `parts` partitions hold `tiles` consecutive rows each.

    The last partition may hold fewer. double: neighbouring rows are packed for double row mode.
    """

    rows: int
    tiles: int
    double: bool

    @property
    def parts(self) -> int:
        """Partitions that hold rows."""
        return ceil_div(self.rows, self.tiles)

    def products(self) -> list[tuple[int, int, int]]:
        """(first tile, how many matmuls, rows of k in each): every row once."""
        packed = 2 if self.double else 1
        last = self.rows - (self.parts - 1) * self.tiles
        found = [(0, last // packed, self.parts * packed)]
        if last < self.tiles:
            found.append((last, (self.tiles - last) // packed, (self.parts - 1) * packed))
        return found


@dataclass
class Side:
    """One operand: a matrix whose rows are k, how it gets onto partitions, and where it is then.

    dtype: what TensorE multiplies (a DMA casts on the way).
    by_dma: whether a transposing DMA turns it where k is what lies next to each other in HBM.
    """

    matrix: Matrix
    dtype: torch.dtype
    by_dma: bool = False
    pool: Pool | None = None
    natural: Pool | None = None
    copy: Pool | None = None
    """HBM that takes the turned panels, for the passes after the first; a part per panel."""

    @property
    def turns(self) -> bool:
        """Whether it must be turned: neighbours in HBM are neighbours in k."""
        matrix = self.matrix
        return matrix.num_cols > 1 and matrix.col_step != 1 and matrix.row_step == 1

    @property
    def on_array(self) -> bool:
        """Whether TensorE turns it."""
        return self.turns and not self.by_dma


@dataclass(frozen=True)
class Place:
    """An output tile: `rows` x `columns` of the product from (row, col) on."""

    batch: Index
    row: Index
    col: Index
    rows: int
    columns: int


def segments(total: int, size: int, first: int = 0) -> list[Piece]:
    """The full pieces of `total`, then the rest.

    first: size of a first piece that is a segment of its own, 0 for none.
    """
    found = []
    start = min(first, total)
    if first:
        found.append(Piece(0, 1, start, 0))
    full, rest = divmod(total - start, size)
    done = len(found)
    found += [Piece(done, full, size, start)] if full else []
    return found + ([Piece(done + full, 1, rest, total - rest)] if rest else [])


def len_of(pieces: Sequence[Piece]) -> int:
    """How many pieces `segments` found."""
    return sum(piece.count for piece in pieces)
