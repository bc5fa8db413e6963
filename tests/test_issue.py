"""The issue pass: look-ahead, engines left open, and orders that are kept on other hardware."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_program import pipelines, programs
from test_lowering import GOLDEN
from test_scheduler import NS, ROUND
from test_timeline import expanded, slot

from torch_trn.chip import CoreSpec, system
from torch_trn.isa import Engine
from torch_trn.memory import Pool, Space
from torch_trn.program import Builder, Program
from torch_trn.scheduler import GRAPH_LOOK_AHEAD, schedule

TRN1 = system("trn1.2xlarge").chip.core
TRN2 = system("trn2.48xlarge").chip.core
BF16 = torch.bfloat16
EXAMPLES = settings(derandomize=True, deadline=None, max_examples=100)
RATES = (
    "pe_hz", "vector_hz", "scalar_hz", "gpsimd_hz", "dma_engines", "dma_engine_bytes_per_s",
    "dma_engine_raw_bytes_per_s", "hbm_bytes_per_s",
)  # fmt: skip


def two_chains() -> Program:
    """VectorE's first chain waits for a long memset; its second one could run meanwhile."""
    b = Builder(ROUND, "chains")
    a, c, d, e = (b.sbuf(name, free_bytes=4096) for name in "acde")
    b.iota(a, n=1000)
    b.tensor_copy(c, a, n=100)
    b.tensor_copy(d, c, n=100)
    b.tensor_copy(e, e, n=300)
    return b.build()


