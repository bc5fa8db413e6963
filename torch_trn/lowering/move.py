"""Building blocks of operators that only move bytes: HBM-to-HBM copies, and filling HBM."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.layout import PARTITIONS, Grid, ceil_div, grid, merge, product
from torch_trn.lowering.part import Part
from torch_trn.lowering.run import loop
from torch_trn.memory import CORE, Index, Pool, TileRef, Walk
from torch_trn.program import Builder

__all__ = ["Block", "RowWalk", "Rows", "TileOf", "blocks", "fill", "hbm_of", "inputs_of", "mover",
           "needs_turn", "outputs_of", "rows_of", "tiles_of", "transfer"]  # fmt: skip

#: Bytes of one descriptor of a long copy; longer runs are cut so that all engines share them.
COPY_ROW_BYTES = 32768

#: Descriptors of one DMA instruction at most (assumed; rings hold 2^24).
DMA_ROWS = 4096

#: Bytes per partition of a tile that is stored again and again to fill memory.
FILL_BYTES = 8192

#: Shorter runs than this are not cut to occupy more engines.
SHORT_BYTES = 512


def mover(core: CoreSpec, name: str) -> Builder:
    """A Builder named after the operator."""
    return Builder(core, name.removeprefix("aten::"))


def hbm_of(b: Builder, name: str, spec: TensorSpec) -> Pool:
    """The pool of a tensor of the call."""
    return b.hbm(name, nbytes=spec.nbytes)


def inputs_of(b: Builder, call: OpCall) -> list[Pool]:
    """A pool for every tensor among the arguments."""
    return [hbm_of(b, f"in{i}", spec) for i, spec in enumerate(call.tensors())]


def outputs_of(b: Builder, call: OpCall) -> list[Pool]:
    """A pool for every result."""
    return [hbm_of(b, f"out{i}", spec) for i, spec in enumerate(call.outs)]


# -- rows ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rows:
    """Parts of equal numbers of elements as matrices of ``count`` rows of ``width`` elements.

    A row is contiguous in every part. The last row of a run that was cut may be shorter: windows
    clip it. ``unit`` rows belong to one element of a leading dim.
    """

    walks: tuple[Walk, ...]
    count: int
    width: int
    unit: int = 1


@dataclass(frozen=True)
class Block:
    """Some rows that one pass of a loop handles: ``count`` from ``row`` on, block ``number``."""

    number: Index
    row: Index
    count: int


def blocks(
    b: Builder, count: int, most: int, shards: int = 1, name: str = "r", *,
    lead: int = 0, unit: int = 1,
) -> Iterator[Block]:  # fmt: skip
    """Loops over this core's share of ``count`` rows, ``most`` at a time; the body is built inside.

    Every core gets as many; rows beyond the last are for windows to clip. Without ``lead`` cores
    share the rows anyhow, which is right where one step writes each element. Where several do, all
    of them on one core: each takes ``lead`` elements of the first dim, ``unit`` rows each.
    """
    share = min(lead * unit, count) if lead and shards > 1 else ceil_div(count, shards)
    base: Index = CORE * (lead * unit or share) if shards > 1 else 0
    full, rest = divmod(share, most)
    if full:
        with loop(b, full, name) as i:
            yield Block(i, base + i * most, most)
    if rest:
        yield Block(full, base + full * most, rest)


def rows_of(parts: Sequence[Part], most: int, least: int = 1, lead: int = 0) -> Rows:
    """The rows of ``parts``, walked together in the first one's memory order.

    most, least: elements of a row at most; rows that a long run is cut into at least. Parts of
    different sizes meet in the row-major order of each. With ``lead`` (see ``blocks``) the first
    dim stays the outermost.
    """
    if not parts[0].numel:
        return Rows(tuple(Walk(((0, 0),), ()) for _ in parts), 0, 1)
    if any(part.sizes != parts[0].sizes for part in parts):
        return _in_order(parts, most)
    first = parts[0]
    if lead:
        inner = rows_of([part.drop(0) for part in parts], most, ceil_div(least, first.sizes[0]))
        walks = tuple(
            Walk((*((part.sizes[0], part.strides[0]),), *walk.rows), walk.cols, walk.pieces,
                 walk.width)
            for part, walk in zip(parts, inner.walks, strict=True)
        )  # fmt: skip
        return Rows(walks, first.sizes[0] * inner.count, inner.width, inner.count)
    axes = sorted(range(first.ndim), key=lambda axis: (-abs(first.strides[axis]), axis))
    dims = merge([first.sizes[a] for a in axes], [[p.strides[a] for a in axes] for p in parts])
    run = 1
    if dims and all(step == 1 for step in dims[-1][1]):
        run = dims.pop()[0]
    outer = [[(size, steps[i]) for size, steps in dims] for i in range(len(parts))]
    return _cut(outer, run, most, least, first.dtype.itemsize)


def _in_order(parts: Sequence[Part], most: int) -> Rows:
    """Every part in its own row-major order."""
    dims = [merge(part.sizes, [part.strides]) for part in parts]
    run = 0
    for found in dims:
        unit = found and found[-1][1][0] == 1
        run = math.gcd(run, found[-1][0] if unit else 1)
    outer = []
    for found in dims:
        steps = [(size, step[0]) for size, step in found]
        if run > 1:
            size, step = steps.pop()
            if size > run:
                steps.append((size // run, step * run))
        outer.append(steps)
    return _cut(outer, run, most, 1, parts[0].dtype.itemsize)


def _cut(
    outer: Sequence[Sequence[tuple[int, int]]], run: int, most: int, least: int, itemsize: int
) -> Rows:
    count = product([size for size, _ in outer[0]])
    pieces = ceil_div(run, max(most, 1))
    if count * pieces < least:
        pieces = min(ceil_div(least, count), max(1, run * itemsize // SHORT_BYTES))
    elif pieces > 1:
        pieces = ceil_div(ceil_div(count * pieces, least) * least, count)
    width = ceil_div(run, pieces)
    pieces = ceil_div(run, width)
    walks = tuple(Walk(tuple(dims), ((run, 1),), pieces, width) for dims in outer)
    return Rows(walks, count * pieces, width)


# -- copies ----------------------------------------------------------------------------------------
def transfer(
    b: Builder, dst: Pool | TileRef, to: Part, src: Pool | TileRef, source: Part, shards: int = 1,
    accumulate: bool = False, lead: int = 0,
) -> None:  # fmt: skip
    """HBM to HBM by DMA alone: ``to`` = ``source`` (or += in fp32), converting where they differ.

    Each core copies its share (``lead``: see ``blocks``).
    """
    target, given = _ref(dst), _ref(src)
    size = max(to.dtype.itemsize, source.dtype.itemsize)
    enough = source.numel * size >= b.core.dma_engines * SHORT_BYTES
    least = b.core.dma_engines if enough else 1
    rows = rows_of((to, source), COPY_ROW_BYTES // size, least, lead)
    for block in blocks(b, rows.count, DMA_ROWS, shards, "d", lead=lead, unit=rows.unit):
        window: dict[str, Any] = dict(num_rows=block.count, num_cols=rows.width, row=block.row)
        b.copy_hbm(
            target.window(to.dtype, rows.walks[0], offset=to.offset, **window),
            given.window(source.dtype, rows.walks[1], offset=source.offset, **window),
            rows=block.count, row_bytes=rows.width * size, accumulate=accumulate,
        )  # fmt: skip


def _ref(tile: Pool | TileRef) -> TileRef:
    return tile[0] if isinstance(tile, Pool) else tile


# -- constants -------------------------------------------------------------------------------------
def _words(value: complex, dtype: torch.dtype) -> tuple[torch.dtype, int]:
    """``value`` in ``dtype`` as the bits of a 32-bit or 64-bit integer, repeated to fill it."""
    bits = torch.full((1,), value, dtype=dtype).view(torch.uint8)
    if dtype.itemsize < 4:
        bits = bits.repeat(4 // dtype.itemsize)
    if dtype.itemsize == 8 and torch.equal(bits[:4], bits[4:]):
        bits = bits[:4]
    kind = torch.int64 if len(bits) == 8 else torch.int32
    return kind, int(bits.view(kind))


Filler: TypeAlias = Callable[[TileRef, int], None]
"""Writes as many elements (of the destination's dtype) to each partition of a tile."""


def fill(
    b: Builder, dst: Pool | TileRef, to: Part, value: complex | Filler = 0, shards: int = 1,
    name: str = "fill", lead: int = 0,
) -> None:  # fmt: skip
    """``to`` = ``value``: one constant tile stored over and over."""
    if not to.numel:
        return
    size = to.dtype.itemsize
    nbytes = to.numel * size
    width = min(FILL_BYTES, max(SHORT_BYTES, ceil_div(ceil_div(nbytes, PARTITIONS), 64) * 64))
    width = min(width, ceil_div(nbytes, 8) * 8)
    tile = b.sbuf(name, free_bytes=width)
    if callable(value):
        value(tile[0], width // size)
    else:
        kind, word = _words(value, to.dtype)
        zero = kind == torch.int32 and word == 0
        kind = torch.float32 if zero else kind
        b.memset(tile, value=0.0 if zero else word, n=width // kind.itemsize, dtype=kind)
    for block in tiles_of(b, to, width // size, shards, lead):
        window = _ref(dst).window(to.dtype, block.walk, block.rows, block.width, row=block.row,
                                  offset=to.offset)  # fmt: skip
        view = tile[0].view(to.dtype, (1, block.each * block.width))
        b.store(window, view, rows=block.rows, row_bytes=block.width * size,
                partitions=block.parts)  # fmt: skip


@dataclass(frozen=True)
class TileOf:
    """Part of a tensor in an SBUF tile: ``each`` rows of ``width`` in ``parts`` partitions."""

    number: Index
    row: Index
    parts: int
    each: int
    width: int
    walks: tuple[Walk, ...]

    @property
    def walk(self) -> Walk:
        """Of the first of the parts."""
        return self.walks[0]

    @property
    def rows(self) -> int:
        """Rows in all partitions."""
        return self.parts * self.each


def tiles_of(
    b: Builder, to: Part | Sequence[Part], most: int, shards: int = 1, lead: int = 0
) -> Iterator[TileOf]:
    """All elements of ``to`` (or of several parts of equal sizes) in tiles of ``most`` a partition.

    The first part's memory order; never a row beyond this core's share.
    """
    parts = (to,) if isinstance(to, Part) else tuple(to)
    if not parts[0].numel:
        return
    size = max(part.dtype.itemsize for part in parts)
    long = parts[0].numel * size > PARTITIONS * SHORT_BYTES
    rows = rows_of(parts, most, PARTITIONS if long else 1, lead)
    each = max(1, most // rows.width) if rows.count > PARTITIONS else 1
    each = min(each, ceil_div(rows.count, PARTITIONS * shards))
    for block in blocks(b, rows.count, PARTITIONS * each, shards, "f", lead=lead, unit=rows.unit):
        # Never beyond the block: what follows may be another core's.
        main, left = divmod(block.count, each)
        if main:
            yield TileOf(block.number, block.row, main, each, rows.width, rows.walks)
        if left:
            yield TileOf(block.number, block.row + main * each, 1, left, rows.width, rows.walks)


# -- rows in partitions ----------------------------------------------------------------------------
@dataclass(frozen=True)
class RowWalk:
    """The rows of a tensor, whole or in part, in SBUF partitions."""

    part: Part

    @classmethod
    def of(cls, part: Part, lead: Sequence[int]) -> RowWalk:
        """The first rows along each dim of ``lead``, the last dim as columns."""
        strides = (*part.strides[: len(lead)], part.strides[-1])
        return cls(replace(part, sizes=(*lead, part.sizes[-1]), strides=strides))

    def _window(self, pool: Pool, row: Index, parts: int, at: int, count: int) -> TileRef:
        part = self.part
        dims = tuple(zip(part.sizes, part.strides, strict=True))
        return pool[0].window(
            part.dtype, Walk(dims[:-1], dims[-1:]), parts, count, row=row, col=at,
            offset=part.offset)  # fmt: skip

    def _runs(self, parts: int, count: int) -> dict[str, Any]:
        size = self.part.dtype.itemsize
        if self.part.strides[-1] == 1 or count == 1:
            return {"rows": parts, "row_bytes": count * size, "partitions": parts}
        return {"rows": parts * count, "row_bytes": size, "partitions": parts}

    def load(
        self, b: Builder, tile: TileRef, pool: Pool, row: Index, parts: int, at: int, count: int
    ) -> None:
        """``count`` columns from ``at`` on of ``parts`` rows."""
        b.load(tile.view(self.part.dtype, (1, count)), self._window(pool, row, parts, at, count),
               **self._runs(parts, count))  # fmt: skip

    def put(
        self, b: Builder, pool: Pool, tile: TileRef, row: Index, parts: int, count: int, at: int = 0
    ) -> None:
        """The reverse of ``load``: ``tile`` is a view of what is stored, converted on the way."""
        b.store(self._window(pool, row, parts, at, count), tile, **self._runs(parts, count))

    def store(
        self, b: Builder, pool: Pool, tile: TileRef, row: Index, parts: int, at: int, count: int
    ) -> None:
        """``put`` of the first ``count`` elements of a tile of this dtype."""
        self.put(b, pool, tile.view(self.part.dtype, (1, count)), row, parts, count, at)


def needs_turn(shape: Sequence[int], out: TensorSpec, source: TensorSpec) -> Grid | None:
    """The Grid of a copy that must transpose (its runs differ in direction), else None."""
    found = grid(shape, [out, source])
    return found if any(operand.transposed for operand in found.operands) else None
