"""Bags of embeddings as Programs: against CPU ATen in fp32, whose sums round in another order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tile_case import EPSILON, TRN1, TRN2, assert_values, tile_values
from torch import Tensor

aten = torch.ops.aten
F32, BF16 = torch.float32, torch.bfloat16


def case(items: int, bags: int, dtype: torch.dtype = F32, width: int = 9) -> tuple[Tensor, ...]:
    """A table, the items' rows, and where bags start; some are empty."""
    generator = torch.Generator().manual_seed(items + bags)
    table = torch.randn(20, width, generator=generator).to(dtype)
    rows = torch.randint(0, 20, (items,), generator=generator)
    starts = torch.randint(0, items + 1, (bags,), generator=generator).sort().values
    starts[0] = 0
    return table, rows, starts


def forward(*args: Any, **given: Any) -> tuple[list[Tensor], list[Tensor]]:
    got, expected = tile_values(aten._embedding_bag.default, *args, **given)
    if args[4] == 0:
        # Sums leave the sizes of bags open.
        got, expected = got[:2], expected[:2]
    return got, expected


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize("mode", [0, 1], ids=["sum", "mean"])
@pytest.mark.parametrize("items,bags", [(1, 1), (7, 4), (127, 129), (300, 5)])
def test_forward(items: int, bags: int, mode: int, core: Any) -> None:
    table, rows, starts = case(items, bags)
    for cores in (1, 2):
        for padding in (-1, 3):
            given = (table, rows, starts, False, mode, False, None, False, padding)
            # Sums of up to `items` numbers of about 1.
            assert_values(*forward(*given, core=core, cores=cores), rtol=0, atol=items * 2.0**-21)


def test_forward_variants() -> None:
    table, rows, starts = case(50, 6)
    weights = torch.rand(50)
    ends = torch.cat([starts, torch.tensor([50])])
    bound: dict[str, float] = {"rtol": 0, "atol": 50 * 2.0**-21}
    assert_values(*forward(table, rows, starts, False, 0, False, weights), **bound)
    assert_values(*forward(table, rows, ends, False, 0, False, None, True), **bound)
    assert_values(*forward(table, rows.int(), starts.int(), False, 1, False, None, False), **bound)
    table = torch.randn(9, 20).t()
    assert_values(*forward(table, rows, starts, False, 1, False, None), **bound)
    only = tile_values(aten._embedding_bag_forward_only.default, table, rows, starts, False, 1)
    assert_values(*only, **bound)


def test_forward_rounds_once() -> None:
    table, rows, starts = case(60, 4, BF16)
    got, _ = forward(table, rows, starts, False, 0, False)
    expected = aten._embedding_bag(table.float(), rows, starts)[0]
    assert_values(got[:1], [expected.to(BF16)], rtol=EPSILON[BF16], atol=2.0**-14)


@pytest.mark.parametrize("mode", [0, 1], ids=["sum", "mean"])
@pytest.mark.parametrize("items,bags", [(1, 1), (7, 4), (127, 129), (300, 5)])
def test_backward(items: int, bags: int, mode: int) -> None:
    table, rows, starts = case(items, bags)
    slopes = torch.randn(bags, 9)
    for padding in (-1, 3):
        weights = torch.rand(items) if mode == 0 and padding < 0 else None
        _, kept, sizes, maxima = aten._embedding_bag(
            table, rows, starts, False, mode, False, weights, False, padding
        )
        for cores in (1, 2):
            assert_values(*tile_values(
                aten._embedding_bag_backward.default, slopes, rows, starts, kept, sizes, maxima,
                20, False, mode, False, weights, padding, cores=cores),
                rtol=0, atol=items * 2.0**-20)  # fmt: skip
        if kept.numel():
            assert_values(*tile_values(
                aten._embedding_bag_dense_backward.default, slopes, rows, kept, sizes, maxima, 20,
                False, mode, weights, padding), rtol=0, atol=items * 2.0**-20)  # fmt: skip


def test_gradients_of_weights() -> None:
    table, rows, starts = case(130, 7)
    slopes = torch.randn(7, 9)
    kept = aten._embedding_bag(table, rows, starts, False, 0, False, torch.rand(130), False, 3)[1]
    for padding in (-1, 3):
        for cores in (1, 2):
            assert_values(*tile_values(
                aten._embedding_bag_per_sample_weights_backward.default, slopes, table, rows,
                starts, kept, 0, padding, cores=cores), rtol=0, atol=2.0**-18)  # fmt: skip
