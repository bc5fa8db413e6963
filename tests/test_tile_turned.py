"""Operands that lie across the result: turned on TensorE, not fetched element by element."""

from __future__ import annotations

import pytest
import torch
from tile_case import TRN1, TRN2, assert_values, tile_values
from torch import Tensor

from torch_trn.lowering import OpCall, TensorSpec, lower
from torch_trn.scheduler import schedule

aten = torch.ops.aten
DTYPES = [torch.float32, torch.bfloat16, torch.int64]


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers, which every dtype holds."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 7919 % 101 - 50).to(dtype).reshape(shape)


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_matrix_that_repeats_across_a_turned_tensor(dtype: torch.dtype, core: object) -> None:
    for rows, cols in ((7, 9), (129, 130), (128, 513)):
        x = numbers(2, cols, rows, dtype=dtype).transpose(1, 2)
        y = numbers(rows, cols, dtype=dtype)
        for cores in (1, 2):
            assert_values(*tile_values(aten.add.Tensor, x, y, core=core, cores=cores))
            assert_values(*tile_values(aten.add_.Tensor, x, y, core=core, cores=cores))


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_joins_of_turned_tensors(dtype: torch.dtype, core: object) -> None:
    for rows, cols in ((130, 129), (128, 513)):
        plain = numbers(2, 3, cols, dtype=dtype)
        turned = [numbers(2, cols, rows, dtype=dtype).transpose(1, 2) + i for i in (0, 1)]
        assert not turned[0].is_contiguous()
        for cores in (1, 2):
            given = {"core": core, "cores": cores}
            out = torch.empty(2, 2 * rows + 3, cols, dtype=dtype)
            assert_values(*tile_values(aten.cat.out, [plain, *turned], 1, out=out, **given))
            out = torch.empty(2, 3, rows, cols, dtype=dtype)
            tensors = [turned[0], turned[0].contiguous(), turned[1]]
            assert_values(*tile_values(aten.stack.out, tensors, 1, out=out, **given))
    assert_values(*tile_values(aten.cat.default, [plain, *turned], 1, core=core))


def test_turning_takes_about_as_long_as_a_copy_that_turns() -> None:
    dtype = torch.float32
    plain = TensorSpec.contiguous(dtype, 8, 196, 1024)
    turned = TensorSpec(dtype, plain.shape, (200704, 1, 196))
    both = TensorSpec.contiguous(dtype, 8, 392, 1024)
    matrix = TensorSpec.contiguous(dtype, 196, 1024)

    def duration_ps(name: str, args: tuple[object, ...], out: TensorSpec) -> int:
        return schedule(lower(OpCall(name, args, (out,)), TRN2), TRN2).duration_ps

    copy = duration_ps("aten::clone", (turned,), plain)
    assert duration_ps("aten::cat", ((turned, turned), 1), both) < 3 * copy
    assert duration_ps("aten::add.Tensor", (turned, matrix, 1), turned) < 3 * copy
