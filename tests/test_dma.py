"""DMA: queues over sixteen engines, against the published stream measurements of trn1."""

from __future__ import annotations

import pytest
from test_scheduler import NS, ROUND

from torch_trn.chip import CoreSpec, system
from torch_trn.isa import Engine
from torch_trn.program import Builder, Program
from torch_trn.scheduler import schedule

TRN1 = system("trn1.2xlarge").chip.core


def stream(core: CoreSpec, kind: str, row_bytes: int, tiles: int) -> Program:
    """`tiles` transfers of 128 rows: loads, stores, or copies within HBM."""
    b = Builder(core, kind)
    x, y = b.hbm("x", nbytes=1 << 31), b.hbm("y", nbytes=1 << 31)
    t = b.sbuf("t", free_bytes=row_bytes, slots=4)
    with b.repeat(tiles, "i") as i:
        if kind == "load":
            b.load(t[i], x, rows=128, row_bytes=row_bytes)
        elif kind == "store":
            b.store(y, t[i], rows=128, row_bytes=row_bytes)
        else:
            b.copy_hbm(y, x, rows=128, row_bytes=row_bytes)
    return b.build()


def rate(kind: str, row_bytes: int) -> float:
    """GB/s on trn1 over 2048 transfers; copies count both ways, as the measurement does."""
    program = stream(TRN1, kind, row_bytes, 2048)
    moved = program.hbm_read_bytes + program.hbm_write_bytes
    return moved * 1e3 / schedule(program, TRN1).duration_ps


# (kind, bytes of a row, GB/s measured, row of the measurements)
STREAMS = (
    ("load", 4096, 269.5, "O030"),
    ("load", 32768, 271.1, "O032"),
    ("load", 1024, 208.4, "O033"),
    ("store", 4096, 254.1, "O036"),
    ("store", 16384, 274.4, "O037"),
    ("store", 1024, 229.0, "O038"),
    ("copy", 4096, 307.9, "O044"),
)


@pytest.mark.parametrize(("kind", "row_bytes", "measured", "source"), STREAMS)
def test_streams(kind: str, row_bytes: int, measured: float, source: str) -> None:
    assert abs(rate(kind, row_bytes) / measured - 1) <= 0.10, source


@pytest.mark.parametrize(("kind", "row_bytes", "each_ps"), [
    # 8 descriptors an engine: 36 ns + 1024 B at 27.2 B/ns = 73,648 ps each.
    ("load", 1024, 8 * 73_648),
    ("store", 1024, 8 * 73_648),
    # 4096 B at 17.06 B/ns take longer than that law: 240,094 ps each.
    ("load", 4096, 8 * 240_094),
    # Between HBM and HBM 1.79 times that.
    ("copy", 4096, 8 * 429_768),
])  # fmt: skip
def test_three_transfers_to_the_picosecond(kind: str, row_bytes: int, each_ps: int) -> None:
    timeline = schedule(stream(TRN1, kind, row_bytes, 3), TRN1)
    assert timeline.busy_ps[Engine.DMA] == 3 * each_ps
    assert timeline.duration_ps == 3 * each_ps + 1_300_000


def few_engines(queues: tuple[str, str]) -> Program:
    b = Builder(ROUND, "few")
    x = b.hbm("x", nbytes=1 << 20)
    t, u = b.sbuf("t", free_bytes=8192), b.sbuf("u", free_bytes=8192)
    b.load(t, x, rows=32, row_bytes=8000, queue=queues[0])
    b.load(u, x, rows=32, row_bytes=8000, queue=queues[1])
    return b.build()


def test_few_partitions_have_few_engines() -> None:
    # 32 partitions are 4 of the 16 engines: 8 descriptors of 1000 ns each, so 8000 ns for what is
    # 2000 ns of all engines. A queue waits for its own; another one uses the other engines.
    one = schedule(few_engines(("load", "load")), ROUND)
    assert one.duration_ps == (8000 + 8000 + 1000) * NS
    assert one.busy_ps[Engine.DMA] == 4000 * NS
    assert one.idle_ps[Engine.DMA] == {"queue": 6000 * NS, "end": 7000 * NS}
    two = schedule(few_engines(("load", "other")), ROUND)
    assert two.duration_ps == (2000 + 8000 + 1000) * NS
    assert two.waits_ps == {"DMA for bandwidth": 2000 * NS}


def test_a_transfer_that_is_interrupted_keeps_its_own_engines_until_they_are_done() -> None:
    b = Builder(ROUND, "interrupted")
    x, y = b.hbm("x", nbytes=1 << 20), b.hbm("y", nbytes=1 << 20)
    t, late = b.sbuf("t", free_bytes=8192), b.sbuf("late", free_bytes=65536)
    b.memset(late, n=400)
    b.store(y, late, rows=128, row_bytes=1000)
    b.load(t, x, rows=32, row_bytes=8000)
    timeline = schedule(b.build(), ROUND, spans=True)
    assert [(s.queue, s.start_ps // NS, s.end_ps // NS) for s in timeline.spans[1:]] == [
        ("load", 0, 500),
        ("store", 500, 1500),
        ("load", 1500, 3000),
    ]
    # From 1500 on its engines need three quarters of their 8000 ns, and from 0 on all of them.
    assert timeline.duration_ps == (8000 + 1000) * NS


def test_idle_dma_time_goes_to_who_ended_it() -> None:
    b = Builder(ROUND, "idle")
    y = b.hbm("y", nbytes=1 << 20)
    late, slow = b.sbuf("late", free_bytes=65536), b.sbuf("slow", free_bytes=65536)
    b.memset(late, n=9000)
    b.store(y, late, rows=128, row_bytes=1000)
    # Runs before the store, in time that was the store's to wait.
    b.iota(slow, n=3000)
    b.store(y, slow, rows=128, row_bytes=1000, queue="second")
    timeline = schedule(b.build(), ROUND)
    assert timeline.idle_ps[Engine.DMA] == {
        "tile slow": 3100 * NS,
        "tile late": (9100 - 4100) * NS,
        "end": 1000 * NS,
    }
