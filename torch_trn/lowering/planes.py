"""Operators on image planes that are neither pooling nor resampling: columns of windows, gates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import grid, product
from torch_trn.lowering.move import inputs_of, mover, outputs_of
from torch_trn.lowering.part import Part
from torch_trn.lowering.pool import PlaneWindows
from torch_trn.lowering.registry import host_only, lowering
from torch_trn.lowering.run import lower_kernel
from torch_trn.lowering.separable import Planes, planes_of
from torch_trn.lowering.window import Windows
from torch_trn.memory import Pool, TileRef, Walk
from torch_trn.program import Program

__all__: list[str] = []

F32 = torch.float32


# -- columns of windows ----------------------------------------------------------------------------
@lowering("aten::im2col")
def im2col(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(self, kernel, dilation, padding, stride): [.., C, h, w] to [.., C x taps, windows]."""
    b = mover(core, call.name)
    (source,), (result,) = inputs_of(b, call), outputs_of(b, call)
    x, out = Part.of(call.args[0]), Part.of(call.outs[0])
    if out.numel:
        work = _Columns(b, _windows(call.args[1:], x.sizes[-2:]), product(x.sizes[:-2]), shards)
        work.unfold(source, x, result, _by_tap(out, x.sizes[-3], work))
    return b.build()


