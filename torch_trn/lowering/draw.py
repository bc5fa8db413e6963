"""Random numbers: 32 bits of VectorE's generator for each element, shaped by a few instructions.

The values of a trn generator are those of the host's (docs/design.md); these Programs draw as many,
of the same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.errors import UnsupportedOpError
from torch_trn.isa import Engine
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.fill import named
from torch_trn.lowering.move import TileOf, inputs_of, mover, outputs_of, tiles_of
from torch_trn.lowering.part import Part
from torch_trn.lowering.registry import lowering
from torch_trn.memory import Pool, TileRef
from torch_trn.program import Builder, Program

__all__ = ["Draw"]

F32, I32, U32 = torch.float32, torch.int32, torch.uint32

#: Elements of one partition in a tile.
WIDTH = 2048

#: One of 2^24 equal parts of [0, 1): what fp32 holds exactly.
PART = 2.0**-24


@dataclass(frozen=True)
class Draw:
    """One tile of random numbers while it is made."""

    b: Builder
    tile: TileOf
    pools: tuple[Pool, ...]
    given: tuple[TileRef, ...]

    @property
    def shape(self) -> dict[str, Any]:
        """Free size and partitions of every instruction."""
        return {"n": self.tile.each * self.tile.width, "partitions": self.tile.parts}

    def scratch(self, index: int, dtype: torch.dtype = F32) -> TileRef:
        """Scratch tile ``index``."""
        return self.pools[index][self.tile.number].view(dtype, (1, self.shape["n"]))

    def uniform(self, index: int, low: float = 0.0, high: float = 1.0) -> TileRef:
        """[low, high) in scratch tile ``index``."""
        bits, to = self.scratch(index, U32), self.scratch(index)
        self.b.rng(bits, dtype=U32, **self.shape)
        self.b.tensor_scalar(to, bits, op="logical_shift_right,multiply", operands=(8, PART),
                             dtype=U32, out_dtype=F32, **self.shape)  # fmt: skip
        if (low, high) != (0.0, 1.0):
            self.b.tensor_scalar(to, to, op="multiply,add", operands=(high - low, low),
                                 **self.shape)  # fmt: skip
        return to

    def normal(self) -> TileRef:
        """Box-Muller: sqrt(-2 log u) x sin(2 pi v), u in (0, 1]."""
        u, v = self.uniform(0), self.uniform(1)
        self.b.activation(u, u, op="log", bias=PART, **self.shape)
        self.b.activation(u, u, op="sqrt", scale=-2.0, **self.shape)
        self.b.activation(v, v, op="sin", scale=2 * math.pi, bias=-math.pi, **self.shape)
        self.b.tensor_tensor(u, u, v, op="multiply", **self.shape)
        return u

    def scaled(self, x: TileRef, scale: float, bias: float) -> TileRef:
        """x = x x scale + bias."""
        self.b.tensor_scalar(x, x, op="multiply,add", operands=(scale, bias), **self.shape)
        return x


Formula = Callable[[Draw, OpCall], TileRef]


def drawn(
    formula: Formula, operands: Callable[[OpCall], list[int]] = lambda call: []
) -> Callable[[OpCall, CoreSpec, int], Program]:
    """The lowering of an operator that draws; ``operands`` are the tensors that it reads."""

    def lower(call: OpCall, core: CoreSpec, shards: int) -> Program:
        out = call.outs[0]
        b = mover(core, call.name)
        pools, (result,) = inputs_of(b, call), outputs_of(b, call)
        chosen = operands(call)
        specs = [call.tensors()[i] for i in chosen]
        parts = [Part.of(out), *(Part.of(spec).expand(out.shape) for spec in specs)]
        if not out.numel:
            return b.build()
        scratch = tuple(b.sbuf(name, free_bytes=4 * WIDTH, slots=2) for name in ("a", "b"))
        final = b.sbuf("result", free_bytes=8 * WIDTH, slots=2)
        held = [b.sbuf(f"given{i}", free_bytes=8 * WIDTH, slots=2) for i in chosen]
        for tile in tiles_of(b, parts, WIDTH, shards):
            n = tile.each * tile.width
            for number, (i, spec) in enumerate(zip(chosen, specs, strict=True)):
                window = pools[i][0].window(spec.dtype, tile.walks[1 + number], tile.rows,
                                            tile.width, row=tile.row)  # fmt: skip
                b.load(held[number][tile.number].view(spec.dtype, (1, n)), window, rows=tile.rows,
                       row_bytes=tile.width * spec.itemsize, partitions=tile.parts)  # fmt: skip
            given = tuple(
                pool[tile.number].view(spec.dtype, (1, n))
                for pool, spec in zip(held, specs, strict=True)
            )
            draw = Draw(b, tile, scratch, given)
            made = formula(draw, call)
            to = final[tile.number].view(out.dtype, (1, n))
            b.tensor_copy(to, made, dtype=F32, out_dtype=out.dtype, **draw.shape)
            window = result[0].window(out.dtype, tile.walk, tile.rows, tile.width, row=tile.row)
            b.store(window, to, rows=tile.rows, row_bytes=tile.width * out.itemsize,
                    partitions=tile.parts)  # fmt: skip
        return b.build()

    return lower


def _uniform(draw: Draw, call: OpCall) -> TileRef:
    given = named(call)
    low, high = given.get("from", given.get("low", 0.0)), given.get("to", given.get("high", 1.0))
    if "uniform" not in call.name:
        low, high = 0.0, 1.0
    return draw.uniform(0, low, high)


def _exponential(draw: Draw, call: OpCall) -> TileRef:
    u = draw.uniform(0)
    draw.b.activation(u, u, op="log", bias=PART, **draw.shape)
    return draw.scaled(u, -1.0 / named(call)["lambd"], 0.0)


def _geometric(draw: Draw, call: OpCall) -> TileRef:
    """ceil(log u / log(1 - p)), at least 1: the whole part of that, and 1."""
    u, p = draw.uniform(0), named(call)["p"]
    draw.b.activation(u, u, op="log", bias=PART, **draw.shape)
    whole = draw.scratch(1, I32)
    scale = 1.0 / math.log1p(-p) if p < 1 else 0.0
    draw.b.tensor_scalar(whole, u, op="multiply,add", operands=(scale, 1.0), dtype=F32,
                         out_dtype=I32, **draw.shape)  # fmt: skip
    draw.b.tensor_copy(u, whole, dtype=I32, out_dtype=F32, **draw.shape)
    return u


def _cauchy(draw: Draw, call: OpCall) -> TileRef:
    """median + sigma tan(pi (u - 1/2)) = median - sigma cos(pi u) / sin(pi u)."""
    given = named(call)
    u, sine = draw.uniform(0, PART / 2, 1.0), draw.scratch(1)
    draw.b.activation(sine, u, op="sin", scale=math.pi, **draw.shape)
    draw.b.reciprocal(sine, sine, **draw.shape)
    draw.b.activation(u, u, op="sin", scale=-math.pi, bias=math.pi / 2, **draw.shape)
    draw.b.tensor_tensor(u, u, sine, op="multiply", **draw.shape)
    return draw.scaled(u, -given["sigma"], given["median"])


def _log_normal(draw: Draw, call: OpCall) -> TileRef:
    given, x = named(call), draw.normal()
    draw.b.activation(x, x, op="exp", scale=given["std"], bias=given["mean"], **draw.shape)
    return x


def _normal(draw: Draw, call: OpCall) -> TileRef:
    given, x = named(call), draw.normal()
    mean, std = given.get("mean", 0.0), given.get("std", 1.0)
    tiles = iter(draw.given)
    means = next(tiles) if isinstance(mean, TensorSpec) else None
    if isinstance(std, TensorSpec):
        draw.b.tensor_tensor(x, x, next(tiles), op="multiply", **draw.shape)
        std = 1.0
    x = draw.scaled(x, std, 0.0 if means is not None else mean)
    if means is not None:
        draw.b.tensor_tensor(x, x, means, op="add", **draw.shape)
    return x


def _normal_operands(call: OpCall) -> list[int]:
    given = named(call)
    names = [name for name in ("mean", "std") if isinstance(given.get(name), TensorSpec)]
    return list(range(len(names)))


lowering("aten::uniform", "aten::rand", "aten::rand_like", "aten::_philox_uniform")(drawn(_uniform))
lowering("aten::exponential")(drawn(_exponential))
lowering("aten::geometric")(drawn(_geometric))
lowering("aten::cauchy")(drawn(_cauchy))
lowering("aten::log_normal")(drawn(_log_normal))
lowering("aten::normal", "aten::randn", "aten::randn_like", "aten::_philox_normal")(
    drawn(_normal, _normal_operands)
)


# -- integers and events ---------------------------------------------------------------------------
#: Largest number (exclusive) that random_ draws without bounds, by dtype: what the dtype holds.
_RANDOM = {
    torch.float32: 1 << 24, torch.bfloat16: 1 << 8, torch.float16: 1 << 11, torch.bool: 2,
    torch.uint8: 1 << 8, torch.int8: 1 << 7, torch.int16: 1 << 15,
}  # fmt: skip


def _integers(draw: Draw, call: OpCall) -> TileRef:
    """Whole numbers of [low, high): 24 random bits, or 31 where the range is wider."""
    given, dtype = named(call), call.outs[0].dtype
    low = given.get("low", given.get("from", 0)) or 0
    high = given.get("high", given.get("to"))
    if isinstance(high, TensorSpec):
        raise UnsupportedOpError(call.name, "the range is a tensor: pass numbers")
    if high is None:
        high = low + _RANDOM.get(dtype, (1 << 31) - 1)
    span, whole = high - low, draw.scratch(0, I32)
    if span <= 1 << 24:
        u = draw.uniform(0)
        draw.b.tensor_scalar(whole, u, op="multiply", operands=(float(span),), dtype=F32,
                             out_dtype=I32, **draw.shape)  # fmt: skip
    else:
        # 31 bits are fewer than a range of 63: high numbers then do not occur.
        bits = draw.scratch(0, U32)
        draw.b.rng(bits, dtype=U32, **draw.shape)
        shift = max(1, 32 - min(31, span.bit_length() - 1))
        draw.b.tensor_scalar(whole, bits, op="logical_shift_right", operands=(shift,), dtype=U32,
                             out_dtype=I32, **draw.shape)  # fmt: skip
    if not low:
        return whole
    if -(1 << 24) <= low and high <= 1 << 24:
        draw.b.tensor_scalar(whole, whole, op="add", operands=(low,), dtype=I32, **draw.shape)
    elif -(1 << 31) <= low and high <= 1 << 31:
        draw.b.tensor_scalar(whole, whole, op="add", operands=(low,), dtype=I32,
                             engine=Engine.GPSIMD, **draw.shape)  # fmt: skip
    else:
        raise UnsupportedOpError(call.name, "engines count in 32 bits: draw a smaller range")
    return whole


lowering("aten::random", "aten::randint", "aten::randint_like")(drawn(_integers))


def _bernoulli(draw: Draw, call: OpCall) -> TileRef:
    """1 where a random number is below p: a number, a tensor argument, or the input itself."""
    u = draw.uniform(0)
    if draw.given:
        draw.b.tensor_tensor(u, u, draw.given[0], op="is_lt", **draw.shape)
    else:
        p: Any = named(call).get("p", 0.5)
        draw.b.tensor_scalar(u, u, op="is_lt", operands=(float(p),), **draw.shape)
    return u


def _bernoulli_operands(call: OpCall) -> list[int]:
    p = named(call).get("p")
    if isinstance(p, TensorSpec):
        return [1]
    return [] if isinstance(p, float) else [0]


lowering("aten::bernoulli")(drawn(_bernoulli, _bernoulli_operands))
