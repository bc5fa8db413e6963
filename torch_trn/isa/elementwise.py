"""The base of the instructions that pass once over a free dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from torch_trn.chip import CoreSpec
from torch_trn.isa.alu import alu
from torch_trn.isa.instruction import (
    Cost,
    Engine,
    Instruction,
    Shape,
    cycles_to_ps,
    require,
    short_name,
)  # fmt: skip
from torch_trn.memory import Space

__all__ = ["Elementwise", "Number"]

Number: TypeAlias = int | float | bool

_SIXTEEN_BIT = (torch.bfloat16, torch.float16)
# arch2: engines compute in fp32 (integers in 32 bits; 64-bit ones are cast down).
_TOO_WIDE = {torch.float64, torch.complex128}


@dataclass(frozen=True, kw_only=True)
class Elementwise(Instruction):
    """One pass over n elements in each partition, on VectorE, ScalarE or GpSimdE.

    ``sources`` and ``destination`` are the memories of the operands; ``strided`` says that a free
    dimension has a stride over 16 bytes, which halves the memory ports' rate (arch2). ``operands``
    are the numbers that ``op`` works with beside the sources, in order; None stands for a small
    tile (one element a partition, or as many as n) that is read after the first source.
    """

    N_MAX: ClassVar[int | None] = None
    MOVES: ClassVar[bool] = False
    """Moves bits without arithmetic, so that any dtype will do."""

    n: int
    partitions: int = 128
    dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype | None = None
    op: str = ""
    engine: Engine
    sources: tuple[Space, ...] = (Space.SBUF,)
    destination: Space = Space.SBUF
    strided: bool = False
    operands: tuple[Number | None, ...] = ()

    @property
    def engine_of(self) -> Engine:
        return self.engine

    @property
    def result_dtype(self) -> torch.dtype:
        """The destination's dtype."""
        return self.out_dtype or self.dtype

    def check(self, core: CoreSpec) -> None:
        limit = f"1 to {core.sbuf_partitions}"
        require(
            1 <= self.partitions <= core.sbuf_partitions,
            self.NAME, "partitions", self.partitions, limit,
        )  # fmt: skip
        psum = Space.PSUM in (*self.sources, self.destination)
        # arch2: a free size of at most 64K elements in SBUF and 4K in PSUM.
        most = self.N_MAX or (4096 if psum else 65536)
        wide = {self.dtype, self.result_dtype} & _TOO_WIDE
        require(
            self.MOVES or not wide, self.NAME, "dtype", self.dtype, "of 32 bits a number or fewer"
        )
        require(1 <= self.n <= most, self.NAME, "n", self.n, f"1 to {most} per partition")
        if self.engine == Engine.GPSIMD:
            require(not psum, self.NAME, "operand space", "PSUM", "SBUF: GpSimdE has no PSUM port")

    def cycles(self, core: CoreSpec) -> int:
        """Cycles for the elements, without floor and fixed part."""
        return self.n

    def extra_cycles(self, core: CoreSpec) -> int:
        """Cycles of a second, trailing instruction that is part of this one."""
        return 0

    def cost(self, core: CoreSpec) -> Cost:
        hz, fixed, dependent = _engine_constants(self.engine, core)
        elements = self.cycles(core) * (2 if self.strided else 1)
        floor = core.min_interval_cycles if self.engine != Engine.GPSIMD else 0
        cycles = max(floor, elements) + fixed + self.extra_cycles(core)
        occupancy = cycles_to_ps(cycles, hz)
        return Cost(occupancy, cycles_to_ps(dependent, hz), occupancy, occupancy)

    def read_shapes(self, count: int) -> tuple[Shape, ...]:
        small = self.operands.count(None)
        rest = max(0, count - 1 - small)
        streamed = (self.partitions, self.n, self.dtype)
        tiles = ((self.partitions, 1, torch.float32),) * small
        return ((streamed, *tiles) + (streamed,) * rest)[:count]

    def write_shapes(self, count: int) -> tuple[Shape, ...]:
        first = (self.partitions, self.n, self.result_dtype)
        return (first, *((self.partitions, 1, torch.float32),) * (count - 1))

    def numbers(self, reads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The operands as tensors: numbers, and the tiles that stand for them."""
        tiles = iter(reads[1:])
        return tuple(
            next(tiles) if value is None else torch.tensor(value) for value in self.operands
        )

    def streams(self, reads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The sources without the small tiles."""
        return (reads[0], *reads[1 + self.operands.count(None) :])

    def combine(self, op: str, a: Tensor, b: Tensor) -> Tensor:
        """``a op b`` on this engine."""
        return alu(op, a, b, native_integers=self.engine == Engine.GPSIMD)

    @property
    def attributes(self) -> str:
        op = f"{self.op} " if self.op else ""
        to = f"->{short_name(self.out_dtype)}" if self.out_dtype else ""
        if self.operands:
            values = ", ".join("_" if v is None else f"{v:.9g}" for v in self.operands)
            op += f"({values}) "
        rows = f" partitions={self.partitions}" if self.partitions != 128 else ""
        return f"{op}n={self.n}{rows} {short_name(self.dtype)}{to} {self.engine}"

    def sixteen_bit(self) -> bool:
        """Whether sources and destination are bf16 or fp16, which the fast modes need."""
        return self.dtype in _SIXTEEN_BIT and self.result_dtype in _SIXTEEN_BIT

    def copy_cycles(self, core: CoreSpec) -> int:
        """Cycles of tensor_copy and tensor_scalar: 16-bit data has a faster mode from v3 on."""
        if not self.sixteen_bit() or self.engine == Engine.GPSIMD:
            return self.n
        if self.engine == Engine.SCALAR:
            return -(-self.n // core.scalar_copy_factor)
        psum = Space.PSUM in (*self.sources, self.destination)
        factor = core.vector_copy_factor
        # arch3: the 4x mode needs both ends in SBUF and contiguous; else 2x. ``cost`` doubles a
        # strided instruction, so the full factor here leaves it the documented half.
        return -(-self.n // (max(1, factor // 2) if psum else factor))


def _engine_constants(engine: Engine, core: CoreSpec) -> tuple[int, int, int]:
    """Clock, fixed cycles and dependent latency cycles of ``engine``."""
    if engine == Engine.VECTOR:
        return core.vector_hz, core.vector_fixed_cycles, 0
    if engine == Engine.SCALAR:
        return core.scalar_hz, core.scalar_fixed_cycles, core.scalar_dependent_cycles
    return core.gpsimd_hz, core.gpsimd_fixed_cycles, 0
