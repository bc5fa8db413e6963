"""The four kernels of the NKI matrix multiplication tutorial, bf16, lhsT [K, M] and rhs [K, N].

Source: nki-samples, tutorials/matrix_multiplication. Tiles are two deep; evictions go to VectorE.
"""

from __future__ import annotations

import torch

from torch_trn.chip import CoreSpec
from torch_trn.memory import Index, Pool
from torch_trn.program import Builder, Program

BF16 = torch.bfloat16
TILE = 128
WIDE = 512
BANK_BYTES = 2048


def tiled(core: CoreSpec, *, m: int, k: int, n: int) -> Program:
    """Original: both operand tiles are loaded for every matmul."""
    b, (lhs, rhs, out) = _start(core, "tiled", m, k, n)
    a = b.sbuf("lhsT_tile", free_bytes=2 * TILE, slots=2)
    w = b.sbuf("rhs_tile", free_bytes=2 * WIDE, slots=2)
    acc, result = _results(b)
    with b.repeat(m // TILE, "m") as i, b.repeat(n // WIDE, "n") as j:
        tile = i * (n // WIDE) + j
        with b.repeat(k // TILE, "k") as s:
            b.load(a[s], lhs, rows=TILE, row_bytes=2 * TILE)
            b.load(w[s], rhs, rows=TILE, row_bytes=2 * WIDE)
            _multiply(b, acc, tile, a, s, w, s)
        _evict(b, acc, result, out, tile)
    return b.build()


def hoisted(core: CoreSpec, *, m: int, k: int, n: int) -> Program:
    """Optimization 1: a column of lhsT is loaded once a row of results, one of rhs for each."""
    b, (lhs, rhs, out) = _start(core, "hoisted", m, k, n)
    steps = k // TILE
    a = b.sbuf("lhsT_tiles", free_bytes=2 * TILE, slots=2 * steps)
    w = b.sbuf("rhs_tiles", free_bytes=2 * WIDE, slots=2 * steps)
    acc, result = _results(b)
    with b.repeat(m // TILE, "m") as i:
        with b.repeat(steps, "k") as s:
            b.load(a[i * steps + s], lhs, rows=TILE, row_bytes=2 * TILE)
        with b.repeat(n // WIDE, "n") as j:
            tile = i * (n // WIDE) + j
            with b.repeat(steps, "k") as s:
                b.load(w[tile * steps + s], rhs, rows=TILE, row_bytes=2 * WIDE)
            with b.repeat(steps, "k") as s:
                _multiply(b, acc, tile, a, i * steps + s, w, tile * steps + s)
            _evict(b, acc, result, out, tile)
    return b.build()


def free_blocked(core: CoreSpec, *, m: int, k: int, n: int) -> Program:
    """Optimization 2: blocks of 2 x 2 result tiles share their operands."""
    b, (lhs, rhs, out) = _start(core, "free blocked", m, k, n)
    steps, blocks = k // TILE, n // (2 * WIDE)
    a = b.sbuf("lhsT_tiles", free_bytes=2 * TILE, slots=2 * steps)
    # A block of rhs is 128 KiB a partition where k is 8192: no room to load the next one whole.
    room = (b.sbuf_room_bytes - 8192) // (2 * WIDE)
    w = b.sbuf("rhs_tiles", free_bytes=2 * WIDE, slots=min(4 * steps, room))
    acc, result = _results(b)
    with b.repeat(m // (2 * TILE), "m") as i:
        with b.repeat(2 * steps, "k") as s:
            b.load(a[i * (2 * steps) + s], lhs, rows=TILE, row_bytes=2 * TILE)
        with b.repeat(blocks, "n") as j:
            block = i * blocks + j
            with b.repeat(2 * steps, "k") as s:
                b.load(w[block * (2 * steps) + s], rhs, rows=TILE, row_bytes=2 * WIDE)
            with b.repeat(2, "bm") as bm, b.repeat(2, "bn") as bn:
                tile = block * 4 + bm * 2 + bn
                with b.repeat(steps, "k") as s:
                    _multiply(
                        b, acc, tile,
                        a, i * (2 * steps) + bm * steps + s,
                        w, block * (2 * steps) + bn * steps + s,
                    )  # fmt: skip
                _evict(b, acc, result, out, tile)
    return b.build()


def fully_blocked(
    core: CoreSpec, *, m: int, k: int, n: int, block_m: int = 16, block_n: int = 2, block_k: int = 8
) -> Program:
    """Optimization 3: k is blocked too; partial results are added up in SBUF, in bf16."""
    b, (lhs, rhs, out) = _start(core, "fully blocked", m, k, n)
    m_blocks, n_blocks, k_blocks = (
        m // (TILE * block_m), n // (WIDE * block_n), k // (TILE * block_k)
    )  # fmt: skip
    row_tiles = m_blocks * block_m
    w = b.sbuf("rhs_tiles", free_bytes=2 * WIDE * block_n, slots=2 * block_k)
    a = b.sbuf("lhsT_tiles", free_bytes=2 * TILE * block_m, slots=2 * block_k)
    sums = b.sbuf("result_tiles", free_bytes=2 * WIDE, slots=row_tiles * block_n)
    packed = b.sbuf("result_packed", free_bytes=2 * WIDE * block_n, slots=2)
    acc = b.psum("res_psum", free_bytes=BANK_BYTES, slots=4)
    with b.repeat(n_blocks, "n") as j:
        with b.repeat(row_tiles * block_n, "t") as t:
            b.memset(sums[t], n=WIDE, dtype=BF16)
        with b.repeat(k_blocks, "k") as s:
            step = j * k_blocks + s
            with b.repeat(block_k, "bk") as bk:
                b.load(w[step * block_k + bk], rhs, rows=TILE, row_bytes=2 * WIDE * block_n)
            with b.repeat(m_blocks, "m") as i:
                block = step * m_blocks + i
                with b.repeat(block_k, "bk") as bk:
                    b.load(a[block * block_k + bk], lhs, rows=TILE, row_bytes=2 * TILE * block_m)
                with b.repeat(block_n, "bn") as bn, b.repeat(block_m, "bm") as bm:
                    bank = acc[block * (block_m * block_n) + bn * block_m + bm]
                    with b.repeat(block_k, "bk") as bk:
                        b.nc_matmul(
                            bank, stationary=a[block * block_k + bk],
                            moving=w[step * block_k + bk], k=TILE, m=TILE, n=WIDE, dtype=BF16,
                            accumulate=True,
                        )  # fmt: skip
                    total = sums[i * (block_m * block_n) + bm * block_n + bn]
                    b.tensor_tensor(total, total, bank, op="add", n=WIDE, dtype=BF16)
        with b.repeat(row_tiles, "m") as i:
            row = j * row_tiles + i
            for bn in range(block_n):
                b.tensor_copy(packed[row], sums[i * block_n + bn], n=WIDE, dtype=BF16)
            b.store(out, packed[row], rows=TILE, row_bytes=2 * WIDE * block_n)
    return b.build()


def _start(
    core: CoreSpec, name: str, m: int, k: int, n: int
) -> tuple[Builder, tuple[Pool, Pool, Pool]]:
    b = Builder(core, f"{name} matmul {m}x{k}x{n}")
    tensors = (
        b.hbm("lhsT", nbytes=2 * k * m),
        b.hbm("rhs", nbytes=2 * k * n),
        b.hbm("result", nbytes=2 * m * n),
    )
    return b, tensors


def _results(b: Builder) -> tuple[Pool, Pool]:
    return (
        b.psum("res_psum", free_bytes=BANK_BYTES, slots=2),
        b.sbuf("res_sb", free_bytes=2 * WIDE, slots=2),
    )


def _multiply(
    b: Builder, acc: Pool, tile: Index, a: Pool, stationary: Index, w: Pool, moving: Index
) -> None:
    b.nc_matmul(
        acc[tile], stationary=a[stationary], moving=w[moving], k=TILE, m=TILE, n=WIDE, dtype=BF16,
        accumulate=True,
    )  # fmt: skip


def _evict(b: Builder, acc: Pool, result: Pool, out: Pool, tile: Index) -> None:
    b.tensor_copy(result[tile], acc[tile], n=WIDE, out_dtype=BF16)
    b.store(out, result[tile], rows=TILE, row_bytes=2 * WIDE)
