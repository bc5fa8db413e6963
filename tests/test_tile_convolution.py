"""Convolutions tile by tile: the Program's values beside those of CPU ATen in double.

Bound: products are summed in fp32 (an error of a few roundings of the sum of their magnitudes) and
the result is rounded once to its dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tile_case import EPSILON, TRN1, TRN2, tile_values
from torch import Tensor

from torch_trn.chip import CoreSpec

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CORES = {"trn1": TRN1, "trn2": TRN2}
aten = torch.ops.aten

#: Roundings of fp32 that a sum of products may be off by, of the sum of their magnitudes.
SUM_ROUNDINGS = 4


@dataclass(frozen=True)
class Shape:
    """A convolution; the kernel is [outs, ins / groups, ...], or [ins, outs / groups, ...]."""

    images: int
    ins: int
    outs: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    transposed: bool = False
    output_padding: int = 0

    @property
    def arguments(self) -> tuple[object, ...]:
        """What follows the bias (or its sizes)."""
        each = [[value] * len(self.size) for value in
                (self.stride, self.padding, self.dilation, self.output_padding)]  # fmt: skip
        return (*each[:3], self.transposed, each[3], self.groups)

    def tensors(self, dtype: torch.dtype, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Input, kernel and bias."""
        first, second = (self.ins, self.outs) if self.transposed else (self.outs, self.ins)
        x = torch.randn(self.images, self.ins, *self.size).to(dtype)
        w = torch.randn(first, second // self.groups, *self.kernel).to(dtype)
        if last:
            x, w = (tensor.to(memory_format=torch.channels_last) for tensor in (x, w))
        return x, w, torch.randn(self.outs).to(dtype)


SHAPES = {
    "3x3": Shape(2, 5, 7, (6, 9), (3, 3), padding=1),
    "64 channels": Shape(1, 64, 64, (14, 14), (3, 3), padding=1),
    "more than 128 channels, stride 2": Shape(3, 130, 140, (5, 6), (3, 3), stride=2, padding=1),
    "7x7 of 3 channels": Shape(2, 3, 16, (20, 21), (7, 7), stride=2, padding=3),
    "groups and dilation": Shape(2, 8, 12, (9, 9), (3, 3), padding=2, dilation=2, groups=4),
    "depthwise": Shape(2, 6, 6, (10, 11), (3, 3), padding=1, groups=6),
    "depthwise, two outputs each": Shape(2, 6, 12, (10, 11), (3, 3), 2, 1, groups=6),
    "1x1": Shape(3, 5, 7, (6, 9), (1, 1)),
    "beyond every edge": Shape(2, 8, 12, (5, 4), (5, 5), padding=4),
    "rows of more than a bank": Shape(1, 4, 4, (3, 700), (3, 3), padding=1),
    "one dim": Shape(2, 5, 7, (30,), (4,), stride=2, padding=1),
    "one dim, one channel": Shape(2, 1, 6, (600,), (9,), padding=4),
    "three dims": Shape(2, 5, 7, (4, 5, 6), (2, 3, 3), padding=1),
    "transposed": Shape(2, 5, 7, (6, 9), (3, 3), 2, 1, transposed=True, output_padding=1),
    "transposed 2x2": Shape(2, 70, 40, (5, 5), (2, 2), stride=2, transposed=True),
    "transposed, kernel below stride": Shape(1, 4, 6, (5, 4), (2, 2), stride=3, transposed=True),
    "transposed depthwise": Shape(2, 6, 6, (6, 6), (3, 3), 2, 1, groups=6, transposed=True),
    "transposed, dilated": Shape(1, 6, 4, (5, 6), (3, 3), 2, 2, 2, groups=2, transposed=True),
}  # fmt: skip


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def close(got: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    assert got.shape == exact.shape
    allowed = exact.abs() * EPSILON[got.dtype] + magnitude * SUM_ROUNDINGS * EPSILON[F32]
    difference = (got.double() - exact).abs()
    assert bool((difference <= allowed).all()), float((difference - allowed).nan_to_num(9e9).max())


def forward_is_right(
    shape: Shape, core: CoreSpec, cores: int, dtype: torch.dtype, last: bool, biased: bool = True
) -> None:
    x, w, bias = shape.tensors(dtype, last)
    given = bias if biased else None
    (got,), _ = tile_values(
        aten.convolution.default, x, w, given, *shape.arguments, core=core, cores=cores
    )
    exact, size = (
        aten.convolution(f(x), f(w), f(bias) if biased else None, *shape.arguments)
        for f in (torch.Tensor.double, lambda t: t.double().abs())
    )
    close(got, exact, size)


def gradients_are_right(
    shape: Shape, core: CoreSpec, cores: int, dtype: torch.dtype, last: bool,
    mask: tuple[bool, bool, bool] = (True, True, True),
) -> None:  # fmt: skip
    x, w, bias = shape.tensors(dtype, last)
    grad = torch.randn_like(aten.convolution(x, w, bias, *shape.arguments))
    got, _ = tile_values(
        aten.convolution_backward.default, grad, x, w, [shape.outs], *shape.arguments, list(mask),
        core=core, cores=cores,
    )  # fmt: skip
    exact, size = (
        aten.convolution_backward(f(grad), f(x), f(w), [shape.outs], *shape.arguments, list(mask))
        for f in (torch.Tensor.double, lambda t: t.double().abs())
    )
    wanted = [
        pair for pair, asked in zip(zip(exact, size, strict=True), mask, strict=True) if asked
    ]
    assert len(got) == len(wanted)
    for ours, (theirs, magnitude) in zip(got, wanted, strict=True):
        close(ours, theirs, magnitude)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
@pytest.mark.parametrize("name", SHAPES)
def test_forward(name: str, core: CoreSpec, cores: int) -> None:
    shape = SHAPES[name]
    for dtype, last in ((F32, False), (BF16, False), (F32, True), (BF16, True)):
        if not last or len(shape.size) == 2:
            forward_is_right(shape, core, cores, dtype, last)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
@pytest.mark.parametrize("name", SHAPES)
def test_gradients(name: str, core: CoreSpec, cores: int) -> None:
    shape = SHAPES[name]
    for dtype, last in ((F32, False), (BF16, True)):
        gradients_are_right(shape, core, cores, dtype, last and len(shape.size) == 2)


def test_more_taps_than_fit_at_once() -> None:
    # 343 taps of 130 channels in fp32 are 178 KB of a partition.
    shape = Shape(1, 130, 10, (2, 2, 2), (7, 7, 7), padding=3)
    forward_is_right(shape, TRN1, 1, F32, False)
    gradients_are_right(shape, TRN1, 1, F32, False)


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, True, True)])
def test_gradients_that_are_asked_for(mask: tuple[bool, bool, bool]) -> None:
    gradients_are_right(SHAPES["3x3"], TRN2, 1, BF16, False, mask)


