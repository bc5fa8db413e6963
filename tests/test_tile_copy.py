"""Copies and layout changes as Programs: equal to CPU ATen bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tile_case import TRN1, TRN2, assert_values, tile_values

from torch_trn.chip import CoreSpec

aten = torch.ops.aten
F32, BF16, F16, I64, I32, BOOL = (
    torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool,
)  # fmt: skip


def x(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    """Distinct values of any dtype."""
    count = torch.Size(shape).numel()
    if dtype == BOOL:
        return (torch.arange(count) * 7 % 3 == 0).reshape(shape)
    return (torch.arange(count) % 2039 - 40).to(dtype).reshape(shape)


def odd(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    """A strided view that starts later in its storage, dims in another order."""
    wide = x(*(2 * size + 1 for size in reversed(shape)), dtype=dtype)
    cut = wide[tuple(slice(1, 2 * size + 1, 2) for size in reversed(shape))]
    return cut.permute(*range(cut.dim() - 1, -1, -1))


SIZES = (1, 127, 128, 129, 512, 513)

CALLS: dict[str, tuple[Any, ...]] = {
    "expand_copy": (aten.expand_copy.default, x(3, 1, 5), [2, 3, 4, -1]),
    "permute_copy": (aten.permute_copy.default, x(3, 129, 5), [2, 0, 1]),
    "t_copy": (aten.t_copy.default, x(129, 130)),
    "transpose_copy": (aten.transpose_copy.int, x(2, 129, 3, 5), 1, -1),
    "slice_copy": (aten.slice_copy.Tensor, x(7, 129), 1, 3, -2, 3),
    "select_copy": (aten.select_copy.int, odd(7, 129), 1, -3),
    "as_strided_copy": (aten.as_strided_copy.default, x(40), [3, 4], [5, 2], 3),
    "diagonal_copy": (aten.diagonal_copy.default, x(6, 5, 7), -1, 0, 2),
    "unfold_copy": (aten.unfold_copy.default, x(3, 130), 1, 4, 3),
    "narrow_copy": (aten.narrow_copy.default, x(9, 5), 0, 2, 4),
    "rot90": (aten.rot90.default, x(3, 4, 5), 1, [1, 2]),
    "rot90 thrice": (aten.rot90.default, x(3, 4, 5), 3, [0, 2]),
    "flip": (aten.flip.default, x(4, 129, 3), [0, 1]),
    "flip odd": (aten.flip.default, odd(4, 9, 3), [2, 1]),
    "view_copy": (aten.view_copy.default, x(12, 10), [5, 24]),
    "_reshape_copy": (aten._reshape_copy.default, x(12, 10), [5, 24]),
    "squeeze_copy": (aten.squeeze_copy.default, x(1, 12, 1, 10)),
    "unsqueeze_copy": (aten.unsqueeze_copy.default, odd(12, 10), 1),
    "view_as_real_copy": (aten.view_as_real_copy.default, torch.complex(x(9, 5), -x(9, 5))),
    "view_as_complex_copy": (aten.view_as_complex_copy.default, x(9, 5, 2)),
    "_conj_copy": (aten._conj_copy.default, torch.complex(x(9, 130), x(9, 130))),
    "_neg_view_copy": (aten._neg_view_copy.default, odd(9, 13)),
    "native_channel_shuffle": (aten.native_channel_shuffle.default, x(2, 12, 5, 3), 4),
    "channel_shuffle": (aten.channel_shuffle.default, x(2, 12, 5, 3), 3),
    "pixel_shuffle": (aten.pixel_shuffle.default, x(2, 18, 5, 7), 3),
    "pixel_shuffle wide": (aten.pixel_shuffle.default, x(1, 16, 128, 129), 2),
    "pixel_unshuffle": (aten.pixel_unshuffle.default, x(2, 2, 15, 21), 3),
    "pixel_shuffle odd": (aten.pixel_shuffle.default, odd(2, 18, 5, 7), 3),
    "roll": (aten.roll.default, x(5, 130), [3, -2], [1, 0]),
    "roll flat": (aten.roll.default, x(5, 130), [7]),
    "roll once": (aten.roll.default, x(2, 129, 4), [1], [1]),
    "repeat": (aten.repeat.default, x(3, 130), [2, 1, 3]),
    "repeat odd": (aten.repeat.default, odd(3, 5), [2, 2]),
    "cat": (aten.cat.default, [x(3, 5), x(3, 129), x(3, 129), x(3, 0), odd(3, 4)], 1),
    "cat legacy": (aten.cat.default, [x(0), x(3, 5)], 0),
    "cat dtypes": (aten.cat.default, [x(4, 5), x(2, 5, dtype=BF16), x(1, 5, dtype=I64)]),
    "stack": (aten.stack.default, [x(3, 129), x(3, 129), odd(3, 129)], 1),
    "stack numbers": (aten.stack.default, [x(), x() + 1, x() + 2], 0),
    "block_diag": (aten.block_diag.default, [x(2, 3), x(4), x(), x(129, 2)]),
    "_chunk_cat": (aten._chunk_cat.default, [x(5, 3), x(8, 2), x(3, 7)], 0, 2),
    "unbind_copy": (aten.unbind_copy.int, x(3, 5, 7), 1),
    "split_copy": (aten.split_copy.Tensor, x(7, 5), 3, 0),
    "split_with_sizes_copy": (aten.split_with_sizes_copy.default, x(3, 9), [2, 2, 5], 1),
    "slice_backward": (aten.slice_backward.default, x(3, 4), [3, 9], 1, 1, 9, 2),
    "slice_scatter": (aten.slice_scatter.default, x(3, 9), -x(3, 4), 1, 2, 6, 1),
    "select_backward": (aten.select_backward.default, x(129), [129, 9], 1, 3),
    "select_scatter": (aten.select_scatter.default, x(129, 9), -x(129), 1, -1),
    "diagonal_backward": (aten.diagonal_backward.default, x(2, 4), [4, 2, 5], 1, 0, 2),
    "diagonal_scatter": (aten.diagonal_scatter.default, x(5, 4), -x(4), 0, 0, 1),
    "as_strided_scatter": (aten.as_strided_scatter.default, x(6, 5), -x(2, 3), [2, 3], [9, 2], 1),
    "diag_embed": (aten.diag_embed.default, x(3, 5), -1, 0, 2),
    "unfold_backward": (aten.unfold_backward.default, x(3, 43, 4), [3, 130], 1, 4, 3),
    "unfold_backward overlapping": (aten.unfold_backward.default, x(3, 63, 5), [3, 130], 1, 5, 2),
    "unfold_backward apart": (aten.unfold_backward.default, x(33, 2), [130], 0, 2, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_copies(name: str) -> None:
    for cores in (1, 2):
        assert_values(*tile_values(*CALLS[name], cores=cores))


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, I64, I32, BOOL, torch.complex64], ids=str)
def test_every_dtype_moves(dtype: torch.dtype, core: CoreSpec) -> None:
    for cores in (1, 2):
        given = {"core": core, "cores": cores}
        assert_values(*tile_values(aten.clone.default, x(33, 70, dtype=dtype), **given))
        assert_values(*tile_values(aten.cat.default, [x(3, 5, dtype=dtype)] * 3, 1, **given))
        assert_values(*tile_values(aten.roll.default, x(130, dtype=dtype), [3], [0], **given))
        assert_values(
            *tile_values(aten.pixel_shuffle.default, x(1, 4, 5, 130, dtype=dtype), 2, **given)
        )
        if dtype != BOOL:
            assert_values(
                *tile_values(aten.slice_backward.default, x(3, 4, dtype=dtype), [3, 9], 1, 1, 9, 2,
                             **given))  # fmt: skip


@pytest.mark.parametrize("n", SIZES)
def test_sizes_beside_the_edges(n: int) -> None:
    for cores in (1, 2):
        assert_values(*tile_values(aten.clone.default, x(n, n), cores=cores))
        assert_values(*tile_values(aten.cat.default, [x(n, 3), x(n, 2)], 1, cores=cores))
        assert_values(*tile_values(aten.flip.default, x(n, 5), [0], cores=cores))
        assert_values(*tile_values(aten.repeat.default, x(n), [3, 2], cores=cores))
        assert_values(*tile_values(aten.stack.default, [x(n), x(n)], 0, cores=cores))


@pytest.mark.parametrize("size", [(1, 20_000), (3, 40_000), (20_001,), (300, 300)])
def test_long_runs_are_cut(size: tuple[int, ...]) -> None:
    for cores in (1, 2):
        assert_values(*tile_values(aten.clone.default, x(*size), cores=cores))


LAYOUTS = {
    "plain": lambda: x(33, 130), "turned": lambda: x(130, 33).t(), "odd": lambda: odd(5, 9, 7),
    "expanded": lambda: x(33, 1).expand(33, 130), "a row": lambda: x(130).expand(33, 130),
    "a number": lambda: x(1).expand(33, 130), "inside": lambda: x(3, 1, 70).expand(3, 9, 70),
    "turned batch": lambda: x(3, 129, 65).transpose(1, 2), "offset": lambda: x(40, 40)[3:, 5:],
}  # fmt: skip


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_copies_and_casts_of_every_layout(name: str, core: CoreSpec) -> None:
    source = LAYOUTS[name]()
    for cores in (1, 2):
        given = {"core": core, "cores": cores}
        for memory in (torch.preserve_format, torch.contiguous_format):
            assert_values(*tile_values(aten.clone.default, source, memory_format=memory, **given))
        for dtype in (BF16, F16, I64, I32, BOOL, torch.complex64):
            assert_values(*tile_values(aten._to_copy.default, source, dtype=dtype, **given))
            target = torch.zeros(source.shape, dtype=dtype)
            assert_values(*tile_values(aten.copy_.default, target, source, **given))
        back = torch.zeros(source.shape[::-1]).permute(*range(source.dim() - 1, -1, -1))
        assert_values(*tile_values(aten.copy_.default, back, source, **given))
        half = source.to(BF16)
        assert_values(*tile_values(aten.copy_.default, back.to(BF16), half, **given))
        assert_values(*tile_values(aten._to_copy.default, half, dtype=F32, **given))
        assert_values(*tile_values(aten._to_copy.default, source.to(I64), dtype=F32, **given))
        assert_values(*tile_values(aten.copy_.default, odd(*source.shape), source[:1], **given))
        pair = torch.complex(source, -source)
        assert_values(*tile_values(aten.clone.default, pair, memory_format=torch.contiguous_format,
                                   **given))  # fmt: skip


@pytest.mark.parametrize("n", SIZES)
def test_casts_and_turns_beside_the_edges(n: int) -> None:
    for cores in (1, 2):
        assert_values(*tile_values(aten._to_copy.default, x(n, 3), dtype=BF16, cores=cores))
        assert_values(*tile_values(aten.clone.default, x(n, 130).t(), cores=cores,
                                   memory_format=torch.contiguous_format))  # fmt: skip
        assert_values(*tile_values(aten.clone.default, x(n, n, dtype=I64).t(), cores=cores,
                                   memory_format=torch.contiguous_format))  # fmt: skip


def test_casts_round_to_nearest_even_and_towards_zero() -> None:
    values = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -2.7, 2.7, 300.5, -0.5])
    for dtype in (BF16, F16, I64, I32, torch.int16, BOOL):
        assert_values(*tile_values(aten._to_copy.default, values, dtype=dtype))
