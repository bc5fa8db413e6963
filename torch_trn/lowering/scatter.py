"""Scatters: slices and elements of a table replaced or combined at given numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.errors import UnsupportedOpError
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.combine import NEUTRAL, combine
from torch_trn.lowering.index import along, selection, subscripted
from torch_trn.lowering.indexed import ROW_BYTES, Gathered, Number, scatter
from torch_trn.lowering.layout import ceil_div, product
from torch_trn.lowering.masked import as_fill, masked_fill
from torch_trn.lowering.move import fill, inputs_of, mover, outputs_of, transfer
from torch_trn.lowering.part import Part
from torch_trn.lowering.registry import lowering
from torch_trn.memory import Pool, TileRef
from torch_trn.program import Program

__all__ = ["Scattered"]


class Scattered:
    """A table made from a base (or zeros), then rows scattered into it, cores side by side."""

    def __init__(self, call: OpCall, core: CoreSpec, shards: int) -> None:
        self.b = mover(core, call.name)
        self.call, self.shards = call, shards
        self.pools = inputs_of(self.b, call)
        self.results = outputs_of(self.b, call)
        self.result = self.results[0]
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
    if (filled := as_fill(call)) is not None:
        return masked_fill(filled, core, shards)
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


@lowering("aten::max_unpool2d", "aten::max_unpool3d")
def max_unpool(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(self, indices, ...): zeros, then each element at its place in its plane."""
    x, index = call.args[:2]
    dims = 3 if "3d" in call.name else 2
    work = Scattered(call, core, shards)
    lead = work.out.ndim - dims
    planes = work.out.sizes[:lead]
    flat = work.out.reshape((*planes, product(work.out.sizes[lead:])))
    if flat is None:
        raise UnsupportedOpError(call.name, "the planes of its result have gaps")
    work.out = flat
    strides = (*flat.strides[:lead], *(0 for _ in range(dims)))
    table = replace(flat, sizes=x.shape, strides=strides)
    numbers = (Number(work.pools[1], Part.of(index), flat.sizes[-1], flat.strides[-1]),)
    found = Gathered(table, Part.of(x), numbers, x.ndim)
    places = (*range(lead), *(None for _ in range(dims)))
    return work.run(found, places, work.pools[0])
