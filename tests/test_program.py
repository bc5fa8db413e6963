"""Programs: text, counts from trip counts, index arithmetic, capacity and builder errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import torch

from torch_trn.chip import system
from torch_trn.errors import CapacityError, TrnError, UnsupportedOpError
from torch_trn.isa import Engine
from torch_trn.memory import Affine, LoopVar, Pool, Space
from torch_trn.program import Builder, Program

TRN2 = system("trn2.48xlarge").chip.core
BF16 = torch.bfloat16

MATMUL_TEXT = """\
program mm: 36 instructions, 268435456 flops, HBM read 524288 B, HBM write 524288 B
hbm a 1048576 B
hbm c 524288 B
sbuf a_KM 2 x 1024 B/partition
sbuf w 4 x 256 B/partition
psum acc 2 x 2048 B/partition
sbuf out 1 x 1024 B/partition
for m in 4:
    a_KM[m] = dma_copy(a) rows=128 row_bytes=1024 queue=load
    for k in 4:
        acc[m] = nc_matmul(w[k + 1], a_KM[m]) k=128 m=128 n=512 bfloat16 accumulate
    out = activation(acc[m], w[4*m]) gelu n=512 float32->bfloat16 ScalarE
    out = tensor_copy(out) n=512 bfloat16 GpSimdE
    for i in 2:
        c = dma_copy(out) rows=64 row_bytes=1024 partitions=64 queue=store
