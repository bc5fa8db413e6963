"""Schedules: hand-computed times to the picosecond, and rates close to the hardware's."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest
import torch

from torch_trn import _sim
from torch_trn.chip import CoreSpec, system
from torch_trn.isa import Engine
from torch_trn.memory import Space
from torch_trn.program import Builder, Program, Step
from torch_trn.scheduler import schedule

TRN1 = system("trn1.2xlarge").chip.core
TRN2 = system("trn2.48xlarge").chip.core
BF16 = torch.bfloat16
NS = 1000

# A core of round numbers: one element or cycle is 1 ns on every engine, a full DMA of 128 rows of
# 1 KiB takes 8 x 128 ns, and a semaphore 100 ns.
ROUND = replace(
    TRN2,
    pe_hz=10**9,
    vector_hz=10**9,
    scalar_hz=10**9,
    gpsimd_hz=10**9,
    min_interval_cycles=64,
    vector_fixed_cycles=0,
    scalar_fixed_cycles=0,
    scalar_dependent_cycles=10,
    gpsimd_fixed_cycles=0,
    matmul_pair_floor_ps=200 * NS,
    dma_engine_bytes_per_s=8 * 10**9,
    dma_engine_raw_bytes_per_s=8 * 10**9,
    dma_descriptor_ps=0,
    dma_packet_bytes=8,
    dma_start_ps=1000 * NS,
    hbm_bytes_per_s=10**12,
    semaphore_ps=100 * NS,
)


def test_an_empty_program_takes_no_time() -> None:
    timeline = schedule(Builder(ROUND, "empty").build(), ROUND, spans=True)
    assert (timeline.duration_ps, timeline.busy_ps, timeline.spans) == (0, (0,) * 5, ())


def test_independent_instructions_of_one_engine_queue_up() -> None:
    b = Builder(ROUND, "queue")
    x, y = b.sbuf("x", free_bytes=4096), b.sbuf("y", free_bytes=4096)
    b.tensor_copy(x, y, n=300)
    b.tensor_scalar(x, y, op="add", n=200)
    timeline = schedule(b.build(), ROUND, spans=True)
    assert [(s.start_ps, s.end_ps, s.waited_for) for s in timeline.spans] == [
        (0, 300 * NS, ""),
        (300 * NS, 500 * NS, "queue"),
    ]
    assert timeline.duration_ps == 500 * NS


def test_another_engine_sees_data_a_semaphore_later() -> None:
    b = Builder(ROUND, "raw")
    x, y = b.sbuf("x", free_bytes=4096), b.sbuf("y", free_bytes=4096)
    b.tensor_copy(x, y, n=300)
    b.activation(y, x, op="exp", n=100)
    timeline = schedule(b.build(), ROUND, spans=True)
    last = timeline.spans[-1]
    assert (last.start_ps, last.end_ps, last.waited_for) == (400 * NS, 500 * NS, "tile x")
    assert timeline.waits_ps == {"ScalarE for tile x": 400 * NS}


def test_dependent_scalar_instructions_wait_for_the_result() -> None:
    b = Builder(ROUND, "chain")
    x = b.sbuf("x", free_bytes=4096)
    with b.repeat(3, "i"):
        b.activation(x, x, op="exp", n=64)
    timeline = schedule(b.build(), ROUND)
    assert timeline.busy_ps[Engine.SCALAR] == 3 * 64 * NS
    assert timeline.duration_ps == 3 * (64 + 10) * NS


def test_documented_chain_of_dependent_activations() -> None:
    b = Builder(TRN1, "chain")
    x = b.sbuf("x", free_bytes=4)
    with b.repeat(1000, "i"):
        b.activation(x, x, op="exp", n=1, partitions=1)
    assert schedule(b.build(), TRN1).duration_ps == 1000 * 188_571


def test_write_waits_for_readers_on_other_engines() -> None:
    b = Builder(ROUND, "war")
    x, y, z = (b.sbuf(name, free_bytes=4096) for name in "xyz")
    b.activation(y, x, op="exp", n=500)
    b.tensor_copy(z, x, n=64)
    b.memset(x, n=64)
    span = schedule(b.build(), ROUND, spans=True).spans[-1]
    assert (span.start_ps, span.waited_for) == (600 * NS, "slot x")


def test_write_waits_for_the_write_of_another_engine() -> None:
    b = Builder(ROUND, "waw")
    x = b.sbuf("x", free_bytes=4096)
    b.iota(x, n=500)
    b.memset(x, n=64)
    span = schedule(b.build(), ROUND, spans=True).spans[-1]
    assert (span.start_ps, span.waited_for) == (600 * NS, "slot x")


def test_load_start_latency_is_not_occupancy() -> None:
    b = Builder(ROUND, "loads")
    x = b.hbm("x", nbytes=1 << 20)
    t = b.sbuf("t", free_bytes=1024, slots=2)
    with b.repeat(2, "i") as i:
        b.load(t[i], x, rows=128, row_bytes=1024)
    b.memset(t[0], n=64)
    b.memset(t[1], n=64)
    timeline = schedule(b.build(), ROUND, spans=True)
    assert timeline.busy_ps[Engine.DMA] == 2 * 1024 * NS
    assert [span.start_ps for span in timeline.spans] == [0, 2024 * NS, 3048 * NS]
    assert timeline.spans[0].count == 2


def pipeline(core: CoreSpec, slots: int, tiles: int = 10) -> Program:
    b = Builder(core, "pipeline")
    x, y = b.hbm("x", nbytes=1 << 20), b.hbm("y", nbytes=1 << 20)
    t = b.sbuf("t", free_bytes=1024, slots=slots)
    with b.repeat(tiles, "i") as i:
        b.load(t[i], x, rows=128, row_bytes=1024)
        b.activation(t[i], t[i], op="exp", n=256)
        b.store(y, t[i], rows=128, row_bytes=1024)
    return b.build()


def test_one_slot_is_a_naive_kernel() -> None:
    # load 1024 + 1000, activation 256, result latency 10, semaphore 100, store 1024 + 1000.
    one = (1024 + 1000) + (256 + 10 + 100) + (1024 + 1000)
    assert schedule(pipeline(ROUND, 1), ROUND).duration_ps == 10 * one * NS


def test_more_slots_overlap_until_dma_is_the_limit() -> None:
    durations = [schedule(pipeline(ROUND, slots), ROUND).duration_ps // NS for slots in range(1, 9)]
    # All loads and stores back to back, 342 ns in which no tile is ready to be stored after the
    # last load, and 1000 ns until the last data have arrived.
    limit = 20 * 1024 + 342 + 1000
    assert durations == [44_140, 23_190, limit, limit, limit, limit, limit, limit]


def test_a_load_passes_a_waiting_store_of_another_queue() -> None:
    b = Builder(ROUND, "pass")
    x, y = b.hbm("x", nbytes=1 << 20), b.hbm("y", nbytes=1 << 20)
    t, late = b.sbuf("t", free_bytes=1024), b.sbuf("late", free_bytes=65536)
    b.memset(late, n=5000)
    b.store(y, late, rows=128, row_bytes=1024)
    b.load(t, x, rows=128, row_bytes=1024)
    timeline = schedule(b.build(), ROUND, spans=True)
    assert [(s.queue, s.start_ps, s.waited_for) for s in timeline.spans] == [
        ("VectorE", 0, ""),
        ("load", 0, ""),
        ("store", 5100 * NS, "tile late"),
    ]


def test_transfers_of_one_queue_keep_their_order() -> None:
    b = Builder(ROUND, "order")
    x, y = b.hbm("x", nbytes=1 << 20), b.hbm("y", nbytes=1 << 20)
    t, late = b.sbuf("t", free_bytes=1024), b.sbuf("late", free_bytes=65536)
    b.memset(late, n=5000)
    b.store(y, late, rows=128, row_bytes=1024, queue="q")
    b.load(t, x, rows=128, row_bytes=1024, queue="q")
    timeline = schedule(b.build(), ROUND, spans=True)
    assert timeline.spans[-1].end_ps == 5100 * NS + 2 * 1024 * NS
    assert timeline.spans[-1].count == 1


def test_a_gap_too_short_for_a_transfer_takes_a_part_of_it() -> None:
    b = Builder(ROUND, "split")
    x, y = b.hbm("x", nbytes=1 << 20), b.hbm("y", nbytes=1 << 20)
    t, late = b.sbuf("t", free_bytes=1024), b.sbuf("late", free_bytes=65536)
    b.memset(late, n=400)
    b.store(y, late, rows=128, row_bytes=1024)
    b.load(t, x, rows=128, row_bytes=1024)
    spans = schedule(b.build(), ROUND, spans=True).spans
    assert [(s.queue, s.start_ps // NS, s.end_ps // NS, s.waited_for) for s in spans[1:]] == [
        ("load", 0, 500, ""),
        ("store", 500, 1524, "tile late"),
        ("load", 1524, 2048, "bandwidth"),
    ]


def test_reading_back_hbm_waits_for_all_writes() -> None:
    b = Builder(ROUND, "spill")
    y = b.hbm("y", nbytes=1 << 20)
    t, u = b.sbuf("t", free_bytes=1024, slots=2), b.sbuf("u", free_bytes=1024)
    with b.repeat(2, "i") as i:
        b.store(y, t[i], rows=128, row_bytes=1024)
    b.load(u, y, rows=128, row_bytes=1024)
    spans = schedule(b.build(), ROUND, spans=True).spans
    assert [(s.start_ps // NS, s.count, s.waited_for) for s in spans] == [
        (0, 2, ""),
        (3048, 1, "tile y"),
    ]


def test_parts_of_an_hbm_tensor_are_independent() -> None:
    b = Builder(ROUND, "parts")
    y = b.hbm("y", nbytes=1 << 20, parts=2)
    t, u = b.sbuf("t", free_bytes=1024), b.sbuf("u", free_bytes=1024)
    b.store(y[0], t, rows=128, row_bytes=1024)
    b.load(u, y[1], rows=128, row_bytes=1024)
    assert schedule(b.build(), ROUND).duration_ps == (2 * 1024 + 1000) * NS


def weights(b: Builder, own_tile: bool) -> None:
    w = b.sbuf("w", free_bytes=256 if own_tile else 512)
    x = b.sbuf("x", free_bytes=256)
    acc = b.psum("acc", free_bytes=512)
    with b.repeat(3, "i"):
        b.nc_matmul(acc, stationary=w, moving=x, k=128, m=128, n=128, dtype=BF16)


def test_loaded_weights_are_not_loaded_again() -> None:
    b = Builder(ROUND, "reuse")
    weights(b, own_tile=True)
    assert schedule(b.build(), ROUND).duration_ps == (200 + 128 + 128) * NS


def test_a_tile_of_several_stationary_operands_is_always_loaded() -> None:
    b = Builder(ROUND, "no reuse")
    weights(b, own_tile=False)
    assert schedule(b.build(), ROUND).duration_ps == 3 * 200 * NS


def test_rewritten_weights_and_transposes_evict() -> None:
    b = Builder(ROUND, "evict")
    w, x = b.sbuf("w", free_bytes=256), b.sbuf("x", free_bytes=256)
    acc = b.psum("acc", free_bytes=512)
    for _ in range(2):
        b.nc_matmul(acc, stationary=w, moving=x, k=128, m=128, n=128, dtype=BF16)
        b.nc_transpose(acc, x, partitions=128, n=128, dtype=BF16)
    assert schedule(b.build(), ROUND).busy_ps[Engine.TENSOR] == 4 * 200 * NS


def matmul(core: CoreSpec, size: int, dtype: torch.dtype = BF16) -> Program:
    """size^3 with one column panel of b held in SBUF; a streams by rows of tiles."""
    b = Builder(core, "mm")
    k_tiles, width = size // 128, 512 * dtype.itemsize
    a_MK, b_KN, c_MN = (b.hbm(name, nbytes=size * size * dtype.itemsize) for name in "abc")
    panel = b.sbuf("b_KN", free_bytes=width, slots=2 * k_tiles)
    rows = b.sbuf("a_KM", free_bytes=k_tiles * 128 * dtype.itemsize, slots=3)
    acc = b.psum("acc", free_bytes=2048, slots=4)
    out = b.sbuf("out", free_bytes=width, slots=4)
    with b.repeat(size // 512, "n") as n:
        with b.repeat(k_tiles, "k") as k:
            b.load(panel[n * k_tiles + k], b_KN, rows=128, row_bytes=width)
        with b.repeat(size // 128, "m") as m:
            tile = n * (size // 128) + m
            b.load(rows[tile], a_MK, rows=128, row_bytes=k_tiles * 128 * dtype.itemsize)
            with b.repeat(k_tiles, "k") as k:
                b.nc_matmul(
                    acc[tile], stationary=rows[tile], moving=panel[n * k_tiles + k],
                    k=128, m=128, n=512, dtype=dtype, accumulate=True,
                )  # fmt: skip
            b.tensor_copy(out[tile], acc[tile], n=512, out_dtype=dtype)
            b.store(c_MN, out[tile], rows=128, row_bytes=width)
    return b.build()


@pytest.mark.parametrize(
    ("name", "dtype", "low", "high"),
    [
        ("trn1.2xlarge", BF16, 0.83, 0.88),
        ("trn2.48xlarge", BF16, 0.97, 1.0),
        ("trn3.48xlarge", BF16, 0.97, 1.0),
    ],
)
def test_matmul_8192_is_close_to_peak(
    name: str, dtype: torch.dtype, low: float, high: float
) -> None:
    core = system(name).chip.core
    program = matmul(core, 8192, dtype)
    seconds = schedule(program, core).duration_ps * 1e-12
    assert low <= program.flops / seconds / core.peak_flops(dtype) <= high


def test_streaming_reaches_the_usable_dma_rate() -> None:
    for core in (TRN1, TRN2):
        b = Builder(core, "stream")
        x, y = b.hbm("x", nbytes=1 << 30), b.hbm("y", nbytes=1 << 30)
        t = b.sbuf("t", free_bytes=8192, slots=4)
        with b.repeat(256, "i") as i:
            b.load(t[i], x, rows=128, row_bytes=8192)
            b.tensor_scalar(t[i], t[i], op="multiply", n=4096, dtype=BF16)
            b.store(y, t[i], rows=128, row_bytes=8192)
        program = b.build()
        moved = program.hbm_read_bytes + program.hbm_write_bytes
        rate = moved * 10**12 / schedule(program, core).duration_ps
        assert 0.97 * core.dma_bytes_per_s <= rate <= core.dma_bytes_per_s


def test_indices_wrap_around_the_slots_also_below_zero() -> None:
    """With index -i the slots of depth 3 are visited as 0, 2, 1: no slot is reused too early."""

    def durations(sign: int, slots: int) -> int:
        b = Builder(ROUND, "wrap")
        x = b.hbm("x", nbytes=1 << 20)
        t = b.sbuf("t", free_bytes=1024, slots=slots)
        y = b.sbuf("y", free_bytes=65536)
        with b.repeat(12, "i") as i:
            b.load(t[i * sign + 1], x, rows=128, row_bytes=1024)
            b.activation(y, t[i * sign + 1], op="exp", n=3000)
        return schedule(b.build(), ROUND).duration_ps

    for slots in (1, 2, 3, 4, 5):
        assert durations(-1, slots) == durations(1, slots) == durations(7 * slots + 1, slots)
    assert durations(1, 1) > durations(1, 2) >= durations(1, 3)


def test_faster_hardware_never_slows_the_pipeline() -> None:
    program = pipeline(TRN2, 3, tiles=50)
    base = schedule(program, TRN2).duration_ps
    for field in ("scalar_hz", "hbm_bytes_per_s", "dma_engine_bytes_per_s", "dma_engines"):
        faster = replace(TRN2, **{field: 2 * getattr(TRN2, field)})
        assert schedule(program, faster).duration_ps <= base


def test_an_instruction_that_the_core_cannot_run() -> None:
    trn3 = system("trn3.48xlarge").chip.core
    b = Builder(trn3, "wide")
    w, x = b.sbuf("w", free_bytes=256), b.sbuf("x", free_bytes=2048)
    b.nc_matmul(
        b.psum("acc", free_bytes=4096), stationary=w, moving=x, k=1, m=1, n=1024, dtype=BF16
    )
    program = b.build()
    assert schedule(program, trn3).duration_ps > 0
    with pytest.raises(ValueError, match="n is 1024, but must be 1 to 512"):
        schedule(program, TRN2)


def test_the_native_side_checks_its_tables() -> None:
    empty, odd = array("q"), array("q", [1, 2, 3])
    constants = (0, 1, 1, 0, 1000)
    with pytest.raises(ValueError, match="refs must be a flat table of int64 with 4 columns"):
        _sim.schedule((empty, empty, odd, empty, empty, empty), None, constants, 0, False, True)
    with pytest.raises(ValueError, match="ops must be a flat table of int64 with 3 columns"):
        _sim.schedule((*(empty,) * 5, array("b", [1] * 24)), None, constants, 0, False, True)


def test_too_many_operands() -> None:
    b = Builder(ROUND, "many")
    x = b.sbuf("x", free_bytes=4)
    b.activation(x, [x] * 12, op="exp", n=1)
    with pytest.raises(ValueError) as error:
        schedule(b.build(), ROUND)
    assert str(error.value) == "an instruction has 13 operands; the scheduler takes at most 12"


def test_loops_of_nothing_are_skipped() -> None:
    b = Builder(ROUND, "nothing")
    with b.repeat(10**12, "i"), b.repeat(10**6, "j"):
        pass
    assert schedule(b.build(), ROUND).duration_ps == 0


def test_spaces_are_those_of_the_pools() -> None:
    b = Builder(ROUND, "spaces")
    x, acc = b.sbuf("x", free_bytes=2048), b.psum("acc", free_bytes=2048)
    b.tensor_tensor(x, acc, x, op="max", n=512)
    step = b.build().body[0]
    assert isinstance(step, Step)
    assert step.instruction.sources == (Space.PSUM, Space.SBUF)  # type: ignore[attr-defined]
    assert schedule(b.build(), ROUND).duration_ps == 512 * NS
