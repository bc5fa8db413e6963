"""Negative log likelihood as a Program, with weights and targets that do not count."""

from __future__ import annotations

import pytest
import torch
from tile_case import EPSILON, TRN1, TRN2, assert_values, tile_values
from torch import Tensor

from torch_trn.chip import CoreSpec

aten = torch.ops.aten
F32, BF16 = torch.float32, torch.bfloat16


def case(*shape: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    """Log probabilities [n, classes, ...] and targets, every fifth of which does not count."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).log_softmax(1).to(dtype)
    sizes = (shape[0], *shape[2:])
    target = (torch.arange(torch.Size(sizes).numel()) * 7919 % shape[1]).reshape(sizes)
    target.view(-1)[::5] = -100
    return x, target


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("n", [2, 127, 129, 513])
def test_rows(n: int, reduction: int, weighed: bool, dtype: torch.dtype, core: CoreSpec) -> None:
    # Sums of n terms in fp32, rounded once; ATen sums bf16 with more roundings, so the reference
    # is its fp32.
    x, target = case(n, 11, dtype=dtype)
    weight = torch.linspace(0.5, 2.0, 11).to(dtype) if weighed else None
    wide = None if weight is None else weight.float()
    loss, total = aten.nll_loss_forward(x.float(), target, wide, reduction, -100)
    bound = (n + 4) * EPSILON[F32] + 2 * EPSILON[dtype]
    for cores in (1, 2):
        given = {"core": core, "cores": cores}
        got, _ = tile_values(aten.nll_loss_forward.default, x, target, weight, reduction, -100,
                             **given)  # fmt: skip
        assert_values([got[0].float(), got[1].float()], [loss, total], rtol=bound, atol=1e-6)
        grad = torch.linspace(1, 2, n) if reduction == 0 else torch.tensor(1.5)
        back, _ = tile_values(aten.nll_loss_backward.default, grad.to(dtype), x, target, weight,
                              reduction, -100, total.to(dtype), **given)  # fmt: skip
        expected = aten.nll_loss_backward(grad.to(dtype).float(), x.float(), target, wide,
                                          reduction, -100, total.to(dtype).float())  # fmt: skip
        assert_values([back[0].float()], [expected], rtol=2 * EPSILON[dtype] + 4 * EPSILON[F32])


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_images(reduction: int) -> None:
    x, target = case(3, 5, 9, 7)
    loss, total = aten.nll_loss2d_forward(x, target, None, reduction, -100)
    for cores in (1, 2):
        given = (aten.nll_loss2d_forward.default, x, target, None, reduction, -100)
        assert_values(*tile_values(*given, cores=cores), rtol=200 * EPSILON[F32])
        grad = torch.ones_like(loss) * 0.5
        back = (aten.nll_loss2d_backward.default, grad, x, target, None, reduction, -100, total)
        assert_values(*tile_values(*back, cores=cores), rtol=4 * EPSILON[F32])


def test_one_row() -> None:
    x, target = torch.randn(7).log_softmax(0), torch.tensor(3)
    for cores in (1, 2):
        given = (aten.nll_loss_forward.default, x, target, None, 1, -100)
        assert_values(*tile_values(*given, cores=cores), rtol=EPSILON[F32])
        back = (aten.nll_loss_backward.default, torch.tensor(2.0), x, target, None, 1, -100,
                torch.tensor(1.0))  # fmt: skip
        assert_values(*tile_values(*back, cores=cores), rtol=EPSILON[F32])


def test_an_infinite_element_that_does_not_count() -> None:
    x, target = case(10, 4)
    x[0, 0] = -torch.inf
    assert int(target[0]) == -100
    given = (aten.nll_loss_forward.default, x, target, None, 1, -100)
    assert_values(*tile_values(*given), rtol=20 * EPSILON[F32])
