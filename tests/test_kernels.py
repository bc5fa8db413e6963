"""The published kernels at small sizes: what they move and compute, and some exact times."""

from __future__ import annotations

import pytest
import torch
from kernels import (
    coalesced_gemm,
    instruction,
    mamba,
    matmul_tutorial,
    nkibench,
    nkibench_attention,
    nkibench_lora,
    nkibench_mlp,
    operator,
    stream,
)

from torch_trn.chip import system
from torch_trn.isa import Engine
from torch_trn.program import Program
from torch_trn.scheduler import schedule

CORE = system("trn1.32xlarge").chip.core
MIB = 1 << 20


def counts(program: Program) -> tuple[int, int, int, int]:
    """Instructions, flops, HBM bytes read and written; the Program must be schedulable."""
    assert schedule(program, CORE).instructions == program.instructions
    return (
        program.instructions, program.flops, program.hbm_read_bytes, program.hbm_write_bytes
    )  # fmt: skip


def test_streams() -> None:
    assert counts(stream.read(CORE, nbytes=4 * MIB, free=2048)) == (8 * 2 + 1, 0, 4 * MIB, 512)
    square = stream.read(CORE, nbytes=4 * MIB, free=2048, square=True)
    assert counts(square) == (8 * 3 + 1, 0, 4 * MIB, 512)
    assert counts(stream.write(CORE, nbytes=4 * MIB, free=512)) == (32 + 1, 0, 0, 4 * MIB)
    assert counts(stream.copy(CORE, nbytes=4 * MIB, free=2048)) == (8, 0, 4 * MIB, 4 * MIB)


def test_streams_reach_the_usable_rate() -> None:
    """Rows of 4 KiB at 273 GB/s, of 1 KiB at 222; from HBM to HBM 305 counting both ways."""
    for program, gb_per_s in (
        (stream.write(CORE, nbytes=512 * MIB, free=2048), 272.6),
        (stream.write(CORE, nbytes=512 * MIB, free=512), 222.3),
        (stream.copy(CORE, nbytes=512 * MIB, free=2048), 304.9),
    ):
        moved = program.hbm_read_bytes + program.hbm_write_bytes
        duration_ps = schedule(program, CORE).duration_ps
        assert round(moved / duration_ps * 1e3, 1) == gb_per_s, program.name


@pytest.mark.parametrize(
    ("build", "instructions", "lhs_reads", "rhs_reads"),
    [
        # Per result tile a copy and a store; the rest are two loads and a matmul for each k tile.
        (matmul_tutorial.tiled, 64 * 16 * 3 + 64 * 2, 4, 16),
        (matmul_tutorial.hoisted, 64 * 16 * 2 + 16 * 16 + 64 * 2, 1, 16),
        (matmul_tutorial.free_blocked, 64 * 16 + 16 * 16 * 3 + 64 * 2, 1, 8),
    ],
)
def test_tutorial_matmuls(build: object, instructions: int, lhs_reads: int, rhs_reads: int) -> None:
    m, k, n = 2048, 2048, 2048
    program = build(CORE, m=m, k=k, n=n)  # type: ignore[operator]
    read = 2 * k * m * lhs_reads + 2 * k * n * rhs_reads
    assert counts(program) == (instructions, 2 * m * k * n, read, 2 * m * n)


def test_fully_blocked_tutorial_matmul() -> None:
    m, k, n = 2048, 2048, 2048
    program = matmul_tutorial.fully_blocked(CORE, m=m, k=k, n=n)
    # 64 result tiles: cleared, added to twice, copied; 32 rows of two are stored.
    loads, matmuls = 2 * 2 * (8 + 8), 64 * 16
    assert counts(program) == (
        loads + matmuls + 64 * 4 + 32, 2 * m * k * n, 2 * 2 * k * m + 2 * k * n, 2 * m * n
    )  # fmt: skip


def test_coalesced_gemm() -> None:
    m, k, n = 2048, 1024, 2048
    program = coalesced_gemm.coalesced(CORE, m=m, k=k, n=n, coalesce=8, moving=512)
    panels, columns, steps = 2, 4, 8
    streamed, results = panels * columns * steps, panels * columns * 8
    assert counts(program) == (
        panels * steps + streamed * 9 + results * 2, 2 * m * k * n,
        2 * k * m + panels * 2 * k * n, 2 * m * n,
    )  # fmt: skip


