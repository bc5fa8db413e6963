"""Embedding bags: rows gathered and scaled, then summed by their bag; the gradient the other way.

Every core prepares all rows (the same values); the sums are shared by columns.
"""

from __future__ import annotations

from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.errors import UnsupportedOpError
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.fill import named
from torch_trn.lowering.indexed import Gathered, Number
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.move import blocks, fill, transfer
from torch_trn.lowering.part import Part
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.scatter import Scattered
from torch_trn.memory import Pool, TileRef, Walk
from torch_trn.program import Builder, Program

__all__: list[str] = []

F32, I32 = torch.float32, torch.int32

_SUM, _MEAN, _MAX = range(3)

#: Columns of a row that a tile holds.
COLUMNS = 4096


class _Bags:
    """Rows of one table at indices, scaled, in HBM: what bags are summed from."""

    def __init__(self, b: Builder, count: int) -> None:
        self.b, self.count = b, count

    def numbers(self, offsets: Pool, spec: TensorSpec, bags: int) -> Pool:
        """The bag of each index: how many offsets are not beyond its place, less one."""
        b, kind = self.b, spec.dtype
        pool = b.hbm("bags", nbytes=4 * max(self.count, 1))
        all_starts = b.sbuf("starts", free_bytes=max(bags, 1) * kind.itemsize)
        found, place = (b.sbuf(name, free_bytes=4, slots=2) for name in ("bag", "place"))
        compared = b.sbuf("compared", free_bytes=4 * max(bags, 1))
        view = all_starts[0].view(kind, (1, bags))
        window = offsets[0].window(kind, Walk(((PARTITIONS, 0),), ((bags, spec.strides[0]),)),
                                   PARTITIONS, bags)  # fmt: skip
        b.load(view, window, rows=PARTITIONS, row_bytes=bags * kind.itemsize)
        for block in blocks(b, self.count, PARTITIONS, 1, "i"):
            parts = block.count
            number = place[block.number].view(I32, (1, 1))
            b.iota(number, n=1, base=block.row, channel=1, dtype=I32, partitions=parts)
            b.tensor_scalar(compared, [view, number], op="is_le", operands=(None,), n=bags,
                            dtype=kind, out_dtype=F32, partitions=parts)  # fmt: skip
            one = found[block.number].view(I32, (1, 1))
            b.tensor_reduce(one, compared, op="add", n=bags, partitions=parts, out_dtype=I32)
            b.tensor_scalar(one, one, op="add", operands=(-1,), n=1, dtype=I32, partitions=parts)
            to = pool[0].window(I32, Walk(((self.count, 1),), ()), parts, 1, row=block.row)
            b.store(to, one, rows=parts, row_bytes=4)
        return pool

    def sizes(self, offsets: Pool, spec: TensorSpec, bags: int, last: bool) -> Pool:
        """Indices in each bag: the distance of its offset from the next one (or from the end)."""
        b, kind = self.b, spec.dtype
        pool = b.hbm("sizes", nbytes=4 * max(bags, 1))
        low, high = (b.sbuf(name, free_bytes=8, slots=2) for name in ("low", "high"))
        walk = Walk(((bags + last, spec.strides[0]),), ())
        for block in blocks(b, bags, PARTITIONS, 1, "s"):
            parts = block.count
            starts, ends = (x[block.number].view(kind, (1, 1)) for x in (low, high))
            copy: dict[str, Any] = {"rows": parts, "row_bytes": kind.itemsize}
            b.load(starts, offsets[0].window(kind, walk, parts, 1, row=block.row), **copy)
            # The window of the ends is clipped behind the last offset: what was there stays.
            b.memset(ends, value=self.count, n=1, partitions=parts, dtype=kind)
            b.load(ends, offsets[0].window(kind, walk, parts, 1, row=block.row + 1), **copy)
            b.tensor_tensor(ends, ends, starts, op="subtract", n=1, partitions=parts, dtype=kind)
            to = pool[0].window(I32, Walk(((bags, 1),), ()), parts, 1, row=block.row)
            b.store(to, ends, rows=parts, row_bytes=4)
        return pool

    def rows(
        self, table: Pool, part: Part, index: tuple[Pool, Part], weights: list[tuple[Any, ...]],
        padding: tuple[Pool, Part, int] | None = None,
    ) -> tuple[Pool, Part]:  # fmt: skip
        """table[index] x the weights, in fp32 order of the indices.

        weights: (pool, part, index or None, whether by its reciprocal) of factors of a row each.
        padding: indices, and which of them counts as nothing.
        """
        b, width, kind = self.b, part.sizes[1], part.dtype
        out = Part.of(TensorSpec.contiguous(kind, self.count, width))
        pool = b.hbm("rows", nbytes=self.count * width * kind.itemsize)
        wide = min(width, COLUMNS)
        spot = b.sbuf("spot", free_bytes=8, slots=2)
        row = b.sbuf("row", free_bytes=wide * kind.itemsize, slots=2)
        factor, scale = (b.sbuf(name, free_bytes=8, slots=2) for name in ("factor", "scale"))
        for block in blocks(b, self.count, PARTITIONS, 1, "g"):
            parts = block.count
            place = self._each(spot[block.number], index, block.row, parts)
            scales = scale[block.number].view(F32, (1, 1))
            scaled = bool(weights) or padding is not None
            if scaled:
                b.memset(scales, value=1.0, n=1, partitions=parts)
            for source, given, through, inverse in weights:
                raw = factor[block.number].view(given.dtype, (1, 1))
                if through is None:
                    raw = self._each(factor[block.number], (source, given), block.row, parts)
                else:
                    bag = self._each(spot[block.number], through, block.row, parts)
                    b.load(raw, source[0].window(given.dtype, Walk(((self.count, 0),), ()), parts,
                                                 1, row=block.row),
                           rows=parts, row_bytes=given.dtype.itemsize, index=bag,
                           index_step=given.strides[0], index_limit=given.sizes[0])  # fmt: skip
                op = "divide" if inverse else "multiply"
                b.tensor_tensor(scales, scales, raw, op=op, n=1, partitions=parts)
                place = self._each(spot[block.number], index, block.row, parts)
            if padding is not None:
                raw = self._each(factor[block.number], padding[:2], block.row, parts)
                b.tensor_scalar(raw, raw, op="not_equal", operands=(padding[2],), n=1,
                                dtype=padding[1].dtype, partitions=parts)  # fmt: skip
                b.tensor_tensor(scales, scales, raw, op="multiply", n=1, partitions=parts)
            for at in range(0, width, wide):
                n = min(wide, width - at)
                tile = row[block.number * ceil_div(width, wide) + at // wide].view(kind, (1, n))
                self._row(tile, table, part, place, block, at, n)
                if scaled:
                    b.tensor_scalar(tile, [tile, scales], op="multiply", operands=(None,), n=n,
                                    partitions=parts, dtype=kind)  # fmt: skip
                to = pool[0].window(kind, Walk(((self.count, width),), ((width, 1),)), parts, n,
                                    row=block.row, col=at)  # fmt: skip
                b.store(to, tile, rows=parts, row_bytes=n * kind.itemsize)
        return pool, out

    def _each(self, tile: TileRef, source: Any, row: Any, parts: int) -> TileRef:
        """One element of a line for each partition."""
        pool, part = source
        view = tile.view(part.dtype, (1, 1), partitions=parts)
        window = pool[0].window(part.dtype, Walk(((part.sizes[0], part.strides[0]),), ()), parts,
                                1, row=row, offset=part.offset)  # fmt: skip
        self.b.load(view, window, rows=parts, row_bytes=part.dtype.itemsize)
        return view

    def _row(
        self, tile: TileRef, table: Pool, part: Part, place: TileRef, block: Any, at: int, n: int
    ) -> None:
        walk = Walk(((self.count, 0),), ((part.sizes[1], part.strides[1]),))
        window = table[0].window(part.dtype, walk, block.count, n, row=block.row, col=at)
        straight = part.strides[1] == 1
        self.b.load(tile, window, rows=block.count * (1 if straight else n),
                    row_bytes=(n if straight else 1) * part.dtype.itemsize,
                    partitions=block.count, index=place, index_step=part.strides[0],
                    index_limit=part.sizes[0])  # fmt: skip


def _checked(call: OpCall, given: dict[str, Any]) -> None:
    if given["mode"] == _MAX:
        raise UnsupportedOpError(call.name, "a bag's maximum (mode 2) has no sum to be made of")
    if given.get("scale_grad_by_freq"):
        raise UnsupportedOpError(call.name, "gradients scaled by how often an index occurs")


@lowering("aten::_embedding_bag", "aten::_embedding_bag_forward_only")
def embedding_bag(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Rows gathered, then summed (or averaged) by their bag; offsets become bag numbers."""
    given = named(call)
    _checked(call, given)
    work = Scattered(call, core, shards)
    b, pools = work.b, work.pools
    weight, index, offsets = call.args[:3]
    bags = call.outs[0].shape[0]
    rows = _Bags(b, index.numel)
    if not bags or not index.numel:
        fill(b, work.result, work.out, 0, shards)
        return b.build()
    last = bool(given.get("include_last_offset")) and offsets.numel > bags
    line = Part(I32, (index.numel,), (1,))
    numbers = rows.numbers(pools[2], offsets, bags)
    sizes = rows.sizes(pools[2], offsets, bags, last)
    scales: list[tuple[Any, ...]] = []
    samples = given.get("per_sample_weights")
    if isinstance(samples, TensorSpec):
        scales.append((pools[3], Part.of(samples), None, False))
    if given["mode"] == _MEAN:
        scales.append((sizes, Part(I32, (bags,), (1,)), (numbers, line), True))
    padding = given.get("padding_idx", -1)
    skipped = (pools[1], Part.of(index), padding) if padding >= 0 else None
    if skipped and given["mode"] == _MEAN:
        raise UnsupportedOpError(call.name, "a mean over bags in which some indices do not count")
    made, part = rows.rows(pools[0], Part.of(weight), (pools[1], Part.of(index)), scales, skipped)
    _extra(work, call, numbers, line, sizes, bags)
    table = work.out.insert(0, index.numel, 0).select(1, 0)
    found = Gathered(table, part, (Number(numbers, line, bags, work.out.strides[0]),), 1)
    return work.run(found, (None, 1), made, "add")


def _extra(
    work: Scattered, call: OpCall, numbers: Pool, line: Part, sizes: Pool, bags: int
) -> None:
    """Bag numbers and sizes as results, where the call has room for them; no maxima."""
    sources = {1: (numbers, line), 2: (sizes, Part(I32, (bags,), (1,)))}
    for number, spec in enumerate(call.outs[1:], 1):
        pool, out = work.results[number], Part.of(spec)
        source = sources.get(number)
        if source is not None and source[1].numel == spec.numel:
            transfer(work.b, pool, out, *source, work.shards)
        else:
            fill(work.b, pool, out, 0, work.shards, f"extra{number}")


@lowering("aten::_embedding_bag_dense_backward")
def embedding_bag_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Each index takes its bag's gradient, scaled; equal indices are summed."""
    given = named(call)
    _checked(call, given)
    work = Scattered(call, core, shards)
    pools = work.pools
    grad, index, bag_of, sizes = call.args[:4]
    rows = _Bags(work.b, index.numel)
    scales: list[tuple[Any, ...]] = []
    samples = given.get("per_sample_weights")
    if isinstance(samples, TensorSpec):
        scales.append((pools[-1], Part.of(samples), None, False))
    if given["mode"] == _MEAN:
        scales.append((pools[3], Part.of(sizes), (pools[2], Part.of(bag_of)), True))
    padding = given.get("padding_idx", -1)
    skipped = (pools[1], Part.of(index), padding) if padding >= 0 else None
    spots = Part.of(index)
    made, part = rows.rows(pools[0], Part.of(grad), (pools[2], Part.of(bag_of)), scales, skipped)
    table = work.out.insert(0, index.numel, 0).select(1, 0)
    numbers = (Number(pools[1], spots, work.out.sizes[0], work.out.strides[0]),)
    return work.run(Gathered(table, part, numbers, 1), (None, 1), made, "add")
