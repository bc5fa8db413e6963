"""Max pooling: a maximum for each tap of the window, and where it was; gradients by that place.

A plane (one channel of one image) lies in one partition, several small ones share it. It is padded
in SBUF with what never wins, so that a tap is one strided view of it. Large planes come in bands of
rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product as combinations
from typing import Any, TypeAlias

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.fill import named
from torch_trn.lowering.layout import PARTITIONS, ceil_div, product
from torch_trn.lowering.move import inputs_of, mover, outputs_of
from torch_trn.lowering.part import Part
from torch_trn.lowering.registry import host_only, lowering
from torch_trn.lowering.resample import dims_of_name, each_dim
from torch_trn.lowering.separable import (
    Planes,
    descriptors,
    dims_of,
    planes_of,
    walk_of,
)
from torch_trn.lowering.window import Band, TileDims, Windows, linear, tile_dims
from torch_trn.memory import TileRef
from torch_trn.program import Builder, Program

__all__ = ["PlaneWindows"]

F32, I32 = torch.float32, torch.int32

#: Bytes of one partition that all tiles of a band may take.
ROOM_BYTES = 144 * 1024

#: Elements of a tile that several small planes fill.
SMALL = 2048


def _windows(call: OpCall, ins: Sequence[int], outs: Sequence[int]) -> list[Windows]:
    """The windows of a pooling call."""
    dims = len(ins)
    if "adaptive" in call.name:
        return [Windows.even(*sizes) for sizes in zip(ins, outs, strict=True)]
    given = named(call)
    kernel = each_dim(given["kernel_size"], dims)
    return [
        Windows.regular(*sizes)
        for sizes in zip(
            ins, outs, kernel, each_dim(given.get("stride"), dims, given["kernel_size"]),
            each_dim(given.get("padding", 0), dims), each_dim(given.get("dilation", 1), dims),
            strict=True)
    ]  # fmt: skip


@lowering(
    "aten::max_pool2d_with_indices", "aten::max_pool3d_with_indices", "aten::max_pool2d",
    "aten::adaptive_max_pool2d", "aten::adaptive_max_pool3d",
)  # fmt: skip
def max_pool(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """A maximum per tap, and a comparison and a predicated copy to keep its position."""
    x, out, dims = call.args[0], call.outs[0], dims_of_name(call.name)
    b = mover(core, call.name)
    pools, results = inputs_of(b, call), outputs_of(b, call)
    if not out.numel:
        return b.build()
    windows = _windows(call, x.shape[-dims:], out.shape[-dims:])
    work = PlaneWindows(b, windows, product(x.shape[:-dims]), shards)
    work.forward(pools[0], Part.of(x), results, [Part.of(spec) for spec in call.outs])
    return b.build()


@lowering(
    "aten::max_pool2d_with_indices_backward", "aten::max_pool3d_with_indices_backward",
    "aten::adaptive_max_pool2d_backward", "aten::adaptive_max_pool3d_backward",
)  # fmt: skip
def max_pool_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Zeros, then for each tap the gradient where the stored position is this tap's."""
    grad, out, dims = call.args[0], call.outs[0], dims_of_name(call.name)
    index = [arg for arg in call.args if isinstance(arg, TensorSpec)][2]
    b = mover(core, call.name)
    pools, results = inputs_of(b, call), outputs_of(b, call)
    if not out.numel:
        return b.build()
    work = PlaneWindows(b, _windows(call, out.shape[-dims:], grad.shape[-dims:]),
                 product(out.shape[:-dims]), shards)  # fmt: skip
    work.backward(pools[0], Part.of(grad), pools[2], Part.of(index), results[0], Part.of(out))
    return b.build()


host_only(
    "where its windows lie depends on the values of random_samples",
    "aten::fractional_max_pool2d", "aten::fractional_max_pool3d",
    "aten::fractional_max_pool2d_backward", "aten::fractional_max_pool3d_backward",
)  # fmt: skip


Places: TypeAlias = tuple[int, tuple[tuple[int, int], ...]]
"""Base and steps of an iota."""


