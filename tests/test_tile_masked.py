"""x[mask] = number as a Program: what CPU ATen leaves, for masks of some of the dims."""

from __future__ import annotations

import pytest
import torch
from tile_case import TRN1, TRN2, assert_values, tile_values

from torch_trn.errors import UnsupportedOpError

aten = torch.ops.aten
F32, BF16, F16, I64, BOOL = torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, I64, BOOL], ids=str)
def test_masks(dtype: torch.dtype, core: object) -> None:
    for rows, cols in ((1, 1), (127, 5), (129, 513)):
        x = (torch.arange(rows * cols) % 7 - 3).to(dtype).reshape(rows, cols)
        if dtype.is_floating_point:
            x[0, 0] = torch.nan
        mask = (torch.arange(rows * cols) * 7919 % 3 == 0).reshape(rows, cols)
        value = torch.tensor(2).to(dtype)
        for cores in (1, 2):
            for function in (aten.index_put.default, aten._index_put_impl_.default):
                for given in ([mask], [mask[:, 0]], [None, mask[0]]):
                    case = tile_values(function, x, given, value, core=core, cores=cores)
                    assert_values(*case)
        turned = tile_values(aten.index_put_.default, x.t(), [mask.t()], value.reshape(1))
        assert_values(*turned)


def test_other_masks_depend_on_data() -> None:
    x, mask = torch.zeros(4), torch.tensor([True, False, True, False])
    with pytest.raises(UnsupportedOpError, match="depends on data"):
        tile_values(aten.index_put.default, x, [mask], torch.ones(2))
    with pytest.raises(UnsupportedOpError, match="depends on data"):
        tile_values(aten.index_put.default, x, [mask], torch.tensor(1.0), True)
