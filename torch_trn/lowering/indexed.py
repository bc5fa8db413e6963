"""Rows of a table at given numbers: gathers and scatters by indirect DMA, sums of equal numbers.

The row numbers come to SBUF first. What is the same for neighbouring rows (other dims of the table)
is part of the DMA's window; only what the indices choose is added to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from torch_trn.isa import Engine
from torch_trn.lowering.layout import PARTITIONS, ceil_div, product
from torch_trn.lowering.move import Block, blocks, rows_of
from torch_trn.lowering.part import Part
from torch_trn.memory import Index, Pool, TileRef, Walk
from torch_trn.program import Builder

__all__ = ["Gathered", "Number", "gather", "scatter"]

#: Bytes of a gathered row in one partition of a tile.
ROW_BYTES = 16384

#: Rows of a gather that one partition takes in a tile, where they are short.
ROWS_PER_PARTITION = 64

#: fp32 holds integers up to this exactly; beyond it GpSimdE computes, which adds integers natively.
EXACT = 1 << 24


@dataclass(frozen=True)
class Number:
    """An index tensor: its pool, its part of the rows' sizes, and the dim of the table it chooses.

    The dim has ``size`` elements, ``step`` elements apart; ``wraps`` if negative numbers count from
    its end.
    """

    pool: Pool
    part: Part
    size: int
    step: int
    wraps: bool = False


@dataclass(frozen=True)
class Gathered:
    """Rows of a ``table`` and of ``other``, which holds them in order.

    Both parts have the sizes of the rows' dims (``rank`` of them), then those within a row. The
    table does not move along dims that ``numbers`` choose from.
    """

    table: Part
    other: Part
    numbers: tuple[Number, ...]
    rank: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return product(self.other.sizes[: self.rank])

    @property
    def width(self) -> int:
        """Elements of a row."""
        return product(self.other.sizes[self.rank :])

    def front(self, dim: int) -> Gathered:
        """The same rows with row dim ``dim`` first."""
        numbers = tuple(replace(n, part=n.part.front(dim)) for n in self.numbers)
        return replace(
            self, table=self.table.front(dim), other=self.other.front(dim), numbers=numbers
        )

    def insert(self) -> Gathered:
        """The same rows with a first dim of one."""
        numbers = tuple(replace(n, part=n.part.insert(0)) for n in self.numbers)
        return replace(self, table=self.table.insert(0), other=self.other.insert(0),
                       numbers=numbers, rank=self.rank + 1)  # fmt: skip

    def pull(self, dim: int, to: int = 0) -> Gathered:
        """A dim within rows becomes row dim ``to``."""
        size = self.table.sizes[dim]
        order = [axis for axis in range(self.table.ndim) if axis != dim]
        order.insert(to, dim)
        numbers = tuple(replace(n, part=n.part.insert(to, size, 0)) for n in self.numbers)
        return replace(self, table=self.table.permute(order), other=self.other.permute(order),
                       numbers=numbers, rank=self.rank + 1)  # fmt: skip


class Numbers:
    """Loads the row numbers of tiles, and computes them where several indices or signs matter."""

    def __init__(self, b: Builder, numbers: Sequence[Number], free: int, name: str) -> None:
        self.b = b
        self.numbers = numbers
        self.plain = len(numbers) == 1 and not numbers[0].wraps
        wide = max(n.part.dtype.itemsize for n in numbers)
        self.tiles = [
            b.sbuf(f"{name}{i}", free_bytes=free * wide, slots=4 if self.plain else 2)
            for i in range(len(numbers))
        ]
        if not self.plain:
            self.sum = b.sbuf(f"{name}_sum", free_bytes=free * 4, slots=2)
            self.part = b.sbuf(f"{name}_part", free_bytes=free * 4, slots=2)
        span = sum((n.size - 1) * n.step for n in numbers) + 1
        self.engine = Engine.VECTOR if span <= EXACT else Engine.GPSIMD
        self.step = numbers[0].step if len(numbers) == 1 else 1
        self.limit = numbers[0].size if len(numbers) == 1 else span

    @property
    def dtype(self) -> torch.dtype:
        """Of the tiles that ``load`` returns."""
        return self.numbers[0].part.dtype if self.plain else torch.int32

    def load(
        self, number: Index, row: Index, parts: int, per: int, walks: Sequence[Walk],
        spread: bool = False,
    ) -> TileRef:  # fmt: skip
        """The numbers of ``parts`` x ``per`` rows from ``row`` on; with ``spread`` all of ``per``
        rows in every partition."""
        for tile, given, walk in zip(self.tiles, self.numbers, walks, strict=True):
            dtype = given.part.dtype
            if spread:
                window = given.pool[0].window(
                    dtype, Walk(((parts, 0),), walk.rows), parts, per, col=row,
                    offset=given.part.offset)  # fmt: skip
            else:
                window = given.pool[0].window(
                    dtype, walk, parts * per, 1, row=row, offset=given.part.offset)  # fmt: skip
            run = _run(walk.rows, per)
            runs = parts * (per // run if per % run == 0 else per)
            self.b.load(tile[number].view(dtype, (1, per)), window, rows=runs,
                        row_bytes=parts * per // runs * dtype.itemsize,
                        partitions=parts)  # fmt: skip
        shape = (1, per)
        if self.plain:
            return self.tiles[0][number].view(self.dtype, shape, partitions=parts)
        total = self.sum[number].view(torch.int32, shape)
        for i, given in enumerate(self.numbers):
            self._add(total, self.tiles[i][number].view(given.part.dtype, shape), given,
                      self.part[number].view(torch.int32, shape), parts, per, i == 0)  # fmt: skip
        return replace_partitions(total, parts)

    def _add(
        self, total: TileRef, raw: TileRef, given: Number, part: TileRef, parts: int, per: int,
        first: bool,
    ) -> None:  # fmt: skip
        """total (+)= (raw, counted from the end if negative) x step."""
        b, dtype = self.b, given.part.dtype
        shape: dict[str, Any] = {"n": per, "partitions": parts, "out_dtype": torch.int32}
        to = total if first else part
        if given.wraps:
            # The sign's bits are all ones where it is negative: they let the size through.
            sign = dtype.itemsize * 8 - 1
            b.tensor_scalar(to, raw, op="arith_shift_right,bitwise_and",
                            operands=(sign, given.size), dtype=dtype, **shape)  # fmt: skip
            b.tensor_tensor(to, raw, to, op="add", dtype=dtype, engine=self.engine, **shape)
        elif len(self.numbers) > 1:
            b.tensor_copy(to, raw, dtype=dtype, **shape)
        if len(self.numbers) > 1:
            if given.step != 1:
                b.tensor_scalar(to, to, op="multiply", operands=(given.step,), dtype=torch.int32,
                                engine=self.engine, **shape)  # fmt: skip
            if not first:
                b.tensor_tensor(total, total, to, op="add", dtype=torch.int32, engine=self.engine,
                                **shape)  # fmt: skip


def replace_partitions(ref: TileRef, parts: int) -> TileRef:
    """``ref``'s view over ``parts`` partitions."""
    return replace(ref, pattern=replace(ref.pattern, partitions=parts))  # type: ignore[type-var]


