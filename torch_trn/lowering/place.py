"""Joins, and parts placed in zeros or in a copy: cat, stack, the backward of views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.copy import alike, diagonal, slice_of, sliced, strided
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import PARTITIONS, ceil_div, grid, product
from torch_trn.lowering.move import fill, inputs_of, mover, needs_turn, outputs_of, transfer
from torch_trn.lowering.part import Part, extent
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import joined, lower_kernel
from torch_trn.memory import Pool
from torch_trn.program import Program

__all__: list[str] = []


# -- joins -----------------------------------------------------------------------------------------
@lowering("aten::cat", "aten::_cat", "aten::concat", "aten::stack", "aten::_stack")
def cat(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """One copy for each run of alike inputs, in runs of whole slices behind the dim.

    Large inputs that lie across the result are turned on TensorE, as `clone` does.
    """
    out, tensors = Part.of(call.outs[0]), call.args[0]
    dim = out.dim(call.arg(1, 0))
    b = mover(core, call.name)
    (result,) = outputs_of(b, call)
    done = 0
    turned: list[Program] = []
    for first, count in alike(tensors):
        spec = tensors[first]
        source = Part.of(spec)
        if "stack" in call.name:
            source = source.insert(dim)
        elif source.sizes == (0,) and out.ndim != 1:
            continue
        length = source.sizes[dim] if source.ndim else 1
        names = [f"in{first + i}" for i in range(count)]
        if lies_across(out.narrow(dim, done, length), source):
            for i, name in enumerate(names):
                piece = out.narrow(dim, done + i * length, length)
                turned.append(_turned(call, core, shards, (result, piece), (name, source)))
            done += length * count
            continue
        pool = b.hbm(names[0], nbytes=spec.nbytes * count, of=names)
        to = out.narrow(dim, done, length * count).split(dim, count, length)
        to = to.permute([dim, *(axis for axis in range(to.ndim) if axis != dim)])
        transfer(b, result, to, pool, source.insert(0, count, extent(spec)), shards)
        done += length * count
    return joined(call.name, core, [b.build(), *turned])


def lies_across(to: Part, source: Part) -> bool:
    """Whether a copy is worth turning: many elements, none of which lie together in both."""
    if to.numel < PARTITIONS * PARTITIONS or to.dtype.is_complex or source.dtype.is_complex:
        return False
    return needs_turn(to.sizes, _spec(to), _spec(source)) is not None


def _turned(
    call: OpCall, core: CoreSpec, shards: int, to: tuple[Pool, Part], source: tuple[str, Part]
) -> Program:
    """A copy of one input into its place by way of TensorE."""
    (pool, place), (name, given) = to, source
    walked = grid(place.sizes, [_spec(place), _spec(given)])
    first, *rest = walked.operands
    walked = replace(walked, operands=(replace(first, offset=place.offset), *rest))
    kernel = Kernel(core, walked, 1, shards, [pool, name])
    kernel.store(0, kernel.ins[0])
    return lower_kernel(kernel, call.name)


def _spec(part: Part) -> TensorSpec:
    return TensorSpec(part.dtype, part.sizes, part.strides)


@lowering("aten::block_diag")
def block_diag(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Zeros with each matrix on the diagonal, by one core."""
    out = Part.of(call.outs[0]).insert(0)
    b = mover(core, call.name)
    pools, (result,) = inputs_of(b, call), outputs_of(b, call)
    fill(b, result, out, 0, shards, lead=1)
    row = col = 0
    for pool, spec in zip(pools, call.args[0], strict=True):
        source = Part.of(spec)
        while source.ndim < 2:
            source = source.insert(0)
        rows, cols = source.sizes
        to = out.narrow(1, row, rows).narrow(2, col, cols)
        transfer(b, result, to, pool, source.insert(0), shards, lead=1)
        row, col = row + rows, col + cols
    return b.build()


