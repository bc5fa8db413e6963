"""The cell-by-cell array against the fast tile matmul (bit for bit) and the cycle formula (==)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_trn._sim import tile_matmul
from torch_trn.chip import system
from torch_trn.isa import NcMatmul
from torch_trn.systolic import SystolicArray

TRN2 = system("trn2.48xlarge").chip.core


def operands(k: int, m: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """bf16 values of very different sizes, so that the order of a sum shows."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        size = torch.randint(-12, 12, (rows, columns), generator=generator)
        values = torch.randn(rows, columns, generator=generator) * 2.0**size
        return values.bfloat16().float().numpy()

    return matrix(k, m), matrix(k, n)


@given(k=st.integers(1, 12), m=st.integers(1, 12), n=st.integers(1, 20), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_values_are_those_of_the_tile_matmul_bit_for_bit(k: int, m: int, n: int, seed: int) -> None:
    stationary, moving = operands(k, m, n, seed)
    run = SystolicArray(12, 12, min_interval=1).run([(stationary, moving)])
    assert run.results[0].tobytes() == tile_matmul(stationary, moving).tobytes()


def test_values_of_the_whole_array() -> None:
    stationary, moving = operands(128, 128, 96)
    run = SystolicArray().run([(stationary, moving)])
    assert run.results[0].tobytes() == tile_matmul(stationary, moving).tobytes()


def test_fp32_products_too() -> None:
    stationary = torch.randn(9, 7, generator=torch.Generator().manual_seed(1)).numpy()
    moving = torch.randn(9, 11, generator=torch.Generator().manual_seed(2)).numpy()
    run = SystolicArray(9, 7, 1).run([(stationary, moving)])
    assert run.results[0].tobytes() == tile_matmul(stationary, moving).tobytes()


@pytest.mark.parametrize("n", [1, 63, 64, 65, 128, 512])
def test_matmuls_follow_each_other_as_the_cycle_formula_says(n: int) -> None:
    # reuse_ps is what the streaming takes without the measured floor of a short pair.
    cost = NcMatmul(k=16, m=16, n=n, dtype=torch.bfloat16).cost(TRN2)
    products = [operands(16, 16, n, seed) for seed in range(4)]
    run = SystolicArray(16, 16, TRN2.min_interval_cycles).run(products)
    steps = {b - a for a, b in zip(run.starts, run.starts[1:], strict=False)}
    assert steps == {max(64, n)}
    assert cost.reuse_ps == round(max(64, n) * 10**12 / TRN2.pe_hz)
    for result, (stationary, moving) in zip(run.results, products, strict=True):
        assert result.tobytes() == tile_matmul(stationary, moving).tobytes()


def test_a_result_leaves_when_the_wave_has_passed_all_rows_and_columns() -> None:
    run = SystolicArray(16, 12, 1).run([operands(16, 12, 20)])
    # The last value enters row 0 in cycle 19; 16 rows and 12 columns later it is out.
    assert run.ends == (19 + 16 + 12 - 1,)


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError) as error:
        SystolicArray(8, 8).run([operands(9, 4, 2)])
    assert str(error.value) == "a stationary operand of 9 x 4 does not fit an array of 8 x 8"
    with pytest.raises(ValueError) as error:
        SystolicArray(8, 8).run([(operands(4, 4, 2)[0], operands(5, 4, 2)[1])])
    assert str(error.value) == "stationary has k = 4, moving 5; both must agree"
