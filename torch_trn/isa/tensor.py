"""Instructions of TensorE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from torch_trn.chip import CoreSpec
from torch_trn.isa.instruction import Cost, Engine, Instruction, cycles_to_ps, require, short_name

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
    """TensorE: moving [k, n] times stationary [k, m] into PSUM [m, n].

    max(64, n) cycles for each pass; with its weight load never less than ``matmul_pair_floor_ps``.
    fp32 takes ``pe_fp32_passes``, and so does int8 (O027: 3.8 times bf16), which has no path of its
    own; uint8 has one (K144, O028). ``double_row`` (fp8, v3 on) packs two rows in one: k up to 256.
    """

    NAME: ClassVar[str] = "nc_matmul"
    ENGINES: ClassVar[tuple[Engine, ...]] = (Engine.TENSOR,)

    k: int
    m: int
    n: int
    dtype: torch.dtype
    accumulate: bool = False
    double_row: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.k * self.m * self.n

    def check(self, core: CoreSpec) -> None:
        rows = core.pe_rows * (2 if self.double_row else 1)
        require(self.dtype in _MATMUL_DTYPES, self.NAME, "dtype", self.dtype, "one TensorE reads")
        double = not self.double_row or (core.pe_fp8_factor > 1 and self.dtype.itemsize == 1)
        require(double, self.NAME, "double_row", self.double_row, "off: needs fp8 on trn2 or trn3")
        require(1 <= self.k <= rows, self.NAME, "k", self.k, f"1 to {rows} partitions")
        limit = f"1 to {core.pe_columns} (stationary free size)"
        require(1 <= self.m <= core.pe_columns, self.NAME, "m", self.m, limit)
        limit = f"1 to {core.matmul_moving_max} (moving free size)"
        require(1 <= self.n <= core.matmul_moving_max, self.NAME, "n", self.n, limit)

    def cost(self, core: CoreSpec) -> Cost:
        passes = core.pe_fp32_passes if self.dtype in (torch.float32, torch.int8) else 1
        cycles = max(core.min_interval_cycles, self.n) * passes
        reuse = cycles_to_ps(cycles, core.pe_hz * core.pe_sustained_factor)
        occupancy = max(reuse, core.matmul_pair_floor_ps)
        return Cost(occupancy, 0, occupancy, reuse)

    @property
    def attributes(self) -> str:
        flags = " accumulate" * self.accumulate + " double_row" * self.double_row
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

    @property
    def attributes(self) -> str:
        return f"partitions={self.partitions} n={self.n} {short_name(self.dtype)}"
