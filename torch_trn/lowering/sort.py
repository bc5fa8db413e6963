"""Order: topk, sort, median and their kin, by rounds of max8 on VectorE.

A round finds the eight largest of each row (max8), their positions (nc_find_index8) and takes them
out (nc_match_replace8). Long full sorts merge: a bitonic network of compare-and-select passes,
which needs log2(n) (log2(n) + 1) / 2 of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.layout import PARTITIONS, ceil_div, product
from torch_trn.lowering.move import mover
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import loop, spread_over
from torch_trn.lowering.tile import FP32
from torch_trn.memory import TileRef
from torch_trn.program import Builder, Program

#: Values that one max8 gives.
EIGHT = 8


def _rounds_cost(n: int, k: int) -> int:
    return 3 * ceil_div(k, EIGHT) * (n + 160)


def _network(n: int) -> int:
    """Compare-exchange passes of a bitonic sort of n."""
    steps = max(1, math.ceil(math.log2(max(n, 2))))
    return steps * (steps + 1) // 2


def order(
    call: OpCall, core: CoreSpec, shards: int, x: TensorSpec, dim: int, k: int,
    outs: tuple[TensorSpec, ...],
) -> Program:  # fmt: skip
    """The k largest (or smallest) of each row along `dim`, with their positions."""
    b = mover(core, call.name)
    n = x.shape[dim] if x.ndim else 1
    source = b.hbm("in0", nbytes=x.nbytes)
    results = [b.hbm(f"out{i}", nbytes=out.nbytes) for i, out in enumerate(outs)]
    rows = ceil_div(product(x.shape) // max(n, 1), shards)
    if not rows or not n or not k:
        return b.build()
    size = x.itemsize
    inner = x.strides[dim] == 1 if x.ndim else True
    limit = (b.sbuf_room_bytes - 4096) // (2 * size + 16)
    width = min(n, limit, 65536)
    pieces = ceil_div(n, width)
    tile = b.sbuf("row", free_bytes=width * size, slots=2)
    work = b.sbuf("work", free_bytes=width * 4, slots=1)
    spots = b.sbuf("positions", free_bytes=width * 8, slots=1)
    eight = b.sbuf("eight", free_bytes=4 * EIGHT, slots=2)
    for first, trips, parts in _row_tiles(rows):
        with loop(b, trips, "r") as r, loop(b, pieces, "c") as c:
            row = tile[(r + first) * pieces + c]
            count = 1 if inner else width
            b.load(row, source, rows=parts * count, row_bytes=ceil_div(width, count) * size,
                   partitions=spread_over(parts, parts * count))  # fmt: skip
            kept = min(k, width)
            if _rounds_cost(width, kept) <= 6 * _network(width) * width:
                _rounds(b, row, work[0], spots[0], eight[0], width, kept, parts, x.dtype)
            else:
                _bitonic(b, row, work[0], spots[0], width, parts, x.dtype)
            for index, out in enumerate(outs):
                place = row if index == 0 else spots[0]
                bytes_ = ceil_div(kept if pieces == 1 else k, 1 if pieces == 1 else pieces)
                runs = 1 if inner else max(bytes_, 1)
                b.store(results[index], place, rows=parts * runs,
                        row_bytes=min(_tile_bytes(place), ceil_div(bytes_ * out.itemsize, runs)),
                        partitions=spread_over(parts, parts * runs))  # fmt: skip
    return b.build()


def _tile_bytes(ref: TileRef) -> int:
    return ref.pool.nbytes


def _row_tiles(rows: int) -> list[tuple[int, int, int]]:
    full, rest = divmod(rows, PARTITIONS)
    found = [(0, full, PARTITIONS)] if full else []
    return found + ([(full, 1, rest)] if rest else [])


def _rounds(
    b: Builder, row: TileRef, work: TileRef, spots: TileRef, eight: TileRef, n: int, k: int,
    parts: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    given: dict[str, Any] = {"n": n, "partitions": parts, "dtype": _engine_dtype(dtype)}
    with loop(b, ceil_div(k, EIGHT), "eight"):
        b.max8(eight, row, **given)
        b.nc_find_index8(eight, row, eight, **given)
        b.nc_match_replace8(row, row, eight, **given)
    kept = min(k, n)
    b.tensor_copy(work, row, n=kept, partitions=parts, dtype=_engine_dtype(dtype))
    b.tensor_copy(spots, eight, n=kept, partitions=parts, dtype=torch.int32)


def _engine_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize <= 4 else torch.int32


def _bitonic(
    b: Builder, row: TileRef, work: TileRef, spots: TileRef, n: int, parts: int, dtype: torch.dtype
) -> None:
    """Each pass: compare partners, then select values and positions."""
    given: dict[str, Any] = {"n": n, "partitions": parts}
    b.iota(spots, **given, dtype=torch.int32)
    with loop(b, _network(n), "pass"):
        b.tensor_tensor(work, row, row, op="is_gt", dtype=_engine_dtype(dtype), out_dtype=FP32,
                        **given)  # fmt: skip
        b.select(row, work, row, row, dtype=_engine_dtype(dtype), **given)
        b.select(spots, work, spots, spots, dtype=torch.int32, **given)


def _dim(x: TensorSpec, dim: Any) -> int:
    return dim % x.ndim if isinstance(dim, int) and x.ndim else max(x.ndim - 1, 0)


@lowering("aten::topk")
def topk(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(self, k, dim, largest, sorted)."""
    x, k = call.args[:2]
    return order(call, core, shards, x, _dim(x, call.arg(2, -1)), k, call.outs)


