"""Convolutions as implicit matrix products: no patch is ever written to HBM.

Channels are on partitions (k), pixels along the free dimension (moving), weights stationary. A
block of input rows is loaded once; the taps of the kernel are strided views of it in SBUF and
accumulate in PSUM. Kernels with few input channels put taps on partitions too. A transposed
convolution (and the gradient of the input) is the same product seen from the input's pixels: its
taps land on the phases of the output, which are interleaved in SBUF before they are stored.
Depthwise convolutions have nothing to contract, so VectorE does them tap by tap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from torch_trn.lowering.gemm import BANK
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.run import loop, spread_over
from torch_trn.lowering.tile import FP32
from torch_trn.memory import Index, Pool, TileRef
from torch_trn.program import Builder

#: Pixels that one load brings (several PSUM banks), so that rows in HBM are long.
PIXEL_BLOCK = 2048

#: Elements of a kernel row that are brought to SBUF at a time to be turned.
NATURAL_WEIGHTS = 4096


@dataclass
class Conv:
    """Sizes of one product: `pixels` columns for each of `images`, `taps` of the kernel.

    read, written: elements loaded and stored per channel and image; in_run, out_run: elements next
    to each other in HBM there.
    """

    images: int
    groups: int
    k: int
    m: int
    taps: int
    pixels: int
    read: int
    written: int
    in_run: int
    out_run: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    turn_weights: bool
    turn_input: bool = False
    turn_output: bool = False

    @property
    def pack(self) -> int:
        """Taps that share the partitions with their channels, so that the array's rows are full."""
        if self.written > self.pixels or self.turn_input or not self.turn_weights:
            return 1
        return max(1, min(self.taps, PARTITIONS // self.k))

    @property
    def steps(self) -> int:
        """Products one after the other for each channel tile: taps, or packs of taps."""
        return ceil_div(self.taps, self.pack)

    @property
    def channel_tiles(self) -> int:
        """Tiles of 128 input channels."""
        return ceil_div(self.k, PARTITIONS)


class ConvProgram:
    """Builder state of one convolution."""

    def __init__(self, b: Builder, c: Conv, x: Pool, w: Pool, out: Pool, bias: Pool | None) -> None:
        self.b, self.c, self.x, self.w, self.out, self.bias = b, c, x, w, out, bias
        self.size = c.dtype.itemsize
        self.block = min(
            PIXEL_BLOCK, max(c.pixels, BANK) if c.pixels > BANK else self._images() * c.pixels
        )
        self.block = max(1, self.block)
        tiles = ceil_div(c.m, PARTITIONS)
        each = c.channel_tiles * c.steps * PARTITIONS * self.size
        spare = b.sbuf_room_bytes // 2
        self.resident = max(1, min(tiles, spare // max(each, 1)))

    def _images(self) -> int:
        """Small images that share a block of columns."""
        return max(1, min(self.c.images, BANK // max(self.c.pixels, 1)))

    def run(self) -> None:
        """Emit all groups, output channel blocks, pixel blocks."""
        c, b = self.c, self.b
        if not (c.images and c.pixels and c.m and c.k and c.groups):
            return
        self._allocate()
        tiles = ceil_div(c.m, PARTITIONS)
        with loop(b, c.groups, "g") as g:
            for first, trips, count in _pieces(tiles, self.resident):
                with loop(b, trips, "o") as o:
                    block = g * ceil_div(tiles, self.resident) + (o + first)
                    last = c.m - (tiles - 1) * PARTITIONS if first + trips == ceil_div(
                        tiles, self.resident) and trips == 1 else PARTITIONS  # fmt: skip
                    self._channel_block(block, count, last)

    def _allocate(self) -> None:
        c, b, size = self.c, self.b, self.size
        ratio = max(1.0, c.read / max(c.pixels, 1))
        per_block = int(self.block * ratio) + 64
        channel_tiles = c.channel_tiles * (c.steps if c.pack > 1 else 1)
        if c.pack > 1:
            ratio, per_block = 1.0, self.block + 64
        while 2 * channel_tiles * per_block * size > b.sbuf_room_bytes // 3 and self.block > BANK:
            self.block //= 2
            per_block = int(self.block * ratio) + 64
        self.input = b.sbuf("input", free_bytes=per_block * size, slots=2 * channel_tiles)
        # Turned weights are a tile per tap; others are read with a stride of their taps.
        apart = c.steps if c.turn_weights else 1
        width = min(PARTITIONS, c.m) * (1 if c.turn_weights else c.taps)
        self.weights = b.sbuf("weights", free_bytes=width * size,
                              slots=c.channel_tiles * apart * self.resident)  # fmt: skip
        if c.turn_weights:
            natural = min(c.k * c.taps, NATURAL_WEIGHTS) * size
            self.natural = b.sbuf("weights_natural", free_bytes=natural, slots=2)
        if c.turn_input or c.turn_output or c.turn_weights:
            self.turned = b.psum("turned", free_bytes=2048, slots=2)
        if c.turn_input:
            self.pixels_natural = b.sbuf("input_natural", free_bytes=per_block * size, slots=2)
        spread = ceil_div(c.written, max(c.pixels, 1))
        self.acc = b.psum("acc", free_bytes=2048, slots=4)
        width = min(self.block, c.pixels * self._images()) * spread
        element = max(c.out_dtype.itemsize, 4)
        self.result = b.sbuf("result", free_bytes=max(width, 1) * element + 256,
                             slots=2)  # fmt: skip
        if self.bias is not None:
            self.bias_tile = b.sbuf("bias", free_bytes=4, slots=self.resident)

    def _channel_block(self, block: Index, tiles: int, last: int) -> None:
        """Weights of some output channel tiles, then every pixel past them."""
        c, b = self.c, self.b
        for tile in range(tiles):
            rows = last if tile == tiles - 1 and tiles <= ceil_div(c.m, PARTITIONS) else PARTITIONS
            rows = min(rows, c.m)
            self._load_weights(tile, rows)
            if self.bias is not None:
                b.load(self.bias_tile[tile], self.bias, rows=rows, row_bytes=c.out_dtype.itemsize)
        images = self._images() if c.pixels <= BANK else 1
        columns = c.pixels * images
        for first, trips, count in _pieces(c.images, images):
            with loop(b, trips, "image") as n:
                image = block * ceil_div(c.images, images) + (n + first)
                span = columns if count == images else c.pixels * count
                for start, repeats, width in _pieces(span, self.block):
                    with loop(b, repeats, "pixels") as p:
                        at = image * ceil_div(columns, self.block) + (p + start)
                        self._pixels(at, width, tiles, last)

    def _load_weights(self, tile: int, rows: int) -> None:
        """One output channel tile of the kernel as [k, m] tiles, one per tap and channel tile."""
        c, b, size = self.c, self.b, self.size
        if not c.turn_weights:
            for index, k in enumerate(self._channels()):
                b.load(self.weights[tile * c.channel_tiles + index], self.w, rows=k,
                       row_bytes=rows * c.taps * size)  # fmt: skip
            return
        total = c.k * c.taps
        width = min(total, NATURAL_WEIGHTS)
        for at in range(0, total, width):
            n = min(width, total - at)
            b.load(self.natural[at // width], self.w, rows=rows, row_bytes=n * size)
        for index, channels in enumerate(self._channels()):
            slot = (tile * c.channel_tiles + index) * c.steps
            for first, trips, packed in self._steps():
                with loop(b, trips, "tap") as tap:
                    k, bank = channels * packed, self.turned[tap + first]
                    b.nc_transpose(bank, self.natural[0], partitions=rows, n=k, dtype=c.dtype)
                    b.tensor_copy(self.weights[tap + (slot + first)], bank, n=rows, partitions=k,
                                  dtype=c.dtype)  # fmt: skip

    def _channels(self) -> list[int]:
        """Input channels of each channel tile."""
        full, rest = divmod(self.c.k, PARTITIONS)
        return [PARTITIONS] * full + ([rest] if rest else [])

    def _steps(self) -> list[tuple[int, int, int]]:
        """(first, count, taps each) of the packs of taps."""
        return _pieces(self.c.taps, self.c.pack)

    def _pixels(self, at: Index, width: int, tiles: int, last: int) -> None:
        """One block of columns: its input once, then every output channel tile."""
        c, b = self.c, self.b
        inputs = c.channel_tiles * (c.steps if c.pack > 1 else 1)
        for index, channels in enumerate(self._channels()):
            if c.pack == 1:
                self._load_input(at * inputs + index, channels, width)
                continue
            for first, trips, packed in self._steps():
                with loop(b, trips, "tap") as tap:
                    self._load_input(at * inputs + tap + first, channels * packed, width)
        spread = ceil_div(c.written, max(c.pixels, 1))
        chunks = [min(BANK, width - start) for start in range(0, width, BANK)]
        for tile in range(tiles):
            m = min(last if tile == tiles - 1 else PARTITIONS, c.m)
            result = self.result[at * tiles + tile]
            for chunk, columns in enumerate(chunks):
                bank = self.acc[(at * tiles + tile) * len(chunks) + chunk]
                self._products(bank, tile, at * inputs, m, columns)
                self._evict(result, bank, tile, m, columns, chunk, spread)
            self._store(result, m, width * spread)

    def _products(self, bank: TileRef, tile: int, first: Index, m: int, columns: int) -> None:
        """All taps and channel tiles into one PSUM bank."""
        c, b = self.c, self.b
        base = tile * c.channel_tiles
        for start, trips, packed in self._steps():
            with loop(b, trips, "tap") as tap:
                for index, channels in enumerate(self._channels()):
                    weights: Index = base + index
                    if c.turn_weights:
                        weights = tap + ((base + index) * c.steps + start)
                    moving = first + (tap + start) if c.pack > 1 else first + index
                    b.nc_matmul(bank, stationary=self.weights[weights], moving=self.input[moving],
                                k=channels * packed, m=m, n=columns, dtype=c.dtype,
                                accumulate=True)  # fmt: skip

    def _load_input(self, slot: Index, k: int, width: int) -> None:
        """[k channels, pixels] of the input; with packed taps every tap is a row of its own."""
        c, b, size = self.c, self.b, self.size
        amount = width if c.pack > 1 else ceil_div(width * c.read, max(c.pixels, 1))
        if c.turn_input:
            b.load(self.pixels_natural[slot], self.x, rows=amount, row_bytes=k * size)
            for at in range(0, amount, BANK):
                n = min(BANK, amount - at)
                for start in range(0, n, PARTITIONS):
                    b.nc_transpose(
                        self.turned[at // BANK],
                        self.pixels_natural[slot],
                        partitions=min(PARTITIONS, n - start),
                        n=k,
                        dtype=c.dtype,
                    )
                b.tensor_copy(self.input[slot], self.turned[at // BANK], n=n, partitions=k,
                              dtype=c.dtype)  # fmt: skip
            return
        run = max(1, min(c.in_run, amount))
        pieces = ceil_div(amount, run)
        b.load(self.input[slot], self.x, rows=k * pieces, row_bytes=ceil_div(amount, pieces) * size,
               partitions=spread_over(k, k * pieces))  # fmt: skip

    def _evict(
        self,
        result: TileRef,
        bank: TileRef,
        tile: int,
        m: int,
        columns: int,
        chunk: int,
        spread: int,
    ) -> None:
        """PSUM to SBUF, with the bias; phases of a transposed convolution side by side."""
        c, b = self.c, self.b
        out = None if c.out_dtype == FP32 else c.out_dtype
        given: dict[str, Any] = {"n": columns, "partitions": m, "dtype": FP32, "out_dtype": out}
        for _phase in range(spread):
            if self.bias is not None:
                b.activation(result, [bank, self.bias_tile[tile]], op="identity", **given)
            elif chunk % 2:
                b.activation(result, bank, op="copy", **given)
            else:
                b.tensor_copy(result, bank, **given)

    def _store(self, result: TileRef, m: int, amount: int) -> None:
        c, b, size = self.c, self.b, self.c.out_dtype.itemsize
        if c.turn_output:
            for at in range(0, amount, BANK):
                n = min(BANK, amount - at)
                for start in range(0, n, PARTITIONS):
                    b.nc_transpose(self.turned[at // BANK], result, partitions=m,
                                   n=min(PARTITIONS, n - start), dtype=FP32)  # fmt: skip
                b.activation(result, self.turned[at // BANK], op="copy", dtype=FP32,
                             n=ceil_div(n, PARTITIONS) * m, partitions=min(n, PARTITIONS),
                             out_dtype=None if c.out_dtype == FP32 else c.out_dtype)  # fmt: skip
            b.store(self.out, result, rows=amount, row_bytes=m * size)
            return
        run = max(1, min(c.out_run, amount))
        pieces = ceil_div(amount, run)
        b.store(self.out, result, rows=m * pieces, row_bytes=ceil_div(amount, pieces) * size,
                partitions=spread_over(m, m * pieces))  # fmt: skip


def _pieces(total: int, size: int) -> list[tuple[int, int, int]]:
    full, rest = divmod(total, size)
    found = [(0, full, size)] if full else []
    return found + ([(full, 1, rest)] if rest else [])
