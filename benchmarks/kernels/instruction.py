"""Runs of one instruction, as the instruction rows measured them."""

from __future__ import annotations

import torch

from torch_trn.chip import CoreSpec
from torch_trn.program import Builder, Program

TILE = 128
WIDE = 512


def chain(core: CoreSpec, *, n: int, count: int) -> Program:
    """``count`` activations of ``n`` elements, each of what the one before wrote."""
    b = Builder(core, f"chain of {count} activations, {n} wide")
    tile = b.sbuf("tile", free_bytes=4 * n)
    with b.repeat(count, "i"):
        b.activation(tile, tile, op="copy", n=n)
    return b.build()


def matmuls(core: CoreSpec, *, count: int, dtype: torch.dtype) -> Program:
    """``count`` matmuls of 128 x 128 x 512, sixteen to a result, with new weights each."""
    b = Builder(core, f"{count} matmuls")
    left = b.sbuf("stationary", free_bytes=TILE * dtype.itemsize, slots=2)
    right = b.sbuf("moving", free_bytes=WIDE * dtype.itemsize)
    acc = b.psum("acc", free_bytes=4 * WIDE, slots=2)
    with b.repeat(count // 16, "i") as i, b.repeat(16, "k") as k:
        b.nc_matmul(
            acc[i], stationary=left[k], moving=right, k=TILE, m=TILE, n=WIDE, dtype=dtype,
            accumulate=True,
        )  # fmt: skip
    return b.build()


def descriptors(core: CoreSpec, *, count: int, nbytes: int) -> Program:
    """``count`` descriptors of ``nbytes`` from HBM, one after another."""
    b = Builder(core, f"{count} descriptors of {nbytes} B")
    source = b.hbm("x", nbytes=count * nbytes)
    tile = b.sbuf("tile", free_bytes=nbytes, slots=16)
    with b.repeat(count, "i") as i:
        b.load(tile[i], source, rows=1, row_bytes=nbytes)
    return b.build()