@lowering("aten::col2im")
def col2im(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(self, output_size, kernel, dilation, padding, stride): the windows added up again."""
    b = mover(core, call.name)
    (source,), (result,) = inputs_of(b, call), outputs_of(b, call)
    x, out = Part.of(call.args[0]), Part.of(call.outs[0])
    if out.numel:
        work = _Columns(b, _windows(call.args[2:], out.sizes[-2:]), product(out.sizes[:-2]), shards)
        work.fold(source, _by_tap(x, out.sizes[-3], work), result, out)
    return b.build()


def _windows(args: tuple[Any, ...], sizes: tuple[int, ...]) -> list[Windows]:
    kernel, dilation, padding, stride = args[:4]
    found = []
    for size, *window in zip(sizes, kernel, dilation, padding, stride, strict=True):
        taps, step, pad, apart = window
        outs = (size + 2 * pad - step * (taps - 1) - 1) // apart + 1
        found.append(Windows.regular(size, outs, taps, apart, pad, step))
    return found


def _by_tap(columns: Part, channels: int, work: _Columns) -> Part:
    """[.., C x taps, windows] as [.., C, taps, windows]."""
    return columns.split(columns.ndim - 2, channels, columns.sizes[-2] // channels)


class _Columns(PlaneWindows):
    """Windows of planes laid out side by side, or added up again."""

    @property
    def taps_each(self) -> int:
        """Taps of a window."""
        return product([max(w.taps) for w in self.windows])

    def _copy(
        self, pool: Pool, part: Part, tile: TileRef, block: Planes, first: int, count: int,
        loads: bool,
    ) -> None:  # fmt: skip
        """Rows of windows of all taps."""
        pairs = tuple(zip(part.sizes, part.strides, strict=True))
        wide, step = self.outs[1], part.strides[-1]
        n = count * wide
        walk = Walk(pairs[:-2] or ((1, 0),), (pairs[-2], (n, step)))
        window = pool[0].window(part.dtype, walk, block.count, self.taps_each * n, row=block.row,
                                offset=part.offset + first * wide * step)  # fmt: skip
        rows = block.count * self.taps_each * (1 if step == 1 else n)
        each = block.count * self.taps_each * n // rows
        copy: dict[str, Any] = {
            "rows": rows,
            "row_bytes": each * part.dtype.itemsize,
            "partitions": block.parts,
        }
        if loads:
            self.b.load(tile, window, **copy)
        else:
            self.b.store(window, tile, **copy)

    def _tap_views(self, band: Any, each: int) -> Any:
        """(offset among the columns, sources) of each tap of the windows of a band."""
        n = band.count * self.outs[1]
        for number, (_, given, _) in enumerate(self.taps(band, each)):
            yield number * n, n, given

    def unfold(self, source: Pool, x: Part, result: Pool, out: Part) -> None:
        """A copy for each tap, from the padded plane in SBUF."""
        b, size = self.b, x.dtype.itemsize
        bands = self.bands_of_results(size * self.taps_each, False)
        most = max(bands, key=lambda band: band.count)
        n_in = (most.high - most.low) * self.wide[1]
        n_out = most.count * self.outs[1] * self.taps_each
        each = self.planes_each(max(n_in, n_out))
        came = b.sbuf("plane", free_bytes=each * n_in * size, slots=2)
        goes = b.sbuf("columns", free_bytes=each * n_out * size, slots=2)
        for block in planes_of(b, self.rows, each, self.shards):
            for number, band in enumerate(bands):
                slot = block.number * len(bands) + number
                n = block.each * (band.high - band.low) * self.wide[1]
                b.memset(came[slot].view(x.dtype, (1, n)), value=0, n=n, partitions=block.parts,
                         dtype=x.dtype)  # fmt: skip
                self.load_plane(came[slot], source, x, block, band)
                for offset, n, given in self._tap_views(band, block.each):
                    to = goes[slot].view(x.dtype, (n * self.taps_each, block.each), (1, n),
                                         offset=offset)  # fmt: skip
                    b.tensor_copy(to, given.of(came[slot], x.dtype), n=n * block.each,
                                  partitions=block.parts, dtype=x.dtype)  # fmt: skip
                n = block.each * band.count * self.outs[1] * self.taps_each
                self._copy(result, out, goes[slot].view(x.dtype, (1, n)), block, band.first,
                           band.count, loads=False)  # fmt: skip

    def fold(self, source: Pool, x: Part, result: Pool, out: Part) -> None:
        """An addition for each tap, to the padded plane in SBUF."""
        b, itemsize = self.b, x.dtype.itemsize
        bands = self.bands_of_sources(itemsize * self.taps_each, 0)
        spans = []
        for band in bands:
            low, top = self.windows[0].reach(band.first, band.count) if band.count else (0, 0)
            spans.append(replace(band, low=min(low, band.low), high=max(top, band.high)))
        n_in = max(span.high - span.low for span in spans) * self.wide[1]
        n_out = max(1, *(band.count for band in bands)) * self.outs[1] * self.taps_each
        each = self.planes_each(max(n_in, n_out))
        came = b.sbuf("columns", free_bytes=each * n_out * itemsize, slots=2)
        total = b.sbuf("total", free_bytes=each * n_in * 4, slots=2)
        goes = b.sbuf("goes", free_bytes=each * n_in * itemsize)
        for block in planes_of(b, self.rows, each, self.shards):
            for number, (band, span) in enumerate(zip(bands, spans, strict=True)):
                slot = block.number * len(bands) + number
                n = block.each * (span.high - span.low) * self.wide[1]
                b.memset(total[slot], value=0.0, n=n, partitions=block.parts)
                n = block.each * band.count * self.outs[1] * self.taps_each
                if n:
                    self._copy(source, x, came[slot].view(x.dtype, (1, n)), block, band.first,
                               band.count, loads=True)  # fmt: skip
                for offset, size, given in self._tap_views(span, block.each) if n else ():
                    tap = came[slot].view(x.dtype, (size * self.taps_each, block.each), (1, size),
                                          offset=offset)  # fmt: skip
                    place = given.of(total[slot], F32)
                    b.tensor_tensor(place, place, tap, op="add", n=size * block.each,
                                    partitions=block.parts, strided=True)  # fmt: skip
                self.store_sources(total[slot], goes[0], result, out, block, band, span)


# -- gates -----------------------------------------------------------------------------------------
def _half(spec: TensorSpec, dim: int, second: bool) -> tuple[TensorSpec, int]:
    """Half of a tensor along ``dim``, and where it starts."""
    size = spec.shape[dim] // 2
    shape = (*spec.shape[:dim], size, *spec.shape[dim + 1 :])
    return TensorSpec(spec.dtype, shape, spec.strides), size * spec.strides[dim] * second


def _kernel(
    call: OpCall, core: CoreSpec, shards: int, outs: int,
    operands: list[tuple[str, TensorSpec, int]],
) -> Kernel:  # fmt: skip
    """A Kernel over tensors and halves of tensors: (name, spec, offset) of each."""
    found = grid(operands[0][1].shape, [spec for _, spec, _ in operands])
    placed = tuple(replace(o, offset=offset)
                   for o, (_, _, offset) in zip(found.operands, operands, strict=True))  # fmt: skip
    names = [name for name, _, _ in operands]
    return Kernel(core, replace(found, operands=placed), outs, shards, names)


@lowering("aten::glu")
def glu(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(self, dim): a x sigmoid(b) of the halves a and b."""
    x = call.args[0]
    dim = call.arg(1, -1) % x.ndim
    halves = [("in0", *_half(x, dim, second)) for second in (False, True)]
    kernel = _kernel(call, core, shards, 1, [("out0", call.outs[0], 0), *halves])
    a, gate = kernel.ins
    kernel.store(0, kernel.act("sigmoid", gate) * a)
    return lower_kernel(kernel, call.name)


@lowering("aten::glu_backward")
def glu_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(grad, self, dim): s = sigmoid(b); grad s, and grad a s (1 - s)."""
    grad, x = call.args[:2]
    dim = call.arg(2, -1) % x.ndim
    outs = [("out0", *_half(call.outs[0], dim, second)) for second in (False, True)]
    halves = [("in1", *_half(x, dim, second)) for second in (False, True)]
    kernel = _kernel(call, core, shards, 2, [*outs, ("in0", grad, 0), *halves])
    given, a, gate = kernel.ins
    opened = kernel.act("sigmoid", gate)
    first = given * opened
    rest = kernel.scalar2(opened, "multiply", -1.0, "add", 1.0)
    kernel.store(0, first)
    kernel.store(1, first * a * rest)
    return lower_kernel(kernel, call.name)


@lowering("aten::glu_jvp")
def glu_jvp(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(glu, x, dx, dim): s = sigmoid(b); da s + glu (1 - s) db."""
    result, x, change = call.args[:3]
    dim = call.args[3] % x.ndim
    halves = [("in1", *_half(x, dim, True))]
    halves += [("in2", *_half(change, dim, second)) for second in (False, True)]
    kernel = _kernel(call, core, shards, 1, [("out0", call.outs[0], 0), ("in0", result, 0),
                                             *halves])  # fmt: skip
    value, gate, da, db = kernel.ins
    opened = kernel.act("sigmoid", gate)
    rest = kernel.scalar2(opened, "multiply", -1.0, "add", 1.0)
    kernel.store(0, da * opened + value * rest * db)
    return lower_kernel(kernel, call.name)


host_only(
    "a forward derivative of a gradient, which nothing but double forward mode asks for",
    "aten::glu_backward_jvp",
)  # fmt: skip
