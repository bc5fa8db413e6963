"""Where operands live: memory spaces, pools of tiles, and affine references to a pool's slots.

A pool holds ``slots`` tiles of one shape. A reference names a slot by an affine function of loop
variables, taken modulo ``slots``: one slot is a naive kernel, two double-buffer, n are an array.

>>> pool = Pool("x", Space.SBUF, nbytes=4096, slots=2)
>>> str(pool[LoopVar("m", 0) * 4 + 1])
'x[4*m + 1]'
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

__all__ = ["Affine", "Index", "LoopVar", "Pool", "Space", "TileRef"]


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
        addend = _affine(other)
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
        return self + _affine(other) * -1

    def __rsub__(self, other: int) -> Affine:
        return self * -1 + other

    __radd__ = __add__
    __rmul__ = __mul__

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


def _affine(index: Index) -> Affine:
    if isinstance(index, LoopVar):
        return index.affine()
    if isinstance(index, Affine):
        return index
    return Affine(int(index))


@dataclass(frozen=True, eq=False)
class Pool:
    """``slots`` equal tiles in one memory; compared by identity.

    ``nbytes`` is the size of one tile: bytes per partition in SBUF and PSUM, all bytes in HBM.
    An HBM tensor is a pool whose slots are the parts that dependencies are tracked by.
    """

    name: str
    space: Space
    nbytes: int
    slots: int = 1

    def __getitem__(self, index: Index) -> TileRef:
        return TileRef(self, _affine(index))


@dataclass(frozen=True)
class TileRef:
    """The tile of ``pool`` in slot ``index`` modulo the pool's slots."""

    pool: Pool
    index: Affine

    def __str__(self) -> str:
        return f"{self.pool.name}[{self.index}]" if self.pool.slots > 1 else self.pool.name
