"""Gathers and scatters: rows by indirect DMA, elements within SBUF where that is cheaper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.errors import UnsupportedOpError
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.combine import NEUTRAL, combine
from torch_trn.lowering.indexed import ROW_BYTES, Gathered, Number, gather, scatter
from torch_trn.lowering.layout import PARTITIONS, broadcast_strides, ceil_div, product
from torch_trn.lowering.move import RowWalk, blocks, fill, inputs_of, mover, outputs_of, transfer
from torch_trn.lowering.part import Part
from torch_trn.lowering.registry import host_only, lowering
from torch_trn.memory import Pool, TileRef
from torch_trn.program import Program

__all__: list[str] = []

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


# -- scatters --------------------------------------------------------------------------------------
class Scattered:
    """A table made from a base (or zeros), then rows scattered into it, cores side by side."""

    def __init__(self, call: OpCall, core: CoreSpec, shards: int) -> None:
        self.b = mover(core, call.name)
        self.call, self.shards = call, shards
        self.pools = inputs_of(self.b, call)
        (self.result,) = outputs_of(self.b, call)
        self.out = Part.of(call.outs[0])

    def run(
        self, found: Gathered, places: Sequence[int | None], values: Pool | float, op: str = "",
        base: Part | None = None, scale: float = 1.0, keep: bool = True,
    ) -> Program:  # fmt: skip
        """places: which dim of the table each dim of ``found`` is; op: "" replaces.

        base: part of the first argument to start from, unless in place; None: zeros. keep: whether
        what was there takes part in ``op``.
        """
        b, out, shards = self.b, self.out, self.shards
        found, base, out, places, lead = self._shared(found, base, out, list(places))
        if base is None:
            fill(b, self.result, out, 0, shards, lead=lead)
        elif not self.call.name.partition(".")[0].endswith("_"):
            transfer(b, self.result, out, self.pools[0], base, shards, lead=lead)
        if not op:
            source = values if isinstance(values, Pool) else self._tile(found, values)
            scatter(b, found, self.result, source, shards, lead)
            return b.build()
        if not isinstance(values, Pool):
            values = self.one(values, found.other.dtype)
        if not keep:
            scatter(b, found, self.result, self._tile(found, NEUTRAL[op]), shards, lead, "old")
        found, outer = _outer_first(found, places)
        combine(b, found, outer, self.result, values, op, shards, lead, scale)
        return b.build()

    def _shared(
        self, found: Gathered, base: Part | None, out: Part, places: list[int | None]
    ) -> tuple[Gathered, Part | None, Part, list[int | None], int]:
        """Everything with a first dim that cores share: all steps of an element on one core."""
        if self.shards == 1:
            return found, base, out, places, 0
        shards = self.shards
        usable = [
            (out.sizes[dim], -at, at) for at, dim in enumerate(places)
            if dim is not None and out.sizes[dim] > 1
            and (at < found.rank or out.strides[dim] != 1 or not out.sizes[dim] % shards)
        ]  # fmt: skip
        if not usable:
            return (
                found.insert(),
                base and base.insert(0),
                out.insert(0),
                [None, *(None if dim is None else dim + 1 for dim in places)],
                1,
            )
        at = max(usable)[2]
        dim = places[at]
        assert dim is not None
        size = out.sizes[dim]
        if at >= found.rank and out.strides[dim] == 1:
            cut = (shards, size // shards)
            out, base = out.split(dim, *cut), base and base.split(dim, *cut)
            found = replace(found, table=found.table.split(at, *cut),
                            other=found.other.split(at, *cut))  # fmt: skip
            places = [d + 1 if d is not None and d > dim else d for d in places]
            places.insert(at + 1, dim + 1)
            size = shards
        found = found.front(at) if at < found.rank else found.pull(at)
        places = [places[at], *places[:at], *places[at + 1 :]]
        return found, base and base.front(dim), out.front(dim), places, ceil_div(size, shards)

    def _tile(self, found: Gathered, value: float) -> TileRef:
        """A constant tile as large as any that a scatter stores from."""
        size = found.table.dtype.itemsize
        width = max(1, min(found.width, ROW_BYTES // size))
        tile = self.b.sbuf("constant", free_bytes=max(ROW_BYTES, width * size))
        self.b.memset(tile[0].view(found.table.dtype, (1, ROW_BYTES // size)),
                      value=_number(value, found.table.dtype), n=ROW_BYTES // size,
                      dtype=found.table.dtype)  # fmt: skip
        return tile[0]

    def one(self, value: float, dtype: torch.dtype) -> Pool:
        """A number in HBM. Every core writes it."""
        pool = self.b.hbm("number", nbytes=dtype.itemsize)
        fill(self.b, pool, Part(dtype, (1,), (1,)), value, name="number")
        return pool


def _number(value: Any, dtype: torch.dtype) -> Any:
    if dtype.is_floating_point or dtype.is_complex:
        return float(value) if not isinstance(value, complex) else value
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        info = torch.iinfo(dtype)
        return info.max if value > 0 else info.min
    return int(value)


def _outer_first(found: Gathered, places: Sequence[int | None]) -> tuple[Gathered, int]:
    """Row dims along which the table moves first, then those of the indices."""
    rows = range(found.rank)
    outer = [at for at in rows if places[at] is not None]
    inner = [at for at in rows if places[at] is None]
    # A first dim of one that only says which core works counts as outer.
    if inner and inner[0] == 0 and found.table.sizes[0] == 1 and len(inner) > 1:
        outer, inner = [0, *outer], inner[1:]
    order = [*outer, *inner]
    rest = list(range(found.rank, found.table.ndim))
    numbers = tuple(replace(n, part=n.part.permute(order)) for n in found.numbers)
    moved = replace(
        found, table=found.table.permute(order + rest), other=found.other.permute(order + rest),
        numbers=numbers,
    )  # fmt: skip
    return moved, len(outer)


@lowering("aten::embedding_dense_backward")
def embedding_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(grad, indices, num_weights, padding_idx, scale_grad_by_freq): zeros, then rows added."""
    grad, index = call.args[:2]
    padding, by_frequency = call.arg(3, -1), call.arg(4, False)
    if by_frequency:
        raise UnsupportedOpError(call.name, "gradients scaled by how often an index occurs")
    work = Scattered(call, core, shards)
    spots = Part.of(index)
    rank = spots.ndim
    found = selection(work.out, 0, spots, Part.of(grad), work.pools[1])
    places = (*(None for _ in range(rank)), *range(1, work.out.ndim))
    program = work.run(found, places, work.pools[0], "add")
    if padding < 0:
        return program
    b = work.b
    fill(b, work.result, work.out.narrow(0, padding, 1).insert(0), 0, shards, "padding", lead=1)
    return b.build()


