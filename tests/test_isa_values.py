"""What each instruction computes, run at once on tiles."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_trn import isa
from torch_trn.isa import Engine
from torch_trn.isa.alu import ACTIVATIONS, ALU, alu, rounded
from torch_trn.memory import Affine

F32, BF16, I32 = torch.float32, torch.bfloat16, torch.int32
NAN, INF = math.nan, math.inf


def row(*values: float, dtype: torch.dtype = F32) -> Tensor:
    return torch.tensor([values], dtype=dtype)


def run(kind: type[isa.Instruction], *reads: Tensor, **fields: Any) -> list[list[Any]]:
    """The results of an instruction on one partition, as lists."""
    given = {"n": reads[0].shape[1] if reads else 1, "partitions": 1, **fields}
    return [result[0].tolist() for result in kind(**given).run(reads)]


def test_every_operator_of_the_engines() -> None:
    a, b = row(7.0, -7.0, 2.0), row(2.0, 2.0, 2.0)
    expected = {
        "add": [9, -5, 4], "subtract": [5, -9, 0], "reverse_subtract": [-5, 9, 0],
        "multiply": [14, -14, 4], "divide": [3.5, -3.5, 1], "max": [7, 2, 2], "min": [2, -7, 2],
        "pow": [49, 49, 4], "mod": [1, 1, 0], "abs_max": [7, 7, 2],
        "is_equal": [0, 0, 1], "not_equal": [1, 1, 0], "is_gt": [1, 0, 0], "is_ge": [1, 0, 1],
        "is_lt": [0, 1, 0], "is_le": [0, 1, 1],
        "logical_and": [1, 1, 1], "logical_or": [1, 1, 1], "logical_xor": [0, 0, 0],
        "bitwise_and": [2, 0, 2], "bitwise_or": [7, -5, 2], "bitwise_xor": [5, -5, 0],
        "logical_shift_left": [28, -28, 8], "logical_shift_right": [1, 2**30 - 2, 0],
        "arith_shift_right": [1, -2, 0],
    }  # fmt: skip
    assert expected.keys() == ALU.keys()
    for name, values in expected.items():
        whole = name.startswith(("bitwise", "logical_shift", "arith"))
        x, y = (v.to(I32) for v in (a, b)) if whole else (a, b)
        assert alu(name, x, y)[0].tolist() == values, name


def test_integers_go_through_fp32_except_on_gpsimd() -> None:
    big = row(2**24 + 1, dtype=I32)
    add = {"op": "add", "dtype": I32}
    zero = row(0, dtype=I32)
    assert run(isa.TensorTensor, big, zero, **add) == [[2.0**24]]
    assert run(isa.TensorTensor, big, zero, engine=Engine.GPSIMD, **add) == [[2**24 + 1]]


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match="engines have no operator 'plus'; they have: add, "):
        alu("plus", row(1.0), row(1.0))
    with pytest.raises(ValueError, match="ScalarE has no function 'cosh'; it has: copy, "):
        run(isa.Activation, row(1.0), op="cosh")
    with pytest.raises(ValueError, match="no engine reduces by 'mean'; they do by: add, "):
        run(isa.TensorReduce, row(1.0), op="mean")
    with pytest.raises(ValueError, match="custom_op 'nothing': neither torch.special nor torch"):
        run(isa.CustomOp, row(1.0), op="nothing")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_torch(name: str) -> None:
    x = torch.linspace(0.1, 3.0, 11)[None]
    direct = {
        "copy": lambda v: v, "identity": lambda v: v, "arctan": torch.atan, "sign": torch.sign,
        "gelu_apprx_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        "gelu_dx": lambda v: _slope(torch.nn.functional.gelu, v),
        "gelu_apprx_tanh_dx": lambda v: _slope(
            lambda u: torch.nn.functional.gelu(u, approximate="tanh"), v),
        "silu_dx": lambda v: _slope(torch.nn.functional.silu, v),
    }  # fmt: skip
    found = direct.get(name) or getattr(torch, name, None) or getattr(torch.nn.functional, name)
    (got,) = isa.Activation(op=name, n=11, partitions=1).run([x])
    torch.testing.assert_close(got, found(x), rtol=1e-6, atol=1e-6)


def _slope(function: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def test_scale_and_bias_come_before_the_function() -> None:
    x, bias = row(1.0, 2.0), row(10.0)
    assert run(isa.Activation, x, bias, op="copy", operands=(3.0, None)) == [[13.0, 16.0]]
    full, total = run(isa.ActivationReduce, x, op="square", operands=(2.0, 1.0))
    assert (full, total) == ([9.0, 25.0], [34.0])


def test_one_and_two_operators_with_scalars() -> None:
    x, low = row(1.0, 5.0, 9.0), row(2.0)
    assert run(isa.TensorScalar, x, low, op="max,multiply", operands=(None, 10.0)) == [[20, 50, 90]]
    assert run(isa.TensorScalarReduce, x, op="add", operands=(1.0,)) == [[2, 6, 10], [18]]
    scaled = run(isa.ScalarTensorTensor, x, row(1.0, 1.0, 1.0), op="multiply,subtract",
                 operands=(2.0,))  # fmt: skip
    assert scaled == [[1, 9, 17]]


def test_scans_run_along_the_row() -> None:
    a, b = row(0.5, 0.5, 2.0), row(1.0, 1.0, 1.0)
    scan = run(isa.TensorTensorScan, a, b, op="multiply,add", operands=(4.0,))
    assert scan == [[3.0, 2.5, 6.0]]
    assert run(isa.TensorTensorScan, a, a, op="add", operands=(0.0,)) == [[0.5, 1.0, 3.0]]


def test_reductions_of_runs_and_nan() -> None:
    x = row(1.0, 2.0, NAN, 4.0)
    assert run(isa.TensorReduce, x, op="max", groups=2)[0][0] == 2.0
    assert math.isnan(run(isa.TensorReduce, x, op="max")[0][0])


def test_copies_and_selections() -> None:
    x, mask = row(1.0, 2.0, 3.0), row(1, 0, 1, dtype=I32)
    other = row(7.0, 8.0, 9.0)
    assert run(isa.TensorCopy, x) == [[1, 2, 3]]
    assert run(isa.Select, mask, x, other) == [[1, 8, 3]]
    copy = isa.TensorCopyPredicated(n=3, partitions=1)
    assert copy.reads_old and copy.run([x, mask], other)[0][0].tolist() == [1, 8, 3]
    assert run(isa.Reciprocal, row(4.0, 0.0)) == [[0.25, INF]]
    assert run(isa.Memset, n=2, operands=(3,)) == [[3, 3]]


def test_statistics_of_halves_are_combined() -> None:
    x = torch.randn(4, 700)
    first = isa.BnStats(n=512, partitions=4).run([x[:, :512]])[0]
    second = isa.BnStats(n=188, partitions=4).run([x[:, 512:]])[0]
    assert first[0, 0] == first[0, 3] == 256.0
    both = torch.cat([first, second], 1)
    mean_var = isa.BnAggr(n=12, partitions=4).run([both])[0]
    torch.testing.assert_close(mean_var[:, 0], x.mean(1))
    torch.testing.assert_close(mean_var[:, 1], x.var(1, correction=0))


def test_indices_are_affine_in_partition_and_place() -> None:
    iota = isa.Iota(n=4, partitions=2, base=Affine(10), channel=100, steps=((10, 2), (1, 2)))
    assert iota.run([])[0].tolist() == [[10, 11, 20, 21], [110, 111, 120, 121]]
    select = isa.AffineSelect(n=3, partitions=2, op="is_ge", channel=1, steps=((-1, 3),),
                              operands=(-5.0,))  # fmt: skip
    assert select.run([torch.ones(2, 3)])[0].tolist() == [[1, -5, -5], [1, 1, -5]]
    ranged = isa.RangeSelect(n=5, partitions=1, op="is_ge,is_lt", operands=(None, 4, 0.0))
    assert ranged.run([torch.ones(1, 5), row(2.0)])[0].tolist() == [[0, 0, 1, 1, 0]]


def test_gathers_and_custom_code() -> None:
    index = row(2, 0, dtype=I32)
    data = row(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    gathered = isa.LocalGather(n=2, partitions=1, elements_per_index=2).run([data, index])[0]
    assert gathered.tolist() == [[5, 6, 1, 2]]
    assert run(isa.CustomOp, row(1.0, 2.0, 0.5), op="lgamma")[0][:2] == [0.0, 0.0]


def test_eight_at_a_time() -> None:
    x = row(3.0, 9.0, 1.0, 9.0, 7.0, 5.0, 2.0, 8.0, 6.0, 4.0)
    best = isa.Max8(n=10, partitions=1).run([x])[0]
    assert best[0].tolist() == [9, 9, 8, 7, 6, 5, 4, 3]
    places = isa.NcFindIndex8(n=10, partitions=1).run([x, best])[0]
    assert places[0].tolist() == [1, 3, 7, 4, 8, 5, 9, 0]
    rest = isa.NcMatchReplace8(n=10, partitions=1, operands=(-1.0,)).run([x, best])[0]
    assert rest[0].tolist() == [-1, -1, 1, -1, -1, -1, 2, -1, -1, -1]
    missing = isa.NcFindIndex8(n=10, partitions=1).run([x, torch.full((1, 8), 55.0)])[0]
    assert missing[0].tolist() == [2**32 - 1] * 8


def test_partitions_are_shuffled_within_32() -> None:
    x = torch.arange(64.0)[:, None]
    turned = isa.NcStreamShuffle(n=1, partitions=64, mask=tuple(reversed(range(32)))).run([x])[0]
    assert turned[:, 0].tolist() == [*reversed(range(32)), *reversed(range(32, 64))]


def test_mx_data_keeps_three_bits_and_a_scale_for_32() -> None:
    x, w = torch.randn(16, 4 * 5), torch.randn(16, 4 * 3) * 1000
    quantize = [isa.QuantizeMx(n=t.shape[1], partitions=16).run([t]) for t in (x, w)]
    (moving, right), (stationary, left) = (
        (rounded(data, torch.float8_e4m3fn), scales) for data, scales in quantize
    )
    product = isa.NcMatmulMx(k=64, m=3, n=5, dtype=torch.float8_e4m3fn)
    (got,) = product.run([stationary, moving, left, right])

    def by_k(t: Tensor, free: int) -> Tensor:
        return t.reshape(16, free, 4).transpose(1, 2).reshape(64, free)

    expected = by_k(w, 3).t() @ by_k(x, 5)
    size = by_k(w, 3).abs().t() @ by_k(x, 5).abs()
    # Each factor is off by at most 2^-4 of itself (three bits, and what lies far below its scale).
    assert ((got - expected).abs() <= 2 * 2.0**-4 * size + 1e-3).all()
    assert right.shape == (2, 5) and left.shape == (2, 3)


@pytest.mark.parametrize(
    ("value", "dtype", "result"),
    [
        (1.0 + 2.0**-8, BF16, 1.0), (1.0 + 3 * 2.0**-8, BF16, 1.0 + 2.0**-6), (INF, BF16, INF),
        (70000.0, torch.float16, INF), (2.7, I32, 2), (-2.7, I32, -2), (3e9, I32, 2**31 - 1),
        (-3e9, I32, -(2**31)), (INF, I32, 2**31 - 1), (NAN, I32, 0), (300.0, torch.uint8, 255),
        (0.5, torch.bool, True), (0.0, torch.bool, False),
    ],
)  # fmt: skip
def test_results_are_rounded_and_held_in_range(
    value: float, dtype: torch.dtype, result: Any
) -> None:
    assert rounded(torch.tensor([value]), dtype).item() == result


def test_fp8_ends_at_240_before_v4() -> None:
    x = torch.tensor([240.0, 247.0, 248.0, -300.0, 448.0])
    before = rounded(x, torch.float8_e4m3fn, fp8_max=240.0).float()
    assert before[:2].tolist() == [240.0, 240.0] and before[2:].isnan().all()
    after = rounded(x, torch.float8_e4m3fn).float()
    assert after.tolist() == [240.0, 240.0, 256.0, -288.0, 448.0]
