"""Instructions of MX data (v4 on): fp8 elements with one power-of-two scale for each 32 of them.

Four rows of k share a partition, so a tile holds 512 of them; 32 neighbours in k (8 partitions x 4)
share a scale, a byte e with the value 2^(e - 127) (arch4; OCP microscaling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torch_trn.chip import CoreSpec
from torch_trn.isa.elementwise import Elementwise
from torch_trn.isa.instruction import Cost, Engine, Instruction, Shape, cycles_to_ps, require
from torch_trn.isa.tensor import NcMatmul
from torch_trn.memory import Affine

__all__ = ["NcMatmulMx", "QuantizeMx"]

_MX_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_PACKED = 4
_BLOCK_PARTITIONS = 8
_BLOCK = _PACKED * _BLOCK_PARTITIONS


def _scaled(data: Tensor, scales: Tensor, free: int) -> Tensor:
    """[k, free] in fp32 of packed data [partitions, free x 4] and scales [partitions / 8, free]."""
    values = data.to(torch.float32).reshape(data.shape[0], free, _PACKED).transpose(1, 2)
    factors = torch.exp2(scales.to(torch.float32) - 127.0)
    by_row = factors.repeat_interleave(_BLOCK_PARTITIONS, 0)[: data.shape[0], None, :]
    return (values * by_row).reshape(-1, free)


@dataclass(frozen=True, kw_only=True)
class NcMatmulMx(Instruction):
    """TensorE: MX moving [k, n] times MX stationary [k, m] into PSUM, k up to 512.

    Sources are stationary, moving, their scales. It takes as long as a bf16 matmul of k / 4
    (arch4).
    """

    NAME: ClassVar[str] = "nc_matmul_mx"
    ENGINES: ClassVar[tuple[Engine, ...]] = (Engine.TENSOR,)

    k: int
    m: int
    n: int
    dtype: torch.dtype
    accumulate: bool | Affine = False

    @property
    def flops(self) -> int:
        return 2 * self.k * self.m * self.n

    def check(self, core: CoreSpec) -> None:
        require(core.pe_mx, self.NAME, "core", core.name, "one with MX matmuls: NeuronCore-v4")
        require(self.dtype in _MX_DTYPES, self.NAME, "dtype", self.dtype, "float8_e4m3fn or e5m2")
        most = core.pe_rows * _PACKED
        holds = 1 <= self.k <= most and self.k % _BLOCK == 0
        require(holds, self.NAME, "k", self.k, f"a multiple of {_BLOCK} up to {most}")
        require(1 <= self.m <= core.pe_columns, self.NAME, "m", self.m, f"1 to {core.pe_columns}")
        require(1 <= self.n <= 512, self.NAME, "n", self.n, "1 to 512 (moving free size)")

    def cost(self, core: CoreSpec) -> Cost:
        cycles = max(core.min_interval_cycles, self.n)
        reuse = cycles_to_ps(cycles, core.pe_hz * core.pe_sustained_factor)
        occupancy = max(reuse, core.matmul_pair_floor_ps)
        return Cost(occupancy, 0, occupancy, reuse)

    def read_shapes(self, count: int) -> tuple[Shape, ...]:
        rows, blocks = self.k // _PACKED, self.k // _BLOCK
        return (
            (rows, self.m * _PACKED, self.dtype),
            (rows, self.n * _PACKED, self.dtype),
            (blocks, self.m, torch.uint8),
            (blocks, self.n, torch.uint8),
        )

    def write_shapes(self, count: int) -> tuple[Shape, ...]:
        return ((self.m, self.n, torch.float32),)

    @property
    def reads_old(self) -> bool:
        return bool(self.accumulate)

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        plain = NcMatmul(
            k=self.k, m=self.m, n=self.n, dtype=torch.float32, accumulate=self.accumulate
        )
        stationary, moving, left, right = reads
        return plain.run([_scaled(stationary, left, self.m), _scaled(moving, right, self.n)], old)

    @property
    def attributes(self) -> str:
        index = "" if isinstance(self.accumulate, bool) else f"={self.accumulate}"
        flags = f" accumulate{index}" if self.accumulate else ""
        return f"k={self.k} m={self.m} n={self.n} {str(self.dtype).removeprefix('torch.')}{flags}"


@dataclass(frozen=True, kw_only=True)
class QuantizeMx(Elementwise):
    """VectorE: [partitions, n] with four neighbours of k next to each other becomes MX data.

    Results are the fp8 data and, for each 8 partitions, n / 4 scales. A block's scale is the power
    of two that brings its largest value just below the largest of the dtype (OCP). 4 elements a
    cycle and partition (arch4).
    """

    NAME: ClassVar[str] = "quantize_mx"
    ENGINES: ClassVar[tuple[Engine, ...]] = (Engine.VECTOR,)
    engine: Engine = Engine.VECTOR
    out_dtype: torch.dtype | None = torch.float8_e4m3fn

    def check(self, core: CoreSpec) -> None:
        super().check(core)
        require(core.pe_mx, self.NAME, "core", core.name, "one with MX data: NeuronCore-v4")
        require(self.n % _PACKED == 0, self.NAME, "n", self.n, "a multiple of 4")
        whole = self.partitions % _BLOCK_PARTITIONS == 0
        require(whole, self.NAME, "partitions", self.partitions, "a multiple of 8")
        require(self.result_dtype in _MX_DTYPES, self.NAME, "out_dtype", self.result_dtype,
                "float8_e4m3fn or float8_e5m2")  # fmt: skip

    def cycles(self, core: CoreSpec) -> int:
        return -(-self.n // 4)

    def write_shapes(self, count: int) -> tuple[Shape, ...]:
        blocks = self.partitions // _BLOCK_PARTITIONS
        return (
            (self.partitions, self.n, self.result_dtype),
            (blocks, self.n // _PACKED, torch.uint8),
        )

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        x = reads[0].to(torch.float32)
        blocks = x.reshape(-1, _BLOCK_PARTITIONS, self.n // _PACKED, _PACKED)
        largest = blocks.abs().amax((1, 3))
        # The exponent of the largest value of the dtype: 8 of E4M3 (448), 15 of E5M2 (57344).
        top = 8 if self.result_dtype == torch.float8_e4m3fn else 15
        exponent = torch.frexp(largest).exponent - 1 - top
        scales = torch.where(largest > 0, exponent, 0).clamp(-127, 127) + 127
        factors = torch.exp2(127.0 - scales)[:, None, :, None]
        limit = torch.finfo(self.result_dtype).max
        return (blocks * factors).clamp(-limit, limit).reshape(x.shape), scales.to(torch.uint8)
