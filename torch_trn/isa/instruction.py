"""What every instruction is: an engine, limits, a cost in integer picoseconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from torch_trn.chip import CoreSpec

__all__ = ["Cost", "Engine", "Instruction", "Shape", "bytes_to_ps", "cycles_to_ps", "require",
           "short_name"]  # fmt: skip

Shape: TypeAlias = tuple[int, int, torch.dtype]
"""Partitions, elements in each, dtype."""

_PS = 10**12


class Engine(IntEnum):
    """An engine of a NeuronCore; ``str`` gives AWS's name."""

    TENSOR = 0
    VECTOR = 1
    SCALAR = 2
    GPSIMD = 3
    DMA = 4

    def __str__(self) -> str:
        return ("TensorE", "VectorE", "ScalarE", "GpSimdE", "DMA")[self.value]


@dataclass(frozen=True)
class Cost:
    """What one instruction costs, in picoseconds.

    ``occupancy_ps`` of its engine (of all DMA engines together for a DMA); results may be read by
    the same engine ``latency_ps`` later, by another after a semaphore. Its queue is held for
    ``queue_ps``. A matmul whose stationary operand is still loaded takes ``reuse_ps`` instead.
    """

    occupancy_ps: int
    latency_ps: int
    queue_ps: int
    reuse_ps: int


def cycles_to_ps(cycles: int, hz: float) -> int:
    """``cycles`` of a clock of ``hz`` in picoseconds, rounded to the nearest."""
    return round(cycles * _PS / hz)


def bytes_to_ps(nbytes: int, bytes_per_s: int) -> int:
    return -(-nbytes * _PS // bytes_per_s)


def require(holds: bool, name: str, what: str, value: object, limit: str) -> None:
    if not holds:
        raise ValueError(f"{name}: {what} is {value}, but must be {limit}")


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """What all instructions share: a name, the engine that runs it, a cost, a limit check."""

    NAME: ClassVar[str] = ""
    ENGINES: ClassVar[tuple[Engine, ...]] = ()

    def __post_init__(self) -> None:
        choices = " or ".join(str(engine) for engine in self.ENGINES)
        require(self.engine_of in self.ENGINES, self.NAME, "engine", str(self.engine_of), choices)

    @property
    def engine_of(self) -> Engine:
        """The engine that runs this instruction."""
        return self.ENGINES[0]

    @property
    def flops(self) -> int:
        """Multiplies and adds of the PE array; other engines count none, as in MFU."""
        return 0

    def check(self, core: CoreSpec) -> None:
        """Raises ValueError naming value and limit if ``core`` cannot run this instruction."""

    def cost(self, core: CoreSpec) -> Cost:
        """What the instruction costs on ``core``."""
        raise NotImplementedError

    def read_shapes(self, count: int) -> tuple[Shape, ...]:
        """Of ``count`` sources: what each is where its tile reference has no access pattern."""
        raise NotImplementedError

    def write_shapes(self, count: int) -> tuple[Shape, ...]:
        """Of ``count`` destinations, likewise."""
        raise NotImplementedError

    @property
    def reads_old(self) -> bool:
        """Whether the result depends on what the destination held."""
        return False

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        """The results, one for each destination, before they are rounded to its dtype.

        reads: [partitions, elements] of each source, in the dtype it is stored in.
        old: what the first destination held, if ``reads_old``.
        """
        raise NotImplementedError

    @property
    def attributes(self) -> str:
        """What the instruction's text shows after its name and operands."""
        return ""

    def __str__(self) -> str:
        return f"{self.NAME} {self.attributes}"


def short_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
