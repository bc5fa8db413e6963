"""`prof.explain`: the exact text for small profiles, made by hand and on the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_profiler_table import ENTRIES, US, entry, record, recording
from test_scheduler import ROUND, pipeline

import torch_trn
from torch_trn.profiler import explain
from torch_trn.profiler.recording import Entry, Recording
from torch_trn.scheduler import schedule
from torch_trn.timeline import Timeline

NONE: dict[str, int] = {}
MM_IDLE = ({"slot acc": 6 * US, "tile w": 12 * US, "end": 2 * US}, NONE, NONE, NONE, NONE)
COPY_IDLE = (NONE, NONE, NONE, NONE, {"queue": 1 * US, "tile x": 2 * US})
COPY_BUSY = (0, 0, 0, 0, 5 * US)


def sums_of(key: int) -> Timeline | None:
    if key == 7:
        busy_ps = (60 * US, 0, 0, 0, 0)
        return Timeline(80 * US, busy_ps, 10, idle_ps=MM_IDLE, limiter_ps=8 * US)
    if key == 9:
        return Timeline(8 * US, COPY_BUSY, 10, idle_ps=COPY_IDLE)
    return None


def sample() -> Recording:
    built = recording(record(7, 0), record(9, 90), record(7, 110), record(11, 210))
    entries = {
        **built.entries,
        7: replace(ENTRIES[7], busy_ps=(60 * US, 0, 0, 0, 0)),
        9: entry("aten::copy_", 8, busy_ps=COPY_BUSY, bound="Launch", hbm_bytes=1 << 20),
        11: replace(ENTRIES[11], hbm_bytes=0),
    }
    return replace(built, entries=entries)


TEXT = """\
1. aten::erfinv: 1 call, 1,000.0 us, 83.7% of the time, bound by Host. No NeuronCore ran it: no
   engine computes it. Its time is that of its way over PCIe.
2. aten::mm [128, 64], [64, 32]: 2 calls, 180.0 us, 90.0 us each, 15.1% of the time, bound by
   TensorE. Its launch is 10.0 us. Its kernel of 80.0 us keeps busy: TensorE 75.0%. TensorE, the
   busiest, waits 12.0 us (15.0%) for the data of w, 6.0 us (7.5%) for a free slot of acc and has
   nothing left to do for the last 2.0 us (2.5%). It moves 30.00 MiB of HBM at 393.2 GB/s, 98.3% of
   the usable 400.0 GB/s. TensorE does 40.00 TFLOP/s, 50.0% of its peak. Of TensorE's time the power
   limiter takes 8.0 us (10.0%).
3. aten::copy_: 1 call, 15.0 us, 1.3% of the time, bound by Launch. Its launch is 10.0 us. Its
   kernel of 8.0 us keeps busy: DMA 62.5%. DMA, the busiest, waits 2.0 us (25.0%) for the data of x,
   1.0 us (12.5%) for the few engines of a transfer's partitions. It moves 1.00 MiB of HBM at 131.1
   GB/s, 32.8% of the usable 400.0 GB/s."""


EXP_TEXT = """\
1. exp: 1 call, 15.0 us, 100.0% of the time, bound by DMA. Its launch is 10.0 us. Its kernel of 44.1
   us keeps busy: ScalarE 5.8%, DMA 46.4%. DMA, the busiest, waits 13.7 us (30.9%) for the data of
   t, 9.0 us (20.4%) for a free slot of t and has nothing left to do for the last 1.0 us (2.3%). It
   moves 2.50 MiB of HBM at 59.4 GB/s, 14.8% of the usable 400.0 GB/s."""


def test_text() -> None:
    assert explain.text(sample(), sums_of) == TEXT


def test_text_of_a_program() -> None:
    """Ten loads, exponentials and stores with one tile to hold them: see test_scheduler."""
    timeline = schedule(pipeline(ROUND, 1), ROUND)
    built = recording(record(9, 0))
    program_entry = Entry(
        name="exp", duration_ps=timeline.duration_ps, busy_ps=timeline.busy_ps, flops=0.0,
        hbm_bytes=20 * 128 * 1024, bound="DMA", host=False,
    )  # fmt: skip
    recorded = replace(built, entries={9: program_entry})
    # A tile: load 1024 + 1000 ns, exponential 256 + 110 ns, store 1024 + 1000 ns.
    assert explain.text(recorded, lambda key: timeline) == EXP_TEXT


def test_limit() -> None:
    text = explain.text(sample(), sums_of, limit=1)
    assert text.startswith("1. aten::erfinv: 1 call, 1,000.0 us,")
    assert "2. " not in text
    with pytest.raises(ValueError) as error:
        explain.text(sample(), sums_of, limit=0)
    assert str(error.value) == "limit is 0; it must be at least 1"


def test_many_shapes() -> None:
    built = recording(record(7, 0))
    shapes = tuple((i,) for i in range(9))
    many = replace(built, entries={7: replace(ENTRIES[7], shapes=shapes)})
    assert explain.text(many, sums_of).startswith(
        "1. aten::mm [0], [1], [2], [3] and 5 more: 1 call"
    )


def test_nothing_recorded() -> None:
    assert explain.text(recording(), sums_of) == ""


def test_on_the_device() -> None:
    x = torch.ones(1024, 1024, device="trn", dtype=torch.bfloat16)
    with torch_trn.profile() as prof:
        x @ x
    (mm,) = prof.records()
    words = prof.explain(limit=2).split()
    text = " ".join(words)
    assert text.startswith(
        f"1. aten::mm [1024, 1024], [1024, 1024]: 1 call, {mm['duration_us']:.1f} us, 100.0% of "
        f"the time, bound by {mm['bound']}. Its launch is {mm['launch_us']:.1f} us. Its kernel of "
    )
    kernel_us = mm["duration_us"] - mm["launch_us"]
    assert f"TensorE {mm['busy_us']['TensorE'] / kernel_us:.1%}" in text
    assert f"TensorE does {mm['flops'] / kernel_us / 1e6:.2f} TFLOP/s" in text
    assert " the busiest, waits " in text
