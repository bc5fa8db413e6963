"""Instructions that compute with where an element stands, and GpSimdE's gather and custom code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torch_trn.chip import CoreSpec
from torch_trn.isa.alu import operand
from torch_trn.isa.elementwise import Elementwise
from torch_trn.isa.instruction import Engine, Shape
from torch_trn.memory import Affine, Space

__all__ = ["AffineSelect", "CustomOp", "Indexed", "Iota", "LocalGather", "RangeSelect"]

_V = (Engine.VECTOR,)
_G = (Engine.GPSIMD,)


@dataclass(frozen=True, kw_only=True)
class Indexed(Elementwise):
    """What computes with where an element stands: ``base`` + ``channel`` x partition + steps.

    ``steps`` are (step, count) along the free dimension, outer first (default: 1 an element);
    ``base`` may depend on loop variables.
    """

    base: Affine = Affine()
    channel: int = 0
    steps: tuple[tuple[int, int], ...] | None = None

    def places(self) -> Tensor:
        """The index of every element, [partitions, n] int64, with ``base`` resolved."""
        assert not self.base.terms, "the executor resolves loop variables"
        index = torch.zeros(1, dtype=torch.int64)
        for step, count in self.steps or ((1, self.n),):
            index = (index[:, None] + step * torch.arange(count)).reshape(-1)
        rows = self.channel * torch.arange(self.partitions)
        return rows[:, None] + index + self.base.constant

    @property
    def attributes(self) -> str:
        steps = ",".join(f"{step}x{count}" for step, count in self.steps or ((1, self.n),))
        return f"{super().attributes} index={self.base}+{self.channel}p+[{steps}]"


@dataclass(frozen=True, kw_only=True)
class Iota(Indexed):
    """The index of each place: 150 + N on GpSimdE."""

    NAME: ClassVar[str] = "iota"
    ENGINES: ClassVar[tuple[Engine, ...]] = _G
    engine: Engine = Engine.GPSIMD
    sources: tuple[Space, ...] = ()

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        return (self.places(),)


@dataclass(frozen=True, kw_only=True)
class AffineSelect(Indexed):
    """The source where (index op 0), else the one operand, a number: 150 + N."""

    NAME: ClassVar[str] = "affine_select"
    ENGINES: ClassVar[tuple[Engine, ...]] = _G
    engine: Engine = Engine.GPSIMD

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        (fill,) = self.numbers(reads)
        kept = self.combine(self.op, self.places(), torch.tensor(0)) != 0
        return (torch.where(kept, reads[0], fill.to(reads[0].dtype)),)


@dataclass(frozen=True, kw_only=True)
class RangeSelect(Indexed):
    """The source where (index op0 bound 0) and (index op1 bound 1), else a number: N.

    The operands are the two bounds (numbers or small tiles) and the number.
    """

    NAME: ClassVar[str] = "range_select"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        low, high, fill = self.numbers(reads)
        first, second = self.op.split(",")
        index = self.places()
        kept = (self.combine(first, index, low) != 0) & (self.combine(second, index, high) != 0)
        return (torch.where(kept, reads[0], fill.to(reads[0].dtype)),)


@dataclass(frozen=True, kw_only=True)
class LocalGather(Elementwise):
    """n indices of ``elements_per_index`` elements each, gathered within SBUF on GpSimdE.

    150 + n e / C cycles with C = ((28 + 4e) / 4e) / min(4 / dtype bytes, e). What an index beyond
    the row gives is not documented; here it is all bits set, as in memory that nobody wrote.
    """

    NAME: ClassVar[str] = "local_gather"
    MOVES: ClassVar[bool] = True
    ENGINES: ClassVar[tuple[Engine, ...]] = _G
    N_MAX: ClassVar[int | None] = 4096
    engine: Engine = Engine.GPSIMD
    sources: tuple[Space, ...] = (Space.SBUF, Space.SBUF)
    elements_per_index: int = 1

    def cycles(self, core: CoreSpec) -> int:
        e = self.elements_per_index
        divisor_top, divisor_bottom = 28 + 4 * e, 4 * e
        packed = min(4 / self.dtype.itemsize, e)
        return -int(-(self.n * e * packed * divisor_bottom) // divisor_top)

    def read_shapes(self, count: int) -> tuple[Shape, ...]:
        e = self.elements_per_index
        return (
            (self.partitions, self.n * e, self.dtype),
            (self.partitions, self.n, torch.int32),
        )

    def write_shapes(self, count: int) -> tuple[Shape, ...]:
        return ((self.partitions, self.n * self.elements_per_index, self.result_dtype),)

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        data, index = reads
        rows = data.reshape(data.shape[0], -1, self.elements_per_index)
        where = index.to(torch.int64)
        beyond = (where < 0) | (where >= rows.shape[1])
        where = torch.where(beyond, 0, where)[:, :, None].expand(-1, -1, self.elements_per_index)
        result = rows.gather(1, where)
        if bool(beyond.any()):
            result[beyond] = torch.full((data.dtype.itemsize,), 255, dtype=torch.uint8).view(
                data.dtype
            )
        return (result.reshape(data.shape[0], -1),)


@dataclass(frozen=True, kw_only=True)
class CustomOp(Elementwise):
    """A user's C++ function on GpSimdE, of elements at the same place: ``cycles_each`` x N.

    ``op`` names the function ("lgamma", "bessel_j0"...) in torch.special or torch. Neuron's custom
    operators run such code on GpSimdE's eight processors, 128 lanes of 32 bits in all; what one
    function takes is not published (assumed).
    """

    NAME: ClassVar[str] = "custom_op"
    ENGINES: ClassVar[tuple[Engine, ...]] = _G
    engine: Engine = Engine.GPSIMD
    cycles_each: int = 64

    def cycles(self, core: CoreSpec) -> int:
        return self.cycles_each * self.n

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        name = self.op.removeprefix("special_")
        function = getattr(torch.special, name, None) or getattr(torch, name, None)
        if function is None:
            raise ValueError(f"custom_op {self.op!r}: neither torch.special nor torch has it")
        native = [x if not x.is_floating_point() else operand(x) for x in self.streams(reads)]
        numbers = [value for value in self.operands if value is not None]
        return (function(*native, *numbers),)
