"""Gathers and scatters: rows by indirect DMA, elements within SBUF where that is cheaper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.layout import PARTITIONS, ceil_div, product
from torch_trn.lowering.move import fill, mover
from torch_trn.lowering.registry import host_only, lowering
from torch_trn.lowering.run import loop
from torch_trn.memory import Pool
from torch_trn.program import Builder, Program

#: Bytes of a gathered row in one partition of a tile.
ROW_BYTES = 16384

#: Rows of a gather that one partition takes in a tile, where they are short.
ROWS_PER_PARTITION = 64

#: Indices that one load brings for a partition.
INDEX_COLUMNS = 512


def indexed_rows(
    b: Builder, table: Pool, indices: TensorSpec, rows: int, row_bytes: int, other: Pool,
    *, scatter: bool = False, accumulate: bool = False, name: str = "index",
) -> None:  # fmt: skip
    """Move `rows` rows between `table` (at given row numbers) and the contiguous `other`.

    A tile is 128 partitions x some rows each; its row numbers are loaded first.
    """
    if not rows or not row_bytes:
        return
    pieces = ceil_div(row_bytes, ROW_BYTES)
    width = ceil_div(row_bytes, pieces)
    per = max(1, min(ROWS_PER_PARTITION, ROW_BYTES // width, ceil_div(rows, PARTITIONS)))
    numbers = b.hbm(name, nbytes=indices.nbytes)
    index = b.sbuf(f"{name}_tile", free_bytes=per * indices.itemsize, slots=4)
    tile = b.sbuf(f"{name}_rows", free_bytes=per * width, slots=3)
    full, rest = divmod(rows, PARTITIONS * per)
    done = 0
    for trips, count in ((full, PARTITIONS * per), (1, rest)):
        if not trips or not count:
            continue
        parts = min(PARTITIONS, count)
        with loop(b, trips, "g") as g:
            at = g + done
            b.load(index[at], numbers, rows=parts,
                   row_bytes=ceil_div(count, parts) * indices.itemsize)  # fmt: skip
            for piece in range(pieces):
                slot = tile[at * pieces + piece]
                if scatter:
                    b.load(slot, other, rows=count, row_bytes=width)
                    b.store(table, slot, rows=count, row_bytes=width, index=index[at],
                            accumulate=accumulate)  # fmt: skip
                else:
                    b.load(slot, table, rows=count, row_bytes=width, index=index[at])
                    b.store(other, slot, rows=count, row_bytes=width)
        done += trips


def gather_rows(
    call: OpCall, core: CoreSpec, shards: int, table: TensorSpec, indices: TensorSpec,
    rows: int, row_bytes: int,
) -> Program:  # fmt: skip
    """A Program that only gathers."""
    b = mover(core, call.name)
    source = b.hbm("table", nbytes=table.nbytes)
    out = b.hbm("out0", nbytes=call.outs[0].nbytes)
    indexed_rows(b, source, indices, ceil_div(rows, shards), row_bytes, out)
    return b.build()


@lowering("aten::embedding")
def embedding(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Row indices[i] of the weight: one descriptor per row."""
    weight, indices = call.args[:2]
    run = product(weight.shape[1:]) if weight.strides[-1] == 1 else 1
    rows = indices.numel * product(weight.shape[1:]) // max(run, 1)
    return gather_rows(call, core, shards, weight, indices, rows, run * weight.itemsize)


