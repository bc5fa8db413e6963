"""Mamba's selective scan in its three NKI versions, fp32, channels on partitions.

Source: nki-samples, tutorials/fused_mamba. Per state and 128 channels: deltaA = exp(delta A),
deltaBu = delta u B, a scan of the two, times C, added to the result.

Chosen by looking:
* B and C get onto all partitions as a product with ones on TensorE. Up to 512 columns, a PSUM bank,
  VectorE reads them there; wider rows are copied to SBUF by ScalarE first.
* v2 and v3 compute delta u once, not for each state.
* The compiler gives v2 nine tiles of a whole row (delta, delta u, the result, and two each of the
  three working tiles). What of them exceeds SBUF is loaded again in every state, and VectorE
  waits for it; the written loop itself gets by with one working tile of each kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_trn.chip import CoreSpec
from torch_trn.memory import Index, Pool, TileRef
from torch_trn.program import Builder, Program

TILE = 128
BANK = 512
FP32 = torch.float32
LIVE_TILES = 9
SPILL_PIECE_BYTES = 4096


def v1(core: CoreSpec, *, channels: int, seq: int, state: int) -> Program:
    """States outside, channels inside: delta and u are loaded again for every state."""
    scan = _Scan(core, "mamba_v1", channels, seq, state)
    b, tiles, row_bytes = scan.b, channels // TILE, 4 * seq
    delta = b.sbuf("delta_i", free_bytes=row_bytes, slots=2)
    delta_u = b.sbuf("deltaU", free_bytes=row_bytes, slots=2)
    total = b.sbuf("scanC_accum", free_bytes=row_bytes, slots=tiles)
    scan.add_working_tiles(seq, 2)
    with b.repeat(tiles, "c") as c:
        b.memset(total[c], n=seq)
    with b.repeat(state, "s") as s, b.repeat(tiles, "c") as c:
        step = s * tiles + c
        b.load(delta[step], scan.delta, rows=TILE, row_bytes=row_bytes)
        scan.load_delta_u(delta_u[step], delta[step], seq)
        scan.state(step, seq, delta[step], delta_u[step], total[c])
    with b.repeat(tiles, "c") as c:
        b.store(scan.out, total[c], rows=TILE, row_bytes=row_bytes)
    return b.build()


def v2(core: CoreSpec, *, channels: int, seq: int, state: int) -> Program:
    """Channels outside, states inside, each instruction over the whole row."""
    scan = _Scan(core, "mamba_v2", channels, seq, state)
    b, row_bytes = scan.b, 4 * seq
    spilled_bytes = max(0, LIVE_TILES * row_bytes - core.sbuf_partition_bytes)
    window = b.sbuf("spilled", free_bytes=SPILL_PIECE_BYTES) if spilled_bytes else None
    scan.add_working_tiles(seq, 1 if spilled_bytes else 2)
    deep = 2 if 6 * row_bytes <= b.sbuf_room_bytes else 1
    total = b.sbuf("scanC_accum", free_bytes=row_bytes, slots=deep)
    kept_bytes = min(row_bytes, b.sbuf_room_bytes // (2 * deep) // 4 * 4)
    delta = b.sbuf("delta_i", free_bytes=kept_bytes, slots=deep)
    delta_u = b.sbuf("deltaU", free_bytes=kept_bytes, slots=deep)
    with b.repeat(channels // TILE, "c") as c:
        b.memset(total[c], n=seq)
        b.load(delta[c], scan.delta, rows=TILE, row_bytes=kept_bytes)
        scan.load_delta_u(delta_u[c], delta[c], kept_bytes // 4)
        if window is not None:
            scan.save(window, spilled_bytes)
        with b.repeat(state, "s") as s:
            if window is not None:
                scan.reload(window, spilled_bytes)
            extra = () if window is None else (window[0],)
            scan.state(c * state + s, seq, delta[c], delta_u[c], total[c], spilled=extra)
        b.store(scan.out, total[c], rows=TILE, row_bytes=row_bytes)
    return b.build()


def v3(core: CoreSpec, *, channels: int, seq: int, state: int) -> Program:
    """As v2, but 512 columns at a time; the scan takes its start from the piece before."""
    scan = _Scan(core, "mamba_v3", channels, seq, state)
    b, pieces = scan.b, seq // BANK
    scan.add_working_tiles(BANK, 2)
    start = b.sbuf("scan_init", free_bytes=4, slots=2)
    slots = min(2 * pieces, b.sbuf_room_bytes // (3 * 4 * BANK))
    delta, delta_u, total = (
        b.sbuf(name, free_bytes=4 * BANK, slots=slots)
        for name in ("delta_i", "deltaU", "scanC_accum")
    )
    with b.repeat(channels // TILE, "c") as c:
        with b.repeat(pieces, "p") as p:
            at = c * pieces + p
            b.memset(total[at], n=BANK)
            b.load(delta[at], scan.delta, rows=TILE, row_bytes=4 * BANK)
            scan.load_delta_u(delta_u[at], delta[at], BANK)
        with b.repeat(state, "s") as s:
            row = c * state + s
            b.memset(start[row], n=1)
            with b.repeat(pieces, "p") as p:
                at = c * pieces + p
                scan.state(
                    row * pieces + p, BANK, delta[at], delta_u[at], total[at], start=start[row]
                )
        with b.repeat(pieces, "p") as p:
            b.store(scan.out, total[c * pieces + p], rows=TILE, row_bytes=4 * BANK)
    return b.build()


class _Scan:
    """The tensors and tiles that the versions share, and what they do for one state."""

    def __init__(self, core: CoreSpec, name: str, channels: int, seq: int, state: int) -> None:
        b = self.b = Builder(core, f"{name} {channels} channels x {seq}, {state} states")
        self.delta, self.u, self.out = (
            b.hbm(name, nbytes=4 * channels * seq) for name in ("delta", "u", "output")
        )
        self._a = b.hbm("A", nbytes=4 * channels * state)
        self._bc = b.hbm("B and C", nbytes=8 * state * seq)
        self._spill = b.hbm("spill", nbytes=4 * channels * seq)
        self._ones = b.sbuf("ones", free_bytes=4 * TILE)
        self._a_column = b.sbuf("A_i", free_bytes=4, slots=4)
        self._row = b.sbuf("row", free_bytes=4 * BANK, slots=4)
        self._broadcast = b.psum("broadcast", free_bytes=4 * BANK, slots=4)
        b.memset(self._ones, n=TILE)

    def add_working_tiles(self, width: int, slots: int) -> None:
        """deltaA; deltaBu, in whose place the scan goes; scan times C."""
        self._decay, self._scan, self._product = (
            self.b.sbuf(name, free_bytes=4 * width, slots=slots)
            for name in ("deltaA", "scan", "scanC")
        )

    def load_delta_u(self, target: TileRef, delta: TileRef, width: int) -> None:
        """target = u x delta."""
        self.b.load(target, self.u, rows=TILE, row_bytes=4 * width)
        self.b.tensor_tensor(target, delta, target, op="multiply", n=width)

    def save(self, window: Pool, nbytes: int) -> None:
        """``nbytes`` a partition to HBM, by way of the ``window``."""
        for trips, size in _pieces(nbytes):
            with self.b.repeat(trips, "piece"):
                self.b.store(self._spill, window, rows=TILE, row_bytes=size, queue="spill save")

    def reload(self, window: Pool, nbytes: int) -> None:
        """``nbytes`` a partition back from HBM."""
        for trips, size in _pieces(nbytes):
            with self.b.repeat(trips, "piece"):
                self.b.load(window, self._spill, rows=TILE, row_bytes=size, queue="spill reload")

    def state(
        self, step: Index, width: int, delta: TileRef, delta_u: TileRef, total: TileRef,
        *, start: TileRef | None = None, spilled: Sequence[TileRef] = (),
    ) -> None:  # fmt: skip
        """One state of ``width`` columns; ``start`` carries the scan on, ``spilled`` are tiles that
        VectorE waits for, and that are not loaded again before it is done."""
        b = self.b
        column, decay, scan = self._a_column[step], self._decay[step], self._scan[step]
        product, starts = self._product[step], () if start is None else (start,)
        b.load(column, self._a, rows=TILE, row_bytes=4)
        b.activation(decay, [delta, column], op="exp", n=width)
        row = self._on_all_partitions(step * 2, width, scan)
        b.tensor_tensor(scan, [delta_u, *spilled], row, op="multiply", n=width)
        b.tensor_tensor_scan(scan, [decay, *starts], scan, op="multiply,add", n=width)
        if start is not None:
            b.tensor_copy(start, scan, n=1)
        row = self._on_all_partitions(step * 2 + 1, width, product)
        b.tensor_tensor(product, scan, row, op="multiply", n=width)
        b.tensor_tensor(total, total, [product, *spilled], op="add", n=width)

    def _on_all_partitions(self, number: Index, width: int, wide: TileRef) -> TileRef:
        """A row of B or C on all partitions: in PSUM, or in ``wide`` if it is longer than a bank.

        A free size of at most one PSUM bank is what one matmul writes.
        """
        b = self.b
        pieces, size = (1, width) if width <= BANK else (width // BANK, BANK)
        with b.repeat(pieces, "w") as w:
            at = number * pieces + w
            b.load(self._row[at], self._bc, rows=1, row_bytes=4 * size)
            b.nc_matmul(
                self._broadcast[at], stationary=self._ones, moving=self._row[at], k=1, m=TILE,
                n=size, dtype=FP32,
            )  # fmt: skip
            if pieces > 1:
                b.activation(wide, self._broadcast[at], op="copy", n=size)
        return wide if pieces > 1 else self._broadcast[number]


def _pieces(nbytes: int) -> list[tuple[int, int]]:
    """(count, size) of the pieces of a spill."""
    whole, rest = divmod(nbytes, SPILL_PIECE_BYTES)
    return [(whole, SPILL_PIECE_BYTES)] * (whole > 0) + [(1, rest)] * (rest > 0)
