"""NKIBench's swiglu and add_rmsnorm_matmul, fp32; see kernels.nkibench for the common choices.

Chosen by looking at the printed spills of swiglu (67 MB): its loops over gate and up are one; x is
transposed once, kept in HBM as such, and loaded from there for each further 1,024 columns.
"""

from __future__ import annotations

from kernels.nkibench import (
    BANK_BYTES,
    FP32,
    TILE,
    WIDE,
    copy_out,
    matmul,
    scalar_op,
    sigmoid,
    turn,
)
from torch_trn.chip import CoreSpec
from torch_trn.memory import Index, Pool
from torch_trn.program import Builder, Program

BLOCK = 1024


def swiglu(core: CoreSpec, *, m: int, k: int, n: int) -> Program:
    """(silu(x gate) x (x up)) down: x [m, k], gate and up [k, n], down [n, k]."""
    return _SwiGlu(core, m, k, n).build()


class _SwiGlu:
    def __init__(self, core: CoreSpec, m: int, k: int, n: int) -> None:
        if k != BLOCK:
            raise ValueError(f"swiglu is written for k = {BLOCK}, as its source, and not for {k}")
        b = self.b = Builder(core, f"swiglu {m}x{k}x{n}")
        self.k_tiles, self.rows, self.blocks = k // TILE, m // WIDE, n // BLOCK
        self.x, self.y = b.hbm("x", nbytes=4 * m * k), b.hbm("y", nbytes=4 * m * k)
        self.weights = b.hbm("gate, up and down", nbytes=12 * k * n)
        self.x_turned = b.hbm("spilled xT", nbytes=4 * m * k // self.rows, parts=self.rows)
        self.hidden = b.hbm("spilled hidden", nbytes=4 * m * n // self.rows, parts=self.rows)
        self.w = b.sbuf("w", free_bytes=4 * BLOCK, slots=max(2 * self.k_tiles, n // TILE))
        self.row = b.sbuf("row", free_bytes=4 * BLOCK, slots=2)
        self.gate, self.work = (
            b.sbuf(name, free_bytes=4 * WIDE, slots=2) for name in ("gate", "work")
        )
        room = b.sbuf_room_bytes // (4 * WIDE)
        self.tiles = b.sbuf("xT, hidden", free_bytes=4 * WIDE, slots=min(room, 2 * n // TILE))
        self.turned, self.gate_bank, self.up_bank, self.out_bank = (
            b.psum(name, free_bytes=BANK_BYTES, slots=2)
            for name in ("turned", "gate_psum", "up_psum", "out_psum")
        )

    def build(self) -> Program:
        b = self.b
        self._columns(0, True)
        with b.repeat(self.blocks - 1, "block") as block:
            self._columns(block + 1, False)
        self._down()
        return b.build()

    def _columns(self, block: Index, first: bool) -> None:
        """1,024 hidden columns for all rows."""
        b, both = self.b, 2 * self.k_tiles
        with b.repeat(both, "w") as i:
            b.load(self.w[block * both + i], self.weights, rows=TILE, row_bytes=4 * BLOCK)
        with b.repeat(self.rows, "r") as r:
            base = (block * self.rows + r) * self.k_tiles
            self._turned_rows(r, base, first)
            with b.repeat(BLOCK // TILE, "c") as c:
                self._hidden_tile(
                    block * both, base, (block * self.rows + r) * (BLOCK // TILE) + c, r
                )

    def _turned_rows(self, r: Index, base: Index, first: bool) -> None:
        b = self.b
        if not first:
            with b.repeat(self.k_tiles, "k") as k:
                b.load(self.tiles[base + k], self.x_turned[r], rows=TILE, row_bytes=4 * WIDE)
            return
        with b.repeat(WIDE // TILE, "t") as t:
            number = r * (WIDE // TILE) + t
            b.load(self.row[number], self.x, rows=TILE, row_bytes=4 * BLOCK)
            with b.repeat(self.k_tiles, "k") as k:
                turn(b, self.tiles[base + k], self.turned[k], self.row[number])
        with b.repeat(self.k_tiles, "k") as k:
            b.store(self.x_turned[r], self.tiles[base + k], rows=TILE, row_bytes=4 * WIDE,
                    queue="spill save")  # fmt: skip

    def _hidden_tile(self, weights: Index, base: Index, number: Index, r: Index) -> None:
        """128 hidden columns of 512 rows of x."""
        b = self.b
        gate, work = self.gate[number], self.work[number]
        for bank, offset in ((self.gate_bank, 0), (self.up_bank, self.k_tiles)):
            with b.repeat(self.k_tiles, "k") as k:
                matmul(b, bank[number], self.w[weights + k + offset], self.tiles[base + k], n=WIDE)
        copy_out(b, gate, self.gate_bank[number], n=WIDE)
        sigmoid(b, work, gate)
        b.tensor_tensor(work, gate, work, op="multiply", n=WIDE)
        b.tensor_tensor(work, work, self.up_bank[number], op="multiply", n=WIDE)
        b.store(self.hidden[r], work, rows=TILE, row_bytes=4 * WIDE, queue="spill save")

    def _down(self) -> None:
        b = self.b
        count = self.blocks * (BLOCK // TILE)
        with b.repeat(count, "w") as i:
            b.load(self.w[i], self.weights, rows=TILE, row_bytes=4 * BLOCK)
        with b.repeat(self.rows, "r") as r:
            with b.repeat(count, "h") as h:
                b.load(self.tiles[r * count + h], self.hidden[r], rows=TILE, row_bytes=4 * WIDE)
            with b.repeat(WIDE // TILE, "t") as t:
                out = self.row[r * (WIDE // TILE) + t]
                with b.repeat(BLOCK // WIDE, "c") as c:
                    with b.repeat(count, "h") as h:
                        matmul(b, self.out_bank[c], self.tiles[r * count + h], self.w[h], n=WIDE)
                    copy_out(b, out, self.out_bank[c], n=WIDE)
                b.store(self.y, out, rows=TILE, row_bytes=4 * BLOCK)


def add_rmsnorm_matmul(core: CoreSpec, *, m: int, k: int, n: int) -> Program:
    """rmsnorm(x + z) g times w: x and z [m, k], w [k, n]; 128 rows at a time.

    Loads of w are hoisted out of the rows (42 MB are read, not 302); the transposes of a row tile
    are repeated for each 512 columns, as the printed flops say.
    """
    b = Builder(core, f"add_rmsnorm_matmul {m}x{k}x{n}")
    x_in, z_in, w_in = (
        b.hbm(name, nbytes=4 * size) for name, size in (("x", m * k), ("z", m * k), ("w", k * n))
    )
    y = b.hbm("y", nbytes=4 * m * n)
    k_tiles, columns = k // TILE, n // WIDE
    w = b.sbuf("w", free_bytes=4 * WIDE, slots=k_tiles * columns)
    x, z, square = (b.sbuf(name, free_bytes=4 * k, slots=2) for name in ("x", "z", "square"))
    rms = b.sbuf("rms", free_bytes=4, slots=2)
    turned = b.sbuf("xT", free_bytes=4 * TILE, slots=2 * k_tiles)
    out = b.sbuf("out", free_bytes=4 * WIDE, slots=2)
    bank = b.psum("turned", free_bytes=BANK_BYTES, slots=4)
    acc = b.psum("acc", free_bytes=BANK_BYTES, slots=2)
    g = _broadcast_weight(b, k, acc)
    with b.repeat(k_tiles * columns, "w") as i:
        b.load(w[i], w_in, rows=TILE, row_bytes=4 * WIDE)
    with b.repeat(m // TILE, "m") as i:
        b.load(x[i], x_in, rows=TILE, row_bytes=4 * k)
        b.load(z[i], z_in, rows=TILE, row_bytes=4 * k)
        b.tensor_tensor(x[i], x[i], z[i], op="add", n=k)
        b.activation(square[i], x[i], op="square", n=k)
        b.tensor_reduce(rms[i], square[i], op="add", n=k)
        scalar_op(b, rms[i], [rms[i]], op="multiply,add", n=1)
        b.activation(rms[i], rms[i], op="rsqrt", n=1)
        scalar_op(b, x[i], [x[i], rms[i]], op="multiply", n=k)
        b.tensor_tensor(x[i], x[i], g, op="multiply", n=k)
        with b.repeat(columns, "n") as j:
            number = i * columns + j
            with b.repeat(k_tiles, "k") as s:
                turn(b, turned[number * k_tiles + s], bank[s], x[i])
            with b.repeat(k_tiles, "k") as s:
                matmul(b, acc[number], turned[number * k_tiles + s], w[j * k_tiles + s], n=WIDE)
            copy_out(b, out[number], acc[number], n=WIDE)
            b.store(y, out[number], rows=TILE, row_bytes=4 * WIDE)
    return b.build()


def _broadcast_weight(b: Builder, k: int, acc: Pool) -> Pool:
    """g [1, k] on all partitions: a product with ones."""
    source = b.hbm("g", nbytes=4 * k)
    ones = b.sbuf("ones", free_bytes=4 * TILE)
    row = b.sbuf("g_row", free_bytes=4 * k)
    g = b.sbuf("g", free_bytes=4 * k)
    b.memset(ones, n=TILE)
    b.load(row, source, rows=1, row_bytes=4 * k)
    with b.repeat(k // WIDE, "c") as c:
        b.nc_matmul(acc[c], stationary=ones, moving=row, k=1, m=TILE, n=WIDE, dtype=FP32)
        copy_out(b, g[0], acc[c], n=WIDE)
    return g