@lowering("aten::index_select")
def index_select(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Slices of `dim`: the run behind the dim is one descriptor."""
    x, dim, indices = call.args[:3]
    return gather_rows(call, core, shards, x, indices, *_behind(x, dim, call.outs[0].numel))


def _behind(x: TensorSpec, dim: int, numel: int) -> tuple[int, int]:
    """(rows, row bytes) of `numel` elements in slices behind `dim` of `x`."""
    dim = dim % max(x.ndim, 1)
    run = product(x.shape[dim + 1 :]) if x.is_contiguous else 1
    return numel // max(run, 1), max(run, 1) * x.itemsize


@lowering("aten::embedding_dense_backward", "aten::_embedding_bag_dense_backward")
def embedding_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Zeros, then every row of grad added to its row of the table by the DMA."""
    grad, indices = call.args[:2]
    out = call.outs[0]
    b = mover(core, call.name)
    source, table = b.hbm("grad", nbytes=grad.nbytes), b.hbm("out0", nbytes=out.nbytes)
    fill(b, table, ceil_div(out.nbytes, shards))
    row_bytes = product(out.shape[1:]) * out.itemsize
    indexed_rows(b, table, indices, ceil_div(indices.numel, shards), row_bytes, source,
                 scatter=True, accumulate=True)  # fmt: skip
    return b.build()


@lowering("aten::_embedding_bag", "aten::_embedding_bag_forward_only")
def embedding_bag(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Rows gathered, then added to their bag's row by the DMA; offsets become bag numbers."""
    weight, indices, offsets = call.args[:3]
    out = call.outs[0]
    b = mover(core, call.name)
    table, result = b.hbm("table", nbytes=weight.nbytes), b.hbm("out0", nbytes=out.nbytes)
    row_bytes = product(weight.shape[1:]) * weight.itemsize
    rows = b.hbm("rows", nbytes=indices.numel * row_bytes)
    fill(b, result, ceil_div(out.nbytes, shards))
    count = ceil_div(indices.numel, shards)
    indexed_rows(b, table, indices, count, row_bytes, rows)
    bags = TensorSpec.contiguous(offsets.dtype, indices.numel)
    indexed_rows(b, result, bags, count, row_bytes, rows, scatter=True, accumulate=True, name="bag")
    for number, extra in enumerate(call.outs[1:], 1):
        fill(b, b.hbm(f"out{number}", nbytes=extra.nbytes), ceil_div(extra.nbytes, shards))
    return b.build()


@lowering("aten::_embedding_bag_backward")
def embedding_bag_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """As embedding_dense_backward: each index takes its bag's gradient."""
    return embedding_backward(OpCall(call.name, call.args[:2], call.outs), core, shards)


# -- element gathers -----------------------------------------------------------------------------
def _in_sbuf(core: CoreSpec, x: TensorSpec, dim: int, index: TensorSpec) -> bool:
    """Whether rows of x fit in SBUF and reading them whole beats a descriptor per element."""
    if not x.ndim or dim % x.ndim != x.ndim - 1 or x.strides[-1] != 1:
        return False
    row = x.shape[-1] * x.itemsize
    if 2 * row > core.sbuf_partition_bytes // 2 or x.itemsize > 4:
        return False
    per_row = index.shape[-1] if index.shape else 1
    streamed_ps = row * 10**12 // core.dma_bytes_per_s
    return per_row * core.dma_descriptor_ps // core.dma_engines > streamed_ps


@lowering("aten::gather", "aten::take_along_dim")
def gather(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """x[index] along a dim: local_gather in SBUF for rows that fit, else a descriptor each."""
    x, dim, index = call.args[:3]
    if not _in_sbuf(core, x, dim, index):
        return gather_rows(call, core, shards, x, index, index.numel, x.itemsize)
    b = mover(core, call.name)
    source, numbers = b.hbm("in0", nbytes=x.nbytes), b.hbm("index", nbytes=index.nbytes)
    out = b.hbm("out0", nbytes=call.outs[0].nbytes)
    per_row, row = index.shape[-1], x.shape[-1] * x.itemsize
    rows = ceil_div(index.numel // max(per_row, 1), shards)
    tile = b.sbuf("rows", free_bytes=row, slots=2)
    width = min(per_row, 4096)
    spots = b.sbuf("index_tile", free_bytes=width * index.itemsize, slots=2)
    picked = b.sbuf("picked", free_bytes=width * x.itemsize, slots=2)
    for trips, parts in ((rows // PARTITIONS, PARTITIONS), (1, rows % PARTITIONS)):
        if not trips or not parts:
            continue
        with loop(b, trips, "r") as r:
            b.load(tile[r], source, rows=parts, row_bytes=row)
            for at in range(0, per_row, width):
                n = min(width, per_row - at)
                slot = r * ceil_div(per_row, width) + at // width
                b.load(spots[slot], numbers, rows=parts, row_bytes=n * index.itemsize)
                b.local_gather(picked[slot], tile[r], spots[slot], n=n, dtype=x.dtype,
                               partitions=parts)  # fmt: skip
                b.store(out, picked[slot], rows=parts, row_bytes=n * x.itemsize)
    return b.build()


@lowering("aten::take", "aten::_unsafe_masked_index")
def take(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Elements by flat position."""
    x = call.args[0]
    index = _first_index(call.args[1:], call.outs[0])
    return gather_rows(call, core, shards, x, index, call.outs[0].numel, x.itemsize)


def _first_index(args: Sequence[Any], default: TensorSpec) -> TensorSpec:
    """The first index tensor among arguments and lists of arguments."""
    for arg in args:
        for item in arg if isinstance(arg, tuple) else (arg,):
            if isinstance(item, TensorSpec):
                return item
    return default


@lowering("aten::index", "aten::_unsafe_index")
def index(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """x[i, j, :]: what lies behind the last index is one descriptor."""
    x, indices = call.args[:2]
    given = [dim for dim, spec in enumerate(indices) if isinstance(spec, TensorSpec)]
    if not given:
        return gather_rows(call, core, shards, x, x, call.outs[0].numel, x.itemsize)
    rows, run = _behind(x, given[-1], call.outs[0].numel)
    return gather_rows(call, core, shards, x, indices[given[0]], rows, run)


def _scattered(
    call: OpCall, core: CoreSpec, shards: int, base: TensorSpec, index_spec: TensorSpec,
    values: Any, rows: int, row_bytes: int, accumulate: bool,
) -> Program:  # fmt: skip
    """The base copied (unless in place), then rows written or added at their numbers."""
    out = call.outs[0]
    b = mover(core, call.name)
    table = b.hbm("out0", nbytes=out.nbytes)
    if not call.name.partition(".")[0].endswith("_"):
        source = b.hbm("in0", nbytes=base.nbytes)
        copy_runs(b, table, source, ceil_div(out.nbytes, shards), out.nbytes)
    nbytes = values.nbytes if isinstance(values, TensorSpec) else rows * row_bytes
    given = b.hbm("values", nbytes=nbytes)
    indexed_rows(b, table, index_spec, ceil_div(rows, shards), row_bytes, given, scatter=True,
                 accumulate=accumulate)  # fmt: skip
    return b.build()


@lowering("aten::scatter", "aten::scatter_add", "aten::scatter_reduce")
def scatter(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(self, dim, index, src or value): a descriptor per element."""
    x, _dim, index_spec, values = call.args[:4]
    adds = "add" in call.name or "reduce" in call.name or len(call.args) > 4
    return _scattered(call, core, shards, x, index_spec, values, index_spec.numel, x.itemsize, adds)


@lowering("aten::index_put", "aten::_index_put_impl", "aten::_unsafe_index_put",
          "aten::_unsafe_masked_index_put_accumulate")  # fmt: skip
def index_put(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(self, indices, values, accumulate)."""
    x, indices, values = call.args[:3]
    if isinstance(values, tuple):
        indices, values = values, call.args[3]
    given = [dim for dim, spec in enumerate(indices) if isinstance(spec, TensorSpec)]
    index_spec = indices[given[0]] if given else x
    behind = product(x.shape[given[-1] + 1 :]) if given and x.is_contiguous else 1
    numel = max(values.numel, index_spec.numel * behind) if isinstance(values, TensorSpec) else 0
    accumulate = any(arg is True for arg in call.args[3:4]) or "accumulate" in call.name
    return _scattered(
        call, core, shards, x, index_spec, values, numel // max(behind, 1), behind * x.itemsize,
        accumulate,
    )  # fmt: skip


@lowering("aten::index_add", "aten::index_copy", "aten::index_fill", "aten::index_reduce",
          "aten::put")  # fmt: skip
def index_add(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(self, dim, index, source or value, ...); put(self, index, source) element by element."""
    x = call.args[0]
    if "put" in call.name:
        spots, source = call.args[1:3]
        return _scattered(call, core, shards, x, spots, source, spots.numel, x.itemsize, False)
    dim, spots, source = call.args[1:4]
    outer = product(x.shape) // max(x.shape[dim] if x.ndim else 1, 1)
    rows, run = _behind(x, dim, outer * spots.numel)
    adds = "add" in call.name or "reduce" in call.name
    return _scattered(call, core, shards, x, spots, source, rows, run, adds)


_DATA_DEPENDENT = "the shape of its result depends on data, and a NeuronCore Program is static"
host_only(
    _DATA_DEPENDENT,
    "aten::nonzero", "aten::where", "aten::masked_select", "aten::unique", "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::unique_dim_consecutive",
    "aten::nonzero_static", "aten::repeat_interleave", "aten::bincount", "aten::histogram",
    "aten::masked_scatter", "aten::masked_scatter_backward", "aten::histc",
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
