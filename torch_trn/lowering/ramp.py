"""Results that are a function of the place alone: arange, linspace, windows, index pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.errors import UnsupportedOpError
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.fill import named
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.move import blocks, mover, outputs_of
from torch_trn.lowering.registry import lowering
from torch_trn.memory import Index, Pool, TileRef, Walk
from torch_trn.program import Builder, Program

__all__: list[str] = []

F32, I32 = torch.float32, torch.int32

#: Elements of one partition in a tile.
WIDTH = 2048

#: Cycles of GpSimdE for one element of a Bessel function (assumed).
BESSEL_CYCLES = 64


@dataclass(frozen=True)
class Ramp:
    """One tile of a line of ``n`` elements while it is made: places and room for results."""

    b: Builder
    width: int
    parts: int
    first: Index
    pools: tuple[Pool, ...]
    number: Index

    def tile(self, index: int, dtype: torch.dtype = F32) -> TileRef:
        """Scratch tile ``index``."""
        return self.pools[index][self.number].view(dtype, (1, self.width))

    @property
    def shape(self) -> dict[str, Any]:
        """Free size and partitions of every instruction."""
        return {"n": self.width, "partitions": self.parts}

    def places(self, to: TileRef, start: int = 0, step: int = 1, dtype: torch.dtype = I32) -> None:
        """to = start + step x place, in integers."""
        self.b.iota(to, dtype=dtype, base=self.first * step + start, channel=step * self.width,
                    steps=((step, self.width),), **self.shape)  # fmt: skip

    def line(self, to: TileRef, scale: float, bias: float, start: int = 0) -> None:
        """to = (place + start) x scale + bias, in fp32."""
        whole = self.tile(2, I32)
        self.places(whole, start)
        self.b.tensor_scalar(to, whole, op="multiply,add", operands=(scale, bias), dtype=I32,
                             out_dtype=F32, **self.shape)  # fmt: skip


Formula = Callable[[Ramp, TileRef, OpCall], None]
"""Writes a tile of the result (fp32, or integers as they are)."""


def ramp(formula: Formula) -> Callable[[OpCall, CoreSpec, int], Program]:
    """The lowering of a line whose elements ``formula`` makes from their places."""

    def lower(call: OpCall, core: CoreSpec, shards: int) -> Program:
        out = call.outs[0]
        b = mover(core, call.name)
        (result,) = outputs_of(b, call)
        n = out.numel
        if not n:
            return b.build()
        width = max(1, min(WIDTH, ceil_div(n, PARTITIONS)))
        pools = tuple(b.sbuf(name, free_bytes=8 * width, slots=2) for name in ("a", "b", "c"))
        final = b.sbuf("result", free_bytes=8 * width, slots=2)
        step = out.strides[0] if out.ndim else 1
        rows = ceil_div(n, width)
        walk = Walk(((1, 0),), ((n, step),), rows, width)
        for block in blocks(b, rows, PARTITIONS, shards):
            tile = Ramp(b, width, block.count, block.row * width, pools, block.number)
            made = final[block.number].view(out.dtype, (1, width))
            formula(tile, made, call)
            window = result[0].window(out.dtype, walk, block.count, width, row=block.row)
            runs = block.count if step == 1 else block.count * width
            b.store(window, made, rows=runs, row_bytes=block.count * width // runs * out.itemsize,
                    partitions=block.count)  # fmt: skip
        return b.build()

    return lower


def _number(call: OpCall, name: str, value: Any) -> Any:
    if isinstance(value, TensorSpec):
        raise UnsupportedOpError(call.name, f"{name} is a tensor: pass a number")
    return value


def _arange(tile: Ramp, to: TileRef, call: OpCall) -> None:
    given = named(call)
    start, step = given.get("start", 0), given.get("step", 1)
    dtype = call.outs[0].dtype
    if all(isinstance(value, int) for value in (start, step)) and not dtype.is_floating_point:
        tile.places(to, start, step, dtype)
        return
    line = tile.tile(0)
    tile.line(line, float(step), float(start))
    tile.b.tensor_copy(to, line, dtype=F32, out_dtype=dtype, **tile.shape)


lowering("aten::arange", "aten::range")(ramp(_arange))


def _spaced(tile: Ramp, call: OpCall) -> TileRef:
    """From both ends, so that the first and the last element are exact."""
    given = named(call)
    start, end = (_number(call, name, given[name]) for name in ("start", "end"))
    steps = given["steps"]
    step = (end - start) / (steps - 1) if steps > 1 else 0.0
    low, high, mask = tile.tile(0), tile.tile(1), tile.tile(2, I32)
    tile.line(low, step, float(start))
    tile.line(high, step, float(end), 1 - steps)
    tile.places(mask)
    tile.b.tensor_scalar(mask, mask, op="is_lt", operands=(max(1, steps // 2),), dtype=I32,
                         **tile.shape)  # fmt: skip
    tile.b.tensor_copy_predicated(high, low, mask, dtype=F32, **tile.shape)
    return high


def _linspace(tile: Ramp, to: TileRef, call: OpCall) -> None:
    line, dtype = _spaced(tile, call), call.outs[0].dtype
    if not dtype.is_floating_point:
        # ATen computes these in double; what fp32 left just below a whole number is one.
        tile.b.tensor_scalar(line, line, op="multiply", operands=(1 + 2.0**-21,), **tile.shape)
    tile.b.tensor_copy(to, line, dtype=F32, out_dtype=dtype, **tile.shape)


def _logspace(tile: Ramp, to: TileRef, call: OpCall) -> None:
    line, base = _spaced(tile, call), named(call)["base"]
    tile.b.activation(to, line, op="exp", scale=math.log(base), dtype=F32,
                      out_dtype=call.outs[0].dtype, **tile.shape)  # fmt: skip


lowering("aten::linspace")(ramp(_linspace))
lowering("aten::logspace")(ramp(_logspace))


def _frequencies(tile: Ramp, to: TileRef, call: OpCall) -> None:
    """place / (n d), for fftfreq with the second half counted from the end."""
    given = named(call)
    n, scale = given["n"], 1.0 / (given["n"] * given["d"])
    low, high, mask = tile.tile(0), tile.tile(1), tile.tile(2, I32)
    tile.line(low, scale, 0.0)
    if "rfft" not in call.name:
        tile.line(high, scale, 0.0, -n)
        tile.places(mask)
        tile.b.tensor_scalar(mask, mask, op="is_ge", operands=((n + 1) // 2,), dtype=I32,
                             **tile.shape)  # fmt: skip
        tile.b.tensor_copy_predicated(low, high, mask, dtype=F32, **tile.shape)
    tile.b.tensor_copy(to, low, dtype=F32, out_dtype=call.outs[0].dtype, **tile.shape)


lowering("aten::fft_fftfreq", "aten::fft_rfftfreq")(ramp(_frequencies))


# -- windows ---------------------------------------------------------------------------------------
def _last(call: OpCall) -> int:
    """Steps of a window from its first element to where it would repeat (or end)."""
    given = named(call)
    periodic = given.get("periodic", True)
    return max(given["window_length"] - (0 if periodic else 1), 1)


def _cosines(tile: Ramp, to: TileRef, call: OpCall) -> None:
    """A sum of cosines of the place."""
    given, turn = named(call), 2 * math.pi / _last(call)
    if "hamming" in call.name:
        terms = [given.get("alpha", 0.54), -given.get("beta", 0.46)]
    else:
        terms = [0.42, -0.5, 0.08] if "blackman" in call.name else [0.5, -0.5]
    if given["window_length"] == 1:
        terms = [1.0]
    line, wave = tile.tile(0), tile.tile(1)
    tile.b.memset(line, value=terms[0], **tile.shape)
    for number, factor in enumerate(terms[1:], 1):
        # The angle within (-pi, pi]: a cosine is even, and sin's range on ScalarE is that.
        tile.line(wave, number * turn, math.pi / 2)
        tile.b.tensor_scalar(wave, wave, op="add,mod", operands=(math.pi, 2 * math.pi),
                             **tile.shape)  # fmt: skip
        tile.b.activation(wave, wave, op="sin", bias=-math.pi, **tile.shape)
        tile.b.scalar_tensor_tensor(line, wave, line, op="multiply,add", scalar=factor,
                                    **tile.shape)  # fmt: skip
    tile.b.tensor_copy(to, line, dtype=F32, out_dtype=call.outs[0].dtype, **tile.shape)


def _triangle(tile: Ramp, to: TileRef, call: OpCall) -> None:
    """1 - |2 place / last - 1|."""
    line = tile.tile(0)
    tile.line(line, 2.0 / _last(call), -1.0)
    if named(call)["window_length"] == 1:
        tile.b.memset(line, value=0.0, **tile.shape)
    tile.b.activation(line, line, op="abs", **tile.shape)
    tile.b.tensor_scalar(to, line, op="multiply,add", operands=(-1.0, 1.0), dtype=F32,
                         out_dtype=call.outs[0].dtype, **tile.shape)  # fmt: skip


def _kaiser(tile: Ramp, to: TileRef, call: OpCall) -> None:
    """i0(beta sqrt(1 - t t)) / i0(beta) with t from -1 to 1."""
    beta = float(named(call).get("beta", 12.0))
    line, root = tile.tile(0), tile.tile(1)
    tile.line(line, 2.0 / _last(call), -1.0)
    if named(call)["window_length"] == 1:
        tile.b.memset(line, value=0.0, **tile.shape)
    tile.b.tensor_tensor(root, line, line, op="multiply", **tile.shape)
    tile.b.tensor_scalar(root, root, op="multiply,add", operands=(-1.0, 1.0), **tile.shape)
    tile.b.tensor_scalar(root, root, op="max", operands=(0.0,), **tile.shape)
    tile.b.activation(root, root, op="sqrt", scale=beta * beta, **tile.shape)
    tile.b.custom_op(line, [root], op="i0", cycles_each=BESSEL_CYCLES, **tile.shape)
    scale = 1.0 / float(torch.special.i0(torch.tensor(beta, dtype=torch.float64)))
    tile.b.tensor_scalar(to, line, op="multiply", operands=(scale,), dtype=F32,
                         out_dtype=call.outs[0].dtype, **tile.shape)  # fmt: skip


lowering("aten::hann_window", "aten::hamming_window", "aten::blackman_window")(ramp(_cosines))
lowering("aten::bartlett_window")(ramp(_triangle))
lowering("aten::kaiser_window")(ramp(_kaiser))


# -- index pairs -----------------------------------------------------------------------------------
#: Pairs that a tile holds.
PAIRS = 4096


@lowering("aten::tril_indices", "aten::triu_indices")
def triangle_indices(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Rows and columns of a triangle: a constant and a ramp for each row, by one core."""
    rows, cols, offset = call.args[:3]
    out = call.outs[0]
    b = mover(core, call.name)
    (result,) = outputs_of(b, call)
    if not out.numel:
        return b.build()
    pairs = b.sbuf("pairs", free_bytes=2 * PAIRS * out.itemsize, slots=2)
    lower = "tril" in call.name
    filled = done = number = 0

    def flush() -> None:
        nonlocal filled, done, number
        for half in range(2):
            for block in blocks(b, 1, 1, shards, lead=1):
                walk = Walk(((1, 0),), ((done + filled, out.strides[1]),))
                window = result[0].window(
                    out.dtype, walk, 1, filled, row=block.row, col=done,
                    offset=half * out.strides[0])  # fmt: skip
                tile = pairs[number].view(out.dtype, (1, filled), offset=half * PAIRS)
                b.store(window, tile, rows=1, row_bytes=filled * out.itemsize)
        filled, done, number = 0, done + filled, number + 1

    for row in range(rows):
        first = 0 if lower else min(max(row + offset, 0), cols)
        last = min(max(row + offset + 1, 0), cols) if lower else cols
        while first < last:
            count = min(last - first, PAIRS - filled)
            tile = pairs[number]
            b.memset(tile.view(out.dtype, (1, count), offset=filled), value=row, n=count,
                     partitions=1, dtype=out.dtype)  # fmt: skip
            b.iota(tile.view(out.dtype, (1, count), offset=PAIRS + filled), base=first, n=count,
                   partitions=1, dtype=out.dtype)  # fmt: skip
            first, filled = first + count, filled + count
            if filled == PAIRS:
                flush()
    if filled:
        flush()
    return b.build()
