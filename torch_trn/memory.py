"""Where operands live: memory spaces, pools of tiles, and affine references to a pool's slots.

A pool holds ``slots`` tiles of one shape. A reference names a slot by an affine function of loop
variables, taken modulo ``slots``: one slot is a naive kernel, two double-buffer, n are an array.
A view says which elements of the tile are meant: an access pattern in SBUF and PSUM, a window of a
tensor in HBM. Dependencies are those of whole slots.

>>> pool = Pool("x", Space.SBUF, nbytes=4096, slots=2)
>>> str(pool[LoopVar("m", 0) * 4 + 1])
'x[4*m + 1]'
>>> str(pool[0].view(torch.bfloat16, (0, 4), (1, 512), offset=128))
'x[0]{0x4,1x512+128 bfloat16}'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TypeAlias

import torch

__all__ = ["CORE", "Affine", "Index", "LoopVar", "Pool", "Space", "TileRef", "View", "Walk",
           "Window", "affine"]  # fmt: skip


class Space(IntEnum):
    """A memory of the device."""

    HBM = 0
    SBUF = 1
    PSUM = 2


@dataclass(frozen=True)
class Affine:
    """``constant`` plus the sum of coefficient x loop variable; a variable is its loop's depth."""

    constant: int = 0
    terms: tuple[tuple[LoopVar, int], ...] = ()

    def __add__(self, other: Index) -> Affine:
        addend = affine(other)
        merged: dict[LoopVar, int] = dict(self.terms)
        for variable, coefficient in addend.terms:
            merged[variable] = merged.get(variable, 0) + coefficient
        terms = tuple((variable, value) for variable, value in merged.items() if value)
        return Affine(self.constant + addend.constant, terms)

    def __mul__(self, factor: int) -> Affine:
        if not isinstance(factor, int):
            raise TypeError(f"an index is affine: multiply by an int, not by {factor!r}")
        terms = tuple((variable, value * factor) for variable, value in self.terms if factor)
        return Affine(self.constant * factor, terms)

    def __sub__(self, other: Index) -> Affine:
        return self + affine(other) * -1

    def __rsub__(self, other: int) -> Affine:
        return self * -1 + other

    __radd__ = __add__
    __rmul__ = __mul__

    def at(self, values: Mapping[LoopVar, int]) -> int:
        """The value where the loop variables have ``values``."""
        total = self.constant
        for variable, coefficient in self.terms:
            total += coefficient * values[variable]
        return total

    def __str__(self) -> str:
        parts = [
            variable.name if value == 1 else f"{value}*{variable.name}"
            for variable, value in self.terms
        ]
        if self.constant or not parts:
            parts.append(str(self.constant))
        return " + ".join(parts)


@dataclass(frozen=True, eq=False)
class LoopVar:
    """The counter of one loop at nesting level ``depth``; compared by identity."""

    name: str
    depth: int

    def affine(self) -> Affine:
        """This variable as an affine expression."""
        return Affine(0, ((self, 1),))

    def __add__(self, other: Index) -> Affine:
        return self.affine() + other

    def __sub__(self, other: Index) -> Affine:
        return self.affine() - other

    def __rsub__(self, other: int) -> Affine:
        return other - self.affine()

    def __mul__(self, factor: int) -> Affine:
        return self.affine() * factor

    __radd__ = __add__
    __rmul__ = __mul__


Index: TypeAlias = Affine | LoopVar | int

CORE = LoopVar("core", -1)
"""Which physical core of a logical one runs the Program: every core runs the same one (SPMD)."""


def affine(index: Index) -> Affine:
    """An index as an affine expression."""
    if isinstance(index, LoopVar):
        return index.affine()
    if isinstance(index, Affine):
        return index
    return Affine(int(index))


@dataclass(frozen=True)
class View:
    """Access pattern of an instruction in a tile of SBUF or PSUM.

    ``dims`` are (step, count) pairs along the free dimension in elements of ``dtype``, outer first,
    from ``offset`` on; None is as many contiguous elements as the instruction's free size says.
    Partitions start at ``partition``; their number is the instruction's unless given.
    """

    dtype: torch.dtype
    dims: tuple[tuple[int, int], ...] | None = None
    offset: Affine = Affine()
    partition: Affine = Affine()
    partitions: int | None = None

    def __str__(self) -> str:
        dims = ",".join(f"{step}x{count}" for step, count in self.dims or ())
        offset = f"+{self.offset}" if self.offset != Affine() else ""
        rows = f" from {self.partition}" if self.partition != Affine() else ""
        rows += f" of {self.partitions}" if self.partitions is not None else ""
        return f"{{{dims}{offset} {str(self.dtype).removeprefix('torch.')}{rows}}}"


