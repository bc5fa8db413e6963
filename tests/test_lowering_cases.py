"""Calls that once had no Program (each was a Host operator with a warning), and turned operands."""

from __future__ import annotations

import time

import pytest
import torch

from torch_trn.chip import CoreSpec, system
from torch_trn.lowering import OpCall, TensorSpec, lower
from torch_trn.program import Program
from torch_trn.scheduler import schedule

TRN1 = system("trn1.32xlarge").chip.core
TRN2 = system("trn2.48xlarge").chip.core
F32, BF16, I64 = torch.float32, torch.bfloat16, torch.int64


def t(*shape: int, dtype: torch.dtype = F32) -> TensorSpec:
    return TensorSpec.contiguous(dtype, *shape)


def flipped(rows: int, cols: int, dtype: torch.dtype = F32) -> TensorSpec:
    """A [rows, cols] matrix whose rows lie next to each other."""
    return TensorSpec(dtype, (rows, cols), (1, rows))


def call(name: str, *args: object, outs: tuple[TensorSpec, ...]) -> OpCall:
    return OpCall(f"aten::{name}", args, outs)


def _conv_backward(channels: int, groups: int) -> OpCall:
    grad, x, w = t(2, channels, 7), t(2, groups, 9), t(channels, 1, 3)
    args = (grad, x, w, (channels,), (1,), (0,), (1,), False, (0,), groups, (True, True, True))
    return call("convolution_backward", *args, outs=(x, w, t(channels)))


ONCE_FAILED = {
    "64-bit elements that are turned": call(
        "clone", TensorSpec(I64, (3, 5, 5, 5, 3), (125, 25, 5, 1, 125)), None,
        outs=(t(3, 5, 5, 5, 3, dtype=I64),)),
    "depthwise with two outputs per channel": _conv_backward(8, 4),
    "depthwise with three outputs per channel": _conv_backward(12, 4),
    "columns of a turned operand that are no multiple of 128": call(
        "addmm", t(384, dtype=BF16), t(128, 128, dtype=BF16), flipped(128, 384, BF16), 1, 1,
        outs=(t(128, 384, dtype=BF16),)),
    "a turned operand of few k": call(
        "addmv_", t(250, dtype=BF16), t(250, 10, dtype=BF16), t(10, dtype=BF16), 0, 1,
        outs=(t(250, dtype=BF16),)),
    "no batch and no k": call("bmm", t(0, 3, 0), t(0, 0, 3), outs=(t(0, 3, 3),)),
    "no k and a large result": call("mm", t(4096, 0), t(0, 4096), outs=(t(4096, 4096),)),
    "a stationary operand that stays for one of a batch": call(
        "bmm", t(3, 3, 16384, dtype=BF16), TensorSpec(BF16, (3, 16384, 255), (4177920, 1, 16384)),
        outs=(t(3, 3, 255, dtype=BF16),)),
    "a result that is turned, of a batch": call(
        "baddbmm", t(128), TensorSpec(F32, (2, 1500, 16384), (24576000, 1, 1500)),
        TensorSpec(F32, (2, 16384, 128), (2097152, 1, 16384)), 1, 1, outs=(t(2, 1500, 128),)),
    "causal attention with less than a block of queries": call(
        "_scaled_dot_product_flash_attention_for_cpu", t(1, 2, 3, 8), t(1, 2, 6, 8), t(1, 2, 6, 8),
        0.0, True, None, None, outs=(t(1, 2, 3, 8), t(1, 2, 3))),
    "attention over keys that the turning DMA cannot spread evenly": call(
        "_scaled_dot_product_flash_attention_for_cpu", *(t(1, 2, 1000, 96, dtype=BF16),) * 3,
        0.0, False, None, None, outs=(t(1, 2, 1000, 96, dtype=BF16), t(1, 2, 1000))),
    "its gradients": call(
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        *(t(1, 2, 1000, 96, dtype=BF16),) * 5, t(1, 2, 1000), 0.0, True, None, None,
        outs=(t(1, 2, 1000, 96, dtype=BF16),) * 3),
    "a long bias": call(
        "linear", t(1, 640), t(32000, 640), t(32000), outs=(t(1, 32000),)),
}  # fmt: skip


@pytest.mark.parametrize("core", [TRN1, TRN2], ids=["trn1", "trn2"])
@pytest.mark.parametrize("name", ONCE_FAILED)
def test_has_a_program(name: str, core: CoreSpec) -> None:
    for shards in (1, 2):
        assert schedule(lower(ONCE_FAILED[name], core, shards), core).duration_ps >= 0


def test_64_bit_elements_are_turned_by_halves() -> None:
    def turned(dtype: torch.dtype) -> Program:
        source = TensorSpec(dtype, (128, 128), (1, 128))
        return lower(call("clone", source, None, outs=(t(128, 128, dtype=dtype),)), TRN2, 1)

    def transposes(built: Program) -> int:
        return sum("nc_transpose" in line for line in str(built).splitlines())

    assert transposes(turned(I64)) == 2 * transposes(turned(F32)) > 0


def test_depthwise_weight_gradient_reads_every_output_channel() -> None:
    mask = (False, True, False)
    grad, x, w = t(4, 96, 32, 32), t(4, 32, 32, 32), t(96, 1, 3, 3)
    args = (grad, x, w, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 32, mask)
    built = lower(call("convolution_backward", *args, outs=(x, w, t(96))), TRN2, 1)
    assert built.hbm_read_bytes >= grad.nbytes + x.nbytes


