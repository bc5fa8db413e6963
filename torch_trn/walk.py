"""Element addresses of a window in HBM."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from torch_trn.memory import LoopVar, Walk, Window

__all__ = ["addresses"]


def addresses(window: Window, variables: Mapping[LoopVar, int]) -> tuple[Tensor, Tensor | None]:
    """Where the elements of a window lie: [num_rows, num_cols] int64, and which of them exist.

    The second is None where all of them do.
    """
    row, col = window.row.at(variables), window.col.at(variables)
    places, valid = _block(window.walk, window.num_rows, window.num_cols, row, col)
    offset = window.offset.at(variables)
    return (places + offset if offset else places), valid


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


def _count(dims: tuple[tuple[int, int], ...]) -> int:
    total = 1
    for size, _ in dims:
        total *= size
    return total


def _lines(index: Tensor, dims: tuple[tuple[int, int], ...]) -> Tensor:
    """Offsets of linear indices into mixed-radix dims; beyond the last, of the wrapped one."""
    total = torch.zeros_like(index)
    for size, stride in reversed(dims):
        if not size:
            continue
        total = total + index % size * stride
        index = index // size
    return total
