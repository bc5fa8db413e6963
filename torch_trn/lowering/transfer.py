"""Loads and stores of a Kernel's tiles: windows of operands, descriptors, what a core owns."""

from __future__ import annotations

from dataclasses import replace

import torch

from torch_trn.lowering.call import REAL_OF
from torch_trn.lowering.emit import Emitter
from torch_trn.lowering.extent import Extent
from torch_trn.lowering.kernel import Geometry, Kernel
from torch_trn.lowering.layout import Grid, Operand, ceil_div, walk_of
from torch_trn.lowering.pools import descriptors, spread_over
from torch_trn.lowering.tile import Output, Value
from torch_trn.lowering.turn import Turner
from torch_trn.memory import CORE, Pool, TileRef, Walk, Window, affine
from torch_trn.program import Builder


class Transfers:
    """Methods of the Runner that move data between HBM and SBUF."""

    kernel: Kernel
    b: Builder
    grid: Grid
    emitter: Emitter
    turner: Turner
    results: list[Pool]

    def ref(self, value: Value) -> TileRef:
        """The tile `value` lives in at the current loop indices."""
        raise NotImplementedError

    def window(
        self, operand: Operand, kind: str, pool: Pool, extent: Extent, geometry: Geometry
    ) -> TileRef:
        """What a tile of a `kind` value is of an operand in HBM, all partitions."""
        dtype, reals = operand.spec.dtype, self.kernel.reals
        walk = walk_of(operand, self.grid, geometry.pieces, geometry.piece)
        if dtype.is_complex:
            dtype, walk = REAL_OF[dtype], _halved(walk)
        place = {"offset": operand.offset * reals}
        if kind == "one":
            return pool[0].window(dtype, walk, extent.parts, 1, **place)
        rows, cols = extent.parts * extent.group, extent.width * reals
        if kind == "row":
            return pool[0].window(
                dtype, walk, extent.parts, cols, col=affine(extent.col) * reals, **place
            )
        if kind == "col" and geometry.spread:
            walk = Walk((*walk.rows, (geometry.parts, 0)), ((1, 0),))
        if kind == "col":
            return pool[0].window(dtype, walk, rows, 1, row=extent.row, **place)
        return pool[0].window(
            dtype, walk, rows, cols, row=extent.row, col=affine(extent.col) * reals, **place
        )

    def load(
        self, value: Value, operand: Operand, source: Pool, extent: Extent, geometry: Geometry
    ) -> None:
        """HBM to SBUF, one operand of one tile."""
        if operand.transposed and value.kind == "full" and self.turner.load(
            value, operand, source, extent, geometry
        ):  # fmt: skip
            return
        rows, row_bytes = descriptors(operand, value.kind, extent, geometry)
        place = self.window(operand, value.kind, source, extent, geometry)
        tile = self.emitter.at(value, self.ref, value.kind, extent, value.dtype)
        if operand.index is None:
            self.b.load(tile, place, rows=rows, row_bytes=row_bytes,
                        partitions=spread_over(extent.parts, rows))  # fmt: skip
            return
        numbers = self.kernel.ins[operand.index]
        index = self.emitter.at(numbers, self.ref, numbers.kind, extent, torch.int32)
        self.b.load(tile, place, rows=rows, row_bytes=row_bytes,
                    partitions=spread_over(extent.parts, rows), index=index,
                    index_step=operand.index_step, index_limit=operand.index_limit)  # fmt: skip

    def store(self, output: Output, operand: Operand, extent: Extent, geometry: Geometry) -> None:
        """SBUF to HBM, one result of one tile."""
        kind = operand.kind
        if operand.transposed and kind == "full":
            self.turner.store(output, operand, extent, geometry)
            return
        if operand.spread > 1:
            # A load may fetch the gaps between strided elements, a store must not write them.
            operand = replace(operand, run=1, spread=1)
        rows, row_bytes = descriptors(operand, kind, extent, geometry)
        single = kind in ("row", "one") or kind == "col" and geometry.spread
        if kind in ("row", "one"):
            rows //= extent.parts
        elif kind == "col":
            rows = 1 if geometry.spread else ceil_div(rows, operand.every)
        value, target = output.value, self.results[output.index]
        if single and not (kind == "row" and geometry.spread):
            place = self.single_window(operand, kind, target, extent, geometry)
            n = extent.free(kind) if kind == "row" else 1
            tile = self.ref(value).view(
                value.dtype, (1, n), offset=value.place, partitions=1
            )  # fmt: skip
        else:
            place = self.window(operand, kind, target, extent, geometry)
            tile = self.emitter.at(value, self.ref, kind, extent, operand.spec.dtype)
            if kind == "col" and rows < extent.parts:
                # Rows that share an element are one descriptor, but all are named.
                n = extent.group
                tile = self.ref(value).view(
                    value.dtype, (value.stride, n), offset=value.place, partitions=extent.parts
                )
        self.b.store(
            place, tile, rows=rows, row_bytes=row_bytes, partitions=spread_over(extent.parts, rows)
        )

    def single_window(
        self, operand: Operand, kind: str, pool: Pool, extent: Extent, geometry: Geometry
    ) -> TileRef:
        """What one partition stores: a row or an element of the first core, or a fold."""
        place = self.window(operand, kind, pool, extent, geometry)
        window = place.pattern
        assert isinstance(window, Window)
        if kind == "col":
            walk = Walk(window.walk.rows[:-1], ((1, 0),))
            return replace(place, pattern=replace(
                window, walk=walk, num_rows=1, row=affine(extent.place[0])))  # fmt: skip
        mine = affine(0) if self.kernel.shards == 1 or geometry.col_base != 0 else affine(CORE)
        walk = replace(window.walk, rows=((1, 0),))
        return replace(place, pattern=replace(window, walk=walk, num_rows=1, row=mine))


def _halved(walk: Walk) -> Walk:
    """A walk over complex elements as one over their real and imaginary parts."""
    rows, cols = (tuple((size, 2 * step) for size, step in dims) for dims in (walk.rows, walk.cols))
    return Walk(rows, (*cols, (2, 1)), walk.pieces, 2 * walk.width)
