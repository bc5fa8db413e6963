"""Timelines: text, and what must hold for any Program, checked on random ones and a reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace

import pytest
from random_program import seeded

from torch_trn.chip import CoreSpec, system
from torch_trn.isa import Engine
from torch_trn.memory import LoopVar, Pool, TileRef
from torch_trn.program import Builder, Node, Program, Repeat, Step
from torch_trn.scheduler import schedule
from torch_trn.timeline import Timeline

TRN2 = system("trn2.48xlarge").chip.core

SCALE_TEXT = """\
5813372 ps: TensorE 0, VectorE 1264584, ScalarE 0, GpSimdE 0, DMA 3241440 busy
  waited 2892652 ps: DMA for tile tile
  waited 2288428 ps: VectorE for tile tile
  [0, 1620720) DMA/load dma_copy x2
  [2110360, 2742652) VectorE tensor_scalar x1, waited for tile tile
  [2892652, 4513372) DMA/store dma_copy x2, waited for tile tile
  [2920720, 3553012) VectorE tensor_scalar x1, waited for tile tile
"""


def scale() -> Timeline:
    b = Builder(TRN2, "scale")
    x, y = b.hbm("x", nbytes=1 << 19), b.hbm("y", nbytes=1 << 19)
    tile = b.sbuf("tile", free_bytes=2048, slots=2)
    with b.repeat(2, "m") as m:
        b.load(tile[m], x, rows=128, row_bytes=2048)
        b.tensor_scalar(tile[m], tile[m], op="multiply", n=512)
        b.store(y, tile[m], rows=128, row_bytes=2048)
    return schedule(b.build(), TRN2, spans=True)


def test_text() -> None:
    assert str(scale()) == SCALE_TEXT.rstrip()


def test_timeline_is_immutable() -> None:
    timeline = scale()
    with pytest.raises(FrozenInstanceError):
        timeline.duration_ps = 0  # type: ignore[misc]
    with pytest.raises(TypeError):
        timeline.waits_ps["x"] = 0  # type: ignore[index]


Counters = dict[LoopVar, int]


def expanded(body: tuple[Node, ...], counters: Counters) -> Iterator[tuple[Step, Counters]]:
    for node in body:
        if isinstance(node, Repeat):
            for count in range(node.trips):
                yield from expanded(node.body, {**counters, node.variable: count})
        else:
            yield node, counters


def slot(ref: TileRef, counters: Counters) -> tuple[Pool, int]:
    index = ref.index.constant
    index += sum(value * counters[variable] for variable, value in ref.index.terms)
    return ref.pool, index % ref.pool.slots


def reference_duration(program: Program, core: CoreSpec) -> int:
    """The rules of the scheduler without DMA, by keeping every access of every slot."""
    free: dict[Engine, int] = {}
    accesses: dict[tuple[Pool, int], list[tuple[bool, Engine, int, int]]] = {}
    duration = 0
    for step, counters in expanded(program.body, {}):
        engine, cost = step.instruction.engine_of, step.instruction.cost(core)
        start = free.get(engine, 0)
        for refs, writing in ((step.writes, True), (step.reads, False)):
            for ref in refs:
                for wrote, other, end, done in accesses.get(slot(ref, counters), []):
                    if other != engine and (wrote or writing):
                        start = max(start, (done if wrote else end) + core.semaphore_ps)
                    elif wrote and not writing:
                        start = max(start, done)
        end = start + cost.occupancy_ps
        for refs, writing in ((step.reads, False), (step.writes, True)):
            for ref in refs:
                entry = (writing, engine, end, end + cost.latency_ps)
                accesses.setdefault(slot(ref, counters), []).append(entry)
        free[engine] = end
        duration = max(duration, end + cost.latency_ps)
    return duration


@pytest.mark.parametrize("seed", range(40))
def test_against_a_reference_that_keeps_every_access(seed: int) -> None:
    core = replace(TRN2, matmul_pair_floor_ps=1)  # So that loaded weights make no difference.
    program = seeded(seed, TRN2, dma=False)
    assert schedule(program, core).duration_ps == reference_duration(program, core)


@pytest.mark.parametrize("seed", range(40))
def test_invariants_on_random_programs(seed: int) -> None:
    program = seeded(seed, TRN2, dma=True)
    timeline = schedule(program, TRN2, spans=True)
    assert timeline == schedule(program, TRN2, spans=True)
    assert timeline.instructions == program.instructions == sum(s.count for s in timeline.spans)
    assert timeline.duration_ps == schedule(program, TRN2).duration_ps
    starts = [span.start_ps for span in timeline.spans]
    assert starts == sorted(starts)
    for engine in Engine:
        spans = [span for span in timeline.spans if span.engine == engine]
        assert sum(span.end_ps - span.start_ps for span in spans) == timeline.busy_ps[engine]
        assert all(one.end_ps <= two.start_ps for one, two in zip(spans, spans[1:], strict=False))
        assert timeline.busy_ps[engine] <= timeline.duration_ps
        assert all(span.end_ps <= timeline.duration_ps for span in spans)
    floor = sum(
        step.instruction.cost(TRN2).occupancy_ps
        for step, _ in expanded(program.body, {})
        if step.instruction.engine_of == Engine.DMA
    )
    assert timeline.busy_ps[Engine.DMA] == floor
