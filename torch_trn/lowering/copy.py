"""Copies and layout changes: clone, cat, pad, roll, flip, repeat, the backward of views.

Runs that are contiguous on both sides go from HBM to HBM by DMA alone; a copy whose sides run in
different directions is turned in SBUF; a copy that converts passes an engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import ceil_div, grid, product
from torch_trn.lowering.move import copy_runs, fill, mover, needs_turn, run_bytes_of
from torch_trn.lowering.registry import lowering
from torch_trn.lowering.run import loop, lower_kernel
from torch_trn.program import Program


def copy_tensor(
    name: str, core: CoreSpec, shards: int, out: TensorSpec, source: TensorSpec
) -> Program:
    """out = source, of the same shape (or broadcast), converting where dtypes differ."""
    turned = needs_turn(out.shape, out, source)
    if out.dtype != source.dtype or turned is not None or source.numel != out.numel:
        kernel = Kernel(core, grid(out.shape, [out, source]), 1, shards)
        kernel.store(0, kernel.ins[0])
        return lower_kernel(kernel, name)
    b = mover(core, name)
    src, dst = b.hbm("in0", nbytes=source.nbytes), b.hbm("out0", nbytes=out.nbytes)
    copy_runs(b, dst, src, ceil_div(out.nbytes, shards), run_bytes_of(out.shape, [out, source]))
    return b.build()


@lowering(
    "aten::clone", "aten::contiguous", "aten::_to_copy", "aten::to", "aten::lift_fresh_copy",
    "aten::alias_copy", "aten::_neg_view_copy", "aten::_conj_copy", "aten::detach_copy",
    "aten::_lazy_clone", "aten::_reshape_copy",
)  # fmt: skip
def clone(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """A copy of the first argument in the result's layout and dtype."""
    return copy_tensor(call.name, core, shards, call.outs[0], call.args[0])


