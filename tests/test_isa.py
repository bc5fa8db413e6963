"""Costs of single instructions, in cycles of the documented formulas, and operand limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from torch_trn import isa
from torch_trn.chip import CoreSpec, system
from torch_trn.isa import DmaCopy, Engine, NcMatmul, NcTranspose
from torch_trn.memory import Space

TRN1 = system("trn1.2xlarge").chip.core
TRN2 = system("trn2.48xlarge").chip.core
TRN3 = system("trn3.48xlarge").chip.core
BF16, FP32 = torch.bfloat16, torch.float32
SBUF, PSUM, HBM = Space.SBUF, Space.PSUM, Space.HBM


def vector_cycles(instruction: isa.Elementwise, core: CoreSpec = TRN1) -> int:
    """Cycles without the engine's fixed part."""
    hz, fixed = {
        Engine.VECTOR: (core.vector_hz, core.vector_fixed_cycles),
        Engine.SCALAR: (core.scalar_hz, core.scalar_fixed_cycles),
        Engine.GPSIMD: (core.gpsimd_hz, core.gpsimd_fixed_cycles),
    }[instruction.engine]
    return round(instruction.cost(core).occupancy_ps * hz / 1e12) - fixed


def test_full_matmul_on_trn2_is_512_pe_cycles() -> None:
    matmul = NcMatmul(k=128, m=128, n=512, dtype=BF16)
    assert matmul.cost(TRN2).occupancy_ps == 512 * 10**12 // 2_400_000_000 == 213_333
    assert matmul.flops == 2 * 128 * 128 * 512


def test_full_matmul_on_trn1_is_slowed_by_the_power_limit() -> None:
    matmul = NcMatmul(k=128, m=128, n=512, dtype=BF16)
    assert matmul.cost(TRN1).occupancy_ps == 208_980  # I004: 211 ns measured.
    assert matmul.cost(replace(TRN1, pe_sustained_factor=1.0)).occupancy_ps == 182_857


def test_fp32_matmul_takes_four_passes() -> None:
    assert NcMatmul(k=128, m=128, n=512, dtype=FP32).cost(TRN2).occupancy_ps == 853_333


def test_signed_integers_go_through_the_array_as_fp32() -> None:
    """O027, O029: torch.matmul of int8 takes 3.8 times that of bf16; K144, O028: uint8 does not."""
    for dtype, passes in ((torch.int8, 4), (torch.uint8, 1)):
        cost = NcMatmul(k=128, m=128, n=512, dtype=dtype).cost(TRN2)
        assert cost.occupancy_ps == round(passes * 512e12 / 2.4e9), dtype


def test_short_matmul_costs_its_weight_load_unless_loaded() -> None:
    cost = NcMatmul(k=128, m=128, n=128, dtype=BF16).cost(TRN1)
    assert (cost.occupancy_ps, cost.reuse_ps) == (136_000, 52_245)
    assert NcMatmul(k=1, m=1, n=1, dtype=BF16).cost(TRN2).reuse_ps == 26_667  # 64 cycles.


def test_parts_of_the_array_take_their_share() -> None:
    quarter = NcMatmul(k=64, m=64, n=512, dtype=BF16, tile=(64, 64))
    quarter.check(TRN1)
    assert quarter.cost(TRN2).occupancy_ps == 53_333  # 213,333 / 4
    sixteenth = NcMatmul(k=32, m=32, n=512, dtype=BF16, tile=(32, 32))
    sixteenth.check(TRN2)
    with pytest.raises(ValueError) as error:
        sixteenth.check(TRN1)
    assert str(error.value) == "nc_matmul: tile is (32, 32), but must be of sizes 128, 64"
    with pytest.raises(ValueError, match=r"k is 65, but must be 1 to 64 partitions"):
        NcMatmul(k=65, m=64, n=512, dtype=BF16, tile=(64, 64)).check(TRN2)


