"""Negative log likelihood: one element per row by indirect DMA; the gradient scatters it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.indexed import Gathered, Number, Tiling, tiling
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.move import blocks, fill, inputs_of, mover, outputs_of
from torch_trn.lowering.part import Part
from torch_trn.lowering.registry import lowering
from torch_trn.memory import Index, Pool, TileRef, Walk
from torch_trn.program import Builder, Program

__all__: list[str] = []

F32, I32 = torch.float32, torch.int32

_NONE, _MEAN = 0, 1


@dataclass(frozen=True)
class _Tile:
    """Rows that one tile holds: ``per`` in each of ``parts`` partitions, from ``row`` on."""

    number: Index
    row: Index
    parts: int
    per: int

    @property
    def shape(self) -> dict[str, Any]:
        """Free size and partitions of every instruction."""
        return {"n": self.per, "partitions": self.parts}


class _Rows:
    """Targets, the elements they choose, and their weights, tile by tile."""

    def __init__(
        self, call: OpCall, core: CoreSpec, shards: int, table: Part, target: Part, at: int,
        weight: int | None, ignored: int, lead: int,
    ) -> None:  # fmt: skip
        self.b: Builder = mover(core, call.name)
        self.pools, self.results = inputs_of(self.b, call), outputs_of(self.b, call)
        self.call, self.shards, self.lead, self.ignored = call, shards, lead, ignored
        self.target, self.weight = target, weight
        dim = min(1, table.ndim - 1)
        self.limit, self.step = table.sizes[dim], table.strides[dim]
        chosen = table.drop(dim)
        if chosen.ndim < target.ndim:
            chosen = chosen.insert(0)
        self.table = chosen
        numbers = (Number(self.pools[at], target, self.limit, self.step),)
        self.found = Gathered(chosen, target, numbers, target.ndim)
        self.tiles: Tiling = tiling(self.found, lead)
        per = self.tiles.per
        names = ("target", "counted", "spot", "chosen", "weight", "loss")
        self.held = {name: self.b.sbuf(name, free_bytes=8 * per, slots=2) for name in names}

    def __iter__(self) -> Any:
        """Every tile, never with a row of another core."""
        per = self.tiles.per
        for block in blocks(self.b, self.found.rows, PARTITIONS * per, self.shards, "g",
                            lead=self.lead, unit=self.tiles.unit):  # fmt: skip
            main, left = divmod(block.count, per)
            if main:
                yield _Tile(block.number, block.row, main, per)
            if left:
                yield _Tile(block.number, block.row + main * per, left, 1)

    def view(self, name: str, tile: _Tile, dtype: torch.dtype = F32) -> TileRef:
        """Scratch tile ``name``."""
        return self.held[name][tile.number].view(dtype, (1, tile.per), partitions=tile.parts)

    def copy(self, tile: _Tile, nbytes: int) -> dict[str, Any]:
        """A DMA of single elements."""
        return {"rows": tile.parts * tile.per, "row_bytes": nbytes, "partitions": tile.parts}

    def counted(self, tile: _Tile) -> TileRef:
        """1 where the target counts; its number (or 0) goes to "spot", its weight to "weight"."""
        b, kind = self.b, self.target.dtype
        target, spot = self.view("target", tile, kind), self.view("spot", tile, I32)
        counted, weight = self.view("counted", tile), self.view("weight", tile)
        number = self.found.numbers[0]
        window = number.pool[0].window(kind, self.tiles.numbers[0], tile.parts * tile.per, 1,
                                       row=tile.row, offset=number.part.offset)  # fmt: skip
        b.load(target, window, **self.copy(tile, kind.itemsize))
        b.tensor_scalar(counted, target, op="not_equal", operands=(self.ignored,), dtype=kind,
                        out_dtype=F32, **tile.shape)  # fmt: skip
        b.tensor_tensor(spot, target, counted, op="multiply", dtype=kind, out_dtype=I32,
                        **tile.shape)  # fmt: skip
        if self.weight is None:
            return counted
        spec = self.call.tensors()[self.weight]
        raw = self.view("loss", tile, spec.dtype)
        # Rows that are not there have no number either.
        rows = Walk(tuple((size, 0) for size, _ in self.tiles.numbers[0].rows), ())
        window = self.pools[self.weight][0].window(spec.dtype, rows, tile.parts * tile.per, 1,
                                                   row=tile.row)  # fmt: skip
        b.load(raw, window,
               index=spot, index_step=spec.strides[0], index_limit=self.limit,
               **self.copy(tile, spec.itemsize))  # fmt: skip
        b.tensor_tensor(weight, raw, counted, op="multiply", dtype=spec.dtype, out_dtype=F32,
                        **tile.shape)  # fmt: skip
        return weight

    def chosen(self, tile: _Tile, pool: Pool) -> tuple[TileRef, dict[str, Any]]:
        """The table's elements at the targets, and the rest of the DMA to or from them."""
        window = pool[0].window(self.table.dtype, self.tiles.table, tile.parts * tile.per, 1,
                                row=tile.row, offset=self.table.offset)  # fmt: skip
        return window, {"index": self.view("spot", tile, I32), "index_step": self.step,
                        "index_limit": self.limit,
                        **self.copy(tile, self.table.dtype.itemsize)}  # fmt: skip