@lowering("aten::sort", "aten::argsort", "aten::msort")
def sort(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(self, dim, descending) or, stable, (self, stable, dim, descending)."""
    x = call.args[0]
    numbers = [a for a in call.args[1:] if isinstance(a, int) and not isinstance(a, bool)]
    dim = _dim(x, numbers[0] if numbers else -1)
    return order(call, core, shards, x, dim, x.shape[dim] if x.ndim else 1, call.outs)


@lowering("aten::kthvalue", "aten::median", "aten::nanmedian", "aten::mode")
def kth_value(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """One order statistic: rounds until it is out."""
    x = call.args[0]
    numbers = [a for a in call.args[1:] if isinstance(a, int) and not isinstance(a, bool)]
    if "kthvalue" in call.name:
        k, dim = numbers[0], _dim(x, numbers[1] if len(numbers) > 1 else -1)
    else:
        if not numbers:
            x = TensorSpec.contiguous(x.dtype, x.numel)
        dim = _dim(x, numbers[0] if numbers else 0)
        k = (x.shape[dim] + 1) // 2 if x.ndim else 1
    small = tuple(TensorSpec.contiguous(out.dtype, *out.shape) for out in call.outs)
    return order(call, core, shards, x, dim, max(1, min(k, EIGHT)) if k < EIGHT else k, small)


@lowering("aten::searchsorted", "aten::bucketize")
def searchsorted(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Binary search: log2(boundaries) gathers and comparisons for each value."""
    first = call.args[0]
    swapped = call.name.startswith("aten::bucketize")
    edges, values = (call.args[1], first) if swapped else (first, call.args[1])
    numel = values.numel if isinstance(values, TensorSpec) else 1
    b = mover(core, call.name)
    table, out = b.hbm("boundaries", nbytes=edges.nbytes), b.hbm("out0", nbytes=call.outs[0].nbytes)
    if not numel:
        return b.build()
    bounds = min(max(edges.shape[-1] if edges.ndim else 1, 1), 8192)
    steps = max(1, math.ceil(math.log2(bounds + 1)))
    held = b.sbuf("boundaries", free_bytes=bounds * edges.itemsize)
    b.load(held, table, rows=PARTITIONS, row_bytes=bounds * edges.itemsize)
    source = b.hbm("values", nbytes=values.nbytes) if isinstance(values, TensorSpec) else None
    share = ceil_div(numel, shards)
    width = max(1, min(512, ceil_div(share, PARTITIONS)))
    value = b.sbuf("value", free_bytes=width * 8, slots=2)
    spot = b.sbuf("spot", free_bytes=width * 8, slots=2)
    picked = b.sbuf("picked", free_bytes=width * 8)
    for trips, rows in ((share // (PARTITIONS * width), PARTITIONS),
                        (1, ceil_div(share % (PARTITIONS * width), width))):  # fmt: skip
        if not trips or not rows:
            continue
        with loop(b, trips, "r") as r:
            if source is not None and isinstance(values, TensorSpec):
                b.load(value[r], source, rows=rows, row_bytes=width * values.itemsize)
            with loop(b, steps, "step"):
                b.local_gather(picked, held, spot[r], n=width, partitions=rows)
                b.tensor_tensor(picked, picked, value[r], op="is_lt", n=width, partitions=rows)
                b.scalar_tensor_tensor(spot[r], picked, spot[r], op="multiply,add", n=width,
                                       partitions=rows)  # fmt: skip
            b.store(out, spot[r], rows=rows, row_bytes=width * call.outs[0].itemsize)
    return b.build()