@lowering("aten::index_add", "aten::index_copy", "aten::index_fill", "aten::index_reduce")
def index_add(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(self, dim, index, source or value, ...): slices of a dim replaced or combined."""
    x, dim, index, source = call.args[:4]
    work = Scattered(call, core, shards)
    values: Pool | float = work.pools[2] if isinstance(source, TensorSpec) else source
    spots = Part.of(index)
    spots = spots if spots.ndim else spots.insert(0)
    given = source if isinstance(source, TensorSpec) else TensorSpec(x.dtype, (), ())
    found = selection(work.out, dim, spots, Part.of(given), work.pools[1])
    dim = work.out.dim(dim)
    places = tuple(None if axis == dim else axis for axis in range(max(work.out.ndim, 1)))
    op, keep, scale = "", True, 1.0
    if "index_add" in call.name:
        op, scale = "add", float(call.arg(4, 1))
    elif "reduce" in call.name:
        op, keep = _reduction(call, call.args[4]), call.arg(5, True)
    return work.run(found, places, values, op, Part.of(x), scale, keep)


#: Reductions of scatters by name.
_OPS = {"sum": "add", "add": "add", "prod": "multiply", "multiply": "multiply", "amax": "max",
        "amin": "min"}  # fmt: skip


def _reduction(call: OpCall, name: str) -> str:
    if name not in _OPS:
        raise UnsupportedOpError(
            call.name, f"reduce={name!r} would need how many values meet, which depends on data"
        )
    return _OPS[name]


@lowering("aten::scatter", "aten::scatter_add", "aten::scatter_reduce")
def scatter_(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(self, dim, index, src or value, reduce, include_self): element by element along a dim."""
    x, dim, index, source = call.args[:4]
    work = Scattered(call, core, shards)
    table, numbers = along(work.out, dim, Part.of(index), work.pools[1])
    values: Pool | float = work.pools[2] if isinstance(source, TensorSpec) else source
    if isinstance(source, TensorSpec):
        other = Part.of(source)
        other = replace(other if other.ndim else other.insert(0), sizes=table.sizes)
    else:
        other = Part(x.dtype, table.sizes, (0,) * table.ndim)
    dim = work.out.dim(dim)
    places = tuple(None if axis == dim else axis for axis in range(table.ndim))
    op, keep = "", True
    if "scatter_add" in call.name:
        op = "add"
    elif len(call.args) > 4 and isinstance(call.args[4], str):
        op, keep = _reduction(call, call.args[4]), call.arg(5, True)
    found = Gathered(table, other, numbers, table.ndim)
    return work.run(found, places, values, op, Part.of(x), keep=keep)


@lowering("aten::index_put", "aten::_index_put_impl", "aten::_unsafe_index_put")
def index_put(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(self, indices, values, accumulate)."""
    x, indices, values = call.args[:3]
    work = Scattered(call, core, shards)
    given = [spec for spec in indices if isinstance(spec, TensorSpec)]
    pool = work.pools[1 + len(given)]
    if not given:
        raise UnsupportedOpError(call.name, "no index tensor is given: copy_ or add_ does that")
    subscript = subscripted(call, x, indices, Part.of(values), work.pools[1:])
    op = "add" if call.arg(3, False) else ""
    table = replace(subscript.found.table, strides=tuple(
        0 if dim is None else work.out.strides[dim] for dim in subscript.places))  # fmt: skip
    dims = [dim for dim, spec in enumerate(indices) if isinstance(spec, TensorSpec)]
    numbers = tuple(
        replace(number, step=work.out.strides[dim])
        for number, dim in zip(subscript.found.numbers, dims, strict=True)
    )
    found = replace(subscript.found, table=table, numbers=numbers)
    return work.run(found, subscript.places, pool, op, Part.of(x))


@lowering("aten::put")
def put(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(self, index, source, accumulate): elements by their place in row-major order."""
    x, index, source = call.args[:3]
    work = Scattered(call, core, shards)
    flat = work.out.flat()
    if flat is None:
        raise UnsupportedOpError(
            call.name, "places count in row-major order: make self contiguous() first"
        )
    spots, given = Part.of(index), Part.of(source)
    given = given.reshape(spots.sizes) or given
    table = replace(flat, sizes=spots.sizes, strides=(0,) * spots.ndim)
    numbers = (Number(work.pools[1], spots, x.numel, flat.strides[0], wraps=True),)
    found = Gathered(table, given, numbers, spots.ndim)
    op = "add" if call.arg(3, False) else ""
    return work.run(found, (None,) * spots.ndim, work.pools[2], op, Part.of(x))


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
