"""Order statistics and searches as Programs: equal to CPU ATen, equal values in their order."""

from __future__ import annotations

import pytest
import torch
from tile_case import TRN1, TRN2, assert_values, tile_values
from torch import Tensor

from torch_trn.chip import CoreSpec

aten = torch.ops.aten
F32, BF16, F16, I64, I32, BOOL = (
    torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool,
)  # fmt: skip


def mixed(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    """Values in no order, all different where the dtype can tell them apart."""
    count = torch.Size(shape).numel()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    values = (order - count // 2).to(torch.float64) / (4 if dtype.is_floating_point else 1)
    return values.to(dtype).reshape(shape)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 127, 128, 129, 512, 513])
def test_topk(n: int) -> None:
    for cores in (1, 2):
        for k in {1, min(n, 8), min(n, 9), min(n, 50)}:
            assert_values(*tile_values(aten.topk.default, mixed(5, n), k, cores=cores))
            assert_values(*tile_values(aten.topk.default, mixed(3, n), k, -1, False, cores=cores))


@pytest.mark.parametrize("n", [1, 2, 8, 127, 128, 129, 512, 513, 1500])
def test_sort(n: int) -> None:
    for descending in (False, True):
        assert_values(*tile_values(aten.sort.default, mixed(3, n), -1, descending))
    assert_values(*tile_values(aten.sort.default, mixed(n, 3), 0, True, cores=2))
    assert_values(*tile_values(aten.argsort.default, mixed(2, n), -1, False))


@pytest.mark.parametrize("n", [1000, 5000])
def test_networks(n: int) -> None:
    """Whole rows of a partition, and one row over all of them."""
    assert_values(*tile_values(aten.sort.stable, mixed(20 if n == 1000 else 3, n), stable=True))
    equal = (torch.arange(n) * 7919 % 50).float()
    equal[::7] = -torch.inf
    assert_values(*tile_values(aten.sort.stable, equal, stable=True, descending=True))
    assert_values(*tile_values(aten.sort.stable, equal, stable=True, cores=2))


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, I64, I32], ids=str)
def test_dtypes(dtype: torch.dtype, core: CoreSpec) -> None:
    x = mixed(4, 60, dtype=dtype)
    assert_values(*tile_values(aten.topk.default, x, 9, core=core))
    assert_values(*tile_values(aten.sort.stable, x, stable=True, dim=1, core=core))
    assert_values(*tile_values(aten.kthvalue.default, x, 33, core=core))


def test_equal_and_infinite_values_keep_their_order() -> None:
    experts = (torch.arange(300) * 7919 % 8).reshape(2, 150)
    assert_values(*tile_values(aten.sort.stable, experts, stable=True))
    scores = mixed(3, 40)
    scores[:, 5:30] = -torch.inf
    assert_values(*tile_values(aten.sort.stable, scores, stable=True, descending=True))
    scores[:, 7] = torch.finfo(F32).max
    got, _ = tile_values(aten.topk.default, scores, 20)
    assert torch.equal(got[0], scores.topk(20).values)
    assert all(len(set(row)) == 20 for row in got[1].tolist())


def test_medians() -> None:
    for n in (1, 128, 129, 1100):
        assert_values(*tile_values(aten.median.dim, mixed(3, n), 1))
        assert_values(*tile_values(aten.median.dim, mixed(n, 3), 0, True, cores=2))
        assert_values(*tile_values(aten.kthvalue.default, mixed(3, n), n // 2 + 1))
    assert_values(*tile_values(aten.median.default, mixed(30, 40)))
    assert_values(*tile_values(aten.median.default, mixed(30, 40).t(), cores=2))
    assert_values(*tile_values(aten.msort.default, mixed(40, 3)))


@pytest.mark.parametrize("n", [2048, 5001, 40_000])
def test_long_rows_are_searched_in_pieces(n: int) -> None:
    for cores in (1, 2):
        for rows, k in ((1, 1), (3, 50), (130, 9)):
            if rows * n < 1_000_000:
                x = mixed(rows, n)
                assert_values(*tile_values(aten.topk.default, x, k, cores=cores))
                assert_values(*tile_values(aten.topk.default, x, k, -1, False, cores=cores))
    x = mixed(2, n, dtype=I64)
    x[0, 7:] = x[0, 7]
    got, expected = tile_values(aten.kthvalue.default, x, 3)
    assert torch.equal(got[0], expected[0])
    scores = mixed(2, n)
    scores[:, 3:] = -torch.inf
    got, _ = tile_values(aten.topk.default, scores, 8)
    assert torch.equal(got[0], scores.topk(8).values)
    assert all(len(set(row)) == 8 and max(row) < n for row in got[1].tolist())


def test_odd_strides() -> None:
    x = mixed(6, 40, 8)[::2, :, 1::3].transpose(0, 2)
    assert_values(*tile_values(aten.topk.default, x, 5, 1))
    assert_values(*tile_values(aten.sort.stable, x, stable=True, dim=0))


@pytest.mark.parametrize("n", [1, 2, 127, 3000])
def test_randperm_is_a_permutation(n: int) -> None:
    for cores in (1, 2):
        (got,), _ = tile_values(aten.randperm.default, n, cores=cores)
        assert got.dtype == I64 and got.sort().values.tolist() == list(range(n))


@pytest.mark.parametrize("n", [1, 7, 8, 127, 128, 129])
def test_searches(n: int) -> None:
    edges = mixed(n).sort().values
    values = torch.cat([mixed(70) / 3, edges, torch.tensor([-torch.inf, torch.inf])])
    for right in (False, True):
        for cores in (1, 2):
            assert_values(*tile_values(aten.bucketize.Tensor, values, edges, right=right,
                                       cores=cores))  # fmt: skip
            assert_values(*tile_values(aten.searchsorted.Tensor, edges, values.reshape(-1, 1),
                                       right=right, cores=cores))  # fmt: skip
            rows = mixed(3, n).sort(1).values
            assert_values(*tile_values(aten.searchsorted.Tensor, rows, mixed(3, 50), right=right,
                                       cores=cores))  # fmt: skip
    assert_values(*tile_values(aten.searchsorted.Scalar, edges, 0.5))
    assert_values(*tile_values(aten.bucketize.Scalar, 0.5, edges, out_int32=True))
    whole = torch.arange(n) * 3
    assert_values(*tile_values(aten.searchsorted.Tensor, whole, torch.arange(3 * n) - 2))
    mess = mixed(2, n)
    assert_values(
        *tile_values(aten.searchsorted.Tensor, mess, mixed(2, 30), sorter=mess.argsort(1))
    )
