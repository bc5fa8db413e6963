"""NKIBench's elementwise kernels, silu and rope, and what its kernels here have in common.

Source: the baseline kernels of NKIBench (in zhang677/AccelOpt); all in fp32.

Transposes are hoisted as often as the printed hardware flops say. An instruction whose engine the
source leaves open (a copy out of PSUM, a tensor_scalar) is left open here: the issue pass takes
ScalarE or VectorE, whichever can start it first.

Chosen by looking, for all of them alike: what a loop reduces (``loop_reduce``) is gathered in
columns and reduced once; tiles are two deep where SBUF has the room; instructions keep the order in
which they are written here, which decides much of the time of gqa_full, where no engine is near its
limit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_trn.chip import CoreSpec
from torch_trn.isa import Engine
from torch_trn.memory import TileRef
from torch_trn.program import Builder, Program

TILE = 128
WIDE = 512
FP32 = torch.float32
BANK_BYTES = 2048
OPEN = (Engine.SCALAR, Engine.VECTOR)


def silu(core: CoreSpec, *, m: int, n: int) -> Program:
    """x / (1 + exp(-x)) of m x n numbers, 128 x 1024 at a time, in halves of 512."""
    b = Builder(core, f"silu {m}x{n}")
    source, target = b.hbm("x", nbytes=4 * m * n), b.hbm("y", nbytes=4 * m * n)
    x = b.sbuf("x_tile", free_bytes=8 * WIDE, slots=2)
    y = b.sbuf("y_tile", free_bytes=8 * WIDE, slots=2)
    work = b.sbuf("sigmoid", free_bytes=4 * WIDE, slots=2)
    with b.repeat(m // TILE * (n // (2 * WIDE)), "i") as i:
        b.load(x[i], source, rows=TILE, row_bytes=8 * WIDE)
        with b.repeat(2, "half") as half:
            at = work[i * 2 + half]
            sigmoid(b, at, x[i])
            b.tensor_tensor(y[i], x[i], at, op="multiply", n=WIDE)
        b.store(target, y[i], rows=TILE, row_bytes=8 * WIDE)
    return b.build()


def rope(core: CoreSpec, *, width: int, rows: int) -> Program:
    """Rotary embedding of [width, rows], halves of the width on separate partitions.

    Six tensor_tensor of half the partitions; a copy brings the lower half to the upper partitions.
    """
    half = width // 2
    b = Builder(core, f"rope {width}x{rows}")
    source, target = b.hbm("x", nbytes=4 * width * rows), b.hbm("y", nbytes=4 * width * rows)
    table = b.hbm("cos and sin", nbytes=4 * width * rows)
    x, cos, sin, odd, y = (
        b.sbuf(name, free_bytes=4 * WIDE, slots=2)
        for name in ("x_in", "cos", "sin", "odd", "x_out")
    )
    terms = [
        b.sbuf(name, free_bytes=4 * WIDE, slots=2)
        for name in ("even_cos", "odd_cos", "even_sin", "odd_sin")
    ]
    with b.repeat(rows // WIDE, "i") as i:
        b.load(x[i], source, rows=width, row_bytes=4 * WIDE)
        b.load(cos[i], table, rows=half, row_bytes=4 * WIDE)
        b.load(sin[i], table, rows=half, row_bytes=4 * WIDE)
        copy_out(b, odd[i], x[i], n=WIDE, partitions=half)
        even_cos, odd_cos, even_sin, odd_sin = (term[i] for term in terms)
        for dst, value, factor, op in (
            (even_cos, x[i], cos[i], "multiply"),
            (odd_cos, odd[i], cos[i], "multiply"),
            (even_sin, x[i], sin[i], "multiply"),
            (odd_sin, odd[i], sin[i], "multiply"),
            (y[i], even_cos, odd_sin, "subtract"),
            (y[i], odd_cos, even_sin, "add"),
        ):
            b.tensor_tensor(dst, value, factor, op=op, n=WIDE, partitions=half)
        b.store(target, y[i], rows=width, row_bytes=4 * WIDE)
    return b.build()


def sigmoid(b: Builder, dst: TileRef, src: TileRef) -> None:
    """dst = 1 / (1 + exp(-src)), 512 wide, as the compiler writes it."""
    b.activation(dst, src, op="exp", n=WIDE)
    scalar_op(b, dst, [dst], op="add", n=WIDE)
    b.reciprocal(dst, dst, n=WIDE)


def scalar_op(b: Builder, dst: TileRef, src: Sequence[TileRef], *, op: str, n: int) -> None:
    """A tensor_scalar whose engine the source leaves open."""
    with b.any_engine():
        for engine in OPEN:
            b.tensor_scalar(dst, src, op=op, n=n, engine=engine)


def copy_out(b: Builder, dst: TileRef, src: TileRef, *, n: int, partitions: int = TILE) -> None:
    """A copy whose engine the source leaves open."""
    with b.any_engine():
        for engine in OPEN:
            b.tensor_copy(dst, src, n=n, partitions=partitions, engine=engine)


def turn(b: Builder, dst: TileRef, bank: TileRef, src: TileRef, *, n: int = TILE) -> None:
    """dst [n, 128] = src [128, n] transposed: on TensorE into a bank of PSUM, then copied."""
    b.nc_transpose(bank, src, partitions=TILE, n=n, dtype=FP32)
    copy_out(b, dst, bank, n=TILE, partitions=n)


def matmul(
    b: Builder, bank: TileRef, left: TileRef, right: TileRef, *, n: int, k: int = TILE
) -> None:
    """bank [128, n] += left [k, 128] transposed x right [k, n]."""
    b.nc_matmul(bank, stationary=left, moving=right, k=k, m=TILE, n=n, dtype=FP32, accumulate=True)
