"""A bitonic network: whole rows sorted by passes of compare-and-select on VectorE.

A pass compares elements a power of two apart and lets the larger come first (or last, by the bit of
the block they are in). Equal keys keep their order: positions are compared too. Rows lie in
partitions, or one row over all partitions: then the passes between partitions take the partner's
elements through HBM.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.errors import UnsupportedOpError
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.move import Block, RowWalk
from torch_trn.memory import Pool, TileRef, Walk
from torch_trn.program import Builder

__all__ = ["Network", "network_cycles", "padded", "spreads"]

F32, I32, U32 = torch.float32, torch.int32, torch.uint32

#: Bytes of SBUF for one element of a row: two buffers of keys and positions, scratch, the row.
ELEMENT_BYTES = 40

#: Shortest row that is worth spreading over all partitions, and rows up to which it is.
SPREAD_ELEMENTS, SPREAD_ROWS = 2048, 16


def padded(n: int) -> int:
    """The power of two that a row is filled up to."""
    return 1 << max(1, (n - 1).bit_length())


def network_cycles(n: int) -> int:
    """About what a network of ``n`` takes on VectorE: for the choice between programs only."""
    steps = n.bit_length() - 1
    return steps * (steps + 1) // 2 * (9 * n + 11 * 60)


def spreads(core: CoreSpec, n: int, rows: int) -> bool:
    """Whether rows of ``n`` lie over all partitions, one at a time."""
    fits = padded(n) * ELEMENT_BYTES <= core.sbuf_partition_bytes - 8192
    return not fits or n >= SPREAD_ELEMENTS and rows <= SPREAD_ROWS


class Network:
    """Sorts rows of ``n`` in descending order of their keys, with the positions they came from."""

    def __init__(self, b: Builder, n: int, spread: bool) -> None:
        self.b, self.n, self.spread = b, n, spread
        self.size = max(padded(n), 2 * PARTITIONS if spread else 2)
        self.free = self.size // PARTITIONS if spread else self.size
        if self.free * ELEMENT_BYTES > b.core.sbuf_partition_bytes - 8192:
            most = (b.core.sbuf_partition_bytes - 8192) // ELEMENT_BYTES * PARTITIONS
            raise UnsupportedOpError(
                f"aten::{b.name}",
                f"a row of {n} is more than SBUF holds for a sort (about {most}): sort pieces",
            )
        self.parts = PARTITIONS
        size = 4 * self.free
        self.pairs = [(b.sbuf(f"keys{i}", free_bytes=size), b.sbuf(f"places{i}", free_bytes=size))
                      for i in range(2)]  # fmt: skip
        self.at = 0
        self.scratch = [b.sbuf(f"mask{i}", free_bytes=size) for i in range(2)]
        if spread:
            self.partner = [b.sbuf(f"partner{i}", free_bytes=size) for i in range(2)]
            self.passed = [b.hbm(f"passed{i}", nbytes=4 * self.size) for i in range(2)]
            self.row_number = b.sbuf("partition", free_bytes=4)
            self.bits = [b.sbuf(f"bit{i}", free_bytes=4) for i in range(2)]
            b.iota(self.row_number[0].view(I32, (1, 1)), n=1, dtype=I32, channel=1)

    @property
    def keys(self) -> TileRef:
        """The keys as they stand."""
        return self.pairs[self.at][0][0].view(F32, (1, self.free))

    def positions(self) -> TileRef:
        """Where each key came from."""
        return self.pairs[self.at][1][0].view(I32, (1, self.free))

    @property
    def shape(self) -> dict[str, Any]:
        """Of an instruction over all keys."""
        return {"n": self.free, "partitions": self.parts}

    # -- rows in and out -------------------------------------------------------------------------
    def load(self, rows: RowWalk, row: Pool, source: Pool, block: Block, sign: float) -> None:
        """Keys = sign x the rows; what they are filled up with comes last."""
        b, dtype = self.b, rows.part.dtype
        self.at, self.parts = 0, PARTITIONS if self.spread else block.count
        tile = row[0].view(dtype, (1, self.free))
        if self.spread:
            # What the row does not reach keeps this; its sign is turned with the others'.
            low = -math.inf if dtype.is_floating_point else 0.0
            b.memset(tile, value=low * sign if dtype.is_floating_point else 0, dtype=dtype,
                     **self.shape)  # fmt: skip
            walk, count = self._wide(rows)
            runs = PARTITIONS if rows.part.strides[-1] == 1 else PARTITIONS * self.free
            b.load(tile, source[0].window(dtype, walk, PARTITIONS, self.free,
                                          row=block.row * PARTITIONS, offset=rows.part.offset),
                   rows=runs, row_bytes=PARTITIONS * self.free // runs * dtype.itemsize,
                   partitions=PARTITIONS)  # fmt: skip
            b.tensor_scalar(self.keys, tile, op="multiply", operands=(sign,), dtype=dtype,
                            out_dtype=F32, **self.shape)  # fmt: skip
        else:
            rows.load(b, row[0], source, block.row, block.count, 0, self.n)
            given = row[0].view(dtype, (1, self.n))
            b.tensor_scalar(self.keys.pool[0].view(F32, (1, self.n)), given, op="multiply",
                            operands=(sign,), n=self.n, partitions=self.parts, dtype=dtype,
                            out_dtype=F32)  # fmt: skip
        self._number()

    def _number(self) -> None:
        """Positions, and keys beyond the row's end below all others."""
        b, left = self.b, self.size - self.n
        b.iota(self.positions(), dtype=I32, channel=self.free if self.spread else 0, **self.shape)
        if not left:
            return
        if self.spread:
            b.affine_select(self.keys, self.keys, op="is_lt", fill=-math.inf, base=-self.n,
                            channel=self.free, dtype=F32, **self.shape)  # fmt: skip
        else:
            b.memset(self.pairs[0][0][0].view(F32, (1, left), offset=self.n), value=-math.inf,
                     n=left, partitions=self.parts)  # fmt: skip

    def draw(self) -> None:
        """Random keys."""
        b = self.b
        self.at, self.parts = 0, PARTITIONS if self.spread else 1
        bits = self.scratch[0][0].view(U32, (1, self.free))
        b.rng(bits, dtype=U32, **self.shape)
        b.tensor_scalar(self.keys, bits, op="logical_shift_right", operands=(8,), dtype=U32,
                        out_dtype=F32, **self.shape)  # fmt: skip
        self._number()

    def values(self, row: Pool, dtype: torch.dtype, sign: float) -> TileRef:
        """The sorted values."""
        tile = row[0].view(dtype, (1, self.free))
        self.b.tensor_scalar(tile, self.keys, op="multiply", operands=(sign,), dtype=F32,
                             out_dtype=dtype, **self.shape)  # fmt: skip
        return tile

    def _wide(self, rows: RowWalk) -> tuple[Walk, int]:
        """Rows cut into a piece for each partition."""
        part = rows.part
        dims = tuple(zip(part.sizes, part.strides, strict=True))
        return Walk(dims[:-1] or ((1, 0),), dims[-1:], PARTITIONS, self.free), PARTITIONS

    def store(
        self, rows: RowWalk, pool: Pool, tile: TileRef, block: Block, first: int, count: int
    ) -> None:  # fmt: skip
        """Elements ``first`` to ``first + count`` of the sorted rows."""
        part = rows.part
        if not self.spread:
            view = tile.pool[0].view(tile.pattern.dtype, (1, count), offset=first)  # type: ignore[union-attr]
            rows.put(self.b, pool, view, block.row, block.count, count)
            return
        if count == 1:
            at, column = divmod(first, self.free)
            view = tile.pool[0].view(tile.pattern.dtype, (1, 1), offset=column, partition=at,  # type: ignore[union-attr]
                                     partitions=1)  # fmt: skip
            rows.put(self.b, pool, view, block.row, 1, 1)
            return
        # A window as wide as the network: what lies beyond the result is not moved.
        walk, _ = self._wide(rows)
        runs = PARTITIONS if part.strides[-1] == 1 else count
        self.b.store(
            pool[0].window(part.dtype, walk, PARTITIONS, self.free, row=block.row * PARTITIONS,
                           offset=part.offset),
            tile, rows=max(runs, PARTITIONS), partitions=PARTITIONS,
            row_bytes=ceil_div(count, runs) * part.dtype.itemsize)  # fmt: skip

    # -- passes ----------------------------------------------------------------------------------
    def sort(self) -> None:
        """All passes: blocks of 2, 4, ... in turns falling and rising, the last one falling."""
        block = 2
        while block <= self.size:
            apart = block // 2
            while apart:
                if apart < self.free:
                    self._within(block, apart)
                else:
                    self._across(block, apart)
                apart //= 2
            block *= 2

    def _less(self, a: list[TileRef], c: list[TileRef], mask: TileRef, work: TileRef,
              shape: dict[str, Any]) -> None:  # fmt: skip
        """mask = 1 where c comes before a: a larger key, or an equal one from further left."""
        b = self.b
        b.tensor_tensor(mask, a[0], c[0], op="is_equal", **shape)
        b.tensor_tensor(work, a[1], c[1], op="is_gt", dtype=I32, out_dtype=F32, **shape)
        b.tensor_tensor(mask, mask, work, op="multiply", **shape)
        b.tensor_tensor(work, a[0], c[0], op="is_lt", **shape)
        b.tensor_tensor(mask, mask, work, op="max", **shape)

    def _turn(self, block: int, mask: Pool, n: int) -> None:
        """Where blocks rise the larger one goes last: their part of the mask is turned over."""
        b = self.b
        if block >= self.size:
            return
        if block < self.free:
            half = block // 2
            rising = mask[0].view(F32, (block, self.free // (2 * block)), (1, half), offset=half)
            b.tensor_scalar(rising, rising, op="multiply,add", operands=(-1.0, 1.0),
                            n=self.free // 4, partitions=self.parts)  # fmt: skip
            return
        bit = self._bit(0, block // self.free)
        tile = mask[0].view(F32, (1, n))
        b.tensor_scalar(tile, [tile, bit], op="not_equal", operands=(None,), n=n,
                        partitions=self.parts)  # fmt: skip

    def _bit(self, index: int, value: int) -> TileRef:
        """1 in partitions whose number has the bit ``value``."""
        bit = self.bits[index][0].view(F32, (1, 1))
        self.b.tensor_scalar(bit, self.row_number[0].view(I32, (1, 1)), n=1,
                             op="bitwise_and,is_gt", operands=(value, 0), dtype=I32,
                             out_dtype=F32)  # fmt: skip
        return bit

    def _within(self, block: int, apart: int) -> None:
        b, half = self.b, self.free // 2
        dims = ((2 * apart, self.free // (2 * apart)), (1, apart))
        given, to = self.pairs[self.at], self.pairs[1 - self.at]
        shape: dict[str, Any] = {"n": half, "partitions": self.parts}

        def sides(pools: tuple[Pool, Pool], offset: int) -> list[TileRef]:
            return [pool[0].view(kind, *dims, offset=offset)
                    for pool, kind in zip(pools, (F32, I32), strict=True)]  # fmt: skip

        low, high = sides(given, 0), sides(given, apart)
        mask, work = (pool[0].view(F32, (1, half)) for pool in self.scratch)
        self._less(low, high, mask, work, shape)
        self._turn(block, self.scratch[0], half)
        for number, kind in enumerate((F32, I32)):
            first, second = sides(to, 0)[number], sides(to, apart)[number]
            b.select(first, mask, high[number], low[number], dtype=kind, **shape)
            b.select(second, mask, low[number], high[number], dtype=kind, **shape)
        self.at = 1 - self.at

    def _across(self, block: int, apart: int) -> None:
        """Each partition takes its partner's elements and keeps the larger or the smaller ones."""
        b, gap, free = self.b, apart // self.free, self.free
        given, to = self.pairs[self.at], self.pairs[1 - self.at]
        own, other = [], []
        copy: dict[str, Any] = {"rows": PARTITIONS, "row_bytes": 4 * free}
        straight = Walk(((PARTITIONS, free),), ((free, 1),))
        crossed = Walk(
            ((PARTITIONS // (2 * gap), 2 * gap * free), (2, -gap * free), (gap, free)),
            ((free, 1),))  # fmt: skip
        for i, kind in enumerate((F32, I32)):
            own.append(given[i][0].view(kind, (1, free)))
            other.append(self.partner[i][0].view(kind, (1, free)))
            b.store(self.passed[i][0].window(kind, straight, PARTITIONS, free), own[i], **copy)
            b.load(other[i], self.passed[i][0].window(kind, crossed, PARTITIONS, free,
                                                      offset=gap * free), **copy)  # fmt: skip
        mask, work = (pool[0].view(F32, (1, free)) for pool in self.scratch)
        self._less(own, other, mask, work, self.shape)
        self._turn(block, self.scratch[0], free)
        # The upper one of two keeps what the lower one does not take.
        bit = self._bit(1, gap)
        b.tensor_scalar(mask, [mask, bit], op="not_equal", operands=(None,), **self.shape)
        for i, kind in enumerate((F32, I32)):
            result = to[i][0].view(kind, (1, free))
            b.select(result, mask, other[i], own[i], dtype=kind, **self.shape)
        self.at = 1 - self.at
