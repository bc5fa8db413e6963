"""Simulated time: the two clocks, streams and events, and that every run gives the same."""

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from subprocess_case import run, start
from torch import Tensor

import torch_trn
from torch_trn import _C, eager, runtime

SYSTEM = runtime.current().system
DISPATCH_PS = SYSTEM.dispatch_ps
"""Host time of one operator."""


def kernel_ps(name: str, *shape: int) -> int:
    """How long an executed float32 operator on a tensor of this shape takes on the device."""
    for entry, call in eager._calls.items():
        specs = call.tensors()
        if call.name == name and (specs[0].shape, specs[0].dtype) == (shape, torch.float32):
            return int(_C.entry(entry)["duration_ps"]) + SYSTEM.launch_ps
    raise AssertionError(f"no {name} on {shape} was executed")


def mm_ps() -> int:
    """Of the fixture `x` times itself."""
    return kernel_ps("aten::mm", 256, 256)


def add_ps() -> int:
    """Of the fixture `x` plus itself."""
    return kernel_ps("aten::add.Tensor", 256, 256)


@pytest.fixture(autouse=True)
def idle() -> Iterator[None]:
    """All devices have done their work: both clocks start together."""
    for index in range(3):
        torch.trn.synchronize(index)
    yield


@pytest.fixture
def x() -> Tensor:
    x = torch.ones(256, 256, device="trn")
    x @ x  # priced, so that its entry is there
    x + x
    torch.trn.synchronize()
    return x


def host_ps() -> int:
    return torch.trn.host_clock_ps()


def device_ps(index: int = 0) -> int:
    return torch.trn.stream_clock_ps(index)


def profiled(function: object) -> list[tuple[str, int, int, int]]:
    """(name, stream, start, end) in picoseconds since now of what `function` executes."""
    with torch_trn.profile() as prof:
        function()  # type: ignore[operator]
    return [
        (record["name"], record["stream"], *(round(1e6 * us) for us in span))
        for record in prof.records()
        for span in [(record["start_us"], record["start_us"] + record["duration_us"])]
    ]


def test_an_operator_moves_both_clocks(x: Tensor) -> None:
    start = host_ps()
    x @ x
    assert host_ps() - start == DISPATCH_PS
    assert device_ps() - host_ps() == mm_ps()
    x @ x  # queued behind the first
    assert host_ps() - start == 2 * DISPATCH_PS
    assert device_ps() - start == DISPATCH_PS + 2 * mm_ps()


def test_views_and_empty_tensors_take_no_time(x: Tensor) -> None:
    before = host_ps(), device_ps()
    x.view(-1)[::2].view(128, 256).t().unsqueeze(0).expand(3, -1, -1).select(0, 1)
    torch.empty(100, device="trn")
    torch.empty_like(x).detach().chunk(2)
    assert (host_ps(), device_ps()) == before
    torch.trn.memory_allocated()
    repr(x.shape), x.stride(), x.is_contiguous(), x.data_ptr()
    assert (host_ps(), device_ps()) == before


def test_synchronize_moves_the_host_to_the_device(x: Tensor) -> None:
    x @ x
    end = device_ps()
    assert host_ps() < end
    torch.trn.synchronize()
    assert (host_ps(), device_ps()) == (end, end)
    torch.trn.synchronize()
    assert host_ps() == end, "nothing is left to wait for"


READS = {
    "item": lambda x: x[0, 0].item(),
    "bool": lambda x: bool(x[0, 0] > 0),
    "float": lambda x: float(x[1, 1]),
    "tolist": lambda x: x[0, :2].tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.cpu().numpy(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 2],
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "print": lambda x: repr(x),
    "unique": lambda x: x.unique(),
    "blocking copy": lambda x: torch.empty(256, 256).copy_(x),
}


@pytest.mark.parametrize("name", READS)
def test_reading_a_value_waits_for_it(x: Tensor, name: str) -> None:
    y = x @ x
    end = device_ps()
    READS[name](y)
    assert host_ps() >= end
    assert host_ps() == device_ps()


def test_a_non_blocking_copy_does_not_wait(x: Tensor) -> None:
    target = torch.empty(256, 256, pin_memory=True)
    x @ x
    start, end = host_ps(), device_ps()
    target.copy_(x, non_blocking=True)
    assert host_ps() == start + DISPATCH_PS < end < device_ps()
    torch.ones(4).to("trn", non_blocking=True)
    assert host_ps() == start + 2 * DISPATCH_PS
    torch.ones(4).to("trn")
    assert host_ps() == device_ps()


