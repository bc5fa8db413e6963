"""Lowerings: names, refusals, good programs, exact times and golden texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torch_trn.chip import system
from torch_trn.errors import UnsupportedOpError
from torch_trn.lowering import OpCall, TensorSpec, has_lowering, lower
from torch_trn.program import Program
from torch_trn.scheduler import schedule

TRN2 = system("trn2.48xlarge").chip.core
TRN1 = system("trn1.32xlarge").chip.core
F32, BF16 = torch.float32, torch.bfloat16


def t(*shape: int, dtype: torch.dtype = F32) -> TensorSpec:
    return TensorSpec.contiguous(dtype, *shape)


def flipped(spec: TensorSpec) -> TensorSpec:
    """The transposed view of a matrix."""
    return TensorSpec(spec.dtype, spec.shape[::-1], spec.strides[::-1])


def program(name: str, *args: object, outs: tuple[TensorSpec, ...]) -> Program:
    return lower(OpCall(f"aten::{name}", args, outs), TRN2, 1)


def product(m: int, n: int, k: int, dtype: torch.dtype, *, turned: bool = False) -> Program:
    """a.t() @ b with a in [k, m] order (k on partitions in HBM), or a @ b where `turned`."""
    a = t(m, k, dtype=dtype) if turned else flipped(t(k, m, dtype=dtype))
    return program("mm", a, t(k, n, dtype=dtype), outs=(t(m, n, dtype=dtype),))


@pytest.mark.parametrize(
    "name",
    [
        "aten::add.Tensor",
        "aten::add_.Tensor",
        "aten::add.out",
        "aten::add.Scalar",
        "aten::addmm.out",
    ]
    + ["aten::_foreach_add_.List", "aten::max.dim_max", "aten::__iand__.Tensor", "aten::zero_"],
)
def test_in_place_and_out_forms_need_no_names_of_their_own(name: str) -> None:
    assert has_lowering(name)


def test_destinations_of_out_variants_are_not_operands() -> None:
    x = t(128, 512)
    plain = program("add.Tensor", x, x, 1, outs=(x,))
    out = program("add.out", x, x, 1, x, outs=(x,))
    assert out.hbm_read_bytes == plain.hbm_read_bytes == 2 * x.nbytes


def test_unknown_operator() -> None:
    assert not has_lowering("aten::no_such_thing")
    with pytest.raises(UnsupportedOpError) as error:
        program("no_such_thing", outs=())
    assert str(error.value) == (
        "aten::no_such_thing has no NeuronCore lowering: no lowering is registered"
    )


def test_double_has_no_engine() -> None:
    x = t(4, dtype=torch.float64)
    with pytest.raises(UnsupportedOpError) as error:
        program("neg", x, outs=(x,))
    assert str(error.value) == (
        "aten::neg has no NeuronCore lowering: no engine computes in float64 "
        "(the widest is fp32): convert to float32"
    )


def test_one_double_is_a_program_of_gpsimd() -> None:
    # GpSimdE: 256 steps and 150 fixed cycles of 1.2 GHz.
    x = t(dtype=torch.float64)
    lowered = program("reciprocal", x, outs=(x,))
    assert (lowered.hbm_read_bytes, lowered.hbm_write_bytes) == (8, 8)
    assert schedule(lowered, TRN2).busy_ps[3] == 338_333
    halved = program("copy_", t(dtype=torch.float32), x, False, outs=(t(dtype=torch.float32),))
    assert (halved.hbm_read_bytes, halved.hbm_write_bytes) == (8, 4)
    both = program("add.Tensor", x, x, 1, outs=(x,))
    assert both.hbm_read_bytes == 16
    z = t(dtype=torch.complex128)
    with pytest.raises(UnsupportedOpError, match="no engine computes in complex128"):
        program("neg", z, outs=(z,))


def test_data_dependent_shapes_are_declared() -> None:
    with pytest.raises(UnsupportedOpError, match="shape of its result depends on data"):
        program("nonzero", t(4), outs=(t(4, 1, dtype=torch.int64),))


def test_views_of_double_are_free() -> None:
    x = t(4, dtype=torch.float64)
    assert program("detach", x, outs=(x,)).instructions == 0


def test_a_number_is_part_of_the_instruction() -> None:
    x = t(128, 512)
    text = str(program("mul.Tensor", x, 2.0, outs=(x,)))
    assert "tensor_scalar" in text and "tensor_tensor" not in text


# -- exact times: the hand calculation is in the comment -------------------------------------------
def test_one_matmul_takes_512_cycles() -> None:
    # hardware.md 9(a): [128 x 128] x [128 x 512] in bf16 is 512 cycles of 2.4 GHz.
    timeline = schedule(product(128, 512, 128, BF16), TRN2)
    assert timeline.busy_ps[0] == 213_333


def test_add_of_small_tensors() -> None:
    # Two loads in one queue, 26 ns + 256 B / 27.2 B/ns = 35,412 ps each, and 1,300 ns until their
    # data may be read; 2 x 64 + 95 cycles of 0.96 GHz; a semaphore (150 ns); the store likewise.
    x = t(8, 8)
    timeline = schedule(program("add.Tensor", x, x, 1, outs=(x,)), TRN2)
    descriptor = 26_000 + -(-256 * 1_000_000 // 27_200)
    vector = round((2 * 64 + 95) * 10**12 / 960_000_000)
    expected = 2 * descriptor + 1_300_000 + vector + 150_000 + descriptor + 1_300_000
    assert timeline.duration_ps == expected


def test_cast_does_one_pass_and_moves_each_byte_once() -> None:
    x = t(1024, 1024)
    cast = program("_to_copy", x, BF16, outs=(t(1024, 1024, dtype=BF16),))
    assert (cast.hbm_read_bytes, cast.hbm_write_bytes) == (4 << 20, 2 << 20)
    # Four tiles of [128, 2048], each 2048 + 95 cycles of VectorE at 0.96 GHz.
    assert schedule(cast, TRN2).busy_ps[1] == 4 * round((2048 + 95) * 10**12 / 960_000_000)


# -- good programs ---------------------------------------------------------------------------------
def test_large_bf16_matmul_keeps_the_array_busy() -> None:
    built = product(8192, 8192, 8192, BF16)
    timeline = schedule(built, TRN2)
    assert built.flops == 2 * 8192**3
    assert built.flops / TRN2.peak_flops(BF16) * 10**12 / timeline.duration_ps > 0.95


def test_transposed_views_are_free_in_one_orientation() -> None:
    assert "transpose" not in str(product(512, 512, 512, F32))
    assert "nc_transpose" in str(product(512, 512, 512, F32, turned=True))
    assert "nc_transpose" not in str(product(512, 512, 512, BF16, turned=True))  # by the DMA


def test_the_vector_is_stationary_in_a_matrix_vector_product() -> None:
    built = program(
        "mv", t(4096, 4096, dtype=BF16), t(4096, dtype=BF16), outs=(t(4096, dtype=BF16),)
    )
    assert "k=128 m=1 n=512" in str(built)


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
def test_elementwise_reaches_the_usable_dma_rate(core: object) -> None:
    x = t(4096, 8192)
    built = lower(OpCall("aten::add.Tensor", (x, x, 1), (x,)), core, 1)  # type: ignore[arg-type]
    moved = built.hbm_read_bytes + built.hbm_write_bytes
    assert moved == 3 * x.nbytes
    rate = moved * 10**12 / schedule(built, core).duration_ps  # type: ignore[arg-type]
    assert rate > 0.98 * core.dma_bytes_per_s  # type: ignore[attr-defined]


def test_softmax_reads_once_where_a_row_fits_and_twice_where_not() -> None:
    short, long = t(1024, 4096), t(1024, 100_000)
    assert program("_softmax", short, -1, False, outs=(short,)).hbm_read_bytes == short.nbytes
    assert program("_softmax", long, -1, False, outs=(long,)).hbm_read_bytes == 2 * long.nbytes


def test_a_list_is_one_program_whatever_its_length() -> None:
    def adamw(count: int) -> Program:
        lists = ((t(1024, 1024),) * count,) * 4
        steps = (t(),) * count
        args = (*lists, (), steps, 1e-3, 0.9, 0.999, 0.01, 1e-8, False, False, None, None)
        return program("_fused_adamw_", *args, outs=())

    few, many = adamw(2), adamw(150)
    assert len(str(few).splitlines()) == len(str(many).splitlines())
    assert many.hbm_read_bytes - few.hbm_read_bytes == 148 * 16 * (1 << 20)


def test_causal_attention_skips_blocks() -> None:
    q, lse = t(1, 8, 1024, 64, dtype=BF16), t(1, 8, 1024)

    def flops(causal: bool) -> int:
        args = (q, q, q, 0.0, causal, None, None)
        return program("_scaled_dot_product_flash_attention_for_cpu", *args, outs=(q, lse)).flops

    assert flops(False) == 4 * 8 * 1024 * 1024 * 64
    # 8 query blocks of 128 see 1, 2, ... 8 of 8 key blocks.
    assert flops(True) == flops(False) * 36 // 64


def test_half_a_logical_core_does_half_the_matmul() -> None:
    call = OpCall("aten::mm", (t(4096, 512), t(512, 1024)), (t(4096, 1024),))
    assert 2 * lower(call, TRN2, 2).flops == lower(call, TRN2, 1).flops == 2 * 4096 * 512 * 1024


# -- golden texts ----------------------------------------------------------------------------------
def _norm() -> Program:
    x, gain, rows = t(1024, 384, dtype=BF16), t(384, dtype=BF16), t(1024, 1)
    return program("native_layer_norm", x, (384,), gain, gain, 1e-5, outs=(x, rows, rows))


def _attention() -> Program:
    q, lse = t(2, 2, 256, 64, dtype=BF16), t(2, 2, 256)
    name = "_scaled_dot_product_flash_attention_for_cpu"
    return program(name, q, q, q, 0.0, True, None, None, outs=(q, lse))


def _adamw() -> Program:
    lists = ((t(384, 1152), t(1152), t(384)),) * 4
    steps = (t(), t(), t())
    args = (*lists, (), steps, 1e-3, 0.9, 0.999, 0.01, 1e-8, False, False, None, None)
    return program("_fused_adamw_", *args, outs=())


GOLDEN: dict[str, Callable[[], Program]] = {
    "add": lambda: program("add.Tensor", t(1024, 1024), t(1024), 1, outs=(t(1024, 1024),)),
    "matmul": lambda: product(1024, 1024, 1024, BF16),
    "softmax": lambda: program("_softmax", t(1024, 512), -1, False, outs=(t(1024, 512),)),
    "layer_norm": _norm,
    "attention": _attention,
    "adamw": _adamw,
    "convolution": lambda: program(
        "convolution", t(2, 64, 28, 28, dtype=BF16), t(64, 64, 3, 3, dtype=BF16), None, (1, 1),
        (1, 1), (1, 1), False, (0, 0), 1, outs=(t(2, 64, 28, 28, dtype=BF16),)),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str, update_golden: bool) -> None:
    built = GOLDEN[name]()
    timeline = schedule(built, TRN2)
    text = f"{built}\nduration {timeline.duration_ps} ps, busy {timeline.busy_ps} ps\n"
    path = Path(__file__).parent / "golden" / "lowering" / f"{name}.txt"
    if update_golden:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
