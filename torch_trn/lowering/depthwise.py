"""Depthwise convolution: a channel of an image in each partition, VectorE goes through the taps."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from torch_trn.lowering.conv_input import contiguous_run
from torch_trn.lowering.conv_shape import Block, Phase, blocks_of, clipped, phases_of, with_blocks
from torch_trn.lowering.gemm_block import segments
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.run import loop, spread_over
from torch_trn.lowering.tile import FP32
from torch_trn.memory import CORE, Index, TileRef, Walk
from torch_trn.program import Builder

if TYPE_CHECKING:
    from torch_trn.lowering.conv import Conv

#: Output pixels of one channel in a tile.
CHUNK = 2048

#: SBUF bytes per partition for one input tile.
INPUT_BYTES = 16384


def depthwise(b: Builder, c: Conv, shards: int) -> None:
    """acc = tap x input + acc, a scalar_tensor_tensor per tap (the taps are per-partition scalars).

    Rows are images x channels; `m` output channels per input channel repeat the passes.
    """
    _Depthwise(b, c, shards).run()


class _Depthwise:
    """Builder state of one depthwise convolution."""

    def __init__(self, b: Builder, c: Conv, shards: int) -> None:
        self.b, self.c = b, c
        images = c.x.spec.shape[0]
        self.rows = ceil_div(images * c.groups, shards)
        self.first: Index = CORE * self.rows if shards > 1 else 0
        self.axes = with_blocks(c.axes[1:], CHUNK, INPUT_BYTES, 1, c.dtype.itemsize)
        self.phases = phases_of(self.axes)
        self.taps = prod(axis.kernel for axis in self.axes)
        self.images = images

    def run(self) -> None:
        """Rows, blocks of pixels, output channels."""
        c, b = self.c, self.b
        if not (self.rows and c.m and prod(axis.out_size for axis in self.axes)):
            return
        pixels = prod(axis.block * axis.phases for axis in self.axes)
        size = c.dtype.itemsize
        extent = prod(axis.extent(axis.block) for axis in self.axes)
        self.tile = b.sbuf("input", free_bytes=extent * size, slots=2)
        self.weights = b.sbuf("taps", free_bytes=self.taps * c.m * size, slots=2)
        self.acc = b.sbuf("acc", free_bytes=pixels * 4, slots=2)
        self.result = b.sbuf("result", free_bytes=pixels * c.out.spec.itemsize, slots=2)
        if c.bias is not None:
            self.bias = b.sbuf("bias", free_bytes=c.m * c.bias.spec.itemsize, slots=2)
        count = prod(sum(s.count for s in axis.segments()) for axis in self.axes)
        for piece in segments(self.rows, PARTITIONS):
            with loop(b, piece.count, "r") as r:
                tile = r + piece.first
                row = self.first + (r * piece.size + piece.start)
                self._load_taps(tile, row, piece.size)
                for number, block in blocks_of(b, self.axes):
                    at = tile * count + number
                    self._load(at, row, piece.size, block)
                    for output in range(c.m):
                        self._output(at, tile, row, piece.size, output, block)

    def _load_taps(self, tile: Index, row: Index, parts: int) -> None:
        """The taps (and biases) of every row's outputs."""
        c, b, w = self.c, self.b, self.c.weights.spec
        taps = tuple(zip(w.shape[2:], w.strides[2:], strict=True))
        # A kernel [groups x m, 1, taps], or [groups, m, taps] of a transposed convolution.
        first, step = (c.m * w.strides[0], w.strides[0]) if c.turn_weights else w.strides[:2]
        cols = ((c.m, step), *taps)
        run = contiguous_run(cols)
        total = c.m * self.taps
        b.load(
            self.weights[tile].view(c.dtype, (1, total), partitions=parts),
            c.weights.pool[0].window(w.dtype, self._walk(0, first, cols), parts, total, row=row),
            rows=parts * (total // run), row_bytes=run * w.itemsize, queue="taps",
            partitions=spread_over(parts, parts * (total // run)),
        )  # fmt: skip
        if c.bias is not None:
            spec = c.bias.spec
            (step,) = spec.strides
            b.load(
                self.bias[tile].view(spec.dtype, (1, c.m), partitions=parts),
                c.bias.pool[0].window(spec.dtype, self._walk(0, c.m * step, ((c.m, step),)), parts,
                                      c.m, row=row),
                rows=parts, row_bytes=c.m * spec.itemsize, queue="taps",
            )  # fmt: skip

    def _walk(self, image: int, group: int, cols: tuple[tuple[int, int], ...]) -> Walk:
        return Walk(((self.images, image), (self.c.groups, group)), cols)

    def _load(self, at: Index, row: Index, parts: int, block: Block) -> None:
        """The input under one block of pixels."""
        c, b, spec = self.c, self.b, self.c.x.spec
        box, offset = [], 0 * CORE
        for i, axis in enumerate(self.axes):
            low, high = block.segments[i].valid[0]
            if high <= low:
                return
            stride = spec.strides[i + 2]
            box.append((high - low, stride))
            offset = offset + (block.first(i, axis.block) * axis.stride + (axis.low + low)) * stride
        total, run = prod(n for n, _ in box), contiguous_run(box)
        walk = self._walk(spec.strides[0], spec.strides[1], tuple(box))
        rows = parts * (total // run)
        b.load(
            self.tile[at].view(c.dtype, (1, total), partitions=parts),
            c.x.pool[0].window(spec.dtype, walk, parts, total, row=row, offset=offset),
            rows=rows, row_bytes=run * spec.itemsize, partitions=spread_over(parts, rows),
        )  # fmt: skip

    def _output(
        self, at: Index, tile: Index, row: Index, parts: int, output: int, block: Block
    ) -> None:
        """One output channel of each row."""
        c, b, spec = self.c, self.b, self.c.out.spec
        place = at * c.m + output
        stored = tuple(segment.stored for segment in block.segments)
        total = prod(stored)
        acc, result = self.acc[place], self.result[place]
        for phase in self.phases:
            self._phase(phase, acc, at, tile, parts, output, block)
        out = None if spec.dtype == FP32 else spec.dtype
        small: list[TileRef] = []
        bias: float | None = 0.0
        if c.bias is not None:
            small, bias = [self.bias[tile].view(c.bias.spec.dtype, (1, 1), offset=output)], None
        b.activation(result, [acc, *small], op="identity", bias=bias, n=total, partitions=parts,
                     out_dtype=out)  # fmt: skip
        box = tuple(zip(stored, spec.strides[2:], strict=True))
        offset: Any = output * spec.strides[1]
        for i, axis in enumerate(self.axes):
            offset = offset + block.first(i, axis.block) * (axis.phases * spec.strides[i + 2])
        run = contiguous_run(box)
        rows = parts * (total // run)
        walk = self._walk(spec.strides[0], c.m * spec.strides[1], box)
        b.store(
            c.out.pool[0].window(spec.dtype, walk, parts, total, row=row, offset=offset),
            result.view(spec.dtype, (1, total), partitions=parts), rows=rows,
            row_bytes=run * spec.itemsize, partitions=spread_over(parts, rows),
        )  # fmt: skip

    def _phase(
        self, phase: Phase, acc: TileRef, at: Index, tile: Index, parts: int, output: int,
        block: Block,
    ) -> None:  # fmt: skip
        """The taps of one phase, each into the outputs that it reaches."""
        b, c = self.b, self.c
        stored = tuple(segment.stored for segment in block.segments)
        counts = tuple(
            ceil_div(size - offset, axis.phases)
            for size, offset, axis in zip(stored, phase.offsets, self.axes, strict=True)
        )
        if min(counts) <= 0:
            return
        whole = ((0,) * len(counts), counts)
        taps = [
            (tap, shift, clipped(self.axes, block.segments, shift, whole))
            for tap, shift in phase.taps
        ]
        taps = [found for found in taps if min(found[2][1]) > 0]
        taps.sort(key=lambda found: found[2] != whole)
        if not taps or taps[0][2] != whole:
            view = self._outputs(acc, phase, stored, whole)
            b.memset(view, value=0.0, n=prod(counts), partitions=parts)
            taps = [(-1, (), whole), *taps]
        for order, (tap, shift, box) in enumerate(taps):
            if tap < 0:
                continue
            given: dict[str, Any] = {"n": prod(box[1]), "partitions": parts}
            source = self._inputs(self.tile[at], shift, box, block)
            scale = self.weights[tile].view(c.dtype, (1, 1), offset=output * self.taps + tap)
            view = self._outputs(acc, phase, stored, box)
            if order == 0:
                b.tensor_scalar(view, [source, scale], op="multiply", operands=(None,),
                                dtype=c.dtype, out_dtype=None if c.dtype == FP32 else FP32,
                                **given)  # fmt: skip
            else:
                b.scalar_tensor_tensor(view, [source, scale], view, op="multiply,add",
                                       scalar=None, **given)  # fmt: skip

    def _outputs(
        self, acc: TileRef, phase: Phase, stored: tuple[int, ...], box: Any
    ) -> TileRef:  # fmt: skip
        """Outputs of one phase in the accumulator."""
        steps = [prod(stored[i + 1 :]) for i in range(len(stored))]
        offset = sum(
            (start * axis.phases + shift) * step
            for start, shift, axis, step in zip(
                box[0], phase.offsets, self.axes, steps, strict=True)
        )  # fmt: skip
        dims = [
            (axis.phases * step, n) for axis, step, n in zip(self.axes, steps, box[1], strict=True)
        ]
        return acc.view(FP32, *dims, offset=offset)

    def _inputs(self, tile: TileRef, shift: tuple[int, ...], box: Any, block: Block) -> TileRef:
        """What one tap reads for a box of outputs."""
        lows = [segment.valid[0][0] for segment in block.segments]
        sizes = [max(1, segment.valid[0][1] - segment.valid[0][0]) for segment in block.segments]
        steps = [prod(sizes[i + 1 :]) for i in range(len(sizes))]
        offset = sum(
            (start * axis.stride + by - low) * step
            for start, axis, by, low, step in zip(
                box[0], self.axes, shift, lows, steps, strict=True)
        )  # fmt: skip
        dims = [
            (axis.stride * step, n) for axis, step, n in zip(self.axes, steps, box[1], strict=True)
        ]
        return tile.view(self.c.dtype, *dims, offset=offset)