@dataclass(frozen=True)
class Walk:
    """How a matrix lies in an HBM tensor: (size, stride) of the dims of its rows and its columns.

    Sizes and strides are in elements, outer dims first. With ``pieces`` > 1 each row of the tensor
    is cut into that many rows of ``width`` columns, the last one possibly shorter.
    """

    rows: tuple[tuple[int, int], ...]
    cols: tuple[tuple[int, int], ...]
    pieces: int = 1
    width: int = 0


@dataclass(frozen=True)
class Window:
    """A block of a ``Walk``: ``num_rows`` x ``num_cols`` elements from (row, col) on.

    ``offset`` is that of the walk's first element from the tensor's. What lies beyond the walk's
    sizes is not moved. In a transfer the block's elements in row-major order meet those of the
    other side, partition by partition.
    """

    dtype: torch.dtype
    walk: Walk
    num_rows: int
    num_cols: int
    row: Affine = Affine()
    col: Affine = Affine()
    offset: Affine = Affine()

    def __str__(self) -> str:
        rows, cols = (
            "*".join(f"{size}:{step}" for size, step in dims) or "1"
            for dims in (self.walk.rows, self.walk.cols)
        )
        cut = f" in {self.walk.pieces}x{self.walk.width}" if self.walk.pieces > 1 else ""
        offset = f"+{self.offset}" if self.offset != Affine() else ""
        block = f"({self.row}, {self.col}) {self.num_rows}x{self.num_cols}"
        return f"{{{block} of [{rows}][{cols}]{cut}{offset}}}"


@dataclass(frozen=True, eq=False)
class Pool:
    """``slots`` equal tiles in one memory; compared by identity.

    ``nbytes`` is the size of one tile: bytes per partition in SBUF and PSUM, all bytes in HBM.
    An HBM tensor is a pool whose slots are the parts that dependencies are tracked by. ``of`` names
    the call's tensors whose elements it holds, one tensor after the other: "in2" is the third
    tensor among the arguments (those in lists counted), "out0" the first result. Without it the
    pool's own name is that of its tensor; other names are scratch.
    """

    name: str
    space: Space
    nbytes: int
    slots: int = 1
    of: tuple[str, ...] = ()

    def __getitem__(self, index: Index) -> TileRef:
        return TileRef(self, affine(index))


@dataclass(frozen=True)
class TileRef:
    """The tile of ``pool`` in slot ``index`` modulo the pool's slots, or ``pattern``'s part of it.

    Without a pattern it is what the instruction's own shape and dtype say, from element 0 on.
    """

    pool: Pool
    index: Affine
    pattern: View | Window | None = None

    def view(
        self, dtype: torch.dtype, *dims: tuple[int, int], offset: Index = 0, partition: Index = 0,
        partitions: int | None = None,
    ) -> TileRef:  # fmt: skip
        """This tile through an access pattern (see ``View``)."""
        pattern = View(dtype, dims or None, affine(offset), affine(partition), partitions)
        return replace(self, pattern=pattern)

    def window(
        self, dtype: torch.dtype, walk: Walk, num_rows: int, num_cols: int, *, row: Index = 0,
        col: Index = 0, offset: Index = 0,
    ) -> TileRef:  # fmt: skip
        """A block of this HBM tensor (see ``Window``)."""
        pattern = Window(dtype, walk, num_rows, num_cols, affine(row), affine(col), affine(offset))
        return replace(self, pattern=pattern)

    def matrix(self, dtype: torch.dtype, *dims: tuple[int, int], offset: Index = 0) -> TileRef:
        """All elements of (size, stride) ``dims`` of this HBM tensor; the first dim is the rows."""
        count = 1
        for size, _ in dims[1:]:
            count *= size
        return self.window(dtype, Walk(dims[:1], dims[1:]), dims[0][0], count, offset=offset)

    def indices(self) -> tuple[Affine, ...]:
        """Every affine expression of the reference."""
        if isinstance(self.pattern, View):
            return (self.index, self.pattern.offset, self.pattern.partition)
        if isinstance(self.pattern, Window):
            return (self.index, self.pattern.row, self.pattern.col, self.pattern.offset)
        return (self.index,)

    def __str__(self) -> str:
        name = f"{self.pool.name}[{self.index}]" if self.pool.slots > 1 else self.pool.name
        return name if self.pattern is None else f"{name}{self.pattern}"
