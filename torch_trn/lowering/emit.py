"""Turns the steps of a Tile into instructions of a Builder, one method per step kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from torch_trn.lowering.layout import ceil_div
from torch_trn.lowering.tile import FP32, Step, Value
from torch_trn.memory import TileRef
from torch_trn.program import Builder

#: bn_stats takes at most this many elements and leaves this many results (hardware.md 2.2; isa).
BN_STATS_MAX = 512
BN_STATS_RESULTS = 6

#: Elements that one engine instruction may cover (arch2: 64K per partition).
MAX_FREE = 65536


@dataclass
class Extent:
    """Size of the tile being emitted: partitions, rows in each, columns, reals per element."""

    parts: int
    group: int
    width: int
    reals: int = 1

    def free(self, kind: str) -> int:
        """Free size of a value of `kind`, in elements."""
        if kind == "full":
            return self.group * self.width * self.reals
        if kind == "row":
            return self.width * self.reals
        return self.group if kind == "col" else 1


Refs = Callable[[Value], TileRef]


class Emitter:
    """Writes steps into `b`; `refs` gives the tile a value lives in at the current loop indices."""

    def __init__(self, b: Builder, scratch: Callable[[str], TileRef]) -> None:
        self.b = b
        self.scratch = scratch

    def step(self, step: Step, refs: Refs, extent: Extent) -> None:
        """Emit the instructions of one step."""
        getattr(self, f"_{step.kind}")(step, refs, extent)

    def _common(self, step: Step, extent: Extent) -> dict[str, Any]:
        out = step.outs[0]
        n = extent.free(out.kind)
        source = _widest([v.dtype for v in step.ins]) if step.ins else out.dtype
        given: dict[str, Any] = {"n": n, "dtype": source, "partitions": extent.parts}
        if out.dtype != source:
            given["out_dtype"] = out.dtype
        return given

    def _act(self, step: Step, refs: Refs, extent: Extent) -> None:
        x, out = step.ins[0], step.outs[0]
        given = self._common(step, extent)
        srcs = [refs(v) for v in step.ins]
        if x.kind == "full" and extent.group > 1 and any(v.kind == "col" for v in step.ins[1:]):
            # A bias belongs to a partition; with several rows in one it takes a pass of its own.
            self.b.tensor_tensor(refs(out), srcs[0], srcs[1:], op="add", **given)
            srcs = [refs(out)]
        self.b.activation(refs(out), srcs, op=step.op, **given)

    def _act_reduce(self, step: Step, refs: Refs, extent: Extent) -> None:
        full, total = step.outs
        if extent.group > 1:
            self._act(Step("act", step.op, step.ins, (full,)), refs, extent)
            self._reduce(Step("reduce", "add", (full,), (total,)), refs, extent)
            return
        given = self._common(step, extent)
        srcs = [refs(v) for v in step.ins]
        self.b.activation(refs(full), srcs, op=step.op, reduce=refs(total), **given)

    def _scalar(self, step: Step, refs: Refs, extent: Extent) -> None:
        given = self._common(step, extent)
        srcs = [refs(v) for v in step.ins]
        self.b.tensor_scalar(refs(step.outs[0]), srcs, op=step.op, **given)

    def _tensor(self, step: Step, refs: Refs, extent: Extent) -> None:
        x, y = step.ins
        given = self._common(step, extent)
        srcs = [refs(x), refs(y)]
        per_partition = {x.kind, y.kind} & {"col", "one"} and x.kind != y.kind
        one = "one" in (x.kind, y.kind)
        if per_partition and (one or extent.group == 1):
            self.b.tensor_scalar(refs(step.outs[0]), srcs, op=step.op, **given)
        else:
            self.b.tensor_tensor(refs(step.outs[0]), *srcs, op=step.op, **given)

    def _stt(self, step: Step, refs: Refs, extent: Extent) -> None:
        given = self._common(step, extent)
        srcs = [refs(v) for v in step.ins]
        kinds = {v.kind for v in step.ins[:2]}
        if len(kinds) > 1 and kinds & {"col", "one"} and extent.group == 1:
            self.b.tensor_scalar(refs(step.outs[0]), srcs, op=step.op, **given)
        else:
            self.b.scalar_tensor_tensor(
                refs(step.outs[0]), [srcs[0], *srcs[2:]], srcs[1], op=step.op, **given
            )

    def _reciprocal(self, step: Step, refs: Refs, extent: Extent) -> None:
        self.b.reciprocal(refs(step.outs[0]), refs(step.ins[0]), **self._common(step, extent))

    def _copy(self, step: Step, refs: Refs, extent: Extent) -> None:
        self.b.tensor_copy(refs(step.outs[0]), refs(step.ins[0]), **self._common(step, extent))

    def _select(self, step: Step, refs: Refs, extent: Extent) -> None:
        given = self._common(step, extent)
        data = [v.dtype for v in step.ins[1:]] or [step.outs[0].dtype]
        given["dtype"] = _widest(data)
        constants = (self.scratch(f"constant {value}") for value in step.consts)
        tiles = iter([refs(v) for v in step.ins[1:]])
        sides = [next(tiles if tensor else constants) for tensor in step.sides]
        self.b.select(refs(step.outs[0]), refs(step.ins[0]), *sides, **given)

    def _reduce(self, step: Step, refs: Refs, extent: Extent) -> None:
        x, out = step.ins[0], step.outs[0]
        given = self._common(step, extent)
        given["n"] = extent.free(x.kind)
        self.b.tensor_reduce(refs(out), refs(x), op=step.op, out_n=extent.group, **given)

    def _stats(self, step: Step, refs: Refs, extent: Extent) -> None:
        x, (mean, var) = step.ins[0], step.outs
        if extent.group > 1:
            self._grouped_stats(x, mean, var, refs, extent)
            return
        n, done = extent.width, 0
        partial = self.scratch("stats")
        given: dict[str, Any] = {"partitions": extent.parts, "dtype": x.dtype}
        while done < n:
            size = min(BN_STATS_MAX, n - done)
            self.b.bn_stats(partial, refs(x), n=size, **given)
            done += size
        count = BN_STATS_RESULTS * ceil_div(n, BN_STATS_MAX)
        self.b.bn_aggr(refs(mean), partial, n=count, partitions=extent.parts)

    def _grouped_stats(self, x: Value, mean: Value, var: Value, refs: Refs, extent: Extent) -> None:
        """Several short rows in a partition: sums of x and x*x for all of them at once."""
        n, rows = extent.free("full"), extent.group
        given: dict[str, Any] = {"partitions": extent.parts}
        square = self.scratch("square")
        widened = None if x.dtype == FP32 else FP32
        self.b.tensor_reduce(refs(mean), refs(x), op="add", n=n, out_n=rows, dtype=x.dtype,
                             out_dtype=widened, **given)  # fmt: skip
        self.b.activation(square, refs(x), op="square", n=n, dtype=x.dtype, out_dtype=widened,
                          **given)  # fmt: skip
        self.b.tensor_reduce(refs(var), square, op="add", n=n, out_n=rows, **given)
        self.b.tensor_scalar(refs(mean), refs(mean), op="multiply", n=rows, **given)
        self.b.scalar_tensor_tensor(
            refs(var), refs(var), refs(mean), op="multiply,subtract", n=rows, **given
        )

    def _fold_groups(self, step: Step, refs: Refs, extent: Extent) -> None:
        """Sum a col value over groups of partitions: a matmul by a block-diagonal matrix."""
        across = self.scratch("across")
        self.b.nc_matmul(
            across, stationary=self.scratch("ones"), moving=refs(step.ins[0]), k=extent.parts,
            m=extent.parts, n=extent.group, dtype=FP32,
        )  # fmt: skip
        self.b.tensor_copy(refs(step.outs[0]), across, n=extent.group, partitions=extent.parts)

    def _scan(self, step: Step, refs: Refs, extent: Extent) -> None:
        given = self._common(step, extent)
        given["n"] = extent.width
        for _row in range(extent.group):
            x = refs(step.ins[0])
            self.b.tensor_tensor_scan(refs(step.outs[0]), x, x, op=step.op, **given)

    def _memset(self, step: Step, refs: Refs, extent: Extent) -> None:
        given = self._common(step, extent)
        op = "zero" if not step.consts[0] else "value"
        self.b.memset(refs(step.outs[0]), op=op, **given)

    def _iota(self, step: Step, refs: Refs, extent: Extent) -> None:
        self.b.iota(refs(step.outs[0]), **self._common(step, extent))

    def _affine(self, step: Step, refs: Refs, extent: Extent) -> None:
        given = self._common(step, extent)
        self.b.affine_select(refs(step.outs[0]), refs(step.ins[0]), op=step.op, **given)

    def _random(self, step: Step, refs: Refs, extent: Extent) -> None:
        out = step.outs[0]
        given: dict[str, Any] = {"n": extent.free(out.kind), "partitions": extent.parts}
        self.b.rng(refs(out), dtype=torch.uint32, **given)
        if out.dtype.is_floating_point:
            # 24 of the 32 bits, scaled to [0, 1).
            self.b.tensor_scalar(
                refs(out), refs(out), op="logical_shift_right,multiply", dtype=torch.uint32,
                out_dtype=out.dtype, **given,
            )  # fmt: skip


def _widest(dtypes: list[torch.dtype]) -> torch.dtype:
    return max(dtypes, key=lambda dtype: (dtype.itemsize, dtype.is_floating_point))
