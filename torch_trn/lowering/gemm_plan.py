"""Sizes of a tiled matrix product: blocks, what stays in SBUF, what is turned once and copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.gemm_block import (
    BANK,
    M_GROUP,
    KBlock,
    Piece,
    Place,
    Side,
    Strategy,
    len_of,
    segments,
)
from torch_trn.lowering.layout import PARTITIONS, ceil_div
from torch_trn.lowering.matrix import Matrix
from torch_trn.memory import Index, Pool, TileRef
from torch_trn.program import Builder

#: Bytes per partition of tiles that wait to be turned: as many as hide the start of their DMA.
NATURAL_BYTES = 16384

#: SBUF bytes per partition left for what is not planned here.
SPARE_BYTES = 8192


@dataclass
class Plan:
    """One matrix product, `batch` times, and the sizes and pools that `plan` chooses for it.

    m, n, batch: this core's share. out: [m, n] in HBM; `turn_output` where it lies by columns.
    `finish(psum tile, out tile, place, column)` evicts one PSUM bank whose first column is `column`
    of the place; `before(place, tile number)` may load what it needs.
    """

    b: Builder
    core: CoreSpec
    m: int
    n: int
    k: int
    stationary: Side
    moving: Side
    out: Matrix
    batch: int = 1
    turn_output: bool = False
    strategy: Strategy = Strategy()
    clipped: bool = False
    """Whether another core's share is smaller, so that its last tiles hold less."""
    finish: Callable[[TileRef, TileRef, Place, int, int], None] | None = None
    before: Callable[[Place, Index], None] | None = None
    m_group: int = 0
    n_block: int = 0
    k_block: int = 0
    resident: bool = False
    kept: bool = False
    """Whether all of the stationary operand stays in SBUF beside a resident block."""
    stationary_fits: bool = False
    first_columns: int = 0
    """Columns of a first pass that turns the stationary operand for the others; 0: none."""
    first_rows: int = 0
    """Likewise rows of a first group, which turns (or, where resident, brings) the columns."""
    shared: bool = False
    """Whether tiles wait to be turned where later passes have results: half of the banks each."""
    acc: Pool | None = None
    turned: Pool | None = None
    results: Pool | None = None

    @property
    def dtype(self) -> torch.dtype:
        """dtype that TensorE multiplies."""
        return self.moving.dtype

    @property
    def out_dtype(self) -> torch.dtype:
        """dtype that results are stored with."""
        return self.out.dtype

    @property
    def sizes(self) -> tuple[object, ...]:
        """What tells one plan of a product from another."""
        turns = (self.stationary.on_array, self.moving.on_array)
        return (self.resident, self.kept, self.stationary_fits, self.shared, self.first_columns,
                self.first_rows, self.m_group, self.n_block, self.k_block, turns,
                self.turned.slots if self.turned else 0)  # fmt: skip

    @property
    def doubles(self) -> bool:
        """Whether two rows of k fit in one partition of a matmul."""
        double = self.dtype.itemsize == 1 and self.core.pe_fp8_factor > 1
        return double and self.dtype.is_floating_point

    def k_shape(self, rows: int) -> KBlock:
        """How `rows` of k lie on partitions."""
        tiles = ceil_div(rows, PARTITIONS)
        double = self.doubles and tiles > 1 and rows % 2 == 0
        return KBlock(rows, ceil_div(tiles, 2) * 2 if double else tiles, double)

    def k_blocks(self) -> list[Piece]:
        """The blocks of k that one load brings each."""
        return segments(self.k, self.k_block * PARTITIONS) if self.k else []

    def _even(self, tiles: int) -> int:
        """k tiles of a block: pairs where two share a partition."""
        return ceil_div(tiles, 2) * 2 if self.doubles and tiles > 1 else tiles

    def plan(self) -> None:
        """Choose block sizes and allocate the pools."""
        size, tiles = self.dtype.itemsize, self._even(max(1, ceil_div(self.k, PARTITIONS)))
        turning = [s for s in (self.stationary, self.moving) if s.on_array]
        waits = self.strategy.waiting if turning or self.turn_output else 0
        banks = self.b.psum_room_banks - waits
        room = self.b.sbuf_room_bytes - SPARE_BYTES
        self.k_block = min(tiles, self.strategy.k_tiles)
        self.m_group = min(self.m, self.strategy.rows)
        wanted = self.strategy.resident
        if ceil_div(self.m, PARTITIONS) > 4 if wanted is None else wanted:
            for per_block in (width for width in (4, 2, 1) if width <= self.strategy.banks):
                self.n_block = min(self.n, BANK * per_block)
                if 2 * ceil_div(self.n_block, BANK) > banks:
                    continue
                blocks = ceil_div(tiles, self.k_block) * self.k_block
                copies = 2 if self.n > self.n_block or self.batch > 1 else 1
                need = blocks * size * copies * self.n_block
                panel = blocks * size * self.m_group
                if need + 2 * panel + self._small(size) <= room:
                    self.resident = True
                    again = self.n > self.n_block and self.stationary.on_array
                    all_panels = ceil_div(self.m, self.m_group) * panel
                    self.kept = again and need + all_panels + self._small(size) <= room
                    break
        if not self.resident:
            self._plan_streaming(banks, room, size, tiles)
        self._plan_turns()
        self._pools(tiles, size, bool(turning))
        self._copies()

    def _plan_turns(self) -> None:
        """First passes, which turn what later passes need again."""
        still = self.stationary.on_array and self.n > self.n_block
        moves = self.moving.on_array and self.m > self.m_group
        if self.resident:
            self.first_columns = self.n_block if still else 0
            self.first_rows = self.m_group
            return
        still = still and not self.stationary_fits
        if still or moves:
            self.shared = self._shares_banks(still, moves)
            # Banks that a first pass leaves to the tiles that wait to be turned.
            part = 2 if self.shared else 1
            self.first_columns = self.n_block // part if still else 0
            self.first_rows = self.m_group // part if moves else 0

    def _shares_banks(self, still: bool, moves: bool) -> bool:
        """Whether later passes, which turn nothing, can take all of PSUM for their results."""
        turning = [s.on_array for s in (self.stationary, self.moving)]
        whole = self.m_group == M_GROUP and self.b.psum_room_banks == 2 * M_GROUP // PARTITIONS
        if not whole or self.turn_output or turning != [still, moves] or self.n < 4 * BANK:
            return False
        if self.dtype.itemsize > 2 or self.n_block != BANK:
            return False  # With fp32 the array is slow enough for the DMA as it is.
        self.n_block = 2 * BANK
        room = self.b.sbuf_room_bytes - SPARE_BYTES
        if self._streaming_bytes() <= room:
            return True
        self.n_block = BANK
        return False

    def _result_bytes(self) -> int:
        """Bytes of a result tile; one that is turned takes whole tiles of 128 columns, in fp32."""
        if self.turn_output:
            return ceil_div(self.n_block, PARTITIONS) * PARTITIONS * 4
        return self.n_block * self.out_dtype.itemsize

    def _panels_kept(self) -> int:
        """Stationary operands that fit whole and are in SBUF at a time."""
        return 1 if self.batch == 1 else 2

    def _streaming_bytes(self) -> int:
        """SBUF per partition that streaming takes with the sizes chosen so far."""
        blocks = 2
        if self.stationary_fits:
            blocks = ceil_div(self.k, PARTITIONS * self.k_block) * self._panels_kept()
        columns = blocks * self.m_group
        columns += 2 * self.n_block
        size = self.dtype.itemsize
        return self.k_block * size * columns + self._small(size)

    def _copies(self) -> None:
        """HBM for the turned panels of operands that are needed more than once."""
        groups = len_of(segments(self.m, self.m_group, self.first_rows))
        columns = len_of(segments(self.n, self.n_block, self.first_columns))
        for side, wanted, panels, free in (
            (self.stationary, self.first_columns and not self.kept, groups, self.m_group),
            (self.moving, self.first_rows and not self.resident, columns, self.n_block),
        ):
            if wanted:
                assert side.pool
                parts = panels * ceil_div(self.k, self.k_block * PARTITIONS)
                nbytes = self.k_block * PARTITIONS * free * side.dtype.itemsize
                side.copy = self.b.hbm(
                    f"{side.pool.name}_turned", nbytes=parts * nbytes, parts=parts
                )

    def _plan_streaming(self, banks: int, room: int, size: int, tiles: int) -> None:
        rows = ceil_div(self.m_group, PARTITIONS)
        wide = max(1, banks // rows)
        wide = wide // 2 if wide >= 2 and rows <= 2 else wide
        self.n_block = min(self.n, BANK * min(wide, 4))
        panel = tiles * size * self.m_group
        fits = panel * self._panels_kept() <= room // 3
        self.stationary_fits = fits and self.m <= self.m_group
        while True:
            least = 2 if self.doubles else 1
            if self._streaming_bytes() <= room or self.k_block <= least and self.n_block <= BANK:
                return
            if self.k_block > least:
                self.k_block = self._even(ceil_div(self.k_block, 2))
            else:
                self.n_block = max(BANK, self.n_block // 2)

    def _small(self, size: int) -> int:
        """Bytes of result tiles and of tiles that wait to be turned."""
        total = 2 * self._result_bytes()
        for side, free in ((self.stationary, self.m_group), (self.moving, self.n_block)):
            if side.on_array:
                each = ceil_div(free, PARTITIONS) * self.k_block * PARTITIONS * size
                total += max(2 * each, NATURAL_BYTES)
        return total

    def _pools(self, tiles: int, size: int, turning: bool) -> None:
        b = self.b
        blocks = ceil_div(tiles, self.k_block)
        rows = ceil_div(self.m_group, PARTITIONS)
        wide = ceil_div(self.n_block, BANK)
        many = self.n > self.n_block or self.batch > 1
        deep = self._depth(blocks, size)
        moving = blocks * (2 if many else 1) if self.resident else deep
        stationary = 2 * blocks if self.resident else deep
        if self.kept:
            stationary = ceil_div(self.m, self.m_group) * blocks
        if self.stationary_fits:
            stationary = blocks * self._panels_in_flight(blocks, size)
        for side, free, slots, name in (
            (self.stationary, self.m_group, stationary, "stationary"),
            (self.moving, self.n_block, moving, "moving"),
        ):
            side.pool = b.sbuf(name, free_bytes=self.k_block * free * size, slots=slots)
            if side.on_array:
                nbytes = ceil_div(free, PARTITIONS) * self.k_block * PARTITIONS * size
                side.natural = b.sbuf(f"{name}_natural", free_bytes=nbytes,
                                      slots=max(2, min(8, NATURAL_BYTES // nbytes)))  # fmt: skip
        slots = wide if self.resident else wide * rows
        waiting = self.strategy.waiting if turning or self.turn_output else 0
        if self.shared:
            slots = waiting = slots // 2
        # Where there are banks left, an output tile leaves its banks while the next takes others.
        slots = slots if self.shared else min(2 * slots, b.psum_room_banks - waiting)
        self.acc = b.psum("acc", free_bytes=BANK * 4, slots=slots)
        if waiting:
            self.turned = b.psum("turned", free_bytes=BANK * 4, slots=waiting)
        width = self._result_bytes()
        deep = 4 if 4 * width <= b.sbuf_room_bytes else 2
        self.results = b.sbuf("result", free_bytes=width, slots=deep)

    def _panels_in_flight(self, blocks: int, size: int) -> int:
        """Slots for whole stationary operands: of a batch, as many as half of the room takes."""
        if self.batch == 1:
            return 1
        panel = blocks * self.m_group
        each = self.k_block * size * (self.n_block + panel)
        room = self.b.sbuf_room_bytes - SPARE_BYTES - self._small(size)
        return max(self._panels_kept(), min(8, room // 2 // max(each, 1)))

    def _depth(self, blocks: int, size: int) -> int:
        """Blocks in flight while streaming: enough small ones to hide the DMA's start."""
        kept = self.m_group
        moving = self.n_block
        room = self.b.sbuf_room_bytes - SPARE_BYTES - self._small(size)
        if self.stationary_fits:
            room -= self.k_block * size * blocks * self._panels_kept() * kept
            kept = 0
        each = self.k_block * size * (moving + kept)
        # Half of the room, and at least the two that streaming was planned with.
        room //= 2
        return max(2, min(8, room // max(each, 1)))
