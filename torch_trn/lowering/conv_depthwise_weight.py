"""The weight's gradient of a depthwise convolution: products and sums along a channel's pixels."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from torch_trn.lowering.conv_input import Channels, contiguous_run
from torch_trn.lowering.conv_shape import (
    Axis,
    Block,
    blocks_of,
    clipped,
    phases_of,
    with_blocks,
)
from torch_trn.lowering.gemm_block import segments
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.run import loop, spread_over
from torch_trn.lowering.tile import FP32
from torch_trn.memory import CORE, Index, TileRef, Walk
from torch_trn.program import Builder

__all__ = ["depthwise_weight"]

#: Output pixels of one channel in a tile.
CHUNK = 2048

#: SBUF bytes per partition for one input tile.
INPUT_BYTES = 16384


def depthwise_weight(
    b: Builder, outer: Channels, inner: Channels, out: Channels, axes: Sequence[Axis],
    dtype: torch.dtype, shards: int,
) -> None:  # fmt: skip
    """dw[g x m + j, tap] = sum over images and pixels of outer[g x m + j] x inner[g] at the tap.

    A channel of the input in each partition: VectorE multiplies, ScalarE sums along the pixels.
    """
    _Sums(b, outer, inner, out, axes, dtype, shards).run()


class _Sums:
    """Builder state of one gradient."""

    def __init__(
        self, b: Builder, outer: Channels, inner: Channels, out: Channels, axes: Sequence[Axis],
        dtype: torch.dtype, shards: int,
    ) -> None:  # fmt: skip
        self.b, self.outer, self.inner, self.out, self.dtype = b, outer, inner, out, dtype
        self.groups = ceil_div(inner.groups, shards)
        self.first: Index = CORE * self.groups if shards > 1 else 0
        self.images = axes[0].out_size
        self.axes = with_blocks(axes[1:], CHUNK, INPUT_BYTES, 1, dtype.itemsize)
        self.taps = prod(axis.kernel for axis in self.axes)

    def run(self) -> None:
        """128 channels at a time: images, blocks of pixels, outputs, taps."""
        b, m, size = self.b, self.outer.each, self.dtype.itemsize
        pixels = prod(axis.block for axis in self.axes)
        self.tile = b.sbuf(
            "inner", free_bytes=size * prod(axis.extent(axis.block) for axis in self.axes), slots=2
        )
        self.grad = b.sbuf("outer", free_bytes=pixels * size, slots=2)
        self.product = b.sbuf("product", free_bytes=pixels * 4, slots=2)
        columns = m * self.taps
        self.part = b.sbuf("part", free_bytes=columns * 4, slots=2)
        self.total = b.sbuf("total", free_bytes=columns * 4, slots=2)
        self.result = b.sbuf("result", free_bytes=columns * self.out.spec.itemsize, slots=2)
        count = prod(sum(s.count for s in axis.segments()) for axis in self.axes)
        for piece in segments(self.groups, PARTITIONS):
            with loop(b, piece.count, "r") as r:
                tile = r + piece.first
                row = self.first + (r * piece.size + piece.start)
                total = self.total[tile]
                b.memset(total, value=0.0, n=columns, partitions=piece.size)
                if prod(axis.out_size for axis in self.axes):
                    with loop(b, self.images, "image") as image:
                        for number, block in blocks_of(b, self.axes):
                            at = (tile * self.images + image) * count + number
                            self._block(at, total, image, row, piece.size, block)
                self._store(tile, total, row, piece.size)

    def _store(self, tile: Index, total: TileRef, row: Index, parts: int) -> None:
        b, spec, m = self.b, self.out.spec, self.outer.each
        columns = m * self.taps
        result = self.result[tile]
        b.tensor_copy(result, total, n=columns, partitions=parts, dtype=FP32,
                      out_dtype=None if spec.dtype == FP32 else spec.dtype)  # fmt: skip
        cols = ((m, spec.strides[0]), *zip(spec.shape[2:], spec.strides[2:], strict=True))
        walk = Walk(((self.out.groups, m * spec.strides[0]),), cols)
        run = contiguous_run(cols)
        rows = parts * (columns // run)
        b.store(
            self.out.pool[0].window(spec.dtype, walk, parts, columns, row=row),
            result.view(spec.dtype, (1, columns), partitions=parts), rows=rows,
            row_bytes=run * spec.itemsize, partitions=spread_over(parts, rows),
        )  # fmt: skip

    def _load(
        self, tile: TileRef, x: Channels, image: Index, row: Index, parts: int,
        box: Sequence[tuple[int, int]], offset: Any,
    ) -> None:  # fmt: skip
        """[channels, pixels]: every ``each``-th channel of one image."""
        total, run = prod(n for n, _ in box), contiguous_run(box)
        steps = x.spec.strides
        walk = Walk(((x.groups, x.each * steps[1]),), tuple(box))
        rows = parts * (total // run)
        self.b.load(
            tile.view(self.dtype, (1, total), partitions=parts),
            x.pool[0].window(x.spec.dtype, walk, parts, total, row=row,
                             offset=offset + image * steps[0]),
            rows=rows, row_bytes=run * x.spec.itemsize, partitions=spread_over(parts, rows),
        )  # fmt: skip

    def _block(
        self, at: Index, total: TileRef, image: Index, row: Index, parts: int, block: Block
    ) -> None:
        """One block of pixels of one image: a partial sum for each output and tap."""
        b, m = self.b, self.outer.each
        lows = [segment.valid[0][0] for segment in block.segments]
        sizes = [max(0, segment.valid[0][1] - segment.valid[0][0]) for segment in block.segments]
        counts = tuple(segment.outputs for segment in block.segments)
        whole = ((0,) * len(counts), counts)
        (phase,) = phases_of(self.axes)
        taps = [
            (tap, shift, clipped(self.axes, block.segments, shift, whole))
            for tap, shift in phase.taps
        ]
        reached = [found for found in taps if min(found[2][1]) > 0]
        if not reached:
            return
        spec = self.inner.spec
        box, start = [], 0 * CORE
        for i, axis in enumerate(self.axes):
            stride = spec.strides[i + 2]
            box.append((sizes[i], stride))
            first = block.first(i, axis.block) * axis.stride
            start = start + (first + (axis.low + lows[i])) * stride
        self._load(self.tile[at], self.inner, image, row, parts, box, start)
        part = self.part[at]
        columns = m * self.taps
        if len(reached) < len(taps):
            b.memset(part, value=0.0, n=columns, partitions=parts)
        for output in range(m):
            self._load_outer(at * m + output, image, row, parts, output, counts, block)
            for tap, shift, (begin, n) in reached:
                self._tap(at * m + output, at, parts, (begin, n, shift), counts, sizes, lows,
                          part.view(FP32, (1, 1), offset=output * self.taps + tap))  # fmt: skip
        b.tensor_tensor(total, total, part, op="add", n=columns, partitions=parts)

    def _load_outer(
        self, place: Index, image: Index, row: Index, parts: int, output: int,
        counts: Sequence[int], block: Block,
    ) -> None:  # fmt: skip
        spec = self.outer.spec
        box = list(zip(counts, spec.strides[2:], strict=True))
        offset: Any = output * spec.strides[1]
        for i, axis in enumerate(self.axes):
            offset = offset + block.first(i, axis.block) * spec.strides[i + 2]
        self._load(self.grad[place], self.outer, image, row, parts, box, offset)

    def _tap(
        self, place: Index, at: Index, parts: int, box: Any, counts: Sequence[int],
        sizes: Sequence[int], lows: Sequence[int], target: TileRef,
    ) -> None:  # fmt: skip
        """The sum of one tap's products."""
        b, (begin, n, shift) = self.b, box
        outer_steps = [prod(counts[i + 1 :]) for i in range(len(counts))]
        inner_steps = [prod(sizes[i + 1 :]) for i in range(len(sizes))]
        outer = self.grad[place].view(
            self.dtype, *zip(outer_steps, n, strict=True),
            offset=sum(start * step for start, step in zip(begin, outer_steps, strict=True)),
        )  # fmt: skip
        offset = sum(
            (start * axis.stride + by - low) * step
            for start, axis, by, low, step in zip(
                begin, self.axes, shift, lows, inner_steps, strict=True)
        )  # fmt: skip
        dims = [(axis.stride * s, size) for axis, s, size in zip(self.axes, inner_steps, n,
                                                                  strict=True)]  # fmt: skip
        inner = self.tile[at].view(self.dtype, *dims, offset=offset)
        product, count = self.product[place], prod(n)
        b.tensor_tensor(product, outer, inner, op="multiply", n=count, partitions=parts,
                        dtype=self.dtype,
                        out_dtype=None if self.dtype == FP32 else FP32)  # fmt: skip
        b.activation(product, product, op="copy", reduce=target, n=count, partitions=parts)
