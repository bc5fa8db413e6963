"""x[mask] = number: a select, whatever the mask holds; nothing about it depends on data."""

from __future__ import annotations

from dataclasses import replace

import torch

from torch_trn.lowering.binary import FORMULAS
from torch_trn.lowering.call import OpCall, TensorSpec
from torch_trn.lowering.pointwise import elementwise

__all__ = ["as_fill", "masked_fill"]

masked_fill = elementwise(FORMULAS["masked_fill"])
"""The lowering of (self, mask, value)."""


def as_fill(call: OpCall) -> OpCall | None:
    """An index_put of one number at one mask as a call of `masked_fill`; None for any other."""
    x, indices, value = call.args[:3]
    given = [(dim, spec) for dim, spec in enumerate(indices) if isinstance(spec, TensorSpec)]
    single = not isinstance(value, TensorSpec) or value.numel == 1
    if len(given) != 1 or not single or call.arg(3, False):
        return None
    before, mask = given[0]
    if mask.dtype not in (torch.bool, torch.uint8):
        return None
    behind = x.ndim - before - mask.ndim
    shape = ((1,) * before, mask.shape, (1,) * behind)
    steps = ((0,) * before, mask.strides, (0,) * behind)
    mask = TensorSpec(mask.dtype, sum(shape, ()), sum(steps, ()))
    if isinstance(value, TensorSpec):
        value = TensorSpec(value.dtype, (), ())
    return replace(call, args=(x, mask, value))
