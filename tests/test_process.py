"""Processes and threads: fork, spawn, DataLoader workers, the interpreter's end."""

import pytest
from subprocess_case import run, start

BAD_FORK = (
    "Cannot re-initialize trn in forked subprocess. To use trn with multiprocessing, you must use "
    "the 'spawn' start method, and a DataLoader worker must return CPU tensors"
)
NOT_SENT = (
    "a trn:0 tensor of shape (2,) cannot be sent to another process: each process simulates its "
    "own NeuronCores. Send a CPU tensor (tensor.cpu()) and move it to trn where it arrives; a "
    "DataLoader worker must return CPU tensors"
)

FORK = """
import os, sys
import torch

def in_child(call):
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        print(call())
        sys.stdout.flush()
    except BaseException as error:
        print(type(error).__name__, error, flush=True)
    os._exit(0)
"""


def test_a_forked_child_gets_a_clear_error_at_its_first_use() -> None:
    code = (
        FORK
        + """
import io
x = torch.arange(3.0, device="trn")
x.requires_grad_()
saved = io.BytesIO()
torch.save(x, saved)

def load():
    saved.seek(0)
    return torch.load(saved)

for call in (
    lambda: torch.ones(2, device="trn"), lambda: x + 1, lambda: x.cpu(), lambda: x[0].item(),
    lambda: x.tolist(), lambda: torch.ones(2).to("trn"), lambda: torch.ones(2).trn(),
    lambda: x.detach().zero_(), lambda: x.detach().resize_(9), lambda: (x * 2).sum().backward(),
    lambda: torch._foreach_add([x], 1), lambda: x.untyped_storage().resize_(99), load,
    lambda: torch.trn.init(), lambda: torch.trn.synchronize(), lambda: torch.Stream("trn"),
    lambda: torch.Event("trn").record(), lambda: torch.empty(2, pin_memory=True),
    lambda: torch.nn.Linear(2, 2).trn(), lambda: repr(x), lambda: x.clone(),
    lambda: torch.trn.memory_allocated(),
):
    assert in_child(call) == 0
print("parent", (x + 1).tolist())
"""
    )
    lines = run(code, timeout_s=60).splitlines()
    assert lines == [f"RuntimeError {BAD_FORK}"] * 22 + ["parent [1.0, 2.0, 3.0]"]


def test_a_forked_child_may_do_everything_else() -> None:
    code = (
        FORK
        + """
x = torch.arange(3.0, device="trn")
view = x[1:]

def cpu_work():
    y = torch.ones(1 << 20)
    big = [torch.randn(1 << 20) for _ in range(3)]
    return (y.sum().item(), x.shape, view.device, torch.trn.is_initialized(),
            torch.trn._is_in_bad_fork(), torch.manual_seed(3).initial_seed())

def drop():
    global x, view
    x = view = None
    return "dropped"

assert in_child(cpu_work) == 0
assert in_child(drop) == 0
print(torch.trn.memory_allocated(), x.tolist(), torch.trn._is_in_bad_fork())
"""
    )
    assert run(code).splitlines() == [
        "(1048576.0, torch.Size([3]), device(type='trn', index=0), False, True, 3)",
        "dropped",
        "512 [0.0, 1.0, 2.0] False",
    ]


def test_a_fork_before_the_first_use_is_no_bad_one() -> None:
    code = (
        FORK
        + """
torch.manual_seed(0)
assert torch.trn.is_available() and not torch.trn.is_initialized()
for _ in range(2):
    assert in_child(lambda: (torch.ones(2, device="trn") + 1).tolist()) == 0
print(torch.trn.is_initialized(), (torch.ones(2, device="trn") + 2).tolist())
"""
    )
    assert run(code).splitlines() == ["[2.0, 2.0]"] * 2 + ["False [3.0, 3.0]"]


LOADER = """
import sys
import torch
from torch.utils.data import DataLoader, Dataset

class Numbers(Dataset):
    def __init__(self, device, early=False):
        self.device = device
    def __len__(self):
        return 6
    def __getitem__(self, index):
        return torch.full((1,), float(index)).to(self.device)

def show(loader):
    try:
        print([batch.trn().flatten().tolist() for batch in loader])
    except Exception as error:
        print(type(error).__name__, str(error).strip().splitlines()[-1])
"""