def test_coalesced_gemm_loads_again_what_does_not_fit() -> None:
    """16 x 128 rows of k = 8192 take 256 KiB a partition: 41 of 64 k tiles stay."""
    m, k, n = 2048, 8192, 256
    program = coalesced_gemm.coalesced(CORE, m=m, k=k, n=n, coalesce=16, moving=128)
    kept = 41
    assert program.hbm_read_bytes == 2 * m * 128 * (kept + (64 - kept) * 2) + 2 * k * n


def test_mamba_versions_load_delta_and_u_once_or_for_each_state() -> None:
    channels, seq, state = 256, 512, 4
    tile, small = channels * seq * 4, state * 2 * (128 * 4 + 2 * seq * 4)
    for build, instructions, loads in (
        # memset; per tile and state 3 loads, 2 matmuls, exp, 4 on VectorE; v1 delta and u there.
        (mamba.v1, 1 + 2 + 8 * (2 + 1 + 10) + 2, 2 * state),
        (mamba.v2, 1 + 2 * (4 + 1) + 8 * 10, 2),
        (mamba.v3, 1 + 2 * (4 + 1) + 8 * (10 + 2), 2),
    ):
        program = build(CORE, channels=channels, seq=seq, state=state)
        assert program.instructions == instructions, program.name
        assert program.hbm_read_bytes == loads * tile + small, program.name
        assert program.hbm_write_bytes == tile, program.name


def test_mamba_in_psum_takes_six_n_of_vector_time() -> None:
    """6N and four times 95 fixed cycles a state; wider rows leave PSUM and take 8N."""
    for seq, share in ((512, 6), (1024, 8)):
        busy = [
            schedule(mamba.v2(CORE, channels=128, seq=seq, state=state), CORE).busy_ps[1]
            for state in (2, 3)
        ]
        assert round((busy[1] - busy[0]) * 1.12e-3) == share * seq + 4 * 95, seq


def test_mamba_spills_what_nine_tiles_exceed_sbuf_by() -> None:
    for seq, spilled in ((5120, 0), (6144, 24 << 10), (8192, 96 << 10)):
        program = mamba.v2(CORE, channels=128, seq=seq, state=3)
        row, tile = 128 * 4 + 2 * 4 * seq, 128 * 4 * seq
        kept = (
            tile if seq < 8192 else 128 * 26_360
        )  # What four working tiles, the window and small tiles leave.
        assert program.hbm_write_bytes == tile + 128 * spilled, seq
        assert program.hbm_read_bytes == 2 * kept + 3 * (row + 128 * spilled), seq
        assert ("queue=spill reload" in str(program)) == (spilled > 0), seq


def test_silu_and_rope() -> None:
    assert counts(nkibench.silu(CORE, m=256, n=2048)) == (4 * (2 + 2 * 4), 0, 2 * MIB, 2 * MIB)
    rope = nkibench.rope(CORE, width=128, rows=2048)
    assert counts(rope) == (4 * (3 + 1 + 6 + 1), 0, 2 * MIB, MIB)


def test_silu_takes_the_documented_cycles() -> None:
    """Per 512: exp and add on ScalarE, 512 + 144 each; a reciprocal of 2.4N and a product of 2N."""
    busy = schedule(nkibench.silu(CORE, m=128, n=1024), CORE).busy_ps
    assert busy[Engine.SCALAR] == 4 * round(656e12 / 1.4e9)
    assert busy[Engine.VECTOR] == 2 * (round(1324e12 / 1.12e9) + round(1119e12 / 1.12e9))


def test_swiglu_spills_its_turned_input_and_hidden_values() -> None:
    m, k, n = 1024, 1024, 2048
    program = nkibench_mlp.swiglu(CORE, m=m, k=k, n=n)
    x, hidden, weights = 4 * m * k, 4 * m * n, 3 * 4 * k * n
    assert program.hbm_read_bytes == x + x + weights + hidden
    assert program.hbm_write_bytes == x + hidden + x
    assert program.flops == 3 * 2 * m * k * n
    assert str(program).count("nc_transpose") == 1
    with pytest.raises(ValueError, match="swiglu is written for k = 1024, as its source, and not"):
        nkibench_mlp.swiglu(CORE, m=m, k=512, n=n)


