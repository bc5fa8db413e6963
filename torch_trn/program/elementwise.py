"""The Builder's methods for VectorE, ScalarE and GpSimdE instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypedDict, Unpack

import torch

from torch_trn import isa
from torch_trn.isa import Engine
from torch_trn.isa.elementwise import Number
from torch_trn.memory import Index, Pool, TileRef, affine

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


class Indexing(Shape, total=False):
    """Those of an instruction that computes with where an element stands (``isa.Indexed``)."""

    base: Index
    channel: int
    steps: tuple[tuple[int, int], ...]


class ElementwiseMethods:
    """One method for each instruction: ``n`` elements per partition, ``Shape`` fields optional.

    ``operands`` are the numbers that ``op`` works with, in order; None stands for a small tile (one
    element a partition) that follows the first source in its list: ``[x, scale]`` with
    ``operands=(None, 2.0)``; a tensor_scalar without them has a time but no values. Tiles without
    an access pattern are read from their first element on.
    """

    def _pass(
        self, kind: type[Any], writes: Sequence[Tile], sources: Sequence[Tiles],
        written_n: int | None = None, **fields: Any,
    ) -> None:  # fmt: skip
        raise NotImplementedError

    def activation(
        self, dst: Tile, src: Tiles, *, op: str, n: int, scale: Number | None = 1.0,
        bias: Number | None = 0.0, reduce: Tile | None = None, **shape: Unpack[Shape],
    ) -> None:  # fmt: skip
        """dst = op(src x scale + bias); ``reduce`` also receives the sum along the free size."""
        plain = scale == 1.0 and bias == 0.0
        operands = None if plain else (scale, bias)
        if reduce is None:
            self._pass(isa.Activation, (dst,), (src,), op=op, n=n, operands=operands, **shape)
        else:
            self._pass(isa.ActivationReduce, (dst, reduce), (src,), op=op, n=n, operands=operands,
                       **shape)  # fmt: skip

    def tensor_scalar(
        self, dst: Tile, src: Tiles, *, op: str, n: int, operands: Sequence[Number | None] = (),
        reduce: Tile | None = None, **shape: Unpack[Shape],
    ) -> None:  # fmt: skip
        """dst = src op operand, one or two ops; ``reduce`` also receives the sum of the row."""
        given = tuple(operands)
        if reduce is None:
            self._pass(isa.TensorScalar, (dst,), (src,), op=op, n=n, operands=given, **shape)
        else:
            self._pass(isa.TensorScalarReduce, (dst, reduce), (src,), op=op, n=n, operands=given,
                       **shape)  # fmt: skip

    def tensor_tensor(
        self, dst: Tile, a: Tiles, b: Tiles, *, op: str, n: int, **shape: Unpack[Shape]
    ) -> None:
        """dst = a op b; op "add", "subtract" and "multiply" are the fast ones."""
        self._pass(isa.TensorTensor, (dst,), (a, b), op=op, n=n, **shape)

    def scalar_tensor_tensor(
        self, dst: Tile, a: Tiles, b: Tiles, *, op: str, n: int, scalar: Number | None = 1.0,
        **shape: Unpack[Shape],
    ) -> None:  # fmt: skip
        """dst = (a op0 scalar) op1 b, with op "op0,op1"."""
        self._pass(isa.ScalarTensorTensor, (dst,), (a, b), op=op, n=n, operands=(scalar,), **shape)

    def tensor_tensor_scan(
        self, dst: Tile, a: Tiles, b: Tiles, *, op: str, n: int, initial: Number | None = 0.0,
        **shape: Unpack[Shape],
    ) -> None:  # fmt: skip
        """dst[i] = (dst[i - 1] op0 a[i]) op1 b[i], with op "op0,op1", dst[-1] = initial."""
        self._pass(isa.TensorTensorScan, (dst,), (a, b), op=op, n=n, operands=(initial,), **shape)

    def tensor_reduce(
        self, dst: Tile, src: Tiles, *, op: str, n: int, out_n: int = 1, **shape: Unpack[Shape]
    ) -> None:
        """dst [out_n elements] = reduction of each of out_n equal runs of src."""
        self._pass(isa.TensorReduce, (dst,), (src,), out_n, op=op, n=n, groups=out_n, **shape)

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
        """dst [6 elements] = count, mean, count x variance of even, then of odd elements."""
        self._pass(isa.BnStats, (dst,), (src,), 6, n=n, **shape)

    def bn_aggr(self, dst: Tile, src: Tiles, *, n: int, **shape: Unpack[Shape]) -> None:
        """dst [2 elements] = mean and variance from n elements of bn_stats results."""
        self._pass(isa.BnAggr, (dst,), (src,), 2, n=n, **shape)

    def memset(self, dst: Tile, *, n: int, value: Number = 0.0, **shape: Unpack[Shape]) -> None:
        """dst = value; zero is cheaper in 16 bits."""
        self._pass(isa.Memset, (dst,), (), n=n, operands=(value,), **shape)

    def iota(self, dst: Tile, *, n: int, **shape: Unpack[Indexing]) -> None:
        """dst = base + channel x partition + steps . index, as integers."""
        self._indexed(isa.Iota, (dst,), (), n=n, **shape)

    def rng(self, dst: Tile, *, n: int, **shape: Unpack[Shape]) -> None:
        """dst = n words of 32 random bits."""
        self._pass(isa.Rng, (dst,), (), n=n, **shape)

    def affine_select(
        self, dst: Tile, src: Tiles, *, n: int, op: str, fill: Number = 0.0,
        **shape: Unpack[Indexing],
    ) -> None:  # fmt: skip
        """dst = src where (index op 0), else ``fill``; the index as in ``iota``."""
        self._indexed(isa.AffineSelect, (dst,), (src,), n=n, op=op, operands=(fill,), **shape)

    def range_select(
        self, dst: Tile, src: Tiles, *, n: int, op: str, low: Number | None, high: Number | None,
        fill: Number = 0.0, **shape: Unpack[Indexing],
    ) -> None:  # fmt: skip
        """dst = src where (index op0 low) and (index op1 high), else ``fill``; op is "op0,op1"."""
        self._indexed(isa.RangeSelect, (dst,), (src,), n=n, op=op, operands=(low, high, fill),
                      **shape)  # fmt: skip

    def local_gather(
        self, dst: Tile, src: Tiles, index: Tiles, *, n: int, elements_per_index: int = 1,
        **shape: Unpack[Shape],
    ) -> None:  # fmt: skip
        """dst = n indexed groups of ``elements_per_index`` elements of src, within SBUF."""
        self._pass(
            isa.LocalGather, (dst,), (src, index), n * elements_per_index,
            n=n, elements_per_index=elements_per_index, **shape,
        )  # fmt: skip

    def custom_op(
        self, dst: Tile, sources: Sequence[Tiles], *, op: str, n: int, cycles_each: int,
        operands: Sequence[Number] = (), **shape: Unpack[Shape],
    ) -> None:  # fmt: skip
        """dst = a C++ function of GpSimdE, named as in torch.special or torch, of the sources."""
        self._pass(isa.CustomOp, (dst,), tuple(sources), op=op, n=n, cycles_each=cycles_each,
                   operands=tuple(operands), **shape)  # fmt: skip

    def max8(self, dst: Tile, src: Tiles, *, n: int, **shape: Unpack[Shape]) -> None:
        """dst [8 elements] = the eight largest of src, largest first."""
        self._pass(isa.Max8, (dst,), (src,), 8, n=n, **shape)

    def nc_find_index8(
        self, dst: Tile, src: Tiles, values: Tiles, *, n: int, **shape: Unpack[Shape]
    ) -> None:
        """dst [8 elements, uint32] = positions in src of eight values."""
        self._pass(isa.NcFindIndex8, (dst,), (src, values), 8, n=n, **shape)

    def nc_match_replace8(
        self, dst: Tile, src: Tiles, values: Tiles, *, n: int, replacement: Number,
        **shape: Unpack[Shape],
    ) -> None:  # fmt: skip
        """dst = src with the first match of each of eight values replaced."""
        self._pass(isa.NcMatchReplace8, (dst,), (src, values), n=n, operands=(replacement,),
                   **shape)  # fmt: skip

    def nc_stream_shuffle(
        self, dst: Tile, src: Tiles, *, n: int, mask: tuple[int, ...], **shape: Unpack[Shape]
    ) -> None:
        """dst = src with partition i of each 32 taken from partition ``mask[i]`` of them."""
        self._pass(isa.NcStreamShuffle, (dst,), (src,), n=n, mask=mask, **shape)

    def quantize_mx(
        self, dst: Tile, scales: Tile, src: Tiles, *, n: int, **shape: Unpack[Shape]
    ) -> None:
        """dst, scales = src as MX data: fp8 with one scale for 32 elements."""
        self._pass(isa.QuantizeMx, (dst, scales), (src,), n=n, **shape)

    def dropout(
        self, dst: Tile, src: Tiles, *, n: int, rate: Number | None, **shape: Unpack[Shape]
    ) -> None:
        """dst = src with elements zeroed at random, ``rate`` of them."""
        self._pass(isa.Dropout, (dst,), (src,), n=n, operands=(rate,), **shape)

    def _indexed(
        self, kind: type[Any], writes: Sequence[Tile], sources: Sequence[Tiles], **fields: Any
    ) -> None:
        if "base" in fields:
            fields["base"] = affine(fields["base"])
        self._pass(kind, writes, sources, **fields)
