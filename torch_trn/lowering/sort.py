"""Order: topk, sort, median and their kin, on VectorE.

A few of a row: rounds of max8, which finds the eight largest, their positions (nc_find_index8) and
takes them out (nc_match_replace8). Whole rows: a bitonic network (network.py). Engines compare in
fp32, so integers beyond 2^24 that differ in their last bits count as equal.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.errors import UnsupportedOpError
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.candidates import by_pieces, pieces_cycles, pieces_of
from torch_trn.lowering.fill import named
from torch_trn.lowering.layout import PARTITIONS, ceil_div, product
from torch_trn.lowering.move import RowWalk, blocks, fill, inputs_of, mover, outputs_of, tiles_of
from torch_trn.lowering.network import Network, network_cycles, padded, spreads
from torch_trn.lowering.part import Part
from torch_trn.lowering.registry import host_only, lowering
from torch_trn.memory import Index, Pool, TileRef
from torch_trn.program import Builder, Program

__all__ = ["Order"]

F32, I32, U32 = torch.float32, torch.int32, torch.uint32

#: Values that one max8 gives.
EIGHT = 8

#: The largest finite fp32 number: infinite values count as that, so that what is taken out is less.
LARGEST = torch.finfo(F32).max

#: Elements of a piece of a row that a partition holds beside its keys.
LONGEST_PIECE = 8192

#: Indices of one local_gather (isa).
GATHERED = 4096


class Order:
    """The k first of each row in descending (or ascending) order, or the k-th alone."""

    def __init__(
        self, call: OpCall, core: CoreSpec, shards: int, x: Part, dim: int, k: int, *,
        largest: bool, only_last: bool = False,
    ) -> None:  # fmt: skip
        self.b: Builder = mover(core, call.name)
        self.source = inputs_of(self.b, call)[0]
        self.results = outputs_of(self.b, call)
        self.outs = call.outs
        # argsort returns positions alone, a median of all elements its value alone.
        self.kinds = ("spots",) if "argsort" in call.name else ("values", "spots")[: len(call.outs)]
        self.shards, self.k, self.sign = shards, k, 1.0 if largest else -1.0
        self.dim, self.last, self.lowest = dim, only_last, -LARGEST
        x = x if x.ndim else x.insert(0)
        order = [*(axis for axis in range(x.ndim) if axis != dim), dim]
        self.rows = RowWalk.of(x.permute(order), x.permute(order).sizes[:-1])
        self.n = x.sizes[dim]
        self.lead = self.rows.part.sizes[:-1]
        self.stored = [self._stored(Part.of(out), order) for out in call.outs]

    def _stored(self, out: Part, order: list[int]) -> RowWalk:
        """A result as rows of what is kept of each."""
        if out.ndim == len(order):
            out = out.permute(order)
        elif out.numel == product(self.lead):
            out = out.insert(out.ndim)
        return RowWalk.of(out, self.lead)

    def program(self) -> Program:
        """The whole Program."""
        rows = product(self.lead)
        if not (rows and self.n and self.k) or not self.outs[0].numel:
            return self.b.build()
        by_rounds = 3 * ceil_div(self.k, EIGHT) * (self.n + 160)
        whole = padded(self.n)
        share = ceil_div(rows, self.shards)
        fits = self.n * (8 + self.rows.part.dtype.itemsize) + 16 * self.k + 8192
        pieces = pieces_of(share, self.n, self.k)
        if pieces > 1:
            cost = pieces_cycles(share, self.n, self.k, pieces)
            whole_cost = min(by_rounds, network_cycles(whole)) * ceil_div(share, PARTITIONS)
            if self.n // pieces <= LONGEST_PIECE and cost < whole_cost:
                by_pieces(self, rows, pieces)
                return self.b.build()
        if fits <= self.b.core.sbuf_partition_bytes and by_rounds <= network_cycles(whole):
            self._by_rounds(rows)
        else:
            self._by_network(rows, spread=spreads(self.b.core, self.n, share))
        return self.b.build()

    # -- rounds of eight -------------------------------------------------------------------------
    def _by_rounds(self, rows: int) -> None:
        b, n, rounds = self.b, self.n, ceil_div(self.k, EIGHT)
        dtype = self.rows.part.dtype
        row = b.sbuf("row", free_bytes=n * dtype.itemsize, slots=2 if n <= GATHERED else 1)
        keys = b.sbuf("keys", free_bytes=4 * n)
        best = b.sbuf("best", free_bytes=4 * EIGHT * rounds)
        spots = b.sbuf("spots", free_bytes=4 * EIGHT * rounds, slots=2)
        picked = b.sbuf("picked", free_bytes=self.k * dtype.itemsize, slots=2)
        for block in blocks(b, rows, PARTITIONS, self.shards):
            held = row[block.number].view(dtype, (1, n))
            self.rows.load(b, held, self.source, block.row, block.count, 0, n)
            shape: dict[str, Any] = {"n": n, "partitions": block.count}
            # Infinite values count as the largest finite ones: less is only what is taken out.
            b.tensor_scalar(keys, held, op="multiply,max", operands=(self.sign, -LARGEST),
                            dtype=dtype, out_dtype=F32, **shape)  # fmt: skip
            with b.repeat(rounds, "eight") as i:
                eight = best[0].view(F32, (1, EIGHT), offset=i * EIGHT)
                b.max8(eight, keys, **shape)
                b.nc_find_index8(
                    spots[block.number].view(U32, (1, EIGHT), offset=i * EIGHT), keys, eight,
                    **shape)  # fmt: skip
                b.nc_match_replace8(keys, keys, eight, replacement=-math.inf, **shape)
            first = self.k - 1 if self.last else 0
            count = self.k - first
            place = spots[block.number].view(U32, (1, count), offset=first)
            taken = picked[block.number]
            for at in range(0, count, GATHERED):
                size = min(GATHERED, count - at)
                b.local_gather(
                    taken.view(dtype, (1, size), offset=at), held,
                    spots[block.number].view(U32, (1, size), offset=first + at), n=size,
                    dtype=dtype, partitions=block.count)  # fmt: skip
            values = taken.view(dtype, (1, count))
            self.stored_as(block.row, block.count, {"values": values, "spots": place}, count)

    def stored_as(
        self, row: Index, parts: int, tiles: dict[str, TileRef], count: int
    ) -> None:  # fmt: skip
        """Values and places of some rows to the results."""
        for kind, walk, pool in zip(self.kinds, self.stored, self.results, strict=True):
            walk.put(self.b, pool, tiles[kind], row, parts, count)

    # -- whole rows ------------------------------------------------------------------------------
    def _by_network(self, rows: int, spread: bool) -> None:
        work = Network(self.b, self.n, spread)
        dtype = self.rows.part.dtype
        row = self.b.sbuf("row", free_bytes=work.free * dtype.itemsize)
        first = self.k - 1 if self.last else 0
        for block in blocks(self.b, rows, 1 if spread else PARTITIONS, self.shards):
            work.load(self.rows, row, self.source, block, self.sign)
            work.sort()
            tiles = {"values": work.values(row, dtype, self.sign), "spots": work.positions()}
            for kind, walk, pool in zip(self.kinds, self.stored, self.results, strict=True):
                work.store(walk, pool, tiles[kind], block, first, self.k - first)


def _dim(x: TensorSpec, dim: Any) -> int:
    return dim % x.ndim if isinstance(dim, int) and x.ndim else max(x.ndim - 1, 0)


@lowering("aten::topk")
def topk(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(self, k, dim, largest, sorted)."""
    x, k = call.args[:2]
    work = Order(call, core, shards, Part.of(x), _dim(x, call.arg(2, -1)), k,
                 largest=call.arg(3, True))  # fmt: skip
    return work.program()


