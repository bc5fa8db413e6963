"""Values of elementwise Programs against CPU ATen: layouts, dtypes, cores, then each formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tile_case import EPSILON, TRN1, TRN2, assert_values, tile_values
from torch import Tensor

from torch_trn.chip import CoreSpec
from torch_trn.errors import UnsupportedOpError
from torch_trn.executor import execute
from torch_trn.lowering import OpCall, TensorSpec, activation, lower, unary

ATEN = torch.ops.aten
F32, BF16, F16, I64 = torch.float32, torch.bfloat16, torch.float16, torch.int64
NAN, INF = math.nan, math.inf

#: A few roundings of fp32, and what a rounded intermediate result may be off near 0.
RTOL, ATOL = 6 * 2.0**-23, 4 * 2.0**-23

CORES = pytest.mark.parametrize(
    ("core", "cores"), [(TRN1, 1), (TRN2, 1), (TRN2, 2)], ids=["trn1", "trn2", "lnc2"]
)


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(low: int, high: int, count: int, dtype: torch.dtype = I64, seed: int = 0) -> Tensor:
    given = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (count,), generator=given).to(dtype)


def check(function: Any, *args: Any, rtol: float = RTOL, atol: float = ATOL, **given: Any) -> None:
    assert_values(*tile_values(function, *args, **given), rtol=rtol, atol=atol)


def overload(name: str) -> Any:
    packet = getattr(ATEN, name)
    return packet.Tensor if "Tensor" in packet.overloads() else packet.default


# -- layouts ---------------------------------------------------------------------------------------
LAYOUTS: dict[str, tuple[Tensor, Tensor]] = {
    **{f"flat {n}": (randn(n), randn(n, seed=1)) for n in (1, 127, 128, 129, 512, 513, 5000)},
    "scalar": (randn(), randn(seed=1)),
    "empty": (randn(4, 0), randn(4, 0)),
    "rows": (randn(300, 7), randn(300, 7, seed=1)),
    "long rows": (randn(2, 70000), randn(2, 70000, seed=1)),
    "a row": (randn(129, 513), randn(513)),
    "a column": (randn(129, 513), randn(129, 1)),
    "a column of short rows": (randn(300, 7), randn(300, 1)),
    "a row of long rows": (randn(3, 2101), randn(2101)),
    "a column of cut rows": (randn(3, 2101), randn(3, 1)),
    "one element": (randn(129, 513), randn(1)),
    "column and row": (randn(129, 1), randn(1, 513)),
    "turned": (randn(129, 513), randn(513, 129).t()),
    "turned, short rows": (randn(2000, 30), randn(30, 2000).t()),
    "turned, few rows": (randn(8, 4000), randn(4000, 8).t()),
    "result turned": (randn(513, 129).t(), randn(129, 513)),
    "every other column": (randn(129, 513)[:, ::2], randn(129, 257)),
    "every third": (randn(129, 513)[::3, ::3], randn(43, 171)),
    "far apart": (randn(50, 90)[:, ::9], randn(50, 10)),
    "offset": (randn(130, 70)[1:, 3:], randn(129, 67)),
    "expanded": (randn(1, 70).expand(129, 70), randn(129, 70)),
    "permuted": (randn(5, 6, 7).permute(2, 0, 1), randn(7, 5, 6)),
    "middle": (randn(6, 5, 40), randn(5, 1)),
}


@CORES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, core: CoreSpec, cores: int) -> None:
    a, b = LAYOUTS[layout]
    check(ATEN.add.Tensor, a, b, rtol=0.0, atol=0.0, core=core, cores=cores)
    flags = (a > 0).contiguous()
    check(ATEN.where.self, flags, a, b, rtol=0.0, atol=0.0, core=core, cores=cores)


@CORES
@pytest.mark.parametrize("dtype", [BF16, F16, torch.int64, torch.int32, torch.int8, torch.bool])
def test_dtypes(dtype: torch.dtype, core: CoreSpec, cores: int) -> None:
    for a, b in (((129, 130), (130,)), ((130, 129), (130, 129)), ((1000,), (1000,))):
        x, y = (randn(*a) * 5).to(dtype), (randn(*b, seed=1) * 5).to(dtype)
        exact = {"rtol": 0.0, "atol": 0.0, "core": core, "cores": cores}
        check(ATEN.add.Tensor, x, y, **exact)
        check(ATEN.mul.Tensor, x, y, **exact)
        check(ATEN.add_.Tensor, x, y, **exact)
        check(ATEN.maximum.default, x, y, **exact)
        if x.dim() == 2 and x.shape == y.shape:
            check(ATEN.add.Tensor, x.t().contiguous().t(), y, **exact)


def test_mixed_dtypes() -> None:
    x, i = randn(129, 70), whole(-9, 9, 70)
    check(ATEN.add.Tensor, x, i, rtol=0.0, atol=0.0)
    check(ATEN.mul.Tensor, x.to(BF16), i, rtol=EPSILON[BF16])
    check(ATEN.add.Tensor, i, i > 0, rtol=0.0, atol=0.0)
    check(ATEN.add.Tensor, i.to(torch.int8), i.to(torch.int32), rtol=0.0, atol=0.0)
    check(ATEN.mul.Scalar, i, 2.5)
    check(ATEN.mul.Scalar, i > 0, 3, rtol=0.0, atol=0.0)
    check(ATEN.gt.Scalar, i, 2.5, rtol=0.0, atol=0.0)


# -- functions of one tensor -----------------------------------------------------------------------
SPECIALS = torch.tensor(
    [0.0, -0.0, 1, -1, 0.5, -0.5, 1.5, 2.5, -1.5, -2.5, INF, -INF, NAN, 1e-20, -1e-20, 3e9, -3e9,
     4194304.5, 4194305.5, -4194304.5, 8388609.0, 16777217.0, 1e-3, 100, -100, 20.5, 3, -3, 30,
     -30, 0.9999, 1e10, 1e30, -1e30]
)  # fmt: skip
LINE = torch.cat([SPECIALS, randn(300) * 3, torch.rand(130)])

#: Arguments behind the tensor, and bounds that are not the usual ones.
_EXTRA: dict[str, dict[str, Any]] = {
    "exp2": {"rtol": 1e-5},
    "tan": {"rtol": 1e-4},
    "special_entr": {"rtol": 1e-5},
}
_APART = {"polygamma", "mvlgamma", "bitwise_not"}


@pytest.mark.parametrize("name", sorted(set(unary.FORMULAS) - _APART))
def test_one_tensor(name: str) -> None:
    check(getattr(ATEN, name).default, LINE, **_EXTRA.get(name, {}))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    "name",
    "floor ceil trunc round frac abs neg sign signbit isnan isinf exp tanh sqrt erf sin".split(),
)
def test_one_narrow_tensor(name: str, dtype: torch.dtype) -> None:
    # exp leaves what fp16 holds at 11; one rounding, and the bound of fp32.
    x = torch.cat([SPECIALS.clamp(-1e4, 1e4), randn(100) * 3]).to(dtype)
    (got,), _ = tile_values(getattr(ATEN, name).default, x)
    expected = getattr(ATEN, name).default(x.float())
    assert_values([got], [expected.to(got.dtype)], rtol=2 * EPSILON[dtype], atol=1e-6)


@pytest.mark.parametrize(
    "name",
    "abs neg sign signbit isnan isinf square bitwise_not floor ceil trunc round relu".split(),
)
def test_integers_stay_whole(name: str) -> None:
    for x in (whole(-(2**40), 2**40, 300), whole(-100, 100, 300, torch.int8)):
        check(getattr(ATEN, name).default, x, rtol=0.0, atol=0.0)


def test_arguments_of_functions() -> None:
    x = LINE
    check(ATEN.round.decimals, randn(300) * 10, decimals=2, rtol=1e-6)
    check(ATEN.round.decimals, randn(300) * 100, decimals=-1)
    check(ATEN.logit.default, x, 0.1)
    check(ATEN.nan_to_num.default, x, 1.0, 2.0, 3.0)
    check(ATEN.nan_to_num.default, x.to(F16), None, None, 3.0)
    check(ATEN.mvlgamma.default, torch.rand(100) + 3, 2, rtol=1e-5)
    for order in (0, 1, 2, 3):
        check(ATEN.polygamma.default, order, torch.rand(100) + 0.1, rtol=1e-5)


# -- functions of two tensors ----------------------------------------------------------------------
_PAIR = torch.tensor([0.0, -0.0, 1, -1, 0.5, -2.5, 3, INF, -INF, NAN, 1e-20, 3e9, 7, -7, 100, 41])
LEFT = torch.cat([_PAIR.repeat_interleave(16), randn(300) * 5])
RIGHT = torch.cat([_PAIR.repeat(16), randn(300, seed=1) * 5])


def tame(x: Tensor) -> Tensor:
    """Without infinities, nan and what a reciprocal or a floor of 2^22 cannot hold."""
    size = x.abs()
    return torch.where(x.isfinite() & (size < 1e4) & (size > 1e-3), x, 2.0)


@pytest.mark.parametrize(
    "name",
    ("add sub mul div remainder fmod eq ne gt ge lt le logical_and logical_or logical_xor maximum "
     "minimum fmax fmin atan2 hypot logaddexp logaddexp2 copysign xlogy special_xlog1py heaviside "
     "nextafter").split(),
)  # fmt: skip
def test_two_tensors(name: str) -> None:
    # log(1 + x) has no bits left of x = 1e-20, which counts beside an infinite factor.
    right = RIGHT.where(RIGHT != 1e-20, 1.0) if name == "special_xlog1py" else RIGHT
    check(overload(name), LEFT, right)


@pytest.mark.parametrize("mode", ["floor", "trunc"])
def test_rounded_quotients(mode: str) -> None:
    x, y = tame(LEFT), tame(RIGHT)
    exact = {"rounding_mode": mode, "rtol": 0.0, "atol": 0.0}
    check(ATEN.div.Tensor_mode, x, y, **exact)
    check(ATEN.div.Tensor_mode, x, y * 0, **exact)
    check(ATEN.div.Tensor_mode, (x * 100).floor(), y.abs().ceil(), **exact)
    check(ATEN.div.Scalar_mode, LEFT, 3.0, **exact)
    big, small = whole(-(2**40), 2**40, 500), whole(1, 1000, 500, seed=1)
    small = torch.where(whole(0, 2, 500, seed=2) > 0, small, -small)
    check(ATEN.div.Tensor_mode, big, small, **exact)
    check(ATEN.div.Scalar_mode, big, -7, **exact)


def test_power() -> None:
    check(ATEN.pow.Tensor_Tensor, LEFT, RIGHT, rtol=1e-5)
    for exponent in (2, 3, 1, 0.5, -0.5, -1, -2, 2.5, 0, 4):
        check(ATEN.pow.Tensor_Scalar, LEFT, exponent)
    for base in (2.0, 0.0, 1.0, -1.5):
        check(ATEN.pow.Scalar, base, RIGHT)
    few = whole(-50, 50, 200)
    check(ATEN.pow.Tensor_Tensor, few, few.abs() % 6, rtol=0.0, atol=0.0)
    check(ATEN.pow.Tensor_Scalar, few, 3, rtol=0.0, atol=0.0)
    check(ATEN.pow.Scalar, 3, few.abs() % 30, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    "name",
    ("add sub mul remainder fmod floor_divide eq gt gcd lcm maximum minimum bitwise_and "
     "bitwise_or bitwise_xor").split(),
)  # fmt: skip
def test_two_integers(name: str) -> None:
    pairs = [
        (whole(-(2**40), 2**40, 500), whole(1, 1000, 500) * (1 - 2 * whole(0, 2, 500, seed=3)))
    ]
    few, divisors = whole(-50, 50, 500), whole(1, 6, 500, seed=1)
    pairs += [(few.to(d), divisors.to(d)) for d in (torch.int64, torch.int32, torch.int8)]
    pairs += [(few.abs().to(torch.uint8), divisors.to(torch.uint8))]
    for x, y in pairs:
        check(overload(name), x, y, rtol=0.0, atol=0.0)


def test_numbers_beside_tensors() -> None:
    i = whole(-(2**40), 2**40, 300)
    for number in (3, -3):
        for function in (ATEN.remainder.Scalar, ATEN.fmod.Scalar, ATEN.add.Scalar, ATEN.mul.Scalar):
            check(function, i, number, rtol=0.0, atol=0.0)
            check(function, LEFT, number)
        check(ATEN.remainder.Scalar_Tensor, number, whole(1, 9, 300), rtol=0.0, atol=0.0)
    check(ATEN.add.Tensor, tame(LEFT), tame(RIGHT), alpha=2.5, atol=1e-6)
    check(ATEN.sub.Tensor, tame(LEFT), tame(RIGHT), alpha=2.5, atol=4e-6)
    check(ATEN.rsub.Scalar, LEFT, 3, 2)
    check(ATEN.rsub.Tensor, tame(LEFT), tame(RIGHT), alpha=3, atol=4e-6)
    check(ATEN.add.Tensor, i, i % 9, alpha=3, rtol=0.0, atol=0.0)
    check(ATEN.eq.Scalar, i, int(i[3]), rtol=0.0, atol=0.0)
    check(ATEN.bitwise_and.Scalar, i, 6, rtol=0.0, atol=0.0)
    check(ATEN.bitwise_left_shift.Tensor, i % 50, i.abs() % 6, rtol=0.0, atol=0.0)
    check(ATEN.bitwise_right_shift.Tensor, i, i.abs() % 6, rtol=0.0, atol=0.0)
    check(ATEN.bitwise_xor.Tensor, i > 0, i % 2 > 0, rtol=0.0, atol=0.0)


def test_selections_and_bounds() -> None:
    exact = {"rtol": 0.0, "atol": 0.0}
    mask, i = RIGHT > 0, whole(-9, 9, 556)
    check(ATEN.where.ScalarOther, mask, LEFT, -INF, **exact)
    check(ATEN.where.Scalar, mask, 1.0, 2.0, **exact)
    check(ATEN.where.self, mask, i, torch.tensor(2**50 + 1), **exact)
    check(ATEN.masked_fill.Scalar, LEFT.to(F16), mask, -INF, **exact)
    check(ATEN.masked_fill.Scalar, i, mask, 2**50 + 1, **exact)
    check(ATEN.masked_fill.Tensor, LEFT.to(BF16), mask, torch.tensor(2.0), **exact)
    check(ATEN.clamp.default, LEFT, -1, 2, **exact)
    check(ATEN.clamp.default, LEFT, None, 2.0, **exact)
    check(ATEN.clamp.default, i, -5, 5, **exact)
    check(ATEN.clamp.Tensor, LEFT, RIGHT, LEFT * 2, **exact)
    check(ATEN.clamp_min.default, LEFT, 0, **exact)
    check(ATEN.clamp_max.Tensor, LEFT, RIGHT, **exact)


def test_three_tensors() -> None:
    x, y = tame(LEFT), tame(RIGHT)
    check(ATEN.lerp.Scalar, x, y, 0.3, atol=1e-5)
    check(ATEN.lerp.Tensor, x, y, torch.rand(556), atol=1e-5)
    check(ATEN.addcmul.default, x, y, x, value=0.5, atol=1e-5)
    check(ATEN.addcdiv.default, x, y, x, value=0.5, atol=1e-5)
    i = whole(-9, 9, 556)
    check(ATEN.addcmul.default, i, i, i, value=2, rtol=0.0, atol=0.0)
    check(ATEN.ldexp.Tensor, x, i, rtol=0.0, atol=0.0)


def test_functions_of_two_numbers_on_gpsimd() -> None:
    x, n = torch.rand(200), whole(0, 5, 200).float()
    check(ATEN.igamma.default, x * 5, n + 0.5)
    check(ATEN.igammac.default, x * 5, n + 0.5)
    check(ATEN.special_zeta.default, x + 1.5, n + 1)
    check(ATEN.special_hermite_polynomial_h.n_scalar, x, 3)
    check(ATEN.special_chebyshev_polynomial_u.x_scalar, 0.4, n)
    for name in ("chebyshev_polynomial_t", "legendre_polynomial_p", "laguerre_polynomial_l"):
        check(getattr(ATEN, f"special_{name}").default, x, n)


# -- complex numbers -------------------------------------------------------------------------------
@CORES
def test_complex_numbers(core: CoreSpec, cores: int) -> None:
    a, b = randn(129, 33), randn(129, 33, seed=1)
    given: dict[str, Any] = {"core": core, "cores": cores, "atol": 1e-6}
    x = torch.complex(a, b)
    check(ATEN.complex.default, a, randn(33, 129).t(), **given)
    check(ATEN.polar.default, a, b, **given)
    for function in (ATEN.add.Tensor, ATEN.sub.Tensor, ATEN.mul.Tensor):
        check(function, x, x.t().contiguous().t(), **given)
        check(function, x, a, **given)
        check(function, x, torch.complex(randn(), randn(seed=1)), **given)
    check(ATEN.mul.Scalar, x, 2.0, **given)
    check(ATEN.add.Scalar, x, 1.0, **given)
    check(ATEN.mul.Scalar, x, 2.0 + 1.0j, **given)
    for function in (ATEN.neg.default, ATEN.abs.default, ATEN.conj_physical.default):
        check(function, x, **given)


def test_other_functions_of_complex_numbers_are_refused() -> None:
    with pytest.raises(UnsupportedOpError) as error:
        tile_values(ATEN.exp.default, torch.complex(randn(4), randn(4)))
    assert str(error.value) == (
        "aten::exp has no NeuronCore lowering: no engine computes with complex numbers: use real "
        "and imaginary parts"
    )


# -- activations -----------------------------------------------------------------------------------
EDGES = torch.tensor([0.0, -0.0, 1, -1, 0.5, 3, -3, 20, 21, -30, 100, -100, 6, 1e-6, -1e-6, 0.7])
INPUT = torch.cat([EDGES, randn(300) * 3])
GRAD = randn(316, seed=2)
BEYOND = torch.cat([INPUT, torch.tensor([INF, -INF, NAN])])

_FORWARD: dict[str, list[tuple[Any, ...]]] = {
    "relu": [()], "relu6": [()], "silu": [()], "mish": [()], "selu": [()], "celu": [(), (2.0,)],
    "hardsigmoid": [()], "hardswish": [()], "threshold": [(0.5, -2.0)],
    "hardtanh": [(-0.5, 2)], "leaky_relu": [(0.1,), (2.0,), (0.0,)],
    "elu": [(1.5,), (1.5, 2.0, 0.5)], "softplus": [(), (2.0, 10.0)], "hardshrink": [(0.7,)],
    "softshrink": [(0.7,)], "log_sigmoid_forward": [()], "gelu": [()],
    "_prelu_kernel": [(torch.tensor([0.3]),)],
}  # fmt: skip
_BACKWARD: dict[str, list[tuple[Any, ...]]] = {
    "threshold_backward": [(INPUT, 0.0)], "sigmoid_backward": [(torch.sigmoid(INPUT),)],
    "tanh_backward": [(torch.tanh(INPUT),)], "hardtanh_backward": [(INPUT, -0.5, 3)],
    "leaky_relu_backward": [(INPUT, 0.1, False)],
    "elu_backward": [(1.5, 2.0, 0.5, False, INPUT), (1.5, 2.0, 0.5, True, INPUT.clamp(min=-1))],
    "softplus_backward": [(INPUT, 2.0, 20.0)], "hardshrink_backward": [(INPUT, 0.7)],
    "softshrink_backward": [(INPUT, 0.7)], "hardsigmoid_backward": [(INPUT,)],
    "hardswish_backward": [(INPUT,)], "gelu_backward": [(INPUT,)], "silu_backward": [(INPUT,)],
    "mish_backward": [(INPUT,)], "log_sigmoid_backward": [(INPUT, torch.exp(-INPUT.abs()))],
    "logit_backward": [(torch.rand(316),), (torch.rand(316), 0.1)],
    "_prelu_kernel_backward": [(INPUT, torch.tensor([0.3]))],
    "native_dropout_backward": [(INPUT > 0, 2.0)],
    "rrelu_with_noise_backward": [
        (INPUT, torch.rand(316), 0.1, 0.3, True, False),
        (INPUT, torch.rand(316), 0.1, 0.3, False, False),
    ],
}  # fmt: skip


def test_every_activation_has_a_row() -> None:
    apart = {"native_dropout", "_masked_scale"}
    assert set(activation.FORMULAS) == {*_FORWARD, *_BACKWARD, *apart}


@pytest.mark.parametrize("name", _FORWARD)
def test_activation(name: str) -> None:
    for extra in _FORWARD[name]:
        x = INPUT if name in ("gelu", "log_sigmoid_forward") else BEYOND
        check(getattr(ATEN, name).default, x, *extra, atol=1e-6)


@pytest.mark.parametrize("name", _BACKWARD)
def test_activation_backward(name: str) -> None:
    function = getattr(ATEN, name).default
    for extra in _BACKWARD[name]:
        check(function, GRAD, *extra, atol=1e-6)


def test_tanh_approximation_of_gelu() -> None:
    check(ATEN.gelu.default, INPUT, approximate="tanh", atol=2e-6)
    check(ATEN.gelu_backward.default, GRAD, INPUT, approximate="tanh", atol=2e-6)


def test_masked_scale() -> None:
    # ATen has no CPU kernel of it: x * mask * scale.
    mask, out = (INPUT > 0).to(torch.uint8), torch.empty(316)
    specs = [TensorSpec.of(tensor) for tensor in (INPUT, mask, out)]
    program = lower(OpCall("aten::_masked_scale", (*specs[:2], 2.0), (specs[2],)), TRN2)
    execute(program, TRN2, {"in0": INPUT, "in1": mask, "out0": out})
    assert torch.equal(out, INPUT * mask * 2.0)


@CORES
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_narrow_activations_are_rounded_once(
    dtype: torch.dtype, core: CoreSpec, cores: int
) -> None:
    x, grad = randn(129, 33).to(dtype), randn(129, 33, seed=1).to(dtype)
    for function, args in (
        (ATEN.gelu.default, (x,)), (ATEN.silu.default, (x,)), (ATEN.hardswish.default, (x,)),
        (ATEN.gelu_backward.default, (grad, x)), (ATEN.threshold_backward.default, (grad, x, 0.0)),
    ):  # fmt: skip
        (got,), _ = tile_values(function, *args, core=core, cores=cores)
        wide = [a.float() if isinstance(a, Tensor) else a for a in args]
        assert_values([got], [function(*wide).to(dtype)], rtol=2 * EPSILON[dtype], atol=1e-6)


def test_dropout_keeps_what_its_mask_says() -> None:
    x = torch.ones(300, 70)
    (y, kept), _ = tile_values(ATEN.native_dropout.default, x, 0.25, True)
    assert torch.equal(y, torch.where(kept, torch.tensor(1 / 0.75), 0.0))
    assert 0.73 < float(kept.float().mean()) < 0.77
    (y, kept), _ = tile_values(ATEN.native_dropout.default, x, 0.0, True)
    assert torch.equal(y, x) and bool(kept.all())
