"""`_foreach_*`: one Program over a whole list of tensors.

Tensors are taken as one stream of elements: those of about the same size share a loop, small ones
share tiles (their rows are descriptors of one DMA), so the Program's length does not grow with the
list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_trn.chip import CoreSpec
from torch_trn.lowering import binary, unary
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import Grid, Operand, ceil_div, flat
from torch_trn.lowering.move import mover
from torch_trn.lowering.reduction import FOLDS
from torch_trn.lowering.registry import add
from torch_trn.lowering.run import lower_grids
from torch_trn.lowering.tile import Tile, Value
from torch_trn.program import Program

#: Tensors up to this size share tiles with others.
SMALL_BYTES = 65536

#: Sizes of which each has a loop of its own in a reduction over a list.
FEW_SIZES = 4

Lists = Sequence[Sequence[TensorSpec]]


def is_list(arg: Any) -> bool:
    """Whether an argument is a non-empty list of tensors."""
    return isinstance(arg, tuple) and bool(arg) and isinstance(arg[0], TensorSpec)


def segments(sizes: Sequence[int], itemsize: int) -> list[tuple[int, int]]:
    """(elements, elements of one tensor) of the groups that a list is processed in."""
    groups: dict[int, list[int]] = {}
    for numel in sizes:
        if numel:
            key = 0 if numel * itemsize <= SMALL_BYTES else numel.bit_length() // 2
            groups.setdefault(key, []).append(numel)
    return [(sum(found), max(1, sum(found) // len(found))) for found in groups.values()]


def list_grids(lists: Lists, singles: Sequence[TensorSpec], shards: int) -> list[Grid]:
    """One flat Grid per group of tensors; `singles` are read as one element."""
    itemsize = max(items[0].itemsize for items in lists)
    sizes = [spec.numel for spec in lists[0]]
    grids = []
    for numel, run in segments(sizes, itemsize):
        numel = ceil_div(numel, shards)
        specs = [TensorSpec.contiguous(items[0].dtype, numel) for items in lists]
        walked = flat(numel, specs)
        operands = [Operand(o.spec, "full", min(run, numel)) for o in walked.operands]
        operands += [Operand(spec, "one") for spec in singles]
        grids.append(Grid(walked.rows, walked.cols, tuple(operands), True))
    return grids


def by_dtype(lists: Lists) -> list[list[list[TensorSpec]]]:
    """The lists cut into groups whose tensors have the same dtypes throughout."""
    groups: dict[tuple[torch.dtype, ...], list[list[TensorSpec]]] = {}
    for row in zip(*lists, strict=True):
        key = tuple(spec.dtype for spec in row)
        found = groups.setdefault(key, [[] for _ in lists])
        for items, spec in zip(found, row, strict=True):
            items.append(spec)
    return list(groups.values())


def joined(name: str, core: CoreSpec, programs: Sequence[Program]) -> Program:
    """Programs one after the other."""
    if len(programs) == 1:
        return programs[0]
    pools = tuple(pool for program in programs for pool in program.pools)
    body = tuple(node for program in programs for node in program.body)
    return Program(name.removeprefix("aten::"), pools, body)


def lower_lists(
    call: OpCall, core: CoreSpec, shards: int, outs: Lists, ins: Lists,
    singles: Sequence[TensorSpec], build: Callable[[Kernel, list[Value], list[Value]], None],
) -> Program:  # fmt: skip
    """`build(kernel, values of ins, values of singles)` for every tensor of the lists.

    The lists of `outs` and `ins` are walked together; each result is stored by `build`.
    """
    programs = []
    for group in by_dtype([*outs, *ins]):
        grids = list_grids(group, singles, shards)
        if not grids:
            continue
        kernel = Kernel(core, grids[0], len(outs))
        values = kernel.ins
        build(kernel, values[: len(ins)], values[len(ins) :])
        programs.append(lower_grids(kernel, call.name, grids))
    return joined(call.name, core, programs) if programs else mover(core, call.name).build()


def _number(arg: Any) -> Any:
    """A list of numbers stands for its first: the instruction is the same for all."""
    return arg[0] if isinstance(arg, tuple) and arg and not is_list(arg) else arg


def elementwise(formula: Callable[..., Any]) -> Callable[[OpCall, CoreSpec, int], Program]:
    """The lowering of `_foreach_<op>` for the formula of `<op>`."""

    def lower(call: OpCall, core: CoreSpec, shards: int) -> Program:
        args = [_number(arg) for arg in call.args]
        ins = [arg for arg in args if is_list(arg)]
        singles = [arg for arg in args if isinstance(arg, TensorSpec)]
        if not ins:
            return mover(core, call.name).build()

        def build(kernel: Kernel, values: list[Value], ones: list[Value]) -> None:
            lists, scalars = iter(values), iter(ones)
            given = [
                next(lists) if is_list(a) else next(scalars) if isinstance(a, TensorSpec) else a
                for a in args
            ]
            kernel.store(0, formula(kernel, *given))

        return lower_lists(call, core, shards, [_results(call, ins[0])], ins, singles, build)

    return lower


def _results(call: OpCall, first: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
    """What is written: the results, or the first list in place."""
    return call.outs if len(call.outs) == len(first) else first


_NAMES = (
    "abs acos add addcdiv addcmul asin atan ceil clamp_max clamp_min cos cosh div erf erfc exp "
    "expm1 floor frac lerp lgamma log log10 log1p log2 maximum minimum mul neg pow reciprocal "
    "round rsqrt sigmoid sign sin sinh sqrt sub tan tanh trunc"
).split()

_FORMULAS = {**unary.FORMULAS, **binary.FORMULAS}
for _name in _NAMES:
    add((f"aten::_foreach_{_name}",), elementwise(_FORMULAS[_name]))


def _copied(t: Tile, x: Value, source: Value, *_: Any) -> Value:
    return source


def _same(t: Tile, x: Value, *_: Any) -> Value:
    return x


add(("aten::_foreach_copy",), elementwise(_copied))
add(("aten::_foreach_clone",), elementwise(_same))


def zero(call: OpCall, core: CoreSpec, shards: int) -> Program:
    """Every tensor filled with zeros."""
    tensors = call.args[0]

    def build(kernel: Kernel, _values: list[Value], _ones: list[Value]) -> None:
        kernel.store(0, kernel.constant(0, kernel.out_operands[0].spec.dtype))

    return lower_lists(call, core, shards, [tensors], [], [], build)


add(("aten::_foreach_zero",), zero)


def reduced(fold: Callable[..., Any]) -> Callable[[OpCall, CoreSpec, int], Program]:
    """The lowering of a `_foreach_` reduction: tensors of one size are the rows of a grid."""

    def lower(call: OpCall, core: CoreSpec, shards: int) -> Program:
        programs = []
        for outs, ins in by_dtype([call.outs, call.args[0]]):
            grids = []
            for numel, count in _alike([spec.numel for spec in ins if spec.numel]):
                out = TensorSpec.contiguous(outs[0].dtype, count)
                source = TensorSpec.contiguous(ins[0].dtype, count, numel)
                operands = (Operand(out, "col", 1), Operand(source, "full", numel))
                grids.append(Grid(count, ceil_div(numel, shards), operands))
            if not grids:
                continue
            kernel = Kernel(core, grids[0], 1)
            kernel.store(0, fold(kernel, kernel.ins[0], 1, *call.args[1:]))
            programs.append(lower_grids(kernel, call.name, grids))
        return joined(call.name, core, programs) if programs else mover(core, call.name).build()

    return lower


def _alike(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(elements, tensors) of the grids of a list: one per size, or per range of many sizes."""
    if len(set(sizes)) <= FEW_SIZES:
        return list(Counter(sizes).items())
    ranges: dict[int, list[int]] = {}
    for numel in sizes:
        ranges.setdefault(numel.bit_length() // 2, []).append(numel)
    return [(ceil_div(sum(found), len(found)), len(found)) for found in ranges.values()]


add(("aten::_foreach_norm",), reduced(FOLDS["linalg_vector_norm"][0]))
add(("aten::_foreach_powsum",), reduced(FOLDS["linalg__powsum"][0]))
add(("aten::_foreach_max",), reduced(FOLDS["amax"][0]))
