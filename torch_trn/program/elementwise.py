"""The Builder's methods for VectorE, ScalarE and GpSimdE instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypedDict, Unpack

import torch

from torch_trn import isa
from torch_trn.isa import Engine
from torch_trn.memory import Pool, TileRef

__all__ = ["ElementwiseMethods", "Shape"]

Tile: TypeAlias = TileRef | Pool
Tiles: TypeAlias = Tile | Sequence[Tile]


class Shape(TypedDict, total=False):
    """Optional fields of an elementwise instruction; None stands for the instruction's default."""

    partitions: int | None
    dtype: torch.dtype | None
    out_dtype: torch.dtype | None
    engine: Engine | None
    strided: bool | None


class ElementwiseMethods:
    """One method for each instruction: ``n`` elements per partition, ``Shape`` fields optional."""

    def _pass(
        self, kind: type[Any], writes: Sequence[Tile], sources: Sequence[Tiles],
        written_n: int | None = None, **fields: Any,
    ) -> None:  # fmt: skip
        raise NotImplementedError

    def activation(
        self, dst: Tile, src: Tiles, *, op: str, n: int, reduce: Tile | None = None,
        **shape: Unpack[Shape],
    ) -> None:  # fmt: skip
        """dst = op(src x scale + bias); ``reduce`` also receives the sum along the free size."""
        if reduce is None:
            self._pass(isa.Activation, (dst,), (src,), op=op, n=n, **shape)
        else:
            self._pass(isa.ActivationReduce, (dst, reduce), (src,), op=op, n=n, **shape)

    def tensor_scalar(
        self, dst: Tile, src: Tiles, *, op: str, n: int, reduce: Tile | None = None,
        **shape: Unpack[Shape],
    ) -> None:  # fmt: skip
        """dst = src op scalar, one or two ops; ``reduce`` also receives the reduced row."""
        if reduce is None:
            self._pass(isa.TensorScalar, (dst,), (src,), op=op, n=n, **shape)
        else:
            self._pass(isa.TensorScalarReduce, (dst, reduce), (src,), op=op, n=n, **shape)

    def tensor_tensor(
        self, dst: Tile, a: Tiles, b: Tiles, *, op: str, n: int, **shape: Unpack[Shape]
    ) -> None:
        """dst = a op b; op "add", "subtract" and "multiply" are the fast ones."""
        self._pass(isa.TensorTensor, (dst,), (a, b), op=op, n=n, **shape)

    def scalar_tensor_tensor(
        self, dst: Tile, a: Tiles, b: Tiles, *, op: str, n: int, **shape: Unpack[Shape]
    ) -> None:
        """dst = (a op0 scalar) op1 b, with op "op0,op1"."""
        self._pass(isa.ScalarTensorTensor, (dst,), (a, b), op=op, n=n, **shape)

    def tensor_tensor_scan(
        self, dst: Tile, a: Tiles, b: Tiles, *, op: str, n: int, **shape: Unpack[Shape]
    ) -> None:
        """dst[i] = (dst[i - 1] op0 a[i]) op1 b[i], with op "op0,op1"."""
        self._pass(isa.TensorTensorScan, (dst,), (a, b), op=op, n=n, **shape)

    def tensor_reduce(
        self, dst: Tile, src: Tiles, *, op: str, n: int, out_n: int = 1, **shape: Unpack[Shape]
    ) -> None:
        """dst [out_n elements] = reduction of src along the free size."""
        self._pass(isa.TensorReduce, (dst,), (src,), out_n, op=op, n=n, **shape)

    def tensor_copy(self, dst: Tile, src: Tiles, *, n: int, **shape: Unpack[Shape]) -> None:
        """dst = src, with a free cast."""
        self._pass(isa.TensorCopy, (dst,), (src,), n=n, **shape)

    def tensor_copy_predicated(
        self, dst: Tile, src: Tiles, predicate: Tiles, *, n: int, **shape: Unpack[Shape]
    ) -> None:
        """dst = src where predicate holds."""
        self._pass(isa.TensorCopyPredicated, (dst,), (src, predicate), n=n, **shape)

    def select(
        self, dst: Tile, predicate: Tiles, on_true: Tiles, on_false: Tiles, *, n: int,
        **shape: Unpack[Shape],
    ) -> None:  # fmt: skip
        """dst = predicate ? on_true : on_false."""
        self._pass(isa.Select, (dst,), (predicate, on_true, on_false), n=n, **shape)

    def reciprocal(self, dst: Tile, src: Tiles, *, n: int, **shape: Unpack[Shape]) -> None:
        """dst = 1 / src."""
        self._pass(isa.Reciprocal, (dst,), (src,), n=n, **shape)

    def bn_stats(self, dst: Tile, src: Tiles, *, n: int, **shape: Unpack[Shape]) -> None:
        """dst [6 elements] = count, mean and variance of up to 512 elements."""
        self._pass(isa.BnStats, (dst,), (src,), 6, n=n, **shape)

    def bn_aggr(self, dst: Tile, src: Tiles, *, n: int, **shape: Unpack[Shape]) -> None:
        """dst [2 elements] = mean and variance from n elements of bn_stats results."""
        self._pass(isa.BnAggr, (dst,), (src,), 2, n=n, **shape)

    def memset(self, dst: Tile, *, n: int, op: str = "zero", **shape: Unpack[Shape]) -> None:
        """dst = a constant; op "zero" is cheaper in 16 bits."""
        self._pass(isa.Memset, (dst,), (), op=op, n=n, **shape)

    def iota(self, dst: Tile, *, n: int, **shape: Unpack[Shape]) -> None:
        """dst = affine integers."""
        self._pass(isa.Iota, (dst,), (), n=n, **shape)

    def rng(self, dst: Tile, *, n: int, **shape: Unpack[Shape]) -> None:
        """dst = n words of 32 random bits."""
        self._pass(isa.Rng, (dst,), (), n=n, **shape)

    def affine_select(
        self, dst: Tile, src: Tiles, *, n: int, op: str = "", **shape: Unpack[Shape]
    ) -> None:
        """dst = src where an affine expression of the index holds, else a constant."""
        self._pass(isa.AffineSelect, (dst,), (src,), op=op, n=n, **shape)

    def range_select(
        self, dst: Tile, src: Tiles, *, n: int, op: str = "", **shape: Unpack[Shape]
    ) -> None:
        """dst = src where the index lies in bounds, else a constant."""
        self._pass(isa.RangeSelect, (dst,), (src,), op=op, n=n, **shape)

    def local_gather(
        self, dst: Tile, src: Tiles, index: Tiles, *, n: int, elements_per_index: int = 1,
        **shape: Unpack[Shape],
    ) -> None:  # fmt: skip
        """dst = n indexed groups of ``elements_per_index`` elements of src, within SBUF."""
        self._pass(
            isa.LocalGather, (dst,), (src, index), n * elements_per_index,
            n=n, elements_per_index=elements_per_index, **shape,
        )  # fmt: skip

    def max8(self, dst: Tile, src: Tiles, *, n: int, **shape: Unpack[Shape]) -> None:
        """dst [8 elements] = the eight largest of src."""
        self._pass(isa.Max8, (dst,), (src,), 8, n=n, **shape)

    def nc_find_index8(
        self, dst: Tile, src: Tiles, values: Tiles, *, n: int, **shape: Unpack[Shape]
    ) -> None:
        """dst [8 elements] = positions in src of eight values."""
        self._pass(isa.NcFindIndex8, (dst,), (src, values), 8, n=n, **shape)

    def nc_match_replace8(
        self, dst: Tile, src: Tiles, values: Tiles, *, n: int, **shape: Unpack[Shape]
    ) -> None:
        """dst = src with the first match of each of eight values replaced."""
        self._pass(isa.NcMatchReplace8, (dst,), (src, values), n=n, **shape)

    def nc_stream_shuffle(self, dst: Tile, src: Tiles, *, n: int, **shape: Unpack[Shape]) -> None:
        """dst = src with partitions moved within groups of 32."""
        self._pass(isa.NcStreamShuffle, (dst,), (src,), n=n, **shape)

    def dropout(self, dst: Tile, src: Tiles, *, n: int, **shape: Unpack[Shape]) -> None:
        """dst = src with elements zeroed at random."""
        self._pass(isa.Dropout, (dst,), (src,), n=n, **shape)
