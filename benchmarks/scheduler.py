"""How fast Programs are timed: instructions per second on one thread, expansion included.

    $ python benchmarks/scheduler.py
    program              instructions     host ms   M instructions/s   simulated ms
    matmul 8192^3               69632         2.9               24.3         14.124

Each line is the best of several calls of ``torch_trn.scheduler.schedule`` on a ready-made Program,
as a cache miss of the device calls it: encoding in Python and native scheduling together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from torch_trn.chip import CoreSpec, system
from torch_trn.program import Builder, Program
from torch_trn.scheduler import schedule

BF16 = torch.bfloat16
GOAL_INSTRUCTIONS_PER_S = 10e6


def matmul(core: CoreSpec, size: int) -> Program:
    """bf16 a_MK x b_KN with a column panel of b resident in SBUF, 512 wide."""
    b = Builder(core, f"matmul {size}^3")
    k_tiles, m_tiles = size // 128, size // 128
    a_MK, b_KN, c_MN = (b.hbm(name, nbytes=2 * size * size) for name in "abc")
    panel = b.sbuf("b_KN", free_bytes=1024, slots=2 * k_tiles)
    rows = b.sbuf("a_KM", free_bytes=2 * size, slots=3)
    acc = b.psum("acc", free_bytes=2048, slots=4)
    out = b.sbuf("out", free_bytes=1024, slots=4)
    with b.repeat(size // 512, "n") as n:
        with b.repeat(k_tiles, "k") as k:
            b.load(panel[n * k_tiles + k], b_KN, rows=128, row_bytes=1024)
        with b.repeat(m_tiles, "m") as m:
            tile = n * m_tiles + m
            b.load(rows[tile], a_MK, rows=128, row_bytes=2 * size)
            with b.repeat(k_tiles, "k") as k:
                b.nc_matmul(
                    acc[tile], stationary=rows[tile], moving=panel[n * k_tiles + k],
                    k=128, m=128, n=512, dtype=BF16, accumulate=True,
                )  # fmt: skip
            b.tensor_copy(out[tile], acc[tile], n=512, out_dtype=BF16)
            b.store(c_MN, out[tile], rows=128, row_bytes=1024)
    return b.build()


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


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    """The shortest of ``repeats`` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    core = system("trn2.48xlarge").chip.core
    programs = [
        matmul(core, 1024),
        matmul(core, 8192),
        pointwise(core, 100_000, 4),
        pointwise(core, 100_000, 1),
        pointwise(core, 8, 4),
    ]
    print("program              instructions     host ms   M instructions/s   simulated ms")
    for program in programs:
        repeats = 5 if program.instructions > 10_000 else 50
        seconds = best_seconds(partial(schedule, program, core), repeats)
        simulated_ms = schedule(program, core).duration_ps / 1e9
        rate = program.instructions / seconds / 1e6
        print(
            f"{program.name:20} {program.instructions:12} {seconds * 1e3:11.3f} {rate:18.1f} "
            f"{simulated_ms:14.3f}"
        )
    print(f"goal: {GOAL_INSTRUCTIONS_PER_S / 1e6:.0f} M instructions/s on large Programs")


if __name__ == "__main__":
    main()
