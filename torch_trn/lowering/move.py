"""Building blocks of operators that only move bytes: HBM-to-HBM runs, and filling HBM."""

from __future__ import annotations

from collections.abc import Sequence

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import TensorSpec
from torch_trn.lowering.layout import (
    PARTITIONS,
    Grid,
    broadcast_strides,
    ceil_div,
    grid,
    memory_order,
    merge,
    product,
)  # fmt: skip
from torch_trn.lowering.run import loop
from torch_trn.lowering.tile import FP32
from torch_trn.memory import Pool, TileRef
from torch_trn.program import Builder

#: Bytes of one descriptor of a long copy; longer runs are cut so that all engines share them.
COPY_ROW_BYTES = 32768

#: Descriptors of one DMA instruction at most (assumed; rings hold 2^24).
DMA_ROWS = 4096

#: Bytes per partition of a tile that is stored again and again to fill memory.
FILL_BYTES = 8192


def copy_runs(
    b: Builder, dst: Pool | TileRef, src: Pool | TileRef, nbytes: int, run_bytes: int
) -> None:
    """HBM to HBM: `nbytes` in runs of `run_bytes` (contiguous on both sides)."""
    if nbytes <= 0:
        return
    if run_bytes >= COPY_ROW_BYTES or run_bytes >= nbytes:
        # Long runs: descriptors of equal size, a multiple of the engines where there is enough.
        engines = b.core.dma_engines
        rows = ceil_div(nbytes, COPY_ROW_BYTES)
        rows = ceil_div(rows, engines) * engines if nbytes >= engines * 512 else 1
        run_bytes = ceil_div(nbytes, rows)
    else:
        rows = ceil_div(nbytes, max(run_bytes, 1))
    full, rest = divmod(rows, DMA_ROWS)
    if full:
        with loop(b, full, "d"):
            b.copy_hbm(dst, src, rows=DMA_ROWS, row_bytes=run_bytes)
    if rest:
        b.copy_hbm(dst, src, rows=rest, row_bytes=run_bytes)


def fill(b: Builder, dst: Pool, nbytes: int, value: object = 0, run_bytes: int = 0) -> None:
    """Fill `nbytes` of HBM (in runs of `run_bytes`, 0: contiguous) from one constant tile."""
    if nbytes <= 0:
        return
    width = min(FILL_BYTES, max(512, ceil_div(ceil_div(nbytes, PARTITIONS), 64) * 64))
    width = min(width, ceil_div(nbytes, 4) * 4)
    tile = b.sbuf(f"fill_{dst.name}", free_bytes=width)
    b.memset(tile, op="value" if value else "zero", n=max(1, width // 4), dtype=FP32)
    if run_bytes and run_bytes < width:
        rows = ceil_div(nbytes, run_bytes)
        per = PARTITIONS * (width // run_bytes)
        for trips, count in ((rows // per, per), (1, rows % per)):
            if trips and count:
                with loop(b, trips, "f"):
                    b.store(dst, tile, rows=count, row_bytes=run_bytes)
        return
    whole, rest = divmod(nbytes, PARTITIONS * width)
    if whole:
        with loop(b, whole, "f"):
            b.store(dst, tile, rows=PARTITIONS, row_bytes=width)
    if rest:
        rows = min(PARTITIONS, ceil_div(rest, min(width, 512)))
        b.store(dst, tile, rows=rows, row_bytes=ceil_div(rest, rows))


def run_bytes_of(shape: Sequence[int], specs: Sequence[TensorSpec]) -> int:
    """Bytes that lie next to each other in all of `specs` when walked together over `shape`."""
    strides = [broadcast_strides(spec, shape) for spec in specs]
    order = memory_order(shape, strides[0])
    dims = merge([shape[a] for a in order], [[s[a] for a in order] for s in strides])
    run = 1
    for size, steps in reversed(dims):
        if any(step != run for step in steps):
            break
        run *= size
    return run * specs[0].itemsize


def needs_turn(shape: Sequence[int], out: TensorSpec, source: TensorSpec) -> Grid | None:
    """The Grid of a copy that must transpose (its runs differ in direction), else None."""
    found = grid(shape, [out, source])
    return found if any(operand.transposed for operand in found.operands) else None


def share_bytes(nbytes: int, shards: int) -> int:
    """The largest of `shards` shares."""
    return ceil_div(nbytes, shards)


def mover(core: CoreSpec, name: str) -> Builder:
    """A Builder named after the operator."""
    return Builder(core, name.removeprefix("aten::"))


__all__ = ["copy_runs", "fill", "mover", "needs_turn", "product", "run_bytes_of", "share_bytes"]
