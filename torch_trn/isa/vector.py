"""Instructions of VectorE, ScalarE and GpSimdE.

Each class states its cycles for n elements per partition; floor and fixed cycles are the base's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from torch_trn.chip import CoreSpec
from torch_trn.isa.elementwise import Elementwise
from torch_trn.isa.instruction import Engine, require
from torch_trn.memory import Space

__all__ = [
    "Activation",
    "ActivationReduce",
    "AffineSelect",
    "BnAggr",
    "BnStats",
    "Dropout",
    "Iota",
    "LocalGather",
    "Max8",
    "Memset",
    "NcFindIndex8",
    "NcMatchReplace8",
    "NcStreamShuffle",
    "RangeSelect",
    "Reciprocal",
    "Rng",
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
_S = (Engine.SCALAR,)
_G = (Engine.GPSIMD,)
_VG = (Engine.VECTOR, Engine.GPSIMD)
_VSG = (Engine.VECTOR, Engine.SCALAR, Engine.GPSIMD)

_ANY_DTYPE_FAST_OPS = ("add", "multiply", "subtract")


def _half(n: int) -> int:
    return -(-n // 2)


@dataclass(frozen=True, kw_only=True)
class Activation(Elementwise):
    """func(source x scale + bias): N cycles; scale and bias are free."""

    NAME: ClassVar[str] = "activation"
    ENGINES: ClassVar[tuple[Engine, ...]] = _S
    engine: Engine = Engine.SCALAR


@dataclass(frozen=True, kw_only=True)
class ActivationReduce(Activation):
    """activation that also sums along the free dimension: 64 cycles more to read the sum."""

    NAME: ClassVar[str] = "activation_reduce"

    def extra_cycles(self, core: CoreSpec) -> int:
        return core.min_interval_cycles


@dataclass(frozen=True, kw_only=True)
class TensorScalar(Elementwise):
    """One or two operators with a per-partition or constant operand: N, less for 16-bit data."""

    NAME: ClassVar[str] = "tensor_scalar"
    ENGINES: ClassVar[tuple[Engine, ...]] = _VSG
    engine: Engine = Engine.VECTOR

    def cycles(self, core: CoreSpec) -> int:
        return self.copy_cycles(core)


@dataclass(frozen=True, kw_only=True)
class TensorScalarReduce(TensorScalar):
    """tensor_scalar that also reduces along the free dimension: 64 cycles more, no fast mode."""

    NAME: ClassVar[str] = "tensor_scalar_reduce"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V

    def cycles(self, core: CoreSpec) -> int:
        return self.n

    def extra_cycles(self, core: CoreSpec) -> int:
        return core.min_interval_cycles


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


@dataclass(frozen=True, kw_only=True)
class TensorTensorScan(Elementwise):
    """A running combination along the free dimension: 2N."""

    NAME: ClassVar[str] = "tensor_tensor_scan"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR
    sources: tuple[Space, ...] = (Space.SBUF, Space.SBUF)

    def cycles(self, core: CoreSpec) -> int:
        return 2 * self.n


@dataclass(frozen=True, kw_only=True)
class TensorReduce(Elementwise):
    """A reduction along the free dimension: N, half of it for bf16 add or max."""

    NAME: ClassVar[str] = "tensor_reduce"
    ENGINES: ClassVar[tuple[Engine, ...]] = _VG
    engine: Engine = Engine.VECTOR

    def cycles(self, core: CoreSpec) -> int:
        bf16 = self.dtype == self.result_dtype == torch.bfloat16
        fast = bf16 and self.op in ("add", "max") and self.engine == Engine.VECTOR
        return _half(self.n) if fast else self.n


@dataclass(frozen=True, kw_only=True)
class TensorCopy(Elementwise):
    """A copy with a free cast: N, less for 16-bit data."""

    NAME: ClassVar[str] = "tensor_copy"
    MOVES: ClassVar[bool] = True
    ENGINES: ClassVar[tuple[Engine, ...]] = _VSG
    engine: Engine = Engine.VECTOR

    def cycles(self, core: CoreSpec) -> int:
        return self.copy_cycles(core)


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


@dataclass(frozen=True, kw_only=True)
class BnStats(Elementwise):
    """Count, mean and variance of up to 512 elements per partition: N."""

    NAME: ClassVar[str] = "bn_stats"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    N_MAX: ClassVar[int | None] = 512
    engine: Engine = Engine.VECTOR


@dataclass(frozen=True, kw_only=True)
class BnAggr(Elementwise):
    """Combines bn_stats results, N elements of them: 13 N / 3."""

    NAME: ClassVar[str] = "bn_aggr"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR

    def cycles(self, core: CoreSpec) -> int:
        return -(-13 * self.n // 3)


@dataclass(frozen=True, kw_only=True)
class Memset(Elementwise):
    """A constant; op "zero" in 16 bits takes N / 2, all else N."""

    NAME: ClassVar[str] = "memset"
    MOVES: ClassVar[bool] = True
    ENGINES: ClassVar[tuple[Engine, ...]] = _VG
    engine: Engine = Engine.VECTOR
    sources: tuple[Space, ...] = ()

    def cycles(self, core: CoreSpec) -> int:
        return _half(self.n) if self.op == "zero" and self.sixteen_bit() else self.n


@dataclass(frozen=True, kw_only=True)
class Iota(Elementwise):
    """Affine integers: 150 + N on GpSimdE."""

    NAME: ClassVar[str] = "iota"
    ENGINES: ClassVar[tuple[Engine, ...]] = _G
    engine: Engine = Engine.GPSIMD
    sources: tuple[Space, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AffineSelect(Elementwise):
    """The source where an affine expression of the index holds, else a constant: 150 + N."""

    NAME: ClassVar[str] = "affine_select"
    ENGINES: ClassVar[tuple[Engine, ...]] = _G
    engine: Engine = Engine.GPSIMD


@dataclass(frozen=True, kw_only=True)
class LocalGather(Elementwise):
    """n indices of ``elements_per_index`` elements each, gathered within SBUF on GpSimdE.

    150 + n e / C cycles with C = ((28 + 4e) / 4e) / min(4 / dtype bytes, e).
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