@lowering("aten::copy", "aten::_copy_from", "aten::_copy_from_and_resize")
def copy_(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """copy_(self, src): src into the result; _copy_from(self, dst) the other way round."""
    source = call.args[0] if "_copy_from" in call.name else call.args[1]
    return copy_tensor(call.name, core, shards, call.outs[0], source)


@lowering(
    "aten::expand_copy", "aten::permute_copy", "aten::t_copy", "aten::transpose_copy",
    "aten::view_copy", "aten::squeeze_copy", "aten::unsqueeze_copy", "aten::slice_copy",
    "aten::select_copy", "aten::as_strided_copy", "aten::diagonal_copy", "aten::unfold_copy",
    "aten::narrow_copy", "aten::unbind_copy", "aten::split_copy", "aten::split_with_sizes_copy",
    "aten::view_as_real_copy", "aten::view_as_complex_copy", "aten::_reshape_alias_copy",
    "aten::rot90", "aten::channel_shuffle", "aten::native_channel_shuffle", "aten::roll",
    "aten::flip", "aten::repeat", "aten::pixel_shuffle", "aten::pixel_unshuffle",
    "aten::_unsafe_view", "aten::reshape", "aten::tile",
)  # fmt: skip
def rearrange(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Every element of the result is one of the first argument: in runs both sides allow."""
    source = call.args[0]
    if len(call.outs) != 1:
        return _pieces(call, core, shards)
    out = call.outs[0]
    base = call.name.partition(".")[0].removeprefix("aten::").rstrip("_")
    run = _RUNS.get(base, _no_run)(call, source, out)
    b = mover(core, call.name)
    src, dst = b.hbm("in0", nbytes=source.nbytes), b.hbm("out0", nbytes=out.nbytes)
    copy_runs(b, dst, src, ceil_div(out.nbytes, shards), run)
    return b.build()


def _pieces(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Several results, each a part of the first argument."""
    b = mover(core, call.name)
    source = b.hbm("in0", nbytes=call.args[0].nbytes)
    for number, (out, count) in enumerate(Counter(call.outs).items()):
        target = b.hbm(f"out{number}", nbytes=out.nbytes * count, parts=count)
        run = _no_run(call, call.args[0], out)
        with loop(b, count, "i") as i:
            copy_runs(b, target[i], source, ceil_div(out.nbytes, shards), run)
    return b.build()


def _no_run(call: OpCall, source: TensorSpec, out: TensorSpec) -> int:
    """The innermost dim, if both sides have it contiguous."""
    if not (out.shape and source.shape) or out.strides[-1] != 1 or source.strides[-1] != 1:
        return out.itemsize
    return max(1, min(out.shape[-1], source.shape[-1])) * out.itemsize


def _roll(call: OpCall, source: TensorSpec, out: TensorSpec) -> int:
    dims = call.arg(2) or ()
    if not dims or not source.is_contiguous:
        return out.nbytes if source.is_contiguous else out.itemsize
    first = max(dim % source.ndim for dim in dims)
    size, shift = source.shape[first], call.args[1][-1]
    inner = product(source.shape[first + 1 :])
    moved = shift % size if size else 0
    return max(1, (max(moved, size - moved)) * inner) * out.itemsize


def _flip(call: OpCall, source: TensorSpec, out: TensorSpec) -> int:
    dims = [dim % max(source.ndim, 1) for dim in call.args[1]]
    if not dims or not source.is_contiguous:
        return out.nbytes if source.is_contiguous else out.itemsize
    return product(source.shape[max(dims) + 1 :]) * out.itemsize


def _repeat(call: OpCall, source: TensorSpec, out: TensorSpec) -> int:
    if not source.is_contiguous:
        return out.itemsize
    repeats = list(call.args[1])[-source.ndim :] if source.ndim else []
    run = 1
    for size, times in zip(reversed(source.shape), reversed(repeats), strict=False):
        run *= size
        if times != 1:
            break
    return max(run, 1) * out.itemsize


def _view(call: OpCall, source: TensorSpec, out: TensorSpec) -> int:
    return out.nbytes if source.is_contiguous and out.is_contiguous else _no_run(call, source, out)


_RUNS: dict[str, Callable[[OpCall, TensorSpec, TensorSpec], int]] = {
    "roll": _roll, "flip": _flip, "repeat": _repeat, "tile": _repeat, "view_copy": _view,
    "squeeze_copy": _view, "unsqueeze_copy": _view, "_unsafe_view": _view, "reshape": _view,
    "_reshape_alias_copy": _view,
}  # fmt: skip


@lowering("aten::cat", "aten::_cat", "aten::concat", "aten::_chunk_cat", "aten::block_diag")
def cat(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """One copy per input (alike ones in a loop); its runs are whole slices behind the dim."""
    out = call.outs[0]
    tensors = [spec for spec in call.args[0] if spec.numel]
    dim = call.arg(1, 0)
    dim = dim % out.ndim if isinstance(dim, int) and out.ndim else 0
    b = mover(core, call.name)
    dst = b.hbm("out0", nbytes=out.nbytes)
    if any(spec.dtype != out.dtype for spec in tensors):
        return _join_converting(call.name, core, shards, tensors, out)
    for number, (spec, count) in enumerate(Counter(tensors).items()):
        src = b.hbm(f"in{number}", nbytes=spec.nbytes * count, parts=count)
        inside = replace(out, shape=spec.shape) if spec.ndim == out.ndim else spec
        run = run_bytes_of(spec.shape, [inside, spec])
        with loop(b, count, "i") as i:
            copy_runs(b, dst, src[i], ceil_div(spec.nbytes, shards), run)
    return b.build()


def _join_converting(
    name: str, core: CoreSpec, shards: int, tensors: Sequence[TensorSpec], out: TensorSpec
) -> Program:
    """Inputs of several dtypes: as one conversion of all their elements."""
    widest = max(tensors, key=lambda spec: spec.itemsize)
    source = TensorSpec.contiguous(widest.dtype, out.numel)
    kernel = Kernel(
        core, grid((out.numel,), [TensorSpec.contiguous(out.dtype, out.numel), source]), 1, shards
    )
    kernel.store(0, kernel.ins[0])
    return lower_kernel(kernel, name)


@lowering("aten::stack", "aten::_stack")
def stack(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """cat of inputs with one dim more."""
    dim, out = call.arg(1, 0) % max(call.outs[0].ndim, 1), call.outs[0]

    def raised(spec: TensorSpec) -> TensorSpec:
        shape, steps = list(spec.shape), list(spec.strides)
        shape.insert(dim, 1)
        steps.insert(dim, 0)
        return TensorSpec(spec.dtype, tuple(shape), tuple(steps))

    specs = tuple(raised(spec) for spec in call.args[0])
    return cat(OpCall(call.name, (specs, dim), (out,)), core, shards)


def _placed(
    call: OpCall, core: CoreSpec, shards: int, part: TensorSpec, base: TensorSpec | None, run: int
) -> Program:
    """The result is `base` (or zeros) with `part` written into it in runs of `run` bytes."""
    out = call.outs[0]
    b = mover(core, call.name)
    dst = b.hbm("out0", nbytes=out.nbytes)
    left = max(out.nbytes - part.nbytes, 0)
    if base is not None and call.fresh != (False,):
        copy_runs(
            b, dst, b.hbm("base", nbytes=base.nbytes), ceil_div(left, shards),
            run_bytes_of(out.shape, [out, base]),
        )  # fmt: skip
    elif base is None:
        fill(b, dst, ceil_div(left, shards))
    src = b.hbm("in0", nbytes=part.nbytes)
    copy_runs(b, dst, src, ceil_div(part.nbytes, shards), min(run, max(part.nbytes, 1)))
    return b.build()


def _inner_run(part: TensorSpec, dim: int, itemsize: int, with_dim: bool) -> int:
    """Bytes behind `dim` (and along it) that are contiguous in a row-major result."""
    start = dim if with_dim else dim + 1
    if not part.is_contiguous:
        return itemsize * (part.shape[-1] if part.shape and part.strides[-1] == 1 else 1)
    return max(1, product(part.shape[start:])) * itemsize


@lowering("aten::slice_backward", "aten::slice_scatter")
def slice_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(grad, sizes, dim, start, end, step) or (self, src, dim, ...): zeros or self with a slice."""
    scatter = "scatter" in call.name
    part = call.args[1] if scatter else call.args[0]
    base = call.args[0] if scatter else None
    dim = call.arg(2, 0) % max(call.outs[0].ndim, 1)
    step = call.arg(5, 1)
    run = _inner_run(part, dim, part.itemsize, with_dim=step == 1)
    return _placed(call, core, shards, part, base, run)


@lowering("aten::select_backward", "aten::select_scatter")
def select_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(grad, sizes, dim, index) or (self, src, dim, index): zeros or self with one plane."""
    scatter = "scatter" in call.name
    part = call.args[1] if scatter else call.args[0]
    dim = call.arg(2, 0) % max(call.outs[0].ndim, 1)
    run = _inner_run(part, dim, part.itemsize, with_dim=True)
    return _placed(call, core, shards, part, call.args[0] if scatter else None, run)


@lowering(
    "aten::diagonal_backward", "aten::diagonal_scatter", "aten::diag_embed",
    "aten::as_strided_scatter", "aten::unfold_backward", "aten::slice_inverse",
    "aten::value_selecting_reduction_backward",
)  # fmt: skip
def sparse_placement(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Zeros (or self) with elements placed one by one; unfold adds where windows overlap."""
    scatter = "scatter" in call.name
    part = call.args[1] if scatter else call.args[0]
    base = call.args[0] if scatter else None
    run = part.itemsize
    if "unfold" in call.name and part.shape and part.strides[-1] == 1:
        run *= part.shape[-1]
    return _placed(call, core, shards, part, base, run)


@lowering("aten::constant_pad_nd", "aten::pad")
def constant_pad(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """The border filled, the inside copied in runs of its innermost dim (or whole, if unpadded)."""
    x, pads = call.args[0], call.args[1]
    dims = len(pads) // 2
    inner = next((d for d in range(dims) if pads[2 * d] or pads[2 * d + 1]), dims)
    run = _inner_run(x, max(x.ndim - 1 - inner, 0), x.itemsize, with_dim=True)
    return _placed(call, core, shards, x, None, run)


@lowering(
    "aten::reflection_pad1d", "aten::reflection_pad2d", "aten::reflection_pad3d",
    "aten::replication_pad1d", "aten::replication_pad2d", "aten::replication_pad3d",
    "aten::_pad_circular", "aten::_pad_enum",
)  # fmt: skip
def edge_pad(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """The inside row by row, the border element by element."""
    x, out = call.args[0], call.outs[0]
    b = mover(core, call.name)
    src, dst = b.hbm("in0", nbytes=x.nbytes), b.hbm("out0", nbytes=out.nbytes)
    row = (x.shape[-1] if x.shape and x.strides[-1] == 1 else 1) * x.itemsize
    copy_runs(b, dst, src, ceil_div(x.nbytes, shards), row)
    copy_runs(b, dst, src, ceil_div(max(out.nbytes - x.nbytes, 0), shards), x.itemsize)
    return b.build()


@lowering(
    "aten::reflection_pad1d_backward", "aten::reflection_pad2d_backward",
    "aten::reflection_pad3d_backward", "aten::replication_pad1d_backward",
    "aten::replication_pad2d_backward", "aten::replication_pad3d_backward",
)  # fmt: skip
def edge_pad_backward(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """The inside copied row by row, the border's gradients added element by element by the DMA."""
    grad, out = call.args[0], call.outs[0]
    b = mover(core, call.name)
    src, dst = b.hbm("in0", nbytes=grad.nbytes), b.hbm("out0", nbytes=out.nbytes)
    row = (out.shape[-1] if out.shape else 1) * out.itemsize
    copy_runs(b, dst, src, ceil_div(out.nbytes, shards), row)
    border = ceil_div(max(grad.nbytes - out.nbytes, 0), shards)
    if border:
        b.copy_hbm(
            dst, src, rows=ceil_div(border, out.itemsize), row_bytes=out.itemsize, accumulate=True
        )
    return b.build()
