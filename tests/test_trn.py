"""`torch.trn`: what a program asks of a device module, with the texts of its errors."""

import importlib
import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

COUNT = 64
"""Logical cores of trn2.48xlarge with LNC=2, the default system."""


@pytest.fixture(autouse=True)
def first_device() -> Iterator[None]:
    torch.trn.set_device(0)
    yield
    assert torch.trn.current_device() == 0, "a test left another device current"


def run(program: str) -> str:
    """What a program prints in a fresh process."""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_devices() -> None:
    assert torch.trn.is_available()
    assert torch.trn.device_count() == COUNT
    assert torch.get_device_module("trn") is torch.trn
    assert torch.trn.get_device_name(3) == "NeuronCore-v3 of trn2.48xlarge (LNC=2)"
    assert torch.trn.get_device_capability() == (3, 0)
    properties = torch.trn.get_device_properties("trn:5")
    assert (properties.physical_cores, properties.total_memory) == (2, 24 << 30)
    assert properties.peak_flops == 4 * properties.peak_flops_fp32 == 2 * 78.6432e12


def test_the_current_device() -> None:
    with torch.trn.device(3):
        assert torch.trn.current_device() == 3
        assert torch.ones(1, device="trn").device.index == 3
        for nothing in (None, -1):
            with torch.trn.device(nothing):
                assert torch.trn.current_device() == 3
        with pytest.raises(KeyError), torch.trn.device("trn:4"):
            raise KeyError
        assert torch.trn.current_device() == 3
    with torch.trn.device_of(torch.ones(1, device="trn:7")):
        assert torch.trn.current_device() == torch.accelerator.current_device_index() == 7
    with torch.trn.device_of(torch.ones(1)):
        assert torch.trn.current_device() == 0


@pytest.mark.parametrize(
    "call",
    [
        torch.trn.set_device,
        torch.trn.device,
        torch.trn.synchronize,
        torch.trn.Stream,
        torch.trn.current_stream,
        torch.trn.get_device_properties,
        torch.trn.memory_stats,
        torch.trn.mem_get_info,
        torch.trn.get_rng_state,
    ],
)
def test_a_device_that_does_not_exist(call: Callable[[Any], Any]) -> None:
    with pytest.raises(RuntimeError) as caught:
        call(70)
    assert str(caught.value) == (
        "Invalid trn device index 70: this process has 64 logical NeuronCores, trn:0 to trn:63"
    )


def test_an_index_that_torch_has_wrapped_is_explained() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.trn.synchronize(torch.device("trn", 130))
    assert str(caught.value) == (
        "Invalid trn device index -126: this process has 64 logical NeuronCores, trn:0 to trn:63 "
        "(torch keeps indices up to 127 and turns 130 into -126)"
    )


def test_a_device_of_another_type() -> None:
    with pytest.raises(ValueError, match="expected a trn device, got 'cpu'"):
        torch.trn.get_device_name("cpu")


def test_submodules_are_not_loaded_twice() -> None:
    for name in ("amp", "memory", "random"):
        assert importlib.import_module(f"torch.trn.{name}") is getattr(torch.trn, name)


def test_streams() -> None:
    default, side = torch.trn.current_stream(), torch.trn.Stream()
    assert default == torch.trn.default_stream() != side
    with torch.trn.stream(side):
        assert torch.trn.current_stream() == side
    other = torch.trn.Stream(2)
    with pytest.raises(KeyError), torch.trn.stream(other):
        assert (torch.trn.current_device(), torch.trn.current_stream()) == (2, other)
        raise KeyError
    assert torch.trn.current_stream() == default
    assert torch.trn.current_stream(2) == torch.trn.default_stream(2)
    assert repr(other) == f"torch.trn.Stream(device=trn:2, stream_id={other.stream_id})"
    side.wait_stream(default)
    default.wait_event(side.record_event())
    side.synchronize()
    assert side.query()


def test_events_measure_simulated_time() -> None:
    x = torch.ones(256, 256, device="trn")
    torch.trn.synchronize()
    before, after = (torch.trn.Event(enable_timing=True) for _ in range(2))
    started_ps = torch.trn.host_clock_ps()
    before.record()
    x @ x
    after.record()
    assert isinstance(after, torch.Event) and isinstance(after, torch.trn.Event)
    after.synchronize()
    ended_ps = torch.trn.stream_clock_ps()
    assert torch.trn.host_clock_ps() == ended_ps
    assert before.elapsed_time(after) == (ended_ps - started_ps) / 1e9 > 0


