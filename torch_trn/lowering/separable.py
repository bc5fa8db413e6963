"""Weighted sums along one dim after the other: resampling, average pooling, and their gradients.

Each element of the result is a sum of few elements of the source, with weights known when the
Program is made. Elements that use the same weight at regular distances share one instruction. A
plane (one channel of one image) lies in one partition, several small ones share it; planes that do
not fit go dim by dim through HBM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.layout import PARTITIONS, ceil_div, product
from torch_trn.lowering.move import blocks, inputs_of, mover, outputs_of, transfer
from torch_trn.lowering.part import Part
from torch_trn.lowering.taps import Progression, Taps, progressions
from torch_trn.memory import Index, Pool, TileRef, Walk
from torch_trn.program import Builder, Program

__all__ = ["Planes", "descriptors", "dims_of", "planes_of", "separable", "walk_of"]

F32 = torch.float32

#: Bytes of one partition that the tiles of a block of planes may take, all together.
ROOM_BYTES = 128 * 1024

#: Elements of a tile that several small planes fill.
SMALL = 2048

#: Taps from which one reduction is better than an addition each.
REDUCED = 3


# -- planes in partitions --------------------------------------------------------------------------
@dataclass(frozen=True)
class Planes:
    """Some planes in SBUF: ``each`` in ``parts`` partitions, from plane ``row`` on."""

    number: Index
    row: Index
    parts: int
    each: int

    @property
    def count(self) -> int:
        """Number of planes."""
        return self.parts * self.each


def planes_of(b: Builder, rows: int, each: int, shards: int) -> Iterator[Planes]:
    """All planes, this core's share of them; never one of another core."""
    each = max(1, min(each, ceil_div(rows, PARTITIONS * shards)))
    for block in blocks(b, rows, PARTITIONS * each, shards, "r"):
        main, left = divmod(block.count, each)
        if main:
            yield Planes(block.number, block.row, main, each)
        if left:
            yield Planes(block.number, block.row + main * each, 1, left)


def walk_of(part: Part, dims: int) -> Walk:
    """Planes as rows, the last ``dims`` dims as columns."""
    pairs = tuple(zip(part.sizes, part.strides, strict=True))
    at = len(pairs) - dims
    return Walk(pairs[:at] or ((1, 0),), pairs[at:])


def run_of(cols: Sequence[tuple[int, int]]) -> int:
    """Contiguous elements at the end of a row."""
    run = 1
    for size, step in reversed(cols):
        if size != 1 and step != run:
            break
        run *= size
    return run


def descriptors(walk: Walk, planes: Planes, n: int, itemsize: int) -> dict[str, Any]:
    """The DMA of ``n`` elements of each of some planes."""
    run = min(run_of(walk.cols), n)
    return {"rows": planes.count * ceil_div(n, run), "row_bytes": run * itemsize,
            "partitions": planes.parts}  # fmt: skip