def test_program_order_waits() -> None:
    timeline = schedule(two_chains(), ROUND, spans=True)
    assert [(s.engine, s.start_ps // NS, s.count) for s in timeline.spans] == [
        (Engine.GPSIMD, 0, 1),
        (Engine.VECTOR, 1100, 1),
        (Engine.VECTOR, 1200, 1),
        (Engine.VECTOR, 1300, 1),
    ]


@pytest.mark.parametrize(("look_ahead", "last"), [(1, 1600), (2, 1600), (3, 1300), (16, 1300)])
def test_look_ahead_starts_what_can_start(look_ahead: int, last: int) -> None:
    assert schedule(two_chains(), ROUND, look_ahead=look_ahead).duration_ps == last * NS


def test_look_ahead_keeps_dependencies_in_order() -> None:
    spans = schedule(two_chains(), ROUND, look_ahead=16, spans=True).spans
    vector = [(s.start_ps // NS, s.end_ps // NS) for s in spans if s.engine == Engine.VECTOR]
    assert vector == [(0, 300), (1100, 1200), (1200, 1300)]


def test_queues_of_transfers_are_reordered_too() -> None:
    def program() -> Program:
        b = Builder(ROUND, "one queue")
        x, y = b.hbm("x", nbytes=1 << 20), b.hbm("y", nbytes=1 << 20)
        t, late = b.sbuf("t", free_bytes=1024), b.sbuf("late", free_bytes=65536)
        b.memset(late, n=5000)
        b.store(y, late, rows=128, row_bytes=1024, queue="q")
        b.load(t, x, rows=128, row_bytes=1024, queue="q")
        return b.build()

    assert schedule(program(), ROUND).duration_ps == (5100 + 2 * 1024 + 1000) * NS
    assert schedule(program(), ROUND, look_ahead=2).duration_ps == (5100 + 1024 + 1000) * NS


def test_negative_look_ahead() -> None:
    with pytest.raises(ValueError) as error:
        schedule(two_chains(), ROUND, look_ahead=-1)
    assert str(error.value) == "look_ahead is -1, but must be at least 0 (program order)"


Conflict = tuple[int, int]


def conflicts(program: Program) -> Iterator[Conflict]:
    """Pairs of instructions, by their place in the expanded Program, that must keep their order."""
    accesses: dict[tuple[Pool, int], list[tuple[int, bool]]] = {}
    for number, (step, counters) in enumerate(expanded(program.body, {})):
        mine = []
        for refs, writing in ((step.writes, True), (step.reads, False)):
            for ref in refs:
                key = slot(ref, counters)
                free = writing and key[0].space == Space.HBM
                for other, wrote in accesses.get(key, []):
                    if wrote and writing and free:
                        continue
                    if wrote or writing:
                        yield other, number
                mine.append((key, (number, writing)))
        for key, entry in mine:
            accesses.setdefault(key, []).append(entry)


def chain_ps(program: Program, core: CoreSpec) -> int:
    """The longest chain of instructions that depend on each other, by their occupancy alone."""
    steps = [step for step, _ in expanded(program.body, {})]
    # The shortest that each can take: weights may be loaded already.
    costs = [
        min(min(c.occupancy_ps, c.reuse_ps) for c in (i.cost(core) for i in choices))
        for choices in ((step.instruction, *step.alternatives) for step in steps)
    ]
    done = list(costs)
    for before, after in conflicts(program):
        done[after] = max(done[after], done[before] + costs[after])
    return max(done, default=0)


def check_timeline(program: Program, core: CoreSpec, look_ahead: int) -> None:
    timeline = schedule(program, core, look_ahead=look_ahead, spans=True)
    for engine in Engine:
        spans = [span for span in timeline.spans if span.engine == engine]
        assert all(a.end_ps <= b.start_ps for a, b in zip(spans, spans[1:], strict=False))
        busy_ps = sum(span.end_ps - span.start_ps for span in spans)
        last_ps = max((span.end_ps for span in spans), default=0)
        idle_ps = timeline.idle_ps[engine]
        assert busy_ps == timeline.busy_ps[engine]
        assert sum(idle_ps.values()) == timeline.duration_ps - busy_ps
        assert idle_ps.get("end", 0) == timeline.duration_ps - last_ps
        assert all(ps > 0 for ps in idle_ps.values())
    assert timeline.duration_ps >= max(timeline.busy_ps)
    assert timeline.duration_ps >= chain_ps(program, core)
    assert sum(span.count for span in timeline.spans) == program.instructions
    assert timeline.duration_ps == schedule(program, core, look_ahead=look_ahead).duration_ps


@EXAMPLES
@given(programs(TRN2, open_engines=True), st.sampled_from((0, 1, 2, 16)))
def test_any_program(program: Program, look_ahead: int) -> None:
    check_timeline(program, TRN2, look_ahead)


@pytest.mark.parametrize("look_ahead", [0, GRAPH_LOOK_AHEAD])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_lowerings(name: str, look_ahead: int) -> None:
    check_timeline(GOLDEN[name](), TRN2, look_ahead)


# -- engines left open -----------------------------------------------------------------------------
def open_copies(count: int) -> Program:
    b = Builder(ROUND, "open")
    x, y = b.sbuf("x", free_bytes=4096), b.sbuf("y", free_bytes=4096, slots=8)
    with b.repeat(count, "i") as i, b.any_engine():
        b.tensor_copy(y[i], x, n=400)
        b.activation(y[i], x, op="copy", n=600)
    return b.build()


def test_open_engines_in_text() -> None:
    assert str(open_copies(3)).splitlines()[-1] == (
        "    y[i] = tensor_copy(x) n=400 float32 VectorE or activation copy n=600 float32 ScalarE"
    )


@pytest.mark.parametrize("look_ahead", [0, 16])
def test_the_engine_that_is_done_first_is_taken(look_ahead: int) -> None:
    timeline = schedule(open_copies(5), ROUND, look_ahead=look_ahead, spans=True)
    # VectorE: 0, 400, 800; ScalarE: 0, 600. It is shown by the engine and name of a span.
    assert timeline.busy_ps == (0, 1200 * NS, 1200 * NS, 0, 0)
    assert [(str(s.engine), s.name, s.count) for s in timeline.spans] == [
        ("VectorE", "tensor_copy", 3),
        ("ScalarE", "activation", 2),
    ]


def test_any_engine_needs_one_effect_on_different_engines() -> None:
    b = Builder(ROUND, "wrong")
    x, y = b.sbuf("x", free_bytes=4096), b.sbuf("y", free_bytes=4096)
    with pytest.raises(ValueError) as error, b.any_engine():
        b.tensor_copy(x, y, n=1)
        b.tensor_scalar(x, y, op="add", n=1)
    assert str(error.value) == (
        "any_engine in wrong: instructions are of VectorE, VectorE, but must be of different "
        "compute engines"
    )
    with pytest.raises(ValueError, match="are of different tiles"), b.any_engine():
        b.tensor_copy(x, y, n=1)
        b.activation(y, x, op="copy", n=1)
    with pytest.raises(ValueError, match="needs instructions, and no loops"), b.any_engine():
        pass


# -- orders that are kept --------------------------------------------------------------------------
@EXAMPLES
@given(programs(TRN2, open_engines=True), st.sampled_from((0, 4)))
def test_the_kept_order_gives_the_same_timeline(program: Program, look_ahead: int) -> None:
    timeline = schedule(program, TRN2, look_ahead=look_ahead)
    assert schedule(program, TRN2, look_ahead=look_ahead, issued_for=TRN2) == timeline


@EXAMPLES
@given(
    st.one_of(programs(TRN2, open_engines=True), pipelines(TRN2)), st.sampled_from((0, 4)),
    st.sampled_from(RATES),
)  # fmt: skip
def test_twice_the_rate_slows_nothing(program: Program, look_ahead: int, rate: str) -> None:
    for core in (TRN1, TRN2):
        faster = replace(core, **{rate: 2 * getattr(core, rate)})
        before = schedule(program, core, look_ahead=look_ahead)
        after = schedule(program, faster, look_ahead=look_ahead, issued_for=core)
        assert after.duration_ps <= before.duration_ps


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", GOLDEN)
def test_twice_the_rate_slows_no_golden_lowering(name: str, rate: str) -> None:
    program = GOLDEN[name]()
    faster = replace(TRN2, **{rate: 2 * getattr(TRN2, rate)})
    for look_ahead in (0, GRAPH_LOOK_AHEAD):
        before = schedule(program, TRN2, look_ahead=look_ahead).duration_ps
        kept = schedule(program, faster, look_ahead=look_ahead, issued_for=TRN2)
        assert kept.duration_ps <= before


def test_orders_decided_anew_can_slow_a_program() -> None:
    """Why the order must be kept: no server that never idles while there is work is monotone.

    A store that is ready earlier goes first, and delays the load that all else waits for.
    """

    def program() -> Program:
        b = Builder(ROUND, "anomaly")
        x, y = b.hbm("x", nbytes=1 << 20), b.hbm("y", nbytes=1 << 20)
        early, t = b.sbuf("early", free_bytes=65536), b.sbuf("t", free_bytes=65536)
        b.memset(early, n=600)
        b.store(y, early, rows=128, row_bytes=8192)
        b.load(t, x, rows=128, row_bytes=512)
        b.iota(t, n=10_000)
        return b.build()

    faster = replace(ROUND, vector_hz=2 * ROUND.vector_hz)
    before = schedule(program(), ROUND).duration_ps
    assert schedule(program(), faster).duration_ps > before
    assert schedule(program(), faster, issued_for=ROUND).duration_ps == before
