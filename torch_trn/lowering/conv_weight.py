"""The gradient of a convolution's weight.

It contracts over pixels, so both operands are turned to have pixels on
partitions: the outer gradient once per block, the input once per tap, as many taps and channels
together as a PSUM bank has columns. Sums stay in PSUM over all images and pixels; where it has too
few banks for all taps, the operands are read again for the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.conv_depthwise_weight import depthwise_weight
from torch_trn.lowering.conv_input import Channels, KTile, Patches, contiguous_run
from torch_trn.lowering.conv_shape import (
    Axis,
    Block,
    Box,
    blocks_of,
    chunks,
    phases_of,
    with_blocks,
)
from torch_trn.lowering.gemm_block import segments
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.matmul import array_dtype
from torch_trn.lowering.run import loop, spread_over
from torch_trn.lowering.tile import FP32
from torch_trn.memory import CORE, Index, TileRef, Walk
from torch_trn.program import Builder, Program

if TYPE_CHECKING:
    from torch_trn.lowering.convolution import Named

BANK = 512

#: Output pixels of a block.
BLOCK = 1024

#: SBUF bytes per partition for input tiles, and for a row of results.
INPUT_BYTES = 65536
RESULT_BYTES = 32768

#: PSUM banks of sums; the others are for tiles that are turned.
SUM_BANKS = 4


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


@dataclass(frozen=True)
class _Job:
    """Chunks of pixels, from chunk ``first`` on, for one bank of sums."""

    first: int
    pixels: tuple[Box, ...]
    bank: int
    parts: tuple[_Part, ...]
    moving: TileRef | None = None


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
        self.taps_outer = self.taps > 1 and inner.each > 1 and out.spec.strides[1] == 1
        self.axes = self._blocks(axes)
        most = max(1, RESULT_BYTES // (out.spec.itemsize * self.taps))
        self.channels = min(PARTITIONS, self.inner.each, most)
        self.patches = Patches(b, self.inner, self.axes, dtype, padded=True, channels=self.channels)
        self.free_taps = prod(axis.kernel for axis in self.axes if not axis.packed)
        self.copies = 0

    def _blocks(self, axes: Sequence[Axis]) -> list[Axis]:
        """Axes in blocks that fit, packed where there are few channels."""
        from torch_trn.lowering.conv import packed

        found = list(axes)
        if not Patches(self.b, self.inner, axes, self.dtype).on_array:
            found = packed(axes, self.inner.each)
        tiles = len(Patches(self.b, self.inner, found, self.dtype).ktiles)
        return with_blocks(found, BLOCK, INPUT_BYTES, 2 + 2 * min(tiles, 4), self.size)

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
        wide = max(1, min(len(self.patches.ktiles), BANK // self.channels, most // self.channels))
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
        else:
            self.patches.staging = b.sbuf("planes", free_bytes=nbytes, slots=2)
        pixels = prod(axis.block for axis in self.axes)
        outer_axes = [replace(axis, size=axis.out_size, stride=1, taps=(((0, 0),),), kernel=1,
                              packed=False) for axis in self.axes]  # fmt: skip
        self.grad = Patches(b, replace(self.outer, each=self.outer.each), outer_axes, self.dtype)
        self.grad.pool = b.sbuf("outer", free_bytes=pixels * size, slots=2)
        if self.grad.on_array:
            self.grad.allocate_turns("outer", not isinstance(self.first_row, int))
        if not isinstance(self.first_row, int) and not b.core.pe_transpose_exact:
            # Rows beyond this core's share are not loaded; NaN would spoil those beside them.
            for slot in range(self.grad.pool.slots):
                b.memset(self.grad.pool[slot], value=0.0, n=pixels, dtype=self.dtype)
        count = len(list(chunks([axis.block for axis in self.axes], PARTITIONS)))
        rows = min(PARTITIONS, self.rows)
        self.outer_turned = b.sbuf("outer_turned", free_bytes=count * rows * size, slots=2)
        self.inner_turned = b.sbuf("inner_turned", free_bytes=BANK * size, slots=4)
        columns = wide * self.channels * self.taps
        if self.free_taps < self.taps or len(self.patches.ktiles[0].entries) > 1:
            columns = self.inner.each * self.taps
        self.result = b.sbuf("result", free_bytes=columns * self.out.spec.itemsize, slots=2)
        used = 2 * (self.patches.on_array + self.grad.on_array)
        self.sums = b.psum("acc", free_bytes=BANK * 4, slots=SUM_BANKS if used < 4 else 2)
        self.turned = b.psum("turned", free_bytes=BANK * 4, slots=b.psum_room_banks)

    def _zero(self) -> None:
        """Without pixels the gradient is zero."""
        b, out = self.b, self.out
        some = max(1, self.result.nbytes // out.spec.itemsize // self.taps)
        with loop(b, self.groups, "g") as g:
            for piece in segments(self.rows, PARTITIONS):
                with loop(b, piece.count, "o") as o:
                    row = o * piece.size + piece.start
                    for first in range(0, self.inner.each, some):
                        channels = min(some, self.inner.each - first)
                        b.memset(self.result, value=0.0, n=channels * self.taps,
                                 partitions=piece.size, dtype=out.spec.dtype)  # fmt: skip
                        self._store(self.result[0], g, row, piece.size, first, channels)

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
        columns = sum(ktile.rows for ktile in ktiles) * self.free_taps // self.taps
        for at in range(0, len(banks), self.sums.slots):
            some = banks[at : at + self.sums.slots]
            for place, block in blocks_of(b, self.axes):
                self._block(place, group, row, rows, ktiles, some, block)
            for bank, parts in enumerate(some):
                for part in parts:
                    self._evict(result, self.sums[bank], rows, part, first, columns)
        self._store(result, group, row, rows, first, columns)

    def _evict(
        self, result: TileRef, bank: TileRef, rows: int, part: _Part, first: int, columns: int
    ) -> None:
        """One tap's channels to where they lie in HBM: taps innermost, or channels."""
        dtype, ktile = self.out.spec.dtype, part.ktile
        _, channel, count, _ = ktile.entries[0]
        tap, packs = part.tap + ktile.first_pack * self.free_taps, len(ktile.entries)
        tap_step, channel_step = (columns, 1) if self.taps_outer else (1, self.taps)
        target = result.view(
            dtype, (self.free_taps * tap_step, packs), (channel_step, count),
            offset=(channel - first) * channel_step + tap * tap_step,
        )  # fmt: skip
        source = bank.view(FP32, (1, ktile.rows), offset=part.place)
        self._copy(target, source, ktile.rows, rows, FP32, dtype)

    def _store(
        self, result: TileRef, group: Index, row: Index, rows: int, first: int, channels: int
    ) -> None:
        """Some rows of the gradient, ``channels`` columns from ``first`` on, all taps."""
        b, out = self.b, self.out
        spec, total = out.spec, channels * self.taps
        taps = tuple(zip(spec.shape[2:], spec.strides[2:], strict=True))
        lines = ((out.groups, out.each * spec.strides[0]), (out.each, spec.strides[0]))
        place = (group + out.first_group) * out.each + row + self.first_row
        box = (*taps, (channels, 1)) if self.taps_outer else ((channels, spec.strides[1]), *taps)
        run = contiguous_run(box)
        window = out.pool[0].window(spec.dtype, Walk(lines, box), rows, total, row=place,
                                    offset=first * spec.strides[1])  # fmt: skip
        descriptors = rows * (total // run)
        b.store(
            window, result.view(spec.dtype, (1, total), partitions=rows), rows=descriptors,
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
        pixels = list(chunks(counts, PARTITIONS))
        still = self._turn_outer(place, grad, rows, counts, pixels)
        waiting: _Job | None = None
        for job in self._jobs(pixels, banks):
            self.copies += 1
            moving = self._turn_inner(place, job, ktiles, block)
            if waiting is not None:
                self._multiply(place, still, rows, waiting)
            # The array turns the next tiles while these are copied out of PSUM.
            waiting = replace(job, moving=moving)
        if waiting is not None:
            self._multiply(place, still, rows, waiting)

    def _jobs(self, pixels: Sequence[Box], banks: Sequence[Sequence[_Part]]) -> Iterator[_Job]:
        """Which chunks of pixels go through one bank together, for each bank of sums."""
        together = min(BANK // sum(part.ktile.rows for part in parts) for parts in banks)
        for first in range(0, len(pixels), max(1, together)):
            some = tuple(pixels[first : first + max(1, together)])
            for index, parts in enumerate(banks):
                yield _Job(first, some, index, tuple(parts))

    def _turn_outer(
        self, place: Index, grad: TileRef, rows: int, counts: Sequence[int], pixels: Sequence[Box]
    ) -> TileRef:
        """All pixels of a block on partitions: chunk after chunk of [pixels, rows]."""
        still = self.outer_turned[place]
        steps = [prod(counts[i + 1 :]) for i in range(len(counts))]
        together = max(1, BANK // rows)
        for first in range(0, len(pixels), together):
            some = pixels[first : first + together]
            self.copies += 1
            bank = self.turned[place + self.copies]
            for at, (start, sizes) in enumerate(some):
                offset = sum(begin * step for begin, step in zip(start, steps, strict=True))
                source = grad.view(self.dtype, *zip(steps, sizes, strict=True), offset=offset)
                self._turn(bank.view(self.dtype, (1, rows), offset=at * rows), source, rows,
                           prod(sizes))  # fmt: skip
            n = len(some) * rows
            self._copy(still.view(self.dtype, (1, n), offset=first * rows),
                       bank.view(self.dtype, (1, n)), n, max(prod(sizes) for _, sizes in some),
                       self.dtype, self.dtype)  # fmt: skip
        return still

    def _multiply(self, place: Index, still: TileRef, rows: int, job: _Job) -> None:
        """The products of some chunks into one bank of sums."""
        assert job.moving
        width = sum(part.ktile.rows for part in job.parts)
        for at, (_, sizes) in enumerate(job.pixels):
            number = job.first + at
            self.b.nc_matmul(
                self.sums[job.bank].view(FP32, (1, width)),
                stationary=still.view(self.dtype, (1, rows), offset=number * rows),
                moving=job.moving.view(self.dtype, (1, width), offset=at * width),
                k=prod(sizes), m=rows, n=width, dtype=self.dtype, accumulate=place + number,
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

    def _turn_inner(
        self, place: Index, job: _Job, ktiles: Sequence[KTile], block: Block
    ) -> TileRef:
        """The input under some chunks of pixels for some taps, pixels on partitions."""
        bank, target = self.turned[place + self.copies], self.inner_turned[place + self.copies]
        steps = self.patches.steps(block)
        width = sum(part.ktile.rows for part in job.parts)
        for number, (start, sizes) in enumerate(job.pixels):
            for part in job.parts:
                tile = self.patches.pool[place * len(ktiles) + ktiles.index(part.ktile)]
                offset = sum(
                    (at * axis.step + shift) * step
                    for at, axis, shift, step in zip(
                        start, self.axes, part.shift, steps, strict=True)
                )  # fmt: skip
                dims = [
                    (axis.step * step, size)
                    for axis, step, size in zip(self.axes, steps, sizes, strict=True)
                ]
                self._turn(
                    bank.view(self.dtype, (1, part.ktile.rows),
                              offset=number * width + part.place),
                    tile.view(self.dtype, *dims, offset=offset), part.ktile.rows, prod(sizes),
                )  # fmt: skip
        n = width * len(job.pixels)
        self._copy(target.view(self.dtype, (1, n)), bank.view(self.dtype, (1, n)), n,
                   max(prod(sizes) for _, sizes in job.pixels), self.dtype, self.dtype)  # fmt: skip
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
