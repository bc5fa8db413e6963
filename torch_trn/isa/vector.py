"""Instructions of VectorE (some of which ScalarE and GpSimdE run too): arithmetic and copies.

Each class states its cycles for n elements per partition; floor and fixed cycles are the base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torch_trn.chip import CoreSpec
from torch_trn.isa.alu import FOLDS, operand
from torch_trn.isa.elementwise import Elementwise, Number
from torch_trn.isa.instruction import Engine, Shape
from torch_trn.memory import Space

__all__ = [
    "Memset",
    "Reciprocal",
    "ScalarTensorTensor",
    "Select",
    "TensorCopy",
    "TensorCopyPredicated",
    "TensorReduce",
    "TensorScalar",
    "TensorScalarReduce",
    "TensorTensor",
    "TensorTensorScan",
]

_V = (Engine.VECTOR,)
_VG = (Engine.VECTOR, Engine.GPSIMD)
_VSG = (Engine.VECTOR, Engine.SCALAR, Engine.GPSIMD)

_ANY_DTYPE_FAST_OPS = ("add", "multiply", "subtract")


def _half(n: int) -> int:
    return -(-n // 2)


@dataclass(frozen=True, kw_only=True)
class TensorScalar(Elementwise):
    """One or two operators with a per-partition or constant operand: N, less for 16-bit data."""

    NAME: ClassVar[str] = "tensor_scalar"
    ENGINES: ClassVar[tuple[Engine, ...]] = _VSG
    engine: Engine = Engine.VECTOR

    def cycles(self, core: CoreSpec) -> int:
        return self.copy_cycles(core)

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        x = reads[0]
        names = self.op.split(",")
        if len(names) != len(self.operands):
            raise ValueError(f"tensor_scalar {self.op} has {len(self.operands)} operands")
        for name, value in zip(names, self.numbers(reads), strict=True):
            x = self.combine(name, x, value)
        return (x,)


@dataclass(frozen=True, kw_only=True)
class TensorScalarReduce(TensorScalar):
    """tensor_scalar that also reduces along the free dimension: 64 cycles more, no fast mode."""

    NAME: ClassVar[str] = "tensor_scalar_reduce"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V

    def cycles(self, core: CoreSpec) -> int:
        return self.n

    def extra_cycles(self, core: CoreSpec) -> int:
        return core.min_interval_cycles

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        (result,) = super().run(reads)
        return result, FOLDS["add"](operand(result)).unsqueeze(-1)


@dataclass(frozen=True, kw_only=True)
class TensorTensor(Elementwise):
    """source 0 op source 1.

    N with one source in PSUM; N from SBUF if all bf16 and add, subtract or multiply (v3 on: a
    further 2x for any 16-bit data); else 2N, since both streams come through one SBUF port.
    """

    NAME: ClassVar[str] = "tensor_tensor"
    ENGINES: ClassVar[tuple[Engine, ...]] = _VG
    engine: Engine = Engine.VECTOR
    sources: tuple[Space, ...] = (Space.SBUF, Space.SBUF)

    def cycles(self, core: CoreSpec) -> int:
        if set(self.sources) == {Space.PSUM, Space.SBUF}:
            return self.n
        plain = self.dtype == self.result_dtype == torch.bfloat16 or (
            self.sixteen_bit() and core.vector_tensor_tensor_factor > 1
        )
        in_sbuf = Space.PSUM not in self.sources and not self.strided
        fast = plain and in_sbuf and self.op in _ANY_DTYPE_FAST_OPS
        cycles = self.n if fast else 2 * self.n
        if self.engine == Engine.VECTOR and self.sixteen_bit() and in_sbuf:
            return -(-cycles // core.vector_tensor_tensor_factor)
        return cycles

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        return (self.combine(self.op, reads[0], reads[1]),)


@dataclass(frozen=True, kw_only=True)
class ScalarTensorTensor(Elementwise):
    """(source 0 op scalar) op source 1: 2N; N for bf16 subtract-then-multiply of even N."""

    NAME: ClassVar[str] = "scalar_tensor_tensor"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR
    sources: tuple[Space, ...] = (Space.SBUF, Space.SBUF)

    def cycles(self, core: CoreSpec) -> int:
        bf16 = self.dtype == self.result_dtype == torch.bfloat16
        fast = bf16 and self.op == "subtract,multiply" and self.n % 2 == 0
        return self.n if fast else 2 * self.n

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        x, y = self.streams(reads)
        first, second = self.op.split(",")
        (scalar,) = self.numbers(reads)
        return (self.combine(second, self.combine(first, x, scalar), y),)


@dataclass(frozen=True, kw_only=True)
class TensorTensorScan(Elementwise):
    """A running combination along the free dimension: 2N.

    result[i] = (result[i - 1] op0 source 0[i]) op1 source 1[i], starting from the one operand, a
    number or a small tile. With one op, source 1 is not used.
    """

    NAME: ClassVar[str] = "tensor_tensor_scan"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR
    sources: tuple[Space, ...] = (Space.SBUF, Space.SBUF)

    def cycles(self, core: CoreSpec) -> int:
        return 2 * self.n

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        first, _, second = self.op.partition(",")
        streams = [operand(x) for x in self.streams(reads)]
        (initial,) = self.numbers(reads)
        running = operand(initial).expand(reads[0].shape[0], 1)[:, 0]
        columns = []
        for at in range(self.n):
            running = self.combine(first, running, streams[0][:, at])
            if second:
                running = self.combine(second, running, streams[1][:, at])
            columns.append(running)
        return (torch.stack(columns, 1),)


@dataclass(frozen=True, kw_only=True)
class TensorReduce(Elementwise):
    """A reduction of each of ``groups`` runs along the free dimension: N, half of it for bf16 add
    or max.
    """

    NAME: ClassVar[str] = "tensor_reduce"
    ENGINES: ClassVar[tuple[Engine, ...]] = _VG
    engine: Engine = Engine.VECTOR
    groups: int = 1

    def cycles(self, core: CoreSpec) -> int:
        bf16 = self.dtype == self.result_dtype == torch.bfloat16
        fast = bf16 and self.op in ("add", "max") and self.engine == Engine.VECTOR
        return _half(self.n) if fast else self.n

    def write_shapes(self, count: int) -> tuple[Shape, ...]:
        return ((self.partitions, self.groups, self.result_dtype),)

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        if self.op not in FOLDS:
            raise ValueError(f"no engine reduces by {self.op!r}; they do by: {', '.join(FOLDS)}")
        x = reads[0].reshape(reads[0].shape[0], self.groups, -1)
        native = self.engine == Engine.GPSIMD and not x.is_floating_point()
        return (FOLDS[self.op](x.to(torch.int64) if native else operand(x)),)


@dataclass(frozen=True, kw_only=True)
class TensorCopy(Elementwise):
    """A copy with a free cast: N, less for 16-bit data."""

    NAME: ClassVar[str] = "tensor_copy"
    MOVES: ClassVar[bool] = True
    ENGINES: ClassVar[tuple[Engine, ...]] = _VSG
    engine: Engine = Engine.VECTOR

    def cycles(self, core: CoreSpec) -> int:
        return self.copy_cycles(core)

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        return (reads[0],)


@dataclass(frozen=True, kw_only=True)
class TensorCopyPredicated(Elementwise):
    """A copy where a predicate holds: N if source and predicate differ in memory, else 2N."""

    NAME: ClassVar[str] = "tensor_copy_predicated"
    MOVES: ClassVar[bool] = True
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR
    sources: tuple[Space, ...] = (Space.SBUF, Space.SBUF)

    def cycles(self, core: CoreSpec) -> int:
        return self.n if len(set(self.sources)) > 1 else 2 * self.n

    @property
    def reads_old(self) -> bool:
        return True

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        assert old is not None
        return (torch.where(reads[1] != 0, reads[0].to(old.dtype), old),)


@dataclass(frozen=True, kw_only=True)
class Select(Elementwise):
    """on_true where a predicate holds, else on_false: 2N (assumed, as a predicated copy)."""

    NAME: ClassVar[str] = "select"
    MOVES: ClassVar[bool] = True
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR
    sources: tuple[Space, ...] = (Space.SBUF, Space.SBUF, Space.SBUF)

    def cycles(self, core: CoreSpec) -> int:
        return 2 * self.n

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        mask, on_true, on_false = reads
        return (torch.where(mask != 0, on_true, on_false),)


@dataclass(frozen=True, kw_only=True)
class Reciprocal(Elementwise):
    """1 / source: 2.4N, read off K048; the printed 8N does not fit that kernel.

    Its ScalarE time is that of an exp and an add, so VectorE's 2,463 cycles for 512 elements are
    one product (2N) and one reciprocal.
    """

    NAME: ClassVar[str] = "reciprocal"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR

    def cycles(self, core: CoreSpec) -> int:
        return -(-12 * self.n // 5)

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        return (torch.reciprocal(operand(reads[0])),)


@dataclass(frozen=True, kw_only=True)
class Memset(Elementwise):
    """The one operand, a number; zero in 16 bits takes N / 2, all else N."""

    NAME: ClassVar[str] = "memset"
    MOVES: ClassVar[bool] = True
    ENGINES: ClassVar[tuple[Engine, ...]] = _VG
    engine: Engine = Engine.VECTOR
    sources: tuple[Space, ...] = ()
    operands: tuple[Number | None, ...] = (0.0,)

    def cycles(self, core: CoreSpec) -> int:
        zero = self.operands == (0,)
        return _half(self.n) if zero and self.sixteen_bit() else self.n

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        (value,) = self.operands
        assert value is not None
        kind = torch.int64 if isinstance(value, int) else torch.float32
        return (torch.full((self.partitions, self.n), value, dtype=kind),)
