"""Convolutions as implicit matrix products: no patch is ever written to HBM.

Channels are on partitions (k), pixels along the free dimension (moving), weights stationary. A
block of input is loaded once; the taps of the kernel are strided views of it in SBUF and accumulate
in PSUM, a tap that reaches beyond the edge into fewer pixels. Kernels with few input channels put
taps on partitions too. A transposed convolution (and the gradient of the input) is the same product
for each phase of its output; phases lie side by side in SBUF before they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from torch_trn.lowering.conv_input import Channels, Patches, contiguous_run, even_parts
from torch_trn.lowering.conv_kernel import Kernels
from torch_trn.lowering.conv_shape import (
    Axis,
    Block,
    Box,
    Phase,
    blocks_of,
    chunks,
    clipped,
    phases_of,
    with_blocks,
)
from torch_trn.lowering.gemm_block import Piece, segments
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.run import loop, spread_over
from torch_trn.lowering.tile import FP32
from torch_trn.memory import Index, TileRef
from torch_trn.program import Builder

__all__ = ["Conv", "ConvProgram"]

#: Pixels of one bank of PSUM in fp32, and of a moving operand.
BANK = 512

#: Pixels of a block of outputs, all phases together: what one load of the input serves.
BLOCK = 2048

#: SBUF bytes per partition for input tiles.
INPUT_BYTES = 65536


@dataclass(frozen=True)
class Conv:
    """One product of a convolution: this core's share.

    axes: images, then the pixels' axes. groups, m: the share's. turn_weights: whether the kernel is
    [m, k, taps] in HBM (else [k, m, taps]). first_channel: where the share of m begins.
    """

    x: Channels
    out: Channels
    weights: Channels
    axes: tuple[Axis, ...]
    groups: int
    m: int
    dtype: torch.dtype
    turn_weights: bool
    bias: Channels | None = None
    first_channel: Index = 0

    @property
    def k(self) -> int:
        """Input channels of a group."""
        return self.x.each


def packed(axes: Sequence[Axis], channels: int) -> list[Axis]:
    """Outer axes whose taps share the partitions with few channels, so that the array is full."""
    found = list(axes)
    for at, axis in enumerate(axes[1:], 1):
        inner = at == len(axes) - 1
        # Shifted rows of an image would be loaded row by row, each a small transfer.
        if channels * 2 > PARTITIONS or inner and (axis.stride > 1 or at > 1):
            break
        if axis.kernel > 1:
            found[at] = replace(axis, packed=True)
            channels *= axis.kernel
    return found


class ConvProgram:
    """Builder state of one convolution."""

    def __init__(self, b: Builder, c: Conv) -> None:
        self.b, self.c = b, c
        self.size = c.dtype.itemsize
        axes = list(c.axes)
        self.taps = prod(axis.kernel for axis in axes)
        # Fewer channels in a tile where the rows of a kernel that is turned would be too long.
        room = b.core.sbuf_partition_bytes // 4 // (self.taps * self.size)
        channels = max(1, min(PARTITIONS, room)) if c.turn_weights else PARTITIONS
        on_array = Patches(b, c.x, axes, c.dtype).on_array
        if c.turn_weights and not on_array and c.k <= channels:
            axes = packed(axes, c.k)
        tiles = len(Patches(b, c.x, axes, c.dtype, channels=channels).ktiles)
        axes = with_blocks(axes, BLOCK, INPUT_BYTES, 2 * tiles, self.size)
        self.axes = axes
        self.input = Patches(b, c.x, axes, c.dtype, channels=channels)
        self.ktiles = self.input.ktiles
        self.phases = phases_of(axes)
        self.kernels = Kernels(self)
        self.m_tile = self.kernels.m_tile
        self.evictions = 0
        self.banks = 0

    def run(self) -> None:
        """Emit all groups, blocks of output channels, blocks of pixels."""
        c, b = self.c, self.b
        if not (c.m and c.groups and prod(axis.out_size for axis in c.axes)):
            return
        self._allocate()
        tiles = ceil_div(c.m, self.m_tile)
        count = prod(sum(s.count for s in axis.segments()) for axis in self.axes)
        with loop(b, c.groups, "g") as g:
            for piece in segments(c.m, self.resident * self.m_tile):
                with loop(b, piece.count, "o") as o:
                    first = o * piece.size + piece.start
                    block = g * ceil_div(tiles, self.resident) + (o + piece.first)
                    parts = segments(piece.size, self.m_tile)
                    self.kernels.load(g, first, parts)
                    for number, pixels in blocks_of(b, self.axes):
                        self._pixels(block * count + number, g, first, parts, pixels)

    def _allocate(self) -> None:
        c, b = self.c, self.b
        each = len(self.ktiles) * self.input.tile_bytes(self.axes)
        self.input.allocate(max(2, min(6, INPUT_BYTES // each)))
        self.resident = self.kernels.allocate()
        if c.out.last:
            self.turned = b.psum("turned", free_bytes=BANK * 4, slots=2)
        room = b.psum_room_banks
        self.acc = b.psum("acc", free_bytes=BANK * 4, slots=min(4, room))
        pixels = prod(axis.block * axis.phases for axis in self.axes)
        element = 4 if c.out.last else c.out.spec.itemsize
        self.result = b.sbuf("result", free_bytes=pixels * element, slots=2)
        if c.out.last:
            self.stored = b.sbuf("stored", free_bytes=ceil_div(BANK, PARTITIONS) * self.m_tile
                                 * c.out.spec.itemsize, slots=2)  # fmt: skip

    # -- pixels --------------------------------------------------------------------------------
    def _pixels(
        self, at: Index, group: Index, first: Index, parts: Sequence[Piece], block: Block
    ) -> None:
        """One block of pixels: its input once, then every output channel tile."""
        b = self.b
        self.input.load(at, group, block)
        tiles = sum(part.count for part in parts)
        for part in parts:
            with loop(b, part.count, "t") as t:
                tile = t + part.first
                result = self.result[at * tiles + tile]
                for phase in self.phases:
                    self._phase(phase, result, at, tile, part.size, block)
                channel = t * part.size + (part.start + first)
                self._store(result, group, channel, part.size, block, at)

    def _stored(self, block: Block) -> tuple[int, ...]:
        return tuple(segment.stored for segment in block.segments)

    def _phase(
        self, phase: Phase, result: TileRef, at: Index, tile: Index, m: int, block: Block
    ) -> None:
        """The outputs of one phase, a bank of them at a time."""
        stored = self._stored(block)
        steps = [prod(stored[i + 1 :]) for i in range(len(stored))]
        counts = [
            ceil_div(size - offset, axis.phases)
            for size, offset, axis in zip(stored, phase.offsets, self.axes, strict=True)
        ]
        if min(counts) <= 0:
            return
        for start, sizes in chunks(counts, BANK):
            n = prod(sizes)
            self.banks += 1
            bank = self.acc[at + tile + self.banks]
            self._products(phase, bank, (start, sizes), at, tile, m, block)
            offset = sum(
                (begin * axis.phases + shift) * step
                for begin, shift, axis, step in zip(
                    start, phase.offsets, self.axes, steps, strict=True)
            )  # fmt: skip
            dims = [
                (axis.phases * step, size)
                for axis, step, size in zip(self.axes, steps, sizes, strict=True)
            ]
            dtype = FP32 if self.c.out.last else self.c.out.spec.dtype
            self._evict(result.view(dtype, *dims, offset=offset), bank, tile, m, n, dtype)

    def _products(
        self, phase: Phase, bank: TileRef, chunk: Box, at: Index, tile: Index, m: int, block: Block
    ) -> None:
        """All taps and channel tiles into one PSUM bank."""
        b, c = self.b, self.c
        n = prod(chunk[1])
        taps = [
            (tap, clipped(self.axes, block.segments, shift, chunk)) for tap, shift in phase.taps
        ]
        taps = [(tap, box) for tap, box in taps if min(box[1]) > 0]
        # The first one replaces what the bank held, so it must reach every pixel.
        taps.sort(key=lambda found: found[1] != chunk)
        clear = not taps or taps[0][1] != chunk
        if clear:
            b.memset(bank, value=0.0, n=n, partitions=m)
        shifts = dict(phase.taps)
        tiles, steps = len(self.ktiles), self.input.steps(block)
        bank_steps = [prod(chunk[1][i + 1 :]) for i in range(len(steps))]
        for piece in self._alike():
            with loop(b, piece.count, "k") as k:
                index = k + piece.first
                for order, (tap, (start, sizes)) in enumerate(taps):
                    place = self._place(shifts[tap], start, block)
                    into = sum(
                        (begin - first) * step
                        for begin, first, step in zip(start, chunk[0], bank_steps, strict=True)
                    )
                    adds: bool | Index = True if clear or order else index
                    b.nc_matmul(
                        bank.view(FP32, *zip(bank_steps, sizes, strict=True), offset=into),
                        stationary=self.kernels.stationary(tile * tiles + index, tap, m),
                        moving=self.input.pool[at * tiles + index].view(
                            c.dtype,
                            *((axis.step * step, size) for axis, step, size in
                              zip(self.axes, steps, sizes, strict=True)),
                            offset=place),
                        k=piece.size, m=m, n=prod(sizes), dtype=c.dtype, accumulate=adds,
                    )  # fmt: skip

    def _alike(self) -> list[Piece]:
        """Channel tiles with equally many rows."""
        found: list[Piece] = []
        for at, ktile in enumerate(self.ktiles):
            if found and found[-1].size == ktile.rows:
                found[-1] = replace(found[-1], count=found[-1].count + 1)
            else:
                found.append(Piece(at, 1, ktile.rows, 0))
        return found

    def _place(self, shift: tuple[int, ...], start: Sequence[int], block: Block) -> int:
        """The element of an input tile that the first of these outputs reads."""
        place = 0
        for at, (axis, step) in enumerate(zip(self.axes, self.input.steps(block), strict=True)):
            low = 0 if axis.packed else block.segments[at].valid[0][0]
            place += (start[at] * axis.step + shift[at] - low) * step
        return place

    def copy(
        self, dst: TileRef, src: TileRef, n: int, parts: int, dtype: torch.dtype, out: torch.dtype
    ) -> None:
        """PSUM to SBUF, on VectorE and ScalarE in turn."""
        self.evictions += 1
        given: dict[str, Any] = {"n": n, "partitions": parts, "dtype": dtype}
        if out != dtype:
            given["out_dtype"] = out
        if self.evictions % 2:
            self.b.tensor_copy(dst, src, **given)
        else:
            self.b.activation(dst, src, op="copy", **given)

    def _evict(
        self, result: TileRef, bank: TileRef, tile: Index, m: int, n: int, dtype: torch.dtype
    ) -> None:
        """A bank to its place in the result, with the bias."""
        if self.c.bias is None:
            self.copy(result, bank, n, m, FP32, dtype)
            return
        self.evictions += 1
        bias = self.kernels.bias[tile].view(self.c.bias.spec.dtype, (1, 1))
        given: dict[str, Any] = {"n": n, "partitions": m, "dtype": FP32}
        if dtype != FP32:
            given["out_dtype"] = dtype
        if self.evictions % 2:
            self.b.tensor_scalar(result, [bank, bias], op="add", operands=(None,), **given)
        else:
            self.b.activation(result, [bank, bias], op="identity", bias=None, **given)

    # -- results -------------------------------------------------------------------------------
    def _store(
        self, result: TileRef, group: Index, channel: Index, m: int, block: Block, at: Index
    ) -> None:
        """A block of output channels to HBM."""
        c, b = self.c, self.b
        spec, stored = c.out.spec, self._stored(block)
        box = list(zip(stored[1:], spec.strides[2:], strict=True))
        offset: Index = 0
        for at, axis in enumerate(self.axes):
            if at:
                first = block.first(at, axis.block) * axis.phases
                offset = offset + first * spec.strides[at + 1]
        image = block.first(0, self.axes[0].block)
        total, images = prod(stored), stored[0]
        channel = channel + c.first_channel
        if c.out.last:
            self._store_turned(result, group, channel, m, (image, images, box, offset), total, at)
            return
        run = contiguous_run([(images, spec.strides[0]), *box])
        rows = m * (total // run)
        b.store(
            c.out.window(group, channel, m, image, images, box, offset),
            result.view(spec.dtype, (1, total), partitions=m), rows=rows,
            row_bytes=run * spec.itemsize, partitions=spread_over(m, rows),
        )  # fmt: skip

    def _store_turned(
        self, result: TileRef, group: Index, channel: Index, m: int, where: tuple[Any, ...],
        total: int, at: Index,
    ) -> None:  # fmt: skip
        """Channels lie innermost: turn 512 pixels at a time, then store rows of channels."""
        c, b = self.c, self.b
        spec = c.out.spec
        image, images, box, offset = where
        whole = c.out.window(group, channel, m, image, images, box, offset, turned=True)
        pattern: Any = whole.pattern
        for start in range(0, total, BANK):
            pixels = min(BANK, total - start)
            self.banks += 1
            bank, tile = self.turned[at + self.banks], self.stored[at + self.banks]
            parts = even_parts(pixels)
            each = parts[0][2]
            for column in range(each):
                rows = len(range(column, pixels, each))
                b.nc_transpose(
                    bank.view(FP32, (1, m), offset=column * m),
                    result.view(FP32, (each, rows), offset=start + column),
                    partitions=m, n=rows, dtype=FP32,
                )  # fmt: skip
            for first, rows, n in parts:
                partition = first // each
                self.copy(
                    tile.view(spec.dtype, (1, n * m), partition=partition, partitions=rows),
                    bank.view(FP32, (1, n * m), partition=partition, partitions=rows),
                    n * m, rows, FP32, spec.dtype,
                )  # fmt: skip
                part = replace(pattern, num_rows=rows * n, row=pattern.row + (start + first))
                b.store(
                    replace(whole, pattern=part),
                    tile.view(spec.dtype, (1, n * m), partition=partition, partitions=rows),
                    rows=rows * n, row_bytes=m * spec.itemsize,
                    partitions=spread_over(rows, rows * n),
                )  # fmt: skip
