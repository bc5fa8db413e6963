"""Sums, means, extrema, norms and the like, over any dims.

Where the reduced elements lie together in memory, rows are what is kept and reductions run along
the free dimension. Where kept elements lie together, sums go over the partitions (a matmul by
ones), and everything else turns its tiles on TensorE first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.complexes import as_reals, refuse_complex
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import (
    Grid,
    Operand,
    broadcast_strides,
    grid,
    memory_order,
    merge,
    product,
    split,
)  # fmt: skip
from torch_trn.lowering.registry import add
from torch_trn.lowering.run import lower_kernel
from torch_trn.lowering.tile import FP32, INT32, Tile, Value
from torch_trn.lowering.unary import is_nan
from torch_trn.program import Program

#: Up to so many rows are added in all partitions, where their columns fill those.
FEW_ROWS = 32
MANY_COLS = 1 << 16

Fold = Callable[..., Any]


def kept_spec(spec: TensorSpec, dims: Sequence[int], shape: Sequence[int]) -> TensorSpec:
    """`spec`, a result without (or with size-1) reduced dims, as a view of the input's `shape`."""
    if len(spec.shape) == len(shape):
        return spec
    sizes, strides = list(spec.shape), list(spec.strides)
    for dim in sorted(dims):
        sizes.insert(dim, 1)
        strides.insert(dim, 0)
    return TensorSpec(spec.dtype, tuple(sizes), tuple(strides))


def normal_dims(dims: Any, ndim: int) -> list[int]:
    """Reduced dims as a sorted list of non-negative numbers; all of them for None or ()."""
    if dims is None or isinstance(dims, tuple) and not dims or ndim == 0:
        return list(range(ndim))
    dims = (dims,) if isinstance(dims, int) else dims
    return sorted(dim % ndim for dim in dims)


def reduce_grid(
    shape: Sequence[int], dims: Sequence[int], outs: Sequence[TensorSpec],
    ins: Sequence[TensorSpec], in_order: bool = False,
) -> Grid:  # fmt: skip
    """Rows are what is kept, columns what is reduced; `outs` come first in the operands.

    in_order: columns count as the shape does (positions do), not as memory lies.
    """
    specs = [*(kept_spec(out, dims, shape) for out in outs), *ins]
    strides = [broadcast_strides(spec, shape) for spec in specs]
    for step in strides[: len(outs)]:
        for dim in dims:
            step[dim] = 0
    order = memory_order(shape, strides[len(outs)])
    kept = [a for a in order if a not in dims]
    reduced = sorted(dims) if in_order else [a for a in order if a in dims]
    outer = merge([shape[a] for a in kept], [[s[a] for a in kept] for s in strides])
    inner = merge([shape[a] for a in reduced], [[s[a] for a in reduced] for s in strides])
    found = split([*outer, *inner], len(outer), specs, widen=False)
    operands = tuple(
        replace(o, kind="col", transposed=False) if i < len(outs) else o
        for i, o in enumerate(found.operands)
    )
    return Grid(found.rows, found.cols, operands)


def lies_inner(spec: TensorSpec, dims: Sequence[int]) -> bool:
    """Whether the elements next to each other in memory are reduced."""
    moving = [a for a in memory_order(spec.shape, spec.strides) if spec.shape[a] > 1]
    return not moving or moving[-1] in dims


