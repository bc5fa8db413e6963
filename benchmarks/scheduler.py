"""What timing a Program costs, and what the timed hardware reaches, against their bars.

    $ python benchmarks/scheduler.py

First the host time of `torch_trn.scheduler.schedule` on a ready-made Program, as a cache miss of
the device calls it: encoding, expansion, issue pass and scheduling, loops skipped once they repeat.
Then instructions a second of CPU time, one thread, no loop skipped. Then simulated rates: matmul
against the peak of the array, streams against what was measured on trn1. Last, what a faster rate
does to a Program whose orders are decided anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from tabulate import tabulate
from timing import verdict

from torch_trn.chip import CoreSpec, system
from torch_trn.lowering import OpCall, TensorSpec, lower
from torch_trn.program import Builder, Program
from torch_trn.scheduler import GRAPH_LOOK_AHEAD, schedule

BF16, F32 = torch.bfloat16, torch.float32
TRN1 = system("trn1.2xlarge").chip.core
INF2 = system("inf2.xlarge").chip.core
TRN2 = system("trn2.48xlarge").chip.core
RATES = (
    "pe_hz", "vector_hz", "scalar_hz", "gpsimd_hz", "dma_engines", "dma_engine_bytes_per_s",
    "dma_engine_raw_bytes_per_s", "hbm_bytes_per_s",
)  # fmt: skip


def mm(core: CoreSpec, size: int, dtype: torch.dtype = BF16, *, turned: bool = False) -> Program:
    """The lowering of a matmul of `size` cubed; `turned` has the left operand K-major in memory."""
    spec = TensorSpec.contiguous(dtype, size, size)
    left = TensorSpec(dtype, (size, size), (1, size)) if turned else spec
    return lower(OpCall("aten::mm", (left, spec), (spec,)), core, 1)


def pointwise(core: CoreSpec, tiles: int, slots: int) -> Program:
    """gelu over ``tiles`` tiles of 128 x 4096 bf16, loaded, computed and stored one by one."""
    b = Builder(core, f"gelu, {slots} slots")
    x, y = (b.hbm(name, nbytes=tiles << 20) for name in "xy")
    tile = b.sbuf("tile", free_bytes=8192, slots=slots)
    with b.repeat(tiles, "i") as i:
        b.load(tile[i], x, rows=128, row_bytes=8192)
        b.activation(tile[i], tile[i], op="gelu", n=4096, dtype=BF16)
        b.store(y, tile[i], rows=128, row_bytes=8192)
    return b.build()


def stream(core: CoreSpec, kind: str, row_bytes: int) -> Program:
    """2048 loads, stores, or copies within HBM of 128 rows."""
    b = Builder(core, f"{kind} of {row_bytes} B rows")
    x, y = (b.hbm(name, nbytes=1 << 31) for name in "xy")
    t = b.sbuf("t", free_bytes=row_bytes, slots=4)
    with b.repeat(2048, "i") as i:
        if kind == "load":
            b.load(t[i], x, rows=128, row_bytes=row_bytes)
        elif kind == "store":
            b.store(y, t[i], rows=128, row_bytes=row_bytes)
        else:
            b.copy_hbm(y, x, rows=128, row_bytes=row_bytes)
    return b.build()


def best_seconds(
    run: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The shortest of ``repeats`` calls, by ``clock``."""
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
    return min(times)


def host_times() -> Iterator[tuple[object, ...]]:
    """Rows of the first table."""
    cases = [
        ("mm 1024^3 bf16", mm(TRN2, 1024), 0, 0.5),
        ("mm 1024^3 bf16", mm(TRN2, 1024), GRAPH_LOOK_AHEAD, 0.5),
        ("mm 8192^3 bf16", mm(TRN2, 8192), 0, 20.0),
        ("mm 8192^3 bf16", mm(TRN2, 8192), GRAPH_LOOK_AHEAD, 20.0),
        ("mm 65536^3 fp32", mm(TRN2, 65536, F32), 0, 10.0),
    ]
    for name, program, look_ahead, limit_ms in cases:
        run = partial(schedule, program, TRN2, look_ahead=look_ahead)
        timeline, host_ms = run(), best_seconds(run, 20) * 1e3
        yield (
            name, look_ahead, timeline.instructions, timeline.instructions_run,
            f"{host_ms:.3f}", limit_ms, verdict(host_ms, limit_ms), timeline.duration_ps / 1e9,
        )  # fmt: skip


def cached_us() -> float:
    """A whole eager mm of 1x1 whose cost is in the device's cache, from Python."""
    x = torch.ones(1, 1, device="trn")
    with torch.no_grad():

        def run() -> None:
            for _ in range(1000):
                torch.mm(x, x)

        return best_seconds(run, 20) * 1e3


