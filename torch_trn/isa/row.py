"""Instructions of VectorE that look at a whole row: statistics, searches, shuffles, random bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torch_trn.chip import CoreSpec
from torch_trn.isa.alu import operand
from torch_trn.isa.elementwise import Elementwise
from torch_trn.isa.instruction import Engine, Shape, require
from torch_trn.memory import Space

__all__ = [
    "BnAggr",
    "BnStats",
    "Dropout",
    "Max8",
    "NcFindIndex8",
    "NcMatchReplace8",
    "NcStreamShuffle",
    "Rng",
]

_V = (Engine.VECTOR,)
_VG = (Engine.VECTOR, Engine.GPSIMD)


def _take(data: Tensor, values: Tensor, taken: Tensor, at: int, where: Tensor | None) -> None:
    """Marks the first element of each row that equals value ``at`` and is not taken yet."""
    match = (data == values[:, at : at + 1]) & ~taken
    found, first = match.any(1), match.to(torch.int8).argmax(1)
    taken[found, first[found]] = True
    if where is not None:
        where[found, at] = first[found]


@dataclass(frozen=True, kw_only=True)
class BnStats(Elementwise):
    """Count, mean and variance of up to 512 elements per partition: N."""

    NAME: ClassVar[str] = "bn_stats"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    N_MAX: ClassVar[int | None] = 512
    engine: Engine = Engine.VECTOR

    def write_shapes(self, count: int) -> tuple[Shape, ...]:
        return ((self.partitions, 6, self.result_dtype),)

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        # Elements with even and odd index apart (arch2): count, mean, count x variance of each.
        x = operand(reads[0])
        halves = []
        for half in (x[:, 0::2], x[:, 1::2]):
            count = torch.full((x.shape[0],), float(half.shape[1]))
            mean = half.sum(1) / max(half.shape[1], 1)
            halves += [count, mean, ((half - mean[:, None]) ** 2).sum(1)]
        return (torch.stack(halves, 1),)


@dataclass(frozen=True, kw_only=True)
class BnAggr(Elementwise):
    """Combines bn_stats results, N elements of them: 13 N / 3."""

    NAME: ClassVar[str] = "bn_aggr"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR

    def cycles(self, core: CoreSpec) -> int:
        return -(-13 * self.n // 3)

    def write_shapes(self, count: int) -> tuple[Shape, ...]:
        return ((self.partitions, 2, self.result_dtype),)

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        groups = operand(reads[0]).reshape(reads[0].shape[0], -1, 3)
        count, mean, squares = groups.unbind(-1)
        total = count.sum(1)
        middle = (count * mean).sum(1) / total
        spread = squares + count * (mean - middle[:, None]) ** 2
        return (torch.stack([middle, spread.sum(1) / total], 1),)


@dataclass(frozen=True, kw_only=True)
class Max8(Elementwise):
    """The eight largest of each partition: N."""

    NAME: ClassVar[str] = "max8"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR

    def write_shapes(self, count: int) -> tuple[Shape, ...]:
        return ((self.partitions, 8, self.result_dtype),)

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        x = operand(reads[0])
        found = x.sort(stable=True, dim=1, descending=True).values[:, :8]
        if found.shape[1] < 8:
            found = torch.nn.functional.pad(found, (0, 8 - found.shape[1]), value=-math.inf)
        return (found,)


@dataclass(frozen=True, kw_only=True)
class NcFindIndex8(Elementwise):
    """The positions of eight values in each partition: N."""

    NAME: ClassVar[str] = "nc_find_index8"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR
    sources: tuple[Space, ...] = (Space.SBUF, Space.SBUF)

    def read_shapes(self, count: int) -> tuple[Shape, ...]:
        return ((self.partitions, self.n, self.dtype), (self.partitions, 8, self.dtype))

    def write_shapes(self, count: int) -> tuple[Shape, ...]:
        return ((self.partitions, 8, torch.uint32),)

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        # The k-th of equal values is the k-th match; a value without a match gives 2^32 - 1.
        data, values = operand(reads[0]), operand(reads[1])
        result = torch.full(values.shape, 2**32 - 1, dtype=torch.int64)
        taken = torch.zeros_like(data, dtype=torch.bool)
        for at in range(values.shape[1]):
            _take(data, values, taken, at, result)
        return (result,)


@dataclass(frozen=True, kw_only=True)
class NcMatchReplace8(Elementwise):
    """Replaces the first match of each of eight values by the one operand: N."""

    NAME: ClassVar[str] = "nc_match_replace8"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR
    sources: tuple[Space, ...] = (Space.SBUF, Space.SBUF)

    def read_shapes(self, count: int) -> tuple[Shape, ...]:
        return ((self.partitions, self.n, self.dtype), (self.partitions, 8, self.dtype))

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        data, values = operand(reads[0]), operand(reads[1])
        taken = torch.zeros_like(data, dtype=torch.bool)
        for at in range(values.shape[1]):
            _take(data, values, taken, at, None)
        replacement = self.operands[0] if self.operands else -math.inf
        assert replacement is not None
        return (torch.where(taken, torch.tensor(float(replacement)), data),)


@dataclass(frozen=True, kw_only=True)
class NcStreamShuffle(Elementwise):
    """Partition i of each 32 gets what partition ``mask[i]`` of them holds: N."""

    NAME: ClassVar[str] = "nc_stream_shuffle"
    MOVES: ClassVar[bool] = True
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR
    mask: tuple[int, ...] = tuple(range(32))

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        rows = torch.arange(self.partitions)
        source = rows - rows % 32 + torch.tensor(self.mask)[rows % 32]
        return (reads[0][source],)


@dataclass(frozen=True, kw_only=True)
class Dropout(Elementwise):
    """Zeroes elements at random with a given probability: N."""

    NAME: ClassVar[str] = "dropout"
    ENGINES: ClassVar[tuple[Engine, ...]] = _V
    engine: Engine = Engine.VECTOR

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        raise RuntimeError("the executor draws random bits: an instruction has no generator")


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

    def run(self, reads: Sequence[Tensor], old: Tensor | None = None) -> tuple[Tensor, ...]:
        raise RuntimeError("the executor draws random bits: an instruction has no generator")