def reduction(
    fold: Fold, dims_at: int | None = 1, additive: bool = False
) -> Callable[[OpCall, CoreSpec, int], Program]:
    """The lowering of one reduction: `fold(tile, x, count, *other args)` gives its col results.

    dims_at: where the dims are among the arguments (None: all dims, always).
    additive: the result is one sum, so that TensorE may fold the partitions.
    """

    def lower(call: OpCall, core: CoreSpec, shards: int) -> Program:
        x = next(arg for arg in call.args if isinstance(arg, TensorSpec))
        dims = call.arg(dims_at) if dims_at is not None else None
        if not (dims is None or isinstance(dims, (int, tuple))) or isinstance(dims, bool):
            dims = None
        reduced = normal_dims(dims, x.ndim)
        count = product([x.shape[d] for d in reduced])
        args, outs = call.args[1:], call.outs
        if x.dtype.is_complex or outs[0].dtype.is_complex:
            if not additive:
                refuse_complex(call)
            x, outs = as_reals(x), tuple(as_reals(out) for out in outs)
        if not count and product(outs[0].shape):
            return _of_nothing(call, core, shards, outs)
        # TensorE sums in fp32: integers stay whole on GpSimdE.
        summed = additive and (x.dtype.is_floating_point or x.dtype == torch.bool)
        if summed and len(outs) == 1 and not lies_inner(x, reduced):
            return _over_partitions(call.name, core, shards, x, outs[0], reduced, count, fold, args)
        walked = reduce_grid(x.shape, reduced, outs, [x], fold in _POSITIONS)
        kernel = Kernel(core, walked, len(outs), shards)
        folded: Any = fold(kernel, kernel.ins[0], max(count, 1), *args)
        for index, result in enumerate(folded if isinstance(folded, tuple) else (folded,)):
            kernel.store(index, result)
        return lower_kernel(kernel, call.name)

    return lower


def _of_nothing(call: OpCall, core: CoreSpec, shards: int, outs: Sequence[TensorSpec]) -> Program:
    """What a fold gives of no elements, in every result."""
    kernel = Kernel(core, grid(outs[0].shape, outs), len(outs), shards)
    for index, out in enumerate(outs):
        value = NOTHING.get(call.name.partition(".")[0].removeprefix("aten::"), 0.0)
        dtype = out.dtype if out.dtype != torch.bool else torch.uint8
        whole = value if dtype.is_floating_point else int(value)
        kind = kernel.out_operands[index].kind
        kernel.store(index, kernel.constant(whole, dtype, kind))
    return lower_kernel(kernel, call.name)


def _over_partitions(
    name: str, core: CoreSpec, shards: int, x: TensorSpec, out: TensorSpec, dims: Sequence[int],
    count: int, fold: Fold, args: Sequence[Any],
) -> Program:  # fmt: skip
    """Rows are what is reduced: a matmul by ones adds up the partitions."""
    kept = [d for d in range(x.ndim) if d not in dims]
    if x.dtype.is_floating_point and count <= FEW_ROWS and x.numel >= count * MANY_COLS:
        return _few_rows(name, core, shards, x, out, dims, fold, args)
    result = kept_spec(out, dims, x.shape)
    turned = reduce_grid(x.shape, kept, (), [x])
    steps = broadcast_strides(result, x.shape)
    order = memory_order(x.shape, list(x.strides))
    along = [axis for axis in order if axis in kept and x.shape[axis] > 1]
    cols = tuple((x.shape[axis], steps[axis]) for axis in along)
    row = Operand(out, "row", _contiguous(cols), rows=(), cols=cols)
    kernel = Kernel(core, Grid(turned.rows, turned.cols, (row, *turned.operands)), 1, shards)
    functions, scale = _around(fold, x, count, args)
    source: Value = kernel.ins[0]
    for function in functions:
        source = kernel.act(function, source)
    kernel.rowsum(0, source, scale)
    return lower_kernel(kernel, name)


def _around(fold: Fold, x: TensorSpec, count: int, args: Sequence[Any]) -> tuple[list[str], float]:
    """What a sum does with every element before (squares, |x|...), and its factor after."""
    probe = Tile()
    fold(probe, probe.operand("full", x.dtype), max(count, 1), *args)
    kinds = [step.kind for step in probe.steps]
    before = probe.steps[: kinds.index("reduce")] if "reduce" in kinds else probe.steps
    functions = ["square" if step.op == "square" else "abs" for step in before]
    after = [step for step in probe.steps if step.kind == "scalar"]
    scale = after[-1].operands[0] if after else 1.0
    assert scale is not None
    return functions, float(scale)


