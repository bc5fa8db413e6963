"""HBM streams: read, write and copy loops of 128-partition tiles, in bf16.

Described in the measurements (rows O001-O049), their source is not public. A read tile is summed by
VectorE, which the description names.

Chosen by looking: 16 tiles in flight, or as many as fit; two
tiles of 512 KiB do not hide the 1.3 us start of a DMA, and the rows that name a prefetch distance
show that it makes no difference.
"""

from __future__ import annotations

import torch

from torch_trn.chip import CoreSpec
from torch_trn.program import Builder, Program

BF16 = torch.bfloat16
PARTITIONS = 128


def read(core: CoreSpec, *, nbytes: int, free: int, square: bool = False) -> Program:
    """Tiles of 128 x ``free`` to SBUF, each summed; ``square`` multiplies it by itself first.

    Sums are kept in fp32, so the reduction runs at N and not in its bf16 mode.
    """
    b = Builder(core, f"read {nbytes} B, {free} wide")
    source, total = b.hbm("x", nbytes=nbytes), b.hbm("total", nbytes=4 * PARTITIONS)
    squared = b.sbuf("squared", free_bytes=2 * free, slots=2) if square else None
    sums = b.sbuf("sums", free_bytes=4, slots=2)
    deep = min(16, b.sbuf_room_bytes // (2 * free))
    tile = b.sbuf("tile", free_bytes=2 * free, slots=deep)
    with b.repeat(nbytes // (2 * PARTITIONS * free), "i") as i:
        b.load(tile[i], source, rows=PARTITIONS, row_bytes=2 * free)
        summed = tile[i]
        if squared is not None:
            b.tensor_tensor(squared[i], tile[i], tile[i], op="multiply", n=free, dtype=BF16)
            summed = squared[i]
        b.tensor_reduce(sums[i], summed, op="add", n=free, dtype=BF16, out_dtype=torch.float32)
    b.store(total, sums, rows=PARTITIONS, row_bytes=4)
    return b.build()


def write(core: CoreSpec, *, nbytes: int, free: int) -> Program:
    """One tile of 128 x ``free``, stored again and again."""
    b = Builder(core, f"write {nbytes} B, {free} wide")
    target = b.hbm("y", nbytes=nbytes)
    tile = b.sbuf("tile", free_bytes=2 * free)
    b.memset(tile, n=free, dtype=BF16)
    with b.repeat(nbytes // (2 * PARTITIONS * free), "i"):
        b.store(target, tile, rows=PARTITIONS, row_bytes=2 * free)
    return b.build()


def copy(core: CoreSpec, *, nbytes: int, free: int) -> Program:
    """HBM to HBM in pieces of 128 x ``free``; ``nbytes`` are read and as many written."""
    b = Builder(core, f"copy {nbytes} B, {free} wide")
    source, target = b.hbm("x", nbytes=nbytes), b.hbm("y", nbytes=nbytes)
    with b.repeat(nbytes // (2 * PARTITIONS * free), "i"):
        b.copy_hbm(target, source, rows=PARTITIONS, row_bytes=2 * free)
    return b.build()
