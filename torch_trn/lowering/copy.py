"""Copies and layout changes: clone, cat, roll, flip, repeat, copies of views and their backward.

Runs that are contiguous on both sides go from HBM to HBM by DMA alone; a copy whose sides run in
different directions is turned in SBUF; a copy that converts passes an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from itertools import product as combinations
from typing import Any

from torch_trn.chip import CoreSpec
from torch_trn.errors import UnsupportedOpError
from torch_trn.lowering.call import REAL_OF, OpCall, TensorSpec
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import ceil_div, grid
from torch_trn.lowering.move import (
    FILL_BYTES,
    fill,
    inputs_of,
    mover,
    needs_turn,
    outputs_of,
    tiles_of,
    transfer,
)  # fmt: skip
from torch_trn.lowering.part import Part, extent
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.reorder import permuted
from torch_trn.lowering.run import lower_kernel
from torch_trn.program import Builder, Program


@lowering(
    "aten::clone", "aten::contiguous", "aten::_to_copy", "aten::to", "aten::lift_fresh_copy",
    "aten::alias_copy", "aten::detach_copy", "aten::_lazy_clone",
)  # fmt: skip
def clone(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """A copy of the first argument in the result's layout and dtype."""
    return copy_tensor(call, core, shards, 0)


@lowering("aten::copy", "aten::_copy_from", "aten::_copy_from_and_resize")
def copy_(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """copy_(self, src): src into the result; _copy_from(self, dst) the other way round."""
    return copy_tensor(call, core, shards, 0 if "_copy_from" in call.name else 1)


def copy_tensor(call: OpCall, core: CoreSpec, shards: int, argument: int) -> Program:
    """The result = tensor ``argument`` of the same shape (or broadcast), converted."""
    out, source = call.outs[0], call.args[argument]
    same = out.dtype == source.dtype and source.numel == out.numel
    if out.dtype.is_complex or source.dtype.is_complex:
        return _copy_complex(call, core, shards, argument)
    if not same or needs_turn(out.shape, out, source) is not None:
        names = ("out0", f"in{argument}")
        kernel = Kernel(core, grid(out.shape, [out, source]), 1, shards, names)
        kernel.store(0, kernel.ins[0])
        return lower_kernel(kernel, call.name)
    b = mover(core, call.name)
    pools, (result,) = inputs_of(b, call), outputs_of(b, call)
    given = Part.of(source).expand(out.shape)
    transfer(b, result, Part.of(out), pools[argument], given, shards)
    return b.build()


def _copy_complex(call: OpCall, core: CoreSpec, shards: int, argument: int) -> Program:
    """By DMA, which converts: both halves, the real one alone, or that one and zeros."""
    b = mover(core, call.name)
    pools, (result,) = inputs_of(b, call), outputs_of(b, call)
    out = Part.of(call.outs[0])
    source = Part.of(call.args[argument]).expand(out.sizes)
    if out.dtype.is_complex and source.dtype.is_complex:
        if out.dtype != source.dtype:
            out, source = as_reals(out), as_reals(source)
        moved(b, result, pools[argument], [Move(out, source)], shards)
    elif source.dtype.is_complex:
        real = as_reals(source).select(source.ndim, 0)
        transfer(b, result, out, pools[argument], real, shards)
    else:
        halves = as_reals(out)
        fill(b, result, halves.select(out.ndim, 1), 0, shards)
        transfer(b, result, halves.select(out.ndim, 0), pools[argument], source, shards)
    return b.build()


@lowering("aten::_conj_copy", "aten::_neg_view_copy")
def negated_copy(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """x with its sign (or that of its imaginary part) turned."""
    out, source = (as_reals(Part.of(spec)) for spec in (call.outs[0], call.args[0]))
    b = mover(core, call.name)
    (pool,), (result,) = inputs_of(b, call), outputs_of(b, call)
    if "_conj" in call.name:
        last = out.ndim - 1
        transfer(b, result, out.select(last, 0), pool, source.select(last, 0), shards)
        out, source = out.select(last, 1), source.select(last, 1)
    dtype = out.dtype
    held = b.sbuf("held", free_bytes=FILL_BYTES, slots=2)
    for tile in tiles_of(b, (out, source), FILL_BYTES // dtype.itemsize, shards):
        n = tile.each * tile.width
        view = held[tile.number].view(dtype, (1, n))
        windows = [
            given[0].window(dtype, walk, tile.rows, tile.width, row=tile.row, offset=part.offset)
            for given, part, walk in zip((result, pool), (out, source), tile.walks, strict=True)
        ]
        copy: dict[str, Any] = {"rows": tile.rows, "row_bytes": tile.width * dtype.itemsize,
                "partitions": tile.parts}  # fmt: skip
        b.load(view, windows[1], **copy)
        b.tensor_scalar(view, view, op="multiply", operands=(-1,), n=n, partitions=tile.parts,
                        dtype=dtype)  # fmt: skip
        b.store(windows[0], view, **copy)
    return b.build()


# -- one source, pieces of it ----------------------------------------------------------------------
@dataclass(frozen=True)
class Move:
    """``to`` of a result = ``source`` of the first argument."""

    to: Part
    source: Part


Moves = Callable[[OpCall, Part, Part], Sequence[Move]]
"""(call, source, result) to what moves where."""


def moved(b: Builder, dst: Any, src: Any, moves: Sequence[Move], shards: int) -> None:
    """Each of ``moves``; through SBUF where rows would otherwise be single elements."""
    for number, move in enumerate(moves):
        if not permuted(b, dst, move.to, src, move.source, shards, f"turn{number}"):
            transfer(b, dst, move.to, src, move.source, shards)


def rearrange(moves: Moves) -> Callable[[OpCall, CoreSpec, int], Program]:
    """The lowering of an operator all of whose elements come from its first argument."""

    def lower(call: OpCall, core: CoreSpec, shards: int) -> Program:
        b = mover(core, call.name)
        pools, results = inputs_of(b, call), outputs_of(b, call)
        source, out = Part.of(call.args[0]), Part.of(call.outs[0])
        moved(b, results[0], pools[0], moves(call, source, out), shards)
        return b.build()

    return lower


def _view(function: Callable[..., Part]) -> Moves:
    """Moves of a view operator: ``function`` of the source and the other arguments."""

    def moves(call: OpCall, source: Part, out: Part) -> list[Move]:
        return [Move(out, function(source, *call.args[1:]))]

    return moves


def _in_order(call: OpCall, source: Part, out: Part) -> list[Move]:
    shaped = source.reshape(out.sizes)
    if shaped is None and (other := out.reshape(source.sizes)) is not None:
        return [Move(other, source)]
    return [Move(out, source if shaped is None else shaped)]


def _transposed(x: Part, first: int = 0, second: int = 1) -> Part:
    return x.swap(first, second) if x.ndim > 1 else x


def sliced(
    x: Part, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Part:
    first, length = slice_of(x.sizes[x.dim(dim)], start, end, step)
    return x.narrow(dim, first, length, step)


def slice_of(size: int, start: int | None, end: int | None, step: int = 1) -> tuple[int, int]:
    """(first, count) of a slice of a dim of ``size``, as torch clamps it."""
    first, last, _ = slice(start, end).indices(size)
    return first, max(0, ceil_div(last - first, step))


def strided(x: Part, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Part:
    return Part(x.dtype, tuple(size), tuple(stride), offset or 0)


def diagonal(x: Part, offset: int = 0, first: int = 0, second: int = 1) -> Part:
    return x.diagonal(offset, first, second)


def _reals(call: OpCall, source: Part, out: Part) -> list[Move]:
    """view_as_real and view_as_complex: pairs of reals on both sides."""
    return [Move(as_reals(out), as_reals(source))]


def as_reals(x: Part) -> Part:
    """A complex part as reals with a last dim of two."""
    if not x.dtype.is_complex:
        return x
    doubled = Part(REAL_OF[x.dtype], x.sizes, tuple(2 * step for step in x.strides), 2 * x.offset)
    return doubled.insert(x.ndim, 2, 1)


def _rotated(x: Part, k: int = 1, dims: Sequence[int] = (0, 1)) -> Part:
    k %= 4
    if k == 2:
        return x.flip(dims)
    if k == 1:
        return x.flip(dims[1:]).swap(*dims)
    return x.flip(dims[:1]).swap(*dims) if k == 3 else x


def _shuffled(call: OpCall, source: Part, out: Part) -> list[Move]:
    groups = call.args[1]
    each = source.sizes[1] // groups
    return [Move(out.split(1, each, groups), source.split(1, groups, each).swap(1, 2))]


def _pixels(call: OpCall, source: Part, out: Part) -> list[Move]:
    """pixel_shuffle: [.., c r r, h, w] to [.., c, h r, w r], and back."""
    r = call.args[1]
    if "unshuffle" in call.name:
        source, out = out, source
    c, h, w = out.sizes[-3:]
    deep = source.split(source.ndim - 3, c, r, r)
    wide = out.split(out.ndim - 1, w // r, r).split(out.ndim - 2, h // r, r)
    n = source.ndim - 3
    wide = wide.permute([*range(n), n, n + 2, n + 4, n + 1, n + 3])
    return [Move(deep, wide) if "unshuffle" in call.name else Move(wide, deep)]


def _rolled(call: OpCall, source: Part, out: Part) -> list[Move]:
    """Two pieces for each rolled dim."""
    shifts, dims = call.args[1], call.arg(2) or ()
    if not dims:
        flat, to = source.flat(), out.flat()
        if flat is None or to is None:
            raise UnsupportedOpError(
                call.name, "rolling all dims as one needs a contiguous tensor: call contiguous()"
            )
        source, out, dims = flat, to, (0,)
    total: dict[int, int] = {}
    for shift, dim in zip(shifts, dims, strict=True):
        total[source.dim(dim)] = total.get(source.dim(dim), 0) + shift
    pieces = []
    for dim, shift in total.items():
        size = source.sizes[dim] if source.ndim else 1
        shift = shift % size if size else 0
        cuts = [(0, shift, size - shift), (size - shift, 0, shift)]
        pieces.append([(dim, *cut) for cut in cuts if cut[2]] or [(dim, 0, 0, size)])
    return [_placed(out, source, chosen) for chosen in combinations(*pieces)]


def _placed(out: Part, source: Part, pieces: Sequence[tuple[int, int, int, int]]) -> Move:
    """One piece: (dim, first of the source, first of the result, count) of each dim."""
    for dim, at, to, count in pieces:
        source, out = source.narrow(dim, at, count), out.narrow(dim, to, count)
    return Move(out, source)


def _repeated(call: OpCall, source: Part, out: Part) -> list[Move]:
    """Each dim of the result as (repeat, size); the source does not move along repeats."""
    repeats = list(call.args[1])
    repeats = [1] * (source.ndim - len(repeats)) + repeats
    while source.ndim < len(repeats):
        source = source.insert(0)
    for axis in range(len(repeats) - 1, -1, -1):
        out = out.split(axis, repeats[axis], source.sizes[axis])
        source = source.insert(axis, repeats[axis], 0)
    return [Move(out, source)]


_REARRANGE: dict[str, Moves] = {
    "expand_copy": _view(lambda x, sizes, implicit=False: x.expand(
        [x.sizes[i - len(sizes) + x.ndim] if size == -1 else size
         for i, size in enumerate(sizes)])),
    "permute_copy": _view(lambda x, dims: x.permute(dims)),
    "t_copy": _view(_transposed), "transpose_copy": _view(_transposed),
    "slice_copy": _view(sliced), "select_copy": _view(lambda x, dim, index: x.select(dim, index)),
    "as_strided_copy": _view(strided), "diagonal_copy": _view(diagonal),
    "unfold_copy": _view(lambda x, dim, size, step: x.unfold(dim, size, step)),
    "narrow_copy": _view(lambda x, dim, start, length: x.narrow(
        dim, start % max(x.sizes[x.dim(dim)], 1) if start < 0 else start, length)),
    "rot90": _view(_rotated), "flip": _view(lambda x, dims: x.flip(dims)),
    "view_copy": _in_order, "_reshape_copy": _in_order, "squeeze_copy": _in_order,
    "unsqueeze_copy": _in_order,
    "_unsafe_view": _in_order, "reshape": _in_order, "_reshape_alias_copy": _in_order,
    "view_as_real_copy": _reals, "view_as_complex_copy": _reals,
    "channel_shuffle": _shuffled, "native_channel_shuffle": _shuffled,
    "pixel_shuffle": _pixels, "pixel_unshuffle": _pixels, "roll": _rolled,
    "repeat": _repeated, "tile": _repeated,
}  # fmt: skip

for _name, _moves in _REARRANGE.items():
    lowering(f"aten::{_name}")(rearrange(_moves))


@lowering("aten::unbind_copy", "aten::split_copy", "aten::split_with_sizes_copy")
def pieces(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Several results, each a part of the first argument (alike ones in a loop)."""
    unbound = "unbind" in call.name
    dim = call.arg(1, 0) if unbound else call.arg(2, 0)
    b = mover(core, call.name)
    (src,) = inputs_of(b, call)
    source = Part.of(call.args[0])
    dim, done = source.dim(dim), 0
    for first, count in alike(call.outs):
        out = call.outs[first]
        length = 1 if unbound else out.shape[dim]
        names = [f"out{first + i}" for i in range(count)]
        pool = b.hbm(names[0], nbytes=out.nbytes * count, of=names)
        taken = source.narrow(dim, done, length * count).split(dim, count, length)
        axes = [dim, *(axis for axis in range(taken.ndim) if axis != dim)]
        taken = taken.permute(axes)
        if unbound:
            taken = taken.drop(dim + 1)
        transfer(b, pool, Part.of(out).insert(0, count, extent(out)), src, taken, shards)
        done += length * count
    return b.build()


def alike(specs: Sequence[TensorSpec]) -> Iterator[tuple[int, int]]:
    """(first, count) of the runs of equal specs."""
    done = 0
    for _, group in groupby(specs):
        count = len(list(group))
        yield done, count
        done += count
