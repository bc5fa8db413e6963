"""The tile that is being emitted: its size, its place, and how values are read in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from torch_trn.lowering.tile import Step, Value
from torch_trn.memory import Index, TileRef


@dataclass(frozen=True)
class Extent:
    """The tile being emitted: partitions, rows in each, columns, reals per element, and where.

    ``row`` and ``col`` are those of its first element in windows of its operands. ``short``:
    columns of the last partition, where those are fewer. ``start``: first column within the tile
    (of one row). ``place``: row and column in the grid of the first element, and how far they move
    from one partition to the next.
    """

    parts: int
    group: int
    width: int
    reals: int = 1
    row: Index = 0
    col: Index = 0
    short: int | None = None
    start: int = 0
    place: tuple[Index, Index, int, int] = (0, 0, 1, 0)

    def free(self, kind: str) -> int:
        """Free size of a value of `kind`, in elements."""
        if kind == "full":
            return self.group * self.width * self.reals
        if kind == "row":
            return self.width * self.reals
        return self.group if kind == "col" else 1

    @property
    def folded(self) -> int:
        """Partitions that have any columns of the tile."""
        return self.parts - (self.short == 0)

    def parts_of(self) -> list[Extent]:
        """This extent, or the two parts of it that all of their partitions fill."""
        if self.short is None or self.short == self.width:
            return [self]
        rest = replace(
            self, parts=self.parts - 1, width=self.width - self.short, short=None,
            start=self.start + self.short,
        )  # fmt: skip
        first = replace(self, width=self.short, short=None)
        return [part for part in (first, rest) if part.parts and part.width]


Refs = Callable[[Value], TileRef]
"""Gives the tile a value lives in at the current loop indices."""


def dims_of(value: Value, kind: str, extent: Extent) -> tuple[tuple[int, int], ...]:
    """(step, count) of `value` in its tile when it is read as a value of `kind`."""
    group, width = extent.group, extent.width * extent.reals
    step = value.stride
    if kind == "one":
        return ((1, 1),)
    if kind == "col":
        return ((step if value.kind in ("col", "full") else 0, group),)
    if kind == "row":
        return ((step if value.kind in ("row", "full") else 0, width),)
    if value.kind == "full":
        return ((step, group * width),)
    rows, cols = {"row": (0, step), "col": (step, 0), "one": (0, 0)}[value.kind]
    if group == 1 or rows == cols == 0:
        return ((cols, group * width),)
    return ((rows, group), (cols, width))


def retyped(value: Value, dtype: torch.dtype) -> Value:
    """A value like `value` in another dtype (itself, if it has that)."""
    return value if value.dtype == dtype else Value(value.tile, value.kind, dtype)


def as_kind(step: Step, kind: str, outs: tuple[Value, ...]) -> Step:
    """`step` as another kind, with fewer results."""
    return Step(kind, step.op, step.ins, outs, step.operands, step.index, step.cycles_each)


def elsewhere(refs: Refs, places: Refs, value: Value) -> Refs:
    """`refs`, but `value` lies where `places` says."""
    return lambda v: places(v) if v is value else refs(v)
