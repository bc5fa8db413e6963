"""Values of `_foreach_*` and fused optimizer Programs against CPU ATen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tile_case import EPSILON, TRN1, TRN2, assert_values, tile_values
from torch import Tensor

ATEN = torch.ops.aten
F32, BF16 = torch.float32, torch.bfloat16
SHAPES = [(3,), (129, 5), (), (0, 4), (513,), (128, 128), (7, 300)]


def tensors(dtype: torch.dtype = F32, seed: int = 0, shapes: Any = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def close(function: Any, *args: Any, rtol: float, atol: float = 0.0, **given: Any) -> None:
    got, expected = tile_values(function, *args, **given)
    assert_values(got, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_pairs_of_lists(dtype: torch.dtype, cores: int) -> None:
    a, b = tensors(dtype), tensors(dtype, 1)
    # One rounding here; CPU rounds alpha * b too in bf16: within two.
    rtol, atol = 2 * EPSILON[dtype], EPSILON[dtype]
    close(ATEN._foreach_add.List, a, b, alpha=0.5, rtol=rtol, atol=atol, cores=cores)
    close(ATEN._foreach_add_.List, a, b, rtol=rtol, atol=atol, cores=cores)
    close(ATEN._foreach_mul.List, a, b, rtol=rtol, cores=cores)
    close(ATEN._foreach_lerp.Scalar, a, b, 0.25, rtol=rtol, atol=2 * atol, cores=cores)


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
def test_numbers_of_each_tensor(core: Any) -> None:
    a = tensors()
    scalars = [0.5, 2.0, -1.0, 3.0, 2.0, 0.5, 7.0]
    close(ATEN._foreach_mul.ScalarList, a, scalars, rtol=0, core=core)
    close(ATEN._foreach_div_.ScalarList, a, scalars, rtol=2 * EPSILON[F32], core=core)
    b, c = tensors(seed=1), [t.abs() + 1 for t in tensors(seed=2)]
    rtol, atol = 4 * EPSILON[F32], 4 * EPSILON[F32]
    close(ATEN._foreach_addcdiv.ScalarList, a, b, c, scalars, rtol=rtol, atol=8 * atol, core=core)
    close(ATEN._foreach_addcmul_.Scalar, a, b, c, 0.3, rtol=rtol, atol=2 * atol, core=core)


def test_a_tensor_as_the_number() -> None:
    close(ATEN._foreach_mul.Tensor, tensors(), torch.tensor(1.5), rtol=0)


def test_functions_of_one_list() -> None:
    a = [t.abs() + 0.5 for t in tensors()]
    close(ATEN._foreach_sqrt.default, a, rtol=2 * EPSILON[F32])
    close(ATEN._foreach_exp_.default, a, rtol=2 * EPSILON[F32])
    close(ATEN._foreach_neg.default, a, rtol=0)
    close(ATEN._foreach_zero_.default, a, rtol=0)
    close(ATEN._foreach_copy_.default, a, tensors(seed=3), rtol=0)
    close(ATEN._foreach_copy_.default, a, tensors(BF16, seed=3), rtol=0)


def test_tensors_whose_elements_do_not_lie_together() -> None:
    a, b = torch.randn(20, 30)[:, ::3], torch.randn(10, 20).t()
    close(ATEN._foreach_add.List, [a, b], [a.contiguous(), b], rtol=EPSILON[F32])
    close(ATEN._foreach_mul_.Scalar, [a, b, torch.randn(4)], 3.0, rtol=0)


@pytest.mark.parametrize("cores", [1, 2])
def test_norms(cores: int) -> None:
    for order in (1, 2):
        close(ATEN._foreach_norm.Scalar, tensors(), order, rtol=1e-5, cores=cores)
    full = [t for t in tensors() if t.numel()]
    close(ATEN._foreach_norm.Scalar, full, float("inf"), rtol=0, cores=cores)
    close(ATEN._foreach_norm.Scalar, tensors(BF16), 2, rtol=2 * EPSILON[BF16], cores=cores)
    odd = [torch.randn(20, 30)[:, ::3], torch.randn(10, 20).t()]
    close(ATEN._foreach_norm.Scalar, odd, 2, rtol=1e-5, cores=cores)


def states(count: int, dtype: torch.dtype, shapes: Any = SHAPES) -> list[list[Tensor]]:
    lists = [tensors(dtype, seed, shapes) for seed in range(count)]
    return [lists[0], lists[1], lists[2], *([t.abs() for t in one] for one in lists[3:])]


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("name", ["_fused_adam_", "_fused_adamw_"])
def test_adam(name: str, amsgrad: bool, cores: int) -> None:
    params, grads, means, squares, maxima = states(5, F32)
    steps = [torch.tensor(3.0) for _ in params]
    function = getattr(ATEN, name).default
    given = dict(lr=1e-2, beta1=0.9, beta2=0.999, weight_decay=0.1, eps=1e-8, amsgrad=amsgrad,
                 maximize=False)  # fmt: skip
    args = params, grads, means, squares, maxima if amsgrad else [], steps
    close(function, *args, rtol=2e-5, atol=2e-6, cores=cores, **given)


def test_the_first_step_of_adam_has_an_exact_correction() -> None:
    params, grads, means, squares = states(4, F32)
    means, squares = ([torch.zeros_like(t) for t in params] for _ in range(2))
    steps = [torch.tensor(1.0) for _ in params]
    given = dict(lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False,
                 maximize=True)  # fmt: skip
    close(ATEN._fused_adamw_.default, params, grads, means, squares, [], steps, rtol=1e-6,
          atol=1e-7, **given)  # fmt: skip


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_adam_unscales_and_skips(found: float) -> None:
    params, grads, means, squares = states(4, F32)
    steps = [torch.tensor(2.0) for _ in params]
    given = dict(lr=1e-2, beta1=0.9, beta2=0.99, weight_decay=0.0, eps=1e-8, amsgrad=False,
                 maximize=False, grad_scale=torch.tensor(8.0),
                 found_inf=torch.tensor(found))  # fmt: skip
    close(ATEN._fused_adam_.default, params, grads, means, squares, [], steps, rtol=2e-5,
          atol=2e-6, **given)  # fmt: skip


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_sgd(nesterov: bool, first: bool) -> None:
    params, grads, buffers = states(3, F32)
    given = dict(weight_decay=0.1, momentum=0.9, lr=0.1, dampening=0.0, nesterov=nesterov,
                 maximize=False, is_first_step=first)  # fmt: skip
    close(ATEN._fused_sgd_.default, params, grads, buffers, rtol=1e-5, atol=1e-6, **given)
    given |= dict(momentum=0.0, nesterov=False)
    close(ATEN._fused_sgd_.default, params, grads, [], rtol=1e-5, atol=1e-6, **given)


def test_adagrad() -> None:
    params, grads, _, sums = states(4, F32)
    steps = [torch.tensor(4.0) for _ in params]
    given = dict(lr=0.1, lr_decay=0.01, weight_decay=0.1, eps=1e-10, maximize=False)
    close(ATEN._fused_adagrad_.default, params, grads, sums, steps, rtol=2e-5, atol=1e-5, **given)


@pytest.mark.parametrize("bad", [None, float("inf"), float("nan")])
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_gradients_are_unscaled_and_checked(bad: float | None, found: float) -> None:
    grads = tensors()
    if bad is not None:
        grads[1][128, 3] = bad
    function = ATEN._amp_foreach_non_finite_check_and_unscale_.default
    close(function, grads, torch.tensor([found]), torch.tensor([0.25]), rtol=0)


@pytest.mark.parametrize(("tracker", "found"), [(0, 0.0), (4, 0.0), (3, 1.0)])
def test_the_loss_scale_grows_and_backs_off(tracker: int, found: float) -> None:
    scale, count = torch.tensor([1024.0]), torch.tensor([tracker], dtype=torch.int32)
    function = ATEN._amp_update_scale_.default
    got, expected = tile_values(function, scale, count, torch.tensor([found]), 2.0, 0.5, 5)
    assert_values(got, expected)