def test_mx_takes_four_times_the_k_in_the_same_time() -> None:
    product = isa.NcMatmulMx(k=512, m=128, n=512, dtype=torch.float8_e4m3fn)
    product.check(TRN3)
    assert product.cost(TRN3).occupancy_ps == 213_333
    assert product.flops == 4 * NcMatmul(k=128, m=128, n=512, dtype=BF16).flops
    with pytest.raises(ValueError) as error:
        product.check(TRN2)
    assert str(error.value) == (
        "nc_matmul_mx: core is NeuronCore-v3, but must be one with MX matmuls: NeuronCore-v4"
    )


def test_double_row_doubles_k_in_the_same_time() -> None:
    fp8 = NcMatmul(k=256, m=128, n=512, dtype=torch.float8_e4m3fn, double_row=True)
    fp8.check(TRN2)
    assert fp8.cost(TRN2).occupancy_ps == 213_333
    with pytest.raises(ValueError, match="double_row is True, but must be off"):
        fp8.check(TRN1)


def test_transpose_on_tensor_and_vector() -> None:
    tensor = NcTranspose(partitions=128, n=128, dtype=FP32)
    assert tensor.cost(replace(TRN2, matmul_pair_floor_ps=0)).occupancy_ps == 106_667  # 2 x 128.
    vector = NcTranspose(partitions=32, n=32, dtype=BF16, engine=Engine.VECTOR)
    assert vector.cost(TRN1).occupancy_ps == round((64 + 95) / 1.12e-3)


def test_dependent_activation_on_trn1_is_264_cycles() -> None:
    cost = isa.Activation(n=1, partitions=1).cost(TRN1)
    assert cost.occupancy_ps + cost.latency_ps == 188_571 == round(264e12 / 1.4e9)


@pytest.mark.parametrize(
    ("kind", "fields", "cycles"),
    [
        (isa.Activation, {}, 512),
        (isa.ActivationReduce, {}, 512 + 64),
        (isa.TensorScalar, {}, 512),
        (isa.TensorScalarReduce, {}, 512 + 64),
        (isa.TensorCopy, {}, 512),
        (isa.TensorTensor, {"op": "add"}, 1024),
        (isa.TensorTensor, {"op": "add", "sources": (PSUM, SBUF)}, 512),
        (isa.TensorTensor, {"op": "add", "dtype": BF16}, 512),
        (isa.TensorTensor, {"op": "max", "dtype": BF16}, 1024),
        (isa.TensorTensor, {"op": "add", "dtype": BF16, "strided": True}, 2048),
        (isa.ScalarTensorTensor, {"op": "subtract,multiply", "dtype": BF16}, 512),
        (isa.ScalarTensorTensor, {"op": "multiply,add", "dtype": BF16}, 1024),
        (isa.TensorTensorScan, {}, 1024),
        (isa.TensorReduce, {"op": "add"}, 512),
        (isa.TensorReduce, {"op": "max", "dtype": BF16}, 256),
        (isa.BnStats, {}, 512),
        (isa.BnAggr, {"n": 100}, 434),
        (isa.Reciprocal, {}, 1229),
        (isa.Memset, {"dtype": BF16}, 256),
        (isa.Memset, {"operands": (1.0,), "dtype": BF16}, 512),
        (isa.TensorCopyPredicated, {}, 1024),
        (isa.TensorCopyPredicated, {"sources": (SBUF, PSUM)}, 512),
        (isa.Select, {}, 1024),
        (isa.Iota, {}, 512),
        (isa.AffineSelect, {}, 512),
        (isa.LocalGather, {"n": 64}, 8),
        (isa.LocalGather, {"n": 4096, "elements_per_index": 4, "dtype": BF16}, 11_916),
        (isa.Max8, {}, 512),
        (isa.NcFindIndex8, {}, 512),
        (isa.NcMatchReplace8, {}, 512),
        (isa.NcStreamShuffle, {}, 512),
        (isa.RangeSelect, {}, 512),
        (isa.Dropout, {}, 512),
        (isa.Rng, {}, 512),
        (isa.CustomOp, {"op": "lgamma", "cycles_each": 64}, 32_768),
        (isa.QuantizeMx, {"dtype": BF16}, 128),
        (isa.Activation, {"n": 1}, 64),
    ],
)
def test_documented_cycles(
    kind: type[isa.Elementwise], fields: dict[str, Any], cycles: int
) -> None:
    assert vector_cycles(kind(**{"n": 512, **fields})) == cycles