@lowering("aten::nll_loss_forward", "aten::nll_loss2d_forward")
def nll_loss(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """loss, total_weight of (log probabilities, target, weight, reduction, ignore_index).

    A sum is made by one core: it is a few elements of each row.
    """
    x, target, weight, reduction = call.args[:4]
    ignored = call.arg(4, -100)
    table, spots = _parts(x, target)
    work = _Rows(call, core, shards, table, spots, 1, 2 if weight is not None else None, ignored,
                 0 if reduction == _NONE or shards == 1 else max(spots.sizes[0], 1))  # fmt: skip
    b = work.b
    if reduction != _NONE:
        totals = b.sbuf("totals", free_bytes=8)
        part = b.sbuf("part", free_bytes=4, slots=2)
        b.memset(totals, value=0.0, n=2)
    for tile in work:
        weighed = work.counted(tile)
        window, copy = work.chosen(tile, work.pools[0])
        raw, loss = work.view("chosen", tile, x.dtype), work.view("loss", tile)
        b.load(raw, window, **copy)
        # A product with 0 would leave NaN where an infinite element does not count.
        b.memset(loss, value=0.0, **tile.shape)
        b.tensor_copy_predicated(loss, raw, work.view("counted", tile), dtype=x.dtype,
                                 out_dtype=F32, **tile.shape)  # fmt: skip
        b.scalar_tensor_tensor(loss, loss, weighed, op="multiply,multiply", scalar=-1.0,
                               **tile.shape)  # fmt: skip
        if reduction == _NONE:
            part_of = Part.of(call.outs[0])
            part_of = part_of if part_of.ndim else part_of.insert(0)
            found = Gathered(part_of, work.target, work.found.numbers, part_of.ndim)
            walk = tiling(found, work.lead).table
            place = work.results[0][0].window(part_of.dtype, walk, tile.parts * tile.per, 1,
                                              row=tile.row)  # fmt: skip
            b.store(place, loss, **work.copy(tile, part_of.dtype.itemsize))
            continue
        for column, value in ((0, loss), (1, weighed)):
            one = part[tile.number].view(F32, (1, 1))
            b.tensor_reduce(one, value, op="add", **tile.shape)
            total = totals[0].view(F32, (1, 1), offset=column)
            b.tensor_tensor(total, total, one, op="add", n=1, partitions=tile.parts)
    if reduction == _NONE:
        for number, out in enumerate(call.outs[1:], 1):
            fill(b, work.results[number], Part.of(out).insert(0), 0, shards, "nothing", lead=1)
        return b.build()
    _finish(work, totals, reduction)
    return b.build()


def _finish(work: _Rows, totals: Pool, reduction: int) -> None:
    """Sums over the partitions by a matmul with ones; their ratio is the mean."""
    b, call = work.b, work.call
    ones = b.sbuf("ones", free_bytes=4)
    across = b.psum("across", free_bytes=8)
    final = b.sbuf("final", free_bytes=8)
    b.memset(ones, value=1.0, n=1)
    b.nc_matmul(across, stationary=ones[0], moving=totals[0], k=PARTITIONS, m=1, n=2, dtype=F32)
    b.tensor_copy(final, across, n=2, partitions=1)
    loss, weight = (final[0].view(F32, (1, 1), offset=at) for at in range(2))
    if reduction == _MEAN:
        b.tensor_tensor(loss, loss, weight, op="divide", n=1, partitions=1)
    for value, pool, out in zip((loss, weight), work.results, call.outs, strict=False):
        for block in blocks(b, 1, 1, work.shards, lead=1):
            window = pool[0].window(out.dtype, Walk(((1, 0),), ((1, 1),)), 1, 1, row=block.row)
            b.store(window, value, rows=1, row_bytes=out.itemsize)


@lowering("aten::nll_loss_backward", "aten::nll_loss2d_backward")
def nll_loss_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Zeros, then -grad (times weight, over total weight) at each row's target."""
    grad, x, target, weight, reduction, ignored = call.args[:6]
    out = call.outs[0]
    table, spots = _parts(out, target)
    lead = ceil_div(max(spots.sizes[0], 1), shards) if shards > 1 else 0
    work = _Rows(call, core, shards, table, spots, 2, 3 if weight is not None else None, ignored,
                 lead)  # fmt: skip
    b = work.b
    fill(b, work.results[0], table if x.ndim > 1 else table.insert(0), 0, shards, lead=lead)
    scale = b.sbuf("scale", free_bytes=8)
    one = Walk(((PARTITIONS, 0),), ((1, 1),))
    if reduction != _NONE:
        given = scale[0].view(grad.dtype, (1, 1))
        b.load(given, work.pools[0][0].window(grad.dtype, one, PARTITIONS, 1), rows=PARTITIONS,
               row_bytes=grad.itemsize)  # fmt: skip
        factor = b.sbuf("factor", free_bytes=4)
        b.tensor_scalar(factor, given, op="multiply", operands=(-1.0,), n=1, dtype=grad.dtype,
                        out_dtype=F32)  # fmt: skip
        if reduction == _MEAN:
            total = b.sbuf("total", free_bytes=8)
            spec = call.tensors()[-1]
            held = total[0].view(spec.dtype, (1, 1))
            b.load(held, work.pools[-1][0].window(spec.dtype, one, PARTITIONS, 1),
                   rows=PARTITIONS, row_bytes=spec.itemsize)  # fmt: skip
            # Where nothing counts the total is 0, and so is every gradient: 0 x inf would be NaN.
            weight_sum = b.sbuf("weight_sum", free_bytes=4)
            b.tensor_scalar(weight_sum, held, op="max", operands=(1e-30,), n=1, dtype=spec.dtype,
                            out_dtype=None if spec.dtype == F32 else F32)  # fmt: skip
            b.tensor_tensor(factor, factor, weight_sum, op="divide", n=1)
    for tile in work:
        weighed = work.counted(tile)
        value = work.view("loss", tile)
        if reduction == _NONE:
            part = Part.of(grad)
            part = part if part.ndim else part.insert(0)
            walk = tiling(Gathered(part, work.target, work.found.numbers, part.ndim), lead).table
            raw = work.view("chosen", tile, grad.dtype)
            b.load(raw, work.pools[0][0].window(grad.dtype, walk, tile.parts * tile.per, 1,
                                                row=tile.row),
                   **work.copy(tile, grad.itemsize))  # fmt: skip
            b.scalar_tensor_tensor(value, raw, weighed, op="multiply,multiply", scalar=-1.0,
                                   dtype=grad.dtype, out_dtype=F32, **tile.shape)  # fmt: skip
        else:
            b.tensor_scalar(value, [weighed, factor[0].view(F32, (1, 1))], op="multiply",
                            operands=(None,), **tile.shape)  # fmt: skip
        window, copy = work.chosen(tile, work.results[0])
        b.store(window, value, **copy)
    return b.build()


def _parts(x: TensorSpec, target: TensorSpec) -> tuple[Part, Part]:
    """The table and the targets; a single row has a target of one element."""
    table, spots = Part.of(x), Part.of(target)
    return table, spots if spots.ndim else spots.insert(0)
