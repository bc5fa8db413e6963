"""NKIBench's lora, fp32: y = x w + (x a) b; see kernels.nkibench for the common choices.

The weights are stationary, so that y comes out turned and is turned back at the end.

Chosen by looking at the printed spills (1.07 GB) and flops (5,632 transposes): the second reading
of x is turned once and kept in HBM for the later column blocks; the low-rank product of all
columns, and the sums over k, which the source cuts in four, go to HBM and back.
"""

from __future__ import annotations

from kernels.nkibench import BANK_BYTES, TILE, WIDE, copy_out, matmul, turn
from torch_trn.chip import CoreSpec
from torch_trn.memory import Index
from torch_trn.program import Builder, Program

BLOCK = 1024
PIECES = BLOCK // TILE
K_CUTS = 4


def lora(core: CoreSpec, *, m: int, k: int, n: int, rank: int = TILE) -> Program:
    """x [m, k], w [k, n], a [k, rank], b [rank, n]."""
    return _Lora(core, m, k, n, rank).build()


class _Lora:
    def __init__(self, core: CoreSpec, m: int, k: int, n: int, rank: int) -> None:
        b = self.b = Builder(core, f"lora {m}x{k}x{n}, rank {rank}")
        self.rank = rank
        self.groups, self.k_tiles, self.blocks = m // WIDE, k // TILE, n // BLOCK
        self.cut = self.k_tiles // K_CUTS
        self.x, self.w, self.y = (
            b.hbm(name, nbytes=4 * size)
            for name, size in (("x", m * k), ("w", k * n), ("y", m * n))
        )
        self.a_in = b.hbm("a and b", nbytes=4 * rank * (k + n))
        turned = K_CUTS * self.groups
        self.x_turned = b.hbm("spilled xT", nbytes=4 * m * k // turned, parts=turned)
        parts = self.groups * PIECES
        self.low = b.hbm("spilled low rank", nbytes=4 * m * n // parts, parts=parts * self.blocks)
        self.sums = b.hbm("spilled sums", nbytes=4 * TILE * WIDE, parts=parts)
        self.identity = b.sbuf("identity", free_bytes=4 * TILE)
        self.a = b.sbuf("a", free_bytes=4 * rank, slots=self.k_tiles)
        self.b_row = b.sbuf("b", free_bytes=4 * BLOCK, slots=2)
        self.row = b.sbuf("x_row", free_bytes=4 * BLOCK, slots=2)
        self.weights = b.sbuf("w", free_bytes=4 * BLOCK, slots=2 * self.cut)
        self.xt = b.sbuf("xT", free_bytes=4 * WIDE, slots=2 * self.cut)
        self.inner = b.sbuf("x a", free_bytes=4 * WIDE, slots=self.groups)
        self.old, self.new = (b.sbuf(name, free_bytes=4 * WIDE, slots=4) for name in ("old", "new"))
        self.out = b.sbuf("out", free_bytes=4 * TILE, slots=4)
        self.bank = b.psum("turned", free_bytes=BANK_BYTES, slots=4)
        self.acc = b.psum("acc", free_bytes=BANK_BYTES, slots=4)

    def build(self) -> Program:
        b = self.b
        constants = b.hbm("constants", nbytes=4 * TILE * TILE)
        b.load(self.identity, constants, rows=TILE, row_bytes=4 * TILE)
        with b.repeat(self.k_tiles, "k") as k:
            b.load(self.a[k], self.a_in, rows=TILE, row_bytes=4 * self.rank)
        with b.repeat(self.groups, "g") as g:
            self._inner_product(g)
        with b.repeat(self.blocks, "block") as block:
            self._low_rank(block)
        self._block(0, True)
        with b.repeat(self.blocks - 1, "block") as block:
            self._block(block + 1, False)
        return b.build()

    def _inner_product(self, g: Index) -> None:
        """x a of 512 rows, turned: [rank, 512]."""
        b = self.b
        with b.repeat(self.k_tiles // PIECES, "k") as k:
            at = g * self.k_tiles + k * PIECES
            self._turn_rows(at, PIECES, g * (self.k_tiles // PIECES) + k)
            with b.repeat(PIECES, "i") as i:
                matmul(b, self.acc[g], self.a[k * PIECES + i], self.xt[at + i], n=WIDE)
        copy_out(b, self.inner[g], self.acc[g], n=WIDE)

    def _turn_rows(self, at: Index, pieces: int, number: Index) -> None:
        """512 rows of x, ``pieces`` x 128 columns, turned into as many tiles."""
        b = self.b
        with b.repeat(WIDE // TILE, "t") as t:
            row = self.row[number * (WIDE // TILE) + t]
            b.load(row, self.x, rows=TILE, row_bytes=4 * TILE * pieces)
            with b.repeat(pieces, "i") as i:
                turn(b, self.xt[at + i], self.bank[i], row)

    def _low_rank(self, block: Index) -> None:
        """(x a) b of 1,024 columns, turned, to HBM."""
        b = self.b
        right = self.b_row[block]
        b.load(right, self.a_in, rows=self.rank, row_bytes=4 * BLOCK)
        with b.repeat(self.groups, "g") as g, b.repeat(PIECES, "i") as i:
            part = (block * self.groups + g) * PIECES + i
            matmul(b, self.acc[part], right, self.inner[g], n=WIDE, k=self.rank)
            copy_out(b, self.new[part], self.acc[part], n=WIDE)
            b.store(self.low[part], self.new[part], rows=TILE, row_bytes=4 * WIDE,
                    queue="spill save")  # fmt: skip

    def _block(self, block: Index, first: bool) -> None:
        """1,024 columns of y."""
        b = self.b
        for cut in range(K_CUTS):
            number = block * K_CUTS + cut
            with b.repeat(self.cut, "k") as k:
                b.load(self.weights[number * self.cut + k], self.w, rows=TILE, row_bytes=4 * BLOCK)
            with b.repeat(self.groups, "g") as g:
                at = (number * self.groups + g) * self.cut
                self._turned_tiles(cut, g, at, first)
                with b.repeat(PIECES, "i") as i:
                    self._partial_sum(number * self.cut, at, g * PIECES + i, cut)
        with b.repeat(self.groups, "g") as g, b.repeat(PIECES, "i") as i:
            self._finish(g * PIECES + i, (block * self.groups + g) * PIECES + i)

    def _turned_tiles(self, cut: int, g: Index, at: Index, first: bool) -> None:
        b, part = self.b, self.x_turned[g * K_CUTS + cut]
        if first:
            half = self.cut // 2
            for h in range(2):
                self._turn_rows(at + h * half, half, g * 2 + h)
        with b.repeat(self.cut, "k") as k:
            if first:
                b.store(part, self.xt[at + k], rows=TILE, row_bytes=4 * WIDE, queue="spill save")
            else:
                b.load(self.xt[at + k], part, rows=TILE, row_bytes=4 * WIDE, queue="spill reload")

    def _partial_sum(self, weights: Index, at: Index, tile: Index, cut: int) -> None:
        b, new = self.b, self.new[tile]
        with b.repeat(self.cut, "k") as k:
            matmul(b, self.acc[tile], self.weights[weights + k], self.xt[at + k], n=WIDE)
        if cut:
            old = self.old[tile]
            b.load(old, self.sums[tile], rows=TILE, row_bytes=4 * WIDE, queue="spill reload")
            b.tensor_tensor(new, old, self.acc[tile], op="add", n=WIDE)
        else:
            copy_out(b, new, self.acc[tile], n=WIDE)
        b.store(self.sums[tile], new, rows=TILE, row_bytes=4 * WIDE, queue="spill save")

    def _finish(self, tile: Index, part: Index) -> None:
        """Adds the low-rank part to [128 columns, 512 rows], turns and stores it."""
        b, new, old = self.b, self.new[tile], self.old[tile]
        b.load(new, self.sums[tile], rows=TILE, row_bytes=4 * WIDE, queue="spill reload")
        b.load(old, self.low[part], rows=TILE, row_bytes=4 * WIDE, queue="spill reload")
        b.tensor_tensor(new, new, old, op="add", n=WIDE)
        with b.repeat(WIDE // TILE, "t") as t:
            out = self.out[tile * (WIDE // TILE) + t]
            turn(b, out, self.bank[t], new)
            b.store(self.y, out, rows=TILE, row_bytes=4 * TILE)