@pytest.mark.parametrize(
    ("kind", "fields", "cycles"),
    [
        (isa.TensorCopy, {}, 128),
        (isa.TensorCopy, {"strided": True}, 256),
        (isa.TensorCopy, {"sources": (PSUM,)}, 256),
        (isa.TensorCopy, {"out_dtype": FP32}, 512),
        (isa.TensorScalar, {}, 128),
        (isa.TensorTensor, {"op": "add"}, 256),
        (isa.TensorTensor, {"op": "max"}, 512),
        (isa.TensorTensor, {"op": "add", "dtype": torch.float16}, 256),
    ],
)
def test_sixteen_bit_modes_of_trn2(
    kind: type[isa.Elementwise], fields: dict[str, Any], cycles: int
) -> None:
    assert vector_cycles(kind(**{"n": 512, "dtype": BF16, **fields}), TRN2) == cycles


def test_scalar_engine_of_trn3_copies_16_bit_data_twice_as_fast() -> None:
    copy = isa.TensorCopy(n=512, dtype=BF16, engine=Engine.SCALAR)
    assert (vector_cycles(copy, TRN2), vector_cycles(copy, TRN3)) == (512, 256)


def test_32_kib_on_one_trn2_dma_engine() -> None:
    one_engine = DmaCopy(source=HBM, destination=SBUF, rows=8, row_bytes=4096)
    assert one_engine.cost(TRN2).queue_ps == 1_416_000


def test_one_dma_engine_alone_is_faster_than_its_share_of_the_core() -> None:
    """I006-I008: 135, 83 and 297 ns for transfers of 2.56, 1.42 and 6.94 KB in flight."""
    for nbytes, low_ns, high_ns in ((2556, 128, 142), (1418, 79, 89), (6941, 282, 312)):
        one = DmaCopy(source=HBM, destination=SBUF, rows=1, row_bytes=nbytes)
        assert low_ns * 1000 <= one.cost(TRN1).queue_ps <= high_ns * 1000, nbytes
    assert one.cost(TRN1).queue_ps == 291_184
    assert one.cost(TRN1).occupancy_ps == 25_429  # Its share of 272.96 GB/s.