@lowering("aten::sort", "aten::argsort", "aten::msort")
def sort(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(self, dim, descending) or, stable, (self, stable, dim, descending)."""
    x, given = call.args[0], named(call)
    dim = 0 if "msort" in call.name else _dim(x, given.get("dim", -1))
    n = x.shape[dim] if x.ndim else 1
    work = Order(call, core, shards, Part.of(x), dim, n, largest=given.get("descending", False))
    return work.program()


@lowering("aten::kthvalue", "aten::median")
def kth_value(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """One order statistic: rounds until it is out. Without a dim the median is of all elements."""
    given, x = named(call), call.args[0]
    part, dim = Part.of(x), _dim(x, given.get("dim", -1))
    if not x.numel:
        b = mover(core, call.name)
        if call.outs[0].numel and call.outs[0].dtype.is_floating_point:
            fill(b, outputs_of(b, call)[0], Part.of(call.outs[0]), math.nan, shards)
        return b.build()
    if "dim" not in given:
        flat = part.permute(sorted(range(part.ndim), key=lambda axis: -part.strides[axis])).flat()
        if flat is None:
            raise UnsupportedOpError(
                call.name, "the median of a tensor with gaps: make it contiguous() first"
            )
        part, dim = flat, 0
    n = part.sizes[dim] if part.ndim else 1
    k = given.get("k", (n + 1) // 2)
    return Order(call, core, shards, part, dim, k, largest=False, only_last=True).program()


host_only(
    "it counts how often values occur (or which are NaN), and what is chosen depends on the counts",
    "aten::mode", "aten::nanmedian",
)  # fmt: skip


@lowering("aten::randperm")
def randperm(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """The positions of sorted random numbers, by one core."""
    out = call.outs[0]
    b = mover(core, call.name)
    (result,) = outputs_of(b, call)
    n = out.numel
    if not n:
        return b.build()
    work = Network(b, n, spreads(core, n, 1))
    walk = RowWalk.of(Part.of(out), ())
    for block in blocks(b, 1, 1, shards, lead=1):
        work.draw()
        work.sort()
        work.store(walk, result, work.positions(), block, 0, n)
    return b.build()


# -- binary search ---------------------------------------------------------------------------------
@lowering("aten::searchsorted", "aten::bucketize")
def searchsorted(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """How many boundaries come before each value: a binary search by gathers within SBUF."""
    given = named(call)
    b = mover(core, call.name)
    pools = inputs_of(b, call)
    return _Search(b, call, given, pools, outputs_of(b, call)[0]).program(shards)


class _Search:
    """A binary search while it is emitted."""

    def __init__(
        self, b: Builder, call: OpCall, given: dict[str, Any], pools: list[Pool], result: Pool
    ) -> None:
        self.b, self.result, self.out = b, result, call.outs[0]
        buckets = "bucketize" in call.name
        edges = given["boundaries"] if buckets else given["sorted_sequence"]
        values = given["self"]
        tensors = isinstance(values, TensorSpec)
        at_edges, at_values = (1, 0) if buckets and tensors else (0, 1)
        self.edges, self.edge_pool = Part.of(edges), pools[at_edges]
        self.values = Part.of(values) if tensors else None
        self.value_pool = pools[at_values] if tensors else None
        self.number = None if tensors else float(values)
        side = given.get("side")
        self.right = bool(given.get("right")) or side == "right"
        sorter = given.get("sorter")
        self.sorter = Part.of(sorter) if isinstance(sorter, TensorSpec) else None
        self.sorter_pool = pools[-1] if self.sorter is not None else None
        self.order: Pool | None = None
        self.count = edges.shape[-1] if edges.ndim else 1
        self.dtype = edges.dtype

    def program(self, shards: int) -> Program:
        b, n = self.b, self.count
        if not self.out.numel:
            return b.build()
        self.steps = max(n, 1).bit_length()
        size = 1 << self.steps
        self.held = b.sbuf("boundaries", free_bytes=size * 4, slots=1 if n > 4096 else 2)
        raw = b.sbuf("raw", free_bytes=n * self.edges.dtype.itemsize)
        out = Part.of(self.out)
        rowwise = self.edges.ndim > 1
        if rowwise:
            lead, per = out.sizes[:-1], out.sizes[-1]
        else:
            # One table for all: values in any order, some in each partition.
            lead, per = (), 0
        width = min(per or max(1, min(512, ceil_div(out.numel, PARTITIONS))), GATHERED)
        self.tiles = {name: b.sbuf(name, free_bytes=8 * width, slots=2)
                      for name in ("value", "wide", "spot", "probe", "picked")}  # fmt: skip
        if rowwise:
            self._by_rows(raw, lead, per, width, shards)
        else:
            self._by_values(raw, width, shards)
        return b.build()

    def _table(self, raw: Pool, row: Index, parts: int, rowwise: bool, number: Index) -> TileRef:
        """The boundaries in every partition, filled up with infinity."""
        b, n, dtype = self.b, self.count, self.edges.dtype
        size = 1 << self.steps
        tile = self.held[number].view(F32, (1, size))
        if size > n:
            b.memset(self.held[number].view(F32, (1, size - n), offset=n), value=math.inf,
                     n=size - n, partitions=parts)  # fmt: skip
        lead = self.edges.sizes[:-1]
        part = self.edges if self.edges.ndim else self.edges.insert(0)
        if not rowwise:
            part, lead = part.insert(0, parts, 0), (parts,)
        walk = RowWalk.of(part, lead)
        walk.load(b, raw[0], self.edge_pool, row if rowwise else 0, parts, 0, n)
        held = self.held[number].view(F32, (1, n))
        given = raw[0].view(dtype, (1, n))
        if self.sorter is not None:
            part = self.sorter if rowwise else self.sorter.insert(0, parts, 0)
            walk = RowWalk.of(part, lead)
            order = self.order or b.sbuf("sorter", free_bytes=n * 8)
            self.order = order
            assert self.sorter_pool is not None
            walk.load(b, order[0], self.sorter_pool, row if rowwise else 0, parts, 0, n)
            for at in range(0, n, GATHERED):
                count = min(GATHERED, n - at)
                b.local_gather(self.held[number].view(F32, (1, count), offset=at), given,
                               order[0].view(self.sorter.dtype, (1, count), offset=at), n=count,
                               dtype=dtype, out_dtype=F32, partitions=parts)  # fmt: skip
        else:
            b.tensor_copy(held, given, n=n, partitions=parts, dtype=dtype, out_dtype=F32)
        return tile

    def _by_rows(self, raw: Pool, lead: Any, per: int, width: int, shards: int) -> None:
        b = self.b
        assert self.values is not None and self.value_pool is not None
        walks = [RowWalk.of(self.values, lead), RowWalk.of(Part.of(self.out), lead)]
        for block in blocks(b, product(lead), PARTITIONS, shards):
            table = self._table(raw, block.row, block.count, True, block.number)
            for at in range(0, per, width):
                count = min(width, per - at)
                slot = block.number * ceil_div(per, width) + at // width
                walks[0].load(b, self.tiles["value"][slot], self.value_pool, block.row,
                              block.count, at, count)  # fmt: skip
                spot = self._find(table, slot, count, block.count, self.values.dtype)
                walks[1].put(b, self.result, spot, block.row, block.count, count, at)

    def _by_values(self, raw: Pool, width: int, shards: int) -> None:
        b, out = self.b, Part.of(self.out)
        table = self._table(raw, 0, PARTITIONS, False, 0)
        parts = [out] if self.values is None else [out, self.values]
        for tile in tiles_of(b, parts, width, shards):
            n = tile.each * tile.width
            value = self.tiles["value"][tile.number]
            dtype = F32
            if self.values is None:
                b.memset(value.view(F32, (1, n)), value=self.number or 0.0, n=n,
                         partitions=tile.parts)  # fmt: skip
            else:
                assert self.value_pool is not None
                dtype = self.values.dtype
                window = self.value_pool[0].window(dtype, tile.walks[1], tile.rows, tile.width,
                                                   row=tile.row)  # fmt: skip
                b.load(value.view(dtype, (1, n)), window, rows=tile.rows,
                       row_bytes=tile.width * dtype.itemsize, partitions=tile.parts)  # fmt: skip
            spot = self._find(table, tile.number, n, tile.parts, dtype)
            window = self.result[0].window(out.dtype, tile.walk, tile.rows, tile.width,
                                           row=tile.row)  # fmt: skip
            b.store(window, spot, rows=tile.rows, row_bytes=tile.width * out.dtype.itemsize,
                    partitions=tile.parts)  # fmt: skip

    def _find(self, table: TileRef, slot: Index, n: int, parts: int, dtype: torch.dtype) -> TileRef:
        """The number of boundaries below each value: one bit of it a step, the highest first."""
        b, tiles = self.b, self.tiles
        shape: dict[str, Any] = {"n": n, "partitions": parts}
        value = tiles["value"][slot].view(dtype, (1, n))
        wide = tiles["wide"][slot].view(F32, (1, n))
        b.tensor_copy(wide, value, dtype=dtype, out_dtype=F32, **shape)
        spot, probe = (tiles[name][slot].view(I32, (1, n)) for name in ("spot", "probe"))
        picked = tiles["picked"][slot].view(F32, (1, n))
        b.memset(spot, value=0, dtype=I32, **shape)
        for step in reversed(range(self.steps)):
            b.tensor_scalar(probe, spot, op="add", operands=((1 << step) - 1,), dtype=I32, **shape)
            b.local_gather(picked, table, probe, dtype=F32, **shape)
            op = "is_le" if self.right else "is_lt"
            b.tensor_tensor(picked, picked, wide, op=op, dtype=F32, **shape)
            b.scalar_tensor_tensor(spot, picked, spot, op="multiply,add", scalar=float(1 << step),
                                   dtype=F32, out_dtype=I32, **shape)  # fmt: skip
        if self.right:
            # Infinite values are not before what fills up the table.
            b.tensor_scalar(spot, spot, op="min", operands=(self.count,), dtype=I32, **shape)
        return spot
