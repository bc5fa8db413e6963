"""`torch_trn.profile`: record what the devices did in simulated time, then look at it."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from torch_trn import _C, eager, runtime
from torch_trn.profiler import chrome_trace, explain, table
from torch_trn.profiler import memory as memory_view
from torch_trn.profiler.memory import MemoryPeak
from torch_trn.profiler.memory_mark import MemoryMarks
from torch_trn.profiler.module_path import ModulePaths
from torch_trn.profiler.python_stack import PythonStacks
from torch_trn.profiler.recording import (
    ENGINE_NAMES,
    Entry,
    Peak,
    Recording,
    sorted_columns,
    sorted_memory,
)
from torch_trn.profiler.spans import ProfileTimeline

_PS_PER_US = 1e6
_PEAK_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)

_running = threading.Lock()
"""Held from the start to the end of the one profile that can run in a process."""


class profile:
    """Context manager that records every operator the devices execute, of all threads.

        with torch_trn.profile() as prof:
            loss = model(x).sum()
            loss.backward()
        print(prof.table())
        prof.export_chrome_trace("trace.json")

    Results are there after the block. All times are simulated and the same in every run.

    Args:
        shapes: give each record the shapes and dtypes of its arguments.
        modules: give each record the path of its module (`model.layers.0.attn`), backward too.
        stacks: give each record the Python stack that called it (slow: Python runs per operator).
        memory: log every block of HBM for `memory()` and `memory_table()`; turns `modules` on.

    Raises:
        RuntimeError: a profile is running already, or results are asked for before its end.
    """

    _grows_hbm = False
    """Whether a full device gets more HBM instead of an OutOfMemoryError; needs `memory`."""

    def __init__(
        self,
        *,
        shapes: bool = False,
        modules: bool = False,
        stacks: bool = False,
        memory: bool = False,
    ) -> None:
        self._shapes = shapes
        self._modules = modules or memory
        self._stacks = stacks
        self._memory = memory
        self._memory_marks = MemoryMarks()
        self._memory_log: list[memory_view.LogEvent] = []
        self._module_paths = ModulePaths(_C.set_module)
        self._python_stacks = PythonStacks()
        self._origin_ps = 0
        self._recording: Recording | None = None
        self._timeline: ProfileTimeline | None = None

    def __enter__(self) -> "profile":
        if not _running.acquire(blocking=False):
            raise RuntimeError(
                "a torch_trn.profile is running already, and one process records one at a time: "
                "leave its `with` block before you start another"
            )
        self._recording = self._timeline = None
        try:
            self._start()
        except BaseException:
            _running.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._stop()
        finally:
            _running.release()

    def table(
        self, *, sort_by: str = "total", group_by: str = "operator", limit: int | None = None
    ) -> str:
        """What took the time, summed by operator or otherwise, as text.

        Operators that ran on the host are marked `[host]` and named below the table.

        Args:
            sort_by: total, mean, calls, flops, hbm_bytes, mfu or name.
            group_by: operator, shapes (operator with its shapes), module, stack, device or bound.
            limit: so many rows, the others summed into one (None: all).

        Raises:
            ValueError: another value, or a grouping by what was not recorded.
        """
        return table.text(self._done(), sort_by=sort_by, group_by=group_by, limit=limit)

    def explain(self, *, limit: int = 5) -> str:
        """Why the operators that took most of the time took it, a paragraph for each.

        An operator with other shapes is another one. Of each: what bounds it, its launch, how busy
        its kernel keeps each engine, what the busiest one waited for, and its rates against what
        HBM and TensorE can do.

        Args:
            limit: for so many operators, those with the longest total first.

        Raises:
            ValueError: a `limit` below 1.
        """
        return explain.text(self._done(), eager.sums_of, limit=limit)

    def memory(self, device: int | None = None) -> MemoryPeak:
        """The HBM of a device when it was fullest, by category; needs `profile(memory=True)`.

        What is in which category: `torch_trn.profiler.memory`.

        Args:
            device: its index (None: the device with the highest peak).

        Raises:
            ValueError: the profile did not record memory, or that device held none.
        """
        by_device = memory_view.peaks(self._memory_done(), self._done().modules)
        if device is None:
            return memory_view.fullest(by_device)
        if device not in by_device:
            held = ", ".join(f"trn:{index}" for index in by_device) or "none"
            raise ValueError(f"trn:{device} held no memory in this profile; those that did: {held}")
        return by_device[device]

    def memory_table(self, device: int | None = None, *, limit: int = 5) -> str:
        """`memory` as text, with the `limit` largest blocks.

        Raises:
            ValueError: as `memory`; a `limit` below 0.
        """
        return memory_view.text(self.memory(device), limit=limit)

    def records(self) -> list[dict[str, Any]]:
        """One dict per executed operator, by start.

        `name`, `device` ('trn:0'), `stream`, `start_us` (since the profile's start), `duration_us`
        (launch and kernel), `launch_us`, `bound`, `busy_us` (a dict by engine), `flops`,
        `hbm_bytes`, `host`; on request `shapes` and `dtypes`, `module`, `stack`.
        """
        recording = self._done()
        common = {key: self._common(entry) for key, entry in recording.entries.items()}
        return [self._record(recording, common[row[0]], row) for row in recording.columns.tolist()]

    @property
    def timeline(self) -> ProfileTimeline:
        """Every span of every track; see `torch_trn.profiler.spans`."""
        recording = self._done()
        if self._timeline is None:
            self._timeline = ProfileTimeline(recording, eager.timeline_of)
        return self._timeline

    @property
    def total_us(self) -> float:
        """The sum of all operators' durations; that of the operator spans in the trace."""
        return self._done().total_ps / _PS_PER_US

    @property
    def elapsed_us(self) -> float:
        """From the start of the first operator to the end of the last."""
        return self._done().elapsed_ps / _PS_PER_US

    def export_chrome_trace(self, path: str | Path) -> None:
        """Write a trace to open in Perfetto or chrome://tracing.

        Raises:
            OSError: the file cannot be written.
        """
        current = runtime.current()
        name = f"({current.core.name} of {current.system.name}, LNC={current.lnc})"
        devices = set(self._done().column("device").tolist())
        chrome_trace.write(path, self.timeline, dict.fromkeys(devices, name))

    def _start(self) -> None:
        self._origin_ps = _C.host_clock_ps()
        if self._memory:
            self._memory_marks.start(grows=self._grows_hbm)
        if self._modules:
            self._module_paths = ModulePaths(_C.set_module)
            self._module_paths.start()
        if self._stacks:
            self._python_stacks = PythonStacks()
            _C.set_stack_callback(self._python_stacks.capture)
        _C.profile_start(self._modules, self._stacks)

    def _stop(self) -> None:
        records, memory = _C.profile_stop()
        if self._memory:
            self._memory_log = self._memory_marks.stop()
        if self._modules:
            self._module_paths.stop()
        if self._stacks:
            _C.set_stack_callback(None)
        columns = sorted_columns(records, self._origin_ps)
        self._recording = Recording(
            columns=columns,
            memory=sorted_memory(memory, self._origin_ps),
            entries={key: _entry(key) for key in sorted(set(columns[:, 0].tolist()))},
            modules=self._module_paths.names if self._modules else [""],
            stacks=self._python_stacks.texts() if self._stacks else [()],
            peak=_peak(),
        )

    def _done(self) -> Recording:
        if self._recording is None:
            raise RuntimeError(
                "this profile has no results yet: they are there after its `with` block"
            )
        return self._recording

    def _memory_done(self) -> list[memory_view.LogEvent]:
        self._done()
        if not self._memory:
            raise ValueError(
                "this profile did not record memory; profile with torch_trn.profile(memory=True)"
            )
        return self._memory_log

    def _common(self, entry: Entry) -> dict[str, Any]:
        """The part of a record that is the same for all records of an entry."""
        common: dict[str, Any] = {
            "name": entry.name,
            "bound": entry.bound,
            "flops": entry.flops,
            "hbm_bytes": entry.hbm_bytes,
            "host": entry.host,
        }
        if self._shapes:
            common |= {"shapes": entry.shapes, "dtypes": entry.dtypes}
        busy_us = (busy_ps / _PS_PER_US for busy_ps in entry.busy_ps)
        return common | {"busy_us": dict(zip(ENGINE_NAMES, busy_us, strict=True))}

    def _record(
        self, recording: Recording, common: dict[str, Any], row: list[int]
    ) -> dict[str, Any]:
        _, device, stream, start_ps, duration_ps, launch_ps, module, stack, _ = row
        record = common | {
            "busy_us": dict(common["busy_us"]),
            "device": f"trn:{device}",
            "stream": stream,
            "start_us": start_ps / _PS_PER_US,
            "duration_us": duration_ps / _PS_PER_US,
            "launch_us": launch_ps / _PS_PER_US,
        }
        if self._modules:
            record["module"] = recording.modules[module]
        if self._stacks:
            record["stack"] = recording.stacks[stack]
        return record


def _entry(entry_id: int) -> Entry:
    """What the device knows of an operator, and the call that it was priced for."""
    cost = _C.entry(entry_id)
    call = eager.call_of(entry_id)
    tensors = [] if call is None else call.tensors()
    return Entry(
        name=cost["name"],
        duration_ps=cost["duration_ps"],
        busy_ps=cost["busy_ps"],
        flops=cost["flops"],
        hbm_bytes=cost["hbm_bytes"],
        bound=cost["bound"],
        host=cost["host"],
        host_reason=eager.host_reason(entry_id),
        shapes=tuple(tensor.shape for tensor in tensors),
        dtypes=tuple(tensor.dtype for tensor in tensors),
    )


def _peak() -> Peak:
    """What all physical cores of a device can do together."""
    current = runtime.current()
    core = current.core
    return Peak(
        flops={dtype: core.peak_flops(dtype) * current.lnc for dtype in _PEAK_DTYPES},
        hbm_bytes_per_s=core.hbm_bytes_per_s * current.lnc,
        dma_bytes_per_s=core.dma_bytes_per_s * current.lnc,
    )
