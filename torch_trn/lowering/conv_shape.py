"""Convolutions without tensors: axes, taps, blocks, and which elements lie beyond the edge.

Along each axis output j reads input j x stride + shift for every tap of a phase. A convolution has
one phase; a transposed one has as many as its stride, each with the taps that reach it, and its
output j of phase r lies at j x stride + r. Images are an axis with one tap of shift 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch_trn.lowering.layout import ceil_div
from torch_trn.lowering.run import loop
from torch_trn.memory import Index
from torch_trn.program import Builder

__all__ = ["Axis", "Block", "Box", "Phase", "Segment", "blocks_of", "boxes", "chunks", "clipped",
           "phases_of", "plain", "transposed", "with_blocks"]  # fmt: skip

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Start and size along each axis."""


@dataclass(frozen=True)
class Axis:
    """One axis: ``taps[r]`` are the (tap, shift) of phase r.

    count: outputs of a phase, at most. size, out_size: elements of input and output.
    packed: each tap has partitions of its own, where it is loaded already shifted.
    """

    size: int
    out_size: int
    stride: int
    taps: tuple[tuple[tuple[int, int], ...], ...]
    kernel: int = 1
    block: int = 1
    packed: bool = False

    @property
    def phases(self) -> int:
        """Outputs that lie between neighbours of one phase."""
        return len(self.taps)

    @property
    def count(self) -> int:
        """Outputs of the longest phase."""
        return ceil_div(self.out_size, self.phases)

    @property
    def low(self) -> int:
        """The smallest shift."""
        return min((shift for phase in self.taps for _, shift in phase), default=0)

    @property
    def span(self) -> int:
        """Distance of the largest shift from the smallest; 0 where taps are packed."""
        if self.packed:
            return 0
        return max((shift for phase in self.taps for _, shift in phase), default=0) - self.low

    @property
    def step(self) -> int:
        """Elements of a tile between what neighbouring outputs read."""
        return 1 if self.packed else self.stride

    @property
    def loads(self) -> tuple[int, ...]:
        """The shift of each load of a tile: one, or one for each packed tap."""
        if self.packed:
            return tuple(shift for _, shift in self.taps[0])
        return (self.low,)

    def extent(self, outputs: int) -> int:
        """Elements of a tile that ``outputs`` outputs read."""
        return (outputs - 1) * self.step + self.span + 1

    def segments(self) -> list[Segment]:
        """The blocks, neighbours that lie alike on the input together."""
        found: list[Segment] = []
        for number in range(ceil_div(self.count, self.block)):
            first = number * self.block
            outputs = min(self.block, self.count - first)
            valid = tuple(self._valid(first, outputs, shift) for shift in self.loads)
            stored = min(outputs * self.phases, self.out_size - first * self.phases)
            last = found[-1] if found else None
            alike = (outputs, stored, valid)
            if last and (last.outputs, last.stored, last.valid) == alike:
                found[-1] = Segment(last.first, last.count + 1, *alike)
            else:
                found.append(Segment(number, 1, *alike))
        return found

    def _valid(self, first: int, outputs: int, shift: int) -> tuple[int, int]:
        """First and last + 1 tile elements that lie in the input."""
        # In a packed tile neighbours are a stride apart in the input, else they are neighbours.
        apart = self.stride if self.packed else 1
        start, extent = first * self.stride + shift, self.extent(outputs)
        low = min(max(0, ceil_div(-start, apart)), extent)
        high = min(extent, ceil_div(self.size - start, apart))
        return low, max(low, high)


@dataclass(frozen=True)
class Segment:
    """``count`` blocks from block ``first`` on, of ``outputs`` outputs in each phase.

    stored: elements of the output that a block holds, all phases together. valid: for each load the
    tile elements that the input has; what lies beyond is zero.
    """

    first: int
    count: int
    outputs: int
    stored: int
    valid: tuple[tuple[int, int], ...]


def plain(size: int, out_size: int, kernel: int, stride: int, pad: int, dilation: int) -> Axis:
    """An axis of a convolution."""
    taps = tuple((tap, tap * dilation - pad) for tap in range(kernel))
    return Axis(size, out_size, stride, (taps,), kernel)


