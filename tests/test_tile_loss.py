"""Values of loss Programs against CPU ATen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tile_case import TRN1, TRN2, assert_values, tile_values
from torch import Tensor

ATEN = torch.ops.aten
SHAPES = [(), (1,), (127,), (129, 5), (3, 513), (128, 128), (0,)]
NONE, MEAN, SUM = 0, 1, 2


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(function: Any, *args: Any, rtol: float = 1e-5, atol: float = 1e-5, **given: Any) -> None:
    for core, cores in ((TRN1, 1), (TRN2, 2)):
        got, expected = tile_values(function, *args, core=core, cores=cores, **given)
        assert_values(got, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", [NONE, MEAN, SUM])
def test_distances(shape: tuple[int, ...], how: int) -> None:
    x, y = randn(*shape), randn(*shape, seed=1)
    grad = randn(*(shape if how == NONE else ()), seed=2)
    for name in ("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss"):
        extra = {"huber_loss": (0.7,), "smooth_l1_loss": (0.7,)}.get(name, ())
        target = y.sign() if name == "soft_margin_loss" else y
        close(getattr(ATEN, name).default, x, target, how, *extra)
        backward = getattr(ATEN, f"{name}_backward").default
        close(backward, grad, x, target, how, *extra)
    close(ATEN.smooth_l1_loss.default, x, y, how, 0.0)


@pytest.mark.parametrize("how", [NONE, MEAN, SUM])
@pytest.mark.parametrize("weighted", [False, True])
def test_binary_cross_entropy(how: int, weighted: bool) -> None:
    x, y = randn(129, 5).sigmoid(), torch.rand(129, 5)
    x[0, 0], x[0, 1] = 0.0, 1.0
    weight = torch.rand(129, 5) if weighted else None
    close(ATEN.binary_cross_entropy.default, x, y, weight, how, rtol=1e-4)
    x = x.clamp(0.01, 0.99)
    grad = randn(*((129, 5) if how == NONE else ()))
    close(ATEN.binary_cross_entropy_backward.default, grad, x, y, weight, how, rtol=1e-4)
    logits = randn(129, 5) * 5
    positive = torch.rand(5) if weighted else None
    close(ATEN.binary_cross_entropy_with_logits.default, logits, y, weight, positive, how,
          rtol=1e-4)  # fmt: skip


def test_operands_are_broadcast() -> None:
    close(ATEN.mse_loss.default, randn(4, 5), randn(1, 5, seed=1).expand(4, 5), MEAN)


@pytest.mark.parametrize("how", [NONE, MEAN, SUM])
def test_likelihood_where_no_row_counts(how: int) -> None:
    x, target = randn(3, 5).log_softmax(1), torch.full((3,), -100)
    args = x, target, None, how, -100
    close(ATEN.nll_loss_forward.default, *args)
    loss, total = ATEN.nll_loss_forward(*args)
    grad = randn(*loss.shape, seed=3)
    close(ATEN.nll_loss_backward.default, grad, x, target, None, how, -100, total)