@dataclass(frozen=True)
class Tiling:
    """How rows become tiles: walks of table, other and numbers; ``per`` rows in a partition."""

    table: Walk
    other: Walk
    numbers: tuple[Walk, ...]
    runs: tuple[int, int]
    per: int
    width: int
    unit: int


def tiling(found: Gathered, lead: int, per: int | None = None) -> Tiling:
    """Row walks in the order of ``other``, whole rows as columns."""
    rank, width = found.rank, found.width
    rows = [
        Part(part.dtype, part.sizes[:rank], part.strides[:rank])
        for part in (found.other, found.table, *(n.part for n in found.numbers))
    ]
    walked = rows_of(rows, 1, lead=lead)
    walks = [walk.rows + walk.cols for walk in walked.walks]
    cols = [
        tuple((n, s) for n, s in zip(p.sizes[rank:], p.strides[rank:], strict=True) if n != 1)
        for p in (found.other, found.table)
    ]
    itemsize = max(found.other.dtype.itemsize, found.table.dtype.itemsize)
    cut = min(width, ROW_BYTES // itemsize)
    if per is None:
        per = max(1, min(ROWS_PER_PARTITION, ROW_BYTES // (cut * itemsize),
                         ceil_div(found.rows, PARTITIONS)))  # fmt: skip
    return Tiling(
        Walk(walks[1], cols[1]), Walk(walks[0], cols[0]), tuple(Walk(w, ()) for w in walks[2:]),
        (_run(cols[1], cut), _run(cols[0], cut)), per, cut, walked.unit,
    )  # fmt: skip


def _run(cols: Sequence[tuple[int, int]], most: int) -> int:
    run = 1
    for size, step in reversed(cols):
        if size != 1 and step != run:
            break
        run *= size
    return max(1, min(run, most))


def gather(
    b: Builder, found: Gathered, table: Pool, other: Pool, shards: int, lead: int = 0,
    name: str = "row",
) -> None:  # fmt: skip
    """other = the table's rows at the numbers."""
    _moved(b, found, table, other, shards, lead, name, scatters=False)


def scatter(
    b: Builder, found: Gathered, table: Pool, other: Pool | TileRef, shards: int, lead: int = 0,
    name: str = "row",
) -> None:  # fmt: skip
    """The table's rows at the numbers = other; equal numbers leave one of their rows.

    ``other`` in SBUF is one constant tile, as wide as a tile of rows.
    """
    _moved(b, found, table, other, shards, lead, name, scatters=True)


def _moved(
    b: Builder, found: Gathered, table: Pool, other: Pool | TileRef, shards: int, lead: int,
    name: str, scatters: bool,
) -> None:  # fmt: skip
    if not found.rows or not found.width:
        return
    tiles = tiling(found, lead)
    per, width = tiles.per, tiles.width
    numbers = Numbers(b, found.numbers, per, f"{name}_number")
    pieces = ceil_div(found.width, width)
    size = max(found.table.dtype.itemsize, found.other.dtype.itemsize)
    held = other if isinstance(other, TileRef) else None
    rows = None if held else b.sbuf(f"{name}s", free_bytes=per * width * size, slots=3)
    for block in blocks(b, found.rows, PARTITIONS * per, shards, "g", lead=lead, unit=tiles.unit):
        each = ceil_div(block.count, PARTITIONS)
        parts = ceil_div(block.count, each)
        for count, first, row in _even(block, parts, each):
            spots = numbers.load(block.number, row, count, each if first else 1, tiles.numbers)
            for piece in range(pieces):
                rows_here = count * (each if first else 1)
                tile = held or rows[block.number * pieces + piece]  # type: ignore[index]
                _one(b, found, table, other, tiles, numbers, spots, tile, rows_here, count, row,
                     piece, scatters, held is not None)  # fmt: skip


def _even(block: Block, parts: int, each: int) -> list[tuple[int, bool, Index]]:
    """(partitions, whether ``each`` rows are in one, first row) of what a block consists of.

    Never a row beyond the block: it may be another core's.
    """
    full, left = divmod(block.count, each)
    found: list[tuple[int, bool, Index]] = [(full, True, block.row)] if full else []
    if left:
        found.append((left, False, block.row + full * each))
    return found


def _one(
    b: Builder, found: Gathered, table: Pool, other: Pool | TileRef, tiles: Tiling,
    numbers: Numbers, spots: TileRef, tile: TileRef, rows: int, parts: int, row: Index,
    piece: int, scatters: bool, held: bool,
) -> None:  # fmt: skip
    width = min(tiles.width, found.width - piece * tiles.width)
    window: dict[str, Any] = {
        "num_rows": rows,
        "num_cols": width,
        "row": row,
        "col": piece * tiles.width,
    }
    place = table[0].window(
        found.table.dtype, tiles.table, offset=found.table.offset, **window)  # fmt: skip
    # What an SBUF tile holds is always of the table's dtype: the other side's DMA converts.
    view = tile.view(found.table.dtype, (1, rows // parts * width), partitions=parts)
    runs = [min(width, run) for run in tiles.runs]
    indirect: dict[str, Any] = {
        "rows": rows * (width // runs[0]), "row_bytes": runs[0] * found.table.dtype.itemsize,
        "partitions": parts, "index": spots, "index_step": numbers.step,
        "index_limit": numbers.limit}  # fmt: skip
    if held:
        b.store(place, view, **indirect)
        return
    assert isinstance(other, Pool)
    rest = other[0].window(found.other.dtype, tiles.other, offset=found.other.offset, **window)
    straight: dict[str, Any] = {
        "rows": rows * (width // runs[1]), "row_bytes": runs[1] * found.other.dtype.itemsize,
        "partitions": parts}  # fmt: skip
    if scatters:
        b.load(view, rest, **straight)
        b.store(place, view, **indirect)
    else:
        b.load(view, place, **indirect)
        b.store(rest, view, **straight)
