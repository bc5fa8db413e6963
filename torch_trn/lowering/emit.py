"""Turns the steps of a Tile into instructions of a Builder, one method per step kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_trn.isa import Engine
from torch_trn.lowering.extent import Extent, Refs, dims_of, elsewhere, retyped
from torch_trn.lowering.fold import FoldSteps
from torch_trn.lowering.tile import COMPARISONS, FP32, MIRROR, Scalar, Step, Value
from torch_trn.memory import TileRef, affine
from torch_trn.program import Builder

#: Operators that GpSimdE computes exactly with integers (isa/alu.py).
_WHOLE = COMPARISONS | {
    "add",
    "subtract",
    "reverse_subtract",
    "multiply",
    "max",
    "min",
    "mod",
    "abs_max",
    "pow",
}


class Emitter(FoldSteps):
    """Writes steps into `b`; `refs` gives the tile a value lives in at the current loop indices.

    `scratch(name)` gives tiles for what a step needs beside its values.
    """

    def __init__(self, b: Builder, scratch: Callable[[str], TileRef]) -> None:
        self.b = b
        self._scratch = scratch

    def scratch(self, name: str) -> TileRef:
        """A tile for what a step needs beside its values."""
        return self._scratch(name)

    def step(self, step: Step, refs: Refs, extent: Extent) -> None:
        """Emit the instructions of one step."""
        getattr(self, f"_{step.kind}")(step, refs, extent)

    # -- operands ------------------------------------------------------------------------------
    def at(
        self, value: Value, refs: Refs, kind: str, extent: Extent, dtype: torch.dtype
    ) -> TileRef:
        """`value` read (or written) as a `kind` by an instruction whose default is `dtype`."""
        dims = dims_of(value, kind, extent)
        start = extent.start * extent.reals * value.stride
        offset = value.place + (start if value.kind in ("full", "row") else 0)
        count = math.prod(size for _, size in dims)
        plain = len(dims) == 1 and (dims[0][0] == 1 or count == 1) and not offset
        if plain and value.dtype == dtype:
            return refs(value)
        if count == 1:
            dims = ((1, 1),)
        return refs(value).view(value.dtype, *dims, offset=offset)

    def small(self, value: Value, refs: Refs, extent: Extent) -> TileRef:
        """`value` as a per-partition scalar."""
        return self.at(value, refs, "one", extent, FP32)

    def _common(self, step: Step, extent: Extent, ins: Sequence[Value]) -> dict[str, Any]:
        out = step.outs[0]
        source = _widest([v.dtype for v in ins]) if ins else out.dtype
        given: dict[str, Any] = {
            "n": extent.free(out.kind), "dtype": source, "partitions": extent.parts
        }  # fmt: skip
        if out.dtype != source:
            given["out_dtype"] = out.dtype
        return given

    def _out(self, step: Step, refs: Refs, extent: Extent, given: dict[str, Any]) -> TileRef:
        out = step.outs[0]
        return self.at(out, refs, out.kind, extent, given.get("out_dtype") or given["dtype"])

    def _streams(
        self, values: Sequence[Value], step: Step, refs: Refs, extent: Extent, given: dict[str, Any]
    ) -> list[TileRef]:
        kind = step.outs[0].kind
        return [self.at(v, refs, kind, extent, given["dtype"]) for v in values]

    def _scalar_like(self, value: Value, kind: str, extent: Extent) -> bool:
        """Whether `value` is one number for each partition beside streams of `kind`."""
        if value.kind == "one":
            return kind != "one"
        return value.kind == "col" and kind == "full" and extent.group == 1

    # -- arithmetic ----------------------------------------------------------------------------
    def _act(self, step: Step, refs: Refs, extent: Extent) -> None:
        x, *tiles = step.ins
        out = step.outs[0]
        if not all(self._free(v, out.kind, extent) for v in tiles):
            # Scale and bias belong to a partition; several rows in one take passes of their own.
            self._in_passes(step, refs, extent, ("multiply", "add"), 1.0, 0.0)
            return
        given = self._common(step, extent, [x])
        srcs = [*self._streams([x], step, refs, extent, given),
                *(self.small(v, refs, extent) for v in tiles)]  # fmt: skip
        scale, bias = step.operands or (1.0, 0.0)
        self.b.activation(
            self._out(step, refs, extent, given), srcs, op=step.op, scale=scale, bias=bias, **given
        )

    def _free(self, value: Value, kind: str, extent: Extent) -> bool:
        """Whether an instruction takes `value` as its scalar operand."""
        return (
            self._scalar_like(value, kind, extent)
            or value.kind == kind == "one"
            or (value.kind == kind == "col" and extent.group == 1)
        )

    def _in_passes(
        self, step: Step, refs: Refs, extent: Extent, ops: Sequence[str], *neutral: float
    ) -> None:
        """`function(x op0 a op1 b)` with a tensor_tensor for each operand that is a tile."""
        x, out, tiles = step.ins[0], step.outs[0], iter(step.ins[1:])
        function = step.op if step.kind == "act" else "copy"
        stages: list[tuple[str, Value | Scalar]] = []
        for number, value in enumerate(step.operands):
            source = next(tiles) if value is None else value
            if value is None or not neutral or value != neutral[number]:
                stages.append((ops[number], source))
        last = len(stages) - (function in ("copy", "identity"))
        wide = retyped(out, FP32)
        for number, (op, source) in enumerate(stages):
            target, place = (out, refs) if number == last else (wide, self._wide(out, refs))
            stage: Step
            if isinstance(source, Value):
                stage = Step("tensor", op, (x, source), (target,))
                self._tensor(stage, elsewhere(refs, self._wide(out, refs), wide), extent)
            else:
                stage = Step("scalar", op, (x,), (target,), (source,))
                self._scalar(stage, elsewhere(refs, self._wide(out, refs), wide), extent)
            x = target
        if last == len(stages):
            final = Step("act", function, (x,), (out,), (1.0, 0.0))
            self._act(final, elsewhere(refs, self._wide(out, refs), wide), extent)

    def _wide(self, out: Value, refs: Refs) -> Refs:
        """Where fp32 results wait: in the result's own tile, if that is wide enough."""
        wide = out.dtype.itemsize >= 4
        return (lambda _: refs(out)) if wide else (lambda _: self.scratch("wide"))

    def _scalar(self, step: Step, refs: Refs, extent: Extent) -> None:
        x, *tiles = step.ins
        out = step.outs[0]
        ops = step.op.split(",")
        if not all(self._free(v, out.kind, extent) for v in tiles):
            self._in_passes(step, refs, extent, ops)
            return
        given = self._common(step, extent, [x])
        given |= self._engine(ops, [x, *tiles], step.operands, out)
        srcs = [*self._streams([x], step, refs, extent, given),
                *(self.small(v, refs, extent) for v in tiles)]  # fmt: skip
        self.b.tensor_scalar(
            self._out(step, refs, extent, given), srcs, op=step.op, operands=step.operands, **given
        )

    def _engine(
        self, ops: Sequence[str], ins: Sequence[Value], numbers: Sequence[Scalar | None], out: Value
    ) -> dict[str, Any]:
        """GpSimdE where whole numbers must stay exact."""
        whole = all(v.is_integer or v.dtype == torch.bool for v in ins)
        whole = whole and any(v.is_integer for v in ins) and set(ops) <= _WHOLE
        if whole and not any(isinstance(n, float) for n in numbers):
            return {"engine": Engine.GPSIMD}
        return {}

    def _tensor(self, step: Step, refs: Refs, extent: Extent) -> None:
        x, y = step.ins
        out = step.outs[0]
        if self._scalar_like(y, out.kind, extent) and not self._scalar_like(x, out.kind, extent):
            self._scalar(Step("scalar", step.op, (x, y), (out,), (None,)), refs, extent)
            return
        mirrored = MIRROR.get(step.op)
        if mirrored and self._scalar_like(x, out.kind, extent) and x.kind != y.kind:
            self._scalar(Step("scalar", mirrored, (y, x), (out,), (None,)), refs, extent)
            return
        given = self._common(step, extent, [x, y])
        given |= self._engine([step.op], [x, y], (), out)
        srcs = self._streams([x, y], step, refs, extent, given)
        self.b.tensor_tensor(self._out(step, refs, extent, given), *srcs, op=step.op, **given)

    def _stt(self, step: Step, refs: Refs, extent: Extent) -> None:
        x, y, *tiles = step.ins
        out = step.outs[0]
        first, second = step.op.split(",")
        if not all(self._free(v, out.kind, extent) for v in tiles):
            wide = Value(out.tile, out.kind, FP32)
            kept = refs(out) == refs(y) and y.kind == "full"
            where = (lambda _: self.scratch("wide")) if kept else self._wide(out, refs)
            places = elsewhere(refs, where, wide)
            self._tensor(Step("tensor", first, (x, tiles[0]), (wide,)), places, extent)
            self._tensor(Step("tensor", second, (wide, y), (out,)), places, extent)
            return
        if self._scalar_like(y, out.kind, extent) and x.kind == out.kind:
            scalar = Step("scalar", step.op, (x, *tiles, y), (out,), (*step.operands, None))
            self._scalar(scalar, refs, extent)
            return
        given = self._common(step, extent, [x, y])
        left, right = self._streams([x, y], step, refs, extent, given)
        self.b.scalar_tensor_tensor(
            self._out(step, refs, extent, given),
            [left, *(self.small(v, refs, extent) for v in tiles)],
            right, op=step.op, scalar=step.operands[0], **given,
        )  # fmt: skip

    def _reciprocal(self, step: Step, refs: Refs, extent: Extent) -> None:
        given = self._common(step, extent, step.ins)
        (source,) = self._streams(step.ins, step, refs, extent, given)
        self.b.reciprocal(self._out(step, refs, extent, given), source, **given)

    def _copy(self, step: Step, refs: Refs, extent: Extent) -> None:
        given = self._common(step, extent, step.ins)
        (source,) = self._streams(step.ins, step, refs, extent, given)
        self.b.tensor_copy(self._out(step, refs, extent, given), source, **given)

    def _custom(self, step: Step, refs: Refs, extent: Extent) -> None:
        given = self._common(step, extent, step.ins)
        sources = self._streams(step.ins, step, refs, extent, given)
        self.b.custom_op(
            self._out(step, refs, extent, given), sources, op=step.op,
            cycles_each=step.cycles_each,
            operands=[number for number in step.operands if number is not None], **given,
        )  # fmt: skip

    def _select(self, step: Step, refs: Refs, extent: Extent) -> None:
        mask, *data = step.ins
        given = self._common(step, extent, data)
        tiles = iter(self._streams(data, step, refs, extent, given))
        n = given["n"]
        sides = []
        for value in step.operands:
            if value is None:
                sides.append(next(tiles))
            else:
                held = self.scratch(constant_name(value, step))
                sides.append(held.view(constant_dtype(value, step), (0 if n > 1 else 1, n)))
        predicate = self.at(mask, refs, step.outs[0].kind, extent, given["dtype"])
        self.b.select(self._out(step, refs, extent, given), predicate, *sides, **given)

    # -- made from nothing ---------------------------------------------------------------------
    def _memset(self, step: Step, refs: Refs, extent: Extent) -> None:
        given = self._common(step, extent, ())
        (value,) = step.operands
        assert value is not None
        self.b.memset(self._out(step, refs, extent, given), value=value, **given)

    def _index(self, step: Step, kind: str, extent: Extent) -> dict[str, Any]:
        """The index of an iota or affine_select: affine in partition, row and column."""
        base, row, col = step.index
        steps = {
            "full": ((row, extent.group), (col, extent.width)), "row": ((col, extent.width),),
            "col": ((row, extent.group),), "one": ((0, 1),),
        }[kind]  # fmt: skip
        at_row, at_col, row_step, col_step = extent.place
        first = affine(at_row) * row + (affine(at_col) + extent.start) * col + base
        moves = kind in ("full", "col")
        return {"base": first, "channel": row * row_step * moves + col * col_step, "steps": steps}

    def _iota(self, step: Step, refs: Refs, extent: Extent) -> None:
        given = self._common(step, extent, ())
        target = self._out(step, refs, extent, given)
        self.b.iota(target, **given, **self._index(step, step.outs[0].kind, extent))

    def _affine(self, step: Step, refs: Refs, extent: Extent) -> None:
        given = self._common(step, extent, step.ins)
        (source,) = self._streams(step.ins, step, refs, extent, given)
        (fill,) = step.operands
        assert fill is not None
        self.b.affine_select(self._out(step, refs, extent, given), source, op=step.op, fill=fill,
                             **given, **self._index(step, "full", extent))  # fmt: skip

    def _random(self, step: Step, refs: Refs, extent: Extent) -> None:
        out = step.outs[0]
        n = extent.free(out.kind)
        given: dict[str, Any] = {"n": n, "partitions": extent.parts}
        bits = refs(out).view(torch.uint32, (1, n))
        self.b.rng(bits, dtype=torch.uint32, **given)
        if out.dtype.is_floating_point:
            # Scaled to [0, 1): the largest words would round up to 1.
            self.b.tensor_scalar(
                refs(out), bits, op="multiply,min", operands=(2.0**-32, 1.0 - 2.0**-24),
                dtype=torch.uint32, out_dtype=out.dtype, **given,
            )  # fmt: skip


def constant_dtype(value: Scalar, step: Step) -> torch.dtype:
    """What a number of a select is held in."""
    whole = isinstance(value, int) and step.outs[0].is_integer
    return torch.int64 if whole else FP32


def constant_name(value: Scalar, step: Step) -> str:
    """The scratch tile that holds a number of a select."""
    short = str(constant_dtype(value, step)).removeprefix("torch.")
    return f"constant {value} {short}"


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return max(dtypes, key=lambda dtype: (dtype.itemsize, dtype.is_floating_point))