def transposed(size: int, out_size: int, kernel: int, stride: int, pad: int, dilation: int) -> Axis:
    """An axis of a transposed convolution (or of an input's gradient): stride 1, in phases."""
    phases = tuple(
        tuple(
            (tap, (phase + pad - tap * dilation) // stride)
            for tap in range(kernel)
            if (phase + pad - tap * dilation) % stride == 0
        )
        for phase in range(stride)
    )
    return Axis(size, out_size, 1, phases, kernel)


@dataclass(frozen=True)
class Phase:
    """One phase of all axes: where its outputs lie, and its taps.

    taps: the tap's number in the kernel, and its shift from the first element along each axis.
    """

    offsets: tuple[int, ...]
    taps: tuple[tuple[int, tuple[int, ...]], ...]


def phases_of(axes: Sequence[Axis]) -> list[Phase]:
    """All phases; the taps of packed axes count as their first one."""
    found = []
    for offsets in itertools.product(*(range(axis.phases) for axis in axes)):
        taps = []
        choices = [
            axis.taps[at][:1] if axis.packed else axis.taps[at]
            for axis, at in zip(axes, offsets, strict=True)
        ]
        for each in itertools.product(*choices):
            number = 0
            for axis, (tap, _) in zip(axes, each, strict=True):
                number = number * axis.kernel + tap
            shifts = tuple(
                0 if axis.packed else shift - axis.low
                for axis, (_, shift) in zip(axes, each, strict=True)
            )
            taps.append((number, shifts))
        found.append(Phase(offsets, tuple(taps)))
    return found


def chunks(sizes: Sequence[int], limit: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(start, sizes) of boxes of at most ``limit`` elements that together are a box of ``sizes``.

    Inner axes are whole where they fit, so that a box is a run of the larger box's elements.
    """
    at = len(sizes)
    while at and prod(sizes[at - 1 :]) <= limit:
        at -= 1
    if not at:
        yield (0,) * len(sizes), tuple(sizes)
        return
    inner = prod(sizes[at:])
    most = max(1, limit // inner)
    outer = [range(size) for size in sizes[: at - 1]]
    for corner in itertools.product(*outer):
        for start in range(0, sizes[at - 1], most):
            part = min(most, sizes[at - 1] - start)
            yield (
                (*corner, start, *(0,) * (len(sizes) - at)),
                (*(1,) * (at - 1), part, *sizes[at:]),
            )


def boxes(counts: Sequence[int], limit: int) -> tuple[int, ...]:
    """Block sizes along axes of ``counts`` outputs: inner ones whole, ``limit`` outputs in all."""
    found: list[int] = []
    for count in reversed(counts):
        most = max(1, limit // prod(found))
        parts = ceil_div(count, most)
        found.append(ceil_div(count, parts) if parts else 1)
    return tuple(reversed(found))


@dataclass(frozen=True)
class Block:
    """One block of outputs: the segment of each axis, and which of its blocks."""

    segments: tuple[Segment, ...]
    numbers: tuple[Index, ...]

    def first(self, axis: int, size: int) -> Index:
        """The first output along an axis whose blocks have ``size``."""
        return self.numbers[axis] * size + self.segments[axis].first * size


def with_blocks(axes: Sequence[Axis], limit: int, room: int, tiles: int, size: int) -> list[Axis]:
    """The axes in blocks of ``limit`` outputs, fewer where ``tiles`` of them do not fit."""
    phases = prod(axis.phases for axis in axes)
    limit = max(1, limit // phases)
    while True:
        sizes = boxes([axis.count for axis in axes], limit)
        found = [replace(axis, block=block) for axis, block in zip(axes, sizes, strict=True)]
        nbytes = prod(axis.extent(axis.block) for axis in found) * size
        if tiles * nbytes <= room or limit == 1:
            return found
        limit = ceil_div(limit, 2)


def blocks_of(b: Builder, axes: Sequence[Axis]) -> Iterator[tuple[Index, Block]]:
    """Every block of outputs, alike ones in a loop, with a number of its own."""
    yield from _blocks(b, axes, (), (), 0)


def _blocks(
    b: Builder, axes: Sequence[Axis], chosen: tuple[Any, ...], numbers: tuple[Index, ...],
    number: Index,
) -> Iterator[tuple[Index, Block]]:  # fmt: skip
    if len(chosen) == len(axes):
        yield number, Block(chosen, numbers)
        return
    found = axes[len(chosen)].segments()
    total = sum(segment.count for segment in found)
    for segment in found:
        with loop(b, segment.count, "xyzw"[len(chosen) % 4]) as trip:
            at = number * total + (trip + segment.first)
            yield from _blocks(b, axes, (*chosen, segment), (*numbers, trip), at)


def clipped(
    axes: Sequence[Axis], segments: Sequence[Segment], shift: Sequence[int], box: Box
) -> Box:
    """The part of a box of outputs that a tap reaches from within the input."""
    starts, sizes = [], []
    for at, axis in enumerate(axes):
        first, last = box[0][at], box[0][at] + box[1][at]
        if not axis.packed:
            low, high = segments[at].valid[0]
            first = max(first, ceil_div(low - shift[at], axis.stride))
            last = min(last, ceil_div(high - shift[at], axis.stride))
        starts.append(first)
        sizes.append(max(0, last - first))
    return tuple(starts), tuple(sizes)
