"""Gathers and scatters: rows by indirect DMA, elements within SBUF where that is cheaper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.errors import UnsupportedOpError
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.indexed import Gathered, Number, gather
from torch_trn.lowering.layout import PARTITIONS, broadcast_strides, ceil_div, product
from torch_trn.lowering.move import RowWalk, blocks, inputs_of, mover, outputs_of, transfer
from torch_trn.lowering.part import Part
from torch_trn.lowering.registry import host_only, lowering
from torch_trn.memory import Pool
from torch_trn.program import Program

__all__ = ["along", "selection", "subscripted"]

_DATA_DEPENDENT = "the shape of its result depends on data, and a NeuronCore Program is static"

#: Indices of one local_gather (isa).
GATHERED = 4096


# -- gathers ---------------------------------------------------------------------------------------
@lowering("aten::embedding")
def embedding(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Row indices[i] of the weight: one descriptor per row."""
    weight, index = call.args[:2]
    return _selected(call, core, shards, weight, 0, Part.of(index))


@lowering("aten::index_select")
def index_select(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Slices of `dim`: the run behind the dim is one descriptor."""
    x, dim, index = call.args[:3]
    spots = Part.of(index)
    return _selected(call, core, shards, x, dim, spots if spots.ndim else spots.insert(0))


def _selected(
    call: OpCall, core: CoreSpec, shards: int, x: TensorSpec, dim: int, index: Part
) -> Program:
    """x with ``dim`` replaced by the dims of ``index``."""
    b = mover(core, call.name)
    pools, (result,) = inputs_of(b, call), outputs_of(b, call)
    found = selection(Part.of(x), dim, index, Part.of(call.outs[0]), pools[1])
    gather(b, found, pools[0], result, shards)
    return b.build()


def selection(x: Part, dim: int, index: Part, other: Part, pool: Pool) -> Gathered:
    """x along ``dim`` at ``index``, whose dims ``other`` has in that place."""
    if not x.ndim:
        x, other = x.insert(0), other if other.ndim else other.insert(0)
    dim = x.dim(dim)
    size, step, before = x.sizes[dim], x.strides[dim], x.sizes[:dim]
    table = x.drop(dim)
    for axis, count in enumerate(index.sizes):
        table = table.insert(dim + axis, count, 0)
    for count in reversed(before):
        index = index.insert(0, count, 0)
    numbers = (Number(pool, index, size, step),)
    if other.sizes != table.sizes:
        other = replace(other, sizes=table.sizes, strides=other.expand(table.sizes).strides)
    return Gathered(table, other, numbers, index.ndim)


@lowering("aten::gather", "aten::take_along_dim")
def gather_(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """x[index] along a dim: local_gather in SBUF for rows that fit, else a descriptor each."""
    x, dim, index = call.args[:3]
    if _in_sbuf(core, x, dim, index):
        return _gather_in_sbuf(call, core, shards, x, index)
    b = mover(core, call.name)
    pools, (result,) = inputs_of(b, call), outputs_of(b, call)
    table, numbers = along(Part.of(x), dim, Part.of(index), pools[1])
    out = Part.of(call.outs[0])
    gather(b, Gathered(table, out, numbers, out.ndim), pools[0], result, shards)
    return b.build()


def along(x: Part, dim: int, index: Part, pool: Pool) -> tuple[Part, tuple[Number, ...]]:
    """What ``index`` chooses of x along ``dim``, element by element."""
    if not x.ndim:
        index = index if index.ndim else index.insert(0)
        return replace(x, sizes=index.sizes, strides=(0,) * index.ndim), (
            Number(pool, index, 1, 1),)  # fmt: skip
    dim = x.dim(dim)
    strides = (*x.strides[:dim], 0, *x.strides[dim + 1 :])
    sizes = index.sizes if index.ndim else (1,)
    index = index if index.ndim else index.insert(0)
    number = Number(pool, index, x.sizes[dim], x.strides[dim])
    return replace(x, sizes=sizes, strides=strides), (number,)


def _in_sbuf(core: CoreSpec, x: TensorSpec, dim: int, index: TensorSpec) -> bool:
    """Whether rows of x fit in SBUF and reading them whole beats a descriptor per element."""
    if not x.ndim or dim % x.ndim != x.ndim - 1 or x.strides[-1] != 1:
        return False
    row = x.shape[-1] * x.itemsize
    if 2 * row > core.sbuf_partition_bytes // 2 or x.itemsize > 4 or not index.shape:
        return False
    streamed_ps = row * 10**12 // core.dma_bytes_per_s
    return index.shape[-1] * core.dma_descriptor_ps // core.dma_engines > streamed_ps


def _gather_in_sbuf(
    call: OpCall, core: CoreSpec, shards: int, x: TensorSpec, index: TensorSpec
) -> Program:
    """Rows of x in partitions, gathered there; longer rows of indices in chunks."""
    b = mover(core, call.name)
    pools, (result,) = inputs_of(b, call), outputs_of(b, call)
    out = call.outs[0]
    n, per_row = x.shape[-1], index.shape[-1]
    lead = index.shape[:-1]
    walks = [RowWalk.of(Part.of(spec), lead) for spec in (x, index, out)]
    tile = b.sbuf("rows", free_bytes=n * x.itemsize, slots=2)
    width = min(per_row, GATHERED)
    spots = b.sbuf("index_tile", free_bytes=width * index.itemsize, slots=2)
    picked = b.sbuf("picked", free_bytes=width * x.itemsize, slots=2)
    for block in blocks(b, product(lead) if out.numel else 0, PARTITIONS, shards):
        parts = block.count
        walks[0].load(b, tile[block.number], pools[0], block.row, parts, 0, n)
        for at in range(0, per_row, width):
            count = min(width, per_row - at)
            slot = block.number * ceil_div(per_row, width) + at // width
            walks[1].load(b, spots[slot], pools[1], block.row, parts, at, count)
            b.local_gather(picked[slot], tile[block.number].view(x.dtype, (1, n)),
                           spots[slot].view(index.dtype, (1, count)), n=count, dtype=x.dtype,
                           partitions=parts)  # fmt: skip
            walks[2].store(b, result, picked[slot], block.row, parts, at, count)
    return b.build()


@lowering("aten::take")
def take(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Elements by their place in row-major order; x is laid out so first if it is not."""
    x, index = call.args[:2]
    b = mover(core, call.name)
    pools, (result,) = inputs_of(b, call), outputs_of(b, call)
    source, flat = pools[0], Part.of(x).flat()
    if flat is None:
        flat = Part(x.dtype, (x.numel,), (1,))
        source = b.hbm("ordered", nbytes=x.nbytes)
        # Every core needs all of it, so every core writes all of it, the same values.
        transfer(b, source, Part.of(TensorSpec.contiguous(x.dtype, *x.shape)), pools[0], Part.of(x))
    spots, out = Part.of(index), Part.of(call.outs[0])
    table = replace(flat, sizes=spots.sizes, strides=(0,) * spots.ndim)
    numbers = (Number(pools[1], spots, x.numel, flat.strides[0], wraps=True),)
    gather(b, Gathered(table, out, numbers, spots.ndim), source, result, shards)
    return b.build()


@lowering("aten::index", "aten::_unsafe_index")
def index(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """x[i, j, :]: what lies behind the last index is one descriptor."""
    x, indices = call.args[:2]
    b = mover(core, call.name)
    pools, (result,) = inputs_of(b, call), outputs_of(b, call)
    out = Part.of(call.outs[0])
    if not any(isinstance(spec, TensorSpec) for spec in indices):
        transfer(b, result, out, pools[0], Part.of(x), shards)
        return b.build()
    gather(b, subscripted(call, x, indices, out, pools[1:]).found, pools[0], result, shards)
    return b.build()


@dataclass(frozen=True)
class Subscript:
    """x[indices] as rows, and which dim of x each of their dims is (None: of the indices)."""

    found: Gathered
    places: tuple[int | None, ...]


def subscripted(
    call: OpCall, x: TensorSpec, indices: Sequence[Any], other: Part, pools: Sequence[Pool]
) -> Subscript:
    """x at index tensors: their dims come where they stand together, else in front.

    other: what has the sizes of the result or broadcasts to them.
    """
    given = [dim for dim, spec in enumerate(indices) if isinstance(spec, TensorSpec)]
    specs = [indices[dim] for dim in given]
    if any(spec.dtype in (torch.bool, torch.uint8) for spec in specs):
        raise UnsupportedOpError(call.name, _DATA_DEPENDENT)
    shape = torch.broadcast_shapes(*(spec.shape for spec in specs))
    together = given[-1] - given[0] + 1 == len(given)
    before = list(range(given[0])) if together else []
    behind = [dim for dim in range(x.ndim) if dim not in given and dim not in before]
    places = (*before, *(None for _ in shape), *behind)
    source = Part.of(x)
    sizes = (*(x.shape[d] for d in before), *shape, *(x.shape[d] for d in behind))
    strides = tuple(0 if dim is None else x.strides[dim] for dim in places)
    numbers = []
    for dim, spec, pool in zip(given, specs, pools, strict=False):
        part = Part(spec.dtype, tuple(shape), tuple(broadcast_strides(spec, shape)))
        for axis in reversed(before):
            part = part.insert(0, x.shape[axis], 0)
        numbers.append(Number(pool, part, x.shape[dim], x.strides[dim], wraps=True))
    table = replace(source, sizes=sizes, strides=strides)
    other = other.expand(sizes) if other.sizes != sizes else other
    found = Gathered(table, other, tuple(numbers), len(before) + len(shape))
    return Subscript(found, places)


host_only(
    _DATA_DEPENDENT,
    "aten::nonzero", "aten::where", "aten::masked_select", "aten::unique", "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::unique_dim_consecutive",
    "aten::nonzero_static", "aten::repeat_interleave", "aten::bincount", "aten::histogram",
    "aten::masked_scatter", "aten::masked_scatter_backward",
    "aten::_histogramdd_bin_edges", "aten::_histogramdd_from_bin_cts",
    "aten::_histogramdd_from_bin_tensors", "aten::segment_reduce",
    "aten::_segment_reduce_backward",
)  # fmt: skip

host_only(
    "factorising a matrix is a chain of dependent scalar steps that no engine has instructions for",
    "aten::_linalg_svd", "aten::_linalg_eigh", "aten::linalg_eig", "aten::linalg_qr",
    "aten::linalg_lu", "aten::linalg_lu_factor_ex", "aten::linalg_lu_solve", "aten::_linalg_det",
    "aten::_linalg_slogdet", "aten::_linalg_solve_ex", "aten::linalg_inv_ex",
    "aten::linalg_cholesky_ex", "aten::cholesky", "aten::cholesky_solve",
    "aten::cholesky_inverse", "aten::linalg_solve_triangular", "aten::triangular_solve",
    "aten::linalg_ldl_factor_ex", "aten::linalg_ldl_solve", "aten::linalg_lstsq", "aten::geqrf",
    "aten::ormqr", "aten::linalg_householder_product", "aten::lu_unpack", "aten::linalg_pinv",
    "aten::linalg_matrix_exp",
)  # fmt: skip

host_only(
    "no engine has a Fourier transform, and a matrix of all frequencies would not be one",
    "aten::_fft_c2c",
    "aten::_fft_r2c",
    "aten::_fft_c2r",
)

host_only(
    "indices beside a mask are decompositions of a compiler, which runs them as its own kernels",
    "aten::_unsafe_masked_index", "aten::_unsafe_masked_index_put_accumulate",
)  # fmt: skip

host_only(
    "its steps depend on each other through as many time steps as the lengths, which are data, say",
    "aten::_ctc_loss", "aten::_ctc_loss_backward",
)  # fmt: skip
