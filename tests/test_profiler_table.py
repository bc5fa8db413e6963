"""Sums, tables, spans and traces of profiles made by hand; needs no device."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torch_trn.isa import Engine
from torch_trn.profiler import chrome_trace, table
from torch_trn.profiler.recording import Entry, Peak, Recording, sorted_columns, sorted_memory
from torch_trn.profiler.spans import ProfileTimeline
from torch_trn.timeline import Span, Timeline

US = 1_000_000
PEAK = Peak(
    flops={torch.float32: 20e12, torch.bfloat16: 80e12},
    hbm_bytes_per_s=500e9,
    dma_bytes_per_s=400e9,
)


def entry(name: str, kernel_us: int, **fields: Any) -> Entry:
    defaults: dict[str, Any] = {
        "busy_ps": (kernel_us * US, 0, 0, 0, 0),
        "flops": 0.0,
        "hbm_bytes": 0,
        "bound": "TensorE",
        "host": False,
    }
    return Entry(name=name, duration_ps=kernel_us * US, **(defaults | fields))


ENTRIES = {
    7: entry(
        "aten::mm",
        80,
        flops=3.2e9,
        hbm_bytes=30 << 20,
        shapes=((128, 64), (64, 32)),
        dtypes=(torch.bfloat16, torch.bfloat16),
    ),
    9: entry("aten::add.Tensor", 5, busy_ps=(0, 2 * US, 0, 0, 5 * US), bound="Launch"),
    11: entry(
        "aten::erfinv",
        990,
        busy_ps=(0,) * 5,
        hbm_bytes=4096,
        bound="Host",
        host=True,
        host_reason="no engine computes it",
    ),
}
LAUNCH_US = 10


def record(entry_id: int, start_us: int, module: int = 0, device: int = 0) -> tuple[int, ...]:
    duration_us = ENTRIES[entry_id].duration_ps // US + LAUNCH_US
    return (
        entry_id, device, 0, start_us * US, duration_us * US, LAUNCH_US * US, module, 0, 0,
    )  # fmt: skip


def recording(*records: tuple[int, ...], **fields: Any) -> Recording:
    defaults: dict[str, Any] = {
        "columns": sorted_columns(records, origin_ps=1000 * US),
        "memory": sorted_memory([(1005 * US, 0, 4096), (1001 * US, 0, 512)], 1000 * US),
        "entries": ENTRIES,
        "modules": ["", "model", "model.layers.0.attn"],
        "stacks": [()],
        "peak": PEAK,
    }
    return Recording(**(defaults | fields))


def sample() -> Recording:
    return recording(
        record(7, 1000, module=2),
        record(9, 1090, module=1),
        record(7, 1110, module=2),
        record(11, 1200),
    )


def test_table() -> None:
    assert table.text(sample()) == "\n".join(
        [
            "operator               calls    total us    mean us    share  bound      TFLOP/s"
            "    MFU    HBM bytes    MBU",
            "-------------------  -------  ----------  ---------  -------  -------  ---------"
            "  -----  -----------  -----",
            "aten::erfinv [host]        1     1,000.0   1,000.00    83.7%  Host             -"
            "      -     4.00 KiB   0.0%",
            "aten::mm                   2       180.0      90.00    15.1%  TensorE      35.56"
            "  44.4%    60.00 MiB  69.9%",
            "aten::add.Tensor           1        15.0      15.00     1.3%  Launch           -"
            "      -            -      -",
            "total                      4     1,195.0     298.75   100.0%                5.36"
            "   6.7%    60.00 MiB  10.5%",
            "[host]: 1 operator (1 call, 83.7% of the time) ran on the host; TRN_STRICT=1 forbids "
            "that:",
            "  aten::erfinv: no engine computes it",
        ]
    )


def test_rows_add_up_to_the_total_whatever_the_grouping() -> None:
    whole = sample()
    for group_by in ("operator", "shapes", "module", "device", "bound"):
        grouped = table.rows(whole, group_by=group_by)
        assert sum(row.total_ps for row in grouped) == whole.total_ps == 1195 * US
        assert sum(row.calls for row in grouped) == len(whole) == 4


def test_groups() -> None:
    def keys(group_by: str) -> list[str]:
        return [row.key for row in table.rows(sample(), group_by=group_by)]

    assert keys("shapes") == [
        "aten::erfinv [host] ",
        "aten::mm [128, 64], [64, 32]",
        "aten::add.Tensor ",
    ]
    assert keys("module") == ["(no module)", "model.layers.0.attn", "model"]
    assert keys("device") == ["trn:0"]
    assert keys("bound") == ["Host", "TensorE", "Launch"]


def test_sorting() -> None:
    def first(sort_by: str) -> str:
        return table.rows(sample(), sort_by=sort_by)[0].key

    assert {sort_by: first(sort_by) for sort_by in table.SORTS} == {
        "total": "aten::erfinv [host]",
        "mean": "aten::erfinv [host]",
        "calls": "aten::mm",
        "flops": "aten::mm",
        "hbm_bytes": "aten::mm",
        "mfu": "aten::mm",
        "name": "aten::add.Tensor",
    }


def test_limit_sums_the_rest() -> None:
    lines = table.text(sample(), limit=1).splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == [
        "aten::erfinv [host]",
        "(2 more)",
        "total",
    ]
    assert "195.0" in lines[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"sort_by": "cost"},
            "sort_by is 'cost'; choices: total, mean, calls, flops, hbm_bytes, mfu, name",
        ),
        (
            {"group_by": "line"},
            "group_by is 'line'; choices: operator, shapes, module, stack, device, bound",
        ),
        ({"limit": 0}, "limit is 0; it must be at least 1, or None for all rows"),
        (
            {"group_by": "stack"},
            "group_by='stack': none was recorded; profile with torch_trn.profile(stacks=True)",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        table.text(sample(), **arguments)
    assert str(caught.value) == message


def test_an_empty_profile() -> None:
    empty = recording()
    assert (len(empty), empty.total_ps, empty.elapsed_ps, empty.busy_ps) == (0, 0, 0, (0,) * 5)
    assert table.text(empty, group_by="module").splitlines()[-1].split()[0] == "total"
    assert list(ProfileTimeline(empty, lambda entry: None)) == []


def test_times_of_a_recording() -> None:
    whole = sample()
    assert whole.total_ps == 1195 * US
    assert whole.elapsed_ps == 1200 * US
    assert whole.busy_ps == (160 * US, 2 * US, 0, 0, 5 * US)


def test_records_are_ordered_by_time_not_by_arrival() -> None:
    records = [record(7, 1000), record(9, 1090), record(7, 1000, device=1)]
    forward, backward = recording(*records), recording(*reversed(records))
    assert np.array_equal(forward.columns, backward.columns)
    assert forward.column("device").tolist() == [0, 1, 0]


def kernel(entry_id: int) -> Timeline | None:
    if entry_id == 9:
        return Timeline(5 * US, (0, 2 * US, 0, 0, 5 * US), 3)
    if entry_id != 7:
        return None
    spans = (
        Span(Engine.DMA, "load", "dma_copy", 0, 30 * US, "", 4),
        Span(Engine.DMA, "store", "dma_copy", 20 * US, 40 * US, "tile y", 2),
        Span(Engine.TENSOR, "TensorE", "nc_matmul", 30 * US, 80 * US, "tile x", 8),
    )
    return Timeline(80 * US, (50 * US, 0, 0, 0, 50 * US), 14, {}, spans)


def test_spans_are_where_the_kernel_ran() -> None:
    spans = ProfileTimeline(recording(record(7, 1000)), kernel).spans
    assert [(s.track, s.name, s.start_ps // US, s.end_ps // US, s.waited_for) for s in spans] == [
        ("operators", "aten::mm", 0, 90, ""),
        ("launch", "aten::mm", 0, 10, ""),
        ("DMA load", "dma_copy", 10, 40, ""),
        ("DMA store", "dma_copy", 30, 50, "tile y"),
        ("TensorE", "nc_matmul", 40, 90, "tile x"),
    ]


def test_a_copy_keeps_the_dma_engines_busy() -> None:
    copy = entry("aten::copy_ (host to device)", 20, busy_ps=(0, 0, 0, 0, 20 * US), bound="DMA")
    whole = recording((3, 1, 2, 1000 * US, 20 * US, 0, 0, 0, 0), entries={3: copy})
    spans = ProfileTimeline(whole, lambda entry: None).spans
    assert [(s.device, s.track, s.name, s.start_ps, s.end_ps) for s in spans] == [
        (1, "operators of stream 2", "aten::copy_ (host to device)", 0, 20 * US),
        (1, "DMA copy", "dma_copy", 0, 20 * US),
    ]


def test_chrome_trace(tmp_path: Path) -> None:
    whole = sample()
    path = tmp_path / "trace.json"
    chrome_trace.write(path, ProfileTimeline(whole, kernel), {0: "(NeuronCore-v3)"})
    events = json.loads(path.read_text())["traceEvents"]
    tracks = {
        event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"
    }
    order = {
        event["tid"]: event["args"]["sort_index"]
        for event in events
        if event["name"] == "thread_sort_index"
    }
    assert sorted(tracks.values(), key=lambda name: order[_key(tracks, name)]) == [
        "operators",
        "launch",
        "TensorE",
        "DMA load",
        "DMA store",
    ]
    operators_us = [
        event["dur"]
        for event in events
        if event["ph"] == "X" and tracks[event["tid"]] == "operators"
    ]
    assert sum(operators_us) == whole.total_ps / US
    counter = [(e["ts"], e["args"]["bytes"]) for e in events if e["ph"] == "C"]
    assert counter == [(1.0, 512), (5.0, 4096)]
    assert events[0] == {
        "ph": "X",
        "pid": 1,
        "tid": 1,
        "ts": 0.0,
        "dur": 90.0,
        "name": "aten::mm",
        "args": {
            "operator": 0,
            "bound": "TensorE",
            "flops": 3.2e9,
            "hbm_bytes": 30 << 20,
            "module": "model.layers.0.attn",
        },
    }


def _key(names: dict[int, str], wanted: str) -> int:
    return next(key for key, name in names.items() if name == wanted)


def test_a_trace_is_the_same_byte_for_byte(tmp_path: Path) -> None:
    for name in ("a", "b"):
        chrome_trace.write(tmp_path / name, ProfileTimeline(sample(), kernel), {})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_overlapping_spans_of_a_track_get_lanes(tmp_path: Path) -> None:
    both = recording(record(7, 1000), record(7, 1050))
    path = tmp_path / "trace.json"
    chrome_trace.write(path, ProfileTimeline(both, lambda entry: Timeline(0, (0,) * 5, 0)), {})
    names = {
        e["args"]["name"]
        for e in json.loads(path.read_text())["traceEvents"]
        if e["ph"] == "M" and "name" in e["args"]
    }
    assert names == {"trn:0", "operators", "operators (2)", "launch"}


def test_a_hundred_thousand_records_take_moments() -> None:
    many = recording(*(record(7 + 2 * (i % 3), 1000 + 100 * i, i % 3) for i in range(200_000)))
    started_s = time.perf_counter()
    for group_by in ("operator", "module"):
        assert sum(row.calls for row in table.rows(many, group_by=group_by)) == 200_000
    assert time.perf_counter() - started_s < 5, "vectorised it takes 0.1 s"
