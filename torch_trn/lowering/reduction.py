"""Sums, means, extrema, norms and the like, over any dims.

Where the reduced elements lie together in memory, rows are what is kept and reductions run along
the free dimension. Where kept elements lie together, sums go over the partitions (a matmul by
ones), and everything else turns its tiles on TensorE first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import (
    Grid,
    Operand,
    broadcast_strides,
    flat,
    grid,
    memory_order,
    merge,
    product,
    split,
)  # fmt: skip
from torch_trn.lowering.registry import add, lowering
from torch_trn.lowering.run import lower_kernel
from torch_trn.lowering.tile import FP32, Tile, Value
from torch_trn.program import Program

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
    ins: Sequence[TensorSpec],
) -> Grid:  # fmt: skip
    """Rows are what is kept, columns what is reduced; `outs` come first in the operands."""
    specs = [*(kept_spec(out, dims, shape) for out in outs), *ins]
    strides = [broadcast_strides(spec, shape) for spec in specs]
    for step in strides[: len(outs)]:
        for dim in dims:
            step[dim] = 0
    order = memory_order(shape, strides[len(outs)])
    kept = [a for a in order if a not in dims]
    reduced = [a for a in order if a in dims]
    outer = merge([shape[a] for a in kept], [[s[a] for a in kept] for s in strides])
    inner = merge([shape[a] for a in reduced], [[s[a] for a in reduced] for s in strides])
    if not outer and len(inner) <= 1:
        found = flat(product(shape), ins)
        found = Grid(1 if found.rows else 0, found.numel, found.operands, False)
        operands = tuple(Operand(spec, "col") for spec in specs[: len(outs)])
        return Grid(found.rows, product(shape), (*operands, *found.operands))
    found = split([*outer, *inner], len(outer), specs, widen=False)
    operands = tuple(
        Operand(o.spec, "col", o.run, o.spread) if i < len(outs) else o
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
        plain = additive and len(call.outs) == 1 and not x.dtype.is_complex
        if plain and not lies_inner(x, reduced):
            return _over_partitions(call, core, shards, x, reduced, count, fold)
        walked = reduce_grid(x.shape, reduced, call.outs, [x])
        kernel = Kernel(core, walked, len(call.outs), shards)
        folded: Any = fold(kernel, kernel.ins[0], max(count, 1), *call.args[1:])
        for index, result in enumerate(folded if isinstance(folded, tuple) else (folded,)):
            kernel.store(index, result)
        return lower_kernel(kernel, call.name)

    return lower


def _over_partitions(
    call: OpCall, core: CoreSpec, shards: int, x: TensorSpec, dims: Sequence[int], count: int,
    fold: Fold,
) -> Program:  # fmt: skip
    """Rows are what is reduced: a matmul by ones adds up the partitions."""
    kept = [d for d in range(x.ndim) if d not in dims]
    turned = reduce_grid(x.shape, kept, (), [x])
    out = call.outs[0]
    row = Operand(out, "row", product([x.shape[d] for d in kept]))
    kernel = Kernel(core, Grid(turned.rows, turned.cols, (row, *turned.operands)), 1, shards)
    probe = Tile()
    value = probe.operand("full", x.dtype)
    fold(probe, value, max(count, 1), *call.args[1:])
    source: Value = kernel.ins[0]
    # The elementwise steps before the fold (squares, |x|...) are the same for every element.
    for step in probe.steps:
        if step.kind == "reduce":
            break
        source = kernel.act("square" if step.op == "square" else "abs", source)
    kernel.rowsum(0, source)
    return lower_kernel(kernel, call.name)


def _sum(t: Tile, x: Value, *_: Any) -> Value:
    return t.reduce("add", x)


def _mean(t: Tile, x: Value, count: int, *_: Any) -> Value:
    return t.reduce("add", x, FP32) * (1 / count)


def _extreme(op: str) -> Fold:
    return lambda t, x, *_: t.reduce(op, x)


def _any(op: str) -> Fold:
    return lambda t, x, *_: t.binary("not_equal", t.reduce(op, x), 0, torch.bool)


def _argument(op: str) -> Fold:
    """The extreme, then the position of its first match: min over (index where equal)."""

    def fold(t: Tile, x: Value, *_: Any) -> Value:
        return positioned(t, op, x)[1]

    return fold


def positioned(t: Tile, op: str, x: Value) -> tuple[Value, Value]:
    """(extreme, its first position) along the columns."""
    best = t.reduce(op, x)
    where = t.binary("is_equal", x, best, FP32)
    index = t.stt(where, "multiply", -1e9, "add", t.iota(FP32))
    return best, t.reduce("min", index, FP32) + 1e9


def _var(t: Tile, x: Value, count: int, *args: Any) -> Value:
    correction = next((a for a in args[1:] if isinstance(a, (int, float))), 1)
    return t.stats(x)[1] * (count / max(count - float(correction), 1e-30))


def _std(t: Tile, x: Value, count: int, *args: Any) -> Value:
    return t.act("sqrt", _var(t, x, count, *args))


def _with_mean(fold: Fold) -> Fold:
    def both(t: Tile, x: Value, count: int, *args: Any) -> tuple[Value, Value]:
        spread = fold(t, x, count, *args)
        stats = next(step for step in t.steps if step.kind == "stats")
        return spread, t.cast(stats.outs[0], FP32)

    return both


def _norm(t: Tile, x: Value, count: int, p: Any = 2, *_: Any) -> Value:
    p = 2 if p is None else p
    if p == math.inf or p == -math.inf:
        return t.reduce("max" if p > 0 else "min", t.act("abs", x))
    if p == 2:
        return t.act("sqrt", t.act_sum("square", x)[1])
    if p == 1:
        return t.act_sum("abs", x)[1]
    if p == 0:
        return t.reduce("add", t.binary("not_equal", x, 0, FP32))
    total = t.reduce("add", t.binary("pow", t.act("abs", x), p))
    return t.binary("pow", total, 1 / p)


def _power_sum(t: Tile, x: Value, count: int, p: Any = 2, *_: Any) -> Value:
    return t.act_sum("square", x)[1] if p == 2 else t.reduce("add", t.binary("pow", x, p))


def _count_nonzero(t: Tile, x: Value, *_: Any) -> Value:
    return t.reduce("add", t.binary("not_equal", x, 0, FP32))


def _nansum(t: Tile, x: Value, *_: Any) -> Value:
    return t.reduce("add", t.select(t.binary("is_equal", x, x, torch.bool), x, 0.0))


def _logsumexp(t: Tile, x: Value, *_: Any) -> Value:
    _full, low, total = t.max_sum(x)
    return t.act("log", total) - low


FOLDS: dict[str, tuple[Fold, int | None, bool]] = {
    "sum": (_sum, 1, True), "mean": (_mean, 1, True), "nansum": (_nansum, 1, False),
    "amax": (_extreme("max"), 1, False), "amin": (_extreme("min"), 1, False),
    "prod": (_extreme("multiply"), 1, False),
    "any": (_any("max"), 1, False), "all": (_any("min"), 1, False),
    "_is_any_true": (_any("max"), None, False), "_is_all_true": (_any("min"), None, False),
    "argmax": (_argument("max"), 1, False), "argmin": (_argument("min"), 1, False),
    "max": (_extreme("max"), None, False), "min": (_extreme("min"), None, False),
    "max.dim": (lambda t, x, *_: positioned(t, "max", x), 1, False),
    "min.dim": (lambda t, x, *_: positioned(t, "min", x), 1, False),
    "aminmax": (lambda t, x, *_: (t.reduce("min", x), t.reduce("max", x)), 1, False),
    "_aminmax": (lambda t, x, *_: (t.reduce("min", x), t.reduce("max", x)), 1, False),
    "var": (_var, 1, False), "std": (_std, 1, False),
    "var_mean": (_with_mean(_var), 1, False), "std_mean": (_with_mean(_std), 1, False),
    "norm": (_norm, 2, False), "linalg_vector_norm": (_norm, 2, False),
    "linalg__powsum": (_power_sum, 2, False),
    "logsumexp": (_logsumexp, 1, False), "count_nonzero": (_count_nonzero, 1, False),
    "trace": (_sum, None, False),
}  # fmt: skip

for _name, (_fold, _at, _additive) in FOLDS.items():
    add((f"aten::{_name}",), reduction(_fold, _at, _additive))


def _pairwise(fold: Fold, op: str = "add") -> Callable[[OpCall, CoreSpec, int], Program]:
    """The lowering of a comparison of two tensors that gives one number."""

    def lower(call: OpCall, core: CoreSpec, shards: int) -> Program:
        x, y = call.args[:2]
        out = call.outs[0] if call.outs else TensorSpec.contiguous(torch.bool)
        walked = grid(x.shape, [x, x, y])
        operands = (Operand(out, "one"), *walked.operands[1:])
        kernel = Kernel(core, Grid(walked.rows, walked.cols, operands, walked.is_flat), 1, shards)
        kernel.total(0, fold(kernel, *kernel.ins), op=op)
        return lower_kernel(kernel, call.name)

    return lower


add(("aten::equal",), _pairwise(lambda t, x, y: t.binary("is_equal", x, y, torch.bool), "min"))
add(("aten::allclose",), _pairwise(lambda t, x, y: t.act("abs", x - y), "max"))
add(("aten::dist",), _pairwise(lambda t, x, y: t.act("square", x - y)))


def _multinomial(t: Tile, x: Value, *_: Any) -> Value:
    """The position of the largest p / q with q exponential: one draw per row."""
    noise = t.act("log", t.random()) * -1.0
    return positioned(t, "max", x * t.reciprocal(noise))[1]


@lowering("aten::multinomial")
def multinomial(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """(probabilities, num_samples, replacement): a pass over each row for each draw."""
    x, out = call.args[0], call.outs[0]
    draws = max(call.args[1], 1)
    shape = (*x.shape[:-1], draws, x.shape[-1])
    again = TensorSpec(x.dtype, shape, (*x.strides[:-1], 0, x.strides[-1]))
    walked = reduce_grid(shape, [len(shape) - 1], [out], [again])
    kernel = Kernel(core, walked, 1, shards)
    kernel.store(0, _multinomial(kernel, kernel.ins[0]))
    return lower_kernel(kernel, call.name)