# -- operands that must be turned ------------------------------------------------------------------
def product(core: CoreSpec, size: int, dtype: torch.dtype, *, right: bool) -> Program:
    """a @ b with a row-major, so that it is turned, and b likewise where `right`."""
    b = flipped(size, size, dtype) if right else t(size, size, dtype=dtype)
    a = t(size, size, dtype=dtype)
    return lower(call("mm", a, b, outs=(a,)), core, 1)


@pytest.mark.parametrize("size", [2048, 8192])
@pytest.mark.parametrize("right", [False, True], ids=["a", "a and b"])
def test_an_operand_is_turned_once(size: int, right: bool) -> None:
    # TensorE: a matmul of 512 columns takes 4 x 213,333 ps in fp32, a transpose 158,667 ps.
    built = product(TRN2, size, F32, right=right)
    matmuls, transposes = (size // 128) ** 2 * (size // 512), (size // 128) ** 2
    expected = matmuls * 853_333 + (2 if right else 1) * transposes * 158_667
    assert schedule(built, TRN2).busy_ps[0] == expected


@pytest.mark.parametrize(
    ("core", "dtype", "right", "share"),
    [
        (TRN1, BF16, False, 0.83), (TRN1, BF16, True, 0.75), (TRN1, F32, False, 0.85),
        (TRN1, F32, True, 0.84), (TRN2, F32, False, 0.98), (TRN2, F32, True, 0.96),
        (TRN2, BF16, True, 0.99),
    ],
)  # fmt: skip
def test_turned_operands_leave_the_array_busy(
    core: CoreSpec, dtype: torch.dtype, right: bool, share: float
) -> None:
    built = product(core, 8192, dtype, right=right)
    reached = built.flops * 10**12 / schedule(built, core).duration_ps
    assert reached > share * core.peak_flops(dtype)


# -- attention over several key blocks -------------------------------------------------------------
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [512, 1024, 1152, 2048, 3072, 4096, 32768])
def test_attention_does_every_key_block_and_stores_once(length: int, causal: bool) -> None:
    q, lse = t(1, 2, length, 64, dtype=BF16), t(1, 2, length)
    name = "_scaled_dot_product_flash_attention_for_cpu"
    built = lower(call(name, q, q, q, 0.0, causal, None, None, outs=(q, lse)), TRN2, 1)
    whole = 4 * 2 * length * length * 64
    assert built.hbm_write_bytes == q.nbytes + lse.nbytes
    if causal:
        assert whole // 2 < built.flops <= whole // 2 + 4 * 2 * length * 64 * 1024
    else:
        assert built.flops == whole


@pytest.mark.parametrize(
    ("core", "shape", "forward", "backward"),
    [
        (TRN2, (1, 16, 4096, 128), 0.96, 0.92), (TRN2, (8, 12, 512, 64), 0.98, 0.77),
        (TRN1, (1, 16, 4096, 128), 0.89, 0.89),
    ],
)  # fmt: skip
def test_attention_keeps_the_array_busy(
    core: CoreSpec, shape: tuple[int, ...], forward: float, backward: float
) -> None:
    q, lse = t(*shape, dtype=BF16), t(*shape[:3])
    name = "_scaled_dot_product_flash_attention_for_cpu"
    first = call(name, q, q, q, 0.0, False, None, None, outs=(q, lse))
    args = (q, q, q, q, q, lse, 0.0, False, None, None)
    second = call(f"{name}_backward", *args, outs=(q, q, q))
    for operation, share in ((first, forward), (second, backward)):
        timeline = schedule(lower(operation, core, 1), core)
        assert timeline.busy_ps[0] > share * timeline.duration_ps


def test_one_query_of_grouped_heads_reads_each_key_once() -> None:
    q, k, lse = t(1, 32, 1, 128, dtype=BF16), t(1, 8, 4096, 128, dtype=BF16), t(1, 32, 1)
    name = "_scaled_dot_product_flash_attention_for_cpu"
    built = lower(call(name, q, k, k, 0.0, False, None, None, outs=(q, lse)), TRN2, 1)
    assert built.hbm_read_bytes == q.nbytes + 2 * k.nbytes


# -- time to lower ---------------------------------------------------------------------------------
def _attention(length: int) -> OpCall:
    q, lse = t(1, 8, length, 64, dtype=BF16), t(1, 8, length)
    name = "_scaled_dot_product_fused_attention_overrideable"
    return call(name, q, q, q, None, 0.0, True, False, outs=(q, lse))


def _attention_backward(length: int) -> OpCall:
    q, lse = t(1, 8, length, 64, dtype=BF16), t(1, 8, length)
    name = "_scaled_dot_product_fused_attention_overrideable_backward"
    args = (q, q, q, q, None, (True,) * 4, q, lse, None, None, length, length, 0.0, True)
    return call(name, *args, None, None, None, outs=(q, q, q))


LONG = {
    "cat": call("cat", (t(1),) * 1000, 0, outs=(t(1000),)),
    "unbind_copy": call("unbind_copy.int", t(1000, 64), 0, outs=(t(64),) * 1000),
    "foreach_norm": call("_foreach_norm.Scalar", tuple(t(900 + i) for i in range(1000)), 2,
                         outs=(t(),) * 1000),
    "attention": _attention(1 << 20),
    "attention backward": _attention_backward(1 << 20),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_a_program_does_not_grow_with_the_length(name: str) -> None:
    start_s = time.process_time()
    built = lower(LONG[name], TRN2, 1)
    assert time.process_time() - start_s < 2
    assert len(str(built).splitlines()) < 10_000
