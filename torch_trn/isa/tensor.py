"""Instructions of TensorE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torch_trn._sim import tile_matmul
from torch_trn.chip import CoreSpec
from torch_trn.isa.alu import operand
from torch_trn.isa.instruction import (
    Cost,
    Engine,
    Instruction,
    Shape,
    cycles_to_ps,
    require,
    short_name,
)  # fmt: skip
from torch_trn.memory import Affine

__all__ = ["NcMatmul", "NcTranspose"]

_MATMUL_DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int8,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)


@dataclass(frozen=True, kw_only=True)
class NcMatmul(Instruction):
    """TensorE: moving [k, n] times stationary [k, m] into PSUM [m, n], in fp32.

    Each column of the array adds its products from partition 0 on; the sum replaces what PSUM holds
    or, with ``accumulate``, is added to it. An affine ``accumulate`` adds where it is not zero, so
    that the first iteration of a loop replaces.

    max(64, n) cycles for each pass; with its weight load never less than ``matmul_pair_floor_ps``.
    fp32 takes ``pe_fp32_passes``, and so does int8 (O027: 3.8 times bf16), which has no path of its
    own; uint8 has one (K144, O028). ``double_row`` (fp8, v3 on) packs two rows in one: k up to 256.
    ``tile`` (rows, columns) uses a part of the array, and matmuls on other parts run beside it
    (arch2: halves; v3 on: quarters), so that each takes its part's share of the time.
    """

    NAME: ClassVar[str] = "nc_matmul"
    ENGINES: ClassVar[tuple[Engine, ...]] = (Engine.TENSOR,)

    k: int
    m: int
    n: int
    dtype: torch.dtype
    accumulate: bool | Affine = False
    double_row: bool = False
    tile: tuple[int, int] | None = None

    @property
    def flops(self) -> int:
        return 2 * self.k * self.m * self.n

    def check(self, core: CoreSpec) -> None:
        rows, columns = self.tile or (core.pe_rows, core.pe_columns)
        self._check_tile(core)
        rows *= 2 if self.double_row else 1
        require(self.dtype in _MATMUL_DTYPES, self.NAME, "dtype", self.dtype, "one TensorE reads")
        double = not self.double_row or (core.pe_fp8_factor > 1 and self.dtype.itemsize == 1)
        require(double, self.NAME, "double_row", self.double_row, "off: needs fp8 on trn2 or trn3")
        require(1 <= self.k <= rows, self.NAME, "k", self.k, f"1 to {rows} partitions")
        limit = f"1 to {columns} (stationary free size)"
        require(1 <= self.m <= columns, self.NAME, "m", self.m, limit)
        limit = f"1 to {core.matmul_moving_max} (moving free size)"
        require(1 <= self.n <= core.matmul_moving_max, self.NAME, "n", self.n, limit)

    def _check_tile(self, core: CoreSpec) -> None:
        if self.tile is None:
            return
        sizes = [core.pe_rows // parts for parts in (1, 2, 4) if parts <= core.pe_tiles]
        holds = all(size in sizes for size in self.tile)
        require(holds, self.NAME, "tile", self.tile, f"of sizes {', '.join(map(str, sizes))}")
        require(not self.double_row, self.NAME, "tile", self.tile, "None with double_row")

    def cost(self, core: CoreSpec) -> Cost:
        passes = core.pe_fp32_passes if self.dtype in (torch.float32, torch.int8) else 1
        cycles = max(core.min_interval_cycles, self.n) * passes
        rows, columns = self.tile or (core.pe_rows, core.pe_columns)
        parts = core.pe_rows * core.pe_columns // (rows * columns)
        reuse = cycles_to_ps(cycles, core.pe_hz * core.pe_sustained_factor * parts)
        occupancy = max(reuse, core.matmul_pair_floor_ps // parts)
        return Cost(occupancy, 0, occupancy, reuse)

    def read_shapes(self, count: int) -> tuple[Shape, ...]:
        packed = 2 if self.double_row else 1
        rows = -(-self.k // packed)
        return ((rows, packed * self.m, self.dtype), (rows, packed * self.n, self.dtype))

    def write_shapes(self, count: int) -> tuple[Shape, ...]:
        return ((self.m, self.n, torch.float32),)

    @property
    def reads_old(self) -> bool:
        return bool(self.accumulate)

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        # Double row: two rows of k in one partition.
        stationary, moving = (
            operand(x).reshape(-1, size).contiguous()
            for x, size in zip(reads, (self.m, self.n), strict=True)
        )
        total = torch.from_numpy(tile_matmul(stationary.numpy(), moving.numpy()))
        return (total if old is None else old + total,)

    @property
    def attributes(self) -> str:
        index = "" if isinstance(self.accumulate, bool) else f"={self.accumulate}"
        flags = f" accumulate{index}" if self.accumulate else ""
        flags += " double_row" * self.double_row
        flags += f" tile={self.tile[0]}x{self.tile[1]}" if self.tile else ""
        return f"k={self.k} m={self.m} n={self.n} {short_name(self.dtype)}{flags}"


@dataclass(frozen=True, kw_only=True)
class NcTranspose(Instruction):
    """[partitions, n] to [n, partitions]: on TensorE a matmul with the identity, into PSUM.

    TensorE: max(partitions, min(64, n)) cycles for each pass; VectorE: blocks of up to 32x32,
    max(64, n) cycles.
    """

    NAME: ClassVar[str] = "nc_transpose"
    ENGINES: ClassVar[tuple[Engine, ...]] = (Engine.TENSOR, Engine.VECTOR)

    partitions: int
    n: int
    dtype: torch.dtype
    engine: Engine = Engine.TENSOR

    @property
    def engine_of(self) -> Engine:
        return self.engine

    def check(self, core: CoreSpec) -> None:
        most = core.pe_rows if self.engine == Engine.TENSOR else core.sbuf_partitions
        holds = 1 <= self.partitions <= most
        require(holds, self.NAME, "partitions", self.partitions, f"1 to {most}")
        if self.engine == Engine.TENSOR:
            limit = f"1 to {core.pe_columns} on TensorE"
            require(1 <= self.n <= core.pe_columns, self.NAME, "n", self.n, limit)

    def cost(self, core: CoreSpec) -> Cost:
        if self.engine == Engine.VECTOR:
            cycles = max(core.min_interval_cycles, self.n) + core.vector_fixed_cycles
            occupancy = cycles_to_ps(cycles, core.vector_hz)
            return Cost(occupancy, 0, occupancy, occupancy)
        passes = core.pe_fp32_transpose_passes if self.dtype.itemsize == 4 else 1
        cycles = max(self.partitions, min(core.min_interval_cycles, self.n)) * passes
        reuse = cycles_to_ps(cycles, core.pe_hz * core.pe_sustained_factor)
        occupancy = max(reuse, core.matmul_pair_floor_ps)
        return Cost(occupancy, 0, occupancy, occupancy)

    def read_shapes(self, count: int) -> tuple[Shape, ...]:
        return ((self.partitions, self.n, self.dtype),)

    def write_shapes(self, count: int) -> tuple[Shape, ...]:
        return ((self.n, self.partitions, self.dtype),)

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        return (reads[0].t(),)

    @property
    def attributes(self) -> str:
        return f"partitions={self.partitions} n={self.n} {short_name(self.dtype)}"
