"""torch.profiler sees trn through kineto: device time by operator, and spans in its trace."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

import torch_trn

ACTIVITIES = [ProfilerActivity.CPU, ProfilerActivity.PrivateUse1]


@pytest.fixture
def x() -> Tensor:
    return torch.ones(128, 128, device="trn", requires_grad=True)


def both(function: Callable[[], Any], **options: Any) -> tuple[profile, torch_trn.profile]:
    """What torch's profiler and ours say of the same operators."""
    function()  # priced
    torch.trn.synchronize()
    with profile(activities=ACTIVITIES, **options) as theirs, torch_trn.profile() as ours:
        function()
    return theirs, ours


def device_us(prof: profile, name: str) -> float:
    (average,) = [
        average
        for average in prof.key_averages()
        if average.key == name and average.device_type == DeviceType.CPU
    ]
    return average.self_device_time_total


def device_events(prof: profile) -> list[Any]:
    return [event for event in prof.events() if event.device_type == DeviceType.PrivateUse1]


def test_device_time_of_operators(x: Tensor) -> None:
    """As simulated, each span rounded up to a nanosecond."""
    prof, ours = both(lambda: (x @ x).relu().sum().backward())
    records = ours.records()
    for name, record_names in (
        ("aten::mm", ["aten::mm"]),
        ("aten::relu", ["aten::relu"]),
        ("aten::sum", ["aten::sum", "aten::sum.dim_IntList"]),
        ("aten::threshold_backward", ["aten::threshold_backward"]),
    ):
        simulated = [r["duration_us"] for r in records if r["name"] in record_names]
        assert simulated
        shown = device_us(prof, name)
        assert sum(simulated) <= shown <= sum(simulated) + 0.001 * len(simulated) + 1e-6
    total = sum(
        event.self_device_time_total
        for event in prof.key_averages()
        if event.device_type == DeviceType.CPU
    )
    assert total == pytest.approx(ours.total_us, abs=0.001 * len(records))


def test_operators_are_counted_once(x: Tensor) -> None:
    y = x.detach()

    def work() -> None:
        for _ in range(3):
            y @ y
            y + y
            nn.functional.layer_norm(y, (128,))
            y.clone().add_(1)

    prof, _ = both(work)
    counts = {
        average.key: average.count
        for average in prof.key_averages()
        if average.device_type == DeviceType.CPU
    }
    for name in ("aten::mm", "aten::add", "aten::layer_norm", "aten::native_layer_norm"):
        assert counts[name] == 3
    assert counts["aten::add_"] == counts["aten::clone"] == 3
    assert len(device_events(prof)) == 5 * 3


def test_pricing_is_not_in_the_profile() -> None:
    """The first call of an operator is recorded like every other."""
    y = torch.ones(37, 41, device="trn")
    names = []
    for _ in range(2):
        with profile(activities=ACTIVITIES) as prof:
            y.softmax(1).sum(0)
        names.append([event.name for event in prof.events()])
    assert names[0] == names[1]
    assert not any(name.startswith("prims::") for name in names[0])


def test_user_ranges_and_backward_nodes_have_device_time(x: Tensor) -> None:
    def work() -> None:
        with record_function("forward"):
            y = (x @ x).sum()
        y.backward()

    prof, ours = both(work)
    averages = {a.key: a for a in prof.key_averages() if a.device_type == DeviceType.CPU}
    mm = [r["duration_us"] for r in ours.records() if r["name"] == "aten::mm"]
    assert len(mm) == 3
    assert averages["MmBackward0"].device_time_total == pytest.approx(sum(mm[1:]), abs=0.002)
    forward = averages["forward"].device_time_total
    assert forward == pytest.approx(
        ours.records()[0]["duration_us"] + ours.records()[1]["duration_us"], abs=0.002
    )


def test_columns_of_the_table(x: Tensor) -> None:
    prof, _ = both(lambda: x @ x)
    table = prof.key_averages().table(sort_by="self_device_time_total")
    assert "Self TRN" in table and "TRN total" in table and "Self TRN time total" in table


