"""Elementwise operators: a table of formulas, one function that lowers them all.

A formula is called with the operator's arguments in schema order: a tile value for each tensor, the
argument itself for everything else. It returns the tile value (or values) of the results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch_trn.chip import CoreSpec
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.complexes import lower_complex
from torch_trn.lowering.kernel import Kernel
from torch_trn.lowering.layout import grid
from torch_trn.lowering.registry import add
from torch_trn.lowering.run import lower_kernel
from torch_trn.lowering.tile import Value
from torch_trn.program import Program

Formula: TypeAlias = Callable[..., Any]


def pointwise(formulas: Mapping[str, Formula]) -> None:
    """Register each formula for all overloads of the aten operator it is named after."""
    for name, formula in formulas.items():
        add((f"aten::{name}",), elementwise(formula))


def elementwise(formula: Formula) -> Callable[[OpCall, CoreSpec, int], Program]:
    """The lowering of one formula."""

    def lower(call: OpCall, core: CoreSpec, shards: int) -> Program:
        if any(spec.dtype.is_complex for spec in (*call.outs, *call.tensors())):
            return lower_complex(call, core, shards, formula, elementwise)
        tensors = [arg for arg in call.args if isinstance(arg, TensorSpec)]
        kernel = Kernel(core, grid(call.outs[0].shape, [*call.outs, *tensors]), len(call.outs),
                        shards)  # fmt: skip
        values = iter(kernel.ins)
        args = [next(values) if isinstance(arg, TensorSpec) else arg for arg in call.args]
        results = formula(kernel, *args)
        for index, value in enumerate(results if isinstance(results, tuple) else (results,)):
            if isinstance(value, Value) and index < len(call.outs):
                kernel.store(index, value)
        return lower_kernel(kernel, call.name)

    return lower