@dataclass(frozen=True, kw_only=True)
class Max8(Elementwise):
    """The eight largest of each partition: N."""

    NAME: ClassVar[str] = "max8"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR


@dataclass(frozen=True, kw_only=True)
class NcFindIndex8(Elementwise):
    """The positions of eight values in each partition: N."""

    NAME: ClassVar[str] = "nc_find_index8"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR
    sources: tuple[Space, ...] = (Space.SBUF, Space.SBUF)


@dataclass(frozen=True, kw_only=True)
class NcMatchReplace8(Elementwise):
    """Replaces the first match of each of eight values: N."""

    NAME: ClassVar[str] = "nc_match_replace8"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR
    sources: tuple[Space, ...] = (Space.SBUF, Space.SBUF)


@dataclass(frozen=True, kw_only=True)
class NcStreamShuffle(Elementwise):
    """Moves data between the partitions of groups of 32: N."""

    NAME: ClassVar[str] = "nc_stream_shuffle"
    MOVES: ClassVar[bool] = True
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR


@dataclass(frozen=True, kw_only=True)
class Dropout(Elementwise):
    """Zeroes elements at random with a given probability: N."""

    NAME: ClassVar[str] = "dropout"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR


@dataclass(frozen=True, kw_only=True)
class RangeSelect(Elementwise):
    """Elements whose index lies in per-partition bounds, else a constant: N."""

    NAME: ClassVar[str] = "range_select"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR


@dataclass(frozen=True, kw_only=True)
class Rng(Elementwise):
    """32 random bits per element: N (assumed; the documents give the generator, not its cost)."""

    NAME: ClassVar[str] = "rng"
    ENGINES: ClassVar[tuple[Engine, ...]] = _VG
    engine: Engine = Engine.VECTOR
    dtype: torch.dtype = torch.uint32
    sources: tuple[Space, ...] = ()

    def check(self, core: CoreSpec) -> None:
        super().check(core)
        require(self.dtype.itemsize == 4, self.NAME, "dtype", self.dtype, "of 32 bits")
