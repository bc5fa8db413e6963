"""Constants, ramps, triangles and random numbers as Programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_tile_copy import odd, x
from tile_case import EPSILON, TRN1, TRN2, assert_values, tile_values
from torch import Tensor

from torch_trn.chip import CoreSpec

aten = torch.ops.aten
F32, BF16, F16, I64, I32, BOOL = (
    torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool,
)  # fmt: skip
EDGES = (0, 1, 127, 128, 129, 512, 513)


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, I64, I32, BOOL, torch.complex64], ids=str)
def test_constants(dtype: torch.dtype, core: CoreSpec) -> None:
    for cores in (1, 2):
        given = {"core": core, "cores": cores}
        for value in (0, 1, 1 if dtype == BOOL else 3):
            assert_values(*tile_values(aten.full.default, [3, 129], value, dtype=dtype, **given))
        assert_values(*tile_values(aten.fill_.Scalar, odd(5, 9, 3).to(dtype), 1, **given))
        assert_values(*tile_values(aten.fill_.Tensor, x(5, 700).to(dtype), torch.tensor(1.0),
                                   **given))  # fmt: skip
        assert_values(*tile_values(aten.zeros.default, [200, 200], dtype=dtype, **given))
        assert_values(*tile_values(aten.ones_like.default, x(7, 3).to(dtype), **given))
        assert_values(*tile_values(aten.eye.m, 130, 7, dtype=dtype, **given))


OTHER: dict[str, tuple[Any, ...]] = {
    "full fraction": (aten.full.default, [33, 7], 2.7),
    "full infinite": (aten.full.default, [33, 7], -torch.inf),
    "full_like": (aten.full_like.default, x(3, 5), 2.5),
    "new_full": (aten.new_full.default, x(3, 5), [4], 2.5),
    "new_zeros": (aten.new_zeros.default, x(3, 5), [129]),
    "new_ones": (aten.new_ones.default, x(3, 5), [129]),
    "zeros_like": (aten.zeros_like.default, odd(3, 5)), "zero_": (aten.zero_.default, odd(3, 129)),
    "ones": (aten.ones.default, [2, 3]), "fill": (aten.fill.Scalar, x(4), 2.0),
    "scalar_tensor": (aten.scalar_tensor.default, 3.5),
    "eye": (aten.eye.default, 129), "eye wide": (aten.eye.m, 3, 130),
    "arange": (aten.arange.default, 1000), "arange start": (aten.arange.start, -5, 300),
    "arange step": (aten.arange.start_step, 700, -5, -7),
    "tril_indices": (aten.tril_indices.default, 130, 90, 2),
    "triu_indices": (aten.triu_indices.default, 9, 700, -3),
    "tril": (aten.tril.default, x(129, 130)), "triu": (aten.triu.default, x(129, 130), 3),
    "tril batch": (aten.tril.default, x(2, 3, 12, 9), -2),
    "triu batch": (aten.triu.default, odd(140, 12, 9), -1),
    "tril_ odd": (aten.tril_.default, odd(150, 130)),
    "tril wide": (aten.tril.default, x(5, 9000), 4000),
    "tril bool": (aten.tril.default, x(40, 40, dtype=BOOL)),
    "triu batch of large": (aten.triu.default, x(2, 129, 65), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_exact_values(name: str) -> None:
    for cores in (1, 2):
        assert_values(*tile_values(*OTHER[name], cores=cores))


@pytest.mark.parametrize("n", EDGES)
def test_ramps_beside_the_edges(n: int) -> None:
    for cores in (1, 2):
        for dtype in (I64, I32, F32):
            assert_values(*tile_values(aten.arange.default, n, dtype=dtype, cores=cores))
        assert_values(*tile_values(aten.tril.default, x(n, n), cores=cores))
        assert_values(*tile_values(aten.zeros.default, [n, n], cores=cores))


LINES: dict[str, tuple[Any, ...]] = {
    "arange": (aten.arange.start_step, 0.5, 90.0, 0.25),
    "range": (aten.range.step, 1.0, 300.0, 1.5),
    "linspace": (aten.linspace.default, -3.0, 10.0, 513),
    "linspace one": (aten.linspace.default, -3.0, 10.0, 1),
    "logspace": (aten.logspace.default, -2.0, 2.0, 129),
    "hann": (aten.hann_window.default, 400), "hann symmetric": (aten.hann_window.periodic, 129,
                                                               False),
    "hamming": (aten.hamming_window.periodic_alpha_beta, 200, True, 0.6, 0.4),
    "blackman": (aten.blackman_window.default, 129),
    "bartlett": (aten.bartlett_window.default, 128), "kaiser": (aten.kaiser_window.default, 100),
    "fftfreq": (aten.fft_fftfreq.default, 129, 0.5), "rfftfreq": (aten.fft_rfftfreq.default, 130),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", LINES)
def test_lines(name: str, dtype: torch.dtype) -> None:
    # fp32 through: the place times a step and an offset, two roundings of the largest term; the
    # windows' cosines and the exponential of logspace have that of their argument, at most 6 pi.
    got, expected = tile_values(*LINES[name], dtype=F32)
    largest = float(expected[0].abs().max())
    bound = 40 * EPSILON[F32] if "space" in name or name[:3] in ("han", "ham", "bla", "kai") else 2
    bound = bound if bound < 1 else 2 * EPSILON[F32]
    assert_values(got, expected, rtol=bound, atol=bound * largest)
    # Rounded once: CPU ATen computes 16-bit ones with more roundings.
    (once,), _ = tile_values(*LINES[name], dtype=dtype, cores=2)
    assert once.dtype == dtype
    assert_values([once.float()], expected, rtol=bound + EPSILON[dtype], atol=bound * largest)


def test_linspace_reaches_both_ends() -> None:
    (got,), _ = tile_values(aten.linspace.default, 0.1, 0.7, 33)
    assert got[0] == torch.tensor(0.1) and got[-1] == torch.tensor(0.7)
    assert_values(*tile_values(aten.linspace.default, 0, 10, 31, dtype=I64))


def drawn(function: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    """What the Program draws, on one and on two cores; every element is written."""
    torch.manual_seed(3)
    found = []
    for cores in (1, 2):
        (got,), (expected,) = tile_values(function, *args, cores=cores, **kwargs)
        assert got.shape == expected.shape and got.dtype == expected.dtype
        assert not got.is_floating_point() or not bool(got.isnan().any())
        found.append(got.double())
    return found


@pytest.mark.parametrize("shape", [(1,), (129, 7), (513,), (70, 1000)])
def test_uniform(shape: tuple[int, ...]) -> None:
    for got in drawn(aten.uniform_.default, torch.zeros(shape), -2.0, 5.0):
        assert float(got.min()) >= -2.0 and float(got.max()) < 5.0 + 1e-6
        if got.numel() > 9000:
            assert abs(float(got.mean()) - 1.5) < 0.1
    for got in drawn(aten.uniform_.default, odd(5, 9, 3)):
        assert float(got.min()) >= 0.0 and float(got.max()) < 1.0


def test_moments() -> None:
    wide = torch.zeros(130, 300)
    for got in drawn(aten.normal_.default, wide, 1.0, 2.0):
        assert abs(float(got.mean()) - 1.0) < 0.1 and abs(float(got.std()) - 2.0) < 0.1
    for got in drawn(
        aten.normal.Tensor_Tensor, torch.full((130, 300), 5.0), torch.full((300,), 3.0)
    ):
        assert abs(float(got.mean()) - 5.0) < 0.1 and abs(float(got.std()) - 3.0) < 0.1
    for got in drawn(aten.normal.Tensor_float, torch.full((130, 300), 5.0), 1.0):
        assert abs(float(got.mean()) - 5.0) < 0.1 and abs(float(got.std()) - 1.0) < 0.1
    for got in drawn(aten.normal.float_Tensor, 2.0, torch.full((130, 300), 3.0)):
        assert abs(float(got.mean()) - 2.0) < 0.1 and abs(float(got.std()) - 3.0) < 0.1
    for got in drawn(aten.exponential_.default, wide, 2.0):
        assert float(got.min()) >= 0 and abs(float(got.mean()) - 0.5) < 0.05
    for got in drawn(aten.geometric_.default, wide, 0.25):
        assert float(got.min()) == 1 and abs(float(got.mean()) - 4.0) < 0.2
    for got in drawn(aten.log_normal_.default, wide, 0.0, 0.25):
        assert abs(float(got.mean()) - 1.0317) < 0.05
    for got in drawn(aten.cauchy_.default, wide, 1.0, 2.0):
        assert abs(float(got.median()) - 1.0) < 0.2
    for got in drawn(aten.randn.default, [300, 129]):
        assert abs(float(got.mean())) < 0.1 and abs(float(got.std()) - 1.0) < 0.1


@pytest.mark.parametrize(("low", "high"), [(0, 2), (-5, 7), (0, 1 << 20), (3, (1 << 30) + 3)])
def test_integers(low: int, high: int) -> None:
    for dtype in (I64, I32):
        for got in drawn(aten.randint.low, low, high, [129, 40], dtype=dtype):
            assert float(got.min()) >= low and float(got.max()) < high
    for got in drawn(aten.random_.default, torch.zeros(33, 7, dtype=I64)):
        assert float(got.min()) >= 0
    for got in drawn(aten.randint_like.default, torch.zeros(33, 7), 4):
        assert sorted(got.unique().tolist()) == [0, 1, 2, 3]


def test_events() -> None:
    p = torch.full((130, 300), 0.3)
    for function, *args in (
        (aten.bernoulli.default, p), (aten.bernoulli.p, p, 0.3), (aten.bernoulli.Tensor, p, p),
        (aten.bernoulli_.Tensor, torch.zeros(130, 300), p),
        (aten.bernoulli_.float, torch.zeros(130, 300, dtype=BOOL), 0.3),
    ):  # fmt: skip
        for got in drawn(function, *args):
            assert got.unique().tolist() == [0.0, 1.0] and abs(float(got.mean()) - 0.3) < 0.02
