"""The few first of long rows: those of each piece of a row, then those of all pieces' first ones.

Pieces of a row lie in partitions side by side, so that a search over a vocabulary uses all of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.move import blocks
from torch_trn.memory import Index, TileRef, Walk

if TYPE_CHECKING:
    from torch_trn.lowering.sort import Order

__all__ = ["by_pieces", "pieces_of", "pieces_cycles"]

F32, I32, U32 = torch.float32, torch.int32, torch.uint32

#: Candidates of one row, all pieces together, that the second search takes.
MOST = 4096

#: Shortest piece of a row that is worth a search of its own.
SHORTEST = 256


def _kept(k: int) -> int:
    """Values that rounds of eight find."""
    return 8 * ceil_div(k, 8)


def pieces_of(rows: int, n: int, k: int) -> int:
    """How many pieces a row is cut into: as many as fill the partitions; 1: not at all."""
    pieces = 1
    while (
        2 * pieces <= PARTITIONS and 2 * pieces * _kept(k) <= MOST
        and n // (2 * pieces) >= max(SHORTEST, 2 * _kept(k))
        and (2 * pieces * rows <= PARTITIONS or n // pieces > 8192)
    ):  # fmt: skip
        pieces *= 2
    return pieces


def pieces_cycles(rows: int, n: int, k: int, pieces: int) -> int:
    """About what both searches take on VectorE."""
    rounds = ceil_div(k, 8)
    first = ceil_div(rows * pieces, PARTITIONS) * (ceil_div(n, pieces) + 160)
    second = ceil_div(rows, PARTITIONS) * (pieces * _kept(k) + 160)
    return 3 * rounds * (first + second)


def by_pieces(order: Order, rows: int, pieces: int) -> None:
    """Both searches of an Order whose rows are cut into ``pieces``.

    A core keeps to its own rows, so candidates never go from one to another.
    """
    work = _Pieces(order, rows, pieces)
    work.first()
    work.second()


class _Pieces:
    """Both searches while they are emitted; candidates pass through HBM."""

    def __init__(self, order: Order, rows: int, pieces: int) -> None:
        self.order, self.b, self.pieces = order, order.b, pieces
        self.rows, self.k8 = rows, _kept(order.k)
        self.width = ceil_div(order.n, pieces)
        self.dtype = order.rows.part.dtype
        self.found = pieces * self.k8
        size = rows * self.found
        kinds = (("keys", F32), ("values", self.dtype), ("places", I32))
        self.passed = [(self.b.hbm(f"candidate_{name}", nbytes=size * kind.itemsize), kind)
                       for name, kind in kinds]  # fmt: skip

    def _rounds(self, keys: TileRef, best: Any, spots: Any, slot: Index, shape: Any) -> None:
        b = self.b
        with b.repeat(self.k8 // 8, "eight") as i:
            eight = best[slot].view(F32, (1, 8), offset=i * 8)
            b.max8(eight, keys, **shape)
            b.nc_find_index8(spots[slot].view(U32, (1, 8), offset=i * 8), keys, eight, **shape)
            b.nc_match_replace8(keys, keys, eight, replacement=-math.inf, **shape)

    def first(self) -> None:
        """The first k of every piece, with their places in the row."""
        b, order, w, k8, dtype = self.b, self.order, self.width, self.k8, self.dtype
        part = order.rows.part
        dims = tuple(zip(part.sizes, part.strides, strict=True))
        walk = Walk(dims[:-1] or ((1, 0),), dims[-1:], self.pieces, w)
        row = b.sbuf("piece", free_bytes=w * dtype.itemsize, slots=2)
        keys = b.sbuf("piece_keys", free_bytes=4 * w)
        sizes = (("best", 4), ("spots", 4), ("values", dtype.itemsize))
        tiles = [b.sbuf(f"piece_{name}", free_bytes=size * k8, slots=2) for name, size in sizes]
        start = b.sbuf("piece_start", free_bytes=4)
        # 128 is a multiple of the pieces: partition p of every block holds piece p mod pieces.
        first = start[0].view(I32, (1, 1))
        b.iota(first, n=1, dtype=I32, channel=1)
        b.tensor_scalar(first, first, op="mod,multiply", operands=(self.pieces, w), n=1, dtype=I32)
        low = (-math.inf * order.sign if dtype.is_floating_point
               else -int(order.sign) * torch.iinfo(dtype).max)  # fmt: skip
        runs = part.strides[-1] == 1
        lead = ceil_div(self.rows, order.shards)
        for block in blocks(b, self.rows * self.pieces, PARTITIONS, order.shards, lead=lead,
                            unit=self.pieces):  # fmt: skip
            parts, held = block.count, row[block.number].view(dtype, (1, w))
            shape: dict[str, Any] = {"n": w, "partitions": parts}
            b.memset(held, value=low, dtype=dtype, **shape)
            b.load(held, order.source[0].window(dtype, walk, parts, w, row=block.row,
                                                offset=part.offset),
                   rows=parts * (1 if runs else w), row_bytes=(w if runs else 1) * dtype.itemsize,
                   partitions=parts)  # fmt: skip
            b.tensor_scalar(keys, held, op="multiply,max", operands=(order.sign, order.lowest),
                            dtype=dtype, out_dtype=F32, **shape)  # fmt: skip
            self._rounds(keys[0].view(F32, (1, w)), tiles[0], tiles[1], block.number, shape)
            spots = tiles[1][block.number].view(I32, (1, k8))
            values = tiles[2][block.number].view(dtype, (1, k8))
            b.local_gather(values, held, spots, n=k8, dtype=dtype, partitions=parts)
            b.tensor_scalar(spots, [spots, first], op="add", operands=(None,), n=k8, dtype=I32,
                            partitions=parts)  # fmt: skip
            best = tiles[0][block.number].view(F32, (1, k8))
            for (pool, kind), tile in zip(self.passed, (best, values, spots), strict=True):
                line = Walk(((self.rows * self.pieces, k8),), ((k8, 1),))
                b.store(pool[0].window(kind, line, parts, k8, row=block.row), tile, rows=parts,
                        row_bytes=k8 * kind.itemsize)  # fmt: skip

    def second(self) -> None:
        """The first k of all candidates of a row."""
        b, order, n, k8 = self.b, self.order, self.found, self.k8
        held = [b.sbuf(f"row_{i}", free_bytes=n * kind.itemsize)
                for i, (_, kind) in enumerate(self.passed)]  # fmt: skip
        best, spots, places = (b.sbuf(f"row_{name}", free_bytes=4 * k8)
                               for name in ("best", "spots", "places"))  # fmt: skip
        values = b.sbuf("row_values", free_bytes=k8 * self.dtype.itemsize)
        walk = Walk(((self.rows, n),), ((n, 1),))
        first = order.k - 1 if order.last else 0
        count = order.k - first
        lead = ceil_div(self.rows, order.shards)
        for block in blocks(b, self.rows, PARTITIONS, order.shards, lead=lead):
            parts = block.count
            views = []
            for tile, (pool, kind) in zip(held, self.passed, strict=True):
                view = tile[0].view(kind, (1, n))
                b.load(view, pool[0].window(kind, walk, parts, n, row=block.row), rows=parts,
                       row_bytes=n * kind.itemsize)  # fmt: skip
                views.append(view)
            shape: dict[str, Any] = {"n": n, "partitions": parts}
            self._rounds(views[0], best, spots, 0, shape)
            at = spots[0].view(I32, (1, count), offset=first)
            results = {}
            for name, tile, view, kind in (
                ("values", values, views[1], self.dtype), ("spots", places, views[2], I32),
            ):  # fmt: skip
                results[name] = tile[0].view(kind, (1, count))
                b.local_gather(results[name], view, at, n=count, dtype=kind, partitions=parts)
            order.stored_as(block.row, parts, results, count)