def transfer_ps(nbytes: int) -> int:
    return SYSTEM.host_link_fixed_ps - (-nbytes * 10**12 // SYSTEM.host_link_bytes_per_s)


def test_copies_over_the_host_link() -> None:
    for nbytes in (4, 4096, 1 << 20):
        values = torch.ones(nbytes // 4)
        start = host_ps()
        x = values.to("trn")
        assert host_ps() - start == DISPATCH_PS + transfer_ps(nbytes)
        start = host_ps()
        x.cpu()
        assert host_ps() - start == DISPATCH_PS + transfer_ps(nbytes)


def test_a_copy_between_devices_occupies_both(x: Tensor) -> None:
    x @ x
    end = device_ps(0)
    assert device_ps(1) < end
    x.to("trn:1")
    assert device_ps(0) == device_ps(1) > end
    link = runtime.current().device_link_bytes_per_s
    fixed = runtime.current().core.dma_start_ps
    assert device_ps(1) - end == fixed - (-x.nbytes * 10**12 // link)


def test_devices_work_side_by_side(x: Tensor) -> None:
    other = torch.ones(256, 256, device="trn:1")
    torch.trn.synchronize(1)
    idle_until = host_ps()
    x @ x
    other @ other
    duration = mm_ps()
    assert device_ps(0) == idle_until + DISPATCH_PS + duration
    assert device_ps(1) == idle_until + 2 * DISPATCH_PS + duration


def test_an_operator_on_the_host(x: Tensor) -> None:
    """It costs the way over the link and back, and the host waits for it."""
    y = x.double()
    torch.trn.synchronize()
    start = host_ps()
    (record,) = profiled(lambda: y @ y)
    assert record[0] == "aten::mm"
    expected = 2 * SYSTEM.host_link_fixed_ps
    for nbytes in (2 * y.nbytes, y.nbytes):
        expected += transfer_ps(nbytes) - SYSTEM.host_link_fixed_ps
    assert record[3] - record[2] == expected
    assert host_ps() == device_ps() == start + DISPATCH_PS + expected


def test_two_streams_of_one_core_take_turns(x: Tensor) -> None:
    side = torch.trn.Stream()

    def work() -> None:
        x @ x
        with torch.trn.stream(side):
            x @ x
        x + x

    duration, add = mm_ps(), add_ps()
    first = DISPATCH_PS
    assert profiled(work) == [
        ("aten::mm", 0, first, first + duration),
        ("aten::mm", side.stream_id, first + duration, first + 2 * duration),
        ("aten::add.Tensor", 0, first + 2 * duration, first + 2 * duration + add),
    ]


def test_a_stream_that_waits(x: Tensor) -> None:
    other = torch.ones(256, 256, device="trn:1")
    torch.trn.synchronize(1)
    event = torch.trn.Event()
    x @ x
    event.record()
    end = device_ps(0)
    torch.trn.current_stream(1).wait_event(event)
    other + other
    assert device_ps(1) == end + add_ps()
    assert host_ps() < end, "only the stream waited"
    torch.trn.current_stream(0).wait_stream(torch.trn.current_stream(1))
    assert device_ps(0) == device_ps(1)


def test_events(x: Tensor) -> None:
    first, second, never = (torch.trn.Event(enable_timing=True) for _ in range(3))
    first.record()
    x @ x
    x @ x
    second.record()
    assert first.query() and not second.query()
    with pytest.raises(RuntimeError, match="Both events must be completed before calculating"):
        first.elapsed_time(second)
    before = host_ps()
    second.synchronize()
    assert host_ps() == device_ps() > before
    assert second.query()
    # ms; the host dispatched the first operator after the first event
    assert first.elapsed_time(second) == (DISPATCH_PS + 2 * mm_ps()) / 1e9
    assert second.elapsed_time(first) == -first.elapsed_time(second)
    with pytest.raises(ValueError, match="Both events must be recorded before calculating"):
        first.elapsed_time(never)
    with pytest.raises(ValueError, match="must be created with argument 'enable_timing=True'"):
        first.elapsed_time(torch.trn.Event())


def test_a_stream_knows_when_it_is_done(x: Tensor) -> None:
    side = torch.trn.Stream()
    assert side.query()
    with torch.trn.stream(side):
        x @ x
    assert not side.query()
    side.synchronize()
    assert side.query() and torch.trn.current_stream().query()


def test_backward_runs_on_the_streams_of_forward(x: Tensor) -> None:
    x.requires_grad_()
    side = torch.trn.Stream()
    with torch.trn.stream(side):
        y = (x @ x).relu()
    records = profiled(lambda: y.sum().backward())
    assert [stream for name, stream, *_ in records if name == "aten::mm"] == 2 * [side.stream_id]
    assert [stream for name, stream, *_ in records if "sum" in name] == [0]


def test_a_polling_loop_ends(x: Tensor) -> None:
    """Asking takes host time, so a program that polls gets on."""
    event = torch.trn.Event()
    for _ in range(50):
        x @ x
    event.record()
    asked = 1
    while not event.query():
        asked += 1
    assert 1 < asked < 1000


def test_a_thread_starts_at_the_main_threads_clock(x: Tensor) -> None:
    clocks: list[int] = []
    thread = threading.Thread(target=lambda: clocks.append(host_ps()))
    thread.start()
    thread.join()
    assert clocks == [host_ps()]


def test_an_idle_thread_does_not_act_before_a_profile_began(x: Tensor) -> None:
    """It waited while the host clock went on: what it does next starts in the profile."""
    y = torch.ones(256, 256, device="trn:2")
    wake, clocks = threading.Event(), []

    def idle_then_work() -> None:
        clocks.append(host_ps())
        wake.wait()
        y.neg()
        clocks.append(host_ps())

    thread = threading.Thread(target=idle_then_work)
    thread.start()
    while not clocks:
        pass
    x @ x
    torch.trn.synchronize()
    began = host_ps()
    assert began > clocks[0]
    with torch_trn.profile() as prof:
        wake.set()
        thread.join()
    (record,) = prof.records()
    assert (record["name"], record["device"]) == ("aten::neg", "trn:2")
    assert round(1e6 * record["start_us"]) == DISPATCH_PS
    assert clocks[1] == began + DISPATCH_PS


TRAINING = """
import os
{prelude}
import torch
import torch_trn
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 10))
devices = ["trn:0", "trn:1", "trn:2"]
first, last = model[:2].to(devices[0]), model[2:].to(devices[1])
branch = nn.Linear(128, 10).to(devices[2])
parameters = [*first.parameters(), *last.parameters(), *branch.parameters()]
optimizer = torch.optim.AdamW(parameters)
side = torch.trn.Stream(devices[0])
with torch_trn.profile() as prof:
    for step in range(3):
        x = torch.randn(32, 64).to(devices[0])
        hidden = first(x)
        with torch.trn.stream(side):
            noise = (x @ x.t()).sum()
        y = last(hidden.to(devices[1])) + branch(hidden.to(devices[2])).to(devices[1])
        loss = nn.functional.cross_entropy(y, torch.zeros(32, dtype=torch.long, device=devices[1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(step, loss.item().hex())
    for index in range(3):
        torch.trn.synchronize(index)
columns = prof.timeline.recording.columns
print(len(columns), torch.trn.host_clock_ps(), [torch.trn.stream_clock_ps(d) for d in devices])
for record in prof.records():
    print(record["name"], record["device"], record["stream"], record["start_us"].hex())
print([torch.trn.memory_stats(d) for d in devices])
"""


def training(prelude: str = "", **environment: str) -> str:
    return run(TRAINING.format(prelude=prelude), **environment)


@pytest.fixture(scope="module")
def one_thread() -> str:
    return training(OMP_NUM_THREADS="1")


def test_a_second_run_from_another_directory_is_identical(one_thread: str) -> None:
    assert len(one_thread.splitlines()) > 100
    assert training(prelude="os.chdir('/')", OMP_NUM_THREADS="1", PYTHONHASHSEED="77") == one_thread


def test_more_threads_on_a_busy_machine_change_no_time(one_thread: str) -> None:
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        assert training(OMP_NUM_THREADS="2") == one_thread
    finally:
        for process in load:
            process.kill()
            process.wait()


def test_strict_raises_before_anything_ran() -> None:
    printed = run(
        """
import torch
x, y = (torch.zeros(4, 4, dtype=torch.float64).to("trn") for _ in range(2))
before = torch.trn.host_clock_ps(), torch.trn.memory_allocated()
for call in (lambda: x @ x, lambda: y.add_(1), lambda: x.mm(x), lambda: x.nonzero()):
    try:
        call()
    except RuntimeError as error:
        print(error)
assert before == (torch.trn.host_clock_ps(), torch.trn.memory_allocated())
print(y.cpu().sum().item())
""",
        TRN_STRICT="1",
    )
    lines = printed.splitlines()
    assert lines[0] == (
        "aten::mm has no lowering to a NeuronCore and would run on the host, which TRN_STRICT=1 "
        "forbids. Unset TRN_STRICT to let it run there (a Host span shows its cost), or use an "
        "operator that has one."
    )
    names = [line.split()[0].removeprefix("aten::") for line in lines]
    assert names == ["mm", "add_.Tensor", "mm", "nonzero", "0.0"]


def test_strict_in_a_block(x: Tensor) -> None:
    y = x.double()
    with torch_trn.override(strict=True):
        with pytest.raises(RuntimeError, match="aten::mm has no lowering to a NeuronCore"):
            y @ y
        assert (x @ x)[0, 0].item() == 256
    assert (y @ y)[0, 0].item() == 256


def test_debug_prints_every_operator() -> None:
    done = start("import torch\n(torch.ones(4, device='trn') + 1).cpu()", TRN_DEBUG="1")
    lines = done.stderr.splitlines()
    names = [line.split()[1].removeprefix("aten::") for line in lines]
    assert names == ["fill_.Scalar", "add.Tensor", "copy_"]
    assert all(line.startswith("[trn:0] ") and " us at " in line for line in lines)
    assert done.stdout == ""
