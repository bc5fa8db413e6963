"""Fused recurrent cells run for their values beside the CPU's, computed in fp32.

Bounds: fp32 differs by the order of operations, 16 roundings; narrower results are rounded once
(2 roundings allowed for the order). Sums over the batch are products with ones on TensorE: their
terms are rounded to the dtype first only where they are stored in it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tile_case import EPSILON, TRN1, TRN2, tile_values
from torch import Tensor

from torch_trn.chip import CoreSpec
from torch_trn.lowering import OpCall, TensorSpec, lower

ATEN = torch.ops.aten
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(1, 1), (1, 300), (3, 127), (127, 128), (128, 129), (129, 513)]
CASES = pytest.mark.parametrize(
    ("core", "cores", "dtype"),
    [(TRN1, 1, F32), (TRN2, 1, F32), (TRN2, 2, F32), (TRN2, 1, BF16), (TRN1, 2, F16)],
    ids=["trn1", "trn2", "two cores", "bf16", "fp16"],
)


def randn(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    seed = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, generator=seed).to(dtype)


def check(function: Any, *args: Any, core: CoreSpec, cores: int) -> None:
    """The Program's results beside the CPU's in fp32."""
    got, _ = tile_values(function, *args, core=core, cores=cores)
    wide = [a.float() if isinstance(a, Tensor) else a for a in args]
    expected = [e for e in function(*wide) if e is not None]
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        count = 16 if ours.dtype == F32 else 2
        bound = count * EPSILON[ours.dtype] * max(1.0, float(theirs.abs().amax()))
        torch.testing.assert_close(ours.float(), theirs, rtol=0.0, atol=bound)


@CASES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biases", [0, 2])
def test_lstm(
    biases: int, shape: tuple[int, int], core: CoreSpec, cores: int, dtype: torch.dtype
) -> None:
    batch, hidden = shape
    gates, recurrent = randn(batch, 4 * hidden, dtype=dtype), randn(4 * hidden, batch, dtype=dtype)
    bias = (
        [randn(4 * hidden, dtype=dtype), -randn(4 * hidden, dtype=dtype)] if biases else [None] * 2
    )
    args = (gates, recurrent.reshape(batch, -1), randn(batch, hidden, dtype=dtype), *bias)
    check(ATEN._thnn_fused_lstm_cell.default, *args, core=core, cores=cores)


@CASES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("given", ["both", "hy", "cy"])
def test_lstm_backward(
    given: str, shape: tuple[int, int], core: CoreSpec, cores: int, dtype: torch.dtype
) -> None:
    batch, hidden = shape
    x = [randn(batch, hidden, dtype=dtype) * scale for scale in (1.0, 0.5, -1.0, 0.7)]
    workspace = randn(batch, 4 * hidden, dtype=dtype).sigmoid()
    grads = (x[0] if given != "cy" else None, x[1] if given != "hy" else None)
    for bias in (True, False):
        check(ATEN._thnn_fused_lstm_cell_backward_impl.default, *grads, x[2], x[3], workspace, bias,
              core=core, cores=cores)  # fmt: skip


@CASES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biases", [0, 2])
def test_gru(
    biases: int, shape: tuple[int, int], core: CoreSpec, cores: int, dtype: torch.dtype
) -> None:
    batch, hidden = shape
    gates = randn(batch, 6 * hidden, dtype=dtype)
    bias = (
        [randn(3 * hidden, dtype=dtype), -randn(3 * hidden, dtype=dtype)] if biases else [None] * 2
    )
    # Gates that lie side by side in one tensor: rows with gaps.
    args = (
        gates[:, : 3 * hidden],
        gates[:, 3 * hidden :],
        randn(batch, hidden, dtype=dtype),
        *bias,
    )
    check(ATEN._thnn_fused_gru_cell.default, *args, core=core, cores=cores)


@CASES
@pytest.mark.parametrize("shape", SHAPES)
def test_gru_backward(
    shape: tuple[int, int], core: CoreSpec, cores: int, dtype: torch.dtype
) -> None:
    batch, hidden = shape
    grad, workspace = randn(batch, hidden, dtype=dtype), randn(batch, 5 * hidden, dtype=dtype)
    for bias in (True, False):
        check(ATEN._thnn_fused_gru_cell_backward.default, grad, workspace, bias, core=core,
              cores=cores)  # fmt: skip


def test_no_gradient_at_all() -> None:
    x, gates = TensorSpec.contiguous(F32, 3, 4), TensorSpec.contiguous(F32, 3, 16)
    call = OpCall("aten::_thnn_fused_lstm_cell_backward_impl", (None, None, x, x, gates, True), ())
    assert lower(call, TRN2, 1).instructions == 0