def test_shapes(x: Tensor) -> None:
    prof, _ = both(lambda: x.detach() @ x.detach(), record_shapes=True)
    (mm,) = [
        average
        for average in prof.key_averages(group_by_input_shape=True)
        if average.key == "aten::mm" and average.device_type == DeviceType.CPU
    ]
    assert mm.input_shapes == [[128, 128], [128, 128]]
    assert mm.self_device_time_total > 0


def spans_of(prof: profile, path: Path) -> list[dict[str, Any]]:
    prof.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    return [event for event in events if event.get("cat") == "kernel"]


def test_spans_in_the_trace(x: Tensor, tmp_path: Path) -> None:
    y = x.detach()
    prof, ours = both(lambda: ((y @ y) + y).sum(), record_shapes=True)
    spans = spans_of(prof, tmp_path / "trace.json")
    records = ours.records()
    assert [span["name"] for span in spans] == [record["name"] for record in records]
    origin_us = spans[0]["ts"] - records[0]["start_us"]
    for span, record in zip(spans, records, strict=True):
        assert (span["ph"], span["pid"], span["tid"]) == ("X", 0, 0)
        assert span["args"]["bound"] == record["bound"]
        assert span["args"]["simulated_us"] == pytest.approx(record["duration_us"], rel=1e-6)
        assert span["args"]["hbm_bytes"] == record["hbm_bytes"]
        assert span["dur"] == pytest.approx(record["duration_us"], abs=0.0011)
        assert span["ts"] - origin_us == pytest.approx(record["start_us"], abs=0.0021)


def test_spans_of_several_devices_and_streams(tmp_path: Path) -> None:
    xs = [torch.ones(8, device=f"trn:{index}") for index in range(2)]
    side = torch.trn.Stream("trn:1")

    def work() -> None:
        xs[0].neg()
        xs[1].neg()
        with torch.trn.stream(side):
            xs[1].neg()

    prof, _ = both(work)
    places = [(span["pid"], span["tid"]) for span in spans_of(prof, tmp_path / "trace.json")]
    assert places == [(0, 0), (1, 0), (1, side.stream_id)]
    assert [event.device_index for event in device_events(prof)] == [0, 1, 1]


def test_long_simulated_times_are_kept(tmp_path: Path) -> None:
    """Simulated spans may lie far beyond the wall time of the window."""
    y = torch.ones(2048, 2048, device="trn", dtype=torch.bfloat16)
    with profile(activities=ACTIVITIES) as prof:
        for _ in range(100):
            y.neg()
    spans = spans_of(prof, tmp_path / "trace.json")
    assert len(spans) == 100
    ends = [span["ts"] + span["dur"] for span in spans]
    assert all(span["ts"] >= end - 0.0021 for span, end in zip(spans[1:], ends, strict=False))


def test_only_the_device_or_only_the_cpu(x: Tensor) -> None:
    y = x.detach()
    with profile(activities=[ProfilerActivity.PrivateUse1]) as prof:
        y @ y
    assert [event.name for event in device_events(prof)] == ["aten::mm"]
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        y @ y
    assert device_events(prof) == []
    assert device_us(prof, "aten::mm") == 0


def test_two_windows(x: Tensor) -> None:
    """What ran between two profiles is in neither."""
    y = x.detach()
    with profile(activities=ACTIVITIES) as first:
        y @ y
    y.neg()
    with profile(activities=ACTIVITIES) as second:
        y.relu()
    assert [event.name for event in device_events(first)] == ["aten::mm"]
    assert [event.name for event in device_events(second)] == ["aten::relu"]


def test_schedule(x: Tensor) -> None:
    seen: list[list[str]] = []
    y = x.detach()
    with profile(
        activities=ACTIVITIES,
        schedule=schedule(wait=1, warmup=1, active=2, repeat=1),
        on_trace_ready=lambda prof: seen.append([event.name for event in device_events(prof)]),
    ) as prof:
        for _ in range(5):
            y @ y
            prof.step()
    assert [name for name in seen[0] if name.startswith("aten::")] == ["aten::mm", "aten::mm"]


def test_the_old_profiler_runs(x: Tensor) -> None:
    with torch.autograd.profiler.profile(use_device="trn") as prof:
        x.detach() @ x.detach()
    mm = [a for a in prof.key_averages() if a.key == "aten::mm"]
    assert sum(average.count for average in mm if average.device_type == DeviceType.CPU) == 1