def test_dma_rate_of_wide_rows_is_the_core_limit() -> None:
    copy = DmaCopy(source=HBM, destination=SBUF, rows=128, row_bytes=1 << 16)
    assert copy.cost(TRN2).occupancy_ps == -(-copy.nbytes * 10**12 // 362_500_000_000)
    assert copy.cost(TRN1).occupancy_ps == 8 * 3_841_501  # 272.96 GB/s.
    assert copy.cost(TRN2).latency_ps == 1_300_000


@pytest.mark.parametrize(("row_bytes", "low", "high"), [(1024, 208, 229), (4096, 265, 273)])
def test_dma_rate_by_row_on_trn1(row_bytes: int, low: int, high: int) -> None:
    copy = DmaCopy(source=HBM, destination=SBUF, rows=128, row_bytes=row_bytes)
    assert low <= copy.nbytes * 1000 / copy.cost(TRN1).occupancy_ps <= high


def test_hbm_to_hbm_on_trn1_moves_308_gb_per_s_counting_both_ways() -> None:
    copy = DmaCopy(source=HBM, destination=HBM, rows=512, row_bytes=1 << 16)
    assert abs(2 * copy.nbytes * 1000 / copy.cost(TRN1).occupancy_ps - 308) < 31


def test_few_partitions_use_few_engines() -> None:
    cost = DmaCopy(source=HBM, destination=SBUF, rows=4, row_bytes=8192).cost(TRN1)
    assert cost.queue_ps == 4 * (36_000 + 301_177)  # One engine alone.
    assert cost.occupancy_ps == 4 * 480_188 // 16
    assert cost.latency_ps == cost.queue_ps - cost.occupancy_ps + 1_300_000


def test_dma_adds_and_transposes_at_their_documented_share() -> None:
    plain = DmaCopy(source=SBUF, destination=HBM, rows=128, row_bytes=4096)
    adding = replace(plain, accumulate=True)
    assert adding.cost(TRN1).occupancy_ps == 2 * plain.cost(TRN1).queue_ps
    turned = DmaCopy(source=HBM, destination=SBUF, rows=128, row_bytes=4096, transpose=True)
    assert turned.cost(TRN1).occupancy_ps == 8 * round(240_094 / 0.9)
    assert replace(turned, source=SBUF).cost(TRN1).occupancy_ps == 8 * 2 * 240_094


@pytest.mark.parametrize(
    ("instruction", "text"),
    [
        (
            NcMatmul(k=129, m=128, n=512, dtype=BF16),
            "nc_matmul: k is 129, but must be 1 to 128 partitions",
        ),
        (
            NcMatmul(k=128, m=129, n=512, dtype=BF16),
            "nc_matmul: m is 129, but must be 1 to 128 (stationary free size)",
        ),
        (
            NcMatmul(k=128, m=128, n=513, dtype=BF16),
            "nc_matmul: n is 513, but must be 1 to 512 (moving free size)",
        ),
        (
            NcMatmul(k=1, m=1, n=1, dtype=torch.float64),
            "nc_matmul: dtype is torch.float64, but must be one TensorE reads",
        ),
        (
            NcTranspose(partitions=128, n=129, dtype=BF16),
            "nc_transpose: n is 129, but must be 1 to 128 on TensorE",
        ),
        (
            isa.Activation(n=0),
            "activation: n is 0, but must be 1 to 65536 per partition",
        ),
        (
            isa.TensorCopy(n=4097, sources=(PSUM,)),
            "tensor_copy: n is 4097, but must be 1 to 4096 per partition",
        ),
        (
            isa.TensorCopy(n=1, partitions=129),
            "tensor_copy: partitions is 129, but must be 1 to 128",
        ),
        (
            isa.BnStats(n=513),
            "bn_stats: n is 513, but must be 1 to 512 per partition",
        ),
        (
            isa.TensorCopy(n=1, sources=(PSUM,), engine=Engine.GPSIMD),
            "tensor_copy: operand space is PSUM, but must be SBUF: GpSimdE has no PSUM port",
        ),
        (
            isa.TensorTensor(n=1, dtype=torch.float64),
            "tensor_tensor: dtype is torch.float64, but must be of 32 bits a number or fewer",
        ),
        (
            DmaCopy(source=HBM, destination=SBUF, rows=0, row_bytes=1),
            "dma_copy: rows is 0, but must be at least 1",
        ),
        (
            DmaCopy(source=HBM, destination=SBUF, rows=2, row_bytes=1, partitions=3),
            "dma_copy: partitions is 3, but must be 1 to 2",
        ),
    ],
)
def test_limits_name_value_and_limit(instruction: isa.Instruction, text: str) -> None:
    with pytest.raises(ValueError) as error:
        instruction.check(TRN2)
    assert str(error.value) == text


def test_wrong_engine() -> None:
    with pytest.raises(ValueError) as error:
        isa.Activation(n=1, engine=Engine.VECTOR)
    assert str(error.value) == "activation: engine is VectorE, but must be ScalarE"


def test_trn3_takes_wider_moving_operands() -> None:
    wide = NcMatmul(k=128, m=128, n=4096, dtype=BF16)
    wide.check(TRN3)
    with pytest.raises(ValueError, match="n is 4096, but must be 1 to 512"):
        wide.check(TRN2)


def test_bits_of_any_dtype_can_be_moved() -> None:
    isa.TensorCopy(n=8, dtype=torch.float64).check(TRN2)


@pytest.mark.parametrize("core", [TRN1, TRN2, TRN3])
def test_cost_never_falls_with_size(core: CoreSpec) -> None:
    for kind in (isa.Activation, isa.TensorTensor, isa.TensorReduce, isa.LocalGather, isa.BnAggr):
        costs = [kind(n=n, dtype=BF16).cost(core).occupancy_ps for n in range(1, 600, 7)]
        assert costs == sorted(costs)
    rows = [
        DmaCopy(source=HBM, destination=SBUF, rows=128, row_bytes=size).cost(core).occupancy_ps
        for size in range(64, 200_000, 997)
    ]
    assert rows == sorted(rows)