def _few_rows(
    name: str, core: CoreSpec, shards: int, x: TensorSpec, out: TensorSpec, dims: Sequence[int],
    fold: Fold, args: Sequence[Any],
) -> Program:  # fmt: skip
    """Few rows would fill few partitions: they are added element by element in all of them."""
    kept = [d for d in range(x.ndim) if d not in dims]
    steps = kept_spec(out, dims, x.shape).strides
    shape = tuple(x.shape[d] for d in kept)
    row = TensorSpec(x.dtype, shape, tuple(x.strides[d] for d in kept))
    result = TensorSpec(out.dtype, shape, tuple(steps[d] for d in kept))
    places = [
        sum(index * x.strides[d] for index, d in zip(at, dims, strict=True))
        for at in itertools.product(*(range(x.shape[d]) for d in dims))
    ]
    walked = grid(shape, [result, *[row] * len(places)])
    operands = (walked.operands[0], *(
        replace(operand, offset=place)
        for operand, place in zip(walked.operands[1:], places, strict=True)
    ))  # fmt: skip
    kernel = Kernel(core, replace(walked, operands=operands), 1, shards,
                    ["out0", *["in0"] * len(places)])  # fmt: skip
    functions, scale = _around(fold, x, len(places), args)
    total: Value | None = None
    for value in kernel.ins:
        for function in functions:
            value = kernel.act(function, value)
        total = value if total is None else kernel.binary("add", total, value, FP32)
    assert total is not None
    kernel.store(0, total if scale == 1.0 else total * scale)
    return lower_kernel(kernel, name)


def _contiguous(cols: Sequence[tuple[int, int]]) -> int:
    """Elements of a row that lie next to each other, from its innermost dim on."""
    run = 1
    for size, step in reversed(cols):
        if step != run:
            break
        run *= size
    return run


def total_of(t: Tile, x: Value, *_: Any) -> Value:
    return t.reduce("add", x, torch.int64 if x.is_integer else FP32)


def _product(t: Tile, x: Value, *_: Any) -> Value:
    return t.reduce("multiply", x, torch.int64 if x.is_integer else FP32)


def _mean(t: Tile, x: Value, count: int, *_: Any) -> Value:
    return t.reduce("add", x, FP32) * (1 / count)


def _extreme(op: str) -> Fold:
    return lambda t, x, *_: t.reduce(op, x)


def _any(t: Tile, x: Value, *_: Any) -> Value:
    """Whether one element is not 0, nan included."""
    found = x if x.dtype == torch.bool else t.binary("not_equal", x, 0, FP32)
    return t.binary("is_gt", t.reduce("max", found, FP32), 0.0, torch.bool)


def _all(t: Tile, x: Value, *_: Any) -> Value:
    """Whether no element is 0."""
    found = x if x.dtype == torch.bool else t.binary("not_equal", x, 0, FP32)
    return t.binary("is_gt", t.reduce("min", found, FP32), 0.0, torch.bool)


def _argument(op: str) -> Fold:
    """The extreme, then the position of its first match."""

    def fold(t: Tile, x: Value, *_: Any) -> Value:
        return positioned(t, op, x)[1]

    return fold


#: fp32 counts as far as this.
_COUNTED = 2**24

#: Further than any position.
_FAR = 2.0**26


def positioned(t: Tile, op: str, x: Value) -> tuple[Value, Value]:
    """(extreme, its first position) along the columns; a nan is the extreme wherever there is one.

    Elements that are not the extreme are moved far away, then the least position counts.
    """
    best = t.reduce(op, x)
    if x.kind != "full":
        x = t.step("copy", "", (x,), (), x.dtype, "full")
    apart = t.binary("not_equal", x, best, FP32)
    if x.dtype.is_floating_point:
        # A nan differs from itself, but is the one that is looked for.
        apart = t.stt(x, "is_le", math.inf, "multiply", apart)
    if isinstance(t, Kernel) and t.grid.cols >= _COUNTED:
        whole = t.cast(apart, INT32) * 2**30
        return best, t.reduce("min", whole + t.iota(INT32), INT32)
    index = t.stt(apart, "multiply", _FAR, "add", t.iota(FP32))
    return best, t.reduce("min", index, FP32)


def _correction(args: Sequence[Any]) -> float:
    """The correction of var and std: their last number, or `unbiased` as 0 or 1."""
    found = [a for a in args if isinstance(a, (int, float))]
    return float(found[-1]) if found else 1.0


def _var(t: Tile, x: Value, count: int, *args: Any) -> Value:
    left = count - _correction(_after_dims(args))
    if left <= 0:
        # Squares divided by 0: nan of one element, else infinite.
        return t.stats(x)[1] * math.inf
    return t.stats(x)[1] * (count / left)


