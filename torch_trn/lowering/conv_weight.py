"""Gradients of a convolution's weight and bias.

The weight's gradient contracts over pixels, so both operands are turned to have pixels on
partitions: the outer gradient once per block, the input once per tap, as many taps and channels
together as a PSUM bank has columns. Sums stay in PSUM over all images and pixels; where it has too
few banks for all taps, the operands are read again for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.conv_depthwise_weight import depthwise_weight
from torch_trn.lowering.conv_input import Channels, KTile, Patches, contiguous_run
from torch_trn.lowering.conv_shape import Axis, Block, blocks_of, chunks, phases_of, with_blocks
from torch_trn.lowering.gemm_block import segments
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.matmul import array_dtype
from torch_trn.lowering.reduction import reduce_grid
from torch_trn.lowering.run import loop, lower_kernel, spread_over
from torch_trn.lowering.tile import FP32
from torch_trn.memory import CORE, Index, TileRef, Walk
from torch_trn.program import Builder, Program

if TYPE_CHECKING:
    from torch_trn.lowering.convolution import Named

BANK = 512

#: Output pixels of a block.
BLOCK = 2048

#: SBUF bytes per partition for input tiles, and for a row of results.
INPUT_BYTES = 65536
RESULT_BYTES = 32768

#: PSUM banks of sums; the others are for tiles that are turned.
SUM_BANKS = 4


def bias_gradient(name: str, core: CoreSpec, shards: int, grad: Named, out: Named) -> Program:
    """Sums of the gradient over images and pixels, a channel in each partition."""
    dims = [dim for dim in range(grad.spec.ndim) if dim != 1]
    grid = reduce_grid(grad.spec.shape, dims, [out.spec], [grad.spec])
    kernel = Kernel(core, grid, 1, shards, (out.name, grad.name))
    kernel.store(0, kernel.reduce("add", kernel.ins[0], FP32))
    return lower_kernel(kernel, name)


def weight_gradient(
    name: str, core: CoreSpec, shards: int, outer: Named, inner: Named, dw: Named,
    axes: Sequence[Axis], groups: int,
) -> Program:  # fmt: skip
    """dw[a, b, tap] = sum over pixels of outer[a, pixel] x inner[b, pixel + tap]."""
    b = Builder(core, name.removeprefix("aten::"))
    dtype = array_dtype(name, outer.spec.dtype)

    def channels(named: Named, each: int) -> Channels:
        pool = b.hbm(named.name, nbytes=named.spec.nbytes)
        return Channels(named.name, named.spec, groups, each, pool)

    rows, cols = dw.spec.shape[0] // groups, dw.spec.shape[1]
    given = channels(outer, rows), channels(inner, cols), channels(dw, rows)
    if not dw.spec.numel:
        return b.build()
    if cols == 1 and groups > 1:
        depthwise_weight(b, *given, axes, dtype, shards)
        return b.build()
    _WeightGradient(b, *given, axes, dtype, shards).run()
    return b.build()


@dataclass(frozen=True)
class _Part:
    """Columns of one PSUM bank: a tap of one tile of channels, from column ``place`` on."""

    tap: int
    shift: tuple[int, ...]
    ktile: KTile
    place: int


class _WeightGradient:
    """Builder state of one weight gradient."""

    def __init__(
        self, b: Builder, outer: Channels, inner: Channels, out: Channels, axes: Sequence[Axis],
        dtype: torch.dtype, shards: int,
    ) -> None:  # fmt: skip
        self.b, self.outer, self.inner, self.out = b, outer, inner, out
        self.dtype, self.size = dtype, dtype.itemsize
        self.rows, self.groups = outer.each, outer.groups
        self.first_row: Index = 0
        if shards > 1 and self.groups >= shards:
            self.groups = ceil_div(self.groups, shards)
            first = CORE * self.groups
            self.outer = replace(outer, first_group=first)
            self.inner = replace(inner, first_group=first)
            self.out = replace(out, first_group=first)
        elif shards > 1:
            self.rows = ceil_div(self.rows, shards)
            self.first_row = CORE * self.rows
        self.taps = prod(axis.kernel for axis in axes)
        self.axes = self._blocks(axes)
        self.patches = Patches(b, self.inner, self.axes, dtype, padded=True)
        self.free_taps = prod(axis.kernel for axis in self.axes if not axis.packed)
        self.copies = 0

    def _blocks(self, axes: Sequence[Axis]) -> list[Axis]:
        """Axes in blocks that fit, packed where there are few channels."""
        from torch_trn.lowering.conv import packed

        found = list(axes)
        if not Patches(self.b, self.inner, axes, self.dtype).on_array:
            found = packed(axes, self.inner.each)
        tiles = len(Patches(self.b, self.inner, found, self.dtype).ktiles)
        return with_blocks(found, BLOCK, INPUT_BYTES, 2 * min(tiles, 4), self.size)

    def run(self) -> None:
        """Groups, row tiles of the result, column tiles, then all images and pixels."""
        b = self.b
        if not (self.rows and self.groups):
            return
        if not self.outer.spec.numel:
            self._allocate(1)
            self._zero()
            return
        most = max(1, RESULT_BYTES // (self.out.spec.itemsize * self.taps))
        wide = max(1, min(len(self.patches.ktiles), BANK // PARTITIONS, most // PARTITIONS))
        if len(self.patches.ktiles[0].entries) > 1 or self.free_taps < self.taps:
            wide = len(self.patches.ktiles)
        self._allocate(wide)
        tiles = self.patches.ktiles
        number = 0
        with loop(b, self.groups, "g") as g:
            for piece in segments(self.rows, PARTITIONS):
                with loop(b, piece.count, "o") as o:
                    row = o * piece.size + piece.start
                    for at in range(0, len(tiles), wide):
                        number += 1
                        self._result(g, row, piece.size, tiles[at : at + wide], number)

    def _allocate(self, wide: int) -> None:
        b, size = self.b, self.size
        self.wide = wide
        nbytes = self.patches.tile_bytes(self.axes)
        self.patches.pool = b.sbuf("inner", free_bytes=nbytes, slots=2 * wide)
        if self.patches.on_array:
            self.patches.allocate_turns("inner")
        pixels = prod(axis.block for axis in self.axes)
        outer_axes = [replace(axis, size=axis.out_size, stride=1, taps=(((0, 0),),), kernel=1,
                              packed=False) for axis in self.axes]  # fmt: skip
        self.grad = Patches(b, replace(self.outer, each=self.outer.each), outer_axes, self.dtype)
        self.grad.pool = b.sbuf("outer", free_bytes=pixels * size, slots=2)
        if self.grad.on_array:
            self.grad.allocate_turns("outer")
        if not isinstance(self.first_row, int) and not b.core.pe_transpose_exact:
            # Rows beyond this core's share are not loaded; NaN would spoil those beside them.
            for slot in range(self.grad.pool.slots):
                b.memset(self.grad.pool[slot], value=0.0, n=pixels, dtype=self.dtype)
        self.outer_turned = b.sbuf("outer_turned", free_bytes=PARTITIONS * size, slots=4)
        self.inner_turned = b.sbuf("inner_turned", free_bytes=BANK * size, slots=4)
        columns = wide * min(PARTITIONS, self.inner.each) * self.taps
        if self.free_taps < self.taps or len(self.patches.ktiles[0].entries) > 1:
            columns = self.inner.each * self.taps
        self.result = b.sbuf("result", free_bytes=columns * self.out.spec.itemsize, slots=2)
        used = 2 * (self.patches.on_array + self.grad.on_array)
        self.sums = b.psum("acc", free_bytes=BANK * 4, slots=min(SUM_BANKS, 6 - used))
        self.turned = b.psum("turned", free_bytes=BANK * 4, slots=2)

    def _zero(self) -> None:
        """Without pixels the gradient is zero."""
        b, out = self.b, self.out
        columns = self.inner.each * self.taps
        with loop(b, self.groups, "g") as g:
            for piece in segments(self.rows, PARTITIONS):
                with loop(b, piece.count, "o") as o:
                    row = o * piece.size + piece.start
                    for start in range(0, columns, self.result.nbytes // out.spec.itemsize):
                        n = min(columns - start, self.result.nbytes // out.spec.itemsize)
                        b.memset(self.result, value=0.0, n=n, partitions=piece.size,
                                 dtype=out.spec.dtype)  # fmt: skip
                        self._store(self.result[0], g, row, piece.size, start, n)

    # -- one tile of the result -----------------------------------------------------------------
    def _banks(self, ktiles: Sequence[KTile]) -> list[list[_Part]]:
        """The taps of the channel tiles, as many together as a bank has columns."""
        (phase,) = phases_of(self.axes)
        found: list[list[_Part]] = []
        place = BANK
        for tap, shift in phase.taps:
            for ktile in ktiles:
                if place + ktile.rows > BANK:
                    found.append([])
                    place = 0
                found[-1].append(_Part(tap % self.free_taps, shift, ktile, place))
                place += ktile.rows
        return found

    def _result(
        self, group: Index, row: Index, rows: int, ktiles: Sequence[KTile], number: int
    ) -> None:
        """One tile of rows of the gradient, for some tiles of channels and all taps."""
        b = self.b
        banks = self._banks(ktiles)
        result = self.result[number]
        first = ktiles[0].entries[0][1]
        for at in range(0, len(banks), self.sums.slots):
            some = banks[at : at + self.sums.slots]
            for place, block in blocks_of(b, self.axes):
                self._block(place, group, row, rows, ktiles, some, block)
            for bank, parts in enumerate(some):
                for part in parts:
                    self._evict(result, self.sums[bank], rows, part, first)
        columns = sum(k.rows for k in ktiles) * self.free_taps
        self._store(result, group, row, rows, first * self.taps, columns)

    def _evict(self, result: TileRef, bank: TileRef, rows: int, part: _Part, first: int) -> None:
        """The columns of one tap to where they lie in HBM: taps innermost."""
        dtype, ktile = self.out.spec.dtype, part.ktile
        _, channel, count, _ = ktile.entries[0]
        offset = (channel - first) * self.taps + part.tap + ktile.first_pack * self.free_taps
        target = result.view(dtype, (self.free_taps, len(ktile.entries)), (self.taps, count),
                             offset=offset)  # fmt: skip
        source = bank.view(FP32, (1, ktile.rows), offset=part.place)
        self._copy(target, source, ktile.rows, rows, FP32, dtype)

    def _store(
        self, result: TileRef, group: Index, row: Index, rows: int, start: int, columns: int
    ) -> None:
        b, out = self.b, self.out
        spec = out.spec
        taps = tuple(zip(spec.shape[2:], spec.strides[2:], strict=True))
        cols = ((spec.shape[1], spec.strides[1]), *taps)
        walk = Walk(((out.groups, out.each * spec.strides[0]), (out.each, spec.strides[0])), cols)
        run = min(columns, contiguous_run(cols))
        descriptors = rows * ceil_div(columns, run)
        window = out.pool[0].window(
            spec.dtype, walk, rows, columns,
            row=(group + out.first_group) * out.each + row + self.first_row, col=start,
        )  # fmt: skip
        b.store(
            window, result.view(spec.dtype, (1, columns), partitions=rows), rows=descriptors,
            row_bytes=run * spec.itemsize, partitions=spread_over(rows, descriptors),
        )  # fmt: skip

    def _block(
        self, place: Index, group: Index, row: Index, rows: int, ktiles: Sequence[KTile],
        banks: Sequence[Sequence[_Part]], block: Block,
    ) -> None:  # fmt: skip
        """One block of pixels: the outer gradient turned once, the input for each tap."""
        counts = tuple(segment.outputs for segment in block.segments)
        self.patches.load(place, group, block, ktiles)
        grad = self._load_outer(place, group, row, rows, counts, block)
        for number, (start, sizes) in enumerate(chunks(counts, PARTITIONS)):
            pixels = prod(sizes)
            self.copies += 1
            still = self.outer_turned[place + self.copies]
            steps = [prod(counts[i + 1 :]) for i in range(len(counts))]
            offset = sum(at * step for at, step in zip(start, steps, strict=True))
            source = grad.view(self.dtype, *zip(steps, sizes, strict=True), offset=offset)
            bank = self.turned[place + self.copies]
            self._turn(bank.view(self.dtype, (1, rows)), source, rows, pixels)
            self._copy(still.view(self.dtype, (1, rows)), bank.view(self.dtype, (1, rows)), rows,
                       pixels, self.dtype, self.dtype)  # fmt: skip
            for index, parts in enumerate(banks):
                self.copies += 1
                moving = self._turned(place, (start, sizes), parts, ktiles, block)
                width = sum(part.ktile.rows for part in parts)
                self.b.nc_matmul(
                    self.sums[index].view(FP32, (1, width)),
                    stationary=still.view(self.dtype, (1, rows)),
                    moving=moving.view(self.dtype, (1, width)), k=pixels, m=rows, n=width,
                    dtype=self.dtype, accumulate=place + number,
                )  # fmt: skip

    def _load_outer(
        self, place: Index, group: Index, row: Index, rows: int, counts: Sequence[int],
        block: Block,
    ) -> TileRef:  # fmt: skip
        """[rows, pixels] of the outer gradient."""
        found = tuple(
            replace(segment, valid=((0, count),))
            for segment, count in zip(block.segments, counts, strict=True)
        )
        at = Block(found, block.numbers)
        self.grad.load_channels(place, group, row + self.first_row, rows, at)
        return self.grad.pool[place]

    def _turned(
        self, place: Index, chunk: Any, parts: Sequence[_Part], ktiles: Sequence[KTile],
        block: Block,
    ) -> TileRef:  # fmt: skip
        """The input under a chunk of pixels for some taps, pixels on partitions."""
        start, sizes = chunk
        pixels = prod(sizes)
        bank, target = self.turned[place + self.copies], self.inner_turned[place + self.copies]
        steps = self.patches.steps(block)
        for part in parts:
            tile = self.patches.pool[place * len(ktiles) + ktiles.index(part.ktile)]
            offset = sum(
                (at * axis.step + shift) * step
                for at, axis, shift, step in zip(start, self.axes, part.shift, steps, strict=True)
            )
            dims = [
                (axis.step * step, size)
                for axis, step, size in zip(self.axes, steps, sizes, strict=True)
            ]
            self._turn(
                bank.view(self.dtype, (1, part.ktile.rows), offset=part.place),
                tile.view(self.dtype, *dims, offset=offset), part.ktile.rows, pixels,
            )  # fmt: skip
        width = sum(part.ktile.rows for part in parts)
        self._copy(target.view(self.dtype, (1, width)), bank.view(self.dtype, (1, width)), width,
                   pixels, self.dtype, self.dtype)  # fmt: skip
        return target

    def _turn(self, dst: TileRef, src: TileRef, rows: int, pixels: int) -> None:
        self.b.nc_transpose(dst, src, partitions=rows, n=pixels, dtype=self.dtype)

    def _copy(
        self, dst: TileRef, src: TileRef, n: int, parts: int, dtype: torch.dtype, out: torch.dtype
    ) -> None:
        """PSUM to SBUF, on VectorE and ScalarE in turn."""
        self.copies += 1
        given: dict[str, Any] = {"n": n, "partitions": parts, "dtype": dtype}
        if out != dtype:
            given["out_dtype"] = out
        if self.copies % 2:
            self.b.tensor_copy(dst, src, **given)
        else:
            self.b.activation(dst, src, op="copy", **given)
