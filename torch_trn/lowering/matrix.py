"""A batch of matrices as they lie in an HBM tensor, and the windows that transfers see of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from torch_trn.lowering.call import TensorSpec
from torch_trn.lowering.layout import broadcast_strides, merge, product
from torch_trn.memory import Index, Pool, TileRef, Walk
from torch_trn.program import Builder

__all__ = ["Dims", "Matrix"]

Dims = tuple[tuple[int, int], ...]
"""(size, stride in elements) of each dim, outer first."""


@dataclass(frozen=True)
class Matrix:
    """``batch`` matrices of ``rows`` x ``cols`` elements in the tensor ``name``.

    Rows and columns may each be several dims of the tensor taken together; a stride of 0 repeats.
    first_row, first_col, first_batch: where this core's share begins; what lies beyond the matrix
    is clipped by the windows.
    """

    name: str
    dtype: torch.dtype
    rows: Dims
    cols: Dims
    batch: tuple[int, int] = (1, 0)
    nbytes: int = 0
    pool: Pool | None = None
    first_row: Index = 0
    first_col: Index = 0
    first_batch: Index = 0

    @classmethod
    def of(cls, name: str, spec: TensorSpec, *, flip: bool = False) -> Matrix:
        """The last two dims of ``spec`` (transposed where ``flip``); a vector is one column.

        A dim before them is the batch.
        """
        dims = tuple(zip(spec.shape, spec.strides, strict=True))
        if spec.ndim < 2:
            return cls._made(name, spec, dims, ())
        batch = dims[0] if spec.ndim > 2 else (1, 0)
        found = cls._made(name, spec, dims[-2:-1], dims[-1:], batch)
        return found.turned() if flip else found

    @classmethod
    def rows_of(cls, name: str, spec: TensorSpec, columns: int) -> Matrix:
        """The last ``columns`` dims of ``spec`` are the columns, all before them the rows."""
        dims = tuple(zip(spec.shape, spec.strides, strict=True))
        at = len(dims) - columns
        return cls._made(name, spec, dims[:at], dims[at:])

    @classmethod
    def broadcast(cls, name: str, spec: TensorSpec, sizes: Sequence[int]) -> Matrix:
        """``spec`` as [batch, rows, columns] of ``sizes``, repeated where it must be."""
        steps = broadcast_strides(spec, sizes)
        batch, rows, cols = zip(sizes, steps, strict=True)
        return cls._made(name, spec, (rows,), (cols,), batch)

    @classmethod
    def _made(
        cls, name: str, spec: TensorSpec, rows: Dims, cols: Dims, batch: tuple[int, int] = (1, 0)
    ) -> Matrix:
        return cls(name, spec.dtype, _merged(rows), _merged(cols), batch, spec.nbytes)

    @property
    def num_rows(self) -> int:
        return product([size for size, _ in self.rows])

    @property
    def num_cols(self) -> int:
        return product([size for size, _ in self.cols])

    @property
    def row_step(self) -> int:
        """Distance of neighbouring rows in elements; 1 where there is only one."""
        return self.rows[-1][1] if self.rows else 1

    @property
    def col_step(self) -> int:
        """Distance of neighbouring columns in elements; 1 where there is only one."""
        return self.cols[-1][1] if self.cols else 1

    @property
    def col_run(self) -> int:
        """Columns that lie next to each other."""
        if not self.cols:
            return 1
        return self.cols[-1][0] if self.cols[-1][1] == 1 else 1

    @property
    def is_dense(self) -> bool:
        """Whether the rows lie one after the other without gaps."""
        whole = len(self.cols) == 1 and self.cols[0][1] == 1 or not self.cols
        one = len(self.rows) == 1 and self.rows[0][1] == self.num_cols or not self.rows
        return whole and one

    def turned(self) -> Matrix:
        """The transpose."""
        return replace(self, rows=self.cols, cols=self.rows, first_row=self.first_col,
                       first_col=self.first_row)  # fmt: skip

    def joined_batch(self, *, in_rows: bool) -> Matrix:
        """One matrix with all matrices of the batch below (or beside) each other."""
        if in_rows:
            return replace(self, rows=_merged((self.batch, *self.rows)), batch=(1, 0))
        return replace(self, cols=_merged((self.batch, *self.cols)), batch=(1, 0))

    def placed(self, b: Builder) -> Matrix:
        """This matrix with its tensor in HBM as a pool of ``b``."""
        return replace(self, pool=b.hbm(self.name, nbytes=self.nbytes))

    def window(self, batch: Index, row: Index, num_rows: int, col: Index, num_cols: int) -> TileRef:
        """The block of ``num_rows`` x ``num_cols`` elements from (row, col) of the share on."""
        assert self.pool
        walk, offset, at = Walk(self.rows, self.cols), batch * self.batch[1], col + self.first_col
        if not isinstance(self.first_batch, int):
            # Columns are taken in exact pieces, so that the batch is clipped with them.
            walk, offset = Walk(self.rows, (self.batch, *self.cols)), 0
            at = (batch + self.first_batch) * self.num_cols + at
        return self.pool[0].window(self.dtype, walk, num_rows, num_cols, row=row + self.first_row,
                                   col=at, offset=offset)  # fmt: skip


def _merged(dims: Dims) -> Dims:
    """Dims of more than one element, neighbours that one stride walks as one."""
    sizes, steps = [size for size, _ in dims], [step for _, step in dims]
    return tuple((size, step) for size, (step,) in merge(sizes, [steps]))
