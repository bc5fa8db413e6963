"""`torch_trn.profile` on the device: what is recorded, attributed and added up."""

import json
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_trn
from torch_trn import _C
from torch_trn.profiler.recording import BOUNDS, ENGINE_NAMES


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.attn = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attn(self.norm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().to("trn")


def test_both_sides_name_the_same_bounds() -> None:
    assert _C.BOUNDS == BOUNDS


def test_records(model: Model) -> None:
    x = torch.randn(32, 64, device="trn")
    with torch_trn.profile() as prof:
        y = model(x)
    records = prof.records()
    assert [record["name"] for record in records] == 2 * [
        "aten::native_layer_norm",
        "aten::addmm",
        "aten::add.Tensor",
    ]
    assert y.shape == (32, 64)
    for record in records:
        assert record["bound"] in BOUNDS
        assert set(record["busy_us"]) == set(ENGINE_NAMES)
        assert record["device"] == "trn:0"
        assert not record["host"]
        assert not {"shapes", "module", "stack"} & record.keys()
    assert records[1]["flops"] == 2 * 32 * 64 * 64
    starts_us = [record["start_us"] for record in records]
    assert starts_us == sorted(starts_us) and starts_us[0] >= 0


def test_shapes_modules_and_stacks_on_request(model: Model) -> None:
    x = torch.randn(32, 64, device="trn")
    with torch_trn.profile(shapes=True, modules=True, stacks=True) as prof:
        model(x).sum().backward()
    records = prof.records()
    forward = {record["name"]: record for record in records[:3]}
    linear = forward["aten::addmm"]
    assert linear["shapes"] == ((64,), (32, 64), (64, 64))
    assert linear["dtypes"] == (torch.float32,) * 3
    assert linear["module"] == "model.layers.0.attn"
    assert forward["aten::add.Tensor"]["module"] == "model.layers.0"
    assert linear["stack"][0].endswith(" Block.forward")
    assert linear["stack"][0].startswith(__file__)
    norms = [r["module"] for r in records if r["name"] == "aten::native_layer_norm_backward"]
    assert norms == ["model.layers.1.norm", "model.layers.0.norm"]
    assert "model.layers.1.attn" in prof.table(group_by="module")


def test_the_backward_of_a_view_has_its_module() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = x.chunk(2, -1)
            return first * second

    model = Halves()
    x = torch.randn(8, 64, device="trn", requires_grad=True)
    with torch_trn.profile(modules=True) as prof:
        model(x).sum().backward()
    modules = {record["name"]: record["module"] for record in prof.records()}
    assert modules["aten::cat"] == "model"


def test_a_checkpointed_block_has_its_module_in_the_recomputation_too(model: Model) -> None:
    x = torch.randn(8, 64, device="trn", requires_grad=True)
    with torch_trn.profile(modules=True) as prof:
        checkpoint(model, x, use_reentrant=False).sum().backward()
    norms = [r["module"] for r in prof.records() if r["name"] == "aten::native_layer_norm"]
    assert norms == 2 * ["model.layers.0.norm", "model.layers.1.norm"]


def test_every_total_is_the_sum_of_exported_spans(model: Model, tmp_path: Path) -> None:
    x = torch.randn(32, 64)
    with torch_trn.profile() as prof:
        model(x.to("trn")).sum().backward()
    sums_ps = dict.fromkeys(("operators", *ENGINE_NAMES), 0)
    for span in prof.timeline:
        if span.track != "launch":
            sums_ps[span.track.split()[0]] += span.end_ps - span.start_ps
    assert sums_ps.pop("operators") / 1e6 == prof.total_us
    assert tuple(sums_ps.values()) == prof.timeline.busy_ps
    assert sum(record["duration_us"] for record in prof.records()) == pytest.approx(prof.total_us)
    prof.export_chrome_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(prof.timeline.spans)
    assert {"HBM allocated"} == {event["name"] for event in events if event["ph"] == "C"}


def test_two_profiles_of_one_program_are_equal(model: Model, tmp_path: Path) -> None:
    x = torch.randn(32, 64, device="trn")
    model(x).sum().backward()
    for name in ("a", "b"):
        torch.trn.synchronize()
        model.zero_grad()
        with torch_trn.profile(modules=True) as prof:
            model(x).sum().backward()
            torch.trn.synchronize()
        prof.export_chrome_trace(tmp_path / name)
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("a", "b"))
    spans = [
        [event for event in trace["traceEvents"] if event["ph"] == "X"] for trace in (first, second)
    ]
    assert spans[0] == spans[1]


def test_the_hosts_share_is_named() -> None:
    x = torch.randn(16, 16, device="trn", dtype=torch.float64)
    with torch_trn.profile() as prof:
        x @ x
    (record,) = prof.records()
    assert (record["host"], record["bound"]) == (True, "Host")
    assert "aten::mm [host]" in prof.table()
    assert "[host]: 1 operator (1 call, 100.0% of the time) ran on the host" in prof.table()


