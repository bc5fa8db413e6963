"""Constants, triangles, and what only names memory: results made from nothing or nearly so."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.layout import PARTITIONS, ceil_div, product
from torch_trn.lowering.move import blocks, fill, inputs_of, mover, outputs_of
from torch_trn.lowering.part import Part
from torch_trn.lowering.registry import any_dtype, lowering
from torch_trn.memory import Index, Pool, TileRef, Walk
from torch_trn.program import Builder, Program

__all__ = ["named"]

#: Bytes of one partition of a tile of a triangle.
TILE_BYTES = 8192


def named(call: OpCall) -> dict[str, Any]:
    """The call's arguments by the names of its schema."""
    return dict(zip(_names(call.name), call.args, strict=False))


@cache
def _names(name: str) -> tuple[str, ...]:
    base, _, overload = name.partition(".")
    return tuple(argument.name for argument in torch._C._get_schema(base, overload).arguments)


# -- constants -------------------------------------------------------------------------------------
_VALUES = {"zeros": 0, "zero": 0, "_efficientzerotensor": 0, "zeros_like": 0, "new_zeros": 0,
           "ones": 1, "ones_like": 1, "new_ones": 1}  # fmt: skip


@lowering(
    "aten::zeros", "aten::ones", "aten::full", "aten::zeros_like", "aten::ones_like",
    "aten::full_like", "aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::zero",
    "aten::fill", "aten::_efficientzerotensor", "aten::scalar_tensor",
)  # fmt: skip
def constant(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """A constant tile stored over and over; a tensor's value is spread over it first."""
    out = call.outs[0]
    b = mover(core, call.name)
    pools, (result,) = inputs_of(b, call), outputs_of(b, call)
    base = call.name.partition(".")[0].removeprefix("aten::").removesuffix("_")
    value: Any = _VALUES.get(base)
    if value is None:
        given = named(call)
        value = given.get("fill_value", given.get("value", given.get("s")))
    if not isinstance(value, TensorSpec):
        fill(b, result, Part.of(out), value, shards)
    elif out.numel:
        spread = b.sbuf("value", free_bytes=8)
        one = spread[0].view(value.dtype, (1, 1))
        source = pools[1][0].matrix(value.dtype, (PARTITIONS, 0), (1, 1))
        b.load(one, source, rows=PARTITIONS, row_bytes=value.itemsize)

        def repeat(tile: TileRef, count: int) -> None:
            again = spread[0].view(value.dtype, (0, count))
            b.tensor_copy(tile.view(out.dtype, (1, count)), again, n=count, dtype=value.dtype,
                          out_dtype=out.dtype)  # fmt: skip

        fill(b, result, Part.of(out), repeat, shards)
    return b.build()


@lowering("aten::eye")
def eye(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Zeros, then ones along the diagonal, rows shared by the cores."""
    b = mover(core, call.name)
    (result,) = outputs_of(b, call)
    out = Part.of(call.outs[0])
    lead = ceil_div(out.sizes[0], shards) if shards > 1 else 0
    fill(b, result, out, 0, shards, lead=lead)
    fill(b, result, out.diagonal(0, 0, 1), 1, shards, name="one", lead=lead)
    return b.build()


@lowering(
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty",
    "aten::new_empty_strided", "aten::empty_permuted", "aten::resize", "aten::resize_as",
    "aten::_assert_async", "aten::_functional_assert_async", "aten::_assert_scalar",
    "aten::_functional_assert_scalar", "aten::_assert_tensor_metadata",
    "aten::set", "aten::view", "aten::as_strided", "aten::expand", "aten::permute",
    "aten::transpose", "aten::t", "aten::slice", "aten::select", "aten::squeeze",
    "aten::unsqueeze", "aten::detach", "aten::alias", "aten::unbind", "aten::split",
    "aten::split_with_sizes", "aten::unsafe_split", "aten::unsafe_split_with_sizes",
    "aten::diagonal", "aten::unfold", "aten::view_as_real", "aten::view_as_complex",
    "aten::_reshape_alias", "aten::lift", "aten::lift_fresh", "aten::_neg_view", "aten::_conj",
)  # fmt: skip
@any_dtype
def nothing(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Memory is named, not touched: a Program without instructions."""
    return mover(core, call.name).build()


# -- triangles -------------------------------------------------------------------------------------
@lowering("aten::tril", "aten::triu")
def triangle(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(self, diagonal): GpSimdE keeps what passes column - row <= diagonal (or >=)."""
    b = mover(core, call.name)
    (source,), (result,) = inputs_of(b, call), outputs_of(b, call)
    work = _Triangle(b, call, source, result)
    x = call.args[0]
    if x.numel:
        small = x.shape[-2] * x.shape[-1] * x.itemsize <= TILE_BYTES
        if small and (x.ndim > 2 or x.shape[-2] == 1):
            work.whole(shards)
        else:
            work.rows(shards)
    return b.build()


class _Triangle:
    """Matrices with a triangle zeroed, while they are emitted."""

    def __init__(self, b: Builder, call: OpCall, source: Pool, result: Pool) -> None:
        self.b, self.source, self.result = b, source, result
        self.x, self.out = Part.of(call.args[0]), Part.of(call.outs[0])
        # Kept where sign x (column - row - diagonal) <= 0.
        self.sign = 1 if "tril" in call.name else -1
        self.diagonal = call.arg(1, 0)
        self.height, self.width = self.x.sizes[-2:]

    def whole(self, shards: int) -> None:
        """A matrix in each partition."""
        n = self.height * self.width
        tiles = self._tiles(n)
        batches = product(self.x.sizes[:-2])
        for block in blocks(self.b, batches, PARTITIONS, shards):
            self._tile(tiles, block.number, (block.row, block.count), (0, n), -2,
                       -self.diagonal, 0, ((-1, self.height), (1, self.width)))  # fmt: skip

    def rows(self, shards: int) -> None:
        """A row in each partition, its columns in pieces."""
        wide = min(self.width, TILE_BYTES // self.x.dtype.itemsize)
        tiles = self._tiles(wide)
        pieces = ceil_div(self.width, wide)
        batches = product(self.x.sizes[:-2])
        # Rows of a matrix are not shared where there are several: a row beyond would be the next's.
        apart = (shards, 1) if batches > 1 else (1, shards)
        for batch in blocks(self.b, batches, 1, apart[0], "m"):
            for block in blocks(self.b, self.height, PARTITIONS, apart[1]):
                for piece in range(pieces):
                    at = piece * wide
                    count = min(wide, self.width - at)
                    tiles_each = ceil_div(self.height, PARTITIONS) * pieces
                    tile = batch.number * tiles_each + block.number * pieces + piece
                    self._tile(tiles, tile, (batch.row * self.height + block.row, block.count),
                               (at, count), -1, block.row * -1 + (at - self.diagonal), -1,
                               ((1, count),))  # fmt: skip

    def _tiles(self, width: int) -> tuple[Pool, Pool]:
        size = width * self.x.dtype.itemsize
        return (self.b.sbuf("came", free_bytes=size, slots=2),
                self.b.sbuf("goes", free_bytes=size, slots=2))  # fmt: skip

    def _tile(
        self, tiles: tuple[Pool, Pool], number: Index, rows: tuple[Index, int],
        cols: tuple[int, int], split: int, base: Index, channel: int,
        steps: tuple[tuple[int, int], ...],
    ) -> None:  # fmt: skip
        b, dtype, (row, parts), (col, n) = self.b, self.x.dtype, rows, cols
        walks = [_walk(part, split) for part in (self.x, self.out)]
        copies = [_descriptors(walk, parts, n, dtype.itemsize) for walk in walks]
        windows = [
            pool[0].window(dtype, walk, parts, n, row=row, col=col)
            for pool, walk in zip((self.source, self.result), walks, strict=True)
        ]
        came, goes = tiles[0][number], tiles[1][number]
        b.load(came.view(dtype, (1, n)), windows[0], **copies[0])
        flip = -self.sign
        b.affine_select(goes.view(dtype, (1, n)), came.view(dtype, (1, n)), n=n, op="is_ge",
                        partitions=parts, dtype=dtype, base=base * flip, channel=channel * flip,
                        steps=tuple((step * flip, count) for step, count in steps))  # fmt: skip
        b.store(windows[1], goes.view(dtype, (1, n)), **copies[1])


def _walk(part: Part, split: int) -> Walk:
    dims = tuple(zip(part.sizes, part.strides, strict=True))
    return Walk(dims[:split], dims[split:])


def _descriptors(walk: Walk, parts: int, n: int, itemsize: int) -> dict[str, Any]:
    run = 1
    for size, step in reversed(walk.cols):
        if size != 1 and step != run:
            break
        run *= size
    run = min(run, n)
    return {"rows": parts * ceil_div(n, run), "row_bytes": run * itemsize, "partitions": parts}