def test_data_loader_workers() -> None:
    """Under fork after use: CPU workers work, and one that touches trn stops the loop clearly."""
    code = (
        LOADER
        + """
x = torch.ones(1, device="trn")
show(DataLoader(Numbers("cpu"), batch_size=3, num_workers=2))
show(DataLoader(Numbers("cpu"), batch_size=3, num_workers=1, pin_memory=True))
show(DataLoader(Numbers("trn"), batch_size=3, num_workers=2))
for batch in DataLoader(Numbers("cpu"), batch_size=6, pin_memory=True):
    print(batch.is_pinned())
print((x + 1).tolist())
"""
    )
    batches = "[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]"
    assert run(code, timeout_s=60).splitlines() == [
        batches,
        batches,
        f"RuntimeError RuntimeError: {BAD_FORK}",
        "True",
        "[2.0]",
    ]


def test_workers_of_a_parent_without_a_device() -> None:
    """Forked before the first use, it has a device of its own, and its tensor stays there."""
    code = (
        LOADER
        + """
if __name__ == "__main__":
    show(DataLoader(Numbers("trn"), batch_size=2, num_workers=1))
    show(DataLoader(Numbers("cpu"), batch_size=3, num_workers=1, multiprocessing_context="spawn"))
"""
    )
    text = NOT_SENT.replace("(2,)", "(2, 1)")
    lines = run(code, timeout_s=60).splitlines()
    assert lines[0].startswith("RuntimeError") and lines[0].endswith(text)
    assert lines[1] == "[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]"


def test_spawned_processes() -> None:
    code = """
import torch
import torch.multiprocessing as mp

def work(index, queue):
    x = torch.arange(3.0, device="trn") * index
    queue.put(x.tolist())
    queue.put(x[1:])

if __name__ == "__main__":
    x = torch.ones(1, device="trn")
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(work, (queue,), nprocs=1)
    print(queue.get())
    try:
        queue.get()
    except RuntimeError as error:
        print(error)
    print((x + 1).item())
"""
    assert run(code, timeout_s=60).splitlines() == ["[0.0, 0.0, 0.0]", NOT_SENT, "2.0"]


@pytest.mark.parametrize("end", ["pass", "threading.Thread(target=later).start()"])
def test_the_interpreter_ends_with_live_tensors(end: str) -> None:
    code = f"""
import atexit, os, sys, threading, time
import torch
import torch_trn

class Holder:
    def __del__(self):
        self.x = None

def later():
    time.sleep(0.3)
    (x + 2).tolist()

@atexit.register
def last():
    print((x * 3).tolist(), flush=True)

x = torch.ones(2, device="trn:1", requires_grad=True)
kept = [Holder(), (x * 2).sum(), torch.Stream("trn"), torch.Event("trn"), torch.Generator("trn")]
kept[0].x = torch.ones(1 << 20, device="trn")
kept[0].me = kept[0]
sys.kept = kept
sys.modules["kept"] = kept
profile = torch_trn.profile()
profile.__enter__()
x * 2
print("end", flush=True)
{end}
"""
    done = start(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n[3.0, 3.0]\n", "")


def test_pointwise_operators_do_not_import_the_compiler() -> None:
    """torch's Python Meta kernels would: two seconds and more at the first addition."""
    code = """
import sys
import torch
x = torch.ones(4, 4, device="trn").requires_grad_()
y = (x + 1) * x - x / 2 @ torch.nn.functional.gelu(x)
y.masked_fill(y > 9, 0).sum().item()
x.detach().clone().add_(1).mul_(2)
print([name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules])
"""
    assert run(code) == "[]\n"


def test_threads_have_their_own_current_device_and_share_hbm() -> None:
    code = """
import threading
import torch

errors, results = [], {}

def work(index):
    try:
        torch.trn.set_device(index % 4)
        generator = torch.Generator("trn").manual_seed(index)
        w = torch.eye(16, device="trn", requires_grad=True)
        total = 0.0
        for step in range(60):
            x = torch.full((16, 16), float(index), device="trn")
            (x @ w + step).relu().sum().backward()
            total += float(torch.cat([w.grad, x[:step % 5]]).sum())
            w.grad = None
            torch.empty(step * 4096 + 1, device="trn")
            assert x.device.index == torch.trn.current_device() == index % 4
        results[index] = total, torch.rand(2, device="trn", generator=generator).tolist()
    except BaseException as error:
        errors.append(error)

torch.trn.set_device(7)
threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(errors, torch.trn.current_device())
expected = [60 * 4096.0 * i + sum(16.0 * i * (s % 5) for s in range(60)) for i in range(8)]
print([results[i][0] for i in range(8)] == expected)
draws = [torch.rand(2, generator=torch.Generator().manual_seed(i)).tolist() for i in range(8)]
print([results[i][1] for i in range(8)] == draws)
print([torch.trn.memory_allocated(i) for i in range(4)])
"""
    assert run(code, timeout_s=60).splitlines() == [
        "[] 7",
        "True",
        "True",
        "[0, 0, 0, 0]",
    ]
