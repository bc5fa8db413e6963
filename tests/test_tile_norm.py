"""Values of normalisation Programs against CPU ATen in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tile_case import EPSILON, TRN1, TRN2, assert_values, tile_values
from torch import Tensor

from torch_trn.executor import execute
from torch_trn.lowering import OpCall, TensorSpec, lower

ATEN = torch.ops.aten
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(1, 1), (2, 127), (127, 128), (128, 129), (129, 513), (300, 64), (3, 5, 33), (2, 4100)]


def close(function: Any, *args: Any, rtol: float, atol: float, **given: Any) -> None:
    """Against CPU in fp32: results of narrower dtypes are rounded once."""
    wide = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    got, _ = tile_values(function, *args, **given)
    expected = function(*wide)
    expected = [e.to(g.dtype) for g, e in zip(got, _listed(expected), strict=True)]
    assert_values(got, expected, rtol=rtol, atol=atol)


def _listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [r for r in result if r is not None]


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cols = shape[-1]
    x, weight, bias = randn(*shape, dtype=dtype), randn(cols, dtype=dtype), randn(cols, dtype=dtype)
    rtol, atol = 4 * EPSILON[dtype], 8 * EPSILON[dtype]
    if cols == 1:
        atol = 1e-2  # variance 0: what rounding leaves is divided by sqrt(eps)
    for cores in (1, 2):
        got, _ = tile_values(ATEN.native_layer_norm.default, x, [cols], weight, bias, 1e-5,
                             cores=cores)  # fmt: skip
        wide = ATEN.native_layer_norm(x.float(), [cols], weight.float(), bias.float(), 1e-5)
        assert_values(got, [w.to(g.dtype) for g, w in zip(got, wide, strict=True)],
                      rtol=rtol, atol=atol)  # fmt: skip


def test_layer_norm_over_two_dims_and_without_weights() -> None:
    x = randn(5, 4, 33)
    close(ATEN.native_layer_norm.default, x, [4, 33], None, None, 1e-5, rtol=1e-5, atol=1e-5)
    close(ATEN.native_layer_norm.default, x.transpose(0, 1), [5, 33], None, None, 1e-5,
          rtol=1e-5, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
def test_layer_norm_backward(shape: tuple[int, ...], core: Any) -> None:
    cols = shape[-1]
    x, grad, weight, bias = randn(*shape), randn(*shape, seed=1), randn(cols), randn(cols)
    _, mean, rstd = ATEN.native_layer_norm(x, [cols], weight, bias, 1e-5)
    for mask in ([True, True, True], [True, False, False], [False, True, True]):
        for cores in (1, 2):
            got, expected = tile_values(
                ATEN.native_layer_norm_backward.default, grad, x, [cols], mean, rstd, weight, bias,
                mask, core=core, cores=cores,
            )  # fmt: skip
            assert_values(got, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [F32, F16])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)
    close(ATEN._fused_rms_norm.default, x, [shape[-1]], weight, 1e-6, cores=2,
          rtol=4 * EPSILON[dtype], atol=4 * EPSILON[dtype])  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("cores", [1, 2])
def test_rms_norm_backward(shape: tuple[int, ...], cores: int) -> None:
    # The CPU has no kernel of this name: autograd through the forward is the reference.
    cols = shape[-1]
    x, weight = randn(*shape).requires_grad_(), randn(cols).requires_grad_()
    grad = randn(*shape, seed=1)
    y, rstd = ATEN._fused_rms_norm(x, [cols], weight, 1e-6)
    expected = torch.autograd.grad(y, (x, weight), grad)
    tensors = [grad, x.detach(), rstd.detach(), weight.detach()]
    specs = [TensorSpec.of(t) for t in tensors]
    outs = [torch.full_like(t, float("nan")) for t in expected]
    args = (*specs[:2], (cols,), *specs[2:], (True, True))
    call = OpCall("aten::_fused_rms_norm_backward", args, tuple(map(TensorSpec.of, outs)))
    names = {f"in{i}": t for i, t in enumerate(tensors)} | {
        f"out{i}": t for i, t in enumerate(outs)
    }
    execute(lower(call, TRN2, cores), TRN2, names, cores=cores)
    assert_values(outs, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("sizes", [(2, 4, 9, 2), (1, 6, 130, 3), (3, 64, 25, 1), (2, 130, 4, 5),
                                   (2, 300, 4, 2), (2, 8, 1, 8), (5, 96, 49, 32)])  # fmt: skip
@pytest.mark.parametrize("cores", [1, 2])
def test_group_norm(sizes: tuple[int, ...], cores: int) -> None:
    n, c, hw, groups = sizes
    x, weight, bias, grad = randn(n, c, hw), randn(c), randn(c, seed=2), randn(n, c, hw, seed=3)
    for w, b in ((weight, bias), (None, None)):
        args = x, w, b, n, c, hw, groups, 1e-5
        got, expected = tile_values(ATEN.native_group_norm.default, *args, cores=cores)
        assert_values(got, expected, rtol=1e-4, atol=1e-4)
        _, mean, rstd = ATEN.native_group_norm(*args)
        mask = [True, w is not None, w is not None]
        got, expected = tile_values(
            ATEN.native_group_norm_backward.default, grad, x, mean, rstd, w, n, c, hw, groups, mask,
            cores=cores,
        )  # fmt: skip
        assert_values(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(4, 3), (5, 129, 7), (2, 64, 6, 6), (130, 5), (1, 3, 40, 40)])
@pytest.mark.parametrize("cores", [1, 2])
def test_batch_norm(shape: tuple[int, ...], cores: int) -> None:
    c = shape[1]
    x, weight, bias = randn(*shape), randn(c), randn(c, seed=2)
    mean, var = randn(c, seed=4), randn(c, seed=5).abs() + 0.5
    grad = randn(*shape, seed=3)
    for training in (True, False):
        args = x, weight, bias, mean, var, training, 0.1, 1e-5
        got, expected = tile_values(ATEN.native_batch_norm.default, *args, cores=cores)
        assert_values([got[0]], [expected[0]], rtol=1e-4, atol=1e-4)
        if training:
            assert_values(got[1:], expected[1:], rtol=1e-4, atol=1e-4)
        _, save_mean, save_rstd = ATEN.native_batch_norm(*_copies(args))
        for mask in ([True, True, True], [True, False, False], [False, True, False]):
            got, expected = tile_values(
                ATEN.native_batch_norm_backward.default, grad, x, weight, mean, var, save_mean,
                save_rstd, training, 1e-5, mask, cores=cores,
            )  # fmt: skip
            assert_values(got, expected, rtol=1e-3, atol=1e-3)


def _copies(args: tuple[Any, ...]) -> list[Any]:
    return [a.clone() if isinstance(a, Tensor) else a for a in args]


def test_running_statistics_move_by_the_momentum() -> None:
    x, mean, var = randn(6, 5, 3), randn(5), randn(5).abs()
    function = ATEN._native_batch_norm_legit_functional.default
    got, expected = tile_values(function, x, None, None, mean, var, True, 0.3, 1e-5)
    assert_values(got, expected, rtol=1e-5, atol=1e-5)


def test_channels_last() -> None:
    x = randn(2, 5, 6, 7).contiguous(memory_format=torch.channels_last)
    args = x, randn(5), randn(5), randn(5), randn(5).abs(), True, 0.1, 1e-5
    got, expected = tile_values(ATEN.native_batch_norm.default, *args)
    assert_values(got, expected, rtol=1e-4, atol=1e-4)
