"""Loops that repeat are not run to their end, and nothing of the result shows it."""

from __future__ import annotations

from dataclasses import replace

import lowering_rows_nn  # noqa: F401  (adds its rows)
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering_rows import ROWS
from random_program import pipelines, programs
from test_lowering import GOLDEN

from torch_trn.chip import CoreSpec, system
from torch_trn.lowering import OpCall, TensorSpec, lower
from torch_trn.program import Builder, Program
from torch_trn.scheduler import GRAPH_LOOK_AHEAD, schedule

TRN1 = system("trn1.2xlarge").chip.core
TRN2 = system("trn2.48xlarge").chip.core
BF16 = torch.bfloat16

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=150)
WAYS = st.tuples(st.sampled_from((0, 1, 3, 16)), st.sampled_from((True, False, "ramp")))


def run_in_full(
    program: Program, core: CoreSpec, look_ahead: int = 0, limiter: object = True
) -> int:
    """Asserts that nothing differs from a full run; returns how many instructions were run."""
    options = {"look_ahead": look_ahead, "limiter": limiter}
    short = schedule(program, core, **options)  # type: ignore[arg-type]
    full = schedule(program, core, extrapolate=False, **options)  # type: ignore[arg-type]
    assert short == full
    assert full.instructions_run == full.instructions == program.instructions
    return short.instructions_run


@EXAMPLES
@given(programs(TRN2, trips=(0, 1, 2, 7, 30), outer=(5, 90), open_engines=True), WAYS)
def test_any_program(program: Program, ways: tuple[int, object]) -> None:
    if program.instructions <= 30_000:
        run_in_full(program, TRN2, *ways)


@EXAMPLES
@given(pipelines(TRN2), WAYS, st.sampled_from((TRN1, TRN2)))
def test_any_pipeline(program: Program, ways: tuple[int, object], core: CoreSpec) -> None:
    run_in_full(program, core, *ways)


@pytest.mark.parametrize("look_ahead", [0, GRAPH_LOOK_AHEAD])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_lowerings(name: str, look_ahead: int) -> None:
    run_in_full(GOLDEN[name](), TRN2, look_ahead)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_every_lowering(name: str) -> None:
    for size in (129, 513, 2048):
        program = lower(ROWS[name](size).call(f"aten::{name}"), TRN2, 1)
        if program.instructions <= 100_000:
            run_in_full(program, TRN2)


def mm(size: int, dtype: torch.dtype) -> Program:
    spec = TensorSpec.contiguous(dtype, size, size)
    return lower(OpCall("aten::mm", (spec, spec), (spec,)), TRN2, 1)


def test_a_large_matmul_repeats_at_every_level() -> None:
    program = mm(8192, BF16)
    assert program.instructions == 69_120
    assert run_in_full(program, TRN2) <= 5_000


def test_parts_of_hbm_move_on_with_the_iterations() -> None:
    # The turned operand is written as 8192 parts of HBM, and read part by part later.
    program = mm(65536, torch.float32)
    timeline = schedule(program, TRN2)
    assert (timeline.instructions, timeline.duration_ps) == (36_118_528, 28_690_549_748_205)
    assert timeline.instructions_run <= 60_000


def test_counts_beyond_what_could_be_run() -> None:
    b = Builder(TRN2, "long")
    x = b.hbm("x", nbytes=1 << 20)
    t = b.sbuf("t", free_bytes=2048, slots=3)
    with b.repeat(10**6, "i") as i, b.repeat(10**3, "j") as j:
        b.load(t[i + j], x, rows=128, row_bytes=2048)
        b.activation(t[i + j], t[i + j], op="exp", n=512)
    timeline = schedule(b.build(), TRN2)
    each = timeline.busy_ps[2] // 10**9
    assert timeline.instructions == 2 * 10**9
    assert timeline.busy_ps[2] == 10**9 * each
    assert timeline.instructions_run <= 4_000


def test_what_was_skipped_is_seen_after_the_loop() -> None:
    """The last iterations' parts and slots hold back what comes after, and only they do."""
    for part in (0, 5, 1999):
        b = Builder(TRN2, "after")
        y = b.hbm("y", nbytes=1 << 20, parts=2000)
        t, u = b.sbuf("t", free_bytes=2048, slots=2), b.sbuf("u", free_bytes=2048)
        with b.repeat(2000, "i") as i:
            b.memset(t[i], n=512)
            b.store(y[i], t[i], rows=128, row_bytes=2048)
        b.load(u, y[part], rows=128, row_bytes=2048, queue="back")
        program = b.build()
        assert run_in_full(program, TRN2) < program.instructions // 10
    # A queue that did nothing so far may use the time in which DMA was idle.
    waiting = schedule(program, TRN2).waits_ps["DMA for tile y"]
    assert waiting == schedule(program, TRN2, extrapolate=False).waits_ps["DMA for tile y"]


def test_an_engine_left_idle_by_choice_does_not_hide_a_change_to_come() -> None:
    """VectorE falls behind until ScalarE, slower and idle so far, becomes the better choice."""
    core = replace(TRN2, scalar_hz=TRN2.scalar_hz // 40)
    b = Builder(core, "choice")
    # Writes to HBM wait for nothing, so ScalarE could start at any time.
    x, y = b.sbuf("x", free_bytes=2048), b.hbm("y", nbytes=2048)
    with b.repeat(400, "i"), b.any_engine():
        b.tensor_copy(y, x, n=512)
        b.activation(y, x, op="copy", n=512)
    program = b.build()
    for look_ahead in (0, 16):
        run_in_full(program, core, look_ahead)
        busy = schedule(program, core, look_ahead=look_ahead).busy_ps
        assert busy[1] > 0 and busy[2] > 0