"""


def matmul() -> Program:
    b = Builder(TRN2, "mm")
    a, c = b.hbm("a", nbytes=1 << 20), b.hbm("c", nbytes=1 << 19)
    a_tile = b.sbuf("a_KM", free_bytes=1024, slots=2)
    w = b.sbuf("w", free_bytes=256, slots=4)
    acc = b.psum("acc", free_bytes=2048, slots=2)
    out = b.sbuf("out", free_bytes=1024)
    with b.repeat(4, "m") as m:
        b.load(a_tile[m], a, rows=128, row_bytes=1024)
        with b.repeat(4, "k") as k:
            b.nc_matmul(
                acc[m], stationary=w[k + 1], moving=a_tile[m], k=128, m=128, n=512, dtype=BF16,
                accumulate=True,
            )  # fmt: skip
        b.activation(out, [acc[m], w[m * 4]], op="gelu", n=512, out_dtype=BF16)
        b.tensor_copy(out, out, n=512, dtype=BF16, engine=Engine.GPSIMD)
        with b.repeat(2, "i"):
            b.store(c, out, rows=64, row_bytes=1024, partitions=64)
    return b.build()


def test_text() -> None:
    assert str(matmul()) == MATMUL_TEXT.rstrip()


def test_counts_come_from_trip_counts() -> None:
    program = matmul()
    assert program.instructions == 4 * (1 + 4 + 2 + 2)
    assert program.flops == 16 * 2 * 128 * 128 * 512
    assert program.hbm_read_bytes == 4 * 128 * 1024
    assert program.hbm_write_bytes == 4 * 2 * 64 * 1024


def test_counts_of_a_huge_program_are_immediate() -> None:
    b = Builder(TRN2, "huge")
    tile = b.sbuf("t", free_bytes=4)
    with b.repeat(10**9, "i"), b.repeat(10**9, "j"):
        b.memset(tile, n=1)
    assert b.build().instructions == 10**18


def test_traffic_by_direction() -> None:
    b = Builder(TRN2, "traffic")
    x, y = b.hbm("x", nbytes=1 << 20), b.hbm("y", nbytes=1 << 20)
    tile = b.sbuf("t", free_bytes=64)
    b.copy_hbm(y, x, rows=10, row_bytes=64)
    b.copy_sbuf(tile, tile, rows=10, row_bytes=64)
    b.store(y, tile, rows=10, row_bytes=64, accumulate=True)
    program = b.build()
    assert (program.hbm_read_bytes, program.hbm_write_bytes) == (1280, 1280)


def test_zero_trips_and_empty_programs() -> None:
    b = Builder(TRN2, "empty")
    tile = b.sbuf("t", free_bytes=4)
    with b.repeat(0, "i") as i:
        b.memset(tile[i], n=1)
    assert b.build().instructions == 0
    assert Builder(TRN2, "nothing").build().flops == 0


def test_program_is_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        matmul().name = "other"  # type: ignore[misc]


def test_index_arithmetic() -> None:
    m, k = LoopVar("m", 0), LoopVar("k", 1)
    pool = Pool("x", Space.SBUF, 4, slots=2)
    assert str(pool[m * 4 + k + 1]) == "x[4*m + k + 1]"
    assert str(pool[2 * (m - k) - m]) == "x[m + -2*k]"
    assert str(pool[3 - m]) == "x[-1*m + 3]"
    assert str(pool[m - m]) == "x[0]"
    assert 1 + m == m + 1 == Affine(1, ((m, 1),))
    assert 1 - m == Affine(1, ((m, -1),))
    with pytest.raises(TypeError, match="an index is affine"):
        m.affine() * k  # type: ignore[operator]


def test_sbuf_capacity() -> None:
    b = Builder(TRN2, "big")
    b.sbuf("x", free_bytes=100 * 1024, slots=2)
    assert b.sbuf_room_bytes == 24 * 1024
    with pytest.raises(CapacityError) as error:
        b.sbuf("y", free_bytes=16 * 1024, slots=2)
    assert str(error.value) == (
        'SBUF tile "y" needs 32768 bytes per partition, but 24576 of 229376 are left: '
        "use fewer slots or a smaller free size"
    )
    assert error.value.room == 24576


def test_psum_capacity_is_in_banks() -> None:
    b = Builder(TRN2, "big")
    b.psum("acc", free_bytes=2049, slots=3)
    assert b.psum_room_banks == 2
    with pytest.raises(CapacityError) as error:
        b.psum("more", free_bytes=512, slots=3)
    assert str(error.value) == (
        'PSUM tile "more" needs 3 banks, but 2 of 8 are left: '
        "use fewer slots or a smaller free size"
    )


def test_errors_are_trn_errors() -> None:
    error = UnsupportedOpError("aten::svd", "no decomposition fits the engines")
    assert isinstance(error, TrnError)
    assert (error.name, error.reason) == ("aten::svd", "no decomposition fits the engines")
    assert str(error) == ("aten::svd has no NeuronCore lowering: no decomposition fits the engines")
    assert issubclass(CapacityError, TrnError)


def load_too_much(b: Builder, x: Pool, t: Pool, p: Pool) -> None:
    b.load(t, x, rows=256, row_bytes=512)


def write_too_much(b: Builder, x: Pool, t: Pool, p: Pool) -> None:
    b.tensor_copy(t, t, n=512)


def load_into_psum(b: Builder, x: Pool, t: Pool, p: Pool) -> None:
    b.load(p, x, rows=1, row_bytes=4)


def matmul_into_sbuf(b: Builder, x: Pool, t: Pool, p: Pool) -> None:
    b.nc_matmul(t, stationary=t, moving=t, k=1, m=1, n=1, dtype=BF16)


def matmul_over_a_bank(b: Builder, x: Pool, t: Pool, p: Pool) -> None:
    b.nc_matmul(p, stationary=t, moving=t, k=1, m=1, n=512, dtype=BF16)


def foreign_tile(b: Builder, x: Pool, t: Pool, p: Pool) -> None:
    b.memset(Builder(TRN2, "other").sbuf("s", free_bytes=4), n=1)


def closed_loop(b: Builder, x: Pool, t: Pool, p: Pool) -> None:
    with b.repeat(2, "m") as m:
        pass
    b.memset(t[m], n=1)


def gpsimd_on_psum(b: Builder, x: Pool, t: Pool, p: Pool) -> None:
    b.tensor_copy(t, p, n=1, engine=Engine.GPSIMD)


def negative_trips(b: Builder, x: Pool, t: Pool, p: Pool) -> None:
    with b.repeat(-1, "m"):
        pass


def no_slots(b: Builder, x: Pool, t: Pool, p: Pool) -> None:
    b.sbuf("none", free_bytes=4, slots=0)


def open_loop(b: Builder, x: Pool, t: Pool, p: Pool) -> None:
    with b.repeat(1, "m"):
        b.build()


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (
            load_too_much,
            "dma_copy of 256 rows of 512 B in p: 1024 bytes per partition do not fit into t of 512",
        ),
        (write_too_much, "tensor_copy in p: 2048 bytes per partition do not fit into t of 512"),
        (load_into_psum, "load in p: destination acc is in PSUM, but must be in SBUF"),
        (matmul_into_sbuf, "nc_matmul in p: destination t is in SBUF, but must be in PSUM"),
        (matmul_over_a_bank, "nc_matmul in p: 2048 bytes per partition do not fit into acc of 512"),
        (foreign_tile, "memset in p: s is a tile of another Builder"),
        (closed_loop, "memset in p: t[m] uses loop variable m outside its loop"),
        (
            gpsimd_on_psum,
            "tensor_copy: operand space is PSUM, but must be SBUF: GpSimdE has no PSUM port",
        ),
        (negative_trips, "loop m of p: trips is -1, but must be >= 0"),
        (
            no_slots,
            "SBUF none: 0 slots of 4 bytes, but must be at least 1 slot of at least 0 bytes",
        ),
        (open_loop, "program p: loop m is still open"),
    ],
)
def test_wrong_use_names_value_and_limit(
    wrong: Callable[[Builder, Pool, Pool, Pool], None], text: str
) -> None:
    b = Builder(TRN2, "p")
    x = b.hbm("x", nbytes=1 << 20)
    tiles = b.sbuf("t", free_bytes=512, slots=2), b.psum("acc", free_bytes=512)
    with pytest.raises(ValueError) as error:
        wrong(b, x, *tiles)
    assert str(error.value) == text


def test_every_elementwise_method_builds() -> None:
    b = Builder(TRN2, "all")
    x, y, z = (b.sbuf(name, free_bytes=4096) for name in "xyz")
    row = b.sbuf("row", free_bytes=32)
    b.activation(x, y, op="exp", n=8, reduce=row)
    b.tensor_scalar(x, [y, row], op="multiply", operands=(None,), n=8, reduce=row)
    b.tensor_tensor(x, y, z, op="add", n=8)
    b.scalar_tensor_tensor(x, y, z, op="multiply,add", scalar=2.0, n=8)
    b.tensor_tensor_scan(x, y, z, op="multiply,add", n=8)
    b.tensor_reduce(row, x, op="max", n=1024)
    b.tensor_copy_predicated(x, y, z, n=8)
    b.select(x, y, z, x, n=8)
    b.reciprocal(x, y, n=8)
    b.bn_stats(row, x, n=512)
    b.bn_aggr(row, x, n=6)
    b.memset(x, n=8)
    b.iota(x, n=8, dtype=torch.int32)
    b.rng(x, n=8)
    b.affine_select(x, y, op="is_ge", n=8)
    b.range_select(x, y, op="is_ge,is_lt", low=0, high=4, n=8)
    b.local_gather(x, y, z, n=8, elements_per_index=4)
    b.max8(row, x, n=1024)
    b.nc_find_index8(row, x, row, n=1024)
    b.nc_match_replace8(x, y, row, n=8, replacement=0.0)
    b.nc_stream_shuffle(x, y, mask=tuple(range(32)), n=8)
    b.dropout(x, y, n=8, rate=0.5, dtype=BF16, partitions=4, strided=True)
    b.custom_op(x, [y], op="lgamma", n=8, cycles_each=64)
    assert b.build().instructions == 23
