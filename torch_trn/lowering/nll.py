"""Negative log likelihood: one element per row by indirect DMA; gradients are one-hot rows.

A row whose target is ``ignore_index`` reads class 0 and counts for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import Named, OpCall, TensorSpec, named_args
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import loop, lower_kernel
from torch_trn.lowering.softmax import row_grid
from torch_trn.lowering.tile import FP32, INT32
from torch_trn.memory import CORE, Index, Pool, TileRef, Walk, affine
from torch_trn.program import Builder, Program

_NONE, _MEAN = 0, 1

#: Targets that one partition takes in a tile.
ROWS_PER_PARTITION = 64


def _classes_last(spec: TensorSpec, shape: tuple[int, ...]) -> TensorSpec:
    """[N, C, ...] as [N, ..., C] (a vector stays one)."""
    if spec.ndim < 2:
        return replace(spec, shape=shape[-1:], strides=spec.strides[-1:] or (1,))
    step_n, step_c, *rest = spec.strides
    return TensorSpec(spec.dtype, shape, (step_n, *rest, step_c))


@lowering("aten::nll_loss_forward", "aten::nll_loss2d_forward")
def nll_loss(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """loss, total_weight of (log probabilities, target, weight, reduction, ignore_index)."""
    return _Forward(call, core, shards).run()


@dataclass
class _Forward:
    """The Program of one forward call."""

    call: OpCall
    core: CoreSpec
    shards: int
    b: Builder = field(init=False)
    clipped: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.b = Builder(self.core, self.call.name.removeprefix("aten::"))
        self.x, self.target, self.weight, self.reduction = named_args(self.call)[:4]
        self.ignored = self.call.arg(4, -100)
        spec, self.rows = self.x.spec, self.target.spec.numel
        self.classes = spec.shape[1 if spec.ndim > 1 else 0]
        self.last = _classes_last(spec, (*self.target.spec.shape, self.classes))
        self.per = max(1, min(ROWS_PER_PARTITION, ceil_div(self.rows, PARTITIONS)))

    def run(self) -> Program:
        """All targets in tiles, then the sums."""
        self._pools()
        alone = self.reduction != _NONE
        share = self.rows if alone else ceil_div(self.rows, self.shards)
        base: Index = CORE * share if self.shards > 1 else 0
        for pool in self.sums:
            self.b.memset(pool, n=1)
        for first, trips, parts, n in _tiles(share, self.per):
            self.clipped = share * self.shards > self.rows or first + trips * parts * n > share
            with loop(self.b, trips, "g") as g:
                row = affine(base) + affine(g) * (parts * n) + first
                self._tile(affine(g) + first, row, parts, n, share)
        self._finish()
        return self.b.build()

    def _pools(self) -> None:
        b, each = self.b, 4 * self.per
        one = self.target.spec
        self.numbers = b.hbm(self.target.name, nbytes=one.nbytes)
        self.source = b.hbm(self.x.name, nbytes=self.x.spec.nbytes)
        self.factors = None
        if self.weight is not None:
            self.factors = b.hbm(self.weight.name, nbytes=self.weight.spec.nbytes)
        self.results = [
            b.hbm(f"out{i}", nbytes=out.nbytes) for i, out in enumerate(self.call.outs[:2])
        ]
        self.spots = b.sbuf("target", free_bytes=one.itemsize * self.per, slots=2)
        names = ("class", "counted", "picked", "loss", "weights")
        self.tiles = {name: b.sbuf(name, free_bytes=each, slots=2) for name in names}
        self.sums = [b.sbuf(name, free_bytes=4) for name in ("losses", "counts")]
        self.partial = b.sbuf("partial", free_bytes=4, slots=2)

    def _rows(self, pool: Pool, spec: TensorSpec, row: Index, count: int) -> TileRef:
        """``count`` elements, one for each target from ``row`` on."""
        lines = tuple(zip(spec.shape, spec.strides, strict=True))
        walk = Walk(lines or ((1, 0),), ((1, 0),))
        return pool[0].window(spec.dtype, walk, count, 1, row=row)

    def _gather(
        self, name: str, pool: Pool, spec: TensorSpec, step: int, number: Index, row: Index,
        parts: int, n: int,
    ) -> TileRef:  # fmt: skip
        tile = self.tiles[name][number].view(FP32, (1, n), partitions=parts)
        if self.clipped:
            # Rows beyond the last are not loaded, and NaN would not vanish times 0.
            self.b.memset(tile, n=n, partitions=parts)
        index = self.tiles["class"][number].view(INT32, (1, n), partitions=parts)
        place = self._rows(pool, spec, row, parts * n)
        self.b.load(tile, place, rows=parts * n, row_bytes=spec.itemsize, partitions=parts,
                    index=index, index_step=step, index_limit=self.classes)  # fmt: skip
        return tile

    def _tile(self, number: Index, row: Index, parts: int, n: int, share: int) -> None:
        b, spec = self.b, self.target.spec
        spot = self.spots[number].view(spec.dtype, (1, n), partitions=parts)
        place = self._rows(self.numbers, spec, row, parts * n)
        if self.clipped:
            # Rows beyond the last count for nothing.
            b.memset(spot, n=n, partitions=parts, value=self.ignored, dtype=spec.dtype)
        b.load(spot, place, rows=parts * n, row_bytes=spec.itemsize, partitions=parts)
        shape: dict[str, Any] = {"n": n, "partitions": parts}
        counted = self.tiles["counted"][number].view(FP32, (1, n))
        klass = self.tiles["class"][number].view(INT32, (1, n))
        b.tensor_scalar(counted, spot, op="not_equal", operands=(self.ignored,), dtype=spec.dtype,
                        out_dtype=FP32, **shape)  # fmt: skip
        b.tensor_tensor(klass, spot, counted, op="multiply", dtype=spec.dtype, out_dtype=INT32,
                        **shape)  # fmt: skip
        last = self.last
        picked = self._gather("picked", self.source, replace(last, shape=last.shape[:-1],
                              strides=last.strides[:-1]), last.strides[-1], number, row, parts,
                              n)  # fmt: skip
        # A product with 0 would leave NaN where an infinite element does not count.
        loss = self.tiles["loss"][number].view(FP32, (1, n))
        b.memset(loss, value=0.0, **shape)
        b.tensor_copy_predicated(loss, picked, counted, **shape)
        if self.factors is not None:
            own = self.weight.spec
            still = TensorSpec(own.dtype, spec.shape, (0,) * spec.ndim)
            weights = self._gather("weights", self.factors, still, own.strides[0], number, row,
                                   parts, n)  # fmt: skip
            b.tensor_tensor(counted, counted, weights, op="multiply", **shape)
        b.scalar_tensor_tensor(loss, loss, counted, op="multiply,multiply", scalar=-1.0, **shape)
        self._keep(number, row, loss, counted, shape)

    def _keep(
        self, number: Index, row: Index, loss: TileRef, counted: TileRef, shape: dict[str, int]
    ) -> None:
        """The losses themselves, or their sum and that of what counts."""
        b, parts, n = self.b, shape["partitions"], shape["n"]
        if self.reduction == _NONE:
            out = self.call.outs[0]
            b.store(self._rows(self.results[0], out, row, parts * n), loss, rows=parts * n,
                    row_bytes=out.itemsize, partitions=parts)  # fmt: skip
            return
        for at, (pool, tile) in enumerate(zip(self.sums, (loss, counted), strict=True)):
            partial = self.partial[affine(number) * 2 + at]
            b.tensor_reduce(partial, tile, op="add", n=n, partitions=parts)
            b.tensor_tensor(pool, pool, partial, op="add", n=1, partitions=parts)

    def _finish(self) -> None:
        """Sums over the partitions by a product with ones; a mean is divided."""
        b = self.b
        if self.reduction != _NONE:
            ones, both = b.sbuf("ones", free_bytes=4), b.psum("both", free_bytes=8)
            b.memset(ones, n=1, value=1.0)
            for at, pool in enumerate(self.sums):
                b.nc_matmul(both[0].view(FP32, (1, 1), offset=at), stationary=ones, moving=pool,
                            k=PARTITIONS, m=1, n=1, dtype=FP32)  # fmt: skip
            losses, counts = (pool[0].view(FP32, (1, 1), partitions=1) for pool in self.sums)
            b.tensor_copy(losses, both[0].view(FP32, (1, 1)), n=1, partitions=1)
            b.tensor_copy(counts, both[0].view(FP32, (1, 1), offset=1), n=1, partitions=1)
            inverse = self.partial[0].view(FP32, (1, 1), partitions=1)
            if self.reduction == _MEAN:
                b.reciprocal(inverse, counts, n=1, partitions=1)
                b.tensor_tensor(losses, losses, inverse, op="multiply", n=1, partitions=1)
            self._store_one(0, losses)
            if len(self.results) > 1:
                self._store_one(1, counts)
        elif len(self.results) > 1:
            b.memset(self.partial[0].view(FP32, (1, 1), partitions=1), n=1, partitions=1)
            self._store_one(1, self.partial[0].view(FP32, (1, 1), partitions=1))

    def _store_one(self, number: int, tile: TileRef) -> None:
        """One element, by the first core."""
        out = self.call.outs[number]
        row: Index = CORE if self.shards > 1 else 0
        place = self.results[number][0].window(out.dtype, Walk(((1, 0),), ((1, 0),)), 1, 1, row=row)
        self.b.store(place, tile, rows=1, row_bytes=out.itemsize)


def _tiles(rows: int, per: int) -> list[tuple[int, int, int, int]]:
    """(first row, tiles, partitions, rows in each) of the full tiles, then of the rest."""
    whole, rest = divmod(rows, PARTITIONS * per)
    found = [(0, whole, PARTITIONS, per)] if whole else []
    if rest:
        parts = min(PARTITIONS, rest)
        found.append((whole * PARTITIONS * per, 1, parts, ceil_div(rest, parts)))
    return found


@lowering("aten::nll_loss_backward", "aten::nll_loss2d_backward")
def nll_loss_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(grad, x, target, weight, reduction, ignore_index, total_weight): one-hot rows."""
    grad, x, target, weight, reduction, ignored, total = named_args(call)[:7]
    spec, out = target.spec, call.outs[0]
    shape = (*spec.shape, x.spec.shape[1 if x.spec.ndim > 1 else 0])
    given = [Named(_unsqueezed(spec), target.name), grad]
    if grad.spec.numel > 1 or grad.spec.shape == spec.shape and spec.ndim:
        given[1] = Named(_unsqueezed(grad.spec), grad.name)
    else:
        given[1] = Named(TensorSpec(grad.spec.dtype, (), ()), grad.name)
    given += [weight] if weight is not None else []
    if reduction == _MEAN:
        given.append(Named(TensorSpec(total.spec.dtype, (), ()), total.name))
    specs = [_classes_last(out, shape), *(one.spec for one in given)]
    walked = row_grid(shape, [len(shape) - 1], specs)
    kernel = Kernel(core, walked, 1, shards, ["out0", *(one.name for one in given)])
    spot, slope, *rest = kernel.ins
    if reduction == _MEAN:
        slope = slope * kernel.reciprocal(rest.pop())
    counted = kernel.binary("not_equal", spot, ignored, torch.bool)
    # Where nothing counts the slope may be infinite.
    value = kernel.select(counted, slope * -1.0, 0.0)
    place = kernel.cast(spot, FP32)
    hot = kernel.stt(kernel.iota(FP32, "row"), "is_equal", place, "multiply", value)
    kernel.store(0, hot * rest[0] if rest else hot)
    return lower_kernel(kernel, call.name)


def _unsqueezed(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.dtype, (*spec.shape, 1), (*spec.strides, 1))
