"""Scatters that combine: every number's rows are added (or multiplied, compared) into the table.

Equal numbers within one DMA would overwrite each other's result, so they are combined first. 128
rows at a time are compared with each other: a matrix of equal numbers sums the rows of equal ones
on TensorE (for other operators VectorE reduces along it), every row then holds the whole sum, and
it does not matter which of equal rows is stored last. A small table stays in PSUM, summed by a
product with the matrix of which row of it each value belongs to. Where many rows of the table are
independent (a scatter along a dim) each is in a partition of its own, and they take their values
one by one.

The matrix product spreads an infinite value over the rows beside it: 0 x inf is NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from torch_trn.lowering.indexed import Gathered, Numbers
from torch_trn.lowering.layout import PARTITIONS, ceil_div, product
from torch_trn.lowering.move import blocks
from torch_trn.lowering.part import Part
from torch_trn.lowering.run import loop
from torch_trn.memory import Index, Pool, TileRef, Walk
from torch_trn.program import Builder

__all__ = ["NEUTRAL", "combine"]

#: What changes nothing, by operator.
NEUTRAL = {"add": 0.0, "multiply": 1.0, "max": -math.inf, "min": math.inf}

#: Columns of one matmul (a PSUM bank of fp32).
COLUMNS = 512

#: Values of a row that a tile holds at once.
VALUES = 1024

#: Microseconds that 128 compared rows take, and that 128 rows of a partition each take (two DMAs
#: that wait for each other and the instructions between); for the choice between them only.
MATCHED_US, SPREAD_US = 6, 4

#: Banks that sums of a small table may fill, and bytes of its values in a partition.
PSUM_BANKS, VALUE_BYTES = 8, 32768

_MATMUL = (torch.float32, torch.bfloat16, torch.float16)


def combine(
    b: Builder, found: Gathered, outer: int, table: Pool, values: Pool, op: str, shards: int,
    lead: int = 0, scale: float = 1.0,
) -> None:  # fmt: skip
    """table[number] = table[number] op (scale x value) for every row.

    outer: row dims that come first and along which the table moves; rows of different places there
    never meet. op: a key of ``NEUTRAL``.
    """
    if not found.rows or not found.width:
        return
    while op != "add" and found.table.ndim > found.rank:
        found, outer = found.pull(found.rank, outer), outer + 1
    work = _Combine(b, found, outer, table, values, op, scale)
    apart = work.outer_rows
    meeting = work.each
    if op == "add" and apart <= shards and work.small_table():
        work.counted(shards, lead)
        return
    spread_us = ceil_div(apart, PARTITIONS) * meeting * SPREAD_US
    matched_us = apart * ceil_div(meeting, PARTITIONS) * MATCHED_US
    if found.width == 1 and len(found.numbers) == 1 and spread_us < matched_us:
        work.spread(shards, lead)
    else:
        work.matched(shards, lead)


class _Combine:
    """One scatter that combines, while it is emitted."""

    def __init__(
        self, b: Builder, found: Gathered, outer: int, table: Pool, values: Pool, op: str,
        scale: float,
    ) -> None:  # fmt: skip
        self.b, self.found, self.op, self.scale = b, found, op, scale
        self.table, self.values = table, values
        self.outer = outer
        sizes = found.other.sizes
        self.outer_rows = product(sizes[:outer])
        self.unit = product(sizes[1:outer])
        self.each = product(sizes[outer : found.rank])

    def dims(self, part: Part, first: int, last: int) -> tuple[tuple[int, int], ...]:
        return tuple(zip(part.sizes[first:last], part.strides[first:last], strict=True))

    # -- 128 rows compared with each other -------------------------------------------------------
    def matched(self, shards: int, lead: int) -> None:
        b, found, rank = self.b, self.found, self.found.rank
        walks = [Walk(self.dims(n.part, 0, rank), ()) for n in found.numbers]
        self.spots = Numbers(b, found.numbers, 1, "number")
        self.keys = Numbers(b, found.numbers, PARTITIONS, "key")
        kind = found.other.dtype
        self.kind = kind if kind in _MATMUL and self.op == "add" else torch.float32
        self.same = b.sbuf("same", free_bytes=PARTITIONS * self.kind.itemsize, slots=2)
        self._pools()
        for block in blocks(b, self.outer_rows, 1, shards, "o", lead=lead, unit=self.unit):
            full, rest = divmod(self.each, PARTITIONS)
            for trips, parts, done in ((full, PARTITIONS, 0), (1 if rest else 0, rest, full)):
                if not trips:
                    continue
                with loop(b, trips, "t") as t:
                    tile = block.number * ceil_div(self.each, PARTITIONS) + t + done
                    row = block.row * self.each + (t + done) * PARTITIONS
                    self._tile(tile, row, parts, walks)

    def _pools(self) -> None:
        b, found = self.b, self.found
        self.width = min(found.width, COLUMNS) if self.op == "add" else 1
        size = max(found.table.dtype.itemsize, found.other.dtype.itemsize, 4)
        self.old = b.sbuf("old", free_bytes=self.width * size, slots=2)
        self.new = b.sbuf("new", free_bytes=self.width * size, slots=2)
        if self.op == "add":
            self.given = b.sbuf("value", free_bytes=self.width * size, slots=2)
            self.cast = b.sbuf("cast", free_bytes=self.width * 4, slots=2)
            self.total = b.psum("total", free_bytes=4 * self.width, slots=2)
        else:
            self.given = b.sbuf("value", free_bytes=PARTITIONS * size, slots=2)
            self.cast = b.sbuf("cast", free_bytes=PARTITIONS * 4, slots=2)
            self.neutral = b.sbuf("neutral", free_bytes=PARTITIONS * 4)
            b.memset(self.neutral, value=NEUTRAL[self.op], n=PARTITIONS)

    def _tile(self, tile: Index, row: Index, parts: int, walks: list[Walk]) -> None:
        b, found = self.b, self.found
        spots = self.spots.load(tile, row, parts, 1, walks)
        keys = self.keys.load(tile, row, parts, parts, walks, spread=True)
        same = self.same[tile].view(self.kind, (1, parts))
        b.tensor_scalar(same, [keys, spots], op="is_equal", operands=(None,), n=parts,
                        partitions=parts, dtype=self.keys.dtype, out_dtype=self.kind,
                        engine=self.keys.engine)  # fmt: skip
        for at in range(0, found.width, self.width) if self.op == "add" else ():
            self._columns(tile, row, parts, spots, at, min(self.width, found.width - at))
        if self.op != "add":
            self._reduced(tile, row, parts, spots)

    def _old(
        self, tile: Index, row: Index, parts: int, spots: TileRef, at: Index, width: int,
        first: int = 0,
    ) -> tuple[TileRef, TileRef, dict[str, Any]]:  # fmt: skip
        """The table's rows at the numbers: where they were loaded to, their window, the DMA."""
        found, rank = self.found, first or self.found.rank
        dtype = found.table.dtype
        walk = Walk(self.dims(found.table, 0, rank), self.dims(found.table, self.found.rank, 99))
        window = self.table[0].window(
            dtype, walk, parts, width, row=row, col=at, offset=found.table.offset
        )
        run = _run(walk.cols, width)
        numbers = self.spots
        copy: dict[str, Any] = {"rows": parts * (width // run), "row_bytes": run * dtype.itemsize,
                "partitions": parts, "index": spots, "index_step": numbers.step,
                "index_limit": numbers.limit}  # fmt: skip
        old = self.old[tile].view(dtype, (1, width))
        self.b.load(old, window, **copy)
        return old, window, copy

    def _columns(
        self, tile: Index, row: Index, parts: int, spots: TileRef, at: int, width: int
    ) -> None:
        b, found = self.b, self.found
        given = self._values(tile, row, parts, at, width)
        # Equality is symmetric, so the matrix is its own transpose.
        b.nc_matmul(self.total[tile], stationary=self.same[tile].view(self.kind, (1, parts)),
                    moving=given, k=parts, m=parts, n=width, dtype=self.kind)  # fmt: skip
        old, place, copy = self._old(tile, row, parts, spots, at, width)
        new = self.new[tile].view(found.table.dtype, (1, width))
        b.scalar_tensor_tensor(new, self.total[tile], old, op="multiply,add", scalar=self.scale,
                               n=width, partitions=parts)  # fmt: skip
        b.store(place, new, **copy)

    def _reduced(self, tile: Index, row: Index, parts: int, spots: TileRef) -> None:
        b, found, rank = self.b, self.found, self.found.rank
        dtype = found.other.dtype
        # Every partition gets the values of all rows: the window's own rows stand still.
        walk = Walk(((parts, 0),), self.dims(found.other, 0, rank))
        window = self.values[0].window(
            dtype, walk, parts, parts, col=row, offset=found.other.offset
        )
        given = self.given[tile].view(dtype, (1, parts))
        run = _run(walk.cols, parts)
        b.load(given, window, rows=parts * (parts // run), row_bytes=run * dtype.itemsize,
               partitions=parts)  # fmt: skip
        shape: dict[str, Any] = {"n": parts, "partitions": parts}
        chosen = self.cast[tile].view(torch.float32, (1, parts))
        b.select(chosen, self.same[tile].view(self.kind, (1, parts)), given, self.neutral[0],
                 out_dtype=torch.float32, **shape)  # fmt: skip
        b.tensor_reduce(chosen.view(torch.float32, (1, 1)), chosen, op=self.op, **shape)
        old, place, copy = self._old(tile, row, parts, spots, 0, 1)
        new = self.new[tile].view(found.table.dtype, (1, 1))
        b.tensor_tensor(new, old, chosen.view(torch.float32, (1, 1)), op=self.op, n=1,
                        partitions=parts)  # fmt: skip
        b.store(place, new, **copy)

    # -- a small table, whole in PSUM --------------------------------------------------------------
    def small_table(self) -> bool:
        """Whether a product with all of the table's rows is cheaper than going back to HBM."""
        found = self.found
        if len(found.numbers) != 1 or found.numbers[0].wraps or self.each <= PARTITIONS:
            return False
        self.kind = found.other.dtype if found.other.dtype in _MATMUL else torch.float32
        banks = ceil_div(found.numbers[0].size, PARTITIONS) * ceil_div(found.width, COLUMNS)
        most = PSUM_BANKS if self.kind.itemsize == 2 else PSUM_BANKS // 2
        return banks <= most and found.width * 8 <= VALUE_BYTES

    def counted(self, shards: int, lead: int) -> None:
        """Every 128 rows times which row of the table each belongs to, summed in PSUM."""
        b, found = self.b, self.found
        size, width = found.numbers[0].size, found.width
        self.spots = Numbers(b, found.numbers, 1, "number")
        walks = [Walk(self.dims(n.part, 0, found.rank), ()) for n in found.numbers]
        nbytes = width * max(found.other.dtype.itemsize, found.table.dtype.itemsize, 4)
        self.given = b.sbuf("value", free_bytes=nbytes, slots=2)
        self.cast = b.sbuf("cast", free_bytes=4 * width, slots=2)
        self.old, self.new = (b.sbuf(name, free_bytes=nbytes) for name in ("old", "new"))
        row = b.sbuf("table_rows", free_bytes=4 * size)
        which = b.sbuf("which", free_bytes=size * self.kind.itemsize, slots=2)
        chunks = ceil_div(width, COLUMNS)
        slots = ceil_div(size, PARTITIONS) * chunks
        total = b.psum("total", free_bytes=4 * min(width, COLUMNS), slots=slots)
        b.iota(row[0].view(torch.int32, (1, size)), n=size, dtype=torch.int32)
        for block in blocks(b, self.outer_rows, 1, shards, "o", lead=lead, unit=self.unit):
            full, rest = divmod(self.each, PARTITIONS)
            for trips, parts, done in ((full, PARTITIONS, 0), (1 if rest else 0, rest, full)):
                if not trips:
                    continue
                with loop(b, trips, "t") as t:
                    tile = block.number * ceil_div(self.each, PARTITIONS) + t + done
                    place = block.row * self.each + (t + done) * PARTITIONS
                    spots = self.spots.load(tile, place, parts, 1, walks)
                    given = self._values(tile, place, parts, 0, width)
                    mark = which[tile].view(self.kind, (1, size))
                    b.tensor_scalar(mark, [row[0].view(torch.int32, (1, size)), spots],
                                    op="is_equal", operands=(None,), n=size, partitions=parts,
                                    dtype=torch.int32, out_dtype=self.kind)  # fmt: skip
                    for slot in range(slots):
                        at, column = divmod(slot, chunks)
                        m = min(PARTITIONS, size - at * PARTITIONS)
                        n = min(COLUMNS, width - column * COLUMNS)
                        b.nc_matmul(
                            total[slot], k=parts, m=m, n=n, dtype=self.kind,
                            stationary=which[tile].view(self.kind, (1, m), offset=at * PARTITIONS),
                            moving=given.pool[tile].view(self.kind, (1, n),
                                                         offset=column * COLUMNS),
                            accumulate=t if not done else True)  # fmt: skip
            self._add_table(total, block.row, size, chunks)

    def _add_table(self, total: Pool, outer: Index, size: int, chunks: int) -> None:
        """What the table held, and the sums."""
        b, found = self.b, self.found
        dtype, width = found.table.dtype, found.width
        rows = (*self.dims(found.table, 0, self.outer), (size, found.numbers[0].step))
        walk = Walk(rows, self.dims(found.table, found.rank, 99))
        run = _run(walk.cols, width)
        for at in range(0, size, PARTITIONS):
            m = min(PARTITIONS, size - at)
            window = self.table[0].window(dtype, walk, m, width, row=outer * size + at,
                                          offset=found.table.offset)  # fmt: skip
            copy: dict[str, Any] = {"rows": m * (width // run), "partitions": m,
                                    "row_bytes": run * dtype.itemsize}  # fmt: skip
            old, new = (x[0].view(dtype, (1, width)) for x in (self.old, self.new))
            b.load(old, window, **copy)
            for column in range(chunks):
                n, first = min(COLUMNS, width - column * COLUMNS), column * COLUMNS
                b.scalar_tensor_tensor(
                    self.new[0].view(dtype, (1, n), offset=first),
                    total[at // PARTITIONS * chunks + column],
                    self.old[0].view(dtype, (1, n), offset=first), op="multiply,add",
                    scalar=self.scale, n=n, partitions=m)  # fmt: skip
            b.store(window, new, **copy)

    def _values(
        self, tile: Index, row: Index, parts: int, at: int, width: int
    ) -> TileRef:  # fmt: skip
        """Columns of 128 rows of values as TensorE reads them."""
        b, found, rank = self.b, self.found, self.found.rank
        dtype = found.other.dtype
        walk = Walk(self.dims(found.other, 0, rank), self.dims(found.other, rank, 99))
        window = self.values[0].window(
            dtype, walk, parts, width, row=row, col=at, offset=found.other.offset
        )
        given = self.given[tile].view(dtype, (1, width))
        run = _run(walk.cols, width)
        b.load(given, window, rows=parts * (width // run), row_bytes=run * dtype.itemsize,
               partitions=parts)  # fmt: skip
        if dtype != self.kind:
            b.tensor_copy(self.cast[tile], given, n=width, partitions=parts, dtype=dtype,
                          out_dtype=self.kind)  # fmt: skip
            given = self.cast[tile].view(self.kind, (1, width))
        return given

    # -- rows of the table in partitions of their own --------------------------------------------
    def spread(self, shards: int, lead: int) -> None:
        b, found, outer, rank = self.b, self.found, self.outer, self.found.rank
        dtype, spot = found.other.dtype, found.numbers[0].part
        chunk = min(self.each, VALUES)
        self.spots = Numbers(b, found.numbers, 1, "unused")
        number = b.sbuf("number", free_bytes=chunk * spot.dtype.itemsize, slots=2)
        value = b.sbuf("value", free_bytes=chunk * dtype.itemsize, slots=2)
        self.old = b.sbuf("old", free_bytes=8, slots=2)
        self.new = b.sbuf("new", free_bytes=8, slots=2)
        walks = [Walk(self.dims(p, 0, outer), self.dims(p, outer, rank))
                 for p in (spot, found.other)]  # fmt: skip
        for block in blocks(b, self.outer_rows, PARTITIONS, shards, "o", lead=lead, unit=self.unit):
            parts = block.count
            for at in range(0, self.each, chunk):
                width = min(chunk, self.each - at)
                slot = block.number * ceil_div(self.each, chunk) + at // chunk
                for tile, pool, part, walk in (
                    (number, found.numbers[0].pool, spot, walks[0]),
                    (value, self.values, found.other, walks[1]),
                ):
                    run = _run(walk.cols, width)
                    b.load(tile[slot].view(part.dtype, (1, width)),
                           pool[0].window(part.dtype, walk, parts, width, row=block.row, col=at,
                                          offset=part.offset),
                           rows=parts * (width // run), row_bytes=run * part.dtype.itemsize,
                           partitions=parts)  # fmt: skip
                with loop(b, width, "j") as j:
                    self._step(slot * chunk + j, block.row, parts,
                               number[slot].view(spot.dtype, (1, 1), offset=j, partitions=parts),
                               value[slot].view(dtype, (1, 1), offset=j))  # fmt: skip

    def _step(self, tile: Index, row: Index, parts: int, spot: TileRef, value: TileRef) -> None:
        """One value of each row."""
        b = self.b
        old, place, copy = self._old(tile, row, parts, spot, 0, 1, self.outer)
        new = self.new[tile].view(self.found.table.dtype, (1, 1))
        shape: dict[str, Any] = {"n": 1, "partitions": parts}
        if self.scale == 1.0:
            b.tensor_tensor(new, value, old, op=self.op, **shape)
        else:
            b.scalar_tensor_tensor(new, value, old, op=f"multiply,{self.op}", scalar=self.scale,
                                   **shape)  # fmt: skip
        b.store(place, new, **copy)


def _run(cols: tuple[tuple[int, int], ...], most: int) -> int:
    """Contiguous elements at the end of a row."""
    run = 1
    for size, step in reversed(cols):
        if size != 1 and step != run:
            break
        run *= size
    while most % max(1, min(run, most)):
        run -= 1
    return max(1, min(run, most))