# -- one pass --------------------------------------------------------------------------------------
def dims_of(*dims: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """(step, count) of an access pattern without dims of one element; at least one."""
    kept = tuple((step, count) for step, count in dims if count != 1)
    return kept or ((1, 1),)


@dataclass(frozen=True)
class Pass:
    """One dim of a tile [before, size, inner]: from ``source`` to ``to``, in SBUF."""

    b: Builder
    parts: int
    before: int
    inner: int
    taps: Taps

    def emit(self, to: TileRef, out: torch.dtype, source: TileRef, dtype: torch.dtype) -> None:
        """``to`` = the map of ``source``; sums are made in ``out``."""
        if self._reduced(to, out, source, dtype):
            return
        layers = max((len(taps) for taps in self.taps.outs), default=0)
        missing = [(at, at, 0.0) for at, taps in enumerate(self.taps.outs) if not taps]
        for run in progressions(missing):
            self.b.memset(self._to(to, out, run), value=0, dtype=out, **self._shape(run))
        for layer in range(layers):
            pairs = [(at, *taps[layer]) for at, taps in enumerate(self.taps.outs)
                     if len(taps) > layer]  # fmt: skip
            for run in progressions(pairs):
                self._run(to, out, source, dtype, run, layer == 0)

    def _run(
        self, to: TileRef, out: torch.dtype, source: TileRef, dtype: torch.dtype, run: Progression,
        first: bool,
    ) -> None:  # fmt: skip
        b, n, inner = self.b, self.taps.ins, self.inner
        given = source.view(dtype, *dims_of((n * inner, self.before), (run.source_step * inner,
                            run.count), (1, inner)), offset=run.source * inner)  # fmt: skip
        place = self._to(to, out, run)
        shape: dict[str, Any] = {**self._shape(run), "dtype": dtype, "out_dtype": out}
        if not first:
            b.scalar_tensor_tensor(place, given, place, op="multiply,add", scalar=run.weight,
                                   **shape)  # fmt: skip
        elif run.weight == 1.0:
            b.tensor_copy(place, given, **shape)
        else:
            b.tensor_scalar(place, given, op="multiply", operands=(run.weight,), **shape)

    def _to(self, to: TileRef, out: torch.dtype, run: Progression) -> TileRef:
        inner, count = self.inner, len(self.taps.outs)
        return to.view(out, *dims_of((count * inner, self.before), (run.out_step * inner,
                       run.count), (1, inner)), offset=run.out * inner)  # fmt: skip

    def _shape(self, run: Progression) -> dict[str, Any]:
        return {"n": self.before * run.count * self.inner, "partitions": self.parts}

    def _reduced(
        self, to: TileRef, out: torch.dtype, source: TileRef, dtype: torch.dtype
    ) -> bool:  # fmt: skip
        """Equal windows of equal weights: one reduction and one product."""
        outs, inner, before = self.taps.outs, self.inner, self.before
        taps = outs[0] if outs else ()
        starts = [row[0][0] for row in outs if row]
        steps = {b - a for a, b in zip(starts, starts[1:], strict=False)}
        even = len(taps) >= REDUCED and len(steps) <= 1 and min(steps, default=0) >= 0
        if not even or any(
            [(s - row[0][0], w) for s, w in row] != [(i, taps[0][1]) for i in range(len(taps))]
            for row in outs
        ):
            return False
        step, count = min(steps, default=1), len(outs)
        view = source.view(
            dtype, *dims_of((self.taps.ins * inner, before), (step * inner, count), (1, inner),
                            (inner, len(taps))), offset=starts[0] * inner)  # fmt: skip
        n = before * count * inner
        total = to.view(out, (1, n))
        self.b.tensor_reduce(total, view, op="add", n=n * len(taps), out_n=n,
                             partitions=self.parts, dtype=dtype, out_dtype=out)  # fmt: skip
        if taps[0][1] != 1.0:
            self.b.tensor_scalar(total, total, op="multiply", operands=(taps[0][1],), n=n,
                                 partitions=self.parts, dtype=out)  # fmt: skip
        return True


# -- all dims --------------------------------------------------------------------------------------
def separable(
    call: OpCall, core: CoreSpec, shards: int, x: TensorSpec, maps: Sequence[Taps]
) -> Program:
    """out = ``maps`` applied along the last dims of ``x``, the call's first tensor."""
    b = mover(core, call.name)
    source, result = inputs_of(b, call)[0], outputs_of(b, call)[0]
    out = call.outs[0]
    if not out.numel:
        return b.build()
    work = _Separable(b, source, result, Part.of(x), Part.of(out), list(maps))
    if work.fits():
        work.fused(shards)
    else:
        work.through_hbm(shards)
    return b.build()


class _Separable:
    """The passes of one map while they are emitted."""

    def __init__(
        self, b: Builder, source: Pool, result: Pool, x: Part, out: Part, maps: list[Taps]
    ) -> None:
        self.b, self.source, self.result, self.x, self.out = b, source, result, x, out
        self.maps, self.dims = maps, len(maps)
        # The last dim first: its elements are next to each other.
        self.order = [d for d in reversed(range(self.dims)) if not maps[d].is_identity]
        moves_only = all(taps.selects for taps in maps)
        self.work = x.dtype if moves_only else F32
        self.rounds = not moves_only and not out.dtype.is_floating_point

    def sizes(self, done: int) -> list[int]:
        """Sizes of the plane after ``done`` passes."""
        sizes = [taps.ins for taps in self.maps]
        for dim in self.order[:done]:
            sizes[dim] = len(self.maps[dim].outs)
        return sizes

    def fits(self) -> bool:
        """Whether a plane and all it becomes fit into a partition."""
        planes = [product(self.sizes(done)) for done in range(len(self.order) + 1)]
        nbytes = 2 * planes[0] * self.x.dtype.itemsize + 2 * planes[-1] * self.out.dtype.itemsize
        nbytes += sum(planes[1:]) * self.work.itemsize
        return nbytes <= ROOM_BYTES and max(planes) <= 65536

    def fused(self, shards: int) -> None:
        """Each block of planes goes through all dims in SBUF."""
        b, steps = self.b, len(self.order)
        planes = [product(self.sizes(done)) for done in range(steps + 1)]
        each = max(1, SMALL // max(planes))
        lead = self.x.sizes[: self.x.ndim - self.dims]
        rows = product(lead)
        each = max(1, min(each, ceil_div(rows, PARTITIONS * shards)))
        came = b.sbuf("came", free_bytes=each * planes[0] * self.x.dtype.itemsize, slots=2)
        goes = b.sbuf("goes", free_bytes=each * planes[-1] * self.out.dtype.itemsize, slots=2)
        tiles = [b.sbuf(f"pass{i}", free_bytes=each * n * self.work.itemsize)
                 for i, n in enumerate(planes[1:])]  # fmt: skip
        walks = [walk_of(self.x, self.dims), walk_of(self.out, self.dims)]
        for block in planes_of(b, rows, each, shards):
            n = planes[0]
            held = came[block.number].view(self.x.dtype, (1, block.each * n))
            window = self.source[0].window(self.x.dtype, walks[0], block.count, n, row=block.row,
                                           offset=self.x.offset)  # fmt: skip
            b.load(held, window, **descriptors(walks[0], block, n, self.x.dtype.itemsize))
            tile, dtype = came[block.number], self.x.dtype
            for done, dim in enumerate(self.order):
                sizes = self.sizes(done)
                step = Pass(b, block.parts, block.each * product(sizes[:dim]),
                            product(sizes[dim + 1 :]), self.maps[dim])  # fmt: skip
                straight = done == steps - 1 and self.work == self.out.dtype
                target = goes[block.number] if straight else tiles[done][0]
                step.emit(target, self.work, tile, dtype)
                tile, dtype = target, self.work
            n = planes[-1]
            if not steps or self.work != self.out.dtype:
                self._final(goes[block.number], tile, dtype, block.each * n, block.parts)
            window = self.result[0].window(self.out.dtype, walks[1], block.count, n, row=block.row)
            b.store(window, goes[block.number].view(self.out.dtype, (1, block.each * n)),
                    **descriptors(walks[1], block, n, self.out.dtype.itemsize))  # fmt: skip

    def _final(
        self, to: TileRef, tile: TileRef, dtype: torch.dtype, n: int, parts: int
    ) -> None:  # fmt: skip
        place, given = to.view(self.out.dtype, (1, n)), tile.view(dtype, (1, n))
        shape: dict[str, Any] = {
            "n": n, "partitions": parts, "dtype": dtype, "out_dtype": self.out.dtype}  # fmt: skip
        if self.rounds:
            # Results become integers towards zero: half more rounds to the nearest.
            self.b.tensor_scalar(place, given, op="add", operands=(0.5,), **shape)
        else:
            self.b.tensor_copy(place, given, **shape)

    # -- large planes ----------------------------------------------------------------------------
    def through_hbm(self, shards: int) -> None:
        """One dim after the other, each from HBM to HBM, by one core's share of planes."""
        b, x, source = self.b, self.x, self.source
        lead = product(x.sizes[: x.ndim - self.dims])
        sizes = self.sizes(0)
        shape = (lead, *sizes)
        flat = x.reshape(shape)
        if flat is None or flat.flat() is None or min(flat.strides, default=0) < 0:
            # Every core lays out all of it: the same values, and what it needs is there.
            source = b.hbm("ordered", nbytes=product(shape) * x.dtype.itemsize)
            ordered = Part.of(TensorSpec.contiguous(x.dtype, *x.sizes))
            transfer(b, source, ordered, self.source, x)
        dtype = x.dtype
        for done, dim in enumerate(self.order):
            last = done == len(self.order) - 1
            before, after = self.sizes(done), self.sizes(done + 1)
            kind = self.out.dtype if last else self.work
            target = self.result if last else b.hbm(
                f"after{dim}", nbytes=lead * product(after) * kind.itemsize)  # fmt: skip
            out = self.out if last else Part.of(
                TensorSpec.contiguous(kind, lead, *after))  # fmt: skip
            _Along(self, source, dtype, target, out, before, dim, lead, done).emit(shards, last)
            source, dtype = target, kind


class _Along:
    """One dim of planes in HBM: rows of (plane, outer dims), pieces of results and inner dims."""

    def __init__(
        self, work: _Separable, source: Pool, dtype: torch.dtype, target: Pool, out: Part,
        sizes: list[int], dim: int, lead: int, number: int,
    ) -> None:  # fmt: skip
        self.work, self.source, self.dtype = work, source, dtype
        self.target, self.out = target, out
        self.sizes, self.dim, self.lead = sizes, dim, lead
        self.name = f"dim{number}"
        self.taps = work.maps[dim]
        self.before, self.inner = product(sizes[:dim]), product(sizes[dim + 1 :])

    def emit(self, shards: int, last: bool) -> None:
        b, taps, work = self.work.b, self.taps, self.work
        ratio = max(1, ceil_div(taps.ins, max(len(taps.outs), 1)))
        wide = min(self.inner, 512)
        many = max(1, min(len(taps.outs), 8192 // (wide * ratio)))
        cuts = [(at, min(many, len(taps.outs) - at)) for at in range(0, len(taps.outs), many)]
        needed = max(taps.cut(*cut)[0].ins for cut in cuts)
        came = b.sbuf(f"{self.name}_in", free_bytes=needed * wide * self.dtype.itemsize, slots=2)
        kind = self.out.dtype
        made = b.sbuf(f"{self.name}_sum", free_bytes=many * wide * work.work.itemsize)
        goes = b.sbuf(f"{self.name}_out", free_bytes=many * wide * kind.itemsize, slots=2)
        at_dim = self.out.ndim - work.dims + self.dim
        pairs = tuple(zip(self.out.sizes, self.out.strides, strict=True))
        walk_rows, inner = pairs[:at_dim] or ((1, 0),), pairs[at_dim + 1 :]
        along = self.out.strides[at_dim]
        n = self.sizes[self.dim] * self.inner
        source_rows = ((self.lead * self.before, n),)
        # Rows of one plane belong to one core, as in every other pass.
        share = ceil_div(self.lead, shards) * self.before
        slot = 0
        rows = self.lead * self.before
        for block in blocks(b, rows, PARTITIONS, shards, lead=share if shards > 1 else 0):
            for first, count in cuts:
                cut, low = taps.cut(first, count)
                for at in range(0, self.inner, wide):
                    width = min(wide, self.inner - at)
                    held = came[slot].view(self.dtype, (1, cut.ins * width))
                    walk = Walk(source_rows, ((cut.ins, self.inner), (width, 1)))
                    window = self.source[0].window(
                        self.dtype, walk, block.count, cut.ins * width, row=block.row,
                        offset=low * self.inner + at)  # fmt: skip
                    planes = Planes(block.number, block.row, block.count, 1)
                    b.load(held, window, **descriptors(walk, planes, cut.ins * width,
                                                       self.dtype.itemsize))  # fmt: skip
                    Pass(b, block.count, 1, width, cut).emit(
                        made[0], work.work, came[slot], self.dtype)  # fmt: skip
                    size = count * width
                    if last:
                        work._final(goes[slot], made[0], work.work, size, block.count)
                    else:
                        b.tensor_copy(goes[slot].view(kind, (1, size)),
                                      made[0].view(work.work, (1, size)), n=size,
                                      partitions=block.count, dtype=work.work,
                                      out_dtype=kind)  # fmt: skip
                    self._store(b, goes[slot].view(kind, (1, size)), walk_rows, along, inner,
                                block, first, count, at, width)  # fmt: skip
                    slot += 1

    def _store(
        self, b: Builder, tile: TileRef, rows: Any, along: int, inner: Any, block: Any, first: int,
        count: int, at: int, width: int,
    ) -> None:  # fmt: skip
        """Inner dims of the result that one stride walks are cut; others are stored whole."""
        flat = Part(self.out.dtype, tuple(n for n, _ in inner), tuple(s for _, s in inner)).flat()
        step = flat.strides[0] if flat is not None else 0
        kind = self.out.dtype
        if flat is not None:
            walk = Walk(rows, ((count, along), (width, step)))
            offset = first * along + at * step
        else:
            raise AssertionError("the inner dims of a large plane lie together")
        planes = Planes(block.number, block.row, block.count, 1)
        window = self.target[0].window(kind, walk, block.count, count * width, row=block.row,
                                       offset=offset)  # fmt: skip
        b.store(window, tile, **descriptors(walk, planes, count * width, kind.itemsize))