def test_profiles_do_not_nest() -> None:
    with torch_trn.profile() as outer:
        with pytest.raises(RuntimeError, match="a torch_trn.profile is running already"):
            with torch_trn.profile():
                pass
        torch.ones(4, device="trn").neg()
    assert "aten::neg" in [record["name"] for record in outer.records()]
    with torch_trn.profile() as after:
        pass
    assert after.records() == [] and after.total_us == after.elapsed_us == 0.0


def test_results_before_the_end() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch_trn.profile().table()
    assert str(caught.value) == (
        "this profile has no results yet: they are there after its `with` block"
    )


def test_an_error_in_the_block_ends_the_profile(model: Model) -> None:
    x = torch.randn(32, 64, device="trn")
    with pytest.raises(ZeroDivisionError), torch_trn.profile(modules=True) as prof:
        model(x)
        raise ZeroDivisionError
    assert len(prof.records()) == 6


def test_devices_streams_and_threads_are_recorded() -> None:
    xs = [torch.ones(8, device=f"trn:{index}") for index in range(3)]
    side = torch.trn.Stream("trn:1")

    def on_a_stream() -> None:
        with torch.trn.stream(side):
            xs[1].neg()

    xs[0].neg()
    with torch_trn.profile() as prof:
        xs[2].neg()
        threads = [threading.Thread(target=on_a_stream), threading.Thread(target=xs[0].neg)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        xs[0].to("trn:2")
    xs[0].neg()
    places = {(r["name"], r["device"], r["stream"]) for r in prof.records()}
    assert places == {
        ("aten::neg", "trn:0", 0),
        ("aten::neg", "trn:1", side.stream_id),
        ("aten::neg", "trn:2", 0),
        ("aten::copy_ (device to device)", "trn:2", 0),
    }
    assert len(prof.records()) == 4, "nothing from before or after the block"
    assert {line.split()[0] for line in prof.table(group_by="device").splitlines()[2:]} == {
        "trn:0",
        "trn:1",
        "trn:2",
        "total",
    }


def test_the_hbm_counter_ends_at_what_is_allocated(tmp_path: Path) -> None:
    kept = []
    with torch_trn.profile() as prof:
        for _ in range(3):
            kept.append(torch.ones(1 << 18, device="trn"))
        kept.pop()
        kept.append(kept[0] + kept[1])
    prof.export_chrome_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    levels = [(e["ts"], e["args"]["bytes"]) for e in events if e["ph"] == "C" and e["pid"] == 1]
    before = levels[0][1] - (1 << 20)
    assert [level - before for _, level in levels] == [size << 20 for size in (1, 2, 3, 2, 3)]
    assert levels[-1][1] == torch.trn.memory_allocated()
    assert [time for time, _ in levels] == sorted(time for time, _ in levels)


def test_sums_of_the_table(model: Model) -> None:
    x = torch.randn(32, 64, device="trn")
    with torch_trn.profile(modules=True, stacks=True) as prof:
        model(x).sum().backward()
    records = prof.records()
    for group in ("operator", "shapes", "module", "stack", "device", "bound"):
        total = prof.table(group_by=group).splitlines()[-1].split()
        assert total[:3] == ["total", str(len(records)), f"{prof.total_us:,.1f}"]
    short = prof.table(limit=1).splitlines()
    assert (
        len(short) == 5
        and short[3].startswith("(")
        and short[4] == (prof.table(limit=1, sort_by="calls").splitlines()[4])
    )
    for keywords, text in (
        ({"group_by": "color"}, "group_by is 'color'; choices: operator, shapes, module"),
        ({"sort_by": "color"}, "sort_by is 'color'; choices: total, mean, calls"),
        ({"limit": 0}, "limit is 0; it must be at least 1, or None for all rows"),
    ):
        with pytest.raises(ValueError) as caught:
            prof.table(**keywords)
        assert str(caught.value).startswith(text)
    with torch_trn.profile() as plain:
        model(x)
    with pytest.raises(ValueError, match="group_by='module': none was recorded; profile with"):
        plain.table(group_by="module")


def test_backward_has_the_stack_of_its_call(model: Model) -> None:
    def loss_of(x: torch.Tensor) -> torch.Tensor:
        return (x * x).sum()

    x = torch.randn(8, 64, device="trn", requires_grad=True)
    with torch_trn.profile(stacks=True) as prof:
        loss = loss_of(x)
        loss.backward()
    forward, *_, backward = [r for r in prof.records() if r["name"] == "aten::mul.Tensor"]
    assert forward["stack"][0].endswith("<locals>.loss_of")
    assert forward["stack"][0].startswith(__file__)
    assert backward["stack"][0].endswith("test_backward_has_the_stack_of_its_call")


def test_a_profile_can_run_again() -> None:
    x = torch.ones(8, device="trn")
    prof = torch_trn.profile()
    for count in (1, 2):
        with prof:
            for _ in range(count):
                x.neg()
        assert [record["name"] for record in prof.records()] == count * ["aten::neg"]
        assert len(list(prof.timeline)) == len(prof.timeline.spans)