def _after_dims(args: Sequence[Any]) -> Sequence[Any]:
    """Arguments without dims and keepdim: (dim, correction, keepdim) or (dim, unbiased, keepdim),
    or `unbiased` alone."""
    return args[:1] if len(args) == 1 else args[1:2]


def _std(t: Tile, x: Value, count: int, *args: Any) -> Value:
    return t.act("sqrt", _var(t, x, count, *args))


def _with_mean(fold: Fold) -> Fold:
    def both(t: Tile, x: Value, count: int, *args: Any) -> tuple[Value, Value]:
        spread = fold(t, x, count, *args)
        stats = next(step for step in t.steps if step.kind == "stats")
        return spread, t.cast(stats.outs[0], FP32)

    return both


def vector_norm(t: Tile, x: Value, count: int, p: Any = 2, *_: Any) -> Value:
    p = 2 if p is None else p
    if p == math.inf or p == -math.inf:
        return t.reduce("max" if p > 0 else "min", t.act("abs", x), FP32)
    if p == 2:
        return t.act("sqrt", t.act_sum("square", x)[1])
    if p == 1:
        return t.act_sum("abs", x)[1]
    if p == 0:
        return t.reduce("add", t.binary("not_equal", x, 0, FP32), FP32)
    total = t.reduce("add", t.binary("pow", t.act("abs", x), float(p)), FP32)
    return t.binary("pow", total, 1 / p)


def _power_sum(t: Tile, x: Value, count: int, p: Any = 2, *_: Any) -> Value:
    if p == 2:
        return t.act_sum("square", x)[1]
    return t.reduce("add", t.binary("pow", t.act("abs", x), float(p)), FP32)


def _count_nonzero(t: Tile, x: Value, *_: Any) -> Value:
    return t.reduce("add", t.binary("not_equal", x, 0, FP32), FP32)


def _nansum(t: Tile, x: Value, *_: Any) -> Value:
    if not x.dtype.is_floating_point:
        return total_of(t, x)
    return t.reduce("add", t.select(is_nan(t, x), 0.0, x), FP32)


def _logsumexp(t: Tile, x: Value, *_: Any) -> Value:
    _full, low, total = t.max_sum(x, finite=True)
    return t.act("log", total) - low


_ARGMAX, _ARGMIN = _argument("max"), _argument("min")
_POSITIONS = frozenset({_ARGMAX, _ARGMIN})

#: Results of a fold of no elements that are not 0.
NOTHING = {
    "mean": math.nan, "prod": 1.0, "all": 1.0, "_is_all_true": 1.0, "var": math.nan,
    "std": math.nan, "logsumexp": -math.inf,
}  # fmt: skip

FOLDS: dict[str, tuple[Fold, int | None, bool]] = {
    "sum": (total_of, 1, True), "mean": (_mean, 1, True), "nansum": (_nansum, 1, False),
    "amax": (_extreme("max"), 1, False), "amin": (_extreme("min"), 1, False),
    "prod": (_product, 1, False),
    "any": (_any, 1, False), "all": (_all, 1, False),
    "_is_any_true": (_any, None, False), "_is_all_true": (_all, None, False),
    "argmax": (_ARGMAX, 1, False), "argmin": (_ARGMIN, 1, False),
    "max": (_extreme("max"), None, False), "min": (_extreme("min"), None, False),
    "max.dim": (lambda t, x, *_: positioned(t, "max", x), 1, False),
    "min.dim": (lambda t, x, *_: positioned(t, "min", x), 1, False),
    "aminmax": (lambda t, x, *_: (t.reduce("min", x), t.reduce("max", x)), 1, False),
    "_aminmax": (lambda t, x, *_: (t.reduce("min", x), t.reduce("max", x)), 1, False),
    "var": (_var, 1, False), "std": (_std, 1, False),
    "var_mean": (_with_mean(_var), 1, False), "std_mean": (_with_mean(_std), 1, False),
    "norm": (vector_norm, 2, False), "linalg_vector_norm": (vector_norm, 2, False),
    "linalg__powsum": (_power_sum, 2, False),
    "logsumexp": (_logsumexp, 1, False), "count_nonzero": (_count_nonzero, 1, False),
}  # fmt: skip

for _name, (_fold, _at, _additive) in FOLDS.items():
    add((f"aten::{_name}",), reduction(_fold, _at, _additive))
