"""The power limiter of TensorE: the sustained limit of a chip, and the ramp after idle time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_scheduler import NS, ROUND, matmul

from torch_trn.chip import system
from torch_trn.program import Builder, Program
from torch_trn.scheduler import schedule

TRN1 = system("trn1.2xlarge").chip.core
INF2 = system("inf2.xlarge").chip.core
TRN2 = system("trn2.48xlarge").chip.core
TRN3 = system("trn3.48xlarge").chip.core
BF16 = torch.bfloat16

# Matmuls of 500 ns at full rate; cold at half rate, hot after 4000 ns of use.
RAMP = replace(ROUND, pe_ramp_start_factor=0.5, pe_ramp_ps=4000 * NS, matmul_pair_floor_ps=1)


def bursts(*idle_ns: int, each: int = 1) -> Program:
    """`each` matmuls of 500 ns, and as many again after each time that GpSimdE takes."""
    b = Builder(RAMP, "bursts")
    w, x = b.sbuf("w", free_bytes=256), b.sbuf("x", free_bytes=65536)
    acc = b.psum("acc", free_bytes=2048)
    for idle in (0, *idle_ns):
        if idle:
            b.iota(x, n=idle - 200)  # Two semaphores of 100 ns come on top.
        for _ in range(each):
            b.nc_matmul(acc, stationary=w, moving=x, k=128, m=128, n=500, dtype=BF16)
    return b.build()


def lengths_ns(program: Program, limiter: object = "ramp") -> list[int]:
    spans = schedule(program, RAMP, limiter=limiter, spans=True).spans  # type: ignore[arg-type]
    return [(s.end_ps - s.start_ps) // NS for s in spans if s.name == "nc_matmul"]


def test_limits_by_chip() -> None:
    limits = [
        (core.pe_sustained_factor, core.pe_ramp_start_factor) for core in (TRN1, INF2, TRN2, TRN3)
    ]
    assert limits == [(0.875, 1.0), (0.633, 1.0), (1.0, 0.5), (1.0, 0.5)]
    assert TRN2.pe_ramp_ps == TRN3.pe_ramp_ps == 3_000_000


@pytest.mark.parametrize(("core", "full_ps", "limited_ps"), [
    (TRN1, 182_857, 208_980),
    (INF2, 182_857, 288_874),
    (TRN2, 213_333, 213_333),
])  # fmt: skip
def test_the_sustained_limit_can_be_turned_off(core: object, full_ps: int, limited_ps: int) -> None:
    b = Builder(core, "one")  # type: ignore[arg-type]
    w, x = b.sbuf("w", free_bytes=256), b.sbuf("x", free_bytes=1024)
    acc = b.psum("acc", free_bytes=2048)
    b.nc_matmul(acc, stationary=w, moving=x, k=128, m=128, n=512, dtype=BF16)
    program = b.build()
    limited = schedule(program, core)  # type: ignore[arg-type]
    free = schedule(program, core, limiter=False)  # type: ignore[arg-type]
    assert (limited.busy_ps[0], limited.limiter_ps) == (limited_ps, limited_ps - full_ps)
    assert (free.busy_ps[0], free.limiter_ps) == (full_ps, 0)


def test_the_ramp_gains_with_the_time_in_use() -> None:
    # 500 ns at 50%; after 1000 ns at 50% + 50% x 1000/4000 = 62.5%; after 1800 ns at 72.5%; then
    # at 81.1%, 88.8% and 95.8%, until 4000 ns are over.
    assert lengths_ns(bursts(each=8)) == [1000, 800, 689, 616, 563, 521, 500, 500]


@pytest.mark.parametrize(("idle_ns", "first_ns"), [(300, 500), (3900, 500), (4000, 1000)])
def test_idle_as_long_as_the_ramp_cools_down(idle_ns: int, first_ns: int) -> None:
    assert lengths_ns(bursts(idle_ns, each=9))[9] == first_ns


@pytest.mark.parametrize(("idle_ns", "last_ns"), [(400, 500), (700, 1000)])
def test_use_of_less_than_half_cools_down(idle_ns: int, last_ns: int) -> None:
    """Hot after nine in a row, then 500 ns of use in turn with idle time."""
    b = Builder(RAMP, "use")
    w, x = b.sbuf("w", free_bytes=256), b.sbuf("x", free_bytes=65536)
    acc = b.psum("acc", free_bytes=2048)
    with b.repeat(9, "hot"):
        b.nc_matmul(acc, stationary=w, moving=x, k=128, m=128, n=500, dtype=BF16)
    with b.repeat(20, "turns"):
        b.iota(x, n=idle_ns - 200)
        b.nc_matmul(acc, stationary=w, moving=x, k=128, m=128, n=500, dtype=BF16)
    lengths = lengths_ns(b.build())
    assert lengths[1] == 500
    assert max(lengths[1:]) == last_ns


def test_the_ramp_is_asked_for() -> None:
    program = bursts(4000, each=2)
    assert lengths_ns(program, True) == lengths_ns(program, False) == [500] * 4
    timeline = schedule(program, RAMP, limiter="ramp")
    assert timeline.limiter_ps == timeline.busy_ps[0] - 2000 * NS == 1600 * NS


def test_a_chip_without_a_ramp_has_none() -> None:
    program = matmul(TRN1, 1024)
    assert schedule(program, TRN1, limiter="ramp") == schedule(program, TRN1)


def test_the_ramp_costs_a_saturated_array_its_start_only() -> None:
    b = Builder(TRN2, "saturated")
    w, x = b.sbuf("w", free_bytes=256), b.sbuf("x", free_bytes=1024)
    acc = b.psum("acc", free_bytes=2048)
    with b.repeat(10_000, "i"):
        b.nc_matmul(acc, stationary=w, moving=x, k=128, m=128, n=512, dtype=BF16)
    timeline = schedule(b.build(), TRN2, limiter="ramp")
    assert timeline.busy_ps[0] == 10_000 * 213_333 + timeline.limiter_ps
    assert 0.2 * TRN2.pe_ramp_ps < timeline.limiter_ps <= 0.5 * TRN2.pe_ramp_ps
    assert timeline.instructions_run < 100


@pytest.mark.parametrize(("core", "limiter", "low", "high"), [
    (TRN1, True, 0.83, 0.88),
    (TRN1, False, 0.95, 1.0),
    (TRN2, False, 0.95, 1.0),
    (INF2, True, 0.60, 0.64),
])  # fmt: skip
def test_matmul_8192_of_the_peak(core: object, limiter: bool, low: float, high: float) -> None:
    program = matmul(core, 8192)  # type: ignore[arg-type]
    seconds = schedule(program, core, limiter=limiter).duration_ps * 1e-12  # type: ignore[arg-type]
    assert low <= program.flops / seconds / core.peak_flops(BF16) <= high  # type: ignore[attr-defined]