class PlaneWindows:
    """Windows over planes, forward or backward, while they are emitted."""

    def __init__(self, b: Builder, windows: list[Windows], rows: int, shards: int) -> None:
        self.b, self.windows, self.rows, self.shards = b, windows, rows, shards
        self.ins = [w.ins for w in windows]
        self.outs = [len(w.starts) for w in windows]
        reach = [w.reach(0, len(w.starts)) for w in windows]
        # Beyond the first dim planes are held whole, with what windows reach beyond them.
        self.lows = [min(0, low) for low, _ in reach]
        self.wide = [max(n, high) - low for n, (_, high), low in
                     zip(self.ins, reach, self.lows, strict=True)]  # fmt: skip

    def planes_each(self, elements: int) -> int:
        small = max(1, SMALL // max(elements, 1))
        return max(1, min(small, ceil_div(self.rows, PARTITIONS * self.shards)))

    def taps(self, band: Band, each: int) -> Iterator[tuple[TileDims, TileDims, Places]]:
        """(results, padded sources, numbers of the sources in their planes) for each tap."""
        counts = [max(w.taps) for w in self.windows]
        tall = [band.high - band.low, *self.wide[1:]]
        outs = [band.count, *self.outs[1:]]
        for tap in combinations(*(range(n) for n in counts)):
            runs = [
                w.runs(t, band.first if d == 0 else 0, outs[d], band.low if d == 0 else
                       self.lows[d])
                for d, (w, t) in enumerate(zip(self.windows, tap, strict=True))
            ]  # fmt: skip
            for chosen in combinations(*runs):
                to = tile_dims(chosen, outs, each, source=False)
                given = tile_dims(chosen, tall, each, source=True)
                # Where the tap's first element lies in the plane, for its number.
                at = [run.source + (band.low if d == 0 else self.lows[d])
                      for d, run in enumerate(chosen)]  # fmt: skip
                base = linear(at, self.ins)
                numbers = [(0, each)]
                for d, run in enumerate(chosen):
                    numbers.append((run.source_step * product(self.ins[d + 1 :]), run.count))
                yield to, given, (base, tuple(numbers))

    # -- forward ---------------------------------------------------------------------------------
    def forward(self, source: Any, x: Part, results: Any, outs: Sequence[Part]) -> None:
        b, kind = self.b, x.dtype
        bands = self.bands_of_results(kind.itemsize, len(outs) > 1)
        most = max(bands, key=lambda band: band.count)
        n_in = (most.high - most.low) * product(self.wide[1:])
        n_out = most.count * product(self.outs[1:])
        each = self.planes_each(max(n_in, n_out))
        came = b.sbuf("plane", free_bytes=each * n_in * kind.itemsize, slots=2)
        best = b.sbuf("best", free_bytes=each * n_out * kind.itemsize, slots=2)
        if len(outs) > 1:
            names = ("spot", "number", "mask")
            self.spots = [b.sbuf(name, free_bytes=each * n_out * 4, slots=2) for name in names]
        padded = any(
            (band.low, band.high) != (max(band.low, 0), min(band.high, self.ins[0]))
            for band in bands
        ) or self.wide[1:] != self.ins[1:]  # fmt: skip
        lowest = -math.inf if kind.is_floating_point else torch.iinfo(kind).min
        if padded and len(bands) == 1:
            for fresh in range(2):
                b.memset(came[fresh].view(kind, (1, each * n_in)), value=lowest, n=each * n_in,
                         dtype=kind)  # fmt: skip
        count = len(bands)
        for block in planes_of(b, self.rows, each, self.shards):
            for number, band in enumerate(bands):
                slot = block.number * count + number
                if padded and count > 1:
                    size = block.each * (band.high - band.low) * product(self.wide[1:])
                    b.memset(came[slot].view(kind, (1, size)), value=lowest, n=size,
                             partitions=block.parts, dtype=kind)  # fmt: skip
                self.load_plane(came[slot], source, x, block, band)
                self._maximum(came[slot], best[slot], slot, block, band, kind, len(outs) > 1)
                size = block.each * band.count * product(self.outs[1:])
                tiles = [best[slot].view(kind, (1, size))]
                if len(outs) > 1:
                    tiles.append(self.spots[0][slot].view(I32, (1, size)))
                for tile, pool, out in zip(tiles, results, outs, strict=True):
                    self.move(pool, out, tile, block, band.first, band.count, self.outs,
                               loads=False)  # fmt: skip

    def bands_of_results(self, itemsize: int, indices: bool) -> list[Band]:
        rows_in, rows_out = product(self.wide[1:]), product(self.outs[1:])
        each_out = rows_out * (2 * itemsize + (24 if indices else 0))
        tall = self.outs[0]
        while tall > 1:
            low, high = self.windows[0].reach(0, tall)
            if tall * each_out + (high - low) * rows_in * itemsize * 2 <= ROOM_BYTES:
                break
            tall = ceil_div(tall, 2)
        found = []
        for first in range(0, self.outs[0], tall):
            count = min(tall, self.outs[0] - first)
            found.append(Band(first, count, *self.windows[0].reach(first, count)))
        return found

    def load_plane(self, tile: TileRef, pool: Any, x: Part, block: Planes, band: Band) -> None:
        """The rows of a band that exist, into their place in the padded tile."""
        first, last = max(band.low, 0), min(band.high, self.ins[0])
        if last <= first:
            return
        tall = [band.high - band.low, *self.wide[1:]]
        dims, offset = [(product(tall), block.each)], 0
        sizes = [last - first, *self.ins[1:]]
        starts = [first - band.low, *(-low for low in self.lows[1:])]
        for d, size in enumerate(sizes):
            step = product(tall[d + 1 :])
            dims.append((step, size))
            offset += starts[d] * step
        view = tile.view(x.dtype, *dims_of(*dims), offset=offset)
        self.move(pool, x, view, block, first, last - first, self.ins, loads=True)

    def move(
        self, pool: Any, part: Part, tile: TileRef, block: Planes, first: int, count: int,
        sizes: Sequence[int], loads: bool,
    ) -> None:  # fmt: skip
        """Rows ``first`` to ``first + count`` of planes in HBM from or to a tile."""
        walk = walk_of(part, len(sizes))
        inner = product(sizes[1:])
        n = count * inner
        window = pool[0].window(part.dtype, walk, block.count, n, row=block.row, col=first * inner,
                                offset=part.offset)  # fmt: skip
        copy = descriptors(walk, block, n, part.dtype.itemsize)
        if loads:
            self.b.load(tile, window, **copy)
        else:
            self.b.store(window, tile, **copy)

    def _maximum(
        self, came: TileRef, best: TileRef, slot: Any, block: Planes, band: Band,
        kind: torch.dtype, indices: bool,
    ) -> None:  # fmt: skip
        b = self.b
        for number, (to, given, place) in enumerate(self.taps(band, block.each)):
            n = product([count for _, count in to.dims])
            shape: dict[str, Any] = {"n": n, "partitions": block.parts}
            target, tap = to.of(best, kind), given.of(came, kind)
            first = number < self._firsts(band, block.each)
            if not indices:
                if first:
                    b.tensor_copy(target, tap, dtype=kind, **shape)
                else:
                    b.tensor_tensor(target, target, tap, op="max", dtype=kind, **shape)
                continue
            spot = to.of(self.spots[0][slot], I32)
            base, steps = place
            numbers: dict[str, Any] = {"base": base, "steps": steps, "dtype": I32}
            if first:
                b.tensor_copy(target, tap, dtype=kind, **shape)
                b.iota(spot, **numbers, **shape)
                continue
            mask = self.spots[2][slot].view(F32, (1, n))
            tile = self.spots[1][slot].view(I32, (1, n))
            b.iota(tile, **numbers, **shape)
            b.tensor_tensor(mask, tap, target, op="is_gt", dtype=kind, out_dtype=F32, **shape)
            b.tensor_copy_predicated(spot, tile, mask, dtype=I32, **shape)
            b.tensor_tensor(target, target, tap, op="max", dtype=kind, **shape)

    def _firsts(self, band: Band, each: int) -> int:
        """How many steps the first tap of every window takes."""
        outs = [band.count, *self.outs[1:]]
        return product([
            len(w.runs(0, band.first if d == 0 else 0, outs[d], 0))
            for d, w in enumerate(self.windows)
        ])  # fmt: skip

    # -- backward --------------------------------------------------------------------------------
    def backward(
        self, grads: Any, grad: Part, spots: Any, spot: Part, result: Any, out: Part
    ) -> None:
        b = self.b
        bands = self.bands_of_sources(grad.dtype.itemsize, spot.dtype.itemsize)
        tall = [self.windows[0].reach(band.first, band.count) if band.count else (0, 0)
                for band in bands]  # fmt: skip
        high = [(min(low, band.low), max(top, band.high))
                for band, (low, top) in zip(bands, tall, strict=True)]  # fmt: skip
        n_in = max(top - low for low, top in high) * product(self.wide[1:])
        n_out = max(max(band.count for band in bands), 1) * product(self.outs[1:])
        each = self.planes_each(max(n_in, n_out))
        given = b.sbuf("grad", free_bytes=each * n_out * grad.dtype.itemsize, slots=2)
        place = b.sbuf("place", free_bytes=each * n_out * spot.dtype.itemsize, slots=2)
        work = [b.sbuf(name, free_bytes=each * n_out * 4) for name in ("number", "share")]
        total = b.sbuf("total", free_bytes=each * n_in * 4, slots=2)
        goes = b.sbuf("goes", free_bytes=each * n_in * out.dtype.itemsize)
        for block in planes_of(b, self.rows, each, self.shards):
            for number, (band, (low, top)) in enumerate(zip(bands, high, strict=True)):
                slot = block.number * len(bands) + number
                held = Band(band.first, band.count, low, top)
                size = block.each * (top - low) * product(self.wide[1:])
                b.memset(total[slot], value=0.0, n=size, partitions=block.parts)
                if band.count:
                    n = block.each * band.count * product(self.outs[1:])
                    for tile, pool, part in ((given, grads, grad), (place, spots, spot)):
                        self.move(pool, part, tile[slot].view(part.dtype, (1, n)), block,
                                   band.first, band.count, self.outs, loads=True)  # fmt: skip
                    self._gradients(given[slot], place[slot], total[slot], work, block, held,
                                    grad.dtype, spot.dtype)  # fmt: skip
                self.store_sources(total[slot], goes[0], result, out, block, band, held)

    def bands_of_sources(self, grad_size: int, spot_size: int) -> list[Band]:
        first = self.windows[0]
        rows_in, rows_out = product(self.wide[1:]), product(self.outs[1:])
        tall = self.ins[0]
        while True:
            bands = []
            for low in range(0, self.ins[0], tall):
                high = min(low + tall, self.ins[0])
                bands.append(Band(*first.touching(low, high), low, high))
            most = 0
            for band in bands:
                low, top = first.reach(band.first, band.count) if band.count else (0, 0)
                span = max(top, band.high) - min(low, band.low)
                most = max(most, band.count * rows_out * (2 * grad_size + 2 * spot_size + 8)
                           + span * rows_in * 12)  # fmt: skip
            if most <= ROOM_BYTES or tall == 1:
                return bands
            tall = ceil_div(tall, 2)

    def _gradients(
        self, grad: TileRef, place: TileRef, total: TileRef, work: Sequence[Any], block: Planes,
        band: Band, kind: torch.dtype, spot: torch.dtype,
    ) -> None:  # fmt: skip
        b = self.b
        taps = list(self.taps(band, block.each))
        if len({(to, steps) for to, _, (_, steps) in taps}) == 1:
            self._by_distance(grad, place, total, work, block, kind, spot, taps)
            return
        for to, given, (base, steps) in taps:
            n = product([count for _, count in to.dims])
            shape: dict[str, Any] = {"n": n, "partitions": block.parts}
            number, share = work[0][0].view(I32, (1, n)), work[1][0].view(F32, (1, n))
            target = given.of(total, F32)
            b.iota(number, base=base, steps=steps, dtype=I32, **shape)
            b.tensor_tensor(share, to.of(place, spot), number, op="is_equal", dtype=spot,
                            out_dtype=F32, **shape)  # fmt: skip
            b.tensor_tensor(share, share, to.of(grad, kind), op="multiply", **shape)
            b.tensor_tensor(target, target, share, op="add", strided=True, **shape)

    def _by_distance(
        self, grad: TileRef, place: TileRef, total: TileRef, work: Sequence[Any], block: Planes,
        kind: torch.dtype, spot: torch.dtype, taps: Sequence[tuple[TileDims, TileDims, Places]],
    ) -> None:  # fmt: skip
        """Windows all alike: a place's distance from its window's first one names the tap."""
        b = self.b
        to, _, (first, steps) = taps[0]
        n = product([count for _, count in to.dims])
        shape: dict[str, Any] = {"n": n, "partitions": block.parts}
        number, share = work[0][0].view(I32, (1, n)), work[1][0].view(F32, (1, n))
        b.iota(number, base=first, steps=steps, dtype=I32, **shape)
        b.tensor_tensor(number, to.of(place, spot), number, op="subtract", dtype=spot,
                        out_dtype=I32, **shape)  # fmt: skip
        for _, given, (base, _) in taps:
            target = given.of(total, F32)
            b.scalar_tensor_tensor(share, number, to.of(grad, kind), op="is_equal,multiply",
                                   scalar=base - first, dtype=I32, out_dtype=F32,
                                   **shape)  # fmt: skip
            b.tensor_tensor(target, target, share, op="add", strided=True, **shape)

    def store_sources(
        self, total: TileRef, goes: TileRef, pool: Any, out: Part, block: Planes, band: Band,
        held: Band,
    ) -> None:  # fmt: skip
        """The band's own rows without what windows reach beyond the plane."""
        tall = [held.high - held.low, *self.wide[1:]]
        sizes = [band.high - band.low, *self.ins[1:]]
        starts = [band.low - held.low, *(-low for low in self.lows[1:])]
        dims, offset = [(product(tall), block.each)], 0
        for d, size in enumerate(sizes):
            step = product(tall[d + 1 :])
            dims.append((step, size))
            offset += starts[d] * step
        n = block.each * product(sizes)
        view = total.view(F32, *dims_of(*dims), offset=offset)
        tile = goes.view(out.dtype, (1, n))
        self.b.tensor_copy(tile, view, n=n, partitions=block.parts, dtype=F32,
                           out_dtype=out.dtype)  # fmt: skip
        self.move(pool, out, tile, block, band.low, band.high - band.low, self.ins, loads=False)
