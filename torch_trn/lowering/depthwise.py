"""Depthwise convolution: a channel of an image in each partition, VectorE goes through the taps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.run import loop, spread_over
from torch_trn.lowering.tile import FP32
from torch_trn.memory import Pool
from torch_trn.program import Builder

if TYPE_CHECKING:
    from torch_trn.lowering.conv import Conv

#: Output elements of one channel in a tile.
CHUNK = 2048


def depthwise(b: Builder, c: Conv, x: Pool, w: Pool, out: Pool, bias: Pool | None) -> None:
    """acc = tap x input + acc, a scalar_tensor_tensor per tap (the taps are per-partition scalars).

    Rows are images x channels; `m` output channels per input channel repeat the passes.
    """
    rows, size = c.images * c.groups, c.dtype.itemsize
    if not rows or not c.pixels:
        return
    chunk = min(CHUNK, max(c.pixels, c.written))
    chunks = ceil_div(max(c.pixels, c.written), chunk)
    read = ceil_div(c.read, chunks) + 64
    tile = b.sbuf("input", free_bytes=read * size, slots=2)
    taps = b.sbuf("taps", free_bytes=c.taps * c.m * size, slots=2)
    acc = b.sbuf("acc", free_bytes=chunk * 4, slots=2)
    result = b.sbuf("result", free_bytes=chunk * c.out_dtype.itemsize, slots=2)
    offset = b.sbuf("bias", free_bytes=4, slots=2) if bias is not None else None
    full, rest = divmod(rows, PARTITIONS)
    passes = ceil_div(chunk * c.pixels, max(c.written, c.pixels, 1))
    for first, trips, parts in ((0, full, PARTITIONS), (full, 1, rest)):
        if not trips or not parts:
            continue
        with loop(b, trips, "r") as r:
            row = r + first
            b.load(taps[row], w, rows=parts, row_bytes=c.taps * c.m * size)
            if bias is not None and offset is not None:
                b.load(offset[row], bias, rows=parts, row_bytes=size)
            with loop(b, chunks, "c") as p:
                at = row * chunks + p
                amount = ceil_div(c.read, chunks)
                pieces = ceil_div(amount, max(1, min(c.in_run, amount)))
                b.load(tile[at], x, rows=parts * pieces,
                       row_bytes=ceil_div(amount, pieces) * size,
                       partitions=spread_over(parts, parts * pieces))  # fmt: skip
                for _output in range(c.m):
                    b.tensor_scalar(acc[at], [tile[at], taps[row]], op="multiply", n=passes,
                                    partitions=parts, dtype=c.dtype,
                                    out_dtype=None if c.dtype == FP32 else FP32)  # fmt: skip
                    if c.taps > 1:
                        with loop(b, c.taps - 1, "tap"):
                            b.scalar_tensor_tensor(
                                acc[at],
                                [tile[at], taps[row]],
                                acc[at],
                                op="multiply,add",
                                n=passes,
                                partitions=parts,
                            )
                    sources = acc[at] if offset is None else [acc[at], offset[row]]
                    b.activation(
                        result[at],
                        sources,
                        op="identity",
                        n=chunk,
                        partitions=parts,
                        out_dtype=None if c.out_dtype == FP32 else c.out_dtype,
                    )
                    run = max(1, min(c.out_run, chunk))
                    b.store(
                        out,
                        result[at],
                        rows=parts * ceil_div(chunk, run),
                        row_bytes=ceil_div(chunk, ceil_div(chunk, run)) * c.out_dtype.itemsize,
                        partitions=spread_over(parts, parts * ceil_div(chunk, run)),
                    )
