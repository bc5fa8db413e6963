"""Kernels of convolutions: [k, m] tiles in SBUF, one for each tap and tile of channels."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from torch_trn.lowering.conv_input import KTile, contiguous_run
from torch_trn.lowering.gemm_block import Piece, segments
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.run import loop, spread_over
from torch_trn.memory import Index, TileRef, Walk

if TYPE_CHECKING:
    from torch_trn.lowering.conv import ConvProgram

__all__ = ["Kernels"]

#: Columns of one PSUM bank in fp32.
BANK = 512


class Kernels:
    """The weights (and biases) of some tiles of output channels.

    They come in the order of their memory: taps innermost, or channels (channels_last).
    """

    def __init__(self, conv: ConvProgram) -> None:
        self.conv, self.b, self.c = conv, conv.b, conv.c
        self.ktiles, self.taps = conv.ktiles, conv.taps
        # Taps that are not on partitions.
        self.free_taps = prod(axis.kernel for axis in conv.axes if not axis.packed)
        spec = self.c.weights.spec
        self.dims = tuple(zip(spec.shape[2:], spec.strides[2:], strict=True))
        self.taps_outer = self.taps > 1 and spec.shape[1] > 1 and spec.strides[1] == 1
        self.banks = 0
        # A tile of output channels whose weights take no more than a third of SBUF.
        width = self.free_taps if self.c.turn_weights else self.taps
        each = len(self.ktiles) * width * self.c.dtype.itemsize
        room = self.b.core.sbuf_partition_bytes // 3
        self.m_tile = max(1, min(PARTITIONS, self.c.m, room // each))

    def allocate(self) -> int:
        """The pools; returns how many tiles of output channels fit."""
        c, b, size = self.c, self.b, self.c.dtype.itemsize
        width = (self.free_taps if c.turn_weights else self.taps) * self.m_tile
        each = len(self.ktiles) * width * size
        tiles = ceil_div(c.m, self.m_tile)
        resident = max(1, min(tiles, b.sbuf_room_bytes // 3 // each))
        self.pool = b.sbuf("weights", free_bytes=width * size, slots=len(self.ktiles) * resident)
        if c.turn_weights:
            natural = min(self.conv.input.channels, c.k) * self.taps * size
            slots = 2 if 2 * natural <= b.sbuf_room_bytes // 3 else 1
            self.natural = b.sbuf("weights_natural", free_bytes=natural, slots=slots)
            self.turned = b.psum("weights_turned", free_bytes=BANK * 4, slots=2)
        if c.bias is not None:
            self.bias = b.sbuf("bias", free_bytes=c.bias.spec.itemsize, slots=resident)
        return resident

    def load(self, group: Index, first: Index, parts: Sequence[Piece]) -> None:
        """Output channels from ``first`` on: kernel and bias."""
        for part in parts:
            with loop(self.b, part.count, "t") as t:
                channel = t * part.size + (part.start + first)
                self._load_bias(t + part.first, group, channel, part.size)
                slot = (t + part.first) * len(self.ktiles)
                if self.c.turn_weights:
                    self._turned(slot, group, channel, part.size)
                else:
                    self._direct(slot, group, channel, part.size)

    def _load_bias(self, slot: Index, group: Index, channel: Index, m: int) -> None:
        c, b = self.c, self.b
        if c.bias is None:
            return
        spec = c.bias.spec
        row = (group + c.bias.first_group) * c.bias.each + (channel + c.first_channel)
        walk = Walk(((spec.shape[0], spec.strides[0]),), ())
        window = c.bias.pool[0].window(spec.dtype, walk, m, 1, row=row)
        tile = self.bias[slot].view(spec.dtype, (1, 1), partitions=m)
        b.load(tile, window, rows=m, row_bytes=spec.itemsize, queue="weights")

    def _bring(self, tile: TileRef, rows: int, row: Index, first: Index, count: int) -> None:
        """[rows, taps x count] of the kernel, from (row, channel ``first``) on."""
        c, w = self.c, self.c.weights
        spec = w.spec
        walk = ((w.groups, w.each * spec.strides[0]), (w.each, spec.strides[0]))
        total = count * self.taps
        if self.taps_outer:
            run = contiguous_run([*self.dims, (count, 1)])
            window = w.pool[0].window(
                spec.dtype, Walk(walk, (*self.dims, (count, 1))), rows, total, row=row,
                offset=first,
            )  # fmt: skip
        else:
            run = contiguous_run([(count, spec.strides[1]), *self.dims])
            cols = ((spec.shape[1], spec.strides[1]), *self.dims)
            window = w.pool[0].window(spec.dtype, Walk(walk, cols), rows, total, row=row,
                                      col=first * self.taps)  # fmt: skip
        descriptors = rows * (total // run)
        self.b.load(
            tile.view(c.dtype, (1, total), partitions=rows), window, rows=descriptors,
            row_bytes=run * c.dtype.itemsize, queue="weights",
            partitions=spread_over(rows, descriptors),
        )  # fmt: skip

    def _direct(self, slot: Index, group: Index, channel: Index, m: int) -> None:
        """A kernel [k, m, taps]: k goes to partitions as it lies."""
        w = self.c.weights
        for at, ktile in enumerate(self.ktiles):
            _, first, count, _ = ktile.entries[0]
            row = (group + w.first_group) * w.each + first
            self._bring(self.pool[slot + at], count, row, channel + self.c.first_channel, m)

    def _turned(self, slot: Index, group: Index, channel: Index, m: int) -> None:
        """A kernel [m, k, taps]: natural rows, then a transpose for each tap and channel tile."""
        w = self.c.weights
        row = (group + w.first_group) * w.each + (channel + self.c.first_channel)
        loads, loaded = 0, -1
        for at, ktile in enumerate(self.ktiles):
            _, first, count, _ = ktile.entries[0]
            if first != loaded:
                natural = self.natural[loads]
                loads, loaded = loads + 1, first
                self._bring(natural, m, row, first, count)
            self._turn_taps(self.pool[slot + at], natural, ktile, m)

    def _turn_taps(self, target: TileRef, natural: TileRef, ktile: KTile, m: int) -> None:
        """[m, (channels, taps)] to [rows of k, m] for each tap that is not on partitions."""
        b, dtype = self.b, self.c.dtype
        together = max(1, BANK // m)
        count, packs = ktile.entries[0][2], len(ktile.entries)
        tap_step, channel_step = (count, 1) if self.taps_outer else (1, self.taps)
        for piece in segments(self.free_taps, together):
            with loop(b, piece.count, "tap") as tap:
                self.banks += 1
                bank = self.turned[tap + self.banks]
                first = tap * piece.size + piece.start
                for beside in range(piece.size):
                    offset = first + (beside + ktile.first_pack * self.free_taps)
                    b.nc_transpose(
                        bank.view(dtype, (1, m), offset=beside * m),
                        natural.view(dtype, (self.free_taps * tap_step, packs),
                                     (channel_step, count), offset=offset * tap_step),
                        partitions=m, n=ktile.rows, dtype=dtype,
                    )  # fmt: skip
                n = piece.size * m
                self.conv.copy(target.view(dtype, (1, n), offset=first * m),
                               bank.view(dtype, (1, n)), n, ktile.rows, dtype, dtype)  # fmt: skip

    def stationary(self, slot: Index, tap: int, m: int) -> TileRef:
        """The stationary operand of one tap: [k, m]."""
        dtype = self.c.dtype
        if self.c.turn_weights:
            return self.pool[slot].view(dtype, (1, m), offset=tap % self.free_taps * m)
        if self.taps_outer:
            return self.pool[slot].view(dtype, (1, m), offset=tap * m)
        return self.pool[slot].view(dtype, (self.taps, m), offset=tap)
