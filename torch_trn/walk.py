"""Element addresses of a window in HBM."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from torch_trn.memory import LoopVar, Walk, Window

__all__ = ["addresses", "strided"]

Dims = tuple[tuple[int, int], ...]


def addresses(window: Window, variables: Mapping[LoopVar, int]) -> tuple[Tensor, Tensor | None]:
    """Where the elements of a window lie: [num_rows, num_cols] int64, and which of them exist.

    The second is None where all of them do.
    """
    row, col = window.row.at(variables), window.col.at(variables)
    places, valid = _block(window.walk, window.num_rows, window.num_cols, row, col)
    offset = window.offset.at(variables)
    return (places + offset if offset else places), valid


def strided(
    window: Window, variables: Mapping[LoopVar, int]
) -> tuple[list[int], list[int], int] | None:
    """(sizes, strides, offset) of a window all of whose elements exist and that is one such view.

    Rows come first, then columns; None for any other window.
    """
    walk, row, col = window.walk, window.row.at(variables), window.col.at(variables)
    offset = window.offset.at(variables)
    if walk.pieces > 1:
        return _strided_pieces(window, row, col, offset)
    rows = _along(walk.rows, row, window.num_rows)
    cols = _along(walk.cols, col, window.num_cols)
    if rows is None or cols is None:
        return None
    dims = (*rows[0], *cols[0])
    return [size for size, _ in dims], [step for _, step in dims], offset + rows[1] + cols[1]


def _along(dims: Dims, first: int, count: int) -> tuple[Dims, int] | None:
    """``count`` elements of dims from ``first`` on, and the offset of the first."""
    if len(dims) == 1 and 0 <= first and first + count <= dims[0][0]:
        return ((count, dims[0][1]),), first * dims[0][1]
    if first == 0 and count == _count(dims):
        return dims or ((1, 0),), 0
    return None


def _strided_pieces(
    window: Window, row: int, col: int, offset: int
) -> tuple[list[int], list[int], int] | None:
    """Rows that are pieces of one row."""
    walk = window.walk
    if len(walk.cols) != 1 or _count(walk.rows) != 1:
        return None
    size, step = walk.cols[0]
    within = 0 <= row and row + window.num_rows <= walk.pieces
    end = (row + window.num_rows - 1) * walk.width + col + window.num_cols
    if not within or col + window.num_cols > walk.width or end > size:
        return None
    sizes, strides = [window.num_rows, window.num_cols], [walk.width * step, step]
    return sizes, strides, offset + (row * walk.width + col) * step


@lru_cache(maxsize=32)
def _block(
    walk: Walk, num_rows: int, num_cols: int, row: int, col: int
) -> tuple[Tensor, Tensor | None]:
    rows = torch.arange(row, row + num_rows)
    cols = torch.arange(col, col + num_cols)
    if walk.pieces == 1:
        places = _lines(rows, walk.rows)[:, None] + _lines(cols, walk.cols)
        if row + num_rows <= _count(walk.rows) and col + num_cols <= _count(walk.cols):
            return places, None
        valid = (rows < _count(walk.rows))[:, None] & (cols < _count(walk.cols))
        return places, valid
    within = (rows % walk.pieces * walk.width)[:, None] + cols
    rows = rows // walk.pieces
    places = _lines(rows, walk.rows)[:, None] + _lines(within, walk.cols)
    valid = (rows < _count(walk.rows))[:, None] & (within < _count(walk.cols))
    return places, valid & (cols < walk.width)


def _count(dims: Dims) -> int:
    total = 1
    for size, _ in dims:
        total *= size
    return total


def _lines(index: Tensor, dims: Dims) -> Tensor:
    """Offsets of linear indices into mixed-radix dims; beyond the last, of the wrapped one."""
    total = torch.zeros_like(index)
    for size, stride in reversed(dims):
        if not size:
            continue
        total = total + index % size * stride
        index = index // size
    return total
