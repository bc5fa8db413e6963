"""A tuned GEMM whose loads are several 128-column tiles wide, as the pantheon rows describe it.

Its source is not public; the rows say that a row of an lhs load has ``coalesce`` x 256 bytes and
how wide the moving operand is; evictions go to VectorE and ScalarE in turn.

Chosen by looking: a left panel of ``coalesce`` x 128 result rows
stays in SBUF for its whole k (as many of its k tiles as fit; the others are loaded again for each
column tile), the right operand streams past it, and each of the ``coalesce`` result tiles has an
accumulator of its own in PSUM. Rows that name no width have 8, as K157 and K161.
"""

from __future__ import annotations

import torch

from torch_trn.chip import CoreSpec
from torch_trn.memory import Index, Pool, TileRef
from torch_trn.program import Builder, Program

TILE = 128
BF16 = torch.bfloat16


def coalesced(
    core: CoreSpec, *, m: int, k: int, n: int, coalesce: int, moving: int,
    dtype: torch.dtype = BF16,
) -> Program:  # fmt: skip
    """m x n bf16 results, ``coalesce`` x 128 rows and ``moving`` columns at a time."""
    b = Builder(core, f"coalesced x{coalesce} gemm {m}x{k}x{n}, {moving} moving")
    size, steps, columns = dtype.itemsize, k // TILE, n // moving
    lhs, rhs = b.hbm("lhsT", nbytes=size * k * m), b.hbm("rhs", nbytes=size * k * n)
    out = b.hbm("result", nbytes=2 * m * n)
    share = -(-coalesce // core.psum_banks)  # Accumulators that lie in one bank.
    sets = core.psum_banks * share // coalesce
    acc = b.psum("acc", free_bytes=4 * moving * share, slots=sets * coalesce // share)
    result = b.sbuf("result_tile", free_bytes=2 * moving, slots=2 * coalesce)
    stream = b.sbuf("rhs_tile", free_bytes=size * moving, slots=8)
    row_bytes = size * TILE * coalesce
    room = b.sbuf_room_bytes // row_bytes
    kept = steps if room >= steps else room - 4
    panel = b.sbuf("lhsT_panel", free_bytes=row_bytes, slots=min(room - steps + kept, 2 * kept))
    again = b.sbuf("lhsT_again", free_bytes=row_bytes, slots=4) if kept < steps else None

    def accumulate(left: TileRef, tile: Index, step: Index) -> None:
        moved = stream[tile * steps + step]
        b.load(moved, rhs, rows=TILE, row_bytes=size * moving)
        for c in range(coalesce):
            b.nc_matmul(
                _bank(acc, tile, c, coalesce, share), stationary=left, moving=moved,
                k=TILE, m=TILE, n=moving, dtype=dtype, accumulate=True,
            )  # fmt: skip

    with b.repeat(m // (TILE * coalesce), "m") as i:
        with b.repeat(kept, "k") as s:
            b.load(panel[i * kept + s], lhs, rows=TILE, row_bytes=row_bytes)
        with b.repeat(columns, "n") as j:
            tile = i * columns + j
            with b.repeat(kept, "k") as s:
                accumulate(panel[i * kept + s], tile, s)
            if again is not None:
                with b.repeat(steps - kept, "k") as s:
                    left = again[tile * (steps - kept) + s]
                    b.load(left, lhs, rows=TILE, row_bytes=row_bytes)
                    accumulate(left, tile, s + kept)
            for c in range(coalesce):
                bank, evicted = _bank(acc, tile, c, coalesce, share), result[tile * coalesce + c]
                if c % 2:
                    b.activation(evicted, bank, op="copy", n=moving, out_dtype=BF16)
                else:
                    b.tensor_copy(evicted, bank, n=moving, out_dtype=BF16)
                b.store(out, evicted, rows=TILE, row_bytes=2 * moving)
    return b.build()


def _bank(acc: Pool, tile: Index, c: int, coalesce: int, share: int) -> TileRef:
    return acc[tile * (coalesce // share) + c // share]