@lowering("aten::_chunk_cat")
def chunk_cat(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(tensors, dim, num_chunks): each padded to equal chunks, the chunks side by side."""
    tensors, dim, chunks = call.args[:3]
    out = Part.of(call.outs[0])
    b = mover(core, call.name)
    pools, (result,) = inputs_of(b, call), outputs_of(b, call)
    padded = any(spec.shape[dim] % chunks for spec in tensors)
    if padded:
        fill(b, result, out.insert(0), 0, shards, lead=1)
    done = 0
    for pool, spec in zip(pools, tensors, strict=True):
        source, size = Part.of(spec), spec.shape[dim]
        each, behind = ceil_div(size, chunks), spec.shape[dim + 1 :]
        to = out.narrow(dim + 1, done, each * product(behind)).split(dim + 1, each, *behind)
        whole, rest = divmod(size, each) if each else (0, 0)
        parts = [(to.narrow(dim, 0, whole), source.narrow(dim, 0, whole * each).split(
            dim, whole, each))]  # fmt: skip
        if rest:
            last = to.select(dim, whole).narrow(dim, 0, rest)
            parts.append((last, source.narrow(dim, whole * each, rest)))
        for place, part in parts:
            if padded:
                transfer(b, result, place.insert(0), pool, part.insert(0), shards, lead=1)
            else:
                transfer(b, result, place, pool, part, shards)
        done += each * product(behind)
    return b.build()


# -- a part placed in zeros or in a copy -----------------------------------------------------------
Place = Callable[..., Part]
Rest = Callable[..., "list[Part] | None"]

#: Marks the dim that cores share, so that it is found again after views.
_MARK = 1 << 62


def _nothing(*_: object) -> list[Part] | None:
    return None


def _beside(out: Part, dim: int, first: int, count: int) -> list[Part]:
    """What a slice leaves of a dim."""
    size = out.sizes[out.dim(dim)]
    return [out.narrow(dim, 0, first), out.narrow(dim, first + count, size - first - count)]


def _beside_slice(
    out: Part, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> list[Part] | None:
    if step != 1 or not out.ndim:
        return None
    return _beside(out, dim, *slice_of(out.sizes[out.dim(dim)], start, end))


def _beside_plane(out: Part, dim: int, index: int) -> list[Part]:
    return _beside(out, dim, index % max(out.sizes[out.dim(dim)], 1), 1)


def placed(place: Place, rest: Rest = _nothing) -> Callable[[OpCall, CoreSpec, int], Program]:
    """The lowering of an operator that writes a tensor into a part of zeros or of a copy.

    ``place(result, *arguments)`` is that part. ``x_scatter(self, src, ...)`` starts from self, the
    others, ``x_backward(grad, sizes, ...)``, from zeros. ``rest`` names the parts that are left,
    if they are few: then each element is written once.
    """

    def lower(call: OpCall, core: CoreSpec, shards: int) -> Program:
        scatters = "scatter" in call.name
        b = mover(core, call.name)
        pools, (result,) = inputs_of(b, call), outputs_of(b, call)
        out = Part.of(call.outs[0])
        base = Part.of(call.args[0]) if scatters else None
        part = Part.of(call.args[1 if scatters else 0])
        to = place(out, *call.args[2:])
        part = part.expand(to.sizes) if part.ndim == to.ndim else part
        left = rest(out, *call.args[2:])
        if left is not None:
            kept = rest(base, *call.args[2:]) if base is not None else None
            for number, beside in enumerate(left):
                if kept:
                    transfer(b, result, beside, pools[0], kept[number], shards)
                else:
                    fill(b, result, beside, 0, shards, f"rest{number}")
            transfer(b, result, to, pools[1 if scatters else 0], part, shards)
            return b.build()
        lead = 0
        if shards > 1:
            axes = shared_axes(out, lambda x: place(x, *call.args[2:]))
            lead = ceil_div(out.sizes[axes[0]], shards) if axes else 1
            out, to, part = (
                x.front(axes[at]) if axes else x.insert(0)
                for x, at in ((out, 0), (to, 1), (part, 1))
            )
            base = base and (base.front(axes[0]) if axes else base.insert(0))
        if to.numel < out.numel:
            if base is not None:
                transfer(b, result, out, pools[0], base, shards, lead=lead)
            else:
                fill(b, result, out, 0, shards, lead=lead)
        transfer(b, result, to, pools[1 if scatters else 0], part, shards, lead=lead)
        return b.build()

    return lower


def shared_axes(out: Part, place: Callable[[Part], Part]) -> tuple[int, int] | None:
    """The largest dim of the result that ``place`` leaves alone: its number before and after."""
    for axis in sorted(range(out.ndim), key=lambda axis: -out.sizes[axis]):
        steps = (*out.strides[:axis], _MARK, *out.strides[axis + 1 :])
        after = place(replace(out, strides=steps))
        if after.offset < _MARK // 2 and after.strides.count(_MARK) == 1 and out.sizes[axis] > 1:
            found = after.strides.index(_MARK)
            if after.sizes[found] == out.sizes[axis]:
                return axis, found
    return None


lowering("aten::slice_backward", "aten::slice_scatter")(placed(sliced, _beside_slice))
lowering("aten::select_backward", "aten::select_scatter")(
    placed(lambda out, dim, index: out.select(dim, index), _beside_plane)
)
lowering("aten::diagonal_backward", "aten::diagonal_scatter")(placed(diagonal))
lowering("aten::as_strided_scatter")(placed(strided))


@lowering("aten::diag_embed")
def diag_embed(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(self, offset, dim1, dim2): zeros with self on a diagonal."""
    given = OpCall(call.name, (call.args[0], (), call.arg(1, 0), call.arg(2, -2), call.arg(3, -1)),
                   call.outs)  # fmt: skip
    return placed(diagonal)(given, core, shards)


@lowering("aten::unfold_backward")
def unfold_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(grad, sizes, dim, size, step): each window's gradients added, one place of all at a time."""
    grad, _, dim, size, step = call.args[:5]
    b = mover(core, call.name)
    pools, (result,) = inputs_of(b, call), outputs_of(b, call)
    out, given = Part.of(call.outs[0]), Part.of(grad)
    dim = out.dim(dim)
    count = given.sizes[dim] if out.ndim else 1
    # The windows' dim stays where it is, so that a tap of all of them is a strided part.
    lead = 0
    wide = max((axis for axis in range(out.ndim) if axis != dim), default=None,
               key=lambda axis: out.sizes[axis])  # fmt: skip
    if shards > 1:
        lead = ceil_div(out.sizes[wide], shards) if wide is not None else 1
        out, given = (x.insert(0) if wide is None else x.front(wide) for x in (out, given))
        dim = dim + 1 if wide is None or dim < wide else dim
    fill(b, result, out, 0, shards, lead=lead)
    for tap in range(size):
        to = out.narrow(dim, tap, count, step) if call.outs[0].ndim else out
        taken = given.select(given.ndim - 1, tap)
        transfer(b, result, to, pools[0], taken, shards, step < size, lead)
    return b.build()
