"""Operators on image planes as Programs: pooling, resampling, padding, their gradients.

Bound: sums of fp32 values in another order than ATen's differ by a rounding of the sum of absolute
values for each addition; weights of resampling are computed in double here and in fp32 there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_tile_copy import odd, x
from tile_case import EPSILON, TRN1, TRN2, assert_values, tile_values
from torch import Tensor

from torch_trn.chip import CoreSpec

aten = torch.ops.aten
F32, BF16, F16, I64 = torch.float32, torch.bfloat16, torch.float16, torch.int64


def real(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def last(*shape: int) -> Tensor:
    """Channels last."""
    return real(*shape).to(memory_format=torch.channels_last)


PADS: dict[str, tuple[Any, ...]] = {
    "constant": (aten.constant_pad_nd.default, x(5, 7, 9), [1, 2, 3, 0], 2.5),
    "constant crop": (aten.constant_pad_nd.default, x(5, 129), [-3, 2, 1, -2], -1.0),
    "constant odd": (aten.constant_pad_nd.default, odd(5, 7, 9), [0, 1, 2, 0, 1, 1]),
    "constant int64": (aten.constant_pad_nd.default, x(130, 3, dtype=I64), [2, 0], -100),
    "reflection1d": (aten.reflection_pad1d.default, x(3, 5, 130), [4, 7]),
    "reflection2d": (aten.reflection_pad2d.default, x(2, 3, 9, 8), [3, 2, 1, 4]),
    "reflection3d": (aten.reflection_pad3d.default, x(2, 4, 5, 6), [1, 2, 3, 2, 1, 2]),
    "replication1d": (aten.replication_pad1d.default, odd(3, 130), [4, 7]),
    "replication2d": (aten.replication_pad2d.default, x(2, 3, 9, 8), [3, 2, 1, 10]),
    "replication3d": (aten.replication_pad3d.default, x(2, 2, 4, 5, 6), [1, 2, 3, 2, 1, 2]),
    "reflection1d backward": (aten.reflection_pad1d_backward.default, x(3, 5, 141), x(3, 5, 130),
                              [4, 7]),
    "reflection2d backward": (aten.reflection_pad2d_backward.default, x(2, 3, 14, 13),
                              x(2, 3, 9, 8), [3, 2, 1, 4]),
    "replication2d backward": (aten.replication_pad2d_backward.default, x(2, 3, 20, 13),
                               x(2, 3, 9, 8), [3, 2, 1, 10]),
    "replication3d backward": (aten.replication_pad3d_backward.default, x(2, 2, 7, 10, 9),
                               x(2, 2, 4, 5, 6), [1, 2, 3, 2, 1, 2]),
}  # fmt: skip


@pytest.mark.parametrize("name", PADS)
def test_padding(name: str) -> None:
    for cores in (1, 2):
        assert_values(*tile_values(*PADS[name], cores=cores))


SUMS: dict[str, tuple[Any, ...]] = {
    "avg_pool1d": (aten.avg_pool1d.default, real(3, 5, 130), [4], [3], [1], True, False),
    "avg_pool2d": (aten.avg_pool2d.default, real(2, 65, 9, 8), [3, 3], [2, 2], [1, 1]),
    "avg_pool2d edges": (aten.avg_pool2d.default, real(2, 5, 10, 9), [3, 2], [2, 2], [1, 1], True,
                         False),
    "avg_pool2d divisor": (aten.avg_pool2d.default, real(2, 5, 10, 9), [3], [], [0], False, True,
                           5),
    "avg_pool2d whole": (aten.avg_pool2d.default, real(2, 130, 7, 7), [7, 7]),
    "avg_pool2d last": (aten.avg_pool2d.default, last(2, 6, 9, 8), [2, 2]),
    "avg_pool3d": (aten.avg_pool3d.default, real(2, 3, 6, 7, 8), [2, 3, 2], [2, 1, 2], [1, 1, 0]),
    "avg_pool2d backward": (aten.avg_pool2d_backward.default, real(2, 65, 5, 4),
                            real(2, 65, 9, 8), [3, 3], [2, 2], [1, 1], False, True, None),
    "avg_pool3d backward": (aten.avg_pool3d_backward.default, real(2, 3, 3, 3, 4),
                            real(2, 3, 6, 6, 8), [2, 2, 2], [2, 2, 2], [0, 0, 0], False, True,
                            None),
    "adaptive": (aten._adaptive_avg_pool2d.default, real(2, 130, 7, 9), [3, 4]),
    "adaptive one": (aten._adaptive_avg_pool2d.default, real(4, 130, 7, 7), [1, 1]),
    "adaptive wider": (aten._adaptive_avg_pool2d.default, real(2, 3, 3, 4), [5, 9]),
    "adaptive 3d": (aten._adaptive_avg_pool3d.default, real(2, 3, 5, 7, 6), [2, 3, 3]),
    "adaptive backward": (aten._adaptive_avg_pool2d_backward.default, real(2, 130, 3, 4),
                          real(2, 130, 7, 9)),
    "nearest": (aten.upsample_nearest2d.default, real(2, 65, 7, 8), [14, 16]),
    "nearest fraction": (aten.upsample_nearest2d.default, real(2, 5, 7, 8), [10, 5]),
    "nearest1d": (aten.upsample_nearest1d.default, real(2, 5, 129), [300]),
    "nearest3d": (aten.upsample_nearest3d.default, real(2, 5, 3, 4, 5), [6, 8, 10]),
    "nearest exact": (aten._upsample_nearest_exact2d.default, real(2, 5, 7, 8), [10, 5]),
    "nearest large": (aten.upsample_nearest2d.default, real(1, 3, 150, 200), [300, 400]),
    "nearest backward": (aten.upsample_nearest2d_backward.default, real(2, 5, 14, 24), [14, 24],
                         [2, 5, 7, 8]),
    "bilinear": (aten.upsample_bilinear2d.default, real(2, 65, 7, 8), [14, 16], False),
    "bilinear aligned": (aten.upsample_bilinear2d.default, real(2, 5, 7, 8), [13, 9], True),
    "bilinear down": (aten.upsample_bilinear2d.default, real(2, 5, 17, 18), [6, 7], False),
    "bilinear scale": (aten.upsample_bilinear2d.default, real(2, 5, 7, 8), [15, 17], False, 2.2,
                       2.2),
    "bilinear backward": (aten.upsample_bilinear2d_backward.default, real(2, 5, 14, 16), [14, 16],
                          [2, 5, 7, 8], False),
    "bilinear last": (aten.upsample_bilinear2d.default, last(2, 5, 7, 8), [14, 16], False),
    "bilinear large": (aten.upsample_bilinear2d.default, real(2, 2, 120, 130), [240, 260], False),
    "linear": (aten.upsample_linear1d.default, real(2, 5, 129), [258], False),
    "trilinear": (aten.upsample_trilinear3d.default, real(2, 5, 3, 4, 5), [6, 8, 9], False),
    "trilinear backward": (aten.upsample_trilinear3d_backward.default, real(1, 2, 6, 8, 9),
                           [6, 8, 9], [1, 2, 3, 4, 5], False),
    "bicubic": (aten.upsample_bicubic2d.default, real(2, 5, 7, 8), [14, 11], False),
    "bicubic aligned": (aten.upsample_bicubic2d.default, real(2, 5, 7, 8), [14, 11], True),
    "bicubic backward": (aten.upsample_bicubic2d_backward.default, real(2, 5, 14, 11), [14, 11],
                         [2, 5, 7, 8], False),
    "bilinear aa": (aten._upsample_bilinear2d_aa.default, real(2, 5, 17, 18), [6, 7], False),
    "bicubic aa": (aten._upsample_bicubic2d_aa.default, real(2, 5, 17, 18), [6, 30], False),
    "bilinear aa backward": (aten._upsample_bilinear2d_aa_backward.default, real(2, 5, 6, 7),
                             [6, 7], [2, 5, 17, 18], False),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_weighted_sums(name: str) -> None:
    for cores in (1, 2):
        assert_values(*tile_values(*SUMS[name], cores=cores), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_sixteen_bits_round_once(dtype: torch.dtype, core: CoreSpec) -> None:
    for name in ("avg_pool2d", "adaptive", "bilinear", "nearest", "bilinear backward"):
        function, data, *rest = SUMS[name]
        wide = function(data.to(dtype).float(), *rest)
        (got,), _ = tile_values(function, data.to(dtype), *rest, core=core)
        assert got.dtype == dtype
        assert_values([got.float()], [wide], rtol=EPSILON[dtype], atol=2e-5)


@pytest.mark.parametrize("n", [1, 127, 128, 129, 512, 513])
def test_planes_beside_the_edges(n: int) -> None:
    for cores in (1, 2):
        given = {"rtol": 1e-5, "atol": 2e-5}
        assert_values(*tile_values(aten.avg_pool2d.default, real(n, 1, 4, 4), [2, 2], cores=cores),
                      **given)  # fmt: skip
        assert_values(*tile_values(aten.upsample_nearest1d.default, real(1, 2, n), [2 * n],
                                   cores=cores), **given)  # fmt: skip
        assert_values(*tile_values(aten._adaptive_avg_pool2d.default, real(1, 2, n, 3), [1, 1],
                                   cores=cores), **given)  # fmt: skip


MAXIMA: dict[str, tuple[Any, ...]] = {
    "resnet": (aten.max_pool2d_with_indices.default, real(2, 65, 16, 15), [3, 3], [2, 2], [1, 1]),
    "plain": (aten.max_pool2d_with_indices.default, real(2, 130, 8, 6), [2, 2]),
    "dilated": (aten.max_pool2d_with_indices.default, real(2, 3, 12, 13), [3, 2], [1, 2], [1, 0],
                [2, 3]),
    "ceiling": (aten.max_pool2d_with_indices.default, real(2, 3, 10, 9), [3, 3], [2, 2], [0, 0],
                [1, 1], True),
    "large": (aten.max_pool2d_with_indices.default, real(1, 2, 150, 140), [3, 3], [2, 2], [1, 1]),
    "last": (aten.max_pool2d_with_indices.default, last(2, 6, 9, 8), [2, 2]),
    "3d": (aten.max_pool3d_with_indices.default, real(2, 3, 6, 7, 8), [2, 3, 2], [2, 2, 2],
           [1, 1, 0]),
    "adaptive": (aten.adaptive_max_pool2d.default, real(2, 65, 7, 9), [3, 4]),
    "adaptive even": (aten.adaptive_max_pool2d.default, real(2, 5, 8, 9), [4, 3]),
    "adaptive 3d": (aten.adaptive_max_pool3d.default, real(2, 3, 5, 7, 6), [2, 3, 3]),
}  # fmt: skip


@pytest.mark.parametrize("name", MAXIMA)
def test_maxima_and_their_places(name: str) -> None:
    function, data, *rest = MAXIMA[name]
    for cores in (1, 2):
        assert_values(*tile_values(function, data, *rest, cores=cores))
    out, places = function(data, *rest)
    backward = {
        "3d": aten.max_pool3d_with_indices_backward.default,
        "adaptive 3d": aten.adaptive_max_pool3d_backward.default,
    }.get(name, aten.max_pool2d_with_indices_backward.default)
    extra: tuple[Any, ...] = ()
    if name.startswith("adaptive"):
        backward = backward if "3d" in name else aten.adaptive_max_pool2d_backward.default
    else:
        given = [*rest, *([[], 0, 1, False][len(rest) - 1 :])]
        extra = (given[0], given[1], given[2], given[3], given[4])
    for cores in (1, 2):
        grad = real(*out.shape)
        assert_values(*tile_values(backward, grad, data, *extra, places, cores=cores), rtol=1e-6,
                      atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, I64], ids=str)
def test_maxima_of_every_dtype(dtype: torch.dtype, core: CoreSpec) -> None:
    data = (real(2, 5, 9, 8) * 100).to(dtype)
    given = (data, [3, 3], [2, 2], [1, 1])
    assert_values(*tile_values(aten.max_pool2d_with_indices.default, *given, core=core))


COLUMNS: dict[str, tuple[Any, ...]] = {
    "im2col": (aten.im2col.default, x(2, 5, 9, 8), [3, 2], [1, 1], [1, 0], [2, 1]),
    "im2col one": (aten.im2col.default, x(5, 9, 8), [2, 2], [2, 3], [0, 1], [1, 2]),
    "im2col large": (aten.im2col.default, x(1, 2, 70, 90), [3, 3], [1, 1], [1, 1], [1, 1]),
    "im2col odd": (aten.im2col.default, odd(2, 5, 9, 8), [3, 3], [1, 1], [1, 1], [1, 1]),
    "col2im": (aten.col2im.default, x(2, 5 * 6, 5 * 7), [9, 8], [3, 2], [1, 1], [1, 0], [2, 1]),
    "col2im one": (aten.col2im.default, x(2 * 9, 20), [6, 7], [3, 3], [1, 1], [0, 0], [1, 1]),
    "col2im large": (aten.col2im.default, x(1, 2 * 9, 70 * 90) % 7, [70, 90], [3, 3], [1, 1],
                     [1, 1], [1, 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_windows(name: str) -> None:
    for cores in (1, 2):
        assert_values(*tile_values(*COLUMNS[name], cores=cores))


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_gates(dim: int) -> None:
    # A sigmoid and up to four products: six roundings of fp32.
    data = real(6, 34, 130)
    bound = {"rtol": 6 * EPSILON[F32], "atol": 1e-7}
    for cores in (1, 2):
        assert_values(*tile_values(aten.glu.default, data, dim, cores=cores), **bound)
        out = aten.glu(data, dim)
        grad = real(*out.shape)
        assert_values(*tile_values(aten.glu_backward.default, grad, data, dim, cores=cores),
                      **bound)  # fmt: skip
        assert_values(
            *tile_values(aten.glu_jvp.default, out, data, real(6, 34, 130) * 2, dim, cores=cores),
            rtol=1e-5, atol=1e-6)  # fmt: skip