def test_half_precision_and_no_bias() -> None:
    for name in ("3x3", "depthwise", "transposed"):
        forward_is_right(SHAPES[name], TRN2, 1, F16, False, biased=False)


@pytest.mark.parametrize("size", [1, 127, 128, 129, 512, 513])
def test_sizes_at_tile_edges(size: int) -> None:
    for shape in (
        Shape(1, size, 3, (3, 4), (2, 2)), Shape(1, 3, size, (3, 4), (2, 2)),
        Shape(1, 3, 4, (2, size), (1, 1)), Shape(size, 2, 3, (2, 2), (2, 2), padding=1),
    ):  # fmt: skip
        forward_is_right(shape, TRN2, 2, BF16, False)
        gradients_are_right(shape, TRN2, 2, BF16, False)


def test_strided_images_and_kernels() -> None:
    x = torch.randn(4, 6, 8, 9)[::2, 1:, ::2]
    w = torch.randn(7, 3, 3, 5).permute(0, 3, 1, 2)
    (got,), _ = tile_values(aten.convolution.default, x, w, None, [1, 1], [1, 1], [1, 1], False,
                            [0, 0], 1)  # fmt: skip
    exact = aten.convolution(x.double(), w.double(), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    size = aten.convolution(x.double().abs(), w.double().abs(), None, [1, 1], [1, 1], [1, 1],
                            False, [0, 0], 1)  # fmt: skip
    close(got, exact, size)


def test_operators_with_arguments_of_their_own() -> None:
    x, w, bias = SHAPES["3x3"].tensors(F32, False)
    wide = [tensor.double() for tensor in (x, w, bias)]
    exact = torch.nn.functional.conv2d(*wide, 2, 1)
    size = torch.nn.functional.conv2d(*(tensor.abs() for tensor in wide), 2, 1)
    for function, args in (
        (aten.mkldnn_convolution.default, (bias, [1, 1], [2, 2], [1, 1], 1)),
        (aten._slow_conv2d_forward.default, ([3, 3], bias, [2, 2], [1, 1])),
        (aten.slow_conv_dilated2d.default, ([3, 3], bias, [2, 2], [1, 1], [1, 1])),
    ):
        (got,), _ = tile_values(function, x, w, *args)
        close(got, exact, size)
    for name, plain, function, args in (
        ("transposed", torch.nn.functional.conv_transpose2d, aten.slow_conv_transpose2d.default,
         ([2, 2], [1, 1], [1, 1], [1, 1])),
        ("three dims", torch.nn.functional.conv3d, aten.slow_conv3d_forward.default,
         ([1, 1, 1], [1, 1, 1])),
    ):  # fmt: skip
        shape = SHAPES[name]
        x, w, bias = shape.tensors(F32, False)
        wide = [tensor.double() for tensor in (x, w, bias)]
        given = (shape.stride, 1, 1) if shape.transposed else (shape.stride, 1)
        exact, size = plain(*wide, *given), plain(*(tensor.abs() for tensor in wide), *given)
        (got,), _ = tile_values(function, x, w, list(shape.kernel), bias, *args)
        close(got, exact, size)


def test_results_without_elements() -> None:
    shape = Shape(0, 5, 7, (6, 9), (3, 3))
    forward_is_right(shape, TRN2, 1, F32, False)
    gradients_are_right(shape, TRN2, 1, F32, False)