def test_memory() -> None:
    torch.trn.synchronize()
    before = torch.trn.memory_allocated(9)
    torch.trn.reset_peak_memory_stats(9)
    x = torch.empty(1 << 20, device="trn:9")
    assert torch.trn.memory_allocated("trn:9") - before == 4 << 20
    assert torch.trn.max_memory_allocated(9) == before + (4 << 20)
    assert torch.trn.memory_reserved(9) >= 4 << 20
    free_bytes, total_bytes = torch.trn.mem_get_info(9)
    assert total_bytes == 24 << 30 and free_bytes <= total_bytes - (4 << 20)
    stats = torch.trn.memory_stats(9)
    nested = torch.trn.memory_stats_as_nested_dict(9)
    assert list(stats) == sorted(stats)
    assert nested["allocated_bytes"]["all"]["current"] == stats["allocated_bytes.all.current"]
    blocks = [block for segment in torch.trn.memory_snapshot(9) for block in segment["blocks"]]
    assert any(block["requested_size"] == 4 << 20 for block in blocks)
    del x
    assert torch.trn.memory_allocated(9) == before
    torch.trn.empty_cache()
    assert torch.trn.max_memory_allocated(9) == before + (4 << 20)


def test_memory_summary() -> None:
    torch.trn.reset_accumulated_memory_stats(11)  # whatever other tests did to this device
    x = torch.empty(1 << 20, device="trn:11")
    summary = torch.trn.memory_summary(11)
    header, _, allocated = summary.splitlines()[:3]
    assert header.split() == "trn:11 current peak total allocated total freed".split()
    assert allocated.split()[:4] == ["allocated", "memory", "4.00", "MiB"]
    assert re.fullmatch(
        r"HBM: 23\.\d\d GiB free of 24\.00 GiB; out-of-memory errors: 0, allocations tried again "
        r"after emptying the cache: 0",
        summary.splitlines()[-1],
    )
    assert len(torch.trn.memory_summary(11, abbreviated=True).splitlines()) == 7
    del x


def test_random_numbers_are_those_of_the_cpu() -> None:
    torch.manual_seed(5)
    on_trn = torch.randn(100, device="trn").cpu()
    torch.manual_seed(5)
    assert torch.equal(on_trn, torch.randn(100))
    assert torch.trn.initial_seed() == 5


def test_random_states() -> None:
    torch.trn.manual_seed_all(1)
    state = torch.trn.get_rng_state()
    assert (state.dtype, state.numel()) == (torch.uint8, 16)
    first = torch.rand(5, device="trn").cpu()
    torch.trn.set_rng_state(state)
    assert torch.equal(torch.rand(5, device="trn").cpu(), first)
    states = torch.trn.get_rng_state_all()
    assert len(states) == len(torch.trn.default_generators) == COUNT
    torch.trn.set_rng_state_all(states)
    with torch.random.fork_rng(devices=[0], device_type="trn"):
        torch.rand(5, device="trn")
    assert torch.equal(torch.trn.get_rng_state(), states[0])


def test_autocast() -> None:
    x = torch.ones(8, 8, device="trn")

    @torch.trn.amp.autocast()
    def product() -> torch.Tensor:
        return x @ x

    assert product().dtype == torch.bfloat16
    with torch.trn.amp.autocast(dtype=torch.float16):
        assert (x @ x).dtype == torch.float16
    with torch.trn.amp.autocast(enabled=False):
        assert (x @ x).dtype == torch.float32
    assert torch.trn.get_amp_supported_dtype() == [torch.bfloat16, torch.float16]


def test_grad_scaler() -> None:
    model = torch.nn.Linear(4, 4).to("trn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.trn.amp.GradScaler(init_scale=8.0)
    scaler.scale(model(torch.ones(1, 4, device="trn")).sum()).backward()
    assert torch.equal(model.bias.grad.cpu(), torch.full((4,), 8.0))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 8.0


def test_loading_a_file_from_a_device_that_does_not_exist() -> None:
    saved = io.BytesIO()
    torch.save(torch.ones(2, device="trn:63"), saved)
    with pytest.raises(RuntimeError, match=r"device_count\(\) is 64. Please use torch.load with"):
        torch.load(io.BytesIO(saved.getvalue().replace(b"trn:63", b"trn:99")))


def test_seeding_and_asking_leave_the_device_uninitialised_so_a_fork_can_use_it() -> None:
    printed = run(
        "import os, torch\n"
        "torch.manual_seed(0)\n"
        "torch.trn.is_available(), torch.trn.memory_allocated(), torch.trn.device_count()\n"
        "print(torch.trn.is_initialized(), torch.trn._initialized, flush=True)\n"
        "if os.fork() == 0:\n"
        "    print(torch.ones(2, device='trn').sum().item(), flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
    )
    assert printed.split() == ["False", "False", "2.0"]


def test_a_fork_after_initialisation_is_refused() -> None:
    printed = run(
        "import os, torch\n"
        "torch.ones(1, device='trn')\n"
        "if os.fork() == 0:\n"
        "    torch.manual_seed(0)\n"
        "    try:\n"
        "        torch.trn.init()\n"
        "    except RuntimeError as error:\n"
        "        print(torch.trn.is_initialized(), error, flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
    )
    assert printed.startswith("False Cannot re-initialize trn in forked subprocess.")