def test_rmsnorm_matmul_reads_weights_once_and_repeats_transposes() -> None:
    m, k, n = 256, 1024, 2048
    program = nkibench_mlp.add_rmsnorm_matmul(CORE, m=m, k=k, n=n)
    assert program.hbm_read_bytes == 4 * (2 * m * k + k * n + k)
    assert program.hbm_write_bytes == 4 * m * n
    transposes = 2 * 4 * 8
    # 1 + 1 + 2 x 2 for the weight of the norm; 32 loads; 9 of the norm a row tile.
    assert program.instructions == 6 + 32 + 2 * (2 + 7) + transposes * 3 + 8 * 2
    # The weight gets onto all partitions as a product of one row.
    assert program.flops == 2 * m * k * n + 2 * 128 * k


def test_bmm_softmax_spills_all_but_the_last_columns() -> None:
    batch, m, n, k = 2, 256, 4096, 64
    program = nkibench_attention.bmm_softmax(CORE, batch=batch, m=m, n=n, k=k)
    scores = 4 * batch * m * n
    spilled = scores * 6 // 8
    constants = 4 * 128 * 128
    assert program.hbm_write_bytes == scores + spilled
    assert program.hbm_read_bytes == 4 * batch * (m * k + k * n) + spilled + constants
    assert program.flops == 2 * batch * m * n * k


def test_gqa_spills_all_scores() -> None:
    tokens, heads, kv_heads = 1024, 8, 4
    program = nkibench_attention.gqa_full(CORE, tokens=tokens, heads=heads, kv_heads=kv_heads)
    head = 4 * tokens * 128
    scores = 4 * heads * tokens * tokens
    assert program.hbm_write_bytes == heads * head + scores + heads * head
    # Queries come back for each half of the keys, values once a head.
    constants = 4 * 128 * 128
    assert (
        program.hbm_read_bytes == (heads + 2 * heads + kv_heads + heads) * head + scores + constants
    )
    assert program.flops == 2 * 2 * heads * tokens * tokens * 128


def test_lora_spills_sums_and_the_low_rank_part() -> None:
    m, k, n, rank = 512, 2048, 2048, 128
    program = nkibench_lora.lora(CORE, m=m, k=k, n=n, rank=rank)
    x, y = 4 * m * k, 4 * m * n
    assert program.flops == 2 * m * k * n + 2 * m * rank * (k + n)
    # x turned, the low-rank part, four partial sums; the result.
    assert program.hbm_write_bytes == x + y + 4 * y + y
    constants = 4 * 128 * 128
    assert program.hbm_read_bytes == (
        2 * x + x + 4 * k * n + 4 * rank * (k + n) + (3 + 1 + 1) * y + constants
    )


def test_single_instructions() -> None:
    """A dependent activation every 264 cycles of ScalarE: 189 ns (I001)."""
    one, two = (schedule(instruction.chain(CORE, n=1, count=count), CORE) for count in (1, 2))
    assert two.duration_ps - one.duration_ps == 148_571 + 40_000
    program = instruction.matmuls(CORE, count=32, dtype=torch.bfloat16)
    assert counts(program) == (32, 32 * 2 * 128 * 128 * 512, 0, 0)
    assert schedule(program, CORE).busy_ps[Engine.TENSOR] == 32 * 208_980
    program = instruction.descriptors(CORE, count=300, nbytes=1000)
    assert counts(program) == (300, 0, 300_000, 0)
    in_flight_ps = schedule(program, CORE).duration_ps - CORE.dma_start_ps
    assert in_flight_ps == 300 * (36_000 + 36_765)


def test_operators_come_from_their_lowerings() -> None:
    [mm] = operator.programs(CORE, torch.mm, (128, 256), (256, 512))
    assert (mm.flops, mm.hbm_write_bytes) == (2 * 128 * 256 * 512, 2 * 128 * 512)
    shapes = ((128, 64), (64, 192), (64, 64), (64, 256), (256, 64))
    found = operator.programs(CORE, lambda *x: operator.block(*x, heads=2), *shapes)
    assert sum(each.flops for each in found) == 2 * 128 * 64 * (192 + 64 + 512) + 4 * 128 * 128 * 64
