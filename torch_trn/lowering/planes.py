"""Operators on image planes: pooling, resampling, and their gradients.

A plane (one channel of one image) lies in one partition, several small ones share it. Each pass is
one instruction over the plane's output (or input) elements, reading the plane through strided
views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.layout import PARTITIONS, ceil_div, product
from torch_trn.lowering.move import mover
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import loop, spread_over
from torch_trn.memory import TileRef
from torch_trn.program import Program

#: Elements of one partition in a tile.
TILE = 4096


@dataclass(frozen=True)
class Pass:
    """`times` instructions of `kind` over the elements of input (or output) `on` of a tile.

    kind: "tensor" (tensor_tensor), "stt", "scalar", "copy", "select", "reduce", "zero".
    on: index of the tensor (inputs first, then outputs) whose elements it covers.
    """

    kind: str
    times: int = 1
    op: str = "add"
    on: int = -1


def run_length(spec: TensorSpec, plane: int) -> int:
    """Elements of a plane that lie next to each other (1 for channels-last)."""
    run = 1
    for size, step in zip(reversed(spec.shape), reversed(spec.strides), strict=True):
        if run >= plane or (size > 1 and step != run):
            break
        run *= size
    return max(1, min(run, plane))


def planes(
    call: OpCall, core: CoreSpec, shards: int, rows: int, ins: Sequence[TensorSpec],
    outs: Sequence[TensorSpec], passes: Sequence[Pass],
) -> Program:  # fmt: skip
    """Each tensor has `rows` planes; a tile takes a piece of some planes of every tensor."""
    b = mover(core, call.name)
    specs = [*ins, *outs]
    names = [f"in{i}" for i in range(len(ins))] + [f"out{i}" for i in range(len(outs))]
    pools = [b.hbm(name, nbytes=spec.nbytes) for name, spec in zip(names, specs, strict=True)]
    if not rows or not all(spec.numel for spec in outs):
        return b.build()
    sizes = [max(1, ceil_div(spec.numel, rows)) for spec in specs]
    rows = ceil_div(rows, shards) if rows >= shards else rows
    widest = max(sizes)
    cuts = ceil_div(widest, TILE)
    group = max(1, min(TILE // widest, ceil_div(rows, PARTITIONS)))
    widths = [group * ceil_div(size, cuts) for size in sizes]
    tiles = [
        b.sbuf(f"{name}_tile", free_bytes=width * spec.itemsize, slots=2)
        for name, width, spec in zip(names, widths, specs, strict=True)
    ]
    work = b.sbuf("work", free_bytes=max(widths) * 4, slots=2)
    for first, trips, parts in _row_tiles(rows, group):
        with loop(b, trips, "r") as r, loop(b, cuts, "c") as c:
            at = (r + first) * cuts + c
            refs = [tile[at] for tile in tiles]
            for index, spec in enumerate(ins):
                run = max(1, min(run_length(spec, sizes[index]), widths[index]))
                count = ceil_div(widths[index], run)
                b.load(refs[index], pools[index], rows=parts * count,
                       row_bytes=ceil_div(widths[index], count) * spec.itemsize,
                       partitions=spread_over(parts, parts * count))  # fmt: skip
            for step in passes:
                _emit(b, step, refs, work[at], specs, widths, parts, len(ins))
            for index in range(len(ins), len(specs)):
                spec = specs[index]
                run = max(1, min(run_length(spec, sizes[index]), widths[index]))
                count = ceil_div(widths[index], run)
                b.store(pools[index], refs[index], rows=parts * count,
                        row_bytes=ceil_div(widths[index], count) * spec.itemsize,
                        partitions=spread_over(parts, parts * count))  # fmt: skip
    return b.build()


def _row_tiles(rows: int, group: int) -> list[tuple[int, int, int]]:
    full, rest = divmod(rows, PARTITIONS * group)
    found = [(0, full, PARTITIONS)] if full else []
    return found + ([(full, 1, ceil_div(rest, group))] if rest else [])


def _emit(
    b: Any, step: Pass, refs: Sequence[TileRef], work: TileRef, specs: Sequence[TensorSpec],
    widths: Sequence[int], parts: int, ins: int,
) -> None:  # fmt: skip
    """The instructions of one pass."""
    on = step.on % len(specs)
    target = refs[on] if on >= ins else work
    spec = specs[on]
    # Engines compute in fp32 whatever the tile's dtype; int64 indices count as int32.
    dtype = spec.dtype if spec.dtype.itemsize <= 4 else torch.int32
    given: dict[str, Any] = {"n": widths[on], "partitions": parts, "dtype": dtype}
    source = refs[0] if ins else work
    with loop(b, step.times, "tap"):
        if step.kind == "tensor":
            b.tensor_tensor(target, target, source, op=step.op, strided=True, **given)
        elif step.kind == "stt":
            b.scalar_tensor_tensor(target, source, target, op=f"multiply,{step.op}", **given)
        elif step.kind == "scalar":
            b.tensor_scalar(target, target, op=step.op, **given)
        elif step.kind == "copy":
            b.tensor_copy(target, source, **given)
        elif step.kind == "select":
            b.select(target, work, source, target, **given)
        elif step.kind == "reduce":
            b.tensor_reduce(target, source, op=step.op, **given)
        else:
            b.memset(target, **given)


def spatial(spec: TensorSpec, dims: int) -> int:
    """Elements of the last `dims` dims."""
    return product(spec.shape[-dims:]) if dims else 1


def row_count(spec: TensorSpec, dims: int) -> int:
    """Planes of a tensor whose last `dims` dims are spatial."""
    return product(spec.shape[:-dims])


def taps_of(sizes: Any, dims: int) -> int:
    """Elements of a kernel given as a number or a tuple."""
    if isinstance(sizes, int):
        return sizes**dims
    return product(sizes) ** (dims if len(sizes) == 1 else 1)


def _dims(name: str) -> int:
    return next((n for n in (1, 2, 3) if f"{n}d" in name), 2)


@lowering("aten::im2col", "aten::col2im")
def im2col(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Taps as shifted rows: copies for im2col, sums for col2im."""
    x, out = call.args[0], call.outs[0]
    rows = x.shape[0] if x.ndim > 2 else 1
    window = call.args[1] if "im2col" in call.name else call.args[2]
    channels = (x if "im2col" in call.name else out).shape[-3]
    kind = [Pass("copy", on=1)] if "im2col" in call.name else [
        Pass("zero", on=1), Pass("stt", 1, on=0)]  # fmt: skip
    assert taps_of(window, 2)
    return planes(call, core, shards, rows * channels, [x], [out], kind)


