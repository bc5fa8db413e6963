"""The tiled matrix product that matmuls and convolutions share.

out [m, n] = sum over k of stationary [k, m] x moving [k, n]: k lies on partitions (128 rows of the
array), m is the stationary free size (128), n the moving one (512 columns, one PSUM bank).

Two schedules:
* resident: a block of moving columns stays in SBUF for its whole k, all of m streams past it;
* streaming: PSUM holds as many output tiles as it has banks for, both operands stream along k.
The first is used where m is long and a block fits; the second for few rows (decode) and huge k.
An operand whose k is not on partitions in HBM is turned on the way: by the DMA where it can (16-bit
data, trn2 on), else on TensorE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.run import loop, spread_over
from torch_trn.lowering.tile import FP32
from torch_trn.memory import Index, Pool, TileRef
from torch_trn.program import Builder

#: Columns of one PSUM bank in fp32, and of a moving operand (isa nc_matmul).
BANK = 512

#: k tiles (of 128 rows) that one DMA brings: rows of 2 KiB and more where k is contiguous.
K_BLOCK = 8

#: Stationary columns that one DMA brings, so that rows in HBM are long enough.
M_GROUP = 512

#: SBUF bytes per partition left for what is not planned here.
SPARE_BYTES = 8192


@dataclass
class Side:
    """One operand, [k, free]: where it lies and how it gets onto partitions.

    layout: "k_major" (free contiguous in HBM: k rows go straight to partitions), "k_inner" (k
        contiguous: must be turned), "vector" (free is 1: each partition takes a run of k),
        "scattered" (neither: an element per descriptor).
    run: elements next to each other along the contiguous dim, at most.
    """

    source: Pool
    dtype: torch.dtype
    layout: str
    run: int = 1 << 30
    pool: Pool | None = None
    natural: Pool | None = None


@dataclass
class Gemm:
    """One matrix product, `batch` times, as loops of a Builder.

    `finish(psum tile, out tile, parts, columns, column chunk)` evicts one PSUM bank;
    `before(rows, columns)` may load what it needs. Results are stored with `out_dtype`.
    """

    b: Builder
    core: CoreSpec
    m: int
    n: int
    k: int
    stationary: Side
    moving: Side
    out: Pool
    out_dtype: torch.dtype
    batch: int = 1
    turn_output: bool = False
    out_run: int = 1 << 30
    finish: Callable[[TileRef, TileRef, int, int], None] | None = None
    before: Callable[[int, int], None] | None = None
    extra_bytes: int = 0
    accumulate_out: bool = False
    tag: str = ""
    m_group: int = 0
    n_block: int = 0
    k_block: int = 0
    resident: bool = False
    stationary_fits: bool = False
    acc: Pool | None = None
    turned: Pool | None = None
    results: Pool | None = None
    evictions: int = field(default=0)

    @property
    def dtype(self) -> torch.dtype:
        """dtype that TensorE multiplies."""
        return self.moving.dtype

    @property
    def k_rows(self) -> int:
        """Rows of k in one matmul: 256 for fp8 in double-row mode."""
        double = self.dtype.itemsize == 1 and self.core.pe_fp8_factor > 1
        return 2 * PARTITIONS if double and self.dtype.is_floating_point else PARTITIONS

    # -- planning ------------------------------------------------------------------------------
    def plan(self) -> None:
        """Choose block sizes and allocate the pools."""
        size, tiles = self.dtype.itemsize, ceil_div(self.k, PARTITIONS)
        turning = [s for s in (self.stationary, self.moving) if self._on_tensor_engine(s)]
        banks = self.b.psum_room_banks - (2 if turning or self.turn_output else 0)
        room = self.b.sbuf_room_bytes - SPARE_BYTES - self.extra_bytes
        self.k_block = min(tiles, K_BLOCK)
        self.m_group = min(self.m, M_GROUP)
        few = ceil_div(self.m, PARTITIONS) <= 4
        widths = (4, 2, 1)
        if not few:
            for per_block in widths:
                self.n_block = min(self.n, BANK * per_block)
                if 2 * ceil_div(self.n_block, BANK) > banks:
                    continue
                blocks = ceil_div(tiles, self.k_block) * self.k_block
                copies = 2 if self.n > self.n_block or self.batch > 1 else 1
                bytes_ = blocks * size * (copies * self.n_block + 2 * self.m_group)
                if bytes_ + self._small(size) <= room:
                    self.resident = True
                    break
        if not self.resident:
            self._plan_streaming(banks, room, size, tiles)
        self._pools(tiles, size, bool(turning))

    def _plan_streaming(self, banks: int, room: int, size: int, tiles: int) -> None:
        rows = ceil_div(self.m_group, PARTITIONS)
        wide = max(1, banks // rows)
        wide = wide // 2 if wide >= 2 and rows <= 2 else wide
        self.n_block = min(self.n, BANK * min(wide, 4))
        self.stationary_fits = tiles * size * self.m_group <= room // 3 and self.m <= self.m_group
        while True:
            kept = (ceil_div(tiles, self.k_block) if self.stationary_fits else 2) * self.m_group
            need = self.k_block * size * (kept + 2 * self.n_block) + self._small(size)
            if need <= room or self.k_block == 1 and self.n_block <= BANK:
                return
            if self.k_block > 1:
                self.k_block = ceil_div(self.k_block, 2)
            else:
                self.n_block = max(BANK, self.n_block // 2)

    def _small(self, size: int) -> int:
        """Bytes of result tiles and of tiles that wait to be turned."""
        total = 2 * self.n_block * max(self.out_dtype.itemsize, 4 if self.turn_output else 1)
        for side, free in ((self.stationary, self.m_group), (self.moving, self.n_block)):
            if self._on_tensor_engine(side):
                total += 2 * ceil_div(free, PARTITIONS) * self.k_block * PARTITIONS * size
        return total

    def _pools(self, tiles: int, size: int, turning: bool) -> None:
        b, tag = self.b, self.tag
        blocks = ceil_div(tiles, self.k_block)
        rows = ceil_div(self.m_group, PARTITIONS)
        wide = ceil_div(self.n_block, BANK)
        many = self.n > self.n_block or self.batch > 1
        deep = self._depth(blocks, size)
        moving = blocks * (2 if many else 1) if self.resident else deep
        stationary = 2 * blocks if self.resident else deep
        if self.stationary_fits:
            stationary = blocks * (1 if self.batch == 1 else deep)
        for side, free, slots, name in (
            (self.stationary, self.m_group, stationary, f"stationary{tag}"),
            (self.moving, self.n_block, moving, f"moving{tag}"),
        ):
            # A turning DMA writes whole rows of k, which takes the room of a full tile.
            width = max(free, PARTITIONS) if side.layout == "k_inner" else free
            side.pool = b.sbuf(name, free_bytes=self.k_block * width * size, slots=slots)
            if self._on_tensor_engine(side):
                nbytes = ceil_div(free, PARTITIONS) * self.k_block * PARTITIONS * size
                side.natural = b.sbuf(f"{name}_natural", free_bytes=nbytes, slots=2)
        slots = wide if self.resident else wide * rows
        slots = 2 * slots if 2 * slots <= b.psum_room_banks - 2 * turning else slots
        self.acc = b.psum(f"acc{tag}", free_bytes=BANK * 4, slots=slots)
        if turning or self.turn_output:
            self.turned = b.psum(f"turned{tag}", free_bytes=BANK * 4, slots=2)
        width = self.n_block * (4 if self.turn_output else self.out_dtype.itemsize)
        deep = 4 if 4 * width <= b.sbuf_room_bytes - self.extra_bytes else 2
        self.results = b.sbuf(f"result{tag}", free_bytes=width, slots=deep)

    def _depth(self, blocks: int, size: int) -> int:
        """Blocks in flight while streaming: enough small ones to hide the DMA's start."""
        kept = blocks if self.stationary_fits else 1
        each = self.k_block * size * (max(self.n_block, PARTITIONS) + kept * self.m_group)
        room = (self.b.sbuf_room_bytes - SPARE_BYTES - self.extra_bytes - self._small(size)) // 2
        return max(2, min(8, room // max(each, 1)))

    def _on_tensor_engine(self, side: Side) -> bool:
        dma = side.dtype.itemsize == 2 and self.core.name != "NeuronCore-v2"
        return side.layout == "k_inner" and not dma

    # -- loops ---------------------------------------------------------------------------------
    def run(self) -> None:
        """Emit everything: batch, column blocks, row groups, k."""
        if not (self.m and self.n and self.batch):
            return
        with loop(self.b, self.batch, "batch") as batch:
            if self.stationary_fits:
                self._load_all([(self.stationary, batch, self.m_group)])
            for first, trips, columns in _segments(self.n, self.n_block):
                with loop(self.b, trips, "n") as n:
                    number = batch * ceil_div(self.n, self.n_block) + (n + first)
                    self._columns(columns, number, batch)

    def _columns(self, columns: int, number: Index, batch: Index) -> None:
        groups = ceil_div(self.m, self.m_group)
        segments = _segments(self.m, self.m_group)
        if self.resident:
            # The first row group comes block by block with the columns, so that TensorE can start
            # on the first k block while the others are on their way.
            rows = segments[0][2]
            group = number * groups
            self._load_all([(self.stationary, group, rows), (self.moving, number, columns)])
            self._resident_group(rows, columns, number, group)
            segments = [(1, segments[0][1] - 1, rows), *segments[1:]]
        for first, trips, rows in segments:
            if not trips:
                continue
            with loop(self.b, trips, "m") as m:
                group = number * groups + (m + first)
                if self.resident:
                    self._load_all([(self.stationary, group, rows)])
                    self._resident_group(rows, columns, number, group)
                else:
                    self._streaming_group(rows, columns, group, batch)

    def _load_all(self, sides: Sequence[tuple[Side, Index, int]]) -> None:
        """All k blocks of row groups or column blocks, given as (operand, number, free size)."""
        blocks = self._k_blocks()
        count = sum(trips for _, trips, _ in blocks)
        for first, trips, k in blocks:
            with loop(self.b, trips, "k") as block:
                for side, number, free in sides:
                    self._load(side, number * count + (block + first), free, k)

    def _k_blocks(self) -> list[tuple[int, int, int]]:
        """(first, count, rows of k) of the k blocks."""
        return _segments(self.k, self.k_block * PARTITIONS)

    def _resident_group(self, rows: int, columns: int, number: Index, group: Index) -> None:
        blocks = self._k_blocks()
        count = sum(trips for _, trips, _ in blocks)
        tiles = ceil_div(self.m_group, PARTITIONS)
        wide = ceil_div(columns, BANK)
        for first, trips, parts in _segments(rows, PARTITIONS):
            with loop(self.b, trips, "t") as t:
                tile = group * tiles + (t + first)
                for start, repeats, k in blocks:
                    with loop(self.b, repeats, "k") as block:
                        self._multiply(
                            group * count + (block + start), number * count + (block + start),
                            tile * wide, parts, columns, k,
                        )  # fmt: skip
                self._evict(tile * wide, tile, parts, columns)

    def _streaming_group(self, rows: int, columns: int, group: Index, batch: Index) -> None:
        blocks = self._k_blocks()
        count = sum(trips for _, trips, _ in blocks)
        wide, tiles = ceil_div(columns, BANK), ceil_div(rows, PARTITIONS)
        sizes = [min(PARTITIONS, rows - at * PARTITIONS) for at in range(tiles)]
        base = group * (wide * tiles)
        for start, repeats, k in blocks:
            with loop(self.b, repeats, "k") as block:
                index = group * count + (block + start)
                still = index
                if self.stationary_fits:
                    still = batch * count + (block + start)
                else:
                    self._load(self.stationary, index, rows, k)
                self._load(self.moving, index, columns, k)
                for at, parts in enumerate(sizes):
                    self._multiply(still, index, base + at * wide, parts, columns, k)
        for at, parts in enumerate(sizes):
            self._evict(base + at * wide, group * tiles + at, parts, columns)

    def _multiply(
        self, still: Index, moved: Index, bank: Index, parts: int, columns: int, k: int
    ) -> None:
        """One k block into the PSUM banks of one output tile."""
        assert self.stationary.pool and self.moving.pool and self.acc
        for _, trips, rows in _segments(k, self.k_rows):
            with loop(self.b, trips, "i"):
                for chunk, width in enumerate(_widths(columns)):
                    self.b.nc_matmul(
                        self.acc[bank + chunk], stationary=self.stationary.pool[still],
                        moving=self.moving.pool[moved], k=rows, m=parts, n=width,
                        dtype=self.dtype, accumulate=True, double_row=rows > PARTITIONS,
                    )  # fmt: skip

    # -- data movement -------------------------------------------------------------------------
    def _load(self, side: Side, index: Index, free: int, k: int) -> None:
        """One block [k, free] of an operand into its pool."""
        assert side.pool
        size, b = side.dtype.itemsize, self.b
        if side.layout == "vector":
            b.load(side.pool[index], side.source, rows=min(k, PARTITIONS),
                   row_bytes=ceil_div(k, PARTITIONS) * size)  # fmt: skip
        elif side.layout == "k_major":
            pieces = ceil_div(free, min(free, side.run))
            b.load(side.pool[index], side.source, rows=k * pieces,
                   row_bytes=ceil_div(free, pieces) * size,
                   partitions=spread_over(min(k, PARTITIONS), k * pieces))  # fmt: skip
        elif side.layout == "scattered":
            b.load(side.pool[index], side.source, rows=k * free, row_bytes=size,
                   partitions=spread_over(min(k, PARTITIONS), k * free))  # fmt: skip
        elif not self._on_tensor_engine(side):
            pieces = ceil_div(k, min(k, side.run))
            rows = free * pieces
            b.load(side.pool[index], side.source, rows=rows, row_bytes=ceil_div(k, pieces) * size,
                   partitions=spread_over(min(k, PARTITIONS, rows), rows),
                   transpose=True)  # fmt: skip
        else:
            self._load_and_turn(side, index, free, k)

    def _load_and_turn(self, side: Side, index: Index, free: int, k: int) -> None:
        """Rows of `free` on partitions, then 128x128 transposes, four to a PSUM bank."""
        assert side.pool and side.natural and self.turned
        b, size = self.b, side.dtype.itemsize
        pieces = ceil_div(k, min(k, side.run))
        b.load(side.natural[index], side.source, rows=free * pieces,
               row_bytes=ceil_div(k, pieces) * size,
               partitions=spread_over(min(free, PARTITIONS), free * pieces))  # fmt: skip
        for _, trips, rows in _segments(k, PARTITIONS):
            with loop(b, trips, "i") as i:
                for chunk, width in enumerate(_widths(free)):
                    bank = self.turned[i + chunk]
                    for at in range(0, width, PARTITIONS):
                        b.nc_transpose(
                            bank, side.natural[index], partitions=min(PARTITIONS, width - at),
                            n=rows, dtype=side.dtype,
                        )  # fmt: skip
                    self._copy(side.pool[index], bank, width, rows, side.dtype)

    def _copy(self, dst: TileRef, src: TileRef, n: int, parts: int, dtype: torch.dtype) -> None:
        """PSUM to SBUF, on VectorE and ScalarE in turn."""
        self.evictions += 1
        given = {"n": n, "partitions": parts, "dtype": FP32}
        if self.evictions % 2:
            self.b.tensor_copy(dst, src, out_dtype=_other(dtype), **given)  # type: ignore[arg-type]
        else:
            self.b.activation(dst, src, op="copy", out_dtype=_other(dtype), **given)  # type: ignore[arg-type]

    def _evict(self, bank: Index, tile: Index, parts: int, columns: int) -> None:
        """An output tile from its PSUM banks to HBM."""
        assert self.acc and self.results
        if self.before is not None:
            self.before(parts, columns)
        result = self.results[tile]
        for chunk, width in enumerate(_widths(columns)):
            if self.finish is not None:
                self.finish(self.acc[bank + chunk], result, parts, width)
            else:
                dtype = FP32 if self.turn_output else self.out_dtype
                self._copy(result, self.acc[bank + chunk], width, parts, dtype)
        if self.turn_output:
            self._store_turned(result, tile, parts, columns)
            return
        pieces = ceil_div(columns, min(columns, self.out_run))
        rows = parts * pieces
        self.b.store(
            self.out, result, rows=rows,
            row_bytes=ceil_div(columns, pieces) * self.out_dtype.itemsize,
            partitions=spread_over(parts, rows), accumulate=self.accumulate_out,
        )  # fmt: skip

    def _store_turned(self, result: TileRef, tile: Index, parts: int, columns: int) -> None:
        """The result is [n, m] in HBM: turn each 128 columns, then store rows of m."""
        assert self.turned
        b = self.b
        for chunk, width in enumerate(_widths(columns)):
            blocks = ceil_div(width, PARTITIONS)
            for at in range(0, width, PARTITIONS):
                b.nc_transpose(self.turned[tile + chunk], result, partitions=parts,
                               n=min(PARTITIONS, width - at), dtype=FP32)  # fmt: skip
            self._copy(result, self.turned[tile + chunk], blocks * parts,
                       min(PARTITIONS, width), self.out_dtype)  # fmt: skip
        b.store(self.out, result, rows=columns, row_bytes=parts * self.out_dtype.itemsize)


def _other(dtype: torch.dtype) -> torch.dtype | None:
    return None if dtype == FP32 else dtype


def _segments(total: int, size: int) -> list[tuple[int, int, int]]:
    """(first index, count, size) of the full pieces of `total`, then of the rest."""
    full, rest = divmod(total, size)
    found = [(0, full, size)] if full else []
    return found + ([(full, 1, rest)] if rest else [])


def _widths(columns: int) -> list[int]:
    return [min(BANK, columns - at) for at in range(0, columns, BANK)]


__all__ = ["Gemm", "Side"]