def throughput() -> Iterator[tuple[object, ...]]:
    """Rows of the second table."""
    for program in (mm(TRN2, 8192), pointwise(TRN2, 100_000, 4), pointwise(TRN2, 100_000, 1)):
        for look_ahead, goal in ((0, 10), (GRAPH_LOOK_AHEAD, 4)):
            run = partial(schedule, program, TRN2, look_ahead=look_ahead, extrapolate=False)
            rate = program.instructions / best_seconds(run, 8, time.thread_time) / 1e6
            state = "ok" if rate >= goal else "BELOW"
            yield program.name, look_ahead, program.instructions, rate, goal, state


def matmul_rates() -> Iterator[tuple[object, ...]]:
    """Rows of the third table."""
    for name, core, turned, limiter, low, high in (
        ("trn2", TRN2, True, False, 0.95, 1.0),
        ("trn2", TRN2, False, False, 0.95, 1.0),
        ("trn2", TRN2, False, "ramp", 0.95, 1.0),
        ("trn1", TRN1, True, True, 0.83, 0.88),
        ("trn1", TRN1, False, True, None, None),
        ("inf2", INF2, True, True, 0.60, 0.64),
    ):
        program = mm(core, 8192, turned=turned)
        timeline = schedule(program, core, limiter=limiter)  # type: ignore[arg-type]
        share = program.flops * 1e12 / timeline.duration_ps / core.peak_flops(BF16)
        bar = state = ""
        if low is not None and high is not None:
            bar, state = f"{low}-{high}", "ok" if low <= share <= high else "OUTSIDE"
        left = "K-major" if turned else "row-major"
        yield name, left, str(limiter), timeline.duration_ps / 1e9, share, bar, state


def stream_rates() -> Iterator[tuple[object, ...]]:
    """Rows of the fourth table."""
    for kind, row_bytes, measured, source in (
        ("load", 32768, 271.1, "O032"),
        ("load", 4096, 269.5, "O030"),
        ("load", 1024, 208.4, "O033"),
        ("store", 16384, 274.4, "O037"),
        ("store", 4096, 254.1, "O036"),
        ("store", 1024, 229.0, "O038"),
        ("copy", 4096, 307.9, "O044"),
    ):
        program = stream(TRN1, kind, row_bytes)
        moved = program.hbm_read_bytes + program.hbm_write_bytes
        rate = moved * 1e3 / schedule(program, TRN1).duration_ps
        off = abs(rate / measured - 1)
        yield program.name, rate, measured, source, f"{off:.1%}", verdict(off, 0.10)


def anomalies() -> tuple[int, int, float]:
    """Of doubled rates that slow a lowering down: how many, of how many, and the worst factor."""
    cases = [mm(TRN2, size) for size in (256, 512, 1024, 2048)] + [pointwise(TRN2, 50, 2)]
    x, w = (TensorSpec.contiguous(BF16, *shape) for shape in ((2, 64, 28, 28), (64, 64, 3, 3)))
    one = (1, 1)
    args = (x, w, None, one, one, one, False, (0, 0), 1)
    cases.append(lower(OpCall("aten::convolution", args, (x,)), TRN2, 1))
    slower = [
        schedule(program, replace(TRN2, **{rate: 2 * getattr(TRN2, rate)})).duration_ps
        / schedule(program, TRN2).duration_ps
        for program in cases
        for rate in RATES
    ]
    return sum(factor > 1 for factor in slower), len(slower), max(slower)


def main() -> None:
    """Prints the tables."""
    headers: tuple[str, ...] = (
        "Program", "look-ahead", "instructions", "run", "host ms", "limit ms", "", "simulated ms",
    )  # fmt: skip
    print(tabulate(host_times(), headers=headers, floatfmt=".3f"))
    from_cache = cached_us()
    print(f"eager mm of 1x1 from the cost cache: {from_cache:.2f} us (limit 5) ", end="")
    print(verdict(from_cache, 5.0), end="\n\n")
    headers = ("Program, in full", "look-ahead", "instructions", "M/s", "goal", "")
    print(tabulate(throughput(), headers=headers, floatfmt=".1f"), end="\n\n")
    headers = ("mm 8192^3", "left operand", "limiter", "simulated ms", "of peak", "bar", "")
    print(tabulate(matmul_rates(), headers=headers, floatfmt=".3f"), end="\n\n")
    headers = ("trn1 stream", "GB/s", "measured", "row", "off", "")
    print(tabulate(stream_rates(), headers=headers, floatfmt=".1f"), end="\n\n")
    count, of, worst = anomalies()
    print(
        f"twice a rate, orders decided anew: {count} of {of} are slower, the worst {worst:.3f} x; "
        "with issued_for=, none can be"
    )


if __name__ == "__main__":
    main()