@lowering("aten::glu", "aten::glu_backward", "aten::glu_jvp", "aten::glu_backward_jvp")
def glu(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """a * sigmoid(b) of two halves: an activation and a product (two more backward)."""
    tensors = [a for a in call.args if isinstance(a, TensorSpec)]
    out = call.outs[0]
    rows = 1
    for size in out.shape[:-1]:
        rows *= size
    times = 3 if "backward" in call.name else 1
    passes = [Pass("copy", on=len(tensors)), Pass("stt", times, "multiply", on=len(tensors))]
    return planes(call, core, shards, rows, tensors, [out], passes)


@lowering("aten::grid_sampler_2d", "aten::grid_sampler_3d", "aten::grid_sampler_2d_backward",
          "aten::grid_sampler_3d_backward", "aten::affine_grid_generator")  # fmt: skip
def grid_sampler(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Corner weights from the grid, then a weighted sum of the corners (and its gradient)."""
    tensors = [a for a in call.args if isinstance(a, TensorSpec)]
    corners = 8 if "3d" in call.name else 4
    times = corners * (3 if "backward" in call.name else 1)
    rows = product(tensors[0].shape[:2]) if tensors[0].ndim > 2 else 1
    passes = [Pass("copy", on=len(tensors)), Pass("stt", times, on=len(tensors))]
    return planes(call, core, shards, max(rows, 1), tensors, call.outs, passes)
