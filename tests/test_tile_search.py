"""Membership and histograms as Programs: equal to CPU ATen, and to what CUDA counts of integers."""

from __future__ import annotations

import pytest
import torch
from tile_case import TRN1, TRN2, assert_values, tile_values
from torch import Tensor

from torch_trn.chip import CoreSpec
from torch_trn.executor import execute
from torch_trn.lowering import OpCall, TensorSpec, lower

aten = torch.ops.aten
F32, BF16, F16, I64, I32 = (
    torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
)  # fmt: skip


def numbers(*shape: int, dtype: torch.dtype = I64, below: int = 50) -> Tensor:
    """Whole numbers from 0 on, in no order."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 7919 % 1009 % below).to(dtype).reshape(shape)


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize("tests", [0, 1, 2, 127, 129, 513])
@pytest.mark.parametrize("count", [1, 127, 129])
def test_isin(count: int, tests: int, core: CoreSpec) -> None:
    x, among = numbers(count, below=1000), numbers(tests, below=1000)
    for cores in (1, 2):
        for invert in (False, True):
            assert_values(*tile_values(aten.isin.Tensor_Tensor, x, among, cores=cores, core=core,
                                       invert=invert))  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16, F16, I64, I32, torch.uint8], ids=str)
def test_isin_dtypes(dtype: torch.dtype) -> None:
    x, among = numbers(5, 60, dtype=dtype), numbers(20, dtype=dtype)
    assert_values(*tile_values(aten.isin.Tensor_Tensor, x, among))
    assert_values(*tile_values(aten.isin.Tensor_Tensor, x.t()[::3], among.reshape(4, 5).t()))
    assert_values(*tile_values(aten.isin.Tensor_Tensor, x[0, 0], among))
    assert_values(*tile_values(aten.isin.Tensor_Tensor, x, among[7]))
    assert_values(*tile_values(aten.isin.Tensor_Scalar, x, 7))
    assert_values(*tile_values(aten.isin.Tensor_Scalar, x, 7, invert=True))
    assert_values(*tile_values(aten.isin.Scalar_Tensor, 7, among))
    assert_values(*tile_values(aten.isin.Scalar_Tensor, 51, among, invert=True))


def test_isin_keeps_the_last_bits_of_integers() -> None:
    x = torch.tensor([2**40, 2**40 + 1, 2**24 + 1])
    assert_values(*tile_values(aten.isin.Tensor_Tensor, x, torch.tensor([2**40 + 1, 2**24])))
    assert_values(*tile_values(aten.isin.Tensor_Tensor, x, torch.tensor([2**40 + 1])))


@pytest.mark.parametrize("bins", [1, 4, 127, 129, 513])
@pytest.mark.parametrize("count", [1, 127, 129, 700])
def test_histc(count: int, bins: int) -> None:
    x = (torch.arange(count) * 7919 % 1009).float() / 1009
    for cores in (1, 2):
        for ends in ((0.1, 0.9), (0.0, 0.0), (-1.0, 0.5)):
            assert_values(*tile_values(aten.histc.default, x, bins, *ends, cores=cores))
    strided = x.expand(3, count).t()
    assert_values(*tile_values(aten.histc.default, strided, bins, 0.2, 0.8))


def test_histc_edges() -> None:
    x = torch.tensor([-0.5, 0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 4.5, float("nan"), float("inf")])
    assert_values(*tile_values(aten.histc.default, x, 4, 0.0, 4.0))
    assert_values(*tile_values(aten.histc.default, torch.full((5, 3), 2.0), 5, 0.0, 0.0))
    assert_values(*tile_values(aten.histc.default, torch.empty(0), 3, 0.0, 1.0))


def counted(x: Tensor, bins: int, low: int, high: int, cores: int) -> Tensor:
    """The Program's histogram of integers, which the CPU kernel refuses."""
    out = torch.full((bins,), -1, dtype=x.dtype)
    call = OpCall("aten::histc", (TensorSpec.of(x), bins, low, high), (TensorSpec.of(out),))
    execute(lower(call, TRN2, cores), TRN2, {"in0": x, "out0": out}, cores=cores)
    return out


@pytest.mark.parametrize("dtype", [I64, I32, torch.int16, torch.uint8], ids=str)
def test_histc_of_integers(dtype: torch.dtype) -> None:
    x = numbers(3, 70, dtype=dtype)
    for cores in (1, 2):
        got = counted(x, 8, 0, 7, cores)
        assert got.tolist() == [int((x == i).sum()) for i in range(8)]
        # Bins of unequal numbers of integers; the last one holds the end of the range.
        got = counted(x, 3, 5, 15, cores)
        bins = [(5, 9), (9, 12), (12, 16)]
        assert got.tolist() == [int(((x >= a) & (x < b)).sum()) for a, b in bins]
        got = counted(x, 5, 0, 0, cores)
        width, least = int(x.max() - x.min()), int(x.min())
        places = ((x.long() - least) * 5 // width).clamp(max=4)
        assert got.tolist() == [int((places == i).sum()) for i in range(5)]
    assert counted(torch.full((7,), 3, dtype=dtype), 2, 0, 0, 1).tolist() == [0, 7]


def test_histc_keeps_the_last_bits_of_integers() -> None:
    x = torch.tensor([2**40, 2**40 + 1, 2**40 + 2])
    assert counted(x, 2, 2**40, 2**40 + 2, 1).tolist() == [1, 2]
