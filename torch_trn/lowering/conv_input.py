"""Input tiles of a convolution: [channels, images x box of pixels], loaded without any padding.

A tile holds just the input's elements under a block of outputs; taps that reach beyond the edge
read fewer of them. Where there are few channels, the taps of the outer axes lie on partitions too,
each loaded already shifted; only there zeros stand for what is beyond the edge.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from torch_trn.isa import Engine
from torch_trn.lowering.call import TensorSpec
from torch_trn.lowering.conv_shape import Axis, Block, chunks
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.run import spread_over
from torch_trn.memory import Index, Pool, TileRef, Walk, affine
from torch_trn.program import Builder

__all__ = ["Channels", "KTile", "Patches", "contiguous_run", "even_parts"]

#: Pixels that one PSUM bank takes while they are turned.
BANK = 512

#: DMA queues for the packed taps of a tile.
QUEUES = 8


@dataclass(frozen=True)
class Channels:
    """The channels of one tensor: ``groups`` x ``each``, with their strides, in ``images``.

    first_group, first_image: where this core's share begins.
    """

    name: str
    spec: TensorSpec
    groups: int
    each: int
    pool: Pool
    first_group: Index = 0
    first_image: Index = 0

    def window(
        self, group: Index, channel: Index, count: int, image: Index, images: int,
        box: Sequence[tuple[int, int]], offset: Index, *, turned: bool = False,
    ) -> TileRef:  # fmt: skip
        """[channels, images x box] (turned: the reverse); images and groups beyond are clipped.

        box: (size, stride) of the pixels, from element ``offset`` of an image on.
        """
        steps = self.spec.strides
        pixels = prod(size for size, _ in box)
        rows = ((self.groups, self.each * steps[1]), (self.each, steps[1]))
        cols = ((self.spec.shape[0], steps[0]), *box)
        row = (group + self.first_group) * self.each + channel
        col = (image + self.first_image) * pixels
        if turned:
            return self.pool[0].window(self.spec.dtype, Walk(cols, rows), images * pixels, count,
                                       row=col, col=row, offset=offset)  # fmt: skip
        return self.pool[0].window(self.spec.dtype, Walk(rows, cols), count, images * pixels,
                                   row=row, col=col, offset=offset)  # fmt: skip

    @property
    def last(self) -> bool:
        """Whether channels lie next to each other (channels_last)."""
        return self.each > 1 and self.spec.strides[1] == 1 and self.spec.ndim > 2 and any(
            size > 1 and step != 1
            for size, step in zip(self.spec.shape[2:], self.spec.strides[2:], strict=True)
        )  # fmt: skip


@dataclass(frozen=True)
class KTile:
    """What shares the partitions of one matmul: (first partition, channel, count, packed taps)."""

    entries: tuple[tuple[int, int, int, tuple[int, ...]], ...]
    first_pack: int

    @property
    def rows(self) -> int:
        """Partitions in use."""
        return sum(count for _, _, count, _ in self.entries)


def contiguous_run(dims: Sequence[tuple[int, int]]) -> int:
    """Elements that lie next to each other, from the innermost dim on."""
    run = 1
    for size, step in reversed(dims):
        if size == 1:
            continue
        if step != run:
            break
        run *= size
    return run


def even_parts(total: int) -> list[tuple[int, int, int]]:
    """(first, partitions, elements in each) of ``total`` elements over at most 128 partitions."""
    each = ceil_div(total, PARTITIONS)
    whole, rest = divmod(total, each)
    return [(0, whole, each)] + ([(whole * each, 1, rest)] if rest else [])


class Patches:
    """The tiles of one input: where they are in SBUF, how they get there.

    padded: zeros stand for what lies beyond the edge of any axis, so that every tap reads as many.
    """

    def __init__(
        self, b: Builder, x: Channels, axes: Sequence[Axis], dtype: torch.dtype, *,
        padded: bool = False, channels: int = PARTITIONS,
    ) -> None:  # fmt: skip
        self.padded, self.channels = padded, channels
        self.b, self.x, self.axes, self.dtype = b, x, tuple(axes), dtype
        two_bytes = dtype.itemsize == x.spec.itemsize == 2
        self.by_dma = x.last and two_bytes and b.core.name != "NeuronCore-v2"
        self.on_array = x.last and not self.by_dma
        self.ktiles = self._ktiles()
        self.copies = 0
        self.staging: Pool | None = None
        """Where planes arrive before GpSimdE puts zeros around them."""

    def _ktiles(self) -> list[KTile]:
        packs = list(itertools.product(*(range(len(axis.loads)) for axis in self.axes)))
        each = self.x.each
        if len(packs) == 1:
            return [
                KTile(((0, at, min(self.channels, each - at), packs[0]),), 0)
                for at in range(0, each, self.channels)
            ]
        together = PARTITIONS // each
        return [
            KTile(
                tuple((i * each, 0, each, p) for i, p in enumerate(packs[at : at + together])), at
            )
            for at in range(0, len(packs), together)
        ]

    def tile_bytes(self, axes: Sequence[Axis]) -> int:
        """Bytes per partition of one tile where the axes have such blocks."""
        return prod(axis.extent(axis.block) for axis in axes) * self.dtype.itemsize

    def allocate(self, slots: int, name: str = "input") -> None:
        """The pools of tiles, ``slots`` for each tile of channels."""
        b, nbytes = self.b, self.tile_bytes(self.axes)
        self.pool = b.sbuf(name, free_bytes=nbytes, slots=slots * len(self.ktiles))
        if self.on_array:
            self.allocate_turns(name)

    def allocate_turns(self, name: str, clipped: bool = False) -> None:
        """Pools for pixels that TensorE turns; clipped: some channels may not be loaded."""
        b, size = self.b, self.dtype.itemsize
        nbytes = BANK // PARTITIONS * min(PARTITIONS, self.x.each) * size
        self.natural = b.sbuf(f"{name}_natural", free_bytes=nbytes, slots=4)
        self.turned = b.psum(f"{name}_turned", free_bytes=BANK * 4, slots=2)
        clipped = clipped or not isinstance(self.x.first_image, int)
        if clipped and not b.core.pe_transpose_exact:
            # Images beyond this core's share are not loaded; NaN would spoil those beside them.
            for slot in range(self.natural.slots):
                b.memset(self.natural[slot], value=0.0, n=nbytes // size, dtype=self.dtype)

    def load_channels(
        self, number: Index, group: Index, channel: Index, count: int, block: Block
    ) -> None:
        """The pixels of ``count`` channels from ``channel`` on, in slot ``number``."""
        entry = (0, channel, count, (0,) * len(self.axes))
        self._entry(self.pool[number], entry, group, block, number)

    def sizes(self, block: Block) -> tuple[int, ...]:
        """Elements of a tile along each axis in this block."""
        return tuple(
            axis.extent(segment.outputs)
            if self._padded(axis)
            else max(1, segment.valid[0][1] - segment.valid[0][0])
            for axis, segment in zip(self.axes, block.segments, strict=True)
        )

    def _padded(self, axis: Axis) -> bool:
        return axis.packed or self.padded

    def steps(self, block: Block) -> tuple[int, ...]:
        """Elements of a tile between neighbours along each axis."""
        sizes = self.sizes(block)
        return tuple(prod(sizes[at + 1 :]) for at in range(len(sizes)))

    def load(self, number: Index, group: Index, block: Block, ktiles: Sequence[KTile] = ()) -> None:
        """The tiles of a block (or some of them), into the slots from ``number`` x tiles on."""
        wanted = ktiles or self.ktiles
        for at, ktile in enumerate(wanted):
            tile = self.pool[number * len(wanted) + at]
            self._clear(tile, ktile, block)
            if len(ktile.entries) > 1 and self._alike(ktile, block):
                self._entry(tile, ktile.entries[0], group, block, number, ktile)
                continue
            for index, entry in enumerate(ktile.entries):
                # Few partitions keep one DMA engine busy each: several queues, several engines.
                queue = f"load{index % QUEUES}" if len(ktile.entries) > 1 else "load"
                self._entry(tile, entry, group, block, number, queue=queue)

    def _alike(self, ktile: KTile, block: Block) -> bool:
        """Whether one transfer brings all packed taps: they lie alike on the input."""
        packs = [pack for _, _, _, pack in ktile.entries]
        for at, segment in enumerate(block.segments):
            if len({segment.valid[pack[at]] for pack in packs}) > 1:
                return False
        some = sum(axis.packed for axis in self.axes)
        whole = len(self.ktiles) == 1
        return isinstance(self.x.first_group, int) and (some == 1 or whole)

    def _packed(self, window: TileRef, ktile: KTile, group: Index) -> TileRef:
        """The window of a tile's first packed tap, widened to all of them."""
        pattern: Any = window.pattern
        walk = Walk(self._packed_rows(ktile), pattern.walk.cols)
        step = self.x.each * self.x.spec.strides[1]
        start = pattern.offset + (group + self.x.first_group) * step
        wide = replace(pattern, walk=walk, num_rows=ktile.rows, row=affine(0), offset=start)
        return replace(window, pattern=wide)

    def _packed_rows(self, ktile: KTile) -> tuple[tuple[int, int], ...]:
        """How the packed taps and their channels lie in the input: (size, stride)."""
        found = []
        axes = [(at, axis) for at, axis in enumerate(self.axes) if axis.packed]
        for at, axis in axes:
            size = len(axis.loads) if len(axes) > 1 else len(ktile.entries)
            apart = axis.loads[1] - axis.loads[0]
            found.append((size, apart * self.x.spec.strides[at + 1]))
        return (*found, (self.x.each, self.x.spec.strides[1]))

    def _clear(self, tile: TileRef, ktile: KTile, block: Block) -> None:
        """Zeros beyond the edge, where a tile has room for it."""
        whole = all(
            valid == (0, axis.extent(segment.outputs))
            for axis, segment in zip(self.axes, block.segments, strict=True) if self._padded(axis)
            for valid in segment.valid
        )  # fmt: skip
        if not whole:
            # Not on VectorE, where it would wait for the results of the block before.
            self.b.memset(tile, value=0.0, n=prod(self.sizes(block)), partitions=ktile.rows,
                          dtype=self.dtype, engine=Engine.GPSIMD)  # fmt: skip

    def _entry(
        self, tile: TileRef, entry: tuple[int, Index, int, tuple[int, ...]], group: Index,
        block: Block, number: Index, together: KTile | None = None, queue: str = "load",
    ) -> None:  # fmt: skip
        """The channels of one packed tap, of several together, or of all taps."""
        spec = self.x.spec
        partition, channel, count, pack = entry
        box, dims = [], []
        offset: Index = 0
        place = 0
        sizes, steps = self.sizes(block), self.steps(block)
        for at, axis in enumerate(self.axes):
            low, high = block.segments[at].valid[pack[at]]
            if high <= low:
                return
            dims.append((steps[at], high - low))
            if self._padded(axis):
                place += low * steps[at]
            if not at:
                continue
            apart = axis.stride if axis.packed else 1
            stride = spec.strides[at + 1]
            box.append((high - low, stride * apart))
            first = block.first(at, axis.block) * axis.stride
            offset = offset + (first + (axis.loads[pack[at]] + low * apart)) * stride
        images = dims[0][1]
        image = block.first(0, self.axes[0].block)
        if self.on_array:
            window = self.x.window(group, channel, count, image, images, box, offset, turned=True)
            self._turn(tile, count, window, dims, place, number)
            return
        window = self.x.window(group, channel, count, image, images, box, offset)
        if together is not None:
            window, count = self._packed(window, together, group), together.rows
        self._bring(tile, window, (partition, count), place, dims, box, sizes, number, queue)

    def _bring(
        self, tile: TileRef, window: TileRef, rows_: tuple[int, int], place: int,
        dims: Sequence[tuple[int, int]], box: Sequence[tuple[int, int]], sizes: Sequence[int],
        number: Index, queue: str,
    ) -> None:  # fmt: skip
        """The transfer of a window to (first partition, count) of a tile."""
        b, spec = self.b, self.x.spec
        partition, count = rows_
        images, size = dims[0][1], spec.itemsize
        whole = place == 0 and all(n == wide for (_, n), wide in zip(dims, sizes, strict=True))
        total = images * prod(n for n, _ in box)
        held = ((1, total),) if whole else tuple(dims)
        view = tile.view(self.dtype, *held, offset=place, partition=partition, partitions=count)
        run = contiguous_run([(images, spec.strides[0]), *box])
        staged = self.staging is not None and not whole and partition == 0 and not self.by_dma
        target = view
        if staged:
            assert self.staging
            self.copies += 1
            view = self.staging[number + self.copies].view(self.dtype, (1, total),
                                                           partitions=count)  # fmt: skip
        elif not whole:
            run = min(run, contiguous_run([(n, step) for step, n in dims]))
        rows, row_bytes = count * (total // run), run * size
        if self.by_dma:
            rows, row_bytes = total, count * size
        b.load(view, window, rows=rows, row_bytes=row_bytes,
               partitions=spread_over(min(count, rows), rows), transpose=self.by_dma,
               queue=queue)  # fmt: skip
        if staged:
            b.tensor_copy(target, view, n=total, partitions=count, dtype=self.dtype,
                          engine=Engine.GPSIMD)  # fmt: skip

    def _turn(
        self, tile: TileRef, count: int, window: TileRef, dims: Sequence[tuple[int, int]],
        place: int, number: Index,
    ) -> None:  # fmt: skip
        """Pixels on partitions, then transposes; a bank of up to 512 pixels at a time.

        dims, place: where the pixels go in the tile.
        """
        b, size = self.b, self.x.spec.itemsize
        pattern: Any = window.pattern
        start = 0
        for corner, sizes in chunks([n for _, n in dims], BANK):
            pixels = prod(sizes)
            self.copies += 1
            natural = self.natural[number + self.copies]
            bank = self.turned[number + self.copies]
            parts = even_parts(pixels)
            each = parts[0][2]
            for first, rows, n in parts:
                part = replace(pattern, num_rows=rows * n, row=pattern.row + (start + first))
                b.load(
                    natural.view(self.dtype, (1, n * count), partition=first // each,
                                 partitions=rows),
                    replace(window, pattern=part), rows=rows * n, row_bytes=count * size,
                    partitions=spread_over(rows, rows * n),
                )  # fmt: skip
            for at in range(each):
                rows = len(range(at, pixels, each))
                b.nc_transpose(
                    bank.view(self.dtype, (each, rows), offset=at),
                    natural.view(self.dtype, (1, count), offset=at * count),
                    partitions=rows, n=count, dtype=self.dtype,
                )  # fmt: skip
            offset = place + sum(at * step for at, (step, _) in zip(corner, dims, strict=True))
            held = [(step, n) for (step, _), n in zip(dims, sizes, strict=True)]
            b.tensor_copy(
                tile.view(self.dtype, *held, offset=offset), bank.view(self.dtype, (1, pixels)),
                n=pixels, partitions=count, dtype=self.dtype,
            )  # fmt: skip
            start += pixels
