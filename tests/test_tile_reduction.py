"""Values of reductions, scans and softmax against CPU ATen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tile_case import EPSILON, TRN1, TRN2, assert_values, tile_values
from torch import Tensor

from torch_trn.chip import CoreSpec
from torch_trn.errors import UnsupportedOpError

ATEN = torch.ops.aten
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAN, INF = math.nan, math.inf

CORES = pytest.mark.parametrize(
    ("core", "cores"), [(TRN1, 1), (TRN2, 2)], ids=["trn1", "lnc2"]
)  # fmt: skip


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if x.numel() > 14:
        x.view(-1)[::7] = 1.0  # so that extremes are tied
    return x.to(dtype)


def spoiled(x: Tensor) -> Tensor:
    """With rows of -infinity, a nan and an infinity."""
    x = x.clone()
    x[1] = -INF
    x.select(0, 0)[..., 2] = NAN
    x.select(0, -1)[..., 1] = INF
    return x


def check(function: Any, *args: Any, rtol: float = 1e-5, atol: float = 1e-5, **given: Any) -> None:
    """Sums of n fp32 numbers in another order: about sqrt(n) roundings apart."""
    assert_values(*tile_values(function, *args, **given), rtol=rtol, atol=atol)


#: Short rows that share partitions, rows of a tile, rows over all partitions (the second of them
#: uneven), rows in chunks, three dims; and all of them turned.
SHAPES = [(3, 5), (300, 7), (129, 70), (130, 520), (6, 2100), (1, 5003), (2, 40000), (5, 70, 3)]
INPUTS = {
    **{"x".join(map(str, shape)): randn(*shape) for shape in SHAPES},
    **{f"{shape[0]}x{shape[1]} turned": randn(*shape).transpose(0, -1) for shape in SHAPES[1:6]},
    "3x70x5 turned": randn(5, 70, 3).transpose(0, -1),
    "every other": randn(129, 70)[:, ::2],
    "expanded rows": randn(1, 30).expand(9, 30),
    "expanded columns": randn(40, 1).expand(40, 9),
}
_DIMS = pytest.mark.parametrize("dim", [-1, 0])
_INPUTS = pytest.mark.parametrize("name", INPUTS)


@CORES
@_DIMS
@_INPUTS
def test_folds(name: str, dim: int, core: CoreSpec, cores: int) -> None:
    x, given = INPUTS[name], {"core": core, "cores": cores}
    check(ATEN.sum.dim_IntList, x, [dim], atol=1e-3, **given)
    check(ATEN.mean.dim, x, [dim], **given)
    check(ATEN.amax.default, x, [dim], rtol=0.0, atol=0.0, **given)
    check(ATEN.argmin.default, x, dim, rtol=0.0, atol=0.0, **given)
    check(ATEN.max.dim, x, dim, rtol=0.0, atol=0.0, **given)
    check(ATEN.linalg_vector_norm.default, x, 2, [dim], **given)
    check(ATEN.logsumexp.default, x, [dim], **given)
    check(ATEN.any.dim, x > 1, dim, rtol=0.0, atol=0.0, **given)
    if x.shape[dim] > 1:
        check(ATEN.var_mean.correction, x, [dim], correction=1, **given)


@CORES
@_DIMS
@pytest.mark.parametrize("name", [name for name, x in INPUTS.items() if x.numel() < 20000])
def test_scans_and_softmax(name: str, dim: int, core: CoreSpec, cores: int) -> None:
    x, given = INPUTS[name], {"core": core, "cores": cores}
    check(ATEN._softmax.default, x, dim, False, **given)
    check(ATEN._log_softmax.default, x, dim, False, **given)
    y = torch.softmax(x, dim).clone()
    check(ATEN._softmax_backward_data.default, x.contiguous(), y, dim, F32, **given)
    y = torch.log_softmax(x, dim).clone()
    check(ATEN._log_softmax_backward_data.default, x.contiguous(), y, dim, F32, atol=1e-3, **given)
    check(ATEN.cumsum.default, x, dim, atol=1e-3, **given)
    check(ATEN.cummax.default, x, dim, rtol=0.0, atol=0.0, **given)
    check(ATEN.logcumsumexp.default, x * 30, dim, atol=1e-4, **given)


def test_long_rows_of_softmax_and_scans() -> None:
    for x in (randn(2, 70000), randn(1, 5003)):
        check(ATEN._softmax.default, x, -1, False, atol=1e-9)
        check(ATEN._log_softmax.default, x, -1, False)
        check(ATEN.native_layer_norm.default, x, [x.shape[1]], None, None, 1e-5)
    x = randn(3, 60000)
    check(ATEN.cumsum.default, x, -1, atol=1e-1)
    check(ATEN.cummin.default, x, -1, rtol=0.0, atol=0.0)


@CORES
def test_folds_of_everything(core: CoreSpec, cores: int) -> None:
    given = {"core": core, "cores": cores}
    for x in (randn(129, 70), randn(70, 129).t(), randn(3, 5), randn(2, 9000), randn()):
        for name in ("max", "argmax", "_aminmax", "count_nonzero", "any", "all"):
            check(getattr(ATEN, name).default, x, rtol=0.0, atol=0.0, **given)
        check(ATEN.sum.default, x, atol=1e-2, **given)
        check(ATEN.norm.Scalar, x, 2, **given)
        if x.numel() > 1:
            check(ATEN.std_mean.correction, x, correction=1, **given)
        if x.dim() == 2:
            check(ATEN.sum.dim_IntList, x, [0, 1], atol=1e-2, **given)
            check(ATEN.amax.default, x, [0, 1], rtol=0.0, atol=0.0, **given)


# Columns are turned on TensorE, which spreads nan and infinity before trn2.
@pytest.mark.parametrize(
    ("core", "cores", "dim"), [(TRN1, 1, -1), (TRN2, 1, 0), (TRN2, 2, -1), (TRN2, 2, 0)]
)
@pytest.mark.parametrize("shape", [(5, 9), (129, 70), (6, 2100)])
def test_nan_and_infinity(
    shape: tuple[int, ...], core: CoreSpec, cores: int, dim: int
) -> None:  # fmt: skip
    x, given = spoiled(randn(*shape)), {"core": core, "cores": cores}
    for function in (ATEN.amax.default, ATEN.amin.default):
        check(function, x, [dim], rtol=0.0, atol=0.0, **given)
    for function in (ATEN.argmax.default, ATEN.argmin.default, ATEN.max.dim, ATEN.cummax.default,
                     ATEN.cummin.default, ATEN.any.dim, ATEN.all.dim):  # fmt: skip
        check(function, x, dim, rtol=0.0, atol=0.0, **given)
    check(ATEN.nansum.default, x, [dim], atol=1e-3, **given)
    check(ATEN.logsumexp.default, x, [dim], **given)
    check(ATEN._softmax.default, x, dim, False, **given)
    check(ATEN._safe_softmax.default, x, dim, **given)
    check(ATEN._log_softmax.default, x, dim, False, **given)


@_DIMS
def test_norms_products_and_corrections(dim: int) -> None:
    x = randn(129, 70)
    for p in (2, 1, INF, -INF, 0, 3):
        check(ATEN.linalg_vector_norm.default, x, p, [dim], rtol=3e-5)
    check(ATEN.prod.dim_int, x * 0.1 + 1, dim, rtol=1e-4)
    check(ATEN.cumprod.default, x * 0.1 + 1, dim, rtol=1e-4)
    check(ATEN.std.correction, x, [dim], correction=0)
    check(ATEN.var.correction, x[:, :1], [1], correction=1)
    check(ATEN.var.dim, x, [dim], False)


@CORES
def test_integers_are_summed_exactly(core: CoreSpec, cores: int) -> None:
    given: dict[str, Any] = {"core": core, "cores": cores, "rtol": 0.0, "atol": 0.0}
    for shape in ((5, 9), (129, 70), (2, 9000)):
        big = torch.randint(-(2**40), 2**40, shape, generator=torch.Generator().manual_seed(0))
        few = big % 7 - 3
        for x in (big, few.to(torch.int32), few.to(torch.int8), few > 0):
            for dim in (-1, 0):
                check(ATEN.sum.dim_IntList, x, [dim], **given)
                check(ATEN.amax.default, x, [dim], **given)
            check(ATEN.sum.default, x, **given)
            check(ATEN.max.default, x, **given)
        check(ATEN.argmax.default, big, -1, **given)
        check(ATEN.cumsum.default, few, -1, **given)
        check(ATEN.cumsum.default, few > 0, 0, **given)
        check(ATEN.prod.dim_int, few.abs().clamp(1, 2)[:, :9], 1, **given)


@CORES
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_narrow_dtypes_are_rounded_once(dtype: torch.dtype, core: CoreSpec, cores: int) -> None:
    for shape in ((129, 70), (6, 2100)):
        x = randn(*shape).to(dtype)
        for function, args in (
            (ATEN._softmax.default, (-1, False)), (ATEN.sum.dim_IntList, ([0],)),
            (ATEN.amax.default, ([-1],)), (ATEN.var.correction, ([-1],)),
            (ATEN.mean.dim, ([-1],)), (ATEN.cumsum.default, (-1,)),
        ):  # fmt: skip
            (got,), _ = tile_values(function, x, *args, core=core, cores=cores)
            expected = function(x.float(), *args).to(dtype)
            assert_values([got], [expected], rtol=2 * EPSILON[dtype], atol=1e-5)
        check(ATEN.sum.dim_IntList, x, [-1], dtype=F32, atol=1e-3, core=core, cores=cores)


def test_of_no_elements() -> None:
    nothing = torch.zeros(3, 0, 4)
    for function, dim in (
        (ATEN.sum.dim_IntList, [1]), (ATEN.mean.dim, [1]), (ATEN.prod.dim_int, 1),
        (ATEN.all.dim, 1), (ATEN.any.dim, 1), (ATEN.logsumexp.default, [1]),
    ):  # fmt: skip
        check(function, nothing, dim)
    check(ATEN.sum.dim_IntList, torch.zeros(0, 4), [1])
    check(ATEN._softmax.default, nothing, 1, False)


def test_two_tensors_as_one_number() -> None:
    x = randn(40, 30)
    check(ATEN.trace.default, x)
    check(ATEN.trace.default, x.t()[:, ::2])
    for p in (2, 1, 3, INF):
        check(ATEN.dist.default, x, x + 1, p)
        check(ATEN.dist.default, x, randn(30, seed=1), p)


@pytest.mark.parametrize("same", [True, False])
def test_comparisons_leave_their_answer_in_scratch(same: bool) -> None:
    # The host reads it: the operator returns no tensor, so there is nothing to compare with.
    x = randn(40, 30)
    y = x.clone()
    y[3, 4] += 0.0 if same else 1.0
    for function in (ATEN.equal.default, ATEN.allclose.default):
        got, given = tile_values(function, x, y)
        assert all(torch.equal(a, b) for a, b in zip(got, given, strict=True))


def test_masked_softmax() -> None:
    x, mask = randn(2, 3, 8, 9), torch.rand(2, 3, 8, 9) > 0.6
    mask[0, 0, 0] = True
    check(ATEN._masked_softmax.default, x, mask, 3, 2)
    y = torch.softmax(x.masked_fill(mask, -INF), 3)
    check(ATEN._masked_softmax_backward.default, x, y, mask, 3)
    x = randn(2, 3, 9, 9)
    check(ATEN._masked_softmax.default, x, torch.rand(9, 9) > 0.6, 3, 0)
    check(ATEN._masked_softmax.default, x, torch.rand(2, 9) > 0.6, 3, 1)


def test_complex_sums() -> None:
    x = torch.complex(randn(40, 30), randn(40, 30, seed=1))
    for dims in ([1], [0], [0, 1]):
        check(ATEN.sum.dim_IntList, x, dims, atol=1e-4)
    check(ATEN.mean.dim, x, [0])
    with pytest.raises(UnsupportedOpError, match="no engine computes with complex numbers"):
        tile_values(ATEN.prod.dim_int, x, 0)


def test_multinomial_draws_in_proportion() -> None:
    weights = torch.tensor([[0.0, 1.0, 3.0, 0.0]]).expand(1, 4).contiguous()
    (drawn,), _ = tile_values(ATEN.multinomial.default, weights, 4000, True)
    counts = torch.bincount(drawn.reshape(-1), minlength=4)
    assert counts[0] == counts[3] == 0 and 900 < int(counts[1]) < 1100
    with pytest.raises(UnsupportedOpError) as error:
        tile_values(ATEN.multinomial.default, torch.ones(4), 2, False)
    assert str(error.value) == (
        "aten::multinomial has no NeuronCore lowering: draws without replacement depend on each "
        "other: draw one at a time"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_rows_of_many_columns(dtype: torch.dtype) -> None:
    x = (torch.arange(2 * 3 * 66000) * 7919 % 101 - 50).to(dtype).reshape(2, 3, 264, 250) / 64
    bound = {"rtol": 6 * 2.0**-24 + (2.0**-8 if dtype == torch.bfloat16 else 0), "atol": 2.0**-24}
    for cores in (1, 2):
        for dims in ([0, 1], [0]):
            for function in (ATEN.sum.dim_IntList, ATEN.mean.dim):
                got, _ = tile_values(function, x, dims, True, cores=cores)
                expected = function(x.float(), dims, True).to(dtype)
                assert_values(got, [expected], **bound)
    y = x.expand(2, 3, *x.shape[2:]).transpose(2, 3)
    got, _ = tile_values(ATEN.sum.dim_IntList, y, [0, 1])
    assert_values(got, [y.float().sum([0, 1]).to(dtype)], **bound)
    got, _ = tile_values(ATEN.linalg_vector_norm.default, y, 1, [0, 1])
    assert_values(got, [y.float().abs().sum([0, 1]).to(dtype)], **bound)
